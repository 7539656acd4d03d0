"""Rows that fit in one tile: each logit is read once and stays in registers from the statistics to the gradient.

Two things are loaded again: single logits, such as the label's and those at the maxima, and rows in which a tempered
logit is not finite. This module computes what ``sweeps.py`` computes, and uses its functions and names. All columns are
in registers, so the maxima are computed before the sums. No sum is then rescaled, and each sum can leave out the column
of the maximum directly. Columns past the vocabulary have z = PAST_END, or -inf where the policy for log 0 applies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .skeleton import LOWEST, exp2_of_scaled, exp_scaled, scaled
from .sweeps import (
    PAST_END,
    Lane,
    Partial,
    Sums,
    _evaluate_tile,
    _exclude,
    _load_pair,
    _sweep_skipped,
    _temper,
    _z_at,
    finite_max,
)


class Tile(NamedTuple):
    """z of a row's columns, and the derivative of z with respect to logit_scale * logits."""

    s: Any
    t: Any  # s if there is no teacher
    s_slope: Any
    t_slope: Any


class Terms(NamedTuple):
    """The derivatives g and h and the probabilities q and p of a tile's columns."""

    g: Any
    h: Any
    q: Any
    p: Any


@triton.jit
def load_tile(student, teacher, columns, spec, PAST_END: tl.constexpr = PAST_END):
    """Return the Tile of a row; z is PAST_END past the end."""
    column = tl.arange(0, spec.BLOCK_V)
    s, t = _load_pair(student, teacher, 0, column, columns.V, False, False, PAST_END)
    s, s_slope = _temper(s, student.side, column < columns.V, PAST_END)
    t_slope = s_slope
    if teacher.unit is not None:
        t, t_slope = _temper(t, teacher.side, column < columns.V, PAST_END)
    return Tile(s, t, s_slope, t_slope)


@triton.jit
def _top(z, column, BLOCK_V: tl.constexpr, PAST_END: tl.constexpr = PAST_END):
    """Return (maximum, its first column); (-inf, -1) if every z of the row is -inf or NaN."""
    top = tl.max(z, 0)
    argmax = tl.min(tl.where(z == top, column, BLOCK_V), 0)
    none = (argmax == BLOCK_V) | (top == PAST_END) | (top == -float("inf"))
    return tl.where(none, -float("inf"), top), tl.where(none, -1, argmax)


