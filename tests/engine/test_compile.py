"""torch.compile, torch.export, the custom op underneath, and autocast."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.accuracy import ULP, labels_for, logits, upstream_for
from support.options import TOGETHER, dropped_by, for_kd_loss
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastkd
from fastkd import KDLoss, kd_loss
from fastkd.call.contract import Options, Want
from fastkd.call.options import Numbers
from fastkd.divergences import resolve
from fastkd.engine.ops import GraphOptions


# All backends compile to one operator that takes the backend's name, so one backend in plain PyTorch and one of kernels
# are enough here. Tests of the graph alone, and not of what the operator returns, use only the cpu backend.
def one_operator(test: Any) -> Any:
    for name in ("portable", "triton"):
        test = pytest.mark.heavy_with(any_backend=name)(test)
    return test


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def _batch(
    rows: int, dtype: torch.dtype = torch.float32, columns: int = 37
) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (logits(rows, columns, seed=rows + side, dtype=dtype) for side in range(2))
    return student, teacher, labels_for(rows, vocabulary=columns, seed=rows, ignored=0.2)


# The call under test, and the other arguments that it takes from the batch.
CALLS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "labels": {"labels": True, "alpha": 0.5, "temperature": 2.0, "label_smoothing": 0.1},
    "per row": {
        "labels": True,
        "alpha": 0.5,
        "weight": True,
        "temperature": "rows",
        "reduction": "none",
    },
    "num_items": {"labels": True, "num_items": torch.tensor(7), "divergence": "jsd"},
    "batchmean": {"reduction": "batchmean", "divergence": fastkd.jsd(0.3)},
    "everything": for_kd_loss(TOGETHER["everything"], columns=31)
    | {"labels": True, "divergence": "alpha_beta"},
    "masked": {"mask": True, "divergence": "squared_error", "reduction": "sum"},
}


def _loss_function(call: dict[str, Any], backend: str) -> Callable[..., Tensor]:
    """A function of a batch that calls kd_loss with constant options, taking the changing ones as arguments."""
    fixed = {
        name: value
        for name, value in call.items()
        if name not in ("labels", "weight", "mask", "temperature")
    }
    if isinstance(call.get("temperature"), float):
        fixed["temperature"] = call["temperature"]

    def loss_function(
        student: Tensor, teacher: Tensor, labels: Tensor | None, **batch: Tensor
    ) -> Tensor:
        return kd_loss(student, teacher, labels, backend=backend, **fixed, **batch)

    return loss_function


def _compare(
    compiled: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    call: dict[str, Any],
    rows: int,
    dtype: torch.dtype,
) -> None:
    """Assert that the compiled function gives the eager one's value and both gradients."""
    student, teacher, labels = _batch(rows, dtype)
    labels = dropped_by(call, labels.clamp(max=call.get("vocab_size", 37) - 1))
    generator = torch.Generator().manual_seed(rows)
    batch: dict[str, Tensor] = {}
    if call.get("temperature") == "rows":
        batch["temperature"] = torch.rand(rows, generator=generator) + 0.5
    if "weight" in call:
        batch["weight"] = torch.rand(rows, generator=generator)
    if "mask" in call:
        batch["mask"] = torch.rand(rows, generator=generator) < 0.7
    results = []
    for function in (compiled, eager):
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss = function(s, t, labels if "labels" in call else None, **batch)
        upstream = upstream_for(*loss.shape).sign() * 2  # a power of 2, which does not round
        results.append((loss.detach(), *torch.autograd.grad(loss, (s, t), upstream)))
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(results[0], results[1], rtol=4 * tolerance, atol=4 * ULP)


# Every call in float32. In float16, whose gradients are made in the backward, one whose denominator is on the device;
# in bfloat16 one whose denominator is a number.
SWEEP = [(name, torch.float32) for name in CALLS]
SWEEP += [("labels", torch.float16), ("batchmean", torch.bfloat16)]


IN_EVERY_RUN = [("everything", torch.float32), ("masked", torch.float32), *SWEEP[-2:]]


@pytest.mark.heavy_with(backend="portable")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        case if case in IN_EVERY_RUN else pytest.param(*case, marks=pytest.mark.heavy)
        for case in SWEEP
    ],
    ids=str,
)
def test_one_graph_and_no_recompilation_across_rows(
    backend: str, name: str, dtype: torch.dtype
) -> None:
    call = CALLS[name]
    counter, eager = CompileCounterWithBackend("aot_eager"), _loss_function(call, backend)
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=counter)
    _compare(compiled, eager, call, 5, dtype)
    compiled_once = (
        counter.frame_count
    )  # the compiler may call its backend several times for one graph
    for rows in (3, 17, 64, 2):
        _compare(compiled, eager, call, rows, dtype)
    assert counter.frame_count == compiled_once


