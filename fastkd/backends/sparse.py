"""Sparse teachers: a divergence over K tokens and one event for all others is a dense one over K + 1 columns.

The student's row becomes the logits of K + 1 events, where the last is T log sum exp(z / T) over all other tokens, its
tail. The loss of the events is the backend's own dense loss, with every divergence and policy it has. Their gradient
goes back to the row: to the K tokens as it is, and to the others in proportion to their share of the tail.

A backend brings the two steps in which the whole row takes part, and :class:`SparseRows` is the backend for sparse
teachers that they make of it:

    gather_events(student, rows, options, parts) -> Events
    spread_gradient(student, events, gradient, cross_entropy_scale, rows, options, out) -> gradient of the row

where rows.weight is there, 0 in a row that is dropped and NaN in one that is not valid. Where several processes share
the vocabulary, each gathers the events of its own columns (-inf for tokens and labels that are another's), and
:func:`merged` makes the row's of them.

The cpu and cuda backends have neither step. Their kd_rows takes sparse teachers itself, while a row is in the cache
(csrc/cpu/topk.h), and SPARSE = True says so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.call.contract import Options, Result, Rows, ShardCall, Statistics, Want, row_dtype
from fastkd.call.log_zero import evaluate


class Events(NamedTuple):
    """A row of the student as a sparse teacher sees it.

    Logits z are scaled and soft-capped, and relative to an origin, so that an offset that they share costs no digits:
    tokens and tail to the largest of the tokens, and what belongs to the whole row to the larger of the two origins.
    Origins are the backend's own, and may be in the units of its logits.
    """

    origin: Tensor  # [...]: of the tokens, -inf where all are
    tail_origin: Tensor  # [...]: of the others, likewise
    tokens: Tensor  # [..., K]: z of the teacher's tokens; -inf where the id is padding
    tail: Tensor  # [...]: T log sum exp(z / T) over all other tokens; -inf where there are none
    tail_log_sum: Tensor  # [...]: the same without T, relative to tail_origin
    tail_entropy: (
        Tensor | None
    )  # [...]: of softmax(z / T) over them, 0 where there are none; for the parts
    log_sum: Tensor | None  # [...]: log sum exp(z) of the whole row, for the cross-entropy
    label: Tensor | None  # [...]: z of the label
    mean: (
        Tensor | None
    )  # [...]: of z over the row, for label smoothing; of a shard its part of that
    valid: Tensor  # [...] bool: ids in range and distinct
    bits: Tensor | None = None  # where the tokens are, for a backend that needs it again
    unit: float = 1.0  # of the origins: a difference of theirs times it is one of z


class SparseRows:
    """A backend for sparse teachers, from its loss of dense rows and its two steps; as a backend's module is."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels
        self.scale_rows_, self.empty = kernels.scale_rows_, kernels.empty

    @torch.no_grad()
    def kd_rows(
        self, student: Tensor, logprobs: Tensor, rows: Rows, options: Options, want: Want
    ) -> Result:
        """The loss of each row; shapes and meaning as :class:`fastkd.call.contract.Result` has them."""
        events = self.kernels.gather_events(student, rows, options, want.parts)
        out = None
        if want.student_gradient:
            contiguous = torch.contiguous_format
            out = student if want.inplace else torch.empty_like(student, memory_format=contiguous)
        return _results(self.kernels, events, student, logprobs, rows, options, out, want.parts)

    # Where several processes share the vocabulary: fastkd/call/contract.py says what passes between the steps.

    def shard_statistics(self, call: ShardCall) -> Statistics:
        """Of this process's events: 9 numbers a row in float64, and the tokens' logits."""
        student, _, rows, options, result, *_ = call
        assert rows.ids is not None
        parts = result.distillation is not None
        if options.vocab_size:
            events = self.kernels.gather_events(student, rows, options, parts)
        else:
            events = _no_events(rows, options, parts, row_dtype(student.dtype))
        nothing = torch.zeros_like(events.origin)

        def given(value: Tensor | None) -> Tensor:
            return nothing if value is None else value

        origin = events.origin.to(torch.float64) * events.unit
        shared = _Shared(
            origin,
            events.tail_origin.to(torch.float64) * events.unit,
            events.tail_log_sum,
            given(events.tail_entropy),
            given(events.log_sum),
            given(events.label),
            given(events.mean),
            torch.full_like(nothing, options.vocab_size),
            events.valid,
        )
        gathered = torch.stack([value.to(torch.float64) for value in shared], -1)
        seats = rows.ids - options.first_column
        here = (seats >= 0) & (seats < options.vocab_size)
        z = events.tokens + _finite(origin).to(events.tokens.dtype).unsqueeze(-1)
        tokens = torch.where(here, z, 0.0)
        kept = events._replace(tokens=nothing)  # which is the largest, and known to all
        return Statistics(gathered.flatten(0, -2), tokens.reshape(-1, tokens.shape[-1]), kept)

    def shard_sums(self, call: ShardCall) -> None:
        """None: the events of all processes are enough."""

    def shard_results(self, call: ShardCall) -> None:
        """Fill the result, given the events of all processes."""
        student, logprobs, rows, options, result, *_ = call
        events = merged(call.known(), rows, options)
        out = result.student_gradient
        parts = result.distillation is not None
        where = out if options.vocab_size else None  # no column: only padding is left to write
        if out is not None and where is None:
            out.zero_()
        made = _results(self.kernels, events, student, logprobs, rows, options, where, parts)
        for to, value in zip((result.loss, *result[4:]), (made.loss, *made[4:]), strict=True):
            if to is not None:
                assert value is not None
                to.copy_(value)


