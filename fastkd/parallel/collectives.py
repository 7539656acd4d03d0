"""The collectives that losses use, and errors that name them. Every exchange between processes is in this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.core.tensors import readable, writable


def _of(*names: str) -> Any:
    """The first of these that torch has, by the name that it has now."""

    def call(*arguments: Any, **options: Any) -> Any:
        return next(getattr(dist, name) for name in names if hasattr(dist, name))(
            *arguments, **options
        )

    return call


_all_gather = _of("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _of("reduce_scatter_single", "reduce_scatter_tensor")


class CollectiveError(RuntimeError):
    """A collective did not finish: another process has stopped, is late by more than the group's timeout, or has made
    another call.

    Attributes:
        collective: which.
        rank: this process's, in the group.
    """

    def __init__(self, collective: str, group: dist.ProcessGroup, error: BaseException) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        super().__init__(
            f"{collective} did not finish on process {rank} of {size}: {error}. Another process of the group has "
            "stopped, has not made this call within the group's timeout (init_process_group(timeout=...)), or has "
            "made another one"
        )
        self.collective, self.rank = collective, rank


class Pending:
    """A collective under way."""

    def __init__(
        self, collective: str, group: dist.ProcessGroup, start: Callable[[], Any], result: Tensor
    ) -> None:
        self.collective, self.group, self.result = collective, group, result
        self.work = self._guarded(start)

    def wait(self) -> Tensor:
        """Its result. On a device the host does not wait: what follows on the current stream does."""
        if self.work is not None:
            self._guarded(self.work.wait)
        return self.result

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:
            raise CollectiveError(self.collective, self.group, error) from error


def all_gather(value: Tensor, group: dist.ProcessGroup, what: str) -> Pending:
    """[processes, *value.shape], the same on every process."""
    value = readable(value).contiguous()
    size = dist.get_world_size(group)
    everything = value.new_empty((size, *value.shape))
    flat = everything.view(size * value.numel())

    def start() -> Any:
        if not value.numel():  # where nothing has to be normalised, rows have no statistics
            return None
        return _all_gather(flat, value.view(-1), group=group, async_op=True)

    return Pending(f"the all-gather of {what} ({_shape(value)})", group, start, everything)


def all_reduce(value: Tensor, group: dist.ProcessGroup, what: str) -> Pending:
    """The sum over processes, in place."""
    assert writable(value), "the memory of a view that is negated would be summed"

    def start() -> Any:
        return dist.all_reduce(value, group=group, async_op=True)

    return Pending(f"the all-reduce of {what} ({_shape(value)})", group, start, value)


def reduce_scatter(value: Tensor, group: dist.ProcessGroup, what: str) -> Pending:
    """Of a value [processes, ...] the sum over processes of this one's part."""
    part = value.new_empty(value.shape[1:])

    def start() -> Any:
        flat = readable(value).contiguous().view(-1)
        return _reduce_scatter(part.view(-1), flat, group=group, async_op=True)

    return Pending(f"the reduce-scatter of {what} ({_shape(value)})", group, start, part)


def all_gather_objects(value: object, group: dist.ProcessGroup, what: str) -> list[Any]:
    """The object of every process."""
    everything: list[Any] = [None] * dist.get_world_size(group)
    pending = Pending(
        f"the all-gather of {what}",
        group,
        lambda: dist.all_gather_object(everything, value, group=group),
        torch.empty(0),
    )
    pending.wait()
    return everything


def _shape(value: Tensor) -> str:
    return f"{' x '.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"
