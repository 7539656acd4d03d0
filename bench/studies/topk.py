"""The cost of a sparse teacher beside a dense one: forward and gradient of forward KL, in the same rounds.

    python bench/studies/topk.py

A dense teacher's loss moves three tensors of logits. Reading the student's logits and writing their gradient is two of
them. `copy` is torch's own copy of as many bytes from one tensor to another. Computing the log-probabilities is not
part of the times.
"""

from __future__ import annotations

from typing import Any

import study
import torch
from cases import DTYPES, TIMED, random_logits
from measure import Contender, interleave, ratio
from study import cells, emit, progress
from tables import Table

import fastkd
from fastkd.teachers import TAILS

COLUMNS = ["dense", *TAILS, "copy"]


def contenders(shape: tuple[int, int], k: int, dtype: torch.dtype) -> dict[str, Contender]:
    """A step with each teacher, and the copy."""
    student, logits = random_logits(*shape, dtype=dtype)
    source, target = student.detach(), student.clone()
    student.requires_grad_()
    teachers = {"dense": logits}
    teachers |= {tail: fastkd.TopK.from_logits(logits, k, tail=tail) for tail in TAILS}

    def step(teacher: Any) -> None:
        student.grad = None
        fastkd.kd_loss(student, teacher, backend="cpu").backward()

    steps = {key: Contender(lambda teacher=each: step(teacher)) for key, each in teachers.items()}
    return steps | {"copy": Contender(lambda: target.copy_(source))}


def main() -> None:
    """The command line."""
    parser = study.command_line(__doc__, rounds=21, dtypes=TIMED)
    parser.add_argument("--shape", type=study.shape_of, default=(256, 131_072), metavar="NxV")
    parser.add_argument("--k", type=int, default=64)
    arguments = study.parsed(parser)
    title = f"Forward and gradient, K = {arguments.k}, ms (times the dense loss)"
    table = Table(title, ["logits", *COLUMNS])
    measurements: list[dict[str, Any]] = []
    for name in arguments.dtypes:
        progress(name)
        competing = contenders(arguments.shape, arguments.k, DTYPES[name])
        seconds = interleave(competing, arguments.rounds)
        table.rows.append([name, *cells(seconds, COLUMNS, to="dense", digits=2)])
        measurements += [
            {"what": "topk", "dtype": name, "teacher": key, "ratio_to_dense": ratio(seconds, key, "dense")}
            for key in COLUMNS
        ]  # fmt: skip
    emit(arguments, [table], measurements)


if __name__ == "__main__":
    main()
