"""The loops of a GPU kernel, and what one iteration of each executes, from the SASS that cuobjdump prints.

A loop is a natural loop of the control-flow graph: a block that jumps back to one that dominates it, and all blocks
between them. A block that ptxas has moved to the end of a kernel, from where it jumps back into the middle, is
therefore not mistaken for a loop.

Instructions are counted on the shortest way through an iteration. A branch that a sweep rarely takes, such as the one
for a new maximum, lies beside this way. Barriers, shuffles and local memory are counted wherever they are in the loop.
"""

from __future__ import annotations

import heapq
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction."""

    address: int
    predicate: str  # "@P0", "@!P0", or ""
    opcode: str  # with modifiers: "LDG.E.128"
    operands: str


class Loop(NamedTuple):
    """A loop of a kernel."""

    body: list[Instruction]  # by address
    path: list[Instruction]  # of the shortest iteration
    depth: int  # 0 for a loop that is in no other

    def executed(self, *opcodes: str) -> int:
        """Instructions of the shortest iteration with one of these opcodes; all instructions if none is given."""
        return _count(self.path, opcodes)

    def present(self, *opcodes: str) -> int:
        """Instructions with one of these opcodes anywhere in the loop."""
        return _count(self.body, opcodes)


class Function(NamedTuple):
    """A kernel."""

    target: str  # "sm_90", or "" if the text does not say
    name: str
    code: list[Instruction]


def _count(instructions: Iterable[Instruction], opcodes: tuple[str, ...]) -> int:
    names = (instruction.opcode.partition(".")[0] for instruction in instructions)
    return sum(not opcodes or name in opcodes for name in names)


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def functions(sass: str) -> list[Function]:
    """The kernels in the output of `cuobjdump -sass`; a text without headings is one kernel."""
    results = [Function("", "", [])]
    target = ""
    for line in sass.splitlines():
        if heading := re.match(r"\s*(?:arch = |code for )(sm_\w+)", line):
            target = heading[1]
        elif heading := re.match(r"\s*Function : (\S+)", line):
            results.append(Function(target, heading[1], []))
        elif found := _LINE.search(line):
            address, predicate, opcode, operands = found.groups()
            results[-1].code.append(
                Instruction(int(address, 16), (predicate or "").strip(), opcode, operands.strip())
            )
    return [function for function in results if function.code]


def _is(instruction: Instruction, *opcodes: str) -> bool:
    return instruction.opcode.partition(".")[0] in opcodes


def _target(instruction: Instruction) -> int | None:
    """Where a jump leads, or None if the instruction is no direct jump."""
    if not _is(instruction, "BRA", "BSSY", "BRX", "JMP"):
        return None
    addresses = re.findall(r"\b0x([0-9a-f]+)", instruction.operands)
    return int(addresses[-1], 16) if addresses else None


def _successors(code: list[Instruction]) -> list[list[int]]:
    """The indices of the instructions that may follow each instruction."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    joins: dict[str, int] = {}  # where BSYNC leads, by barrier register
    results: list[list[int]] = []
    for i, instruction in enumerate(code):
        # BRA may have its condition among the operands: BRA P0, 0x40.
        conditional = bool(instruction.predicate) or (
            _is(instruction, "BRA") and "," in instruction.operands
        )
        target, after = _target(instruction), [i + 1] if i + 1 < len(code) else []
        if _is(instruction, "BSSY") and target is not None:
            joins[instruction.operands.partition(",")[0]] = target
            results.append(after)
        elif _is(instruction, "BRA", "JMP") and target is not None:
            jump = [index[target]] if target in index else []
            results.append([*after, *jump] if conditional else jump)
        elif _is(instruction, "BSYNC"):
            join = joins.get(instruction.operands.strip())
            jump = [index[join]] if join in index else after
            results.append([*after, *jump] if conditional else jump)
        elif _is(instruction, "EXIT", "RET", "BRX", "KILL"):
            results.append(after if conditional else [])
        else:
            results.append(after)
    return results


class _Graph(NamedTuple):
    """The basic blocks of a kernel, as ranges of instructions, and the edges between them."""

    blocks: list[range]
    after: list[list[int]]
    before: list[list[int]]


def _graph(code: list[Instruction]) -> _Graph:
    successors = _successors(code)
    leaders = {0} | {
        follower
        for i, following in enumerate(successors)
        for follower in following
        if following != [i + 1]
    }
    leaders |= {i + 1 for i, following in enumerate(successors) if following != [i + 1]}
    starts = sorted(leader for leader in leaders if leader < len(code))
    blocks = [range(*ends) for ends in zip(starts, [*starts[1:], len(code)], strict=True)]
    of = {block.start: number for number, block in enumerate(blocks)}
    after = [sorted({of[i] for i in successors[block[-1]]}) for block in blocks]
    before: list[list[int]] = [[] for _ in blocks]
    for block, following in enumerate(after):
        for follower in following:
            before[follower].append(block)
    return _Graph(blocks, after, before)


def _dominators(graph: _Graph) -> list[set[int]]:
    """The blocks that every path from the entry to a block passes; none for a block that no path reaches."""
    reached, pending = {0}, [0]
    while pending:
        followers = set(graph.after[pending.pop()]) - reached
        reached |= followers
        pending += followers
    results = [set(reached) if block in reached else set() for block in range(len(graph.blocks))]
    results[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in reached - {0}:
            previous = [results[other] for other in graph.before[block] if other in reached]
            found = {block} | set.intersection(*previous)
            changed |= found != results[block]
            results[block] = found
    return results


def _shortest(graph: _Graph, inside: set[int], first: int, lasts: set[int]) -> list[int]:
    """The blocks of the path from the first block to one of the last that has the fewest instructions."""
    queue = [(len(graph.blocks[first]), [first])]
    seen: set[int] = set()
    while queue:
        length, path = heapq.heappop(queue)
        block = path[-1]
        if block in lasts:
            return path
        if block not in seen:
            seen.add(block)
            for follower in graph.after[block]:
                if follower in inside and follower != first:
                    heapq.heappush(queue, (length + len(graph.blocks[follower]), [*path, follower]))
    raise AssertionError("no path leads back to the start of the loop")


def loops(code: list[Instruction]) -> list[Loop]:
    """The loops of a kernel, by address."""
    graph = _graph(code)
    dominators = _dominators(graph)
    reached = [block for block, above in enumerate(dominators) if above]
    inside: dict[int, set[int]] = {}  # by first block
    lasts: dict[int, set[int]] = {}
    for last in reached:
        for first in graph.after[last]:
            # The padding after a kernel jumps to itself, without a condition.
            if first not in dominators[last] or graph.after[last] == [last]:
                continue
            members, pending = {first, last}, [last]
            while pending:
                block = pending.pop()
                if block != first:
                    earlier = {other for other in graph.before[block] if dominators[other]}
                    pending += earlier - members
                    members |= earlier
            inside[first] = inside.get(first, set()) | members
            lasts.setdefault(first, set()).add(last)
    results = []
    for first, members in sorted(inside.items()):
        path = _shortest(graph, members, first, lasts[first])
        depth = sum(first in others for others in inside.values()) - 1
        body = [code[i] for block in sorted(members) for i in graph.blocks[block]]
        results.append(Loop(body, [code[i] for block in path for i in graph.blocks[block]], depth))
    return results


def disassemble(binary: Path | str) -> str:
    """The SASS of a cubin, or of a library that contains some."""
    from triton import knobs  # triton's wheel includes NVIDIA's tool

    command = [knobs.nvidia.cuobjdump.path, "-sass", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
