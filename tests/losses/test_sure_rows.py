"""Where rounding matters (tests/support/sure_rows.py), no divergence is further from float64 than plain float32
PyTorch."""

from __future__ import annotations

import functools
import math
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import sure_rows
from support.cuda_emulation import Emulation
from support.sure_rows import VARIANTS, Case, Outcome, shown
from torch import Tensor

import fastkd
from fastkd import kd_loss
from fastkd.backends import registry
from fastkd.divergences import in_two_parts, power, power_product
from fastkd.online import mutual_loss

variants = pytest.mark.parametrize("variant", VARIANTS, ids=shown)
# Divergences for Triton's interpreter, a second for each: closed forms, a mixture inside a logarithm, and a sign.
SHORT = ("forward_kl", "reverse_kl", "mixture", "jsd", "skew_reverse_kl", "tvd", "alpha_beta")
in_triton = pytest.mark.usefixtures("corrected_interpreter")
of_triton = pytest.mark.parametrize(
    "variant",
    [
        pytest.param(
            variant, id=shown(variant), marks=() if shown(variant) in SHORT else pytest.mark.heavy
        )
        for variant in VARIANTS
    ],
)


# The largest error that a backend may have, as a multiple of plain PyTorch's, and the divergences that may have a
# larger one. An error of one unit in the last place, which is two roundings of the result, is ignored: below it either
# side is right by luck. The limits are a few percent above the largest ratios beside PyTorch with AVX-512.
# docs/numerics.md has the reasons for the exceptions.
LIMITS: dict[str, tuple[float, dict[str, float]]] = {
    "reference": (1.0, {}),
    "portable": (1.15, {}),
    "cpu": (1.1, {"skew_forward_kl": 1.2, "skew_reverse_kl": 1.15}),
    "cpu without FMA": (1.15, {"skew_forward_kl": 1.2}),
    "triton": (
        1.1, {"mixture": 1.25, "soft_cross_entropy": 1.2, "skew_forward_kl": 1.2, "skew_reverse_kl": 1.2},
    ),
    "cuda": (1.15, {"skew_forward_kl": 1.2, "alpha_beta": 1.2}),
}  # fmt: skip
# PyTorch's own error depends on the instructions that it uses. With others (ATEN_CPU_CAPABILITY=avx2 or default), it is
# smaller on some rows, and the ratios are up to this multiple of the limits.
WITHOUT_AVX512 = 1.6


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


def _has_no_fma() -> bool:
    """Whether the cpu backend uses instructions without a fused multiply-add: those of every x86 processor, SSE2."""
    from fastkd import _C

    return _C.instruction_set() == "baseline" and platform.machine() in ("x86_64", "AMD64")


def limit_of(backend: str, variant: tuple[str, dict[str, float]]) -> float:
    """The largest ratio allowed."""
    usual, exceptions = LIMITS["cpu without FMA" if backend == "cpu" and _has_no_fma() else backend]
    limit = exceptions.get(variant[0], usual)
    if backend == "reference" or torch.backends.cpu.get_cpu_capability() == "AVX512":
        return limit
    return WITHOUT_AVX512 * limit


def assert_within_bar(
    backend: str, variant: tuple[str, dict[str, float]], cases: tuple[Case, ...]
) -> None:
    """Assert that every case is within the bar."""
    name, parameters = variant
    divergence = fastkd.DIVERGENCES[name](**parameters)
    limit = limit_of(backend, variant)
    worse = []
    for case in cases:
        exact, plain = _exact_and_plain(name, tuple(parameters.items()), case.name)
        actual = sure_rows.run(
            lambda s, t: kd_loss(s, t, divergence=divergence, reduction="none", backend=backend),
            case,
        )
        for what, ratio in sure_rows.ratios(actual, plain, exact)._asdict().items():
            if not ratio <= limit * (1 + 1e-6):
                worse.append(f"{what} of {case.name}: {ratio:.3g} times the error of PyTorch")
    assert not worse, "\n".join(worse)


@variants
def test_synthetic_rows(backend: str, variant: tuple[str, dict[str, float]]) -> None:
    assert_within_bar(backend, variant, synthetic_rows())


# Parameters for which a definition takes other branches take them on the rows above, too.
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, id=shown(variant), marks=pytest.mark.heavy if variant[1] else ())
        for variant in VARIANTS
    ],
)
def test_real_rows(backend: str, variant: tuple[str, dict[str, float]]) -> None:
    assert_within_bar(backend, variant, real_rows())


