// The loop of a cluster of thread blocks over its rows: how data reaches threads and passes between them. row.h and
// topk.h have what a thread computes. tests/support/cuda_host.h runs this on a CPU.
//
// A row stays in the blocks' shared memory until its gradient is written, so each logit is read from device memory
// once. A slice is loaded in stages. Once the gradient of a stage is written, the copy engine fetches the same stage of
// the next row, so memory is busy while this row's other stages are computed.
//
// Each sweep recomputes its exponentials. With 128,256 columns of bf16, a thread has 64 of each side: keeping what the
// gradient needs of them would take 128 registers, which is all there are if two blocks share a multiprocessor.
#pragma once
#include "row.h"
#include "shard.h"
#include "topk.h"

namespace fastkd::cuda {

constexpr int WARP = 32, WARPS = MOST_THREADS / WARP;

// A block's part of a row in device memory, by side: student, teacher.
struct Source {
  const char* logits[2];
  char* gradients[2];  // null if not wanted
};

// State in shared memory; in registers, it would not fit beside the loops over a row.
struct Shared {
  RowState rows[2];  // this row and the next
  Source sources[2];
  Barrier arrived[STAGES];
  // Partial results on their way to be merged, of a block's warps and of the cluster's blocks. A block that is one
  // exchange ahead of the others writes into the second buffer for blocks; it cannot be two ahead.
  alignas(PIECE) char warp_parts[WARPS * sizeof(SparseStatistics)];
  alignas(PIECE) char rank_parts[2][MOST_RANKS * sizeof(SparseStatistics)];
};
static_assert(sizeof(Shared) <= STATE, "plan.h reckons with less");
static_assert(sizeof(ShardStatistics) <= sizeof(SparseStatistics), "what passes through exchanges");

class Block {
 public:
  FASTKD_DEVICE Block(const Call& call, char* memory)
      : call(call),
        place{int(block_number() % call.ranks), thread_number()},
        shared_(*reinterpret_cast<Shared*>(memory)) {
    if (leads())
      for (int stage = 0; stage < STAGES; ++stage) init(&shared_.arrived[stage]);
    cluster_arrive();
    cluster_wait();  // the other blocks run, and their shared memory may be written
  }

  const Call& call;
  const Place place;

  FASTKD_DEVICE bool leads() const { return place.thread == 0; }
  FASTKD_DEVICE RowState& row() const { return shared_.rows[turn_ & 1]; }
  FASTKD_DEVICE const Source& source() const { return shared_.sources[turn_ & 1]; }
  FASTKD_DEVICE void advance() { ++turn_; }

  FASTKD_DEVICE int64_t first_row() const { return next_counted(block_number() / call.ranks); }
  FASTKD_DEVICE int64_t row_after(int64_t row) const { return next_counted(row + block_count() / call.ranks); }

  // Opens this row, or the row `later` rows after it. One thread calls this.
  template <class Kind>
  FASTKD_DEVICE void open(int64_t index, int later) {
    Kind::open(call, index, shared_.rows[(turn_ + later) & 1]);
    Source& source = shared_.sources[(turn_ + later) & 1];
    for (int side = 0; side < 2; ++side) {
      source.logits[side] = side && call.ids ? nullptr : part_of(logits(side), index);
      source.gradients[side] = part_of(side ? call.teacher_gradient : call.student_gradient, index);
    }
    RowState& row = shared_.rows[(turn_ + later) & 1];
    const auto is_aligned_bf16 = [&](const Side& side, const char* logits) {
      return side.dtype == Dtype::bf16 && side.identity() && skew_of(logits) == 0;
    };
    row.aligned_bf16 = is_aligned_bf16(row.student, source.logits[0]) && is_aligned_bf16(row.teacher, source.logits[1]);
    row.label_column = label_column_in_slice(call, row, place.rank);
  }

  // This row's slice in shared memory, with the alignment that it has in device memory.
  FASTKD_DEVICE Slice slice(int side) const { return slice(source(), side); }

  // For a sparse teacher, which has no logits here: one bit per column.
  FASTKD_DEVICE uint32_t* bits() const { return reinterpret_cast<uint32_t*>(memory(1)); }

