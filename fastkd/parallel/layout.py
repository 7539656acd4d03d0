"""This process's part of a call's tensors: the local part of a DTensor, and its columns of a full tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.call.checks import is_dtensor
from fastkd.call.contract import Shard
from fastkd.core.scalars import check_int
from fastkd.core.tensors import of_torch
from fastkd.parallel.collectives import all_gather, all_reduce, reduce_scatter
from fastkd.teachers import Ensemble, LinearTeacher, RoutedTeacher, TopK


def _shards(value: Any, axis: int, index: int) -> bool:
    """Whether a DTensor is sharded along dimension `axis` over dimension `index` of its mesh."""
    placement = value.placements[index]
    return placement.is_shard() and placement.dim % value.dim() == axis % value.dim()


def group_of(process_group: object, *logits: object) -> Any:
    """The process group over which the vocabulary of the logits is spread; None: it is not.

    Raises:
        TypeError, ValueError: process_group is neither a process group nor a mesh of one dimension.
    """
    if process_group is not None:
        return _group(process_group)
    for value in filter(is_dtensor, logits):
        group = _group_of(value, -1)
        if group is not None:
            return group
    return None


def group_of_head(process_group: object, hidden: object, weight: object) -> Any:
    """The process group over which the vocabulary of an lm_head [V, H] is spread; None: it is not.

    A DTensor weight with hidden states that are plain tensors is taken as spread by FSDP, over processes with different
    rows, unless process_group is given.
    """
    if process_group is not None:
        return _group(process_group)
    return _group_of(weight, 0) if is_dtensor(hidden) and is_dtensor(weight) else None


def _group_of(value: Any, axis: int) -> Any:
    shards = [index for index in range(value.device_mesh.ndim) if _shards(value, axis, index)]
    if len(shards) > 1:
        raise ValueError(
            "a vocabulary can be sharded over only one dimension of a mesh; got a DTensor with placements "
            f"{value.placements}"
        )
    return value.device_mesh.get_group(shards[0]) if shards else None


def _group(process_group: object) -> Any:
    mesh_module = of_torch("distributed", "device_mesh")
    if mesh_module is not None and isinstance(process_group, mesh_module.DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group must be a process group or a mesh of one dimension, "
                f"got a mesh of {process_group.ndim}; pass one of its dimensions, such as mesh['tp']"
            )
        return process_group.get_group()
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup or a DeviceMesh, "
            f"got {type(process_group).__name__}"
        )
    return process_group


def local(argument: str, value: Any, axis: int | None, group: Any) -> Any:
    """The local part of a DTensor; other values are returned unchanged. axis is the vocabulary's; None: it has none.

    Raises:
        ValueError: the loss cannot use the placements of the DTensor.
    """
    if not is_dtensor(value):
        return value
    dimensions = _dimensions_of(group, value.device_mesh)
    for index, (placement, in_group) in enumerate(zip(value.placements, dimensions, strict=True)):
        of_vocabulary = axis is not None and _shards(value, axis, index)
        wrong = placement.is_partial() or (placement.is_shard() and in_group != of_vocabulary)
        if wrong:
            allowed = "Replicate()" if axis is None else f"Shard({axis}) or Replicate()"
            raise ValueError(
                f"{argument} has placements {value.placements}; over the processes that share the vocabulary, it must "
                f"be {allowed}; over other processes, its rows may be sharded. Redistribute it"
            )
    return value.to_local()


def _dimensions_of(group: Any, mesh: Any) -> list[bool]:
    """Whether each dimension of the mesh is the group."""
    if group is None:
        return [False] * mesh.ndim
    ranks = dist.get_process_group_ranks(group)
    every = map(mesh.get_group, range(mesh.ndim))
    return [dist.get_process_group_ranks(dimension) == ranks for dimension in every]


def is_whole(value: Any, group: Any) -> bool:
    """Whether the logits are a DTensor with all columns on every process of the group."""
    if group is None or not is_dtensor(value):
        return False
    cut = [index for index in range(value.device_mesh.ndim) if _shards(value, -1, index)]
    return not cut


def local_weight(argument: str, value: Any, group: Any) -> Any:
    """This process's part of a weight [V, ...] or bias [V], sharded over the processes that share the vocabulary.

    A weight that is sharded over other processes, as by FSDP, is gathered once, and its gradient is averaged over them.
    """
    if not is_dtensor(value):
        return value
    from torch.distributed.tensor import Partial, Replicate

    mesh = value.device_mesh
    in_group = _dimensions_of(group, mesh)
    if any(placement.is_partial() for placement in value.placements):
        raise ValueError(f"{argument} has placements {value.placements}; reduce it first")
    placements = [
        p if shared else Replicate() for p, shared in zip(value.placements, in_group, strict=True)
    ]
    if any(
        p.is_shard() and not (shared and _shards(value, 0, i))
        for i, (p, shared) in enumerate(zip(placements, in_group, strict=True))
    ):
        raise ValueError(
            f"{argument} has placements {value.placements}; over the processes that share the vocabulary it may be "
            "Shard(0) or Replicate()"
        )
    if not argument.startswith("teacher") and any(
        shared and p.is_replicate() and mesh.size(i) > 1
        for i, (p, shared) in enumerate(zip(placements, in_group, strict=True))
    ):
        raise ValueError(
            f"{argument} has placements {value.placements}, so every process holds all of its rows; it must be "
            "Shard(0) over the processes that share the vocabulary"
        )
    whole = value.redistribute(placements=placements)
    return whole.to_local(
        grad_placements=[
            p if shared else Partial("avg") for p, shared in zip(placements, in_group, strict=True)
        ]
    )


def local_teacher(teacher: Any, group: Any) -> Any:
    """The teacher with the local parts of its DTensors."""
    if isinstance(teacher, Ensemble):
        members = [local_teacher(member, group) for member in teacher.teachers]
        return Ensemble(members, teacher.weights, teacher.mean)
    if isinstance(teacher, RoutedTeacher):
        members = [local_teacher(member, group) for member in teacher.teachers]
        return RoutedTeacher(members, local("teacher.index", teacher.index, None, group))
    if isinstance(teacher, LinearTeacher):
        return LinearTeacher(
            local_hidden("teacher.hidden", teacher.hidden, group),
            local_weight("teacher.weight", teacher.weight, group),
            local_weight("teacher.bias", teacher.bias, group),
        )
    if isinstance(teacher, TopK):
        fields = ("ids", "logprobs", "tail_logprob")
        if not any(is_dtensor(getattr(teacher, name)) for name in fields):
            return teacher
        ids, logprobs, tail = (
            local(f"teacher.{name}", getattr(teacher, name), None, group) for name in fields
        )
        return TopK(ids, logprobs, teacher.tail, tail, teacher.temperature)
    return local("teacher", teacher, -1, group)


# Hidden states


def local_hidden(argument: str, hidden: Any, group: Any) -> Any:
    """The hidden states of all rows. Those of a DTensor are gathered if sequence-parallel; others are unchanged."""
    if not is_dtensor(hidden):
        return hidden
    from torch.distributed.tensor import Partial, Replicate

    mesh, placements = hidden.device_mesh, hidden.placements
    in_group = _dimensions_of(group, mesh)
    if any(p.is_partial() or (p.is_shard() and p.dim == hidden.dim() - 1) for p in placements):
        raise ValueError(
            f"{argument} has placements {placements}; its rows may be sharded, or it may be Replicate()"
        )
    wanted = [Replicate() if shared else p for p, shared in zip(placements, in_group, strict=True)]
    # Each process of the group has the gradient of its own columns.
    gradients = [Partial() if shared else p for p, shared in zip(wanted, in_group, strict=True)]
    return hidden.redistribute(placements=wanted).to_local(grad_placements=gradients)


def summed_gradient(hidden: Tensor, argument: object, group: Any) -> Tensor:
    """The hidden states, with a gradient that is summed over the group.

    `argument` is what the user passed; a DTensor sums its gradient itself.
    """
    if group is None or is_dtensor(argument) or not hidden.requires_grad:
        return hidden
    return _SumGradient.apply(hidden, group)


class Sequence(NamedTuple):
    """The layout of sequence-parallel hidden states: each process of the group has an equal part of the rows."""

    group: Any
    dimension: int
    # The leading shape of one part.
    lead: torch.Size

    def stand_in(self, part: Tensor) -> Tensor:
        """A tensor in the shape of all rows, for the validation, which comes before any collective."""
        size = list(part.shape)
        size[self.dimension] *= dist.get_world_size(self.group)
        return (
            part.narrow(self.dimension, 0, 1).expand(size) if part.numel() else part.new_empty(size)
        )

    def gathered(self, part: Tensor) -> Tensor:
        """The hidden states of all rows."""
        return _GatherRows.apply(part, self.group, self.dimension)

    def with_hidden(self, teacher: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """The teacher with `change` applied to hidden states that are split like the student's.

        The teachers of a RoutedTeacher have rows of their own, so they cannot be split like the student's.
        """
        if isinstance(teacher, Ensemble):
            members = [self.with_hidden(member, change) for member in teacher.teachers]
            return Ensemble(members, teacher.weights, teacher.mean)
        if isinstance(teacher, LinearTeacher) and teacher.hidden.shape[:-1] == self.lead:
            return LinearTeacher(change(teacher.hidden), teacher.weight, teacher.bias)
        return teacher


def sequence_of(
    hidden: Any, group: Any, sequence_dim: int | None, argument: str = "student_hidden"
) -> Sequence | None:
    """The layout of sequence-parallel hidden states; None: they are not sequence-parallel.

    argument: the name of the hidden states in messages.

    Raises:
        TypeError, ValueError: sequence_dim is not a row dimension of hidden states that are a plain tensor.
    """
    if sequence_dim is None:
        return None
    if group is None:
        raise ValueError(
            "sequence_dim is for processes that share the vocabulary: pass process_group too"
        )
    if is_dtensor(hidden) or not isinstance(hidden, Tensor):
        raise ValueError(
            "sequence_dim is for hidden states in a plain tensor; the placements of a DTensor contain this already"
        )
    sequence_dim = check_int("sequence_dim", sequence_dim)
    rows = hidden.dim() - 1
    if not -rows - 1 <= sequence_dim < rows or sequence_dim == -1:
        raise ValueError(
            f"sequence_dim must be a dimension of the rows of {argument}, {tuple(hidden.shape)}; "
            f"got {sequence_dim}"
        )
    return Sequence(group, sequence_dim % hidden.dim(), hidden.shape[:-1])


class _SumGradient(torch.autograd.Function):
    """Hidden states that every process has. Each computes the gradient of its columns, and backward sums them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:
        """Return the hidden states unchanged."""
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Sum the gradient over processes."""
        (gradient,) = gradients
        what = "the gradient of hidden states"
        return all_reduce(gradient.contiguous().clone(), ctx.group, what).wait(), None


class _GatherRows(torch.autograd.Function):
    """The rows of all processes, gathered from sequence-parallel hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any, dimension: int) -> Tensor:
        """Gather the rows of all processes."""
        ctx.group, ctx.dimension = group, dimension
        parts = all_gather(hidden, group, "sequence-parallel hidden states").wait()
        return torch.cat(parts.unbind(0), dimension)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Sum the gradient over processes, and return this process's rows."""
        (gradient,) = gradients
        parts = torch.stack(gradient.chunk(dist.get_world_size(ctx.group), ctx.dimension))
        what = "the gradient of sequence-parallel hidden states"
        return reduce_scatter(parts, ctx.group, what).wait(), None, None


