"""How long losses take on the CPU, in plain PyTorch, under torch.compile and in fastkd.

    python bench/studies/loss.py

Every contender runs once a round, in a new random order each round, so that whatever else the machine
does falls on all of them. A time is the median over the rounds; a ratio is the median of the ratios
within the rounds. `eager` computes in float32 and is the headline; `eager, no upcast` stays in
bfloat16, where log-softmax is inexact (bench/studies/accuracy.py shows by how much).

Two floors run in the same rounds. No loss is in them:

- memory: what `torch.add(a, b, out=c)` takes over the bytes of the student's and teacher's logits and
  of one gradient, to a buffer that is used again and to a fresh one. Its stores go through the cache,
  which reads what it overwrites; a kernel that streams past the cache can be a little faster.
- arithmetic: fastkd's own forward pass of forward KL, two exponentials an element, over as many
  elements, with memory taken away: every row is the same 8,192 columns, which stay in the cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import study  # noqa: F401 (bench/ is importable from here on)
import torch
from contenders import (
    CONTENDERS,
    DTYPES,
    IN_PLACE,
    LOSSES,
    SHAPES,
    Inputs,
    Loss,
    Rows,
    fastkd_loss,
    make,
    random_logits,
    shape_of,
)
from measure import Contender, addition, interleave, milliseconds, nothing, ratio
from report import Table, add_arguments, emit, progress

CACHED_COLUMNS = 8_192  # times two tensors of 4 bytes: 64 KB, in any second-level cache
OVERHEAD_SHAPE = (8, 1_000)
OVERHEAD_ROUNDS = 300

Shape = tuple[int, int]


def steps(losses: dict[str, Rows], inputs: Inputs) -> dict[str, Contender]:
    """Forward and gradient."""

    def contender(name: str, loss: Rows) -> Contender:
        if name != IN_PLACE:
            return Contender(lambda: inputs.step(loss), inputs.drop_gradients)
        inputs.keep_original()
        return Contender(lambda: inputs.step(loss, produced=True), inputs.restore)

    return {name: contender(name, loss) for name, loss in losses.items()}


def forwards(losses: dict[str, Rows], inputs: Inputs) -> dict[str, Contender]:
    """Forward alone, without a graph."""

    def contender(loss: Rows) -> Contender:
        return Contender(lambda: loss(inputs.student.detach(), inputs.teacher), nothing)

    return {name: contender(loss) for name, loss in losses.items() if name != IN_PLACE}


def floors(shape: Shape, inputs: Inputs) -> dict[str, Contender]:
    """What no loss can be much faster than."""
    # As integers, so that adding costs nothing in any dtype and there are no denormal numbers.
    a, b = (x.detach().view(torch.int32) for x in (inputs.student, inputs.teacher))
    rows = shape[0] * shape[1] // CACHED_COLUMNS
    row = [
        x.detach()[0, :CACHED_COLUMNS].expand(rows, -1) for x in (inputs.student, inputs.teacher)
    ]
    forward = fastkd_loss(LOSSES["forward_kl"])
    return {
        "memory, warm": Contender(addition(a, b), nothing),
        "memory, fresh": Contender(lambda: torch.add(a, b), nothing),
        "arithmetic": Contender(lambda: forward(*row), nothing),
    }


def cells(seconds: dict[str, list[float]], columns: Sequence[str]) -> list[str]:
    """Each contender's time, with its ratio to fastkd's."""

    def cell(name: str) -> str:
        if name not in seconds:
            return "-"
        versus = "" if name == "fastkd" else f" ({ratio(seconds, name, 'fastkd'):.1f}x)"
        return milliseconds(seconds[name]) + versus

    return [cell(name) for name in columns]


def record(
    what: str, loss: Loss, shape: Shape, dtype: str, seconds: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Measurements for --json."""
    return [
        {
            "what": what,
            "loss": loss.label,
            "shape": shape,
            "dtype": dtype,
            "contender": name,
            "median_seconds": median(values),
            "least_seconds": min(values),
            "ratio_to_fastkd": ratio(seconds, name, "fastkd"),
        }
        for name, values in seconds.items()
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, metavar="NxV")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--divergences", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--rounds", type=int, default=11)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    case = ("loss", "N x V", "logits")
    gradient_table = Table("Forward and gradient, ms (times fastkd's)", [*case, *CONTENDERS])
    forward_table = Table("Forward alone, ms (times fastkd's)", [*case, *CONTENDERS[:-1]])
    floor_table = Table(
        "Forward and gradient against the floors, ms",
        [*case, "memory, warm", "memory, fresh", "arithmetic", "fastkd", "fastkd / higher floor"],
    )
    overhead_table = Table(
        f"A small call, {OVERHEAD_SHAPE[0]} x {OVERHEAD_SHAPE[1]:,}, forward and gradient, "
        f"us (times fastkd's); {OVERHEAD_ROUNDS} rounds",
        ["loss", "logits", *CONTENDERS],
    )
    measurements: list[dict[str, Any]] = []
    for dtype in arguments.dtypes:
        for shape in arguments.shapes:
            inputs = Inputs(*random_logits(*shape, dtype=DTYPES[dtype]))
            for name in arguments.divergences:
                loss = LOSSES[name]
                row = [loss.label, f"{shape[0]} x {shape[1]:,}", dtype]
                progress(*row)

                losses = make(loss, DTYPES[dtype])
                competing = steps(losses, inputs) | floors(shape, inputs)
                seconds = interleave(competing, arguments.rounds)
                gradient_table.rows.append([*row, *cells(seconds, CONTENDERS)])
                higher = max(
                    ("memory, warm", "arithmetic"), key=lambda floor: median(seconds[floor])
                )
                times = [milliseconds(seconds[column]) for column in floor_table.columns[3:-1]]
                floor_table.rows.append([*row, *times, f"{ratio(seconds, 'fastkd', higher):.2f}x"])
                measurements += record("forward and gradient", loss, shape, dtype, seconds)

                seconds = interleave(forwards(losses, inputs), arguments.rounds)
                forward_table.rows.append([*row, *cells(seconds, CONTENDERS[:-1])])
                measurements += record("forward", loss, shape, dtype, seconds)
        for name in arguments.divergences:
            loss = LOSSES[name]
            progress(loss.label, "a small call", dtype)
            inputs = Inputs(*random_logits(*OVERHEAD_SHAPE, dtype=DTYPES[dtype]))
            losses = make(loss, DTYPES[dtype])
            seconds = interleave(steps(losses, inputs), OVERHEAD_ROUNDS)
            microseconds = {key: [1e3 * x for x in values] for key, values in seconds.items()}
            overhead_table.rows.append([loss.label, dtype, *cells(microseconds, CONTENDERS)])
            measurements += record("forward and gradient", loss, OVERHEAD_SHAPE, dtype, seconds)
    tables = [gradient_table, forward_table, floor_table, overhead_table]
    emit(arguments, tables, measurements)


if __name__ == "__main__":
    main()
