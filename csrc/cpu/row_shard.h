// A row whose vocabulary is divided among ranks: its steps, and what the ranks exchange.

namespace {

inline void Row::take_step(BlockScratch& scratch) {
  switch (call_.shard.step) {
    case Step::statistics: return statistics_step(scratch);
    case Step::sums: return sums_step(scratch);
    default: return results_step(scratch);
  }
}

inline void Row::statistics_step(BlockScratch& scratch) {
  for (const bool policy : {false, true}) {
    log_0_policy_ = policy;
    for (int64_t b = 0; b < blocks_; ++b) statistics(b, scratch);
    if (merge_statistics()) return;
  }
}

inline void Row::sums_step(BlockScratch& scratch) {
  load_partials();
  const bool known = log_0_policy_;
  for (const bool policy : {known, true}) {
    log_0_policy_ = policy;
    for (int64_t b = 0; b < blocks_; ++b) sums(b, scratch);
    if (merge_sums()) break;
  }
  reinterpret_cast<ShardSums*>(call_.shard.sums)[row_] = {phi_, g_, h_, double(log_0_policy_)};
}

inline void Row::results_step(BlockScratch& scratch) {
  load_partials();
  if (needs_sums()) {
    phi_ = g_ = h_ = 0;
    const auto* all = reinterpret_cast<const ShardSums*>(call_.shard.all_sums);
    for (int64_t p = 0; p < call_.shard.processes; ++p) {
      const ShardSums& part = all[p * call_.rows + row_];
      phi_ += part.phi;
      g_ += part.g;
      h_ += part.h;
      log_0_policy_ |= part.policy != 0;
    }
  }
  finish();
  if (needs_gradient())
    for (int64_t b = 0; b < blocks_; ++b) gradient(b, scratch);
}

// Stores the statistics of this vocabulary shard for all ranks.
inline void Row::store_partial(const Merged& row) const {
  const auto maximum = [](double max, double sum, float shift) { return sum == 0 ? -INF : max + shift; };
  const bool here = (with_labels_ || has_label_term(call_)) && label_is_here();
  const ShardStatistics part = {maximum(row.s_max, row.s_exp_sum, s_adjust_.shift),
                                maximum(row.t_max, row.t_exp_sum, t_adjust_.shift),
                                row.s_exp_sum,
                                row.t_exp_sum,
                                row.forward,
                                row.reverse,
                                row.cross,
                                row.entropy,
                                row.s_exp_sum_t1,
                                row.centered_sum,
                                double(call_.vocabulary - (label_column_ >= 0)),
                                here ? double(label_logit()) + s_adjust_.shift : -INF,
                                t_skipped_max_ + t_adjust_.shift,
                                s_skipped_max_ + s_adjust_.shift,
                                double(log_0_policy_),
                                row.t_exp_sum_t1,
                                here && has_label_term(call_) ? double(teacher_label_logit()) + t_adjust_.shift : -INF};
  std::memcpy(call_.shard.statistics + row_ * fields(), &part, fields() * sizeof(double));
}

// Merges the statistics of all shards, and makes maxima and labels relative to this shard's shift.
inline void Row::load_partials() {
  const auto each = [&](auto f) {
    for (int64_t p = 0; p < call_.shard.processes; ++p) {
      ShardStatistics part{};
      const double* from = call_.shard.all_statistics + (p * call_.rows + row_) * fields();
      std::memcpy(&part, from, fields() * sizeof(double));
      f(part);
    }
  };
  Merged row;
  double label = -INF, t_label = -INF, t_skipped_max = -INF, s_skipped_max = -INF;
  each([&](const ShardStatistics& part) {
    row.update_max(part);
    label = std::max(label, part.label);
    t_label = std::max(t_label, part.t_label);
    t_skipped_max = std::max(t_skipped_max, part.t_skipped_max);
    s_skipped_max = std::max(s_skipped_max, part.s_skipped_max);
    log_0_policy_ |= part.policy != 0;
  });
  each([&](const ShardStatistics& part) { add_to(row, part, part.columns); });
  set_row_statistics(row);
  RowStatistics& all = row_statistics_;
  const auto matters = [](double z, double max, double temperature, double log_sum) {
    return std::exp((z - max) / temperature - log_sum) >= NEGLIGIBLE;
  };
  if (matters(t_skipped_max, row.t_max, t_temperature_, all.t_log_sum)) all.forward = INF, all.cross = -INF;
  if (matters(s_skipped_max, row.s_max, s_temperature_, all.s_log_sum)) all.reverse = INF;
  log_0_policy_ |= !std::isfinite(all.forward + all.reverse + all.cross + all.entropy);
  if (needs_statistics() && call_.normalized && (row.s_exp_sum == 0 || (call_.alpha != 0 && row.t_exp_sum == 0)))
    weight_ = std::nan("");
  all.s_max -= s_adjust_.shift;
  all.t_max -= t_adjust_.shift;
  z_label_ = label - s_adjust_.shift;
  t_label_ = t_label - t_adjust_.shift;
}

// Statistics of a block with the policy for log 0. A rank does not know which probabilities are negligible in the whole
// row. Moments therefore skip columns where either side is gone, and the largest skipped logit of the other side
// decides later whether a moment is infinite.
inline void Row::statistics_of_shard(int64_t b, const float* s, const float* t, BlockScratch& scratch) {
  const int n = columns(b);
  BlockStatistics& out = statistics_[b];
  const float nothing = std::numeric_limits<float>::min();
  const auto kernel = statistics_kernel(ALL | SINGLE, separate_t1_, true, false);
  const auto run = [&](const float* s, const float* t, BlockStatistics& out) {
    kernel(s, t, n, student_softmax_, teacher_softmax_, UNTEMPERED, nothing, nothing, scratch.s_exp, scratch.t_exp,
           scratch.s_exp_t1, {}, {}, out);
  };
  run(s, t, out);
  BlockStatistics present = out;
  std::memmove(scratch.s, s, padded(n) * sizeof(float));
  std::memmove(scratch.t, t, padded(n) * sizeof(float));
  for (int i = 0; i < n; ++i) {
    const bool s_gone = gone(s[i], out.s_max, student_softmax_), t_gone = gone(t[i], out.t_max, teacher_softmax_);
    if (s_gone && !t_gone) t_skipped_max_ = std::max(t_skipped_max_, double(t[i]));
    if (t_gone && !s_gone) s_skipped_max_ = std::max(s_skipped_max_, double(s[i]));
    if (s_gone || t_gone) scratch.s[i] = scratch.t[i] = -INF;
  }
  run(scratch.s, scratch.t, present);
  out.forward = present.forward;
  out.reverse = present.reverse;
  out.cross = present.cross;
}

}  // namespace
