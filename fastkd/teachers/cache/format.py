"""The files of a teacher cache: the manifest, the layout of a safetensors file, and what is checked of both.

A shard is checked from the outside in, and never by way of an allocation that the file asks for: its size against the
manifest, its header against the one that the manifest implies, its digest, then the values, a bounded piece at a time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import json
import math
import os
import re
import reprlib
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fastkd.core.scalars import plain
from fastkd.core.tensors import address

FORMAT = "fastkd teacher cache"
VERSION = 1
KINDS = ("hidden", "topk", "dense")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MANIFEST = "manifest.json"
HEAD = "head.safetensors"
PARTIAL = ".partial"  # ends the name of a file that is being written

MAX_MANIFEST = 16 << 20  # bytes; a shard takes about 200
_MAX_HEADER = 64 << 10  # bytes; a shard has at most five tensors, about 100 each
_PIECE = 1 << 20  # elements, or bytes, that are looked at at once
_MAX_LOGPROB = 1e-4  # rounding takes the logarithm of a probability of nearly 1 above 0
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SAFETENSORS = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # the tensors of a file: dtype and shape


class CacheError(ValueError):
    """A cache that cannot be read, or cannot be written."""


class ManifestError(CacheError):
    """manifest.json is missing, malformed, of a newer version, or contradicts itself."""


class ShardError(CacheError):
    """A shard or the head is missing, or is not what the manifest says."""


class IncompleteError(CacheError):
    """The cache is still being written, or its writer was killed."""


class LockedError(CacheError):
    """Another writer has the cache open."""


def require(holds: bool, name: str, allowed: str, value: object) -> None:
    """Raise ValueError, saying what came and what is allowed, unless the condition holds."""
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {reprlib.repr(value)}")


def folder_of(path: object, argument: str = "path") -> Path:
    """The path of a cache's folder."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{argument} must be a str or an os.PathLike, got {type(path).__name__}")
    return Path(path)


def need(module: str, what: str, extra: str) -> Any:
    """Import a module of an extra; ImportError says which extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {module}: pip install 'fastkd[{extra}]'") from error


def is_int(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether a value is an int, and no bool, of at least that."""
    value = plain(value)
    return type(value) is int and value >= least


def _is_number(value: object) -> TypeGuard[int | float]:
    real = type(value) is int or type(value) is float
    return real and abs(value) <= sys.float_info.max  # type: ignore[arg-type]  # neither NaN nor an int of any size


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


