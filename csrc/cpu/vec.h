// A vector of floats, the functions that definitions of divergences may call, and conversions from and to bf16 and
// fp16.
//
// GCC's vector types do the arithmetic, so one source serves SSE2, AVX2, AVX-512 and NEON. Include it inside the
// namespace of an instruction set.

#define FASTKD_INLINE inline __attribute__((always_inline))
#define FASTKD_PER_ROW inline  // a function that runs once per row

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float V __attribute__((vector_size(LANES * 4)));
typedef int32_t I __attribute__((vector_size(LANES * 4)));
typedef uint32_t U __attribute__((vector_size(LANES * 4)));
typedef uint16_t H __attribute__((vector_size(LANES * 2)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t UnalignedH __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

FASTKD_INLINE V splat(float x) { return x - V{}; }
FASTKD_INLINE V load(const float* x) { return *reinterpret_cast<const Unaligned*>(x); }
FASTKD_INLINE void store(float* x, V v) { *reinterpret_cast<Unaligned*>(x) = v; }
FASTKD_INLINE H load_half(const uint16_t* x) { return *reinterpret_cast<const UnalignedH*>(x); }
FASTKD_INLINE void store_half(uint16_t* x, H v) { *reinterpret_cast<UnalignedH*>(x) = v; }
FASTKD_INLINE V where(I mask, V a, V b) { return mask ? a : b; }
FASTKD_INLINE V abs(V x) { return (V)((I)x & 0x7fffffff); }

// Both return a NaN in x, so that a NaN among the logits reaches the loss.
FASTKD_INLINE V at_least(V x, V low) { return low > x ? low : x; }
FASTKD_INLINE V at_most(V x, V high) { return high < x ? high : x; }

// Adds one half of the lanes to the other: adding them one by one would be a chain of dependent additions.
FASTKD_INLINE double sum_lanes(V v) {
  double lanes[LANES];
  for (int i = 0; i < LANES; ++i) lanes[i] = v[i];
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The maximum of the lanes. A NaN may be lost.
FASTKD_INLINE float maximum_lane(V v) {
  float lanes[LANES];
  store(lanes, v);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// a * b - integer, where integer is a * b rounded. Without a fused multiply-add, rounding the product would cost several
// units of an exponential. The products of the upper halves of a and b are exact, and so is their difference from the
// integer.
FASTKD_INLINE V product_less_integer(V a, V b, V integer) {
#if defined(__FP_FAST_FMAF)
  return a * b - integer;
#else
  const V a_high = (V)((I)a & -4096), b_high = (V)((I)b & -4096);
  return (a_high * b_high - integer) + (a_high * (b - b_high) + (a - a_high) * b);
#endif
}

// 2^(d * (high + low)) for d * high in (-127, 128]; subnormal at the lower end, which FlushSubnormals makes 0. high +
// low is the factor as two floats: with one float the relative error grows to 1e-6 at d * high = -30.
//
// The fraction is in [-1/2, 1/2], where the polynomial (a Chebyshev fit of degree 6) is within 2e-9 of 2^fraction. The
// integer is in the low bits of x + 1.5 * 2^23 and is added to the exponent.
FASTKD_INLINE V exp2_core(V d, V high, V low) {
  const float magic = 12582912.0f;
  const V shifted = d * high + magic;
  const V integer = shifted - magic;
  const V fraction = d * low + product_less_integer(d, high, integer);
  V y = fraction * 1.546144469e-4f + 1.340042818e-3f;
  y = y * fraction + 9.618056679e-3f;
  y = y * fraction + 5.550327227e-2f;
  y = y * fraction + 2.402265090e-1f;
  y = y * fraction + 6.931472067e-1f;
  y = y * fraction + 1.0f;
  return (V)((U)y + ((U)shifted << 23));
}

// 2^(d * (high + low)) for d * high in (-127, 0]: the exponentials of a softmax, which take most of the time.
#if defined(__AVX512F__)
// As above with steps of 1/16, for which a cubic is within 2e-9. Entry k has the bits of 2^(k/16), minus those that
// shifting k towards the exponent adds to the mantissa.
alignas(64) constexpr uint32_t POWERS[16] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};

FASTKD_INLINE V exp2_of_negative(V d, V high, V low) {
  const float magic = 786432.0f;  // 1.5 * 2^23 / 16
  const V shifted = d * high + magic;
  const V step = shifted - magic;
  const V fraction = d * low + (d * high - step);
  const V slope = (fraction * 5.550213609e-2f + 2.402342896e-1f) * fraction + 6.931471827e-1f;
  const U power = (U)_mm512_permutexvar_epi32((__m512i)shifted, _mm512_load_si512(POWERS)) + ((U)shifted << 19);
  return (V)power * (slope * fraction) + (V)power;
}
#else
FASTKD_INLINE V exp2_of_negative(V d, V high, V low) { return exp2_core(d, high, low); }
#endif

// Below EXP_LOWEST, exp is subnormal. Times log2(e) it is above -127 by a margin: below -127 the mantissa of exp2_core
// would borrow from its exponent.
constexpr float EXP_LOWEST = -88.02f, EXP_HIGHEST = 88.3f;
constexpr float LOG2E_HIGH = 1.44269502162933349609375f, LOG2E_LOW = 1.925963033500011e-8f;

// 2^k (2^fraction - 1) and 2^k for x in [EXP_LOWEST, EXP_HIGHEST]: their sum is exp(x), and subtracting 1 from the power
// gives exp(x) - 1 without cancellation near 0.
FASTKD_INLINE V exp_less_power_in_range(V x, V& power) {
  const float magic = 12582912.0f;
  const V shifted = x * LOG2E_HIGH + magic;
  const V integer = shifted - magic;
  const V fraction = x * LOG2E_LOW + product_less_integer(x, splat(LOG2E_HIGH), integer);
  V y = fraction * 1.546144469e-4f + 1.340042818e-3f;
  y = y * fraction + 9.618056679e-3f;
  y = y * fraction + 5.550327227e-2f;
  y = y * fraction + 2.402265090e-1f;
  y = y * fraction + 6.931472067e-1f;
  power = (V)(((U)shifted << 23) + 0x3f800000);
  return power * fraction * y;
}

// The same for any x. exp and expm1 are infinite above 88.3. The compiler computes this once if a definition calls both
// for one x.
FASTKD_INLINE V exp_less_power(V x, V& power) {
  return exp_less_power_in_range(at_most(at_least(x, splat(EXP_LOWEST)), splat(EXP_HIGHEST)), power);
}

FASTKD_INLINE V exp(V x) {
  V power;
  const V more = exp_less_power(x, power);
  return where(x > EXP_HIGHEST, splat(__builtin_inff()), more + power);
}

FASTKD_INLINE V expm1(V x) {
  V power;
  const V more = exp_less_power(x, power);
  return where(x > EXP_HIGHEST, splat(__builtin_inff()), more + (power - 1.0f));
}

// (high + low) log_x as an exact product and a small rest (fastkd/divergences.py, power).
struct Product {
  V exact, rest;
};

FASTKD_INLINE Product product_in_parts(V log_x, V high, V low) {
  const V rounded = (log_x + 12288.0f) - 12288.0f;
  return {rounded * high, (log_x - rounded) * high + log_x * low};
}

// exp(exact + rest) as 2^k exp(r). k ln 2 is subtracted from `exact` in two steps, of which the first is exact.
FASTKD_INLINE V exp_of_parts(V exact, V rest) {
  const float magic = 12582912.0f;
  const V shifted = at_most(at_least(exact, splat(EXP_LOWEST)), splat(EXP_HIGHEST)) * LOG2E_HIGH + magic;
  const V k = shifted - magic;
  const V r = ((exact - k * 0.693359375f) + k * 2.12194440e-4f) + rest;
  return exp(r) * (V)(((U)shifted << 23) + 0x3f800000);
}

FASTKD_INLINE V power(V log_x, V high, V low) {
  const Product x = product_in_parts(log_x, high, low);
  return exp_of_parts(x.exact, x.rest);
}

FASTKD_INLINE V power_product(V log_x, V a_high, V a_low, V log_y, V b_high, V b_low) {
  const Product x = product_in_parts(log_x, a_high, a_low), y = product_in_parts(log_y, b_high, b_low);
  return exp_of_parts(x.exact + y.exact, x.rest + y.rest);
}

// log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]: f + f^2 (f P(f) - 1/2), P as in the Cephes library.
FASTKD_INLINE V log1p_near_0(V f) {
  V y = f * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f - 0.5f;
  return f + f * f * y;
}

// log(1 + x) for x in [0, 1].
FASTKD_INLINE V log1p_of_unit(V x) {
  const I upper = x > 0.41421356f;
  const V f = where(upper, 0.5f * (x - 1.0f), x);
  return log1p_near_0(f) + where(upper, splat(0.69314718f), splat(0.0f));
}

FASTKD_INLINE V log1p(V x) {
  // 1 + x = 2^k m with m in [sqrt(1/2), sqrt(2)); a first-order correction adds what rounding 1 + x lost.
  const V u = 1.0f + x;
  const V lost = where(u > 3.0e38f, splat(0.0f), (x - (u - 1.0f)) / u);
  const I k = ((I)u - 0x3f3504f3) >> 23;
  const V m = (V)((I)u - (k << 23));
  const V y = log1p_near_0(m - 1.0f) + (lost + __builtin_convertvector(k, V) * 0.69314718f);
  const V special = where(u == 0.0f, splat(-__builtin_inff()), where(u > 0.0f, u, splat(__builtin_nanf(""))));
  return where((u > 0.0f) & (u < 3.0e38f), y, special);
}

FASTKD_INLINE V logaddexp(V a, V b) {
  const V gap = abs(a - b);
  // exp(-gap), which is 0 long before the clamp.
  const V ratio = exp2_of_negative(at_least(-gap, splat(EXP_LOWEST)), splat(LOG2E_HIGH), splat(LOG2E_LOW));
  return at_least(a, b) + log1p_of_unit(ratio);
}

// fastkd/divergences.py, log_mixture: log(m / max(p, q)), of 1 + change as long as that has not cancelled, else of the
// sum.
FASTKD_INLINE V log_mixture(V log_ratio, V share, V rest) {
  const I above = log_ratio > 0.0f;
  const V lower = where(above, rest, share);
  V power;
  // The clamp comes before the sign: the compiler would turn that of -abs(x) into a comparison and a selection.
  const V more = exp_less_power_in_range(-at_most(abs(log_ratio), splat(-EXP_LOWEST)), power);
  const V change = lower * (more + (power - 1.0f));
  const V sum = where(above, share, rest) + lower * (more + power);
  const I k = ((I)sum - 0x3f3504f3) >> 23;  // sum = 2^k m with m in [sqrt(1/2), sqrt(2))
  const V m = (V)((I)sum - (k << 23));
  const I near = k == 0;
  return log1p_near_0(where(near, change, m - 1.0f)) + __builtin_convertvector(k, V) * 0.69314718f;
}

// log_mixture of equal shares. With r = |log_ratio| it is log cosh(r / 2) - r / 2 up to 1.25, where the even function is
// r^2 times a polynomial of relative error 2e-8, and beyond that log1p(exp(-r)) - log 2, a polynomial in exp(-r).
FASTKD_INLINE V log_even_mixture(V log_ratio) {
  const V size = abs(log_ratio), square = size * size;
  V near = square * 1.56494246e-06f - 2.56289625e-05f;
  near = near * square + 3.46835398e-04f;
  near = near * square - 5.20825996e-03f;
  near = near * square + 1.24999998e-01f;
  near = (near * size - 0.5f) * size;
  const V ratio = exp2_of_negative(-at_most(size, splat(-EXP_LOWEST)), splat(LOG2E_HIGH), splat(LOG2E_LOW));
  V far = ratio * -7.6661080e-02f + 1.7033771e-01f;
  far = far * ratio - 2.4472148e-01f;
  far = far * ratio + 3.3283427e-01f;
  far = far * ratio - 4.9997717e-01f;
  far = far * ratio + 9.9999961e-01f;
  far = far * ratio - 6.9314718e-01f;
  return where(size < 1.25f, near, far);
}

// |p - q| (fastkd/divergences.py). If p and q are close, it is (p + q) tanh(|log_ratio| / 2), and the polynomial (a
// Chebyshev fit) is within 3e-9 of tanh(x / 2) / x. Apart from that the subtraction is exact to a few units.
FASTKD_INLINE V distance(V p, V q, V log_ratio) {
  const V size = abs(log_ratio), square = size * size;
  V y = square * 3.646007099e-05f - 4.182397679e-04f;
  y = y * square + 4.165904131e-03f;
  y = y * square - 4.166660458e-02f;
  y = y * square + 5.000000000e-01f;
  return where(size < 0.8f, (p + q) * (size * y), abs(p - q));
}

FASTKD_INLINE U widen(H x) {
#if defined(__AVX512F__)
  return (U)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (U)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, U);
#endif
}

FASTKD_INLINE V from_bf16(H x) { return (V)(widen(x) << 16); }

// The bits of x as bf16, below 16 zeros. A NaN stays a NaN.
FASTKD_INLINE U bits_of_bf16(V x) {
  const U bits = (U)x;
  const U rounded = bits + (0x7fff + ((bits >> 16) & 1));  // to nearest, ties to even
  return (rounded | (U)(x != x)) >> 16;
}

FASTKD_INLINE H to_bf16(V x) { return __builtin_convertvector(bits_of_bf16(x), H); }

#if defined(__AVX512F__)
FASTKD_INLINE V from_fp16(H x) { return (V)_mm512_cvtph_ps((__m256i)x); }
FASTKD_INLINE H to_fp16(V x) { return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
FASTKD_INLINE V from_fp16(H x) { return (V)_mm256_cvtph_ps((__m128i)x); }
FASTKD_INLINE H to_fp16(V x) { return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
// Without conversion instructions: exact in integers and one float operation each.
FASTKD_INLINE V from_fp16(H x) {
  const U bits = widen(x);
  const U sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13;
  const V normal = (V)(magnitude + (112u << 23));
  const V subnormal = (V)(magnitude + (113u << 23)) - 6.103515625e-5f;  // 2^-14
  const V special = (V)(magnitude + (224u << 23));                       // infinities and NaNs
  const I is_special = magnitude >= (31u << 23), is_subnormal = magnitude < (1u << 23);
  return (V)((U)where(is_special, special, where(is_subnormal, subnormal, normal)) | sign);
}

FASTKD_INLINE H to_fp16(V x) {
  const U sign = ((U)x >> 16) & 0x8000, magnitude = (U)x & 0x7fffffff;
  const U normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const U subnormal = (U)((V)magnitude + 0.5f) - 0x3f000000;  // the float addition rounds at 2^-24
  const U special = magnitude > 0x7f800000 ? (0x7e00 - U{}) : (0x7c00 - U{});
  const U finite = magnitude < (113u << 23) ? subnormal : normal;
  return __builtin_convertvector((magnitude >= 0x477ff000 ? special : finite) | sign, H);
}
#endif

// Subnormal operands cost a microcode assist each and are 0 for our purpose; restores what it found.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// Converts two vectors to bf16 and stores them; past the cache if PAST_CACHE, for which the address must be a multiple of
// the size of a V.
template <bool PAST_CACHE>
FASTKD_INLINE void store_bf16(uint16_t* to, V low, V high) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Instructions that pack work within 128 bits.
  const __m256i packed = _mm256_packus_epi32((__m256i)bits_of_bf16(low), (__m256i)bits_of_bf16(high));
  const __m256i ordered = _mm256_permute4x64_epi64(packed, 0xd8);
  if (PAST_CACHE)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), ordered);
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), ordered);
#else
  const H halves[2] = {to_bf16(low), to_bf16(high)};
#if defined(__AVX512F__)
  if (PAST_CACHE) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)halves[0]);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + LANES), (__m256i)halves[1]);
    return;
  }
#endif
  store_half(to, halves[0]);
  store_half(to + LANES, halves[1]);
#endif
}

// Stores a vector past the cache. The address must be a multiple of the vector's size.
FASTKD_INLINE void stream(float* to, V v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(to, (__m128)v);
#else
  store(to, v);
#endif
}

// Copies past the cache. A gradient that does not fit in the cache would evict the logits, and be read before it is
// written.
FASTKD_INLINE void stream(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  constexpr int64_t LINE = 64;
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & (LINE - 1));
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + LINE <= bytes; i += LINE) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX2__)
    for (int j = 0; j < LINE; j += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + j),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + j)));
#else
    for (int j = 0; j < LINE; j += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + j),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + j)));
#endif
  }
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}
