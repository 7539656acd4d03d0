"""TRL: the losses of its trainers for distillation, and these trainers with the losses computed by fastkd.

    from fastkd.compat.trl import GKDTrainer  # was: from trl.experimental.gkd import GKDTrainer
    from fastkd.compat.trl import DistillationTrainer  # was: from trl import DistillationTrainer
    from fastkd.compat.trl import SDFTTrainer  # was: from trl.experimental.sdft import SDFTTrainer
    from fastkd.compat.trl import SDPOTrainer  # was: from trl.experimental.sdpo import SDPOTrainer

GOLDTrainer, IWOPDTrainer, ServerDistillationTrainer and AsyncDistillationTrainer are imported in the same way.

TRL's conventions are kept: forward KL at beta = 0, reverse KL at beta = 1, and the generalized JSD of fastkd.jsd in
between; no T^2; the counted rows are those whose label is not -100, or whose mask is not 0. docs/stacks/trl.md lists
what differs.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd.call import log_zero
from fastkd.call.checks import check_choice, check_pair, check_per_row, check_side
from fastkd.core.models import is_partitioned, under_zero3
from fastkd.parallel.heads import Captured, Head, redirect
from fastkd.sampled.policy import position_weights
from fastkd.teachers import LinearTeacher

# TRL compares whole vocabularies, and its trainers refuse models whose vocab_size differs.
_REMEDY = (
    "TRL compares whole vocabularies. If the models differ only in padding of one tokenizer, resize both to the same "
    "width with resize_token_embeddings(), or cut the wider logits to the real tokens; across tokenizers use TRL's "
    "GOLDTrainer"
)
# The least probability in GOLD's divergence of probabilities.
_LEAST = 1e-8
# kd_loss's name for each reduction of TRL, for calls with labels.
_REDUCTIONS = {"batchmean": "mean", "sum": "sum", "mean": "mean", "none": "none"}


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """``trl.experimental.gkd.GKDTrainer.generalized_jsd_loss``: the generalized JSD of student and teacher.

        beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q

    with p the teacher's softmax(logits / temperature) and q the student's; forward KL at beta = 0, reverse KL at 1.

    Args:
        student_logits: [B, L, V], or any other leading shape; views such as logits[:, :-1] are not copied.
        teacher_logits: the same shape.
        labels: [B, L], already shifted; a row whose label is -100 is dropped.
        beta: in [0, 1].
        temperature: T > 0. There is no factor T^2.
        reduction: "batchmean": sum / number of counted rows, or without labels sum / B. "sum". "mean": with labels,
            "batchmean" divided by V; without, the mean over all elements. "none": the summand of every vocabulary
            entry, [counted rows, V], or without labels [B, L, V], computed in float32 by plain PyTorch.
        num_items_in_batch: the denominator, whatever the reduction is: the number of counted rows of the whole batch
            under gradient accumulation.

    Returns:
        The loss in float32 (TRL: in the dtype of the logits). With no counted row it is 0 and part of the graph (TRL's
        "mean" is NaN).

    Raises:
        ValueError, TypeError: as :func:`fastkd.kd_loss`; also for an unknown reduction, which TRL treats as "none".
    """
    check_choice("reduction", reduction, tuple(_REDUCTIONS))
    check_pair("teacher_logits", teacher_logits, "student_logits", student_logits, _REMEDY)
    check_per_row("labels", labels, student_logits.shape[:-1], dtype=None)
    mask = None if labels is None else labels != -100
    if num_items_in_batch is None and reduction == "none":
        return _entries(student_logits, teacher_logits, mask, beta, temperature)
    row_reduction = reduction if mask is None else _REDUCTIONS[reduction]
    loss = fastkd.kd_loss(
        student_logits,
        teacher_logits,
        divergence=fastkd.jsd(beta),
        temperature=temperature,
        scale_by_temperature=False,
        mask=mask,
        reduction=row_reduction if num_items_in_batch is None else "mean",
        num_items=_on(student_logits.device, num_items_in_batch),
    )
    per_entry = reduction == "mean" and num_items_in_batch is None
    return loss / student_logits.shape[-1] if per_entry else loss


def _entries(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    beta: float,
    temperature: float,
) -> Tensor:
    """Return the summands of the divergence for every entry of the counted rows, differentiable by autograd."""
    if mask is not None:
        student_logits, teacher_logits = student_logits[mask], teacher_logits[mask]
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_q, log_p = (
        torch.log_softmax(logits.to(dtype) / temperature, -1)
        for logits in (student_logits, teacher_logits)
    )
    return _summands(log_p, log_q, beta)


def _summands(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Return the summand of the divergence for each pair of logarithms, differentiable by autograd."""
    fastkd.jsd(beta)  # raises if beta is invalid
    # Clamp -inf, so that its product with a probability of 0 is 0. log_zero.evaluate has the same policy but is not
    # differentiable by autograd.
    lowest = torch.finfo(log_p.dtype).min
    p, q = log_p.exp(), log_q.exp()
    log_p_finite, log_q_finite = log_p.clamp(min=lowest), log_q.clamp(min=lowest)
    if beta in (0.0, 1.0):
        gap = log_p_finite - log_q_finite
        entries = -q * gap if beta else p * gap
    else:
        log_m = torch.logaddexp(log_p_finite + math.log(beta), log_q_finite + math.log1p(-beta))
        entries = beta * p * (log_p_finite - log_m) + (1.0 - beta) * q * (log_q_finite - log_m)
    excluded = (log_p == -torch.inf) | (log_q == -torch.inf)
    return entries.masked_fill(excluded & (entries > log_zero.INFINITE), torch.inf)


def _on(device: torch.device, count: int | Tensor | None) -> int | Tensor | None:
    return count.to(device) if isinstance(count, Tensor) else count


