"""Rows whose columns are spread over processes: the steps of a backend, and the collectives between them.

    shard_statistics    sweeps over this process's columns
      all-gather        of the statistics, and an all-reduce of the K logits of a sparse teacher's tokens
    shard_sums          sweeps a second time, for divergences without a closed form
      all-gather        of the sums of phi, g and h
    shard_results       writes the loss, with the same bits on every process, and the gradient of this process's columns

No message has the size of the vocabulary. A large call is split into two halves of its rows, so that the numbers of
the first half are sent while the second half is swept.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastkd.backends import native
from fastkd.call.contract import (
    Options,
    Result,
    Rows,
    Shard,
    ShardCall,
    Statistics,
    Want,
    row_dtype,
    total_of,
)
from fastkd.call.measures import measure_count
from fastkd.parallel.collectives import Pending, all_gather, all_reduce

# The smallest half, in bytes of one model's logits: to read them takes a device a few hundred microseconds, and a CPU
# ten milliseconds.
HALF_BYTES = 32 << 20


class _Half:
    """Some rows of a call, which the three steps process in turn."""

    def __init__(self, kernels: ModuleType, call: ShardCall, shard: Shard) -> None:
        self.kernels, self.call, self.shard = kernels, call, shard

    def start(self) -> None:
        """Compute the statistics, and start to exchange them."""
        group = self.shard.group
        self.local: Statistics = self.kernels.shard_statistics(self.call)
        self.gathered = all_gather(self.local.gathered, group, "the statistics of rows")
        tokens = self.local.summed
        self.summed = tokens if tokens is None else all_reduce(tokens, group, "the tokens' logits")

    def proceed(self) -> None:
        """Compute the sums, if they are needed, and start to exchange them."""
        statistics = Statistics(
            self.gathered.wait(),
            None if self.summed is None else self.summed.wait(),
            self.local.kept,
        )
        self.call = self.call._replace(statistics=statistics)
        sums = self.kernels.shard_sums(self.call)
        self.sums: Pending | None = None
        if sums is not None:
            self.sums = all_gather(sums, self.shard.group, "the sums over rows")

    def finish(self) -> None:
        """Write the results."""
        sums = None if self.sums is None else self.sums.wait()
        self.kernels.shard_results(self.call._replace(sums=sums))


class SharedRows:
    """A backend for rows whose columns several processes share; it replaces the backend's module."""

    def __init__(self, kernels: ModuleType, shard: Shard) -> None:
        self.kernels, self.shard = kernels, shard
        self.scale_rows_, self.empty = kernels.scale_rows_, kernels.empty

    def kd_rows(
        self, student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want
    ) -> Result:
        """Compute the loss of each row, and the gradients of this process's columns."""
        dtype = row_dtype(student.dtype, teacher.dtype)
        measures = measure_count(options.tail)
        result = native.outputs(student, teacher, want, self.kernels.empty, dtype, measures)
        lead = student.shape[:-1]
        halves = []
        for part in self._parts(lead, student.dtype):
            part_rows = Rows(
                *(
                    value if value is None or name == "scale" else value[part].contiguous()
                    for name, value in rows._asdict().items()
                )
            )
            # A backend needs contiguous memory for numbers per row, which are copied to the result at the end.
            part_result = _part_of(result, part)
            call = ShardCall(student[part], teacher[part], part_rows, options, part_result)
            halves.append((part, part_result, _Half(self.kernels, call, self.shard)))
        if lead.numel():
            for _, _, half in halves:
                half.start()
            for _, _, half in halves:
                half.proceed()
            for part, part_result, half in halves:
                half.finish()
                for name in _PER_ROW:
                    if getattr(result, name) is not None:
                        getattr(result, name)[part].copy_(getattr(part_result, name))
        return result._replace(total=total_of(result.loss, rows, options))

    def _parts(self, lead: torch.Size, dtype: torch.dtype) -> list[tuple[slice, ...]]:
        """The indices of the halves, the same on every process."""
        axis = max(range(len(lead)), key=lambda axis: lead[axis], default=0)
        single = lead.numel() < 2 or lead[axis] < 2
        if single or lead.numel() * self.shard.widest * dtype.itemsize < 2 * HALF_BYTES:
            return [()]
        middle = lead[axis] // 2
        before = (slice(None),) * axis
        return [(*before, slice(middle)), (*before, slice(middle, None))]


_PER_ROW = ("loss", "distillation", "cross_entropy", "student_entropy", "measures")


def _part_of(result: Result, part: tuple[slice, ...]) -> Result:
    """A result for some rows: views of the gradients, and fresh memory for the numbers per row."""
    changed = {}
    for name, value in result._asdict().items():
        if value is not None and name != "total":
            view = value[part]
            form = torch.contiguous_format
            changed[name] = torch.empty_like(view, memory_format=form) if name in _PER_ROW else view
    return result._replace(**changed)


def log_sum_exp(local: Tensor, shard: Shard) -> Tensor:
    """The log-sum-exp over all columns, [..., 1], from those over each process's columns."""
    return all_gather(local, shard.group, "the normalizers of a teacher").wait().logsumexp(0)
