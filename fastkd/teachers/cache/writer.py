"""Writing a teacher cache: whole shards, one after the other, by one writer at a time."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from fastkd.core.scalars import plain
from fastkd.teachers import TopK
from fastkd.teachers.cache.format import (
    DTYPES,
    HEAD,
    MANIFEST,
    MAX_MANIFEST,
    PARTIAL,
    CacheError,
    Layout,
    LockedError,
    Manifest,
    Shard,
    StoredFile,
    check_files,
    check_values,
    chunks,
    digest,
    file_size,
    folder_of,
    read_part,
    replace_file,
    require,
    shard_name,
    sync_folder,
)
from fastkd.teachers.cache.parts import check_others, difference, part_folder

_LOCK = ".lock"
_ARGUMENTS = {"hidden": "hidden", "topk": "topk", "dense": "logits"}  # of append, by kind


class CacheWriter:
    """Writes a cache, a shard of `shard_examples` sequences at a time, and goes on after a kill.

    A folder whose cache is incomplete is taken up after its last whole shard: `examples` says how many sequences it
    has, and the caller appends from there. The files are then, byte for byte, those of an uninterrupted run. One shard
    is held in memory until it is written.

    Leaving the `with` block writes the last, shorter shard and marks the cache complete; leaving it by an exception
    does neither. A complete cache of the same settings opens too, and takes no more.

    Args:
        path: the folder; made if it is missing.
        kind: "hidden", "topk" or "dense".
        vocab_size: V.
        dtype: of the teacher's floating-point tensors: float32, bfloat16 or float16.
        shard_examples: sequences a shard.
        weight: [V, H], of that dtype, for kind "hidden": the head.
        bias: [V], of that dtype, or None.
        k: entries a row, for kind "topk".
        temperature: the temperature of the log-probabilities, for kind "topk".
        logit_scale: for kind "hidden", what the head multiplies its logits by.
        softcap: for kind "hidden", c of the head's c tanh(logits / c).
        tokenizer_sha256: see :func:`tokenizer_sha256`.
        teacher: a name for the teacher.
        rank: this process is the rank-th of `world_size` that build the cache, each with a writer of the same settings;
            it takes the sequences that :attr:`position` names.
        world_size: the number of processes.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        LockedError: another writer, of the same rank, has the folder open.
        CacheError: the folder holds a cache or a part of other settings, parts of another number of processes, or other
            files; or it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        kind: str,
        vocab_size: int,
        dtype: torch.dtype = torch.float32,
        shard_examples: int = 64,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        k: int | None = None,
        temperature: float | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        tokenizer_sha256: str | None = None,
        teacher: str | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        names = {value: name for name, value in DTYPES.items()}
        known = isinstance(dtype, torch.dtype) and dtype in names
        require(known, "dtype", " or ".join(map(str, names)), dtype)
        vocab_size, rank, world_size = map(plain, (vocab_size, rank, world_size))
        head = _head_tensors(kind, vocab_size, dtype, weight, bias)
        layout: Layout = {name: (dtype, tuple(piece.shape)) for name, [piece] in head.items()}
        record = None
        if head:
            record = StoredFile(HEAD, file_size(layout), digest(chunks(layout, head)))
        wanted = Manifest(
            kind=kind,
            vocab_size=vocab_size,
            dtype=names[dtype],
            shard_examples=shard_examples,
            k=k,
            temperature=1.0 if temperature is None and kind == "topk" else temperature,
            hidden_size=layout["weight"][1][1] if head else None,
            bias="bias" in head,
            logit_scale=logit_scale,
            softcap=softcap,
            tokenizer_sha256=tokenizer_sha256,
            teacher=teacher,
            head=record,
        )
        whole = folder_of(path).absolute()
        self._folder = part_folder(whole, rank, world_size)
        self._rank, self._world_size = rank, world_size
        self._pending: list[dict[str, Tensor]] = []
        self._lock: BinaryIO | None = None
        try:
            check_others(whole, world_size, wanted)
            self._lock = _lock(self._folder)
            self._manifest = self._begin(wanted, chunks(layout, head))
        except BaseException as error:
            self._fail(error)

    def _begin(self, wanted: Manifest, head: Iterator[Any]) -> Manifest:
        """The manifest of what is there already; of an empty cache where nothing is."""
        if not (self._folder / MANIFEST).exists():
            # Without a manifest nothing but the head can have been written, so other files are someone else's.
            ours = {_LOCK, HEAD, HEAD + PARTIAL, MANIFEST + PARTIAL}
            foreign = sorted(name for name in os.listdir(self._folder) if name not in ours)
            if foreign:
                raise CacheError(
                    f"{self._folder} holds other files, {reprlib.repr(foreign)}; a new cache needs an empty folder"
                )
            for name in ours - {_LOCK}:
                (self._folder / name).unlink(missing_ok=True)
            if wanted.head is not None:
                replace_file(self._folder / HEAD, head)
            self._write_manifest(wanted)
            return wanted
        found = read_part(self._folder)
        differs = difference(found, wanted)
        if differs:
            name, before, now = differs
            raise CacheError(f"{self._folder} was begun with {name} = {before}, not {now}")
        check_files(self._folder, found)
        # What a killed writer may have left behind.
        following = shard_name(len(found.shards))
        for name in (MANIFEST + PARTIAL, following + PARTIAL, following):
            (self._folder / name).unlink(missing_ok=True)
        return found

    @property
    def manifest(self) -> Manifest:
        """What is on disk, of this process."""
        return self._manifest

    @property
    def folder(self) -> Path:
        """Where this process writes: the cache's folder, or its part's."""
        return self._folder

    @property
    def examples(self) -> int:
        """The number of sequences so far, those of the unfinished shard included; of this process."""
        return self.manifest.examples + len(self._pending)

    @property
    def position(self) -> int:
        """Which sequence :meth:`append` takes next, of those of all processes; shards go round."""
        shard, offset = divmod(self.examples, self.manifest.shard_examples)
        return (shard * self._world_size + self._rank) * self.manifest.shard_examples + offset

    def append(
        self,
        input_ids: Tensor,
        *,
        hidden: Tensor | None = None,
        topk: TopK | None = None,
        logits: Tensor | None = None,
    ) -> None:
        """Add a sequence, and what the teacher says about it, which is the argument of the cache's kind.

        Tensors are copied, and may be on any device. A wrong argument leaves the writer as it was; a failure to write
        closes it, and a new one goes on after the last whole shard.

        Args:
            input_ids: [S] int64 or int32, S > 0, each in [0, V).
            hidden: [S, H], finite, of the cache's dtype.
            topk: ids and logprobs [S, K] and tail_logprob [S], the latter two of the cache's dtype; its temperature is
                the cache's. Its tail policy is not kept. Log-probabilities at padding become -inf.
            logits: [S, V] of the cache's dtype, finite or -inf; not all -inf in a row.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
            CacheError: the cache is complete, the writer is closed, or a shard cannot be written.
        """
        self._check_open()
        if self.manifest.complete:
            raise CacheError(f"{self._folder} is complete, and takes no more examples")
        wanted = _ARGUMENTS[self.manifest.kind]
        given: dict[str, Any] = {"hidden": hidden, "topk": topk, "logits": logits}
        for name, value in given.items():
            if (value is not None) != (name == wanted):
                raise TypeError(
                    f"a cache of kind {self.manifest.kind!r} takes {wanted} alone; {name} was "
                    f"{'missing' if value is None else 'given'}"
                )
        _check_ids("input_ids", input_ids, 1)
        rows = len(input_ids)
        require(rows > 0, "input_ids", "[S] with S > 0", tuple(input_ids.shape))
        if topk is not None:
            given = self._topk_tensors(topk)
        given["input_ids"] = input_ids
        layout: Layout = {}
        for name, (dtype, shape) in self.manifest.row_layout().items():
            layout[name] = (dtype, (rows, *shape))
        vocab_size = self.manifest.vocab_size
        example = {}
        for name, (dtype, shape) in layout.items():
            value = given[name]
            if dtype == torch.int32:
                # Before they are narrowed, which would bring others into the range.
                check_values({name: value}, {name: (dtype, tuple(value.shape))}, vocab_size)
                value = value.to(dtype)
            example[name] = _copy(name, value, dtype, shape)
        if topk is not None:
            example["logprobs"].masked_fill_(example["ids"] < 0, -math.inf)
        check_values(example, layout, vocab_size)
        self._pending.append(example)
        if len(self._pending) == self.manifest.shard_examples:
            self._commit(complete=False)

    def _topk_tensors(self, topk: TopK) -> dict[str, Any]:
        if not isinstance(topk, TopK):
            raise TypeError(f"topk must be a fastkd.TopK, got {type(topk).__name__}")
        tempered = topk.temperature == self.manifest.temperature
        allowed = f"{self.manifest.temperature}, the cache's"
        require(tempered, "topk's temperature", allowed, topk.temperature)
        if topk.tail_logprob is None:
            raise ValueError("topk must have a tail_logprob, as TopK.from_logits gives it")
        _check_ids("ids", topk.ids, 2)
        return {"ids": topk.ids, "logprobs": topk.logprobs, "tail_logprob": topk.tail_logprob}

    def finish(self) -> None:
        """Write the last shard, mark the cache complete, and close; leaving the `with` block calls it.

        Raises:
            CacheError: the writer is closed, or a file cannot be written.
        """
        self._check_open()
        if not self.manifest.complete:
            self._commit(complete=True)
        self.close()

    def close(self) -> None:
        """Let go of the folder; sequences of an unfinished shard are lost, and the cache stays incomplete."""
        self._pending.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._lock is not None:
            self.finish()
        self.close()

    def _commit(self, complete: bool) -> None:
        try:
            shards = self.manifest.shards
            if self._pending:
                shards += (self._write_shard(len(shards)),)
            manifest = replace(self.manifest, shards=shards, complete=complete)
            self._write_manifest(manifest)
        except BaseException as error:
            # How much of it is on disk is for the next writer to see.
            self._fail(error)
        self._manifest = manifest
        self._pending.clear()

    def _write_shard(self, index: int) -> Shard:
        lengths = [len(example["input_ids"]) for example in self._pending]
        shard = Shard(shard_name(index), 0, "", len(lengths), sum(lengths))
        layout = self.manifest.shard_layout(shard)
        tensors = {
            name: [example[name] for example in self._pending]
            for name in self.manifest.row_layout()
        }
        tensors["lengths"] = [torch.tensor(lengths)]
        sha256 = replace_file(self._folder / shard.file, chunks(layout, tensors))
        return replace(shard, bytes=file_size(layout), sha256=sha256)

    def _write_manifest(self, manifest: Manifest) -> None:
        text = manifest.to_json().encode()
        if len(text) > MAX_MANIFEST:
            raise CacheError(f"{self._folder} has too many shards; begin with more shard_examples")
        replace_file(self._folder / MANIFEST, [text])

    def _check_open(self) -> None:
        if self._lock is None:
            raise CacheError(f"the writer of {self._folder} is closed; open another to go on")

    def _fail(self, error: BaseException) -> NoReturn:
        self.close()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise CacheError(f"{self._folder} cannot be written: {reason}") from error
        raise error


