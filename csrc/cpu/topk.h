// A row against a sparse teacher: fastkd/backends/sparse.py says why this is a dense loss over K + 1 events.
//
//   sweep     the student's row without the teacher's tokens: its exponentials, kept in scratch, and their sum
//   events    the tokens' logits and the tail's log-sum-exp, K + 1 columns, through Row
//   gradient  the tail's exponentials times one number, the tokens' gradients in their places
//
// One read of the logits, K gathers, one write of the gradient. Threads share the rows.

namespace {

// Runs of a row's tokens, block by block.
class Seats {
 public:
  Seats(int64_t vocabulary, int64_t tokens)
      : vocabulary_(vocabulary), starts_((vocabulary + BLOCK - 1) / BLOCK + 2), order_(tokens), taken_((vocabulary + 63) / 64) {}

  // False where an id is out of range or comes twice; then only the others count.
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

  // f(j) for the numbers j of the tokens in block b.
  template <class F>
  void each_in(int64_t b, F f) const {
    for (int64_t i = starts_[b]; i < starts_[b + 1]; ++i) f(order_[i]);
  }

 private:
  int64_t vocabulary_;
  std::vector<int64_t> starts_, order_;
  std::vector<uint64_t> taken_;
};

// What the sweep leaves of a block, relative to its maximum; its tokens are not in it.
struct TailBlock {
  float max;
  double sum, sum_at_1, entropy;  // of e, of e at temperature 1, of e z'
};

// alongside(from, to) is called strip by strip: stores of another row's gradient, which wait for memory, go well with
// arithmetic.
template <bool AT_1, bool ENTROPY, class Alongside>
void tail_block(const float* z, int n, Softmax softmax, float* e_out, float* e_at_1_out, Ahead ahead,
                Alongside alongside, TailBlock& out) {
  const V max = splat(out.max);
  V sum{}, sum_at_1{}, entropy{};
  for (int start = 0; start < n; start += STRIP) {
    V strip{}, strip_at_1{}, strip_entropy{};
    const int end = std::min(start + STRIP, n);
    alongside(start, end);
    for (int i = start; i < end; i += LANES) {
      ahead.ask(i);
      const V gap = load(z + i) - max;
      const V e = softmax.exponential(gap);
      store(e_out + i, e);
      strip += e;
      if (ENTROPY) strip_entropy += e * at_least(gap, splat(softmax.lowest));
      if (AT_1) {
        const V e_at_1 = UNTEMPERED.exponential(gap);
        store(e_at_1_out + i, e_at_1);
        strip_at_1 += e_at_1;
      }
    }
    sum += strip;
    sum_at_1 += strip_at_1;
    entropy += strip_entropy;
  }
  out.sum = sum_lanes(sum);
  out.sum_at_1 = AT_1 ? sum_lanes(sum_at_1) : out.sum;
  out.entropy = sum_lanes(entropy) / softmax.temperature;
}

// What a process leaves of its columns of a row (Shard::statistics); maxima as in ShardStatistics.
struct ShardTail {
  double max, sum, sum_at_1, entropy;  // as TailBlock has them
  double columns, z_total, label;      // how many, the sum of their z, z of the label or -inf
  double valid;                        // 1 where no id comes twice
};
static_assert(sizeof(ShardTail) == TAIL_STATISTICS * sizeof(double));

class TopKRow {
 public:
  TopKRow(const Call& call, Workspace& workspace)
      : call_(call),
        blocks_((call.vocabulary + BLOCK - 1) / BLOCK),
        seats_(call.vocabulary, call.tokens),
        tail_(blocks_),
        local_ids_(call.tokens),
        student_events_(padded(int(call.tokens + 1)) + LANES),
        teacher_events_(student_events_.size()),
        gradient_events_(student_events_.size()),
        events_call_(of_events(call)),
        events_(events_call_, events_workspace_) {
    const int arrays = with_labels() ? 2 : 1;
    keeps_exponentials_ = whole() && call.student_gradient.data && call.vocabulary * arrays * 4 <= SCRATCH_BYTES;
    if (keeps_exponentials_) exponentials_ = workspace.reserve(blocks_ * BLOCK * arrays);
    past_cache_ = call.rows * call.vocabulary * element_size(call.student.dtype) >= STREAM_BYTES;
  }

