"""Each opcode of the PTX machine against NumPy or exact arithmetic, on special values and random bits."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
from support.ptx.faults import Fault
from support.ptx.launch import Kernel
from support.ptx.machine import Settings
from support.ptx.numbers import ERRORS
from support.ptx.program import Program

THREADS = 1024

# Special values and random bits overflow, and NumPy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
REGISTERS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}
FLOATS = {
    "f16": (np.uint16, 5, 10), "bf16": (np.uint16, 8, 7), "f32": (np.uint32, 8, 23), "f64": (np.uint64, 11, 52),
}  # fmt: skip


def special(kind: str) -> list[int]:
    """Bits of the values of a type at which code goes wrong."""
    if kind in FLOATS:
        _, exponent, digits = FLOATS[kind]
        infinity = ((1 << exponent) - 1) << digits
        one = ((1 << exponent - 1) - 1) << digits
        subnormal = [1, (1 << digits) - 1]
        positive = [
            0,
            *subnormal,
            1 << digits,
            one - 1,
            one,
            one + 1,
            infinity - 1,
            infinity,
            infinity + 1,
        ]
        return [*positive, *(bits | 1 << exponent + digits for bits in positive)]
    bits = int(kind[1:])
    top = 1 << bits - 1
    return [0, 1, 2, 31, 32, 33, 63, 64, 255, top - 1, top, 2 * top - 2, 2 * top - 1]


def operands(kinds: tuple[str, ...], seed: int = 1) -> list[Any]:
    """Bits of THREADS values per operand: combinations of special ones, and random bits."""
    generator = np.random.default_rng(seed)
    corners = np.array(list(product(*(special(k.removesuffix("x2")) for k in kinds))), object)
    corners = corners[generator.permutation(len(corners))[: THREADS // 2]]
    columns = []
    for number, kind in enumerate(kinds):
        size = _size(kind)
        bits = np.frombuffer(generator.bytes(THREADS * size), f"u{size}").copy()
        if kind == "f32":  # half of them of moderate size
            bits[::2] = generator.normal(0, 4, THREADS // 2).astype(np.float32).view(np.uint32)
        values = [int(x) & ((1 << 8 * size) - 1) for x in corners[:, number]]
        if kind.endswith("x2"):
            values = [x | values[-1 - k] << 16 for k, x in enumerate(values)]
        bits[: len(values)] = values
        columns.append(bits)
    return columns


def compute(
    opcode: str, result: str, kinds: tuple[str, ...], inputs: list[Any], settings: Any = None
) -> Any:
    """The bits that an instruction makes of operands, one per thread."""
    names = "abc"[: len(kinds)]
    size = 4 if result.endswith("x2") or result == "pred" else _size(result)
    output = np.zeros(THREADS, {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size])
    loads = "".join(
        f"ld.param.b64 %p{name}, [at_{name}]; mad.wide.u32 %p{name}, %t, {_size(kind)}, %p{name};"
        f"ld.global.{_memory(kind)} %{name}, [%p{name}];"
        for name, kind in zip(names, kinds, strict=True)
    )
    declared = "".join(
        f".reg .{REGISTERS[_size(kind)]} %{name}; .reg .b64 %p{name};"
        for name, kind in zip(names, kinds, strict=True)
    )
    target = ".reg .pred %q; .reg .b32 %d;" if result == "pred" else f".reg .{REGISTERS[size]} %d;"
    line = (
        opcode
        if "%" in opcode
        else f"{opcode} {'%q' if result == 'pred' else '%d'}, {', '.join('%' + n for n in names)};"
    )
    if result == "pred":
        line += " selp.b32 %d, 1, 0, %q;"
    parameters = ", ".join(f".param .b64 at_{name}" for name in ("d", *names))
    text = (
        f".visible .entry one({parameters}) {{ .reg .b32 %t; .reg .b64 %pd; {declared} {target} mov.u32 %t, %tid.x; {loads}"
        f"{line} ld.param.b64 %pd, [at_d]; mad.wide.u32 %pd, %t, {size}, %pd;"
        f"st.global.{_memory(result) if result != 'pred' else 'b32'} [%pd], %d; ret; }}"
    )
    arrays = [output, *inputs]
    Kernel(Program(text, "one")).launch(
        (1, 1, 1),
        THREADS,
        [int(array.ctypes.data).to_bytes(8, "little") for array in arrays],
        [(array.ctypes.data, array.nbytes) for array in arrays],
        settings=settings or Settings(),
    )
    return output


def _size(kind: str) -> int:
    if kind.endswith("x2"):
        return 8 if kind == "f32x2" else 4
    return FLOATS[kind][0](0).itemsize if kind in FLOATS else int(kind[1:]) // 8


def _memory(kind: str) -> str:
    return f"b{8 * _size(kind)}" if kind[0] != "s" else kind


def values(bits: Any, kind: str) -> Any:
    """Bits as numbers; of half-precision types, as float32; of packed types, [threads, 2]."""
    if kind.endswith("x2"):
        half = kind.removesuffix("x2")
        return values(bits.view(FLOATS[half][0]), half).reshape(-1, 2)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind in FLOATS:
        return bits.view({"f32": np.float32, "f64": np.float64}[kind])
    return bits.view({"s": f"i{_size(kind)}"}.get(kind[0], f"u{_size(kind)}"))


def _integers(kind: str, function: Callable[..., int]) -> Callable[..., Any]:
    """A function of Python's integers, wrapped to a type."""

    def wrapped(*columns: Any) -> Any:
        mask = (1 << 8 * _size(kind)) - 1
        return [function(*map(int, row)) & mask for row in zip(*columns, strict=True)]

    return wrapped


