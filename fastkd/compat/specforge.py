"""SpecForge: the losses of its draft models for speculative decoding.

    import fastkd.compat.specforge

    fastkd.compat.specforge.register()  # SpecForge's losses are fastkd's from now on

SpecForge's own loss needs Triton and a GPU; these run on every device. docs/stacks/specforge.md lists what differs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd.call.checks import check_pair, check_per_row
from fastkd.divergences import soft_cross_entropy
from fastkd.functional import kd_loss
from fastkd.response import draft_loss


class LogSoftmaxLoss:
    """``specforge.core.loss.LogSoftmaxLoss``: the soft cross-entropy -sum p log q, a mean over all positions.

    SpecForge's class is an autograd function, so this class has its ``apply``, too. SpecForge writes the
    gradient over the logits; here the logits stay as they are.
    """

    @staticmethod
    def apply(logits: Tensor, target: Tensor, position_mask: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            logits: [B, T, D], the draft model's.
            target: [B, T, D], the target model's probabilities of the draft vocabulary, not negative; they need not sum
                to 1.
            position_mask: [B, T, 1]; positions where it is 0 count in the divisor B T, but not in the sum.

        Returns:
            The loss, 0-dim, float32.

        Raises:
            ValueError, TypeError: an argument has the wrong shape, dtype or device; the message names it.
        """
        _check("target", target, logits, position_mask)
        target = target.detach().float()
        # The loss normalizes the target; the weight undoes that.
        mass = target.sum(-1)
        return kd_loss(
            logits,
            target.log(),
            divergence=soft_cross_entropy(),
            mask=(position_mask.squeeze(-1) != 0) & (mass != 0),
            weight=mass,
            reduction="sum",
        ) / max(mass.numel(), 1)


def compute_acceptance_rate(
    *,
    logits: Tensor,
    target_probs: Tensor,
    position_mask: Tensor,
    eps: float = 1e-8,
    reduce_fn: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """``specforge.core.lk_loss.compute_acceptance_rate``: the masked means of a = sum min(p, q), and of log a.

    Args:
        logits: [B, T, D], the draft model's; q is their softmax.
        target_probs: [B, T, D], p of the draft tokens, not renormalized: the rest of the mass is never accepted.
        position_mask: [B, T, 1], bool, or numbers that weight the positions.
        eps: the smallest divisor.
        reduce_fn: adds numerator and divisor over processes, as in SpecForge.

    Returns:
        (the mean acceptance, the mean of its logarithm), 0-dim, float32 and differentiable.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device; the message names it.
    """
    _check("target_probs", target_probs, logits, position_mask)
    weight = position_mask.squeeze(-1).to(torch.float32)
    rest = (1.0 - target_probs.detach().float().sum(-1, keepdim=True)).clamp(min=0.0)
    # log p is finite for tokens whose probability is 0, so that rows without any mass have no NaN.
    target = torch.cat([target_probs.detach().float(), rest], -1).clamp_(min=_TINY).log_()
    acceptance = 1.0 - draft_loss(
        logits,
        target,
        "tvd",
        draft_to_target=torch.arange(logits.shape[-1], device=logits.device),
        mask=weight != 0,
        reduction="none",
    )
    log_acceptance = torch.where(acceptance > 0, acceptance.clamp(min=_TINY).log(), 0.0)
    return tuple(  # type: ignore[return-value]  # two of them
        _masked_mean(values, weight, eps, reduce_fn) for values in (acceptance, log_acceptance)
    )


def _check(argument: str, target: Tensor, logits: Tensor, position_mask: Tensor) -> None:
    check_pair(argument, target, "logits", logits, "Both are over the draft vocabulary", lowest=3)
    check_per_row("position_mask", position_mask, torch.Size((*logits.shape[:-1], 1)), dtype=None)


_TINY = torch.finfo(torch.float32).tiny


def _masked_mean(
    values: Tensor,
    weight: Tensor,
    eps: float,
    reduce_fn: Callable[..., tuple[Tensor, Tensor]] | None,
) -> Tensor:
    total, divisor = (values * weight).sum(), weight.sum().clamp_min(eps)
    if reduce_fn is not None:
        total, divisor = reduce_fn(local_correct=total, local_denom=divisor)
        divisor = divisor.clamp_min(eps)
    return total / divisor


def register() -> None:
    """Make SpecForge use these two losses. Call it in every process, before a model is built.

    Raises:
        ImportError: SpecForge is not installed.
    """
    for home, ours in (
        ("specforge.core.loss", LogSoftmaxLoss),
        ("specforge.core.lk_loss", compute_acceptance_rate),
    ):
        name: Any = ours.__name__
        original = getattr(importlib.import_module(home), name)
        # The models have imported the losses by name.
        for path, module in list(sys.modules.items()):
            if path.startswith("specforge.") and vars(module).get(name) is original:
                setattr(module, name, ours)
