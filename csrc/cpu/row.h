// A row of student and teacher logits, as three phases over its blocks: statistics, sums and gradient.
//
// This file has the class; the methods of each job are in a file of their own, included at the end.

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

// A thread's memory for one block: converted logits, exponentials that are not kept, the gradient.
struct BlockScratch {
  alignas(64) float s[BLOCK], t[BLOCK], s_exp[BLOCK], t_exp[BLOCK], s_exp_t1[BLOCK], gradient[BLOCK];
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
        sums_(blocks_),
        measures_(call.measures ? blocks_ : 0) {
    const int64_t columns = blocks_ * BLOCK;
    const int arrays = needs_cross_entropy(call_) ? 3 : 2;
    const bool needed_later =
        needs_sums() || call.measures || call.student_gradient.data || call.teacher_gradient.data;
    keeps_exponentials_ = whole() && needed_later && call.vocabulary * arrays * 4 <= SCRATCH_BYTES;
    if (keeps_exponentials_) {
      s_exp_ = workspace.reserve(columns * arrays);
      t_exp_ = s_exp_ + columns;
      s_exp_t1_ = arrays == 3 ? t_exp_ + columns : nullptr;
    }
    past_cache_ = call.rows * call.vocabulary * element_size(call.student.dtype) >= STREAM_BYTES;
  }

  int64_t blocks() const { return blocks_; }

  // Opens a row. False if it is dropped, in which case its outputs are written.
  bool start(int64_t row);

  // Computes one step of a row whose vocabulary is divided among ranks. Call it after start().
  void take_step(BlockScratch& scratch);

  // Computes the statistics of block b, and meanwhile writes the same block of another row's gradient.
  void statistics(int64_t b, BlockScratch& scratch, const PendingGradient& alongside = {});

  // False if the row must be computed again with the policy for log 0.
  bool merge_statistics();

  bool needs_sums() const { return !call_.closed_form; }

  void sums(int64_t b, BlockScratch& scratch);

  // False if the row must be computed again with the policy for log 0.
  bool merge_sums();

  bool needs_measures() const { return call_.measures; }

  // Computes the measures of block b, with or without the policy for log 0. Call it between merge_statistics() and
  // sums().
  void measures(int64_t b, BlockScratch& scratch, bool policy);

  // False if the measures must be computed again with the policy for log 0.
  bool write_measures(bool policy);

  // Turns the policy for log 0 on or off. It is off in the first attempt; rows.cpp explains why.
  void set_policy_for_log_0(bool on) { log_0_policy_ = on; }

  // Computes the value of the row. After it, gradient() may run on any block.
  void finish();

  bool needs_gradient() const { return student_gradient_ || teacher_gradient_; }

  // Whether the gradients of its blocks may be written during the next row's statistics.
  bool can_wait() const { return keeps_exponentials_; }

  void gradient(int64_t b, BlockScratch& scratch) { begin_gradient(b, scratch).write(0, columns(b)); }

  // Writes a block's gradients. If the student's can wait, it is not written but returned.
  PendingGradient begin_gradient(int64_t b, BlockScratch& scratch);

 private:
  // row_open.h
  void set_shift(const char* row, Dtype dtype, Adjustment& adjust, bool counts);
  double temperature(const Tempering& tempering);
  void clear_padding() const;
  void drop() const;

  // row_statistics.h
  void add_label_statistics(int64_t b, const float* s, const float* t, BlockStatistics& out) const;
  void set_row_statistics(const Merged& row);
  void set_sums_from_moments();
  static bool overflow(const float* z, int n, float maximum, float inverse);

  // row_sure.h
  template <class Maximum, class Load>
  int64_t column_of_maximum(Maximum of_block, double maximum, Load load_block);
  void exclude_sure_columns(const Merged& row);
  BlockStatistics without_sure(int64_t b, BlockScratch& scratch);
  double gap_at(int64_t column, bool student) const;
  bool sure_columns_are_finite() const;
  void add_sure_columns();
  void set_sure_gradients();
  void store_sure_gradient(int side, int64_t b, double scale, float* gradient) const;

  // row_value.h
  void set_label_term();
  void write_value();
  double smoothed_gap() const;
  float student_gradient_of_label() const;
  float teacher_gradient_of_label() const;

  // row_gradient.h
  void write_teacher_gradient(int64_t b, BlockScratch& scratch, PendingGradient pending);
  void add_cross_entropy(int64_t b, BlockScratch& scratch, const BlockView& v);
  BlockView view(int64_t b, BlockScratch& scratch, bool logits);
  void exponentials(int64_t b, const float* s, const float* t, BlockScratch& scratch);