def _truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


INTEGERS: dict[str, tuple[str, tuple[str, ...], Callable[..., int]]] = {
    **{f"{name}.{kind}": (kind, (kind, kind), function)
       for kind in ("s16", "u16", "s32", "u32", "s64", "u64")
       for name, function in {
           "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b,
           "min": min, "max": max}.items()},
    **{f"{name}.b{bits}": (f"u{bits}", (f"u{bits}",) * 2, function)
       for bits in (16, 32, 64)
       for name, function in {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}.items()},
    **{f"not.b{bits}": (f"u{bits}", (f"u{bits}",), lambda a: ~a) for bits in (16, 32, 64)},
    **{f"neg.s{bits}": (f"s{bits}", (f"s{bits}",), lambda a: -a) for bits in (16, 32, 64)},
    **{f"mul.hi.{kind}": (kind, (kind, kind), lambda a, b, n=int(kind[1:]): a * b >> n) for kind in ("s32", "u32", "s64", "u64")},
    **{f"mul.wide.{kind}": (f"{kind[0]}{2 * int(kind[1:])}", (kind, kind), lambda a, b: a * b) for kind in ("s16", "u16", "s32", "u32")},
    **{f"mad.wide.{kind}": (f"{kind[0]}64", (kind, kind, f"{kind[0]}64"), lambda a, b, c: a * b + c) for kind in ("s32", "u32")},
    **{f"mad.lo.{kind}": (kind, (kind,) * 3, lambda a, b, c: a * b + c) for kind in ("s32", "u32", "s64")},
    "mad.hi.u32": ("u32", ("u32",) * 3, lambda a, b, c: (a * b >> 32) + c),
    **{f"shl.b{n}": (f"u{n}", (f"u{n}", "u32"), lambda a, b: a << b if b < 64 else 0) for n in (16, 32, 64)},
    **{f"shr.u{n}": (f"u{n}", (f"u{n}", "u32"), lambda a, b: a >> b) for n in (16, 32, 64)},
    **{f"shr.s{n}": (f"s{n}", (f"s{n}", "u32"), lambda a, b: a >> min(b, 70)) for n in (16, 32, 64)},
    "shf.r.wrap.b32": ("u32", ("u32",) * 3, lambda a, b, c: (b << 32 | a) >> (c & 31)),
    "shf.l.wrap.b32": ("u32", ("u32",) * 3, lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    "shf.r.clamp.b32": ("u32", ("u32",) * 3, lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    "shf.l.clamp.b32": ("u32", ("u32",) * 3, lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32),
    **{f"popc.b{n}": ("u32", (f"u{n}",), lambda a: a.bit_count()) for n in (32, 64)},
    **{f"clz.b{n}": ("u32", (f"u{n}",), lambda a, n=n: n - a.bit_length()) for n in (32, 64)},
    **{f"bfind.u{n}": ("u32", (f"u{n}",), lambda a: a.bit_length() - 1) for n in (32, 64)},
    **{f"brev.b{n}": (f"u{n}", (f"u{n}",), lambda a, n=n: int(f"{a:0{n}b}"[::-1], 2)) for n in (32, 64)},
    "lop3.b32 %d, %a, %b, %c, 0xE8;": ("u32", ("u32",) * 3, lambda a, b, c: a & b | a & c | b & c),
    "prmt.b32": ("u32", ("u32",) * 3, lambda a, b, c: _permuted(b << 32 | a, c)),
    **{f"bfe.u{n}": (f"u{n}", (f"u{n}", "u32", "u32"), lambda a, b, c: a >> (b & 255) & ((1 << (c & 255)) - 1)) for n in (32, 64)},
    **{f"bfe.s{n}": (f"s{n}", (f"s{n}", "u32", "u32"), lambda a, b, c: _signed_field(a, b & 255, c & 255)) for n in (32, 64)},
    "bfi.b32 %d, %a, %b, %c, 7;": ("u32", ("u32",) * 3, lambda a, b, c: _inserted(a, b, c & 255, 7)),
}  # fmt: skip


def _permuted(both: int, selectors: int) -> int:
    result = 0
    for place in range(4):
        selector = selectors >> 4 * place & 15
        octet = both >> 8 * (selector & 7) & 255
        octet = (255 if octet & 128 else 0) if selector & 8 else octet
        result |= octet << 8 * place
    return result


def _signed_field(a: int, start: int, length: int) -> int:
    """Python's integers continue with copies of the sign."""
    if length == 0:
        return 0
    field = a >> start & (1 << length) - 1
    return field - (1 << length) if field >> length - 1 else field


def _inserted(a: int, b: int, start: int, length: int) -> int:
    mask = (1 << length) - 1 << start & 0xFFFFFFFF
    return b & ~mask | a << start & mask


@pytest.mark.parametrize("opcode", INTEGERS)
def test_integers(opcode: str) -> None:
    result, kinds, function = INTEGERS[opcode]
    inputs = operands(kinds)
    actual = compute(opcode, result, kinds, inputs)
    expected = _integers(result, function)(
        *(values(x, k) for x, k in zip(inputs, kinds, strict=True))
    )
    assert actual.tolist() == expected


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "u16", "s16"])
@pytest.mark.parametrize("name", ["div", "rem"])
def test_division_of_integers(name: str, kind: str) -> None:
    """Toward 0; PTX leaves division by 0 open."""
    inputs = operands((kind, kind))
    inputs[1][inputs[1] == 0] = 3
    actual = compute(f"{name}.{kind}", kind, (kind, kind), inputs)
    quotient = _integers(
        kind, _truncated if name == "div" else lambda a, b: a - b * _truncated(a, b)
    )
    assert actual.tolist() == quotient(*(values(x, kind) for x in inputs))


