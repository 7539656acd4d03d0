"""The divergences, each written once.

A divergence is a sum over the vocabulary, ``D = sum_v phi(log p_v, log q_v)``, of the teacher's probabilities p
and the student's q. Its definition is one pure function

    (p, q, log_p, log_q, *params) -> (phi, g) or (phi, g, h)
                                        g = d phi / d log q,  h = d phi / d log p

and every backend consumes that function: the reference runs it on tensors, the Triton kernel compiles the same code
object, and ``csrc/generate.py`` emits it as a C++ functor. The gradients follow from it alone:

    dD/ds_v = (g_v - q_v sum_u g_u) / T              s: student logits, log q = log_softmax(s / T)
    dD/dt_v = (h_v - p_v sum_u h_u) / T              t: teacher logits

h is degree * phi - g (:class:`Divergence`). A definition returns it where that difference loses digits, as it does
where one of p and q is far below the other; it has the same value.

A definition whose fifth argument is named ``log_ratio`` is given log p - log q there. That is a difference of logits
less a constant of the row, and as exact as a float can be, where the difference of two rounded logarithms has the error
of both: take signs and ratios of p and q from it. So do the definitions below, and they are written such that phi and g
keep their digits as log_ratio tends to 0.

A definition may use the names imported from torch below, arithmetic, comparisons and its parameters, and nothing
else. It never handles log 0: the skeletons do (:func:`fastkd.backends.reference.evaluate` states the policy). The
logarithm of a mixture is always a ``logaddexp`` or a ``log_mixture``, because ``log(beta * p + (1 - beta) * q)`` is
log 0 once both underflow.

docs/adding-a-divergence.md walks through a new one.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import torch

# The vocabulary of a definition; kernels/skeleton.py and csrc/cpu/vec.h provide the same names.
# A004: a definition reads as the formula does. F401: the next one may want what none uses yet.
from torch import Tensor, abs, exp, expm1, log1p, logaddexp, where  # noqa: A004, F401

from fastkd.core.scalars import as_float, plain

VOCABULARY = ("abs", "exp", "expm1", "log1p", "logaddexp", "where", "log_mixture")
ENTRY = ("p", "q", "log_p", "log_q")
RATIO = "log_ratio"


def log_mixture(log_ratio: Tensor, share: float, rest: float) -> Tensor:
    """log(m / max(p, q)) of the mixture m = share p + rest q, where log_ratio = log p - log q and share + rest = 1.

    So log(m / q) is max(log_ratio, 0) more, and log(m / p) is max(-log_ratio, 0) more. It is exactly 0 where p = q.
    """
    below, above = (log_ratio < 0.0).to(log_ratio.dtype), (log_ratio > 0.0).to(log_ratio.dtype)
    lower = below * share + above * rest  # the share of the lower of p and q
    size = -abs(log_ratio)
    change = lower * expm1(size)
    far = (below * rest + above * share + lower * exp(size)).log()
    return where(change > -0.3, log1p(change), far)


def derivatives(
    divergence: Divergence, p: Any, q: Any, log_p: Any, log_q: Any, log_ratio: Any
) -> tuple[Any, Any, Any]:
    """(phi, g, h) of a definition; h None where it has no degree."""
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


def takes_ratio(function: Callable[..., Any]) -> bool:
    """Whether a definition wants log p - log q after its first four arguments."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_varnames[4 : code.co_argcount][:1] == (RATIO,)


def arguments_of(
    function: Callable[..., Any], p: Any, q: Any, log_p: Any, log_q: Any, log_ratio: Any
) -> tuple[Any, ...]:
    """The arguments that a definition begins with."""
    entry = (p, q, log_p, log_q)
    return (*entry, log_ratio) if takes_ratio(function) else entry


# Every definition by name: how a compiled graph, which can hold a string but no function, finds it again.
_functions: dict[str, Callable[..., tuple[Any, Any]]] = {}


