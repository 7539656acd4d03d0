// A row of student and teacher logits: its three phases, each a loop over blocks.

namespace {

struct Workspace {
  std::unique_ptr<float[]> memory;
  int64_t capacity = 0;
  float* reserve(int64_t floats) {
    if (floats > capacity) {
      memory.reset(new float[floats]);
      capacity = floats;
    }
    return memory.get();
  }
};

// What a thread needs for one block: converted logits, exponentials where they are not kept, the gradient.
struct BlockScratch {
  alignas(64) float s[BLOCK], t[BLOCK], s_exp[BLOCK], t_exp[BLOCK], s_exp_at_1[BLOCK], gradient[BLOCK];
};

class Row {
 public:
  Row(const Call& call, Workspace& workspace)
      : call_(call),
        kernels_(kernels_of(call)),
        s_adjust_{float(call.student_tempering.logit_scale), float(call.student_tempering.softcap), 0},
        t_adjust_{float(call.teacher_tempering.logit_scale), float(call.teacher_tempering.softcap), 0},
        blocks_((call.vocabulary + BLOCK - 1) / BLOCK),
        statistics_(blocks_),
        sums_(blocks_) {
    const int64_t columns = blocks_ * BLOCK;
    const int arrays = needs_cross_entropy() ? 3 : 2;
    const bool needed_later = needs_sums() || call.student_gradient.data || call.teacher_gradient.data;
    keeps_exponentials_ = whole() && needed_later && call.vocabulary * arrays * 4 <= SCRATCH_BYTES;
    if (keeps_exponentials_) {
      s_exp_ = workspace.reserve(columns * arrays);
      t_exp_ = s_exp_ + columns;
      s_exp_at_1_ = arrays == 3 ? t_exp_ + columns : nullptr;
    }
    past_cache_ = call.rows * call.vocabulary * element_size(call.student.dtype) >= STREAM_BYTES;
  }

  int64_t blocks() const { return blocks_; }

  // False where the row is dropped, which has then been dealt with.
  bool start(int64_t row) {
    row_ = row;
    auto pointer = [&](const Rows& rows, int64_t index) {
      return rows.data ? rows.data + row_offset(rows, call_.sizes, index) * element_size(rows.dtype) : nullptr;
    };
    student_ = pointer(call_.student, row);
    teacher_ = pointer(call_.teacher, row);
    student_gradient_ = pointer(call_.student_gradient, row);
    teacher_gradient_ = pointer(call_.teacher_gradient, row);
    const bool last = row + 1 >= call_.rows;
    next_student_ = last ? nullptr : pointer(call_.student, row + 1);
    next_teacher_ = last ? nullptr : pointer(call_.teacher, row + 1);
    label_ = call_.labels ? call_.labels[row] : -1;
    weight_ = call_.weight ? call_.weight[row] : 1;
    const bool writes = whole() || call_.shard.step == Step::results;
    if (writes) clear_padding();
    if ((call_.labels && label_ == call_.ignore_index) || weight_ == 0) {
      if (writes) drop();
      return false;
    }
    with_labels_ = needs_cross_entropy();
    if ((with_labels_ || is_apart()) && (label_ < 0 || label_ >= call_.shard.total)) {
      weight_ = std::nan("");
      label_ = call_.shard.first;
    }
    label_ -= call_.shard.first;
    apart_ = is_apart() && label_is_here() ? label_ : -1;
    set_shift(student_, call_.student.dtype, s_adjust_);
    set_shift(teacher_, call_.teacher.dtype, t_adjust_);
    s_temperature_ = temperature(call_.student_tempering);
    t_temperature_ = temperature(call_.teacher_tempering);
    student_softmax_ = Softmax(s_temperature_);
    teacher_softmax_ = Softmax(t_temperature_);
    separate_at_1_ = with_labels_ && s_temperature_ != 1;
    moments_ = !call_.closed_form ? 0
                                  : (call_.forward != 0) * FORWARD + (call_.reverse != 0) * REVERSE +
                                        (call_.cross != 0) * CROSS;
    if (call_.closed_form && !moments_) moments_ = FORWARD;  // of weight 0, but it tells where log 0 is
    if (call_.student_entropy || (with_labels_ && call_.label_smoothing > 0)) moments_ |= SINGLE;
    log_0_ = false;
    sure_[0] = sure_[1] = -1;
    s_lost_ = t_lost_ = -INF;
    return true;
  }

  // One of the steps of a row that processes share, after start().
  void take_step(BlockScratch& scratch) {
    switch (call_.shard.step) {
      case Step::statistics: return statistics_step(scratch);
      case Step::sums: return sums_step(scratch);
      default: return results_step(scratch);
    }
  }

  // alongside: the same block of another row.
  void statistics(int64_t b, BlockScratch& scratch, const PendingGradient& alongside = {}) {
    const int n = columns(b);
    if (!needs_statistics()) return alongside.write(0, n);
    const float* s = load_student(b, scratch);
    const float* t = load_teacher(b, scratch);
    BlockStatistics& out = statistics_[b];
    float s_threshold = 0, t_threshold = 0;
    if (log_0_ && !whole()) {
      statistics_without_lost(b, s, t, scratch);
      return add_what_apart_needs(b, load_student(b, scratch), load_teacher(b, scratch), out);
    }
    if (log_0_) {  // the weights of the first attempt still hold
      s_threshold = NEGLIGIBLE / s_weight(b);
      t_threshold = NEGLIGIBLE / t_weight(b);
    } else {
      out.s_max = maximum_of(s, padded(n));
      out.t_max = maximum_of(t, padded(n));
    }
    out.overflows = gradients_need_logs() && (overflow(s, n, out.s_max, student_softmax_.inverse) ||
                                              overflow(t, n, out.t_max, teacher_softmax_.inverse));
    const bool close = are_close(out, student_softmax_, teacher_softmax_);
    statistics_kernel(moments_, separate_at_1_, log_0_, close)(
        s, t, n, student_softmax_, teacher_softmax_, UNTEMPERED, s_threshold, t_threshold, s_exp(b, scratch),
        t_exp(b, scratch), s_exp_at_1(b, scratch), ahead(b + AHEAD), alongside, out);
    add_what_apart_needs(b, s, t, out);
  }

