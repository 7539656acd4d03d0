// How a row is divided among the blocks of a cluster, so that its logits stay in their shared memory. For the host
// only.
#pragma once
#include <stdexcept>
#include <string>

#include "call.h"

namespace fastkd::cuda {

constexpr int VECTOR = 8;        // columns that a thread processes at a time: 16 bytes of bf16
constexpr int PIECE = 16;        // bytes; bulk copies move whole pieces, at multiples of this
constexpr int STAGES = 4;        // parts of a slice; a finished part is replaced by the next row's
constexpr int PORTABLE_RANKS = 8, MOST_RANKS = 16;  // of every device with clusters; of H100 and B200
constexpr int MOST_THREADS = 512;
// Bytes of shared memory that one block may have on H100 and B200. Other devices have less.
constexpr int64_t MOST_SHARED = 227 << 10;
constexpr int64_t STATE = 6 << 10;  // the part that does not hold logits (block.h, Shared)

inline int size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Bytes of one side's slice, with room for the alignment of the row, which is not always a multiple of PIECE.
inline int64_t slice_bytes(const Call& call, Dtype dtype) {
  return int64_t(call.slice) * size_of(dtype) + STAGES * PIECE;
}

// Bytes of shared memory per block. A sparse teacher has one bit per column, which marks the listed tokens.
inline int64_t shared_bytes(const Call& call) {
  const int64_t teacher = call.ids ? call.slice / 8 + PIECE : slice_bytes(call, call.teacher.dtype);
  return STATE + slice_bytes(call, call.student.dtype) + teacher;
}

inline void spread_over(Call& call, int ranks) {
  const int64_t vectors = (call.vocabulary + VECTOR * ranks - 1) / (VECTOR * ranks);
  call.ranks = ranks;
  call.slice = int(vectors < MOST_SHARED ? vectors * VECTOR : MOST_SHARED);  // so many do not fit
  while (call.threads > 32 && call.threads / 2 >= vectors) call.threads /= 2;
  const int round = call.threads * VECTOR, rounds = (call.slice + round - 1) / round;
  call.stage = (rounds + STAGES - 1) / STAGES * round;
}

constexpr int LEAST_SLICE = 2048;  // columns: one vector per thread of a block

// Divides rows among more blocks if there are fewer blocks than multiprocessors.
inline void widen(Call& call, int64_t multiprocessors) {
  while (call.ranks < PORTABLE_RANKS && call.rows * call.ranks * 2 <= multiprocessors && call.slice >= 2 * LEAST_SLICE)
    spread_over(call, call.ranks * 2);
}

// Sets ranks, threads, slice and stage for a device whose blocks have up to `shared` bytes of shared memory, with at most
// `most_ranks` blocks per row. False if a row is too wide to stay on chip.
//
// A multiprocessor has 1 KB more than a block may have, and reserves 1 KB per block. If two blocks fit, one computes
// while the other waits. If a row is too wide for that, one block has the threads of two.
inline bool plan(Call& call, int64_t shared = MOST_SHARED, int most_ranks = MOST_RANKS) {
  const int64_t of_two = (shared + 1024) / 2 - 1024;
  const struct {
    int least, most, threads;
    int64_t room;
  } choices[] = {{1, PORTABLE_RANKS, MOST_THREADS / 2, of_two},
                 {1, PORTABLE_RANKS, MOST_THREADS, shared},
                 {MOST_RANKS, MOST_RANKS, MOST_THREADS, shared}};  // a partitioned device may not have so many
  for (const auto& choice : choices)
    for (int ranks = choice.least; ranks <= choice.most && ranks <= most_ranks; ranks *= 2) {
      call.threads = choice.threads;
      spread_over(call, ranks);
      if (shared_bytes(call) <= choice.room) return true;
    }
  return false;
}

// Why a device cannot run the kernel for a call, as opposed to an error of CUDA.
class DoesNotFit : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Plans a call, and returns how many clusters of this layout the device runs at a time, which clusters_of(call) finds
// out. On part of a device (MIG), it may run none of the preferred size; a smaller cluster may still hold the row.
template <class ClustersOf>
int64_t plan_for_device(Call& call, int64_t shared, int64_t multiprocessors, ClustersOf clusters_of) {
  const std::string columns = "rows of " + std::to_string(call.vocabulary) + " columns";
  if (!plan(call, shared))
    throw DoesNotFit(columns + " do not fit into the shared memory of a cluster: " + std::to_string(MOST_RANKS) +
                     " blocks with " + std::to_string(shared >> 10) + " KB each");
  const int preferred = call.ranks;
  widen(call, multiprocessors);
  for (;;) {
    if (const int64_t clusters = clusters_of(call)) return clusters;
    if (call.ranks == 1 || !plan(call, shared, call.ranks / 2))
      throw DoesNotFit(columns + " need a cluster of " + std::to_string(preferred) +
                       " blocks, and the device runs none of that size");
  }
}

}  // namespace fastkd::cuda
