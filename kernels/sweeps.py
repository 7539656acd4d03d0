"""The sweeps over a row: statistics, the sums of phi, g and h, and the gradients.

All arithmetic is in float32. A sum over the vocabulary has one accumulator per lane of a tile, and the accumulators are
added once, at the end. A row of 262144 columns therefore adds only a few hundred numbers in sequence.

``z`` is a logit after logit_scale and softcap, up to the positive factor ``Row.unit``. Differences of z are taken
before that factor multiplies them, so an offset common to a row costs no digits. Columns past the vocabulary read as
z = -inf on both sides, and the policy for log 0 gives them no contribution. If a divergence treats the label separately
(``label_term.py``), every sum except the sum of z excludes the label's column in the same way.

Names: ``s`` and ``t`` are z of the student and of the teacher; ``x_s`` and ``x_t`` are tempered and relative to the
maximum; ``e_s`` and ``e_t`` are their exponentials. ``_t1`` means at temperature 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .skeleton import NEGLIGIBLE, evaluate, log1p, squash


class Spec(NamedTuple):
    """What a kernel is compiled for; every field is a constexpr."""

    DIVERGENCE: Any  # from skeleton.bind
    FORM: Any  # from skeleton.form_of; odd for a divergence of probabilities
    SQUARED: Any  # whether the distillation term is multiplied by T^2
    ALIGNED: Any  # whether every row starts at a multiple of 16 bytes
    BLOCK_V: Any  # columns of a tile
    LANES: Any  # lanes that merge partial results
    STAGE: Any  # "row", or one of "statistics", "sums", "gradient"


class Columns(NamedTuple):
    """The columns of a row, and how they are divided among programs and processes."""

    V: Any  # columns of the logits in this process
    width: Any  # columns of the widest gradient; None if there is no gradient
    first: Any  # vocabulary index of this process's first column
    vocabulary: Any  # columns of all processes
    shard: Any  # VocabShard, or None if this process has the whole vocabulary
    split: Any  # Split, or None if one program processes the whole row


class VocabShard(NamedTuple):
    """The vocabulary columns of this process, if several processes share the vocabulary."""

    first: Any
    total: Any  # columns of all processes


class Split(NamedTuple):
    """How programs share rows; program_id(1) is the number of a program within its row."""

    statistics: Any  # float32 [rows, FIELDS, ..]: partial results that one kernel stores for the next (split.py)
    sums: Any  # float32 [rows, 3, ..]: partial sums of phi, g and h
    label_term: Any  # float32 [rows, LABEL_TERM_FIELDS, ..]; None if no divergence treats the label separately
    first_row: Any  # row of the kernel's first program
    num_splits: Any  # programs per row in this process
    num_partials: Any  # partial results per row that a kernel loads: those of all processes


class Row(NamedTuple):
    """One side's row; every field is None, at compile time, if the side is absent.

    Test a field for None, not the tuple. Some Triton releases cannot compare a tuple that contains None with None, or
    return such a tuple from a function.
    """

    logits: Any  # address of column 0
    gradient: Any  # address of column 0; equal to logits if there is no gradient
    unit: Any  # tempered logits are unit * z
    unit_t1: Any  # likewise at temperature 1; None if no sum at temperature 1 is needed
    temperature: Any
    side: Any  # kernel.Side


class Moments(NamedTuple):
    """Weights of the moments to collect, from fastkd.divergences.ClosedForm; all None if there is no closed form."""

    forward: Any  # None if forward and cross are both 0
    cross: Any  # None if forward and cross are both 0
    reverse: Any  # None if 0


class Normalizer(NamedTuple):
    """log_softmax(unit * z) = unit * (z - max) - log_exp_sum; max is 0 if every z is -inf."""

    max: Any
    unit: Any
    log_exp_sum: Any


class Argmax(NamedTuple):
    """The column of a row's maximum. Sums exclude it, because adding it would round away the other columns.

    With r the sum of the other columns' exponentials relative to the maximum, 1 - p_v is r / (1 + r) without
    cancellation. The column's gradient is x_v - p_v sum x, where x is g or h. It is computed as
    x_v (1 - p_v) - p_v (sum of the other columns' x), because the direct difference would cancel.
    """

    column: Any  # vocabulary index, as a float; -1 if there is none
    exp_sum: Any  # of the other columns, relative to the maximum
    z: Any
    z_other: Any  # the other side's z in that column
    gradient: Any


class LogRatio(NamedTuple):
    """log p - log q = ((t - t_shift) * scale - (s - s_shift)) * unit + high + low."""

    s_shift: Any
    t_shift: Any
    scale: Any
    unit: Any
    low: Any
    high: Any


class Sums(NamedTuple):
    """Sums over the vocabulary: the divergence, and its derivatives with respect to log q and log p."""

    phi: Any
    g: Any
    h: Any


class Partial(NamedTuple):
    """Sums of the first sweep over some tiles of a row, relative to the maxima of those tiles; 0 if not requested.

    A side's sums of exponentials and its moments exclude the column of that side's maximum.
    """

    s_max: Any
    t_max: Any
    s_exp_sum: Any
    t_exp_sum: Any
    s_exp_sum_t1: Any
    p_moment: Any
    q_moment: Any
    entropy_moment: Any
    centered_sum: Any  # sum of z - center
    t_lost_max: Any  # largest t in a column with s = -inf
    s_lost_max: Any  # largest s in a column with t = -inf
    s_argmax: Any  # as a float; -1 if there is none
    t_at_s_argmax: Any
    t_argmax: Any
    s_at_t_argmax: Any
    # Last, because it is stored only if the divergence has a label term (split.py).
    t_exp_sum_t1: Any


class Statistics(NamedTuple):
    """What is known about a row before its value and gradient; 0 if not requested."""

    s_norm: Any  # Normalizer
    t_norm: Any  # Normalizer
    s_norm_t1: Any  # Normalizer
    t_norm_t1: Any  # Normalizer
    entropy: Any  # of the tempered student
    centered_sum: Any  # sum of z - center
    s_argmax: Any  # Argmax
    t_argmax: Any  # Argmax
    log_ratio: Any  # LogRatio
    # log of the student's sum of exponentials divided by the teacher's; both sums include the argmax
    log_exp_sum_ratio: Any
    phi: Any  # sum, from the closed form or from the second sweep
    g: Any  # sum, likewise
    h: Any  # sum, likewise; only if the teacher's gradient is wanted


class Label(NamedTuple):
    """The label's column in this process, and both sides' z there; -inf if another process has the column."""

    column: Any
    s: Any
    t: Any


class Value(NamedTuple):
    """What the gradient needs of a row's value."""

    sums: Any  # Sums over all columns
    # Sums that a binary label term adds; g and h are also the derivatives in the label's column
    label_sums: Any
    label_weight: Any  # factor of -log q_label in the distillation term
    s_norm_t1: Any  # Normalizer that includes the label's column
    s_argmax: Any  # Argmax
    t_argmax: Any  # Argmax


class Factors(NamedTuple):
    """Factors of the terms of a row's gradients; None if a term is absent."""

    distillation: Any
    cross_entropy: Any
    teacher: Any
    smoothing: Any


@triton.jit
def _tile_range(num_columns, split, BLOCK_V: tl.constexpr):
    """Return this program's (first tile, tile after its last); the range is empty past the end of the row."""
    first, last = 0, tl.cdiv(num_columns, BLOCK_V)
    if split is not None:
        tiles_per_program = tl.cdiv(last, split.num_splits)
        first = tl.program_id(1) * tiles_per_program
        last = tl.minimum(first + tiles_per_program, last)
    return first, last


@triton.jit
def count_columns(V, split, BLOCK_V: tl.constexpr):
    """Return the number of columns that this program processes."""
    first, last = _tile_range(V, split, BLOCK_V)
    return tl.maximum(tl.minimum(last * BLOCK_V, V) - first * BLOCK_V, 0)


@triton.jit
def read(row, column, V):
    """Return (z, derivative of z with respect to logit_scale * logits) of these columns of a row."""
    z = tl.load(row.logits + column, mask=column < V, other=-float("inf")).to(tl.float32)
    slope = 1.0
    if row.side.softcap is not None:
        squashed, slope = squash(row.side.softcap_gain * z)
        z = tl.where(column < V, row.side.softcap * squashed, -float("inf"))
    elif row.side.sign is not None:
        z = tl.where(column < V, row.side.sign * z, -float("inf"))
    return z, slope


@triton.jit
def _exclude(z, column, excluded):
    """Replace z by -inf in the excluded column. A NaN there stays, and poisons the row as in any other column."""
    if excluded is not None:
        z = tl.where((column == excluded) & (z == z), -float("inf"), z)
    return z


@triton.jit
def log_probability(z, normalizer):
    """Return log_softmax of the tempered logits."""
    return (z - normalizer.max) * normalizer.unit - normalizer.log_exp_sum


# A tile's lanes are added in fours or twos before they are added to an accumulator. These lanes belong to one thread,
# so the addition moves no data, and accumulators need fewer registers. If rows are ALIGNED, a thread loads 16 bytes at
# a time and has four adjacent columns. Otherwise, a thread's columns are a fixed stride apart, and lanes half a tile
# apart belong to one thread.
@triton.jit
def fold(tile, ALIGNED: tl.constexpr = True):
    """Add the lanes of a tile that belong to one thread."""
    if ALIGNED:
        return tl.sum(tl.reshape(tile, [tile.shape[0] // 4, 4]), 1)
    else:
        return tl.sum(tl.reshape(tile, [2, tile.shape[0] // 2]), 0)


@triton.jit
def _fold_max(tile, ALIGNED: tl.constexpr):
    """Return the maximum of the lanes of a tile that belong to one thread."""
    if ALIGNED:
        return tl.max(tl.reshape(tile, [tile.shape[0] // 4, 4]), 1)
    else:
        return tl.max(tl.reshape(tile, [2, tile.shape[0] // 2]), 0)


@triton.jit
def finite_max(max):  # noqa: A002 (the glossary's name)
    """Return the running maximum, or 0 while every z so far is -inf."""
    return tl.where(max == -float("inf"), 0.0, max)


@triton.jit
def rescale(old_max, new_max, unit):
    """Return (finite new maximum, tempered rise of the maximum, factor that rescales earlier sums)."""
    new = finite_max(new_max)
    return new, (new - finite_max(old_max)) * unit, tl.exp((old_max - new) * unit)


@triton.jit
def rescale_moment(moment, shift, exp_sum, factor):
    """Return a moment relative to the new maximum; 0 if the factor is 0, even if the shift is infinite."""
    return tl.where(factor == 0.0, 0.0, factor * (moment + shift * exp_sum))


@triton.jit
def _rescale_p_moment(p_moment, moments, s_step, t_step, t_exp_sum, t_factor):
    shift = (moments.forward + moments.cross) * s_step - moments.forward * t_step
    return rescale_moment(p_moment, shift, t_exp_sum, t_factor)


@triton.jit
def _rescale_q_moment(q_moment, s_step, t_step, s_exp_sum, s_factor):
    return rescale_moment(q_moment, t_step - s_step, s_exp_sum, s_factor)


@triton.jit
def _log_exp_sum_ratio(s_exp_sum, t_exp_sum):
    """Return log((1 + s) / (1 + t)): exactly 0 if they are equal, and accurate if both are small."""
    change = tl.div_rn(s_exp_sum - t_exp_sum, 1.0 + t_exp_sum)
    quotient = tl.div_rn(1.0 + s_exp_sum, 1.0 + t_exp_sum)
    return tl.where(tl.abs(change) < 0.5, log1p(change), tl.log(quotient))


@triton.jit
def _closed_form(
    moments,
    p_moment,
    q_moment,
    s_argmax,
    t_argmax,
    s_gap,
    t_gap,
    log_exp_sum_ratio,
    p_lost,
    q_lost,
    NEGLIGIBLE: tl.constexpr = NEGLIGIBLE,
):
    """Return (sums of phi, g and h, student's gradient at its argmax, teacher's at its own), from the moments.

    s_gap: the student's tempered z at the teacher's argmax, relative to the student's maximum; t_gap the reverse.
    p_lost, q_lost: the largest probability of a side where the other side's z is -inf.
    """
    s_exp_sum = 1.0 + s_argmax.exp_sum
    t_exp_sum = 1.0 + t_argmax.exp_sum
    same = s_argmax.column == t_argmax.column
    phi = 0.0
    g = 0.0
    h = 0.0
    s_gradient = 0.0
    t_gradient = 0.0
    q_others = tl.div_rn(s_argmax.exp_sum, s_exp_sum)  # probability of all columns but the argmax
    p_others = tl.div_rn(t_argmax.exp_sum, t_exp_sum)
    if moments.forward is not None:
        weight = moments.forward + moments.cross
        phi += tl.div_rn(p_moment - weight * s_gap, t_exp_sum) + moments.forward * log_exp_sum_ratio
        phi += moments.cross * log1p(s_argmax.exp_sum)
        phi += tl.where(p_lost >= NEGLIGIBLE, float("inf"), 0.0)
        g -= weight
        h += phi + weight
        p_at_s_argmax = tl.div_rn(tl.exp(t_gap), t_exp_sum)
        difference = tl.where(same, p_others - q_others, tl.div_rn(1.0, s_exp_sum) - p_at_s_argmax)
        s_gradient += weight * difference
        # A gap of -inf makes phi infinite, and where_finite discards these gradients.
        gap = tl.where(s_gap == -float("inf"), 0.0, s_gap)
        t_gradient -= tl.div_rn(weight * gap * p_others + tl.div_rn(p_moment, t_exp_sum), t_exp_sum)
    if moments.reverse is not None:
        reverse = tl.div_rn(q_moment - t_gap, s_exp_sum) - log_exp_sum_ratio
        reverse += tl.where(q_lost >= NEGLIGIBLE, float("inf"), 0.0)
        phi += moments.reverse * reverse
        g += moments.reverse * (reverse + 1.0)
        h -= moments.reverse
        q_at_t_argmax = tl.div_rn(tl.exp(s_gap), s_exp_sum)
        gap = tl.where(t_gap == -float("inf"), 0.0, t_gap)
        mean = tl.div_rn(gap * q_others + tl.div_rn(q_moment, s_exp_sum), s_exp_sum)
        s_gradient -= moments.reverse * mean
        difference = tl.where(same, q_others - p_others, tl.div_rn(1.0, t_exp_sum) - q_at_t_argmax)
        t_gradient += moments.reverse * difference
    return phi, g, h, s_gradient, t_gradient


@triton.jit
def _reduce_lanes(s_max, t_max, sums, t_lost_max, s_lost_max, argmaxes, t_exp_sum_t1):
    """Return a Partial from the accumulators' lanes."""
    return Partial(
        s_max,
        t_max,
        tl.sum(sums[0], 0),
        tl.sum(sums[1], 0),
        tl.sum(sums[2], 0),
        tl.sum(sums[3], 0),
        tl.sum(sums[4], 0),
        tl.sum(sums[5], 0),
        tl.sum(sums[6], 0),
        tl.max(t_lost_max, 0),
        tl.max(s_lost_max, 0),
        argmaxes[0],
        argmaxes[1],
        argmaxes[2],
        argmaxes[3],
        tl.sum(t_exp_sum_t1, 0),
    )


@triton.jit
def _z_at(row, column, V):
    """Return z of one column; -inf if the column is negative."""
    z, _ = read(row, tl.maximum(column, 0), V)
    return tl.where(column < 0, -float("inf"), z)


@triton.jit
def _first_lane(accumulator):
    """Return 1 in the first lane of an accumulator and 0 elsewhere, to add the term of a single column."""
    return tl.where(tl.arange(0, accumulator.shape[0]) == 0, 1.0, 0.0)


class Tile(NamedTuple):
    """One side's tile of columns in the first sweep."""

    z: Any
    x: Any  # tempered, relative to the maximum so far
    e: Any  # exp(x); 0 in the column of the maximum
    step: Any  # tempered rise of the maximum in this tile
    factor: Any  # rescales earlier sums


@triton.jit
def _change_argmax(
    argmax, exp_sum, exp_sum_t1, moment, z, new_max, column, row, other, other_max, weight, V
):
    """Return (argmax, exp_sum, exp_sum_t1, moment) after the maximum has risen.

    Sums exclude the argmax, so the column of the old maximum is added to them here. weight None: no moment.
    """
    if argmax >= 0:
        exp_sum += _first_lane(exp_sum)
        if row.unit_t1 is not None:
            exp_sum_t1 += _first_lane(exp_sum_t1)
        if weight is not None:
            gap = (_z_at(other, argmax, V) - finite_max(other_max)) * other.unit
            gap *= weight
            moment += _first_lane(moment) * tl.where(gap == -float("inf"), 0.0, -gap)
    argmax = tl.min(tl.where(z == new_max, column, 2147483647), 0)  # the first such column
    return argmax, exp_sum, exp_sum_t1, moment


@triton.jit
def _add_moments(
    p_moment, q_moment, t_lost_max, s_lost_max, s, t, s_exp_sum, t_exp_sum, moments, spec
):
    """Return (p_moment, q_moment, t_lost_max, s_lost_max) with a tile added; s and t are its Tiles.

    Columns in which a side is -inf are not in the moments. The largest z that is skipped decides later whether the
    divergence is infinite.
    """
    # x decides, not z: at a temperature below 1, a finite z can be so low that x is -inf.
    s_gone = s.x == -float("inf")
    t_gone = t.x == -float("inf")
    if moments.forward is not None:
        weight = moments.forward + moments.cross
        term = t.e * (moments.forward * t.x - weight * s.x)
        p_moment = _rescale_p_moment(p_moment, moments, s.step, t.step, t_exp_sum, t.factor)
        p_moment += fold(tl.where(s_gone | t_gone, 0.0, term), spec.ALIGNED)
        lost = tl.where(s_gone, t.z, -float("inf"))
        t_lost_max = tl.maximum(t_lost_max, _fold_max(lost, spec.ALIGNED))
    if moments.reverse is not None:
        q_moment = _rescale_q_moment(q_moment, s.step, t.step, s_exp_sum, s.factor)
        q_moment += fold(tl.where(s_gone | t_gone, 0.0, s.e * (s.x - t.x)), spec.ALIGNED)
        lost = tl.where(t_gone, s.z, -float("inf"))
        s_lost_max = tl.maximum(s_lost_max, _fold_max(lost, spec.ALIGNED))
    return p_moment, q_moment, t_lost_max, s_lost_max


@triton.jit
def _add_exp_sum_t1(exp_sum_t1, z, old_max, new_max, argmax, column, unit_t1, spec):
    """Return the sum of exponentials at temperature 1 with a tile added."""
    factor = tl.exp((old_max - new_max) * unit_t1)
    e = tl.where(column == argmax, 0.0, tl.exp((z - new_max) * unit_t1))
    return factor * exp_sum_t1 + fold(e, spec.ALIGNED)


@triton.jit
def sweep_statistics(
    student, teacher, excluded, center, moments, columns, ENTROPY: tl.constexpr, spec
):
    """Return a Partial: the online softmax of both sides, with the moments that are asked for.

    Sums of exponentials are relative to the running maximum. When it rises by `step` (tempered), earlier sums are
    multiplied by exp(-step). A moment is a sum of e x in which x is relative to the maximum too, so it also changes by
    -step times the sum of e. excluded None: sums are over all columns. center None: no sum of z.
    """
    lanes = tl.arange(0, spec.BLOCK_V)
    lowest = _fold_max(tl.full([spec.BLOCK_V], -float("inf"), tl.float32), spec.ALIGNED)
    zero = fold(tl.zeros([spec.BLOCK_V], tl.float32), spec.ALIGNED)
    s_max = tl.full([], -float("inf"), tl.float32)
    s_argmax = tl.full([], -1, tl.int32)
    t_max, t_argmax = s_max, s_argmax
    s_exp_sum, t_exp_sum, s_exp_sum_t1, t_exp_sum_t1 = zero, zero, zero, zero
    p_moment, q_moment, entropy_moment, centered_sum = zero, zero, zero, zero
    t_lost_max, s_lost_max = lowest, lowest
    p_weight, q_weight, V = None, None, columns.V
    if moments.forward is not None:
        p_weight = moments.forward + moments.cross
    if moments.reverse is not None:
        q_weight = 1.0
    first, last = _tile_range(V, columns.split, spec.BLOCK_V)
    for tile in range(first, last):
        column = tile * spec.BLOCK_V + lanes
        z, _ = read(student, column, V)
        s = _exclude(z, column, excluded)
        old_s_max, old_t_max = s_max, t_max
        s_max = tl.maximum(s_max, tl.max(s, 0))
        s_finite, s_step, s_factor = rescale(old_s_max, s_max, student.unit)
        if teacher.unit is not None:
            t, _ = read(teacher, column, V)
            t = _exclude(t, column, excluded)
            t_max = tl.maximum(t_max, tl.max(t, 0))
            t_finite, t_step, t_factor = rescale(old_t_max, t_max, teacher.unit)
        # Both sides change their argmax before the exponentials of the tile are computed, because a value that is live
        # across a branch occupies registers.
        if s_max > old_s_max:
            s_argmax, s_exp_sum, s_exp_sum_t1, q_moment = _change_argmax(
                s_argmax, s_exp_sum, s_exp_sum_t1, q_moment,
                s, s_max, column, student, teacher, old_t_max, q_weight, V,
            )  # fmt: skip
        if teacher.unit is not None:  # noqa: SIM102 (Triton does not evaluate `and` at compile time)
            if t_max > old_t_max:
                t_argmax, t_exp_sum, t_exp_sum_t1, p_moment = _change_argmax(
                    t_argmax, t_exp_sum, t_exp_sum_t1, p_moment,
                    t, t_max, column, teacher, student, old_s_max, p_weight, V,
                )  # fmt: skip
        x_s = (s - s_finite) * student.unit
        e_s = tl.where(column == s_argmax, 0.0, tl.exp(x_s))
        if ENTROPY:
            term = fold(tl.where(x_s == -float("inf"), 0.0, e_s * x_s), spec.ALIGNED)
            entropy_moment = rescale_moment(entropy_moment, -s_step, s_exp_sum, s_factor) + term
        if student.unit_t1 is not None:
            s_exp_sum_t1 = _add_exp_sum_t1(
                s_exp_sum_t1, s, old_s_max, s_finite, s_argmax, column, student.unit_t1, spec
            )
        if center is not None:
            centered_sum += fold(tl.where(column < V, z - center, 0.0), spec.ALIGNED)
        if teacher.unit is not None:
            x_t = (t - t_finite) * teacher.unit
            e_t = tl.where(column == t_argmax, 0.0, tl.exp(x_t))
            p_moment, q_moment, t_lost_max, s_lost_max = _add_moments(
                p_moment, q_moment, t_lost_max, s_lost_max,
                Tile(s, x_s, e_s, s_step, s_factor), Tile(t, x_t, e_t, t_step, t_factor),
                s_exp_sum, t_exp_sum, moments, spec,
            )  # fmt: skip
            if teacher.unit_t1 is not None:
                t_exp_sum_t1 = _add_exp_sum_t1(
                    t_exp_sum_t1, t, old_t_max, t_finite, t_argmax, column, teacher.unit_t1, spec
                )
            t_exp_sum = t_factor * t_exp_sum + fold(e_t, spec.ALIGNED)
        s_exp_sum = s_factor * s_exp_sum + fold(e_s, spec.ALIGNED)
    sums = (s_exp_sum, t_exp_sum, s_exp_sum_t1, p_moment, q_moment, entropy_moment, centered_sum)
    argmaxes = _argmaxes(student, teacher, s_max, s_argmax, t_argmax, columns)
    return _reduce_lanes(s_max, t_max, sums, t_lost_max, s_lost_max, argmaxes, t_exp_sum_t1)


@triton.jit
def _argmaxes(student, teacher, s_max, s_argmax, t_argmax, columns):
    """Return (s_argmax, t there, t_argmax, s there), with vocabulary indices as floats."""
    t_at_s_argmax, s_at_t_argmax = s_max, s_max
    if teacher.unit is not None:
        t_at_s_argmax = _z_at(teacher, s_argmax, columns.V)
        s_at_t_argmax = _z_at(student, t_argmax, columns.V)
    if columns.shard is not None:
        s_argmax = tl.where(s_argmax < 0, -1, s_argmax + columns.first)
        t_argmax = tl.where(t_argmax < 0, -1, t_argmax + columns.first)
    return s_argmax.to(tl.float32), t_at_s_argmax, t_argmax.to(tl.float32), s_at_t_argmax


@triton.jit
def _select(values, eligible, argmaxes, argmax):
    """Return the value of the eligible partial whose argmax is this column."""
    return tl.max(tl.where(eligible & (argmaxes == argmax), values, -float("inf")), 0)


@triton.jit
def _merge_argmax(maxima, new_max, argmaxes):
    """Return (which partials have the row's maximum, the first column that has it, terms to add to each sum).

    A partial's sums exclude its own argmax. The row's sums exclude only one of these columns. Each of the others
    therefore adds a term of 1 to its partial's sum.
    """
    eligible = (maxima == new_max) & (argmaxes >= 0)
    argmax = tl.min(tl.where(eligible, argmaxes, float("inf")), 0)
    extra = tl.where((argmaxes >= 0) & ~(eligible & (argmaxes == argmax)), 1.0, 0.0)
    return eligible, argmax, extra


@triton.jit
def merge_partials(partials, student, teacher, moments):
    """Return one Partial of a row from its partials, one per lane. A lane without tiles has the maximum -inf."""
    s_max = tl.max(partials.s_max, 0)
    t_max = tl.max(partials.t_max, 0)
    s_finite, s_step, s_factor = rescale(partials.s_max, s_max, student.unit)
    s_eligible, s_argmax, s_extra = _merge_argmax(partials.s_max, s_max, partials.s_argmax)
    s_exp_sum = partials.s_exp_sum + s_extra
    entropy_moment = rescale_moment(partials.entropy_moment, -s_step, s_exp_sum, s_factor)
    s_exp_sum_t1, t_exp_sum_t1 = partials.s_exp_sum_t1, partials.t_exp_sum_t1
    p_moment, q_moment, t_exp_sum = partials.p_moment, partials.q_moment, partials.t_exp_sum
    argmaxes = (s_argmax, s_max, s_argmax, s_max)
    if student.unit_t1 is not None:
        s_factor_t1 = tl.exp((partials.s_max - s_finite) * student.unit_t1)
        s_exp_sum_t1 = (s_exp_sum_t1 + s_extra) * s_factor_t1
    if teacher.unit is not None:
        t_finite, t_step, t_factor = rescale(partials.t_max, t_max, teacher.unit)
        t_eligible, t_argmax, t_extra = _merge_argmax(partials.t_max, t_max, partials.t_argmax)
        t_exp_sum = t_exp_sum + t_extra
        t_at_s_argmax = _select(partials.t_at_s_argmax, s_eligible, partials.s_argmax, s_argmax)
        s_at_t_argmax = _select(partials.s_at_t_argmax, t_eligible, partials.t_argmax, t_argmax)
        argmaxes = (s_argmax, t_at_s_argmax, t_argmax, s_at_t_argmax)
        if teacher.unit_t1 is not None:
            t_factor_t1 = tl.exp((partials.t_max - t_finite) * teacher.unit_t1)
            t_exp_sum_t1 = (t_exp_sum_t1 + t_extra) * t_factor_t1
        if moments.forward is not None:
            gap = (partials.s_at_t_argmax - finite_max(partials.s_max)) * student.unit
            gap *= moments.forward + moments.cross
            p_moment -= tl.where((t_extra == 0.0) | (gap == -float("inf")), 0.0, gap)
            p_moment = _rescale_p_moment(p_moment, moments, s_step, t_step, t_exp_sum, t_factor)
        if moments.reverse is not None:
            gap = (partials.t_at_s_argmax - finite_max(partials.t_max)) * teacher.unit
            q_moment -= tl.where((s_extra == 0.0) | (gap == -float("inf")), 0.0, gap)
            q_moment = _rescale_q_moment(q_moment, s_step, t_step, s_exp_sum, s_factor)
        t_exp_sum = t_factor * t_exp_sum
    s_exp_sum, centered_sum = s_factor * s_exp_sum, partials.centered_sum
    sums = (s_exp_sum, t_exp_sum, s_exp_sum_t1, p_moment, q_moment, entropy_moment, centered_sum)
    t_lost_max, s_lost_max = partials.t_lost_max, partials.s_lost_max
    return _reduce_lanes(s_max, t_max, sums, t_lost_max, s_lost_max, argmaxes, t_exp_sum_t1)


# If the log-sum-exps of the two sides differ by less than this, log p - log q is computed from t - s.
CLOSE = 8.0


@triton.jit
def _log_ratio_constants(s_norm, t_norm, log_exp_sum_ratio, CLOSE: tl.constexpr = CLOSE):
    """Return the LogRatio of a row."""
    scale = tl.div_rn(t_norm.unit, s_norm.unit)
    # high + low is (s_norm.max - t_norm.max) * unit + log_exp_sum_ratio as two floats.
    difference = s_norm.max - t_norm.max
    product = difference * s_norm.unit
    product_error = tl.fma(difference, s_norm.unit, -product)
    high = product + log_exp_sum_ratio
    added = high - product
    low = (product - (high - added)) + (log_exp_sum_ratio - added) + product_error
    # Only the difference of close maxima is small enough to be rounded once per row without a large error.
    close = (scale == 1.0) & (tl.abs(high) < CLOSE)
    return LogRatio(
        tl.where(close, 0.0, s_norm.max),
        tl.where(close, 0.0, t_norm.max),
        scale,
        s_norm.unit,
        tl.where(close, low, 0.0),
        tl.where(close, high, log_exp_sum_ratio),
    )


@triton.jit
def evaluate_log_ratio(s, t, log_ratio):
    """Return log p - log q."""
    gap = (t - log_ratio.t_shift) * log_ratio.scale - (s - log_ratio.s_shift)
    # A fused multiply-add, because the unrounded product cancels with high where p is close to q.
    return tl.fma(gap, log_ratio.unit, log_ratio.high) + log_ratio.low


@triton.jit
def _log_exp_sum(max, exp_sum):  # noqa: A002 (the glossary's name)
    """Return log(1 + exp_sum); log 0 for a row that is -inf throughout, and NaN for one that contains +inf or NaN."""
    value = tl.where(max < float("inf"), log1p(exp_sum), float("nan"))
    # If the label is excluded from a row that is otherwise -inf, its probability is 1. A NaN in exp_sum stays NaN.
    return tl.where(max == -float("inf"), exp_sum - float("inf"), value)


@triton.jit
def conclude(total, student, teacher, moments):
    """Return the Statistics of a row from the Partial of all its columns."""
    s_finite = finite_max(total.s_max)
    s_norm = Normalizer(s_finite, student.unit, _log_exp_sum(total.s_max, total.s_exp_sum))
    t_norm, s_norm_t1, t_norm_t1, phi, g, h = s_norm, s_norm, s_norm, 0.0, 0.0, 0.0
    log_ratio = LogRatio(0.0, 0.0, 1.0, student.unit, 0.0, 0.0)
    s_gradient, t_gradient, log_exp_sum_ratio = 0.0, 0.0, 0.0
    t_exp_sum, t_argmax = total.s_exp_sum, total.s_argmax
    t_at_s_argmax, s_at_t_argmax = total.s_max, total.s_max
    if student.unit_t1 is not None:
        s_log_t1 = _log_exp_sum(total.s_max, total.s_exp_sum_t1)
        s_norm_t1 = Normalizer(s_finite, student.unit_t1, s_log_t1)
    if teacher.unit is not None:
        t_exp_sum, t_argmax = total.t_exp_sum, total.t_argmax
        t_at_s_argmax, s_at_t_argmax = total.t_at_s_argmax, total.s_at_t_argmax
        t_finite = finite_max(total.t_max)
        t_norm = Normalizer(t_finite, teacher.unit, _log_exp_sum(total.t_max, t_exp_sum))
        t_norm_t1 = t_norm
        if teacher.unit_t1 is not None:
            t_log_t1 = _log_exp_sum(total.t_max, total.t_exp_sum_t1)
            t_norm_t1 = Normalizer(t_finite, teacher.unit_t1, t_log_t1)
        log_exp_sum_ratio = _log_exp_sum_ratio(total.s_exp_sum, t_exp_sum)
        log_ratio = _log_ratio_constants(s_norm, t_norm, log_exp_sum_ratio)
        if moments.forward is not None or moments.reverse is not None:
            phi, g, h, s_gradient, t_gradient = _closed_form(
                moments,
                total.p_moment,
                total.q_moment,
                Argmax(total.s_argmax, total.s_exp_sum, 0.0, 0.0, 0.0),
                Argmax(t_argmax, t_exp_sum, 0.0, 0.0, 0.0),
                (s_at_t_argmax - s_norm.max) * student.unit,
                (t_at_s_argmax - t_norm.max) * teacher.unit,
                log_exp_sum_ratio,
                tl.exp(log_probability(total.t_lost_max, t_norm)),
                tl.exp(log_probability(total.s_lost_max, s_norm)),
            )
            both = s_norm.log_exp_sum + t_norm.log_exp_sum
            phi = tl.where(both - both == 0.0, phi, float("nan"))
    entropy = s_norm.log_exp_sum - tl.div_rn(total.entropy_moment, 1.0 + total.s_exp_sum)
    entropy = tl.where(s_norm.log_exp_sum > -float("inf"), entropy, float("nan"))
    return Statistics(
        s_norm,
        t_norm,
        s_norm_t1,
        t_norm_t1,
        entropy,
        total.centered_sum,
        Argmax(total.s_argmax, total.s_exp_sum, total.s_max, t_at_s_argmax, s_gradient),
        Argmax(t_argmax, t_exp_sum, total.t_max, s_at_t_argmax, t_gradient),
        log_ratio,
        log_exp_sum_ratio,
        phi,
        g,
        h,
    )


@triton.jit
def no_statistics(s_unit):
    """Return the Statistics of a row whose first sweep is not needed."""
    s_norm = Normalizer(0.0, s_unit, 0.0)
    none = Argmax(tl.full([], -1.0, tl.float32), 0.0, 0.0, 0.0, 0.0)
    log_ratio = LogRatio(0.0, 0.0, 1.0, s_unit, 0.0, 0.0)
    return Statistics(
        s_norm, s_norm, s_norm, s_norm, 0.0, 0.0, none, none, log_ratio, 0.0, 0.0, 0.0, 0.0
    )


@triton.jit
def without_softmax(statistics, s_unit, t_unit):
    """Return Statistics for a divergence of logits: log q and log p are then the tempered logits themselves."""
    bare = no_statistics(s_unit)
    t_norm, log_ratio = bare.t_norm, bare.log_ratio
    if t_unit is not None:
        t_norm = Normalizer(0.0, t_unit, 0.0)
        log_ratio = LogRatio(0.0, 0.0, tl.div_rn(t_unit, s_unit), s_unit, 0.0, 0.0)
    return Statistics(
        bare.s_norm,
        t_norm,
        statistics.s_norm_t1,
        statistics.t_norm_t1,
        statistics.entropy,
        statistics.centered_sum,
        bare.s_argmax,
        bare.t_argmax,
        log_ratio,
        0.0,
        statistics.phi,
        statistics.g,
        statistics.h,
    )


@triton.jit
def with_sums(statistics, phi, g, h, s_gradient, t_gradient):
    """Return Statistics with these sums, and with these gradients of the argmaxes."""
    s, t = statistics.s_argmax, statistics.t_argmax
    return Statistics(
        statistics.s_norm,
        statistics.t_norm,
        statistics.s_norm_t1,
        statistics.t_norm_t1,
        statistics.entropy,
        statistics.centered_sum,
        Argmax(s.column, s.exp_sum, s.z, s.z_other, s_gradient),
        Argmax(t.column, t.exp_sum, t.z, t.z_other, t_gradient),
        statistics.log_ratio,
        statistics.log_exp_sum_ratio,
        phi,
        g,
        h,
    )


@triton.jit
def sweep_sums(student, teacher, statistics, excluded, degree, parameters, columns, spec):
    """Return the sums of phi, g and h of a divergence without a closed form; the argmaxes' columns are excluded.

    h is summed if the teacher's gradient is wanted. As degree * phi - g, its sum would cancel where p is far from q.
    """
    lanes = tl.arange(0, spec.BLOCK_V)
    phi_sum = fold(tl.zeros([spec.BLOCK_V], tl.float32), spec.ALIGNED)
    g_sum, h_sum = phi_sum, phi_sum
    s_argmax = statistics.s_argmax.column.to(tl.int32) - columns.first
    t_argmax = statistics.t_argmax.column.to(tl.int32) - columns.first
    first, last = _tile_range(columns.V, columns.split, spec.BLOCK_V)
    for tile in range(first, last):
        column = tile * spec.BLOCK_V + lanes
        s, _ = read(student, column, columns.V)
        t, _ = read(teacher, column, columns.V)
        s = _exclude(s, column, excluded)
        t = _exclude(t, column, excluded)
        log_q = log_probability(s, statistics.s_norm)
        log_p = log_probability(t, statistics.t_norm)
        ratio = evaluate_log_ratio(s, t, statistics.log_ratio)
        phi, g, h = evaluate(spec.DIVERGENCE, parameters, log_p, log_q, ratio, degree, spec.FORM)
        if spec.FORM % 2 == 1:
            is_argmax = (column == s_argmax) | (column == t_argmax)
            phi = tl.where(is_argmax, 0.0, phi)
            g = tl.where(is_argmax, 0.0, g)
            h = tl.where(is_argmax, 0.0, h)
        phi_sum += fold(phi, spec.ALIGNED)
        g_sum += fold(g, spec.ALIGNED)
        if teacher.side.width is not None:
            h_sum += fold(h, spec.ALIGNED)
    return tl.sum(phi_sum, 0), tl.sum(g_sum, 0), tl.sum(h_sum, 0)


@triton.jit
def add_argmaxes(phi, g, h, statistics, degree, parameters, spec):
    """Add the argmaxes to the sums of phi, g and h; return them, and the gradients of both sides at their argmaxes."""
    s_norm, t_norm = statistics.s_norm, statistics.t_norm
    s_argmax, t_argmax = statistics.s_argmax, statistics.t_argmax
    # Two lanes: the student's argmax and the teacher's.
    is_s = tl.arange(0, 2) == 0
    s = tl.where(is_s, s_argmax.z, t_argmax.z_other)
    t = tl.where(is_s, s_argmax.z_other, t_argmax.z)
    x_s = (s - s_norm.max) * s_norm.unit
    x_t = (t - t_norm.max) * t_norm.unit
    ratio = (x_t - x_s) + statistics.log_exp_sum_ratio
    log_q = x_s - s_norm.log_exp_sum
    log_p = x_t - t_norm.log_exp_sum
    phis, gs, hs = evaluate(spec.DIVERGENCE, parameters, log_p, log_q, ratio, degree, spec.FORM)
    g_s = tl.sum(tl.where(is_s, gs, 0.0), 0)
    h_s = tl.sum(tl.where(is_s, hs, 0.0), 0)
    g_t = tl.sum(tl.where(is_s, 0.0, gs), 0)
    h_t = tl.sum(tl.where(is_s, 0.0, hs), 0)
    phi_s = tl.sum(tl.where(is_s, phis, 0.0), 0)
    phi_t = tl.sum(tl.where(is_s, 0.0, phis), 0)
    differ = s_argmax.column != t_argmax.column
    g_others = tl.where(differ, g + g_t, g)
    h_others = tl.where(differ, h + h_s, h)
    s_gradient = tl.div_rn(g_s * s_argmax.exp_sum - g_others, 1.0 + s_argmax.exp_sum)
    t_gradient = tl.div_rn(h_t * t_argmax.exp_sum - h_others, 1.0 + t_argmax.exp_sum)
    phi += phi_s
    phi = tl.where(differ, phi + phi_t, phi)
    return phi, g_others + g_s, h_others + h_t, s_gradient, t_gradient


@triton.jit
def with_more(argmax, more):
    """Return an Argmax for a derivative whose sum over the other columns is larger by `more`."""
    gradient = argmax.gradient - tl.div_rn(more, 1.0 + argmax.exp_sum)
    return Argmax(argmax.column, argmax.exp_sum, argmax.z, argmax.z_other, gradient)


@triton.jit
def where_finite(argmax, phi):
    """Return an Argmax, or none if the divergence is infinite: sweep_gradients then finds the limit of the gradient."""
    finite = (phi - phi == 0.0) & (argmax.gradient - argmax.gradient == 0.0)
    column = tl.where(finite, argmax.column, -1.0)
    return Argmax(column, argmax.exp_sum, argmax.z, argmax.z_other, argmax.gradient)


@triton.jit
def _project(derivative, log_x, total, FORM: tl.constexpr):
    """Return a derivative with respect to tempered logits, from one with respect to log-probabilities."""
    if FORM % 2 == 1:
        derivative -= tl.exp(log_x) * total
    return derivative


@triton.jit
def _store(pointer, column, value, width):
    tl.store(pointer + column, value.to(pointer.dtype.element_ty), mask=column < width)


@triton.jit
def sweep_gradients(
    student,
    teacher,
    statistics,
    value,
    factors,
    label_column,
    excluded,
    degree,
    parameters,
    columns,
    spec,
):
    """Write the gradients, in reverse order, because caches still contain what the previous sweep read last."""
    V = columns.V
    lanes = tl.arange(0, spec.BLOCK_V)
    s_argmax = value.s_argmax.column.to(tl.int32) - columns.first
    t_argmax = value.t_argmax.column.to(tl.int32) - columns.first
    first, last = _tile_range(columns.width, columns.split, spec.BLOCK_V)
    for reverse in range(first, last):
        column = (first + last - 1 - reverse) * spec.BLOCK_V + lanes
        s, s_slope = read(student, column, V)
        gradient = tl.zeros([spec.BLOCK_V], tl.float32)
        if factors.distillation is not None:
            t, t_slope = read(teacher, column, V)
            s_others = _exclude(s, column, excluded)
            t_others = _exclude(t, column, excluded)
            log_q = log_probability(s_others, statistics.s_norm)
            log_p = log_probability(t_others, statistics.t_norm)
            ratio = evaluate_log_ratio(s_others, t_others, statistics.log_ratio)
            _, g, h = evaluate(spec.DIVERGENCE, parameters, log_p, log_q, ratio, degree, spec.FORM)
            gradient = _project(g, log_q, value.sums.g, spec.FORM)
            if spec.FORM % 2 == 1:
                gradient = tl.where(column == s_argmax, value.s_argmax.gradient, gradient)
            if excluded is not None:
                gradient = tl.where(column == excluded, value.label_sums.g, gradient)
            gradient *= factors.distillation
            if teacher.side.width is not None:
                h = _project(h, log_p, value.sums.h, spec.FORM)
                if spec.FORM % 2 == 1:
                    h = tl.where(column == t_argmax, value.t_argmax.gradient, h)
                if excluded is not None:
                    h = tl.where(column == excluded, value.label_sums.h, h)
                h = tl.where(column < V, h * t_slope * factors.teacher, 0.0)
                _store(teacher.gradient, column, h, teacher.side.width)
        if student.side.width is not None:
            if factors.cross_entropy is not None:
                target = tl.where(column == label_column, 1.0, 0.0)
                if factors.smoothing is not None:
                    target = (1.0 - factors.smoothing) * target
                    target += factors.smoothing / columns.vocabulary
                q_t1 = tl.exp(log_probability(s, value.s_norm_t1))
                gradient += (q_t1 - target) * factors.cross_entropy
            gradient = tl.where(column < V, gradient * s_slope, 0.0)
            _store(student.gradient, column, gradient, student.side.width)


@triton.jit
def sweep_zeros(pointer, width, split, BLOCK_V: tl.constexpr):
    """Write zeros: the gradient of a dropped row."""
    lanes = tl.arange(0, BLOCK_V)
    first, last = _tile_range(width, split, BLOCK_V)
    for tile in range(first, last):
        _store(pointer, tile * BLOCK_V + lanes, tl.zeros([BLOCK_V], tl.float32), width)
