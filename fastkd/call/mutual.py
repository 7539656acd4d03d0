"""The contract of a backend for mutual learning, which it supports by having the function

    mutual_rows(logits, rows, options, wanted, parts) -> Result

:mod:`fastkd.backends.mutual` is the reference, which computes each pair of students. The kernels turn the sum over a
student's peers into a sum over all students, so that they read each student's logits once, not once per pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PEERS = ("mean", "sum", "average")


class Options(NamedTuple):
    """The options that are the same for all rows."""

    temperature: float = 1.0
    peers: str = "mean"
    peer_weight: float = 1.0
    scale_by_temperature: bool = True
    ignore_index: int = -100
    scale: float = 1.0  # multiplies the totals and every gradient


class Result(NamedTuple):
    """Results of M students: [M, ...] with the logits' leading shape, 0 in dropped rows."""

    loss: Tensor
    total: Tensor  # [M]: scale times the sum of loss
    # For each student, the gradient of scale * loss, in the shape of the logits; None if it is not wanted.
    gradients: tuple[Tensor | None, ...]
    divergence: Tensor | None = None
    cross_entropy: Tensor | None = None


def gradient_dtype(logits: torch.dtype) -> torch.dtype:
    """The dtype of a saved gradient: float32 for float16 logits, where it would underflow before loss scaling."""
    return torch.float32 if logits == torch.float16 else logits


def outputs(
    logits: Sequence[Tensor],
    wanted: Sequence[bool],
    parts: bool,
    empty: Callable[..., Tensor] = torch.empty,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """New memory for the wanted outputs; dtype is the dtype of losses."""
    first = logits[0]
    shape = (len(logits), *first.shape[:-1])

    def per_row(size: Sequence[int] = shape) -> Tensor:
        return torch.empty(size, dtype=dtype, device=first.device)

    gradients = tuple(
        empty(first.shape, dtype=gradient_dtype(first.dtype), device=first.device) if want else None
        for want in wanted
    )
    return Result(
        per_row(),
        per_row(shape[:1]),
        gradients,
        *((per_row(), per_row()) if parts else (None, None)),
    )
