// A row against a sparse teacher, as a dense loss over K + 1 events (fastkd/backends/sparse.py).
//
//   sweep     computes the exponentials of the row without the listed tokens, keeps them in scratch, and sums them
//   events    passes the tokens' logits and the tail's log-sum-exp, K + 1 columns, through Row
//   gradient  multiplies the tail's exponentials by one number, and puts the tokens' gradients in their places
//
// It reads the logits once, gathers K of them, and writes the gradient once. Threads share the rows.

namespace {

// The listed tokens of a row, grouped by block.
class TokensByBlock {
 public:
  TokensByBlock(int64_t vocabulary, int64_t tokens)
      : vocabulary_(vocabulary),
        starts_((vocabulary + BLOCK - 1) / BLOCK + 2),
        order_(tokens),
        taken_((vocabulary + 63) / 64) {}

  // False if an id is out of range or occurs twice. The others are sorted in any case.
  bool sort(const int64_t* ids, int64_t tokens) {
    bool valid = true;
    std::fill(starts_.begin(), starts_.end(), 0);
    for (int64_t j = 0; j < tokens; ++j) {
      const int64_t id = ids[j];
      if (id == -1) continue;
      if (id < 0 || id >= vocabulary_) {
        valid = false;
        continue;
      }
      uint64_t& word = taken_[id / 64];
      const uint64_t bit = uint64_t(1) << (id % 64);
      if (word & bit) valid = false;
      word |= bit;
      ++starts_[id / BLOCK + 2];
    }
    for (size_t b = 1; b < starts_.size(); ++b) starts_[b] += starts_[b - 1];
    for (int64_t j = 0; j < tokens; ++j) {
      if (ids[j] < 0 || ids[j] >= vocabulary_) continue;
      order_[starts_[ids[j] / BLOCK + 1]++] = j;
      taken_[ids[j] / 64] = 0;
    }
    return valid;
  }

  // Calls f(j) with the index of each listed token in block b.
  template <class F>
  void each_in(int64_t b, F f) const {
    for (int64_t i = starts_[b]; i < starts_[b + 1]; ++i) f(order_[i]);
  }

 private:
  int64_t vocabulary_;
  std::vector<int64_t> starts_, order_;
  std::vector<uint64_t> taken_;
};

// What the sweep computes for a block, relative to its maximum and without the listed tokens.
struct TailBlock {
  float max;
  double exp_sum, exp_sum_t1, entropy;  // sums of e, of e at temperature 1, and of e z'
};

// Calls alongside(from, to) for each strip: it stores another row's gradient, which overlaps with arithmetic.
template <bool T1, bool ENTROPY, class Alongside>
void tail_block(const float* z, int n, Softmax softmax, float* e_out, float* e_t1_out, Ahead ahead, Alongside alongside,
                TailBlock& out) {
  const V max = splat(out.max);
  V sum{}, exp_sum_t1{}, entropy{};
  for (int start = 0; start < n; start += STRIP) {
    V strip{}, strip_t1{}, strip_entropy{};
    const int end = std::min(start + STRIP, n);
    alongside(start, end);
    for (int i = start; i < end; i += LANES) {
      ahead.ask(i);
      const V gap = load(z + i) - max;
      const V e = softmax.exponential(gap);
      store(e_out + i, e);
      strip += e;
      if (ENTROPY) strip_entropy += e * at_least(gap, splat(softmax.lowest));
      if (T1) {
        const V e_t1 = UNTEMPERED.exponential(gap);
        store(e_t1_out + i, e_t1);
        strip_t1 += e_t1;
      }
    }
    sum += strip;
    exp_sum_t1 += strip_t1;
    entropy += strip_entropy;
  }
  out.exp_sum = sum_lanes(sum);
  out.exp_sum_t1 = T1 ? sum_lanes(exp_sum_t1) : out.exp_sum;
  out.entropy = sum_lanes(entropy) / softmax.temperature;
}

// Statistics of one vocabulary shard, exchanged between ranks (Shard::statistics). Maxima are as in ShardStatistics.
struct ShardTail {
  double max, exp_sum, exp_sum_t1, entropy;  // as in TailBlock
  double columns, z_sum, label;              // number of columns, sum of their z, z of the label or -inf
  double valid;                              // 1 if no id occurs twice
};
static_assert(sizeof(ShardTail) == TAIL_STATISTICS * sizeof(double));

class TopKRow {
 public:
  TopKRow(const Call& call, Workspace& workspace)
      : call_(call),
        blocks_((call.vocabulary + BLOCK - 1) / BLOCK),
        token_blocks_(call.vocabulary, call.tokens),
        tail_(blocks_),
        local_ids_(call.tokens),
        student_events_(padded(int(call.tokens + 1)) + LANES),
        teacher_events_(student_events_.size()),
        gradient_events_(student_events_.size()),
        event_call_(make_event_call(call)),
        event_row_(event_call_, event_workspace_) {
    const int arrays = with_labels() ? 2 : 1;
    keeps_exponentials_ = whole() && call.student_gradient.data && call.vocabulary * arrays * 4 <= SCRATCH_BYTES;
    if (keeps_exponentials_) exponentials_ = workspace.reserve(blocks_ * BLOCK * arrays);
    past_cache_ = call.rows * call.vocabulary * element_size(call.student.dtype) >= STREAM_BYTES;
  }

