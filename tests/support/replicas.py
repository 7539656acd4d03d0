"""What processes do that hold different rows of one batch, for tests of losses with num_items."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.parallel import num_items
from fastkd.sampled import on_policy_loss


def policy(group: Any, tensors: tuple[Tensor, ...], reduction: str) -> tuple[Tensor, Tensor]:
    """(on_policy_loss of this process's half of the sequences, its gradient)."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    student, teacher, mask = (x.chunk(size)[rank] for x in tensors)
    counted = mask if reduction == "mean" else mask.any(-1)
    leaf = student.clone().requires_grad_()
    items = num_items(mask=counted, group=group)
    loss = on_policy_loss(leaf, teacher, mask=mask, reduction=reduction, num_items=items)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient
