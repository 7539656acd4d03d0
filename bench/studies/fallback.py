"""The portable backend, which runs where there is no kernel, beside the plain PyTorch that it replaces.

    python bench/studies/fallback.py

Loss and gradient of every divergence on the CPU, as they run without a compiler or in float64. A time of the portable
backend is a share of eager code's: the median of the ratios within interleaved rounds. One thread by default, so
another process on the machine slows both alike.
"""

from __future__ import annotations

from typing import Any

import study
from cases import Case, Problem
from measure import MIB, interleave, milliseconds, ratio
from peers import published
from study import contenders, emit, progress
from tables import Table

import fastkd


def main() -> None:
    """The command line."""
    parser = study.command_line(
        __doc__, rounds=7, dtypes=("float32", "float64"), divergences=[*fastkd.DIVERGENCES]
    )
    parser.add_argument("--shape", type=study.shape_of, default=(256, 49_152), metavar="NxV")
    parser.set_defaults(threads=1)
    arguments = study.parsed(parser)
    table = Table(
        "Forward and gradient of {} x {:,} logits".format(*arguments.shape),
        ["divergence", "logits", "eager, ms", "portable, ms", "portable / eager", "eager, MiB", "portable, MiB"],
    )  # fmt: skip
    measurements: list[dict[str, Any]] = []
    for dtype in arguments.dtypes:
        for name in arguments.divergences:
            progress(name, dtype)
            problem = Problem(Case("logits", name, *arguments.shape, dtype), published(name))
            losses = contenders(problem, ("eager", "fastkd (portable)"))
            seconds = interleave(
                {key: problem.contender(*each) for key, each in losses.items()}, arguments.rounds
            )
            peaks = {key: problem.peak(*each) / MIB for key, each in losses.items()}
            share = ratio(seconds, "fastkd (portable)", "eager")
            times = (milliseconds(seconds[key]) for key in losses)
            sizes = (f"{peak:.0f}" for peak in peaks.values())
            table.rows.append([name, dtype, *times, f"{share:.2f}", *sizes])
            measurements.append(
                {"divergence": name, "dtype": dtype, "portable_to_eager": share, "peak_mib": peaks}
            )
    emit(arguments, [table], measurements)


if __name__ == "__main__":
    main()
