"""Losses in chunks of rows: from hidden states and a head, and against teachers whose logits are computed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.accuracy import ULP, labels_for, logits, ran_on, upstream_for
from support.options import TOGETHER, dropped_by, for_kd_loss
from support.oracles import UNNORMALIZED, compose
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd.backends import cpu
from fastkd.call.contract import Options, Want
from fastkd.call.options import Numbers
from fastkd.divergences import resolve
from fastkd.engine import chunks, matmul
from fastkd.engine.ops import GraphOptions
from fastkd.teachers import flatten, weights_of
from fastkd.teachers.cache import CacheWriter, TeacherCache

# A vocabulary of slightly more than one block of the CPU kernel; a number of rows that no chunk size divides.
N, H, WIDER, V = 19, 24, 40, 2_100


class Problem(NamedTuple):
    """Operands of a fused linear loss."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher: fastkd.teachers.Teacher

    def leaves(self) -> list[Tensor]:
        """New leaves for hidden, weight and bias."""
        return [x.detach().clone().requires_grad_() for x in self[:3] if x is not None]


def problem(
    form: str = "linear",
    *lead: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    rows: int = V,
    teacher_rows: int = V,
    seed: int = 0,
) -> Problem:
    """A problem whose logits have a standard deviation of about 3."""
    lead = lead or (N,)

    def normal(*shape: int, number: int, spread: float = 1.0) -> Tensor:
        return logits(*shape, seed=10 * seed + number, spread=spread, dtype=dtype)

    weight = normal(rows, H, number=1, spread=3 / H**0.5)
    head = normal(teacher_rows, WIDER, number=2, spread=3 / WIDER**0.5)
    teacher = fastkd.LinearTeacher(normal(*lead, WIDER, number=3), head)
    dense = normal(*lead, teacher_rows, number=4, spread=3.0)
    teachers: dict[str, Any] = {
        "linear": teacher,
        "linear with bias": fastkd.LinearTeacher(
            teacher.hidden, head, normal(teacher_rows, number=5)
        ),
        "dense": dense,
        "arithmetic": fastkd.Ensemble([teacher, dense], [1, 2]),
        "geometric": fastkd.Ensemble([dense, teacher, dense + 1], mean="geometric"),
    }
    return Problem(
        normal(*lead, H, number=6),
        weight,
        normal(rows, number=7) if bias else None,
        teachers[form],
    )


FORMS = ("linear", "linear with bias", "dense", "arithmetic", "geometric")


def teacher_logits(
    teacher: Any, dtype: torch.dtype, vocabulary: int, options: dict[str, Any]
) -> Tensor:
    """The teacher as dense logits, in that dtype, from its definition."""
    if isinstance(teacher, Tensor):
        return teacher.to(dtype)[..., :vocabulary]
    if isinstance(teacher, fastkd.LinearTeacher):
        z = teacher.hidden.to(dtype) @ teacher.weight.to(dtype).T
        return (z if teacher.bias is None else z + teacher.bias.to(dtype))[..., :vocabulary]
    temperature = options.get("teacher_temperature", options.get("temperature", 1.0))
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1).to(dtype)
    members = []
    for member in teacher.teachers:
        z = teacher_logits(member, dtype, vocabulary, {}) * options.get("teacher_logit_scale", 1.0)
        cap = options.get("teacher_softcap")
        members.append((z if cap is None else cap * torch.tanh(z / cap)) / temperature)
    if teacher.mean == "geometric":
        return sum(w * z for w, z in zip(teacher.weights, members, strict=True)) * temperature
    p = sum(w * z.softmax(-1) for w, z in zip(teacher.weights, members, strict=True))
    return p.log() * temperature


def composed(
    given: Problem,
    dtype: torch.dtype,
    labels: Tensor | None,
    upstream: Tensor | None,
    **options: Any,
) -> dict[str, Tensor]:
    """Loss and gradients composed of plain PyTorch operations in that dtype."""
    vocabulary = options.get("vocab_size") or given.weight.shape[0]
    hidden, weight = given.hidden.to(dtype), given.weight.to(dtype)
    s = hidden @ weight.T
    if given.bias is not None:
        s = s + given.bias.to(dtype)
    t = teacher_logits(given.teacher, dtype, vocabulary, options)
    if isinstance(given.teacher, fastkd.Ensemble):
        options = {
            k: v for k, v in options.items() if k not in ("teacher_logit_scale", "teacher_softcap")
        }
    out = compose(s, t, labels, dtype=dtype, terms=False, upstream=upstream, **options)
    gradient = out.student_gradient.flatten(0, -2)
    return {
        "loss": out.loss,
        "hidden": (gradient @ weight).view_as(hidden),
        "weight": gradient.T @ hidden.flatten(0, -2),
        "bias": gradient.sum(0),
        "distillation": out.distillation,
        "cross_entropy": out.cross_entropy,
        "student_entropy": out.student_entropy,
    }


def error(value: Tensor, exact: Tensor) -> float:
    """Relative error by norm."""
    norm = float(exact.norm())
    return float((value.double() - exact).norm()) / (norm or 1.0)


def check(
    backend: str,
    given: Problem,
    labels: Tensor | None = None,
    *,
    upstream: Tensor | None = None,
    rounding: float = 0.0,
    chunk_size: int | None = 7,
    logits_dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Assert that errors of loss, parts and gradients are at most plain float32 PyTorch's plus `rounding` of the
    operands' dtype."""
    leaves = given.leaves()
    loss, parts = fastkd.fused_linear_kd_loss(
        *leaves[:2],
        given.teacher,
        labels,
        student_bias=leaves[2] if len(leaves) > 2 else None,
        chunk_size=chunk_size,
        logits_dtype=logits_dtype,
        backend=backend,
        return_parts=True,
        **options,
    )
    results = dict(
        zip(("hidden", "weight", "bias"), torch.autograd.grad(loss, leaves, upstream), strict=False)
    )
    for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=False):
        assert results[name].dtype == leaf.dtype and results[name].shape == leaf.shape
    exact = composed(given, torch.float64, labels, upstream, **options)
    plain = composed(given, torch.float32, labels, upstream, **options)
    results |= {"loss": loss.detach()} | parts._asdict()
    for name, value in results.items():
        if name == "counted":
            continue
        # The reference is plain float32 PyTorch in another order: either may be the more exact one.
        allowed = (
            error(plain[name], exact[name]) * (2 if backend in ("portable", "reference") else 1)
            + 8 * ULP
        )
        allowed += rounding if name in ("hidden", "weight", "bias") or logits_dtype else 0.0
        assert error(value, exact[name]) <= allowed, (name, error(value, exact[name]), allowed)


