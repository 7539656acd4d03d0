r"""verl: distillation losses on a teacher's top-k tokens, as loss modes of verl's own trainer.

    distillation.distillation_loss.loss_mode=fastkd_reverse_kl_bucket  # was: forward_kl_topk

The name of a mode is ``fastkd_<divergence>_<tail>``. The divergence is ``forward_kl``, ``reverse_kl`` or ``jsd``. The
tail is the policy for the tokens that the teacher does not list, ``bucket``, ``renormalize`` or ``truncate``
(:class:`fastkd.TopK`). ``fastkd_forward_kl_truncate`` is verl's own formula. `register_loss` adds modes.

verl finds the modes by itself: fastkd has an entry point in the group ``verl.plugins``, which verl loads when it is
imported. verl hides errors of plugins: if verl does not know a mode, call `register` to see the error. The
strategies fsdp, fsdp2, veomni and megatron are supported.

fastkd.compat.veomni computes the loss of VeOmni's models from hidden states. docs/stacks/verl.md lists what differs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd.divergences import Divergence, forward_kl, jsd, reverse_kl
from fastkd.teachers.topk import TAILS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Loss(NamedTuple):
    """What a loss mode computes."""

    divergence: Divergence
    """The divergence of teacher and student."""
    tail: str
    """The policy for the tokens that the teacher does not list, as in :class:`fastkd.TopK`."""


LOSSES = {
    f"fastkd_{divergence.name}_{tail}": _Loss(divergence, tail)
    for divergence in (forward_kl(), reverse_kl(), jsd())
    for tail in ("bucket", "renormalize", "truncate")
}
"""The loss modes by name."""

_VERL = "verl.trainer.distillation.losses"
_registered: set[str] = set()


def register_loss(name: str, divergence: Divergence, tail: str = "bucket") -> None:
    """Add a loss mode to `LOSSES`, and to verl if `register` has run in this process.

    Every process of the trainer must call this before it reads verl's configuration: for example in a module that the
    environment variable VERL_USE_EXTERNAL_MODULES names.

    Args:
        name: the new loss_mode.
        divergence: such as ``fastkd.jsd(0.1)``.
        tail: as in :class:`fastkd.TopK`.

    Raises:
        TypeError, ValueError: the divergence is not a fastkd.Divergence, tail is unknown, or name is in use
            for another loss.
    """
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"divergence must be a fastkd.Divergence, such as fastkd.jsd(0.1); got {type(divergence).__name__}"
        )
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}; got {tail!r}")
    loss = _Loss(divergence, tail)
    if LOSSES.setdefault(name, loss) != loss:
        raise ValueError(
            f"name must be new; {name!r} already exists with another divergence or tail, {LOSSES[name]}"
        )
    if _registered:
        register()


def register() -> None:
    """Register the modes of `LOSSES` with verl. Importing verl calls this; a second call registers only new modes.

    Raises:
        ImportError: verl, or a package that its losses import, is not installed.
        ValueError: verl has another mode with the name of one in `LOSSES`.
    """
    verl: Any = importlib.import_module(_VERL)
    for name in LOSSES.keys() - _registered:
        settings = verl.DistillationLossSettings(names=[name], use_topk=True)
        verl.register_distillation_loss(settings)(_response_losses)
        _registered.add(name)
    if verl.compute_topk_loss is not _compute_topk_loss:
        _originals["compute_topk_loss"] = verl.compute_topk_loss
        verl.compute_topk_loss = _compute_topk_loss


_originals: dict[str, Any] = {}


def __getattr__(name: str) -> Any:
    # fastkd's entry point names this attribute; verl loads it, but does not call it.
    if name == "plugin":
        register()
        return register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- first phase: the losses of the tokens, from the student's logits


def _compute_topk_loss(
    config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
) -> dict[str, Tensor]:
    """verl's compute_topk_loss, but fastkd computes the modes of `LOSSES`."""
    settings = distillation_config.distillation_loss
    if settings.loss_mode not in LOSSES:
        outputs: dict[str, Tensor] = _originals["compute_topk_loss"](
            config, distillation_config, data, student_logits, data_format
        )
        return outputs
    logprobs, ids = data["teacher_logprobs"], data["teacher_ids"]
    counted = _counted_rows(data)
    group = None
    if config.strategy == "megatron":
        util = importlib.import_module("verl.models.mcore.util")
        state = importlib.import_module("megatron.core.parallel_state")
        pack = getattr(util, f"preprocess_{data_format}_engine")
        logprobs, ids, counted = (
            pack(tensor, pre_process=True)[0] for tensor in (logprobs, ids, counted)
        )
        if state.get_tensor_model_parallel_world_size() > 1:
            group = state.get_tensor_model_parallel_group()
    elif config.strategy in ("fsdp", "fsdp2", "veomni"):
        ulysses = importlib.import_module("verl.utils.ulysses")
        logprobs, ids, counted = (
            tensor.values().unsqueeze(0) for tensor in (logprobs, ids, counted)
        )
        if ulysses.get_ulysses_sequence_parallel_world_size() > 1:
            logprobs, ids, counted = (
                ulysses.slice_input_tensor(tensor, dim=1) for tensor in (logprobs, ids, counted)
            )
    else:
        raise NotImplementedError(
            f"config.strategy must be fsdp, fsdp2, veomni or megatron, got {config.strategy!r}"
        )
    return topk_losses(
        student_logits,
        logprobs,
        ids,
        *LOSSES[settings.loss_mode],
        counted=counted.bool(),
        log_prob_min_clamp=settings.log_prob_min_clamp,
        process_group=group,
    )


