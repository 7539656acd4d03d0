// Log-probabilities on the CPU: the statistics of rows of logits, and their gradient in place (fastkd/backends/logprobs.py
// is the same in PyTorch). Compiled once per instruction set, each time into its own namespace.
//
// A column whose z equals the row's maximum contributes exactly 1 to the sum of exponentials. Such columns are counted,
// and only the others are added in floats. So the sum is 1 + x with an exact 1, also if x is far below a float's epsilon.

#include "kernel.h"

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#pragma GCC diagnostic ignored "-Wunused-function"  // only part of the headers is used here

namespace fastkd::FASTKD_ISA {

#include "vec.h"

#include "load_store.h"
#include "softmax.h"

namespace {

// n floats, followed by copies of `fill`, where n < LANES.
V load_first(const float* from, int64_t n, float fill) {
  float lanes[LANES];
  std::fill(lanes, lanes + LANES, fill);
  std::memcpy(lanes, from, n * sizeof(float));
  return load(lanes);
}

void store_first(float* to, int64_t n, V v) {
  float lanes[LANES];
  store(lanes, v);
  std::memcpy(to, lanes, n * sizeof(float));
}

// How the logits of a row become tempered logits.
struct Tempering {
  Adjustment adjust;
  float temperature;
  Tempering(const LogProbs& call, int64_t row)
      : adjust{float(call.logit_scale), float(call.softcap), 0},
        temperature(call.temperatures ? call.temperatures[row] : float(call.temperature)) {}
  bool identity() const { return adjust.identity() && temperature == 1; }
  V operator()(V x) const { return adjust.z(x) / temperature; }
};

// Replaces the logits of a row by tempered logits, and returns their maximum. NaNs are ignored.
float temper(float* z, int64_t columns, const Tempering& tempering) {
  const V lowest = splat(-INF);
  V maxima[4] = {lowest, lowest, lowest, lowest};
  const int64_t whole = columns / LANES * LANES;
  const bool identity = tempering.identity();
  auto visit = [&](V& maximum, int64_t i) {
    V x = load(z + i);
    if (!identity) store(z + i, x = tempering(x));
    maximum = x > maximum ? x : maximum;
  };
  int64_t i = 0;
  for (; i + 4 * LANES <= whole; i += 4 * LANES)
    for (int chain = 0; chain < 4; ++chain) visit(maxima[chain], i + chain * LANES);
  for (; i < whole; i += LANES) visit(maxima[0], i);
  if (whole < columns) {
    V x = load_first(z + whole, columns - whole, 0);
    if (!identity) store_first(z + whole, columns - whole, tempering(x));
    x = load_first(z + whole, columns - whole, -INF);
    maxima[1] = x > maxima[1] ? x : maxima[1];
  }
  auto higher = [](V a, V b) { return a > b ? a : b; };
  return maximum_lane(higher(higher(maxima[0], maxima[1]), higher(maxima[2], maxima[3])));
}

struct Sums {
  V ones{}, others{}, centered{};

  template <bool CENTERED>
  FASTKD_INLINE void add(V gap) {
    const V e = UNTEMPERED.exponential(gap);
    const I is_maximum = gap == 0.0f;
    ones += where(is_maximum, splat(1), V{});
    others += where(is_maximum, V{}, e);
    if (CENTERED) centered += e * at_least(gap, splat(UNTEMPERED.lowest));  // without 0 * infinity
  }
};

template <bool CENTERED>
void add_sums(const float* z, int64_t columns, float maximum, double& sum, double& centered) {
  sum = centered = 0;
  for (int64_t start = 0; start < columns; start += BLOCK) {
    const int64_t stop = std::min<int64_t>(start + BLOCK, columns);
    Sums chains[4];
    int64_t i = start;
    for (; i + 4 * LANES <= stop; i += 4 * LANES)
      for (int chain = 0; chain < 4; ++chain) chains[chain].add<CENTERED>(load(z + i + chain * LANES) - maximum);
    for (; i + LANES <= stop; i += LANES) chains[0].add<CENTERED>(load(z + i) - maximum);
    if (i < stop) chains[1].add<CENTERED>(load_first(z + i, stop - i, -INF) - maximum);
    for (const Sums& chain : chains) {
      sum += sum_lanes(chain.ones) + sum_lanes(chain.others);
      if (CENTERED) centered += sum_lanes(chain.centered);
    }
  }
}

void statistics_of_row(const LogProbs& call, int64_t row) {
  float* z = call.logits + row * call.stride;
  double* out = call.statistics + 3 * row;
  const float maximum = temper(z, call.columns, Tempering(call, row));
  out[0] = maximum;
  const float center = maximum == -INF ? 0 : maximum;
  (call.centered ? add_sums<true> : add_sums<false>)(z, call.columns, center, out[1], out[2]);
}

// Overwrites the logits x with e (a + b (z - maximum)) T dz/dx, where e = exp(z - maximum). The caller has divided a
// and b by T.
template <bool IDENTITY>
void gradient_of_row(const LogProbs& call, int64_t row) {
  float* x = call.logits + row * call.stride;
  const Tempering tempering(call, row);
  const double maximum_of_row = call.maxima[row];
  const float maximum = float(maximum_of_row == -double(INF) ? 0 : maximum_of_row);
  const float a = float(call.coefficients[2 * row]), b = float(call.coefficients[2 * row + 1]);
  auto gradient = [&](V logits) {
    const V scaled = IDENTITY ? logits : tempering.adjust.z(logits);
    const V gap = at_least((IDENTITY ? scaled : scaled / tempering.temperature) - maximum, splat(UNTEMPERED.lowest));
    const V value = UNTEMPERED.exponential(gap) * (a + b * gap);
    return IDENTITY ? value : value * tempering.adjust.slope(scaled);
  };
  int64_t i = 0;
  for (; i + LANES <= call.columns; i += LANES) store(x + i, gradient(load(x + i)));
  if (i < call.columns) store_first(x + i, call.columns - i, gradient(load_first(x + i, call.columns - i, 0)));
}

}  // namespace

void logprob_rows(const LogProbs& call) {
  const int threads = int(std::min<int64_t>(call.threads, call.rows));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    FlushSubnormals guard;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.rows; ++row) {
      if (call.statistics)
        statistics_of_row(call, row);
      else if (Tempering(call, row).identity())
        gradient_of_row<true>(call, row);
      else
        gradient_of_row<false>(call, row);
    }
  }
}

}  // namespace fastkd::FASTKD_ISA
