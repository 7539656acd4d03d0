// The start of a row: its options, and where its label is. Also rows that are dropped.
#pragma once
#include "state.h"

namespace fastkd::cuda {

FASTKD_INLINE float finite_max(float max) { return max == -INF ? 0 : max; }

FASTKD_INLINE bool needs_statistics(const Call& call, const RowState& row) {
  return call.normalized || row.with_labels || call.student_entropy || has_label_term(call);
}

FASTKD_PER_ROW void open_side(const Rows& rows, const Tempering& tempering, int64_t row, Side& side, float& weight) {
  side.threshold = side.max = side.origin = 0;
  side.is_far = false;
  side.dtype = rows.dtype;
  side.softcap = float(tempering.softcap);
  side.gain = tempering.softcap == 0 ? 0 : float(tempering.logit_scale / tempering.softcap);
  side.inverse_cap = tempering.softcap == 0 ? 0 : float(1 / tempering.softcap);
  side.sign = tempering.logit_scale < 0 ? -1 : 1;
  side.temperature = tempering.per_row ? tempering.per_row[row] : float(tempering.temperature);
  if (!(side.temperature > 0)) {  // an invalid temperature makes the row NaN
    weight = NAN;
    side.temperature = 1;
  }
  const float scale = tempering.softcap == 0 ? fabsf(float(tempering.logit_scale)) : 1;
  side.unit = scale / side.temperature;
  side.rate = float(side.unit * LOG2_E_EXACT);
}

// Whether the row is opened with statistics of all vocabulary shards (shard.h).
FASTKD_INLINE bool statistics_are_exchanged(const Call& call) { return call.shard.step >= Step::sums; }

// Whether h is summed. A step of shards that only sums is launched without gradients.
FASTKD_INLINE bool wants_sum_of_h(const Call& call) {
  return call.teacher_gradient.data || call.shard.step == Step::sums;
}

// z of a logit in device memory.
FASTKD_PER_ROW float z_at(const Call& call, const Rows& rows, const Side& side, int64_t row, int64_t column) {
  return side.z(load_one(row_address(call, rows, row), rows.dtype, column));
}

FASTKD_INLINE float unit_at_t1(const Tempering& tempering) {
  return tempering.softcap == 0 ? fabsf(float(tempering.logit_scale)) : 1;
}

// Whether the label is in this rank's vocabulary shard.
FASTKD_INLINE bool label_is_here(const Call& call, const RowState& row) {
  return row.label >= 0 && row.label < call.vocabulary;
}

constexpr int NOWHERE = -1;

FASTKD_INLINE int label_column_in_slice(const Call& call, const RowState& row, int rank) {
  const int64_t column = row.label - first_column(call, rank);
  return has_label_term(call) && column >= 0 && column < columns_in_slice(call, rank) ? int(column) : NOWHERE;
}

FASTKD_PER_ROW void open_row(const Call& call, int64_t index, RowState& row) {
  row.flags = 0;
  row.log_0_policy = false;
  row.row = index;
  row.label = call.labels ? call.labels[index] : -1;
  row.weight = call.weight ? call.weight[index] : 1;
  row.with_labels = call.labels && (call.alpha < 1 || call.target == Target::label);
  row.phi = row.g = row.h = row.cross_entropy = row.entropy = 0;
  row.z_label = row.t_label = row.center = 0;
  row.label_term = {};
  row.s_sure = row.t_sure = {false, NAN, 0, 0, 0};
  open_side(call.student, call.student_tempering, index, row.student, row.weight);
  open_side(call.teacher, call.teacher_tempering, index, row.teacher, row.weight);
  row.s_origin = row.t_origin = row.log_ratio_low = row.log_ratio_high = 0;
  row.unit_ratio = row.teacher.unit / row.student.unit;
  row.unit_t1 = unit_at_t1(call.student_tempering);
  row.rate_t1 = float(row.unit_t1 * LOG2_E_EXACT);
  row.teacher_unit_t1 = unit_at_t1(call.teacher_tempering);
  row.teacher_rate_t1 = float(row.teacher_unit_t1 * LOG2_E_EXACT);
  if (row.with_labels || has_label_term(call)) {
    if (row.label < 0 || row.label >= call.shard.total) {
      row.weight = NAN;
      row.label = 0;
    }
    row.label -= call.shard.first;  // column within this vocabulary shard, if it is there
    const bool look = label_is_here(call, row) && !statistics_are_exchanged(call);
    row.z_label = look ? z_at(call, call.student, row.student, index, row.label) : -INF;
    if (has_label_term(call)) row.t_label = look ? z_at(call, call.teacher, row.teacher, index, row.label) : -INF;
    row.center = finite_max(row.z_label);
  }
  if (row.with_labels) {
    if (row.student.temperature != 1) row.flags |= EXP_SUM_T1;
    if (call.label_smoothing > 0) row.flags |= CENTERED_SUM;
  }
  if (call.target == Target::label && row.teacher.temperature != 1) row.flags |= TEACHER_EXP_SUM_T1;
  if (call.closed_form) {
    if (call.forward != 0) row.flags |= FORWARD;
    if (call.reverse != 0) row.flags |= REVERSE;
    if (call.cross != 0) row.flags |= CROSS;
  }
  if (call.student_entropy) row.flags |= ENTROPY;
  if (call.needs_minima) row.flags |= MINIMA;
}

FASTKD_PER_ROW void write_dropped_row(const Call& call, int64_t row, Place place) {
  if (call.shard.step == Step::statistics || call.shard.step == Step::sums) return;
  store_zeros(call, place, call.student_gradient, row, false);
  store_zeros(call, place, call.teacher_gradient, row, false);
  if (place.rank != 0 || place.thread != 0) return;
  for (float* out : {call.loss, call.distillation, call.cross_entropy, call.student_entropy})
    if (out) out[row] = 0;
}

}  // namespace fastkd::cuda
