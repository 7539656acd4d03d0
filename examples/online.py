"""Distillation without a larger teacher on Fashion-MNIST: mutual learning and born-again networks.

    python examples/online.py

Three students of the same architecture learn from the same 1,000 labelled images, first separately, then as a cohort
that learns from the labels and from each other (deep mutual learning; Zhang, Xiang, Hospedales, Lu 2018). Then three
generations are trained, each taught by the previous one, the first by a student of the labels alone (born-again
networks; Furlanello et al. 2018). The separate students, the cohort and the generations are also compared as ensembles.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from vision import (
    FASHION,
    Data,
    Output,
    Quick,
    Split,
    accuracy,
    difference,
    fashion_mnist,
    fit,
    fit_to_labels,
    outputs,
    panels,
    parameters,
    points,
    report,
    spread,
    two_layers,
    verdicts,
)

import fastkd
from fastkd.online import born_again, mutual_loss

IMAGES = 1000
COHORT = 3
GENERATIONS = 3
HIDDEN = 64
ALONE = "each alone"


def cohort(seed: int) -> nn.ModuleList:
    """Return students with different initial weights, which depend on the seed only."""
    torch.manual_seed(seed)
    return nn.ModuleList(two_layers(784, HIDDEN) for _ in range(COHORT))


def train_together(students: nn.ModuleList, images: Tensor, labels: Tensor, **options: int) -> None:
    """Train by deep mutual learning: each student learns from the labels and from the other students."""

    def loss(x: Tensor, label: Tensor) -> Tensor:
        return sum(mutual_loss([student(x) for student in students], label))

    fit(students, loss, (images, labels), **options)


def train_generation(
    student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor, **options: int
) -> None:
    """Train one generation, half on the labels and half on the previous generation's outputs."""

    def loss(x: Tensor, label: Tensor, target: Tensor) -> Tensor:
        return fastkd.kd_loss(student(x), target, label, alpha=0.5)

    fit(student, loss, (images, labels, outputs(teacher, images)), **options)


def one_seed(data: Split, seed: int, steps: int, rows: dict[str, list[float]]) -> None:
    """Append the accuracy of each row."""

    def note(name: str, logits: Sequence[Tensor]) -> None:
        """Append the mean accuracy of several models."""
        scores = [accuracy(each, data.test_labels) for each in logits]
        rows.setdefault(name, []).append(sum(scores) / len(scores))

    def mean(logits: Sequence[Tensor]) -> list[Tensor]:
        """Return an ensemble's probabilities; accuracy depends only on their order, so they serve as logits."""
        return [torch.stack(list(logits)).softmax(-1).mean(0)]

    images, labels = data.draw(IMAGES, seed)
    options = {"steps": steps, "seed": seed}

    alone = cohort(seed)
    for student in alone:
        fit_to_labels(student, images, labels, **options)
    logits = [outputs(student, data.test_images) for student in alone]
    note(ALONE, logits)
    note("ensemble of those", mean(logits))

    together = cohort(seed)
    train_together(together, images, labels, **options)
    logits = [outputs(student, data.test_images) for student in together]
    note("each in the cohort", logits)
    note("ensemble of the cohort", mean(logits))

    fresh = iter(cohort(seed + 1000))
    generations = born_again(
        lambda: next(fresh),
        lambda student, teacher: train_generation(student, teacher, images, labels, **options),
        GENERATIONS,
        teacher=alone[0],
    )
    logits = [outputs(student, data.test_images) for student in generations]
    for number, one in enumerate(logits, 1):
        note(f"generation {number}", [one])
    note(f"ensemble of {GENERATIONS} generations", mean(logits))


def main(
    data: Data = FASHION, output: Output = Path("build/examples"), quick: Quick = False
) -> None:
    """Compare students trained separately, as a cohort, and as generations."""
    images = fashion_mnist(data)
    rows: dict[str, list[float]] = {}
    for seed in track(range(1 if quick else 5), "online, seeds"):
        one_seed(images, seed, 6 if quick else 400, rows)

    title = f"Fashion-MNIST: {IMAGES:,} labelled images, {len(images.test_labels):,} test images"
    table = Table("", "accuracy, %", "gain over each alone", title=title)
    for name, values in rows.items():
        table.add_row(name, spread(values), str(difference(values, rows[ALONE])))
    claim = (
        f"Mean ± standard deviation over {len(rows[ALONE])} seeds; differences with their standard error. A student "
        f"has {parameters(two_layers(784, HIDDEN)):,} parameters.\n"
        f"Compared with each alone: {verdicts(rows, ALONE)}."
    )
    claim += "\nCompared with the ensemble of separate students, which costs no more:"
    for name in ("ensemble of the cohort", f"ensemble of {GENERATIONS} generations"):
        claim += f" {name} {difference(rows[name], rows['ensemble of those'])},"
    claim = claim.rstrip(",") + " points."

    figure, (axes,) = panels(7.5)
    points(axes, rows, "Fashion-MNIST: accuracy, %")
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "online.png", dpi=150)
    report(output, "online", [table], claim, {"accuracy": rows}, quick=quick)


if __name__ == "__main__":
    typer.run(main)
