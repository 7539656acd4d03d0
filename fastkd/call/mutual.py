"""What a backend computes for mutual learning, where it has

    mutual_rows(logits, rows, options, wanted, parts) -> Result

:mod:`fastkd.backends.mutual` is the plain reference, pair by pair. Kernels use that a sum over a student's peers is one
over all students, so that a row costs a pass over each student's logits and not over each pair's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PEERS = ("mean", "sum", "average")


class Options(NamedTuple):
    """What does not change from row to row."""

    temperature: float = 1.0
    peers: str = "mean"
    peer_weight: float = 1.0
    scale_by_temperature: bool = True
    ignore_index: int = -100
    scale: float = 1.0  # multiplies the totals and every gradient


class Result(NamedTuple):
    """Of M students: [M, ...] in the logits' leading shape, 0 in rows that are dropped."""

    loss: Tensor
    total: Tensor  # [M], scale times the sum of loss
    gradients: tuple[
        Tensor | None, ...
    ]  # of loss times scale, in the shape of the logits; None: not wanted
    divergence: Tensor | None = None
    cross_entropy: Tensor | None = None


def gradient_dtype(logits: torch.dtype) -> torch.dtype:
    """Of a gradient that waits for its upstream factor: in float16 a loss scaler's would come too late."""
    return torch.float32 if logits == torch.float16 else logits


def outputs(
    logits: Sequence[Tensor],
    wanted: Sequence[bool],
    parts: bool,
    empty: Callable[..., Tensor] = torch.empty,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """Fresh memory for what is wanted; dtype is that of losses."""
    first = logits[0]
    shape = (len(logits), *first.shape[:-1])

    def rows(of: Sequence[int] = shape) -> Tensor:
        return torch.empty(of, dtype=dtype, device=first.device)

    gradients = tuple(
        empty(first.shape, dtype=gradient_dtype(first.dtype), device=first.device) if want else None
        for want in wanted
    )
    return Result(
        rows(), rows(shape[:1]), gradients, *((rows(), rows()) if parts else (None, None))
    )
