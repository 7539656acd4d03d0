"""Deep mutual learning in Triton: one program per row; the first dimension of every tile is the student.

:mod:`fastkd.call.mutual` has the contract. A row is swept twice: for the normalizer of each student, and then for
values and gradients. The second sweep has the p of all students side by side, so a sum over a student's peers is a sum
over the first dimension. csrc/cpu/mutual.cpp derives its formulas: u_l is z_l relative to the most probable student's
z, so nothing large cancels. The differences of the normalizers are added once per row.
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

from .kernel import Inputs, View, row_pointer
from .launch import lay_out, on_device
from .launcher import launch
from .skeleton import NEGLIGIBLE as _NEGLIGIBLE
from .skeleton import log1p

NEGLIGIBLE = tl.constexpr(_NEGLIGIBLE)


class Values(NamedTuple):
    """float32 [students, rows] each; all but the loss may be None."""

    loss: Any
    divergence: Any
    cross_entropy: Any


class Objective(NamedTuple):
    """Loss of student k: scale * weight * (factor * D_k + CE_k), with D_k to the peers' mean or summed over peers."""

    inverse_temperature: Any
    factor: Any
    peer_share: Any  # 1 / (students - 1)
    scale: Any
    ignore_index: Any


class Spec(NamedTuple):
    """What the kernel is compiled for; every field is a constexpr."""

    M: Any  # STUDENTS rounded up to a power of 2: the first dimension of a tile
    STUDENTS: Any
    AVERAGE: Any  # whether the divergence is to the peers' mean
    WITH_T1: Any  # whether cross-entropy needs sums at temperature 1
    BLOCK_V: Any


class Students(NamedTuple):
    """The normalizers of all students of a row, [M] each."""

    there: Any  # whether there is such a student
    max: Any  # 0 if every z is -inf
    log_exp_sum: Any
    inverse_exp_sum: Any
    exp_sum_t1: Any


class Reader(NamedTuple):
    """How a row's logits are read."""

    addresses: Any  # int64 [M]; 0 for a student that does not exist
    like: Any  # a pointer of the logits' type
    num_columns: Any  # 0 for a dropped row, so that nothing is read


@triton.jit
def _row_addresses(views, row, sizes, spec):
    """Return the address of the row in every student's tensor, int64 [M]; 0 if there is none."""
    student = tl.arange(0, spec.M)
    addresses = tl.zeros([spec.M], dtype=tl.int64)
    for k in tl.static_range(spec.STUDENTS):
        if views[k].pointer is not None:
            address = row_pointer(views[k], row, sizes).to(tl.int64)
            addresses = tl.where(student == k, address, addresses)
    return addresses


