r"""Liger Kernel's distillation losses, with its constructors, calls and numbers.

    from fastkd.compat.liger import LigerFusedLinearJSDLoss  # was: liger_kernel.chunked_loss
    from fastkd.compat.liger import LigerFusedLinearJSD      # was: liger_kernel.transformers

Liger need not be installed. What is Liger's convention is kept: no T^2, the mean over labels that are not
ignore_index, half a cross-entropy mixed in by default, the student first, the teacher a constant. What differs, on
purpose, in all of them:

- the loss is float32, and computed from float32 logits, where Liger's have the dtype of its inputs;
- a vocabulary in which the teacher has padding columns is cut to the student's, where Liger fills the student up
  with logits of 0, to which the softmax gives mass;
- with no counted row the loss is 0 and part of the graph, where some of Liger's are NaN;
- a second backward of one graph gives the same gradient again.

There is no LigerFusedLinearCosineSimilarityLoss: the cosine of two rows of logits is no divergence of distributions,
and fastkd has no kernel that would make it cheaper than Liger's chunks do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import (
    Tensor,
    abs,  # noqa: A004 (a definition reads as its formula does, as in fastkd.divergences)
    exp,
    logaddexp,
    nn,
    where,
)

from fastkd.call.checks import (
    check_choice,
    check_number,
    check_pair,
    check_per_row,
    check_side,
)
from fastkd.call.contract import widened
from fastkd.divergences import Divergence, jsd
from fastkd.functional import fused_linear_kd_loss, kd_loss
from fastkd.teachers import LinearTeacher

_REMEDY = "Cut both to the tokens that they share, [..., :n], and normalise them anew"
LOWEST = torch.finfo(torch.float32).min


# ---- of log-probabilities and probabilities as they are given: with normalized=False nothing is normalised on the way
# in, g is the derivative by the given numbers, and the p and q of the arguments are not there


def _forward_of_logs(p: Any, q: Any, log_p: Any, log_q: Any, floor: Any) -> Any:
    p = exp(log_p)
    return p * (where(log_p > floor, log_p, floor) - log_q), -p


def _reverse_of_logs(p: Any, q: Any, log_p: Any, log_q: Any) -> Any:
    q = exp(log_q)
    phi = q * (log_q - log_p)
    return phi, phi + q


def _jsd_of_logs(
    p: Any, q: Any, log_p: Any, log_q: Any, beta: Any, rest: Any, log_beta: Any, log_rest: Any
) -> Any:
    log_m = logaddexp(log_p + log_beta, log_q + log_rest)
    g = rest * exp(log_q) * (log_q - log_m)
    return beta * exp(log_p) * (log_p - log_m) + g, g


def _distance_of_probabilities(p: Any, q: Any, log_p: Any, log_q: Any) -> Any:
    gap = log_q - log_p
    return 0.5 * abs(gap), 0.5 * (where(gap > 0.0, 1.0, 0.0) - where(gap < 0.0, 1.0, 0.0))


def _forward_kl(floor: float = LOWEST) -> Divergence:
    """KL(p || q) of log-probabilities; logarithms of p below the floor count as the floor, as those of Liger's eps."""
    return Divergence("liger_forward_kl", _forward_of_logs, (floor,), normalized=False)


def _jsd_as_given(beta: float) -> Divergence:
    beta = check_number("beta", beta, 0.0, 1.0)
    if beta == 0.0:
        return _forward_kl()
    if beta == 1.0:
        return Divergence("liger_reverse_kl", _reverse_of_logs, normalized=False)
    parameters = (beta, 1.0 - beta, math.log(beta), math.log1p(-beta))
    return Divergence("liger_jsd", _jsd_of_logs, parameters, normalized=False)


_DISTANCE = Divergence("liger_tvd", _distance_of_probabilities, normalized=False)


def _as_given(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    divergence: Divergence,
    reduction: str,
    ignore_index: int = -100,
) -> Tensor:
    return kd_loss(
        student,
        teacher.detach(),
        labels,
        divergence=divergence,
        ignore_index=ignore_index,
        **_reduced(reduction, student.shape, labels, ignore_index),
        # These definitions are no part of the C++ kernel's table.
        backend="portable" if student.device.type == "cpu" else "auto",
    )


