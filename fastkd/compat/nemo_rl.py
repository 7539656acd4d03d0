"""NeMo-RL: the loss of its on-policy distillation, from logits.

    import nemo_rl.algorithms.distillation as distillation
    from fastkd.compat.nemo_rl import DistillationLossFn

    distillation.DistillationLossFn = DistillationLossFn

NeMo-RL is not on PyPI, so the tests compare with its formulas. docs/stacks/nemo_rl.md lists what differs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastkd.call.checks import check_choice, is_dtensor
from fastkd.core.scalars import check_number
from fastkd.divergences import Divergence, forward_kl, mixture, reverse_kl
from fastkd.functional import kd_loss
from fastkd.parallel import layout
from fastkd.teachers import TopK

# The value that NeMo-RL gives log p of a token outside the teacher's top k.
LOG_ZERO = -100.0


class DistillationLossFn:
    r"""``nemo_rl.algorithms.loss.DistillationLossFn``: KL over the teacher's top-k tokens, a mean over valid tokens.

        w KL(p || q) + (1 - w) KL(q || p)

    with w = 1 for kl_type "forward", 0 for "reverse", and mixed_kl_weight for "mixed". p is the softmax of the
    teacher's k logits. If zero_outside_topk is False, q is the softmax over the same k tokens. If it is True, q is over
    the whole vocabulary, and log p is -100 outside the top k.

    NeMo-RL reads ``input_type`` to decide what it passes. Its own class gets log-probabilities, for which NeMo-RL
    copies all logits to float32 first; this class gets the logits themselves.

    Args:
        cfg: has kl_type, mixed_kl_weight in [0, 1] and zero_outside_topk.

    Raises:
        ValueError, TypeError: an option has a wrong value or type; the message names it.
    """

    def __init__(self, cfg: Any) -> None:
        check_choice("kl_type", cfg.kl_type, ("forward", "reverse", "mixed"))
        self.kl_type: str = cfg.kl_type
        self.mixed_kl_weight = check_number("mixed_kl_weight", cfg.mixed_kl_weight, 0.0, 1.0)
        self.zero_outside_topk = bool(cfg.zero_outside_topk)

    @property
    def loss_type(self) -> Any:
        """NeMo-RL's ``LossType.TOKEN_LEVEL``: the loss is divided by the number of tokens."""
        return _interfaces().LossType.TOKEN_LEVEL

    @property
    def input_type(self) -> Any:
        """NeMo-RL's ``LossInputType.LOGIT``: NeMo-RL passes the logits."""
        return _interfaces().LossInputType.LOGIT

    def __call__(
        self,
        logits: Tensor,
        data: Mapping[str, Any],
        global_valid_seqs: Tensor | None,
        global_valid_toks: Tensor | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Compute the loss and NeMo-RL's metrics.

        Position i of the logits and of the teacher predicts token i + 1; the last position does not count.

        Args:
            logits: [B, S, V], the student's. DTensors sharded over the vocabulary stay sharded. Plain tensors are the
                shard of this process if megatron.core has tensor parallelism.
            data: has input_ids [B, S], teacher_topk_logits and teacher_topk_indices [B, S, K], and token_mask [B, S]
                and sample_mask [B], which multiply the loss of a token. Without the masks, all tokens count.
            global_valid_seqs: without effect.
            global_valid_toks: the number of valid tokens in the whole batch; None: the sum of the masks in data.

        Returns:
            (the loss, 0-dim; {"loss": its value, "num_valid_samples": B}).

        Raises:
            ValueError, TypeError: an argument has the wrong shape, dtype, device or value, or the sequence is divided
                over processes (context parallelism).
        """
        ids, scores = data["teacher_topk_indices"], data["teacher_topk_logits"]
        _check(logits, ids, scores)
        if logits.shape[1] > ids.shape[1]:  # padding of a packed sequence
            logits = logits[:, : ids.shape[1]]
        group, start = _vocabulary(logits)
        if group is not None:
            logits = layout.local("logits", logits, -1, group)
        ids, scores = ids.to(logits.device), scores.to(logits.device).detach()
        weight, counted = _weights(data, ids.shape[:2], logits.device)
        loss = kd_loss(
            logits,
            self._teacher(ids, scores, logits.shape[-1], start),
            divergence=self._divergence(),
            mask=weight != 0,
            weight=weight,
            reduction="sum",
            process_group=group,
        )
        divisor = counted if global_valid_toks is None else global_valid_toks
        loss = loss / (divisor + 1e-8)
        return loss, {"loss": loss.item(), "num_valid_samples": data["input_ids"].shape[0]}

    def _divergence(self) -> Divergence:
        weight = {"forward": 1.0, "reverse": 0.0}.get(self.kl_type, self.mixed_kl_weight)
        if weight in (0.0, 1.0):
            return forward_kl() if weight else reverse_kl()
        return mixture(weight, 1.0 - weight)

    def _teacher(self, ids: Tensor, scores: Tensor, width: int, start: int) -> Tensor | TopK:
        """The teacher: a TopK, or columns [start, start + width) of logits that are -100 outside the top k."""
        if not self.zero_outside_topk:
            return TopK(ids, scores, tail="renormalize")
        if self.kl_type == "forward":
            return TopK(ids, scores, tail="renormalize_teacher")
        columns = ids.long() - start
        # Tokens of other processes go to one more column, which is cut off.
        columns = torch.where((columns >= 0) & (columns < width), columns, width)
        logits = torch.full((*ids.shape[:2], width + 1), LOG_ZERO, device=ids.device)
        return logits.scatter_(-1, columns, scores.float().log_softmax(-1))[..., :width]


def _check(logits: Tensor, ids: Tensor, scores: Tensor) -> None:
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating point [B, S, V], got {logits.dtype} {tuple(logits.shape)}"
        )
    if ids.dim() != 3 or len(ids) != len(logits) or not 0 < ids.shape[1] <= logits.shape[1]:
        raise ValueError(
            f"teacher_topk_indices must be [B, S, K] with B = {len(logits)} and S at most {logits.shape[1]}, as in "
            f"logits; got {tuple(ids.shape)}"
        )
    if ids.shape[-1] == 0:
        raise ValueError("topk must be positive: teacher_topk_indices must list tokens, got none")
    if scores.shape != ids.shape:
        raise ValueError(
            f"teacher_topk_logits must have the shape of teacher_topk_indices, {tuple(ids.shape)}; got "
            f"{tuple(scores.shape)}"
        )
    if ids.is_floating_point() or not scores.is_floating_point():
        raise TypeError(
            "teacher_topk_indices must be integers and teacher_topk_logits floating point, got "
            f"{ids.dtype} and {scores.dtype}"
        )


def _interfaces() -> Any:
    return importlib.import_module("nemo_rl.algorithms.loss.interfaces")


def _weights(data: Mapping[str, Any], lead: torch.Size, device: torch.device) -> tuple[Tensor, Any]:
    """(the weight of each position [B, S], 0 in the last; the sum of the weights)."""
    weight = torch.ones(lead, device=device)
    if "token_mask" in data and "sample_mask" in data:
        tokens, samples = data["token_mask"], data["sample_mask"]
        if tokens.dim() != 2 or len(tokens) != lead[0] or tokens.shape[1] < lead[1]:
            raise ValueError(
                f"token_mask must be [B, S] with B = {lead[0]} and S at least {lead[1]}, as in teacher_topk_indices; "
                f"got {tuple(tokens.shape)}"
            )
        if samples.shape != lead[:1]:
            raise ValueError(
                f"sample_mask must be [B] with B = {lead[0]}, got {tuple(samples.shape)}"
            )
        weight[:, :-1] = tokens[:, 1 : lead[1]] * samples.unsqueeze(-1)
    weight[:, -1] = 0.0
    return weight, weight.sum()


def _vocabulary(logits: Tensor) -> tuple[Any, int]:
    """(the processes that share the vocabulary, or None; the first column of this process)."""
    group = layout.group_of(None, logits)
    if is_dtensor(logits):
        mesh: Any = logits.device_mesh  # type: ignore[attr-defined]
        if "cp" in (mesh.mesh_dim_names or ()) and mesh["cp"].size() > 1:
            raise ValueError(_CONTEXT)
        if group is None:
            return None, 0
        width = -(-logits.shape[-1] // group.size())  # as torch.chunk divides the columns
        return group, min(width * group.rank(), logits.shape[-1])
    state: Any = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return None, 0
    if state.get_context_parallel_world_size() > 1:
        raise ValueError(_CONTEXT)
    if state.get_tensor_model_parallel_world_size() == 1:
        return None, 0
    group = state.get_tensor_model_parallel_group()
    return group, logits.shape[-1] * group.rank()


_CONTEXT = (
    "logits must hold whole sequences; context parallelism divides them. Set context_parallel_size to 1, or use "
    "NeMo-RL's own DistillationLossFn"
)
