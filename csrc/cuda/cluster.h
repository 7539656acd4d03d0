// The loop of a cluster of thread blocks over its rows: how data reaches threads and passes between them. row.h and
// topk.h have what a thread computes. tests/support/cuda_host.h runs this on a CPU.
//
// A row stays in the blocks' shared memory until its gradient is written, so each logit is read from device memory
// once. A slice is loaded in stages. Once the gradient of a stage is written, bulk copies fetch the same stage of the
// next row, so memory is busy while this row's other stages are computed.
//
// Each sweep recomputes its exponentials. With 128,256 columns of bf16, a thread has 64 of each side: keeping what the
// gradient needs of them would take 128 registers, which is all there are if two blocks share a multiprocessor.
#pragma once
#include "kinds.h"

namespace fastkd::cuda {

// Computes the value of a row: first without the policy for log 0, then with it if the first attempt is not finite.
template <class Kind>
FASTKD_DEVICE void compute_value(Block& block, Kind& kind) {
  RowState& row = block.row();
  kind.prepare();
  if (block.call.shard.step == Step::statistics) return;
#pragma unroll 1
  for (int policy = 0; policy < 2; ++policy) {
    if (kind.has_statistics()) {
      if (!kind.statistics_are_known()) {
        const Statistics all =
            block.merged(policy ? kind.template statistics<true>() : kind.template statistics<false>());
        if (block.leads()) row.statistics = all;
      }
      if (block.leads()) kind.finish_phase();
    } else if (block.leads()) {
      row.finite = true;
    }
    sync_block();
    if (row.finite && !block.call.closed_form) {
      // merged() synchronizes, too: finish_phase writes row.finite, which other warps may not have read yet.
      if (kind.sums_are_known()) sync_block();
      const Sums all = kind.sums_are_known()
                           ? row.sums
                           : block.merged(policy ? kind.template sums<true>() : kind.template sums<false>());
      if (block.leads()) kind.finish_phase(all);
      sync_block();
    }
    if (row.finite) break;
    sync_block();
    if (block.leads()) row.log_0_policy = true;
    sync_block();
  }
}

FASTKD_DEVICE void compute_value(Block& block, DenseShard& kind) {
  const ShardStatistics all = block.merged(kind.shard_statistics());
  if (block.leads() && block.place.rank == 0) store_partial(block.call, block.row(), all);
}

// The kernel: processes all rows of a cluster.
template <class Kind>
FASTKD_KERNEL(MOST_THREADS) kd_kernel(const FASTKD_PARAMETER Call call) {
  Block block(call, shared_memory());
  const int64_t first = block.first_row();
  if (first >= call.rows) return;
  if (block.leads()) block.open<Kind>(first, 0);
  sync_block();
#pragma unroll 1
  for (int stage = 0; stage < STAGES; ++stage) block.fetch(0, stage);
  Kind kind{block};
#pragma unroll 1
  for (bool more = true; more; block.advance()) {
    sync_block();
    store_zeros(call, block.place, call.student_gradient, block.row().row, true);
    store_zeros(call, block.place, call.teacher_gradient, block.row().row, true);
    const int64_t next = block.row_after(block.row().row);
    more = next < call.rows;
    if (more && block.place.thread == call.threads - 1)
      block.open<Kind>(next, 1);  // while other threads wait for copies
    compute_value(block, kind);
    if (call.measures) kind.measure();
    if (block.leads()) kind.finish_row();
    sync_block();
    kind.start_gradients(block.gradient_slice(0));
#pragma unroll 1
    for (int stage = 0; stage < STAGES; ++stage) {
      if (block.wants_gradients())
        kind.gradient(block.range(stage), stage, block.gradient_slice(0).stage(stage),
                      block.gradient_slice(1).stage(stage));
      block.copy_gradients_out(stage);
      if (!more) continue;
      order_before_copies();
      sync_block();
      block.fetch(1, stage);
    }
  }
}

}  // namespace fastkd::cuda
