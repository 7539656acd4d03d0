"""The Triton kernels against the truth: in Triton's interpreter, or on a GPU where there is one.

Tiles are 16 columns wide here, so that short rows have several. The bar is that of tests/support/accuracy.py.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support.accuracy import (
    assert_within,
    check,
    gradient_bar,
    labels_for,
    logits,
    upstream_for,
    value_bar,
)
from support.options import ALL, BRIEF, dropped_by, for_kd_loss
from support.triton_interpreter import PTX, Access, corrected, in_interpreter, memory_accesses
from test_measures import NEAR
from test_measures import expected as expected_measures
from torch import Tensor
from triton.runtime import interpreter

import fastkd
from fastkd import kd_loss
from fastkd.backends import reference, registry
from fastkd.call.contract import Options, Result, Rows, Want
from fastkd.call.log_zero import evaluate
from fastkd.kernels import launch as kernels
from fastkd.kernels import skeleton, split

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = 16
INF = math.inf

# The interpreter computes with NumPy, which warns about infinities and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "tile", lambda *row: (TILE, 1))
    monkeypatch.setattr(kernels, "NARROW", 0)


ONE_TILE = "one tile"


@pytest.fixture(autouse=True)
def shares(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, narrow_tiles: None
) -> Iterator[split.Plan | None]:
    """How programs share rows: as the test's parameter says, and by default not at all. ONE_TILE: a row is one tile."""
    wanted = getattr(request, "param", None)
    with pytest.MonkeyPatch.context() as patch:
        if wanted == ONE_TILE:
            # Not by `patch`, which would bring back the 0 of narrow_tiles after a test has undone that.
            monkeypatch.setattr(kernels, "NARROW", 64)
            wanted = None
        patch.setattr(kernels, "plan", lambda *call: wanted)
        if wanted is None:
            yield None
            return
        ran, launch_splits = [], kernels._launch_splits
        patch.setattr(
            kernels, "_launch_splits", lambda *call: (ran.append(call), launch_splits(*call))[1]
        )
        yield wanted
        assert ran, "no program shared a row"


# Four programs for a row of 37 columns in three tiles: the last program has none. Groups of two rows: the last of three
# rows is alone. Of what is shared, every run has the tests at the end of this file: the interpreter takes a second a
# call.
however_shared = pytest.mark.parametrize(
    "shares",
    [None, ONE_TILE, pytest.param(split.Plan(4, 2), marks=pytest.mark.heavy)],
    indirect=True,
    ids=["alone", "one tile", "shared"],
)


@pytest.fixture(autouse=True, scope="module")
def corrected_interpreter() -> Iterator[None]:
    with corrected():
        yield


def test_the_kernels_run_in_the_interpreter_or_on_the_gpu() -> None:
    assert registry.load("triton").kd_rows is kernels.kd_rows
    assert triton.knobs.runtime.interpret == (DEVICE == "cpu" and PTX is None), (
        "triton was imported before conftest.py"
    )


NO_ROWS, EVERYTHING = Rows(), Want(True, True, True)


def launch(
    student: Tensor,
    teacher: Tensor,
    rows: Rows = NO_ROWS,
    divergence: fastkd.Divergence | str = "forward_kl",
    want: Want = EVERYTHING,
    **options: Any,
) -> Result:
    """Every output of the kernels."""
    options.setdefault("vocab_size", min(student.shape[-1], teacher.shape[-1]))
    resolved = Options(fastkd.divergences.resolve(divergence), **options)
    return kernels.kd_rows(student, teacher, rows, resolved, want)


def same(found: Result, wanted: Result) -> None:
    """Bit for bit."""
    for name, value, expected in zip(Result._fields, found, wanted, strict=True):
        assert (value is None) == (expected is None), name
        if value is not None:
            assert torch.equal(value.nan_to_num(12345.0), expected.nan_to_num(12345.0)), name


def _terms(
    log_p: Tensor, log_q: Tensor, divergence: fastkd.Divergence
) -> tuple[Tensor, Tensor, Tensor]:
    """The sizes that rounding is relative to, of each row: sum |phi|, and of the two gradients the largest entry.

    An entry is g_v - q_v sum g, or h_v - p_v sum h where h is a difference itself, degree phi - g.
    """
    phi, g, _ = (x.nan_to_num(0.0, 0.0, 0.0) for x in evaluate(divergence, log_p, log_q))
    h = (divergence.degree or 0.0) * phi.abs() + g.abs()
    student = g.abs() + log_q.exp() * g.sum(-1, keepdim=True).abs()
    teacher = h + log_p.exp() * h.sum(-1, keepdim=True)
    return phi.abs().sum(-1), student.amax(-1), teacher.amax(-1)


def compare(
    student: Tensor,
    teacher: Tensor,
    rows: Rows = NO_ROWS,
    divergence: fastkd.Divergence | str = "forward_kl",
    temperature: float = 1.0,
    alpha: float = 1.0,
) -> Result:
    """Infinities and NaN where the reference has them; elsewhere within its float32 error of float64, and a floor.

    The floor is 4 units of float32 roundoff of the terms: the argument of an exponential, the exponential, the
    normalizer and the product round once each.
    """
    divergence = fastkd.divergences.resolve(divergence)
    options = Options(divergence, alpha, temperature, temperature, vocab_size=student.shape[-1])
    want = Want(True, divergence.degree is not None, True)
    exact = reference.kd_rows(student.double(), teacher.double(), rows, options, want)
    plain = reference.kd_rows(student.float(), teacher.float(), rows, options, want)
    actual = kernels.kd_rows(student, teacher, rows, options, want)
    log_p, log_q = (x.double() / temperature for x in (teacher, student))
    if divergence.normalized:
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    value_terms, *gradient_terms = (x.nan_to_num(0.0) for x in _terms(log_p, log_q, divergence))
    terms = {"student_gradient": gradient_terms[0] * temperature + 2 * (1 - alpha)}
    terms["teacher_gradient"] = gradient_terms[1] * temperature
    for name, value, truth, other in zip(Result._fields, actual, exact, plain, strict=True):
        assert (value is None) == (truth is None), name
        if value is None:
            continue
        assert torch.equal(value.isnan(), truth.isnan()), name
        assert torch.equal(value.isinf(), truth.isinf()), name
        assert torch.equal(value[truth.isinf()].sign(), truth[truth.isinf()].sign().float()), name
        finite = truth.isfinite()
        value, truth, other = (torch.where(finite, x, 0.0) for x in (value, truth, other.double()))
        if name in terms:
            bar = gradient_bar(other, truth, 4 * terms[name].unsqueeze(-1), value.dtype)
        else:
            size = value_terms * temperature**2 + truth.abs() + 1.0
            bar = value_bar(other, truth, 4 * (size if truth.dim() else size.sum()))
        assert_within(name, value, truth, bar)
    return actual