def _reduced(
    reduction: str, shape: torch.Size, labels: Tensor | None, ignore_index: int
) -> dict[str, Any]:
    """Options for "sum", "batchmean" (the mean of counted rows) and "mean" (also over columns) of logits [..., V]."""
    if reduction != "mean":
        return {"reduction": "sum" if reduction == "sum" else "mean"}
    rows = max(shape[:-1].numel(), 1) if labels is None else (labels != ignore_index).sum()
    return {"num_items": rows * shape[-1]}


class LigerJSD(nn.Module):
    r"""liger_kernel.transformers.LigerJSD: the generalised Jensen-Shannon divergence of log-probabilities.

        beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q;   0: KL(p || q), 1: KL(q || p)

    The gradient is by log q as it is given, so that a log_softmax before it gets what it expects. Where the logits are
    at hand, ``fastkd.kd_loss(logits, teacher_logits, divergence=fastkd.jsd(beta))`` is the same loss without
    log-probabilities in memory, and the fast path; this module spares neither.

    Liger gives NaN where a column has probability 0 on both sides, and rounds the loss to the dtype of log_q.

    Args:
        beta: the teacher's share of the mixture, in [0, 1].
        ignore_index: the label that drops a row.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index
        self._divergence = _jsd_as_given(beta)

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """Student's and teacher's log-probabilities [..., V], labels [...]; the mean over rows that count, 0-dim."""
        check_pair("log_p", log_p, "log_q", log_q, _REMEDY)
        check_per_row("shift_labels", shift_labels, log_q.shape[:-1])
        return _as_given(
            log_q, log_p, shift_labels, self._divergence, "batchmean", self.ignore_index
        )


class LigerKLDIVLoss(nn.KLDivLoss):
    r"""liger_kernel.transformers.LigerKLDIVLoss: sum p (log max(p, eps) - log q) of log-probabilities of the student.

    The gradient is by log q as it is given; the target is a constant. "batchmean" divides by the number of rows, and
    "mean", the default as in Liger and torch, by the vocabulary too. Liger takes [rows, V] alone, of which the rows are
    torch's size(0); of more dimensions each leading position is a row here, where torch's "batchmean" divides by
    size(0) only. The one without a reduction, [..., V], is what torch computes. Liger gives NaN where p and q are 0.

    Args:
        eps: probabilities of the target below it have its logarithm; not used with log_target.
        args: as torch.nn.KLDivLoss has them, (size_average, reduce, reduction), and
        kwargs: by name: reduction "none", "sum", "batchmean" or "mean"; log_target, whether targets are logarithms.
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_choice("reduction", self.reduction, ("none", "sum", "batchmean", "mean"))
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """log q [..., V], and p or, with log_target, log p; 0-dim, or [..., V] without a reduction."""
        check_pair("y_true", y_true, "y_pred", y_pred, _REMEDY)
        log_p = widened(y_true.detach())
        if not self.log_target:
            log_p = log_p.log()
        floor = math.log(self.eps) if self.eps > 0 and not self.log_target else LOWEST
        if self.reduction == "none":
            terms = log_p.exp() * (log_p.clamp(min=floor) - y_pred)
            return torch.where(log_p == -math.inf, 0.0, terms)
        return _as_given(y_pred, log_p, None, _forward_kl(floor), self.reduction)