@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", "jsd", "tvd", "alpha_beta", "mixture"]
)
@pytest.mark.parametrize("form", FORMS)
def test_every_teacher(backend: str, form: str, divergence: str) -> None:
    check(backend, problem(form), divergence=divergence, temperature=2.0)


@pytest.mark.only_where(  # an arithmetic mean has no logits: test_bad_arguments
    lambda divergence, form: divergence not in UNNORMALIZED or form != "arithmetic"
)
@pytest.mark.parametrize("form", ["linear", "dense", "arithmetic"])
@pytest.mark.parametrize("divergence", sorted(set(fastkd.DIVERGENCES)))
def test_every_divergence(any_backend: str, form: str, divergence: str) -> None:
    check(
        any_backend,
        problem(form, 3, rows=130, teacher_rows=130),
        divergence=divergence,
        chunk_size=2,
    )


@pytest.mark.parametrize("form", ["linear", "arithmetic"])
def test_triton(form: str) -> None:
    inputs = problem(form, 3, rows=130, teacher_rows=130, bias=True)
    labels = labels_for(3, vocabulary=130, seed=3, ignored=0.3)
    check("triton", inputs, labels, alpha=0.5, divergence="jsd", temperature=2.0, chunk_size=2)
    half = problem(form, 3, rows=130, teacher_rows=130, dtype=torch.bfloat16)
    check("triton", half, chunk_size=2, rounding=2**-8)


CHUNKED = {
    "labels": {"alpha": 0.3, "temperature": 2.0, "label_smoothing": 0.1},
    "cross-entropy alone": {"alpha": 0.0},
    "sum": {"reduction": "sum"},
    "batchmean": {"reduction": "batchmean"},
    "num_items": {"num_items": 100},
    "num_items on the device": {"num_items": torch.tensor(100.0)},
    **{name: for_kd_loss(options, columns=V - 3) for name, options in TOGETHER.items()},
    "temperatures a row": {
        "temperature": torch.linspace(0.5, 3, N),
        "teacher_temperature": torch.linspace(2, 1, N),
    },
    "mask and weight": {
        "mask": torch.arange(N) % 3 > 0,
        "weight": torch.linspace(0, 2, N),
    },
}


@pytest.mark.parametrize("form", ["linear", "dense", "arithmetic", "geometric"])
@pytest.mark.parametrize("options", CHUNKED.values(), ids=CHUNKED.keys())
def test_options(backend: str, form: str, options: dict[str, Any]) -> None:
    labels = dropped_by(options, labels_for(N, vocabulary=V - 3, seed=3, ignored=0.3))
    check(backend, problem(form, bias=True), labels, **options)


# One row per chunk, an uneven division, exactly all rows, more than all rows, and by the memory budget.
@pytest.mark.parametrize("chunk_size", [1, 7, N, 1000, None])
def test_chunk_size(backend: str, chunk_size: int | None) -> None:
    check(backend, problem(bias=True), chunk_size=chunk_size, divergence="jsd")


@pytest.mark.parametrize("form", ["linear", "dense", "arithmetic"])
def test_one_loss_per_row(backend: str, form: str) -> None:
    # The weight's gradient has the upstream gradient inside its sum, so it is computed in the backward.
    labels = labels_for(N, vocabulary=V, seed=4, ignored=0.3)
    upstream = upstream_for(N)
    check(backend, problem(form, bias=True), labels, alpha=0.5, reduction="none", upstream=upstream)


@pytest.mark.parametrize("form", ["linear", "dense", "geometric"])
def test_padded_vocabularies(backend: str, form: str) -> None:
    inputs = problem(form, bias=True, rows=V + 30, teacher_rows=V + 7)
    check(backend, inputs, vocab_size=V - 3)


def test_leading_shapes_and_strides(backend: str) -> None:
    inputs = problem("linear", 3, 5)
    shifted = inputs._replace(
        hidden=inputs.hidden[:, :-1],
        teacher=fastkd.LinearTeacher(inputs.teacher.hidden[:, :-1], inputs.teacher.weight),
    )
    assert not shifted.hidden.is_contiguous()
    loss = fastkd.fused_linear_kd_loss(*shifted[:2], shifted.teacher, backend=backend, chunk_size=5)
    again = fastkd.fused_linear_kd_loss(
        shifted.hidden.contiguous(), shifted.weight, shifted.teacher, backend=backend, chunk_size=5
    )
    assert torch.equal(loss, again)
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    check(backend, shifted, mask=mask, chunk_size=3)
    one = problem("linear", bias=True)
    single = fastkd.fused_linear_kd_loss(
        one.hidden[0],
        one.weight,
        fastkd.LinearTeacher(one.teacher.hidden[0], one.teacher.weight),
        backend=backend,
    )
    assert single.dim() == 0 and single > 0


# The gradients are rounded to their dtype once, and the products' operands were rounded before.
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("form", ["linear", "dense", "arithmetic"])
def test_low_precision(backend: str, dtype: torch.dtype, rounding: float, form: str) -> None:
    inputs = problem(form, dtype=dtype, bias=True)
    check(backend, inputs, divergence="jsd", rounding=rounding)
    check(backend, inputs, reduction="none", upstream=upstream_for(N), rounding=2 * rounding)


def test_low_precision_logits_are_optional_and_less_exact(backend: str) -> None:
    inputs = problem(dtype=torch.bfloat16)
    check(backend, inputs, logits_dtype=torch.float32, rounding=2**-8)
    check(backend, inputs, logits_dtype=torch.bfloat16, rounding=0.25)
    with pytest.raises(AssertionError):
        check(backend, inputs, logits_dtype=torch.bfloat16, rounding=2**-8)


def test_a_loss_scaler_preserves_float16_gradients() -> None:
    # With a weight of 1 / (N V) the gradient is below float16's smallest number until the scaler's factor multiplies
    # it.
    inputs = problem(dtype=torch.float16)
    leaves = inputs.leaves()
    scale = 2.0**-22
    loss = fastkd.fused_linear_kd_loss(*leaves, inputs.teacher, weight=torch.full((N,), scale))
    gradients = torch.autograd.grad(loss, leaves, torch.tensor(1 / scale))
    exact = composed(inputs, torch.float64, None, None)
    for gradient, name in zip(gradients, ("hidden", "weight"), strict=True):
        assert error(gradient, exact[name]) < 2**-10