def function_name(function: Callable[..., Any]) -> str:
    """The name of a definition inside compiled graphs."""
    return f"{function.__module__}.{function.__name__}"


def function_named(name: str) -> Callable[..., tuple[Any, Any]]:
    """The definition of that name."""
    if name not in _functions:
        raise KeyError(
            f"the divergence function {name} is not known yet: make its fastkd.Divergence outside the "
            "compiled function"
        )
    return _functions[name]


@dataclass(frozen=True)
class ClosedForm:
    """Weights (forward, reverse, cross) of moments that one online sweep over the logits can collect.

    With A = E_p[t' - s'] and B = E_q[s' - t'] of the tempered logits and C = E_p[-s']:

        D = forward (A - lse_t + lse_s) + reverse (B - lse_s + lse_t) + cross (C + lse_s)
        sum_v g_v = -forward + reverse (KL(q||p) + 1) - cross

    so the sweep that sums phi and g is not needed.
    """

    forward: float = 0.0
    reverse: float = 0.0
    cross: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward", "reverse", "cross"):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))


@dataclass(frozen=True)
class Target:
    """What becomes of the label's own token where a divergence compares the others by themselves.

    Its column is then out of every sum: p and q are of the other tokens, renormalised without it, and so are the
    statistics, so that nothing cancels as the label's probability tends to 1. With p_y and q_y that probability,

        binary   weight KL((p_y, 1 - p_y) || (q_y, 1 - q_y)), at the temperature of the rest; T^2 multiplies it
        label    -weight p_y log q_y, at temperature 1; T^2 does not
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
        name: how it is called in messages, and its identity inside compiled graphs.
        function: the definition, ``(p, q, log_p, log_q, *params) -> (phi, g)``; the head of this module says what else
            it may take and return.
        params: the numbers passed to it.
        degree: phi is homogeneous of this degree in (p, q), up to a multiple of p in its derivative, so that
            Euler's identity gives the teacher's derivative as ``h = degree * phi - g``. None: unknown, and a
            teacher that requires grad raises.
        closed_form: set where the value follows from moments of one sweep.
        normalized: False for a function of the tempered logits themselves, which then arrive as log_p and log_q.
        target: set where the label's token is compared apart from the others; then every row needs a label.
    """

    name: str
    function: Callable[..., tuple[Any, Any]] = field(repr=False)
    params: tuple[float, ...] = ()
    degree: float | None = None
    closed_form: ClosedForm | None = None
    normalized: bool = True
    target: Target | None = None
    # (the function below that made it, its arguments), for a compiled graph; a copy with other fields has none.
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
                "target must be None where normalized is False: there is no probability of a label"
            )
        if isinstance(self.params, (str, Tensor)) or not isinstance(self.params, Iterable):
            raise TypeError(f"params must be a tuple of numbers, got {type(self.params).__name__}")
        params = tuple(_number(f"params[{k}]", value) for k, value in enumerate(self.params))
        object.__setattr__(self, "params", params)
        if self.degree is not None:
            object.__setattr__(self, "degree", _finite("degree", self.degree))
        _functions[function_name(self.function)] = self.function


def _number(argument: str, value: Any) -> float:
    """The value as a float; a tensor of one element is a number too."""
    value = plain(value)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__}")
    return as_float(value)


class _Unmade(Divergence):
    """What a graph that is being compiled has of a divergence: who makes it, from what. The op makes it when it runs.

    Numbers may then change from step to step, up to and including those for which the divergence is another one, as
    jsd(0.0) is forward_kl(). Its other fields are those of the default parameters, but params, of which it has none.
    """


Parameters = ParamSpec("Parameters")


