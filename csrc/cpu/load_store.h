// Rows in memory: how blocks of logits are loaded, converted and stored. Include it inside the namespace of an
// instruction set.

namespace {

constexpr int BLOCK = 2048;
constexpr int STRIP = 16 * LANES;
// Scratch memory of a thread for exponentials. Beside logits that stream through, it stays in a 2 MB second-level
// cache.
constexpr int64_t SCRATCH_BYTES = 5 << 18;
constexpr int64_t AHEAD = 4;               // distance in blocks between prefetching and computing
constexpr int64_t STREAM_BYTES = 4 << 20;  // gradients of at least this size are written past the cache
constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float FLOOR = -1e30f;       // least maximum of a block, so that a block of -inf has a finite one
constexpr float NEGLIGIBLE = 1e-30f;  // as in fastkd/call/log_zero.py, like INFINITE
constexpr float INFINITE = 1e6f;
constexpr float INF = std::numeric_limits<float>::infinity();
// If the maxima or log-sum-exps of the two sides differ by less, s - t is the most exact way to log q - log p.
constexpr float CLOSE_LOGITS = 8;

int64_t row_offset(const Rows& rows, const std::vector<int64_t>& sizes, int64_t row) {
  int64_t offset = 0;
  for (size_t d = sizes.size(); d-- > 0;) {
    offset += (row % sizes[d]) * rows.strides[d];
    row /= sizes[d];
  }
  return offset;
}

int element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Converts a raw logit to z = softcap * tanh(scale * logit / softcap) - shift, and has dz/dlogit.
struct Adjustment {
  float scale = 1, softcap = 0;
  float shift = 0;  // maximum of a row whose logits are all below FLOOR, else 0
  bool identity() const { return scale == 1 && softcap == 0 && shift == 0; }
  V z(V x) const { return softcap == 0 ? x * scale - shift : softcap * tanh(x * scale / softcap); }
  V slope(V z) const {
    const V squashed = z / softcap;
    return softcap == 0 ? splat(scale) : scale * (1.0f - squashed * squashed);
  }

 private:
  static V tanh(V x) {
    // Below 0.6 the quotient of exponentials cancels; an odd polynomial (Cephes) replaces it there.
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

// The maximum of n floats, a whole number of vectors. NaNs are ignored. Four independent chains hide the latency of a
// comparison.
float maximum_of(const float* z, int n) {
  V maxima[4] = {splat(FLOOR), splat(FLOOR), splat(FLOOR), splat(FLOOR)};
  auto update_max = [&](V& maximum, int i) {
    const V x = load(z + i);
    maximum = x > maximum ? x : maximum;
  };
  int i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int chain = 0; chain < 4; ++chain) update_max(maxima[chain], i + chain * LANES);
  for (; i < n; i += LANES) update_max(maxima[0], i);
  auto higher = [](V a, V b) { return a > b ? a : b; };
  return maximum_lane(higher(higher(maxima[0], maxima[1]), higher(maxima[2], maxima[3])));
}

int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

// Returns n logits z of a row as floats, padded to whole vectors with FLOOR: in place if nothing has to be converted,
// else in scratch.
const float* load_block(const char* row, Dtype dtype, int64_t start, int n, const Adjustment& adjust, float* scratch) {
  const int whole = n / LANES * LANES;
  if (dtype == Dtype::f32 && adjust.identity() && whole == n) return reinterpret_cast<const float*>(row) + start;
  const int width = element_size(dtype);
  const char* from = row + start * width;
  alignas(64) char tail[LANES * 4] = {};
  std::memcpy(tail, from + whole * width, (n - whole) * width);

  auto convert = [&](auto read) {
#pragma GCC unroll 4
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

// The maximum of a row if no logit is above FLOOR, else 0. Such a row is shifted to have its maximum at 0; a row of
// -inf has no softmax and becomes NaN. The label's column is ignored if there is a label term.
float low_max(const char* row, Dtype dtype, int64_t vocabulary, const Adjustment& adjust, int64_t label_column = -1) {
  alignas(64) float z[BLOCK];
  if (label_column != 0 && !(load_block(row, dtype, 0, 1, adjust, z)[0] <= FLOOR)) return 0;
  float top = -INF;
  for (int64_t start = 0; start < vocabulary && top <= FLOOR; start += BLOCK) {
    const int n = int(std::min<int64_t>(BLOCK, vocabulary - start));
    const float* block = load_block(row, dtype, start, n, adjust, z);
    for (int i = 0; i < n; ++i)
      if (start + i != label_column && !(block[i] <= top)) top = block[i];  // a NaN, too
  }
  return top;
}

// Converts whole vectors of floats to bfloat16. Both may be the same memory if the stores go through the
// cache, because half i never overtakes the float that it comes from.
#if defined(__AVX512F__) && __GNUC__ >= 10
template <bool PAST_CACHE>
__attribute__((target("avx512bf16"))) void narrow_by_avx512bf16(uint16_t* to, const float* from, int n) {
#pragma GCC unroll 4
  for (int i = 0; i < n; i += LANES) {
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
    if (PAST_CACHE)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), halves);
    else
      store_half(to + i, (H)halves);
  }
}
const bool HAS_AVX512BF16 = __builtin_cpu_supports("avx512bf16");
#else
template <bool PAST_CACHE>
void narrow_by_avx512bf16(uint16_t*, const float*, int) {}
constexpr bool HAS_AVX512BF16 = false;
#endif

template <bool PAST_CACHE>
void narrow_to_bf16(uint16_t* to, const float* from, int n) {
  if (HAS_AVX512BF16) return narrow_by_avx512bf16<PAST_CACHE>(to, from, n);
  int i = 0;
#pragma GCC unroll 2
  for (; i + LANES < n; i += 2 * LANES) store_bf16<PAST_CACHE>(to + i, load(from + i), load(from + i + LANES));
  if (i < n) store_half(to + i, to_bf16(load(from + i)));
}

// Stores n floats in the dtype of memory. `values` is scratch, rounded up to whole vectors.
void store_block(char* row, Dtype dtype, int64_t start, int n, float* values, bool past_cache) {
  const int width = element_size(dtype);
  char* to = row + start * width;
  auto* halves = reinterpret_cast<uint16_t*>(values);
  if (dtype == Dtype::bf16 && n % LANES == 0) {  // straight to memory; past the cache if that fills whole lines
    auto* out = reinterpret_cast<uint16_t*>(to);
    if (!past_cache) return narrow_to_bf16<false>(out, values, n);
    if (reinterpret_cast<uintptr_t>(to) % 64 == 0) return narrow_to_bf16<true>(out, values, n);
  }
  if (dtype == Dtype::bf16) narrow_to_bf16<false>(halves, values, n);
  if (dtype == Dtype::f16)
    for (int i = 0; i < n; i += LANES) store_half(halves + i, to_fp16(load(values + i)));
  const char* from = reinterpret_cast<const char*>(values);
  past_cache ? stream(to, from, int64_t(n) * width) : (void)std::memcpy(to, from, int64_t(n) * width);
}

// Turns the gradient with respect to z into the gradient with respect to the logits.
void chain(const Adjustment& adjust, const float* z, int n, float* gradient) {
  for (int i = 0; i < n; i += LANES) store(gradient + i, load(gradient + i) * adjust.slope(load(z + i)));
}

}  // namespace
