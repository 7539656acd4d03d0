"""Sparse teachers as dense ones: K tokens and one event for all other tokens form a row of K + 1 columns.

The student's row becomes the logits of K + 1 events. The last event is the tail, all other tokens, with the logit
T log sum exp(z / T) over them. The loss of the events is the backend's own dense loss, with all of its divergences and
policies. Their gradient goes back to the row: unchanged to the K tokens, and to the other tokens in proportion to
their share of the tail.

A backend implements the two steps that read the whole row. :class:`SparseRows` makes a backend for sparse teachers of
them:

    gather_events(student, rows, options, parts) -> Events
    spread_gradient(student, events, gradient, cross_entropy_scale, rows, options, out) -> gradient of the row

In the second, rows.weight is set: 0 in a dropped row, NaN in an invalid one. Where several processes share the
vocabulary, each gathers the events of its own columns (with -inf for tokens and labels of other processes), and
:func:`merged` combines them.

The cpu and cuda backends implement neither step. Their kd_rows takes sparse teachers itself, while a row is in the
cache (csrc/cpu/topk.h), which they declare by SPARSE = True.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.call.contract import Options, Result, Rows, ShardCall, Statistics, Want, row_dtype
from fastkd.call.log_zero import evaluate
from fastkd.call.measures import sum_dtype, sums
from fastkd.core.tensors import finite_max


class Events(NamedTuple):
    """The student's rows as K + 1 events: the teacher's tokens and the tail.

    Logits z are scaled and soft-capped. They are relative to an origin, so that a common offset costs no digits: tokens
    and tail to the largest of the tokens, and values of the whole row to the larger of the two origins. Origins may be
    in units of the backend's own logits (`unit`).
    """

    # [...]: the largest z of the tokens, -inf if all are -inf.
    origin: Tensor
    # [...]: the same of all other tokens.
    tail_origin: Tensor
    # [..., K]: z of the teacher's tokens; -inf where the id is padding.
    tokens: Tensor
    # [...]: T log sum exp(z / T) over all other tokens; -inf if there are none.
    tail: Tensor
    # [...]: log sum exp(z / T) over all other tokens, relative to tail_origin.
    tail_log_sum: Tensor
    # [...]: entropy of softmax(z / T) over all other tokens, 0 if there are none; None: parts are not wanted.
    tail_entropy: Tensor | None
    # [...]: log sum exp(z) of the whole row, for the cross-entropy.
    log_sum: Tensor | None
    # [...]: z of the label.
    label: Tensor | None
    # [...]: mean of z over the row, for label smoothing; in a shard, the contribution of its columns to that mean.
    mean: Tensor | None
    # [...] bool: whether the ids are distinct and in range.
    valid: Tensor
    # Which columns are tokens, for a backend that needs it in its second step.
    bits: Tensor | None = None
    # What a difference of origins is multiplied by to get one of z.
    unit: float = 1.0


class SparseRows:
    """A backend for sparse teachers, made of the kd_rows and the two steps of a backend's module."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels
        self.scale_rows_, self.empty = kernels.scale_rows_, kernels.empty

    @torch.no_grad()
    def kd_rows(
        self, student: Tensor, logprobs: Tensor, rows: Rows, options: Options, want: Want
    ) -> Result:
        """Compute the loss of each row; :class:`fastkd.call.contract.Result` has shapes and meaning."""
        events = self.kernels.gather_events(student, rows, options, want.parts)
        out = None
        if want.student_gradient:
            contiguous = torch.contiguous_format
            out = student if want.inplace else torch.empty_like(student, memory_format=contiguous)
        measures = event_measures(events, logprobs, rows, options) if want.measures else None
        result = _results(self.kernels, events, student, logprobs, rows, options, out, want.parts)
        return result._replace(measures=measures)

    # The steps where several processes share the vocabulary: fastkd/call/contract.py says what passes between them.

    def shard_statistics(self, call: ShardCall) -> Statistics:
        """Reduce this process's columns to events: 9 numbers per row in float64, and the tokens' logits."""
        student, _, rows, options, result, *_ = call
        assert rows.ids is not None
        parts = result.distillation is not None
        if options.vocab_size:
            events = self.kernels.gather_events(student, rows, options, parts)
        else:
            events = _no_events(rows, options, parts, row_dtype(student.dtype))
        zeros = torch.zeros_like(events.origin)

        def or_zeros(value: Tensor | None) -> Tensor:
            return zeros if value is None else value

        origin = events.origin.to(torch.float64) * events.unit
        exchanged = _Exchanged(
            origin,
            events.tail_origin.to(torch.float64) * events.unit,
            events.tail_log_sum,
            or_zeros(events.tail_entropy),
            or_zeros(events.log_sum),
            or_zeros(events.label),
            or_zeros(events.mean),
            torch.full_like(zeros, options.vocab_size),
            events.valid,
        )
        gathered = torch.stack([value.to(torch.float64) for value in exchanged], -1)
        columns = rows.ids - options.first_column
        is_local = (columns >= 0) & (columns < options.vocab_size)
        z = events.tokens + finite_max(origin).to(events.tokens.dtype).unsqueeze(-1)
        tokens = torch.where(is_local, z, 0.0)
        # The tokens are the largest field, and every process receives them.
        kept = events._replace(tokens=zeros)
        return Statistics(gathered.flatten(0, -2), tokens.reshape(-1, tokens.shape[-1]), kept)

    def shard_sums(self, call: ShardCall) -> None:
        """Return None: the events of all processes are enough."""

    def shard_results(self, call: ShardCall) -> None:
        """Fill the result, given the events of all processes."""
        student, logprobs, rows, options, result, *_ = call
        events = merged(call.known(), rows, options)
        out = result.student_gradient
        parts = result.distillation is not None
        if out is not None and not options.vocab_size:  # all columns here are padding
            out.zero_()
            out = None
        measures = None
        if result.measures is not None:
            measures = event_measures(events, logprobs, rows, options)
        computed = _results(self.kernels, events, student, logprobs, rows, options, out, parts)
        computed = computed._replace(measures=measures)
        outputs, values = (result.loss, *result[4:]), (computed.loss, *computed[4:])
        for output, value in zip(outputs, values, strict=True):
            if output is not None:
                assert value is not None
                output.copy_(value)


