"""A teacher behind an HTTP server that speaks as vLLM and SGLang do, and misbehaves on request.

Neither server runs here, so the replies are emulated: what vLLM 0.33 and SGLang 0.5.23 list, in which order, with which
ranks, and how they write infinities and NaN. Where vllm is installed, test_serving_parsers.py compares the emulation
with its code.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor


@dataclass
class Logprob:
    """An entry of vLLM's Python engine."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class FlatLogprobs:
    """vLLM's flat form of the entries of all positions."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)


class Bigram:
    """A teacher whose prediction depends on the last token only."""

    def __init__(self, vocabulary: int, seed: int = 0, scale: float = 3.0) -> None:
        logits = scale * torch.randn(
            vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)
        )
        self.table = logits.log_softmax(-1)

    def rows(self, ids: Tensor | list[int]) -> Tensor:
        """[S - 1, V]: row i is the distribution of token i + 1."""
        return self.table[torch.as_tensor(ids)[:-1]]


def vllm_entries(rows: Tensor, ids: list[int], k: int) -> Iterator[list[tuple[int, float, int]]]:
    """Yield (id, log-probability, rank) of the own token and of the K most probable ones, for each row of vLLM."""
    for row, own in zip(rows, ids[1:], strict=True):
        # vLLM counts the logits that are at least as large, so ties raise this rank and NaN makes it 0.
        rank = int((row >= row[own]).sum())
        top = row.topk(k)
        entries = [(own, float(row[own]), rank)]
        entries += [
            (int(token), float(logprob), number)
            for number, (logprob, token) in enumerate(zip(top.values, top.indices, strict=True), 1)
        ]
        yield entries


def vllm_objects(rows: Tensor, ids: list[int], k: int) -> list[dict[int, Logprob] | None]:
    """RequestOutput.prompt_logprobs; an own token among the K has the place of the first and the rank of the second."""
    return [
        None,
        *({i: Logprob(x, rank, str(i)) for i, x, rank in entries} for entries in vllm_entries(rows, ids, k)),
    ]  # fmt: skip


def vllm_flat(rows: Tensor, ids: list[int], k: int) -> FlatLogprobs:
    """RequestOutput.prompt_logprobs with flat_logprobs=True; an own token among the K is listed twice."""
    flat = FlatLogprobs([0], [0])
    for entries in vllm_entries(rows, ids, k):
        flat.start_indices.append(len(flat.token_ids))
        for token, logprob, rank in entries:
            flat.token_ids.append(token)
            flat.logprobs.append(logprob)
            flat.ranks.append(rank)
            flat.decoded_tokens.append(None)
        flat.end_indices.append(len(flat.token_ids))
    return flat


def vllm_json(rows: Tensor, ids: list[int], k: int) -> list[dict[str, Any] | None]:
    """choices[0].prompt_logprobs of /v1/completions."""
    return [
        listed and {
            str(token): {"logprob": max(one.logprob, -9999.0), "rank": one.rank, "decoded_token": f"t{token}"}
            for token, one in listed.items()
        }
        for listed in vllm_objects(rows, ids, k)
    ]  # fmt: skip


def npy(array: Tensor) -> str:
    """An array as vLLM encodes it: an .npy file in base64."""
    import numpy

    buffer = io.BytesIO()
    numpy.save(buffer, array.numpy(), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def sglang_meta(
    rows: Tensor,
    ids: list[int],
    k: int,
    *,
    start_len: int = 0,
    vocabulary: int | None = None,
    token_ids: list[int] | None = None,
    form: str = "lists",
) -> dict[str, Any]:
    """meta_info of /generate; form is "lists", "flat" or "base64"."""
    scored = rows[start_len:]
    reported = [0 if vocabulary is not None and i >= vocabulary - 1 else i for i in ids[start_len:]]
    own = [
        None,
        *(_finite(float(row[i])) for row, i in zip(scored, ids[start_len + 1 :], strict=True)),
    ]
    meta: dict[str, Any] = {
        "input_token_logprobs": [[x, i, None] for x, i in zip(own, reported, strict=True)],
        "prompt_tokens": len(ids),
    }
    if token_ids is not None:
        meta["input_token_ids_logprobs"] = [
            None, *([[_finite(float(row[i])), i, None] for i in token_ids] for row in scored),
        ]  # fmt: skip
    if not k:
        return meta
    top = scored.topk(k)
    if form == "lists":
        meta["input_top_logprobs"] = [
            None,
            *([[_finite(x), i, None] for x, i in zip(values, tokens, strict=True)]
              for values, tokens in zip(top.values.tolist(), top.indices.tolist(), strict=True)),
        ]  # fmt: skip
        return meta
    meta |= {
        "input_top_logprobs_shape": list(top.values.shape),
        "input_top_logprobs_null_prefix": 1,
    }
    if form == "flat":
        meta["input_top_logprobs_val_flat"] = [_finite(x) for x in top.values.flatten().tolist()]
        meta["input_top_logprobs_idx_flat"] = top.indices.flatten().tolist()
        return meta
    for name, array, dtype in (("val", top.values, "float32"), ("idx", top.indices.int(), "int32")):
        content = array.contiguous().numpy().tobytes()
        meta[f"input_top_logprobs_{name}_flat_b64"] = base64.b64encode(content).decode()
        meta[f"input_top_logprobs_{name}_flat_b64_dtype"] = dtype
    return meta


@dataclass
class Fault:
    """What goes wrong with an answer."""

    status: int = 200
    text: str | None = None  # the body, in place of the reply
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0  # seconds before the answer, cut short when the server stops
    truncate: bool = False  # close the connection after half of the body
    close: bool = False  # close the connection without an answer
    change: Callable[[dict[str, Any]], Any] | None = None  # another reply


class Server:
    """An HTTP server on this machine, in a thread, whose teacher is a Bigram.

    fault(ids, attempt) says what goes wrong with the attempt-th request (from 1) for these ids; None: nothing.
    """

    def __init__(
        self, teacher: Bigram, fault: Callable[[list[int], int], Fault | None] | None = None
    ) -> None:
        self.teacher = teacher
        self.fault = fault or (lambda ids, attempt: None)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.attempts: Counter[tuple[int, ...]] = Counter()
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def __enter__(self) -> Server:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def do_POST(self) -> None:
                with outer._counted():
                    outer._answer(self)

            def log_message(self, *_: Any) -> None:
                """Write nothing."""

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:
                """A client that goes away is no error of a test."""

        self._listener = Listener(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self._listener.serve_forever, args=(0.01,), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join(timeout=30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_address[1]}"

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            yield
        finally:
            with self._lock:
                self.under_way -= 1

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        ids = body.get("prompt") or body.get("input_ids") or body.get("token_ids")
        with self._lock:
            self.requests.append({"path": handler.path, **body})
            self.headers.append(dict(handler.headers))
            self.attempts[tuple(ids)] += 1
            attempt = self.attempts[tuple(ids)]
        fault = self.fault(ids, attempt) or Fault()
        if fault.wait:
            self._stopping.wait(fault.wait)
        if fault.close:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        reply = self._reply(handler.path, body, ids)
        if fault.change is not None:
            reply = fault.change(reply)
        content = (json.dumps(reply) if fault.text is None else fault.text).encode()
        handler.send_response(fault.status)
        for name, value in {"Content-Length": str(len(content)), **fault.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2] if fault.truncate else content)
        if fault.truncate:
            handler.close_connection = True

    def _reply(self, path: str, body: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        rows = self.teacher.rows(ids)
        if path == "/v1/completions":
            assert body["max_tokens"] == 1 and body["temperature"] == 1.0
            listed = vllm_json(rows, ids, body["prompt_logprobs"])
            return {"choices": [{"index": 0, "text": "x", "prompt_logprobs": listed}]}
        if path == "/inference/v1/generate":
            params = body["sampling_params"]
            named = torch.tensor(params["prompt_logprob_token_ids"])
            scored = rows[params["prompt_logprob_start"] :]
            values = scored.gather(-1, named.clamp(min=0)).masked_fill(named < 0, -math.inf)
            return {"choices": [{"index": 0}], "prompt_token_id_logprobs": npy(values)}
        assert path == "/generate" and body["return_logprob"]
        meta = sglang_meta(
            rows, ids, body["top_logprobs_num"], start_len=body["logprob_start_len"],
            vocabulary=len(self.teacher.table), token_ids=body.get("token_ids_logprob"),
        )  # fmt: skip
        return {"text": "x", "meta_info": meta}