def assert_within_bar_with(
    backend: str, divergence: str, cases: tuple[Case, ...], limit: float, **options: Any
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
        for what, ratio in sure_rows.ratios(actual, plain, exact)._asdict().items():
            if not ratio <= limit * (1 + 1e-6):
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
    assert_within_bar_with(backend, divergence, rows_at_half(), 1.2, temperature=0.5)


@in_triton
def test_low_temperature_in_triton() -> None:
    cases = tuple(case for case in rows_at_half() if case.name.startswith("peaked 0.001, diff"))[:1]
    assert_within_bar_with("triton", "skew_reverse_kl", cases, 1.2, temperature=0.5)


@pytest.mark.parametrize("divergence", of_sums)
def test_low_temperature_of_the_cuda_source(emulation: Emulation, divergence: str) -> None:
    assert_within_bar_with("cuda", divergence, rows_at_half(), 1.2, temperature=0.5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl"])
def test_high_temperature(divergence: str) -> None:
    assert_within_bar_with("cpu", divergence, low_precision_rows(), 1.2, temperature=4.0)


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
        "cpu", divergence, low_precision_rows(), 1.2, alpha=0.5, label_smoothing=smoothing
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
            if ratio is not None and not ratio <= 1.4:
                worse.append(f"{what} of {case.name}: {ratio:.3g} times the error of PyTorch")
    assert not worse, "\n".join(worse)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_sure_row_keeps_its_digits(backend: str, name: str) -> None:
    assert_digits(backend, name)


@in_triton
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_a_sure_row_keeps_its_digits_in_triton(name: str) -> None:
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


@in_triton
@of_triton
def test_triton(variant: tuple[str, dict[str, float]]) -> None:
    # Without rows that leave 1e-3 to the other tokens: those that leave less take the same branches.
    cases = tuple(case for case in low_precision_rows() if "peaked 0.001" not in case.name)
    assert len(cases) == len(low_precision_rows()) - 3
    assert_within_bar("triton", variant, cases)


@variants
def test_cuda_source(emulation: Emulation, variant: tuple[str, dict[str, float]]) -> None:
    # Parameters for which a definition takes other branches take them on narrow rows, too.
    assert_within_bar("cuda", variant, low_precision_rows() if variant[1] else synthetic_rows())


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


# What keeps digits beyond those of a float, with the divergence that needs it.
FAULTS_OF_ROUNDING = {
    "the mean of log q is not subtracted": (
        "soft_cross_entropy", ("gradient.h", "    center_log_q(call, row);\n", "")),
    "log q keeps one float of its offset": (
        "soft_cross_entropy",
        ("gradient.h", "side.offset_low = float(offset - side.offset);", "side.offset_low = 1e-6f;")),
    "the rounding of log2(e) is not corrected": (
        "soft_cross_entropy", ("finish.h", "  correct_far_columns(call, row);\n", "")),
}  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("fault", FAULTS_OF_ROUNDING)
def test_a_planted_fault_of_rounding_is_detected(
    fault: str, emulation: Emulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divergence, edit = FAULTS_OF_ROUNDING[fault]
    broken = emulation.with_fault(edit, tmp_path)
    monkeypatch.setattr(registry.load("cuda"), "_cuda", broken)
    with pytest.raises(AssertionError, match="times the error of PyTorch"):
        assert_within_bar("cuda", (divergence, {}), synthetic_rows())


@pytest.mark.parametrize("exponent", [0.3, -0.3, 0.9, 1.2])
def test_a_power_does_not_round_its_exponent(exponent: float) -> None:
    log_x = torch.linspace(-40.0, -0.1, 1000)
    log_y = log_x.roll(500)
    parts, others = in_two_parts(exponent), in_two_parts(0.4)
    first = exponent * log_x.double()
    for actual, plain, exact in (
        (power(log_x, *parts), (exponent * log_x).exp(), first.exp()),
        (
            power_product(log_x, *parts, log_y, *others),
            (exponent * log_x + 0.4 * log_y).exp(),
            (first + 0.4 * log_y.double()).exp(),
        ),
    ):
        error, usual = (
            float(((x - exact) / exact).abs().max()) / sure_rows.UNIT for x in (actual, plain)
        )
        assert error < 1.5 and usual > 4.0


def test_a_product_of_powers_is_finite_if_its_factors_are_not() -> None:
    log_x, log_y = torch.tensor([-200.0]), torch.tensor([-700.0])
    exact = math.exp(1.2 * -200.0 + 0.3 * 700.0)
    actual = power_product(log_x, *in_two_parts(1.2), log_y, *in_two_parts(-0.3))
    torch.testing.assert_close(actual.double(), torch.tensor([exact]).double(), rtol=1e-6, atol=0)


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
