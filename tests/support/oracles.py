"""The expected results of kd_loss: the published formulas in plain PyTorch, differentiated by autograd.

This module does not use fastkd. In float64 it is the exact result; in float32 it is the plain composition that a user
would write, whose error is the bar for every backend (tests/support/accuracy.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from support.remembered import remembered


def _times(log_x: Tensor, factor: Tensor) -> Tensor:
    """x * factor with 0 * infinity = 0, in the value and in both derivatives."""
    x = log_x.exp()
    return x * factor.masked_fill(x == 0, 0.0)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _times(log_p, log_p - log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _times(log_q, log_q - log_p)


def mixture(log_p: Tensor, log_q: Tensor, forward: float = 0.5, reverse: float = 0.5) -> Tensor:
    return forward * forward_kl(log_p, log_q) + reverse * reverse_kl(log_p, log_q)


def soft_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _times(log_p, -log_q)


def _log_mixture(log_x: Tensor, log_y: Tensor, share: float) -> Tensor:
    """log(share x + (1 - share) y)"""
    return torch.logaddexp(log_x + math.log(share), log_y + math.log1p(-share))


def jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    if beta in (0.0, 1.0):  # the convention of GKD
        return reverse_kl(log_p, log_q) if beta else forward_kl(log_p, log_q)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _times(log_p, log_p - log_m) + (1 - beta) * _times(log_q, log_q - log_m)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, alpha: float = 0.1) -> Tensor:
    if alpha == 0.0:
        return forward_kl(log_p, log_q)
    return _times(log_p, log_p - _log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float = 0.1) -> Tensor:
    if alpha == 0.0:
        return reverse_kl(log_p, log_q)
    return _times(log_q, log_q - _log_mixture(log_q, log_p, alpha))


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs()


def hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()) ** 2


def alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    def power(exponent_p: float, exponent_q: float) -> Tensor:
        terms = [e * x for e, x in ((exponent_p, log_p), (exponent_q, log_q)) if e]
        return sum(terms[1:], terms[0]).exp()

    gap = log_p - log_q
    if alpha == 0 and beta == 0:
        return 0.5 * gap**2
    if beta == 0:
        p_power, q_power = power(alpha, 0), power(0, alpha)
        return (p_power * alpha * gap - p_power + q_power) / alpha**2
    if alpha == 0:
        p_power, q_power = power(beta, 0), power(0, beta)
        return (-q_power * beta * gap - q_power + p_power) / beta**2
    if alpha + beta == 0:
        return ((alpha * gap).exp() - alpha * gap - 1) / alpha**2
    degree = alpha + beta
    inner = (
        power(alpha, beta) - alpha / degree * power(degree, 0) - beta / degree * power(0, degree)
    )
    return -inner / (alpha * beta)


def squared_error(tempered_teacher: Tensor, tempered_student: Tensor) -> Tensor:
    return 0.5 * (tempered_student - tempered_teacher) ** 2


def smooth_l1(tempered_teacher: Tensor, tempered_student: Tensor, beta: float = 1.0) -> Tensor:
    return F.smooth_l1_loss(tempered_student, tempered_teacher, reduction="none", beta=beta)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    formula.__name__: formula
    for formula in (
        forward_kl,
        reverse_kl,
        mixture,
        soft_cross_entropy,
        jsd,
        skew_forward_kl,
        skew_reverse_kl,
        tvd,
        hellinger,
        alpha_beta,
        squared_error,
        smooth_l1,
    )
}
UNNORMALIZED = ("squared_error", "smooth_l1")


class Outcome(NamedTuple):
    """The loss, its gradients and parts, and the terms of each: how much one unit of error changes it.

    A log-probability x computed in floating point carries an error of the order of one unit in the last place times
    max(1, |x|): the normaliser is the logarithm of a sum that is at least 1. The terms are what a result is a sum of,
    and its derivatives by the log-probabilities times max(1, |x|).
    """

    loss: Tensor
    student_gradient: Tensor
    teacher_gradient: Tensor
    distillation: Tensor
    cross_entropy: Tensor
    student_entropy: Tensor
    counted: int
    loss_terms: Tensor
    student_terms: Tensor
    teacher_terms: Tensor
    distillation_terms: Tensor
    cross_entropy_terms: Tensor
    student_entropy_terms: Tensor


def _rows_read(
    student: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return (which rows count, the indices of those that are read). A row of weight 0 counts, but is not read."""
    n = math.prod(student.shape[:-1])
    counted = torch.ones(n, dtype=torch.bool, device=student.device)
    if labels is not None:
        counted &= labels.reshape(n) != ignore_index
    if mask is not None:
        counted &= mask.reshape(n)
    read = counted if weight is None else counted & (weight.reshape(n) != 0)
    return counted, read.nonzero().squeeze(-1)


