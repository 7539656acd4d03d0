"""The sweeps over a row for its loss: statistics, and the sums of phi, g and h. ``gradient.py`` has the gradients.

All arithmetic is in float32. Each thread has accumulators for its own columns; they are merged once, at the end. A row
of 262144 columns therefore adds only a few hundred numbers in sequence.

``z`` is a logit after logit_scale and softcap, up to the positive factor ``Row.unit``. Differences of z are taken
before that factor multiplies them, so an offset common to a row costs no digits. Columns past the vocabulary read as
z = -inf on both sides, and the policy for log 0 gives them no contribution. If a divergence treats the label separately
(``label_term.py``), every sum except the sum of z excludes the label's column in the same way.

Names: ``s`` and ``t`` are z of the student and of the teacher; ``x_s`` and ``x_t`` are tempered, relative to the
maximum and in base 2, that is, times log2(e); ``e_s`` is 2^x_s and ``e_t`` 2^x_t. ``_t1`` means at temperature 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .skeleton import (
    LN2,
    LOWEST,
    NEGLIGIBLE,
    evaluate,
    exp2_of_scaled,
    exp_scaled,
    log1p,
    scaled,
    squash,
)


class Spec(NamedTuple):
    """What a kernel is compiled for; every field is a constexpr."""

    DIVERGENCE: Any  # from skeleton.bind
    FORM: Any  # from skeleton.form_of; odd for a divergence of probabilities
    SQUARED: Any  # whether the distillation term is multiplied by T^2
    ADJACENT: (
        Any  # adjacent columns that a thread loads at once; 1 if rows are not aligned to 16 bytes
    )
    THREADS: Any  # lanes of an accumulator: one per thread
    BLOCK_V: Any  # columns of a tile
    ONE_TILE: Any  # whether the tile holds the whole row (narrow.py)
    HEAD: Any  # whether rows start anywhere, and tiles at multiples of 16 bytes (Columns.head)
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
    # Columns by which the first tile starts before the row, so that every tile starts at a multiple of 16 bytes.
    head: Any


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
    measures: Any  # float32 [rows, measures.PARTIALS, ..]; None if no measures are wanted


# One program per row. Test a field for None, not the tuple (see Row).
NOT_SPLIT = Split(None, None, None, None, None, None, None)


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
    """Weights of the moments to collect, from fastkd.divergences.ClosedForm; None for 0, or without a closed form."""

    forward: Any  # None if cross is not None, because both use p_moment
    cross: Any
    reverse: Any


class Normalizer(NamedTuple):
    """log_softmax(unit * z) = unit * (z - max) - log_exp_sum; max is 0 if every z is -inf."""

    max: Any
    unit: Any
    log_exp_sum: Any
    share: Any  # e^-log_exp_sum, the probability of a column whose z is max


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

    A side's sums of exponentials and its moments exclude the column of that side's maximum. Moments are in base 2: x is
    a tempered logit relative to the maximum, times log2(e).
    """

    s_max: Any
    t_max: Any
    s_exp_sum: Any
    t_exp_sum: Any
    s_exp_sum_t1: Any
    p_moment: Any  # sum of e_t (x_t - x_s), or of -e_t x_s for a cross-entropy
    q_moment: Any  # sum of e_s (x_s - x_t)
    entropy_moment: Any  # sum of e_s x_s
    centered_sum: Any  # sum of z - center
    # The largest t where s = -inf, and the largest s where t = -inf; both -inf if no logit is -inf, else >= LOWEST.
    t_skipped_max: Any
    s_skipped_max: Any
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
    careful: Any  # whether some column is -inf on some side, so that the policy for log 0 applies
    phi: Any  # sum, from the closed form or from the second sweep
    g: Any  # sum, likewise
    h: Any  # sum, likewise; only if the teacher's gradient is wanted
    # Subtracted from (z - max) * unit to give a definition's log q: s_norm.log_exp_sum, or, for a cross-entropy, the
    # number that makes the mean of log q under p equal to 0 (_center_log_q)
    log_q_origin: Any


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


@triton.jit
def _tile_range(num_columns, num_splits, BLOCK_V: tl.constexpr, head=0):
    """Return this program's (first tile, tile after its last); the range is empty past the end of the row."""
    first, last = 0, tl.cdiv(num_columns + head, BLOCK_V)
    if num_splits is not None:
        tiles_per_program = tl.cdiv(last, num_splits)
        first = tl.program_id(1) * tiles_per_program
        last = tl.minimum(first + tiles_per_program, last)
    return first, last


@triton.jit
def count_columns(V, split, BLOCK_V: tl.constexpr):
    """Return the number of columns that this program processes."""
    first, last = _tile_range(V, split.num_splits, BLOCK_V)
    return tl.maximum(tl.minimum(last * BLOCK_V, V) - first * BLOCK_V, 0)


@triton.jit
def _temper(z, side, valid, VALUE: tl.constexpr = -float("inf")):
    """Return (z, derivative of z with respect to logit_scale * logits) from logits; z is VALUE where not valid."""
    slope = 1.0
    if side.softcap is not None:
        squashed, slope = squash(side.softcap_gain * z)
        z = tl.where(valid, side.softcap * squashed, VALUE)
    elif side.sign is not None:
        z = tl.where(valid, side.sign * z, VALUE)
    return z, slope


@triton.jit
def exist(column, V, HEAD: tl.constexpr):
    """Return whether these columns exist. HEAD: they may be negative."""
    exists = column < V
    if HEAD:
        exists = exists & (column >= 0)
    return exists


@triton.jit
def read(row, column, V, HEAD: tl.constexpr = False):
    """Return (z, derivative of z with respect to logit_scale * logits) of these columns of a row."""
    exists = exist(column, V, HEAD)
    z = tl.load(row.logits + column, mask=exists, other=-float("inf")).to(tl.float32)
    return _temper(z, row.side, exists)


@triton.jit
def _tile_address(pointer, start, HEAD: tl.constexpr):
    """Return the address of a tile's first column."""
    pointer += start
    if HEAD:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


