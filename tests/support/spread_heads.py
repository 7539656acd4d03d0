"""Training by losses from hidden states, with the lm_head behind wrappers. tests/parallel/test_heads.py compares it
with training by logits on one process."""

from __future__ import annotations

import datetime
import os
import sys
import types
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import fastkd
from fastkd.distiller import Distiller, Term
from fastkd.parallel import head, num_items, redirect

BATCH, LENGTH, WIDTH, VOCABULARY = 8, 6, 24, 97
SCALE, SOFTCAP = 0.5, 3.0


class Model(nn.Module):
    """A language model whose interface is that of transformers: its logits are scaled and capped after the lm_head."""

    def __init__(self, seed: int, width: int = WIDTH, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config = types.SimpleNamespace(
            logit_scale=SCALE, final_logit_softcapping=SOFTCAP, tie_word_embeddings=tied
        )
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=not tied)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The lm_head."""
        return self.lm_head

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> dict[str, Tensor]:
        """The logits of some sequences. position_ids are ignored."""
        logits = self.lm_head(self.block(self.embedding(input_ids)))
        return {"logits": SOFTCAP * torch.tanh(SCALE * logits / SOFTCAP)}


OPTIONS: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0, "divergence": "jsd"}


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """(tokens, labels) of a step. The last sequences have no counted label: with two processes, half of one's."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[BATCH - BATCH // 4 :] = -100
    return tokens, labels


