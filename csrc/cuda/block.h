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
  Maxima warp_maxima[WARPS];  // of the columns of each warp; infinite if not known
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
    shared_.warp_maxima[place.thread / WARP] = {INF, INF};
    cluster_arrive();
    cluster_wait();  // now the other blocks are running, so their shared memory may be written
  }

  const Call& call;
  const Place place;

  FASTKD_DEVICE bool leads() const { return place.thread == 0; }
  FASTKD_DEVICE RowState& row() const { return shared_.rows[parity_of_row()]; }
  FASTKD_DEVICE const DeviceSlices& device_slices() const { return shared_.device_slices[parity_of_row()]; }
  FASTKD_DEVICE void advance() { parities_ ^= 1; }

  FASTKD_DEVICE int64_t first_row() const { return next_kept(block_number() / call.ranks); }
  FASTKD_DEVICE int64_t row_after(int64_t row) const { return next_kept(row + block_count() / call.ranks); }

  // Opens row `index` as this row (later = 0) or as the next one (later = 1). One thread calls this.
  template <class Kind>
  FASTKD_DEVICE void open(int64_t index, int later) {
    Kind::open(call, index, shared_.rows[parity_of_row() ^ later]);
    DeviceSlices& device = shared_.device_slices[parity_of_row() ^ later];
    for (int side = 0; side < 2; ++side) {
      device.logits[side] = side && call.ids ? nullptr : part_of(logits(side), index);
      device.gradients[side] = part_of(side ? call.teacher_gradient : call.student_gradient, index);
    }
    RowState& row = shared_.rows[parity_of_row() ^ later];
    const bool alike = !call.ids && row.student.dtype == row.teacher.dtype &&
                       skew_of(device.logits[0]) == skew_of(device.logits[1]);
    row.shift = alike ? skew_of(device.logits[0]) / element_size(0) : 0;
    row.vectors = !alike || !row.student.identity() || !row.teacher.identity() ? Vectors::any
                  : row.student.dtype == Dtype::bf16                           ? Vectors::bf16
                                                                               : Vectors::fp16_or_fp32;
    row.label_column = label_column_in_slice(call, row, place.rank);
  }

  FASTKD_DEVICE Range range(int stage) const { return stage_range(call, place.rank, stage, row().shift); }

  // This row's slice in shared memory, with the alignment that it has in device memory.
  FASTKD_DEVICE Slice slice(int side) const { return slice(device_slices(), side); }

  FASTKD_DEVICE bool wants_gradients() const {
    return device_slices().gradients[0] || device_slices().gradients[1];
  }

  // Where this row's gradients are written: directly in device memory if their vectors are at multiples of PIECE there.
  // Otherwise they replace the logits in shared memory, and copy_gradients_out copies them from there.
  FASTKD_DEVICE Slice gradient_slice(int side) const {
    return is_staged(side) ? slice(side) : Slice{device_slices().gradients[side], 0};
  }

  FASTKD_DEVICE void copy_gradients_out(int stage) const {
    if (!is_staged(0) && !is_staged(1)) return;
    sync_block();
    for (int side = 0; side < 2; ++side)
      if (is_staged(side)) {
        const Range columns = range(stage);
        const int64_t offset = int64_t(columns.first) * element_size(side);
        const int64_t bytes = int64_t(columns.last - columns.first) * element_size(side);
        copy_out(call, place, device_slices().gradients[side] + offset, slice(side).stage(stage) + offset, bytes,
                 element_size(side));
      }
  }

  // One bit per column of the slice, set if a sparse teacher lists it, in the place of a dense teacher's logits.
  FASTKD_DEVICE uint32_t* bits() const { return reinterpret_cast<uint32_t*>(memory(1)); }

  // Fetches this thread's share of a stage. The edges have arrived after sync_block, the whole pieces after await.
  FASTKD_DEVICE void fetch(int later, int stage) {
    const DeviceSlices& device = shared_.device_slices[parity_of_row() ^ later];
    const Range range = stage_range(call, place.rank, stage, shared_.rows[parity_of_row() ^ later].shift);
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

  FASTKD_DEVICE void await(int stage) { wait(&shared_.arrived[stage], parity_of_row()); }

  // Calls f(range, stage) for each stage, once it has arrived.
  template <class Function>
  FASTKD_DEVICE void each_stage(Function f) {
#pragma unroll 1
    for (int stage = 0; stage < STAGES; ++stage) {
      await(stage);
      f(range(stage), stage);
    }
  }

  // The maxima over all threads of the block. Every thread gets them.
  FASTKD_DEVICE Maxima common(Maxima max) {
    const int warp = place.thread / WARP, lane = place.thread % WARP;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) max = larger(max, from_lane_above(max, step));
    if (lane == 0) shared_.warp_maxima[warp] = max;
    sync_block();
    max = shared_.warp_maxima[0];
#pragma unroll 1
    for (int other = 1; other < call.threads / WARP; ++other) max = larger(max, shared_.warp_maxima[other]);
    return max;
  }

  FASTKD_DEVICE Maxima warp_maxima() const { return shared_.warp_maxima[place.thread / WARP]; }

  // Merges the parts of all threads in a fixed order. Thread 0 of every block gets the result. Parts of a block are
  // relative to the same maxima.
  template <class Part>
  FASTKD_DEVICE Part merged(Part local) {
    Part* warp_parts = reinterpret_cast<Part*>(shared_.warp_parts);
    Part* rank_parts = reinterpret_cast<Part*>(shared_.rank_parts[next_exchange()]);
    const int warp = place.thread / WARP, lane = place.thread % WARP;
    int lanes = WARP;  // the lanes that hold a part: all, then one per warp, then one per block
#pragma unroll 1
    for (int level = 0; level < 3; ++level) {  // a loop, to have one copy of the addition in the code
      if (level == 2 && warp == 0) rescale_lanes(local, lanes);
      if (level == 0 || warp == 0) local = sum_of_lanes(local, lanes);
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

  FASTKD_DEVICE bool is_staged(int side) const {
    const char* gradient = device_slices().gradients[side];
    return gradient && skew_of(gradient) != row().shift * element_size(side);
  }

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

  // Adds the parts of the first `lanes` lanes, a power of two. The first lane gets the result.
  template <class Part>
  FASTKD_DEVICE Part sum_of_lanes(Part local, int lanes) {
#pragma unroll 1
    for (int step = lanes / 2; step > 0; step /= 2) local = add(local, from_lane_above(local, step));
    return local;
  }

  // Rescales the parts of the first `lanes` lanes to their common maxima.
  template <class Part>
  FASTKD_DEVICE void rescale_lanes(Part& local, int lanes) {
    Maxima max = maxima_of(local);
#pragma unroll 1
    for (int step = lanes / 2; step > 0; step /= 2) max = larger(max, from_lane_above(max, step));
    rescale(local, from_first_lane(max), row());
  }
  FASTKD_DEVICE void rescale_lanes(Sums&, int) {}
  FASTKD_DEVICE void rescale_lanes(MeasureSums&, int) {}

  // In one register: the lowest bit counts rows, the next one exchanges.
  FASTKD_DEVICE int parity_of_row() const { return parities_ & 1; }
  FASTKD_DEVICE int next_exchange() {
    parities_ ^= 2;
    return parities_ >> 1;
  }

  Shared& shared_;
  int parities_ = 0;
};

}  // namespace fastkd::cuda
