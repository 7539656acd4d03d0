"""What processes do in tests/parallel/test_parallel.py: the checks of a whole row, with its columns spread over them.

The checks call kd_loss with whole logits. Here it is replaced by one that takes this process's columns out of them, and
puts the gradients of all processes together again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import test_linear
import test_topk
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fastkd
from fastkd.parallel import shards
from support import accuracy

REAL = fastkd.kd_loss


class Columns(torch.autograd.Function):
    """Some columns of logits, or rows of a head; backward gathers the gradient from all processes."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, columns: slice, group: Any, axis: int = -1) -> Tensor:
        """Select this process's part."""
        ctx.group, ctx.shape = group, whole.shape
        ctx.at = (*[slice(None)] * (axis % whole.dim()), columns)
        return whole[ctx.at].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gather the gradients of all processes."""
        (gradient,) = gradients
        whole = gradient.new_zeros(ctx.shape)
        whole[ctx.at] = gradient
        dist.all_reduce(whole, group=ctx.group)
        return whole, None, None, None


def columns_of(width: int, shares: tuple[float, ...], rank: int) -> slice:
    """The slice of a process, for the given share of each."""
    bounds = [round(width * sum(shares[:k]) / sum(shares)) for k in range(len(shares) + 1)]
    return slice(bounds[rank], bounds[rank + 1])


def _same_everywhere(value: Tensor, group: Any) -> None:
    """Whether two tensors have the same bits."""
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, value.detach(), group=group)
    for other in everywhere:
        assert torch.equal(other.nan_to_num(7e7), everywhere[0].nan_to_num(7e7))


@contextmanager
def spread(group: Any, shares: tuple[float, ...], form: str) -> Iterator[None]:
    """kd_loss over shards: with "plain" tensors, "dtensor", a "whole teacher", or one "replicated" DTensor."""
    rank = dist.get_rank(group)

    def kd_loss(student: Tensor, teacher: Any, *arguments: Any, **options: Any) -> Any:
        columns = columns_of(student.shape[-1], shares, rank)
        dense = isinstance(teacher, Tensor)
        if form.startswith("dtensor"):
            mesh = DeviceMesh.from_group(group, "cpu")
            s_at, t_at = {
                "dtensor": (Shard(-1), Shard(-1)),
                "dtensor, whole teacher": (Shard(-1), Replicate()),
                "dtensor, whole student": (Replicate(), Shard(-1)),
            }[form]
            student = _distributed(student, mesh, s_at)
            if dense:
                teacher = _distributed(teacher, mesh, t_at)
        else:
            student = Columns.apply(student, columns, group)
            if dense and form != "whole teacher":
                teacher = Columns.apply(teacher, columns, group)
            options["process_group"] = group
        result = REAL(student, teacher, *arguments, **options)
        loss = result[0] if isinstance(result, tuple) else result
        _same_everywhere(loss, group)
        return result

    with patch.object(fastkd, "kd_loss", kd_loss), patch.object(test_topk, "kd_loss", kd_loss):
        yield


def _distributed(whole: Tensor, mesh: DeviceMesh, placement: Any) -> DTensor:
    """A DTensor whose gradient goes to the whole tensor."""
    if isinstance(placement, Replicate):
        return DTensor.from_local(whole, mesh, [placement], run_check=False)
    return DTensor.from_local(whole, mesh, [Replicate()], run_check=False).redistribute(
        placements=[Shard(whole.dim() - 1)]
    )


def _part_of_teacher(teacher: Any, columns: slice) -> Any:
    if isinstance(teacher, fastkd.Ensemble):
        members = [_part_of_teacher(member, columns) for member in teacher.teachers]
        return fastkd.Ensemble(members, teacher.weights, teacher.mean)
    if isinstance(teacher, fastkd.LinearTeacher):
        bias = None if teacher.bias is None else teacher.bias[columns]
        return fastkd.LinearTeacher(teacher.hidden, teacher.weight[columns], bias)
    return teacher if isinstance(teacher, fastkd.TopK) else teacher[..., columns]


class Part(torch.autograd.Function):
    """This process's rows; backward gathers the gradients of all rows."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, axis: int, group: Any) -> Tensor:
        """An equal part for each process."""
        ctx.axis, ctx.group = axis, group
        return whole.chunk(dist.get_world_size(group), axis)[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gather the gradients of all rows."""
        (gradient,) = gradients
        parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size(ctx.group))]
        dist.all_gather(parts, gradient.contiguous(), group=ctx.group)
        return torch.cat(parts, ctx.axis), None, None


@contextmanager
def spread_head(group: Any, shares: tuple[float, ...], form: str) -> Iterator[None]:
    """fused_linear_kd_loss over shards: "plain", "whole teacher", "dtensor", or "sequence" parallel (along axis 0)."""
    rank, real = dist.get_rank(group), fastkd.fused_linear_kd_loss

    def loss_of(
        hidden: Tensor, weight: Tensor, teacher: Any, *arguments: Any, **options: Any
    ) -> Any:
        columns = columns_of(weight.shape[0], shares, rank)
        bias = options.pop("student_bias", None)
        if form.startswith("dtensor"):
            mesh = DeviceMesh.from_group(group, "cpu")
            hidden = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)
            if form == "dtensor, sequence":
                hidden = hidden.redistribute(placements=[Shard(0)])
            weight, bias = (
                None
                if value is None
                else DTensor.from_local(value, mesh, [Replicate()], run_check=False).redistribute(
                    placements=[Shard(0)]
                )
                for value in (weight, bias)
            )
        else:
            weight = Columns.apply(weight, columns, group, 0)
            bias = None if bias is None else Columns.apply(bias, columns, group, 0)
            options["process_group"] = group
            if form == "sequence":
                hidden = Part.apply(hidden, 0, group)
                options["sequence_dim"] = 0
        if form != "whole teacher":
            teacher = _part_of_teacher(teacher, columns)
        result = real(hidden, weight, teacher, *arguments, student_bias=bias, **options)
        _same_everywhere(result[0], group)
        return result

    with patch.object(fastkd, "fused_linear_kd_loss", loss_of):
        yield


class _Equal:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class _Unchecked:
    """Return placeholder bars for a case that another process checks, because the oracle takes longer than the loss."""

    parts = (1.0, 1.0, 1.0)

    def __getattr__(self, name: str) -> Any:
        return 1.0 if name != "exact" else self

    counted = _Equal()


def _by_one(check: Any, backend: str, cases: list[dict[str, Any]], group: Any) -> int:
    """Make every call in every process, and check a share of them in each."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    checked = 0
    device = (
        "cpu"
        if backend in ("cpu", "portable", "reference")
        else f"cuda:{torch.cuda.current_device()}"
    )
    for number, case in enumerate(cases):
        case = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.items()}
        if number % size == rank:
            check(backend, **case)
            checked += 1
            continue
        skipped = {"assert_within": lambda *_: None}
        with (
            patch.multiple(accuracy, bars=lambda *_, **__: _Unchecked(), **skipped),
            patch.multiple(
                test_topk,
                compose_topk=lambda *_, **__: _Unchecked(),
                value_bar=lambda *_: 1.0,
                gradient_bar=lambda *_: 1.0,
                **skipped,
            ),
        ):
            check(backend, **case)
    return checked


