"""A backend that splits every call into shards of the vocabulary within one process.

It stacks what processes would exchange. So every test of a backend can also test its steps for shards.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.backends import native
from fastkd.call import memo
from fastkd.call.contract import Options, Result, Rows, Shard, ShardCall, Statistics, Want
from fastkd.call.measures import measure_count
from fastkd.engine.backend import for_teacher, with_measures


class Cut(NamedTuple):
    """The columns of one shard."""

    first: int
    # Columns in memory, padding included.
    width: int
    # Columns that count.
    columns: int


def cuts(width: int, vocabulary: int, shares: tuple[float, ...]) -> list[Cut]:
    """Split the columns into shards, one per share; the last gets the remaining columns."""
    results, first = [], 0
    for index, share in enumerate(shares):
        last = index == len(shares) - 1
        size = width - first if last else min(int(share / sum(shares) * width), width - first)
        results.append(Cut(first, size, min(max(vocabulary - first, 0), size)))
        first += size
    return results


class InShards:
    """A backend's kernels over shards; it replaces the backend's module."""

    SPARSE = True
    MEASURES = ("dense", "sparse")

    def __init__(self, kernels: ModuleType, shares: tuple[float, ...]) -> None:
        self.kernels, self.shares = kernels, shares
        self.scale_rows_, self.empty = kernels.scale_rows_, kernels.empty
        self.calls = 0
        memo.forget()  # otherwise a repeated call would run on the backend that it ran on before

    def kd_rows(
        self, student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want
    ) -> Result:
        """Run the steps of the backend one after the other."""
        self.calls += 1
        result = native.outputs(student, teacher, want, measures=measure_count(options.tail))
        dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
        result = Result(
            *(
                value.to(dtype) if value is not None and index not in (2, 3) else value
                for index, value in enumerate(result)
            )
        )
        for value in result:
            if value is not None and not want.inplace:
                value.fill_(torch.nan)
        vocabulary = options.vocab_size
        shard_cuts = cuts(max(student.shape[-1], vocabulary), vocabulary, self.shares)
        widest = max(cut.width for cut in shard_cuts)
        calls: list[ShardCall] = []
        for rank, cut in enumerate(shard_cuts):
            shard = Shard(cut.first, vocabulary, widest, rank, None)
            here = options._replace(vocab_size=cut.columns, shard=shard)
            columns = slice(cut.first, cut.first + cut.width)
            t = teacher if rows.ids is not None else teacher[..., columns]

            def part(gradient: Tensor | None, columns: slice = columns) -> Tensor | None:
                return None if gradient is None else gradient[..., columns]

            def own(value: Tensor | None) -> Tensor | None:
                return None if value is None else value.clone()

            own_result = Result(
                result.loss.clone(),
                result.total,
                part(result.student_gradient),
                part(result.teacher_gradient),
                *map(own, result[4:]),
            )
            calls.append(ShardCall(student[..., columns], t, rows, here, own_result))
        kernels = for_teacher(self.kernels, options)
        if want.measures:
            kernels = with_measures(kernels, calls[0].options)
        each = [kernels.shard_statistics(shard) for shard in calls]
        gathered = torch.stack([one.gathered for one in each])
        summed = None if each[0].summed is None else torch.stack([x.summed for x in each]).sum(0)
        calls = [
            shard._replace(statistics=Statistics(gathered, summed, one.kept))
            for shard, one in zip(calls, each, strict=True)
        ]
        sums = [kernels.shard_sums(shard) for shard in calls]
        assert len({x is None for x in sums}) == 1
        total = None if sums[0] is None else torch.stack(sums)
        for shard in calls:
            kernels.shard_results(shard._replace(sums=total))
        first = calls[0].result
        for shard in calls:
            other = shard.result
            for value, other_value in zip(
                (first.loss, *first[4:]), (other.loss, *other[4:]), strict=True
            ):
                if value is not None:
                    assert torch.equal(value.nan_to_num(nan=7e7), other_value.nan_to_num(nan=7e7))
        scale = options.scale if rows.scale is None else options.scale * rows.scale
        total = first.loss.sum() * scale
        return result._replace(
            loss=first.loss,
            total=total,
            distillation=first.distillation,
            cross_entropy=first.cross_entropy,
            student_entropy=first.student_entropy,
            measures=first.measures,
        )
