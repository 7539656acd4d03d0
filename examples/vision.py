"""Code that the examples on images share: data, small networks, a training loop, tables and plots.

digits.py    a teacher in place of labels
fashion.py   losses on logits, layers and relations
online.py    mutual learning and born-again networks
sweeps.py    temperature and alpha; overconfident teachers
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
# The folder of Debian's package dataset-fashion-mnist, and the folder into which `make examples` unpacks that package.
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_UNPACKED = Path("build/fashion-mnist") / _DEBIAN.relative_to("/")
FASHION = _UNPACKED if _UNPACKED.is_dir() else _DEBIAN
# Two-sided 5 % critical values of Student's t by the number of seeds.
T_CRITICAL = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}

Output = Annotated[
    Path, typer.Option(help="Folder for the table, the figures and the plot.", file_okay=False)
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Run a few steps of one seed, to see that it works.")
]
Data = Annotated[Path, typer.Option(help="The folder with Fashion-MNIST's four gz files.")]

console = Console()


# Data


class Split(NamedTuple):
    """Images [n, 1, H, W] float32 and labels [n] int64, for training and for testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return `count` random training images and their labels."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.labels), generator=generator)[:count]
        return self.images[chosen], self.labels[chosen]


def digits(seed: int, held_out: int = 500) -> Split:
    """Load scikit-learn's 1,797 images of 8x8 pixels, with a random split."""
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
    """Read a gzipped IDX file, the format of MNIST: a magic number, the sizes, the values."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    sizes = np.frombuffer(raw, ">u4", dimensions, 4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(sizes.tolist()).copy())


def fashion_mnist(folder: Path) -> Split:
    """Load Fashion-MNIST: 60,000 training and 10,000 test images of 28x28 pixels (Xiao, Rasul, Vollgraf 2017)."""
    files = [
        folder / f"{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    if missing := [path.name for path in files if not path.is_file()]:
        raise typer.BadParameter(
            f"{folder} lacks {', '.join(missing)}; run `make examples`, which downloads them, or "
            f"`apt-get install dataset-fashion-mnist`, which installs them in {_DEBIAN}",
            param_hint="--data",
        )
    images, labels, test_images, test_labels = map(read_idx, files)
    images, test_images = (
        (pixels.unsqueeze(1) / 255.0 - 0.286) / 0.353 for pixels in (images, test_images)
    )
    return Split(images, labels.long(), test_images, test_labels.long())


# Networks and training


def convolutional(channels: tuple[int, int], hidden: int, size: int) -> nn.Sequential:
    """Return a network of two convolutions, a hidden layer and a head, with layer names for Distiller's terms."""

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
    """Return a network with one hidden layer and no convolutions."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    )


def parameters(model: nn.Module) -> int:
    """Return the number of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def batches(examples: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield the row indices of each step; every epoch has a new permutation."""
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
    """Train a model on `loss(*rows of each of the examples)`; return the milliseconds per step.

    These are the first decile over steps, because other work on the machine slows some steps. The learning rate
    decays to 0 along a cosine.
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
    """Train a model on labels alone."""
    return fit(
        model, lambda x, label: F.cross_entropy(model(x), label), (images, labels), **options
    )


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits [n, 10] of images, in evaluation mode."""
    model.eval()
    return torch.cat([model(part) for part in images.split(1000)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the accuracy in percent."""
    return 100.0 * (logits.argmax(-1) == labels).double().mean().item()


# Tables and plots


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Format mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


class Difference(NamedTuple):
    """Difference of two rows of a table, paired by seed."""

    mean: float
    error: float  # standard error of the mean
    clear: bool  # whether it is significant at the 5 % level

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f}"


def difference(values: Sequence[float], base: Sequence[float]) -> Difference:
    """Return the difference of two rows with the same seeds."""
    gaps = [value - other for value, other in zip(values, base, strict=True)]
    seeds, mean = len(gaps), statistics.fmean(gaps)
    if seeds == 1:
        return Difference(mean, math.inf, clear=False)
    error = statistics.stdev(gaps) / math.sqrt(seeds)
    return Difference(mean, error, clear=abs(mean) > T_CRITICAL[seeds] * error)


def verdicts(rows: dict[str, Sequence[float]], base: str) -> str:
    """List which rows are better or worse than the base, and which do not differ significantly."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "not significant": []}
    for name, values in rows.items():
        if name != base:
            gap = difference(values, rows[base])
            kind = "not significant" if not gap.clear else "better" if gap.mean > 0 else "worse"
            groups[kind].append(f"{name} ({gap})")
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
    """Print tables and conclusions, and write both and the figures to the folder."""
    if quick:
        claim = "A quick run, which shows only that the example works."
    with (output / f"{name}.txt").open("w", encoding="utf-8") as file:
        for target in (console, Console(file=file, width=120)):
            for table in tables:
                target.print(table)
            target.print(claim, highlight=False)
    (output / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    console.print(f"{output}: {name}.txt, {name}.json, {name}.png", highlight=False)


def panels(*widths: float, height: float = 4.0) -> tuple[Any, list[Any]]:
    """Return a figure that needs no display, and its axes side by side."""
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
    """Plot the mean and standard deviation of each row, with a small dot per seed."""
    for place, values in enumerate(rows.values()):
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        mean = statistics.fmean(values)
        axes.errorbar(mean, place, xerr=deviation, fmt="o", color="#1f5fa8", capsize=3)
        axes.plot(values, [place] * len(values), ".", color="#d98c3f", markersize=4)
    axes.set(title=title, yticks=range(len(rows)))
    axes.set_yticklabels(list(rows))
    axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
