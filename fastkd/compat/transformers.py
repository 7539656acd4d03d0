"""The Hugging Face Trainer: a teacher beside the student, and fastkd's loss.

    from fastkd.compat.transformers import KDTrainer

    trainer = KDTrainer(student, args, train_dataset=..., teacher_model=teacher, loss_kwargs={"alpha": 0.9})

KDTrainer is DistillationMixin before transformers.Trainer; the mixin goes before any other Trainer the same way.
compute_loss_func is for code that cannot change the class of its Trainer. docs/stacks/transformers.md compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastkd.functional import Parts
from fastkd.modules import FusedLinearKDLoss, KDLoss
from fastkd.teachers import LinearTeacher, Teacher

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


def _checked(loss_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    options = dict(loss_kwargs or {})
    for name in _OF_THE_TRAINER:
        if name in options:
            raise TypeError(f"loss_kwargs must not have {name!r}: the Trainer decides it")
    return options


def _logits(outputs: Any) -> Tensor:
    logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return logits


def _targets(labels: Tensor | None, causal: bool) -> Tensor | None:
    """Labels of the positions that predict them. They move and not the logits, whose shifted view would get a gradient
    that autograd copies into one of the whole.
    """
    if labels is None or not causal:
        return labels
    return nn.functional.pad(labels[..., 1:], (0, 1), value=-100)


def _predicting(attention_mask: Tensor | None, causal: bool) -> Tensor | None:
    """Where there are no labels: positions that are no padding, nor predict any."""
    if attention_mask is None:
        return None
    real = attention_mask != 0
    return real & nn.functional.pad(real[..., 1:], (0, 1)) if causal else real


def _ask(teacher: TeacherModel, inputs: dict[str, Any]) -> Teacher:
    """The teacher's answer to a batch of features."""
    with torch.no_grad():
        if isinstance(teacher, nn.Module):
            return _logits(teacher(**inputs))
        return teacher(inputs)


