// Deep mutual learning on the CPU: the losses of a row's M students and their gradients, in two sweeps over its blocks.
//
//   statistics   maximum and sum of exponentials of each student's block;  merged in double, in block order
//   peers        with p of all students at hand, sums over students in place of sums over pairs
//
// In a column let r be the student of the largest p, u_l = (z_l - max_l) - (z_r - max_r), and c_l the log-sum-exp of the
// row less its maximum. Then, as the peer l = k adds nothing,
//
//   sum_(l != k) p_l log(p_l / p_k) = (sum_l p_l u_l - S u_k) / T - sum_l p_l (c_l - c_k),    S = sum_l p_l
//
// whose last term is a number a row, and is left to double. p_l |u_l| is small whoever l is, so nothing large cancels;
// equal students have u = 0 and c_l = c_k, and a divergence of exactly 0. The gradient by z_k / T is M p_k - S.
//
// Exponentials are kept in scratch while those of a row fit in the cache, else computed again, last block first.
// A row whose sums are not finite is done again with the policy for log 0 (fastkd/backends/reference.py, evaluate).

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

#pragma GCC diagnostic ignored "-Wunused-function"  // of blocks.h, this needs a part

namespace fastkd::FASTKD_ISA {

#include "vec.h"

#include "../generated/divergences.h"

#include "blocks.h"

namespace {

// log x of a normal number x > 0: as log1p has it, without the 1.
FASTKD_INLINE V log_of_normal(V x) {
  const I k = ((I)x - 0x3f3504f3) >> 23;
  return log1p_near_0((V)((I)x - (k << 23)) - 1.0f) + __builtin_convertvector(k, V) * 0.69314718f;
}

// One student's numbers for a block.
struct PeerView {
  const float *z, *e;
  float max;          // of the row
  float weight;       // p = e * weight
  float inverse, log_sum;  // log p = (z - max) * inverse - log_sum
  float plain_weight;      // the gradient of the cross-entropy is exp(z - max) * plain_weight, but for the label
};

struct PeersView {
  int students;
  const PeerView* peers;
  float gradient;      // multiplies M p - S
  float plain;         // multiplies p: of the cross-entropy where it is of the same softmax
  float share;         // 1 / (M - 1)
  float* out;          // [students, STRIP], gradients
  V *sums, *scratch;   // [students]; [4 * students] where their number is not known to the compiler
};

// Adds the columns from..to of a block to the sums, and leaves their gradients. M: students, 0 for any number.
template <int M, bool AVERAGE, bool AT_1, bool LOG_0>
void peers_strip(const PeersView& view, int from, int to) {
  const int students = M ? M : view.students;
  V local[M ? 3 * M : 1];
  V* const p = M ? local : view.scratch;
  V* const u = p + students;
  V* const strip = u + students;
  const V count = splat(float(students));
  for (int k = 0; k < students; ++k) strip[k] = V{};
  for (int i = from; i < to; i += LANES) {
    V p_top{}, z_top{};
#pragma GCC unroll 4
    for (int k = 0; k < students; ++k) {
      const PeerView& peer = view.peers[k];
      p[k] = load(peer.e + i) * peer.weight;
      u[k] = load(peer.z + i) - peer.max;
      I higher = k == 0 ? I{} - 1 : p[k] > p_top;
      if (LOG_0) higher |= z_top == -INF;  // while all before are gone, though p may be 0 as well
      p_top = where(higher, p[k], p_top);
      z_top = where(higher, u[k], z_top);
    }
    V sum{}, below{}, moment{};
#pragma GCC unroll 4
    for (int k = 0; k < students; ++k) {
      sum += p[k];
      below += p[k] - p_top;  // and not M p - S from S, which would round where students agree
      if (AVERAGE) continue;
      const I gone = u[k] == -INF;
      u[k] = LOG_0 ? where(gone, u[k], u[k] - z_top) : u[k] - z_top;
      moment += LOG_0 ? where(gone, V{}, p[k] * u[k]) : p[k] * u[k];
    }
    // strip += m log(m / p) - (m - p), m the mean of the others, added up without taking p away again. The last term has
    // no sum; with it no column is negative, nor of the size of m - p where students are close.
    if (AVERAGE) {
      V* const after = strip + students;
      after[students - 1] = V{};
      for (int k = students - 1; k > 0; --k) after[k - 1] = after[k] + p[k];
      V before{};
      for (int k = 0; k < students; ++k) {
        const PeerView& peer = view.peers[k];
        const V m = (before + after[k]) * view.share;
        before += p[k];
        const V more = (below - (p[k] - p_top) * count) * view.share;  // m - p
        const V x = more / p[k];
        const V log_p = u[k] * peer.inverse - peer.log_sum;
        const V ratio = where(abs(x) < 0.5f, log1p(x), log_of_normal(at_least(m, splat(NEGLIGIBLE))) - log_p);
        strip[k] += where(m < NEGLIGIBLE, V{}, m * ratio) - more;
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < students; ++k) {
      const PeerView& peer = view.peers[k];
      if (!AVERAGE) {
        const V term = moment - sum * u[k];
        const V at_log_0 = where(p_top >= NEGLIGIBLE, splat(INF), V{});
        strip[k] += LOG_0 ? where(u[k] == -INF, at_log_0, term) : term;
      }
      const V towards = ((p[k] - p_top) * count - below) * view.gradient;
      const V plain = AT_1 ? UNTEMPERED.exponential(load(peer.z + i) - peer.max) * peer.plain_weight : p[k] * view.plain;
      store(view.out + k * STRIP + (i - from), towards + plain);
    }
  }
  for (int k = 0; k < students; ++k) view.sums[k] += strip[k];
}

using PeersKernel = decltype(&peers_strip<0, false, false, false>);

template <bool AT_1>
PeersKernel peers_kernel(int students, bool average, bool log_0) {
  if (average) return peers_strip<0, true, AT_1, false>;
  if (log_0) return peers_strip<0, false, AT_1, true>;
  switch (students) {
    case 2: return peers_strip<2, false, AT_1, false>;
    case 3: return peers_strip<3, false, AT_1, false>;
    case 4: return peers_strip<4, false, AT_1, false>;
    default: return peers_strip<0, false, AT_1, false>;
  }
}

// What the first sweep leaves of a student's block.
struct PeerBlock {
  float max;
  double sum, plain_sum;  // of exp((z - max) / T), and at temperature 1
};

template <bool AT_1>
void exponentials(const float* z, int n, const Softmax& softmax, const char* next, int width, float* e, PeerBlock& out) {
  V sum{}, plain_sum{};
  const V max = splat(out.max);
  for (int start = 0; start < n; start += STRIP) {
    V strip{}, plain_strip{};
    for (int i = start; i < std::min(start + STRIP, n); i += LANES) {
      __builtin_prefetch(next + i * width, 0, 2);
      const V gap = load(z + i) - max;
      const V power = softmax.exponential(gap);
      store(e + i, power);
      strip += power;
      if (AT_1) plain_strip += UNTEMPERED.exponential(gap);
    }
    sum += strip;
    plain_sum += plain_strip;
  }
  out.sum = sum_lanes(sum);
  out.plain_sum = sum_lanes(plain_sum);
}

class MutualRow {
 public:
  explicit MutualRow(const MutualCall& call)
      : call_(call),
        students_(int(call.logits.size())),
        blocks_((call.vocabulary + BLOCK - 1) / BLOCK),
        softmax_(call.temperature),
        kept_(students_ * blocks_ * BLOCK * int64_t(sizeof(float)) <= SCRATCH_BYTES),
        peers_(students_),
        sides_(students_),
        statistics_(students_ * blocks_),
        sums_(students_),
        registers_(4 * students_),
        out_(students_ * STRIP),
        z_(students_ * BLOCK),
        e_(students_ * (kept_ ? blocks_ : 1) * BLOCK) {
    int64_t bytes = 0;
    for (const Rows& gradient : call.gradients)
      if (gradient.data) bytes += call.rows * gradient.width * element_size(gradient.dtype);
    past_cache_ = bytes >= STREAM_BYTES;
  }

  void run(int64_t row) {
    row_ = row;
    label_ = call_.labels ? call_.labels[row] : 0;
    weight_ = call_.weight ? call_.weight[row] : 1;
    if ((call_.labels && label_ == call_.ignore_index) || weight_ == 0) return drop();
    if (call_.labels && (label_ < 0 || label_ >= call_.vocabulary)) {
      weight_ = std::nan("");
      label_ = 0;
    }
    separate_at_1_ = call_.labels && call_.temperature != 1;
    statistics();
    if (!sweep(false)) sweep(true);
    results();
  }

 private:
  struct Side {
    const char* logits;
    char* gradient;  // or null
    Adjustment adjust;
    double max, log_sum, plain_log_sum;
  };

  int columns(int64_t b) const { return int(std::min<int64_t>(BLOCK, call_.vocabulary - b * BLOCK)); }

  static char* place(const Rows& rows, const std::vector<int64_t>& sizes, int64_t row) {
    return rows.data ? rows.data + row_offset(rows, sizes, row) * element_size(rows.dtype) : nullptr;
  }

  const float* load(int k, int64_t b) {
    return load_block(sides_[k].logits, call_.logits[k].dtype, b * BLOCK, columns(b), sides_[k].adjust, &z_[k * BLOCK]);
  }

  float* place_of_exponentials(int k, int64_t b) { return &e_[(kept_ ? k * blocks_ + b : k) * BLOCK]; }

  void exponentials_of(int k, int64_t b, const float* z, bool at_1) {
    const int width = element_size(call_.logits[k].dtype);
    const char* next = sides_[k].logits + std::min((b + 1) * BLOCK, call_.vocabulary - columns(b)) * width;
    (at_1 ? exponentials<true> : exponentials<false>)(z, padded(columns(b)), softmax_, next, width,
                                                      place_of_exponentials(k, b), statistics_[k * blocks_ + b]);
  }

  void statistics() {
    for (int k = 0; k < students_; ++k) {
      Side& side = sides_[k];
      side.logits = place(call_.logits[k], call_.sizes, row_);
      side.gradient = place(call_.gradients[k], call_.sizes, row_);
      side.adjust = {};
      side.adjust.shift = low_top(side.logits, call_.logits[k].dtype, call_.vocabulary, side.adjust);
    }
    for (int64_t b = 0; b < blocks_; ++b)
      for (int k = 0; k < students_; ++k) {
        const float* z = load(k, b);
        statistics_[k * blocks_ + b].max = maximum_of(z, padded(columns(b)));
        exponentials_of(k, b, z, separate_at_1_);
      }
    for (int k = 0; k < students_; ++k) merge(sides_[k], &statistics_[k * blocks_]);
  }

  void merge(Side& side, const PeerBlock* blocks) {
    side.max = -INF;
    for (int64_t b = 0; b < blocks_; ++b) side.max = std::max(side.max, double(blocks[b].max));
    double sum = 0, plain_sum = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      sum += rise(side, blocks[b], softmax_) * blocks[b].sum;
      if (separate_at_1_) plain_sum += rise(side, blocks[b], UNTEMPERED) * blocks[b].plain_sum;
    }
    side.log_sum = std::log(sum);
    side.plain_log_sum = separate_at_1_ ? std::log(plain_sum) : side.log_sum;
  }

  static double rise(const Side& side, const PeerBlock& block, const Softmax& softmax) {
    return std::exp((block.max - side.max) / softmax.temperature);
  }

  // Everything of the second sweep; whether the sums are finite.
  bool sweep(bool log_0) {
    const bool average = call_.peers == Peers::average;
    const auto kernel = (separate_at_1_ ? peers_kernel<true> : peers_kernel<false>)(students_, average, log_0);
    const double scale = weight_ * call_.scale * (call_.scale_on_device ? *call_.scale_on_device : 1);
    const double share = 1.0 / (students_ - 1), plain = call_.labels ? scale : 0;
    const double gradient = scale * factor() / softmax_.temperature;
    PeersView view{students_, peers_.data(), float(gradient), float(plain), float(share),
                   out_.data(), sums_.data(), registers_.data()};
    divergence_.assign(students_, 0);
    bool finite = true;
    for (int64_t b = blocks_ - 1; b >= 0; --b) {
      const int n = columns(b);
      for (int k = 0; k < students_; ++k) {
        const Side& side = sides_[k];
        const float* z = load(k, b);
        if (!kept_) exponentials_of(k, b, z, false);
        const double weight = rise(side, statistics_[k * blocks_ + b], softmax_) * std::exp(-side.log_sum);
        peers_[k] = {z, place_of_exponentials(k, b), float(side.max), float(weight), softmax_.inverse,
                     float(side.log_sum), float(plain * std::exp(-side.plain_log_sum))};
        sums_[k] = V{};
      }
      for (int from = 0; from < n; from += STRIP) {
        kernel(view, from, std::min(from + STRIP, padded(n)));
        store(b * BLOCK + from, std::min(STRIP, n - from), plain);
      }
      for (int k = 0; k < students_; ++k) divergence_[k] += sum_lanes(sums_[k]);
    }
    for (const double sum : divergence_) finite = finite && std::isfinite(sum);
    return finite;
  }

  void store(int64_t start, int n, double plain) {
    const bool with_label = label_ >= start && label_ < start + n;
    for (int k = 0; k < students_; ++k) {
      float* out = &out_[k * STRIP];
      if (with_label) out[label_ - start] -= float(plain);
      if (sides_[k].gradient) store_block(sides_[k].gradient, call_.gradients[k].dtype, start, n, out, past_cache_);
    }
  }

  // What multiplies the divergence, the gradient's 1 / T apart.
  double factor() const {
    const double t_squared = call_.scale_by_temperature ? call_.temperature * call_.temperature : 1;
    return call_.peer_weight * t_squared / (call_.peers == Peers::sum ? 1 : students_ - 1);
  }

  void results() {
    for (int k = 0; k < students_; ++k) {
      double divergence = divergence_[k];
      if (call_.peers == Peers::average) {
        divergence *= students_ - 1;  // factor() is that of a sum over peers
      } else {
        divergence /= softmax_.temperature;
        for (const Side& peer : sides_) divergence -= peer.log_sum - sides_[k].log_sum;
      }
      divergence = call_.peer_weight ? divergence * factor() : 0;
      const double cross_entropy = call_.labels ? sides_[k].plain_log_sum + sides_[k].max - z_of_label(k) : 0;
      const int64_t place = k * call_.rows + row_;
      call_.loss[place] = float(weight_ * (divergence + cross_entropy));
      if (call_.divergence) call_.divergence[place] = float(divergence);
      if (call_.cross_entropy) call_.cross_entropy[place] = float(cross_entropy);
    }
  }

  float z_of_label(int k) const {
    alignas(64) float z[LANES];
    return load_block(sides_[k].logits, call_.logits[k].dtype, label_, 1, sides_[k].adjust, z)[0];
  }

  void drop() {
    for (int k = 0; k < students_; ++k) {
      const Rows& gradient = call_.gradients[k];
      if (gradient.data)
        std::memset(place(gradient, call_.sizes, row_), 0, gradient.width * element_size(gradient.dtype));
      for (float* values : {call_.loss, call_.divergence, call_.cross_entropy})
        if (values) values[k * call_.rows + row_] = 0;
    }
  }

  const MutualCall& call_;
  const int students_;
  const int64_t blocks_;
  const Softmax softmax_;
  const bool kept_;  // whether the exponentials of the whole row are
  bool past_cache_ = false, separate_at_1_ = false;
  int64_t row_ = 0, label_ = 0;
  float weight_ = 1;
  std::vector<PeerView> peers_;
  std::vector<Side> sides_;
  std::vector<PeerBlock> statistics_;
  std::vector<V> sums_, registers_;
  std::vector<float> out_, z_, e_;
  std::vector<double> divergence_;
};

}  // namespace

void mutual_rows(const MutualCall& call) {
  const int64_t students = int64_t(call.logits.size());
  const int threads = call.rows * call.vocabulary < 4 * BLOCK ? 1 : call.threads;
  const int64_t chunk = std::max({int64_t(1), 4 * BLOCK / call.vocabulary, call.rows / (16 * threads)});
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    FlushSubnormals guard;
    MutualRow row(call);
#pragma omp for schedule(dynamic, chunk)
    for (int64_t i = 0; i < call.rows; ++i) row.run(i);
  }
  for (int64_t k = 0; k < students; ++k) {
    double total = 0;
    for (int64_t i = 0; i < call.rows; ++i) total += call.loss[k * call.rows + i];
    call.total[k] = float(total * call.scale * (call.scale_on_device ? *call.scale_on_device : 1));
  }
}

}  // namespace fastkd::FASTKD_ISA
