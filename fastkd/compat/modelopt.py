r"""NVIDIA Model-Optimizer's distillation losses, with its constructors, calls and numbers.

    from fastkd.compat.modelopt import LogitsDistillationLoss  # was: modelopt.torch.distill
    from fastkd.compat.modelopt import LogitsKLLoss            # was: modelopt.torch.distill.plugins.megatron

Model-Optimizer need not be installed: its criteria are torch's own ``_Loss``, and so are these, which is what
``mtd.convert(model, [("kd_loss", {"criterion": LogitsDistillationLoss(), ...})])`` asks of one. The two of its Megatron
plug-in import megatron.core where the vocabulary is spread over processes, to ask for the group of these.

What is its convention is kept: forward KL, T^2 in LogitsDistillationLoss and MFTLoss and not in the plug-in's, the
default "mean" of LogitsDistillationLoss over rows and columns (as F.kl_div has it, a V-th of the mean over rows), the
teacher a constant. Columns at -inf on both sides contribute 0, where its losses are NaN, and everything is computed in
float32, where LogitsDistillationLoss and MFTLoss compute in the dtype of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from fastkd.call.checks import check_choice, check_number, check_pair, check_per_row
from fastkd.call.contract import widened
from fastkd.functional import kd_loss
from fastkd.teachers import TopK

# Logarithm of the odds of a label that MFTLoss makes certain: what is left to others is no float32.
CERTAIN = 100.0


_REMEDY = (
    "Model-Optimizer compares whole vocabularies: where the rest is padding of one tokenizer, pad both models alike "
    "(Megatron's make_vocab_size_divisible_by), or have the criterion get logits[..., :n] of its n tokens"
)


class LogitsDistillationLoss(_Loss):
    """modelopt.torch.distill.LogitsDistillationLoss: T^2 KL(softmax(t / T) || softmax(s / T)).

    Args:
        temperature: T > 0.
        reduction: "mean" (over rows and columns), "batchmean" (over the first dimension), "sum", or "none" ([...]).
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "batchmean", "sum", "none"))
        self._temperature = temperature
        self._reduction = reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        """Logits [..., V] of the student and of the teacher; 0-dim, or [...] without a reduction."""
        check_pair("logits_t", logits_t, "logits_s", logits_s, _REMEDY)
        return kd_loss(
            logits_s,
            logits_t.detach(),
            temperature=self._temperature,
            reduction=self._reduction,
            num_items=max(logits_s.numel(), 1) if self._reduction == "mean" else None,
        )


