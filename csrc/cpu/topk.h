// A row against a sparse teacher, as a dense loss over K + 1 events (fastkd/backends/sparse.py).
//
//   sweep     computes the exponentials of the row without the listed tokens, keeps them in scratch, and sums them
//   events    passes the tokens' logits and the tail's log-sum-exp, K + 1 columns, through Row
//   gradient  multiplies the tail's exponentials by one number, and puts the tokens' gradients in their places
//
// It reads the logits once, gathers K of them, and writes the gradient once. Threads share the rows.
//
// This file has the class; the methods of each job are in a file of their own, included at the end.

#include "topk_tail.h"

namespace {

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
  bool start(int64_t row);

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
  void sweep(int64_t b, TopKRow* waiting);

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

  // topk_sweep.h
  const float* load_tail(int64_t b);
  void store_partial(const Tail& tail);
  Tail load_partials();
  Tail merge_blocks() const;
  void gather_tokens();

  // topk_events.h
  Call make_event_call(const Call& call);
  void make_events(const Tail& tail);
  const float* load_logprobs();
  void compute_value();
  void write_no_divergence(double nothing);
  void compute_dense();
  void compute_truncated();
  double entropy() const;
  void write_measures() const;

  // topk_gradient.h
  void make_gradient(int64_t b);
  void add_cross_entropy(int64_t b, const float* e, double gap, float* out);
  void recompute_exponentials(int64_t b);

  bool whole() const { return call_.shard.step == Step::all; }

  bool label_is_here() const { return with_labels() && label_ >= 0 && label_ < call_.vocabulary; }

  bool with_labels() const { return call_.labels && call_.alpha < 1; }

  bool renormalizes() const { return call_.tail == fastkd::Tail::renormalize; }

  bool truncates() const { return call_.tail == fastkd::Tail::truncate; }

  int columns(int64_t b) const { return int(std::min<int64_t>(BLOCK, call_.vocabulary - b * BLOCK)); }

  int64_t tokens() const { return call_.tokens; }

  float* exponentials(int64_t b) { return keeps_exponentials_ ? exponentials_ + b * BLOCK : scratch_.s_exp; }

  float* exponentials_t1(int64_t b) {
    return keeps_exponentials_ ? exponentials_ + (blocks_ + b) * BLOCK : scratch_.s_exp_t1;
  }

  const float* load_student(int64_t b) {
    return load_block(student_, call_.student.dtype, b * BLOCK, columns(b), adjust_, scratch_.s);
  }

  // Whether the teacher lists no token. Such a row has no divergence, whatever the tail is.
  bool teacher_lists_no_token() const {
    return std::all_of(ids_, ids_ + tokens(), [](int64_t id) { return id == -1; });
  }

  // Sum of e z' over the tail.
  double tail_moment() const {
    return tail_log_sum_ == -INF ? 0 : std::exp(tail_log_sum_) * (tail_log_sum_ - tail_entropy_);
  }

  void store_gradient(int64_t b, int from, int to) {
    const Dtype dtype = call_.student_gradient.dtype;
    store_block(gradient_, dtype, b * BLOCK + from, to - from, scratch_.gradient + from, past_cache_);
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

#include "topk_sweep.h"
#include "topk_events.h"
#include "topk_gradient.h"