DIVERGENCES: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in fastkd.DIVERGENCES),
    ("mixture", {"forward": 0.3, "reverse": 0.0}),
    ("jsd", {"beta": 0.05}),
    ("alpha_beta", {"alpha": 0.7, "beta": 0.0}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.4}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.0}),
    ("alpha_beta", {"alpha": 0.5, "beta": -0.5}),
    ("alpha_beta", {"alpha": 1.5, "beta": -0.2}),
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Two sweeps over a row, three sweeps, no normalizer.
KINDS = ["forward_kl", "jsd", "squared_error"]
kinds = pytest.mark.parametrize("divergence", KINDS)


def pair(
    *shape: int, dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32,) * 2
) -> tuple[Tensor, Tensor]:
    student, teacher = (
        logits(*shape, seed=seed, dtype=d) for seed, d in zip((1, 2), dtypes, strict=True)
    )
    return student.to(DEVICE), teacher.to(DEVICE)


# 37 columns: two tiles and five columns of a third.


@however_shared
@pytest.mark.parametrize(("divergence", "parameters"), DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_divergences(divergence: str, parameters: dict[str, float], dtype: torch.dtype) -> None:
    labels = torch.tensor([36, -100, 0], device=DEVICE)
    check(
        "triton",
        *pair(3, 37, dtypes=(dtype, dtype)),
        labels,
        divergence=divergence,
        parameters=parameters,
        temperature=1.5,
        alpha=0.6,
    )


@however_shared
@pytest.mark.parametrize("student", FLOATS, ids=str)
@pytest.mark.parametrize("teacher", FLOATS, ids=str)
def test_types(student: torch.dtype, teacher: torch.dtype) -> None:
    for divergence in ("mixture", "skew_reverse_kl"):
        check("triton", *pair(2, 37, dtypes=(student, teacher)), divergence=divergence)


# One column; fewer than a tile; exactly one tile, one column less and more; the same for two tiles; four tiles.
@however_shared
@kinds
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 31, 32, 33, 64])
def test_widths(columns: int, divergence: str) -> None:
    labels = torch.tensor([columns - 1, 0], device=DEVICE)
    check(
        "triton", *pair(2, columns), labels, divergence=divergence, alpha=0.5, label_smoothing=0.1
    )


# The tiles that are shipped: a part of one, one exactly, and one column more; the narrowest row of several tiles.
@however_shared
@kinds
@pytest.mark.parametrize("columns", [300, 512, 513, 4097])
def test_shipped_tiles(monkeypatch: pytest.MonkeyPatch, columns: int, divergence: str) -> None:
    monkeypatch.undo()
    assert (
        kernels.narrow_tile(columns, True)[0]
        == {300: 512, 512: 512, 513: 1024, 4097: 8192}[columns]
    )
    assert (columns <= kernels.NARROW) == (columns < 4097)
    check("triton", *pair(1, columns), divergence=divergence, temperature=2.0)


def test_a_timed_tile_takes_precedence_over_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles depend on architecture, dtype, kind and widths, and on alignment and register pressure."""
    monkeypatch.undo()
    monkeypatch.setitem(kernels.TILES, ("sm_90", 2, True, 65536), (8192, 32))
    rule = (1024, 4)
    for width, wanted in ((32769, (8192, 32)), (65536, (8192, 32)), (32768, rule)):
        assert kernels.tile(width, 2, False, True, "sm_90", True) == wanted
    for other in ((4, False, True, "sm_90", True), (2, False, True, "sm_80", True)):
        assert kernels.tile(65536, *other)[1] != 32
    for other in ((2, True, True, "sm_90", True), (2, False, False, "sm_90", True)):
        assert kernels.tile(65536, *other)[1] != 32
    assert kernels.tile(65536, 2, False, True, "sm_90", False)[1] != 32


# Temperatures, offsets and infinities


@however_shared
@pytest.mark.parametrize("temperature", [0.05, 1.0, 1000.0])
@pytest.mark.parametrize("divergence", ["mixture", "soft_cross_entropy", "jsd", "alpha_beta"])
def test_temperatures(divergence: str, temperature: float) -> None:
    check("triton", *pair(2, 37), divergence=divergence, temperature=temperature)


@however_shared
@pytest.mark.parametrize("divergence", ["mixture", "soft_cross_entropy", "jsd", "tvd"])
def test_common_offset(divergence: str) -> None:
    """Multiples of 1/64 move by 1e4 without rounding, and no result changes by a bit."""
    student, teacher = ((x * 64).round() / 64 for x in pair(3, 37))
    labels = labels_for(3, vocabulary=37, seed=3).to(DEVICE)
    options: dict[str, Any] = {"alpha": 0.5, "label_smoothing": 0.1, "divergence": divergence}
    for temperature in (0.05, 1.0, 1000.0):
        options |= {"temperature": temperature, "teacher_temperature": 2 * temperature}
        still = launch(student, teacher, Rows(labels), **options)
        same(launch(student + 1e4, teacher - 1e4, Rows(labels), **options), still)


@however_shared
def test_a_late_and_steep_maximum() -> None:
    """Rescaling erases the earlier sums; the tempered logits span 4000, and one model's row is steeper."""
    rise = torch.linspace(-100, 100, 37, device=DEVICE)
    for student, teacher in ((rise, rise / 7), (rise / 7, rise), (rise, -rise), (-rise, rise / 50)):
        for divergence in ("mixture", "soft_cross_entropy", "jsd"):
            check("triton", student[None], teacher[None], divergence=divergence, temperature=0.05)
            check("triton", student[None], teacher[None], divergence=divergence, temperature=3.0)


