"""The scripts of examples/swap for Model-Optimizer and for the losses of stacks whose training needs GPUs."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
from support.paths import ROOT

from fastkd.compat import ADAPTERS

pytestmark = pytest.mark.filterwarnings("ignore")  # of the stacks


@pytest.fixture
def swap(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "swap"))
    return importlib.import_module


def names() -> list[str]:
    """The names of losses.py, which imports nothing of the stacks at first."""
    text = (ROOT / "examples" / "swap" / "losses.py").read_text()
    table = text[text.index("SWAPS: ") : text.index("def train")]
    return [line.split('"')[1] for line in table.splitlines() if line.startswith('    "')]


def test_every_stack_of_the_table_has_an_adapter() -> None:
    assert len(names()) == 11
    assert {name.removesuffix("_topk") for name in names()} <= set(ADAPTERS)


@pytest.mark.parametrize("name", names())
def test_losses(swap: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Curves that differ raise typer.Exit."""
    swap("losses").main(tiny=True, only=[name], steps=2)
    assert f" {name} " in capsys.readouterr().out


def test_a_wrong_loss_fails(swap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = swap("losses")

    def wrong(module: Any) -> Any:
        loss = script.skyrl(module)
        return loss if module is not script.compat.skyrl else lambda step: 1.001 * loss(step)

    monkeypatch.setitem(script.SWAPS, "skyrl", (wrong, script.SWAPS["skyrl"][1]))
    with pytest.raises(script.typer.Exit):
        script.main(tiny=True, only=["skyrl"], steps=1)
    with pytest.raises(script.typer.BadParameter, match="--only must be one of nemo_automodel, "):
        script.main(tiny=True, only=["nemo"])


@pytest.mark.parametrize("number_format", ["INT8", "INT4"])
def test_quantized_students(
    swap: Any, number_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = swap("modelopt_qad")
    script.main(tiny=True, number_format=script.Format[number_format], steps=2)
    out = capsys.readouterr().out
    assert "16 layers have fake-quantized weights" in out and "Model-Optimizer" in out


def test_stand_ins_are_forgotten(swap: Any) -> None:
    originals = swap("originals")
    before = set(sys.modules)
    module = originals.module_of("skyrl.backends.skyrl_train.mtp.grad_clip")
    assert module.__file__.endswith("grad_clip.py")
    assert not {name for name in set(sys.modules) - before if name.startswith("skyrl")}
