"""The bar for "right": error against float64, next to the error of the plain float32 composition.

    error of a row  <=  error of plain float32 PyTorch in that row  +  floor

The floor is what one unit in the last place (ulp) of every log-probability makes of the row's largest term
(tests/support/oracles.py measures it, from the derivatives of the exact result). It is there because the error of the
plain composition can be 0 by luck, and any other order of the same operations would then count as wrong.

Where the derivative of a divergence jumps and p and q are tied to rounding, a gradient is measured by its distance to
the interval between the two subgradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.backends import registry
from support import oracles
from support.oracles import Outcome, compose
from support.remembered import remembered

ULP = torch.finfo(torch.float32).eps
# The float64 oracle itself is no more accurate: beside a probability of 1, its sums lose what is below.
FLOOR = 2.0**-52
# Of max(1, |log p|): float32 cannot tell which of p and q is larger where their logarithms are closer than this. Each
# is off by up to four units: half a one in the difference to the maximum, the reciprocal temperature, their product,
# the logarithm of the normalizer and its subtraction; one and a half in the normalizer's sum and the exponential.
TIED = 8 * ULP


class Measured(NamedTuple):
    """The results of a backend, and the exact ones."""

    loss: Tensor
    student_gradient: Tensor
    teacher_gradient: Tensor | None
    parts: fastkd.Parts
    exact: Outcome


def logits(
    *shape: int, seed: int, spread: float = 3.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Random normal logits with the given standard deviation."""
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def labels_for(*lead: int, vocabulary: int, seed: int, ignored: float = 0.0) -> Tensor:
    """Random labels, a share of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, lead, generator=generator)
    return labels.masked_fill(torch.rand(lead, generator=generator) < ignored, -100)


def upstream_for(*lead: int, seed: int = 99) -> Tensor:
    """A non-uniform upstream gradient with both signs."""
    return torch.randn(lead, generator=torch.Generator().manual_seed(seed))


def powers_for(*lead: int, seed: int = 99) -> Tensor:
    """Like upstream_for, but with powers of 2, which multiply a bfloat16 gradient without rounding."""
    upstream = upstream_for(*lead, seed=seed)
    return upstream.sign() * upstream.abs().log2().round().exp2()


def made(divergence: str, parameters: dict[str, float] | None) -> fastkd.Divergence:
    """The divergence of fastkd with this name and these parameters."""
    return fastkd.DIVERGENCES[divergence](**(parameters or {}))


def ran_on(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Record which of these backends launch from now on."""
    ran: list[str] = []

    def recording(name: str, launch: Any) -> Any:
        def kd_rows(*arguments: Any) -> Any:
            ran.append(name)
            return launch(*arguments)

        return kd_rows

    for name in names:
        module = registry.load(name)
        monkeypatch.setattr(module, "kd_rows", recording(name, module.kd_rows))
    return ran


def _error(value: Tensor, exact: Tensor) -> Tensor:
    """|value - exact|; 0 where both are the same infinity."""
    return torch.where(value == exact, 0.0, (value.double() - exact).abs())


def assert_within(what: str, value: Tensor, exact: Tensor, allowed: Tensor) -> None:
    """Check that each element of value is within allowed (broadcast) of exact, or the same infinity, and not NaN."""
    assert value.shape == exact.shape, what
    error = _error(value, exact)
    wrong = ~(error <= allowed.expand_as(error))  # a NaN is wrong
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off; at {where} {float(value[where]):.9g}, "
            f"exact {float(exact[where]):.9g}, error {float(error[where]):.3g}, "
            f"allowed {float(allowed.expand_as(error)[where]):.3g}"
        )


def _largest(value: Tensor) -> Tensor:
    """The maximum of each row, [..., 1]; 0 where the row has no column."""
    return value.nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True)


def gradient_bar(
    plain: Tensor, exact: Tensor, terms: Tensor, dtype: torch.dtype, reach: Tensor | float = 0.0
) -> Tensor:
    """The error that each element of a gradient may have; everything within `reach` of exact is right."""
    error = (_error(plain, exact) - reach).clamp(min=0.0)
    bar = _largest(error) + ULP * _largest(terms) + FLOOR + torch.zeros_like(exact) + reach
    if dtype in (torch.bfloat16, torch.float16):  # one rounding of the exact gradient
        information = torch.finfo(dtype)
        bar = (
            bar
            + (exact.abs() + reach) * information.eps / 2
            + information.smallest_normal * information.eps / 2
        )
    return bar


def value_bar(plain: Tensor, exact: Tensor, terms: Tensor) -> Tensor:
    """The error that a value may have."""
    error = _error(plain, exact).nan_to_num(0.0, 0.0, 0.0)
    return error + ULP * terms.nan_to_num(0.0, 0.0, 0.0) + FLOOR


