"""The gradients of a row: the factors of their terms, and the loops that write them, with measures or without.

The loss of a row is known by then: ``kernel.py`` computes it first, and passes what the gradients need as an OpenRow.
The functions that read logits are in ``sweeps.py``, which also explains the names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .measures import measure_tile, store_measures
from .sweeps import (
    _evaluate_tile,
    _exclude,
    _is_special,
    _read_tile,
    _special,
    _sum_tile,
    _tile_address,
    _tile_range,
    exist,
    probability,
)


class OpenRow(NamedTuple):
    """A counted row whose loss is computed."""

    student: Any  # sweeps.Row
    teacher: Any  # sweeps.Row
    tile: Any  # narrow.Tile, if one tile is the whole row
    terms: Any  # narrow.Terms, likewise
    statistics: Any  # sweeps.Statistics
    value: Any  # sweeps.Value
    label: Any  # sweeps.Label
    excluded: Any  # the column that the sums exclude, or None
    weight: Any
    columns: Any  # sweeps.Columns


class Factors(NamedTuple):
    """Factors of the terms of a row's gradients; None if a term is absent."""

    distillation: Any
    cross_entropy: Any
    teacher: Any
    smoothing: Any


@triton.jit
def squared_temperature(student, spec):
    """Return the student's T^2 if the distillation term is multiplied by it, else 1."""
    return student.temperature * student.temperature if spec.SQUARED else 1.0


@triton.jit
def _own_gradient(derivative, column, argmax, argmax_gradient, excluded, label_gradient, spec):
    """Return the derivative, after the argmax and the label have got the gradients computed for them alone."""
    if spec.FORM % 2 == 1:
        derivative = tl.where(column == argmax, argmax_gradient, derivative)
    if excluded is not None:
        derivative = tl.where(column == excluded, label_gradient, derivative)
    return derivative


@triton.jit
def _store(pointer, start, lanes, value, width, WHOLE: tl.constexpr, HEAD: tl.constexpr):
    value = value.to(pointer.dtype.element_ty)
    address = _tile_address(pointer, start, HEAD) + lanes
    if WHOLE:
        tl.store(address, value)
    else:
        tl.store(address, value, mask=exist(start + lanes, width, HEAD))


@triton.jit
def _write_tile(
    start, lanes, row, factors, special, degree, parameters, SPECIAL: tl.constexpr, spec
):
    """Write the gradients of a tile.

    A derivative x with respect to log-probabilities becomes one with respect to tempered logits: x - p sum(x).
    """
    student, teacher, value, columns = row.student, row.teacher, row.value, row.columns
    column = start + lanes
    V = columns.V
    s, s_slope = _read_tile(student, start, lanes, V, not SPECIAL, spec.HEAD)
    gradient = tl.zeros([spec.BLOCK_V], tl.float32)
    if factors.distillation is not None:
        t, t_slope = _read_tile(teacher, start, lanes, V, not SPECIAL, spec.HEAD)
        s_others, t_others = s, t
        if SPECIAL:
            s_others = _exclude(s, column, row.excluded)
            t_others = _exclude(t, column, row.excluded)
        _, g, h, q, p = _evaluate_tile(
            s_others, t_others, row.statistics, degree, parameters, SPECIAL, spec
        )
        gradient = g - q * value.sums.g if spec.FORM % 2 == 1 else g
        if SPECIAL:
            own, label = value.s_argmax.gradient, value.label_sums.g
            gradient = _own_gradient(
                gradient, column, special.s_argmax, own, row.excluded, label, spec
            )
        gradient *= factors.distillation
        if teacher.side.width is not None:
            h = h - p * value.sums.h if spec.FORM % 2 == 1 else h
            if SPECIAL:
                own, label = value.t_argmax.gradient, value.label_sums.h
                h = _own_gradient(h, column, special.t_argmax, own, row.excluded, label, spec)
            h *= t_slope * factors.teacher
            if SPECIAL:
                h = tl.where(column < V, h, 0.0)
            width = teacher.side.width
            _store(teacher.gradient, start, lanes, h, width, not SPECIAL, spec.HEAD)
    if student.side.width is not None:
        if factors.cross_entropy is not None:
            target = 0.0
            if factors.smoothing is not None:
                target = factors.smoothing / columns.vocabulary
            if SPECIAL:
                of_label = 1.0
                if factors.smoothing is not None:
                    of_label = 1.0 - factors.smoothing
                target += tl.where(column == special.label, of_label, 0.0)
            q_t1 = probability(s, value.s_norm_t1)
            gradient += (q_t1 - target) * factors.cross_entropy
        gradient *= s_slope
        if SPECIAL:
            gradient = tl.where(column < V, gradient, 0.0)
        width = student.side.width
        _store(student.gradient, start, lanes, gradient, width, not SPECIAL, spec.HEAD)


