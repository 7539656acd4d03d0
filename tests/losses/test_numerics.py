"""Where floating point is hard: width, infinities, large logits, extreme temperatures, underflow, narrow types."""

from __future__ import annotations

import itertools
import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support import oracles
from support.accuracy import (
    assert_within,
    bars,
    check,
    labels_for,
    logits,
    powers_for,
    upstream_for,
)
from support.cuda_emulation import Emulation
from support.oracles import UNNORMALIZED, compose
from torch import Tensor

import fastkd
from fastkd import kd_loss
from fastkd.divergences import WITH_LABELS

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
defaults = pytest.mark.parametrize("divergence", fastkd.DIVERGENCES)
# Two sweeps over a row, three sweeps, no normalizer.
kinds = pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "squared_error"])

# One column; fewer than any SIMD vector; vectors of 4, 8 and 16 exactly, and with one column more and less; the C++
# kernel's block of 2048 columns exactly, and with one column more and less; two blocks; the vocabularies of language
# models (SmolLM2, Qwen, Gemma), and one column past 2^16, where a 16-bit index wraps.
SMALL = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100]
BLOCKS = [2047, 2048, 2049, 4096, 4097]
WIDE = [49152, 65537, 151936, 262144]


def _check_random_logits(
    backend: str,
    rows: int,
    columns: int,
    divergence: str,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    student, teacher = (
        logits(rows, columns, seed=1, dtype=dtype),
        logits(rows, columns, seed=2, dtype=dtype),
    )
    labels = labels_for(rows, vocabulary=columns, seed=3)
    check(
        backend,
        student,
        teacher,
        labels,
        divergence=divergence,
        alpha=0.6,
        temperature=1.5,
        **options,
    )


# 1 row: fewer than the threads, so that threads share it. 5 rows: not a multiple of the threads.
@kinds
@pytest.mark.parametrize("columns", SMALL + BLOCKS)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.pairwise(each="backend")
def test_widths_around_a_vector_and_a_block(
    backend: str, rows: int, columns: int, divergence: str
) -> None:
    for dtype in FLOATS:
        _check_random_logits(backend, rows, columns, divergence, dtype)


@kinds
@pytest.mark.parametrize("columns", WIDE)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.pairwise(each="backend")
def test_wide_vocabularies(backend: str, rows: int, columns: int, divergence: str) -> None:
    _check_random_logits(backend, rows, columns, divergence)


@pytest.mark.heavy
@defaults
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", BLOCKS + WIDE)
def test_every_width_type_and_divergence(
    backend: str, columns: int, dtype: torch.dtype, divergence: str
) -> None:
    for rows in (1, 5):
        _check_random_logits(backend, rows, columns, divergence, dtype)


def test_either_subgradient_is_accepted_where_p_equals_q() -> None:
    """The check of TVD accepts either sign only in columns where float32 cannot order p and q; a wrong sign elsewhere
    fails."""
    student, teacher = logits(1, 1000, seed=43), logits(1, 1000, seed=44)
    tied, other = teacher[0].topk(2).indices.tolist()
    for _ in range(5):  # each step shrinks the remaining gap by p
        log_q, log_p = (x.double().log_softmax(-1)[0, tied] for x in (student, teacher))
        teacher[0, tied] += float(log_q - log_p)
    allowed = bars(student, teacher, divergence="tvd", reduction="none")
    middle, bar = allowed.exact.teacher_gradient, allowed.teacher_gradient
    p = teacher.double().softmax(-1)[0]
    # h_v - p_v sum h, where the tied h is as large as p / 2 of either sign
    reach = -0.5 * p[tied] * p
    reach[tied] += 0.5 * p[tied]
    for share in (-1.0, 0.0, 0.5, 1.0):
        assert_within("a subgradient", middle + share * reach, middle, bar)
    wrong = torch.zeros_like(p)
    wrong[other] = p[other]
    for sign in (-1, 1):
        with pytest.raises(AssertionError, match="elements are off"):
            assert_within("beyond them", middle + 1.01 * sign * reach, middle, bar)
        with pytest.raises(AssertionError, match=rf"1 of 1000 elements are off; at \(0, {other}\)"):
            assert_within("a wrong sign", middle + sign * wrong, middle, bar)


@kinds
def test_reused_memory_does_not_leak_into_results(divergence: str) -> None:
    """Outputs of 4 MB, a size from which the allocator reuses memory that holds the previous call's results."""
    for seed in range(2):
        student, teacher = logits(4, 262144, seed=seed), logits(4, 262144, seed=seed + 1)
        mask = torch.tensor([True, True, seed == 0, True])
        check("cpu", student, teacher, divergence=divergence, mask=mask)


@kinds
def test_flat_rows(backend: str, divergence: str) -> None:
    """262144 terms of equal size: a running float32 sum would lose three digits."""
    student, teacher = (
        logits(2, 262144, seed=4, spread=0.05),
        logits(2, 262144, seed=5, spread=0.05),
    )
    check(backend, student, teacher, divergence=divergence)


@kinds
def test_a_peak_in_every_position(backend: str, divergence: str) -> None:
    """One column holds nearly everything: in the first block, at its edge, in the second, in the tail."""
    for peak in (0, 2047, 2048, 4095, 4096, 4100):
        student, teacher = logits(2, 4101, seed=6), logits(2, 4101, seed=7)
        student[0, peak] += 40.0
        teacher[1, peak] += 40.0
        check(backend, student, teacher, divergence=divergence)


@kinds
def test_many_rows(backend: str, divergence: str) -> None:
    """The sum over 20,000 rows is as exact as the single rows."""
    student, teacher = logits(20_000, 5, seed=8), logits(20_000, 5, seed=9)
    check(backend, student, teacher, divergence=divergence, reduction="mean")
    check(backend, student, teacher, divergence=divergence)


# Types


@defaults
@pytest.mark.parametrize("teacher_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("student_dtype", FLOATS, ids=str)
def test_dtypes_and_mixtures_of_dtypes(
    backend: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype, divergence: str
) -> None:
    # 71 columns: four vectors of 16 and a tail.
    student, teacher = (
        logits(3, 71, seed=10, dtype=student_dtype),
        logits(3, 71, seed=11, dtype=teacher_dtype),
    )
    labels = labels_for(3, vocabulary=71, seed=12)
    check(backend, student, teacher, labels, divergence=divergence, temperature=2.0, alpha=0.5)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_are_widened_before_the_softmax(
    backend: str, dtype: torch.dtype, divergence: str
) -> None:
    """For close distributions, a log-softmax in the logits' dtype would give divergences of either sign."""
    student = logits(4, 4099, seed=13, dtype=dtype)
    teacher = (student.float() + logits(4, 4099, seed=14, spread=0.05)).to(dtype)
    measured = check(backend, student, teacher, divergence=divergence)
    assert (measured.loss > 0).all()


def test_a_bfloat16_gradient_is_rounded_at_most_twice(backend: str) -> None:
    """The gradient is rounded in the forward, and once more by an upstream factor that is not a power of 2."""
    student, teacher = (
        logits(5, 300, seed=15, dtype=torch.bfloat16),
        logits(5, 300, seed=16, dtype=torch.bfloat16),
    )
    upstream = upstream_for(5)
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    exact = compose(student, teacher, reduction="none", upstream=upstream).student_gradient
    # Two roundings of half a unit of 2^-7 each, and the float32 error beside them.
    torch.testing.assert_close(gradient.double(), exact, rtol=2**-7 * 1.01, atol=1e-7)


@defaults
@pytest.mark.parametrize("plain", ["portable", "reference"])
def test_float64_is_computed_in_float64(divergence: str, plain: str) -> None:
    student = logits(4, 1000, seed=17, dtype=torch.float64)
    labels = labels_for(4, vocabulary=1000, seed=18)
    for teacher in (logits(4, 1000, seed=19, dtype=torch.float64), logits(4, 1000, seed=19)):
        options: dict[str, Any] = {
            "divergence": divergence,
            "temperature": 0.7,
            "alpha": 0.5,
            "reduction": "none",
        }
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss = kd_loss(s, t, labels, backend=plain, **options)
        upstream = upstream_for(4).double()
        exact = compose(student, teacher, labels, upstream=upstream, **options)
        assert loss.dtype == torch.float64
        gradients = torch.autograd.grad(loss, (s, t), upstream)
        torch.testing.assert_close(loss.detach(), exact.loss, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(gradients[0], exact.student_gradient, rtol=1e-10, atol=1e-14)
        assert gradients[1].dtype == teacher.dtype
        tolerance = 1e-10 if teacher.dtype == torch.float64 else torch.finfo(torch.float32).eps
        torch.testing.assert_close(
            gradients[1].double(), exact.teacher_gradient, rtol=tolerance, atol=1e-12
        )


# Infinities: a column that a logits processor has forbidden


def _forbidden(*sides: Tensor) -> Tensor:
    """Logits with some columns of each row, but never all, at -inf on the given sides."""
    drop = torch.rand(sides[0].shape, generator=torch.Generator().manual_seed(20)) < 0.3
    drop[:, 0] = False
    drop[1] = False  # a row without any
    drop[2, 1:] = True  # a row with one column left
    for side in sides:
        side.masked_fill_(drop, -torch.inf)
    return drop


@defaults
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_column_that_both_sides_forbid(backend: str, dtype: torch.dtype, divergence: str) -> None:
    """0 log(0 / 0) = 0: the result is as without the column, whose gradient is 0."""
    student, teacher = logits(4, 50, seed=21, dtype=dtype), logits(4, 50, seed=22, dtype=dtype)
    drop = _forbidden(student, teacher)
    measured = check(backend, student, teacher, divergence=divergence, temperature=2.0)
    assert measured.loss.isfinite().all()
    assert not measured.student_gradient[drop].any()
    kept = ~drop[0]
    without = check(
        backend, student[:1, kept], teacher[:1, kept], divergence=divergence, temperature=2.0
    )
    torch.testing.assert_close(measured.loss[0], without.loss[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", "mixture", "soft_cross_entropy", "jsd"]
)
@pytest.mark.parametrize("temperatures", [(0.5, 0.5), (1.0, 0.9), (0.9, 1.0), (2.0, 1.0)], ids=str)
def test_a_mask_of_the_lowest_finite_number(
    backend: str, temperatures: tuple[float, float], divergence: str
) -> None:
    """The lowest finite number acts like -inf; below a temperature of 1 it overflows to -inf."""
    student, teacher = logits(3, 20, seed=31), logits(3, 20, seed=32)
    student[:, 15:] = teacher[:, 15:] = torch.finfo(torch.float32).min
    names = ("temperature", "teacher_temperature")
    options = {"divergence": divergence, **dict(zip(names, temperatures, strict=True))}
    results = []
    for kept in (slice(None), slice(15)):
        sides = [x[:, kept].clone().requires_grad_() for x in (student, teacher)]
        loss = kd_loss(*sides, backend=backend, **options)
        results.append((loss.detach(), *(x[:, :15] for x in torch.autograd.grad(loss, sides))))
    for masked, without in zip(*results, strict=True):
        torch.testing.assert_close(masked, without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rows_far_below_0(backend: str, side: str) -> None:
    """Only differences of logits matter, even if every logit of a row is as low as a mask's value."""
    lowest = torch.finfo(torch.float32).min
    low = torch.tensor([[lowest] * 4, [-2e30, -2e30, -1e31, -2e30], [-math.inf, -math.inf, -5, -6]])
    near = torch.tensor([[0.0] * 4, [0.0, 0.0, -math.inf, 0.0], [-math.inf, -math.inf, -5, -6]])
    other = logits(3, 4, seed=33)
    results = []
    for row in (low, near):
        student, teacher = (row, other) if side == "student" else (other, row)
        results.append(
            kd_loss(student, teacher, divergence="jsd", reduction="none", backend=backend)
        )
    torch.testing.assert_close(*results)
    assert kd_loss(torch.full((1, 4), -math.inf), other[:1], backend=backend).isnan()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_infinite_upstream_gradient_of_dropped_rows(
    any_backend: str, dtype: torch.dtype
) -> None:
    student = logits(4, 9, seed=34, dtype=dtype).requires_grad_()
    teacher, labels = logits(4, 9, seed=35, dtype=dtype), torch.tensor([1, -100, 2, 3])
    mask, upstream = (
        torch.tensor([True, True, False, True]),
        torch.tensor([1, math.inf, math.nan, 1]),
    )
    functions = [kd_loss]
    # bfloat16 takes the same path as float32; float16 defers its gradient. The graph is the same for all backends.
    if dtype != torch.bfloat16 and any_backend == "reference":
        functions.append(torch.compile(kd_loss, backend="aot_eager"))
    for function in functions:
        losses = function(
            student, teacher, labels, mask=mask, reduction="none", backend=any_backend
        )
        (gradient,) = torch.autograd.grad(losses, student, upstream)
        assert not gradient[1:3].any() and gradient[0::3].isfinite().all() and gradient[0].any()


def test_alpha_0_ignores_an_infinite_divergence(any_backend: str) -> None:
    student, teacher = logits(2, 9, seed=36), logits(2, 9, seed=37).requires_grad_()
    student[:, 1] = -math.inf
    loss = kd_loss(student, teacher, torch.tensor([0, 2]), alpha=0.0, backend=any_backend)
    assert loss.isfinite() and not torch.autograd.grad(loss, teacher)[0].any()


@pytest.mark.parametrize("vocabulary", [9, 2500])
def test_alpha_0_ignores_a_teacher_of_minus_infinity(any_backend: str, vocabulary: int) -> None:
    """Without weight, even a teacher that has no softmax leaves the cross-entropy as it is."""
    student, labels = logits(2, vocabulary, seed=36), torch.tensor([0, 2])
    student.requires_grad_()
    expected = torch.nn.functional.cross_entropy(student, labels)
    for teacher in (torch.full_like(student, -math.inf), torch.full_like(student, math.nan)):
        loss = kd_loss(student, teacher, labels, alpha=0.0, backend=any_backend)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, student)[0],
            torch.autograd.grad(expected, student, retain_graph=True)[0],
        )


def test_negated_views(backend: str) -> None:
    student, teacher = logits(3, 9, seed=38), logits(3, 9, seed=39)
    weight = torch.tensor([1.0, 2.0, 0.5])
    views = [torch._neg_view(-x) for x in (student, teacher, weight)]
    assert all(view.is_neg() for view in views)
    actual = kd_loss(*views[:2], weight=views[2], backend=backend)
    assert torch.equal(actual, kd_loss(student, teacher, weight=weight, backend=backend))


# Which side's zeros make the divergence infinite: p / q where q = 0, q / p where p = 0.
INFINITE_WITHOUT_P = {"reverse_kl", "mixture", *UNNORMALIZED}
INFINITE_WITHOUT_Q = {"forward_kl", "mixture", "soft_cross_entropy", *UNNORMALIZED}


@defaults
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_column_that_the_teacher_forbids(
    backend: str, dtype: torch.dtype, divergence: str
) -> None:
    student, teacher = logits(4, 50, seed=23, dtype=dtype), logits(4, 50, seed=24, dtype=dtype)
    _forbidden(teacher)
    if divergence in INFINITE_WITHOUT_P:
        loss = kd_loss(student, teacher, divergence=divergence, reduction="none", backend=backend)
        assert loss.isposinf().tolist() == [True, False, True, True]
    else:
        measured = check(backend, student, teacher, divergence=divergence)
        assert measured.loss.isfinite().all()
        assert measured.student_gradient.isfinite().all() and measured.student_gradient.any()


@defaults
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_column_that_the_student_forbids(
    backend: str, dtype: torch.dtype, divergence: str
) -> None:
    """Forward KL is infinite there, but its gradient, q - p, is finite."""
    student, teacher = logits(4, 50, seed=25, dtype=dtype), logits(4, 50, seed=26, dtype=dtype)
    _forbidden(student)
    infinite = divergence in INFINITE_WITHOUT_Q
    if divergence in ("mixture", *UNNORMALIZED):  # and so is a derivative
        loss = kd_loss(student, teacher, divergence=divergence, reduction="none", backend=backend)
        assert loss.isposinf().tolist() == [True, False, True, True]
        return
    measured = check(
        backend, student, teacher, divergence=divergence, teacher_gradient=not infinite
    )
    assert measured.loss.isposinf().tolist() == [infinite, False, infinite, infinite]
    assert measured.student_gradient.isfinite().all()


@pytest.mark.parametrize("side", ["student", "teacher"])
@defaults
def test_negligible_mass_beside_a_forbidden_column(
    backend: str, divergence: str, side: str
) -> None:
    """A probability of 1e-40 is 0 in float32: the result is as if both sides forbade the column."""
    if divergence in UNNORMALIZED:
        return  # a squared error of logits does not depend on probabilities
    student, teacher = logits(2, 40, seed=27), logits(2, 40, seed=28)
    student[:, 7] = teacher[:, 7] = -torch.inf
    results = []
    for beside in (-torch.inf, -200.0):
        (teacher if side == "student" else student)[:, 7] = beside
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss = kd_loss(s, t, divergence=divergence, reduction="none", backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (s, t))))
    # Equal up to rounding: rows with entries of -inf may use other instructions.
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_hard_labels_beside_a_forbidden_column(backend: str) -> None:
    student, teacher = logits(3, 40, seed=29), logits(3, 40, seed=30)
    student[:, 7] = teacher[:, 7] = -torch.inf
    labels = torch.tensor([3, 7, 39])  # the second row's target is impossible
    measured = check(backend, student, teacher, labels, alpha=0.5)
    assert measured.loss.isposinf().tolist() == [False, True, False]
    smoothed = kd_loss(
        student, teacher, labels, alpha=0.5, label_smoothing=0.1, reduction="none", backend=backend
    )
    assert smoothed.isposinf().all()  # as torch.nn.functional.cross_entropy


# Large logits


@defaults
def test_logits_of_1e4(backend: str, divergence: str) -> None:
    check(
        backend,
        logits(4, 100, seed=31, spread=1e4),
        logits(4, 100, seed=32, spread=1e4),
        divergence=divergence,
    )


@pytest.mark.parametrize("shifts", [(1e4, 0.0), (0.0, 1e4), (1e4, -1e4), (-1e4, -1e4)], ids=str)
@defaults
def test_a_common_shift_of_1e4(backend: str, divergence: str, shifts: tuple[float, float]) -> None:
    student, teacher = logits(3, 300, seed=33) + shifts[0], logits(3, 300, seed=34) + shifts[1]
    check(backend, student, teacher, divergence=divergence, temperature=2.0)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@defaults
@pytest.mark.pairwise(each="backend")
def test_temperatures(
    backend: str, divergence: str, dtype: torch.dtype, temperature: float
) -> None:
    student, teacher = logits(3, 300, seed=35, dtype=dtype), logits(3, 300, seed=36, dtype=dtype)
    check(backend, student, teacher, divergence=divergence, temperature=temperature)
    student, teacher = logits(3, 300, seed=37, spread=1e3), logits(3, 300, seed=38, spread=1e3)
    check(backend, student, teacher, divergence=divergence, temperature=temperature)


# Underflow


@defaults
def test_columns_whose_probability_underflows(backend: str, divergence: str) -> None:
    """Columns whose probability is below exp(-104), where float32 underflows, on both sides, on either, and far below.

    log(beta p + (1 - beta) q) is log 0 there.
    """
    gaps = torch.tensor([0.0, 80.0, 87.0, 88.5, 95.0, 103.0, 104.5, 150.0, 200.0, 300.0, 1e3, 1e5])
    student = -gaps.expand(12, 12).clone()
    teacher = -torch.stack([gaps.roll(shift) for shift in range(12)])
    if divergence not in (
        "reverse_kl",
        "mixture",
        "soft_cross_entropy",
        "forward_kl",
        *UNNORMALIZED,
    ):
        check(backend, student, teacher, divergence=divergence)
    # With a peak that both sides share, every divergence is moderate.
    student, teacher = -gaps.expand(6, 12).clone(), -gaps.expand(6, 12).clone()
    teacher[:, 1:] -= logits(6, 11, seed=39, spread=10.0).abs()

    # Of 1/2 sum |p - q|, the peak has half, which float64 cannot know: 1 - p is lost in p. The teacher's is the higher.
    def one_sided_tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_q.exp() - log_p.exp()).clamp(min=0.0)

    with patch.dict(oracles.DIVERGENCES, tvd=one_sided_tvd):
        for temperature in (0.5, 1.0, 2.0):
            options: dict[str, Any] = {"divergence": divergence, "temperature": temperature}
            assert check(backend, student, teacher, **options).loss.isfinite().all()


