"""Caches built by several processes: a folder of parts, each of which is a cache; together they read as one.

With N processes, rank r writes the shards r, r + N, r + 2N, ... of the unsplit cache into the folder part-r-of-N and
numbers them from 0. The shards are therefore byte for byte those of an unsplit build, processes neither communicate nor
need the number of sequences, and no step has to join the parts.
"""

from __future__ import annotations

import itertools
import os
import re
import reprlib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from fastkd.teachers.cache.format import (
    MANIFEST,
    CacheError,
    IncompleteError,
    Manifest,
    ManifestError,
    folder_of,
    is_int,
    read_part,
    require,
    shard_name,
)

_NAME = re.compile(r"part-([0-9]{5})-of-([0-9]{5})")
_MAX_WORLD_SIZE = 99999  # five digits, so that names sort by rank


class Whole(NamedTuple):
    """A cache as one manifest, with the folders that hold it: shard i is shard i // N of part i % N."""

    manifest: Manifest
    parts: Sequence[tuple[Path, Manifest]]  # one element if the cache is not in parts


def check_rank(rank: int, world_size: int) -> None:
    """Raise ValueError unless rank and world_size are ints with 0 <= rank < world_size."""
    require(is_int(world_size), "world_size", "a positive int", world_size)
    require(is_int(rank, 0) and rank < world_size, "rank", f"an int in [0, {world_size})", rank)


def part_folder(folder: Path, rank: int, world_size: int) -> Path:
    """Return the folder into which a process writes: the cache's folder itself if there is only one process."""
    check_rank(rank, world_size)
    require(world_size <= _MAX_WORLD_SIZE, "world_size", f"at most {_MAX_WORLD_SIZE}", world_size)
    return folder if world_size == 1 else folder / _name(rank, world_size)


def _name(rank: int, world_size: int) -> str:
    return f"part-{rank:05}-of-{world_size:05}"


def difference(first: Manifest, second: Manifest) -> tuple[str, object, object] | None:
    """Return (name, first's value, second's value) of the first setting that differs, or None."""
    for name in (field.name for field in fields(Manifest)):
        values = getattr(first, name), getattr(second, name)
        if name not in ("shards", "complete") and values[0] != values[1]:
            return name, *values
    return None


def check_others(folder: Path, world_size: int, settings: Manifest) -> None:
    """Raise CacheError if a new part with these settings would not match the other parts in the folder.

    The check reports mistakes early. Processes that start at the same time can miss each other's parts, so readers
    check again.
    """
    if world_size == 1 or not folder.is_dir():
        return
    if (folder / MANIFEST).exists():
        raise CacheError(f"{folder} holds a cache that is not in parts")
    for name, count in sorted(_part_names(folder)):
        if count != world_size:
            raise CacheError(f"{folder} holds {name}, of {count} processes, not {world_size}")
        if (folder / name / MANIFEST).exists():
            mismatch = difference(read_part(folder / name), settings)
            if mismatch:
                setting, stored, new = mismatch
                raise CacheError(f"{folder / name} was begun with {setting} = {stored}, not {new}")


def read_whole(folder: Path) -> Whole:
    """Read the manifest or manifests of a cache, which may be in parts.

    Raises:
        ManifestError: a manifest is missing or malformed, or parts do not match.
        IncompleteError: a part has not been started.
    """
    names = [] if (folder / MANIFEST).exists() else sorted(_part_names(folder))
    if not names:
        manifest = read_part(folder)
        return Whole(manifest, [(folder, manifest)])
    first, world_size = names[0]
    for name, count in names:
        if count != world_size:
            raise ManifestError(f"{folder} holds {first} and {name}, parts of two builds")
    started = {name for name, _ in names if (folder / name / MANIFEST).exists()}
    expected = [_name(rank, world_size) for rank in range(world_size)]
    missing = [name for name in expected if name not in started]
    if missing:
        raise IncompleteError(f"{folder} is not complete: it lacks {listed(missing)}")
    parts = [(folder / name, read_part(folder / name)) for name in expected]
    for path, part in parts:
        mismatch = difference(part, parts[0][1])
        if mismatch:
            setting, value, first_value = mismatch
            raise ManifestError(
                f"{folder} has parts that differ: {setting} = {value} in {path.name}, {first_value} in {first}"
            )
    return Whole(_join(folder, parts), parts)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Return the manifest of the cache in a folder; for a cache in parts, that of the equivalent unsplit cache.

    If parts are unfinished, it lists the shards before the first missing one.

    Args:
        folder: the folder of the cache.

    Raises:
        ManifestError: the manifest is missing, malformed, of a newer version, or contradicts itself; or the parts do
            not match.
        IncompleteError: a part has not been started.
    """
    return read_whole(folder_of(folder, "folder")).manifest


def _part_names(folder: Path) -> list[tuple[str, int]]:
    """Return (name, world size) of every part in a folder."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []  # reading the manifest will report the error
    matches = (_NAME.fullmatch(name) for name in names)
    return [(match[0], int(match[2])) for match in matches if match and match[1] < match[2]]


def _join(folder: Path, parts: Sequence[tuple[Path, Manifest]]) -> Manifest:
    """Return the manifest of the equivalent unsplit cache."""
    manifest = parts[0][1]
    full, complete = manifest.shard_examples, all(part.complete for _, part in parts)
    if complete:
        total = sum(part.examples for _, part in parts)
        for rank, (path, part) in enumerate(parts):
            starts = range(rank * full, total, len(parts) * full)
            expected = sum(min(full, total - start) for start in starts)
            if part.examples != expected:
                raise ManifestError(
                    f"{folder} has parts of different sequences: {path.name} has {part.examples} of all {total}, "
                    f"not {expected}"
                )
    shards = []
    for index in itertools.count():
        part_shards, number = parts[index % len(parts)][1].shards, index // len(parts)
        # Only the last shard of the whole cache may be short, and which one is last is unknown until all parts are
        # complete.
        if number == len(part_shards) or not (complete or part_shards[number].examples == full):
            break
        shards.append(replace(part_shards[number], file=shard_name(index)))
    return replace(manifest, shards=tuple(shards), complete=complete)


def listed(names: Sequence[str]) -> str:
    """Join names for a message, abbreviated if there are more than 8."""
    return ", ".join(names) if len(names) <= 8 else reprlib.repr(names)
