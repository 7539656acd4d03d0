// The gradient of a row with a sparse teacher.

namespace {

// Computes the gradient of block b in scratch.
inline void TopKRow::make_gradient(int64_t b) {
  const int n = columns(b);
  float* out = scratch_.gradient;
  const float* e = nullptr;
  if (needs_sweep()) {
    if (!keeps_exponentials_) recompute_exponentials(b);
    e = exponentials(b);
  }
  const double gap = needs_sweep() ? tail_[b].max - max_ : 0;
  double share = std::exp(gap / softmax_.temperature - tail_log_sum_);
  if (tail_log_sum_ == -INF) share = 0;
  const V factor = splat(float(gradient_events_[tokens()] * share));
  if (!e || renormalizes())
    std::fill_n(out, padded(n), 0.0f);
  else
    for (int i = 0; i < n; i += LANES) store(out + i, load(e + i) * factor);
  if (with_labels()) add_cross_entropy(b, separate_t1_ ? exponentials_t1(b) : e, gap, out);
  token_blocks_.each_in(b, [&](int64_t j) {
    float& place = out[local_ids_[j] % BLOCK];
    // Listed tokens have no exponential in the sweep, so their cross-entropy is added here.
    const double q =
        with_labels() ? std::exp((student_events_[j] + token_max_) / UNTEMPERED.temperature - log_sum_t1_) : 0;
    place += float(gradient_events_[j] + cross_entropy_scale_ * q);
  });
  if (!valid_) std::fill_n(out, padded(n), std::nanf(""));
  if (!adjust_.identity()) chain(adjust_, load_student(b), n, out);
}

inline void TopKRow::add_cross_entropy(int64_t b, const float* e, double gap, float* out) {
  const int n = columns(b);
  const V factor = splat(float(cross_entropy_scale_ * std::exp(gap / UNTEMPERED.temperature - log_sum_t1_)));
  const V uniform = splat(float(cross_entropy_scale_ * call_.label_smoothing / call_.shard.total));
  for (int i = 0; i < n; i += LANES) store(out + i, load(out + i) + (load(e + i) * factor - uniform));
  const int64_t column = label_ - b * BLOCK;
  if (column >= 0 && column < n) out[column] -= float(cross_entropy_scale_ * (1 - call_.label_smoothing));
}

// Recomputes the exponentials of the sweep if they were not kept.
inline void TopKRow::recompute_exponentials(int64_t b) {
  const float* z = load_student(b);
  const int n = columns(b);
  if (!whole()) {  // the maximum was not kept either
    if (z != scratch_.s) std::memcpy(scratch_.s, z, padded(n) * sizeof(float));
    z = scratch_.s;
    token_blocks_.each_in(b, [&](int64_t j) { scratch_.s[local_ids_[j] % BLOCK] = -INF; });
    tail_[b].max = maximum_of(z, padded(n));
  }
  const V max = splat(tail_[b].max);
  for (int i = 0; i < n; i += LANES) store(scratch_.s_exp + i, softmax_.exponential(load(z + i) - max));
  if (separate_t1_)
    for (int i = 0; i < n; i += LANES) store(scratch_.s_exp_t1 + i, UNTEMPERED.exponential(load(z + i) - max));
  token_blocks_.each_in(
      b, [&](int64_t j) { scratch_.s_exp[local_ids_[j] % BLOCK] = scratch_.s_exp_t1[local_ids_[j] % BLOCK] = 0; });
}

}  // namespace
