"""The denominator of a batch whose rows are spread over processes and micro-batches."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.call.checks import check_flags, check_mask
from fastkd.core.scalars import check_int
from fastkd.parallel.collectives import all_reduce


def num_items(
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    averaged: bool = True,
) -> Tensor:
    """Count the rows of a batch on all processes, as num_items of a loss whose gradients are averaged.

        num_items = sum over processes of #(labels != ignore_index and mask) / processes

    DDP and FSDP divide the sum of the processes' gradients by the number of processes. With this denominator, the
    result is the gradient of the mean over all counted rows, for any number of processes. It is also that for any
    number of micro-batches, if labels are those of the whole step, or if you add the results of several calls.

    Args:
        labels: [...] int64, the labels of this process; None: the mask alone says what is counted.
        mask: [...] bool, the mask of this process. Required without labels.
        ignore_index: as in :func:`fastkd.kd_loss`.
        group: the processes that have different rows (data and context parallel); None: all.
        averaged: whether gradients are averaged over the group; False: they are summed.

    Returns:
        A 0-dim float64 tensor on the device of labels or mask.
    """
    check_flags(averaged=averaged)
    ignore_index = check_int("ignore_index", ignore_index)
    if labels is None:
        if mask is None:
            raise ValueError("labels or mask must be given; both are None")
        check_mask(mask, "mask", mask)
        counted = mask
    else:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            raise TypeError(
                f"labels must be an int64 tensor, got {getattr(labels, 'dtype', type(labels).__name__)}"
            )
        counted = labels != ignore_index
        if mask is not None:
            check_mask(mask, "labels", labels)
            counted = counted & mask
    count = counted.sum(dtype=torch.float64)
    if not dist.is_initialized():
        return count
    group = group or dist.group.WORLD
    assert group is not None
    all_reduce(count, group, "the number of counted rows").wait()
    return count / dist.get_world_size(group) if averaged else count
