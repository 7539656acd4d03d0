"""Mutual learning in plain PyTorch, pair by pair: the oracle of the kernels, and what the portable backend runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.call.contract import Rows, row_dtype
from fastkd.call.log_zero import evaluate
from fastkd.call.mutual import Options, Result, gradient_dtype
from fastkd.core.tensors import precision
from fastkd.divergences import forward_kl


def _of_pair(log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of every row."""
    phi, *_ = evaluate(forward_kl(), log_p, log_q, (p, q))
    return phi.sum(-1)


def mutual_rows(
    logits: Sequence[Tensor],
    rows: Rows,
    options: Options,
    wanted: Sequence[bool],
    parts: bool,
) -> Result:
    """The reference, computed as :mod:`fastkd.backends.reference` is."""
    dtype, students = precision(logits[0].device), len(logits)
    of_rows = row_dtype(logits[0].dtype)
    z = [student.to(dtype) for student in logits]
    z = [student - student.amax(-1, keepdim=True) for student in z]

    def softmax(gap: Tensor) -> tuple[Tensor, Tensor]:
        powers = gap.exp()
        total = powers.sum(-1, keepdim=True, dtype=torch.float64)
        return gap - total.log().to(dtype), powers / total.to(dtype)

    tempered = [softmax(student / options.temperature) for student in z]
    t_squared = options.temperature**2 if options.scale_by_temperature else 1.0
    share = 1.0 if options.peers == "sum" else 1.0 / (students - 1)
    weight = torch.ones(logits[0].shape[:-1], dtype=dtype, device=logits[0].device)
    if rows.weight is not None:
        weight = rows.weight.to(dtype)
    keep, labels = weight != 0, rows.labels
    if labels is not None:
        keep = keep & (labels != options.ignore_index)
        valid = (labels >= 0) & (labels < z[0].shape[-1])
        weight = torch.where(valid, weight, torch.nan)  # an invalid label poisons its row
        labels = torch.where(valid, labels, 0).unsqueeze(-1)
    scale = options.scale if rows.scale is None else options.scale * rows.scale.to(dtype)

    divergences, entropies, gradients = [], [], []
    for k in range(students):
        log_q, q = tempered[k]
        others = [pair for index, pair in enumerate(tempered) if index != k]
        divergence = torch.zeros_like(weight)
        if options.peers == "average":
            mean = sum((p for _, p in others), torch.zeros_like(q)) * share
            divergence = _of_pair(mean.log(), mean, log_q, q)
        else:
            for log_p, p in others:
                divergence = divergence + share * _of_pair(log_p, p, log_q, q)
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
        gradient = torch.where(keep.unsqueeze(-1), gradient * (weight * scale).unsqueeze(-1), 0.0)
        gradients.append(gradient.to(gradient_dtype(logits[k].dtype)) if wanted[k] else None)

    def kept(values: list[Tensor]) -> Tensor:
        return torch.where(keep, torch.stack(values), 0.0)

    divergence, cross_entropy = kept(divergences), kept(entropies)
    loss = torch.where(keep, (divergence + cross_entropy) * weight, 0.0)
    total = loss.reshape(students, -1).sum(-1) * scale
    by_products = (divergence.to(of_rows), cross_entropy.to(of_rows)) if parts else (None, None)
    return Result(loss.to(of_rows), total.to(of_rows), tuple(gradients), *by_products)
