"""How a divergence runs inside a Triton kernel: the functions it may call, its binding, and the policy for log 0.

A definition of :mod:`fastkd.divergences` (or a user's own) enters a kernel as a ``tl.constexpr`` function. It is the
same code object; only the names that it uses refer to the functions below instead of torch's.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from fastkd.call import log_zero
from fastkd.divergences import (
    VOCABULARY,
    WITH_EXACT_EXPONENTS,
    Divergence,
    takes_ratio,
)
from fastkd.divergences import (
    distance as distance_of_tensors,
)
from fastkd.divergences import (
    log_even_mixture as log_even_mixture_of_tensors,
)
from fastkd.divergences import (
    log_mixture as log_mixture_of_tensors,
)
from fastkd.divergences import (
    power as power_of_tensors,
)
from fastkd.divergences import (
    power_product as power_product_of_tensors,
)

# Kernels receive constants as defaults of parameters. Triton compares a global constexpr at every launch with its value
# at compile time, which costs 2 us of host time each (bench/studies/host.py).
LOWEST = torch.finfo(torch.float32).min
NEGLIGIBLE = log_zero.NEGLIGIBLE
INFINITE = log_zero.INFINITE
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
LOG2E_LOW = 1.925963033500011e-8  # log2(e) minus its float32


@triton.jit
def abs(x):  # noqa: A001 (the vocabulary has torch's names)
    """Return |x|."""
    return tl.abs(x)


@triton.jit
def scaled(difference, unit, LOG2E: tl.constexpr = LOG2E):
    """Return a difference of z as a tempered logit in base 2: difference * unit * log2(e)."""
    return difference * (unit * LOG2E)


@triton.jit
def exp2_of_scaled(
    x, difference, unit, EXACT: tl.constexpr, LOG2E: tl.constexpr = LOG2E,
    LOG2E_LOW: tl.constexpr = LOG2E_LOW, LN2: tl.constexpr = LN2,
):  # fmt: skip
    """Return 2 to the power x, where x is scaled(difference, unit).

    EXACT: with a first-order correction of what rounding x loses, which is up to eight units where the power is 1e-12.
    """
    power = tl.exp2(x)
    if EXACT:
        rate = unit * LOG2E
        rate_low = tl.fma(unit, LOG2E, -rate) + unit * LOG2E_LOW
        lost = tl.fma(difference, rate, -x) + difference * rate_low
        power = tl.where(power == 0.0, 0.0, power * (lost * LN2) + power)
    return power


@triton.jit
def exp_scaled(difference, unit):
    """Return the exponential of a difference of z, tempered by unit.

    The hardware has only powers of 2, and tl.exp multiplies by log2(e) for each column. Here that factor is part of the
    unit. tl.exp2 also flushes results below 1e-38 to 0, for which tl.exp needs three more instructions.
    """
    return tl.exp2(scaled(difference, unit))


@triton.jit
def exp(x):
    """Return e to the power x."""
    return exp_scaled(x, 1.0)


@triton.jit
def where(condition, x, y):
    """Return x where the condition holds, else y."""
    return tl.where(condition, x, y)


@triton.jit
def log1p(x):
    """Return log(1 + x), accurate near 0: a first-order term corrects the rounding of 1 + x."""
    u = 1.0 + x
    rounded = u - 1.0
    return tl.where(rounded == x, tl.log(u), tl.log(u) + (x - rounded) / u)


@triton.jit
def logaddexp(x, y):
    """Return log(exp(x) + exp(y)) for finite x and y.

    log1p(u), for u in [0, 1], is u times a polynomial that interpolates at Chebyshev nodes. Its relative error is 5e-9
    before rounding. It needs nine fused multiply-adds and no branch; tl.log needs twenty instructions and a branch.
    """
    u = exp(-tl.abs(x - y))
    series = -0.0031760570127516985 * u + 0.019542528316378593
    series = series * u - 0.05637361481785774
    series = series * u + 0.10543623566627502
    series = series * u - 0.1526966691017151
    series = series * u + 0.1966327428817749
    series = series * u - 0.24951615929603577
    series = series * u + 0.33329710364341736
    series = series * u - 0.49999892711639404
    return tl.maximum(x, y) + (series * u + 1.0) * u


@triton.jit
def expm1(x):
    """Return e to the power x, minus 1; near 0, where the difference cancels, a series of relative error 2e-8."""
    near = tl.minimum(tl.maximum(x, -0.5), 0.5)
    series = near * (1.0 / 40320.0) + 1.0 / 5040.0
    series = series * near + 1.0 / 720.0
    series = series * near + 1.0 / 120.0
    series = series * near + 1.0 / 24.0
    series = series * near + 1.0 / 6.0
    series = series * near + 0.5
    series = series * (near * near) + near
    return tl.where(tl.abs(x) < 0.5, series, exp(x) - 1.0)


@triton.jit
def _expm1_of_negative(x, exp_x):
    """Return expm1 of x <= 0, given its exponential, with a shorter series, whose relative error is 6e-9."""
    near = tl.maximum(x, -0.5)
    series = 0.0011642870 * near + 0.0082382213
    series = series * near + 0.0416499300
    series = series * near + 0.1666656276
    series = series * near + 0.4999999896
    series = series * (near * near) + near
    return tl.where(x > -0.5, series, exp_x - 1.0)


@triton.jit
def log_mixture(log_ratio, share, rest):
    """Return fastkd.divergences.log_mixture, without a branch and with one polynomial.

    The logarithm is log(f) + k log 2 with f in [sqrt(1/2), sqrt(2)). The polynomial in f - 1 is that of Cephes' logf.
    If k is 0, expm1 computes f - 1, so f - 1 is accurate however close to 0 it is.
    """
    above = log_ratio > 0.0
    lower = tl.where(above, rest, share)
    size = -tl.abs(log_ratio)
    ratio = exp(size)
    change = lower * _expm1_of_negative(size, ratio)
    total = tl.where(above, share, rest) + lower * ratio
    far = change < -0.29289322  # k is not 0; False for NaN
    bits = total.to(tl.int32, bitcast=True)
    power = tl.where(far, (bits - 0x3F3504F3) >> 23, 0)
    x = tl.where(far, (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0, change)
    series = 7.0376836292e-2 * x - 1.1514610310e-1
    series = series * x + 1.1676998740e-1
    series = series * x - 1.2420140846e-1
    series = series * x + 1.4249322787e-1
    series = series * x - 1.6668057665e-1
    series = series * x + 2.0000714765e-1
    series = series * x - 2.4999993993e-1
    series = series * x + 3.3333331174e-1
    series = (series * x - 0.5) * (x * x) + x
    return power.to(tl.float32) * 0.693147180559945 + series


@triton.jit
def log_even_mixture(log_ratio):
    """Return fastkd.divergences.log_even_mixture.

    With r = |log_ratio| it is log cosh(r / 2) - r / 2 up to 1.25, where the even function is r^2 times a polynomial of
    relative error 2e-8, and beyond that log1p(exp(-r)) - log 2, a polynomial in exp(-r) of error 1e-9.
    """
    size = tl.abs(log_ratio)
    square = size * size
    near = 1.56494246e-06 * square - 2.56289625e-05
    near = near * square + 3.46835398e-04
    near = near * square - 5.20825996e-03
    near = near * square + 1.24999998e-01
    near = (near * size - 0.5) * size
    ratio = exp(-size)
    far = -7.6661080e-02 * ratio + 1.7033771e-01
    far = far * ratio - 2.4472148e-01
    far = far * ratio + 3.3283427e-01
    far = far * ratio - 4.9997717e-01
    far = far * ratio + 9.9999961e-01
    far = far * ratio - 6.9314718e-01
    return tl.where(size < 1.25, near, far)


@triton.jit
def distance(p, q, log_ratio):
    """Return fastkd.divergences.distance.

    If p and q are close, it is (p + q) tanh(|log_ratio| / 2). The polynomial, a Chebyshev fit, is within 3e-9 of
    tanh(x / 2) / x. Apart from that, the subtraction is accurate to a few units.
    """
    size = tl.abs(log_ratio)
    square = size * size
    series = 3.646007099e-05 * square - 4.182397679e-04
    series = series * square + 4.165904131e-03
    series = series * square - 4.166660458e-02
    series = series * square + 0.5
    return tl.where(size < 0.8, (p + q) * (size * series), tl.abs(p - q))


@triton.jit
def _product_in_parts(log_x, high, low):
    """Return (exact, rest), whose sum is (high + low) log_x."""
    rounded = (log_x + 12288.0) - 12288.0
    return rounded * high, (log_x - rounded) * high + log_x * low


@triton.jit
def _exp_of_parts(exact, rest):
    """Return exp(exact + rest) as 2^k exp(r). k ln 2 is subtracted in two steps, of which the first is exact."""
    k = (
        tl.minimum(tl.maximum(exact, -100.0), 100.0) * 1.4426950408889634 + 12582912.0
    ) - 12582912.0
    r = ((exact - k * 0.693359375) + k * 2.12194440e-4) + rest
    return exp(r) * tl.exp2(k)


@triton.jit
def power(log_x, high, low):
    """Return fastkd.divergences.power."""
    exact, rest = _product_in_parts(log_x, high, low)
    return _exp_of_parts(exact, rest)


@triton.jit
def power_product(log_x, a_high, a_low, log_y, b_high, b_low):
    """Return fastkd.divergences.power_product."""
    x_exact, x_rest = _product_in_parts(log_x, a_high, a_low)
    y_exact, y_rest = _product_in_parts(log_y, b_high, b_low)
    return _exp_of_parts(x_exact + y_exact, x_rest + y_rest)


@triton.jit
def squash(x):
    """Return (tanh x, its derivative), each to a few units of roundoff for any x.

    The polynomial is that of Cephes' tanhf. The derivative is not computed as 1 - tanh^2, which cancels where tanh
    saturates.
    """
    e = exp(-2.0 * tl.abs(x))
    saturating = 1.0 - 2.0 * e / (1.0 + e)
    y = x * x
    series = -5.70498872745e-3 * y + 2.06390887954e-2
    series = series * y - 5.37397155531e-2
    series = series * y + 1.33314422036e-1
    series = series * y - 3.33332819422e-1
    small = series * y * x + x
    value = tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -saturating, saturating))
    return value, 4.0 * e / ((1.0 + e) * (1.0 + e))


_WORDS: dict[Callable[..., Any], Any] = {
    getattr(torch, word): globals()[word] for word in VOCABULARY if hasattr(torch, word)
} | {
    builtins.abs: abs,
    distance_of_tensors: distance,
    log_even_mixture_of_tensors: log_even_mixture,
    log_mixture_of_tensors: log_mixture,
    power_of_tensors: power,
    power_product_of_tensors: power_product,
}

# Bits of the number that describes a definition to a kernel: it is a function of probabilities, it takes log p - log q,
# it returns h, the rounding of exponents is corrected.
NORMALIZED, RATIO, H, EXACT = 1, 2, 4, 8


@functools.cache
def _results(function: Callable[..., Any]) -> int:
    """Return how many values a definition returns."""
    code = function.__code__
    ones = [torch.ones(1)] * code.co_argcount
    return len(function(*ones))


def form_of(divergence: Divergence) -> int:
    """Return the number that describes a definition to a kernel."""
    returns_h = _results(divergence.function) == 3
    return (
        NORMALIZED * divergence.normalized
        + RATIO * takes_ratio(divergence.function)
        + H * returns_h
        + EXACT * (divergence.normalized and divergence.function in WITH_EXACT_EXPONENTS)
    )


@functools.cache
def bind(function: Callable[..., Any]) -> Any:
    """Return a definition as a Triton function.

    Raises:
        TypeError: the definition is not a plain function, or uses a name outside the vocabulary.
    """
    name = getattr(function, "__qualname__", repr(function))
    if not isinstance(function, types.FunctionType) or function.__closure__:
        raise TypeError(
            f"the divergence function {name} must be a plain `def` that closes over nothing, for Triton"
        )
    try:
        text = inspect.getsource(function)
    except OSError as error:
        raise TypeError(
            f"the divergence function {name} must be a `def` in a file, for Triton"
        ) from error
    if not text.lstrip().startswith("def "):
        raise TypeError(
            f"the divergence function {name} must be an undecorated `def` in a file, for Triton"
        )
    words = {}
    for used in function.__code__.co_names:
        value = function.__globals__.get(used, getattr(builtins, used, None))
        word = _WORDS.get(value) if callable(value) else None
        if word is None:
            raise TypeError(
                f"the divergence function {name} uses {used!r}; Triton knows its parameters, arithmetic, comparisons, "
                f"and {', '.join(VOCABULARY)} imported from torch"
            )
        words[used] = word
    # The interpreter looks for triton.language among a function's globals.
    rebound = types.FunctionType(
        function.__code__, {**words, "tl": tl}, function.__name__, function.__defaults__
    )
    rebound.__module__, rebound.__qualname__ = function.__module__, function.__qualname__
    return triton.jit(rebound)


@triton.jit
def _settle(term, one_side, nothing, INFINITE: tl.constexpr = INFINITE):
    """Return a term with the policy for log 0: infinite if log 0 made it huge, and 0 if it counts for nothing."""
    term = tl.where(one_side & (tl.abs(term) > INFINITE), term * float("inf"), term)
    return tl.where(nothing, 0.0, term)


@triton.jit
def evaluate(
    DIVERGENCE: tl.constexpr,
    parameters,
    p,
    q,
    log_p,
    log_q,
    log_ratio,
    degree,
    POLICY: tl.constexpr,
    FORM: tl.constexpr,
    LOWEST: tl.constexpr = LOWEST,
    NEGLIGIBLE: tl.constexpr = NEGLIGIBLE,
):
    """Return (phi, g, h) of every column.

    POLICY: with the policy for log 0 of :func:`fastkd.call.log_zero.evaluate`. Without it, no logarithm may be -inf.
    p and q are not read if the divergence is a function of logits.
    """
    if FORM % 2 == 0:
        p = tl.full(log_p.shape, 1.0, tl.float32)
        q = p
    if POLICY:
        p_gone = log_p == -float("inf")
        q_gone = log_q == -float("inf")
        log_p = tl.where(p_gone, LOWEST, log_p)
        log_q = tl.where(q_gone, LOWEST, log_q)
        log_ratio = tl.where(p_gone | q_gone, log_p - log_q, log_ratio)
    if FORM // 2 % 2 == 1:
        terms = DIVERGENCE(p, q, log_p, log_q, log_ratio, *parameters)
    else:
        terms = DIVERGENCE(p, q, log_p, log_q, *parameters)
    phi, g = terms[0], terms[1]
    h = terms[2] if FORM // 4 % 2 == 1 else degree * phi - g
    if POLICY:
        one_side = p_gone ^ q_gone
        nothing = (p_gone & (q < NEGLIGIBLE)) | (q_gone & (p < NEGLIGIBLE)) | (p_gone & q_gone)
        phi = _settle(phi, one_side, nothing)
        g = _settle(g, one_side, nothing)
        h = _settle(h, one_side, nothing)
    return phi, g, h