def gold_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """``trl.experimental.gold.GOLDTrainer.generalized_jsd_loss``: :func:`generalized_jsd_loss`, also of probabilities.

    With logits_are_probs, the two tensors have the probabilities of the tokens that both tokenizers have. Their sums
    may differ from 1. The divergence is the sum over these tokens, so it can be negative.

    Args:
        student_logits: [B, L, V], or any other leading shape. With logits_are_probs: probabilities; those
            below 1e-8 become 1e-8, without a gradient.
        teacher_logits: the same shape.
        labels: as in :func:`generalized_jsd_loss`.
        beta: as in :func:`generalized_jsd_loss`.
        temperature: T > 0. There is no factor T^2. It does not apply to probabilities.
        reduction: as in :func:`generalized_jsd_loss`.
        logits_are_probs: whether the tensors are probabilities.
        num_items_in_batch: as in :func:`generalized_jsd_loss`.

    Returns:
        As :func:`generalized_jsd_loss`.

    Raises:
        ValueError, TypeError: as :func:`generalized_jsd_loss`.
    """
    if not logits_are_probs:
        return generalized_jsd_loss(
            student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch
        )
    check_choice("reduction", reduction, tuple(_REDUCTIONS))
    check_pair("teacher_logits", teacher_logits, "student_logits", student_logits, _REMEDY)
    check_per_row("labels", labels, student_logits.shape[:-1], dtype=None)
    if labels is not None:
        student_logits, teacher_logits = (
            x[labels != -100] for x in (student_logits, teacher_logits)
        )
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    q, p = (x.to(dtype).clamp(min=_LEAST) for x in (student_logits, teacher_logits))
    if num_items_in_batch is None and reduction == "none":
        return _summands(p.log(), q.log(), beta)
    total = _loss_of_masses(q, p, beta).sum()
    if num_items_in_batch is not None:
        return total / torch.as_tensor(num_items_in_batch, device=total.device)
    divisors = {"sum": 1, "batchmean": student_logits.shape[0], "mean": student_logits.numel()}
    return total / max(divisors[reduction], 1)


