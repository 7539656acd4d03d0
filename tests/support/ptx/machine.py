"""A cluster of thread blocks that runs a program: registers, control flow, and the order of the threads.

The threads of all blocks are lanes of NumPy arrays. The lanes with the lowest place in the program run first, up to the
end of their basic block; so those that wait for each other at a join of branches meet there. In random order, one warp
that can run is drawn by lot each time.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from support.ptx.barriers import DONE, PARKED, RUNS, STATES, Barriers
from support.ptx.faults import Fault
from support.ptx.memory import FIRST, LOCAL, PARAM, RANK, WINDOW, Memory, Tensors
from support.ptx.numbers import (
    UNSIGNED,
    Lanes,
    Noise,
    Read,
    Write,
    constant,
    kind_of,
    reader,
    size_of,
    writer,
)
from support.ptx.program import Instruction, Parameter, Program
from support.ptx.races import SharedRaces

WARP = 32
MOST_BLOCKS = 20_000_000  # basic blocks that a cluster runs; more is a loop without an end
DEEPEST = 8  # calls within calls


class Settings(NamedTuple):
    """How a machine behaves where devices differ or may do as they like."""

    seed: int = 0
    random_order: bool = False  # of warps and clusters
    noise: bool = False  # approximate functions have their documented errors
    strict_halves: bool = False  # reading a word for one half is a race with the other half's owner


@dataclass
class Operation:
    """An instruction that is ready to run."""

    text: str
    run: Callable[..., Any]
    kind: str = "plain"  # plain: run(lanes); gathers: the same for whole warps; ends: run(at, lanes, active)
    guard: Any = None  # a predicate register
    negated: bool = False
    leads: bool = False  # whether lanes can join here
    results: list[tuple[Any, Any]] = field(
        default_factory=list
    )  # of a call: (where they go, where they are)


class Machine:
    """The threads of one cluster and their registers; `run` executes a cluster of a grid."""

    def __init__(
        self,
        program: Program,
        threads: int,
        ranks: int = 1,
        dynamic: int = 0,
        grid: tuple[int, int, int] = (1, 1, 1),
        settings: Settings | None = None,
    ) -> None:
        if threads % WARP:
            raise Fault(f"a block of {threads} threads is no whole number of warps")
        self.program, self.threads, self.ranks, self.grid = program, threads, ranks, grid
        self.settings = settings or Settings()
        self._lot = random.Random(self.settings.seed)
        self.noise = Noise(self.settings.seed if self.settings.noise else None)
        self.count = threads * ranks
        self.numbers = np.arange(self.count)
        self.warp = self.numbers // WARP
        self.rank = (self.numbers // threads).astype(np.uint32)
        self.races = SharedRaces(self.count // WARP, ranks, self.settings.strict_halves)
        self._place_variables(dynamic)
        self.memory = Memory(self.count, ranks, self._shared_end, self._local_end, self.races)
        self.barriers = Barriers(self.count, ranks, self.memory, self.races, self._lot)
        self.state = self.barriers.state
        self.place = np.zeros(self.count, np.int64)  # of the next instruction
        self._place_registers()
        self.slots = {
            name: np.zeros((self.count, size + 15 & ~15), np.uint8)
            for name, size in program.parameters.items()
        }
        self._calls = np.zeros((DEEPEST, self.count), np.int64)
        self._depth = np.zeros(self.count, np.int64)
        self._block = [np.zeros(self.count, np.uint32) for _ in range(3)]
        self.executed = 0  # instructions, summed over lanes
        self.reached = np.zeros(len(program.instructions), np.bool_)
        # An instruction is prepared when a thread reaches it: a kernel has thousands, most of them for other layouts.
        self._operations: list[Operation | None] = [None] * len(program.instructions)
        self._leaders = set(program.labels.values())
        self._leaders |= {function.first for function in program.functions.values()}
        self._refuse_unknown_instructions()

    def _place_variables(self, dynamic: int) -> None:
        def lay_out(variables: list[Parameter], at: int) -> tuple[dict[str, int], int]:
            places = {}
            for variable in variables:
                at = -(-at // variable.align) * variable.align
                places[variable.name] = at
                at += variable.size
            return places, at

        self.shared_variables, end = lay_out(self.program.shared, FIRST)
        end = end + 127 & ~127
        self.shared_variables |= dict.fromkeys(self.program.dynamic, end)
        self._shared_end = end + dynamic
        self.local_variables, self._local_end = lay_out(self.program.local, 0)
        self.entry_parameters, self._parameters_end = lay_out(self.program.entry.parameters, 0)

    def _place_registers(self) -> None:
        """Make the registers rows of one array per type, which _reset fills at once."""
        by_type: dict[Any, list[str]] = {}
        for name, kind in self.program.registers.items():
            by_type.setdefault(np.bool_ if kind == "pred" else UNSIGNED[size_of(kind)], []).append(
                name
            )
        self._registers = [
            np.zeros((len(names), self.count), kind) for kind, names in by_type.items()
        ]
        self.registers = {
            name: row
            for names, rows in zip(by_type.values(), self._registers, strict=True)
            for name, row in zip(names, rows, strict=True)
        }

    def _ready(self, instruction: Instruction) -> Operation:
        from support.ptx.instructions import prepare

        try:
            operation = prepare(self, instruction)
        except Fault as fault:
            raise Fault(f"{fault}, in: {instruction.text}") from None
        if instruction.guard is not None:
            operation.guard = self.registers[instruction.guard]
            operation.negated = instruction.negated
        return operation

    def replace(self, at: int, instruction: Instruction) -> Callable[[], None]:
        """Run another instruction in the place of one; return what undoes it."""
        before, after = self.operation(at), self._ready(instruction)
        after.leads = before.leads
        self._operations[at] = after
        return lambda: self._operations.__setitem__(at, before)

    def operation(self, at: int) -> Operation:
        """The instruction at a place of the program, ready to run."""
        operation = self._operations[at]
        if operation is None:
            instructions = self.program.instructions
            operation = self._operations[at] = self._ready(instructions[at])
            operation.leads = at in self._leaders or operation.kind == "gathers"
            if at and not operation.leads:
                before = self._operations[at - 1] or self._ready(instructions[at - 1])
                operation.leads = before.kind == "ends"
        return operation

    def _refuse_unknown_instructions(self) -> None:
        """Prepare one instruction of each kind, so that a kind that is not understood raises even where no thread
        gets."""
        seen = set()
        for at, instruction in enumerate(self.program.instructions):
            kind = instruction.name, instruction.modifiers, instruction.types
            if kind not in seen:
                seen.add(kind)
                self.operation(at)

    # Operands

    def read(self, operand: str, kind: str) -> Read:
        """How an operand is read as values of a type."""
        if operand in self.registers:
            return reader(self.registers[operand], kind)
        value = constant(operand, kind)
        if value is not None:
            return lambda lanes: value
        return self._special(operand, kind)

    def write(self, operand: str, kind: str) -> Write:
        """How values of a type get into an operand; `_` takes none."""
        if operand == "_":
            return lambda lanes, values: None
        if operand not in self.registers:
            raise Fault(f"{operand} is no register")
        return writer(self.registers[operand], kind)

    def _special(self, operand: str, kind: str) -> Read:
        """Special registers, and addresses of variables."""
        of = kind_of(kind)
        if operand in self.shared_variables:
            address = self.rank.astype(np.uint64) << np.uint64(RANK) | np.uint64(
                self.shared_variables[operand]
            )
            return address.astype(of).__getitem__
        for places, window in ((self.local_variables, LOCAL), (self.entry_parameters, PARAM)):
            if operand in places:
                place = places[operand] + (window << WINDOW if window == PARAM else 0)
                return lambda lanes: of(place)
        values = self._special_registers().get(operand)
        if values is None:
            raise Fault(f"operand {operand} is unknown")
        if isinstance(values, int):
            return lambda lanes: of(values)
        return (
            values if of is np.uint32 else values.view(of) if of is np.int32 else values.astype(of)
        ).__getitem__

    def _special_registers(self) -> dict[str, Any]:
        lane = (self.numbers % WARP).astype(np.uint32)
        thread = (self.numbers % self.threads).astype(np.uint32)
        registers: dict[str, Any] = {
            "%laneid": lane, "%warpid": thread // np.uint32(WARP), "%nwarpid": self.threads // WARP,
            "%cluster_ctarank": self.rank, "%cluster_nctarank": self.ranks, "%WARP_SZ": WARP, "WARP_SZ": WARP,
            "%lanemask_eq": np.uint32(1) << lane, "%lanemask_lt": (np.uint32(1) << lane) - np.uint32(1),
            "%is_explicit_cluster": int(self.ranks > 1),
        }  # fmt: skip
        threads = (thread, 0, 0), (self.threads, 1, 1)
        blocks = tuple(self._block), self.grid
        ranks = (self.rank, 0, 0), (self.ranks, 1, 1)
        for name, (here, number) in (("tid", threads), ("ctaid", blocks), ("cluster_ctaid", ranks)):
            count = {"tid": "ntid", "ctaid": "nctaid", "cluster_ctaid": "cluster_nctaid"}[name]
            for axis in range(3):
                registers[f"%{name}.{'xyz'[axis]}"] = here[axis]
                registers[f"%{count}.{'xyz'[axis]}"] = number[axis]
        return registers

    # Running

    def run(
        self,
        parameters: list[bytes],
        tensors: Tensors,
        block: tuple[int, int, int] = (0, 0, 0),
        cluster: int = 0,
    ) -> None:
        """Run the cluster whose first block is `block`, the cluster-th of its grid, to the end."""
        self._reset(parameters, tensors, block, cluster)
        with np.errstate(all="ignore"):
            for _ in range(MOST_BLOCKS):
                if self.barriers.copies and self._lot.random() < 0.02:
                    self.barriers.land_copy()
                runnable = self.state == RUNS
                if runnable.any():
                    self._run_block(*self._next(runnable))
                elif self.barriers.copies:
                    self.barriers.land_copy()
                elif (self.state == DONE).all():
                    return
                else:
                    raise Fault(f"deadlock: {self._where()}")
        raise Fault(f"no end after {MOST_BLOCKS} basic blocks: {self._where()}")

    def _reset(
        self, parameters: list[bytes], tensors: Tensors, block: tuple[int, int, int], cluster: int
    ) -> None:
        expected = [parameter.size for parameter in self.program.entry.parameters]
        if [len(parameter) for parameter in parameters] != expected:
            raise Fault(
                f"parameters of {[len(p) for p in parameters]} bytes; the kernel takes {expected}"
            )
        memory = bytearray(self._parameters_end)
        for place, value in zip(self.entry_parameters.values(), parameters, strict=True):
            memory[place : place + len(value)] = value
        self.memory.reset(tensors, cluster, bytes(memory))
        self.races.reset(self.memory.shared_size, self.memory.shared_size // self.ranks)
        self.barriers.reset()
        for axis, number in enumerate(block):
            self._block[axis][:] = number + (self.rank if axis == 0 else 0)
        for registers in self._registers:  # undefined
            registers.view(np.uint8)[:] = 1 if registers.dtype == np.bool_ else 0xA5
        self.place[:] = self.program.entry.first
        self._depth[:] = 0

    def _where(self) -> str:
        found = Counter(
            (STATES[state], self.operation(at).text)
            for state, at in zip(self.state.tolist(), self.place.tolist(), strict=True)
            if state != DONE
        )
        return "; ".join(
            f"{count} threads: {state} at {text}" for (state, text), count in found.most_common(4)
        )

    def _next(self, runnable: Any) -> tuple[int, Lanes]:
        """The place of the instruction to run next, and its lanes."""
        if self.settings.random_order:
            runnable &= self.warp == self._lot.choice(np.unique(self.warp[runnable]).tolist())
            with_parked = runnable | (self.state == PARKED) & (
                self.warp == self.warp[runnable.argmax()]
            )
        else:
            with_parked = runnable | (self.state == PARKED)
        lowest = self.place[runnable].min()
        return int(lowest), _packed(np.flatnonzero(with_parked & (self.place == lowest)))

    def _run_block(self, at: int, lanes: Lanes) -> None:
        """Run lanes from an instruction to the end of its basic block."""
        self.state[lanes] = RUNS
        while True:
            operation = self.operation(at)
            self.executed += len(self.numbers[lanes])
            self.reached[at] = True
            try:
                if operation.kind == "gathers":
                    lanes = self._gathered(at, lanes)
                    if not len(self.numbers[lanes]):
                        return
                active = self._active(operation, lanes)
                if operation.kind == "ends":
                    operation.run(at, lanes, active)
                    return
                if active is not None:
                    operation.run(active)
            except Fault as fault:
                raise Fault(f"{fault}\n  at {operation.text}") from None
            at += 1
            if self.operation(at).leads:
                self.place[lanes] = at
                return

    def _active(self, operation: Operation, lanes: Lanes) -> Lanes | None:
        """The lanes whose guard lets them act; None if there is none."""
        if operation.guard is None:
            return lanes
        allowed = operation.guard[lanes] != operation.negated
        if allowed.all():
            return lanes
        return _packed(self.numbers[lanes][allowed]) if allowed.any() else None

    def _gathered(self, at: int, lanes: Lanes) -> Lanes:
        """The lanes whose warp is complete; the others wait for the rest of their warp."""
        here = np.zeros(self.count, np.bool_)
        here[lanes] = True
        missing = (self.state != DONE) & ~here
        if not missing.any():
            return lanes
        complete = ~missing.reshape(-1, WARP).any(1)[self.warp]
        waiting = here & ~complete
        self.state[waiting] = PARKED
        self.place[waiting] = at
        return _packed(np.flatnonzero(here & complete))

    def shuffled(self, count: int) -> list[int]:
        """The numbers below count in an order drawn by lot."""
        return self._lot.sample(range(count), count)

    def gives_up(self) -> bool:
        """Whether a wait with a time limit ends without success, by lot."""
        return self._lot.random() < 0.5

    # Control flow

    def branch(self, at: int, lanes: Lanes, taken: Lanes | None, target: int) -> None:
        self.place[lanes] = at + 1
        if taken is not None:
            self.place[taken] = target

    def call(self, at: int, lanes: Lanes, active: Lanes | None, first: int) -> None:
        self.place[lanes] = at + 1
        if active is None:
            return
        numbers = self.numbers[active]
        if (self._depth[numbers] == DEEPEST).any():
            raise Fault(f"more than {DEEPEST} calls within calls")
        self._calls[self._depth[numbers], numbers] = at
        self._depth[numbers] += 1
        self.place[numbers] = first

    def come_back(self, numbers: Any) -> Any:
        """The calls that these threads return from, whose next instructions they continue with."""
        self._depth[numbers] -= 1
        calls = self._calls[self._depth[numbers], numbers]
        self.place[numbers] = calls + 1
        return calls


def _packed(numbers: Any) -> Lanes:
    """Lanes as a slice if they are consecutive, which NumPy indexes several times as fast."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers
