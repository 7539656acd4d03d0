// The scalar maths of a row, in double: what the kernels for CPUs and for GPUs compute once per row.
//
// Include this inside a namespace, after the definitions of FASTKD_INLINE, FASTKD_PER_ROW (the qualifiers of a function
// that runs once per row), NEGLIGIBLE and Loss. Each CPU instruction set includes it in its own namespace: the linker
// would merge functions of a common namespace, and could keep a copy with instructions that the processor does not
// have.

FASTKD_PER_ROW double exponential(double x) { return ::exp(x); }
FASTKD_PER_ROW double logarithm(double x) { return ::log(x); }
FASTKD_PER_ROW double logarithm_1p(double x) { return ::log1p(x); }
FASTKD_PER_ROW double sigmoid(double x) { return 1 / (1 + exponential(-x)); }
FASTKD_PER_ROW double softplus(double x) { return (x > 0 ? x : 0) + logarithm_1p(exponential(x > 0 ? -x : x)); }

// ---- what a row needs

// Whether the divergence compares the label's token separately from the others (fastkd/divergences.py, Target).
FASTKD_INLINE bool has_label_term(const Loss& loss) { return loss.target != Target::none; }

// Whether the kernel needs -log q of the label: for the cross-entropy, or for the label term.
FASTKD_INLINE bool needs_cross_entropy(const Loss& loss) {
  return loss.labels && (loss.alpha < 1 || loss.target == Target::label);
}

// Whether a row is dropped. The logits of a dropped row are never read.
FASTKD_INLINE bool is_dropped(const Loss& loss, int64_t row) {
  return (loss.labels && loss.labels[row] == loss.ignore_index) || (loss.weight && loss.weight[row] == 0);
}

// ---- closed form

// Moments of a row divided by the sum of exponentials, with logits relative to the maxima: the means of t - s under p,
// of s - t under q, and of s under p, where s and t are tempered.
struct MeanMoments {
  double forward, reverse, cross;
};

// Sums of phi and g from the moments. A moment of weight 0 is not read.
FASTKD_INLINE void set_closed_form(const MeanMoments& weights, const MeanMoments& means, double s_log_sum,
                                   double t_log_sum, double& phi, double& g) {
  const double log_quotient = s_log_sum - t_log_sum;
  phi = g = 0;
  if (weights.forward != 0) phi += weights.forward * (means.forward + log_quotient), g -= weights.forward;
  if (weights.reverse != 0) {
    const double reverse = means.reverse - log_quotient;
    phi += weights.reverse * reverse;
    g += weights.reverse * (reverse + 1);
  }
  if (weights.cross != 0) phi += weights.cross * (s_log_sum - means.cross), g -= weights.cross;
}

// Whether the divergence is a multiple of the cross-entropy -sum p log q over all columns.
FASTKD_INLINE bool is_cross_entropy(const Loss& loss) {
  return loss.closed_form && loss.forward == 0 && loss.reverse == 0 && loss.cross != 0 && !has_label_term(loss);
}

// ---- sure columns
//
// A side (the student or the teacher) is sure of a column if its probability there is more than 1/2. Call this column
// a. A sum that contains it has a rounding error in proportion to its term. The student's gradient there,
// g_a - q_a sum g, would be a small difference of two numbers with such errors. Sums therefore exclude the column, and
// the gradient is computed as g_a (1 - q_a) - q_a sum' g, where sum' is over the other columns and 1 - q_a is the sum
// of their probabilities. For the teacher, h and p replace g and q.

// What the gradients of the sure columns depend on if there is a closed form.
struct SureSums {
  double s_rest, t_rest;           // sums of exponentials without the side's sure column
  double s_exp_sum, t_exp_sum;     // the same, including that column
  double forward, reverse, cross;  // moments without the sure columns
  double s_gap, t_gap;             // tempered logit minus max: the student's at the teacher's column, and vice versa
};

// q_a - p_a for the student's sure column a (or p_a - q_a for the teacher's), without cancellation.
FASTKD_INLINE double probability_gap(bool same_column, double rest, double sum, double other_rest, double other_sum,
                                     double other_gap) {
  return same_column ? other_rest / other_sum - rest / sum : 1 / sum - exponential(other_gap) / other_sum;
}

// The gradient of a closed form with respect to the student's tempered logit in its sure column.
FASTKD_INLINE double sure_student_gradient(const Loss& loss, const SureSums& row, bool same_column) {
  const double toward_p = loss.forward + loss.cross;
  double gradient = 0;
  if (toward_p != 0)
    gradient +=
        toward_p * probability_gap(same_column, row.s_rest, row.s_exp_sum, row.t_rest, row.t_exp_sum, row.t_gap);
  if (loss.reverse != 0)
    gradient -= loss.reverse * (row.t_gap * row.s_rest + row.reverse) / row.s_exp_sum / row.s_exp_sum;
  return gradient;
}

// The gradient of a closed form with respect to the teacher's tempered logit in its sure column.
FASTKD_INLINE double sure_teacher_gradient(const Loss& loss, const SureSums& row, bool same_column) {
  double gradient = 0;
  if (loss.reverse != 0)
    gradient +=
        loss.reverse * probability_gap(same_column, row.t_rest, row.t_exp_sum, row.s_rest, row.s_exp_sum, row.s_gap);
  if (loss.forward != 0)
    gradient -= loss.forward * (row.s_gap * row.t_rest + row.forward) / row.t_exp_sum / row.t_exp_sum;
  if (loss.cross != 0) gradient -= loss.cross * (row.s_gap * row.t_rest - row.cross) / row.t_exp_sum / row.t_exp_sum;
  return gradient;
}

