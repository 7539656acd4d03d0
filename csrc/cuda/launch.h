// How a launcher launches: errors, the size of a grid, the current device.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace fastkd::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next call would otherwise report
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

unsigned grid(int64_t blocks) {
  if (blocks > std::numeric_limits<int>::max()) throw std::runtime_error("more blocks than a grid has: split the rows");
  return unsigned(blocks);
}

// Launches a kernel and checks the launch. After <<<>>> only cudaGetLastError reports errors, perhaps another call's.
template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void* stream, const char* what,
           const Arguments&... arguments) {
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(blocks);
  launch.blockDim = dim3(threads);
  launch.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&launch, kernel, arguments...), what);
}

// Makes a device current during the lifetime of this object.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace
}  // namespace fastkd::cuda
