"""A cache that several processes build: a folder of parts, each a cache of its own, that read as one.

Of N processes, the one of rank r has the shards r, r + N, r + 2N and so on of the unsplit build, in a folder
part-r-of-N, and numbers them from 0. So the shards are those of the unsplit build, byte for byte; a process needs no
other one and no count of the sequences; and nobody has to put the parts together.
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
_MOST = 99999  # five digits, so that names sort by rank


class Whole(NamedTuple):
    """A cache as the unsplit build would describe it, and where it lies: shard i is number i // N of part i % N."""

    manifest: Manifest
    parts: Sequence[tuple[Path, Manifest]]  # the one folder, where the cache is not in parts


def check_rank(rank: int, world_size: int) -> None:
    """Raise ValueError unless there is such a process."""
    require(is_int(world_size), "world_size", "a positive int", world_size)
    require(is_int(rank, 0) and rank < world_size, "rank", f"an int in [0, {world_size})", rank)


def part_folder(folder: Path, rank: int, world_size: int) -> Path:
    """Where a process writes; one that is alone, into the folder itself."""
    check_rank(rank, world_size)
    require(world_size <= _MOST, "world_size", f"at most {_MOST}", world_size)
    return folder if world_size == 1 else folder / _name(rank, world_size)


def _name(rank: int, world_size: int) -> str:
    return f"part-{rank:05}-of-{world_size:05}"


def difference(first: Manifest, second: Manifest) -> tuple[str, object, object] | None:
    """The first setting that differs between two manifests, and its two values."""
    for name in (field.name for field in fields(Manifest)):
        ours, theirs = getattr(first, name), getattr(second, name)
        if name not in ("shards", "complete") and ours != theirs:
            return name, ours, theirs
    return None


def check_others(folder: Path, world_size: int, wanted: Manifest) -> None:
    """Raise CacheError where a part of these settings does not go with what the folder holds.

    That is for a mistake to show early. Of processes that begin at once none may see it, so readers look again.
    """
    if world_size == 1 or not folder.is_dir():
        return
    if (folder / MANIFEST).exists():
        raise CacheError(f"{folder} holds a cache that is not in parts")
    for name, count in sorted(_part_names(folder)):
        if count != world_size:
            raise CacheError(f"{folder} holds {name}, of {count} processes, not {world_size}")
        if (folder / name / MANIFEST).exists():
            differs = difference(read_part(folder / name), wanted)
            if differs:
                setting, theirs, ours = differs
                raise CacheError(f"{folder / name} was begun with {setting} = {theirs}, not {ours}")


def read_whole(folder: Path) -> Whole:
    """What a folder holds, be it in parts or not.

    Raises:
        ManifestError: a manifest is missing or malformed, or parts do not go together.
        IncompleteError: a part has not been begun.
    """
    names = [] if (folder / MANIFEST).exists() else sorted(_part_names(folder))
    if not names:
        manifest = read_part(folder)
        return Whole(manifest, [(folder, manifest)])
    first, world_size = names[0]
    for name, count in names:
        if count != world_size:
            raise ManifestError(f"{folder} holds {first} and {name}, parts of two builds")
    begun = {name for name, _ in names if (folder / name / MANIFEST).exists()}
    every = [_name(rank, world_size) for rank in range(world_size)]
    missing = [name for name in every if name not in begun]
    if missing:
        raise IncompleteError(f"{folder} is not complete: it lacks {listed(missing)}")
    parts = [(folder / name, read_part(folder / name)) for name in every]
    for path, part in parts:
        differs = difference(part, parts[0][1])
        if differs:
            setting, theirs, ours = differs
            raise ManifestError(
                f"{folder} has parts that differ: {setting} = {theirs} in {path.name}, {ours} in {first}"
            )
    return Whole(_join(folder, parts), parts)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of the cache in a folder; of one in parts, that of the unsplit build.

    Where parts are unfinished, it has the shards before the first one that is not there yet.

    Raises:
        ManifestError: there is none, or it is malformed, of a newer version, or contradicts itself; or parts do not go
            together.
        IncompleteError: a part has not been begun.
    """
    return read_whole(folder_of(folder, "folder")).manifest


def _part_names(folder: Path) -> list[tuple[str, int]]:
    """The names of a folder that are those of parts, and of how many."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []  # reading the manifest says why
    found = (_NAME.fullmatch(name) for name in names)
    return [(match[0], int(match[2])) for match in found if match and match[1] < match[2]]


def _join(folder: Path, parts: Sequence[tuple[Path, Manifest]]) -> Manifest:
    """The manifest of the unsplit build."""
    manifest = parts[0][1]
    full, complete = manifest.shard_examples, all(part.complete for _, part in parts)
    if complete:
        total = sum(part.examples for _, part in parts)
        for rank, (path, part) in enumerate(parts):
            starts = range(rank * full, total, len(parts) * full)
            share = sum(min(full, total - start) for start in starts)
            if part.examples != share:
                raise ManifestError(
                    f"{folder} has parts of different sequences: {path.name} has {part.examples} of all {total}, "
                    f"not {share}"
                )
    shards = []
    for index in itertools.count():
        own, number = parts[index % len(parts)][1].shards, index // len(parts)
        # A short shard is the last one of all, which is known once every part is complete.
        if number == len(own) or not (complete or own[number].examples == full):
            break
        shards.append(replace(own[number], file=shard_name(index)))
    return replace(manifest, shards=tuple(shards), complete=complete)


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first ones where they are many."""
    return ", ".join(names) if len(names) <= 8 else reprlib.repr(names)
