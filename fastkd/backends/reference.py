"""The reference: the mathematics in plain PyTorch. It is the oracle of every other backend, and their fallback.

Everything is computed in float64, whatever the logits are, and rounded once; [N, V] temporaries are not avoided. On a
device without float64 it is computed in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.backends.angles import angles
from fastkd.backends.mutual import mutual_rows
from fastkd.backends.sparse import Events
from fastkd.call.contract import (
    Options,
    Result,
    Rows,
    ShardCall,
    Statistics,
    Want,
    row_dtype,
    widened,
)
from fastkd.call.log_zero import NEGLIGIBLE, evaluate
from fastkd.core.tensors import precision
from fastkd.divergences import Divergence, Target

__all__ = [
    "angles", "empty", "gather_events", "kd_rows", "mutual_rows", "scale_rows_", "shard_results",
    "shard_statistics", "shard_sums", "spread_gradient",
]  # fmt: skip


def _adjust(logits: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """Scaled and soft-capped logits z, and dz/dlogits. z = softcap * tanh(scale * logits / softcap)."""
    if not softcap:
        return (logits * scale, scale) if scale != 1.0 else (logits, 1.0)
    squashed = torch.tanh(logits * (scale / softcap))
    return softcap * squashed, scale * (1.0 - squashed * squashed)


def _project(derivative: Tensor, probabilities: Tensor, total: Tensor | None) -> Tensor:
    """From a derivative by log-probabilities to one by tempered logits: x_v - p_v sum_u x_u; total is that sum."""
    return derivative if total is None else derivative - probabilities * total.unsqueeze(-1)


class _Side(NamedTuple):
    """The columns of one model that count."""

    z: Tensor  # scaled and soft-capped
    slope: Tensor | float  # dz / dlogits
    temperature: Tensor | float  # [..., 1]
    apart: Tensor | None  # bool, where the label's column is not one of the divergence

    @property
    def tempered(self) -> Tensor:
        """What the divergence is of."""
        tempered = self.z / self.temperature
        return tempered if self.apart is None else tempered.masked_fill(self.apart, -torch.inf)


def _sides(student: Tensor, teacher: Tensor, rows: Rows, options: Options) -> tuple[_Side, _Side]:
    dtype = precision(student.device)
    apart = None
    if options.divergence.target is not None:
        assert rows.labels is not None  # validated
        columns = torch.arange(options.vocab_size, device=student.device) + options.first_column
        apart = columns == rows.labels.unsqueeze(-1)

    def side(
        logits: Tensor,
        scale: float,
        softcap: float,
        temperature: float,
        temperatures: Tensor | None,
    ) -> _Side:
        z, slope = _adjust(logits[..., : options.vocab_size].to(dtype), scale, softcap)
        spread = temperature if temperatures is None else temperatures.to(dtype).unsqueeze(-1)
        return _Side(z, slope, spread, apart)

    return (
        side(
            student,
            options.logit_scale,
            options.softcap,
            options.temperature,
            rows.temperature,
        ),
        side(
            teacher,
            options.teacher_logit_scale,
            options.teacher_softcap,
            options.teacher_temperature,
            rows.teacher_temperature,
        ),
    )


def _finite(origin: Tensor) -> Tensor:
    return torch.where(origin == -torch.inf, 0.0, origin).unsqueeze(-1)


def _top(logits: Tensor) -> Tensor:
    """The maximum of a row, [...]; -inf where a process has no column."""
    if logits.shape[-1]:
        return logits.amax(-1)
    return logits.new_full(logits.shape[:-1], -torch.inf)


def _with_labels(rows: Rows, options: Options) -> bool:
    return rows.labels is not None and options.alpha < 1.0


class _Apart(NamedTuple):
    """What the label's token adds to the sums over the others (fastkd.divergences.Target); [...] each, float64."""

    phi: Tensor
    g: Tensor  # d phi / d (s_y - log-sum-exp of the others): the label's own derivative, and the others' sum
    h: Tensor  # likewise by the teacher's logits
    entropy: Tensor  # of the label against the others
    others: Tensor  # the student's probability of them
    weight: Tensor  # of -log q_y at temperature 1


