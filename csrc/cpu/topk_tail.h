// The listed tokens of a row by block, and the statistics of a block of tokens that are not listed.

namespace {

// The listed tokens of a row, grouped by block.
class TokensByBlock {
 public:
  TokensByBlock(int64_t vocabulary, int64_t tokens)
      : vocabulary_(vocabulary),
        starts_((vocabulary + BLOCK - 1) / BLOCK + 2),
        order_(tokens),
        taken_((vocabulary + 63) / 64) {}

  // False if an id is out of range or occurs twice. The others are sorted in any case.
  bool sort(const int64_t* ids, int64_t tokens) {
    bool valid = true;
    std::fill(starts_.begin(), starts_.end(), 0);
    for (int64_t j = 0; j < tokens; ++j) {
      const int64_t id = ids[j];
      if (id == -1) continue;
      if (id < 0 || id >= vocabulary_) {
        valid = false;
        continue;
      }
      uint64_t& word = taken_[id / 64];
      const uint64_t bit = uint64_t(1) << (id % 64);
      if (word & bit) valid = false;
      word |= bit;
      ++starts_[id / BLOCK + 2];
    }
    for (size_t b = 1; b < starts_.size(); ++b) starts_[b] += starts_[b - 1];
    for (int64_t j = 0; j < tokens; ++j) {
      if (ids[j] < 0 || ids[j] >= vocabulary_) continue;
      order_[starts_[ids[j] / BLOCK + 1]++] = j;
      taken_[ids[j] / 64] = 0;
    }
    return valid;
  }

  // Calls f(j) with the index of each listed token in block b.
  template <class F>
  void each_in(int64_t b, F f) const {
    for (int64_t i = starts_[b]; i < starts_[b + 1]; ++i) f(order_[i]);
  }

 private:
  int64_t vocabulary_;
  std::vector<int64_t> starts_, order_;
  std::vector<uint64_t> taken_;
};

// What the sweep computes for a block, relative to its maximum and without the listed tokens.
struct TailBlock {
  float max;
  double exp_sum, exp_sum_t1, entropy;  // sums of e, of e at temperature 1, and of e z'
};

// Calls alongside(from, to) for each strip: it stores another row's gradient, which overlaps with arithmetic.
template <bool T1, bool ENTROPY, class Alongside>
void tail_block(const float* z, int n, Softmax softmax, float* e_out, float* e_t1_out, Ahead ahead, Alongside alongside,
                TailBlock& out) {
  const V max = splat(out.max);
  V sum{}, exp_sum_t1{}, entropy{};
  for (int start = 0; start < n; start += STRIP) {
    V strip{}, strip_t1{}, strip_entropy{};
    const int end = std::min(start + STRIP, n);
    alongside(start, end);
    for (int i = start; i < end; i += LANES) {
      ahead.ask(i);
      const V gap = load(z + i) - max;
      const V e = softmax.exponential(gap);
      store(e_out + i, e);
      strip += e;
      if (ENTROPY) strip_entropy += e * at_least(gap, splat(softmax.lowest));
      if (T1) {
        const V e_t1 = UNTEMPERED.exponential(gap);
        store(e_t1_out + i, e_t1);
        strip_t1 += e_t1;
      }
    }
    sum += strip;
    exp_sum_t1 += strip_t1;
    entropy += strip_entropy;
  }
  out.exp_sum = sum_lanes(sum);
  out.exp_sum_t1 = T1 ? sum_lanes(exp_sum_t1) : out.exp_sum;
  out.entropy = sum_lanes(entropy) / softmax.temperature;
}

// Statistics of one vocabulary shard, exchanged between ranks (Shard::statistics). Maxima are as in ShardStatistics.
struct ShardTail {
  double max, exp_sum, exp_sum_t1, entropy;  // as in TailBlock
  double columns, z_sum, label;              // number of columns, sum of their z, z of the label or -inf
  double valid;                              // 1 if no id occurs twice
};
static_assert(sizeof(ShardTail) == TAIL_STATISTICS * sizeof(double));

}  // namespace