@pytest.mark.heavy_with(backend="portable")
@pytest.mark.heavy_with(name="defaults")
@pytest.mark.parametrize("name", ["defaults", "per row"])
def test_by_default_the_second_size_makes_rows_dynamic(backend: str, name: str) -> None:
    call = CALLS[name]
    counter, eager = CompileCounterWithBackend("aot_eager"), _loss_function(call, backend)
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for rows in (5, 3, 17, 64, 2):
        _compare(compiled, eager, call, rows, torch.float32)
    assert counter.frame_count <= 2


@pytest.mark.heavy_with(backend="portable")
@pytest.mark.heavy_with(dynamic=True)  # test_a_schedule_with_dynamic_true changes it, too
@pytest.mark.parametrize("dynamic", [True, None])
def test_a_temperature_that_changes_breaks_no_graph(backend: str, dynamic: bool | None) -> None:
    """An annealed temperature is an argument, which the compiler may turn into a symbol."""
    compiled = torch.compile(kd_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    student, teacher, labels = _batch(3)
    for temperature in (4.0, 2.0, 1.5, 1.0):
        call: dict[str, Any] = {
            "temperature": temperature,
            "alpha": temperature / 8,
            "backend": backend,
        }
        results = []
        for function in (compiled, kd_loss):
            leaf = student.clone().requires_grad_()
            loss = function(leaf, teacher, labels, **call)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*results)