  // False where the row has to be done again with the policy for log 0.
  bool merge_statistics() {
    Merged row;
    if (!needs_statistics()) {
      row_statistics_ = {};
      if (call_.shard.step == Step::statistics) leave(row);
      return true;
    }
    for (const BlockStatistics& block : statistics_) row.raise(block);
    bool overflows = false;
    for (int64_t b = 0; b < blocks_; ++b) {
      add_to(row, statistics_[b], columns(b) - apart_in(b));
      overflows |= statistics_[b].overflows;
    }
    const bool finite = log_0_ || (!overflows && std::isfinite(row.forward + row.reverse + row.cross + row.entropy));
    conclude(row);
    if (whole() && finite) refine(row);
    if (call_.shard.step == Step::statistics) leave(row);
    return finite;
  }

  bool needs_sums() const { return !call_.closed_form; }

  void sums(int64_t b, BlockScratch& scratch) {
    const bool logs = kernels_.uses_logs || log_0_ || !call_.normalized;
    sums_[b] = kernels_.sums[log_0_](view(b, scratch, logs), columns(b), call_.params, g(b, scratch));
  }

  // False where the row has to be done again with the policy for log 0.
  bool merge_sums() {
    phi_ = g_ = 0;
    for (const BlockSums& block : sums_) {
      phi_ += block.phi;
      g_ += block.g;
    }
    const bool finite = log_0_ || std::isfinite(phi_ + g_);
    if (whole() && finite) add_sure_columns();
    return finite;
  }

  // Whether entries of probability 0 are treated one by one. Off at first: see the top of this file.
  void set_policy_for_log_0(bool on) { log_0_ = on; }

  // The value of the row; after it, gradient() may run on any block.
  void finish() {
    if (call_.closed_form) {
      close();
      close_sure_columns();
    }
    h_ = call_.degree * phi_ - g_;
    if (is_apart()) set_apart();
    write_value();
  }

  bool needs_gradient() const { return student_gradient_ || teacher_gradient_; }

  // Whether the gradients of its blocks may wait for the next row's statistics.
  bool can_wait() const { return keeps_exponentials_; }

  void gradient(int64_t b, BlockScratch& scratch) { begin_gradient(b, scratch).write(0, columns(b)); }

  // Picks the kernel of a block's gradients. Writes what has to be written at once, and leaves what need not.
  PendingGradient begin_gradient(int64_t b, BlockScratch& scratch) {
    const int n = columns(b);
    const bool logs = (kernels_.gradient_uses_logs && !keeps_g()) || teacher_gradient_ || log_0_ || !call_.normalized;
    PendingGradient pending;
    pending.view = view(b, scratch, logs || s_adjust_.softcap != 0);
    pending.params = call_.params;
    if (teacher_gradient_) {
      pending.kernel = kernels_.teacher[log_0_];
      pending.degree = float(call_.degree);
      pending.sum = float(h_);
      pending.coefficient = float(kd_scale_ / t_temperature_);
      pending.out = scratch.gradient;
      if (call_.alpha == 0)
        std::fill_n(scratch.gradient, padded(n), 0.0f);
      else
        pending.write(0, n);
      put_sure(1, b, kd_scale_ / t_temperature_, scratch.gradient);
      if (!t_adjust_.identity()) chain(t_adjust_, pending.view.t, n, scratch.gradient);
      if (apart_in(b)) scratch.gradient[apart_ - b * BLOCK] = teacher_gradient_apart();
      store_block(teacher_gradient_, call_.teacher.dtype, b * BLOCK, n, scratch.gradient, past_cache_);
    }
    if (!student_gradient_) return {};
    const Dtype dtype = call_.student.dtype;
    char* const place = student_gradient_ + b * BLOCK * element_size(dtype);
    // Stores past the cache need whole vectors at addresses that are multiples of their size.
    const bool whole = reinterpret_cast<uintptr_t>(place) % sizeof(V) == 0 && n % LANES == 0;
    const bool waits = !log_0_ && !with_labels_ && call_.alpha != 0 && s_adjust_.identity() && !apart_in(b) && !sure_in(0, b);
    const Form form = waits && past_cache_ && dtype == Dtype::f32 && whole ? STREAM : SCRATCH;
    pending.kernel = keeps_g() ? PROJECTION[form] : log_0_ ? kernels_.student_log_0 : kernels_.student[form];
    pending.sum = float(g_);
    pending.coefficient = float(kd_scale_ / s_temperature_);
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
    put_sure(0, b, kd_scale_ / s_temperature_, scratch.gradient);
    if (with_labels_) add_cross_entropy(b, scratch, pending.view);
    if (!s_adjust_.identity()) chain(s_adjust_, pending.view.s, n, scratch.gradient);
    if (apart_in(b)) scratch.gradient[apart_ - b * BLOCK] = student_gradient_apart();
    store_block(student_gradient_, call_.student.dtype, b * BLOCK, n, scratch.gradient, past_cache_);
    return {};
  }

 private:
  bool whole() const { return call_.shard.step == Step::all; }

  void statistics_step(BlockScratch& scratch) {
    for (const bool policy : {false, true}) {
      log_0_ = policy;
      for (int64_t b = 0; b < blocks_; ++b) statistics(b, scratch);
      if (merge_statistics()) return;
    }
  }

