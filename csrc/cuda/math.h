// The functions of a float that definitions of divergences may call, and conversions from and to bf16 and fp16. For
// device and host.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define FASTKD_INLINE __host__ __device__ __forceinline__
#define FASTKD_PER_ROW static __host__ __device__ __noinline__  // a function that runs once per row
#else
#define FASTKD_INLINE inline
#define FASTKD_PER_ROW inline
#endif

namespace fastkd::cuda {

typedef float V;

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr double LOG2_E_EXACT = 1.44269504088896341, LN_2_EXACT = 0.693147180559945309;
constexpr float LOG2_E = 1.44269504088896341f, LOG2_E_LOW = 1.925963033500011e-8f, LN_2 = 0.693147180559945309f;

FASTKD_INLINE V splat(float x) { return x; }
FASTKD_INLINE V abs(V x) { return fabsf(x); }
FASTKD_INLINE V where(bool mask, V a, V b) { return mask ? a : b; }
FASTKD_INLINE bool finite(float x) { return x - x == 0; }

// A product that is rounded on its own. If it were fused with a following subtraction, equal logits could differ.
FASTKD_INLINE V product(V a, V b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// 2^x, to two units in the last place. Subnormal results become 0.
FASTKD_INLINE V exp2_of(V x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// 2^(a * b). A first-order correction adds what rounding the product lost, unless the product is infinite.
FASTKD_INLINE V exp2_of_product(V a, V b) {
  const float x = product(a, b), value = exp2_of(x), lost = fmaf(a, b, -x);
  return fabsf(lost) < 1 ? fmaf(value, lost * LN_2, value) : value;
}

// The product of x and log2(e) is rounded; a first-order correction adds what that lost.
FASTKD_INLINE V exp(V x) {
  const float product = x * LOG2_E;
  const float lost = fmaf(x, LOG2_E, -product) + x * LOG2_E_LOW;
  const float y = exp2_of(product);
  return finite(lost) && y < INF ? fmaf(y, lost * LN_2, y) : y;
}

// (high + low) log_x as a rounded product and what rounding lost (fastkd/divergences.py, power).
struct Product {
  V rounded, lost;
};

FASTKD_INLINE Product product_in_parts(V log_x, V high, V low) {
  const float rounded = product(log_x, high);
  return {rounded, fmaf(log_x, high, -rounded) + log_x * low};
}

// exp(rounded + lost), where lost is at most a few percent of the largest term that the sum had.
FASTKD_INLINE V exp_of_parts(V rounded, V lost) {
  const float sum = rounded + lost, rest = (rounded - sum) + lost, product = sum * LOG2_E;
  const float more = fmaf(sum, LOG2_E, -product) + fmaf(sum, LOG2_E_LOW, rest * LOG2_E);
  const float y = exp2_of(product);
  return finite(more) && y < INF ? fmaf(y, more * LN_2, y) : y;
}

FASTKD_INLINE V power(V log_x, V high, V low) {
  const Product x = product_in_parts(log_x, high, low);
  return exp_of_parts(x.rounded, x.lost);
}

FASTKD_INLINE V power_product(V log_x, V a_high, V a_low, V log_y, V b_high, V b_low) {
  const Product x = product_in_parts(log_x, a_high, a_low), y = product_in_parts(log_y, b_high, b_low);
  const float sum = x.rounded + y.rounded, part = sum - x.rounded;
  const float lost = (x.rounded - (sum - part)) + (y.rounded - part);  // by that sum
  return exp_of_parts(sum, lost + (x.lost + y.lost));
}

// Below 0.625 the quotient of exponentials cancels; an odd polynomial (Cephes) replaces it there.
FASTKD_INLINE V tanh(V x) {
  const float size = fminf(fabsf(x), 10.0f), square = size * size;
  float y = square * -5.70498872745e-3f + 2.06390887954e-2f;
  y = y * square - 5.37397155531e-2f;
  y = y * square + 1.33314422036e-1f;
  y = y * square - 3.33332819422e-1f;
  const float large = 1 - 2 / (exp2_of(2 * LOG2_E * size) + 1);
  const float value = size < 0.625f ? size + size * square * y : large;
  return x == x ? copysignf(value, x) : x;
}

FASTKD_INLINE V log1p(V x) { return ::log1pf(x); }

// Near 0, where exp(x) - 1 cancels, a Taylor series.
FASTKD_INLINE V expm1(V x) {
  const float near = fminf(fmaxf(x, -0.5f), 0.5f);
  float y = near * (1.0f / 40320) + 1.0f / 5040;
  y = y * near + 1.0f / 720;
  y = y * near + 1.0f / 120;
  y = y * near + 1.0f / 24;
  y = y * near + 1.0f / 6;
  y = y * near + 0.5f;
  return fabsf(x) < 0.5f ? y * (near * near) + near : exp(x) - 1;
}

template <class To, class From>
FASTKD_INLINE To as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// log(m / max(p, q)) as in fastkd/divergences.py. It is log(1 + x) + k log 2 with 1 + x in [sqrt(1/2), sqrt(2)); the
// polynomial is that of Cephes' logf. If k is 0, expm1 computes x, so x is accurate however close to 0 it is.
FASTKD_INLINE V log_mixture(V log_ratio, V share, V rest) {
  const bool above = log_ratio > 0;
  const float lower = above ? rest : share, size = -fabsf(log_ratio), change = lower * expm1(size);
  const float sum = (above ? share : rest) + lower * exp2_of(size * LOG2_E);
  const bool far = change < -0.29289322f;  // k is not 0; false for a NaN
  const uint32_t bits = as<uint32_t>(sum);
  const int k = far ? int(bits - 0x3f3504f3) >> 23 : 0;
  const float x = far ? as<float>(bits - (uint32_t(k) << 23)) - 1 : change;
  float y = 7.0376836292e-2f * x - 1.1514610310e-1f;
  y = y * x + 1.1676998740e-1f;
  y = y * x - 1.2420140846e-1f;
  y = y * x + 1.4249322787e-1f;
  y = y * x - 1.6668057665e-1f;
  y = y * x + 2.0000714765e-1f;
  y = y * x - 2.4999993993e-1f;
  y = y * x + 3.3333331174e-1f;
  y = y * x - 0.5f;
  return float(k) * LN_2 + (y * (x * x) + x);
}

// log_mixture of equal shares. With r = |log_ratio| it is log cosh(r / 2) - r / 2 up to 1.25, where the even function is
// r^2 times a polynomial of relative error 2e-8, and beyond that log1p(exp(-r)) - log 2, a polynomial in exp(-r).
FASTKD_INLINE V log_even_mixture(V log_ratio) {
  const float size = fabsf(log_ratio), square = size * size;
  float near = square * 1.56494246e-06f - 2.56289625e-05f;
  near = near * square + 3.46835398e-04f;
  near = near * square - 5.20825996e-03f;
  near = near * square + 1.24999998e-01f;
  near = (near * size - 0.5f) * size;
  const float ratio = exp2_of(size * -LOG2_E);
  float far = ratio * -7.6661080e-02f + 1.7033771e-01f;
  far = far * ratio - 2.4472148e-01f;
  far = far * ratio + 3.3283427e-01f;
  far = far * ratio - 4.9997717e-01f;
  far = far * ratio + 9.9999961e-01f;
  far = far * ratio - 6.9314718e-01f;
  return size < 1.25f ? near : far;
}

// |p - q| as in fastkd/divergences.py.
FASTKD_INLINE V distance(V p, V q, V log_ratio) {
  return -((log_ratio > 0 ? p : q) * expm1(-fabsf(log_ratio)));
}

// log1p(u) for u in [0, 1] is u times a polynomial, interpolated at Chebyshev nodes, with relative error 5e-9 before
// rounding.
FASTKD_INLINE V logaddexp(V a, V b) {
  const float u = exp2_of(fabsf(a - b) * -LOG2_E);
  float y = u * -0.0031760570127516985f + 0.019542528316378593f;
  y = y * u - 0.05637361481785774f;
  y = y * u + 0.10543623566627502f;
  y = y * u - 0.1526966691017151f;
  y = y * u + 0.1966327428817749f;
  y = y * u - 0.24951615929603577f;
  y = y * u + 0.33329710364341736f;
  y = y * u - 0.49999892711639404f;
  return (a > b ? a : b) + (y * u + 1) * u;
}

// ---- bits

FASTKD_INLINE float from_bf16(uint16_t x) { return as<float>(uint32_t(x) << 16); }

FASTKD_INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = as<uint32_t>(x);
  const uint32_t rounded = bits + (0x7fff + ((bits >> 16) & 1));  // to nearest, ties to even
  return uint16_t((x == x ? rounded : bits | 0x400000) >> 16);
}

FASTKD_INLINE float from_fp16(uint16_t x) {
#if defined(__CUDA_ARCH__)
  return __half2float(as<__half>(x));
#else
  const uint32_t sign = uint32_t(x & 0x8000) << 16, magnitude = uint32_t(x & 0x7fff) << 13;
  if (magnitude >= (31u << 23)) return as<float>(sign | (magnitude + (224u << 23)));  // infinities and NaNs
  if (magnitude < (1u << 23)) return (sign ? -1.0f : 1.0f) * (as<float>(magnitude + (113u << 23)) - 6.103515625e-5f);
  return as<float>(sign | (magnitude + (112u << 23)));
#endif
}

FASTKD_INLINE uint16_t to_fp16(float x) {
#if defined(__CUDA_ARCH__)
  return as<uint16_t>(__float2half_rn(x));
#else
  const uint32_t sign = (as<uint32_t>(x) >> 16) & 0x8000, magnitude = as<uint32_t>(x) & 0x7fffffff;
  if (magnitude >= 0x477ff000) return uint16_t(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
  if (magnitude < (113u << 23))  // the float addition rounds at 2^-24
    return uint16_t(sign | (as<uint32_t>(as<float>(magnitude) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13));
#endif
}

FASTKD_INLINE uint32_t two_bf16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  return to_bf16(low) | uint32_t(to_bf16(high)) << 16;
#endif
}

FASTKD_INLINE uint32_t two_fp16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  return to_fp16(low) | uint32_t(to_fp16(high)) << 16;
#endif
}

}  // namespace fastkd::cuda
