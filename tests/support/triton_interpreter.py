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


_BUILTIN = tl.core.builtin(lambda: None).__code__


def _patched_directly(
    target: Any, name: str, member: Any, builder: Any, scope: interpreter._LangPatchScope
) -> None:
    """As the original, but calls the function beneath a builtin, which only checks that there is a _semantic."""
    inner = member.__wrapped__ if getattr(member, "__code__", None) is _BUILTIN else member

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return inner(*args, **kwargs)

    scope.set_attr(target, name, call)


def _patched_again(patch: Any) -> Any:
    """The original looks through all of triton.language at each launch; the patches are the same each time."""
    known: dict[tuple[bool, bool], list[tuple[Any, str, Any]]] = {}

    def patch_lang(function: Any) -> interpreter._LangPatchScope:
        seen = {id(value) for value in function.__globals__.values()}
        kinds = id(tl) in seen, id(tl.core) in seen
        if kinds not in known:
            scope = patch(function)
            known[kinds] = [(x, name, vars(x)[name]) for x, name, _ in scope._changes]
            return scope
        scope = interpreter._LangPatchScope()
        for target, name, member in known[kinds]:
            scope.set_attr(target, name, member)
        return scope

    return patch_lang


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


def _converted_if_needed(convert: Any) -> Any:
    """Leaves operands of one type as they are, and converts a number beside tensors of one type and shape only once.

    The original needs 20 calls to see that there is nothing to convert, and 40 to make a tensor of a number.
    """
    numbers: dict[Any, Any] = {}

    def convert_if_needed(
        self: Any,
        left: Any,
        right: Any,
        left_pointer: bool = False,
        right_pointer: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        how = left_pointer, right_pointer, arithmetic_check, div_or_mod
        on_the_left, on_the_right = isinstance(left, tl.tensor), isinstance(right, tl.tensor)
        if on_the_left and on_the_right:
            kind = left.dtype
            if kind is right.dtype and (kind is tl.float32 or not (div_or_mod or kind.is_ptr())):
                return self.broadcast_impl_value(left, right)
        elif on_the_left or on_the_right:
            tensor, number = (left, right) if on_the_left else (right, left)
            # repr, because 0.0 == -0.0. The shape is known by its object: see _derived_once.
            key = (
                type(number),
                repr(number),
                tensor.dtype.name,
                id(tensor.shape),
                on_the_left,
                how,
            )
            if key in numbers:
                return (left, numbers[key]) if on_the_left else (numbers[key], right)
            pair = convert(self, left, right, *how)
            if pair[0 if on_the_left else 1] is tensor:
                numbers[key] = pair[1 if on_the_left else 0]
            return pair
        return convert(self, left, right, *how)

    return convert_if_needed


def _of_floats(operation: Any, ufunc: np.ufunc) -> Any:
    """Applies NumPy's function to two float32 tensors of one shape at once; the original calls ten functions first."""

    @functools.wraps(operation)  # _assert_no_overflow goes by the name
    def applied(self: Any, left: Any, right: Any, *options: Any) -> Any:
        if (
            type(left) is tl.tensor
            and type(right) is tl.tensor
            and left.dtype is tl.float32
            and right.dtype is tl.float32
            and left.shape is right.shape
        ):
            result = ufunc(left.handle.data, right.handle.data)
            return tl.tensor(interpreter.TensorHandle(result, tl.float32), left.type)
        return operation(self, left, right, *options)

    return applied


def _unwrapped_directly(unwrap: Any) -> Any:
    """The original asks first whether a tensor is a list or a tuple of constants."""

    def unwrapped(value: Any) -> Any:
        kind = type(value)
        if kind is tl.tensor or kind is int:
            return value
        return value.value if kind is tl.constexpr else unwrap(value)

    return unwrapped


def _make_handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
    """As the original, but does not compare the sizes of NumPy's type and of Triton's."""
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr


def _same_or_equal(equal: Any) -> Any:
    return lambda self, other: self is other or equal(self, other)


def _broadcast_if_needed(broadcast: Any) -> Any:
    """The original compares a tuple with a list, so it also broadcasts operands of the same shape."""

    def broadcast_if_needed(self: Any, left: Any, right: Any) -> Any:
        return (left, right) if left.shape is right.shape else broadcast(self, left, right)

    return broadcast_if_needed


def _assert_no_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
    """Checks the operation on 64-bit integers with NumPy; the original interprets ten more operations."""
    kind = left.type.scalar
    if kind.int_bitwidth >= 64:
        return
    ufunc = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    wide = ufunc(left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
    fits = wide.max() <= kind.get_int_max_value() and wide.min() >= kind.get_int_min_value()
    assert fits, f"{kind} overflows in {operation.__name__}"


class _Shape(NamedTuple):
    """What triton.language derives from a shape: the type's shape and size, the tensor's shape and size."""

    of_type: tl.tuple
    numel: int
    of_tensor: tl.tuple
    constant_numel: tl.constexpr


_shapes: dict[tuple[int, ...], _Shape] = {}
_NO_SHAPE = _Shape(tl.tuple(()), 1, tl.tuple(()), tl.constexpr(1))


def _plain(size: Any) -> int:
    return size.value if isinstance(size, tl.constexpr) else size


def _derived_once(make_type: Any) -> Any:
    """Makes the type of a block; derives each shape only once, so equal shapes are the same object."""

    def make(self: Any, element: Any, shape: Any) -> None:
        sizes = tuple(map(_plain, shape))
        if sizes not in _shapes:
            make_type(self, element, shape)
            of_tensor = tl.tuple([tl.constexpr(size) for size in sizes])
            _shapes[sizes] = _Shape(self.shape, self.numel, of_tensor, tl.constexpr(self.numel))
        self.derived = _shapes[sizes]
        self.element_ty, self.shape, self.numel = element, self.derived.of_type, self.derived.numel
        self.name = f"<{sizes}, {element}>"

    return make


def _make_tensor(self: Any, handle: Any, kind: Any) -> None:
    """As the original, with the shape that _derived_once has derived."""
    derived = kind.derived if kind.is_block() else _NO_SHAPE
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.shape, self.numel = derived.of_tensor, derived.constant_numel


_entered = 0
_undo = ExitStack()


@contextmanager
def corrected() -> Iterator[None]:
    """Within, float32 becomes bfloat16 by rounding to nearest even, as on a GPU, and not by truncation.

    The other corrections make the interpreter several times faster: above all, a kernel that calls a function does not
    patch triton.language once more. NumPy does not warn of infinities and NaN, as a GPU does not either. Fixtures of
    any scope may enter this in any order: the first that enters installs the corrections, the last that leaves removes
    them.
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
        patch.setattr(interpreter, "_patch_attr", _patched_directly)
        patch.setattr(interpreter, "_patch_lang", _patched_again(interpreter._patch_lang))
        patch.setattr(interpreter, "_get_np_dtype", _looked_up_once(interpreter._get_np_dtype))
        semantic = triton.language.semantic.TritonSemantic
        for name, corrected_by in {
            "binary_op_type_checking_impl": _converted_if_needed,
            "broadcast_impl_value": _broadcast_if_needed,
        }.items():
            patch.setattr(semantic, name, corrected_by(getattr(semantic, name)))
        for name, ufunc in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
            patch.setattr(semantic, name, _of_floats(getattr(semantic, name), ufunc))
        patch.setattr(semantic, "binary_op_sanitize_overflow_impl", _assert_no_overflow)
        patch.setattr(interpreter.TensorHandle, "__init__", _make_handle)
        unwrap = tl.core._unwrap_if_constexpr
        patch.setattr(tl.core, "_unwrap_if_constexpr", _unwrapped_directly(unwrap))
        patch.setattr(tl.dtype, "__eq__", _same_or_equal(tl.dtype.__eq__))
        patch.setattr(tl.tensor, "__init__", _make_tensor)
        patch.setattr(tl.block_type, "__init__", _derived_once(tl.block_type.__init__))
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
