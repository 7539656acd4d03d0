// Deep mutual learning on the CPU: the losses of M students and their gradients, in two sweeps over the blocks of a
// row.
//
//   statistics   maximum and sum of exponentials of each student's block, merged in double, in block order
//   peers        probabilities of all students, and sums over students instead of sums over pairs
//
// In a column, let r be the student with the largest p, u_l = (z_l - max_l) - (z_r - max_r), and c_l the log-sum-exp of
// the row minus its maximum. The peer l = k contributes 0, so
//
//   sum_(l != k) p_l log(p_l / p_k) = (sum_l p_l u_l - S u_k) / T - sum_l p_l (c_l - c_k),    S = sum_l p_l
//
// The last term is one number per row, computed in double. p_l |u_l| is small for every l, so nothing large cancels.
// Equal students have u = 0 and c_l = c_k, and a divergence of exactly 0. The gradient with respect to z_k / T
// is M p_k - S.
//
// If a student gives one column more than 4/5 of its probability, its sum of exponentials would absorb the other
// columns. So the logarithm is log1p of their sum. The gradient in that column, a small difference of probabilities, is
// minus the sum of the others' gradients.
//
// Exponentials are kept in scratch memory if those of a row fit in the cache, else recomputed, last block first. A row
// whose sums are not finite is computed again with the policy for log 0 (fastkd/call/log_zero.py).

#include "kernel.h"

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#pragma GCC diagnostic ignored "-Wunused-function"  // only part of the headers is used here

namespace fastkd::FASTKD_ISA {

#include "vec.h"

#include "load_store.h"
#include "softmax.h"

namespace {

// log x for a normal number x > 0, as in log1p.
FASTKD_INLINE V log_of_normal(V x) {
  const I k = ((I)x - 0x3f3504f3) >> 23;
  return log1p_near_0((V)((I)x - (k << 23)) - 1.0f) + __builtin_convertvector(k, V) * 0.69314718f;
}

// One student in one block.
struct PeerView {
  const float *z, *e;
  float max;          // maximum of the row
  float weight;       // p = e * weight
  float inverse, log_sum;  // log p = (z - max) * inverse - log_sum
  float weight_t1;      // the cross-entropy's gradient is exp(z - max) * weight_t1, except for the label
};

struct PeersView {
  int students;
  const PeerView* peers;
  float gradient;      // scale of M p - S
  float ce_scale;         // scale of p: the cross-entropy's gradient if it has the same softmax
  float share;         // 1 / (M - 1)
  float* out;          // [students, STRIP], gradients
  V *sums, *scratch;   // [students]; [4 * students] if the compiler does not know their number
};

// Adds the columns from..to of a block to the sums, and stores their gradients. M: number of students, 0 for any.
template <int M, bool AVERAGE, bool T1, bool LOG_0>
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
      if (LOG_0) higher |= z_top == -INF;  // all students so far are at -inf; p may be 0, too
      p_top = where(higher, p[k], p_top);
      z_top = where(higher, u[k], z_top);
    }
    V sum{}, below{}, moment{};
#pragma GCC unroll 4
    for (int k = 0; k < students; ++k) {
      sum += p[k];
      below += p[k] - p_top;  // not computed as M p - S, which would be rounded if students agree
      if (AVERAGE) continue;
      const I gone = u[k] == -INF;
      u[k] = LOG_0 ? where(gone, u[k], u[k] - z_top) : u[k] - z_top;
      moment += LOG_0 ? where(gone, V{}, p[k] * u[k]) : p[k] * u[k];
    }
    // strip += m log(m / p) - (m - p), where m is the mean of the others, summed without subtracting p from a total.
    // The last term sums to 0 over a row. With it, no column is negative, nor as large as m - p if students are close.
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
      const V toward_peers = ((p[k] - p_top) * count - below) * view.gradient;
      const V of_q = T1 ? UNTEMPERED.exponential(load(peer.z + i) - peer.max) * peer.weight_t1 : p[k] * view.ce_scale;
      store(view.out + k * STRIP + (i - from), toward_peers + of_q);
    }
  }
  for (int k = 0; k < students; ++k) view.sums[k] += strip[k];
}

