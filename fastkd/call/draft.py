"""The contract of a draft model's loss: a weighted sum of terms per row, the acceptance and the gradient of the sum.

A backend whose kernel computes all of them in one visit to a row has

    draft_rows(student, teacher, rows, options, terms, want) -> Result

student is [..., D] and teacher [..., V], of any dtype that the backend supports; the gradient has the student's dtype.
Of options it reads scale only. The losses of fastkd.response run the other backends' kd_rows once per divergence.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

LOSSES = ("forward_kl", "reverse_kl", "jsd", "cross_entropy", "tvd", "nla", "lk_hybrid")
OF_ACCEPTANCE = ("tvd", "nla", "lk_hybrid")
# The lowest acceptance that nla distinguishes: below it the loss is constant and has no gradient, as in speculators.
LOWEST_ACCEPTANCE = 1e-5


class Terms(NamedTuple):
    """The terms of a loss; fastkd.response.draft_loss has their formulas."""

    weights: dict[str, float]  # the weight of each term by name
    eta: float
    columns: Tensor | None  # [D], the target's column of each draft token; None: the same columns
    measured: bool  # whether the values of all terms and the acceptance are wanted

    def weight(self, name: str) -> float:
        """The weight of a term; 0 if it was not passed."""
        return self.weights.get(name, 0.0)

    def needed(self, name: str) -> bool:
        """Whether the value of a term is needed: it was passed, and has a weight or is measured."""
        return name in self.weights and (self.measured or self.weights[name] > 0.0)

    @property
    def of_acceptance(self) -> bool:
        """Whether the acceptance is needed, and so the target's mass outside the draft vocabulary."""
        return self.measured or any(self.weight(name) for name in OF_ACCEPTANCE)


class Result(NamedTuple):
    """The results of each row, [...] in the dtype of losses; 0 in dropped rows."""

    loss: Tensor  # the weighted sum, times the weight of the row
    student_gradient: Tensor | None  # [..., D], of scale * loss
    acceptance: Tensor | None  # None unless Terms.measured
    values: dict[str, Tensor]  # the terms by name, without weights; empty unless Terms.measured
