"""The measures of rows (fastkd.call.measures.MEASURES), which a call returns on request beside its loss.

A backend's kd_rows may compute them from the sweeps of the loss (MEASURES in its module). Every other backend has
plain torch operations: :func:`measure_rows` for dense rows, and for a sparse teacher a comparison of the K + 1 events
of fastkd/backends/sparse.py. fastkd/engine/backend.py puts these together:

    MeasuredRows(kernels)        completes the measures of any backend: dropped rows, invalid rows, and the overlap
    WithMeasures(kernels, ...)   adds measures to a backend that computes none
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends import sparse
from fastkd.call.contract import (
    Options,
    Result,
    Rows,
    ShardCall,
    Statistics,
    Want,
    kept_rows,
    row_dtype,
)
from fastkd.call.measures import DENSE_MEASURES, MEASURES, sum_dtype, sums
from fastkd.call.rows import Chunks, put, rows_at, take
from fastkd.core.pieces import piece_rows
from fastkd.core.tensors import finite_max
from fastkd.divergences import forward_kl

ACCEPTANCE, AGREEMENT = MEASURES.index("acceptance"), MEASURES.index("agreement")
OVERLAP = MEASURES.index("overlap")


class _Side(NamedTuple):
    """One model's logits z of some columns, scaled and soft-capped."""

    centred: Tensor  # [..., V]: (z - max) / T, where max is that of these columns
    max: Tensor  # [..., 1]: 0 in place of -inf
    argmax: Tensor  # [..., 1]
    temperature: float | Tensor

    def log_sum(self) -> Tensor:
        """The logarithm of the sum of exponentials, relative to max; [..., 1]."""
        return self.centred.exp().sum(-1, keepdim=True, dtype=sum_dtype(self.centred)).log()

    def log_probabilities(self, maximum: Tensor, log_sum: Tensor) -> Tensor:
        """The logarithms of the probabilities, from the maximum and the log-sum of the whole row."""
        dtype = self.centred.dtype
        shift = ((self.max.to(maximum.dtype) - maximum) / self.temperature).to(dtype)
        return (self.centred + shift) - log_sum.to(dtype)


def _side(
    logits: Tensor,
    dtype: torch.dtype,
    logit_scale: float,
    softcap: float,
    temperature: float,
    row_temperatures: Tensor | None,
) -> _Side:
    z = logits.to(dtype)
    if softcap:
        z = softcap * torch.tanh(z * (logit_scale / softcap))
    elif logit_scale != 1:
        z = z * logit_scale
    divisor: float | Tensor = temperature
    if row_temperatures is not None:
        divisor = row_temperatures.to(dtype).unsqueeze(-1)
    if not z.shape[-1]:
        nothing = z.sum(-1, keepdim=True)
        return _Side(z, nothing, nothing.to(torch.int64), divisor)
    maximum, argmax = z.max(-1, keepdim=True)
    maximum = finite_max(maximum)
    return _Side((z - maximum) / divisor, maximum, argmax, divisor)


def _sides(student: Tensor, teacher: Tensor, rows: Rows, options: Options) -> tuple[_Side, _Side]:
    dtype = row_dtype(student.dtype, teacher.dtype)
    columns = options.vocab_size
    return (
        _side(
            student[..., :columns], dtype, options.logit_scale, options.softcap,
            options.temperature, rows.temperature,
        ),
        _side(
            teacher[..., :columns], dtype, options.teacher_logit_scale, options.teacher_softcap,
            options.teacher_temperature, rows.teacher_temperature,
        ),
    )  # fmt: skip


# ---- dense rows


