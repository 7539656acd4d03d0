"""Types of PTX as NumPy's, and arithmetic that NumPy lacks: bfloat16, fused multiply-add, approximate functions.

Values of f16 and bf16 are float32 arrays while they are computed with, and are rounded once when they are stored: for
one sum, product or quotient that equals rounding the exact result. A packed type such as f16x2 is an array [lanes, 2].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from support.ptx.faults import Fault

Lanes = Any  # an index of lanes: a slice or an array of numbers
Read = Callable[[Lanes], Any]  # the values of an operand
Write = Callable[[Lanes, Any], None]

_KINDS: dict[str, Any] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
SIZES = {name: np.dtype(kind).itemsize for name, kind in _KINDS.items()}
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATS = ("f16", "bf16", "f32", "f64", *PACKED)


def kind_of(name: str) -> Any:
    """The NumPy type of a type's values in memory."""
    return _KINDS[name]


def size_of(name: str) -> int:
    """Bytes of a type."""
    return 2 * SIZES[PACKED[name]] if name in PACKED else SIZES[name]


def bits_of_bf16(values: Any) -> Any:
    """Round float32 to the nearest bfloat16, ties to even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def values_of_bf16(bits: Any) -> Any:
    """The values of bfloat16 numbers as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def constant(text: str, name: str) -> Any:
    """The value of a literal, or None if the text is none."""
    kind = np.float32 if name in ("f16", "bf16") else _KINDS[PACKED.get(name, name)]
    if text[:2].lower() == "0f":
        value = np.array(int(text[2:], 16), np.uint32)
    elif text[:2].lower() == "0d":
        value = np.array(int(text[2:], 16), np.uint64)
    elif text.lstrip("-")[:1].isdigit():
        number = int(text.rstrip("U"), 0)
        if kind is np.bool_ or np.issubdtype(kind, np.floating):
            return kind(number)
        size = np.dtype(kind).itemsize
        value = np.array(number & ((1 << 8 * size) - 1), UNSIGNED[size])
        return value.view(kind)[()]
    else:
        return None
    return (
        value.view(np.float32 if value.itemsize == 4 else np.float64).astype(kind)[()]
        if name in FLOATS
        else value[()]
    )


def _cells(register: Any, name: str) -> Any:
    """A view of a register as values of a type, [lanes] or, packed, [lanes, 2]."""
    element = PACKED.get(name, name)
    cells = register.view(_KINDS[element]).reshape(len(register), -1)
    if name in PACKED:
        if cells.shape[1] != 2:
            raise Fault(f"{name} in a register of {register.itemsize} bytes")
        return cells
    return cells[:, 0]


def _is_predicate(register: Any, name: str) -> bool:
    """Whether a register and a type are predicates. Raise if only one of them is, or if the type is too wide."""
    if register.dtype == np.bool_ or name == "pred":
        if register.dtype != np.bool_ or name != "pred":
            raise Fault(f"a predicate and {name} are not the same")
        return True
    if size_of(name) > register.itemsize:
        raise Fault(f"{name} is wider than its register of {register.itemsize} bytes")
    return False


def reader(register: Any, name: str) -> Read:
    """How a register is read as values of a type; of a wider register, the lower part."""
    if _is_predicate(register, name):
        return register.__getitem__
    cells = _cells(register, name)
    element = PACKED.get(name, name)
    if element == "bf16":
        return lambda lanes: values_of_bf16(cells[lanes])
    if element == "f16":
        return lambda lanes: cells[lanes].astype(np.float32)
    return cells.__getitem__


def writer(register: Any, name: str) -> Write:
    """How values of a type get into a register; a wider register is extended by the sign or by 0."""
    if _is_predicate(register, name):
        return register.__setitem__
    if size_of(name) < register.itemsize:
        if name in FLOATS:
            raise Fault(f"{name} in a register of {register.itemsize} bytes")
        return register.view(
            (SIGNED if name[0] == "s" else UNSIGNED)[register.itemsize]
        ).__setitem__
    cells = _cells(register, name)
    if PACKED.get(name, name) == "bf16":
        return lambda lanes, values: cells.__setitem__(lanes, bits_of_bf16(values))
    return cells.__setitem__


SMALLEST = np.float32(2**-126)  # the smallest normal float32


def flush(values: Any) -> Any:
    """Subnormal float32 numbers become 0 of their sign."""
    return np.where(np.abs(values) < SMALLEST, np.copysign(np.float32(0), values), values)


# Fused multiply-add


