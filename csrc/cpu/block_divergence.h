// The kernels of a divergence on a block: the sums of phi and g, and the gradients.

namespace {

// A copy of a divergence's parameters. Kernels copy these and the view, because the compiler would load what a reference
// or a pointer reaches again after every store.
struct Parameters {
  float values[PARAMETERS];
  explicit Parameters(const float* from) { std::memcpy(values, from, sizeof(values)); }
};

template <class Divergence, bool LOG_0, bool NORMALIZED>
FASTKD_INLINE void evaluate(const BlockView& view, int i, const float* params, float degree, V& p, V& q, V& phi, V& g,
                            V& h) {
  p = NORMALIZED ? load(view.t_exp + i) * view.t_weight : splat(1);
  q = NORMALIZED ? load(view.s_exp + i) * view.s_weight : splat(1);
  const V s = load(view.s + i), t = load(view.t + i);
  const V log_p = ((t - view.t_max) * view.t_inverse + view.t_offset_low) + view.t_offset;
  const V log_q = ((s - view.s_max) * view.s_inverse + view.s_offset_low) + view.s_offset;
  const V gap = (t - view.t_origin) * view.temperature_ratio - (s - view.s_origin);
  // Adds the larger part of the offset first: if it cancels most of the gap, that sum is exact.
  const V log_ratio = (gap * view.s_inverse + view.log_ratio_high) + view.log_ratio_low;
  evaluate_terms<Divergence, LOG_0>(p, q, log_p, log_q, log_ratio, params, degree, phi, g, h);
}

// Columns whose p, q, logarithms and log p - log q are known more exactly than from a block.
struct Columns {
  alignas(64) float p[LANES], q[LANES], log_p[LANES], log_q[LANES], log_ratio[LANES];
  alignas(64) float phi[LANES], g[LANES], h[LANES];
};

template <class Divergence>
void evaluate_columns(Columns& at, const float* params, float degree) {
  V phi, g, h;
  evaluate_terms<Divergence, true>(load(at.p), load(at.q), load(at.log_p), load(at.log_q), load(at.log_ratio), params,
                                   degree, phi, g, h);
  store(at.phi, phi);
  store(at.g, g);
  store(at.h, h);
}

struct BlockSums {
  double phi, g, h;  // h is 0 if no teacher's gradient is wanted
};

// Sets the lanes of two columns to 0.
FASTKD_INLINE void leave_out(const int64_t* out, int i, V& phi, V& g, V& h) {
  for (int k = 0; k < 2; ++k) {
    const int64_t lane = out[k] - i;
    if (lane >= 0 && lane < LANES) phi[lane] = g[lane] = h[lane] = 0;
  }
}

// Sums phi and g over a block, and h for the teacher's gradient. The sum of h as degree * phi - g would cancel where p
// is far from q. Also stores g, perhaps over t_exp, which is not needed once g is known.
template <class Divergence, bool LOG_0, bool NORMALIZED, bool TEACHER>
BlockSums block_sums(const BlockView& of, int n, const float* given, float degree, float* g_out) {
  const BlockView view = of;
  const Parameters params(given);
  V phi_sum{}, g_sum{}, h_sum{};
  const int whole = n / LANES * LANES;
  // Positions of the excluded columns in this block; -1 if they are in another one.
  int64_t out[2];
  for (int k = 0; k < 2; ++k) {
    out[k] = view.sure[k] < 0 ? -1 : view.sure[k] - view.first;
    if (out[k] >= n) out[k] = -1;
  }
  // Only a strip with an excluded column pays for the access to single lanes.
  auto add_strip = [&](auto leaves_out, int start, int end) {
    V phi_strip{}, g_strip{}, h_strip{};
    for (int i = start; i < end; i += LANES) {
      V p, q, phi, g, h;
      evaluate<Divergence, LOG_0, NORMALIZED>(view, i, params.values, degree, p, q, phi, g, h);
      store(g_out + i, g);
      if constexpr (decltype(leaves_out)::value) leave_out(out, i, phi, g, h);
      phi_strip += phi;
      g_strip += g;
      if (TEACHER) h_strip += h;
    }
    phi_sum += phi_strip;
    g_sum += g_strip;
    if (TEACHER) h_sum += h_strip;
  };
  for (int start = 0; start < whole; start += STRIP) {
    const int end = std::min(start + STRIP, whole);
    if ((out[0] >= start && out[0] < end) || (out[1] >= start && out[1] < end))
      add_strip(std::true_type{}, start, end);
    else
      add_strip(std::false_type{}, start, end);
  }
  BlockSums sums{sum_lanes(phi_sum), sum_lanes(g_sum), TEACHER ? sum_lanes(h_sum) : 0};
  if (whole == n) return sums;
  V p, q, phi, g, h;
  evaluate<Divergence, LOG_0, NORMALIZED>(view, whole, params.values, degree, p, q, phi, g, h);
  store(g_out + whole, g);
  for (int lane = 0; whole + lane < n; ++lane) {
    if (whole + lane == out[0] || whole + lane == out[1]) continue;
    sums.phi += phi[lane];
    sums.g += g[lane];
    if (TEACHER) sums.h += h[lane];
  }
  return sums;
}

// Where a gradient goes: to scratch for further changes, or past the cache directly to memory.
enum Form { SCRATCH, STREAM, FORMS };

template <int FORM>
FASTKD_INLINE void put(float* out, int i, V value) {
  FORM == STREAM ? stream(out + i, value) : store(out + i, value);
}

// (x_v - r_v sum_u x_u) * coefficient: the student's gradient (x = g = d phi / d log q, r = q) or the teacher's
// (x = h = d phi / d log p, r = p). fastkd/divergences.py derives it.
template <class Divergence, bool LOG_0, bool NORMALIZED, bool TEACHER, int FORM>
void block_gradient(const BlockView& of, int from, int to, const float* given, float degree, float sum,
                    float coefficient, float* out) {
  const BlockView view = of;
  const Parameters params(given);
  V p, q, phi, g, h;
#pragma GCC unroll 2
  for (int i = from; i < to; i += LANES) {
    evaluate<Divergence, LOG_0, NORMALIZED>(view, i, params.values, degree, p, q, phi, g, h);
    const V x = TEACHER ? h : g;
    put<FORM>(out, i, (NORMALIZED ? x - (TEACHER ? p : q) * sum : x) * coefficient);
  }
}

// The student's gradient if g was kept.
template <int FORM>
void block_projection(const BlockView& of, int from, int to, const float*, float, float sum, float coefficient,
                      float* out) {
  const BlockView view = of;
#pragma GCC unroll 4
  for (int i = from; i < to; i += LANES)
    put<FORM>(out, i, (load(view.g + i) - load(view.s_exp + i) * view.s_weight * sum) * coefficient);
}

constexpr GradientKernel PROJECTION[FORMS] = {block_projection<SCRATCH>, block_projection<STREAM>};

// The kernels of a divergence. [1] and *_log_0 apply the policy for log 0; sums[TEACHER][LOG_0].
struct Kernels {
  bool uses_logs, gradient_uses_logs;
  decltype(&block_sums<forward_kl, false, true, false>) sums[2][2];
  GradientKernel student[FORMS], student_log_0, teacher[2];
  decltype(&evaluate_columns<forward_kl>) columns;
};

template <class D, bool NORMALIZED>
constexpr Kernels kernels_of() {
  return {D::uses_logs,
          D::gradient_uses_logs,
          {{block_sums<D, false, NORMALIZED, false>, block_sums<D, true, NORMALIZED, false>},
           {block_sums<D, false, NORMALIZED, true>, block_sums<D, true, NORMALIZED, true>}},
          {block_gradient<D, false, NORMALIZED, false, SCRATCH>, block_gradient<D, false, NORMALIZED, false, STREAM>},
          block_gradient<D, true, NORMALIZED, false, SCRATCH>,
          {block_gradient<D, false, NORMALIZED, true, SCRATCH>, block_gradient<D, true, NORMALIZED, true, SCRATCH>},
          evaluate_columns<D>};
}

const Kernels& kernels_of(const Call& call) {
#define FASTKD_NORMALIZED(name) kernels_of<name, true>(),
#define FASTKD_RAW(name) kernels_of<name, name::always_normalized>(),
  static constexpr Kernels normalized[] = {FASTKD_DIVERGENCES(FASTKD_NORMALIZED)};
  static constexpr Kernels raw[] = {FASTKD_DIVERGENCES(FASTKD_RAW)};
#undef FASTKD_NORMALIZED
#undef FASTKD_RAW
  return (call.normalized ? normalized : raw)[call.divergence];
}

}  // namespace
