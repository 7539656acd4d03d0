"""Distillation with the Hugging Face Trainer.

    from fastkd.compat.transformers import KDTrainer

    trainer = KDTrainer(student, args, train_dataset=..., teacher_model=teacher, loss_kwargs={"alpha": 0.9})

KDTrainer combines DistillationMixin with transformers.Trainer; the mixin combines with other Trainers in the same way.
compute_loss_func is for code that cannot change its Trainer class. docs/stacks/transformers.md compares the two.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastkd.call.checks import check_choice, teacher_widths
from fastkd.core.models import under_zero3
from fastkd.distiller import models
from fastkd.distiller.models import Habits
from fastkd.functional import Parts
from fastkd.modules import FusedLinearKDLoss, KDLoss
from fastkd.parallel.heads import Captured, Head, redirect
from fastkd.teachers import LinearTeacher, Teacher, TopK

if TYPE_CHECKING:
    _Trainer = Any
else:
    _Trainer = object

# Options that the Trainer determines: it counts labels that are not -100, and divides by their number in the whole
# batch.
_TRAINER_OPTIONS = ("reduction", "ignore_index", "return_parts")
# Options that only the fused linear loss has.
_FUSED_OPTIONS = ("chunk_size", "memory_budget", "logits_dtype", "sequence_dim")
# Elements of a batch that the loss needs. All others are features.
_LOSS_INPUTS = ("labels", "shift_labels", "num_items_in_batch")

# A teacher: a model, or a function of a batch's features (see DistillationMixin).
TeacherModel = nn.Module | Callable[[dict[str, Any]], Teacher]


def _checked_options(
    loss_kwargs: dict[str, Any] | None, shift_labels: object, own_loss: object
) -> dict[str, Any]:
    options = dict(loss_kwargs or {})
    for name in _TRAINER_OPTIONS:
        if name in options:
            raise TypeError(f"loss_kwargs must not have {name!r}: the Trainer decides it")
    if shift_labels not in ("auto", True, False) or isinstance(shift_labels, int) != isinstance(
        shift_labels, bool
    ):
        raise ValueError(f"shift_labels must be 'auto', True or False, got {shift_labels!r}")
    check_choice("own_loss", own_loss, ("keep", "drop"))
    return options


def _shifts(
    requested: bool | str, student_shifts: bool | None, labels: Tensor | None, rows: torch.Size
) -> bool:
    """Return whether the label of a row of logits [*rows, C] is that of the next position.

    Args:
        requested: the option shift_labels.
        student_shifts: whether the student shifts labels itself; None: unknown.
        labels: the batch's labels, or None.
        rows: the leading shape of the logits.
    """
    if len(rows) != 2 or (
        labels is not None and labels.dim() != 2
    ):  # there is no sequence dimension
        if requested is True:
            raise ValueError(
                f"shift_labels=True moves labels along a sequence, and the logits have rows {tuple(rows)}; leave "
                "shift_labels out, or pass False"
            )
        return False
    if isinstance(requested, bool):
        return requested
    if student_shifts is None:
        raise ValueError(
            "shift_labels must be given for this student: it is unknown whether position i predicts the label of i + 1 "
            "(a causal language model whose labels are its input_ids: True) or its own label (False)"
        )
    return student_shifts


def _teacher_outputs(
    teacher: TeacherModel, student: nn.Module, features: dict[str, Any], labels: Any
) -> Any:
    """Return a model's outputs for a batch, or the result of a function of its features."""
    with torch.no_grad():
        if not isinstance(teacher, nn.Module):
            return teacher(features)
        return teacher(**_inputs(teacher, features, student, labels))


def _inputs(
    model: nn.Module, features: dict[str, Any], other: object, labels: Tensor | None
) -> dict[str, Any]:
    """Return a model's keyword arguments, chosen so that student and teacher run under the same conditions."""
    inputs = models.beside(model, other).chosen(features)
    return models.with_decoder_inputs(model, inputs, labels)


def _check_widths(student: int, teacher: Teacher, vocab_size: object, argument: str) -> None:
    """Raise if the vocabularies differ in size and no vocab_size was given; the message names the argument for it."""
    widths = {} if isinstance(teacher, TopK) else teacher_widths(teacher)
    if vocab_size is None and any(width != student for width in widths.values()):
        listed = ", ".join(str(width) for width in widths.values())
        raise ValueError(
            f"the student's logits have {student} columns and the teacher's {listed}; if the additional columns are "
            f"padding of one tokenizer, pass {argument}, the number of real tokens (at most "
            f"{min(student, *widths.values())})"
        )


