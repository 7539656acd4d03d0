"""Log-probabilities and entropies from hidden states and an lm_head: time, memory and error beside TRL and Liger.

    python bench/studies/logprobs.py

A step computes the log-probability of a target and the entropy of each row, and the gradients of hidden states and
weight for random upstream gradients. `eager` computes all logits, then log_softmax, gather and the entropy. `four
GEMMs` are the products alone, into memory that exists already: the logits in both passes, and the two gradients; TRL,
Liger and fastkd compute all four, eager only three.

- Times: contenders take turns in random order, and ratios are medians of the ratios within rounds.
- Memory: the peak beyond inputs and gradients, in a process for each contender as in memory.py.
- Error: of the outputs and the gradients against float64 on the same rounded operands, relative by norm, on few rows.

TRL and Liger take part if they are installed (`pip install 'fastkd[peers]'`).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import study
import torch
from cases import DTYPES
from measure import MIB, Contender, in_a_process, interleave, peak_extra, ratio
from study import cells, emit, progress
from tables import Table
from torch import Tensor

from fastkd import fused_linear_logprobs
from fastkd.engine.matmul import add_weight_gradient, as_operand, hidden_gradient, make_logits

CONTENDERS = ("fastkd", "eager", "TRL", "Liger")
COLUMNS = ("four GEMMs", *CONTENDERS)
# Of TRL's trainers.
TRL_COLUMNS = 32_768
# (hidden, weight, targets) -> (log-probabilities of the targets, entropies)
Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def fastkd(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    outputs = fused_linear_logprobs(hidden, weight, targets)
    assert outputs.target is not None and outputs.entropy is not None
    return outputs.target, outputs.entropy


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T
    log_q = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    target = log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return target, -(log_q.exp() * log_q).sum(-1)


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    target, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, TRL_COLUMNS, None, 1.0, ("entropy",)
    )
    return target, entropy


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    loss, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, targets, 1.0, -100, 1, True
    )
    return -loss, entropy


FUNCTIONS: dict[str, Function] = {"fastkd": fastkd, "eager": eager, "TRL": trl, "Liger": liger}


class Step:
    """A step of one contender after the other on the same tensors."""

    def __init__(self, rows: int, columns: int, width: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def made(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden = made(rows, width).to(dtype).requires_grad_()
        self.weight = (made(columns, width) / width**0.5).to(dtype).requires_grad_()
        self.targets = torch.randint(columns, (rows,), generator=generator)
        self.upstream = [made(rows), made(rows)]

    def run(self, function: Function) -> None:
        outputs = function(self.hidden, self.weight, self.targets)
        torch.autograd.backward(outputs, [x.to(outputs[0].dtype) for x in self.upstream])

    def clean_up(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def results(self, function: Function) -> list[Tensor]:
        """The outputs and gradients."""
        outputs = function(self.hidden, self.weight, self.targets)
        upstream = [x.to(outputs[0].dtype) for x in self.upstream]
        return [*outputs, *torch.autograd.grad(outputs, [self.hidden, self.weight], upstream)]

    def products(self) -> Callable[[], None]:
        """The four matrix products, as fastkd computes them."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        logits = torch.ones(len(hidden), len(weight))
        of_hidden, of_weight = torch.ones_like(hidden), torch.ones(weight.shape)

        def run() -> None:
            for _ in range(2):
                make_logits(hidden, weight, None, logits)
            gradient = as_operand(logits, hidden, weight, None)
            hidden_gradient(gradient, weight, of_hidden)
            add_weight_gradient(gradient, hidden, of_weight, True)

        return run


def available(names: list[str]) -> dict[str, Function]:
    """The contenders of these names that can run."""
    small, found = Step(2, 9, 4, torch.float32), {}
    for name in names:
        try:
            small.run(FUNCTIONS[name])
            found[name] = FUNCTIONS[name]
        except ImportError as error:
            progress(name, str(error))
    return found


def memory_of(case: tuple[str, tuple[int, int, int], str]) -> int:
    """Peak bytes of a step beyond inputs and gradients."""
    name, shape, dtype = case
    step = Step(*shape, DTYPES[dtype])
    step.run(FUNCTIONS[name])
    step.clean_up()
    peak = peak_extra(lambda: step.run(FUNCTIONS[name]))
    return peak - sum(x.numel() * x.itemsize for x in (step.hidden, step.weight))


def errors(name: str, dtype: torch.dtype, rows: int = 64, columns: int = 8192) -> list[float]:
    """The relative errors of outputs and gradients against float64."""
    step = Step(rows, columns, 576, dtype)
    values = step.results(FUNCTIONS[name])
    step.hidden, step.weight = (
        x.detach().double().requires_grad_() for x in (step.hidden, step.weight)
    )
    rights = step.results(eager)
    return [
        float((value.double() - right).norm() / right.norm())
        for value, right in zip(values, rights, strict=True)
    ]


def main() -> None:
    """The command line."""
    parser = study.command_line(__doc__, rounds=7, dtypes=("float32", "bfloat16"))
    parser.add_argument("--shape", type=study.shape_of, default=(512, 49_152, 576), metavar="NxVxH")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--skip", nargs="+", choices=("time", "memory", "error"), default=[])
    arguments = study.parsed(parser)
    contenders = available(arguments.contenders)
    size = "N = {}, V = {:,}, H = {}".format(*arguments.shape)
    times = Table(f"Outputs and gradients, {size}, ms (times fastkd's)", ["operands", *COLUMNS])
    memory = Table(f"Peak beyond inputs and gradients, {size}, MiB", ["operands", *CONTENDERS])
    error = Table(
        "Error against float64, relative, by norm",
        ["operands", "", "log-probability", "entropy", "hidden states", "weight"],
    )
    measurements: list[dict[str, Any]] = []
    for name in arguments.dtypes:
        dtype = DTYPES[name]
        if "time" not in arguments.skip:
            progress("time", name)
            step = Step(*arguments.shape, dtype)
            competing = {
                key: Contender(partial(step.run, function), step.clean_up)
                for key, function in contenders.items()
            }
            competing["four GEMMs"] = Contender(step.products())
            seconds = interleave(competing, arguments.rounds)
            times.rows.append([name, *cells(seconds, COLUMNS)])
            measurements += [
                {"what": "time", "dtype": name, "contender": key, "ratio": ratio(seconds, key, "fastkd")}
                for key in seconds
            ]  # fmt: skip
        if "memory" not in arguments.skip:
            row = []
            for key in CONTENDERS:
                progress("memory", name, key)
                try:
                    case = (key, arguments.shape, name)
                    peak = in_a_process(memory_of, case, arguments.threads)
                except subprocess.CalledProcessError:  # it is not installed
                    row.append("-")
                    continue
                row.append(f"{peak / MIB:,.0f}")
                measurements.append(
                    {"what": "memory", "dtype": name, "contender": key, "bytes": peak}
                )
            memory.rows.append([name, *row])
        if "error" not in arguments.skip:
            error.rows += [
                [name, key, *(f"{x:.1e}" for x in errors(key, dtype))] for key in contenders
            ]
    emit(arguments, [times, memory, error], measurements)


if __name__ == "__main__":
    main()
