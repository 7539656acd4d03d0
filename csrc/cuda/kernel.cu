// The launchers, and the small kernels. cluster.h has the kernel of the rows.

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "device.h"

#include "cluster.h"
#include "kernel.h"
#include "launch.h"

namespace fastkd::cuda {
namespace {

// Sums the losses in a fixed order, in one block.
__global__ void __launch_bounds__(1024) total_kernel(const __grid_constant__ Call call) {
  __shared__ double parts[1024];
  double mine = 0;
  for (int64_t i = threadIdx.x; i < call.rows; i += blockDim.x) mine += call.loss[i];
  parts[threadIdx.x] = mine;
  for (int step = blockDim.x / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) parts[threadIdx.x] += parts[threadIdx.x + step];
  }
  if (threadIdx.x == 0)
    *call.total = float(parts[0] * call.scale * (call.scale_on_device ? *call.scale_on_device : 1));
}

constexpr int SCALE_THREADS = 256, SCALE_COLUMNS = 16 * SCALE_THREADS;

__global__ void __launch_bounds__(SCALE_THREADS)
    scale_kernel(const __grid_constant__ Call call, const float* factors, int64_t stride, int64_t tiles) {
  const int64_t row = blockIdx.x / tiles;
  const float factor = factors[row * stride];
  if (factor == 1) return;
  const Rows& rows = call.student;
  char* memory = row_address(call, rows, row);
  const int64_t first = blockIdx.x % tiles * SCALE_COLUMNS;
  const int64_t last = first + SCALE_COLUMNS < rows.width ? first + SCALE_COLUMNS : rows.width;
  for (int64_t i = first + threadIdx.x; i < last; i += SCALE_THREADS)
    store_one(memory, rows.dtype, i, factor * load_one(memory, rows.dtype, i));
}

// ---- launching

using Kernel = void (*)(Call);

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

// The number of clusters that a device runs at a time. On the first call for a kernel, layout and device, this also
// requests what a kernel does not get by default: more shared memory, and clusters of 16 blocks.
int clusters_at_a_time(Kernel kernel, const cudaLaunchConfig_t& launch, int ranks, int64_t shared, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, int, int, unsigned, size_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, device, ranks, launch.blockDim.x, launch.dynamicSmemBytes);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
        "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "cudaFuncSetAttribute(NonPortableClusterSizeAllowed)");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "cudaFuncSetAttribute(PreferredSharedMemoryCarveout)");
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch);
  if (error == cudaErrorInvalidClusterSize)
    cudaGetLastError(), clusters = 0;  // the device has no clusters of this size at all
  else
    check(error, "cudaOccupancyMaxActiveClusters");
  return known[key] = clusters;
}

}  // namespace

// The kernel of a divergence for dense rows; null if no dense teacher can have it.
template <class D>
constexpr Kernel dense_kernel() {
  if constexpr (D::dense)
    return kd_kernel<Dense<D>>;
  else
    return nullptr;
}

void kd_rows(Call call, int device, void* stream) {
#define FASTKD_KERNEL(name) dense_kernel<name>(),
  static constexpr Kernel kernels[] = {FASTKD_DIVERGENCES(FASTKD_KERNEL)};
#undef FASTKD_KERNEL
  prepare(call);
  const OnDevice guard(device);
  if (call.rows) {
    const Kernel dense = call.shard.step == Step::statistics ? kd_kernel<DenseShard> : kernels[call.divergence];
    const Kernel kernel = call.ids ? kd_kernel<Sparse> : dense;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cudaLaunchConfig_t launch{};
    launch.stream = static_cast<cudaStream_t>(stream);
    launch.attrs = &cluster;
    launch.numAttrs = 1;
    const int64_t shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const auto clusters_of = [&](const Call& call) {
      cluster.val.clusterDim.x = unsigned(call.ranks);
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
      launch.blockDim = dim3(unsigned(call.threads));
      launch.gridDim = dim3(unsigned(call.ranks));
      launch.dynamicSmemBytes = size_t(shared_bytes(call));
      return clusters_at_a_time(kernel, launch, call.ranks, shared, device);
    };
    const int64_t clusters =
        plan_for_device(call, shared, attribute(cudaDevAttrMultiProcessorCount, device), clusters_of);
    launch.gridDim = dim3(unsigned((call.rows < clusters ? call.rows : clusters) * call.ranks));
    check(cudaLaunchKernelEx(&launch, kernel, call), "launching kd_kernel");
  }
  if (call.shard.step == Step::all) start(total_kernel, 1, 1024, stream, "launching total_kernel", call);
}

void scale_rows(const Call& call, const float* factor, int64_t stride, int device, void* stream) {
  if (!call.rows || !call.student.width) return;
  const OnDevice guard(device);
  const int64_t tiles = (call.student.width + SCALE_COLUMNS - 1) / SCALE_COLUMNS;
  start(scale_kernel, grid(call.rows * tiles), SCALE_THREADS, stream, "launching scale_kernel", call, factor, stride, tiles);
}

std::vector<std::string> divergences() {
#define FASTKD_NAME(name) #name,
  return {FASTKD_DIVERGENCES(FASTKD_NAME)};
#undef FASTKD_NAME
}

std::vector<int> architectures() {
  std::vector<int> found;
  for (const int architecture : {__CUDA_ARCH_LIST__}) found.push_back(architecture / 10);  // 900 is sm_90
  return found;
}

Versions versions() {
  Versions found;
  cudaRuntimeGetVersion(&found.runtime);
  cudaDriverGetVersion(&found.driver);  // works, unlike anything else, if the driver is too old for the runtime
  return found;
}

}  // namespace fastkd::cuda
