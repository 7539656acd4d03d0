"""Divergences with a target, whose label term is separate, in the Triton kernels.

Tiles are 16 columns wide, as in test_triton. The truth is autograd of the formulas in float64, with the label's column
cut out of the tensor; where there are infinities, the reference in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.accuracy import assert_within, gradient_bar, ran_on, value_bar
from support.options import ALL, TOGETHER, for_kd_loss
from support.oracles import adjusted, cross_entropy, mixed
from support.shards import InShards
from support.triton_interpreter import in_interpreter, memory_accesses
from test_triton import (
    DEVICE,
    FLOATS,
    INF,
    TILE,
    _traffic,
    corrected_interpreter,  # noqa: F401 (a fixture)
    launch,
    narrow_tiles,  # noqa: F401 (a fixture)
    pair,
    same,
    shares,  # noqa: F401 (a fixture)
    tiles_of,
)
from torch import Tensor
from triton.runtime import interpreter

import fastkd
from fastkd import kd_loss
from fastkd.backends import reference, registry
from fastkd.call.contract import Options, Result, Rows, ShardCall, Want
from fastkd.call.options import Numbers, checked
from fastkd.divergences import Divergence, Target, dkd, jsd, nkd
from fastkd.kernels import launch as kernels
from fastkd.kernels import sparse as sparse_kernels
from fastkd.kernels import split

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# A closed form with a teacher's gradient, one without, and three sweeps.
WITH_TARGET: dict[str, Divergence] = {
    "dkd": dkd(1.5, 8.0),
    "nkd": nkd(1.5),
    "jsd": Divergence(
        "apart", jsd(0.3).function, jsd(0.3).params, 1.0, target=Target("binary", 0.7)
    ),
}
PLAN = split.Plan(4, 2)


def heavy(*values: Any, id: str) -> Any:  # noqa: A002 (pytest's name)
    return pytest.param(*values, marks=pytest.mark.heavy, id=id)


with_target = pytest.mark.parametrize("divergence", WITH_TARGET.values(), ids=WITH_TARGET)
# The interpreter takes a tenth of a second per row, so every run has two of the kinds and small grids.
some_with_target = pytest.mark.parametrize(
    "divergence",
    [WITH_TARGET["dkd"], WITH_TARGET["nkd"], heavy(WITH_TARGET["jsd"], id="jsd")],
    ids=["dkd", "nkd", None],
)
however_shared = pytest.mark.parametrize(
    "shares", [pytest.param(None, id="alone"), heavy(PLAN, id="shared")], indirect=True
)


def _others(z: Tensor, labels: Tensor) -> Tensor:
    """[rows, V - 1] of [rows, V]."""
    kept = torch.arange(z.shape[-1], device=z.device) != labels.unsqueeze(-1)
    return z[kept].view(len(z), -1)


def _of_labels(x: Tensor, labels: Tensor) -> Tensor:
    return x.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _distillation(
    s: Tensor, t: Tensor, labels: Tensor, spread: tuple[Tensor, Tensor], options: Options
) -> Tensor:
    """The divergence of z at temperatures [rows, 1], T^2 included."""
    d = options.divergence
    assert d.target is not None
    squared = spread[0].squeeze(-1) ** 2 if options.scale_by_temperature else 1.0
    log_q, log_p = (
        (_others(z, labels) / at).log_softmax(-1) for z, at in zip((s, t), spread, strict=True)
    )
    p, q, weight = log_p.exp(), log_q.exp(), d.target.weight
    if d.name == "nkd":
        value = -d.params[0] * (p * log_q).sum(-1)
        label = -_of_labels(t.softmax(-1), labels).detach() * _of_labels(s.log_softmax(-1), labels)
        return squared * value + weight * label
    if d.name == "dkd":
        value = d.params[0] * (p * (log_p - log_q)).sum(-1)
    else:
        log_m = (0.3 * p + 0.7 * q).log()
        value = (0.3 * p * (log_p - log_m) + 0.7 * q * (log_q - log_m)).sum(-1)
    q_y, p_y = (
        _of_labels((z / at).softmax(-1), labels) for z, at in zip((s, t), spread, strict=True)
    )
    binary = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
    return squared * (value + weight * binary)


def truth(
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    dtype: torch.dtype = torch.float64,
) -> Result:
    """By autograd; every row counts and every label is valid."""
    inputs = [x.to(dtype).requires_grad_() for x in (student, teacher)]
    count, columns = len(student), options.vocab_size
    labels = rows.labels
    assert labels is not None

    s = adjusted(inputs[0][:, :columns], options.logit_scale, options.softcap or None)
    t = adjusted(
        inputs[1][:, :columns], options.teacher_logit_scale, options.teacher_softcap or None
    )
    spread = tuple(
        torch.full((count, 1), at, dtype=dtype, device=s.device)
        if each is None
        else each.to(dtype)[:, None]
        for at, each in (
            (options.temperature, rows.temperature),
            (options.teacher_temperature, rows.teacher_temperature),
        )
    )
    distillation = _distillation(s, t, labels, spread, options)
    of_labels = cross_entropy(s, labels, options.alpha, options.label_smoothing)
    weight = torch.ones_like(distillation) if rows.weight is None else rows.weight.to(dtype)
    loss = weight * mixed(distillation, of_labels, options.alpha)
    gradients = torch.autograd.grad(loss.sum(), inputs)
    log_q = (s / spread[0]).log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    parts = distillation, of_labels, entropy
    values = [x.detach() for x in (loss, loss.sum(), *gradients, *parts)]
    return Result(*values)


def compare(
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    divergence: Divergence,
    oracle: Any = truth,
    **given: Any,
) -> Result:
    """Within the float32 error of the same formula, and 4 units of roundoff of the terms."""
    given.setdefault("vocab_size", min(student.shape[-1], teacher.shape[-1]))
    options = Options(divergence, **given)
    want = Want(True, divergence.degree is not None, True)
    if oracle is truth:
        exact = truth(student, teacher, rows, options)
        plain = truth(student, teacher, rows, options, torch.float32)
    else:
        exact = oracle(student.double(), teacher.double(), rows, options, want)
        plain = oracle(student.float(), teacher.float(), rows, options, want)
    actual = kernels.kd_rows(student, teacher, rows, options, want)
    spread = [options.temperature, options.teacher_temperature]
    for side, each in enumerate((rows.temperature, rows.teacher_temperature)):
        spread[side] = spread[side] if each is None else float(each.nan_to_num(1.0).max())
    squared = spread[0] ** 2 if options.scale_by_temperature else 1.0
    parts = (divergence.params[0] if divergence.name != "apart" else 1.0) + divergence.target.weight
    weight = 1.0 if rows.weight is None else float(rows.weight.abs().max())
    for name, value, right, other in zip(Result._fields, actual, exact, plain, strict=True):
        if value is None:
            continue
        assert torch.equal(value.isnan(), right.isnan()), (name, value, right)
        assert torch.equal(value.isinf(), right.isinf()), name
        finite = right.isfinite()
        value, right, other = (torch.where(finite, x, 0.0) for x in (value, right, other.double()))
        if name.endswith("gradient"):
            side = name == "teacher_gradient"
            scale = options.teacher_logit_scale if side else options.logit_scale
            size = torch.full_like(right[..., :1], 4 * weight * abs(scale))
            size *= options.alpha * parts * squared / spread[side] + 2 * (1 - options.alpha)
            bar = gradient_bar(other, right, size * (4 if side else 1), value.dtype)
        else:
            size = (
                4 * (parts * squared + right.abs() + 1.0) * (len(student) if not right.dim() else 1)
            )
            bar = value_bar(other, right, size * max(weight, 1.0))
        assert_within(name, value, right, bar)
    return actual


def labels_of(*labels: int) -> Rows:
    return Rows(torch.tensor(labels, device=DEVICE))


# Two columns; fewer than a tile; exactly one tile, one column less and more; the same for two tiles; two tiles and five
# columns.
@with_target
@pytest.mark.parametrize(
    ("columns", "temperature"),
    [(2, 0.5), (17, 4.0), (37, 1.0)]
    + [heavy(n, at, id=f"{n}-{at}") for n in (2, 5, 15, 16, 17, 33, 37) for at in (0.5, 1.0, 4.0)],
)
def test_widths(columns: int, temperature: float, divergence: Divergence) -> None:
    """The label first, in the middle (often the first of a tile) and last: alone in its tile with 17 or 33 columns."""
    rows = labels_of(0, columns // 2 & ~15 or 1, columns - 1)
    options: dict[str, Any] = {"temperature": temperature, "teacher_temperature": temperature}
    if columns % 2:
        options |= {"alpha": 0.6, "label_smoothing": 0.1}
    compare(*pair(3, columns), rows, divergence, **options)


@pytest.mark.parametrize("shares", [PLAN], indirect=True, ids=["shared"])
@some_with_target
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_types(divergence: Divergence, dtype: torch.dtype) -> None:
    dtypes = dtype, torch.float32 if dtype == torch.bfloat16 else dtype
    compare(*pair(2, 37, dtypes=dtypes), labels_of(36, 16), divergence, temperature=2.0, alpha=0.6)


HALF: dict[str, Any] = {"alpha": 0.5, "label_smoothing": 0.1}
WARM: dict[str, Any] = {"temperature": 2.0, "teacher_temperature": 2.0}
CAPPED: dict[str, Any] = {"softcap": 5.0, "teacher_softcap": 2.0, "logit_scale": -2.0}
PER_ROW = torch.tensor([0.7, 3.0], device=DEVICE)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options of kd_loss as Options holds them."""
    values = for_kd_loss(options, columns=33)
    vocab_size = {"vocab_size": values.pop("vocab_size")} if "vocab_size" in values else {}
    return checked(Numbers.of(**values).scalars) | vocab_size


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"alpha": 1.0, "label_smoothing": 0.2, "temperature": 2.0, "teacher_temperature": 1.0}),
    (
        {"temperature": PER_ROW, "teacher_temperature": PER_ROW.flip(0), "weight": PER_ROW - 1.5},
        {"vocab_size": 33, **HALF},
    ),
    *(({}, _checked(options)) for options in TOGETHER.values()),
]
HEAVY_CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": PER_ROW}, HALF),
    *(({}, _checked(options)) for name, options in ALL.items() if name not in TOGETHER),
]


