"""The table of divergences. Each is defined by one function, which every backend uses.

A divergence between a teacher's probabilities p and a student's q is a sum over the vocabulary,
``D = sum_v phi(log p_v, log q_v)``. Its definition is one pure function

    (p, q, log_p, log_q, *params) -> (phi, g) or (phi, g, h)
                                        g = d phi / d log q,  h = d phi / d log p

The reference calls that function on tensors, the Triton kernel compiles the same code object, and ``csrc/generate.py``
translates it to a C++ functor. The gradients follow from g and h:

    dD/ds_v = (g_v - q_v sum_u g_u) / T              s: student logits, log q = log_softmax(s / T)
    dD/dt_v = (h_v - p_v sum_u h_u) / T              t: teacher logits

A definition that returns only (phi, g) has h = degree * phi - g (:class:`Divergence`). That difference loses digits if
p and q differ by orders of magnitude; definitions that can compute h directly therefore return it.

If the fifth argument of a definition is named ``log_ratio``, it receives log p - log q. It is computed as a difference
of logits minus one constant per row, so it has a single rounding error, while log_p - log_q has the errors of both
logarithms. Signs and ratios of p and q should be computed from log_ratio. The definitions below do so, and keep the
precision of phi and g as log_ratio tends to 0. Powers of p and q should be computed by ``power`` and ``power_product``,
since an exponential turns the rounding error of its argument into several units.

A definition may use only arithmetic, comparisons, its arguments and the functions in VOCABULARY. It does not handle
log 0: the skeletons do (:func:`fastkd.call.log_zero.evaluate` states the policy). The logarithm of a mixture must
be computed by ``logaddexp`` or ``log_mixture``, because ``log(beta * p + (1 - beta) * q)`` is log 0 if both p and q
underflow.

docs/adding-a-divergence.md explains how to add one.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import torch

# The functions that definitions may call. kernels/skeleton.py and csrc/cpu/vec.h provide the same names.
# A004: shadowing abs lets a definition read like its formula. F401: a name may be unused until a divergence needs it.
from torch import Tensor, abs, exp, expm1, log1p, logaddexp, where  # noqa: A004, F401

from fastkd.core.scalars import as_float, plain

VOCABULARY = (
    "abs", "exp", "expm1", "log1p", "logaddexp", "where", "log_mixture", "log_even_mixture", "distance", "power",
    "power_product",
)  # fmt: skip
ENTRY = ("p", "q", "log_p", "log_q")
RATIO = "log_ratio"


def log_mixture(log_ratio: Tensor, share: float, rest: float) -> Tensor:
    """Return log(m / max(p, q)) for the mixture m = share p + rest q, given log_ratio = log p - log q.

    share + rest must be 1. Add max(log_ratio, 0) to get log(m / q), and max(-log_ratio, 0) to get log(m / p). The
    result is exactly 0 where p = q.
    """
    p_smaller, q_smaller = (
        (log_ratio < 0.0).to(log_ratio.dtype),
        (log_ratio > 0.0).to(log_ratio.dtype),
    )
    smaller_share = p_smaller * share + q_smaller * rest
    larger_share = p_smaller * rest + q_smaller * share
    log_smaller_over_larger = -abs(log_ratio)
    change = smaller_share * expm1(log_smaller_over_larger)
    far = (larger_share + smaller_share * exp(log_smaller_over_larger)).log()
    # log1p is precise for small changes. Near -1 the sum of the two shares is more precise.
    return where(change > -0.3, log1p(change), far)


def log_even_mixture(log_ratio: Tensor) -> Tensor:
    """Return log_mixture for m = (p + q) / 2, which kernels compute in fewer steps."""
    return log_mixture(log_ratio, 0.5, 0.5)


def distance(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """Return |p - q|, given log_ratio = log p - log q, without the cancellation where p and q are close."""
    return -where(log_ratio > 0.0, p, q) * expm1(-abs(log_ratio))


def in_two_parts(exponent: float) -> tuple[float, float]:
    """Return (high, low) with high + low = exponent. high has six bits, as power and power_product require."""
    fraction, scale = math.frexp(exponent)
    high = math.ldexp(round(64.0 * fraction), scale - 6)
    return high, exponent - high


def power(log_x: Tensor, high: float, low: float) -> Tensor:
    """Return x to the power high + low, given log x, without the rounding error of (high + low) log x.

    That error would be relative to the exponent, and so several units of the result. high must have few bits
    (in_two_parts).
    """
    return _exp_of_parts(*_product_in_parts(log_x, high, low))


def power_product(
    log_x: Tensor, a_high: float, a_low: float, log_y: Tensor, b_high: float, b_low: float
) -> Tensor:
    """Return power(log_x, a_high, a_low) * power(log_y, b_high, b_low), also where a factor would overflow."""
    x_exact, x_rest = _product_in_parts(log_x, a_high, a_low)
    y_exact, y_rest = _product_in_parts(log_y, b_high, b_low)
    return _exp_of_parts(x_exact + y_exact, x_rest + y_rest)


# Adding and subtracting it rounds a float32 below 4096 to a multiple of 2^-10. A product with a number of six bits is
# then exact.
SHIFT = 12288.0


def _product_in_parts(log_x: Any, high: float, low: float) -> tuple[Any, Any]:
    """Return (exact, rest), whose sum is (high + low) log_x: a product without rounding error and a small number."""
    rounded = (log_x + SHIFT) - SHIFT
    return rounded * high, (log_x - rounded) * high + log_x * low


def _exp_of_parts(exact: Tensor, rest: Tensor) -> Tensor:
    """Return exp(exact + rest). A first-order term corrects the rounding of the sum."""
    total = exact + rest
    result = exp(total)
    lost = where(abs(total) < 80.0, (exact - total) + rest, 0.0)
    return result * lost + result


def derivatives(
    divergence: Divergence, p: Any, q: Any, log_p: Any, log_q: Any, log_ratio: Any
) -> tuple[Any, Any, Any]:
    """Evaluate a definition and return (phi, g, h). h is None if the definition neither returns it nor has a degree."""
    entry = arguments_of(divergence.function, p, q, log_p, log_q, log_ratio)
    terms = divergence.function(*entry, *divergence.params)
    if not isinstance(terms, (tuple, list)) or len(terms) not in (2, 3):
        raise TypeError(
            f"the function of the divergence {divergence.name!r} must return (phi, g) or (phi, g, h), "
            f"got {type(terms).__name__}"
        )
    phi, g = terms[:2]
    if len(terms) == 3:
        return phi, g, terms[2]
    return phi, g, None if divergence.degree is None else divergence.degree * phi - g


def has_teacher_derivative(divergence: Divergence) -> bool:
    """Whether a teacher can get a gradient: the definition returns h, or has a degree from which h follows."""
    one = torch.ones((), dtype=torch.float64)
    return (
        divergence.degree is not None
        or derivatives(divergence, one, one, 0.0 * one, 0.0 * one, 0.0 * one)[2] is not None
    )


def is_cross_entropy(divergence: Divergence) -> bool:
    """Whether the divergence is a multiple of the cross-entropy -sum p log q over all columns."""
    form = divergence.closed_form
    if form is None or divergence.target is not None:
        return False
    return form.cross != 0.0 and form.forward == form.reverse == 0.0


def floor_of(divergence: Divergence) -> float | None:
    """The floor of forward KL, which is for listed tokens only; None if the divergence has none."""
    # A graph must not depend on the function: a schedule of jsd's beta passes through forward_kl's.
    if divergence.made_by is not None:
        name, arguments = divergence.made_by
        floored = name == "forward_kl" and len(arguments) > 1 and arguments[1] > -math.inf
        return arguments[1] if floored else None
    return divergence.params[0] if divergence.function in LISTED_TOKENS_ONLY else None


def takes_ratio(function: Callable[..., Any]) -> bool:
    """Whether the fifth argument of a definition is log_ratio."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_varnames[4 : code.co_argcount][:1] == (RATIO,)


