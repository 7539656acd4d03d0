// What a loss over rows is, apart from where its logits lie: plain numbers and addresses, for the kernels of CPUs and GPUs.
#pragma once
#include <cstdint>

#include "generated/options.h"

namespace fastkd {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int PARAMETERS = 8;  // of a divergence, at most

// What is done to the logits of one side before the softmax. A softcap of 0 is none.
struct Tempering : SideOptions {
  const float* per_row = nullptr;  // temperatures [rows], or null
};

// What becomes of the tokens a sparse teacher does not name; fastkd/teachers/__init__.py explains them.
enum class Tail : int { bucket = 0, renormalize = 1, renormalize_teacher = 2, truncate = 3 };

// What becomes of the label's token where a divergence compares the others by themselves; fastkd/divergences.py, Target.
enum class Target : int { none = 0, binary = 1, label = 2 };

// The columns that a process has of a vocabulary that several share; fastkd/call/contract.py names the steps.
enum class Step : int { all = 0, statistics = 1, sums = 2, results = 3 };

struct Shard {
  Step step = Step::all;
  int64_t first = 0, total = 0;             // the token of column 0; columns of all processes
  int64_t processes = 1, rank = 0;
  double* statistics = nullptr;             // [rows, STATISTICS]: of this process, written
  const double* all_statistics = nullptr;   // [processes, rows, STATISTICS]
  float* tokens = nullptr;                  // [rows, tokens] of a sparse teacher: written, then read once summed
  double* sums = nullptr;                   // [rows, SUMS], written
  const double* all_sums = nullptr;         // [processes, rows, SUMS]
};

struct Loss : ScalarOptions {
  int64_t rows = 0, vocabulary = 0;
  Tempering student_tempering, teacher_tempering;

  // A sparse teacher: ids [rows, tokens], -1 for padding; then the teacher's columns are their log-probabilities.
  const int64_t* ids = nullptr;
  int64_t tokens = 0;
  const float* tail_logprob = nullptr;  // [rows], of the other tokens; null: they have no probability
  Tail tail = Tail::bucket;

  // [rows], null where not given
  const int64_t* labels = nullptr;
  const float* weight = nullptr;
  const float* scale_on_device = nullptr;  // one element

  // [rows], null where not wanted; loss and total always
  float* loss = nullptr;
  float* total = nullptr;  // one element
  float* distillation = nullptr;
  float* cross_entropy = nullptr;
  float* student_entropy = nullptr;

  int divergence = 0;  // index into FASTKD_DIVERGENCES
  float params[PARAMETERS] = {};
  bool normalized = true, closed_form = false;
  double forward = 0, reverse = 0, cross = 0;  // weights of the closed form
  double degree = 0;
  Target target = Target::none;
  double target_weight = 0;

  double scale = 1;  // multiplies the total and every gradient
  Shard shard;
};

}  // namespace fastkd