@however_shared
@with_target
@pytest.mark.parametrize(
    ("of_rows", "options"),
    [*CASES, *(heavy(*case, id=f"heavy{number}") for number, case in enumerate(HEAVY_CASES))],
)
def test_options(divergence: Divergence, of_rows: dict[str, Any], options: dict[str, Any]) -> None:
    rows = labels_of(5, 32)._replace(**of_rows)
    compare(*pair(2, 37), rows, divergence, **options)


@pytest.mark.parametrize("temperature", [2.0, heavy(1.0, id="1.0")])
@some_with_target
def test_confident_models(divergence: Divergence, temperature: float) -> None:
    """Logits of the label far above or below the others: no digit of them is lost to it."""
    student, teacher = pair(4, 20)
    student[:, 5] += torch.tensor([25.0, 25.0, -25.0, -20.0], device=DEVICE)
    teacher[:, 5] += torch.tensor([20.0, -25.0, 25.0, -25.0], device=DEVICE)
    spread = {"temperature": temperature, "teacher_temperature": temperature}
    for row in range(4):  # each part has its own bar
        compare(
            student[row, None], teacher[row, None], labels_of(5), divergence, alpha=0.5, **spread
        )


@pytest.mark.parametrize(
    "made",
    [dkd(1.5, 0.0), nkd(0.0), heavy(dkd(0.0, 2.0), id="others"), heavy(dkd(0.0, 0.0), id="none")],
    ids=["target", "label", None, None],
)
@pytest.mark.parametrize("shares", [PLAN, heavy(None, id="alone")], indirect=True)
def test_parts_with_weight_0(made: Divergence) -> None:
    """A part with weight 0 is ignored, also if it has columns at -inf."""
    compare(*pair(1, 37), labels_of(36), made, **WARM)
    student, teacher = pair(1, 37)
    student[0, 3] = -INF
    actual = launch(student, teacher, labels_of(36), made, Want())
    assert actual.loss.isinf().item() == (made.name == "dkd" and made.params[0] > 0)


