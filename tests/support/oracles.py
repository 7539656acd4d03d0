"""The expected results of kd_loss: the published formulas in plain PyTorch, differentiated by autograd.

This module does not use fastkd. In float64 it is the exact result; in float32 it is the plain composition that a user
would write, whose error is the bar for every backend (tests/support/accuracy.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from support.remembered import remembered


def _times(log_x: Tensor, factor: Tensor) -> Tensor:
    """x * factor with 0 * infinity = 0, in the value and in both derivatives."""
    x = log_x.exp()
    return x * factor.masked_fill(x == 0, 0.0)


def _clipped(x: Tensor, clip: float) -> Tensor:
    """min(x, clip). Without a clip, x itself: in torch 2.14, the derivative of clamp is 0 where x equals the limit."""
    return x.clamp(max=clip) if clip < math.inf else x


def forward_kl(
    log_p: Tensor, log_q: Tensor, clip: float = math.inf, floor: float = -math.inf
) -> Tensor:
    if floor > -math.inf:  # as verl floors both sides before their difference
        log_p, log_q = log_p.clamp_min(floor), log_q.clamp_min(floor)
    return _clipped(_times(log_p, log_p - log_q), clip)


def reverse_kl(log_p: Tensor, log_q: Tensor, clip: float = math.inf) -> Tensor:
    return _clipped(_times(log_q, log_q - log_p), clip)


def mixture(
    log_p: Tensor,
    log_q: Tensor,
    forward: float = 0.5,
    reverse: float = 0.5,
    clip: float = math.inf,
) -> Tensor:
    both = forward * forward_kl(log_p, log_q) + reverse * reverse_kl(log_p, log_q)
    return _clipped(both, clip)


def soft_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _times(log_p, -log_q)


def _log_mixture(log_x: Tensor, log_y: Tensor, share: float) -> Tensor:
    """log(share x + (1 - share) y)"""
    return torch.logaddexp(log_x + math.log(share), log_y + math.log1p(-share))


def jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5, clip: float = math.inf) -> Tensor:
    if beta in (0.0, 1.0):  # the convention of GKD
        return reverse_kl(log_p, log_q, clip) if beta else forward_kl(log_p, log_q, clip)
    log_m = _log_mixture(log_p, log_q, beta)
    jsd = beta * _times(log_p, log_p - log_m) + (1 - beta) * _times(log_q, log_q - log_m)
    return _clipped(jsd, clip)


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
    max(1, |x|): the normalizer is the logarithm of a sum that is at least 1. The terms are what a result is a sum of,
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


class Settings(NamedTuple):
    """The options of kd_loss, with its defaults."""

    temperature: float | Tensor = 1.0
    teacher_temperature: float | Tensor | None = None
    alpha: float = 1.0
    scale_by_temperature: bool = True
    label_smoothing: float = 0.0
    ignore_index: int = -100
    mask: Tensor | None = None
    weight: Tensor | None = None
    reduction: str = "mean"
    num_items: float | Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    teacher_logit_scale: float = 1.0
    teacher_softcap: float | None = None
    vocab_size: int | None = None


def adjusted(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """Logits after logit_scale and softcap."""
    z = logits * scale
    return z if cap is None else cap * torch.tanh(z / cap)


def cross_entropy(z: Tensor, labels: Tensor | None, alpha: float, label_smoothing: float) -> Tensor:
    """The cross-entropy of each row, [rows], for z [rows, V]; 0 if alpha leaves it out."""
    if alpha == 1:
        return z.new_zeros(len(z))
    assert labels is not None
    return F.cross_entropy(z, labels, reduction="none", label_smoothing=label_smoothing)


def mixed(distillation: Tensor, cross_entropy: Tensor, alpha: float) -> Tensor:
    """The loss of each row. A divergence of NaN is left out if alpha is 0."""
    loss = (1 - alpha) * cross_entropy
    return loss + alpha * distillation if alpha else loss


class _Call:
    """The rows of a call that are read, and what dense and sparse teachers have in common.

    A row of weight 0 counts, but is not read.
    """

    def __init__(
        self, student: Tensor, labels: Tensor | None, dtype: torch.dtype, options: dict[str, Any]
    ) -> None:
        o = self.options = Settings(**options)
        self.student, self.dtype, self.device = student, dtype, student.device
        self.lead, self.n = student.shape[:-1], math.prod(student.shape[:-1])
        self.vocabulary = student.shape[-1] if o.vocab_size is None else o.vocab_size
        self.counted = torch.ones(self.n, dtype=torch.bool, device=self.device)
        if labels is not None:
            self.counted &= labels.reshape(self.n) != o.ignore_index
        if o.mask is not None:
            self.counted &= o.mask.reshape(self.n)
        read = self.counted if o.weight is None else self.counted & (o.weight.reshape(self.n) != 0)
        self.rows = read.nonzero().squeeze(-1)
        self.labels = None if labels is None else labels.reshape(self.n)[self.rows]
        self.t_student = t_teacher = self.of_rows(o.temperature)
        if o.teacher_temperature is not None:
            t_teacher = self.of_rows(o.teacher_temperature)
        self.t_teacher = t_teacher
        self.t_squared = torch.ones(len(self.rows), dtype=dtype, device=self.device)
        if o.scale_by_temperature:
            self.t_squared = self.t_student.squeeze(-1) ** 2
        self.factor = self.of_rows(1.0 if o.weight is None else o.weight).squeeze(-1)
        self.leaf = student.detach().to(dtype).requires_grad_()
        self.z = adjusted(self.read(self.leaf), o.logit_scale, o.softcap)
        self.log_q = (self.z.detach() / self.t_student).log_softmax(-1)

    def of_rows(self, value: float | Tensor) -> Tensor:
        """A number, or a tensor's values for the rows that are read, as [rows, 1]."""
        if not isinstance(value, Tensor):
            size = (len(self.rows), 1)
            return torch.full(size, value, dtype=self.dtype, device=self.device)
        return value.reshape(self.n)[self.rows].to(self.dtype).unsqueeze(-1)

    def read(self, logits: Tensor) -> Tensor:
        """The rows of logits that are read, without padding."""
        return logits.reshape(self.n, logits.shape[-1])[self.rows, : self.vocabulary]

    def spread(self, of_kept: Tensor) -> Tensor:
        """[*lead] of [rows], with 0 for rows that are not read."""
        whole = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        return whole.index_copy(0, self.rows, of_kept.to(self.dtype)).reshape(self.lead)

    def reduced(self, loss: Tensor) -> Tensor:
        """The losses of all rows, or their sum over the denominator."""
        return loss if self.options.reduction == "none" else loss.sum() / self.denominator

    @property
    def denominator(self) -> float:
        """What the sum of the losses is divided by."""
        o = self.options
        if o.reduction not in ("mean", "batchmean"):
            return 1.0
        if o.num_items is not None:
            return float(o.num_items)
        return max(int(self.counted.sum()) if o.reduction == "mean" else self.student.shape[0], 1)

    def outcome(self, phi: Tensor, upstream: Tensor | None, *teacher: Tensor) -> Outcome:
        """The results for the terms phi [rows, columns] of a divergence, without the terms of each; with the gradient
        of a teacher that is given."""
        o = self.options
        distillation = phi.sum(-1) * self.t_squared
        of_labels = cross_entropy(self.z, self.labels, o.alpha, o.label_smoothing)
        entropy = -_times(self.log_q, self.log_q).sum(-1)
        loss = self.reduced(self.spread(mixed(distillation, of_labels, o.alpha) * self.factor))
        nothing = loss.new_zeros(())
        gradients = torch.autograd.grad(
            loss,
            (self.leaf, *teacher),
            torch.ones_like(loss) if upstream is None else upstream.to(self.dtype),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        values = (self.spread(value.detach()) for value in (distillation, of_labels, entropy))
        both = (*gradients, nothing)[:2]
        return Outcome(loss.detach(), *both, *values, int(self.counted.sum()), *(nothing,) * 6)

    def with_terms(
        self,
        outcome: Outcome,
        upstream: Tensor | None,
        of_distillation: Tensor,
        of_student: Tensor,
        of_teacher: tuple[Tensor, int] | None = None,
    ) -> Outcome:
        """The results with the terms of each.

        Args:
            outcome: the results.
            upstream: the gradient of the loss.
            of_distillation: the terms of the divergence, [rows].
            of_student: the terms of its gradient by z, [rows, V].
            of_teacher: the same for the teacher, and the width of the teacher's logits.
        """
        o, rows = self.options, self.rows
        of_distillation = of_distillation.detach() * self.t_squared
        of_labels = outcome.cross_entropy.reshape(self.n)[rows]
        of_labels = of_labels.abs() + of_labels.abs().clamp(min=1.0)
        if o.alpha < 1:
            assert self.labels is not None
            log_q = self.z.detach().log_softmax(-1)
            one_hot = F.one_hot(self.labels, self.vocabulary)
            size = log_q.exp() * log_q.abs().clamp(1.0, 1e30) + one_hot
            of_student = of_student + (1 - o.alpha) * size
        upstream = torch.ones_like(outcome.loss) if upstream is None else upstream.to(self.dtype)
        share = (upstream.expand(self.lead).reshape(self.n)[rows] * self.factor).abs()
        share = share.unsqueeze(-1) / self.denominator

        def spread_wide(of_kept: Tensor, scale: float, width: int) -> Tensor:
            wide = torch.zeros(self.n, width, dtype=self.dtype, device=self.device)
            wide[rows, : self.vocabulary] = of_kept.detach() * share * abs(scale)
            return wide.reshape(*self.lead, width)

        of_loss = (o.alpha * of_distillation + (1 - o.alpha) * of_labels) * self.factor.abs()
        of_entropy = _times(self.log_q, (1 - self.log_q) * self.log_q.abs().clamp(min=1.0)).sum(-1)
        return outcome._replace(
            loss_terms=self.reduced(self.spread(of_loss)),
            student_terms=spread_wide(of_student, o.logit_scale, self.student.shape[-1]),
            teacher_terms=outcome.teacher_terms
            if of_teacher is None
            else spread_wide(of_teacher[0], o.teacher_logit_scale, of_teacher[1]),
            distillation_terms=self.spread(of_distillation),
            cross_entropy_terms=self.spread(of_labels),
            student_entropy_terms=self.spread(of_entropy),
        )


def _phi(
    divergence: str, parameters: dict[str, float] | None, log_p: Tensor, log_q: Tensor
) -> Tensor:
    """The terms of a divergence, which are 0 where both models are at -inf."""
    gone = (log_p == -torch.inf) & (log_q == -torch.inf)
    phi = DIVERGENCES[divergence](
        log_p.masked_fill(gone, 0.0), log_q.masked_fill(gone, 0.0), **(parameters or {})
    )
    return phi.masked_fill(gone, 0.0)


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
    **options: Any,
) -> Outcome:
    """The loss of Hinton, Vinyals and Dean (2015) over any divergence, with the options of kd_loss (Settings)."""
    call = _Call(student, labels, dtype, options)
    o, t_student, t_teacher = call.options, call.t_student, call.t_teacher
    teacher_leaf = teacher.detach().to(dtype).requires_grad_()
    t = adjusted(call.read(teacher_leaf), o.teacher_logit_scale, o.teacher_softcap)
    log_q, log_p = call.z / t_student, t / t_teacher
    if divergence not in UNNORMALIZED:
        log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
    phi = _phi(divergence, parameters, log_p, log_q)
    outcome = call.outcome(phi, upstream, teacher_leaf)
    if not terms:
        return outcome

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

    def gradient_terms(
        own: Tensor, log_x: Tensor, size: Tensor, by: Tensor, tempering: Tensor
    ) -> Tensor:
        """|g_v| and x_v |sum g|, which the gradient is the difference of, with the error of g and of x."""
        if divergence not in UNNORMALIZED:
            own = own + log_x.exp() * (
                own.sum(-1, keepdim=True) + size * by.sum(-1, keepdim=True).abs()
            )
        return own * o.alpha * call.t_squared.unsqueeze(-1) / tempering

    return call.with_terms(
        outcome,
        upstream,
        (phi.abs() + cancelled).sum(-1),
        gradient_terms(own_q, log_q, size_q, by_q, t_student),
        (gradient_terms(own_p, log_p, size_p, by_p, t_teacher), teacher.shape[-1]),
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
    **options: Any,
) -> Outcome:
    """Like `compose`, for a sparse teacher, with each tail policy as fastkd.TopK defines it.

    "bucket" sums over the tokens and one event for the others; "renormalize" over two softmaxes of the tokens;
    "renormalize_teacher" over the whole vocabulary, with p = 0 outside; "truncate" over the tokens, p as it is given.
    """
    call = _Call(student, labels, dtype, options)
    z, t_student, rows = call.z, call.t_student, call.rows
    log_q_row = (z / t_student).log_softmax(-1)

    k = teacher.ids.shape[-1]
    ids = teacher.ids.reshape(call.n, k)[rows].long()
    named = ids >= 0
    seats = ids.clamp(min=0)
    member = torch.zeros(z.shape, dtype=torch.int32).scatter_add_(-1, seats, named.int()) > 0
    named_logprobs = teacher.logprobs.detach().reshape(call.n, k)[rows].double()
    named_logprobs = named_logprobs.masked_fill(~named, -torch.inf)
    # What is left to the others is part of the input: the composition in float32 gets it at its best.
    if teacher.tail_logprob is None:
        rest = torch.log1p(-named_logprobs.exp().sum(-1, keepdim=True).clamp(max=1.0))
    else:
        rest = teacher.tail_logprob.detach().reshape(call.n, 1)[rows].double()
    rest = torch.where(member.all(-1, keepdim=True), -torch.inf, rest)
    retempered = named_logprobs.to(dtype) * (teacher.at / call.t_teacher)
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
        wide = torch.full((*z.shape[:-1], call.vocabulary + 1), -torch.inf, dtype=dtype)
        log_p = wide.scatter(-1, ids.where(named, call.vocabulary), normal)[..., : call.vocabulary]
    else:
        log_q, log_p = log_q_named, named_logprobs.to(dtype)
    log_p = log_p.detach().requires_grad_()

    phi = _phi(divergence, parameters, log_p, log_q)
    outcome = call.outcome(phi, upstream)
    if not terms:
        return outcome

    by_q, q_by_q, q_by_p = _derivatives(phi, log_q, log_p)
    by_p, p_by_p, p_by_q = _derivatives(phi, log_p, log_q)
    size_p = log_p.detach().abs().clamp(1.0, 1e30)
    # The logarithm of a sum of probabilities has the errors of their logarithms, each by its share.
    size_of_row = call.log_q.abs().clamp(1.0, 1e30)
    size_q = log_q.detach().abs().clamp(1.0, 1e30)
    if teacher.tail == "bucket":
        summed = (share * size_of_row).sum(-1)
        size_q[..., -1] = torch.maximum(size_q[..., -1], summed)
    own_q = _size(by_q) + _size(q_by_q * size_q) + _size(q_by_p * size_p)
    own_p = _size(by_p) + _size(p_by_p * size_p) + _size(p_by_q * size_q)
    cancelled = own_q + own_p + _size(by_q * size_q) + _size(by_p * size_p)
    total = own_q.sum(-1, keepdim=True) + (size_q * by_q).detach().sum(-1, keepdim=True).abs()
    if teacher.tail == "renormalize_teacher":
        own = own_q + call.log_q.exp() * total
    else:
        own = torch.zeros_like(z)
        of_tokens = own_q[..., :k].masked_fill(~named, 0.0)
        if teacher.tail == "renormalize":
            of_tokens = of_tokens + log_q.detach().exp() * total
        else:
            own = own + call.log_q.exp() * total
        if teacher.tail == "bucket":
            own = own + share * own_q[..., -1:] + share * size_of_row * _size(by_q)[..., -1:]
        own = own.detach().scatter_add(-1, seats, of_tokens.masked_fill(~named, 0.0))
    scale = call.options.alpha * call.t_squared.unsqueeze(-1) / t_student
    return call.with_terms(outcome, upstream, (phi.detach().abs() + cancelled).sum(-1), own * scale)


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
