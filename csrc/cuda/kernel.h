// The launchers of kernel.cu; tests/support/cuda_host.cpp has others of the same names.
#pragma once
#include <string>
#include <vector>

#include "call.h"

namespace fastkd::cuda {

// On a device and a stream of it, asynchronously. They throw std::runtime_error with CUDA's own words.
void kd_rows(Call call, int device, void* stream);
// gradient[row] *= factor[row * stride], in place; a row whose factor is 1 is not touched. The gradient is call.student.
void scale_rows(const Call& call, const float* factor, int64_t stride, int device, void* stream);

std::vector<std::string> divergences();  // by number
std::vector<int> architectures();        // compute capabilities with kernels in this build, such as 90

}  // namespace fastkd::cuda
