"""fastkd.compat.lightning in real Trainers, and the scripts of examples/swap that are not of a Hugging Face trainer."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import blocks
from torch import Tensor, nn
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what else it could use
    import lightning

from support.paths import ROOT

import fastkd
from fastkd.compat import lightning as ours
from fastkd.compat.lightning import DistillationModule

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on data loaders and logs
SGD = partial(torch.optim.SGD, lr=0.5)
OPTIONS: dict[str, Any] = {"temperature": 2.0, "alpha": 0.6}


class Model(nn.Module):
    """A model from ids [B, S] to logits [B, S, 17], with dropout, so that the teacher's mode matters."""

    def __init__(self, width: int, seed: int, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(17, width), nn.Linear(width, 17)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.embedding(input_ids)))


def models() -> tuple[Model, Model]:
    return Model(8, seed=1), Model(16, seed=2, dropout=0.5)


def batches(count: int) -> list[dict[str, Tensor]]:
    """Micro-batches with very different numbers of counted rows."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for index in range(count):
        ids, labels = torch.randint(17, (2, 2, 6), generator=generator)
        labels[:, : (0, 5, 3)[index % 3]] = -100
        results.append({"input_ids": ids, "labels": labels})
    return results


class Curve(lightning.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


def fit(module: lightning.LightningModule, data: list[Any], **options: Any) -> list[float]:
    curve = Curve()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[curve],
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None))
    return curve.losses


def formula(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """0.6 T^2 KL + 0.4 CE, averaged over the counted rows."""
    log_q, log_p = ((x / 2).log_softmax(-1) for x in (student, teacher))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[labels != -100].mean()
    hard = nn.functional.cross_entropy(student.flatten(0, 1), labels.flatten())
    return 0.6 * 4 * kl + 0.4 * hard


class Stock(lightning.LightningModule):
    """The module that a user writes without fastkd."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = models()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self.teacher.eval()(batch["input_ids"])
        loss = formula(self.student(batch["input_ids"]), target, batch["labels"])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SGD(self.student.parameters())


def module(**options: Any) -> Any:
    return DistillationModule(*models(), fastkd.KDLoss(**OPTIONS), **({"optimizer": SGD} | options))


