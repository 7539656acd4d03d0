"""The scores of one sequence, and batches of them in the layouts that losses take."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastkd.call.checks import check_choice
from fastkd.core.scalars import check_int
from fastkd.teachers.topk import TopK

LAYOUTS = ("padded", "packed", "nested")
ROWS = ("tokens", "scored")


@dataclass(frozen=True, eq=False)
class Scored:
    """A served teacher's scores of one sequence: n rows, of which row i predicts token start + i.

    Row i is therefore the teacher's counterpart of the student's logits at position start + i - 1. The one-position
    shift has been made.

    Args:
        teacher: :class:`fastkd.TopK` with rows [n, K] in float32, at temperature 1; None if k was 0.
        sampled_logprobs: [n] float32, the log-probability of each token of the sequence itself.
        kept: [n] bool; False where the server's values are missing or NaN and missing="drop" was passed. Such a row
            has ids -1 and the sampled log-probability NaN. Pass `kept` to a loss as its mask.
        start: the index of the first token that is scored.
    """

    teacher: TopK | None
    sampled_logprobs: Tensor
    kept: Tensor
    start: int

    def __len__(self) -> int:
        return len(self.kept)

    def to(self, device: torch.device | str) -> Scored:
        """Return the scores on a device."""
        moved = _moved(self.teacher, lambda tensor: tensor.to(device))
        return Scored(moved, self.sampled_logprobs.to(device), self.kept.to(device), self.start)


class Batch(NamedTuple):
    """Rows of several sequences, for a loss: [B, W] if they are padded, [total] if they are packed."""

    teacher: TopK | None
    sampled_logprobs: Tensor  # NaN where the mask is False
    mask: Tensor  # bool, True where the server scored the row
    positions: Tensor  # int64, the student's position whose logits belong to the row; 0 in padding
    cu_seqlens: Tensor | None  # [B + 1] int32, where each sequence begins, if they are packed

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        offsets = None if self.cu_seqlens is None else move(self.cu_seqlens)
        return Batch(
            _moved(self.teacher, move),
            move(self.sampled_logprobs),
            move(self.mask),
            move(self.positions),
            offsets,
        )


class Nested(NamedTuple):
    """Rows of several sequences as nested tensors of layout torch.jagged, each [B, rows of the sequence, ...].

    verl passes a teacher in this form. The losses take dense tensors: `ids.values()` and so on are the rows of the
    packed layout.
    """

    ids: Tensor | None  # [B, rows, K] int64, -1 where there is no entry; None if k was 0
    logprobs: Tensor | None  # [B, rows, K] float32
    sampled_logprobs: Tensor  # [B, rows] float32
    mask: Tensor  # [B, rows] bool


@overload
def collate(
    scored: Sequence[Scored],
    layout: Literal["padded", "packed"] = "padded",
    *,
    rows: str = "tokens",
    width: int | None = None,
) -> Batch: ...
@overload
def collate(
    scored: Sequence[Scored],
    layout: Literal["nested"],
    *,
    rows: str = "tokens",
    width: int | None = None,
) -> Nested: ...
@overload
def collate(
    scored: Sequence[Scored], layout: str, *, rows: str = "tokens", width: int | None = None
) -> Batch | Nested: ...
def collate(
    scored: Sequence[Scored],
    layout: str = "padded",
    *,
    rows: str = "tokens",
    width: int | None = None,
) -> Batch | Nested:
    """Combine the scores of several sequences into a batch.

        batch = collate(scored)
        logits = student(input_ids, attention_mask).logits      # [B, W, V], padded on the right
        kd_loss(logits, batch.teacher, mask=batch.mask)

    Layouts:

    - "padded": [B, W, ...], padded on the right to the longest sequence, or to `width`.
    - "packed": [total, ...], the sequences one after another; `cu_seqlens` says where each begins. With
      rows="tokens", the rows match the logits of a model that takes packed sequences.
    - "nested": :class:`Nested`.

    Args:
        scored: the scores of at least one sequence, all with the same k and tail policy, on one device.
        layout: one of the above.
        rows: "tokens": one row for each token of a sequence, so that row j belongs to the student's logits at j. The
            rows before the first scored token, and the last one, are masked. "scored": only the rows that the server
            scored; `positions` says to which of the student's logits they belong. In the packed layout, positions count
            from the beginning of the first sequence: hidden[batch.positions] are the rows of packed hidden states.
        width: W of the padded layout, if the student's input_ids are padded to more than the longest sequence.

    Returns:
        :class:`Batch`, or :class:`Nested`. Where the mask is False, ids are -1, logprobs -inf, and sampled_logprobs
        NaN: pass the mask to the loss, and do not multiply by it.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    check_choice("layout", layout, LAYOUTS)
    check_choice("rows", rows, ROWS)
    _check(scored)
    whole = rows == "tokens"
    parts = [_extended(one, one.start - 1, 1) if whole else one for one in scored]
    lengths = torch.tensor([len(part) for part in parts])
    if layout == "padded":
        width = _width(width, int(lengths.max()))
        parts = [_extended(part, 0, width - len(part)) for part in parts]
    elif width is not None:
        raise ValueError(f"width must be None for layout={layout!r}, got {width}")
    join = torch.stack if layout == "padded" else torch.cat
    sampled = join([part.sampled_logprobs for part in parts])
    mask = join([part.kept for part in parts])
    teachers = [part.teacher for part in parts if part.teacher is not None]
    teacher, ids, logprobs = None, None, None
    if teachers:
        ids = join([one.ids for one in teachers])
        logprobs = join([one.logprobs for one in teachers])
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(mask.device)
    if layout == "nested":
        # All share one tensor of offsets: torch combines nested tensors only if they do.
        jagged = functools.partial(torch.nested.nested_tensor_from_jagged, offsets=ends)
        return Nested(
            None if ids is None else jagged(ids),
            None if logprobs is None else jagged(logprobs),
            jagged(sampled),
            jagged(mask),
        )
    if ids is not None and logprobs is not None:
        teacher = replace(teachers[0], ids=ids, logprobs=logprobs)
    first = torch.tensor([0 if whole else one.start - 1 for one in scored])
    if layout == "packed":
        tokens = torch.tensor([one.start + len(one) for one in scored])
        first = first + tokens.cumsum(0) - tokens
    columns = torch.arange(width or int(lengths.max()))
    real = columns < lengths.unsqueeze(-1)
    positions = first.unsqueeze(-1) + columns
    if layout == "packed":
        packed = positions[real].to(mask.device)
        return Batch(teacher, sampled, mask, packed, ends.to(torch.int32))
    return Batch(teacher, sampled, mask, positions.masked_fill(~real, 0).to(mask.device), None)