  int64_t blocks() const { return blocks_; }

  // Whether a result depends on the tokens that are not listed. If not, there is no sweep.
  bool needs_sweep() const { return !renormalizes() || with_labels() || call_.student_entropy; }

  // Whether the gradient may be written during the next row's sweep.
  bool can_wait() const { return keeps_exponentials_ && needs_sweep(); }

  bool needs_gradient() const { return gradient_; }

  // Opens a row. False if it is dropped, in which case its outputs are written.
  bool start(int64_t row) {
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

  // Computes one step of a row whose vocabulary is divided among ranks. Call it after start().
  void take_step(BlockScratch&) {
    if (call_.shard.step == Step::statistics) {
      if (needs_sweep())
        for (int64_t b = 0; b < blocks_; ++b) sweep(b, nullptr);
      else
        gather_tokens();
      store_partial(merge_blocks());
      return;
    }
    const Tail tail = load_partials();
    make_events(tail);
    compute_value();
    if (gradient_)
      for (int64_t b = 0; b < blocks_; ++b) write_gradient(b);
  }

  // Sweeps block b, and meanwhile writes the same block of the gradient of `waiting`, an earlier row.
  void sweep(int64_t b, TopKRow* waiting) {
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

  // Computes the value of the row once its blocks are swept. After it, write_gradient() may run on any block.
  void finish() {
    if (!needs_sweep()) gather_tokens();
    make_events(merge_blocks());
    compute_value();
  }

  void write_gradient(int64_t b) {
    make_gradient(b);
    store_gradient(b, 0, columns(b));
  }

 private:
  // All tokens that the teacher does not list, relative to their maximum.
  struct Tail {
    double max = -INF, exp_sum = 0, exp_sum_t1 = 0, entropy = 0;

    template <class Part>
    void add(const Part& part, double inverse, bool t1) {
      const double gap = part.max - max;
      if (gap == -INF) return;
      const double factor = std::exp(gap * inverse);
      exp_sum += factor * part.exp_sum;
      entropy += factor * (part.entropy + gap * inverse * part.exp_sum);
      exp_sum_t1 += t1 ? std::exp(gap / UNTEMPERED.temperature) * part.exp_sum_t1 : factor * part.exp_sum;
    }
  };

  bool whole() const { return call_.shard.step == Step::all; }
  bool label_is_here() const { return with_labels() && label_ >= 0 && label_ < call_.vocabulary; }
  bool with_labels() const { return call_.labels && call_.alpha < 1; }
  bool renormalizes() const { return call_.tail == fastkd::Tail::renormalize; }
  bool truncates() const { return call_.tail == fastkd::Tail::truncate; }
  int columns(int64_t b) const { return int(std::min<int64_t>(BLOCK, call_.vocabulary - b * BLOCK)); }
  int64_t tokens() const { return call_.tokens; }

  // The dense call over events. Each of its rows is the one in this object's buffers.
  Call make_event_call(const Call& call) {
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
    events.student_entropy = events.cross_entropy = nullptr;
    // Dropped rows do not get here, and the cross-entropy concerns the whole row.
    events.labels = nullptr;
    events.shard = {};
    events.shard.total = events.vocabulary;
    return events;
  }

  float* exponentials(int64_t b) { return keeps_exponentials_ ? exponentials_ + b * BLOCK : scratch_.s_exp; }
  float* exponentials_t1(int64_t b) {
    return keeps_exponentials_ ? exponentials_ + (blocks_ + b) * BLOCK : scratch_.s_exp_t1;
  }

  const float* load_student(int64_t b) {
    return load_block(student_, call_.student.dtype, b * BLOCK, columns(b), adjust_, scratch_.s);
  }

  // Loads a block without the listed tokens, and passes their z to the events.
  const float* load_tail(int64_t b) {
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
  void store_partial(const Tail& tail) {
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
  Tail load_partials() {
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

  Tail merge_blocks() const {
    Tail tail;
    if (!needs_sweep()) return tail;
    for (const TailBlock& block : tail_)
      if (block.max > FLOOR || block.exp_sum != block.exp_sum) tail.max = std::max(tail.max, double(block.max));
    if (tail.max == -INF) return tail;
    for (const TailBlock& block : tail_) tail.add(block, 1 / softmax_.temperature, separate_t1_);
    return tail;
  }

  // Reads the listed tokens without a sweep.
  void gather_tokens() {
    alignas(64) float z[LANES];
    for (int64_t j = 0; j < tokens(); ++j)
      if (local_ids_[j] >= 0)
        student_events_[j] = load_block(student_, call_.student.dtype, local_ids_[j], 1, adjust_, z)[0];
  }

  void make_events(const Tail& tail) {
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

  const float* load_logprobs() {
    const Rows& teacher = call_.teacher;
    const char* row = teacher.data + row_offset(teacher, call_.sizes, row_) * element_size(teacher.dtype);
    for (int64_t j = 0; j < tokens(); j += BLOCK) {
      const int n = int(std::min<int64_t>(BLOCK, tokens() - j));
      const float* block = load_block(row, teacher.dtype, j, n, Adjustment{}, scratch_.t);
      std::copy_n(block, n, teacher_events_.data() + j);
    }
    return teacher_events_.data();
  }

  // Whether the teacher lists no token. Such a row has no divergence, whatever the tail is.
  bool is_silent() const {
    return std::all_of(ids_, ids_ + tokens(), [](int64_t id) { return id == -1; });
  }

  // Computes the value of the row and the gradient of its events.
  void compute_value() {
    const double weight = call_.weight ? call_.weight[row_] : 1;
    if (is_silent())
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
      call_.loss[row_] = float(call_.loss[row_] + weight * (1 - call_.alpha) * cross_entropy);
    }
    if (!valid_) {
      write(call_.loss, std::nanf(""));
      write(call_.distillation, std::nanf(""));
    }
    write(call_.cross_entropy, cross_entropy);
    write(call_.student_entropy, entropy());
    cross_entropy_scale_ =
        (1 - call_.alpha) * weight * call_.scale * (call_.scale_on_device ? *call_.scale_on_device : 1);
  }

  // `nothing` is 0, or NaN if the row's weight is NaN.
  void write_no_divergence(double nothing) {
    write(call_.distillation, 0);
    write(call_.loss, nothing);
    std::fill(gradient_events_.begin(), gradient_events_.end(), float(nothing));
  }

  void compute_dense() {
    auto each = [&](auto phase) {
      for (int64_t b = 0; b < event_row_.blocks(); ++b) phase(b, scratch_);
    };
    auto once = [&](auto step, bool* flags) { step(flags); };
    auto statistics = [&](int64_t b, BlockScratch& scratch) { event_row_.statistics(b, scratch); };
    value_of(event_row_, row_, each, once, statistics);
    if (gradient_) each([&](int64_t b, BlockScratch& scratch) { event_row_.gradient(b, scratch); });
  }

  // Sums phi and g over the listed tokens only. q is normalized over the whole row; p is used as given.
  void compute_truncated() {
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
      const BlockSums sums = kernels.sums[1](view, n, call_.params, scratch_.gradient);
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
  double entropy() const {
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
  // Sum of e z' over the tail.
  double tail_moment() const {
    return tail_log_sum_ == -INF ? 0 : std::exp(tail_log_sum_) * (tail_log_sum_ - tail_entropy_);
  }

  // Computes the gradient of block b in scratch.
  void make_gradient(int64_t b) {
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

  void store_gradient(int64_t b, int from, int to) {
    const Dtype dtype = call_.student_gradient.dtype;
    store_block(gradient_, dtype, b * BLOCK + from, to - from, scratch_.gradient + from, past_cache_);
  }

  void add_cross_entropy(int64_t b, const float* e, double gap, float* out) {
    const int n = columns(b);
    const V factor = splat(float(cross_entropy_scale_ * std::exp(gap / UNTEMPERED.temperature - log_sum_t1_)));
    const V uniform = splat(float(cross_entropy_scale_ * call_.label_smoothing / call_.shard.total));
    for (int i = 0; i < n; i += LANES) store(out + i, load(out + i) + (load(e + i) * factor - uniform));
    const int64_t column = label_ - b * BLOCK;
    if (column >= 0 && column < n) out[column] -= float(cross_entropy_scale_ * (1 - call_.label_smoothing));
  }

  // Recomputes the exponentials of the sweep if they were not kept.
  void recompute_exponentials(int64_t b) {
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

  void write(float* to, double value) const {
    if (to) to[row_] = float(value);
  }

  const Call& call_;
  const int64_t blocks_;
  TokensByBlock token_blocks_;
  std::vector<TailBlock> tail_;
  std::vector<int64_t> local_ids_;  // column of each listed token in this vocabulary shard, or -1
  std::vector<float> student_events_, teacher_events_, gradient_events_;
  const Call event_call_;
  Workspace event_workspace_;
  Row event_row_;
  BlockScratch scratch_;
  float* exponentials_ = nullptr;  // [blocks, BLOCK], followed by the same at temperature 1
  bool keeps_exponentials_ = false, past_cache_ = false;

  // The current row.
  int64_t row_ = 0, label_ = 0;
  char *student_ = nullptr, *next_ = nullptr, *gradient_ = nullptr;
  const int64_t* ids_ = nullptr;
  bool valid_ = true, separate_t1_ = false;
  Adjustment adjust_;
  Softmax softmax_{1};
  double max_ = 0, token_max_ = 0;  // largest z of the row; largest z of a listed token, relative to max_
  double tail_log_sum_ = 0, tail_entropy_ = 0, log_sum_t1_ = 0, z_label_ = 0, z_sum_ = 0;
  double cross_entropy_scale_ = 0;
};

}  // namespace