def _results(
    kernels: Any,
    events: Events,
    student: Tensor,
    logprobs: Tensor,
    rows: Rows,
    options: Options,
    out: Tensor | None,
    wants_parts: bool,
) -> Result:
    """What follows from the events; out is where the gradient goes."""
    ids, labels, alpha = rows.ids, rows.labels, options.alpha
    assert ids is not None
    dtype = row_dtype(student.dtype, logprobs.dtype)
    with_labels = labels is not None and alpha < 1.0
    weight = torch.ones_like(events.tail) if rows.weight is None else rows.weight.to(dtype)
    if labels is not None:
        weight = torch.where(labels == options.ignore_index, 0.0, weight)
    keep = weight != 0
    valid = events.valid
    if labels is not None and with_labels:
        valid = valid & (labels >= 0) & (labels < options.vocabulary)
    for tempering in (rows.temperature, rows.teacher_temperature):
        if tempering is not None:
            valid = valid & (tempering > 0)
    wrong = keep & ~valid
    weight = torch.where(wrong, torch.nan, weight)  # which makes all of the row NaN

    temperature = options.temperature if rows.temperature is None else rows.temperature.to(dtype)
    logprobs = logprobs.to(dtype).masked_fill(ids < 0, -torch.inf)
    rows = rows._replace(weight=weight)
    scale = options.scale if rows.scale is None else options.scale * rows.scale.to(dtype)
    gradient: Tensor | None
    if options.tail == "truncate":
        distillation, gradient = _truncated(events, logprobs, options, temperature)
        square = temperature * temperature if options.scale_by_temperature else 1.0
        distillation = torch.where(keep, square * distillation, 0.0)
        loss = alpha * torch.where(keep, weight * distillation, 0.0)
        factor = alpha * square / temperature * weight * scale
        gradient = factor.unsqueeze(-1) * gradient if out is not None else None
    else:
        wanted = Want(out is not None, parts=True)
        loss, distillation, gradient = _dense(kernels, events, logprobs, rows, options, wanted)
    # A teacher that names no token says nothing, under any policy.
    silent = (ids == -1).all(-1)
    nothing = torch.where(keep, 0.0 * weight, 0.0)  # NaN in a row that is not valid
    loss = torch.where(silent, nothing, loss)
    distillation = distillation.masked_fill(silent, 0.0).masked_fill(wrong, torch.nan)
    if gradient is not None:
        gradient = torch.where(silent.unsqueeze(-1), nothing.unsqueeze(-1), gradient)

    cross_entropy = torch.zeros_like(loss)
    cross_entropy_scale = None
    if with_labels:
        assert events.log_sum is not None and events.label is not None
        cross_entropy = events.log_sum - events.label
        if events.mean is not None:
            smoothing = options.label_smoothing
            smooth = events.log_sum - events.mean
            cross_entropy = (1.0 - smoothing) * cross_entropy + smoothing * smooth
        cross_entropy = torch.where(keep, cross_entropy, 0.0)
        loss = loss + torch.where(keep, (1.0 - alpha) * weight * cross_entropy, 0.0)
        cross_entropy_scale = (1.0 - alpha) * weight * scale
    if gradient is not None:
        assert out is not None
        gradient = kernels.spread_gradient(
            student,
            events,
            torch.where(keep.unsqueeze(-1), gradient, 0.0),
            cross_entropy_scale,
            rows,
            options,
            out,
        )
    parts: tuple[Tensor | None, ...] = (None, None, None)
    if wants_parts:
        entropy = torch.where(keep, _entropy(events, temperature), 0.0)
        parts = (distillation, cross_entropy, entropy)
    total = loss.sum() * scale
    return Result(loss, total, gradient, None, *parts)


