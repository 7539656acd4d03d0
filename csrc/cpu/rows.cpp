// The row loss and its gradient on the CPU. Compiled once for each instruction set, into its own namespace.
//
// A row is cut into blocks of 2048 columns, and a row is three phases over its blocks:
//
//   statistics   maximum, sum of exponentials and moments of each block;  merged in double, in block order
//   sums         of phi and g, where no closed form gives them;           merged likewise
//   gradient     written block by block
//
// A block's numbers do not depend on who computes it, so the result is bitwise the same for any number of threads:
// threads share the rows, or the blocks of a row where there are fewer rows than threads. The exponentials of the
// first phase are kept in scratch memory while a row of them fits in the cache. Then the gradient of a row, which
// waits for memory, runs alongside the statistics of the next, which wait for arithmetic: see PendingGradient.
// Otherwise they are computed again, last block first, since its logits are still in the cache.
//
// Phases are optimistic about log 0: arithmetic on -inf gives NaN exactly where the policy of
// fastkd/reference.py (evaluate) matters, and a row whose merged sums are not finite is done again with the policy.

#include "kernel.h"

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

namespace fastkd::FASTKD_ISA {

#include "vec.h"

#include "../generated/divergences.h"

namespace {

constexpr int BLOCK = 2048;
constexpr int STRIP = 16 * LANES;
// Scratch for exponentials, a thread: with the logits streaming through, this stays in a 2 MB second-level cache.
constexpr int64_t SCRATCH_BYTES = 5 << 18;
constexpr int64_t AHEAD = 4;  // blocks between what is asked of memory and what is computed on
constexpr int64_t STREAM_BYTES = 4 << 20;  // gradients from this size on are written past the cache
constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float FLOOR = -1e30f;      // the least maximum of a block, so that a block of -inf has one
constexpr float NEGLIGIBLE = 1e-30f;  // as in fastkd/reference.py
constexpr float INFINITE = 1e6f;
constexpr float INF = std::numeric_limits<float>::infinity();

// ---- rows in memory

int64_t row_offset(const Rows& rows, const std::vector<int64_t>& sizes, int64_t row) {
  int64_t offset = 0;
  for (size_t d = sizes.size(); d-- > 0;) {
    offset += (row % sizes[d]) * rows.strides[d];
    row /= sizes[d];
  }
  return offset;
}

int element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// What turns a raw logit into z = softcap * tanh(scale * logit / softcap) - shift, and by what dz/dlogit is.
struct Adjustment {
  float scale = 1, softcap = 0;
  float shift = 0;  // of a row whose logits are all so low that FLOOR would count beside them
  bool identity() const { return scale == 1 && softcap == 0 && shift == 0; }
  V z(V x) const { return softcap == 0 ? x * scale - shift : softcap * tanh(x * (scale / softcap)); }
  V slope(V z) const {
    const V squashed = z * (1 / softcap);
    return softcap == 0 ? splat(scale) : scale * (1.0f - squashed * squashed);
  }

