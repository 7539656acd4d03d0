r"""A LightningModule that distils a student, with the exact mean loss under accumulate_grad_batches.

    from fastkd.compat.lightning import DistillationModule

    module = DistillationModule(student, teacher, fastkd.KDLoss(temperature=2.0), optimizer=torch.optim.AdamW)
    lightning.Trainer(accumulate_grad_batches=4).fit(module, batches)

lightning is imported only when DistillationModule is accessed. In a LightningModule of your own, call
``fastkd.kd_loss`` in training_step instead; the docstring of DistillationModule lists what it adds to that.
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
    _LightningModule = Any
else:
    _LightningModule = object

# Divisor of the sum over a micro-batch until the number of rows of the whole step is known. It keeps float16 gradients
# in range; on_before_optimizer_step multiplies it back.
UNIT = 1024.0


class _DistillationModule(_LightningModule):
    r"""LightningModule that trains a student on a teacher's logits.

    - The teacher runs in eval mode without gradients. It moves to the module's device and is not in checkpoints.
    - The gradient of an optimizer step is that of the mean over all counted rows of its micro-batches on all devices,
      however unevenly the rows are distributed. (Lightning itself averages the means of the micro-batches, and weights
      the last, incomplete step of an epoch too little.) training_step therefore returns a sum over rows, and
      on_before_optimizer_step divides the gradients; call super() if you override the latter.
    - It logs train_loss, train_distillation, train_cross_entropy and train_student_entropy, and the same with the
      prefix val_, each as the mean over counted rows.

    A batch is (inputs, labels), or a mapping that holds the labels and, for each model, the arguments of its forward.
    Models that accept use_cache run with use_cache=False. If the batch has no decoder_input_ids, those of an
    encoder-decoder are made from the labels. The first packed batch is used to check that the models do not attend
    across its examples. Models return logits [..., V], or an output in which :func:`fastkd.distiller.find_logits` finds
    them.

    Args:
        student: any module; checkpoints hold it under "student.".
        teacher: any module.
        loss: a loss with the options to use; None: forward KL at temperature 1.
        optimizer: function that takes the student's parameters and returns an optimizer, such as torch.optim.AdamW or
            a functools.partial of it.
        labels: the name of the labels in a batch.
        shift_labels: True: labels are aligned with the inputs, as in a language model's data set. Position i is then
            trained on the label of i + 1; the last position, and the last one of each packed example, is dropped.
            False: each row of logits has its own label. "auto": shift as a transformers student does itself, which a
            run on the first example detects, unless the labels of the first batch are already the next tokens; False
            for other modules.
        own_loss: "keep": losses that the student adds itself, such as a router's auxiliary loss, are added with the
            student's coefficient and logged as own_loss. "drop": they are omitted.

    Raises:
        ImportError: lightning is not installed.
        TypeError: loss is not a fastkd.KDLoss, or its reduction is not "mean".
        ValueError: a model's outputs are not logits of a distribution over classes; or, at the first batch,
            shift_labels="auto" cannot be resolved because the labels equal the input_ids of an unknown module.
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
            raise ValueError(f"shift_labels must be 'auto', True or False, got {shift_labels!r}")
        check_choice("own_loss", own_loss, ("keep", "drop"))
        models.check_heads(student, teacher)
        loss = KDLoss() if loss is None else loss
        if not isinstance(loss, KDLoss) or loss.options.get("reduction", "mean") != "mean":
            raise TypeError(
                "loss must be a fastkd.KDLoss with reduction='mean', because the module averages over the rows of a "
                f"step; got {loss!r}"
            )
        self.student = student
        self.loss = KDLoss(**{**loss.options, "return_parts": True})
        self._teacher = (teacher.eval().requires_grad_(False),)  # where nn.Module does not find it
        self._optimizer = optimizer
        self._labels = labels
        self._shift = shift_labels
        self._own_loss = own_loss
        self._habits: Habits | None = None
        # The number of counted rows in this step's micro-batches so far.
        self._rows: Tensor | None = None

    @property
    def teacher(self) -> nn.Module:
        """The teacher, which is not a submodule."""
        return self._teacher[0]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the student's output."""
        return self.student(*inputs, **named)

    def on_train_start(self) -> None:
        """Reset the row count, in case an earlier fit was interrupted in the middle of a step."""
        self._rows = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss summed over the rows of a micro-batch, divided by UNIT."""
        loss, counted = self._loss(batch, "train")
        self._rows = counted if self._rows is None else self._rows + counted
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss of a batch."""
        self._loss(batch, "val")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients, which are sums over rows, by the number of rows."""
        rows, self._rows = self._rows, None
        if rows is None:  # a second optimizer in the same step
            return
        # Lightning divides gradients by the number of micro-batches and averages them over devices. The factor below
        # undoes the first; averaging the number of rows over devices accounts for the second.
        rows = self.trainer.strategy.reduce(rows.float(), reduce_op="mean")
        rows = torch.where(rows == 0, 1.0, rows)
        factor = UNIT * self.trainer.accumulate_grad_batches / rows
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, factor)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the student's trainable parameters."""
        return self._optimizer([p for p in self.student.parameters() if p.requires_grad])

    def _loss(self, batch: Any, stage: str) -> tuple[Tensor, Tensor]:
        arguments, named, labels = self._unpacked(batch)
        ignored = self.loss.options.get("ignore_index", models.IGNORED)
        habits = self._student_habits(arguments, named, labels)
        teacher_inputs = models.with_decoder_inputs(
            self.teacher, models.beside(self.teacher, self.student).chosen(named), labels
        )
        with torch.no_grad():
            target = find_logits(self.teacher(*arguments, **teacher_inputs))
        student_inputs = self._student_inputs(named, labels)
        if habits.own == "labels":
            with models.LabelLoss(labels):
                outputs = self.student(*arguments, **student_inputs, labels=labels)
            own = models.loss_in(outputs)
        else:
            outputs = self.student(*arguments, **student_inputs)
            keep = habits.own == "outputs" and self._own_loss == "keep"
            own = models.own_loss(self.student, outputs) if keep else None
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
        if own is not None:
            # Weighted by rows, so that a step averages it over its micro-batches like the rest of the loss.
            loss = loss + own * (parts.counted / UNIT)
            means["own_loss"] = own.detach()
        means["loss"] = loss.detach() * (UNIT / rows)
        named_means = {f"{stage}_{name}": value for name, value in means.items()}
        # Lightning weights batches by batch_size. Counted rows are exact, but reading their number synchronizes with
        # the device, so training uses the batch size.
        size = int(parts.counted) if stage == "val" else len(logits)
        self.log_dict(named_means, batch_size=size, sync_dist=stage == "val")
        return loss, parts.counted

    def _student_inputs(self, named: dict[str, Any], labels: Tensor) -> dict[str, Any]:
        chosen = models.beside(self.student, self.teacher).chosen(named)
        return models.with_decoder_inputs(self.student, chosen, labels)

    def _student_habits(
        self, arguments: tuple[Any, ...], named: dict[str, Any], labels: Tensor
    ) -> Habits:
        """Determine at the first batch how the student treats labels, and check that packed examples are separated."""
        if self._habits is not None:
            return self._habits
        models.check_labels(labels)
        features = models.by_name(self.student, arguments, named)
        all_named = len(features) == len(arguments) + len(named)
        habits = Habits(models.shifts_labels(self.student), "outputs")
        if all_named:
            inputs = self._student_inputs(features, labels)
            habits = models.habits_of(self.student, self.student, inputs, labels, self._own_loss)
        for whose, model, other in (
            ("the student", self.student, self.teacher),
            ("the teacher", self.teacher, self.student),
        ):
            if not arguments:
                inputs = models.beside(model, other).chosen(named)
                inputs = models.with_decoder_inputs(model, inputs, labels)
                models.check_boundaries(model, model, inputs, named, whose)
        if isinstance(self._shift, bool):
            habits = habits._replace(shifts=self._shift)
        elif (
            habits.shifts
            and _labels_are_tokens(features, arguments, labels, 1)
            and not _labels_are_tokens(features, arguments, labels, 0)
        ):
            habits = habits._replace(shifts=False)  # the data set has already shifted them
        elif habits.shifts is None and _labels_are_tokens(features, arguments, labels, 0):
            raise ValueError(
                "shift_labels must be True or False for this student, got 'auto': the labels equal the input_ids, and "
                "it is unknown whether position i predicts the label of i + 1 (a causal language model: True) or its "
                "own label (False)"
            )
        self._habits = habits
        return habits

    def _unpacked(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
        """Return (positional inputs, named inputs, labels) of a batch."""
        if isinstance(batch, Mapping):
            named = dict(batch)
            if named.get(self._labels) is None:
                raise ValueError(
                    f"the batch must have labels under the name {self._labels!r}, got {', '.join(named)}; pass their "
                    "name to DistillationModule(labels=...)"
                )
            return (), named, named.pop(self._labels)
        *arguments, labels = batch
        return tuple(arguments), {}, labels

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if recurse:
            self.teacher._apply(fn)
        return self


@functools.cache
def _module_class() -> type:
    try:
        from lightning import LightningModule
    except ImportError as error:
        raise ImportError(
            "fastkd.compat.lightning.DistillationModule is a LightningModule: pip install lightning"
        ) from error
    members = {"__doc__": _DistillationModule.__doc__, "__module__": __name__}
    return type("DistillationModule", (_DistillationModule, LightningModule), members)


def _labels_are_tokens(
    features: Mapping[str, Any], arguments: tuple[Any, ...], labels: Tensor, offset: int
) -> bool:
    """Whether each label that is not ignored equals the input id `offset` positions later."""
    ids = features.get("input_ids", arguments[0] if arguments else None)
    if not isinstance(ids, Tensor) or ids.shape != labels.shape or ids.is_floating_point():
        return False
    if offset:
        ids, labels = ids[..., offset:], labels[..., :-offset]
    counted = labels != models.IGNORED
    return int(counted.sum()) > 1 and torch.equal(ids[counted], labels[counted])


def __getattr__(name: str) -> Any:
    if name == "DistillationModule":
        return _module_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
