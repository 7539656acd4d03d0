"""Every divergence of the table: value, gradients of both sides, limits and defining properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import oracles
from support.accuracy import Bars, bars, check, labels_for, logits, made, upstream_for
from support.paths import ROOT

import fastkd
from fastkd import kd_loss
from fastkd.divergences import derivatives

DEFAULTS: list[tuple[str, dict[str, float]]] = [(name, {}) for name in fastkd.DIVERGENCES]
# Parameters away from the defaults, every end point, and every limit of the alpha-beta family.
PARAMETERS: list[tuple[str, dict[str, float]]] = [
    ("mixture", {"forward": 0.7, "reverse": 0.2}),
    ("mixture", {"forward": 0.0, "reverse": 1.5}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.9}),
    ("jsd", {"beta": 0.0}),
    ("jsd", {"beta": 1.0}),
    ("skew_forward_kl", {"alpha": 0.0}),
    ("skew_forward_kl", {"alpha": 0.6}),
    ("skew_reverse_kl", {"alpha": 0.0}),
    ("skew_reverse_kl", {"alpha": 0.6}),
    ("alpha_beta", {"alpha": 1.0, "beta": 1.0}),
    ("alpha_beta", {"alpha": -0.3, "beta": 1.2}),
    ("alpha_beta", {"alpha": 1.3, "beta": -0.2}),
    ("alpha_beta", {"alpha": 1.0, "beta": 0.0}),
    ("alpha_beta", {"alpha": 0.4, "beta": 0.0}),
    ("alpha_beta", {"alpha": 0.0, "beta": 1.0}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.4}),
    ("alpha_beta", {"alpha": 0.3, "beta": -0.3}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.0}),
    # Clips that some contributions of the rows in these tests exceed, and most do not.
    ("forward_kl", {"clip": 0.05}),
    ("reverse_kl", {"clip": 0.1}),
    ("mixture", {"forward": 0.7, "reverse": 0.2, "clip": 0.2}),
    ("jsd", {"beta": 0.1, "clip": 0.01}),
    ("jsd", {"beta": 0.5, "clip": 0.05}),
    ("jsd", {"beta": 1.0, "clip": 0.03}),
]
VARIANTS = DEFAULTS + PARAMETERS
NORMALIZED = [name for name in fastkd.DIVERGENCES if name not in oracles.UNNORMALIZED]


def _label(variant: tuple[str, dict[str, float]]) -> str:
    name, parameters = variant
    return "-".join([name, *(f"{value:g}" for value in parameters.values())])


variants = pytest.mark.parametrize("variant", VARIANTS, ids=_label)
defaults = pytest.mark.parametrize("name", fastkd.DIVERGENCES)


def test_every_divergence_has_a_published_formula() -> None:
    assert set(fastkd.DIVERGENCES) == set(oracles.DIVERGENCES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@variants
def test_value_and_gradients(
    backend: str, variant: tuple[str, dict[str, float]], dtype: torch.dtype
) -> None:
    # 37 columns: two SIMD vectors of 16 and a tail of 5; 5 rows: not a multiple of the threads.
    name, parameters = variant
    student, teacher = logits(5, 37, seed=1, dtype=dtype), logits(5, 37, seed=2, dtype=dtype)
    labels = labels_for(5, vocabulary=37, seed=3)
    for alpha in (1.0, 0.3):
        check(
            backend,
            student,
            teacher,
            labels,
            divergence=name,
            parameters=parameters,
            temperature=2.0,
            alpha=alpha,
        )


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@defaults
@pytest.mark.pairwise
def test_gradcheck_in_float64(name: str, reduction: str, weighted: bool) -> None:
    labels = torch.tensor([2, -100, 0, 1])
    weight = torch.tensor([0.5, 2.0, -1.5, 0.0], dtype=torch.float64) if weighted else None

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd_loss(
            student, teacher, labels, divergence=name, temperature=1.7, teacher_temperature=0.9, alpha=0.6,
            label_smoothing=0.1, softcap=8.0, logit_scale=1.3, teacher_logit_scale=0.8, weight=weight,
            reduction=reduction, backend="reference",
        )  # fmt: skip

    student = logits(4, 3, seed=4, dtype=torch.float64).requires_grad_()
    teacher = logits(4, 3, seed=5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(loss, (student, teacher), atol=1e-7, rtol=1e-5)


@variants
def test_gradcheck_of_every_parameter(variant: tuple[str, dict[str, float]]) -> None:
    student = logits(2, 6, seed=6, dtype=torch.float64).requires_grad_()
    teacher = logits(2, 6, seed=7, dtype=torch.float64).requires_grad_()

    def loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd_loss(
            student, teacher, divergence=made(*variant), temperature=1.5, backend="reference"
        )

    assert torch.autograd.gradcheck(loss, (student, teacher), atol=1e-7, rtol=1e-5)


# p = (1/2, 1/4, 1/4) and q = (1/4, 1/4, 1/2), worked out on paper.
_LOG2 = math.log(2.0)
_ABOUT = 0.5 * math.log(0.5 / 0.3) + 0.25 * math.log(0.25 / 0.45)  # KL(p || 0.2 p + 0.8 q)
BY_HAND = [
    ("forward_kl", {}, 0.25 * _LOG2),
    ("reverse_kl", {}, 0.25 * _LOG2),
    ("mixture", {"forward": 0.5, "reverse": 2.0}, 0.625 * _LOG2),
    ("soft_cross_entropy", {}, 1.75 * _LOG2),
    ("jsd", {"beta": 0.5}, 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)),
    ("skew_forward_kl", {"alpha": 0.2}, _ABOUT),
    ("skew_reverse_kl", {"alpha": 0.2}, _ABOUT),
    ("tvd", {}, 0.25),
    ("hellinger", {}, (math.sqrt(0.5) - 0.5) ** 2),
    ("alpha_beta", {"alpha": 1.0, "beta": 1.0}, 0.0625),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.0}, _LOG2**2),
    ("alpha_beta", {"alpha": 1.0, "beta": -1.0}, 0.5),
    ("squared_error", {}, _LOG2**2),
    ("smooth_l1", {"beta": 1.0}, _LOG2**2),
]


def test_every_divergence_is_worked_out_by_hand() -> None:
    assert {name for name, *_ in BY_HAND} == set(fastkd.DIVERGENCES)


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="there is no checkout around these tests")
@pytest.mark.parametrize("page", ["docs/losses.md", "docs/api/divergences.md"])
def test_every_divergence_is_documented(page: str) -> None:
    text = (ROOT / page).read_text()
    for name in [*fastkd.DIVERGENCES, "dkd", "nkd"]:
        assert f"`{name}`" in text or f"::: fastkd.{name}\n" in text, name


@pytest.mark.parametrize(("name", "parameters", "value"), BY_HAND)
def test_value_worked_out_by_hand(
    any_backend: str, name: str, parameters: dict[str, float], value: float
) -> None:
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[0.25, 0.25, 0.5]]).log()
    loss = kd_loss(student, teacher, divergence=made(name, parameters), backend=any_backend)
    assert loss.item() == pytest.approx(value, rel=1e-6)
    oracle = oracles.compose(student, teacher, divergence=name, parameters=parameters)
    assert oracle.loss.item() == pytest.approx(value, rel=1e-6)


# Limits


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    ("near", "limit"),
    [
        ((0.7, 1e-6), (0.7, 0.0)),
        ((1e-6, 0.7), (0.0, 0.7)),
        ((0.4, -0.4 + 1e-6), (0.4, -0.4)),
        ((1e-6, 1.1e-6), (0.0, 0.0)),
    ],
)
def test_alpha_beta_limits_are_continuous(
    near: tuple[float, float], limit: tuple[float, float], side: str
) -> None:
    student = logits(3, 7, seed=8, spread=1.0, dtype=torch.float64)
    teacher = logits(3, 7, seed=9, spread=1.0, dtype=torch.float64)
    leaf = (student if side == "student" else teacher).requires_grad_()
    results = []
    for parameters in (near, limit):
        loss = kd_loss(student, teacher, divergence=fastkd.alpha_beta(*parameters))
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    # The first-order correction is about the step, 1e-6; near a + b = 0 the rounding error divided by the step is 1e-9.
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_end_points_are_the_kl_divergences() -> None:
    assert fastkd.jsd(0.0) == fastkd.skew_forward_kl(0.0) == fastkd.forward_kl()
    assert fastkd.jsd(1.0) == fastkd.skew_reverse_kl(0.0) == fastkd.reverse_kl()


def test_jsd_over_beta_tends_to_the_kl_divergences() -> None:
    student, teacher = (
        logits(3, 9, seed=10, dtype=torch.float64),
        logits(3, 9, seed=11, dtype=torch.float64),
    )

    def value(divergence: fastkd.Divergence) -> float:
        return kd_loss(student, teacher, divergence=divergence).item()

    # The correction is of the order of beta p / q, and p / q is at most 1e4 here.
    assert value(fastkd.jsd(1e-9)) / 1e-9 == pytest.approx(value(fastkd.forward_kl()), rel=1e-4)
    assert value(fastkd.jsd(1 - 1e-9)) / 1e-9 == pytest.approx(value(fastkd.reverse_kl()), rel=1e-4)


def test_high_temperature_tends_to_the_squared_error_of_centred_logits(backend: str) -> None:
    student, teacher = logits(4, 50, seed=12), logits(4, 50, seed=13)
    hot = kd_loss(student, teacher, temperature=1000.0, reduction="none", backend=backend)
    s, t = (x.double() - x.double().mean(-1, keepdim=True) for x in (student, teacher))
    # The next order is the spread of the logits over T: 3/1000. The float32 value is T^2 times a sum of 1e-5, of
    # terms p log(p / q) with an error of 1e-7 p each, which the bar of kd_loss holds.
    bar = bars(student, teacher, temperature=1000.0, reduction="none").loss
    expected = ((s - t) ** 2).sum(-1) / (2 * 50)
    assert ((hot - expected).abs() <= 0.01 * expected + bar).all()
    cold, warm = (
        kd_loss(student, teacher, divergence="squared_error", temperature=t, backend=backend)
        for t in (1.0, 16.0)
    )
    assert cold.item() == pytest.approx(warm.item(), rel=1e-6)


def test_alpha_beta_includes_forward_and_reverse_kl(backend: str) -> None:
    student, teacher = logits(4, 33, seed=14), logits(4, 33, seed=15)
    for parameters, name in (((1.0, 0.0), "forward_kl"), ((0.0, 1.0), "reverse_kl")):
        family = kd_loss(
            student, teacher, divergence=fastkd.alpha_beta(*parameters), backend=backend
        )
        member = kd_loss(student, teacher, divergence=name, backend=backend)
        assert family.item() == pytest.approx(member.item(), rel=1e-5)


@pytest.mark.parametrize(
    "name", [name for name in fastkd.DIVERGENCES if made(name, None).closed_form]
)
def test_a_closed_form_equals_the_sum(name: str) -> None:
    closed = made(name, None).closed_form
    assert closed is not None
    s, t = logits(4, 20, seed=16, dtype=torch.float64), logits(4, 20, seed=17, dtype=torch.float64)
    p, q, lse_s, lse_t = t.softmax(-1), s.softmax(-1), s.logsumexp(-1), t.logsumexp(-1)
    forward = (p * (t - s)).sum(-1) - lse_t + lse_s
    reverse = (q * (s - t)).sum(-1) - lse_s + lse_t
    cross = -(p * s).sum(-1) + lse_s
    value = closed.forward * forward + closed.reverse * reverse + closed.cross * cross
    total = -closed.forward + closed.reverse * (reverse + 1) - closed.cross
    phi, g, _ = derivatives(made(name, None), p, q, p.log(), q.log(), (p / q).log())
    torch.testing.assert_close(value, phi.sum(-1))
    torch.testing.assert_close(total, g.sum(-1))


# Properties. Examples are few because each runs real kernels, and the same on every run.

properties = settings(
    deadline=None,
    max_examples=8,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Student and teacher [N, V] and a temperature.

    Logits are multiples of 1/16, so that a shift by up to 2^16 is exact in float32. Widths: one column, fewer than
    a SIMD vector, one vector, a vector and a tail.
    """
    rows, columns = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 7, 16, 39]))
    spread = draw(st.sampled_from([0.1, 1.0, 8.0, 60.0]))
    seed = draw(st.integers(0, 2**31))
    student, teacher = (
        (logits(rows, columns, seed=seed + side, spread=spread) * 16).round() / 16
        for side in range(2)
    )
    return student, teacher, draw(st.sampled_from([0.5, 1.0, 4.0]))


