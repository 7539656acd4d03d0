// The launchers of kernel.cu. tests/support/cuda_host.cpp has launchers of the same names for a CPU.
#pragma once
#include <string>
#include <vector>

#include "call.h"

namespace fastkd::cuda {

// Launch on a stream of a device, asynchronously. Both throw std::runtime_error with CUDA's message.
void kd_rows(Call call, int device, void* stream);
// gradient[row] *= factor[row * stride], in place, where the gradient is call.student. A row whose factor is 1 is not
// touched.
void scale_rows(const Call& call, const float* factor, int64_t stride, int device, void* stream);

std::vector<std::string> divergences();  // by number
std::vector<int> architectures();        // compute capabilities that this build has kernels for, such as 90

}  // namespace fastkd::cuda
