r"""Liger Kernel's distillation losses, with the same constructors, calls and results.

    from fastkd.compat.liger import LigerFusedLinearJSDLoss  # was: liger_kernel.chunked_loss
    from fastkd.compat.liger import LigerFusedLinearJSD      # was: liger_kernel.transformers

Liger need not be installed. Its conventions are kept: no T^2 factor, the mean over labels that are not ignore_index,
equal weights of cross-entropy and JSD by default, student arguments first, no gradient for the teacher. All losses
differ deliberately in these points:

- the loss is float32 and computed from float32 logits; Liger uses the dtype of the inputs;
- if the teacher's vocabulary has padding columns, it is cut to the student's; Liger pads the student with logits of 0,
  which receive probability;
- with no counted row the loss is 0 and part of the graph; some of Liger's losses are NaN;
- a second backward through the same graph gives the same gradient.

LigerFusedLinearCosineSimilarityLoss is not provided: cosine similarity of logits is not a divergence of distributions,
and fastkd has no kernel that would make it cheaper than Liger's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import (
    Tensor,
    abs,  # noqa: A004 (a definition should read like its formula, as in fastkd.divergences)
    exp,
    logaddexp,
    nn,
    where,
)

from fastkd.call.checks import check_choice, check_pair, check_per_row, check_side
from fastkd.call.contract import widened
from fastkd.core.scalars import check_number
from fastkd.core.tensors import savable
from fastkd.divergences import Divergence, jsd
from fastkd.engine.gradients import differentiable_once
from fastkd.functional import fused_linear_kd_loss, kd_loss
from fastkd.logprobs import LogProbs, fused_linear_logprobs
from fastkd.teachers import LinearTeacher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_REMEDY = "Cut both to their n shared tokens, [..., :n], and normalize them again"
LOWEST = torch.finfo(torch.float32).min


# ---- losses of log-probabilities or probabilities
#
# The divergences below set normalized=False, so the inputs arrive unchanged as log_p and log_q, g is the derivative
# with respect to them, and the arguments p and q are unused.


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
    """KL(p || q) of log-probabilities, with log p clamped to at least floor, as Liger's eps does."""
    return Divergence("liger_forward_kl", _forward_of_logs, (floor,), normalized=False)


def _unnormalized_jsd(beta: float) -> Divergence:
    beta = check_number("beta", beta, 0.0, 1.0)
    if beta == 0.0:
        return _forward_kl()
    if beta == 1.0:
        return Divergence("liger_reverse_kl", _reverse_of_logs, normalized=False)
    parameters = (beta, 1.0 - beta, math.log(beta), math.log1p(-beta))
    return Divergence("liger_jsd", _jsd_of_logs, parameters, normalized=False)


_DISTANCE = Divergence("liger_tvd", _distance_of_probabilities, normalized=False)


def _unnormalized_loss(
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
        **_reduction_options(reduction, student.shape, labels, ignore_index),
        # The C++ kernel does not contain these definitions.
        backend="portable" if student.device.type == "cpu" else "auto",
    )


def _reduction_options(
    reduction: str, shape: torch.Size, labels: Tensor | None, ignore_index: int
) -> dict[str, Any]:
    """Return kd_loss options for "sum", "batchmean" (mean over counted rows) and "mean" (over rows and columns)."""
    if reduction != "mean":
        return {"reduction": "sum" if reduction == "sum" else "mean"}
    rows = max(shape[:-1].numel(), 1) if labels is None else (labels != ignore_index).sum()
    return {"num_items": rows * shape[-1]}


