"""nn.Module twins of the functions: they hold the options and nothing else."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.backends.registry import BackendUnavailable
from fastkd.call.checks import LossOptions, Numbers
from fastkd.core.scalars import as_float, plain
from fastkd.functional import DenseOptions, LinearOptions, Parts, fused_linear_kd_loss, kd_loss
from fastkd.teachers import Teacher

# What belongs to a batch, or to a model, and is passed to the call.
OF_A_CALL = ("student_bias", "mask", "weight", "num_items")


# Kept as floats where they are given as integers, which torch.compile would take for constants of a module.
FLOATS = tuple(name for name in Numbers._fields if name in LossOptions.__annotations__)


class _Loss(nn.Module):
    _names: frozenset[str] = frozenset()  # of the options that there are

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        options = {name: _as_float(name, value) for name, value in options.items()}
        self._check(options)
        self.options = options

    def _check(self, options: dict[str, Any]) -> None:
        name = type(self).__name__
        for argument in OF_A_CALL:
            if argument in options:
                raise TypeError(
                    f"{argument} belongs to a batch: pass it to the call, not to {name}()"
                )
        for argument in ("temperature", "teacher_temperature"):
            if isinstance(options.get(argument), Tensor):
                raise TypeError(
                    f"a tensor {argument} belongs to a batch: pass it to the call, not to {name}()"
                )
        if options.get("process_group") is not None:
            from fastkd.parallel.layout import group_of

            group_of(options["process_group"])
        # One row through the validation of the function, so that there is one; by this process alone.
        width = options.get("vocab_size")
        row = torch.zeros(1, width if type(width) is int and 0 < width < 2**31 else 2)
        with contextlib.suppress(
            BackendUnavailable
        ):  # for a row on the CPU: the logits may be elsewhere
            self._try(options, row, torch.zeros(1, dtype=torch.int64))

    def _try(self, options: dict[str, Any], row: Tensor, labels: Tensor) -> None:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """An option that was given, by its name; else what torch.nn.Module has."""
        options = self.__dict__.get("options", {})
        return options[name] if name in options else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option, as a schedule does from step to step; raises where the function would."""
        if name not in self._names:
            super().__setattr__(name, value)
            return
        value = _as_float(name, value)
        self._check(self.options | {name: value})
        self.options[name] = value

    def _with(self, **temperatures: Tensor | None) -> dict[str, Any]:
        given = {name: value for name, value in temperatures.items() if value is not None}
        return self.options | given

    def extra_repr(self) -> str:
        """The options, as they were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _as_float(name: str, value: Any) -> Any:
    value = plain(value)
    return as_float(value) if name in FLOATS and type(value) is int else value


class KDLoss(_Loss):
    """:func:`fastkd.kd_loss` with its options fixed; an option out of range raises here, not at the first step.

    Args:
        **options: keyword options of :func:`fastkd.kd_loss`, except mask, weight and num_items, which belong to a
            batch and are passed to the call; so is a temperature that is a tensor. They are attributes, which may be
            set: ``loss.temperature = 3.0``.

    Shapes: student_logits [..., V], the teacher as kd_loss takes it, labels, mask and weight [...]; returns what
    kd_loss returns.
    """

    _names = frozenset(DenseOptions.__annotations__) - set(OF_A_CALL) | {"return_parts"}

    def __init__(self, **options: Any) -> None:
        super().__init__(options)

    def _try(self, options: dict[str, Any], row: Tensor, labels: Tensor) -> None:
        kd_loss(row, row, labels, **(options | {"inplace": False, "process_group": None}))

    def forward(
        self,
        student_logits: Tensor,
        teacher: Teacher,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        temperature: Tensor | None = None,
        teacher_temperature: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Parts]:
        """The loss of one batch. Temperatures, one a row, replace those of the options."""
        return kd_loss(
            student_logits,
            teacher,
            labels,
            mask=mask,
            weight=weight,
            num_items=num_items,
            **self._with(temperature=temperature, teacher_temperature=teacher_temperature),
        )


class FusedLinearKDLoss(_Loss):
    """:func:`fastkd.fused_linear_kd_loss` with its options fixed; an option out of range raises here.

    Args:
        **options: keyword options of :func:`fastkd.fused_linear_kd_loss`, except student_bias, mask, weight and
            num_items, which are passed to the call; so is a temperature that is a tensor. They are attributes, which
            may be set.

    The head's weight is passed to the call too: this module holds no parameter, so that a tied head stays tied and
    sharded ones stay where they are.

    Shapes: student_hidden [..., H], student_weight [V, H], student_bias [V], the teacher as fused_linear_kd_loss takes
    it, labels, mask and weight [...]; returns what fused_linear_kd_loss returns.
    """

    _names = frozenset(LinearOptions.__annotations__) - set(OF_A_CALL) | {"return_parts"}

    def __init__(self, **options: Any) -> None:
        super().__init__(options)

    def _try(self, options: dict[str, Any], row: Tensor, labels: Tensor) -> None:
        dtype = options.get("logits_dtype")
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        hidden = torch.zeros(1, 1, dtype=dtype if floating else None)  # of the dtype to come
        weight = hidden.expand(row.shape[1], 1)
        alone = options | {"process_group": None, "sequence_dim": None}
        fused_linear_kd_loss(hidden, weight, row, labels, **alone)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: Teacher,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        temperature: Tensor | None = None,
        teacher_temperature: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Parts]:
        """The loss of one batch. Temperatures, one a row, replace those of the options."""
        return fused_linear_kd_loss(
            student_hidden,
            student_weight,
            teacher,
            labels,
            student_bias=student_bias,
            mask=mask,
            weight=weight,
            num_items=num_items,
            **self._with(temperature=temperature, teacher_temperature=teacher_temperature),
        )