# Other tokens' columns: on both sides, on one side, a whole tile; the label's column (4): on one side or both.
GONE: list[tuple[slice, slice]] = [
    (slice(6, 9), slice(6, 9)),
    (slice(6, 8), slice(0, 0)),
    (slice(0, 0), slice(20, 22)),
    (slice(4, 5), slice(0, 0)),
    (slice(0, 0), slice(4, 5)),
    (slice(16, 37), slice(16, 37)),
    (slice(0, 37), slice(0, 0)),
    (slice(0, 0), slice(0, 37)),
    (slice(4, 5), slice(4, 5)),
    (slice(0, 16), slice(0, 16)),
]


@however_shared
@with_target
def test_infinities(divergence: Divergence) -> None:
    student, teacher = pair(len(GONE), 37)
    for row, (of_student, of_teacher) in enumerate(GONE):
        student[row, of_student], teacher[row, of_teacher] = -INF, -INF
    teacher[7, 4] = 1.0  # everything but the label is at -inf
    rows = labels_of(*[4] * len(GONE))
    both = 0
    if divergence.name == "nkd":  # the last two rows have 0 log 0 in p_y log q_y
        both = 2
        actual = launch(
            student[-both:], teacher[-both:], labels_of(4, 4), divergence, Want(True), **WARM
        )
        assert actual.loss.isfinite().all() and actual.student_gradient.isfinite().all()
    student, teacher = student[: len(GONE) - both], teacher[: len(GONE) - both]
    rows = labels_of(*[4] * len(student))
    compare(student, teacher, rows, divergence, reference.kd_rows, alpha=0.6, **WARM)


