"""VeOmni: the distillation loss from hidden states, for VeOmni's models in verl with use_fused_kernels=True.

    from veomni.ops.kernels import cross_entropy
    from fastkd.compat.veomni import chunk_topk_distill_function

    cross_entropy.chunk_topk_distill_function = chunk_topk_distill_function

docs/stacks/verl.md lists what differs.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

import fastkd


def chunk_topk_distill_function(
    hidden_states: Tensor,
    weights: Tensor,
    labels: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_log_probs: Tensor,
    chunk_size: int = 1024,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    temperature: float = 1.0,
    log_prob_min_clamp: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``veomni.ops.kernels.cross_entropy.chunk_topk_distill_function``: verl's losses from hidden states and lm_head.

        distillation_losses = sum over the listed tokens of p (log p - log q)

    with p = exp(teacher_topk_log_probs) and q = softmax(hidden_states @ weights.T / temperature). All outputs come from
    one pass over the chunks (:func:`fastkd.fused_linear_logprobs`). With log_prob_min_clamp, log p and log q are
    clamped for the losses, but not for the masses.

    Args:
        hidden_states: [B, L, H] or [L, H].
        weights: [V, H].
        labels: [B, L] or [L]; not shifted, unless VeOmni's sequence parallelism is on.
        teacher_topk_ids: [B, L, K], token ids, distinct within each row whose loss is used.
        teacher_topk_log_probs: [B, L, K], natural logarithms. If labels are not shifted, row i describes the
            token at i.
        chunk_size: accepted, but without effect: chunks are as large as fastkd's memory budget allows.
        ignore_index: rows with this label are 0 in every output.
        shift_labels: labels that are shifted already, used instead of `labels`. Hidden states and the
            teacher's rows are then used as they are.
        temperature: divides the logits.
        log_prob_min_clamp: the smallest log-probability in the losses, or None.

    Returns:
        (log_probs, entropy, distillation_losses, student_mass, teacher_mass), float32 in the shape of labels. The first
        three are differentiable. If labels are not shifted, the last position is 0.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
    """
    padded = False
    if shift_labels is not None:
        labels = shift_labels
    elif not _sequence_parallel():
        padded = True
        labels, hidden_states = labels[..., 1:], hidden_states[..., :-1, :]
        teacher_topk_ids = teacher_topk_ids[..., 1:, :]
        teacher_topk_log_probs = teacher_topk_log_probs[..., 1:, :]
    outputs = fastkd.fused_linear_logprobs(
        hidden_states,
        weights,
        labels,
        ids=teacher_topk_ids,
        temperature=temperature,
        ignore_index=ignore_index,
    )
    assert outputs.target is not None and outputs.entropy is not None
    assert outputs.gathered is not None
    counted = labels != ignore_index
    # Dropped rows are -inf in gathered, and may hold anything in the teacher's tensors.
    log_q = outputs.gathered.masked_fill(~counted.unsqueeze(-1), 0.0)
    log_p = teacher_topk_log_probs.detach().float().masked_fill(~counted.unsqueeze(-1), -torch.inf)
    student_mass = torch.where(counted, log_q.detach().exp().sum(dim=-1), 0.0)
    teacher_mass = log_p.exp().sum(dim=-1)
    if log_prob_min_clamp is not None:
        log_p, log_q = log_p.clamp_min(log_prob_min_clamp), log_q.clamp_min(log_prob_min_clamp)
    p = log_p.exp()
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    losses = torch.where(counted, terms.sum(dim=-1), 0.0)
    results = (outputs.target, outputs.entropy, losses, student_mass, teacher_mass)
    if padded:
        results = tuple(torch.nn.functional.pad(result, (0, 1)) for result in results)  # type: ignore[assignment]
    return results


def _sequence_parallel() -> bool:
    """Whether VeOmni splits sequences among processes; labels are then shifted already."""
    state = importlib.import_module("veomni.distributed.parallel_state")
    return bool(state.get_parallel_state().sp_enabled)
