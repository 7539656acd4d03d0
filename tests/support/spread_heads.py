"""Training by losses from hidden states, with the lm_head behind wrappers. tests/parallel/test_heads.py compares it
with training by logits on one process."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastkd
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

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """The logits of some sequences."""
        logits = self.lm_head(self.block(self.embedding(tokens)))
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


def spread(model: Model, how: str, group: Any) -> nn.Module:
    """The model, wrapped.

    how: "alone", "ddp", "fsdp" (one unit), "fsdp, layers" (the block is a unit of its own), "fsdp, head" (the lm_head
    too).
    """
    if how.startswith("fsdp"):
        mesh = DeviceMesh.from_group(group, "cpu")
        if how != "fsdp":
            fully_shard(model.block, mesh=mesh)
        if how == "fsdp, head":
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif how == "ddp":
        return DistributedDataParallel(model, process_group=group)
    elif how == "ddp, unused":
        return DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters, gathered."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def train(
    group: Any, how: str, tied: bool, steps: int = 20, micro_batches: int = 1
) -> dict[str, Tensor]:
    """The student's parameters after some steps, in which each process has its own sequences."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    student, teacher = Model(1, tied=tied), Model(2, 40)
    wrapped = spread(student, how, group)
    target = spread(teacher, how if how.startswith("fsdp") else "alone", group).requires_grad_(
        False
    )
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5, momentum=0.9)
    for step in range(steps):
        tokens, labels = (part.chunk(size)[rank] for part in batch_of(step))
        if how == "alone":
            of_logits(student, target, tokens, labels).backward()
        else:
            items = num_items(labels, group=group)
            for part in torch.arange(len(tokens)).chunk(micro_batches):
                of_hidden_states(wrapped, target, tokens[part], labels[part], items).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(student)
