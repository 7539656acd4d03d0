"""A client that has many sequences scored by a vLLM or SGLang server."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import functools
import itertools
import json
import os
import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor

from fastkd.call.checks import check_choice
from fastkd.core.scalars import LARGEST, SMALLEST, check_int, check_number
from fastkd.serving.entries import MISSING, check_k
from fastkd.serving.progress import progress_bar
from fastkd.serving.requests import Request, sglang_request, vllm_request
from fastkd.serving.scored import Scored
from fastkd.serving.sglang import from_sglang
from fastkd.serving.vllm import from_vllm, from_vllm_token_ids
from fastkd.teachers.cache.format import need
from fastkd.teachers.topk import TAILS

APIS = ("vllm", "sglang")
_LONGEST_PAUSE = 60.0  # seconds between two attempts
_CONNECT = 30.0  # seconds for a connection; a server that is up accepts at once, however busy it is
_END = 60.0  # seconds for cancelled requests to end
_SHOWN = 500  # characters of a server's message


class ServingError(OSError):
    """A server did not score a sequence. The message has the index of the sequence and what the server said."""


class _Job(NamedTuple):
    """A sequence to be scored: its number in the call, its request, and the function that reads the reply."""

    number: int
    request: Request
    read: Callable[[Any], Scored]


class _TransientError(Exception):
    """A failure after which the same request may succeed; `pause` is how many seconds the server asks to wait."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True, eq=False)
