"""Functions that read and write some rows of a tensor [..., columns], and the chunks in which a loss processes rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.call.contract import Rows, kept_rows

# Selects rows, counted over all leading dimensions: a range of them, or a tensor of their indices.
RowIndices = slice | Tensor


def _flat(tensor: Tensor, lead: torch.Size) -> Tensor | None:
    """A view of the tensor as [rows, ...]; None if that would need a copy."""
    try:
        return tensor.view(lead.numel(), *tensor.shape[len(lead) :])
    except RuntimeError:
        return None


def _indices_by_dimension(
    indices: RowIndices, lead: torch.Size, device: torch.device
) -> tuple[Tensor, ...]:
    """The indices of these rows in each leading dimension."""
    if isinstance(indices, slice):
        indices = torch.arange(indices.start, indices.stop, device=device)
    return torch.unravel_index(indices, lead)


def take(tensor: Tensor, lead: torch.Size, indices: RowIndices) -> Tensor:
    """These rows, [C, ...], of a tensor [*lead, ...]; a view if possible."""
    flat = _flat(tensor, lead)
    return (
        tensor[_indices_by_dimension(indices, lead, tensor.device)]
        if flat is None
        else flat[indices]
    )


def put(tensor: Tensor, lead: torch.Size, indices: RowIndices, values: Tensor) -> None:
    """Write values [C, ...] to these rows of a tensor [*lead, ...]."""
    flat = _flat(tensor, lead)
    if flat is None:
        tensor[_indices_by_dimension(indices, lead, tensor.device)] = values
    else:
        flat[indices] = values


def rows_at(rows: Rows, lead: torch.Size, indices: RowIndices) -> Rows:
    """The Rows of a chunk: the values of these rows; scale, which is not per row, stays.

    Fields that share a tensor still do, because a backend compares the two temperatures by identity.
    """
    taken: dict[int, Tensor] = {}

    def pick(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if id(value) not in taken:
            taken[id(value)] = take(value, lead, indices)
        return taken[id(value)]

    return Rows(*map(pick, rows._replace(scale=None)))._replace(scale=rows.scale)


@dataclass(frozen=True)
class Chunks:
    """The chunks in which rows are processed; iterating over them yields the rows of each chunk."""

    count: int  # how many rows are processed
    size: int  # rows per chunk; the last chunk may have fewer
    indices: Tensor | None  # the indices of the processed rows; None: all rows are processed

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
        """Divide the kept rows into chunks of at most `size` rows.

        Args:
            rows: the labels and weights, which tell which rows are kept.
            lead: the leading shape of the logits.
            ignore_index: the label that drops a row.
            size: the largest number of rows per chunk.
            even: make all chunks about equally large, instead of leaving a remainder to the last.
            drops: remove dropped rows, for which the host waits until the device has counted them. False: process all.
        """
        kept = kept_rows(rows, ignore_index) if drops else None
        indices = None if kept is None else kept.flatten().nonzero().squeeze(1)
        if indices is not None and indices.numel() == lead.numel():
            indices = None
        count = lead.numel() if indices is None else indices.numel()
        return cls.even(count, size, indices) if even else cls(count, min(size, count), indices)

    @classmethod
    def even(cls, count: int, size: int, indices: Tensor | None) -> Chunks:
        """Divide the rows with these indices, or rows 0 to count, into chunks of about equal size, at most `size`."""
        if count:
            size = -(-count // -(-count // size))
        return cls(count, min(size, count), indices)

    def __iter__(self) -> Iterator[RowIndices]:
        for start in range(0, self.count, max(self.size, 1)):
            stop = min(start + self.size, self.count)
            yield slice(start, stop) if self.indices is None else self.indices[start:stop]
