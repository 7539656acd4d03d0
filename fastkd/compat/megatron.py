r"""Megatron-LM's distillation loss on a teacher's cached top-k log-probabilities.

    from fastkd.compat.megatron import topk_kl_div  # was: megatron.training.distillation.cached_logits_loss

Megatron need not be installed. For dense tensor-parallel logits Megatron uses Model-Optimizer's losses; their adapters
are LogitsKLLoss and TopKLogitsKLLoss in fastkd.compat.modelopt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastkd.functional import kd_loss
from fastkd.teachers import TopK

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SENTINEL = -1e3  # the log-probability that marks an entry as padding


def topk_kl_div(
    student_logits: Tensor,
    teacher_topk_logprobs: Tensor,
    teacher_topk_indices: Tensor,
    tp_size: int,
    tp_rank: int,
    tp_group: ProcessGroup | None,
    add_ghost_token: bool = False,
) -> Tensor:
    r"""Forward KL over the teacher's top-k tokens, sum p_k (log p_k - log q_k), with q over the whole vocabulary.

    With add_ghost_token one additional event stands for all other tokens, with p = 1 - sum p_k and q = 1 - sum q_k.
    Without it the sum is not a divergence and can be negative. (These are the tails "bucket" and "truncate" of
    :class:`fastkd.TopK`.)

    Megatron's callers sum the loss over tp_group, so tp_rank 0 returns the loss and the other ranks return 0; every
    rank gets its full gradient. Megatron's function subtracts the maximum from float32 student_logits in place, and its
    q of the ghost token is only rounding error, or 1e-8, if the student is certain of the k tokens. Here that q is the
    sum over the other tokens, and student_logits are not modified.

    Args:
        student_logits: [s, b, V_r], this process's columns of the vocabulary, the same number on every process.
        teacher_topk_logprobs: [s, b, K], natural logarithms at temperature 1; -1e3 marks padding.
        teacher_topk_indices: [s, b, K], distinct token ids of the whole vocabulary.
        tp_size: the number of processes that share the vocabulary.
        tp_rank: the rank of this process among them.
        tp_group: the process group of these processes; ignored if tp_size is 1.
        add_ghost_token: add an event for the remaining probability.

    Returns:
        The loss of each token, [b, s].

    Raises:
        ValueError, TypeError: an argument has the wrong shape or dtype, or tp_size is more than 1 without a tp_group.
    """
    if tp_size > 1 and tp_group is None:
        raise ValueError(
            f"tp_group must be the process group of the tp_size={tp_size} processes, got None"
        )
    if student_logits.dim() != 3:
        raise ValueError(f"student_logits must be [s, b, V], got {tuple(student_logits.shape)}")
    lead = student_logits.shape[:-1]
    for name, value in (
        ("teacher_topk_logprobs", teacher_topk_logprobs),
        ("teacher_topk_indices", teacher_topk_indices),
    ):
        if value.dim() != 3 or value.shape[:-1] != lead:
            raise ValueError(
                f"{name} must be [s, b, K] with [s, b] = {tuple(lead)}, got {tuple(value.shape)}"
            )
    if not teacher_topk_logprobs.is_floating_point() or teacher_topk_indices.is_floating_point():
        raise TypeError(
            "teacher_topk_logprobs must be floating point and teacher_topk_indices integers, got "
            f"{teacher_topk_logprobs.dtype} and {teacher_topk_indices.dtype}"
        )
    if teacher_topk_logprobs.shape != teacher_topk_indices.shape:
        raise ValueError(
            f"teacher_topk_indices must have the shape of teacher_topk_logprobs, {tuple(teacher_topk_logprobs.shape)}; "
            f"got {tuple(teacher_topk_indices.shape)}"
        )
    ids = teacher_topk_indices.masked_fill(teacher_topk_logprobs == SENTINEL, -1)
    tail = "bucket" if add_ghost_token else "truncate"
    teacher = TopK(ids, teacher_topk_logprobs.detach(), tail=tail)
    loss = kd_loss(
        student_logits,
        teacher,
        reduction="none",
        process_group=tp_group if tp_size > 1 else None,
    )
    if tp_rank > 0:
        loss = loss - loss.detach()
    return loss.transpose(0, 1).contiguous()
