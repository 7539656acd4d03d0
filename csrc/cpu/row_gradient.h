// The gradients of a row, block by block.

namespace {

inline PendingGradient Row::begin_gradient(int64_t b, BlockScratch& scratch) {
  const bool logs =
      (kernels_.gradient_uses_logs && !keeps_g()) || teacher_gradient_ || log_0_policy_ || !call_.normalized;
  PendingGradient pending;
  pending.view = view(b, scratch, logs || s_adjust_.softcap != 0);
  pending.params = call_.params;
  if (teacher_gradient_) write_teacher_gradient(b, scratch, pending);
  if (!student_gradient_) return {};
  const int n = columns(b);
  const Dtype dtype = call_.student.dtype;
  char* const place = student_gradient_ + b * BLOCK * element_size(dtype);
  // Stores past the cache need whole vectors at addresses that are multiples of their size.
  const bool whole_vectors = reinterpret_cast<uintptr_t>(place) % sizeof(V) == 0 && n % LANES == 0;
  const bool waits = !log_0_policy_ && !with_labels_ && call_.alpha != 0 && s_adjust_.identity() &&
                     !label_column_in(b) && !sure_column_in(0, b);
  const Form form = waits && past_cache_ && dtype == Dtype::f32 && whole_vectors ? STREAM : SCRATCH;
  pending.kernel = keeps_g() ? PROJECTION[form] : log_0_policy_ ? kernels_.student_log_0 : kernels_.student[form];
  pending.sum = float(g_);
  pending.coefficient = float(scales_.distillation / s_temperature_);
  pending.out = form == STREAM ? reinterpret_cast<float*>(place) : scratch.gradient;
  if (form == STREAM) return pending;
  if (waits) {
    pending.place = place;
    pending.dtype = dtype;
    pending.past_cache = past_cache_;
    return pending;
  }
  if (call_.alpha == 0)
    std::fill_n(scratch.gradient, padded(n), 0.0f);
  else
    pending.write(0, n);
  store_sure_gradient(0, b, scales_.distillation / s_temperature_, scratch.gradient);
  if (with_labels_) add_cross_entropy(b, scratch, pending.view);
  if (!s_adjust_.identity()) chain(s_adjust_, pending.view.s, n, scratch.gradient);
  if (label_column_in(b)) scratch.gradient[label_column_ - b * BLOCK] = student_gradient_of_label();
  store_block(student_gradient_, dtype, b * BLOCK, n, scratch.gradient, past_cache_);
  return {};
}

inline void Row::write_teacher_gradient(int64_t b, BlockScratch& scratch, PendingGradient pending) {
  const int n = columns(b);
  pending.kernel = kernels_.teacher[log_0_policy_];
  pending.degree = float(call_.degree);
  pending.sum = float(h_);
  pending.coefficient = float(scales_.distillation / t_temperature_);
  pending.out = scratch.gradient;
  if (call_.alpha == 0)
    std::fill_n(scratch.gradient, padded(n), 0.0f);
  else
    pending.write(0, n);
  store_sure_gradient(1, b, scales_.distillation / t_temperature_, scratch.gradient);
  if (!t_adjust_.identity()) chain(t_adjust_, pending.view.t, n, scratch.gradient);
  if (label_column_in(b)) scratch.gradient[label_column_ - b * BLOCK] = teacher_gradient_of_label();
  store_block(teacher_gradient_, call_.teacher.dtype, b * BLOCK, n, scratch.gradient, past_cache_);
}

inline void Row::add_cross_entropy(int64_t b, BlockScratch& scratch, const BlockView& v) {
  const int n = columns(b);
  const float* e = separate_t1_ ? s_exp_t1(b, scratch) : v.s_exp;
  const double s_gap = statistics_[b].s_max - row_statistics_.s_max;
  const double weight = std::exp(s_gap / UNTEMPERED.temperature - row_statistics_.s_log_sum_t1);
  const V factor = splat(float(scales_.nll * weight));
  const V uniform = splat(float(scales_.cross_entropy * call_.label_smoothing / call_.shard.total));
  const int64_t column = label_ - b * BLOCK;
  const bool here = column >= 0 && column < n;
  const float distillation = here ? scratch.gradient[column] : 0;
  for (int i = 0; i < n; i += LANES)
    store(scratch.gradient + i, load(scratch.gradient + i) + (load(e + i) * factor - uniform));
  if (!here) return;
  if (sure_column_[0] == label_ && !separate_t1_) {  // q - 1 would have lost its digits
    const double smoothed = call_.label_smoothing * (1 - 1.0 / call_.shard.total);
    const double rest = sure_sums_.s_rest / sure_sums_.s_exp_sum;
    scratch.gradient[column] = float(distillation + (scales_.cross_entropy * smoothed - scales_.nll * rest));
  } else {
    scratch.gradient[column] -= float(scales_.cross_entropy * (1 - call_.label_smoothing));
  }
}

inline BlockView Row::view(int64_t b, BlockScratch& scratch, bool logits) {
  BlockView v{};
  const bool recompute = needs_statistics() && !keeps_exponentials_;
  logits |= recompute;
  v.s = logits ? load_student(b, scratch) : s_exp(b, scratch);  // without logs these pointers are loaded,
  v.t = logits ? load_teacher(b, scratch) : t_exp(b, scratch);  // though never used, so they must be valid
  v.s_exp = s_exp(b, scratch);
  v.t_exp = t_exp(b, scratch);
  v.g = g(b, scratch);
  v.s_inverse = student_softmax_.inverse;
  v.t_inverse = teacher_softmax_.inverse;
  v.temperature_ratio = float(student_softmax_.temperature / teacher_softmax_.temperature);
  v.first = b * BLOCK;
  v.sure = sure_column_;
  if (!needs_statistics()) return v;
  if (!whole()) {
    statistics_[b].s_max = maximum_of(v.s, padded(columns(b)));
    statistics_[b].t_max = maximum_of(v.t, padded(columns(b)));
  }
  if (recompute) exponentials(b, v.s, v.t, scratch);
  v.s_weight = s_weight(b);
  v.t_weight = t_weight(b);
  if (!call_.normalized) return v;
  v.s_max = statistics_[b].s_max;
  v.t_max = statistics_[b].t_max;
  const double log_q_offset = s_offset(b) + centering_;
  v.s_offset = float(log_q_offset);
  v.t_offset = float(t_offset(b));
  v.s_offset_low = float(log_q_offset - v.s_offset);
  v.t_offset_low = float(t_offset(b) - v.t_offset);
  double offset = t_offset(b) - s_offset(b);
  const RowStatistics& row = row_statistics_;
  const double temperature = student_softmax_.temperature;
  const double direct = (row.s_max - row.t_max) / temperature + (row.s_log_sum - row.t_log_sum);
  if (temperature == teacher_softmax_.temperature && std::abs(direct) < CLOSE_LOGITS) {
    offset = direct;
  } else {
    v.s_origin = v.s_max;
    v.t_origin = v.t_max;
  }
  offset *= v.s_inverse * temperature;  // on the scale of the gap to which it is added
  v.log_ratio_high = float(offset);
  v.log_ratio_low = float(offset - v.log_ratio_high);
  return v;
}

// Recomputes the exponentials of a block if they were not kept.
inline void Row::exponentials(int64_t b, const float* s, const float* t, BlockScratch& scratch) {
  const int n = columns(b);
  const V s_max = splat(statistics_[b].s_max), t_max = splat(statistics_[b].t_max);
  for (int i = 0; i < n; i += LANES) {
    store(scratch.s_exp + i, student_softmax_.exponential(load(s + i) - s_max));
    store(scratch.t_exp + i, teacher_softmax_.exponential(load(t + i) - t_max));
  }
  if (separate_t1_)
    for (int i = 0; i < n; i += LANES) store(scratch.s_exp_t1 + i, UNTEMPERED.exponential(load(s + i) - s_max));
}

}  // namespace
