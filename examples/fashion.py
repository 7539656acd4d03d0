"""Losses on logits, on layers and on relations, compared for one teacher and student on Fashion-MNIST.

    python examples/fashion.py

A convolutional teacher learns from 60,000 labelled images, the student from 1,000 of them. Every row of the table uses
the same 1,000 images with another loss, except that the last row uses more images without labels. Weights and
temperatures are those of the papers or of their code, without tuning. The student has the teacher's architecture with a
quarter of the channels. Images are not augmented, so the teacher's outputs are computed once, before training.
"""

import itertools
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
    convolutional,
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
    verdicts,
)

from fastkd import KDLoss, dkd, nkd
from fastkd.distiller import Distiller, Term
from fastkd.features import HintLoss, Regressor, attention_transfer_loss
from fastkd.relations import rkd_loss

IMAGES = 1000  # labelled images for the student
MORE_IMAGES = 10_000  # unlabelled images of the last row
TEACHER, STUDENT = (16, 32), (4, 8)  # numbers of channels
LAYERS = ("layer1", "layer2", "embedding")


def terms_of_rows(steps: int) -> dict[str, dict[str, Term]]:
    """Return the terms of each row's loss; new ones at each call, because regressors have weights."""
    labels = Term(KDLoss(alpha=0.0))
    kd = Term(KDLoss(temperature=4.0, alpha=0.9))  # Hinton, Vinyals, Dean 2015
    attention = Term(
        lambda student, teacher: attention_transfer_loss(
            student, teacher, form="code", beta=1000.0
        ),
        ["layer1", "layer2"],
    )
    relations = Term(
        lambda student, teacher: rkd_loss(student, teacher, distance=25.0, angle=50.0), "embedding"
    )

    def hint() -> HintLoss:
        return HintLoss(Regressor(STUDENT[1], TEACHER[1], "conv"), reduction="mean_square")

    # The two stages of FitNets: first the hint alone, then the distillation.
    def first_stage(step: int) -> float:
        return 1.0 if step < steps // 3 else 0.0

    def second_stage(step: int) -> float:
        return 1.0 - first_stage(step)

    return {
        "labels alone": {"labels": labels},
        "KD": {"kd": kd},
        "KD at T = 1": {"kd": Term(KDLoss(temperature=1.0, alpha=0.9))},
        "DKD": {
            "labels": labels,
            "dkd": Term(KDLoss(divergence=dkd(1.0, 8.0), temperature=4.0)),
        },
        "NKD": {"labels": labels, "nkd": Term(KDLoss(divergence=nkd(1.5)))},
        "FitNets: hint, then KD": {
            "hint": Term(hint(), "layer2", weight=first_stage),
            "kd": Term(kd.loss, weight=second_stage),
        },
        "KD + hint": {"kd": kd, "hint": Term(hint(), "layer2")},
        "KD + attention": {"kd": kd, "attention": attention},
        "KD + relations": {"kd": kd, "relations": relations},
        "KD + all three": {
            "kd": kd,
            "hint": Term(hint(), "layer2"),
            "attention": attention,
            "relations": relations,
        },
    }


@torch.no_grad()
def layers_of(teacher: nn.Sequential, images: Tensor) -> list[Tensor]:
    """Return the teacher's outputs of each of LAYERS and of the head."""
    layer_outputs = []
    for layer in teacher:
        images = layer(images)
        layer_outputs.append(images)
    return layer_outputs


def train_row(
    terms: dict[str, Term], examples: list[Tensor], seed: int, steps: int
) -> tuple[nn.Module, float]:
    """Train a student on (images, labels, layers, logits) with a row's terms; return it and its ms per step."""
    torch.manual_seed(seed)  # every row's student starts from the same weights
    student = convolutional(STUDENT, 32, size=28)
    count = itertools.count()

    def loss(images: Tensor, labels: Tensor, *from_teacher: Tensor) -> Tensor:
        *features, logits = from_teacher
        layers = dict(zip(LAYERS, features, strict=True))
        total, _ = distiller(
            images, labels=labels, step=next(count), teacher_output=logits, teacher_layers=layers
        )
        return total

    with Distiller(student, None, terms) as distiller:
        milliseconds = fit(distiller, loss, examples, steps=steps, seed=seed, batch=64)
    return student.eval(), milliseconds


def one_seed(
    data: Split,
    teacher: nn.Sequential,
    seed: int,
    steps: int,
    rows: dict[str, list[float]],
    times: dict[str, list[float]],
) -> None:
    """Append the accuracy and the milliseconds per step of each row."""

    def note(name: str, terms: dict[str, Term], examples: list[Tensor]) -> None:
        student, milliseconds = train_row(terms, examples, seed, steps)
        score = accuracy(outputs(student, data.test_images), data.test_labels)
        rows.setdefault(name, []).append(score)
        times.setdefault(name, []).append(milliseconds)

    images, labels = data.draw(IMAGES, seed)
    examples = [images, labels, *layers_of(teacher, images)]
    for name, terms in terms_of_rows(steps).items():
        note(name, terms, examples)

    images, labels = data.draw(MORE_IMAGES, seed)
    logits = outputs(teacher, images)
    unused = [logits] * len(LAYERS)
    note(
        f"KD, {MORE_IMAGES:,} images, no label",
        {"kd": Term(KDLoss(temperature=4.0))},
        [images, labels, *unused, logits],
    )


def main(
    data: Data = FASHION, output: Output = Path("build/examples"), quick: Quick = False
) -> None:
    """Compare distillation losses for one teacher and one student."""
    images = fashion_mnist(data)
    torch.manual_seed(0)
    teacher = convolutional(TEACHER, 128, size=28)
    fit_to_labels(teacher, images.images, images.labels, steps=5 if quick else 400, seed=0)
    of_teacher = accuracy(outputs(teacher, images.test_images), images.test_labels)

    rows: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    for seed in track(range(1 if quick else 4), "fashion, seeds"):
        one_seed(images, teacher, seed, 6 if quick else 200, rows, times)

    table = Table(
        "", "accuracy, %", "gain over labels", "gain over KD", "ms per step",
        title=f"Fashion-MNIST: {len(images.test_labels):,} test images",
    )  # fmt: skip
    table.add_row("teacher", f"{of_teacher:.1f}")
    for name, values in rows.items():
        gains = (str(difference(values, rows[base])) for base in ("labels alone", "KD"))
        table.add_row(name, spread(values), *gains, f"{min(times[name]):.1f}")
    claim = (
        f"Mean ± standard deviation over {len(rows['KD'])} seeds; differences with their standard error. The student "
        f"has {parameters(convolutional(STUDENT, 32, 28)):,} parameters, the teacher {parameters(teacher):,}. The time "
        "per step excludes the teacher and is the first decile over steps.\n"
        f"Compared with labels alone: {verdicts(rows, 'labels alone')}.\n"
        f"Compared with KD: {verdicts(rows, 'KD')}.\n"
        "These results are of published weights, without tuning, in a short training of a small student. They do not "
        "show what each loss can achieve."
    )

    figure, (left, right) = panels(7.0, 4.0)
    points(left, rows, f"accuracy, % (teacher {of_teacher:.1f})")
    right.barh(range(len(times)), [min(values) for values in times.values()], color="#d98c3f")
    right.set(title="milliseconds per step", yticks=[])
    right.invert_yaxis()
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "fashion.png", dpi=150)
    figures = {"teacher": of_teacher, "accuracy": rows, "milliseconds": times}
    report(output, "fashion", [table], claim, figures, quick=quick)


if __name__ == "__main__":
    typer.run(main)
