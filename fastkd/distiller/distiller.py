"""The Distiller: it runs student and teacher, captures layer outputs for its terms, and adds the losses up."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.call.checks import check_choice
from fastkd.core.models import unwrapped
from fastkd.core.scalars import as_float, plain
from fastkd.distiller import models
from fastkd.functional import fused_linear_kd_loss
from fastkd.modules import FusedLinearKDLoss
from fastkd.parallel.heads import Captured, Head, is_redirected, redirect
from fastkd.teachers import Ensemble, LinearTeacher, RoutedTeacher, TopK

# What a call passes to the losses by keyword.
BATCH_OPTIONS = ("labels", "mask", "num_items")


def first_tensor(output: Any) -> Tensor:
    """The first tensor in a layer's output: the output itself, or a member of a tuple, list or dict (ModelOutput)."""
    if isinstance(output, Tensor):
        return output
    members = output.values() if isinstance(output, Mapping) else output
    if isinstance(members, (tuple, list)) or isinstance(output, Mapping):
        for member in members:
            if isinstance(member, Tensor):
                return member
    raise TypeError(f"no tensor in the output of a layer, a {type(output).__name__}; pass select=")


def find_logits(output: Any) -> Tensor:
    """The logits in a model's output: itself, its .logits or ["logits"], or a tuple's first tensor with dimensions."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif hasattr(output, "logits"):
        logits = output.logits
    else:
        members = output if isinstance(output, (tuple, list)) else ()
        logits = next((x for x in members if isinstance(x, Tensor) and x.dim() > 0), None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        f"no logits in the output of a model, a {type(output).__name__}; pass find_logits="
    )


@dataclass(frozen=True, eq=False)
class Term:
    """One loss between student and teacher.

    Args:
        loss: called as loss(student, teacher, **keywords), with the keywords in `takes`; returns a 0-dim tensor. The
            parameters of a module are trained and saved with the :class:`Distiller`.
        student_layer: a name from named_modules(), or "" for the whole model; the loss gets the output of that layer.
            With a sequence of names it gets a tuple of outputs. None: if the loss names its layers (attributes
            student_layers and teacher_layers, as in :class:`fastkd.features.FeatureLoss`), it gets dicts of outputs by
            name; otherwise it gets the logits. A :class:`fastkd.FusedLinearKDLoss` gets the input and the weight of the
            lm_head with this name (None: of the model's get_output_embeddings()).
        teacher_layer: the same for the teacher; None: the names in student_layer.
        weight: a number, or a function from the step to a number. A term of weight 0 is not computed.
        select: maps a layer's output to what the loss gets: a tensor, or a tuple or dict of tensors. For a FeatureLoss
            over indices, use layer "" with `lambda output: output.hidden_states`.
        takes: which of "labels", "mask" and "num_items" the loss gets by keyword, if a call has them. None: those in
            its signature (of forward, for a module), or all if it takes **options.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it.
    """

    loss: Callable[..., Tensor]
    student_layer: str | Sequence[str] | None = None
    teacher_layer: str | Sequence[str] | None = None
    weight: float | Callable[[int], float] = 1.0
    select: Callable[[Any], Any] = first_tensor
    takes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for argument in ("loss", "select"):
            if not callable(getattr(self, argument)):
                raise TypeError(f"{argument} must be callable, got {getattr(self, argument)!r}")
        if not callable(self.weight):
            object.__setattr__(self, "weight", _checked_weight("weight", self.weight))
        if self.student_layer is None and self.teacher_layer is not None:
            raise ValueError("student_layer must be given if teacher_layer is")
        names = getattr(self.loss, "student_layers", None)
        if self.student_layer is None and names is not None and not _all_names(names):
            raise ValueError(
                f"student_layer must be given for a loss whose layers are indices, {names}: pass '' with "
                "select=lambda output: output.hidden_states, or names of layers"
            )
        for argument in ("student_layer", "teacher_layer"):
            layer = getattr(self, argument)
            if not (layer is None or isinstance(layer, str) or (_all_names(layer) and layer)):
                raise TypeError(f"{argument} must be a name or a sequence of names, got {layer!r}")
        if self.fused and not (self.student_layer is None or isinstance(self.student_layer, str)):
            raise TypeError(
                "student_layer of a FusedLinearKDLoss must be the name of the lm_head or None, got "
                f"{self.student_layer!r}"
            )
        if self.takes is not None and (
            isinstance(self.takes, (str, Tensor))
            or not isinstance(self.takes, Iterable)
            or any(name not in BATCH_OPTIONS for name in self.takes)
        ):
            raise ValueError(
                f"takes must be some of {', '.join(BATCH_OPTIONS)}; got {self.takes!r}"
            )
        if self.takes is None:
            object.__setattr__(self, "takes", _options_of(self.loss))

    @property
    def on_logits(self) -> bool:
        """Whether the loss gets logits."""
        named = self.student_layer is not None or hasattr(self.loss, "student_layers")
        return not named and not self.fused

    @property
    def fused(self) -> bool:
        """Whether the loss gets hidden states and lm_heads."""
        return type(self.loss) is FusedLinearKDLoss

    def _layers(self, side: str) -> str | Sequence[str]:
        if self.student_layer is None:
            names: list[str] = getattr(self.loss, f"{side}_layers")
            return names
        own = self.student_layer if side == "student" else self.teacher_layer
        return self.student_layer if own is None else own

    def _names(self, side: str) -> Sequence[str]:
        layers = self._layers(side)
        return (layers,) if isinstance(layers, str) else layers

    def _arranged(self, side: str, output_of: Callable[[str], Any]) -> Any:
        """The layer outputs of one model in the form that the loss expects."""
        layers = self._layers(side)
        if isinstance(layers, str):
            return output_of(layers)
        if self.student_layer is None:
            return {name: output_of(name) for name in layers}
        return tuple(output_of(name) for name in layers)

    def _weight_at(self, name: str, step: int | None) -> float:
        if not callable(self.weight):
            return self.weight
        if step is None:
            raise ValueError(
                f"step must be given, because the weight of term {name!r} depends on it"
            )
        return _checked_weight(f"the weight of term {name!r} at step {step}", self.weight(step))


class Distiller(nn.Module):
    """A student, a teacher and weighted losses between them, over logits and over layers captured by name.

    **Modules.** The student and the losses are submodules, so parameters(), train() and to() include both, and
    DistributedDataParallel can wrap the Distiller (with find_unused_parameters=True if a step may leave out a term or a
    layer). The teacher is not a submodule: parameters() and train() do not include it, but to() and similar methods
    move and cast it. It runs under no_grad and in eval mode, and gets its mode back afterwards. state_dict() and
    load_state_dict() cover only the state of the losses (learned and fixed projections); save the student itself.

    **Inputs.** Each model gets the named inputs in the signature of its forward, and use_cache=False if it has that
    input, because with a cache models of transformers read across the examples of a packed batch. The first packed
    batch is checked for this.

    **Layers** are captured by forward hooks. close(), the end of a `with` block and the end of the Distiller remove
    them. Captured outputs are released after each call. Only one thread may call a Distiller at a time. A copy
    (copy.deepcopy) captures nothing, and a model with hooks cannot be pickled: close the Distiller first, or make a new
    one. A call raises if a layer did not run, ran more than once (its output would be ambiguous), was changed in place
    afterwards, or ran without gradients in a student that trains (as in reentrant checkpointing; the other kind works).

    **Hidden states.** A term whose loss is a :class:`fastkd.FusedLinearKDLoss` is computed from hidden states and
    lm_heads (:func:`fastkd.parallel.head`), without logits [rows, V], inside the wrappers of the student, which FSDP2
    or ZeRO-3 may have sharded. The models' logits then have the first position only, so no term can be on logits. The
    scale and softcap of the logits are read from each model's configuration, unless the loss has them as options; the
    first batch is checked for this.

    **torch.compile** of the student, the teacher or the Distiller works if the model's first run comes after the
    Distiller is made, because torch does not look for new hooks later. If a model ran before, the layers are missing,
    and the call raises. A compiled graph hides in-place changes of a layer's output: try a step in eager mode first.

    Args:
        student: any module.
        teacher: any module; None: pass the teacher's outputs to each call.
        terms: the terms by name; a name is an identifier other than "loss" and "own_loss".
        find_logits: maps a model's output to its logits, for student and teacher.
        own_loss: "keep": the student's "loss" output, or a router's auxiliary loss times the student's coefficient, is
            added to the sum and returned as part "own_loss". "drop": it is left out. The student gets no labels, so a
            term that it adds only to its loss of labels does not appear.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or a layer does not exist; the message has the closest
            names.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        terms: Mapping[str, Term],
        *,
        find_logits: Callable[[Any], Tensor] = find_logits,
        own_loss: str = "keep",
    ) -> None:
        super().__init__()
        check_choice("own_loss", own_loss, ("keep", "drop"))
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be an nn.Module, got {type(student).__name__}")
        if not (teacher is None or isinstance(teacher, nn.Module)):
            raise TypeError(f"teacher must be an nn.Module or None, got {type(teacher).__name__}")
        _check_terms(terms)
        _check_fused(terms.values())
        self.student = student
        self.losses = nn.ModuleDict(
            {name: term.loss for name, term in terms.items() if isinstance(term.loss, nn.Module)}
        )
        self.terms = dict(terms)
        self.find_logits = find_logits
        self._keeps_own_loss = own_loss == "keep"
        self._takes = models.beside(student, teacher)
        self._teacher_takes = None if teacher is None else models.beside(teacher, student)
        self._checked_boundaries = False
        self._teacher = (teacher,)  # a tuple hides it from nn.Module
        # For losses of hidden states: the lm_heads, and those whose logits have been compared with the model's.
        self._heads: dict[str, Head] = {}
        self._checked_heads: set[str] = set()
        self._student_capture = _Capture("student", student, _taps(terms.values(), "student"))
        self._teacher_capture = (
            None
            if teacher is None
            else _Capture("teacher", teacher, _taps(terms.values(), "teacher"))
        )
        handles = [*self._student_capture.handles]
        if self._teacher_capture is not None:
            handles += self._teacher_capture.handles
        self._remove_hooks = weakref.finalize(self, _remove, handles)
        self.register_load_state_dict_pre_hook(_keep_student)

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, which is not a submodule."""
        return self._teacher[0]

    def forward(
        self,
        *inputs: Any,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        step: int | None = None,
        teacher_output: Any = None,
        teacher_layers: Mapping[str, Any] | None = None,
        **named_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one batch.

        Args:
            *inputs: inputs of both models.
            labels: for the losses that take them. Neither model gets them, but decoder_input_ids of an encoder-decoder
                are made from them if they are not passed. There is one label per row of logits: shift the labels of a
                causal language model yourself.
            mask: bool, for the losses that take it: which rows of logits and positions of features count.
            num_items: for the losses that take it: the denominator of :func:`fastkd.kd_loss`.
            step: for weights that depend on it.
            teacher_output: the teacher's output from an earlier run: logits, a model's output, a :class:`fastkd.TopK`,
                or another teacher of kd_loss.
            teacher_layers: the teacher's layer outputs by name, as `select` would return them. The teacher runs if the
                terms of this step need an output that is not passed.
            **named_inputs: each model gets those in its signature.

        Returns:
            (the weighted sum, its parts). Parts are detached and 0-dim: each loss by name, before its weight and
            without those of weight 0, and the sum as "loss".

        Raises:
            ValueError: all weights are 0, or an argument is missing; a model reads across the examples of a packed
                batch; the student returns a loss with an unknown coefficient.
            TypeError: neither model takes a named input.
            RuntimeError: a layer was not captured; the message says why.
        """
        weights = {name: term._weight_at(name, step) for name, term in self.terms.items()}
        weights = {name: weight for name, weight in weights.items() if weight != 0}
        if not weights:
            raise ValueError(
                f"terms must have one with a weight other than 0; at step {step} all weights are 0"
            )
        terms = [self.terms[name] for name in weights]
        for name in named_inputs:
            sides = (self._takes, self._teacher_takes)
            if not any(side and (side.open or name in side.names) for side in sides):
                raise TypeError(
                    f"{name} is an input of neither model: no forward has this argument"
                )
        self._check_boundaries(inputs, named_inputs, labels)
        chosen = self._takes.chosen(named_inputs)
        chosen = models.with_decoder_inputs(self.student, chosen, labels)
        batch_options = {"labels": labels, "mask": mask, "num_items": num_items}
        taps = _taps(terms, "student")
        with contextlib.ExitStack() as stack:  # in which the teacher's lm_head is gathered
            target, teacher_outputs = self._run_teacher(
                stack, terms, inputs, named_inputs, labels, teacher_output, teacher_layers
            )
            total_of = partial(self._total, weights, target, teacher_outputs, batch_options)
            fused = [term for term in terms if term.fused]
            if not fused:
                run = self._student_capture.run(self.student, inputs, chosen, taps)
                return total_of(*run, {})
            if is_redirected(self.student) and any(tap.name == "" for tap in taps):
                raise ValueError(
                    "student_layer '' is the output of the whole student, but with a FusedLinearKDLoss the forward "
                    "of a sharded or wrapped student returns the loss; name the layers inside it"
                )
            head = self._head("student", fused[0])
            project = None if "student" in self._checked_heads else True
            heads = {"student": head} if teacher_output is not None else self._heads
            kept: list[dict[str, Tensor]] = []  # apart from the loss, because wrappers may cast it

            def within(forward: Any, *inputs: Any, **chosen: Any) -> Tensor:
                with head.captured(project=project) as captured:
                    output, outputs = self._student_capture.run(forward, inputs, chosen, taps)
                self._check_logits("student", fused, output, captured)

                def losses_of(
                    hidden: Tensor, weight: Tensor, bias: Tensor | None
                ) -> dict[str, Any]:
                    operands = (hidden, weight, target)
                    named = {name: self.terms[name] for name in weights if self.terms[name].fused}
                    return {
                        name: fused_linear_kd_loss(
                            *operands,
                            student_bias=bias,
                            **_keywords(term, batch_options) | _fused_options(term, heads),
                        )
                        for name, term in named.items()
                    }

                total, parts = total_of(output, outputs, head.apply(losses_of, captured.hidden))
                kept.append(parts)
                return total

            return redirect(self.student, within, *inputs, **chosen), kept[0]

    def _total(
        self,
        weights: Mapping[str, float],
        target: Any,
        teacher_outputs: Mapping[Tap, Any],
        batch_options: Mapping[str, Any],
        output: Any,
        student_outputs: Mapping[Tap, Any],
        fused: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (the weighted sum, its parts). `fused` has the losses of hidden states, by term."""
        total: Tensor | None = None
        parts = {}
        for name, weight in weights.items():
            term = self.terms[name]
            student: Any
            if term.fused:
                value = fused[name]
            else:
                if term.on_logits:
                    student, teacher = self.find_logits(output), target
                else:
                    student = term._arranged("student", _finder(student_outputs, term))
                    teacher = term._arranged("teacher", _finder(teacher_outputs, term))
                value = term.loss(student, teacher, **_keywords(term, batch_options))
            value = _checked_loss(name, value)
            total = weight * value if total is None else total + weight * value
            parts[name] = value.detach()
        assert total is not None
        own = models.own_loss(self.student, output) if self._keeps_own_loss else None
        if own is not None:
            total = total + own
            parts["own_loss"] = own.detach()
        parts["loss"] = total.detach()
        return total, parts

    def _head(self, side: str, term: Term) -> Head:
        """Return the lm_head of the student or the teacher, wrapped as it is now."""
        model = self.student if side == "student" else self.teacher
        assert model is not None
        if side not in self._heads:
            layer = term.student_layer
            if side == "teacher" and term.teacher_layer is not None:
                layer = term.teacher_layer
            module = unwrapped(model).get_submodule(layer) if isinstance(layer, str) else None
            self._heads[side] = Head(
                model,
                module,
                name=f"the {side}",
                otherwise="use KDLoss, a loss of logits",
                by_hand=f"name it in the term's {side}_layer, or ",
            )
        return self._heads[side]

    def _check_logits(
        self, side: str, fused: Sequence[Term], output: Any, captured: Captured
    ) -> None:
        """Raise unless a model's logits are those of its lm_head with the scale and softcap of each loss."""
        if side in self._checked_heads:
            return
        prefix = "" if side == "student" else "teacher_"
        for term in fused:
            options = _fused_options(term, self._heads)
            self._heads[side].check_logits(
                self.find_logits(output),
                captured,
                options[f"{prefix}logit_scale"],
                options[f"{prefix}softcap"],
                f"pass {prefix}logit_scale and {prefix}softcap to FusedLinearKDLoss to match the model",
            )
        self._checked_heads.add(side)

    def _run_teacher(
        self,
        stack: contextlib.ExitStack,
        terms: Sequence[Term],
        inputs: Sequence[Any],
        named_inputs: Mapping[str, Any],
        labels: Tensor | None,
        output: Any,
        layers: Mapping[str, Any] | None,
    ) -> tuple[Any, dict[Tap, Any]]:
        """Return (the target of losses on logits, layer outputs), as passed, or from a run of the teacher.

        For losses of hidden states the target of a run is a LinearTeacher, whose weight is gathered in the stack.
        """
        taps = _taps(terms, "teacher")
        passed = layers or {}
        missing = [tap for tap in taps if tap.name not in passed]
        fused = [term for term in terms if term.fused]
        needs_logits = bool(fused) or any(term.on_logits for term in terms)
        outputs = {tap: passed[tap.name] for tap in taps if tap.name in passed}
        if missing or (needs_logits and output is None):
            teacher, capture, takes = self.teacher, self._teacher_capture, self._teacher_takes
            if teacher is None or capture is None or takes is None:
                wanted = f"teacher_layers[{missing[0].name!r}]" if missing else "teacher_output"
                raise ValueError(f"{wanted} must be given, because the Distiller has no teacher")
            chosen = models.with_decoder_inputs(teacher, takes.chosen(named_inputs), labels)
            of_head: AbstractContextManager[Any] = contextlib.nullcontext()
            if fused and output is None:
                project = None if "teacher" in self._checked_heads else True
                of_head = self._head("teacher", fused[0]).captured(project=project)
            training = [module for module in teacher.modules() if module.training]
            try:
                if training:
                    teacher.eval()
                with torch.no_grad(), of_head as hidden_states:
                    new_output, captured = capture.run(teacher, inputs, chosen, missing)
            finally:
                for module in training:
                    module.training = True
            outputs |= captured
            if hidden_states is not None:
                self._check_logits("teacher", fused, new_output, hidden_states)
                hidden = hidden_states.hidden
                operands = stack.enter_context(self._heads["teacher"].gathered(hidden.dtype))
                return LinearTeacher(hidden, *operands), outputs
            output = new_output if output is None else output
        if not needs_logits or isinstance(output, (TopK, LinearTeacher, Ensemble, RoutedTeacher)):
            return output, outputs
        return self.find_logits(output), outputs

    def _check_boundaries(
        self, inputs: Sequence[Any], named_inputs: Mapping[str, Any], labels: Tensor | None
    ) -> None:
        if self._checked_boundaries or inputs or torch.compiler.is_compiling():
            return
        if not any(name in named_inputs for name in models.BOUNDARIES):
            return
        self._checked_boundaries = True
        for whose, model, takes in (
            ("the student", self.student, self._takes),
            ("the teacher", self.teacher, self._teacher_takes),
        ):
            if model is not None and takes is not None:
                chosen = models.with_decoder_inputs(model, takes.chosen(named_inputs), labels)
                models.check_boundaries(model, model, chosen, named_inputs, whose)

    def projections(self) -> Iterator[nn.Parameter]:
        """The parameters of the losses, without those of the student."""
        return self.losses.parameters()

    def close(self) -> None:
        """Remove the hooks from both models. Losses on layers raise afterwards."""
        self._remove_hooks()

    def __enter__(self) -> Distiller:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def state_dict(self, *, prefix: str = "", **options: Any) -> Any:
        """The state of the losses, under "losses."; it has no state of either model."""
        return self.losses.state_dict(prefix=f"{prefix}losses.", **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)
        if self.teacher is not None and recurse:
            self.teacher._apply(fn)
        return self


class Tap(NamedTuple):
    """A layer to capture, and the selection from its output."""

    name: str
    select: Callable[[Any], Any]


class _Captured(NamedTuple):
    value: Any
    # The version counters of its tensors when it was captured; None: unknown.
    versions: list[int] | None
    with_gradients: bool


class _Capture:
    """The hooks on one model."""

    def __init__(self, whose: str, model: nn.Module, taps: Sequence[Tap]) -> None:
        self.whose = whose
        layers = dict(unwrapped(model).named_modules(remove_duplicate=False))
        for tap in taps:
            _check_layer(whose, tap.name, layers)
        self.taps = list(taps)
        # For each tap, the outputs of its layer in the current run; None: it is not captured.
        self.captured: list[list[_Captured] | None] = [None] * len(taps)
        self.handles = [
            layers[tap.name].register_forward_hook(self._hook(index, tap.select))
            for index, tap in enumerate(taps)
        ]

    def _hook(self, index: int, select: Callable[[Any], Any]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            captured = self.captured[index]
            if captured is not None:
                value = select(output)
                captured.append(_Captured(value, _versions(value), torch.is_grad_enabled()))

        return hook

    def run(
        self,
        model: Callable[..., Any],
        inputs: Sequence[Any],
        named_inputs: Mapping[str, Any],
        taps: Sequence[Tap],
    ) -> tuple[Any, dict[Tap, Any]]:
        """Run the model; return (its output, the captured layer outputs)."""
        try:
            for index, tap in enumerate(self.taps):
                self.captured[index] = [] if tap in taps else None
            output = model(*inputs, **named_inputs)
            outputs = {
                tap: self._only(tap.name, captured)
                for tap, captured in zip(self.taps, self.captured, strict=True)
                if captured is not None
            }
            return output, outputs
        finally:
            self.captured = [None] * len(self.taps)

    def _only(self, name: str, captured: list[_Captured]) -> Any:
        layer = f"layer {name!r} of the {self.whose}"
        if not captured:
            raise RuntimeError(
                f"{layer} was not captured: either it did not run, or its forward was called directly, without hooks, "
                "or the Distiller is closed, or the model was compiled and ran before the Distiller was made (make the "
                "Distiller first, or call torch.compiler.reset())"
            )
        if len(captured) > 1:
            raise RuntimeError(
                f"{layer} ran {len(captured)} times, so its output is ambiguous; name the layers around its uses"
            )
        value, versions, with_gradients = captured[0]
        if torch.is_grad_enabled() and not with_gradients:
            raise RuntimeError(
                f"{layer} ran without gradients, so nothing would train through it; checkpoint with "
                "use_reentrant=False"
            )
        if versions is not None and _versions(value) not in (None, versions):
            raise RuntimeError(
                f"the output of {layer} was changed in place afterwards (nn.ReLU(inplace=True)?); name the layer that "
                "changed it, or make that layer return a new tensor"
            )
        return value


def _taps(terms: Iterable[Term], side: str) -> list[Tap]:
    """The taps that the terms need on one model, each once."""
    taps = (
        Tap(name, term.select)
        for term in terms
        if not term.on_logits and not term.fused
        for name in term._names(side)
    )
    return list(dict.fromkeys(taps))


def _finder(outputs: Mapping[Tap, Any], term: Term) -> Callable[[str], Any]:
    return lambda name: outputs[Tap(name, term.select)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for member in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(member)


def _versions(value: Any) -> list[int] | None:
    """The version counter of each tensor; None: they are not available."""
    if torch.compiler.is_compiling():
        return None
    tensors = list(_tensors(value))
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [tensor._version for tensor in tensors]


def _remove(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _keep_student(
    distiller: Distiller,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Before a load, add the student's current state, because the loaded state has none."""
    prefix += "student."
    unexpected += [key for key in state if key.startswith(prefix)]
    state.update(distiller.student.state_dict(prefix=prefix, keep_vars=True))


def _keywords(term: Term, batch_options: Mapping[str, Any]) -> dict[str, Any]:
    """What the loss of a term gets by keyword."""
    keywords = {key: batch_options[key] for key in term.takes or ()}
    return {key: value for key, value in keywords.items() if value is not None}


def _fused_options(term: Term, heads: Mapping[str, Head]) -> dict[str, Any]:
    """The options of a loss of hidden states, with the scales and softcaps of the models' configurations."""
    options: dict[str, Any] = {}
    for side, head in heads.items():
        prefix = "" if side == "student" else "teacher_"
        options |= {f"{prefix}logit_scale": head.logit_scale, f"{prefix}softcap": head.softcap}
    own: dict[str, Any] = term.loss.options  # type: ignore[attr-defined]  # a FusedLinearKDLoss
    return options | own


def _check_fused(terms: Iterable[Term]) -> None:
    """Raise if losses of hidden states cannot be computed beside the other terms."""
    terms = list(terms)
    fused = [term for term in terms if term.fused]
    if not fused:
        return
    if any(term.on_logits for term in terms):
        raise ValueError(
            "terms must not have losses on logits beside a FusedLinearKDLoss, which leaves the logits out; use KDLoss "
            "for all of them, or FusedLinearKDLoss with alpha for a cross-entropy"
        )
    named = {(term.student_layer, term.teacher_layer) for term in fused}
    if len(named) > 1:
        raise ValueError(
            f"terms with a FusedLinearKDLoss must name the same lm_heads, got {sorted(map(str, named))}"
        )


def _options_of(loss: Callable[..., Tensor]) -> tuple[str, ...]:
    """The BATCH_OPTIONS in the signature of a loss."""
    try:
        parameters = inspect.signature(getattr(loss, "forward", loss)).parameters.values()
    except ValueError:  # a function in C has no signature
        return ()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return BATCH_OPTIONS
    names = {parameter.name for parameter in parameters}
    return tuple(name for name in BATCH_OPTIONS if name in names)


def _all_names(layers: object) -> bool:
    return isinstance(layers, Sequence) and all(isinstance(name, str) for name in layers)


def _checked_weight(argument: str, weight: Any) -> float:
    weight = plain(weight)
    if isinstance(weight, (bool, Tensor)) or not isinstance(weight, (int, float)):
        raise TypeError(f"{argument} must be a number, got {type(weight).__name__}")
    weight = as_float(weight)
    if not math.isfinite(weight):
        raise ValueError(f"{argument} must be finite, got {weight}")
    return weight


def _checked_loss(name: str, value: object) -> Tensor:
    if isinstance(value, Tensor) and value.dim() == 0:
        return value
    actual = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"the loss of term {name!r} must return a 0-dim tensor, got {actual}")


def _check_terms(terms: object) -> None:
    if not isinstance(terms, Mapping) or not terms:
        raise TypeError(f"terms must be a dict of fastkd.distiller.Term, got {terms!r}")
    for name, term in terms.items():
        if not (isinstance(name, str) and name.isidentifier()) or name in ("loss", "own_loss"):
            raise ValueError(
                f"terms must be named by identifiers other than 'loss' and 'own_loss', got {name!r}"
            )
        if not isinstance(term, Term):
            raise TypeError(
                f"terms[{name!r}] must be a fastkd.distiller.Term, got {type(term).__name__}"
            )


def _check_layer(whose: str, name: str, layers: Mapping[str, nn.Module]) -> None:
    if name in layers:
        return
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, layers, n=5, cutoff=0.6)
    near += [other for other in layers if other.rpartition(".")[2] == last and other not in near]
    listed = ", ".join(
        repr(other) for other in near[:5] or [other for other in layers if other][:5]
    )
    raise ValueError(
        f"the {whose} has no layer {name!r}; {'similar names' if near else 'its first layers'}: {listed}"
    )