def test_the_curve_of_a_stock_module() -> None:
    stock, fastkd_module = Stock(), module()
    data = batches(4)
    assert fit(fastkd_module, data) == pytest.approx(fit(stock, data), rel=1e-5)
    for actual, expected in zip(
        fastkd_module.student.parameters(), stock.student.parameters(), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def whole_steps(data: list[dict[str, Tensor]], every: int, clip: float | None) -> Model:
    """The student after steps on all rows of `every` batches at once, in plain PyTorch."""
    student, teacher = models()
    teacher.eval()
    optimizer = SGD(student.parameters())
    for first in range(0, len(data), every):
        part = data[first : first + every]
        ids, labels = (
            torch.cat([batch[name] for batch in part]) for name in ("input_ids", "labels")
        )
        loss = formula(student(ids), teacher(ids).detach(), labels)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            assert nn.utils.clip_grad_norm_(student.parameters(), clip) > clip
        optimizer.step()
    return student


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_accumulated_gradients_equal_those_of_one_batch(clip: float | None) -> None:
    """Five batches, two per step: the last step has one. Lightning clips gradients after the division by rows."""
    data = batches(5)
    exact = whole_steps(data, 2, clip)
    stock, fastkd_module = Stock(), module()
    for module_ in (stock, fastkd_module):
        fit(module_, data, accumulate_grad_batches=2, gradient_clip_val=clip)
    assert distance(fastkd_module.student, exact) < 1e-6
    assert distance(stock.student, exact) > 1e-2


def test_an_interrupted_fit_leaves_no_state() -> None:
    """The rows of an interrupted step are not counted in the next fit's first step."""
    data, fastkd_module = batches(4), module()
    with pytest.raises(ValueError, match="labels"):
        fit(
            fastkd_module,
            [data[1], {**data[0], "labels": data[0]["labels"][:1]}],
            accumulate_grad_batches=2,
        )
    fit(fastkd_module, data, accumulate_grad_batches=2)
    assert distance(fastkd_module.student, whole_steps(data, 2, None)) < 1e-6


def test_batches_without_a_counted_row() -> None:
    data = batches(2)
    for batch in data:
        batch["labels"].fill_(-100)
    fastkd_module, (untouched, _) = module(), models()
    assert fit(fastkd_module, data, accumulate_grad_batches=2) == [0.0, 0.0]
    assert distance(fastkd_module.student, untouched) == 0.0


def test_logged_values() -> None:
    fastkd_module, data = module(), batches(3)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.validate(fastkd_module, DataLoader(data, batch_size=None), verbose=False)
    names = {"loss", "distillation", "cross_entropy", "student_entropy"}
    assert {f"val_{name}" for name in names} == set(trainer.callback_metrics)
    ids, labels = (torch.cat([batch[name] for batch in data]) for name in ("input_ids", "labels"))
    student, teacher = (
        fastkd_module.student(ids),
        fastkd_module.teacher(ids),
    )  # over all rows, not a mean of means
    exact = float(formula(student, teacher, labels))
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(exact, rel=1e-5)
    hard = float(nn.functional.cross_entropy(student.flatten(0, 1), labels.flatten()))
    assert float(trainer.callback_metrics["val_cross_entropy"]) == pytest.approx(hard, rel=1e-5)
    entropy = torch.distributions.Categorical(logits=student / 2).entropy()[labels != -100].mean()
    actual = float(trainer.callback_metrics["val_student_entropy"])
    assert actual == pytest.approx(float(entropy), rel=1e-5)


def test_the_teacher_is_unchanged(tmp_path: Path) -> None:
    fastkd_module = module()
    assert not fastkd_module.teacher.training
    fastkd_module.train()
    assert not fastkd_module.teacher.training
    assert not any(parameter.requires_grad for parameter in fastkd_module.teacher.parameters())
    assert {name.split(".")[0] for name, _ in fastkd_module.named_parameters()} == {"student"}
    assert (
        fastkd_module.double().teacher.head.weight.dtype == torch.float64
    )  # moves and is cast with the module
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    fastkd_module.float()
    trainer.fit(fastkd_module, DataLoader(batches(1), batch_size=None))
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    saved = torch.load(tmp_path / "some.ckpt", weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"student"}
    student, teacher = models()
    again = DistillationModule.load_from_checkpoint(
        tmp_path / "some.ckpt", student=student, teacher=teacher, optimizer=SGD
    )
    assert distance(again.student, fastkd_module.student) == 0.0


def test_forms_of_a_batch() -> None:
    """A tuple; labels under another name; labels that are the inputs, shifted by one position."""
    (batch,) = batches(1)
    ids = batch["input_ids"]
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    (exact,) = fit(module(), [{"input_ids": ids, "labels": shifted}])
    assert fit(module(), [(ids, shifted)]) == [exact]
    assert fit(module(labels="next"), [{"input_ids": ids, "next": shifted}]) == [exact]
    assert fit(module(shift_labels=True), [{"input_ids": ids, "labels": ids}]) == [exact]


def test_losses_without_a_row_count_are_refused() -> None:
    for loss in (nn.KLDivLoss(), fastkd.KDLoss(reduction="sum")):
        with pytest.raises(TypeError, match="must be a fastkd.KDLoss with reduction='mean'"):
            DistillationModule(*models(), loss, optimizer=SGD)


def test_lightning_is_imported_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, fastkd.compat.lightning; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert pickle.loads(pickle.dumps(DistillationModule)) is DistillationModule
    ours._module_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ImportError, match="pip install lightning"):
        ours.DistillationModule  # noqa: B018 (the attribute imports)
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        ours.Other  # noqa: B018


def test_the_page() -> None:
    """train.py of docs/stacks/lightning.md."""
    (block,) = [
        x for x in blocks(ROOT / "docs" / "stacks" / "lightning.md") if x.title == "train.py"
    ]
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block.body, "lightning.md", "exec"), names)
    assert names["trainer"].global_step == 2


# ---- examples/swap


@pytest.fixture
def swap(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "swap"))
    return importlib.import_module


@pytest.mark.parametrize(
    ("name", "options"),
    [("torch_loop", {}), ("lightning_module", {}), ("lightning_module", {"whole": True})],
)
def test_scripts(
    swap: Any, name: str, options: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    """Curves that differ raise typer.Exit."""
    swap(name).main(tiny=True, steps=2, **options)
    assert "fastkd" in capsys.readouterr().out


def test_a_wrong_loss_fails(swap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = swap("torch_loop")
    monkeypatch.setattr(script, "with_fastkd", lambda *given: 1.001 * script.by_hand(*given))
    with pytest.raises(script.typer.Exit):
        script.main(tiny=True, steps=1)
