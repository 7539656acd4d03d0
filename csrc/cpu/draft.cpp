// The loss of a draft model on the CPU: every term of a weighted sum, the acceptance and the gradient of the sum, in
// one visit to each row (fastkd/call/draft.py has the contract).
//
//   statistics   maximum and sum of exponentials of each block of both sides, merged in double, in block order
//   sums         the sums over columns that the terms need, all in one sweep
//   gradient     the gradient of the weighted sum, whose coefficients may depend on the sums
//
// Let q be the draft model's probabilities, p the target's among the draft tokens, m the mass that the target gives to
// these tokens, and r = log p - log q. With s = 1/2 sign(q - m p), the gradient with respect to a logit is
//
//   forward_kl      q - p
//   reverse_kl      q (-r - KL(q || p))
//   jsd             g - q sum(g)       g: the derivative of JSD's term with respect to log q (fastkd/divergences.py)
//   tvd             q (s - sum(q s))
//   cross_entropy   q, minus 1 in the column of the target's most probable token
//
// The negative log of the acceptance and the LK hybrid are functions of these values, so they change only the
// coefficients. The exponentials of a row stay in scratch memory. Each sweep converts the logits again, but reads them
// from the cache if the row fits in it. If a sum is not finite, the sums are repeated with the policy for log 0.
//
// A column whose logit equals the maximum contributes exactly 1 to the sum of exponentials. `rest` is the sum without
// one such column; the logarithm of the whole sum is log1p(rest). If the draft model gives a column more than 4/5 of
// its probability, that column's gradient is minus the sum of the others, because q - p would have lost its digits.

#include "kernel.h"

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#pragma GCC diagnostic ignored "-Wunused-function"  // only part of the headers is used here

namespace fastkd::FASTKD_ISA {

#include "vec.h"

#include "../generated/divergences.h"

#include "load_store.h"
#include "softmax.h"
#include "log_zero.h"

namespace {

// What a sweep computes: bits of a template parameter.
enum Needs { LOGS = 1, JSD = 2, ACCEPTANCE = 4 };

constexpr float LOWEST_ACCEPTANCE = 1e-5f;  // as in fastkd/call/draft.py
constexpr double SURE = 0.25;               // the sum of the other exponentials, if one column has 4/5

// A block as the kernels see it.
struct DraftView {
  const float *s, *t, *s_exp, *t_exp;
  float* g;                  // of JSD: written by the sums, read by the gradient
  float s_weight, t_weight;  // q = s_exp * s_weight
  // r = ((t - t_origin) - (s - s_origin)) + ratio_high + ratio_low, as in softmax.h
  float s_origin, t_origin, ratio_high, ratio_low;
  float mass, log_mass;  // m
};

struct Columns {
  V s, t, p, q, r;

  FASTKD_INLINE Columns(const DraftView& view, int i)
      : s(load(view.s + i)), t(load(view.t + i)), p(load(view.t_exp + i) * view.t_weight),
        q(load(view.s_exp + i) * view.s_weight),
        r((((t - view.t_origin) - (s - view.s_origin)) + view.ratio_high) + view.ratio_low) {}

  // phi and g of a divergence that uses no logarithm but r. log p and log q are needed only to find -inf, so the logits
  // are passed in their place.
  template <class Divergence, bool LOG_0>
  FASTKD_INLINE void evaluate(V& phi, V& g) const {
    V h;
    evaluate_terms<Divergence, LOG_0>(p, q, t, s, r, nullptr, 1, phi, g, h);
  }

  // log(m p) - log q. It is NaN where both logits are -inf, so comparisons with 0 are false there.
  FASTKD_INLINE V accepted_ratio(const DraftView& view) const { return r + view.log_mass; }
};

// 1/2 sign(q - m p), given log m p - log q.
FASTKD_INLINE V half_sign(V ratio) {
  return where(ratio < 0.0f, splat(0.5f), V{}) - where(ratio > 0.0f, splat(0.5f), V{});
}

struct DraftSums {
  double forward = 0, reverse = 0, jsd = 0, jsd_g = 0, acceptance = 0, distance = 0, sign = 0, q = 0;

