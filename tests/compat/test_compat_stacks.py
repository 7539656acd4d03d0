"""fastkd's losses against the functions of TRL and Liger that training stacks run on policy: values and gradients.

bench/studies/stacks.py times the same functions, and compares verl's, VeOmni's and speculators' where their wheels are
at hand. Their formulas are here in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
    LigerFusedLinearScaledCrossEntropyFunction,
)
from torch import Tensor
from trl.experimental.async_distillation.async_distillation_trainer import _chunked_jsd_loss
from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

import fastkd
from fastkd import TopK

# Several chunks of _chunked_jsd_loss, the last one smaller; a vocabulary that is no multiple of a vector.
N, V, H, K, CHUNK = 21, 203, 16, 7, 8
DIVERGENCES: dict[float, Any] = {
    0.0: "forward_kl", 0.5: fastkd.divergences.jsd(0.5), 1.0: "reverse_kl"
}  # fmt: skip


def _operands(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states, head, the teacher's logits)"""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, teacher = (
        torch.randn(*size, generator=generator) for size in ((N, H), (V, H), (N, V))
    )
    return hidden.requires_grad_(), weight.mul_(0.4).requires_grad_(), 2.0 * teacher


def _agree(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    pairs = (torch.autograd.grad(loss, leaves) for loss in (ours, theirs))
    for found, expected in zip(*pairs, strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", list(DIVERGENCES))
@pytest.mark.parametrize("tail", [True, False])
def test_async_distillation(beta: float, tail: bool) -> None:
    hidden, weight, teacher = _operands(0)
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    real = torch.arange(K) < torch.arange(N).unsqueeze(-1) % K + 1
    theirs, *_ = _chunked_jsd_loss(
        hidden, weight, None, 0.5, 20.0, ids, logprobs, real, beta, 1.5, tail, None, 1, CHUNK
    )
    support = TopK(
        ids.where(real, -1), logprobs, tail="bucket" if tail else "renormalize", temperature=1.5
    )
    ours = fastkd.fused_linear_kd_loss(
        hidden, weight, support, divergence=DIVERGENCES[beta], temperature=1.5, logit_scale=0.5,
        softcap=20.0, scale_by_temperature=False, reduction="sum",
    )  # fmt: skip
    _agree(ours, theirs, hidden, weight)


@pytest.mark.parametrize("alpha", list(DIVERGENCES))
@pytest.mark.parametrize("tail", [True, False])
def test_self_distillation_on_the_students_tokens(alpha: float, tail: bool) -> None:
    hidden, weight, teacher = _operands(1)
    logits = (hidden @ weight.T).detach().requires_grad_()
    theirs = compute_topk_self_distillation_loss(
        logits, teacher, distillation_topk=K, distillation_alpha=alpha, distillation_add_tail=tail
    )
    ids = fastkd.student_topk(logits, k=K).ids
    support = TopK(
        ids, teacher.log_softmax(-1).gather(-1, ids), tail="bucket" if tail else "renormalize"
    )
    ours = fastkd.kd_loss(logits, support, divergence=DIVERGENCES[alpha], reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    _agree(ours.sum(), theirs.sum(), logits)


@pytest.mark.parametrize("stack", ["TRL", "Liger"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_log_probabilities_and_entropies(stack: str, temperature: float) -> None:
    hidden, weight, teacher = _operands(2)
    targets = teacher.argmax(-1)
    upstream = torch.randn(2, N, generator=torch.Generator().manual_seed(3))
    if stack == "TRL":
        target, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, temperature, 64, None, 1.0, ("entropy",)
        )
    else:
        loss, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden, weight, targets, temperature, -100, 1, True
        )
        target = -loss
    outputs = fastkd.fused_linear_logprobs(hidden, weight, targets, temperature=temperature)
    assert outputs.target is not None and outputs.entropy is not None
    torch.testing.assert_close(outputs.target, target, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.entropy, entropy, rtol=1e-4, atol=1e-5)
    ours, theirs = (
        (pair[0] * upstream[0] + pair[1] * upstream[1]).sum()
        for pair in ((outputs.target, outputs.entropy), (target, entropy))
    )
    _agree(ours, theirs, hidden, weight)


def test_verls_and_veomnis_formula() -> None:
    """Sum over the teacher's tokens of p (log p - log q), of all tokens as they are: no tail, no renormalization."""
    hidden, weight, teacher = _operands(4)
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    doubled = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    log_p = logprobs.double()
    log_q = (doubled[0] @ doubled[1].T).log_softmax(-1).gather(-1, ids)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    support = TopK(ids, logprobs, tail="truncate")
    ours = fastkd.fused_linear_kd_loss(hidden, weight, support, divergence="forward_kl")
    logits = (hidden @ weight.T).detach().requires_grad_()
    dense = fastkd.kd_loss(logits, support, divergence="forward_kl")
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense, ours)
    pairs = torch.autograd.grad(ours, [hidden, weight]), torch.autograd.grad(exact, doubled)
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
