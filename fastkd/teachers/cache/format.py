"""The files of a teacher cache: manifest, safetensors layout, and the checks of both.

A shard is checked in this order: its size against the manifest, its header against the one that the manifest implies,
its digest, and its values. Every step reads bounded pieces, so no number in a file can cause a large allocation.
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
PARTIAL = ".partial"  # suffix of files that are being written

MAX_MANIFEST = 16 << 20  # bytes; each shard takes about 200
_MAX_HEADER = 64 << 10  # bytes; a shard has at most five tensors of about 100 each
_PIECE = 1 << 20  # elements, or bytes, checked at a time
_MAX_LOGPROB = 1e-4  # above 0, because rounding can raise the logarithm of a probability close to 1
_SAFETENSORS = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}

Layout = dict[
    str, tuple[torch.dtype, tuple[int, ...]]
]  # dtype and shape of a file's tensors by name


class CacheError(ValueError):
    """A cache cannot be read or written."""


class ManifestError(CacheError):
    """The manifest is missing, malformed, of a newer version, or contradicts itself."""


class ShardError(CacheError):
    """A shard or the lm_head's file is missing, or contradicts the manifest."""


class IncompleteError(CacheError):
    """The cache is still being written, or its writer was killed."""


class LockedError(CacheError):
    """Another writer has the cache open."""


def require(holds: bool, name: str, allowed: str, value: object) -> None:
    """Raise ValueError unless the condition holds; the message names the argument, its value and what is allowed."""
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {reprlib.repr(value)}")


def folder_of(path: object, argument: str = "path") -> Path:
    """Return the folder of a cache as a Path; TypeError unless it is a str or an os.PathLike."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{argument} must be a str or an os.PathLike, got {type(path).__name__}")
    return Path(path)


def need(module: str, what: str, extra: str) -> Any:
    """Import an optional dependency; ImportError names the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {module}: pip install 'fastkd[{extra}]'") from error


