// The measures of a row, from the statistics of its loss.

namespace {

inline void Row::measures(int64_t b, BlockScratch& scratch) {
  // These moments are finite only if no logit is -inf. A temperature below 1 may take the logarithm of a 0 there.
  const bool no_log_0 = !log_0_policy_ && (moments_ & (FORWARD | REVERSE)) && student_softmax_.inverse <= 1 &&
                        teacher_softmax_.inverse <= 1;
  measures_[b] = (no_log_0 ? block_measures<false> : block_measures<true>)(view(b, scratch, true), columns(b));
}

// Merges the measures of all blocks, and writes them.
inline void Row::write_measures() {
  BlockMeasures row{};
  for (const BlockMeasures& block : measures_) {
    row.teacher_entropy += block.teacher_entropy;
    row.forward_kl += block.forward_kl;
    row.reverse_kl += block.reverse_kl;
    row.acceptance += block.acceptance;
  }
  if (!sure_scratch_) sure_scratch_.reset(new BlockScratch);
  BlockScratch& scratch = *sure_scratch_;
  const int64_t s_argmax = column_of_maximum([](const BlockStatistics& b) { return b.s_max; }, row_statistics_.s_max,
                                             [&](int64_t b) { return load_student(b, scratch); });
  const int64_t t_argmax = column_of_maximum([](const BlockStatistics& b) { return b.t_max; }, row_statistics_.t_max,
                                             [&](int64_t b) { return load_teacher(b, scratch); });
  float* out = call_.measures + row_ * DENSE_MEASURES;
  for (const double value : {row.teacher_entropy, row.forward_kl, row.reverse_kl, row.acceptance,
                             double(s_argmax == t_argmax)})
    *out++ = float(value);
}

}  // namespace
