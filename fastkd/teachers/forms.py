"""Conversion of a teacher to a list of tensors, which an op and a saved graph can hold, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkd.teachers.ensemble import Ensemble
from fastkd.teachers.linear import LinearTeacher
from fastkd.teachers.routed import RoutedTeacher
from fastkd.teachers.topk import TopK

Teacher = Tensor | TopK | LinearTeacher | Ensemble | RoutedTeacher


def weights_of(teacher: Teacher) -> tuple[float, ...]:
    """The weights of an ensemble's members; empty for other teachers."""
    if not isinstance(teacher, Ensemble):
        return ()
    assert teacher.weights is not None  # set by its constructor
    return tuple(teacher.weights)


def flatten(teacher: Teacher) -> tuple[list[Tensor], str]:
    """Return (the teacher's tensors, its form), from which :func:`unflatten` rebuilds it, with :func:`weights_of`.

    A TopK contributes only its log-probabilities.
    """
    if isinstance(teacher, Tensor):
        return [teacher], "dense"
    if isinstance(teacher, TopK):
        return [teacher.logprobs], "dense"
    if isinstance(teacher, LinearTeacher):
        tensors = [teacher.hidden, teacher.weight]
        if teacher.bias is not None:
            tensors.append(teacher.bias)
        return tensors, f"linear{len(tensors)}"
    tensors, form = [], teacher.mean if isinstance(teacher, Ensemble) else "routed"
    for member in teacher.teachers:
        parts, kind = flatten(member)
        tensors, form = tensors + parts, f"{form};{kind}"
    if isinstance(teacher, RoutedTeacher):
        tensors.append(teacher.index)
    return tensors, form


def unflatten(
    tensors: Sequence[Tensor], form: str, weights: Sequence[float] = ()
) -> Tensor | LinearTeacher | Ensemble | RoutedTeacher:
    """Rebuild the teacher; a TopK's log-probabilities become a dense teacher."""
    if form == "dense":
        return tensors[0]
    if form.startswith("linear"):
        return LinearTeacher(*tensors)
    mean, *members = form.split(";")
    teachers: list[Tensor | LinearTeacher] = []
    for kind in members:
        count = 1 if kind == "dense" else int(kind.removeprefix("linear"))
        teachers.append(unflatten(tensors[:count], kind))  # type: ignore[arg-type]  # a member is not combined
        tensors = tensors[count:]
    if mean == "routed":
        return RoutedTeacher(teachers, tensors[0])
    return Ensemble(teachers, weights, mean)
