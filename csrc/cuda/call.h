// What crosses from the host to the kernels on a GPU: plain numbers and addresses, passed by value.
#pragma once
#include <cstdint>

namespace fastkd::cuda {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int DIMENSIONS = 8, PARAMETERS = 8;

// The logits or gradients of all rows: strides in elements over the leading dimensions, a unit stride over the columns.
struct Rows {
  char* data = nullptr;  // null: not given
  Dtype dtype = Dtype::f32;
  int64_t width = 0;  // columns; those past Call::vocabulary are padding
  int64_t strides[DIMENSIONS] = {};
};

// One side, student or teacher: what is done to its logits before the softmax.
struct Tempering {
  float temperature = 1;
  const float* per_row = nullptr;  // [rows] or null
  float logit_scale = 1;
  float softcap = 0;  // 0: none
};

struct Call {
  int64_t rows = 0, vocabulary = 0;
  int dimensions = 0;
  int64_t sizes[DIMENSIONS] = {};  // the leading shape
  Rows student, teacher, student_gradient, teacher_gradient;
  Tempering student_tempering, teacher_tempering;

  // [rows], null where not given
  const int64_t* labels = nullptr;
  const float* weight = nullptr;
  const float* scale_on_device = nullptr;  // one element

  // [rows], null where not wanted; loss always
  float* loss = nullptr;
  float* total = nullptr;  // one element
  float* distillation = nullptr;
  float* cross_entropy = nullptr;
  float* student_entropy = nullptr;

  int divergence = 0;  // index into FASTKD_DIVERGENCES
  float params[PARAMETERS] = {};
  bool normalized = true, closed_form = false;
  float forward = 0, reverse = 0, cross = 0;  // weights of the closed form
  float degree = 0;

  double alpha = 1, label_smoothing = 0, scale = 1;
  bool scale_by_temperature = true;
  int64_t ignore_index = -100;

  // Filled in by prepare (row.h): how a row is spread over a cluster, and whether its lowest logits are of interest.
  int ranks = 1, threads = 1, slice = 0;  // blocks, threads a block, columns a block
  bool watches_lows = false;
};

}  // namespace fastkd::cuda
