"""SkyRL: the losses of its draft heads, which learn to predict the policy's next tokens (multi-token prediction).

    import fastkd.compat.skyrl

    fastkd.compat.skyrl.register()  # SkyRL's draft losses are fastkd's from now on

docs/stacks/skyrl.md lists what differs.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkd.call.checks import check_pair, check_per_row
from fastkd.divergences import soft_cross_entropy
from fastkd.functional import kd_loss
from fastkd.teachers import TopK

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def draft_soft_ce(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    global_normalization_factor: Tensor | None = None,
    vocab_parallel_group: ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """``skyrl.backends.skyrl_train.mtp.soft_ce.draft_soft_ce``: the soft cross-entropy -sum p log q, a masked mean.

    Its gradient is that of KL(p || q); its value is larger by the teacher's entropy.

    Args:
        student_logits: [B, S, V], the draft head's; with vocab_parallel_group, this process's columns.
        teacher_logits: the policy's, with the same columns, aligned with the student's and detached.
        mask: [B, S], 1 for positions that count; other numbers weight the loss of a position.
        global_normalization_factor: the divisor; None: the sum of the mask. A divisor below 1 becomes 1.
        vocab_parallel_group: the processes that share the vocabulary.
        chunk_size: accepted, but without effect: probabilities are never stored.

    Returns:
        The loss, 0-dim, float32.

    Raises:
        ValueError, TypeError: teacher_logits requires grad, or an argument has the wrong shape, dtype or device.
    """
    _check(student_logits, teacher_logits, mask)
    return _masked_mean(
        student_logits, teacher_logits, mask, global_normalization_factor, vocab_parallel_group
    )


def draft_soft_ce_topk(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    k: int,
    global_normalization_factor: Tensor | None = None,
    vocab_parallel_group: ProcessGroup | None = None,
    roll_shift: int = 0,
) -> Tensor:
    """``skyrl.backends.skyrl_train.mtp.soft_ce.draft_soft_ce_topk``: both softmaxes over the teacher's top k only.

    With vocab_parallel_group, each process contributes the top k of its own columns, as in SkyRL.

    Args:
        student_logits: as in :func:`draft_soft_ce`.
        teacher_logits: as in :func:`draft_soft_ce`, but not aligned if roll_shift is not 0.
        mask: as in :func:`draft_soft_ce`.
        k: the number of tokens; if there are fewer columns, all are taken.
        global_normalization_factor: as in :func:`draft_soft_ce`.
        vocab_parallel_group: as in :func:`draft_soft_ce`.
        roll_shift: position t learns from the teacher's position t + roll_shift.

    Returns:
        The loss, 0-dim, float32.

    Raises:
        ValueError, TypeError: as :func:`draft_soft_ce`.
    """
    _check(student_logits, teacher_logits, mask)
    columns = teacher_logits.shape[-1]
    values, ids = teacher_logits.topk(min(int(k), columns), dim=-1)
    if roll_shift:
        values, ids = (x.roll(-int(roll_shift), dims=1) for x in (values, ids))
    group = vocab_parallel_group
    if group is not None and torch.distributed.get_world_size(group) > 1:
        widths = _gathered(torch.tensor([columns], device=ids.device), group)
        ids = ids + widths[: torch.distributed.get_rank(group)].sum()
        smallest = int(widths.min())
        if values.shape[-1] > smallest:
            raise ValueError(
                f"k must be at most {smallest}, the columns of the smallest shard; got {k}"
            )
        values, ids = _gathered(values, group), _gathered(ids, group)
    teacher = TopK(ids, values, tail="renormalize")
    return _masked_mean(student_logits, teacher, mask, global_normalization_factor, group)


_REMEDY = "If one vocabulary is padded, remove the columns of its padding"


def _check(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> None:
    check_pair(
        "teacher_logits", teacher_logits, "student_logits", student_logits, _REMEDY, lowest=3
    )
    check_per_row("mask", mask, student_logits.shape[:-1], None)
    if teacher_logits.requires_grad:
        raise ValueError(
            "teacher_logits must be detached: the draft loss must not train the policy; got a tensor that requires grad"
        )


def _masked_mean(
    student_logits: Tensor,
    teacher: Tensor | TopK,
    mask: Tensor,
    divisor: Tensor | None,
    group: ProcessGroup | None,
) -> Tensor:
    weight = mask.to(torch.float32)
    loss = kd_loss(
        student_logits,
        teacher,
        divergence=soft_cross_entropy(),
        mask=weight != 0,
        weight=weight,
        reduction="sum",
        process_group=group,
    )
    return loss / (weight.sum() if divisor is None else divisor).clamp(min=1.0)


def _gathered(values: Tensor, group: ProcessGroup) -> Tensor:
    """Concatenate the tensors [..., k] of all processes along the last dimension, in rank order."""
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def register() -> None:
    """Make SkyRL use these functions. Call it in every worker process, before training starts.

    Raises:
        ImportError: SkyRL is not installed.
    """
    soft_ce = importlib.import_module("skyrl.backends.skyrl_train.mtp.soft_ce")
    for function in (draft_soft_ce, draft_soft_ce_topk):
        original = getattr(soft_ce, function.__name__)
        # SkyRL's Megatron worker has imported the functions by name, so its module has references of its own.
        for name, module in list(sys.modules.items()):
            if name.startswith("skyrl.") and vars(module).get(function.__name__) is original:
                setattr(module, function.__name__, function)
