"""Losses from hidden states and an lm_head: time, memory and error, against eager, torch.compile, TRL and Liger.

    python bench/studies/linear.py

The yardstick is `four GEMMs`: the logits of student and teacher and the gradients of hidden states and weight, in
fastkd's own chunks and with buffers that exist already. A loss that computes the student's logits once needs all four
products. What it takes beyond them is the cost of the loss.

- Times: contenders take turns as in loss.py, and ratios are medians of the ratios within rounds.
- Memory: the peak beyond inputs and gradients, in a process for each case as in memory.py.
- Error: of the gradients against float64, relative by norm, on few rows, for bfloat16 operands too.

The first case uses SmolLM2's head and its hidden states on real text, if `make demo` has downloaded the model. The case
with 262,144 columns is random. TRL and Liger take part if they are installed (`pip install 'fastkd[peers]'`).
"""

from __future__ import annotations

import subprocess
from typing import Any

import study
from cases import SMOLLM2, TIMED, Case, Problem, Tensors, gap
from measure import MIB, Contender, four_products, in_a_process, interleave, ratio
from peers import BETAS, fastkd_linear, liger_chunked
from study import cells, contenders, emit, progress, record
from tables import Table

CASES = {
    "SmolLM2": Case("linear", "", 1024, **SMOLLM2, data="SmolLM2"),
    "262k": Case("linear", "", 512, 262_144, hidden=640),
}
CONTENDERS = ("fastkd (cpu)", "eager", "torch.compile", "TRL", "Liger")
COLUMNS = ("four GEMMs", "fastkd", *CONTENDERS[1:])


def time_case(name: str, divergence: str, rounds: int) -> tuple[list[str], list[dict[str, Any]]]:
    """A row of the table of times, and its measurements."""
    problem = Problem(CASES[name]._replace(divergence=divergence))
    losses = contenders(problem, CONTENDERS)
    competing = {key: problem.contender(*each) for key, each in losses.items()}
    products = four_products(*problem.tensors.leaves, *problem.tensors.others)
    seconds = interleave(competing | {"four GEMMs": Contender(products)}, rounds)
    row = [divergence, name, *cells(seconds, COLUMNS)]
    row.append(f"{ratio(seconds, 'fastkd', 'four GEMMs'):.2f}x")
    shape = (problem.case.rows, problem.case.vocabulary)
    return row, record("fused linear", problem.loss, shape, "float32", seconds)


def memory_of(case: tuple[str, str, str, int | None]) -> int | None:
    """Peak bytes of a step beyond inputs and gradients, or None if the contender cannot run."""
    name, divergence, contender, budget = case
    problem = Problem(CASES[name]._replace(divergence=divergence))
    for peer, call in contenders(problem, [contender]).values():
        if peer.package == "fastkd":
            call = fastkd_linear(problem.loss, memory_budget=budget)
        problem.step(call)
        problem.clean_up()
        return problem.peak(peer, call) - problem.written()
    return None


def memory_row(
    name: str, divergence: str, budget: int | None, threads: int | None
) -> tuple[list[str], list[dict[str, Any]]]:
    """A row of the table of memory in MiB, and its measurements."""
    row, measurements = [divergence, name], []
    for contender, column in zip(CONTENDERS, COLUMNS[1:], strict=True):
        progress("memory", name, divergence, column)
        try:
            peak = in_a_process(memory_of, (name, divergence, contender, budget), threads)
        except (
            subprocess.CalledProcessError
        ):  # for example because the system ended it for its memory
            peak = None
        row.append("-" if peak is None else f"{peak / MIB:,.0f}")
        if peak is not None:
            case = {"what": "memory", "case": name, "loss": divergence, "contender": column}
            measurements.append(case | {"bytes": peak})
    return row, measurements


def errors(divergence: str, dtype: str, rows: int = 64, columns: int = 8192) -> list[list[str]]:
    """Gradient errors against float64 on the same rounded operands, for a few rows and a part of the vocabulary."""
    case = CASES["SmolLM2"]._replace(divergence=divergence, dtype=dtype)
    whole = Problem(case).tensors
    leaves, others = ([hidden[:rows].detach(), head[:columns].detach()] for hidden, head in whole)
    few = Problem(
        case._replace(rows=rows, vocabulary=columns),
        tensors=Tensors([x.requires_grad_() for x in leaves], others),
    )
    losses = {key: call for key, (_, call) in contenders(few, ("fastkd (cpu)", "eager")).items()}
    if dtype != "float32":
        losses[f"fastkd, logits in {dtype}"] = fastkd_linear(
            few.loss, logits_dtype=few.tensors.leaves[0].dtype
        )
    losses |= {key: call for key, (_, call) in contenders(few, ("TRL", "Liger")).items()}
    if "Liger" in losses:  # the same numbers without waiting for its compilation
        losses["Liger"] = liger_chunked(divergence, compiled=False)
    table = []
    for name, call in losses.items():
        few.step(call)
        off = [
            gap([leaf.grad], [exact])
            for leaf, exact in zip(few.tensors.leaves, few.truth().exact.gradients, strict=True)
            if leaf.grad is not None
        ]
        few.clean_up()
        table.append([divergence, dtype, name, *(f"{error:.1e}" for error in off)])
    return table


def main() -> None:
    """The command line."""
    parser = study.command_line(__doc__, rounds=5, divergences=["forward_kl", "jsd"], choices=BETAS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--budget", type=int, help="fastkd's memory_budget in the table of memory, bytes"
    )
    parser.add_argument("--skip", nargs="+", choices=("time", "memory", "error"), default=[])
    arguments = study.parsed(parser)
    times = Table(
        "Forward and gradient from hidden states, ms (times fastkd's)",
        ["loss", "case", *COLUMNS, "fastkd / four GEMMs"],
    )
    memory = Table("Peak beyond inputs and gradients, MiB", ["loss", "case", *COLUMNS[1:]])
    error = Table(
        "Gradient error against float64, relative, by norm",
        ["loss", "operands", "", "hidden states", "weight"],
    )
    measurements: list[dict[str, Any]] = []
    for divergence in arguments.divergences:
        for name in arguments.cases:
            if "time" not in arguments.skip:
                progress("time", name, divergence)
                row, measured = time_case(name, divergence, arguments.rounds)
                times.rows.append(row)
                measurements += measured
            if "memory" not in arguments.skip:
                row, measured = memory_row(name, divergence, arguments.budget, arguments.threads)
                memory.rows.append(row)
                measurements += measured
        if "error" not in arguments.skip:
            for dtype in TIMED:
                progress("error", divergence, dtype)
                error.rows += errors(divergence, dtype)
    emit(arguments, [table for table in (times, memory, error) if table.rows], measurements)


if __name__ == "__main__":
    main()
