// What crosses from the host to the kernels on a GPU: plain numbers and addresses, passed by value.
#pragma once
#include <cstdint>

#include "../call.h"

namespace fastkd::cuda {

constexpr int DIMENSIONS = 8;
constexpr int STATISTICS = 22, SUMS = 3;  // numbers a row that processes exchange: shard.h

// The logits or gradients of all rows: strides in elements over the leading dimensions, a unit stride over the columns.
struct Rows {
  char* data = nullptr;  // null: not given
  Dtype dtype = Dtype::f32;
  int64_t width = 0;  // columns; those past Call::vocabulary are padding
  int64_t strides[DIMENSIONS] = {};
};

struct Call : Loss {
  int dimensions = 0;
  int64_t sizes[DIMENSIONS] = {};  // the leading shape
  Rows student, teacher, student_gradient, teacher_gradient;

  // Filled in by prepare (row.h): how a row is spread over a cluster, and whether its lowest logits are of interest.
  int ranks = 1, threads = 1, slice = 0, stage = 0;  // blocks; threads, columns, columns of a stage of a block
  bool needs_minima = false;
};

}  // namespace fastkd::cuda
