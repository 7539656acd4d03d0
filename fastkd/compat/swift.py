"""ms-swift: the loss of its trainer for GKD, on dense teachers and on a teacher's top-k tokens.

    import swift.rlhf_trainers.gkd_trainer as gkd_trainer
    from fastkd.compat.swift import gkd_loss

    gkd_trainer.gkd_loss = gkd_loss

docs/stacks/swift.md lists what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd.divergences import jsd
from fastkd.functional import kd_loss
from fastkd.teachers import TopK

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gkd_loss(
    student_logits: Tensor,
    teacher_output: Any,
    labels: Tensor,
    beta: float,
    temperature: float,
    gather_fn: Callable[..., Tensor] | None = None,
    log_softmax_fn: Callable[..., Tensor] | None = None,
    kl_div_fn: Callable[..., Tensor] | None = None,
    chunk_size: int = 512,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """``swift.rlhf_trainers.gkd_loss.gkd_loss``: the sum of the generalized JSD over the rows that have a label.

        beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q

    with p and q the softmaxes of logits / temperature. beta = 0 is defined as forward KL, beta = 1 as reverse KL. There
    is no factor T^2. If the teacher lists its top-k tokens, both softmaxes are over these alone (the tail "renormalize"
    of :class:`fastkd.TopK`), and rows without any listed token do not count.

    If the vocabularies differ in width, ms-swift appends the extra logits of the wider model to those of the narrower
    one. In these columns, p and q then differ only by their normalizers. If the student is the wider model, the extra
    logits get a gradient through both p and q.

    Args:
        student_logits: [B, S, V].
        teacher_output: has full_logits [B', S', V], or topk_logprobs and topk_indices [B', S', K]. Its labels are
            [B', S'], or None if its rows match the student's. Entries with log-probability -inf are padding.
        labels: [B, S], already shifted; rows with -100 do not count.
        beta: in [0, 1].
        temperature: T > 0.
        gather_fn: must be None. ms-swift's functions for tensor parallelism are replaced by process_group.
        log_softmax_fn: must be None.
        kl_div_fn: must be None.
        chunk_size: accepted, but without effect: probabilities are never stored.
        process_group: the processes that share the vocabulary, as in :func:`fastkd.kd_loss`.

    Returns:
        (the sum, the number of rows that count).

    Raises:
        TypeError, ValueError: an argument has the wrong shape, dtype or value, the teacher has neither kind of tensors,
            or the two models have different numbers of labels.
    """
    for name, function in (
        ("gather_fn", gather_fn),
        ("log_softmax_fn", log_softmax_fn),
        ("kl_div_fn", kl_div_fn),
    ):
        if function is not None:
            raise ValueError(
                f"{name} must be None; pass process_group=, the processes that share the vocabulary"
            )
    ids, dense = teacher_output.topk_indices, teacher_output.full_logits
    sparse = ids is not None and teacher_output.topk_logprobs is not None
    if not sparse and dense is None:
        raise ValueError(
            "teacher_output must have full_logits, or topk_logprobs and topk_indices; got neither"
        )
    counted = labels != -100
    target = teacher_output.topk_logprobs if sparse else dense
    other = counted if teacher_output.labels is None else teacher_output.labels != -100
    if other.shape != counted.shape or bool((other != counted).any()):
        student_logits, target = student_logits[counted], target[other]
        if len(student_logits) != len(target):
            raise ValueError(
                f"teacher_output.labels must have as many rows other than -100 as labels, {len(student_logits)}; "
                f"got {len(target)}"
            )
        ids = ids[other] if sparse else None
        counted = torch.ones(len(target), dtype=torch.bool, device=target.device)
    if sparse:
        missing = target == -torch.inf
        counted = counted & ~missing.all(dim=-1)
        teacher: Tensor | TopK = TopK(ids.masked_fill(missing, -1), target.detach(), "renormalize")
    else:
        student_logits, teacher = _of_one_width(student_logits, target)
    loss = kd_loss(
        student_logits,
        teacher,
        divergence=jsd(beta),
        temperature=temperature,
        scale_by_temperature=False,
        mask=counted,
        reduction="sum",
        process_group=process_group,
    )
    return loss, counted.sum()


def _of_one_width(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Append the extra columns of the wider logits to the narrower ones."""
    width, other = student.shape[-1], teacher.shape[-1]
    if width < other:
        student = torch.cat([student, teacher[..., width:].to(student.dtype)], dim=-1)
    elif other < width:
        teacher = torch.cat([teacher, student[..., other:].to(teacher.dtype)], dim=-1)
    return student, teacher
