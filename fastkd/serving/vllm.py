"""Reading the log-probabilities of prompts that vLLM returns, as Python objects, JSON or .npy."""

from __future__ import annotations

import ast
import base64
import binascii
import math
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.serving.entries import (
    Entries,
    as_floats,
    as_ids,
    as_integers,
    check_listed,
    in_rows,
    most_probable,
    own_logprobs,
    wanted,
    with_scores,
)
from fastkd.serving.scored import Scored

_FLAT = ("start_indices", "end_indices", "token_ids", "logprobs", "ranks")


def from_vllm(
    prompt_logprobs: Any,
    input_ids: Tensor | Sequence[int],
    *,
    k: int,
    start: int = 1,
    tail: str = "bucket",
    missing: str = "raise",
) -> Scored:
    """Read the prompt_logprobs of one prompt.

    vLLM lists at each position the prompt's own token, followed by the K most probable ones; the own token is not
    repeated if it is among them. The K tokens are found by their rank, wherever they stand. A log-probability of -9999,
    which stands for -inf in JSON, becomes -inf.

    Args:
        prompt_logprobs: `RequestOutput.prompt_logprobs`, a list of dict[int, Logprob] or a FlatLogprobs; or
            `choices[i].prompt_logprobs` of the JSON that `/v1/completions` returns. It has one entry per token of the
            prompt, of which the first is None.
        input_ids: [S], the prompt that was sent, with the completion to be scored at its end.
        k: the number of tokens per row. If fewer are listed, the rest have id -1; if more are listed, the k most
            probable ones are taken. 0: the log-probabilities of the prompt's own tokens only.
        start: the index of the first token to score, at least 1. n = S - start tokens are scored.
        tail: the tail policy of the :class:`fastkd.TopK`.
        missing: what to do where values are missing, null or NaN: "raise", or "drop" the row (see :class:`Scored`).

    Returns:
        :class:`Scored`, on the CPU.

    Raises:
        TypeError, ValueError: an argument is invalid; the reply has another number of positions than input_ids, lists
            other tokens, repeats one, or has probabilities with a sum above 1; or values are missing.
    """
    want = wanted(input_ids, k, start, tail, missing)
    length = len(want.input_ids)
    flat = all(hasattr(prompt_logprobs, name) for name in _FLAT)
    if not flat and not isinstance(prompt_logprobs, (list, tuple)):
        raise TypeError(
            f"prompt_logprobs must be a list or a FlatLogprobs, got {type(prompt_logprobs).__name__}; the request must "
            "ask for prompt_logprobs"
        )
    received = len(prompt_logprobs.start_indices if flat else prompt_logprobs)
    if received != length:
        raise ValueError(
            f"prompt_logprobs must have one entry per token of input_ids, {length}; got {received}. The server may "
            "have truncated the prompt"
        )
    if _first_is_listed(prompt_logprobs, flat):
        raise ValueError(
            "prompt_logprobs must have None or no entry for token 0, which nothing predicts; got log-probabilities"
        )
    read = _flat if flat else _listed
    entries = read(prompt_logprobs, want.start)
    return most_probable(entries, own_logprobs(entries, want), want)


def _first_is_listed(prompt_logprobs: Any, flat: bool) -> bool:
    if flat:
        return prompt_logprobs.end_indices[0] > prompt_logprobs.start_indices[0]
    return bool(prompt_logprobs[0])


def _listed(positions: Sequence[Any], start: int) -> Entries:
    """Return the entries of dicts from token ids to Logprob objects, or to the dicts that JSON has for them."""
    ids: list[int] = []
    logprobs: list[Any] = []
    ranks: list[Any] = []
    counts = []
    for position, listed in enumerate(positions[start:], start):
        if listed is not None and not isinstance(listed, Mapping):
            raise TypeError(
                f"prompt_logprobs must be dicts by token id, or None; got {type(listed).__name__} at position "
                f"{position}"
            )
        counts.append(len(listed or ()))
        if not listed:
            continue
        ids.extend(_token_id(key) for key in listed)
        for value in listed.values():
            if isinstance(value, Mapping):
                logprobs.append(value.get("logprob"))
                ranks.append(value.get("rank") or 0)
            elif hasattr(value, "logprob"):
                logprobs.append(value.logprob)
                ranks.append(getattr(value, "rank", None) or 0)
            else:
                raise TypeError(
                    f"prompt_logprobs must hold objects with a logprob, got {type(value).__name__} at position "
                    f"{position}"
                )
    return Entries(
        in_rows(check_listed(as_integers("token ids", ids)), counts, -1),
        in_rows(as_floats("logprob", logprobs), counts, math.nan),
        in_rows(as_integers("rank", ranks), counts, 0),
    )


def _token_id(key: object) -> int:
    if isinstance(key, str) and key.isdecimal():
        return int(key)
    if isinstance(key, (str, bool)):
        raise ValueError(f"token ids must be whole numbers, got {key!r}")
    try:
        return operator.index(key)  # type: ignore[arg-type]  # raises where it does not fit
    except TypeError:
        raise ValueError(f"token ids must be whole numbers, got {key!r}") from None