@pytest.mark.parametrize("alpha", [1.0, heavy(0.5, id="0.5")])
@however_shared
@some_with_target
def test_invalid_values_poison_their_row(divergence: Divergence, alpha: float) -> None:
    """A label of no token also where alpha is 1; a NaN also in the label's own column, which no sum has."""
    student, teacher = pair(7, 20)
    labels = torch.tensor([5, -1, 20, 2**40, 6, 6, -100], device=DEVICE)
    want = Want(True, divergence.degree is not None)
    clean = launch(student[:1], teacher[:1], Rows(labels[:1]), divergence, want, alpha=alpha)
    student[4, 6] = teacher[5, 6] = student[6] = math.nan
    actual = launch(student, teacher, Rows(labels), divergence, want, alpha=alpha)
    for name in ("loss", "student_gradient", "teacher_gradient"):
        value = getattr(actual, name)
        if value is not None:
            assert value[1:6].isnan().all(), name
            assert torch.equal(value[:1], getattr(clean, name)), name
            assert not value[6].any(), "a dropped row is not read"


@pytest.mark.parametrize(
    "divergence", [WITH_TARGET["dkd"], heavy(WITH_TARGET["jsd"], id="jsd")], ids=["dkd", None]
)
def test_equal_distributions(divergence: Divergence) -> None:
    student, _ = pair(2, 37)
    spread = {"temperature": 0.7, "teacher_temperature": 0.7}
    actual = launch(student, student.clone(), labels_of(16, 36), divergence, **spread)
    # With dkd, nothing but the rounding error of a product is left, if a GPU fuses it with the following subtraction.
    for value in (actual.loss, actual.student_gradient, actual.teacher_gradient):
        assert value.abs().max() <= (1e-11 if divergence.name == "dkd" else 1e-6)


@however_shared
@some_with_target
def test_common_offset(divergence: Divergence) -> None:
    """Multiples of 1/64 move by 1e4 without rounding, and no result changes by a bit."""
    student, teacher = ((x * 64).round() / 64 for x in pair(2, 37))
    options = HALF | {"temperature": 0.7, "teacher_temperature": 2.0}
    still = launch(student, teacher, labels_of(0, 36), divergence, **options)
    same(launch(student + 1e4, teacher - 1e4, labels_of(0, 36), divergence, **options), still)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def poison(memory: Tensor) -> Tensor:
        return memory.fill_(math.nan) if memory.is_floating_point() else memory

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda *x, **y: poison(new_empty(*x, **y)))
        patch.setattr(torch, "empty", lambda *x, **y: poison(empty(*x, **y)))
        yield


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("alpha", [0.5, 0.0, heavy(1.0, id="1.0")])
@pytest.mark.parametrize("shares", [PLAN, heavy(None, id="alone")], indirect=True)
@some_with_target
def test_only_wanted_outputs_are_computed(divergence: Divergence, alpha: float) -> None:
    """Each output alone is bit for bit that of all together; where alpha is 0 the teacher is not read."""
    student, teacher = pair(1, 20)
    options = {"alpha": alpha, **WARM}
    everything = launch(student, teacher, labels_of(17), divergence, **options)
    for value in everything[:-1]:  # all but the measures, which kd_rows does not compute
        assert value.isfinite().all()
    inputs = torch.full_like(teacher, math.nan) if alpha == 0 else teacher
    for want in (Want(), Want(False, True), Want(True, inplace=True)):
        actual = launch(student.clone(), inputs, labels_of(17), divergence, want, **options)
        for name, value in zip(Result._fields, actual, strict=True):
            if value is not None:
                assert torch.equal(value, getattr(everything, name)), (name, want)


