"""The Hugging Face Trainer: a teacher beside the student, and fastkd's loss.

    from fastkd.compat.transformers import KDTrainer

    trainer = KDTrainer(student, args, train_dataset=..., teacher_model=teacher, loss_kwargs={"alpha": 0.9})

KDTrainer is DistillationMixin before transformers.Trainer; the mixin goes before any other Trainer the same way.
compute_loss_func is for code that cannot change the class of its Trainer. docs/stacks/transformers.md compares them.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastkd.call.checks import check_choice, teacher_widths
from fastkd.distiller import models
from fastkd.distiller.models import Habits
from fastkd.functional import Parts
from fastkd.modules import FusedLinearKDLoss, KDLoss
from fastkd.teachers import LinearTeacher, Teacher, TopK

if TYPE_CHECKING:
    _Trainer = Any
else:
    _Trainer = object

# What the Trainer decides: it counts labels that are not -100, and divides by their number in the whole batch.
_OF_THE_TRAINER = ("reduction", "ignore_index", "return_parts")
# Options of the fused linear loss that the other has no use for.
_OF_CHUNKS = ("chunk_size", "memory_budget", "logits_dtype", "sequence_dim")
# Inputs that are no features.
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")

# A teacher: a model, or a function of a batch (see DistillationMixin).
TeacherModel = nn.Module | Callable[[dict[str, Any]], Teacher]


def _checked(
    loss_kwargs: dict[str, Any] | None, shift_labels: object, own_loss: object
) -> dict[str, Any]:
    options = dict(loss_kwargs or {})
    for name in _OF_THE_TRAINER:
        if name in options:
            raise TypeError(f"loss_kwargs must not have {name!r}: the Trainer decides it")
    if shift_labels not in ("auto", True, False) or isinstance(shift_labels, int) != isinstance(
        shift_labels, bool
    ):
        raise ValueError(f"shift_labels must be 'auto', True or False, got {shift_labels!r}")
    check_choice("own_loss", own_loss, ("keep", "drop"))
    return options


def _shifts(asked: bool | str, known: bool | None, labels: Tensor | None, rows: torch.Size) -> bool:
    """Whether the label of a row of logits [*rows, C] is that of the next position."""
    if len(rows) != 2 or (labels is not None and labels.dim() != 2):  # no sequence to move along
        if asked is True:
            raise ValueError(
                f"shift_labels=True moves labels along a sequence, and the logits have rows {tuple(rows)}; leave "
                "shift_labels out, or pass False"
            )
        return False
    if isinstance(asked, bool):
        return asked
    if known is None:
        raise ValueError(
            "shift_labels must be given for this student, of which it cannot be known whether position i predicts the "
            "label of i + 1 (a causal language model whose labels are its input_ids: True) or its own label (False)"
        )
    return known


def _ask(teacher: TeacherModel, student: nn.Module, features: dict[str, Any], labels: Any) -> Any:
    """What the teacher says of a batch: a model's outputs, or what a function of the features returns."""
    with torch.no_grad():
        if not isinstance(teacher, nn.Module):
            return teacher(features)
        return teacher(**_inputs(teacher, features, student, labels))


def _inputs(
    model: nn.Module, features: dict[str, Any], other: object, labels: Tensor | None
) -> dict[str, Any]:
    """What a model is called with, under conditions that are the same for student and teacher."""
    given = models.beside(model, other).chosen(features)
    return models.with_decoder_inputs(model, given, labels)


def _same_widths(student: int, teacher: Teacher, vocab_size: object, where: str) -> None:
    """Raise for two vocabularies of which nobody said how many columns count."""
    widths = {} if isinstance(teacher, TopK) else teacher_widths(teacher)
    if vocab_size is None and any(width != student for width in widths.values()):
        listed = ", ".join(str(width) for width in widths.values())
        raise ValueError(
            f"the student's logits have {student} columns and the teacher's {listed}; if the rest is padding of one "
            f"tokenizer, pass {where}, the number of real tokens (at most {min(student, *widths.values())})"
        )


