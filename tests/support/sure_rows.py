"""Rows on which rounding matters, and how far a backend is from float64 on them beside plain PyTorch.

    error of a row of losses      |value - exact| / |exact|
    error of a row's gradient     |gradient - exact| / |exact|, of Euclidean norms and of largest entries

Exact is the published formula (tests/support/oracles.py) in float64 on the logits as they are; plain PyTorch is the
same formula with log_softmax and autograd in float32. The rows of a case are alike, and a case has one number a
contender: the root of the mean of the squares of its rows' errors, as in a single row either may be right by luck. An
error below a few units in the last place counts as those few, for all of a float32's digits are there; nor is one below
float64's own.

Nothing here uses a kernel; bench/studies/accuracy.py prints the ratios, and tests/losses/test_sure_rows.py holds them
to a bar.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkd import DIVERGENCES
from support.oracles import compose
from support.paths import DATA
from support.remembered import remembered

SMOLLM2 = DATA / "smollm2.npz"
Variant = tuple[str, dict[str, float]]
# Every divergence, and parameters for which a definition takes other branches.
VARIANTS: list[Variant] = [
    *((name, {}) for name in DIVERGENCES),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.9}),
    ("skew_forward_kl", {"alpha": 0.6}),
    ("skew_reverse_kl", {"alpha": 0.6}),
    ("alpha_beta", {"alpha": 1.0, "beta": 1.0}),
    ("alpha_beta", {"alpha": 0.4, "beta": 0.0}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.4}),
    ("alpha_beta", {"alpha": 0.3, "beta": -0.3}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.0}),
    ("alpha_beta", {"alpha": -0.3, "beta": 1.2}),
    ("alpha_beta", {"alpha": 1.2, "beta": -0.3}),
]
UNIT = torch.finfo(torch.float32).eps
TRUTH = 1e-15  # what float64 itself is off by on rows of probabilities
ROWS = 16


def shown(variant: Variant) -> str:
    """The name of a divergence and its parameters."""
    return "-".join([variant[0], *(f"{x:g}" for x in variant[1].values())])


class Case(NamedTuple):
    """Rows of student and teacher logits [ROWS, V] in float32."""

    name: str
    student: Tensor
    teacher: Tensor


class Errors(NamedTuple):
    """The errors of a case; None where it has no such gradient."""

    value: float
    student: float
    teacher: float | None


def _peak(logits: Tensor, token: Tensor, rest: float) -> Tensor:
    """The same logits, except that one token leaves the given probability, or slightly more or less, to all others."""
    logits = logits.double()
    others = logits.scatter(-1, token, -math.inf).logsumexp(-1, keepdim=True)
    return logits.scatter(-1, token, others - math.log(rest)).float()


def peaked(rest: float, vocabulary: int, tops: str) -> Case:
    """Rows where both models are sure: of the same token, of two different ones, or with nearly equal logits."""
    generator = torch.Generator().manual_seed(vocabulary)

    def normal() -> Tensor:
        return 2.0 * torch.randn(ROWS, vocabulary, generator=generator)

    token = torch.randint(vocabulary, (ROWS, 1), generator=generator)
    teacher, student = normal(), normal()
    if tops == "close":
        student = teacher + 1e-3 * student
    other = (token + 1) % vocabulary if tops == "different" else token
    return Case(
        f"peaked {rest:g}, {tops} tops, V = {vocabulary}",
        _peak(student, other, rest if tops == "close" else 3 * rest),
        _peak(teacher, token, rest),
    )


def normal(spread: float, apart: float, vocabulary: int) -> Case:
    """Normal logits of the given spread; the student's are the teacher's plus noise."""
    generator = torch.Generator().manual_seed(vocabulary)
    teacher, noise = torch.randn(2, ROWS, vocabulary, generator=generator)
    student = spread * teacher + apart * noise
    return Case(f"normal {spread:g}, apart {apart:g}, V = {vocabulary}", student, spread * teacher)


def real(of: str) -> Case:
    """Rows of SmolLM2: two models, one model with noise, and one model with logits off by a digit."""
    with np.load(SMOLLM2) as file:
        student, teacher = (torch.from_numpy(file[side]).float() for side in ("student", "teacher"))
    generator = torch.Generator().manual_seed(0)
    if of == "noise":
        student = teacher + 1e-2 * torch.randn(teacher.shape, generator=generator)
    if of == "last digit":
        steps = torch.randint(-2, 3, teacher.shape, generator=generator)
        student = teacher * (1 + steps * torch.finfo(torch.float32).eps)
    return Case(f"real, {of}", student, teacher)


RESTS = (1e-3, 1e-5, 1e-7, 1e-9, 1e-12)
WIDTHS = (32, 1000, 50_000)


def made_up(widths: tuple[int, ...] = WIDTHS, rests: tuple[float, ...] = RESTS) -> list[Case]:
    """Peaked rows and normal ones."""
    results = [
        peaked(rest, vocabulary, tops)
        for vocabulary in widths
        for rest in rests
        for tops in ("same", "different", "close")
        if tops != "close" or rest >= 1e-7  # below, the difference is less than float64 knows
    ]
    results += [
        normal(spread, apart, vocabulary)
        for vocabulary in widths
        for spread, apart in ((3.0, 3.0), (3.0, 1e-2), (0.1, 0.1))
    ]
    return results


def all_real() -> list[Case]:
    """Rows of SmolLM2."""
    return [real(of) for of in ("two models", "noise", "last digit")]


class Outcome(NamedTuple):
    """The losses [ROWS] of a contender, and the gradients [ROWS, V] of their sum, in float64."""

    value: Tensor
    student: Tensor
    teacher: Tensor | None


Loss = Callable[[Tensor, Tensor], Tensor]


def run(loss: Loss, case: Case, teacher_gradient: bool = True) -> Outcome:
    """The loss of each row, and its gradients by autograd."""
    student, teacher = case.student.detach().requires_grad_(), case.teacher.detach()
    teacher = teacher.requires_grad_(teacher_gradient)
    value = loss(student, teacher)
    leaves = (student, teacher) if teacher_gradient else (student,)
    results = [x.double() for x in torch.autograd.grad(value.sum(), leaves)]
    return Outcome(value.detach().double(), results[0], results[1] if teacher_gradient else None)


@remembered
def plain(case: Case, dtype: torch.dtype, teacher_gradient: bool = True, **options: Any) -> Outcome:
    """The published formula in the given dtype."""
    actual = compose(
        case.student, case.teacher, dtype=dtype, terms=False, reduction="none",
        upstream=torch.ones(case.student.shape[:-1]), **options,
    )  # fmt: skip
    gradients = (actual.student_gradient, actual.teacher_gradient if teacher_gradient else None)
    return Outcome(actual.loss.double(), *(None if x is None else x.double() for x in gradients))


def _of_rows(error: Tensor, size: Tensor, units: float) -> float:
    relative = torch.maximum(error, TRUTH + units * UNIT * size) / size
    return float(relative.square().mean().sqrt())


def errors(found: Outcome, exact: Outcome, norm: float, units: float) -> Errors:
    """The error of gradients in the given norm over a row; at least `floor` units in the last place."""

    def of(value: Tensor | None, truth: Tensor | None) -> float | None:
        if value is None or truth is None:
            return None
        error, size = (torch.linalg.vector_norm(x, norm, -1) for x in (value - truth, truth))
        return _of_rows(error, size, units)

    student = of(found.student, exact.student)
    assert student is not None
    return Errors(
        _of_rows((found.value - exact.value).abs(), exact.value.abs(), units),
        student,
        of(found.teacher, exact.teacher),
    )


def ratios(found: Outcome, eager: Outcome, exact: Outcome, units: float = 1.0) -> Errors:
    """Errors relative to those of plain PyTorch; for gradients, the larger of both norms."""
    each = []
    for norm in (2.0, math.inf):
        pair = (errors(found, exact, norm, units), errors(eager, exact, norm, units))
        each.append([None if a is None else a / b for a, b in zip(*pair, strict=True)])
    return Errors(*(None if a is None else max(a, b) for a, b in zip(*each, strict=True)))
