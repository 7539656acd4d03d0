// The launchers of csrc/cuda/kernel.cu for a machine without a GPU: the same rows by the same clusters, which
// tests/support/cuda_host.h plays on a CPU.

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

template <class Kind>
void rows_of(const Call& call, char* memory) {
  run<Kind>(call, memory);
}

}  // namespace

void kd_rows(Call call, int ranks, void*) {  // a device's number serves to ask for more blocks a row than plan() takes
  prepare(call);
  plan_for_device(call, device.shared, 0, [](const Call& call) { return call.ranks <= device.most_ranks; });
  if (call.ranks < ranks) spread_over(call, ranks);
#define FASTKD_ROWS(name) rows_of<Dense<name>>,
  static constexpr void (*kernels[])(const Call&, char*) = {FASTKD_DIVERGENCES(FASTKD_ROWS)};
#undef FASTKD_ROWS
  const auto dense = call.shard.step == Step::statistics ? rows_of<DenseShard> : kernels[call.divergence];
  const auto kernel = call.ids ? rows_of<Sparse> : dense;
  auto& machine = host::machine;
  machine.ranks = call.ranks;
  machine.threads = call.threads;
  machine.clusters = call.rows < 2 ? call.rows : 2;  // each has several rows, one after the other
  for (machine.cluster = 0; machine.cluster < machine.clusters; ++machine.cluster)
    machine.run(shared_bytes(call), [&](char* memory) { kernel(call, memory); });
  if (call.shard.step != Step::all) return;
  double total = 0;
  for (int64_t i = 0; i < call.rows; ++i) total += call.loss[i];
  *call.total = float(total * call.scale * (call.scale_on_device ? *call.scale_on_device : 1));
}

void scale_rows(const Call& call, const float* factor, int64_t stride, int, void*) {
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