class LigerTVDLoss(nn.Module):
    r"""liger_kernel.transformers.LigerTVDLoss: the total variation distance 1/2 sum |p - q| of probabilities.

    The first argument is the student's, and gets the gradient sign(p - q) / 2; the second is a constant. Divided by the
    rows that count for "batchmean", the default, and by the vocabulary too for "mean". Where the logits are at hand,
    ``fastkd.kd_loss(logits, teacher_logits, divergence="tvd")`` is the same loss, and the fast path.

    Liger divides by 0 where no row counts, and takes the difference in the dtype of the probabilities.

    Args:
        reduction: "none" ([..., V], 0 in dropped rows), "sum", "batchmean" or "mean".
        ignore_index: the label that drops a row.
    """

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("none", "sum", "batchmean", "mean"))
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """Probabilities [..., V] of student and teacher, labels [...]; 0-dim, or [..., V] without a reduction."""
        check_pair("q", q, "p", p, _REMEDY)
        check_per_row("shift_labels", shift_labels, p.shape[:-1])
        if self.reduction != "none":
            return _as_given(p, q, shift_labels, _DISTANCE, self.reduction, self.ignore_index)
        terms = 0.5 * (widened(p) - widened(q.detach())).abs()
        if shift_labels is not None:
            terms = terms.masked_fill((shift_labels == self.ignore_index).unsqueeze(-1), 0.0)
        return terms


# ---- from hidden states and heads


class LigerFusedLinearJSDLoss(nn.Module):
    r"""liger_kernel.chunked_loss.LigerFusedLinearJSDLoss: cross-entropy and JSD from hidden states and heads.

        weight_hard_loss CE(softmax(s), label) + weight_soft_loss JSD_beta(softmax(t / T), softmax(s / T))

    over the labels that are not ignore_index, without T^2. Each [chunk_size, V] of logits is made once.

    Liger's gradient through the soft_loss and hard_loss that it returns is lost; here they are detached.

    Args:
        weight_hard_loss: of the cross-entropy, at temperature 1; not negative.
        weight_soft_loss: of the JSD; not negative, and not both are 0.
        beta: the teacher's share of the mixture, in [0, 1]; 0 is KL(p || q), 1 is KL(q || p).
        ignore_index: the label that drops a row.
        temperature: T > 0.
        compiled: accepted, as Liger's callers pass it: there is nothing to compile.
        chunk_size: rows whose logits are held at once.
        return_soft_hard_loss: return (loss, soft_loss, hard_loss); the last two before their weights, detached.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        for name, weight in (
            ("weight_hard_loss", weight_hard_loss),
            ("weight_soft_loss", weight_soft_loss),
        ):
            check_number(name, weight, 0.0, math.inf, open_right=True)
        if weight_hard_loss == weight_soft_loss == 0:
            raise ValueError("weight_hard_loss and weight_soft_loss must not both be 0")
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Hidden states [N, H], heads [V, H] and biases [V] of both, labels [N]; 0-dim."""
        _check_sides(student_input, student_weight, teacher_input, teacher_weight)
        if true_labels is None:
            raise TypeError("true_labels must be a tensor, got NoneType")
        check_per_row("true_labels", true_labels, student_input.shape[:-1])
        total = self.weight_hard_loss + self.weight_soft_loss
        alpha = self.weight_soft_loss / total
        given = (student_input, student_weight, teacher_input, teacher_weight, true_labels)
        biases = (student_bias, teacher_bias)
        counted = (true_labels != self.ignore_index).sum()
        loss, parts = self._loss(*given, *biases, alpha, counted.to(torch.float64) / total)
        if not self.return_soft_hard_loss:
            return loss
        soft, hard = (
            part.sum() / counted.clamp(min=1) for part in (parts.distillation, parts.cross_entropy)
        )
        if alpha in (0.0, 1.0):  # the one of weight 0 was not computed
            with torch.no_grad():
                other, _ = self._loss(*given, *biases, 1.0 - alpha, counted)
            soft, hard = (soft, other) if alpha else (other, hard)
        return loss, soft, hard

    def _loss(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        alpha: float,
        num_items: Tensor,
    ) -> tuple[Tensor, Any]:
        return fused_linear_kd_loss(
            student_input,
            student_weight,
            _teacher(teacher_input, teacher_weight, teacher_bias),
            true_labels,
            student_bias=student_bias,
            divergence=jsd(self.beta),
            temperature=self.temperature,
            scale_by_temperature=False,
            alpha=alpha,
            ignore_index=self.ignore_index,
            num_items=num_items,
            chunk_size=self.chunk_size,
            vocab_size=min(len(student_weight), len(teacher_weight)),
            return_parts=True,
        )


