// Memory for large outputs, lent to torch through DLPack.
//
// A fresh 64 MB tensor costs more in page faults than the whole loss costs in arithmetic (bench/studies/loss.py shows both).
// A buffer that torch gives back is therefore kept for the next call, in huge pages, and marked as free to the kernel
// (MADV_FREE): under memory pressure its pages are taken away and nothing is lost, without it they are reused as they
// are. At most two are kept; one that is too small for a request is unmapped first.
#pragma once
#include <pybind11/pybind11.h>

namespace fastkd {

// A DLPack capsule of a contiguous tensor with undefined contents; dtype as fastkd::Dtype. For from_dlpack().
pybind11::capsule new_output(const std::vector<int64_t>& sizes, int dtype);

// Bytes that are kept for later and not lent.
int64_t idle_output_bytes();

// Unmap what is kept.
void release_idle_outputs();

}  // namespace fastkd
