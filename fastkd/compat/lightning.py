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
from torch import Tensor, nn

from fastkd.call.checks import check_choice
from fastkd.distiller import find_logits, models
from fastkd.distiller.models import Habits
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

        A batch is a mapping, in which labels are found and of the rest each model is passed what its forward names, or
        (inputs, labels). Both run with use_cache=False where they know it; an encoder-decoder's decoder_input_ids are
        made from labels where the batch has none; the first packed batch is checked for a model that reads across its
        examples. Models return logits [..., V], or what :func:`fastkd.distiller.find_logits` finds them in.

        Args:
            student: any module; the checkpoint has it under "student.".
            teacher: any module.
            loss: the options of the loss; None: forward KL at temperature 1.
            optimizer: from the student's parameters to an optimizer, such as torch.optim.AdamW or a partial of it.
            labels: the name of the labels in a batch.
            shift_labels: True: labels are those of the inputs, as a language model's data set has them: position i is
                trained on the label of i + 1, and the last, and the last of each packed example, has none. False: each
                row of logits has its own label. "auto": what a student of transformers does with labels itself, seen
                in a run on the first example, unless the labels of the first batch are the next tokens already; False
                for other modules.
            own_loss: "keep": what the student adds to its loss by itself, such as a router's auxiliary loss, is added
                with its own coefficient, and logged as own_loss. "drop": it is left out.

        Raises:
            ImportError: lightning is not installed.
            TypeError: loss is no fastkd.KDLoss, or is one whose reduction is not "mean".
            ValueError: a head is no distribution over classes; at the first batch, the labels of a module of which
                nothing is known are its input_ids.
        """

        def __init__(
            self,
            student: nn.Module,
            teacher: nn.Module,
            loss: KDLoss | None = None,
            *,
            optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
            labels: str = "labels",
            shift_labels: bool | str = "auto",
            own_loss: str = "keep",
        ) -> None:
            super().__init__()
            if shift_labels not in ("auto", True, False):
                raise ValueError(
                    f"shift_labels must be 'auto', True or False, got {shift_labels!r}"
                )
            check_choice("own_loss", own_loss, ("keep", "drop"))
            models.check_heads(student, teacher)
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
            self._own_loss = own_loss
            self._habits: Habits | None = None
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
            ignored = self.loss.options.get("ignore_index", models.IGNORED)
            habits = self._learned(arguments, named, labels)
            teacher = models.with_decoder_inputs(
                self.teacher, models.beside(self.teacher, self.student).chosen(named), labels
            )
            with torch.no_grad():
                target = find_logits(self.teacher(*arguments, **teacher))
            given = self._of_student(named, labels)
            if habits.own == "labels":
                with models.LabelLoss(labels):
                    outputs = self.student(*arguments, **given, labels=labels)
                own = models.loss_in(outputs)
            else:
                outputs = self.student(*arguments, **given)
                keeps = habits.own == "outputs" and self._own_loss == "keep"
                own = models.own_loss(self.student, outputs) if keeps else None
            logits = models.without_soft_prompt(self.student, find_logits(outputs), labels.shape)
            shifts = labels.dim() == 2 and logits.dim() == 3 and bool(habits.shifts)
            begins = models.starts(named, labels.shape)
            targets = models.targets(labels, shifts, begins, ignored)
            models.check_rows(targets, logits.shape[:-1])
            loss, parts = self.loss(logits, target, targets, num_items=UNIT)
            rows = parts.counted.clamp(min=1)
            means = {
                "distillation": parts.distillation.sum() / rows,
                "cross_entropy": parts.cross_entropy.sum() / rows,
                "student_entropy": parts.student_entropy.sum() / rows,
            }
            if own is not None:  # the mean of a step's batches, by their rows
                loss = loss + own * (parts.counted / UNIT)
                means["own_loss"] = own.detach()
            means["loss"] = loss.detach() * (UNIT / rows)
            named_means = {f"{stage}_{name}": value for name, value in means.items()}
            # The mean over an epoch weighs batches by their rows; in training that would wait for the device each step.
            size = int(parts.counted) if stage == "val" else len(logits)
            self.log_dict(named_means, batch_size=size, sync_dist=stage == "val")
            return loss, parts.counted

        def _of_student(self, named: dict[str, Any], labels: Tensor) -> dict[str, Any]:
            chosen = models.beside(self.student, self.teacher).chosen(named)
            return models.with_decoder_inputs(self.student, chosen, labels)

        def _learned(
            self, arguments: tuple[Any, ...], named: dict[str, Any], labels: Tensor
        ) -> Habits:
            """What the student does with labels, and whether packed examples are kept apart: once."""
            if self._habits is not None:
                return self._habits
            models.check_labels(labels)
            features = models.by_name(self.student, arguments, named)
            known = len(features) == len(arguments) + len(named)
            found = Habits(models.shifts_labels(self.student), "outputs")
            if known:
                given = self._of_student(features, labels)
                found = models.habits_of(self.student, self.student, given, labels, self._own_loss)
            for whose, model, other in (
                ("the student", self.student, self.teacher),
                ("the teacher", self.teacher, self.student),
            ):
                if not arguments:
                    given = models.beside(model, other).chosen(named)
                    given = models.with_decoder_inputs(model, given, labels)
                    models.check_boundaries(model, model, given, named, whose)
            if isinstance(self._shift, bool):
                found = found._replace(shifts=self._shift)
            elif (
                found.shifts
                and _are_tokens(features, arguments, labels, 1)
                and not _are_tokens(features, arguments, labels, 0)
            ):
                found = found._replace(shifts=False)  # the data set has shifted them already
            elif found.shifts is None and _are_tokens(features, arguments, labels, 0):
                raise ValueError(
                    "shift_labels must be given: the labels are the input_ids, and of this student it cannot be known "
                    "whether position i predicts the label of i + 1 (a causal language model: True) or its own (False)"
                )
            self._habits = found
            return found

        def _unpacked(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
            """(positional inputs, named inputs, labels)."""
            if isinstance(batch, Mapping):
                named = dict(batch)
                if named.get(self._labels) is None:
                    raise ValueError(
                        f"a batch must have {self._labels!r}, the labels, and this one has {', '.join(named)}; the "
                        "argument labels= of DistillationModule names them"
                    )
                return (), named, named.pop(self._labels)
            *arguments, labels = batch
            return tuple(arguments), {}, labels

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            super()._apply(fn, recurse)
            if recurse:
                self.teacher._apply(fn)
            return self

    DistillationModule.__qualname__ = "DistillationModule"  # so that it can be pickled
    return DistillationModule


def _are_tokens(
    features: Mapping[str, Any], arguments: tuple[Any, ...], labels: Tensor, ahead: int
) -> bool:
    """Whether the labels that count are the input_ids so many positions ahead."""
    ids = features.get("input_ids", arguments[0] if arguments else None)
    if not isinstance(ids, Tensor) or ids.shape != labels.shape or ids.is_floating_point():
        return False
    if ahead:
        ids, labels = ids[..., ahead:], labels[..., :-ahead]
    counts = labels != models.IGNORED
    return int(counts.sum()) > 1 and torch.equal(ids[counts], labels[counts])


def __getattr__(name: str) -> Any:
    if name == "DistillationModule":
        return _module_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