@triton.jit
def _stored_width(width, spec):
    """Return the width of a gradient unchanged; the expression lets Triton infer that it is a multiple of ADJACENT."""
    return width // spec.ADJACENT * spec.ADJACENT


@triton.jit
def _write_one_tile(row, factors, spec):
    """Write the gradients of a row that is one tile, from what is still in registers."""
    student, teacher, value, columns = row.student, row.teacher, row.value, row.columns
    tile, terms = row.tile, row.terms
    column = tl.arange(0, spec.BLOCK_V)
    gradient = tl.zeros([spec.BLOCK_V], tl.float32)
    if factors.distillation is not None:
        argmax = value.s_argmax.column.to(tl.int32)
        own, label = value.s_argmax.gradient, value.label_sums.g
        gradient = terms.g - terms.q * value.sums.g if spec.FORM % 2 == 1 else terms.g
        gradient = _own_gradient(gradient, column, argmax, own, row.excluded, label, spec)
        gradient *= factors.distillation
        if teacher.side.width is not None:
            argmax = value.t_argmax.column.to(tl.int32)
            own, label = value.t_argmax.gradient, value.label_sums.h
            h = terms.h - terms.p * value.sums.h if spec.FORM % 2 == 1 else terms.h
            h = _own_gradient(h, column, argmax, own, row.excluded, label, spec)
            h *= tile.t_slope * factors.teacher
            h = tl.where(column < columns.V, h, 0.0)
            width = _stored_width(teacher.side.width, spec)
            _store(teacher.gradient, 0, column, h, width, False, False)
    if student.side.width is not None:
        if factors.cross_entropy is not None:
            target, of_label = 0.0, 1.0
            if factors.smoothing is not None:
                target = factors.smoothing / columns.vocabulary
                of_label = 1.0 - factors.smoothing
            target += tl.where(column == row.label.column, of_label, 0.0)
            q_t1 = probability(tile.s, value.s_norm_t1)
            gradient += (q_t1 - target) * factors.cross_entropy
        gradient *= tile.s_slope
        gradient = tl.where(column < columns.V, gradient, 0.0)
        width = _stored_width(student.side.width, spec)
        _store(student.gradient, 0, column, gradient, width, False, False)


@triton.jit
def _measure_and_write_tile(
    start, lanes, row, factors, special, degree, parameters, SPECIAL: tl.constexpr, spec
):
    """Write the gradients of a tile, if they are wanted, and return what measure_tile does."""
    entropy, forward, reverse, acceptance, s_first, t_first = measure_tile(
        start, lanes, row, SPECIAL, spec
    )
    if row.columns.width is not None:
        _write_tile(start, lanes, row, factors, special, degree, parameters, SPECIAL, spec)
    return entropy, forward, reverse, acceptance, s_first, t_first