  void sums_step(BlockScratch& scratch) {
    take_statistics();
    const bool known = log_0_;
    for (const bool policy : {known, true}) {
      log_0_ = policy;
      for (int64_t b = 0; b < blocks_; ++b) sums(b, scratch);
      if (merge_sums()) break;
    }
    reinterpret_cast<ShardSums*>(call_.shard.sums)[row_] = {phi_, g_, double(log_0_)};
  }

  void results_step(BlockScratch& scratch) {
    take_statistics();
    if (needs_sums()) {
      phi_ = g_ = 0;
      const auto* all = reinterpret_cast<const ShardSums*>(call_.shard.all_sums);
      for (int64_t p = 0; p < call_.shard.processes; ++p) {
        const ShardSums& part = all[p * call_.rows + row_];
        phi_ += part.phi;
        g_ += part.g;
        log_0_ |= part.policy != 0;
      }
    }
    finish();
    if (needs_gradient())
      for (int64_t b = 0; b < blocks_; ++b) gradient(b, scratch);
  }

  // The statistics of this process's columns, which it leaves to all.
  void leave(const Merged& row) const {
    const auto maximum = [](double max, double sum, float shift) { return sum == 0 ? -INF : max + shift; };
    const bool here = (with_labels_ || is_apart()) && label_is_here();
    const ShardStatistics part = {
        maximum(row.s_max, row.s_sum, s_adjust_.shift),
        maximum(row.t_max, row.t_sum, t_adjust_.shift),
        row.s_sum,
        row.t_sum,
        row.forward,
        row.reverse,
        row.cross,
        row.entropy,
        row.s_sum_at_1,
        row.s_total,
        double(call_.vocabulary - (apart_ >= 0)),
        here ? double(label_logit()) + s_adjust_.shift : -INF,
        t_lost_ + t_adjust_.shift,
        s_lost_ + s_adjust_.shift,
        double(log_0_),
        row.t_sum_at_1,
        here && is_apart() ? double(teacher_label_logit()) + t_adjust_.shift : -INF};
    std::memcpy(call_.shard.statistics + row_ * fields(), &part, fields() * sizeof(double));
  }

  int64_t fields() const { return is_apart() ? APART_STATISTICS : STATISTICS; }

  // Those of all processes, with maxima as this one has its logits.
  void take_statistics() {
    const auto each = [&](auto f) {
      for (int64_t p = 0; p < call_.shard.processes; ++p) {
        ShardStatistics part{};
        const double* from = call_.shard.all_statistics + (p * call_.rows + row_) * fields();
        std::memcpy(&part, from, fields() * sizeof(double));
        f(part);
      }
    };
    Merged row;
    double label = -INF, t_label = -INF, t_lost = -INF, s_lost = -INF;
    each([&](const ShardStatistics& part) {
      row.raise(part);
      label = std::max(label, part.label);
      t_label = std::max(t_label, part.t_label);
      t_lost = std::max(t_lost, part.t_lost);
      s_lost = std::max(s_lost, part.s_lost);
      log_0_ |= part.policy != 0;
    });
    each([&](const ShardStatistics& part) { add_to(row, part, part.columns); });
    conclude(row);
    RowStatistics& all = row_statistics_;
    const auto counts = [](double lost, double max, double temperature, double log_sum) {
      return std::exp((lost - max) / temperature - log_sum) >= NEGLIGIBLE;
    };
    if (counts(t_lost, row.t_max, t_temperature_, all.t_log_sum)) all.forward = INF, all.cross = -INF;
    if (counts(s_lost, row.s_max, s_temperature_, all.s_log_sum)) all.reverse = INF;
    log_0_ |= !std::isfinite(all.forward + all.reverse + all.cross + all.entropy);
    if (needs_statistics() && call_.normalized && (row.s_sum == 0 || row.t_sum == 0)) weight_ = std::nan("");
    all.s_max -= s_adjust_.shift;
    all.t_max -= t_adjust_.shift;
    label_z_ = label - s_adjust_.shift;
    t_label_z_ = t_label - t_adjust_.shift;
  }

  // A process does not know which probabilities are negligible. So the moments leave out what is gone on one side, and
  // the largest logit that the other side has there tells later whether they are infinite.
  void statistics_without_lost(int64_t b, const float* s, const float* t, BlockScratch& scratch) {
    const int n = columns(b);
    BlockStatistics& out = statistics_[b];
    const float nothing = std::numeric_limits<float>::min();
    const auto kernel = statistics_kernel(ALL | SINGLE, separate_at_1_, true, false);
    const auto run = [&](const float* s, const float* t, BlockStatistics& out) {
      kernel(s, t, n, student_softmax_, teacher_softmax_, UNTEMPERED, nothing, nothing, scratch.s_exp, scratch.t_exp,
             scratch.s_exp_at_1, {}, {}, out);
    };
    run(s, t, out);
    BlockStatistics left = out;
    std::memmove(scratch.s, s, padded(n) * sizeof(float));
    std::memmove(scratch.t, t, padded(n) * sizeof(float));
    for (int i = 0; i < n; ++i) {
      const bool s_gone = gone(s[i], out.s_max, student_softmax_), t_gone = gone(t[i], out.t_max, teacher_softmax_);
      if (s_gone && !t_gone) t_lost_ = std::max(t_lost_, double(t[i]));
      if (t_gone && !s_gone) s_lost_ = std::max(s_lost_, double(s[i]));
      if (s_gone || t_gone) scratch.s[i] = scratch.t[i] = -INF;
    }
    run(scratch.s, scratch.t, left);
    out.forward = left.forward;
    out.reverse = left.reverse;
    out.cross = left.cross;
  }

  static bool gone(float z, float max, const Softmax& softmax) { return (z - max) * softmax.inverse == -INF; }

  template <class Part>
  void add_to(Merged& row, const Part& part, double columns) const {
    row.add(part, columns, 1 / student_softmax_.temperature, 1 / teacher_softmax_.temperature, separate_at_1_);
  }

