r"""A LightningModule that distils a student, with the mean right under accumulate_grad_batches.

    from fastkd.compat.lightning import DistillationModule

    module = DistillationModule(student, teacher, fastkd.KDLoss(temperature=2.0), optimizer=torch.optim.AdamW)
    lightning.Trainer(accumulate_grad_batches=4).fit(module, batches)

lightning is imported where DistillationModule is asked for, and not before. In a module of your own ``fastkd.kd_loss``
takes the place of the loss in training_step as it does anywhere; what this one adds is below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.distiller import find_logits
from fastkd.modules import KDLoss

if TYPE_CHECKING:
    from lightning import LightningModule

# What the sum over a micro-batch is divided by until the number of rows of the whole step is known: it only keeps
# the gradients of float16 within their range.
UNIT = 1024.0


@functools.cache
def _module_class() -> type[LightningModule]:
    try:
        from lightning import LightningModule
    except ImportError as error:
        raise ImportError(
            "fastkd.compat.lightning.DistillationModule is a LightningModule: pip install lightning"
        ) from error

    class DistillationModule(LightningModule):
        r"""Trains a student on what a teacher says of each batch.

        - The teacher is in eval mode, without gradients, moves to the module's device, and is in no checkpoint.
        - The gradient of an optimizer step is that of the mean over all rows that count in its micro-batches, on all
          devices, however unevenly they are spread; Lightning's own is the mean of the micro-batches' means, and at
          the end of an epoch, where fewer are left, a part of that. To that end training_step returns a sum over
          rows, and on_before_optimizer_step divides the gradients: call super() where you override that.
        - It logs train_loss, train_distillation, train_cross_entropy and train_student_entropy, and their val_ twins,
          each the mean over the rows that count.

        A batch is a mapping, in which labels are found and the rest is passed to both models by name, or (inputs,
        labels). Models return logits [..., V], or what :func:`fastkd.distiller.find_logits` finds them in.

        Args:
            student: any module; the checkpoint has it under "student.".
            teacher: any module.
            loss: the options of the loss; None: forward KL at temperature 1.
            optimizer: from the student's parameters to an optimizer, such as torch.optim.AdamW or a partial of it.
            labels: the name of the labels in a batch.
            shift_labels: labels are those of the inputs, as a language model's data set has them: position i is
                trained on the label of i + 1, and the last has none.

        Raises:
            ImportError: lightning is not installed.
            TypeError: loss is no fastkd.KDLoss, or is one whose reduction is not "mean".
        """

        def __init__(
            self,
            student: nn.Module,
            teacher: nn.Module,
            loss: KDLoss | None = None,
            *,
            optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
            labels: str = "labels",
            shift_labels: bool = False,
        ) -> None:
            super().__init__()
            loss = KDLoss() if loss is None else loss
            if not isinstance(loss, KDLoss) or loss.options.get("reduction", "mean") != "mean":
                raise TypeError(
                    "loss must be a fastkd.KDLoss with reduction='mean', as the rows of a step are counted; "
                    f"got {loss!r}"
                )
            self.student = student
            self.loss = KDLoss(**{**loss.options, "return_parts": True})
            self._teacher = (
                teacher.eval().requires_grad_(False),
            )  # where nn.Module does not find it
            self._optimizer = optimizer
            self._labels = labels
            self._shift = shift_labels
            self._rows: Tensor | None = None  # that count, of the micro-batches of this step so far

        @property
        def teacher(self) -> nn.Module:
            """The teacher."""
            return self._teacher[0]

        def forward(self, *inputs: Any, **named: Any) -> Any:
            """The student's output."""
            return self.student(*inputs, **named)

        def on_train_start(self) -> None:
            """Forget the rows of a step that an earlier fit began, and an exception or should_stop cut off."""
            self._rows = None

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            """The loss of the rows of a micro-batch, summed, over UNIT."""
            loss, counted = self._loss(batch, "train")
            self._rows = counted if self._rows is None else self._rows + counted
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            """Logs the loss of a batch."""
            self._loss(batch, "val")

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            """Divide the gradients, which are sums over rows, by the number of rows."""
            rows, self._rows = self._rows, None
            if rows is None:  # a second optimizer of one step
                return
            # Lightning has divided by the number of micro-batches, and devices are averaged: so is the number of rows.
            rows = self.trainer.strategy.reduce(rows.float(), reduce_op="mean")
            rows = torch.where(rows == 0, 1.0, rows)
            factor = UNIT * self.trainer.accumulate_grad_batches / rows
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, factor)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            """The optimizer, of the student's parameters that are trained."""
            return self._optimizer([p for p in self.student.parameters() if p.requires_grad])

        def _loss(self, batch: Any, stage: str) -> tuple[Tensor, Tensor]:
            arguments, named, labels = self._unpacked(batch)
            with torch.no_grad():
                target = find_logits(self.teacher(*arguments, **named))
            logits = find_logits(self.student(*arguments, **named))
            loss, parts = self.loss(logits, target, labels, num_items=UNIT)
            rows = parts.counted.clamp(min=1)
            means = {
                "loss": loss.detach() * (UNIT / rows),
                "distillation": parts.distillation.sum() / rows,
                "cross_entropy": parts.cross_entropy.sum() / rows,
                "student_entropy": parts.student_entropy.sum() / rows,
            }
            named_means = {f"{stage}_{name}": value for name, value in means.items()}
            # The mean over an epoch weighs batches by their rows; in training that would wait for the device each step.
            size = int(parts.counted) if stage == "val" else len(logits)
            self.log_dict(named_means, batch_size=size, sync_dist=stage == "val")
            return loss, parts.counted

        def _unpacked(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
            """(positional inputs, named inputs, labels)."""
            if isinstance(batch, Mapping):
                named = dict(batch)
                arguments, labels = (), named.pop(self._labels)
            else:
                *arguments, labels = batch
                named = {}
            if self._shift:
                ignored = self.loss.options.get("ignore_index", -100)
                labels = F.pad(labels[..., 1:], (0, 1), value=ignored)
            return tuple(arguments), named, labels

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            super()._apply(fn, recurse)
            if recurse:
                self.teacher._apply(fn)
            return self

    DistillationModule.__qualname__ = "DistillationModule"  # so that it can be pickled
    return DistillationModule


def __getattr__(name: str) -> Any:
    if name == "DistillationModule":
        return _module_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