def _apart(s: _Side, t: _Side, found: _Found, target: Target) -> _Apart:
    def against_others(side: _Side, label: Tensor, top: Tensor, total: Tensor) -> Tensor:
        temperature = side.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.squeeze(-1).to(label.dtype)
        return (label / temperature - top) - total.log()

    b = against_others(s, found.label, found.s_top, found.s_sum)
    a = against_others(t, found.t_label, found.t_top, found.t_sum)
    p, p_rest, q, q_rest = a.sigmoid(), (-a).sigmoid(), b.sigmoid(), (-b).sigmoid()
    logs = [torch.nn.functional.logsigmoid(x) for x in (a, -a, b, -b)]

    def term(weight: Tensor, gap: Tensor) -> Tensor:
        return torch.where(weight < NEGLIGIBLE, 0.0, weight * gap)

    phi = g = h = weight = torch.zeros_like(a)
    if target.form == "binary":
        phi = term(
            weight + target.weight, term(p, logs[0] - logs[2]) + term(p_rest, logs[1] - logs[3])
        )
        # The smaller side's difference, as near 1 both have lost their digits.
        g = target.weight * torch.where(b > 0, p_rest - q_rest, q - p)
        h = term(weight + target.weight, term(p * p_rest, a - b))
    else:
        weight = found.t_label - _finite(found.t_plain_top).squeeze(-1) - found.t_plain_sum.log()
        weight = target.weight * weight.exp()
    return _Apart(phi, g, h, -term(q, logs[2]) - term(q_rest, logs[3]), q_rest, weight)