  void conclude(const Merged& row) {
    const double s_log_sum = std::log(row.s_sum), t_log_sum = std::log(row.t_sum);
    row_statistics_ = {row.s_max,
                       row.t_max,
                       s_log_sum,
                       t_log_sum,
                       separate_at_1_ ? std::log(row.s_sum_at_1) : s_log_sum,
                       std::log(row.t_sum_at_1),
                       row.forward / row.t_sum,
                       row.reverse / row.s_sum,
                       row.cross / row.t_sum,
                       row.entropy / row.s_sum,
                       row.s_total / call_.shard.total};
    // NaN or an infinity is among the logits; a definition with a comparison in it may lose that.
    const bool lost = std::isnan(row.s_sum) || (call_.alpha != 0 && std::isnan(row.t_sum));
    if (call_.normalized && lost) weight_ = std::nan("");
  }

  // The sums of phi and g from the moments.
  void close() {
    const RowStatistics& row = row_statistics_;
    const double forward = row.forward - row.t_log_sum + row.s_log_sum;
    const double reverse = row.reverse - row.s_log_sum + row.t_log_sum;
    const double cross = row.s_log_sum - row.cross;
    // A moment that was not collected is 0 here, and its term is not finite only if its weight is 0.
    phi_ = g_ = 0;
    if (call_.forward != 0) phi_ += call_.forward * forward, g_ -= call_.forward;
    if (call_.reverse != 0) phi_ += call_.reverse * reverse, g_ += call_.reverse * (reverse + 1);
    if (call_.cross != 0) phi_ += call_.cross * cross, g_ -= call_.cross;
  }

  void write_value() {
    const RowStatistics& row = row_statistics_;
    const double square = call_.scale_by_temperature ? s_temperature_ * s_temperature_ : 1;
    double distillation = phi_ * square, cross_entropy = 0, entropy = row.s_log_sum - row.entropy;
    if (is_apart()) {
      const double smoothing = call_.alpha < 1 ? call_.label_smoothing : 0;
      const bool there = label_z_ > -INF;  // or its cross-entropy is infinite, however little of it is smoothed
      const double above_mean = smoothing > 0 && there ? (label_z_ - row.s_max - row.s_mean) / UNTEMPERED.temperature : 0;
      if (label_share_ != 0) distillation += label_share_ * softplus(-apart_at_1_);
      if (call_.alpha < 1) cross_entropy = softplus(-apart_at_1_) + smoothing * above_mean;
      entropy = label_entropy_ + sigmoid(-s_apart_) * entropy;
    } else if (with_labels_) {
      const double smoothing = call_.label_smoothing;
      if (whole()) label_z_ = label_logit();
      const double target = (1 - smoothing) * (label_z_ - row.s_max) + (smoothing > 0 ? smoothing * row.s_mean : 0);
      cross_entropy = row.s_log_sum_at_1 - target / UNTEMPERED.temperature;
    }
    double loss = call_.alpha == 0 ? 0 : call_.alpha * distillation;
    if (call_.alpha < 1 && with_labels_) loss += (1 - call_.alpha) * cross_entropy;
    write(call_.loss, loss * weight_);
    write(call_.distillation, distillation);
    write(call_.cross_entropy, cross_entropy);
    write(call_.student_entropy, entropy);
    const double scale = weight_ * call_.scale * (call_.scale_on_device ? *call_.scale_on_device : 1);
    kd_scale_ = call_.alpha * square * scale;
    ce_scale_ = (1 - call_.alpha) * scale;
    q_scale_ = ce_scale_ + (call_.alpha == 0 ? 0 : call_.alpha * label_share_ * scale);
  }

  // ---- where a side is sure of a column: its probability is more than 1/2
  //
  // Of such a column all sums would be rounded to its size, and its gradient be the difference of two of them. So sums
  // leave it out, 1 - q is what the others are, and x_a - q_a sum x is x_a (1 - q_a) - q_a times the sum of the others'.

  bool sure_in(int side, int64_t b) const { return sure_[side] >= 0 && sure_[side] / BLOCK == b; }

  // The column of the row's maximum.
  template <class Maximum, class Load>
  int64_t column_of_maximum(Maximum of_block, double maximum, Load load_block) {
    for (int64_t b = 0; b < blocks_; ++b) {
      if (of_block(statistics_[b]) != maximum) continue;
      const float* z = load_block(b);
      for (int i = 0; i < columns(b); ++i)
        if (z[i] == maximum) return b * BLOCK + i;
    }
    return -1;
  }

  // The statistics again without the columns that a side is sure of, which are then added to the rest.
  void refine(const Merged& row) {
    if (is_apart() || !call_.normalized || !(row.s_sum < 2 || row.t_sum < 2)) return;
    if (!sure_scratch_) sure_scratch_.reset(new BlockScratch);
    BlockScratch& scratch = *sure_scratch_;
    if (row.s_sum < 2)
      sure_[0] = column_of_maximum([](const BlockStatistics& b) { return b.s_max; }, row.s_max,
                                   [&](int64_t b) { return load_student(b, scratch); });
    if (row.t_sum < 2)
      sure_[1] = column_of_maximum([](const BlockStatistics& b) { return b.t_max; }, row.t_max,
                                   [&](int64_t b) { return load_teacher(b, scratch); });
    Merged rest;
    rest.s_max = row.s_max;
    rest.t_max = row.t_max;
    for (int64_t b = 0; b < blocks_; ++b) {
      BlockStatistics part = statistics_[b];
      if (sure_in(0, b) || sure_in(1, b)) part = without_sure(b, scratch);
      add_to(rest, part, columns(b));
    }
    Sure& at = sure_values_;
    at.s_rest = rest.s_sum, at.t_rest = rest.t_sum;
    at.forward = rest.forward, at.reverse = rest.reverse, at.cross = rest.cross;
    if (sure_[0] >= 0) at.t_gap = gap_at(sure_[0], false);
    if (sure_[1] >= 0) at.s_gap = gap_at(sure_[1], true);
    RowStatistics& out = row_statistics_;
    if (sure_[0] >= 0) {
      rest.s_sum += 1;
      rest.reverse -= at.t_gap;
      out.s_log_sum = std::log1p(at.s_rest);
      if (!separate_at_1_) out.s_log_sum_at_1 = out.s_log_sum;
    }
    if (sure_[1] >= 0) {
      rest.t_sum += 1;
      rest.forward -= at.s_gap;
      rest.cross += at.s_gap;
      out.t_log_sum = std::log1p(at.t_rest);
    }
    at.s_sum = rest.s_sum, at.t_sum = rest.t_sum;
    out.forward = rest.forward / rest.t_sum;
    out.reverse = rest.reverse / rest.s_sum;
    out.cross = rest.cross / rest.t_sum;
    out.entropy = rest.entropy / rest.s_sum;
  }

