"""What computes where there is no kernel, next to the plain PyTorch that it replaces.

    python bench/studies/fallback.py

Loss and gradient of every divergence on the CPU, without a compiler or in float64: the portable backend's time as a
share of eager code's, the median of the ratios within interleaved rounds, and the peak of memory of both. One thread,
so that another process on the machine slows both alike.
"""

from __future__ import annotations

import argparse
from functools import partial

import study  # noqa: F401 (bench/ is importable from here on)
import torch
from contenders import (
    LOSSES,
    Inputs,
    eager_rows,
    fastkd_loss,
    from_definition,
    mean_of,
    random_logits,
    shape_of,
)
from measure import MIB, Contender, interleave, milliseconds, peak_extra, ratio
from report import Table, add_arguments, emit, progress

import fastkd

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=shape_of, default=(256, 49_152), metavar="NxV")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float64"])
    parser.add_argument("--divergences", nargs="+", default=list(fastkd.DIVERGENCES))
    parser.add_argument("--rounds", type=int, default=7)
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or 1)

    rows, columns = arguments.shape
    table = Table(
        f"Forward and gradient of {rows} x {columns:,} logits",
        ["divergence", "logits", "eager, ms", "portable, ms", "portable / eager", "eager, MiB", "portable, MiB"],
    )  # fmt: skip
    measurements = []
    for dtype in arguments.dtypes:
        inputs = Inputs(*random_logits(rows, columns, dtype=DTYPES[dtype]))
        computed = torch.promote_types(DTYPES[dtype], torch.float32)
        for name in arguments.divergences:
            progress(name, dtype)
            loss = LOSSES.get(name) or from_definition(fastkd.DIVERGENCES[name]())
            losses = {
                "eager": mean_of(eager_rows(loss, computed)),
                "portable": fastkd_loss(loss, backend="portable"),
            }
            runs = {key: partial(inputs.step, each) for key, each in losses.items()}
            seconds = interleave(
                {key: Contender(run, inputs.drop_gradients) for key, run in runs.items()},
                arguments.rounds,
            )
            peaks = {}
            for key, run in runs.items():
                peaks[key] = peak_extra(run) / MIB
                inputs.drop_gradients()
            share = ratio(seconds, "portable", "eager")
            table.rows.append(
                [
                    name, dtype, *(milliseconds(seconds[key]) for key in losses), f"{share:.2f}",
                    *(f"{peaks[key]:.0f}" for key in losses),
                ]
            )  # fmt: skip
            measurements.append(
                {"divergence": name, "dtype": dtype, "portable_to_eager": share, "peak_mib": peaks}
            )
    emit(arguments, [table], measurements)


if __name__ == "__main__":
    main()
