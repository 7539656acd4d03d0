"""examples/: each image example runs with few steps and images; the functions behind their claims are tested, too."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.paths import ROOT
from torch import Tensor

EXAMPLES = ROOT / "examples"


def load_example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_example("vision", monkeypatch)


def write_idx(path: Path, values: Tensor) -> None:
    header = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape)
    path.write_bytes(gzip.compress(header + bytes(values.flatten().tolist())))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of Fashion-MNIST filled with noise: 240 images to train on and 60 to test."""
    path = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 240), ("t10k", 60)):
        images = torch.randint(0, 256, (count, 28, 28), generator=generator)
        write_idx(path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(path / f"{part}-labels-idx1-ubyte.gz", torch.arange(count) % 10)
    return path


def check(output: Path, name: str) -> dict[str, object]:
    """Assert that a table, a plot and figures were written; return the figures."""
    assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy" in (output / f"{name}.txt").read_text(encoding="utf-8")
    figures: dict[str, object] = json.loads((output / f"{name}.json").read_text(encoding="utf-8"))
    return figures


def test_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_example("digits", monkeypatch).main(output=tmp_path, quick=True)
    rows = check(tmp_path, "digits")["accuracy"]
    assert list(rows) == ["teacher", "100 labels", "teacher, no label", "all labels"]


# Labels of noise images, which no temperature fits.
@pytest.mark.filterwarnings("ignore:the best temperature is outside bounds:UserWarning")
@pytest.mark.parametrize(
    ("name", "rows"),
    [  # rows of the table with the students
        ("fashion", 11),
        pytest.param("online", 8, marks=pytest.mark.heavy),
        pytest.param("sweeps", 6, marks=pytest.mark.heavy),
    ],
)
def test_on_images(
    name: str, rows: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_example(name, monkeypatch).main(data=folder, output=tmp_path, quick=True)
    figures = check(tmp_path, name)
    actual = figures["students" if name == "sweeps" else "accuracy"]
    assert len(actual) == rows
    if name == "sweeps":
        assert len(figures["grid"]) == 20


@pytest.mark.heavy
def test_as_a_script(folder: Path, tmp_path: Path) -> None:
    """The page's command works from another folder than the example's."""
    arguments = ["--quick", f"--data={folder}", f"--output={tmp_path}"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "online.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=1500,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A quick run" in done.stdout


def test_missing_images(vision: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(vision.typer.BadParameter, match="apt-get install dataset-fashion-mnist"):
        vision.fashion_mnist(tmp_path)


def test_read_idx(vision: ModuleType, tmp_path: Path) -> None:
    values = torch.arange(2 * 3 * 5).reshape(2, 3, 5) * 8
    write_idx(tmp_path / "values.gz", values)
    assert vision.read_idx(tmp_path / "values.gz").tolist() == values.tolist()


def test_an_epoch_has_each_example_once(vision: ModuleType) -> None:
    rows = torch.cat(list(vision.batches(10, 4, 5, seed=3)))
    assert rows[:10].sort().values.tolist() == rows[10:].sort().values.tolist() == list(range(10))


def test_differences_pair_equal_seeds(vision: ModuleType) -> None:
    actual = vision.difference([80.0, 90.0, 85.0], [79.0, 88.0, 84.0])
    assert actual.mean == pytest.approx(4 / 3)
    assert actual.error == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert not actual.clear  # t = 4 for three seeds; chance exceeds 4.3 once in 20 times
    assert vision.difference([80.0, 90.0, 85.0, 70.0], [79.0, 88.0, 84.0, 69.0]).clear  # 5 > 3.18
    assert not vision.difference([80.0], [70.0]).clear


def test_verdicts(vision: ModuleType) -> None:
    rows = {"base": [1.0, 2.0, 3.0], "up": [2.0, 3.1, 4.0], "same": [2.0, 1.0, 3.0]}
    verdicts = vision.verdicts(rows | {"down": [0.0, 1.1, 2.0]}, "base")
    assert verdicts == (
        "better: up (+1.03 ± 0.03); worse: down (-0.97 ± 0.03); not significant: same (+0.00 ± 0.58)"
    )
