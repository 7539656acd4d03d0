"""A small convolutional student and teacher with losses, for tests/losses/test_distiller.py and its processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastkd
from fastkd.distiller import Distiller, Term
from fastkd.features import HintLoss, Regressor, attention_transfer_loss


class Net(nn.Module):
    """A model with two convolutions and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Tanh())
        self.layer2 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Dropout(0.0))
        self.head = nn.Linear(width, 7)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(images)).mean((2, 3)))


def pair() -> tuple[Net, Net]:
    """(student, teacher)"""
    torch.manual_seed(0)
    return Net(4), Net(6)


def terms() -> dict[str, Term]:
    """Terms on logits, on one layer and on two layers."""
    torch.manual_seed(1)
    return {
        "kd": Term(fastkd.KDLoss(temperature=4.0, alpha=0.5)),
        "hint": Term(HintLoss(Regressor(4, 6, "conv")), "layer1", weight=0.1),
        "attention": Term(
            attention_transfer_loss, ["layer1", "layer2"], ["layer2", "layer1"], 10.0, takes=()
        ),
    }


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    """(images, labels)"""
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(size, 3, 5, 5, generator=generator),
        torch.randint(7, (size,), generator=generator),
    )


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradients of the parameters, by name."""
    return {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def in_parallel(group: Any, stage: bool) -> dict[str, Any]:
    """The gradients and the state of a process with its part of the batch. stage: the loss on logits has weight 0."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    losses = terms()
    if stage:
        losses["kd"] = Term(losses["kd"].loss, weight=lambda step: float(step > 0))
    distiller = Distiller(*pair(), losses)
    if rank:  # what the first process has is what all begin with
        for parameter in distiller.parameters():
            parameter.data.zero_()
    parallel = DistributedDataParallel(distiller, process_group=group, find_unused_parameters=stage)
    images, labels = (value.chunk(size)[rank] for value in batch())
    loss, parts = parallel(images, labels=labels, step=0)
    loss.backward()
    state = parallel.state_dict()
    parallel.load_state_dict(state)
    assert all(part.grad_fn is None for part in parts.values())
    return {"gradients": gradients(parallel), "names": list(state)}
