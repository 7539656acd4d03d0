"""The size of a piece: rows that PyTorch code computes at once, and the memory that they need."""

from __future__ import annotations

import torch

# Bytes of one tensor of a piece. On a CPU this is per thread: small enough for the cache, and large enough that the
# overhead of operator calls does not matter. On a device it is large enough to keep a launch busy.
PIECE_CPU, PIECE_DEVICE = 2 << 20, 32 << 20
# The most tensors of this size that a piece of the portable backend holds at once; measured by
# tests/backends/test_portable.py.
PIECE_TEMPORARIES = 18


def piece_rows(columns: int, dtype: torch.dtype, device: str) -> int:
    """How many rows of `columns` columns are computed at once in PyTorch; dtype is that of the computation."""
    room = PIECE_CPU * torch.get_num_threads() if device == "cpu" else PIECE_DEVICE
    return max(room // max(columns * dtype.itemsize, 1), 1)


def piece_bytes(columns: int, dtype: torch.dtype, device: str) -> int:
    """The most bytes that the portable backend holds in addition to its results."""
    return PIECE_TEMPORARIES * piece_rows(columns, dtype, device) * columns * dtype.itemsize