@torch.no_grad()
def event_measures(events: Events, logprobs: Tensor, rows: Rows, options: Options) -> Tensor:
    """The measures of the events of a sparse teacher, [..., len(MEASURES)], without the overlap."""
    ids = rows.ids
    assert ids is not None
    dtype = sum_dtype(events.tail)
    no_tail = torch.full_like(events.tail, -torch.inf, dtype=dtype)
    s_tail = no_tail if options.tail == "renormalize" else events.tail
    t_tail = no_tail
    if options.tail in ("bucket", "truncate") and rows.tail_logprob is not None:
        t_tail = rows.tail_logprob
    is_padding = ids < 0

    def log_probabilities(
        tokens: Tensor, tail: Tensor, temperature: float, row_temperatures: Tensor | None
    ) -> Tensor:
        tokens = tokens.to(dtype).masked_fill(is_padding, -torch.inf)
        z = torch.cat([tokens, tail.to(dtype).unsqueeze(-1)], -1)
        if row_temperatures is not None:
            return (z / row_temperatures.to(dtype).unsqueeze(-1)).log_softmax(-1)
        return (z / temperature).log_softmax(-1)

    log_q = log_probabilities(events.tokens, s_tail, options.temperature, rows.temperature)
    log_p = log_probabilities(
        logprobs, t_tail, options.teacher_temperature, rows.teacher_temperature
    )
    agreement = log_q.argmax(-1) == log_p.argmax(-1)
    masses = (log[..., :-1].exp().sum(-1) for log in (log_q, log_p))
    numbers = [*sums(log_p, log_q).unbind(-1), agreement, *masses, torch.zeros_like(no_tail)]
    measures = torch.stack([number.to(dtype) for number in numbers], -1)
    measures = measures.to(row_dtype(events.tail.dtype, logprobs.dtype))
    return measures.masked_fill((ids == -1).all(-1, keepdim=True), 0.0)


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
    """Compute the loss from the events, and write the gradient to out."""
    ids = rows.ids
    assert ids is not None
    dtype = row_dtype(student.dtype, logprobs.dtype)
    weight, counted, invalid = _row_weights(events, rows, options, dtype)
    temperature = options.temperature if rows.temperature is None else rows.temperature.to(dtype)
    logprobs = logprobs.to(dtype).masked_fill(ids < 0, -torch.inf)
    rows = rows._replace(weight=weight)
    scale = options.scale if rows.scale is None else options.scale * rows.scale.to(dtype)

    if options.tail == "truncate":
        loss, distillation, gradient = _truncated_loss(
            events, logprobs, weight, counted, scale, options, temperature, out is not None
        )
    else:
        wanted = Want(out is not None, parts=True)
        loss, distillation, gradient = _dense(kernels, events, logprobs, rows, options, wanted)
    # A teacher that lists no token for a row adds nothing to its loss, under any policy.
    empty = (ids == -1).all(-1)
    zero = torch.where(counted, 0.0 * weight, 0.0)  # NaN in an invalid row
    loss = torch.where(empty, zero, loss)
    distillation = distillation.masked_fill(empty, 0.0).masked_fill(invalid, torch.nan)
    if gradient is not None:
        gradient = torch.where(empty.unsqueeze(-1), zero.unsqueeze(-1), gradient)

    cross_entropy = torch.zeros_like(loss)
    cross_entropy_scale = None
    if rows.labels is not None and options.alpha < 1.0:
        cross_entropy = torch.where(counted, _cross_entropy(events, options), 0.0)
        cross_entropy_weight = options.cross_entropy_weight * weight
        loss = loss + torch.where(counted, cross_entropy_weight * cross_entropy, 0.0)
        cross_entropy_scale = cross_entropy_weight * scale
    if gradient is not None:
        assert out is not None
        gradient = kernels.spread_gradient(
            student,
            events,
            torch.where(counted.unsqueeze(-1), gradient, 0.0),
            cross_entropy_scale,
            rows,
            options,
            out,
        )
    parts: tuple[Tensor | None, ...] = (None, None, None)
    if wants_parts:
        entropy = torch.where(counted, _entropy(events, temperature), 0.0)
        parts = (distillation, cross_entropy, entropy)
    total = loss.sum() * scale
    return Result(loss, total, gradient, None, *parts)