def agree(actual: Any, expected: Any) -> None:
    """Equal bit for bit, but any NaN equals any other."""
    missing = np.isnan(expected)
    assert np.array_equal(np.isnan(actual), missing)
    assert np.array_equal(actual[~missing], expected[~missing])
    assert np.array_equal(np.signbit(actual[~missing]), np.signbit(expected[~missing]))


def to_bf16(x: Any) -> Any:
    """Rounded to bfloat16 by exact arithmetic with 8 digits."""
    x = np.asarray(x, np.float64)
    fraction, exponent = np.frexp(x)
    digits = np.minimum(8, exponent + 133)  # fewer below 2^-126
    rounded = np.ldexp(np.rint(np.ldexp(fraction, digits)), exponent - digits)
    return np.where(
        np.abs(rounded) >= 2.0**128,
        np.copysign(np.inf, x),
        np.where(np.isfinite(x) & (x != 0), rounded, x),
    )


ROUNDING = {
    "f16": lambda x: x.astype(np.float16),
    "bf16": to_bf16,
    "f32": lambda x: x.astype(np.float32),
    "f64": lambda x: x,
}


def flushed(x: Any) -> Any:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x)


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16", "f16x2", "bf16x2"])
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_sums_and_products(name: str, kind: str) -> None:
    inputs = operands((kind, kind))
    actual = values(compute(f"{name}.{kind}", kind, (kind, kind), inputs), kind)
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    with np.errstate(all="ignore"):
        exact = function(*(values(x, kind).astype(np.float64) for x in inputs))
        agree(
            actual,
            ROUNDING[kind.removesuffix("x2")](exact).astype(
                np.float64 if kind == "f64" else np.float32
            ),
        )


