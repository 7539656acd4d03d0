// fastkd._C: the CPU kernels behind pybind11. Tensors are passed as addresses, shapes and strides, so this module
// neither includes nor links torch. fastkd/backends/cpu.py is its only caller, with arguments that fastkd.functional
// has validated.

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/kernel.h"
#include "memory.h"

namespace py = pybind11;

namespace {

struct InstructionSet {
  std::string name;
  decltype(&fastkd::baseline::kd_rows) kd_rows;
  decltype(&fastkd::baseline::topk_rows) topk_rows;
  decltype(&fastkd::baseline::scale_rows) scale_rows;
  decltype(&fastkd::baseline::mutual_rows) mutual_rows;
  decltype(&fastkd::baseline::angles) angles;
  decltype(&fastkd::baseline::logprob_rows) logprob_rows;
  decltype(&fastkd::baseline::draft_rows) draft_rows;
  decltype(&fastkd::baseline::split_halves) split_halves;
};
#define FASTKD_SET(isa)                                                                                    \
  InstructionSet{#isa, fastkd::isa::kd_rows, fastkd::isa::topk_rows, fastkd::isa::scale_rows,             \
                 fastkd::isa::mutual_rows, fastkd::isa::angles,                                      \
                 fastkd::isa::logprob_rows, fastkd::isa::draft_rows,                              \
                 fastkd::isa::split_halves}

// The instruction sets that this processor supports, best first.
std::vector<InstructionSet> supported() {
  std::vector<InstructionSet> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    sets.push_back(FASTKD_SET(avx512));
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    sets.push_back(FASTKD_SET(avx2));
#endif
  sets.push_back(FASTKD_SET(baseline));
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

using fastkd::Description, fastkd::Logits, fastkd::Strides, fastkd::pointer, fastkd::product;

fastkd::Rows rows(const Logits& logits) {
  const auto& [address, dtype, width, strides] = logits;
  return {pointer<char>(address), static_cast<fastkd::Dtype>(dtype), width, strides};
}

void kd_rows(Strides sizes, const Logits& student, const Logits& teacher, const Logits& student_gradient,
             const Logits& teacher_gradient, const Description& description, uintptr_t measures, int threads) {
  fastkd::Call call;
  describe(call, sizes, description);
  call.sizes = std::move(sizes);
  call.student = rows(student);
  call.teacher = rows(teacher);
  call.student_gradient = rows(student_gradient);
  call.teacher_gradient = rows(teacher_gradient);
  call.measures = pointer(measures);
  call.threads = threads;
  py::gil_scoped_release release;
  call.ids ? chosen->topk_rows(call) : chosen->kd_rows(call);
}

void scale_rows(Strides sizes, const Logits& gradient, uintptr_t factor, int64_t stride, int threads) {
  fastkd::Call call;
  call.rows = product(sizes);
  call.sizes = std::move(sizes);
  call.student_gradient = rows(gradient);
  call.threads = threads;
  py::gil_scoped_release release;
  chosen->scale_rows(call, pointer<const float>(factor), stride);
}

void angles(int64_t points, uintptr_t student, uintptr_t teacher, double delta, uintptr_t loss, uintptr_t derivatives,
            int threads) {
  const fastkd::Angles call{points, {pointer<const double>(student), pointer<const double>(teacher)}, delta,
                            pointer<double>(loss), pointer<double>(derivatives), threads};
  py::gil_scoped_release release;
  chosen->angles(call);
}

// logit_scale, softcap, temperature, temperatures of rows, whether the centered sum is wanted
using Tempering = std::tuple<double, double, double, uintptr_t, bool>;

void logprob_rows(int64_t row_count, int64_t columns, int64_t stride, uintptr_t logits, const Tempering& tempering,
                  uintptr_t statistics, uintptr_t maxima, uintptr_t coefficients, int threads) {
  fastkd::LogProbs call;
  call.rows = row_count;
  call.columns = columns;
  call.stride = stride;
  call.logits = pointer(logits);
  uintptr_t temperatures;
  std::tie(call.logit_scale, call.softcap, call.temperature, temperatures, call.centered) = tempering;
  call.temperatures = pointer<const float>(temperatures);
  call.statistics = pointer<double>(statistics);
  call.maxima = pointer<const double>(maxima);
  call.coefficients = pointer<const double>(coefficients);
  call.threads = threads;
  py::gil_scoped_release release;
  chosen->logprob_rows(call);
}

void split_halves(uintptr_t matrix, int64_t row_count, int64_t columns, int threads) {
  py::gil_scoped_release release;
  chosen->split_halves(pointer(matrix), row_count, columns, threads);
}

// temperature, weight of the peers' term, scale, whether T^2 multiplies, peers; labels, ignore_index, weight, scale on
// the device; loss, total and the two parts
using Mutual = std::tuple<double, double, double, bool, int, uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                          uintptr_t, uintptr_t>;

void mutual_rows(Strides sizes, const std::vector<Logits>& logits, const std::vector<Logits>& gradients,
                 const Mutual& description, int threads) {
  const auto& [temperature, peer_weight, scale, scale_by_temperature, peers, labels, ignore_index, weight, scale_on_device,
               loss, total, divergence, cross_entropy] = description;
  fastkd::MutualCall call;
  call.rows = product(sizes);
  call.vocabulary = std::get<2>(logits.front());
  call.sizes = std::move(sizes);
  for (const auto& student : logits) call.logits.push_back(rows(student));
  for (const auto& gradient : gradients) call.gradients.push_back(rows(gradient));
  call.temperature = temperature;
  call.peer_weight = peer_weight;
  call.scale = scale;
  call.scale_by_temperature = scale_by_temperature;
  call.peers = static_cast<fastkd::Peers>(peers);
  call.labels = pointer<const int64_t>(labels);
  call.ignore_index = ignore_index;
  call.weight = pointer<const float>(weight);
  call.scale_on_device = pointer<const float>(scale_on_device);
  call.loss = pointer(loss);
  call.total = pointer(total);
  call.divergence = pointer(divergence);
  call.cross_entropy = pointer(cross_entropy);
  call.threads = threads;
  py::gil_scoped_release release;
  chosen->mutual_rows(call);
}

// weights of the terms, eta, scale; weight of rows, scale on the device; loss, acceptance and the terms
using Draft = std::tuple<std::vector<double>, double, double, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                         std::vector<uintptr_t>>;

void draft_rows(Strides sizes, const Logits& student, const Logits& teacher, const Logits& gradient, uintptr_t columns,
                const Draft& description, int threads) {
  const auto& [weights, eta, scale, weight, scale_on_device, loss, acceptance, terms] = description;
  if (weights.size() != fastkd::DRAFT_TERMS || terms.size() != fastkd::DRAFT_TERMS)
    throw std::invalid_argument("weights and terms must have one entry per term");
  fastkd::DraftCall call;
  call.rows = product(sizes);
  call.vocabulary = std::get<2>(student);
  call.sizes = std::move(sizes);
  call.student = rows(student);
  call.teacher = rows(teacher);
  call.gradient = rows(gradient);
  call.columns = pointer<const int64_t>(columns);
  std::copy(weights.begin(), weights.end(), call.weights);
  call.eta = eta;
  call.scale = scale;
  call.weight = pointer<const float>(weight);
  call.scale_on_device = pointer<const float>(scale_on_device);
  call.loss = pointer(loss);
  call.acceptance = pointer(acceptance);
  for (size_t k = 0; k < terms.size(); ++k) call.terms[k] = pointer(terms[k]);
  call.threads = threads;
  py::gil_scoped_release release;
  chosen->draft_rows(call);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native CPU kernels of fastkd; called by fastkd.backends.cpu.";
  module.def("kd_rows", &kd_rows);
  module.def("scale_rows", &scale_rows);
  module.def("angles", &angles);
  module.def("mutual_rows", &mutual_rows);
  module.def("logprob_rows", &logprob_rows);
  module.def("draft_rows", &draft_rows);
  module.def("split_halves", &split_halves);
  module.def("new_output", &fastkd::new_output);
  module.def("idle_output_bytes", &fastkd::idle_output_bytes, "Bytes of the buffers kept for later outputs, which the system may reclaim.");
  module.def("release_idle_outputs", &fastkd::release_idle_outputs, "Unmap the buffers kept for later outputs.");
  module.attr("OPTION_NAMES") = fastkd::OPTION_NAMES;
  module.attr("STATISTICS") = fastkd::STATISTICS;
  module.attr("APART_STATISTICS") = fastkd::APART_STATISTICS;
  module.attr("TAIL_STATISTICS") = fastkd::TAIL_STATISTICS;
  module.attr("SUMS") = fastkd::SUMS;
  module.attr("DENSE_MEASURES") = fastkd::DENSE_MEASURES;
  module.attr("MEASURES") = fastkd::MEASURES;
  module.def("divergences", &fastkd::baseline::divergences, "Names of the compiled definitions, by number.");
  module.def("instruction_sets", &instruction_sets, "Instruction sets that this processor supports, best first.");
  module.def("instruction_set", [] { return chosen->name; }, "The instruction set in use.");
  module.def("use_instruction_set", &use_instruction_set, py::arg("name"), "Use another instruction set; for tests and benchmarks.");
}