@pytest.mark.heavy_with(backend="portable")  # the graph is the same
def test_inductor(backend: str) -> None:
    """A training step in one graph: head, shifted view, loss and backward."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 101), torch.randn(2, 9, 16)
    teacher, labels = (
        logits(2, 9, 101, seed=1),
        labels_for(2, 9, vocabulary=101, seed=2, ignored=0.2),
    )
    loss_function = KDLoss(divergence="jsd", alpha=0.5, temperature=2.0, backend=backend)

    def step(hidden: Tensor) -> Tensor:
        return loss_function(head(hidden)[:, :-1], teacher[:, :-1], labels[:, 1:])

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        head.zero_grad()
        # Without SIMD code, which is irrelevant here and slow to compile.
        with torch._inductor.config.patch({"cpp.simdlen": 1}):
            loss = function(hidden)
            loss.backward()
        results.append((loss.detach(), head.weight.grad.clone(), head.bias.grad.clone()))
    torch.testing.assert_close(results[0], results[1])


@one_operator
def test_parts_are_compiled(any_backend: str) -> None:
    student, teacher, labels = _batch(5)

    def call(student: Tensor) -> Any:
        return kd_loss(student, teacher, labels, alpha=0.5, return_parts=True, backend=any_backend)

    loss, parts = torch.compile(call, fullgraph=True, backend="aot_eager")(student.requires_grad_())
    expected, expected_parts = call(student)
    torch.testing.assert_close(loss, expected)
    for part, value in zip(parts, expected_parts, strict=True):
        assert not part.requires_grad
        torch.testing.assert_close(part, value)


def test_a_user_defined_divergence_is_compiled() -> None:
    def function(
        p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, factor: float
    ) -> tuple[Tensor, Tensor]:
        return factor * p * (log_p - log_q), -factor * p

    custom = fastkd.Divergence("mine", function, (2.0,))
    student, teacher, _ = _batch(5)
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(student, teacher, divergence=custom, backend="reference")
    torch.testing.assert_close(loss, 2 * kd_loss(student, teacher, backend="reference"))


@one_operator
@pytest.mark.heavy_with(any_backend="cpu")  # the graph is the same
def test_a_batch_without_a_counted_row_in_a_compiled_function(any_backend: str) -> None:
    compiled = torch.compile(kd_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 0):
        student, teacher, labels = _batch(rows)
        leaf = student.requires_grad_()
        loss = compiled(leaf, teacher, torch.full_like(labels, -100), backend=any_backend)
        loss.backward()
        assert loss == 0 and leaf.grad is not None and not leaf.grad.any()


@one_operator
def test_errors_inside_a_compiled_function(any_backend: str) -> None:
    student, teacher, _ = _batch(3)
    compiled = torch.compile(kd_loss, backend="aot_eager")
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0.0"):
        compiled(student, teacher, temperature=0.0, backend=any_backend)


@pytest.mark.heavy  # test_the_table_matches_the_graphs has a row of inplace=True
def test_inplace_breaks_the_graph(backend: str) -> None:
    student, teacher, _ = _batch(3)
    student.requires_grad_()

    def step(student: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(student * 1.0, teacher, inplace=True, backend=backend)

    (expected,) = torch.autograd.grad(step(student, teacher), student)
    loss = torch.compile(step, backend="aot_eager")(student, teacher)
    assert torch.equal(torch.autograd.grad(loss, student)[0], expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="inplace=True is for eager mode"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(student, teacher)


@one_operator
def test_double_backward_of_a_compiled_function_raises(any_backend: str) -> None:
    student, teacher, _ = _batch(3)
    leaf = student.requires_grad_()
    loss = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")(
        leaf, teacher, backend=any_backend
    )
    with pytest.raises(RuntimeError, match="double backward|twice"):
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        gradient.square().sum().backward()


# Export


class _Step(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loss = KDLoss(**options)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self.loss(student, teacher, labels)


class _WithoutLabels(_Step):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self.loss(student, teacher)


class _FromHiddenStates(_Step):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loss, self.head = fastkd.FusedLinearKDLoss(**options), nn.Linear(37, 21)
        self.register_buffer("teacher_head", logits(21, 37, seed=9))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        target = fastkd.LinearTeacher(teacher, self.teacher_head)
        return self.loss(student, self.head.weight, target, student_bias=self.head.bias)


@pytest.mark.heavy_with(backend="portable")
@pytest.mark.parametrize("kind", [_Step, _WithoutLabels, _FromHiddenStates])
def test_export_with_dynamic_rows(backend: str, kind: type[_Step]) -> None:
    step = kind(backend=backend, divergence="jsd", temperature=2.0)
    rows = torch.export.Dim("rows", min=1)
    exported = torch.export.export(
        step, _batch(5), dynamic_shapes=({0: rows}, {0: rows}, {0: rows})
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for program in (exported, torch.export.load(file)):
        for count in (5, 2, 33):
            batch = _batch(count)
            torch.testing.assert_close(program.module()(*batch), step(*batch))


# The op


def _op_arguments(
    backend: str, dtype: torch.dtype, want: Want, divergence: str, per_row: bool
) -> tuple[Any, ...]:
    student, teacher, labels = _batch(3, dtype, 9)
    options = Options(resolve(divergence), vocab_size=9)
    # Numbers are constants of a graph, or symbols, which are inputs of the op.
    numbers = Numbers.of(temperature=2.0, teacher_temperature=2.0, num_items=2)
    rows: tuple[Tensor | None, ...] = (None,) * 5
    if per_row:
        numbers = Numbers.of(alpha=0.5)
        rows = (labels, torch.rand(3), torch.rand(3) + 0.5, torch.rand(3) + 0.5, torch.tensor(0.25))
    return (
        student.requires_grad_(want.student_gradient),
        teacher.requires_grad_(want.teacher_gradient),
        *rows,
        None,
        None,
        backend,
        *GraphOptions.of(options, want, numbers),
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_beta"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    "want",
    [
        Want(),
        Want(student_gradient=True),
        Want(student_gradient=True, teacher_gradient=True, parts=True),
        Want(student_gradient=True, teacher_gradient=True, parts=True, deferred=True),
    ],
    ids=["nothing", "student", "everything", "deferred"],
)
@pytest.mark.pairwise(each="backend")
def test_opcheck(
    backend: str, want: Want, per_row: bool, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if per_row:  # numbers that change from step to step
        monkeypatch.setattr("fastkd.engine.graphs._is_constant", lambda _: False)
    dtype = torch.float16 if want.deferred else torch.float32
    arguments = _op_arguments(backend, dtype, want, divergence, per_row)
    # conftest.py fills new memory with NaN, and opcheck also compares outputs that are left empty.
    torch.library.opcheck(torch.ops.fastkd.kd_rows.default, arguments)


# Autocast


@one_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_loss_in_float32(any_backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head, hidden, teacher = nn.Linear(16, 37), torch.randn(5, 16), logits(5, 37, seed=3)
    with torch.autocast("cpu", dtype=dtype):
        student = head(hidden)
        assert student.dtype == dtype
        student.retain_grad()
        loss = kd_loss(student, teacher, backend=any_backend)
        whole = kd_loss(student.float(), teacher, backend=any_backend)
        compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")(
            student, teacher, backend=any_backend
        )
    assert loss.dtype == whole.dtype == compiled.dtype == torch.float32
    outside = kd_loss(student.detach(), teacher, backend=any_backend)
    assert torch.equal(loss.detach(), outside)
    torch.testing.assert_close(compiled, loss)
    loss.backward()
    assert student.grad.dtype == dtype and head.weight.grad.dtype == torch.float32
    leaf = student.detach().requires_grad_()
    kd_loss(leaf, teacher, backend=any_backend).backward()
    assert torch.equal(student.grad, leaf.grad)
