"""Peak memory of a loss and its gradient beyond the logits, in multiples of one [N, V] tensor of logits.

    python bench/studies/memory.py

Each case is measured in a process of its own. It makes the logits, takes one step to warm up (threads, compiled code),
returns all free memory, and then reads the highest resident memory of a step from Linux, which includes every
allocation. The gradient counts, so the least is 1 for a step that keeps the logits, and 0 for one in place.

`shifted` is logits[:, :-1] of a causal language model. The rows of such a batch are not one block of memory, so a
contender that copies them shows here.
"""

from __future__ import annotations

from typing import Any

import study
from cases import DTYPES, SHAPES, TIMED, Case, Problem, Tensors, random_logits
from loss import COLUMNS, CONTENDERS
from measure import give_back_memory, in_a_process, resident
from peers import LOSSES, of_case, published
from study import contenders, emit, progress
from tables import Table

BATCH = 4  # sequences in the shifted view


def measure(case: dict[str, Any]) -> dict[str, float]:
    """The peak, and what remains once the gradient is dropped, in [N, V] tensors."""
    (rows, columns), name = case["shape"], case["divergence"]
    tensors = None
    if case["layout"] == "shifted":
        whole = (BATCH, rows // BATCH + 1, columns)
        student, teacher = (x[:, :-1] for x in random_logits(*whole, dtype=DTYPES[case["dtype"]]))
        tensors = Tensors([student.requires_grad_()], [teacher])
    problem = Problem(Case("logits", name, rows, columns, case["dtype"]), published(name), tensors)
    [(peer, call)] = contenders(problem, [case["contender"]]).values()
    run, clean_up = problem.contender(peer, call)
    run()
    clean_up()
    give_back_memory()
    before = resident("VmRSS")
    peak = problem.peak(peer, call)
    tensor = problem.written()
    return {"peak": peak / tensor, "kept": (resident("VmRSS") - before) / tensor}


def main() -> None:
    """The command line."""
    arguments = study.parsed(
        study.command_line(
            __doc__, shapes=SHAPES, dtypes=TIMED, divergences=["forward_kl"], choices=LOSSES
        )
    )
    table = Table(
        "Peak memory beyond the logits, in [N, V] tensors of the logits' dtype",
        ["loss", "layout", "N x V", "logits", *COLUMNS],
    )
    measurements: list[dict[str, Any]] = []
    for divergence in arguments.divergences:
        for layout in ("contiguous", "shifted"):
            for shape in arguments.shapes:
                for dtype in arguments.dtypes:
                    row = [published(divergence).label, layout, f"{shape[0]} x {shape[1]:,}", dtype]
                    progress(*row)
                    peers = of_case("logits", divergence, DTYPES[dtype], "cpu")
                    for contender in CONTENDERS:
                        if contender not in (peer.name for peer in peers):
                            row.append("-")
                            continue
                        case = {
                            "divergence": divergence, "layout": layout, "shape": shape, "dtype": dtype,
                            "contender": contender,
                        }  # fmt: skip
                        multiples = in_a_process(measure, case, arguments.threads)
                        row.append(f"{multiples['peak']:.2f}")
                        measurements.append(case | multiples)
                    table.rows.append(row)
    kept = max(m["kept"] for m in measurements if m["contender"].startswith("fastkd"))
    note = (
        f"Once the gradient is dropped, fastkd keeps up to {kept:.2f} tensors for the next step; "
        "the system may take them back at any time (csrc/memory.h)."
    )
    emit(arguments, [table], measurements, [note])


if __name__ == "__main__":
    main()