def _sum_and_error(a: Any, b: Any) -> tuple[Any, Any]:
    """a + b rounded, and what rounding took away (Knuth's two-sum)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _odd64(total: Any, lost: Any) -> Any:
    """A rounded sum and its error, rounded to odd instead: rounding that once more is as good as rounding once."""
    bits = total.view(np.int64)
    even = (lost != 0) & (bits & 1 == 0) & np.isfinite(total)
    return np.where(even, bits + np.where((lost > 0) == (total > 0), 1, -1), bits).view(np.float64)


def odd32(values: Any) -> Any:
    """Round float64 to float32 to odd, for a caller that rounds to half precision."""
    rounded = np.asarray(values).astype(np.float32)
    inexact = (rounded != values) & np.isfinite(rounded)
    bits = rounded.view(np.int32) - (inexact & (np.abs(rounded) > np.abs(values)))
    return np.where(inexact, bits | 1, bits).astype(np.int32).view(np.float32)


def sum32_toward_zero(a: Any, b: Any) -> Any:
    """a + b in float32, rounded toward 0 once."""
    exact = _odd64(*_sum_and_error(np.asarray(a, np.float64), np.asarray(b, np.float64)))
    rounded = exact.astype(np.float32)
    beyond = (np.abs(rounded) > np.abs(exact)) & np.isfinite(exact)
    return (rounded.view(np.int32) - beyond).astype(np.int32).view(np.float32)


def fma32(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float32, rounded once."""
    product = np.asarray(a, np.float64) * b  # exact: 24 digits by 24
    total = np.asarray(product + c)
    # Rounding twice differs from rounding once only where the first result is halfway between two float32.
    halfway = (total.view(np.int64) & 0x1FFFFFFF == 0x10000000) | (np.abs(total) < SMALLEST)
    if halfway.any():
        total = _odd64(*_sum_and_error(product, np.asarray(c, np.float64)))
    return total.astype(np.float32)


def fma16(a: Any, b: Any, c: Any) -> Any:
    """a * b + c of half-precision values, for the caller to round once."""
    return odd32(_odd64(*_sum_and_error(np.asarray(a, np.float64) * b, np.asarray(c, np.float64))))


def fma64(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float64; the product's error is added back, so the result is within an ulp of the exact one."""
    product = np.asarray(a, np.float64) * b
    halves, exponent = [], 0
    for x in (a, b):  # Dekker's split into halves of 26 digits, of numbers below 1
        fraction, power = np.frexp(x)
        scaled = fraction * 134217729.0
        high = scaled - (scaled - fraction)
        halves.append((high, fraction - high))
        exponent = exponent + power
    (a1, a0), (b1, b0) = halves
    error = ((a1 * b1 - (a1 + a0) * (b1 + b0)) + a1 * b0 + a0 * b1) + a0 * b0
    error = np.ldexp(error, exponent)
    total, lost = _sum_and_error(product, np.asarray(c, np.float64))
    exact = total + (error + lost)
    return np.where(np.isfinite(exact), exact, total)


# Approximate functions

# The errors that the PTX manual documents, relative to the result. Of lg2, the error of a result near 0 is absolute.
ERRORS = {
    "ex2": 2**-22.5, "lg2": 2**-22, "rcp": 2**-23, "sqrt": 2**-23, "rsqrt": 2**-22.9, "tanh": 2**-11,
    "sin": 2**-20.5, "cos": 2**-20.5, "div": 2**-22,
}  # fmt: skip
APPROXIMATE: dict[str, Callable[..., Any]] = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "div": np.divide,
}  # fmt: skip


class Noise:
    """The error of approximate functions: none, or up to the documented one.

    An error is a function of the exact result and the seed, so that equal arguments have equal results, as on a device.
    """

    def __init__(self, seed: int | None) -> None:
        self._seed = seed

    def disturbed(self, name: str, exact: Any) -> Any:
        """Values of float64, which the caller rounds, as the function may return them."""
        if self._seed is None:
            return exact
        exact = np.asarray(exact)
        sizes = np.maximum(np.abs(exact), 1) if name in ("lg2", "sin", "cos") else np.abs(exact)
        mixed = (exact.view(np.uint64) + np.uint64(self._seed + 1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(0xD6E8FEB86659FD93)
        even = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1  # in [-1, 1)
        # What is exact on a device too: special values and powers of 2.
        special = ~np.isfinite(exact) | (exact == 0) | (np.frexp(exact)[0] == 0.5)
        return np.where(special, exact, exact + even * ERRORS[name] * sizes)
