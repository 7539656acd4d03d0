// The statistics of a row and the sums of phi, g and h: per block, and merged.

namespace {

inline void Row::statistics(int64_t b, BlockScratch& scratch, const PendingGradient& alongside) {
  const int n = columns(b);
  if (!needs_statistics()) return alongside.write(0, n);
  const float* s = load_student(b, scratch);
  const float* t = load_teacher(b, scratch);
  BlockStatistics& out = statistics_[b];
  float s_threshold = 0, t_threshold = 0;
  if (log_0_policy_ && !whole()) {
    statistics_of_shard(b, s, t, scratch);
    return add_label_statistics(b, load_student(b, scratch), load_teacher(b, scratch), out);
  }
  if (log_0_policy_) {  // the weights of the first attempt are still valid
    s_threshold = NEGLIGIBLE / s_weight(b);
    t_threshold = NEGLIGIBLE / t_weight(b);
  } else {
    out.s_max = maximum_of(s, padded(n));
    out.t_max = maximum_of(t, padded(n));
  }
  out.overflows = gradients_need_logs() && (overflow(s, n, out.s_max, student_softmax_.inverse) ||
                                            overflow(t, n, out.t_max, teacher_softmax_.inverse));
  const bool close = are_close(out, student_softmax_, teacher_softmax_);
  statistics_kernel(moments_, separate_t1_, log_0_policy_, close)(
      s, t, n, student_softmax_, teacher_softmax_, UNTEMPERED, s_threshold, t_threshold, s_exp(b, scratch),
      t_exp(b, scratch), s_exp_t1(b, scratch), ahead(b + AHEAD), alongside, out);
  add_label_statistics(b, s, t, out);
}

// Completes the statistics of a block for the label term.
inline void Row::add_label_statistics(int64_t b, const float* s, const float* t, BlockStatistics& out) const {
  const int n = columns(b);
  out.t_exp_sum_t1 = 0;
  if (call_.target == Target::label) {
    V sum{};
    for (int i = 0; i < n; i += LANES) sum += UNTEMPERED.exponential(load(t + i) - out.t_max);
    out.t_exp_sum_t1 = sum_lanes(sum);
  }
  if (!label_column_in(b) || !(moments_ & SINGLE)) return;
  out.centered_sum = 0;
  for (int i = 0; i < n; ++i)
    if (b * BLOCK + i != label_column_) out.centered_sum += s[i] - out.s_max;
}

inline bool Row::merge_statistics() {
  Merged row;
  if (!needs_statistics()) {
    row_statistics_ = {};
    if (call_.shard.step == Step::statistics) store_partial(row);
    return true;
  }
  for (const BlockStatistics& block : statistics_) row.update_max(block);
  bool overflows = false;
  for (int64_t b = 0; b < blocks_; ++b) {
    add_to(row, statistics_[b], columns(b) - label_column_in(b));
    overflows |= statistics_[b].overflows;
  }
  const bool finite =
      log_0_policy_ || (!overflows && std::isfinite(row.forward + row.reverse + row.cross + row.entropy));
  set_row_statistics(row);
  if (whole() && finite) exclude_sure_columns(row);
  if (call_.shard.step == Step::statistics) store_partial(row);
  return finite;
}

inline void Row::set_row_statistics(const Merged& row) {
  const double s_log_sum = std::log(row.s_exp_sum), t_log_sum = std::log(row.t_exp_sum);
  row_statistics_ = {row.s_max,
                     row.t_max,
                     s_log_sum,
                     t_log_sum,
                     separate_t1_ ? std::log(row.s_exp_sum_t1) : s_log_sum,
                     std::log(row.t_exp_sum_t1),
                     row.forward / row.t_exp_sum,
                     row.reverse / row.s_exp_sum,
                     row.cross / row.t_exp_sum,
                     row.entropy / row.s_exp_sum,
                     row.centered_sum / call_.shard.total};
  // NaN or an infinity is among the logits. A definition that compares may lose it.
  const bool invalid = std::isnan(row.s_exp_sum) || (call_.alpha != 0 && std::isnan(row.t_exp_sum));
  if (call_.normalized && invalid) weight_ = std::nan("");
}

inline void Row::sums(int64_t b, BlockScratch& scratch) {
  const bool logs = kernels_.uses_logs || log_0_policy_ || !call_.normalized;
  sums_[b] = kernels_.sums[teacher_gradient_ != nullptr][log_0_policy_](view(b, scratch, logs), columns(b),
                                                                        call_.params, float(call_.degree), g(b, scratch));
}

inline bool Row::merge_sums() {
  phi_ = g_ = h_ = 0;
  for (const BlockSums& block : sums_) {
    phi_ += block.phi;
    g_ += block.g;
    h_ += block.h;
  }
  // The sums leave out the sure columns, whose terms in the blocks may be NaN all the same.
  const bool finite = log_0_policy_ || (std::isfinite(phi_ + g_ + h_) && sure_columns_are_finite());
  if (whole() && finite) add_sure_columns();
  return finite;
}

// Computes the sums of phi and g from the moments.
inline void Row::set_sums_from_moments() {
  const RowStatistics& row = row_statistics_;
  set_closed_form({call_.forward, call_.reverse, call_.cross}, {row.forward, row.reverse, row.cross}, row.s_log_sum,
                  row.t_log_sum, phi_, g_);
  h_ = call_.degree * phi_ - g_;
  // The teacher's gradient of a cross-entropy is -p (log q - mean), with the mean of log q under p. p log q and p times
  // the mean would be rounded before their difference is taken, so the mean is subtracted from log q, which leaves the
  // projection next to nothing to subtract.
  centering_ = is_cross_entropy(call_) && std::isfinite(phi_) ? phi_ / call_.cross : 0;
  h_ -= call_.degree * call_.cross * centering_;
}

// Whether some (z - max) / T is -inf. Only a temperature below 1 takes finite gaps there.
inline bool Row::overflow(const float* z, int n, float maximum, float inverse) {
  if (inverse <= 1) return false;
  float lowest = 0;
  for (int i = 0; i < n; ++i) lowest = std::min(lowest, z[i] - maximum);
  return lowest * inverse == -INF;
}

}  // namespace
