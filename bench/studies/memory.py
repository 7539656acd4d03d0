"""Peak memory of a loss and its gradient beyond the logits, in multiples of one [N, V] tensor of theirs.

    python bench/studies/memory.py

Each case is a process of its own: it makes the logits, takes one step to warm up (threads, compiled
code), gives everything back, and asks the Linux kernel for the highest resident memory of the next
step (VmHWM, set back through /proc/self/clear_refs). No allocation of any side escapes that, whoever
made it. The gradient is part of what is counted, so 1 is the least for a step that keeps the logits,
and 0 for one in place.

`shifted` is logits[:, :-1] of a causal language model: the rows of a batch are then not one block of
memory, and what copies them shows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
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
    make,
    random_logits,
    shape_of,
)
from measure import give_back_memory, peak_extra, resident
from report import Table, add_arguments, emit, progress

BATCH = 4  # sequences of the shifted view


def measure(case: dict[str, Any]) -> dict[str, float]:
    """In the process of a case: its peak, and what stays once the gradient is dropped, in [N, V] tensors."""
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    rows, columns = case["shape"]
    dtype = DTYPES[case["dtype"]]
    if case["layout"] == "shifted":
        logits = random_logits(BATCH, rows // BATCH + 1, columns, dtype=dtype)
        student, teacher = (x[:, :-1] for x in logits)
    else:
        student, teacher = random_logits(rows, columns, dtype=dtype)
    inputs = Inputs(student, teacher)
    loss = make(LOSSES[case["divergence"]], dtype)[case["contender"]]

    def step() -> None:
        inputs.step(loss, produced=case["contender"] == IN_PLACE)

    step()
    inputs.drop_gradients()
    give_back_memory()
    before = resident("VmRSS")
    peak = peak_extra(step)
    inputs.drop_gradients()
    tensor = student.numel() * student.element_size()
    return {"peak": peak / tensor, "kept": (resident("VmRSS") - before) / tensor}


def in_a_process(case: dict[str, Any]) -> dict[str, float]:
    """What :func:`measure` gives for a case."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, metavar="NxV")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--divergences", nargs="+", choices=LOSSES, default=["forward_kl"])
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case)))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    table = Table(
        "Peak memory beyond the logits, in [N, V] tensors of the logits' dtype",
        ["loss", "layout", "N x V", "logits", *CONTENDERS],
    )
    measurements: list[dict[str, Any]] = []
    for divergence in arguments.divergences:
        for layout in ("contiguous", "shifted"):
            for shape in arguments.shapes:
                for dtype in arguments.dtypes:
                    row = [LOSSES[divergence].label, layout, f"{shape[0]} x {shape[1]:,}", dtype]
                    progress(*row)
                    for contender in CONTENDERS:
                        if contender == "eager, no upcast" and dtype == "float32":
                            row.append("-")
                            continue
                        case = {
                            "divergence": divergence,
                            "layout": layout,
                            "shape": shape,
                            "dtype": dtype,
                            "contender": contender,
                            "threads": arguments.threads,
                        }
                        multiples = in_a_process(case)
                        row.append(f"{multiples['peak']:.2f}")
                        measurements.append(case | multiples)
                    table.rows.append(row)
    kept = max(m["kept"] for m in measurements if m["contender"].startswith("fastkd"))
    note = (
        f"Once the gradient is dropped, fastkd keeps up to {kept:.2f} tensors for the next step; "
        "the kernel may take them back at any time (csrc/memory.h)."
    )
    emit(arguments, [table], measurements, [note])


if __name__ == "__main__":
    main()