def _rows(
    backend: str,
    name: str,
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss per row and gradient."""
    leaf = student.detach().clone().requires_grad_()
    options |= {"temperature": temperature, "reduction": "none", "divergence": name}
    loss = kd_loss(leaf, teacher, backend=backend, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def _rows_and_error(
    backend: str,
    name: str,
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, Bars]:
    """Loss per row, gradient, and the allowed error."""
    actual = _rows(backend, name, student, teacher, temperature, **options)
    options |= {"temperature": temperature, "reduction": "none", "divergence": name}
    return *actual, bars(student, teacher, **options)


@pytest.mark.parametrize("name", NORMALIZED)
@properties
@given(pair=pairs())
def test_never_negative_and_bounded(backend: str, name: str, pair: Any) -> None:
    loss, _, allowed = _rows_and_error(backend, name, *pair, scale_by_temperature=False)
    bound = {"jsd": math.log(2.0), "tvd": 1.0, "hellinger": 1.0}.get(name, math.inf)
    assert (loss >= -allowed.loss).all() and (loss <= bound + allowed.loss).all()


@defaults
@properties
@given(pair=pairs())
def test_equal_models_have_no_loss_and_no_gradient(backend: str, name: str, pair: Any) -> None:
    student, _, temperature = pair
    loss, gradient, allowed = _rows_and_error(backend, name, student, student.clone(), temperature)
    if name != "soft_cross_entropy":  # cross-entropy with oneself is the entropy
        assert (loss.abs() <= allowed.loss).all()
    assert (gradient.abs() <= allowed.student_gradient).all()


@pytest.mark.parametrize("name", NORMALIZED)
@properties
@given(pair=pairs(), shifts=st.tuples(st.integers(-10_000, 10_000), st.integers(-10_000, 10_000)))
def test_a_common_shift_changes_nothing(backend: str, name: str, pair: Any, shifts: Any) -> None:
    student, teacher, temperature = pair
    _, _, allowed = _rows_and_error(backend, name, student, teacher, temperature)
    loss, gradient = _rows(backend, name, student + shifts[0], teacher + shifts[1], temperature)
    assert ((loss - allowed.exact.loss).abs() <= allowed.loss).all()
    assert ((gradient - allowed.exact.student_gradient).abs() <= allowed.student_gradient).all()


@defaults
@properties
@given(pair=pairs(), data=st.data())
def test_permuting_rows_and_columns_permutes_the_results(
    backend: str, name: str, pair: Any, data: Any
) -> None:
    student, teacher, temperature = pair
    rows = torch.tensor(data.draw(st.permutations(range(student.shape[0]))))
    columns = torch.tensor(data.draw(st.permutations(range(student.shape[1]))))
    loss, gradient, allowed = _rows_and_error(backend, name, student, teacher, temperature)
    by_row = _rows(backend, name, student[rows], teacher[rows], temperature)
    assert ((by_row[0] - loss[rows]).abs() <= 2 * allowed.loss[rows]).all()
    assert ((by_row[1] - gradient[rows]).abs() <= 2 * allowed.student_gradient[rows]).all()
    by_column = _rows(backend, name, student[:, columns], teacher[:, columns], temperature)
    assert ((by_column[0] - loss).abs() <= 2 * allowed.loss).all()
    assert (
        (by_column[1] - gradient[:, columns]).abs() <= 2 * allowed.student_gradient[:, columns]
    ).all()


@pytest.mark.parametrize("name", NORMALIZED)
@properties
@given(pair=pairs())
def test_the_gradient_of_a_row_sums_to_zero(backend: str, name: str, pair: Any) -> None:
    student, teacher, temperature = pair
    labels = torch.zeros(student.shape[0], dtype=torch.int64)
    _, gradient, allowed = _rows_and_error(
        backend, name, student, teacher, temperature, labels=labels, alpha=0.5
    )
    assert (gradient.double().sum(-1).abs() <= allowed.student_gradient.sum(-1)).all()


# Making one


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (fastkd.jsd, (-0.1,), "beta must be in [0, 1], got -0.1"),
        (fastkd.jsd, (1.5,), "beta must be in [0, 1], got 1.5"),
        (fastkd.jsd, (math.nan,), "beta must be in [0, 1], got nan"),
        (fastkd.skew_forward_kl, (1.0,), "alpha must be in [0, 1), got 1.0"),
        (fastkd.skew_reverse_kl, (-1.0,), "alpha must be in [0, 1), got -1.0"),
        (fastkd.mixture, (-1.0, 0.5), "forward must not be negative, got -1.0"),
        (fastkd.mixture, (0.5, -2.0), "reverse must not be negative, got -2.0"),
        (fastkd.mixture, (math.inf, 0.5), "forward must be finite, got inf"),
        (fastkd.alpha_beta, (math.nan, 0.5), "alpha must be finite, got nan"),
        (fastkd.alpha_beta, (0.5, math.inf), "beta must be finite, got inf"),
    ],
)
def test_parameters_out_of_range(make: Any, arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make(*arguments)
    assert str(error.value) == message


def test_a_name_is_the_divergence_with_its_defaults(any_backend: str) -> None:
    student, teacher = logits(2, 5, seed=18), logits(2, 5, seed=19)
    for name, make in fastkd.DIVERGENCES.items():
        by_name = kd_loss(student, teacher, divergence=name, backend=any_backend)
        assert torch.equal(
            by_name, kd_loss(student, teacher, divergence=make(), backend=any_backend)
        )
        assert getattr(fastkd, name) is make


def _chi_squared(p, q, log_p, log_q):  # type: ignore[no-untyped-def]
    """sum (p - q)^2 / q = sum p^2 / q - 2 p + q"""
    square = torch.exp(2.0 * log_p - log_q)
    return square - 2.0 * p + q, q - square


def test_a_user_defined_divergence() -> None:
    custom = fastkd.Divergence("chi_squared", _chi_squared, degree=1.0)
    student = logits(3, 11, seed=20, spread=1.0, dtype=torch.float64).requires_grad_()
    teacher = logits(3, 11, seed=21, spread=1.0, dtype=torch.float64).requires_grad_()
    loss = kd_loss(
        student, teacher, divergence=custom, temperature=2.0, reduction="none", backend="reference"
    )
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 4 * ((p - q) ** 2 / q).sum(-1)
    torch.testing.assert_close(loss, expected)
    upstream = upstream_for(3).double()
    torch.testing.assert_close(
        torch.autograd.grad(loss, (student, teacher), upstream),
        torch.autograd.grad(expected, (student, teacher), upstream),
    )


def test_a_divergence_of_unknown_degree_refuses_a_teacher_gradient() -> None:
    custom = fastkd.Divergence("chi_squared", _chi_squared)
    student, teacher = (
        logits(3, 11, seed=20).requires_grad_(),
        logits(3, 11, seed=21).requires_grad_(),
    )
    with pytest.raises(ValueError) as error:
        kd_loss(student, teacher, divergence=custom, backend="reference")
    assert str(error.value) == (
        "teacher requires grad, and the divergence 'chi_squared' has no degree of homogeneity, "
        "which the teacher's gradient needs; set Divergence(degree=...) or detach the teacher"
    )
    kd_loss(student, teacher.detach(), divergence=custom, backend="reference").backward()
    assert student.grad is not None and student.grad.abs().sum() > 0


def test_a_definition_must_be_callable() -> None:
    with pytest.raises(TypeError, match="^function must be callable, got str$"):
        fastkd.Divergence("named", "forward_kl")  # type: ignore[arg-type]
