// The launchers of kernel.cu. tests/support/cuda_host.cpp has launchers of the same names for a CPU.
#pragma once
#include <string>
#include <vector>

#include "call.h"

namespace fastkd::cuda {

// Launch on a stream of a device, asynchronously. All throw std::runtime_error with CUDA's message; kd_rows throws
// DoesNotFit (plan.h) if the device cannot hold a row in the shared memory of a cluster.
void kd_rows(Call call, int device, void* stream);
// gradient[row] *= factor[row * stride], in place, where the gradient is call.student. A row whose factor is 1 is not
// touched.
void scale_rows(const Call& call, const float* factor, int64_t stride, int device, void* stream);

std::vector<std::string> divergences();  // by number
std::vector<int> architectures();        // compute capabilities that this build has kernels for, such as 90

// Versions of CUDA, such as 13000 for 13.0: of the runtime in this build, and the newest that the driver supports (0 if
// there is no driver).
struct Versions {
  int runtime = 0, driver = 0;
};
Versions versions();

}  // namespace fastkd::cuda