def of_logits(student: nn.Module, teacher: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The loss from logits, which the models compute themselves."""
    with torch.no_grad():
        target = teacher(tokens)["logits"]
    return fastkd.kd_loss(student(tokens)["logits"], target, labels, **OPTIONS)


def of_hidden_states(
    student: nn.Module, teacher: nn.Module, tokens: Tensor, labels: Tensor, items: Any = None
) -> Tensor:
    """The loss from hidden states and lm_heads."""
    of_student, of_teacher = head(student), head(teacher)
    with torch.no_grad(), of_teacher.captured() as target:
        teacher(tokens)

    def step(forward: Any, tokens: Tensor) -> Tensor:
        with of_student.captured() as captured:
            forward(tokens)
        return of_student.apply(loss, captured.hidden)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return fastkd.fused_linear_kd_loss(
            hidden, weight, fastkd.LinearTeacher(target.hidden, *weights), labels, student_bias=bias,
            num_items=items, chunk_size=7, logit_scale=of_student.logit_scale, softcap=of_student.softcap,
            teacher_logit_scale=of_teacher.logit_scale, teacher_softcap=of_teacher.softcap, **OPTIONS,
        )  # fmt: skip

    with of_teacher.gathered(target.hidden.dtype) as weights:
        return redirect(student, step, tokens)


def of_distiller(distiller: Distiller, tokens: Tensor, labels: Tensor, items: Any) -> Tensor:
    """The loss of a Distiller."""
    loss, _ = distiller(tokens, labels=labels, num_items=items)
    return loss


def spread(model: Model, how: str, group: Any, **options: Any) -> nn.Module:
    """The model, wrapped.

    how: "alone", "ddp", "ddp, unused" (it looks for unused parameters), "fsdp" (one unit), "fsdp, reshards" (the unit
    is sharded again after its forward), "fsdp, layers" (the block is a unit too), "fsdp, head" (and the lm_head).
    """
    if how.startswith("fsdp"):
        options["mesh"] = DeviceMesh.from_group(group, "cpu")
        if how in ("fsdp, layers", "fsdp, head"):
            fully_shard(model.block, **options)
        if how == "fsdp, head":
            fully_shard(model.lm_head, **options)
        if how == "fsdp, reshards":
            options["reshard_after_forward"] = True
        fully_shard(model, **options)
    elif how.startswith("ddp"):
        unused = how == "ddp, unused"
        return DistributedDataParallel(model, process_group=group, find_unused_parameters=unused)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters, gathered."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def train(
    group: Any,
    how: str,
    tied: bool,
    micro_batches: int = 1,
    rows: str = "even",
    steps: int = 8,
    by: str = "head",
) -> dict[str, Tensor]:
    """The student's parameters after some steps, in which each process has its own sequences.

    rows: "even"; "masked": the last process has no counted row; "none": the first process has all sequences.
    by: "head": by fastkd.parallel.head; "distiller": by a Distiller of the wrapped student.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    student, teacher = Model(1, tied=tied), Model(2, 40)
    wrapped = spread(student, how, group)
    target = spread(teacher, how if how.startswith("fsdp") else "alone", group).requires_grad_(
        False
    )
    term = Term(fastkd.FusedLinearKDLoss(chunk_size=7, **OPTIONS))
    loss_of = partial(of_hidden_states, wrapped, target)
    if by == "distiller":
        loss_of = partial(of_distiller, Distiller(wrapped, target, {"kd": term}))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5, momentum=0.9)
    for step in range(steps):
        tokens, labels = batch_of(step)
        if rows == "masked":
            labels[BATCH // 2 :] = -100
        if how == "alone":
            of_logits(student, target, tokens, labels).backward()
        else:
            own = slice(0, BATCH if rank == 0 else 0)
            if rows != "none":
                own = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
            tokens, labels = tokens[own], labels[own]
            items = num_items(labels, group=group)
            for part in torch.arange(len(tokens)).chunk(micro_batches):
                loss_of(tokens[part], labels[part], items).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(student)


def gathers(group: Any, how: str) -> list[int]:
    """How many times parameters are gathered in a forward by hidden states, and in the backward after it."""
    student, teacher = spread(Model(1), how, group), Model(2, 40)
    counts = []
    for _ in range(2):  # the first forward may differ
        with CommDebugMode() as forward:
            loss = of_hidden_states(student, teacher, *batch_of(0))
        with CommDebugMode() as backward:
            loss.backward()
        counts = [
            sum(count for name, count in mode.get_comm_counts().items() if "gather" in str(name))
            for mode in (forward, backward)
        ]
    return counts


def mixed_precision(group: Any, how: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(the loss in bfloat16, the loss in float32, the gradients of the former) with float32 parameters."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    student = spread(Model(1), how, group, mp_policy=policy)
    teacher = spread(Model(2, 40), how, group, mp_policy=policy)
    loss = of_hidden_states(student, teacher, *batch_of(0))
    loss.backward()
    gradients = {name: p.grad.full_tensor() for name, p in student.named_parameters()}
    return loss.detach(), of_logits(Model(1), Model(2, 40), *batch_of(0)).detach(), gradients


def not_redirected(group: Any, how: str) -> str:
    """The message for a loss outside of the model's forward."""
    student = spread(Model(1), how, group)
    with patch.object(sys.modules[__name__], "redirect", _called):
        try:
            of_hidden_states(student, Model(2, 40), *batch_of(0)).backward()
        except RuntimeError as error:
            return str(error)
    return "nothing"


def _called(model: Any, function: Any, *args: Any) -> Any:
    return function(model, *args)


def messages(group: Any) -> list[str]:
    """The messages for models that the loss cannot use."""
    mesh = DeviceMesh.from_group(group, "cpu")
    cut = Model(1, tied=True)
    fully_shard(cut.lm_head, mesh=mesh)
    fully_shard(cut, mesh=mesh)
    compiled = torch.compile(spread(Model(1), "fsdp", group), backend="eager")
    results = []
    for call in (
        lambda: head(cut),
        lambda: redirect(compiled, _called, batch_of(0)[0]),
    ):
        try:
            call()
            results.append("nothing")
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    return results


def leave(group: Any, how: str, seconds: float) -> str:
    """Train, while the last process "dies" or "waits" before its second step; return the message of the error."""
    ranks = dist.get_process_group_ranks(group)
    timeout = datetime.timedelta(seconds=seconds)
    patient = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
    store = dist.distributed_c10d._get_default_store()
    last = dist.get_rank(group) == len(ranks) - 1
    student, teacher = spread(Model(1), "fsdp, head", patient), Model(2, 40)
    try:
        for step in range(2):
            if last and step == 1:
                if how == "dies":
                    os._exit(1)
                store.wait(["gave up"])
                return "waited"
            of_hidden_states(student, teacher, *batch_of(step)).backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if not last:
            store.set("gave up", "")
    return "nothing"


def packed(group: Any) -> list[bool]:
    """Whether the loss of packed batches is finite, of which the first process has two examples per row, the last one.

    A Distiller checks packed batches by running the models, which is a collective.
    """
    models = Model(1), Model(2)
    for model in models:
        model.block = nn.Linear(WIDTH, WIDTH)  # does not read across the examples
    student, teacher = spread(models[0], "fsdp, reshards", group), models[1]
    distiller = Distiller(student, teacher, {"kd": Term(fastkd.FusedLinearKDLoss())})
    tokens, labels = batch_of(0)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    if dist.get_rank(group) == 0:
        positions = positions % (LENGTH // 2)
    results = []
    for _ in range(2):
        loss, _ = distiller(input_ids=tokens, position_ids=positions, labels=labels)
        results.append(bool(loss.isfinite()))
    return results
