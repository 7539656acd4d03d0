"""The measures of a row, which a call returns on request beside its loss: their names and their formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.call.log_zero import NEGLIGIBLE

# The measures of a row, which compare the teacher's distribution p with the student's distribution q. Both are
# tempered; no measure is multiplied by T^2. The last three exist for sparse teachers only.
MEASURES = (
    "teacher_entropy",  # -sum p log p
    "forward_kl",  # sum p (log p - log q)
    "reverse_kl",  # sum q (log q - log p)
    "acceptance",  # sum min(p, q)
    "agreement",  # 1 if p and q have their maximum in the same column, else 0; of equal maxima, the first counts
    "student_mass",  # q of the listed tokens
    "teacher_mass",  # p of the listed tokens
    "overlap",  # how many of the K listed tokens are among the student's K most probable ones
)
DENSE_MEASURES = MEASURES[:5]


def measure_count(tail: str) -> int:
    """How many measures a row has, for a teacher with this policy (Options.tail)."""
    return len(MEASURES if tail else DENSE_MEASURES)


def sums(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The measures that are sums over the last dimension, [..., 4], with the policy of fastkd/call/log_zero.py."""
    p, q = log_p.exp(), log_q.exp()
    p_is_0, q_is_0 = log_p == -torch.inf, log_q == -torch.inf
    log_ratio = log_p - log_q
    forward_is_0 = (p == 0) | (q_is_0 & (p < NEGLIGIBLE))
    reverse_is_0 = (q == 0) | (p_is_0 & (q < NEGLIGIBLE))
    terms = (
        torch.where(p == 0, 0.0, -p * log_p),
        torch.where(forward_is_0, 0.0, p * log_ratio),
        torch.where(reverse_is_0, 0.0, -q * log_ratio),
        torch.minimum(p, q),
    )
    dtype = sum_dtype(log_p)
    return torch.stack([term.sum(-1, dtype=dtype) for term in terms], -1)


def sum_dtype(like: Tensor) -> torch.dtype:
    """The dtype of sums over columns: float64 where the device is fast enough with it."""
    return torch.float64 if like.device.type in ("cpu", "cuda") else like.dtype
