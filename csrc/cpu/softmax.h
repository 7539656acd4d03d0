// A softmax, a block as kernels see it, and what accompanies the arithmetic on a block: prefetching, and the gradient
// of another row.

namespace {

// softmax(z / T). log2(e) / T is stored as two floats: rounded to one, it would change every log probability by 1.3e-8
// of itself at T = 1, and a probability of 1e-12 by three units in the last place.
struct Softmax {
  double temperature;
  float factor, factor_low;  // log2(e) / T
  float lowest;              // exp((z - max) / T) is 0 if z - max is below this
  float inverse;             // 1 / T
  explicit Softmax(double asked) {
    const double whole = std::clamp<double>(LOG2_E / asked, SMALLEST, LARGEST);
    factor = float(whole);
    factor_low = float(whole - factor);
    temperature = LOG2_E / whole;
    lowest = float(-126.9998 / factor);
    inverse = float(1 / temperature);
  }
  // exp(gap / T), where gap = z - max
  V exponential(V gap) const {
    return exp2_of_negative(at_least(gap, splat(lowest)), splat(factor), splat(factor_low));
  }

 private:
  static constexpr double LOG2_E = 1.4426950408889634;
  static constexpr float SMALLEST = std::numeric_limits<float>::min(), LARGEST = std::numeric_limits<float>::max();
};

const Softmax UNTEMPERED(1);  // for the cross-entropy

// Logits that will be needed soon. They are requested line by line between arithmetic, which hides the latency of
// memory: hardware prefetchers stop at page ends, and idle while a block is computed.
struct Ahead {
  const char *s = nullptr, *t = nullptr;
  int s_width = 0, t_width = 0;  // bytes per column; 0 if there is nothing to request
  FASTKD_INLINE void ask(int i) const {
    __builtin_prefetch(s + i * s_width, 0, 2);
    __builtin_prefetch(t + i * t_width, 0, 2);
  }
};

// A block, and how its numbers become p, q and their logarithms.
struct BlockView {
  const float *s, *t, *s_exp, *t_exp;  // z and exp((z - max) / T)
  const float* g;                      // g of the divergence, if it was kept
  float s_max, t_max;
  float s_weight, t_weight;                              // p = t_exp * t_weight
  float s_inverse, t_inverse;                            // log p = (t - t_max) * t_inverse + t_offset_low + t_offset
  float s_offset, t_offset, s_offset_low, t_offset_low;  // two floats per offset
  // log p - log q = ((t - t_origin) * temperature_ratio - (s - s_origin)) * s_inverse + log_ratio_high + log_ratio_low.
  // The origins are 0 if that is more exact, which it is for a student close to its teacher.
  float s_origin, t_origin, temperature_ratio = 1, log_ratio_low, log_ratio_high;
  int64_t first;               // column of the row
  const int64_t* sure = NONE;  // two columns of the row that sums exclude; -1 for none
  static constexpr int64_t NONE[2] = {-1, -1};
};

using GradientKernel = void (*)(const BlockView&, int from, int to, const float* params, float degree, float sum,
                                float coefficient, float* out);

// The gradient of a block, ready to be written: at once, or strip by strip between the strips of another row's
// statistics, so that its loads and stores overlap with arithmetic.
struct PendingGradient {
  GradientKernel kernel = nullptr;
  BlockView view{};
  const float* params = nullptr;
  float degree = 0, sum = 0, coefficient = 0;
  float* out = nullptr;
  char* place = nullptr;  // destination if `out` is scratch
  Dtype dtype = Dtype::f32;
  bool past_cache = false;

  void write(int from, int to) const {
    if (!kernel) return;
    kernel(view, from, to, params, degree, sum, coefficient, out);
    if (place) store_block(place, dtype, from, to - from, out + from, past_cache);
  }
};

}  // namespace
