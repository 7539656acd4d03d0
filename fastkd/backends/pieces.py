"""How many rows the portable backend computes at once, and what it holds meanwhile."""

from __future__ import annotations

import torch

# Bytes of one tensor of a piece of rows that the portable backend works on: on a CPU of each thread, so that the piece
# stays in the cache, and yet has enough rows that the calls of its operators do not count; elsewhere such that a launch
# has something to do. And how many of them a piece holds at most: tests/backends/test_portable.py measures it.
PIECE_CPU, PIECE_DEVICE = 2 << 20, 32 << 20
PIECE_TEMPORARIES = 18


def piece_rows(columns: int, dtype: torch.dtype, device: str) -> int:
    """How many rows of that many columns the portable backend takes at once; dtype is that of losses."""
    room = PIECE_CPU * torch.get_num_threads() if device == "cpu" else PIECE_DEVICE
    return max(room // max(columns * dtype.itemsize, 1), 1)


def piece_bytes(columns: int, dtype: torch.dtype, device: str) -> int:
    """What it holds beside its results, at most."""
    return PIECE_TEMPORARIES * piece_rows(columns, dtype, device) * columns * dtype.itemsize
