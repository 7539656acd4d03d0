"""Several teachers combined into one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastkd.core.scalars import plain
from fastkd.teachers.linear import LinearTeacher
from fastkd.teachers.tensors import FLOATS, check_tensor, checked_list
from fastkd.teachers.topk import TopK

MEANS = ("arithmetic", "geometric")
# For each unsupported pair of mean and policy: the reason, and what to pass instead.
_UNKNOWN = {
    (
        "arithmetic",
        "renormalize",
    ): "the mean of probabilities needs each teacher's probabilities, and under this "
    "policy only their ratios are known. Pass tail='bucket', tail='renormalize_teacher' or mean='geometric'",
    (
        "arithmetic",
        "truncate",
    ): "under this policy a teacher says nothing about tokens that it does not list, so "
    "their mean is unknown if the lists differ. Pass tail='bucket' or tail='renormalize_teacher'",
    **{
        (
            "geometric",
            tail,
        ): "the geometric mean of the unlisted tokens cannot be known from their mass. Pass "
        "mean='arithmetic', or tail='renormalize', which leaves them out"
        for tail in ("bucket", "truncate")
    },
    (
        "geometric",
        "renormalize_teacher",
    ): "the geometric mean is 0 for each token that one teacher does not list. Pass "
    "mean='arithmetic', or tail='renormalize' for the tokens that all list",
}


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several teachers combined into one target.

    - "arithmetic": p = sum_k w_k p_k. The weighted mean of the forward KLs to the teachers differs from the forward
      KL to p by a constant, so both have the same gradient.
    - "geometric": p proportional to prod_k p_k^(w_k), the softmax of the weighted mean of the logits. The weighted mean
      of the reverse KLs differs from the reverse KL to p by a constant.

    The temperature is applied to each teacher before they are combined, a chunk of rows at a time.

    **TopKs among the teachers.** A TopK holds the probabilities of its listed tokens only, so the ensemble becomes one
    TopK of the tokens for which the mean is known. All TopKs must have the same policy for the tail:

    - "arithmetic" and "bucket": the tokens that every TopK lists, with p as above, and one event for all other tokens,
      with the mass that is left. A dense teacher counts as one that lists every token. The probabilities of these
      events are exactly those of the mean. A token that one TopK lists and another does not is part of the tail.
    - "arithmetic" and "renormalize_teacher": the tokens that at least one TopK lists, with p = sum_k w_k p_k. Each p_k
      is divided by its sum over the tokens that teacher k lists, and is 0 for other tokens. Dense teachers raise.
    - "geometric" and "renormalize": the tokens that every TopK lists, with p proportional to prod_k p_k^(w_k). This is
      the geometric mean of the teachers, renormalized over these tokens.

    Other combinations raise, because the mean cannot be known. A row in which a TopK lists no token has no teacher: it
    is treated like a row of a TopK whose ids are all -1. A row that is invalid in one TopK is NaN. A dense teacher's
    logits are computed a chunk of rows at a time, and every process needs that teacher's whole vocabulary. Under
    torch.compile such an ensemble breaks the graph.

    Args:
        teachers: one or more, each dense logits [..., V], a :class:`LinearTeacher` or a :class:`TopK`.
        weights: one per teacher, not negative, with a positive sum, by which they are divided. None: equal weights.
        mean: "arithmetic" or "geometric".

    Raises:
        TypeError, ValueError: a wrong type, shape or value; the message names the argument.
    """

    teachers: Sequence[Tensor | LinearTeacher | TopK]
    weights: Sequence[float] | None = None
    mean: str = "arithmetic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "teachers", checked_list(self.teachers))
        for index, teacher in enumerate(self.teachers):
            if isinstance(teacher, Tensor):
                check_tensor(f"teachers[{index}]", teacher, FLOATS)
            elif not isinstance(teacher, (LinearTeacher, TopK)):
                raise TypeError(
                    f"teachers[{index}] must be dense logits, a LinearTeacher or a TopK, got {type(teacher).__name__}"
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
        self._check_tails()

    def _check_tails(self) -> None:
        """Raise unless all TopKs have the same policy, and the mean is known for it."""
        sparse = {i: member for i, member in enumerate(self.teachers) if isinstance(member, TopK)}
        if not sparse:
            return
        (first, member), *_ = sparse.items()
        for index, other in sparse.items():
            if other.tail != member.tail:
                raise ValueError(
                    f"teachers[{index}].tail must be that of teachers[{first}], {member.tail!r}; got {other.tail!r}"
                )
        reason = _UNKNOWN.get((self.mean, member.tail))
        if reason is not None:
            raise ValueError(
                f"an Ensemble with mean={self.mean!r} cannot combine TopKs with tail={member.tail!r}: {reason}"
            )
        if member.tail == "renormalize_teacher" and len(sparse) < len(self.teachers):
            raise ValueError(
                "an Ensemble cannot combine TopKs with tail='renormalize_teacher' and dense teachers, because a dense "
                "teacher gives every token a probability. Pass tail='bucket', or "
                "TopK.from_logits(..., tail='renormalize_teacher') of the dense ones"
            )

    @property
    def tail(self) -> str:
        """The policy of the TopKs; "" if there is none."""
        return next((member.tail for member in self.teachers if isinstance(member, TopK)), "")

    @property
    def is_sparse(self) -> bool:
        """Whether a teacher with a weight other than 0 is a TopK."""
        assert self.weights is not None
        return any(
            isinstance(member, TopK) and weight > 0
            for member, weight in zip(self.teachers, self.weights, strict=True)
        )