GONE: dict[str, tuple[slice, slice]] = {
    "shared": (slice(3, 5), slice(3, 5)),
    "student": (slice(3, 5), slice(0, 0)),
    "teacher": (slice(0, 0), slice(20, 22)),
    "one of each": (slice(3, 4), slice(20, 21)),
    "shared, the first tile": (slice(0, 16), slice(0, 16)),
    "shared, all but the last tile": (slice(0, 32), slice(0, 32)),
    "shared, all but one": (slice(1, 37), slice(1, 37)),
    "student, the first tile": (slice(0, 16), slice(0, 0)),
    "teacher, the first tile": (slice(0, 0), slice(0, 16)),
    "student, everything": (slice(0, 37), slice(0, 0)),
    "teacher, everything": (slice(0, 0), slice(0, 37)),
}


@however_shared
@pytest.mark.parametrize(
    "divergence",
    [
        "forward_kl",
        "reverse_kl",
        "mixture",
        "soft_cross_entropy",
        "jsd",
        "hellinger",
        "squared_error",
    ],
)
def test_infinities(divergence: str) -> None:
    """One row for each column that the value may have, and one row without it."""
    student, teacher = pair(len(GONE) + 1, 37)
    for row, (of_student, of_teacher) in enumerate(GONE.values()):
        student[row, of_student], teacher[row, of_teacher] = -INF, -INF
    labels = torch.full((len(GONE) + 1,), 4, device=DEVICE)
    labels[-1] = 3
    compare(student, teacher, Rows(labels), divergence, alpha=0.5, temperature=2.0)


@however_shared
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_reverse_kl"])
def test_a_probability_that_underflows_beside_an_infinity(divergence: str) -> None:
    """Below NEGLIGIBLE it counts as 0, at whatever place of the row, before and after the maximum is known."""
    for column in (0, 36):
        for depth in (50.0, 80.0, 200.0):  # exp(-50) exceeds NEGLIGIBLE
            student, teacher = pair(2, 37)
            student[0, column], teacher[0, column] = -INF, -depth
            student[1, column], teacher[1, column] = -depth, -INF
            compare(student, teacher, divergence=divergence)


@however_shared
# Without a normalizer an infinite logit affects only its own column.
@pytest.mark.parametrize(
    ("divergence", "poison"),
    [*itertools.product(["mixture", "jsd"], [math.nan, INF]), ("squared_error", math.nan)],
)
def test_nan_spreads_over_its_row_only(divergence: str, poison: float) -> None:
    """One row for each column and side that it is in, between rows that it must not reach."""
    places = list(itertools.product((0, 1), (0, 20, 36)))
    inputs = pair(2 * len(places) + 1, 37)
    clean = launch(*inputs, divergence=divergence)
    for number, (side, column) in enumerate(places):
        inputs[side][2 * number + 1, column] = poison
    actual = launch(*inputs, divergence=divergence)
    assert actual.loss[1::2].isnan().all()
    if divergence != "squared_error":
        assert actual.student_gradient[1::2].isnan().all()
    for name in ("loss", "student_gradient", "teacher_gradient"):
        assert torch.equal(getattr(actual, name)[::2], getattr(clean, name)[::2]), name


# Options


@however_shared
@kinds
def test_options(divergence: str) -> None:
    """Each option alone and all together, with three rows, one of which is dropped."""
    student, teacher = pair(3, 37)
    labels = torch.tensor([5, -100, 30], device=DEVICE)
    weight = torch.tensor([0.5, 2.0, -1.5], device=DEVICE)
    per_row = torch.tensor([0.7, 3.0, 1.0], device=DEVICE)
    cases: list[dict[str, Any]] = [
        *BRIEF.values(),
        ALL["only hard labels"],
        {"alpha": 0.3, "label_smoothing": 0.2, "temperature": per_row},
        {"temperature": per_row, "teacher_temperature": 0.5},
        {"temperature": 4.0, "teacher_temperature": per_row, "scale_by_temperature": False},
        {"mask": weight < 1, "weight": weight, "alpha": 0.5},
        {"reduction": "mean", "num_items": torch.tensor(7, device=DEVICE)},
        {"reduction": "sum"},
    ]
    for case in cases:
        options = for_kd_loss(case, columns=33)
        check(
            "triton", student, teacher, dropped_by(options, labels), divergence=divergence,
            **options,
        )  # fmt: skip


@however_shared
def test_a_wider_teacher() -> None:
    """Its padding is not read and gets a gradient of 0; likewise the student's."""
    for widths in ((37, 50), (50, 37), (40, 70)):
        student, teacher = pair(2, widths[0])[0], pair(2, widths[1])[1]
        labels = torch.tensor([32, 0], device=DEVICE)
        clean = launch(student, teacher, Rows(labels), alpha=0.5, vocab_size=33)
        check("triton", student, teacher, labels, alpha=0.5, vocab_size=33)
        student[:, 33:], teacher[:, 33:] = math.nan, math.nan
        same(launch(student, teacher, Rows(labels), alpha=0.5, vocab_size=33), clean)
        assert not clean.student_gradient[:, 33:].any() and not clean.teacher_gradient[:, 33:].any()