def _loss_of_masses(q: Tensor, p: Tensor, beta: float) -> Tensor:
    """Return the divergence of each row of masses [..., K], which need not sum to 1.

    Both rows get one more column, which raises their sums to a common total. Divided by the total, they are
    distributions. kd_loss computes their divergence, the summand of the additional column is subtracted, and the result
    is multiplied by the total. This is exact, because a summand is proportional to the scale of q and p.
    """
    sums = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
    # At least 1 is left, so that the logarithm of the rest is as exact as the others.
    total = 1.0 + torch.maximum(*sums).detach()
    rests = [(total - mass).log() for mass in sums]
    of_student, of_teacher = (
        torch.cat([x.log(), rest], -1) for x, rest in zip((q, p), rests, strict=True)
    )
    rows = fastkd.kd_loss(of_student, of_teacher, divergence=fastkd.jsd(beta), reduction="none")
    log_q, log_p = (rest - total.log() for rest in rests)
    return (rows.unsqueeze(-1) - _summands(log_p, log_q, beta)).mul(total).squeeze(-1)


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``trl.trainer.distillation_trainer._chunked_divergence_loss``: the JSD from hidden states and lm_heads.

    It computes the divergence of :func:`generalized_jsd_loss` by :func:`fastkd.fused_linear_kd_loss`. The logits of
    each model are softcap tanh(scale (hidden @ weight.T + bias) / softcap), or scale (hidden @ weight.T + bias) without
    a softcap, and are then divided by the temperature.

    Args:
        student_hidden_states: [B, K, H].
        teacher_hidden_states: [B, K, H_t]; receives no gradient.
        student_lm_head_weight: [V, H]; cast to the dtype of the student's hidden states. A DTensor sharded by FSDP2 is
            gathered once, and its gradient is averaged over the processes like that of any other parameter.
        teacher_lm_head_weight: [V, H_t]; cast and gathered in the same way; receives no gradient.
        completion_mask: [B, K]; a row where it is 0 is dropped.
        beta: in [0, 1], as in :func:`generalized_jsd_loss`.
        num_items_in_batch: the denominator; None: the number of counted rows of this call, at least 1.
        student_lm_head_bias: [V], or None.
        teacher_lm_head_bias: [V], or None.
        student_logit_scale: not 0.
        teacher_logit_scale: not 0.
        student_final_logit_softcapping: > 0, or None.
        teacher_final_logit_softcapping: > 0, or None.
        temperature: T > 0. There is no factor T^2.

    Returns:
        (loss, sum over counted rows of the student's entropy in nats at this temperature, number of counted rows); the
        last two are detached.

    Raises:
        ValueError, TypeError: as :func:`fastkd.fused_linear_kd_loss`; also for an lm_head that DeepSpeed ZeRO-3 has
            partitioned and nothing has gathered.
    """
    _check_whole("student_lm_head_weight", student_lm_head_weight)
    _check_whole("teacher_lm_head_weight", teacher_lm_head_weight)
    for side, hidden, weight in (
        ("student", student_hidden_states, student_lm_head_weight),
        ("teacher", teacher_hidden_states, teacher_lm_head_weight),
    ):
        check_side(f"{side}_hidden_states", hidden, f"{side}_lm_head_weight", weight)
    rows = student_hidden_states.shape[:-1]
    if teacher_hidden_states.shape[:-1] != rows:
        raise ValueError(
            f"teacher_hidden_states must have the rows of student_hidden_states, {tuple(rows)}; got "
            f"{tuple(teacher_hidden_states.shape[:-1])}"
        )
    check_per_row("completion_mask", completion_mask, rows, dtype=None)
    if len(student_lm_head_weight) != len(teacher_lm_head_weight):
        raise ValueError(
            f"teacher_lm_head_weight must have the rows of student_lm_head_weight, {len(student_lm_head_weight)}; got "
            f"{len(teacher_lm_head_weight)}. {_REMEDY}"
        )
    student_dtype, teacher_dtype = student_hidden_states.dtype, teacher_hidden_states.dtype
    teacher = LinearTeacher(
        teacher_hidden_states.detach(),
        teacher_lm_head_weight.detach().to(teacher_dtype),
        None if teacher_lm_head_bias is None else teacher_lm_head_bias.detach().to(teacher_dtype),
    )
    loss, parts = fastkd.fused_linear_kd_loss(
        student_hidden_states,
        student_lm_head_weight.to(student_dtype),
        teacher,
        student_bias=None
        if student_lm_head_bias is None
        else student_lm_head_bias.to(student_dtype),
        divergence=fastkd.jsd(beta),
        temperature=temperature,
        scale_by_temperature=False,
        mask=completion_mask != 0,
        num_items=_on(student_hidden_states.device, num_items_in_batch),
        logit_scale=student_logit_scale,
        softcap=student_final_logit_softcapping,
        teacher_logit_scale=teacher_logit_scale,
        teacher_softcap=teacher_final_logit_softcapping,
        return_parts=True,
    )
    return loss, parts.student_entropy.sum(), parts.counted


def compute_full_logit_self_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, distillation_alpha: float
) -> Tensor:
    """The function of this name in ``trl.experimental.sdft`` and ``sdpo``: the generalized JSD of each row.

        alpha KL(p || m) + (1 - alpha) KL(q || m),   m = alpha p + (1 - alpha) q

    with p the teacher's softmax and q the student's; forward KL at alpha = 0, reverse KL at 1.

    Args:
        student_logits: [B, L, V].
        teacher_logits: the same shape; it gets no gradient.
        distillation_alpha: in [0, 1].

    Returns:
        [B, L] in float32 (TRL: in the dtype of the logits).

    Raises:
        ValueError, TypeError: as :func:`fastkd.kd_loss`.
    """
    check_pair("teacher_logits", teacher_logits, "student_logits", student_logits, _REMEDY)
    divergence = fastkd.jsd(distillation_alpha)
    return fastkd.kd_loss(
        student_logits, teacher_logits.detach(), divergence=divergence, reduction="none"
    )


def compute_topk_self_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    distillation_topk: int,
    distillation_alpha: float,
    distillation_add_tail: bool,
) -> Tensor:
    """The function of this name in ``trl.experimental.sdft`` and ``sdpo``: the JSD over the student's top-k tokens.

    With distillation_add_tail, one more event stands for all other tokens. Without it, both softmaxes are taken over
    the k tokens alone. If several tokens have the student's k-th logit, the lower id is taken; TRL's choice among them
    is torch.topk's.

    Args:
        student_logits: [B, L, V].
        teacher_logits: the same shape; it gets no gradient.
        distillation_topk: k, in [1, V].
        distillation_alpha: as in :func:`compute_full_logit_self_distillation_loss`.
        distillation_add_tail: whether the other tokens count, as one event. The mass of this event is exact; TRL
            raises a smaller mass to 1e-7, which has no gradient.

    Returns:
        [B, L] in float32 (TRL: in the dtype of the logits).

    Raises:
        ValueError, TypeError: as :func:`fastkd.kd_loss`; k is not in [1, V].
    """
    check_pair("teacher_logits", teacher_logits, "student_logits", student_logits, _REMEDY)
    ids = fastkd.student_topk(student_logits.detach(), k=distillation_topk).ids
    tail = "bucket" if distillation_add_tail else "renormalize"
    teacher = fastkd.TopK.from_logits(teacher_logits, ids=ids, tail=tail)
    divergence = fastkd.jsd(distillation_alpha)
    return fastkd.kd_loss(student_logits, teacher, divergence=divergence, reduction="none")


def _check_whole(name: str, weight: Any) -> None:
    """Raise if DeepSpeed ZeRO-3 has partitioned an lm_head and nothing has gathered it."""
    if is_partitioned(weight):
        raise ValueError(
            f"{name} is partitioned by DeepSpeed ZeRO-3, which would not receive its gradient; use FSDP2, ZeRO-2, "
            "TRL's own trainer, or fastkd.compat.trl.DistillationTrainer, which gathers the lm_head"
        )


def chunked_jsd_loss(
    hidden_valid: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    logit_scale: float,
    final_logit_softcapping: float | None,
    target_ids: Tensor,
    teacher_target_logps: Tensor,
    valid_candidate_mask: Tensor,
    beta: float,
    temperature: float,
    add_tail_bucket: bool,
    teacher_id_idx: Tensor | None,
    num_teachers: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``_chunked_jsd_loss`` of ``trl.experimental.async_distillation``: the JSD with a served teacher's tokens.

    It computes the divergence of :func:`generalized_jsd_loss` over the K tokens of each row, from the student's hidden
    states, by :func:`fastkd.fused_linear_kd_loss`.

    Args:
        hidden_valid: [N, H], the student's.
        lm_head_weight: [V, H]; cast to the dtype of the hidden states.
        lm_head_bias: [V], or None.
        logit_scale: multiplies the logits; not 0.
        final_logit_softcapping: > 0, or None.
        target_ids: [N, K], distinct within a row.
        teacher_target_logps: [N, K], the teacher's log-probabilities of these tokens.
        valid_candidate_mask: [N, K] bool, False for padding.
        beta: in [0, 1], as in :func:`generalized_jsd_loss`.
        temperature: T > 0, of the student. The teacher's log-probabilities are taken as they are. There is no T^2.
        add_tail_bucket: one more event stands for all other tokens. Without it, both distributions are normalized over
            the K tokens.
        teacher_id_idx: [N], which teacher scored each row, or None.
        num_teachers: how many there are.
        chunk_size: rows whose logits are computed at a time.

    Returns:
        (loss, its detached copy, sum of the student's entropies over the vocabulary, sum of the teacher's entropies
        over the K tokens and the tail, statistics). The loss is the sum over rows. The statistics are 3 numbers for
        each teacher: rows, sum of the loss, sum of the teacher's entropy.

    Raises:
        ValueError, TypeError: as :func:`fastkd.fused_linear_kd_loss`.
    """
    return _chunked_jsd_loss(
        hidden_valid, lm_head_weight, lm_head_bias, logit_scale, final_logit_softcapping, target_ids,
        teacher_target_logps, valid_candidate_mask, beta, temperature, add_tail_bucket, teacher_id_idx, num_teachers,
        chunk_size, teacher_temperature=temperature,
    )  # fmt: skip


def _chunked_jsd_loss(
    hidden_valid: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    logit_scale: float,
    final_logit_softcapping: float | None,
    target_ids: Tensor,
    teacher_target_logps: Tensor,
    valid_candidate_mask: Tensor,
    beta: float,
    temperature: float,
    add_tail_bucket: bool,
    teacher_id_idx: Tensor | None,
    num_teachers: int,
    chunk_size: int,
    *,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """chunked_jsd_loss, with log-probabilities of the teacher that were taken at teacher_temperature."""
    _check_whole("lm_head_weight", lm_head_weight)
    check_side("hidden_valid", hidden_valid, "lm_head_weight", lm_head_weight)
    dtype = hidden_valid.dtype
    teacher = fastkd.TopK(
        target_ids.masked_fill(~valid_candidate_mask, -1),
        teacher_target_logps,
        "bucket" if add_tail_bucket else "renormalize",
        temperature=teacher_temperature,
    )
    loss, parts = fastkd.fused_linear_kd_loss(
        hidden_valid,
        lm_head_weight.to(dtype),
        teacher,
        student_bias=None if lm_head_bias is None else lm_head_bias.to(dtype),
        divergence=fastkd.jsd(beta),
        temperature=temperature,
        scale_by_temperature=False,
        logit_scale=logit_scale,
        softcap=final_logit_softcapping,
        chunk_size=chunk_size,
        reduction="sum",
        return_parts=("teacher_entropy",),
    )
    teacher_entropy = parts.teacher_entropy
    assert teacher_entropy is not None
    statistics = loss.new_zeros(num_teachers, 3)
    if teacher_id_idx is not None:
        of_rows = (torch.ones_like(teacher_entropy), parts.distillation, teacher_entropy)
        statistics.index_add_(0, teacher_id_idx, torch.stack(of_rows, dim=-1))
    sums = (loss.detach(), parts.student_entropy.sum(), teacher_entropy.sum())
    return loss, *sums, statistics.flatten()


# ---- losses from hidden states, for trainers whose own code takes the logits of whole models


class _Batch(NamedTuple):
    """The tokens of a batch from position start, the earliest of a completion; `counted` marks the completions."""

    inputs: dict[str, Any]
    start: int
    tokens: Tensor  # [B, C]
    counted: Tensor  # [B, C] bool
    rollout_logprobs: Tensor | None  # [B, C], from the engine that sampled the tokens

    def cut(self, length: int) -> _Batch:
        """The first tokens."""
        rollout = self.rollout_logprobs
        return self._replace(
            tokens=self.tokens[:, :length],
            counted=self.counted[:, :length],
            rollout_logprobs=None if rollout is None else rollout[:, :length],
        )

    def rows(self, hidden: Tensor) -> Tensor:
        """The rows of the hidden states [B, S, H] that predict the tokens: [B, C, H]."""
        first = hidden.shape[1] - self.inputs["input_ids"].shape[1] + self.start - 1
        return hidden[:, first : first + self.tokens.shape[1]]


class _Rows(NamedTuple):
    """The hidden states of one model, and what makes logits of them."""

    hidden: Tensor  # [B, C, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def logprobs(self, batch: _Batch, temperature: float, **requested: Any) -> Any:
        """fastkd.fused_linear_logprobs of the counted rows."""
        return fastkd.fused_linear_logprobs(
            self.hidden,
            self.weight,
            bias=self.bias,
            temperature=temperature,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            mask=batch.counted,
            entropy=False,
            **requested,
        )


def _loss_of_student(
    trainer: Any, model: Any, batch: _Batch, loss_of: Callable[[_Rows], Tensor]
) -> Tensor:
    """Run the student, and compute a loss of its hidden states inside its forward pass."""
    head = _head_of(trainer, model, "the student")
    checked = _checked_heads(trainer)

    def loss_of_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # accelerate enables autocast inside the models' forward only.
        with trainer.accelerator.autocast():
            return loss_of(_Rows(batch.rows(hidden), weight, bias, head.logit_scale, head.softcap))

    def step(forward: Callable[..., Any], **inputs: Tensor) -> Tensor:
        with head.captured(project=head.name not in checked or None) as captured:
            outputs = forward(**inputs)
        _check_logits(head, checked, outputs, captured)
        return head.apply(loss_of_hidden, captured.hidden)

    return redirect(model, step, **_model_inputs(batch))


@contextlib.contextmanager
def _teacher_rows(trainer: Any, batch: _Batch) -> Iterator[_Rows]:
    """A context that yields the teacher's rows, without gradients."""
    model = trainer.teacher_model
    if model is None:
        raise ValueError("teacher_model must be given, or use_teacher_server=True; got neither")
    model.eval()
    head, checked = _head_of(trainer, model, "the teacher"), _checked_heads(trainer)
    with torch.no_grad(), head.captured(project=head.name not in checked or None) as captured:
        outputs = model(**_model_inputs(batch))
    _check_logits(head, checked, outputs, captured)
    hidden = batch.rows(captured.hidden)
    with head.gathered(hidden.dtype) as (weight, bias):
        yield _Rows(hidden, weight, bias, head.logit_scale, head.softcap)


def _model_inputs(batch: _Batch) -> dict[str, Tensor]:
    return {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}


def _head_of(trainer: Any, model: Any, name: str) -> Head:
    """Return the lm_head of a model as it is wrapped now."""
    heads: dict[str, Head] = vars(trainer).setdefault("_fastkd_heads", {})
    if name not in heads or heads[name].model is not model:
        heads[name] = Head(model, name=name, otherwise="use TRL's own trainer", by_hand="")
    return heads[name]


def _checked_heads(trainer: Any) -> set[str]:
    """The names of the models whose logits were those of their lm_heads in a first batch."""
    checked: set[str] = vars(trainer).setdefault("_fastkd_checked", set())
    return checked


def _check_logits(head: Head, checked: set[str], outputs: Any, captured: Captured) -> None:
    if head.name not in checked:
        remedy = "correct the scale and the softcap of the logits in the model's configuration"
        head.check_logits(outputs.logits, captured, head.logit_scale, head.softcap, remedy)
        checked.add(head.name)


def _iw_opd_loss(
    trainer: Any,
    batch: _Batch,
    teacher: _Rows | dict[str, Tensor],
    num_items: int | Tensor | None,
    student: _Rows,
) -> Tensor:
    """IW-OPD's loss of the sampled tokens: the mean of -w A log q, with TRL's metrics."""
    temperature, counted = trainer.temperature, batch.counted
    of_student = student.logprobs(batch, temperature, targets=batch.tokens).target
    with torch.no_grad():
        if isinstance(teacher, _Rows):
            of_teacher = teacher.logprobs(batch, temperature, targets=batch.tokens).target
        else:
            of_teacher = teacher["actual_logprobs"].to(of_student.device)
        _check_served(of_teacher, counted, "the log-probability of the sampled token")
        sampled = of_student if batch.rollout_logprobs is None else batch.rollout_logprobs
        advantages = torch.where(counted, of_teacher - sampled, 0.0)
        weights = position_weights(advantages, trainer.iw_opd_gamma, trainer.iw_opd_epsilon)
        weighted = weights * advantages
        if counted.any():
            metrics = trainer._metrics["train" if trainer.model.training else "eval"]
            for name, value in (
                ("mean_advantage", weighted[counted].mean()),
                ("mean_abs_advantage", advantages[counted].abs().mean()),
                ("mean_weight", weights[counted].mean()),
                ("min_weight", weights[counted].min()),
                ("max_weight", weights[counted].max()),
            ):
                metrics[f"iw_opd/{name}"].append(value.item())
    # fused_linear_logprobs returns 0 for tokens that do not count.
    return -(weighted * of_student).sum() / _items(counted, num_items)


def _jsd_loss(
    trainer: Any,
    batch: _Batch,
    teacher: _Rows | dict[str, Tensor],
    num_items: int | Tensor | None,
    student: _Rows,
) -> Tensor:
    """The JSD of a batch, over the vocabulary or over the tokens that the trainer's arguments select."""
    options: dict[str, Any] = {}
    target: fastkd.LinearTeacher | fastkd.TopK
    if not isinstance(teacher, _Rows):
        target = _served_topk(trainer, batch, teacher)
    elif 0 < trainer.loss_top_k < len(student.weight):
        with torch.no_grad():
            target = _local_topk(trainer, batch, teacher, student)
    else:
        target = LinearTeacher(teacher.hidden, teacher.weight, teacher.bias)
        options = {"teacher_logit_scale": teacher.logit_scale, "teacher_softcap": teacher.softcap}
    return fastkd.fused_linear_kd_loss(
        student.hidden,
        student.weight,
        target,
        student_bias=student.bias,
        divergence=fastkd.jsd(trainer.beta),
        temperature=trainer.temperature,
        scale_by_temperature=False,
        mask=batch.counted,
        num_items=_items(batch.counted, num_items),
        logit_scale=student.logit_scale,
        softcap=student.softcap,
        **options,
    )


def _tail(trainer: Any) -> str:
    return "bucket" if trainer.loss_add_tail else "renormalize"


def _local_topk(trainer: Any, batch: _Batch, teacher: _Rows, student: _Rows) -> fastkd.TopK:
    """The teacher at the tokens of IWOPDTrainer's loss_top_k.

    They are the teacher's k most probable tokens at beta = 0, the student's at beta = 1, and both in between. With
    k = 1 and beta > 0 the student's token is the sampled one, or with reverse_kl_top_1_mode="argmax" its most probable.
    """
    k, beta, temperature, counted = (
        trainer.loss_top_k,
        trainer.beta,
        trainer.temperature,
        batch.counted,
    )
    supports = []
    if beta < 1.0:
        top = teacher.logprobs(batch, temperature, topk=k)
        if beta == 0.0:
            return fastkd.TopK(
                top.topk_ids, top.topk_logprobs, _tail(trainer), temperature=temperature
            )
        supports.append(top.topk_ids)
    if k == 1 and trainer.reverse_kl_top_1_mode != "argmax":
        supports.append(batch.tokens.masked_fill(~counted, -1).unsqueeze(-1))
    else:
        supports.append(student.logprobs(batch, temperature, topk=k).topk_ids)
    ids = supports[0] if len(supports) == 1 else fastkd.support_union(*supports)
    logprobs = teacher.logprobs(batch, temperature, ids=ids).gathered
    return fastkd.TopK(ids, logprobs, _tail(trainer), temperature=temperature)


def _served_topk(trainer: Any, batch: _Batch, served: dict[str, Tensor]) -> fastkd.TopK:
    """The tokens of a server: its K most probable at beta = 0, the sampled one at beta = 1, and both in between."""
    ids, logprobs = served["topk_token_ids"], served["topk_logprobs"]
    if trainer.beta > 0.0:
        own = served["actual_logprobs"]
        _check_served(own, batch.counted, "the log-probability of the sampled token")
        tokens = batch.tokens.unsqueeze(-1)
        if trainer.beta == 1.0:
            ids, logprobs = tokens, own.unsqueeze(-1)
        else:
            _check_served(logprobs[..., 0], batch.counted, "its most probable token")
            ids = fastkd.support_union(ids, tokens)
            logprobs = torch.cat([logprobs, own.unsqueeze(-1)], dim=-1)
    # vllm_client fills up positions with token 0 and -inf.
    ids = ids.masked_fill(logprobs == -torch.inf, -1)
    # Log-probabilities of a prompt are at temperature 1, whatever the request says.
    return fastkd.TopK(ids, logprobs, _tail(trainer), temperature=1.0)


def _check_served(logprobs: Tensor, counted: Tensor, what: str) -> None:
    """Raise if the teacher has no log-probability of a token that counts."""
    missing = counted & ~torch.isfinite(logprobs)
    if missing.any():
        raise ValueError(
            f"the teacher must return {what} at every token that counts; it did not at {int(missing.sum())} of "
            f"{int(counted.sum())}"
        )


def _items(counted: Tensor, num_items: int | Tensor | None) -> Tensor:
    """The divisor: num_items, or the number of tokens that count, at least 1."""
    if num_items is None:
        return counted.sum().clamp(min=1)
    return torch.as_tensor(num_items, device=counted.device)


def _check_server_temperature(
    temperature: float, needs_mass: bool, name: str = "temperature", tail: str | None = None
) -> None:
    """Raise if the log-probabilities of a server cannot be converted to the temperature of the loss.

    Args:
        temperature: that of the loss.
        needs_mass: whether the loss needs the mass of a token, and not only the ratios of listed tokens.
        name: the argument that is the temperature.
        tail: the argument that adds an event for the other tokens; None: the loss is of sampled tokens.
    """
    if temperature == 1.0 or not needs_mass:
        return
    remedy = (
        f"{name}=1.0, or use a local teacher" if tail is None else f"{tail}=False or {name}=1.0"
    )
    raise ValueError(
        f"{name} must be 1 with a teacher's server, got {temperature}: the server's log-probabilities are at "
        "temperature 1, whatever the request says, and a few of them do not determine those at another temperature. "
        f"Set {remedy}"
    )


# ---- trainers, built at first access because importing TRL takes seconds


def _gkd_trainer() -> type:
    """TRL's GKDTrainer with fastkd's loss.

    The auxiliary loss of a mixture-of-experts student, which TRL's GKDTrainer ignores, is added with its coefficient
    and logged as aux_loss, as in TRL's SFTTrainer. GKDConfig(router_aux_loss_coef=0.0) disables it.

    The loss is at temperature 1, as in TRL: ``args.temperature`` is the student's sampling temperature. To change it:

        class MyTrainer(GKDTrainer):
            generalized_jsd_loss = staticmethod(functools.partial(generalized_jsd_loss, temperature=2.0))
    """
    stock = _import_from_trl("trl.experimental.gkd", "GKDTrainer")
    _check_signature(stock, "generalized_jsd_loss", generalized_jsd_loss)

    return _subclass(
        stock,
        _gkd_trainer,
        generalized_jsd_loss=staticmethod(generalized_jsd_loss),
        compute_loss=_with_router_loss(stock),
    )


def _with_router_loss(stock: Any) -> Callable[..., Any]:
    """Return a compute_loss: the trainer's, plus the auxiliary loss of a router."""
    config = f"{stock.__name__.removesuffix('Trainer')}Config"

    def compute_loss(
        self: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """Return TRL's loss plus the router's auxiliary loss times its coefficient, as TRL's SFTTrainer does."""
        loss, outputs = stock.compute_loss(self, model, inputs, True, num_items_in_batch)
        if getattr(self, "aux_loss_enabled", False):
            aux = getattr(outputs, "aux_loss", None)
            if aux is None:
                raise ValueError(
                    "the student's configuration sets output_router_logits, but its outputs have no aux_loss to add; "
                    f"set {config}(router_aux_loss_coef=0.0)"
                )
            training = self.model.training
            normalized = training and num_items_in_batch is not None
            steps = self.current_gradient_accumulation_steps if normalized else 1
            loss = loss + self.router_aux_loss_coef * aux.to(loss.device) / steps
            gathered = self.accelerator.gather_for_metrics(aux.detach()).mean().item()
            self._metrics["train" if training else "eval"]["aux_loss"].append(gathered)
        return (loss, outputs) if return_outputs else loss

    return compute_loss


def _distillation_trainer() -> type:
    """TRL's DistillationTrainer with fastkd's loss. Everything else, including generation and logs, is TRL's.

    TRL runs the student's layers without the code that computes a router's auxiliary loss. A student whose
    configuration sets output_router_logits therefore raises.
    """
    stock = _import_from_trl("trl", "DistillationTrainer")
    module = importlib.import_module(stock.__module__)
    name = "_chunked_divergence_loss"
    _check_signature(module, name, chunked_divergence_loss)
    original = getattr(stock, "_compute_loss", None)
    method = _with_global(original, name, chunked_divergence_loss)

    def _compute_loss(self: Any, unwrapped_student: Any, inputs: Any, num_items: Any) -> Any:
        """Return TRL's loss; if DeepSpeed ZeRO-3 has partitioned an lm_head, with that lm_head gathered."""
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        if not any(_has_zero3_head(model) for model in (unwrapped_student, teacher)):
            return method(self, unwrapped_student, inputs, num_items)
        heads = Head(unwrapped_student, name="the student"), Head(teacher, name="the teacher")
        loss = partial(_gathered_divergence_loss, *heads)
        return _with_global(original, name, loss)(self, unwrapped_student, inputs, num_items)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 (becomes a method of the class below)
        stock.__init__(self, *args, **kwargs)  # type: ignore[misc]
        _check_router(self)

    return _subclass(stock, _distillation_trainer, _compute_loss=_compute_loss, __init__=__init__)


def _check_router(trainer: Any) -> None:
    """Raise if the student has an auxiliary loss, for trainers that do not compute it."""
    config = trainer.model.config.get_text_config()
    if getattr(config, "output_router_logits", False) and getattr(
        config, "router_aux_loss_coef", 0.0
    ):
        raise ValueError(
            f"the student's configuration sets output_router_logits, but {type(trainer).__name__} ignores the router's "
            "auxiliary loss; set output_router_logits=False, or use fastkd.compat.transformers.KDTrainer or "
            "fastkd.compat.trl.GKDTrainer, which add it"
        )


def _has_zero3_head(model: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 manages the lm_head of a model."""
    return under_zero3(model.get_output_embeddings().weight)


def _gathered_divergence_loss(
    student: Head,
    teacher: Head,
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: object,
    teacher_lm_head_weight: object,
    completion_mask: Tensor,
    beta: float,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return chunked_divergence_loss with the weights and biases of two lm_heads, gathered.

    The student's are gathered by the hooks of its lm_head, which also take its gradient.
    """

    def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        biases = {"student_lm_head_bias": bias, "teacher_lm_head_bias": teacher_bias}
        operands = (hidden, teacher_hidden_states, weight, teacher_weight)
        return chunked_divergence_loss(*operands, completion_mask, beta, **options | biases)

    with teacher.gathered() as (teacher_weight, teacher_bias):
        return student.apply(loss_of, student_hidden_states)


def _sdft_trainer() -> type:
    """TRL's SDFTTrainer with fastkd's loss for distillation_mode "full_logits" and "topk_logits".

    TRL computes the loss of "sampled_token" and the loss with use_teacher_server=True.
    """
    return _self_distillation("sdft", "SDFTTrainer", _sdft_trainer)


def _sdpo_trainer() -> type:
    """TRL's SDPOTrainer with fastkd's loss for distillation_mode "full_logits" and "topk_logits".

    TRL computes the loss of "sampled_token", the loss with use_teacher_server=True, and the policy gradient.
    """
    return _self_distillation("sdpo", "SDPOTrainer", _sdpo_trainer)


def _async_distillation_trainer() -> type:
    """TRL's AsyncDistillationTrainer with fastkd's loss. The rollouts and the requests to the teacher are TRL's.

    It takes the server's log-probabilities to be at temperature 1, because vLLM does not apply the temperature of a
    request to them. With add_tail_bucket=True, another teacher_temperature raises. DeepSpeed's ZeRO-3 raises.
    """
    stock: Any = _import_from_trl("trl.experimental.async_distillation", "AsyncDistillationTrainer")
    name = "_chunked_jsd_loss"
    _check_signature(importlib.import_module(stock.__module__), name, chunked_jsd_loss)
    method = _with_global(
        getattr(stock, "_compute_loss", None),
        name,
        partial(_chunked_jsd_loss, teacher_temperature=1.0),
    )

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 (becomes a method of the class below)
        given = inspect.signature(stock.__init__).bind(self, *args, **kwargs).arguments.get("args")
        if given is not None:
            _check_server_temperature(
                given.teacher_temperature,
                given.add_tail_bucket,
                "teacher_temperature",
                "add_tail_bucket",
            )
            if getattr(getattr(given, "deepspeed_plugin", None), "zero_stage", None) == 3:
                raise ValueError(_EMPTY_ROLLOUTS)
        stock.__init__(self, *args, **kwargs)

    def _compute_loss(self: Any, unwrapped_model: Any, inputs: Any) -> Any:
        """Return TRL's loss of a batch."""
        if _has_zero3_head(unwrapped_model):
            raise ValueError(_EMPTY_ROLLOUTS)
        return method(self, unwrapped_model, inputs)

    return _subclass(
        stock, _async_distillation_trainer, __init__=__init__, _compute_loss=_compute_loss
    )


_EMPTY_ROLLOUTS = (
    "AsyncDistillationTrainer does not support DeepSpeed ZeRO-3: TRL sends every parameter to the server of the "
    "rollouts as it is on one process, and ZeRO-3 leaves it empty there; use FSDP2 or ZeRO-2"
)


def _gold_trainer() -> type:
    """TRL's GOLDTrainer with fastkd's divergence, of the logits and of the tokens that both tokenizers have.

    With use_uld_loss, TRL still aligns the two tokenizations and computes the distance of sorted probabilities. The
    auxiliary loss of a mixture-of-experts student is added as in :class:`GKDTrainer`.
    """
    stock: Any = _import_from_trl("trl.experimental.gold", "GOLDTrainer")
    module = importlib.import_module(stock.__module__)
    _check_signature(stock, "generalized_jsd_loss", gold_jsd_loss)
    return _subclass(
        stock,
        _gold_trainer,
        __init__=_with_global(stock.__init__, "ULDLoss", _uld_loss(module)),
        generalized_jsd_loss=staticmethod(gold_jsd_loss),
        compute_loss=_with_router_loss(stock),
    )


def _uld_loss(module: Any) -> type:
    """TRL's ULDLoss with fastkd's divergence of the tokens that both tokenizers have."""
    stock: Any = getattr(module, "ULDLoss", None)
    if stock is None:
        raise _unknown_version(f"has no ULDLoss in {module.__name__}")

    def _compute_jsd_loss_for_matched_tokens(
        self: Any, student_logits: Tensor, teacher_logits: Tensor
    ) -> Tensor:
        """Return the divergence of the probabilities that TRL calls logits."""
        return gold_jsd_loss(student_logits, teacher_logits, beta=self.beta, logits_are_probs=True)

    def _initialize_vocabulary_mapping(self: Any) -> None:
        """Map the tokens that both tokenizers have."""
        if (
            not self.student_tokenizer.get_vocab().keys()
            & self.teacher_tokenizer.get_vocab().keys()
        ):
            raise ValueError(
                "uld_use_hybrid_loss=True compares the tokens that both tokenizers have, and these two have none in "
                "common; set uld_use_hybrid_loss=False"
            )
        stock._initialize_vocabulary_mapping(self)

    replacement = _compute_jsd_loss_for_matched_tokens
    _check_signature(stock, replacement.__name__, replacement)
    _check_signature(stock, "_initialize_vocabulary_mapping", _initialize_vocabulary_mapping)
    members = {f.__name__: f for f in (replacement, _initialize_vocabulary_mapping)}
    return type(
        "ULDLoss", (stock,), {"__module__": __name__, "__doc__": _uld_loss.__doc__, **members}
    )


# The methods of TRL that the trainers below call or replace, with their parameters.
_SERVED_METHODS = {
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "_compute_prompt_length": ("self", "inputs"),
    "_get_teacher_token_logprobs_from_server": ("self", "inputs", "aligned_prompt_length"),
}


def _iw_opd_trainer() -> type:
    """TRL's IWOPDTrainer with both objectives computed by fastkd from hidden states, without holding logits.

    It calls the student and the teacher itself, so it does not call TRL's _get_teacher_logits, _compute_iw_opd_loss and
    generalized_jsd_loss. Use TRL's trainer for a subclass that overrides these.
    """
    stock: Any = _import_from_trl("trl.experimental.iw_opd", "IWOPDTrainer")
    _check_methods(stock, _SERVED_METHODS)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 (becomes a method of the class below)
        stock.__init__(self, *args, **kwargs)
        _check_router(self)
        if self.use_teacher_server:
            samples = self.distillation_objective == "iw_opd"
            tail = None if samples else "loss_add_tail"
            _check_server_temperature(self.temperature, samples or self.loss_add_tail, tail=tail)

    def compute_loss(
        self: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """Return the loss of a batch; with return_outputs also the student's outputs, empty unless requested."""
        self._raise_if_local_teacher_tokenizer_mismatch()
        start = self._compute_prompt_length(inputs)
        labels, tokens = inputs["labels"][:, start:], inputs["input_ids"][:, start:]
        rollout = inputs.get("rollout_logprobs")
        batch = _Batch(
            inputs, start, tokens, labels != -100, None if rollout is None else rollout[:, start:]
        )
        loss_of = _iw_opd_loss if self.distillation_objective == "iw_opd" else _jsd_loss
        if not self.use_teacher_server:
            with _teacher_rows(self, batch) as teacher:
                loss = _loss_of_student(
                    self, model, batch, partial(loss_of, self, batch, teacher, num_items_in_batch)
                )
        else:
            served = self._get_teacher_token_logprobs_from_server(inputs, start)
            covered = served["actual_logprobs"].shape[1]
            if loss_of is _iw_opd_loss and batch.counted[:, covered:].any():
                raise ValueError(
                    "the teacher's server returned fewer log-probabilities than the completions have tokens, and "
                    "distillation_objective='iw_opd' needs that of every token"
                )
            batch = batch.cut(covered)
            # TRL averages the divergence over this batch, whatever num_items_in_batch is.
            items = num_items_in_batch if loss_of is _iw_opd_loss else None
            loss = _loss_of_student(
                self, model, batch, partial(loss_of, self, batch, served, items)
            )
        if not return_outputs:
            return loss
        return loss, model(**_model_inputs(batch)) if self._wants_predictions else {}

    def prediction_step(
        self: Any, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Run the Trainer's prediction step; compute logits if predictions are requested."""
        self._wants_predictions = not prediction_loss_only
        try:
            return stock.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._wants_predictions = False

    return _subclass(
        stock, _iw_opd_trainer, __init__=__init__, compute_loss=compute_loss, prediction_step=prediction_step,
        _wants_predictions=False,
    )  # fmt: skip


def _server_distillation_trainer() -> type:
    """TRL's ServerDistillationTrainer with fastkd's loss, from the student's hidden states, without holding logits.

    It takes the server's log-probabilities to be at temperature 1, because vLLM does not apply the temperature of a
    request to them. With loss_add_tail=True, another temperature raises.
    """
    package = "trl.experimental.server_distillation"
    stock: Any = _import_from_trl(package, "ServerDistillationTrainer")
    _check_methods(stock, _SERVED_METHODS)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 (becomes a method of the class below)
        stock.__init__(self, *args, **kwargs)
        _check_router(self)
        _check_server_temperature(self.temperature, self.loss_add_tail, tail="loss_add_tail")

    def compute_loss(
        self: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: object = None,
    ) -> Any:
        """Return the mean over the batch, divided by the steps of gradient accumulation, as TRL does."""
        prompt_mask, completion_mask = inputs["prompt_mask"], inputs["completion_mask"]
        counted = torch.cat([torch.zeros_like(prompt_mask), completion_mask], dim=1).bool()
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        inputs = {
            **inputs,
            "input_ids": input_ids,
            "attention_mask": torch.cat([prompt_mask, completion_mask], dim=1),
            "labels": input_ids.masked_fill(~counted, -100),
            "prompt_attention_mask": prompt_mask,
        }
        start = self._compute_prompt_length(inputs)
        served = self._get_teacher_token_logprobs_from_server(inputs, start)
        batch = _Batch(inputs, start, input_ids[:, start:], counted[:, start:], None)
        batch = batch.cut(served["actual_logprobs"].shape[1])
        loss = _loss_of_student(self, model, batch, partial(_jsd_loss, self, batch, served, None))
        if self.model.training:
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, None) if return_outputs else loss

    return _subclass(
        stock, _server_distillation_trainer, __init__=__init__, compute_loss=compute_loss
    )


def _self_distillation(package: str, name: str, built_by: Callable[[], type]) -> type:
    stock = _import_from_trl(f"trl.experimental.{package}", name)
    module = importlib.import_module(stock.__module__)
    method = getattr(stock, "_compute_self_distillation_loss", None)
    for replacement in (
        compute_full_logit_self_distillation_loss,
        compute_topk_self_distillation_loss,
    ):
        _check_signature(module, replacement.__name__, replacement)
        method = _with_global(method, replacement.__name__, replacement)
    return _subclass(stock, built_by, _compute_self_distillation_loss=method)


_TRAINERS = {
    "GKDTrainer": _gkd_trainer,
    "DistillationTrainer": _distillation_trainer,
    "SDFTTrainer": _sdft_trainer,
    "SDPOTrainer": _sdpo_trainer,
    "AsyncDistillationTrainer": _async_distillation_trainer,
    "GOLDTrainer": _gold_trainer,
    "IWOPDTrainer": _iw_opd_trainer,
    "ServerDistillationTrainer": _server_distillation_trainer,
}


def __getattr__(name: str) -> Any:
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _TRAINERS[name]())


def _subclass(stock: type, built_by: Callable[[], type], **members: Any) -> type:
    members = {"__doc__": built_by.__doc__, "__module__": __name__, **members}
    return type(stock.__name__, (stock,), members)


def _import_from_trl(module: str, name: str) -> type:
    try:
        import trl  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"fastkd.compat.trl.{name} needs TRL: pip install trl") from error
    try:
        trainer: type = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _unknown_version(f"has no importable {module}.{name}") from error
    return trainer


def _check_signature(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Raise unless the function that replaces owner.name has the same parameters."""
    original = getattr(owner, name, None)
    if original is None:
        raise _unknown_version(f"has no {name} in {owner.__name__}")
    expected, actual = (tuple(inspect.signature(f).parameters) for f in (replacement, original))
    if actual != expected:
        raise _unknown_version(f"has {name}{actual}, and not {expected}")


def _check_methods(owner: Any, methods: dict[str, tuple[str, ...]]) -> None:
    """Raise unless a class has these methods with these parameters."""
    for name, expected in methods.items():
        method = getattr(owner, name, None)
        if method is None:
            raise _unknown_version(f"has no {name} in {owner.__name__}")
        actual = tuple(inspect.signature(method).parameters)
        if actual != expected:
            raise _unknown_version(f"has {name}{actual}, and not {expected}")


def _with_global(function: Any, name: str, value: Any) -> types.FunctionType:
    """Return a copy of a function in which one global name has another value.

    TRL's trainer refers to its loss by a global name. Replacing it in TRL's module would also change TRL's own trainer,
    which may be used in the same process; a copy of the function does not.
    """
    code = getattr(function, "__code__", None)
    if code is None or name not in code.co_names:
        where = getattr(function, "__qualname__", "its trainer")
        raise _unknown_version(f"does not call {name} in {where}")
    names = {**function.__globals__, name: value}
    copy = types.FunctionType(
        code, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _unknown_version(difference: str) -> ImportError:
    from importlib.metadata import version

    return ImportError(
        f"fastkd.compat.trl supports TRL 1.16; TRL {version('trl')} {difference}. Use TRL's own trainer, or TRL 1.16"
    )
