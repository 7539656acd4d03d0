// Blocks of a row: how they are loaded and stored, and the kernels over one of them.
//
// Like the other headers here, included inside the namespace of one instruction set.

namespace {

constexpr int BLOCK = 2048;
constexpr int STRIP = 16 * LANES;
// Scratch for exponentials, a thread: with the logits streaming through, this stays in a 2 MB second-level cache.
constexpr int64_t SCRATCH_BYTES = 5 << 18;
constexpr int64_t AHEAD = 4;  // blocks between what is asked of memory and what is computed on
constexpr int64_t STREAM_BYTES = 4 << 20;  // gradients from this size on are written past the cache
constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float FLOOR = -1e30f;      // the least maximum of a block, so that a block of -inf has one
constexpr float NEGLIGIBLE = 1e-30f;  // as in fastkd/backends/reference.py
constexpr float INFINITE = 1e6f;
constexpr float INF = std::numeric_limits<float>::infinity();
// Where the maxima or the log-sum-exps of two rows are closer than this, s - t is the most exact way to log q - log p.
constexpr float CLOSE_LOGITS = 8;

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
  V z(V x) const { return softcap == 0 ? x * scale - shift : softcap * tanh(x * scale / softcap); }
  V slope(V z) const {
    const V squashed = z / softcap;
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

// The maximum of a row that may have nothing above FLOOR: it is then shifted to have its maximum at 0; one of -inf
// alone has no softmax and is NaN. 0 where the row's first logit, or another that was seen, is above FLOOR. The column
// apart, if any, does not count.
float low_top(const char* row, Dtype dtype, int64_t vocabulary, const Adjustment& adjust, int64_t apart = -1) {
  alignas(64) float z[BLOCK];
  if (apart != 0 && !(load_block(row, dtype, 0, 1, adjust, z)[0] <= FLOOR)) return 0;
  float top = -INF;
  for (int64_t start = 0; start < vocabulary && top <= FLOOR; start += BLOCK) {
    const int n = int(std::min<int64_t>(BLOCK, vocabulary - start));
    const float* block = load_block(row, dtype, start, n, adjust, z);
    for (int i = 0; i < n; ++i)
      if (start + i != apart && !(block[i] <= top)) top = block[i];  // a NaN too
  }
  return top;
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

// From the gradient by z to that by logits.
void chain(const Adjustment& adjust, const float* z, int n, float* gradient) {
  for (int i = 0; i < n; i += LANES) store(gradient + i, load(gradient + i) * adjust.slope(load(z + i)));
}

// ---- one side of a row

// softmax(z / T). log2(e) / T is two floats: rounded to one, it would change every logarithm of a probability by 1.3e-8
// of itself at T = 1, and a probability of 1e-12 by three units in the last place.
struct Softmax {
  double temperature;
  float factor, factor_low, lowest, inverse;  // log2(e) / T; below lowest exp is 0; 1 / T
  explicit Softmax(double asked) {
    const double whole = std::clamp<double>(LOG2_E / asked, SMALLEST, LARGEST);
    factor = float(whole);
    factor_low = float(whole - factor);
    temperature = LOG2_E / whole;
    lowest = float(-126.9998 / factor);
    inverse = float(1 / temperature);
  }
  // exp(gap / T) of z - maximum
  V exponential(V gap) const { return exp2_of_negative(at_least(gap, splat(lowest)), splat(factor), splat(factor_low)); }

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
  // log p - log q = ((t - t_origin) * ratio - (s - s_origin)) * s_inverse + ratio_high + ratio_low. The origins are 0
  // where that is more exact: the logits of a student and its teacher may be close.
  float s_origin, t_origin, ratio = 1, ratio_low, ratio_high;
  int64_t first;                // column of the row
  const int64_t* sure = NONE;   // two columns of the row, which are left out of sums; -1 for none
  static constexpr int64_t NONE[2] = {-1, -1};
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
  double t_sum_at_1;           // where the teacher's probability of the label is needed at temperature 1
};

// The same merged over a row, relative to the row's maxima; and the weight that turns e into a probability.
struct RowStatistics {
  double s_max, t_max, s_log_sum, t_log_sum, s_log_sum_at_1, t_log_sum_at_1;
  double forward, reverse, cross, entropy, s_mean;
};

// What a process leaves of its columns of a row (Shard::statistics): as BlockStatistics, but with maxima that count from
// 0, whatever the row is shifted by, and are -inf where there is no probability.
struct ShardStatistics {
  double s_max, t_max;
  double s_sum, t_sum;
  double forward, reverse;
  double cross, entropy;
  double s_sum_at_1, s_total;
  double columns, label;   // how many; z of the label, -inf where it is another's
  double t_lost, s_lost;   // the largest z of a side where the other is gone: its moments leave those columns out
  double policy;           // 1 where log 0 has been met
  double t_sum_at_1, t_label;  // exchanged where the label's token is compared apart
};
static_assert(sizeof(ShardStatistics) == APART_STATISTICS * sizeof(double));

struct ShardSums {
  double phi, g;
  double policy;
};
static_assert(sizeof(ShardSums) == SUMS * sizeof(double));

// The same of one process, or of a block, or of all: what merging them adds up, relative to their maxima.
struct Merged {
  double s_max = -INF, t_max = -INF;
  double s_sum = 0, t_sum = 0;
  double forward = 0, reverse = 0;
  double cross = 0, entropy = 0;
  double s_sum_at_1 = 0, s_total = 0;
  double t_sum_at_1 = 0;

  // All maxima first, then all sums.
  template <class Part>
  void raise(const Part& part) {
    s_max = std::max(s_max, double(part.s_max));
    t_max = std::max(t_max, double(part.t_max));
  }
  template <class Part>
  void add(const Part& part, double columns, double s_inverse, double t_inverse, bool at_1) {
    if (!columns) return;
    const double s_gap = part.s_max - s_max, t_gap = part.t_max - t_max;
    const double s_factor = std::exp(s_gap * s_inverse), t_factor = std::exp(t_gap * t_inverse);
    const double shift = t_gap * t_inverse - s_gap * s_inverse;
    s_total += part.s_total + s_gap * columns;
    const bool s_none = s_gap == -INF, t_none = t_gap == -INF;
    if (!s_none) {
      entropy += s_factor * (part.entropy + s_gap * s_inverse * part.s_sum);
      if (at_1) s_sum_at_1 += std::exp(s_gap / UNTEMPERED.temperature) * part.s_sum_at_1;
      s_sum += s_factor * part.s_sum;
    }
    if (!t_none) t_sum += t_factor * part.t_sum;
    if (!t_none && part.t_sum_at_1 != 0) t_sum_at_1 += std::exp(t_gap / UNTEMPERED.temperature) * part.t_sum_at_1;
    if (s_none || t_none) return;  // where one side is gone, no moment has been collected
    forward += t_factor * (part.forward + shift * part.t_sum);
    reverse += s_factor * (part.reverse - shift * part.s_sum);
    cross += t_factor * (part.cross + s_gap * s_inverse * part.t_sum);
  }
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

// Whether the moments of a block are best taken of t - s: one subtraction, whose error is that of a small number.
bool are_close(const BlockStatistics& of, const Softmax& student, const Softmax& teacher) {
  return student.temperature == teacher.temperature && std::abs(of.t_max - of.s_max) < CLOSE_LOGITS;
}

// The sums of a block from those of its lanes. The moments are divided by the student's temperature, and where they are
// of t - s, become relative to the block's maxima.
void conclude(const LaneSums& sums, bool close, double temperature, BlockStatistics& out) {
  out.s_sum = sum_lanes(sums.s_sum);
  out.t_sum = sum_lanes(sums.t_sum);
  const double ahead = close ? double(out.t_max) - out.s_max : 0;
  out.forward = (sum_lanes(sums.forward) - ahead * out.t_sum) / temperature;
  out.reverse = (sum_lanes(sums.reverse) + ahead * out.s_sum) / temperature;
  out.cross = sum_lanes(sums.cross) / temperature;
  out.entropy = sum_lanes(sums.entropy) / temperature;
}

// Sums over a block. The exponentials are kept in s_exp and t_exp (and s_exp_at_1).
template <int MOMENTS, bool AT_1, bool LOG_0, bool CLOSE>
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
      const V difference = CLOSE ? load(t + i) - load(s + i) : t_gap * ratio - s_gap;
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
  conclude(sums, CLOSE, student.temperature, out);
  out.s_sum_at_1 = sum_lanes(sums.s_sum_at_1);
  out.s_total = sum_lanes(sums.s_total);
  for (int i = n / LANES * LANES; i < n; ++i) out.s_total += s[i] - out.s_max;
}

// The sums of a block once more, from its exponentials: of those that the caller has set to 0, nothing.
void sums_of_exponentials(const float* s, const float* t, int n, Softmax student, Softmax teacher, float s_threshold,
                          float t_threshold, const float* s_exp, const float* t_exp, BlockStatistics& out) {
  const V s_max = splat(out.s_max), t_max = splat(out.t_max);
  const V ratio = splat(float(student.temperature / teacher.temperature));
  const bool close = are_close(out, student, teacher);
  const auto times = [](V e, V x, float threshold) { return where(e > threshold, e * x, V{}); };
  LaneSums sums;
  for (int start = 0; start < n; start += STRIP) {
    LaneSums strip;
    for (int i = start; i < std::min(start + STRIP, n); i += LANES) {
      const V e_s = load(s_exp + i), e_t = load(t_exp + i), s_gap = load(s + i) - s_max;
      const V difference = close ? load(t + i) - load(s + i) : (load(t + i) - t_max) * ratio - s_gap;
      strip.s_sum += e_s;
      strip.t_sum += e_t;
      strip.forward += times(e_t, difference, t_threshold);
      strip.reverse -= times(e_s, difference, s_threshold);
      strip.cross += times(e_t, s_gap, t_threshold);
      strip.entropy += times(e_s, s_gap, s_threshold);
    }
    sums += strip;
  }
  conclude(sums, close, student.temperature, out);
}

using StatisticsKernel = decltype(&block_statistics<0, false, false, false>);

template <bool AT_1, bool LOG_0, bool CLOSE>
StatisticsKernel statistics_kernel(int moments) {
  switch (moments) {
    case 0: return block_statistics<0, AT_1, LOG_0, false>;
    case FORWARD: return block_statistics<FORWARD, AT_1, LOG_0, CLOSE>;
    case REVERSE: return block_statistics<REVERSE, AT_1, LOG_0, CLOSE>;
    case FORWARD | REVERSE: return block_statistics<FORWARD | REVERSE, AT_1, LOG_0, CLOSE>;
    case CROSS: return block_statistics<CROSS, AT_1, LOG_0, false>;
    default: return block_statistics<ALL | SINGLE, AT_1, LOG_0, CLOSE>;
  }
}

StatisticsKernel statistics_kernel(int moments, bool at_1, bool log_0, bool close) {
  const auto of = [&](auto at_1, auto log_0) {
    constexpr bool AT_1 = decltype(at_1)::value, LOG_0 = decltype(log_0)::value;
    return close ? statistics_kernel<AT_1, LOG_0, true>(moments) : statistics_kernel<AT_1, LOG_0, false>(moments);
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (at_1) return log_0 ? of(yes, yes) : of(yes, no);
  return log_0 ? of(no, yes) : of(no, no);
}

// ---- the divergence on a block

// phi, g and h of one vector, with the policy of fastkd/backends/reference.py for log 0 where LOG_0.
template <class Divergence, bool LOG_0>
FASTKD_INLINE void settle(V p, V q, V log_p, V log_q, V log_ratio, const float* params, float degree, V& phi, V& g, V& h) {
  if (!LOG_0) return Divergence::eval(p, q, log_p, log_q, log_ratio, params, degree, phi, g, h);
  const I p_gone = log_p == -INF, q_gone = log_q == -INF;
  const V x = where(p_gone, splat(LOWEST), log_p), y = where(q_gone, splat(LOWEST), log_q);
  Divergence::eval(p, q, x, y, where(p_gone | q_gone, x - y, log_ratio), params, degree, phi, g, h);
  const I one_side = p_gone ^ q_gone;
  const I nothing = (p_gone & (q < NEGLIGIBLE)) | (q_gone & (p < NEGLIGIBLE)) | (p_gone & q_gone);
  auto settled = [&](V term) {
    return where(nothing, V{}, where(one_side & (abs(term) > INFINITE), term * INF, term));
  };
  phi = settled(phi);
  g = settled(g);
  h = settled(h);
}

template <class Divergence, bool LOG_0, bool NORMALIZED>
FASTKD_INLINE void evaluate(const BlockView& view, int i, const float* params, float degree, V& p, V& q, V& phi, V& g, V& h) {
  p = NORMALIZED ? load(view.t_exp + i) * view.t_weight : splat(1);
  q = NORMALIZED ? load(view.s_exp + i) * view.s_weight : splat(1);
  const V s = load(view.s + i), t = load(view.t + i);
  const V log_p = ((t - view.t_max) * view.t_inverse + view.t_offset_low) + view.t_offset;
  const V log_q = ((s - view.s_max) * view.s_inverse + view.s_offset_low) + view.s_offset;
  const V gap = (t - view.t_origin) * view.ratio - (s - view.s_origin);
  // The larger part of the offset first: where it cancels most of the gap, that sum is exact.
  const V log_ratio = (gap * view.s_inverse + view.ratio_high) + view.ratio_low;
  settle<Divergence, LOG_0>(p, q, log_p, log_q, log_ratio, params, degree, phi, g, h);
}

// The same of a few columns whose numbers are known better than a block's: [4] each, p, q, their logarithms and log p - log q.
struct Columns {
  alignas(64) float p[LANES], q[LANES], log_p[LANES], log_q[LANES], log_ratio[LANES];
  alignas(64) float phi[LANES], g[LANES], h[LANES];
};

template <class Divergence>
void evaluate_columns(Columns& at, const float* params, float degree) {
  V phi, g, h;
  settle<Divergence, true>(load(at.p), load(at.q), load(at.log_p), load(at.log_q), load(at.log_ratio), params, degree,
                           phi, g, h);
  store(at.phi, phi);
  store(at.g, g);
  store(at.h, h);
}

struct BlockSums {
  double phi, g;
};

// 0 in the lanes of two columns.
void leave_out(const int64_t* out, int i, V& phi, V& g) {
  for (int k = 0; k < 2; ++k) {
    const int64_t lane = out[k] - i;
    if (lane >= 0 && lane < LANES) phi[lane] = g[lane] = 0;
  }
}

// Also leaves g in g_out, which may be where t_exp was: nothing else needs that once g is known.
template <class Divergence, bool LOG_0, bool NORMALIZED>
BlockSums block_sums(const BlockView& view, int n, const float* params, float* g_out) {
  V phi_sum{}, g_sum{}, p, q, phi, g, h;
  const int whole = n / LANES * LANES;
  // Where the columns that are left out lie in this block; past it where they are in another.
  int64_t out[2];
  for (int k = 0; k < 2; ++k) {
    out[k] = view.sure[k] < 0 ? -1 : view.sure[k] - view.first;
    if (out[k] >= n) out[k] = -1;
  }
  for (int start = 0; start < whole; start += STRIP) {
    V phi_strip{}, g_strip{};
    const int end = std::min(start + STRIP, whole);
    const bool leaves_out = (out[0] >= start && out[0] < end) || (out[1] >= start && out[1] < end);
    for (int i = start; i < end; i += LANES) {
      evaluate<Divergence, LOG_0, NORMALIZED>(view, i, params, 0, p, q, phi, g, h);
      store(g_out + i, g);
      if (leaves_out) leave_out(out, i, phi, g);
      phi_strip += phi;
      g_strip += g;
    }
    phi_sum += phi_strip;
    g_sum += g_strip;
  }
  BlockSums sums{sum_lanes(phi_sum), sum_lanes(g_sum)};
  if (whole == n) return sums;
  evaluate<Divergence, LOG_0, NORMALIZED>(view, whole, params, 0, p, q, phi, g, h);
  store(g_out + whole, g);
  for (int lane = 0; whole + lane < n; ++lane) {
    if (whole + lane == out[0] || whole + lane == out[1]) continue;
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
// (x = h = d phi / d log p, r = p); fastkd/divergences.py derives it.
template <class Divergence, bool LOG_0, bool NORMALIZED, bool TEACHER, int FORM>
void block_gradient(const BlockView& view, int from, int to, const float* params, float degree, float sum,
                    float coefficient, float* out) {
  V p, q, phi, g, h;
  for (int i = from; i < to; i += LANES) {
    evaluate<Divergence, LOG_0, NORMALIZED>(view, i, params, degree, p, q, phi, g, h);
    const V x = TEACHER ? h : g;
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
  decltype(&evaluate_columns<forward_kl>) columns;
};

template <class D, bool NORMALIZED>
constexpr Kernels kernels_of() {
  return {D::uses_logs,
          D::gradient_uses_logs,
          {block_sums<D, false, NORMALIZED>, block_sums<D, true, NORMALIZED>},
          {block_gradient<D, false, NORMALIZED, false, SCRATCH>, block_gradient<D, false, NORMALIZED, false, STREAM>},
          block_gradient<D, true, NORMALIZED, false, SCRATCH>,
          {block_gradient<D, false, NORMALIZED, true, SCRATCH>, block_gradient<D, true, NORMALIZED, true, SCRATCH>},
          evaluate_columns<D>};
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

}  // namespace