  int64_t blocks() const { return blocks_; }

  // Whether anything depends on the other tokens; if not, there is no sweep.
  bool sweeps() const { return !renormalizes() || with_labels() || call_.student_entropy; }

  // Whether its gradient may wait for the next row's sweep.
  bool can_wait() const { return keeps_exponentials_ && sweeps(); }

  bool needs_gradient() const { return gradient_; }

  // False where the row is dropped, which has then been dealt with.
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
    valid_ = seats_.sort(local_ids_.data(), tokens()) && known;
    if (with_labels() && (label_ < 0 || label_ >= call_.shard.total)) {
      valid_ = false;
      label_ = call_.shard.first;
    }
    label_ -= call_.shard.first;
    adjust_ = {float(call_.student_tempering.logit_scale), float(call_.student_tempering.softcap), 0};
    const float top = call_.vocabulary ? low_top(student_, call_.student.dtype, call_.vocabulary, adjust_) : 0;
    if (top <= FLOOR && top > -INF) adjust_.shift = top;
    const float* per_row = call_.student_tempering.per_row;
    const double temperature = per_row ? per_row[row] : call_.student_tempering.temperature;
    const float* teacher_per_row = call_.teacher_tempering.per_row;
    valid_ &= temperature > 0 && (!teacher_per_row || teacher_per_row[row] > 0);
    softmax_ = Softmax(temperature > 0 ? temperature : 1);
    separate_at_1_ = with_labels() && softmax_.temperature != UNTEMPERED.temperature;
    z_total_ = 0;
    return true;
  }

  // One of the steps of a row that processes share, after start().
  void take_step(BlockScratch&) {
    if (call_.shard.step == Step::statistics) {
      if (sweeps())
        for (int64_t b = 0; b < blocks_; ++b) sweep(b, nullptr);
      else
        gather();
      leave(tail_of_blocks());
      return;
    }
    const Tail tail = tail_of_processes();
    make_events(tail);
    take_value();
    if (gradient_)
      for (int64_t b = 0; b < blocks_; ++b) write_gradient(b);
  }

  // waiting: a row whose gradient is still to be written; its block b is.
  void sweep(int64_t b, TopKRow* waiting) {
    if (waiting) waiting->make_gradient(b);  // its exponentials are where those of this row go
    const float* z = load_tail(b);
    const int n = columns(b);
    TailBlock& out = tail_[b];
    out.max = maximum_of(z, padded(n));
    const int width = element_size(call_.student.dtype);
    const int64_t next = b + AHEAD - blocks_;  // past the end of this row comes the next one
    const char* place = next < 0 ? student_ + (b + AHEAD) * BLOCK * width : next_ + next * BLOCK * width;
    const Ahead ahead{place, nullptr, next < 0 || (next_ && next < blocks_) ? width : 0, 0};
    auto alongside = [&](int from, int to) {
      if (waiting) waiting->store_gradient(b, from, to);
    };
    auto kernel = [&](auto at_1, auto entropy) {
      tail_block<decltype(at_1)::value, decltype(entropy)::value>(z, n, softmax_, exponentials(b), exponentials_at_1(b), ahead, alongside, out);
    };
    using Yes = std::true_type;
    using No = std::false_type;
    if (separate_at_1_)
      call_.student_entropy ? kernel(Yes{}, Yes{}) : kernel(Yes{}, No{});
    else
      call_.student_entropy ? kernel(No{}, Yes{}) : kernel(No{}, No{});
  }

  // The value of the row, once its blocks are swept; after it, write_gradient() may run on any block.
  void settle() {
    if (!sweeps()) gather();
    make_events(tail_of_blocks());
    take_value();
  }

  void write_gradient(int64_t b) {
    make_gradient(b);
    store_gradient(b, 0, columns(b));
  }

 private:
  // All tokens that the teacher does not name; relative to their maximum.
  struct Tail {
    double max = -INF, sum = 0, sum_at_1 = 0, entropy = 0;

    template <class Part>
    void add(const Part& part, double inverse, bool at_1) {
      const double gap = part.max - max;
      if (gap == -INF) return;
      const double factor = std::exp(gap * inverse);
      sum += factor * part.sum;
      entropy += factor * (part.entropy + gap * inverse * part.sum);
      sum_at_1 += at_1 ? std::exp(gap / UNTEMPERED.temperature) * part.sum_at_1 : factor * part.sum;
    }
  };

