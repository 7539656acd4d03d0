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

from fastkd.divergences import Divergence


class Shard(NamedTuple):
    """The columns that this process has of a vocabulary that several share."""

    first: int  # of all columns that count, the first that is here; Options.vocab_size says how many are
    total: int  # columns that count, of all processes together
    widest: int  # columns of the widest shard, padding included
    rank: int  # of this process in the group
    group: Any  # torch.distributed.ProcessGroup


class Options(NamedTuple):
    """What does not change from row to row; validated, hashable, free of tensors."""

    divergence: Divergence
    alpha: float = 1.0
    temperature: float = 1.0  # where Rows.temperature is None
    teacher_temperature: float = 1.0  # where Rows.teacher_temperature is None
    scale_by_temperature: bool = True
    label_smoothing: float = 0.0
    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none
    teacher_logit_scale: float = 1.0
    teacher_softcap: float = 0.0
    vocab_size: int = 0
    scale: float = 1.0  # multiplies the total and every gradient
    tail: str = ""  # of fastkd.TopK; then the teacher tensor holds log-probabilities and Rows.ids their tokens
    shard: Shard | None = None  # labels and Rows.ids name tokens of the whole vocabulary

    @property
    def vocabulary(self) -> int:
        """Columns that count, wherever they are."""
        return self.vocab_size if self.shard is None else self.shard.total

    @property
    def reads_labels(self) -> bool:
        """Whether labels do more than drop rows."""
        return self.alpha < 1.0 or self.divergence.target is not None

    @property
    def first_column(self) -> int:
        """The token of column 0."""
        return 0 if self.shard is None else self.shard.first


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