@dataclass(frozen=True)
class StoredFile:
    """A file of the cache: its name in the folder, its size and its digest."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard(StoredFile):
    """A file of examples, whose rows lie one after the other."""

    examples: int
    rows: int


def shard_name(index: int) -> str:
    """The name of a shard's file."""
    return f"shard-{index:06d}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What a cache holds, as manifest.json says it.

    Raises:
        ValueError: a field is malformed or contradicts another one; the message names it.
    """

    kind: str
    vocab_size: int
    dtype: str  # of the teacher's floating-point tensors
    shard_examples: int  # sequences in every shard but the last of a complete cache
    k: int | None = None  # kind "topk"
    temperature: float | None = None  # kind "topk"
    hidden_size: int | None = None  # kind "hidden"
    bias: bool = False  # kind "hidden": whether the head has one
    logit_scale: float = 1.0  # kind "hidden": the loss's teacher_logit_scale
    softcap: float | None = None  # kind "hidden": the loss's teacher_softcap
    tokenizer_sha256: str | None = None
    teacher: str | None = None  # a name for people
    head: StoredFile | None = None  # kind "hidden"
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "shard_examples", "k", "temperature", "logit_scale", "softcap"):
            object.__setattr__(self, name, plain(getattr(self, name)))

        def check(name: str, holds: bool, allowed: str) -> None:
            require(holds, name, allowed, getattr(self, name))

        def check_kind(kind: str, name: str, holds: bool, allowed: str, absent: object) -> None:
            value = getattr(self, name)
            if self.kind == kind:
                check(name, holds, allowed)
            else:
                is_absent = not isinstance(value, Tensor) and value == absent
                check(name, is_absent, f"{absent} for kind {self.kind!r}")

        check("kind", self.kind in KINDS, f"one of {', '.join(KINDS)}")
        check(
            "vocab_size", is_int(self.vocab_size) and self.vocab_size < 2**31, "an int in [1, 2^31)"
        )
        check("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        check("shard_examples", is_int(self.shard_examples), "a positive int")
        k_fits = is_int(self.k) and self.k <= self.vocab_size
        check_kind("topk", "k", k_fits, f"an int in [1, {self.vocab_size}]", None)
        positive = "positive and finite"
        tempered = _is_number(self.temperature) and self.temperature > 0
        check_kind("topk", "temperature", tempered, positive, None)
        check_kind("hidden", "hidden_size", is_int(self.hidden_size), "a positive int", None)
        check_kind("hidden", "bias", type(self.bias) is bool, "a bool", False)
        check_kind("hidden", "logit_scale", _is_number(self.logit_scale), "a finite number", 1.0)
        capped = self.softcap is None or (_is_number(self.softcap) and self.softcap > 0)
        check_kind("hidden", "softcap", capped, f"{positive}, or None", None)
        digest = self.tokenizer_sha256
        hexadecimal = digest is None or _is_digest(digest)
        check("tokenizer_sha256", hexadecimal, "64 lowercase hexadecimal digits, or None")
        check("teacher", isinstance(self.teacher, str | None), "a str, or None")
        check("complete", type(self.complete) is bool, "a bool")
        for name in (
            "temperature",
            "logit_scale",
            "softcap",
        ):  # 1 and 1.0 are the same setting, and the same bytes
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        held = isinstance(self.head, StoredFile)
        check_kind("hidden", "head", held, "the record of a file", None)
        if self.head is not None:
            _check_record("head", self.head, HEAD, self.head_layout())
        for index, shard in enumerate(self.shards):
            self._check_shard(index, shard)

    def _check_shard(self, index: int, shard: Shard) -> None:
        where, full = f"shards[{index}]", self.shard_examples
        if self.complete and index == len(self.shards) - 1:
            whole, allowed = is_int(shard.examples) and shard.examples <= full, f"in [1, {full}]"
        else:
            whole, allowed = is_int(shard.examples) and shard.examples == full, f"{full}"
        require(whole, f"{where}.examples", allowed, shard.examples)
        enough = is_int(shard.rows, shard.examples)
        require(enough, f"{where}.rows", f"an int of at least {shard.examples}", shard.rows)
        _check_record(where, shard, shard_name(index), self.shard_layout(shard))

    @property
    def examples(self) -> int:
        """The number of sequences."""
        return sum(shard.examples for shard in self.shards)

    @property
    def rows(self) -> int:
        """The number of tokens."""
        return sum(shard.rows for shard in self.shards)

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every tensor by its name."""
        layout: Layout = {"lengths": (torch.int64, ())} | self.row_layout()
        if self.kind == "hidden":
            layout |= self.head_layout()
        return {name: str(dtype).removeprefix("torch.") for name, (dtype, _) in layout.items()}

    def row_layout(self) -> Layout:
        """The tensors that have an entry a row, and the shape of that entry."""
        real = DTYPES[self.dtype]
        teacher: Layout = {"logits": (real, (self.vocab_size,))}
        if self.kind == "hidden":
            teacher = {"hidden": (real, (self.hidden_size or 0,))}
        elif self.kind == "topk":
            ids: Layout = {"ids": (torch.int32, (self.k or 0,))}
            teacher = ids | {"logprobs": (real, (self.k or 0,)), "tail_logprob": (real, ())}
        return {"input_ids": (torch.int32, ()), **teacher}

    def shard_layout(self, shard: Shard) -> Layout:
        """The tensors of a shard."""
        layout: Layout = {"lengths": (torch.int64, (shard.examples,))}
        for name, (dtype, shape) in self.row_layout().items():
            layout[name] = (dtype, (shard.rows, *shape))
        return layout

    def head_layout(self) -> Layout:
        """The tensors of the head."""
        real = DTYPES[self.dtype]
        layout: Layout = {"weight": (real, (self.vocab_size, self.hidden_size or 0))}
        return layout | ({"bias": (real, (self.vocab_size,))} if self.bias else {})

    def to_json(self) -> str:
        """The text of manifest.json."""
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del content["dtype"], content["bias"]  # dtypes tells them
        shards = content.pop("shards")
        content |= {"dtypes": self.dtypes, "examples": self.examples, "rows": self.rows}
        return json.dumps({**content, "shards": shards}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: bytes | str) -> Manifest:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError, RecursionError: the text is not JSON, or not a manifest of this version.
        """
        content = json.loads(text)
        known = content if isinstance(content, dict) else {}
        require(known.get("format") == FORMAT, "format", repr(FORMAT), known.get("format"))
        version = known.get("version")
        require(is_int(version), "version", "a positive int", version)
        if version != VERSION:
            raise ValueError(
                f"is of version {version}, and this fastkd reads version {VERSION}; upgrade fastkd"
            )
        stored = {field.name for field in fields(cls)} - {"dtype", "bias"}
        derived = {"dtypes", "examples", "rows"}
        own = _members("the manifest", known, stored | derived | {"format", "version"})
        settings = {name: own[name] for name in stored - {"shards", "head"}}
        require(isinstance(own["shards"], list), "shards", "a list", own["shards"])
        shards = tuple(
            _record(Shard, f"shards[{index}]", entry) for index, entry in enumerate(own["shards"])
        )
        head = None if own["head"] is None else _record(StoredFile, "head", own["head"])
        dtypes = own["dtypes"] if isinstance(own["dtypes"], dict) else {}
        # A kind has one of these; that it is the right one, and the others go with it, is seen below.
        floating = (dtypes[name] for name in ("hidden", "logprobs", "logits") if name in dtypes)
        dtype = next(floating, None)
        require(isinstance(dtype, str), "dtypes", "a dtype of each tensor by its name", dtypes)
        bias = "bias" in dtypes
        manifest = cls(**settings, dtype=str(dtype), bias=bias, head=head, shards=shards)
        for name in sorted(derived):
            implied = getattr(manifest, name)
            require(own[name] == implied, name, f"{implied}, as the rest implies", own[name])
        return manifest


def _members(where: str, value: object, names: set[str]) -> dict[str, Any]:
    """A JSON object that has exactly these members."""
    found = value if isinstance(value, dict) else {}
    missing, extra = sorted(names - found.keys()), sorted(found.keys() - names)
    if missing or extra:
        raise ValueError(
            f"{where} must have the fields of version {VERSION}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {reprlib.repr(extra) if extra else 'none'}"
        )
    return found


def _record(kind: type[Any], where: str, value: object) -> Any:
    return kind(**_members(where, value, {field.name for field in fields(kind)}))


def _check_record(where: str, record: StoredFile, name: str, layout: Layout) -> None:
    # Names are prescribed, so that no path leads out of the folder.
    require(record.file == name, f"{where}.file", repr(name), record.file)
    size = file_size(layout)
    sized = is_int(record.bytes) and record.bytes == size
    require(sized, f"{where}.bytes", f"{size}, which its tensors take", record.bytes)
    digits = _is_digest(record.sha256)
    require(digits, f"{where}.sha256", "64 lowercase hexadecimal digits", record.sha256)


def read_part(folder: Path) -> Manifest:
    """The manifest that lies in a folder: of a cache, or of a part of one.

    Raises:
        ManifestError: there is none, or it is malformed, of a newer version, or contradicts itself.
    """
    path = folder / MANIFEST
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_MANIFEST:
            raise ManifestError(f"{path} is no file of at most {MAX_MANIFEST} bytes")
        text = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{folder} is no teacher cache: {MANIFEST}: {error.strerror}") from error  # fmt: skip
    try:
        return Manifest.from_json(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: {error}") from error


def _header(layout: Layout) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the size of the data after it in bytes."""
    header, end = {}, 0
    # Wide items first: then every tensor is aligned.
    for name in sorted(layout, key=lambda name: (-layout[name][0].itemsize, name)):
        dtype, shape = layout[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        stored = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [start, end]}
        header[name] = stored
    return header, end