  // (z - maximum) / T of a column, of the student's side or of the teacher's.
  double gap_at(int64_t column, bool student) const {
    const double z = student ? logit_at(student_, call_.student.dtype, s_adjust_, column)
                             : logit_at(teacher_, call_.teacher.dtype, t_adjust_, column);
    return student ? (z - row_statistics_.s_max) / student_softmax_.temperature
                   : (z - row_statistics_.t_max) / teacher_softmax_.temperature;
  }

  BlockStatistics without_sure(int64_t b, BlockScratch& scratch) {
    BlockStatistics out = statistics_[b];
    const float *s = load_student(b, scratch), *t = load_teacher(b, scratch);
    if (!keeps_exponentials_) exponentials(b, s, t, scratch);
    float* const exponential[] = {s_exp(b, scratch), t_exp(b, scratch)};
    float kept[2] = {};
    for (int side = 0; side < 2; ++side)
      if (sure_in(side, b)) std::swap(kept[side], exponential[side][sure_[side] - b * BLOCK]);
    const float s_threshold = log_0_ ? NEGLIGIBLE / s_weight(b) : 0, t_threshold = log_0_ ? NEGLIGIBLE / t_weight(b) : 0;
    sums_of_exponentials(s, t, columns(b), student_softmax_, teacher_softmax_, s_threshold, t_threshold, exponential[0],
                         exponential[1], out);
    for (int side = 0; side < 2; ++side)
      if (sure_in(side, b)) exponential[side][sure_[side] - b * BLOCK] = kept[side];
    return out;
  }

  // What the sure columns add to the sums of the others, and their own gradients.
  void add_sure_columns() {
    if (sure_[0] < 0 && sure_[1] < 0) return;
    const RowStatistics& row = row_statistics_;
    Columns at{};
    for (int k = 0; k < 2; ++k) {
      const int64_t column = sure_[k] < 0 ? sure_[1 - k] : sure_[k];
      const double s_gap = gap_at(column, true), t_gap = gap_at(column, false);
      const double log_q = s_gap - row.s_log_sum, log_p = t_gap - row.t_log_sum;
      at.log_p[k] = float(log_p), at.log_q[k] = float(log_q);
      at.p[k] = float(std::exp(log_p)), at.q[k] = float(std::exp(log_q));
      at.log_ratio[k] = float((t_gap - s_gap) - (row.t_log_sum - row.s_log_sum));
    }
    kernels_.columns(at, call_.params, float(call_.degree));
    double g = g_, h = call_.degree * phi_ - g_;  // of all columns but the sure one of that side
    const bool two = sure_[0] >= 0 && sure_[1] >= 0 && sure_[0] != sure_[1];
    if (two) {
      g += at.g[1];
      h += at.h[0];
    }
    for (int k = 0; k < (two ? 2 : 1); ++k) {
      phi_ += at.phi[k];
      g_ += at.g[k];
    }
    const Sure& of = sure_values_;
    if (sure_[0] >= 0) sure_gradient_[0] = (at.g[0] * of.s_rest - g) / of.s_sum;
    if (sure_[1] >= 0) sure_gradient_[1] = (at.h[1] * of.t_rest - h) / of.t_sum;
  }

  // The same of a closed form, from its moments.
  void close_sure_columns() {
    const Sure& at = sure_values_;
    const double ahead = call_.forward + call_.cross;
    const bool same = sure_[0] == sure_[1];
    const auto apart = [&](double rest, double sum, double other_rest, double other_sum, double other_gap) {
      return same ? other_rest / other_sum - rest / sum : 1 / sum - std::exp(other_gap) / other_sum;
    };
    if (sure_[0] >= 0) {
      double& out = sure_gradient_[0];
      out = 0;
      if (ahead != 0) out += ahead * apart(at.s_rest, at.s_sum, at.t_rest, at.t_sum, at.t_gap);
      if (call_.reverse != 0) out -= call_.reverse * (at.t_gap * at.s_rest + at.reverse) / at.s_sum / at.s_sum;
    }
    if (sure_[1] >= 0) {
      double& out = sure_gradient_[1];
      out = 0;
      if (call_.reverse != 0) out += call_.reverse * apart(at.t_rest, at.t_sum, at.s_rest, at.s_sum, at.s_gap);
      if (call_.forward != 0) out -= call_.forward * (at.s_gap * at.t_rest + at.forward) / at.t_sum / at.t_sum;
      if (call_.cross != 0) out -= call_.cross * (at.s_gap * at.t_rest - at.cross) / at.t_sum / at.t_sum;
    }
  }

  void put_sure(int side, int64_t b, double scale, float* gradient) const {
    if (sure_in(side, b) && call_.alpha != 0 && std::isfinite(phi_ + sure_gradient_[side]))
      gradient[sure_[side] - b * BLOCK] = float(sure_gradient_[side] * scale);
  }

  // ---- where the label's token is compared apart from the others