@however_shared
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@kinds
def test_a_dropped_row_is_not_read(divergence: str, dtype: torch.dtype) -> None:
    student, teacher = pair(4, 37, dtypes=(dtype, dtype))
    labels = torch.tensor([5, -100, 30, 7], device=DEVICE)
    weight = torch.tensor([1.0, 1.0, 0.5, 0.0], device=DEVICE)
    rows = Rows(labels, weight, temperature=torch.tensor([1.0, math.nan, 2.0, -1.0], device=DEVICE))
    clean = launch(student, teacher, rows, alpha=0.5, divergence=divergence)
    student[1::2], teacher[1::2] = math.nan, math.nan
    actual = launch(student, teacher, rows, alpha=0.5, divergence=divergence)
    same(actual, clean)
    terms = actual.distillation, actual.cross_entropy, actual.student_entropy
    for value in (actual.loss, *actual.gradients, *terms):
        assert value is not None and value[::2].isfinite().all() and not value[1::2].any()


@however_shared
def test_invalid_values_poison_their_row() -> None:
    student, teacher = pair(6, 37)
    labels = torch.tensor([5, -1, 37, 2**40, -(2**40), 6], device=DEVICE)
    clean = launch(student, teacher, Rows(labels.clamp(0, 36)), alpha=0.5)
    actual = launch(student, teacher, Rows(labels), alpha=0.5)
    for name in ("loss", "student_gradient", "teacher_gradient"):
        assert getattr(actual, name)[1:5].isnan().all(), name
        assert torch.equal(getattr(actual, name)[::5], getattr(clean, name)[::5]), name
    assert not launch(student, teacher, Rows(labels)).loss.isnan().any(), (
        "alpha = 1: no label is a target"
    )
    for invalid in (0.0, -2.0, math.nan):
        temperature = torch.tensor([1.0, 1.0, invalid, 1.0, 1.0, 1.0], device=DEVICE)
        for rows in (Rows(temperature=temperature), Rows(teacher_temperature=temperature)):
            actual = launch(student, teacher, rows)
            for name in ("loss", "student_gradient", "teacher_gradient"):
                assert (
                    getattr(actual, name).isnan().flatten(1 if actual.loss.dim() > 1 else 0).any()
                ), name
                assert (
                    getattr(actual, name)[2].isnan().all()
                    and not getattr(actual, name)[:2].isnan().any()
                )


@however_shared
@kinds
def test_only_wanted_outputs_are_computed(divergence: str) -> None:
    """Each output alone is bit for bit that of all together; where alpha is 0 the teacher is not read."""
    student, teacher = pair(2, 37)
    labels = torch.tensor([3, 20], device=DEVICE)
    for options in ({"alpha": 0.5}, {"alpha": 1.0}, {"alpha": 0.0}):
        everything = launch(student, teacher, Rows(labels), divergence, **options)
        for want in (
            Want(),
            Want(True),
            Want(False, True),
            Want(parts=True),
            Want(True, parts=True),
        ):
            unread = torch.full_like(teacher, math.nan)
            inputs = unread if options["alpha"] == 0 and not want.parts else teacher
            actual = launch(student, inputs, Rows(labels), divergence, want, **options)
            for name, value in zip(Result._fields, actual, strict=True):
                if value is not None:
                    assert torch.equal(value, getattr(everything, name)), (name, want)
            for name in ("student_gradient", "teacher_gradient"):
                assert (getattr(actual, name) is not None) == getattr(want, name)
            assert (actual.student_entropy is not None) == want.parts


@however_shared
def test_a_scale_on_the_device() -> None:
    student, teacher = pair(2, 37)
    scale = torch.tensor(0.125, device=DEVICE)
    same(launch(student, teacher, Rows(scale=scale)), launch(student, teacher, scale=0.125))


# Layouts


def strided(student: Tensor) -> dict[str, Tensor]:
    """Logits [2, 3, 2, 2, columns] in several layouts, some of which three strides cannot express."""
    rows, columns = student.shape[:-1], student.shape[-1]
    wide = student.new_full((4, 5, 4, 4, columns + 4), math.nan)
    every_other = wide[::2, 1:4, ::2, :2, 3 : columns + 3]
    every_other.copy_(student)
    permuted = student.permute(3, 1, 0, 2, 4).contiguous().permute(2, 1, 3, 0, 4)
    shifted = torch.cat([student, student[:, :1]], 1)[:, :-1]
    columns_apart = student.repeat_interleave(2, -1)[..., ::2]
    vocabulary_first = student.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0)
    assert all(x.shape == (*rows, columns) for x in (permuted, columns_apart, vocabulary_first))
    return {
        "shifted": shifted,
        "slices of a wider tensor": every_other,
        "permuted": permuted,
        "columns apart": columns_apart,
        "vocabulary first": vocabulary_first,
    }


@however_shared
@pytest.mark.parametrize("layout", strided(torch.zeros(2, 3, 2, 2, 17)))
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.pairwise
def test_layouts(monkeypatch: pytest.MonkeyPatch, layout: str, inplace: bool) -> None:
    # Where tiles start at multiples of 16 bytes, the order of a sum depends on where its row starts.
    monkeypatch.setattr(kernels, "rows_start_alike", lambda *views: False)
    student, teacher = pair(2, 3, 2, 2, 17)
    labels = labels_for(2, 3, 2, 2, vocabulary=17, seed=3, ignored=0.2).to(DEVICE)
    wanted = launch(student, teacher, Rows(labels), alpha=0.5, want=Want(True, True))
    # Two tensors with different layouts each have their own strides.
    names = list(strided(teacher))
    other = names[(names.index(layout) + 1) % len(names)]
    s, t = strided(student)[layout], strided(teacher)[other]
    want = Want(True, not inplace, inplace=inplace)
    actual = launch(s, t, Rows(labels), alpha=0.5, want=want)
    assert torch.equal(actual.loss, wanted.loss)
    assert torch.equal(actual.student_gradient, wanted.student_gradient)
    if inplace:
        assert actual.student_gradient is s
    else:
        assert torch.equal(actual.teacher_gradient, wanted.teacher_gradient)
        assert actual.student_gradient.is_contiguous() and actual.teacher_gradient.is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@kinds
