"""Building a teacher cache from a server."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastkd.call.tail import masses
from fastkd.serving.client import ServedTeacher
from fastkd.serving.scored import Scored
from fastkd.teachers.cache.build import at_least_one, remaining
from fastkd.teachers.cache.format import Manifest
from fastkd.teachers.cache.writer import CacheWriter
from fastkd.teachers.topk import TopK


def build_cache_from_server(
    path: str | os.PathLike[str],
    teacher: ServedTeacher,
    sequences: Iterable[Tensor | Sequence[int]],
    *,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    shard_examples: int = 64,
    tokenizer_sha256: str | None = None,
    name: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Build a teacher cache of kind "topk" from a server's scores of token sequences, or resume an interrupted build.

    The sequences are sent with their last token repeated at the end, so that the teacher's prediction after the last
    token can be stored as well. The server's context must therefore hold two tokens more than the longest sequence: the
    repeated one, and the one that it generates. The mass of the tail is derived from the K log-probabilities, as in
    :class:`fastkd.TopK`.

    Where values are missing and the teacher has missing="drop", a row has ids -1. Leave such rows out of the loss with
    mask & (batch.teacher.ids >= 0).any(-1).

    Args:
        path: the folder of the cache.
        teacher: the server, with k > 0 and temperature 1. Its tail policy is not stored. If its vocab_size is None,
            the one below is used.
        sequences: token ids [S] each. Every process, and a resumed build, must pass the same sequences in the same
            order.
        vocab_size: V of the teacher.
        dtype: the dtype in which the log-probabilities are stored.
        shard_examples: the number of sequences per shard.
        tokenizer_sha256: see :func:`fastkd.teachers.cache.tokenizer_sha256`.
        name: a name for the teacher, for people; None: `teacher.model`.
        rank: the rank of this process among the `world_size` that build the cache.
        world_size: the number of processes.
        progress: function called after each sequence with the number of sequences finished so far, including those of
            other processes.

    Returns:
        The manifest of what this process has written.

    Raises:
        TypeError, ValueError: an argument is invalid.
        ServingError: the server did not score a sequence. The shards that were complete before stay in the cache.
        CacheError: as :func:`fastkd.teachers.cache.build_cache`.
    """
    if not isinstance(teacher, ServedTeacher):
        raise TypeError(f"teacher must be a ServedTeacher, got {type(teacher).__name__}")
    if not teacher.k:
        raise ValueError("teacher.k must be at least 1 for a cache, got 0")
    if teacher.temperature != 1.0:
        raise ValueError(
            f"teacher.temperature must be 1 for a cache, got {teacher.temperature}: a cache stores the "
            "log-probabilities as the server returns them"
        )
    if teacher.vocab_size is None:
        teacher = dataclasses.replace(teacher, vocab_size=vocab_size)
    _, sequences = at_least_one(sequences)
    writer = CacheWriter(
        path,
        kind="topk",
        vocab_size=vocab_size,
        dtype=dtype,
        shard_examples=shard_examples,
        k=teacher.k,
        tokenizer_sha256=tokenizer_sha256,
        teacher=teacher.model if name is None else name,
        rank=rank,
        world_size=world_size,
    )
    asked: collections.deque[tuple[int, Tensor]] = collections.deque()
    seen = 0

    def requests() -> Iterator[Tensor]:
        nonlocal seen
        for index, input_ids in remaining(writer, sequences, shard_examples, rank, world_size):
            seen = index + 1
            if input_ids is not None:
                asked.append((index, input_ids))
                yield torch.cat([input_ids, input_ids[-1:]])

    with writer:
        for scored in teacher.stream(requests()):
            index, input_ids = asked.popleft()
            writer.append(input_ids, topk=_topk(scored, dtype))
            if progress is not None:
                progress(index + 1)
        if progress is not None:
            progress(seen)
    return writer.manifest


def _topk(scored: Scored, dtype: torch.dtype) -> TopK:
    """Return the scores as a cache stores them: with the mass of the tail."""
    assert scored.teacher is not None  # because k > 0
    ids, logprobs = scored.teacher.ids, scored.teacher.logprobs
    _, tail = masses(ids, logprobs)  # 1 for a dropped row, which lists nothing
    return TopK(ids, logprobs.to(dtype), tail_logprob=tail.log().to(dtype))
