// The kernel of the measures (fastkd/call/measures.py) on a block.

namespace {

// One column's terms of three measures, in the places that a divergence has for its terms: KL(p || q) in phi,
// KL(q || p) in g, the teacher's entropy in h.
struct MeasureTerms {
  static FASTKD_INLINE void eval(V p, V q, V log_p, V, V log_ratio, const float*, float, V& phi, V& g, V& h) {
    phi = p * log_ratio;
    g = -q * log_ratio;
    h = -p * log_p;
  }
};

struct BlockMeasures {
  double teacher_entropy, forward_kl, reverse_kl, acceptance;
};

// Sums the terms over a block; with LOG_0, under the policy for log 0. Padding columns have p = q = 0, and terms of 0.
template <bool LOG_0>
BlockMeasures block_measures(const BlockView& of, int n) {
  const BlockView view = of;
  V entropy{}, forward{}, reverse{}, acceptance{};
  for (int start = 0; start < n; start += STRIP) {
    V entropy_strip{}, forward_strip{}, reverse_strip{}, acceptance_strip{};
    for (int i = start; i < std::min(start + STRIP, n); i += LANES) {
      V p, q, phi, g, h;
      evaluate<MeasureTerms, LOG_0, true>(view, i, nullptr, 0, p, q, phi, g, h);
      entropy_strip += h;
      forward_strip += phi;
      reverse_strip += g;
      acceptance_strip += at_most(p, q);
    }
    entropy += entropy_strip;
    forward += forward_strip;
    reverse += reverse_strip;
    acceptance += acceptance_strip;
  }
  return {sum_lanes(entropy), sum_lanes(forward), sum_lanes(reverse), sum_lanes(acceptance)};
}

}  // namespace
