"""Adaptive KL: forward and reverse KL, weighted by where student and teacher differ."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.call.checks import check_choice
from fastkd.call.contract import Options, Rows, Want, row_dtype
from fastkd.core.scalars import check_number
from fastkd.divergences import forward_kl, reverse_kl
from fastkd.engine.graphs import as_one_op
from fastkd.response.chunks import (
    Outcome,
    Wanted,
    as_column,
    both_widened,
    by_rows,
    chunk_rows,
    differentiable,
    kernels_of,
    prepared,
    returned,
    row_sum,
    softmax_of,
)

# How many tokens are searched first. Most teachers have half of their mass in fewer.
FIRST_TOKENS = 64


@as_one_op(returned)
def adaptive_kl_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    head_mass: float = 0.5,
    crossing: str = "head",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Adaptive KL (AKL, Wu et al. 2024): forward and reverse KL, weighted by where student and teacher differ.

        T^2 (w_h KL(p || q) + w_t KL(q || p)),    w_h = G_h / (G_h + G_t),    w_t = G_t / (G_h + G_t)

    G_h and G_t are sum |p - q| over the head and the tail of the row. The head is the smallest set of the teacher's
    most probable tokens that holds head_mass; the tail is all other tokens. The gradient treats the weights as
    constants. A row with p = q has loss and gradient 0. Tokens with equal logits are ordered by token id, as in a
    stable sort.

    Rows are not sorted. The head is searched among the teacher's 64 most probable tokens, then among eight times as
    many for the rows where these do not hold enough.

    Args:
        student_logits: [..., V].
        teacher: dense logits [..., V]; if they require grad, they get a gradient.
        labels: [...] int64; a row whose label is ignore_index is dropped.
        head_mass: in (0, 1).
        crossing: where the token goes whose probability brings the sum past head_mass. "head": the head holds at least
            head_mass, as in the paper. "tail": the head holds at most head_mass, or one token, as in the paper's code.
        temperature: as in :func:`fastkd.kd_loss`, like all options that are not listed here.
        memory_budget: the most bytes that a chunk may take; None: 32 MB on a CPU, 1 GB elsewhere, at least one row.

    Returns:
        The loss: 0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the requested backend cannot serve this call.

    Memory: the gradient, and one chunk.
    """
    head_mass = check_number("head_mass", head_mass, 0.0, 1.0, open_right=True)
    if head_mass == 0.0:
        raise ValueError("head_mass must be in (0, 1), got 0.0")
    check_choice("crossing", crossing, ("head", "tail"))
    student, teacher, call = prepared(
        student_logits, teacher, labels, vocab_size,
        temperature=temperature, teacher_temperature=teacher_temperature,
        scale_by_temperature=scale_by_temperature, ignore_index=ignore_index, mask=mask, weight=weight,
        reduction=reduction, num_items=num_items, backend=backend,
    )  # fmt: skip
    kernels, extra = kernels_of(call, student, teacher)

    def of_chunk(s: Tensor, t: Tensor, rows: Rows, options: Options, wanted: Wanted) -> Outcome:
        s, t = both_widened(s, t)
        share = _head_share(s, t, rows, options, head_mass, crossing)
        weights = torch.ones_like(share) if rows.weight is None else rows.weight
        outcomes = []
        for divergence, part in ((forward_kl(), share), (reverse_kl(), 1.0 - share)):
            weighted = rows._replace(weight=(weights * part).to(s.dtype), labels=None)
            options = options._replace(divergence=divergence)
            outcomes.append(kernels.kd_rows(s, t, weighted, options, Want(*wanted)))
        first, second = outcomes
        for gradient, reverse in zip(first[2:4], second[2:4], strict=True):
            if gradient is not None:
                gradient.add_(reverse)
        return Outcome(first.loss + second.loss, *first[2:4])

    width = call.options.vocab_size
    size = chunk_rows(
        memory_budget, width, row_dtype(student.dtype, teacher.dtype), student.device, extra
    )
    compute = by_rows(size, of_chunk, (width, width))
    return differentiable(student, teacher, call, compute)


def _head_share(
    student: Tensor, teacher: Tensor, rows: Rows, options: Options, mass: float, crossing: str
) -> Tensor:
    """G_h / (G_h + G_t) of each row, [C] float64; 1/2 where both are 0."""
    dtype = student.dtype
    q = softmax_of(student, as_column(options.temperature, rows.temperature), dtype)
    tempering = as_column(options.teacher_temperature, rows.teacher_temperature)
    p = softmax_of(teacher, tempering, dtype)
    lowest, tied = _head(teacher, p, mass, crossing)
    # Where both sides are sure of a token, its gap is the difference of the others' sums: q - p has lost its digits.
    top = p.argmax(-1, keepdim=True)
    top_gap = (_sum_of_others(q, top) - _sum_of_others(p, top)).abs_()
    gap = q.sub_(p).abs_().scatter_(-1, top, top_gap.to(dtype))
    total = row_sum(gap).squeeze(-1)
    equal = teacher == lowest.unsqueeze(-1)
    # Of the tokens with the lowest logit in the head, the first `tied` by token id belong to the head.
    head = equal & (equal.cumsum(-1, dtype=torch.int32) <= tied.unsqueeze(-1))
    head |= teacher > lowest.unsqueeze(-1)
    share = row_sum(gap.masked_fill_(~head, 0.0)).squeeze(-1) / total
    return torch.where(total == 0, 0.5, share.clamp(max=1.0))


def _sum_of_others(values: Tensor, column: Tensor) -> Tensor:
    """The sum of each row without one column, [C, 1] float64; column is [C, 1]."""
    kept = values.gather(-1, column)
    total = row_sum(values.scatter_(-1, column, 0.0))
    values.scatter_(-1, column, kept)
    return total


def _head(teacher: Tensor, p: Tensor, mass: float, crossing: str) -> tuple[Tensor, Tensor]:
    """Return (the lowest logit in the head of each row, how many tokens with that logit are in the head), [C]."""
    count, width = teacher.shape
    lowest = torch.empty(count, dtype=teacher.dtype, device=teacher.device)
    tied = torch.empty(count, dtype=torch.int64, device=teacher.device)
    rows, k = torch.arange(count, device=teacher.device), min(FIRST_TOKENS, width)
    while True:
        row_logits, row_p = (teacher, p) if rows.numel() == count else (teacher[rows], p[rows])
        logits, ids = row_logits.topk(k, dim=-1)
        held = row_p.gather(-1, ids).to(torch.float64).cumsum(-1)
        within = held < mass if crossing == "head" else held <= mass
        size = (within.sum(-1) + (crossing == "head")).clamp(min=1, max=k)
        last = logits.gather(-1, (size - 1).unsqueeze(-1))
        lowest[rows] = last.squeeze(-1)
        tied[rows] = size - (logits > last).sum(-1)
        rows = rows[~(held[:, -1] > mass)]
        if k == width or not rows.numel():
            return lowest, tied
        k = min(8 * k, width)