using PeersKernel = decltype(&peers_strip<0, false, false, false>);

template <bool T1>
PeersKernel peers_kernel(int students, bool average, bool log_0) {
  if (average) return peers_strip<0, true, T1, false>;
  if (log_0) return peers_strip<0, false, T1, true>;
  switch (students) {
    case 2: return peers_strip<2, false, T1, false>;
    case 3: return peers_strip<3, false, T1, false>;
    case 4: return peers_strip<4, false, T1, false>;
    default: return peers_strip<0, false, T1, false>;
  }
}

// Statistics of one student's block.
struct PeerBlock {
  float max;
  double exp_sum, exp_sum_t1;  // sums of exp((z - max) / T), and of exp(z - max)
};

template <bool T1>
void exponentials(const float* z, int n, const Softmax& softmax, const char* next, int width, float* e, PeerBlock& out) {
  V sum{}, exp_sum_t1{};
  const V max = splat(out.max);
  for (int start = 0; start < n; start += STRIP) {
    V strip{}, strip_t1{};
    for (int i = start; i < std::min(start + STRIP, n); i += LANES) {
      __builtin_prefetch(next + i * width, 0, 2);
      const V gap = load(z + i) - max;
      const V power = softmax.exponential(gap);
      store(e + i, power);
      strip += power;
      if (T1) strip_t1 += UNTEMPERED.exponential(gap);
    }
    sum += strip;
    exp_sum_t1 += strip_t1;
  }
  out.exp_sum = sum_lanes(sum);
  out.exp_sum_t1 = sum_lanes(exp_sum_t1);
}

class MutualRow {
 public:
  explicit MutualRow(const MutualCall& call)
      : call_(call),
        students_(int(call.logits.size())),
        blocks_((call.vocabulary + BLOCK - 1) / BLOCK),
        softmax_(call.temperature),
        keeps_exponentials_(students_ * blocks_ * BLOCK * int64_t(sizeof(float)) <= SCRATCH_BYTES),
        peers_(students_),
        sides_(students_),
        statistics_(students_ * blocks_),
        sums_(students_),
        registers_(4 * students_),
        out_(students_ * STRIP),
        z_(students_ * BLOCK),
        e_(students_ * (keeps_exponentials_ ? blocks_ : 1) * BLOCK) {
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
    separate_t1_ = call_.labels && call_.temperature != 1;
    statistics();
    if (!sweep(false)) sweep(true);
    store_sure_gradients();
    results();
  }

 private:
  static constexpr double SURE = 1.25;  // a sum of exponentials relative to the maximum: below it, one column has 4/5

  struct Side {
    const char* logits;
    char* gradient;  // null if not wanted
    Adjustment adjust;
    double max, log_sum, log_sum_t1;
    int64_t sure_column;  // -1: none
    double others;        // sum of the gradient over all other columns
  };

  int columns(int64_t b) const { return int(std::min<int64_t>(BLOCK, call_.vocabulary - b * BLOCK)); }

  static char* place(const Rows& rows, const std::vector<int64_t>& sizes, int64_t row) {
    return rows.data ? rows.data + row_offset(rows, sizes, row) * element_size(rows.dtype) : nullptr;
  }

  const float* load(int k, int64_t b) {
    return load_block(sides_[k].logits, call_.logits[k].dtype, b * BLOCK, columns(b), sides_[k].adjust, &z_[k * BLOCK]);
  }

  float* exponentials_at(int k, int64_t b) { return &e_[(keeps_exponentials_ ? k * blocks_ + b : k) * BLOCK]; }

  void compute_exponentials(int k, int64_t b, const float* z, bool t1) {
    const int width = element_size(call_.logits[k].dtype);
    const char* next = sides_[k].logits + std::min((b + 1) * BLOCK, call_.vocabulary - columns(b)) * width;
    (t1 ? exponentials<true> : exponentials<false>)(z, padded(columns(b)), softmax_, next, width,
                                                      exponentials_at(k, b), statistics_[k * blocks_ + b]);
  }