def is_int(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether a value is an int (and not a bool) of at least `least`."""
    value = plain(value)
    return type(value) is int and value >= least


def _is_number(value: object) -> TypeGuard[int | float]:
    real = type(value) is int or type(value) is float
    # False for NaN, and for ints too large for a float.
    return real and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


@dataclass(frozen=True)
class StoredFile:
    """Record of a file: its name in the cache's folder, its size in bytes and its SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard(StoredFile):
    """Record of a file of examples, whose rows are concatenated."""

    examples: int
    rows: int


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{index:06d}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json, which describes a cache.

    Raises:
        ValueError: a field is malformed or contradicts another; the message names it.
    """

    kind: str
    vocab_size: int
    dtype: str  # dtype of the teacher's floating-point tensors
    shard_examples: int  # sequences per shard; the last shard of a complete cache may have fewer
    k: int | None = None  # for kind "topk"
    temperature: float | None = None  # for kind "topk"
    hidden_size: int | None = None  # for kind "hidden"
    bias: bool = False  # for kind "hidden": whether the lm_head has a bias
    logit_scale: float = 1.0  # for kind "hidden": pass it to the loss as teacher_logit_scale
    softcap: float | None = None  # for kind "hidden": pass it to the loss as teacher_softcap
    tokenizer_sha256: str | None = None
    teacher: str | None = None  # a name for people
    head: StoredFile | None = None  # for kind "hidden"
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
        # Store 1 as 1.0, so that equal settings give equal bytes.
        for name in ("temperature", "logit_scale", "softcap"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        is_record = isinstance(self.head, StoredFile)
        check_kind("hidden", "head", is_record, "the record of a file", None)
        if self.head is not None:
            _check_record("head", self.head, HEAD, self.head_layout())
        for index, shard in enumerate(self.shards):
            self._check_shard(index, shard)

    def _check_shard(self, index: int, shard: Shard) -> None:
        where, full = f"shards[{index}]", self.shard_examples
        if self.complete and index == len(self.shards) - 1:
            valid, allowed = is_int(shard.examples) and shard.examples <= full, f"in [1, {full}]"
        else:
            valid, allowed = is_int(shard.examples) and shard.examples == full, f"{full}"
        require(valid, f"{where}.examples", allowed, shard.examples)
        valid = is_int(shard.rows, shard.examples)
        require(valid, f"{where}.rows", f"an int of at least {shard.examples}", shard.rows)
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
        """The dtypes of all tensors by name."""
        layout: Layout = {"lengths": (torch.int64, ())} | self.row_layout()
        if self.kind == "hidden":
            layout |= self.head_layout()
        return {name: str(dtype).removeprefix("torch.") for name, (dtype, _) in layout.items()}

    def row_layout(self) -> Layout:
        """Return the dtypes of the per-row tensors and their shapes without the dimension of rows."""
        real = DTYPES[self.dtype]
        teacher: Layout = {"logits": (real, (self.vocab_size,))}
        if self.kind == "hidden":
            teacher = {"hidden": (real, (self.hidden_size or 0,))}
        elif self.kind == "topk":
            ids: Layout = {"ids": (torch.int32, (self.k or 0,))}
            teacher = ids | {"logprobs": (real, (self.k or 0,)), "tail_logprob": (real, ())}
        return {"input_ids": (torch.int32, ()), **teacher}

    def shard_layout(self, shard: Shard) -> Layout:
        """Return the dtypes and shapes of a shard's tensors."""
        layout: Layout = {"lengths": (torch.int64, (shard.examples,))}
        for name, (dtype, shape) in self.row_layout().items():
            layout[name] = (dtype, (shard.rows, *shape))
        return layout

    def head_layout(self) -> Layout:
        """Return the dtypes and shapes of the lm_head's tensors."""
        real = DTYPES[self.dtype]
        layout: Layout = {"weight": (real, (self.vocab_size, self.hidden_size or 0))}
        return layout | ({"bias": (real, (self.vocab_size,))} if self.bias else {})

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del content["dtype"], content["bias"]  # both follow from dtypes
        shards = content.pop("shards")
        content |= {"dtypes": self.dtypes, "examples": self.examples, "rows": self.rows}
        return json.dumps({**content, "shards": shards}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: bytes | str) -> Manifest:
        """Parse the text of manifest.json, the inverse of :meth:`to_json`.

        Raises:
            ValueError, RecursionError: the text is not JSON, or not a manifest of this version.
        """
        content = json.loads(text)
        content = content if isinstance(content, dict) else {}
        require(content.get("format") == FORMAT, "format", repr(FORMAT), content.get("format"))
        version = content.get("version")
        require(is_int(version), "version", "a positive int", version)
        if version != VERSION:
            raise ValueError(
                f"has version {version}, but this fastkd reads version {VERSION}; upgrade fastkd"
            )
        stored = {field.name for field in fields(cls)} - {"dtype", "bias"}
        derived = {"dtypes", "examples", "rows"}
        members = _members("the manifest", content, stored | derived | {"format", "version"})
        settings = {name: members[name] for name in stored - {"shards", "head"}}
        require(isinstance(members["shards"], list), "shards", "a list", members["shards"])
        shards = tuple(
            _record(Shard, f"shards[{index}]", entry)
            for index, entry in enumerate(members["shards"])
        )
        head = None if members["head"] is None else _record(StoredFile, "head", members["head"])
        dtypes = members["dtypes"] if isinstance(members["dtypes"], dict) else {}
        # Each kind has one of these tensors. The comparison with the derived members below finds a wrong one.
        floating = (dtypes[name] for name in ("hidden", "logprobs", "logits") if name in dtypes)
        dtype = next(floating, None)
        require(isinstance(dtype, str), "dtypes", "a dict of dtypes by tensor name", dtypes)
        bias = "bias" in dtypes
        manifest = cls(**settings, dtype=str(dtype), bias=bias, head=head, shards=shards)
        for name in sorted(derived):
            implied = getattr(manifest, name)
            allowed = f"{implied}, which the other fields imply"
            require(members[name] == implied, name, allowed, members[name])
        return manifest


def _members(where: str, value: object, names: set[str]) -> dict[str, Any]:
    """Return a JSON object's members; ValueError unless their names are exactly these."""
    members = value if isinstance(value, dict) else {}
    missing, extra = sorted(names - members.keys()), sorted(members.keys() - names)
    if missing or extra:
        raise ValueError(
            f"{where} must have the fields of version {VERSION}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {reprlib.repr(extra) if extra else 'none'}"
        )
    return members


def _record(kind: type[Any], where: str, value: object) -> Any:
    return kind(**_members(where, value, {field.name for field in fields(kind)}))


def _check_record(where: str, record: StoredFile, name: str, layout: Layout) -> None:
    # File names are fixed, so no manifest can point outside the folder.
    require(record.file == name, f"{where}.file", repr(name), record.file)
    size = file_size(layout)
    has_size = is_int(record.bytes) and record.bytes == size
    require(has_size, f"{where}.bytes", f"{size}, the size of its tensors", record.bytes)
    has_digest = _is_digest(record.sha256)
    require(has_digest, f"{where}.sha256", "64 lowercase hexadecimal digits", record.sha256)


def read_part(folder: Path) -> Manifest:
    """Read the manifest in a folder, of a cache or of one part of it.

    Raises:
        ManifestError: the manifest is missing, malformed, of a newer version, or contradicts itself.
    """
    path = folder / MANIFEST
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST:
            raise ManifestError(f"{path} is not a regular file of at most {MAX_MANIFEST} bytes")
        text = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{folder} is not a teacher cache: {MANIFEST}: {error.strerror}") from error  # fmt: skip
    try:
        return Manifest.from_json(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: {error}") from error


def _header(layout: Layout) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and the size in bytes of the data that follows it."""
    header, end = {}, 0
    # Tensors with wider elements come first, so that every tensor is aligned.
    for name in sorted(layout, key=lambda name: (-layout[name][0].itemsize, name)):
        dtype, shape = layout[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        stored = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [start, end]}
        header[name] = stored
    return header, end


def _prefix(layout: Layout) -> bytes:
    """Return the bytes of a safetensors file before its data: the length of the header, and the header."""
    text = json.dumps(_header(layout)[0], separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_size(layout: Layout) -> int:
    """Return the size of a safetensors file in bytes."""
    return len(_prefix(layout)) + _header(layout)[1]


def chunks(layout: Layout, tensors: Mapping[str, Sequence[Tensor]]) -> Iterator[Any]:
    """Yield the bytes of a safetensors file.

    safetensors.torch.save_file is not used, because it needs each tensor in one piece, a second copy in memory, and its
    bytes may depend on the installed version, while a resumed writer must reproduce them.

    Args:
        layout: dtypes and shapes of the tensors.
        tensors: contiguous CPU tensors by name; each sequence is concatenated along the first dimension.
    """
    yield _prefix(layout)
    for name in _header(layout)[0]:
        for piece in tensors[name]:
            # torch exposes a tensor's memory as a buffer only through NumPy, which may not be installed.
            yield memoryview((ctypes.c_char * piece.nbytes).from_address(address(piece)))


def digest(data: Iterable[Any]) -> str:
    """Return the SHA-256 of concatenated chunks of bytes."""
    sha256 = hashlib.sha256()
    for chunk in data:
        sha256.update(chunk)
    return sha256.hexdigest()


def replace_file(path: Path, data: Iterable[Any]) -> str:
    """Write a file atomically, so that it is complete or absent even after a power failure; return its SHA-256."""
    partial = path.with_name(path.name + PARTIAL)
    sha256 = hashlib.sha256()
    with partial.open("wb") as file:
        for chunk in data:
            file.write(chunk)
            sha256.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)
    return sha256.hexdigest()


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise ShardError unless every file has the size and header that the manifest implies."""
    if manifest.head is not None:
        check_file(folder, manifest.head, manifest.head_layout(), full=False)
    for shard in manifest.shards:
        check_file(folder, shard, manifest.shard_layout(shard), full=False)


def check_file(folder: Path, record: StoredFile, layout: Layout, *, full: bool) -> None:
    """Raise ShardError unless a file has the size, header and (if full) digest that the manifest implies.

    At most 1 MiB of the file is held in memory, whatever it contains.
    """
    path = folder / record.file
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ShardError(f"{path} is not a regular file")
        if status.st_size != record.bytes:
            raise ShardError(f"{path} has {status.st_size} bytes; the manifest says {record.bytes}")
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if length > min(_MAX_HEADER, record.bytes - 8):
                hint = ""
                if start.startswith((b"PK", b"\x80")):
                    hint = (
                        "; it looks like a pickle or a file of torch.save, which fastkd never reads"
                    )
                raise ShardError(
                    f"{path} is not a safetensors file: its header would have {length} bytes{hint}"
                )
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
    """Describe how a header differs from that of the layout."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        return "the header is not JSON"
    if not isinstance(header, dict):
        return "the header is not a JSON object"
    implied, _ = _header(layout)
    for name in sorted(implied.keys() | header.keys()):
        if header.get(name) != implied.get(name):
            stored = reprlib.repr(header.get(name))
            return f"the header has {stored} for tensor {name!r}; the manifest implies {implied.get(name)}"
    return "the header has the right content but not the bytes that CacheWriter writes"


def check_values(tensors: Mapping[str, Any], layout: Layout, vocab_size: int) -> None:
    """Raise ValueError unless every value is in its range; the message names the tensor.

    Args:
        tensors: tensors, or slices of a safetensors file, which are read a bounded piece at a time.
        layout: the tensors to check, none of them empty.
        vocab_size: V.
    """
    for name, (_, shape) in layout.items():
        step = max(1, _PIECE // math.prod(shape[1:]))
        for first in range(0, shape[0], step):
            _check_piece(name, tensors[name][first : first + step], vocab_size)


def _check_piece(name: str, values: Tensor, vocab_size: int) -> None:
    if name == "logits":
        largest = values.amax(-1)  # NaN if the row contains NaN
        wrong = largest[~largest.isfinite()]
        allowed = "finite or -inf, and not all -inf in a row"
        require(not wrong.numel(), "logits", allowed, wrong[:1].tolist())
        return
    least, most = (extreme.item() for extreme in values.aminmax())  # both NaN if there is a NaN
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
        following = ordered[..., 1:]
        repeated = following[(following == ordered[..., :-1]) & (following >= 0)]
        require(not repeated.numel(), "ids", "distinct within a row", repeated[:1].tolist())
