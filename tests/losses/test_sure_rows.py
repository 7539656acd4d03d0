"""Where rounding matters (tests/support/sure_rows.py), no divergence is further from float64 than plain float32
PyTorch."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support import sure_rows
from support.cuda_emulation import Emulation
from support.sure_rows import Case, Outcome
from torch import Tensor

import fastkd
from fastkd import kd_loss
from fastkd.backends import registry
from fastkd.online import mutual_loss

VARIANTS: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in fastkd.DIVERGENCES),
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


def _shown(variant: tuple[str, dict[str, float]]) -> str:
    return "-".join([variant[0], *(f"{x:g}" for x in variant[1].values())])


variants = pytest.mark.parametrize("variant", VARIANTS, ids=_shown)
# Divergences for Triton's interpreter, at three seconds each: closed forms, a mixture inside a logarithm, and a sign.
SHORT = ("forward_kl", "reverse_kl", "mixture", "jsd", "skew_reverse_kl", "tvd", "alpha_beta")
of_triton = pytest.mark.parametrize(
    "variant",
    [
        pytest.param(
            variant, id=_shown(variant), marks=() if _shown(variant) in SHORT else pytest.mark.heavy
        )
        for variant in VARIANTS
    ],
)


class Bar(NamedTuple):
    """Allowed multiples of plain PyTorch's error; an error counts as at least `units` units in the last place."""

    ratio: float
    units: float = 1.0


# The reference rounds once. On the cpu backend most ratios are at most 1; PER_DIVERGENCE lists the others with reasons.
# An error of one unit, which is two roundings of the result, is ignored: below it either side is right by luck. The
# Triton and CUDA kernels, which keep one float per exponential and sum, are allowed four units.
BARS = {"reference": Bar(1.0), "cpu": Bar(1.1)}
OTHERS = Bar(3.0, 4.0)
# At a top probability of 1 - 1e-6 on both sides the sum of the rest carries the rounding of an exponent, 5e-13 of
# the gradient's largest entry; in PyTorch the two sides' errors cancel to 0.
ON_CUDA = {
    "mixture": Bar(6.5, 4.0),
    # A power of p is made from p itself, whose exponent is rounded: 14 units at a probability of 1e-6.
    "alpha_beta": Bar(3.3, 4.0),
}
PER_DIVERGENCE = {
    # Gradients of terms that are log(1 / alpha) where p is far above q, and cancel but for a few percent: both
    # contenders are off by the roundings of that number.
    "skew_forward_kl": Bar(2.8),  # 1.5 with AVX-512, 2.6 with AVX2
    "skew_reverse_kl": Bar(1.2),
    # PyTorch's two rounded normalisers cancel in KL(p || q) + KL(q || p), so that it is right to a unit.
    "mixture": Bar(2.1),
    # With exponents of which one is 0 or negative, one unit of log p becomes several of a power of p. 1.0 by default.
    "alpha_beta": Bar(2.0),
    # These hold without fused multiply-adds; with them the ratios are 1.0 and 1.05.
    "hellinger": Bar(1.25),
    "soft_cross_entropy": Bar(1.5),
}


@functools.cache
def synthetic_rows() -> tuple[Case, ...]:
    return tuple(sure_rows.made_up((40, 2500), (1e-3, 1e-6, 1e-9)))


@functools.cache
def low_precision_rows() -> tuple[Case, ...]:
    return tuple(case for case in synthetic_rows() if case.student.shape[-1] == 40)


@functools.cache
def real_rows() -> tuple[Case, ...]:
    return tuple(sure_rows.all_real())


@functools.cache
def _exact_and_plain(
    name: str, parameters: tuple[tuple[str, float], ...], case: str
) -> tuple[Outcome, ...]:
    """(exact outcome, outcome of plain float32 PyTorch)."""
    results = {case.name: case for case in (*synthetic_rows(), *real_rows())}[case]
    options: dict[str, Any] = {"divergence": name, "parameters": dict(parameters)}
    return tuple(
        sure_rows.plain(results, dtype, **options) for dtype in (torch.float64, torch.float32)
    )


