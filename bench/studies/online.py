"""Deep mutual learning of M students on the CPU: forward and gradients of all students, beside pairwise PyTorch.

    python bench/studies/online.py

The baselines are M (M - 1) calls of torch.nn.functional.kl_div in float32 with detached peers. `a model` computes the
log-softmax of each student once and uses it in every pair. `a call` computes both anew for every pair, as published
code does. Contenders take turns within a round; a time is the median over the rounds, and a ratio the median of the
ratios within rounds. Memory is the peak of a step beyond the logits, gradients included, in tensors of one student's
logits, measured in a process of its own as in memory.py. Errors are against float64 on fewer rows: the largest of any
loss per row, and of any gradient. Most of a bfloat16 gradient's error is its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import study
import torch
from cases import DTYPES, TIMED, random_logits
from measure import Contender, in_a_process, interleave, milliseconds, peak_extra, ratio
from study import emit, progress
from tables import Table
from torch import Tensor
from torch.nn.functional import kl_div

from fastkd.online import mutual_loss

Losses = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # M students [N, V] to M losses [N]
CASES = ((4, 128, 32_768), (8, 64, 32_768), (4, 64, 131_072))
ROWS_OF_ERRORS = 4
COLUMNS = (
    "M x N x V", "logits", "", "ms", "of fastkd's", "memory", "error of a loss", "of a gradient",
)  # fmt: skip


def pairwise(
    students: Sequence[Tensor], dtype: torch.dtype = torch.float32, once: bool = True
) -> list[Tensor]:
    """The mean KL of each student to its peers. once: compute each log-softmax once instead of for every pair."""

    def of_call(i: int) -> Tensor:
        return students[i].to(dtype).log_softmax(-1)

    logs = [of_call(i) for i in range(len(students))] if once else []
    log = logs.__getitem__ if once else of_call

    def loss(i: int, j: int) -> Tensor:
        return kl_div(log(i), log(j).detach(), reduction="none", log_target=True).sum(-1)

    every = range(len(students))
    return [torch.stack([loss(i, j) for j in every if j != i]).mean(0) for i in every]


CONTENDERS: dict[str, Losses] = {
    "fastkd": lambda students: mutual_loss(students, reduction="none", backend="cpu"),
    "kl_div, log_softmax a model": pairwise,
    "kl_div, log_softmax a call": lambda students: pairwise(students, once=False),
}


def make(count: int, rows: int, columns: int, dtype: str) -> list[Tensor]:
    """The logits of each student."""
    logits = random_logits(rows, columns, dtype=DTYPES[dtype], count=count)
    return [student.requires_grad_() for student in logits]


def contender(losses: Losses, students: Sequence[Tensor]) -> Contender:
    """Forward and backward of all students."""

    def step() -> None:
        torch.stack([loss.mean() for loss in losses(students)]).sum().backward()

    def drop_gradients() -> None:
        for student in students:
            student.grad = None

    return Contender(step, drop_gradients)


def errors(losses: Losses, count: int, columns: int, dtype: str) -> tuple[float, float]:
    """The largest absolute error of a loss and of a gradient, against float64."""
    students = make(count, ROWS_OF_ERRORS, columns, dtype)
    exact = [student.detach().double().requires_grad_() for student in students]
    rows, exact_rows = losses(students), pairwise(exact, torch.float64)
    gradients, exact_gradients = (
        torch.autograd.grad(torch.stack(list(each)).sum(), leaves)
        for each, leaves in ((rows, students), (exact_rows, exact))
    )

    def largest(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
        return max(float((a - b).detach().abs().max()) for a, b in zip(results, truth, strict=True))

    return largest(rows, exact_rows), largest(gradients, exact_gradients)


def measure(case: dict[str, Any]) -> float:
    """The peak of a step beyond the logits, in tensors of one student's logits."""
    students = make(*case["shape"], case["dtype"])
    step, drop_gradients = contender(CONTENDERS[case["contender"]], students)
    step()
    drop_gradients()
    return peak_extra(step) / students[0].nbytes


def main() -> None:
    """The command line."""
    parser = study.command_line(__doc__, rounds=7, dtypes=TIMED)
    parser.add_argument("--cases", nargs="+", type=study.shape_of, default=CASES, metavar="MxNxV")
    arguments = study.parsed(parser)
    table = Table("Mutual learning, forward and gradients of all students", COLUMNS)
    measurements: list[dict[str, Any]] = []
    for shape in arguments.cases:
        for dtype in arguments.dtypes:
            label = "{} x {} x {:,}".format(*shape)
            progress(label, dtype)
            students = make(*shape, dtype)
            steps = {name: contender(losses, students) for name, losses in CONTENDERS.items()}
            seconds = interleave(steps, arguments.rounds)
            del students, steps
            for name, losses in CONTENDERS.items():
                case = {"shape": shape, "dtype": dtype, "contender": name}
                memory = in_a_process(measure, case, arguments.threads)
                off = errors(losses, shape[0], shape[2], dtype)
                times = ratio(seconds, name, "fastkd")
                table.rows.append(
                    [label, dtype, name, milliseconds(seconds[name]), f"{times:.1f}x", f"{memory:.1f}",
                     f"{off[0]:.1e}", f"{off[1]:.1e}"]
                )  # fmt: skip
                measurements.append(
                    case | {"seconds": seconds[name], "ratio": times, "peak": memory, "errors": off}
                )
    emit(arguments, [table], measurements)


if __name__ == "__main__":
    main()