@triton.jit
def _read(reader, column):
    """Return z [M, columns]; -inf outside the row."""
    pointers = reader.addresses.to(reader.like.dtype)[:, None] + column[None, :]
    mask = (reader.addresses != 0)[:, None] & (column < reader.num_columns)[None, :]
    return tl.load(pointers, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def _normalizers(reader, inverse_temperature, spec):
    """Sweep the row for (max, exp_sum, exp_sum_t1), [M] each; sums are relative to max."""
    z_max = tl.full([spec.M], -float("inf"), dtype=tl.float32)
    exp_sum = tl.zeros([spec.M, spec.BLOCK_V], dtype=tl.float32)
    exp_sum_t1 = tl.zeros([spec.M, spec.BLOCK_V], dtype=tl.float32)
    for start in range(0, reader.num_columns, spec.BLOCK_V):
        z = _read(reader, start + tl.arange(0, spec.BLOCK_V))
        new_max = tl.maximum(z_max, tl.max(z, 1))
        finite = tl.where(new_max == -float("inf"), 0.0, new_max)
        x = z - finite[:, None]
        factor = tl.exp((z_max - finite) * inverse_temperature)[:, None]
        exp_sum = exp_sum * factor + tl.exp(x * inverse_temperature)
        if spec.WITH_T1:
            exp_sum_t1 = exp_sum_t1 * tl.exp(z_max - finite)[:, None] + tl.exp(x)
        z_max = new_max
    finite = tl.where(z_max == -float("inf"), 0.0, z_max)
    row_exp_sum = tl.sum(exp_sum, 1)
    row_exp_sum_t1 = row_exp_sum
    if spec.WITH_T1:
        row_exp_sum_t1 = tl.sum(exp_sum_t1, 1)
    return finite, row_exp_sum, row_exp_sum_t1


@triton.jit
def _sum_terms(p, p_max, x):
    """Return the terms of KL(p_l || p_k) summed over the peers l, in every column; x is z - max."""
    gone = x == -float("inf")
    x_max = tl.max(tl.where(p == p_max[None, :], x, -float("inf")), 0)
    u = x - x_max[None, :]
    moment = tl.sum(tl.where(gone, 0.0, p * u), 0)
    at_log_0 = tl.where(p_max >= NEGLIGIBLE, float("inf"), 0.0)
    term = moment[None, :] - tl.sum(p, 0)[None, :] * u
    return tl.where(gone, at_log_0[None, :], term)


@triton.jit
def _average_terms(p, p_max, below_max, log_p, peer_share, spec):
    """Return m log(m / p) - (m - p), as in C++; m, the peers' mean, is added up without subtracting p from a total."""
    student = tl.arange(0, spec.M)[:, None]
    peers = tl.zeros_like(p)
    for k in tl.static_range(spec.STUDENTS):
        p_k = tl.sum(tl.where(student == k, p, 0.0), 0)
        peers += tl.where(student == k, 0.0, p_k[None, :])
    m = peers * peer_share
    difference = (below_max[None, :] - (p - p_max[None, :]) * spec.STUDENTS) * peer_share
    x = difference / p
    log_ratio = tl.where(tl.abs(x) < 0.5, log1p(x), tl.log(tl.maximum(m, NEGLIGIBLE)) - log_p)
    return tl.where(m < NEGLIGIBLE, 0.0, m * log_ratio) - difference


@triton.jit
def _open_row(row, inputs, objective, V):
    """Return (whether the row is counted, its weight, the label's column or -1)."""
    weight, counted, label = 1.0, row >= 0, -1
    if inputs.weight is not None:
        weight = tl.load(inputs.weight + row)
        counted = weight != 0
    if inputs.labels is not None:
        column = tl.load(inputs.labels + row)
        counted = counted & (column != objective.ignore_index)
        valid = (column >= 0) & (column < V)
        weight = tl.where(valid, weight, float("nan"))
        label = tl.where(valid, column, 0).to(tl.int32)
    return counted, weight, label


@triton.jit
def _sweep_gradients(
    reader, students, gradients, element, counted, label, scale, ce_scale, objective, V, spec
):
    """Write the gradients of all students; return the sum of the divergence's terms, [M]. ce_scale None: no labels."""
    WITH_T1: tl.constexpr = spec.WITH_T1
    unit = objective.inverse_temperature
    pointers = gradients.to(element)[:, None]
    wanted = (gradients != 0)[:, None]
    there = students.there
    if ce_scale is not None:
        q_scale = tl.where(there, ce_scale / students.exp_sum_t1, 0.0)
    sums = tl.zeros([spec.M, spec.BLOCK_V], dtype=tl.float32)
    coefficient = scale * objective.factor * objective.peer_share * unit
    for start in range(0, V, spec.BLOCK_V):
        column = start + tl.arange(0, spec.BLOCK_V)
        x = _read(reader, column) - students.max[:, None]
        p = tl.exp(x * unit) * students.inverse_exp_sum[:, None]
        p_max = tl.max(p, 0)
        below_max = tl.sum(tl.where(there[:, None], p - p_max[None, :], 0.0), 0)
        if spec.AVERAGE:
            log_p = x * unit - students.log_exp_sum[:, None]
            sums += _average_terms(p, p_max, below_max, log_p, objective.peer_share, spec)
        else:
            sums += _sum_terms(p, p_max, x)
        gradient = ((p - p_max[None, :]) * spec.STUDENTS - below_max[None, :]) * coefficient
        if ce_scale is not None:
            if WITH_T1:
                gradient += tl.exp(x) * q_scale[:, None]
            else:
                gradient += p * ce_scale
            gradient -= tl.where(column == label, ce_scale, 0.0)[None, :]
        gradient = tl.where(counted, gradient, 0.0)
        mask = wanted & (column < V)[None, :]
        tl.store(pointers + column[None, :], gradient.to(element.element_ty), mask=mask)
    return tl.sum(sums, 1)


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
    WITH_T1: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute the losses and gradients of all students of a row; zeros for a dropped row, which is not read."""
    # The Spec is not a variable: an assignment would turn its constexprs into tensors.
    _compute_row(
        tl.program_id(0), logits, gradients, inputs, values, objective, sizes, V, rows,
        Spec(M, STUDENTS, AVERAGE, WITH_T1, BLOCK_V),
    )  # fmt: skip


@triton.jit
def _compute_row(row, logits, gradients, inputs, values, objective, sizes, V, rows, spec):
    """Compute the losses and gradients of all students of a row."""
    student = tl.arange(0, spec.M)
    there = student < spec.STUDENTS
    offset = student.to(tl.int64) * rows + row
    gradient_addresses = _row_addresses(gradients, row, sizes, spec)
    element = values.loss.dtype
    for k in tl.static_range(spec.STUDENTS):
        if gradients[k].pointer is not None:
            element = gradients[k].pointer.dtype

    counted, weight, label = _open_row(row, inputs, objective, V)
    scale = weight * objective.scale
    if inputs.scale is not None:
        scale *= tl.load(inputs.scale)
    ce_scale = None
    if inputs.labels is not None:
        ce_scale = scale

    reader = Reader(
        _row_addresses(logits, row, sizes, spec), logits[0].pointer, V if counted else 0
    )
    unit = objective.inverse_temperature
    z_max, exp_sum, exp_sum_t1 = _normalizers(reader, unit, spec)
    log_exp_sum = tl.where(there, tl.log(exp_sum), 0.0)
    inverse_exp_sum = tl.where(there, 1.0 / exp_sum, 0.0)
    students = Students(there, z_max, log_exp_sum, inverse_exp_sum, exp_sum_t1)
    divergence = _sweep_gradients(
        reader, students, gradient_addresses, element, counted, label, scale, ce_scale, objective,
        V, spec,
    )  # fmt: skip

    if not spec.AVERAGE:
        differences = tl.where(there[None, :], log_exp_sum[None, :] - log_exp_sum[:, None], 0.0)
        divergence = (divergence * unit - tl.sum(differences, 1)) * objective.peer_share
    divergence = tl.where(objective.factor == 0, 0.0, divergence * objective.factor)
    cross_entropy = tl.zeros_like(divergence)
    if inputs.labels is not None:
        pointers = reader.addresses.to(reader.like.dtype) + label
        mask = student < tl.where(counted, spec.STUDENTS, 0)
        z = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        cross_entropy = tl.log(exp_sum_t1) - (z - z_max)
    loss = weight * (divergence + cross_entropy)
    tl.store(values.loss + offset, tl.where(counted, loss, 0.0), mask=there)
    if values.divergence is not None:
        tl.store(values.divergence + offset, tl.where(counted, divergence, 0.0), mask=there)
        tl.store(values.cross_entropy + offset, tl.where(counted, cross_entropy, 0.0), mask=there)


# Elements of a tile, and warps: 8 elements per thread and tile. A program has about five tiles in registers.
ELEMENTS, WARPS = 2048, 8


def mutual_rows(
    logits: Sequence[Tensor],
    rows: Rows,
    options: Options,
    wanted: Sequence[bool],
    parts: bool,
) -> Result:
    """Compute the losses of every row's students and their gradients, as :mod:`fastkd.call.mutual` specifies."""
    rows = readable_rows(rows)
    logits = [unit_stride(student) for student in logits]
    result = outputs(logits, wanted, parts)
    first, students = logits[0], len(logits)
    count, width = math.prod(first.shape[:-1]), first.shape[-1]
    if count:
        gradients = (gradient for gradient in result.gradients if gradient is not None)
        sizes, views = lay_out(*logits, *gradients)
        gradient_views = iter(views[students:])
        t_squared = options.temperature**2 if options.scale_by_temperature else 1.0
        power = triton.next_power_of_2(students)
        block = min(max(ELEMENTS // power, 16), triton.next_power_of_2(width))
        share = 1.0 / (students - 1)
        factor = options.peer_weight * t_squared / (share if options.peers == "sum" else 1.0)
        with on_device(first.device):
            arguments = (
                views[:students],
                tuple(next(gradient_views) if want else View(None, None, None) for want in wanted),
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
            )
            launch(mutual_kernel, (count, 1, 1), arguments, num_warps=WARPS, enable_fp_fusion=True)
    total = result.loss.reshape(students, -1).sum(-1) * options.scale
    if rows.scale is not None:
        total = total * rows.scale
    return result._replace(total=total)
