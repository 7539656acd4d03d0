"""The angles among the points of a batch in plain PyTorch, a tile of pairs at a time; for :mod:`fastkd.relations`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd.core.tensors import reciprocal

TILE_BYTES = 64 << 20  # what angles may hold beyond matrices [N, N]
_TILES = 8  # tensors of the size of a tile that are alive at once, at most


def angles(
    student: Tensor, teacher: Tensor, delta: float, wanted: bool, tile_bytes: int = TILE_BYTES
) -> tuple[Tensor, Tensor | None]:
    """The sum of Huber's loss over triples of three points, and its derivative as a Relation of
    :mod:`fastkd.relations` gives it.

    csrc/cpu/angles.cpp is the same in C++. A tile is the pairs (i, k) of two blocks of points, with all j; i and k may
    change places, so half of them are enough.

    Args:
        student: [N, N], float64, distances.
        teacher: [N, N].
        delta: of Huber's loss.
        wanted: whether the derivative is.
        tile_bytes: of the temporary tensors of a tile.
    """
    points = len(student)
    half, target_half = (0.5 * x.square() for x in (student, teacher))
    unit, target_unit = reciprocal(student), reciprocal(teacher)
    loss = student.new_zeros(())
    halves = torch.zeros_like(student) if wanted else None
    block = max(1, math.isqrt(tile_bytes // (_TILES * student.element_size() * max(points, 1))))
    for first in range(0, points, block):
        for second in range(first, points, block):
            rows, columns = slice(first, first + block), slice(second, second + block)
            cosine, product = _cosines(half, unit, rows, columns)  # [i, k, j]
            gap = cosine - _cosines(target_half, target_unit, rows, columns)[0]
            if first == second:  # i < k
                gap *= torch.ones_like(gap[..., :1]).squeeze(-1).triu(1).unsqueeze(-1)
            slope = gap.clamp(-delta, delta)
            loss += 2 * (slope * gap.sub_(slope, alpha=0.5)).sum()
            if halves is None:
                continue
            halves[rows, columns] -= product.mul_(slope).sum(-1)
            left, right = unit[rows, None], unit[None, columns]
            halves[:, rows] += (unit[rows] * (slope * (right - left * cosine)).sum(1)).t()
            halves[:, columns] += (unit[columns] * (slope * (left - right * cosine)).sum(0)).t()
    return loss, halves


def _cosines(half: Tensor, unit: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """(cosines of the angles at j between i and k, 1 / (d_ij d_kj)), each [i, k, j]."""
    product = unit[rows, None] * unit[None, columns]
    cosine = half[rows, None] + half[None, columns]
    return cosine.sub_(half[rows, columns].unsqueeze(-1)).mul_(product), product