  void operator+=(const DraftSums& block) {
    forward += block.forward;
    reverse += block.reverse;
    jsd += block.jsd;
    jsd_g += block.jsd_g;
    acceptance += block.acceptance;
    distance += block.distance;
    sign += block.sign;
    q += block.q;
  }
  // Arithmetic on -inf gives NaN or infinity exactly where the policy for log 0 matters.
  bool finite() const { return std::isfinite(forward + reverse + jsd + jsd_g); }
};

struct DraftLanes {
  V forward{}, reverse{}, jsd{}, jsd_g{}, acceptance{}, distance{}, sign{}, q{};

  FASTKD_INLINE void operator+=(const DraftLanes& strip) {
    forward += strip.forward;
    reverse += strip.reverse;
    jsd += strip.jsd;
    jsd_g += strip.jsd_g;
    acceptance += strip.acceptance;
    distance += strip.distance;
    sign += strip.sign;
    q += strip.q;
  }
};

// The sums over a block. Padding columns have p = q = 0, and terms of 0.
template <int NEEDS, bool LOG_0>
DraftSums draft_sums(const DraftView& of, int n) {
  const DraftView view = of;
  DraftLanes lanes;
  for (int start = 0; start < n; start += STRIP) {
    DraftLanes strip;
    for (int i = start; i < std::min(start + STRIP, n); i += LANES) {
      const Columns at(view, i);
      V phi, g;
      if (NEEDS & LOGS) {
        at.evaluate<forward_kl, LOG_0>(phi, g);
        strip.forward += phi;
        at.evaluate<reverse_kl, LOG_0>(phi, g);
        strip.reverse += phi;
      }
      if (NEEDS & JSD) {
        at.evaluate<even_jsd, LOG_0>(phi, g);
        strip.jsd += phi;
        strip.jsd_g += g;
        store(view.g + i, g);
      }
      if (NEEDS & ACCEPTANCE) {
        const V ratio = at.accepted_ratio(view), accepted = at.p * view.mass;
        strip.acceptance += at_most(accepted, at.q);
        strip.distance += where(ratio < 0.0f, distance(accepted, at.q, ratio), V{});
        strip.sign += at.q * half_sign(ratio);
        strip.q += at.q;
      }
    }
    lanes += strip;
  }
  return {sum_lanes(lanes.forward), sum_lanes(lanes.reverse), sum_lanes(lanes.jsd), sum_lanes(lanes.jsd_g),
          sum_lanes(lanes.acceptance), sum_lanes(lanes.distance), sum_lanes(lanes.sign), sum_lanes(lanes.q)};
}

// The factors of the gradient's parts, equal in all columns: of q, p, reverse KL's phi, JSD's g and q half_sign.
struct Coefficients {
  float q, p, reverse, jsd, sign;
};

template <int NEEDS, bool LOG_0>
void draft_gradient(const DraftView& of, int n, const Coefficients& by, float* out) {
  const DraftView view = of;
  const Coefficients factor = by;
#pragma GCC unroll 2
  for (int i = 0; i < n; i += LANES) {
    const Columns at(view, i);
    V value = at.q * factor.q - at.p * factor.p, phi, g;
    if (NEEDS & LOGS) {
      at.evaluate<reverse_kl, LOG_0>(phi, g);
      value += phi * factor.reverse;
    }
    if (NEEDS & JSD) value += load(view.g + i) * factor.jsd;
    if (NEEDS & ACCEPTANCE) value += at.q * half_sign(at.accepted_ratio(view)) * factor.sign;
    store(out + i, value);
  }
}

using SumsKernel = decltype(&draft_sums<0, false>);
using DraftGradientKernel = decltype(&draft_gradient<0, false>);

#define FASTKD_BY_NEEDS(kernel)                                                                    \
  {{kernel<0, false>, kernel<1, false>, kernel<2, false>, kernel<3, false>, kernel<4, false>,      \
    kernel<5, false>, kernel<6, false>, kernel<7, false>},                                         \
   {kernel<0, true>, kernel<1, true>, kernel<2, true>, kernel<3, true>, kernel<4, true>,           \
    kernel<5, true>, kernel<6, true>, kernel<7, true>}}
constexpr SumsKernel SUMS_KERNELS[2][8] = FASTKD_BY_NEEDS(draft_sums);
constexpr DraftGradientKernel GRADIENT_KERNELS[2][8] = FASTKD_BY_NEEDS(draft_gradient);
#undef FASTKD_BY_NEEDS

// The statistics of one side's block. Columns at the maximum are counted, the others are summed.
struct SideBlock {
  float max;
  double ones, others;
};

// Computes the sums of exponentials, and stores the exponentials if e is not null. next: what to prefetch.
template <bool STORE>
void draft_exponentials(const float* z, int n, const char* next, int width, float* e, SideBlock& out) {
  const V max = splat(out.max);
  V ones{}, others{};
  for (int start = 0; start < n; start += STRIP) {
    V ones_strip{}, others_strip{};
    for (int i = start; i < std::min(start + STRIP, n); i += LANES) {
      __builtin_prefetch(next + i * width, 0, 2);
      const V gap = load(z + i) - max;
      const V power = UNTEMPERED.exponential(gap);
      if (STORE) store(e + i, power);
      const I is_maximum = gap == 0.0f;
      ones_strip += where(is_maximum, splat(1), V{});
      others_strip += where(is_maximum, V{}, power);
    }
    ones += ones_strip;
    others += others_strip;
  }
  out.ones = sum_lanes(ones);
  out.others = sum_lanes(others);
}

// One side of a row: its logits and its statistics.
struct Side {
  const char* logits = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t columns = 0;
  Adjustment adjust;
  double max = 0, rest = 0, log_sum = 0;  // rest: the sum of exponentials without one at the maximum
  std::vector<SideBlock> blocks;

