"""What the examples on images share: the data, small networks, a training loop, tables and plots.

digits.py    the teacher replaces the labels
fashion.py   one student, and losses on logits, layers and relations
online.py    students that teach each other, and generations of one student
sweeps.py    temperature and alpha; teachers that are too sure of themselves
"""

import gzip
import json
import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

CLASSES = 10
_DEBIAN = Path(
    "/usr/share/datasets/fashion-mnist"
)  # where its package dataset-fashion-mnist is installed
_UNPACKED = Path("build/fashion-mnist") / _DEBIAN.relative_to("/")  # where make unpacks that
FASHION = _UNPACKED if _UNPACKED.is_dir() else _DEBIAN
# Student's t: how many standard errors a mean over so many seeds is from 0 by chance once in 20 times.
TOLD_APART = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}

Output = Annotated[
    Path, typer.Option(help="Gets the table, the figures and the plot.", file_okay=False)
]
Quick = Annotated[bool, typer.Option("--quick", help="A few steps and a seed: does it run?")]
Data = Annotated[Path, typer.Option(help="The folder with Fashion-MNIST's four gz files.")]

console = Console()


# Data


class Split(NamedTuple):
    """Images [n, 1, H, W], float32, and labels [n], int64, for training and for testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """As many training images and their labels, drawn by the seed."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.labels), generator=generator)[:count]
        return self.images[chosen], self.labels[chosen]


def digits(seed: int, held_out: int = 500) -> Split:
    """scikit-learn's 1,797 images of 8x8 pixels, split by the seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise typer.BadParameter(
            "the digits come with scikit-learn: pip install scikit-learn"
        ) from None
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order]
    images, labels = (images - 4.9) / 6.0, torch.tensor(labels)[order]
    return Split(images[held_out:], labels[held_out:], images[:held_out], labels[:held_out])


def read_idx(path: Path) -> Tensor:
    """An array of bytes as the MNIST family has them: a magic number, the sizes, the values."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    sizes = np.frombuffer(raw, ">u4", dimensions, 4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(sizes.tolist()).copy())


def fashion_mnist(folder: Path) -> Split:
    """60,000 and 10,000 images of 28x28 pixels, of ten kinds of clothes (Xiao, Rasul, Vollgraf 2017)."""
    files = [
        folder / f"{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    if missing := [path.name for path in files if not path.is_file()]:
        raise typer.BadParameter(
            f"{folder} lacks {', '.join(missing)}; `make examples` fetches them, and so does "
            f"`apt-get install dataset-fashion-mnist`, into {_DEBIAN}",
            param_hint="--data",
        )
    images, labels, test_images, test_labels = map(read_idx, files)
    images, test_images = (
        (pixels.unsqueeze(1) / 255.0 - 0.286) / 0.353 for pixels in (images, test_images)
    )
    return Split(images, labels.long(), test_images, test_labels.long())


# Networks and training


def convolutional(channels: tuple[int, int], hidden: int, size: int) -> nn.Sequential:
    """Two convolutions, a hidden layer, a head; its layers are called by these names in Distiller's terms."""

    def block(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )

    features = channels[1] * (size // 4) ** 2
    return nn.Sequential(
        OrderedDict(
            layer1=block(1, channels[0]),
            layer2=block(*channels),
            embedding=nn.Sequential(nn.Flatten(), nn.Linear(features, hidden), nn.ReLU()),
            head=nn.Linear(hidden, CLASSES),
        )
    )


def two_layers(inputs: int, hidden: int) -> nn.Sequential:
    """A student without convolutions."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    )


def parameters(model: nn.Module) -> int:
    """How many numbers a model has learned."""
    return sum(parameter.numel() for parameter in model.parameters())


def batches(examples: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """The rows of each step: a fresh permutation each time through."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(examples, generator=generator)])
        rows, order = order[:batch], order[batch:]
        yield rows


def fit(
    model: nn.Module,
    loss: Callable[..., Tensor],
    examples: Sequence[Tensor],
    *,
    steps: int,
    seed: int,
    batch: int = 128,
    lr: float = 3e-3,
) -> float:
    """Train the model's parameters on `loss(*rows of each of the examples)`; returns the milliseconds of a step.

    They are what a tenth of the steps stay below, as other work on the machine slows the rest. The learning rate
    falls to 0 along a cosine.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    seconds = []
    for rows in batches(len(examples[0]), batch, steps, seed):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(*(each[rows] for each in examples)).backward()
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
    model.eval()
    return 1e3 * statistics.quantiles(seconds, n=10)[0]


def fit_to_labels(model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> float:
    """Train on labels alone."""
    return fit(
        model, lambda x, label: F.cross_entropy(model(x), label), (images, labels), **options
    )


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """The logits [n, 10] of images, in evaluation mode."""
    model.eval()
    return torch.cat([model(part) for part in images.split(1000)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100.0 * (logits.argmax(-1) == labels).double().mean().item()


# Tables and plots


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


class Difference(NamedTuple):
    """What two rows of one table differ by, seed by seed."""

    mean: float
    error: float  # standard error of the mean
    clear: bool  # whether seeds alone would seldom make it

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f}"


def difference(values: Sequence[float], base: Sequence[float]) -> Difference:
    """Of rows that have the same seeds."""
    gaps = [value - other for value, other in zip(values, base, strict=True)]
    seeds, mean = len(gaps), statistics.fmean(gaps)
    if seeds == 1:
        return Difference(mean, math.inf, clear=False)
    error = statistics.stdev(gaps) / math.sqrt(seeds)
    return Difference(mean, error, clear=abs(mean) > TOLD_APART[seeds] * error)


def verdicts(rows: dict[str, Sequence[float]], base: str) -> str:
    """Which rows are better or worse than the base, and which cannot be told from it by so few seeds."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
    for name, values in rows.items():
        if name != base:
            found = difference(values, rows[base])
            kind = "not told apart" if not found.clear else "better" if found.mean > 0 else "worse"
            groups[kind].append(f"{name} ({found})")
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in groups.items() if names)


def report(
    output: Path,
    name: str,
    tables: Sequence[Table],
    claim: str,
    figures: dict[str, Any],
    *,
    quick: bool,
) -> None:
    """Print the tables and what can be said of them, and write both and the figures to the folder."""
    if quick:
        claim = "A quick run, which shows that it runs and nothing else."
    with (output / f"{name}.txt").open("w", encoding="utf-8") as file:
        for to in (console, Console(file=file, width=120)):
            for table in tables:
                to.print(table)
            to.print(claim, highlight=False)
    (output / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    console.print(f"{output}: {name}.txt, {name}.json, {name}.png", highlight=False)


def panels(*widths: float, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A figure without a screen, and its axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1,
        len(widths),
        figsize=(sum(widths), height),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
    )
    return figure, list(axes[0])


def points(axes: Any, rows: dict[str, Sequence[float]], title: str) -> None:
    """A row's mean and deviation, and a small dot for each seed."""
    for place, values in enumerate(rows.values()):
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        mean = statistics.fmean(values)
        axes.errorbar(mean, place, xerr=deviation, fmt="o", color="#1f5fa8", capsize=3)
        axes.plot(values, [place] * len(values), ".", color="#d98c3f", markersize=4)
    axes.set(title=title, yticks=range(len(rows)))
    axes.set_yticklabels(list(rows))
    axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
