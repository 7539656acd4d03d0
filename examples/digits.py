"""The teacher replaces the labels: scikit-learn's digits.

    python examples/digits.py

A convolutional teacher learns from 1,297 labelled images. A student of 16 hidden units then learns three times: from
the labels of 100 images, from the teacher's logits on all 1,297 images without a label, and from all 1,297 labels.
Each seed draws its own split, its own teacher and its own students.
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

    few = student()
    fit_to_labels(few, *data.draw(FEW, seed), steps=steps, seed=seed, lr=1e-2)
    note(f"{FEW} labels", few)

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

    whole = student()
    fit_to_labels(whole, data.images, data.labels, steps=steps, seed=seed, lr=1e-2)
    note("all labels", whole)


def main(output: Output = Path("build/examples"), quick: Quick = False) -> None:
    """Labels of a few images, the teacher without labels, all labels."""
    rows: dict[str, list[float]] = {}
    for seed in track(range(1 if quick else 5), "digits, seeds"):
        one_seed(seed, 40 if quick else 1200, rows)

    table = Table("", "accuracy, %", "over few labels", title="digits: 500 test images")
    for name, values in rows.items():
        gain = "" if name == "teacher" else str(difference(values, rows[f"{FEW} labels"]))
        table.add_row(name, spread(values), gain)
    taught = rows["teacher, no label"]
    claim = (
        f"Mean ± deviation over {len(taught)} seeds; differences with their standard error. A student has "
        f"{parameters(two_layers(64, 16)):,} parameters. The one that was taught without a label is "
        f"{difference(taught, rows[f'{FEW} labels'])} points from that of {FEW} labels and "
        f"{difference(taught, rows['all labels'])} from that of all: the teacher replaces the labels, and does no "
        "more. It had learned from them itself."
    )

    figure, (axes,) = panels(7.0, height=3.0)
    points(axes, rows, "digits: accuracy on 500 test images, %")
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "digits.png", dpi=150)
    report(output, "digits", [table], claim, {"accuracy": rows}, quick=quick)


if __name__ == "__main__":
    typer.run(main)