def arguments_of(
    function: Callable[..., Any], p: Any, q: Any, log_p: Any, log_q: Any, log_ratio: Any
) -> tuple[Any, ...]:
    """Return the arguments that precede the parameters of a definition."""
    entry = (p, q, log_p, log_q)
    return (*entry, log_ratio) if takes_ratio(function) else entry


# Definitions by name. A compiled graph can hold a string but not a function, so it stores the name.
_functions: dict[str, Callable[..., tuple[Any, Any]]] = {}


def function_name(function: Callable[..., Any]) -> str:
    """Return the name by which compiled graphs refer to a definition."""
    return f"{function.__module__}.{function.__name__}"


def function_named(name: str) -> Callable[..., tuple[Any, Any]]:
    """Return the definition with that name.

    Raises:
        KeyError: no fastkd.Divergence with that definition has been constructed in this process.
    """
    if name not in _functions:
        raise KeyError(
            f"the divergence function {name} is not registered in this process; construct its fastkd.Divergence before "
            "the compiled function runs, outside it"
        )
    return _functions[name]


@dataclass(frozen=True)
class ClosedForm:
    """Weights of three moments that give a divergence's value after a single sweep over the logits.

    With s' and t' the logits divided by the temperature, A = E_p[t' - s'], B = E_q[s' - t'] and C = E_p[-s']:

        D = forward (A - lse_t + lse_s) + reverse (B - lse_s + lse_t) + cross (C + lse_s)
        sum_v g_v = -forward + reverse (KL(q||p) + 1) - cross

    The second sweep, which would sum phi and g, is then skipped.

    Args:
        forward: weight of KL(p || q), finite.
        reverse: weight of KL(q || p), finite.
        cross: weight of the cross-entropy -sum p log q, finite.
    """

    forward: float = 0.0
    reverse: float = 0.0
    cross: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward", "reverse", "cross"):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))


@dataclass(frozen=True)
class Target:
    """The term of the label's token, for divergences that compare the other tokens separately.

    The label's column is excluded from every sum: p, q and their statistics cover the other tokens and are renormalized
    over them, so nothing cancels as the label's probability tends to 1. With p_y and q_y the label's probabilities, the
    term is

        binary   weight KL((p_y, 1 - p_y) || (q_y, 1 - q_y)), at the loss's temperature and multiplied by T^2
        label    -weight p_y log q_y, at temperature 1 and not multiplied by T^2

    Args:
        form: "binary" or "label".
        weight: factor of the term, finite and not negative.
    """

    form: str
    weight: float = 1.0

    FORMS = ("binary", "label")

    def __post_init__(self) -> None:
        if self.form not in self.FORMS:
            raise ValueError(f"form must be one of {', '.join(self.FORMS)}; got {self.form!r}")
        object.__setattr__(self, "weight", _weight("weight", self.weight))


