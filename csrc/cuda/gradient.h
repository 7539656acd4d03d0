// The value of a row, and its gradients.
#pragma once
#include "sums.h"

namespace fastkd::cuda {

FASTKD_INLINE void store_value(const Call& call, const RowState& row, double distillation) {
  call.loss[row.row] = float(row_loss(call, distillation, row.cross_entropy, row.with_labels) * row.weight);
  if (call.distillation) call.distillation[row.row] = float(distillation);
  if (call.cross_entropy) call.cross_entropy[row.row] = float(row.cross_entropy);
  if (call.student_entropy) call.student_entropy[row.row] = float(row.entropy);
}

// The teacher's gradient of a cross-entropy is -p (log q - mean), with the mean of log q under p. p log q and p times the
// mean would be rounded before their difference is taken, so this subtracts the mean from log q and leaves the
// projection next to nothing to subtract.
FASTKD_INLINE void center_log_q(const Call& call, RowState& row) {
  if (!is_cross_entropy(call) || !wants_sum_of_h(call) || !finite(float(row.phi))) return;
  Side& side = row.student;
  const double offset = row.phi / call.cross + side.offset + double(side.offset_low);
  side.offset = float(offset);
  side.offset_low = float(offset - side.offset);
  row.h -= call.degree * row.phi;
}

// Writes the value of the row, and sets what its gradients are multiplied by.
FASTKD_PER_ROW void write_value(const Call& call, RowState& row, int rank) {
  const LabelTerm& label_term = row.label_term;
  if (call.closed_form) {
    row.h = call.degree * row.phi - row.g;
    center_log_q(call, row);
  }
  row.phi += label_term.phi;
  row.g += label_term.g;
  row.h += label_term.h;
  double distillation = row.phi * temperature_factor(call, row.student.temperature);
  if (label_term.nll_weight != 0) distillation += label_term.nll_weight * label_term.nll;
  if (call.alpha == 1) row.cross_entropy = 0;
  if (rank == 0) store_value(call, row, distillation);
  const RowScales scales = row_scales(call, row.student.temperature, row.weight, label_term.nll_weight);
  row.sum_g = float(row.g);
  row.sum_h = float(row.h);
  row.distillation_factor = float(scales.distillation * row.student.unit);
  row.teacher_factor = float(scales.distillation * row.teacher.unit);
  row.cross_entropy_factor = float(scales.nll * row.unit_t1);
  // The factor above multiplies this too, but smoothing concerns the cross-entropy alone.
  const double uniform = call.label_smoothing / double(call.shard.total);
  const double cross_entropy_share = cross_entropy_weight(call) / total_nll_weight(call, label_term.nll_weight);
  row.uniform = float(label_term.nll_weight != 0 ? uniform * cross_entropy_share : uniform);
  if (!has_label_term(call)) return;
  const double s = student_label_gradient(call, label_term, scales, row.student.unit, row.unit_t1, row.with_labels);
  const double t = teacher_label_gradient(call, label_term, scales, row.teacher.unit);
  row.label_gradient = float(s) * row.student.slope(row.z_label);
  row.teacher_label_gradient = float(t) * row.teacher.slope(row.t_label);
}

FASTKD_INLINE V cross_entropy_gradient(const Call& call, const RowState& row, V z, int64_t column) {
  const V x = (z - row.max_t1) * row.rate_t1;
  const V target = row.uniform + (column == row.label ? 1 - float(call.label_smoothing) : 0);
  return (exp2_of(x) * row.inverse_sum_t1 - target) * row.cross_entropy_factor;
}

// Replaces the label's gradient, which does not follow from the sums over the other tokens.
FASTKD_INLINE void set_label_gradient(PartialVector vector, V (&x)[VECTOR], float value) {
  for (int k = 0; k < VECTOR; ++k) x[k] = k == vector.lane ? value : x[k];
}
template <Vectors KIND>
FASTKD_INLINE void set_label_gradient(WholeVector<KIND>, V (&)[VECTOR], float) {}

template <class Vector>
FASTKD_INLINE void store(char* memory, Dtype dtype, int first, Vector vector, const V (&x)[VECTOR]) {
  const bool is_fp32 = dtype == Dtype::f32;
  if constexpr (Vector::kind == Vectors::bf16) return store_bf16(memory + int64_t(first) * 2, x);
  if constexpr (Vector::kind == Vectors::fp16_or_fp32)
    return store_fp16_or_fp32(memory + (int64_t(first) << (is_fp32 ? 2 : 1)), is_fp32, x);
  store(memory, dtype, first, ALL_COLUMNS >> (VECTOR - vector.n), x);
}

// A row whose probabilities contain the gradient's factor, which saves a product per column, if the divergence allows it.
template <class Divergence>
FASTKD_INLINE RowState with_factor_in_probabilities(RowState row) {
  if (Divergence::gradient_is_linear && Divergence::always_normalized) {
    row.student.inverse_sum *= row.distillation_factor;
    row.teacher.inverse_sum *= row.distillation_factor;
    row.distillation_factor = 1;
  }
  return row;
}

// Gradients for this thread's vectors in a range of the slice at `student` and `teacher` in shared memory. They are
// stored to the given addresses: in device memory, or over the logits in shared memory, from where copy_out takes them.
// The usual case, whole vectors and the student's gradient alone, has a copy of the row in registers.
template <class Divergence, bool LOG_0>
FASTKD_INLINE void gradients(const Call& call, const RowState& shared, Place place, Range range, Maxima warp_max,
                             const char* student, const char* teacher, char* student_gradient,
                             char* teacher_gradient) {
  const RowState row = with_factor_in_probabilities<Divergence>(shared);
  const bool is_usual =
      !is_large<Divergence> && student_gradient && !teacher_gradient && call.alpha != 0 && !is_far(shared);
  const bool with_sure = may_be_sure(shared, warp_max), with_labels = row.with_labels;
  const int64_t start = first_column(call, place.rank);
  each_vector<!LOG_0>(call, shared, place, range, [&](int first, auto vector) {
    V s[VECTOR], t[VECTOR], out[VECTOR], p, q, phi, g, h;
    load_z(student, row.student, first, vector, s);
    load_z(teacher, row.teacher, first, vector, t);
    const auto student_gradient_at = [&](const RowState& row, auto may_be_far, V s_k, V t_k) {
      evaluate<Divergence, LOG_0, decltype(may_be_far)::value>(call, row, s_k, t_k, p, q, phi, g, h);
      return (is_normalized<Divergence>(call) ? g - q * row.sum_g : g) * row.distillation_factor;
    };
    const auto set_sure_gradient = [&](const V(&z)[VECTOR], const SureColumn& sure, float factor, V(&x)[VECTOR]) {
      for (int k = 0; k < VECTOR; ++k) x[k] = z[k] == sure.z ? sure.gradient * factor : x[k];
    };
    const auto add_cross_entropy_gradient = [&] {
      for (int k = 0; k < VECTOR; ++k) out[k] += cross_entropy_gradient(call, shared, s[k], start + first + k);
    };
    if constexpr (is_whole<decltype(vector)> && !LOG_0)
      if (is_usual) {
        each_column<false>(s, t, [&](int k, V s_k, V t_k) { out[k] = student_gradient_at(row, std::false_type(), s_k, t_k); });
        if (with_sure || with_labels) {
          set_sure_gradient(s, shared.s_sure, shared.distillation_factor, out);
          if (with_labels) add_cross_entropy_gradient();
        }
        return store(student_gradient, row.student.dtype, first, vector, out);
      }
    V teacher_out[VECTOR] = {};
    for (int k = 0; k < VECTOR; ++k) out[k] = 0;
    if (call.alpha != 0) {
      each_column<true>(s, t, [&](int, V s_k, V t_k) {
        shift_in(out, student_gradient_at(shared, std::true_type(), s_k, t_k));
        shift_in(teacher_out,
                 (is_normalized<Divergence>(call) ? h - p * shared.sum_h : h) * shared.teacher_factor);
      });
      set_sure_gradient(s, shared.s_sure, shared.distillation_factor, out);
      set_sure_gradient(t, shared.t_sure, shared.teacher_factor, teacher_out);
    }
    if (with_labels) add_cross_entropy_gradient();
    if (student_gradient) {
      if (!is_whole<decltype(vector)> && !row.student.identity())
        transform_each(out, s, [&](V g, V z) { return g * shared.student.slope(z); });
      set_label_gradient(vector, out, shared.label_gradient);
      store(student_gradient, row.student.dtype, first, vector, out);
    }
    if (teacher_gradient) {
      if (!is_whole<decltype(vector)> && !row.teacher.identity())
        transform_each(teacher_out, t, [&](V h, V z) { return h * shared.teacher.slope(z); });
      set_label_gradient(vector, teacher_out, shared.teacher_label_gradient);
      store(teacher_gradient, row.teacher.dtype, first, vector, teacher_out);
    }
  });
}

}  // namespace fastkd::cuda
