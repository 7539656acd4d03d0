"""KDLoss and FusedLinearKDLoss: nn.Module forms of the two losses that hold options but no parameters."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.backends.registry import BackendUnavailable
from fastkd.call.checks import check_parts
from fastkd.call.options import TABLE
from fastkd.core.scalars import as_float, plain
from fastkd.functional import (
    DenseOptions,
    LinearOptions,
    MeasuredParts,
    Parts,
    fused_linear_kd_loss,
    kd_loss,
)
from fastkd.teachers import Teacher

# Arguments that change with every batch. They are passed to the call, not to the constructor.
CALL_ARGUMENTS = ("student_bias", "mask", "weight", "num_items")

# Options that are stored as floats even if given as ints: torch.compile treats a module's ints as constants, and would
# recompile when a schedule changes one.
FLOATS = tuple(option.name for option in TABLE if option.stand_in is not None)


class _Loss(nn.Module):
    _option_names: frozenset[str] = frozenset()

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        options = {name: _as_float(name, value) for name, value in options.items()}
        self._check(options)
        self.options = options

    def _check(self, options: dict[str, Any]) -> None:
        name = type(self).__name__
        for argument in CALL_ARGUMENTS:
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
        # The row below has a dense teacher, for which only some measures exist.
        check_parts(options.get("return_parts", False))
        options = options | {"return_parts": False}
        # Calling the function on one row validates the options without a second validator. The call involves this
        # process only.
        width = options.get("vocab_size")
        row = torch.zeros(1, width if type(width) is int and 0 < width < 2**31 else 2)
        # The row is on the CPU. A backend that cannot serve it may still serve the real logits on another device.
        with contextlib.suppress(BackendUnavailable):
            self._call_on_one_row(options, row, torch.zeros(1, dtype=torch.int64))

    def _call_on_one_row(self, options: dict[str, Any], row: Tensor, labels: Tensor) -> None:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """Return the option of that name if one was set, else the attribute of torch.nn.Module."""
        options = self.__dict__.get("options", {})
        return options[name] if name in options else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option, for example from a schedule; raises the errors that the function would raise."""
        if name not in self._option_names:
            super().__setattr__(name, value)
            return
        value = _as_float(name, value)
        self._check(self.options | {name: value})
        self.options[name] = value

    def _options_with(self, **temperatures: Tensor | None) -> dict[str, Any]:
        overrides = {name: value for name, value in temperatures.items() if value is not None}
        return self.options | overrides

    def extra_repr(self) -> str:
        """Return the options that were set, as name=value."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _as_float(name: str, value: Any) -> Any:
    value = plain(value)
    return as_float(value) if name in FLOATS and type(value) is int else value


class KDLoss(_Loss):
    """Module form of :func:`fastkd.kd_loss` with fixed options; invalid options raise here, not at the first step.

    Args:
        **options: keyword options of :func:`fastkd.kd_loss`, except mask, weight, num_items and tensor temperatures,
            which belong to a batch and are passed to the call. Each option is an attribute that can be set, for example
            ``loss.temperature = 3.0``.

    Shapes: student_logits [..., V]; a teacher as in kd_loss; labels, mask and weight [...]. Returns what kd_loss
    returns.

    Raises:
        ValueError, TypeError: an option has the wrong type or value, or belongs to a batch; the message names it.
    """

    _option_names = frozenset(DenseOptions.__annotations__) - set(CALL_ARGUMENTS) | {"return_parts"}

    def __init__(self, **options: Any) -> None:
        super().__init__(options)

    def _call_on_one_row(self, options: dict[str, Any], row: Tensor, labels: Tensor) -> None:
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
    ) -> Tensor | tuple[Tensor, Parts] | tuple[Tensor, MeasuredParts]:
        """Return the loss of one batch. Per-row temperatures given here replace those of the options."""
        return kd_loss(
            student_logits,
            teacher,
            labels,
            mask=mask,
            weight=weight,
            num_items=num_items,
            **self._options_with(temperature=temperature, teacher_temperature=teacher_temperature),
        )


class FusedLinearKDLoss(_Loss):
    """Module form of :func:`fastkd.fused_linear_kd_loss` with fixed options; invalid options raise here.

    Args:
        **options: keyword options of :func:`fastkd.fused_linear_kd_loss`, except student_bias, mask, weight, num_items
            and tensor temperatures, which are passed to the call. Each option is an attribute that can be set.

    The lm_head's weight is passed to the call too. This module holds no parameters, so tied weights stay tied and
    sharded weights stay where they are.

    Shapes: student_hidden [..., H]; student_weight [V, H]; student_bias [V]; a teacher as in fused_linear_kd_loss;
    labels, mask and weight [...]. Returns what fused_linear_kd_loss returns.

    Raises:
        ValueError, TypeError: an option has the wrong type or value, or belongs to a batch; the message names it.
    """

    _option_names = frozenset(LinearOptions.__annotations__) - set(CALL_ARGUMENTS) | {
        "return_parts"
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(options)

    def _call_on_one_row(self, options: dict[str, Any], row: Tensor, labels: Tensor) -> None:
        dtype = options.get("logits_dtype")
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        hidden = torch.zeros(1, 1, dtype=dtype if floating else None)
        weight = hidden.expand(row.shape[1], 1)
        local_options = options | {"process_group": None, "sequence_dim": None}
        fused_linear_kd_loss(hidden, weight, row, labels, **local_options)

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
    ) -> Tensor | tuple[Tensor, Parts] | tuple[Tensor, MeasuredParts]:
        """Return the loss of one batch. Per-row temperatures given here replace those of the options."""
        return fused_linear_kd_loss(
            student_hidden,
            student_weight,
            teacher,
            labels,
            student_bias=student_bias,
            mask=mask,
            weight=weight,
            num_items=num_items,
            **self._options_with(temperature=temperature, teacher_temperature=teacher_temperature),
        )
