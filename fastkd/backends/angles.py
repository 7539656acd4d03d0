"""Angles between the points of a batch in plain PyTorch, a tile of pairs at a time; for :mod:`fastkd.relations`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd.core.tensors import reciprocal

TILE_BYTES = 64 << 20  # bytes that angles may hold beyond matrices [N, N]
_TENSORS_PER_TILE = 8  # the most tensors of a tile's size that are alive at once


def angles(
    student: Tensor,
    teacher: Tensor,
    delta: float,
    differentiate: bool,
    tile_bytes: int = TILE_BYTES,
) -> tuple[Tensor, Tensor | None]:
    """Sum the Huber loss of the cosines over triples of three different points, in plain PyTorch.

    csrc/cpu/angles.cpp is the same in C++. A tile holds the pairs (i, k) of two blocks of points, each with every j.
    The loss is symmetric in i and k, so only tiles with i < k are computed.

    Args:
        student: [N, N] float64, the student's distances.
        teacher: [N, N] float64, the teacher's distances.
        delta: as in :func:`fastkd.relations.rkd_distance_loss`.
        differentiate: whether to compute the derivative.
        tile_bytes: bytes that the temporary tensors of a tile may take.

    Returns:
        (loss, half derivative or None), as described at ``Relation`` of :mod:`fastkd.relations`.
    """
    points = len(student)
    half_square, teacher_half_square = (0.5 * x.square() for x in (student, teacher))
    inverse, teacher_inverse = reciprocal(student), reciprocal(teacher)
    loss = student.new_zeros(())
    half_derivative = torch.zeros_like(student) if differentiate else None
    point_bytes = _TENSORS_PER_TILE * student.element_size() * max(points, 1)
    block = max(1, math.isqrt(tile_bytes // point_bytes))
    for first in range(0, points, block):
        for second in range(first, points, block):
            rows, columns = slice(first, first + block), slice(second, second + block)
            cosine, product = _cosines(half_square, inverse, rows, columns)  # [i, k, j]
            gap = cosine - _cosines(teacher_half_square, teacher_inverse, rows, columns)[0]
            if first == second:  # zero the elements without i < k
                gap *= torch.ones_like(gap[..., :1]).squeeze(-1).triu(1).unsqueeze(-1)
            slope = gap.clamp(-delta, delta)
            loss += 2 * (slope * gap.sub_(slope, alpha=0.5)).sum()
            if half_derivative is None:
                continue
            half_derivative[rows, columns] -= product.mul_(slope).sum(-1)
            left, right = inverse[rows, None], inverse[None, columns]
            of_rows = inverse[rows] * (slope * (right - left * cosine)).sum(1)
            half_derivative[:, rows] += of_rows.t()
            of_columns = inverse[columns] * (slope * (left - right * cosine)).sum(0)
            half_derivative[:, columns] += of_columns.t()
    return loss, half_derivative


def _cosines(
    half_square: Tensor, inverse: Tensor, rows: slice, columns: slice
) -> tuple[Tensor, Tensor]:
    """Return (cosines of the angles at j between i and k, 1 / (d_ij d_kj)), each [i, k, j].

    Args:
        half_square: [N, N], half the squared distances.
        inverse: [N, N], the reciprocal distances.
        rows: the points i.
        columns: the points k.
    """
    product = inverse[rows, None] * inverse[None, columns]
    cosine = half_square[rows, None] + half_square[None, columns]
    return cosine.sub_(half_square[rows, columns].unsqueeze(-1)).mul_(product), product
