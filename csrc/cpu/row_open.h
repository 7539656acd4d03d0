// How a row starts: its addresses, its label, its temperatures; what is written for a dropped row.

namespace {

inline bool Row::start(int64_t row) {
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
  if (is_dropped(call_, row)) {
    if (writes) drop();
    return false;
  }
  with_labels_ = needs_cross_entropy(call_);
  if ((with_labels_ || has_label_term(call_)) && (label_ < 0 || label_ >= call_.shard.total)) {
    weight_ = std::nan("");
    label_ = call_.shard.first;
  }
  label_ -= call_.shard.first;
  label_column_ = has_label_term(call_) && label_is_here() ? label_ : -1;
  set_shift(student_, call_.student.dtype, s_adjust_, true);
  set_shift(teacher_, call_.teacher.dtype, t_adjust_, call_.alpha != 0);
  s_temperature_ = temperature(call_.student_tempering);
  t_temperature_ = temperature(call_.teacher_tempering);
  student_softmax_ = Softmax(s_temperature_);
  teacher_softmax_ = Softmax(t_temperature_);
  separate_t1_ = with_labels_ && s_temperature_ != 1;
  moments_ = !call_.closed_form
                 ? 0
                 : (call_.forward != 0) * FORWARD + (call_.reverse != 0) * REVERSE + (call_.cross != 0) * CROSS;
  if (call_.closed_form && !moments_) moments_ = FORWARD;  // its weight is 0, but it shows whether log 0 occurs
  if (call_.student_entropy || (with_labels_ && call_.label_smoothing > 0)) moments_ |= SINGLE;
  log_0_policy_ = false;
  centering_ = 0;
  sure_column_[0] = sure_column_[1] = -1;
  s_skipped_max_ = t_skipped_max_ = -INF;
  return true;
}

// Shifts a row whose logits are all very low. A row of -inf is NaN, unless it is the teacher's and alpha is 0.
inline void Row::set_shift(const char* row, Dtype dtype, Adjustment& adjust, bool counts) {
  adjust.shift = 0;
  if (!needs_statistics() || !call_.normalized || call_.vocabulary == 0) return;
  const float max = low_max(row, dtype, call_.vocabulary, adjust, label_column_);
  if (max == -INF && whole() && counts) weight_ = std::nan("");
  if (max <= FLOOR && max > -INF) adjust.shift = max;
}

// The temperature of this row. An invalid one makes the row NaN.
inline double Row::temperature(const Tempering& tempering) {
  if (!tempering.per_row) return tempering.temperature;
  const float value = tempering.per_row[row_];
  if (value > 0) return value;
  weight_ = std::nan("");
  return 1;
}

inline void Row::clear_padding() const {
  clear(student_gradient_, call_.student.dtype, call_.vocabulary, call_.student.width);
  clear(teacher_gradient_, call_.teacher.dtype, call_.vocabulary, call_.teacher.width);
}

inline void Row::drop() const {
  clear(student_gradient_, call_.student.dtype, 0, call_.vocabulary);
  clear(teacher_gradient_, call_.teacher.dtype, 0, call_.vocabulary);
  for (float* out : {call_.loss, call_.distillation, call_.cross_entropy, call_.student_entropy}) write(out, 0);
}

}  // namespace
