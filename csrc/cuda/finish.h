// Computes what follows from the statistics of a whole row: its softmaxes, closed form and label term.
#pragma once
#include "statistics.h"

namespace fastkd::cuda {

// The logarithm of a row's sum of exponentials, relative to the maximum: max_count columns are at the maximum, and
// `rest` is the sum over the others. If max_count is 1, a tiny rest is not rounded away.
FASTKD_INLINE double log_of_sum(double rest, double max_count) { return logarithm_1p(rest + (max_count - 1)); }

FASTKD_PER_ROW void set_softmax(Side& side, float max, double rest, double max_count) {
  const Origin origin(max, side.rate);
  const double sum = rest + max_count, low = origin.low * LN_2_EXACT, offset = -log_of_sum(rest, max_count);
  side.max = finite_max(max);
  side.origin = origin.high;
  side.is_far = origin.is_far;
  side.inverse_sum = float((1 + double(expm1(float(-low)))) / sum);
  side.threshold = float(NEGLIGIBLE * sum);
  side.offset = float(offset);
  side.offset_low = finite(side.offset) ? float(offset - side.offset) : 0;
}

// If the log-sum-exps of the two sides differ by less than this, log p - log q is most accurate as t - s plus a
// constant.
constexpr double CLOSE_LOGITS = 8;

// Sets the constants of RowState's formula for log p - log q. The origins are 0 if the sides are close (CLOSE_LOGITS),
// and the maxima otherwise.
FASTKD_INLINE void set_log_ratio(RowState& row, double log_quotient) {
  const double unit = row.student.unit;
  const double direct = (double(row.student.max) - row.teacher.max) * unit + log_quotient;
  const bool close = row.student.unit == row.teacher.unit && fabs(direct) < CLOSE_LOGITS;
  row.s_origin = close ? 0 : row.student.max;
  row.t_origin = close ? 0 : row.teacher.max;
  row.unit_ratio = float(row.teacher.unit / unit);
  const double offset = close ? direct : log_quotient;
  row.log_ratio_high = float(offset);
  row.log_ratio_low = finite(row.log_ratio_high) ? float(offset - row.log_ratio_high) : 0;
}

// Finds the columns that a side is sure of (common/row_math.h). With a closed form it also computes their gradients;
// without one, add_sure_columns does.
FASTKD_PER_ROW void set_sure_columns(const Call& call, RowState& row) {
  const Statistics& all = row.statistics;
  const auto is_sure = [&](float max_count, float rest) {
    return max_count == 1 && rest < 1 && !has_label_term(call) && call.normalized;
  };
  SureColumn &s = row.s_sure, &t = row.t_sure;
  s = {is_sure(all.s_max_count, all.s_exp_sum), 0, all.s_exp_sum, LN_2_EXACT * all.t_at_s_max, 0};
  t = {is_sure(all.t_max_count, all.t_exp_sum), 0, all.t_exp_sum, LN_2_EXACT * all.s_at_t_max, 0};
  s.z = s.exists ? all.s_max : NAN;
  t.z = t.exists ? all.t_max : NAN;
  if (!call.closed_form) return;
  const SureSums sums = {s.rest,
                         t.rest,
                         s.rest + all.s_max_count,
                         t.rest + all.t_max_count,
                         LN_2_EXACT * all.forward,
                         LN_2_EXACT * all.reverse,
                         LN_2_EXACT * all.cross,
                         t.other_gap,
                         s.other_gap};
  const bool same_column = s.exists && t.exists && s.other_gap == 0 && t.other_gap == 0;
  if (s.exists) s.gradient = float(sure_student_gradient(call, sums, same_column));
  if (t.exists) t.gradient = float(sure_teacher_gradient(call, sums, same_column));
  if (!finite(float(row.phi) + s.gradient)) s.z = NAN;
  if (!finite(float(row.phi) + t.gradient)) t.z = NAN;
}

// Sets the row's entropy and cross-entropy, without the label term, and the student's softmax at temperature 1.
FASTKD_INLINE void set_entropies(const Call& call, RowState& row, double s_log_sum, double s_inverse) {
  const Statistics& all = row.statistics;
  row.entropy = row.flags & ENTROPY ? s_log_sum - LN_2_EXACT * all.entropy * s_inverse : 0;
  double log_sum_t1 = s_log_sum;
  row.inverse_sum_t1 = float(s_inverse);
  row.max_t1 = row.student.max;
  if (row.flags & EXP_SUM_T1) {
    log_sum_t1 = log_of_sum(all.s_exp_sum_t1, all.s_max_count);
    row.inverse_sum_t1 = float(1 / (double(all.s_exp_sum_t1) + all.s_max_count));
  }
  row.cross_entropy = 0;
  if (!row.with_labels) return;
  const double max = row.student.max, smoothing = call.label_smoothing;
  const double mean = smoothing > 0 ? double(all.centered_sum) / double(call.shard.total) + row.center - max : 0;
  row.cross_entropy = smoothed_cross_entropy(smoothing, log_sum_t1, double(row.z_label) - max, mean, row.unit_t1);
}

// Whether a logit is so far below the maximum that the logarithm of its probability is -inf. Rescaling a moment to 0
// also erases its NaN, so this looks at the logits themselves.
FASTKD_INLINE bool logs_overflow(const RowState& row) {
  const Statistics& all = row.statistics;
  return (row.flags & MINIMA) && ((all.s_min - row.student.max) * row.student.rate == -INF ||
                                  (all.t_min - row.teacher.max) * row.teacher.rate == -INF);
}

// The rate is log2(e) / T, rounded, so an exponential is off by a factor that grows with its distance from the maximum:
// by 3e-7 at e^-20. Where a side is sure of a column, the others are all far from the maximum, at about the same
// distance. This is the inverse of their factor, estimated as if an eighth of them had equal exponentials; 1 for other
// rows.
FASTKD_INLINE double factor_of_far_columns(const Call& call, const Side& side, float max_count, float rest) {
  if (max_count != 1 || !(rest < 1) || !(rest > NEGLIGIBLE) || has_label_term(call) || !call.normalized) return 1;
  const double lost = side.unit * LOG2_E_EXACT - side.rate;
  const double distance = logarithm(double(rest) * 8 / double(call.shard.total)) / side.unit;
  return distance < 0 ? exponential(lost * LN_2_EXACT * distance) : 1;
}

// Corrects the sums over the other columns. Their probabilities are not corrected: they share inverse_sum with that of
// the sure column, which is exact.
FASTKD_INLINE void correct_far_columns(const Call& call, RowState& row) {
  Statistics& all = row.statistics;
  const double s = factor_of_far_columns(call, row.student, all.s_max_count, all.s_exp_sum);
  const double t = factor_of_far_columns(call, row.teacher, all.t_max_count, all.t_exp_sum);
  const auto correct = [](float& sum, double factor) {
    if (finite(sum)) sum = float(sum * factor);
  };
  correct(all.s_exp_sum, s), correct(all.reverse, s), correct(all.entropy, s);
  correct(all.t_exp_sum, t), correct(all.forward, t), correct(all.cross, t);
}

// Turns the statistics of the whole row into what later phases need. The row must be in shared memory: this function is
// not inlined, so a row in registers would first be spilled to the stack in device memory.
FASTKD_PER_ROW void finish_statistics(const Call& call, RowState& row) {
  correct_far_columns(call, row);
  const Statistics& all = row.statistics;
  const double s_exp_sum = all.s_exp_sum, t_exp_sum = all.t_exp_sum;
  set_softmax(row.student, all.s_max, s_exp_sum, all.s_max_count);
  set_softmax(row.teacher, all.t_max, t_exp_sum, all.t_max_count);
  const double s_log_sum = log_of_sum(s_exp_sum, all.s_max_count), t_log_sum = log_of_sum(t_exp_sum, all.t_max_count);
  const double s_inverse = 1 / (s_exp_sum + all.s_max_count), t_inverse = 1 / (t_exp_sum + all.t_max_count);
  set_entropies(call, row, s_log_sum, s_inverse);
  set_log_ratio(row, s_log_sum - t_log_sum);
  const MeanMoments means = {LN_2_EXACT * (double(all.forward) - all.s_at_t_max) * t_inverse,
                             LN_2_EXACT * (double(all.reverse) - all.t_at_s_max) * s_inverse,
                             LN_2_EXACT * (double(all.cross) + all.s_at_t_max) * t_inverse};
  // A moment whose flag is not set is not computed, but it is rescaled like the others, so its value has no meaning.
  const MeanMoments weights = {row.flags & FORWARD ? call.forward : 0, row.flags & REVERSE ? call.reverse : 0,
                               row.flags & CROSS ? call.cross : 0};
  set_closed_form(weights, means, s_log_sum, t_log_sum, row.phi, row.g);
  set_sure_columns(call, row);
  row.finite = row.log_0_policy || (!logs_overflow(row) && finite(float(row.phi) + float(row.entropy)));
  // A logit that is NaN or +inf makes the whole row NaN. It is tested here, since a comparison in a divergence's
  // definition could hide it. With a label term, the sums exclude the label's column, so its logits are tested too.
  const double log_sums = s_log_sum + t_log_sum;
  const bool infinite = all.s_max == INF || all.t_max == INF ||
                        (has_label_term(call) && (row.z_label == INF || row.t_label == INF));
  if (call.normalized && call.alpha != 0 && (infinite || log_sums != log_sums)) row.weight = NAN;
}

// Computes the label term from the sums of the other tokens' exponentials.
FASTKD_PER_ROW void finish_label_term(const Call& call, RowState& row, float s_exp_sum, float t_exp_sum,
                                      float s_exp_sum_t1, float t_exp_sum_t1) {
  const double s_gap = double(row.z_label) - row.student.max, t_gap = double(row.t_label) - row.teacher.max;
  const double q_log_odds = s_gap * row.student.unit - logarithm(double(s_exp_sum));
  const double p_log_odds = t_gap * row.teacher.unit - logarithm(double(t_exp_sum));
  row.entropy = entropy_with_label(q_log_odds, row.entropy);
  if (call.target == Target::binary) {
    set_binary_label_term(row.label_term, call.target_weight, p_log_odds, q_log_odds);
  } else {
    const double sum = row.flags & TEACHER_EXP_SUM_T1 ? t_exp_sum_t1 : t_exp_sum;
    row.label_term.nll_weight = call.target_weight * sigmoid(t_gap * row.teacher_unit_t1 - logarithm(sum));
  }
  if (!row.with_labels) return;
  const double sum = row.flags & EXP_SUM_T1 ? s_exp_sum_t1 : s_exp_sum;
  const double q_log_odds_t1 = s_gap * row.unit_t1 - logarithm(sum);
  row.label_term.nll = softplus(-q_log_odds_t1);
  row.label_term.rest_t1 = sigmoid(-q_log_odds_t1);
  row.cross_entropy += softplus(q_log_odds_t1);  // until now, it was normalized over the other tokens only
  row.inverse_sum_t1 = float(row.label_term.rest_t1 / sum);
}

}  // namespace fastkd::cuda