def bar_of(backend: str, divergence: str) -> Bar:
    """The bar for a backend."""
    if backend == "cpu":
        return PER_DIVERGENCE.get(divergence, BARS["cpu"])
    if backend == "cuda":
        return ON_CUDA.get(divergence, OTHERS)
    return BARS.get(backend, OTHERS)


def assert_within_bar(
    backend: str, variant: tuple[str, dict[str, float]], cases: tuple[Case, ...]
) -> None:
    """Assert that every case is within the bar."""
    name, parameters = variant
    divergence = fastkd.DIVERGENCES[name](**parameters)
    bar = bar_of(backend, name)
    worse = []
    for case in cases:
        exact, plain = _exact_and_plain(name, tuple(parameters.items()), case.name)
        actual = sure_rows.run(
            lambda s, t: kd_loss(s, t, divergence=divergence, reduction="none", backend=backend),
            case,
        )
        for what, ratio in sure_rows.ratios(actual, plain, exact, bar.units)._asdict().items():
            if not ratio <= bar.ratio * (1 + 1e-6):
                worse.append(f"{what} of {case.name}: {ratio:.3g} times the error of PyTorch")
    assert not worse, "\n".join(worse)


@variants
def test_synthetic_rows(backend: str, variant: tuple[str, dict[str, float]]) -> None:
    assert_within_bar(backend, variant, synthetic_rows())


@variants
def test_real_rows(backend: str, variant: tuple[str, dict[str, float]]) -> None:
    assert_within_bar(backend, variant, real_rows())


def assert_within_bar_with(
    backend: str, divergence: str, cases: tuple[Case, ...], bar: Bar, **options: Any
) -> None:
    """Assert that the cases are within the bar with other options; labels are the teacher's top tokens if alpha needs
    them."""
    worse = []
    for case in cases:
        labels = case.teacher.argmax(-1) if options.get("alpha", 1.0) < 1.0 else None
        formula: dict[str, Any] = {"divergence": divergence, "labels": labels, **options}
        exact, plain = (
            sure_rows.plain(case, dtype, **formula) for dtype in (torch.float64, torch.float32)
        )
        actual = sure_rows.run(
            lambda s, t, formula=formula: kd_loss(
                s, t, reduction="none", backend=backend, **formula
            ),
            case,
        )
        for what, ratio in sure_rows.ratios(actual, plain, exact, bar.units)._asdict().items():
            if not ratio <= bar.ratio * (1 + 1e-6):
                worse.append(f"{what} of {case.name}: {ratio:.3g} times the error of PyTorch")
    assert not worse, "\n".join(worse)


# At temperature 0.5 the probability of the others is squared. Where it was 1e-6 or less, float64 itself, which is the
# measure, has lost the sign of p - q and the gradient of a power of p. The teacher's gradient depends on the sum of h.
SQUARED = ("1e-06", "1e-09")
of_sums = [
    *("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"),
    *("tvd", "hellinger", "alpha_beta"),
]


def rows_at_half() -> tuple[Case, ...]:
    cases = tuple(case for case in synthetic_rows() if not any(x in case.name for x in SQUARED))
    assert len(cases) == 12
    return cases


@pytest.mark.parametrize("divergence", of_sums)
def test_low_temperature(backend: str, divergence: str) -> None:
    bar = Bar(1.2) if backend == "cpu" else OTHERS
    assert_within_bar_with(backend, divergence, rows_at_half(), bar, temperature=0.5)


def test_low_temperature_in_triton() -> None:
    pytest.importorskip("triton")
    cases = tuple(case for case in rows_at_half() if case.name.startswith("peaked 0.001, diff"))[:1]
    assert_within_bar_with("triton", "skew_reverse_kl", cases, OTHERS, temperature=0.5)