  int width(int64_t b) const { return int(std::min<int64_t>(BLOCK, columns - b * BLOCK)); }

  const float* load_at(int64_t b, float* scratch) const {
    return load_block(logits, dtype, b * BLOCK, width(b), adjust, scratch);
  }

  void open(const char* row, Dtype of, int64_t count) {
    logits = row, dtype = of, columns = count;
    adjust = {};
    adjust.shift = low_max(row, of, count, adjust);
    blocks.resize((count + BLOCK - 1) / BLOCK);
  }

  // Whether all logits are -inf.
  bool empty() const { return adjust.shift == -INF; }

  // exponentials: [blocks, BLOCK], or null if they are not wanted.
  void statistics(float* exponentials, float* scratch) {
    const int bytes = element_size(dtype);
    for (int64_t b = 0; b < int64_t(blocks.size()); ++b) {
      const float* z = load_at(b, scratch);
      const int n = padded(width(b));
      const char* next = logits + std::min((b + 1) * BLOCK, columns - width(b)) * bytes;
      blocks[b].max = maximum_of(z, n);
      if (exponentials)
        draft_exponentials<true>(z, n, next, bytes, exponentials + b * BLOCK, blocks[b]);
      else
        draft_exponentials<false>(z, n, next, bytes, nullptr, blocks[b]);
    }
    max = -INF;
    for (const SideBlock& block : blocks) max = std::max(max, double(block.max));
    bool left_out = false;
    rest = 0;
    for (const SideBlock& block : blocks) {
      const bool leaves_out = !left_out && block.max == max && block.ones >= 1;
      left_out |= leaves_out;
      rest += std::exp(block.max - max) * ((leaves_out ? block.ones - 1 : block.ones) + block.others);
    }
    log_sum = left_out ? std::log1p(rest) : std::log(rest);
  }

  // The first column of the maximum; -1 if there is none.
  int64_t argmax(float* scratch) const {
    for (int64_t b = 0; b < int64_t(blocks.size()); ++b) {
      if (blocks[b].max != max) continue;
      const float* z = load_at(b, scratch);
      for (int i = 0; i < width(b); ++i)
        if (z[i] == max) return b * BLOCK + i;
    }
    return -1;
  }