def test_rows_that_start_anywhere(
    monkeypatch: pytest.MonkeyPatch, divergence: str, inplace: bool, dtype: torch.dtype
) -> None:
    """Rows of 37 columns start at every distance from a multiple of 16 bytes, and NaN lies before the first one."""
    alike, found = kernels.rows_start_alike, []
    monkeypatch.setattr(
        kernels, "rows_start_alike", lambda *views: found.append(alike(*views)) or found[-1]
    )
    inputs = []
    for tensor in pair(9, 37, dtypes=(dtype, dtype)):
        buffer = tensor.new_full((10 * 37,), math.nan)
        buffer[37:] = tensor.flatten()
        inputs.append(buffer[37:].view(9, 37))
    labels = torch.arange(9, device=DEVICE)
    want = Want(True, not inplace, inplace=inplace)
    apart = [tensor.clone() for tensor in inputs]
    actual = launch(*inputs, Rows(labels), divergence, want, alpha=0.5)
    exact = reference.kd_rows(
        *(tensor.double() for tensor in apart),
        Rows(labels),
        Options(fastkd.divergences.resolve(divergence), alpha=0.5, vocab_size=37),
        Want(True, True),
    )
    # The gradient in place of the logits starts where they start; a gradient of its own starts 37 columns before.
    assert found == [inplace]
    torch.testing.assert_close(actual.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        actual.student_gradient.double(), exact.student_gradient, rtol=rtol, atol=1e-6
    )


@however_shared
def test_inplace_writes_only_the_rows() -> None:
    student, teacher = pair(2, 5, 37)
    buffer = torch.full((2, 7, 41), 7.0, device=DEVICE)
    view = buffer[:, 1:6, 2:39]
    view.copy_(student)
    launch(view, teacher, want=Want(True, inplace=True))
    view.fill_(7.0)
    assert (buffer == 7).all()


@however_shared
def test_one_row_against_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "rows_start_alike", lambda *views: False)
    one, many = pair(37)[0], pair(2, 3, 37)[1]
    for s, t in ((one.expand(2, 3, 37), many), (many, one.expand(2, 3, 37))):
        same(launch(s, t), launch(s.contiguous(), t.contiguous()))


def test_row_addresses() -> None:
    """Every view keeps its memory, and the three strides (or the offsets) lead to each of its rows."""
    base = torch.arange(2 * 3 * 2 * 2 * 37, dtype=torch.float32, device=DEVICE).view(2, 3, 2, 2, 37)
    candidates = {name: x for name, x in strided(base).items() if x.stride(-1) == 1}
    candidates |= {
        "contiguous": base,
        "shifted matrix": base.view(8, 111)[:, :-1],
        "vector": base.view(-1),
    }
    dimensions = {"contiguous": 1, "shifted matrix": 1, "vector": 0, "shifted": 2}
    for name, tensor in candidates.items():
        sizes, (view,) = kernels.lay_out(tensor)
        assert view.pointer is tensor
        used = sum(stride != 0 for stride in view.strides)
        assert used == dimensions.get(name, used), name
        assert (view.offsets is None) == (name != "permuted"), name
        places = list(itertools.product(*map(range, tensor.shape[:-1])))
        for row, place in enumerate(places):
            i0, i1, i2 = row // sizes[1] // sizes[0], row // sizes[1] % sizes[0], row % sizes[1]
            offset = sum(i * stride for i, stride in zip((i0, i1, i2), view.strides, strict=True))
            if view.offsets is not None:
                offset = int(view.offsets[row])
            address = tensor.data_ptr() + offset * tensor.element_size()
            assert address == tensor[place].data_ptr(), (name, place)


FAR_APART = """
    import mmap, torch
    from fastkd.divergences import forward_kl
    from fastkd.kernels import launch as kernels
    from fastkd.call.contract import Options, Rows, Want

    kernels.tile = lambda *row: (16, 1)
    rows, columns, stride = 4, 5, 2**30
    size = 4 * ((rows - 1) * stride + columns)
    # Anonymous memory that is committed where it is touched: 12 GB of addresses, a few pages of memory.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)

    def far(near):
        storage = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.float32).untyped_storage()
        return torch.empty(0).set_(storage, 0, (rows, columns), (stride, 1)).copy_(near)

    student, teacher = torch.randn(rows, columns), torch.randn(rows, columns)
    arguments = Rows(), Options(forward_kl(), vocab_size=columns), Want(True, inplace=True)
    far_student = far(student)
    found = kernels.kd_rows(far_student, far(teacher), *arguments)
    wanted = kernels.kd_rows(student, teacher, *arguments)
    assert torch.equal(found.loss, wanted.loss) and torch.equal(far_student, student)
    kernels.scale_rows_(far_student, torch.tensor([2.0, 1.0, -1.0, 0.0]))
    kernels.scale_rows_(student, torch.tensor([2.0, 1.0, -1.0, 0.0]))
    assert torch.equal(far_student, student)
    print("the same")
"""


