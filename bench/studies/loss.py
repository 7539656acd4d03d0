"""How long losses take on the CPU, in plain PyTorch, under torch.compile and in fastkd.

    python bench/studies/loss.py

Every round runs all contenders in a new random order, so other work of the machine slows all of them alike. A time is
the median over the rounds; a ratio is the median of the ratios within rounds. `eager` computes in float32, and is the
one to compare with. `eager, no upcast` stays in bfloat16, where log-softmax is inexact (accuracy.py shows by how much).

Two floors run in the same rounds. No loss is part of them:

- memory: the time of `torch.add(a, b, out=c)` on the bytes of both logits and one gradient, with a buffer that is used
  again and with a fresh one. Its stores go through the cache, which first reads what it overwrites, so a kernel that
  streams past the cache can be a little faster.
- arithmetic: fastkd's own forward pass of forward KL, two exponentials per element, on as many elements but without
  memory traffic: every row is the same 8,192 columns, which stay in the cache.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import study
import torch
from cases import SHAPES, TIMED, Case, Problem
from measure import Contender, addition, interleave, milliseconds, ratio
from peers import LOSSES, fastkd_loss, published
from study import cells, column, contenders, emit, progress, record
from tables import Table

CONTENDERS = (
    "eager", "eager, no upcast", "torch.compile", "fastkd (cpu)", "fastkd (portable)", "fastkd (cpu, in place)",
)  # fmt: skip
COLUMNS = [column(name) for name in CONTENDERS]
FORWARD_COLUMNS = COLUMNS[:-1]  # a forward alone cannot be in place
CACHED_COLUMNS = 8_192  # 64 KB for two float32 tensors, which fits any second-level cache
OVERHEAD_SHAPE = (8, 1_000)
OVERHEAD_ROUNDS = 300


def floors(problem: Problem) -> dict[str, Contender]:
    """Work that bounds the time of any loss from below."""
    student, teacher = (x.detach() for x in (*problem.tensors.leaves, *problem.tensors.others))
    a, b = (x.view(torch.int32) for x in (student, teacher))  # adding integers costs nothing
    rows = student.numel() // CACHED_COLUMNS
    cached = [x[0, :CACHED_COLUMNS].expand(rows, -1) for x in (student, teacher)]
    forward = fastkd_loss(published("forward_kl"))
    return {
        "memory, warm": Contender(addition(a, b)),
        "memory, fresh": Contender(lambda: torch.add(a, b)),
        "arithmetic": Contender(lambda: forward(*cached)),
    }


def main() -> None:
    """The command line."""
    arguments = study.parsed(
        study.command_line(__doc__, rounds=11, shapes=SHAPES, dtypes=TIMED, divergences=[*LOSSES])
    )
    case = ("loss", "N x V", "logits")
    gradient_table = Table("Forward and gradient, ms (times fastkd's)", [*case, *COLUMNS])
    forward_table = Table("Forward alone, ms (times fastkd's)", [*case, *FORWARD_COLUMNS])
    floor_table = Table(
        "Forward and gradient against the floors, ms",
        [*case, "memory, warm", "memory, fresh", "arithmetic", "fastkd", "fastkd / higher floor"],
    )
    overhead_table = Table(
        f"A small call, {OVERHEAD_SHAPE[0]} x {OVERHEAD_SHAPE[1]:,}, forward and gradient, "
        f"us (times fastkd's); {OVERHEAD_ROUNDS} rounds",
        ["loss", "logits", *COLUMNS],
    )
    measurements: list[dict[str, Any]] = []

    def measure(name: str, shape: tuple[int, int], dtype: str) -> None:
        problem = Problem(Case("logits", name, *shape, dtype), published(name))
        row = [problem.loss.label, f"{shape[0]} x {shape[1]:,}", dtype]
        progress(*row)
        losses = contenders(problem, CONTENDERS)
        steps = {key: problem.contender(*each) for key, each in losses.items()}
        if shape == OVERHEAD_SHAPE:
            seconds = interleave(steps, OVERHEAD_ROUNDS)
            microseconds = {key: [1e3 * x for x in each] for key, each in seconds.items()}
            overhead_table.rows.append([row[0], dtype, *cells(microseconds, COLUMNS)])
            measurements.extend(record("forward and gradient", problem.loss, shape, dtype, seconds))
            return

        seconds = interleave(steps | floors(problem), arguments.rounds)
        gradient_table.rows.append([*row, *cells(seconds, COLUMNS)])
        higher = max(("memory, warm", "arithmetic"), key=lambda floor: median(seconds[floor]))
        times = [milliseconds(seconds[column]) for column in floor_table.columns[3:-1]]
        floor_table.rows.append([*row, *times, f"{ratio(seconds, 'fastkd', higher):.2f}x"])
        measurements.extend(record("forward and gradient", problem.loss, shape, dtype, seconds))

        student, teacher = problem.tensors.leaves[0].detach(), problem.tensors.others[0]
        forwards = {
            key: Contender(lambda call=call: call(student, teacher))
            for key, (_, call) in losses.items()
            if key in FORWARD_COLUMNS
        }
        seconds = interleave(forwards, arguments.rounds)
        forward_table.rows.append([*row, *cells(seconds, FORWARD_COLUMNS)])
        measurements.extend(record("forward", problem.loss, shape, dtype, seconds))

    for dtype in arguments.dtypes:
        for shape in (*arguments.shapes, OVERHEAD_SHAPE):
            for name in arguments.divergences:
                measure(name, shape, dtype)
    emit(arguments, [gradient_table, forward_table, floor_table, overhead_table], measurements)


if __name__ == "__main__":
    main()