  double at(int64_t column) const {
    alignas(64) float z[LANES];
    return load_block(logits, dtype, column, 1, adjust, z)[0];
  }

  // The factor that turns the exponentials of a block into probabilities.
  double weight(int64_t b) const { return std::exp(blocks[b].max - max - log_sum); }
};

class DraftRow {
 public:
  explicit DraftRow(const DraftCall& call) : call_(call), blocks_((call.vocabulary + BLOCK - 1) / BLOCK) {
    for (int k = 0; k < DRAFT_TERMS; ++k) wanted_[k] = call.terms[k] || call.weights[k] > 0;
    const bool hybrid = wanted_[LK_HYBRID];
    of_acceptance_ = call.acceptance || wanted_[TVD] || wanted_[NLA] || hybrid;
    const bool logs = wanted_[FORWARD_KL] || wanted_[REVERSE_KL] || hybrid;
    needs_ = logs * LOGS | wanted_[JENSEN_SHANNON] * JSD | of_acceptance_ * ACCEPTANCE;
    const int64_t columns = blocks_ * BLOCK;
    const int arrays = wanted_[JENSEN_SHANNON] ? 3 : 2;
    memory_.resize(arrays * columns);
    s_exp_ = memory_.data(), t_exp_ = s_exp_ + columns;
    g_ = arrays == 3 ? t_exp_ + columns : nullptr;
    if (call.columns) gathered_.resize(call.vocabulary * element_size(call.teacher.dtype));
    past_cache_ = call.rows * call.vocabulary * element_size(call.gradient.dtype) >= STREAM_BYTES;
  }

  void run(int64_t row) {
    row_ = row;
    weight_ = call_.weight ? call_.weight[row] : 1;
    gradient_ = place(call_.gradient);
    if (weight_ == 0) return drop();
    student_.open(place(call_.student), call_.student.dtype, call_.vocabulary);
    open_target();
    statistics();
    policy_ = false;
    if (needs_ && !sums()) {
      policy_ = true;
      sums();
    }
    values();
    results();
    if (gradient_) gradient();
  }

 private:
  char* place(const Rows& rows) const {
    return rows.data ? rows.data + row_offset(rows, call_.sizes, row_) * element_size(rows.dtype) : nullptr;
  }

  void open_target() {
    const char* row = place(call_.teacher);
    const int width = element_size(call_.teacher.dtype);
    log_mass_ = 0;
    if (!call_.columns) return target_.open(row, call_.teacher.dtype, call_.vocabulary);
    auto gather = [&](auto type) {
      using T = decltype(type);
      const T* from = reinterpret_cast<const T*>(row);
      T* to = reinterpret_cast<T*>(gathered_.data());
      for (int64_t i = 0; i < call_.vocabulary; ++i) to[i] = from[call_.columns[i]];
    };
    width == 4 ? gather(uint32_t{}) : gather(uint16_t{});
    target_.open(gathered_.data(), call_.teacher.dtype, call_.vocabulary);
  }

  void statistics() {
    student_.statistics(s_exp_, scratch_s_);
    empty_ = target_.empty();
    if (empty_) target_.adjust.shift = 0;  // every draft token has probability 0: nothing is accepted
    target_.statistics(t_exp_, scratch_t_);
    if (empty_) target_.max = target_.log_sum = 0, log_mass_ = -INF;
    if (!call_.columns || !of_acceptance_ || empty_) return;
    whole_.open(place(call_.teacher), call_.teacher.dtype, call_.teacher.width);
    whole_.statistics(nullptr, scratch_t_);
    const double among_draft = target_.max + target_.adjust.shift + target_.log_sum;
    log_mass_ = std::min(among_draft - (whole_.max + whole_.adjust.shift + whole_.log_sum), 0.0);
  }

