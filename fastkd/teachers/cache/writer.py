"""Writing a teacher cache: complete shards in order, by one writer at a time."""

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
_ARGUMENTS = {"hidden": "hidden", "topk": "topk", "dense": "logits"}  # argument of append by kind


class CacheWriter:
    """Writer of a cache, which writes shards of `shard_examples` sequences and resumes after an interruption.

    In a folder with an unfinished cache the writer continues after the last complete shard. `examples` is the number of
    sequences that the cache has; append the following ones. The files are then byte for byte those of an uninterrupted
    run. One shard is held in memory until it is written.

    Leaving the `with` block writes the last, possibly shorter shard and marks the cache complete. Leaving it by an
    exception does neither. A complete cache with the same settings can be opened, but accepts no more sequences.

    Args:
        path: the folder; created if it does not exist.
        kind: "hidden", "topk" or "dense".
        vocab_size: V.
        dtype: dtype of the teacher's floating-point tensors: float32, bfloat16 or float16.
        shard_examples: the number of sequences per shard.
        weight: [V, H] of that dtype, the lm_head, for kind "hidden".
        bias: [V] of that dtype, or None, for kind "hidden".
        k: the number of entries per row, for kind "topk".
        temperature: the temperature of the log-probabilities, for kind "topk".
        logit_scale: the factor by which the model multiplies its logits, for kind "hidden".
        softcap: c if the model replaces its logits by c tanh(logits / c), or None, for kind "hidden".
        tokenizer_sha256: see :func:`tokenizer_sha256`.
        teacher: a name for the teacher, for people.
        rank: the rank of this process among the `world_size` that build the cache, each with a writer of the same
            settings. :attr:`position` is the index of the sequence that it needs next.
        world_size: the number of processes.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        LockedError: another writer of the same rank has the folder open.
        CacheError: the folder holds a cache or a part with other settings, parts of another number of processes, or
            other files; or it cannot be written.
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
        supported = isinstance(dtype, torch.dtype) and dtype in names
        require(supported, "dtype", " or ".join(map(str, names)), dtype)
        vocab_size, rank, world_size = map(plain, (vocab_size, rank, world_size))
        head = _head_tensors(kind, vocab_size, dtype, weight, bias)
        layout: Layout = {name: (dtype, tuple(piece.shape)) for name, [piece] in head.items()}
        record = None
        if head:
            record = StoredFile(HEAD, file_size(layout), digest(chunks(layout, head)))
        settings = Manifest(
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
            check_others(whole, world_size, settings)
            self._lock = _lock(self._folder)
            self._manifest = self._start(settings, chunks(layout, head))
        except BaseException as error:
            self._fail(error)

    def _start(self, settings: Manifest, head: Iterator[Any]) -> Manifest:
        """Return the manifest in the folder, after checks, or create that of an empty cache."""
        if not (self._folder / MANIFEST).exists():
            # Before the manifest a writer writes only the head, so any other file does not belong to a cache.
            own = {_LOCK, HEAD, HEAD + PARTIAL, MANIFEST + PARTIAL}
            foreign = sorted(name for name in os.listdir(self._folder) if name not in own)
            if foreign:
                raise CacheError(
                    f"{self._folder} holds other files, {reprlib.repr(foreign)}; a new cache needs an empty folder"
                )
            for name in own - {_LOCK}:
                (self._folder / name).unlink(missing_ok=True)
            if settings.head is not None:
                replace_file(self._folder / HEAD, head)
            self._write_manifest(settings)
            return settings
        stored = read_part(self._folder)
        mismatch = difference(stored, settings)
        if mismatch:
            name, before, now = mismatch
            raise CacheError(f"{self._folder} was begun with {name} = {before}, not {now}")
        check_files(self._folder, stored)
        # Remove files that an interrupted writer may have left behind.
        following = shard_name(len(stored.shards))
        for name in (MANIFEST + PARTIAL, following + PARTIAL, following):
            (self._folder / name).unlink(missing_ok=True)
        return stored

    @property
    def manifest(self) -> Manifest:
        """The manifest of what this process has written to disk."""
        return self._manifest

    @property
    def folder(self) -> Path:
        """The folder into which this process writes: the cache's, or its part's."""
        return self._folder

    @property
    def examples(self) -> int:
        """The number of sequences of this process so far, including those of the unfinished shard."""
        return self.manifest.examples + len(self._pending)

    @property
    def position(self) -> int:
        """Index, among the sequences of all processes, of the sequence to pass to :meth:`append` next.

        The shards are dealt to the processes in turn.
        """
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
        """Add a sequence and the teacher's outputs for it, in the one argument that belongs to the cache's kind.

        Tensors are copied and may be on any device. An invalid argument leaves the writer unchanged. A failure to write
        closes the writer; a new one continues after the last complete shard.

        Args:
            input_ids: [S] int64 or int32, S > 0, each in [0, V).
            hidden: [S, H], finite, of the cache's dtype.
            topk: ids and logprobs [S, K] and tail_logprob [S], the latter two of the cache's dtype, at the cache's
                temperature. Its tail policy is not stored. Log-probabilities of padding entries are stored as -inf.
            logits: [S, V] of the cache's dtype, finite or -inf; not all -inf in a row.

        Raises:
            TypeError, ValueError: an argument is invalid; the message names it.
            CacheError: the cache is complete, the writer is closed, or a shard cannot be written.
        """
        self._check_open()
        if self.manifest.complete:
            raise CacheError(f"{self._folder} is complete and accepts no more examples")
        argument = _ARGUMENTS[self.manifest.kind]
        values: dict[str, Any] = {"hidden": hidden, "topk": topk, "logits": logits}
        for name, value in values.items():
            if (value is not None) != (name == argument):
                raise TypeError(
                    f"a cache of kind {self.manifest.kind!r} takes only {argument}; {name} was "
                    f"{'missing' if value is None else 'given'}"
                )
        _check_ids("input_ids", input_ids, 1)
        rows = len(input_ids)
        require(rows > 0, "input_ids", "[S] with S > 0", tuple(input_ids.shape))
        if topk is not None:
            values = self._topk_tensors(topk)
        values["input_ids"] = input_ids
        layout: Layout = {}
        for name, (dtype, shape) in self.manifest.row_layout().items():
            layout[name] = (dtype, (rows, *shape))
        vocab_size = self.manifest.vocab_size
        example = {}
        for name, (dtype, shape) in layout.items():
            value = values[name]
            if dtype == torch.int32:
                # Check before the conversion, which could wrap invalid ids into the valid range.
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
        same = topk.temperature == self.manifest.temperature
        allowed = f"{self.manifest.temperature}, the cache's"
        require(same, "topk's temperature", allowed, topk.temperature)
        if topk.tail_logprob is None:
            raise ValueError("topk must have a tail_logprob; TopK.from_logits computes it")
        _check_ids("ids", topk.ids, 2)
        return {"ids": topk.ids, "logprobs": topk.logprobs, "tail_logprob": topk.tail_logprob}

    def finish(self) -> None:
        """Write the last shard, mark the cache complete, and close the writer; called at the end of a `with` block.

        Raises:
            CacheError: the writer is closed, or a file cannot be written.
        """
        self._check_open()
        if not self.manifest.complete:
            self._commit(complete=True)
        self.close()

    def close(self) -> None:
        """Release the folder. Sequences of an unfinished shard are lost, and the cache stays incomplete."""
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
            # Parts of the shard may be on disk; the next writer removes them.
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
            raise CacheError(
                f"{self._folder} has too many shards; build into another folder with a larger shard_examples"
            )
        replace_file(self._folder / MANIFEST, [text])

    def _check_open(self) -> None:
        if self._lock is None:
            raise CacheError(
                f"the writer of {self._folder} is closed; open another CacheWriter to continue"
            )

    def _fail(self, error: BaseException) -> NoReturn:
        self.close()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise CacheError(f"{self._folder} cannot be written: {reason}") from error
        raise error


def _lock(folder: Path) -> BinaryIO:
    """Create the folder and lock it until the returned file is closed or the process ends."""
    import fcntl  # imported here so that caches can be read on systems without fcntl

    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)  # another writer may create it at the same time
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
    """Return the tensors of the head's file, each as a list of one piece; empty unless the kind is "hidden"."""
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
    """Return a contiguous CPU copy of a tensor that must have this dtype and shape."""
    tensor = _check_tensor(name, value, (dtype,))
    require(tuple(tensor.shape) == shape, name, f"of shape {shape}", tuple(tensor.shape))
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
