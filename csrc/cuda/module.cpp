// fastkd._cuda: the kernels for GPUs with thread-block clusters, behind pybind11. It takes what fastkd._C takes, with a
// device and a stream in place of threads; fastkd/backends/cuda.py is its only caller.

#include <stdexcept>
#include <string>
#include <vector>

#include "../bindings.h"
#include "kernel.h"
#include "plan.h"

namespace py = pybind11;
using namespace fastkd;
using namespace fastkd::cuda;

namespace {

// Sets the leading shape with as few dimensions as possible. Neighbouring dimensions are merged if every tensor can
// step through both with one stride: a contiguous tensor needs one dimension, the shifted view logits[:, :-1] needs
// two.
void set_layout(Call& call, const Strides& sizes, const std::vector<std::pair<Rows*, Strides>>& given) {
  int& dimensions = call.dimensions;
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    if (sizes[axis] == 1) continue;
    bool merges = dimensions > 0;
    for (const auto& [rows, strides] : given)
      merges = merges && (!rows->data || rows->strides[dimensions - 1] == strides[axis] * sizes[axis]);
    if (!merges && dimensions == DIMENSIONS)
      throw std::invalid_argument("logits must have at most 8 leading dimensions that are not contiguous");
    if (!merges) call.sizes[dimensions++] = 1;
    call.sizes[dimensions - 1] *= sizes[axis];
    for (const auto& [rows, strides] : given)
      if (rows->data) rows->strides[dimensions - 1] = strides[axis];
  }
}

void set(Rows& rows, const Logits& logits) {
  rows.data = pointer<char>(std::get<0>(logits));
  rows.dtype = static_cast<Dtype>(std::get<1>(logits));
  rows.width = std::get<2>(logits);
}

// A call with the arguments that Python passes.
Call make_call(const Strides& sizes, const Logits& student, const Logits& teacher, const Logits& student_gradient,
               const Logits& teacher_gradient, const Description& description) {
  Call call;
  describe(call, sizes, description);
  set(call.student, student);
  set(call.teacher, teacher);
  set(call.student_gradient, student_gradient);
  set(call.teacher_gradient, teacher_gradient);
  set_layout(call, sizes,
             {{&call.student, std::get<3>(student)},
              {&call.teacher, std::get<3>(teacher)},
              {&call.student_gradient, std::get<3>(student_gradient)},
              {&call.teacher_gradient, std::get<3>(teacher_gradient)}});
  return call;
}

void launch(const Strides& sizes, const Logits& student, const Logits& teacher, const Logits& student_gradient,
            const Logits& teacher_gradient, const Description& description, uintptr_t measures, int device,
            uintptr_t stream) {
  Call call = make_call(sizes, student, teacher, student_gradient, teacher_gradient, description);
  call.measures = pointer(measures);
  py::gil_scoped_release release;
  kd_rows(call, device, pointer<void>(stream));
}

void scale(const Strides& sizes, const Logits& gradient, uintptr_t factor, int64_t stride, int device,
           uintptr_t stream) {
  Call call;
  call.rows = product(sizes);
  set(call.student, gradient);
  set_layout(call, sizes, {{&call.student, std::get<3>(gradient)}});
  py::gil_scoped_release release;
  scale_rows(call, pointer<const float>(factor), stride, device, pointer<void>(stream));
}

// (blocks per row, threads per block, columns per block) on a device with these limits, or None if a row does not fit on
// chip.
py::object layout_of_a_row(int64_t vocabulary, int student_dtype, int teacher_dtype, bool sparse, int64_t rows,
                           int64_t multiprocessors, int64_t shared) {
  Call call;
  call.rows = rows;
  static const int64_t some_id = 0;
  call.ids = sparse ? &some_id : nullptr;
  call.vocabulary = vocabulary;
  call.student.dtype = static_cast<Dtype>(student_dtype);
  call.teacher.dtype = static_cast<Dtype>(teacher_dtype);
  if (!plan(call, shared)) return py::none();
  widen(call, multiprocessors);
  return py::make_tuple(call.ranks, call.threads, call.slice);
}

}  // namespace

#ifndef FASTKD_MODULE
#define FASTKD_MODULE _cuda
#endif

PYBIND11_MODULE(FASTKD_MODULE, module) {
  module.doc() = "CUDA kernels of fastkd; called by fastkd.backends.cuda.";
  module.def("kd_rows", &launch);
  module.def("scale_rows", &scale);
  module.def("plan", &layout_of_a_row, py::arg("vocabulary"), py::arg("student_dtype"), py::arg("teacher_dtype"), py::arg("sparse"), py::arg("rows") = 1, py::arg("multiprocessors") = 0,
             py::arg("shared") = MOST_SHARED, "(blocks per row, threads per block, columns per block); None if a row does not fit on chip.");
  module.attr("OPTION_NAMES") = OPTION_NAMES;
  module.attr("STATISTICS") = STATISTICS;
  module.attr("SUMS") = SUMS;
  module.def("divergences", &divergences, "Names of the compiled definitions, by number.");
  module.def("architectures", &architectures, "Compute capabilities that have kernels, such as 90.");
  module.def("versions", [] { return py::make_tuple(versions().runtime, versions().driver); },
             "CUDA versions of the runtime in this build and of the driver, such as 13000; 0 without a driver.");
  py::register_local_exception<DoesNotFit>(module, "DoesNotFitError");
}