def _recorded(make: Callable[Parameters, Divergence]) -> Callable[Parameters, Divergence]:
    """The function that makes a divergence, which also records its arguments."""
    name = make.__name__
    defaults = [(key, value.default) for key, value in inspect.signature(make).parameters.items()]

    @functools.wraps(make)
    def recorded(*values: Parameters.args, **named: Parameters.kwargs) -> Divergence:
        rest = defaults[len(values) :]
        arguments: tuple[Any, ...] = (*values, *(named.get(key, value) for key, value in rest))
        fits = len(values) + len(named) <= len(defaults) and all(
            isinstance(argument, (int, float)) for argument in arguments
        )
        if torch.compiler.is_compiling() and fits:
            return _unmade(name, arguments)
        divergence = make(*values, **named)
        object.__setattr__(divergence, "made_by", (name, tuple(map(float, arguments))))
        return divergence

    return recorded


def _unmade(name: str, arguments: tuple[float, ...]) -> Divergence:
    like = _DEFAULTS[name]
    divergence = _Unmade(
        like.name, like.function, (), like.degree, like.closed_form, like.normalized, like.target
    )
    object.__setattr__(divergence, "made_by", (name, arguments))
    return divergence


def made(name: str, arguments: Sequence[float]) -> Divergence:
    """The divergence of the table by its name, with these parameters."""
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


def _forward_kl(p, q, log_p, log_q, log_ratio):
    phi = p * log_ratio
    return phi, -p, phi + p


@_recorded
def forward_kl() -> Divergence:
    """KL(p || q) = sum p (log p - log q), the loss of Hinton, Vinyals and Dean (2015)."""
    return Divergence("forward_kl", _forward_kl, degree=1.0, closed_form=ClosedForm(forward=1.0))


def _reverse_kl(p, q, log_p, log_q, log_ratio):
    phi = -q * log_ratio
    return phi, phi + q, -q


@_recorded
def reverse_kl() -> Divergence:
    """KL(q || p) = sum q (log q - log p), mode seeking (MiniLLM, Gu et al. 2024)."""
    return Divergence("reverse_kl", _reverse_kl, degree=1.0, closed_form=ClosedForm(reverse=1.0))


def _mixture(p, q, log_p, log_q, log_ratio, forward, reverse):
    onward = forward * p * log_ratio
    backward = -reverse * q * log_ratio
    gap = reverse * q - forward * p
    return onward + backward, backward + gap, onward - gap


@_recorded
def mixture(forward: float = 0.5, reverse: float = 0.5) -> Divergence:
    """Weighted sum: forward KL(p || q) + reverse KL(q || p).

    Args:
        forward: weight of KL(p || q), finite and not negative.
        reverse: weight of KL(q || p), likewise; not both are 0.
    """
    forward, reverse = _weight("forward", forward), _weight("reverse", reverse)
    if forward == reverse == 0:
        raise ValueError("forward and reverse must not both be 0")
    return Divergence(
        "mixture",
        _mixture,
        (forward, reverse),
        1.0,
        ClosedForm(forward=forward, reverse=reverse),
    )


def _soft_cross_entropy(p, q, log_p, log_q, weight):
    return -weight * p * log_q, -weight * p


@_recorded
def soft_cross_entropy() -> Divergence:
    """-sum p log q: forward KL plus the teacher's entropy, with the same student gradient.

    Its teacher derivative is h = phi, and phi - g = phi + p differs from it by a multiple of p, which the
    projection removes: hence degree 1.
    """
    return Divergence(
        "soft_cross_entropy",
        _soft_cross_entropy,
        (1.0,),
        degree=1.0,
        closed_form=ClosedForm(cross=1.0),
    )


def _jsd(p, q, log_p, log_q, log_ratio, beta, rest):
    # One of the two excesses is 0, and what is added up is the same for (p, q) and (q, p) where beta is 1/2.
    log_m = log_mixture(log_ratio, beta, rest)
    above_q = where(log_ratio > 0.0, log_ratio, 0.0)
    above_p = where(log_ratio < 0.0, -log_ratio, 0.0)
    phi = -(beta * p + rest * q) * log_m - (beta * p * above_p + rest * q * above_q)
    return phi, -rest * q * (above_q + log_m), -beta * p * (above_p + log_m)