@in_interpreter
@pytest.mark.parametrize("shares", [PLAN], indirect=True, ids=["shared"])
@some_with_target
def test_programs_of_a_row_run_in_any_order(
    monkeypatch: pytest.MonkeyPatch, divergence: Divergence
) -> None:
    """In place: one overwrites the label's logit before another has begun."""

    def found() -> Result:
        student, teacher = pair(2, 37)
        options = HALF | {"softcap": 9.0}
        return launch(
            student, teacher, labels_of(20, 0), divergence, Want(True, inplace=True), **options
        )

    in_order = found()
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z: place(x, builder.grid_dim[1] - 1 - y, z)
    )
    same(found(), in_order)


# Vocabulary shards: 61 columns split into 30, 10, 0 and 21, with the label at an edge of each shard.


@pytest.fixture
def in_shards(monkeypatch: pytest.MonkeyPatch) -> InShards:
    monkeypatch.setattr(sparse_kernels, "tile", lambda *row: (TILE, 1))
    monkeypatch.setattr(kernels, "shard_plan", lambda rows, shard: split.Plan(2, rows))
    return InShards(kernels, (3.0, 1.0, 0.0, 2.0))


@some_with_target
def test_shards(
    in_shards: InShards, monkeypatch: pytest.MonkeyPatch, divergence: Divergence
) -> None:
    monkeypatch.setattr(kernels, "kd_rows", in_shards.kd_rows)
    student, teacher = pair(2, 61)
    options = HALF | {"temperature": 2.0, "teacher_temperature": 0.5, "softcap": 9.0}
    compare(student, teacher, labels_of(30, 60), divergence, **options)
    assert in_shards.calls


@pytest.mark.heavy
@with_target
def test_shards_with_infinities_and_nan(
    in_shards: InShards, monkeypatch: pytest.MonkeyPatch, divergence: Divergence
) -> None:
    monkeypatch.setattr(kernels, "kd_rows", in_shards.kd_rows)
    student, teacher = pair(3, 61)
    student[0, 30], teacher[1, :30] = -INF, -INF
    compare(student, teacher, labels_of(30, 39, 29), divergence, reference.kd_rows, **HALF, **WARM)
    teacher[0, 30] = math.nan
    actual = launch(student, teacher, labels_of(30, -1, 60), divergence, Want(True), alpha=0.5)
    assert actual.loss.isnan().tolist() == [True, True, False]


def test_statistics_that_shards_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have two more statistics only if the label has a separate term."""
    student, teacher = pair(2, 7)
    for divergence, fields in (
        ("dkd", split.FIELDS + split.LABEL_TERM_FIELDS),
        ("mixture", split.FIELDS),
    ):
        shard = fastkd.call.contract.Shard(7, 21, 7, 1, None)
        options = Options(fastkd.divergences.resolve(divergence), vocab_size=7, shard=shard)
        result = Result(torch.empty(2, device=DEVICE), torch.empty(()))
        actual = kernels.shard_statistics(
            ShardCall(student, teacher, labels_of(1, 8), options, result)
        )
        assert actual.gathered.shape == (2, fields)


# Memory traffic, and dispatch to the kernels


@in_interpreter
@pytest.mark.parametrize(
    ("divergence", "sweeps"), [("dkd", 2), heavy("nkd", 2, id="nkd-2"), heavy("jsd", 3, id="jsd-3")]
)
def test_device_memory_traffic_equals_that_without_labels(divergence: str, sweeps: int) -> None:
    width = 16 * TILE
    student, teacher = pair(1, width)
    with memory_accesses() as accesses:
        launch(
            student, teacher, labels_of(100), WITH_TARGET[divergence], Want(True), temperature=2.0
        )
    assert _traffic(tiles_of(accesses, width), cache=0) == (2 * sweeps + 1) * width * 4


def test_the_public_function_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = ran_on(monkeypatch, "triton", "reference")
    student, teacher = pair(2, 37)
    labels = torch.tensor([-100, 36], device=DEVICE)
    for name in ("dkd", "nkd"):
        results = []
        for backend in ("triton", "reference"):
            s = student.clone().requires_grad_()
            t = teacher.clone().requires_grad_(name == "dkd")
            loss = kd_loss(
                s, t, labels, divergence=name, temperature=2.0, alpha=0.5, backend=backend
            )
            loss.sum().backward()
            results.append((loss.detach(), s.grad, *([t.grad] if name == "dkd" else [])))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert ran == ["triton", "reference"] * 2
    assert registry.load("triton").shard_results is kernels.shard_results
