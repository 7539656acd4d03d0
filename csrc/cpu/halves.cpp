// A float32 matrix as the sum of two bfloat16 matrices, for matrix products on CPUs with AMX (fastkd/engine/bf16.py).

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

// Replaces each row of floats by the bfloat16 values nearest to them, followed by what these lack, in bfloat16.
//
// The first halves are written to memory behind the floats that are still to be read. The second halves would overtake
// them, so they are kept in scratch memory until the row is done.
void split_halves(float* matrix, int64_t rows, int64_t columns, int threads) {
  const int team = int(std::min<int64_t>(threads, rows * columns < 4 * BLOCK ? 1 : rows));
#pragma omp parallel num_threads(team) if (team > 1)
  {
    FlushSubnormals guard;
    std::vector<uint16_t> low(columns + LANES);
    alignas(64) float values[BLOCK], rest[BLOCK];
    uint16_t high[BLOCK];
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      float* from = matrix + row * columns;
      auto* to = reinterpret_cast<uint16_t*>(from);
      for (int64_t start = 0; start < columns; start += BLOCK) {
        const int n = int(std::min<int64_t>(BLOCK, columns - start));
        std::memcpy(values, from + start, n * sizeof(float));
        std::fill(values + n, values + padded(n), 0.0f);
        narrow_to_bf16<false>(high, values, padded(n));
        for (int i = 0; i < n; i += LANES) {
          // Where a value is infinite, `high` is, too, and the difference is NaN or infinite.
          const V gap = load(values + i) - from_bf16(load_half(high + i));
          store(rest + i, where(abs(gap) < INF, gap, V{}));
        }
        std::memcpy(to + start, high, n * sizeof(uint16_t));
        alignas(64) uint16_t low_block[BLOCK];
        narrow_to_bf16<false>(low_block, rest, padded(n));
        std::memcpy(low.data() + start, low_block, n * sizeof(uint16_t));
      }
      std::memcpy(to + columns, low.data(), columns * sizeof(uint16_t));
    }
  }
}

}  // namespace fastkd::FASTKD_ISA