def _counted_rows(data: Any) -> Tensor:
    """A nested uint8 tensor, 1 for each row of logits that predicts a token of the response.

    The logits that predict a token are in the row before it. The last row of a sequence predicts nothing, and verl
    sets the teacher's values in it to 0.
    """
    offsets = data["teacher_ids"].offsets()
    ends = offsets[1:]
    responses = data["responses"]
    if responses.is_nested:
        lengths = responses.offsets().diff()
    else:
        lengths = data["attention_mask"][:, -responses.shape[1] :].sum(dim=1)
    rows = torch.arange(len(data["teacher_ids"].values()), device=offsets.device)
    end = ends[torch.searchsorted(ends, rows, right=True)]
    length = lengths.to(end.device)[torch.searchsorted(ends, rows, right=True)]
    counted = (rows >= end - length - 1) & (rows < end - 1)
    return torch.nested.nested_tensor_from_jagged(counted.to(torch.uint8), offsets)


def topk_losses(
    student_logits: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    divergence: Divergence,
    tail: str,
    *,
    counted: Tensor | None = None,
    log_prob_min_clamp: float | None = None,
    process_group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The losses of the tokens and verl's metrics, named as in ``verl.trainer.distillation.losses.compute_topk_loss``.

    Args:
        student_logits: [B, S, V], already divided by the temperature of the rollout; [B, S, V_r],
            this process's columns, with process_group.
        teacher_topk_log_probs: [B, S, K], natural logarithms. Row i describes the token that row i of the logits
            predicts.
        teacher_topk_ids: [B, S, K], token ids.
        divergence: the divergence of teacher and student.
        tail: the policy for the tokens that the teacher does not list, as in :class:`fastkd.TopK`.
        counted: [B, S] bool; where it is False, the results are 0 and the inputs are not read. None: all rows count.
        log_prob_min_clamp: smaller log-probabilities of both sides are raised to it, as in verl; only for forward KL
            with the policy "truncate". The other losses are finite without it.
        process_group: the processes that share the vocabulary, as in :func:`fastkd.kd_loss`.

    Returns:
        Tensors [B, S]: the differentiable "distillation_losses"; "student_mass" and "teacher_mass", each side's total
        probability of the listed tokens; "overlap_count", how many listed tokens are among the student's K most
        probable ones; and "overlap_token_advantage", the mean of -p (log p - log q) over these.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or value; the message names it.
    """
    if log_prob_min_clamp is not None:
        if (divergence.name, tail) != ("forward_kl", "truncate"):
            raise ValueError(
                f"log_prob_min_clamp must be null for {divergence.name} with the tail {tail!r}, got "
                f"{log_prob_min_clamp}; only forward KL with the tail 'truncate' has a clamp"
            )
        divergence = forward_kl(floor=log_prob_min_clamp)
    teacher_topk_log_probs = teacher_topk_log_probs.detach()
    teacher = fastkd.TopK(teacher_topk_ids, teacher_topk_log_probs, tail=tail)
    losses, parts = fastkd.kd_loss(
        student_logits,
        teacher,
        divergence=divergence,
        mask=counted,
        reduction="none",
        process_group=process_group,
        return_parts=("student_mass", "teacher_mass"),
    )
    assert parts.student_mass is not None and parts.teacher_mass is not None
    overlap_count, overlap_token_advantage = _overlap(
        student_logits.detach(), teacher, counted, log_prob_min_clamp, process_group
    )
    return {
        "distillation_losses": losses,
        "student_mass": parts.student_mass,
        "teacher_mass": parts.teacher_mass,
        "overlap_count": overlap_count,
        "overlap_token_advantage": overlap_token_advantage,
    }


def _overlap(
    logits: Tensor,
    teacher: fastkd.TopK,
    counted: Tensor | None,
    log_prob_min_clamp: float | None,
    process_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """(overlap_count, overlap_token_advantage) of :func:`topk_losses`."""
    ids, log_p = teacher.ids.long(), teacher.logprobs.float()
    k = ids.shape[-1]
    if process_group is None:
        k = min(k, logits.shape[-1])
    student = fastkd.student_topk(logits, k=k, mask=counted, process_group=process_group)
    # Where each listed token is among the student's tokens in ascending order, if it is there at all.
    ascending, order = student.ids.sort(dim=-1)
    place = torch.searchsorted(ascending, ids.contiguous()).clamp(max=k - 1)
    listed = (ascending.gather(-1, place) == ids) & (ids >= 0)
    log_q = student.logprobs.gather(-1, order).gather(-1, place)
    if log_prob_min_clamp is not None:
        log_p, log_q = log_p.clamp_min(log_prob_min_clamp), log_q.clamp_min(log_prob_min_clamp)
    count = listed.sum(dim=-1)
    advantage = torch.where(listed, log_p.exp() * (log_q - log_p), 0.0).sum(dim=-1)
    return count, advantage / count.clamp_min(1)


# ---- second phase: the losses of the responses


def _response_losses(
    config: Any, distillation_config: Any, model_output: Any, data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The losses of the responses' tokens, [B, longest response], and verl's metrics.

    verl's own function sets negative losses to 0, which also removes their gradients. This function keeps them.
    """
    mode = distillation_config.distillation_loss.loss_mode
    if "overlap_count" not in model_output and LOSSES[mode] != _Loss(forward_kl(), "truncate"):
        raise ValueError(
            f"use_fused_kernels must be False with loss_mode {mode!r}: verl's fused kernels compute no logits, and "
            "VeOmni's compute only forward KL with the tail 'truncate'"
        )
    if "distillation_losses" not in model_output:
        raise ValueError(
            f"use_fused_kernels must be False with loss_mode {mode!r}, except for VeOmni's models: verl's fused "
            "kernels compute no distillation losses"
        )
    verl: Any = importlib.import_module(_VERL)
    padding = importlib.import_module("verl.workers.utils.padding")
    _, metrics = verl.compute_forward_kl_topk(
        config=config,
        distillation_config=distillation_config,
        model_output=model_output,
        data=data,
    )
    return padding.no_padding_2_padding(model_output["distillation_losses"], data), metrics