# An address in a sweep is the tile's first column plus a constant per lane, so that load instructions add the constant.
@triton.jit
def _read_tile(row, start, lanes, V, WHOLE: tl.constexpr, HEAD: tl.constexpr):
    """Return what `read` returns for a tile. WHOLE: all its columns exist, and no mask is needed."""
    if WHOLE:
        z = tl.load(_tile_address(row.logits, start, HEAD) + lanes).to(tl.float32)
        z, slope = _temper(z, row.side, lanes >= 0)
    else:
        exists = exist(start + lanes, V, HEAD)
        address = _tile_address(row.logits, start, HEAD) + lanes
        z = tl.load(address, mask=exists, other=-float("inf")).to(tl.float32)
        z, slope = _temper(z, row.side, exists)
    return z, slope


# Columns past the end of a row read as this number in the first sweep. It is finite, so that the sweep can tell them
# from a logit of -inf, and so low that its exponential is 0 beside that of any other column.
PAST_END = -1e30


@triton.jit
def _load_pair(
    student, teacher, start, lanes, V, WHOLE: tl.constexpr, HEAD: tl.constexpr,
    PAST_END: tl.constexpr = PAST_END,
):  # fmt: skip
    """Return a tile of logits of both sides in float32, or the student's twice if there is no teacher."""
    s_address = _tile_address(student.logits, start, HEAD) + lanes
    if WHOLE:
        s = tl.load(s_address)
        t = s
        if teacher.unit is not None:
            t = tl.load(_tile_address(teacher.logits, start, HEAD) + lanes)
        s, t = s.to(tl.float32), t.to(tl.float32)
    else:
        exists = exist(start + lanes, V, HEAD)
        s = tl.load(s_address, mask=exists, other=0.0)
        t = s
        if teacher.unit is not None:
            t_address = _tile_address(teacher.logits, start, HEAD) + lanes
            t = tl.load(t_address, mask=exists, other=0.0)
        # Convert first: in float16, PAST_END would be -inf, and the whole row would need the policy for log 0.
        s = tl.where(exists, s.to(tl.float32), PAST_END)
        t = tl.where(exists, t.to(tl.float32), PAST_END)
    return s, t


@triton.jit
def _exclude(z, column, excluded, VALUE: tl.constexpr = -float("inf")):
    """Replace z by VALUE in the excluded column. A NaN there stays, and poisons the row as in any other column."""
    if excluded is not None:
        z = tl.where((column == excluded) & (z == z), VALUE, z)
    return z


@triton.jit
def log_probability(z, normalizer):
    """Return log_softmax of the tempered logits."""
    return (z - normalizer.max) * normalizer.unit - normalizer.log_exp_sum


