// The kernels that compute the statistics of a block.

namespace {

enum Moments { FORWARD = 1, REVERSE = 2, CROSS = 4, SINGLE = 8, ALL = 7 };

// Running sums of a block. Each strip is summed separately, so that a float32 sum has few terms of similar size.
struct LaneSums {
  V s_exp_sum{}, t_exp_sum{}, forward{}, reverse{}, cross{}, entropy{}, s_exp_sum_t1{}, centered_sum{};

  FASTKD_INLINE void operator+=(const LaneSums& strip) {
    s_exp_sum += strip.s_exp_sum;
    t_exp_sum += strip.t_exp_sum;
    forward += strip.forward;
    reverse += strip.reverse;
    cross += strip.cross;
    entropy += strip.entropy;
    s_exp_sum_t1 += strip.s_exp_sum_t1;
    centered_sum += strip.centered_sum;
  }
};

// Whether to compute a block's moments from t - s: one subtraction of close numbers, whose error is small.
bool are_close(const BlockStatistics& of, const Softmax& student, const Softmax& teacher) {
  return student.temperature == teacher.temperature && std::abs(of.t_max - of.s_max) < CLOSE_LOGITS;
}

// Sums over the lanes. Moments are divided by the student's temperature and, if they were computed from t - s, made
// relative to the block's maxima.
void finish_block(const LaneSums& sums, bool close, double temperature, BlockStatistics& out) {
  out.s_exp_sum = sum_lanes(sums.s_exp_sum);
  out.t_exp_sum = sum_lanes(sums.t_exp_sum);
  const double ahead = close ? double(out.t_max) - out.s_max : 0;
  out.forward = (sum_lanes(sums.forward) - ahead * out.t_exp_sum) / temperature;
  out.reverse = (sum_lanes(sums.reverse) + ahead * out.s_exp_sum) / temperature;
  out.cross = sum_lanes(sums.cross) / temperature;
  out.entropy = sum_lanes(sums.entropy) / temperature;
}

// Statistics of a block. The exponentials are stored in s_exp and t_exp (and s_exp_t1).
template <int MOMENTS, bool T1, bool LOG_0, bool CLOSE>
void block_statistics(const float* s, const float* t, int n, Softmax student, Softmax teacher, Softmax t1,
                      float s_threshold, float t_threshold, float* s_exp, float* t_exp, float* s_exp_t1, Ahead ahead,
                      const PendingGradient& alongside, BlockStatistics& out) {
  const V s_max = splat(out.s_max), t_max = splat(out.t_max);
  const V ratio = splat(float(student.temperature / teacher.temperature));
  LaneSums sums;  // moments times the student's temperature
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
      strip.s_exp_sum += e_s;
      strip.t_exp_sum += e_t;
      const V difference = CLOSE ? load(t + i) - load(s + i) : t_gap * ratio - s_gap;
      // With LOG_0, a negligible probability gives 0 whatever the logarithm is.
      auto times = [](V e, V x, float threshold) { return LOG_0 ? where(e > threshold, e * x, V{}) : e * x; };
      if (MOMENTS & FORWARD) strip.forward += times(e_t, difference, t_threshold);
      if (MOMENTS & REVERSE) strip.reverse -= times(e_s, difference, s_threshold);
      if (MOMENTS & CROSS) strip.cross += times(e_t, s_gap, t_threshold);
      if (MOMENTS & SINGLE) {
        strip.entropy += times(e_s, s_gap, s_threshold);
        strip.centered_sum += i + LANES <= n ? s_gap : V{};
      }
      if (T1) {
        const V e = t1.exponential(s_gap);
        store(s_exp_t1 + i, e);
        strip.s_exp_sum_t1 += e;
      }
    }
    sums += strip;
  }
  finish_block(sums, CLOSE, student.temperature, out);
  out.s_exp_sum_t1 = sum_lanes(sums.s_exp_sum_t1);
  out.centered_sum = sum_lanes(sums.centered_sum);
  for (int i = n / LANES * LANES; i < n; ++i) out.centered_sum += s[i] - out.s_max;
}

// Recomputes the sums of a block from its exponentials. The caller has set those of excluded columns to 0.
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
      strip.s_exp_sum += e_s;
      strip.t_exp_sum += e_t;
      strip.forward += times(e_t, difference, t_threshold);
      strip.reverse -= times(e_s, difference, s_threshold);
      strip.cross += times(e_t, s_gap, t_threshold);
      strip.entropy += times(e_s, s_gap, s_threshold);
    }
    sums += strip;
  }
  finish_block(sums, close, student.temperature, out);
}

using StatisticsKernel = decltype(&block_statistics<0, false, false, false>);

template <bool T1, bool LOG_0, bool CLOSE>
StatisticsKernel statistics_kernel(int moments) {
  switch (moments) {
    case 0: return block_statistics<0, T1, LOG_0, false>;
    case FORWARD: return block_statistics<FORWARD, T1, LOG_0, CLOSE>;
    case REVERSE: return block_statistics<REVERSE, T1, LOG_0, CLOSE>;
    case FORWARD | REVERSE: return block_statistics<FORWARD | REVERSE, T1, LOG_0, CLOSE>;
    case CROSS: return block_statistics<CROSS, T1, LOG_0, false>;
    default: return block_statistics<ALL | SINGLE, T1, LOG_0, CLOSE>;
  }
}

StatisticsKernel statistics_kernel(int moments, bool t1, bool log_0, bool close) {
  const auto of = [&](auto t1, auto log_0) {
    constexpr bool T1 = decltype(t1)::value, LOG_0 = decltype(log_0)::value;
    return close ? statistics_kernel<T1, LOG_0, true>(moments) : statistics_kernel<T1, LOG_0, false>(moments);
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (t1) return log_0 ? of(yes, yes) : of(yes, no);
  return log_0 ? of(no, yes) : of(no, no);
}

}  // namespace
