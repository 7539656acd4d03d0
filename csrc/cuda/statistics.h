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

// Adds statistics relative to the same maxima.
FASTKD_INLINE Statistics add(Statistics a, const Statistics& b) {
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
FASTKD_INLINE Sums add(Sums a, Sums b) { return {a.phi + b.phi, a.g + b.g, a.h + b.h}; }

struct Maxima {
  float s, t;
};
FASTKD_INLINE Maxima larger(Maxima a, Maxima b) { return {fmaxf(a.s, b.s), fmaxf(a.t, b.t)}; }

FASTKD_INLINE Maxima maxima_of(const Statistics& a) { return {a.s_max, a.t_max}; }
FASTKD_INLINE void rescale(Statistics& a, Maxima max, const RowState& row) { rescale(a, max.s, max.t, row); }

FASTKD_INLINE Statistics merge(Statistics a, Statistics b, const RowState& row) {
  const Maxima max = larger(maxima_of(a), maxima_of(b));
  rescale(a, max, row);
  rescale(b, max, row);
  return add(a, b);
}

template <int N>
FASTKD_INLINE float maximum_of(const V (&z)[N]) {
  float max = z[0];
  for (int k = 1; k < N; ++k) max = fmaxf(max, z[k]);
  return max;
}

// rate * max = high + low, so that rate * (z - max) is fma(z, rate, -high) - low. If the maximum is far from 0, in the
// millions, high has no digits for z - max, and exponents are computed from that difference instead.
struct Origin {
  float high, low;
  bool is_far;

  FASTKD_INLINE Origin(float max, float rate, bool from_max = false) {
    high = product(finite_max(max), rate);
    low = fmaf(finite_max(max), rate, -high);
    is_far = from_max || !(fabsf(low) < 0.25f);
    if (is_far) low = 0;
  }
};

// rate * (z - max), plus low if the maximum is not far.
FASTKD_INLINE V exponent(V z, float max, float rate, const Origin& origin) {
  return origin.is_far ? product(z - max, rate) : fmaf(z, rate, -origin.high);
}

// e * x. With LOG_0, a negligible probability gives 0 whatever x is. With SHARD, probabilities are not known yet, and
// a logarithm that is not finite gives 0.
template <bool LOG_0, bool SHARD>
FASTKD_INLINE V masked_product(V e, V x, float threshold) {
  if (SHARD) return finite(x) ? e * x : 0;
  return LOG_0 ? (e > threshold ? e * x : 0) : e * x;
}

// What the sweep over a row adds to, and what it needs for that.
template <bool LOG_0, bool SHARD>
struct Sweep {
  Statistics sum;
  float s_rate, t_rate;
  Origin s_origin, t_origin;
  unsigned flags;
  bool with_max;  // whether this thread may have a column at a maximum, or a maximum is far

  // `max` are the maxima of the block, `local` those of this thread's columns.
  FASTKD_INLINE Sweep(const RowState& row, Maxima max, Maxima local)
      : sum{max.s, max.t, INF, INF},
        s_rate(row.student.rate),
        t_rate(row.teacher.rate),
        s_origin(max.s, s_rate, LOG_0),  // rows with the policy are few; those of sparse teachers are shifted exactly
        t_origin(max.t, t_rate, LOG_0),
        flags(row.flags),
        with_max((local.s >= max.s && finite(max.s)) || (local.t >= max.t && finite(max.t)) || s_origin.is_far ||
                 t_origin.is_far) {}

  // Adds the first n of N columns.
  template <int N>
  FASTKD_INLINE void add(const V (&s)[N], const V (&t)[N], int n, const RowState& row) {
    V x_s[N], x_t[N], e_s[N], e_t[N];
    for (int k = 0; k < N; ++k) {
      x_s[k] = LOG_0 ? product(s[k] - finite_max(sum.s_max), s_rate) : fmaf(s[k], s_rate, -s_origin.high);
      x_t[k] = LOG_0 ? product(t[k] - finite_max(sum.t_max), t_rate) : fmaf(t[k], t_rate, -t_origin.high);
      e_s[k] = k < n ? exp2_of(x_s[k]) : 0;
      e_t[k] = k < n ? exp2_of(x_t[k]) : 0;
    }
    const auto masked = [](float x) { return SHARD && !finite(x) ? 0 : x; };
    const auto at_max = [&](float z, float max) { return z == max && finite(max); };
    if (with_max)
      for (int k = 0; k < N; ++k) {
        if (!LOG_0 && (s_origin.is_far || t_origin.is_far)) {
          x_s[k] = exponent(s[k], finite_max(sum.s_max), s_rate, s_origin);
          x_t[k] = exponent(t[k], finite_max(sum.t_max), t_rate, t_origin);
          e_s[k] = k < n ? exp2_of(x_s[k]) : 0;
          e_t[k] = k < n ? exp2_of(x_t[k]) : 0;
        }
        if (k < n && at_max(s[k], sum.s_max)) sum.s_max_count += 1, sum.t_at_s_max += masked(x_t[k]), e_s[k] = 0;
        if (k < n && at_max(t[k], sum.t_max)) sum.t_max_count += 1, sum.s_at_t_max += masked(x_s[k]), e_t[k] = 0;
      }
    const auto add = [&](float& to, auto term) {
      float part = term(0);
      for (int k = 1; k < N; ++k) part += term(k);
      to += part;
    };
    add(sum.s_exp_sum, [&](int k) { return e_s[k]; });
    add(sum.t_exp_sum, [&](int k) { return e_t[k]; });
    const float s_threshold = LOG_0 ? row.student.threshold : 0, t_threshold = LOG_0 ? row.teacher.threshold : 0;
    if (flags & FORWARD)
      add(sum.forward, [&](int k) { return masked_product<LOG_0, SHARD>(e_t[k], x_t[k] - x_s[k], t_threshold); });
    if (!(flags & ~(FORWARD | MINIMA))) return;  // one branch for the usual case
    if (flags & REVERSE)
      add(sum.reverse, [&](int k) { return masked_product<LOG_0, SHARD>(e_s[k], x_s[k] - x_t[k], s_threshold); });
    if (flags & CROSS) add(sum.cross, [&](int k) { return masked_product<LOG_0, SHARD>(e_t[k], x_s[k], t_threshold); });
    if (flags & ENTROPY)
      add(sum.entropy, [&](int k) { return masked_product<LOG_0, SHARD>(e_s[k], x_s[k], s_threshold); });
    const auto exponential_t1 = [&](float z, float max, float rate) {
      return at_max(z, max) ? 0 : exp2_of((z - finite_max(max)) * rate);
    };
    if (flags & EXP_SUM_T1)
      add(sum.s_exp_sum_t1, [&](int k) { return k < n ? exponential_t1(s[k], sum.s_max, row.rate_t1) : 0; });
    if (flags & TEACHER_EXP_SUM_T1)
      add(sum.t_exp_sum_t1, [&](int k) { return k < n ? exponential_t1(t[k], sum.t_max, row.teacher_rate_t1) : 0; });
    if (flags & CENTERED_SUM) add(sum.centered_sum, [&](int k) { return k < n ? s[k] - row.center : 0; });
  }

  // The statistics, relative to the maxima: what rounding the origins has lost is added.
  FASTKD_INLINE Statistics result() const {
    Statistics a = sum;
    const float s_low = s_origin.low, t_low = t_origin.low;
    const float s_change = expm1(-s_low * LN_2), t_change = expm1(-t_low * LN_2);
    const auto scaled = [](float x, float change) { return finite(x) ? fmaf(x, change, x) : x; };
    a.forward = scaled(a.forward + (s_low - t_low) * a.t_exp_sum, t_change);
    a.reverse = scaled(a.reverse + (t_low - s_low) * a.s_exp_sum, s_change);
    a.cross = scaled(a.cross - s_low * a.t_exp_sum, t_change);
    a.entropy = scaled(a.entropy - s_low * a.s_exp_sum, s_change);
    a.s_exp_sum = scaled(a.s_exp_sum, s_change);
    a.t_exp_sum = scaled(a.t_exp_sum, t_change);
    a.t_at_s_max -= t_low * a.s_max_count;
    a.s_at_t_max -= s_low * a.t_max_count;
    return a;
  }
};

// The largest and smallest z of each side.
struct Extremes {
  Maxima max{-INF, -INF};
  float s_min = INF, t_min = INF;
  uint32_t s_pair = 0xff80ff80, t_pair = 0xff80ff80;  // maxima of the columns at even and odd places, as bf16

  template <int N>
  FASTKD_INLINE void add(const V (&s)[N], const V (&t)[N], unsigned flags) {
    max = larger(max, {maximum_of(s), maximum_of(t)});
    if (flags & MINIMA)
      for (int k = 0; k < N; ++k) {
        s_min = fminf(s_min, s[k]);
        t_min = fminf(t_min, t[k]);
      }
  }
  FASTKD_INLINE void add_bf16(const Piece& s, const Piece& t) {
    for (int k = 0; k < 4; ++k) {
      s_pair = max_of_two_bf16(s_pair, s.words[k]);
      t_pair = max_of_two_bf16(t_pair, t.words[k]);
    }
  }
  FASTKD_INLINE Maxima maxima() const {
    const auto of_pair = [](uint32_t pair) { return fmaxf(as<float>(pair << 16), as<float>(pair & 0xffff0000)); };
    return larger(max, {of_pair(s_pair), of_pair(t_pair)});
  }
};

// Empty accumulator. With LOG_0, the maxima are known from the first attempt and do not rise.
template <bool LOG_0>
FASTKD_INLINE Statistics empty_statistics(const RowState& row) {
  return {LOG_0 ? row.student.max : -INF, LOG_0 ? row.teacher.max : -INF, INF, INF};
}

// Adds this thread's vectors in a range to the extremes.
FASTKD_INLINE void add_extremes(Extremes& local, const Call& call, const RowState& row, Place place, Range range,
                                const char* student, const char* teacher) {
  const unsigned flags = row.flags;
  each_vector<true>(call, row, place, range, [&](int first, auto vector) {
    if constexpr (decltype(vector)::kind == Vectors::bf16) {
      if (!(flags & MINIMA))
        return local.add_bf16(read<Piece>(student + int64_t(first) * 2), read<Piece>(teacher + int64_t(first) * 2));
    }
    if (vector.rest().n == 0) return;
    V s[VECTOR], t[VECTOR];
    load_z(student, row.student, first, vector, s);
    load_z(teacher, row.teacher, first, vector, t);
    exclude_label(vector, s);
    exclude_label(vector, t);
    local.add(s, t, flags);
  });
}

// Adds this thread's vectors in a range.
template <bool LOG_0>
FASTKD_INLINE void add_statistics(Sweep<LOG_0, false>& local, const Call& call, const RowState& row, Place place,
                                  Range range, const char* student, const char* teacher) {
  each_vector_without_label<!LOG_0>(
      call, row, place, range, student, teacher,
      [&](auto vector, const auto& s, const auto& t) { local.add(s, t, vector.n, row); });
}

}  // namespace fastkd::cuda
