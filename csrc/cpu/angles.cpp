// The angles of relational distillation (fastkd/relations.py) on the CPU, with their derivatives. Compiled once per
// instruction set, each time into its own namespace.
//
// For three points, the law of cosines gives the angle at j between i and k from half the squared distances h and the
// reciprocals r of the distances:
//
//   c_jik = (h_ij + h_kj - h_ik) r_ij r_kj
//
// Points are divided into blocks. A tile consists of the pairs (i, k) of two blocks, with all j. Its distances between
// pairs stay in the cache, and each j adds two segments of a row of distances. In each round below, no block is in two
// tiles, and a tile adds only to columns of its own blocks. Threads therefore share a round without locks, every sum
// has a fixed order, and the result has the same bits for any number of threads.

#include "kernel.h"

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace fastkd::FASTKD_ISA {

#include "vec.h"

namespace {

constexpr int WIDE = LANES / 2;  // a vector of doubles is as long as one of floats
typedef double D __attribute__((vector_size(LANES * 4)));
typedef int64_t L __attribute__((vector_size(LANES * 4)));

constexpr int BLOCK = 64;  // points; a tile of three matrices is 96 KiB
constexpr int STUDENT = 0, TEACHER = 1;

FASTKD_INLINE D wide(double x) { return x - D{}; }
FASTKD_INLINE D& at(double* x) { return *reinterpret_cast<D*>(x); }
FASTKD_INLINE D at(const double* x) { return *reinterpret_cast<const D*>(x); }

FASTKD_INLINE double sum_lanes(D v) {
  double lanes[WIDE];
  for (int i = 0; i < WIDE; ++i) lanes[i] = v[i];
  for (int half = WIDE / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// v with its first lanes set to 0.
FASTKD_INLINE D later(int64_t lanes, D v) {
  L lane;
  for (int i = 0; i < WIDE; ++i) lane[i] = i;
  return lane >= lanes ? v : D{};
}

// The distances between j and a block of points. Past the last point r is 0, so every cosine is 0, too.
struct Segment {
  alignas(64) double half[2][BLOCK], reciprocal[2][BLOCK], derivative[BLOCK];

  void load(const Angles& call, int64_t j, int64_t first, int points) {
    for (int side = 0; side < 2; ++side) {
      const double* row = call.distances[side] + j * call.points + first;
      for (int i = 0; i < points; ++i) {
        half[side][i] = 0.5 * row[i] * row[i];
        reciprocal[side][i] = row[i] == 0 ? 0 : 1 / row[i];  // a point at distance 0 makes no angle
      }
      std::fill(half[side] + points, half[side] + BLOCK, 0.0);
      std::fill(reciprocal[side] + points, reciprocal[side] + BLOCK, 0.0);
    }
    std::fill(derivative, derivative + BLOCK, 0.0);
  }
};

struct Tile {
  alignas(64) double half[2][BLOCK][BLOCK];
  alignas(64) double derivative[BLOCK][BLOCK];  // of the sum of losses with respect to -h_ik
  Segment left, right;                          // of i and of k; on the diagonal, left serves as both

  // Returns the sum of losses over all j and pairs i < k. If call.derivatives is given, adds the tile's part to it.
  template <bool DERIVATIVES>
  double run(const Angles& call, int64_t left_block, int64_t right_block) {
    const bool diagonal = left_block == right_block;
    const int64_t i0 = left_block * BLOCK, k0 = right_block * BLOCK;
    const int rows = int(std::min<int64_t>(BLOCK, call.points - i0));
    const int columns = int(std::min<int64_t>(BLOCK, call.points - k0));
    for (int side = 0; side < 2; ++side)
      for (int i = 0; i < rows; ++i) {
        const double* distance = call.distances[side] + (i0 + i) * call.points + k0;
        for (int k = 0; k < columns; ++k) half[side][i][k] = 0.5 * distance[k] * distance[k];
        std::fill(half[side][i] + columns, half[side][i] + BLOCK, 0.0);
      }
    if (DERIVATIVES) std::memset(derivative, 0, sizeof derivative);
    Segment& second = diagonal ? left : right;
    D loss{};
    for (int64_t j = 0; j < call.points; ++j) {
      left.load(call, j, i0, rows);
      if (!diagonal) right.load(call, j, k0, columns);
      for (int i = 0; i < rows; ++i) row<DERIVATIVES>(i, diagonal ? i + 1 : 0, second, call.delta, loss);
      if (!DERIVATIVES) continue;
      add(call, j, i0, rows, left);
      if (!diagonal) add(call, j, k0, columns, right);
    }
    if (DERIVATIVES)
      for (int i = 0; i < rows; ++i) {
        double* to = call.derivatives + (i0 + i) * call.points + k0;
        for (int k = 0; k < columns; ++k) to[k] -= derivative[i][k];
      }
    return sum_lanes(loss);
  }

 private:
  // The pairs of i with every k from `from` on, for one j.
  template <bool DERIVATIVES>
  FASTKD_INLINE void row(int i, int from, Segment& second, double delta, D& loss) {
    const D half_s = wide(left.half[STUDENT][i]), half_t = wide(left.half[TEACHER][i]);
    const D r_s = wide(left.reciprocal[STUDENT][i]), r_t = wide(left.reciprocal[TEACHER][i]);
    D sum{};
    for (int k = from / WIDE * WIDE; k < BLOCK; k += WIDE) {
      const D second_s = at(second.reciprocal[STUDENT] + k);
      const D product = r_s * second_s;
      const D cosine = (half_s + at(second.half[STUDENT] + k) - at(half[STUDENT][i] + k)) * product;
      const D target = (half_t + at(second.half[TEACHER] + k) - at(half[TEACHER][i] + k)) *
                       (r_t * at(second.reciprocal[TEACHER] + k));
      D gap = cosine - target;
      if (k < from) gap = later(from - k, gap);
      const D low = gap < -delta ? wide(-delta) : gap;  // a NaN stays one
      const D u = low > delta ? wide(delta) : low;      // Huber's derivative
      loss += u * (gap - 0.5 * u);
      if (!DERIVATIVES) continue;
      at(derivative[i] + k) += u * product;
      sum += u * (second_s - r_s * cosine);
      at(second.derivative + k) += u * (r_s - second_s * cosine);
    }
    if (DERIVATIVES) left.derivative[i] += sum_lanes(sum);
  }

  static void add(const Angles& call, int64_t j, int64_t first, int points, const Segment& segment) {
    double* to = call.derivatives + j * call.points + first;
    for (int i = 0; i < points; ++i) to[i] += segment.reciprocal[STUDENT][i] * segment.derivative[i];
  }
};

// All pairs of blocks, in rounds in which a block is in at most one pair: first every block with itself, then a
// round-robin tournament.
std::vector<std::vector<std::pair<int64_t, int64_t>>> rounds(int64_t blocks) {
  std::vector<std::vector<std::pair<int64_t, int64_t>>> all(1);
  for (int64_t b = 0; b < blocks; ++b) all[0].emplace_back(b, b);
  const int64_t circle = (blocks + 1) / 2 * 2 - 1;  // all blocks but one; an odd number of blocks leaves a seat empty
  for (int64_t round = 0; round < circle && blocks > 1; ++round) {
    all.emplace_back();
    for (int64_t t = 0; t <= circle / 2; ++t) {
      const int64_t a = (round + t) % circle, b = t ? (round - t + circle) % circle : circle;
      if (std::max(a, b) < blocks) all.back().emplace_back(std::min(a, b), std::max(a, b));
    }
  }
  return all;
}

}  // namespace

void angles(const Angles& call) {
  const auto all = rounds((call.points + BLOCK - 1) / BLOCK);
  std::vector<std::vector<double>> losses;
  for (const auto& round : all) losses.emplace_back(round.size());
  const int threads = call.points <= BLOCK ? 1 : call.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    FlushSubnormals guard;
    const auto tile = std::make_unique<Tile>();
    for (size_t round = 0; round < all.size(); ++round) {
#pragma omp for schedule(dynamic)
      for (size_t t = 0; t < all[round].size(); ++t) {
        const auto [left, right] = all[round][t];
        losses[round][t] = call.derivatives ? tile->run<true>(call, left, right) : tile->run<false>(call, left, right);
      }
    }
  }
  *call.loss = 0;
  for (const auto& round : losses)
    for (const double loss : round) *call.loss += 2 * loss;  // (i, k) and (k, i)
}

}  // namespace fastkd::FASTKD_ISA
