"""Rows whose columns are spread over processes: a backend's steps, and what passes between them.

    shard_statistics    one sweep over this process's columns
      all-gather        of the statistics, and an all-reduce of the K logits of a sparse teacher's tokens
    shard_sums          a second sweep, for divergences without a closed form
      all-gather        of the sums of phi and g
    shard_results       the loss, which is the same bits on every process, and the gradient of this process's columns

Nothing that crosses has the size of the vocabulary. A large call goes in two halves of its rows: the numbers of the
first travel while the second is swept.
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
from fastkd.parallel.collectives import Pending, all_gather, all_reduce

# Of one side of a half, at least: some hundred microseconds of a device's memory, or ten milliseconds of a CPU's.
HALF_BYTES = 32 << 20


class _Half:
    """Some rows of a call, and how far they are."""

    def __init__(self, kernels: ModuleType, call: ShardCall, shard: Shard) -> None:
        self.kernels, self.call, self.shard = kernels, call, shard

    def start(self) -> None:
        """Sweep for the statistics, and send them."""
        group = self.shard.group
        self.mine: Statistics = self.kernels.shard_statistics(self.call)
        self.gathered = all_gather(self.mine.gathered, group, "the statistics of rows")
        tokens = self.mine.summed
        self.summed = tokens if tokens is None else all_reduce(tokens, group, "the tokens' logits")

    def go_on(self) -> None:
        """Sweep for the sums, where they are needed, and send them."""
        statistics = Statistics(
            self.gathered.wait(),
            None if self.summed is None else self.summed.wait(),
            self.mine.kept,
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
    """A backend for rows that processes share; as a backend's module is (fastkd/call/contract.py)."""

    def __init__(self, kernels: ModuleType, shard: Shard) -> None:
        self.kernels, self.shard = kernels, shard
        self.scale_rows_, self.empty = kernels.scale_rows_, kernels.empty

    def kd_rows(
        self, student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want
    ) -> Result:
        """The loss of each row, and the gradients of this process's columns."""
        dtype = row_dtype(student.dtype, teacher.dtype)
        result = native.outputs(student, teacher, want, self.kernels.empty, dtype)
        lead = student.shape[:-1]
        halves = []
        for part in self._parts(lead, student.dtype):
            few = Rows(
                *(
                    value if value is None or name == "scale" else value[part].contiguous()
                    for name, value in rows._asdict().items()
                )
            )
            # What is one number a row has to be contiguous for a backend, and is copied from there.
            own = _of_part(result, part)
            call = ShardCall(student[part], teacher[part], few, options, own)
            halves.append((part, own, _Half(self.kernels, call, self.shard)))
        if lead.numel():
            for _, _, half in halves:
                half.start()
            for _, _, half in halves:
                half.go_on()
            for part, own, half in halves:
                half.finish()
                for name in _PER_ROW:
                    if getattr(result, name) is not None:
                        getattr(result, name)[part].copy_(getattr(own, name))
        return result._replace(total=total_of(result.loss, rows, options))

    def _parts(self, lead: torch.Size, dtype: torch.dtype) -> list[tuple[slice, ...]]:
        """How to index the halves; the same on every process."""
        axis = max(range(len(lead)), key=lambda axis: lead[axis], default=0)
        few = lead.numel() < 2 or lead[axis] < 2
        if few or lead.numel() * self.shard.widest * dtype.itemsize < 2 * HALF_BYTES:
            return [()]
        middle = lead[axis] // 2
        before = (slice(None),) * axis
        return [(*before, slice(middle)), (*before, slice(middle, None))]


_PER_ROW = ("loss", "distillation", "cross_entropy", "student_entropy")


def _of_part(result: Result, part: tuple[slice, ...]) -> Result:
    """Views of the gradients, and memory for the rows' numbers."""
    changed = {}
    for name, value in result._asdict().items():
        if value is not None and name != "total":
            view = value[part]
            form = torch.contiguous_format
            changed[name] = torch.empty_like(view, memory_format=form) if name in _PER_ROW else view
    return result._replace(**changed)


def log_sum_exp(of_columns: Tensor, shard: Shard) -> Tensor:
    """[..., 1] over all columns, from that over this process's."""
    return all_gather(of_columns, shard.group, "the normalisers of a teacher").wait().logsumexp(0)
