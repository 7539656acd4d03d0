"""A LightningModule that distils a causal language model, with a loss written by hand and with fastkd's.

    python examples/swap/lightning_module.py          # SmolLM2-135M teaches six of its layers: a minute on two cores
    python examples/swap/lightning_module.py --tiny   # random models, in seconds

The swap, in `distillation_loss`:

    -    log_q = F.log_softmax(student_logits.float() / T, dim=-1)
    -    log_p = F.log_softmax(teacher_logits.float() / T, dim=-1)
    -    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    -    return T**2 * kl[labels != -100].mean()
    +    return fastkd.kd_loss(student_logits, teacher_logits, labels, temperature=T)

Both train the same student on the same batches; the run fails if the curves differ by more than rounding errors. With
--whole, fastkd.compat.lightning.DistillationModule replaces the whole module; it also keeps the teacher out of
checkpoints and computes the exact mean under accumulate_grad_batches.
"""

import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from side_by_side import ASSETS, Batch, Note, compare, setting
from torch import Tensor
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # lightning warns about optional packages
    import lightning

import fastkd
from fastkd.compat.lightning import DistillationModule

T = 2.0
OPTIMIZER = partial(torch.optim.AdamW, lr=3e-4)


class Distillation(lightning.LightningModule):
    """A user's module, with the loss in PyTorch."""

    def __init__(self, student: torch.nn.Module, teacher: torch.nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def distillation_loss(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> Tensor:
        """Compute the loss of logits [B, S, V] in PyTorch; labels [B, S] are -100 at positions that are dropped."""
        log_q = F.log_softmax(student_logits.float() / T, dim=-1)
        log_p = F.log_softmax(teacher_logits.float() / T, dim=-1)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        return T**2 * kl[labels != -100].mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        self.teacher.eval()
        teacher_logits = self.teacher(batch["input_ids"]).logits
        student_logits = self.student(batch["input_ids"]).logits
        loss = self.distillation_loss(student_logits, teacher_logits, batch["labels"])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer of the student's parameters."""
        return OPTIMIZER([p for p in self.student.parameters() if p.requires_grad])


class WithFastkd(Distillation):
    """The same module with fastkd's loss."""

    def distillation_loss(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> Tensor:
        """Compute the same loss with fastkd."""
        return fastkd.kd_loss(student_logits, teacher_logits, labels, temperature=T)


class LossCallback(lightning.Callback):
    """Passes the loss of each step to a function."""

    def __init__(self, note: Note) -> None:
        self.note = note

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Pass on the loss that the module logged."""
        self.note(float(trainer.callback_metrics["train_loss"]))


def fit(module: lightning.LightningModule, batches: list[Batch], note: Note) -> None:
    """Train for one epoch over the batches."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[LossCallback(note)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))


def main(
    tiny: Annotated[bool, typer.Option(help="Use two tiny models; needs no download.")] = False,
    whole: Annotated[
        bool, typer.Option(help="Replace the whole module, not only the loss.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1)] = 6,
    assets: Annotated[Path, typer.Option(help="Folder with SmolLM2.")] = ASSETS,
) -> None:
    """Train with the loss in PyTorch and with fastkd's, and compare."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    models = setting(tiny, assets)
    batches = models.batches(steps)

    def with_fastkd() -> lightning.LightningModule:
        if not whole:
            return WithFastkd(models.new_student(), models.teacher)
        loss = fastkd.KDLoss(temperature=T)
        return DistillationModule(models.new_student(), models.teacher, loss, optimizer=OPTIMIZER)

    compare(
        "PyTorch",
        lambda: partial(fit, Distillation(models.new_student(), models.teacher), batches),
        lambda: partial(fit, with_fastkd(), batches),
        tiny,
    )


if __name__ == "__main__":
    typer.run(main)