def dense(
    group: Any, shares: tuple[float, ...], form: str, backend: str, cases: list[dict[str, Any]]
) -> int:
    """Run accuracy.check on each case; return how many this process has checked."""
    with spread(group, shares, form):
        return _by_one(accuracy.check, backend, cases, group)


def sparse(
    group: Any, shares: tuple[float, ...], form: str, backend: str, cases: list[dict[str, Any]]
) -> int:
    """Run test_topk.check_topk on each case; return how many this process has checked."""
    with spread(group, shares, form):
        return _by_one(test_topk.check_topk, backend, cases, group)


def linear(
    group: Any, shares: tuple[float, ...], form: str, backend: str, cases: list[dict[str, Any]]
) -> int:
    """Run test_linear.check on each case, in every process."""
    with spread_head(group, shares, form):
        for case in cases:
            test_linear.check(backend, **case)
    return len(cases)


def bytes_exchanged(group: Any, vocabulary: int, arguments: dict[str, Any], k: int) -> int:
    """What this process sends and receives for a loss of 8 rows and its gradient, recorded around the collectives."""
    counted = 0

    def counting(real: Any) -> Any:
        def call(first: Tensor, *rest: Any, **options: Any) -> Any:
            nonlocal counted
            counted += first.nbytes
            return real(first, *rest, **options)

        return call

    names = (
        "all_gather_single", "all_gather_into_tensor", "all_reduce", "reduce_scatter_single",
        "reduce_scatter_tensor", "all_gather", "broadcast", "all_to_all_single", "send",
    )  # fmt: skip
    known = {name: counting(getattr(dist, name)) for name in names if hasattr(dist, name)}
    columns = columns_of(vocabulary, (1.0,) * dist.get_world_size(group), dist.get_rank(group))
    torch.manual_seed(0)
    student = torch.randn(8, vocabulary)[:, columns].requires_grad_()
    teacher: Any = torch.randn(8, vocabulary)
    teacher = fastkd.TopK.from_logits(teacher, k) if k else teacher[:, columns]
    with patch.multiple(dist, **known):
        REAL(student, teacher, process_group=group, **arguments).backward()
    return counted


