"""TRL: the losses of its trainers for distillation, and these trainers with the losses computed by fastkd.

    from fastkd.compat.trl import GKDTrainer  # was: from trl.experimental.gkd import GKDTrainer
    from fastkd.compat.trl import DistillationTrainer  # was: from trl import DistillationTrainer
    from fastkd.compat.trl import SDFTTrainer  # was: from trl.experimental.sdft import SDFTTrainer
    from fastkd.compat.trl import SDPOTrainer  # was: from trl.experimental.sdpo import SDPOTrainer

TRL's conventions are kept: forward KL at beta = 0, reverse KL at beta = 1, and the generalized JSD of fastkd.jsd in
between; no T^2; the counted rows are those whose label is not -100, or whose mask is not 0. docs/stacks/trl.md lists
what differs.
"""

from __future__ import annotations

import importlib
import inspect
import math
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.call import log_zero
from fastkd.call.checks import check_choice, check_pair, check_per_row, check_side
from fastkd.parallel.heads import Head
from fastkd.teachers import LinearTeacher

# TRL compares whole vocabularies, and its trainers refuse models whose vocab_size differs.
_REMEDY = (
    "TRL compares whole vocabularies. If the models differ only in padding of one tokenizer, resize both to the same "
    "width with resize_token_embeddings(), or cut the wider logits to the real tokens; across tokenizers use TRL's "
    "GOLDTrainer"
)
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
    fastkd.jsd(beta)  # raises if beta is invalid
    # Clamp -inf, so that its product with a probability of 0 is 0. log_zero.evaluate has the same policy but is not
    # differentiable by autograd.
    lowest = torch.finfo(dtype).min
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
        distillation_add_tail: whether the other tokens count, as one event. The mass of this event is exact; TRL does
            not let it fall below 1e-7, and it has no gradient there.

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
    if hasattr(weight, "ds_id") and weight.shape != weight.ds_shape:
        raise ValueError(
            f"{name} is partitioned by DeepSpeed ZeRO-3, which would not receive its gradient; use "
            "fastkd.compat.trl.DistillationTrainer, which gathers it, FSDP2, ZeRO-2, or TRL's own trainer"
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
    _check_whole("lm_head_weight", lm_head_weight)
    check_side("hidden_valid", hidden_valid, "lm_head_weight", lm_head_weight)
    dtype = hidden_valid.dtype
    teacher = fastkd.TopK(
        target_ids.masked_fill(~valid_candidate_mask, -1),
        teacher_target_logps,
        "bucket" if add_tail_bucket else "renormalize",
        temperature=temperature,
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

    def compute_loss(
        self: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """Return TRL's loss plus the router's auxiliary loss times its coefficient, as TRL's SFTTrainer does."""
        loss, outputs = stock.compute_loss(self, model, inputs, True, num_items_in_batch)  # type: ignore[attr-defined]
        if getattr(self, "aux_loss_enabled", False):
            aux = getattr(outputs, "aux_loss", None)
            if aux is None:
                raise ValueError(
                    "the student's configuration sets output_router_logits, but its outputs have no aux_loss to add; "
                    "set GKDConfig(router_aux_loss_coef=0.0)"
                )
            training = self.model.training
            normalized = training and num_items_in_batch is not None
            steps = self.current_gradient_accumulation_steps if normalized else 1
            loss = loss + self.router_aux_loss_coef * aux.to(loss.device) / steps
            gathered = self.accelerator.gather_for_metrics(aux.detach()).mean().item()
            self._metrics["train" if training else "eval"]["aux_loss"].append(gathered)
        return (loss, outputs) if return_outputs else loss

    return _subclass(
        stock,
        _gkd_trainer,
        generalized_jsd_loss=staticmethod(generalized_jsd_loss),
        compute_loss=compute_loss,
    )


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
        if not any(_is_partitioned(model) for model in (unwrapped_student, teacher)):
            return method(self, unwrapped_student, inputs, num_items)
        heads = Head(unwrapped_student, name="the student"), Head(teacher, name="the teacher")
        loss = partial(_gathered_divergence_loss, *heads)
        return _with_global(original, name, loss)(self, unwrapped_student, inputs, num_items)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 (becomes a method of the class below)
        stock.__init__(self, *args, **kwargs)  # type: ignore[misc]
        config = self.model.config.get_text_config()
        if getattr(config, "output_router_logits", False) and getattr(
            config, "router_aux_loss_coef", 0.0
        ):
            raise ValueError(
                "the student's configuration sets output_router_logits, but DistillationTrainer ignores the router's "
                "auxiliary loss; set output_router_logits=False, or use fastkd.compat.transformers.KDTrainer or "
                "fastkd.compat.trl.GKDTrainer, which add it"
            )

    return _subclass(stock, _distillation_trainer, _compute_loss=_compute_loss, __init__=__init__)


def _is_partitioned(model: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned the lm_head of a model."""
    return hasattr(model.get_output_embeddings().weight, "ds_id")


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
    """TRL's AsyncDistillationTrainer with fastkd's loss. The rollouts and the requests to the teacher are TRL's."""
    stock = _import_from_trl("trl.experimental.async_distillation", "AsyncDistillationTrainer")
    name = "_chunked_jsd_loss"
    _check_signature(importlib.import_module(stock.__module__), name, chunked_jsd_loss)
    method = _with_global(getattr(stock, "_compute_loss", None), name, chunked_jsd_loss)
    return _subclass(stock, _async_distillation_trainer, _compute_loss=method)


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
