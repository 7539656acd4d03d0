"""A LightningModule that distils a causal language model, with a loss written by hand and with fastkd's.

    python examples/swap/lightning_module.py          # SmolLM2-135M teaches six of its layers: a minute on two cores
    python examples/swap/lightning_module.py --tiny   # random models, in seconds

The swap, in `distillation_loss`:

    -    log_q = F.log_softmax(student_logits.float() / T, dim=-1)
    -    log_p = F.log_softmax(teacher_logits.float() / T, dim=-1)
    -    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    -    return T**2 * kl[labels != -100].mean()
    +    return fastkd.kd_loss(student_logits, teacher_logits, labels, temperature=T)

Both train the same student on the same batches; the run fails where a step's losses differ by more than the tolerance.
The third run has no module of its own at all: fastkd.compat.lightning.DistillationModule is one, which also keeps the
teacher out of checkpoints and has the mean right under accumulate_grad_batches.
"""

import functools
import logging
import time
import warnings
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from side_by_side import Batch, Problem, Run, compare, problem
from torch import Tensor
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other packages that it could use
    import lightning

import fastkd
from fastkd.compat.lightning import DistillationModule

T = 2.0
OPTIMIZER = functools.partial(torch.optim.AdamW, lr=3e-4)


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
    """Notes the loss and the time of each step."""

    def __init__(self) -> None:
        self.run = Run([], [])

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        """Stop it."""
        self.run.seconds.append(time.perf_counter() - self.start)
        self.run.losses.append(float(trainer.callback_metrics["train_loss"]))


def fit(module: lightning.LightningModule, given: Problem) -> Run:
    """One epoch over the batches."""
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
    trainer.fit(module, DataLoader(given.batches, batch_size=None))
    return recorder.run


def main(
    steps: Annotated[int, typer.Option(min=1)] = 4,
    tiny: Annotated[bool, typer.Option(help="Random models of two layers.")] = False,
    tolerance: Annotated[float, typer.Option(help="Of a step's loss, relative.")] = 1e-3,
) -> None:
    """Train three times, and compare."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    given = problem(steps, tiny)
    stock = fit(Distillation(given.new_student(), given.teacher), given)
    swapped = fit(WithFastkd(given.new_student(), given.teacher), given)
    whole = DistillationModule(
        given.new_student(), given.teacher, fastkd.KDLoss(temperature=T), optimizer=OPTIMIZER
    )
    statuses = [compare(stock, run, tolerance) for run in (swapped, fit(whole, given))]
    raise typer.Exit(max(statuses))


if __name__ == "__main__":
    typer.run(main)
