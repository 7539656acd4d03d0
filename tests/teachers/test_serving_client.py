"""The client of a served teacher, against a server that misbehaves; batches of its scores; caches built from it."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interpreters import python
from support.paths import PACKAGE
from support.served import Bigram, Fault, Server
from test_cache import model_folder  # noqa: F401 (a fixture)
from torch import Tensor

import fastkd
from fastkd.__main__ import main
from fastkd.call.tail import masses
from fastkd.serving import (
    Batch,
    Nested,
    Scored,
    ServedTeacher,
    ServingError,
    build_cache_from_server,
    collate,
)
from fastkd.teachers.cache import TeacherCache, read_manifest

V = 17
TEACHER = Bigram(V)
LIMIT = 300.0  # seconds; ends a test that hangs

apis = pytest.mark.parametrize("api", ["vllm", "sglang"])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the environment is not asked for this machine's own addresses."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError("a test of the client hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert not [thread for thread in threading.enumerate() if thread.name == "fastkd.serving"]


def sequences(count: int = 12, seed: int = 0) -> list[Tensor]:
    """Different sequences of 3 to 9 tokens; the first token is the number of the sequence."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [
        torch.cat([torch.tensor([number % V]), torch.randint(V, (length,), generator=generator)])
        for number, length in enumerate(lengths)
    ]


def client(server: Server, api: str = "vllm", **changed: Any) -> ServedTeacher:
    options = {"k": 4, "vocab_size": V, "backoff": 0.001, "timeout": 60.0, "concurrency": 4}
    return ServedTeacher(server.url, api=api, **{**options, **changed})


def assert_scores(scored: Scored, ids: Tensor, start: int = 1, k: int = 4) -> None:
    """Compare with the teacher itself."""
    rows = TEACHER.table[ids[start - 1 : -1]]
    assert scored.teacher is not None
    assert torch.equal(scored.teacher.ids, rows.topk(k).indices)
    assert torch.equal(scored.teacher.logprobs, rows.topk(k).values)
    assert torch.equal(scored.sampled_logprobs, rows.gather(-1, ids[start:, None])[:, 0])
    assert scored.kept.all() and scored.start == start


# ---- scores


@apis
def test_scores_come_in_the_order_of_the_sequences(api: str) -> None:
    """The server answers in another order: the first sequence is the slowest."""
    sent = sequences(20)
    starts = [1 + index % 2 for index in range(len(sent))]
    with Server(
        TEACHER, lambda ids, attempt: Fault(wait=0.3 if ids[0] in (0, 9) else 0.0)
    ) as server:
        results = client(server, api).score(sent, starts)
        assert server.most_under_way <= 4
        assert len(server.requests) == len(sent)
    assert len(results) == len(sent)
    for scored, ids, start in zip(results, sent, starts, strict=True):
        assert_scores(scored, ids, start)


def test_requests_are_concurrent_but_not_more_than_allowed() -> None:
    """Every request waits until `concurrency` are under way, so a client that sends fewer gets no answer."""
    together = threading.Barrier(3)

    def meet(ids: list[int], attempt: int) -> None:
        together.wait(timeout=60)

    with Server(TEACHER, meet) as server:
        assert len(client(server, concurrency=3).score(sequences(12))) == 12
        assert server.most_under_way == 3


def test_sequences_are_read_as_they_are_needed() -> None:
    read = []

    def many() -> Iterator[Tensor]:
        for number in range(300):
            read.append(number)
            yield sequences(1, number)[0]

    with Server(TEACHER) as server:
        stream = client(server, concurrency=2).stream(many())
        for number in range(5):
            assert_scores(next(stream), sequences(1, number)[0])
        assert len(read) <= 1 + 5 + 8
        stream.close()


@apis
def test_named_tokens(api: str) -> None:
    sent = sequences(5)
    if api == "sglang":
        named: list[Any] = [[3, 9, 0]] * 5
    else:
        named = [torch.stack([torch.randperm(V)[:3] for _ in range(len(ids) - 2)]) for ids in sent]
    with Server(TEACHER) as server:
        results = client(server, api).score(sent, 2, token_ids=named)
    for scored, ids, tokens in zip(results, sent, named, strict=True):
        rows = TEACHER.table[ids[1:-1]]
        expected = torch.as_tensor(tokens).expand(len(rows), -1)
        assert scored.teacher is not None and torch.equal(scored.teacher.ids, expected)
        assert torch.equal(scored.teacher.logprobs, rows.gather(-1, expected))
        assert torch.equal(scored.sampled_logprobs, rows.gather(-1, ids[2:, None])[:, 0])


@apis
def test_only_the_sampled_tokens(api: str) -> None:
    with Server(TEACHER) as server:
        (scored,) = client(server, api, k=0).score([[3, 4, 5]])
    assert scored.teacher is None
    assert torch.equal(scored.sampled_logprobs, TEACHER.table[[3, 4], [4, 5]])


def test_no_sequences_and_no_scored_tokens() -> None:
    with Server(TEACHER) as server:
        assert client(server).score([]) == [] and not server.requests
        (scored,) = client(server).score([[3, 4]], 2)
        assert (
            len(scored) == 0 and scored.teacher is not None and scored.teacher.ids.shape == (0, 4)
        )