@torch.no_grad()
def measure_rows(student: Tensor, teacher: Tensor, rows: Rows, options: Options) -> Tensor:
    """The measures of dense rows, [..., len(DENSE_MEASURES)]; dropped rows have 0 on a CPU, any number on a GPU."""
    lead, device = student.shape[:-1], student.device
    dtype = row_dtype(student.dtype, teacher.dtype)
    measures = torch.zeros((*lead, len(DENSE_MEASURES)), dtype=dtype, device=device)
    size = piece_rows(options.vocab_size, dtype, device.type)
    # On other devices, the host would have to wait for the number of dropped rows.
    drops = device.type == "cpu"
    for indices in Chunks.of(rows, lead, options.ignore_index, size, drops=drops):
        piece = [take(logits, lead, indices) for logits in (student, teacher)]
        s, t = _sides(piece[0], piece[1], rows_at(rows, lead, indices), options)
        log_q = s.log_probabilities(s.max, s.log_sum())
        log_p = t.log_probabilities(t.max, t.log_sum())
        values = torch.cat([sums(log_p, log_q), s.argmax == t.argmax], -1)
        put(measures, lead, indices, values.to(dtype))
    return measures


def sweeps_have_measures(options: Options) -> bool:
    """Whether the sweeps of a dense row's loss compute both softmaxes over all columns."""
    divergence = options.divergence
    return divergence.normalized and divergence.target is None


class DenseMeasures:
    """The measures of dense rows, in plain torch operations."""

    def measure_rows(
        self, student: Tensor, teacher: Tensor, rows: Rows, options: Options
    ) -> Tensor:
        """The measures, [..., len(DENSE_MEASURES)]."""
        return measure_rows(student, teacher, rows, options)

    # The steps where several processes share the vocabulary: fastkd/call/contract.py.

    @torch.no_grad()
    def shard_statistics(self, call: ShardCall) -> Statistics:
        """The maximum, its column and the log-sum of both sides: 6 numbers per row in float64."""
        sides = _sides(call.student, call.teacher, call.rows, call.options)
        numbers = []
        for side in sides:
            maximum, log_sum = side.max, side.log_sum()
            if not side.centred.shape[-1]:
                maximum = torch.full_like(maximum, -torch.inf)
            numbers += [maximum, side.argmax + call.options.first_column, log_sum]
        gathered = torch.cat([value.to(torch.float64) for value in numbers], -1)
        return Statistics(gathered.flatten(0, -2), kept=[side.temperature for side in sides])

    @torch.no_grad()
    def shard_sums(self, call: ShardCall) -> Tensor:
        """The sums over this process's columns: 4 numbers per row in float64."""
        s, t = _sides(call.student, call.teacher, call.rows, call.options)
        student, teacher = _merged(call)
        log_q = s.log_probabilities(student.max, student.log_sum)
        log_p = t.log_probabilities(teacher.max, teacher.log_sum)
        return sums(log_p, log_q).to(torch.float64).flatten(0, -2)

    @torch.no_grad()
    def shard_results(self, call: ShardCall) -> None:
        """Write the measures, given the statistics and the sums of all processes."""
        assert call.result.measures is not None and call.sums is not None
        student, teacher = _merged(call)
        numbers = call.sums.sum(0).reshape(*call.student.shape[:-1], -1)
        agreement = student.argmax == teacher.argmax
        call.result.measures.copy_(torch.cat([numbers, agreement], -1))