def _seat_of_labels(z: Tensor, labels: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(whether the label is one of these columns, which it is, or 0), [..., 1]."""
    seat = labels.unsqueeze(-1) - options.first_column
    here = (seat >= 0) & (seat < z.shape[-1])
    return here, torch.where(here, seat, 0)


def _of_labels(z: Tensor, labels: Tensor, options: Options) -> Tensor:
    """z of the labels; -inf where they are no column of these."""
    if not z.shape[-1]:
        return _top(z)
    here, seat = _seat_of_labels(z, labels, options)
    return torch.where(here, z.gather(-1, seat), -torch.inf).squeeze(-1)


def _towards_labels(q: Tensor, labels: Tensor, options: Options, smoothing: float) -> Tensor:
    """q less what the labels weigh, where they are."""
    if not q.shape[-1]:
        return q
    here, seat = _seat_of_labels(q, labels, options)
    return q.scatter_add(-1, seat, here.to(q.dtype) * (smoothing - 1.0))


class _Found(NamedTuple):
    """What one process knows of its columns, or all together of all; [...] each."""

    s_top: Tensor
    t_top: Tensor
    s_sum: Tensor  # of exp of the tempered logits, relative to the maximum
    t_sum: Tensor
    plain_sum: Tensor  # of exp(z), relative to top times the temperature
    plain_top: Tensor
    label: Tensor  # z of the label; -inf where it is another's
    t_label: Tensor  # likewise of the teacher, where the label is compared apart
    t_plain_sum: Tensor
    t_plain_top: Tensor
    total: Tensor  # sum of z - plain_top
    columns: Tensor


def _statistics(s: _Side, t: _Side, rows: Rows, options: Options) -> _Found:
    tops = [_top(s.tempered), _top(t.tempered), _top(s.z), _top(t.z)]

    def total(logits: Tensor, top: Tensor) -> Tensor:
        return (logits - _finite(top)).exp().sum(-1)

    label = t_label = torch.zeros_like(tops[0])
    if rows.labels is not None and options.reads_labels:
        label = _of_labels(s.z, rows.labels, options)
    if s.apart is not None:
        assert rows.labels is not None
        t_label = _of_labels(t.z, rows.labels, options)
    return _Found(
        tops[0],
        tops[1],
        total(s.tempered, tops[0]),
        total(t.tempered, tops[1]),
        total(s.z, tops[2]),
        tops[2],
        label,
        t_label,
        total(t.z, tops[3]),
        tops[3],
        (s.z - _finite(tops[2])).sum(-1),
        torch.full_like(label, s.z.shape[-1]),
    )


def _merged(parts: Tensor) -> _Found:
    """Of [processes, ..., fields], the sums in float64."""
    parts = parts.to(torch.float64)
    each = _Found(*parts.unbind(-1))
    tops = [top.amax(0) for top in (each.s_top, each.t_top, each.plain_top, each.t_plain_top)]

    def total(sums: Tensor, of_each: Tensor, top: Tensor) -> Tensor:
        return (sums * (of_each - _finite(top).squeeze(-1)).exp()).sum(0)

    rise = _finite(each.plain_top).squeeze(-1) - _finite(tops[2]).squeeze(-1)
    return _Found(
        tops[0],
        tops[1],
        total(each.s_sum, each.s_top, tops[0]),
        total(each.t_sum, each.t_top, tops[1]),
        total(each.plain_sum, each.plain_top, tops[2]),
        tops[2],
        each.label.amax(0),
        each.t_label.amax(0),
        total(each.t_plain_sum, each.t_plain_top, tops[3]),
        tops[3],
        (each.total + rise * each.columns).sum(0),
        each.columns.sum(0),
    )


class _Softmax(NamedTuple):
    """torch.softmax is off by 1e-5 on a CPU, in rows of 50,000 columns."""

    logs: Tensor
    probabilities: Tensor


def _softmax(logits: Tensor, top: Tensor, total: Tensor) -> _Softmax:
    gap = logits - _finite(top).to(logits.dtype)
    total = total.unsqueeze(-1)
    return _Softmax(gap - total.log().to(gap.dtype), gap.exp() / total.to(gap.dtype))


class _Terms(NamedTuple):
    """Every column's, between the sweeps."""

    p: _Softmax
    q: _Softmax
    phi: Tensor
    g: Tensor
    h: Tensor


def _terms(s: _Side, t: _Side, found: _Found, divergence: Divergence) -> _Terms:
    q = _softmax(s.tempered, found.s_top, found.s_sum)
    p = _softmax(t.tempered, found.t_top, found.t_sum)
    if divergence.normalized:
        pair = (p.probabilities, q.probabilities)
        return _Terms(p, q, *evaluate(divergence, p.logs, q.logs, pair))
    return _Terms(p, q, *evaluate(divergence, t.tempered, s.tempered))


class _Sums(NamedTuple):
    """Over the columns of one process, or of all; [...] each."""

    phi: Tensor
    g: Tensor
    entropy: Tensor


def _sums(terms: _Terms) -> _Sums:
    q = terms.q
    entropy = -torch.where(q.probabilities == 0, 0.0, q.probabilities * q.logs).sum(-1)
    return _Sums(terms.phi.sum(-1), terms.g.sum(-1), entropy)


def _cross_entropy(
    s: _Side, found: _Found, rows: Rows, options: Options, smoothing: float
) -> tuple[Tensor, Tensor]:
    """(value [...], gradient [..., columns]) of label-smoothed cross-entropy at temperature 1."""
    _, q = _softmax(s.z, found.plain_top, found.plain_sum)
    origin = _finite(found.plain_top).squeeze(-1)
    log_sum = found.plain_sum.log()
    value = (1.0 - smoothing) * (log_sum - (found.label - origin))
    assert rows.labels is not None
    gradient = _towards_labels(q, rows.labels, options, smoothing)
    if smoothing:
        value = value + smoothing * (log_sum - found.total / options.vocabulary)
        gradient = gradient - smoothing / options.vocabulary
    return value.to(s.z.dtype), gradient


def _results(
    student: Tensor,
    teacher: Tensor,
    s: _Side,
    t: _Side,
    terms: _Terms,
    found: _Found,
    sums: _Sums,
    rows: Rows,
    options: Options,
    want: Want,
) -> Result:
    """Everything that is wanted, in fresh tensors; the sums are over the whole vocabulary."""
    divergence, alpha = options.divergence, options.alpha
    dtype = s.z.dtype
    temperature, teacher_temperature = s.temperature, t.temperature
    apart, others = None, sums
    if divergence.target is not None:
        apart = _Apart(*(x.to(dtype) for x in _apart(s, t, found, divergence.target)))
        entropy = apart.entropy + apart.others * sums.entropy
        sums = _Sums(sums.phi + apart.phi, sums.g + apart.g, entropy)
    sums = _Sums(*(value.to(dtype) for value in sums))
    t_squared: Tensor | float = temperature * temperature if options.scale_by_temperature else 1.0
    distillation = sums.phi * (
        t_squared.squeeze(-1) if isinstance(t_squared, Tensor) else t_squared
    )

    # A dropped row contributes 0 whatever its logits hold, so it is selected away and not multiplied by 0.
    labels = rows.labels
    weight = torch.ones_like(distillation) if rows.weight is None else rows.weight.to(dtype)
    keep = weight != 0
    if labels is not None:
        keep = keep & (labels != options.ignore_index)
    for tempering in (rows.temperature, rows.teacher_temperature):
        if tempering is not None:  # an invalid temperature poisons its row
            weight = torch.where(tempering > 0, weight, torch.nan)

    if divergence.normalized and alpha:
        # NaN or +inf among the logits, which a definition with a comparison in it may lose.
        lost = (found.s_sum + found.t_sum).isnan()
        if divergence.target is not None:  # the label's logit is in neither sum
            lost = lost | (found.label == torch.inf) | (found.t_label == torch.inf)
        weight = torch.where(lost, torch.nan, weight)

    cross_entropy = torch.zeros_like(distillation)
    cross_entropy_gradient: Tensor | float = 0.0
    label_gradient: Tensor | float = 0.0
    with_labels = _with_labels(rows, options)
    if labels is not None and with_labels:
        cross_entropy, cross_entropy_gradient = _cross_entropy(
            s, found, rows, options, options.label_smoothing
        )
    if divergence.target is not None and divergence.target.form == "label":
        assert apart is not None
        value, label_gradient = _cross_entropy(s, found, rows, options, 0.0)
        distillation = distillation + torch.where(apart.weight == 0, 0.0, apart.weight * value)
        label_gradient = apart.weight.unsqueeze(-1) * label_gradient
    if labels is not None and options.reads_labels:
        valid = (labels >= 0) & (labels < options.vocabulary)
        weight = torch.where(valid, weight, torch.nan)  # and so does an invalid label

    scale = options.scale if rows.scale is None else options.scale * rows.scale.to(dtype)
    row_scale = (weight * scale).unsqueeze(-1)
    loss = torch.zeros_like(distillation)
    if alpha:
        loss = alpha * distillation
    if with_labels:
        loss = loss + (1.0 - alpha) * cross_entropy
    loss = torch.where(keep, loss * weight, 0.0)

    def finish(gradient: Tensor, like: Tensor) -> Tensor:
        gradient = torch.where(keep.unsqueeze(-1), gradient * row_scale, 0.0).to(like.dtype)
        padding = like.shape[-1] - options.vocab_size
        return torch.nn.functional.pad(gradient, (0, padding)) if padding else gradient.contiguous()

    student_gradient = teacher_gradient = None
    if want.student_gradient:
        gradient = torch.zeros_like(s.z)
        if alpha:
            total = sums.g if divergence.normalized else None
            gradient = _project(terms.g, terms.q.probabilities, total)
            if apart is not None and s.apart is not None:
                gradient = torch.where(s.apart, apart.g.unsqueeze(-1), gradient)
            gradient = alpha * (gradient * (t_squared / temperature) + label_gradient)
        if with_labels:
            gradient = gradient + (1.0 - alpha) * cross_entropy_gradient
        student_gradient = finish(gradient * s.slope, student)
    if want.teacher_gradient:
        assert divergence.degree is not None  # validated
        gradient = torch.zeros_like(t.z)
        if alpha:
            total = divergence.degree * others.phi - others.g if divergence.normalized else None
            if apart is not None and total is not None:
                total = total + apart.h
            gradient = _project(terms.h, terms.p.probabilities, total)
            if apart is not None and s.apart is not None:
                gradient = torch.where(s.apart, apart.h.unsqueeze(-1), gradient)
            gradient = gradient * (alpha * t_squared / teacher_temperature)
        teacher_gradient = finish(gradient * t.slope, teacher)
    if want.inplace and student_gradient is not None:
        student_gradient = student.copy_(student_gradient)

    of_rows = row_dtype(student.dtype, teacher.dtype)
    parts: tuple[Tensor | None, ...] = (None, None, None)
    if want.parts:
        parts = tuple(
            torch.where(keep, part, 0.0).to(of_rows)
            for part in (distillation, cross_entropy, sums.entropy)
        )
    total = (loss.sum() * scale).to(of_rows)
    return Result(loss.to(of_rows), total, student_gradient, teacher_gradient, *parts)


def kd_rows(student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want) -> Result:
    """The loss of each row and its gradients; shapes and meaning as :class:`fastkd.call.contract.Result` has them."""
    s, t = _sides(student, teacher, rows, options)
    found = _merged(torch.stack(_statistics(s, t, rows, options), -1).unsqueeze(0))
    terms = _terms(s, t, found, options.divergence)
    return _results(student, teacher, s, t, terms, found, _sums(terms), rows, options, want)


# The same where several processes share the vocabulary: fastkd/call/contract.py says what passes between the steps.


def shard_statistics(call: ShardCall) -> Statistics:
    """Of this process's columns: 12 numbers a row in float64."""
    student, teacher, rows, options, *_ = call
    found = _statistics(*_sides(student, teacher, rows, options), rows, options)
    return Statistics(torch.stack(found, -1).flatten(0, -2).to(torch.float64))


def shard_sums(call: ShardCall) -> Tensor | None:
    """Of this process's columns, given the statistics of all: 3 numbers a row in float64."""
    s, t = _sides(call.student, call.teacher, call.rows, call.options)
    terms = _terms(s, t, _of_all(call.known(), call.student), call.options.divergence)
    return torch.stack(_sums(terms), -1).flatten(0, -2).to(torch.float64)


def shard_results(call: ShardCall) -> None:
    """Fill the result, given the statistics and the sums of all processes."""
    student, teacher, rows, options, result, _, sums = call
    assert sums is not None
    s, t = _sides(student, teacher, rows, options)
    found = _of_all(call.known(), student)
    terms = _terms(s, t, found, options.divergence)
    total = _Sums(*sums.sum(0).reshape(*student.shape[:-1], -1).unbind(-1))
    want = Want(
        result.student_gradient is not None,
        result.teacher_gradient is not None,
        result.distillation is not None,
    )
    made = _results(student, teacher, s, t, terms, found, total, rows, options, want)
    for to, value in zip(result, made, strict=True):
        if to is not None and to is not result.total:
            assert value is not None
            to.copy_(value)


def _of_all(statistics: Statistics, student: Tensor) -> _Found:
    gathered = statistics.gathered
    return _merged(gathered.reshape(gathered.shape[0], *student.shape[:-1], -1))


def gather_events(student: Tensor, rows: Rows, options: Options, parts: bool) -> Events:
    """The student's rows as a sparse teacher sees them: fastkd/backends/sparse.py."""
    ids, columns = rows.ids, options.vocab_size
    assert ids is not None
    z, _ = _adjust(widened(student[..., :columns]), options.logit_scale, options.softcap)
    temperature = _temperature_of(rows, options, z.dtype)
    in_range, seats, counts = _seat(ids, z, options)
    known = (ids == -1) | ((ids >= 0) & (ids < options.vocabulary))
    valid = known.all(-1) & (counts <= 1).all(-1)

    tokens = z.gather(-1, seats).masked_fill(~in_range, -torch.inf)
    others = z.masked_fill(counts > 0, -torch.inf)
    origin, tail_origin = tokens.amax(-1), others.amax(-1)
    others = (others - _finite(tail_origin)) / temperature
    log_sum = others.logsumexp(-1)
    entropy = None
    if parts:
        log_q = others - torch.where(log_sum == -torch.inf, 0.0, log_sum).unsqueeze(-1)
        q = log_q.exp()
        entropy = -torch.where(q == 0, 0.0, q * log_q).sum(-1)
    log_sum_at_1 = label = mean = None
    if rows.labels is not None and _with_labels(rows, options):
        z = z - _finite(torch.maximum(origin, tail_origin))
        log_sum_at_1 = z.logsumexp(-1)
        label = _of_labels(z, rows.labels, options)
        mean = z.sum(-1) / options.vocabulary if options.label_smoothing else None
    spread = temperature.squeeze(-1) if isinstance(temperature, Tensor) else temperature
    return Events(
        origin,
        tail_origin,
        tokens - _finite(origin),
        tail_origin - _finite(origin).squeeze(-1) + spread * log_sum,
        log_sum,
        entropy,
        log_sum_at_1,
        label,
        mean,
        valid,
    )


def spread_gradient(
    student: Tensor,
    events: Events,
    gradient: Tensor,
    cross_entropy_scale: Tensor | None,
    rows: Rows,
    options: Options,
    out: Tensor,
) -> Tensor:
    """The gradient of the events [..., K + 1], and the cross-entropy's, as that of the student's logits."""
    ids, columns = rows.ids, options.vocab_size
    assert ids is not None
    z, slope = _adjust(widened(student[..., :columns]), options.logit_scale, options.softcap)
    temperature = _temperature_of(rows, options, z.dtype)
    in_range, seats, counts = _seat(ids, z, options)

    share = (z - events.tail_origin.unsqueeze(-1)) / temperature - events.tail_log_sum.unsqueeze(-1)
    result = share.exp() * gradient[..., -1:]
    result = result.masked_fill((counts > 0) | (z == -torch.inf), 0.0)
    result.scatter_add_(-1, seats, gradient[..., :-1].masked_fill(~in_range, 0.0))
    if cross_entropy_scale is not None:
        assert rows.labels is not None and events.log_sum is not None
        smoothing = options.label_smoothing
        log_q = z - torch.maximum(events.origin, events.tail_origin).unsqueeze(-1)
        cross_entropy = (log_q - events.log_sum.unsqueeze(-1)).exp()
        cross_entropy = _towards_labels(cross_entropy, rows.labels, options, smoothing) - (
            smoothing / options.vocabulary
        )
        result = result + cross_entropy_scale.unsqueeze(-1) * cross_entropy
    assert rows.weight is not None
    weight = rows.weight.unsqueeze(-1)
    result = torch.where(weight.isnan(), torch.nan, torch.where(weight == 0, 0.0, result * slope))
    padding = student.shape[-1] - columns
    return out.copy_(torch.nn.functional.pad(result, (0, padding)) if padding else result)


def _seat(ids: Tensor, z: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(which ids are columns of z, those columns with 0 for the others, how often each column is named)."""
    ids = ids - options.first_column
    in_range = (ids >= 0) & (ids < z.shape[-1])
    seats = ids.where(in_range, 0)
    counts = torch.zeros(z.shape, dtype=torch.int32, device=z.device)
    return in_range, seats, counts.scatter_add_(-1, seats, in_range.to(torch.int32))


def _temperature_of(rows: Rows, options: Options, dtype: torch.dtype) -> Tensor | float:
    if rows.temperature is None:
        return options.temperature
    return rows.temperature.to(dtype).unsqueeze(-1)


def scale_rows_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply each row of gradient [..., V] by upstream, a scalar or [...]."""
    gradient.mul_(upstream.unsqueeze(-1) if upstream.dim() else upstream)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for logits of a chunk."""
    return torch.empty(shape, dtype=dtype, device=device)