  // row_shard.h
  void statistics_step(BlockScratch& scratch);
  void sums_step(BlockScratch& scratch);
  void results_step(BlockScratch& scratch);
  void store_partial(const Merged& row) const;
  void load_partials();
  void statistics_of_shard(int64_t b, const float* s, const float* t, BlockScratch& scratch);

  bool whole() const { return call_.shard.step == Step::all; }

  int64_t fields() const { return has_label_term(call_) ? APART_STATISTICS : STATISTICS; }

  // Whether a logit is infinitely far below the maximum, in units of the temperature.
  static bool gone(float z, float max, const Softmax& softmax) { return (z - max) * softmax.inverse == -INF; }

  template <class Part>
  void add_to(Merged& row, const Part& part, double columns) const {
    row.add(part, columns, 1 / student_softmax_.temperature, 1 / teacher_softmax_.temperature, separate_t1_);
  }

  // Whether a side is sure of a column in block b.
  bool sure_column_in(int side, int64_t b) const { return sure_column_[side] >= 0 && sure_column_[side] / BLOCK == b; }

  bool label_column_in(int64_t b) const { return label_column_ >= 0 && label_column_ / BLOCK == b; }

  bool label_is_here() const { return label_ >= 0 && label_ < call_.vocabulary; }

  // Replaces the label's logit by padding, so that no kernel sees it.
  const float* without_label(int64_t b, const float* z, float* scratch) const {
    if (!label_column_in(b)) return z;
    if (z != scratch) std::memcpy(scratch, z, padded(columns(b)) * sizeof(float));
    scratch[label_column_ - b * BLOCK] = FLOOR;
    return scratch;
  }

  int columns(int64_t b) const { return int(std::min<int64_t>(BLOCK, call_.vocabulary - b * BLOCK)); }

  Ahead ahead_in(const char* student, const char* teacher, int64_t b) const {
    const int s_width = element_size(call_.student.dtype), t_width = element_size(call_.teacher.dtype);
    return {student + b * BLOCK * s_width, teacher + b * BLOCK * t_width, s_width, t_width};
  }

  // What to prefetch as block b: a block of this row or, past its end, a block of the next row.
  Ahead ahead(int64_t b) const {
    if (b < blocks_) return ahead_in(student_, teacher_, b);
    return next_student_ && b < 2 * blocks_ ? ahead_in(next_student_, next_teacher_, b - blocks_) : Ahead{};
  }

  const float* load_student(int64_t b, BlockScratch& scratch) const {
    const float* z = load_block(student_, call_.student.dtype, b * BLOCK, columns(b), s_adjust_, scratch.s);
    return without_label(b, z, scratch.s);
  }

  const float* load_teacher(int64_t b, BlockScratch& scratch) const {
    const float* z = load_block(teacher_, call_.teacher.dtype, b * BLOCK, columns(b), t_adjust_, scratch.t);
    return without_label(b, z, scratch.t);
  }

  float* s_exp(int64_t b, BlockScratch& scratch) const {
    return keeps_exponentials_ ? s_exp_ + b * BLOCK : scratch.s_exp;
  }

  float* t_exp(int64_t b, BlockScratch& scratch) const {
    return keeps_exponentials_ ? t_exp_ + b * BLOCK : scratch.t_exp;
  }

  float* s_exp_t1(int64_t b, BlockScratch& scratch) const {
    return keeps_exponentials_ && s_exp_t1_ ? s_exp_t1_ + b * BLOCK : scratch.s_exp_t1;
  }

  // Whether the sweep for sums keeps g for the gradient, in place of the teacher's exponentials. If g takes no
  // logarithm, recomputing it is cheaper.
  bool keeps_g() const {
    return needs_sums() && kernels_.gradient_uses_logs && keeps_exponentials_ && call_.normalized && !teacher_gradient_;
  }

  float* g(int64_t b, BlockScratch& scratch) const { return keeps_g() ? t_exp(b, scratch) : scratch.gradient; }

  // Whether the gradient is the first to take logarithms. Sums of phi and g, if computed, are NaN where log 0 matters.
  bool gradients_need_logs() const {
    return !needs_sums() && (teacher_gradient_ || (student_gradient_ && kernels_.gradient_uses_logs));
  }

  // log q = (s - s_max of the block) / T + s_offset. A block's exponentials times s_weight are probabilities.
  double s_offset(int64_t b) const {
    return as_float((statistics_[b].s_max - row_statistics_.s_max) / student_softmax_.temperature -
                    row_statistics_.s_log_sum);
  }

