"""Log-probabilities of a chunk of logits in PyTorch: statistics of its rows, their gradient, and their top tokens.

The portable backend and the reference use all of it. The cpu and triton backends have their own
:func:`logprob_statistics` and :func:`logprob_gradients` (csrc/cpu/logprobs.cpp, kernels/logprobs.py). Logits are
processed a piece of rows at a time, so that the temporaries stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.core.pieces import piece_rows
from fastkd.core.tensors import finite_max, precision

# The largest tokens of a row are searched in the blocks of columns with the largest maxima.
BLOCK = 32
# Smaller gaps to the maximum count as this one: exp is 0 there, and 0 times an infinite gap would be NaN.
LEAST_GAP = -1e4


class Tempering(NamedTuple):
    """How logits become tempered logits: softcap * tanh(logit_scale * logits / softcap) / temperature."""

    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none
    temperature: float = 1.0
    temperatures: Tensor | None = None  # float32 [C], one per row, in place of temperature

    def of_rows(self, rows: slice) -> Tempering:
        """The tempering of these rows."""
        if self.temperatures is None:
            return self
        return self._replace(temperatures=self.temperatures[rows])

    def cap_(self, logits: Tensor) -> Tensor:
        """Scale and soft-cap the logits [C, ...] in place."""
        if self.softcap:
            return logits.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap)
        return logits if self.logit_scale == 1 else logits.mul_(self.logit_scale)

    def divide_(self, capped: Tensor) -> Tensor:
        """Divide what :meth:`cap_` returned by the temperature, in place."""
        if self.temperatures is not None:
            return capped.div_(self.temperatures.unsqueeze(-1).to(capped.dtype))
        return capped if self.temperature == 1 else capped.div_(self.temperature)

    def slope(self, capped: Tensor) -> Tensor | float:
        """The derivative of what :meth:`cap_` returned with respect to the logit."""
        if not self.softcap:
            return self.logit_scale
        return self.logit_scale * (1.0 - (capped / self.softcap).square())


def _pieces(logits: Tensor) -> Iterator[slice]:
    count, columns = logits.shape
    step = piece_rows(columns, logits.dtype, logits.device.type)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def logprob_statistics(logits: Tensor, tempering: Tempering, centered: bool) -> Tensor:
    """Temper the logits [C, V] in place, and return (max, exp_sum, centered exp_sum) of each row, [C, 3].

    The last is the sum of exp(z - max) (z - max), or 0 unless it is wanted. The sums are in float64 where the device
    has it. A row without a finite logit, and a shard without columns, have max -inf and sums 0.
    """
    wide = precision(logits.device)
    statistics = torch.zeros(logits.shape[0], 3, dtype=wide, device=logits.device)
    if not logits.shape[1]:
        statistics[:, 0] = -math.inf
        return statistics
    for rows in _pieces(logits):
        temper = tempering.of_rows(rows)
        z, out = temper.divide_(temper.cap_(logits[rows])), statistics[rows]
        maximum = z.amax(-1, keepdim=True)
        gap = (z - finite_max(maximum)).clamp_(min=LEAST_GAP)
        exponentials = gap.exp()
        out[:, 0] = maximum.squeeze(-1)
        out[:, 1] = exponentials.sum(-1, dtype=wide)
        if centered:
            out[:, 2] = exponentials.mul_(gap).sum(-1, dtype=wide)
    return statistics


def logprob_gradients(
    logits: Tensor, tempering: Tempering, maxima: Tensor, coefficients: Tensor
) -> None:
    """Overwrite logits [C, V] with e (a + b (z - max)) dz/dlogit T, where e = exp(z - max) and a, b are coefficients.

    maxima: [C]; coefficients: [C, 2].
    """
    for rows in _pieces(logits) if logits.shape[1] else ():
        temper = tempering.of_rows(rows)
        x = temper.cap_(logits[rows])
        slope = temper.slope(x)
        a, b = coefficients[rows].to(x.dtype).unsqueeze(-1).unbind(1)
        center = finite_max(maxima[rows].to(x.dtype).unsqueeze(-1))
        x = temper.divide_(x).sub_(center).clamp_(min=LEAST_GAP)
        exponentials = x.exp()
        x.mul_(b).add_(a).mul_(exponentials)
        if isinstance(slope, Tensor) or slope != 1:
            x.mul_(slope)


def top_tokens(z: Tensor, k: int) -> Tensor:
    """The ids [C, k] of the k largest of z [C, V], largest first; of equal ones, the lower id first. NaN is largest."""
    count, columns = z.shape
    ids = torch.empty(count, k, dtype=torch.int64, device=z.device)
    blocks = columns // BLOCK
    in_blocks = 2 * k <= blocks
    # The most values of a row that are sorted at once; each takes a few words of temporary memory.
    width = max(k * BLOCK, blocks) if in_blocks else columns
    step = piece_rows(width, z.dtype, z.device.type)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        ids[rows] = _by_blocks(z[rows], k, blocks) if in_blocks else _first(z[rows], k)
    return ids


def _by_blocks(z: Tensor, k: int, blocks: int) -> Tensor:
    # If a token is among the k first, so is its block: the maxima of k blocks before it would be k tokens before it.
    maxima = z[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(-1)
    chosen = (
        _first(maxima, k).sort(-1).values
    )  # so that the candidates are in the order of their ids
    of_block = torch.arange(BLOCK, device=z.device)
    ids = (chosen.unsqueeze(-1) * BLOCK + of_block).flatten(1)
    rest = torch.arange(blocks * BLOCK, z.shape[1], device=z.device)
    ids = torch.cat([ids, rest.expand(len(z), -1)], 1)
    return ids.gather(1, _first(z.gather(1, ids), k))


def _first(values: Tensor, k: int) -> Tensor:
    """The indices [C, k] of the k largest values, largest first; of equal ones, the lower index first."""
    if values.device.type != "cpu" or k == values.shape[1]:
        return _first_in_order(values, k)
    # torch.topk has no order among equal values, which are rare. A device would have to wait for the comparison.
    largest, indices = values.topk(k + 1, dim=-1)
    in_doubt = ~(largest[:, 1:] < largest[:, :-1]).all(-1)  # also if there is a NaN
    indices = indices[:, :k]
    if in_doubt.any():
        indices[in_doubt] = _first_in_order(values[in_doubt], k)
    return indices


def _first_in_order(values: Tensor, k: int) -> Tensor:
    if values.dtype != torch.float32:
        return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    # Each value becomes a different integer: the bits of the float, in an order that integers share, followed by the
    # index, counted down.
    bits = (values + 0.0).view(torch.int32)  # the sum turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = ordered.masked_fill_(values.isnan(), 0x7FFFFFFF)
    low = torch.arange(0xFFFFFFFF, 0xFFFFFFFF - values.shape[1], -1, device=values.device)
    keys = (ordered.to(torch.int64) << 32) | low
    return 0xFFFFFFFF - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)