@_recorded
def jsd(beta: float = 0.5) -> Divergence:
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    The end points follow the convention of GKD (Agarwal et al. 2024): beta = 0 is KL(p || q) and beta = 1 is
    KL(q || p). They are limits of JSD / beta and JSD / (1 - beta); the formula itself is 0 there.

    Args:
        beta: the teacher's share of the mixture, in [0, 1].
    """
    beta = _unit("beta", beta)
    if beta in (0.0, 1.0):
        return reverse_kl() if beta else forward_kl()
    return Divergence("jsd", _jsd, (beta, 1.0 - beta), degree=1.0)


def _skew_forward_kl(p, q, log_p, log_q, log_ratio, alpha, rest):
    log_m = log_mixture(log_ratio, alpha, rest)
    cost = where(log_ratio < 0.0, -log_ratio, 0.0) + log_m  # log(m / p)
    # rest p q / m, of the lower of p and q: an exponential of log_ratio would have several units of error.
    of_q = rest * where(log_ratio > 0.0, q, p) * exp(-log_m)
    return -p * cost, -of_q, of_q - p * cost


@_recorded
def skew_forward_kl(alpha: float = 0.1) -> Divergence:
    """KL(p || m), m = alpha p + (1 - alpha) q (DistiLLM, Ko et al. 2024).

    Args:
        alpha: the skew, in [0, 1); 0 is forward KL.
    """
    alpha = _unit("alpha", alpha, open_right=True)
    if alpha == 0.0:
        return forward_kl()
    return Divergence("skew_forward_kl", _skew_forward_kl, (alpha, 1.0 - alpha), degree=1.0)


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
    size = -0.5 * where(log_ratio > 0.0, p, q) * expm1(-abs(log_ratio))
    sign = where(log_ratio < 0.0, 1.0, 0.0) - where(log_ratio > 0.0, 1.0, 0.0)
    return size, 0.5 * q * sign, -0.5 * p * sign


@_recorded
def tvd() -> Divergence:
    """Total variation distance, 1/2 sum |p - q| (f-distill, Wen et al. 2023); subgradient 0 where p = q."""
    return Divergence("tvd", _tvd, degree=1.0)


def _hellinger(p, q, log_p, log_q, log_ratio):
    # sqrt(p q) is the larger of p and q times a power of their ratio, whose error is less than that of a power of p.
    size = -0.5 * abs(log_ratio)
    change = expm1(size)  # how far the smaller root is from the larger one, relative to that
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
    # Of positive exponents: powers of the ratio, less 1, times the power alpha + beta = whole + rest of the larger of p
    # and q. whole is 0 or 1, and part 1 - whole: a small rest keeps the digits that the rounding of log p would cost.
    size = -abs(log_ratio)
    larger = whole * where(log_ratio > 0.0, p, q) + part
    change = rest * where(log_ratio > 0.0, log_p, log_q)
    top = coefficient * larger * exp(where(change < 40.0, change, 40.0))  # beyond, larger is 0
    a = expm1(alpha * size)
    b = expm1(beta * size)
    both = a + b + a * b
    phi = top * where(log_ratio > 0.0, q_share * both - b, p_share * both - a)
    # The compiler takes these exponentials from those of expm1.
    cross = where(log_ratio > 0.0, exp(beta * size), exp(alpha * size))
    g = beta * top * a * where(log_ratio > 0.0, cross, -1.0)
    return phi, g, alpha * top * b * where(log_ratio > 0.0, -1.0, cross)


def _alpha_beta_of_any_sign(
    p, q, log_p, log_q, log_ratio, alpha, beta, degree, coefficient, p_share, q_share
):
    # Where p is close to q the terms cancel, and a power of the ratio less 1 is what is left of two of them.
    size = abs(log_ratio)
    cross = exp(alpha * log_p + beta * log_q)
    p_power = exp(degree * log_p)
    q_power = exp(degree * log_q)
    a = expm1(where(size < 1.0, alpha * log_ratio, 0.0))
    b = expm1(where(size < 1.0, -beta * log_ratio, 0.0))
    both = expm1(where(size < 1.0, degree * log_ratio, 0.0))
    apart = p_share * p_power + q_share * q_power - cross
    phi = coefficient * where(size < 1.0, q_power * (p_share * both - a), apart)
    g = coefficient * beta * where(size < 1.0, -q_power * a, q_power - cross)
    return phi, g, coefficient * alpha * where(size < 1.0, -p_power * b, p_power - cross)


def _alpha_beta_at_beta_0(p, q, log_p, log_q, log_ratio, alpha):
    p_power = exp(alpha * log_p)
    ratio = alpha * log_ratio
    lower = expm1(-abs(ratio))
    gap = where(ratio > 0.0, p_power * lower, -exp(alpha * log_q) * lower) / alpha  # q^a - p^a
    h = p_power * log_ratio
    return (h + gap) / alpha, gap, h


def _alpha_beta_at_alpha_0(p, q, log_p, log_q, log_ratio, beta):
    q_power = exp(beta * log_q)
    ratio = beta * log_ratio
    lower = expm1(-abs(ratio))
    gap = where(ratio > 0.0, -exp(beta * log_p) * lower, q_power * lower) / beta  # p^b - q^b
    g = -q_power * log_ratio
    return (g + gap) / beta, g, gap


def _alpha_beta_at_sum_0(p, q, log_p, log_q, log_ratio, alpha):
    ratio = alpha * log_ratio
    more = expm1(ratio)
    return (more - ratio) / (alpha * alpha), -more / alpha


def _half_squared_gap(p, q, log_p, log_q, log_ratio):
    return 0.5 * log_ratio * log_ratio, -log_ratio


@_recorded
def alpha_beta(alpha: float = 0.2, beta: float = 0.7) -> Divergence:
    """Alpha-beta divergence (Cichocki et al. 2011; ABKD, Wang et al. 2025).

        -1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]

    with its limits by continuity:

        b = 0:       1/a^2 sum [p^a log(p^a/q^a) - p^a + q^a]     (a = 1: forward KL)
        a = 0:       1/b^2 sum [q^b log(q^b/p^b) - q^b + p^b]     (b = 1: reverse KL)
        a + b = 0:   1/a^2 sum [(p/q)^a - log((p/q)^a) - 1]
        a = b = 0:   1/2 sum (log p - log q)^2

    Args:
        alpha: exponent of the teacher, finite.
        beta: exponent of the student, finite.
    """
    a, b = _finite("alpha", alpha), _finite("beta", beta)
    if a == 0.0 and b == 0.0:
        return Divergence("alpha_beta_at_0", _half_squared_gap, degree=0.0)
    if b == 0.0:
        return Divergence("alpha_beta_at_beta_0", _alpha_beta_at_beta_0, (a,), degree=a)
    if a == 0.0:
        return Divergence("alpha_beta_at_alpha_0", _alpha_beta_at_alpha_0, (b,), degree=b)
    if a + b == 0.0:
        return Divergence("alpha_beta_at_sum_0", _alpha_beta_at_sum_0, (a,), degree=0.0)
    degree, shares = a + b, (1.0 / (a * b), a / (a + b), b / (a + b))
    if a < 0.0 or b < 0.0:
        return Divergence("alpha_beta", _alpha_beta_of_any_sign, (a, b, degree, *shares), degree)
    whole = 1.0 if degree > 0.5 else 0.0
    params = (a, b, *shares, whole, 1.0 - whole, degree - whole)
    return Divergence("alpha_beta", _alpha_beta, params, degree)


@_recorded
def squared_error() -> Divergence:
    """1/2 sum (s - t)^2 on the logits (Bucila et al. 2006; Ba and Caruana 2014).

    The high-temperature limit of T^2 KL, up to V and the means. It sees s/T and t/T, so that with the usual T^2
    the value does not depend on T.
    """
    return Divergence("squared_error", _half_squared_gap, degree=0.0, normalized=False)


def _smooth_l1(p, q, log_p, log_q, log_ratio, beta):
    size = abs(log_ratio)
    phi = where(size < beta, 0.5 * log_ratio * log_ratio / beta, size - 0.5 * beta)
    return phi, where(size < beta, -log_ratio / beta, where(log_ratio < 0.0, 1.0, -1.0))


@_recorded
def smooth_l1(beta: float = 1.0) -> Divergence:
    """Smooth L1 distance of the logits, sum of x^2 / (2 beta) where |x| < beta, else |x| - beta / 2; x = s - t.

    As torch.nn.functional.smooth_l1_loss has it, summed over the vocabulary (Girshick 2015). It sees s/T and t/T.

    Args:
        beta: where the square becomes a line; positive and finite.
    """
    beta = _finite("beta", beta)
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return Divergence("smooth_l1", _smooth_l1, (beta,), degree=0.0, normalized=False)


@_recorded
def dkd(alpha: float = 1.0, beta: float = 8.0) -> Divergence:
    """Decoupled distillation (Zhao et al. 2022): alpha TCKD + beta NCKD. Every row needs a label y.

        TCKD = KL((p_y, 1 - p_y) || (q_y, 1 - q_y))
        NCKD = KL(p' || q'), with p' and q' the probabilities of the other tokens, renormalised without y

    KL(p || q) = TCKD + (1 - p_y) NCKD, so that the weight of what a confident teacher says of the other tokens is set
    by beta and not by its confidence. NCKD comes from sums without the label, not by division by 1 - p_y.

    Args:
        alpha: weight of the target's part, finite and not negative; not that of :func:`fastkd.kd_loss`.
        beta: weight of the others' part, likewise. The authors take 1 to 10 for CIFAR-100, 0.5 and 2 for ImageNet.
    """
    alpha, beta = _weight("alpha", alpha), _weight("beta", beta)
    target = Target("binary", alpha)
    return Divergence("dkd", _mixture, (beta, 0.0), 1.0, ClosedForm(forward=beta), target=target)


@_recorded
def nkd(gamma: float = 1.5) -> Divergence:
    """Normalised distillation (Yang et al. 2023): -p_y log q_y - gamma T^2 sum p' log q'. Every row needs a label y.

    p_y and q_y are at temperature 1; p' and q' are the probabilities of the other tokens at T, renormalised without
    y. As in the authors' code, T^2 multiplies the second part only. The teacher is a constant.

    Args:
        gamma: weight of the others' part, finite and not negative. The authors take 1.5 at T = 1 for convolutional
            networks on ImageNet, 3.5 at T = 3 for CIFAR-100.
    """
    gamma = _weight("gamma", gamma)
    form = ClosedForm(cross=gamma)
    return Divergence("nkd", _soft_cross_entropy, (gamma,), None, form, target=Target("label"))


# One row a divergence: its name and how to make it with its defaults. Tests, benches and `doctor` run over it.
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
# Those that need labels.
WITH_LABELS: dict[str, Callable[..., Divergence]] = {make.__name__: make for make in (dkd, nkd)}

# The definitions that csrc/generate.py emits, in the order of their number there.
DEFINITIONS: tuple[Callable[..., tuple[Any, Any]], ...] = (
    _forward_kl,
    _reverse_kl,
    _mixture,
    _soft_cross_entropy,
    _jsd,
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
)

_functions.update({function_name(function): function for function in DEFINITIONS})
_DEFAULTS = {name: make() for name, make in (TABLE | WITH_LABELS).items()}


def resolve(divergence: str | Divergence) -> Divergence:
    """The divergence itself, or the one of that name with its default parameters."""
    if isinstance(divergence, _Unmade) and not torch.compiler.is_compiling():
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
