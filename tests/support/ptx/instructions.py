"""What each instruction does: a table from opcodes to functions that prepare an instruction for a machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from support.ptx.arithmetic import arithmetic, comparison
from support.ptx.faults import Fault
from support.ptx.machine import WARP, Machine, Operation
from support.ptx.memory import LOCAL, RANK, SHARED, SPACES, WINDOW, Access
from support.ptx.numbers import PACKED, UNSIGNED, Lanes, Read, kind_of, size_of
from support.ptx.program import Instruction, split_operands

Prepare = Callable[[Machine, Instruction], Operation]
_OPCODES: dict[str, Prepare] = {}


def _opcode(*names: str) -> Callable[[Prepare], Prepare]:
    def add(prepare: Prepare) -> Prepare:
        _OPCODES.update(dict.fromkeys(names, prepare))
        return prepare

    return add


def prepare(machine: Machine, instruction: Instruction) -> Operation:
    """An instruction that is ready to run."""
    computed = arithmetic(instruction, machine.noise)
    if computed is None:
        if instruction.name not in _OPCODES:
            raise Fault(f"{instruction.name} is not implemented")
        return _OPCODES[instruction.name](machine, instruction)
    function, result, kinds = computed
    reads = [machine.read(o, kind) for o, kind in zip(instruction.operands[1:], kinds, strict=True)]
    write = machine.write(instruction.operands[0], result)
    if len(reads) == 1:
        (one,) = reads
        return Operation(instruction.text, lambda lanes: write(lanes, function(one(lanes))))
    if len(reads) == 2:
        first, second = reads
        return Operation(
            instruction.text, lambda lanes: write(lanes, function(first(lanes), second(lanes)))
        )
    return Operation(
        instruction.text, lambda lanes: write(lanes, function(*(read(lanes) for read in reads)))
    )


def _vector(operand: str) -> list[str]:
    return split_operands(operand.strip("{} "))


def _spread(value: Any, lanes: Lanes, machine: Machine) -> Any:
    """A value of each lane, also where the operand is a constant."""
    return value if np.ndim(value) else np.full(len(machine.numbers[lanes]), value)


# Moves and comparisons


@_opcode("mov")
def _move(machine: Machine, instruction: Instruction) -> Operation:
    to, source = instruction.operands
    kind = instruction.type
    if to.startswith("{"):
        return _take_apart(machine, instruction, _vector(to), machine.read(source, kind))
    if source.startswith("{"):
        return _put_together(machine, instruction, _vector(source))
    read, write = machine.read(source, kind), machine.write(to, kind)
    return Operation(instruction.text, lambda lanes: write(lanes, read(lanes)))


def _take_apart(
    machine: Machine, instruction: Instruction, parts: list[str], read: Read
) -> Operation:
    size = size_of(instruction.type) // len(parts)
    writes = [machine.write(part, f"b{8 * size}") for part in parts]

    def run(lanes: Lanes) -> None:
        whole = np.array(_spread(read(lanes), lanes, machine))
        pieces = whole.view(UNSIGNED[size]).reshape(len(whole), -1)
        for place, write in enumerate(writes):
            write(lanes, pieces[:, place])

    return Operation(instruction.text, run)


def _put_together(machine: Machine, instruction: Instruction, parts: list[str]) -> Operation:
    kind = kind_of(instruction.type)
    bits = 8 * size_of(instruction.type) // len(parts)
    reads = [machine.read(part, f"b{bits}") for part in parts]
    write = machine.write(instruction.operands[0], instruction.type)

    def run(lanes: Lanes) -> None:
        whole = kind(0)
        for place, read in enumerate(reads):
            whole = whole | np.asarray(read(lanes)).astype(kind) << kind(bits * place)
        write(lanes, whole)

    return Operation(instruction.text, run)


@_opcode("setp")
def _compare(machine: Machine, instruction: Instruction) -> Operation:
    """setp.lt.f32 p|q, a, b: q is the opposite of p, or for packed types the comparison of the upper halves."""
    kind = instruction.type
    name = instruction.modifiers[0]
    combine = next((m for m in instruction.modifiers[1:] if m in ("and", "or", "xor")), None)
    instruction.only(f"{name} ftz and or xor")
    compare = comparison(name, kind)
    first, second = (machine.read(operand, kind) for operand in instruction.operands[1:3])
    results = [part.strip() for part in instruction.operands[0].split("|")]
    writes = [machine.write(part, "pred") for part in results]
    if combine is not None:
        negated = instruction.operands[3].startswith("!")
        third = machine.read(instruction.operands[3].lstrip("!"), "pred")
        join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine]

    def run(lanes: Lanes) -> None:
        result = compare(first(lanes), second(lanes))
        outcomes = [result[:, 0], result[:, 1]] if kind in PACKED else [result, ~result]
        for write, outcome in zip(writes, outcomes, strict=False):
            write(lanes, outcome if combine is None else join(outcome, third(lanes) != negated))

    return Operation(instruction.text, run)


# Control flow


@_opcode("bra")
def _branch(machine: Machine, instruction: Instruction) -> Operation:
    (target,) = instruction.targets
    return Operation(
        instruction.text,
        lambda at, lanes, active: machine.branch(at, lanes, active, target),
        kind="ends",
    )


@_opcode("brx")
def _branch_by_table(machine: Machine, instruction: Instruction) -> Operation:
    targets = np.array(instruction.targets)
    number = machine.read(instruction.operands[0], "u32")

    def run(at: int, lanes: Lanes, active: Lanes | None) -> None:
        machine.place[lanes] = at + 1
        if active is not None:
            chosen = number(active)
            if (chosen >= len(targets)).any():
                raise Fault("brx.idx past the end of its table")
            machine.place[active] = targets[chosen]

    return Operation(instruction.text, run, kind="ends")


@_opcode("call")
def _call(machine: Machine, instruction: Instruction) -> Operation:
    operands = [operand.strip("() ") for operand in instruction.operands]
    place = next((k for k, name in enumerate(operands) if name in machine.program.functions), None)
    if place is None:
        return _unknown_call(machine, instruction)
    function = machine.program.functions[operands[place]]
    given = split_operands(operands[place + 1]) if len(operands) > place + 1 else []
    wanted = split_operands(operands[0]) if place else []

    def slots(names: list[str]) -> list[Any]:
        return [machine.slots[name] for name in names]

    def formal(parameters: list[Any]) -> list[Any]:
        return slots([f"{function.name}@{parameter.name}" for parameter in parameters])

    arguments = list(zip(slots(given), formal(function.parameters), strict=True))
    results = list(zip(slots(wanted), formal(function.results), strict=True))

    def run(at: int, lanes: Lanes, active: Lanes | None) -> None:
        if active is not None:
            for outer, inner in arguments:
                inner[active] = outer[active]
        machine.call(at, lanes, active, function.first)

    operation = Operation(instruction.text, run, kind="ends")
    operation.results = results
    return operation


def _unknown_call(machine: Machine, instruction: Instruction) -> Operation:
    def run(at: int, lanes: Lanes, active: Lanes | None) -> None:
        if active is not None:
            raise Fault("a call of a function that the module does not define")
        machine.place[lanes] = at + 1

    return Operation(instruction.text, run, kind="ends")


@_opcode("ret", "exit")
def _return(machine: Machine, instruction: Instruction) -> Operation:

    def run(at: int, lanes: Lanes, active: Lanes | None) -> None:
        machine.place[lanes] = at + 1
        if active is None:
            return
        numbers = machine.numbers[active]
        if instruction.in_entry or instruction.name == "exit":
            machine.barriers.end(numbers)
            return
        calls = machine.come_back(numbers)
        for call in np.unique(calls):
            back = numbers[calls == call]
            for outer, inner in machine.operation(call).results:
                outer[back] = inner[back]

    return Operation(instruction.text, run, kind="ends")


@_opcode("trap", "brkpt")
def _trap(machine: Machine, instruction: Instruction) -> Operation:
    def run(lanes: Lanes) -> None:
        raise Fault("the program stops itself with trap")

    return Operation(instruction.text, run)


# Memory


def _address(machine: Machine, operand: str, kind: str) -> tuple[Read, int]:
    """The base and the offset of an address such as [%rd1+16]."""
    parts = re.match(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
    if parts is None:
        raise Fault(f"address {operand} is not understood")
    return machine.read(parts[1], kind), int(parts[2] or "0", 0)


def _addresses(machine: Machine, operand: str, space: str | None) -> Read:
    """Addresses with their window. Those of shared memory have 32 bits or, from a 64-bit register, as many."""
    base = re.match(r"\[\s*([^\s+\]]+)", operand)
    register = machine.registers.get(base[1]) if base else None
    kind = "u64" if register is None or register.itemsize == 8 else "u32"
    if space == "param":
        kind = "u64"
    read, offset = _address(machine, operand, kind)
    shift = np.uint64(offset & (1 << 64) - 1)
    window = {"shared": SHARED, "local": LOCAL}.get(space or "", 0)
    above = np.uint64(window << WINDOW)

    def addresses(lanes: Lanes) -> Any:
        return _spread(np.asarray(read(lanes)).astype(np.uint64), lanes, machine) + shift | above

    return addresses


def _space(instruction: Instruction) -> tuple[str | None, bool]:
    """The state space of an access, None if it is generic, and whether it may reach other blocks."""
    for modifier in instruction.modifiers:
        space, _, part = modifier.partition("__")
        if space in SPACES:
            return ("param" if space == "const" else space), space != "shared" or part == "cluster"
    return None, True


_HINTS = ("L1", "L2", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc")  # they affect caches only


def _check_modifiers(instruction: Instruction, allowed: str) -> None:
    hints = [m for m in instruction.modifiers if m.split("__")[0] in _HINTS]
    spaces = [m for m in instruction.modifiers if m.split("__")[0] in SPACES]
    vectors = "v2 v4 v8"
    instruction.only(" ".join([*hints, *spaces, vectors, allowed]))


@_opcode("ld", "ldu", "st")
def _load_or_store(machine: Machine, instruction: Instruction) -> Operation:
    _check_modifiers(instruction, "volatile relaxed weak gpu cta sys acquire release")
    kind = f"b{8 * size_of(instruction.type)}"
    loads = instruction.name != "st"
    registers, place = instruction.operands[:2] if loads else instruction.operands[1::-1]
    parts = _vector(registers)
    space, anywhere = _space(instruction)
    slot = re.match(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(\w+))?", place)
    if space == "param" and slot and slot[1] in machine.slots:
        cells = machine.slots[slot[1]].view(UNSIGNED[size_of(kind)])
        return _through_slot(machine, instruction, parts, cells, int(slot[2] or "0", 0))
    addresses = _addresses(machine, place, space)
    size = size_of(kind)

    def access(lanes: Lanes) -> Access:
        found = Access(addresses(lanes), size, len(parts), machine.numbers[lanes], not loads)
        _check_space(machine, found, space, anywhere)
        return found

    if loads:
        signed = instruction.type[0] == "s"  # extended by the sign in a wider register
        writes = [machine.write(part, instruction.type if signed else kind) for part in parts]
        of = kind_of(instruction.type) if signed else UNSIGNED[size]

        def load(lanes: Lanes) -> None:
            values = machine.memory.load(access(lanes)).view(of)
            for number, write in enumerate(writes):
                write(lanes, values[:, number])

        return Operation(instruction.text, load)
    reads = [machine.read(part, kind) for part in parts]

    def store(lanes: Lanes) -> None:
        values = [_spread(read(lanes), lanes, machine) for read in reads]
        machine.memory.store(access(lanes), np.stack(values, 1))

    return Operation(instruction.text, store)


def _check_space(machine: Machine, access: Access, space: str | None, anywhere: bool) -> None:
    """Whether addresses lie in the state space that the instruction names."""
    if space == "global" and (access.addresses >> np.uint64(WINDOW)).any():
        raise Fault("an access to device memory with an address that is not there")
    if not anywhere:
        ranks = access.addresses >> np.uint64(RANK) & np.uint64(0xFF)
        if (ranks != machine.rank[access.threads]).any():
            raise Fault("an access to this block's shared memory with another block's address")


def _through_slot(
    machine: Machine, instruction: Instruction, parts: list[str], cells: Any, offset: int
) -> Operation:
    """Arguments and results of calls."""
    first = offset // cells.itemsize
    if instruction.name == "st":
        reads = [machine.read(part, f"b{8 * cells.itemsize}") for part in parts]

        def store(lanes: Lanes) -> None:
            for number, read in enumerate(reads):
                cells[lanes, first + number] = read(lanes)

        return Operation(instruction.text, store)
    writes = [machine.write(part, f"b{8 * cells.itemsize}") for part in parts]

    def load(lanes: Lanes) -> None:
        for number, write in enumerate(writes):
            write(lanes, cells[lanes, first + number])

    return Operation(instruction.text, load)


@_opcode("cvta")
def _convert_address(machine: Machine, instruction: Instruction) -> Operation:
    kind = instruction.type
    read, write = (
        machine.read(instruction.operands[1], kind),
        machine.write(instruction.operands[0], kind),
    )
    window = {"shared": SHARED, "local": LOCAL}.get(_space(instruction)[0] or "", 0)
    of = kind_of(kind)
    above = of(window << WINDOW)
    if instruction.has("to"):
        return Operation(instruction.text, lambda lanes: write(lanes, read(lanes) & ~above))
    return Operation(instruction.text, lambda lanes: write(lanes, read(lanes) | above))


@_opcode("mapa")
def _map_to_rank(machine: Machine, instruction: Instruction) -> Operation:
    kind = instruction.type
    of = kind_of(kind)
    write = machine.write(instruction.operands[0], kind)
    address, rank = (
        machine.read(instruction.operands[1], kind),
        machine.read(instruction.operands[2], "u32"),
    )
    mask = ~of(0xFF << RANK)
    return Operation(
        instruction.text,
        lambda lanes: write(
            lanes, address(lanes) & mask | np.asarray(rank(lanes)).astype(of) << of(RANK)
        ),
    )


@_opcode("atom", "red")
def _atomic(machine: Machine, instruction: Instruction) -> Operation:
    """Atomic operations of one thread after the other, in an order drawn by lot."""
    functions = {"add": np.add, "or": np.bitwise_or, "and": np.bitwise_and, "xor": np.bitwise_xor,
                 "max": np.maximum, "min": np.minimum, "exch": lambda old, new: new}  # fmt: skip
    _check_modifiers(
        instruction,
        "relaxed gpu cta sys cluster acquire release acq_rel noftz " + " ".join(functions),
    )
    function = functions[instruction.one_of(*functions)]
    returns = instruction.name == "atom"
    *result, place, operand = instruction.operands
    space, anywhere = _space(instruction)
    addresses, read = _addresses(machine, place, space), machine.read(operand, instruction.type)
    write = machine.write(result[0], instruction.type) if returns else None
    of, size = kind_of(instruction.type), size_of(instruction.type)

    def run(lanes: Lanes) -> None:
        found, values = addresses(lanes), _spread(read(lanes), lanes, machine)
        threads = machine.numbers[lanes]
        before = np.empty(len(threads), of)
        for one in machine.shuffled(len(threads)):
            access = Access(
                found[one : one + 1], size, 1, threads[one : one + 1], True, atomic=True
            )
            _check_space(machine, access, space, anywhere)
            before[one] = machine.memory.load(access).view(of)[0, 0]
            after = np.array([[function(before[one], values[one])]], of)
            machine.memory.store(access, after.view(UNSIGNED[size]))
        if write is not None:
            write(lanes, before)

    return Operation(instruction.text, run)


@_opcode(
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "griddepcontrol",
    "nanosleep",
    "membar",
    "setmaxnreg",
    "removed",
)
def _nothing(machine: Machine, instruction: Instruction) -> Operation:
    """What changes no value and no order that the machine checks."""
    return Operation(instruction.text, lambda lanes: None)


# Warps


def _whole_warp(machine: Machine, operand: str) -> Read:
    """The mask of lanes that take part, which must be the whole warp."""
    read = machine.read(operand, "u32")

    def check(lanes: Lanes) -> None:
        if (np.asarray(read(lanes)) != np.uint32(0xFFFFFFFF)).any():
            raise Fault("an instruction for a part of a warp is not implemented")

    return check


@_opcode("shfl")
def _shuffle(machine: Machine, instruction: Instruction) -> Operation:
    instruction.only("sync bfly down up idx")
    results = [part.strip() for part in instruction.operands[0].split("|")]
    write = machine.write(results[0], "b32")
    write_valid = machine.write(results[1] if len(results) > 1 else "_", "pred")
    value, step, bounds = (machine.read(operand, "b32") for operand in instruction.operands[1:4])
    whole = _whole_warp(machine, instruction.operands[4])
    mode = instruction.one_of("bfly", "down", "up", "idx")

    def run(lanes: Lanes) -> None:
        whole(lanes)
        threads = machine.numbers[lanes]
        lane = threads % WARP
        by, limit = (np.asarray(read(lanes)).astype(np.int64) for read in (step, bounds))
        segment, clamp = limit >> 8 & 31, limit & 31
        last, first = lane & segment | clamp & ~segment, lane & segment
        source = {
            "bfly": lane ^ by,
            "down": lane + by,
            "up": lane - by,
            "idx": first | by & ~segment & 31,
        }[mode]
        valid = source >= last if mode == "up" else source <= last
        source = threads - lane + np.where(valid, source, lane)
        given = np.full(machine.count, 0x7FC0DEAD, np.uint32)  # of lanes that give nothing, NaN
        given[lanes] = value(lanes)
        write(lanes, given[source])
        write_valid(lanes, valid)

    return Operation(instruction.text, run, kind="gathers")


@_opcode("redux")
def _reduce(machine: Machine, instruction: Instruction) -> Operation:
    functions = {"add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and,
                 "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip
    instruction.only("sync abs NaN " + " ".join(functions))
    name = instruction.one_of(*functions)
    function = functions[name]
    if instruction.type == "f32" and not instruction.has("NaN"):
        function = {"max": np.fmax, "min": np.fmin}[name]
    kind = instruction.type
    read, write = (
        machine.read(instruction.operands[1], kind),
        machine.write(instruction.operands[0], kind),
    )
    whole = _whole_warp(machine, instruction.operands[2])

    def run(lanes: Lanes) -> None:
        whole(lanes)
        values = _spread(read(lanes), lanes, machine)
        values = np.abs(values) if instruction.has("abs") else values
        for warp, who in _by_warp(machine, lanes):
            write(warp, function.reduce(values[who], dtype=values.dtype))

    return Operation(instruction.text, run, kind="gathers")


def _by_warp(machine: Machine, lanes: Lanes) -> list[tuple[Any, Any]]:
    """Per warp: its threads, and which of the lanes they are."""
    warps = machine.warp[lanes]
    found = []
    for warp in np.unique(warps):
        who = warps == warp
        found.append((machine.numbers[lanes][who], who))
    return found


@_opcode("vote")
def _vote(machine: Machine, instruction: Instruction) -> Operation:
    instruction.only("sync all any uni ballot")
    negated = instruction.operands[1].startswith("!")
    read = machine.read(instruction.operands[1].lstrip("!"), "pred")
    ballot = instruction.has("ballot")
    write = machine.write(instruction.operands[0], "b32" if ballot else "pred")
    whole = _whole_warp(machine, instruction.operands[2])
    name = instruction.one_of("all", "any", "uni", "ballot")

    def run(lanes: Lanes) -> None:
        whole(lanes)
        values = _spread(read(lanes), lanes, machine) != negated
        for warp, who in _by_warp(machine, lanes):
            votes = values[who]
            bits = np.bitwise_or.reduce(votes.astype(np.uint32) << (warp % WARP).astype(np.uint32))
            outcomes = {
                "all": votes.all(),
                "any": votes.any(),
                "uni": (votes == votes[0]).all(),
                "ballot": bits,
            }
            write(warp, outcomes[name])

    return Operation(instruction.text, run, kind="gathers")


@_opcode("activemask")
def _active_mask(machine: Machine, instruction: Instruction) -> Operation:
    write = machine.write(instruction.operands[0], "b32")

    def run(lanes: Lanes) -> None:
        for warp, _ in _by_warp(machine, lanes):
            write(warp, np.bitwise_or.reduce(np.uint32(1) << (warp % WARP).astype(np.uint32)))

    return Operation(instruction.text, run)


@_opcode("elect")
def _elect(machine: Machine, instruction: Instruction) -> Operation:
    """elect.sync d|p: p is true in the first lane, and d is its number."""
    number, elected = (part.strip() for part in instruction.operands[0].split("|"))
    write, write_elected = machine.write(number, "b32"), machine.write(elected, "pred")
    whole = _whole_warp(machine, instruction.operands[1])

    def run(lanes: Lanes) -> None:
        whole(lanes)
        for warp, _ in _by_warp(machine, lanes):
            write(warp, np.uint32(warp[0] % WARP))
            write_elected(warp, warp == warp[0])

    return Operation(instruction.text, run, kind="gathers")


@_opcode("ldmatrix", "stmatrix")
def _matrix(machine: Machine, instruction: Instruction) -> Operation:
    """Matrices of 8 x 8 half-words, to or from shared memory; lane 8 m + r has the address of row r of matrix m."""
    instruction.only("sync aligned m8n8 x1 x2 x4 trans shared shared__cta")
    loads = instruction.name == "ldmatrix"
    registers, place = instruction.operands if loads else instruction.operands[::-1]
    parts = _vector(registers)
    addresses = _addresses(machine, place, "shared")
    reads = [machine.read(part, "b32") for part in parts]
    writes = [machine.write(part, "b32") for part in parts]

    def swapped(words: Any) -> Any:
        if not instruction.has("trans"):
            return words
        halves = words.view(np.uint16).reshape(8, 8)
        return np.ascontiguousarray(halves.T).view(np.uint32).reshape(8, 4)

    def run(lanes: Lanes) -> None:
        for warp, _ in _by_warp(machine, lanes):
            rows = addresses(warp)
            for number in range(len(parts)):
                lanes_of_rows = warp[8 * number : 8 * number + 8]
                access = Access(rows[8 * number : 8 * number + 8], 4, 4, lanes_of_rows, not loads)
                if loads:
                    words = machine.memory.load(access)
                    writes[number](warp, swapped(words).reshape(32))
                else:
                    words = np.ascontiguousarray(reads[number](warp)).reshape(8, 4)
                    machine.memory.store(access, swapped(words))

    return Operation(instruction.text, run, kind="gathers")


# Barriers


@_opcode("bar", "barrier")
def _barrier(machine: Machine, instruction: Instruction) -> Operation:
    if instruction.has("cluster"):
        return _cluster_barrier(machine, instruction)
    instruction.only("sync aligned cta warp")
    if instruction.has("warp"):
        whole = _whole_warp(machine, instruction.operands[0])
        return Operation(instruction.text, whole, kind="gathers")
    number = int(instruction.operands[0], 0)
    count = int(instruction.operands[1], 0) if len(instruction.operands) > 1 else None
    return _ending(
        machine, instruction, lambda threads: machine.barriers.sync_block(threads, number, count)
    )


def _cluster_barrier(machine: Machine, instruction: Instruction) -> Operation:
    instruction.only("cluster arrive wait aligned release acquire relaxed")
    if instruction.has("wait"):
        return _ending(machine, instruction, machine.barriers.wait_at_cluster)
    releases = not instruction.has("relaxed")
    return _ending(
        machine, instruction, lambda threads: machine.barriers.arrive_at_cluster(threads, releases)
    )


def _ending(machine: Machine, instruction: Instruction, wait: Callable[[Any], None]) -> Operation:
    """An instruction after which threads may have to wait."""

    def run(at: int, lanes: Lanes, active: Lanes | None) -> None:
        machine.place[lanes] = at + 1
        if active is not None:
            wait(machine.numbers[active])

    return Operation(instruction.text, run, kind="ends")


@_opcode("fence")
def _fence(machine: Machine, instruction: Instruction) -> Operation:
    of_proxy = instruction.has("proxy") and instruction.has("async")
    if not of_proxy and not instruction.has("mbarrier_init"):
        return _nothing(machine, instruction)

    def run(lanes: Lanes) -> None:
        warps = np.unique(machine.warp[lanes])
        machine.barriers.fence_initializations(warps)
        if of_proxy:
            machine.races.clocks.fence(warps)

    return Operation(instruction.text, run)


@_opcode("mbarrier")
def _mbarrier(machine: Machine, instruction: Instruction) -> Operation:
    instruction.only(
        "init inval arrive expect_tx try_wait test_wait parity shared shared__cta release acquire cta cluster relaxed"
    )
    if instruction.has("try_wait", "test_wait"):
        return _wait(machine, instruction)
    if instruction.has("inval"):
        return _nothing(machine, instruction)
    operands = instruction.operands[1:] if instruction.has("arrive") else instruction.operands
    if instruction.has("arrive") and instruction.operands[0] != "_":
        raise Fault("the state that mbarrier.arrive returns is not implemented")
    addresses = _addresses(machine, operands[0], "shared")
    number = machine.read(operands[1] if len(operands) > 1 else "1", "u32")

    def run(lanes: Lanes) -> None:
        numbers = _spread(number(lanes), lanes, machine)
        by_warp = _by_warp(machine, lanes)
        whole = {thread for warp, _ in by_warp if len(warp) == WARP for thread in warp.tolist()}
        for address, thread, count in zip(
            addresses(lanes), machine.numbers[lanes], numbers, strict=True
        ):
            if instruction.has("init"):
                machine.barriers.init_mbarrier(int(address), thread, int(count))
            elif instruction.has("expect_tx"):
                arrivals = 1 if instruction.has("arrive") else 0
                machine.barriers.arrive(int(address), thread, int(count), arrivals, thread in whole)
            else:
                machine.barriers.arrive(int(address), thread, 0, int(count), thread in whole)

    return Operation(instruction.text, run)


def _wait(machine: Machine, instruction: Instruction) -> Operation:
    """test_wait and try_wait. The latter suspends threads, and sometimes gives up, as devices do after a time."""
    if not instruction.has("parity"):
        raise Fault("mbarrier waits without .parity are not implemented")
    write = machine.write(instruction.operands[0], "pred")
    addresses = _addresses(machine, instruction.operands[1], "shared")
    parity = machine.read(instruction.operands[2], "u32")

    def run(at: int, lanes: Lanes, active: Lanes | None) -> None:
        machine.place[lanes] = at + 1
        if active is None:
            return
        threads = machine.numbers[active]
        parities = _spread(parity(active), active, machine)
        complete = machine.barriers.phase_is_complete(addresses(active), threads, parities)
        write(threads[complete], True)
        waiting = threads[~complete]
        if instruction.has("test_wait") or machine.gives_up():
            write(waiting, False)
        else:
            machine.place[waiting] = at
            machine.barriers.park(waiting)

    return Operation(instruction.text, run, kind="ends")


@_opcode("cp")
def _bulk_copy(machine: Machine, instruction: Instruction) -> Operation:
    instruction.only("async bulk shared__cluster shared__cta global mbarrier__complete_tx__bytes")
    if not instruction.has("bulk") or not instruction.has("mbarrier__complete_tx__bytes"):
        raise Fault("of cp, only bulk copies to shared memory are implemented")
    to, source, size, barrier = instruction.operands
    addresses = [_addresses(machine, operand, "shared") for operand in (to, barrier)]
    sources, sizes = _addresses(machine, source, "global"), machine.read(size, "u32")

    def run(lanes: Lanes) -> None:
        numbers = _spread(sizes(lanes), lanes, machine)
        places = [read(lanes) for read in (addresses[0], sources, addresses[1])]
        for thread, count, *where in zip(machine.numbers[lanes], numbers, *places, strict=True):
            start, origin, signal = map(int, where)
            machine.barriers.start_copy(start, origin, int(count), signal, thread)

    return Operation(instruction.text, run)
