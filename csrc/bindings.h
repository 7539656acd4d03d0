// What both extension modules take from Python; fastkd/backends/native.py makes it.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "call.h"

namespace fastkd {

template <class T = float>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Strides = std::vector<int64_t>;
// address, dtype, width, leading strides
using Logits = std::tuple<uintptr_t, int, int64_t, Strides>;
// of the divergence: its number, parameters, whether it is normalized, the weights of its closed form, its degree, what
// becomes of the label's token, and the weight of that
using Definition = std::tuple<int, std::vector<float>, bool, std::vector<double>, double, int, double>;
// ids of a sparse teacher (0: a dense one), how many a row, tail_logprob, tail
using Sparse = std::tuple<uintptr_t, int64_t, uintptr_t, int>;
// step, first, total, processes, rank, statistics, all_statistics, tokens, sums, all_sums
using Shared = std::tuple<int, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
// the scalar options (generated/options.h); vocabulary, scale; temperatures of student and teacher, one per row; a sparse
// teacher; labels, weight, scale on the device; loss, total and the three parts; the divergence; the shard
using Description = std::tuple<PackedOptions, int64_t, double, uintptr_t, uintptr_t, Sparse, uintptr_t, uintptr_t, uintptr_t,
                               uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, Definition, Shared>;

inline int64_t product(const Strides& sizes) {
  int64_t result = 1;
  for (const int64_t size : sizes) result *= size;
  return result;
}

inline void describe(Loss& call, const Strides& sizes, const Description& description) {
  const auto& [options, vocabulary, scale, temperatures, teacher_temperatures, sparse, labels, weight, scale_on_device, loss,
               total, distillation, cross_entropy, student_entropy, definition, shared] = description;
  const auto& [number, params, normalized, closed_form, degree, target, target_weight] = definition;
  call.rows = product(sizes);
  call.vocabulary = vocabulary;
  unpack(call, options);
  call.scale = scale;
  call.student_tempering.per_row = pointer<const float>(temperatures);
  call.teacher_tempering.per_row = pointer<const float>(teacher_temperatures);
  const auto& [ids, tokens, tail_logprob, tail] = sparse;
  call.ids = pointer<const int64_t>(ids);
  call.tokens = tokens;
  call.tail_logprob = pointer<const float>(tail_logprob);
  call.tail = static_cast<Tail>(tail);
  call.labels = pointer<const int64_t>(labels);
  call.weight = pointer<const float>(weight);
  call.scale_on_device = pointer<const float>(scale_on_device);
  call.loss = pointer(loss);
  call.total = pointer(total);
  call.distillation = pointer(distillation);
  call.cross_entropy = pointer(cross_entropy);
  call.student_entropy = pointer(student_entropy);
  call.divergence = number;
  if (params.size() > PARAMETERS) throw std::invalid_argument("a divergence has at most 8 parameters");
  std::copy(params.begin(), params.end(), call.params);
  call.normalized = normalized;
  call.closed_form = !closed_form.empty();
  if (call.closed_form) call.forward = closed_form[0], call.reverse = closed_form[1], call.cross = closed_form[2];
  call.degree = degree;
  call.target = static_cast<Target>(target);
  call.target_weight = target_weight;
  const auto& [step, first, total_columns, processes, rank, statistics, all_statistics, token_logits, sums, all_sums] = shared;
  call.shard = {static_cast<Step>(step), first, total_columns, processes, rank, pointer<double>(statistics),
                pointer<const double>(all_statistics), pointer(token_logits), pointer<double>(sums),
                pointer<const double>(all_sums)};
}

}  // namespace fastkd
