// Where a row lies: its address, the slice of a block, the stages of a slice, and the pieces that bulk copies move.
#pragma once
#include "call.h"
#include "math.h"
#include "plan.h"

// Called for every access to logits and gradients except those of bulk copies; tests/support/cuda_host.h counts bytes
// with it.
#ifndef FASTKD_TRACE_ACCESS
#define FASTKD_TRACE_ACCESS(memory, bytes, writes)
#endif

namespace fastkd::cuda {

// A thread's position among the threads that share a row: the rank of its block in the cluster, and its number there.
struct Place {
  int rank, thread;
};

FASTKD_INLINE int size_of_element(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Address of a row's first column; null if the tensor is not given.
FASTKD_PER_ROW char* row_address(const Call& call, const Rows& rows, int64_t row) {
  if (!rows.data) return nullptr;
  int64_t offset = 0;
#pragma unroll 1
  for (int d = call.dimensions; d-- > 0;) {
    offset += row % call.sizes[d] * rows.strides[d];
    row /= call.sizes[d];
  }
  return rows.data + offset * size_of_element(rows.dtype);
}

// A range of columns, counted from the first column of the block's slice.
struct Range {
  int first, last;
};

// A block's slice of a row, and one stage of that slice.
FASTKD_INLINE int64_t first_column(const Call& call, int rank) { return int64_t(rank) * call.slice; }
FASTKD_INLINE int columns_in_slice(const Call& call, int rank) {
  const int64_t rest = call.vocabulary - first_column(call, rank);
  return int(rest < 0 ? 0 : rest < call.slice ? rest : call.slice);
}
// With `shift`, stages after the first begin so many columns earlier: where a row lies so many columns past a multiple of
// PIECE, they then begin at one.
FASTKD_INLINE Range stage_range(const Call& call, int rank, int stage, int shift) {
  const int columns = columns_in_slice(call, rank), end = (stage + 1) * call.stage - shift;
  const int first = stage ? end - call.stage : 0, last = stage == STAGES - 1 ? columns : end;
  const auto inside = [&](int column) { return column < 0 ? 0 : column < columns ? column : columns; };
  return {inside(first), inside(last)};
}

// A block's part of a row, in shared or in device memory. In shared memory, the alignments of successive rows may
// differ by almost a piece; the gap between stages keeps a stage of one row from overlapping the adjacent stages of
// another.
struct Slice {
  char* memory;
  int gap;

  FASTKD_INLINE char* stage(int number) const { return memory + number * gap; }
};

// Distance of an address from the multiple of PIECE below it.
FASTKD_INLINE int skew_of(const char* memory) { return int(reinterpret_cast<uintptr_t>(memory) % PIECE); }

// Where the whole pieces in a range of bytes begin and end, as offsets in bytes. Bulk copies move them; the edges
// before and after are shorter than a piece.
struct Pieces {
  int64_t first, last;
};
FASTKD_INLINE Pieces whole_pieces(const char* memory, int64_t bytes) {
  const int64_t first = (PIECE - skew_of(memory)) % PIECE;
  if (first >= bytes) return {bytes, bytes};
  return {first, first + (bytes - first) / PIECE * PIECE};
}

FASTKD_INLINE void copy_element(char* to, const char* from, int element_size) {
  FASTKD_TRACE_ACCESS(from, element_size, false);
  FASTKD_TRACE_ACCESS(to, element_size, true);
  if (element_size == 4)
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
  else
    *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
}

// This thread's share of the edges: at most one element per thread.
FASTKD_INLINE void copy_edges(Place place, char* to, const char* from, Pieces pieces, int64_t bytes, int element_size) {
  int64_t at = int64_t(place.thread) * element_size;
  if (at >= pieces.first) at += pieces.last - pieces.first;
  if (at < bytes) copy_element(to + at, from + at, element_size);
}

// Copies this thread's share of all bytes, one element at a time. Only gradients are copied in this way, because no
// thread waits for their stores.
FASTKD_PER_ROW void copy_out(const Call& call, Place place, char* to, const char* from, int64_t bytes,
                             int element_size) {
#pragma unroll 1
  for (int64_t i = int64_t(place.thread) * element_size; i < bytes; i += int64_t(call.threads) * element_size)
    copy_element(to + i, from + i, element_size);
}

}  // namespace fastkd::cuda
