// What a cluster of thread blocks does with its rows, one after the other: row.h and topk.h have what a thread computes,
// here is how data gets to threads and between them. tests/support/cuda_host.h has a CPU run this.
//
// A row stays in the blocks' shared memory from its first look to its gradient, so each logit is read from device memory
// once. Its slices come in stages; a stage whose gradient is written makes room for that of the next row, which the copy
// engine fetches meanwhile: the memory is busy while this row's other stages are computed.
//
// Each sweep computes its exponentials anew. Of 128,256 columns in bf16 a thread has 64 of either side: to keep what the
// gradient needs of them takes 128 registers, all there are while two blocks share a multiprocessor.
#pragma once
#include "row.h"
#include "shard.h"
#include "topk.h"

namespace fastkd::cuda {

constexpr int WARP = 32, WARPS = MOST_THREADS / WARP;

// Where a block's part of a row is in device memory, by side: the student's, the teacher's.
struct Source {
  const char* logits[2];
  char* gradients[2];  // null where not wanted
};

// What the loops over a row would need registers for, had they not shared memory.
struct Shared {
  RowState rows[2];  // this one and the next
  Source sources[2];
  Barrier arrived[STAGES];
  // Parts on their way to be merged: those of a block's warps, which it is done with before it exchanges, and those of
  // blocks. A block that is ahead of others by one exchange writes into the other of the two; it cannot be ahead by two.
  alignas(PIECE) char of_warps[WARPS * sizeof(Whole)];
  alignas(PIECE) char of_ranks[2][MOST_RANKS * sizeof(Whole)];
};
static_assert(sizeof(Shared) <= STATE, "plan.h reckons with less");
static_assert(sizeof(Share) <= sizeof(Whole), "what passes through exchanges");

class Block {
 public:
  FASTKD_DEVICE Block(const Call& call, char* memory)
      : call(call),
        place{int(block_number() % call.ranks), thread_number()},
        shared_(*reinterpret_cast<Shared*>(memory)) {
    if (leads())
      for (int stage = 0; stage < STAGES; ++stage) init(&shared_.arrived[stage]);
    cluster_arrive();
    cluster_wait();  // the others run, and what they share is there to be written to
  }

  const Call& call;
  const Place place;

  FASTKD_DEVICE bool leads() const { return place.thread == 0; }
  FASTKD_DEVICE RowState& row() const { return shared_.rows[turn_ & 1]; }
  FASTKD_DEVICE const Source& source() const { return shared_.sources[turn_ & 1]; }
  FASTKD_DEVICE void advance() { ++turn_; }

  FASTKD_DEVICE int64_t first_row() const { return counting(block_number() / call.ranks); }
  FASTKD_DEVICE int64_t row_after(int64_t row) const { return counting(row + block_count() / call.ranks); }

  // By one thread: of this row, or of the one that is `later` rows from it.
  template <class Kind>
  FASTKD_DEVICE void open(int64_t index, int later) {
    Kind::open(call, index, shared_.rows[(turn_ + later) & 1]);
    Source& source = shared_.sources[(turn_ + later) & 1];
    for (int side = 0; side < 2; ++side) {
      source.logits[side] = side && call.ids ? nullptr : part_of(logits(side), index);
      source.gradients[side] = part_of(side ? call.teacher_gradient : call.student_gradient, index);
    }
    RowState& row = shared_.rows[(turn_ + later) & 1];
    const auto plain = [&](const Side& side, const char* logits) {
      return side.dtype == Dtype::bf16 && side.identity() && skew_of(logits) == 0;
    };
    row.plain = plain(row.student, source.logits[0]) && plain(row.teacher, source.logits[1]);
    row.left_out = left_out_of(call, row, place.rank);
  }

  // This row's place in shared memory, as far from a multiple of a piece as it is in device memory.
  FASTKD_DEVICE Slice slice(int side) const { return slice(source(), side); }

  // Of a sparse teacher, which has no logits, the bits of its tokens.
  FASTKD_DEVICE uint32_t* bits() const { return reinterpret_cast<uint32_t*>(memory(1)); }

