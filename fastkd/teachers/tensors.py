"""The check of a teacher's tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.core.tensors import check_strided

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
