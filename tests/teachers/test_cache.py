"""The teacher cache: round trips, kills and resumes, parts, corruption of every kind, and bad arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import interpreters
from support.paths import PACKAGE
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastkd
from fastkd.__main__ import main
from fastkd.teachers.cache import (
    Batch,
    CacheError,
    CacheWriter,
    Example,
    IncompleteError,
    LockedError,
    ManifestError,
    ShardError,
    TeacherCache,
    build_cache,
    read_manifest,
)
from fastkd.teachers.cache.build import tokenizer_sha256

V, H, K = 50, 8, 5
KINDS = ("hidden", "topk", "dense")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (3, 1, 4, 1, 5, 9, 2, 6)  # eight sequences make two shards of three and one of two
SHARD, SECOND, HEAD = "shard-000000.safetensors", "shard-000001.safetensors", "head.safetensors"


class Teacher(nn.Module):
    """The parts of a Hugging Face model that a cache needs: an embedding and a head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(V, H, generator=generator))
        self.head = nn.Linear(H, V, bias=bias)
        for parameter in self.head.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def base_model(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embedding[ids].cumsum(-2))

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.base_model(ids).last_hidden_state))


def sequences(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(V, (length,), generator=generator) for length in lengths]


def python(script: str, *arguments: str) -> str:
    """The output of a script in its own interpreter."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    done = interpreters.python("-c", script, *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(path: Path, kind: str = "topk", **options: Any) -> Path:
    build_cache(
        path, Teacher(), sequences(), **{"kind": kind, "k": K, "shard_examples": 3} | options
    )
    return path


def settings(kind: str = "topk", **changed: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"hidden": {"weight": torch.ones(V, H)}, "topk": {"k": K}, "dense": {}}[
        kind
    ]
    return {"kind": kind, "vocab_size": V, "shard_examples": 3, **own, **changed}


def topk(rows: int, **changed: Any) -> fastkd.TopK:
    logits = torch.randn(rows, V, generator=torch.Generator().manual_seed(2))
    return dataclasses.replace(fastkd.TopK.from_logits(logits, K), **changed)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def tensors_of(example: Example | Batch) -> dict[str, Tensor]:
    teacher = example.teacher
    results = {"input_ids": example.input_ids}
    if isinstance(teacher, Tensor):
        return results | {"logits": teacher}
    return results | {
        name: value for name, value in vars(teacher).items() if isinstance(value, Tensor)
    }


def assert_same(first: Example | Batch, second: Example | Batch) -> None:
    actual, reference = tensors_of(first), tensors_of(second)
    assert actual.keys() == reference.keys()
    for name, value in actual.items():
        assert value.dtype == reference[name].dtype
        assert torch.equal(value, reference[name]), name


def read_all(path: Path, **options: Any) -> list[Example]:
    return list(TeacherCache(path, **options))  # type: ignore[call-overload]  # by index, until IndexError


# Indexing a cache


def test_a_slice_is_a_list_of_examples(tmp_path: Path) -> None:
    build(tmp_path / "cache", "topk")
    for options in ({}, {"rank": 1, "world_size": 2}):
        cache = TeacherCache(tmp_path / "cache", **options)  # type: ignore[arg-type]
        every = [cache[index] for index in range(len(cache))]
        for part in (
            slice(0, 2),
            slice(None),
            slice(-2, None),
            slice(None, None, -1),
            slice(9, 20),
        ):
            actual = cache[part]
            assert isinstance(actual, list) and len(actual) == len(every[part])
            for value, expected_value in zip(actual, every[part], strict=True):
                assert_same(value, expected_value)
        batch = cache.collate(cache[:2])
        assert batch.input_ids.shape[0] == 2
        for last in (-1, np.int64(len(cache) - 1), torch.tensor(len(cache) - 1)):
            assert_same(cache[last], every[-1])  # type: ignore[call-overload]


def test_the_message_names_a_wrong_index(tmp_path: Path) -> None:
    build(tmp_path / "cache", "topk")
    cache = TeacherCache(tmp_path / "cache")
    for wrong in ("0", None, 1.0, [0, 1], (0, 1), torch.tensor([0, 1])):
        with pytest.raises(TypeError, match="index must be an integer or a slice, got"):
            cache[wrong]  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="index must be a slice of integers"):
        cache["a":"b"]  # type: ignore[misc]
    for beyond in (len(cache), -len(cache) - 1):
        with pytest.raises(IndexError, match=r"index must be in \[-\d+, \d+\), got"):
            cache[beyond]
    with pytest.raises(ValueError, match="examples must contain at least one example, got none"):
        cache.collate(cache[5:5])


# Round trips


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_identical(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = Teacher()
    build(tmp_path / "cache", kind, dtype=dtype, temperature=2.0)
    cache = TeacherCache(tmp_path / "cache", tail="renormalize")
    cache.verify()
    assert [len(example.input_ids) for example in read_all(tmp_path / "cache")] == list(LENGTHS)
    for ids, example in zip(
        sequences(), read_all(tmp_path / "cache", tail="renormalize"), strict=True
    ):
        assert torch.equal(example.input_ids, ids)
        hidden = teacher.base_model(ids[None]).last_hidden_state[0]
        logits = teacher(ids[None]).logits[0]
        if kind == "hidden":
            assert isinstance(example.teacher, fastkd.LinearTeacher)
            assert torch.equal(example.teacher.hidden, hidden.to(dtype))
            assert torch.equal(example.teacher.weight, teacher.head.weight.to(dtype))
            assert example.teacher.bias is not None
            assert torch.equal(example.teacher.bias, teacher.head.bias.to(dtype))
        elif kind == "topk":
            wanted = fastkd.TopK.from_logits(logits, K, temperature=2.0)
            assert isinstance(example.teacher, fastkd.TopK)
            assert torch.equal(example.teacher.ids, wanted.ids.int())
            assert torch.equal(example.teacher.logprobs, wanted.logprobs.to(dtype))
            assert example.teacher.tail_logprob is not None and wanted.tail_logprob is not None
            assert torch.equal(example.teacher.tail_logprob, wanted.tail_logprob.to(dtype))
            assert (example.teacher.tail, example.teacher.temperature) == ("renormalize", 2.0)
        else:
            assert isinstance(example.teacher, Tensor)
            assert torch.equal(example.teacher, logits.to(dtype))


def test_other_tools_read_the_shards(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = build(tmp_path / "cache") / "shard-000000.safetensors"
    tensors = load_file(path)
    assert tensors["lengths"].tolist() == [3, 1, 4]
    assert tensors["logprobs"].shape == (8, K)
    save_file(tensors, tmp_path / "again")
    assert path.stat().st_size == (tmp_path / "again").stat().st_size


def test_unusual_inputs_can_be_written(tmp_path: Path) -> None:
    """The writer accepts -inf, padded entries with any content, int32 and strided inputs, and copies what it is
    given."""
    ids = torch.arange(8, dtype=torch.int32)[::2]
    sparse = topk(4)
    sparse.ids[1, 2:] = -1
    sparse.logprobs[1, 2:] = math.nan
    sparse.logprobs[2, 4] = -math.inf
    with CacheWriter(tmp_path / "topk", **settings()) as writer:
        writer.append(ids, topk=sparse)
        kept = sparse.logprobs.clone()
        sparse.logprobs.zero_()
    [example] = read_all(tmp_path / "topk")
    assert isinstance(example.teacher, fastkd.TopK)
    kept[1, 2:] = -math.inf
    assert torch.equal(example.teacher.logprobs, kept)
    assert torch.equal(example.input_ids, ids.long())

    logits = torch.zeros(V, 4).T  # [4, V], strided
    logits[0, 1:] = -math.inf
    with CacheWriter(tmp_path / "dense", **settings("dense")) as writer:
        writer.append(ids, logits=logits)
    [example] = read_all(tmp_path / "dense")
    assert isinstance(example.teacher, Tensor) and torch.equal(example.teacher, logits)


@pytest.mark.parametrize("kind", KINDS)
def test_collate_pads(kind: str, tmp_path: Path) -> None:
    cache = TeacherCache(build(tmp_path / "cache", kind))
    examples = [cache[0], cache[1], cache[-1]]
    batch = cache.collate(examples)
    assert batch.mask.sum(1).tolist() == [3, 1, 6]
    for name, value in tensors_of(batch).items():
        if name in ("weight", "bias"):
            continue
        for row, example in enumerate(examples):
            length = len(example.input_ids)
            assert torch.equal(value[row, :length], tensors_of(example)[name])
            empty = {"ids": -1, "logprobs": -math.inf}.get(name, 0)
            assert (value[row, length:] == empty).all()
    assert_same(batch, batch.to("cpu"))
    student = torch.randn(3, 6, V, generator=torch.Generator().manual_seed(3))
    loss = fastkd.kd_loss(student, batch.teacher, mask=batch.mask, backend="reference")
    rows = torch.cat(
        [student[row, : len(example.input_ids)] for row, example in enumerate(examples)]
    )
    dense = torch.cat([Teacher()(example.input_ids).logits for example in examples])
    if kind == "topk":
        assert loss.isfinite()
    else:
        torch.testing.assert_close(loss, fastkd.kd_loss(rows, dense, backend="reference"))


@pytest.mark.parametrize("examples", [1, 7, 64])
def test_ranks_cover_everything_once(examples: int, tmp_path: Path) -> None:
    with CacheWriter(tmp_path, **settings("dense")) as writer:
        for index in range(examples):
            writer.append(torch.tensor([index % V]), logits=torch.full((1, V), float(index)))
    for world_size in (1, 2, 3, 8):
        ranks = [
            TeacherCache(tmp_path, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        seen = [int(example.teacher[0, 0]) for rank in ranks for example in rank]  # type: ignore[attr-defined, index]
        assert seen == list(range(examples))
        assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context: str, tmp_path: Path) -> None:
    cache = TeacherCache(build(tmp_path / "cache", "hidden"))
    examples = list(cache)  # type: ignore[call-overload]  # shards are open before the workers start
    loader = DataLoader(
        cache, 2, num_workers=2, collate_fn=cache.collate, multiprocessing_context=context
    )
    batches = list(loader)
    for index, batch in enumerate(batches):
        assert_same(batch, cache.collate(examples[2 * index : 2 * index + 2]))
    assert len({batch.teacher.weight.data_ptr() for batch in batches}) == 1, "the head was sent"


def test_a_head_is_not_pickled(tmp_path: Path) -> None:
    build(tmp_path / "cache", "hidden")
    example = TeacherCache(tmp_path / "cache")[1]
    assert_same(pickle.loads(ForkingPickler.dumps(example)), example)
    assert example.teacher.weight.untyped_storage().nbytes() > 1000  # type: ignore[union-attr]
    assert len(pickle.dumps(TeacherCache(tmp_path / "cache"))) < 4000


def test_examples_read_in_inference_mode_can_be_trained_with(tmp_path: Path) -> None:
    cache = TeacherCache(build(tmp_path / "cache", "hidden"))
    with torch.inference_mode():
        cache[0]
    teacher = cache[0].teacher
    assert isinstance(teacher, fastkd.LinearTeacher)
    student = torch.ones(V, H, requires_grad=True)
    (student * teacher.weight).sum().backward()
    assert student.grad is not None and torch.equal(student.grad, teacher.weight)


# Kills and resumes

FORKS = """
import os, random, signal, sys, time
import torch
from fastkd import TopK
from fastkd.teachers.cache import CacheWriter, TeacherCache

