"""The collectives that losses use, and errors that name them. All communication between processes is in this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.core.tensors import readable, writable


def _first_available(*names: str) -> Any:
    """A call of the first of these functions that torch.distributed has, looked up by name at each call."""

    def call(*arguments: Any, **options: Any) -> Any:
        return next(getattr(dist, name) for name in names if hasattr(dist, name))(
            *arguments, **options
        )

    return call


_all_gather = _first_available("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _first_available("reduce_scatter_single", "reduce_scatter_tensor")


class CollectiveError(RuntimeError):
    """A collective did not finish.

    Another process has stopped, is late by more than the group's timeout, or has made a different call.

    Attributes:
        collective: the collective, in words.
        rank: the rank of this process in the group.
    """

    def __init__(self, collective: str, group: dist.ProcessGroup, error: BaseException) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        super().__init__(
            f"{collective} did not finish on process {rank} of {size}: {error}. Another process of the group has "
            "stopped, has not made this call within the group's timeout (init_process_group(timeout=...)), or has "
            "made a different call"
        )
        self.collective, self.rank = collective, rank


class Pending:
    """A collective that has been started."""

    def __init__(
        self, collective: str, group: dist.ProcessGroup, start: Callable[[], Any], result: Tensor
    ) -> None:
        self.collective, self.group, self.result = collective, group, result
        self.work = self._guarded(start)

    def wait(self) -> Tensor:
        """Return the result. On a device only the current stream waits for it, not the host."""
        if self.work is not None:
            self._guarded(self.work.wait)
        return self.result

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            raise CollectiveError(self.collective, self.group, error) from error


def all_gather(value: Tensor, group: dist.ProcessGroup, what: str) -> Pending:
    """Gather the values of all processes, [processes, *value.shape], the same on every process."""
    value = readable(value).contiguous()
    size = dist.get_world_size(group)
    gathered = value.new_empty((size, *value.shape))
    flat = gathered.view(size * value.numel())

    def start() -> Any:
        if not value.numel():  # a divergence that does not normalize has no statistics
            return None
        return _all_gather(flat, value.view(-1), group=group, async_op=True)

    return Pending(f"the all-gather of {what} ({_shape(value)})", group, start, gathered)


def all_reduce(value: Tensor, group: dist.ProcessGroup, what: str) -> Pending:
    """Sum the value over processes, in place."""
    assert writable(value), "the sum would read the memory of a negated view"

    def start() -> Any:
        return dist.all_reduce(value, group=group, async_op=True)

    return Pending(f"the all-reduce of {what} ({_shape(value)})", group, start, value)


def reduce_scatter(value: Tensor, group: dist.ProcessGroup, what: str) -> Pending:
    """Sum a value [processes, ...] over processes, and return this process's part of the sum."""
    part = value.new_empty(value.shape[1:])

    def start() -> Any:
        flat = readable(value).contiguous().view(-1)
        return _reduce_scatter(part.view(-1), flat, group=group, async_op=True)

    return Pending(f"the reduce-scatter of {what} ({_shape(value)})", group, start, part)


def all_gather_objects(value: object, group: dist.ProcessGroup, what: str) -> list[Any]:
    """Gather one object of each process."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    pending = Pending(
        f"the all-gather of {what}",
        group,
        lambda: dist.all_gather_object(gathered, value, group=group),
        torch.empty(0),
    )
    pending.wait()
    return gathered


def _shape(value: Tensor) -> str:
    return f"{' x '.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"
