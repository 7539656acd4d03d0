// The row loss and its gradient on GPUs with thread-block clusters: each logit is read from device memory once, each
// gradient written once. What threads compute is in row.h; here is how data gets to them and between them.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>

#include "kernel.h"
#include "row.h"

namespace cg = cooperative_groups;

namespace fastkd::cuda {
namespace {

constexpr int WARP = 32, WARPS = MOST_THREADS / WARP;

// ---- the copy engine: device memory to shared memory, counted by a barrier there

__device__ unsigned shared_address(const void* memory) { return unsigned(__cvta_generic_to_shared(memory)); }

__device__ void init_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)));
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ void expect(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ void copy_pieces(char* to, const char* from, unsigned bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ void wait(uint64_t* barrier) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier))
      : "memory");
}

// ---- merging over threads, warps and the blocks of a cluster, in a fixed order

template <class Part>
__device__ Part merge_lanes(Part mine, const RowState& row, int lanes) {
  constexpr int WORDS = sizeof(Part) / 4;
#pragma unroll 1
  for (int step = lanes / 2; step > 0; step /= 2) {
    Part other;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(&mine);
    uint32_t* to = reinterpret_cast<uint32_t*>(&other);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) to[i] = __shfl_down_sync(~0u, from[i], step);
    mine = merge(mine, other, row);
  }
  return mine;
}

// A power of two of parts, at most a warp of them; of every warp the first lane has the result.
template <class Part>
__device__ Part merge_array(const Part* parts, int count, const RowState& row) {
  const int lane = threadIdx.x % WARP;
  return merge_lanes(parts[lane < count ? lane : 0], row, count);
}

// What a block shares for one exchange. Each exchange has its own, as one block may be ahead of another.
template <class Part>
struct Exchange {
  Part of_warps[WARPS], of_ranks[MOST_RANKS];
};

// The result is with thread 0 of every block.
template <class Part>
__device__ Part merge_cluster(Part mine, const RowState& row, Exchange<Part>& exchange) {
  auto cluster = cg::this_cluster();
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  mine = merge_lanes(mine, row, WARP);
  if (lane == 0) exchange.of_warps[warp] = mine;
  __syncthreads();
  const int ranks = int(cluster.num_blocks());
  if (warp == 0) {
    mine = merge_array(exchange.of_warps, blockDim.x / WARP, row);
    Part all;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(&mine);
    uint32_t* to = reinterpret_cast<uint32_t*>(&all);
    for (int i = 0; i < int(sizeof(Part) / 4); ++i) to[i] = __shfl_sync(~0u, from[i], 0);
    if (lane < ranks) *cluster.map_shared_rank(&exchange.of_ranks[cluster.block_rank()], lane) = all;
  }
  cluster.sync();
  return warp == 0 ? merge_array(exchange.of_ranks, ranks, row) : mine;
}

// ---- the kernel

template <class Divergence>
__global__ void __launch_bounds__(MOST_THREADS, 2) kd_kernel(const __grid_constant__ Call call) {
  extern __shared__ __align__(128) char memory[];
  __shared__ RowState row;
  __shared__ Exchange<Statistics> statistics_exchange[2];
  __shared__ Exchange<Sums> sums_exchange[2];
  __shared__ __align__(8) uint64_t barrier;
  const int rank = int(cg::this_cluster().block_rank());
  const Place place{rank, int(threadIdx.x)};
  const bool leader = threadIdx.x == 0;
  if (leader) {
    open_row(call, blockIdx.x / call.ranks, row);
    init_barrier(&barrier);
  }
  __syncthreads();
  if (!row.counted) return drop(call, row, place);
  cg::this_cluster().barrier_arrive();  // this block's shared memory is there for the others to write to

  // The slice comes in.
  const int64_t start = first_column(call, rank);
  const int columns = columns_of(call, rank);
  char* slices[2] = {memory, memory + int64_t(call.slice) * size_of_element(call.student.dtype)};
  const Rows* sides[2] = {&call.student, &call.teacher};
  int64_t moved = 0;
  for (int side = 0; side < 2; ++side) {
    const int element = size_of_element(sides[side]->dtype);
    const char* from = row_of(call, *sides[side], row.row) + start * element;
    const int64_t whole = whole_pieces(from, int64_t(columns) * element);
    if (leader && whole) copy_pieces(slices[side], from, unsigned(whole), &barrier);
    copy_rest(call, place, slices[side], from, whole, int64_t(columns) * element, element);
    moved += whole;
  }
  if (leader) expect(&barrier, unsigned(moved));
  clear(call, place, call.student_gradient, row.row, true);
  clear(call, place, call.teacher_gradient, row.row, true);
  wait(&barrier);
  __syncthreads();
  cg::this_cluster().barrier_wait();

#pragma unroll 1
  for (int policy = 0; policy < 2; ++policy) {
    if (needs_statistics(call, row)) {
      const Statistics mine = policy ? statistics<true>(call, row, place, slices[0], slices[1])
                                     : statistics<false>(call, row, place, slices[0], slices[1]);
      const Statistics all = merge_cluster(mine, row, statistics_exchange[policy]);
      if (leader) close_statistics(call, row, all);
    } else if (leader) {
      row.finite = true;
    }
    __syncthreads();
    if (row.finite && !call.closed_form) {
      const Sums mine = policy ? sums<Divergence, true>(call, row, place, slices[0], slices[1])
                               : sums<Divergence, false>(call, row, place, slices[0], slices[1]);
      const Sums all = merge_cluster(mine, row, sums_exchange[policy]);
      if (leader) close_sums(row, all);
      __syncthreads();
    }
    if (row.finite) break;
    __syncthreads();
    if (leader) row.log_0 = true;
    __syncthreads();
  }
  if (leader) finish(call, row, rank);
  __syncthreads();

  // The gradients go out: at once where the rows' addresses allow whole pieces, else by way of shared memory.
  char* outs[2];
  bool direct[2];
  const Rows* gradient_rows[2] = {&call.student_gradient, &call.teacher_gradient};
  for (int side = 0; side < 2; ++side) {
    const int64_t offset = start * size_of_element(sides[side]->dtype);
    outs[side] = row_of(call, *gradient_rows[side], row.row);
    if (outs[side]) outs[side] += offset;
    direct[side] = reinterpret_cast<uintptr_t>(outs[side]) % PIECE == 0;
  }
  if (!outs[0] && !outs[1]) return;
  char* student_to = direct[0] ? outs[0] : slices[0];
  char* teacher_to = direct[1] ? outs[1] : slices[1];
  if (row.log_0)
    gradients<Divergence, true>(call, row, place, slices[0], slices[1], student_to, teacher_to);
  else
    gradients<Divergence, false>(call, row, place, slices[0], slices[1], student_to, teacher_to);
  if (direct[0] && direct[1]) return;
  __syncthreads();
  for (int side = 0; side < 2; ++side) {
    const int element = size_of_element(sides[side]->dtype);
    if (!direct[side]) copy_rest(call, place, outs[side], slices[side], 0, int64_t(columns) * element, element);
  }
}