  // This thread's part in fetching a stage of a row. Its edges are there after sync_block, the rest after await.
  FASTKD_DEVICE void fetch(int later, int stage) {
    const Source& source = shared_.sources[(turn_ + later) & 1];
    const Range range = range_of(call, place.rank, stage);
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

  // f(range, stage) of each stage, once it is there.
  template <class Function>
  FASTKD_DEVICE void each_stage(Function f) {
#pragma unroll 1
    for (int stage = 0; stage < STAGES; ++stage) {
      await(stage);
      f(range_of(call, place.rank, stage), stage);
    }
  }

  // Every thread's part merged, in a fixed order; thread 0 of every block has the result.
  template <class Part>
  FASTKD_DEVICE Part merged(Part mine) {
    Part* of_warps = reinterpret_cast<Part*>(shared_.of_warps);
    Part* of_ranks = reinterpret_cast<Part*>(shared_.of_ranks[exchange_++ & 1]);
    const int warp = place.thread / WARP, lane = place.thread % WARP;
    int lanes = WARP;  // then warps, then ranks
#pragma unroll 1
    for (int level = 0; level < 3; ++level) {  // a loop, so that the code has one copy of merge
      if (level == 0 || warp == 0) mine = merge_lanes(mine, lanes);
      if (level == 0) {
        if (lane == 0) of_warps[warp] = mine;
        sync_block();
        lanes = call.threads / WARP;
        if (warp == 0) mine = of_warps[lane < lanes ? lane : 0];
      } else if (level == 1) {
        if (warp == 0) {
          mine = from_first_lane(mine);
          if (lane < call.ranks) send(of_ranks + place.rank, lane, mine);
        }
        cluster_arrive(warp == 0);
        cluster_wait();
        lanes = call.ranks;
        if (warp == 0) mine = of_ranks[lane < lanes ? lane : 0];
      }
    }
    return mine;
  }

 private:
  // Unrolled, as an index that is not known when compiling would move arrays out of registers.
  template <class Function>
  FASTKD_DEVICE void each_side(Function f) const {
    f(0);
    if (!call.ids) f(1);
  }
  FASTKD_DEVICE const Rows& logits(int side) const { return side ? call.teacher : call.student; }
  FASTKD_DEVICE int element(int side) const { return size_of_element(logits(side).dtype); }

  FASTKD_DEVICE char* part_of(const Rows& rows, int64_t row) const {
    char* memory = row_of(call, rows, row);
    return memory ? memory + first_column(call, place.rank) * size_of_element(rows.dtype) : memory;
  }

  FASTKD_DEVICE Slice slice(const Source& source, int side) const {
    return {memory(side) + skew_of(source.logits[side]), PIECE};
  }

  FASTKD_DEVICE char* memory(int side) const {
    const int before = side ? call.slice * size_of_element(call.student.dtype) + STAGES * PIECE : 0;
    return reinterpret_cast<char*>(&shared_) + STATE + before;
  }

  // The first of this cluster's rows from that one on that counts; those before it are dealt with.
  FASTKD_DEVICE int64_t counting(int64_t row) const {
#pragma unroll 1
    for (; row < call.rows && !counts(call, row); row += block_count() / call.ranks) drop(call, row, place);
    return row;
  }

  // Of the first lanes, a power of two; the first has the result.
  template <class Part>
  FASTKD_DEVICE Part merge_lanes(Part mine, int lanes) {
#pragma unroll 1
    for (int step = lanes / 2; step > 0; step /= 2) mine = merge(mine, from_lane_above(mine, step), row());
    return mine;
  }

  Shared& shared_;
  int turn_ = 0, exchange_ = 0;
};

// A row of logits against a row of logits.
template <class Divergence>
struct Dense {
  static FASTKD_DEVICE void open(const Call& call, int64_t index, RowState& row) {
    statistics_are_given(call) ? open_shares(call, index, row) : open_row(call, index, row);
  }

  Block& block;

  FASTKD_DEVICE void prepare() {
    if (block.call.shard.step == Step::results) block.each_stage([](Range, int) {});
  }

  FASTKD_DEVICE bool has_statistics() const { return needs_statistics(block.call, block.row()); }

  FASTKD_DEVICE bool statistics_given() const { return statistics_are_given(block.call); }
  FASTKD_DEVICE bool sums_given() const { return block.call.shard.step == Step::results; }