class MFTLoss(_Loss):
    r"""modelopt.torch.distill.MFTLoss: minifinetuning (Belcak et al. 2025, arXiv 2506.15702).

        T^2 KL(p' || softmax(s / T)),   p' = (1 - m) p + m onehot(y),   p = softmax(t / T)

    with the m of a row that lifts the label y above the teacher's other tokens by the threshold: where the most
    probable token is another, (p_max - p_y + threshold) / (1 + p_max - p_y); else (p_y + threshold - p_max) / (1 -
    p_max), with p_y + threshold at most 1. Of the teacher's logits only the label's is another one for it, so a copy of
    them with that column changed is the target.

    Args:
        temperature: T > 0.
        threshold: in [0, 1].
        reduction: "batchmean" (over rows), "mean" (also over columns) or "sum". "none" raises: it would be [N, V].
    """

    def __init__(
        self, temperature: float = 1.0, threshold: float = 0.2, reduction: str = "batchmean"
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("batchmean", "mean", "sum"))
        self._temperature = temperature
        self._threshold = check_number("threshold", threshold, 0.0, 1.0)
        self._reduction = reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor, labels: Tensor) -> Tensor:
        """Logits [..., V] of the student and of the teacher, labels [N], one a row; 0-dim."""
        check_pair("logits_t", logits_t, "logits_s", logits_s, _REMEDY, lowest=2)
        check_per_row("labels", labels, torch.Size((logits_s.shape[:-1].numel(),)))
        student = logits_s.flatten(0, -2)
        return kd_loss(
            student,
            self._corrected(logits_t.detach().flatten(0, -2), labels),
            temperature=self._temperature,
            teacher_temperature=1.0,
            reduction="sum" if self._reduction == "sum" else "mean",
            num_items=max(student.numel(), 1) if self._reduction == "mean" else None,
        )

    def _corrected(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits whose softmax is p'."""
        tempered = widened(logits) / self._temperature
        # About 0, so that the label's new logit is rounded as finely as its odds ask for.
        tempered -= tempered.amax(-1, keepdim=True)
        seat = labels.unsqueeze(-1)
        label = tempered.gather(-1, seat).double()
        # The label's odds are against the others, which are summed by themselves: 1 - p_y may be rounding alone.
        tempered.scatter_(-1, seat, -torch.inf)
        others = tempered.logsumexp(-1, keepdim=True).double()
        p_y, p_others = (label - others).sigmoid(), (others - label).sigmoid()
        p_best = (tempered.amax(-1, keepdim=True).double() - others).exp() * p_others
        below = p_others * (1.0 - self._threshold) / (1.0 + p_best - p_y)
        above = (p_others - self._threshold).clamp(min=0.0)
        rest = torch.where(p_best > p_y, below, above)  # the others' mass in p'
        odds = (torch.log1p(-rest) - rest.log()).clamp(max=CERTAIN)
        # Finite where the others are all -inf, as the odds are against nothing.
        lifted = (others + odds).to(tempered.dtype).clamp(min=torch.finfo(tempered.dtype).min)
        return tempered.scatter_(-1, seat, lifted)


class _OverVocabulary(_Loss):
    """What the losses of the Megatron plug-in share: a loss a row of logits [s, b, V_r], and the flags beside it."""

    def __init__(self, model_config: Any, temperature: float, reverse: bool) -> None:
        super().__init__()
        self._config = model_config
        self._temperature = temperature
        self._reverse = reverse

    def forward(
        self, predictions: Tensor | tuple[Tensor, Any], targets: Tensor | tuple[Tensor, Any]
    ) -> tuple[Tensor, bool, bool]:
        """This process's columns of both models' logits, [s, b, V_r], or the (logits, bias) of a ColumnParallelLinear.

        Returns:
            (loss [b, s], False, False): whole on every process, so that nothing is left to be reduced over them.
        """
        if isinstance(predictions, tuple):
            predictions = predictions[0]
        if isinstance(targets, tuple):
            targets = targets[0]
        check_pair("targets", targets, "predictions", predictions, _REMEDY, lowest=3)
        group = self._group()
        loss = kd_loss(
            predictions,
            self._teacher(targets.detach(), group),
            divergence="reverse_kl" if self._reverse else "forward_kl",
            temperature=self._temperature,
            scale_by_temperature=False,
            reduction="none",
            process_group=group,
        )
        return loss.transpose(0, 1).contiguous(), False, False

    def _teacher(self, targets: Tensor, group: Any) -> Tensor | TopK:
        raise NotImplementedError

    def _group(self) -> Any:
        """The processes that share the vocabulary; None where there is one."""
        if self._config.tensor_model_parallel_size == 1:
            return None
        try:
            from megatron.core import parallel_state
        except ImportError as error:
            raise ImportError(
                "megatron.core says which processes share the vocabulary: pip install megatron-core"
            ) from error
        return parallel_state.get_tensor_model_parallel_group()


class LogitsKLLoss(_OverVocabulary):
    """modelopt.torch.distill.plugins.megatron.LogitsKLLoss: KL of a vocabulary that processes may share, without T^2.

    Theirs returns each process's share of the sum and asks for a reduction; this one is whole, and the same bits, on
    every process of the group. The gradients are the same.

    Args:
        model_config: the TransformerConfig; its tensor_model_parallel_size is read.
        temperature: T > 0.
        reverse: KL(q || p) in place of KL(p || q).
    """

    def __init__(self, model_config: Any, temperature: float = 1.0, reverse: bool = False) -> None:
        super().__init__(model_config, temperature, reverse)

    def _teacher(self, targets: Tensor, group: Any) -> Tensor:
        return targets


class TopKLogitsKLLoss(_OverVocabulary):
    """modelopt.torch.distill.plugins.megatron.TopKLogitsKLLoss: KL of the teacher's k most probable tokens alone.

    Both softmaxes are over these k of the whole vocabulary. Over n processes the gradient of theirs is n times that of
    its loss, as every process differentiates the whole through an all-gather; this one's is the loss's.

    Args:
        model_config: the TransformerConfig; its tensor_model_parallel_size is read.
        temperature: T > 0.
        reverse: KL(q || p) in place of KL(p || q).
        top_k: k, at most the size of the vocabulary.
    """

    def __init__(
        self,
        model_config: Any,
        temperature: float = 1.0,
        reverse: bool = False,
        top_k: int = 1024,
    ) -> None:
        super().__init__(model_config, temperature, reverse)
        self.top_k = top_k

    def _teacher(self, targets: Tensor, group: Any) -> TopK:
        columns, processes = targets.shape[-1], self._config.tensor_model_parallel_size
        if not 1 <= self.top_k <= columns * processes:
            raise ValueError(
                f"top_k must be in [1, {columns * processes}], the vocabulary; got {self.top_k}"
            )
        values, ids = targets.topk(min(self.top_k, columns), dim=-1)
        if group is not None:
            ids = ids + columns * torch.distributed.get_rank(group)
            values, ids = _gathered(values, group), _gathered(ids, group)
            values, seats = values.topk(self.top_k, dim=-1)
            ids = ids.gather(-1, seats)
        return TopK(ids, values, tail="renormalize")


def _gathered(values: Tensor, group: Any) -> Tensor:
    """[..., k] of every process side by side."""
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
