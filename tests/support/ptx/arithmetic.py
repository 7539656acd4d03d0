"""The opcodes that compute registers from registers: each one's function of NumPy values, and its operands' types."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from support.ptx.faults import Fault
from support.ptx.numbers import (
    APPROXIMATE,
    FLOATS,
    PACKED,
    UNSIGNED,
    Noise,
    flush,
    fma16,
    fma32,
    fma64,
    kind_of,
    odd32,
    size_of,
    sum32_toward_zero,
)
from support.ptx.program import Instruction

Function = Callable[..., Any]


class Arithmetic(NamedTuple):
    """A function of values, the type of its result, and those of its operands."""

    function: Function
    result: str
    operands: tuple[str, ...]


_OPCODES: dict[str, Callable[[Instruction, Noise], Arithmetic]] = {}


def _opcode(*names: str) -> Any:
    def add(make: Any) -> Any:
        _OPCODES.update(dict.fromkeys(names, make))
        return make

    return add


def arithmetic(instruction: Instruction, noise: Noise) -> Arithmetic | None:
    """What an instruction computes; None if it is not arithmetic."""
    make = _OPCODES.get(instruction.name)
    return make(instruction, noise) if make else None


def _refined(instruction: Instruction, function: Function) -> Function:
    """With .ftz, subnormal operands and results are 0; with .sat, results lie in [0, 1] and NaN is 0."""
    if instruction.has("sat"):
        exact = function

        def function(*values: Any) -> Any:
            return np.fmin(np.fmax(exact(*values), np.float32(0)), np.float32(1))

    if not instruction.has("ftz"):
        return function
    if PACKED.get(instruction.type, instruction.type) == "f16":
        raise Fault(f"{instruction.name}.ftz of f16 is not implemented")
    return lambda *values: flush(function(*map(flush, values)))


def _same(instruction: Instruction, function: Function, operands: int) -> Arithmetic:
    """All operands have the type of the result."""
    kind = instruction.type
    return Arithmetic(_refined(instruction, function), kind, (kind,) * operands)


def _number_of_sources(instruction: Instruction) -> int:
    return len(instruction.operands) - 1


@_opcode("add", "sub")
def _sum(instruction: Instruction, noise: Noise) -> Arithmetic:
    if instruction.has("rz") and instruction.type == "f32" and instruction.name == "add":
        instruction.only("rz ftz sat")
        return _same(instruction, sum32_toward_zero, 2)
    instruction.only("rn ftz sat")
    function = {"add": np.add, "sub": np.subtract}[instruction.name]
    if instruction.types[0] == "f32" and instruction.type in ("f16", "bf16"):  # add.f32.bf16
        return Arithmetic(function, "f32", (instruction.type, "f32"))
    return _same(instruction, function, 2)


@_opcode("mul")
def _product(instruction: Instruction, noise: Noise) -> Arithmetic:
    kind = instruction.type
    if kind in FLOATS:
        instruction.only("rn ftz sat")
        return _same(instruction, np.multiply, 2)
    instruction.only("lo hi wide")
    if instruction.has("wide"):
        double = kind[0] + str(2 * int(kind[1:]))
        return Arithmetic(_widened(double, np.multiply), double, (kind, kind))
    return _same(instruction, _high(kind) if instruction.has("hi") else np.multiply, 2)


def _widened(double: str, function: Function) -> Function:
    kind = kind_of(double)
    return lambda a, b, *c: function(np.asarray(a).astype(kind), np.asarray(b).astype(kind), *c)


def _high(kind: str) -> Function:
    """The upper half of a product of integers."""
    if size_of(kind) < 8:
        bits = 8 * size_of(kind)
        wide = kind_of(f"{kind[0]}64")
        return lambda a, b: (np.asarray(a).astype(wide) * np.asarray(b).astype(wide)) >> wide(bits)

    def high(a: Any, b: Any) -> Any:
        low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
        x, y = (np.asarray(value).view(np.uint64) for value in (a, b))
        (x0, x1), (y0, y1) = ((value & low, value >> half) for value in (x, y))
        middle = x1 * y0 + (x0 * y0 >> half)
        result = x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & low)) >> half)
        if kind[0] == "u":
            return result
        zero = np.uint64(0)
        return (result - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)).view(np.int64)

    return high


@_opcode("fma", "mad")
def _multiply_add(instruction: Instruction, noise: Noise) -> Arithmetic:
    kind = instruction.type
    if kind in FLOATS:
        instruction.only("rn ftz sat")
        if instruction.types[0] == "f32" and kind in ("f16", "bf16"):  # fma.f32.bf16
            return Arithmetic(fma32, "f32", (kind, kind, "f32"))
        by_type = {"f32": fma32, "f64": fma64, "f16": fma16, "bf16": fma16}
        return _same(instruction, by_type[PACKED.get(kind, kind)], 3)
    instruction.only("lo hi wide")
    if instruction.has("wide"):
        double = kind[0] + str(2 * int(kind[1:]))
        return Arithmetic(_widened(double, lambda a, b, c: a * b + c), double, (kind, kind, double))
    product = _high(kind) if instruction.has("hi") else np.multiply
    return _same(
        instruction, lambda a, b, c: np.asarray(product(a, b)).astype(kind_of(kind)) + c, 3
    )


@_opcode("min", "max")
def _extreme(instruction: Instruction, noise: Noise) -> Arithmetic:
    kind, least = instruction.type, instruction.name == "min"
    if kind not in FLOATS:
        instruction.only("")
        return _same(instruction, np.minimum if least else np.maximum, 2)
    instruction.only("ftz NaN")
    numbers = (np.fmin, np.fmax), (np.minimum, np.maximum)
    pick = numbers[instruction.has("NaN")][not least]

    def two(a: Any, b: Any) -> Any:  # -0 counts as less than +0
        zeros = (a == 0) & (b == 0)
        either = np.signbit(a) | np.signbit(b) if least else np.signbit(a) & np.signbit(b)
        return np.where(zeros, np.copysign(np.zeros_like(a), np.where(either, -1, 1)), pick(a, b))

    return _same(instruction, lambda *values: reduce(two, values), _number_of_sources(instruction))


@_opcode("div")
def _quotient(instruction: Instruction, noise: Noise) -> Arithmetic:
    kind = instruction.type
    if kind in FLOATS:
        instruction.only("rn approx full ftz")
        if instruction.has("approx", "full"):
            return _same(instruction, _approximate("div", kind, noise), 2)
        return _same(instruction, np.divide, 2)
    instruction.only("")
    return _same(instruction, _whole_quotient, 2)


def _whole_quotient(a: Any, b: Any) -> Any:
    """a / b toward 0; by 0, where PTX leaves the result open, -1."""
    a, b = np.broadcast_arrays(a, b)
    divisor = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // divisor
    quotient = quotient + ((a % divisor != 0) & ((a < 0) != (divisor < 0))).astype(a.dtype)
    return np.where(b == 0, np.zeros_like(b) - b.dtype.type(1), quotient)


@_opcode("rem")
def _remainder(instruction: Instruction, noise: Noise) -> Arithmetic:
    instruction.only("")
    return _same(instruction, lambda a, b: a - _whole_quotient(a, b) * b, 2)


@_opcode("abs", "neg", "not")
def _one_operand(instruction: Instruction, noise: Noise) -> Arithmetic:
    instruction.only("ftz")
    return _same(
        instruction, {"abs": np.abs, "neg": np.negative, "not": np.invert}[instruction.name], 1
    )


@_opcode("and", "or", "xor")
def _bitwise(instruction: Instruction, noise: Noise) -> Arithmetic:
    instruction.only("")
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    return _same(instruction, functions[instruction.name], 2)


@_opcode("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh", "sin", "cos")
def _of_one_number(instruction: Instruction, noise: Noise) -> Arithmetic:
    name, kind = instruction.name, instruction.type
    instruction.only("approx rn ftz")
    if instruction.has("rn"):
        return _same(
            instruction,
            {"rcp": lambda x: np.float64(1).astype(x.dtype) / x, "sqrt": np.sqrt}[name],
            1,
        )
    if kind == "f64" and name == "rcp":

        def coarse(x: Any) -> Any:  # the upper half of the number is right
            bits = np.asarray(1 / x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
            return bits.view(np.float64)

        return Arithmetic(coarse, kind, (kind,))
    return _same(instruction, _approximate(name, kind, noise), 1)


def _approximate(name: str, kind: str, noise: Noise) -> Function:
    function = APPROXIMATE[name]
    round_off = np.float32 if PACKED.get(kind, kind) == "f32" else odd32
    if kind == "f64":
        raise Fault(f"{name}.approx.f64 is not implemented")

    def approximate(*values: Any) -> Any:
        exact = function(*(np.asarray(value, np.float64) for value in values))
        return np.asarray(round_off(noise.disturbed(name, exact)))

    return approximate


@_opcode("copysign")
def _copysign(instruction: Instruction, noise: Noise) -> Arithmetic:
    return _same(instruction, lambda sign, number: np.copysign(number, sign), 2)


# Comparisons and choices

_COMPARISONS: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(name: str, kind: str) -> Function:
    """eq, lt, ... of two values; of NaN, only those that end in u and `nan` are true."""
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if kind not in FLOATS:
        return _COMPARISONS[name]
    if name.endswith("u") and name[:-1] in _COMPARISONS:
        compare = _COMPARISONS[name[:-1]]
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    return _COMPARISONS[name]


@_opcode("selp")
def _select(instruction: Instruction, noise: Noise) -> Arithmetic:
    kind = instruction.type
    return Arithmetic(lambda a, b, p: np.where(p, a, b), kind, (kind, kind, "pred"))


# Shifts and bits


@_opcode("shl", "shr")
def _shift(instruction: Instruction, noise: Noise) -> Arithmetic:
    kind = instruction.type
    of, bits = kind_of(kind), 8 * size_of(kind)
    left, signed = instruction.name == "shl", kind[0] == "s"

    def shift(value: Any, count: Any) -> Any:
        by = np.minimum(count, np.uint32(bits - 1)).astype(of)
        shifted = value << by if left else value >> by
        return shifted if signed and not left else np.where(count >= bits, of(0), shifted)

    return Arithmetic(shift, kind, (kind, "u32"))


@_opcode("shf")
def _funnel_shift(instruction: Instruction, noise: Noise) -> Arithmetic:
    instruction.only("l r wrap clamp")
    wrap, right = instruction.has("wrap"), instruction.has("r")

    def shift(low: Any, high: Any, count: Any) -> Any:
        both = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | low
        by = np.asarray(count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(
            np.uint64
        )
        shifted = both >> by if right else (both << by) >> np.uint64(32)
        return shifted.astype(np.uint32)

    return Arithmetic(shift, "b32", ("u32", "u32", "u32"))


@_opcode("bfe")
def _extract(instruction: Instruction, noise: Noise) -> Arithmetic:
    kind = instruction.type
    bits, signed = 8 * size_of(kind), kind[0] == "s"
    wide = np.int64 if signed else np.uint64

    def extract(value: Any, first: Any, count: Any) -> Any:
        start = np.asarray(first & np.uint32(255)).astype(wide)
        length = np.asarray(count & np.uint32(255)).astype(wide)
        # Bits past the last one are 0, or copies of the sign.
        rest = np.asarray(value).astype(wide) >> np.minimum(start, wide(63))
        rest = np.where((start >= bits) & (not signed), wide(0), rest)
        length = np.minimum(length, wide(64))
        above = np.minimum(wide(64) - length, wide(63))
        return np.where(length == 0, wide(0), (rest << above) >> above)

    return Arithmetic(extract, kind, (kind, "u32", "u32"))


@_opcode("bfi")
def _insert(instruction: Instruction, noise: Noise) -> Arithmetic:
    kind = instruction.type
    of, bits = UNSIGNED[size_of(kind)], 8 * size_of(kind)

    def insert(value: Any, into: Any, first: Any, count: Any) -> Any:
        start = np.minimum(first & np.uint32(255), np.uint32(bits))
        length = np.minimum(count & np.uint32(255), np.uint32(bits) - start)
        ones = np.asarray((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1))
        ones = np.where(length == 64, ~np.uint64(0), ones)
        by = np.minimum(start, np.uint32(63)).astype(np.uint64)
        mask = np.where(start == bits, np.uint64(0), ones << by).astype(of)
        moved = (np.asarray(value).astype(np.uint64) << by).astype(of)
        return (into & ~mask) | (moved & mask)

    return Arithmetic(insert, kind, (kind, kind, "u32", "u32"))


def _bits(values: Any) -> Any:
    """Bits of unsigned numbers [n] as [n, bits], the lowest first."""
    values = np.atleast_1d(values)
    octets = values.view(np.uint8).reshape(len(values), -1)
    return np.unpackbits(octets, axis=1, bitorder="little")


@_opcode("popc")
def _count_ones(instruction: Instruction, noise: Noise) -> Arithmetic:
    return Arithmetic(lambda a: _bits(a).sum(1).astype(np.uint32), "u32", (instruction.type,))


@_opcode("clz", "bfind")
def _leading(instruction: Instruction, noise: Noise) -> Arithmetic:
    """Clz counts the zeros above the highest 1; bfind is the place of that 1, or -1."""
    bits = 8 * size_of(instruction.type)
    instruction.only("")
    if instruction.type[0] == "s":
        raise Fault(f"{instruction.name} of a signed number is not implemented")

    def length(a: Any) -> Any:
        ones = _bits(a)
        return np.where(ones.any(1), bits - ones[:, ::-1].argmax(1), 0)

    if instruction.name == "clz":
        return Arithmetic(
            lambda a: (bits - length(a)).astype(np.uint32), "u32", (instruction.type,)
        )
    return Arithmetic(lambda a: (length(a) - 1).astype(np.uint32), "u32", (instruction.type,))


@_opcode("brev")
def _reverse(instruction: Instruction, noise: Noise) -> Arithmetic:
    def reverse(a: Any) -> Any:
        return np.packbits(_bits(a)[:, ::-1], axis=1, bitorder="little").view(
            kind_of(instruction.type)
        )[:, 0]

    return _same(instruction, reverse, 1)


@_opcode("prmt")
def _permute_bytes(instruction: Instruction, noise: Noise) -> Arithmetic:
    instruction.only("")

    def permute(low: Any, high: Any, selectors: Any) -> Any:
        both = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | low
        result = np.uint32(0)
        for place in range(4):
            selector = np.asarray(selectors >> np.uint32(4 * place) & np.uint32(15)).astype(
                np.uint64
            )
            octet = both >> (selector & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(octet & np.uint64(128), np.uint64(255), np.uint64(0))
            chosen = np.where(selector & np.uint64(8), sign, octet).astype(np.uint32)
            result = result | chosen << np.uint32(8 * place)
        return result

    return Arithmetic(permute, "b32", ("u32", "u32", "u32"))


@_opcode("lop3")
def _any_logic(instruction: Instruction, noise: Noise) -> Arithmetic:
    table = int(instruction.operands[4], 0)

    def logic(a: Any, b: Any, c: Any, _: Any) -> Any:
        result = np.zeros_like(np.asarray(a))
        for row in range(8):  # of the truth table of a, b, c
            if table >> row & 1:
                terms = (x if row >> k & 1 else ~x for x, k in ((a, 2), (b, 1), (c, 0)))
                result = result | reduce(np.bitwise_and, terms)
        return result

    return Arithmetic(logic, "b32", ("u32", "u32", "u32", "u32"))


# Conversions

_WHOLE = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@_opcode("cvt")
def _convert(instruction: Instruction, noise: Noise) -> Arithmetic:
    to, source = instruction.types
    instruction.only("rn ftz rzi rni rmi rpi" + (" rz rm rp" if to == "f64" else ""))
    whole = next(
        (_WHOLE[modifier] for modifier in instruction.modifiers if modifier in _WHOLE), None
    )
    if to in PACKED:  # of two numbers, the first of which becomes the upper half
        return Arithmetic(
            lambda high, low: np.stack(np.broadcast_arrays(low, high), -1), to, (source, source)
        )
    if source in FLOATS and to not in FLOATS:
        if whole is None:
            raise Fault("a conversion to an integer says how it rounds")
        return Arithmetic(_to_integer(whole, to), to, (source,))
    if source in FLOATS:
        small = instruction.has("ftz") and "f32" in (source, to)
        return Arithmetic(_to_float(whole, source, to, small), to, (source,))
    kind = kind_of(to) if to not in ("f16", "bf16") else np.float32
    if to in ("f16", "bf16"):
        return Arithmetic(lambda a: odd32(np.asarray(a).astype(np.float64)), to, (source,))
    return Arithmetic(lambda a: np.asarray(a).astype(kind), to, (source,))


def _to_integer(whole: Function, to: str) -> Function:
    kind = kind_of(to)
    least, most = np.iinfo(kind).min, np.iinfo(kind).max

    def convert(a: Any) -> Any:
        number = whole(np.asarray(a).astype(np.float64))
        inside = (number >= least) & (number < float(most) + 1)
        limit = np.where(number > 0, kind(most), kind(least))
        return np.where(
            np.isnan(number),
            kind(0),
            np.where(inside, np.where(inside, number, 0).astype(kind), limit),
        )

    return convert


def _to_float(whole: Function | None, source: str, to: str, flushes: bool) -> Function:
    def convert(a: Any) -> Any:
        number = np.asarray(a)
        if flushes and source == "f32":
            number = flush(number)
        if whole is not None:
            number = whole(number)
        if to in ("f16", "bf16"):
            return odd32(number) if source == "f64" else number
        number = number.astype(kind_of(to))
        return flush(number) if flushes and to == "f32" else number

    return convert
