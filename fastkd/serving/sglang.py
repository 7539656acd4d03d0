"""Reading the log-probabilities of prompts that SGLang returns in the meta_info of /generate."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.core.scalars import check_int
from fastkd.serving.entries import (
    Entries,
    Wanted,
    as_floats,
    as_ids,
    as_integers,
    check_listed,
    in_rows,
    most_probable,
    wanted,
    with_scores,
)
from fastkd.serving.scored import Scored

_DTYPES = {"float32": torch.float32, "int32": torch.int32}


def from_sglang(
    meta_info: Mapping[str, Any],
    input_ids: Tensor | Sequence[int],
    *,
    k: int,
    start: int = 1,
    tail: str = "bucket",
    missing: str = "raise",
    vocab_size: int | None = None,
    token_ids: Sequence[int] | Tensor | None = None,
) -> Scored:
    """Read the log-probabilities of one prompt.

    SGLang lists the K most probable tokens of each position, and the log-probability of the prompt's own token
    separately. It sends null for NaN and for infinities, so a probability of exactly 0 cannot be told from a missing
    value.

    Args:
        meta_info: `meta_info` of the JSON that `/generate` returns for one prompt. The K tokens may be lists, flat
            lists, or base64 (return_flat_raw_top_logprobs, return_flat_raw_top_logprobs_b64).
        input_ids: [S], the prompt that was sent, with the completion to be scored at its end.
        k: the number of tokens per row, as in :func:`from_vllm`. With token_ids, their number.
        start: the index of the first token to score, at least 1. The request's logprob_start_len must be start - 1 or
            less: SGLang's first entry is always null.
        tail: the tail policy of the :class:`fastkd.TopK`.
        missing: what to do where values are null or NaN: "raise", or "drop" the row (see :class:`Scored`).
        vocab_size: V of the teacher. SGLang reports the last token of the vocabulary as id 0, so V is needed if
            input_ids contains that token.
        token_ids: the tokens that the request named in token_ids_logprob, the same for all positions. They replace the
            most probable ones.

    Returns:
        :class:`Scored`, on the CPU.

    Raises:
        TypeError, ValueError: an argument is invalid; the reply does not cover the scored tokens, lists other tokens,
            repeats one, or has probabilities with a sum above 1; or values are missing.
    """
    named = None if token_ids is None else as_ids("token_ids", token_ids)
    if named is not None and len(named) != check_int("k", k):
        raise ValueError(f"k must be the number of token_ids, {len(named)}; got {k}")
    want = wanted(input_ids, k, start, tail, missing)
    if not isinstance(meta_info, Mapping):
        raise TypeError(f"meta_info must be a dict, got {type(meta_info).__name__}")
    own = _positions(meta_info, "input_token_logprobs", want, "return_logprob")
    sampled = _sampled(own, want, vocab_size)
    if named is not None:
        listed = _positions(meta_info, "input_token_ids_logprobs", want, "token_ids_logprob")
        entries = _nested("input_token_ids_logprobs", listed)
        return _named(entries, named, sampled, want)
    if not want.k:
        empty = torch.zeros(want.rows, 0)
        entries = Entries(empty.long(), empty, empty.long())
    elif meta_info.get("input_top_logprobs_shape") is not None:
        entries = _flat(meta_info, want)
    else:
        listed = _positions(meta_info, "input_top_logprobs", want, "top_logprobs_num")
        entries = _nested("input_top_logprobs", listed)
    return most_probable(entries, sampled, want)


def _positions(meta_info: Mapping[str, Any], name: str, want: Wanted, option: str) -> Sequence[Any]:
    """Return the entries of the scored tokens, which are the last ones of the server's list."""
    listed = meta_info.get(name)
    if not isinstance(listed, (list, tuple)):
        raise TypeError(
            f"meta_info[{name!r}] must be a list, got {type(listed).__name__}; the request must set {option}"
        )
    _check_covers(name, len(listed), meta_info, want)
    first = listed[0]
    if first is not None and (name != "input_token_logprobs" or _item(first, 0) is not None):
        raise ValueError(
            f"meta_info[{name!r}] must begin with null, as SGLang's lists of prompts do; got {first!r}"
        )
    return listed[len(listed) - want.rows :]


def _check_covers(name: str, positions: int, meta_info: Mapping[str, Any], want: Wanted) -> None:
    """Raise unless a list has more positions than there are scored tokens, and no more than there are input_ids.

    It must be as long as input_token_logprobs, whose ids are compared with input_ids. Otherwise row i of the two lists
    would belong to different tokens.
    """
    length = len(want.input_ids)
    if not want.rows + 1 <= positions <= length:
        raise ValueError(
            f"meta_info[{name!r}] must have between {want.rows + 1} and {length} positions for {length} input_ids and "
            f"start={want.start}; got {positions}. Set logprob_start_len to start - 1, {want.start - 1}; or the server "
            "has truncated the prompt"
        )
    tokens = len(meta_info["input_token_logprobs"])
    if positions != tokens:
        raise ValueError(
            f"meta_info[{name!r}] must have as many positions as meta_info['input_token_logprobs'], {tokens}; got "
            f"{positions}"
        )


def _sampled(own: Sequence[Any], want: Wanted, vocab_size: int | None) -> Tensor:
    """Return the log-probabilities of the scored tokens, after a comparison of their ids with those that were sent."""
    sent = want.tokens
    if vocab_size is not None:
        vocab_size = check_int("vocab_size", vocab_size)
        if (want.input_ids >= vocab_size).any():
            raise ValueError(
                f"input_ids must be in [0, {vocab_size}), got {int(want.input_ids.max())}"
            )
    reported = as_integers("ids of input_token_logprobs", [_item(entry, 1) for entry in own])
    differ = reported != sent
    zeroed = differ & (reported == 0)
    if vocab_size is not None:
        differ &= ~(zeroed & (sent == vocab_size - 1))
    if differ.any():
        row = int(differ.nonzero()[0])
        hint = ""
        if vocab_size is None and zeroed[row]:
            hint = ". SGLang reports the last token of the vocabulary as 0: if that is the cause, pass vocab_size"
        raise ValueError(
            f"input_ids must be the ids that the server scored; at position {want.start + row} the "
            f"server reports token {int(reported[row])} and input_ids has {int(sent[row])}{hint}"
        )
    return as_floats("input_token_logprobs", [_item(entry, 0) for entry in own])


def _item(entry: Any, index: int) -> Any:
    if not isinstance(entry, (list, tuple)) or len(entry) < 2:
        raise TypeError(
            f"meta_info must list [log-probability, id, text] for each token, got {entry!r}"
        )
    return entry[index]


def _nested(name: str, positions: Sequence[Any]) -> Entries:
    for position in positions:
        if position is not None and not isinstance(position, (list, tuple)):
            raise TypeError(
                f"meta_info[{name!r}] must hold lists or null, got {type(position).__name__}"
            )
    counts = [len(position or ()) for position in positions]
    listed = [entry for position in positions for entry in position or ()]
    ids = as_integers(f"ids of {name}", [_item(entry, 1) for entry in listed])
    ids = in_rows(check_listed(ids), counts, -1)
    logprobs = as_floats(name, [_item(entry, 0) for entry in listed])
    return Entries(ids, in_rows(logprobs, counts, math.nan), torch.zeros_like(ids))


def _named(entries: Entries, named: Tensor, sampled: Tensor, want: Wanted) -> Scored:
    """Return the result for the tokens that the request named, in the order of the request."""
    ids = named.expand(want.rows, -1)
    empty = ~(entries.ids >= 0).any(-1, keepdim=True)
    same = entries.ids.unsqueeze(1) == named.unsqueeze(-1)  # [n, K, M]
    absent = ~same.any(-1) & ~empty
    if absent.any():
        row, column = absent.nonzero()[0].tolist()
        raise ValueError(
            f"token_ids must be those of the request; at position {want.start + row} the server lists no entry for "
            f"token {int(named[column])}"
        )
    logprobs = torch.full(ids.shape, math.nan)
    if entries.ids.shape[-1]:
        found = entries.logprobs.gather(-1, same.to(torch.int8).argmax(-1))
        logprobs = torch.where(empty, logprobs, found)
    return with_scores(ids, logprobs, sampled, want)


def _flat(meta_info: Mapping[str, Any], want: Wanted) -> Entries:
    """Return the entries of a flat reply: one list of numbers or base64, its shape, and the number of leading nulls."""
    name = "input_top_logprobs"
    shape, nulls = meta_info[f"{name}_shape"], meta_info.get(f"{name}_null_prefix")
    try:
        rows, width = (check_int("shape", size) for size in shape)
        nulls = check_int("null_prefix", nulls)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"meta_info[{name + '_shape'!r}] must be [rows, k], with an int {name}_null_prefix; got {shape!r} and "
            f"{nulls!r}: {error}"
        ) from None
    _check_covers(name, rows + nulls, meta_info, want)
    if nulls < 1 or rows < want.rows:
        raise ValueError(
            f"meta_info[{name + '_null_prefix'!r}] must be in [1, {rows + nulls - want.rows}], got {nulls}"
        )
    values = _array(meta_info, f"{name}_val_flat", torch.float32, rows * width)
    ids = check_listed(_array(meta_info, f"{name}_idx_flat", torch.int64, rows * width))
    values, ids = (one.reshape(rows, width)[rows - want.rows :] for one in (values, ids))
    return Entries(ids, values, torch.zeros_like(ids))


def _array(meta_info: Mapping[str, Any], name: str, dtype: torch.dtype, count: int) -> Tensor:
    """Return the numbers of a flat field, or of its base64 form."""
    packed = meta_info.get(f"{name}_b64")
    if packed is None:
        read = as_floats if dtype.is_floating_point else as_integers
        values = meta_info.get(name)
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"meta_info[{name!r}] must be a list, got {type(values).__name__}")
        array = read(name, values)
    else:
        stored = meta_info.get(
            f"{name}_b64_dtype", "float32" if dtype.is_floating_point else "int32"
        )
        if stored not in _DTYPES:
            raise ValueError(
                f"meta_info[{name + '_b64_dtype'!r}] must be one of {', '.join(_DTYPES)}; got {stored!r}"
            )
        try:
            content = base64.b64decode(packed, validate=True)
        except (binascii.Error, ValueError, TypeError) as error:
            raise ValueError(f"meta_info[{name + '_b64'!r}] must be base64: {error}") from None
        if len(content) % 4:
            raise ValueError(
                f"meta_info[{name + '_b64'!r}] must have 4 bytes per number, got {len(content)} bytes"
            )
        array = torch.zeros(0)
        if content:
            array = torch.frombuffer(bytearray(content), dtype=_DTYPES[stored])
    if len(array) != count:
        raise ValueError(f"meta_info[{name!r}] must have {count} numbers, got {len(array)}")
    return array.to(dtype)