def _flat(flat: Any, start: int) -> Entries:
    """Return the entries of a FlatLogprobs, which repeats the own token if it is among the K."""
    starts = torch.tensor(flat.start_indices[start:], dtype=torch.int64)
    sizes = torch.tensor(flat.end_indices[start:], dtype=torch.int64) - starts
    width = int(sizes.max()) if len(sizes) else 0
    columns = torch.arange(width)
    real = columns < sizes.unsqueeze(-1)
    index = (starts.unsqueeze(-1) + columns)[real]
    counts = sizes.tolist()
    ids = check_listed(as_integers("token_ids", flat.token_ids))
    ids = in_rows(ids[index], counts, -1)
    if width:
        # Of the two entries of such a token, the later one has its rank among the K.
        ids[:, 0].masked_fill_((ids[:, 1:] == ids[:, :1]).any(-1), -1)
    return Entries(
        ids,
        in_rows(as_floats("logprobs", flat.logprobs)[index], counts, math.nan),
        in_rows(as_integers("ranks", [rank or 0 for rank in flat.ranks])[index], counts, 0),
    )


def from_vllm_token_ids(
    scores: Any,
    input_ids: Tensor | Sequence[int],
    token_ids: Tensor | Sequence[Sequence[int]],
    *,
    start: int = 1,
    tail: str = "bucket",
    missing: str = "raise",
) -> Scored:
    """Read prompt_token_id_logprobs: the teacher's log-probabilities of tokens that the request named.

    If these are the student's K most probable tokens, reverse KL sums over the tokens that matter most to it; all other
    tokens are the tail.

    Args:
        scores: `RequestOutput.prompt_token_id_logprobs`, an array [n, 1 + K]; or `prompt_token_id_logprobs` of the JSON
            that `/inference/v1/generate` returns, an .npy file in base64. Column 0 is the sequence's own token, as
            :func:`vllm_params` and :func:`vllm_request` ask for.
        input_ids: [S], the prompt that was sent.
        token_ids: [n, K], as passed to the request; -1 is padding.
        start: as passed to the request.
        tail: as in :func:`from_vllm`.
        missing: as in :func:`from_vllm`.

    Returns:
        :class:`Scored`, on the CPU.

    Raises:
        TypeError, ValueError: an argument is invalid; scores have another shape, or values are missing.
    """
    ids = as_ids("token_ids", token_ids, 2)
    want = wanted(input_ids, ids.shape[1], start, tail, missing)
    if (ids < -1).any():
        raise ValueError(f"token_ids must be ids, or -1 for padding; got {int(ids.min())}")
    if len(ids) != want.rows:
        raise ValueError(
            f"token_ids must have one row per scored token, {want.rows}; got {len(ids)}"
        )
    values = _npy(scores) if isinstance(scores, (str, bytes)) else _array(scores)
    if tuple(values.shape) != (want.rows, 1 + want.k):
        raise ValueError(
            f"scores must be [n, 1 + K], here {(want.rows, 1 + want.k)}, with the sequence's own token in column 0; "
            f"got {tuple(values.shape)}"
        )
    values = values.detach().cpu().to(torch.float32)
    return with_scores(ids, values[:, 1:], values[:, 0], want)


def _array(scores: Any) -> Tensor:
    try:
        values = torch.as_tensor(scores)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"scores must be an array of numbers, got {type(scores).__name__}: {error}"
        ) from None
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"scores must be an array of numbers, got {values.dtype}")
    return values


_NPY_DTYPES = {"<f4": torch.float32, "<f8": torch.float64, "<f2": torch.float16}


def _npy(data: str | bytes) -> Tensor:
    """Return the array of an .npy file in base64. It is read here because NumPy may not be installed."""
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"scores must be an .npy file in base64: {error}") from None
    if content[:6] != b"\x93NUMPY" or len(content) < 12:
        raise ValueError("scores must be an .npy file in base64; the content is no .npy file")
    size = 2 if content[6] == 1 else 4
    begin = 8 + size
    end = begin + int.from_bytes(content[8:begin], "little")
    try:
        header = ast.literal_eval(content[begin:end].decode("latin-1"))
        dtype, shape = _NPY_DTYPES[header["descr"]], torch.Size(header["shape"])
        by_row = not header["fortran_order"]
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"scores must be an .npy file of floats: {error!r} in its header"
        ) from None
    if not by_row or sys.byteorder != "little":
        raise ValueError("scores must be an .npy file in C order on a little-endian machine")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or len(content) - end != count * dtype.itemsize:
        raise ValueError(
            f"scores must have {count * dtype.itemsize} bytes for shape {tuple(shape)}, got {len(content) - end}"
        )
    if not count:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content[end:]), dtype=dtype).reshape(shape)
