"""The effects of temperature, alpha and overconfident teachers, on Fashion-MNIST.

    python examples/sweeps.py

Students with 64 hidden units learn from 1,000 images: from their labels with weight 1 - alpha, and from the teacher at
temperature T with weight alpha. The first part is a grid over T and alpha. The second part uses teachers some of which
are overconfident, with and without calibration (fastkd.calibration). A calibrated teacher's logits are divided by T
times the temperature fitted on held-out data, the student's by T.

Teachers, calibration and students use disjoint images.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from vision import (
    FASHION,
    Data,
    Output,
    Quick,
    Split,
    accuracy,
    convolutional,
    difference,
    fashion_mnist,
    fit,
    fit_to_labels,
    outputs,
    panels,
    points,
    report,
    spread,
    two_layers,
)

import fastkd
from fastkd.calibration import expected_calibration_error, fit_temperature

IMAGES = 1000
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0)
ALPHAS = (0.1, 0.4, 0.7, 1.0)
FITTED = ", fitted T"
SOFT, ALPHA = 1.0, 0.9  # T and alpha of the second part; overconfidence matters most at T = 1


class Parts(NamedTuple):
    """Disjoint parts of the training images, each (images, labels)."""

    students: tuple[Tensor, Tensor]
    calibration: tuple[Tensor, Tensor]
    teachers: tuple[Tensor, Tensor]


class Scores(NamedTuple):
    """Results of a student on the test images."""

    accuracy: float  # %
    agreement: float  # %, with the teacher's most probable class
    likelihood: float  # negative log-likelihood, nats per image
    calibration: float  # expected calibration error, %


def divide(data: Split) -> Parts:
    """Split the images: one twelfth for students, one twelfth for calibration, the rest for teachers."""
    share = len(data.labels) // 12
    cut = [slice(0, share), slice(share, 2 * share), slice(2 * share, None)]
    return Parts(*((data.images[part], data.labels[part]) for part in cut))


def train_student(
    data: Split,
    examples: tuple[Tensor, Tensor, Tensor],
    of_teacher: Tensor,
    seed: int,
    steps: int,
    **options: float,
) -> Scores:
    """Train and score a student.

    Args:
        data: the test images and labels.
        examples: (images, teacher's logits, labels) to train on.
        of_teacher: the teacher's logits on the test images.
        seed: of the choice of examples and the initial weights.
        steps: the number of training steps.
        **options: of fastkd.kd_loss.
    """
    chosen = torch.randperm(len(examples[0]), generator=torch.Generator().manual_seed(seed))[
        :IMAGES
    ]
    torch.manual_seed(seed)
    student = two_layers(784, 64)

    def loss(x: Tensor, target: Tensor, label: Tensor) -> Tensor:
        return fastkd.kd_loss(student(x), target, label, **options)

    fit(student, loss, [each[chosen] for each in examples], steps=steps, seed=seed)
    logits = outputs(student, data.test_images)
    return Scores(
        accuracy(logits, data.test_labels),
        accuracy(logits, of_teacher.argmax(-1)),
        F.cross_entropy(logits, data.test_labels).item(),
        100 * expected_calibration_error(logits, data.test_labels),
    )


class TeacherLogits(NamedTuple):
    """A teacher's logits on the images of the students, of calibration and of the test."""

    students: Tensor
    calibration: Tensor
    test: Tensor


def teachers(parts: Parts, test_images: Tensor, quick: bool) -> dict[str, TeacherLogits]:
    """Train the teachers and return their logits by name."""
    torch.manual_seed(0)
    good = convolutional((16, 32), 128, size=28)
    fit_to_labels(good, *parts.teachers, steps=5 if quick else 300, seed=0)
    # A wide network trained for many epochs on few images becomes overconfident.
    torch.manual_seed(0)
    overtrained = two_layers(784, 256)
    few = tuple(each[:2000] for each in parts.teachers)
    fit_to_labels(overtrained, *few, steps=5 if quick else 800, seed=0)

    def logits_of(teacher: nn.Module) -> TeacherLogits:
        images = (parts.students[0], parts.calibration[0], test_images)
        return TeacherLogits(*(outputs(teacher, x) for x in images))

    as_trained = logits_of(good)
    return {
        "as trained": as_trained,
        "logits x 3": TeacherLogits(*(3.0 * logits for logits in as_trained)),
        "overtrained": logits_of(overtrained),
    }


def column(results: list[Scores], field: str) -> list[float]:
    """Return one field of the results of all seeds."""
    return [getattr(result, field) for result in results]


def grid_table(grid: dict[tuple[float, float], list[Scores]], field: str, title: str) -> Table:
    """Return a table with one row per alpha and one column per T."""
    table = Table("alpha", *(f"T = {t:g}" for t in TEMPERATURES), title=title)
    for alpha in ALPHAS:
        table.add_row(f"{alpha:g}", *(spread(column(grid[t, alpha], field)) for t in TEMPERATURES))
    return table


def teachers_table(
    rows: dict[str, list[Scores]], confidence: dict[str, tuple[float, float, float]]
) -> Table:
    """Return a table with two rows per teacher, without and with calibration."""
    table = Table(title=f"teachers and their students at T = {SOFT:g}, alpha = {ALPHA:g}")
    table.add_column("teacher", no_wrap=True)
    for heading in ("T", "accuracy, %", "ECE, %", "student's", "NLL", "ECE, %"):
        table.add_column(heading)
    for name, results in rows.items():
        score, temperature, error = confidence[name]
        student = [
            spread(column(results, field), digits)
            for field, digits in (("accuracy", 1), ("likelihood", 3), ("calibration", 1))
        ]
        table.add_row(name, f"{temperature:.2f}", f"{score:.1f}", f"{error:.1f}", *student)
    return table


def compared(rows: dict[str, list[Scores]], name: str, base: str) -> str:
    """Describe the differences between the students of two teachers."""
    accuracies, likelihoods = (
        difference(column(rows[name], field), column(rows[base], field))
        for field in ("accuracy", "likelihood")
    )
    notes = ["" if gap.clear else " (not significant)" for gap in (accuracies, likelihoods)]
    return (
        f"{name}, compared with {base}: accuracy {accuracies}{notes[0]}, NLL {likelihoods.mean:+.3f} ± "
        f"{likelihoods.error:.3f}{notes[1]}."
    )


def claims(
    grid: dict[tuple[float, float], list[Scores]],
    alone: list[Scores],
    rows: dict[str, list[Scores]],
) -> str:
    """Summarize the tables."""
    total = {cell: sum(column(results, "accuracy")) for cell, results in grid.items()}
    base = column(alone, "accuracy")
    lines = [
        f"Mean ± standard deviation over {len(base)} seeds, which determine the images and the initial weights; "
        f"differences with their standard error. Labels alone: {spread(base)} %."
    ]
    for word, choose in (("Best", max), ("Worst", min)):
        t, alpha = cell = choose(total, key=total.__getitem__)
        gap = difference(column(grid[cell], "accuracy"), base)
        lines.append(
            f"{word} of the grid: T = {t:g}, alpha = {alpha:g}, {gap} compared with labels alone."
        )
    lines += [
        "The best cell was chosen on the test images, so its accuracy is slightly optimistic.",
        "The effects of overconfidence and of calibration on the student:",
        compared(rows, "logits x 3", "as trained"),
        *(
            compared(rows, name, name.removesuffix(FITTED))
            for name in rows
            if name.endswith(FITTED)
        ),
    ]
    return "\n".join(lines)


def plot(
    path: Path,
    grid: dict[tuple[float, float], list[Scores]],
    alone: list[Scores],
    rows: dict[str, list[Scores]],
) -> None:
    """Plot the grid's accuracy and agreement, and the students' likelihood by teacher, to a PNG file."""

    def mean(results: list[Scores], field: str) -> float:
        return sum(column(results, field)) / len(results)

    figure, (left, middle, right) = panels(4.5, 4.5, 6.0)
    for axes, field, title in (
        (left, "accuracy", "accuracy, %"),
        (middle, "agreement", "agreement with the teacher, %"),
    ):
        for index, alpha in enumerate(ALPHAS):
            line = [mean(grid[t, alpha], field) for t in TEMPERATURES]
            shade = str(0.75 - 0.75 * index / (len(ALPHAS) - 1))
            axes.plot(TEMPERATURES, line, "o-", color=shade, label=f"alpha {alpha:g}")
        axes.axhline(mean(alone, field), color="#d98c3f", linestyle="--", label="labels alone")
        axes.set_xscale("log", base=2)
        axes.set(title=title, xlabel="temperature")
    left.legend(fontsize=8)
    likelihoods = {name: column(results, "likelihood") for name, results in rows.items()}
    points(right, likelihoods, "student's NLL, by teacher")
    figure.savefig(path, dpi=150)


def main(
    data: Data = FASHION, output: Output = Path("build/examples"), quick: Quick = False
) -> None:
    """Run a grid over T and alpha, and compare teachers of different confidence."""
    images = fashion_mnist(data)
    parts = divide(images)
    seeds, steps = range(1 if quick else 4), 4 if quick else 200
    teacher_logits = teachers(parts, images.test_images, quick)
    count = len(TEMPERATURES) * len(ALPHAS) + 1 + 2 * len(teacher_logits)

    with Progress() as progress:
        task = progress.add_task("sweeps, students", total=count * len(seeds))

        def students(logits: TeacherLogits, **options: float) -> list[Scores]:
            results = []
            for seed in seeds:
                examples = (parts.students[0], logits.students, parts.students[1])
                scores = train_student(images, examples, logits.test, seed, steps, **options)
                results.append(scores)
                progress.advance(task)
            return results

        as_trained = teacher_logits["as trained"]
        alone = students(as_trained, alpha=0.0)
        grid = {
            (t, alpha): students(as_trained, temperature=t, alpha=alpha)
            for t in TEMPERATURES
            for alpha in ALPHAS
        }

        rows, confidence = {}, {}
        for name, logits in teacher_logits.items():
            fitted = fit_temperature(logits.calibration, parts.calibration[1])
            score = accuracy(logits.test, images.test_labels)
            for row, temperature in ((name, 1.0), (name + FITTED, fitted)):
                error = expected_calibration_error(
                    logits.test, images.test_labels, temperature=temperature
                )
                confidence[row] = score, temperature, 100 * error
                rows[row] = students(
                    logits, temperature=SOFT, teacher_temperature=temperature * SOFT, alpha=ALPHA
                )

    tables = [
        grid_table(grid, "accuracy", "student's accuracy, %"),
        grid_table(grid, "agreement", "agreement with the teacher, %"),
        teachers_table(rows, confidence),
    ]
    output.mkdir(parents=True, exist_ok=True)
    plot(output / "sweeps.png", grid, alone, rows)
    figures = {
        "grid": {f"T {t:g}, alpha {alpha:g}": cell for (t, alpha), cell in grid.items()},
        "labels alone": alone,
        "teachers": confidence,
        "students": rows,
    }
    report(output, "sweeps", tables, claims(grid, alone, rows), figures, quick=quick)


if __name__ == "__main__":
    typer.run(main)
