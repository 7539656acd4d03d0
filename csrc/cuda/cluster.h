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

// Writes the gradients, and fetches the stages of the next row. A block's gradients go directly to device memory if
// their vectors are at multiples of PIECE there; otherwise they replace the logits in shared memory and are copied from
// there.
template <class Kind>
FASTKD_DEVICE void write_gradients(Block& block, Kind& kind, bool more) {
  const Call& call = block.call;
  const auto staged = [&](int side) { return block.is_staged(side); };
  const auto to = [&](int side) {
    return staged(side) ? block.slice(side) : Slice{block.device_slices().gradients[side], 0};
  };
  kind.start_gradients(to(0));
#pragma unroll 1
  for (int stage = 0; stage < STAGES; ++stage) {
    const Range range = block.range(stage);
    if (block.device_slices().gradients[0] || block.device_slices().gradients[1])
      kind.gradient(range, stage, to(0).stage(stage), to(1).stage(stage));
    if (staged(0) || staged(1)) {
      sync_block();
      for (int side = 0; side < 2; ++side)
        if (staged(side)) {
          const int element_size = size_of_element(side ? call.teacher.dtype : call.student.dtype);
          const int64_t offset = int64_t(range.first) * element_size;
          const int64_t bytes = int64_t(range.last - range.first) * element_size;
          copy_out(call, block.place, block.device_slices().gradients[side] + offset, to(side).stage(stage) + offset,
                   bytes, element_size);
        }
    }
    if (more) {
      order_before_copies();
      sync_block();
      block.fetch(1, stage);
    }
  }
}

// Processes all rows of a cluster.
template <class Kind>
FASTKD_DEVICE void run(const Call& call, char* memory) {
  Block block(call, memory);
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
    write_gradients(block, kind, more);
  }
}

}  // namespace fastkd::cuda