def repeated(group: Any, divergence: str, backend: str) -> bool:
    """Whether two calls that are split into halves give the same bits as each other and as a call without halves."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(6, 4, 2000) for _ in range(2))
    columns = columns_of(2000, tuple(range(1, size + 1)), rank)
    results = []
    for half_bytes in (32 << 20, 1, 1):
        with patch.object(shards, "HALF_BYTES", half_bytes):
            leaf = student[..., columns].clone().requires_grad_()
            loss = REAL(
                leaf, teacher[..., columns], divergence=divergence, backend=backend,
                process_group=group, reduction="none",
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(loss, leaf, torch.linspace(-1, 1, 24).view(6, 4))
        results.append((loss.detach(), gradient))
    if backend in ("portable", "reference"):  # torch's sums depend on how many rows there are
        results = results[1:]
    return all(
        torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True)
    )


def compiled(group: Any) -> tuple[float, str]:
    """The difference between a compiled and an eager call, and the error of a graph without breaks."""
    columns = columns_of(64, (1.0,) * dist.get_world_size(group), dist.get_rank(group))
    torch.manual_seed(0)
    student, teacher = (torch.randn(4, 64)[:, columns] for _ in range(2))

    def loss_of(student: Tensor, teacher: Tensor) -> Tensor:
        return REAL(student * 2, teacher, process_group=group) * 3

    with_breaks, whole = (
        torch.compile(loss_of, backend="eager", fullgraph=fullgraph) for fullgraph in (False, True)
    )
    difference = float((with_breaks(student, teacher) - loss_of(student, teacher)).abs())
    torch._dynamo.reset()  # else it finds what it has compiled in parts
    try:
        whole(student, teacher)
    except torch._dynamo.exc.Unsupported as error:  # before any process calls another
        return difference, str(error)
    return difference, "nothing"


def measures(group: Any, shares: tuple[float, ...], backend: str, case: dict[str, Any]) -> None:
    """The measures of a shared vocabulary equal those of a whole one; naming the overlap raises on every process."""
    student, teacher, weight = case["student"], case["teacher"], case["weight"]
    columns = columns_of(student.shape[-1], shares, dist.get_rank(group))
    options: dict[str, Any] = {"return_parts": case["names"], "backend": backend}
    sparse = isinstance(teacher, fastkd.TopK)
    part = teacher if sparse else teacher[..., columns].clone()
    _, actual = REAL(student[..., columns].clone(), part, process_group=group, **options)
    _, wanted = REAL(student, teacher, **options)
    _, in_chunks = fastkd.fused_linear_kd_loss(
        student, weight[columns], part, process_group=group, chunk_size=2, **options
    )
    _, chunks_of_whole = fastkd.fused_linear_kd_loss(student, weight, teacher, **options)
    for name in case["names"]:
        for value, exact in (
            (getattr(actual, name), getattr(wanted, name)),
            (getattr(in_chunks, name), getattr(chunks_of_whole, name)),
        ):
            torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5)
            _same_everywhere(value, group)
    if sparse:
        with pytest.raises(ValueError, match="'overlap' is not computed if several processes"):
            REAL(
                student[..., columns].clone(),
                teacher,
                process_group=group,
                return_parts=["overlap"],
            )
