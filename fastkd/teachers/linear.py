"""A teacher that is given as hidden states and an lm_head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.teachers.tensors import FLOATS, check_tensor


@dataclass(frozen=True, eq=False)
class LinearTeacher:
    """A teacher given as hidden states and an lm_head. Its logits are computed a chunk of rows at a time.

        logits = hidden @ weight.T + bias

    Args:
        hidden: [..., H]; H may differ from the student's.
        weight: [V, H].
        bias: [V], or None.

    All tensors have one device and, outside autocast, one dtype. If the model's head scales or soft-caps its logits,
    pass that to the loss as teacher_logit_scale and teacher_softcap.

    Raises:
        TypeError, ValueError: a wrong type, dtype or shape; the message names the argument.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "weight", "bias"):
            value = getattr(self, name)
            if value is not None or name != "bias":
                check_tensor(f"the teacher's {name}", value, FLOATS)
        check_linear("the teacher's ", self.hidden, self.weight, self.bias)


def check_linear(
    whose: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: str = ""
) -> None:
    """Raise unless hidden [..., H], weight [V, H] and bias [V] fit together.

    whose is the prefix of the names in messages: "the teacher's " or "student_". rows: the name of hidden, if it is not
    that prefix and "hidden".
    """
    rows = rows or f"{whose}hidden"
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{rows} must be [..., H], got shape {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        width_of = "hidden" if rows == f"{whose}hidden" else rows
        raise ValueError(
            f"{whose}weight must be [V, {hidden.shape[-1]}], the width of {width_of}; got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{whose}bias must be [{weight.shape[0]}], one number per row of weight; got {tuple(bias.shape)}"
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.device != hidden.device:
            raise ValueError(
                f"{whose}{name} must be on {hidden.device}, the device of {rows}; got {value.device}"
            )
        if value.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(
                f"{whose}{name} must be {hidden.dtype}, the dtype of {rows}; got {value.dtype}"
            )