def test_float64_is_served_by_the_reference() -> None:
    inputs = problem(dtype=torch.float64, bias=True)
    leaves = inputs.leaves()
    loss = fastkd.fused_linear_kd_loss(
        *leaves[:2], inputs.teacher, student_bias=leaves[2], chunk_size=7, backend="reference"
    )
    exact = composed(inputs, torch.float64, None, None)
    for gradient, name in zip(
        torch.autograd.grad(loss, leaves), ("hidden", "weight", "bias"), strict=True
    ):
        assert error(gradient, exact[name]) < 1e-14


@pytest.mark.parametrize("kept", ["hidden", "weight", "bias"])
def test_frozen_operands_get_no_gradient(
    backend: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = problem(bias=True)
    operands = dict(zip(("hidden", "weight", "bias"), inputs.leaves(), strict=True))
    products_of_weight = []
    monkeypatch.setattr(
        chunks,
        "add_weight_gradient",
        lambda *a: products_of_weight.append(matmul.add_weight_gradient(*a)),
    )
    for name, operand in operands.items():
        operand.requires_grad_(name == kept)
    loss = fastkd.fused_linear_kd_loss(
        operands["hidden"], operands["weight"], inputs.teacher, student_bias=operands["bias"],
        chunk_size=7, backend=backend,
    )  # fmt: skip
    loss.backward()
    exact = composed(inputs, torch.float64, None, None)
    assert error(operands[kept].grad, exact[kept]) < 1e-5
    assert all((operand.grad is None) == (name != kept) for name, operand in operands.items())
    assert bool(products_of_weight) == (kept == "weight")


def test_no_gradient_is_made_without_need(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(bias=True)
    monkeypatch.setattr(chunks, "hidden_gradient", None)
    monkeypatch.setattr(chunks, "add_weight_gradient", None)
    with torch.no_grad():
        loss = fastkd.fused_linear_kd_loss(*inputs.leaves()[:2], inputs.teacher, backend=backend)
    assert not loss.requires_grad
    assert loss == fastkd.fused_linear_kd_loss(
        inputs.hidden, inputs.weight, inputs.teacher, backend=backend
    )


def test_retain_graph_and_double_backward(backend: str) -> None:
    inputs = problem(bias=True)
    for options in ({}, {"reduction": "none"}):
        leaves = inputs.leaves()
        loss = fastkd.fused_linear_kd_loss(
            *leaves[:2],
            inputs.teacher,
            student_bias=leaves[2],
            chunk_size=7,
            backend=backend,
            **options,
        ).sum()
        first = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
        second = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
        third = torch.autograd.grad(2 * loss, leaves)
        for a, b, c in zip(first, second, third, strict=True):
            assert torch.equal(a, b) and torch.equal(b, c)
        loss = fastkd.fused_linear_kd_loss(*leaves[:2], inputs.teacher, backend=backend)
        (gradient,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            gradient.sum().backward()


def test_a_squared_loss(backend: str) -> None:
    inputs = problem()
    leaves = inputs.leaves()
    loss = fastkd.fused_linear_kd_loss(*leaves, inputs.teacher, backend=backend)
    (loss**2).backward()
    exact = composed(inputs, torch.float64, None, None)
    assert error(leaves[1].grad, 2 * exact["loss"] * exact["weight"]) < 1e-5


def test_activation_checkpointing(backend: str) -> None:
    inputs = problem()

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return fastkd.fused_linear_kd_loss(
            2 * hidden, weight, inputs.teacher, backend=backend, chunk_size=7
        )

    leaves, again = inputs.leaves(), inputs.leaves()
    run(*leaves).backward()
    checkpoint(run, *again, use_reentrant=False).backward()
    for a, b in zip(leaves, again, strict=True):
        assert torch.equal(a.grad, b.grad)


# ---- torch.compile


def _outcome(run: Callable[..., Tensor], problem: Problem, at: slice) -> list[Tensor]:
    """The loss of some rows and its gradients, with an upstream gradient other than 1."""
    leaves = problem._replace(hidden=problem.hidden[at]).leaves()
    loss = run(*leaves)
    torch.manual_seed(0)
    upstream = torch.rand(loss.shape).add(0.5).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def _sliced(teacher: Any, at: slice) -> Any:
    if isinstance(teacher, Tensor):
        return teacher[at]
    if isinstance(teacher, fastkd.LinearTeacher):
        return fastkd.LinearTeacher(teacher.hidden[at], teacher.weight, teacher.bias)
    members = []
    for member in teacher.teachers:  # the compiler fixes a slice that a comprehension closes over
        members.append(_sliced(member, at))
    return fastkd.Ensemble(members, teacher.weights, teacher.mean)


def _close_to_eager(eager: list[Tensor], ours: list[Tensor], dtype: torch.dtype) -> None:
    """Assert that compiled and eager results are equal up to the rounding of the product with the upstream gradient."""
    for a, b in zip(eager, ours, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert error(b, a) <= 2 * torch.finfo(dtype).eps


COMPILED: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("linear", torch.float32, {"divergence": "jsd", "alpha": 0.5, "reduction": "none", "temperature": 2.0}),
    ("arithmetic", torch.float32, {"divergence": fastkd.jsd(0.3), "reduction": "sum", "temperature": 2.0}),
    ("geometric", torch.float32, {"temperature": 2.0}),
    ("dense", torch.bfloat16, {"alpha": 0.5, "label_smoothing": 0.1, "temperature": 2.0}),
    ("linear", torch.bfloat16, {"logits_dtype": torch.bfloat16}),
    ("linear", torch.float16, {"alpha": 0.5, "num_items": torch.tensor(9)}),
    ("linear with bias", torch.float16, {"reduction": "none", "softcap": 20.0, "temperature": 2.0}),
]  # fmt: skip
assert {form for form, _, _ in COMPILED} == set(FORMS)


# All backends have the same graph, so most runs of the compiled tests below use only the reference.
@pytest.mark.heavy_with(backend="portable")
@pytest.mark.parametrize(
    ("form", "dtype", "options"),
    [
        case
        if case[0] in ("arithmetic", "dense", "linear with bias")
        else pytest.param(*case, marks=pytest.mark.heavy)
        for case in COMPILED
    ],
    ids=str,
)
@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_for_any_number_of_rows(
    backend: str, form: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    inputs = problem(form, dtype=dtype, bias=True, rows=400, teacher_rows=400)
    labels = labels_for(N, vocabulary=400, seed=1, ignored=0.3)
    counter = CompileCounterWithBackend("aot_eager")

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        at = slice(0, hidden.shape[0])
        return fastkd.fused_linear_kd_loss(
            hidden.tanh(), weight, _sliced(inputs.teacher, at), labels[at], student_bias=bias,
            chunk_size=4, backend=backend, **options,
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    once = 0
    for rows in (12, 7, 18, 2):
        at = slice(0, rows)
        _close_to_eager(_outcome(step, inputs, at), _outcome(compiled, inputs, at), dtype)
        once = once or counter.frame_count
    assert counter.frame_count == once


@pytest.mark.heavy_with(backend="portable")
@pytest.mark.heavy_with(form="linear", dtype=torch.float16)
@pytest.mark.heavy_with(form="geometric", dtype=torch.float32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["linear", "geometric"])
@pytest.mark.usefixtures("fresh_compiler")
def test_kd_loss_against_a_teacher_in_chunks_is_one_graph(
    backend: str, form: str, dtype: torch.dtype
) -> None:
    inputs = problem(form, dtype=dtype)
    dense = Problem(logits(N, V + 3, seed=8, dtype=dtype), inputs.weight, None, inputs.teacher)

    def step(student: Tensor, weight: Tensor) -> Tensor:
        loss = fastkd.kd_loss(
            student * 1.0, inputs.teacher, backend=backend, vocab_size=V - 1, temperature=2.0
        )
        return loss + 0.0 * weight.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    at = slice(0, N)
    _close_to_eager(_outcome(step, dense, at), _outcome(compiled, dense, at), dtype)


@pytest.mark.heavy_with(backend="portable")
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_sparse_teacher_in_one_graph(backend: str, tail: str) -> None:
    inputs = problem("dense")
    sparse = fastkd.TopK.from_logits(inputs.teacher, 7, tail=tail)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        teacher = fastkd.TopK(sparse.ids, sparse.logprobs, tail, sparse.tail_logprob)
        return fastkd.fused_linear_kd_loss(hidden, weight, teacher, chunk_size=7, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    at = slice(0, N)
    _close_to_eager(_outcome(step, inputs, at), _outcome(compiled, inputs, at), torch.float32)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.heavy_with(backend="portable")  # the graph is the same
def test_a_step_of_training_under_inductor(backend: str) -> None:
    """Body, head, module and backward in one graph, under autocast, with a trainable head and a frozen bias."""
    inputs = problem(dtype=torch.float32, bias=True)
    loss_function = fastkd.FusedLinearKDLoss(divergence="jsd", temperature=2.0, backend=backend)
    body = torch.nn.Linear(H, H)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_function(body(hidden), weight, inputs.teacher, student_bias=bias.detach())

    outcomes = []
    for run in (step, torch.compile(step, fullgraph=True)):
        hidden, weight, bias = inputs.leaves()
        # Without SIMD code, which is irrelevant here and slow to compile.
        with torch._inductor.config.patch({"cpp.simdlen": 1}):
            loss = run(hidden, weight, bias)
            wanted = (hidden, weight, *body.parameters())
            outcomes.append([loss.detach(), *torch.autograd.grad(loss, wanted)])
    _close_to_eager(*outcomes, torch.bfloat16)


@pytest.mark.heavy_with(backend="portable")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_parts_and_dropped_rows(backend: str) -> None:
    inputs = problem()
    labels = labels_for(N, vocabulary=V, seed=1, ignored=0.5)

    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
        return fastkd.fused_linear_kd_loss(
            hidden, weight, inputs.teacher, labels, alpha=0.5, return_parts=True, backend=backend
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for these in (labels, torch.full_like(labels, -100)):
        outcomes = []
        for run in (step, compiled):
            leaves = inputs.leaves()
            loss, parts = run(*leaves, these)
            assert not any(part.requires_grad for part in parts)
            outcomes.append((loss.detach(), *parts, *torch.autograd.grad(loss, leaves)))
        torch.testing.assert_close(*outcomes)


@pytest.mark.heavy_with(backend="portable")
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_call_raises_what_an_eager_one_does(backend: str) -> None:
    inputs = problem("arithmetic")

    def compiled(**options: Any) -> Tensor:
        torch.compiler.reset()
        run = torch.compile(fastkd.fused_linear_kd_loss, backend="aot_eager")
        return run(inputs.hidden, inputs.weight, inputs.teacher, backend=backend, **options)

    # The compiler wraps the message of an error in a custom op.
    with pytest.raises(Exception, match="memory_budget must be at least"):
        compiled(memory_budget=1000)
    with pytest.raises(Exception, match="chunk_size must be positive, got 0"):
        compiled(chunk_size=0)
    with pytest.raises(ValueError, match="compares logits"):
        compiled(divergence="squared_error")
    with pytest.raises(ValueError, match="logits_dtype must be torch.float32 or the dtype of"):
        compiled(logits_dtype=torch.bfloat16)


@pytest.mark.heavy_with(backend="portable")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("form", ["linear with bias", "arithmetic"])
@pytest.mark.pairwise(each="backend")
def test_opcheck(
    backend: str, form: str, deferred: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "arithmetic":  # numbers that change from step to step
        monkeypatch.setattr("fastkd.engine.graphs._is_constant", lambda _: False)
    inputs = problem(form, dtype=dtype, bias=True, rows=9, teacher_rows=9)
    options = Options(resolve("jsd"), vocab_size=9)
    numbers = Numbers.of(alpha=0.5, temperature=2.0, teacher_temperature=2.0, num_items=2)
    want = Want(student_gradient=True, parts=True, deferred=deferred)
    labels = labels_for(N, vocabulary=9, seed=1, ignored=0.3)
    (tensors, spec), weights = flatten(inputs.teacher), weights_of(inputs.teacher)
    arguments = (
        *inputs.leaves(), tensors, labels, torch.rand(N), *(None,) * 5, backend, spec, 4, None,
        len(weights), [True] * 3, torch.float32, *GraphOptions.of(options, want, numbers, weights),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastkd.kd_chunks.default, arguments)


def test_a_tied_head(backend: str) -> None:
    inputs = problem()
    hidden, weight = inputs.leaves()
    ids = torch.arange(N)

    def run(loss: Any) -> Tensor:
        weight.grad = None
        loss(weight[ids] + inputs.hidden, weight).backward()
        return weight.grad

    tied = run(lambda h, w: fastkd.fused_linear_kd_loss(h, w, inputs.teacher, backend=backend))
    dense = run(lambda h, w: fastkd.kd_loss(h @ w.T, inputs.teacher, backend=backend))
    torch.testing.assert_close(tied, dense)
    assert hidden.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_dropped_rows_are_not_read(backend: str, form: str) -> None:
    inputs = problem(form)
    labels = labels_for(N, vocabulary=V, seed=5, ignored=0.4)
    dropped = labels == -100
    poisoned = inputs._replace(hidden=inputs.hidden.masked_fill(dropped.unsqueeze(-1), torch.nan))

    def gradients(p: Problem) -> tuple[Tensor, ...]:
        leaves = p.leaves()
        loss = fastkd.fused_linear_kd_loss(
            *leaves, p.teacher, labels, backend=backend, chunk_size=4
        )
        return (loss, *torch.autograd.grad(loss, leaves))

    for clean, dirty in zip(gradients(inputs), gradients(poisoned), strict=True):
        assert torch.equal(clean, dirty)
    assert not gradients(poisoned)[1][dropped].any()


@pytest.mark.parametrize("lead", [(N,), (0,), (2, 0)])
def test_a_batch_without_a_counted_row_has_loss_0(backend: str, lead: tuple[int, ...]) -> None:
    inputs = problem("linear", *lead)
    leaves = inputs.leaves()
    labels = torch.full(lead, -100)
    loss = fastkd.fused_linear_kd_loss(*leaves, inputs.teacher, labels, alpha=0.5, backend=backend)
    assert loss == 0
    loss.backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_micro_batches_add_up(backend: str) -> None:
    inputs = problem()
    labels = labels_for(N, vocabulary=V, seed=6, ignored=0.3)
    items = int((labels != -100).sum())

    def run(parts: Iterator[slice]) -> list[Tensor]:
        leaves = inputs.leaves()
        for part in parts:
            teacher = fastkd.LinearTeacher(inputs.teacher.hidden[part], inputs.teacher.weight)
            fastkd.fused_linear_kd_loss(
                leaves[0][part], leaves[1], teacher, labels[part], num_items=items, backend=backend
            ).backward()
        return [leaf.grad for leaf in leaves]

    whole, rows = run(iter([slice(0, N)])), run(slice(i, i + 1) for i in range(N))
    for a, b in zip(whole, rows, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast(backend: str) -> None:
    inputs = problem()
    leaves = inputs.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastkd.fused_linear_kd_loss(
            *leaves, inputs.teacher, backend=backend, chunk_size=7, reduction="none"
        )
    assert loss.dtype == torch.float32
    loss.mean().backward()  # outside of autocast: backward recomputes the logits there
    half = Problem(
        *(x.bfloat16() for x in inputs[:2]),
        None,
        fastkd.LinearTeacher(inputs.teacher.hidden.bfloat16(), inputs.teacher.weight.bfloat16()),
    )
    exact = composed(half, torch.float64, None, None)
    for leaf, name in zip(leaves, ("hidden", "weight"), strict=True):
        assert leaf.grad.dtype == torch.float32
        assert error(leaf.grad, exact[name]) < 2**-7


def test_autocast_leaves_float64_alone() -> None:
    inputs = problem("dense", dtype=torch.float64)
    mask = torch.arange(N) % 3 > 0
    exact = composed(inputs, torch.float64, None, None, mask=mask)
    leaves = inputs.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastkd.fused_linear_kd_loss(*leaves, inputs.teacher, mask=mask)
    assert error(loss.detach(), exact["loss"]) < 1e-14
    assert error(torch.autograd.grad(loss, leaves)[1], exact["weight"]) < 1e-14
    with pytest.raises(ValueError, match="logits_dtype must be torch.float64"):
        fastkd.fused_linear_kd_loss(*leaves, inputs.teacher, logits_dtype=torch.float32)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("changed", ["labels", "weight", "temperature"])
def test_rows_changed_before_the_backward_raise(changed: str, reduction: str) -> None:
    inputs = problem()
    rows: dict[str, Tensor] = {
        "labels": torch.zeros(N, dtype=torch.int64),
        "weight": torch.ones(N),
        "temperature": torch.ones(N),
    }
    hidden, weight = inputs.leaves()
    fused = fastkd.fused_linear_kd_loss(hidden, weight, inputs.teacher, **rows, reduction=reduction)
    half = logits(N, V, seed=8, dtype=torch.float16).requires_grad_()
    dense = fastkd.kd_loss(half, logits(N, V, seed=9), **rows, reduction=reduction)
    rows[changed].fill_(3)
    if reduction == "mean":  # the gradients are already saved
        fused.backward()
    for loss in (fused, dense) if reduction == "none" else (dense,):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


def test_a_dropped_row_without_dimensions(backend: str) -> None:
    inputs = problem()
    hidden, weight = inputs.leaves()
    teacher = fastkd.LinearTeacher(inputs.teacher.hidden[0], inputs.teacher.weight)
    loss = fastkd.fused_linear_kd_loss(
        hidden[0], weight, teacher, mask=torch.tensor(False), reduction="none", backend=backend
    )
    loss.backward(torch.tensor(torch.nan))
    assert not weight.grad.any() and not hidden.grad.any()
    student = logits(V, seed=8).requires_grad_()
    loss = fastkd.kd_loss(
        student, student.detach() + 1, mask=torch.tensor(False), reduction="none", backend=backend
    )
    loss.backward(torch.tensor(torch.nan))
    assert not student.grad.any()


def test_the_requested_backend_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = ran_on(monkeypatch, "portable", "cpu")
    inputs = problem()
    fastkd.fused_linear_kd_loss(
        inputs.hidden, inputs.weight, inputs.teacher, backend=backend, chunk_size=10
    )
    assert ran == [backend] * 2
    ran.clear()
    fastkd.fused_linear_kd_loss(inputs.hidden, inputs.weight, inputs.teacher)
    assert ran == ["cpu"]


def test_reruns_are_bitwise_equal(backend: str) -> None:
    def run() -> list[Tensor]:
        inputs = problem("arithmetic", bias=True)
        leaves = inputs.leaves()
        loss = fastkd.fused_linear_kd_loss(
            *leaves[:2], inputs.teacher, student_bias=leaves[2], chunk_size=7, backend=backend
        )
        return [loss, *torch.autograd.grad(loss, leaves)]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


class _LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any new tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        inputs = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, Tensor)}
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_holds_all_logits(
    form: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, chunk = 256, 16
    inputs = problem(form, rows, rows=1_000, teacher_rows=1_000)
    leaves = inputs.leaves()
    asked = []
    monkeypatch.setattr(
        cpu,
        "empty",
        lambda shape, *a, take=cpu.empty, **named: (
            asked.append(math.prod(shape)) or take(shape, *a, **named)
        ),
    )
    with _LargestTensor() as largest:
        loss = fastkd.fused_linear_kd_loss(
            *leaves, inputs.teacher, chunk_size=chunk, reduction=reduction
        )
        loss.sum().backward()
    assert asked and max(asked) == chunk * 1_000
    assert largest.elements <= max(chunk * 1_000, 1_000 * H, rows * H)


PEAK = """
import ctypes, json, os, sys
from pathlib import Path
import torch, fastkd
from fastkd import _C

def status(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field + ":"))

# Each case is measured in a forked process, which has memory of its own and need not import torch again.
rows_of_each, vocabulary, form, budget = json.loads(sys.argv[1])
for rows in rows_of_each:
    child = os.fork()
    if not child:
        break
    assert os.waitpid(child, 0)[1] == 0
else:
    sys.exit()
hidden, weight, head = torch.randn(rows, 32), torch.randn(vocabulary, 32), torch.randn(vocabulary, 32)
def teacher(n):
    linear = fastkd.LinearTeacher(hidden[:n] + 1, head)
    return {"linear": linear, "ensemble": fastkd.Ensemble([linear, linear]),
            "topk": fastkd.TopK(torch.arange(64).expand(n, 64), torch.full((n, 64), -5.0))}[form]
def step(n):
    h, w = hidden[:n].clone().requires_grad_(), weight.clone().requires_grad_()
    t = teacher(n)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    fastkd.fused_linear_kd_loss(h, w, t, memory_budget=budget, divergence="jsd").backward()
    return status("VmHWM") - before - h.grad.nbytes - w.grad.nbytes
step(8)
_C.release_idle_outputs()
ctypes.CDLL(None).malloc_trim(0)
print(step(rows), flush=True)
"""


# A quarter of the rows and all rows; a real vocabulary and the widest one.
@pytest.mark.parametrize(
    ("vocabulary", "rows"),
    [
        pytest.param(49_152, (256, 1024), id="49k"),
        pytest.param(262_144, (256,), id="262k", marks=pytest.mark.heavy),
    ],
)
@pytest.mark.parametrize(
    "form", [pytest.param("linear", marks=pytest.mark.heavy), "ensemble", "topk"]
)
def test_peak_memory_is_the_budget(vocabulary: int, rows: tuple[int, ...], form: str) -> None:
    budget = 128 << 20
    case = json.dumps([rows, vocabulary, form, budget])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, case], capture_output=True, text=True, check=True
    )
    for count, peak in zip(rows, map(int, done.stdout.split()), strict=True):
        assert peak <= 1.1 * budget, f"{count} rows: {peak / 2**20:.0f} MiB"


@pytest.fixture
def products_like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Emulate low-precision products into float32, which torch has only on a GPU; yield the names of the called
    ones."""
    calls: list[str] = []

    def mm(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
        calls.append("mm")
        assert a.dtype == b.dtype != dtype and (out is None or out.dtype == dtype)
        return torch.mm(a.to(dtype), b.to(dtype), out=out)

    def addmm(
        total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor, **_: Any
    ) -> Tensor:
        calls.append("addmm")
        assert a.dtype == b.dtype != dtype == out.dtype == total.dtype
        return torch.addmm(total, a.to(dtype), b.to(dtype), out=out)

    low = (torch.bfloat16, torch.float16)
    monkeypatch.setattr(matmul, "_widens", lambda operand: operand.dtype in low)
    monkeypatch.setattr(matmul.bf16, "available", lambda: False)  # products of a CPU with AMX
    forget = matmul._accumulates.cache_clear
    forget()
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, function in (("mm.dtype", mm), ("mm.dtype_out", mm), ("addmm.dtype_out", addmm)):
            library.impl(name, function, "CPU")
        yield calls
    forget()


@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_a_gpu(
    products_like_a_gpu: list[str],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    accumulates: bool,
) -> None:
    """Chunks match one float64 computation, with one product each for logits, hidden states and weight."""
    if not accumulates:
        monkeypatch.setattr(matmul, "_accumulates", lambda device: False)
    torch.manual_seed(0)
    hidden, weight = torch.randn(90, 24).to(dtype), torch.randn(700, 24).to(dtype)
    teacher = fastkd.LinearTeacher(hidden.flip(0), weight.flip(0))
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = fastkd.fused_linear_kd_loss(*leaves, teacher, divergence="jsd", chunk_size=30)
    actual = torch.autograd.grad(loss, leaves)
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    s, t = wide[0] @ wide[1].T, (hidden.flip(0).double() @ weight.flip(0).double().T)
    exact = torch.autograd.grad(fastkd.kd_loss(s, t, divergence="jsd", backend="reference"), wide)
    for value, true in zip(actual, exact, strict=True):
        error = (value.double() - true).norm() / true.norm()
        assert error < torch.finfo(dtype).eps
    # Three chunks: the first is not yet a sum, and one call tests whether torch supports the product.
    assert products_like_a_gpu.count("addmm") == (3 if accumulates else 0)


def test_memory_plan() -> None:
    plan = fastkd.memory_plan(8192, 128_256, 4096, dtype=torch.bfloat16, device="cuda")
    assert plan.peak == plan.logits + plan.accumulator + plan.workspace
    assert plan.accumulator == 4 * 128_256 * 4096
    assert plan.chunks == -(-8192 // plan.chunk_size)
    assert plan.logits == plan.chunk_size * 128_256 * 8
    assert (plan.chunk_size, plan.chunks) == (2048, 4) and plan.peak <= 4 << 30
    exact = fastkd.memory_plan(1000, 1000, 64, chunk_size=10)
    assert (exact.chunk_size, exact.chunks) == (10, 100)
    whole = fastkd.memory_plan(100, 1000, 64)
    assert (whole.chunk_size, whole.chunks) == (100, 1)
    frozen = fastkd.memory_plan(100, 1000, 64, dtype=torch.bfloat16, weight_gradient=False)
    assert frozen.accumulator == 0
    sparse, dense = (fastkd.memory_plan(100, 1000, 64, teacher=form) for form in ("topk", "dense"))
    assert sparse.teacher < dense.teacher and sparse.logits < whole.logits
    wrong_arguments: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"teacher": "x"},
            ValueError,
            "teacher must be one of dense, linear, topk, ensemble, none; got 'x'",
        ),
        ({"teacher": torch.ones(2)}, TypeError, "teacher must be the name of a form, got Tensor"),
        ({"rows": -5}, ValueError, "rows must be positive, got -5"),
        ({"vocab_size": 2.0}, TypeError, "vocab_size must be an int, got float"),
        (
            {"dtype": "bfloat16"},
            TypeError,
            "dtype must be a floating-point torch.dtype, got 'bfloat16'",
        ),
        (
            {"logits_dtype": torch.float16},
            ValueError,
            "logits_dtype must be torch.float32 or torch.float32",
        ),
    ]
    for wrong, kind, message in wrong_arguments:
        arguments: dict[str, Any] = {"rows": 1, "vocab_size": 1, "hidden_size": 1} | wrong
        with pytest.raises(kind, match=message):
            fastkd.memory_plan(**arguments)
    on_device = fastkd.memory_plan(9000, 9000, 64, device=torch.device("cpu"))
    assert on_device == fastkd.memory_plan(9000, 9000, 64)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_hidden": None}, TypeError, "student_hidden must be a tensor, got NoneType"),
    ({"student_weight": torch.ones(V, H, dtype=torch.int64)}, TypeError,
     "student_weight must be float32, bfloat16, float16 or float64, got torch.int64"),
    ({"student_weight": torch.ones(V, H + 1)}, ValueError,
     f"student_weight must be [V, {H}], the width of hidden; got ({V}, {H + 1})"),
    ({"student_weight": torch.ones(V, H).bfloat16()}, TypeError,
     "student_weight must be torch.float32, the dtype of student_hidden; got torch.bfloat16"),
    ({"student_weight": torch.ones(V, H, device="meta")}, ValueError,
     "student_weight must be on cpu, the device of student_hidden; got meta"),
    ({"student_bias": torch.ones(V + 1)}, ValueError,
     f"student_bias must be [{V}], one number per row of weight; got ({V + 1},)"),
    ({"student_weight": torch.ones(V + 4, H)}, ValueError,
     f"student_weight has {V + 4} columns, teacher has {V} columns; if the models have one tokenizer and the extra "
     f"columns are padding, pass vocab_size (at most {V}), the number of real tokens"),
    ({"teacher": torch.ones(N + 1, V)}, ValueError,
     f"teacher must have the leading shape of student_hidden, ({N},); got ({N + 1},)"),
    ({"teacher": torch.ones(N, V, requires_grad=True)}, ValueError,
     "teacher requires grad, and fused_linear_kd_loss has no gradient for it; detach it"),
    ({"teacher": fastkd.LinearTeacher(torch.ones(N, 3), torch.ones(V, 3, requires_grad=True))}, ValueError,
     "teacher.weight requires grad, and only a teacher of dense logits gets a gradient; detach it"),
    ({"teacher": fastkd.Ensemble([torch.ones(N, V), torch.ones(N, V + 1)])}, ValueError,
     f"student_weight has {V} columns, teacher.teachers[0] has {V} columns, teacher.teachers[1] has {V + 1} columns; "
     "if the models have one tokenizer and the extra columns are padding, pass vocab_size (at most "
     f"{V}), the number of real tokens"),
    ({"teacher": fastkd.Ensemble([torch.ones(N, V)]), "divergence": "squared_error"}, ValueError,
     "the divergence 'squared_error' compares logits, and the arithmetic mean of an Ensemble is a mean of "
     "probabilities; use mean='geometric'"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be positive, got 0"),
    ({"chunk_size": 2.0}, TypeError, "chunk_size must be an int or None, got float"),
    ({"memory_budget": -1}, ValueError, "memory_budget must be positive, got -1"),
    ({"memory_budget": "1G"}, TypeError, "memory_budget must be an int or None, got str"),
    ({"logits_dtype": torch.bfloat16}, ValueError,
     "logits_dtype must be torch.float32 or the dtype of student_hidden, torch.float32; got torch.bfloat16"),
    ({"inplace": True}, TypeError, "fused_linear_kd_loss has no option inplace"),
    ({"temprature": 2.0}, TypeError, "fused_linear_kd_loss has no option temprature"),
    ({"reduction": "batch"}, ValueError, "reduction must be one of none, sum, mean, batchmean; got 'batch'"),
    (
        {"return_parts": 1}, TypeError,
        "return_parts must be True, False, or a collection of names such as ('acceptance',); got 1",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "kind", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments(bad: dict[str, Any], kind: type[Exception], message: str) -> None:
    inputs = problem()
    arguments = {
        "student_hidden": inputs.hidden,
        "student_weight": inputs.weight,
        "teacher": inputs.teacher,
        **bad,
    }
    with pytest.raises(kind) as raised:
        fastkd.fused_linear_kd_loss(**arguments)
    assert str(raised.value) == message


def test_a_budget_below_one_row() -> None:
    inputs = problem()
    with pytest.raises(
        ValueError, match=r"memory_budget must be at least \d+ bytes, which one row takes; got 1000"
    ):
        fastkd.fused_linear_kd_loss(
            inputs.hidden, inputs.weight, inputs.teacher, memory_budget=1000
        )


def test_bad_teachers() -> None:
    states, head = torch.ones(N, 3), torch.ones(V, 3)
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: fastkd.LinearTeacher(states, torch.ones(V, 4)), ValueError,
         f"the teacher's weight must be [V, 3], the width of hidden; got ({V}, 4)"),
        (lambda: fastkd.LinearTeacher(states, head, torch.ones(3)), ValueError,
         f"the teacher's bias must be [{V}], one number per row of weight; got (3,)"),
        (lambda: fastkd.LinearTeacher([1], head), TypeError, "the teacher's hidden must be a tensor, got list"),
        (lambda: fastkd.Ensemble([]), ValueError, "teachers must contain at least one teacher, got none"),
        (lambda: fastkd.Ensemble(states), TypeError, "teachers must be a list of teachers, got Tensor"),
        (lambda: fastkd.Ensemble([None]), TypeError,
         "teachers[0] must be dense logits, a LinearTeacher or a TopK, got NoneType"),
        (lambda: fastkd.Ensemble([states], [1, 2]), ValueError, "weights must have one number per teacher, 1; got 2"),
        (lambda: fastkd.Ensemble([states], [-1]), ValueError,
         "weights[0] must be finite and not negative, got -1"),
        (lambda: fastkd.Ensemble([states], [0]), ValueError,
         "weights must have a positive, finite sum, got [0]"),
        (lambda: fastkd.Ensemble([states], mean="median"), ValueError,
         "mean must be one of arithmetic, geometric; got 'median'"),
    ]  # fmt: skip
    for make, kind, message in cases:
        with pytest.raises(kind) as raised:
            make()
        assert str(raised.value) == message


def test_every_form_of_teacher_gives_the_same_training(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vocabulary, steps = 500, 20
    ids = torch.randint(vocabulary, (steps, 32))
    states = torch.randn(vocabulary, WIDER)
    head = torch.randn(vocabulary, WIDER) / WIDER**0.5
    teacher = fastkd.LinearTeacher(states[ids], head)
    with CacheWriter(
        tmp_path / "cache", kind="hidden", vocab_size=vocabulary, weight=head
    ) as writer:
        for sequence in ids:
            writer.append(sequence, hidden=states[sequence])
    cache = TeacherCache(tmp_path / "cache")

    def curve(form: str) -> list[float]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            torch.nn.Embedding(vocabulary, H), torch.nn.Linear(H, H), torch.nn.Tanh()
        )
        model.append(torch.nn.Linear(H, vocabulary, bias=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
        losses = []
        for step in range(steps):
            hidden, weight = model[:3](ids[step]), model[3].weight
            linear = fastkd.LinearTeacher(teacher.hidden[step], head)
            dense = linear.hidden @ head.T
            if form == "dense":
                loss = fastkd.kd_loss(hidden @ weight.T, dense, backend=backend)
            elif form == "topk":
                sparse = fastkd.TopK.from_logits(dense, vocabulary)
                loss = fastkd.kd_loss(hidden @ weight.T, sparse, backend=backend)
            else:
                target = linear if form == "linear" else cache[step].teacher
                loss = fastkd.fused_linear_kd_loss(
                    hidden, weight, target, chunk_size=7, backend=backend
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    dense = curve("dense")
    assert dense[-1] < 0.9 * dense[0]
    for form in ("linear", "cache", "topk"):
        assert curve(form) == pytest.approx(dense, rel=1e-4), form


# ---- kd_loss against teachers that are made into logits


@pytest.mark.parametrize("form", ["linear", "linear with bias", "arithmetic", "geometric"])
@pytest.mark.parametrize("inplace", [False, True])
def test_kd_loss(backend: str, form: str, inplace: bool) -> None:
    inputs = problem(form, 3, 5)
    student = logits(3, 6, V, seed=8).requires_grad_()
    labels = labels_for(3, 5, vocabulary=V, seed=9, ignored=0.3)
    options: dict[str, Any] = {"alpha": 0.4, "temperature": 2.0, "divergence": "jsd"}
    produced = student * 1
    loss = fastkd.kd_loss(
        produced[:, :-1], inputs.teacher, labels, backend=backend, inplace=inplace, **options
    )
    loss.backward()
    dense = teacher_logits(inputs.teacher, torch.float64, V, options)
    exact = compose(student.detach()[:, :-1], dense, labels, terms=False, **options)
    assert error(loss.detach(), exact.loss) < 1e-6
    assert error(student.grad[:, :-1], exact.student_gradient) < 1e-5
    assert not student.grad[:, -1].any()
    assert (produced._version > 0) == inplace


def test_kd_loss_computes_float16_gradients_in_the_backward(backend: str) -> None:
    inputs = problem()
    student = logits(N, V, seed=8, dtype=torch.float16).requires_grad_()
    loss = fastkd.kd_loss(student, inputs.teacher, backend=backend)
    loss.backward(torch.tensor(2.0**16))
    exact = compose(
        student.detach(), teacher_logits(inputs.teacher, torch.float64, V, {}), terms=False
    )
    assert error(student.grad, 2**16 * exact.student_gradient) < 2**-10


def test_an_ensemble_of_one_is_its_teacher(backend: str) -> None:
    inputs = problem("dense")
    student = logits(N, V, seed=8)
    alone = fastkd.kd_loss(student, inputs.teacher, backend=backend, reduction="none")
    for mean in ("arithmetic", "geometric"):
        ensemble = fastkd.Ensemble([inputs.teacher, inputs.teacher + 5], [1, 3], mean)
        together = fastkd.kd_loss(student, ensemble, backend=backend, reduction="none")
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_the_mean_of_losses_has_the_gradient_of_the_loss_to_the_mean(backend: str) -> None:
    # For forward KL the arithmetic mean of probabilities, for reverse KL the geometric one.
    teachers = [logits(N, V, seed=seed) for seed in (1, 2, 3)]
    for divergence, mean in (("forward_kl", "arithmetic"), ("reverse_kl", "geometric")):
        student = logits(N, V, seed=8).requires_grad_()
        apart = (
            sum(
                fastkd.kd_loss(student, t, divergence=divergence, backend=backend) for t in teachers
            )
            / 3
        )
        together = fastkd.kd_loss(
            student, fastkd.Ensemble(teachers, mean=mean), divergence=divergence, backend=backend
        )
        (a,), (b,) = (torch.autograd.grad(loss, student) for loss in (apart, together))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
        assert apart > together


def test_modules() -> None:
    inputs = problem(bias=True)
    module = fastkd.FusedLinearKDLoss(divergence="jsd", chunk_size=7)
    assert not list(module.parameters())
    assert "divergence='jsd', chunk_size=7" in repr(module)
    value = module(inputs.hidden, inputs.weight, inputs.teacher, student_bias=inputs.bias)
    assert value == fastkd.fused_linear_kd_loss(
        inputs.hidden,
        inputs.weight,
        inputs.teacher,
        student_bias=inputs.bias,
        divergence="jsd",
        chunk_size=7,
    )
    fastkd.FusedLinearKDLoss(logits_dtype=torch.bfloat16, memory_budget=1 << 30)
    for options, message in (
        ({"chunk_size": 0}, "chunk_size must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"student_bias": inputs.bias}, "student_bias belongs to a batch"),
        ({"inplace": True}, "no option inplace"),
        (
            {"logits_dtype": "nonsense"},
            "logits_dtype must be a floating-point torch.dtype, got 'nonsense'",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            fastkd.FusedLinearKDLoss(**options)
