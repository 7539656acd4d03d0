// The kernel of the measures, and its launcher. They have a file of their own, because kernel.cu takes minutes to
// compile.

#include <cuda_runtime.h>

#include "device.h"

#include "kernel.h"
#include "launch.h"
#include "measures.h"

namespace fastkd::cuda {
namespace {

__global__ void __launch_bounds__(MEASURE_THREADS)
    measure_kernel(const __grid_constant__ Call call, float* measures) {
  __shared__ __align__(16) char memory[MEASURE_BYTES];
  measure(call, measures, memory);
}

}  // namespace

void measure_rows(const Call& call, float* measures, int device, void* stream) {
  if (!call.rows) return;
  const OnDevice guard(device);
  start(measure_kernel, grid(call.rows), MEASURE_THREADS, stream, "launching measure_kernel", call, measures);
}

}  // namespace fastkd::cuda
