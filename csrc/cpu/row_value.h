// The value of a row, and the label term.

namespace {

inline void Row::finish() {
  if (call_.closed_form) {
    set_sums_from_moments();
    set_sure_gradients();
  }
  if (has_label_term(call_)) set_label_term();
  write_value();
}

// Computes the label term from the statistics over the other tokens.
inline void Row::set_label_term() {
  RowStatistics& row = row_statistics_;
  if (whole()) z_label_ = label_logit(), t_label_ = teacher_label_logit();
  // The sums over the other tokens do not show that the label's logit is infinite.
  if (call_.alpha != 0 && (z_label_ == INF || t_label_ == INF)) weight_ = std::nan("");
  const double s_gap = z_label_ - row.s_max, t_gap = t_label_ - row.t_max;
  row.centered_mean += s_gap / call_.shard.total;
  const double p_log_odds = t_gap / teacher_softmax_.temperature - row.t_log_sum;
  q_log_odds_ = s_gap / student_softmax_.temperature - row.s_log_sum;
  label_term_ = {};
  if (call_.target == Target::binary)
    set_binary_label_term(label_term_, call_.target_weight, p_log_odds, q_log_odds_);
  else
    label_term_.nll_weight = call_.target_weight * sigmoid(t_gap / UNTEMPERED.temperature - row.t_log_sum_t1);
  phi_ += label_term_.phi;
  g_ += label_term_.g;
  h_ += label_term_.h;
  const double q_log_odds_t1 = s_gap / UNTEMPERED.temperature - row.s_log_sum_t1;
  label_term_.nll = softplus(-q_log_odds_t1);
  label_term_.rest_t1 = sigmoid(-q_log_odds_t1);
  row.s_log_sum_t1 += softplus(q_log_odds_t1);  // now over all tokens
}

// Writes the value of the row, and sets the scales of its gradients.
inline void Row::write_value() {
  const RowStatistics& row = row_statistics_;
  double distillation = phi_ * temperature_factor(call_, s_temperature_), cross_entropy = 0;
  double entropy = row.s_log_sum - row.entropy;
  if (has_label_term(call_)) {
    if (label_term_.nll_weight != 0) distillation += label_term_.nll_weight * label_term_.nll;
    if (call_.alpha < 1) cross_entropy = label_term_.nll + smoothed_gap();
    entropy = entropy_with_label(q_log_odds_, entropy);
  } else if (with_labels_) {
    if (whole()) z_label_ = label_logit();
    cross_entropy = smoothed_cross_entropy(call_.label_smoothing, row.s_log_sum_t1, z_label_ - row.s_max,
                                           row.centered_mean, 1 / UNTEMPERED.temperature);
  }
  write(call_.loss, row_loss(call_, distillation, cross_entropy, with_labels_) * weight_);
  write(call_.distillation, distillation);
  write(call_.cross_entropy, cross_entropy);
  write(call_.student_entropy, entropy);
  scales_ = row_scales(call_, s_temperature_, weight_, label_term_.nll_weight);
}

// What label smoothing adds to -log q of the label. A label at -inf has an infinite cross-entropy without it.
inline double Row::smoothed_gap() const {
  if (call_.label_smoothing == 0 || z_label_ == -INF) return 0;
  const RowStatistics& row = row_statistics_;
  return call_.label_smoothing * (z_label_ - row.s_max - row.centered_mean) / UNTEMPERED.temperature;
}

inline float Row::student_gradient_of_label() const {
  const double gradient = student_label_gradient(call_, label_term_, scales_, 1 / s_temperature_, 1, with_labels_);
  return float(gradient) * s_adjust_.slope(splat(float(z_label_)))[0];
}

inline float Row::teacher_gradient_of_label() const {
  const double gradient = teacher_label_gradient(call_, label_term_, scales_, 1 / t_temperature_);
  return float(gradient) * t_adjust_.slope(splat(float(t_label_)))[0];
}

}  // namespace
