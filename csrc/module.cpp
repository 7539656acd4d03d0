// fastkd._C: the native kernels behind pybind11. Tensors arrive as addresses, shapes and strides, so that this module
// neither includes nor links torch; fastkd/cpu.py is its only caller, and fastkd.functional has validated everything.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernel.h"
#include "memory.h"

namespace py = pybind11;

namespace {

struct InstructionSet {
  std::string name;
  void (*kd_rows)(const fastkd::Call&);
  void (*topk_rows)(const fastkd::Call&);
  void (*scale_rows)(const fastkd::Call&, const float*, int64_t);
};

// What this processor runs, best first.
std::vector<InstructionSet> supported() {
  std::vector<InstructionSet> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    sets.push_back({"avx512", fastkd::avx512::kd_rows, fastkd::avx512::topk_rows, fastkd::avx512::scale_rows});
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    sets.push_back({"avx2", fastkd::avx2::kd_rows, fastkd::avx2::topk_rows, fastkd::avx2::scale_rows});
#endif
  sets.push_back({"baseline", fastkd::baseline::kd_rows, fastkd::baseline::topk_rows, fastkd::baseline::scale_rows});
  return sets;
}

const std::vector<InstructionSet> sets = supported();
const InstructionSet* chosen = &sets.front();

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& set : sets) names.push_back(set.name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const auto& set : sets)
    if (set.name == name) {
      chosen = &set;
      return;
    }
  std::string known;
  for (const auto& set : sets) known += (known.empty() ? "" : ", ") + set.name;
  throw py::value_error("instruction set must be one of " + known + "; got " + name);
}

template <class T = float>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Strides = std::vector<int64_t>;
using Logits = std::tuple<uintptr_t, int, int64_t, Strides>;    // address, dtype, width, leading strides
using Tempering = std::tuple<double, uintptr_t, double, double>;  // temperature, per row, logit scale, softcap
using Sparse = std::tuple<uintptr_t, int64_t, uintptr_t, int>;  // ids (0: a dense teacher), K, tail_logprob, tail

fastkd::Rows rows(const Logits& logits) {
  const auto& [address, dtype, width, strides] = logits;
  return {pointer<char>(address), static_cast<fastkd::Dtype>(dtype), width, strides};
}

fastkd::Tempering tempering(const Tempering& values) {
  const auto& [temperature, per_row, logit_scale, softcap] = values;
  return {temperature, pointer<const float>(per_row), logit_scale, softcap};
}

int64_t product(const std::vector<int64_t>& sizes) {
  int64_t result = 1;
  for (int64_t size : sizes) result *= size;
  return result;
}

void kd_rows(std::vector<int64_t> sizes, int64_t vocabulary, const Logits& student, const Logits& teacher,
             const Logits& student_gradient, const Logits& teacher_gradient, const Tempering& student_tempering,
             const Tempering& teacher_tempering, uintptr_t labels, uintptr_t weight, uintptr_t scale_on_device,
             uintptr_t loss, uintptr_t total, uintptr_t distillation, uintptr_t cross_entropy,
             uintptr_t student_entropy, int divergence, std::vector<float> params, bool normalized,
             const std::vector<double>& closed_form, double degree, double alpha, double label_smoothing, double scale,
             bool scale_by_temperature, int64_t ignore_index, const Sparse& sparse, int threads) {
  fastkd::Call call;
  call.rows = product(sizes);
  call.sizes = std::move(sizes);
  call.vocabulary = vocabulary;
  call.student = rows(student);
  call.teacher = rows(teacher);
  call.student_gradient = rows(student_gradient);
  call.teacher_gradient = rows(teacher_gradient);
  call.student_tempering = tempering(student_tempering);
  call.teacher_tempering = tempering(teacher_tempering);
  const auto& [ids, tokens, tail_logprob, tail] = sparse;
  call.ids = pointer<const int64_t>(ids);
  call.tokens = tokens;
  call.tail_logprob = pointer<const float>(tail_logprob);
  call.tail = static_cast<fastkd::Tail>(tail);
  call.labels = pointer<const int64_t>(labels);
  call.weight = pointer<const float>(weight);
  call.scale_on_device = pointer<const float>(scale_on_device);
  call.loss = pointer(loss);
  call.total = pointer(total);
  call.distillation = pointer(distillation);
  call.cross_entropy = pointer(cross_entropy);
  call.student_entropy = pointer(student_entropy);
  call.divergence = divergence;
  call.params = std::move(params);
  call.normalized = normalized;
  call.closed_form = !closed_form.empty();
  if (call.closed_form) call.forward = closed_form[0], call.reverse = closed_form[1], call.cross = closed_form[2];
  call.degree = degree;
  call.alpha = alpha;
  call.label_smoothing = label_smoothing;
  call.scale = scale;
  call.scale_by_temperature = scale_by_temperature;
  call.ignore_index = ignore_index;
  call.threads = threads;
  py::gil_scoped_release release;
  call.ids ? chosen->topk_rows(call) : chosen->kd_rows(call);
}

void scale_rows(std::vector<int64_t> sizes, const Logits& gradient, uintptr_t factor, int64_t stride, int threads) {
  fastkd::Call call;
  call.rows = product(sizes);
  call.sizes = std::move(sizes);
  call.student_gradient = rows(gradient);
  call.threads = threads;
  py::gil_scoped_release release;
  chosen->scale_rows(call, pointer<const float>(factor), stride);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native CPU kernels of fastkd; called by fastkd.cpu.";
  module.def("kd_rows", &kd_rows);
  module.def("scale_rows", &scale_rows);
  module.def("new_output", &fastkd::new_output);
  module.def("idle_output_bytes", &fastkd::idle_output_bytes, "Bytes kept for later outputs, free to the system.");
  module.def("release_idle_outputs", &fastkd::release_idle_outputs, "Unmap them.");
  module.def("divergences", &fastkd::baseline::divergences, "The names of the definitions that are compiled in, by number.");
  module.def("instruction_sets", &instruction_sets, "The instruction sets this processor has kernels for, best first.");
  module.def("instruction_set", [] { return chosen->name; }, "The one in use.");
  module.def("use_instruction_set", &use_instruction_set, py::arg("name"), "Use another one; for tests and benchmarks.");
}
