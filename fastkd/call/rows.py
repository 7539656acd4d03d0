"""Some rows of a tensor [..., columns], by number."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.call.contract import Rows

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