  bool is_apart() const { return call_.target != Target::none; }
  bool apart_in(int64_t b) const { return apart_ >= 0 && apart_ / BLOCK == b; }
  bool needs_cross_entropy() const { return call_.labels && (call_.alpha < 1 || call_.target == Target::label); }
  bool label_is_here() const { return label_ >= 0 && label_ < call_.vocabulary; }

  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  static double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

  // The label's column as padding is: no kernel sees it.
  const float* without_apart(int64_t b, const float* z, float* scratch) const {
    if (!apart_in(b)) return z;
    if (z != scratch) std::memcpy(scratch, z, padded(columns(b)) * sizeof(float));
    scratch[apart_ - b * BLOCK] = FLOOR;
    return scratch;
  }

  void add_what_apart_needs(int64_t b, const float* s, const float* t, BlockStatistics& out) const {
    const int n = columns(b);
    out.t_sum_at_1 = 0;
    if (call_.target == Target::label) {
      V sum{};
      for (int i = 0; i < n; i += LANES) sum += UNTEMPERED.exponential(load(t + i) - out.t_max);
      out.t_sum_at_1 = sum_lanes(sum);
    }
    if (!apart_in(b) || !(moments_ & SINGLE)) return;
    out.s_total = 0;
    for (int i = 0; i < n; ++i)
      if (b * BLOCK + i != apart_) out.s_total += s[i] - out.s_max;
  }

  // fastkd/backends/reference.py, _apart: what the label's token adds to the sums over the others.
  void set_apart() {
    RowStatistics& row = row_statistics_;
    if (whole()) label_z_ = label_logit(), t_label_z_ = teacher_label_logit();
    // Neither is in the sums of conclude().
    if (call_.alpha != 0 && (label_z_ == INF || t_label_z_ == INF)) weight_ = std::nan("");
    const double s_gap = label_z_ - row.s_max, t_gap = t_label_z_ - row.t_max;
    row.s_mean += s_gap / call_.shard.total;
    const double a = t_gap / teacher_softmax_.temperature - row.t_log_sum;
    const double b = s_gap / student_softmax_.temperature - row.s_log_sum;
    const double p = sigmoid(a), p_rest = sigmoid(-a), q = sigmoid(b), q_rest = sigmoid(-b);
    const auto term = [](double weight, double gap) { return weight < NEGLIGIBLE ? 0 : weight * gap; };
    s_apart_ = b;
    label_entropy_ = term(q, softplus(-b)) + term(q_rest, softplus(b));
    label_g_ = label_h_ = label_share_ = 0;
    const double weight = call_.target_weight;
    if (call_.target == Target::binary) {
      phi_ += term(weight, term(p, softplus(-b) - softplus(-a)) + term(p_rest, softplus(b) - softplus(a)));
      // The smaller side's difference, as near 1 both have lost their digits.
      label_g_ = weight * (b > 0 ? p_rest - q_rest : q - p);
      label_h_ = term(weight, term(p * p_rest, a - b));
      g_ += label_g_;
      h_ += label_h_;
    } else {
      label_share_ = weight * sigmoid(t_gap / UNTEMPERED.temperature - row.t_log_sum_at_1);
    }
    apart_at_1_ = s_gap / UNTEMPERED.temperature - row.s_log_sum_at_1;
    row.s_log_sum_at_1 += softplus(apart_at_1_);  // of all tokens from here on
  }

  float student_gradient_apart() const {
    double gradient = call_.alpha == 0 ? 0 : label_g_ * kd_scale_ / s_temperature_;
    if (with_labels_) {
      const double others = 1 - 1.0 / call_.shard.total;
      gradient += ce_scale_ * call_.label_smoothing * others - q_scale_ * sigmoid(-apart_at_1_);
    }
    return float(gradient) * s_adjust_.slope(splat(float(label_z_)))[0];
  }
  float teacher_gradient_apart() const {
    const double gradient = call_.alpha == 0 ? 0 : label_h_ * kd_scale_ / t_temperature_;
    return float(gradient) * t_adjust_.slope(splat(float(t_label_z_)))[0];
  }

  int columns(int64_t b) const { return int(std::min<int64_t>(BLOCK, call_.vocabulary - b * BLOCK)); }

  Ahead ahead_in(const char* student, const char* teacher, int64_t b) const {
    const int s_width = element_size(call_.student.dtype), t_width = element_size(call_.teacher.dtype);
    return {student + b * BLOCK * s_width, teacher + b * BLOCK * t_width, s_width, t_width};
  }
  // Block b of this row, or what comes after it in the next.
  Ahead ahead(int64_t b) const {
    if (b < blocks_) return ahead_in(student_, teacher_, b);
    return next_student_ && b < 2 * blocks_ ? ahead_in(next_student_, next_teacher_, b - blocks_) : Ahead{};
  }

  const float* load_student(int64_t b, BlockScratch& scratch) const {
    const float* z = load_block(student_, call_.student.dtype, b * BLOCK, columns(b), s_adjust_, scratch.s);
    return without_apart(b, z, scratch.s);
  }
  const float* load_teacher(int64_t b, BlockScratch& scratch) const {
    const float* z = load_block(teacher_, call_.teacher.dtype, b * BLOCK, columns(b), t_adjust_, scratch.t);
    return without_apart(b, z, scratch.t);
  }

  float* s_exp(int64_t b, BlockScratch& scratch) const {
    return keeps_exponentials_ ? s_exp_ + b * BLOCK : scratch.s_exp;
  }
  float* t_exp(int64_t b, BlockScratch& scratch) const {
    return keeps_exponentials_ ? t_exp_ + b * BLOCK : scratch.t_exp;
  }
  float* s_exp_at_1(int64_t b, BlockScratch& scratch) const {
    return keeps_exponentials_ && s_exp_at_1_ ? s_exp_at_1_ + b * BLOCK : scratch.s_exp_at_1;
  }

