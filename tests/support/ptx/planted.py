"""Faults planted into PTX: a barrier, fence, wait or arrival that is missing or wrong.

Tests run a kernel with each and expect the machine to stop, or other numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from support.ptx.launch import Kernel
from support.ptx.program import Instruction, Program

# Edits of a module's text, which change every instruction of a kind.
EVERYWHERE: dict[str, Callable[[str], str]] = {
    "no fence between threads and bulk copies": lambda text: text.replace("fence.proxy.async.shared::cta;", ""),
    "no fence after initializing mbarriers": lambda text: text.replace("fence.mbarrier_init.release.cluster;", ""),
    "16 bytes too few announced": lambda text: re.sub(
        r"(mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[%r\d+\], )(%r\d+);", r"sub.u32 \2, \2, 16; \1\2;", text),
    "no bytes announced": lambda text: re.sub(
        r"(mbarrier\.arrive)\.expect_tx(\.shared::cta\.b64 _, \[%r\d+\]), %r\d+;", r"\1\2;", text),
    "no arrival at mbarriers": lambda text: re.sub(
        r"mbarrier\.arrive\.expect_tx(\.shared::cta\.b64) _, (\[%r\d+\], %r\d+;)", r"mbarrier.expect_tx\1 \2", text),
    "waits for the phase before": lambda text: re.sub(
        r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 done, \[%r\d+\], )(%r\d+);", r"xor.b32 \2, \2, 1; \1\2;", text),
    "no wait for bulk copies": lambda text: re.sub(
        r"mbarrier\.try_wait\.parity\.shared::cta\.b64 done, \[%r\d+\], %r\d+;", "setp.eq.u32 done, 0, 0;", text),
    "a wait that is not repeated": lambda text: text.replace("@!done bra again;", ""),
    "results sent to the own block": lambda text: re.sub(
        r"mapa\.u64\s+(%rd\d+), (%rd\d+), %r\d+;", r"mov.u64 \1, \2;", text),
    "no barriers of a cluster": lambda text: re.sub(r"barrier\.cluster\.[\w.]+;", "", text),
    "arrivals that release nothing": lambda text: re.sub(
        r"barrier\.cluster\.arrive[\w.]*;", "barrier.cluster.arrive.relaxed.aligned;", text),
    "mbarriers that take two arrivals": lambda text: re.sub(
        r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], )1;", r"\g<1>2;", text),
}  # fmt: skip

SYNCHRONIZES = ("bar", "barrier", "fence", "membar", "mbarrier")


def sites(program: Program) -> list[int]:
    """The instructions of an entry that synchronize threads, as places in the program."""
    return [
        place
        for place, instruction in enumerate(program.instructions)
        if instruction.in_entry and instruction.name in SYNCHRONIZES
    ]


def removed(instruction: Instruction) -> Instruction:
    """What is left of an instruction: nothing; a wait for an mbarrier succeeds at once."""
    if instruction.has("try_wait"):
        done = instruction.operands[0]
        return replace(
            instruction, name="setp", modifiers=("eq",), types=("u32",), operands=[done, "0", "0"]
        )
    return replace(instruction, name="removed")


@contextmanager
def without(kernel: Kernel, place: int) -> Iterator[None]:
    """Within, launches of a kernel that has run before lack one instruction."""
    instruction = kernel.program.instructions[place]
    undo = [machine.replace(place, removed(instruction)) for machine in kernel.machines()]
    try:
        yield
    finally:
        for back in undo:
            back()