def _dense(
    kernels: Any,
    events: Events,
    logprobs: Tensor,
    rows: Rows,
    options: Options,
    want: Want,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, distillation, gradient [..., K + 1]) of the events, as the dense loss of the backend has them."""
    s, t = events.tokens, logprobs
    if options.tail != "renormalize":
        mass = torch.full_like(events.tail, -torch.inf)
        if rows.tail_logprob is not None:
            mass = rows.tail_logprob.to(mass.dtype)
        s = torch.cat([s, events.tail.unsqueeze(-1)], -1)
        t = torch.cat([t, mass.unsqueeze(-1)], -1)
    options = options._replace(
        label_smoothing=0.0,
        logit_scale=1.0,
        softcap=0.0,
        vocab_size=s.shape[-1],
        tail="",
        shard=None,
    )
    rows = rows._replace(labels=None, ids=None, tail_logprob=None)
    result = kernels.kd_rows(s, t, rows, options, want)
    gradient = result.student_gradient
    if gradient is not None and s is events.tokens:
        gradient = torch.nn.functional.pad(gradient, (0, 1))
    assert result.distillation is not None
    return result.loss, result.distillation, gradient


def _truncated(
    events: Events, logprobs: Tensor, options: Options, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(sum of phi over the tokens [...], its gradient by the events' tempered logits [..., K + 1])."""
    z = torch.cat([events.tokens, events.tail.unsqueeze(-1)], -1) / _per_row(temperature)
    log_q = z.to(logprobs.dtype).log_softmax(-1)
    q = log_q.exp()
    phi, g, _ = evaluate(options.divergence, logprobs, log_q[..., :-1])
    total = g.sum(-1, keepdim=True)
    return phi.sum(-1), torch.nn.functional.pad(g, (0, 1)) - q * total


def _per_row(value: float | Tensor) -> float | Tensor:
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value


def _entropy(events: Events, temperature: float | Tensor) -> Tensor:
    """Of the student over the whole vocabulary: that of the events, and within the tail by its share."""
    z = torch.cat([events.tokens, events.tail.unsqueeze(-1)], -1) / _per_row(temperature)
    log_q = z.log_softmax(-1)
    q = log_q.exp()
    assert events.tail_entropy is not None
    among = -torch.where(q == 0, 0.0, q * log_q).sum(-1)
    return among + q[..., -1] * events.tail_entropy


