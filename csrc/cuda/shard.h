// A row whose vocabulary several processes share, each of which has some columns: what they exchange, as doubles, and what
// becomes of it. fastkd/call/contract.py names the steps; each is a launch.
//
//   statistics   of the columns here: a Share, or a Whole where the teacher is sparse, and the label's z on either side
//   sums         the row is opened with the statistics of all; sums of phi and g over the columns here
//   results      the row is opened with the sums of all as well; its value, and the gradient of the columns here
#pragma once
#include <cstddef>

#include "row.h"
#include "topk.h"

namespace fastkd::cuda {

// Statistics before p and q are known: moments leave out what is gone on either side, and the largest z that this leaves
// out tells in the end whether it was anything.
struct Share {
  Statistics sweep;
  float t_lost, s_lost;  // of the teacher where the student is gone, of the student where the teacher is
};

FASTKD_INLINE Share merge(const Share& a, const Share& b, const RowState& row) {
  return {merge(a.sweep, b.sweep, row), fmaxf(a.t_lost, b.t_lost), fmaxf(a.s_lost, b.s_lost)};
}

FASTKD_INLINE void add_share(Share& mine, const Call& call, const RowState& row, Place place, Range range,
                             const char* student, const char* teacher) {
  each_vector_of_sums<true>(call, row, place, range, student, teacher, [&](auto vector, const auto& s, const auto& t) {
    add_vector<false, true>(mine.sweep, s, t, vector.n, row);
    const auto gone = [](V z, float top, const Side& side) { return product(z - origin(top), side.rate) == -INF; };
    for (int k = 0; k < VECTOR; ++k) {
      if (gone(s[k], mine.sweep.s_top, row.student)) mine.t_lost = fmaxf(mine.t_lost, t[k]);
      if (gone(t[k], mine.sweep.t_top, row.teacher)) mine.s_lost = fmaxf(mine.s_lost, s[k]);
    }
  });
}

// ---- what is exchanged

constexpr int SWEPT = sizeof(Statistics) / sizeof(float), SPREAD_AT = offsetof(Statistics, spread) / sizeof(float);
static_assert(STATISTICS == SWEPT + 5, "what put writes");

FASTKD_INLINE void put(double* to, const Share& all) { to[0] = all.t_lost, to[1] = all.s_lost; }
FASTKD_INLINE void put(double* to, const Whole& all) {
  to[0] = all.tokens_top, to[1] = all.seated, to[2] = all.invalid;
}

FASTKD_INLINE void take(const double* from, Share& all) { all.t_lost = float(from[0]), all.s_lost = float(from[1]); }
FASTKD_INLINE void take(const double* from, Whole& all) {
  all.tokens_top = float(from[0]), all.seated = int(from[1]), all.invalid = int(from[2]);
}

// Of the columns here. The sum of z is exact enough as a double to need no pivot, which processes would have to share.
template <class Part>
FASTKD_INLINE void write_statistics(const Call& call, const RowState& row, const Part& all) {
  double* to = call.shard.statistics + row.row * STATISTICS;
  const float* swept = reinterpret_cast<const float*>(&all.sweep);
#pragma unroll
  for (int i = 0; i < SWEPT; ++i) to[i] = swept[i];
  to[SPREAD_AT] = all.sweep.spread + double(row.pivot) * double(call.vocabulary);
  if (label_is_apart(call) && label_is_here(call, row)) to[SPREAD_AT] += double(row.z_label) - double(row.pivot);
  to[SWEPT] = row.z_label, to[SWEPT + 1] = row.t_label;
  put(to + SWEPT + 2, all);
}

// Of all columns: one process after the other, so that each finds the same.
template <class Part>
FASTKD_INLINE Part statistics_of_all(const Call& call, RowState& row, Part all) {
  double spread = 0;
#pragma unroll 1
  for (int64_t process = 0; process < call.shard.processes; ++process) {
    const double* from = call.shard.all_statistics + (process * call.rows + row.row) * STATISTICS;
    Part other;
    float* swept = reinterpret_cast<float*>(&other.sweep);
#pragma unroll
    for (int i = 0; i < SWEPT; ++i) swept[i] = float(from[i]);
    take(from + SWEPT + 2, other);
    all = merge(all, other, row);
    spread += from[SPREAD_AT];
    row.z_label = fmaxf(row.z_label, float(from[SWEPT]));
    row.t_label = fmaxf(row.t_label, float(from[SWEPT + 1]));
  }
  row.pivot = origin(row.z_label);
  all.sweep.spread = float(spread - double(row.pivot) * double(call.shard.total));
  return all;
}

// The label need not be here: any logit that is will do.
FASTKD_CALL void choose_pivot(const Call& call, RowState& row) {
  if ((row.flags & SPREAD) && call.vocabulary) row.pivot = origin(z_at(call, call.student, row.student, row.row, 0));
}

// ---- a dense teacher

// What phases before this step would have found, had this process all columns.
FASTKD_CALL void open_shares(const Call& call, int64_t index, RowState& row) {
  open_row(call, index, row);
  Share all = statistics_of_all(call, row, Share{no_statistics<false>(row), -INF, -INF});
  const auto counts = [](float lost, float top, float sum, const Side& side) {
    return exp2_of((lost - origin(top)) * side.rate) > NEGLIGIBLE * sum;
  };
  if (counts(all.t_lost, all.sweep.t_top, all.sweep.t_sum + all.sweep.t_tops, row.teacher)) all.sweep.forward = INF, all.sweep.cross = -INF;
  if (counts(all.s_lost, all.sweep.s_top, all.sweep.s_sum + all.sweep.s_tops, row.student)) all.sweep.reverse = INF;
  // What a side has at the other's top was left out of the moments too, where it is gone.
  if (all.t_lost == all.sweep.t_top) all.sweep.s_at = -INF;
  if (all.s_lost == all.sweep.s_top) all.sweep.t_at = -INF;
  row.statistics_of_all = all.sweep;
  if (!call.shard.all_sums) return;
  double phi = 0, g = 0;
#pragma unroll 1
  for (int64_t process = 0; process < call.shard.processes; ++process) {
    const double* from = call.shard.all_sums + (process * call.rows + row.row) * SUMS;
    phi += from[0];
    g += from[1];
    row.log_0 |= from[2] != 0;
  }
  row.sums_of_all = {float(phi), float(g)};
}

FASTKD_CALL void write_sums(const Call& call, const RowState& row) {
  double* to = call.shard.sums + row.row * SUMS;
  to[0] = row.phi, to[1] = row.g, to[2] = row.log_0;
}

// ---- a sparse teacher

FASTKD_CALL void open_wholes(const Call& call, int64_t index, RowState& row) {
  open_topk_row(call, index, row);
  close_whole(call, row, statistics_of_all(call, row, no_whole(row)));
}

}  // namespace fastkd::cuda
