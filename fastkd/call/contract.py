"""The contract of a backend: it computes the loss of each row and, in the same launch, its gradient.

A row is one position, with V student logits and V teacher logits. A backend is a module with these functions:

    kd_rows(student, teacher, rows, options, want) -> Result
    scale_rows_(gradient, upstream) -> None
    empty(shape, dtype, device) -> Tensor

A backend whose kd_rows supports sparse teachers (Options.tail) sets SPARSE = True; every other backend has the two
steps of :mod:`fastkd.backends.sparse`. A backend may also have mutual_rows (:mod:`fastkd.call.mutual`), angles
(:mod:`fastkd.backends.angles`) and draft_rows (:mod:`fastkd.call.draft`). A backend whose kd_rows computes the measures
(:mod:`fastkd.backends.measures`) names the teachers with which it does, "dense", "sparse" or both, in a tuple MEASURES.
It may leave out those of dense teachers where :func:`fastkd.backends.measures.sweeps_have_measures` is false, and where
several processes share the vocabulary.

If several processes share the vocabulary (Options.shard), each has some columns of every row. A backend then works in
steps, between which the processes exchange a few numbers per row (:mod:`fastkd.parallel`):

    shard_statistics(call) -> Statistics
    shard_sums(call) -> Tensor | None
    shard_results(call) -> None

call is a ShardCall. call.result is the memory of the wanted outputs; the last step fills all of it except the total.
What a step returns on each process, [...], is gathered for the next step, [processes, ...].

:mod:`fastkd.functional` validates the arguments. :mod:`fastkd.engine.autograd` selects the backend, and differentiates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.call.options import Options as Options
from fastkd.call.options import Shard as Shard


class Rows(NamedTuple):
    """Tensors with one value per row, contiguous and of the logits' leading shape [...] unless a field says otherwise.

    A field is None if the call has no such tensor.
    """

    # int64.
    labels: Tensor | None = None
    # float32, or float64 for float64 logits. Rows of weight 0 are dropped: their logits are not read.
    weight: Tensor | None = None
    # float32.
    temperature: Tensor | None = None
    # float32.
    teacher_temperature: Tensor | None = None
    # 0-dim float32: a factor like Options.scale, if only the device knows it.
    scale: Tensor | None = None
    # int64 [..., K]: the tokens of a sparse teacher; -1 is padding.
    ids: Tensor | None = None
    # As weight: log of the probability that a sparse teacher leaves to all other tokens. None: it leaves them none.
    tail_logprob: Tensor | None = None


def kept_rows(rows: Rows, ignore_index: int) -> Tensor | None:
    """A bool tensor [...], False for dropped rows; None if no row can be dropped."""
    kept = None if rows.labels is None else rows.labels != ignore_index
    if rows.weight is not None:
        kept = rows.weight != 0 if kept is None else kept & (rows.weight != 0)
    return kept


def row_dtype(*logits: torch.dtype) -> torch.dtype:
    """The dtype of losses, given the dtypes of the logits: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in logits else torch.float32


def widened(values: Tensor) -> Tensor:
    """The values in the dtype of losses: a copy if they have another dtype."""
    return values.to(row_dtype(values.dtype))


def factor_of(rows: Rows, options: Options) -> float | Tensor:
    """The factor of the total and of every gradient: a number, or a 0-dim tensor if only the device knows it."""
    return options.scale if rows.scale is None else options.scale * rows.scale


def total_of(loss: Tensor, rows: Rows, options: Options) -> Tensor:
    """The sum of the losses of all rows, times :func:`factor_of`; 0-dim."""
    return (loss.sum(dtype=torch.float64) * factor_of(rows, options)).to(loss.dtype)


class Want(NamedTuple):
    """Which outputs a call needs."""

    student_gradient: bool = False
    teacher_gradient: bool = False
    parts: bool = False
    inplace: bool = False  # the student's gradient overwrites the student's logits
    # A second call, in the backward pass, computes the gradients (fastkd.engine.gradients).
    deferred: bool = False
    measures: bool = False
    overlap: bool = False  # whether the measures include the overlap, which takes a pass of its own


class Result(NamedTuple):
    """Results of each row, in the logits' leading shape; float32, or float64 for float64 logits.

    The loss of a row is weight * (alpha * distillation + (1 - alpha) * cross_entropy), or 0 if the row is dropped.
    The gradients are those of scale * loss, in the dtype and shape of the logits.
    """

    loss: Tensor
    total: Tensor  # 0-dim: scale times the sum of loss, added in a fixed order
    student_gradient: Tensor | None = None
    teacher_gradient: Tensor | None = None
    distillation: Tensor | None = None
    cross_entropy: Tensor | None = None
    student_entropy: Tensor | None = None
    # [..., measure_count(tail)]: MEASURES, in this order.
    measures: Tensor | None = None

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of total with respect to the student's and the teacher's logits."""
        return self.student_gradient, self.teacher_gradient

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """What a call returns besides the loss: the terms of fastkd.functional.Parts, and the measures."""
        return self.distillation, self.cross_entropy, self.student_entropy, self.measures


class Statistics(NamedTuple):
    """What the first step of a backend finds out about the rows, before and after the processes exchange it."""

    # Numbers that the backend defines and merges: [rows, fields] before the exchange, [processes, rows, fields] after.
    gathered: Tensor
    # float32 [rows, K], with a sparse teacher: the student's logits of its tokens. Before the exchange, tokens of other
    # processes have 0; the exchange sums over processes.
    summed: Tensor | None = None
    # Whatever the backend needs in later steps; not exchanged.
    kept: Any = None


class ShardCall(NamedTuple):
    """A call of which this process has some columns, and what the steps so far have found out about all columns."""

    student: Tensor
    teacher: Tensor
    rows: Rows
    options: Options
    result: Result
    # What the first step found, gathered from all processes; None in the first step.
    statistics: Statistics | None = None
    # What the second step found, gathered from all processes; None before, or if the statistics are sufficient.
    sums: Tensor | None = None

    def known(self) -> Statistics:
        """The statistics, which every step after the first has."""
        assert self.statistics is not None
        return self.statistics
