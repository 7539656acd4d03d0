// A divergence on one vector of columns, with or without the policy for log 0.

namespace {

// phi, g and h of one vector; with LOG_0, under the policy of fastkd/call/log_zero.py.
template <class Divergence, bool LOG_0>
FASTKD_INLINE void evaluate_terms(V p, V q, V log_p, V log_q, V log_ratio, const float* params, float degree, V& phi,
                                  V& g, V& h) {
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

}  // namespace
