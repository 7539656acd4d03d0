// The arguments of the CPU kernels: numbers and pointers, without torch.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../call.h"

namespace fastkd {

// The logits or gradients of all rows: any strides, in elements, over the leading dimensions; stride 1 over the
// columns.
struct Rows {
  char* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t width = 0;  // columns; columns past Call::vocabulary are padding
  std::vector<int64_t> strides;
};

// Measures per row (fastkd/call/measures.py).
constexpr int DENSE_MEASURES = 5, MEASURES = 8;

struct Call : Loss {
  std::vector<int64_t> sizes;  // leading shape
  Rows student, teacher, student_gradient, teacher_gradient;  // gradients: data is null if not wanted
  float* measures = nullptr;  // [rows, DENSE_MEASURES], or [rows, MEASURES] with a sparse teacher; null if not wanted
  int threads = 1;
};

// The loss over the angles among points (angles.cpp).
struct Angles {
  int64_t points = 0;
  const double* distances[2] = {};  // [points, points] of the student and of the teacher
  double delta = 1;                 // of the Huber loss
  double* loss = nullptr;           // sum over all triples of points
  // Null if not wanted, else zeros [points, points]. Filled with a matrix D so that D + D^T is the derivative of the
  // loss by the student's squared distances.
  double* derivatives = nullptr;
  int threads = 1;
};

// What each student of a group learns from the others; fastkd/online/mutual.py explains the choices.
enum class Peers : int { mean = 0, sum = 1, average = 2 };

struct MutualCall {
  int64_t rows = 0, vocabulary = 0;
  std::vector<int64_t> sizes;           // leading shape
  std::vector<Rows> logits, gradients;  // one per student; gradients: data is null if not wanted
  double temperature = 1, peer_weight = 1, scale = 1;
  bool scale_by_temperature = true;
  Peers peers = Peers::mean;

  // [rows], null if not given
  const int64_t* labels = nullptr;
  const float* weight = nullptr;
  const float* scale_on_device = nullptr;  // one element
  int64_t ignore_index = -100;

  float* loss = nullptr;           // [students, rows]
  float* total = nullptr;          // [students]
  float* divergence = nullptr;     // [students, rows], null if not wanted
  float* cross_entropy = nullptr;  // [students, rows], null if not wanted
  int threads = 1;
};

// The terms of a draft model's loss (draft.cpp), in the order of DRAFT_LOSSES in fastkd/call/draft.py.
enum DraftTerm : int { FORWARD_KL, REVERSE_KL, JENSEN_SHANNON, CROSS_ENTROPY, TVD, NLA, LK_HYBRID, DRAFT_TERMS };

struct DraftCall {
  int64_t rows = 0, vocabulary = 0;     // vocabulary: the draft model's
  std::vector<int64_t> sizes;           // leading shape
  Rows student, teacher, gradient;      // gradient: data is null if not wanted
  const int64_t* columns = nullptr;     // [vocabulary]: the teacher's column of each draft token; null: the same column
  double weights[DRAFT_TERMS] = {};
  double eta = 0, scale = 1;

  const float* weight = nullptr;           // [rows], null if not given
  const float* scale_on_device = nullptr;  // one element

  float* loss = nullptr;                // [rows]
  float* total = nullptr;               // one element
  float* acceptance = nullptr;          // [rows], null if not wanted
  float* terms[DRAFT_TERMS] = {};       // [rows] each, null if not wanted
  int threads = 1;
};

// The statistics of rows of logits, or their gradient (logprobs.cpp). One of `statistics` and `coefficients` is given.
struct LogProbs {
  int64_t rows = 0, columns = 0, stride = 0;
  float* logits = nullptr;  // overwritten: with tempered logits, or with the gradient
  double logit_scale = 1, softcap = 0, temperature = 1;
  const float* temperatures = nullptr;  // [rows]; null: `temperature` applies to all rows
  bool centered = false;                // whether the centered sum is wanted
  double* statistics = nullptr;         // [rows, 3]: max, exp_sum, centered sum of exponentials
  const double* maxima = nullptr;       // [rows]
  const double* coefficients = nullptr;  // [rows, 2]
  int threads = 1;
};

// Numbers per row that ranks exchange if the vocabulary is divided among them: statistics with a dense teacher, with a
// label term, with a sparse teacher; and sums.
constexpr int64_t STATISTICS = 15, APART_STATISTICS = 17, TAIL_STATISTICS = 8, SUMS = 4;

// The kernels of each instruction set, from the same source.
#define FASTKD_DECLARE(isa)                  \
  namespace isa {                            \
  void kd_rows(const Call&);                 \
  void topk_rows(const Call&);               \
  void scale_rows(const Call&, const float* factor, int64_t stride); \
  void mutual_rows(const MutualCall&);         \
  std::vector<std::string> divergences(); /* by number */ \
  void angles(const Angles&);                \
  void logprob_rows(const LogProbs&);        \
  void draft_rows(const DraftCall&);         \
  void split_halves(float* matrix, int64_t rows, int64_t columns, int threads); \
  }
FASTKD_DECLARE(baseline)
#if defined(__x86_64__)
FASTKD_DECLARE(avx2)
FASTKD_DECLARE(avx512)
#endif
#undef FASTKD_DECLARE

}  // namespace fastkd
