// One block of a cluster: its shared memory, how it fetches stages of a row, and how partial results are merged.
#pragma once
#include "row.h"
#include "shard.h"
#include "topk.h"

namespace fastkd::cuda {

constexpr int WARP = 32, WARPS = MOST_THREADS / WARP;

// A block's part of a row in device memory, by side: student, teacher.
struct DeviceSlices {
  const char* logits[2];
  char* gradients[2];  // null if not wanted
};

// State in shared memory, because the loops over a row need the registers.
struct Shared {
  RowState rows[2];  // this row and the next
  DeviceSlices device_slices[2];
  Barrier arrived[STAGES];
  // Partial results to be merged: those of this block's warps, and those of the cluster's blocks. Exchanges alternate
  // between the two buffers for blocks, since a block may be one exchange ahead of the others, but never two.
  alignas(PIECE) char warp_parts[WARPS * sizeof(SparseStatistics)];
  alignas(PIECE) char rank_parts[2][MOST_RANKS * sizeof(SparseStatistics)];
};
static_assert(sizeof(Shared) <= STATE, "plan.h reserves STATE bytes");
static_assert(sizeof(ShardStatistics) <= sizeof(SparseStatistics), "warp_parts and rank_parts fit the larger one");

class Block {
 public:
  FASTKD_DEVICE Block(const Call& call, char* memory)
      : call(call),
        place{int(block_number() % call.ranks), thread_number()},
        shared_(*reinterpret_cast<Shared*>(memory)) {
    if (leads())
      for (int stage = 0; stage < STAGES; ++stage) init(&shared_.arrived[stage]);
    cluster_arrive();
    cluster_wait();  // now the other blocks are running, so their shared memory may be written
  }

  const Call& call;
  const Place place;

  FASTKD_DEVICE bool leads() const { return place.thread == 0; }
  FASTKD_DEVICE RowState& row() const { return shared_.rows[turn_ & 1]; }
  FASTKD_DEVICE const DeviceSlices& device_slices() const { return shared_.device_slices[turn_ & 1]; }
  FASTKD_DEVICE void advance() { ++turn_; }

  FASTKD_DEVICE int64_t first_row() const { return next_kept(block_number() / call.ranks); }
  FASTKD_DEVICE int64_t row_after(int64_t row) const { return next_kept(row + block_count() / call.ranks); }

  // Opens row `index` as this row (later = 0) or as the next one (later = 1). One thread calls this.
  template <class Kind>
  FASTKD_DEVICE void open(int64_t index, int later) {
    Kind::open(call, index, shared_.rows[(turn_ + later) & 1]);
    DeviceSlices& device = shared_.device_slices[(turn_ + later) & 1];
    for (int side = 0; side < 2; ++side) {
      device.logits[side] = side && call.ids ? nullptr : part_of(logits(side), index);
      device.gradients[side] = part_of(side ? call.teacher_gradient : call.student_gradient, index);
    }
    RowState& row = shared_.rows[(turn_ + later) & 1];
    const auto is_aligned_bf16 = [&](const Side& side, const char* logits) {
      return side.dtype == Dtype::bf16 && side.identity() && skew_of(logits) == 0;
    };
    row.aligned_bf16 = is_aligned_bf16(row.student, device.logits[0]) && is_aligned_bf16(row.teacher, device.logits[1]);
    row.label_column = label_column_in_slice(call, row, place.rank);
  }

  // This row's slice in shared memory, with the alignment that it has in device memory.
  FASTKD_DEVICE Slice slice(int side) const { return slice(device_slices(), side); }

  // One bit per column of the slice, set if a sparse teacher lists it, in the place of a dense teacher's logits.
  FASTKD_DEVICE uint32_t* bits() const { return reinterpret_cast<uint32_t*>(memory(1)); }

  // Fetches this thread's share of a stage. The edges have arrived after sync_block, the whole pieces after await.
  FASTKD_DEVICE void fetch(int later, int stage) {
    const DeviceSlices& device = shared_.device_slices[(turn_ + later) & 1];
    const Range range = stage_range(call, place.rank, stage);
    int64_t announced = 0;
    each_side([&](int side) {
      const int64_t offset = int64_t(range.first) * element_size(side);
      const int64_t bytes = int64_t(range.last - range.first) * element_size(side);
      const char* from = device.logits[side] + offset;
      char* to = slice(device, side).stage(stage) + offset;
      const Pieces pieces = whole_pieces(from, bytes);
      copy_edges(place, to, from, pieces, bytes, element_size(side));
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
    int lanes = WARP;  // the lanes that hold a part: all, then one per warp, then one per block
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
    if (warp == 0) sync_warp();  // lane 0 goes on to change the row, which the other lanes read while they merge
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
  FASTKD_DEVICE int element_size(int side) const { return size_of_element(logits(side).dtype); }

  FASTKD_DEVICE char* part_of(const Rows& rows, int64_t row) const {
    char* memory = row_address(call, rows, row);
    return memory ? memory + first_column(call, place.rank) * size_of_element(rows.dtype) : memory;
  }

  FASTKD_DEVICE Slice slice(const DeviceSlices& device, int side) const {
    return {memory(side) + skew_of(device.logits[side]), PIECE};
  }

  FASTKD_DEVICE char* memory(int side) const {
    const int before = side ? call.slice * size_of_element(call.student.dtype) + STAGES * PIECE : 0;
    return reinterpret_cast<char*>(&shared_) + STATE + before;
  }

  // The cluster's first kept row from `row` on. Writes the outputs of the dropped rows before it.
  FASTKD_DEVICE int64_t next_kept(int64_t row) const {
#pragma unroll 1
    for (; row < call.rows && is_dropped(call, row); row += block_count() / call.ranks)
      write_dropped_row(call, row, place);
    return row;
  }

  // Merges the parts of the first `lanes` lanes, a power of two. The first lane gets the result.
  template <class Part>
  FASTKD_DEVICE Part merge_lanes(Part local, int lanes) {
#pragma unroll 1
    for (int step = lanes / 2; step > 0; step /= 2) local = merge(local, from_lane_above(local, step), row());
    return local;
  }

  Shared& shared_;
  int turn_ = 0, exchange_ = 0;
};

}  // namespace fastkd::cuda