# An accumulator has one lane for each thread, which holds the maximum or the sum of the thread's own columns. Its
# update therefore moves no data between threads: a sweep has no barrier and no shuffle. If rows are aligned, a thread
# loads 16 bytes, the ADJACENT columns, at a time. A tile is [.., THREADS, ADJACENT], and the columns of a thread are
# those of one lane in the second dimension.
@triton.jit
def _by_thread(tile, ADJACENT: tl.constexpr, THREADS: tl.constexpr):
    return tl.reshape(tile, [tile.shape[0] // (THREADS * ADJACENT), THREADS, ADJACENT])


@triton.jit
def fold(tile, ADJACENT: tl.constexpr, THREADS: tl.constexpr):
    """Add the columns of each thread."""
    return tl.sum(tl.sum(_by_thread(tile, ADJACENT, THREADS), 2), 0)


@triton.jit
def fold_max(tile, ADJACENT: tl.constexpr, THREADS: tl.constexpr):
    """Return the maximum of the columns of each thread."""
    return tl.max(tl.max(_by_thread(tile, ADJACENT, THREADS), 2), 0)


@triton.jit
def fold_min(tile, ADJACENT: tl.constexpr, THREADS: tl.constexpr):
    """Return the minimum of the columns of each thread."""
    return tl.min(tl.min(_by_thread(tile, ADJACENT, THREADS), 2), 0)


@triton.jit
def spread(lanes, ADJACENT: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return a tile in which every column has the value of its thread's lane."""
    groups: tl.constexpr = BLOCK_V // (lanes.shape[0] * ADJACENT)
    tile = tl.broadcast_to(lanes[None, :, None], [groups, lanes.shape[0], ADJACENT])
    return tl.reshape(tile, [BLOCK_V])


@triton.jit
def _sum_tile(tile, spec):
    return fold(tile, spec.ADJACENT, spec.THREADS)


@triton.jit
def finite_max(max):  # noqa: A002 (the glossary's name)
    """Return the running maximum, or 0 while every z so far is -inf."""
    return tl.where(max == -float("inf"), 0.0, max)


@triton.jit
def rescale_moment(moment, shift, exp_sum, factor):
    """Return a moment relative to the new maximum; 0 if the factor is 0, even if the shift is infinite."""
    return tl.where(factor == 0.0, 0.0, factor * (moment + shift * exp_sum))


@triton.jit
def rescale_sum(exp_sum, rise, factor):
    """Return a sum of exponentials relative to a new maximum, which lies `rise` above the old one.

    At a rise of 0 the factor is 1, so tl.where changes no value. Without it, the compiler fuses the product with the
    first addition of tl.sum, and the lanes of a warp hold sums that differ in the last bit.
    """
    return tl.where(rise == 0.0, exp_sum, factor * exp_sum)


@triton.jit
def _p_step(moments, s_step, t_step):
    """Return what a rise of the maxima adds to x_t - x_s, or to -x_s for a cross-entropy."""
    if moments.cross is not None:
        return s_step
    else:
        return s_step - t_step


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
    p_skipped,
    q_skipped,
    NEGLIGIBLE: tl.constexpr = NEGLIGIBLE,
    LN2: tl.constexpr = LN2,
):
    """Return (sums of phi, g and h, student's gradient at its argmax, teacher's at its own), from the moments.

    s_gap: the student's x at the teacher's argmax, in base 2 like the moments; t_gap the reverse.
    p_skipped, q_skipped: the largest probability of a side where the other side's z is -inf.
    """
    s_exp_sum = 1.0 + s_argmax.exp_sum
    t_exp_sum = 1.0 + t_argmax.exp_sum
    # If both sides are nearly certain of one column, q - p of it is computed as p - q of the other columns together.
    sure = (
        (s_argmax.column == t_argmax.column) & (s_argmax.exp_sum < 1.0) & (t_argmax.exp_sum < 1.0)
    )
    phi = 0.0
    g = 0.0
    h = 0.0
    s_gradient = 0.0
    t_gradient = 0.0
    q_others = tl.div_rn(s_argmax.exp_sum, s_exp_sum)  # probability of all columns but the argmax
    p_others = tl.div_rn(t_argmax.exp_sum, t_exp_sum)
    if moments.forward is not None or moments.cross is not None:
        mean = tl.div_rn((p_moment - s_gap) * LN2, t_exp_sum)
        if moments.cross is not None:
            weight = moments.cross
            mean += log1p(s_argmax.exp_sum)
        else:
            weight = moments.forward
            mean += log_exp_sum_ratio
        phi += weight * mean
        phi += tl.where(p_skipped >= NEGLIGIBLE, float("inf"), 0.0)
        g -= weight
        h += phi + weight
        p_at_s_argmax = tl.div_rn(tl.exp2(t_gap), t_exp_sum)
        difference = tl.where(sure, p_others - q_others, tl.div_rn(1.0, s_exp_sum) - p_at_s_argmax)
        s_gradient += weight * difference
        # A gap of -inf makes phi infinite, and where_finite discards these gradients.
        gap = tl.where(s_gap == -float("inf"), 0.0, s_gap)
        others = gap * p_others + tl.div_rn(p_moment, t_exp_sum)
        t_gradient -= tl.div_rn(weight * LN2 * others, t_exp_sum)
    if moments.reverse is not None:
        reverse = tl.div_rn((q_moment - t_gap) * LN2, s_exp_sum) - log_exp_sum_ratio
        reverse += tl.where(q_skipped >= NEGLIGIBLE, float("inf"), 0.0)
        phi += moments.reverse * reverse
        g += moments.reverse * (reverse + 1.0)
        h -= moments.reverse
        q_at_t_argmax = tl.div_rn(tl.exp2(s_gap), s_exp_sum)
        gap = tl.where(t_gap == -float("inf"), 0.0, t_gap)
        mean = tl.div_rn(gap * q_others + tl.div_rn(q_moment, s_exp_sum), s_exp_sum)
        s_gradient -= moments.reverse * LN2 * mean
        difference = tl.where(sure, q_others - p_others, tl.div_rn(1.0, t_exp_sum) - q_at_t_argmax)
        t_gradient += moments.reverse * difference
    return phi, g, h, s_gradient, t_gradient


@triton.jit
def _center_log_q(moments, total, s_gap, log_exp_sum, phi, h, LN2: tl.constexpr = LN2):
    """Return (Statistics.log_q_origin, sum of h) of a cross-entropy.

    The teacher's gradient is -p (log q - mean), where mean is that of log q under p. As p log q - p mean, both products
    would be rounded before they cancel. Log q is therefore taken relative to its mean; the sum of h is then exactly the
    weight of the cross-entropy. s_gap: the student's x at the teacher's argmax, in base 2.
    """
    mean = tl.div_rn((s_gap - total.p_moment) * LN2, 1.0 + total.t_exp_sum)
    finite = phi - phi == 0.0
    return tl.where(finite, mean, log_exp_sum), tl.where(finite, moments.cross, h)


@triton.jit
def _add_lanes(partials, s_rise, t_rise, student, teacher, moments):
    """Return the sums of partial results relative to the maximum of all of them: a Partial without maxima and argmaxes.

    A rise is how far that maximum lies above a partial result's own, in z. Sums of exponentials are divided by the
    exponential of the rise. A moment is a sum of e x in which x is relative to the maximum too, so it also changes by
    the step times the sum of e.
    """
    s_step, t_step = scaled(s_rise, student.unit), 0.0
    EXACT: tl.constexpr = moments.cross is not None
    s_factor = exp2_of_scaled(-s_step, -s_rise, student.unit, EXACT)
    s_exp_sum, s_exp_sum_t1 = partials.s_exp_sum, partials.s_exp_sum_t1
    t_exp_sum, t_exp_sum_t1 = partials.t_exp_sum, partials.t_exp_sum_t1
    p_moment, q_moment = partials.p_moment, partials.q_moment
    if teacher.unit is not None:
        t_step = scaled(t_rise, teacher.unit)
        t_factor = exp2_of_scaled(-t_step, -t_rise, teacher.unit, EXACT)
        if moments.reverse is not None:
            q_moment = rescale_moment(q_moment, t_step - s_step, s_exp_sum, s_factor)
        if moments.forward is not None or moments.cross is not None:
            p_step = _p_step(moments, s_step, t_step)
            p_moment = rescale_moment(p_moment, p_step, t_exp_sum, t_factor)
        t_exp_sum = rescale_sum(t_exp_sum, t_rise, t_factor)
        if teacher.unit_t1 is not None:
            t_factor_t1 = exp_scaled(-t_rise, teacher.unit_t1)
            t_exp_sum_t1 = rescale_sum(t_exp_sum_t1, t_rise, t_factor_t1)
    entropy_moment = rescale_moment(partials.entropy_moment, -s_step, s_exp_sum, s_factor)
    s_exp_sum = rescale_sum(s_exp_sum, s_rise, s_factor)
    if student.unit_t1 is not None:
        s_factor_t1 = exp_scaled(-s_rise, student.unit_t1)
        s_exp_sum_t1 = rescale_sum(s_exp_sum_t1, s_rise, s_factor_t1)
    lowest: tl.constexpr = -float("inf")
    return Partial(
        lowest,
        lowest,
        tl.sum(s_exp_sum, 0),
        tl.sum(t_exp_sum, 0),
        tl.sum(s_exp_sum_t1, 0),
        tl.sum(p_moment, 0),
        tl.sum(q_moment, 0),
        tl.sum(entropy_moment, 0),
        tl.sum(partials.centered_sum, 0),
        lowest,
        lowest,
        -1.0,
        lowest,
        -1.0,
        lowest,
        tl.sum(t_exp_sum_t1, 0),
    )


class Lane(NamedTuple):
    """Sums over the columns of the lane that has a side's maximum, without the column of the maximum."""

    max: Any
    argmax: Any  # -1 if every z is -inf
    other_z: Any  # the other side's z there
    exp_sum: Any
    exp_sum_t1: Any
    entropy_moment: Any
    moment: Any


@triton.jit
def _lane_columns(lane, chunk, first, head, spec):
    """Return the THREADS columns of chunk number `chunk` of a lane. `head` is Columns.head."""
    index = chunk * spec.THREADS + tl.arange(0, spec.THREADS)
    group = index // spec.ADJACENT * spec.THREADS + lane
    return first * spec.BLOCK_V - head + group * spec.ADJACENT + index % spec.ADJACENT


@triton.jit
def _read_included(row, column, excluded, V, HEAD: tl.constexpr):
    z, _ = read(row, column, V, HEAD)
    return _exclude(z, column, excluded)


@triton.jit
def _sum_lane(
    maxima, row, other, other_max, excluded, CROSS: tl.constexpr, MOMENT: tl.constexpr,
    ENTROPY: tl.constexpr, EXACT: tl.constexpr, columns, spec,
):  # fmt: skip
    """Return (the lane that has a side's maximum, its Lane). other_max: the other side's maximum.

    A sweep adds every column to the sums of its lane. In the lane of the maximum, the maximum adds 1, beside which
    smaller exponentials are rounded away, so this lane is read a second time.
    """
    threads = tl.arange(0, spec.THREADS)
    lane = tl.min(tl.where(maxima == tl.max(maxima, 0), threads, spec.THREADS - 1), 0)
    first, last = _tile_range(columns.V, columns.split.num_splits, spec.BLOCK_V, columns.head)
    V = tl.minimum(columns.V, last * spec.BLOCK_V - columns.head)
    # One iteration, unless a program has more tiles than THREADS^2 / BLOCK_V.
    end = first + tl.cdiv((last - first) * (spec.BLOCK_V // spec.THREADS), spec.THREADS)
    lane_max = tl.full([], -float("inf"), tl.float32)
    argmax = tl.full([], -1, tl.int32)
    for chunk in range(first, end):
        column = _lane_columns(lane, chunk - first, first, columns.head, spec)
        z = _read_included(row, column, excluded, V, spec.HEAD)
        chunk_max = tl.max(z, 0)
        if chunk_max > lane_max:
            lane_max = chunk_max
            argmax = tl.min(tl.where(z == chunk_max, column, 2147483647), 0)
    finite = finite_max(lane_max)
    zero = tl.zeros([spec.THREADS], tl.float32)
    exp_sum, exp_sum_t1, entropy_moment, moment = zero, zero, zero, zero
    for chunk in range(first, end):
        column = _lane_columns(lane, chunk - first, first, columns.head, spec)
        z = _read_included(row, column, excluded, V, spec.HEAD)
        x = scaled(z - finite, row.unit)
        e = exp2_of_scaled(x, z - finite, row.unit, EXACT)
        e = tl.where(column == argmax, 0.0, e)
        exp_sum += e
        if row.unit_t1 is not None:
            e_t1 = exp_scaled(z - finite, row.unit_t1)
            exp_sum_t1 += tl.where(column == argmax, 0.0, e_t1)
        if ENTROPY:
            entropy_moment += tl.where(x == -float("inf"), 0.0, e * x)
        if MOMENT:
            other_z = _read_included(other, column, excluded, V, spec.HEAD)
            other_x = scaled(other_z - other_max, other.unit)
            gone = (x == -float("inf")) | (other_x == -float("inf"))
            x = -other_x if CROSS else x - other_x
            moment += tl.where(gone, 0.0, e * x)
    other_z = lane_max
    if other.unit is not None:
        other_z = _z_at(other, argmax, V)
    return lane, Lane(
        lane_max,
        argmax,
        other_z,
        tl.sum(exp_sum, 0),
        tl.sum(exp_sum_t1, 0),
        tl.sum(entropy_moment, 0),
        tl.sum(moment, 0),
    )


@triton.jit
def _z_at(row, column, V):
    """Return z of one column; -inf if the column is negative."""
    z, _ = read(row, tl.maximum(column, 0), V)
    return tl.where(column < 0, -float("inf"), z)


@triton.jit
def _sweep_skipped(student, teacher, s, t, excluded, moments, columns, spec):
    """Return (p_moment, q_moment, t_skipped_max, s_skipped_max) of a row in which one side alone is -inf somewhere.

    The moments leave out such columns. The largest z of the other side in them decides later whether the divergence is
    infinite. s and t are the Lanes of the maxima.
    """
    lanes = tl.arange(0, spec.BLOCK_V)
    zero = _sum_tile(tl.zeros([spec.BLOCK_V], tl.float32), spec)
    p_moment, q_moment = zero, zero
    t_skipped_max, s_skipped_max = zero - float("inf"), zero - float("inf")
    s_max, t_max = finite_max(s.max), finite_max(t.max)
    first, last = _tile_range(columns.V, columns.split.num_splits, spec.BLOCK_V, columns.head)
    for tile in range(first, last):
        column = tile * spec.BLOCK_V - columns.head + lanes
        z_s = _read_included(student, column, excluded, columns.V, spec.HEAD)
        z_t = _read_included(teacher, column, excluded, columns.V, spec.HEAD)
        x_s, x_t = scaled(z_s - s_max, student.unit), scaled(z_t - t_max, teacher.unit)
        # x decides, not z: at a temperature below 1, a finite z can be so low that x is -inf.
        s_gone, t_gone = x_s == -float("inf"), x_t == -float("inf")
        if moments.forward is not None or moments.cross is not None:
            x = -x_s if moments.cross is not None else x_t - x_s
            skipped = s_gone | t_gone | (column == t.argmax)
            p_moment += _sum_tile(tl.where(skipped, 0.0, tl.exp2(x_t) * x), spec)
            skipped_t = tl.where(s_gone, z_t, -float("inf"))
            t_skipped_max = tl.maximum(
                t_skipped_max, fold_max(skipped_t, spec.ADJACENT, spec.THREADS)
            )
        if moments.reverse is not None:
            skipped = s_gone | t_gone | (column == s.argmax)
            q_moment += _sum_tile(tl.where(skipped, 0.0, tl.exp2(x_s) * (x_s - x_t)), spec)
            skipped_s = tl.where(t_gone, z_s, -float("inf"))
            s_skipped_max = tl.maximum(
                s_skipped_max, fold_max(skipped_s, spec.ADJACENT, spec.THREADS)
            )
    return (
        tl.sum(p_moment, 0),
        tl.sum(q_moment, 0),
        tl.max(t_skipped_max, 0),
        tl.max(s_skipped_max, 0),
    )


@triton.jit
def sweep_statistics(
    student,
    teacher,
    excluded,
    center,
    moments,
    columns,
    ENTROPY: tl.constexpr,
    spec,
    LOWEST: tl.constexpr = LOWEST,
    PAST_END: tl.constexpr = PAST_END,
):
    """Return a Partial: the online softmax of both sides, with the moments that are asked for.

    Each lane has running maxima, and sums relative to them. excluded None: sums are over all columns. center None: no
    sum of z.
    """
    lanes = tl.arange(0, spec.BLOCK_V)
    zero = _sum_tile(tl.zeros([spec.BLOCK_V], tl.float32), spec)
    # A finite start, so that no difference of maxima is infinite minus infinite.
    s_max, t_max = zero + LOWEST, zero + LOWEST
    s_exp_sum, t_exp_sum, s_exp_sum_t1, t_exp_sum_t1 = zero, zero, zero, zero
    p_moment, q_moment, entropy_moment, centered_sum, finite = zero, zero, zero, zero, zero
    EXACT: tl.constexpr = moments.cross is not None
    V = columns.V
    first, last = _tile_range(V, columns.split.num_splits, spec.BLOCK_V, columns.head)
    for tile in range(first, last):
        start = tile * spec.BLOCK_V - columns.head
        column = start + lanes
        # Both loads come before the first use of either. Only the last tile needs masks.
        exists = exist(column, V, spec.HEAD)
        whole = start + spec.BLOCK_V <= V
        if spec.HEAD:
            whole = whole & (start >= 0)
        if whole:
            z, t = _load_pair(student, teacher, start, lanes, V, True, spec.HEAD)
        else:
            z, t = _load_pair(student, teacher, start, lanes, V, False, spec.HEAD)
        z, _ = _temper(z, student.side, exists, PAST_END)
        s = _exclude(z, column, excluded, PAST_END)
        if teacher.unit is not None:
            t, _ = _temper(t, teacher.side, exists, PAST_END)
            t = _exclude(t, column, excluded, PAST_END)
        old_s_max, s_max = s_max, tl.maximum(s_max, fold_max(s, spec.ADJACENT, spec.THREADS))
        s = s - spread(s_max, spec.ADJACENT, spec.BLOCK_V)
        s_step = scaled(s_max - old_s_max, student.unit)
        s_factor = exp2_of_scaled(-s_step, old_s_max - s_max, student.unit, EXACT)
        x_s = scaled(s, student.unit)
        e_s = exp2_of_scaled(x_s, s, student.unit, EXACT)
        if ENTROPY:
            term = _sum_tile(e_s * tl.maximum(x_s, LOWEST), spec)
            entropy_moment = rescale_moment(entropy_moment, -s_step, s_exp_sum, s_factor) + term
        if student.unit_t1 is not None:
            s_exp_sum_t1 *= exp_scaled(old_s_max - s_max, student.unit_t1)
            s_exp_sum_t1 += _sum_tile(exp_scaled(s, student.unit_t1), spec)
        if center is not None:
            centered_sum += _sum_tile(tl.where(exists, z - center, 0.0), spec)
        if teacher.unit is not None:
            old_t_max, t_max = t_max, tl.maximum(t_max, fold_max(t, spec.ADJACENT, spec.THREADS))
            t = t - spread(t_max, spec.ADJACENT, spec.BLOCK_V)
            t_step = scaled(t_max - old_t_max, teacher.unit)
            t_factor = exp2_of_scaled(-t_step, old_t_max - t_max, teacher.unit, EXACT)
            x_t = scaled(t, teacher.unit)
            e_t = exp2_of_scaled(x_t, t, teacher.unit, EXACT)
            x = x_t - x_s
            finite += _sum_tile(x, spec)  # stays finite if no logit is -inf
            # Where e is 0 because its side is -inf, LOWEST replaces a difference of -inf or NaN. Where the other side
            # alone is -inf, the moment becomes infinite or NaN, and _sweep_skipped computes it instead.
            if moments.forward is not None or moments.cross is not None:
                p_step = _p_step(moments, s_step, t_step)
                p_moment = rescale_moment(p_moment, p_step, t_exp_sum, t_factor)
                if moments.cross is not None:
                    x = tl.where(x_t == -float("inf"), LOWEST, -x_s)
                p_moment += _sum_tile(e_t * tl.maximum(x, LOWEST), spec)
            if moments.reverse is not None:
                q_moment = rescale_moment(q_moment, t_step - s_step, s_exp_sum, s_factor)
                q_moment += _sum_tile(e_s * tl.maximum(x_s - x_t, LOWEST), spec)
            t_exp_sum = t_factor * t_exp_sum + _sum_tile(e_t, spec)
            if teacher.unit_t1 is not None:
                t_exp_sum_t1 *= exp_scaled(old_t_max - t_max, teacher.unit_t1)
                t_exp_sum_t1 += _sum_tile(exp_scaled(t, teacher.unit_t1), spec)
        s_exp_sum = s_factor * s_exp_sum + _sum_tile(e_s, spec)
    sums = (
        s_exp_sum, t_exp_sum, s_exp_sum_t1, t_exp_sum_t1, p_moment, q_moment, entropy_moment,
        centered_sum,
    )  # fmt: skip
    return _conclude_lanes(
        s_max, t_max, sums, tl.sum(finite, 0), student, teacher, excluded, moments, columns,
        ENTROPY, spec,
    )  # fmt: skip


@triton.jit
def _conclude_lanes(
    s_max, t_max, sums, finite, student, teacher, excluded, moments, columns, ENTROPY: tl.constexpr,
    spec, LOWEST: tl.constexpr = LOWEST,
):  # fmt: skip
    """Return a Partial from the lanes of the accumulators. finite: a finite number if no logit is -inf."""
    lowest: tl.constexpr = -float("inf")
    (
        s_exp_sum, t_exp_sum, s_exp_sum_t1, t_exp_sum_t1, p_moment, q_moment, entropy_moment,
        centered_sum,
    ) = sums  # fmt: skip
    s_top, t_top = tl.max(s_max, 0), tl.max(t_max, 0)
    P_MOMENT: tl.constexpr = moments.forward is not None or moments.cross is not None
    CROSS: tl.constexpr = moments.cross is not None
    Q_MOMENT: tl.constexpr = moments.reverse is not None
    s_lane, s = _sum_lane(
        s_max, student, teacher, t_top, excluded, False, Q_MOMENT, ENTROPY, CROSS, columns, spec
    )
    t_lane, t = s_lane, s
    if teacher.unit is not None:
        t_lane, t = _sum_lane(
            t_max, teacher, student, s_top, excluded, CROSS, P_MOMENT, False, CROSS, columns, spec
        )
    # NaN or infinite if one side alone is -inf somewhere.
    moment_size = tl.sum(tl.abs(p_moment) + tl.abs(q_moment), 0)
    threads = tl.arange(0, spec.THREADS)
    of_s, of_t = threads == s_lane, threads == t_lane
    partials = Partial(
        s_max,
        t_max,
        tl.where(of_s, 0.0, s_exp_sum),
        tl.where(of_t, 0.0, t_exp_sum),
        tl.where(of_s, 0.0, s_exp_sum_t1),
        tl.where(of_t, 0.0, p_moment),
        tl.where(of_s, 0.0, q_moment),
        tl.where(of_s, 0.0, entropy_moment),
        centered_sum,
        lowest,
        lowest,
        -1.0,
        lowest,
        -1.0,
        lowest,
        tl.where(of_t, 0.0, t_exp_sum_t1),
    )
    others = _add_lanes(
        partials, finite_max(s.max) - s_max, finite_max(t.max) - t_max, student, teacher, moments
    )
    p_total, q_total = others.p_moment + t.moment, others.q_moment + s.moment
    t_skipped_max = tl.where(finite - finite == 0.0, -float("inf"), LOWEST)
    s_skipped_max = t_skipped_max
    if P_MOMENT or Q_MOMENT:  # noqa: SIM102
        if moment_size - moment_size != 0.0:
            p_total, q_total, t_skipped, s_skipped = _sweep_skipped(
                student, teacher, s, t, excluded, moments, columns, spec
            )
            t_skipped_max = tl.maximum(t_skipped_max, t_skipped)
            s_skipped_max = tl.maximum(s_skipped_max, s_skipped)
    s_argmax, t_argmax = s.argmax, t.argmax
    if columns.shard is not None:
        s_argmax = tl.where(s_argmax < 0, -1, s_argmax + columns.first)
        t_argmax = tl.where(t_argmax < 0, -1, t_argmax + columns.first)
    return Partial(
        s.max,
        t.max,
        others.s_exp_sum + s.exp_sum,
        others.t_exp_sum + t.exp_sum,
        others.s_exp_sum_t1 + s.exp_sum_t1,
        p_total,
        q_total,
        others.entropy_moment + s.entropy_moment,
        others.centered_sum,
        t_skipped_max,
        s_skipped_max,
        s_argmax.to(tl.float32),
        s.other_z,
        t_argmax.to(tl.float32),
        t.other_z,
        others.t_exp_sum_t1 + t.exp_sum_t1,
    )


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
def _add_argmax_to_moment(moment, extra, other_z, other_max, other):
    """Return a moment with the terms of the argmaxes that become ordinary columns; their x is 0, and their e 1."""
    gap = scaled(other_z - finite_max(other_max), other.unit)
    return moment - tl.where((extra == 0.0) | (gap == -float("inf")), 0.0, gap)


@triton.jit
def merge_partials(partials, student, teacher, moments):
    """Return one Partial of a row from its partials, one per lane. A lane without tiles has the maximum -inf."""
    s_max = tl.max(partials.s_max, 0)
    t_max = tl.max(partials.t_max, 0)
    s_eligible, s_argmax, s_extra = _merge_argmax(partials.s_max, s_max, partials.s_argmax)
    s_exp_sum, s_exp_sum_t1 = partials.s_exp_sum + s_extra, partials.s_exp_sum_t1 + s_extra
    t_exp_sum, t_exp_sum_t1 = partials.t_exp_sum, partials.t_exp_sum_t1
    p_moment, q_moment = partials.p_moment, partials.q_moment
    t_at_s_argmax, t_argmax, s_at_t_argmax = s_max, s_argmax, s_max
    if teacher.unit is not None:
        t_eligible, t_argmax, t_extra = _merge_argmax(partials.t_max, t_max, partials.t_argmax)
        t_exp_sum, t_exp_sum_t1 = t_exp_sum + t_extra, t_exp_sum_t1 + t_extra
        t_at_s_argmax = _select(partials.t_at_s_argmax, s_eligible, partials.s_argmax, s_argmax)
        s_at_t_argmax = _select(partials.s_at_t_argmax, t_eligible, partials.t_argmax, t_argmax)
        if moments.forward is not None or moments.cross is not None:
            p_moment = _add_argmax_to_moment(
                p_moment, t_extra, partials.s_at_t_argmax, partials.s_max, student
            )
        if moments.reverse is not None:
            q_moment = _add_argmax_to_moment(
                q_moment, s_extra, partials.t_at_s_argmax, partials.t_max, teacher
            )
    amended = Partial(
        partials.s_max,
        partials.t_max,
        s_exp_sum,
        t_exp_sum,
        s_exp_sum_t1,
        p_moment,
        q_moment,
        partials.entropy_moment,
        partials.centered_sum,
        partials.t_skipped_max,
        partials.s_skipped_max,
        partials.s_argmax,
        partials.t_at_s_argmax,
        partials.t_argmax,
        partials.s_at_t_argmax,
        t_exp_sum_t1,
    )
    s_rise, t_rise = finite_max(s_max) - partials.s_max, finite_max(t_max) - partials.t_max
    total = _add_lanes(amended, s_rise, t_rise, student, teacher, moments)
    return Partial(
        s_max,
        t_max,
        total.s_exp_sum,
        total.t_exp_sum,
        total.s_exp_sum_t1,
        total.p_moment,
        total.q_moment,
        total.entropy_moment,
        total.centered_sum,
        tl.max(partials.t_skipped_max, 0),
        tl.max(partials.s_skipped_max, 0),
        s_argmax,
        t_at_s_argmax,
        t_argmax,
        s_at_t_argmax,
        total.t_exp_sum_t1,
    )


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
def _normalizer(max, unit, exp_sum):  # noqa: A002 (the glossary's name)
    log_exp_sum = _log_exp_sum(max, exp_sum)
    # A row whose sum is not finite, or that is -inf throughout, gets the share that makes its probabilities NaN.
    share = tl.where(
        tl.abs(log_exp_sum) < float("inf"), tl.div_rn(1.0, 1.0 + exp_sum), -log_exp_sum
    )
    return Normalizer(finite_max(max), unit, log_exp_sum, share)


@triton.jit
def probability(z, normalizer):
    """Return softmax of the tempered logits."""
    return exp_scaled(z - normalizer.max, normalizer.unit) * normalizer.share


@triton.jit
def _exact_probability(z, normalizer):
    """Return `probability`, corrected for the rounding error of the exponent."""
    distance = z - normalizer.max
    x = scaled(distance, normalizer.unit)
    return exp2_of_scaled(x, distance, normalizer.unit, True) * normalizer.share


@triton.jit
def conclude(total, student, teacher, moments, LN2: tl.constexpr = LN2):
    """Return the Statistics of a row from the Partial of all its columns."""
    P_MOMENT: tl.constexpr = moments.forward is not None or moments.cross is not None
    CLOSED_FORM: tl.constexpr = P_MOMENT or moments.reverse is not None
    s_norm = _normalizer(total.s_max, student.unit, total.s_exp_sum)
    t_norm, s_norm_t1, t_norm_t1, phi, g, h = s_norm, s_norm, s_norm, 0.0, 0.0, 0.0
    log_ratio = LogRatio(0.0, 0.0, 1.0, student.unit, 0.0, 0.0)
    s_gradient, t_gradient, log_exp_sum_ratio = 0.0, 0.0, 0.0
    log_q_origin = s_norm.log_exp_sum
    t_exp_sum, t_argmax = total.s_exp_sum, total.s_argmax
    t_at_s_argmax, s_at_t_argmax = total.s_max, total.s_max
    if student.unit_t1 is not None:
        s_norm_t1 = _normalizer(total.s_max, student.unit_t1, total.s_exp_sum_t1)
    if teacher.unit is not None:
        t_exp_sum, t_argmax = total.t_exp_sum, total.t_argmax
        t_at_s_argmax, s_at_t_argmax = total.t_at_s_argmax, total.s_at_t_argmax
        t_norm = _normalizer(total.t_max, teacher.unit, t_exp_sum)
        t_norm_t1 = t_norm
        if teacher.unit_t1 is not None:
            t_norm_t1 = _normalizer(total.t_max, teacher.unit_t1, total.t_exp_sum_t1)
        log_exp_sum_ratio = _log_exp_sum_ratio(total.s_exp_sum, t_exp_sum)
        log_ratio = _log_ratio_constants(s_norm, t_norm, log_exp_sum_ratio)
        if CLOSED_FORM:
            phi, g, h, s_gradient, t_gradient = _closed_form(
                moments,
                total.p_moment,
                total.q_moment,
                Argmax(total.s_argmax, total.s_exp_sum, 0.0, 0.0, 0.0),
                Argmax(t_argmax, t_exp_sum, 0.0, 0.0, 0.0),
                scaled(s_at_t_argmax - s_norm.max, student.unit),
                scaled(t_at_s_argmax - t_norm.max, teacher.unit),
                log_exp_sum_ratio,
                tl.exp(log_probability(total.t_skipped_max, t_norm)),
                tl.exp(log_probability(total.s_skipped_max, s_norm)),
            )
            both = s_norm.log_exp_sum + t_norm.log_exp_sum
            phi = tl.where(both - both == 0.0, phi, float("nan"))
        if moments.cross is not None:  # noqa: SIM102 (Triton does not evaluate `and` at compile time)
            if moments.reverse is None:
                s_gap = scaled(s_at_t_argmax - s_norm.max, student.unit)
                log_q_origin, h = _center_log_q(moments, total, s_gap, log_q_origin, phi, h)
    entropy = s_norm.log_exp_sum - tl.div_rn(LN2 * total.entropy_moment, 1.0 + total.s_exp_sum)
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
        (total.t_skipped_max > -float("inf")) | (total.s_skipped_max > -float("inf")),
        phi,
        g,
        h,
        log_q_origin,
    )


@triton.jit
def no_statistics(s_unit):
    """Return the Statistics of a row whose first sweep is not needed."""
    s_norm = Normalizer(0.0, s_unit, 0.0, 1.0)
    none = Argmax(tl.full([], -1.0, tl.float32), 0.0, 0.0, 0.0, 0.0)
    log_ratio = LogRatio(0.0, 0.0, 1.0, s_unit, 0.0, 0.0)
    return Statistics(
        s_norm, s_norm, s_norm, s_norm, 0.0, 0.0, none, none, log_ratio, 0.0, True, 0.0, 0.0, 0.0,
        0.0,
    )  # fmt: skip


@triton.jit
def without_softmax(statistics, s_unit, t_unit):
    """Return Statistics for a divergence of logits: log q and log p are then the tempered logits themselves."""
    bare = no_statistics(s_unit)
    t_norm, log_ratio = bare.t_norm, bare.log_ratio
    if t_unit is not None:
        t_norm = Normalizer(0.0, t_unit, 0.0, 1.0)
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
        True,
        statistics.phi,
        statistics.g,
        statistics.h,
        0.0,
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
        statistics.careful,
        phi,
        g,
        h,
        statistics.log_q_origin,
    )


@triton.jit
def _evaluate_tile(s, t, statistics, degree, parameters, POLICY: tl.constexpr, spec):
    """Return (phi, g, h, q, p) of a tile."""
    s_norm, t_norm = statistics.s_norm, statistics.t_norm
    if spec.FORM // 8 == 1:
        q, p = _exact_probability(s, s_norm), _exact_probability(t, t_norm)
    else:
        q, p = probability(s, s_norm), probability(t, t_norm)
    log_q = (s - s_norm.max) * s_norm.unit - statistics.log_q_origin
    log_p = log_probability(t, t_norm)
    ratio = evaluate_log_ratio(s, t, statistics.log_ratio)
    phi, g, h = evaluate(
        spec.DIVERGENCE, parameters, p, q, log_p, log_q, ratio, degree, POLICY, spec.FORM
    )
    return phi, g, h, q, p


class Special(NamedTuple):
    """Columns whose tiles need masks or the policy for log 0 (_is_special)."""

    s_argmax: Any
    t_argmax: Any
    label: Any
    end: Any  # of the row; 0 if the whole row needs the policy for log 0


@triton.jit
def _special(s_argmax, t_argmax, label_column, careful, columns):
    return Special(
        s_argmax.column.to(tl.int32) - columns.first,
        t_argmax.column.to(tl.int32) - columns.first,
        label_column,
        tl.where(careful, 0, columns.V),
    )


@triton.jit
def _place(column, start):
    """Return a column's index in a tile; for a column before the tile, a number above every index."""
    return (column - start).to(tl.uint32, bitcast=True)


@triton.jit
def _is_special(start, special, spec):
    """Return whether a tile needs a mask or the policy for log 0.

    It does if it contains an argmax, the label, or columns before or after the row. If the row has a log 0 anywhere,
    all its tiles do.
    """
    first = tl.minimum(_place(special.s_argmax, start), _place(special.t_argmax, start))
    first = tl.minimum(first, _place(special.label, start))
    is_special = (first < spec.BLOCK_V) | (start + spec.BLOCK_V > special.end)
    if spec.HEAD:
        is_special = is_special | (start < 0)
    return is_special


@triton.jit
def _sums_of_tile(
    start, lanes, student, teacher, statistics, special, excluded, degree, parameters, V,
    SPECIAL: tl.constexpr, spec,
):  # fmt: skip
    """Return the sums of phi, g and h over the columns of each thread."""
    column = start + lanes
    s, _ = _read_tile(student, start, lanes, V, not SPECIAL, spec.HEAD)
    t, _ = _read_tile(teacher, start, lanes, V, not SPECIAL, spec.HEAD)
    if SPECIAL:
        s = _exclude(s, column, excluded)
        t = _exclude(t, column, excluded)
    phi, g, h, _, _ = _evaluate_tile(s, t, statistics, degree, parameters, SPECIAL, spec)
    if SPECIAL:  # noqa: SIM102 (Triton does not evaluate `and` at compile time)
        if spec.FORM % 2 == 1:
            is_argmax = (column == special.s_argmax) | (column == special.t_argmax)
            phi = tl.where(is_argmax, 0.0, phi)
            g = tl.where(is_argmax, 0.0, g)
            h = tl.where(is_argmax, 0.0, h)
    return _sum_tile(phi, spec), _sum_tile(g, spec), _sum_tile(h, spec)


@triton.jit
def sweep_sums(
    student, teacher, statistics, label_column, excluded, degree, parameters, columns, spec
):
    """Return the sums of phi, g and h of a divergence without a closed form; the argmaxes' columns are excluded.

    h is summed if the teacher's gradient is wanted: the sum of degree * phi - g would cancel where p is far from q.
    """
    lanes = tl.arange(0, spec.BLOCK_V)
    phi_sum = _sum_tile(tl.zeros([spec.BLOCK_V], tl.float32), spec)
    g_sum, h_sum = phi_sum, phi_sum
    V = columns.V
    special = _special(
        statistics.s_argmax, statistics.t_argmax, label_column, statistics.careful, columns
    )
    first, last = _tile_range(V, columns.split.num_splits, spec.BLOCK_V, columns.head)
    for tile in range(first, last):
        start = tile * spec.BLOCK_V - columns.head
        if _is_special(start, special, spec):
            phi, g, h = _sums_of_tile(
                start, lanes, student, teacher, statistics, special, excluded, degree, parameters, V,
                True, spec,
            )  # fmt: skip
        else:
            phi, g, h = _sums_of_tile(
                start, lanes, student, teacher, statistics, special, excluded, degree, parameters, V,
                False, spec,
            )  # fmt: skip
        phi_sum += phi
        g_sum += g
        if teacher.side.width is not None:
            h_sum += h
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
    p, q = tl.exp(log_p), tl.exp(log_q)
    phis, gs, hs = evaluate(
        spec.DIVERGENCE, parameters, p, q, log_p, log_q, ratio, degree, True, spec.FORM
    )
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
    """Return an Argmax, or none if the divergence is infinite: write_gradients then finds the limit of the gradient."""
    finite = (phi - phi == 0.0) & (argmax.gradient - argmax.gradient == 0.0)
    column = tl.where(finite, argmax.column, -1.0)
    return Argmax(column, argmax.exp_sum, argmax.z, argmax.z_other, argmax.gradient)
