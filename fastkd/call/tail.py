"""An estimate of the probability mass that a sparse teacher leaves to the tokens that it does not list."""

from __future__ import annotations

import torch
from torch import Tensor

# Values with a sum above this are not probabilities. Rounding their logarithms to one decimal can turn
# a sum of 1 into 1.05.
MOST = 1.1


def masses(ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """(the sum of each row's p, an estimate of the mass m of the other tokens), both [...] in float64.

    A log-probability z has a rounding error of up to u |z|, where u is half the epsilon of its dtype, so p = exp z has
    one of up to u |z| p. If z is 0, the error is that of rounding a probability near 1. The roundings are independent,
    so the error of

        d = 1 - sum p    is about    s = sqrt(sum (u z p)^2)

    and m lies, with few exceptions, in [max(d - s, 0), max(d + s, 0)]. The estimate is the middle of this interval,
    which is d if d >= s:

        m = (max(d - s, 0) + max(d + s, -d / 4)) / 2

    Since m may be arbitrarily near 0, no estimate bounds the error of log m. The middle is near the median of the
    possible m, which minimizes the expected error of log m. A sum that exceeds 1 by more than s comes from a rounding
    coarser than the dtype's (to decimals, say). Its excess -d measures that rounding, and m is an eighth of it. No row
    has m = 0.
    """
    dtype = torch.finfo(logprobs.dtype)
    u = dtype.eps / 2
    error_of_1 = min(u, torch.finfo(torch.float32).eps / 2)
    # -1e4 replaces -inf, which would give 0 * inf below; its exp is 0, too.
    z = torch.where(ids < 0, -1e4, logprobs).to(torch.float64).clamp_(min=-1e4)
    p = z.exp()
    total = p.sum(-1)
    # Whether some z is 0, or too near 0 to be a normal number of the dtype.
    near_1 = z.amax(-1) > -dtype.tiny
    s = u * torch.linalg.vector_norm(z.mul_(p), dim=-1)
    s = torch.where(near_1, error_of_1, 2.0**-53) + s  # 2^-53: the rounding error of the sum
    d = 1.0 - total
    return total, ((d - s).clamp(min=0.0) + torch.maximum(d + s, d / -4.0)) / 2.0
