"""On-the-fly ensembles: branches of one model learn from their gated ensemble, which is trained with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.call.contract import row_dtype
from fastkd.core.scalars import check_number
from fastkd.core.tensors import savable
from fastkd.functional import kd_loss
from fastkd.online.mutual import check_students


def ensemble_logits(logits: Sequence[Tensor], gate: Tensor | None = None) -> Tensor:
    r"""The gated mean of the branches' logits, sum_i g_i z_i (Lan, Zhu and Gong 2018).

    Args:
        logits: the logits [..., V] of two or more branches, of one shape, dtype and device.
        gate: [M] or [..., M] floating point, sums to 1 over the last dimension: the softmax of a learned gate. None:
            1/M each.

    Returns:
        [..., V], differentiable by branches and gate. float32 (float64 for float64 logits), because another rounding of
        the logits would cost the losses digits.

    Memory: the result, and a temporary copy of each branch that is not float32.

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
            f"gate must have one weight per branch, shape {shapes[0]} or {shapes[1]}; got {tuple(gate.shape)}"
        )
    if gate.device != branches[0].device:
        raise ValueError(
            f"gate must be on {branches[0].device}, the device of the logits; got {gate.device}"
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
    r"""On-the-fly native ensemble, ONE (Lan, Zhu and Gong 2018): branches learn from labels and from their ensemble.

        sum_i CE(z_i, label)  +  CE(z_e, label)  +  ensemble_weight T^2 sum_i KL(softmax(z_e / T) || softmax(z_i / T))

    with z_e = :func:`ensemble_logits`. The ensemble is a constant in the last term. It learns from the labels, through
    its gate and its branches. Both terms of a branch are computed in one sweep.

    Args:
        logits: the logits [..., V] of each branch, as in ensemble_logits.
        labels: [...] int64.
        gate: as in ensemble_logits.
        temperature: T; 3 in the paper.
        ensemble_weight: multiplies the divergences; 1 in the paper.
        **options: scale_by_temperature, label_smoothing, ignore_index, mask, weight, reduction, num_items and backend,
            as in :func:`fastkd.kd_loss`.

    Returns:
        0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits).

    Memory: the ensemble's logits in float32, and the gradients of ensemble and branches.

    Raises:
        ValueError, TypeError: the message names the argument.
    """
    allowed = {"scale_by_temperature", "label_smoothing", "ignore_index", "mask", "weight", "reduction", "num_items",
               "backend"}  # fmt: skip
    if unknown := options.keys() - allowed:
        raise TypeError(
            f"ensemble_loss has no option {', '.join(sorted(unknown))}; it takes {', '.join(sorted(allowed))}"
        )
    branches = _clear_dropped(check_students(logits), labels, options)
    mixed = ensemble_logits(branches, gate)
    target = mixed.detach()
    ensemble_weight = check_number(
        "ensemble_weight", ensemble_weight, 0.0, math.inf, open_right=True
    )
    total = 1.0 + ensemble_weight
    # kd_loss computes alpha D + (1 - alpha) CE in one sweep; times 1 + ensemble_weight, D has ensemble_weight, CE 1.
    alpha = ensemble_weight / total
    loss = _loss(mixed, target, labels, alpha=0.0, **options)
    for branch in branches:
        both = _loss(branch, target, labels, alpha=alpha, temperature=temperature, **options)
        loss = loss + total * both
    return loss


def _clear_dropped(
    branches: Sequence[Tensor], labels: Tensor, options: dict[str, Any]
) -> Sequence[Tensor]:
    """The branches with 0 in dropped rows, whose values would otherwise reach the gate's gradient."""
    counted = labels != options.get("ignore_index", -100) if isinstance(labels, Tensor) else None
    for name in ("mask", "weight"):
        value = options.get(name)
        if isinstance(value, Tensor) and (counted is None or _alike(value, counted)):
            counted = value != 0 if counted is None else counted & (value != 0)
    lead, device = branches[0].shape[:-1], branches[0].device
    if counted is None or counted.shape != lead or counted.device != device:
        return branches  # kd_loss raises
    return [torch.where(counted.unsqueeze(-1), branch, 0.0) for branch in branches]


def _alike(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.device == second.device


def _loss(*arguments: Tensor, **options: Any) -> Tensor:
    loss = kd_loss(*arguments, **options)
    assert isinstance(loss, Tensor)
    return loss