class SimplerLoss(DenseMeasures):
    """The measures of dense rows, computed with a second loss if the sweeps of the requested loss cannot yield them."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def measure_rows(
        self, student: Tensor, teacher: Tensor, rows: Rows, options: Options
    ) -> Tensor:
        """The measures, [..., len(DENSE_MEASURES)]; dropped rows have arbitrary numbers."""
        options = options._replace(divergence=forward_kl(), alpha=1.0, label_smoothing=0.0)
        want = Want(measures=True)
        measures: Tensor = self.kernels.kd_rows(student, teacher, rows, options, want).measures
        return measures


class _Merged(NamedTuple):
    """The statistics of one side over the columns of all processes; [..., 1] in float64."""

    max: Tensor
    argmax: Tensor
    log_sum: Tensor


def _merged(call: ShardCall) -> tuple[_Merged, _Merged]:
    """The statistics of the student's and the teacher's rows, given those of all processes."""
    gathered, _, temperatures = call.known()
    each = gathered.reshape(gathered.shape[0], *call.student.shape[:-1], 2, 3)
    student, teacher = (_merge(each[..., i, :], temperatures[i]) for i in range(2))
    return student, teacher


def _merge(each: Tensor, temperature: float | Tensor) -> _Merged:
    """Merge the statistics [processes, ..., 3] of all processes."""
    maxima, columns, log_sums = each.split(1, -1)
    maximum, process = maxima.max(
        0, keepdim=True
    )  # of equal maxima, the first column is that of the first process
    log_sum = (log_sums + (maxima - maximum) / temperature).logsumexp(0)
    return _Merged(maximum.squeeze(0), columns.gather(0, process).squeeze(0), log_sum)


# ---- sparse teachers


class SparseMeasures:
    """The measures of sparse teachers, from events that plain torch operations gather."""

    def __init__(self) -> None:
        from fastkd.backends import portable

        self.rows = sparse.SparseRows(portable)

    @torch.no_grad()
    def measure_rows(
        self, student: Tensor, logprobs: Tensor, rows: Rows, options: Options
    ) -> Tensor:
        """The measures, [..., len(MEASURES)]."""
        events = self.rows.kernels.gather_events(student, rows, options, False)
        return sparse.event_measures(events, logprobs, rows, options)

    @torch.no_grad()
    def shard_statistics(self, call: ShardCall) -> Statistics:
        """The events of this process's columns, without those of the cross-entropy."""
        return self.rows.shard_statistics(_measuring(call))

    def shard_sums(self, call: ShardCall) -> None:
        """Return None: the events of all processes are enough."""

    @torch.no_grad()
    def shard_results(self, call: ShardCall) -> None:
        """Write the measures, given the events of all processes."""
        call = _measuring(call)
        assert call.result.measures is not None
        events = sparse.merged(call.known(), call.rows, call.options)
        measures = sparse.event_measures(events, call.teacher, call.rows, call.options)
        call.result.measures.copy_(measures)


def _measuring(call: ShardCall) -> ShardCall:
    """The call without a cross-entropy and without parts, which the measures do not need."""
    return call._replace(
        options=call.options._replace(alpha=1.0),
        result=call.result._replace(distillation=None, cross_entropy=None, student_entropy=None),
    )


# ---- backends with measures