@pytest.mark.parametrize("beta", [1e-6, 0.5, 1 - 1e-6])
def test_jsd_where_everything_but_one_column_underflows(backend: str, beta: float) -> None:
    student, teacher = torch.full((2, 64), -500.0), torch.full((2, 64), -500.0)
    student[:, 3] = teacher[0, 3] = teacher[1, 9] = 0.0
    measured = check(backend, student, teacher, divergence="jsd", parameters={"beta": beta})
    assert measured.loss[0].abs() < 1e-7 and (measured.student_gradient[0].abs() < 1e-7).all()
    entropy = -(
        beta * math.log(beta) + (1 - beta) * math.log1p(-beta)
    )  # the two rows have disjoint support
    assert measured.loss[1].item() == pytest.approx(entropy, rel=1e-5)


@defaults
def test_identical_rows(backend: str, divergence: str) -> None:
    """The loss of identical rows is rounding error at most, also for several blocks."""
    for dtype in FLOATS:
        student = logits(3, 4100, seed=40, dtype=dtype)
        check(backend, student, student.clone(), divergence=divergence)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_are_not_hidden(any_backend: str, value: float) -> None:
    """A row with NaN or +inf among its logits is NaN, and no other row changes."""
    for side in range(2):
        pair = [logits(3, 21, seed=41), logits(3, 21, seed=42)]
        clean = kd_loss(*pair, reduction="none", backend=any_backend)
        pair[side][1, 20] = value
        student = pair[0].clone().requires_grad_()
        loss = kd_loss(student, pair[1], reduction="none", backend=any_backend)
        (gradient,) = torch.autograd.grad(loss, student, powers_for(3))
        assert loss.isnan().tolist() == [False, True, False]
        assert torch.equal(loss[::2], clean[::2])
        assert gradient[1].isnan().any() and gradient[::2].isfinite().all()