# Columns


def cut_teacher(teacher: Any, shard: Shard, columns: int, width: int) -> Any:
    """The teacher restricted to this process's columns."""
    if isinstance(teacher, Ensemble):
        members = [cut_teacher(member, shard, columns, width) for member in teacher.teachers]
        return Ensemble(members, teacher.weights, teacher.mean)
    if isinstance(teacher, RoutedTeacher):
        members = [cut_teacher(member, shard, columns, width) for member in teacher.teachers]
        return RoutedTeacher(members, teacher.index)
    if isinstance(teacher, LinearTeacher):
        weight, bias = teacher.weight, teacher.bias
        if weight.shape[0] == width:
            return teacher
        return LinearTeacher(
            teacher.hidden,
            weight.narrow(0, shard.first, columns),
            None if bias is None else bias.narrow(0, shard.first, columns),
        )
    if isinstance(teacher, TopK) or teacher.shape[-1] == width:
        return teacher
    return cut(teacher, shard, columns)


def cut(logits: Tensor, shard: Shard, columns: int) -> Tensor:
    """This process's columns of logits that every process has; backward returns the whole gradient to each."""
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return logits.narrow(-1, shard.first, columns)
    return _Cut.apply(logits, shard, columns)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, shard: Shard, columns: int) -> Tensor:
        """Copy this process's columns."""
        ctx.shard, ctx.width = shard, logits.shape[-1]
        return logits.narrow(-1, shard.first, columns).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gather the gradient of all columns."""
        (gradient,) = gradients
        shard, columns = ctx.shard, gradient.shape[-1]
        whole = gradient.new_zeros((*gradient.shape[:-1], ctx.width))
        whole.narrow(-1, shard.first, columns).copy_(gradient)
        return all_reduce(whole, shard.group, "the gradient of logits").wait(), None, None