@pytest.mark.skipif(
    DEVICE != "cpu" or PTX is not None,
    reason="12 GB of addresses without memory behind them are the CPU's",
)
def test_rows_2_to_the_30_elements_apart() -> None:
    """A 32-bit offset would read outside, which may end the process, so this runs in a separate one."""
    script = [sys.executable, "-c", textwrap.dedent(FAR_APART)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the same\n"


@pytest.mark.parametrize("shape", [(0, 37), (2, 0, 37)], ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    actual = launch(*pair(*shape))
    assert actual.loss.shape == shape[:-1] and actual.student_gradient.shape == shape
    assert actual.total == 0 and actual.total.dim() == 0
    kernels.scale_rows_(actual.student_gradient, torch.ones((), device=DEVICE))


# The upstream gradient


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scale_rows(dtype: torch.dtype) -> None:
    buffer = logits(2, 4, 40, seed=1, dtype=dtype).to(DEVICE)
    before = buffer.clone()
    gradient = buffer[:, :3, :37]
    upstream = upstream_for(3, 2).to(DEVICE).t()  # of any strides
    upstream[1, 1] = 0.0
    kernels.scale_rows_(gradient, upstream)
    rounded = (before[:, :3, :37].float() * upstream.unsqueeze(-1)).to(dtype)
    assert torch.equal(gradient, rounded)
    gradient.copy_(before[:, :3, :37])
    assert torch.equal(buffer, before), "only the rows were written"
    kernels.scale_rows_(gradient, torch.tensor(-0.3, device=DEVICE))
    assert torch.equal(gradient, (before[:, :3, :37].float() * -0.3).to(dtype))


def test_a_row_with_factor_1_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = pair(3, 37)[0]
    expanded = torch.ones((), device=DEVICE).expand(3)
    before = gradient.clone()
    if triton.knobs.runtime.interpret:  # so that a written tile would show
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", None)
    kernels.scale_rows_(gradient, expanded)
    kernels.scale_rows_(gradient, torch.ones((), device=DEVICE))
    assert torch.equal(gradient, before)


# Precision


@however_shared
@pytest.mark.parametrize("divergence", ["mixture", "jsd"])
def test_flat_rows(monkeypatch: pytest.MonkeyPatch, divergence: str) -> None:
    """65536 terms of one size, in the tiles that are shipped: a running float32 sum loses three digits here."""
    monkeypatch.undo()
    student, teacher = (logits(1, 65536, seed=s, spread=0.05).to(DEVICE) for s in (1, 2))
    check(
        "triton",
        student,
        teacher,
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        divergence=divergence,
        alpha=0.5,
    )


@however_shared
@kinds
def test_equal_distributions(divergence: str) -> None:
    student, _ = pair(3, 37)
    actual = launch(
        student, student.clone(), divergence=divergence, temperature=0.7, teacher_temperature=0.7
    )
    # At most the rounding error of a product is left, if a GPU fuses it with the following subtraction.
    tolerance = 1e-11 if divergence != "jsd" else 1e-7
    for name in ("loss", "student_gradient", "teacher_gradient"):
        assert getattr(actual, name).abs().max() <= tolerance, name


@however_shared
@pytest.mark.parametrize("masked", [slice(30, 40), slice(0, 20)], ids=["last", "the first tile"])
@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", "mixture", "soft_cross_entropy", "jsd"]
)
def test_a_mask_of_the_lowest_finite_number(divergence: str, masked: slice) -> None:
    """The lowest finite number acts like -inf; below a temperature of 1 it overflows to -inf."""
    student, teacher = logits(2, 40, seed=41), logits(2, 40, seed=42)
    keep = torch.ones(40, dtype=torch.bool)
    keep[masked] = False
    student[:, masked] = teacher[:, masked] = torch.finfo(torch.float32).min
    results = []
    for columns in (torch.ones_like(keep), keep):
        sides = [x[:, columns].to(DEVICE).requires_grad_() for x in (student, teacher)]
        loss, parts = kd_loss(
            *sides, divergence=divergence, temperature=0.7, return_parts=True, backend="triton"
        )
        gradients = torch.autograd.grad(loss, sides)
        results.append((loss.detach(), parts.student_entropy, *gradients))
    for whole, without in zip(*results, strict=True):
        kept = whole[:, keep] if whole.dim() == 2 else whole
        torch.testing.assert_close(kept, without, rtol=1e-5, atol=1e-6)


@however_shared
@pytest.mark.parametrize("softcap", [0.01, 1.0, 50.0])
def test_softcap_far_from_and_near_saturation(softcap: float) -> None:
    student, teacher = (x * torch.logspace(-4, 3, 37, device=DEVICE) for x in pair(2, 37))
    check("triton", student, teacher, softcap=softcap, teacher_softcap=2 * softcap)


def _applied(function: Any, *columns: Tensor) -> list[Tensor]:
    """A function of the kernels' vocabulary on vectors of one power of 2."""
    outputs = [torch.empty_like(columns[0]) for _ in range(2)]
    _apply_kernel[(1,)](tuple(columns), *outputs, function, columns[0].numel())
    return outputs


@triton.jit
def _apply_kernel(columns, first, second, FUNCTION: tl.constexpr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    if len(columns) == 2:
        value = FUNCTION(tl.load(columns[0] + lanes), tl.load(columns[1] + lanes))
        other = value
    else:
        value, other = FUNCTION(tl.load(columns[0] + lanes))
    tl.store(first + lanes, value)
    tl.store(second + lanes, other)


@triton.jit
def _log1p_twice(x):
    return skeleton.log1p(x), skeleton.log1p(x)


def test_vocabulary() -> None:
    """Each function to a few units of roundoff, relative, wherever its argument lies."""
    ulp = torch.finfo(torch.float32).eps
    x = torch.cat([torch.logspace(-37, 37, 512), -torch.logspace(-37, -1e-6, 512)]).to(DEVICE)
    value, _ = _applied(_log1p_twice, x)
    exact = x.double().log1p()
    assert ((value - exact).abs() <= 4 * ulp * exact.abs()).all()
    value, _ = _applied(_log1p_twice, torch.tensor([0.0, -1.0, INF, math.nan], device=DEVICE))
    assert value.tolist()[:3] == [0.0, -INF, INF] and value[3].isnan()

    value, slope = _applied(skeleton.squash, x)
    exact = x.double().tanh()
    assert ((value - exact).abs() <= 4 * ulp * exact.abs()).all()
    exact = 4 / (x.double().exp() + (-x.double()).exp()) ** 2
    assert ((slope - exact).abs() <= (16 + 4 * x.abs().clamp(max=50)) * ulp * exact + 1e-38).all()

    x, y = (30 * torch.randn(2, 1024, generator=torch.Generator().manual_seed(1))).to(DEVICE)
    y[:256] = x[:256] + torch.logspace(-6, 2, 256, device=DEVICE)
    y[256:300] = x[256:300]
    x[300:310] = torch.finfo(torch.float32).min
    value, _ = _applied(skeleton.logaddexp, x, y)
    exact = torch.logaddexp(x.double(), y.double())
    assert ((value - exact).abs() <= 2 * ulp * (exact.abs() + 1)).all()


# A user's own divergence

OWN = """
from torch import abs, exp, log1p, where

import fastkd


def neyman(p, q, log_p, log_q, floor):
    \"\"\"sum (p - q)^2 / (q + floor), with every name of the vocabulary.\"\"\"
    gap = p - q
    kept = where(abs(gap) > 0.0, q + floor, 1.0)
    ratio = gap / kept
    unit = exp(log1p(q) - log1p(q))
    return unit * gap * ratio, -q * ratio * (2.0 + ratio)


one = fastkd.Divergence("neyman", neyman, (0.5,))
other = fastkd.Divergence("neyman", neyman, (0.01,))
"""


def _module(path: Path, source: str) -> Any:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@however_shared
def test_a_user_defined_divergence(tmp_path: Path) -> None:
    """A user's divergence from a file, with two sets of parameters, no closed form and no degree."""
    own = _module(tmp_path / "own.py", OWN)
    student, teacher = pair(3, 37)
    labels = torch.tensor([1, -100, 36], device=DEVICE)
    losses = [
        compare(
            student, teacher, Rows(labels), divergence=divergence, alpha=0.5, temperature=2.0
        ).loss
        for divergence in (own.one, own.other)
    ]
    assert not torch.allclose(*losses)
    loss = kd_loss(student.requires_grad_(), teacher, divergence=own.one, backend="triton")
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all()


FORBIDDEN: dict[str, tuple[str, str]] = {
    "another function of torch": (
        "from torch import sqrt\ndef f(p, q, log_p, log_q): return sqrt(p), q",
        "'sqrt'",
    ),
    "a module": ("import torch\ndef f(p, q, log_p, log_q): return torch.exp(log_p), q", "'torch'"),
    "a global number": ("HALF = 0.5\ndef f(p, q, log_p, log_q): return HALF * p, q", "'HALF'"),
    "a closure": (
        "def make(a):\n  def f(p, q, log_p, log_q): return a * p, q\n  return f\nf = make(1.0)",
        "closes over",
    ),
    "an object": (
        "class C:\n  __name__ = __qualname__ = 'C'\nf = type('F', (C,), {'__call__': print})()",
        "plain `def`",
    ),
    "a lambda": ("f = lambda p, q, log_p, log_q: (p, q)", "`def` in a file"),
}


@pytest.mark.parametrize(("source", "message"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_unsupported_definitions_raise(tmp_path: Path, source: str, message: str) -> None:
    own = _module(tmp_path / "forbidden.py", source)
    with pytest.raises(TypeError, match=message):
        launch(*pair(1, 5), divergence=fastkd.Divergence("forbidden", own.f), want=Want())


def test_a_definition_without_a_file() -> None:
    names: dict[str, Any] = {}
    exec("def f(p, q, log_p, log_q): return p - q, -q", names)
    function: Callable[..., Any] = names["f"]
    with pytest.raises(TypeError, match="`def` in a file"):
        launch(*pair(1, 5), divergence=fastkd.Divergence("nowhere", function), want=Want())


# What a row costs in device memory


def _traffic(accesses: list[Access], cache: int) -> int:
    """Bytes that cross to device memory behind a cache of that many bytes, which forgets what was used longest ago."""
    line, kept, moved = 16, dict[int, None](), 0
    for addresses, itemsize, writes in accesses:
        for tag in dict.fromkeys((addresses // line).tolist()):
            hit = tag in kept
            kept.pop(tag, None)
            if not writes:
                kept[tag] = None
                moved += 0 if hit else line
            while len(kept) * line > cache:
                del kept[next(iter(kept))]
        moved += len(addresses) * itemsize if writes else 0
    return moved


def tiles_of(accesses: list[Access], width: int) -> list[Access]:
    """The accesses to tiles. The others read the lanes that have the maxima again, a small share of the row."""
    tiles = [access for access in accesses if (np.diff(access.addresses) == access.itemsize).all()]
    again = sum(len(access.addresses) for access in accesses) - sum(len(x.addresses) for x in tiles)
    assert 0 < again <= 5 * width // TILE, "a lane is one of TILE; at most five reads for two sides"
    return tiles


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("divergence", "sweeps"), [("forward_kl", 2), ("reverse_kl", 2), ("jsd", 3), ("tvd", 3)]
)
def test_device_memory_traffic_matches_the_sweeps(
    divergence: str, sweeps: int, dtype: torch.dtype
) -> None:
    """In units of b, one [N, V] tensor: 5 b for a closed form, 7 b without, and less where a cache holds part of a row.

    The last sweep runs backwards, so a cache of a quarter of the row pair saves that quarter: 4.5 b. Forwards it would
    save nothing until it held all.
    """
    width = 16 * TILE
    b = width * dtype.itemsize
    student, teacher = (logits(1, width, seed=side, dtype=dtype) for side in range(2))
    with memory_accesses() as accesses:
        launch(student, teacher, divergence=divergence, want=Want(student_gradient=True))
    tiles = tiles_of(accesses, width)
    assert _traffic(tiles, cache=0) == (2 * sweeps + 1) * b
    assert _traffic(tiles, cache=2 * b // 4) == (2 * sweeps + 1) * b - 2 * b // 4
    assert _traffic(accesses, cache=4 * b) == 3 * b


@in_interpreter
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_group_of_rows_that_a_cache_holds_is_read_once(
    monkeypatch: pytest.MonkeyPatch, divergence: str
) -> None:
    """Close to 3 b, whatever the sweeps: what programs leave each other is under a fiftieth of it."""
    monkeypatch.setattr(kernels, "tile", lambda *row: (64, 1))
    rows, width, group = 4, 2048, 2
    sweeps = {"forward_kl": 2, "jsd": 3}[divergence]
    student, teacher = pair(rows, width)

    def moved(group: int, cache: int) -> float:
        monkeypatch.setattr(kernels, "plan", lambda *call: split.Plan(4, group))
        with memory_accesses() as accesses:
            launch(student, teacher, divergence=divergence, want=Want(student_gradient=True))
        return _traffic(accesses, cache) / student.nbytes

    cache = group * 2 * width * 4 + 2048  # the group's logits and its programs' partial results
    assert 3.0 <= moved(group, cache) < 3.06
    assert moved(rows, cache) > 2 * sweeps + 0.99, "a group that the cache does not hold"


# Measures


@pytest.mark.parametrize(
    "shares", [None, ONE_TILE, split.Plan(4, 2)], indirect=True, ids=["alone", "one tile", "shared"]
)
@pytest.mark.parametrize(
    ("divergence", "want"),
    [("forward_kl", Want(True, True, True)), ("jsd", Want())],
    ids=["gradients", "value"],
)
def test_measures(divergence: str, want: Want) -> None:
    """They are right, and leave the loss and the gradients as they are. test_measures.py has more kinds of rows."""
    student, teacher = pair(5, 37)
    student[0, 30] = teacher[0, 30] = 9.0
    student[1, 5] = student[1, 19] = teacher[1, 5] = 9.0  # the lane of column 19 is the lower one
    student[2, ::3] = teacher[2, ::3] = -INF
    student[2, 1] = teacher[2, 4] = -INF  # both divergences are infinite
    rows = Rows(torch.tensor([1, 2, 30, -100, 5], device=DEVICE))
    student[3], teacher[4, 7] = math.nan, math.nan
    plain = launch(student, teacher, rows, divergence, want, alpha=0.5, temperature=2.0)
    assert plain.measures is None
    want = want._replace(measures=True)
    actual = launch(student, teacher, rows, divergence, want, alpha=0.5, temperature=2.0)
    same(actual._replace(measures=None), plain)
    measures = actual.measures
    assert measures is not None and measures[4, 3].isnan()
    wanted = expected_measures(student[:3].cpu(), teacher[:3].cpu(), 2.0, 1.0)
    assert wanted["agreement"].tolist() == [1.0, 1.0, 0.0] and wanted["forward_kl"][2] == INF
    torch.testing.assert_close(
        measures[:3].cpu().double(), torch.stack([*wanted.values()], -1), rtol=NEAR, atol=NEAR
    )


# Rows that several programs share


@pytest.mark.parametrize("divergence", ["mixture", "jsd"])
def test_results_do_not_depend_on_the_groups(
    monkeypatch: pytest.MonkeyPatch, divergence: str
) -> None:
    student, teacher = pair(5, 70)  # five tiles: programs of two, two and one
    labels = torch.tensor([5, -100, 30, 0, 69], device=DEVICE)
    results = []
    for group in (1, 2, 5):
        monkeypatch.setattr(kernels, "plan", lambda *call, group=group: split.Plan(3, group))
        results.append(launch(student, teacher, Rows(labels), divergence, alpha=0.5))
    same(results[0], results[1])
    same(results[0], results[2])


# The figures of a device that the plan uses: multiprocessors and bytes of L2.
A100 = split.Device("sm_80", 108, 40 << 20, False)
L4 = split.Device("sm_89", 58, 48 << 20, False)
A10 = split.Device("sm_86", 72, 6 << 20, False)
H100 = split.Device("sm_90", 132, 50 << 20, True)
MI300X = split.Device("gfx942", 304, 4 << 20, False)
PAIR = 2 * 2 * 128_256  # bytes of two rows in bfloat16


@pytest.mark.parametrize("device", [None, A100, L4, A10, H100, MI300X])
def test_enough_rows_use_one_program_each(device: split.Device | None) -> None:
    if device not in (A100, L4):
        assert split.plan(4096, PAIR, 2, device) is None, "a small L2, or clusters"
    assert split.plan(4096, 2 * 2 * 8_192, 2, device) is None, "L2 keeps the row pairs in flight"
    assert split.plan(4096, PAIR, 1, device) is None, "one sweep has nothing to find in L2"
    assert split.plan(4096, 32 << 20, 2, device) is None, "a row pair is more than a group"
    assert split.plan(8, 2 * 2 * 1000, 2, device) is None, "narrow rows"
    assert split.plan(0, PAIR, 2, device) is None


@pytest.mark.parametrize("device", [A100, L4, A10, H100, MI300X])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_few_rows_use_several_programs_each(device: split.Device, rows: int) -> None:
    actual = split.plan(rows, PAIR, 2, device)
    assert actual is not None
    assert 1 < actual.num_splits <= split.LANES
    if actual.num_splits < split.LANES:
        filled = actual.num_splits * actual.group / (split.OCCUPANCY * device.multiprocessors)
        assert 0.8 < filled <= 1


@pytest.mark.parametrize("device", [A100, L4])
@pytest.mark.parametrize("rows", [100, 4096, 4097])
def test_groups_of_rows_fit_into_l2(device: split.Device, rows: int) -> None:
    actual = split.plan(rows, PAIR, 2, device)
    assert actual is not None
    assert actual.group * PAIR <= min(split.GROUP_BYTES, device.l2 // 2)
    assert actual.num_splits > 1
    most = min(split.GROUP_BYTES, device.l2 // 2) // PAIR
    assert math.ceil(rows / actual.group) == math.ceil(rows / most), "no more groups than needed"


@in_interpreter
@pytest.mark.parametrize("shares", [split.Plan(4, 2)], indirect=True, ids=["shared"])
@kinds
def test_programs_of_a_row_run_in_any_order(
    monkeypatch: pytest.MonkeyPatch, divergence: str
) -> None:
    """Also in place, where one overwrites the label's logit before another has begun."""
    labels = torch.tensor([36, 20, 0], device=DEVICE)

    def found() -> Result:
        student, teacher = pair(3, 37)
        options = {"alpha": 0.5, "label_smoothing": 0.1}
        return launch(
            student, teacher, Rows(labels), divergence, Want(True, inplace=True), **options
        )

    in_order = found()
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z: place(x, builder.grid_dim[1] - 1 - y, z)
    )
    same(found(), in_order)