def compute_loss_func(
    student: nn.Module,
    teacher_model: TeacherModel,
    *,
    shift_labels: bool = True,
    **loss_kwargs: Any,
) -> Callable[..., Tensor]:
    """A loss for ``transformers.Trainer(student, compute_loss_func=...)``.

    The Trainer gives such a function outputs and labels, and no inputs. So that the teacher sees the batch, a forward
    pre-hook, which stays on the student, notes what it is called with; the loss then asks the teacher the same,
    without gradients.

    Args:
        student: the model that the Trainer is given.
        teacher_model: as :class:`DistillationMixin` takes it. A model has to be on the student's device, and in eval
            mode, already.
        shift_labels: position i predicts label i + 1, as in a causal language model. The Trainer counts labels; where
            it does not know the student for such a model (a wrapper), the first label of a row has to be -100.
        **loss_kwargs: options of :class:`fastkd.KDLoss`.

    Returns:
        (outputs, labels, num_items_in_batch=None) -> the loss.

    Raises:
        RuntimeError: the student has not been called since the last loss.
        ValueError, TypeError: from the options; at the call, for a batch without labels, whose rows the Trainer does
            not count (:class:`DistillationMixin` takes them).
    """
    loss = KDLoss(**_checked(loss_kwargs))
    seen: list[dict[str, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [{name: kwargs[name] for name in kwargs if name not in _OF_THE_LOSS}]

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
        teacher = _ask(teacher_model, seen.pop())
        logits = _logits(outputs)
        targets = _targets(labels, shift_labels)
        return loss(logits, teacher, targets, num_items=num_items_in_batch)

    return distillation_loss


class DistillationMixin(_Trainer):
    """A ``transformers.Trainer`` that distils: ``class MyTrainer(DistillationMixin, Trainer)``.

    The teacher sees the features of each batch, without gradients. A row (a position) counts where its label is not
    -100; in a batch without labels, where it is no padding. The loss is summed and divided by the Trainer's
    num_items_in_batch, so that 8 batches of 1 that are accumulated have the gradient of 1 batch of 8, on any number of
    processes; without labels the Trainer does not count, and takes the mean of the batches' means. Where alpha < 1,
    the log has both terms, kd_loss and ce_loss, as means over the rows since the last log.

    Args:
        *args: of the Trainer.
        **kwargs: of the Trainer. ``args.label_smoothing_factor`` is that of the cross-entropy.
        teacher_model: a model that takes the student's features and gives logits; it is set to eval mode and placed by
            ``accelerator.prepare_model(..., evaluation_mode=True)``: whole on every process, under the Trainer's mixed
            precision. Or a function of the batch's features (a dict, from which it may take what the student must not
            see) that returns what :func:`fastkd.kd_loss` takes for a teacher, of the shape of the student's
            logits, unshifted: a :class:`fastkd.TopK` from a cache, say.
        loss_kwargs: options of :class:`fastkd.KDLoss` (of :class:`fastkd.FusedLinearKDLoss` where fused): divergence,
            temperature, alpha, ...
        shift_labels: position i predicts label i + 1, as in a causal language model; False for others.
        fused: compute the loss from hidden states and lm_heads, so that no logits [rows, V] are held
            (:func:`fastkd.fused_linear_kd_loss`). For heads that are an nn.Linear, on one device or under DDP.
            What a model does to its logits after the head, logit_scale and softcap of loss_kwargs have to say; the
            first batch is checked for it. Where an evaluation wants predictions, logits are made for it.

    Raises:
        ValueError, TypeError: from the options, at construction; at the first batch, from fused.
    """

    def __init__(
        self,
        *args: Any,
        teacher_model: TeacherModel,
        loss_kwargs: dict[str, Any] | None = None,
        shift_labels: bool = True,
        fused: bool = False,
        **kwargs: Any,
    ) -> None:
        options = _checked(loss_kwargs)
        super().__init__(*args, **kwargs)
        self._check_trainer(fused)
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
        self._loss_shifts_labels = shift_labels

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
        features = {name: value for name, value in inputs.items() if name not in _OF_THE_LOSS}
        causal = self._loss_shifts_labels
        targets = inputs.get("shift_labels")
        if targets is None:
            targets = _targets(inputs.get("labels"), causal)
        mask = _predicting(inputs.get("attention_mask"), causal) if targets is None else None
        with_hidden = self._fused_loss is not None and not self._wants_predictions
        run = self._on_hidden_states if with_hidden else self._on_logits
        (loss, parts), outputs = run(
            model, features, labels=targets, mask=mask, num_items=num_items_in_batch
        )
        if self._logs_parts and model.training:
            rows = (parts.distillation.sum(), parts.cross_entropy.sum(), parts.counted)
            sums = torch.stack([part.to(torch.float32) for part in rows])
            self._sums = sums if self._sums is None else self._sums + sums
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # num_items_in_batch is of all processes, and DDP takes the mean of theirs
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _on_logits(
        self, model: nn.Module, features: dict[str, Any], **rows: Any
    ) -> tuple[tuple[Tensor, Parts], Any]:
        teacher = _ask(self.teacher_model, features)
        outputs = model(**features)
        logits = _logits(outputs)
        if isinstance(teacher, Tensor):
            teacher = teacher.to(logits.device)
        return self._loss(logits, teacher, **rows), outputs

    def _on_hidden_states(
        self, model: nn.Module, features: dict[str, Any], **rows: Any
    ) -> tuple[tuple[Tensor, Parts], Any]:
        assert self._fused_loss is not None
        options = self._fused_loss.options
        teacher: Teacher
        if isinstance(self.teacher_model, nn.Module):
            with _BeforeHead("teacher_model", self.teacher_model) as head, torch.no_grad():
                outputs = self.teacher_model(**features)
            if not self._checked_heads:
                head.check(_logits(outputs), options, "teacher_")
            bias = None if head.linear.bias is None else head.linear.bias.detach()
            teacher = LinearTeacher(head.hidden, head.linear.weight.detach(), bias)
        else:
            teacher = _ask(self.teacher_model, features)
        with _BeforeHead("model", self.accelerator.unwrap_model(model)) as head:
            outputs = model(**features)
        if not self._checked_heads:
            head.check(_logits(outputs), options, "")
            self._checked_heads = True
        student_head = head.linear
        with self.accelerator.autocast():  # it is on in the models' forward alone
            loss = self._fused_loss(
                head.hidden, student_head.weight, teacher, student_bias=student_head.bias, **rows
            )
        return loss, outputs

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
        """Adds kd_loss and ce_loss to a log of training."""
        if self._sums is not None and self.model.training:
            sums = self.accelerator.reduce(self._sums, reduction="sum").tolist()
            logs.update(kd_loss=sums[0] / max(sums[2], 1), ce_loss=sums[1] / max(sums[2], 1))
            self._sums = None
        super().log(logs, *args, **kwargs)


class _BeforeHead:
    """Catches the hidden states that reach a model's lm_head, which meanwhile projects the first position only."""

    def __init__(self, name: str, model: nn.Module) -> None:
        linear = model.get_output_embeddings()  # type: ignore[operator]
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"fused=True needs a {name} whose get_output_embeddings() is an nn.Linear, got {type(linear).__name__}"
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