def _tvd(sign: float) -> Any:
    """TVD, its derivative at ties that of sign * (q - p) / 2. Not where p = q exactly: there it is 0."""

    def formula(log_p: Tensor, log_q: Tensor) -> Tensor:
        gap = (log_p - log_q).abs()
        tied = (gap > 0) & (gap <= TIED * log_p.abs().clamp(min=1.0))
        return torch.where(tied, 0.5 * sign * (log_q.exp() - log_p.exp()), exact(log_p, log_q))

    exact = oracles.DIVERGENCES["tvd"]
    return formula


def _subgradients(*given: Any, **arguments: Any) -> list[tuple[Tensor, Tensor]]:
    """For student and teacher: (the middle of the subgradients at ties, their distance from it)."""
    ends = []
    for sign in (1.0, -1.0):
        with patch.dict(oracles.DIVERGENCES, tvd=_tvd(sign)):
            ends.append(compose(*given, terms=False, **arguments))
    pairs = [(x.student_gradient, x.teacher_gradient) for x in ends]
    return [((a + b) / 2, (a - b).abs() / 2) for a, b in zip(*pairs, strict=True)]


class Bars(NamedTuple):
    """The exact results, and the error that each may have."""

    exact: Outcome
    loss: Tensor
    student_gradient: Tensor
    teacher_gradient: Tensor
    parts: tuple[Tensor, Tensor, Tensor]


@remembered
def bars(student: Tensor, teacher: Tensor, labels: Tensor | None = None, **arguments: Any) -> Bars:
    """The expected results of kd_loss for these arguments, upstream gradient included."""
    exact = compose(student, teacher, labels, **arguments)
    plain = compose(student, teacher, labels, dtype=torch.float32, terms=False, **arguments)
    student_reach = teacher_reach = 0.0
    if arguments.get("divergence") == "tvd":
        actual = _subgradients(student, teacher, labels, **arguments)
        (student_middle, student_reach), (teacher_middle, teacher_reach) = actual
        exact = exact._replace(student_gradient=student_middle, teacher_gradient=teacher_middle)
    return Bars(
        exact,
        value_bar(plain.loss, exact.loss, exact.loss_terms),
        gradient_bar(
            plain.student_gradient,
            exact.student_gradient,
            exact.student_terms,
            student.dtype,
            student_reach,
        ),
        gradient_bar(
            plain.teacher_gradient,
            exact.teacher_gradient,
            exact.teacher_terms,
            teacher.dtype,
            teacher_reach,
        ),
        (
            value_bar(plain.distillation, exact.distillation, exact.distillation_terms),
            value_bar(plain.cross_entropy, exact.cross_entropy, exact.cross_entropy_terms),
            value_bar(plain.student_entropy, exact.student_entropy, exact.student_entropy_terms),
        ),
    )


def check(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    parameters: dict[str, float] | None = None,
    upstream: Tensor | None = None,
    teacher_gradient: bool = True,
    **options: Any,
) -> Measured:
    """Run kd_loss, per row unless a reduction is given, and hold value and gradients apart to the bar."""
    options.setdefault("reduction", "none")
    if upstream is None and options["reduction"] == "none":
        # A bfloat16 gradient is rounded once in the forward, and once more where the upstream factor rounds.
        rounds = torch.bfloat16 in (student.dtype, teacher.dtype)
        upstream = (powers_for if rounds else upstream_for)(*student.shape[:-1]).to(student.device)
    s = student.detach().requires_grad_()
    t = teacher.detach().requires_grad_(teacher_gradient)
    loss, parts = fastkd.kd_loss(
        s,
        t,
        labels,
        divergence=made(divergence, parameters),
        backend=backend,
        return_parts=True,
        **options,
    )
    allowed = bars(
        student,
        teacher,
        labels,
        divergence=divergence,
        parameters=parameters,
        upstream=upstream,
        **options,
    )
    exact = allowed.exact
    assert loss.dtype == torch.float32
    assert_within("loss", loss.detach(), exact.loss, allowed.loss)
    for part, bar in zip(
        ("distillation", "cross_entropy", "student_entropy"), allowed.parts, strict=True
    ):
        assert_within(part, getattr(parts, part), getattr(exact, part), bar)
    assert int(parts.counted) == exact.counted
    actual = torch.autograd.grad(loss, (s, t) if teacher_gradient else (s,), upstream)
    for gradient, inputs, side in zip(
        actual, (student, teacher), ("student", "teacher"), strict=False
    ):
        assert gradient.dtype == inputs.dtype
        bar = getattr(allowed, f"{side}_gradient")
        if backend == "portable":
            # This backend runs float32 PyTorch in another order, so either of the two may be closer to float64, above
            # all on rows of 150k columns, whose sums lose three digits.
            bar = 2 * bar
        assert_within(f"gradient of the {side}", gradient, getattr(exact, f"{side}_gradient"), bar)
    return Measured(loss.detach(), actual[0], actual[1] if teacher_gradient else None, parts, exact)