def _prefix(layout: Layout) -> bytes:
    """A safetensors file up to its data: the length of the header, and the header."""
    text = json.dumps(_header(layout)[0], separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_size(layout: Layout) -> int:
    """The bytes of a safetensors file."""
    return len(_prefix(layout)) + _header(layout)[1]


def chunks(layout: Layout, tensors: Mapping[str, Sequence[Tensor]]) -> Iterator[Any]:
    """The bytes of a safetensors file. Each tensor comes as contiguous pieces along its first dimension, on the CPU.

    Not safetensors.torch.save_file: that takes the shard in one piece, a second copy in memory; and the bytes, which a
    resumed writer has to repeat, would be those of the version at hand.
    """
    yield _prefix(layout)
    for name in _header(layout)[0]:
        for piece in tensors[name]:
            # torch lends a tensor's memory by way of NumPy alone, which may be missing.
            yield memoryview((ctypes.c_char * piece.nbytes).from_address(address(piece)))


def digest(data: Iterable[Any]) -> str:
    """The sha256 of chunks of bytes."""
    found = hashlib.sha256()
    for chunk in data:
        found.update(chunk)
    return found.hexdigest()


def replace_file(path: Path, data: Iterable[Any]) -> str:
    """Write a file that is there whole or not at all, after a power cut too; its sha256."""
    partial = path.with_name(path.name + PARTIAL)
    found = hashlib.sha256()
    with partial.open("wb") as file:
        for chunk in data:
            file.write(chunk)
            found.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)
    return found.hexdigest()


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise ShardError unless every file has the size and the header that the manifest implies."""
    if manifest.head is not None:
        check_file(folder, manifest.head, manifest.head_layout(), full=False)
    for shard in manifest.shards:
        check_file(folder, shard, manifest.shard_layout(shard), full=False)


def check_file(folder: Path, record: StoredFile, layout: Layout, *, full: bool) -> None:
    """Raise ShardError unless a file has the size, the header and, if full, the digest that the manifest implies.

    Whatever the file holds, no more than 1 MiB of it is in memory at once.
    """
    path = folder / record.file
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ShardError(f"{path} is no regular file")
        if found.st_size != record.bytes:
            raise ShardError(f"{path} has {found.st_size} bytes; the manifest says {record.bytes}")
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if length > min(_MAX_HEADER, record.bytes - 8):
                hint = ""
                if start.startswith((b"PK", b"\x80")):
                    hint = "; it looks like a pickle or a file of torch.save, which is never read"
                raise ShardError(f"{path} is no safetensors file: a header of {length} bytes{hint}")
            text = file.read(length)
            if start + text != _prefix(layout):
                raise ShardError(f"{path}: {_difference(text, layout)}")
            if full:
                file.seek(0)
                actual = digest(iter(functools.partial(file.read, _PIECE), b""))
                if actual != record.sha256:
                    raise ShardError(
                        f"{path} has sha256 {actual}; the manifest says {record.sha256}"
                    )
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from error


def _difference(text: bytes, layout: Layout) -> str:
    """How a header differs from the layout's."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return "the header is not JSON"
    if not isinstance(found, dict):
        return "the header is no JSON object"
    implied, _ = _header(layout)
    for name in sorted(implied.keys() | found.keys()):
        if found.get(name) != implied.get(name):
            said = reprlib.repr(found.get(name))
            return f"the header says {said} of tensor {name!r}; the manifest implies {implied.get(name)}"
    return "the header is not written as this format writes it"