  bool whole() const { return call_.shard.step == Step::all; }
  bool label_is_here() const { return with_labels() && label_ >= 0 && label_ < call_.vocabulary; }
  bool with_labels() const { return call_.labels && call_.alpha < 1; }
  bool renormalizes() const { return call_.tail == fastkd::Tail::renormalize; }
  bool truncates() const { return call_.tail == fastkd::Tail::truncate; }
  int columns(int64_t b) const { return int(std::min<int64_t>(BLOCK, call_.vocabulary - b * BLOCK)); }
  int64_t tokens() const { return call_.tokens; }

  // The dense call over events: every row of it is the one in this object's buffers.
  Call of_events(const Call& call) {
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
    // Dropped rows do not come here, and the cross-entropy is of the whole row.
    events.labels = nullptr;
    events.shard = {};
    events.shard.total = events.vocabulary;
    return events;
  }

  float* exponentials(int64_t b) { return keeps_exponentials_ ? exponentials_ + b * BLOCK : scratch_.s_exp; }
  float* exponentials_at_1(int64_t b) {
    return keeps_exponentials_ ? exponentials_ + (blocks_ + b) * BLOCK : scratch_.s_exp_at_1;
  }

  const float* load_student(int64_t b) {
    return load_block(student_, call_.student.dtype, b * BLOCK, columns(b), adjust_, scratch_.s);
  }

