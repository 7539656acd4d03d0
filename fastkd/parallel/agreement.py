"""Whether all processes of a group make the same call.

They say so to each other before the first collective of the loss, so that a process with another option, or one whose
call has raised, is an error on all of them, and none waits.

What is compared is a digest of every fact, in one all-gather of some hundred bytes between the hosts: of the devices,
nothing waits. Only where digests differ are the facts themselves exchanged, for the message.
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
    """A group of the same processes whose collectives are between hosts."""
    found = _companions.get(group)
    if found is None:
        try:
            group._get_backend(torch.device("cpu"))
            found = group
        except RuntimeError:
            found = dist.new_group(
                dist.get_process_group_ranks(group),
                timeout=_timeout(group),
                backend="gloo",
                use_local_synchronization=True,
            )
        _companions[group] = found
    return found


def _timeout(group: dist.ProcessGroup) -> datetime.timedelta | None:
    """The group's own, where torch tells it; None: torch's default."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        found = getattr(options, "_timeout", None)
        if found is not None:
            return found
    return None


class Said(NamedTuple):
    """What every process has said, [processes] each."""

    rank: int  # of this process
    numbers: list[list[int]]


class Agreement:
    """A context around the validation of a call: an exception in it is told to the other processes, which raise too."""

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

    def reached(self, numbers: list[int], facts: dict[str, object]) -> Said:
        """The numbers of every process, once all have said the same facts; raises on every process where not."""
        return Said(dist.get_rank(self.group), self._exchange(numbers, facts, None))

    def _exchange(
        self, numbers: list[int], facts: dict[str, object], error: Exception | None
    ) -> list[list[int]]:
        # A process whose call has raised knows neither how many numbers there are nor how many facts.
        mine = torch.zeros(8, dtype=torch.int64)
        mine[0] = error is not None
        mine[1] = _digest(facts)
        mine[2 : 2 + len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        everything: Pending = all_gather(mine, self.companion, "what each process is called with")
        said = everything.wait().tolist()
        if error is not None or any(other[:2] != said[0][:2] for other in said):
            self._explain(facts, error)
        return [other[2 : 2 + len(numbers)] for other in said]

    def _explain(self, facts: dict[str, object], error: Exception | None) -> None:
        what = "how the calls differ"
        texts = {name: repr(value) for name, value in facts.items()}
        failed = None if error is None else f"{type(error).__name__}: {error}"
        told = all_gather_objects((texts, failed), self.companion, what)
        if error is not None:
            return  # it is on its way
        failures = {rank: failed for rank, (_, failed) in enumerate(told) if failed is not None}
        if failures:
            listed = "; ".join(f"process {rank} raised {text}" for rank, text in failures.items())
            raise RuntimeError(f"the loss is not computed, as another process cannot: {listed}")
        raise ValueError(
            "the processes that share the vocabulary call with different arguments: "
            + "; ".join(_differences([texts for texts, _ in told]))
        )


def _digest(facts: dict[str, object]) -> int:
    text = repr(sorted((name, repr(value)) for name, value in facts.items()))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _differences(told: list[dict[str, str]]) -> list[str]:
    found = []
    for name in dict.fromkeys(name for texts in told for name in texts):
        by_value: dict[str, list[str]] = {}
        for rank, texts in enumerate(told):
            by_value.setdefault(texts.get(name, "not there"), []).append(str(rank))
        if len(by_value) > 1:
            said = ", ".join(
                f"{value} on process {' and '.join(ranks)}" for value, ranks in by_value.items()
            )
            found.append(f"{name} is {said}")
    return found


def digest_of(tensor: torch.Tensor | None) -> Any:
    """Of the values, for calls that are checked in full (FASTKD_CHECK=1)."""
    if tensor is None:
        return None
    values = readable(tensor.detach()).cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()
