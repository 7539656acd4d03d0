// What is known about a row: its options, its statistics, and what its gradients need.
#pragma once
#include <type_traits>

#include "vectors.h"

namespace fastkd::cuda {

#include "../generated/divergences.h"

constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float NEGLIGIBLE = 1e-30f;  // as in fastkd/backends/reference.py
constexpr float INFINITE = 1e6f;

#include "../common/row_math.h"

// What the first sweep computes for a row.
enum Flags : unsigned {
  FORWARD = 1,
  REVERSE = 2,
  CROSS = 4,
  ENTROPY = 8,
  EXP_SUM_T1 = 16,
  CENTERED_SUM = 32,
  MINIMA = 64,
  TEACHER_EXP_SUM_T1 = 128
};

// One side, student or teacher. z = softcap * tanh(gain * logit), or sign * logit without a cap. unit * z is the
// tempered logit, and rate * z the same to base 2.
struct Side {
  Dtype dtype;
  float sign, softcap, gain, inverse_cap, temperature, unit, rate;
  float max;                 // maximum of z, or 0 if all are -inf
  float weight;              // 1 / exp_sum: 2^(rate (z - max)) * weight is a probability
  float offset, offset_low;  // log probability = unit (z - max) + offset + offset_low
  float threshold;           // an exponential below it has a negligible probability

  FASTKD_INLINE bool identity() const { return softcap == 0 && sign == 1; }  // whether z is the logit
  FASTKD_INLINE V z(V logit) const { return softcap == 0 ? sign * logit : softcap * tanh(gain * logit); }
  // dz / dlogit; unit contains the magnitude of logit_scale
  FASTKD_INLINE V slope(V z) const {
    return softcap == 0 ? sign : softcap * gain * (1 - (z * inverse_cap) * (z * inverse_cap));
  }
};

// All tokens that a sparse teacher does not list, as one event (topk.h).
struct TailEvent {
  unsigned event_flags;  // flags for the sweep over events
  float origin;          // z of the largest listed token: the z of events are relative to it
  float max, weight;     // exp(unit (z - max)) * weight is a column's share of the tail's probability
  bool is_event;         // whether all other tokens form one last event, which z and log_p describe
  float z, log_p;
  float gradient;  // times a column's exponential, the gradient by the column's z
  bool no_events;
  bool teacher_is_silent, teacher_is_invalid;  // it lists no token; it lists one twice, or one that does not exist
  const char* log_probabilities;               // the teacher's, for this row
};

// What the first sweep computes. Exponentials and moments are relative to the maxima; x = rate * (z - max), to base 2.
// Columns at a side's maximum are counted and excluded from its sums of exponentials, where they would absorb the
// others.
struct Statistics {
  float s_max, t_max;
  float s_min, t_min;  // least z: needed if the gradient takes logarithms that no sum has seen
  float s_exp_sum, t_exp_sum, s_exp_sum_t1, t_exp_sum_t1;
  float forward, reverse;          // sums of e_t (x_t - x_s) and of e_s (x_s - x_t)
  float cross, entropy;            // sums of e_t x_s and of e_s x_s
  float centered_sum;              // sum of z - pivot
  float s_max_count, t_max_count;  // columns at the maxima
  float t_at_s_max, s_at_t_max;    // sum of x_t over the student's maxima, of x_s over the teacher's
};

struct Sums {
  float phi, g, h;  // h is 0 if no teacher's gradient is wanted
};

// The column in which a side has more than half of its probability, if there is one (common/row_math.h).
struct SureColumn {
  bool exists;
  float z;           // NaN if there is none
  double rest;       // sum of the other columns' exponentials
  double other_gap;  // the other side's tempered logit in this column, minus its maximum
  float gradient;    // by the tempered logit
};

struct RowState {
  bool with_labels, log_0_policy, finite;  // log_0_policy: the row is computed again, with the policy for log 0
  bool aligned_bf16;  // both sides are bf16, need no conversion to z, and lie at multiples of PIECE
  unsigned flags;
  int64_t row, label;
  int label_column;  // column of the label in this block's slice if there is a label term; else NOWHERE
  float weight;
  float z_label, t_label;  // z of the label, the student's and the teacher's
  float pivot;             // what centered_sum subtracts from each z
  Side student, teacher;
  // log p - log q = ((t - t_origin) ratio - (s - s_origin)) student.unit + ratio_low + ratio_high
  float s_origin, t_origin, ratio, ratio_low, ratio_high;
  float unit_t1, rate_t1, weight_t1, max_t1;  // the student's softmax at temperature 1, for the cross-entropy
  float teacher_unit_t1, teacher_rate_t1;
  double phi, g, h;  // sums over the row
  double cross_entropy, entropy;
  float sum_g, sum_h;
  float distillation_factor, cross_entropy_factor, teacher_factor, uniform;  // uniform: smoothing per column
  LabelTerm label_term;
  SureColumn s_sure, t_sure;
  float label_gradient, teacher_label_gradient;  // of the label's column, if there is a label term
  TailEvent tail;
  Statistics statistics;  // of the whole row
  Sums sums;
};

}  // namespace fastkd::cuda
