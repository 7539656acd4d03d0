"""Universal logit distillation, for models with different tokenizers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.call.contract import Options, Rows, row_dtype
from fastkd.core.scalars import check_int
from fastkd.engine.graphs import as_one_op
from fastkd.response.chunks import (
    Outcome,
    Wanted,
    as_column,
    by_rows,
    chunk_rows,
    differentiable,
    factors_of,
    prepared,
    returned,
    row_sum,
    softmax_of,
    to_logits,
)


@as_one_op(returned)
def uld_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_by_temperature: bool = False,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    r"""Universal logit distillation (ULD, Boizard et al. 2024), for models with different tokenizers.

        sum_i |p_(i) - q_(i)|,    p_(1) >= p_(2) >= ..., q_(1) >= q_(2) >= ...

    The shorter of the two is padded with 0. This is the Wasserstein distance if all tokens are equally far from each
    other. The gradient of the i-th largest probability goes to the token that has it; tokens with equal logits are
    ordered by token id.

    Both models have one row per position. Different tokenizers give answers of different lengths.
    :func:`common_positions` selects as many positions of each answer as the shorter one has, like the authors' code.

    Args:
        student_logits: [..., V].
        teacher: dense logits [..., W] of the same leading shape; if they require grad, they get a gradient.
        labels: [...] int64; a row whose label is ignore_index is dropped.
        temperature: T > 0, or a float tensor [...] with one per row.
        teacher_temperature: the teacher's temperature, in the same forms; None: the student's.
        scale_by_temperature: multiply by the student's T^2. Off by default, as in the authors' code.
        ignore_index: the label that drops a row.
        mask: [...] bool; a row where it is False is dropped.
        weight: [...] float, multiplies the loss of a row.
        reduction: "none", "sum", "mean", "batchmean", as in :func:`fastkd.kd_loss`. The authors' code takes the
            mean over each answer and then over answers: for that, pass weight = 1 / (rows of the row's answer) and
            num_items = number of answers.
        num_items: as in :func:`fastkd.kd_loss`.
        memory_budget: as in :func:`fastkd.response.adaptive_kl_loss`.

    Returns:
        The loss: 0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.

    Memory: the gradient, and one chunk with the order of its tokens.
    """
    student, teacher, call = prepared(
        student_logits, teacher, labels, None, unequal=True,
        temperature=temperature, teacher_temperature=teacher_temperature,
        scale_by_temperature=scale_by_temperature, ignore_index=ignore_index, mask=mask, weight=weight,
        reduction=reduction, num_items=num_items,
    )  # fmt: skip
    widths = (student.shape[-1], teacher.shape[-1])
    dtype = row_dtype(student.dtype, teacher.dtype)
    size = chunk_rows(memory_budget, max(widths), dtype, student.device)
    compute = by_rows(size, _sorted_distance, widths)
    return differentiable(student, teacher, call, compute)


def _sorted_distance(
    student: Tensor, teacher: Tensor, rows: Rows, options: Options, wanted: Wanted
) -> Outcome:
    dtype = row_dtype(student.dtype, teacher.dtype)
    temperatures = (
        as_column(options.temperature, rows.temperature),
        as_column(options.teacher_temperature, rows.teacher_temperature),
    )
    sides, orders = [], []
    for logits, temperature in zip((student, teacher), temperatures, strict=True):
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        sides.append(softmax_of(ordered, temperature, dtype))
        orders.append(order)
    common = min(student.shape[1], teacher.shape[1])
    gap = sides[0][:, :common] - sides[1][:, :common]
    total = row_sum(gap.abs()) + sum(row_sum(x[:, common:]) for x in sides)
    weight, factor = factors_of(rows, options, dtype)
    gradients: list[Tensor | None] = [None, None]
    for side, sign in ((0, 1.0), (1, -1.0)):
        if wanted[side]:
            # Beyond the vocabulary of the other model, the distance is the probability itself.
            g = torch.ones_like(sides[side])
            g[:, :common] = gap.sign().mul_(sign)
            g = to_logits(g, sides[side], temperatures[side], factor)
            gradients[side] = torch.empty_like(g).scatter_(-1, orders[side], g)
    return Outcome((total.to(dtype) * weight).squeeze(-1), *gradients)


def common_positions(
    student_labels: Tensor, teacher_labels: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Masks of the positions at which answers in two tokenizations are compared.

    They select the first positions of each answer, as many as the shorter one has.

        s, t = common_positions(student_labels[:, 1:], teacher_labels[:, 1:])
        uld_loss(student_logits[:, :-1][s], teacher_logits[:, :-1][t])

    Args:
        student_labels: [B, S] int64, ignore_index at positions without a token of the answer.
        teacher_labels: [B, R] int64, the same answers in the tokens of the other tokenizer.
        ignore_index: the label of such positions.

    Returns:
        Bool masks [B, S] and [B, R]; each row has equally many True positions in both.

    Raises:
        ValueError, TypeError: the labels are not two int64 tensors with one row per answer, on one device.
    """
    for name, value in (("student_labels", student_labels), ("teacher_labels", teacher_labels)):
        if not isinstance(value, Tensor) or value.dtype != torch.int64:
            raise TypeError(
                f"{name} must be an int64 tensor, got {getattr(value, 'dtype', value)!r}"
            )
        if value.dim() != 2:
            raise ValueError(f"{name} must be [answers, positions], got shape {tuple(value.shape)}")
    if len(student_labels) != len(teacher_labels) or student_labels.device != teacher_labels.device:
        raise ValueError(
            f"teacher_labels must have {len(student_labels)} rows on {student_labels.device}, like student_labels; "
            f"got {len(teacher_labels)} on {teacher_labels.device}"
        )
    ignore_index = check_int("ignore_index", ignore_index)
    counted = [labels != ignore_index for labels in (student_labels, teacher_labels)]
    length = torch.minimum(*(mask.sum(-1, keepdim=True) for mask in counted))
    student_mask, teacher_mask = (mask & (mask.cumsum(-1) <= length) for mask in counted)
    return student_mask, teacher_mask