class ServedTeacher:
    """A teacher behind a vLLM or SGLang server.

    A request that fails is sent again after 429, 5xx, a timeout, a broken connection or an answer that is not JSON.
    Any other error ends the call at once. No connection outlives a call, so an instance may be pickled and copied to
    other processes.

    Args:
        url: the address of the server, such as http://localhost:8000; a /v1 at its end is ignored. A user name and
            password in it (http://user:password@host) do not appear in messages.
        k: the number of tokens per row; 0 for the log-probabilities of the sequences' own tokens only. vLLM refuses
            more than its --max-logprobs, 20 by default.
        api: "vllm" or "sglang".
        model: the name of the served model, for vLLM; None: the server's own.
        tail: the tail policy of the :class:`fastkd.TopK`.
        temperature: the temperature at which the loss will temper the teacher. The server's log-probabilities are at
            1, and the policies "bucket" and "truncate" cannot convert them, so another temperature raises here,
            before the server has done the work.
        missing: what to do where values are missing or NaN: "raise", or "drop" the row (see :class:`Scored`).
        vocab_size: V of the teacher, for SGLang (see :func:`from_sglang`).
        concurrency: how many requests are under way at once.
        retries: how often a request is sent again.
        backoff: seconds before the second attempt; each pause is twice the one before, up to 60 s, and is shortened at
            random by up to a half. A longer pause that the server asks for (Retry-After) is respected, up to 60 s.
        timeout: seconds for one attempt, from connecting to the last byte.
        api_key: the key that the server was started with, if any.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        ImportError: httpx is not installed.
    """

    url: str
    _: KW_ONLY
    k: int
    api: str = "vllm"
    model: str | None = None
    tail: str = "bucket"
    temperature: float = 1.0
    missing: str = "raise"
    vocab_size: int | None = None
    concurrency: int = 8
    retries: int = 4
    backoff: float = 0.5
    timeout: float = 600.0
    api_key: str | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.repr}
        values["url"] = _shown(self.url)
        return f"ServedTeacher({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def __post_init__(self) -> None:
        httpx = _httpx()
        for name in ("url", "model", "api_key"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "url"):
                raise TypeError(f"{name} must be a string, got {type(value).__name__}")
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            # A password may have made the url invalid, so nothing before the last "@" is shown.
            shown = self.url.rpartition("@")[2]
            reason = f": {error}" if shown == self.url else ""
            raise ValueError(
                f"url must be the address of a server, got {shown!r}{reason}"
            ) from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"url must begin with http:// or https://, got {_shown(self.url)!r}")
        key = self.api_key
        # The message must not show the key.
        if key is not None and not (key and all("!" <= character <= "~" for character in key)):
            raise ValueError(
                "api_key must be printable ASCII without spaces, and not empty; the one that was passed has other "
                "characters, such as a line break at its end"
            )
        check_choice("api", self.api, APIS)
        check_choice("tail", self.tail, TAILS)
        check_choice("missing", self.missing, MISSING)
        temperature = check_number("temperature", self.temperature, SMALLEST, LARGEST)
        if temperature != 1.0 and self.tail in ("bucket", "truncate"):
            raise ValueError(
                f"temperature must be 1 with tail={self.tail!r}, got {temperature}: a server's log-probabilities are "
                "at temperature 1, and K of them do not determine the tail at another temperature. Pass "
                "tail='renormalize' or tail='renormalize_teacher'"
            )
        settings: dict[str, Any] = {"k": check_k(self.k), "temperature": temperature}
        for name, least in (("concurrency", 1), ("retries", 0), ("vocab_size", 1)):
            if getattr(self, name) is None and name == "vocab_size":
                continue
            settings[name] = check_int(name, getattr(self, name))
            if settings[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {settings[name]}")
        settings["backoff"] = check_number("backoff", self.backoff, 0.0, 3600.0)
        settings["timeout"] = check_number("timeout", self.timeout, 1e-3, 1e6)
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    def score(
        self,
        sequences: Iterable[Tensor | Sequence[int]],
        starts: int | Iterable[int] = 1,
        *,
        token_ids: Iterable[Any] | None = None,
        progress: bool = False,
    ) -> list[Scored]:
        """Have all sequences scored, and return the scores in the order of the sequences.

        Args:
            sequences: token ids [S] each, prompt and completion.
            starts: for each sequence the index of the first token to score, such as the length of its prompt; or one
                number for all. At least 1.
            token_ids: for each sequence the tokens whose log-probabilities are wanted in place of the k most probable
                ones: [n, K] for vLLM, as in :func:`vllm_params`, and [K] for SGLang. k is then not used.
            progress: whether to show a progress bar on stderr; without rich, lines of text.

        Raises:
            ServingError: the server did not score a sequence, or its reply cannot be right.
            TypeError, ValueError: an argument is invalid; the message names it, and the sequence.
        """
        sequences = list(sequences)
        results: list[Scored] = []
        with progress_bar(len(sequences), disable=not progress) as show:
            for one in self.stream(sequences, starts, token_ids=token_ids):
                results.append(one)
                show(len(results))
        return results

    def stream(
        self,
        sequences: Iterable[Tensor | Sequence[int]],
        starts: int | Iterable[int] = 1,
        *,
        token_ids: Iterable[Any] | None = None,
    ) -> Iterator[Scored]:
        """Yield the scores in the order of the sequences, which are read as they are needed.

        At most four times `concurrency` sequences are under way or waiting to be yielded. Arguments and errors: see
        :meth:`score`.
        """
        jobs = self._jobs(sequences, starts, token_ids)
        first = next(jobs, None)
        if first is None:
            return
        jobs = itertools.chain([first], jobs)
        with _Connection(self) as connection:
            waiting: collections.deque[concurrent.futures.Future[Scored]] = collections.deque()
            while True:
                for job in itertools.islice(jobs, 4 * self.concurrency - len(waiting)):
                    waiting.append(connection.submit(job))
                if not waiting:
                    return
                yield connection.wait(waiting.popleft())

    def _jobs(
        self, sequences: Iterable[Any], starts: int | Iterable[int], token_ids: Iterable[Any] | None
    ) -> Iterator[_Job]:
        absent = object()
        if isinstance(starts, Tensor):
            starts = starts.tolist()
        per_sequence: list[Iterator[Any]] = [
            iter(sequences),
            iter(starts) if isinstance(starts, Iterable) else itertools.repeat(starts),
            itertools.repeat(None) if token_ids is None else iter(token_ids),
        ]
        for index in itertools.count():
            ids, start, named = (next(values, absent) for values in per_sequence)
            if ids is absent:
                given = [isinstance(starts, Iterable), token_ids is not None]
                extra = [value is not absent for value in (start, named)]
                if any(have and more for have, more in zip(given, extra, strict=True)):
                    raise ValueError(
                        f"starts and token_ids must have one entry per sequence, {index}; got more"
                    )
                return
            if start is absent or named is absent:
                raise ValueError(
                    f"starts and token_ids must have one entry per sequence, got {index} only"
                )
            try:
                yield self._job(index, ids, start, named)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"sequence {index}: {error}") from error

    def _job(self, index: int, ids: Any, start: Any, named: Any) -> _Job:
        """Return a sequence's request with the function that reads the reply."""
        options: dict[str, Any] = {"start": start, "tail": self.tail, "missing": self.missing}
        if self.api == "sglang":
            k_sent = self.k if named is None else len(named)
            request = sglang_request(ids, k_sent, start=start, token_ids=named)
            options |= {"k": k_sent, "vocab_size": self.vocab_size, "token_ids": named}
            return _Job(
                index, request, lambda reply: from_sglang(_meta_info(reply), ids, **options)
            )
        k = self.k if named is None else None
        request = vllm_request(ids, k, token_ids=named, start=start, model=self.model)
        if named is None:
            return _Job(
                index,
                request,
                lambda reply: from_vllm(_prompt_logprobs(reply), ids, k=self.k, **options),
            )
        return _Job(
            index,
            request,
            lambda reply: from_vllm_token_ids(
                _field(reply, "prompt_token_id_logprobs"), ids, named, **options
            ),
        )


