"""Deep mutual learning in Triton: one program a row, and the row's students the first dimension of every tile.

fastkd/call/mutual.py has the contract. A row is swept twice: for the normaliser of each student, then for values and
gradients, where p of all students stand side by side and a sum over a student's peers is one over all. The second
sweep is that of csrc/cpu/mutual.cpp, whose head derives it: u_l is z_l relative to the most probable student's, so that
nothing large cancels, and what the normalisers differ by is added once a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastkd.backends.native import readable_rows
from fastkd.call.contract import Rows
from fastkd.call.mutual import Options, Result, outputs
from fastkd.core.tensors import unit_stride

from .kernel import Inputs, _layout, _on, _row_pointer
from .skeleton import NEGLIGIBLE as _NEGLIGIBLE
from .skeleton import log1p

NEGLIGIBLE = tl.constexpr(_NEGLIGIBLE)


class Values(NamedTuple):
    """float32 [students, rows] each; the parts may be None."""

    loss: Any
    divergence: Any
    cross_entropy: Any


class Objective(NamedTuple):
    """loss k = factor * D_k + CE_k, times scale; D_k the sum over peers, or of their average."""

    unit: Any  # 1 / T
    factor: Any
    share: Any  # 1 / (students - 1)
    scale: Any
    ignore_index: Any


@triton.jit
def _addresses(views, row, sizes, M: tl.constexpr, STUDENTS: tl.constexpr):
    """Of every student's row, int64 [M]; 0 where there is none."""
    student = tl.arange(0, M)
    addresses = tl.zeros([M], dtype=tl.int64)
    for k in tl.static_range(STUDENTS):
        if views[k] is not None:
            addresses = tl.where(
                student == k, _row_pointer(views[k], row, sizes).to(tl.int64), addresses
            )
    return addresses


