"""A teacher in place of labels, on scikit-learn's digits.

    python examples/digits.py

A convolutional teacher learns from 1,297 labelled images. Three students with 16 hidden units then learn: one from the
labels of 100 images, one from the teacher's logits on all 1,297 images without labels, and one from all 1,297 labels.
Each seed has its own split, teacher and students.
"""

from pathlib import Path

import torch
import typer
from rich.progress import track
from rich.table import Table
from vision import (
    Output,
    Quick,
    accuracy,
    convolutional,
    difference,
    digits,
    fit,
    fit_to_labels,
    outputs,
    panels,
    parameters,
    points,
    report,
    spread,
    two_layers,
)

import fastkd

FEW = 100  # labelled images
TEMPERATURE = 4.0


def one_seed(seed: int, steps: int, rows: dict[str, list[float]]) -> None:
    """Append the accuracy of the teacher and of each student."""
    data = digits(seed)

    def student() -> torch.nn.Module:
        torch.manual_seed(seed)  # every student starts from the same weights
        return two_layers(64, 16)

    def note(name: str, model: torch.nn.Module) -> None:
        score = accuracy(outputs(model, data.test_images), data.test_labels)
        rows.setdefault(name, []).append(score)

    torch.manual_seed(seed)
    teacher = convolutional((16, 32), 64, size=8)
    fit_to_labels(teacher, data.images, data.labels, steps=steps // 4, seed=seed)
    note("teacher", teacher)

    few_labels = student()
    fit_to_labels(few_labels, *data.draw(FEW, seed), steps=steps, seed=seed, lr=1e-2)
    note(f"{FEW} labels", few_labels)

    taught = student()
    fit(
        taught,
        lambda x, target: fastkd.kd_loss(taught(x), target, temperature=TEMPERATURE),
        (data.images, outputs(teacher, data.images)),
        steps=steps,
        seed=seed,
        lr=1e-2,
    )
    note("teacher, no label", taught)

    all_labels = student()
    fit_to_labels(all_labels, data.images, data.labels, steps=steps, seed=seed, lr=1e-2)
    note("all labels", all_labels)


def main(output: Output = Path("build/examples"), quick: Quick = False) -> None:
    """Compare students of few labels, of a teacher without labels, and of all labels."""
    rows: dict[str, list[float]] = {}
    for seed in track(range(1 if quick else 5), "digits, seeds"):
        one_seed(seed, 40 if quick else 1200, rows)

    table = Table("", "accuracy, %", "gain over few labels", title="digits: 500 test images")
    for name, values in rows.items():
        gain = "" if name == "teacher" else str(difference(values, rows[f"{FEW} labels"]))
        table.add_row(name, spread(values), gain)
    taught = rows["teacher, no label"]
    claim = (
        f"Mean ± standard deviation over {len(taught)} seeds; differences with their standard error. A student has "
        f"{parameters(two_layers(64, 16)):,} parameters. The student of the teacher differs by "
        f"{difference(taught, rows[f'{FEW} labels'])} points from that of {FEW} labels and by "
        f"{difference(taught, rows['all labels'])} from that of all labels. The teacher can replace the labels, but "
        "not add to them: it learned from the same labels."
    )

    figure, (axes,) = panels(7.0, height=3.0)
    points(axes, rows, "digits: accuracy on 500 test images, %")
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "digits.png", dpi=150)
    report(output, "digits", [table], claim, {"accuracy": rows}, quick=quick)


if __name__ == "__main__":
    typer.run(main)