  // This thread's part in fetching a stage of a row. The edges are there after sync_block, the rest after await.
  FASTKD_DEVICE void fetch(int later, int stage) {
    const Source& source = shared_.sources[(turn_ + later) & 1];
    const Range range = stage_range(call, place.rank, stage);
    int64_t announced = 0;
    each_side([&](int side) {
      const int64_t offset = int64_t(range.first) * element(side);
      const int64_t bytes = int64_t(range.last - range.first) * element(side);
      const char* from = source.logits[side] + offset;
      char* to = slice(source, side).stage(stage) + offset;
      const Pieces pieces = whole_pieces(from, bytes);
      copy_edges(place, to, from, pieces, bytes, element(side));
      const int64_t whole = pieces.last - pieces.first;
      if (leads() && whole) copy_pieces(to + pieces.first, from + pieces.first, whole, &shared_.arrived[stage]);
      announced += whole;
    });
    if (leads()) expect(&shared_.arrived[stage], announced);
  }

  FASTKD_DEVICE void await(int stage) { wait(&shared_.arrived[stage], turn_ & 1); }

  // Calls f(range, stage) for each stage, once it has arrived.
  template <class Function>
  FASTKD_DEVICE void each_stage(Function f) {
#pragma unroll 1
    for (int stage = 0; stage < STAGES; ++stage) {
      await(stage);
      f(stage_range(call, place.rank, stage), stage);
    }
  }

  // Merges the parts of all threads in a fixed order. Thread 0 of every block gets the result.
  template <class Part>
  FASTKD_DEVICE Part merged(Part local) {
    Part* warp_parts = reinterpret_cast<Part*>(shared_.warp_parts);
    Part* rank_parts = reinterpret_cast<Part*>(shared_.rank_parts[exchange_++ & 1]);
    const int warp = place.thread / WARP, lane = place.thread % WARP;
    int lanes = WARP;  // parts to be merged: of lanes, then of warps, then of ranks
#pragma unroll 1
    for (int level = 0; level < 3; ++level) {  // a loop, to have one copy of merge in the code
      if (level == 0 || warp == 0) local = merge_lanes(local, lanes);
      if (level == 0) {
        if (lane == 0) warp_parts[warp] = local;
        sync_block();
        lanes = call.threads / WARP;
        if (warp == 0) local = warp_parts[lane < lanes ? lane : 0];
      } else if (level == 1) {
        if (warp == 0) {
          local = from_first_lane(local);
          if (lane < call.ranks) send(rank_parts + place.rank, lane, local);
        }
        cluster_arrive(warp == 0);
        cluster_wait();
        lanes = call.ranks;
        if (warp == 0) local = rank_parts[lane < lanes ? lane : 0];
      }
    }
    return local;
  }

 private:
  // Unrolled, because indexing by a variable would move arrays out of registers.
  template <class Function>
  FASTKD_DEVICE void each_side(Function f) const {
    f(0);
    if (!call.ids) f(1);
  }
  FASTKD_DEVICE const Rows& logits(int side) const { return side ? call.teacher : call.student; }
  FASTKD_DEVICE int element(int side) const { return size_of_element(logits(side).dtype); }

  FASTKD_DEVICE char* part_of(const Rows& rows, int64_t row) const {
    char* memory = row_address(call, rows, row);
    return memory ? memory + first_column(call, place.rank) * size_of_element(rows.dtype) : memory;
  }

  FASTKD_DEVICE Slice slice(const Source& source, int side) const {
    return {memory(side) + skew_of(source.logits[side]), PIECE};
  }

  FASTKD_DEVICE char* memory(int side) const {
    const int before = side ? call.slice * size_of_element(call.student.dtype) + STAGES * PIECE : 0;
    return reinterpret_cast<char*>(&shared_) + STATE + before;
  }

  // The cluster's first counted row from `row` on. Dropped rows before it are written.
  FASTKD_DEVICE int64_t next_counted(int64_t row) const {
#pragma unroll 1
    for (; row < call.rows && is_dropped(call, row); row += block_count() / call.ranks)
      write_dropped_row(call, row, place);
    return row;
  }

  // Merges the parts of the first lanes, a power of two. The first lane gets the result.
  template <class Part>
  FASTKD_DEVICE Part merge_lanes(Part local, int lanes) {
#pragma unroll 1
    for (int step = lanes / 2; step > 0; step /= 2) local = merge(local, from_lane_above(local, step), row());
    return local;
  }

