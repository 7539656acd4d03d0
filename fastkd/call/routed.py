"""Prepares a RoutedTeacher for a loss: finds the rows of each teacher, or merges its teachers into one.

The teachers' rows, concatenated, are the student's rows sorted by teacher. A stable argsort of the index therefore
gives, for each concatenated row, its number among the student's rows.

:func:`joined` merges TopKs, or dense teachers of which one requires grad, into one teacher of all rows;
:func:`rows_by_teacher` returns the rows of each teacher, for a loop over chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.call.contract import Rows, kept_rows
from fastkd.call.rows import Chunks, RowIndices
from fastkd.call.tail import masses
from fastkd.teachers import RoutedTeacher, Teacher, TopK


@dataclass(frozen=True, eq=False)
class JoinedTopK(TopK):
    """A TopK made of several, with facts about their rows that the fields of a TopK cannot hold."""

    # For each row [...], the sum of the listed probabilities and an estimate of the mass of the tail, which
    # fastkd.call.tail.masses has computed from the TopK of the row. None: the loss computes them from this TopK.
    own_masses: tuple[Tensor, Tensor] | None = None
    # [...] bool: whether the TopK from which the row comes has a tail_logprob. If it has none, tail_logprob is -inf
    # here. None: either all of the TopKs have one, or none has.
    has_tail: Tensor | None = None
    # [...]: the largest id that the TopKs list in the row, if this TopK leaves out some of their ids. The row is
    # invalid if that id is outside the vocabulary.
    highest: Tensor | None = None


class RowsOfTeacher(NamedTuple):
    """The kept rows of one teacher, in chunks.

    A chunk holds the indices of its rows twice: among the student's rows, and among the teacher's rows.
    """

    number: int
    chunks: list[tuple[RowIndices, RowIndices]]


def numbers_of(teacher: RoutedTeacher, lead: torch.Size) -> Tensor:
    """The number of each row's teacher, int64 [rows]."""
    index = teacher.index
    shape = (*index.shape, *[1] * (len(lead) - index.dim()))
    return index.to(torch.int64).reshape(shape).expand(lead).reshape(-1)


def count_rows(teacher: RoutedTeacher, numbers: Tensor) -> Tensor:
    """How many rows each teacher has according to the index, int64 [teachers]."""
    each = torch.arange(len(teacher.teachers), device=numbers.device)
    return (numbers.unsqueeze(-1) == each).sum(0)


def check_shapes(teacher: RoutedTeacher, student: str, lead: torch.Size) -> None:
    """Raise unless the shapes of the index and of the teachers fit the rows [*lead]; reads no value."""
    index = teacher.index
    if index.shape != lead[: index.dim()]:
        raise ValueError(
            f"teacher.index must have the leading shape of {student}, {tuple(lead)}, or its first dimensions; "
            f"got {tuple(index.shape)}"
        )
    for number, own in enumerate(teacher.leads()):
        if not own or own[1:] != lead[max(len(lead) - len(own) + 1, 1) :]:
            raise ValueError(
                f"teacher.teachers[{number}] must have rows of shape (n,) or (n, *rest), where rest stands for the "
                f"last dimensions of the leading shape of {student}, {tuple(lead)}; got rows in {tuple(own)}"
            )


def check_total(teacher: RoutedTeacher, student: str, lead: torch.Size) -> None:
    """Raise unless the teachers have, together, as many rows as the student; reads no value."""
    sizes = teacher.sizes()
    if sum(sizes) != lead.numel():
        raise ValueError(
            f"the numbers of rows of a RoutedTeacher's teachers must add up to {lead.numel()}, the number of rows of "
            f"{student}; got {_listed(sizes)} = {sum(sizes)}"
        )


