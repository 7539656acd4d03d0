"""Losses from hidden states and an lm_head: time, memory and error, against eager, torch.compile, TRL and Liger.

    python bench/studies/linear.py

The yardstick is `four GEMMs`: logits of student and teacher, the gradients of hidden states and weight, with fastkd's
own chunks and buffers that exist already, and nothing else. A loss that makes the student's logits once and never
recomputes needs them all; what it takes beyond them is the price of the loss.

- Times: contenders take turns within a round, as in loss.py; ratios are medians of those within the rounds.
- Memory: the peak beyond inputs and gradients, each case a process of its own, as in memory.py.
- Error: of the gradients against float64, relative to the largest entry, on few rows; with bfloat16 operands too.

The head is SmolLM2's own where `make demo` has put it, with hidden states that the model has on real text; the case of
262,144 columns is random. TRL and Liger take part where they are installed (`pip install 'fastkd[peers]'`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any, NamedTuple

import study  # noqa: F401 (bench/ is importable from here on)
import torch
from cases import hidden_states
from contenders import LOSSES
from loss import cells, record
from measure import Contender, four_products, interleave, nothing, peak_extra
from peers import BETAS, Call, eager_linear, fastkd_linear, liger_chunked, trl_chunked
from report import Table, add_arguments, emit, progress
from torch import Tensor


class Case(NamedTuple):
    """Sizes, and whether the tensors are those of SmolLM2."""

    rows: int
    hidden: int
    vocabulary: int
    real: bool


CASES = {
    "SmolLM2": Case(1024, 576, 49_152, True),
    "262k": Case(512, 640, 262_144, False),
}


class Inputs(NamedTuple):
    """Hidden states and heads."""

    student: Tensor
    weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """Fresh leaves of that dtype."""
        student, weight, *others = (tensor.detach().to(dtype, copy=True) for tensor in self)
        return Inputs(student.requires_grad_(), weight.requires_grad_(), *others)


def load(case: Case) -> Inputs:
    """In float32."""
    return Inputs(*hidden_states(case.rows, case.hidden, case.vocabulary, real=case.real))


def contenders(divergence: str) -> dict[str, Call]:
    """Every loss that can run here."""
    torch.compiler.reset()
    losses = {
        "fastkd": fastkd_linear(LOSSES[divergence].divergence),
        "eager": eager_linear(LOSSES[divergence].formula),
        "torch.compile": torch.compile(eager_linear(LOSSES[divergence].formula), dynamic=False),
    }
    for name, make in (("TRL", trl_chunked), ("Liger", liger_chunked)):
        try:
            losses[name] = make(divergence)
        except ImportError:
            progress(f"{name} is not installed")
    return losses


def step(loss: Call, inputs: Inputs) -> None:
    """Forward and backward."""
    inputs.student.grad = inputs.weight.grad = None
    loss(*inputs).backward()


def time_case(name: str, divergence: str, rounds: int) -> tuple[list[str], list[dict[str, Any]]]:
    """A row of the table of times."""
    inputs = load(CASES[name]).to(torch.float32)
    losses = contenders(divergence)
    competing = {
        key: Contender(lambda loss=loss: step(loss, inputs), nothing)
        for key, loss in losses.items()
    }
    competing["four GEMMs"] = Contender(four_products(*inputs), nothing)
    seconds = interleave(competing, rounds)
    shape = (CASES[name].rows, CASES[name].vocabulary)
    row = [divergence, name, *cells(seconds, COLUMNS)]
    ratios = [a / b for a, b in zip(seconds["fastkd"], seconds["four GEMMs"], strict=True)]
    row.append(f"{sorted(ratios)[len(ratios) // 2]:.2f}x")
    return row, record("fused linear", LOSSES[divergence], shape, "float32", seconds)


COLUMNS = ("four GEMMs", "fastkd", "eager", "torch.compile", "TRL", "Liger")


def measure_memory(name: str, divergence: str, contender: str, budget: int | None) -> int:
    """In a process of its own: bytes at the peak of a step beyond inputs and gradients."""
    inputs = load(CASES[name]).to(torch.float32)
    losses = contenders(divergence)
    loss = (
        fastkd_linear(LOSSES[divergence].divergence, memory_budget=budget)
        if contender == "fastkd"
        else losses[contender]
    )
    few = Inputs(*(x.detach()[:8].clone() for x in inputs)).to(torch.float32)  # code, threads
    step(loss, few)
    # The gradients are there before: what is counted comes on top of them.
    inputs.student.grad, inputs.weight.grad = (
        torch.ones_like(inputs.student),
        torch.ones_like(inputs.weight),
    )
    held = inputs.student.grad.nbytes + inputs.weight.grad.nbytes
    inputs.student.grad = inputs.weight.grad = None
    return peak_extra(lambda: step(loss, inputs)) - held


def memory_row(
    name: str, divergence: str, budget: int | None
) -> tuple[list[str], list[dict[str, Any]]]:
    """A row of the table of memory, in MiB."""
    row, measurements = [divergence, name], []
    for contender in COLUMNS[1:]:
        progress("memory", name, divergence, contender)
        case = json.dumps([name, divergence, contender, budget])
        done = subprocess.run(
            [sys.executable, __file__, "--memory-case", case], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            row.append("-")
            continue
        peak = json.loads(done.stdout.splitlines()[-1])
        row.append(f"{peak / 2**20:,.0f}")
        measurements.append(
            {
                "what": "memory",
                "case": name,
                "loss": divergence,
                "contender": contender,
                "bytes": peak,
            }
        )
    return row, measurements


def errors(divergence: str, dtype: torch.dtype, rows: int = 64) -> list[list[str]]:
    """Gradient errors against float64 on the same (rounded) operands, on a slice of the vocabulary."""
    whole = load(CASES["SmolLM2"])
    few = Inputs(
        whole.student[:rows], whole.weight[:8192], whole.teacher[:rows], whole.teacher_weight[:8192]
    ).to(dtype)
    exact = few.to(torch.float64)
    step(eager_exact(divergence), exact)
    losses: dict[str, Call] = {
        "fastkd": fastkd_linear(LOSSES[divergence].divergence),
        "eager": eager_linear(LOSSES[divergence].formula),
    }
    if dtype != torch.float32:
        losses["fastkd, logits in bfloat16"] = fastkd_linear(
            LOSSES[divergence].divergence, logits_dtype=dtype
        )
    for name, make in (("TRL", trl_chunked), ("Liger", lambda d: liger_chunked(d, compiled=False))):
        try:
            losses[name] = make(divergence)
        except ImportError:
            continue
    table = []
    for name, loss in losses.items():
        step(loss, few)
        cell = []
        for mine, true in ((few.student, exact.student), (few.weight, exact.weight)):
            assert mine.grad is not None and true.grad is not None
            gap = (mine.grad.double() - true.grad).norm() / true.grad.norm()
            cell.append(f"{gap:.1e}")
        table.append([divergence, str(dtype)[6:], name, *cell])
    return table


def eager_exact(divergence: str) -> Call:
    """In float64 throughout."""
    formula = LOSSES[divergence].formula
    return lambda s, w, t, u: formula(s @ w.T, t @ u.T).mean()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--divergences", nargs="+", choices=BETAS, default=["forward_kl", "jsd"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--budget", type=int, help="fastkd's memory_budget in the table of memory, bytes"
    )
    parser.add_argument("--skip", nargs="+", choices=("time", "memory", "error"), default=[])
    parser.add_argument("--memory-case", type=json.loads, help=argparse.SUPPRESS)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.memory_case:
        print(measure_memory(*arguments.memory_case))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
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
                row, found = time_case(name, divergence, arguments.rounds)
                times.rows.append(row)
                measurements += found
            if "memory" not in arguments.skip:
                row, found = memory_row(name, divergence, arguments.budget)
                memory.rows.append(row)
                measurements += found
        if "error" not in arguments.skip:
            for dtype in (torch.float32, torch.bfloat16):
                progress("error", divergence, str(dtype))
                error.rows += errors(divergence, dtype)
    emit(arguments, [table for table in (times, memory, error) if table.rows], measurements)


if __name__ == "__main__":
    main()
