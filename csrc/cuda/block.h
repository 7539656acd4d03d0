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
  int64_t next_row;  // of this cluster, after this row
  int64_t clusters;  // the distance of a cluster's rows
  Call call;  // a copy: functions that are not inlined would load the kernel's argument from device memory
  Barrier arrived[MOST_STAGES];
  alignas(PIECE) Maxima warp_maxima[WARPS];  // of the columns of each warp; infinite if not known
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
      for (int stage = 0; stage < call.stages; ++stage) init(&shared_.arrived[stage]);
    if (place.thread < WARPS) {  // those of warps that do not exist are never the larger ones
      const float max = place.thread < call.threads / WARP ? INF : -INF;
      shared_.warp_maxima[place.thread] = {max, max};
    }
    if (place.thread < 2) shared_.rows[place.thread].has_options = false;
    if (leads()) shared_.clusters = block_count() / call.ranks;
    static_assert(sizeof(Call) % sizeof(uint32_t) == 0, "copied in words");
    const uint32_t* from = reinterpret_cast<const uint32_t*>(&call);
    uint32_t* to = reinterpret_cast<uint32_t*>(&shared_.call);
    for (int i = place.thread; i < int(sizeof(Call) / sizeof(uint32_t)); i += call.threads) to[i] = from[i];
    cluster_arrive();
    cluster_wait();  // now the other blocks are running, so their shared memory may be written
  }

  const Call& call;
  const Place place;

  FASTKD_DEVICE const Call& call_in_shared_memory() const { return shared_.call; }  // for what is done once per row

  FASTKD_DEVICE bool leads() const { return place.thread == 0; }
  FASTKD_DEVICE RowState& row() const { return shared_.rows[parity_of_row()]; }
  FASTKD_DEVICE const DeviceSlices& device_slices() const { return shared_.device_slices[parity_of_row()]; }
  FASTKD_DEVICE void advance() { parities_ ^= 1; }

  FASTKD_DEVICE bool is_in_first_warp() const { return place.thread < WARP; }

  // The cluster's rows. One thread finds the next one that is kept; all threads write the outputs of those before it.
  FASTKD_DEVICE int64_t first_row() const { return block_number() / call.ranks; }
  FASTKD_DEVICE int64_t row_after(int64_t row) const { return row + shared_.clusters; }
  FASTKD_DEVICE int64_t next_row() const { return shared_.next_row; }
  FASTKD_DEVICE bool has_next_row() const { return shared_.next_row < call.rows; }
  FASTKD_DEVICE void write_dropped_rows(int64_t first, int64_t end) const {
#pragma unroll 1
    for (int64_t row = first; row < end && row < call.rows; row = row_after(row)) write_dropped_row(call, row, place);
  }

  // Finds the first kept row from `row` on, and opens it as this row (later = 0) or as the next one (later = 1). One
  // thread calls this.
  template <class Kind>
  FASTKD_DEVICE void open_kept(int64_t row, int later) {
    while (row < call.rows && is_dropped(shared_.call, row)) row = row_after(row);
    shared_.next_row = row;
    if (row < call.rows) open<Kind>(row, later);
  }

  template <class Kind>
  FASTKD_DEVICE void open(int64_t index, int later) {
    Kind::open(shared_.call, index, shared_.rows[parity_of_row() ^ later]);
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

  // Whether gradients replace the logits in shared memory: whole vectors are not at multiples of PIECE in device memory.
  FASTKD_DEVICE bool is_staged(int side) const {
    const char* gradient = device_slices().gradients[side];
    return gradient && skew_of(gradient) != row().shift * element_size(side);
  }

  // This row's slice in shared memory, with the alignment that it has in device memory.
  FASTKD_DEVICE Slice slice(int side) const { return slice(device_slices(), side); }

  // One bit per column of the slice, set if a sparse teacher lists it, in the place of a dense teacher's logits.
  FASTKD_DEVICE uint32_t* bits() const { return reinterpret_cast<uint32_t*>(memory(1)); }

  // Fetches a stage; the first warp calls this. The stage has arrived after await.
  FASTKD_DEVICE void fetch(int later, int stage) {
    const DeviceSlices& device = shared_.device_slices[parity_of_row() ^ later];
    const Range range = stage_range(call, place.rank, stage, shared_.rows[parity_of_row() ^ later].shift);
    int announced = 0;
    each_side([&](int side) {
      const int offset = range.first * element_size(side);
      const int bytes = (range.last - range.first) * element_size(side);
      const char* from = device.logits[side] + offset;
      char* to = slice(device, side).stage(stage) + offset;
      const Pieces pieces = whole_pieces(from, bytes);
      copy_edges(place, to, from, pieces, bytes, element_size(side));
      const int whole = pieces.last - pieces.first;
      if (leads() && whole) copy_pieces(to + pieces.first, from + pieces.first, whole, &shared_.arrived[stage]);
      announced += whole;
    });
    sync_warp();  // the lanes have copied the edges
    if (leads()) expect(&shared_.arrived[stage], announced);
  }

  FASTKD_DEVICE void await(int stage) { wait(&shared_.arrived[stage], parity_of_row()); }

  // Calls f(range, stage) for each stage, once it has arrived.
  template <class Function>
  FASTKD_DEVICE void each_stage(Function f) {
#pragma unroll 1
    for (int stage = 0; stage < call.stages; ++stage) {
      await(stage);
      f(range(stage), stage);
    }
  }

  // Calls f(range, stage) for ranges that cover the slice, each of which is in one piece of memory; all have arrived.
  template <class Function>
  FASTKD_DEVICE void each_range(Function f) {
    const int ranges = call.alike ? 1 : call.stages;
#pragma unroll 1
    for (int i = 0; i < ranges; ++i) f(call.alike ? Range{0, columns_in_slice(call, place.rank)} : range(i), i);
  }

  // The maxima over all threads of the block. Every thread gets them.
  FASTKD_DEVICE Maxima common(Maxima max) {
    const int warp = place.thread / WARP, lane = place.thread % WARP;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) max = larger(max, from_lane_above(max, step));
    if (lane == 0) shared_.warp_maxima[warp] = max;
    sync_block();
    max = {-INF, -INF};
#pragma unroll 1
    for (int other = 0; other < call.threads / WARP; other += 4)
#pragma unroll
      for (int i = 0; i < 4; ++i) max = larger(max, shared_.warp_maxima[other + i]);
    return max;
  }

  FASTKD_DEVICE Maxima warp_maxima() const { return shared_.warp_maxima[place.thread / WARP]; }

  // Merges the statistics of all threads into the row's, in a fixed order; the first warp sees the result. Statistics of a
  // block are relative to the same maxima. A lane adds up one field of all parts, rather than all fields of a few parts.
  FASTKD_DEVICE void merge(const Statistics& local) {
    using Fields = float[STATISTICS_FIELDS];
    Fields* warp_parts = reinterpret_cast<Fields*>(shared_.warp_parts);
    Fields* rank_parts = reinterpret_cast<Fields*>(shared_.rank_parts[next_exchange()]);
    float* result = reinterpret_cast<float*>(&row().statistics);
    const int warp = place.thread / WARP, lane = place.thread % WARP, field = lane < STATISTICS_FIELDS ? lane : 0;
    const auto merged = [&](const Fields* parts, int count) {
      const bool is_sum = field >= EXTREMES_FIELDS;
      float x = is_sum ? 0 : INF;
#pragma unroll 1
      for (int first = 0; first < count; first += 8) {
        float y[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] = first + i < count ? parts[first + i][field] : is_sum ? 0 : INF;
#pragma unroll
        for (int i = 0; i < 8; ++i) x = is_sum ? x + y[i] : fminf(x, y[i]);
      }
      return x;
    };
    store_sums_over_lanes(local, warp_parts[warp]);
    sync_block();
    const bool only = call.ranks == 1;
    if (warp == 0) {
      const float x = merged(warp_parts, call.threads / WARP);
      if (only) {
        if (lane < STATISTICS_FIELDS) result[lane] = x;
      } else if (lane < STATISTICS_FIELDS) {
#pragma unroll 1
        for (int rank = 0; rank < call.ranks; ++rank) send(&rank_parts[place.rank][lane], rank, x);
      }
    }
    if (!only) {
      cluster_arrive(warp == 0);
      cluster_wait();
      if (warp == 0) {
        Statistics* parts = reinterpret_cast<Statistics*>(rank_parts);
        Statistics part = parts[lane < call.ranks ? lane : 0];
        rescale_lanes(part, call.ranks);
        sync_warp();
        if (lane < call.ranks) parts[lane] = part;
        sync_warp();
        const float x = merged(rank_parts, call.ranks);
        if (lane < STATISTICS_FIELDS) result[lane] = x;
      }
    }
    if (warp == 0) sync_warp();
  }

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

  FASTKD_DEVICE char* part_of(const Rows& rows, int64_t row) const {
    char* memory = row_address(call, rows, row);
    return memory ? memory + first_column(call, place.rank) * size_of_element(rows.dtype) : memory;
  }

  FASTKD_DEVICE Slice slice(const DeviceSlices& device, int side) const {
    return {memory(side) + skew_of(device.logits[side]), call.alike ? 0 : PIECE};
  }

  FASTKD_DEVICE char* memory(int side) const {
    const int before = side ? call.slice * size_of_element(call.student.dtype) + MOST_STAGES * PIECE : 0;
    return reinterpret_cast<char*>(&shared_) + STATE + before;
  }

  // Stores the merged statistics of a warp's lanes. In each step a lane passes on half of its sums and keeps the others, so
  // that it ends with one sum: fewer exchanges than if every lane added all.
  FASTKD_DEVICE void store_sums_over_lanes(const Statistics& local, float (&to)[STATISTICS_FIELDS]) const {
    constexpr int COUNT = 16;
    static_assert(SUMMED_FIELDS <= COUNT, "two lanes end with a sum");
    const float* fields = reinterpret_cast<const float*>(&local);
    const int lane = place.thread % WARP;
    float sums[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sums[i] = i < SUMMED_FIELDS ? fields[EXTREMES_FIELDS + i] : 0;
    const auto halve = [&](auto half) {
      constexpr int HALF = decltype(half)::value;
      const bool upper = lane & (2 * HALF);
#pragma unroll
      for (int i = 0; i < HALF; ++i) {
        const float kept = upper ? sums[i + HALF] : sums[i], passed = upper ? sums[i] : sums[i + HALF];
        sums[i] = kept + from_lane_across(passed, 2 * HALF);
      }
    };
    halve(std::integral_constant<int, 8>());
    halve(std::integral_constant<int, 4>());
    halve(std::integral_constant<int, 2>());
    halve(std::integral_constant<int, 1>());
    const float sum = sums[0] + from_lane_across(sums[0], 1);
    const int number = lane / 2;
    if (lane % 2 == 0 && number < SUMMED_FIELDS) to[EXTREMES_FIELDS + number] = sum;
    float s_min = local.s_min, t_min = local.t_min;
    if (row().flags & MINIMA)
#pragma unroll 1
      for (int step = WARP / 2; step > 0; step /= 2) {
        s_min = fminf(s_min, from_lane_across(s_min, step));
        t_min = fminf(t_min, from_lane_across(t_min, step));
      }
    if (lane == 0) to[0] = local.s_max, to[1] = local.t_max, to[2] = s_min, to[3] = t_min;
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