def _moved(teacher: Teacher, device: torch.device) -> Teacher:
    """Return the teacher on the student's device."""
    if isinstance(teacher, Tensor):
        return teacher.to(device)
    if isinstance(teacher, LinearTeacher) and teacher.hidden.device != device:
        bias = None if teacher.bias is None else teacher.bias.to(device)
        return LinearTeacher(teacher.hidden.to(device), teacher.weight.to(device), bias)
    return teacher


def _check_batch(inputs: dict[str, Any], label_names: Sequence[str]) -> None:
    """Raise if the batch has labels under a name other than 'labels', which the loss would ignore."""
    if inputs.get("labels") is not None or inputs.get("shift_labels") is not None:
        return
    others = [n for n in {"label", "label_ids", *label_names} - {"labels"} if n in inputs]
    if others:
        raise ValueError(
            f"the batch must have its labels under the name 'labels', got {', '.join(sorted(others))}; rename the "
            "column, or let the data collator rename it"
        )


def compute_loss_func(
    student: nn.Module,
    teacher_model: TeacherModel,
    *,
    shift_labels: bool | str = "auto",
    own_loss: str = "keep",
    **loss_kwargs: Any,
) -> Callable[..., Tensor]:
    """Return a distillation loss for ``transformers.Trainer(student, compute_loss_func=...)``.

    The Trainer passes such a function outputs and labels, but not the inputs. A forward pre-hook on the student
    therefore records the arguments of each call, and the loss runs the teacher on them, without gradients and under the
    mixed precision of the Trainer's accelerator. The hook stays on the student. It passes only arguments that the
    student's forward accepts, and use_cache=False.

    The Trainer does not pass labels to the student. An encoder-decoder therefore needs decoder_input_ids in the batch,
    and of the losses that a model adds itself, only those that it returns without labels are kept.

    Args:
        student: the model passed to the Trainer.
        teacher_model: as in :class:`DistillationMixin`. A model must already be on the student's device and in eval
            mode.
        shift_labels: as in :class:`DistillationMixin`. The Trainer counts the labels. If it does not recognize the
            student as a causal language model (a wrapper), the first label of each row must be -100.
        own_loss: as in :class:`DistillationMixin`.
        **loss_kwargs: options of :class:`fastkd.KDLoss`.

    Returns:
        A function (outputs, labels, num_items_in_batch=None) -> loss.

    Raises:
        RuntimeError: at the call, if the student has not been called since the last loss.
        ValueError, TypeError: an option is invalid; or at the call, the batch has no labels, so that the Trainer does
            not count its rows (use :class:`DistillationMixin`), it is unknown whether labels are shifted, or the
            student adds a loss that needs labels.
    """
    loss = KDLoss(**_checked_options(loss_kwargs, shift_labels, own_loss))
    models.check_heads(student, teacher_model)
    _check_columns(student, teacher_model)
    _set_loss_type(student)
    recorded: list[dict[str, Any]] = []  # the features of the student's last call
    habits: list[Habits] = []  # determined at the first loss
    probing: list[bool] = []  # not empty while the hook should pass calls through

    def record(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if probing:
            return None
        named = models.by_name(student, args, kwargs)
        features = {name: named[name] for name in named if name not in _LOSS_INPUTS}
        recorded[:] = [features]
        if models.is_encoder_decoder(student) and not (
            set(features) & {"decoder_input_ids", "decoder_inputs_embeds"}
        ):
            raise ValueError(
                "decoder_input_ids must be in the batch, because the Trainer does not pass labels to the student: use "
                "DataCollatorForSeq2Seq(tokenizer, model=student), or KDTrainer, which makes them from labels"
            )
        loss_inputs = {name: value for name, value in named.items() if name not in features}
        return (), _inputs(student, features, teacher_model, None) | loss_inputs

    student.register_forward_pre_hook(record, with_kwargs=True)

    def student_habits(features: dict[str, Any], labels: Tensor, device: torch.device) -> Habits:
        if not habits:
            probing.append(True)
            try:
                habits.append(_probe(student, teacher_model, features, labels, own_loss, device))
            finally:
                probing.clear()
        return habits[0]

    def distillation_loss(
        outputs: Any, labels: Tensor | None, num_items_in_batch: int | Tensor | None = None
    ) -> Tensor:
        if labels is None:
            raise ValueError(
                "labels are needed by compute_loss_func, got None; KDTrainer accepts batches without labels"
            )
        if not recorded:
            raise RuntimeError(
                "the student has not been called since the last loss; call it once before each loss"
            )
        models.check_labels(labels)
        features = recorded.pop()
        teacher_features = dict(features)
        logits = models.without_soft_prompt(
            student, models.logits_of(outputs, "the student"), labels.shape
        )
        learned = student_habits(features, labels, logits.device)
        with _mixed_precision(logits.device):
            teacher_outputs = _teacher_outputs(teacher_model, student, teacher_features, labels)
        teacher = _logits_or_teacher(teacher_outputs, teacher_model)
        rows = logits.shape[:-1]
        shifts = _shifts(shift_labels, learned.shifts, labels, rows)
        begins = models.starts(features, labels.shape)
        targets = models.targets(labels, shifts, begins)
        models.check_rows(targets, rows)
        if num_items_in_batch is not None and (
            begins is not None or shifts != _trainer_counts_shifted(student)
        ):
            _check_count(student, labels, targets)
        vocab_size = loss.options.get("vocab_size")
        _check_widths(logits.shape[-1], teacher, vocab_size, "vocab_size=... to compute_loss_func")
        total: Tensor = loss(logits, teacher, targets, num_items=num_items_in_batch)
        keep = own_loss == "keep" and learned.own == "outputs"
        own = models.own_loss(student, outputs) if keep else None
        if own is not None:
            counted = (targets != models.IGNORED).sum()
            total = total + _weighted_by_rows(own, counted, num_items_in_batch).to(total.device)
        return total

    return distillation_loss


def _probe(
    student: nn.Module,
    teacher: TeacherModel,
    features: dict[str, Any],
    labels: Tensor,
    own_loss: str,
    device: torch.device,
) -> Habits:
    """Determine how the student treats labels, and check that both models separate packed examples."""
    inputs = _inputs(student, features, teacher, labels)
    habits = models.habits_of(student, student, inputs, labels, own_loss)
    with _mixed_precision(device):
        for whose, model, other in (
            ("student", student, teacher),
            ("teacher_model", teacher, student),
        ):
            if isinstance(model, nn.Module):
                inputs = _inputs(model, features, other, labels)
                models.check_boundaries(model, model, inputs, features, whose)
    if habits.own == "labels" and own_loss == "keep":
        raise ValueError(
            "the student adds a loss of its own that needs labels, which the Trainer does not pass to it; use "
            "KDTrainer, which keeps that loss, or own_loss='drop', which omits it"
        )
    return habits


def _trainer_counts_shifted(student: nn.Module) -> bool:
    """Whether the Trainer omits the first label of each row when it counts labels for a compute_loss_func."""
    trainer = sys.modules.get("transformers.trainer")
    init = getattr(getattr(trainer, "Trainer", None), "__init__", None)
    if "_loss_shifts_labels" not in getattr(getattr(init, "__code__", None), "co_names", ()):
        return False  # this version counts all labels
    inner = models.base(student)
    losses: Any = sys.modules.get("transformers.loss.loss_utils")
    loss = getattr(losses, "LOSS_MAPPING", {}).get(getattr(inner, "loss_type", None))
    return (
        loss is not None and loss is losses.ForCausalLMLoss and not models.is_encoder_decoder(inner)
    )


def _set_loss_type(student: nn.Module) -> None:
    """Set loss_type to "ForCausalLM" for causal language models whose class does not (GPT-2).

    Without a loss_type such a model uses ForCausalLMLoss anyway, but the Trainer would count its labels differently.
    """
    inner: Any = models.base(student)
    if models.shifts_labels(inner) and getattr(inner, "loss_type", "") is None:
        forward = inspect.unwrap(type(inner).forward)
        if "loss_function" in getattr(getattr(forward, "__code__", None), "co_names", ()):
            inner.loss_type = "ForCausalLM"


def _check_count(student: nn.Module, labels: Tensor, targets: Tensor) -> None:
    """Raise if the Trainer's count of labels differs from the number of rows in the loss."""
    trainer_labels = (
        labels[..., 1:] if _trainer_counts_shifted(student) and labels.dim() else labels
    )
    trainer_count, loss_count = (
        int((values != models.IGNORED).sum()) for values in (trainer_labels, targets)
    )
    if trainer_count != loss_count:
        raise ValueError(
            f"the Trainer counts {trainer_count} labels in a batch in which the loss has {loss_count}, and would "
            "divide by the wrong number: set the first label of each row, and of each packed example, to -100; or use "
            "KDTrainer, which counts the rows of the loss"
        )


def _check_columns(student: nn.Module, teacher: TeacherModel) -> None:
    """Raise if the teacher needs token_type_ids, which the Trainer drops because the student does not accept them."""
    if not isinstance(teacher, nn.Module):
        return
    segments = getattr(getattr(models.base(teacher), "config", None), "type_vocab_size", 0) or 0
    if segments < 2 or "token_type_ids" not in models.signature(teacher).names:
        return
    if "token_type_ids" not in models.signature(student).names:
        raise ValueError(
            "token_type_ids are an input of the teacher but not of the student, so the Trainer drops them from the "
            "batch; use KDTrainer, which keeps the inputs of both models"
        )


def _gathering(teacher: nn.Module) -> nn.Module:
    """Return a teacher whose forward works if DeepSpeed ZeRO-3 has partitioned it.

    While a Trainer uses ZeRO-3, transformers loads every model in partitions, which only the hooks of an engine gather.
    """
    if isinstance(getattr(teacher, "module", None), nn.Module) or not any(
        under_zero3(parameter) for parameter in teacher.parameters()
    ):
        return teacher
    import deepspeed  # type: ignore[import-not-found]

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine: nn.Module = deepspeed.initialize(model=teacher.requires_grad_(False), config=config)[0]
    return engine


def _weighted_by_rows(own: Tensor, counted: Tensor, num_items: int | Tensor | None) -> Tensor:
    """Weight a batch's own loss by its share of the step's rows, so that a step averages it over all its rows."""
    if num_items is None:
        return own
    items = torch.as_tensor(num_items, device=own.device).clamp(min=1)
    return own * (counted.to(own.device) / items)


def _logits_or_teacher(outputs: Any, teacher: TeacherModel) -> Any:
    """Return the logits in a model's outputs, or the outputs of a function unchanged."""
    return models.logits_of(outputs, "the teacher") if isinstance(teacher, nn.Module) else outputs


def _mixed_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context under which accelerate runs the student.

    accelerate wraps the forward of prepared models only, and compute_loss_func's teacher is not prepared.
    """
    library = sys.modules.get("accelerate.state")
    shared = getattr(getattr(library, "AcceleratorState", None), "_shared_state", None) or {}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(shared.get("_mixed_precision", ""))
    if dtype is None or torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


class DistillationMixin(_Trainer):
    """Mixin that adds distillation to a ``transformers.Trainer``: ``class MyTrainer(DistillationMixin, Trainer)``.

    The teacher runs on the features of each batch, without gradients. Columns of the data set that either model accepts
    are kept, and each model receives those that it accepts. Both run with use_cache=False. If the batch has no
    decoder_input_ids, those of an encoder-decoder are made from the labels.

    A row (a position) is counted if its label is not -100; in a batch without labels, if it predicts a token that is
    not padding. The loss is the sum over rows divided by the Trainer's num_items_in_batch, so accumulating 8 batches of
    1 gives the gradient of 1 batch of 8, on any number of processes. Without labels the Trainer does not count rows,
    and averages the means of the batches. If alpha < 1 both terms are logged, as kd_loss and ce_loss, each the mean
    over the rows since the last log.

    Args:
        *args: arguments of the Trainer.
        **kwargs: keyword arguments of the Trainer. ``args.label_smoothing_factor`` applies to the cross-entropy.
        teacher_model: a model that returns logits of the same rows. It is set to eval mode and placed by
            ``accelerator.prepare_model(..., evaluation_mode=True)``: a full copy on every process, under the Trainer's
            mixed precision. A teacher that ZeRO-3 has partitioned becomes a DeepSpeed engine. Or a function of the
            batch's features, a dict from which it may remove what the student should not see. The function returns any
            teacher that :func:`fastkd.kd_loss` accepts, for example a :class:`fastkd.TopK` from a cache, with the
            leading shape of the student's logits and not shifted. The columns of the data set are kept for it.
        loss_kwargs: options of :class:`fastkd.KDLoss`, or with fused of :class:`fastkd.FusedLinearKDLoss`: divergence,
            temperature, alpha, ...
        shift_labels: True: position i is trained on the label of i + 1, as in a causal language model whose labels are
            its input_ids; False: on its own label. "auto": as the student itself treats labels, which a run on the
            first example or else its class shows (False for encoder-decoders and for logits without a sequence
            dimension). With True the first token of each example of a packed batch is not a label.
        own_loss: "keep": losses that the student adds to the cross-entropy itself, such as a router's auxiliary loss,
            are added with the student's coefficient, averaged over the rows of a step, and logged as own_loss. "drop":
            they are omitted.
        fused: compute the loss from hidden states and lm_heads by :func:`fastkd.fused_linear_kd_loss`, without holding
            logits [rows, V], on one device or under DDP, FSDP2 or DeepSpeed. :func:`fastkd.parallel.head` says which
            lm_heads are supported. The scale and softcap of the logits are read from each model's configuration, unless
            loss_kwargs has them; the first batch is checked for this. An evaluation that returns predictions still
            computes logits.

    Raises:
        ValueError, TypeError: at construction, an option is invalid, or a model's outputs are not logits of a
            distribution over classes; at the first batch, a model does not support fused, it is unknown whether labels
            are shifted, or a model attends across the examples of a packed batch.
    """

    def __init__(
        self,
        *args: Any,
        teacher_model: TeacherModel,
        loss_kwargs: dict[str, Any] | None = None,
        shift_labels: bool | str = "auto",
        own_loss: str = "keep",
        fused: bool = False,
        **kwargs: Any,
    ) -> None:
        options = _checked_options(loss_kwargs, shift_labels, own_loss)
        super().__init__(*args, **kwargs)
        self._check_trainer()
        models.check_heads(self.model, teacher_model)
        smoothing = self.args.label_smoothing_factor
        if smoothing:
            if options.get("alpha", 1.0) == 1.0:
                raise ValueError(
                    f"label_smoothing_factor={smoothing} applies to the cross-entropy, which alpha=1 omits; set "
                    "loss_kwargs={'alpha': ...} below 1"
                )
            if options.setdefault("label_smoothing", smoothing) != smoothing:
                raise ValueError(
                    f"label_smoothing is {options['label_smoothing']} in loss_kwargs, but "
                    f"label_smoothing_factor is {smoothing}; set only one of them"
                )
        if isinstance(teacher_model, nn.Module):
            if teacher_model is self.model:
                raise ValueError(
                    "teacher_model must not be the student itself; pass another model or a copy"
                )
            prepared = self.accelerator.prepare_model(teacher_model, evaluation_mode=True)
            teacher_model = _gathering(prepared)
            teacher_model.eval()  # an engine's returns nothing
        self.teacher_model = teacher_model
        self._loss = KDLoss(return_parts=True, **self._dense_options(options, fused))
        self._fused_loss = FusedLinearKDLoss(return_parts=True, **options) if fused else None
        # With fused: the lm_heads of both models, and the options that were given.
        self._heads: dict[str, Head] = {}
        self._fused_options = frozenset(options)
        self._logs_parts = options.get("alpha", 1.0) < 1.0
        # Sums of distillation, cross-entropy, own loss and rows since the last log.
        self._sums: Tensor | None = None
        self._wants_predictions = False
        self._checked_heads = False
        # Allows evaluation without labels, if args.label_names is [].
        self.can_return_loss = True
        # The Trainer counts labels only for models that accept their number. Here the loss accepts it.
        self.model_accepts_loss_kwargs = True
        # The labels that the Trainer counts (_get_num_items_in_batch) are already shifted.
        self._loss_shifts_labels = False
        self._requested_shift, self._keeps_own_loss = shift_labels, own_loss == "keep"
        self._habits: Habits | None = None
        self._checked_boundaries = False
        # The Trainer's constructor looked up the columns before the teacher was known; look them up again.
        self._signature_columns: Any = None
        self._teacher_columns: set[str] = (
            set()
        )  # columns kept only for a teacher that is a function

    def _set_signature_columns_if_needed(self) -> None:
        """Add the arguments of the teacher's forward to the Trainer's columns."""
        super()._set_signature_columns_if_needed()
        teacher = getattr(self, "teacher_model", None)
        columns = {"labels", "shift_labels"}
        for model in (self.model, teacher):
            if isinstance(model, nn.Module):
                columns |= models.signature(model).names
        self._signature_columns += sorted(columns - set(self._signature_columns))

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Remove unused columns like the Trainer, but keep all columns except text for a teacher that is a function."""
        if self.args.remove_unused_columns and not isinstance(self.teacher_model, nn.Module):
            self._set_signature_columns_if_needed()
            others = {
                name
                for name, feature in (dataset.features or {}).items()
                if getattr(feature, "dtype", None) not in ("string", "large_string")
            }.difference(self._signature_columns)
            self._teacher_columns |= others
            self._signature_columns += sorted(others)
        return super()._remove_unused_columns(dataset, description=description)

    def _get_collator_with_removed_columns(
        self, data_collator: Any, description: Any = None
    ) -> Any:
        """Return the Trainer's collator, but keep all columns for a teacher that is a function."""
        if not isinstance(self.teacher_model, nn.Module):
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description=description)

    def _dense_options(self, options: dict[str, Any], fused: bool) -> dict[str, Any]:
        """Return the options for logits that the models compute themselves, which are already scaled and capped."""
        if not fused:
            return options
        omitted = [*_FUSED_OPTIONS, "logit_scale", "softcap"]
        if isinstance(self.teacher_model, nn.Module):
            omitted += ["teacher_logit_scale", "teacher_softcap"]
        return {name: value for name, value in options.items() if name not in omitted}

    def _check_trainer(self) -> None:
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func would not be called, because DistillationMixin computes the loss; remove it, or use "
                "a plain Trainer with fastkd.compat.transformers.compute_loss_func"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process has {self.args.n_gpu} GPUs (DataParallel); start one process per GPU with torchrun or "
                "accelerate launch"
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and parallelism.sp_enabled:
            raise ValueError(
                "sequence parallelism is not supported, because the Trainer replaces the loss under it; disable it in "
                "the accelerator's parallelism_config"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """Return the loss of one batch, like Trainer.compute_loss; with return_outputs (loss, student's outputs)."""
        _check_batch(inputs, self.label_names)
        self._probe_student(model, inputs)
        from_hidden = self._fused_loss is not None and not self._wants_predictions
        compute = self._loss_of_hidden_states if from_hidden else self._loss_of_logits
        (loss, parts), outputs, own = compute(model, inputs, num_items_in_batch)
        if own is not None:
            own = own.to(loss.device)
            loss = loss + _weighted_by_rows(own, parts.counted, num_items_in_batch)
        if (self._logs_parts or own is not None) and model.training:
            own_sum = parts.counted * (0.0 if own is None else own.detach())
            terms = (parts.distillation.sum(), parts.cross_entropy.sum(), own_sum, parts.counted)
            sums = torch.stack([term.to(torch.float32) for term in terms])
            self._sums = sums if self._sums is None else self._sums + sums
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # num_items_in_batch counts the rows of all processes, but DDP averages their gradients.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _features(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name not in _LOSS_INPUTS}

    def _student_inputs(self, features: dict[str, Any], labels: Tensor | None) -> dict[str, Any]:
        accepted = {n: v for n, v in features.items() if n not in self._teacher_columns}
        return _inputs(self.model, accepted, self.teacher_model, labels)

    def _probe_student(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Determine at the first batch how the student treats labels, and check that packed examples are separated."""
        labels = inputs.get("labels")
        if labels is not None:
            models.check_labels(labels)
        if self._habits is not None and self._checked_boundaries:
            return
        features = self._features(inputs)
        if self._habits is None:
            call = self.accelerator.unwrap_model(model, keep_torch_compile=False) if (
                self.args.torch_compile
            ) else model  # fmt: skip
            student_inputs = self._student_inputs(features, labels)
            if not isinstance(self.teacher_model, nn.Module) and models.from_transformers(
                self.model
            ):
                # The teacher function has not run yet, so its columns have not been removed from the features.
                names = {*models.signature(self.model).names, *models.BOUNDARIES}
                student_inputs = {n: v for n, v in student_inputs.items() if n in names}
            own_loss = "keep" if self._keeps_own_loss else "drop"
            fused = self._fused_loss is not None
            captured = self._head("model", model).captured(project=True) if fused else None
            with captured or contextlib.nullcontext():
                self._habits = models.habits_of(call, self.model, student_inputs, labels, own_loss)
        if not self._checked_boundaries and any(name in features for name in models.BOUNDARIES):
            self._checked_boundaries = True
            for whose, inner, call, other in (
                ("the student", self.model, model, self.teacher_model),
                ("teacher_model", self.teacher_model, self.teacher_model, self.model),
            ):
                if isinstance(inner, nn.Module):
                    model_inputs = _inputs(inner, features, other, labels)
                    models.check_boundaries(inner, call, model_inputs, features, whose)

    def _rows(
        self, inputs: dict[str, Any], shape: torch.Size
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (labels of the rows of logits [*shape, C], None), or (None, mask of counted rows) without labels."""
        shifted_labels, labels = inputs.get("shift_labels"), inputs.get("labels")
        if shifted_labels is not None:
            models.check_rows(shifted_labels, shape)
            return shifted_labels, None
        shifts = self._shift(labels, shape)
        features = self._features(inputs)
        if labels is None:
            return None, models.counted_without_labels(self.model, features, shape, shifts)
        targets = models.targets(labels, shifts, models.starts(features, labels.shape))
        models.check_rows(targets, shape)
        return targets, None

    def _shift(self, labels: Tensor | None, shape: torch.Size) -> bool:
        student_shifts = None if self._habits is None else self._habits.shifts
        return _shifts(self._requested_shift, student_shifts, labels, shape)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Return the Trainer's count of the labels, aligned as in the loss."""
        counted = []
        for batch in batch_samples:
            labels = batch.get("shift_labels")
            if labels is None:
                labels = batch.get("labels")
                if labels is None:
                    return super()._get_num_items_in_batch(batch_samples, device)
                self._probe_student(self.model_wrapped, self._prepare_inputs(batch))
                begins = models.starts(batch, labels.shape)
                labels = models.targets(labels, self._shift(labels, labels.shape), begins)
            counted.append({"labels": labels})
        return super()._get_num_items_in_batch(counted, device)

    def _student_call(
        self, features: dict[str, Any], labels: Tensor | None
    ) -> tuple[dict[str, Any], AbstractContextManager[Any], Callable[[Any], Tensor | None]]:
        """Return (the student's inputs, the context of its call, the loss that it adds itself, from its outputs)."""
        inputs = self._student_inputs(features, labels)
        assert self._habits is not None
        if not self._keeps_own_loss or self._habits.own == "nothing":
            return inputs, contextlib.nullcontext(), lambda outputs: None
        if self._habits.own == "outputs" or labels is None:
            return inputs, contextlib.nullcontext(), partial(models.own_loss, self.model)
        return inputs | {"labels": labels}, models.LabelLoss(labels), models.loss_in

    def _loss_of_logits(
        self, model: nn.Module, inputs: dict[str, Any], num_items: int | Tensor | None
    ) -> tuple[tuple[Tensor, Parts], Any, Tensor | None]:
        features, labels = self._features(inputs), inputs.get("labels")
        teacher_outputs = _teacher_outputs(self.teacher_model, self.model, features, labels)
        teacher = _logits_or_teacher(teacher_outputs, self.teacher_model)
        student_inputs, context, own_loss_in = self._student_call(features, labels)
        with context:
            outputs = model(**student_inputs)
        logits = models.logits_of(outputs, "the student")
        logits = models.without_soft_prompt(model, logits, _token_shape(inputs))
        targets, mask = self._rows(inputs, logits.shape[:-1])
        teacher = _moved(teacher, logits.device)
        vocab_size = self._loss.options.get("vocab_size")
        _check_widths(logits.shape[-1], teacher, vocab_size, "loss_kwargs={'vocab_size': ...}")
        row_options = {"labels": targets, "mask": mask, "num_items": num_items}
        return self._loss(logits, teacher, **row_options), outputs, own_loss_in(outputs)

    def _loss_of_hidden_states(
        self, model: nn.Module, inputs: dict[str, Any], num_items: int | Tensor | None
    ) -> tuple[tuple[Tensor, Parts], Any, Tensor | None]:
        features, labels = self._features(inputs), inputs.get("labels")
        if not isinstance(self.teacher_model, nn.Module):
            teacher = _teacher_outputs(self.teacher_model, self.model, features, labels)
            return self._fused_step(model, inputs, features, teacher, num_items)
        head = self._head("teacher_model", self.teacher_model)
        with head.captured(project=not self._checked_heads or None) as captured:
            outputs = _teacher_outputs(self.teacher_model, self.model, features, labels)
        if not self._checked_heads:
            self._check_logits("teacher_", models.logits_of(outputs, "the teacher"), captured)
        with head.gathered(captured.hidden.dtype) as (weight, bias):
            teacher = LinearTeacher(captured.hidden, weight, bias)
            return self._fused_step(model, inputs, features, teacher, num_items)

    def _fused_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        features: dict[str, Any],
        teacher: Teacher,
        num_items: int | Tensor | None,
    ) -> tuple[tuple[Tensor, Parts], Any, Tensor | None]:
        """Run the student, and inside its forward the loss of its hidden states."""
        head, fused_loss = self._head("model", model), self._fused_loss
        assert fused_loss is not None
        student_inputs, context, own_loss_in = self._student_call(features, inputs.get("labels"))
        kept: list[Parts] = []  # apart from the outputs, because wrappers may cast those

        def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            hidden = models.without_soft_prompt(model, hidden, _token_shape(inputs))
            targets, mask = self._rows(inputs, hidden.shape[:-1])
            target = _moved(teacher, hidden.device)
            vocab_size = fused_loss.options.get("vocab_size")
            _check_widths(len(weight), target, vocab_size, "loss_kwargs={'vocab_size': ...}")
            row_options = {"labels": targets, "mask": mask, "num_items": num_items}
            # accelerate enables autocast only inside the models' forward
            with self.accelerator.autocast():
                loss, parts = fused_loss(hidden, weight, target, student_bias=bias, **row_options)
            kept.append(parts)
            return loss

        def step(forward: Callable[..., Any], **student_inputs: Any) -> tuple[Tensor, Any]:
            with context, head.captured(project=not self._checked_heads or None) as captured:
                outputs = forward(**student_inputs)
            if not self._checked_heads:
                self._check_logits("", models.logits_of(outputs, "the student"), captured)
                self._checked_heads = True
            return head.apply(loss_of, captured.hidden), outputs

        loss, outputs = redirect(model, step, **student_inputs)
        return (loss, kept[0]), outputs, own_loss_in(outputs)

    def _head(self, name: str, model: nn.Module) -> Head:
        """Return the lm_head of the student ("model") or of the teacher ("teacher_model"), wrapped as it is now."""
        head = self._heads.get(name)
        if head is None or head.model is not model:
            head = Head(model, name=name, otherwise="leave fused out", by_hand="")
            self._heads[name] = head
            side = "" if name == "model" else "teacher_"
            for option, value in (("logit_scale", head.logit_scale), ("softcap", head.softcap)):
                if side + option not in self._fused_options:
                    setattr(self._fused_loss, side + option, value)
        return head

    def _check_logits(self, side: str, logits: Tensor, captured: Captured) -> None:
        """Raise unless a model's logits are those of its lm_head with the scale and softcap of the loss.

        Synchronizes with the device.

        Args:
            side: "" for the student's options, "teacher_" for the teacher's.
            logits: [..., 1, V], the model's, of the first position.
            captured: the output of its lm_head for the first position.
        """
        options = {} if self._fused_loss is None else self._fused_loss.options
        self._heads["teacher_model" if side else "model"].check_logits(
            logits,
            captured,
            options.get(f"{side}logit_scale", 1.0),
            options.get(f"{side}softcap"),
            f"set {side}logit_scale and {side}softcap in loss_kwargs to match the model",
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Run the Trainer's prediction step; with fused, compute logits if predictions are requested."""
        self._wants_predictions = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._wants_predictions = False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add kd_loss, ce_loss (if alpha < 1) and own_loss (if the student has one) to a training log."""
        if self._sums is not None and self.model.training:
            kd, ce, own, rows = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            logs["kd_loss"] = kd / max(rows, 1)
            if self._logs_parts:
                logs["ce_loss"] = ce / max(rows, 1)
            if self._habits is not None and self._habits.own != "nothing" and own:
                logs["own_loss"] = own / max(rows, 1)
            self._sums = None
        super().log(logs, *args, **kwargs)


def _token_shape(inputs: dict[str, Any]) -> torch.Size | None:
    """Return the shape [B, S] of a batch's tokens, or None if it cannot be determined."""
    for name in ("labels", "shift_labels", "input_ids"):
        value = inputs.get(name)
        if isinstance(value, Tensor):
            return value.shape
    embeds = inputs.get("inputs_embeds")
    return embeds.shape[:-1] if isinstance(embeds, Tensor) else None


def _kd_trainer() -> type:
    try:
        from transformers import Trainer
    except ModuleNotFoundError as error:
        raise ImportError(
            "fastkd.compat.transformers.KDTrainer needs transformers: pip install 'transformers[torch]'"
        ) from error
    members = {"__doc__": DistillationMixin.__doc__, "__module__": __name__}
    return type("KDTrainer", (DistillationMixin, Trainer), members)


def __getattr__(name: str) -> Any:
    """Build KDTrainer at first access, because importing transformers takes seconds."""
    if name != "KDTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _kd_trainer())