  Shared& shared_;
  int turn_ = 0, exchange_ = 0;
};

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
    Statistics local = empty_statistics<LOG_0>(block.row());
    block.each_stage([&](Range range, int stage) {
      add_statistics<LOG_0>(local, block.call, block.row(), block.place, range, block.slice(0).stage(stage),
                            block.slice(1).stage(stage));
    });
    return local;
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
    Sums local{0, 0};
    block.each_stage([&](Range range, int stage) {
      add_sums<Divergence, LOG_0>(local, block.call, block.row(), block.place, range, block.slice(0).stage(stage),
                                  block.slice(1).stage(stage));
    });
    return local;
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
      gradients<Divergence, true>(block.call, block.row(), block.place, range, student, teacher, student_to,
                                  teacher_to);
    else
      gradients<Divergence, false>(block.call, block.row(), block.place, range, student, teacher, student_to,
                                   teacher_to);
  }
};

// The first step of a row with a dense teacher whose vocabulary is divided among ranks.
struct DenseShard {
  static FASTKD_DEVICE void open(const Call& call, int64_t index, RowState& row) {
    open_row(call, index, row);
    choose_pivot(call, row);
  }

  Block& block;

  FASTKD_DEVICE ShardStatistics shard_statistics() {
    ShardStatistics local{empty_statistics<false>(block.row()), -INF, -INF};
    block.each_stage([&](Range range, int stage) {
      add_shard_statistics(local, block.call, block.row(), block.place, range, block.slice(0).stage(stage),
                           block.slice(1).stage(stage));
    });
    return local;
  }

  FASTKD_DEVICE void finish_row() {}
  FASTKD_DEVICE void start_gradients(const Slice&) {}
  FASTKD_DEVICE void gradient(Range, int, char*, char*) {}
};

// A row with a sparse teacher.
struct Sparse {
  static FASTKD_DEVICE void open(const Call& call, int64_t index, RowState& row) {
    statistics_are_exchanged(call) ? open_sparse_shard(call, index, row) : open_topk_row(call, index, row);
    if (call.shard.step == Step::statistics) choose_pivot(call, row);
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
    block.each_stage([&](Range range, int stage) {
      add_sweep(local.sweep, call, row, block.place, range, block.slice(0).stage(stage), bits);
    });
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
    return event_statistics<LOG_0>(block.call, block.row(), block.place, block.slice(0));
  }

  FASTKD_DEVICE void finish_phase() { finish_events(block.call, block.row()); }
  FASTKD_DEVICE void finish_phase(const Sums& all) { finish_event_sums(block.call, block.row(), all); }

  template <bool LOG_0>
  FASTKD_DEVICE Sums sums() {
    return event_sums<LOG_0>(block.call, block.row(), block.place, block.slice(0));
  }

  FASTKD_DEVICE void finish_row() {
    if (block.call.shard.step == Step::statistics) return;
    if (block.row().tail.teacher_is_silent) block.row().phi = 0;
    if (block.row().tail.teacher_is_invalid) block.row().phi = NAN;
    write_value(block.call, block.row(), block.place.rank);
    finish_tail(block.call, block.row());
  }

  FASTKD_DEVICE void start_gradients(const Slice& to) {
    if (!to.memory) return;
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

// Writes the gradients, and fetches the stages of the next row. Gradients go directly to device memory if the row's
// address is a multiple of PIECE; otherwise they replace the logits in shared memory and are copied from there.
template <class Kind>
FASTKD_DEVICE void write_gradients(Block& block, Kind& kind, bool more) {
  const Call& call = block.call;
  const auto staged = [&](int side) { return skew_of(block.source().gradients[side]) != 0; };
  const auto to = [&](int side) { return staged(side) ? block.slice(side) : Slice{block.source().gradients[side], 0}; };
  kind.start_gradients(to(0));
#pragma unroll 1
  for (int stage = 0; stage < STAGES; ++stage) {
    const Range range = stage_range(call, block.place.rank, stage);
    if (block.source().gradients[0] || block.source().gradients[1])
      kind.gradient(range, stage, to(0).stage(stage), to(1).stage(stage));
    if (staged(0) || staged(1)) {
      sync_block();
      for (int side = 0; side < 2; ++side)
        if (staged(side)) {
          const int element = size_of_element(side ? call.teacher.dtype : call.student.dtype);
          const int64_t offset = int64_t(range.first) * element, bytes = int64_t(range.last - range.first) * element;
          copy_out(call, block.place, block.source().gradients[side] + offset, to(side).stage(stage) + offset, bytes,
                   element);
        }
    }
    if (more) {
      order_before_copies();
      sync_block();
      block.fetch(1, stage);
    }
  }
}

// All rows of a cluster.
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
    if (block.leads()) kind.finish_row();
    sync_block();
    write_gradients(block, kind, more);
  }
}

}  // namespace fastkd::cuda
