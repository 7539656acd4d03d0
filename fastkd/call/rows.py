"""Some rows of a tensor [..., columns], by number; and the chunks in which a loss processes the rows that count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.call.contract import Rows, counted_rows

At = slice | Tensor  # rows: a range, or their numbers


def _flat(tensor: Tensor, lead: torch.Size) -> Tensor | None:
    """The tensor as [rows, ...], where that needs no copy."""
    try:
        return tensor.view(lead.numel(), *tensor.shape[len(lead) :])
    except RuntimeError:
        return None


def _numbers(at: At, lead: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    if isinstance(at, slice):
        at = torch.arange(at.start, at.stop, device=device)
    return torch.unravel_index(at, lead)


def take(tensor: Tensor, lead: torch.Size, at: At) -> Tensor:
    """[C, ...]: these rows of a tensor [*lead, ...]; a view where that is possible."""
    flat = _flat(tensor, lead)
    return tensor[_numbers(at, lead, tensor.device)] if flat is None else flat[at]


def put(tensor: Tensor, lead: torch.Size, at: At, values: Tensor) -> None:
    """Write these rows."""
    flat = _flat(tensor, lead)
    if flat is None:
        tensor[_numbers(at, lead, tensor.device)] = values
    else:
        flat[at] = values


def rows_at(rows: Rows, lead: torch.Size, at: At) -> Rows:
    """What these rows have of it."""

    def pick(value: Tensor | None) -> Tensor | None:
        return None if value is None else take(value, lead, at)

    return Rows(*map(pick, rows._replace(scale=None)))._replace(scale=rows.scale)


@dataclass(frozen=True)
class Chunks:
    """The chunks of the rows that are processed; iterating gives the rows of each."""

    count: int  # of rows
    size: int  # of a chunk, in rows; the last one may have fewer
    numbers: Tensor | None  # of the rows; None: all rows are processed

    @classmethod
    def of(
        cls,
        rows: Rows,
        lead: torch.Size,
        ignore_index: int,
        size: int,
        *,
        even: bool = False,
        drops: bool = True,
    ) -> Chunks:
        """The chunks of at most `size` counted rows.

        Args:
            rows: say which rows count.
            lead: the leading shape.
            ignore_index: the label that drops a row.
            size: of a chunk, at most.
            even: make the last chunk as large as the others, as far as possible.
            drops: remove dropped rows first, which waits for the device to count them. False: process all rows.
        """
        counted = counted_rows(rows, ignore_index) if drops else None
        numbers = None if counted is None else counted.flatten().nonzero().squeeze(1)
        if numbers is not None and numbers.numel() == lead.numel():
            numbers = None
        count = lead.numel() if numbers is None else numbers.numel()
        if even and count:
            size = -(-count // -(-count // size))
        return cls(count, min(size, count), numbers)

    def __iter__(self) -> Iterator[At]:
        for start in range(0, self.count, max(self.size, 1)):
            stop = min(start + self.size, self.count)
            yield slice(start, stop) if self.numbers is None else self.numbers[start:stop]
