// Memory for large outputs, lent to torch through DLPack.
//
// A fresh 64 MB tensor costs more in page faults than the whole loss costs in arithmetic (bench/studies/loss.py shows
// both). A buffer that torch returns is therefore kept for the next call, in huge pages, and marked as free for the
// kernel (MADV_FREE): under memory pressure the kernel takes its pages, otherwise they are reused as they are. At most
// two buffers are kept. One that is too small for a request is unmapped first.
#pragma once
#include <pybind11/pybind11.h>

namespace fastkd {

// Returns a DLPack capsule, for from_dlpack(), of a contiguous tensor with undefined contents. dtype is a
// fastkd::Dtype.
pybind11::capsule new_output(const std::vector<int64_t>& sizes, int dtype);

// Bytes of the buffers that are kept for later calls.
int64_t idle_output_bytes();

// Unmaps the buffers that are kept.
void release_idle_outputs();

}  // namespace fastkd
