// The K + 1 events of a row, and its value.

namespace {

// The dense call over events. Each of its rows is the one in this object's buffers.
inline Call TopKRow::make_event_call(const Call& call) {
  Call events = call;
  const std::vector<int64_t> nowhere(call.sizes.size(), 0);
  auto rows = [&](std::vector<float>& buffer) {
    return Rows{reinterpret_cast<char*>(buffer.data()), Dtype::f32, events.vocabulary, nowhere};
  };
  events.vocabulary = call.tokens + !renormalizes();
  events.student = rows(student_events_);
  events.teacher = rows(teacher_events_);
  if (call.student_gradient.data) events.student_gradient = rows(gradient_events_);
  for (Tempering* tempering : {&events.student_tempering, &events.teacher_tempering}) {
    tempering->logit_scale = 1;
    tempering->softcap = 0;
  }
  events.student_entropy = events.cross_entropy = events.measures = nullptr;
  // Dropped rows do not get here, and the cross-entropy concerns the whole row.
  events.labels = nullptr;
  events.shard = {};
  events.shard.total = events.vocabulary;
  return events;
}

inline void TopKRow::make_events(const Tail& tail) {
  const double inverse = 1 / softmax_.temperature;
  double max = -INF;
  for (int64_t j = 0; j < tokens(); ++j) {
    if (ids_[j] < 0 || ids_[j] >= call_.shard.total) student_events_[j] = -INF;
    if (!(student_events_[j] <= max)) max = student_events_[j];
  }
  const double token_max = max;
  const bool has_tail = tail.max > -INF;
  double exp_sum_t1 = 0;
  if (has_tail) {
    max = std::max(max, tail.max);
    exp_sum_t1 = tail.exp_sum_t1 * std::exp((tail.max - max) / UNTEMPERED.temperature);
  }
  max_ = max;
  tail_log_sum_ = has_tail ? (tail.max - max) * inverse + std::log(tail.exp_sum) : -INF;
  tail_entropy_ = has_tail ? std::log(tail.exp_sum) - tail.entropy / tail.exp_sum : 0;

  // Logits may have a common offset that costs digits, so events are relative to the largest listed token.
  token_max_ = token_max > -INF ? token_max - max : 0;
  for (int64_t j = 0; j < tokens(); ++j) {
    if (token_max > -INF) student_events_[j] = float(student_events_[j] - token_max);
    if (with_labels()) exp_sum_t1 += std::exp((student_events_[j] + token_max_) / UNTEMPERED.temperature);
  }
  log_sum_t1_ = std::log(exp_sum_t1);
  if (!valid_) student_events_[0] = std::nanf("");

  const float* logprobs = load_logprobs();
  for (int64_t j = 0; j < tokens(); ++j) teacher_events_[j] = ids_[j] < 0 ? -INF : logprobs[j];
  if (renormalizes()) return;
  student_events_[tokens()] = float(tail_log_sum_ * softmax_.temperature - token_max_);
  if (!truncates()) teacher_events_[tokens()] = call_.tail_logprob ? call_.tail_logprob[row_] : -INF;
}

inline const float* TopKRow::load_logprobs() {
  const Rows& teacher = call_.teacher;
  const char* row = teacher.data + row_offset(teacher, call_.sizes, row_) * element_size(teacher.dtype);
  for (int64_t j = 0; j < tokens(); j += BLOCK) {
    const int n = int(std::min<int64_t>(BLOCK, tokens() - j));
    const float* block = load_block(row, teacher.dtype, j, n, Adjustment{}, scratch_.t);
    std::copy_n(block, n, teacher_events_.data() + j);
  }
  return teacher_events_.data();
}

// Computes the value of the row and the gradient of its events.
inline void TopKRow::compute_value() {
  const double weight = call_.weight ? call_.weight[row_] : 1;
  if (teacher_lists_no_token())
    write_no_divergence(0 * weight);
  else if (truncates())
    compute_truncated();
  else
    compute_dense();
  if (renormalizes() && gradient_) gradient_events_[tokens()] = 0;
  double cross_entropy = 0;
  if (with_labels()) {
    const double smoothing = call_.label_smoothing;
    const double mean = smoothing > 0 ? z_sum_ / call_.shard.total - max_ : 0;
    const double target = (1 - smoothing) * (z_label_ - max_) + smoothing * mean;
    cross_entropy = log_sum_t1_ - target / UNTEMPERED.temperature;
    call_.loss[row_] = float(call_.loss[row_] + weight * cross_entropy_weight(call_) * cross_entropy);
  }
  if (!valid_) {
    write(call_.loss, std::nanf(""));
    write(call_.distillation, std::nanf(""));
  }
  write(call_.cross_entropy, cross_entropy);
  write(call_.student_entropy, entropy());
  if (call_.measures) write_measures();
  cross_entropy_scale_ =
      cross_entropy_weight(call_) * weight * call_.scale * (call_.scale_on_device ? *call_.scale_on_device : 1);
}

// `nothing` is 0, or NaN if the row's weight is NaN.
inline void TopKRow::write_no_divergence(double nothing) {
  write(call_.distillation, 0);
  write(call_.loss, nothing);
  std::fill(gradient_events_.begin(), gradient_events_.end(), float(nothing));
}

inline void TopKRow::compute_dense() {
  auto each = [&](auto phase) {
    for (int64_t b = 0; b < event_row_.blocks(); ++b) phase(b, scratch_);
  };
  auto once = [&](auto step, bool* flags) { step(flags); };
  auto statistics = [&](int64_t b, BlockScratch& scratch) { event_row_.statistics(b, scratch); };
  value_of(event_row_, row_, each, once, statistics);
  if (gradient_) each([&](int64_t b, BlockScratch& scratch) { event_row_.gradient(b, scratch); });
}

// Sums phi and g over the listed tokens only. q is normalized over the whole row; p is used as given.
inline void TopKRow::compute_truncated() {
  const Kernels& kernels = kernels_of(call_);
  const double inverse = 1 / softmax_.temperature;
  double highest = student_events_[tokens()], sum = 0;  // the tail may be far above the listed tokens
  if (highest < 0) highest = 0;
  for (int64_t j = 0; j <= tokens(); ++j) sum += std::exp((student_events_[j] - highest) * inverse);
  const double log_sum = highest * inverse + std::log(sum);
  BlockSums total{};
  for (int64_t start = 0; start < tokens(); start += BLOCK) {
    const int n = int(std::min<int64_t>(BLOCK, tokens() - start));
    for (int i = 0; i < padded(n); ++i) {
      const double log_q = i < n ? student_events_[start + i] * inverse - log_sum : 0;
      const double log_p = i < n ? teacher_events_[start + i] : 0;
      scratch_.s[i] = float(log_q), scratch_.t[i] = float(log_p);
      scratch_.s_exp[i] = float(std::exp(log_q)), scratch_.t_exp[i] = float(std::exp(log_p));
    }
    BlockView view{};
    view.s = scratch_.s, view.t = scratch_.t, view.s_exp = scratch_.s_exp, view.t_exp = scratch_.t_exp;
    view.s_weight = view.t_weight = view.s_inverse = view.t_inverse = 1;
    const BlockSums sums = kernels.sums[false][true](view, n, call_.params, 0, scratch_.gradient);
    std::copy_n(scratch_.gradient, n, gradient_events_.data() + start);
    total.phi += sums.phi;
    total.g += sums.g;
  }
  const double weight = call_.weight ? call_.weight[row_] : 1;
  const float* per_row = call_.student_tempering.per_row;
  const double temperature = per_row ? per_row[row_] : call_.student_tempering.temperature;
  const double square = call_.scale_by_temperature ? temperature * temperature : 1;
  const double distillation = square * total.phi;
  write(call_.distillation, distillation);
  write(call_.loss, call_.alpha == 0 ? 0 : weight * call_.alpha * distillation);
  const double scale = call_.scale * (call_.scale_on_device ? *call_.scale_on_device : 1);
  const double coefficient = call_.alpha * square / temperature * weight * scale;
  for (int64_t j = 0; j <= tokens(); ++j) {
    const double log_q = student_events_[j] * inverse - log_sum, g = j < tokens() ? gradient_events_[j] : 0;
    gradient_events_[j] = float(coefficient * (g - std::exp(log_q) * total.g));
  }
}

// Entropy of the whole row: among the events, and within the tail by the tail's share.
inline double TopKRow::entropy() const {
  if (!call_.student_entropy) return 0;
  const double inverse = 1 / softmax_.temperature;
  double sum = std::exp(tail_log_sum_), moment = tail_moment();
  for (int64_t j = 0; j < tokens(); ++j) {
    const double z = (student_events_[j] + token_max_) * inverse, e = std::exp(z);
    sum += e;
    if (e > 0) moment += e * z;
  }
  return std::log(sum) - moment / sum;
}

// Writes the measures of the events, without the overlap.
inline void TopKRow::write_measures() const {
  float* out = call_.measures + row_ * MEASURES;
  std::fill_n(out, MEASURES, 0.0f);
  if (teacher_lists_no_token()) return;
  const int64_t events = tokens() + !renormalizes();
  const float* per_row = call_.teacher_tempering.per_row;
  const double t_inverse = 1 / (per_row ? per_row[row_] : call_.teacher_tempering.temperature);
  // Probabilities of events are exp(log_q(j)) and exp(log_p(j)) once the log-sums are set.
  double s_log_sum = 0, t_log_sum = 0;
  const auto log_q = [&](int64_t j) { return student_events_[j] / softmax_.temperature - s_log_sum; };
  const auto log_p = [&](int64_t j) {
    const bool has_mass = j < tokens() || call_.tail_logprob;
    const float z = !has_mass ? -INF : j < tokens() ? teacher_events_[j] : call_.tail_logprob[row_];
    return z * t_inverse - t_log_sum;
  };
  int64_t s_argmax = 0, t_argmax = 0;
  for (int64_t j = 1; j < events; ++j) {
    if (log_q(j) > log_q(s_argmax)) s_argmax = j;
    if (log_p(j) > log_p(t_argmax)) t_argmax = j;
  }
  const auto log_sum = [&](auto log_probability, int64_t argmax) {
    const double max = log_probability(argmax);
    double sum = 0;
    for (int64_t j = 0; j < events; ++j) sum += std::exp(log_probability(j) - max);
    return max + std::log(sum);
  };
  s_log_sum = log_sum(log_q, s_argmax);
  t_log_sum = log_sum(log_p, t_argmax);
  double entropy = 0, forward = 0, reverse = 0, acceptance = 0, s_mass = 0, t_mass = 0;
  for (int64_t j = 0; j < events; ++j) {
    const double log_p_j = log_p(j), log_q_j = log_q(j), p = std::exp(log_p_j), q = std::exp(log_q_j);
    if (!(p == 0)) entropy -= p * log_p_j;
    if (!(p == 0 || (q == 0 && p < NEGLIGIBLE))) forward += p * (log_p_j - log_q_j);
    if (!(q == 0 || (p == 0 && q < NEGLIGIBLE))) reverse += q * (log_q_j - log_p_j);
    acceptance += std::min(p, q);
    if (j < tokens()) s_mass += q, t_mass += p;
  }
  for (const double value : {entropy, forward, reverse, acceptance, double(s_argmax == t_argmax), s_mass, t_mass})
    *out++ = float(value);
}

}  // namespace