  double t_offset(int64_t b) const {
    return as_float((statistics_[b].t_max - row_statistics_.t_max) / teacher_softmax_.temperature -
                    row_statistics_.t_log_sum);
  }

  // Clamps to the range of a float. An offset may be below it if all logits of this shard are masked.
  static double as_float(double offset) { return std::max(offset, -1e38); }

  float s_weight(int64_t b) const { return float(std::exp(s_offset(b))); }

  float t_weight(int64_t b) const { return float(std::exp(t_offset(b))); }

  bool needs_statistics() const { return call_.normalized || with_labels_ || call_.student_entropy; }

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

  const Call& call_;
  const Kernels& kernels_;
  Adjustment s_adjust_, t_adjust_;
  const int64_t blocks_;
  std::vector<BlockStatistics> statistics_;
  std::vector<BlockSums> sums_;
  std::vector<BlockMeasures> measures_;
  float *s_exp_ = nullptr, *t_exp_ = nullptr, *s_exp_t1_ = nullptr;  // [blocks, BLOCK] if kept
  bool keeps_exponentials_, past_cache_;

  // The current row.
  int64_t row_ = 0, label_ = 0;  // label_: column within this vocabulary shard
  char *next_student_ = nullptr, *next_teacher_ = nullptr;
  char *student_ = nullptr, *teacher_ = nullptr, *student_gradient_ = nullptr, *teacher_gradient_ = nullptr;
  double weight_ = 1, s_temperature_ = 1, t_temperature_ = 1;
  Softmax student_softmax_{1}, teacher_softmax_{1};
  bool with_labels_ = false;   // whether -log q of the label is needed
  bool separate_t1_ = false;   // whether the cross-entropy needs exponentials of its own, at temperature 1
  bool log_0_policy_ = false;  // whether the row is computed with the policy for log 0
  int moments_ = 0;
  RowStatistics row_statistics_{};
  double phi_ = 0, g_ = 0, h_ = 0;  // sums over the row
  double centering_ = 0;            // added to log q in gradients, so that the mean of log q under p is 0
  RowScales scales_{};
  double z_label_ = 0, t_label_ = 0;              // z of the label, the student's and the teacher's
  double s_skipped_max_ = 0, t_skipped_max_ = 0;  // as in ShardStatistics

  // With a label term.
  int64_t label_column_ = -1;  // column of the label; -1 without a label term, or if it is in another shard
  LabelTerm label_term_{};
  double q_log_odds_ = 0;  // log-odds of the label

  // Sure columns, by side: the student's, the teacher's.
  int64_t sure_column_[2] = {-1, -1};  // -1: none
  SureSums sure_sums_{};
  double sure_gradient_[2] = {};
  std::unique_ptr<BlockScratch> sure_scratch_;
};

// Runs the phases of a row up to its value. False if the row is dropped, or wants no gradient. each(f) runs f on every
// block, by one thread or by a team; once(f) runs f once and makes what it wrote visible to all. statistics(b, scratch)
// computes the statistics of a block.
template <class Each, class Once, class Statistics>
bool value_of(Row& row, int64_t index, Each each, Once once, Statistics statistics) {
  bool kept = false, finite = false;
  once([&](bool* flags) { flags[0] = row.start(index); }, &kept);
  if (!kept) return false;
  for (const bool policy : {false, true}) {
    once([&](bool*) { row.set_policy_for_log_0(policy); }, &finite);
    each(statistics);
    once([&](bool* flags) { flags[0] = row.merge_statistics(); }, &finite);
    if (!finite) continue;
    for (const bool measures_policy : {false, true}) {
      if (!row.needs_measures()) break;
      each([&](int64_t b, BlockScratch& scratch) { row.measures(b, scratch, measures_policy); });
      once([&](bool* flags) { flags[0] = row.write_measures(measures_policy); }, &finite);
      if (finite) break;
    }
    if (!row.needs_sums()) break;
    each([&](int64_t b, BlockScratch& scratch) { row.sums(b, scratch); });
    once([&](bool* flags) { flags[0] = row.merge_sums(); }, &finite);
    if (finite) break;
  }
  once([&](bool*) { row.finish(); }, &finite);
  return row.needs_gradient();
}

}  // namespace

#include "row_open.h"
#include "row_statistics.h"
#include "row_sure.h"
#include "row_value.h"
#include "row_measures.h"
#include "row_gradient.h"
#include "row_shard.h"