@triton.jit
def _read(addresses, columns, V, like):
    """z [M, columns]; -inf where there is none."""
    pointers = addresses.to(like.dtype)[:, None] + columns[None, :]
    mask = (addresses != 0)[:, None] & (columns < V)[None, :]
    return tl.load(pointers, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def _normalizers(
    addresses, like, V, unit, M: tl.constexpr, AT_1: tl.constexpr, BLOCK_V: tl.constexpr
):
    """(maximum, sum of exp((z - maximum) unit), the same of exp(z - maximum)), [M] each."""
    top = tl.full([M], -float("inf"), dtype=tl.float32)
    total = tl.zeros([M, BLOCK_V], dtype=tl.float32)
    plain = tl.zeros([M, BLOCK_V], dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        z = _read(addresses, start + tl.arange(0, BLOCK_V), V, like)
        raised = tl.maximum(top, tl.max(z, 1))
        origin = tl.where(raised == -float("inf"), 0.0, raised)
        gap = z - origin[:, None]
        total = total * tl.exp((top - origin) * unit)[:, None] + tl.exp(gap * unit)
        if AT_1:
            plain = plain * tl.exp(top - origin)[:, None] + tl.exp(gap)
        top = raised
    origin = tl.where(top == -float("inf"), 0.0, top)
    total_of_row = tl.sum(total, 1)
    plain_of_row = total_of_row
    if AT_1:
        plain_of_row = tl.sum(plain, 1)
    return origin, total_of_row, plain_of_row


@triton.jit
def _average_terms(p, p_top, below, log_p, share, M: tl.constexpr, STUDENTS: tl.constexpr):
    """m log(m / p) - (m - p), as in C++, with m the mean of the others, added up without taking p away again."""
    student = tl.arange(0, M)[:, None]
    others = tl.zeros_like(p)
    for k in tl.static_range(STUDENTS):
        of_one = tl.sum(tl.where(student == k, p, 0.0), 0)
        others += tl.where(student == k, 0.0, of_one[None, :])
    m = others * share
    more = (below[None, :] - (p - p_top[None, :]) * STUDENTS) * share
    x = more / p
    ratio = tl.where(tl.abs(x) < 0.5, log1p(x), tl.log(tl.maximum(m, NEGLIGIBLE)) - log_p)
    return tl.where(m < NEGLIGIBLE, 0.0, m * ratio) - more


@triton.jit
def mutual_kernel(
    logits,
    gradients,
    inputs,
    values,
    objective,
    sizes,
    V,
    rows,
    M: tl.constexpr,
    STUDENTS: tl.constexpr,
    AVERAGE: tl.constexpr,
    AT_1: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Losses and gradients of all students of a row. M: their number STUDENTS, rounded up to a power of 2."""
    row = tl.program_id(0)
    student = tl.arange(0, M)
    there = student < STUDENTS
    place = student.to(tl.int64) * rows + row
    written = _addresses(gradients, row, sizes, M, STUDENTS)
    gradient_type = values.loss.dtype
    for k in tl.static_range(STUDENTS):
        if gradients[k] is not None:
            gradient_type = gradients[k].pointer.dtype
    out = written.to(gradient_type)[:, None]
    writes = (written != 0)[:, None]

    weight, keep, label, plain_factor = 1.0, row >= 0, -1, 0.0
    if inputs.weight is not None:
        weight = tl.load(inputs.weight + row)
        keep = weight != 0
    if inputs.labels is not None:
        target = tl.load(inputs.labels + row)
        keep = keep & (target != objective.ignore_index)
        valid = (target >= 0) & (target < V)
        weight = tl.where(valid, weight, float("nan"))
        label = tl.where(valid, target, 0).to(tl.int32)
    columns = V if keep else 0  # of a row that is dropped, nothing is read
    scale = weight * objective.scale
    if inputs.scale is not None:
        scale *= tl.load(inputs.scale)
    if inputs.labels is not None:
        plain_factor = scale

    addresses = _addresses(logits, row, sizes, M, STUDENTS)
    like = logits[0].pointer
    unit = objective.unit
    origin, total, plain_total = _normalizers(addresses, like, columns, unit, M, AT_1, BLOCK_V)
    share_of_total = tl.where(there, 1.0 / total, 0.0)
    plain_weight = tl.where(there, plain_factor / plain_total, 0.0)
    log_sum = tl.where(there, tl.log(total), 0.0)

    sums = tl.zeros([M, BLOCK_V], dtype=tl.float32)
    coefficient = scale * objective.factor * objective.share * unit
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        z = _read(addresses, column, columns, like)
        gap = z - origin[:, None]
        p = tl.exp(gap * unit) * share_of_total[:, None]
        p_top = tl.max(p, 0)
        below = tl.sum(tl.where(there[:, None], p - p_top[None, :], 0.0), 0)
        if AVERAGE:
            log_p = gap * unit - log_sum[:, None]
            sums += _average_terms(p, p_top, below, log_p, objective.share, M, STUDENTS)
        else:
            gone = gap == -float("inf")
            z_top = tl.max(tl.where(p == p_top[None, :], gap, -float("inf")), 0)
            u = gap - z_top[None, :]
            moment = tl.sum(tl.where(gone, 0.0, p * u), 0)
            at_log_0 = tl.where(p_top >= NEGLIGIBLE, float("inf"), 0.0)
            term = moment[None, :] - tl.sum(p, 0)[None, :] * u
            sums += tl.where(gone, at_log_0[None, :], term)
        gradient = ((p - p_top[None, :]) * STUDENTS - below[None, :]) * coefficient
        if inputs.labels is not None:
            if AT_1:
                gradient += tl.exp(gap) * plain_weight[:, None]
            else:
                gradient += p * plain_factor
            gradient -= tl.where(column == label, plain_factor, 0.0)[None, :]
        gradient = tl.where(keep, gradient, 0.0)
        mask = writes & (column < V)[None, :]
        tl.store(out + column[None, :], gradient.to(gradient_type.element_ty), mask=mask)

    divergence = tl.sum(sums, 1)
    if not AVERAGE:
        apart = tl.where(there[None, :], log_sum[None, :] - log_sum[:, None], 0.0)
        divergence = (divergence * unit - tl.sum(apart, 1)) * objective.share
    divergence = tl.where(objective.factor == 0, 0.0, divergence * objective.factor)
    cross_entropy = tl.zeros_like(divergence)
    if inputs.labels is not None:
        at_label = addresses.to(like.dtype) + label
        read = student < tl.where(keep, STUDENTS, 0)
        z = tl.load(at_label, mask=read, other=0.0).to(tl.float32)
        cross_entropy = tl.log(plain_total) - (z - origin)
    loss = weight * (divergence + cross_entropy)
    tl.store(values.loss + place, tl.where(keep, loss, 0.0), mask=there)
    if values.divergence is not None:
        tl.store(values.divergence + place, tl.where(keep, divergence, 0.0), mask=there)
        tl.store(values.cross_entropy + place, tl.where(keep, cross_entropy, 0.0), mask=there)


# Elements of a tile, and warps: 8 elements a thread, of which a program holds some five tiles.
ELEMENTS, WARPS = 2048, 8


def mutual_rows(
    logits: Sequence[Tensor],
    rows: Rows,
    options: Options,
    wanted: Sequence[bool],
    parts: bool,
) -> Result:
    """The losses of every row's students and their gradients: :mod:`fastkd.call.mutual` has the contract."""
    rows = readable_rows(rows)
    logits = [unit_stride(student) for student in logits]
    result = outputs(logits, wanted, parts)
    first, students = logits[0], len(logits)
    count, width = math.prod(first.shape[:-1]), first.shape[-1]
    if count:
        sizes, views = _layout(
            *logits, *(gradient for gradient in result.gradients if gradient is not None)
        )
        of_gradients = iter(views[students:])
        t_squared = options.temperature**2 if options.scale_by_temperature else 1.0
        power = triton.next_power_of_2(students)
        block = min(max(ELEMENTS // power, 16), triton.next_power_of_2(width))
        share = 1.0 / (students - 1)
        factor = options.peer_weight * t_squared / (share if options.peers == "sum" else 1.0)
        with _on(first.device):
            mutual_kernel[(count,)](
                views[:students],
                tuple(next(of_gradients) if want else None for want in wanted),
                Inputs(rows.labels, rows.weight, rows.scale),
                Values(result.loss, result.divergence, result.cross_entropy),
                Objective(
                    1.0 / options.temperature, factor, share, options.scale, options.ignore_index
                ),
                sizes,
                width,
                count,
                power,
                students,
                options.peers == "average",
                rows.labels is not None and options.temperature != 1.0,
                block,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    total = result.loss.reshape(students, -1).sum(-1) * options.scale
    if rows.scale is not None:
        total = total * rows.scale
    return result._replace(total=total)
