"""Two corrections of Triton's interpreter, which the tests of the Triton kernels run in where there is no GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _patch_once(function: Any) -> None:
    """For the functions of triton.language itself; the launch of a kernel has patched it for all others."""
    if not any(value is tl for value in function.__globals__.values()):
        interpreter._patch_lang(function)


def _call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    _patch_once(self.fn)
    return self.rewrite()(*args, **kwargs)


def _rounding(cast: Any) -> Any:
    def rounding(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    return rounding


@contextmanager
def corrected() -> Iterator[None]:
    """Within, float32 becomes bfloat16 by rounding to nearest even, as on a GPU, and not by truncation.

    And a kernel that calls a function does not patch triton.language once more, which took two thirds of the time.
    """
    with pytest.MonkeyPatch.context() as patch:
        builder = interpreter.InterpreterBuilder
        patch.setattr(builder, "cast_impl", _rounding(builder.cast_impl))
        patch.setattr(interpreter.InterpretedFunction, "__call__", _call)
        yield