// ---- label term

// What the label's token contributes if a divergence compares it separately; all 0 otherwise.
struct LabelTerm {
  double phi, g, h;        // added to the sums over the other tokens; g and h are also the label's own derivatives
  double nll, nll_weight;  // -log q of the label at temperature 1, and its weight in the distillation term
  double rest_t1;          // the student's probability of all other tokens at temperature 1
};

// factor * value, or 0 if the factor is negligible, whatever the value is.
FASTKD_INLINE double negligible_to_0(double factor, double value) { return factor < NEGLIGIBLE ? 0 : factor * value; }

// The divergence between the binary distributions (label, all other tokens) of the teacher and the student, from their
// log-odds. It is the same as in label_term of fastkd/backends/reference.py.
FASTKD_INLINE void set_binary_label_term(LabelTerm& term, double weight, double p_log_odds, double q_log_odds) {
  const double p = sigmoid(p_log_odds), p_rest = sigmoid(-p_log_odds);
  const double q = sigmoid(q_log_odds), q_rest = sigmoid(-q_log_odds);
  const double gap = softplus(-q_log_odds) - softplus(-p_log_odds);
  const double rest_gap = softplus(q_log_odds) - softplus(p_log_odds);
  term.phi = negligible_to_0(weight, negligible_to_0(p, gap) + negligible_to_0(p_rest, rest_gap));
  // q - p, computed from the other tokens' probabilities if q is above 1/2, because two numbers near 1 would cancel.
  term.g = weight * (q_log_odds > 0 ? p_rest - q_rest : q - p);
  term.h = negligible_to_0(weight, negligible_to_0(p * p_rest, p_log_odds - q_log_odds));
}

// The student's entropy, from the label's log-odds and the entropy of the distribution over the other tokens.
FASTKD_INLINE double entropy_with_label(double q_log_odds, double rest_entropy) {
  const double q = sigmoid(q_log_odds), q_rest = sigmoid(-q_log_odds);
  return negligible_to_0(q, softplus(-q_log_odds)) +
         negligible_to_0(q_rest, softplus(q_log_odds)) + q_rest * rest_entropy;
}

// ---- the value of a row, and the scales of its gradients

// The cross-entropy with label smoothing. label_gap is the label's z - max, and mean_gap the mean of z - max over
// the vocabulary.
FASTKD_INLINE double smoothed_cross_entropy(double smoothing, double log_sum_t1, double label_gap, double mean_gap,
                                            double unit_t1) {
  double target = (1 - smoothing) * label_gap;
  if (smoothing > 0) target += smoothing * mean_gap;
  return log_sum_t1 - target * unit_t1;
}

FASTKD_INLINE double temperature_factor(const Loss& loss, double temperature) {
  return loss.scale_by_temperature ? temperature * temperature : 1;
}

// The factor of the cross-entropy in the loss; Options in fastkd/call/options.py has the same property.
FASTKD_INLINE double cross_entropy_weight(const Loss& loss) { return 1 - loss.alpha; }

// The loss of a row, not yet multiplied by its weight.
FASTKD_INLINE double row_loss(const Loss& loss, double distillation, double cross_entropy, bool with_labels) {
  const double value = loss.alpha == 0 ? 0 : loss.alpha * distillation;
  return with_labels && loss.alpha < 1 ? value + cross_entropy_weight(loss) * cross_entropy : value;
}

// The weight of -log q of the label, in the cross-entropy and in the label term together.
FASTKD_INLINE double total_nll_weight(const Loss& loss, double nll_weight) {
  return cross_entropy_weight(loss) + (loss.alpha == 0 ? 0 : loss.alpha * nll_weight);
}

// Factors of the gradients of a row. The comments say what each factor multiplies.
struct RowScales {
  double distillation;   // derivatives of the divergence with respect to the tempered logits
  double cross_entropy;  // the smoothed label in the cross-entropy's gradient
  double nll;            // q at temperature 1, in the gradient of -log q
};

FASTKD_INLINE RowScales row_scales(const Loss& loss, double temperature, double weight, double nll_weight) {
  const double scale = weight * loss.scale * (loss.scale_on_device ? *loss.scale_on_device : 1);
  return {loss.alpha * temperature_factor(loss, temperature) * scale, cross_entropy_weight(loss) * scale,
          total_nll_weight(loss, nll_weight) * scale};
}

// The loss's gradient with respect to the student's z of the label, if there is a label term. unit is the derivative of
// the tempered logit with respect to z, and unit_t1 the same at temperature 1.
FASTKD_INLINE double student_label_gradient(const Loss& loss, const LabelTerm& term, const RowScales& scales,
                                            double unit, double unit_t1, bool with_labels) {
  double gradient = loss.alpha == 0 ? 0 : term.g * scales.distillation * unit;
  if (!with_labels) return gradient;
  const double smoothed = loss.label_smoothing * (1 - 1 / double(loss.shard.total));
  return gradient + (scales.cross_entropy * smoothed - scales.nll * term.rest_t1) * unit_t1;
}

// The loss's gradient with respect to the teacher's z of the label, if there is a label term.
FASTKD_INLINE double teacher_label_gradient(const Loss& loss, const LabelTerm& term, const RowScales& scales,
                                            double unit) {
  return loss.alpha == 0 ? 0 : term.h * scales.distillation * unit;
}
