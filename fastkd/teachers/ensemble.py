"""Several teachers combined into one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastkd.core.scalars import plain
from fastkd.teachers.linear import LinearTeacher
from fastkd.teachers.tensors import FLOATS, check_tensor

MEANS = ("arithmetic", "geometric")


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several teachers combined into one target.

    - "arithmetic": p = sum_k w_k p_k. The weighted mean of the forward KLs to the teachers differs from the forward
      KL to p by a constant, so both have the same gradient.
    - "geometric": p proportional to prod_k p_k^(w_k), the softmax of the weighted mean of the logits. The weighted mean
      of the reverse KLs differs from the reverse KL to p by a constant.

    The temperature is applied to each teacher before they are combined, a chunk of rows at a time.

    Args:
        teachers: one or more, each dense logits [..., V] or a :class:`LinearTeacher`.
        weights: one per teacher, not negative, with a positive sum, by which they are divided. None: equal weights.
        mean: "arithmetic" or "geometric".

    Raises:
        TypeError, ValueError: a wrong type, shape or value; the message names the argument.
    """

    teachers: Sequence[Tensor | LinearTeacher]
    weights: Sequence[float] | None = None
    mean: str = "arithmetic"

    def __post_init__(self) -> None:
        if isinstance(self.teachers, Tensor) or not isinstance(self.teachers, Sequence):
            raise TypeError(
                f"teachers must be a list of teachers, got {type(self.teachers).__name__}"
            )
        object.__setattr__(self, "teachers", tuple(self.teachers))
        if not self.teachers:
            raise ValueError("teachers must contain at least one teacher, got none")
        for index, teacher in enumerate(self.teachers):
            if isinstance(teacher, Tensor):
                check_tensor(f"teachers[{index}]", teacher, FLOATS)
            elif not isinstance(teacher, LinearTeacher):
                raise TypeError(
                    f"teachers[{index}] must be dense logits or a LinearTeacher, got {type(teacher).__name__}"
                )
        if self.mean not in MEANS:
            raise ValueError(f"mean must be one of {', '.join(MEANS)}; got {self.mean!r}")
        if self.weights is not None and (
            isinstance(self.weights, (str, Tensor)) or not isinstance(self.weights, Iterable)
        ):
            raise TypeError(
                f"weights must be a list of numbers or None, got {type(self.weights).__name__}"
            )
        weights = (
            [1.0] * len(self.teachers) if self.weights is None else list(map(plain, self.weights))
        )
        if len(weights) != len(self.teachers):
            raise ValueError(
                f"weights must have one number per teacher, {len(self.teachers)}; got {len(weights)}"
            )
        for index, weight in enumerate(weights):
            if isinstance(weight, (bool, Tensor)) or not isinstance(weight, (int, float)):
                raise TypeError(f"weights[{index}] must be a number, got {type(weight).__name__}")
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights[{index}] must be finite and not negative, got {weight}")
        if not 0 < sum(weights) < math.inf:
            raise ValueError(f"weights must have a positive, finite sum, got {weights}")
        object.__setattr__(self, "weights", tuple(weight / sum(weights) for weight in weights))