class LigerJSD(nn.Module):
    r"""liger_kernel.transformers.LigerJSD: the generalized Jensen-Shannon divergence of log-probabilities.

        beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q;   0: KL(p || q), 1: KL(q || p)

    The gradient is with respect to log q, for a log_softmax before this module. If the logits are available, prefer
    ``fastkd.kd_loss(logits, teacher_logits, divergence=fastkd.jsd(beta))``: the same loss, faster, and without
    storing log-probabilities.

    Liger returns NaN if a column has probability 0 on both sides, and rounds the loss to the dtype of log_q.

    Args:
        beta: weight of the teacher in the mixture, in [0, 1].
        ignore_index: the label that drops a row.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index
        self._divergence = _unnormalized_jsd(beta)

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """Return the mean over counted rows, 0-dim.

        Args:
            log_q: [..., V], the student's log-probabilities.
            log_p: [..., V], the teacher's log-probabilities.
            shift_labels: [...], or None to count all rows.
        """
        check_pair("log_p", log_p, "log_q", log_q, _REMEDY)
        check_per_row("shift_labels", shift_labels, log_q.shape[:-1])
        return _unnormalized_loss(
            log_q, log_p, shift_labels, self._divergence, "batchmean", self.ignore_index
        )


class LigerKLDIVLoss(nn.KLDivLoss):
    r"""liger_kernel.transformers.LigerKLDIVLoss: sum p (log max(p, eps) - log q), from the student's log q.

    The gradient is with respect to log q; the target receives none. "batchmean" divides by the number of rows; "mean",
    the default in Liger and torch, also by the vocabulary size. Liger accepts [rows, V] only. Here every leading
    position is a row, whereas torch's "batchmean" divides by size(0) only. Without a reduction the result is [..., V],
    as in torch. Liger returns NaN where both p and q are 0.

    Args:
        eps: lower bound of the target's probabilities inside the logarithm; not used with log_target.
        args: positional arguments of torch.nn.KLDivLoss: size_average, reduce, reduction.
        kwargs: keyword arguments of torch.nn.KLDivLoss: reduction, "none", "sum", "batchmean" or "mean"; and
            log_target, whether targets are log-probabilities.
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_choice("reduction", self.reduction, ("none", "sum", "batchmean", "mean"))
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Return the loss, 0-dim, or [..., V] for reduction="none".

        Args:
            y_pred: [..., V], the student's log-probabilities.
            y_true: [..., V], the teacher's probabilities; with log_target its log-probabilities.
        """
        check_pair("y_true", y_true, "y_pred", y_pred, _REMEDY)
        log_p = widened(y_true.detach())
        if not self.log_target:
            log_p = log_p.log()
        floor = math.log(self.eps) if self.eps > 0 and not self.log_target else LOWEST
        if self.reduction == "none":
            terms = log_p.exp() * (log_p.clamp(min=floor) - y_pred)
            return torch.where(log_p == -math.inf, 0.0, terms)
        return _unnormalized_loss(y_pred, log_p, None, _forward_kl(floor), self.reduction)


class LigerTVDLoss(nn.Module):
    r"""liger_kernel.transformers.LigerTVDLoss: the total variation distance 1/2 sum |p - q| of probabilities.

    The first argument is the student's and receives the gradient sign(p - q) / 2; the second receives none.
    "batchmean", the default, divides by the number of counted rows, "mean" also by the vocabulary size. If the logits
    are available, prefer ``fastkd.kd_loss(logits, teacher_logits, divergence="tvd")``, which computes the same loss
    faster.

    Liger divides by 0 if no row is counted, and subtracts in the dtype of the probabilities.

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
        """Return the loss, 0-dim, or [..., V] for reduction="none".

        Args:
            p: [..., V], the student's probabilities.
            q: [..., V], the teacher's probabilities.
            shift_labels: [...], or None to count all rows.
        """
        check_pair("q", q, "p", p, _REMEDY)
        check_per_row("shift_labels", shift_labels, p.shape[:-1])
        if self.reduction != "none":
            return _unnormalized_loss(
                p, q, shift_labels, _DISTANCE, self.reduction, self.ignore_index
            )
        terms = 0.5 * (widened(p) - widened(q.detach())).abs()
        if shift_labels is not None:
            terms = terms.masked_fill((shift_labels == self.ignore_index).unsqueeze(-1), 0.0)
        return terms


# ---- losses of logits


