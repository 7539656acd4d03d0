"""What of a call's tensors is this process's: of DTensors their local part, of whole tensors the columns it has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.call.checks import check_int, is_dtensor
from fastkd.call.contract import Shard
from fastkd.parallel.collectives import all_gather, all_reduce, reduce_scatter
from fastkd.teachers import Ensemble, LinearTeacher, TopK


def _shards(value: Any, axis: int, index: int) -> bool:
    """Whether a DTensor is cut along that dimension over dimension `index` of its mesh."""
    placement = value.placements[index]
    return placement.is_shard() and placement.dim % value.dim() == axis % value.dim()


def group_of(process_group: object, *logits: object) -> Any:
    """The process group over which the vocabulary of logits is spread; None where it is not.

    Raises:
        TypeError, ValueError: process_group is neither a process group nor a mesh of one dimension.
    """
    if process_group is not None:
        return _group(process_group)
    for value in filter(is_dtensor, logits):
        found = _group_of(value, -1)
        if found is not None:
            return found
    return None


def group_of_head(process_group: object, hidden: object, weight: object) -> Any:
    """Likewise of an lm_head, [V, H].

    A weight whose hidden states are no DTensor is spread by FSDP, over processes with rows of their own, unless
    process_group says otherwise.
    """
    if process_group is not None:
        return _group(process_group)
    return _group_of(weight, 0) if is_dtensor(hidden) and is_dtensor(weight) else None


def _group_of(value: Any, axis: int) -> Any:
    shards = [index for index in range(value.device_mesh.ndim) if _shards(value, axis, index)]
    if len(shards) > 1:
        raise ValueError(
            "a vocabulary can be spread over one dimension of a mesh; got a DTensor with placements "
            f"{value.placements}"
        )
    return value.device_mesh.get_group(shards[0]) if shards else None


def _group(given: object) -> Any:
    mesh_module = sys.modules.get("torch.distributed.device_mesh")
    if mesh_module is not None and isinstance(given, mesh_module.DeviceMesh):
        if given.ndim != 1:
            raise ValueError(
                f"process_group must be a process group or a mesh of one dimension, got a mesh of {given.ndim}; "
                "take one of its dimensions, mesh['tp']"
            )
        return given.get_group()
    if not isinstance(given, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup or a DeviceMesh, got {type(given).__name__}"
        )
    return given


def local(argument: str, value: Any, axis: int | None, group: Any) -> Any:
    """A DTensor's part on this process; others come back as they are. axis is the vocabulary's, None for none.

    Raises:
        ValueError: its placements are none that a loss can use.
    """
    if not is_dtensor(value):
        return value
    dimensions = _dimensions_of(group, value.device_mesh)
    for index, (placement, here) in enumerate(zip(value.placements, dimensions, strict=True)):
        of_vocabulary = axis is not None and _shards(value, axis, index)
        wrong = placement.is_partial() or (placement.is_shard() and here != of_vocabulary)
        if wrong:
            allowed = "Replicate()" if axis is None else f"Shard({axis}) or Replicate()"
            raise ValueError(
                f"{argument} has placements {value.placements}; over the processes that share the vocabulary they "
                f"may be {allowed}, and elsewhere rows may be spread: redistribute it"
            )
    return value.to_local()


def _dimensions_of(group: Any, mesh: Any) -> list[bool]:
    """Which dimensions of a mesh are the group's."""
    if group is None:
        return [False] * mesh.ndim
    ranks = dist.get_process_group_ranks(group)
    every = map(mesh.get_group, range(mesh.ndim))
    return [dist.get_process_group_ranks(dimension) == ranks for dimension in every]


def is_whole(value: Any, group: Any) -> bool:
    """Whether logits are a DTensor of which every process of the group has all columns."""
    if group is None or not is_dtensor(value):
        return False
    cut = [index for index in range(value.device_mesh.ndim) if _shards(value, -1, index)]
    return not cut


def local_weight(argument: str, value: Any, group: Any) -> Any:
    """A weight [V, ...] or bias [V]: its part over the processes that share the vocabulary.

    One that is spread over other processes, as FSDP does, is gathered, once, and its gradient averaged over them.
    """
    if not is_dtensor(value):
        return value
    from torch.distributed.tensor import Partial, Replicate

    mesh = value.device_mesh
    here = _dimensions_of(group, mesh)
    if any(placement.is_partial() for placement in value.placements):
        raise ValueError(f"{argument} has placements {value.placements}; reduce it first")
    kept = [p if mine else Replicate() for p, mine in zip(value.placements, here, strict=True)]
    if any(
        p.is_shard() and not (mine and _shards(value, 0, i))
        for i, (p, mine) in enumerate(zip(kept, here, strict=True))
    ):
        raise ValueError(
            f"{argument} has placements {value.placements}; over the processes that share the vocabulary it may be "
            "Shard(0) or Replicate()"
        )
    if argument.startswith("student") and any(
        mine and p.is_replicate() and mesh.size(i) > 1
        for i, (p, mine) in enumerate(zip(kept, here, strict=True))
    ):
        raise ValueError(
            f"{argument} has placements {value.placements}, so that every process has all of the vocabulary that they "
            "share; it has to be Shard(0) there"
        )
    whole = value.redistribute(placements=kept)
    return whole.to_local(
        grad_placements=[p if mine else Partial("avg") for p, mine in zip(kept, here, strict=True)]
    )


def local_teacher(teacher: Any, group: Any) -> Any:
    """A teacher without DTensors."""
    if isinstance(teacher, Ensemble):
        members = [local_teacher(member, group) for member in teacher.teachers]
        return Ensemble(members, teacher.weights, teacher.mean)
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


