// csrc/cuda without a GPU: the phases of row.h in loops over blocks and threads, with arrays in place of what kernel.cu
// exchanges between threads. Shared memory is filled with NaN, so that a read past what was copied shows.

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

namespace {

// Bytes of device memory read and written since the last look; what lies in the blocks' shared memory does not count.
struct Traffic {
  int64_t bytes[2] = {};
  std::vector<std::pair<const char*, const char*>> shared;

  void see(const void* memory, int64_t count, bool writes) {
    const char* at = static_cast<const char*>(memory);
    for (const auto& [first, last] : shared)
      if (at >= first && at < last) return;
    bytes[writes] += count;
  }
};

Traffic traffic;

}  // namespace

#define FASTKD_SEEN(memory, bytes, writes) traffic.see(memory, bytes, writes)

#include "cuda/kernel.h"
#include "cuda/row.h"

namespace fastkd::cuda {
namespace {

constexpr int WARP = 32;

// One thread-block cluster: the parts of its threads, merged as kernel.cu merges them.
template <class Part>
Part merge_lanes(std::vector<Part> lanes, const RowState& row) {
  for (size_t step = lanes.size() / 2; step > 0; step /= 2)
    for (size_t lane = 0; lane < step; ++lane) lanes[lane] = merge(lanes[lane], lanes[lane + step], row);
  return lanes[0];
}

template <class Part, class Phase>
Part merge_cluster(const Call& call, const RowState& row, Phase phase) {
  std::vector<Part> ranks;
  for (int rank = 0; rank < call.ranks; ++rank) {
    std::vector<Part> warps;
    for (int warp = 0; warp < call.threads / WARP; ++warp) {
      std::vector<Part> lanes;
      for (int lane = 0; lane < WARP; ++lane) lanes.push_back(phase(Place{rank, warp * WARP + lane}));
      warps.push_back(merge_lanes(lanes, row));
    }
    ranks.push_back(merge_lanes(warps, row));
  }
  return merge_lanes(ranks, row);
}

struct Block {
  std::vector<Piece> memory[2];
  char* slices[2];
};

template <class Divergence>
void run_row(const Call& call, int64_t index) {
  RowState row;
  open_row(call, index, row);
  auto each = [&](auto phase) {
    for (int rank = 0; rank < call.ranks; ++rank)
      for (int thread = 0; thread < call.threads; ++thread) phase(Place{rank, thread});
  };
  if (!row.counted) return each([&](Place place) { drop(call, row, place); });

  const Rows* sides[2] = {&call.student, &call.teacher};
  const Rows* gradient_rows[2] = {&call.student_gradient, &call.teacher_gradient};
  std::vector<Block> blocks(call.ranks);
  for (Block& block : blocks)
    for (int side = 0; side < 2; ++side) {
      const Piece nothing{{~0u, ~0u, ~0u, ~0u}};  // NaN in every type
      block.memory[side].assign(int64_t(call.slice) * size_of(sides[side]->dtype) / PIECE, nothing);
      block.slices[side] = reinterpret_cast<char*>(block.memory[side].data());
    }
  auto from = [&](const Rows& rows, int rank) {
    char* memory = row_of(call, rows, index);
    return memory ? memory + first_column(call, rank) * size_of(rows.dtype) : nullptr;
  };
  traffic.shared.clear();
  for (Block& block : blocks)
    for (auto& memory : block.memory) {
      const char* first = reinterpret_cast<const char*>(memory.data());
      traffic.shared.push_back({first, first + memory.size() * PIECE});
    }
  each([&](Place place) {
    for (int side = 0; side < 2; ++side) {
      const Rows& rows = *sides[side];
      const int64_t bytes = int64_t(columns_of(call, place.rank)) * size_of(rows.dtype);
      const char* memory = from(rows, place.rank);
      const int64_t whole = whole_pieces(memory, bytes);
      if (whole % PIECE || (whole && reinterpret_cast<uintptr_t>(memory) % PIECE))
        throw std::runtime_error("the copy engine moves whole pieces only");
      char* slice = blocks[place.rank].slices[side];
      if (place.thread == 0 && whole) {
        traffic.see(memory, whole, false);
        std::memcpy(slice, memory, whole);
      }
      copy_rest(call, place, slice, memory, whole, bytes, size_of(rows.dtype));
    }
    clear(call, place, call.student_gradient, index, true);
    clear(call, place, call.teacher_gradient, index, true);
  });

  auto with_policy = [&](auto policy) {
    constexpr bool LOG_0 = decltype(policy)::value;
    row.log_0 = LOG_0;
    row.finite = true;
    if (needs_statistics(call, row))
      close_statistics(call, row, merge_cluster<Statistics>(call, row, [&](Place place) {
                         const Block& block = blocks[place.rank];
                         return statistics<LOG_0>(call, row, place, block.slices[0], block.slices[1]);
                       }));
    if (row.finite && !call.closed_form)
      close_sums(row, merge_cluster<Sums>(call, row, [&](Place place) {
                   const Block& block = blocks[place.rank];
                   return sums<Divergence, LOG_0>(call, row, place, block.slices[0], block.slices[1]);
                 }));
    return row.finite;
  };
  if (!with_policy(std::false_type{})) with_policy(std::true_type{});
  for (int rank = call.ranks; rank-- > 0;) finish(call, row, rank);

  auto write = [&](auto policy) {
    each([&](Place place) {
      Block& block = blocks[place.rank];
      char* to[2];
      for (int side = 0; side < 2; ++side) {
        to[side] = from(*gradient_rows[side], place.rank);
        if (reinterpret_cast<uintptr_t>(to[side]) % PIECE) to[side] = block.slices[side];
      }
      gradients<Divergence, decltype(policy)::value>(call, row, place, block.slices[0], block.slices[1], to[0], to[1]);
    });
  };
  row.log_0 ? write(std::true_type{}) : write(std::false_type{});
  each([&](Place place) {
    for (int side = 0; side < 2; ++side) {
      char* to = from(*gradient_rows[side], place.rank);
      const int element = size_of(sides[side]->dtype);
      if (reinterpret_cast<uintptr_t>(to) % PIECE)
        copy_rest(call, place, to, blocks[place.rank].slices[side], 0,
                  int64_t(columns_of(call, place.rank)) * element, element);
    }
  });
}

}  // namespace

void kd_rows(Call call, int ranks, void*) {  // a device's number serves to ask for more blocks a row than plan() takes
  if (!prepare(call)) throw std::runtime_error("a row is too wide for the shared memory of a cluster");
  while (call.ranks < ranks) {
    call.ranks *= 2;
    call.slice = int((call.vocabulary + VECTOR * call.ranks - 1) / (VECTOR * call.ranks)) * VECTOR;
  }
#define FASTKD_RUN(name) run_row<name>,
  static constexpr void (*rows[])(const Call&, int64_t) = {FASTKD_DIVERGENCES(FASTKD_RUN)};
#undef FASTKD_RUN
  double total = 0;
  for (int64_t i = 0; i < call.rows; ++i) {
    rows[call.divergence](call, i);
    total += call.loss[i];
  }
  *call.total = float(total * call.scale * (call.scale_on_device ? *call.scale_on_device : 1));
}

void scale_rows(const Call& call, const float* factor, int64_t stride, int, void*) {
  for (int64_t row = 0; row < call.rows; ++row)
    for (int64_t column = 0; column < call.student.width; ++column) {
      char* memory = row_of(call, call.student, row);
      store_one(memory, call.student.dtype, column,
                factor[row * stride] * load_one(memory, call.student.dtype, column));
    }
}

std::vector<std::string> divergences() {
#define FASTKD_NAME(name) #name,
  return {FASTKD_DIVERGENCES(FASTKD_NAME)};
#undef FASTKD_NAME
}

std::vector<int> architectures() { return {0}; }  // what the tests say of a CPU

}  // namespace fastkd::cuda

// Bytes of device memory read and written since the last call.
extern "C" __attribute__((visibility("default"))) void fastkd_traffic(int64_t bytes[2]) {
  std::memcpy(bytes, traffic.bytes, sizeof traffic.bytes);
  traffic = {};
}
