"""Born-again networks: the student of a generation teaches the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.core.scalars import check_int
from fastkd.teachers import Ensemble


def born_again(
    make_student: Callable[[], nn.Module],
    train: Callable[[nn.Module, nn.Module | None], object],
    generations: int,
    *,
    teacher: nn.Module | None = None,
) -> Iterator[nn.Module]:
    """Born-again networks (Furlanello et al. 2018): the student of a generation teaches the next.

        for model in born_again(make_student, train, generations=3):
            evaluate(model)

    Args:
        make_student: returns a fresh student; in the paper, of the same architecture.
        train: train(student, teacher) trains the student in place, for instance with :func:`fastkd.kd_loss`. teacher is
            None for a first generation without a teacher, which learns from the labels.
        generations: how many students.
        teacher: the teacher of the first generation, or None.

    Yields:
        Each trained generation, in evaluation mode and frozen, because it teaches the next one.

    Memory: two models at a time, plus those that the caller keeps.

    Raises:
        ValueError, TypeError: an argument is wrong. This raises before any training.
    """
    for argument, value in (("make_student", make_student), ("train", train)):
        if not callable(value):
            raise TypeError(f"{argument} must be callable, got {type(value).__name__}")
    if teacher is not None and not callable(teacher):
        raise TypeError(f"teacher must be a module or None, got {type(teacher).__name__}")
    generations = check_int("generations", generations)
    if generations < 1:
        raise ValueError(f"generations must be at least 1, got {generations}")
    return _generations(make_student, train, generations, teacher)


def _generations(
    make_student: Callable[[], nn.Module],
    train: Callable[[nn.Module, nn.Module | None], object],
    generations: int,
    teacher: nn.Module | None,
) -> Iterator[nn.Module]:
    for _ in range(generations):
        student = make_student()
        if student is teacher:
            raise ValueError("make_student must return a fresh module; it returned the teacher")
        train(student, teacher)
        teacher = student.eval().requires_grad_(False)
        yield teacher


def generations_teacher(
    models: Sequence[nn.Module],
    *inputs: Any,
    weights: Sequence[float] | None = None,
    mean: str = "arithmetic",
    **options: Any,
) -> Ensemble:
    """Combine all generations into one teacher for a batch: a :class:`fastkd.Ensemble` of their logits.

    Args:
        models: modules that return logits [..., V], or an output with them as `.logits`.
        *inputs: positional arguments of the models.
        weights: as in Ensemble.
        mean: as in Ensemble: "arithmetic" as in the paper's ensembles, or "geometric".
        **options: keyword arguments of the models.

    Memory: the logits of every model.

    Raises:
        ValueError, TypeError: as Ensemble does.
    """
    if not isinstance(models, Iterable) or isinstance(models, (str, Tensor)):
        raise TypeError(f"models must be a list of modules, got {type(models).__name__}")
    models = list(models)
    for index, model in enumerate(models):
        if not callable(model):
            raise TypeError(f"models[{index}] must be callable, got {type(model).__name__}")
    with torch.no_grad():
        outputs = [model(*inputs, **options) for model in models]
    return Ensemble([getattr(output, "logits", output) for output in outputs], weights, mean)