def test_sums_rounded_toward_zero() -> None:
    inputs = operands(("f32", "f32"))
    # Sums whose exact value is just below a float32, too close for float64 to tell.
    close = [
        np.resize(np.float32(x), len(inputs[0]))
        for x in ([1, -1, 1, 3e38, 2**-149], [-(2**-80), 2**-80, 2**-80, 3e38, 2**-149])
    ]
    for a, b in (close, [x.view(np.float32) for x in inputs]):
        given = [x.view(inputs[0].dtype) for x in (a, b)]
        actual = compute("add.rz.f32", "f32", ("f32", "f32"), given).view(np.float32)
        for x, y, found in zip(a, b, actual, strict=True):
            if not np.isfinite(x) or not np.isfinite(y):
                agree(np.array([found]), np.array([x + y]))
                continue
            exact = Fraction(float(x)) + Fraction(float(y))
            assert abs(Fraction(float(found))) <= abs(exact)
            further = np.nextafter(found, np.float32(np.inf if exact > 0 else -np.inf))
            assert (
                exact == Fraction(float(found))
                or not np.isfinite(further)
                or abs(Fraction(float(further))) > abs(exact)
            )


@pytest.mark.parametrize("name", ["add", "mul", "fma"])
def test_pairs_of_float32(name: str) -> None:
    """f32x2 in a register of 64 bits computes what two instructions of f32 do."""
    count = 3 if name == "fma" else 2
    lower, upper = (operands(("f32",) * count, seed) for seed in (1, 2))
    packed = [
        low | high.astype(np.uint64) << np.uint64(32)
        for low, high in zip(lower, upper, strict=True)
    ]
    rounding = ".rn" if name == "fma" else ""
    actual = compute(f"{name}{rounding}.f32x2", "u64", ("u64",) * count, packed).view(np.float32)
    for half, inputs in enumerate((lower, upper)):
        single = compute(f"{name}{rounding}.f32", "f32", ("f32",) * count, inputs)
        agree(actual[half::2], single.view(np.float32))


@pytest.mark.parametrize("name", ["add", "mul"])
def test_subnormal_numbers_are_flushed(name: str) -> None:
    inputs = operands(("f32", "f32"))
    actual = compute(f"{name}.ftz.f32", "f32", ("f32", "f32"), inputs).view(np.float32)
    with np.errstate(all="ignore"):
        function = {"add": np.add, "mul": np.multiply}[name]
        agree(
            actual,
            flushed(function(*(flushed(x.view(np.float32)) for x in inputs))).astype(np.float32),
        )