def check_counts(teacher: RoutedTeacher, numbers: Tensor, counts: Sequence[int]) -> None:
    """Raise unless each teacher has as many rows as the index gives it. counts: what count_rows returns, as a list."""
    sizes = teacher.sizes()
    if sum(counts) != numbers.numel():
        raise ValueError(
            f"teacher.index must be in [0, {len(sizes)}), the number of a teacher; "
            f"got {int(numbers.min())} to {int(numbers.max())}"
        )
    for number, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        if count != size:
            raise ValueError(
                f"the number of rows of teacher.teachers[{number}] must be {count}, one for each row of the student "
                f"whose index is {number}; got {size}. Masked rows count too"
            )


def _listed(sizes: Sequence[int]) -> str:
    return " + ".join(map(str, sizes))


def reads_index(teacher: RoutedTeacher, checking: bool) -> bool:
    """Whether a call first checks the values of the index: never under torch.compile, on a GPU only if `checking`."""
    if torch.compiler.is_compiling():
        return False
    return teacher.index.device.type == "cpu" or checking


def joined(teacher: Teacher, lead: torch.Size, was_read: bool) -> Teacher:
    """Merge a RoutedTeacher's TopKs into one TopK, or its dense logits into one tensor if one of them requires grad.

    Any other teacher is returned unchanged.

    was_read: whether the index has been checked. An unchecked index that does not fit makes every loss NaN.
    """
    if not isinstance(teacher, RoutedTeacher):
        return teacher
    if teacher.is_sparse:
        return _joined_topk(teacher, lead, was_read)
    dense = [member for member in teacher.teachers if isinstance(member, Tensor)]
    if torch.is_grad_enabled() and any(logits.requires_grad for logits in dense):
        logits = _joined_logits(dense, numbers_of(teacher, lead), lead)
        return logits if was_read else logits.masked_fill(_misfits(teacher, lead), math.nan)
    return teacher


def _joined_logits(dense: Sequence[Tensor], numbers: Tensor, lead: torch.Size) -> Tensor:
    """Dense teachers as one tensor [..., V] of the widest dtype, cut to the narrowest width: the rest is padding."""
    width = min(logits.shape[-1] for logits in dense)
    dtype = widest(dense)
    columns = [logits[..., :width].to(dtype) for logits in dense]
    return _in_order(columns, _places(numbers), (*lead, width))


def _misfits(teacher: RoutedTeacher, lead: torch.Size) -> Tensor:
    """Whether a teacher has more or fewer rows than the index gives it; 0-dim bool, for which the host does not wait.

    This covers an index out of range: no teacher has it, so the counts add up to less than the teachers' rows.
    """
    # Compared one by one, because a CUDA graph cannot capture a copy of a list to the device.
    counts = count_rows(teacher, numbers_of(teacher, lead)).unbind()
    differs = [count != size for count, size in zip(counts, teacher.sizes(), strict=True)]
    return torch.stack(differs).any()


