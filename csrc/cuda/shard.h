// A row whose vocabulary is divided among ranks: what the ranks exchange, as doubles, and how it is merged.
// fastkd/call/contract.py names the steps. Each step is a launch:
//
//   statistics   stores the statistics of this shard (ShardStatistics, or SparseStatistics), and the label's z
//   sums         opens the row with the statistics of all shards; stores this shard's sums of phi, g and h
//   results      opens the row with the sums of all shards as well; writes the value, and the gradient of this shard
#pragma once
#include <cstddef>

#include "row.h"
#include "topk.h"

namespace fastkd::cuda {

// Statistics before p and q are known. Moments skip columns in which either logit is gone (infinitely far below its
// max), since no rank yet knows whether the other side is negligible there. The largest skipped logit settles that
// later.
struct ShardStatistics {
  Statistics sweep;
  float t_skipped_max, s_skipped_max;  // largest z of a side among the columns where the other side is gone
};

FASTKD_INLINE ShardStatistics add(const ShardStatistics& a, const ShardStatistics& b) {
  return {add(a.sweep, b.sweep), fmaxf(a.t_skipped_max, b.t_skipped_max), fmaxf(a.s_skipped_max, b.s_skipped_max)};
}
FASTKD_INLINE Maxima maxima_of(const ShardStatistics& a) { return maxima_of(a.sweep); }
FASTKD_INLINE void rescale(ShardStatistics& a, Maxima max, const RowState& row) { rescale(a.sweep, max, row); }

FASTKD_INLINE ShardStatistics merge(const ShardStatistics& a, const ShardStatistics& b, const RowState& row) {
  return {merge(a.sweep, b.sweep, row), fmaxf(a.t_skipped_max, b.t_skipped_max),
          fmaxf(a.s_skipped_max, b.s_skipped_max)};
}

FASTKD_INLINE void add_shard_statistics(Sweep<false, true>& local, ShardStatistics& all, const Call& call,
                                        const RowState& row, Place place, Range range, const char* student,
                                        const char* teacher) {
  const auto gone = [](V z, float max, const Side& side) { return product(z - finite_max(max), side.rate) == -INF; };
  const auto add = [&](auto vector, const auto& s, const auto& t) {
    local.add(s, t, vector.n, row);
    for (int k = 0; k < VECTOR; ++k) {
      if (gone(s[k], local.sum.s_max, row.student)) all.t_skipped_max = fmaxf(all.t_skipped_max, t[k]);
      if (gone(t[k], local.sum.t_max, row.teacher)) all.s_skipped_max = fmaxf(all.s_skipped_max, s[k]);
    }
  };
  each_vector_without_label<true>(call, row, place, range, student, teacher, add);
}

// ---- what is exchanged

constexpr int SWEPT_FIELDS = sizeof(Statistics) / sizeof(float);
constexpr int CENTERED_SUM_AT = offsetof(Statistics, centered_sum) / sizeof(float);
static_assert(STATISTICS == SWEPT_FIELDS + 5, "what store_partial writes");

FASTKD_INLINE void store_rest(double* to, const ShardStatistics& all) {
  to[0] = all.t_skipped_max, to[1] = all.s_skipped_max;
}
FASTKD_INLINE void store_rest(double* to, const SparseStatistics& all) {
  to[0] = all.token_max, to[1] = all.token_count, to[2] = all.invalid;
}

FASTKD_INLINE void load_rest(const double* from, ShardStatistics& all) {
  all.t_skipped_max = float(from[0]), all.s_skipped_max = float(from[1]);
}
FASTKD_INLINE void load_rest(const double* from, SparseStatistics& all) {
  all.token_max = float(from[0]), all.token_count = int(from[1]), all.invalid = int(from[2]);
}

// Stores the statistics of this shard. Its sum of z has no center, which ranks would have to share: a double is exact
// enough.
template <class Part>
FASTKD_INLINE void store_partial(const Call& call, const RowState& row, const Part& all) {
  double* to = call.shard.statistics + row.row * STATISTICS;
  const float* swept = reinterpret_cast<const float*>(&all.sweep);
#pragma unroll
  for (int i = 0; i < SWEPT_FIELDS; ++i) to[i] = swept[i];
  to[CENTERED_SUM_AT] = all.sweep.centered_sum + double(row.center) * double(call.vocabulary);
  if (has_label_term(call) && label_is_here(call, row)) to[CENTERED_SUM_AT] += double(row.z_label) - double(row.center);
  to[SWEPT_FIELDS] = row.z_label, to[SWEPT_FIELDS + 1] = row.t_label;
  store_rest(to + SWEPT_FIELDS + 2, all);
}

// Merges the statistics of all shards, in the order of ranks, so that every rank gets the same result.
template <class Part>
FASTKD_INLINE Part load_partial(const Call& call, RowState& row, Part all) {
  double centered_sum = 0;
#pragma unroll 1
  for (int64_t process = 0; process < call.shard.processes; ++process) {
    const double* from = call.shard.all_statistics + (process * call.rows + row.row) * STATISTICS;
    Part other;
    float* swept = reinterpret_cast<float*>(&other.sweep);
#pragma unroll
    for (int i = 0; i < SWEPT_FIELDS; ++i) swept[i] = float(from[i]);
    load_rest(from + SWEPT_FIELDS + 2, other);
    all = merge(all, other, row);
    centered_sum += from[CENTERED_SUM_AT];
    row.z_label = fmaxf(row.z_label, float(from[SWEPT_FIELDS]));
    row.t_label = fmaxf(row.t_label, float(from[SWEPT_FIELDS + 1]));
  }
  row.center = finite_max(row.z_label);
  all.sweep.centered_sum = float(centered_sum - double(row.center) * double(call.shard.total));
  return all;
}

// Chooses a center where the label may be in another shard: any logit of this shard will do.
FASTKD_PER_ROW void choose_center(const Call& call, RowState& row) {
  if ((row.flags & CENTERED_SUM) && call.vocabulary)
    row.center = finite_max(z_at(call, call.student, row.student, row.row, 0));
}

// ---- a dense teacher

// Opens a row with the statistics, and if they are known the sums, of the whole vocabulary.
FASTKD_PER_ROW void open_dense_shard(const Call& call, int64_t index, RowState& row) {
  open_row(call, index, row);
  ShardStatistics all = load_partial(call, row, ShardStatistics{empty_statistics<false>(row), -INF, -INF});
  const auto matters = [](float z, float max, float sum, const Side& side) {
    return exp2_of((z - finite_max(max)) * side.rate) > NEGLIGIBLE * sum;
  };
  if (matters(all.t_skipped_max, all.sweep.t_max, all.sweep.t_exp_sum + all.sweep.t_max_count, row.teacher))
    all.sweep.forward = INF, all.sweep.cross = -INF;
  if (matters(all.s_skipped_max, all.sweep.s_max, all.sweep.s_exp_sum + all.sweep.s_max_count, row.student))
    all.sweep.reverse = INF;
  // Moments also skipped what a side has at the other side's maximum, if it is gone there.
  if (all.t_skipped_max == all.sweep.t_max) all.sweep.s_at_t_max = -INF;
  if (all.s_skipped_max == all.sweep.s_max) all.sweep.t_at_s_max = -INF;
  row.statistics = all.sweep;
  if (!call.shard.all_sums) return;
  double phi = 0, g = 0, h = 0;
#pragma unroll 1
  for (int64_t process = 0; process < call.shard.processes; ++process) {
    const double* from = call.shard.all_sums + (process * call.rows + row.row) * SUMS;
    phi += from[0];
    g += from[1];
    h += from[2];
    row.log_0_policy |= from[3] != 0;
  }
  row.sums = {float(phi), float(g), float(h)};
}

FASTKD_PER_ROW void store_partial_sums(const Call& call, const RowState& row) {
  double* to = call.shard.sums + row.row * SUMS;
  to[0] = row.phi, to[1] = row.g, to[2] = row.h, to[3] = row.log_0_policy;
}

// ---- a sparse teacher

FASTKD_PER_ROW void open_sparse_shard(const Call& call, int64_t index, RowState& row) {
  open_topk_row(call, index, row);
  finish_sweep(call, row, load_partial(call, row, empty_sparse_statistics(row)));
}

}  // namespace fastkd::cuda
