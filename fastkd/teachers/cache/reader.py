"""Reading a teacher cache: a dataset of examples, and batches whose teacher can be passed to a loss."""

from __future__ import annotations

import functools
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from fastkd.core.scalars import plain
from fastkd.teachers import TAILS, LinearTeacher, TopK
from fastkd.teachers.cache.format import (
    HEAD,
    IncompleteError,
    ShardError,
    check_file,
    check_files,
    check_values,
    folder_of,
    need,
    read_part,
    require,
)
from fastkd.teachers.cache.parts import check_rank, listed, read_whole

_VERIFY = ("full", "header")


def _open_file(path: Path) -> Any:
    safetensors = need("safetensors", "reading a teacher cache", "cache")
    try:
        return safetensors.safe_open(path, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise ShardError(f"{path} cannot be read: {error}") from error


class _Head(NamedTuple):
    """Reference to an lm_head on disk, which is sent between processes in place of its tensors."""

    folder: str
    sha256: str
    modified: int  # st_mtime_ns, so that a changed file is checked and loaded again
    full: bool  # whether to check digest and values
    device: str = "cpu"


# The head may be loaded under torch.inference_mode by an evaluation and used by training later, which must be able to
# save it for backward.
@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _load_head(head: _Head) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias, cached per process and device; on the CPU they are memory-mapped."""
    if head.device != "cpu":
        weight, bias = _load_head(head._replace(device="cpu"))
        return weight.to(head.device), None if bias is None else bias.to(head.device)
    folder = Path(head.folder)
    manifest = read_part(folder)
    if manifest.head is None or manifest.head.sha256 != head.sha256:
        raise ShardError(f"{folder / HEAD} was replaced while it was in use")
    layout = manifest.head_layout()
    check_file(folder, manifest.head, layout, full=head.full)
    file = _open_file(folder / HEAD)
    tensors = {name: file.get_tensor(name) for name in layout}
    if head.full:
        try:
            check_values(tensors, layout, manifest.vocab_size)
        except ValueError as error:
            raise ShardError(f"{folder / HEAD}: {error}") from error
    return tensors["weight"], tensors.get("bias")


@dataclass(frozen=True, eq=False)
class _CachedTeacher(LinearTeacher):
    """LinearTeacher that is pickled without its lm_head, so that DataLoader workers do not send it with every batch."""

    head: _Head | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _cached_teacher, (self.hidden, self.head)


def _cached_teacher(hidden: Tensor, head: _Head) -> _CachedTeacher:
    return _CachedTeacher(hidden, *_load_head(head), head)


class Example(NamedTuple):
    """One sequence: input_ids [S] int64, and its teacher, a LinearTeacher, a TopK or logits [S, V]."""

    input_ids: Tensor
    teacher: Tensor | TopK | LinearTeacher


class Batch(NamedTuple):
    """Sequences padded to the longest: input_ids [B, S] int64, mask [B, S] bool, and a teacher of rows [B, S]."""

    input_ids: Tensor
    mask: Tensor
    teacher: Tensor | TopK | LinearTeacher

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on a device. An lm_head is copied there once and reused by later batches."""
        move = functools.partial(Tensor.to, device=torch.device(device), non_blocking=non_blocking)
        teacher = self.teacher
        if isinstance(teacher, TopK):
            tail = teacher.tail_logprob
            teacher = replace(
                teacher,
                ids=move(teacher.ids),
                logprobs=move(teacher.logprobs),
                tail_logprob=None if tail is None else move(tail),
            )
        elif isinstance(teacher, _CachedTeacher) and teacher.head is not None:
            hidden = move(teacher.hidden)
            teacher = _cached_teacher(hidden, teacher.head._replace(device=str(hidden.device)))
        elif isinstance(teacher, Tensor):
            teacher = move(teacher)
        return Batch(move(self.input_ids), move(self.mask), teacher)


class _OpenShard(NamedTuple):
    file: Any  # safetensors.safe_open
    starts: list[int]  # the first row of each example, followed by the number of rows


class TeacherCache(Dataset[Example]):
    """Teacher cache as a map-style dataset of :class:`Example`; `collate` combines examples to a :class:`Batch`.

    The constructor checks the manifest and the size and header of every file. Each process checks the digest and values
    of a shard when it first opens it, and then memory-maps it. Instances can be pickled; DataLoader workers open the
    shards themselves.

    Args:
        path: the folder of the cache, which one or several processes have built.
        rank: the index of the contiguous part of the examples that this process reads, in [0, world_size). Parts differ
            in size by at most one example.
        world_size: the number of parts.
        tail: the tail policy of TopK teachers, for kind "topk".
        verify: "full", or "header" to skip digests and the values of lm_head, hidden states and logits, for example
            after a call of `verify()`. Token ids, lengths and log-probabilities are checked in both cases.
        allow_incomplete: open an unfinished cache, with the examples that it has so far.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names it.
        ManifestError, ShardError, IncompleteError: the cache is damaged or incomplete; also raised when examples are
            accessed.
        ImportError: safetensors is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        rank: int = 0,
        world_size: int = 1,
        tail: str = "bucket",
        verify: str = "full",
        allow_incomplete: bool = False,
    ) -> None:
        check_rank(rank, world_size)
        rank, world_size = plain(rank), plain(world_size)
        require(isinstance(allow_incomplete, bool), "allow_incomplete", "a bool", allow_incomplete)
        require(tail in TAILS, "tail", f"one of {', '.join(TAILS)}", tail)
        require(verify in _VERIFY, "verify", f"one of {', '.join(_VERIFY)}", verify)
        whole = folder_of(path).absolute()
        self.manifest, self._parts = read_whole(whole)
        count = self.manifest.examples
        if not (self.manifest.complete or allow_incomplete):
            unfinished = [folder.name for folder, part in self._parts if not part.complete]
            which = f", and lacks the end of {listed(unfinished)}" if len(self._parts) > 1 else ""
            raise IncompleteError(
                f"{whole} is not complete: it has {count} examples so far{which}; "
                "resume the build, or open it with allow_incomplete=True"
            )
        for folder, part in self._parts:
            check_files(folder, part)
        self._range = range(count * rank // world_size, count * (rank + 1) // world_size)
        self._tail = tail
        self._full = verify == "full"
        self._head: _Head | None = None
        if self.manifest.head is not None:
            folder, _ = self._parts[0]
            modified = (folder / HEAD).stat().st_mtime_ns
            self._head = _Head(str(folder), self.manifest.head.sha256, modified, self._full)
        self._shards: dict[int, _OpenShard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return the example at an index within this rank's part, or for a slice a list that `collate` accepts.

        Raises:
            TypeError: the index is neither an integer nor a slice of integers.
            IndexError: the index is out of range.
            ShardError: a shard is missing or damaged.
        """
        if isinstance(index, slice):
            try:
                positions = range(len(self))[index]
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"index must be a slice of integers, got {index}: {error}"
                ) from None
            return [self._example(position) for position in positions]
        try:
            position = operator.index(index)
        except TypeError:
            kind = type(index).__name__
            raise TypeError(f"index must be an integer or a slice, got {kind}") from None
        if not -len(self) <= position < len(self):
            raise IndexError(f"index must be in [{-len(self)}, {len(self)}), got {position}")
        return self._example(position)

    def _example(self, position: int) -> Example:
        position = self._range[position]
        number, position = divmod(position, self.manifest.shard_examples)
        if number not in self._shards:
            self._shards[number] = self._open(number, self._full)
        file, starts = self._shards[number]
        rows = slice(starts[position], starts[position + 1])
        # Copy the rows: a view would keep the whole shard alive, and pickling it would send the whole shard.
        tensors = {name: file.get_slice(name)[rows].clone() for name in self.manifest.row_layout()}
        return Example(tensors.pop("input_ids").long(), self._teacher(tensors))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Combine examples to a batch, as a DataLoader's collate_fn.

        Where the mask is False, input_ids, hidden states and logits are 0; a TopK has ids -1 and tail probability 1.

        Raises:
            ValueError: examples is empty.
        """
        if not examples:
            raise ValueError("examples must contain at least one example, got none")
        lengths = torch.tensor([len(example.input_ids) for example in examples])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
        per_example = [_row_tensors(example.teacher) for example in examples]
        padding = {"ids": -1, "logprobs": -math.inf}
        tensors = {
            name: pad_sequence([rows[name] for rows in per_example], True, padding.get(name, 0))
            for name in per_example[0]
        }
        input_ids = pad_sequence([example.input_ids for example in examples], True)
        return Batch(input_ids, mask, self._teacher(tensors))

    def verify(self) -> None:
        """Check all digests and values of the whole cache, independent of the rank and `verify` of this instance.

        Raises:
            ShardError: a file contradicts the manifest, or holds a value out of range.
        """
        if self._head is not None:
            for folder, _ in self._parts:
                head = self._head._replace(folder=str(folder), full=True)
                _load_head.__wrapped__(head)  # bypass the lru_cache
        for number in range(len(self.manifest.shards)):
            self._open(number, full=True)

    def _open(self, number: int, full: bool) -> _OpenShard:
        index, rank = divmod(number, len(self._parts))
        folder, part = self._parts[rank]
        shard = part.shards[index]
        layout = part.shard_layout(shard)
        path = folder / shard.file
        check_file(folder, shard, layout, full=full)
        file = _open_file(path)
        lengths = file.get_tensor("lengths")
        ends = lengths.cumsum(0)
        if not (lengths.ge(1).all() and lengths.le(shard.rows).all() and ends[-1] == shard.rows):
            raise ShardError(f"{path}: lengths must be positive and have the sum {shard.rows}")
        skipped = {"lengths"} if full else {"lengths", "hidden", "logits"}
        checked = {name: layout[name] for name in layout if name not in skipped}
        slices = {name: file.get_slice(name) for name in checked}
        try:
            check_values(slices, checked, self.manifest.vocab_size)
        except ValueError as error:
            raise ShardError(f"{path}: {error}") from error
        return _OpenShard(file, [0, *ends.tolist()])

    def _teacher(self, tensors: Mapping[str, Tensor]) -> Tensor | TopK | LinearTeacher:
        if self._head is not None:
            return _cached_teacher(tensors["hidden"], self._head)
        if self.manifest.kind == "topk":
            temperature = self.manifest.temperature or 1.0
            return TopK(**tensors, tail=self._tail, temperature=temperature)
        return tensors["logits"]


def _row_tensors(teacher: Tensor | TopK | LinearTeacher) -> dict[str, Tensor]:
    """Return the tensors of an example's teacher that have one row per token."""
    if isinstance(teacher, TopK):
        assert teacher.tail_logprob is not None  # because caches store it
        return {name: getattr(teacher, name) for name in ("ids", "logprobs", "tail_logprob")}
    return {"hidden": teacher.hidden} if isinstance(teacher, LinearTeacher) else {"logits": teacher}