  // Whether the phase of sums leaves g for the gradient, in the place of the teacher's exponentials.
  // Where g takes no logarithm, it is cheaper to compute again.
  bool keeps_g() const {
    return needs_sums() && kernels_.gradient_uses_logs && keeps_exponentials_ && call_.normalized && !teacher_gradient_;
  }
  float* g(int64_t b, BlockScratch& scratch) const { return keeps_g() ? t_exp(b, scratch) : scratch.gradient; }

  // Whether logarithms are first seen in the gradient: the sums of phi and g would be NaN where log 0 matters.
  bool gradients_need_logs() const {
    return !needs_sums() && (teacher_gradient_ || (student_gradient_ && kernels_.gradient_uses_logs));
  }

  // Only a temperature below 1 takes finite gaps to -inf.
  static bool overflow(const float* z, int n, float maximum, float inverse) {
    if (inverse <= 1) return false;
    float lowest = 0;
    for (int i = 0; i < n; ++i) lowest = std::min(lowest, z[i] - maximum);
    return lowest * inverse == -INF;
  }

  // log p = (t - t_max of the block) / T + t_offset; a block's exponentials times t_weight are probabilities.
  double s_offset(int64_t b) const {
    return as_float((statistics_[b].s_max - row_statistics_.s_max) / student_softmax_.temperature -
                    row_statistics_.s_log_sum);
  }
  double t_offset(int64_t b) const {
    return as_float((statistics_[b].t_max - row_statistics_.t_max) / teacher_softmax_.temperature -
                    row_statistics_.t_log_sum);
  }
  // A block may be as far below the row's maximum as no float is: masked logits of a process that has no others.
  static double as_float(double offset) { return std::max(offset, -1e38); }
  float s_weight(int64_t b) const { return float(std::exp(s_offset(b))); }
  float t_weight(int64_t b) const { return float(std::exp(t_offset(b))); }

  bool needs_statistics() const { return call_.normalized || with_labels_ || call_.student_entropy; }

  void set_shift(const char* row, Dtype dtype, Adjustment& adjust) {
    adjust.shift = 0;
    if (!needs_statistics() || !call_.normalized || call_.vocabulary == 0) return;
    const float top = low_top(row, dtype, call_.vocabulary, adjust, apart_);
    if (top == -INF && whole()) weight_ = std::nan("");
    if (top <= FLOOR && top > -INF) adjust.shift = top;
  }

  // A number is valid where it is positive; anything else poisons the row.
  double temperature(const Tempering& tempering) {
    if (!tempering.per_row) return tempering.temperature;
    const float value = tempering.per_row[row_];
    if (value > 0) return value;
    weight_ = std::nan("");
    return 1;
  }

  BlockView view(int64_t b, BlockScratch& scratch, bool logits) {
    BlockView v{};
    const bool again = needs_statistics() && !keeps_exponentials_;
    logits |= again;
    v.s = logits ? load_student(b, scratch) : s_exp(b, scratch);  // never used where logits are not needed,
    v.t = logits ? load_teacher(b, scratch) : t_exp(b, scratch);  // but loaded: the pointers must be good
    v.s_exp = s_exp(b, scratch);
    v.t_exp = t_exp(b, scratch);
    v.g = g(b, scratch);
    v.s_inverse = student_softmax_.inverse;
    v.t_inverse = teacher_softmax_.inverse;
    v.ratio = float(student_softmax_.temperature / teacher_softmax_.temperature);
    v.first = b * BLOCK;
    v.sure = sure_;
    if (!needs_statistics()) return v;
    if (!whole()) {
      statistics_[b].s_max = maximum_of(v.s, padded(columns(b)));
      statistics_[b].t_max = maximum_of(v.t, padded(columns(b)));
    }
    if (again) exponentials(b, v.s, v.t, scratch);
    v.s_weight = s_weight(b);
    v.t_weight = t_weight(b);
    if (!call_.normalized) return v;
    v.s_max = statistics_[b].s_max;
    v.t_max = statistics_[b].t_max;
    v.s_offset = float(s_offset(b));
    v.t_offset = float(t_offset(b));
    v.s_offset_low = float(s_offset(b) - v.s_offset);
    v.t_offset_low = float(t_offset(b) - v.t_offset);
    double offset = t_offset(b) - s_offset(b);
    const RowStatistics& row = row_statistics_;
    const double temperature = student_softmax_.temperature;
    const double plain = (row.s_max - row.t_max) / temperature + (row.s_log_sum - row.t_log_sum);
    if (temperature == teacher_softmax_.temperature && std::abs(plain) < CLOSE_LOGITS) {
      offset = plain;
    } else {
      v.s_origin = v.s_max;
      v.t_origin = v.t_max;
    }
    offset *= v.s_inverse * temperature;  // as what it is added to
    v.ratio_high = float(offset);
    v.ratio_low = float(offset - v.ratio_high);
    return v;
  }

  // The exponentials of the first phase once more, where they were not kept.
  void exponentials(int64_t b, const float* s, const float* t, BlockScratch& scratch) {
    const int n = columns(b);
    const V s_max = splat(statistics_[b].s_max), t_max = splat(statistics_[b].t_max);
    for (int i = 0; i < n; i += LANES) {
      store(scratch.s_exp + i, student_softmax_.exponential(load(s + i) - s_max));
      store(scratch.t_exp + i, teacher_softmax_.exponential(load(t + i) - t_max));
    }
    if (separate_at_1_)
      for (int i = 0; i < n; i += LANES) store(scratch.s_exp_at_1 + i, UNTEMPERED.exponential(load(s + i) - s_max));
  }

