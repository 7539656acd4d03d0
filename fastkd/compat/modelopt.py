r"""NVIDIA Model-Optimizer's distillation losses, with the same constructors, calls and results.

    from fastkd.compat.modelopt import LogitsDistillationLoss  # was: modelopt.torch.distill
    from fastkd.compat.modelopt import LogitsKLLoss            # was: modelopt.torch.distill.plugins.megatron
    from fastkd.compat.modelopt import KDTrainer               # was: modelopt.torch.distill.plugins.huggingface
    from fastkd.compat.modelopt import QADTrainer              # was: modelopt.torch.quantization.plugins

Only the trainers need Model-Optimizer. The losses of this module subclass torch's ``_Loss``, because
``mtd.convert(model, [("kd_loss", {"criterion": LogitsDistillationLoss(), ...})])`` requires it.
The two losses of its Megatron plug-in import megatron.core to find the process group, if the vocabulary is spread over
processes.

Its conventions are kept: forward KL; T^2 in LogitsDistillationLoss and MFTLoss but not in the plug-in's losses; the
default "mean" of LogitsDistillationLoss over rows and columns, as in F.kl_div (1/V of the mean over rows); no gradient
for the teacher. Two things differ: columns at -inf on both sides contribute 0, where Model-Optimizer returns NaN; and
everything is computed in float32, where its LogitsDistillationLoss and MFTLoss use the dtype of the logits.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from fastkd.call.checks import check_choice, check_pair, check_per_row
from fastkd.call.contract import widened
from fastkd.core.scalars import check_number
from fastkd.divergences import jsd
from fastkd.functional import fused_linear_kd_loss, kd_loss
from fastkd.teachers import LinearTeacher, TopK

if TYPE_CHECKING:

    class _Trainer:  # one of Model-Optimizer's
        _last_teacher_outputs: Any

        def __getattr__(self, name: str) -> Any: ...
else:
    _Trainer = object

# Log odds of a label whose target probability in MFTLoss is 1. The other tokens then have a probability of exp(-100)
# together, which is less than the smallest normal float32.
CERTAIN = 100.0


_REMEDY = (
    "Model-Optimizer compares whole vocabularies. If both models use one tokenizer and differ in padding, pad both to "
    "the same size (Megatron's make_vocab_size_divisible_by), or slice both logits to the n real tokens, "
    "logits[..., :n], before the criterion"
)


class LogitsDistillationLoss(_Loss):
    """modelopt.torch.distill.LogitsDistillationLoss: T^2 KL(softmax(t / T) || softmax(s / T)).

    Args:
        temperature: T > 0.
        reduction: "mean" (over rows and columns), "batchmean" (sum / size of the first dimension), "sum", or "none"
            ([...]).
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "batchmean", "sum", "none"))
        self._temperature = temperature
        self._reduction = reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        """Return the loss, 0-dim, or [...] for reduction="none".

        Args:
            logits_s: [..., V], the student's logits.
            logits_t: [..., V], the teacher's logits.
        """
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

    Each row has its own m, which raises the target probability of the label y above that of every other token by the
    threshold. If the teacher's most probable token is not y, m = (p_max - p_y + threshold) / (1 + p_max - p_y);
    otherwise m = min(threshold / (1 - p_y), 1). The logits of p' differ from the teacher's only in the label's column,
    so the target is a copy of them with that column changed.

    Args:
        temperature: T > 0.
        threshold: in [0, 1].
        reduction: "batchmean" (over rows), "mean" (also over columns) or "sum". "none" raises.
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
        """Return the loss, 0-dim.

        Args:
            logits_s: [..., V], the student's logits, N rows in total.
            logits_t: [..., V], the teacher's logits.
            labels: [N], one per row.
        """
        check_pair("logits_t", logits_t, "logits_s", logits_s, _REMEDY, lowest=2)
        check_per_row("labels", labels, torch.Size((logits_s.shape[:-1].numel(),)))
        student = logits_s.flatten(0, -2)
        return kd_loss(
            student,
            self._target_logits(logits_t.detach().flatten(0, -2), labels),
            temperature=self._temperature,
            teacher_temperature=1.0,
            reduction="sum" if self._reduction == "sum" else "mean",
            num_items=max(student.numel(), 1) if self._reduction == "mean" else None,
        )

    def _target_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return logits whose softmax is p'."""
        tempered = widened(logits) / self._temperature
        # Shift the maximum to 0: a common offset would increase the rounding error of the label's new logit.
        tempered -= tempered.amax(-1, keepdim=True)
        column = labels.unsqueeze(-1)
        label = tempered.gather(-1, column).double()
        # Sum the other tokens separately: 1 - p_y would be only rounding error if p_y is close to 1.
        tempered.scatter_(-1, column, -torch.inf)
        others = tempered.logsumexp(-1, keepdim=True).double()
        p_y, p_others = (label - others).sigmoid(), (others - label).sigmoid()
        p_best = (tempered.amax(-1, keepdim=True).double() - others).exp() * p_others
        # The other tokens' total probability under p', if the label is not the teacher's best token, and if it is.
        if_not_best = p_others * (1.0 - self._threshold) / (1.0 + p_best - p_y)
        if_best = (p_others - self._threshold).clamp(min=0.0)
        target_others = torch.where(p_best > p_y, if_not_best, if_best)
        log_odds = (torch.log1p(-target_others) - target_others.log()).clamp(max=CERTAIN)
        # If all other logits are -inf the sum is -inf too; any finite logit then gives the label probability 1.
        raised = (others + log_odds).to(tempered.dtype).clamp(min=torch.finfo(tempered.dtype).min)
        return tempered.scatter_(-1, column, raised)


