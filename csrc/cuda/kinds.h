// The kinds of rows that a cluster computes: with a dense teacher, with a shard of a dense teacher's vocabulary, and
// with a sparse teacher. Each says what a block does in a phase.
#pragma once
#include "block.h"

namespace fastkd::cuda {

// The extremes of this thread's columns.
FASTKD_DEVICE Extremes extremes(Block& block) {
  Extremes local;
  block.each_stage([&](Range range, int stage) {
    add_extremes(local, block.call, block.row(), block.place, range, block.slice(0).stage(stage),
                 block.slice(1).stage(stage));
  });
  return local;
}

// A row with a dense teacher.
template <class Divergence>
struct Dense {
  static FASTKD_DEVICE void open(const Call& call, int64_t index, RowState& row) {
    statistics_are_exchanged(call) ? open_dense_shard(call, index, row) : open_row(call, index, row);
  }

  Block& block;

  FASTKD_DEVICE void prepare() {
    if (block.call.shard.step == Step::results) block.each_stage([](Range, int) {});
  }

  FASTKD_DEVICE bool has_statistics() const { return needs_statistics(block.call, block.row()); }

  FASTKD_DEVICE bool statistics_are_known() const { return statistics_are_exchanged(block.call); }
  FASTKD_DEVICE bool sums_are_known() const { return block.call.shard.step == Step::results; }

  template <bool LOG_0>
  FASTKD_DEVICE Statistics statistics() {
    const RowState& row = block.row();
    Maxima max{row.student.max, row.teacher.max};  // with LOG_0, known from the first attempt
    Extremes local;
    if (!LOG_0) {
      local = extremes(block);
      max = block.common(local.maxima());
    }
    Sweep<LOG_0, false> sweep(row, max, LOG_0 ? block.warp_maxima() : local.maxima());
    sweep.sum.s_min = local.s_min, sweep.sum.t_min = local.t_min;
    block.each_stage([&](Range range, int stage) {
      add_statistics(sweep, block.call, row, block.place, range, block.slice(0).stage(stage),
                     block.slice(1).stage(stage));
    });
    return sweep.result();
  }

  FASTKD_DEVICE void finish_phase() {
    finish_statistics(block.call, block.row());
    const Statistics& all = block.row().statistics;
    if (has_label_term(block.call))
      finish_label_term(block.call, block.row(), all.s_exp_sum + all.s_max_count, all.t_exp_sum + all.t_max_count,
                        all.s_exp_sum_t1 + all.s_max_count, all.t_exp_sum_t1 + all.t_max_count);
  }
  FASTKD_DEVICE void finish_phase(const Sums& all) { finish_sums<Divergence>(block.call, block.row(), all); }

  template <bool LOG_0>
  FASTKD_DEVICE Sums sums() {
    return wants_sum_of_h(block.call) ? sums<LOG_0, true>() : sums<LOG_0, false>();
  }

  template <bool LOG_0, bool WITH_H>
  FASTKD_DEVICE Sums sums() {
    Sums local{0, 0, 0};
    block.each_stage([&](Range range, int stage) {
      add_sums<Divergence, LOG_0, WITH_H>(local, block.call, block.row(), block.place, range, block.warp_maxima(),
                                          block.slice(0).stage(stage), block.slice(1).stage(stage));
    });
    return local;
  }

  // Every stage has arrived, because a call with measures has statistics.
  FASTKD_DEVICE void measure() {
    const MeasureSums all =
        block.merged(measure_slice(block.call, block.row(), block.place, block.slice(0), block.slice(1)));
    if (block.leads() && block.place.rank == 0) write_measures(block.call, block.row(), all);
  }

  FASTKD_DEVICE void finish_row() {
    if (block.call.shard.step != Step::sums)
      write_value(block.call, block.row(), block.place.rank);
    else if (block.place.rank == 0)
      store_partial_sums(block.call, block.row());
  }
  FASTKD_DEVICE void start_gradients(const Slice&) {}

  FASTKD_DEVICE void gradient(Range range, int stage, char* student_to, char* teacher_to) {
    const char *student = block.slice(0).stage(stage), *teacher = block.slice(1).stage(stage);
    if (block.row().log_0_policy)
      gradients<Divergence, true>(block.call, block.row(), block.place, range, block.warp_maxima(), student, teacher,
                                  student_to, teacher_to);
    else
      gradients<Divergence, false>(block.call, block.row(), block.place, range, block.warp_maxima(), student, teacher,
                                   student_to, teacher_to);
  }
};

// The first step of a row with a dense teacher whose vocabulary is divided among ranks.
struct DenseShard {
  static FASTKD_DEVICE void open(const Call& call, int64_t index, RowState& row) {
    open_row(call, index, row);
    choose_center(call, row);
  }

  Block& block;

