"""The check that all processes of a group make the same call.

It comes before the first collective of the loss. If a process has another option, or its call has raised, all
processes raise, and none waits for another.

Processes compare a digest of the facts, in one all-gather of a few hundred bytes between hosts, so no device waits.
Only if the digests differ do they exchange the facts themselves, for the message.
"""

from __future__ import annotations

import datetime
import hashlib
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastkd.core.tensors import readable
from fastkd.parallel.collectives import Pending, all_gather, all_gather_objects

_companions: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _companion(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same processes whose collectives run between hosts."""
    companion = _companions.get(group)
    if companion is None:
        try:
            group._get_backend(torch.device("cpu"))
            companion = group
        except RuntimeError:
            companion = dist.new_group(
                dist.get_process_group_ranks(group),
                timeout=_timeout(group),
                backend="gloo",
                use_local_synchronization=True,
            )
        _companions[group] = companion
    return companion


def _timeout(group: dist.ProcessGroup) -> datetime.timedelta | None:
    """The timeout of the group, if torch exposes it; None: torch's default."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if timeout is not None:
            return timeout
    return None


class Agreed(NamedTuple):
    """What the processes have exchanged."""

    # This process's rank in the group.
    rank: int
    # The numbers of each process, by rank.
    numbers: list[list[int]]


class Agreement:
    """A context for the validation of a call: if it raises in one process, the others raise too."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.companion = group, _companion(group)

    def __enter__(self) -> Agreement:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            self._exchange([], {}, error)

    def reached(self, numbers: list[int], facts: dict[str, object]) -> Agreed:
        """Exchange the numbers, and check that the facts agree; if they differ, every process raises."""
        return Agreed(dist.get_rank(self.group), self._exchange(numbers, facts, None))

    def _exchange(
        self, numbers: list[int], facts: dict[str, object], error: Exception | None
    ) -> list[list[int]]:
        # The message has a fixed size, because a process whose call has raised knows neither numbers nor facts.
        message = torch.zeros(8, dtype=torch.int64)
        message[0] = error is not None
        message[1] = _digest(facts)
        message[2 : 2 + len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        pending: Pending = all_gather(message, self.companion, "the arguments of each process")
        gathered = pending.wait().tolist()
        if error is not None or any(other[:2] != gathered[0][:2] for other in gathered):
            self._explain(facts, error)
        return [other[2 : 2 + len(numbers)] for other in gathered]

    def _explain(self, facts: dict[str, object], error: Exception | None) -> None:
        texts = {name: repr(value) for name, value in facts.items()}
        failed = None if error is None else f"{type(error).__name__}: {error}"
        gathered = all_gather_objects((texts, failed), self.companion, "how the calls differ")
        if error is not None:
            return  # this process is already raising it
        failures = {rank: failed for rank, (_, failed) in enumerate(gathered) if failed is not None}
        if failures:
            listed = "; ".join(f"process {rank} raised {text}" for rank, text in failures.items())
            raise RuntimeError(
                f"the loss is not computed, because another process cannot: {listed}"
            )
        raise ValueError(
            "the processes that share the vocabulary call with different arguments: "
            + "; ".join(_differences([texts for texts, _ in gathered]))
        )


def _digest(facts: dict[str, object]) -> int:
    text = repr(sorted((name, repr(value)) for name, value in facts.items()))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _differences(facts: list[dict[str, str]]) -> list[str]:
    differences = []
    for name in dict.fromkeys(name for texts in facts for name in texts):
        by_value: dict[str, list[str]] = {}
        for rank, texts in enumerate(facts):
            by_value.setdefault(texts.get(name, "not there"), []).append(str(rank))
        if len(by_value) > 1:
            values = ", ".join(
                f"{value} on process {' and '.join(ranks)}" for value, ranks in by_value.items()
            )
            differences.append(f"{name} is {values}")
    return differences


def digest_of(tensor: torch.Tensor | None) -> Any:
    """A digest of the tensor's values, for calls that are checked in full (FASTKD_CHECK=1)."""
    if tensor is None:
        return None
    values = readable(tensor.detach()).cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()
