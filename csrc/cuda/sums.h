// A divergence in one column, and the sums of phi, g and h over a row.
#pragma once
#include "finish.h"

namespace fastkd::cuda {

// The divergence that the call names, chosen at run time: for few columns, which are not worth a kernel per divergence.
struct AnyDivergence {
  static constexpr bool always_normalized = true, exact_exponents = false;
};

struct Terms {
  V phi, g, h;
};

// Not inlined, because it contains the definitions of all divergences.
FASTKD_PER_ROW Terms any_divergence(const Call& call, V p, V q, V log_p, V log_q, V log_ratio) {
  Terms terms{};
  int number = 0;
#define FASTKD_CASE(name) \
  if (call.divergence == number++) \
    name::eval(p, q, log_p, log_q, log_ratio, call.params, float(call.degree), terms.phi, terms.g, terms.h);
  FASTKD_DIVERGENCES(FASTKD_CASE)
#undef FASTKD_CASE
  return terms;
}

template <class Divergence>
FASTKD_INLINE bool is_normalized(const Call& call) {
  return Divergence::always_normalized || call.normalized;
}

template <class Divergence>
FASTKD_INLINE void call_divergence(const Call& call, V p, V q, V log_p, V log_q, V log_ratio, V& phi, V& g, V& h) {
  const float degree = float(call.degree);
  if constexpr (std::is_same<Divergence, AnyDivergence>::value) {
    const Terms terms = any_divergence(call, p, q, log_p, log_q, log_ratio);
    phi = terms.phi, g = terms.g, h = terms.h;
  } else {
    Divergence::eval(p, q, log_p, log_q, log_ratio, call.params, degree, phi, g, h);
  }
}

// phi, g and h of one column; with LOG_0, under the policy of fastkd/call/log_zero.py.
template <class Divergence, bool LOG_0>
FASTKD_INLINE void evaluate_terms(const Call& call, V p, V q, V log_p, V log_q, V log_ratio, V& phi, V& g, V& h) {
  if (!LOG_0) return call_divergence<Divergence>(call, p, q, log_p, log_q, log_ratio, phi, g, h);
  const bool p_gone = log_p == -INF, q_gone = log_q == -INF;
  const V x = p_gone ? LOWEST : log_p, y = q_gone ? LOWEST : log_q;
  call_divergence<Divergence>(call, p, q, x, y, p_gone || q_gone ? x - y : log_ratio, phi, g, h);
  const bool one_side = p_gone != q_gone;
  const bool nothing = (p_gone && q < NEGLIGIBLE) || (q_gone && p < NEGLIGIBLE) || (p_gone && q_gone);
  auto settled = [&](V term) { return nothing ? 0 : one_side && abs(term) > INFINITE ? term * INF : term; };
  phi = settled(phi);
  g = settled(g);
  h = settled(h);
}

// A probability, with a first-order correction of what rounding the exponent loses.
FASTKD_INLINE V exact_probability(const Side& side, V z) {
  // inverse_sum is for exponents that lack the low part of their origin (statistics.h, Origin); these do not.
  const float low = side.is_far ? 0 : fmaf(side.max, side.rate, -side.origin);
  const float inverse_sum = fmaf(side.inverse_sum, expm1(low * LN_2), side.inverse_sum);
  const float rate_low = fmaf(side.unit, LOG2_E, -side.rate) + side.unit * LOG2_E_LOW;
  const float distance = z - side.max, x = product(distance, side.rate), e = exp2_of(x);
  const float lost = fmaf(distance, side.rate, -x) + distance * rate_low;
  return (e > 0 ? fmaf(e, lost * LN_2, e) : e) * inverse_sum;
}

// With MAY_BE_FAR, the maxima may be far from 0.
template <class Divergence, bool LOG_0, bool MAY_BE_FAR = true>
FASTKD_INLINE void evaluate(const Call& call, const RowState& row, V s, V t, V& p, V& q, V& phi, V& g, V& h) {
  V log_p = product(t, row.teacher.unit), log_q = product(s, row.student.unit);
  V log_ratio = product(product(t, row.unit_ratio) - s, row.student.unit);
  p = q = 1;
  if (is_normalized<Divergence>(call)) {
    const auto exponent = [](const Side& side, V z) {
      return MAY_BE_FAR && side.is_far ? product(z - side.max, side.rate) : fmaf(z, side.rate, -side.origin);
    };
    const auto probability = [&](const Side& side, V z) {
      return Divergence::exact_exponents ? exact_probability(side, z) : exp2_of(exponent(side, z)) * side.inverse_sum;
    };
    p = probability(row.teacher, t);
    q = probability(row.student, s);
    const auto logarithm = [](const Side& side, V z) {
      return fmaf(z - side.max, side.unit, side.offset_low) + side.offset;
    };
    log_p = logarithm(row.teacher, t);
    log_q = logarithm(row.student, s);
    const V gap = product(t - row.t_origin, row.unit_ratio) - (s - row.s_origin);
    log_ratio = fmaf(gap, row.student.unit, row.log_ratio_low) + row.log_ratio_high;
  }
  evaluate_terms<Divergence, LOG_0>(call, p, q, log_p, log_q, log_ratio, phi, g, h);
}

// Whether eight copies of a definition would need more registers than there are. Its columns then share one copy.
template <class Divergence>
constexpr bool is_large = std::is_same<Divergence, alpha_beta_of_any_sign>::value;

FASTKD_INLINE bool is_far(const RowState& row) { return row.student.is_far || row.teacher.is_far; }

// Whether a warp may have a sure column, if its columns have these maxima.
FASTKD_INLINE bool may_be_sure(const RowState& row, Maxima warp_max) {
  return warp_max.s >= row.s_sure.z || warp_max.t >= row.t_sure.z;
}

// Adds this thread's vectors in a range. The row is copied to registers for whole vectors, where each column has its own
// copy of the definition. The others share one copy, and some of their columns do not count. h is summed for the
// teacher's gradient: as degree * phi - g, its sum would cancel where p is far from q.
template <class Divergence, bool LOG_0, bool WITH_H>
FASTKD_INLINE void add_sums(Sums& local, const Call& call, const RowState& shared, Place place, Range range,
                            Maxima warp_max, const char* student, const char* teacher) {
  const RowState row = shared;
  const bool is_usual = !is_large<Divergence> && !may_be_sure(shared, warp_max) && !is_far(shared);
  each_vector_without_label<!LOG_0>(call, shared, place, range, student, teacher, [&](auto vector, auto& s, auto& t) {
    V p, q, phi, g, h;
    Sums part{0, 0, 0};
    if (is_whole<decltype(vector)> && is_usual)
      each_column<false>(s, t, [&](int, V s_k, V t_k) {
        evaluate<Divergence, LOG_0, false>(call, row, s_k, t_k, p, q, phi, g, h);
        part = add(part, {phi, g, WITH_H ? h : 0});
      });
    else
      each_column<true>(s, t, [&](int k, V s_k, V t_k) {
        evaluate<Divergence, LOG_0>(call, shared, s_k, t_k, p, q, phi, g, h);
        if (k < vector.n && s_k != shared.s_sure.z && t_k != shared.t_sure.z) part = add(part, {phi, g, WITH_H ? h : 0});
      });
    local = add(local, part);
  });
}

// phi, g and h of a sure column.
template <class Divergence>
FASTKD_PER_ROW Terms sure_column_terms(const Call& call, double log_p, double log_q, double log_ratio) {
  Terms terms;
  evaluate_terms<Divergence, true>(call, float(exponential(log_p)), float(exponential(log_q)), float(log_p),
                                   float(log_q), float(log_ratio), terms.phi, terms.g, terms.h);
  return terms;
}

// Adds the sure columns to the sums over the other columns, and computes their gradients.
template <class Divergence>
FASTKD_PER_ROW void add_sure_columns(const Call& call, RowState& row) {
  SureColumn &s = row.s_sure, &t = row.t_sure;
  const double s_log_sum = log_of_sum(s.rest, 1), t_log_sum = log_of_sum(t.rest, 1);
  // log q and log p at the side's own maximum; if the side is not sure, its offset has that value.
  const Statistics& all = row.statistics;
  const double log_q_max = s.exists ? -s_log_sum : -log_of_sum(all.s_exp_sum, all.s_max_count);
  const double log_p_max = t.exists ? -t_log_sum : -log_of_sum(all.t_exp_sum, all.t_max_count);
  const bool same_column = s.exists && t.exists && s.other_gap == 0 && t.other_gap == 0;
  double g = row.g, h = row.h;  // sums over all columns but the sure ones
  const double log_ratio = log_p_max - log_q_max;
  Terms s_terms{}, t_terms{};  // at the student's sure column; at the teacher's, if that is another one
  if (s.exists)
    s_terms = sure_column_terms<Divergence>(call, s.other_gap + log_p_max, log_q_max, s.other_gap + log_ratio);
  if (t.exists && !same_column)
    t_terms = sure_column_terms<Divergence>(call, log_p_max, t.other_gap + log_q_max, log_ratio - t.other_gap);
  row.phi += double(s_terms.phi) + t_terms.phi;
  row.g += double(s_terms.g) + t_terms.g;
  row.h += double(s_terms.h) + t_terms.h;
  if (s.exists) s.gradient = float((s_terms.g * s.rest - (g + t_terms.g)) / (1 + s.rest));
  if (t.exists)
    t.gradient = float((same_column ? s_terms.h * t.rest - h : t_terms.h * t.rest - (h + s_terms.h)) / (1 + t.rest));
  if (!finite(float(row.phi) + s.gradient)) s.z = NAN;
  if (!finite(float(row.phi) + t.gradient)) t.z = NAN;
}

template <class Divergence>
FASTKD_INLINE void finish_sums(const Call& call, RowState& row, Sums all) {
  row.phi = all.phi;
  row.g = all.g;
  row.h = all.h;
  if (call.shard.step != Step::sums && (row.s_sure.exists || row.t_sure.exists))
    add_sure_columns<Divergence>(call, row);
  // The sums over the columns leave out the sure ones, which need the policy if the other side is at -inf there.
  const double gaps = (row.s_sure.exists ? row.s_sure.other_gap : 0) + (row.t_sure.exists ? row.t_sure.other_gap : 0);
  row.finite = row.log_0_policy || finite(float(row.phi) + float(row.g) + float(row.h) + float(gaps));
}

}  // namespace fastkd::cuda
