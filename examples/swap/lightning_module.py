"""A LightningModule that distils a causal language model, with a loss written by hand and with fastkd's.

    python examples/swap/lightning_module.py          # SmolLM2-135M teaches six of its layers: a minute on two cores
    python examples/swap/lightning_module.py --tiny   # random models, in seconds

The swap, in `distillation_loss`:

    -    log_q = F.log_softmax(student_logits.float() / T, dim=-1)
    -    log_p = F.log_softmax(teacher_logits.float() / T, dim=-1)
    -    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    -    return T**2 * kl[labels != -100].mean()
    +    return fastkd.kd_loss(student_logits, teacher_logits, labels, temperature=T)

Both train the same student on the same batches; the run fails where the curves differ by more than rounding does. With
--whole it is fastkd.compat.lightning.DistillationModule in place of a module of one's own, which also keeps the teacher
out of checkpoints and has the mean right under accumulate_grad_batches.
"""

import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from side_by_side import ASSETS, Batch, compare, setting
from torch import Tensor
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other packages that it could use
    import lightning

import fastkd
from fastkd.compat.lightning import DistillationModule

T = 2.0
OPTIMIZER = partial(torch.optim.AdamW, lr=3e-4)


class Distillation(lightning.LightningModule):
    """The module that a user has."""

    def __init__(self, student: torch.nn.Module, teacher: torch.nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def distillation_loss(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> Tensor:
        """The loss as one writes it: logits [B, S, V], labels [B, S], -100 where a position does not count."""
        log_q = F.log_softmax(student_logits.float() / T, dim=-1)
        log_p = F.log_softmax(teacher_logits.float() / T, dim=-1)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        return T**2 * kl[labels != -100].mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        self.teacher.eval()
        teacher_logits = self.teacher(batch["input_ids"]).logits
        student_logits = self.student(batch["input_ids"]).logits
        loss = self.distillation_loss(student_logits, teacher_logits, batch["labels"])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of the student alone."""
        return OPTIMIZER([p for p in self.student.parameters() if p.requires_grad])


class WithFastkd(Distillation):
    """The same, with the loss swapped."""

    def distillation_loss(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> Tensor:
        """The same number."""
        return fastkd.kd_loss(student_logits, teacher_logits, labels, temperature=T)


class Recorder(lightning.Callback):
    """Notes the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        """What the module has logged."""
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


def fit(module: lightning.LightningModule, batches: list[Batch]) -> list[float]:
    """One epoch over the batches; the losses of its steps."""
    recorder = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return recorder.losses


def main(
    tiny: Annotated[bool, typer.Option(help="Two tiny models, and nothing to install.")] = False,
    whole: Annotated[bool, typer.Option(help="With fastkd's module in place of the loss.")] = False,
    steps: Annotated[int, typer.Option(min=1)] = 6,
    assets: Annotated[Path, typer.Option(help="Where SmolLM2 lies.")] = ASSETS,
) -> None:
    """Train with the loss by hand and with fastkd's, and compare."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    given = setting(tiny, assets)
    batches = given.batches(steps)

    def ours() -> lightning.LightningModule:
        if not whole:
            return WithFastkd(given.new_student(), given.teacher)
        loss = fastkd.KDLoss(temperature=T)
        return DistillationModule(given.new_student(), given.teacher, loss, optimizer=OPTIMIZER)

    compare(
        "PyTorch",
        lambda: partial(fit, Distillation(given.new_student(), given.teacher), batches),
        lambda: partial(fit, ours(), batches),
        tiny,
    )


if __name__ == "__main__":
    typer.run(main)