 private:
  static V tanh(V x) {
    // Below 0.6 the quotient of exponentials cancels; there an odd Taylor-like fit (Cephes) holds.
    const V size = at_most(abs(x), splat(10.0f)), square = size * size;
    V y = square * -5.70498872745e-3f + 2.06390887954e-2f;
    y = y * square - 5.37397155531e-2f;
    y = y * square + 1.33314422036e-1f;
    y = y * square - 3.33332819422e-1f;
    const V small = size + size * square * y;
    const V large = 1.0f - 2.0f / (exp(2.0f * size) + 1.0f);
    const V value = where(size < 0.625f, small, large);
    return where(x == x, (V)((U)value | ((U)x & 0x80000000)), x);
  }
};

// The maximum of n floats, a whole number of vectors; NaNs do not count. Four chains of comparisons, as one would wait
// for each.
float maximum_of(const float* z, int n) {
  V maxima[4] = {splat(FLOOR), splat(FLOOR), splat(FLOOR), splat(FLOOR)};
  auto raise = [&](V& maximum, int i) {
    const V x = load(z + i);
    maximum = x > maximum ? x : maximum;
  };
  int i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int chain = 0; chain < 4; ++chain) raise(maxima[chain], i + chain * LANES);
  for (; i < n; i += LANES) raise(maxima[0], i);
  auto higher = [](V a, V b) { return a > b ? a : b; };
  return maximum_lane(higher(higher(maxima[0], maxima[1]), higher(maxima[2], maxima[3])));
}

int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

// n logits z of a row as floats, padded to whole vectors with FLOOR: in scratch, or where they are if that will do.
const float* load_block(const char* row, Dtype dtype, int64_t start, int n, const Adjustment& adjust, float* scratch) {
  const int whole = n / LANES * LANES;
  if (dtype == Dtype::f32 && adjust.identity() && whole == n) return reinterpret_cast<const float*>(row) + start;
  const int width = element_size(dtype);
  const char* from = row + start * width;
  alignas(64) char tail[LANES * 4] = {};
  std::memcpy(tail, from + whole * width, (n - whole) * width);

  auto convert = [&](auto read) {
    for (int i = 0; i < whole; i += LANES) store(scratch + i, read(from + i * width));
    if (whole < n) {
      store(scratch + whole, read(tail));
      for (int i = n; i < padded(n); ++i) scratch[i] = FLOOR;
    }
  };
  auto floats = [](const char* x) { return load(reinterpret_cast<const float*>(x)); };
  auto bf16 = [](const char* x) { return from_bf16(load_half(reinterpret_cast<const uint16_t*>(x))); };
  auto fp16 = [](const char* x) { return from_fp16(load_half(reinterpret_cast<const uint16_t*>(x))); };
  auto dispatch = [&](auto finish) {
    switch (dtype) {
      case Dtype::f32: return convert([=](const char* x) { return finish(floats(x)); });
      case Dtype::bf16: return convert([=](const char* x) { return finish(bf16(x)); });
      case Dtype::f16: return convert([=](const char* x) { return finish(fp16(x)); });
    }
  };
  if (adjust.identity())
    dispatch([](V x) { return x; });
  else
    dispatch([=](V x) { return adjust.z(x); });
  return scratch;
}

// Floats to bfloat16; the two may be the same memory, as half i never overtakes the float it comes from.
#if defined(__AVX512F__) && __GNUC__ >= 10
__attribute__((target("avx512bf16"))) void narrow_by_instruction(uint16_t* to, const float* from, int n) {
  for (int i = 0; i < n; i += LANES) store_half(to + i, (H)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
}
const bool HAS_INSTRUCTION = __builtin_cpu_supports("avx512bf16");
#else
void narrow_by_instruction(uint16_t*, const float*, int) {}
constexpr bool HAS_INSTRUCTION = false;
#endif

void narrow_to_bf16(uint16_t* to, const float* from, int n) {
  if (HAS_INSTRUCTION) return narrow_by_instruction(to, from, n);
  for (int i = 0; i < n; i += LANES) store_half(to + i, to_bf16(load(from + i)));
}

// n floats to memory in its dtype; values is scratch, and n is rounded up to whole vectors there.
void store_block(char* row, Dtype dtype, int64_t start, int n, float* values, bool past_cache) {
  const int width = element_size(dtype);
  char* to = row + start * width;
  auto* halves = reinterpret_cast<uint16_t*>(values);
  if (dtype == Dtype::bf16) narrow_to_bf16(halves, values, n);
  if (dtype == Dtype::f16)
    for (int i = 0; i < n; i += LANES) store_half(halves + i, to_fp16(load(values + i)));
  const char* from = reinterpret_cast<const char*>(values);
  past_cache ? stream(to, from, int64_t(n) * width) : (void)std::memcpy(to, from, int64_t(n) * width);
}

// ---- one side of a row

// softmax(z / T), for a T within float's precision of the one asked for: that whose log2(e) / T is a float, so that
// the exponentials, the logarithms and the moments are all of one and the same distribution.
struct Softmax {
  double temperature;
  float factor, lowest, inverse;  // log2(e) / T; below lowest exp is 0; 1 / T
  explicit Softmax(double asked) {
    factor = float(std::clamp<double>(LOG2_E / asked, SMALLEST, LARGEST));
    temperature = LOG2_E / factor;
    lowest = float(-126.9998 / factor);
    inverse = float(1 / temperature);
  }
  // exp(gap / T) of z - maximum
  V exponential(V gap) const { return exp2_of_negative(at_least(gap, splat(lowest)), splat(factor)); }

 private:
  static constexpr double LOG2_E = 1.4426950408889634;
  static constexpr float SMALLEST = std::numeric_limits<float>::min(), LARGEST = std::numeric_limits<float>::max();
};

const Softmax UNTEMPERED(1);  // of the cross-entropy

// Logits that will be needed soon. Asked for line by line between the arithmetic, which hides the time memory takes:
// the hardware's own prefetchers stop at page ends and idle while a block is computed on.
struct Ahead {
  const char *s = nullptr, *t = nullptr;
  int s_width = 0, t_width = 0;  // bytes a column; 0: nothing to ask for
  FASTKD_INLINE void ask(int i) const {
    __builtin_prefetch(s + i * s_width, 0, 2);
    __builtin_prefetch(t + i * t_width, 0, 2);
  }
};

// How a block's numbers become p, q and their logarithms.
struct BlockView {
  const float *s, *t, *s_exp, *t_exp;  // z and exp((z - max) / T)
  const float* g;                      // of the divergence, where it was kept
  float s_max, t_max;
  float s_weight, t_weight;    // p = t_exp * t_weight
  float s_inverse, t_inverse;  // log p = (t - t_max) * t_inverse + t_offset_low + t_offset
  float s_offset, t_offset, s_offset_low, t_offset_low;  // the offset to twice float's precision
};

using GradientKernel = void (*)(const BlockView&, int from, int to, const float* params, float degree, float sum,
                                float coefficient, float* out);

// The gradient of a block, ready to be written: at once, or strip by strip between those of another row's statistics,
// so that its loads and stores, which wait for memory, overlap with arithmetic.
struct PendingGradient {
  GradientKernel kernel = nullptr;
  BlockView view{};
  const float* params = nullptr;
  float degree = 0, sum = 0, coefficient = 0;
  float* out = nullptr;
  char* place = nullptr;  // where it goes from out, which is scratch then
  Dtype dtype = Dtype::f32;
  bool past_cache = false;

  void write(int from, int to) const {
    if (!kernel) return;
    kernel(view, from, to, params, degree, sum, coefficient, out);
    if (place) store_block(place, dtype, from, to - from, out + from, past_cache);
  }
};

// What the first phase leaves of a block. Moments are relative to the block's maxima.
struct BlockStatistics {
  float s_max, t_max;
  bool overflows;             // (z - max) / T is -inf somewhere
  double s_sum, t_sum;        // of exp((z - max) / T)
  double forward, reverse;    // e_t (t' - s'), e_s (s' - t')
  double cross, entropy;      // e_t s', e_s s'
  double s_sum_at_1, s_total;  // exponentials at temperature 1; sum of z - max
};

// The same merged over a row, relative to the row's maxima; and the weight that turns e into a probability.
struct RowStatistics {
  double s_max, t_max, s_log_sum, t_log_sum, s_log_sum_at_1;
  double forward, reverse, cross, entropy, s_mean;
};

enum Moments { FORWARD = 1, REVERSE = 2, CROSS = 4, SINGLE = 8, ALL = 7 };

// The running sums of a block. They are taken strip by strip, so that a float32 sum is over few terms of one size.
struct LaneSums {
  V s_sum{}, t_sum{}, forward{}, reverse{}, cross{}, entropy{}, s_sum_at_1{}, s_total{};

  FASTKD_INLINE void operator+=(const LaneSums& strip) {
    s_sum += strip.s_sum;
    t_sum += strip.t_sum;
    forward += strip.forward;
    reverse += strip.reverse;
    cross += strip.cross;
    entropy += strip.entropy;
    s_sum_at_1 += strip.s_sum_at_1;
    s_total += strip.s_total;
  }
};

// Sums over a block. The exponentials are kept in s_exp and t_exp (and s_exp_at_1).
template <int MOMENTS, bool AT_1, bool LOG_0>
void block_statistics(const float* s, const float* t, int n, Softmax student, Softmax teacher, Softmax at_1,
                      float s_threshold, float t_threshold, float* s_exp, float* t_exp, float* s_exp_at_1, Ahead ahead,
                      const PendingGradient& alongside, BlockStatistics& out) {
  const V s_max = splat(out.s_max), t_max = splat(out.t_max);
  const V ratio = splat(float(student.temperature / teacher.temperature));
  LaneSums sums;  // the moments times the student's temperature
  for (int start = 0; start < n; start += STRIP) {
    LaneSums strip;
    const int end = std::min(start + STRIP, n);
    alongside.write(start, end);
    for (int i = start; i < end; i += LANES) {
      ahead.ask(i);
      const V s_gap = load(s + i) - s_max, t_gap = load(t + i) - t_max;
      const V e_s = student.exponential(s_gap), e_t = teacher.exponential(t_gap);
      store(s_exp + i, e_s);
      store(t_exp + i, e_t);
      strip.s_sum += e_s;
      strip.t_sum += e_t;
      const V difference = t_gap * ratio - s_gap;
      // With LOG_0, a probability of (almost) 0 silences its term, whatever the other factor is.
      auto times = [](V e, V x, float threshold) { return LOG_0 ? where(e > threshold, e * x, V{}) : e * x; };
      if (MOMENTS & FORWARD) strip.forward += times(e_t, difference, t_threshold);
      if (MOMENTS & REVERSE) strip.reverse -= times(e_s, difference, s_threshold);
      if (MOMENTS & CROSS) strip.cross += times(e_t, s_gap, t_threshold);
      if (MOMENTS & SINGLE) {
        strip.entropy += times(e_s, s_gap, s_threshold);
        strip.s_total += i + LANES <= n ? s_gap : V{};
      }
      if (AT_1) {
        const V e = at_1.exponential(s_gap);
        store(s_exp_at_1 + i, e);
        strip.s_sum_at_1 += e;
      }
    }
    sums += strip;
  }
  out.s_sum = sum_lanes(sums.s_sum);
  out.t_sum = sum_lanes(sums.t_sum);
  out.forward = sum_lanes(sums.forward) / student.temperature;
  out.reverse = sum_lanes(sums.reverse) / student.temperature;
  out.cross = sum_lanes(sums.cross) / student.temperature;
  out.entropy = sum_lanes(sums.entropy) / student.temperature;
  out.s_sum_at_1 = sum_lanes(sums.s_sum_at_1);
  out.s_total = sum_lanes(sums.s_total);
  for (int i = n / LANES * LANES; i < n; ++i) out.s_total += s[i] - out.s_max;
}

using StatisticsKernel = decltype(&block_statistics<0, false, false>);

template <bool AT_1, bool LOG_0>
StatisticsKernel statistics_kernel(int moments) {
  switch (moments) {
    case 0: return block_statistics<0, AT_1, LOG_0>;
    case FORWARD: return block_statistics<FORWARD, AT_1, LOG_0>;
    case REVERSE: return block_statistics<REVERSE, AT_1, LOG_0>;
    case FORWARD | REVERSE: return block_statistics<FORWARD | REVERSE, AT_1, LOG_0>;
    case CROSS: return block_statistics<CROSS, AT_1, LOG_0>;
    default: return block_statistics<ALL | SINGLE, AT_1, LOG_0>;
  }
}

StatisticsKernel statistics_kernel(int moments, bool at_1, bool log_0) {
  if (at_1) return log_0 ? statistics_kernel<true, true>(moments) : statistics_kernel<true, false>(moments);
  return log_0 ? statistics_kernel<false, true>(moments) : statistics_kernel<false, false>(moments);
}

// ---- the divergence on a block

// phi and g of one vector, with the policy of fastkd/reference.py for log 0 where LOG_0.
template <class Divergence, bool LOG_0, bool NORMALIZED>
FASTKD_INLINE void evaluate(const BlockView& view, int i, const float* params, V& p, V& q, V& phi, V& g) {
  p = NORMALIZED ? load(view.t_exp + i) * view.t_weight : splat(1);
  q = NORMALIZED ? load(view.s_exp + i) * view.s_weight : splat(1);
  const V log_p = ((load(view.t + i) - view.t_max) * view.t_inverse + view.t_offset_low) + view.t_offset;
  const V log_q = ((load(view.s + i) - view.s_max) * view.s_inverse + view.s_offset_low) + view.s_offset;
  if (!LOG_0) return Divergence::eval(p, q, log_p, log_q, params, phi, g);

  const I p_gone = log_p == -INF, q_gone = log_q == -INF;
  Divergence::eval(p, q, where(p_gone, splat(LOWEST), log_p), where(q_gone, splat(LOWEST), log_q), params, phi, g);
  const I one_side = p_gone ^ q_gone;
  const I nothing = (p_gone & (q < NEGLIGIBLE)) | (q_gone & (p < NEGLIGIBLE)) | (p_gone & q_gone);
  auto settle = [&](V term) {
    return where(nothing, V{}, where(one_side & (abs(term) > INFINITE), term * INF, term));
  };
  phi = settle(phi);
  g = settle(g);
}

struct BlockSums {
  double phi, g;
};

// Also leaves g in g_out, which may be where t_exp was: nothing else needs that once g is known.
template <class Divergence, bool LOG_0, bool NORMALIZED>
BlockSums block_sums(const BlockView& view, int n, const float* params, float* g_out) {
  V phi_sum{}, g_sum{}, p, q, phi, g;
  const int whole = n / LANES * LANES;
  for (int start = 0; start < whole; start += STRIP) {
    V phi_strip{}, g_strip{};
    for (int i = start; i < std::min(start + STRIP, whole); i += LANES) {
      evaluate<Divergence, LOG_0, NORMALIZED>(view, i, params, p, q, phi, g);
      store(g_out + i, g);
      phi_strip += phi;
      g_strip += g;
    }
    phi_sum += phi_strip;
    g_sum += g_strip;
  }
  BlockSums sums{sum_lanes(phi_sum), sum_lanes(g_sum)};
  if (whole == n) return sums;
  evaluate<Divergence, LOG_0, NORMALIZED>(view, whole, params, p, q, phi, g);
  store(g_out + whole, g);
  for (int lane = 0; whole + lane < n; ++lane) {
    sums.phi += phi[lane];
    sums.g += g[lane];
  }
  return sums;
}

// Where a gradient goes: to scratch, for what is still to be done to it, or straight to memory past the cache.
enum Form { SCRATCH, STREAM, FORMS };

template <int FORM>
FASTKD_INLINE void put(float* out, int i, V value) {
  FORM == STREAM ? stream(out + i, value) : store(out + i, value);
}

// (x_v - r_v sum_u x_u) * coefficient: the student's gradient (x = g = d phi / d log q, r = q) or the teacher's
// (x = h = d phi / d log p = degree * phi - g, r = p); fastkd/divergences.py derives it.
template <class Divergence, bool LOG_0, bool NORMALIZED, bool TEACHER, int FORM>
void block_gradient(const BlockView& view, int from, int to, const float* params, float degree, float sum,
                    float coefficient, float* out) {
  V p, q, phi, g;
  for (int i = from; i < to; i += LANES) {
    evaluate<Divergence, LOG_0, NORMALIZED>(view, i, params, p, q, phi, g);
    const V x = TEACHER ? degree * phi - g : g;
    put<FORM>(out, i, (NORMALIZED ? x - (TEACHER ? p : q) * sum : x) * coefficient);
  }
}

// The student's gradient where g was kept.
template <int FORM>
void block_projection(const BlockView& view, int from, int to, const float*, float, float sum, float coefficient,
                      float* out) {
  for (int i = from; i < to; i += LANES)
    put<FORM>(out, i, (load(view.g + i) - load(view.s_exp + i) * view.s_weight * sum) * coefficient);
}

constexpr GradientKernel PROJECTION[FORMS] = {block_projection<SCRATCH>, block_projection<STREAM>};

// A divergence's kernels; indices [1] and *_log_0 are those with the policy for log 0.
struct Kernels {
  bool uses_logs, gradient_uses_logs;
  decltype(&block_sums<forward_kl, false, true>) sums[2];
  GradientKernel student[FORMS], student_log_0, teacher[2];
};

template <class D, bool NORMALIZED>
constexpr Kernels kernels_of() {
  return {D::uses_logs,
          D::gradient_uses_logs,
          {block_sums<D, false, NORMALIZED>, block_sums<D, true, NORMALIZED>},
          {block_gradient<D, false, NORMALIZED, false, SCRATCH>, block_gradient<D, false, NORMALIZED, false, STREAM>},
          block_gradient<D, true, NORMALIZED, false, SCRATCH>,
          {block_gradient<D, false, NORMALIZED, true, SCRATCH>, block_gradient<D, true, NORMALIZED, true, SCRATCH>}};
}

const Kernels& kernels_of(const Call& call) {
#define FASTKD_NORMALIZED(name) kernels_of<name, true>(),
#define FASTKD_RAW(name) kernels_of<name, false>(),
  static constexpr Kernels normalized[] = {FASTKD_DIVERGENCES(FASTKD_NORMALIZED)};
  static constexpr Kernels raw[] = {FASTKD_DIVERGENCES(FASTKD_RAW)};
#undef FASTKD_NORMALIZED
#undef FASTKD_RAW
  return (call.normalized ? normalized : raw)[call.divergence];
}

// ---- a row

struct Workspace {
  std::unique_ptr<float[]> memory;
  int64_t capacity = 0;
  float* reserve(int64_t floats) {
    if (floats > capacity) {
      memory.reset(new float[floats]);
      capacity = floats;
    }
    return memory.get();
  }
};

// What a thread needs for one block: converted logits, exponentials where they are not kept, the gradient.
struct BlockScratch {
  alignas(64) float s[BLOCK], t[BLOCK], s_exp[BLOCK], t_exp[BLOCK], s_exp_at_1[BLOCK], gradient[BLOCK];
};

class Row {
 public:
  Row(const Call& call, Workspace& workspace)
      : call_(call),
        kernels_(kernels_of(call)),
        s_adjust_{float(call.student_tempering.logit_scale), float(call.student_tempering.softcap), 0},
        t_adjust_{float(call.teacher_tempering.logit_scale), float(call.teacher_tempering.softcap), 0},
        blocks_((call.vocabulary + BLOCK - 1) / BLOCK),
        statistics_(blocks_),
        sums_(blocks_) {
    const int64_t columns = blocks_ * BLOCK;
    const int arrays = call.labels && call.alpha < 1 ? 3 : 2;
    const bool needed_later = needs_sums() || call.student_gradient.data || call.teacher_gradient.data;
    keeps_exponentials_ = needed_later && call.vocabulary * arrays * 4 <= SCRATCH_BYTES;
    if (keeps_exponentials_) {
      s_exp_ = workspace.reserve(columns * arrays);
      t_exp_ = s_exp_ + columns;
      s_exp_at_1_ = arrays == 3 ? t_exp_ + columns : nullptr;
    }
    past_cache_ = call.rows * call.vocabulary * element_size(call.student.dtype) >= STREAM_BYTES;
  }

  int64_t blocks() const { return blocks_; }

  // False where the row is dropped, which has then been dealt with.
  bool start(int64_t row) {
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
    clear_padding();
    if ((call_.labels && label_ == call_.ignore_index) || weight_ == 0) {
      drop();
      return false;
    }
    with_labels_ = call_.labels && call_.alpha < 1;
    if (with_labels_ && (label_ < 0 || label_ >= call_.vocabulary)) {
      weight_ = std::nan("");
      label_ = 0;
    }
    set_shift(student_, call_.student.dtype, s_adjust_);
    set_shift(teacher_, call_.teacher.dtype, t_adjust_);
    s_temperature_ = temperature(call_.student_tempering);
    t_temperature_ = temperature(call_.teacher_tempering);
    student_softmax_ = Softmax(s_temperature_);
    teacher_softmax_ = Softmax(t_temperature_);
    separate_at_1_ = with_labels_ && s_temperature_ != 1;
    moments_ = !call_.closed_form ? 0
                                  : (call_.forward != 0) * FORWARD + (call_.reverse != 0) * REVERSE +
                                        (call_.cross != 0) * CROSS;
    if (call_.student_entropy || (with_labels_ && call_.label_smoothing > 0)) moments_ |= SINGLE;
    log_0_ = false;
    return true;
  }

  // alongside: the same block of another row.
  void statistics(int64_t b, BlockScratch& scratch, const PendingGradient& alongside = {}) {
    const int n = columns(b);
    if (!needs_statistics()) return alongside.write(0, n);
    const float* s = load_student(b, scratch);
    const float* t = load_teacher(b, scratch);
    BlockStatistics& out = statistics_[b];
    float s_threshold = 0, t_threshold = 0;
    if (log_0_) {  // the weights of the first attempt still hold
      s_threshold = NEGLIGIBLE / s_weight(b);
      t_threshold = NEGLIGIBLE / t_weight(b);
    } else {
      out.s_max = maximum_of(s, padded(n));
      out.t_max = maximum_of(t, padded(n));
    }
    out.overflows = gradients_need_logs() && (overflow(s, n, out.s_max, student_softmax_.inverse) ||
                                              overflow(t, n, out.t_max, teacher_softmax_.inverse));
    statistics_kernel(moments_, separate_at_1_, log_0_)(
        s, t, n, student_softmax_, teacher_softmax_, UNTEMPERED, s_threshold, t_threshold, s_exp(b, scratch),
        t_exp(b, scratch), s_exp_at_1(b, scratch), ahead(b + AHEAD), alongside, out);
  }

  // False where the row has to be done again with the policy for log 0.
  bool merge_statistics() {
    if (!needs_statistics()) {
      row_statistics_ = {};
      return true;
    }
    RowStatistics& row = row_statistics_;
    row = {FLOOR, FLOOR, 0, 0, 0, 0, 0, 0, 0, 0};
    for (const BlockStatistics& block : statistics_) {
      row.s_max = std::max(row.s_max, double(block.s_max));
      row.t_max = std::max(row.t_max, double(block.t_max));
    }
    double s_sum = 0, t_sum = 0, s_sum_at_1 = 0;
    const double s_inverse = 1 / student_softmax_.temperature, t_inverse = 1 / teacher_softmax_.temperature;
    for (int64_t b = 0; b < blocks_; ++b) {
      const BlockStatistics& block = statistics_[b];
      const double s_gap = block.s_max - row.s_max, t_gap = block.t_max - row.t_max;
      const double s_factor = std::exp(s_gap * s_inverse), t_factor = std::exp(t_gap * t_inverse);
      const double shift = t_gap * t_inverse - s_gap * s_inverse;
      s_sum += s_factor * block.s_sum;
      t_sum += t_factor * block.t_sum;
      row.forward += t_factor * (block.forward + shift * block.t_sum);
      row.reverse += s_factor * (block.reverse - shift * block.s_sum);
      row.cross += t_factor * (block.cross + s_gap * s_inverse * block.t_sum);
      row.entropy += s_factor * (block.entropy + s_gap * s_inverse * block.s_sum);
      row.s_mean += block.s_total + s_gap * columns(b);
      if (separate_at_1_) s_sum_at_1 += std::exp(s_gap / UNTEMPERED.temperature) * block.s_sum_at_1;
    }
    row.s_log_sum = std::log(s_sum);
    row.t_log_sum = std::log(t_sum);
    row.s_log_sum_at_1 = separate_at_1_ ? std::log(s_sum_at_1) : row.s_log_sum;
    row.forward /= t_sum;
    row.reverse /= s_sum;
    row.cross /= t_sum;
    row.entropy /= s_sum;
    row.s_mean /= call_.vocabulary;
    bool overflows = false;
    for (const BlockStatistics& block : statistics_) overflows |= block.overflows;
    return log_0_ || (!overflows && std::isfinite(row.forward + row.reverse + row.cross + row.entropy));
  }

  bool needs_sums() const { return !call_.closed_form; }

  void sums(int64_t b, BlockScratch& scratch) {
    const bool logs = kernels_.uses_logs || log_0_ || !call_.normalized;
    sums_[b] = kernels_.sums[log_0_](view(b, scratch, logs), columns(b), call_.params.data(), g(b, scratch));
  }

  // False where the row has to be done again with the policy for log 0.
  bool merge_sums() {
    phi_ = g_ = 0;
    for (const BlockSums& block : sums_) {
      phi_ += block.phi;
      g_ += block.g;
    }
    return log_0_ || std::isfinite(phi_ + g_);
  }

  // Whether entries of probability 0 are treated one by one. Off at first: see the top of this file.
  void set_policy_for_log_0(bool on) { log_0_ = on; }

  // The value of the row; after it, gradient() may run on any block.
  void finish() {
    const RowStatistics& row = row_statistics_;
    if (call_.closed_form) {
      const double forward = row.forward - row.t_log_sum + row.s_log_sum;
      const double reverse = row.reverse - row.s_log_sum + row.t_log_sum;
      const double cross = row.s_log_sum - row.cross;
      // A moment that was not collected is 0 here, and its term is not finite only if its weight is 0.
      phi_ = g_ = 0;
      if (call_.forward != 0) phi_ += call_.forward * forward, g_ -= call_.forward;
      if (call_.reverse != 0) phi_ += call_.reverse * reverse, g_ += call_.reverse * (reverse + 1);
      if (call_.cross != 0) phi_ += call_.cross * cross, g_ -= call_.cross;
    }
    const double square = call_.scale_by_temperature ? s_temperature_ * s_temperature_ : 1;
    const double distillation = phi_ * square;
    double cross_entropy = 0;
    if (with_labels_) {
      const double smoothing = call_.label_smoothing;
      const double target = (1 - smoothing) * (double(label_logit()) - row.s_max) + (smoothing > 0 ? smoothing * row.s_mean : 0);
      cross_entropy = row.s_log_sum_at_1 - target / UNTEMPERED.temperature;
    }
    double loss = call_.alpha == 0 ? 0 : call_.alpha * distillation;
    if (with_labels_) loss += (1 - call_.alpha) * cross_entropy;
    write(call_.loss, loss * weight_);
    write(call_.distillation, distillation);
    write(call_.cross_entropy, cross_entropy);
    write(call_.student_entropy, row.s_log_sum - row.entropy);
    const double scale = weight_ * call_.scale * (call_.scale_on_device ? *call_.scale_on_device : 1);
    kd_scale_ = call_.alpha * square * scale;
    ce_scale_ = (1 - call_.alpha) * scale;
  }

  bool needs_gradient() const { return student_gradient_ || teacher_gradient_; }

  // Whether the gradients of its blocks may wait for the next row's statistics.
  bool can_wait() const { return keeps_exponentials_; }

  void gradient(int64_t b, BlockScratch& scratch) { begin_gradient(b, scratch).write(0, columns(b)); }

  // Picks the kernel of a block's gradients. Writes what has to be written at once, and leaves what need not.
  PendingGradient begin_gradient(int64_t b, BlockScratch& scratch) {
    const int n = columns(b);
    const bool logs = (kernels_.gradient_uses_logs && !keeps_g()) || teacher_gradient_ || log_0_ || !call_.normalized;
    PendingGradient pending;
    pending.view = view(b, scratch, logs || s_adjust_.softcap != 0);
    pending.params = call_.params.data();
    if (teacher_gradient_) {
      pending.kernel = kernels_.teacher[log_0_];
      pending.degree = float(call_.degree);
      pending.sum = float(call_.degree * phi_ - g_);
      pending.coefficient = float(kd_scale_ / t_temperature_);
      pending.out = scratch.gradient;
      if (call_.alpha == 0)
        std::fill_n(scratch.gradient, padded(n), 0.0f);
      else
        pending.write(0, n);
      if (!t_adjust_.identity()) chain(t_adjust_, pending.view.t, n, scratch.gradient);
      store_block(teacher_gradient_, call_.teacher.dtype, b * BLOCK, n, scratch.gradient, past_cache_);
    }
    if (!student_gradient_) return {};
    const Dtype dtype = call_.student.dtype;
    char* const place = student_gradient_ + b * BLOCK * element_size(dtype);
    // Stores past the cache need whole vectors at addresses that are multiples of their size.
    const bool whole = reinterpret_cast<uintptr_t>(place) % sizeof(V) == 0 && n % LANES == 0;
    const bool waits = !log_0_ && !with_labels_ && call_.alpha != 0 && s_adjust_.identity();
    const Form form = waits && past_cache_ && dtype == Dtype::f32 && whole ? STREAM : SCRATCH;
    pending.kernel = keeps_g() ? PROJECTION[form] : log_0_ ? kernels_.student_log_0 : kernels_.student[form];
    pending.sum = float(g_);
    pending.coefficient = float(kd_scale_ / s_temperature_);
    pending.out = form == STREAM ? reinterpret_cast<float*>(place) : scratch.gradient;
    if (form == STREAM) return pending;
    if (waits) {
      pending.place = place;
      pending.dtype = dtype;
      pending.past_cache = past_cache_;
      return pending;
    }

    if (call_.alpha == 0)
      std::fill_n(scratch.gradient, padded(n), 0.0f);
    else
      pending.write(0, n);
    if (with_labels_) add_cross_entropy(b, scratch, pending.view);
    if (!s_adjust_.identity()) chain(s_adjust_, pending.view.s, n, scratch.gradient);
    store_block(student_gradient_, call_.student.dtype, b * BLOCK, n, scratch.gradient, past_cache_);
    return {};
  }

 private:
  int columns(int64_t b) const { return int(std::min<int64_t>(BLOCK, call_.vocabulary - b * BLOCK)); }

  Ahead ahead_in(const char* student, const char* teacher, int64_t b) const {
    const int s_width = element_size(call_.student.dtype), t_width = element_size(call_.teacher.dtype);
    return {student + b * BLOCK * s_width, teacher + b * BLOCK * t_width, s_width, t_width};
  }
  // Block b of this row, or what comes after it in the next.
  Ahead ahead(int64_t b) const {
    if (b < blocks_) return ahead_in(student_, teacher_, b);
    return next_student_ && b < 2 * blocks_ ? ahead_in(next_student_, next_teacher_, b - blocks_) : Ahead{};
  }

  const float* load_student(int64_t b, BlockScratch& scratch) const {
    return load_block(student_, call_.student.dtype, b * BLOCK, columns(b), s_adjust_, scratch.s);
  }
  const float* load_teacher(int64_t b, BlockScratch& scratch) const {
    return load_block(teacher_, call_.teacher.dtype, b * BLOCK, columns(b), t_adjust_, scratch.t);
  }

  float* s_exp(int64_t b, BlockScratch& scratch) const {
    return keeps_exponentials_ ? s_exp_ + b * BLOCK : scratch.s_exp;
  }
  float* t_exp(int64_t b, BlockScratch& scratch) const {
    return keeps_exponentials_ ? t_exp_ + b * BLOCK : scratch.t_exp;
  }
  float* s_exp_at_1(int64_t b, BlockScratch& scratch) const {
    return keeps_exponentials_ && s_exp_at_1_ ? s_exp_at_1_ + b * BLOCK : scratch.s_exp_at_1;
  }

  // Whether the phase of sums leaves g for the gradient, in the place of the teacher's exponentials.
  // Where g takes no logarithm, it is cheaper to compute again.
  bool keeps_g() const {
    return needs_sums() && kernels_.gradient_uses_logs && keeps_exponentials_ && call_.normalized && !teacher_gradient_;
  }
  float* g(int64_t b, BlockScratch& scratch) const { return keeps_g() ? t_exp(b, scratch) : scratch.gradient; }

  // Whether logarithms are first seen in the gradient: the sums of phi and g would be NaN where log 0 matters.
  bool gradients_need_logs() const {
    return !needs_sums() && (teacher_gradient_ || (student_gradient_ && kernels_.gradient_uses_logs));
  }

  // Only a temperature below 1 takes finite gaps to -inf.
  static bool overflow(const float* z, int n, float maximum, float inverse) {
    if (inverse <= 1) return false;
    float lowest = 0;
    for (int i = 0; i < n; ++i) lowest = std::min(lowest, z[i] - maximum);
    return lowest * inverse == -INF;
  }

  // log p = (t - t_max of the block) / T + t_offset; a block's exponentials times t_weight are probabilities.
  double s_offset(int64_t b) const {
    return (statistics_[b].s_max - row_statistics_.s_max) / student_softmax_.temperature - row_statistics_.s_log_sum;
  }
  double t_offset(int64_t b) const {
    return (statistics_[b].t_max - row_statistics_.t_max) / teacher_softmax_.temperature - row_statistics_.t_log_sum;
  }
  float s_weight(int64_t b) const { return float(std::exp(s_offset(b))); }
  float t_weight(int64_t b) const { return float(std::exp(t_offset(b))); }

  bool needs_statistics() const { return call_.normalized || with_labels_ || call_.student_entropy; }

  // A row with nothing above FLOOR is shifted to have its maximum at 0; one of -inf alone has no softmax and is NaN.
  void set_shift(const char* row, Dtype dtype, Adjustment& adjust) {
    adjust.shift = 0;
    alignas(64) float z[BLOCK];
    if (!needs_statistics() || !call_.normalized || !(load_block(row, dtype, 0, 1, adjust, z)[0] <= FLOOR)) return;
    float top = -INF;
    for (int64_t b = 0; b < blocks_ && top <= FLOOR; ++b) {
      const float* block = load_block(row, dtype, b * BLOCK, columns(b), adjust, z);
      for (int i = 0; i < columns(b); ++i)
        if (!(block[i] <= top)) top = block[i];  // a NaN too
    }
    if (top == -INF) weight_ = std::nan("");
    if (top <= FLOOR && top > -INF) adjust.shift = top;
  }

  // A number is valid where it is positive; anything else poisons the row.
  double temperature(const Tempering& tempering) {
    if (!tempering.per_row) return tempering.temperature;
    const float value = tempering.per_row[row_];
    if (value > 0) return value;
    weight_ = std::nan("");
    return 1;
  }

  BlockView view(int64_t b, BlockScratch& scratch, bool logits) {
    BlockView v{};
    const bool again = needs_statistics() && !keeps_exponentials_;
    logits |= again;
    v.s = logits ? load_student(b, scratch) : s_exp(b, scratch);  // never used where logits are not needed,
    v.t = logits ? load_teacher(b, scratch) : t_exp(b, scratch);  // but loaded: the pointers must be good
    v.s_exp = s_exp(b, scratch);
    v.t_exp = t_exp(b, scratch);
    v.g = g(b, scratch);
    v.s_inverse = student_softmax_.inverse;
    v.t_inverse = teacher_softmax_.inverse;
    if (!needs_statistics()) return v;
    if (again) exponentials(b, v.s, v.t, scratch);
    v.s_weight = s_weight(b);
    v.t_weight = t_weight(b);
    if (!call_.normalized) return v;
    v.s_max = statistics_[b].s_max;
    v.t_max = statistics_[b].t_max;
    v.s_offset = float(s_offset(b));
    v.t_offset = float(t_offset(b));
    v.s_offset_low = float(s_offset(b) - v.s_offset);
    v.t_offset_low = float(t_offset(b) - v.t_offset);
    return v;
  }

  // The exponentials of the first phase once more, where they were not kept.
  void exponentials(int64_t b, const float* s, const float* t, BlockScratch& scratch) {
    const int n = columns(b);
    const V s_max = splat(statistics_[b].s_max), t_max = splat(statistics_[b].t_max);
    for (int i = 0; i < n; i += LANES) {
      store(scratch.s_exp + i, student_softmax_.exponential(load(s + i) - s_max));
      store(scratch.t_exp + i, teacher_softmax_.exponential(load(t + i) - t_max));
    }
    if (separate_at_1_)
      for (int i = 0; i < n; i += LANES) store(scratch.s_exp_at_1 + i, UNTEMPERED.exponential(load(s + i) - s_max));
  }

  void add_cross_entropy(int64_t b, BlockScratch& scratch, const BlockView& v) {
    const int n = columns(b);
    const float* e = separate_at_1_ ? s_exp_at_1(b, scratch) : v.s_exp;
    const double s_gap = statistics_[b].s_max - row_statistics_.s_max;
    const double weight = std::exp(s_gap / UNTEMPERED.temperature - row_statistics_.s_log_sum_at_1);
    const V factor = splat(float(ce_scale_ * weight));
    const V uniform = splat(float(ce_scale_ * call_.label_smoothing / call_.vocabulary));
    for (int i = 0; i < n; i += LANES)
      store(scratch.gradient + i, load(scratch.gradient + i) + (load(e + i) * factor - uniform));
    const int64_t column = label_ - b * BLOCK;
    if (column >= 0 && column < n) scratch.gradient[column] -= float(ce_scale_ * (1 - call_.label_smoothing));
  }

  static void chain(const Adjustment& adjust, const float* z, int n, float* gradient) {
    for (int i = 0; i < n; i += LANES) store(gradient + i, load(gradient + i) * adjust.slope(load(z + i)));
  }

  float label_logit() const {
    alignas(64) float z[LANES];
    return load_block(student_, call_.student.dtype, label_, 1, s_adjust_, z)[0];
  }

  void write(float* to, double value) const {
    if (to) to[row_] = float(value);
  }

  void clear(char* gradient, Dtype dtype, int64_t from, int64_t to) const {
    if (gradient) std::memset(gradient + from * element_size(dtype), 0, (to - from) * element_size(dtype));
  }
  void clear_padding() const {
    clear(student_gradient_, call_.student.dtype, call_.vocabulary, call_.student.width);
    clear(teacher_gradient_, call_.teacher.dtype, call_.vocabulary, call_.teacher.width);
  }
  void drop() const {
    clear(student_gradient_, call_.student.dtype, 0, call_.vocabulary);
    clear(teacher_gradient_, call_.teacher.dtype, 0, call_.vocabulary);
    for (float* out : {call_.loss, call_.distillation, call_.cross_entropy, call_.student_entropy}) write(out, 0);
  }

  const Call& call_;
  const Kernels& kernels_;
  Adjustment s_adjust_, t_adjust_;
  const int64_t blocks_;
  std::vector<BlockStatistics> statistics_;
  std::vector<BlockSums> sums_;
  float *s_exp_ = nullptr, *t_exp_ = nullptr, *s_exp_at_1_ = nullptr;  // [blocks, BLOCK] where kept
  bool keeps_exponentials_, past_cache_;

  // The row at hand.
  int64_t row_ = 0, label_ = 0;
  char *next_student_ = nullptr, *next_teacher_ = nullptr;
  char *student_ = nullptr, *teacher_ = nullptr, *student_gradient_ = nullptr, *teacher_gradient_ = nullptr;
  double weight_ = 1, s_temperature_ = 1, t_temperature_ = 1;
  Softmax student_softmax_{1}, teacher_softmax_{1};
  bool with_labels_ = false, separate_at_1_ = false, log_0_ = false;
  int moments_ = 0;
  RowStatistics row_statistics_{};
  double phi_ = 0, g_ = 0, kd_scale_ = 0, ce_scale_ = 0;
};

// The phases of a row up to its value; false where the row is dropped. each(f) runs f on every block, by one thread or
// by a team; once(f) runs f once, with what it wrote seen by all. The first phase of a block is statistics(b, scratch).
template <class Each, class Once, class Statistics>
bool value_of(Row& row, int64_t index, Each each, Once once, Statistics statistics) {
  bool counted = false, finite = false;
  once([&](bool* flags) { flags[0] = row.start(index); }, &counted);
  if (!counted) return false;
  for (const bool policy : {false, true}) {
    once([&](bool*) { row.set_policy_for_log_0(policy); }, &finite);
    each(statistics);
    once([&](bool* flags) { flags[0] = row.merge_statistics(); }, &finite);
    if (!finite) continue;
    if (!row.needs_sums()) break;
    each([&](int64_t b, BlockScratch& scratch) { row.sums(b, scratch); });
    once([&](bool* flags) { flags[0] = row.merge_sums(); }, &finite);
    if (finite) break;
  }
  once([&](bool*) { row.finish(); }, &finite);
  return row.needs_gradient();
}

}  // namespace

void kd_rows(const Call& call) {
  static thread_local Workspace workspace;
  const int64_t blocks = (call.vocabulary + BLOCK - 1) / BLOCK;
  // A parallel region costs some microseconds: not for less work than that.
  const int threads = call.rows * call.vocabulary < 4 * BLOCK ? 1 : call.threads;
  if (call.rows >= threads || blocks == 1) {
    // Chunks of neighbouring rows, so that the next row is a thread's own; small enough to balance dropped rows.
    const int64_t chunk = std::max({int64_t(1), 4 * BLOCK / call.vocabulary, call.rows / (16 * threads)});
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      FlushSubnormals guard;
      BlockScratch scratch, waiting_scratch;
      Row rows[2] = {{call, workspace}, {call, workspace}};  // they take turns, and share the exponentials' memory
      Row* waiting = nullptr;                                // whose gradient is still to be written
      auto each = [&](auto phase) {
        for (int64_t b = 0; b < blocks; ++b) phase(b, scratch);
      };
      auto once = [&](auto step, bool* flags) { step(flags); };
#pragma omp for schedule(dynamic, chunk)
      for (int64_t i = 0; i < call.rows; ++i) {
        Row& row = waiting == &rows[0] ? rows[1] : rows[0];
        auto statistics = [&](int64_t b, BlockScratch& scratch) {
          if (!waiting) return row.statistics(b, scratch);
          row.statistics(b, scratch, waiting->begin_gradient(b, waiting_scratch));
          if (b == blocks - 1) waiting = nullptr;
        };
        if (!value_of(row, i, each, once, statistics)) continue;
        if (row.can_wait())
          waiting = &row;
        else
          each([&](int64_t b, BlockScratch& scratch) { row.gradient(blocks - 1 - b, scratch); });
      }
      if (waiting) each([&](int64_t b, BlockScratch& scratch) { waiting->gradient(b, scratch); });
    }
  } else {
    Row row(call, workspace);
    bool shared = false;
#pragma omp parallel num_threads(threads)
    {
      FlushSubnormals guard;
      BlockScratch scratch;
      auto each = [&](auto phase) {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < row.blocks(); ++b) phase(b, scratch);
      };
      auto once = [&](auto step, bool* flags) {
#pragma omp single
        step(&shared);
        *flags = shared;
#pragma omp barrier
      };
      auto statistics = [&](int64_t b, BlockScratch& scratch) { row.statistics(b, scratch); };
      for (int64_t i = 0; i < call.rows; ++i) {
        if (!value_of(row, i, each, once, statistics)) continue;
        each([&](int64_t b, BlockScratch& scratch) { row.gradient(row.blocks() - 1 - b, scratch); });
      }
    }
  }

  double total = 0;
  for (int64_t i = 0; i < call.rows; ++i) total += call.loss[i];
  *call.total = float(total * call.scale * (call.scale_on_device ? *call.scale_on_device : 1));
}