torch.set_num_threads(1)
V, H = 40, 64  # a head and shards beyond the 8 KiB that a file buffers
random.seed(0)
CALLS = {"open", "write", "flush", "fsync", "close", "replace", "rename", "mkdir", "flock", "unlink"}

def build(path, kind, rank=0, world_size=1, wait=lambda: None):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=generator)
    own = {"hidden": {"weight": weight}, "topk": {"k": 7, "temperature": 2.0}, "dense": {}}[kind]
    own |= {"rank": rank, "world_size": world_size}
    with CacheWriter(path, kind=kind, vocab_size=V, shard_examples=4, **own) as writer:
        for index in range(14):
            ids = torch.randint(V, (10 + index,), generator=generator)
            hidden = torch.randn(10 + index, H, generator=generator)
            if index != writer.position:
                continue
            logits = hidden @ weight.T
            if kind == "hidden":
                writer.append(ids, hidden=hidden)
            elif kind == "dense":
                writer.append(ids, logits=logits)
            else:
                writer.append(ids, topk=TopK.from_logits(logits, 7, temperature=2.0))
        wait()

def killed(path, kind, at=None, delay=None, rank=0, world_size=1):
    '''Build in a child that is killed before its at-th call of a file, or after a delay; whether it was.'''
    child = os.fork()
    if child == 0:
        calls = 0
        def count(frame, event, function):
            nonlocal calls
            if event == "c_call" and function.__name__ in CALLS:
                calls += 1
                if calls == at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(count if at else None)
        build(path, kind, rank, world_size)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0

def files(path):
    return {name: open(os.path.join(path, name), "rb").read() for name in sorted(os.listdir(path))}
"""

KILLER = (
    FORKS
    + """
