"""A kernel's launch: every cluster of its grid, one after the other."""

from __future__ import annotations

import os
import random
import time
from collections import Counter

from support.ptx.faults import Fault
from support.ptx.machine import Machine, Settings
from support.ptx.memory import Tensors
from support.ptx.program import Program

MOST_MACHINES = 16  # per kernel; a machine has the registers of all threads of a cluster

# What has run in this process: launches, clusters, instructions (summed over threads), seconds.
totals: Counter[str] = Counter()


def settings_from(text: str) -> Settings:
    """The settings that words such as "random noise seed=3" stand for."""
    settings = Settings()
    for word in text.split():
        name, _, value = word.partition("=")
        field = {"random": "random_order", "halves": "strict_halves"}.get(name, name)
        if field not in Settings._fields or (field == "seed") != bool(value):
            raise ValueError(
                f"setting {word!r} of the PTX machine is unknown; known: random, noise, halves, seed=<number>"
            )
        settings = settings._replace(**{field: int(value) if value else True})
    return settings


def settings_of_environment() -> Settings:
    """The settings that $FASTKD_PTX_SETTINGS names."""
    return settings_from(os.environ.get("FASTKD_PTX_SETTINGS", ""))


class Kernel:
    """An entry of a PTX module, ready to launch."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._machines: dict[tuple[object, ...], Machine] = {}

    def _machine(self, *layout: object) -> Machine:
        if layout not in self._machines:
            if len(self._machines) == MOST_MACHINES:
                self._machines.clear()
            self._machines[layout] = Machine(self.program, *layout)  # type: ignore[arg-type]
        return self._machines[layout]

    def machines(self) -> list[Machine]:
        """The machines that launches have made, one for each layout."""
        return list(self._machines.values())

    def reached(self) -> set[int]:
        """The instructions that launches have executed, as places in the program."""
        return {
            place
            for machine in self._machines.values()
            for place in machine.reached.nonzero()[0].tolist()
        }

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        parameters: list[bytes],
        tensors: list[tuple[int, int]],
        ranks: int = 1,
        dynamic: int = 0,
        settings: Settings | None = None,
    ) -> None:
        """Run a grid of blocks in clusters of `ranks`, with tensors (address, bytes) as its memory."""
        settings = settings or settings_of_environment()
        if grid[0] % ranks:
            raise Fault(f"a grid of {grid[0]} blocks has no whole number of clusters of {ranks}")
        machine = self._machine(threads, ranks, dynamic, grid, settings)
        memory = Tensors(tensors)
        first_blocks = [
            (x, y, z)
            for z in range(grid[2])
            for y in range(grid[1])
            for x in range(0, grid[0], ranks)
        ]
        numbered = list(enumerate(first_blocks))
        if settings.random_order:
            random.Random(settings.seed).shuffle(numbered)
        began, executed = time.perf_counter(), machine.executed
        for number, block in numbered:
            machine.run(parameters, memory, block, number)
        totals["launches"] += 1
        totals["clusters"] += len(numbered)
        totals["instructions"] += machine.executed - executed
        totals["milliseconds"] += round(1000 * (time.perf_counter() - began))
