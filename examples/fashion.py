"""One student of one teacher, and losses on logits, on layers and on relations: Fashion-MNIST.

    python examples/fashion.py

A convolutional teacher learns from 60,000 labelled images, its student has 1,000 of them, and every row of the table
but the last the same 1,000: what differs is what is asked of the teacher. Weights and temperatures are those of the
papers or of their code, and none was tuned here. The student's architecture is the teacher's with a quarter of the
channels; nothing is augmented, so that the teacher is asked once and each step has its answers at hand.
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

IMAGES = 1000  # that the student sees, with their labels
MORE_IMAGES = 10_000  # of the last row, without
TEACHER, STUDENT = (16, 32), (4, 8)  # channels
LAYERS = ("layer1", "layer2", "embedding")


def terms_of_rows(steps: int) -> dict[str, dict[str, Term]]:
    """What each row's loss is made of, made afresh, as a regressor has weights of its own."""
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

    def first(step: int) -> float:  # FitNets' two stages: the hint, and then the rest
        return 1.0 if step < steps // 3 else 0.0

    def then(step: int) -> float:
        return 1.0 - first(step)

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
            "hint": Term(hint(), "layer2", weight=first),
            "kd": Term(kd.loss, weight=then),
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
    """What the layers of LAYERS, and then the head, make of images."""
    found = []
    for layer in teacher:
        images = layer(images)
        found.append(images)
    return found


def train_row(
    terms: dict[str, Term], examples: list[Tensor], seed: int, steps: int
) -> tuple[nn.Module, float]:
    """A student with the losses of a row on (images, labels, layers, logits); and its milliseconds a step."""
    torch.manual_seed(seed)  # every row's student starts from the same weights
    student = convolutional(STUDENT, 32, size=28)
    count = itertools.count()

    def loss(images: Tensor, labels: Tensor, *said: Tensor) -> Tensor:
        layers = dict(zip(LAYERS, said[:-1], strict=True))
        total, _ = distiller(
            images, labels=labels, step=next(count), teacher_output=said[-1], teacher_layers=layers
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
    """Append the accuracy and the milliseconds a step of each row."""

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
    """One student, and what to ask of its teacher."""
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
        "", "accuracy, %", "over labels", "over KD", "ms a step",
        title=f"Fashion-MNIST: {len(images.test_labels):,} test images",
    )  # fmt: skip
    table.add_row("teacher", f"{of_teacher:.1f}")
    for name, values in rows.items():
        gains = (str(difference(values, rows[base])) for base in ("labels alone", "KD"))
        table.add_row(name, spread(values), *gains, f"{min(times[name]):.1f}")
    claim = (
        f"Mean ± deviation over {len(rows['KD'])} seeds; differences with their standard error. "
        f"{parameters(convolutional(STUDENT, 32, 28)):,} parameters learn from {parameters(teacher):,}. A step's time "
        "is without the teacher: what a tenth of the steps stay below.\n"
        f"Against labels alone: {verdicts(rows, 'labels alone')}.\nAgainst KD: {verdicts(rows, 'KD')}.\n"
        "That is what published weights do in a short training of a small student, without tuning, and not what each "
        "loss can do."
    )

    figure, (left, right) = panels(7.0, 4.0)
    points(left, rows, f"accuracy, % (teacher {of_teacher:.1f})")
    right.barh(range(len(times)), [min(values) for values in times.values()], color="#d98c3f")
    right.set(title="milliseconds a step", yticks=[])
    right.invert_yaxis()
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "fashion.png", dpi=150)
    figures = {"teacher": of_teacher, "accuracy": rows, "milliseconds": times}
    report(output, "fashion", [table], claim, figures, quick=quick)


if __name__ == "__main__":
    typer.run(main)
