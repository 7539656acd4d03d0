"""Deep mutual learning of M students on the CPU: forward and gradient of every student, beside PyTorch pair by pair.

    python bench/studies/online.py

The baselines are M (M - 1) calls of torch.nn.functional.kl_div, with peers detached and in float32: `a model` takes a
log-softmax of each student once and uses it in every pair, `a call` takes both anew for every pair, as the loops of
published code do. Contenders run in turn within a round; a time is the median over the rounds, a ratio the median of
those within them. Memory is the peak of a step beyond the logits, gradients included, in tensors of one student's
logits; each is measured in a process of its own (memory.py says how). Errors are the largest of any student, of
losses a row and of gradients, against float64, on fewer rows; of a bfloat16 gradient, most is its rounding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import study  # noqa: F401 (bench/ is importable from here on)
import torch
import torch.nn.functional as F
from contenders import DTYPES
from measure import Contender, interleave, milliseconds, peak_extra, ratio
from report import Table, add_arguments, emit, progress
from torch import Tensor

from fastkd.online import mutual_loss

Losses = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # M students [N, V] to M losses [N]
CASES = ((4, 128, 32_768), (8, 64, 32_768), (4, 64, 131_072))
ROWS_OF_ERRORS = 4


def _log_softmax(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.to(dtype).log_softmax(-1)


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p.detach(), reduction="none", log_target=True).sum(-1)


def once_a_model(students: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    logs = [_log_softmax(student, dtype) for student in students]
    pairs = len(students) - 1
    return [
        sum(_kl(own, other) for other in logs if other is not own) / pairs  # type: ignore[misc]
        for own in logs
    ]


def once_a_call(students: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    pairs = len(students) - 1
    return [
        sum(  # type: ignore[misc]
            _kl(_log_softmax(own, dtype), _log_softmax(other.detach(), dtype))
            for other in students
            if other is not own
        )
        / pairs
        for own in students
    ]


def of_fastkd(students: Sequence[Tensor]) -> Sequence[Tensor]:
    return mutual_loss(students, reduction="none", backend="cpu")


CONTENDERS: dict[str, Losses] = {
    "fastkd": of_fastkd,
    "kl_div, log_softmax a model": once_a_model,
    "kl_div, log_softmax a call": once_a_call,
}


def make(count: int, rows: int, columns: int, dtype: str) -> list[Tensor]:
    """Normal logits of standard deviation 3."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(rows, columns, generator=generator) for _ in range(count))
    return [student.mul_(3).to(DTYPES[dtype]).requires_grad_() for student in made]


def step(losses: Losses, students: Sequence[Tensor]) -> None:
    """Forward and backward of all students."""
    total = sum(loss.mean() for loss in losses(students))
    assert isinstance(total, Tensor)
    total.backward()


def drop(students: Sequence[Tensor]) -> None:
    """What an optimizer does after a step."""
    for student in students:
        student.grad = None


def times_of(students: Sequence[Tensor], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step, by contender and round."""

    def contender(losses: Losses) -> Contender:
        return Contender(lambda: step(losses, students), lambda: drop(students))

    return interleave({name: contender(losses) for name, losses in CONTENDERS.items()}, rounds)


def errors(losses: Losses, count: int, columns: int, dtype: str) -> tuple[float, float]:
    """(of a loss, of a gradient), against float64."""
    students = make(count, ROWS_OF_ERRORS, columns, dtype)
    exact = [student.detach().double().requires_grad_() for student in students]
    results = []
    for given, made in ((students, losses(students)), (exact, once_a_model(exact, torch.float64))):
        total = sum(loss.sum() for loss in made)
        results.append(([loss.detach() for loss in made], torch.autograd.grad(total, given)))

    def largest(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(found, truth, strict=True))

    return largest(results[0][0], results[1][0]), largest(results[0][1], results[1][1])


def measure(case: dict[str, Any]) -> float:
    """In a process of its own: the peak of a step beyond the logits, in tensors of one student's."""
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    students = make(*case["shape"], case["dtype"])
    losses = CONTENDERS[case["contender"]]
    step(losses, students)
    drop(students)
    return peak_extra(lambda: step(losses, students)) / (
        students[0].numel() * students[0].element_size()
    )


def peak(case: dict[str, Any]) -> float:
    """What :func:`measure` gives for a case."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def case_of(text: str) -> tuple[int, int, int]:
    """A command-line case, such as 4x128x32768."""
    students, rows, columns = map(int, text.split("x"))
    return students, rows, columns


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", type=case_of, default=CASES, metavar="MxNxV")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case)))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    table = Table(
        "Mutual learning, forward and gradients of all students",
        [
            "M x N x V",
            "logits",
            "",
            "ms",
            "of fastkd's",
            "memory",
            "error of a loss",
            "of a gradient",
        ],
    )
    measurements: list[dict[str, Any]] = []
    for shape in arguments.cases:
        for dtype in arguments.dtypes:
            label = "{} x {} x {:,}".format(*shape)
            progress(label, dtype)
            seconds = times_of(make(*shape, dtype), arguments.rounds)
            for name, losses in CONTENDERS.items():
                case = {
                    "shape": shape,
                    "dtype": dtype,
                    "contender": name,
                    "threads": arguments.threads,
                }
                memory, off = peak(case), errors(losses, shape[0], shape[2], dtype)
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