# ---- hidden states


def local_hidden(argument: str, hidden: Any, group: Any) -> Any:
    """Hidden states of all rows: those of a DTensor, gathered where they are sequence-parallel; others as they are."""
    if not is_dtensor(hidden):
        return hidden
    from torch.distributed.tensor import Partial, Replicate

    mesh, placements = hidden.device_mesh, hidden.placements
    here = _dimensions_of(group, mesh)
    if any(p.is_partial() or (p.is_shard() and p.dim == hidden.dim() - 1) for p in placements):
        raise ValueError(
            f"{argument} has placements {placements}; its rows may be spread, or it is Replicate()"
        )
    wanted = [Replicate() if mine else p for p, mine in zip(placements, here, strict=True)]
    # Each process of the group has the gradient of its own columns.
    gradients = [Partial() if mine else p for p, mine in zip(wanted, here, strict=True)]
    return hidden.redistribute(placements=wanted).to_local(grad_placements=gradients)


def summed_gradient(hidden: Tensor, given: object, group: Any) -> Tensor:
    """Hidden states that every process of the group has, whose gradient is the sum over the group."""
    if group is None or is_dtensor(given) or not hidden.requires_grad:
        return hidden
    return _SumGradient.apply(hidden, group)


class Sequence(NamedTuple):
    """Sequence-parallel hidden states: every process of the group has an equal part of the rows."""

    group: Any
    dimension: int
    lead: torch.Size  # of one part

    def stand_in(self, part: Tensor) -> Tensor:
        """In the shape of all rows, for a validation that comes before any collective."""
        size = list(part.shape)
        size[self.dimension] *= dist.get_world_size(self.group)
        return (
            part.narrow(self.dimension, 0, 1).expand(size) if part.numel() else part.new_empty(size)
        )

    def gathered(self, part: Tensor) -> Tensor:
        """All rows."""
        return _GatherRows.apply(part, self.group, self.dimension)

    def of_teacher(self, teacher: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """A teacher whose hidden states are split like the student's, changed."""
        if isinstance(teacher, Ensemble):
            members = [self.of_teacher(member, change) for member in teacher.teachers]
            return Ensemble(members, teacher.weights, teacher.mean)
        if isinstance(teacher, LinearTeacher) and teacher.hidden.shape[:-1] == self.lead:
            return LinearTeacher(change(teacher.hidden), teacher.weight, teacher.bias)
        return teacher


def sequence_of(hidden: Any, group: Any, sequence_dim: int | None) -> Sequence | None:
    """Whether and how hidden states are sequence-parallel.

    Raises:
        TypeError, ValueError: sequence_dim is no dimension of the rows of plain hidden states.
    """
    if sequence_dim is None:
        return None
    if group is None:
        raise ValueError(
            "sequence_dim is for processes that share the vocabulary: pass process_group"
        )
    if is_dtensor(hidden) or not isinstance(hidden, Tensor):
        raise ValueError(
            "sequence_dim is for plain tensors of hidden states; the placements of a DTensor say it"
        )
    sequence_dim = check_int("sequence_dim", sequence_dim)
    rows = hidden.dim() - 1
    if not -rows - 1 <= sequence_dim < rows or sequence_dim == -1:
        raise ValueError(
            f"sequence_dim must be a dimension of the rows of student_hidden, {tuple(hidden.shape)}; "
            f"got {sequence_dim}"
        )
    return Sequence(group, sequence_dim % hidden.dim(), hidden.shape[:-1])


class _SumGradient(torch.autograd.Function):
    """Hidden states that every process has: each has the gradient of its own columns, and the sum is what they get."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any) -> Tensor:
        """The hidden states as they are."""
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Of all processes."""
        (gradient,) = gradients
        what = "the gradient of hidden states"
        return all_reduce(gradient.contiguous().clone(), ctx.group, what).wait(), None


class _GatherRows(torch.autograd.Function):
    """Sequence-parallel hidden states: every process has its part of the rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: Any, dimension: int) -> Tensor:
        """The rows of all."""
        ctx.group, ctx.dimension = group, dimension
        parts = all_gather(hidden, group, "sequence-parallel hidden states").wait()
        return torch.cat(parts.unbind(0), dimension)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The sum over processes, of this one's rows."""
        (gradient,) = gradients
        parts = torch.stack(gradient.chunk(dist.get_world_size(ctx.group), ctx.dimension))
        what = "the gradient of sequence-parallel hidden states"
        return reduce_scatter(parts, ctx.group, what).wait(), None, None


# ---- which columns


def cut_teacher(teacher: Any, shard: Shard, columns: int, width: int) -> Any:
    """The teacher with this process's columns alone."""
    if isinstance(teacher, Ensemble):
        members = [cut_teacher(member, shard, columns, width) for member in teacher.teachers]
        return Ensemble(members, teacher.weights, teacher.mean)
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
    """This process's columns of logits that every process has; each gets the whole gradient."""
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return logits.narrow(-1, shard.first, columns)
    return _Cut.apply(logits, shard, columns)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, shard: Shard, columns: int) -> Tensor:
        """This process's columns."""
        ctx.shard, ctx.width = shard, logits.shape[-1]
        return logits.narrow(-1, shard.first, columns).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The columns of all."""
        (gradient,) = gradients
        shard, columns = ctx.shard, gradient.shape[-1]
        whole = gradient.new_zeros((*gradient.shape[:-1], ctx.width))
        whole.narrow(-1, shard.first, columns).copy_(gradient)
        return all_reduce(whole, shard.group, "the gradient of logits").wait(), None, None
