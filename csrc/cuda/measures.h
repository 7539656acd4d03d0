// The measures of dense rows (fastkd/call/measures.py), in a launch of their own.
//
// One block computes the measures of a row. It reads the row twice from device memory: for the softmax of both sides,
// and for the sums.
#pragma once
#include "open.h"

namespace fastkd::cuda {

constexpr int MEASURES = 5, MEASURE_THREADS = 256;
constexpr int64_t NO_COLUMN = std::numeric_limits<int64_t>::max();

// One side's largest z, the first column that has it, and the sum of exponentials relative to it.
struct PartialSoftmax {
  float max = -INF, exp_sum = 0;
  int64_t column = NO_COLUMN;
};

struct MeasureSums {
  float teacher_entropy = 0, forward_kl = 0, reverse_kl = 0, acceptance = 0;
};

// Shared memory of a block: how both sides are tempered, and the parts of its warps.
struct MeasureMemory {
  Side student, teacher;
  alignas(8) char parts[MEASURE_THREADS / 32 * sizeof(PartialSoftmax)];
};
constexpr int MEASURE_BYTES = int(sizeof(MeasureMemory));
static_assert(sizeof(MeasureSums) <= sizeof(PartialSoftmax), "both are merged in the same memory");

FASTKD_INLINE PartialSoftmax merged(const PartialSoftmax& a, const PartialSoftmax& b, float rate) {
  PartialSoftmax out;
  out.max = fmaxf(a.max, b.max);
  out.exp_sum = a.max == -INF ? a.exp_sum : a.exp_sum * exp2_of_product(a.max - out.max, rate);
  out.exp_sum += b.max == -INF ? b.exp_sum : b.exp_sum * exp2_of_product(b.max - out.max, rate);
  const int64_t first = a.max == out.max ? a.column : NO_COLUMN;
  const int64_t second = b.max == out.max ? b.column : NO_COLUMN;
  out.column = first < second ? first : second;
  return out;
}

FASTKD_INLINE MeasureSums merged(const MeasureSums& a, const MeasureSums& b) {
  return {a.teacher_entropy + b.teacher_entropy, a.forward_kl + b.forward_kl, a.reverse_kl + b.reverse_kl,
          a.acceptance + b.acceptance};
}

// Merges the parts of all threads in a fixed order. Every thread gets the result.
template <class Part, class Merge>
FASTKD_DEVICE Part merge_block(Part local, char* memory, Merge merge) {
  constexpr int LANES = 32, WARPS = MEASURE_THREADS / LANES;
  const int warp = thread_number() / LANES, lane = thread_number() % LANES;
  Part* parts = reinterpret_cast<Part*>(memory);
#pragma unroll 1
  for (int step = LANES / 2; step > 0; step /= 2) local = merge(local, from_lane_above(local, step));
  if (lane == 0) parts[warp] = local;
  sync_block();
  local = parts[lane < WARPS ? lane : 0];
#pragma unroll 1
  for (int step = WARPS / 2; step > 0; step /= 2) local = merge(local, from_lane_above(local, step));
  sync_block();  // the memory may be written again
  return from_first_lane(local);
}

FASTKD_DEVICE PartialSoftmax softmax_of(const char* row, const Side& side, int64_t vocabulary, char* memory) {
  PartialSoftmax local;
#pragma unroll 1
  for (int64_t column = thread_number(); column < vocabulary; column += MEASURE_THREADS) {
    const float z = side.z(load_one(row, side.dtype, column));
    if (z > local.max) {
      if (local.max != -INF) local.exp_sum *= exp2_of_product(local.max - z, side.rate);
      local.max = z;
      local.column = column;
    }
    // Before its first logit above -inf, a thread's sum is 0, or NaN if a logit was NaN.
    local.exp_sum += local.max == -INF ? (z == -INF ? 0 : z) : exp2_of_product(z - local.max, side.rate);
  }
  return merge_block(local, memory, [&](const auto& a, const auto& b) { return merged(a, b, side.rate); });
}

// Adds the terms of one column, with the policy of fastkd/call/log_zero.py.
FASTKD_INLINE void add_measures(MeasureSums& sums, float log_p, float log_q) {
  const float p = exp(log_p), q = exp(log_q), log_ratio = log_p - log_q;
  if (!(p == 0)) sums.teacher_entropy -= p * log_p;
  if (!(p == 0 || (log_q == -INF && p < NEGLIGIBLE))) sums.forward_kl += p * log_ratio;
  if (!(q == 0 || (log_p == -INF && q < NEGLIGIBLE))) sums.reverse_kl -= q * log_ratio;
  sums.acceptance += p < q ? p : q + 0 * p;  // NaN if p or q is NaN
}

FASTKD_DEVICE void measure_row(const Call& call, int64_t row, float* out, char* memory) {
  MeasureMemory& shared = *reinterpret_cast<MeasureMemory*>(memory);
  if (thread_number() == 0) {
    float weight = 1;
    open_side(call.student, call.student_tempering, row, shared.student, weight);
    open_side(call.teacher, call.teacher_tempering, row, shared.teacher, weight);
  }
  sync_block();
  const Side student = shared.student, teacher = shared.teacher;
  const char* s = row_address(call, call.student, row);
  const char* t = row_address(call, call.teacher, row);
  const PartialSoftmax s_softmax = softmax_of(s, student, call.vocabulary, shared.parts);
  const PartialSoftmax t_softmax = softmax_of(t, teacher, call.vocabulary, shared.parts);
  const float s_log_sum = ::logf(s_softmax.exp_sum), t_log_sum = ::logf(t_softmax.exp_sum);
  MeasureSums local;
#pragma unroll 1
  for (int64_t column = thread_number(); column < call.vocabulary; column += MEASURE_THREADS) {
    const float s_gap = student.z(load_one(s, student.dtype, column)) - s_softmax.max;
    const float t_gap = teacher.z(load_one(t, teacher.dtype, column)) - t_softmax.max;
    add_measures(local, t_gap * teacher.unit - t_log_sum, s_gap * student.unit - s_log_sum);
  }
  const MeasureSums sums = merge_block(local, shared.parts, [](const auto& a, const auto& b) { return merged(a, b); });
  if (thread_number() != 0) return;
  out[0] = sums.teacher_entropy;
  out[1] = sums.forward_kl;
  out[2] = sums.reverse_kl;
  out[3] = sums.acceptance;
  out[4] = s_softmax.column == t_softmax.column ? 1 : 0;
}

// Writes the measures of this block's rows, [rows, MEASURES], except those of dropped rows.
FASTKD_DEVICE void measure(const Call& call, float* measures, char* memory) {
#pragma unroll 1
  for (int64_t row = block_number(); row < call.rows; row += block_count())
    if (!is_dropped(call, row)) measure_row(call, row, measures + row * MEASURES, memory);
}

}  // namespace fastkd::cuda