class _CrossEntropyAndDistance(torch.autograd.Function):
    """apply(student, teacher, target, ignore_index) -> (cross-entropy, total variation distance), [...] each.

    The two have upstream gradients of their own, which differ from row to row, so the gradient is computed in the
    backward pass. Until then only the inputs are held.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, target: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        """Compute both terms in one sweep."""
        ctx.save_for_backward(*savable(student, teacher, target))
        ctx.ignore_index = ignore_index
        ctx.set_materialize_grads(False)
        # The distance does not depend on the label, but all parts of a row with an invalid label are NaN, so the row
        # gets a valid one.
        invalid = (target != ignore_index) & ((target < 0) | (target >= student.shape[-1]))
        _, parts = kd_loss(
            student.detach(),
            teacher.detach(),
            target.masked_fill(invalid, 1 if ignore_index == 0 else 0),
            divergence="tvd",
            alpha=0.5,
            ignore_index=ignore_index,
            return_parts=True,
        )
        return parts.cross_entropy.masked_fill(invalid, math.nan), parts.distillation

    @staticmethod
    def backward(
        ctx: Any, of_cross_entropy: Tensor | None, of_distance: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Add the gradients of the two terms, each weighted by its upstream gradient."""
        student, teacher, target = ctx.saved_tensors
        total: Tensor | None = None
        for upstream, alpha in ((of_cross_entropy, 0.0), (of_distance, 1.0)):
            if upstream is None:
                continue
            with torch.enable_grad():
                leaf = student.detach().requires_grad_()
                loss = kd_loss(
                    leaf,
                    teacher.detach(),
                    target,
                    divergence="tvd",
                    alpha=alpha,
                    ignore_index=ctx.ignore_index,
                    weight=upstream.detach(),
                    reduction="sum",
                )
            (gradient,) = torch.autograd.grad(loss, leaf)
            total = gradient if total is None else total.add_(gradient)
        if torch.is_grad_enabled():  # create_graph=True
            return (*differentiable_once([total]), None, None, None)
        return total, None, None, None


class LigerFusedCETVDLoss(nn.Module):
    r"""liger_kernel.transformers.LigerFusedCETVDLoss: cross-entropy and total variation distance of each token.

        CE(softmax(s), target)   and   1/2 sum |softmax(t) - softmax(s)|

    Both are differentiable with respect to the student's logits, each with upstream gradients of its own. If their
    weights are the same for all tokens, prefer one call, which computes the gradient in the forward pass:
    ``(a + b) * fastkd.kd_loss(student, teacher, target, divergence="tvd", alpha=b / (a + b))`` is a CE + b TVD.

    Args:
        ignore_index: the label that drops a row; both terms are 0 there.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (cross-entropy, total variation distance), [...] each, float32.

        Args:
            student_logits: [..., V].
            teacher_logits: [..., V]; they receive no gradient.
            target: [...] int64.
        """
        check_pair("teacher_logits", teacher_logits, "student_logits", student_logits, _REMEDY)
        if target is None:
            raise TypeError("target must be a tensor, got NoneType")
        check_per_row("target", target, student_logits.shape[:-1])
        return _CrossEntropyAndDistance.apply(
            student_logits, teacher_logits, target, self.ignore_index
        )


# ---- losses of hidden states and lm_heads


