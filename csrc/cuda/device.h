// Cooperation of a cluster's threads in a GPU's instructions: barriers, exchanges between lanes and blocks, and bulk
// copies. tests/support/cuda_host.h has the same functions for threads that a CPU emulates.
#pragma once
#include <cooperative_groups.h>
#include <cstdint>

#define FASTKD_DEVICE __device__ __forceinline__
#define FASTKD_KERNEL(most_threads) __global__ void __launch_bounds__(most_threads, 1)
#define FASTKD_PARAMETER __grid_constant__

namespace fastkd::cuda {

FASTKD_DEVICE int64_t block_number() { return blockIdx.x; }
FASTKD_DEVICE int64_t block_count() { return gridDim.x; }
FASTKD_DEVICE int thread_number() { return int(threadIdx.x); }

// The shared memory of this block, of the size that the launch asks for.
FASTKD_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

FASTKD_DEVICE void sync_block() { __syncthreads(); }
FASTKD_DEVICE void sync_warp() { __syncwarp(); }

// After cluster_wait, every thread sees what others wrote before cluster_arrive, if their warps release it.
FASTKD_DEVICE void cluster_arrive(bool releases = true) {
  if (releases)
    cooperative_groups::this_cluster().barrier_arrive();
  else
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
}
FASTKD_DEVICE void cluster_wait() { cooperative_groups::this_cluster().barrier_wait(); }

// The value of the lane that is `step` above this one; below, the value of the first lane.
template <class Part>
FASTKD_DEVICE Part from_lane_above(const Part& mine, int step) {
  Part other;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(&mine);
  uint32_t* to = reinterpret_cast<uint32_t*>(&other);
#pragma unroll
  for (int i = 0; i < int(sizeof(Part) / 4); ++i) to[i] = __shfl_down_sync(~0u, from[i], step);
  return other;
}

template <class Part>
FASTKD_DEVICE Part from_first_lane(const Part& mine) {
  Part other;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(&mine);
  uint32_t* to = reinterpret_cast<uint32_t*>(&other);
#pragma unroll
  for (int i = 0; i < int(sizeof(Part) / 4); ++i) to[i] = __shfl_sync(~0u, from[i], 0);
  return other;
}

// Stores a value at the same place in the shared memory of another block of the cluster.
template <class Part>
FASTKD_DEVICE void send(Part* place, int rank, const Part& value) {
  *cooperative_groups::this_cluster().map_shared_rank(place, rank) = value;
}

// Sets bits of a word in shared memory, and returns the previous word.
FASTKD_DEVICE uint32_t set_bits(uint32_t* word, uint32_t bits) { return atomicOr(word, bits); }

// ---- bulk copies: device memory to shared memory, counted by a barrier there

using Barrier = uint64_t;

FASTKD_DEVICE unsigned shared_address(const void* memory) { return unsigned(__cvta_generic_to_shared(memory)); }

// Initializes a barrier. One arrival, and the bytes that it announces, complete a phase.
FASTKD_DEVICE void init(Barrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)));
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

FASTKD_DEVICE void expect(Barrier* barrier, int64_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(unsigned(bytes))
               : "memory");
}

// Starts a bulk copy of whole pieces, from and to multiples of PIECE.
FASTKD_DEVICE void copy_pieces(char* to, const char* from, int64_t bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(unsigned(bytes)), "r"(shared_address(barrier))
               : "memory");
}

// Waits until the barrier's phase of this parity is complete.
FASTKD_DEVICE void wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Orders this thread's accesses to shared memory before the bulk copies that start after the next barrier.
FASTKD_DEVICE void order_before_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace fastkd::cuda