def check_values(tensors: Mapping[str, Any], layout: Layout, vocab_size: int) -> None:
    """Raise ValueError, naming the tensor, unless every value is in its range.

    Args:
        tensors: tensors, or slices of a safetensors file; they are looked at a bounded piece at a time.
        layout: those to look at; none is empty.
        vocab_size: V.
    """
    for name, (_, shape) in layout.items():
        step = max(1, _PIECE // math.prod(shape[1:]))
        for first in range(0, shape[0], step):
            _check_piece(name, tensors[name][first : first + step], vocab_size)


def _check_piece(name: str, values: Tensor, vocab_size: int) -> None:
    if name == "logits":
        best = values.amax(-1)  # NaN where a row has one
        wrong = best[~best.isfinite()]
        allowed = "finite or -inf, and not all -inf in a row"
        require(not wrong.numel(), "logits", allowed, wrong[:1].tolist())
        return
    least, most = (extreme.item() for extreme in values.aminmax())  # a NaN is both
    if name in ("logprobs", "tail_logprob"):
        require(most <= _MAX_LOGPROB, name, "at most 0, and not NaN", most)
    elif name in ("input_ids", "ids"):
        first = 0 if name == "input_ids" else -1
        extreme = least if least < first else most
        require(first <= extreme < vocab_size, name, f"in [{first}, {vocab_size})", extreme)
    else:
        require(math.isfinite(least) and math.isfinite(most), name, "finite", [least, most])
    if name == "ids":
        ordered = values.sort(-1).values
        again = ordered[..., 1:]
        twice = again[(again == ordered[..., :-1]) & (again >= 0)]
        require(not twice.numel(), "ids", "distinct within a row", twice[:1].tolist())