def _lock(folder: Path) -> BinaryIO:
    """The folder's lock, which lasts until the file is closed or the process ends."""
    import fcntl  # here, as a system that lacks it can read a cache

    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)  # another writer may be quicker
    for path in missing:
        sync_folder(path.parent)
    lock = (folder / _LOCK).open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if isinstance(error, BlockingIOError):
            raise LockedError(f"{folder} is open in another writer") from None
        raise
    return lock


def _head_tensors(
    kind: str, vocab_size: int, dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None
) -> dict[str, list[Tensor]]:
    """The tensors of the head's file; none for a kind without one."""
    if kind != "hidden":
        for name, value in (("weight", weight), ("bias", bias)):
            require(value is None, name, f"None for kind {kind!r}", value)
        return {}
    width = weight.shape[-1:] if isinstance(weight, Tensor) else ()
    layout: Layout = {"weight": (dtype, (vocab_size, *width))}
    head = {"weight": [_copy("weight", weight, *layout["weight"])]}
    if bias is not None:
        layout["bias"] = (dtype, (vocab_size,))
        head["bias"] = [_copy("bias", bias, *layout["bias"])]
    for name, [value] in head.items():
        require(value.numel() > 0, name, "not empty", tuple(value.shape))
        check_values({name: value}, {name: layout[name]}, vocab_size)
    return head


def _check_tensor(name: str, value: object, dtypes: Sequence[torch.dtype]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {value.dtype}")
    return value


def _check_ids(name: str, value: object, dimensions: int) -> None:
    shape = tuple(_check_tensor(name, value, (torch.int64, torch.int32)).shape)
    require(len(shape) == dimensions, name, "[S]" if dimensions == 1 else "[S, K]", shape)


def _copy(name: str, value: object, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of that dtype and shape in memory of its own, contiguous and on the CPU."""
    given = _check_tensor(name, value, (dtype,))
    require(tuple(given.shape) == shape, name, f"of shape {shape}", tuple(given.shape))
    return given.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