@triton.jit
def tile_statistics(
    tile, student, teacher, excluded, center, moments, columns, ENTROPY: tl.constexpr, spec,
    LOWEST: tl.constexpr = LOWEST, PAST_END: tl.constexpr = PAST_END,
):  # fmt: skip
    """Return a Partial of all columns; an argument that is None means the same as in `sweep_statistics`."""
    lowest: tl.constexpr = -float("inf")
    column = tl.arange(0, spec.BLOCK_V)
    s = _exclude(tile.s, column, excluded, PAST_END)
    s_max, s_argmax = _top(s, column, spec.BLOCK_V)
    s_finite = finite_max(s_max)
    x_s = scaled(s - s_finite, student.unit)
    is_s = column == s_argmax
    EXACT: tl.constexpr = moments.cross is not None
    e_s = tl.where(is_s, 0.0, exp2_of_scaled(x_s, s - s_finite, student.unit, EXACT))
    s_exp_sum, s_exp_sum_t1, entropy_moment, centered_sum = tl.sum(e_s, 0), 0.0, 0.0, 0.0
    if student.unit_t1 is not None:
        e_t1 = exp_scaled(s - s_finite, student.unit_t1)
        s_exp_sum_t1 = tl.sum(tl.where(is_s, 0.0, e_t1), 0)
    if ENTROPY:
        entropy_moment = tl.sum(e_s * tl.maximum(x_s, LOWEST), 0)
    if center is not None:
        centered_sum = tl.sum(tl.where(column < columns.V, tile.s - center, 0.0), 0)
    t_max, t_argmax, t_exp_sum, t_exp_sum_t1 = s_max, s_argmax, s_exp_sum, 0.0
    p_moment, q_moment, t_at_s_argmax, s_at_t_argmax = 0.0, 0.0, s_max, s_max
    # This sum is not finite if a tempered logit is -inf; the row then needs the policy for log 0.
    finite = tl.sum(x_s, 0)
    t_skipped_max = tl.where(finite - finite == 0.0, lowest, LOWEST)
    s_skipped_max = t_skipped_max
    if teacher.unit is not None:
        t = _exclude(tile.t, column, excluded, PAST_END)
        t_max, t_argmax = _top(t, column, spec.BLOCK_V)
        t_finite = finite_max(t_max)
        x_t = scaled(t - t_finite, teacher.unit)
        is_t = column == t_argmax
        e_t = tl.where(is_t, 0.0, exp2_of_scaled(x_t, t - t_finite, teacher.unit, EXACT))
        t_exp_sum = tl.sum(e_t, 0)
        if teacher.unit_t1 is not None:
            e_t1 = exp_scaled(t - t_finite, teacher.unit_t1)
            t_exp_sum_t1 = tl.sum(tl.where(is_t, 0.0, e_t1), 0)
        t_at_s_argmax = _z_at(teacher, s_argmax, columns.V)
        s_at_t_argmax = _z_at(student, t_argmax, columns.V)
        finite = tl.sum(x_t - x_s, 0)
        t_skipped_max = tl.where(finite - finite == 0.0, lowest, LOWEST)
        s_skipped_max = t_skipped_max
        P_MOMENT: tl.constexpr = moments.forward is not None or moments.cross is not None
        # As in sweep_statistics: LOWEST replaces -inf or NaN where the weight is 0.
        if P_MOMENT:
            x = x_t - x_s
            if moments.cross is not None:
                x = tl.where(x_t == lowest, LOWEST, -x_s)
            p_moment = tl.sum(e_t * tl.maximum(x, LOWEST), 0)
        if moments.reverse is not None:
            q_moment = tl.sum(e_s * tl.maximum(x_s - x_t, LOWEST), 0)
        if P_MOMENT or moments.reverse is not None:
            moment_size = tl.abs(p_moment) + tl.abs(q_moment)
            if moment_size - moment_size != 0.0:
                p_moment, q_moment, t_skipped, s_skipped = _sweep_skipped(
                    student,
                    teacher,
                    Lane(s_max, s_argmax, 0.0, 0.0, 0.0, 0.0, 0.0),
                    Lane(t_max, t_argmax, 0.0, 0.0, 0.0, 0.0, 0.0),
                    excluded,
                    moments,
                    columns,
                    spec,
                )
                t_skipped_max = tl.maximum(t_skipped_max, t_skipped)
                s_skipped_max = tl.maximum(s_skipped_max, s_skipped)
    return Partial(
        s_max,
        t_max,
        s_exp_sum,
        t_exp_sum,
        s_exp_sum_t1,
        p_moment,
        q_moment,
        entropy_moment,
        centered_sum,
        t_skipped_max,
        s_skipped_max,
        s_argmax.to(tl.float32),
        t_at_s_argmax,
        t_argmax.to(tl.float32),
        s_at_t_argmax,
        t_exp_sum_t1,
    )


@triton.jit
def _terms(
    tile, statistics, excluded, degree, parameters, POLICY: tl.constexpr, spec,
    VALUE: tl.constexpr,
):  # fmt: skip
    """Return (phi, g, h, q, p) of a row's columns. VALUE replaces z in the excluded column."""
    column = tl.arange(0, spec.BLOCK_V)
    s = _exclude(tile.s, column, excluded, VALUE)
    t = _exclude(tile.t, column, excluded, VALUE)
    return _evaluate_tile(s, t, statistics, degree, parameters, POLICY, spec)


@triton.jit
def evaluate_row(
    tile, student, teacher, statistics, excluded, degree, parameters, columns, spec,
    PAST_END: tl.constexpr = PAST_END,
):  # fmt: skip
    """Return (Terms, Sums); for a divergence of probabilities, the sums exclude the columns of the two maxima."""
    if statistics.careful:
        # The row is read again: this branch needs z = -inf past the end, and keeping that would take registers in the
        # other branch too.
        again = load_tile(student, teacher, columns, spec, -float("inf"))
        phi, g, h, q, p = _terms(
            again, statistics, excluded, degree, parameters, True, spec, -float("inf")
        )
    else:
        phi, g, h, q, p = _terms(
            tile, statistics, excluded, degree, parameters, False, spec, PAST_END
        )
    column = tl.arange(0, spec.BLOCK_V)
    summed = column < columns.V
    if excluded is not None:
        summed = summed & (column != excluded)
    if spec.FORM % 2 == 1:
        summed = summed & (column != statistics.s_argmax.column.to(tl.int32))
        summed = summed & (column != statistics.t_argmax.column.to(tl.int32))
    phi_sum = tl.sum(tl.where(summed, phi, 0.0), 0)
    g_sum = tl.sum(tl.where(summed, g, 0.0), 0)
    h_sum = 0.0
    if teacher.side.width is not None:
        h_sum = tl.sum(tl.where(summed, h, 0.0), 0)
    return Terms(g, h, q, p), Sums(phi_sum, g_sum, h_sum)
