// The row loss and its gradient on the CPU. Compiled once per instruction set, each time into its own namespace.
//
// A row is divided into blocks of 2048 columns and computed in three phases over its blocks:
//
//   statistics   maximum, sum of exponentials and moments of each block, merged in double, in block order
//   sums         sums of phi, g and h if there is no closed form, merged likewise
//   gradient     written block by block
//
// The numbers of a block do not depend on the thread that computes it, so the result has the same bits for any number
// of threads. Threads share the rows or, if there are fewer rows than threads, the blocks of a row.
//
// The exponentials of the first phase are kept in scratch memory if those of a row fit in the cache. The gradient of a
// row, which is bound by memory, then runs during the statistics of the next row, which are bound by arithmetic: see
// PendingGradient. Otherwise the exponentials are recomputed, last block first, because its logits are still in the
// cache.
//
// The first attempt at a row ignores log 0: arithmetic on -inf gives NaN exactly where the policy of
// fastkd/call/log_zero.py matters. A row whose merged sums are not finite is computed again with the policy.
//
// The entry points are in this file. blocks.h has a block, row.h the phases of a row, topk.h a sparse teacher.

#include "kernel.h"

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

namespace fastkd::FASTKD_ISA {

#include "vec.h"

#include "../generated/divergences.h"

#include "blocks.h"
#include "../common/row_math.h"
#include "row.h"
#include "topk.h"

namespace {

void write_total(const Call& call) {
  double total = 0;
  for (int64_t i = 0; i < call.rows; ++i) total += call.loss[i];
  *call.total = float(total * call.scale * (call.scale_on_device ? *call.scale_on_device : 1));
}

// One step of rows whose vocabulary is divided among ranks. Threads share the rows.
template <class Row>
void run_step(const Call& call) {
  static thread_local Workspace workspace;
  const int threads = call.rows * call.vocabulary < 4 * BLOCK ? 1 : call.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    FlushSubnormals guard;
    BlockScratch scratch;
    Row row(call, workspace);
#pragma omp for schedule(dynamic, 1 + call.rows / (16 * threads))
    for (int64_t i = 0; i < call.rows; ++i)
      if (row.start(i)) row.take_step(scratch);
  }
}

}  // namespace

void kd_rows(const Call& call) {
  if (call.shard.step != Step::all) return run_step<Row>(call);
  static thread_local Workspace workspace;
  const int64_t blocks = (call.vocabulary + BLOCK - 1) / BLOCK;
  // A parallel region costs some microseconds, more than so little work does.
  const int threads = call.rows * call.vocabulary < 4 * BLOCK ? 1 : call.threads;
  if (call.rows >= threads || blocks == 1) {
    // Chunks of neighbouring rows, so that a thread also gets the next row; small enough to balance dropped rows.
    const int64_t chunk = std::max({int64_t(1), 4 * BLOCK / call.vocabulary, call.rows / (16 * threads)});
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      FlushSubnormals guard;
      BlockScratch scratch, waiting_scratch;
      Row rows[2] = {{call, workspace}, {call, workspace}};  // used in turn, with common memory for exponentials
      Row* waiting = nullptr;                                // the row whose gradient is not written yet
      auto each = [&](auto phase) {
        for (int64_t b = 0; b < blocks; ++b) phase(b, scratch);
      };
      auto once = [&](auto step, bool* flags) { step(flags); };
#pragma omp for schedule(dynamic, chunk)
      for (int64_t i = 0; i < call.rows; ++i) {
        Row& row = waiting == &rows[0] ? rows[1] : rows[0];
        auto statistics = [&](int64_t b, BlockScratch& scratch) {
          if (!waiting) return row.statistics(b, scratch);
          row.statistics(b, scratch, waiting->begin_gradient(b, waiting_scratch));
          if (b == blocks - 1) waiting = nullptr;
        };
        if (!value_of(row, i, each, once, statistics)) continue;
        if (row.can_wait())
          waiting = &row;
        else
          each([&](int64_t b, BlockScratch& scratch) { row.gradient(blocks - 1 - b, scratch); });
      }
      if (waiting) each([&](int64_t b, BlockScratch& scratch) { waiting->gradient(b, scratch); });
    }
  } else {
    Row row(call, workspace);
    bool shared = false;
#pragma omp parallel num_threads(threads)
    {
      FlushSubnormals guard;
      BlockScratch scratch;
      auto each = [&](auto phase) {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < row.blocks(); ++b) phase(b, scratch);
      };
      auto once = [&](auto step, bool* flags) {
#pragma omp single
        step(&shared);
        *flags = shared;
#pragma omp barrier
      };
      auto statistics = [&](int64_t b, BlockScratch& scratch) { row.statistics(b, scratch); };
      for (int64_t i = 0; i < call.rows; ++i) {
        if (!value_of(row, i, each, once, statistics)) continue;
        each([&](int64_t b, BlockScratch& scratch) { row.gradient(row.blocks() - 1 - b, scratch); });
      }
    }
  }

  write_total(call);
}

void topk_rows(const Call& call) {
  if (call.shard.step != Step::all) return run_step<TopKRow>(call);
  static thread_local Workspace workspace;
  const int threads = call.rows * call.vocabulary < 4 * BLOCK ? 1 : call.threads;
  const int64_t chunk = std::max({int64_t(1), 4 * BLOCK / call.vocabulary, call.rows / (16 * threads)});
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    FlushSubnormals guard;
    TopKRow rows[2] = {{call, workspace}, {call, workspace}};  // used in turn, as in kd_rows
    TopKRow* waiting = nullptr;
#pragma omp for schedule(dynamic, chunk)
    for (int64_t i = 0; i < call.rows; ++i) {
      TopKRow& row = waiting == &rows[0] ? rows[1] : rows[0];
      if (!row.start(i)) continue;
      if (row.needs_sweep()) {
        for (int64_t b = 0; b < row.blocks(); ++b) row.sweep(b, waiting);
        waiting = nullptr;
      }
      row.finish();
      if (!row.needs_gradient()) continue;
      if (row.can_wait())
        waiting = &row;
      else
        for (int64_t b = row.blocks(); b-- > 0;) row.write_gradient(b);
    }
    if (waiting)
      for (int64_t b = 0; b < waiting->blocks(); ++b) waiting->write_gradient(b);
  }
  write_total(call);
}

std::vector<std::string> divergences() {
#define FASTKD_NAME(name) #name,
  return {FASTKD_DIVERGENCES(FASTKD_NAME)};
#undef FASTKD_NAME
}

// gradient[row] *= factor[row * stride], in place. A row whose factor is 1 is not touched.
void scale_rows(const Call& call, const float* factor, int64_t stride) {
  const Rows& rows = call.student_gradient;
  const int64_t blocks = (rows.width + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(call.threads) if (call.rows * rows.width >= 4 * BLOCK && call.threads > 1)
  for (int64_t i = 0; i < call.rows * blocks; ++i) {
    const int64_t row = i / blocks, start = i % blocks * BLOCK;
    if (factor[row * stride] == 1) continue;
    alignas(64) float scratch[BLOCK];
    const int n = int(std::min<int64_t>(BLOCK, rows.width - start));
    char* data = rows.data + row_offset(rows, call.sizes, row) * element_size(rows.dtype);
    const float* values = load_block(data, rows.dtype, start, n, Adjustment{}, scratch);
    for (int j = 0; j < n; j += LANES) store(scratch + j, load(values + j) * factor[row * stride]);
    store_block(data, rows.dtype, start, n, scratch, false);
  }
}

}  // namespace fastkd::FASTKD_ISA