  void add_cross_entropy(int64_t b, BlockScratch& scratch, const BlockView& v) {
    const int n = columns(b);
    const float* e = separate_at_1_ ? s_exp_at_1(b, scratch) : v.s_exp;
    const double s_gap = statistics_[b].s_max - row_statistics_.s_max;
    const double weight = std::exp(s_gap / UNTEMPERED.temperature - row_statistics_.s_log_sum_at_1);
    const V factor = splat(float(q_scale_ * weight));
    const V uniform = splat(float(ce_scale_ * call_.label_smoothing / call_.shard.total));
    const int64_t column = label_ - b * BLOCK;
    const bool here = column >= 0 && column < n;
    const float distillation = here ? scratch.gradient[column] : 0;
    for (int i = 0; i < n; i += LANES)
      store(scratch.gradient + i, load(scratch.gradient + i) + (load(e + i) * factor - uniform));
    if (!here) return;
    if (sure_[0] == label_ && !separate_at_1_) {  // q - 1 would have no digits
      const double smoothed = call_.label_smoothing * (1 - 1.0 / call_.shard.total);
      const double rest = sure_values_.s_rest / sure_values_.s_sum;
      scratch.gradient[column] = float(distillation + (ce_scale_ * smoothed - q_scale_ * rest));
    } else {
      scratch.gradient[column] -= float(ce_scale_ * (1 - call_.label_smoothing));
    }
  }

  float label_logit() const { return logit_at(student_, call_.student.dtype, s_adjust_, label_); }
  float teacher_label_logit() const { return logit_at(teacher_, call_.teacher.dtype, t_adjust_, label_); }
  static float logit_at(const char* row, Dtype dtype, const Adjustment& adjust, int64_t column) {
    alignas(64) float z[LANES];
    return load_block(row, dtype, column, 1, adjust, z)[0];
  }

  void write(float* to, double value) const {
    if (to) to[row_] = float(value);
  }

  void clear(char* gradient, Dtype dtype, int64_t from, int64_t to) const {
    if (gradient) std::memset(gradient + from * element_size(dtype), 0, (to - from) * element_size(dtype));
  }
  void clear_padding() const {
    clear(student_gradient_, call_.student.dtype, call_.vocabulary, call_.student.width);
    clear(teacher_gradient_, call_.teacher.dtype, call_.vocabulary, call_.teacher.width);
  }
  void drop() const {
    clear(student_gradient_, call_.student.dtype, 0, call_.vocabulary);
    clear(teacher_gradient_, call_.teacher.dtype, 0, call_.vocabulary);
    for (float* out : {call_.loss, call_.distillation, call_.cross_entropy, call_.student_entropy}) write(out, 0);
  }

  const Call& call_;
  const Kernels& kernels_;
  Adjustment s_adjust_, t_adjust_;
  const int64_t blocks_;
  std::vector<BlockStatistics> statistics_;
  std::vector<BlockSums> sums_;
  float *s_exp_ = nullptr, *t_exp_ = nullptr, *s_exp_at_1_ = nullptr;  // [blocks, BLOCK] where kept
  bool keeps_exponentials_, past_cache_;

  // The row at hand.
  int64_t row_ = 0, label_ = 0;
  char *next_student_ = nullptr, *next_teacher_ = nullptr;
  char *student_ = nullptr, *teacher_ = nullptr, *student_gradient_ = nullptr, *teacher_gradient_ = nullptr;
  double weight_ = 1, s_temperature_ = 1, t_temperature_ = 1;
  Softmax student_softmax_{1}, teacher_softmax_{1};
  bool with_labels_ = false, separate_at_1_ = false, log_0_ = false;
  int moments_ = 0;
  RowStatistics row_statistics_{};
  double phi_ = 0, g_ = 0, h_ = 0;                     // sums, h's of the teacher's derivative
  double kd_scale_ = 0, ce_scale_ = 0, q_scale_ = 0;  // q_scale_ multiplies q at temperature 1
  double label_z_ = 0, t_label_z_ = 0;
  int64_t apart_ = -1;                                // the label's column where it is compared apart, and here
  double s_apart_ = 0, apart_at_1_ = 0;               // log(q_y / (1 - q_y)) of the label y, at T and at 1
  double label_g_ = 0, label_h_ = 0;                  // the label's own derivatives
  double label_share_ = 0, label_entropy_ = 0;        // weight of -log q_y; entropy of (q_y, 1 - q_y)
  double s_lost_ = 0, t_lost_ = 0;  // what leave() says

  // Of the columns that the student and the teacher are sure of, if they are.
  struct Sure {
    double s_rest, t_rest, s_sum, t_sum;  // sums of exponentials without them, and with them
    double forward, reverse, cross;       // moments without them
    double s_gap, t_gap;                  // the student's tempered logit at the teacher's column less its maximum; ...
  };
  int64_t sure_[2] = {-1, -1};
  Sure sure_values_{};
  double sure_gradient_[2] = {};
  std::unique_ptr<BlockScratch> sure_scratch_;
};

// The phases of a row up to its value; false where the row is dropped. each(f) runs f on every block, by one thread or
// by a team; once(f) runs f once, with what it wrote seen by all. The first phase of a block is statistics(b, scratch).
template <class Each, class Once, class Statistics>
bool value_of(Row& row, int64_t index, Each each, Once once, Statistics statistics) {
  bool counted = false, finite = false;
  once([&](bool* flags) { flags[0] = row.start(index); }, &counted);
  if (!counted) return false;
  for (const bool policy : {false, true}) {
    once([&](bool*) { row.set_policy_for_log_0(policy); }, &finite);
    each(statistics);
    once([&](bool* flags) { flags[0] = row.merge_statistics(); }, &finite);
    if (!finite) continue;
    if (!row.needs_sums()) break;
    each([&](int64_t b, BlockScratch& scratch) { row.sums(b, scratch); });
    once([&](bool* flags) { flags[0] = row.merge_sums(); }, &finite);
    if (finite) break;
  }
  once([&](bool*) { row.finish(); }, &finite);
  return row.needs_gradient();
}

}  // namespace