def _is_nearest(actual: Any, exact: Fraction, neighbours: tuple[Any, Any]) -> bool:
    distance = abs(Fraction(float(actual)) - exact)
    return all(
        not np.isfinite(x) or distance <= abs(Fraction(float(x)) - exact) for x in neighbours
    )


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_fused_multiply_add(kind: str) -> None:
    """Within half an ulp of the exact result, also where it cancels; an ulp in float64."""
    inputs = operands((kind,) * 3)
    wide = [values(x, kind).astype(np.float64) for x in inputs]
    with np.errstate(all="ignore"):  # sums that cancel all but the product's rounding
        product = ROUNDING[kind](-wide[0][512:] * wide[1][512:])
    inputs[2][512::2] = {"f16": lambda x: x.view(np.uint16), "bf16": lambda x: (x.astype(np.float32).view(np.uint32) >> 16),
                         "f32": lambda x: x.view(np.uint32), "f64": lambda x: x.view(np.uint64)}[kind](product)[::2]  # fmt: skip
    actual = compute(f"fma.rn.{kind}", kind, (kind,) * 3, inputs)
    a, b, c = (values(x, kind).astype(np.float64) for x in inputs)
    results = values(actual, kind).astype(np.float64)
    step = {"f32": lambda x, to: np.nextafter(np.float32(x), np.float32(to)), "f64": np.nextafter}
    for k in range(THREADS):
        if not np.isfinite([a[k], b[k], c[k]]).all():
            with np.errstate(all="ignore"):
                agree(results[k : k + 1], a[k : k + 1] * b[k : k + 1] + c[k : k + 1])
            continue
        exact = Fraction(a[k]) * Fraction(b[k]) + Fraction(c[k])
        if not np.isfinite(results[k]):
            assert abs(exact) > Fraction(
                float(
                    np.finfo(np.float16).max if kind == "f16" else 3e38 if kind != "f64" else 1e308
                )
            )
        elif kind == "f64":
            ulp = np.nextafter(abs(results[k]), 0) - abs(results[k])
            assert (
                abs(Fraction(results[k]) - exact)
                <= max(abs(Fraction(float(ulp))), Fraction(2**-1074)) * 2
            )
        elif kind == "f32":
            assert _is_nearest(
                results[k], exact, tuple(step[kind](results[k], to) for to in (-np.inf, np.inf))
            )
        else:
            # Rounding the exact result, by way of a float64 that keeps what is below it.
            nearest = float(exact)
            if (
                Fraction(nearest) != exact
                and kind == "bf16"
                and to_bf16(nearest)
                != to_bf16(np.nextafter(nearest, np.inf if exact > Fraction(nearest) else -np.inf))
            ):
                continue
            assert results[k] == float(ROUNDING[kind](np.float64(nearest)))


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16", "f16x2", "bf16x2"])
@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("keeps_nan", ["", ".NaN"])
def test_extremes(name: str, keeps_nan: str, kind: str) -> None:
    """Without .NaN, of a NaN and a number it is the number; -0 is less than 0."""
    if kind == "f64" and keeps_nan:
        pytest.skip("PTX has no min.NaN of f64")
    inputs = operands((kind, kind))
    actual = values(compute(f"{name}{keeps_nan}.{kind}", kind, (kind, kind), inputs), kind)
    a, b = (values(x, kind) for x in inputs)
    less = (a < b) | (a == b) & np.signbit(a)
    expected = np.where(less == (name == "min"), a, b)
    if keeps_nan:
        expected = np.where(np.isnan(a) | np.isnan(b), np.nan, expected)
    else:
        expected = np.where(np.isnan(a), b, np.where(np.isnan(b), a, expected))
    agree(actual, expected)


def test_extremes_of_three() -> None:
    a, b, c = operands(("f32",) * 3)
    actual = compute("max.f32", "f32", ("f32",) * 3, [a, b, c])
    two = compute("max.f32", "f32", ("f32",) * 2, [a, b])
    expected = compute("max.f32", "f32", ("f32",) * 2, [two, c])
    agree(actual.view(np.float32), expected.view(np.float32))


COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@pytest.mark.parametrize(
    "kind", ["s16", "u16", "s32", "u32", "s64", "u64", "f32", "f64", "f16", "bf16"]
)
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name: str, kind: str) -> None:
    """Ordered comparisons of NaN are false; those that end in u are true."""
    inputs = operands((kind, kind))
    a, b = (values(x, kind) for x in inputs)
    plain = np.array([eval(f"x {COMPARISONS[name]} y") for x, y in zip(a, b, strict=True)])
    unordered = np.isnan(a) | np.isnan(b) if kind in FLOATS else np.zeros(THREADS, bool)
    actual = compute(f"setp.{name}.{kind}", "pred", (kind, kind), inputs)
    assert np.array_equal(actual != 0, plain & ~unordered)
    if kind in FLOATS:
        actual = compute(f"setp.{name}u.{kind}", "pred", (kind, kind), inputs)
        assert np.array_equal(actual != 0, plain | unordered)
        actual = compute(f"setp.nan.{kind}", "pred", (kind, kind), inputs)
        assert np.array_equal(actual != 0, unordered)


def test_a_comparison_with_two_results_and_an_operation() -> None:
    inputs = operands(("s32", "s32"))
    line = (
        ".reg .pred %q, %o, %r; setp.lt.s32 %o, %a, 7; setp.gt.and.s32 %q|%r, %a, %b, !%o;"
        "selp.b32 %d, 2, 0, %r; @%q add.s32 %d, %d, 1;"
    )
    actual = compute(line, "u32", ("s32", "s32"), inputs)
    a, b = (x.view(np.int32) for x in inputs)
    other = ~(a < 7)
    assert np.array_equal(actual, 2 * (~(a > b) & other) + ((a > b) & other))


