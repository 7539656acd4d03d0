"""What a divergence is where a probability is 0: one policy, which every backend keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.divergences import Divergence, derivatives

# A probability below this counts as 0 beside a logit of -inf on the other side (see evaluate).
NEGLIGIBLE = 1e-30
# With log 0 replaced by the most negative finite number, a term above this can only be infinite.
INFINITE = 1e6


def evaluate(
    divergence: Divergence,
    log_p: Tensor,
    log_q: Tensor,
    probabilities: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(phi, g, h) of every entry, with the one policy for log 0, so that no definition has to handle it.

    - Both sides at -inf: 0 * (-inf) = 0, the entry contributes nothing to the value and to the gradient.
    - One side at -inf, the other's probability not negligible: log 0 is replaced by the most negative finite
      number. Terms that carry a factor 0 vanish, and what is still above INFINITE is the mathematical infinity
      (forward KL where p > 0 = q); g stays what it is in the limit (-p there).
    - One side at -inf and the other below NEGLIGIBLE: nothing, as in the first case.

    probabilities are (p, q) where the caller has them; a softmax is more exact than the exp of its logarithm.
    """
    if not divergence.normalized:
        probabilities = (torch.ones_like(log_p),) * 2
    p, q = probabilities or (log_p.exp(), log_q.exp())
    p_gone, q_gone = log_p == -torch.inf, log_q == -torch.inf
    lowest = torch.finfo(log_p.dtype).min
    x, y = log_p.masked_fill(p_gone, lowest), log_q.masked_fill(q_gone, lowest)
    phi, g, h = derivatives(divergence, p, q, x, y, x - y)
    one_side = p_gone ^ q_gone
    nothing = (p_gone & (q < NEGLIGIBLE)) | (q_gone & (p < NEGLIGIBLE)) | (p_gone & q_gone)

    def settle(term: Tensor) -> Tensor:
        term = torch.where(one_side & (term.abs() > INFINITE), term * torch.inf, term)
        return term.masked_fill(nothing, 0.0)

    return settle(phi), settle(g), settle(g if h is None else h)


def infinite_at_zero(divergence: Divergence) -> bool:
    """Whether a token that the teacher gives no probability costs infinitely much."""
    one = torch.zeros((), dtype=torch.float64)
    phi, *_ = evaluate(divergence, one - torch.inf, one)
    return not bool(phi.isfinite())