  template <bool LOG_0>
  FASTKD_DEVICE Statistics statistics() {
    Statistics mine = no_statistics<LOG_0>(block.row());
    block.each_stage([&](Range range, int stage) {
      add_statistics<LOG_0>(mine, block.call, block.row(), block.place, range, block.slice(0).stage(stage),
                            block.slice(1).stage(stage));
    });
    return mine;
  }

  FASTKD_DEVICE void close() {
    close_statistics(block.call, block.row());
    const Statistics& all = block.row().statistics_of_all;
    if (label_is_apart(block.call))
      close_label(block.call, block.row(), all.s_sum + all.s_tops, all.t_sum + all.t_tops, all.s_sum_at_1 + all.s_tops,
                  all.t_sum_at_1 + all.t_tops);
  }
  FASTKD_DEVICE void close(const Sums& all) { close_sums<Divergence>(block.call, block.row(), all); }

  template <bool LOG_0>
  FASTKD_DEVICE Sums sums() {
    Sums mine{0, 0};
    block.each_stage([&](Range range, int stage) {
      add_sums<Divergence, LOG_0>(mine, block.call, block.row(), block.place, range, block.slice(0).stage(stage),
                                  block.slice(1).stage(stage));
    });
    return mine;
  }

  FASTKD_DEVICE void finish_row() {
    if (block.call.shard.step != Step::sums)
      finish(block.call, block.row(), block.place.rank);
    else if (block.place.rank == 0)
      write_sums(block.call, block.row());
  }
  FASTKD_DEVICE void start_gradients(const Slice&) {}

  FASTKD_DEVICE void gradient(Range range, int stage, char* student_to, char* teacher_to) {
    const char *student = block.slice(0).stage(stage), *teacher = block.slice(1).stage(stage);
    if (block.row().log_0)
      gradients<Divergence, true>(block.call, block.row(), block.place, range, student, teacher, student_to, teacher_to);
    else
      gradients<Divergence, false>(block.call, block.row(), block.place, range, student, teacher, student_to, teacher_to);
  }
};

// The first step of a row of logits against a row of logits, where other processes have columns too.
struct DenseShare {
  static FASTKD_DEVICE void open(const Call& call, int64_t index, RowState& row) {
    open_row(call, index, row);
    choose_pivot(call, row);
  }

  Block& block;

  FASTKD_DEVICE Share share() {
    Share mine{no_statistics<false>(block.row()), -INF, -INF};
    block.each_stage([&](Range range, int stage) {
      add_share(mine, block.call, block.row(), block.place, range, block.slice(0).stage(stage),
                block.slice(1).stage(stage));
    });
    return mine;
  }

  FASTKD_DEVICE void finish_row() {}
  FASTKD_DEVICE void start_gradients(const Slice&) {}
  FASTKD_DEVICE void gradient(Range, int, char*, char*) {}
};

// A row of logits against the tokens that a teacher names.
struct Sparse {
  static FASTKD_DEVICE void open(const Call& call, int64_t index, RowState& row) {
    statistics_are_given(call) ? open_wholes(call, index, row) : open_topk_row(call, index, row);
    if (call.shard.step == Step::statistics) choose_pivot(call, row);
  }

  Block& block;

  FASTKD_DEVICE void prepare() {
    const Call& call = block.call;
    RowState& row = block.row();
    uint32_t* bits = block.bits();
    for (int i = block.place.thread; i <= call.slice / 32; i += call.threads) bits[i] = 0;
    sync_block();
    Whole mine = no_whole(row);
    mark_tokens(call, row, block.place, bits, mine, [](uint32_t* word, uint32_t bit) { return set_bits(word, bit); });
    sync_block();
    if (statistics_are_given(call)) return block.each_stage([](Range, int) {});
    block.each_stage([&](Range range, int stage) {
      add_whole(mine.sweep, call, row, block.place, range, block.slice(0).stage(stage), bits);
    });
    gather_tokens(call, row, block.place, block.slice(0), mine);
    const Whole all = block.merged(mine);
    if (block.leads()) {
      if (call.shard.step == Step::all)
        close_whole(call, row, all);
      else if (block.place.rank == 0)
        write_statistics(call, row, all);
    }
    sync_block();
  }

  FASTKD_DEVICE bool has_statistics() const { return true; }

  FASTKD_DEVICE bool statistics_given() const { return false; }  // those of events are not
  FASTKD_DEVICE bool sums_given() const { return false; }

