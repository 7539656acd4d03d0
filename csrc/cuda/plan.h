// How a row is spread over the blocks of a cluster, so that its logits stay in their shared memory; host only.
#pragma once
#include "call.h"

namespace fastkd::cuda {

constexpr int VECTOR = 8;        // columns that a thread takes at a time: 16 bytes of bf16
constexpr int PIECE = 16;        // bytes; what the copy engine moves is whole pieces at addresses that are multiples
constexpr int PORTABLE_RANKS = 8, MOST_RANKS = 16;  // what every device with clusters offers; what H100 and B200 do
constexpr int MOST_THREADS = 256;
// Two blocks live on a multiprocessor of 227 KB, so that one computes while the other's logits are on their way.
constexpr int64_t SHARED_OF_TWO = 110 << 10, SHARED_OF_ONE = 220 << 10;

inline int size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Bytes of shared memory that a block holds of logits.
inline int64_t shared_bytes(const Call& call) {
  return int64_t(call.slice) * (size_of(call.student.dtype) + size_of(call.teacher.dtype));
}

// Fills in ranks, threads and slice; false where a row is too wide to stay on chip.
inline bool plan(Call& call) {
  constexpr struct {
    int least, most;
    int64_t room;
  } choices[] = {{1, PORTABLE_RANKS, SHARED_OF_TWO},
                 {1, PORTABLE_RANKS, SHARED_OF_ONE},
                 {MOST_RANKS, MOST_RANKS, SHARED_OF_ONE}};  // a device that is partitioned may not have so many
  for (const auto& choice : choices)
    for (call.ranks = choice.least; call.ranks <= choice.most; call.ranks *= 2) {
      const int64_t vectors = (call.vocabulary + VECTOR * call.ranks - 1) / (VECTOR * call.ranks);
      if (vectors * VECTOR > SHARED_OF_ONE) continue;  // beyond any room, and beyond an int
      call.slice = int(vectors * VECTOR);
      if (shared_bytes(call) > choice.room) continue;
      call.threads = MOST_THREADS;
      while (call.threads > 32 && call.threads / 2 >= vectors) call.threads /= 2;
      return true;
    }
  return false;
}

}  // namespace fastkd::cuda
