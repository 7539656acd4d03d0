"""Corrections of Triton's interpreter, which runs the Triton kernels in tests, and a record of its memory accesses."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

# The architecture whose PTX the machine of tests/support/ptx runs in the interpreter's place, such as sm_90.
PTX = os.environ.get("FASTKD_PTX")

in_interpreter = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="watches or steers Triton's interpreter"
)


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


def _looked_up_once(dtype: Any) -> Any:
    """The original makes a table of all types at each look-up; a type is known by its name and not all are hashable."""
    known: dict[str, np.dtype[Any]] = {}

    def looked_up(kind: Any) -> Any:
        if kind.name not in known:
            known[kind.name] = dtype(kind)
        return known[kind.name]

    return looked_up


_entered = 0
_undo = ExitStack()


@contextmanager
def corrected() -> Iterator[None]:
    """Within, float32 becomes bfloat16 by rounding to nearest even, as on a GPU, and not by truncation.

    A kernel that calls a function does not patch triton.language once more, which took two thirds of the time, and
    NumPy does not warn of infinities and NaN, for which a GPU has no word. Fixtures of any scope may enter this in any
    order: the first that enters installs the corrections, the last that leaves removes them.
    """
    global _entered
    if not triton.knobs.runtime.interpret:  # PTX, in the machine of tests/support/ptx
        yield
        return
    if not _entered:
        patch = _undo.enter_context(pytest.MonkeyPatch.context())
        builder = interpreter.InterpreterBuilder
        patch.setattr(builder, "cast_impl", _rounding(builder.cast_impl))
        patch.setattr(interpreter.InterpretedFunction, "__call__", _call)
        patch.setattr(interpreter, "_get_np_dtype", _looked_up_once(interpreter._get_np_dtype))
        _undo.enter_context(np.errstate(all="ignore"))
    _entered += 1
    try:
        yield
    finally:
        _entered -= 1
        if not _entered:
            _undo.close()


class Access(NamedTuple):
    """An access of a tile: the addresses of its elements, and the bytes of each."""

    addresses: np.ndarray
    itemsize: int
    writes: bool


@contextmanager
def memory_accesses() -> Iterator[list[Access]]:
    """A context that records every access to more than one element, in order, without masked elements."""
    seen: list[Access] = []
    with pytest.MonkeyPatch.context() as patch:
        builder = interpreter.InterpreterBuilder

        def see(pointers: Any, mask: Any, writes: bool) -> None:
            if pointers.data.size > 1:
                itemsize = pointers.get_element_ty().primitive_bitwidth // 8
                seen.append(Access(pointers.data[mask.data.astype(bool)], itemsize, writes))

        load, store = builder.create_masked_load, builder.create_masked_store

        def watched_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
            see(pointers, mask, False)
            return load(self, pointers, mask, *others)

        def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
            see(pointers, mask, True)
            return store(self, pointers, value, mask, *others)

        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        yield seen
