// The sweep over the tokens that a sparse teacher does not list, and the statistics of it that ranks exchange.

namespace {

inline bool TopKRow::start(int64_t row) {
  row_ = row;
  auto pointer = [&](const Rows& rows) {
    return rows.data ? rows.data + row_offset(rows, call_.sizes, row) * element_size(rows.dtype) : nullptr;
  };
  student_ = pointer(call_.student);
  next_ = nullptr;
  if (row + 1 < call_.rows)
    next_ = call_.student.data + row_offset(call_.student, call_.sizes, row + 1) * element_size(call_.student.dtype);
  gradient_ = pointer(call_.student_gradient);
  ids_ = call_.ids + row * tokens();
  bool known = true;
  for (int64_t j = 0; j < tokens(); ++j) {
    const int64_t local = ids_[j] - call_.shard.first;
    known &= ids_[j] == -1 || (ids_[j] >= 0 && ids_[j] < call_.shard.total);
    local_ids_[j] = ids_[j] >= 0 && local >= 0 && local < call_.vocabulary ? local : -1;
  }
  label_ = call_.labels ? call_.labels[row] : -1;
  const double weight = call_.weight ? call_.weight[row] : 1;
  const int width = element_size(call_.student.dtype);
  const bool writes = whole() || call_.shard.step == Step::results;
  const bool dropped = (call_.labels && label_ == call_.ignore_index) || weight == 0;
  const int64_t kept = dropped ? 0 : call_.vocabulary;
  if (gradient_ && writes) std::memset(gradient_ + kept * width, 0, (call_.student.width - kept) * width);
  if (dropped) {
    if (writes)
      for (float* out : {call_.loss, call_.distillation, call_.cross_entropy, call_.student_entropy}) write(out, 0);
    return false;
  }
  valid_ = token_blocks_.sort(local_ids_.data(), tokens()) && known;
  if (with_labels() && (label_ < 0 || label_ >= call_.shard.total)) {
    valid_ = false;
    label_ = call_.shard.first;
  }
  label_ -= call_.shard.first;
  adjust_ = {float(call_.student_tempering.logit_scale), float(call_.student_tempering.softcap), 0};
  const float max = call_.vocabulary ? low_max(student_, call_.student.dtype, call_.vocabulary, adjust_) : 0;
  if (max <= FLOOR && max > -INF) adjust_.shift = max;
  const float* per_row = call_.student_tempering.per_row;
  const double temperature = per_row ? per_row[row] : call_.student_tempering.temperature;
  const float* teacher_per_row = call_.teacher_tempering.per_row;
  valid_ &= temperature > 0 && (!teacher_per_row || teacher_per_row[row] > 0);
  softmax_ = Softmax(temperature > 0 ? temperature : 1);
  separate_t1_ = with_labels() && softmax_.temperature != UNTEMPERED.temperature;
  z_sum_ = 0;
  return true;
}

inline void TopKRow::sweep(int64_t b, TopKRow* waiting) {
  if (waiting) waiting->make_gradient(b);  // before this row's exponentials overwrite the ones that it needs
  const float* z = load_tail(b);
  const int n = columns(b);
  TailBlock& out = tail_[b];
  out.max = maximum_of(z, padded(n));
  const int width = element_size(call_.student.dtype);
  const int64_t next = b + AHEAD - blocks_;  // past the end of this row, prefetches the next one
  const char* place = next < 0 ? student_ + (b + AHEAD) * BLOCK * width : next_ + next * BLOCK * width;
  const Ahead ahead{place, nullptr, next < 0 || (next_ && next < blocks_) ? width : 0, 0};
  auto alongside = [&](int from, int to) {
    if (waiting) waiting->store_gradient(b, from, to);
  };
  auto kernel = [&](auto t1, auto entropy) {
    tail_block<decltype(t1)::value, decltype(entropy)::value>(z, n, softmax_, exponentials(b), exponentials_t1(b),
                                                              ahead, alongside, out);
  };
  using Yes = std::true_type;
  using No = std::false_type;
  if (separate_t1_)
    call_.student_entropy ? kernel(Yes{}, Yes{}) : kernel(Yes{}, No{});
  else
    call_.student_entropy ? kernel(No{}, Yes{}) : kernel(No{}, No{});
}

// Loads a block without the listed tokens, and passes their z to the events.
inline const float* TopKRow::load_tail(int64_t b) {
  const float* z = load_student(b);
  const int n = columns(b);
  if (with_labels() && call_.label_smoothing > 0)
    for (int i = 0; i < n; ++i) z_sum_ += z[i];
  if (label_is_here() && label_ / BLOCK == b) z_label_ = z[label_ % BLOCK];
  bool copied = z == scratch_.s;
  token_blocks_.each_in(b, [&](int64_t j) {
    if (!copied) {
      std::memcpy(scratch_.s, z, padded(n) * sizeof(float));
      z = scratch_.s;
      copied = true;
    }
    const int64_t column = local_ids_[j] % BLOCK;
    student_events_[j] = z[column];
    scratch_.s[column] = -INF;
  });
  return z;
}

// Stores the statistics of this vocabulary shard for all ranks.
inline void TopKRow::store_partial(const Tail& tail) {
  const auto part = reinterpret_cast<ShardTail*>(call_.shard.statistics) + row_;
  const double shift = adjust_.shift;
  alignas(64) float label[LANES] = {-INF};
  if (label_is_here()) label[0] = load_block(student_, call_.student.dtype, label_, 1, adjust_, label)[0];
  *part = {tail.max + shift,         tail.exp_sum,
           tail.exp_sum_t1,          tail.entropy,
           double(call_.vocabulary), z_sum_ + shift * call_.vocabulary,
           label[0] + shift,         double(valid_)};
  for (int64_t j = 0; j < tokens(); ++j)
    call_.shard.tokens[row_ * tokens() + j] = local_ids_[j] < 0 ? 0 : float(student_events_[j] + shift);
}

// Merges the statistics of all shards, and makes z relative to this shard's shift.
inline TopKRow::Tail TopKRow::load_partials() {
  const auto each = [&](auto f) {
    for (int64_t p = 0; p < call_.shard.processes; ++p)
      f(reinterpret_cast<const ShardTail*>(call_.shard.all_statistics)[p * call_.rows + row_]);
  };
  const double shift = adjust_.shift;
  Tail tail;
  z_label_ = -INF;
  each([&](const ShardTail& part) {
    tail.max = std::max(tail.max, part.max);
    z_label_ = std::max(z_label_, part.label - shift);
    if (part.columns) z_sum_ += part.z_sum - shift * part.columns;
    valid_ &= part.valid != 0;
  });
  each([&](const ShardTail& part) { tail.add(part, 1 / softmax_.temperature, separate_t1_); });
  tail.max -= shift;
  for (int64_t j = 0; j < tokens(); ++j) student_events_[j] = float(call_.shard.tokens[row_ * tokens() + j] - shift);
  return tail;
}

inline TopKRow::Tail TopKRow::merge_blocks() const {
  Tail tail;
  if (!needs_sweep()) return tail;
  for (const TailBlock& block : tail_)
    if (block.max > FLOOR || block.exp_sum != block.exp_sum) tail.max = std::max(tail.max, double(block.max));
  if (tail.max == -INF) return tail;
  for (const TailBlock& block : tail_) tail.add(block, 1 / softmax_.temperature, separate_t1_);
  return tail;
}

// Reads the listed tokens without a sweep.
inline void TopKRow::gather_tokens() {
  alignas(64) float z[LANES];
  for (int64_t j = 0; j < tokens(); ++j)
    if (local_ids_[j] >= 0)
      student_events_[j] = load_block(student_, call_.student.dtype, local_ids_[j], 1, adjust_, z)[0];
}

}  // namespace