def _moved(teacher: Teacher, device: torch.device) -> Teacher:
    """The teacher on the student's device."""
    if isinstance(teacher, Tensor):
        return teacher.to(device)
    if isinstance(teacher, LinearTeacher) and teacher.hidden.device != device:
        bias = None if teacher.bias is None else teacher.bias.to(device)
        return LinearTeacher(teacher.hidden.to(device), teacher.weight.to(device), bias)
    return teacher


def _check_batch(inputs: dict[str, Any], label_names: Sequence[str]) -> None:
    """Raise for labels of a name under which nobody would look for them."""
    if inputs.get("labels") is not None or inputs.get("shift_labels") is not None:
        return
    others = [n for n in {"label", "label_ids", *label_names} - {"labels"} if n in inputs]
    if others:
        raise ValueError(
            f"the batch must have its labels under the name 'labels', and this one has {', '.join(sorted(others))}; "
            "rename the column, or have the data collator do it"
        )


def compute_loss_func(
    student: nn.Module,
    teacher_model: TeacherModel,
    *,
    shift_labels: bool | str = "auto",
    own_loss: str = "keep",
    **loss_kwargs: Any,
) -> Callable[..., Tensor]:
    """A loss for ``transformers.Trainer(student, compute_loss_func=...)``.

    The Trainer gives such a function outputs and labels, and no inputs. So that the teacher sees the batch, a forward
    pre-hook, which stays on the student, notes what it is called with; the loss then asks the teacher the same,
    without gradients, under the mixed precision of the Trainer's accelerator. The hook hands the student what its
    forward takes, and use_cache=False.

    The Trainer takes labels away from the student, so an encoder-decoder needs decoder_input_ids in the batch, and of
    the losses that a model adds to its own, only those that it returns without labels are kept.

    Args:
        student: the model that the Trainer is given.
        teacher_model: as :class:`DistillationMixin` takes it. A model has to be on the student's device, and in eval
            mode, already.
        shift_labels: as in :class:`DistillationMixin`. The Trainer counts labels; where it does not know the student
            for a causal language model (a wrapper), the first label of a row has to be -100.
        own_loss: as in :class:`DistillationMixin`.
        **loss_kwargs: options of :class:`fastkd.KDLoss`.

    Returns:
        (outputs, labels, num_items_in_batch=None) -> the loss.

    Raises:
        RuntimeError: the student has not been called since the last loss.
        ValueError, TypeError: from the options; at the call, for a batch without labels, whose rows the Trainer does
            not count (:class:`DistillationMixin` takes them), for labels of which it cannot be known whether they are
            shifted, and for a loss of the student's own that needs labels.
    """
    loss = KDLoss(**_checked(loss_kwargs, shift_labels, own_loss))
    models.check_heads(student, teacher_model)
    _check_columns(student, teacher_model)
    _name_loss_type(student)
    seen: list[dict[str, Any]] = []
    habits: list[Habits] = []
    probing: list[bool] = []

    def note(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if probing:
            return None
        named = models.by_name(student, args, kwargs)
        features = {name: named[name] for name in named if name not in _OF_THE_LOSS}
        seen[:] = [features]
        if models.is_encoder_decoder(student) and not (
            set(features) & {"decoder_input_ids", "decoder_inputs_embeds"}
        ):
            raise ValueError(
                "decoder_input_ids must be in the batch, as the Trainer takes labels away from the student: use "
                "DataCollatorForSeq2Seq(tokenizer, model=student), or KDTrainer, which makes them from labels"
            )
        rest = {name: value for name, value in named.items() if name not in features}
        return (), _inputs(student, features, teacher_model, None) | rest

    student.register_forward_pre_hook(note, with_kwargs=True)

    def distillation_loss(
        outputs: Any, labels: Tensor | None, num_items_in_batch: int | Tensor | None = None
    ) -> Tensor:
        if labels is None:
            raise ValueError(
                "labels are needed by compute_loss_func; KDTrainer takes batches without"
            )
        if not seen:
            raise RuntimeError("the student has not been called since the last loss")
        models.check_labels(labels)
        features = seen.pop()
        given = dict(features)
        logits = models.without_soft_prompt(
            student, models.logits_of(outputs, "the student"), labels.shape
        )
        if not habits:
            probing.append(True)
            try:
                own = _inputs(student, features, teacher_model, labels)
                habits.append(models.habits_of(student, student, own, labels, own_loss))
                with _mixed_precision(logits.device):
                    for whose, model in (("student", student), ("teacher_model", teacher_model)):
                        if isinstance(model, nn.Module):
                            other = teacher_model if model is student else student
                            inputs = _inputs(model, features, other, labels)
                            models.check_boundaries(model, model, inputs, features, whose)
            finally:
                probing.clear()
            if habits[0].own == "labels" and own_loss == "keep":
                habits.clear()
                raise ValueError(
                    "the student adds a loss of its own to that of labels, which the Trainer takes away from it; "
                    "KDTrainer keeps such a loss, and own_loss='drop' leaves it out in so many words"
                )
        with _mixed_precision(logits.device):
            said = _ask(teacher_model, student, given, labels)
        teacher = _teacher_of(said, teacher_model)
        rows = logits.shape[:-1]
        shifts = _shifts(shift_labels, habits[0].shifts, labels, rows)
        begins = models.starts(features, labels.shape)
        targets = models.targets(labels, shifts, begins)
        models.check_rows(targets, rows)
        if num_items_in_batch is not None and (
            begins is not None or shifts != _counts_shifted(student)
        ):
            _check_count(student, labels, targets)
        vocab_size = loss.options.get("vocab_size")
        _same_widths(logits.shape[-1], teacher, vocab_size, "vocab_size=... to compute_loss_func")
        found: Tensor = loss(logits, teacher, targets, num_items=num_items_in_batch)
        if own_loss == "keep" and habits[0].own == "outputs":
            added = models.own_loss(student, outputs)
            if added is not None:
                counted = (targets != models.IGNORED).sum()
                found = found + _share(added, counted, num_items_in_batch).to(found.device)
        return found

    return distillation_loss


def _counts_shifted(student: nn.Module) -> bool:
    """Whether the Trainer counts the labels of a batch from the second of each row on, for a compute_loss_func."""
    trainer = sys.modules.get("transformers.trainer")
    init = getattr(getattr(trainer, "Trainer", None), "__init__", None)
    if "_loss_shifts_labels" not in getattr(getattr(init, "__code__", None), "co_names", ()):
        return False  # of versions that count them all
    inner = models.base(student)
    losses: Any = sys.modules.get("transformers.loss.loss_utils")
    found = getattr(losses, "LOSS_MAPPING", {}).get(getattr(inner, "loss_type", None))
    return (
        found is not None
        and found is losses.ForCausalLMLoss
        and not models.is_encoder_decoder(inner)
    )


def _name_loss_type(student: nn.Module) -> None:
    """Says of a causal language model that its loss is ForCausalLMLoss, where its class does not (GPT-2).

    It is the loss that the model falls back to without a loss_type; by the loss_type the Trainer counts labels.
    """
    inner: Any = models.base(student)
    if models.shifts_labels(inner) and getattr(inner, "loss_type", "") is None:
        forward = inspect.unwrap(type(inner).forward)
        if "loss_function" in getattr(getattr(forward, "__code__", None), "co_names", ()):
            inner.loss_type = "ForCausalLM"


def _check_count(student: nn.Module, labels: Tensor, targets: Tensor) -> None:
    """Raise where the Trainer has counted labels that are none of this loss, or not all of them."""
    theirs = labels[..., 1:] if _counts_shifted(student) and labels.dim() else labels
    counts = [int((some != models.IGNORED).sum()) for some in (theirs, targets)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"the Trainer counts {counts[0]} labels in a batch in which the loss has {counts[1]}, and would divide by "
            "the wrong number: the first label of a row, and of each packed example, must be -100 here; or use "
            "KDTrainer, which counts for itself"
        )


def _check_columns(student: nn.Module, teacher: TeacherModel) -> None:
    """Raise where the teacher tells segments apart by a column that the Trainer drops."""
    if not isinstance(teacher, nn.Module):
        return
    segments = getattr(getattr(models.base(teacher), "config", None), "type_vocab_size", 0) or 0
    if segments < 2 or "token_type_ids" not in models.signature(teacher).names:
        return
    if "token_type_ids" not in models.signature(student).names:
        raise ValueError(
            "token_type_ids are an input of the teacher and none of the student, so that the Trainer drops them from "
            "the batch; use KDTrainer, which keeps what either of them takes"
        )


def _share(own: Tensor, counted: Tensor, num_items: int | Tensor | None) -> Tensor:
    """What a model adds to the loss of a batch, weighted so that a step has the mean over the rows of its batches."""
    if num_items is None:
        return own
    items = torch.as_tensor(num_items, device=own.device).clamp(min=1)
    return own * (counted.to(own.device) / items)


def _teacher_of(said: Any, teacher: TeacherModel) -> Any:
    return models.logits_of(said, "the teacher") if isinstance(teacher, nn.Module) else said


def _mixed_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What accelerate runs the student under; it wraps the forward of models that it has prepared, and no others."""
    library = sys.modules.get("accelerate.state")
    shared = getattr(getattr(library, "AcceleratorState", None), "_shared_state", None) or {}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(shared.get("_mixed_precision", ""))
    if dtype is None or torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


class DistillationMixin(_Trainer):
    """A ``transformers.Trainer`` that distils: ``class MyTrainer(DistillationMixin, Trainer)``.

    The teacher sees the features of each batch, without gradients. Columns of the data set are kept where the student
    or the teacher names them, and each model gets those that it names. Both run with use_cache=False, and an
    encoder-decoder's decoder_input_ids are made from labels where the batch has none.

    A row (a position) counts where its label is not -100; in a batch without labels, where it predicts a token that is
    no padding. The loss is summed and divided by the Trainer's num_items_in_batch, so that 8 batches of 1 that are
    accumulated have the gradient of 1 batch of 8, on any number of processes; without labels the Trainer does not
    count, and takes the mean of the batches' means. Where alpha < 1, the log has both terms, kd_loss and ce_loss, as
    means over the rows since the last log.

    Args:
        *args: of the Trainer.
        **kwargs: of the Trainer. ``args.label_smoothing_factor`` is that of the cross-entropy.
        teacher_model: a model that gives logits of the same rows; it is set to eval mode and placed by
            ``accelerator.prepare_model(..., evaluation_mode=True)``: whole on every process, under the Trainer's mixed
            precision. Or a function of the batch's features (a dict, from which it may take what the student must not
            see) that returns what :func:`fastkd.kd_loss` takes for a teacher, of the shape of the student's
            logits, unshifted: a :class:`fastkd.TopK` from a cache, say. The data set's columns are kept for it.
        loss_kwargs: options of :class:`fastkd.KDLoss` (of :class:`fastkd.FusedLinearKDLoss` where fused): divergence,
            temperature, alpha, ...
        shift_labels: True: the label of position i is that of i + 1, as in a causal language model whose labels are
            its input_ids; False: its own. "auto": what the student does with labels itself, seen in a run on the first
            example, or else known from its class (False for encoder-decoders and for logits without a sequence). With
            True the first token of each example of a packed batch is no label.
        own_loss: "keep": what the student adds to the cross-entropy by itself, such as a router's auxiliary loss, is
            added to the loss with the student's own coefficient; over the batches of a step it is averaged by their
            rows. It is in the log, as own_loss. "drop": it is left out.
        fused: compute the loss from hidden states and lm_heads, so that no logits [rows, V] are held
            (:func:`fastkd.fused_linear_kd_loss`). For heads that are an nn.Linear, on one device or under DDP.
            What a model does to its logits after the head, logit_scale and softcap of loss_kwargs have to say; the
            first batch is checked for it. Where an evaluation wants predictions, logits are made for it.

    Raises:
        ValueError, TypeError: from the options, at construction, and for heads that are no distribution over classes;
            at the first batch, from fused, for labels of which it cannot be known whether they are shifted, and for a
            model that reads across the examples of a packed batch.
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
        options = _checked(loss_kwargs, shift_labels, own_loss)
        super().__init__(*args, **kwargs)
        self._check_trainer(fused)
        models.check_heads(self.model, teacher_model)
        smoothing = self.args.label_smoothing_factor
        if smoothing:
            if options.get("alpha", 1.0) == 1.0:
                raise ValueError(
                    "label_smoothing_factor is of the cross-entropy, which alpha=1 leaves out; set alpha in loss_kwargs"
                )
            if options.setdefault("label_smoothing", smoothing) != smoothing:
                raise ValueError(
                    f"label_smoothing is {options['label_smoothing']} in loss_kwargs, and "
                    f"label_smoothing_factor is {smoothing}"
                )
        if isinstance(teacher_model, nn.Module):
            if teacher_model is self.model:
                raise ValueError("teacher_model is the student")
            teacher_model = self.accelerator.prepare_model(
                teacher_model, evaluation_mode=True
            ).eval()
        self.teacher_model = teacher_model
        self._loss = KDLoss(return_parts=True, **self._on_whole_logits(options, fused))
        self._fused_loss = FusedLinearKDLoss(return_parts=True, **options) if fused else None
        self._logs_parts = options.get("alpha", 1.0) < 1.0
        # Of distillation, cross-entropy and rows, since the last log.
        self._sums: Tensor | None = None
        self._wants_predictions = False
        self._checked_heads = False
        self.can_return_loss = True  # an evaluation without labels, where args.label_names is []
        # The Trainer counts labels for a model that takes their number; here the loss does.
        self.model_accepts_loss_kwargs = True
        # It is given labels that have been moved already.
        self._loss_shifts_labels = False
        self._asked_to_shift, self._keeps_own_loss = shift_labels, own_loss == "keep"
        self._habits: Habits | None = None
        self._checked_boundaries = False
        # Columns were looked up before there was a teacher.
        self._signature_columns: Any = None
        self._of_teacher: set[str] = set()  # columns that were kept for a function alone

    def _set_signature_columns_if_needed(self) -> None:
        """The Trainer's columns, and those that the teacher names."""
        super()._set_signature_columns_if_needed()
        teacher = getattr(self, "teacher_model", None)
        wanted = {"labels", "shift_labels"}
        for model in (self.model, teacher):
            if isinstance(model, nn.Module):
                wanted |= models.signature(model).names
        self._signature_columns += sorted(wanted - set(self._signature_columns))

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """As the Trainer's; a teacher that is a function may want any column that is no text."""
        if self.args.remove_unused_columns and not isinstance(self.teacher_model, nn.Module):
            self._set_signature_columns_if_needed()
            others = {
                name
                for name, feature in (dataset.features or {}).items()
                if getattr(feature, "dtype", None) not in ("string", "large_string")
            }.difference(self._signature_columns)
            self._of_teacher |= others
            self._signature_columns += sorted(others)
        return super()._remove_unused_columns(dataset, description=description)

    def _get_collator_with_removed_columns(
        self, data_collator: Any, description: Any = None
    ) -> Any:
        """As the Trainer's; a teacher that is a function may want any column."""
        if not isinstance(self.teacher_model, nn.Module):
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description=description)

    def _on_whole_logits(self, options: dict[str, Any], fused: bool) -> dict[str, Any]:
        """The options where a fused trainer needs logits after all: models have scaled and capped theirs themselves."""
        if not fused:
            return options
        done = [*_OF_CHUNKS, "logit_scale", "softcap"]
        if isinstance(self.teacher_model, nn.Module):
            done += ["teacher_logit_scale", "teacher_softcap"]
        return {name: value for name, value in options.items() if name not in done}

    def _check_trainer(self, fused: bool) -> None:
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func would not be called: the mixin has a loss")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process has {self.args.n_gpu} GPUs (DataParallel); start one process a GPU, with torchrun or "
                "accelerate launch"
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and parallelism.sp_enabled:
            raise ValueError(
                "sequence parallelism is not supported: the Trainer has a loss of its own for it"
            )
        if fused and (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile):
            raise ValueError(
                "fused=True reads lm_heads outside of the models' forward, and hooks into them; it is for eager mode "
                "on one device or under DDP, and not for FSDP, DeepSpeed or torch_compile"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """The loss of one batch, as Trainer.compute_loss has it; with return_outputs also the student's outputs."""
        _check_batch(inputs, self.label_names)
        self._learn(model, inputs)
        with_hidden = self._fused_loss is not None and not self._wants_predictions
        run = self._on_hidden_states if with_hidden else self._on_logits
        (loss, parts), outputs, own = run(model, inputs, num_items_in_batch)
        if own is not None:
            own = own.to(loss.device)
            loss = loss + _share(own, parts.counted, num_items_in_batch)
        if (self._logs_parts or own is not None) and model.training:
            added = parts.counted * (0.0 if own is None else own.detach())
            rows = (parts.distillation.sum(), parts.cross_entropy.sum(), added, parts.counted)
            sums = torch.stack([part.to(torch.float32) for part in rows])
            self._sums = sums if self._sums is None else self._sums + sums
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # num_items_in_batch is of all processes, and DDP takes the mean of theirs
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _features(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name not in _OF_THE_LOSS}

    def _student_inputs(self, features: dict[str, Any], labels: Tensor | None) -> dict[str, Any]:
        known = {n: v for n, v in features.items() if n not in self._of_teacher}
        return _inputs(self.model, known, self.teacher_model, labels)

    def _learn(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """At the first batch: what the student does with labels, and whether packed examples are kept apart."""
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
            of_student = self._student_inputs(features, labels)
            if not isinstance(self.teacher_model, nn.Module) and models.from_transformers(
                self.model
            ):
                # The function has not yet taken what is not the student's.
                names = {*models.signature(self.model).names, *models.BOUNDARIES}
                of_student = {n: v for n, v in of_student.items() if n in names}
            own_loss = "keep" if self._keeps_own_loss else "drop"
            fused = self._fused_loss is not None
            head = _BeforeHead("model", self.accelerator.unwrap_model(model)) if fused else None
            with head or contextlib.nullcontext():
                found = models.habits_of(call, self.model, of_student, labels, own_loss)
            self._habits = found
        if not self._checked_boundaries and any(name in features for name in models.BOUNDARIES):
            self._checked_boundaries = True
            for whose, of, call, other in (
                ("the student", self.model, model, self.teacher_model),
                ("teacher_model", self.teacher_model, self.teacher_model, self.model),
            ):
                if isinstance(of, nn.Module):
                    given = _inputs(of, features, other, labels)
                    models.check_boundaries(of, call, given, features, whose)

    def _rows(
        self, inputs: dict[str, Any], shape: torch.Size
    ) -> tuple[Tensor | None, Tensor | None]:
        """(the label of each row of logits [*shape, C], None), or without labels (None, which rows count)."""
        given, labels = inputs.get("shift_labels"), inputs.get("labels")
        if given is not None:
            models.check_rows(given, shape)
            return given, None
        shifts = self._shift(labels, shape)
        features = self._features(inputs)
        if labels is None:
            return None, models.counted_without_labels(self.model, features, shape, shifts)
        targets = models.targets(labels, shifts, models.starts(features, labels.shape))
        models.check_rows(targets, shape)
        return targets, None

    def _shift(self, labels: Tensor | None, shape: torch.Size) -> bool:
        known = None if self._habits is None else self._habits.shifts
        return _shifts(self._asked_to_shift, known, labels, shape)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """The Trainer's, of labels as the loss counts them."""
        counted = []
        for batch in batch_samples:
            labels = batch.get("shift_labels")
            if labels is None:
                labels = batch.get("labels")
                if labels is None:
                    return super()._get_num_items_in_batch(batch_samples, device)
                self._learn(self.model_wrapped, self._prepare_inputs(batch))
                begins = models.starts(batch, labels.shape)
                labels = models.targets(labels, self._shift(labels, labels.shape), begins)
            counted.append({"labels": labels})
        return super()._get_num_items_in_batch(counted, device)

    def _call(
        self, model: nn.Module, features: dict[str, Any], labels: Tensor | None
    ) -> tuple[Any, Tensor | None]:
        """(the student's outputs, what it adds to its loss by itself)"""
        given = self._student_inputs(features, labels)
        assert self._habits is not None
        if not self._keeps_own_loss or self._habits.own == "nothing":
            return model(**given), None
        if self._habits.own == "outputs" or labels is None:
            outputs = model(**given)
            return outputs, models.own_loss(self.model, outputs)
        with models.LabelLoss(labels):
            outputs = model(**given, labels=labels)
        return outputs, models.loss_in(outputs)

    def _on_logits(
        self, model: nn.Module, inputs: dict[str, Any], num_items: int | Tensor | None
    ) -> tuple[tuple[Tensor, Parts], Any, Tensor | None]:
        features, labels = self._features(inputs), inputs.get("labels")
        said = _ask(self.teacher_model, self.model, features, labels)
        teacher = _teacher_of(said, self.teacher_model)
        outputs, own = self._call(model, features, labels)
        logits = models.logits_of(outputs, "the student")
        logits = models.without_soft_prompt(model, logits, _length(inputs))
        targets, mask = self._rows(inputs, logits.shape[:-1])
        teacher = _moved(teacher, logits.device)
        vocab_size = self._loss.options.get("vocab_size")
        _same_widths(logits.shape[-1], teacher, vocab_size, "loss_kwargs={'vocab_size': ...}")
        rows = {"labels": targets, "mask": mask, "num_items": num_items}
        return self._loss(logits, teacher, **rows), outputs, own

    def _on_hidden_states(
        self, model: nn.Module, inputs: dict[str, Any], num_items: int | Tensor | None
    ) -> tuple[tuple[Tensor, Parts], Any, Tensor | None]:
        assert self._fused_loss is not None
        options = self._fused_loss.options
        features, labels = self._features(inputs), inputs.get("labels")
        teacher: Teacher
        if isinstance(self.teacher_model, nn.Module):
            with _BeforeHead("teacher_model", self.teacher_model) as head:
                outputs = _ask(self.teacher_model, self.model, features, labels)
            if not self._checked_heads:
                head.check(models.logits_of(outputs, "the teacher"), options, "teacher_")
            bias = None if head.linear.bias is None else head.linear.bias.detach()
            teacher = LinearTeacher(head.hidden, head.linear.weight.detach(), bias)
        else:
            teacher = _ask(self.teacher_model, self.model, features, labels)
        with _BeforeHead("model", self.accelerator.unwrap_model(model)) as head:
            outputs, own = self._call(model, features, labels)
        if not self._checked_heads:
            head.check(models.logits_of(outputs, "the student"), options, "")
            self._checked_heads = True
        hidden = models.without_soft_prompt(model, head.hidden, _length(inputs))
        targets, mask = self._rows(inputs, hidden.shape[:-1])
        teacher = _moved(teacher, hidden.device)
        weight = head.linear.weight
        _same_widths(
            len(weight), teacher, options.get("vocab_size"), "loss_kwargs={'vocab_size': ...}"
        )
        rows = {"labels": targets, "mask": mask, "num_items": num_items}
        with self.accelerator.autocast():  # it is on in the models' forward alone
            loss = self._fused_loss(hidden, weight, teacher, student_bias=head.linear.bias, **rows)
        return loss, outputs, own

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As the Trainer's; with fused, predictions need the logits that are otherwise left out."""
        self._wants_predictions = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._wants_predictions = False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds kd_loss, ce_loss where alpha < 1, and own_loss where the student has one, to a log of training."""
        if self._sums is not None and self.model.training:
            kd, ce, own, rows = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            logs["kd_loss"] = kd / max(rows, 1)
            if self._logs_parts:
                logs["ce_loss"] = ce / max(rows, 1)
            if self._habits is not None and self._habits.own != "nothing" and own:
                logs["own_loss"] = own / max(rows, 1)
            self._sums = None
        super().log(logs, *args, **kwargs)


class _BeforeHead:
    """Catches the hidden states that reach a model's lm_head, which meanwhile projects the first position only."""

    def __init__(self, name: str, model: nn.Module) -> None:
        find = getattr(model, "get_output_embeddings", None)
        linear = None if find is None else find()
        if linear is None:
            raise ValueError(
                f"fused=True needs a {name} with an lm_head, which its get_output_embeddings() returns; "
                f"{type(models.base(model)).__name__} has none, so leave fused out: a classifier's logits are small"
            )
        if type(linear) is not nn.Linear:
            kind = type(linear)
            raise ValueError(
                f"fused=True needs a {name} whose get_output_embeddings() is an nn.Linear itself, got a "
                f"{kind.__module__}.{kind.__qualname__}, whose output is not its weight's alone; leave lm_head out of "
                "an adapter's target_modules, merge the adapter (merge_and_unload), or leave fused out"
            )
        self.name, self.linear = name, linear
        self.hidden: Tensor
        self._projected: Tensor

    def __enter__(self) -> _BeforeHead:
        self._hooks = (
            self.linear.register_forward_pre_hook(self._catch),
            self.linear.register_forward_hook(self._keep),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _catch(self, linear: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (self.hidden,) = inputs
        return (self.hidden[..., :1, :],)

    def _keep(self, linear: nn.Module, inputs: tuple[Tensor], projected: Tensor) -> None:
        self._projected = projected.detach()

    def check(self, logits: Tensor, options: dict[str, Any], side: str) -> None:
        """Raises where the model does to its logits what the options do not say; waits for the device."""
        scale = options.get(f"{side}logit_scale", 1.0)
        softcap = options.get(f"{side}softcap")
        expected = self._projected * scale
        if softcap is not None:
            expected = softcap * torch.tanh(expected / softcap)
        error = (logits.detach() - expected).abs().max()
        allowed = 8 * torch.finfo(expected.dtype).eps * expected.abs().max()
        if not bool(error <= allowed):
            raise ValueError(
                f"fused=True: the logits of {self.name} are not those of its lm_head times {scale} with the softcap "
                f"{softcap}; they differ by up to {float(error):.3g}. Say in loss_kwargs what it does to them "
                f"({side}logit_scale, {side}softcap; its config has logit_scale, logits_scaling or "
                "final_logit_softcapping), or leave fused out"
            )


def _length(inputs: dict[str, Any]) -> torch.Size | None:
    """The shape [B, S] of a batch's tokens."""
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
    """KDTrainer, built where it is first asked for, since transformers takes seconds to import."""
    if name != "KDTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _kd_trainer())