def _width(width: int | None, longest: int) -> int:
    """Return the width of padded rows; raise unless it holds the longest sequence."""
    if width is None:
        return longest
    width = check_int("width", width)
    if width < longest:
        raise ValueError(f"width must be at least {longest}, the longest sequence; got {width}")
    return width


def _check(scored: Sequence[Scored]) -> None:
    for one in scored:
        if not isinstance(one, Scored):
            raise TypeError(f"scored must be a list of Scored, got one of {type(one).__name__}")
    if not len(scored):
        raise ValueError("scored must have at least one sequence, got none")
    alike = {
        (
            one.kept.device,
            *((0, "") if one.teacher is None else (one.teacher.ids.shape[-1], one.teacher.tail)),
        )
        for one in scored
    }
    if len(alike) > 1:
        described = ", ".join(
            f"k={k} tail={tail!r} on {device}" for device, k, tail in sorted(alike, key=str)
        )
        raise ValueError(f"scored must have one k, one tail and one device; got {described}")


def _extended(one: Scored, before: int, after: int) -> Scored:
    """Return the scores with masked rows added before and after."""
    teacher = one.teacher
    if teacher is not None:
        teacher = replace(
            teacher,
            ids=_with_rows(teacher.ids, before, after, -1),
            logprobs=_with_rows(teacher.logprobs, before, after, -math.inf),
        )
    sampled = _with_rows(one.sampled_logprobs, before, after, math.nan)
    return Scored(teacher, sampled, _with_rows(one.kept, before, after, False), one.start)


def _with_rows(tensor: Tensor, before: int, after: int, fill: float) -> Tensor:
    rest = tensor.shape[1:]
    return torch.cat(
        [tensor.new_full((before, *rest), fill), tensor, tensor.new_full((after, *rest), fill)]
    )


def _moved(teacher: TopK | None, move: Callable[[Tensor], Tensor]) -> TopK | None:
    if teacher is None:
        return None
    tail = teacher.tail_logprob
    return replace(
        teacher,
        ids=move(teacher.ids),
        logprobs=move(teacher.logprobs),
        tail_logprob=None if tail is None else move(tail),
    )
