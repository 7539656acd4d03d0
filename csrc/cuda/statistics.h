// The first sweep: maxima, sums of exponentials and moments.
#pragma once
#include "columns.h"

namespace fastkd::cuda {

// factor * moment. If the factor is 0, return 0 (avoids 0 x inf).
FASTKD_INLINE float scaled_or_0(float factor, float moment) { return factor == 0 ? 0 : factor * moment; }

// Rescales statistics to maxima that are at least as high.
FASTKD_INLINE void rescale(Statistics& a, float s_max, float t_max, const RowState& row) {
  if (s_max > a.s_max) {  // columns at the old maximum become ordinary columns
    a.s_exp_sum += a.s_max_count;
    a.s_exp_sum_t1 += a.s_max_count;
    a.reverse -= a.t_at_s_max;
    a.s_max_count = a.t_at_s_max = 0;
  }
  if (t_max > a.t_max) {
    a.t_exp_sum += a.t_max_count;
    a.t_exp_sum_t1 += a.t_max_count;
    a.forward -= a.s_at_t_max;
    a.cross += a.s_at_t_max;
    a.t_max_count = a.s_at_t_max = 0;
  }
  const float s_rise = a.s_max == -INF ? 0 : finite_max(s_max) - a.s_max, s_step = product(s_rise, row.student.rate);
  const float t_rise = a.t_max == -INF ? 0 : finite_max(t_max) - a.t_max, t_step = product(t_rise, row.teacher.rate);
  // If a side is sure of a column, a step may well be 30. Its rounding would put all sums of a thread off by 1e-6, so
  // exp2_of_product corrects it.
  const float s_factor = a.s_max == -INF ? 0 : exp2_of_product(-s_rise, row.student.rate);
  const float t_factor = a.t_max == -INF ? 0 : exp2_of_product(-t_rise, row.teacher.rate);
  a.forward = scaled_or_0(t_factor, a.forward + (s_step - t_step) * a.t_exp_sum);
  a.reverse = scaled_or_0(s_factor, a.reverse + (t_step - s_step) * a.s_exp_sum);
  a.cross = scaled_or_0(t_factor, a.cross - s_step * a.t_exp_sum);
  a.entropy = scaled_or_0(s_factor, a.entropy - s_step * a.s_exp_sum);
  if (row.flags & EXP_SUM_T1)
    a.s_exp_sum_t1 *= a.s_max == -INF ? 0 : exp2_of((a.s_max - finite_max(s_max)) * row.rate_t1);
  if (row.flags & TEACHER_EXP_SUM_T1)
    a.t_exp_sum_t1 *= a.t_max == -INF ? 0 : exp2_of((a.t_max - finite_max(t_max)) * row.teacher_rate_t1);
  a.s_exp_sum *= s_factor;
  a.t_exp_sum *= t_factor;
  if (a.s_max_count != 0) a.t_at_s_max -= t_step * a.s_max_count;  // a step may be infinite
  if (a.t_max_count != 0) a.s_at_t_max -= s_step * a.t_max_count;
  a.s_max = s_max;
  a.t_max = t_max;
}

FASTKD_INLINE Statistics merge(Statistics a, Statistics b, const RowState& row) {
  const float s_max = fmaxf(a.s_max, b.s_max), t_max = fmaxf(a.t_max, b.t_max);
  rescale(a, s_max, t_max, row);
  rescale(b, s_max, t_max, row);
  a.s_exp_sum += b.s_exp_sum;
  a.t_exp_sum += b.t_exp_sum;
  a.s_exp_sum_t1 += b.s_exp_sum_t1;
  a.t_exp_sum_t1 += b.t_exp_sum_t1;
  a.forward += b.forward;
  a.reverse += b.reverse;
  a.cross += b.cross;
  a.entropy += b.entropy;
  a.centered_sum += b.centered_sum;
  a.s_max_count += b.s_max_count;
  a.t_max_count += b.t_max_count;
  a.t_at_s_max += b.t_at_s_max;
  a.s_at_t_max += b.s_at_t_max;
  a.s_min = fminf(a.s_min, b.s_min);
  a.t_min = fminf(a.t_min, b.t_min);
  return a;
}

FASTKD_INLINE Sums merge(Sums a, Sums b, const RowState&) { return {a.phi + b.phi, a.g + b.g, a.h + b.h}; }

template <int N>
FASTKD_INLINE float maximum_of(const V (&z)[N]) {
  float max = z[0];
  for (int k = 1; k < N; ++k) max = fmaxf(max, z[k]);
  return max;
}

// e * x. With LOG_0, a negligible probability gives 0 whatever x is. With SHARD, probabilities are not known yet, and
// a logarithm that is not finite gives 0.
template <bool LOG_0, bool SHARD>
FASTKD_INLINE V masked_product(V e, V x, float threshold) {
  if (SHARD) return finite(x) ? e * x : 0;
  return LOG_0 ? (e > threshold ? e * x : 0) : e * x;
}

// Adds the first n of N columns.
template <bool LOG_0, bool SHARD = false, int N>
FASTKD_INLINE void add_vector(Statistics& a, const V (&s)[N], const V (&t)[N], int n, const RowState& row) {
  const float s_vector_max = maximum_of(s), t_vector_max = maximum_of(t);
  const float s_max = fmaxf(a.s_max, s_vector_max), t_max = fmaxf(a.t_max, t_vector_max);
  if (s_max > a.s_max || t_max > a.t_max) rescale(a, s_max, t_max, row);
  const float s_origin = finite_max(s_max), t_origin = finite_max(t_max);
  V x_s[N], x_t[N], e_s[N], e_t[N];
  float s_exp_sum = 0, t_exp_sum = 0;
  for (int k = 0; k < N; ++k) {
    x_s[k] = product(s[k] - s_origin, row.student.rate);
    x_t[k] = product(t[k] - t_origin, row.teacher.rate);
    e_s[k] = k < n ? exp2_of(x_s[k]) : 0;
    e_t[k] = k < n ? exp2_of(x_t[k]) : 0;
  }
  const auto masked = [](float x) { return SHARD && !finite(x) ? 0 : x; };
  const bool with_s_max = s_vector_max == s_max && finite(s_max), with_t_max = t_vector_max == t_max && finite(t_max);
  if (with_s_max || with_t_max)
    for (int k = 0; k < N; ++k) {
      if (with_s_max && k < n && s[k] == s_max) a.s_max_count += 1, a.t_at_s_max += masked(x_t[k]), e_s[k] = 0;
      if (with_t_max && k < n && t[k] == t_max) a.t_max_count += 1, a.s_at_t_max += masked(x_s[k]), e_t[k] = 0;
    }
  for (int k = 0; k < N; ++k) {
    s_exp_sum += e_s[k];
    t_exp_sum += e_t[k];
  }
  a.s_exp_sum += s_exp_sum;
  a.t_exp_sum += t_exp_sum;
  auto add = [&](float& moment, auto term) {
    float sum = 0;
    for (int k = 0; k < N; ++k) sum += term(k);
    moment += sum;
  };
  const float s_threshold = row.student.threshold, t_threshold = row.teacher.threshold;
  if (row.flags & FORWARD)
    add(a.forward, [&](int k) { return masked_product<LOG_0, SHARD>(e_t[k], x_t[k] - x_s[k], t_threshold); });
  if (row.flags & REVERSE)
    add(a.reverse, [&](int k) { return masked_product<LOG_0, SHARD>(e_s[k], x_s[k] - x_t[k], s_threshold); });
  if (row.flags & CROSS) add(a.cross, [&](int k) { return masked_product<LOG_0, SHARD>(e_t[k], x_s[k], t_threshold); });
  if (row.flags & ENTROPY)
    add(a.entropy, [&](int k) { return masked_product<LOG_0, SHARD>(e_s[k], x_s[k], s_threshold); });
  if (row.flags & EXP_SUM_T1)
    add(a.s_exp_sum_t1,
        [&](int k) { return k < n && !(with_s_max && s[k] == s_max) ? exp2_of((s[k] - s_origin) * row.rate_t1) : 0; });
  if (row.flags & TEACHER_EXP_SUM_T1)
    add(a.t_exp_sum_t1, [&](int k) {
      return k < n && !(with_t_max && t[k] == t_max) ? exp2_of((t[k] - t_origin) * row.teacher_rate_t1) : 0;
    });
  if (row.flags & MINIMA)
    for (int k = 0; k < N; ++k) {
      a.s_min = fminf(a.s_min, s[k]);
      a.t_min = fminf(a.t_min, t[k]);
    }
  if (row.flags & CENTERED_SUM) add(a.centered_sum, [&](int k) { return k < n ? s[k] - row.pivot : 0; });
}

// Empty accumulator. With LOG_0, the maxima are known from the first attempt and do not rise.
template <bool LOG_0>
FASTKD_INLINE Statistics empty_statistics(const RowState& row) {
  return {LOG_0 ? row.student.max : -INF, LOG_0 ? row.teacher.max : -INF, INF, INF};
}

// Adds this thread's vectors in a range.
template <bool LOG_0>
FASTKD_INLINE void add_statistics(Statistics& local, const Call& call, const RowState& row, Place place, Range range,
                                  const char* student, const char* teacher) {
  each_vector_without_label<!LOG_0>(
      call, row, place, range, student, teacher,
      [&](auto vector, const auto& s, const auto& t) { add_vector<LOG_0>(local, s, t, vector.n, row); });
}

}  // namespace fastkd::cuda
