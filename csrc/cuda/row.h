// One row of student and teacher logits, as the threads of a cluster compute it.
//
// Each block of the cluster holds a slice of the row in shared memory, in the dtype of device memory, in stages. The
// phases of a row, and the headers that compute them:
//
//   open.h         reads the row's options
//   slice.h        copies a slice: bulk copies move whole pieces, threads copy the edges
//   statistics.h   computes a thread's maxima, sums of exponentials and moments; they are merged over threads and blocks
//   finish.h       computes what follows from the statistics of the whole row
//   sums.h         sums phi, g and h if there is no closed form; merged likewise
//   measures.h     compares the two distributions, if the call wants measures
//   gradient.h     writes the value and the gradient: over the logits in shared memory, or directly to device memory
//
// If a divergence has a label term (fastkd/divergences.py, Target), the label's column is excluded from statistics and
// sums. Its contribution to these sums and its own gradient are computed once per row.
//
// These headers hold what one thread computes between two exchanges of data, and how two partial results are merged. No
// thread communicates here; block.h has the exchanges.
//
// The first attempt at a row ignores log 0, as in csrc/cpu/rows.cpp: arithmetic on -inf gives NaN exactly where the
// policy of fastkd/call/log_zero.py matters. A row whose merged sums are not finite is computed again with the policy.
#pragma once
#include "gradient.h"
#include "measures.h"

namespace fastkd::cuda {

// Sets what depends on the whole call, except how a row is divided (plan.h).
inline void prepare(Call& call) {
#define FASTKD_USES_LOGS(name) name::gradient_uses_logs,
  constexpr bool uses_logs[] = {FASTKD_DIVERGENCES(FASTKD_USES_LOGS)};
#undef FASTKD_USES_LOGS
  const bool logs = call.teacher_gradient.data || (call.student_gradient.data && uses_logs[call.divergence]);
  if (call.ids && call.tail == Tail::truncate) call.closed_form = false;  // its sums cover only part of the row
  if (call.shard.step == Step::results && !call.student_gradient.data && !call.teacher_gradient.data)
    call.vocabulary = 0;  // everything else is already known
  call.needs_minima = call.closed_form && (logs || call.shard.step != Step::all);
}

}  // namespace fastkd::cuda
