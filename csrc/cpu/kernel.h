// What crosses from Python to a kernel: plain numbers and pointers, no torch.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace fastkd {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// The logits or gradients of all rows: any strides (in elements) over the leading dimensions, a unit stride over V.
struct Rows {
  char* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t width = 0;  // its columns; those past Call::vocabulary are padding
  std::vector<int64_t> strides;
};

// One side, student or teacher: what is done to its logits before the softmax.
struct Tempering {
  double temperature = 1;
  const float* per_row = nullptr;  // [rows] or null
  double logit_scale = 1;
  double softcap = 0;  // 0: none
};

// What becomes of the tokens a sparse teacher does not name; fastkd/teachers.py explains them.
enum class Tail : int { bucket = 0, renormalize = 1, renormalize_teacher = 2, truncate = 3 };

struct Call {
  std::vector<int64_t> sizes;  // leading shape
  int64_t rows = 0, vocabulary = 0;
  Rows student, teacher, student_gradient, teacher_gradient;  // gradients: data is null where not wanted
  Tempering student_tempering, teacher_tempering;

  // A sparse teacher: ids [rows, tokens], -1 for padding; then the teacher's columns are their log-probabilities.
  const int64_t* ids = nullptr;
  int64_t tokens = 0;
  const float* tail_logprob = nullptr;  // [rows] or null
  Tail tail = Tail::bucket;

  // [rows], null where not given
  const int64_t* labels = nullptr;
  const float* weight = nullptr;
  const float* scale_on_device = nullptr;  // one element

  // [rows], null where not wanted; loss and total always
  float* loss = nullptr;
  float* total = nullptr;
  float* distillation = nullptr;
  float* cross_entropy = nullptr;
  float* student_entropy = nullptr;

  int divergence = 0;  // index into FASTKD_DIVERGENCES
  std::vector<float> params;
  bool normalized = true, closed_form = false;
  double forward = 0, reverse = 0, cross = 0;  // weights of the closed form
  double degree = 0;

  double alpha = 1, label_smoothing = 0, scale = 1;
  bool scale_by_temperature = true;
  int64_t ignore_index = -100;
  int threads = 1;
};

// One for each instruction set, from the same source.
#define FASTKD_DECLARE(isa)                  \
  namespace isa {                            \
  void kd_rows(const Call&);                 \
  void topk_rows(const Call&);               \
  void scale_rows(const Call&, const float* factor, int64_t stride); \
  std::vector<std::string> divergences(); /* by number */ \
  }
FASTKD_DECLARE(baseline)
#if defined(__x86_64__)
FASTKD_DECLARE(avx2)
FASTKD_DECLARE(avx512)
#endif
#undef FASTKD_DECLARE

}  // namespace fastkd
