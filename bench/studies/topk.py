"""What a sparse teacher costs beside a dense one: forward and gradient of forward KL, in the same rounds.

    python bench/studies/topk.py

Reading the student's logits and writing their gradient is two thirds of the bytes that a dense teacher moves. `copy` is
torch's own copy of as many bytes, from one tensor to another. Taking the log-probabilities is not in the times.
"""

from __future__ import annotations

import argparse
from typing import Any

import study  # noqa: F401 (bench/ is importable from here on)
import torch
from contenders import DTYPES, random_logits, shape_of
from measure import Contender, interleave, milliseconds, nothing, ratio
from report import Table, add_arguments, emit, progress
from torch import Tensor

import fastkd
from fastkd.teachers import TAILS


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=shape_of, default=(256, 131_072), metavar="NxV")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=21)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    columns = ["dense", *TAILS, "copy"]
    table = Table(
        f"Forward and gradient, K = {arguments.k}, ms (times the dense loss)", ["logits", *columns]
    )
    measurements: list[dict[str, Any]] = []
    for name in arguments.dtypes:
        progress(name)
        student, logits = random_logits(*arguments.shape, dtype=DTYPES[name])
        student.requires_grad_()
        target = student.detach().clone()
        teachers: dict[str, Tensor | fastkd.TopK] = {"dense": logits}
        for tail in TAILS:
            teachers[tail] = fastkd.TopK.from_logits(logits, arguments.k, tail=tail)

        def step(teacher: Tensor | fastkd.TopK, student: Tensor = student) -> None:
            student.grad = None
            fastkd.kd_loss(student, teacher, backend="cpu").backward()

        competing = {
            key: Contender(lambda teacher=teacher: step(teacher), nothing)
            for key, teacher in teachers.items()
        }
        source = student.detach()
        competing["copy"] = Contender(lambda a=target, b=source: a.copy_(b), nothing)
        seconds = interleave(competing, arguments.rounds)
        cells = [
            f"{milliseconds(seconds[key])} ({ratio(seconds, key, 'dense'):.2f}x)" for key in columns
        ]
        table.rows.append([name, *cells])
        measurements += [
            {
                "what": "topk",
                "dtype": name,
                "teacher": key,
                "ratio_to_dense": ratio(seconds, key, "dense"),
            }
            for key in columns
        ]
    emit(arguments, [table], measurements)


if __name__ == "__main__":
    main()
