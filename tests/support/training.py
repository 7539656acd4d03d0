"""A small model trained in processes: tests/parallel/test_parallel.py compares its parameters after some steps."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastkd
from fastkd.parallel import num_items

BATCH, LENGTH, WIDTH, VOCABULARY = 8, 6, 32, 199


class Model(nn.Module):
    """A language model of one block. Its forward returns the loss, because FSDP gathers parameters only in forward."""

    def __init__(self, process_group: Any = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.group = process_group

    def hidden(self, tokens: Tensor) -> Tensor:
        """The hidden states."""
        return self.block(self.embedding(tokens))

    def forward(self, tokens: Tensor, teacher: Any, labels: Tensor, items: Any) -> Tensor:
        """The loss of some sequences, for FSDP."""
        return loss_of(self, self.hidden(tokens), teacher, labels, items, self.group)


def loss_of(
    model: Model, hidden: Tensor | None, teacher: Any, labels: Tensor, items: Any, group: Any
) -> Tensor:
    """The loss from the model's head: whole, a shard of the vocabulary, or spread by FSDP."""
    assert hidden is not None
    return fastkd.fused_linear_kd_loss(
        hidden, model.head.weight, teacher, labels, alpha=0.5, temperature=2.0,
        divergence="jsd", num_items=items, process_group=group, chunk_size=5,
    )  # fmt: skip


def _data(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, teacher logits, labels) of a step; the last sequences have no counted label."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    teacher = 3 * torch.randn(BATCH, LENGTH, VOCABULARY, generator=generator)
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[BATCH - BATCH // 4 :] = -100  # with 4 processes, all of one
    return tokens, teacher, labels


def train(group: Any, how: str, micro_batches: int, steps: int = 8) -> dict[str, Tensor]:
    """The parameters after some steps.

    how: "alone", "ddp", "fsdp" (the loss inside the forward), "fsdp, head" (the loss of the spread head, outside),
    "tp" (every process has a part of the head's vocabulary).
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    model = Model(group if how == "tp" else None)
    runs: Any = model
    columns = slice(None)
    rows_each = BATCH
    if how == "tp":
        bounds = [VOCABULARY * k // size for k in range(size + 1)]
        columns = slice(bounds[rank], bounds[rank + 1])
        model.head.weight = nn.Parameter(model.head.weight.detach()[columns].clone())
    elif how == "ddp":
        rows_each = BATCH // size
        runs = DistributedDataParallel(model, process_group=group)
    elif how.startswith("fsdp"):
        rows_each = BATCH // size
        mesh = DeviceMesh.from_group(group, "cpu")
        fully_shard(model.block, mesh=mesh)
        if how == "fsdp":
            fully_shard(model, mesh=mesh)
        else:
            fully_shard(model.embedding, mesh=mesh)
            fully_shard(model.head, mesh=mesh)
    first = 0 if rows_each == BATCH else rank * rows_each
    own_rows = slice(first, first + rows_each)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for step in range(steps):
        tokens, teacher, labels = (tensor[own_rows] for tensor in _data(step))
        all_here = how in ("alone", "tp")
        items = (labels != -100).sum().double() if all_here else num_items(labels, group=group)
        for part in torch.arange(rows_each).chunk(micro_batches):
            batch = (tokens[part], teacher[part][..., columns], labels[part], items)
            outside = how == "fsdp, head"
            hidden = model.hidden(batch[0]) if outside else None
            loss = loss_of(model, hidden, *batch[1:], None) if outside else runs(*batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    results = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        elif how == "tp" and name == "head.weight":
            parts: list[Any] = [None] * size
            dist.all_gather_object(parts, value, group=group)
            value = torch.cat(parts)
        results[name] = value
    return results


def call(group: Any, odd: dict[str, Any], environment: dict[str, str] | None = None) -> str:
    """Call kd_loss with different arguments on the last process; return the message of the error."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "student_logits": torch.randn(6, 8),
        "teacher": torch.randn(6, 8),
        "labels": torch.arange(6),
        "alpha": 0.5,
        "process_group": group,
    }
    if rank == size - 1:
        arguments |= odd
    os.environ.update(environment or {})
    try:
        fastkd.kd_loss(**arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for name in environment or {}:
            del os.environ[name]
    return "nothing"


def die(group: Any, where: str) -> str:
    """End the last process before a call, or during it."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank == size - 1:
        if where == "between its steps":
            from fastkd.backends import cpu

            cpu.shard_statistics = lambda *_: os._exit(1)  # type: ignore[assignment]
        else:
            os._exit(1)
    try:
        for _ in range(3):
            fastkd.kd_loss(torch.randn(6, 8), torch.randn(6, 8), process_group=group)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def late(group: Any, seconds: float) -> str:
    """Delay the call of the last process until the others have timed out."""
    import datetime

    ranks = dist.get_process_group_ranks(group)
    patient = dist.new_group(
        ranks, timeout=datetime.timedelta(seconds=seconds), use_local_synchronization=True
    )
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank(group) == len(ranks) - 1:
        store.wait([f"gave up {rank}" for rank in ranks[:-1]])
        return "late"
    try:
        fastkd.kd_loss(torch.randn(6, 8), torch.randn(6, 8), process_group=patient)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        store.set(f"gave up {dist.get_rank()}", "")
    return "nothing"


def placements(group: Any) -> list[str]:
    """The messages for DTensors that a loss cannot use."""
    mesh = DeviceMesh.from_group(group, "cpu")
    results = []
    rows = DTensor.from_local(torch.randn(2, 4, 8), mesh, [Shard(1)], run_check=False)
    for student, teacher in (
        (DTensor.from_local(torch.randn(2, 4, 8), mesh, [Shard(2)], run_check=False), rows),
    ):
        try:
            fastkd.kd_loss(student, teacher)
            results.append("nothing")
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    return results


def mesh_of_two(group: Any) -> bool:
    """Spread rows over one dimension of a mesh and columns over the other: the gradient is that of the local rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    whole = [torch.randn(4, 3, 31) for _ in range(2)]
    labels = torch.randint(31, (4, 3))
    spread = [
        distribute_tensor(tensor, mesh, [Shard(0), Shard(2)]).requires_grad_() for tensor in whole
    ]
    loss = fastkd.kd_loss(
        *spread, distribute_tensor(labels, mesh, [Shard(0), Replicate()]), alpha=0.5
    )
    gradients = torch.autograd.grad(loss, spread)
    rows = slice(2 * (dist.get_rank() // 2), 2 * (dist.get_rank() // 2) + 2)
    alone = [tensor[rows].clone().requires_grad_() for tensor in whole]
    expected = fastkd.kd_loss(*alone, labels[rows], alpha=0.5)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for actual, value in zip(gradients, torch.autograd.grad(expected, alone), strict=True):
        assert actual.placements == (Shard(0), Shard(2))
        # Every row of processes has the gradient of its own loss.
        torch.testing.assert_close(actual.full_tensor()[rows], value, rtol=1e-5, atol=1e-7)
    return True


def whole_head(group: Any) -> str:
    """The message for a head that every process has in full."""
    mesh = DeviceMesh.from_group(group, "cpu")
    head = DTensor.from_local(torch.randn(8, 4), mesh, [Replicate()], run_check=False)
    try:
        fastkd.fused_linear_kd_loss(torch.randn(3, 4), head, torch.randn(3, 8), process_group=group)
    except ValueError as error:
        return str(error)
    return "nothing"