  void statistics() {
    for (int k = 0; k < students_; ++k) {
      Side& side = sides_[k];
      side.logits = place(call_.logits[k], call_.sizes, row_);
      side.gradient = place(call_.gradients[k], call_.sizes, row_);
      side.adjust = {};
      side.adjust.shift = low_max(side.logits, call_.logits[k].dtype, call_.vocabulary, side.adjust);
    }
    for (int64_t b = 0; b < blocks_; ++b)
      for (int k = 0; k < students_; ++k) {
        const float* z = load(k, b);
        statistics_[k * blocks_ + b].max = maximum_of(z, padded(columns(b)));
        compute_exponentials(k, b, z, separate_t1_);
      }
    for (int k = 0; k < students_; ++k) merge(sides_[k], &statistics_[k * blocks_]);
  }

  void merge(Side& side, const PeerBlock* blocks) {
    side.max = -INF;
    for (int64_t b = 0; b < blocks_; ++b) side.max = std::max(side.max, double(blocks[b].max));
    double sum = 0, exp_sum_t1 = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      sum += rescale_factor(side, blocks[b], softmax_) * blocks[b].exp_sum;
      if (separate_t1_) exp_sum_t1 += rescale_factor(side, blocks[b], UNTEMPERED) * blocks[b].exp_sum_t1;
    }
    const bool sure = sum < SURE, sure_t1 = separate_t1_ && exp_sum_t1 < SURE;
    const int64_t top = sure || sure_t1 ? column_of_maximum(side) : -1;
    side.sure_column = sure ? top : -1;
    side.log_sum = sure && top >= 0 ? log_with_top(side, blocks, top, softmax_) : std::log(sum);
    side.log_sum_t1 = side.log_sum;
    if (!separate_t1_) return;
    side.log_sum_t1 = sure_t1 && top >= 0 ? log_with_top(side, blocks, top, UNTEMPERED) : std::log(exp_sum_t1);
  }

  // The column of the row's maximum; -1 if there is none.
  int64_t column_of_maximum(const Side& side) {
    const int k = int(&side - sides_.data());
    for (int64_t b = 0; b < blocks_; ++b) {
      if (statistics_[k * blocks_ + b].max != side.max) continue;
      const float* z = load(k, b);
      for (int i = 0; i < columns(b); ++i)
        if (z[i] == side.max) return b * BLOCK + i;
    }
    return -1;
  }

  // The logarithm of the sum of exponentials, as log1p of the sum over all columns but the top one.
  double log_with_top(const Side& side, const PeerBlock* blocks, int64_t top, const Softmax& softmax) {
    const int k = int(&side - sides_.data());
    double rest = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      const bool at_t1 = separate_t1_ && &softmax == &UNTEMPERED;
      double sum = at_t1 ? blocks[b].exp_sum_t1 : blocks[b].exp_sum;
      if (b == top / BLOCK) {
        const float* z = load(k, b);
        const int n = padded(columns(b));
        if (z != &z_[k * BLOCK]) std::copy_n(z, n, &z_[k * BLOCK]);
        z_[k * BLOCK + top % BLOCK] = FLOOR;
        without_top_.resize(BLOCK);
        PeerBlock part{blocks[b].max};
        exponentials<false>(&z_[k * BLOCK], n, softmax, side.logits, 0, without_top_.data(), part);
        sum = part.exp_sum;
      }
      rest += rescale_factor(side, blocks[b], softmax) * sum;
    }
    return std::log1p(rest);
  }

  static double rescale_factor(const Side& side, const PeerBlock& block, const Softmax& softmax) {
    return std::exp((block.max - side.max) / softmax.temperature);
  }

  // The second sweep. False if a sum is not finite.
  bool sweep(bool log_0) {
    const bool average = call_.peers == Peers::average;
    const auto kernel = (separate_t1_ ? peers_kernel<true> : peers_kernel<false>)(students_, average, log_0);
    const double scale = weight_ * call_.scale * (call_.scale_on_device ? *call_.scale_on_device : 1);
    const double share = 1.0 / (students_ - 1), ce_scale = call_.labels ? scale : 0;
    const double gradient = scale * factor() / softmax_.temperature;
    PeersView view{students_, peers_.data(), float(gradient), float(ce_scale), float(share),
                   out_.data(), sums_.data(), registers_.data()};
    divergence_.assign(students_, 0);
    for (Side& side : sides_) side.others = 0;
    bool finite = true;
    for (int64_t b = blocks_ - 1; b >= 0; --b) {
      const int n = columns(b);
      for (int k = 0; k < students_; ++k) {
        const Side& side = sides_[k];
        const float* z = load(k, b);
        if (!keeps_exponentials_) compute_exponentials(k, b, z, false);
        const double weight = rescale_factor(side, statistics_[k * blocks_ + b], softmax_) * std::exp(-side.log_sum);
        peers_[k] = {z, exponentials_at(k, b), float(side.max), float(weight), softmax_.inverse,
                     float(side.log_sum), float(ce_scale * std::exp(-side.log_sum_t1))};
        sums_[k] = V{};
      }
      for (int from = 0; from < n; from += STRIP) {
        kernel(view, from, std::min(from + STRIP, padded(n)));
        store(b * BLOCK + from, std::min(STRIP, n - from), ce_scale);
      }
      for (int k = 0; k < students_; ++k) divergence_[k] += sum_lanes(sums_[k]);
    }
    for (const double sum : divergence_) finite = finite && std::isfinite(sum);
    return finite;
  }

  void store(int64_t start, int n, double ce_scale) {
    const bool with_label = label_ >= start && label_ < start + n;
    for (int k = 0; k < students_; ++k) {
      float* out = &out_[k * STRIP];
      if (with_label) out[label_ - start] -= float(ce_scale);
      if (sides_[k].sure_column >= 0) sides_[k].others += sum_without(out, n, sides_[k].sure_column - start);
      if (sides_[k].gradient) store_block(sides_[k].gradient, call_.gradients[k].dtype, start, n, out, past_cache_);
    }
  }

  // The sum of n numbers without one of them, which may be elsewhere. It sets the padding to 0.
  static double sum_without(float* x, int n, int64_t column) {
    const bool here = column >= 0 && column < n;
    const float kept = here ? std::exchange(x[column], 0.0f) : 0;
    std::fill(x + n, x + padded(n), 0.0f);
    V sum{};
    for (int i = 0; i < n; i += LANES) sum += fastkd::FASTKD_ISA::load(x + i);
    if (here) x[column] = kept;
    return sum_lanes(sum);
  }

  // Replaces the gradient in the column that a student is sure of: the gradient of a row sums to 0.
  void store_sure_gradients() {
    for (int k = 0; k < students_; ++k) {
      const Side& side = sides_[k];
      if (side.sure_column < 0 || !side.gradient) continue;
      alignas(64) float value[LANES] = {float(-side.others)};
      store_block(side.gradient, call_.gradients[k].dtype, side.sure_column, 1, value, false);
    }
  }

  // Scale of the divergence; the gradient has a factor 1 / T as well.
  double factor() const {
    const double t_squared = call_.scale_by_temperature ? call_.temperature * call_.temperature : 1;
    return call_.peer_weight * t_squared / (call_.peers == Peers::sum ? 1 : students_ - 1);
  }

  void results() {
    for (int k = 0; k < students_; ++k) {
      double divergence = divergence_[k];
      if (call_.peers == Peers::average) {
        divergence *= students_ - 1;  // factor() is meant for a sum over peers
      } else {
        divergence /= softmax_.temperature;
        for (const Side& peer : sides_) divergence -= peer.log_sum - sides_[k].log_sum;
      }
      divergence = call_.peer_weight ? divergence * factor() : 0;
      const double cross_entropy = call_.labels ? sides_[k].log_sum_t1 + sides_[k].max - z_of_label(k) : 0;
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
  const bool keeps_exponentials_;  // whether the exponentials of the whole row are kept
  bool past_cache_ = false, separate_t1_ = false;
  int64_t row_ = 0, label_ = 0;
  float weight_ = 1;
  std::vector<PeerView> peers_;
  std::vector<Side> sides_;
  std::vector<PeerBlock> statistics_;
  std::vector<V> sums_, registers_;
  std::vector<float> out_, z_, e_, without_top_;
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