NORMALIZED_AND_LABELED = [*sorted({*fastkd.DIVERGENCES} - {*UNNORMALIZED}), *WITH_LABELS]


@pytest.mark.parametrize("divergence", NORMALIZED_AND_LABELED)
def test_no_divergence_hides_nan_and_inf(any_backend: str, divergence: str) -> None:
    """Comparisons of a definition may lose a NaN, so the row's statistics decide: all of it is NaN, on both sides."""
    check_poisoned_rows(any_backend, divergence)


@pytest.mark.parametrize("divergence", NORMALIZED_AND_LABELED)
def test_no_divergence_hides_nan_and_inf_in_a_cluster(
    emulation: Emulation, divergence: str
) -> None:
    """The CUDA kernels, with the columns of a row in one block and in two."""
    for ranks in (1, 2):
        emulation.ranks = ranks
        check_poisoned_rows("cuda", divergence)


def check_poisoned_rows(backend: str, divergence: str) -> None:
    """One call with NaN and +inf on each side, in the label's column and in another, and clean rows between them."""
    bad = list(itertools.product((torch.nan, torch.inf), (0, 1), (1, 20)))  # value, side, column
    rows = 2 * len(bad) + 1
    pair = [logits(rows, 21, seed=41), logits(rows, 21, seed=42)]
    for row, (value, side, column) in enumerate(bad):
        pair[side][2 * row + 1, column] = value
    # The teacher has no gradient from a divergence without a degree.
    trained = [x.requires_grad_() for x in (pair[:1] if divergence == "nkd" else pair)]
    labels = torch.ones(rows, dtype=torch.int64)
    loss = kd_loss(*pair, labels, divergence=divergence, reduction="none", backend=backend)
    gradients = torch.autograd.grad(loss, trained, powers_for(rows))
    assert loss[1::2].isnan().all() and loss[::2].isfinite().all()
    for gradient in gradients:
        assert gradient[1::2].isnan().all() and gradient[::2].isfinite().all()