@pytest.mark.parametrize("divergence", of_sums)
def test_low_temperature_of_the_cuda_source(emulation: Emulation, divergence: str) -> None:
    assert_within_bar_with("cuda", divergence, rows_at_half(), OTHERS, temperature=0.5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl"])
def test_high_temperature(divergence: str) -> None:
    assert_within_bar_with("cpu", divergence, low_precision_rows(), Bar(1.2), temperature=4.0)


def test_temperatures_of_rows_are_as_exact_as_a_number() -> None:
    """The two temperatures of a row are one, even though a chunk of rows has a part of each tensor."""
    case = sure_rows.normal(3.0, 1e-2, 2500)
    temperature = torch.full((sure_rows.ROWS,), 2.0)
    number, tensor = (
        kd_loss(
            case.student, case.teacher, divergence="forward_kl", temperature=x, reduction="none",
            backend="portable",
        )
        for x in (2.0, temperature)
    )  # fmt: skip
    assert torch.equal(number, tensor)


# Each label is the token of which both sides are sure: q - 1 would have no digits.
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_labels(divergence: str, smoothing: float) -> None:
    assert_within_bar_with(
        "cpu", divergence, low_precision_rows(), Bar(1.2), alpha=0.5, label_smoothing=smoothing
    )


def _mutual(case: Case, dtype: torch.dtype, labels: Tensor | None, temperature: float) -> Outcome:
    """Plain PyTorch: what the first of two students learns from the other."""
    student = case.student.to(dtype).requires_grad_()
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (student, case.teacher.to(dtype)))
    loss = temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    if labels is not None:
        loss = loss + F.cross_entropy(student, labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return Outcome(loss.detach().double(), gradient.double(), None)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("labelled", [False, True])
def test_mutual_loss(backend: str, labelled: bool, temperature: float) -> None:
    worse = []
    for case in synthetic_rows():
        labels = case.teacher.argmax(-1) if labelled else None
        exact, plain = (
            _mutual(case, dtype, labels, temperature) for dtype in (torch.float64, torch.float32)
        )

        def ours(s: Tensor, t: Tensor, labels: Tensor | None = labels) -> Tensor:
            options: dict[str, Any] = {"temperature": temperature, "reduction": "none"}
            return mutual_loss([s, t], labels, backend=backend, **options)[0]

        actual = sure_rows.run(ours, case, teacher_gradient=False)
        for what, ratio in sure_rows.ratios(actual, plain, exact)._asdict().items():
            if ratio is not None and not ratio <= 1.75:
                worse.append(f"{what} of {case.name}: {ratio:.3g} times the error of PyTorch")
    assert not worse, "\n".join(worse)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_sure_row_keeps_its_digits(backend: str, name: str) -> None:
    assert_digits(backend, name)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_a_sure_row_keeps_its_digits_in_triton(name: str) -> None:
    pytest.importorskip("triton")
    assert_digits("triton", name)


def assert_digits(backend: str, name: str) -> None:
    """Assert that value and gradients are right to 1e-4. A ratio would say nothing, as PyTorch has no digit of a sure
    token's gradient."""
    case = {case.name: case for case in low_precision_rows()}["peaked 1e-09, same tops, V = 40"]
    exact, _ = _exact_and_plain(name, (), case.name)
    actual = sure_rows.run(
        lambda s, t: kd_loss(s, t, divergence=name, reduction="none", backend=backend), case
    )
    assert all(error < 1e-4 for error in sure_rows.errors(actual, exact, math.inf, 0.0))


@variants
def test_reference(variant: tuple[str, dict[str, float]]) -> None:
    assert_within_bar("reference", variant, low_precision_rows())


@variants
def test_every_instruction_set(instructions: str, variant: tuple[str, dict[str, float]]) -> None:
    assert_within_bar("cpu", variant, low_precision_rows())


@of_triton
def test_triton(variant: tuple[str, dict[str, float]]) -> None:
    pytest.importorskip("triton")
    # Without rows that leave 1e-3 to the other tokens: those that leave less take the same branches.
    cases = tuple(case for case in low_precision_rows() if "peaked 0.001" not in case.name)
    assert len(cases) == len(low_precision_rows()) - 3
    assert_within_bar("triton", variant, cases)


@variants
def test_cuda_source(emulation: Emulation, variant: tuple[str, dict[str, float]]) -> None:
    assert_within_bar("cuda", variant, synthetic_rows())


FAULTS = {
    "the student's sure column has the gradient of any other": (
        "gradient.h", "(z == row.s_sure.z ? row.s_sure.gradient : x)", "(x)"),
    "the teacher's sure column has the gradient of any other": (
        "gradient.h", "(z == row.t_sure.z ? row.t_sure.gradient : x)", "(x)"),
    "a block's sum of the rest is lost": ("statistics.h", "  a.s_exp_sum += b.s_exp_sum;\n", ""),
    "the sign of the log ratio": ("sums.h", "s.other_gap + log_ratio);", "s.other_gap - log_ratio);"),
    "what was the top is not one of the rest": ("statistics.h", "    a.s_exp_sum += a.s_max_count;\n", ""),
}  # fmt: skip


# Each planted fault is compiled, which takes ten seconds; these tests check the test above, not the kernels.
@pytest.mark.heavy
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_detected(
    fault: str, emulation: Emulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = emulation.with_fault(FAULTS[fault], tmp_path)
    monkeypatch.setattr(registry.load("cuda"), "_cuda", broken)
    emulation.ranks = 4
    with pytest.raises(AssertionError):
        for divergence in ("forward_kl", "mixture", "jsd"):
            assert_within_bar("cuda", (divergence, {}), low_precision_rows())


def assert_symmetric(backend: str, vocabulary: int, dtype: torch.dtype = torch.float32) -> None:
    """Assert that jsd(0.5) with exchanged sides has the same bits."""
    generator = torch.Generator().manual_seed(vocabulary)
    student, teacher = 3.0 * torch.randn(2, 64, vocabulary, generator=generator).to(dtype)
    options: dict[str, Any] = {"divergence": "jsd", "reduction": "none", "backend": backend}
    for temperature in (1.0, 0.7, 2.0):
        one = kd_loss(student, teacher, temperature=temperature, **options)
        assert torch.equal(one, kd_loss(teacher, student, temperature=temperature, **options))


@pytest.mark.parametrize("vocabulary", [7, 40, 2500])
def test_jsd_at_one_half_is_symmetric_to_the_bit(backend: str, vocabulary: int) -> None:
    assert_symmetric(backend, vocabulary)
    # The reference computes in float64; rounding to float32 would hide an asymmetry.
    assert_symmetric("reference", vocabulary, torch.float64)


@pytest.mark.parametrize("vocabulary", [7, 40, 2500])
def test_jsd_is_symmetric_on_every_instruction_set(instructions: str, vocabulary: int) -> None:
    assert_symmetric("cpu", vocabulary)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl", "hellinger"])
def test_a_sure_token_that_the_other_side_excludes(
    any_backend: str, divergence: str, side: str
) -> None:
    """One side has more than half of its probability at a token where the other's logit is -inf."""
    sure, other = torch.zeros(2, 5), torch.zeros(2, 5)
    sure[0, 1], other[0, 1] = 3.0, -math.inf
    sure[1, 4], other[1, 4] = 9.0, -math.inf
    pair = (other, sure) if side == "student" else (sure, other)
    results = []
    for tensors, backend in (
        (pair, any_backend),
        (tuple(x.double() for x in pair), "reference"),
    ):
        leaves = [x.clone().requires_grad_() for x in tensors]
        loss = kd_loss(*leaves, divergence=divergence, reduction="none", backend=backend)
        found = torch.autograd.grad(loss.sum(), leaves)
        (alone,) = torch.autograd.grad(
            kd_loss(leaves[0], leaves[1].detach(), divergence=divergence, backend=backend),
            leaves[0],
        )
        results.append([x.double() for x in (loss.detach(), *found, alone)])
    for value, right in zip(*results, strict=True):
        assert right.isfinite().all()
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)
