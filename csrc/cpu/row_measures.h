// The measures of a row, from the statistics of its loss.

namespace {

inline void Row::measures(int64_t b, BlockScratch& scratch, bool policy) {
  measures_[b] = (policy ? block_measures<true> : block_measures<false>)(view(b, scratch, true), columns(b));
}

// Merges the measures of all blocks, and writes them.
inline bool Row::write_measures(bool policy) {
  BlockMeasures row{};
  for (const BlockMeasures& block : measures_) {
    row.teacher_entropy += block.teacher_entropy;
    row.forward_kl += block.forward_kl;
    row.reverse_kl += block.reverse_kl;
    row.acceptance += block.acceptance;
  }
  // As for the loss, arithmetic on -inf gives NaN or infinity exactly where the policy matters.
  if (!policy && !std::isfinite(row.teacher_entropy + row.forward_kl + row.reverse_kl)) return false;
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
  return true;
}

}  // namespace