def _in_order(values: Sequence[Tensor], places: Tensor, shape: Sequence[int]) -> Tensor:
    """The rows of all teachers in the order of the student's rows. shape is that of the result, [..., columns]."""
    rows = torch.cat([value.reshape(value.shape[:-1].numel(), shape[-1]) for value in values])
    return rows.index_select(0, places).reshape(shape)


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype to which all of these tensors can be converted without rounding."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _places(numbers: Tensor) -> Tensor:
    """For each row, its place among the concatenated rows of all teachers."""
    order = numbers.argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _joined_topk(teacher: RoutedTeacher, lead: torch.Size, was_read: bool) -> TopK:
    members = [member for member in teacher.teachers if isinstance(member, TopK)]
    numbers, first = numbers_of(teacher, lead), members[0]
    places = _places(numbers)
    k = max(member.ids.shape[-1] for member in members)
    one_temperature = all(member.temperature == first.temperature for member in members)
    dtype = widest([member.logprobs for member in members])
    if not one_temperature:
        dtype = torch.promote_types(dtype, torch.float32)

    def per_row(values: Sequence[Tensor]) -> Tensor:
        return _in_order([value.unsqueeze(-1) for value in values], places, (*lead, 1)).squeeze(-1)

    all_ids, all_logprobs = [], []
    for member in members:
        logprobs = member.logprobs.detach().to(dtype)
        # A loss at temperature T needs p^(t / T), where t is the temperature of p. This is (p^t)^(1 / T), so the
        # logarithms of p^t are those of a teacher at temperature 1.
        logprobs = logprobs if one_temperature else logprobs * member.temperature
        padding = (0, k - member.ids.shape[-1])
        all_ids.append(torch.nn.functional.pad(member.ids.to(torch.int64), padding, value=-1))
        all_logprobs.append(torch.nn.functional.pad(logprobs, padding, value=-math.inf))
    ids = _in_order(all_ids, places, (*lead, k))
    if not was_read:
        ids = ids.masked_fill(_misfits(teacher, lead), -2)

    tails = [member.tail_logprob if member.tail == "bucket" else None for member in members]
    given = [tail for tail in tails if tail is not None]
    tail_logprob = has_tail = own_masses = None
    if given:
        filled = [
            torch.full_like(member.ids[..., 0], -math.inf, dtype=widest(given))
            if tail is None
            else tail.detach().to(widest(given))
            for member, tail in zip(members, tails, strict=True)
        ]
        tail_logprob = per_row(filled)
    if given and len(given) < len(members):
        has_tail = per_row(
            [
                torch.full_like(member.ids[..., 0], tail is not None, dtype=torch.bool)
                for member, tail in zip(members, tails, strict=True)
            ]
        )
    if not first.renormalizes and any(member.logprobs.dtype != dtype for member in members):
        # masses() derives the rounding error from the dtype, so each teacher's sums are taken in its own dtype.
        of_each = [masses(member.ids, member.logprobs.detach()) for member in members]
        own_masses = (
            per_row([total for total, _ in of_each]),
            per_row([mass for _, mass in of_each]),
        )
    temperature = first.temperature if one_temperature else 1.0
    logprobs = _in_order(all_logprobs, places, (*lead, k))
    return JoinedTopK(ids, logprobs, first.tail, tail_logprob, temperature, own_masses, has_tail)


def rows_by_teacher(
    teacher: RoutedTeacher, rows: Rows, lead: torch.Size, ignore_index: int, size: int
) -> tuple[list[RowsOfTeacher], int, Tensor | None]:
    """(the kept rows of each teacher, in chunks of at most `size`; the size of the largest; the indices of kept rows).

    The indices are None if all rows are kept. The host waits for the device, to count each teacher's rows.

    Raises:
        ValueError: the index does not fit.
        RuntimeError: a CUDA graph is being captured.
    """
    numbers = numbers_of(teacher, lead)
    if numbers.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a RoutedTeacher of dense logits or LinearTeachers cannot be captured in a CUDA graph, because the rows of "
            "each teacher are counted on the host: capture the loss of each teacher's rows, or pass TopKs"
        )
    kept = kept_rows(rows, ignore_index)
    order, sizes = numbers.argsort(stable=True), teacher.sizes()
    counts = count_rows(teacher, numbers)
    if kept is None:
        check_counts(teacher, numbers, counts.tolist())
        kept_order, positions, kept_counts = order, None, sizes
    else:
        kept_in_order = kept.flatten()[order]
        kept_of_each = [part.sum() for part in kept_in_order.split(sizes)]
        on_host = torch.cat([counts, torch.stack(kept_of_each)]).tolist()
        check_counts(teacher, numbers, on_host[: len(sizes)])
        kept_counts = on_host[len(sizes) :]
        positions = kept_in_order.nonzero().squeeze(1)
        kept_order = order[positions]
    parts, first, first_kept, largest = [], 0, 0, 0
    for number, (own, count) in enumerate(zip(sizes, kept_counts, strict=True)):
        span = slice(first_kept, first_kept + count)
        places = None if positions is None or count == own else positions[span] - first
        of_student = Chunks.even(count, size, kept_order[span])
        of_teacher = Chunks.even(count, size, places)
        parts.append(RowsOfTeacher(number, list(zip(of_student, of_teacher, strict=True))))
        largest = max(largest, of_student.size)
        first, first_kept = first + own, first_kept + count
    return parts, largest, None if positions is None else kept_order