class LigerFusedLinearJSD(nn.Module):
    r"""liger_kernel.transformers.LigerFusedLinearJSD: the JSD from hidden states and heads, without a cross-entropy.

    The mean over rows that count, without T^2. The gradient of the head is summed in float32.

    Args:
        jsd_beta: the teacher's share of the mixture, in [0, 1]; 0 is KL(p || q), 1 is KL(q || p).
        ignore_index: the label that drops a row.
        temperature: T > 0.
        accum_dtype: accepted, as Liger's callers pass it: None sums in the head's dtype there, here always in float32.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        """Hidden states [N, H] and heads [V, H] of both, labels [N] or None; 0-dim."""
        _check_sides(student_input, student_weight, teacher_input, teacher_weight)
        check_per_row("shift_labels", shift_labels, student_input.shape[:-1])
        return fused_linear_kd_loss(
            student_input,
            student_weight,
            _teacher(teacher_input, teacher_weight),
            shift_labels,
            divergence=jsd(self.jsd_beta),
            temperature=self.temperature,
            scale_by_temperature=False,
            ignore_index=self.ignore_index,
            vocab_size=min(len(student_weight), len(teacher_weight)),
        )


class LigerFusedLinearKLDivLoss(nn.Module):
    r"""liger_kernel.transformers.LigerFusedLinearKLDivLoss: KL(target || softmax(s / T)) from hidden states.

    The target is probabilities [N, V], of which the logarithm is held beside them; ``fastkd.TopK`` and
    ``fastkd.LinearTeacher`` need neither. It is taken for a distribution: divided by its sum, where Liger takes it as
    it is, which differs by the rounding of low-precision targets. Without T^2; the temperature is the student's alone.

    Args:
        reduction: "batchmean" (over rows that count), "mean" (also over the vocabulary) or "sum".
        ignore_index: the label that drops a row.
        temperature: T > 0.
        eps: accepted, as Liger's callers pass it: there it bounds log p from below; here 0 log 0 is 0.
        accum_dtype: accepted likewise: the gradient of the head is summed in float32.
    """

    def __init__(
        self,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("batchmean", "mean", "sum"))
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.eps = eps
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        target: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, H], head [V, H], probabilities [N, V], labels [N] or None; 0-dim."""
        check_side("student_input", student_input, "student_weight", student_weight)
        check_per_row("shift_labels", shift_labels, student_input.shape[:-1])
        if not target.is_floating_point():
            raise TypeError(
                f"target must be probabilities, a floating-point tensor; got {target.dtype}"
            )
        if target.shape[:-1] != student_input.shape[:-1]:
            raise ValueError(
                f"target must have the rows of student_input, {tuple(student_input.shape[:-1])}; got "
                f"{tuple(target.shape)}"
            )
        if target.dim() < 1 or target.shape[-1] != len(student_weight):
            raise ValueError(
                f"target must have the {len(student_weight)} columns of student_weight; got {tuple(target.shape)}. Cut "
                "the wider of both to the tokens that they share: fewer rows of student_weight, or target[..., :n], "
                "which is normalised here"
            )
        return fused_linear_kd_loss(
            student_input,
            student_weight,
            widened(target.detach()).log(),
            shift_labels,
            temperature=self.temperature,
            teacher_temperature=1.0,
            scale_by_temperature=False,
            ignore_index=self.ignore_index,
            **_reduced(self.reduction, target.shape, shift_labels, self.ignore_index),
        )


def _check_sides(
    student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor
) -> None:
    check_side("student_input", student_input, "student_weight", student_weight)
    check_side("teacher_input", teacher_input, "teacher_weight", teacher_weight)
    if teacher_input.shape[:-1] != student_input.shape[:-1]:
        raise ValueError(
            f"teacher_input must have the rows of student_input, {tuple(student_input.shape[:-1])}; got "
            f"{tuple(teacher_input.shape[:-1])}"
        )


def _teacher(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> LinearTeacher:
    return LinearTeacher(hidden.detach(), weight.detach(), None if bias is None else bias.detach())