def test_the_model_and_the_key_are_sent() -> None:
    with Server(TEACHER) as server:
        teacher = client(server, model="big", api_key="secret")
        teacher.score([[1, 2]], torch.tensor([1]))
        assert server.requests[0]["model"] == "big"
        assert server.headers[0]["Authorization"] == "Bearer secret"
        assert "secret" not in repr(teacher)
        dataclasses.replace(client(server), url=f"{server.url}/v1/").score([[1, 2]])
        assert "Authorization" not in server.headers[1] and "model" not in server.requests[1]


def test_a_call_inside_a_running_event_loop_and_from_threads() -> None:
    import asyncio

    with Server(TEACHER) as server:
        teacher = pickle.loads(pickle.dumps(client(server)))

        async def inside() -> list[Scored]:
            return teacher.score(sequences(3))

        assert len(asyncio.run(inside())) == 3
        results: list[list[Scored]] = []
        threads = [
            threading.Thread(target=lambda: results.append(teacher.score(sequences(6))))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=LIMIT)
        assert [len(one) for one in results] == [6, 6, 6]


@pytest.mark.parametrize("with_rich", [False, pytest.param(True, marks=pytest.mark.stacks)])
def test_progress(
    with_rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_rich:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with Server(TEACHER) as server:
        client(server).score(sequences(20), progress=True)
        output = capsys.readouterr()
        assert output.out == ""
        if not with_rich:
            assert output.err.splitlines()[-1] == "20 of 20 sequences"
            assert len(output.err.splitlines()) == 11
        client(server).score(sequences(2))
        assert capsys.readouterr().err == ""


# ---- a server that misbehaves


def failing(fault: Fault, times: int, first: int = 3) -> Callable[[list[int], int], Fault | None]:
    """The fault, for the first attempts at the sequences that begin with `first`."""
    return lambda ids, attempt: fault if ids[0] == first and attempt <= times else None


TRANSIENT = {
    "500": (Fault(500, '{"error": {"message": "out of memory"}}'), "status 500, out of memory"),
    "503": (Fault(503, "loading"), "status 503, loading"),
    "429": (Fault(429, '{"detail": "slow down"}', {"Retry-After": "0.01"}), "status 429, slow down"),
    "closed": (Fault(close=True), "RemoteProtocolError"),
    "truncated": (Fault(truncate=True), "RemoteProtocolError"),
    "half JSON": (Fault(text='{"choices": [{"prompt_logp'), "the answer is not JSON"),
    "deep JSON": (Fault(text="[" * 100_000), "the answer is not JSON"),
    "slow": (Fault(wait=30.0), "no complete answer within 1 s"),
}  # fmt: skip


@apis
@pytest.mark.only_where(lambda api, name: name != "slow" or api == "vllm")  # it takes seconds
@pytest.mark.parametrize("name", TRANSIENT)
def test_a_transient_failure_is_tried_again(name: str, api: str) -> None:
    fault, message = TRANSIENT[name]
    timeout = 1.0 if name == "slow" else 60.0
    with Server(TEACHER, failing(fault, times=2)) as server:
        teacher = client(server, api, timeout=timeout, retries=8)
        results = teacher.score(sequences(6))
        assert server.attempts[tuple(sequences(6)[3].tolist())] >= 3
        assert (
            len(server.requests) == 8 or name == "slow"
        )  # a busy machine may make others slow, too
    for scored, ids in zip(results, sequences(6), strict=True):
        assert_scores(scored, ids)
    # The same without end
    with Server(TEACHER, failing(fault, times=10**9)) as server:
        with pytest.raises(
            ServingError, match=rf"^sequence 3: http.* failed after 3 attempts: {message}"
        ):
            client(server, api, timeout=timeout, retries=2).score(sequences(6))
        assert server.attempts[tuple(sequences(6)[3].tolist())] == 3


def test_a_server_that_never_answers_whole_reads() -> None:
    """A server that sends a byte now and then keeps no attempt beyond its timeout."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def dribble() -> None:
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                try:
                    while not stop.wait(0.05):
                        connection.sendall(b" ")
                except OSError:
                    continue

    thread = threading.Thread(target=dribble, daemon=True)
    thread.start()
    try:
        teacher = ServedTeacher(
            f"http://127.0.0.1:{listener.getsockname()[1]}", k=2, timeout=0.5, retries=0
        )
        with pytest.raises(
            ServingError, match="failed after 1 attempt: no complete answer within 0.5 s"
        ):
            teacher.score([[1, 2, 3]])
    finally:
        stop.set()
        listener.close()
        thread.join(timeout=60)


def test_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    teacher = ServedTeacher(f"http://127.0.0.1:{port}", k=2, retries=1, backoff=0.001)
    with pytest.raises(ServingError, match="sequence 0: .* failed after 2 attempts: ConnectError"):
        teacher.score([[1, 2, 3]])


def test_a_password_in_the_url_is_not_shown() -> None:
    with Server(TEACHER, failing(Fault(400, "no"), times=1)) as server:
        host = server.url.removeprefix("http://")
        teacher = ServedTeacher(f"http://user:secret@{host}/v1", k=2)
        assert "secret" not in repr(teacher) and f"url='http://{host}/v1', k=2" in repr(teacher)
        with pytest.raises(
            ServingError, match=f"sequence 3: http://{host}/v1/completions answered"
        ):
            teacher.score(sequences(6))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    teacher = ServedTeacher(f"http://user:secret@127.0.0.1:{port}", k=2, retries=0)
    with pytest.raises(ServingError, match=f"http://127.0.0.1:{port}/v1/completions failed"):
        teacher.score([[1, 2, 3]])


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (400, '{"object": "error", "message": "64 is too many"}', "64 is too many"),
        (400, '{"error": {"message": "too long"}}', "too long"),
        (404, '{"detail": [{"msg": "no such path"}]}', '[{"msg": "no such path"}]'),
        (401, "Unauthorized", "Unauthorized"),
        (422, "x" * 2000, "x" * 500 + "..."),
        (302, "elsewhere", "elsewhere"),
    ],
)  # fmt: skip
def test_other_errors_are_not_tried_again(status: int, text: str, said: str) -> None:
    with Server(TEACHER, failing(Fault(status, text), times=1)) as server:
        message = f"sequence 3: {server.url}/v1/completions answered with status {status}, {said}"
        with pytest.raises(ServingError, match=f"^{re.escape(message)}$"):
            client(server, concurrency=1).score(sequences(6))
        assert server.attempts[tuple(sequences(6)[3].tolist())] == 1


def test_a_redirect_is_named() -> None:
    fault = Fault(307, "", {"Location": "https://elsewhere/v1/completions"})
    with Server(TEACHER, failing(fault, times=1)) as server:
        message = (
            "status 307, a redirect to https://elsewhere/v1/completions, which is not followed"
        )
        with pytest.raises(ServingError, match=f"^sequence 3: .* {message}"):
            client(server).score(sequences(6))


def test_an_answer_that_was_not_read_to_the_end_is_closed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """asyncio would log that a task was destroyed, in about every fifth call."""
    fault = Fault(text="{}", headers={"Content-Encoding": "gzip"})
    with Server(TEACHER, lambda ids, attempt: fault) as server:
        for _ in range(20):
            with pytest.raises(ServingError, match="^sequence 0: .*decompress"):
                client(server).score(sequences(4))
            gc.collect(0)
    assert not [record for record in caplog.records if record.name == "asyncio"]


def _null(reply: dict[str, Any]) -> dict[str, Any]:
    if "meta_info" in reply:
        reply["meta_info"]["input_token_logprobs"][2][0] = None
    else:
        for entry in reply["choices"][0]["prompt_logprobs"][2].values():
            entry["logprob"] = None
    return reply


def _huge(reply: dict[str, Any]) -> dict[str, Any]:
    if "meta_info" in reply:
        reply["meta_info"]["input_top_logprobs"][-1][0][1] = 2**70
    else:
        reply["choices"][0]["prompt_logprobs"][-1][str(2**70)] = {"logprob": -9.0, "rank": 9}
    return reply


def _fewer(reply: dict[str, Any]) -> dict[str, Any]:
    if "meta_info" in reply:
        for name in ("input_token_logprobs", "input_top_logprobs"):
            del reply["meta_info"][name][-1]
    else:
        del reply["choices"][0]["prompt_logprobs"][-1]
    return reply


BAD_REPLIES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "null": (_null, "position 2 are missing or NaN. Pass missing='drop'"),
    "fewer": (_fewer, "truncated"),
    "list": (lambda reply: [1, 2], "the reply must have '(choices|meta_info)', got"),
    "empty": (lambda reply: {}, "the reply must have '(choices|meta_info)', got {}"),
    "number": (lambda reply: 3, "the reply must have '(choices|meta_info)', got 3"),
    "huge": (_huge, "must be numbers that fit in torch.int64"),
    "other": (lambda reply: {"choices": [], "meta_info": {}}, "must"),
}


@apis
@pytest.mark.parametrize("name", BAD_REPLIES)
def test_replies_that_cannot_be_right(name: str, api: str) -> None:
    change, message = BAD_REPLIES[name]
    with Server(TEACHER, failing(Fault(change=change), times=1)) as server:
        with pytest.raises(ServingError, match=f"^sequence 3: .*{message}") as raised:
            client(server, api).score(sequences(6))
        assert isinstance(raised.value.__cause__, (TypeError, ValueError))
        assert server.attempts[tuple(sequences(6)[3].tolist())] == 1


@apis
def test_a_row_is_dropped(api: str) -> None:
    with Server(TEACHER, failing(Fault(change=_null), times=1)) as server:
        results = client(server, api, missing="drop").score(sequences(6))
    assert [bool(one.kept.all()) for one in results] == [True, True, True, False, True, True]
    assert results[3].kept.tolist() == [row != 1 for row in range(len(results[3]))]


def test_a_stream_that_is_abandoned_ends_its_requests() -> None:
    """Within seconds: had the requests not been cancelled, the client would wait a minute for them."""
    begin = time.monotonic()
    with Server(TEACHER, lambda ids, attempt: Fault(wait=120.0) if ids[0] else None) as server:
        stream = client(server, timeout=200.0).stream(sequences(12))
        next(stream)
        stream.close()  # while three requests wait for an answer
    assert time.monotonic() - begin < 45


def test_a_stream_that_the_collector_finds_in_the_thread_of_its_requests() -> None:
    with Server(TEACHER, lambda ids, attempt: Fault(wait=120.0) if ids[0] else None) as server:
        cycle: list[Any] = [client(server, timeout=200.0).stream(sequences(12))]
        next(cycle[0])
        connection = cycle[0].gi_frame.f_locals["connection"]
        thread, loop = connection._thread, connection._loop
        cycle.append(cycle)
        gc.disable()
        try:
            del connection, cycle
            loop.call_soon_threadsafe(gc.collect)
            thread.join(timeout=30)
        finally:
            gc.enable()
        assert not thread.is_alive() and loop.is_closed()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_leaves_a_stream_alone() -> None:
    """It is told so at once, and the process that has begun the stream reads it to the end."""
    sent = sequences(40)
    with Server(TEACHER) as server:
        stream = client(server).stream(sent)
        first = next(stream)
        begin = time.monotonic()
        child = os.fork()
        if not child:
            code = 1
            try:
                next(stream)
            except ServingError as error:
                code = 0 if "read by the process that has begun it" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert time.monotonic() - begin < 30
        for scored, ids in zip([first, *stream], sent, strict=True):
            assert_scores(scored, ids)


def test_an_error_of_the_caller_ends_the_requests() -> None:
    def broken() -> Iterator[list[int]]:
        yield [0, 1, 2]
        raise KeyError("mine")

    with (
        Server(TEACHER, lambda ids, attempt: Fault(wait=120.0)) as server,
        pytest.raises(KeyError, match="mine"),
    ):
        client(server, timeout=200.0).score(broken())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 2], [1.5]],), "sequence 1: input_ids must be integers"),
        (([[1, 2]], 2.5), "sequence 0: start must be an int, got float"),
        (([[1, 2]], 3), r"sequence 0: start must be in \[1, 2\], got 3"),
        (
            ([[1, 2], [3, 4]], [1]),
            "starts and token_ids must have one entry per sequence, got 1 only",
        ),
        (([[1, 2]], [1, 1]), "must have one entry per sequence, 1; got more"),
    ],
)
def test_bad_sequences(arguments: tuple[Any, ...], message: str) -> None:
    with (
        Server(TEACHER) as server,
        pytest.raises((TypeError, ValueError), match=message),
    ):
        client(server).score(*arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"url": "localhost:8000"}, "url must begin with http:// or https://, got 'localhost:8000'"),
        ({"url": "http://a:b"}, "url must be the address of a server, got 'http://a:b'"),
        ({"url": "user:secret@here:80"}, "url must begin with http:// or https://, got 'here:80'"),
        ({"url": "http://user:secret@a:b"}, "url must be the address of a server, got 'a:b'"),
        ({"url": "http://user:se/cret@a"}, "url must be the address of a server, got 'a'"),
        ({"url": 8000}, "url must be a string, got int"),
        ({"model": 3}, "model must be a string, got int"),
        ({"api_key": ""}, "api_key must be printable ASCII without spaces, and not empty"),
        ({"api_key": "secret\n"}, "^((?!secret).)*such as a line break at its end$"),
        ({"api_key": "sécret"}, "^((?!cret).)*$"),
        ({"api": "openai"}, "api must be one of vllm, sglang; got 'openai'"),
        ({"tail": "rest"}, "tail must be one of"),
        ({"missing": "skip"}, "missing must be one of raise, drop"),
        ({"k": -1}, "k must be at least 0, got -1"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"timeout": 0}, "timeout must be in"),
        ({"backoff": -1}, "backoff must be in"),
        ({"temperature": 0}, "temperature must be in"),
        ({"temperature": 2.0}, "temperature must be 1 with tail='bucket', got 2.0: .* Pass tail='renormalize'"),
        ({"temperature": 2.0, "tail": "truncate"}, "temperature must be 1 with tail='truncate'"),
    ],
)  # fmt: skip
def test_bad_settings(changed: dict[str, Any], message: str) -> None:
    options = {"url": "http://127.0.0.1:1", "k": 4, **changed}
    with pytest.raises((TypeError, ValueError), match=message):
        ServedTeacher(**options)


def test_another_temperature_where_it_can_be_had() -> None:
    for tail in ("renormalize", "renormalize_teacher"):
        assert (
            ServedTeacher("http://127.0.0.1:1/", k=4, temperature=2, tail=tail).temperature == 2.0
        )


def test_without_httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(
        ImportError, match=r"asking a server needs httpx: pip install 'fastkd\[serving\]'"
    ):
        ServedTeacher("http://127.0.0.1:1", k=4)


def test_importing_the_parsers_needs_torch_only() -> None:
    script = (
        "import sys, fastkd.serving\n"
        "print([name for name in ('httpx', 'rich', 'safetensors', 'vllm', 'sglang') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    output = python("-c", script, env=environment, timeout=LIMIT)
    assert output.stdout == "[]\n", output.stderr


# ---- batches


def scores(starts: tuple[int, ...] = (1, 3, 2), k: int = 3) -> tuple[list[Scored], list[Tensor]]:
    sent = sequences(len(starts))
    with Server(TEACHER) as server:
        return client(server, k=k).score(sent, starts), sent


def test_rows_of_tokens_belong_to_the_students_logits() -> None:
    """Every kept row of every layout is the teacher's distribution after the student's token at its position."""
    results, sent = scores()
    padded = collate(results)
    input_ids = torch.nn.utils.rnn.pad_sequence(sent, batch_first=True)
    assert isinstance(padded, Batch) and padded.teacher is not None
    assert padded.mask.shape == input_ids.shape == padded.sampled_logprobs.shape
    for b, (ids, start) in enumerate(zip(sent, (1, 3, 2), strict=True)):
        expected = [start - 1 <= j < len(ids) - 1 for j in range(input_ids.shape[1])]
        assert padded.mask[b].tolist() == expected
        for j in padded.mask[b].nonzero()[:, 0].tolist():
            row = TEACHER.table[ids[j]]
            assert torch.equal(padded.teacher.ids[b, j], row.topk(3).indices)
            assert torch.equal(padded.teacher.logprobs[b, j], row.topk(3).values)
            assert padded.sampled_logprobs[b, j] == row[ids[j + 1]]
            assert padded.positions[b, j] == j
    assert (padded.teacher.ids[~padded.mask] == -1).all()
    assert padded.sampled_logprobs[~padded.mask].isnan().all()
    packed = collate(results, "packed")
    flat = torch.cat(sent)
    assert packed.cu_seqlens is not None and packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == [
        0,
        *torch.tensor([len(ids) for ids in sent]).cumsum(0).tolist(),
    ]
    assert packed.teacher is not None and packed.mask.shape == flat.shape
    assert torch.equal(packed.positions, torch.arange(len(flat)))
    for j in packed.mask.nonzero()[:, 0].tolist():
        assert torch.equal(packed.teacher.ids[j], TEACHER.table[flat[j]].topk(3).indices)
        assert packed.sampled_logprobs[j] == TEACHER.table[flat[j], flat[j + 1]]
    assert packed.mask.sum() == padded.mask.sum() == sum(len(one) for one in results)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_all_layouts_have_one_loss(divergence: str) -> None:
    """Logits and hidden states, padded and packed, whole and gathered by position: the same loss and gradient."""
    results, sent = scores()
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(V, 6, generator=generator)  # of each token
    weight = torch.randn(V, 6, generator=generator)
    losses, gradients = [], []
    input_ids = torch.nn.utils.rnn.pad_sequence(sent, batch_first=True)
    for layout, rows in [(a, b) for a in ("padded", "packed") for b in ("tokens", "scored")]:
        head = weight.clone().requires_grad_()
        batch = collate(results, layout, rows=rows)
        assert isinstance(batch, Batch) and batch.teacher is not None
        states = hidden[input_ids if layout == "padded" else torch.cat(sent)]
        if rows == "scored" and layout == "packed":
            states = states[batch.positions]
        elif rows == "scored":
            states = states.gather(1, batch.positions.unsqueeze(-1).expand(-1, -1, 6))
        loss = fastkd.fused_linear_kd_loss(
            states, head, batch.teacher, mask=batch.mask, divergence=divergence
        )
        other = fastkd.kd_loss(
            states @ weight.T, batch.teacher, mask=batch.mask, divergence=divergence
        )
        torch.testing.assert_close(loss, other)
        loss.backward()
        losses.append(loss.detach())
        assert head.grad is not None
        gradients.append(head.grad)
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(gradient, gradients[0])
    # And by hand, in float64, for forward KL with a bucket
    if divergence == "forward_kl":
        total, count = 0.0, 0
        for ids, start in zip(sent, (1, 3, 2), strict=True):
            for token in ids[start - 1 : -1].tolist():
                values, tokens = TEACHER.table[token].double().topk(3)
                q = (hidden[token].double() @ weight.T.double()).log_softmax(-1)[tokens]
                p_rest, q_rest = 1 - values.exp().sum(), 1 - q.exp().sum()
                total += float(
                    (values.exp() * (values - q)).sum() + p_rest * (p_rest / q_rest).log()
                )
                count += 1
        assert float(losses[0]) == pytest.approx(total / count, rel=1e-4)


def test_the_nested_layout() -> None:
    results, sent = scores()
    nested = collate(results, "nested")
    packed = collate(results, "packed")
    assert isinstance(nested, Nested) and nested.ids is not None and nested.logprobs is not None
    assert packed.teacher is not None
    assert torch.equal(nested.ids.values(), packed.teacher.ids)
    assert torch.equal(nested.logprobs.values(), packed.teacher.logprobs)
    assert torch.equal(nested.mask.values(), packed.mask)
    for b, ids in enumerate(sent):
        assert nested.ids[b].shape == (len(ids), 3)
    assert nested.ids.layout == torch.jagged
    assert (nested.sampled_logprobs * 2).values().shape == packed.mask.shape
    assert (nested.sampled_logprobs + nested.mask).shape[0] == 3  # one tensor of offsets
    scored = collate(results, "nested", rows="scored")
    assert [len(row) for row in scored.mask.unbind()] == [len(one) for one in results]


def test_width_and_empty_rows() -> None:
    results, _ = scores()
    batch = collate(results, width=16)
    assert isinstance(batch, Batch) and batch.teacher is not None
    assert batch.mask.shape == (3, 16) and batch.teacher.ids.shape == (3, 16, 3)
    assert (batch.positions[~batch.mask] <= 9).all()
    narrow = collate(results)
    assert torch.equal(batch.mask[:, : narrow.mask.shape[1]], narrow.mask)
    assert not batch.mask[:, narrow.mask.shape[1] :].any()
    with Server(TEACHER) as server:
        empty = client(server).score([[1, 2, 3]], 3)
    for layout in ("padded", "packed", "nested"):
        for rows, count in (("tokens", 3), ("scored", 0)):
            one: Any = collate(empty, layout, rows=rows)
            mask = one.mask.values() if layout == "nested" else one.mask
            assert mask.numel() == count and not mask.any()


def test_a_dropped_row_is_masked() -> None:
    results, sent = scores()
    one = results[1]
    kept = torch.tensor([True, False, *[True] * (len(one) - 2)])
    dropped = dataclasses.replace(one, kept=kept)
    batch = collate([results[0], dropped])
    assert batch.mask[1].nonzero()[:, 0].tolist() == [
        j for j in range(2, len(sent[1]) - 1) if j != 3
    ]


def test_scores_without_a_teacher() -> None:
    results, _ = scores(k=0)
    batch = collate(results)
    assert batch.teacher is None and batch.sampled_logprobs[batch.mask].isfinite().all()
    assert collate(results, "nested").ids is None
    moved = batch.to("cpu")
    assert torch.equal(moved.mask, batch.mask) and moved.teacher is None


def test_scores_and_batches_move() -> None:
    results, _ = scores()
    meta = results[0].to("meta")
    assert (
        meta.teacher is not None and meta.teacher.ids.device.type == meta.kept.device.type == "meta"
    )
    for layout in ("padded", "packed"):
        batch = collate(results, layout)
        assert isinstance(batch, Batch)
        moved = batch.to("meta")
        assert {x.device.type for x in (moved.mask, moved.positions, moved.sampled_logprobs)} == {
            "meta"
        }
        assert moved.teacher is not None and moved.teacher.logprobs.device.type == "meta"
        assert (moved.cu_seqlens is None) == (layout == "padded")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (lambda some: [], {}, "scored must have at least one sequence"),
        (lambda some: [some, 3], {}, "scored must be a list of Scored, got one of int"),
        (lambda some: [some], {"layout": "flat"}, "layout must be one of padded, packed, nested; got 'flat'"),
        (lambda some: [some], {"rows": "all"}, "rows must be one of tokens, scored; got 'all'"),
        (lambda some: [some], {"width": 2}, "width must be at least 3, the longest sequence; got 2"),
        (lambda some: [some], {"width": 9, "layout": "packed"}, "width must be None for layout='packed', got 9"),
        (lambda some: [some, dataclasses.replace(some, teacher=None)], {}, "scored must have one k, one tail and one"),
        (lambda some: [some, some.to("meta")], {}, "scored must have one k, one tail and one device"),
    ],
)  # fmt: skip
def test_bad_batches(arguments: Any, options: dict[str, Any], message: str) -> None:
    with Server(TEACHER) as server:
        (some,) = client(server).score([[1, 2, 3]])
    with pytest.raises((TypeError, ValueError), match=message):
        collate(arguments(some), **options)


# ---- caches


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@apis
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_has_a_row_for_every_token(api: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Row i is the teacher's output after token i, as in a cache that a model has built; the last one included."""
    sent = sequences(7)
    assert any((ids == V - 1).any() for ids in sent)  # which SGLang reports as 0
    seen: list[int] = []
    with Server(TEACHER) as server:
        manifest = build_cache_from_server(
            tmp_path / "cache", client(server, api, vocab_size=None), sent, vocab_size=V, dtype=dtype, shard_examples=3,
            name="bigram", progress=seen.append,
        )  # fmt: skip
    assert manifest.complete and manifest.examples == 7 and manifest.teacher == "bigram"
    assert manifest.kind == "topk" and manifest.k == 4 and manifest.temperature == 1.0
    assert manifest.rows == sum(len(ids) for ids in sent)
    assert seen[-1] == 7 and seen == sorted(seen)
    cache = TeacherCache(tmp_path / "cache")
    cache.verify()
    for example, ids in zip(cache[:], sent, strict=True):
        assert torch.equal(example.input_ids, ids)
        top = TEACHER.table[ids].topk(4)
        teacher = example.teacher
        assert isinstance(teacher, fastkd.TopK) and teacher.tail_logprob is not None
        assert torch.equal(teacher.ids.long(), top.indices)
        assert torch.equal(teacher.logprobs, top.values.to(dtype))
        rest = 1 - top.values.double().exp().sum(-1)
        torch.testing.assert_close(
            teacher.tail_logprob.double(), rest.log(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4
        )  # fmt: skip
        assert torch.equal(teacher.tail_logprob, masses(top.indices, top.values)[1].log().to(dtype))


def test_a_cache_with_dropped_rows(tmp_path: Path) -> None:
    sent = sequences(6)
    with Server(TEACHER, failing(Fault(change=_null), times=10**9)) as server:
        with pytest.raises(ServingError, match="sequence 3: .* position 2 are missing"):
            build_cache_from_server(tmp_path / "a", client(server), sent, vocab_size=V)
        build_cache_from_server(tmp_path / "b", client(server, missing="drop"), sent, vocab_size=V)
    cache = TeacherCache(tmp_path / "b")
    batch = cache.collate(cache[:])
    assert isinstance(batch.teacher, fastkd.TopK)
    present = (batch.teacher.ids >= 0).any(-1)
    assert [tuple(where) for where in (batch.mask & ~present).nonzero().tolist()] == [(3, 1)]


def test_a_cache_of_several_processes(tmp_path: Path) -> None:
    sent = sequences(11)
    with Server(TEACHER) as server:
        build_cache_from_server(
            tmp_path / "whole", client(server), sent, vocab_size=V, shard_examples=2
        )
        asked = len(server.requests)
        for rank in (1, 0):
            seen: list[int] = []
            build_cache_from_server(
                tmp_path / "parts", client(server), sent, vocab_size=V, shard_examples=2, rank=rank,
                world_size=2, progress=seen.append,
            )  # fmt: skip
            assert seen[-1] == 11
        assert asked == 11 and len(server.requests) == 22
    assert read_manifest(tmp_path / "parts") == read_manifest(tmp_path / "whole")


KILLED = """
import sys, torch
from fastkd.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def ids_file(path: Path, sent: list[Tensor]) -> Path:
    path.write_text("".join(json.dumps(ids.tolist()) + "\n" for ids in sent))
    return path


@apis
@pytest.mark.heavy_with(api="sglang")
def test_a_killed_build_resumes_to_the_same_bytes(api: str, tmp_path: Path) -> None:
    """The server holds back the seventh sequence until the build is killed; two complete shards remain."""
    sent = sequences(10)
    arguments = ["--ids", str(ids_file(tmp_path / "ids", sent)), "--vocab-size", str(V), "--k", "4"]
    arguments += ["--shard-examples", "2", "--concurrency", "2", "--api", api]

    def command(url: str, path: Path) -> list[str]:
        return ["cache", "build", str(path), "--server", url, *arguments]

    with Server(TEACHER) as server:
        assert main(command(server.url, tmp_path / "whole")) == 0
    with Server(TEACHER, failing(Fault(wait=LIMIT), times=10**9, first=6)) as server:
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, *command(server.url, tmp_path / "killed")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            shard, deadline = (
                tmp_path / "killed" / "shard-000002.safetensors",
                time.monotonic() + LIMIT / 2,
            )
            while not shard.exists() and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            child.kill()
            output = child.communicate(timeout=LIMIT / 4)
        assert shard.exists(), output
    assert not read_manifest(tmp_path / "killed").complete
    with Server(TEACHER) as server:
        assert main(command(server.url, tmp_path / "killed")) == 0
        assert len(server.requests) <= 6  # the first shards were not asked for again
        assert main(command(server.url, tmp_path / "killed")) == 0  # nothing is left to do
        assert len(server.requests) <= 6
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    TeacherCache(tmp_path / "killed").verify()


def test_a_build_that_failed_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    sent = sequences(10)
    options: dict[str, Any] = {"vocab_size": V, "shard_examples": 2}
    with Server(TEACHER, failing(Fault(400, "no"), times=1, first=7)) as server:
        with pytest.raises(ServingError, match="sequence 7: .* status 400, no"):
            build_cache_from_server(tmp_path / "broken", client(server), sent, **options)
        build_cache_from_server(tmp_path / "broken", client(server), sent, **options)
        build_cache_from_server(tmp_path / "whole", client(server), sent, **options)
        with pytest.raises(ValueError, match="was begun with a different sequence 1"):
            build_cache_from_server(
                tmp_path / "broken", client(server), [sent[0], *sent[2:]], **options
            )
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": 3}, "teacher must be a ServedTeacher, got int"),
        ({"k": 0}, "teacher.k must be at least 1 for a cache, got 0"),
        ({"temperature": 2.0, "tail": "renormalize"}, "teacher.temperature must be 1 for a cache, got 2.0"),
        ({"sequences": []}, "sequences must be at least one, got none"),
    ],
)  # fmt: skip
def test_bad_caches(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = {"k": 4, **changed}
    teacher, sent = options.pop("teacher", None), options.pop("sequences", [[1, 2]])
    teacher = teacher or ServedTeacher("http://127.0.0.1:1", **options)
    with pytest.raises((TypeError, ValueError), match=message):
        build_cache_from_server(tmp_path / "cache", teacher, sent, vocab_size=V)
    assert not (tmp_path / "cache").exists()


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTKD_API_KEY", "secret")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no bar of rich
    path, sent = tmp_path / "cache", sequences(5)
    with Server(TEACHER) as server:
        arguments = [
            "cache",
            "build",
            str(path),
            "--server",
            server.url,
            "--k",
            "3",
            "--dtype",
            "bfloat16",
        ]
        arguments += ["--ids", str(ids_file(tmp_path / "ids", sent)), "--vocab-size", str(V)]
        assert main([*arguments, "--served-model", "big", "--sequences", "4"]) == 0
        assert server.headers[0]["Authorization"] == "Bearer secret"
        assert {request["model"] for request in server.requests} == {"big"}
    output = capsys.readouterr()
    assert output.out == f"{path}: 4 examples, {sum(len(ids) for ids in sent[:4])} rows\n"
    assert output.err.splitlines()[-1] == "4 of 4 sequences"
    assert main(["cache", "info", str(path), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["kind"], info["k"], info["teacher"]) == ("topk", 3, "big")
    assert info["dtypes"]["logprobs"] == "bfloat16" and info["complete"]
    assert main(["cache", "verify", str(path)]) == 0


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        (["--kind", "hidden"], 1, "--kind must be topk with --server, got hidden"),
        (["--temperature", "2"], 1, "--temperature must be 1 with --server, got 2.0: a server's"),
        (["--vocab-size", "3"], 1, "input_ids must be in [0, 3)"),
        (["--ids", os.devnull], 1, "sequences must be at least one, got none"),
        (["--ids", "{tmp}/bad"], 2, "whose line 2 is none"),
        (["--ids", "nowhere"], 2, "--ids: must be a UTF-8 text file, got 'nowhere'"),
        (["--text", os.devnull], 2, "not allowed with argument"),
        (["--model", "{tmp}"], 2, "--model"),
        (["--server", "here"], 1, "url must begin with http:// or https://, got 'here'"),
        (["--timeout", "0"], 2, "--timeout: must be positive and finite, got '0'"),
        (["--api", "tgi"], 2, "--api: invalid choice: 'tgi'"),
        (["--k", "16"], 1, "v1/completions answered with status 400, Requested prompt logprobs of 16, which"),
    ],
)  # fmt: skip
def test_bad_commands(
    changed: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_text("[1, 2]\n[1, true]\n")
    refuse = Fault(400, '{"message": "Requested prompt logprobs of 16, which is greater than 10"}')
    with Server(TEACHER, lambda ids, attempt: refuse if "16" in changed else None) as server:
        arguments = ["cache", "build", str(tmp_path / "cache"), "--server", server.url, "--k", "2"]
        arguments += [
            "--ids",
            str(ids_file(tmp_path / "ids", sequences(3))),
            "--vocab-size",
            str(V),
        ]
        arguments += [one.format(tmp=tmp_path) for one in changed]
        if code == 2:
            with pytest.raises(SystemExit) as left:
                main(arguments)
            assert left.value.code == 2
        else:
            assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_options_that_miss_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 17}}')
    (tmp_path / "text").write_text("one two")
    ids = str(ids_file(tmp_path / "ids", sequences(2)))
    build = ["cache", "build", str(tmp_path / "cache")]
    server = ["--server", "http://127.0.0.1:1"]
    for options, message in (
        ([*server, "--ids", ids], "--vocab-size or --tokenizer must be passed with --server"),
        ([*server, "--text", str(tmp_path / "text"), "--vocab-size", "17"], "--tokenizer must be passed with --server"),
        (["--model", str(tmp_path), "--ids", ids, "--kind", "topk"], "--ids must be passed with --server only"),
        (["--model", str(tmp_path), "--text", ids, "--api", "vllm"], "--api must be passed with --server only"),
        (["--model", str(tmp_path), "--text", ids], "--kind must be one of hidden, topk, dense with --model"),
    ):  # fmt: skip
        assert main([*build, *options]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.stacks
def test_a_text_is_cut_as_for_a_model(
    model_folder: Path,  # noqa: F811 (the fixture that is imported)
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A cache from a server has the sequences and the tokenizer of one from a model, and fits the same student."""
    cut = ["--text", str(tmp_path / "text"), "--length", "10", "--shard-examples", "2", "--k", "3"]
    with Server(Bigram(50)) as server:
        source = ["--server", server.url, "--tokenizer", str(model_folder), *cut]
        assert main(["cache", "build", str(tmp_path / "served"), *source, "--kind", "topk"]) == 0
    local = ["--model", str(model_folder), *cut, "--kind", "topk"]
    assert main(["cache", "build", str(tmp_path / "local"), *local]) == 0
    capsys.readouterr()
    served, own = (read_manifest(tmp_path / name) for name in ("served", "local"))
    assert served.tokenizer_sha256 == own.tokenizer_sha256 is not None
    assert (served.vocab_size, served.rows, served.k) == (own.vocab_size, own.rows, own.k)
    pairs = zip(
        TeacherCache(tmp_path / "served")[:], TeacherCache(tmp_path / "local")[:], strict=True
    )
    assert all(torch.equal(one.input_ids, other.input_ids) for one, other in pairs)
    with pytest.raises(SystemExit):
        main(
            [
                "cache",
                "build",
                str(tmp_path / "x"),
                "--server",
                "http://127.0.0.1:1",
                *cut,
                "--tokenizer",
                "nowhere",
            ]
        )
    assert "--tokenizer: must be a local Hugging Face folder" in capsys.readouterr().err