class _VocabularyParallelLoss(_Loss):
    """Base of the Megatron plug-in's losses: a loss per row of logits [s, b, V_r], returned with two flags."""

    def __init__(self, model_config: Any, temperature: float, reverse: bool) -> None:
        super().__init__()
        self._config = model_config
        self._temperature = temperature
        self._reverse = reverse

    def forward(
        self, predictions: Tensor | tuple[Tensor, Any], targets: Tensor | tuple[Tensor, Any]
    ) -> tuple[Tensor, bool, bool]:
        """Return (loss [b, s], False, False).

        The loss is complete on every process; the two flags tell Megatron that it needs no reduction.

        Args:
            predictions: [s, b, V_r], this process's columns of the student's logits, or the pair (logits, bias) that a
                ColumnParallelLinear returns.
            targets: the teacher's, in the same form.
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
        """Return the group of processes that share the vocabulary, or None for a single process."""
        if self._config.tensor_model_parallel_size == 1:
            return None
        try:
            from megatron.core import parallel_state
        except ImportError as error:
            raise ImportError(
                "megatron.core is needed to find the processes that share the vocabulary: pip install megatron-core"
            ) from error
        return parallel_state.get_tensor_model_parallel_group()


class LogitsKLLoss(_VocabularyParallelLoss):
    """modelopt.torch.distill.plugins.megatron.LogitsKLLoss: KL without T^2, for tensor-parallel vocabularies.

    Model-Optimizer's class returns this process's part of the sum and requests a reduction. This one returns the
    complete loss, bit for bit the same on every process of the group. The gradients are the same.

    Args:
        model_config: the TransformerConfig, of which tensor_model_parallel_size is read.
        temperature: T > 0.
        reverse: compute KL(q || p) instead of KL(p || q).
    """

    def __init__(self, model_config: Any, temperature: float = 1.0, reverse: bool = False) -> None:
        super().__init__(model_config, temperature, reverse)

    def _teacher(self, targets: Tensor, group: Any) -> Tensor:
        return targets


class TopKLogitsKLLoss(_VocabularyParallelLoss):
    """modelopt.torch.distill.plugins.megatron.TopKLogitsKLLoss: KL over the teacher's k most probable tokens only.

    Both softmaxes are taken over these k tokens of the whole vocabulary. With n processes, Model-Optimizer's gradient
    is n times the gradient of its loss, because every process differentiates the whole loss through an all-gather. Here
    it is the gradient of the loss.

    Args:
        model_config: the TransformerConfig, of which tensor_model_parallel_size is read.
        temperature: T > 0.
        reverse: compute KL(q || p) instead of KL(p || q).
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
                f"top_k must be in [1, {columns * processes}], the vocabulary size; got {self.top_k}"
            )
        values, ids = targets.topk(min(self.top_k, columns), dim=-1)
        if group is not None:
            ids = ids + columns * torch.distributed.get_rank(group)
            values, ids = _gathered(values, group), _gathered(ids, group)
            values, positions = values.topk(self.top_k, dim=-1)
            ids = ids.gather(-1, positions)
        return TopK(ids, values, tail="renormalize")


