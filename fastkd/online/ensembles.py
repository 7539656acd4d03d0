"""On-the-fly ensembles: branches of one model, taught by their gated ensemble as it is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.call.checks import (
    check_number,
)
from fastkd.call.contract import row_dtype
from fastkd.core.tensors import savable
from fastkd.functional import kd_loss
from fastkd.online.mutual import check_students


def ensemble_logits(logits: Sequence[Tensor], gate: Tensor | None = None) -> Tensor:
    r"""The gated mean of the branches' logits, sum_i g_i z_i (Lan, Zhu and Gong 2018).

    Args:
        logits: of every branch [..., V], two or more, of one shape, dtype and device.
        gate: [M] or [..., M] floating point, which sums to 1 over the last dimension: the softmax of what the model has
            learned. None: 1/M each.

    Returns:
        [..., V], differentiable by branches and gate; float32 (float64 for float64 logits), as logits that are rounded
        once more would cost the losses of them digits.

    Memory: the result, and for each branch that is not float32 a copy while its product is made.

    Raises:
        ValueError, TypeError: the message names the argument.
    """
    branches = check_students(logits)
    dtype, lead = row_dtype(branches[0].dtype), branches[0].shape[:-1]
    if gate is None:
        return torch.stack([branch.to(dtype) for branch in branches]).mean(0)
    if not isinstance(gate, Tensor):
        raise TypeError(f"gate must be a tensor or None, got {type(gate).__name__}")
    if not gate.is_floating_point():
        raise TypeError(f"gate must be floating point, got {gate.dtype}")
    shapes = ((len(branches),), (*lead, len(branches)))
    if gate.shape not in shapes:
        raise ValueError(
            f"gate must have one weight a branch, shape {shapes[0]} or {shapes[1]}; got {tuple(gate.shape)}"
        )
    if gate.device != branches[0].device:
        raise ValueError(
            f"gate must be on {branches[0].device}, where the logits are; got {gate.device}"
        )
    gate, *branches = savable(gate, *branches)
    weights = gate.to(dtype).unsqueeze(-1).unbind(-2)
    mixed = weights[0] * branches[0].to(dtype)
    for weight, branch in zip(weights[1:], branches[1:], strict=True):
        mixed = torch.addcmul(mixed, weight, branch.to(dtype))
    return mixed


def ensemble_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    gate: Tensor | None = None,
    *,
    temperature: float = 3.0,
    ensemble_weight: float = 1.0,
    **options: Any,
) -> Tensor:
    r"""On-the-fly native ensemble, ONE (Lan, Zhu and Gong 2018): branches taught by their ensemble, that by the labels.

        sum_i CE(z_i, label)  +  CE(z_e, label)  +  ensemble_weight T^2 sum_i KL(softmax(z_e / T) || softmax(z_i / T))

    with z_e = :func:`ensemble_logits`. The ensemble is a constant in the last term: branches learn from it, and it
    learns, with its gate and again with its branches, from the labels. A branch's two terms are one sweep.

    Args:
        logits: of every branch [..., V], as in ensemble_logits.
        labels: [...] int64.
        gate: as in ensemble_logits.
        temperature: T; 3 in the paper.
        ensemble_weight: multiplies the divergences; 1 in the paper.
        **options: scale_by_temperature, label_smoothing, ignore_index, mask, weight, reduction, num_items and backend,
            as :func:`fastkd.kd_loss` has them.

    Returns:
        0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits).

    Memory: the ensemble's logits in float32, and the gradients of all.

    Raises:
        ValueError, TypeError: the message names the argument.
    """
    allowed = {"scale_by_temperature", "label_smoothing", "ignore_index", "mask", "weight", "reduction", "num_items",
               "backend"}  # fmt: skip
    if unknown := options.keys() - allowed:
        raise TypeError(f"ensemble_loss has no option {', '.join(sorted(unknown))}")
    branches = _without_dropped(check_students(logits), labels, options)
    mixed = ensemble_logits(branches, gate)
    target = mixed.detach()
    ensemble_weight = check_number(
        "ensemble_weight", ensemble_weight, 0.0, math.inf, open_right=True
    )
    total = 1.0 + ensemble_weight
    # alpha D + (1 - alpha) CE in one sweep, and both times 1 + ensemble_weight.
    alpha = ensemble_weight / total
    loss = _loss(mixed, target, labels, alpha=0.0, **options)
    for branch in branches:
        of_branch = _loss(branch, target, labels, alpha=alpha, temperature=temperature, **options)
        loss = loss + total * of_branch
    return loss


def _without_dropped(
    branches: Sequence[Tensor], labels: Tensor, options: dict[str, Any]
) -> Sequence[Tensor]:
    """The branches with 0 in rows that are dropped, which may hold anything and would reach the gate's gradient."""
    kept = labels != options.get("ignore_index", -100) if isinstance(labels, Tensor) else None
    for name in ("mask", "weight"):
        value = options.get(name)
        if isinstance(value, Tensor) and (kept is None or _alike(value, kept)):
            kept = value != 0 if kept is None else kept & (value != 0)
    lead, device = branches[0].shape[:-1], branches[0].device
    if kept is None or kept.shape != lead or kept.device != device:
        return branches  # kd_loss says what is wrong
    return [torch.where(kept.unsqueeze(-1), branch, 0.0) for branch in branches]


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.device == second.device


def _loss(*arguments: Tensor, **options: Any) -> Tensor:
    loss = kd_loss(*arguments, **options)
    assert isinstance(loss, Tensor)
    return loss