# ---- what processes that share the vocabulary exchange


class _Shared(NamedTuple):
    """What processes exchange of their events, [rows] each; the tokens are summed by themselves.

    Origins are in units of z: a process without a column does not know its backend's.
    """

    origin: Tensor
    tail_origin: Tensor
    tail_log_sum: Tensor
    tail_entropy: Tensor
    log_sum: Tensor
    label: Tensor
    mean: Tensor
    columns: Tensor
    valid: Tensor


def _no_events(rows: Rows, options: Options, parts: bool, dtype: torch.dtype) -> Events:
    """Those of a process without a column."""
    assert rows.ids is not None
    lead, device = rows.ids.shape[:-1], rows.ids.device

    def full(value: float, wanted: bool = True, *columns: int) -> Any:
        if not wanted:
            return None
        return torch.full((*lead, *columns), value, dtype=dtype, device=device)

    labels = rows.labels is not None and options.alpha < 1.0
    lowest = -torch.inf
    return Events(
        full(lowest),
        full(lowest),
        full(lowest, True, rows.ids.shape[-1]),
        full(lowest),
        full(lowest),
        full(0.0, parts),
        full(lowest, labels),
        full(lowest, labels),
        full(0.0, labels and options.label_smoothing > 0),
        full(1.0) > 0,
    )


def merged(statistics: Statistics, rows: Rows, options: Options) -> Events:
    """The events of whole rows."""
    kept: Events = statistics.kept
    assert rows.ids is not None and statistics.summed is not None
    lead, unit, dtype = rows.ids.shape[:-1], kept.unit, statistics.summed.dtype
    gathered = statistics.gathered
    each = _Shared(*gathered.reshape(gathered.shape[0], *lead, -1).unbind(-1))
    temperature: float | Tensor = options.temperature
    if rows.temperature is not None:
        temperature = rows.temperature.to(torch.float64)
    origin, tail_origin = each.origin.amax(0), each.tail_origin.amax(0)
    rise = (_finite(each.tail_origin) - _finite(tail_origin)) / temperature
    tail_parts = each.tail_log_sum + rise
    tail_log_sum = tail_parts.logsumexp(0)
    share = (tail_parts - _finite(tail_log_sum)).exp()
    among = torch.where(share == 0, 0.0, share * (each.tail_entropy - share.log()))
    # What belongs to the whole row is relative to the larger of both origins.
    rise = torch.maximum(each.origin, each.tail_origin)
    rise = _finite(rise) - _finite(torch.maximum(origin, tail_origin))
    mean = each.mean + rise * each.columns / options.vocabulary
    ids = rows.ids
    tokens = statistics.summed.reshape(ids.shape) - _finite(origin).to(dtype).unsqueeze(-1)
    known = (ids >= 0) & (ids < options.vocabulary)
    tail = tail_origin - _finite(origin) + temperature * tail_log_sum

    def narrow(value: Tensor, wanted: Tensor | None = tail) -> Tensor | None:
        return None if wanted is None else value.to(dtype)

    return kept._replace(
        origin=(origin / unit).to(dtype),
        tail_origin=(tail_origin / unit).to(dtype),
        tokens=tokens.masked_fill(~known, -torch.inf),
        tail=tail.to(dtype),
        tail_log_sum=tail_log_sum.to(dtype),
        tail_entropy=narrow(among.sum(0), kept.tail_entropy),
        log_sum=narrow((each.log_sum + rise).logsumexp(0), kept.log_sum),
        label=narrow((each.label + rise).amax(0), kept.label),
        mean=narrow(mean.sum(0), kept.mean),
        valid=(each.valid != 0).all(0) & ((ids == -1) | known).all(-1),
    )


def _finite(origin: Tensor) -> Tensor:
    return torch.where(origin == -torch.inf, 0.0, origin)
