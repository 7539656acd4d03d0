"""A stand-in for a vLLM server: the JSON of its /v1/completions with prompt_logprobs, over a teacher in this process.

This is not vLLM. It lets examples/on_policy.py show a served teacher on a machine without a GPU. It scores prompts and
generates nothing. It uses the standard library only; the teacher is a function that you pass:

    with StandIn(score) as url:
        teacher = fastkd.serving.ServedTeacher(url, k=20)

To use a real server, pass its address instead of `url`.
"""

import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Position(NamedTuple):
    """The teacher's distribution of one token of the prompt, given the tokens before it."""

    own: float  # the log-probability of the prompt's own token
    rank: int  # the rank of the own token, from 1
    top: Sequence[tuple[int, float]]  # the K most probable tokens and their log-probabilities


# (token ids [S], K) -> the distributions of tokens 1 to S - 1; nothing predicts token 0.
Score = Callable[[list[int], int], Sequence[Position]]

MODEL = "stand-in"


def prompt_logprobs(ids: list[int], positions: Sequence[Position]) -> list[dict[str, Any] | None]:
    """Return vLLM's list: null for token 0, then for each token a dict from token ids to their log-probabilities.

    The own token comes first and the K most probable ones follow. An own token that is among the K is listed once.
    """
    listed: list[dict[str, Any] | None] = [None]
    for own, position in zip(ids[1:], positions, strict=True):
        entries = {str(own): _entry(position.own, position.rank)}
        for rank, (token, logprob) in enumerate(position.top, start=1):
            entries[str(token)] = _entry(logprob, rank)
        listed.append(entries)
    return listed


def _entry(logprob: float, rank: int) -> dict[str, Any]:
    # JSON has no -inf, and vLLM writes -9999 for it. json.dumps writes every other float with enough digits to read the
    # same number back.
    return {"logprob": max(logprob, -9999.0), "rank": rank, "decoded_token": None}


class StandIn:
    """The server, in a thread, on a free port of this machine; a context manager that returns its address."""

    def __init__(self, score: Score, max_logprobs: int = 20) -> None:
        self._score, self._max_logprobs = score, max_logprobs
        self._one_at_a_time = threading.Lock()  # passes in parallel would share the same cores

    def __enter__(self) -> str:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # one connection serves many requests

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, reply = stand_in._reply(self.path, body)
                content = json.dumps(reply, allow_nan=False).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Do nothing; the base class writes a line per request."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False  # a client may keep its connection open
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _reply(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON of an answer."""
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        ids, k = body.get("prompt"), body.get("prompt_logprobs")
        if not (isinstance(ids, list) and ids and all(type(token) is int for token in ids)):
            return _refusal(f"prompt must be a list of token ids, got {ids!r}")
        if type(k) is not int or not 0 <= k <= self._max_logprobs:
            return _refusal(f"prompt_logprobs must be in [0, {self._max_logprobs}], got {k!r}")
        with self._one_at_a_time:
            positions = self._score(ids, k)
        choice = {
            "index": 0,
            "text": "",  # a real server returns the generated token here
            "logprobs": None,
            "finish_reason": "length",
            "prompt_logprobs": prompt_logprobs(ids, positions),
        }
        usage = {"prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)}
        reply = {"object": "text_completion", "model": MODEL, "choices": [choice], "usage": usage}
        return 200, reply


def _refusal(message: str) -> tuple[int, dict[str, Any]]:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    return 400, {"error": error}
