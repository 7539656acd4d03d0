"""Requests that make vLLM and SGLang score a given sequence, with all fields that the server needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.core.scalars import check_flag
from fastkd.serving.entries import as_ids, check_k, check_start


class Request(NamedTuple):
    """What to POST to a server: the path below its URL, and the JSON body."""

    path: str
    body: dict[str, Any]


def vllm_params(
    input_ids: Tensor | Sequence[int],
    k: int | None = None,
    *,
    token_ids: Tensor | Sequence[Sequence[int]] | None = None,
    start: int = 1,
) -> dict[str, Any]:
    """Return the arguments of vllm.SamplingParams that make vLLM's Python engine score a prompt.

    One token is generated, because vLLM requires it, and ignored. The temperature is 1; vLLM does not apply a
    temperature to the log-probabilities of a prompt.

    Args:
        input_ids: [S], the prompt with the completion to be scored at its end.
        k: ask for the k most probable tokens of every position; read the result with :func:`from_vllm`. vLLM refuses
            more than its --max-logprobs, 20 by default.
        token_ids: [n, K], in place of k: ask for these tokens, where row i predicts token start + i and -1 is padding;
            read the result with :func:`from_vllm_token_ids`. The sequence's own token is added as column 0. K + 1 must
            be at most --max-logprobs. This takes vLLM 0.33 and VLLM_USE_V2_MODEL_RUNNER=1.
        start: the index of the first token to score, for token_ids. With k, vLLM scores every token.

    Raises:
        TypeError, ValueError: an argument is invalid, or not exactly one of k and token_ids was passed.
    """
    ids = as_ids("input_ids", input_ids)
    start = check_start(start, len(ids))
    params: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0, "detokenize": False}
    if (k is None) == (token_ids is None):
        raise ValueError("exactly one of k and token_ids must be passed")
    if token_ids is None:
        return params | {"prompt_logprobs": check_k(k)}
    named = as_ids("token_ids", token_ids, 2)
    if len(named) != len(ids) - start or not named.numel():
        raise ValueError(
            f"token_ids must have one row of at least one id per scored token, {len(ids) - start}; got shape "
            f"{tuple(named.shape)}"
        )
    rows = torch.cat([ids[start:].unsqueeze(-1), named], -1)
    # The server counts rows from the one that predicts token 1.
    return params | {
        "prompt_logprob_token_ids": rows.tolist(),
        "prompt_logprob_start": start - 1,
    }


def vllm_request(
    input_ids: Tensor | Sequence[int],
    k: int | None = None,
    *,
    token_ids: Tensor | Sequence[Sequence[int]] | None = None,
    start: int = 1,
    model: str | None = None,
) -> Request:
    """Return the request that makes a vLLM server score a prompt.

    Args:
        input_ids: as in :func:`vllm_params`.
        k: as in :func:`vllm_params`. The request goes to /v1/completions; the reply has
            `choices[0].prompt_logprobs`.
        token_ids: as in :func:`vllm_params`. The request goes to /inference/v1/generate; the reply has
            `prompt_token_id_logprobs`.
        start: as in :func:`vllm_params`.
        model: the name of the served model; None: the server's own.

    Raises:
        TypeError, ValueError: as in :func:`vllm_params`.
    """
    params = vllm_params(input_ids, k, token_ids=token_ids, start=start)
    ids = as_ids("input_ids", input_ids).tolist()
    named = {} if model is None else {"model": model}
    if token_ids is not None:
        body = {"token_ids": ids, "sampling_params": params}
        return Request("/inference/v1/generate", named | body)
    del params["detokenize"]  # a field of SamplingParams, but not of this path
    return Request("/v1/completions", named | {"prompt": ids, "stream": False} | params)


def sglang_request(
    input_ids: Tensor | Sequence[int],
    k: int,
    *,
    start: int = 1,
    token_ids: Tensor | Sequence[int] | None = None,
    flat: bool = False,
) -> Request:
    """Return the request that makes an SGLang server score a prompt; the reply has `meta_info`.

    Args:
        input_ids: [S], the prompt with the completion to be scored at its end.
        k: ask for the k most probable tokens of every position. 0: only for the prompt's own tokens.
        start: the index of the first token to score. logprob_start_len is start - 1, because SGLang's first entry is
            always null.
        token_ids: [K], ask for these tokens instead, the same for all positions; k must then be their number.
        flat: ask for the k tokens as base64, which is smaller and faster to read. Older servers lack this.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    ids = as_ids("input_ids", input_ids)
    k, start, flat = check_k(k), check_start(start, len(ids)), check_flag("flat", flat)
    body: dict[str, Any] = {
        "input_ids": ids.tolist(),
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "stream": False,
        "return_logprob": True,
        "logprob_start_len": start - 1,
        "return_text_in_logprobs": False,
    }
    if token_ids is not None:
        named = as_ids("token_ids", token_ids).tolist()
        if len(named) != k:
            raise ValueError(f"k must be the number of token_ids, {len(named)}; got {k}")
        if flat:
            raise ValueError(
                "flat must be False with token_ids, which SGLang lists in one form only"
            )
        return Request("/generate", body | {"top_logprobs_num": 0, "token_ids_logprob": named})
    body["top_logprobs_num"] = k
    if flat and k:
        body |= {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
    return Request("/generate", body)