@triton.jit
def sweep_measures(number, row, factors, out, degree, parameters, spec):
    """Store the measures of a row, and write its gradients, if they are wanted. number: that of the row."""
    value, statistics, columns = row.value, row.statistics, row.columns
    lanes = tl.arange(0, spec.BLOCK_V)
    entropy = _sum_tile(tl.zeros([spec.BLOCK_V], tl.float32), spec)
    forward, reverse, acceptance = entropy, entropy, entropy
    s_first = tl.full([spec.THREADS], 2147483647, tl.int32)
    t_first = s_first
    special = _special(
        value.s_argmax, value.t_argmax, row.label.column, statistics.careful, columns
    )
    width = columns.V
    if columns.width is not None:
        width = columns.width
    first, last = _tile_range(width, columns.split.num_splits, spec.BLOCK_V, columns.head)
    for reverse_number in range(first, last):
        start = (first + last - 1 - reverse_number) * spec.BLOCK_V - columns.head
        if _is_special(start, special, spec):
            e, f, r, a, s_column, t_column = _measure_and_write_tile(
                start, lanes, row, factors, special, degree, parameters, True, spec
            )
        else:
            e, f, r, a, s_column, t_column = _measure_and_write_tile(
                start, lanes, row, factors, special, degree, parameters, False, spec
            )
        entropy += e
        forward += f
        reverse += r
        acceptance += a
        s_first = tl.minimum(s_first, s_column)
        t_first = tl.minimum(t_first, t_column)
    store_measures(
        number, tl.sum(entropy, 0), tl.sum(forward, 0), tl.sum(reverse, 0), tl.sum(acceptance, 0),
        tl.min(s_first, 0), tl.min(t_first, 0), statistics, out, columns.split,
    )  # fmt: skip


@triton.jit
def write_gradients(number, row, inputs, objective, measures, parameters, spec):
    """Write the gradients of a row, and its measures, unless measures, their address, is None.

    Tiles are in reverse order, because caches still contain what the previous sweep read last.
    """
    student, teacher, value, columns = row.student, row.teacher, row.value, row.columns
    scale = objective.scale
    if inputs.scale is not None:
        scale *= tl.load(inputs.scale)
    s_scale = row.weight * scale * student.side.logit_scale
    s_factor, t_factor, ce_factor, smoothing = None, None, None, objective.smoothing
    if objective.alpha is not None:
        squared = squared_temperature(student, spec)
        s_factor = objective.alpha * squared / student.temperature * s_scale
        t_factor = objective.alpha * squared / teacher.temperature
        t_factor = t_factor * row.weight * scale * teacher.side.logit_scale
    if objective.ce_weight is not None:
        ce_factor = objective.ce_weight * s_scale
    # Nested, because Triton evaluates `x is not None` at compile time, but not an `and` of two such tests.
    if objective.label_weight is not None:  # noqa: SIM102
        if objective.alpha is not None:
            # The label term is a cross-entropy without smoothing. Its sum with the smoothed cross-entropy is a single
            # cross-entropy with less smoothing.
            total_weight = objective.alpha * value.label_weight
            if objective.ce_weight is not None:
                total_weight += objective.ce_weight
                if smoothing is not None:
                    smoothing *= objective.ce_weight / total_weight
            ce_factor = total_weight * s_scale
    factors = Factors(s_factor, ce_factor, t_factor, smoothing)
    if spec.ONE_TILE:
        _write_one_tile(row, factors, spec)
    elif measures is not None:
        sweep_measures(number, row, factors, measures, objective.degree, parameters, spec)
    else:
        lanes = tl.arange(0, spec.BLOCK_V)
        special = _special(
            value.s_argmax, value.t_argmax, row.label.column, row.statistics.careful, columns
        )
        first, last = _tile_range(
            columns.width, columns.split.num_splits, spec.BLOCK_V, columns.head
        )
        for reverse in range(first, last):
            start = (first + last - 1 - reverse) * spec.BLOCK_V - columns.head
            if _is_special(start, special, spec):
                _write_tile(
                    start, lanes, row, factors, special, objective.degree, parameters, True, spec
                )
            else:
                _write_tile(
                    start, lanes, row, factors, special, objective.degree, parameters, False, spec
                )


@triton.jit
def sweep_zeros(pointer, width, num_splits, BLOCK_V: tl.constexpr):
    """Write zeros: the gradient of a dropped row."""
    first, last = _tile_range(width, num_splits, BLOCK_V)
    for tile in range(first, last):
        zeros = tl.zeros([BLOCK_V], tl.float32)
        _store(pointer, tile * BLOCK_V, tl.arange(0, BLOCK_V), zeros, width, False, False)
