// What crosses from Python to a kernel: plain numbers and pointers, no torch.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../call.h"

namespace fastkd {

// The logits or gradients of all rows: any strides (in elements) over the leading dimensions, a unit stride over V.
struct Rows {
  char* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t width = 0;  // its columns; those past Call::vocabulary are padding
  std::vector<int64_t> strides;
};

struct Call : Loss {
  std::vector<int64_t> sizes;  // leading shape
  Rows student, teacher, student_gradient, teacher_gradient;  // gradients: data is null where not wanted
  int threads = 1;
};

// Of the angles among points (angles.cpp).
struct Angles {
  int64_t points = 0;
  const double* distances[2] = {};  // of the student and of the teacher, [points, points]
  double delta = 1;                 // of Huber's loss
  double* loss = nullptr;           // the sum over triples of three points
  // Null where not wanted, else zeros [points, points], which become a matrix that, with its transpose added, is the
  // derivative of the loss to the student's squared distances.
  double* derivatives = nullptr;
  int threads = 1;
};

// What each student of a group learns from the others, where fastkd/online/mutual.py explains them.
enum class Peers : int { mean = 0, sum = 1, average = 2 };

struct MutualCall {
  int64_t rows = 0, vocabulary = 0;
  std::vector<int64_t> sizes;           // leading shape
  std::vector<Rows> logits, gradients;  // one a student; gradients: data is null where not wanted
  double temperature = 1, peer_weight = 1, scale = 1;
  bool scale_by_temperature = true;
  Peers peers = Peers::mean;

  // [rows], null where not given
  const int64_t* labels = nullptr;
  const float* weight = nullptr;
  const float* scale_on_device = nullptr;  // one element
  int64_t ignore_index = -100;

  float* loss = nullptr;           // [students, rows]
  float* total = nullptr;          // [students]
  float* divergence = nullptr;     // [students, rows], or null where not wanted
  float* cross_entropy = nullptr;  // likewise
  int threads = 1;
};

// Numbers a row that processes exchange where they share a vocabulary: of a dense teacher, of one whose probability of
// the label is compared apart, of a sparse one, and of sums.
constexpr int64_t STATISTICS = 15, APART_STATISTICS = 17, TAIL_STATISTICS = 8, SUMS = 3;

// One for each instruction set, from the same source.
#define FASTKD_DECLARE(isa)                  \
  namespace isa {                            \
  void kd_rows(const Call&);                 \
  void topk_rows(const Call&);               \
  void scale_rows(const Call&, const float* factor, int64_t stride); \
  void mutual_rows(const MutualCall&);         \
  std::vector<std::string> divergences(); /* by number */ \
  void angles(const Angles&);                \
  }
FASTKD_DECLARE(baseline)
#if defined(__x86_64__)
FASTKD_DECLARE(avx2)
FASTKD_DECLARE(avx512)
#endif
#undef FASTKD_DECLARE

}  // namespace fastkd
