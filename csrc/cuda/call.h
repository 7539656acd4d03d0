// The argument of the CUDA kernels: numbers and addresses, passed by value.
#pragma once
#include <cstdint>

#include "../call.h"

namespace fastkd::cuda {

constexpr int DIMENSIONS = 8;
constexpr int STATISTICS = 22, SUMS = 4;  // numbers per row that ranks exchange: shard.h

// The logits or gradients of all rows: strides in elements over the leading dimensions, stride 1 over the columns.
struct Rows {
  char* data = nullptr;  // null: not given
  Dtype dtype = Dtype::f32;
  int64_t width = 0;  // columns; columns past Call::vocabulary are padding
  int64_t strides[DIMENSIONS] = {};
};

struct Call : Loss {
  int dimensions = 0;
  int64_t sizes[DIMENSIONS] = {};  // the leading shape
  Rows student, teacher, student_gradient, teacher_gradient;
  float* measures = nullptr;  // [rows, MEASURES] of dense rows (measures.h), or null

  // Set by plan (plan.h) and prepare (row.h): how a row is divided among a cluster, whether its least logits are needed.
  int ranks = 1;            // blocks per row
  int threads = 1;          // threads per block
  int slice = 0, stage = 0;  // columns per block, and per stage of a block
  bool needs_minima = false;
};

}  // namespace fastkd::cuda
