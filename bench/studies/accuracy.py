"""Error of loss and gradient against float64: fastkd, plain PyTorch in float32, and in bfloat16.

    python bench/studies/accuracy.py
    python bench/studies/accuracy.py --worst [--backend cpu] [--widest 50000]

With --worst it prints one table: on peaked, close and real rows, the worst ratio of fastkd's error to that of float32
PyTorch, a divergence a line, for the value and both gradients. tests/support/sure_rows.py says what is measured, and
how.

The truth is the plain composition in float64, on the logits as they are (bfloat16 logits are exact
numbers too). An error is taken a row: of the loss, relative to it; of the gradient, the largest of the
row relative to the row's largest entry. Reported are the median and the largest over rows and seeds.

The gradient of bfloat16 logits is bfloat16 for every contender, so that its error is at least the
rounding of its entries, half of 2^-8 at most. What is asked of fastkd is the error of float32 PyTorch
that upcasts, and no more; the last column says whether that holds of the median and of the largest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import study  # noqa: F401 (bench/ is importable from here on)
import torch
from contenders import DTYPES, LOSSES, Loss, Rows, eager_rows, fastkd_loss, from_definition
from report import Table, add_arguments, emit, progress
from torch import Tensor

import fastkd

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from support import sure_rows

ROWS = 32


class Errors(NamedTuple):
    """A row each, [...]."""

    loss: Tensor
    gradient: Tensor


def normal(generator: torch.Generator, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Normal logits of standard deviation 3: (student, teacher)."""
    student, teacher = (3 * torch.randn(ROWS, vocabulary, generator=generator) for _ in range(2))
    return student, teacher


def peaked(generator: torch.Generator, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The same token has nearly all of the mass on both sides, as it often has in language models."""
    student, teacher = normal(generator, vocabulary)
    token = torch.randint(vocabulary, (ROWS, 1), generator=generator)
    return student.scatter(-1, token, 22.0), teacher.scatter(-1, token, 25.0)


LOGITS = {"normal": normal, "peaked": peaked}


def run(rows: Rows, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row and its gradient, in float64."""
    leaf = student.detach().clone().requires_grad_()
    loss = rows(leaf, teacher)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach().double(), leaf.grad.double()


def errors(rows: Rows, student: Tensor, teacher: Tensor, truth: tuple[Tensor, Tensor]) -> Errors:
    """Of one contender."""
    loss, gradient = run(rows, student, teacher)
    exact_loss, exact_gradient = truth
    largest = exact_gradient.abs().amax(-1)
    return Errors(
        (loss - exact_loss).abs() / exact_loss.abs(),
        (gradient - exact_gradient).abs().amax(-1) / largest,
    )


def survey(
    loss: Loss, logits: str, dtype: torch.dtype, seeds: int, vocabulary: int
) -> dict[str, Errors]:
    """The errors of every contender, over all seeds."""
    contenders: dict[str, Rows] = {
        "fastkd": fastkd_loss(loss, reduction="none"),
        "float32": eager_rows(loss, torch.float32),
    }
    if dtype == torch.bfloat16:
        contenders["bfloat16"] = eager_rows(loss, torch.bfloat16)
    found: dict[str, list[Errors]] = {name: [] for name in contenders}
    for seed in range(seeds):
        made = LOGITS[logits](torch.Generator().manual_seed(seed), vocabulary)
        student, teacher = (x.to(dtype) for x in made)
        truth = run(eager_rows(loss, torch.float64), student.double(), teacher.double())
        for name, rows in contenders.items():
            found[name].append(errors(rows, student, teacher, truth))
    return {
        name: Errors(*(torch.cat(parts) for parts in zip(*each, strict=True)))
        for name, each in found.items()
    }


def extremes(values: Tensor) -> tuple[float, float]:
    """Median and largest."""
    return float(values.median()), float(values.max())


def worst(divergence: fastkd.Divergence, name: str, backend: str, cases: list[Any]) -> list[str]:
    """A line of the table of ratios."""
    found: dict[str, tuple[float, str]] = {}
    for case in cases:
        exact, plain = (
            sure_rows.plain(case, dtype, divergence=name)
            for dtype in (torch.float64, torch.float32)
        )
        ours = sure_rows.run(
            lambda s, t: fastkd.kd_loss(
                s, t, divergence=divergence, reduction="none", backend=backend
            ),
            case,
        )
        for what, ratio in sure_rows.ratios(ours, plain, exact)._asdict().items():
            found[what] = max(found.get(what, (0.0, "")), (ratio, case.name))
    return [name, *(f"{ratio:.2f}x ({case})" for ratio, case in found.values())]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--divergences", nargs="+", choices=fastkd.DIVERGENCES, default=list(fastkd.DIVERGENCES)
    )
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--seeds", type=int, default=5, help=f"of {ROWS} rows each")
    parser.add_argument("--worst", action="store_true", help="ratios on peaked and real rows")
    parser.add_argument("--backend", default="cpu", help="of --worst")
    parser.add_argument(
        "--widest", type=int, default=50_000, help="columns of --worst's peaked rows"
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.worst:
        title = f"{arguments.backend}: worst ratio of fastkd's error to that of float32 PyTorch"
        table = Table(title, ["divergence", "value", "student's gradient", "teacher's gradient"])
        cases = [*sure_rows.made_up((32, 1000, arguments.widest)), *sure_rows.all_real()]
        for name in arguments.divergences:
            progress(name)
            table.rows.append(worst(fastkd.DIVERGENCES[name](), name, arguments.backend, cases))
        emit(arguments, [table], [])
        return

    contenders = ("fastkd", "float32", "bfloat16")
    columns = [
        "divergence",
        "logits",
        "dtype",
        *contenders,
        "fastkd / float32",
        "fastkd <= float32",
    ]
    titles = {
        "loss": "Relative error of a row's loss: median, largest",
        "gradient": "Largest error of a row's gradient, relative to its largest entry: median, largest",
    }
    tables = {what: Table(title, columns) for what, title in titles.items()}
    measurements: list[dict[str, Any]] = []
    for name in arguments.divergences:
        loss = LOSSES.get(name) or from_definition(fastkd.DIVERGENCES[name]())
        for logits in LOGITS:
            for dtype in arguments.dtypes:
                progress(loss.label, logits, dtype)
                found = survey(loss, logits, DTYPES[dtype], arguments.seeds, arguments.vocabulary)
                for what, table in tables.items():
                    both = {key: extremes(getattr(of, what)) for key, of in found.items()}
                    ratios = [a / b for a, b in zip(both["fastkd"], both["float32"], strict=True)]
                    table.rows.append(
                        [
                            loss.label,
                            logits,
                            dtype,
                            *(
                                "{:.1e}, {:.1e}".format(*both[key]) if key in both else "-"
                                for key in contenders
                            ),
                            "{:.2f}x, {:.2f}x".format(*ratios),
                            "yes" if max(ratios) <= 1 else "no",
                        ]
                    )
                    measurements.append(
                        {"of": what, "divergence": loss.label, "logits": logits, "dtype": dtype}
                        | {key: {"median": m, "largest": x} for key, (m, x) in both.items()}
                    )
    emit(arguments, list(tables.values()), measurements)


if __name__ == "__main__":
    main()