  FASTKD_DEVICE ShardStatistics shard_statistics() {
    const Extremes local = extremes(block);
    Sweep<false, true> sweep(block.row(), block.common(local.maxima()), local.maxima());
    sweep.sum.s_min = local.s_min, sweep.sum.t_min = local.t_min;
    ShardStatistics all{{}, -INF, -INF};
    block.each_stage([&](Range range, int stage) {
      add_shard_statistics(sweep, all, block.call, block.row(), block.place, range, block.slice(0).stage(stage),
                           block.slice(1).stage(stage));
    });
    all.sweep = sweep.result();
    return all;
  }

  FASTKD_DEVICE void measure() {}
  FASTKD_DEVICE void finish_row() {}
  FASTKD_DEVICE void start_gradients(const Slice&) {}
  FASTKD_DEVICE void gradient(Range, int, char*, char*) {}
};

// A row with a sparse teacher.
struct Sparse {
  static FASTKD_DEVICE void open(const Call& call, int64_t index, RowState& row) {
    statistics_are_exchanged(call) ? open_sparse_shard(call, index, row) : open_topk_row(call, index, row);
    if (call.shard.step == Step::statistics) choose_center(call, row);
  }

  Block& block;

  FASTKD_DEVICE void prepare() {
    const Call& call = block.call;
    RowState& row = block.row();
    uint32_t* bits = block.bits();
    for (int i = block.place.thread; i <= call.slice / 32; i += call.threads) bits[i] = 0;
    sync_block();
    SparseStatistics local = empty_sparse_statistics(row);
    mark_tokens(call, row, block.place, bits, local, [](uint32_t* word, uint32_t bit) { return set_bits(word, bit); });
    sync_block();
    if (statistics_are_exchanged(call)) return block.each_stage([](Range, int) {});
    Extremes extremes;
    block.each_stage([&](Range range, int stage) {
      add_sweep_extremes(extremes, call, row, block.place, range, block.slice(0).stage(stage), bits);
    });
    Sweep<true, false> sweep(row, block.common(extremes.max), extremes.max);
    block.each_stage([&](Range range, int stage) {
      add_sweep(sweep, call, row, block.place, range, block.slice(0).stage(stage), bits);
    });
    local.sweep = sweep.result();
    gather_tokens(call, row, block.place, block.slice(0), local);
    const SparseStatistics all = block.merged(local);
    if (block.leads()) {
      if (call.shard.step == Step::all)
        finish_sweep(call, row, all);
      else if (block.place.rank == 0)
        store_partial(call, row, all);
    }
    sync_block();
  }

  FASTKD_DEVICE bool has_statistics() const { return true; }

  FASTKD_DEVICE bool statistics_are_known() const { return false; }  // those of events are not exchanged
  FASTKD_DEVICE bool sums_are_known() const { return false; }

  template <bool LOG_0>
  FASTKD_DEVICE Statistics statistics() {
    const RowState& row = block.row();
    Maxima local{INF, INF}, max{row.student.max, row.teacher.max};
    Extremes extremes;
    if (!LOG_0) {
      extremes = event_extremes(block.call, row, block.place, block.slice(0));
      local = extremes.max;
      max = block.common(local);
    }
    Sweep<LOG_0, false> sweep(row, max, local);
    sweep.sum.s_min = extremes.s_min, sweep.sum.t_min = extremes.t_min;
    add_events(sweep, block.call, row, block.place, block.slice(0));
    return sweep.result();
  }

  FASTKD_DEVICE void finish_phase() { finish_events(block.call, block.row()); }
  FASTKD_DEVICE void finish_phase(const Sums& all) { finish_event_sums(block.call, block.row(), all); }

  template <bool LOG_0>
  FASTKD_DEVICE Sums sums() {
    return event_sums<LOG_0>(block.call, block.row(), block.place, block.slice(0));
  }

  FASTKD_DEVICE void measure() {}

  FASTKD_DEVICE void finish_row() {
    if (block.call.shard.step == Step::statistics) return;
    if (block.row().tail.teacher_lists_no_token) block.row().phi = 0;
    if (block.row().tail.teacher_is_invalid) block.row().phi = NAN;
    write_value(block.call, block.row(), block.place.rank);
    finish_tail(block.call, block.row());
  }

  FASTKD_DEVICE void start_gradients(const Slice& to) {
    // Two threads would store the gradient of a token that is listed twice; scatter_tail makes the row NaN.
    if (!to.memory || block.row().tail.teacher_is_invalid) return;
    if (block.row().log_0_policy)
      token_gradients<true>(block.call, block.row(), block.place, block.slice(0), to);
    else
      token_gradients<false>(block.call, block.row(), block.place, block.slice(0), to);
    sync_block();
  }

  FASTKD_DEVICE void gradient(Range range, int stage, char* to, char*) {
    if (to) scatter_tail(block.call, block.row(), block.place, range, block.slice(0).stage(stage), block.bits(), to);
  }
};

}  // namespace fastkd::cuda
