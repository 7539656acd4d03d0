"""What temperature and alpha do, and what a teacher that is too sure of itself does: Fashion-MNIST.

    python examples/sweeps.py

Students of 64 hidden units learn from 1,000 images, from their labels with the weight 1 - alpha and from the teacher
at temperature T with the weight alpha. First a grid over both. Then teachers of which some are too confident, taken
at their word and with the temperature that fits their confidence to data which no model was trained on
(fastkd.calibration): a teacher divides its logits by T times that, the student by T.

The teacher, its calibration and the students each have images of their own.
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
SOFT, ALPHA = 1.0, 0.9  # of the second part: at T = 1 confidence counts most


class Parts(NamedTuple):
    """Disjoint parts of the training images, each (images, labels)."""

    students: tuple[Tensor, Tensor]
    calibration: tuple[Tensor, Tensor]
    teachers: tuple[Tensor, Tensor]


class Scores(NamedTuple):
    """Of a student on the test images."""

    accuracy: float  # %
    agreement: float  # %, with the teacher's first choice
    likelihood: float  # negative and logarithmic, nats an image
    calibration: float  # expected calibration error, %


def divide(data: Split) -> Parts:
    """A twelfth of the images to students, a twelfth to calibration, the rest to teachers."""
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
    """A student of (images, teacher's logits, labels), with kd_loss's options; of_teacher: its logits when testing."""
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


class Said(NamedTuple):
    """A teacher's logits."""

    to_students: Tensor
    to_calibration: Tensor
    on_test: Tensor


def teachers(parts: Parts, test_images: Tensor, quick: bool) -> dict[str, Said]:
    """What each teacher says, by its name."""
    torch.manual_seed(0)
    good = convolutional((16, 32), 128, size=28)
    fit_to_labels(good, *parts.teachers, steps=5 if quick else 300, seed=0)
    # Few images, many times over, and a wide hidden layer: it ends sure of every one of them.
    torch.manual_seed(0)
    overtrained = two_layers(784, 256)
    few = tuple(each[:2000] for each in parts.teachers)
    fit_to_labels(overtrained, *few, steps=5 if quick else 800, seed=0)

    def ask(teacher: nn.Module) -> Said:
        images = (parts.students[0], parts.calibration[0], test_images)
        return Said(*(outputs(teacher, x) for x in images))

    said = ask(good)
    return {
        "as trained": said,
        "logits x 3": Said(*(3.0 * logits for logits in said)),
        "overtrained": ask(overtrained),
    }


def column(results: list[Scores], field: str) -> list[float]:
    """One figure of each seed."""
    return [getattr(result, field) for result in results]


def grid_table(grid: dict[tuple[float, float], list[Scores]], field: str, title: str) -> Table:
    """A row for each alpha, a column for each T."""
    table = Table("alpha", *(f"T = {t:g}" for t in TEMPERATURES), title=title)
    for alpha in ALPHAS:
        table.add_row(f"{alpha:g}", *(spread(column(grid[t, alpha], field)) for t in TEMPERATURES))
    return table


def teachers_table(
    rows: dict[str, list[Scores]], said: dict[str, tuple[float, float, float]]
) -> Table:
    """A row for each teacher, at its word and calibrated."""
    table = Table(title=f"teachers, and their student at T = {SOFT:g}, alpha = {ALPHA:g}")
    table.add_column("teacher", no_wrap=True)
    for heading in ("T", "accuracy, %", "ECE, %", "student's", "NLL", "ECE, %"):
        table.add_column(heading)
    for name, results in rows.items():
        score, temperature, error = said[name]
        student = [
            spread(column(results, field), digits)
            for field, digits in (("accuracy", 1), ("likelihood", 3), ("calibration", 1))
        ]
        table.add_row(name, f"{temperature:.2f}", f"{score:.1f}", f"{error:.1f}", *student)
    return table


def compared(rows: dict[str, list[Scores]], name: str, base: str) -> str:
    """What a teacher does for its student that another does not."""
    accuracies, likelihoods = (
        difference(column(rows[name], field), column(rows[base], field))
        for field in ("accuracy", "likelihood")
    )
    words = ["" if gap.clear else " (not told apart)" for gap in (accuracies, likelihoods)]
    return (
        f"{name}, against {base}: accuracy {accuracies}{words[0]}, NLL {likelihoods.mean:+.3f} ± "
        f"{likelihoods.error:.3f}{words[1]}."
    )


def claims(
    grid: dict[tuple[float, float], list[Scores]],
    alone: list[Scores],
    rows: dict[str, list[Scores]],
) -> str:
    """What the tables show."""
    total = {cell: sum(column(results, "accuracy")) for cell, results in grid.items()}
    base = column(alone, "accuracy")
    lines = [
        f"Mean ± deviation over {len(base)} seeds, which draw the images and the weights; differences with their "
        f"standard error. Labels alone: {spread(base)} %."
    ]
    for word, choose in (("Best", max), ("Worst", min)):
        t, alpha = cell = choose(total, key=total.__getitem__)
        gap = difference(column(grid[cell], "accuracy"), base)
        lines.append(f"{word} of the grid: T = {t:g}, alpha = {alpha:g}, {gap} over labels alone.")
    lines += [
        "The best was chosen on the test images, so that it is a little too good.",
        "What overconfidence costs a student, and what the fitted temperature mends:",
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
    """A PNG: the grid's accuracy and agreement, and the students' likelihood by teacher."""

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
    """A grid over T and alpha, and teachers of different confidence."""
    images = fashion_mnist(data)
    parts = divide(images)
    seeds, steps = range(1 if quick else 4), 4 if quick else 200
    of_teachers = teachers(parts, images.test_images, quick)
    count = len(TEMPERATURES) * len(ALPHAS) + 1 + 2 * len(of_teachers)

    with Progress() as progress:
        task = progress.add_task("sweeps, students", total=count * len(seeds))

        def students(said: Said, **options: float) -> list[Scores]:
            results = []
            for seed in seeds:
                examples = (parts.students[0], said.to_students, parts.students[1])
                scores = train_student(images, examples, said.on_test, seed, steps, **options)
                results.append(scores)
                progress.advance(task)
            return results

        said = of_teachers["as trained"]
        alone = students(said, alpha=0.0)
        grid = {
            (t, alpha): students(said, temperature=t, alpha=alpha)
            for t in TEMPERATURES
            for alpha in ALPHAS
        }

        rows, confidence = {}, {}
        for name, said in of_teachers.items():
            fitted = fit_temperature(said.to_calibration, parts.calibration[1])
            score = accuracy(said.on_test, images.test_labels)
            for row, own in ((name, 1.0), (name + FITTED, fitted)):
                error = expected_calibration_error(
                    said.on_test, images.test_labels, temperature=own
                )
                confidence[row] = score, own, 100 * error
                rows[row] = students(
                    said, temperature=SOFT, teacher_temperature=own * SOFT, alpha=ALPHA
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