def _of_rows(value: float | Tensor, rows: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """A number, or a tensor's values for these rows, as [rows, 1]."""
    if not isinstance(value, Tensor):
        return torch.full((len(rows), 1), value, dtype=dtype, device=rows.device)
    return value.reshape(n)[rows].to(dtype).unsqueeze(-1)


def _denominator(
    reduction: str, num_items: float | Tensor | None, counted: Tensor, student: Tensor
) -> float:
    if reduction not in ("mean", "batchmean"):
        return 1.0
    if num_items is not None:
        return float(num_items)
    return max(int(counted.sum()), 1) if reduction == "mean" else max(student.shape[0], 1)


def compose(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    terms: bool = True,
    upstream: Tensor | None = None,
    divergence: str = "forward_kl",
    parameters: dict[str, float] | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    alpha: float = 1.0,
    scale_by_temperature: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
) -> Outcome:
    """The loss of Hinton, Vinyals and Dean (2015) over any divergence, with the options of kd_loss."""
    lead, device = student.shape[:-1], student.device
    n = math.prod(lead)
    vocabulary = student.shape[-1] if vocab_size is None else vocab_size
    student_leaf = student.detach().to(dtype).requires_grad_()
    teacher_leaf = teacher.detach().to(dtype).requires_grad_()

    counted, rows = _rows_read(student, labels, ignore_index, mask, weight)

    def of_rows(value: float | Tensor) -> Tensor:
        return _of_rows(value, rows, n, dtype)

    def adjusted(leaf: Tensor, scale: float, cap: float | None) -> Tensor:
        z = leaf.reshape(n, leaf.shape[-1])[rows, :vocabulary] * scale
        return z if cap is None else cap * torch.tanh(z / cap)

    t_student = of_rows(temperature)
    t_teacher = t_student if teacher_temperature is None else of_rows(teacher_temperature)
    s = adjusted(student_leaf, logit_scale, softcap)
    t = adjusted(teacher_leaf, teacher_logit_scale, teacher_softcap)
    log_q, log_p = s / t_student, t / t_teacher
    if divergence not in UNNORMALIZED:
        log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
    both_gone = (log_p == -torch.inf) & (log_q == -torch.inf)
    phi = DIVERGENCES[divergence](
        log_p.masked_fill(both_gone, 0.0), log_q.masked_fill(both_gone, 0.0), **(parameters or {})
    ).masked_fill(both_gone, 0.0)
    t_squared = t_student.squeeze(-1) ** 2 if scale_by_temperature else 1.0
    distillation = phi.sum(-1) * t_squared
    cross_entropy = torch.zeros_like(distillation)
    if alpha < 1:
        cross_entropy = F.cross_entropy(
            s, labels.reshape(n)[rows], reduction="none", label_smoothing=label_smoothing
        )
    log_q_plain = (s.detach() / t_student).log_softmax(-1)
    entropy = -_times(log_q_plain, log_q_plain).sum(-1)

    factor = of_rows(1.0 if weight is None else weight).squeeze(-1)
    loss_of_row = (1 - alpha) * cross_entropy
    if alpha:
        loss_of_row = loss_of_row + alpha * distillation

    def spread(of_kept: Tensor) -> Tensor:
        return torch.zeros(n, dtype=dtype, device=device).index_copy(0, rows, of_kept).reshape(lead)

    loss = spread(loss_of_row * factor)
    denominator = _denominator(reduction, num_items, counted, student)
    if reduction != "none":
        loss = loss.sum() / denominator
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(dtype)
    gradients = torch.autograd.grad(
        loss,
        (student_leaf, teacher_leaf),
        upstream,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    values = (spread(value.detach()) for value in (distillation, cross_entropy, entropy))
    outcome = Outcome(
        loss.detach(), *gradients, *values, int(counted.sum()), *(loss.new_zeros(()),) * 6
    )
    if not terms:
        return outcome

    # What follows measures the terms.
    t_squared = torch.as_tensor(t_squared, dtype=dtype).expand(len(rows))
    (by_q, q_by_q, q_by_p), (by_p, p_by_p, p_by_q) = (
        _derivatives(phi, log_q, log_p),
        _derivatives(phi, log_p, log_q),
    )
    size_q, size_p = log_q.abs().clamp(1.0, 1e30), log_p.abs().clamp(1.0, 1e30)
    own_q = _size(by_q) + _size(q_by_q * size_q) + _size(q_by_p * size_p)
    # A definition gives (phi, g), and Euler's identity the teacher's derivative as a difference of the two.
    own_p = _size(by_p) + _size(p_by_p * size_p) + _size(p_by_q * size_q) + _size(phi) + _size(by_q)
    # The second derivatives are the size of what cancels inside phi where p is close to q.
    cancelled = own_q + own_p + _size(by_q * size_q) + _size(by_p * size_p)
    distillation_terms = (phi.abs() + cancelled).sum(-1) * t_squared
    cross_entropy_terms = cross_entropy.abs() + cross_entropy.abs().clamp(min=1.0)
    loss_terms = spread(
        (alpha * distillation_terms + (1 - alpha) * cross_entropy_terms) * factor.abs()
    )
    if reduction != "none":
        loss_terms = loss_terms.sum() / denominator
    multiplier = (upstream.expand(lead).reshape(n)[rows] * factor).abs().unsqueeze(-1) / denominator

    def gradient_terms(
        own: Tensor, log_x: Tensor, size: Tensor, by: Tensor, tempering: Tensor
    ) -> Tensor:
        """|g_v| and x_v |sum g|, which the gradient is the difference of, with the error of g and of x."""
        if divergence not in UNNORMALIZED:
            own = own + log_x.exp() * (
                own.sum(-1, keepdim=True) + size * by.sum(-1, keepdim=True).abs()
            )
        return own * alpha * t_squared.unsqueeze(-1) / tempering

    student_terms = gradient_terms(own_q, log_q, size_q, by_q, t_student)
    teacher_terms = gradient_terms(own_p, log_p, size_p, by_p, t_teacher)
    if alpha < 1:
        log_q = s.log_softmax(-1)
        one_hot = F.one_hot(labels.reshape(n)[rows], vocabulary)
        student_terms = student_terms + (1 - alpha) * (
            log_q.exp() * log_q.abs().clamp(1.0, 1e30) + one_hot
        )

    def spread_wide(of_kept: Tensor, scale: float, width: int) -> Tensor:
        wide = torch.zeros(n, width, dtype=dtype, device=device)
        wide[rows, :vocabulary] = of_kept.detach() * multiplier * abs(scale)
        return wide.reshape(*lead, width)

    return Outcome(
        *outcome[:7],
        loss_terms.detach(),
        spread_wide(student_terms, logit_scale, student.shape[-1]),
        spread_wide(teacher_terms, teacher_logit_scale, teacher.shape[-1]),
        spread(distillation_terms.detach()),
        spread(cross_entropy_terms.detach()),
        spread(_times(log_q_plain, (1 - log_q_plain) * log_q_plain.abs().clamp(min=1.0)).sum(-1)),
    )


class Sparse(NamedTuple):
    """A sparse teacher as plain tensors: the fields of fastkd.TopK."""

    ids: Tensor
    logprobs: Tensor
    tail: str
    tail_logprob: Tensor | None = None
    # The temperature at which the log-probabilities were taken.
    at: float = 1.0


@remembered
def compose_topk(
    student: Tensor,
    teacher: Sparse,
    labels: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    terms: bool = True,
    upstream: Tensor | None = None,
    divergence: str = "forward_kl",
    parameters: dict[str, float] | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    alpha: float = 1.0,
    scale_by_temperature: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Outcome:
    """Like `compose`, for a sparse teacher, with each tail policy as fastkd.TopK defines it.

    "bucket" sums over the tokens and one event for the others; "renormalize" over two softmaxes of the tokens;
    "renormalize_teacher" over the whole vocabulary, with p = 0 outside; "truncate" over the tokens, p as it is given.
    """
    lead = student.shape[:-1]
    n = math.prod(lead)
    vocabulary = student.shape[-1] if vocab_size is None else vocab_size
    leaf = student.detach().to(dtype).requires_grad_()

    counted, rows = _rows_read(student, labels, ignore_index, mask, weight)

    def of_rows(value: float | Tensor) -> Tensor:
        return _of_rows(value, rows, n, dtype)

    t_student = of_rows(temperature)
    t_teacher = t_student if teacher_temperature is None else of_rows(teacher_temperature)
    z = leaf.reshape(n, leaf.shape[-1])[rows, :vocabulary] * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_q_row = (z / t_student).log_softmax(-1)

    k = teacher.ids.shape[-1]
    ids = teacher.ids.reshape(n, k)[rows].long()
    named = ids >= 0
    seats = ids.clamp(min=0)
    member = torch.zeros(z.shape, dtype=torch.int32).scatter_add_(-1, seats, named.int()) > 0
    named_logprobs = teacher.logprobs.detach().reshape(n, k)[rows].double()
    named_logprobs = named_logprobs.masked_fill(~named, -torch.inf)
    # What is left to the others is part of the input: the composition in float32 gets it at its best.
    if teacher.tail_logprob is None:
        rest = torch.log1p(-named_logprobs.exp().sum(-1, keepdim=True).clamp(max=1.0))
    else:
        rest = teacher.tail_logprob.detach().reshape(n, 1)[rows].double()
    rest = torch.where(member.all(-1, keepdim=True), -torch.inf, rest)
    retempered = named_logprobs.to(dtype) * (teacher.at / t_teacher)
    log_q_named = log_q_row.gather(-1, seats).masked_fill(~named, -torch.inf)
    share = torch.zeros_like(z)  # of the tail's mass
    if teacher.tail == "bucket":
        # Of a row that has no others, or all of them at -inf, nothing is differentiated.
        some = (~member & (log_q_row > -torch.inf)).any(-1, keepdim=True)
        others = log_q_row.masked_fill(member, -torch.inf).masked_fill(~some, 0.0)
        log_q_tail = others.logsumexp(-1, keepdim=True).masked_fill(~some, -torch.inf)
        log_q = torch.cat([log_q_named, log_q_tail], -1)
        log_p = torch.cat([named_logprobs, rest], -1).to(dtype).log_softmax(-1)
        share = (others - others.logsumexp(-1, keepdim=True)).exp().detach() * some
    elif teacher.tail == "renormalize":
        log_q = (z.gather(-1, seats) / t_student).masked_fill(~named, -torch.inf).log_softmax(-1)
        log_p = retempered.log_softmax(-1)
    elif teacher.tail == "renormalize_teacher":
        log_q = log_q_row
        normal = retempered.log_softmax(-1)
        wide = torch.full((*z.shape[:-1], vocabulary + 1), -torch.inf, dtype=dtype)
        log_p = wide.scatter(-1, ids.where(named, vocabulary), normal)[..., :vocabulary]
    else:
        log_q, log_p = log_q_named, named_logprobs.to(dtype)
    log_p = log_p.detach().requires_grad_()

    both_gone = (log_p == -torch.inf) & (log_q == -torch.inf)
    phi = DIVERGENCES[divergence](
        log_p.masked_fill(both_gone, 0.0), log_q.masked_fill(both_gone, 0.0), **(parameters or {})
    ).masked_fill(both_gone, 0.0)
    t_squared = t_student.squeeze(-1) ** 2 if scale_by_temperature else torch.ones(len(rows))
    distillation = phi.sum(-1) * t_squared
    cross_entropy = torch.zeros_like(distillation)
    if alpha < 1:
        cross_entropy = F.cross_entropy(
            z, labels.reshape(n)[rows], reduction="none", label_smoothing=label_smoothing
        )
    log_q_plain = log_q_row.detach()
    entropy = -_times(log_q_plain, log_q_plain).sum(-1)

    factor = of_rows(1.0 if weight is None else weight).squeeze(-1)
    loss_of_row = (1 - alpha) * cross_entropy
    if alpha:
        loss_of_row = loss_of_row + alpha * distillation

    def spread(of_kept: Tensor) -> Tensor:
        return torch.zeros(n, dtype=dtype).index_copy(0, rows, of_kept.to(dtype)).reshape(lead)

    loss = spread(loss_of_row * factor)
    denominator = _denominator(reduction, num_items, counted, student)
    if reduction != "none":
        loss = loss.sum() / denominator
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(dtype)
    (gradient,) = torch.autograd.grad(
        loss, leaf, upstream, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    values = (spread(value.detach()) for value in (distillation, cross_entropy, entropy))
    nothing = loss.new_zeros(())
    outcome = Outcome(
        loss.detach(), gradient, nothing, *values, int(counted.sum()), *(nothing,) * 6
    )
    if not terms:
        return outcome

    by_q, q_by_q, q_by_p = _derivatives(phi, log_q, log_p)
    by_p, p_by_p, p_by_q = _derivatives(phi, log_p, log_q)
    size_p = log_p.detach().abs().clamp(1.0, 1e30)
    # The logarithm of a sum of probabilities has the errors of their logarithms, each by its share.
    size_of_row = log_q_plain.abs().clamp(1.0, 1e30)
    size_q = log_q.detach().abs().clamp(1.0, 1e30)
    if teacher.tail == "bucket":
        summed = (share * size_of_row).sum(-1)
        size_q[..., -1] = torch.maximum(size_q[..., -1], summed)
    own_q = _size(by_q) + _size(q_by_q * size_q) + _size(q_by_p * size_p)
    own_p = _size(by_p) + _size(p_by_p * size_p) + _size(p_by_q * size_q)
    cancelled = own_q + own_p + _size(by_q * size_q) + _size(by_p * size_p)
    distillation_terms = (phi.detach().abs() + cancelled).sum(-1) * t_squared
    cross_entropy_terms = cross_entropy.detach().abs() + cross_entropy.detach().abs().clamp(min=1.0)
    loss_terms = spread(
        (alpha * distillation_terms + (1 - alpha) * cross_entropy_terms) * factor.abs()
    )
    if reduction != "none":
        loss_terms = loss_terms.sum() / denominator
    multiplier = (upstream.expand(lead).reshape(n)[rows] * factor).abs().unsqueeze(-1) / denominator

    total = own_q.sum(-1, keepdim=True) + (size_q * by_q).detach().sum(-1, keepdim=True).abs()
    if teacher.tail == "renormalize_teacher":
        own = own_q + log_q_plain.exp() * total
    else:
        own = torch.zeros_like(z)
        of_tokens = own_q[..., :k].masked_fill(~named, 0.0)
        if teacher.tail == "renormalize":
            of_tokens = of_tokens + log_q.detach().exp() * total
        else:
            own = own + log_q_plain.exp() * total
        if teacher.tail == "bucket":
            own = own + share * own_q[..., -1:] + share * size_of_row * _size(by_q)[..., -1:]
        own = own.detach().scatter_add(-1, seats, of_tokens.masked_fill(~named, 0.0))
    terms_of_row = own * (alpha * t_squared.unsqueeze(-1) / t_student)
    if alpha < 1:
        log_q = z.detach().log_softmax(-1)
        one_hot = F.one_hot(labels.reshape(n)[rows], vocabulary)
        terms_of_row = terms_of_row + (1 - alpha) * (
            log_q.exp() * log_q.abs().clamp(1.0, 1e30) + one_hot
        )
    wide = torch.zeros(n, student.shape[-1], dtype=dtype)
    wide[rows, :vocabulary] = terms_of_row.detach() * multiplier * abs(logit_scale)
    entropy_terms = _times(log_q_plain, (1 - log_q_plain) * log_q_plain.abs().clamp(min=1.0))
    return outcome._replace(
        loss_terms=loss_terms.detach(),
        student_terms=wide.reshape(student.shape),
        distillation_terms=spread(distillation_terms.detach()),
        cross_entropy_terms=spread(cross_entropy_terms),
        student_entropy_terms=spread(entropy_terms.sum(-1)),
    )


def _size(value: Tensor) -> Tensor:
    return value.detach().abs().nan_to_num(0.0, 0.0, 0.0)


def _derivatives(phi: Tensor, log_x: Tensor, log_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d phi / d log x, and its derivatives by log x and by log y, for each entry."""
    (first,) = torch.autograd.grad(
        phi.sum(), log_x, create_graph=True, allow_unused=True, materialize_grads=True
    )
    if not first.requires_grad:
        return first, torch.zeros_like(phi), torch.zeros_like(phi)
    second = torch.autograd.grad(
        first.sum(), (log_x, log_y), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return (first.detach(), *second)