  DraftView view(int64_t b) {
    DraftView v{};
    v.s = student_.load_at(b, scratch_s_);
    v.t = target_.load_at(b, scratch_t_);
    v.s_exp = s_exp_ + b * BLOCK;
    v.t_exp = t_exp_ + b * BLOCK;
    v.g = g_ ? g_ + b * BLOCK : nullptr;
    v.s_weight = float(student_.weight(b));
    v.t_weight = empty_ ? 0 : float(target_.weight(b));
    double ratio = (student_.max - target_.max) + (student_.log_sum - target_.log_sum);
    // The origins are 0 if the sides are close and neither gives most of its probability to one column. Otherwise they
    // are the maxima, so that r of a column that has both maxima has no rounding error.
    if (std::abs(ratio) >= CLOSE_LOGITS || student_.rest < 1 || target_.rest < 1) {
      v.s_origin = float(student_.max);
      v.t_origin = float(target_.max);
      ratio = student_.log_sum - target_.log_sum;
    }
    v.ratio_high = float(ratio);
    v.ratio_low = float(ratio - v.ratio_high);
    v.mass = float(std::exp(log_mass_));
    v.log_mass = float(log_mass_);
    return v;
  }

  // False if a sum is not finite.
  bool sums() {
    const SumsKernel kernel = SUMS_KERNELS[policy_][needs_];
    sums_ = {};
    for (int64_t b = 0; b < blocks_; ++b) sums_ += kernel(view(b), padded(student_.width(b)));
    return sums_.finite();
  }

  // The terms, from the sums.
  void values() {
    const double undefined = empty_ ? std::nan("") : 0;  // no renormalized p exists
    value_[FORWARD_KL] = sums_.forward + undefined;
    value_[REVERSE_KL] = sums_.reverse + undefined;
    value_[JENSEN_SHANNON] = sums_.jsd + undefined;
    if (wanted_[CROSS_ENTROPY]) {
      label_ = std::max<int64_t>(empty_ ? 0 : target_.argmax(scratch_t_), 0);
      value_[CROSS_ENTROPY] = student_.log_sum + (student_.max - student_.at(label_));
      if (std::isnan(target_.log_sum)) value_[CROSS_ENTROPY] = target_.log_sum;
    }
    // Comparisons may have lost a NaN among the logits.
    const double nan = student_.log_sum + target_.log_sum + log_mass_;
    acceptance_ = std::isnan(nan) ? nan : sums_.acceptance;
    value_[TVD] = std::isnan(nan) ? nan : sums_.distance;
    value_[NLA] = -std::log(acceptance_ < LOWEST_ACCEPTANCE ? double(LOWEST_ACCEPTANCE) : acceptance_);
    share_ = std::exp(-call_.eta * acceptance_);
    value_[LK_HYBRID] = share_ * value_[FORWARD_KL] + (1 - share_) * value_[TVD];
  }

  void results() {
    double loss = 0;
    for (int k = 0; k < DRAFT_TERMS; ++k) {
      if (call_.terms[k]) call_.terms[k][row_] = float(value_[k]);
      if (call_.weights[k] > 0) loss += call_.weights[k] * value_[k];
    }
    call_.loss[row_] = float(weight_ * loss);
    if (call_.acceptance) call_.acceptance[row_] = float(acceptance_);
  }