  template <bool LOG_0>
  FASTKD_DEVICE Statistics statistics() {
    return statistics_of_events<LOG_0>(block.call, block.row(), block.place, block.slice(0));
  }

  FASTKD_DEVICE void close() { close_events(block.call, block.row()); }
  FASTKD_DEVICE void close(const Sums& all) { close_sums_of_events(block.call, block.row(), all); }

  template <bool LOG_0>
  FASTKD_DEVICE Sums sums() {
    return sums_of_events<LOG_0>(block.call, block.row(), block.place, block.slice(0));
  }

  FASTKD_DEVICE void finish_row() {
    if (block.call.shard.step == Step::statistics) return;
    if (block.row().others.teacher_is_silent) block.row().phi = 0;
    if (block.row().others.teacher_is_wrong) block.row().phi = NAN;
    finish(block.call, block.row(), block.place.rank);
    finish_others(block.call, block.row());
  }

  FASTKD_DEVICE void start_gradients(const Slice& to) {
    if (!to.memory) return;
    if (block.row().log_0)
      token_gradients<true>(block.call, block.row(), block.place, block.slice(0), to);
    else
      token_gradients<false>(block.call, block.row(), block.place, block.slice(0), to);
    sync_block();
  }

  FASTKD_DEVICE void gradient(Range range, int stage, char* to, char*) {
    if (to) spread(block.call, block.row(), block.place, range, block.slice(0).stage(stage), block.bits(), to);
  }
};

// The value of a row: optimistic first, with the policy for log 0 where that fails.
template <class Kind>
FASTKD_DEVICE void settle(Block& block, Kind& kind) {
  RowState& row = block.row();
  kind.prepare();
  if (block.call.shard.step == Step::statistics) return;
#pragma unroll 1
  for (int policy = 0; policy < 2; ++policy) {
    if (kind.has_statistics()) {
      if (!kind.statistics_given()) {
        const Statistics all =
            block.merged(policy ? kind.template statistics<true>() : kind.template statistics<false>());
        if (block.leads()) row.statistics_of_all = all;
      }
      if (block.leads()) kind.close();
    } else if (block.leads()) {
      row.finite = true;
    }
    sync_block();
    if (row.finite && !block.call.closed_form) {
      const Sums all = kind.sums_given()
                           ? row.sums_of_all
                           : block.merged(policy ? kind.template sums<true>() : kind.template sums<false>());
      if (block.leads()) kind.close(all);
      sync_block();
    }
    if (row.finite) break;
    sync_block();
    if (block.leads()) row.log_0 = true;
    sync_block();
  }
}

FASTKD_DEVICE void settle(Block& block, DenseShare& kind) {
  const Share all = block.merged(kind.share());
  if (block.leads() && block.place.rank == 0) write_statistics(block.call, block.row(), all);
}

// Gradients go to device memory at once where the row's address allows whole pieces, else by way of shared memory, where
// they take the logits' place. Stages of the next row follow.
template <class Kind>
FASTKD_DEVICE void write_gradients(Block& block, Kind& kind, bool more) {
  const Call& call = block.call;
  const auto by_way = [&](int side) { return skew_of(block.source().gradients[side]) != 0; };
  const auto to = [&](int side) { return by_way(side) ? block.slice(side) : Slice{block.source().gradients[side], 0}; };
  kind.start_gradients(to(0));
#pragma unroll 1
  for (int stage = 0; stage < STAGES; ++stage) {
    const Range range = range_of(call, block.place.rank, stage);
    if (block.source().gradients[0] || block.source().gradients[1])
      kind.gradient(range, stage, to(0).stage(stage), to(1).stage(stage));
    if (by_way(0) || by_way(1)) {
      sync_block();
      for (int side = 0; side < 2; ++side)
        if (by_way(side)) {
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

// The rows of a cluster.
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
    clear(call, block.place, call.student_gradient, block.row().row, true);
    clear(call, block.place, call.teacher_gradient, block.row().row, true);
    const int64_t next = block.row_after(block.row().row);
    more = next < call.rows;
    if (more && block.place.thread == call.threads - 1) block.open<Kind>(next, 1);  // while others wait for copies
    settle(block, kind);
    if (block.leads()) kind.finish_row();
    sync_block();
    write_gradients(block, kind, more);
  }
}

}  // namespace fastkd::cuda