@dataclass(frozen=True)
class Divergence:
    """A divergence between a teacher and a student distribution.

    Args:
        name: the name used in messages and in compiled graphs.
        function: the definition, ``(p, q, log_p, log_q, *params) -> (phi, g)``. The docstring of
            ``fastkd.divergences`` describes the optional argument log_ratio and the optional result h.
        params: the parameters passed to function, a sequence of numbers.
        degree: the degree in which phi is homogeneous in (p, q). Euler's identity then gives the teacher's derivative
            ``h = degree * phi - g``; an extra multiple of p in h is allowed, because the gradient's projection removes
            it. None: unknown; a teacher that requires grad raises.
        closed_form: the weights from which one sweep computes the value, or None.
        normalized: False for a function of the logits divided by the temperature, which are passed as log_p and log_q.
        target: the term of the label's token, if it is compared separately from the others; every row then needs a
            label.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    name: str
    function: Callable[..., tuple[Any, Any]] = field(repr=False)
    params: tuple[float, ...] = ()
    degree: float | None = None
    closed_form: ClosedForm | None = None
    normalized: bool = True
    target: Target | None = None
    # (name, arguments) of the function below that returned this divergence, from which compiled graphs construct it
    # again. None for a divergence constructed directly or by dataclasses.replace.
    made_by: tuple[str, tuple[float, ...]] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {type(self.name).__name__}")
        for argument, kind in (("closed_form", ClosedForm), ("target", Target)):
            value = getattr(self, argument)
            if not (value is None or isinstance(value, kind)):
                raise TypeError(
                    f"{argument} must be a {kind.__name__} or None, got {type(value).__name__}"
                )
        object.__setattr__(self, "normalized", plain(self.normalized))
        if not isinstance(self.normalized, bool):
            raise TypeError(
                f"normalized must be True or False, got {type(self.normalized).__name__}"
            )
        if not callable(self.function):
            raise TypeError(f"function must be callable, got {type(self.function).__name__}")
        if self.target is not None and not self.normalized:
            raise ValueError(
                "target must be None if normalized=False, because the label's term needs its probability; "
                f"got {self.target!r}"
            )
        if isinstance(self.params, (str, Tensor)) or not isinstance(self.params, Iterable):
            raise TypeError(f"params must be a tuple of numbers, got {type(self.params).__name__}")
        params = tuple(_number(f"params[{k}]", value) for k, value in enumerate(self.params))
        object.__setattr__(self, "params", params)
        if self.degree is not None:
            object.__setattr__(self, "degree", _finite("degree", self.degree))
        _functions[function_name(self.function)] = self.function


def _number(argument: str, value: Any) -> float:
    """Return value, a number or a one-element tensor, as a float."""
    value = plain(value)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__}")
    return as_float(value)


class _Deferred(Divergence):
    """A divergence during compilation. It records a constructor's name and arguments, and the op calls it at run time.

    The arguments may therefore change from step to step without a recompile, even to values for which the constructor
    returns another divergence, as jsd(0.0) returns forward_kl(). params is empty; the other fields are those of the
    default arguments.
    """


Parameters = ParamSpec("Parameters")


def _recorded(make: Callable[Parameters, Divergence]) -> Callable[Parameters, Divergence]:
    """Decorator that records in the divergence the name and arguments of the function that returned it."""
    name = make.__name__
    defaults = [(key, value.default) for key, value in inspect.signature(make).parameters.items()]

    @functools.wraps(make)
    def recorded(*values: Parameters.args, **named: Parameters.kwargs) -> Divergence:
        by_keyword = defaults[len(values) :]
        arguments: tuple[Any, ...] = (
            *values,
            *(named.get(key, value) for key, value in by_keyword),
        )
        # A compiled graph takes the arguments as inputs, and an infinite one costs it another graph. Those left out at
        # the end are infinite for "none" and need not be recorded.
        while (
            len(arguments) > len(values)
            and defaults[len(arguments) - 1][0] not in named
            and arguments[-1] in (math.inf, -math.inf)
        ):
            arguments = arguments[:-1]
        deferrable = len(values) + len(named) <= len(defaults) and all(
            isinstance(argument, (int, float)) for argument in arguments
        )
        if torch.compiler.is_compiling() and deferrable:
            return _deferred(name, arguments)
        divergence = make(*values, **named)
        object.__setattr__(divergence, "made_by", (name, tuple(map(as_float, arguments))))
        return divergence

    return recorded


def _deferred(name: str, arguments: tuple[float, ...]) -> Divergence:
    default = _DEFAULTS[name]
    divergence = _Deferred(
        default.name, default.function, (), default.degree, default.closed_form, default.normalized,
        default.target,
    )  # fmt: skip
    object.__setattr__(divergence, "made_by", (name, arguments))
    return divergence


def made(name: str, arguments: Sequence[float]) -> Divergence:
    """Return the divergence of the table with that name and these parameters."""
    return (TABLE | WITH_LABELS)[name](*arguments)


def _unit(argument: str, value: float, *, open_right: bool = False) -> float:
    value = _number(argument, value)
    if not (0.0 <= value < 1.0 or (value == 1.0 and not open_right)):
        raise ValueError(f"{argument} must be in [0, 1{')' if open_right else ']'}, got {value}")
    return value


def _finite(argument: str, value: float) -> float:
    value = _number(argument, value)
    if not math.isfinite(value):
        raise ValueError(f"{argument} must be finite, got {value}")
    return value


def _weight(argument: str, value: float) -> float:
    value = _finite(argument, value)
    if value < 0:
        raise ValueError(f"{argument} must not be negative, got {value}")
    return value


# Terms above this would count as infinite (fastkd.call.log_zero), so a larger clip would clip nothing.
LARGEST_CLIP = 1e6


def _clip(value: float) -> float:
    value = _number("clip", value)
    if not (0.0 < value <= LARGEST_CLIP or value == math.inf):
        raise ValueError(
            f"clip must be positive and at most {LARGEST_CLIP:g}, or infinity for none; got {value}"
        )
    return value


def _forward_kl(p, q, log_p, log_q, log_ratio):
    phi = p * log_ratio
    return phi, -p, phi + p


def _floored_forward_kl(p, q, log_p, log_q, floor):
    x = where(log_p < floor, floor, log_p)
    y = where(log_q < floor, floor, log_q)
    floored_p = exp(x)
    return floored_p * (x - y), -where(log_q < floor, 0.0, floored_p)


@_recorded
def forward_kl(clip: float = math.inf, floor: float = -math.inf) -> Divergence:
    """KL(p || q) = sum p (log p - log q), the loss of Hinton, Vinyals and Dean (2015).

    Args:
        clip: the largest contribution of one token, as in :func:`jsd`.
        floor: for a :class:`fastkd.TopK` with tail="truncate"; any other teacher raises. Log-probabilities of both
            models below this value are replaced by it (verl's log_prob_min_clamp): with x = max(log p, floor) and
            y = max(log q, floor), a listed token contributes e^x (x - y). A token with log q < floor has no gradient of
            its own, though the softmax couples its logit to the others. The floor changes neither measures nor parts
            other than the loss. Negative; -infinity for none. It cannot be combined with a clip.
    """
    clip, floor = _clip(clip), _number("floor", floor)
    if not floor < 0.0:
        raise ValueError(f"floor must be negative, or -infinity for none; got {floor}")
    if floor > -math.inf:
        if clip < math.inf:
            raise ValueError(
                f"floor cannot be combined with a clip; got floor={floor}, clip={clip}"
            )
        return Divergence("forward_kl with a floor", _floored_forward_kl, (floor,))
    if clip < math.inf:
        return Divergence("forward_kl with a clip", _clipped_mixture, (1.0, 0.0, clip))
    return Divergence("forward_kl", _forward_kl, degree=1.0, closed_form=ClosedForm(forward=1.0))


def _reverse_kl(p, q, log_p, log_q, log_ratio):
    phi = -q * log_ratio
    return phi, phi + q, -q


@_recorded
def reverse_kl(clip: float = math.inf) -> Divergence:
    """KL(q || p) = sum q (log q - log p), which is mode-seeking (MiniLLM, Gu et al. 2024).

    Args:
        clip: the largest contribution of one token, as in :func:`jsd`.
    """
    clip = _clip(clip)
    if clip < math.inf:
        return Divergence("reverse_kl with a clip", _clipped_mixture, (0.0, 1.0, clip))
    return Divergence("reverse_kl", _reverse_kl, degree=1.0, closed_form=ClosedForm(reverse=1.0))


def _mixture(p, q, log_p, log_q, log_ratio, forward, reverse, more):
    # more is forward - reverse. If it is 0, all terms tend to 0 as p tends to q, and no phi is negative.
    size = distance(p, q, log_ratio)
    gap = where(log_ratio > 0.0, size, -size)  # p - q
    phi = (reverse * gap + more * p) * log_ratio
    g = -forward * gap - reverse * q * log_ratio - more * q
    return phi, g, forward * p * log_ratio + reverse * gap + more * p


def _clipped_mixture(p, q, log_p, log_q, log_ratio, forward, reverse, clip):
    onward = forward * p * log_ratio
    backward = -reverse * q * log_ratio
    gap = reverse * q - forward * p
    phi = onward + backward
    g = where(phi > clip, 0.0, backward + gap)
    return where(phi > clip, clip, phi), g, where(phi > clip, 0.0, onward - gap)


@_recorded
def mixture(forward: float = 0.5, reverse: float = 0.5, clip: float = math.inf) -> Divergence:
    """Weighted sum: forward KL(p || q) + reverse KL(q || p).

    Args:
        forward: weight of KL(p || q), finite and not negative.
        reverse: weight of KL(q || p), finite and not negative; the two must not both be 0.
        clip: the largest contribution of one token, weights included, as in :func:`jsd`.
    """
    forward, reverse = _weight("forward", forward), _weight("reverse", reverse)
    if forward == reverse == 0:
        raise ValueError("forward and reverse must not both be 0")
    clip = _clip(clip)
    if clip < math.inf:
        return Divergence("mixture with a clip", _clipped_mixture, (forward, reverse, clip))
    # Not from a closed form: if p is close to q, it would be a small difference of moments.
    return Divergence("mixture", _mixture, (forward, reverse, forward - reverse), degree=1.0)


def _soft_cross_entropy(p, q, log_p, log_q, weight):
    return -weight * p * log_q, -weight * p


@_recorded
def soft_cross_entropy() -> Divergence:
    """-sum p log q: forward KL plus the teacher's entropy, with the same student gradient.

    Its exact teacher derivative is h = phi. Degree 1 gives h = phi - g = phi + p, which differs by a multiple of p and
    so has the same gradient.
    """
    return Divergence(
        "soft_cross_entropy",
        _soft_cross_entropy,
        (1.0,),
        degree=1.0,
        closed_form=ClosedForm(cross=1.0),
    )


def _jsd(p, q, log_p, log_q, log_ratio, beta, rest):
    # rest is 1 - beta. Either above_q or above_p is 0.
    log_m = log_mixture(log_ratio, beta, rest)
    above_q = where(log_ratio > 0.0, log_ratio, 0.0)
    above_p = where(log_ratio < 0.0, -log_ratio, 0.0)
    g = -rest * q * (above_q + log_m)
    h = -beta * p * (above_p + log_m)
    return g + h, g, h


def _even_jsd(p, q, log_p, log_q, log_ratio):
    # Swapping p and q swaps g and h and leaves every operation of phi as it is, so the result is exactly symmetric.
    log_m = log_even_mixture(log_ratio)
    above_q = where(log_ratio > 0.0, log_ratio, 0.0)
    phi = -0.5 * ((p + q) * log_m + where(log_ratio > 0.0, q, p) * abs(log_ratio))
    return phi, -0.5 * q * (above_q + log_m), -0.5 * p * ((above_q - log_ratio) + log_m)


def _clipped_jsd(p, q, log_p, log_q, log_ratio, beta, rest, clip):
    log_m = log_mixture(log_ratio, beta, rest)
    above_q = where(log_ratio > 0.0, log_ratio, 0.0)
    above_p = where(log_ratio < 0.0, -log_ratio, 0.0)
    g = -rest * q * (above_q + log_m)
    h = -beta * p * (above_p + log_m)
    phi = g + h
    return where(phi > clip, clip, phi), where(phi > clip, 0.0, g), where(phi > clip, 0.0, h)


@_recorded
def jsd(beta: float = 0.5, clip: float = math.inf) -> Divergence:
    """Generalized Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    The endpoints follow the convention of GKD (Agarwal et al. 2024): beta = 0 is KL(p || q) and beta = 1 is
    KL(q || p), the limits of JSD / beta and JSD / (1 - beta). The formula itself is 0 at both endpoints.

    **The clip** is that of OPSD (Zhao et al. 2026): if phi_v is the contribution of token v, D = sum min(phi_v, clip).
    A token above the clip contributes the clip, and its derivative by log p and log q is 0, so its logit only has the
    gradient that the softmax passes on from the others: (g_v - q_v sum g) / T with g_v = 0. A sum of clipped
    contributions can be negative, because single contributions of a KL divergence can be. The clip is compared before
    T^2 and weights multiply, and also applies to the tail of a :class:`fastkd.TopK` with tail="bucket".

    Args:
        beta: weight of the teacher in the mixture, in [0, 1].
        clip: the largest contribution of one token, positive and at most 1e6; infinity for none. OPSD uses 0.05.
    """
    beta, clip = _unit("beta", beta), _clip(clip)
    if beta in (0.0, 1.0):
        return reverse_kl(clip) if beta else forward_kl(clip)
    if clip < math.inf:
        return Divergence("jsd with a clip", _clipped_jsd, (beta, 1.0 - beta, clip))
    if beta == 0.5:
        return Divergence("jsd", _even_jsd, degree=1.0)
    return Divergence("jsd", _jsd, (beta, 1.0 - beta), degree=1.0)


def _skew_forward_kl(p, q, log_p, log_q, log_ratio, alpha, rest, odds, if_far, if_near):
    # rest is 1 - alpha, and odds is rest / alpha.
    log_m = log_mixture(log_ratio, alpha, rest)
    cost = where(log_ratio < 0.0, -log_ratio, 0.0) + log_m  # log(m / p)
    # rest p q / m, of the lower of p and q: an exponential of log_ratio would have several units of error.
    of_q = rest * where(log_ratio > 0.0, q, p) * exp(-log_m)
    # The projection ignores a multiple of p in h; `shift` times p is added (skew_forward_kl). Where p is far above q,
    # cost tends to log alpha, and without the shift the projection would subtract nearly equal numbers. There,
    # log(m / (alpha p)) is computed directly. if_far is rest + shift - log alpha, and if_near is rest + shift.
    less = rest * expm1(-(where(log_ratio > 0.0, log_ratio, 0.0) + log_m))  # rest (q / m - 1)
    far = less + if_far - log1p(odds * exp(-abs(log_ratio)))
    h = p * where(log_ratio > 1.0, far, less - cost + if_near)
    return -p * cost, -of_q, h


@_recorded
def skew_forward_kl(alpha: float = 0.1) -> Divergence:
    """KL(p || m), m = alpha p + (1 - alpha) q (DistiLLM, Ko et al. 2024).

    Args:
        alpha: the skew, in [0, 1); 0 is forward KL.
    """
    alpha = _unit("alpha", alpha, open_right=True)
    if alpha == 0.0:
        return forward_kl()
    # log alpha, but not a number so large that its rounding would matter where p is close to q.
    rest, shift = 1.0 - alpha, max(math.log(alpha), -2.5)
    params = (alpha, rest, rest / alpha, rest + shift - math.log(alpha), rest + shift)
    return Divergence("skew_forward_kl", _skew_forward_kl, params, degree=1.0)


def _skew_reverse_kl(p, q, log_p, log_q, log_ratio, alpha, rest):
    log_m = log_mixture(log_ratio, rest, alpha)
    cost = where(log_ratio > 0.0, log_ratio, 0.0) + log_m  # log(m / q)
    of_p = rest * where(log_ratio < 0.0, p, q) * exp(-log_m)  # rest p q / m, as in _skew_forward_kl
    return -q * cost, of_p - q * cost, -of_p


@_recorded
def skew_reverse_kl(alpha: float = 0.1) -> Divergence:
    """KL(q || m), m = (1 - alpha) p + alpha q (DistiLLM, Ko et al. 2024); the gradient goes through m.

    Args:
        alpha: the skew, in [0, 1); 0 is reverse KL.
    """
    alpha = _unit("alpha", alpha, open_right=True)
    if alpha == 0.0:
        return reverse_kl()
    return Divergence("skew_reverse_kl", _skew_reverse_kl, (alpha, 1.0 - alpha), degree=1.0)


def _tvd(p, q, log_p, log_q, log_ratio):
    sign = where(log_ratio < 0.0, 1.0, 0.0) - where(log_ratio > 0.0, 1.0, 0.0)
    return 0.5 * distance(p, q, log_ratio), 0.5 * q * sign, -0.5 * p * sign


@_recorded
def tvd() -> Divergence:
    """Total variation distance, 1/2 sum |p - q| (f-distill, Wen et al. 2023); subgradient 0 where p = q."""
    return Divergence("tvd", _tvd, degree=1.0)


def _hellinger(p, q, log_p, log_q, log_ratio):
    # sqrt(p q) is the larger of p and q times a power of their ratio. Its error is less than that of a power of p.
    size = -0.5 * abs(log_ratio)
    change = expm1(size)  # (smaller root - larger root) / larger root
    below = 0.5 * where(log_ratio > 0.0, p, q) * change
    of_top = -below
    of_other = below * exp(size)
    g = where(log_ratio > 0.0, of_other, of_top)
    return below * change, g, where(log_ratio > 0.0, of_top, of_other)


@_recorded
def hellinger() -> Divergence:
    """Squared Hellinger distance, 1/2 sum (sqrt p - sqrt q)^2 = 1 - sum sqrt(p q)."""
    return Divergence("hellinger", _hellinger, degree=1.0)


def _alpha_beta(
    p, q, log_p, log_q, log_ratio, alpha, beta, coefficient, p_share, q_share, whole, part, rest
):
    # For positive exponents. Every term is (a power of the ratio, minus 1) times max(p, q) to the power of
    # whole + rest = alpha + beta. whole is 0 or 1, and part is 1 - whole. The exponential multiplies the rounding error
    # of log p by rest, which is smaller than alpha + beta.
    size = -abs(log_ratio)
    larger = whole * where(log_ratio > 0.0, p, q) + part
    change = rest * where(log_ratio > 0.0, log_p, log_q)
    top = (
        coefficient * larger * exp(where(change < 40.0, change, 40.0))
    )  # a larger exponent occurs only if larger is 0
    a = expm1(alpha * size)
    b = expm1(beta * size)
    both = a + b + a * b
    phi = top * where(log_ratio > 0.0, q_share * both - b, p_share * both - a)
    # The compiler takes these exponentials from those of expm1.
    cross = where(log_ratio > 0.0, exp(beta * size), exp(alpha * size))
    g = beta * top * a * where(log_ratio > 0.0, cross, -1.0)
    return phi, g, alpha * top * b * where(log_ratio > 0.0, -1.0, cross)


def _alpha_beta_of_any_sign(
    p, q, log_p, log_q, log_ratio, a, a_low, b, b_low, degree, degree_low, coefficient, p_share
):
    # Where p is close to q, pairs of terms cancel. There each pair is replaced by its exact difference, a power of the
    # ratio minus 1. a + a_low is alpha, and likewise for beta and the degree.
    size = abs(log_ratio)
    cross = power_product(log_p, a, a_low, log_q, b, b_low)
    p_power = power(log_p, degree, degree_low)
    q_power = power(log_q, degree, degree_low)
    alpha = a + a_low
    beta = b + b_low
    less_a = expm1(where(size < 1.0, alpha * log_ratio, 0.0))
    less_b = expm1(where(size < 1.0, -beta * log_ratio, 0.0))
    both = expm1(where(size < 1.0, (degree + degree_low) * log_ratio, 0.0))
    apart = p_share * p_power + (1.0 - p_share) * q_power - cross
    phi = coefficient * where(size < 1.0, q_power * (p_share * both - less_a), apart)
    g = coefficient * beta * where(size < 1.0, -q_power * less_a, q_power - cross)
    return phi, g, coefficient * alpha * where(size < 1.0, -p_power * less_b, p_power - cross)


def _alpha_beta_at_beta_0(p, q, log_p, log_q, log_ratio, high, low):
    p_power = power(log_p, high, low)
    q_power = power(log_q, high, low)
    alpha = high + low
    ratio = alpha * log_ratio
    lower = expm1(-abs(ratio))
    gap = where(ratio > 0.0, p_power * lower, -q_power * lower) / alpha  # q^a - p^a
    h = p_power * log_ratio
    return (h + gap) / alpha, gap, h


def _alpha_beta_at_alpha_0(p, q, log_p, log_q, log_ratio, high, low):
    p_power = power(log_p, high, low)
    q_power = power(log_q, high, low)
    beta = high + low
    ratio = beta * log_ratio
    lower = expm1(-abs(ratio))
    gap = where(ratio > 0.0, -p_power * lower, q_power * lower) / beta  # p^b - q^b
    g = -q_power * log_ratio
    return (g + gap) / beta, g, gap


def _alpha_beta_at_sum_0(p, q, log_p, log_q, log_ratio, high, low):
    alpha = high + low
    ratio = alpha * log_ratio
    more = where(abs(ratio) < 1.0, expm1(ratio), power(log_ratio, high, low) - 1.0)
    return (more - ratio) / (alpha * alpha), -more / alpha


def _half_squared_gap(p, q, log_p, log_q, log_ratio):
    return 0.5 * log_ratio * log_ratio, -log_ratio


@_recorded
def alpha_beta(alpha: float = 0.2, beta: float = 0.7) -> Divergence:
    """Alpha-beta divergence (Cichocki et al. 2011; ABKD, Wang et al. 2025).

        -1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]

    At zero exponents it is defined by continuity:

        b = 0:       1/a^2 sum [p^a log(p^a/q^a) - p^a + q^a]     (a = 1: forward KL)
        a = 0:       1/b^2 sum [q^b log(q^b/p^b) - q^b + p^b]     (b = 1: reverse KL)
        a + b = 0:   1/a^2 sum [(p/q)^a - log((p/q)^a) - 1]
        a = b = 0:   1/2 sum (log p - log q)^2

    Args:
        alpha: exponent a of the teacher's probabilities, finite.
        beta: exponent b of the student's probabilities, finite.
    """
    a, b = _finite("alpha", alpha), _finite("beta", beta)
    if a == 0.0 and b == 0.0:
        return Divergence("alpha_beta_at_0", _half_squared_gap, degree=0.0)
    if b == 0.0:
        return Divergence("alpha_beta_at_beta_0", _alpha_beta_at_beta_0, in_two_parts(a), degree=a)
    if a == 0.0:
        return Divergence(
            "alpha_beta_at_alpha_0", _alpha_beta_at_alpha_0, in_two_parts(b), degree=b
        )
    if a + b == 0.0:
        return Divergence("alpha_beta_at_sum_0", _alpha_beta_at_sum_0, in_two_parts(a), degree=0.0)
    degree, shares = a + b, (1.0 / (a * b), a / (a + b), b / (a + b))
    if a < 0.0 or b < 0.0:
        parts = (*in_two_parts(a), *in_two_parts(b), *in_two_parts(degree))
        return Divergence("alpha_beta", _alpha_beta_of_any_sign, (*parts, *shares[:2]), degree)
    whole = 1.0 if degree > 0.5 else 0.0
    params = (a, b, *shares, whole, 1.0 - whole, degree - whole)
    return Divergence("alpha_beta", _alpha_beta, params, degree)


@_recorded
def squared_error() -> Divergence:
    """1/2 sum (s - t)^2 on the logits (Bucila et al. 2006; Ba and Caruana 2014).

    For logits with mean 0 it is the limit of V T^2 KL at high temperature. It is computed from s / T and t / T, so the
    value does not depend on T if scale_by_temperature is True.
    """
    return Divergence("squared_error", _half_squared_gap, degree=0.0, normalized=False)


def _smooth_l1(p, q, log_p, log_q, log_ratio, beta):
    size = abs(log_ratio)
    phi = where(size < beta, 0.5 * log_ratio * log_ratio / beta, size - 0.5 * beta)
    return phi, where(size < beta, -log_ratio / beta, where(log_ratio < 0.0, 1.0, -1.0))


@_recorded
def smooth_l1(beta: float = 1.0) -> Divergence:
    """Smooth L1 distance of the logits: the sum over x = s - t of x^2 / (2 beta) if |x| < beta, else |x| - beta / 2.

    The same as torch.nn.functional.smooth_l1_loss summed over the vocabulary (Girshick 2015), computed from s / T and
    t / T.

    Args:
        beta: the |x| at which the quadratic becomes linear; positive and finite.
    """
    beta = _finite("beta", beta)
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return Divergence("smooth_l1", _smooth_l1, (beta,), degree=0.0, normalized=False)


@_recorded
def dkd(alpha: float = 1.0, beta: float = 8.0) -> Divergence:
    """Decoupled knowledge distillation (DKD, Zhao et al. 2022): alpha TCKD + beta NCKD. Every row needs a label y.

        TCKD = KL((p_y, 1 - p_y) || (q_y, 1 - q_y))
        NCKD = KL(p' || q'), with p' and q' the probabilities of the other tokens, renormalized without y

    Since KL(p || q) = TCKD + (1 - p_y) NCKD, plain KL hardly weights the other tokens if the teacher is confident; here
    beta sets their weight. NCKD is computed from sums that exclude the label, without dividing by 1 - p_y.

    Args:
        alpha: weight of TCKD, finite and not negative; unrelated to the alpha of :func:`fastkd.kd_loss`.
        beta: weight of NCKD, finite and not negative. The authors use 1 to 10 on CIFAR-100, 0.5 and 2 on ImageNet.
    """
    alpha, beta = _weight("alpha", alpha), _weight("beta", beta)
    target = Target("binary", alpha)
    form = ClosedForm(forward=beta)
    return Divergence("dkd", _clipped_mixture, (beta, 0.0, math.inf), 1.0, form, target=target)


@_recorded
def nkd(gamma: float = 1.5) -> Divergence:
    """Normalized knowledge distillation (NKD, Yang et al. 2023): -p_y log q_y - gamma T^2 sum p' log q'.

    Every row needs a label y. p_y and q_y are its probabilities at temperature 1; p' and q' are the probabilities of
    the other tokens at temperature T, renormalized without y. As in the authors' code, T^2 multiplies the second term
    only. The teacher receives no gradient; one that requires grad raises.

    Args:
        gamma: weight of the second term, finite and not negative. The authors use 1.5 at T = 1 for convolutional
            networks on ImageNet, and 3.5 at T = 3 on CIFAR-100.
    """
    gamma = _weight("gamma", gamma)
    form = ClosedForm(cross=gamma)
    return Divergence("nkd", _soft_cross_entropy, (gamma,), None, form, target=Target("label"))


# The definitions for which Triton and CUDA correct the rounding of every exponent of p and q. The other operations of
# these definitions round little, so most of the error would come from the exponents: up to eight units in the last
# place where a probability is 1e-12.
WITH_EXACT_EXPONENTS: tuple[Callable[..., tuple[Any, Any]], ...] = (
    _mixture,
    _soft_cross_entropy,
    _hellinger,
)

# The constructors of all divergences without labels, by name. Tests, benchmarks and `doctor` iterate over them.
TABLE: dict[str, Callable[..., Divergence]] = {
    make.__name__: make
    for make in (
        forward_kl,
        reverse_kl,
        mixture,
        soft_cross_entropy,
        jsd,
        skew_forward_kl,
        skew_reverse_kl,
        tvd,
        hellinger,
        alpha_beta,
        squared_error,
        smooth_l1,
    )
}
# The constructors of divergences that need labels.
WITH_LABELS: dict[str, Callable[..., Divergence]] = {make.__name__: make for make in (dkd, nkd)}

# The definitions that csrc/generate.py translates; an index into this tuple identifies a definition in C++.
DEFINITIONS: tuple[Callable[..., tuple[Any, Any]], ...] = (
    _forward_kl,
    _reverse_kl,
    _mixture,
    _soft_cross_entropy,
    _jsd,
    _even_jsd,
    _skew_forward_kl,
    _skew_reverse_kl,
    _tvd,
    _hellinger,
    _alpha_beta,
    _alpha_beta_of_any_sign,
    _alpha_beta_at_beta_0,
    _alpha_beta_at_alpha_0,
    _alpha_beta_at_sum_0,
    _half_squared_gap,
    _smooth_l1,
    _clipped_mixture,
    _clipped_jsd,
    _floored_forward_kl,
)
# Definitions that the extensions compile for logits divided by the temperature too, as normalized=False needs.
OF_LOGITS: tuple[Callable[..., tuple[Any, Any]], ...] = (_half_squared_gap, _smooth_l1)
# Definitions that no dense teacher can have; no kernel for dense rows is compiled from them.
LISTED_TOKENS_ONLY: tuple[Callable[..., tuple[Any, Any]], ...] = (_floored_forward_kl,)

_functions.update({function_name(function): function for function in DEFINITIONS})
_DEFAULTS = {name: make() for name, make in (TABLE | WITH_LABELS).items()}


def resolve(divergence: str | Divergence) -> Divergence:
    """Return divergence itself, or for a name the divergence of the table with default parameters.

    Raises:
        TypeError, ValueError: divergence is neither a fastkd.Divergence nor a name in the table.
    """
    if isinstance(divergence, _Deferred) and not torch.compiler.is_compiling():
        assert divergence.made_by is not None
        return made(*divergence.made_by)
    if isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, str):
        raise TypeError(
            f"divergence must be a name or a fastkd.Divergence, got {type(divergence).__name__}"
        )
    if divergence not in _DEFAULTS:
        raise ValueError(f"divergence must be one of {', '.join(_DEFAULTS)}; got {divergence!r}")
    return _DEFAULTS[divergence]
