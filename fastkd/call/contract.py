"""What every backend computes: the loss of each row, and its gradient in the same launch.

A row is one position: V student logits and V teacher logits. A backend is a module with

    kd_rows(student, teacher, rows, options, want) -> Result
    scale_rows_(gradient, upstream) -> None
    empty(shape, dtype, device) -> Tensor

A backend whose kd_rows takes sparse teachers (Options.tail) says SPARSE = True; any other has the two steps of
:mod:`fastkd.backends.sparse`. It may have mutual_rows (:mod:`fastkd.call.mutual`) and angles
(:mod:`fastkd.backends.angles`).

Where several processes share the vocabulary (Options.shard), each has some columns of every row. A backend then does
the same work in steps, between which they exchange a few numbers a row (:mod:`fastkd.parallel`):

    shard_statistics(call) -> Statistics
    shard_sums(call) -> Tensor | None
    shard_results(call) -> None

call is a ShardCall. Its result is the memory of everything that is wanted; the last step fills all of it but the total.
Between two steps every process gets what each of them has returned, [..] before and [processes, ..] after.

:mod:`fastkd.functional` validates and :mod:`fastkd.engine.autograd` chooses the backend and differentiates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.call.options import Options as Options
from fastkd.call.options import Shard as Shard


class Rows(NamedTuple):
    """Tensors with one value a row (but for ids), in the logits' leading shape [...], contiguous; None: not given."""

    labels: Tensor | None = None  # int64
    weight: Tensor | None = (
        None  # float32 (float64 for float64 logits); a row of weight 0 is not read
    )
    temperature: Tensor | None = None  # float32
    teacher_temperature: Tensor | None = None  # float32
    scale: Tensor | None = None  # float32, 0-dim: another such factor, which only the device knows
    ids: Tensor | None = None  # int64 [..., K], of a sparse teacher; -1 is padding
    tail_logprob: Tensor | None = (
        None  # as weight: log of what a sparse teacher leaves to the other tokens; None: nothing
    )


def counted_rows(rows: Rows, ignore_index: int) -> Tensor | None:
    """Which rows are not dropped, bool [...]; None where all count."""
    kept = None if rows.labels is None else rows.labels != ignore_index
    if rows.weight is not None:
        kept = rows.weight != 0 if kept is None else kept & (rows.weight != 0)
    return kept


def row_dtype(*logits: torch.dtype) -> torch.dtype:
    """Of losses, from the dtypes of the logits: float32, or float64 where one of them is."""
    return torch.float64 if torch.float64 in logits else torch.float32


def widened(values: Tensor) -> Tensor:
    """In the dtype of losses; a copy where it is another."""
    return values.to(row_dtype(values.dtype))


def factor_of(rows: Rows, options: Options) -> float | Tensor:
    """What multiplies the total and every gradient: a number, or a 0-dim tensor if only the device knows it."""
    return options.scale if rows.scale is None else options.scale * rows.scale


def total_of(loss: Tensor, rows: Rows, options: Options) -> Tensor:
    """The sum of the losses of rows, times their factor: 0-dim."""
    return (loss.sum(dtype=torch.float64) * factor_of(rows, options)).to(loss.dtype)


class Want(NamedTuple):
    """Which outputs a call needs."""

    student_gradient: bool = False
    teacher_gradient: bool = False
    parts: bool = False
    inplace: bool = False  # the student's gradient overwrites the student's logits
    deferred: bool = False  # the gradients are computed by a second call, in the backward (fastkd.engine.autograd)


class Result(NamedTuple):
    """Per-row results in the logits' leading shape; float32, or float64 for float64 logits.

    The loss of a row is weight (alpha * distillation + (1 - alpha) * cross_entropy); 0 in a row that is dropped.
    Gradients are of that loss times scale, in the dtype and shape of the logits.
    """

    loss: Tensor
    total: Tensor  # 0-dim, scale times the sum of loss, in a fixed order
    student_gradient: Tensor | None = None
    teacher_gradient: Tensor | None = None
    distillation: Tensor | None = None
    cross_entropy: Tensor | None = None
    student_entropy: Tensor | None = None

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of total: the student's, the teacher's."""
        return self.student_gradient, self.teacher_gradient

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """The terms of the loss that fastkd.functional.Parts has."""
        return self.distillation, self.cross_entropy, self.student_entropy


class Statistics(NamedTuple):
    """What is known of the rows after the first step: of this process's columns, or, once exchanged, of all."""

    gathered: Tensor  # [rows, fields], or [processes, rows, fields]: the backend's own numbers; it merges them
    summed: Tensor | None = (
        None  # float32 [rows, K], of a sparse teacher: logits, 0 where another process has them
    )
    kept: Any = None  # not exchanged: what the backend wants to find again in later steps


class ShardCall(NamedTuple):
    """A call of which this process has some columns, and what all processes know of its rows so far."""

    student: Tensor
    teacher: Tensor
    rows: Rows
    options: Options
    result: Result
    statistics: Statistics | None = None  # of all processes, after the first step
    sums: Tensor | None = (
        None  # of all processes, after the second; None where the statistics are enough
    )

    def known(self) -> Statistics:
        """The statistics, in a step after the first."""
        assert self.statistics is not None
        return self.statistics