// The sum of the losses in a fixed order, by one block.
__global__ void __launch_bounds__(1024) total_kernel(const __grid_constant__ Call call) {
  __shared__ double parts[1024];
  double mine = 0;
  for (int64_t i = threadIdx.x; i < call.rows; i += blockDim.x) mine += call.loss[i];
  parts[threadIdx.x] = mine;
  for (int step = blockDim.x / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) parts[threadIdx.x] += parts[threadIdx.x + step];
  }
  if (threadIdx.x == 0)
    *call.total = float(parts[0] * call.scale * (call.scale_on_device ? *call.scale_on_device : 1));
}

constexpr int SCALE_THREADS = 256, SCALE_COLUMNS = 16 * SCALE_THREADS;

__global__ void __launch_bounds__(SCALE_THREADS)
    scale_kernel(const __grid_constant__ Call call, const float* factors, int64_t stride, int64_t tiles) {
  const int64_t row = blockIdx.x / tiles;
  const float factor = factors[row * stride];
  if (factor == 1) return;
  const Rows& rows = call.student;
  char* memory = row_of(call, rows, row);
  const int64_t first = blockIdx.x % tiles * SCALE_COLUMNS;
  const int64_t last = first + SCALE_COLUMNS < rows.width ? first + SCALE_COLUMNS : rows.width;
  for (int64_t i = first + threadIdx.x; i < last; i += SCALE_THREADS)
    store_one(memory, rows.dtype, i, factor * load_one(memory, rows.dtype, i));
}

// ---- launching

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would find this one's error
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

unsigned grid(int64_t blocks) {
  if (blocks > std::numeric_limits<int>::max()) throw std::runtime_error("more blocks than a grid has: split the rows");
  return unsigned(blocks);
}

// The device is current while this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

using Kernel = void (*)(Call);

// More shared memory than every kernel gets, and clusters of 16, have to be asked for: once a kernel and device.
void allow(Kernel kernel, int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;
  const std::lock_guard<std::mutex> lock(mutex);
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (done.count({function, device})) return;
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(SHARED_OF_ONE)),
        "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
  check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "cudaFuncSetAttribute(NonPortableClusterSizeAllowed)");
  check(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "cudaFuncSetAttribute(PreferredSharedMemoryCarveout)");
  done.insert({function, device});
}

}  // namespace

void kd_rows(Call call, int device, void* stream) {
#define FASTKD_KERNEL(name) kd_kernel<name>,
  static constexpr Kernel kernels[] = {FASTKD_DIVERGENCES(FASTKD_KERNEL)};
#undef FASTKD_KERNEL
  if (!prepare(call)) throw std::runtime_error("a row is too wide for the shared memory of a cluster");
  const OnDevice guard(device);
  if (call.rows) {
    const Kernel kernel = kernels[call.divergence];
    allow(kernel, device);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(call.ranks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(grid(call.rows * call.ranks));
    launch.blockDim = dim3(unsigned(call.threads));
    launch.dynamicSmemBytes = size_t(shared_bytes(call));
    launch.stream = static_cast<cudaStream_t>(stream);
    launch.attrs = &cluster;
    launch.numAttrs = 1;
    check(cudaLaunchKernelEx(&launch, kernel, call), "launching kd_kernel");
  }
  total_kernel<<<1, 1024, 0, static_cast<cudaStream_t>(stream)>>>(call);
  check(cudaGetLastError(), "launching total_kernel");
}

void scale_rows(const Call& call, const float* factor, int64_t stride, int device, void* stream) {
  if (!call.rows || !call.student.width) return;
  const OnDevice guard(device);
  const int64_t tiles = (call.student.width + SCALE_COLUMNS - 1) / SCALE_COLUMNS;
  scale_kernel<<<grid(call.rows * tiles), SCALE_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(call, factor,
                                                                                                      stride, tiles);
  check(cudaGetLastError(), "launching scale_kernel");
}

std::vector<std::string> divergences() {
#define FASTKD_NAME(name) #name,
  return {FASTKD_DIVERGENCES(FASTKD_NAME)};
#undef FASTKD_NAME
}

std::vector<int> architectures() {
  std::vector<int> found;
  for (const int architecture : {__CUDA_ARCH_LIST__}) found.push_back(architecture / 10);  // 900 is sm_90
  return found;
}

}  // namespace fastkd::cuda
