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
// temperature, one per row, logit scale, softcap
using Numbers = std::tuple<double, uintptr_t, double, double>;
// of the divergence: its number, parameters, whether it is normalized, the weights of its closed form, its degree, what
// becomes of the label's token, and the weight of that
using Definition = std::tuple<int, std::vector<float>, bool, std::vector<double>, double, int, double>;
// ids of a sparse teacher (0: a dense one), how many a row, tail_logprob, tail
using Sparse = std::tuple<uintptr_t, int64_t, uintptr_t, int>;
// step, first, total, processes, rank, statistics, all_statistics, tokens, sums, all_sums
using Shared = std::tuple<int, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
// vocabulary; student, teacher; a sparse teacher; labels, weight, scale on the device; loss, total and the three parts;
// the divergence; alpha, label smoothing, scale, whether T^2 multiplies, ignore_index; the shard
using Description = std::tuple<int64_t, Numbers, Numbers, Sparse, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                               uintptr_t, uintptr_t, uintptr_t, uintptr_t, Definition, double, double, double, bool, int64_t, Shared>;

inline Tempering tempering(const Numbers& values) {
  const auto& [temperature, per_row, logit_scale, softcap] = values;
  return {temperature, pointer<const float>(per_row), logit_scale, softcap};
}

inline int64_t product(const Strides& sizes) {
  int64_t result = 1;
  for (const int64_t size : sizes) result *= size;
  return result;
}

inline void describe(Loss& call, const Strides& sizes, const Description& description) {
  const auto& [vocabulary, student, teacher, sparse, labels, weight, scale_on_device, loss, total, distillation, cross_entropy,
               student_entropy, definition, alpha, label_smoothing, scale, scale_by_temperature, ignore_index, shared] =
      description;
  const auto& [number, params, normalized, closed_form, degree, target, target_weight] = definition;
  call.rows = product(sizes);
  call.vocabulary = vocabulary;
  call.student_tempering = tempering(student);
  call.teacher_tempering = tempering(teacher);
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
  call.alpha = alpha;
  call.label_smoothing = label_smoothing;
  call.scale = scale;
  call.scale_by_temperature = scale_by_temperature;
  call.ignore_index = ignore_index;
  const auto& [step, first, total_columns, processes, rank, statistics, all_statistics, token_logits, sums, all_sums] = shared;
  call.shard = {static_cast<Step>(step), first, total_columns, processes, rank, pointer<double>(statistics),
                pointer<const double>(all_statistics), pointer(token_logits), pointer<double>(sums),
                pointer<const double>(all_sums)};
}

}  // namespace fastkd
