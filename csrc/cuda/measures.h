// The measures of a dense row (fastkd/call/measures.py), from its statistics and its logits in shared memory.
#pragma once
#include "statistics.h"

namespace fastkd::cuda {

constexpr int MEASURES = 5;

struct MeasureSums {
  float gap = 0;                                   // sum of p (t - t_max), for the teacher's entropy
  float forward = 0, reverse = 0, acceptance = 0;  // sums of p log(p / q), of q log(q / p) and of min(p, q)
  int s_first = INT32_MAX, t_first = INT32_MAX;    // first columns of the maxima
};

FASTKD_INLINE MeasureSums add(const MeasureSums& a, const MeasureSums& b) {
  return {a.gap + b.gap,
          a.forward + b.forward,
          a.reverse + b.reverse,
          a.acceptance + b.acceptance,
          a.s_first < b.s_first ? a.s_first : b.s_first,
          a.t_first < b.t_first ? a.t_first : b.t_first};
}

// What the terms of a column depend on. A thread keeps it in registers.
struct Measuring {
  float s_max, t_max, s_rate, t_rate, s_inverse_sum, t_inverse_sum;
  float s_origin, t_origin, unit_ratio, unit, log_ratio_low, log_ratio_high;  // as in RowState

  FASTKD_INLINE explicit Measuring(const RowState& row)
      : s_max(row.student.max),
        t_max(row.teacher.max),
        s_rate(row.student.rate),
        t_rate(row.teacher.rate),
        s_inverse_sum(1 / (row.statistics.s_exp_sum + row.statistics.s_max_count)),
        t_inverse_sum(1 / (row.statistics.t_exp_sum + row.statistics.t_max_count)),
        s_origin(row.s_origin),
        t_origin(row.t_origin),
        unit_ratio(row.unit_ratio),
        unit(row.student.unit),
        log_ratio_low(row.log_ratio_low),
        log_ratio_high(row.log_ratio_high) {}

  // Adds the terms of one column; with LOG_0, under the policy of fastkd/call/log_zero.py.
  template <bool LOG_0>
  FASTKD_INLINE void add(MeasureSums& sums, V s, V t) const {
    const float q = exp2_of(product(s - s_max, s_rate)) * s_inverse_sum, gap = t - t_max;
    const float p = exp2_of(product(gap, t_rate)) * t_inverse_sum;
    const float log_ratio =
        fmaf(product(t - t_origin, unit_ratio) - (s - s_origin), unit, log_ratio_low) + log_ratio_high;
    if (!LOG_0 || !(p == 0)) sums.gap = fmaf(p, gap, sums.gap);
    if (!LOG_0 || !(p == 0 || (log_ratio == INF && p < NEGLIGIBLE))) sums.forward = fmaf(p, log_ratio, sums.forward);
    if (!LOG_0 || !(q == 0 || (log_ratio == -INF && q < NEGLIGIBLE))) sums.reverse = fmaf(-q, log_ratio, sums.reverse);
    sums.acceptance += p < q ? p : fmaf(p, 0, q);  // NaN if p or q is NaN
  }
};

// Adds the first n columns of a vector, one at a time.
FASTKD_INLINE void add_carefully(MeasureSums& sums, const Measuring& measuring, V (&s)[VECTOR], V (&t)[VECTOR], int n) {
#pragma unroll 1
  for (int k = 0; k < n; ++k) {
    measuring.add<true>(sums, s[0], t[0]);
    shift_in(s, s[0]);
    shift_in(t, t[0]);
  }
}

// The first column in which z is the maximum, or `known` if that is less. Few vectors have such a column.
FASTKD_INLINE int first_of_maximum(const V (&z)[VECTOR], float max, int column, int known) {
  if (maximum_of(z) < max) return known;
  for (int k = VECTOR; k-- > 0;)
    if (z[k] == max && column + k < known) known = column + k;
  return known;
}

// This thread's part of the measures, from the block's slice of a row. Not inlined, so that all kernels share one copy.
FASTKD_PER_ROW MeasureSums measure_slice(const Call& call, const RowState& row, Place place, Slice student,
                                         Slice teacher) {
  const Measuring measuring(row);
  const int start = int(first_column(call, place.rank));
  MeasureSums sums;
#pragma unroll 1
  for (int stage = 0; stage < STAGES; ++stage) {
    const char *s_memory = student.stage(stage), *t_memory = teacher.stage(stage);
    each_vector<true>(call, row, place, stage_range(call, place.rank, stage, row.shift), [&](int first, auto vector) {
      V s[VECTOR], t[VECTOR];
      load_z(s_memory, row.student, first, vector, s);
      load_z(t_memory, row.teacher, first, vector, t);
      sums.s_first = first_of_maximum(s, measuring.s_max, start + first, sums.s_first);
      sums.t_first = first_of_maximum(t, measuring.t_max, start + first, sums.t_first);
      if constexpr (is_whole<decltype(vector)>) {
        MeasureSums all = sums;
        each_column<false>(s, t, [&](int, V s_k, V t_k) { measuring.add<false>(all, s_k, t_k); });
        // Arithmetic on -inf gives NaN or infinity exactly where the policy for log 0 matters.
        if (finite(all.gap + all.forward + all.reverse)) {
          sums = all;
          return;
        }
      }
      add_carefully(sums, measuring, s, t, vector.n);
    });
  }
  return sums;
}

// `sums` is passed by value, because a reference would put it on the stack.
FASTKD_PER_ROW void write_measures(const Call& call, const RowState& row, MeasureSums sums) {
  float* out = call.measures + row.row * MEASURES;
  const Side& teacher = row.teacher;
  out[0] = -fmaf(teacher.unit, sums.gap, teacher.offset_low) - teacher.offset;
  out[1] = sums.forward;
  out[2] = sums.reverse;
  out[3] = sums.acceptance;
  out[4] = sums.s_first == sums.t_first ? 1 : 0;
}

}  // namespace fastkd::cuda