def _gathered(values: Tensor, group: Any) -> Tensor:
    """Concatenate the tensors [..., k] of all processes along the last dimension, in rank order."""
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


class _Losses(_Trainer):
    """Replaces the losses of Model-Optimizer's KDTrainer in a subclass, which runs the models as KDTrainer does."""

    def _standard_kd_loss(self, outputs: Any, labels: Tensor | None, **_: Any) -> Tensor:
        """T^2 KL(p || q), a mean over positions whose next token has a label; without labels, over all but the last."""
        teacher, self._last_teacher_outputs = self._last_teacher_outputs, None
        logits = outputs.logits
        check_pair(
            "teacher_outputs.logits", teacher.logits, "outputs.logits", logits, _REMEDY, lowest=2
        )
        # Position i predicts token i + 1. The last position is masked, because a slice would copy the gradient.
        mask = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        mask[..., :-1] = True if labels is None else labels[..., 1:] != _IGNORED
        return kd_loss(
            logits, teacher.logits.detach(), temperature=self._kd_criterion._temperature, mask=mask
        )

    def _liger_kd_loss(self, outputs: Any, labels: Tensor, **_: Any) -> Tensor:
        """The generalized JSD of liger_jsd_beta, from the hidden states that Model-Optimizer calls outputs.logits."""
        teacher, self._last_teacher_outputs = self._last_teacher_outputs, None
        student_head = self._get_lm_head(self.accelerator.unwrap_model(self.model))
        teacher_head = self._get_lm_head(self._get_unwrapped_teacher())
        for model, head in (("student", student_head), ("teacher", teacher_head)):
            for side in ("input", "weight", "output"):
                if getattr(getattr(head, f"{side}_quantizer", None), "is_enabled", False):
                    raise ValueError(
                        f"use_liger_kernel must be False if the lm_head of the {model} is quantized "
                        f"({side}_quantizer is enabled): the loss reads the head's weight as it is"
                    )
        # Layer norms may return float32 although the heads are, for example, bfloat16.
        student_hidden = outputs.logits.to(student_head.weight.dtype)
        teacher_hidden = teacher.logits.to(teacher_head.weight.dtype)
        targets = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=_IGNORED)

        def compute() -> Tensor:
            return fused_linear_kd_loss(
                student_hidden,
                student_head.weight,
                LinearTeacher(teacher_hidden, teacher_head.weight),
                targets,
                divergence=jsd(self._liger_jsd_beta),
                temperature=self._liger_temperature,
                scale_by_temperature=False,
                ignore_index=_IGNORED,
            )

        return self._sharded_liger_compute(
            lambda: self._teacher_liger_enabled(compute, teacher_head)
        )


_IGNORED = -100
_TRAINERS = {
    "KDTrainer": "modelopt.torch.distill.plugins.huggingface",
    "QADTrainer": "modelopt.torch.quantization.plugins.transformers_trainer",
}


def __getattr__(name: str) -> Any:
    """Define KDTrainer or QADTrainer, subclasses of Model-Optimizer's, when they are first accessed."""
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    original: Any = getattr(importlib.import_module(_TRAINERS[name]), name)
    text = f"Model-Optimizer's {name} with fastkd's losses; otherwise the same, and with the same arguments."
    trainer = type(name, (_Losses, original), {"__doc__": text, "__module__": __name__})
    globals()[name] = trainer
    return trainer
