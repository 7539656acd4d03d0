"""Distiller: runs student and teacher, takes what terms want of their layers, and adds the losses up."""

from __future__ import annotations

import difflib
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.call.checks import check_choice
from fastkd.core.models import unwrapped
from fastkd.core.scalars import as_float, plain
from fastkd.distiller import models
from fastkd.teachers import Ensemble, LinearTeacher, TopK

GIVEN = ("labels", "mask", "num_items")


def first_tensor(output: Any) -> Tensor:
    """The first tensor of what a layer returns: itself, or of a tuple, list or dict (a ModelOutput is one)."""
    if isinstance(output, Tensor):
        return output
    members = output.values() if isinstance(output, Mapping) else output
    if isinstance(members, (tuple, list)) or isinstance(output, Mapping):
        for member in members:
            if isinstance(member, Tensor):
                return member
    raise TypeError(f"no tensor in a layer's output, a {type(output).__name__}; pass select=")


def find_logits(output: Any) -> Tensor:
    """The logits of a model's output: itself, its .logits or ["logits"], or the first of a tuple that is no number."""
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
    raise TypeError(f"no logits in a model's output, a {type(output).__name__}; pass find_logits=")


@dataclass(frozen=True, eq=False)
class Term:
    """One loss between student and teacher.

    Args:
        loss: called with what student and teacher have, and by keyword with what `takes` says; returns a 0-dim tensor.
            A module's parameters are trained and saved with the :class:`Distiller`.
        student_layer: a name as in named_modules(), "" being the whole model: the loss gets what that layer returned. A
            sequence of names: a tuple of these. None: where the loss names its layers (attributes student_layers and
            teacher_layers, as :class:`fastkd.features.FeatureLoss` has), dicts of these by name; else the logits.
        teacher_layer: likewise; None: those of student_layer.
        weight: a number, or a function of the step that returns one. A term of weight 0 does no work.
        select: from what a layer returned to what the loss gets, a tensor, or a tuple or dict of tensors.
            `lambda output: output.hidden_states` with layer "" gives a FeatureLoss over indices what it wants.
        takes: which of "labels", "mask" and "num_items" the loss gets by keyword where a call has them. None: those
            that its signature names (of forward, for a module), or all where that has **options.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value; the message names it.
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
            raise ValueError("student_layer must be given where teacher_layer is")
        names = getattr(self.loss, "student_layers", None)
        if self.student_layer is None and names is not None and not _all_names(names):
            raise ValueError(
                f"student_layer must be given for a loss whose layers are indices, {names}: '' with "
                "select=lambda output: output.hidden_states, or names of layers"
            )
        for argument in ("student_layer", "teacher_layer"):
            layer = getattr(self, argument)
            if not (layer is None or isinstance(layer, str) or (_all_names(layer) and layer)):
                raise TypeError(f"{argument} must be a name or a sequence of names, got {layer!r}")
        if self.takes is not None and (
            isinstance(self.takes, (str, Tensor))
            or not isinstance(self.takes, Iterable)
            or any(name not in GIVEN for name in self.takes)
        ):
            raise ValueError(f"takes must be some of {', '.join(GIVEN)}; got {self.takes!r}")
        if self.takes is None:
            object.__setattr__(self, "takes", _named_by(self.loss))

    @property
    def on_logits(self) -> bool:
        """Whether the loss is one of logits."""
        return self.student_layer is None and not hasattr(self.loss, "student_layers")

    def _layers(self, side: str) -> str | Sequence[str]:
        if self.student_layer is None:
            names: list[str] = getattr(self.loss, f"{side}_layers")
            return names
        own = self.student_layer if side == "student" else self.teacher_layer
        return self.student_layer if own is None else own

    def _names(self, side: str) -> Sequence[str]:
        layers = self._layers(side)
        return (layers,) if isinstance(layers, str) else layers

    def _arranged(self, side: str, found: Callable[[str], Any]) -> Any:
        """What the loss gets, from what is found by name."""
        layers = self._layers(side)
        if isinstance(layers, str):
            return found(layers)
        if self.student_layer is None:
            return {name: found(name) for name in layers}
        return tuple(found(name) for name in layers)

    def _weight_at(self, name: str, step: int | None) -> float:
        if not callable(self.weight):
            return self.weight
        if step is None:
            raise ValueError(f"step must be given, as the weight of term {name!r} depends on it")
        return _checked_weight(f"the weight of term {name!r} at step {step}", self.weight(step))


class Distiller(nn.Module):
    """A student, a teacher and weighted losses between them, over logits and over layers caught by name.

    The student and the losses are submodules, so parameters(), train() and to() have both, and DistributedDataParallel
    takes the Distiller as it is (find_unused_parameters=True where some term or layer is left out at times). The
    teacher is no submodule: it has no place in parameters() and train(), but to() and its kin move and cast it along.
    It runs under no_grad and in eval mode, and is put back into the mode it had. Each model gets the named inputs that
    its forward names, and use_cache=False where it knows that, as with a cache models of transformers read across the
    examples of a packed batch; the first packed batch is checked for it. state_dict() and load_state_dict()
    have the losses' own state (learned and fixed projections) alone; the student is saved as itself.

    Layers are caught by forward hooks that close() removes, as does the end of a `with` block or of the Distiller.
    Nothing that they caught is kept after a call; one thread calls it at a time. A copy (copy.deepcopy) catches
    nothing, and a model with hooks is not pickled: make the Distiller anew, or close it first. It raises if a layer did
    not run, ran more than once (its outputs would be ambiguous), was changed in place afterwards, or ran without
    gradients within a student that has them (as reentrant checkpointing does; the other kind works).

    torch.compile of the student, the teacher or the Distiller works where the model's first run comes after the
    Distiller is made: torch does not look for hooks again. If it came before, the layers are missing, which raises. A
    compiled graph hides whether a layer's output was changed in place: try a step in eager mode first.

    Args:
        student: any module.
        teacher: any module; None: calls bring what the teacher said.
        terms: by name, an identifier other than "loss".
        find_logits: from a model's output to its logits, for student and teacher.
        own_loss: "keep": what the student returns as "loss", or a router's auxiliary loss times the student's own
            coefficient, is added to the sum and is part "own_loss". "drop": it is left out. As the student gets no
            labels, a term that it adds only to a loss of labels is not seen.

    Raises:
        TypeError, ValueError: an argument of the wrong type; a layer that is not there, with the names closest to it.
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
        self._teacher = (teacher,)  # in a tuple, where nn.Module does not find it
        self._of_student = _Capture("student", student, _taps(terms.values(), "student"))
        self._of_teacher = (
            None
            if teacher is None
            else _Capture("teacher", teacher, _taps(terms.values(), "teacher"))
        )
        handles = [*self._of_student.handles]
        if self._of_teacher is not None:
            handles += self._of_teacher.handles
        self._remove_hooks = weakref.finalize(self, _remove, handles)
        self.register_load_state_dict_pre_hook(_keep_student)

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher."""
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
        """The loss of one batch.

        Args:
            *inputs: of both models, with **named_inputs, of which each gets those that it names.
            labels: for the losses that take them; neither model gets them, but an encoder-decoder's decoder_input_ids
                are made from them where they are not given. They are those of the logits' rows: a causal language
                model's are shifted by the caller.
            mask: bool, for the losses that take it: rows of logits and positions of features that count.
            num_items: likewise, the denominator of :func:`fastkd.kd_loss`.
            step: for weights that change with it.
            teacher_output: the teacher's, from an earlier run: logits, a model's output, a :class:`fastkd.TopK`, or
                another teacher of kd_loss.
            teacher_layers: likewise, by name, what `select` would have given. The teacher runs if something that the
                terms of this step need is not given.

        Returns:
            (the weighted sum, its parts). Parts are detached and 0-dim: each loss by its name before its weight,
            without those of weight 0, and the sum as "loss".

        Raises:
            ValueError: there is nothing to do, or something is missing; a model reads across the examples of a packed
                batch; the student returns a loss whose coefficient is not known.
            TypeError: a named input that no model takes.
            RuntimeError: a layer was not caught; the message says why.
        """
        weights = {name: term._weight_at(name, step) for name, term in self.terms.items()}
        weights = {name: weight for name, weight in weights.items() if weight != 0}
        if not weights:
            raise ValueError(f"some term must have a weight other than 0; at step {step} none has")
        terms = [self.terms[name] for name in weights]
        for name in named_inputs:
            sides = (self._takes, self._teacher_takes)
            if not any(side and (side.open or name in side.names) for side in sides):
                raise TypeError(
                    f"{name} is an input of neither model: their forward has no such argument"
                )
        self._check_boundaries(inputs, named_inputs, labels)
        target, of_teacher = self._ask_teacher(
            terms, inputs, named_inputs, labels, teacher_output, teacher_layers
        )
        chosen = self._takes.chosen(named_inputs)
        chosen = models.with_decoder_inputs(self.student, chosen, labels)
        output, of_student = self._of_student.run(
            self.student, inputs, chosen, _taps(terms, "student")
        )
        given = {"labels": labels, "mask": mask, "num_items": num_items}
        total: Tensor | None = None
        parts = {}
        for name, weight in weights.items():
            term = self.terms[name]
            student: Any
            if term.on_logits:
                student, teacher = self.find_logits(output), target
            else:
                student = term._arranged("student", _finder(of_student, term))
                teacher = term._arranged("teacher", _finder(of_teacher, term))
            takes = {key: given[key] for key in term.takes or () if given[key] is not None}
            value = term.loss(student, teacher, **takes)
            if not isinstance(value, Tensor) or value.dim() != 0:
                shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"the loss of term {name!r} must return a 0-dim tensor, got {shown}"
                )
            total = weight * value if total is None else total + weight * value
            parts[name] = value.detach()
        assert total is not None
        own = models.own_loss(self.student, output) if self._keeps_own_loss else None
        if own is not None:
            total = total + own
            parts["own_loss"] = own.detach()
        parts["loss"] = total.detach()
        return total, parts

    def _ask_teacher(
        self,
        terms: Sequence[Term],
        inputs: Sequence[Any],
        named_inputs: Mapping[str, Any],
        labels: Tensor | None,
        output: Any,
        layers: Mapping[str, Any] | None,
    ) -> tuple[Any, dict[Tap, Any]]:
        """(the target of losses on logits, layers): as they are given, and from a run for what is not."""
        taps = _taps(terms, "teacher")
        given = layers or {}
        missing = [tap for tap in taps if tap.name not in given]
        wants_logits = any(term.on_logits for term in terms)
        found = {tap: given[tap.name] for tap in taps if tap.name in given}
        if missing or (wants_logits and output is None):
            teacher, capture, takes = self.teacher, self._of_teacher, self._teacher_takes
            if teacher is None or capture is None or takes is None:
                wanted = f"teacher_layers[{missing[0].name!r}]" if missing else "teacher_output"
                raise ValueError(f"{wanted} must be given, as there is no teacher to ask")
            chosen = models.with_decoder_inputs(teacher, takes.chosen(named_inputs), labels)
            training = [module for module in teacher.modules() if module.training]
            try:
                if training:
                    teacher.eval()
                with torch.no_grad():
                    said, caught = capture.run(teacher, inputs, chosen, missing)
            finally:
                for module in training:
                    module.training = True
            found |= caught
            output = said if output is None else output
        if not wants_logits or isinstance(output, (TopK, LinearTeacher, Ensemble)):
            return output, found
        return self.find_logits(output), found

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
        """Parameters of the losses: those of parameters() that are not the student's."""
        return self.losses.parameters()

    def close(self) -> None:
        """Take the hooks off both models. Losses on layers raise from then on."""
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
        """The losses' state, under "losses."; nothing of either model."""
        return self.losses.state_dict(prefix=f"{prefix}losses.", **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)
        if self.teacher is not None and recurse:
            self.teacher._apply(fn)
        return self