CONVERSIONS = ["f32", "f64", "f16", "bf16", "s16", "u16", "s32", "u32", "s64", "u64"]


@pytest.mark.parametrize("source", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("to", ["f32", "f64", "f16", "bf16"])
def test_conversions_between_floats(source: str, to: str) -> None:
    if source == to or {source, to} == {"bf16", "f16"} or {source, to} == {"bf16", "f64"}:
        return
    rounding = ".rn" if _size(to) < _size(source) else ""
    (bits,) = operands((source,))
    actual = values(compute(f"cvt{rounding}.{to}.{source}", to, (source,), [bits]), to)
    with np.errstate(all="ignore"):
        expected = ROUNDING[to](values(bits, source).astype(np.float64))
    agree(actual, expected.astype(actual.dtype))


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_a_packed_conversion_puts_its_first_operand_above(kind: str) -> None:
    inputs = operands(("f32", "f32"))
    actual = values(compute(f"cvt.rn.{kind}.f32", kind, ("f32", "f32"), inputs), kind)
    for half, bits in ((1, inputs[0]), (0, inputs[1])):
        with np.errstate(all="ignore"):
            expected = ROUNDING[kind.removesuffix("x2")](bits.view(np.float32).astype(np.float64))
        agree(actual[:, half], expected.astype(np.float32))


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("rounding", ["rzi", "rni", "rmi", "rpi"])
def test_conversions_to_integers(source: str, to: str, rounding: str) -> None:
    """They saturate, and NaN becomes 0."""
    (bits,) = operands((source,))
    actual = values(compute(f"cvt.{rounding}.{to}.{source}", to, (source,), [bits]), to)
    whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding]
    limits = np.iinfo(actual.dtype)
    for result, number in zip(
        actual.tolist(), whole(values(bits, source).astype(np.float64)).tolist(), strict=True
    ):
        if number != number:
            assert result == 0
        elif abs(number) == np.inf:
            assert result == (limits.max if number > 0 else limits.min)
        else:
            assert result == min(max(int(number), limits.min), limits.max)


@pytest.mark.parametrize("source", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("to", ["f32", "f64", "s32", "u32", "s64", "u64", "s16", "u16"])
def test_conversions_of_integers(source: str, to: str) -> None:
    if source == to:
        return
    (bits,) = operands((source,))
    rounding = ".rn" if to in FLOATS else ""
    actual = values(compute(f"cvt{rounding}.{to}.{source}", to, (source,), [bits]), to)
    for result, number in zip(actual, values(bits, source).tolist(), strict=True):
        if to in FLOATS:
            neighbours = (
                np.nextafter(result, result.dtype.type(-np.inf)),
                np.nextafter(result, result.dtype.type(np.inf)),
            )
            assert _is_nearest(result, Fraction(number), neighbours)
        else:
            assert int(result) & (1 << 8 * _size(to)) - 1 == number & (1 << 8 * _size(to)) - 1


APPROXIMATE: dict[str, Callable[..., Any]] = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "tanh": np.tanh,
}  # fmt: skip


@pytest.mark.parametrize("ftz", [".ftz", ""])
@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_functions(name: str, ftz: str) -> None:
    """Right to the last digit without noise; with it, off by up to the documented error, and by more than half of it."""
    if name == "tanh" and ftz:
        pytest.skip("PTX has no tanh.ftz")
    (bits,) = operands(("f32",))
    opcode = f"{name}.approx{ftz}.f32"
    clean, noisy = (
        compute(opcode, "f32", ("f32",), [bits], Settings(noise=noise)).view(np.float32)
        for noise in (False, True)
    )
    with np.errstate(all="ignore"):
        argument = bits.view(np.float32).astype(np.float64)
        exact = APPROXIMATE[name](flushed(argument) if ftz else argument)
        rounded = exact.astype(np.float32)
        agree(clean, (flushed(rounded) if ftz else rounded).astype(np.float32))
        size = np.maximum(np.abs(exact), 1) if name == "lg2" else np.abs(exact)
        normal = np.isfinite(exact) & (np.abs(exact) > 1e-36) & (np.abs(exact) < 1e38)
        error = np.abs(noisy - exact)[normal] / size[normal]
    assert np.array_equal(np.isnan(noisy), np.isnan(exact))
    assert ERRORS[name] / 2 < error.max() <= ERRORS[name] + 2**-24