  // The block without its tokens, whose z go to the events.
  const float* load_tail(int64_t b) {
    const float* z = load_student(b);
    const int n = columns(b);
    if (with_labels() && call_.label_smoothing > 0)
      for (int i = 0; i < n; ++i) z_total_ += z[i];
    if (label_is_here() && label_ / BLOCK == b) z_label_ = z[label_ % BLOCK];
    bool copied = z == scratch_.s;
    seats_.each_in(b, [&](int64_t j) {
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

  // What all processes get of this one's columns.
  void leave(const Tail& tail) {
    const auto part = reinterpret_cast<ShardTail*>(call_.shard.statistics) + row_;
    const double shift = adjust_.shift;
    alignas(64) float label[LANES] = {-INF};
    if (label_is_here()) label[0] = load_block(student_, call_.student.dtype, label_, 1, adjust_, label)[0];
    *part = {tail.max + shift, tail.sum,         tail.sum_at_1, tail.entropy, double(call_.vocabulary),
             z_total_ + shift * call_.vocabulary, label[0] + shift, double(valid_)};
    for (int64_t j = 0; j < tokens(); ++j)
      call_.shard.tokens[row_ * tokens() + j] = local_ids_[j] < 0 ? 0 : float(student_events_[j] + shift);
  }

  // What they left, with z as this one has them.
  Tail tail_of_processes() {
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
      if (part.columns) z_total_ += part.z_total - shift * part.columns;
      valid_ &= part.valid != 0;
    });
    each([&](const ShardTail& part) { tail.add(part, 1 / softmax_.temperature, separate_at_1_); });
    tail.max -= shift;
    for (int64_t j = 0; j < tokens(); ++j)
      student_events_[j] = float(call_.shard.tokens[row_ * tokens() + j] - shift);
    return tail;
  }

  Tail tail_of_blocks() const {
    Tail tail;
    if (!sweeps()) return tail;
    for (const TailBlock& block : tail_)
      if (block.max > FLOOR || block.sum != block.sum) tail.max = std::max(tail.max, double(block.max));
    if (tail.max == -INF) return tail;
    for (const TailBlock& block : tail_) tail.add(block, 1 / softmax_.temperature, separate_at_1_);
    return tail;
  }

  // The tokens alone.
  void gather() {
    alignas(64) float z[LANES];
    for (int64_t j = 0; j < tokens(); ++j)
      if (local_ids_[j] >= 0)
        student_events_[j] = load_block(student_, call_.student.dtype, local_ids_[j], 1, adjust_, z)[0];
  }

  void make_events(const Tail& tail) {
    const double inverse = 1 / softmax_.temperature;
    double origin = -INF;
    for (int64_t j = 0; j < tokens(); ++j) {
      if (ids_[j] < 0 || ids_[j] >= call_.shard.total) student_events_[j] = -INF;
      if (!(student_events_[j] <= origin)) origin = student_events_[j];
    }
    const double top = origin;
    const bool others = tail.max > -INF;
    double sum_at_1 = 0;
    if (others) {
      origin = std::max(origin, tail.max);
      sum_at_1 = tail.sum_at_1 * std::exp((tail.max - origin) / UNTEMPERED.temperature);
    }
    origin_ = origin;
    tail_log_sum_ = others ? (tail.max - origin) * inverse + std::log(tail.sum) : -INF;
    tail_entropy_ = others ? std::log(tail.sum) - tail.entropy / tail.sum : 0;

    // Logits may share an offset that costs digits: events are relative to the largest of the tokens.
    top_ = top > -INF ? top - origin : 0;
    for (int64_t j = 0; j < tokens(); ++j) {
      if (top > -INF) student_events_[j] = float(student_events_[j] - top);
      if (with_labels()) sum_at_1 += std::exp((student_events_[j] + top_) / UNTEMPERED.temperature);
    }
    log_sum_at_1_ = std::log(sum_at_1);
    if (!valid_) student_events_[0] = std::nanf("");

    const float* logprobs = load_logprobs();
    for (int64_t j = 0; j < tokens(); ++j) teacher_events_[j] = ids_[j] < 0 ? -INF : logprobs[j];
    if (renormalizes()) return;
    student_events_[tokens()] = float(tail_log_sum_ * softmax_.temperature - top_);
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

  // A teacher that names no token says nothing, under any policy.
  bool is_silent() const {
    return std::all_of(ids_, ids_ + tokens(), [](int64_t id) { return id == -1; });
  }

  // The value of the row and the gradient of its events.
  void take_value() {
    const double weight = call_.weight ? call_.weight[row_] : 1;
    if (is_silent())
      take_nothing(0 * weight);
    else if (truncates())
      take_truncated();
    else
      take_dense();
    if (renormalizes() && gradient_) gradient_events_[tokens()] = 0;
    double cross_entropy = 0;
    if (with_labels()) {
      const double smoothing = call_.label_smoothing;
      const double mean = smoothing > 0 ? z_total_ / call_.shard.total - origin_ : 0;
      const double target = (1 - smoothing) * (z_label_ - origin_) + smoothing * mean;
      cross_entropy = log_sum_at_1_ - target / UNTEMPERED.temperature;
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

  // NaN where the weight is.
  void take_nothing(double nothing) {
    write(call_.distillation, 0);
    write(call_.loss, nothing);
    std::fill(gradient_events_.begin(), gradient_events_.end(), float(nothing));
  }

  void take_dense() {
    auto each = [&](auto phase) {
      for (int64_t b = 0; b < events_.blocks(); ++b) phase(b, scratch_);
    };
    auto once = [&](auto step, bool* flags) { step(flags); };
    auto statistics = [&](int64_t b, BlockScratch& scratch) { events_.statistics(b, scratch); };
    value_of(events_, row_, each, once, statistics);
    if (gradient_) each([&](int64_t b, BlockScratch& scratch) { events_.gradient(b, scratch); });
  }

  // phi and g of the tokens alone; q is of the whole row, and p as it is given.
  void take_truncated() {
    const Kernels& kernels = kernels_of(call_);
    const double inverse = 1 / softmax_.temperature;
    double highest = student_events_[tokens()], sum = 0;  // the tail may be far above the tokens
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

  // Of the whole row: that among the tokens and the tail, and within the tail by its share.
  double entropy() const {
    if (!call_.student_entropy) return 0;
    const double inverse = 1 / softmax_.temperature;
    double sum = std::exp(tail_log_sum_), moment = others_moment();
    for (int64_t j = 0; j < tokens(); ++j) {
      const double z = (student_events_[j] + top_) * inverse, e = std::exp(z);
      sum += e;
      if (e > 0) moment += e * z;
    }
    return std::log(sum) - moment / sum;
  }
  // Sum of e z' over the tail.
  double others_moment() const {
    return tail_log_sum_ == -INF ? 0 : std::exp(tail_log_sum_) * (tail_log_sum_ - tail_entropy_);
  }

  // The gradient of block b, in scratch.
  void make_gradient(int64_t b) {
    const int n = columns(b);
    float* out = scratch_.gradient;
    const float* e = nullptr;
    if (sweeps()) {
      if (!keeps_exponentials_) again(b);
      e = exponentials(b);
    }
    const double gap = sweeps() ? tail_[b].max - origin_ : 0;
    double share = std::exp(gap / softmax_.temperature - tail_log_sum_);
    if (tail_log_sum_ == -INF) share = 0;
    const V factor = splat(float(gradient_events_[tokens()] * share));
    if (!e || renormalizes())
      std::fill_n(out, padded(n), 0.0f);
    else
      for (int i = 0; i < n; i += LANES) store(out + i, load(e + i) * factor);
    if (with_labels()) add_cross_entropy(b, separate_at_1_ ? exponentials_at_1(b) : e, gap, out);
    seats_.each_in(b, [&](int64_t j) {
      float& place = out[local_ids_[j] % BLOCK];
      // The tokens have no exponential in the sweep's, so that of the cross-entropy comes here.
      const double q = with_labels() ? std::exp((student_events_[j] + top_) / UNTEMPERED.temperature - log_sum_at_1_) : 0;
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
    const V factor = splat(float(cross_entropy_scale_ * std::exp(gap / UNTEMPERED.temperature - log_sum_at_1_)));
    const V uniform = splat(float(cross_entropy_scale_ * call_.label_smoothing / call_.shard.total));
    for (int i = 0; i < n; i += LANES) store(out + i, load(out + i) + (load(e + i) * factor - uniform));
    const int64_t column = label_ - b * BLOCK;
    if (column >= 0 && column < n) out[column] -= float(cross_entropy_scale_ * (1 - call_.label_smoothing));
  }

  // The exponentials of the sweep once more, where they were not kept.
  void again(int64_t b) {
    const float* z = load_student(b);
    const int n = columns(b);
    if (!whole()) {  // nor was the maximum
      if (z != scratch_.s) std::memcpy(scratch_.s, z, padded(n) * sizeof(float));
      z = scratch_.s;
      seats_.each_in(b, [&](int64_t j) { scratch_.s[local_ids_[j] % BLOCK] = -INF; });
      tail_[b].max = maximum_of(z, padded(n));
    }
    const V max = splat(tail_[b].max);
    for (int i = 0; i < n; i += LANES) store(scratch_.s_exp + i, softmax_.exponential(load(z + i) - max));
    if (separate_at_1_)
      for (int i = 0; i < n; i += LANES) store(scratch_.s_exp_at_1 + i, UNTEMPERED.exponential(load(z + i) - max));
    seats_.each_in(b, [&](int64_t j) { scratch_.s_exp[local_ids_[j] % BLOCK] = scratch_.s_exp_at_1[local_ids_[j] % BLOCK] = 0; });
  }

  void write(float* to, double value) const {
    if (to) to[row_] = float(value);
  }

  const Call& call_;
  const int64_t blocks_;
  Seats seats_;
  std::vector<TailBlock> tail_;
  std::vector<int64_t> local_ids_;  // the columns here of the row's tokens, -1 for others
  std::vector<float> student_events_, teacher_events_, gradient_events_;
  const Call events_call_;
  Workspace events_workspace_;
  Row events_;
  BlockScratch scratch_;
  float* exponentials_ = nullptr;  // [blocks, BLOCK], and once more at temperature 1
  bool keeps_exponentials_ = false, past_cache_ = false;

  // The row at hand.
  int64_t row_ = 0, label_ = 0;
  char *student_ = nullptr, *next_ = nullptr, *gradient_ = nullptr;
  const int64_t* ids_ = nullptr;
  bool valid_ = true, separate_at_1_ = false;
  Adjustment adjust_;
  Softmax softmax_{1};
  double origin_ = 0, top_ = 0;  // the largest z of the row, and by how much the tokens' is below it
  double tail_log_sum_ = 0, tail_entropy_ = 0, log_sum_at_1_ = 0, z_label_ = 0, z_total_ = 0;
  double cross_entropy_scale_ = 0;
};

}  // namespace
