// The launchers of csrc/cuda/kernel.cu for a machine without a GPU: the same rows by the same clusters, which
// tests/support/cuda_host.h plays on a CPU, or which tests/support/ptx/cuda.py runs in the PTX that nvcc makes.

#include "cuda_host.h"

#include "cuda/cluster.h"
#include "cuda/kernel.h"

namespace fastkd::cuda {
namespace {

// The limits of the device that is emulated.
struct Device {
  int most_ranks = MOST_RANKS;
  int64_t shared = MOST_SHARED;
} device;

// A launch of one of kernel.cu's kernels: its argument, and the further ones of scale_kernel.
struct Launch {
  const char* kernel;
  const Call* call;
  int64_t call_bytes;
  struct {
    const float* factors;
    int64_t stride, tiles;
  } scale;
  int64_t blocks, ranks, threads, shared_bytes;
};

// Where it is set, this runs all launches. It returns false after writing why a launch failed into `error`.
constexpr int ERROR_BYTES = 4096;
bool (*launcher)(const Launch* launch, char* error) = nullptr;

void hand_over(const Launch& launch) {
  char error[ERROR_BYTES] = {};
  if (!launcher(&launch, error)) throw std::runtime_error(error);
}

void hand_over_rows(const Call& call, int64_t clusters) {
#define FASTKD_NAME(name) #name,
  static constexpr const char* names[] = {FASTKD_DIVERGENCES(FASTKD_NAME)};
#undef FASTKD_NAME
  const char* kernel =
      call.ids ? "Sparse" : call.shard.step == Step::statistics ? "DenseShard" : names[call.divergence];
  if (clusters) hand_over({kernel, &call, sizeof(Call), {}, clusters * call.ranks, call.ranks, call.threads, shared_bytes(call)});
  if (call.shard.step == Step::all) hand_over({"total_kernel", &call, sizeof(Call), {}, 1, 1, 1024, 0});
}

void hand_over_scale(const Call& call, const float* factors, int64_t stride) {
  constexpr int THREADS = 256, COLUMNS = 16 * THREADS;  // as in kernel.cu
  const int64_t tiles = (call.student.width + COLUMNS - 1) / COLUMNS;
  if (call.rows && tiles)
    hand_over({"scale_kernel", &call, sizeof(Call), {factors, stride, tiles}, call.rows * tiles, 1, THREADS, 0});
}

}  // namespace

void kd_rows(Call call, int ranks, void*) {  // a device's number serves to ask for more blocks a row than plan() takes
  prepare(call);
  plan_for_device(call, device.shared, 0, [](const Call& call) { return call.ranks <= device.most_ranks; });
  if (call.ranks < ranks) spread_over(call, ranks);
#define FASTKD_ROWS(name) kd_kernel<Dense<name>>,
  static constexpr void (*kernels[])(Call) = {FASTKD_DIVERGENCES(FASTKD_ROWS)};
#undef FASTKD_ROWS
  const auto dense = call.shard.step == Step::statistics ? kd_kernel<DenseShard> : kernels[call.divergence];
  const auto kernel = call.ids ? kd_kernel<Sparse> : dense;
  auto& machine = host::machine;
  machine.ranks = call.ranks;
  machine.threads = call.threads;
  machine.clusters = call.rows < 2 ? call.rows : 2;  // each has several rows, one after the other
  if (launcher) return hand_over_rows(call, machine.clusters);
  for (machine.cluster = 0; machine.cluster < machine.clusters; ++machine.cluster)
    machine.run(shared_bytes(call), [&](char*) { kernel(call); });
  if (call.shard.step != Step::all) return;
  double total = 0;
  for (int64_t i = 0; i < call.rows; ++i) total += call.loss[i];
  *call.total = float(total * call.scale * (call.scale_on_device ? *call.scale_on_device : 1));
}

void scale_rows(const Call& call, const float* factor, int64_t stride, int, void*) {
  if (launcher) return hand_over_scale(call, factor, stride);
  for (int64_t row = 0; row < call.rows; ++row)
    for (int64_t column = 0; column < call.student.width; ++column) {
      char* memory = row_address(call, call.student, row);
      store_one(memory, call.student.dtype, column,
                factor[row * stride] * load_one(memory, call.student.dtype, column));
    }
}

std::vector<std::string> divergences() {
#define FASTKD_NAME(name) #name,
  return {FASTKD_DIVERGENCES(FASTKD_NAME)};
#undef FASTKD_NAME
}

std::vector<int> architectures() { return {0}; }  // what the tests say of a CPU
Versions versions() { return {}; }

}  // namespace fastkd::cuda

extern "C" __attribute__((visibility("default"))) void fastkd_device(int most_ranks, int64_t shared) {
  fastkd::cuda::device = {most_ranks, shared};
}

// Bytes of device memory read and written since the last call.
extern "C" __attribute__((visibility("default"))) void fastkd_traffic(int64_t bytes[2]) {
  std::memcpy(bytes, traffic.bytes, sizeof traffic.bytes);
  traffic = {};
}

// Lets a function run all later launches; null: cuda_host.h does again.
extern "C" __attribute__((visibility("default"))) void fastkd_launch_with(
    bool (*launcher)(const fastkd::cuda::Launch*, char*)) {
  fastkd::cuda::launcher = launcher;
}