def _field(reply: Any, name: str) -> Any:
    if not isinstance(reply, dict) or name not in reply:
        raise ValueError(f"the reply must have {name!r}, got {_short(json.dumps(reply))}")
    return reply[name]


def _prompt_logprobs(reply: Any) -> Any:
    choices = _field(reply, "choices")
    if not isinstance(choices, list) or len(choices) != 1:
        raise ValueError(f"the reply must have one choice, got {_short(json.dumps(choices))}")
    return _field(choices[0], "prompt_logprobs")


def _meta_info(reply: Any) -> Any:
    return _field(reply[0] if isinstance(reply, list) and len(reply) == 1 else reply, "meta_info")


def _httpx() -> Any:
    return need("httpx", "asking a server", "serving")


@functools.lru_cache(maxsize=1)
def _certificates() -> Any:
    """Return the certificates that connections are checked with; loading them takes longer than a short request."""
    return _httpx().create_ssl_context()


def _others() -> set[asyncio.Task[Any]]:
    """Return the running loop's tasks other than the current one."""
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


class _Connection:
    """The requests of one call, sent by an event loop in a thread of its own.

    So a call may be made where another event loop runs, as in a notebook, and requests can be cancelled at any time.
    """

    def __init__(self, teacher: ServedTeacher) -> None:
        httpx = _httpx()
        self._teacher, self._process = teacher, os.getpid()
        self._url = teacher.url.rstrip("/").removesuffix("/v1")
        self._slots = asyncio.Semaphore(teacher.concurrency)
        key = teacher.api_key
        self._client = httpx.AsyncClient(
            verify=_certificates(),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            limits=httpx.Limits(max_keepalive_connections=teacher.concurrency),
            timeout=httpx.Timeout(teacher.timeout, connect=min(teacher.timeout, _CONNECT)),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fastkd.serving", daemon=True)

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def __enter__(self) -> _Connection:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process != os.getpid():
            return  # a forked process has no thread that runs the loop, and must not close the sockets that it shares
        ended = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        if threading.current_thread() is self._thread:
            # The garbage collector closes an abandoned stream in the loop's thread, which cannot wait for itself.
            ended.add_done_callback(lambda _: self._loop.stop())
            return
        try:
            ended.result(timeout=_END)
        except concurrent.futures.TimeoutError:
            pass  # the thread is a daemon, so a task that does not end cannot keep the process alive
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=_END)

    async def _end(self) -> None:
        for task in _others():
            task.cancel()
        await asyncio.gather(*_others(), return_exceptions=True)
        await self._client.aclose()
        await self._loop.shutdown_asyncgens()  # of answers that were not read to the end
        await asyncio.sleep(0)  # let the loop close the sockets before it stops
        await asyncio.gather(*_others(), return_exceptions=True)

    def submit(self, job: _Job) -> concurrent.futures.Future[Scored]:
        """Send a request as soon as fewer than `concurrency` are under way, and read the reply."""
        return asyncio.run_coroutine_threadsafe(self._ask(job), self._loop)

    def wait(self, future: concurrent.futures.Future[Scored]) -> Scored:
        """Return the scores of a sequence. Every attempt and every pause has a limit, so this ends."""
        if self._process != os.getpid():
            raise ServingError(
                "a stream must be read by the process that has begun it; call stream in the forked process"
            )
        while True:
            done, _ = concurrent.futures.wait([future], timeout=1.0)
            if done:
                return future.result()
            if not self._thread.is_alive():
                raise ServingError("the thread that sends requests has ended; call again")

    async def _ask(self, job: _Job) -> Scored:
        teacher, said = self._teacher, ""
        address = self._url + job.request.path
        async with self._slots:
            for attempt in range(teacher.retries + 1):
                pause = teacher.backoff * 2.0 ** min(attempt, 30) * random.uniform(0.5, 1.0)
                try:
                    content = await asyncio.wait_for(self._attempt(job, address), teacher.timeout)
                    # Another thread decodes the reply, because that may take seconds. It does so at once, because the
                    # JSON is many times as large as the scores.
                    return await asyncio.to_thread(_read, job, content)
                except asyncio.TimeoutError:
                    said = f"no complete answer within {teacher.timeout:g} s"
                except _TransientError as error:
                    said, pause = str(error), max(pause, error.pause)
                if attempt < teacher.retries:
                    await asyncio.sleep(min(pause, _LONGEST_PAUSE))
        attempts = "1 attempt" if not teacher.retries else f"{teacher.retries + 1} attempts"
        raise ServingError(
            f"sequence {job.number}: {_shown(address)} failed after {attempts}: {said}"
        )

    async def _attempt(self, job: _Job, address: str) -> bytes:
        """Send a request once, and return the body of the answer."""
        httpx = _httpx()
        try:
            response = await self._client.post(address, json=job.request.body)
        except httpx.TransportError as error:
            raise _TransientError(f"{type(error).__name__} {error}".strip()) from error
        except httpx.HTTPError as error:
            raise ServingError(f"sequence {job.number}: {_shown(address)}: {error}") from error
        status = response.status_code
        if status == 429 or status >= 500:
            raise _TransientError(f"status {status}, {_message(response)}", _retry_after(response))
        if status != 200:
            raise ServingError(
                f"sequence {job.number}: {_shown(address)} answered with status {status}, {_message(response)}"
            )
        return response.content


def _read(job: _Job, content: bytes) -> Scored:
    """Return the scores that the body of an answer holds."""
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _TransientError(f"the answer is not JSON: {error}") from error
    try:
        return job.read(reply)
    except (TypeError, ValueError, RecursionError) as error:
        raise ServingError(f"sequence {job.number}: {error}") from error


def _message(response: Any) -> str:
    """Return what the server says in an answer that reports an error."""
    if response.has_redirect_location:
        target = _shown(response.headers["Location"])
        return f"a redirect to {target}, which is not followed; pass the url of that server"
    text = response.text
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return _short(text)
    while isinstance(content, dict):
        named = [content[name] for name in ("error", "message", "detail") if content.get(name)]
        if not named:
            break
        content = named[0]
    return _short(content if isinstance(content, str) else json.dumps(content))


def _shown(url: str) -> str:
    """The url without the user name and password that it may hold, for messages."""
    return re.sub(r"^([^/?#]*//)?[^/?#]*@", lambda match: match[1] or "", url)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _retry_after(response: Any) -> float:
    try:
        seconds = float(response.headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0  # a date
    return seconds if seconds > 0 else 0.0
