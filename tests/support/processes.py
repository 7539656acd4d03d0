"""Processes of a torch.distributed group that wait for functions to run, because a start takes longer than most tests.

They are forked from a server that has only imported torch, fastkd and a few modules of tests: four processes that each
import these take fifteen seconds of a core.
"""

from __future__ import annotations

import datetime
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Timeouts of a collective, and of a function with several. They only end a hang; they do not judge speed. AFTERWARDS is
# how long a test that has failed on one process waits for the others, which may wait for that process.
TIMEOUT, PATIENCE, AFTERWARDS = 300, 900, 20


# What the server imports before it forks, because the functions of support.spread and its like need it. These modules
# start no thread. test_linear, which support.spread imports, does, and a fork would lose that thread.
PRELOADED = [
    "torch",
    "torch.distributed.tensor",
    "torch._dynamo.testing",
    "fastkd",
    "fastkd.parallel",
    "pytest",
    "support.accuracy",
]


def _context() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class FailureError(AssertionError):
    """An exception of a process, with its traceback."""


def _serve(rank: int, size: int, folder: str, path: list[str], pipe: Connection) -> None:
    """The main function of a process."""
    sys.path[:] = path
    torch.set_num_threads(1)
    # A machine's name need not resolve, and its network need not be up.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/store", size)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    several = torch.cuda.device_count() >= size
    if several:
        torch.cuda.set_device(rank)
    transport = "cpu:gloo,cuda:nccl" if several else "gloo"
    dist.init_process_group(transport, store=store, rank=rank, world_size=size, timeout=timeout)
    # Groups of fewer, by their size; each process is in one of every size.
    groups = {size: dist.group.WORLD}
    for few in (1, 2):
        for first in range(0, size, few):
            ranks = list(range(first, first + few))
            group = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                groups[few] = group
    while True:
        try:
            module, name, few, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if rank < few:
                torch.manual_seed(rank)
                function = getattr(importlib.import_module(module), name)
                pipe.send((True, function(groups[few], *arguments)))
            else:
                pipe.send((True, None))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Processes:
    """A few processes. If one hangs or dies, the call raises, and the next call starts new ones."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self.workers: list[Any] = []
        self.pipes: list[Connection] = []

    def _start(self) -> None:
        context = _context()
        folder = tempfile.mkdtemp()
        # The server begins with the first process, and finds there what it imports.
        path = os.pathsep.join(filter(None, sys.path))
        with patch.dict(os.environ, PYTHONPATH=path):
            forkserver.ensure_running()
        for rank in range(self.size):
            parent_end, child_end = context.Pipe()
            worker = context.Process(
                target=_serve, args=(rank, self.size, folder, sys.path, child_end), daemon=True
            )
            worker.start()
            child_end.close()
            self.workers.append(worker)
            self.pipes.append(parent_end)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run function(group, *arguments) on the first `size` processes; return the result of each."""
        results = self.outcomes(size, function, *arguments, afterwards=AFTERWARDS)
        bad = {rank: text for rank, (good, text) in enumerate(results) if not good}
        if bad:  # what the others raise, as they wait for one that has failed, comes last
            ordered = sorted(bad.items(), key=lambda item: "CollectiveError" in item[1])
            raise FailureError("\n".join(f"process {r} of {size}:\n{text}" for r, text in ordered))
        return [result for _, result in results]

    def outcomes(
        self,
        size: int,
        function: Callable[..., Any],
        *arguments: Any,
        afterwards: float = PATIENCE,
    ) -> list[tuple[bool, Any]]:
        """Like run, but return (True, result) or (False, traceback) of each process, also of one that died or hangs.

        Once a process has failed, the others have `afterwards` seconds.
        """
        if not self.workers:
            self._start()
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, size, arguments))
        results: dict[int, tuple[bool, Any]] = {}
        waiting = dict(zip(self.pipes, range(self.size), strict=True))
        patience: float = PATIENCE
        while waiting:
            ready = wait(list(waiting), timeout=patience)
            if not ready:
                for rank in waiting.values():
                    results[rank] = (False, f"hangs: nothing for {patience} s")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    results[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    results[rank] = (False, "died")
                if not results[rank][0]:
                    patience = afterwards
        # After an error a group's processes may be at different collectives.
        if not all(good for good, _ in results.values()):
            self.stop()
        return [results[rank] for rank in range(size)]

    def stop(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.kill()
            worker.join()
        self.workers, self.pipes = [], []
