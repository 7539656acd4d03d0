"""fastkd.sampled against TRL's own losses of sampled tokens: IW-OPD, and the sampled-token form of SDFT and SDPO.

TRL's losses have the value -A log q, and fastkd's -A r with r = 1. Gradients are the same, and values are compared with
TRL's formula.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.experimental.sdft import loss_utils as sdft
from trl.experimental.sdpo import loss_utils as sdpo

from fastkd.sampled import importance_weights, on_policy_loss, policy_advantages

B, L, V = 3, 6, 11


def _batch(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(student logits, teacher logits, tokens, mask, log-probabilities of the rollout)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher, rollout = (
        2.0 * torch.randn(B, L, V, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    tokens = torch.randint(V, (B, L), generator=generator)
    mask = torch.arange(L) < torch.tensor([[6], [2], [4]])
    rollout = (0.8 * student + 0.2 * rollout).log_softmax(-1)
    return student, teacher, tokens, mask, rollout.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return result


def _trainer(temperature: float, gamma: float) -> Any:
    trainer = IWOPDTrainer.__new__(IWOPDTrainer)
    trainer.temperature, trainer.iw_opd_gamma, trainer.iw_opd_epsilon = temperature, gamma, 1e-8
    trainer.model = SimpleNamespace(training=True)
    trainer._metrics = {"train": defaultdict(list)}
    return trainer


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("num_items", [None, 20])
@pytest.mark.parametrize("with_rollout", [True, False])
def test_iw_opd(gamma: float, num_items: int | None, with_rollout: bool) -> None:
    student, teacher, tokens, mask, rollout = _batch(0)
    student.requires_grad_()
    labels = torch.where(mask, tokens, -100)
    of_teacher = torch.where(mask, _of_tokens(teacher, tokens), float("-inf"))
    rollout = torch.where(mask, rollout, float("nan"))
    sampled = rollout if with_rollout else None
    trainer = _trainer(1.5, gamma)
    theirs = trainer._compute_iw_opd_loss(
        student, tokens, labels, of_teacher, sampled, num_items_in_batch=num_items
    )
    current = _of_tokens(student / 1.5, tokens)
    advantages = policy_advantages(
        of_teacher, current if sampled is None else sampled, position_gamma=gamma, mask=mask
    )
    ours, parts = on_policy_loss(
        current, advantages=advantages, mask=mask, num_items=num_items, return_parts=True
    )
    torch.testing.assert_close(_gradient(ours, student), _gradient(theirs, student))
    divisor = num_items or mask.sum()
    torch.testing.assert_close(ours.detach(), -advantages.sum() / divisor)
    torch.testing.assert_close(theirs, -(advantages * current).sum() / divisor)
    (mean_advantage,) = trainer._metrics["train"]["iw_opd/mean_advantage"]
    assert parts.mean_advantage.item() == pytest.approx(mean_advantage)


@pytest.mark.parametrize("functions", [sdft, sdpo], ids=["sdft", "sdpo"])
@pytest.mark.parametrize("clip", [None, 1.3])
def test_sampled_token_of_self_distillation(functions: Any, clip: float | None) -> None:
    student, teacher, tokens, mask, old = _batch(1)
    student.requires_grad_()
    per_token = functions.compute_sampled_token_self_distillation_loss(
        student, teacher, tokens, distillation_alpha=1.0
    )
    current = _of_tokens(student, tokens)
    weight = None
    if clip is not None:
        per_token = functions.apply_importance_sampling_clipping(per_token, current, old, clip)
        weight = importance_weights(current, old, truncate=clip)
        assert (weight == clip).any() and (weight < clip).any()
    # The normalizer of both trainers: the mean of each sequence, then of the batch.
    theirs = ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    ours = on_policy_loss(
        current, _of_tokens(teacher, tokens), mask=mask, weight=weight, reduction="sequence_mean"
    )
    torch.testing.assert_close(_gradient(ours, student), _gradient(theirs, student))


def test_the_normaliser_counts_sequences_without_tokens() -> None:
    """TRL's mean over the batch includes them; num_items does so here."""
    student, teacher, tokens, mask, _ = _batch(2)
    mask[1] = False
    student.requires_grad_()
    per_token = sdpo.compute_sampled_token_self_distillation_loss(
        student, teacher, tokens, distillation_alpha=1.0
    )
    theirs = ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    ours = on_policy_loss(
        _of_tokens(student, tokens), _of_tokens(teacher, tokens), mask=mask,
        reduction="sequence_mean", num_items=B,
    )  # fmt: skip
    torch.testing.assert_close(_gradient(ours, student), _gradient(theirs, student))
