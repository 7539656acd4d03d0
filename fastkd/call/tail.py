"""What a sparse teacher's log-probabilities say of the mass that is left to the other tokens."""

from __future__ import annotations

import torch
from torch import Tensor

# Probabilities whose sum is above this are none: rounding logarithms to one decimal makes 1.05 of 1.
MOST = 1.1


def masses(ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """(the sum of a row's p, an estimate of the mass m that is left to the other tokens), [...] each in float64.

    A log-probability z is known to u |z|, with u half of its dtype's epsilon, and p to u |z| p; a z of 0 is the
    logarithm of a 1, and known to the epsilon of that. Roundings are independent of each other, so that

        d = 1 - sum p    is known to    s = sqrt(sum (u z p)^2)

    and m lies in [max(d - s, 0), max(d + s, 0)], or nearly. The estimate is the middle of that, d itself where d >= s:

        m = (max(d - s, 0) + max(d + s, -d / 4)) / 2

    As m may be anything down to 0, no estimate bounds the error of log m. The middle is near the median of what m may
    be, which makes the expected error of log m least. A sum above 1 by more than s was rounded by more than its dtype
    does (to decimals, say), and its excess tells by how much: -d / 4 takes an eighth of it. No row has m = 0.
    """
    dtype = torch.finfo(logprobs.dtype)
    u = dtype.eps / 2
    of_1 = min(u, torch.finfo(torch.float32).eps / 2)
    # exp(-1e4) is 0 as well, and -inf would make 0 * inf.
    z = torch.where(ids < 0, -1e4, logprobs).to(torch.float64).clamp_(min=-1e4)
    p = z.exp()
    total = p.sum(-1)
    sure = z.amax(-1) > -dtype.tiny  # 0, or so near to it that the dtype has no digits left
    s = u * torch.linalg.vector_norm(z.mul_(p), dim=-1)
    s = torch.where(sure, of_1, 2.0**-53) + s  # which the sum itself is rounded by
    d = 1.0 - total
    return total, ((d - s).clamp(min=0.0) + torch.maximum(d + s, d / -4.0)) / 2.0
