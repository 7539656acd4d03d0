"""Axolotl: the loss of its plug-in for distillation, and the plug-in.

    plugins:
      - fastkd.compat.axolotl.KDPlugin  # was: axolotl.integrations.kd.KDPlugin

docs/stacks/axolotl.md lists what differs.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastkd.call.checks import check_per_row, check_side
from fastkd.core.scalars import check_number
from fastkd.divergences import jsd
from fastkd.functional import fused_linear_kd_loss
from fastkd.teachers import TopK


class LigerFusedLinearKLTopKLogprobLoss(nn.Module):
    """``axolotl.integrations.kd.kernels.liger.LigerFusedLinearKLTopKLogprobLoss``: sums over the rows of a batch.

        weight_soft_loss T^2 D(p, q) + weight_hard_loss CE

    p and q are over the teacher's top-k tokens, at temperature T. D is the generalized JSD of beta: forward KL at 0,
    reverse KL at 1. With normalize_topk, both are renormalized over these tokens (the tail "renormalize" of
    :class:`fastkd.TopK`); without, q is over the whole vocabulary (the tail "truncate"). Labels are shifted here by one
    position; the teacher's rows are not.

    In Axolotl, T^2 multiplies the value of the divergence, but not its gradient. Here the gradient is that of the
    value. For Axolotl's gradient, pass weight_soft_loss / T^2.

    Args:
        weight_hard_loss: the weight of the cross-entropy, in [0, 1].
        weight_soft_loss: the weight of the divergence, in [0, 1].
        temperature: T > 0; the teacher's log-probabilities were taken at T.
        beta: in [0, 1].
        ignore_index: the label of rows without cross-entropy.
        compiled: accepted, but without effect.
        chunk_size: accepted, but without effect: chunks are as large as fastkd's memory budget allows.
        compute_ce_loss: False omits the cross-entropy.
        normalize_topk: renormalize both sides over the listed tokens.

    Raises:
        ValueError, TypeError: an option has the wrong type or value; the message names it.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        temperature: float = 1.0,
        beta: float = 1.0,
        ignore_index: int = -100,
        compiled: bool = True,
        chunk_size: int = 1024,
        compute_ce_loss: bool = True,
        normalize_topk: bool = True,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = check_number("weight_hard_loss", weight_hard_loss, 0.0, 1.0)
        self.weight_soft_loss = check_number("weight_soft_loss", weight_soft_loss, 0.0, 1.0)
        self.temperature = temperature
        self.beta = check_number("beta", beta, 0.0, 1.0)
        self.ignore_index = ignore_index
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.compute_ce_loss = compute_ce_loss
        self.normalize_topk = normalize_topk

    def forward(
        self,
        lm_head_weight: Tensor,
        student_hidden_states: Tensor,
        target_token_ids: Tensor,
        target_logprobs: Tensor,
        target_mask: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss, 0-dim, float32.

        Args:
            lm_head_weight: [V, H].
            student_hidden_states: [B, S, H].
            target_token_ids: [B, S, K], distinct within a row where target_mask is not 0.
            target_logprobs: [B, S, K], the teacher's natural logarithms.
            target_mask: [B, S, K]; entries where it is 0 are skipped.
            true_labels: [B, S], not shifted.
            student_bias: [V], or None.

        Raises:
            ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        """
        check_side("student_hidden_states", student_hidden_states, "lm_head_weight", lm_head_weight)
        lead = student_hidden_states.shape[:-1]
        check_per_row("true_labels", true_labels, lead)
        for name, value in (
            ("target_token_ids", target_token_ids),
            ("target_logprobs", target_logprobs),
            ("target_mask", target_mask),
        ):
            if value.dim() != 3 or value.shape[:-1] != lead:
                raise ValueError(
                    f"{name} must be [B, S, K] with [B, S] = {tuple(lead)}, got {tuple(value.shape)}"
                )
        for name, value in (("target_logprobs", target_logprobs), ("target_mask", target_mask)):
            if value.shape != target_token_ids.shape:
                raise ValueError(
                    f"{name} must have the shape of target_token_ids, {tuple(target_token_ids.shape)}; "
                    f"got {tuple(value.shape)}"
                )
        if target_token_ids.is_floating_point() or not target_logprobs.is_floating_point():
            raise TypeError(
                "target_token_ids must be integers and target_logprobs floating point, got "
                f"{target_token_ids.dtype} and {target_logprobs.dtype}"
            )
        # Without a weight, what the teacher lists is not read, even if it is invalid.
        listed = (target_mask != 0) & (self.weight_soft_loss > 0.0)
        teacher = TopK(
            target_token_ids.masked_fill(~listed, -1),
            target_logprobs.detach().float(),
            tail="renormalize" if self.normalize_topk else "truncate",
            temperature=self.temperature,
        )
        labels = pad(true_labels[:, 1:], (0, 1), value=self.ignore_index)
        soft = self.weight_soft_loss
        hard = self.weight_hard_loss if self.compute_ce_loss else 0.0
        labelled = (labels != self.ignore_index) if hard else torch.zeros_like(listed[..., 0])
        # Rows whose only loss is the divergence; the other rows take both losses from one pass.
        unlabelled = listed.any(-1) & ~labelled

        def total(mask: Tensor, **options: Any) -> Tensor:
            return fused_linear_kd_loss(
                student_hidden_states,
                lm_head_weight,
                teacher,
                student_bias=student_bias,
                divergence=jsd(self.beta),
                temperature=self.temperature,
                mask=mask,
                reduction="sum",
                **options,
            )

        if not hard:
            return soft * total(unlabelled)
        both = soft + hard
        loss = both * total(
            labelled, labels=labels, alpha=soft / both, ignore_index=self.ignore_index
        )
        # A second pass allocates another gradient of the head, even for no rows.
        return loss + soft * total(unlabelled) if bool(unlabelled.any()) else loss


def register() -> None:
    """Make Axolotl's trainer for distillation use this loss. Call it in every process, before the trainer is built.

    Raises:
        ImportError: Axolotl is not installed.
    """
    trainer: Any = importlib.import_module("axolotl.integrations.kd.trainer")
    trainer.LigerFusedLinearKLTopKLogprobLoss = LigerFusedLinearKLTopKLogprobLoss


def __getattr__(name: str) -> Any:
    """Define KDPlugin, a subclass of ``axolotl.integrations.kd.KDPlugin``, when it is first accessed."""
    if name != "KDPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    original: Any = importlib.import_module("axolotl.integrations.kd").KDPlugin

    class KDPlugin(original):
        """``axolotl.integrations.kd.KDPlugin`` with fastkd's loss."""

        def get_trainer_cls(self, cfg: Any) -> Any:
            """Return Axolotl's trainer for distillation, whose loss is fastkd's."""
            if cfg.kd_trainer:
                register()
            return super().get_trainer_cls(cfg)

    KDPlugin.__module__ = __name__
    globals()[name] = KDPlugin
    return KDPlugin