def _row_weights(
    events: Events, rows: Rows, options: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (weights, NaN in an invalid row; whether a row is counted; whether it is counted and invalid), [...]."""
    labels = rows.labels
    weight = torch.ones_like(events.tail) if rows.weight is None else rows.weight.to(dtype)
    if labels is not None:
        weight = torch.where(labels == options.ignore_index, 0.0, weight)
    counted = weight != 0
    valid = events.valid
    if labels is not None and options.alpha < 1.0:
        valid = valid & (labels >= 0) & (labels < options.vocabulary)
    for temperatures in (rows.temperature, rows.teacher_temperature):
        if temperatures is not None:
            valid = valid & (temperatures > 0)
    invalid = counted & ~valid
    return torch.where(invalid, torch.nan, weight), counted, invalid


def _cross_entropy(events: Events, options: Options) -> Tensor:
    """The label-smoothed cross-entropy of each row at temperature 1."""
    assert events.log_sum is not None and events.label is not None
    value = events.log_sum - events.label
    if events.mean is None:
        return value
    smoothing = options.label_smoothing
    return (1.0 - smoothing) * value + smoothing * (events.log_sum - events.mean)


def _truncated_loss(
    events: Events,
    logprobs: Tensor,
    weight: Tensor,
    counted: Tensor,
    scale: float | Tensor,
    options: Options,
    temperature: float | Tensor,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (loss, distillation, gradient [..., K + 1] or None) of the events under the policy "truncate"."""
    value, gradient = _truncated(events, logprobs, options, temperature)
    t_squared = temperature * temperature if options.scale_by_temperature else 1.0
    distillation = torch.where(counted, t_squared * value, 0.0)
    loss = options.alpha * torch.where(counted, weight * distillation, 0.0)
    if not wants_gradient:
        return loss, distillation, None
    factor = options.alpha * t_squared / temperature * weight * scale
    return loss, distillation, factor.unsqueeze(-1) * gradient


def _dense(
    kernels: Any,
    events: Events,
    logprobs: Tensor,
    rows: Rows,
    options: Options,
    want: Want,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (loss, distillation, gradient [..., K + 1]) of the events, by the backend's dense loss."""
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
    """Return (sum of phi over the tokens [...], its gradient by the events' tempered logits [..., K + 1])."""
    z = torch.cat([events.tokens, events.tail.unsqueeze(-1)], -1) / _column(temperature)
    log_q = z.to(logprobs.dtype).log_softmax(-1)
    q = log_q.exp()
    phi, g, _ = evaluate(options.divergence, logprobs, log_q[..., :-1])
    total = g.sum(-1, keepdim=True)
    return phi.sum(-1), torch.nn.functional.pad(g, (0, 1)) - q * total


def _column(value: float | Tensor) -> float | Tensor:
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value


def _entropy(events: Events, temperature: float | Tensor) -> Tensor:
    """Entropy of the student over the whole vocabulary: of the events, plus the tail's times its probability."""
    z = torch.cat([events.tokens, events.tail.unsqueeze(-1)], -1) / _column(temperature)
    log_q = z.log_softmax(-1)
    q = log_q.exp()
    assert events.tail_entropy is not None
    of_events = -torch.where(q == 0, 0.0, q * log_q).sum(-1)
    return of_events + q[..., -1] * events.tail_entropy


# What processes that share the vocabulary exchange


class _Exchanged(NamedTuple):
    """The fields of Events that processes gather, [rows] each; the logits of the tokens are summed separately.

    Origins are in units of z, because a process without a column does not know the unit of its backend.
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
    """Events for a rank that owns no vocabulary columns."""
    assert rows.ids is not None
    lead, device = rows.ids.shape[:-1], rows.ids.device

    def full(value: float, wanted: bool = True, *columns: int) -> Any:
        if not wanted:
            return None
        return torch.full((*lead, *columns), value, dtype=dtype, device=device)

    has_cross_entropy = rows.labels is not None and options.alpha < 1.0
    return Events(
        origin=full(-torch.inf),
        tail_origin=full(-torch.inf),
        tokens=full(-torch.inf, True, rows.ids.shape[-1]),
        tail=full(-torch.inf),
        tail_log_sum=full(-torch.inf),
        tail_entropy=full(0.0, parts),
        log_sum=full(-torch.inf, has_cross_entropy),
        label=full(-torch.inf, has_cross_entropy),
        mean=full(0.0, has_cross_entropy and options.label_smoothing > 0),
        valid=full(1.0) > 0,
    )


def merged(statistics: Statistics, rows: Rows, options: Options) -> Events:
    """Merge the events of all processes into those of whole rows."""
    local: Events = statistics.kept
    assert rows.ids is not None and statistics.summed is not None
    lead, unit, dtype = rows.ids.shape[:-1], local.unit, statistics.summed.dtype
    gathered = statistics.gathered
    each = _Exchanged(*gathered.reshape(gathered.shape[0], *lead, -1).unbind(-1))
    temperature: float | Tensor = options.temperature
    if rows.temperature is not None:
        temperature = rows.temperature.to(torch.float64)
    origin, tail_origin = each.origin.amax(0), each.tail_origin.amax(0)
    shift = (finite_max(each.tail_origin) - finite_max(tail_origin)) / temperature
    tail_parts = each.tail_log_sum + shift
    tail_log_sum = tail_parts.logsumexp(0)
    share = (tail_parts - finite_max(tail_log_sum)).exp()
    tail_entropy = torch.where(share == 0, 0.0, share * (each.tail_entropy - share.log())).sum(0)
    # Values of the whole row are relative to the larger of both origins.
    shift = torch.maximum(each.origin, each.tail_origin)
    shift = finite_max(shift) - finite_max(torch.maximum(origin, tail_origin))
    mean = each.mean + shift * each.columns / options.vocabulary
    ids = rows.ids
    tokens = statistics.summed.reshape(ids.shape) - finite_max(origin).to(dtype).unsqueeze(-1)
    is_token = (ids >= 0) & (ids < options.vocabulary)
    tail = tail_origin - finite_max(origin) + temperature * tail_log_sum

    def if_local(value: Tensor, local: Tensor | None) -> Tensor | None:
        return None if local is None else value.to(dtype)

    return local._replace(
        origin=(origin / unit).to(dtype),
        tail_origin=(tail_origin / unit).to(dtype),
        tokens=tokens.masked_fill(~is_token, -torch.inf),
        tail=tail.to(dtype),
        tail_log_sum=tail_log_sum.to(dtype),
        tail_entropy=if_local(tail_entropy, local.tail_entropy),
        log_sum=if_local((each.log_sum + shift).logsumexp(0), local.log_sum),
        label=if_local((each.label + shift).amax(0), local.label),
        mean=if_local(mean.sum(0), local.mean),
        valid=(each.valid != 0).all(0) & ((ids == -1) | is_token).all(-1),
    )
