"""Mutual learning in plain PyTorch, pair by pair: the oracle of the kernels, which the portable backend runs too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.call.contract import Rows, row_dtype
from fastkd.call.log_zero import evaluate
from fastkd.call.mutual import Options, Result, gradient_dtype
from fastkd.core.tensors import precision
from fastkd.divergences import forward_kl


def _kl(log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row."""
    phi, *_ = evaluate(forward_kl(), log_p, log_q, (p, q))
    return phi.sum(-1)


def mutual_rows(
    logits: Sequence[Tensor],
    rows: Rows,
    options: Options,
    wanted: Sequence[bool],
    parts: bool,
) -> Result:
    """Compute the losses and gradients as :mod:`fastkd.backends.reference` does."""
    dtype, students = precision(logits[0].device), len(logits)
    output_dtype = row_dtype(logits[0].dtype)
    z = [student.to(dtype) for student in logits]
    z = [student - student.amax(-1, keepdim=True) for student in z]

    def softmax(centered: Tensor) -> tuple[Tensor, Tensor]:
        exps = centered.exp()
        exp_sum = exps.sum(-1, keepdim=True, dtype=torch.float64)
        return centered - exp_sum.log().to(dtype), exps / exp_sum.to(dtype)

    tempered = [softmax(student / options.temperature) for student in z]
    t_squared = options.temperature**2 if options.scale_by_temperature else 1.0
    share = 1.0 if options.peers == "sum" else 1.0 / (students - 1)
    weight = torch.ones(logits[0].shape[:-1], dtype=dtype, device=logits[0].device)
    if rows.weight is not None:
        weight = rows.weight.to(dtype)
    counted, labels = weight != 0, rows.labels
    if labels is not None:
        counted = counted & (labels != options.ignore_index)
        valid = (labels >= 0) & (labels < z[0].shape[-1])
        weight = torch.where(valid, weight, torch.nan)  # an invalid label makes its row NaN
        labels = torch.where(valid, labels, 0).unsqueeze(-1)
    scale = options.scale if rows.scale is None else options.scale * rows.scale.to(dtype)

    divergences, entropies, gradients = [], [], []
    for k in range(students):
        log_q, q = tempered[k]
        others = [pair for index, pair in enumerate(tempered) if index != k]
        divergence = torch.zeros_like(weight)
        if options.peers == "average":
            mean = sum((p for _, p in others), torch.zeros_like(q)) * share
            divergence = _kl(mean.log(), mean, log_q, q)
        else:
            for log_p, p in others:
                divergence = divergence + share * _kl(log_p, p, log_q, q)
        factor = options.peer_weight * t_squared
        divergences.append(divergence * factor if factor else torch.zeros_like(divergence))
        gradient = sum((q - p for _, p in others), torch.zeros_like(q))
        gradient = gradient * (factor * share / options.temperature)
        cross_entropy = torch.zeros_like(weight)
        if labels is not None:
            log_q, q = softmax(z[k])
            cross_entropy = -log_q.gather(-1, labels).squeeze(-1)
            gradient = gradient + q.scatter_add(-1, labels, -torch.ones_like(q[..., :1]))
        entropies.append(cross_entropy)
        gradient = torch.where(
            counted.unsqueeze(-1), gradient * (weight * scale).unsqueeze(-1), 0.0
        )
        gradients.append(gradient.to(gradient_dtype(logits[k].dtype)) if wanted[k] else None)

    def select(values: list[Tensor]) -> Tensor:
        return torch.where(counted, torch.stack(values), 0.0)

    divergence, cross_entropy = select(divergences), select(entropies)
    loss = torch.where(counted, (divergence + cross_entropy) * weight, 0.0)
    total = loss.reshape(students, -1).sum(-1) * scale
    result = Result(loss.to(output_dtype), total.to(output_dtype), tuple(gradients))
    if not parts:
        return result
    return result._replace(
        divergence=divergence.to(output_dtype), cross_entropy=cross_entropy.to(output_dtype)
    )