  void gradient() {
    const double* const weights = call_.weights;
    const double scale = weight_ * call_.scale * (call_.scale_on_device ? *call_.scale_on_device : 1);
    double forward = weights[FORWARD_KL], sign = weights[TVD];
    if (weights[LK_HYBRID] > 0) {
      forward += weights[LK_HYBRID] * share_;
      sign += weights[LK_HYBRID] * (1 - share_);
    }
    // `!(a < b)` instead of `a >= b`, so that a NaN acceptance makes the gradient NaN.
    if (weights[NLA] > 0 && !(acceptance_ < LOWEST_ACCEPTANCE)) sign += weights[NLA] / acceptance_;
    const double reverse = weights[REVERSE_KL], jensen_shannon = weights[JENSEN_SHANNON], hard = weights[CROSS_ENTROPY];
    double of_q = forward + hard;
    if (reverse > 0) of_q -= reverse * value_[REVERSE_KL];
    if (jensen_shannon > 0) of_q -= jensen_shannon * sums_.jsd_g;
    // Dividing by the sum of q, which is 1 but for rounding, makes the gradient exactly 0 if q > m p in all columns.
    if (sign != 0) of_q -= sign * sums_.sign / sums_.q;
    if (empty_ && (forward > 0 || reverse > 0 || jensen_shannon > 0)) of_q = std::nan("");
    const int needs = (reverse > 0) * LOGS | (jensen_shannon > 0) * JSD | (sign != 0) * ACCEPTANCE;
    const Coefficients by{float(scale * of_q), float(scale * forward), float(scale * reverse),
                          float(scale * jensen_shannon), float(scale * sign)};
    const DraftGradientKernel kernel = GRADIENT_KERNELS[policy_][needs];
    const int64_t sure = student_.rest < SURE ? student_.argmax(scratch_s_) : -1;
    double others = 0;
    // From the last block to the first, because the last ones are still in the cache.
    for (int64_t b = blocks_ - 1; b >= 0; --b) {
      const int n = student_.width(b);
      kernel(view(b), padded(n), by, out_);
      const int64_t label = label_ - b * BLOCK;
      if (hard > 0 && label >= 0 && label < n) out_[label] -= float(scale * hard);
      if (sure >= 0) others += sum_without(out_, n, sure - b * BLOCK);
      store_block(gradient_, call_.gradient.dtype, b * BLOCK, n, out_, past_cache_);
    }
    if (sure < 0) return;
    alignas(64) float value[LANES] = {float(-others)};
    store_block(gradient_, call_.gradient.dtype, sure, 1, value, false);
  }

  // The sum of n numbers, except the one in `column` if it is one of the n. Sets the padding to 0.
  static double sum_without(float* x, int n, int64_t column) {
    const bool here = column >= 0 && column < n;
    const float kept = here ? std::exchange(x[column], 0.0f) : 0;
    std::fill(x + n, x + padded(n), 0.0f);
    V sum{};
    for (int i = 0; i < n; i += LANES) sum += load(x + i);
    if (here) x[column] = kept;
    return sum_lanes(sum);
  }

  void drop() const {
    if (gradient_) std::memset(gradient_, 0, call_.vocabulary * element_size(call_.gradient.dtype));
    call_.loss[row_] = 0;
    if (call_.acceptance) call_.acceptance[row_] = 0;
    for (float* term : call_.terms)
      if (term) term[row_] = 0;
  }

  const DraftCall& call_;
  const int64_t blocks_;
  bool wanted_[DRAFT_TERMS], of_acceptance_, past_cache_;
  int needs_;
  std::vector<float> memory_;
  std::vector<char> gathered_;
  float *s_exp_, *t_exp_, *g_;  // [blocks, BLOCK]; g_ only for JSD
  alignas(64) float scratch_s_[BLOCK], scratch_t_[BLOCK], out_[BLOCK];

  // The current row.
  int64_t row_ = 0, label_ = -1;
  char* gradient_ = nullptr;
  double weight_ = 1, log_mass_ = 0;
  bool policy_ = false, empty_ = false;
  Side student_, target_, whole_;  // target_: among the draft tokens; whole_: among all
  DraftSums sums_;
  double value_[DRAFT_TERMS] = {}, acceptance_ = 0, share_ = 0;
};

}  // namespace

void draft_rows(const DraftCall& call) {
  const int64_t width = std::max(call.vocabulary, call.teacher.width);
  const int threads = call.rows * width < 4 * BLOCK ? 1 : int(std::min<int64_t>(call.threads, call.rows));
  const int64_t chunk = std::max({int64_t(1), 4 * BLOCK / width, call.rows / (16 * threads)});
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    FlushSubnormals guard;
    DraftRow row(call);
#pragma omp for schedule(dynamic, chunk)
    for (int64_t i = 0; i < call.rows; ++i) row.run(i);
  }
}

}  // namespace fastkd::FASTKD_ISA