class Tap(NamedTuple):
    """What is taken from a layer, by name."""

    name: str
    select: Callable[[Any], Any]


class _Caught(NamedTuple):
    value: Any
    versions: list[int] | None  # of its tensors, when it was caught; None: not known
    with_gradients: bool


class _Capture:
    """The hooks on one model."""

    def __init__(self, whose: str, model: nn.Module, taps: Sequence[Tap]) -> None:
        self.whose = whose
        layers = dict(unwrapped(model).named_modules(remove_duplicate=False))
        for tap in taps:
            _check_layer(whose, tap.name, layers)
        self.taps = list(taps)
        # By tap what its layer returned in the run that goes on; None: nobody asks.
        self.caught: list[list[_Caught] | None] = [None] * len(taps)
        self.handles = [
            layers[tap.name].register_forward_hook(self._hook(index, tap.select))
            for index, tap in enumerate(taps)
        ]

    def _hook(self, index: int, select: Callable[[Any], Any]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            caught = self.caught[index]
            if caught is not None:
                value = select(output)
                caught.append(_Caught(value, _versions(value), torch.is_grad_enabled()))

        return hook

    def run(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        named_inputs: Mapping[str, Any],
        taps: Sequence[Tap],
    ) -> tuple[Any, dict[Tap, Any]]:
        """(the model's output, what was taken)"""
        try:
            for index, tap in enumerate(self.taps):
                self.caught[index] = [] if tap in taps else None
            output = model(*inputs, **named_inputs)
            found = {
                tap: self._only(tap.name, caught)
                for tap, caught in zip(self.taps, self.caught, strict=True)
                if caught is not None
            }
            return output, found
        finally:
            self.caught = [None] * len(self.taps)

    def _only(self, name: str, caught: list[_Caught]) -> Any:
        layer = f"layer {name!r} of the {self.whose}"
        if not caught:
            raise RuntimeError(
                f"{layer} was not captured: it did not run, its forward was called without its hooks, the Distiller is "
                "closed, or the model was compiled and had run before the Distiller was made (make it first, or call "
                "torch.compiler.reset())"
            )
        if len(caught) > 1:
            raise RuntimeError(
                f"{layer} ran {len(caught)} times, so that its output is ambiguous; name the layers around its uses"
            )
        value, versions, with_gradients = caught[0]
        if torch.is_grad_enabled() and not with_gradients:
            raise RuntimeError(
                f"{layer} ran without gradients, so that nothing would train through it; checkpoint with "
                "use_reentrant=False"
            )
        if versions is not None and _versions(value) not in (None, versions):
            raise RuntimeError(
                f"the output of {layer} was changed in place afterwards (nn.ReLU(inplace=True)?); name the layer that "
                "changed it, or have it make a new tensor"
            )
        return value


def _taps(terms: Iterable[Term], side: str) -> list[Tap]:
    """What the terms want of a model, each once."""
    wanted = (
        Tap(name, term.select) for term in terms if not term.on_logits for name in term._names(side)
    )
    return list(dict.fromkeys(wanted))


def _finder(found: Mapping[Tap, Any], term: Term) -> Callable[[str], Any]:
    return lambda name: found[Tap(name, term.select)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for member in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(member)


def _versions(value: Any) -> list[int] | None:
    """How often each tensor was written to; None where that is not kept."""
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
    """Before a load: the student is no part of what is loaded, and so loads what it has."""
    prefix += "student."
    unexpected += [key for key in state if key.startswith(prefix)]
    state.update(distiller.student.state_dict(prefix=prefix, keep_vars=True))


def _named_by(loss: Callable[..., Tensor]) -> tuple[str, ...]:
    """What of GIVEN a loss names among its parameters."""
    try:
        parameters = inspect.signature(getattr(loss, "forward", loss)).parameters.values()
    except ValueError:  # of a function in C
        return ()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return GIVEN
    names = {parameter.name for parameter in parameters}
    return tuple(name for name in GIVEN if name in names)


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


def _check_terms(terms: object) -> None:
    if not isinstance(terms, Mapping) or not terms:
        raise TypeError(f"terms must be a dict of fastkd.distiller.Term, got {terms!r}")
    for name, term in terms.items():
        if not (isinstance(name, str) and name.isidentifier()) or name in ("loss", "own_loss"):
            raise ValueError(
                f"terms must have identifiers other than 'loss' and 'own_loss' for names, got {name!r}"
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
        f"the {whose} has no layer {name!r}; {'near it are' if near else 'its first are'} {listed}"
    )