std::vector<std::string> divergences() {
#define FASTKD_NAME(name) #name,
  return {FASTKD_DIVERGENCES(FASTKD_NAME)};
#undef FASTKD_NAME
}

// gradient[row] *= factor[row * stride], in place; a row whose factor is 1 is not touched.
void scale_rows(const Call& call, const float* factor, int64_t stride) {
  const Rows& rows = call.student_gradient;
  const int64_t blocks = (rows.width + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(call.threads) if (call.rows * rows.width >= 4 * BLOCK && call.threads > 1)
  for (int64_t i = 0; i < call.rows * blocks; ++i) {
    const int64_t row = i / blocks, start = i % blocks * BLOCK;
    if (factor[row * stride] == 1) continue;
    alignas(64) float scratch[BLOCK];
    const int n = int(std::min<int64_t>(BLOCK, rows.width - start));
    char* data = rows.data + row_offset(rows, call.sizes, row) * element_size(rows.dtype);
    const float* values = load_block(data, rows.dtype, start, n, Adjustment{}, scratch);
    for (int j = 0; j < n; j += LANES) store(scratch + j, load(values + j) * factor[row * stride]);
    store_block(data, rows.dtype, start, n, scratch, false);
  }
}

}  // namespace fastkd::FASTKD_ISA
