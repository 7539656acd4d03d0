// Statistics of a block, and how blocks and vocabulary shards are merged.

namespace {

// Statistics of a block. Moments are relative to the block's maxima; s' and t' are (z - max) / T.
struct BlockStatistics {
  float s_max, t_max;
  bool overflows;                     // whether some (z - max) / T is -inf
  double s_exp_sum, t_exp_sum;        // sums of e = exp((z - max) / T)
  double forward, reverse;            // sums of e_t (t' - s') and of e_s (s' - t')
  double cross, entropy;              // sums of e_t s' and of e_s s'
  double s_exp_sum_t1, centered_sum;  // sum of exponentials at temperature 1; sum of z - max
  double t_exp_sum_t1;                // only if the label term needs the teacher at temperature 1
};

// Statistics of a row, merged over its blocks, relative to the row's maxima. Moments are divided by the sum of
// exponentials.
struct RowStatistics {
  double s_max, t_max, s_log_sum, t_log_sum, s_log_sum_t1, t_log_sum_t1;
  double forward, reverse, cross, entropy, centered_mean;
};

// Statistics of one vocabulary shard, exchanged between ranks (Shard::statistics). As BlockStatistics, except that
// maxima do not include the row's shift, and are -inf for a shard without probability.
struct ShardStatistics {
  double s_max, t_max;
  double s_exp_sum, t_exp_sum;
  double forward, reverse;
  double cross, entropy;
  double s_exp_sum_t1, centered_sum;
  double columns, label;  // number of columns; z of the label, -inf if it is in another shard
  double t_skipped_max,
      s_skipped_max;  // largest z of a side among the columns that moments skip: the other side is gone there
  double policy;      // 1 if the policy for log 0 is needed
  double t_exp_sum_t1, t_label;  // exchanged only if there is a label term
};
static_assert(sizeof(ShardStatistics) == APART_STATISTICS * sizeof(double));

struct ShardSums {
  double phi, g, h;
  double policy;
};
static_assert(sizeof(ShardSums) == SUMS * sizeof(double));

// Accumulator that merges statistics of blocks or of shards: maxima first, then sums relative to the maxima.
struct Merged {
  double s_max = -INF, t_max = -INF;
  double s_exp_sum = 0, t_exp_sum = 0;
  double forward = 0, reverse = 0;
  double cross = 0, entropy = 0;
  double s_exp_sum_t1 = 0, centered_sum = 0;
  double t_exp_sum_t1 = 0;

  // Call this for all parts before add.
  template <class Part>
  void update_max(const Part& part) {
    s_max = std::max(s_max, double(part.s_max));
    t_max = std::max(t_max, double(part.t_max));
  }
  template <class Part>
  void add(const Part& part, double columns, double s_inverse, double t_inverse, bool t1) {
    if (!columns) return;
    const double s_gap = part.s_max - s_max, t_gap = part.t_max - t_max;
    const double s_factor = std::exp(s_gap * s_inverse), t_factor = std::exp(t_gap * t_inverse);
    const double shift = t_gap * t_inverse - s_gap * s_inverse;
    centered_sum += part.centered_sum + s_gap * columns;
    const bool s_none = s_gap == -INF, t_none = t_gap == -INF;
    if (!s_none) {
      entropy += s_factor * (part.entropy + s_gap * s_inverse * part.s_exp_sum);
      if (t1) s_exp_sum_t1 += std::exp(s_gap / UNTEMPERED.temperature) * part.s_exp_sum_t1;
      s_exp_sum += s_factor * part.s_exp_sum;
    }
    if (!t_none) t_exp_sum += t_factor * part.t_exp_sum;
    if (!t_none && part.t_exp_sum_t1 != 0) t_exp_sum_t1 += std::exp(t_gap / UNTEMPERED.temperature) * part.t_exp_sum_t1;
    if (s_none || t_none) return;  // a part without one side has no moments
    forward += t_factor * (part.forward + shift * part.t_exp_sum);
    reverse += s_factor * (part.reverse - shift * part.s_exp_sum);
    cross += t_factor * (part.cross + s_gap * s_inverse * part.t_exp_sum);
  }
};

}  // namespace
