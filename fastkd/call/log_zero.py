"""The value of a divergence where a probability is 0: one policy, which every backend follows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.divergences import Divergence, derivatives

# If one side has the logit -inf, a probability of the other side below this counts as 0 (see evaluate).
NEGLIGIBLE = 1e-30
# With log 0 replaced by the most negative finite number, a term larger than this means infinity.
INFINITE = 1e6


def evaluate(
    divergence: Divergence,
    log_p: Tensor,
    log_q: Tensor,
    probabilities: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(phi, g, h) of every entry. The policy for log 0 is applied here, so that no divergence has to handle it.

    - Both sides are -inf: the entry contributes nothing to the value or to the gradient, since 0 * (-inf) = 0.
    - One side is -inf, and the other's probability is at least NEGLIGIBLE: log 0 is replaced by the most negative
      finite number. Terms with a factor 0 vanish. A term that still exceeds INFINITE becomes infinite, as forward KL
      does where p > 0 = q; g has its value in the limit, which is -p in this example.
    - One side is -inf, and the other's probability is below NEGLIGIBLE: the entry contributes nothing.

    probabilities: (p, q) if the caller has them, since a softmax is more accurate than the exp of a log-softmax.
    """
    if not divergence.normalized:
        probabilities = (torch.ones_like(log_p),) * 2
    p, q = probabilities or (log_p.exp(), log_q.exp())
    p_is_0, q_is_0 = log_p == -torch.inf, log_q == -torch.inf
    lowest = torch.finfo(log_p.dtype).min
    x, y = log_p.masked_fill(p_is_0, lowest), log_q.masked_fill(q_is_0, lowest)
    phi, g, h = derivatives(divergence, p, q, x, y, x - y)
    one_side = p_is_0 ^ q_is_0
    nothing = (p_is_0 & (q < NEGLIGIBLE)) | (q_is_0 & (p < NEGLIGIBLE)) | (p_is_0 & q_is_0)

    def with_policy(term: Tensor) -> Tensor:
        term = torch.where(one_side & (term.abs() > INFINITE), term * torch.inf, term)
        return term.masked_fill(nothing, 0.0)

    return with_policy(phi), with_policy(g), with_policy(g if h is None else h)


def infinite_at_zero(divergence: Divergence) -> bool:
    """Whether the divergence is infinite if a token has probability 0 under the teacher but not under the student."""
    log_1 = torch.zeros((), dtype=torch.float64)
    phi, *_ = evaluate(divergence, log_1 - torch.inf, log_1)
    return not bool(phi.isfinite())
