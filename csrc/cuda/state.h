// What is known about a row: its options, its statistics, and what its gradients need.
#pragma once
#include <type_traits>

#include "vectors.h"

namespace fastkd::cuda {

#include "../generated/divergences.h"

constexpr float LOWEST = std::numeric_limits<float>::lowest();
// As in fastkd/call/log_zero.py
constexpr float NEGLIGIBLE = 1e-30f;
constexpr float INFINITE = 1e6f;

#include "../common/row_math.h"

// Which optional fields of Statistics the first sweep computes.
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
// tempered logit, and rate = unit * log2(e), so that 2^(rate * z) is its exponential.
struct Side {
  Dtype dtype;
  float sign, softcap, gain, inverse_cap, temperature, unit, rate;
  float max;                 // maximum of z, or 0 if all are -inf
  float origin;              // rate * max, rounded
  bool is_far;               // whether exponents are rate (z - max) rather than rate * z - origin (statistics.h, Origin)
  float inverse_sum;         // 2^exponent * inverse_sum is a probability
  float offset, offset_low;  // log probability = unit (z - max) + offset + offset_low, without the exponent's rounding
  float threshold;           // an exponential below it has a negligible probability

  FASTKD_INLINE bool identity() const { return softcap == 0 && sign == 1; }  // whether z is the logit
  FASTKD_INLINE V z(V logit) const { return softcap == 0 ? sign * logit : softcap * tanh(gain * logit); }
  // dz / dlogit. Without a cap, it is the sign of logit_scale, whose magnitude is a factor of unit.
  FASTKD_INLINE V slope(V z) const {
    return softcap == 0 ? sign : softcap * gain * (1 - (z * inverse_cap) * (z * inverse_cap));
  }
};

// All tokens that a sparse teacher does not list, as one event (topk.h).
struct TailEvent {
  unsigned event_flags;    // flags for the sweep over events
  float origin;            // largest z of the listed tokens, which the z of events are relative to
  float max, inverse_sum;  // exp(unit (z - max)) * inverse_sum is a column's share of the tail's probability
  bool is_event;           // whether the tail is an event; z and log_p are the tail's
  float z, log_p;
  float gradient;  // times a column's exponential: the gradient with respect to the column's z
  bool no_events;  // whether the student has no probability on any event
  bool teacher_lists_no_token;
  bool teacher_is_invalid;        // it lists a token twice, or one that does not exist
  const char* log_probabilities;  // the teacher's, for this row
};

// What the first sweep computes. Exponentials and moments are relative to the maxima: x = rate * (z - max) and e = 2^x.
// Columns at a side's maximum are counted and excluded from its sums of exponentials, where they would absorb the
// others.
struct Statistics {
  float s_max, t_max;
  float s_min, t_min;  // smallest z, for logs_overflow (finish.h)
  float s_exp_sum, t_exp_sum, s_exp_sum_t1, t_exp_sum_t1;
  float forward, reverse;          // sums of e_t (x_t - x_s) and of e_s (x_s - x_t)
  float cross, entropy;            // sums of e_t x_s and of e_s x_s
  float centered_sum;              // sum of z - center
  float s_max_count, t_max_count;  // columns at the maxima
  float t_at_s_max, s_at_t_max;    // sum of x_t over the student's maxima, of x_s over the teacher's
};

struct Sums {
  float phi, g, h;  // h is 0 if no teacher's gradient is wanted
};

// The column in which a side has more than half of its probability, if there is one (common/row_math.h).
struct SureColumn {
  bool exists;
  float z;           // NaN if there is none, or if phi or the gradient is not finite
  double rest;       // sum of the other columns' exponentials
  double other_gap;  // the other side's tempered logit in this column, minus its maximum
  float gradient;    // with respect to the tempered logit
};

// How a thread loads whole vectors of a row.
enum class Vectors {
  any,         // with conversions, from any address
  bf16,        // both sides are bf16, z is the logit, and whole vectors are at multiples of PIECE
  fp16_or_fp32  // the same in another dtype
};

struct RowState {
  bool with_labels, log_0_policy, finite;  // log_0_policy: the row is computed again, with the policy for log 0
  Vectors vectors;
  int shift;  // columns from a multiple of PIECE to the first one, if both sides lie alike; else 0
  unsigned flags;
  int64_t row, label;
  int label_column;  // column of the label in this block's slice if there is a label term; else NOWHERE
  float weight;
  float z_label, t_label;  // z of the label, the student's and the teacher's
  float center;             // what centered_sum subtracts from each z
  Side student, teacher;
  // log p - log q = ((t - t_origin) unit_ratio - (s - s_origin)) student.unit + log_ratio_low + log_ratio_high
  float s_origin, t_origin, unit_ratio, log_ratio_low, log_ratio_high;
  float unit_t1, rate_t1, inverse_sum_t1, max_t1;  // the student's softmax at temperature 1, for the cross-entropy
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