class LigerFusedLinearJSDLoss(nn.Module):
    r"""liger_kernel.chunked_loss.LigerFusedLinearJSDLoss: cross-entropy and JSD from hidden states and lm_heads.

        weight_hard_loss CE(softmax(s), label) + weight_soft_loss JSD_beta(softmax(t / T), softmax(s / T))

    The mean is over labels that are not ignore_index, without T^2. The logits of each chunk of rows are computed once.
    The soft_loss and hard_loss that it can return carry no gradient, in Liger as here.

    Args:
        weight_hard_loss: weight of the cross-entropy at temperature 1; not negative.
        weight_soft_loss: weight of the JSD; not negative. The two weights must not both be 0.
        beta: weight of the teacher in the mixture, in [0, 1]; 0 is KL(p || q), 1 is KL(q || p).
        ignore_index: the label that drops a row.
        temperature: T > 0.
        compiled: accepted for compatibility and ignored, because nothing is compiled.
        chunk_size: the number of rows whose logits are held at a time.
        return_soft_hard_loss: return (loss, soft_loss, hard_loss), the last two unweighted and detached.
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
        """Return the loss, 0-dim, or the tuple of return_soft_hard_loss.

        Args:
            student_input: [N, H], the student's hidden states.
            student_weight: [V, H], the student's lm_head.
            teacher_input: [N, H_t], the teacher's hidden states.
            teacher_weight: [V, H_t], the teacher's lm_head.
            true_labels: [N].
            student_bias: [V], or None.
            teacher_bias: [V], or None.
        """
        _check_sides(student_input, student_weight, teacher_input, teacher_weight)
        if true_labels is None:
            raise TypeError("true_labels must be a tensor, got NoneType")
        check_per_row("true_labels", true_labels, student_input.shape[:-1])
        total = self.weight_hard_loss + self.weight_soft_loss
        alpha = self.weight_soft_loss / total
        inputs = (student_input, student_weight, teacher_input, teacher_weight, true_labels)
        biases = (student_bias, teacher_bias)
        counted = (true_labels != self.ignore_index).sum()
        loss, parts = self._loss(*inputs, *biases, alpha, counted.to(torch.float64) / total)
        if not self.return_soft_hard_loss:
            return loss
        soft, hard = (
            part.sum() / counted.clamp(min=1) for part in (parts.distillation, parts.cross_entropy)
        )
        if alpha in (0.0, 1.0):  # the term of weight 0 has not been computed yet
            with torch.no_grad():
                unweighted, _ = self._loss(*inputs, *biases, 1.0 - alpha, counted)
            soft, hard = (soft, unweighted) if alpha else (unweighted, hard)
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
    r"""liger_kernel.transformers.LigerFusedLinearJSD: the JSD from hidden states and lm_heads, without cross-entropy.

    The loss is the mean over counted rows, without T^2.

    Args:
        jsd_beta: weight of the teacher in the mixture, in [0, 1]; 0 is KL(p || q), 1 is KL(q || p).
        ignore_index: the label that drops a row.
        temperature: T > 0.
        accum_dtype: accepted for compatibility and ignored: the gradient of the lm_head is always summed in float32.
            With None, Liger sums in the dtype of the lm_head.
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
        """Return the loss, 0-dim.

        Args:
            student_input: [N, H], the student's hidden states.
            student_weight: [V, H], the student's lm_head.
            teacher_input: [N, H_t], the teacher's hidden states.
            teacher_weight: [V, H_t], the teacher's lm_head.
            shift_labels: [N], or None to count all rows.
        """
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

    The target holds probabilities [N, V], and their logarithms take as much memory again; ``fastkd.TopK`` and
    ``fastkd.LinearTeacher`` avoid both. Each row of the target is divided by its sum. Liger does not normalize it, so
    results differ by the rounding error of low-precision targets. There is no T^2, and only the student's logits are
    divided by the temperature.

    Args:
        reduction: "batchmean" (mean over counted rows), "mean" (also over the vocabulary) or "sum".
        ignore_index: the label that drops a row.
        temperature: T > 0.
        eps: accepted for compatibility and ignored: Liger's lower bound of p in log p. Here 0 log 0 is 0.
        accum_dtype: accepted for compatibility and ignored: the gradient of the lm_head is summed in float32.
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
        """Return the loss, 0-dim.

        Args:
            student_input: [N, H], the student's hidden states.
            student_weight: [V, H], the student's lm_head.
            target: [N, V], the teacher's probabilities.
            shift_labels: [N], or None to count all rows.
        """
        check_side("student_input", student_input, "student_weight", student_weight)
        check_per_row("shift_labels", shift_labels, student_input.shape[:-1])
        if not target.is_floating_point():
            raise TypeError(
                f"target must be a floating-point tensor of probabilities, got {target.dtype}"
            )
        if target.shape[:-1] != student_input.shape[:-1]:
            raise ValueError(
                f"target must have the rows of student_input, {tuple(student_input.shape[:-1])}; got "
                f"{tuple(target.shape)}"
            )
        if target.dim() < 1 or target.shape[-1] != len(student_weight):
            raise ValueError(
                f"target must have {len(student_weight)} columns, one per row of student_weight; got "
                f"{tuple(target.shape)}. Cut the wider one to the n shared tokens: student_weight[:n] or "
                "target[..., :n], which is normalized here"
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
            **_reduction_options(self.reduction, target.shape, shift_labels, self.ignore_index),
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


# ---- log-probabilities from hidden states


class LigerFusedLinearScaledCrossEntropyFunction:
    """``liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction``: -log q of a token per row, and entropies."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Compute -log q(target), with q = softmax(_input @ weight.T / temperature).

        Args:
            _input: [M, H], hidden states.
            weight: [V, H], the lm_head.
            target: [M] int64; the outputs of a row with ignore_index are 0.
            temperature: T > 0.
            ignore_index: the target of rows that do not count.
            m_tiles_per_cluster: accepted, but without effect; it tunes Liger's kernel.
            return_entropy: also return the entropy of q, [M].
            selected_token_ids: [K] int64; also return log q of these tokens in every row, [M, K].

        Returns:
            [M] float32, or a tuple (loss, entropy, selected log-probabilities) of what was requested. All are
            differentiable.

        Raises:
            TypeError, ValueError: an argument has the wrong shape, dtype, device or value; the message names it.
        """
        ids = inverse = None
        if selected_token_ids is not None:
            distinct, inverse = selected_token_ids.unique(return_inverse=True)
            ids = distinct.expand(*target.shape, -1)
        outputs = fused_linear_logprobs(
            _input,
            weight,
            target,
            ids=ids,
            temperature=temperature,
            ignore_index=ignore_index,
            entropy=return_entropy,
        )
        return _requested(outputs, target != ignore_index, inverse)


class LigerFusedLinearScaledCrossEntropyTPFunction:
    """``liger_kernel.ops.LigerFusedLinearScaledCrossEntropyTPFunction``: the same over a vocabulary in equal parts."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        tp_group: ProcessGroup,
        temperature: float = 1.0,
        ignore_index: int = -100,
        tiles_per_reduce: int = 1,
        return_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Compute -log q(target) on every process of tp_group.

        Args:
            _input: [M, H], equal on every process; its gradient is summed over the processes.
            weight: [V_r, H], this process's part of the lm_head, in rank order.
            target: [M] int64, tokens of the whole vocabulary.
            tp_group: the processes that share the vocabulary.
            temperature: T > 0.
            ignore_index: the target of rows that do not count.
            tiles_per_reduce: accepted, but without effect; it tunes Liger's kernel.
            return_entropy: also return the entropy of q, [M].

        Returns:
            [M] float32, or a tuple (loss, entropy).

        Raises:
            TypeError, ValueError: an argument has the wrong shape, dtype, device or value; the message names it.
        """
        outputs = fused_linear_logprobs(
            _input,
            weight,
            target,
            temperature=temperature,
            ignore_index=ignore_index,
            entropy=return_entropy,
            process_group=tp_group,
        )
        return _requested(outputs, target != ignore_index, None)


def _requested(
    outputs: LogProbs, counted: Tensor, columns: Tensor | None
) -> Tensor | tuple[Tensor, ...]:
    """The outputs in Liger's order, alone or as a tuple. columns: of each selected token among the distinct ones."""
    assert outputs.target is not None
    results = [-outputs.target]
    if outputs.entropy is not None:
        results.append(outputs.entropy)
    if columns is not None:
        assert outputs.gathered is not None
        # Dropped rows are -inf.
        kept = outputs.gathered.masked_fill(~counted.unsqueeze(-1), 0.0)
        results.append(kept[..., columns])
    return results[0] if len(results) == 1 else tuple(results)
