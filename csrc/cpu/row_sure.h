// Columns in which a side has more than half of its probability (common/row_math.h).

namespace {

// The column of the row's maximum; -1 if there is none.
template <class Maximum, class Load>
inline int64_t Row::column_of_maximum(Maximum of_block, double maximum, Load load_block) {
  for (int64_t b = 0; b < blocks_; ++b) {
    if (of_block(statistics_[b]) != maximum) continue;
    const float* z = load_block(b);
    for (int i = 0; i < columns(b); ++i)
      if (z[i] == maximum) return b * BLOCK + i;
  }
  return -1;
}

// Finds the columns that a side is sure of (common/row_math.h), recomputes the statistics without them, and then adds
// them.
inline void Row::exclude_sure_columns(const Merged& row) {
  if (has_label_term(call_) || !call_.normalized || !(row.s_exp_sum < 2 || row.t_exp_sum < 2)) return;
  if (!sure_scratch_) sure_scratch_.reset(new BlockScratch);
  BlockScratch& scratch = *sure_scratch_;
  if (row.s_exp_sum < 2)
    sure_column_[0] = column_of_maximum([](const BlockStatistics& b) { return b.s_max; }, row.s_max,
                                        [&](int64_t b) { return load_student(b, scratch); });
  if (row.t_exp_sum < 2)
    sure_column_[1] = column_of_maximum([](const BlockStatistics& b) { return b.t_max; }, row.t_max,
                                        [&](int64_t b) { return load_teacher(b, scratch); });
  Merged rest;
  rest.s_max = row.s_max;
  rest.t_max = row.t_max;
  for (int64_t b = 0; b < blocks_; ++b) {
    BlockStatistics part = statistics_[b];
    if (sure_column_in(0, b) || sure_column_in(1, b)) part = without_sure(b, scratch);
    add_to(rest, part, columns(b));
  }
  SureSums& at = sure_sums_;
  at.s_rest = rest.s_exp_sum, at.t_rest = rest.t_exp_sum;
  at.forward = rest.forward, at.reverse = rest.reverse, at.cross = rest.cross;
  if (sure_column_[0] >= 0) at.t_gap = gap_at(sure_column_[0], false);
  if (sure_column_[1] >= 0) at.s_gap = gap_at(sure_column_[1], true);
  RowStatistics& out = row_statistics_;
  if (sure_column_[0] >= 0) {
    rest.s_exp_sum += 1;
    rest.reverse -= at.t_gap;
    out.s_log_sum = std::log1p(at.s_rest);
    if (!separate_t1_) out.s_log_sum_t1 = out.s_log_sum;
  }
  if (sure_column_[1] >= 0) {
    rest.t_exp_sum += 1;
    rest.forward -= at.s_gap;
    rest.cross += at.s_gap;
    out.t_log_sum = std::log1p(at.t_rest);
  }
  at.s_exp_sum = rest.s_exp_sum, at.t_exp_sum = rest.t_exp_sum;
  out.forward = rest.forward / rest.t_exp_sum;
  out.reverse = rest.reverse / rest.s_exp_sum;
  out.cross = rest.cross / rest.t_exp_sum;
  out.entropy = rest.entropy / rest.s_exp_sum;
}

inline BlockStatistics Row::without_sure(int64_t b, BlockScratch& scratch) {
  BlockStatistics out = statistics_[b];
  const float *s = load_student(b, scratch), *t = load_teacher(b, scratch);
  if (!keeps_exponentials_) exponentials(b, s, t, scratch);
  float* const exponential[] = {s_exp(b, scratch), t_exp(b, scratch)};
  float kept[2] = {};
  for (int side = 0; side < 2; ++side)
    if (sure_column_in(side, b)) std::swap(kept[side], exponential[side][sure_column_[side] - b * BLOCK]);
  const float s_threshold = log_0_policy_ ? NEGLIGIBLE / s_weight(b) : 0,
              t_threshold = log_0_policy_ ? NEGLIGIBLE / t_weight(b) : 0;
  sums_of_exponentials(s, t, columns(b), student_softmax_, teacher_softmax_, s_threshold, t_threshold, exponential[0],
                       exponential[1], out);
  for (int side = 0; side < 2; ++side)
    if (sure_column_in(side, b)) exponential[side][sure_column_[side] - b * BLOCK] = kept[side];
  return out;
}

// (z - max) / T of a column, on the student's side or on the teacher's.
inline double Row::gap_at(int64_t column, bool student) const {
  const double z = student ? logit_at(student_, call_.student.dtype, s_adjust_, column)
                           : logit_at(teacher_, call_.teacher.dtype, t_adjust_, column);
  return student ? (z - row_statistics_.s_max) / student_softmax_.temperature
                 : (z - row_statistics_.t_max) / teacher_softmax_.temperature;
}

// Whether neither side is at -inf in a sure column of the other.
inline bool Row::sure_columns_are_finite() const {
  for (const int64_t column : sure_column_)
    if (column >= 0 && !std::isfinite(gap_at(column, true) + gap_at(column, false))) return false;
  return true;
}

// Adds the sure columns to the sums over the other columns, and computes their gradients.
inline void Row::add_sure_columns() {
  if (sure_column_[0] < 0 && sure_column_[1] < 0) return;
  const RowStatistics& row = row_statistics_;
  Columns at{};
  for (int k = 0; k < 2; ++k) {
    const int64_t column = sure_column_[k] < 0 ? sure_column_[1 - k] : sure_column_[k];
    const double s_gap = gap_at(column, true), t_gap = gap_at(column, false);
    const double log_q = s_gap - row.s_log_sum, log_p = t_gap - row.t_log_sum;
    at.log_p[k] = float(log_p), at.log_q[k] = float(log_q);
    at.p[k] = float(std::exp(log_p)), at.q[k] = float(std::exp(log_q));
    at.log_ratio[k] = float((t_gap - s_gap) - (row.t_log_sum - row.s_log_sum));
  }
  kernels_.columns(at, call_.params, float(call_.degree));
  double g = g_, h = h_;  // sums over all columns but the side's own sure column
  const bool two = sure_column_[0] >= 0 && sure_column_[1] >= 0 && sure_column_[0] != sure_column_[1];
  if (two) {
    g += at.g[1];
    h += at.h[0];
  }
  for (int k = 0; k < (two ? 2 : 1); ++k) {
    phi_ += at.phi[k];
    g_ += at.g[k];
    h_ += at.h[k];
  }
  const SureSums& of = sure_sums_;
  if (sure_column_[0] >= 0) sure_gradient_[0] = (at.g[0] * of.s_rest - g) / of.s_exp_sum;
  if (sure_column_[1] >= 0) sure_gradient_[1] = (at.h[1] * of.t_rest - h) / of.t_exp_sum;
}

// Computes the gradients of the sure columns if there is a closed form.
inline void Row::set_sure_gradients() {
  const bool same_column = sure_column_[0] == sure_column_[1];
  if (sure_column_[0] >= 0) sure_gradient_[0] = sure_student_gradient(call_, sure_sums_, same_column);
  if (sure_column_[1] >= 0) sure_gradient_[1] = sure_teacher_gradient(call_, sure_sums_, same_column);
}

// Replaces the gradient of a sure column in this block.
inline void Row::store_sure_gradient(int side, int64_t b, double scale, float* gradient) const {
  if (sure_column_in(side, b) && call_.alpha != 0 && std::isfinite(phi_ + sure_gradient_[side]))
    gradient[sure_column_[side] - b * BLOCK] = float(sure_gradient_[side] * scale);
}

}  // namespace
