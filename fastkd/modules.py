"""nn.Module twins of the functions: they hold the options and nothing else."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.backends import BackendUnavailable
from fastkd.functional import Parts, kd_loss


class KDLoss(nn.Module):
    """:func:`fastkd.kd_loss` with its options fixed; an option out of range raises here, not at the first step.

    Args:
        **options: keyword options of :func:`fastkd.kd_loss`, except mask, weight and num_items, which belong to a
            batch and are passed to the call; so is a temperature that is a tensor.

    Shapes: student_logits and teacher [..., V], labels, mask and weight [...]; returns what kd_loss returns.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for argument in ("mask", "weight", "num_items"):
            if argument in options:
                raise TypeError(
                    f"{argument} belongs to a batch: pass it to the call, not to KDLoss()"
                )
        for argument in ("temperature", "teacher_temperature"):
            if isinstance(options.get(argument), Tensor):
                raise TypeError(
                    f"a tensor {argument} belongs to a batch: pass it to the call, not to KDLoss()"
                )
        self.options = options
        # One row through the validation of kd_loss, so that there is one.
        width = options.get("vocab_size")
        row = torch.zeros(1, width if type(width) is int and width > 0 else 2)
        with contextlib.suppress(
            BackendUnavailable
        ):  # for a row on the CPU: the logits may be elsewhere
            kd_loss(row, row, torch.zeros(1, dtype=torch.int64), **(options | {"inplace": False}))

    def forward(
        self,
        student_logits: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        temperature: Tensor | None = None,
        teacher_temperature: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Parts]:
        """The loss of one batch. Temperatures, one a row, replace those of the options."""
        options = self.options
        if temperature is not None:
            options = options | {"temperature": temperature}
        if teacher_temperature is not None:
            options = options | {"teacher_temperature": teacher_temperature}
        return kd_loss(
            student_logits,
            teacher,
            labels,
            mask=mask,
            weight=weight,
            num_items=num_items,
            **options,
        )

    def extra_repr(self) -> str:
        """The options, as they were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