def check(folder, kind):
    '''Kill builds at 20 points, resume them, and compare; how many different states the kills left behind.'''
    whole = os.path.join(folder, kind)
    start = time.perf_counter()
    assert not killed(whole, kind)
    duration = time.perf_counter() - start
    expected = files(whole)
    calls = 1
    while killed(os.path.join(folder, f"{kind}-count-{calls}"), kind, at=calls):
        calls *= 2
    points = [{"at": random.randint(1, calls // 2)} for _ in range(12)]
    points += [{"delay": random.uniform(0, duration)} for _ in range(8)]
    states = set()
    for index, point in enumerate(points):
        path = os.path.join(folder, f"{kind}-{index}")
        again = point
        for _ in range(2):  # a resumed writer may be killed too
            if not killed(path, kind, **again):
                break
            states.add(tuple(sorted(os.listdir(path))) if os.path.isdir(path) else ())
            again = {"at": random.randint(1, calls // 4)}
        assert not killed(path, kind)
        assert files(path) == expected, (kind, point)
        TeacherCache(path).verify()
    return len(states)

for kind in sys.argv[2:]:
    print(check(sys.argv[1], kind))
"""
)


def test_killed_builds_resume_to_the_same_bytes(tmp_path: Path) -> None:
    for states in python(KILLER, str(tmp_path), *KINDS).split():
        assert int(states) >= 5, "the kills left too few different states behind"


# Fourteen sequences make shards of 4, 4, 4 and 2; of three processes, the first has two shards.
PARTS = (
    FORKS
    + """
from multiprocessing import Barrier

def check(path):
    whole = files(sys.argv[1])
    parts = [os.path.join(path, f"part-0000{rank}-of-00003") for rank in range(3)]
    for rank, part in enumerate(parts):
        for name, data in files(part).items():
            if name.startswith("shard"):
                number = 3 * int(name[6:12]) + rank
                assert data == whole[f"shard-{number:06d}.safetensors"], (part, name)
    TeacherCache(path).verify()
    return [files(part) for part in parts]

build(sys.argv[1], "hidden")

# All begin at once, and finish at once.
for attempt in range(4):
    path = f"{sys.argv[2]}-{attempt}"
    barrier = Barrier(3)
    children = []
    for rank in range(3):
        children.append(os.fork())
        if children[-1] == 0:
            barrier.wait()
            build(path, "hidden", rank, 3, barrier.wait)
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    expected = check(path)

# Each is killed and goes on: in turn where no other has begun, and where all others have finished.
kills = 0
for rank in (1, 2, 0):
    for late, point in enumerate(range(1 + rank, 37, 3)):
        path = f"{sys.argv[2]}-{rank}-{point}"
        if late % 2:
            for other in {0, 1, 2} - {rank}:
                build(path, "hidden", other, 3)
        kills += killed(path, "hidden", at=point, rank=rank, world_size=3)
        assert not killed(path, "hidden", rank=rank, world_size=3)
        assert files(os.path.join(path, f"part-0000{rank}-of-00003")) == expected[rank]
        if late % 2:
            check(path)
print(kills)
"""
)


def test_parts_survive_kills_and_simultaneous_ends(tmp_path: Path) -> None:
    output = python(PARTS, str(tmp_path / "whole"), str(tmp_path / "parts"))
    assert int(output) >= 30, "builds were over before they were killed"


def test_resume_continues_after_the_last_complete_shard(tmp_path: Path) -> None:
    build(tmp_path / "whole", "dense")
    model, all_ids = Teacher(), sequences()

    def append(writer: CacheWriter, last: int) -> None:
        for ids in all_ids[writer.examples : last]:
            writer.append(ids, logits=model(ids[None]).logits[0])

    with (
        pytest.raises(KeyboardInterrupt),
        CacheWriter(tmp_path / "cut", **settings("dense")) as writer,
    ):
        append(writer, 5)
        assert writer.examples == 5
        raise KeyboardInterrupt
    with pytest.raises(IncompleteError, match="it has 3 examples so far"):
        TeacherCache(tmp_path / "cut")
    assert len(read_all(tmp_path / "cut", allow_incomplete=True)) == 3
    with CacheWriter(tmp_path / "cut", **settings("dense")) as writer:
        assert writer.examples == 3
        append(writer, 8)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    with CacheWriter(tmp_path / "cut", **settings("dense")) as writer:
        assert writer.examples == 8
        with pytest.raises(CacheError, match="is complete and accepts no more"):
            writer.append(all_ids[0], logits=torch.zeros(3, V))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_to_write_closes_the_writer(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "whole", "dense")
    all_ids = sequences()
    writer = CacheWriter(tmp_path / "cut", **settings("dense"))
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(CacheError, match="cut cannot be written: No space left on device"):
            for index, ids in enumerate(all_ids):
                if index == 2:
                    patch.setattr(os, call, fail)
                    patch.setattr(Path, "replace", fail)
                writer.append(ids, logits=Teacher()(ids).logits)
    with pytest.raises(CacheError, match="is closed; open another"):
        writer.append(all_ids[2], logits=torch.zeros(4, V))
    build(tmp_path / "cut", "dense")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 4}, "k = 5, not 4"),
        ({"vocab_size": 51}, "vocab_size = 50, not 51"),
        ({"dtype": torch.float16}, "dtype = float32, not float16"),
        ({"temperature": 2.0}, "temperature = 1.0, not 2.0"),
        ({"shard_examples": 4}, "shard_examples = 3, not 4"),
        ({"tokenizer_sha256": "a" * 64}, "tokenizer_sha256 = None, not aaa"),
        ({"kind": "dense", "k": None}, "kind = topk, not dense"),
    ],
)
def test_resume_refuses_other_settings(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    CacheWriter(tmp_path, **settings()).close()
    before = files(tmp_path)
    with pytest.raises(CacheError, match=f"was begun with {message}"):
        CacheWriter(tmp_path, **settings() | changed)
    assert files(tmp_path) == before


def test_resume_refuses_another_head(tmp_path: Path) -> None:
    CacheWriter(tmp_path, **settings("hidden")).close()
    CacheWriter(tmp_path, **settings("hidden")).close()
    with pytest.raises(CacheError, match="was begun with head = StoredFile"):
        CacheWriter(tmp_path, **settings("hidden", weight=torch.zeros(V, H)))


def test_a_build_refuses_other_sequences(tmp_path: Path) -> None:
    model, ids = Teacher(), sequences()
    options: dict[str, Any] = {"kind": "dense", "shard_examples": 3}

    def until_killed() -> Iterator[Tensor]:
        yield from ids[:4]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        build_cache(tmp_path, model, until_killed(), **options)
    with pytest.raises(CacheError, match="was begun with a different sequence 1"):
        build_cache(tmp_path, model, [ids[0], *ids[2:]], **options)
    with pytest.raises(CacheError, match="was begun with at least 3 sequences, got 2"):
        build_cache(tmp_path, model, ids[:2], **options)
    assert build_cache(tmp_path, model, ids, **options).complete
    assert build_cache(tmp_path, model, ids, **options).complete
    with pytest.raises(CacheError, match="is complete and accepts no more"):
        build_cache(tmp_path, model, [*ids, ids[0]], **options)
    with pytest.raises(CacheError, match="sequences must be at least one"):
        build_cache(tmp_path, model, [], **options)
    for bad in ([1.5], [], [[1]], torch.ones(3)):
        with pytest.raises(ValueError, match="sequences must be int64 or int32 token ids"):
            build_cache(tmp_path / "new", model, [bad], **options)  # type: ignore[list-item]  # that is what is tried
    assert not (tmp_path / "new").exists()


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, **settings("dense")):
        with pytest.raises(LockedError, match="is open in another writer"):
            CacheWriter(tmp_path, **settings("dense"))
        script = "import sys; from fastkd.teachers.cache import *\n"
        script += "try: CacheWriter(sys.argv[1], kind='dense', vocab_size=50, shard_examples=3)\n"
        script += "except LockedError: print('locked')"
        assert python(script, str(tmp_path)) == "locked\n"
    CacheWriter(tmp_path, **settings("dense")).close()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only for this process; root gives its rights up meanwhile."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_read_only_folder() -> None:
    # Not in tmp_path, which other users may not enter.
    with tempfile.TemporaryDirectory() as place:
        folder = build(Path(place) / "cache", "hidden")
        with read_only(Path(place)):
            with pytest.raises(CacheError, match="cache cannot be written: Permission denied"):
                build(folder, "hidden")
            with pytest.raises(CacheError, match="new cannot be written: Permission denied"):
                CacheWriter(Path(place) / "new", **settings())
            assert len(read_all(folder)) == 8
        folder.chmod(0o755)


def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        CacheError, match="holds other files, .*thesis.tex.*; a new cache needs an empty folder"
    ):
        CacheWriter(tmp_path, **settings())
    with pytest.raises(CacheError, match="thesis.tex cannot be written: File exists"):
        CacheWriter(tmp_path / "thesis.tex", **settings())
    build(tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(CacheError, match="holds other files, .*shard-000000"):
        build(tmp_path / "cache")


# Parts


def part(rank: int, world_size: int) -> str:
    return f"part-{rank:05d}-of-{world_size:05d}"


def build_parts(path: Path, world_size: int = 3, kind: str = "topk", **options: Any) -> Path:
    for rank in reversed(range(world_size)):
        build(path, kind, rank=rank, world_size=world_size, **options)
    return path


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])  # 9 processes: more than there are sequences
@pytest.mark.parametrize("kind", KINDS)
def test_parts_read_like_an_unsplit_build(kind: str, world_size: int, tmp_path: Path) -> None:
    options = {"dtype": torch.bfloat16, "teacher": "one", "tokenizer_sha256": "a" * 64}
    whole = build(tmp_path / "whole", kind, **options)
    folder = build_parts(tmp_path / "parts", world_size, kind, **options)
    assert read_manifest(folder) == read_manifest(whole)
    cache = TeacherCache(folder)
    cache.verify()
    for first, second in zip(cache, read_all(whole), strict=True):  # type: ignore[call-overload]
        assert_same(first, second)
    assert_same(pickle.loads(pickle.dumps(cache))[-1], TeacherCache(whole)[7])
    for rank in range(3):
        actual, reference = (
            read_all(path, rank=rank, world_size=3, verify="header") for path in (folder, whole)
        )
        for first, second in zip(actual, reference, strict=True):
            assert_same(first, second)
    if world_size == 1:
        assert files(folder) == files(whole)
    else:
        assert sorted(path.name for path in folder.iterdir()) == [
            part(rank, world_size) for rank in range(world_size)
        ]


@pytest.mark.parametrize("examples", [1, 2, 3, 4, 7])  # a shard has two
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parts_of_uneven_builds(examples: int, world_size: int, tmp_path: Path) -> None:
    """Parts written without build_cache, one process at a time, then opened again: a finished part refuses more
    sequences."""
    for _ in range(2):
        for rank in range(world_size):
            own = settings("dense", shard_examples=2, rank=rank, world_size=world_size)
            with CacheWriter(tmp_path, **own) as writer:
                for index in range(examples):
                    if index == writer.position:
                        writer.append(torch.tensor([index]), logits=torch.full((1, V), 1.0 * index))
    seen = [int(example.teacher[0, 0]) for example in read_all(tmp_path)]  # type: ignore[index]
    assert seen == list(range(examples))


def test_the_progress_of_a_part_counts_all_sequences(tmp_path: Path) -> None:
    seen: list[int] = []
    build(tmp_path, rank=1, world_size=2, progress=seen.append)
    assert seen == list(range(1, 9))


def test_writers_of_parts_do_not_interfere(tmp_path: Path) -> None:
    own = [settings("dense", rank=rank, world_size=2) for rank in range(2)]
    with CacheWriter(tmp_path, **own[1]) as second, CacheWriter(tmp_path, **own[0]) as first:
        assert (first.position, second.position) == (0, 3)
        with pytest.raises(LockedError, match="part-00001-of-00002 is open in another writer"):
            CacheWriter(tmp_path, **own[1])
        first.append(IDS, logits=torch.zeros(4, V))
        assert (first.position, second.position) == (1, 3)
    assert len(read_all(tmp_path)) == 1


def test_a_part_that_is_missing_or_unfinished(tmp_path: Path) -> None:
    build(tmp_path, rank=0, world_size=3)
    for _ in range(2):
        with pytest.raises(
            IncompleteError,
            match="not complete: it lacks part-00001-of-00003, part-00002-of-00003$",
        ):
            TeacherCache(tmp_path, allow_incomplete=True)
        (tmp_path / part(1, 3)).mkdir(exist_ok=True)  # the state that a killed process may leave
    (tmp_path / part(1, 3)).rmdir()
    build(tmp_path, rank=2, world_size=3)
    CacheWriter(tmp_path, **settings(rank=1, world_size=3)).close()
    with pytest.raises(
        IncompleteError, match="3 examples so far, and lacks the end of part-00001-of-00003; resume"
    ):
        TeacherCache(tmp_path)
    assert [len(example.input_ids) for example in read_all(tmp_path, allow_incomplete=True)] == [3, 1, 4]  # fmt: skip
    assert main(["cache", "verify", str(tmp_path)]) == 1
    build(tmp_path, rank=1, world_size=3)
    assert len(read_all(tmp_path)) == 8


def test_unfinished_parts_are_read_in_order(tmp_path: Path) -> None:
    """A short last shard is not read in place of missing shards."""
    with CacheWriter(tmp_path, **settings("dense", rank=0, world_size=2)) as writer:
        writer.append(IDS, logits=torch.zeros(4, V))
    CacheWriter(tmp_path, **settings("dense", rank=1, world_size=2)).close()
    assert read_all(tmp_path, allow_incomplete=True) == []


@pytest.mark.parametrize("name", ["part-00000-of-00000", "part-00002-of-00002", "part-0-of-2"])
def test_folders_with_other_names_are_not_parts(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ManifestError, match="is not a teacher cache: manifest.json: No such file"):
        TeacherCache(tmp_path)


def test_many_missing_parts_are_not_all_listed(tmp_path: Path) -> None:
    (tmp_path / part(0, 99999)).mkdir()
    with pytest.raises(IncompleteError) as caught:
        TeacherCache(tmp_path)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


# What differs in a part, and what the message says: the setting, the part's value, the other parts' value.
OTHER_PARTS: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("topk", {"k": 4}, "k", "4", "5"),
    ("topk", {"temperature": 2.0}, "temperature", "2.0", "1.0"),
    ("topk", {"dtype": torch.float16}, "dtype", "float16", "float32"),
    ("topk", {"shard_examples": 4}, "shard_examples", "4", "3"),
    ("topk", {"tokenizer_sha256": "a" * 64}, "tokenizer_sha256", "a" * 64, "None"),
    ("topk", {"teacher": "another"}, "teacher", "another", "None"),
    ("dense", {"kind": "topk"}, "kind", "topk", "dense"),
]


@pytest.mark.parametrize(
    ("kind", "changed", "name", "its", "theirs"), OTHER_PARTS, ids=[row[2] for row in OTHER_PARTS]
)
def test_parts_of_other_settings(
    kind: str, changed: dict[str, Any], name: str, its: str, theirs: str, tmp_path: Path
) -> None:
    folder = build_parts(tmp_path / "parts", 2, kind)
    shutil.rmtree(folder / part(1, 2))
    other = {"kind": kind, "rank": 1, "world_size": 2} | changed
    with pytest.raises(
        CacheError, match=f"part-00000-of-00002 was begun with {name} = {theirs}, not {its}$"
    ):
        build(folder, **other)
    assert not (folder / part(1, 2)).exists()
    # Happens if two processes start at once, or if parts come from another folder
    build(tmp_path / "other", **other)
    (tmp_path / "other" / part(1, 2)).rename(folder / part(1, 2))
    with pytest.raises(ManifestError) as caught:
        TeacherCache(folder)
    assert str(caught.value) == (
        f"{folder} has parts that differ: {name} = {its} in part-00001-of-00002, {theirs} in part-00000-of-00002"
    )


def test_parts_of_another_teacher(tmp_path: Path) -> None:
    """A head that is stored in the cache is compared by its digest."""
    for rank in range(2):
        own = settings("hidden", rank=rank, world_size=2, weight=torch.full((V, H), 1.0 + rank))
        CacheWriter(tmp_path / str(rank), **own).finish()
    (tmp_path / "1" / part(1, 2)).rename(tmp_path / "0" / part(1, 2))
    with pytest.raises(ManifestError, match="parts that differ: head = .* in part-00001-of-00002"):
        TeacherCache(tmp_path / "0")
    with pytest.raises(CacheError, match="part-00001-of-00002 was begun with head = "):
        CacheWriter(tmp_path / "0", **settings("hidden", rank=0, world_size=2))


def test_parts_of_another_number_of_processes(tmp_path: Path) -> None:
    folder = build_parts(tmp_path / "cache", 2)
    with pytest.raises(CacheError, match="cache holds part-00000-of-00002, of 2 processes, not 3$"):
        build(folder, rank=0, world_size=3)
    with pytest.raises(CacheError, match="holds other files, .*part-00000-of-00002"):
        build(folder)
    build(tmp_path / "other", rank=2, world_size=3)
    (tmp_path / "other" / part(2, 3)).rename(folder / part(2, 3))
    with pytest.raises(
        ManifestError,
        match="holds part-00000-of-00002 and part-00002-of-00003, parts of two builds",
    ):
        TeacherCache(folder)
    build(tmp_path / "whole")
    with pytest.raises(CacheError, match="whole holds a cache that is not in parts"):
        build(tmp_path / "whole", rank=0, world_size=2)


def test_parts_of_other_sequences(tmp_path: Path) -> None:
    model, ids = Teacher(), sequences()
    own: dict[str, Any] = {"kind": "dense", "shard_examples": 3, "world_size": 2}
    build_cache(tmp_path, model, ids, rank=0, **own)
    build_cache(tmp_path, model, ids[:5], rank=1, **own)
    with pytest.raises(
        ManifestError, match="of different sequences: part-00000-of-00002 has 5 of all 7, not 4"
    ):
        TeacherCache(tmp_path)
    with pytest.raises(
        CacheError, match="part-00001-of-00002 was begun with a different sequence 3"
    ):
        build_cache(tmp_path, model, ids[1:], rank=1, **own)
    with pytest.raises(CacheError, match="part-00001-of-00002 was begun with at least 2 sequences, got 1"):  # fmt: skip
        build_cache(tmp_path, model, ids[:4], rank=1, **own)
    with pytest.raises(CacheError, match="sequences must be at least one"):
        build_cache(tmp_path, model, [], rank=1, **own)


def test_corruption_of_a_part_is_detected(tmp_path: Path) -> None:
    folder = build_parts(tmp_path / "shard", 2)
    edit(flip(-1))(folder / part(1, 2))
    with pytest.raises(ShardError, match=f"{part(1, 2)}/{SHARD} has sha256"):
        read_all(folder)
    folder = build_parts(tmp_path / "head", 2, "hidden")
    edit(flip(-1), HEAD)(folder / part(1, 2))
    assert len(read_all(folder)) == 8  # the head is read from the first part
    with pytest.raises(ShardError, match=f"{part(1, 2)}/{HEAD} has sha256"):
        TeacherCache(folder).verify()
    folder = build_parts(tmp_path / "manifest", 2)
    set_field("k", to=51)(folder / part(1, 2))
    with pytest.raises(ManifestError, match=rf"{part(1, 2)}/manifest.json: k must be an int"):
        TeacherCache(folder)


# Corruption


class CreatesAFileWhenUnpickled:
    """An object that creates a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


def change_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content))

    return damage


def forge(change: Callable[[bytearray], object], file: str = SHARD) -> Callable[[Path], None]:
    """Change a file and write the digest that fits, so that the digest cannot detect it."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        change(content)
        (folder / file).write_bytes(content)

        def with_digests(manifest: dict[str, Any]) -> None:
            for record in (*manifest["shards"], manifest["head"]):
                if record and record["file"] == file:
                    record["sha256"] = hashlib.sha256(content).hexdigest()

        change_manifest(with_digests)(folder)

    return damage


def put_value(
    name: str, value: float, position: int = 0, file: str = SHARD
) -> Callable[[Path], None]:
    """Forge one number of a tensor."""
    dtypes = {"I64": torch.int64, "I32": torch.int32, "F32": torch.float32}

    def change(content: bytearray) -> None:
        data = 8 + int.from_bytes(content[:8], "little")
        entry = json.loads(content[8:data])[name]
        number = torch.tensor([value], dtype=dtypes[entry["dtype"]])
        start = data + entry["data_offsets"][0] + position * number.itemsize
        content[start : start + number.itemsize] = bytes(number.view(torch.uint8).tolist())

    return forge(change, file)


def rewrite_header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def forged(content: bytearray) -> None:
        end = 8 + int.from_bytes(content[:8], "little")
        header = change(bytes(content[8:end]))
        assert len(header) == end - 8
        content[8:end] = header

    return forge(forged)


def reverse(header: bytes) -> bytes:
    entries = json.dumps(dict(reversed(json.loads(header).items())), separators=(",", ":"))
    return entries.encode().ljust(len(header))


def swap(first: str, second: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / first).rename(folder / "aside")
        (folder / second).rename(folder / first)
        (folder / "aside").rename(folder / second)

    return damage


def edit(change: Callable[[bytearray], object], file: str = SHARD) -> Callable[[Path], None]:
    """Change a file without changing the manifest."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        change(content)
        (folder / file).write_bytes(content)

    return damage


def flip(position: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[position] ^= 1

    return change


def replaced_by(make: Callable[[Path], object], padded: bool) -> Callable[[Path], None]:
    """Replace a shard with another file, of the shard's size if padded."""

    def damage(folder: Path) -> None:
        size = (folder / SHARD).stat().st_size
        make(folder)
        content = (folder / SHARD).read_bytes()
        if padded:
            assert len(content) <= size
            (folder / SHARD).write_bytes(content.ljust(size, b"\0"))

    return damage


def pickled(folder: Path) -> None:
    (folder / SHARD).write_bytes(pickle.dumps(CreatesAFileWhenUnpickled(folder / "unpickled")))


def torch_saved(folder: Path) -> None:
    torch.save(CreatesAFileWhenUnpickled(folder / "unpickled"), folder / SHARD)


def write_manifest(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "manifest.json").write_bytes(content) and None


def make_pipe(folder: Path) -> None:
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)


def set_field(*path: str | int, to: Any) -> Callable[[Path], None]:
    """Set a field of the manifest."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change_manifest(change)


def unfinish(manifest: dict[str, Any]) -> None:
    manifest["shards"].pop()
    manifest.update(complete=False, examples=6, rows=23)


M, S = ManifestError, ShardError

# name: the kind, the damage to the folder, the expected error, and a part of its message.
CORRUPTIONS: dict[str, tuple[str, Callable[[Path], None], type[CacheError], str]] = {
    # Files
    "truncated": ("topk", edit(lambda c: c.__delitem__(slice(-9, None))), S, "bytes; the manifest says"),
    "longer": ("topk", edit(lambda c: c.append(0)), S, "bytes; the manifest says"),
    "empty": ("topk", edit(bytearray.clear), S, "has 0 bytes; the manifest says"),
    "missing shard": ("topk", lambda folder: (folder / SECOND).unlink(), S, "cannot be read: No such file"),
    "missing head": ("hidden", lambda folder: (folder / HEAD).unlink(), S, "head.safetensors cannot be read"),
    "a pipe": ("topk", make_pipe, S, "is not a regular file"),
    "flipped byte of data": ("topk", edit(flip(-1)), S, "has sha256 .*; the manifest says"),
    "flipped byte of lengths": ("dense", edit(flip(400)), S, "has sha256 .*; the manifest says"),
    "flipped byte of the head": ("hidden", edit(flip(-1), HEAD), S, "has sha256 .*; the manifest says"),
    "swapped shards": ("topk", swap(SHARD, SECOND), S, "the manifest says"),
    "a pickle": ("dense", replaced_by(pickled, False), S, "bytes; the manifest says"),
    "a padded pickle": ("dense", replaced_by(pickled, True), S, "looks like a pickle"),
    "torch.save": ("dense", replaced_by(torch_saved, False), S, "bytes; the manifest says"),
    "padded torch.save": ("dense", replaced_by(torch_saved, True), S, "looks like a pickle or a file of torch.save"),
    # Headers
    "huge header": (
        "topk",
        edit(lambda c: c.__setitem__(slice(8), (1 << 40).to_bytes(8, "little"))),
        S,
        "is not a safetensors file: its header would have 1099511627776 bytes",
    ),
    "header beyond the end": (
        "topk",
        edit(lambda c: c.__setitem__(slice(8), len(c).to_bytes(8, "little"))),
        S,
        "is not a safetensors file: its header would have",
    ),
    "header of 0 bytes": ("topk", edit(lambda c: c.__setitem__(slice(8), bytes(8))), S, "not JSON"),
    "flipped byte of the header": ("topk", edit(flip(8)), S, "the header is not JSON"),
    "a header that nests": ("topk", rewrite_header(lambda h: b"[" * len(h)), S, "the header is not JSON"),
    "a header that is a list": ("topk", rewrite_header(lambda h: b"[]".ljust(len(h))), S, "not a JSON object"),
    "wrong dtype": (
        "topk",
        rewrite_header(lambda h: h.replace(b"F32", b"I32")),
        S,
        "the header has .*'I32'.* for tensor 'logprobs'; the manifest implies .*'F32'",
    ),
    "wrong shape": ("topk", rewrite_header(lambda h: h.replace(b"[8,5]", b"[5,8]")), S, "for tensor 'ids'"),
    "wrong name": ("topk", rewrite_header(lambda h: h.replace(b'"ids"', b'"idx"')), S, "for tensor 'ids'"),
    "wrong offsets": ("topk", rewrite_header(lambda h: h.replace(b"[0,24]", b"[8,24]")), S, "for tensor 'lengths'"),
    "another order": ("topk", rewrite_header(reverse), S, "not the bytes that CacheWriter writes"),
    # Values, with a digest that fits
    "id of V": ("topk", put_value("input_ids", V), S, r"input_ids must be in \[0, 50\), got 50"),
    "id of -1": ("dense", put_value("input_ids", -1, 3), S, r"input_ids must be in \[0, 50\), got -1"),
    "teacher's id of V": ("topk", put_value("ids", V, 39), S, r"ids must be in \[-1, 50\), got 50"),
    "teacher's id of -2": ("topk", put_value("ids", -2), S, r"ids must be in \[-1, 50\), got -2"),
    "NaN in logprobs": ("topk", put_value("logprobs", math.nan, 7), S,
        "logprobs must be at most 0, and not NaN, got nan"),
    "a probability of e": ("topk", put_value("logprobs", 1.0), S, "logprobs must be at most 0, and not NaN, got 1.0"),
    "NaN in the tail": ("topk", put_value("tail_logprob", math.nan), S, "tail_logprob must be at most 0, and not NaN"),
    "NaN in hidden": ("hidden", put_value("hidden", math.nan, 63), S, "hidden must be finite"),
    "inf in hidden": ("hidden", put_value("hidden", -math.inf), S, "hidden must be finite"),
    "NaN in the weight": ("hidden", put_value("weight", math.nan, 5, HEAD), S, "weight must be finite"),
    "NaN in the bias": ("hidden", put_value("bias", math.nan, 5, HEAD), S, "bias must be finite"),
    "NaN in logits": ("dense", put_value("logits", math.nan, 60), S, "logits must be finite or -inf"),
    "inf in logits": ("dense", put_value("logits", math.inf, 399), S, "logits must be finite or -inf"),
    "length of 0": ("topk", put_value("lengths", 0), S, "lengths must be positive and have the sum 8"),
    "wrong lengths": ("topk", put_value("lengths", 4), S, "lengths must be positive and have the sum 8"),
    "huge length": ("topk", put_value("lengths", 2**62), S, "lengths must be positive and have the sum 8"),
    # The manifest
    "no manifest": ("topk", lambda folder: (folder / "manifest.json").unlink(), M,
        "is not a teacher cache: manifest.json: No such"),
    "bad JSON": ("topk", edit(lambda c: c.__delitem__(slice(-20, None)), "manifest.json"), M,
        "manifest.json: Expecting"),
    "no UTF-8": ("topk", write_manifest(b'{"\xff'), M, "codec can't decode"),
    "a manifest that nests": ("topk", write_manifest(b"[" * 10**6), M, "recursion"),
    "a list": ("topk", write_manifest(b"[]"), M, "format must be 'fastkd teacher cache', got None"),
    "another format": ("topk", set_field("format", to="gguf"), M, "format must be 'fastkd teacher cache', got 'gguf'"),
    "newer version": ("topk", set_field("version", to=2), M,
        "has version 2, but this fastkd reads version 1; upgrade fastkd"),
    "no version": ("topk", set_field("version", to=True), M, "version must be a positive int, got True"),
    "extra field": ("topk", set_field("colour", to=1), M, r"missing: none; unknown: \['colour'\]"),
    "extra field of a shard": ("topk", set_field("shards", 0, "x", to=1), M, r"shards\[0\] must have the fields"),
    "missing field": ("topk", change_manifest(lambda c: c.pop("k")), M, "missing: k; unknown: none"),
    "shards of another type": ("topk", set_field("shards", to={}), M, "shards must be a list, got {}"),
    "a shard of another type": ("topk", set_field("shards", 1, to=5), M, r"shards\[1\] must have the fields"),
    "path traversal": ("topk", set_field("shards", 0, "file", to="../" + SHARD), M,
        r"shards\[0\].file must be 'shard-000000"),
    "absolute path": ("topk", set_field("shards", 0, "file", to="/etc/passwd"), M, r"shards\[0\].file must be"),
    "head elsewhere": ("hidden", set_field("head", "file", to="../" + HEAD), M, "head.file must be 'head.safetensors'"),
    "swapped names": ("topk", set_field("shards", 0, "file", to=SECOND), M, r"shards\[0\].file must be 'shard-000000"),
    "wrong count of examples": ("topk", set_field("examples", to=9), M, "examples must be 8, which .* imply, got 9"),
    "wrong count of rows": ("topk", set_field("rows", to=30), M,
        "rows must be 31, which the other fields imply, got 30"),
    "wrong examples of a shard": ("topk", set_field("shards", 0, "examples", to=2), M,
        r"shards\[0\].examples must be 3, got 2"),
    "wrong rows of a shard": ("topk", set_field("shards", 0, "rows", to=9), M,
        r"shards\[0\].bytes must be .*, the size of its tensors"),
    "rows beyond memory": ("dense", set_field("shards", 0, "rows", to=2**60), M, r"shards\[0\].bytes must be"),
    "wrong bytes": ("topk", set_field("shards", 0, "bytes", to=8), M, r"shards\[0\].bytes must be"),
    "no digest": ("topk", set_field("shards", 0, "sha256", to="x"), M, r"shards\[0\].sha256 must be 64 lowercase"),
    "a shard too few": ("topk", change_manifest(lambda c: c["shards"].pop()), M,
        "examples must be 6, which the other fields imply"),
    "another kind": ("topk", set_field("kind", to="dense"), M, "k must be None for kind 'dense', got 5"),
    "no kind": ("topk", set_field("kind", to=[]), M, "kind must be one of hidden, topk, dense, got"),
    "another dtype": ("topk", set_field("dtypes", "logprobs", to="float16"), M, r"shards\[0\].bytes must be"),
    "unknown dtype": ("topk", set_field("dtypes", "logprobs", to="object"), M,
        "dtype must be one of float32, bfloat16, float16"),
    "dtypes that differ": ("topk", set_field("dtypes", "ids", to="int64"), M, "dtypes must be .*, which the other"),
    "no dtypes": ("topk", set_field("dtypes", to=None), M, "dtypes must be a dict of dtypes by tensor name"),
    "NaN temperature": ("topk", set_field("temperature", to=math.nan), M,
        "temperature must be positive and finite, got nan"),
    "huge temperature": ("topk", set_field("temperature", to=10**400), M, "temperature must be positive and finite"),
    "k beyond V": ("topk", set_field("k", to=51), M, r"k must be an int in \[1, 50\], got 51"),
    "k that is a bool": ("topk", set_field("k", to=True), M, r"k must be an int in \[1, 50\], got True"),
    "softcap of a sparse teacher": ("topk", set_field("softcap", to=30.0), M, "softcap must be None for kind 'topk'"),
    "vocabulary of 2^31": ("topk", set_field("vocab_size", to=2**31), M, "vocab_size must be an int in"),
    "complete that is no bool": ("topk", set_field("complete", to=1), M, "complete must be a bool, got 1"),
    "incomplete": ("dense", change_manifest(unfinish), IncompleteError, "is not complete: it has 6 examples so far"),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_is_a_typed_error(name: str, tmp_path: Path) -> None:
    kind, damage, error, message = CORRUPTIONS[name]
    folder = build(tmp_path / "cache", kind)
    assert len(read_all(folder)) == 8
    damage(folder)
    tracemalloc.start()
    try:
        with pytest.raises(error, match=message) as caught:
            TeacherCache(folder)[0]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert type(caught.value) is error
    # 1 MiB is read at once, and a nesting 10^6 deep is a text of that many bytes.
    assert peak < 4 << 20
    assert not (folder / "unpickled").exists()
    assert main(["cache", "verify", str(folder)]) == 1


def test_corruption_allocates_nothing(tmp_path: Path) -> None:
    """Reading corrupt caches takes less than 64 MiB more, by an address-space limit and by resident memory."""
    names = ("huge header", "header beyond the end", "rows beyond memory", "huge length")
    for name in names:
        kind, damage, _, _ = CORRUPTIONS[name]
        damage(build(tmp_path / name, kind))
    script = """
import resource, sys
from fastkd.teachers.cache import TeacherCache
import safetensors
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (64 << 20),) * 2)
for folder in sys.argv[1:]:
    try:
        TeacherCache(folder)[0]
    except Exception as caught:
        print(type(caught).__name__)
print(peak() - before)
"""
    *raised, grown = python(script, *(str(tmp_path / name) for name in names)).split()
    assert raised == [CORRUPTIONS[name][2].__name__ for name in names]
    assert int(grown) < 16 << 10  # KiB


def test_a_huge_sparse_manifest(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ManifestError, match="is not a regular file of at most"):
        read_manifest(tmp_path)


def test_header_verification_skips_digests_and_wide_values(tmp_path: Path) -> None:
    folder = build(tmp_path / "cache", "hidden")
    put_value("hidden", 0.0)(folder)
    set_field("shards", 0, "sha256", to="0" * 64)(folder)
    cache = TeacherCache(folder, verify="header")
    assert len(list(cache)) == 8  # type: ignore[call-overload]
    with pytest.raises(ShardError, match="sha256"):
        cache.verify()
    put_value("input_ids", V)(folder)
    with pytest.raises(ShardError, match="input_ids must be in"):
        read_all(folder, verify="header")


def test_every_rank_opens_its_own_shards_only(tmp_path: Path) -> None:
    folder = build(tmp_path / "cache")
    edit(flip(-1), SECOND)(folder)
    assert len(read_all(folder, rank=0, world_size=4)) == 2
    with pytest.raises(ShardError, match="sha256"):
        read_all(folder, rank=1, world_size=4)


# Arguments

IDS = torch.arange(4)

# What differs from a valid call, the expected error, and its message.
BAD_APPEND: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("dense", {"input_ids": [1]}, TypeError, "input_ids must be a tensor, got list"),
    ("dense", {"input_ids": IDS.float()}, TypeError, "input_ids must be torch.int64 or torch.int32, got torch.float32"),
    ("dense", {"input_ids": IDS[None]}, ValueError, "input_ids must be [S], got (1, 4)"),
    ("dense", {"input_ids": IDS[:0]}, ValueError, "input_ids must be [S] with S > 0, got (0,)"),
    ("dense", {"input_ids": IDS + 47}, ValueError, "input_ids must be in [0, 50), got 50"),
    ("dense", {"input_ids": IDS + 2**32}, ValueError, "input_ids must be in [0, 50), got 4294967299"),
    ("dense", {"logits": None}, TypeError, "a cache of kind 'dense' takes only logits; logits was missing"),
    ("dense", {"hidden": torch.ones(4, H)}, TypeError, "a cache of kind 'dense' takes only logits; hidden was given"),
    ("dense", {"logits": [[0.0]]}, TypeError, "logits must be a tensor, got list"),
    ("dense", {"logits": torch.ones(4, V).half()}, TypeError, "logits must be torch.float32, got torch.float16"),
    ("dense", {"logits": torch.ones(3, V)}, ValueError, "logits must be of shape (4, 50), got (3, 50)"),
    ("dense", {"logits": torch.full((4, V), math.nan)}, ValueError,
        "logits must be finite or -inf, and not all -inf in a row, got [nan]"),
    ("dense", {"logits": torch.full((4, V), -math.inf)}, ValueError,
        "logits must be finite or -inf, and not all -inf in a row, got [-inf]"),
    ("hidden", {"hidden": torch.full((4, H), math.inf)}, ValueError, "hidden must be finite, got [inf, inf]"),
    ("hidden", {"hidden": torch.ones(4, H + 1)}, ValueError, "hidden must be of shape (4, 8), got (4, 9)"),
    ("topk", {"topk": torch.ones(4, K)}, TypeError, "topk must be a fastkd.TopK, got Tensor"),
    ("topk", {"topk": topk(4, temperature=2.0)}, ValueError, "topk's temperature must be 1.0, the cache's, got 2.0"),
    ("topk", {"topk": topk(4, tail_logprob=None)}, ValueError,
        "topk must have a tail_logprob; TopK.from_logits computes it"),
    ("topk", {"topk": topk(3)}, ValueError, "ids must be of shape (4, 5), got (3, 5)"),
    ("topk", {"topk": topk(4, ids=torch.full((4, K), 3))}, ValueError, "ids must be distinct within a row, got [3]"),
    ("topk", {"topk": topk(4, ids=torch.arange(K).expand(4, K) - 2)}, ValueError, "ids must be in [-1, 50), got -2"),
    ("topk", {"topk": topk(4, ids=torch.arange(K).expand(4, K) + 2**32)}, ValueError,
        "ids must be in [-1, 50), got 4294967300"),
    ("topk", {"topk": topk(4, logprobs=torch.full((4, K), 0.5))}, ValueError,
        "logprobs must be at most 0, and not NaN, got 0.5"),
    ("topk", {"topk": topk(4, logprobs=torch.full((4, K), math.nan))}, ValueError,
        "logprobs must be at most 0, and not NaN, got nan"),
    ("topk", {"topk": topk(4, logprobs=torch.zeros(4, K).half())}, TypeError,
        "logprobs must be torch.float32, got torch.float16"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changed", "error", "message"), BAD_APPEND, ids=[row[3] for row in BAD_APPEND]
)
def test_bad_examples(
    kind: str, changed: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    good = {
        "dense": {"logits": torch.zeros(4, V)},
        "topk": {"topk": topk(4)},
        "hidden": {"hidden": torch.zeros(4, H)},
    }[kind]
    with CacheWriter(tmp_path / "with", **settings(kind)) as writer:
        for _ in range(4):  # before and after a shard is written
            with pytest.raises(error) as caught:
                writer.append(**{"input_ids": IDS, **good, **changed})
            assert str(caught.value) == message
            writer.append(IDS, **good)
        assert writer.examples == 4
    with CacheWriter(tmp_path / "without", **settings(kind)) as writer:
        for _ in range(4):
            writer.append(IDS, **good)
    assert files(tmp_path / "with") == files(tmp_path / "without")


BAD_SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kind": "sparse"}, ValueError, "kind must be one of hidden, topk, dense, got 'sparse'"),
    ({"vocab_size": 0}, ValueError, "vocab_size must be an int in [1, 2^31), got 0"),
    ({"vocab_size": 2**31}, ValueError, "vocab_size must be an int in [1, 2^31), got 2147483648"),
    ({"dtype": torch.float64}, ValueError,
        "dtype must be torch.float32 or torch.bfloat16 or torch.float16, got torch.float64"),
    ({"shard_examples": 0}, ValueError, "shard_examples must be a positive int, got 0"),
    ({"k": None}, ValueError, "k must be an int in [1, 50], got None"),
    ({"k": V + 1}, ValueError, "k must be an int in [1, 50], got 51"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ({"temperature": math.inf}, ValueError, "temperature must be positive and finite, got inf"),
    ({"logit_scale": 2.0}, ValueError, "logit_scale must be 1.0 for kind 'topk', got 2.0"),
    ({"softcap": 30.0}, ValueError, "softcap must be None for kind 'topk', got 30.0"),
    ({"weight": 3}, ValueError, "weight must be None for kind 'topk', got 3"),
    ({"tokenizer_sha256": "abc"}, ValueError,
        "tokenizer_sha256 must be 64 lowercase hexadecimal digits, or None, got 'abc'"),
    ({"teacher": 5}, ValueError, "teacher must be a str, or None, got 5"),
    ({"rank": 1}, ValueError, "rank must be an int in [0, 1), got 1"),
    ({"rank": 2, "world_size": 2}, ValueError, "rank must be an int in [0, 2), got 2"),
    ({"rank": -1, "world_size": 2}, ValueError, "rank must be an int in [0, 2), got -1"),
    ({"world_size": 0}, ValueError, "world_size must be a positive int, got 0"),
    ({"world_size": 100000}, ValueError, "world_size must be at most 99999, got 100000"),
    ({"kind": "hidden"}, TypeError, "weight must be a tensor, got NoneType"),
    ({"kind": "hidden", "weight": torch.ones(V, H)}, ValueError, "k must be None for kind 'hidden', got 5"),
    ({"kind": "hidden", "k": None, "weight": torch.ones(V + 1, H)}, ValueError,
        "weight must be of shape (50, 8), got (51, 8)"),
    ({"kind": "hidden", "k": None, "weight": torch.ones(V, 0)}, ValueError, "weight must be not empty, got (50, 0)"),
    ({"kind": "hidden", "k": None, "weight": torch.full((V, H), math.nan)}, ValueError,
        "weight must be finite, got [nan, nan]"),
    ({"kind": "hidden", "k": None, "weight": torch.ones(V, H), "bias": torch.ones(H)}, ValueError,
        "bias must be of shape (50,), got (8,)"),
    ({"kind": "hidden", "k": None, "weight": torch.ones(V, H), "softcap": -1.0}, ValueError,
        "softcap must be positive and finite, or None, got -1.0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "error", "message"), BAD_SETTINGS, ids=[row[2] for row in BAD_SETTINGS]
)
def test_bad_settings(
    changed: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        CacheWriter(tmp_path / "cache", **settings() | changed)
    assert str(caught.value) == message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank must be an int in [0, 2), got 2"),
        ({"rank": -1}, "rank must be an int in [0, 1), got -1"),
        ({"world_size": 0}, "world_size must be a positive int, got 0"),
        ({"tail": "drop"}, "tail must be one of bucket, renormalize, renormalize_teacher, truncate, got 'drop'"),
        ({"verify": "none"}, "verify must be one of full, header, got 'none'"),
    ],
)  # fmt: skip
def test_bad_readers(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        TeacherCache(build(tmp_path / "cache"), **changed)
    assert str(caught.value) == message


def test_messages_name_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    cache = TeacherCache(folder)
    with pytest.raises(
        ImportError,
        match=r"reading a teacher cache needs safetensors: pip install 'fastkd\[cache\]'",
    ):
        cache[0]


def test_importing_fastkd_needs_only_torch() -> None:
    script = "import sys, fastkd, fastkd.teachers.cache, fastkd.__main__\n"
    script += (
        "print([name for name in ('safetensors', 'transformers', 'rich') if name in sys.modules])"
    )
    assert python(script) == "[]\n"


# Models and the command line


def small_model(name: str, **changed: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, **changed,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("Llama", {}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 3.0}),
        (
            "Gemma2",
            {"final_logit_softcapping": 0.01},
        ),  # low enough to change the logits of small random weights
    ],
)
@pytest.mark.stacks
def test_hidden_states_give_the_logits_of_real_models(
    name: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    model = small_model(name, **changed).train()
    manifest = build_cache(tmp_path, model, sequences(), kind="hidden")
    assert model.training
    model.eval()
    for ids, example in zip(sequences(), read_all(tmp_path), strict=True):
        teacher = example.teacher
        assert isinstance(teacher, fastkd.LinearTeacher)
        logits = manifest.logit_scale * (teacher.hidden @ teacher.weight.T)
        if manifest.softcap is not None:
            logits = manifest.softcap * torch.tanh(logits / manifest.softcap)
        torch.testing.assert_close(logits, model(ids[None]).logits[0].detach())


def test_a_head_that_is_not_linear_is_refused(tmp_path: Path) -> None:
    class NonlinearHead(Teacher):
        def forward(self, ids: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(ids).logits.square())

    with pytest.raises(
        ValueError, match="needs logits that are linear in the hidden states, .* differ by"
    ):
        build_cache(tmp_path / "cache", NonlinearHead(), sequences(), kind="hidden")


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with a small Llama, its tokenizer of 50 words, and a text."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(V)}, "w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "model"
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(
        folder
    )
    small_model("Llama").save_pretrained(folder)
    lines = (" ".join(f"w{(7 * i + j) % V}" for j in range(9)) for i in range(5))
    (tmp_path / "text").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.stacks
def test_the_commands(
    kind: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, text = str(tmp_path / "cache"), str(tmp_path / "text")
    options = ["--model", str(model_folder), "--text", text, "--kind", kind, "--k", "7"]
    options += ["--length", "10", "--shard-examples", "2", "--dtype", "bfloat16"]
    for _ in range(2):  # the second run has nothing left to do
        assert main(["cache", "build", cache, *options]) == 0
        assert capsys.readouterr().out == f"{cache}: 5 examples, 45 rows\n"
    assert main(["cache", "verify", cache]) == 0
    assert "5 examples match their digests" in capsys.readouterr().out
    assert main(["cache", "info", cache, "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert (actual["kind"], actual["examples"], actual["rows"], actual["shards"]) == (
        kind,
        5,
        45,
        3,
    )
    assert actual["teacher"] == "model" and actual["complete"]
    assert actual["bytes"] == sum(
        len(data) for name, data in files(Path(cache)).items() if name.endswith("tensors")
    )
    assert actual["dense_float32_bytes_per_row"] == 4 * V
    import transformers

    assert actual["tokenizer_sha256"] == tokenizer_sha256(
        transformers.AutoTokenizer.from_pretrained(model_folder)
    )
    assert main(["cache", "info", cache]) == 0
    output = capsys.readouterr().out
    for line in (
        f"kind +{kind}",
        "rows +45",
        "bytes per row +[0-9.]+",
        "times smaller per row +[0-9.]+",
    ):
        assert re.search(line, output), output
    assert [len(example.input_ids) for example in read_all(Path(cache))] == [10, 10, 10, 10, 5]
    # Other settings on the same folder
    assert main(["cache", "build", cache, *options, "--dtype", "float32"]) == 1
    assert "was begun with dtype = bfloat16, not float32" in capsys.readouterr().err


def command(model_folder: Path, path: Path, *options: str) -> list[str]:
    text = str(model_folder.parent / "text")
    own = ["--kind", "hidden", "--length", "10", "--shard-examples", "2", *options]
    return ["cache", "build", str(path), "--model", str(model_folder), "--text", text, *own]


@pytest.mark.stacks
def test_the_command_builds_parts(
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(model_folder, whole)) == 0
    # One started as torchrun does, the other with options, which take precedence over the environment
    monkeypatch.setenv("RANK", "1")
    assert main(command(model_folder, tmp_path / "lone")) == 0  # the number of processes is missing
    assert (tmp_path / "lone" / "manifest.json").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    capsys.readouterr()
    assert main(command(model_folder, parts)) == 0
    output = capsys.readouterr()
    assert output.out == f"{parts / part(1, 2)}: 2 examples, 20 rows\n"
    assert output.err == "RANK and WORLD_SIZE: this is process 1 of 2\n"  # and no progress bar
    assert main(["cache", "info", str(parts)]) == 1
    assert "parts is not complete: it lacks part-00000-of-00002" in capsys.readouterr().err
    assert main(command(model_folder, parts, "--rank", "0", "--world-size", "2")) == 0
    output = capsys.readouterr()
    assert output.out == f"{parts / part(0, 2)}: 3 examples, 25 rows\n"
    assert "RANK and WORLD_SIZE" not in output.err
    assert read_manifest(parts) == read_manifest(whole)
    assert main(["cache", "verify", str(parts)]) == 0
    for options, message in (
        (["--rank", "0"], "--rank and --world-size must be passed together"),
        (["--rank", "2", "--world-size", "2"], "rank must be an int in [0, 2), got 2"),
    ):
        assert main(command(model_folder, parts, *options)) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(command(model_folder, parts)) == 1
    message = "RANK and WORLD_SIZE in the environment: must be a positive whole number, got 'two'"
    assert message in capsys.readouterr().err


@pytest.mark.stacks
def test_processes_of_the_command_build_one_cache(model_folder: Path, tmp_path: Path) -> None:
    def run(rank: int) -> None:
        torch.set_num_threads(1)  # the child does not inherit this process's number of threads
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        sys.exit(main(command(model_folder, tmp_path / "parts")))

    context = multiprocessing.get_context("fork")  # a new interpreter takes seconds to start
    started = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=900)
        assert process.exitcode == 0
    assert main(command(model_folder, tmp_path / "whole", "--rank", "0", "--world-size", "1")) == 0
    assert read_manifest(tmp_path / "parts") == read_manifest(tmp_path / "whole")
    TeacherCache(tmp_path / "parts").verify()


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        (["--rank", "-1"], 2, "--rank: must be a whole number from 0, got '-1'"),
        (
            ["--model", "nowhere"],
            2,
            "--model: must be a local Hugging Face folder, got 'nowhere', which has no config",
        ),
        (["--text", "nowhere"], 2, "--text: must be a UTF-8 text file, got 'nowhere'"),
        (["--k", "0"], 2, "--k: must be a positive whole number, got '0'"),
        (["--temperature", "nan"], 2, "--temperature: must be positive and finite, got 'nan'"),
        (["--kind", "logits"], 2, "--kind: invalid choice: 'logits'"),
        (["--kind", "topk", "--k", "51"], 1, "k must be an int in"),
        (["--text", os.devnull], 1, "sequences must be at least one, got none"),
    ],
)
@pytest.mark.stacks
def test_bad_commands(
    changed: list[str],
    code: int,
    message: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["cache", "build", str(tmp_path / "cache"), "--model", str(model_folder)]
    arguments += ["--text", str(tmp_path / "text"), "--kind", "dense", *changed]
    if code == 2:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
    else:
        assert main(arguments) == code
    assert message in capsys.readouterr().err