@pytest.mark.parametrize(
    "opcode",
    [
        "div.rn.f32",
        "div.full.f32",
        "div.approx.f32",
        "div.rn.f64",
        "sqrt.rn.f32",
        "sqrt.rn.f64",
        "rcp.rn.f64",
    ],
)
def test_divisions_and_roots(opcode: str) -> None:
    name, *_, kind = opcode.split(".")
    kinds = (kind,) * (2 if name == "div" else 1)
    inputs = operands(kinds)
    actual = values(compute(opcode, kind, kinds, inputs), kind)
    function = {"div": np.divide, "sqrt": np.sqrt, "rcp": lambda x: 1 / x}[name]
    with np.errstate(all="ignore"):
        agree(actual, function(*(values(x, kind) for x in inputs)).astype(actual.dtype))


def test_a_coarse_reciprocal_has_20_digits() -> None:
    bits = np.random.default_rng(1).uniform(1, 2, THREADS).view(np.uint64)
    actual = compute("rcp.approx.ftz.f64", "f64", ("f64",), [bits]).view(np.float64)
    assert 2**-22 < np.abs(actual * bits.view(np.float64) - 1).max() <= 2**-19


@pytest.mark.parametrize(
    "opcode", ["neg.f32", "abs.f32", "abs.f64", "copysign.f32", "neg.bf16", "neg.f16x2"]
)
def test_signs(opcode: str) -> None:
    name, kind = opcode.split(".")
    kinds = (kind,) * (2 if name == "copysign" else 1)
    inputs = operands(kinds)
    actual = values(compute(opcode, kind, kinds, inputs), kind)
    function = {
        "neg": np.negative,
        "abs": np.abs,
        "copysign": lambda sign, x: np.copysign(x, sign),
    }[name]
    agree(actual, function(*(values(x, kind) for x in inputs)))


def test_mixed_precision() -> None:
    """add.f32.bf16 and fma.rn.f32.bf16 widen their half-precision operands."""
    inputs = operands(("bf16", "bf16", "f32"))
    a, b, c = values(inputs[0], "bf16"), values(inputs[1], "bf16"), inputs[2].view(np.float32)
    with np.errstate(all="ignore"):
        actual = compute("add.f32.bf16", "f32", ("bf16", "f32"), [inputs[0], inputs[2]])
        agree(actual.view(np.float32), a + c)
        actual = compute("fma.rn.f32.bf16", "f32", ("bf16", "bf16", "f32"), inputs)
        wide = [x.view(np.uint32) for x in (a.copy(), b.copy(), c.copy())]
        agree(
            actual.view(np.float32),
            compute("fma.rn.f32", "f32", ("f32",) * 3, wide).view(np.float32),
        )


def test_parts_of_registers() -> None:
    inputs = operands(("u64",))
    line = (
        ".reg .b32 %l, %h; .reg .b16 %w, %x, %y, %z; mov.b64 {%l, %h}, %a; mov.b32 {%w, %x}, %l; mov.b32 {%y, %z}, %h;"
        "mov.b32 %l, {%z, %y}; mov.b32 %h, {%x, %w}; mov.b64 %d, {%l, %h};"
    )
    actual = compute(line, "u64", ("u64",), inputs)
    assert np.array_equal(
        actual.view(np.uint16).reshape(-1, 4), inputs[0].view(np.uint16).reshape(-1, 4)[:, ::-1]
    )


@pytest.mark.parametrize(
    "opcode",
    ["add.cc.u32", "mul24.lo.u32", "mul.rz.f32", "cvt.rz.f32.f64", "add.ftz.f16", "ex2.approx.f64"],
)
def test_what_is_not_implemented_is_refused(opcode: str) -> None:
    kind = opcode.rsplit(".", 1)[-1]
    kinds = (kind,) if opcode[:3] in ("cvt", "ex2") else (kind, kind)
    with pytest.raises(Fault, match="is not implemented"):
        compute(
            opcode,
            opcode.split(".")[2] if opcode.startswith("cvt") else kind,
            kinds,
            operands(kinds),
        )
