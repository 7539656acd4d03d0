#include "memory.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastkd {
namespace {

struct Buffer {
  char* data;
  size_t bytes;
};

constexpr size_t HUGE = size_t(2) << 20;
constexpr size_t MAX_IDLE = 2;

std::mutex mutex;
std::vector<Buffer> idle;  // sorted by size, smallest first

#if defined(__linux__)
Buffer map(size_t bytes) {
  bytes = (bytes + HUGE - 1) / HUGE * HUGE;
  // Maps one huge page more than needed, so that the buffer can start on a huge page, and unmaps the rest.
  void* mapped = mmap(nullptr, bytes + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char* begin = static_cast<char*>(mapped);
  char* data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + HUGE - 1) / HUGE * HUGE);
  if (data > begin) munmap(begin, data - begin);
  munmap(data + bytes, begin + HUGE - data);
  madvise(data, bytes, MADV_HUGEPAGE);
  return {data, bytes};
}
void unmap(const Buffer& buffer) { munmap(buffer.data, buffer.bytes); }
void mark_as_free(const Buffer& buffer) { madvise(buffer.data, buffer.bytes, MADV_FREE); }
#else
Buffer map(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  void* data = std::aligned_alloc(64, bytes);
  if (!data) throw std::bad_alloc();
  return {static_cast<char*>(data), bytes};
}
void unmap(const Buffer& buffer) { std::free(buffer.data); }
void mark_as_free(const Buffer&) {}
#endif

Buffer acquire(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto fits = std::find_if(idle.begin(), idle.end(), [=](const Buffer& b) { return b.bytes >= bytes; });
  if (fits != idle.end()) {
    const Buffer buffer = *fits;
    idle.erase(fits);
    return buffer;
  }
  if (!idle.empty()) {  // too small for this request, and probably for the next ones
    unmap(idle.back());
    idle.pop_back();
  }
  return map(bytes);
}

void keep_or_unmap(const Buffer& buffer) {
  const std::lock_guard<std::mutex> lock(mutex);
  mark_as_free(buffer);
  idle.insert(std::upper_bound(idle.begin(), idle.end(), buffer,
                               [](const Buffer& a, const Buffer& b) { return a.bytes < b.bytes; }),
              buffer);
  if (idle.size() > MAX_IDLE) {
    unmap(idle.front());
    idle.erase(idle.begin());
  }
}

// The part of the DLPack ABI (version 0, frozen) that is needed here.
struct DLTensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

struct LentTensor {
  DLManagedTensor managed;
  Buffer buffer;
  std::vector<int64_t> shape, strides;
};

void release_tensor(DLManagedTensor* managed) {
  auto* lent = static_cast<LentTensor*>(managed->context);
  keep_or_unmap(lent->buffer);
  delete lent;
}

}  // namespace

pybind11::capsule new_output(const std::vector<int64_t>& sizes, int dtype) {
  constexpr uint8_t FLOAT = 2, BFLOAT = 4;
  auto* lent = new LentTensor{{}, {}, sizes, std::vector<int64_t>(sizes.size())};
  int64_t elements = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    lent->strides[d] = elements;
    elements *= sizes[d];
  }
  const int width = dtype == 0 ? 4 : 2;
  try {
    lent->buffer = acquire(size_t(elements) * width);
  } catch (...) {
    delete lent;
    throw;
  }
  lent->managed = {{lent->buffer.data, 1, 0, int32_t(sizes.size()), dtype == 1 ? BFLOAT : FLOAT, uint8_t(8 * width), 1,
                    lent->shape.data(), lent->strides.data(), 0},
                   lent,
                   release_tensor};
  return pybind11::capsule(&lent->managed, "dltensor", [](PyObject* capsule) {
    // A consumer that takes the tensor renames the capsule, and calls the deleter itself.
    if (PyCapsule_IsValid(capsule, "dltensor"))
      release_tensor(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
  });
}

int64_t idle_output_bytes() {
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t bytes = 0;
  for (const Buffer& buffer : idle) bytes += int64_t(buffer.bytes);
  return bytes;
}

void release_idle_outputs() {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Buffer& buffer : idle) unmap(buffer);
  idle.clear();
}

}  // namespace fastkd
