"""The checks of a teacher's tensors, and of a list of teachers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastkd.core.tensors import check_strided

T = TypeVar("T")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(argument: str, value: object, dtypes: Sequence[torch.dtype]) -> Tensor:
    """Return the value; raise unless it is a tensor with strides and one of these dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{argument} must be {allowed}, got {value.dtype}")
    check_strided(argument, value)
    return value


def checked_list(teachers: Sequence[T]) -> tuple[T, ...]:
    """Return the teachers as a tuple; raise unless they are a list of at least one."""
    if isinstance(teachers, Tensor) or not isinstance(teachers, Sequence):
        raise TypeError(f"teachers must be a list of teachers, got {type(teachers).__name__}")
    if not teachers:
        raise ValueError("teachers must contain at least one teacher, got none")
    return tuple(teachers)
