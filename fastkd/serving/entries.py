"""What all parsers share: they take the K most probable tokens from the entries that a server lists at a position."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.call.checks import check_choice
from fastkd.call.tail import MOST
from fastkd.core.scalars import check_int
from fastkd.serving.scored import Scored
from fastkd.teachers.topk import TAILS, TopK

MISSING = ("raise", "drop")

# vLLM writes -9999 for -inf, which JSON cannot express.
_ZERO = -9999.0


class Entries(NamedTuple):
    """What a server lists at n positions, in the server's order.

    ids [n, M] are token ids, and -1 where a position has fewer than M entries. logprobs [n, M] are NaN where the server
    sent null. ranks [n, M] are 0 where the rank is unknown.
    """

    ids: Tensor
    logprobs: Tensor
    ranks: Tensor


class Wanted(NamedTuple):
    """The checked arguments that all parsers have."""

    input_ids: Tensor  # [S] int64 on the CPU
    k: int
    start: int
    tail: str
    missing: str

    @property
    def rows(self) -> int:
        """The number n of tokens that are scored."""
        return len(self.input_ids) - self.start

    @property
    def tokens(self) -> Tensor:
        """[n], the scored tokens."""
        return self.input_ids[self.start :]


def wanted(
    input_ids: Tensor | Sequence[int], k: int, start: int, tail: str, missing: str
) -> Wanted:
    """Return the checked arguments of a parser."""
    ids = as_ids("input_ids", input_ids)
    check_choice("tail", tail, TAILS)
    check_choice("missing", missing, MISSING)
    return Wanted(ids, check_k(k), check_start(start, len(ids)), tail, missing)


def check_k(k: object) -> int:
    """Return the number of tokens per position; raise unless it is an int that is at least 0."""
    k = check_int("k", k)
    if k < 0:
        raise ValueError(
            f"k must be at least 0, got {k}; for the whole vocabulary, pass its number of tokens"
        )
    return k


def check_start(start: object, length: int) -> int:
    """Return the index of the first scored token; raise unless it is in [1, length]."""
    start = check_int("start", start)
    if not 1 <= start <= length:
        raise ValueError(
            f"start must be in [1, {length}], got {start}: it is the index of the first scored token, and nothing "
            "predicts token 0"
        )
    return start


def as_ids(argument: str, value: Any, dimensions: int = 1) -> Tensor:
    """Return token ids as an int64 tensor on the CPU; they may come as lists, as an array or as a tensor."""
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{argument} must be token ids, got {type(value).__name__}: {error}"
        ) from None
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise TypeError(f"{argument} must be integers, got {ids.dtype}")
    if argument == "input_ids" and ids.numel() and ids.min() < 0:
        raise ValueError(
            f"input_ids must not be negative, got {int(ids.min())}; labels that ignore tokens are no token ids"
        )
    shape = "[S]" if dimensions == 1 else "[n, K]"
    if ids.dim() != dimensions or (dimensions == 1 and not len(ids)):
        raise ValueError(f"{argument} must be {shape}, and not empty; got {tuple(ids.shape)}")
    return ids.detach().cpu().long()


def as_floats(what: str, values: Iterable[Any]) -> Tensor:
    """Return numbers of JSON or Python as float32, with NaN for null."""
    return _as_tensor(
        what, [math.nan if value is None else value for value in values], torch.float32
    )


def as_integers(what: str, values: Iterable[Any]) -> Tensor:
    """Return whole numbers of JSON or Python as int64."""
    return _as_tensor(what, list(values), torch.int64)


def _as_tensor(what: str, values: list[Any], dtype: torch.dtype) -> Tensor:
    usual = (int,) if dtype == torch.int64 else (int, float)
    kind = numbers.Integral if dtype == torch.int64 else numbers.Real
    for value in values:
        if type(value) not in usual and (isinstance(value, bool) or not isinstance(value, kind)):
            raise TypeError(f"{what} must be numbers, got {value!r}")
    try:
        return torch.tensor(values, dtype=dtype)
    except (RuntimeError, OverflowError, ValueError) as error:
        raise ValueError(f"{what} must be numbers that fit in {dtype}: {error}") from None


def check_listed(ids: Tensor) -> Tensor:
    """Return the token ids that a server lists; raise if one is negative, since -1 stands for no entry from here on."""
    if ids.numel() and ids.min() < 0:
        raise ValueError(f"token ids must not be negative, got {int(ids.min())}")
    return ids


def in_rows(values: Tensor, counts: Sequence[int], fill: float) -> Tensor:
    """Return [n, M] from values that follow each other, counts[i] of them in row i."""
    sizes = torch.tensor(counts, dtype=torch.int64)
    width = int(sizes.max()) if len(counts) else 0
    rows = values.new_full((len(counts), width), fill)
    rows[torch.arange(width) < sizes.unsqueeze(-1)] = values
    return rows


def own_logprobs(entries: Entries, want: Wanted) -> Tensor:
    """Return the log-probability of each scored token, [n]; NaN where its position lists nothing.

    Raises:
        ValueError: a position lists tokens, but not the one that was sent.
    """
    is_own = entries.ids == want.tokens.unsqueeze(-1)
    absent = ~is_own.any(-1) & (entries.ids >= 0).any(-1)
    if absent.any():
        row = int(absent.nonzero()[0])
        raise ValueError(
            f"input_ids must be the ids that the server scored; at position {want.start + row} it lists no entry for "
            f"token {int(want.tokens[row])}"
        )
    if not entries.ids.shape[-1]:
        return entries.logprobs.new_full((want.rows,), math.nan)
    first = is_own.to(torch.int8).argmax(-1, keepdim=True)
    return entries.logprobs.gather(-1, first).squeeze(-1).masked_fill(~is_own.any(-1), math.nan)


def most_probable(entries: Entries, sampled: Tensor, want: Wanted) -> Scored:
    """Return the K most probable entries of each position with the log-probability of its own token, `sampled` [n].

    Raises:
        ValueError: an entry cannot be right, or values are missing and want.missing is "raise".
    """
    ids, ranks = entries.ids, entries.ranks
    _check_ids(ids, want)
    logprobs = entries.logprobs.masked_fill(entries.logprobs <= _ZERO, -math.inf)
    sampled = sampled.masked_fill(sampled <= _ZERO, -math.inf)
    listed = ids >= 0
    bad = (logprobs.isnan() & listed).any(-1) | sampled.isnan()
    if want.k:
        bad |= ~listed.any(-1)
    if want.missing == "raise" and bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"log-probabilities must be numbers; those of token {int(want.tokens[row])} at position "
            f"{want.start + row} are missing or NaN. Pass missing='drop' to leave such rows out"
        )
    _check_masses(logprobs.masked_fill(~listed, -math.inf), sampled, ~bad, want)
    sampled = sampled.masked_fill(bad, math.nan)
    if not want.k:
        return Scored(None, sampled, ~bad, want.start)
    # Sort by rank, and by log-probability where ranks are equal; if a rank of the row is unknown, sort by
    # log-probability alone. vLLM's K tokens have ranks 1 to K, even if some are equally probable; an own token that is
    # not among them has a higher rank.
    known = ((ranks >= 1) | ~listed).all(-1, keepdim=True)
    order = torch.where(listed, logprobs, -math.inf).argsort(stable=True, descending=True)
    by_rank = torch.where(known, ranks, 1).masked_fill(~listed, torch.iinfo(torch.int64).max)
    order = order.gather(-1, by_rank.gather(-1, order).argsort(stable=True))[:, : want.k]
    ids = ids.gather(-1, order).masked_fill(bad.unsqueeze(-1), -1)
    logprobs = logprobs.gather(-1, order)
    if ids.shape[-1] < want.k:
        ids = F.pad(ids, (0, want.k - ids.shape[-1]), value=-1)
        logprobs = F.pad(logprobs, (0, want.k - logprobs.shape[-1]))
    logprobs = logprobs.masked_fill(ids < 0, -math.inf)
    return Scored(TopK(ids, logprobs, want.tail), sampled, ~bad, want.start)


def _check_ids(ids: Tensor, want: Wanted) -> None:
    ordered = ids.sort(-1).values
    repeats = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(-1)
    if repeats.any():
        row = int(repeats.nonzero()[0])
        raise ValueError(
            f"token ids must be distinct at a position; position {want.start + row} repeats some"
        )


def _check_masses(logprobs: Tensor, sampled: Tensor, kept: Tensor, want: Wanted) -> None:
    """Raise if the probabilities of a position, or that of its own token alone, exceed 1 by more than rounding."""
    total = torch.maximum(logprobs.double().exp().sum(-1), sampled.double().exp())
    bad = (total > MOST) & kept
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"log-probabilities must be natural logarithms of probabilities; those at position {want.start + row} have "
            f"a sum of {float(total[row]):.4g}. A vLLM server must run with --logprobs-mode raw_logprobs, its default"
        )


def with_scores(ids: Tensor, logprobs: Tensor, sampled: Tensor, want: Wanted) -> Scored:
    """Return the result for tokens that the request named: ids and logprobs [n, K], in the request's order.

    An id of -1 is padding.
    """
    ranks = torch.arange(1, want.k + 1).expand(ids.shape)
    return most_probable(Entries(ids, logprobs, ranks), sampled, want)