class WithMeasures:
    """A backend that computes the measures besides what its kernels compute, in launches of their own."""

    def __init__(self, kernels: Any, measuring: DenseMeasures | SparseMeasures) -> None:
        self.kernels, self.measuring = kernels, measuring
        self.scale_rows_, self.empty = kernels.scale_rows_, kernels.empty

    def kd_rows(
        self, student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want
    ) -> Result:
        """Compute the measures first, because an in-place gradient overwrites the logits."""
        measures = None
        if want.measures:
            measures = self.measuring.measure_rows(student, teacher, rows, options)
            want = want._replace(measures=False, overlap=False)
        if options.tail == "truncate":
            rows = rows._replace(tail_logprob=None)  # only the measures use the tail
        return self.kernels.kd_rows(student, teacher, rows, options, want)._replace(
            measures=measures
        )

    # The steps where several processes share the vocabulary. Both computations exchange their numbers together.

    def shard_statistics(self, call: ShardCall) -> Statistics:
        """The statistics of the loss, followed by those of the measures."""
        loss = self.kernels.shard_statistics(_without_measures(call))
        measures = self.measuring.shard_statistics(call)
        summed = None
        if loss.summed is not None and measures.summed is not None:
            summed = torch.cat([loss.summed, measures.summed.to(loss.summed.dtype)], -1)
        gathered = torch.cat([loss.gathered.to(torch.float64), measures.gathered], -1)
        return Statistics(gathered, summed, _Kept(loss, measures))

    def shard_sums(self, call: ShardCall) -> Tensor | None:
        """The sums of the loss, followed by those of the measures."""
        of_loss, of_measures = self._calls(call)
        loss = self.kernels.shard_sums(of_loss)
        measures = self.measuring.shard_sums(of_measures)
        if loss is None or measures is None:
            return measures if loss is None else loss
        return torch.cat([loss.to(torch.float64), measures], -1)

    def shard_results(self, call: ShardCall) -> None:
        """Write the measures first, because an in-place gradient overwrites the logits."""
        of_loss, of_measures = self._calls(call)
        self.measuring.shard_results(of_measures)
        self.kernels.shard_results(of_loss)

    def _calls(self, call: ShardCall) -> tuple[ShardCall, ShardCall]:
        """The calls of both computations, each with its own part of what was exchanged."""
        gathered, summed, kept = call.known()
        loss: Statistics = kept[0]
        width = loss.gathered.shape[-1]
        parts = [
            gathered[..., :width].to(loss.gathered.dtype).contiguous(),
            gathered[..., width:].contiguous(),
        ]
        tokens: list[Tensor | None] = [None, None]
        if summed is not None and loss.summed is not None:
            count = loss.summed.shape[-1]
            tokens = [summed[..., :count].contiguous(), summed[..., count:].contiguous()]
        sums: list[Tensor | None] = [None, None]
        if call.sums is not None:
            # Dense measures have the last 4 numbers. Sparse ones have none, and neither has their loss.
            width = call.sums.shape[-1] - 4
            dtype = loss.gathered.dtype
            sums = [call.sums[..., :width].to(dtype).contiguous() if width else None]
            sums.append(call.sums[..., width:].contiguous())
        of_loss, of_measures = (
            call._replace(statistics=Statistics(part, token, own.kept), sums=own_sums)
            for part, token, own, own_sums in zip(parts, tokens, kept, sums, strict=True)
        )
        return _without_measures(of_loss), of_measures


class _Kept(NamedTuple):
    loss: Statistics
    measures: Statistics


def _without_measures(call: ShardCall) -> ShardCall:
    rows = call.rows
    if call.options.tail == "truncate":
        rows = rows._replace(tail_logprob=None)
    return call._replace(rows=rows, result=call.result._replace(measures=None))


class MeasuredRows:
    """A backend whose measures are complete: it adds the overlap, and the values of dropped and invalid rows."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels
        self.scale_rows_, self.empty = kernels.scale_rows_, kernels.empty

    @torch.no_grad()
    def kd_rows(
        self, student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want
    ) -> Result:
        """Compute the loss of each row; :class:`fastkd.call.contract.Result` has shapes and meaning."""
        overlap = _overlap(student, rows, options) if want.overlap else None
        result = self.kernels.kd_rows(student, teacher, rows, options, want)
        measures = result.measures
        if measures is None:
            return result
        if overlap is not None:
            measures[..., OVERLAP] = overlap
        # NaN among the logits hides in a comparison, but not in the acceptance.
        invalid = result.loss.isnan() | measures[..., ACCEPTANCE].isnan()
        measures = measures.masked_fill(invalid.unsqueeze(-1), torch.nan)
        kept = kept_rows(rows, options.ignore_index)
        if kept is not None:
            measures = torch.where(kept.unsqueeze(-1), measures, 0.0)
        return result._replace(measures=measures)


def _overlap(student: Tensor, rows: Rows, options: Options) -> Tensor:
    """How many of a row's n listed tokens are among the student's n most probable tokens."""
    assert rows.ids is not None and options.shard is None
    is_listed = (rows.ids >= 0) & (rows.ids < options.vocab_size)
    logits = student[..., : options.vocab_size]
    if options.logit_scale < 0:
        logits = -logits
    count = min(rows.ids.shape[-1], options.vocab_size)
    top = logits.topk(count, -1).values
    last = (is_listed.sum(-1, keepdim=True) - 1).clamp(0, count - 1)
    listed = logits.gather(-1, rows.ids.where(is_listed, 0))
    return ((listed >= top.gather(-1, last)) & is_listed).sum(-1)
