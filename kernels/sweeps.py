"""The sweeps over a row: statistics, the sums of phi and g, and the gradients.

All arithmetic is in float32. A sum over the vocabulary has one accumulator a lane of the tile and is reduced once, so
that a row of 262144 entries adds some hundred numbers in sequence and not all of them.

z are a row's logits after logit_scale and softcap, up to a positive factor. Differences of z are taken before the
temperature (and that factor) multiplies them, so that an offset common to a row costs no digits. Columns past the
vocabulary read as z = -inf on both sides, which the policy for log 0 makes count as nothing. So does the label's
column where a divergence compares it apart (apart.py): all sums but that of z are of the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .skeleton import NEGLIGIBLE, evaluate, log1p, squash


class Row(NamedTuple):
    """One model's row; all of it is None, which is known at compile time, where there is no such model.

    That is asked of a field: not every Triton can compare a tuple with a None in it to None, or return one.
    """

    logits: Any  # the address of column 0
    gradient: Any  # likewise; that of the logits where model.width is None
    unit: Any  # tempered logits are unit * z
    model: Any  # rows.Model


class Normalizer(NamedTuple):
    """log_softmax(unit * z) = unit * (z - origin) - log_sum."""

    origin: Any
    unit: Any
    log_sum: Any


class Top(NamedTuple):
    """The column of a row's maximum: sums leave it out, for beside it they would lose what the others are.

    1 less its probability is rest / (1 + rest), with the rest relative to it; and its gradient, x_v - p_v sum x, is
    x_v (1 - p_v) - p_v times the sum of the others', which is no difference of two numbers of its own size.
    """

    column: Any
    rest: Any  # the sum of the others' exponentials
    z: Any
    other_z: Any  # of the other side in that column
    gradient: Any


class Ratio(NamedTuple):
    """log p - log q = ((t - t_origin) * scale - (s - s_origin)) * unit + high + low."""

    s_origin: Any
    t_origin: Any
    scale: Any
    unit: Any
    low: Any
    high: Any


class Moments(NamedTuple):
    """fastkd.divergences.ClosedForm: the weights of the moments to collect; all None where there is no such form."""

    forward: Any  # None where both forward and cross are 0, as the others are where they are 0
    cross: Any
    reverse: Any


class Sums(NamedTuple):
    """Over the vocabulary: the divergence, and its derivatives by log q and by log p."""

    phi: Any
    g: Any
    h: Any


class Split(NamedTuple):
    """The share of a row that a program has where several have one row: program_id(1) counts them."""

    statistics: Any  # float32 [rows, FIELDS, ..]: what one kernel leaves to the next (split.py)
    sums: Any  # float32 [rows, 2, ..], likewise
    apart: Any  # float32 [rows, APART_FIELDS, ..], likewise; None where no token is compared apart from the others
    first: Any  # the row of the kernel's first program
    programs: Any  # a row has here; a program leaves its numbers beside those of the others
    shares: Any  # that a kernel finds of a row; where processes share the vocabulary, those of all of them


class Shard(NamedTuple):
    """Which columns are here of a vocabulary that several processes share."""

    first: Any
    total: Any  # columns of all processes


class Partial(NamedTuple):
    """The sums of the first sweep over some tiles of a row, relative to the maxima of those; 0 where not asked for.

    A side's sums of exponentials, and the moments that these weigh, are without the column of its maximum.
    """

    s_top: Any
    t_top: Any
    s_sum: Any
    t_sum: Any
    plain_sum: Any
    p_moment: Any
    q_moment: Any
    entropy_moment: Any
    spread: Any  # sum of z - pivot
    p_lost: Any  # the largest z of a side where the other is at -inf
    q_lost: Any
    s_column: Any  # of the maximum, as a float, and the teacher's z there
    t_of_s: Any
    t_column: Any
    s_of_t: Any
    t_plain_sum: Any  # last, for few ask for it (split.py)


class Statistics(NamedTuple):
    """What the first sweep knows of a row; 0 where it was not asked for."""

    student: Any  # Normalizer
    teacher: Any  # Normalizer
    plain: Any  # Normalizer of the student at temperature 1
    t_plain: Any  # likewise of the teacher
    entropy: Any  # of the student, tempered
    spread: Any  # sum of z - pivot
    s_at: Any  # Top
    t_at: Any
    ratio: Any  # Ratio
    log_quotient: Any  # of the sums of exponentials
    phi: Any  # the closed form's value
    g: Any  # and sum of g


@triton.jit
def _tiles(columns, split, BLOCK_V: tl.constexpr):
    """From which tile to which a program goes; past the last tile of the row it has none."""
    first, last = 0, tl.cdiv(columns, BLOCK_V)
    if split is not None:
        share = tl.cdiv(last, split.programs)
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, last)
    return first, last


@triton.jit
def columns_of(V, split, BLOCK_V: tl.constexpr):
    """How many columns a program has."""
    first, last = _tiles(V, split, BLOCK_V)
    return tl.maximum(tl.minimum(last * BLOCK_V, V) - first * BLOCK_V, 0)


@triton.jit
def read(row, columns, V):
    """(z, the derivative of z by logit_scale * logits) of these columns of a row."""
    z = tl.load(row.logits + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
    slope = 1.0
    if row.model.softcap is not None:
        squashed, slope = squash(row.model.gain * z)
        z = tl.where(columns < V, row.model.softcap * squashed, -float("inf"))
    elif row.model.sign is not None:
        z = tl.where(columns < V, row.model.sign * z, -float("inf"))
    return z, slope


@triton.jit
def _others(z, columns, apart):
    """z without the column apart; a NaN stays, and spoils the row there as anywhere."""
    if apart is not None:
        z = tl.where((columns == apart) & (z == z), -float("inf"), z)
    return z


@triton.jit
def log_probability(z, normalizer):
    """log_softmax of the tempered logits."""
    return (z - normalizer.origin) * normalizer.unit - normalizer.log_sum


# A tile's lanes are added in fours or twos before they meet an accumulator. Those lie in one thread: the sum moves
# nothing, and accumulators need fewer registers. Where rows are ALIGNED, a thread loads 16 bytes at a time and has four
# neighbours; where not, its entries are as far apart as there are threads, and two of them half a tile.
@triton.jit
def _fold(tile, ALIGNED: tl.constexpr = True):
    if ALIGNED:
        return tl.sum(tl.reshape(tile, [tile.shape[0] // 4, 4]), 1)
    else:
        return tl.sum(tl.reshape(tile, [2, tile.shape[0] // 2]), 0)


@triton.jit
def _fold_max(tile, ALIGNED: tl.constexpr):
    if ALIGNED:
        return tl.max(tl.reshape(tile, [tile.shape[0] // 4, 4]), 1)
    else:
        return tl.max(tl.reshape(tile, [2, tile.shape[0] // 2]), 0)


@triton.jit
def _origin(top):
    """The running maximum as an origin for z: 0 while every entry so far is -inf."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _rise(before, top, unit):
    """(the new origin, how far it rose, what sums relative to the old one are to be multiplied by)."""
    origin = _origin(top)
    return origin, (origin - _origin(before)) * unit, tl.exp((before - origin) * unit)


@triton.jit
def _faded(moment, shift, total, fade):
    """A moment relative to the new maximum; what has faded to nothing is 0, however far the maximum rose."""
    return tl.where(fade == 0.0, 0.0, fade * (moment + shift * total))


@triton.jit
def _faded_p(p_moment, moments, s_step, t_step, t_sum, t_fade):
    shift = (moments.forward + moments.cross) * s_step - moments.forward * t_step
    return _faded(p_moment, shift, t_sum, t_fade)


@triton.jit
def _faded_q(q_moment, s_step, t_step, s_sum, s_fade):
    return _faded(q_moment, t_step - s_step, s_sum, s_fade)


@triton.jit
def _log_quotient(s_rest, t_rest):
    """log((1 + s_rest) / (1 + t_rest)): exactly 0 where they are equal, and with all digits where both are small."""
    change = tl.div_rn(s_rest - t_rest, 1.0 + t_rest)
    return tl.where(
        tl.abs(change) < 0.5, log1p(change), tl.log(tl.div_rn(1.0 + s_rest, 1.0 + t_rest))
    )


@triton.jit
def _closed_form(
    moments,
    p_moment,
    q_moment,
    s_at,
    t_at,
    s_gap,
    t_gap,
    log_quotient,
    p_lost,
    q_lost,
    NEGLIGIBLE: tl.constexpr = NEGLIGIBLE,
):
    """(sum phi, sum g, the student's gradient at its top, the teacher's at its own) from the moments of the others.

    s_gap and t_gap are tempered: how far a side is below its maximum at the other's top.
    """
    s_sum = 1.0 + s_at.rest
    t_sum = 1.0 + t_at.rest
    same = s_at.column == t_at.column
    phi = 0.0
    g = 0.0
    of_s = 0.0
    of_t = 0.0
    q_rest = tl.div_rn(s_at.rest, s_sum)
    p_rest = tl.div_rn(t_at.rest, t_sum)
    if moments.forward is not None:
        weight = moments.forward + moments.cross
        phi += tl.div_rn(p_moment - weight * s_gap, t_sum) + moments.forward * log_quotient
        phi += moments.cross * log1p(s_at.rest)
        phi += tl.where(p_lost >= NEGLIGIBLE, float("inf"), 0.0)
        g -= weight
        p_there = tl.div_rn(tl.exp(t_gap), t_sum)
        of_s += weight * tl.where(same, p_rest - q_rest, tl.div_rn(1.0, s_sum) - p_there)
        gap = tl.where(
            s_gap == -float("inf"), 0.0, s_gap
        )  # then the value says that it is infinite
        of_t -= tl.div_rn(weight * gap * p_rest + tl.div_rn(p_moment, t_sum), t_sum)
    if moments.reverse is not None:
        reverse = tl.div_rn(q_moment - t_gap, s_sum) - log_quotient
        reverse += tl.where(q_lost >= NEGLIGIBLE, float("inf"), 0.0)
        phi += moments.reverse * reverse
        g += moments.reverse * (reverse + 1.0)
        q_there = tl.div_rn(tl.exp(s_gap), s_sum)
        gap = tl.where(t_gap == -float("inf"), 0.0, t_gap)
        of_s -= moments.reverse * tl.div_rn(gap * q_rest + tl.div_rn(q_moment, s_sum), s_sum)
        of_t += moments.reverse * tl.where(same, q_rest - p_rest, tl.div_rn(1.0, t_sum) - q_there)
    return phi, g, of_s, of_t


@triton.jit
def _total(s_top, t_top, sums, p_lost, q_lost, tops, t_plain_sum):
    """A Partial of what lanes hold."""
    return Partial(
        s_top,
        t_top,
        tl.sum(sums[0], 0),
        tl.sum(sums[1], 0),
        tl.sum(sums[2], 0),
        tl.sum(sums[3], 0),
        tl.sum(sums[4], 0),
        tl.sum(sums[5], 0),
        tl.sum(sums[6], 0),
        tl.max(p_lost, 0),
        tl.max(q_lost, 0),
        tops[0],
        tops[1],
        tops[2],
        tops[3],
        tl.sum(t_plain_sum, 0),
    )


@triton.jit
def _column_of(z, top, columns):
    """The first column that has this maximum."""
    return tl.min(tl.where(z == top, columns, 2147483647), 0)


@triton.jit
def _z_at(row, column, V):
    """z of one column; -inf where it is none."""
    z, _ = read(row, tl.maximum(column, 0), V)
    return tl.where(column < 0, -float("inf"), z)


@triton.jit
def _gap_at(row, column, V, top, unit):
    """Tempered, how far one column is below a maximum."""
    return (_z_at(row, column, V) - _origin(top)) * unit


@triton.jit
def _first_lane(zero):
    """1 in one lane of an accumulator: what a column adds that is no longer the maximum."""
    return tl.where(tl.arange(0, zero.shape[0]) == 0, 1.0, 0.0)


@triton.jit
def sweep_statistics(
    student,
    teacher,
    plain_unit,
    t_plain_unit,
    apart,
    pivot,
    moments,
    V,
    shard,
    split,
    ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Online softmax of both sides, with every moment that is asked for.

    Sums of exponentials are relative to the running maximum. When it rises by `step` (tempered), earlier sums fade by
    exp(-step), and a moment, a sum of e x with x relative to the maximum too, moves by -step times the sum of e.

    moments None: none. plain_unit None: no normaliser at temperature 1. apart None: the divergence is of all columns.
    pivot None: no sum of z.
    """
    lanes = tl.arange(0, BLOCK_V)
    lowest = _fold_max(tl.full([BLOCK_V], -float("inf"), tl.float32), ALIGNED)
    zero = _fold(tl.zeros([BLOCK_V], tl.float32), ALIGNED)
    s_top = tl.full([], -float("inf"), tl.float32)
    t_top = s_top
    s_column = tl.full([], -1, tl.int32)
    t_column = s_column
    s_sum, t_sum, plain_sum, t_plain_sum = zero, zero, zero, zero
    p_moment, q_moment, entropy_moment, spread = zero, zero, zero, zero
    p_lost, q_lost = lowest, lowest
    first, last = _tiles(V, split, BLOCK_V)
    for tile in range(first, last):
        columns = tile * BLOCK_V + lanes
        z, _ = read(student, columns, V)
        s = _others(z, columns, apart)
        s_before = s_top
        s_top = tl.maximum(s_top, tl.max(s, 0))
        s_origin, s_step, s_fade = _rise(s_before, s_top, student.unit)
        if teacher.unit is not None:
            t, _ = read(teacher, columns, V)
            t = _others(t, columns, apart)
            t_before = t_top
            t_top = tl.maximum(t_top, tl.max(t, 0))
            t_origin, t_step, t_fade = _rise(t_before, t_top, teacher.unit)
        # A maximum that rose takes its place outside of the sums, and the one before is one of the others from here on.
        # Both sides do that here, where a tile is no more than its logits: what lives across a branch needs registers.
        if s_top > s_before:
            if s_column >= 0:
                s_sum += _first_lane(s_sum)
                if plain_unit is not None:
                    plain_sum += _first_lane(plain_sum)
                # Triton knows at compile time what is None, but not what `and` makes of it.
                if teacher.unit is not None:  # noqa: SIM102
                    if moments.reverse is not None:
                        x = _gap_at(teacher, s_column, V, t_before, teacher.unit)
                        q_moment += _first_lane(q_moment) * tl.where(x == -float("inf"), 0.0, -x)
            s_column = _column_of(s, s_top, columns)
        if teacher.unit is not None:  # noqa: SIM102
            if t_top > t_before:
                if t_column >= 0:
                    t_sum += _first_lane(t_sum)
                    if t_plain_unit is not None:
                        t_plain_sum += _first_lane(t_plain_sum)
                    if moments.forward is not None:
                        x = _gap_at(student, t_column, V, s_before, student.unit)
                        x *= moments.forward + moments.cross
                        p_moment += _first_lane(p_moment) * tl.where(x == -float("inf"), 0.0, -x)
                t_column = _column_of(t, t_top, columns)
        x_s = (s - s_origin) * student.unit
        e_s = tl.where(columns == s_column, 0.0, tl.exp(x_s))
        if ENTROPY:
            term = tl.where(x_s == -float("inf"), 0.0, e_s * x_s)
            total = s_sum
            entropy_moment = _faded(entropy_moment, -s_step, total, s_fade) + _fold(term, ALIGNED)
        if plain_unit is not None:
            plain_fade = tl.exp((s_before - s_origin) * plain_unit)
            e_plain = tl.where(columns == s_column, 0.0, tl.exp((s - s_origin) * plain_unit))
            plain_sum = plain_fade * plain_sum + _fold(e_plain, ALIGNED)
        if pivot is not None:
            spread += _fold(tl.where(columns < V, z - pivot, 0.0), ALIGNED)
        if teacher.unit is not None:
            x_t = (t - t_origin) * teacher.unit
            e_t = tl.where(columns == t_column, 0.0, tl.exp(x_t))
            if moments.forward is not None or moments.reverse is not None:
                # Tempered: below a temperature of 1, finite logits can be so low that they are gone as well.
                s_gone = x_s == -float("inf")
                t_gone = x_t == -float("inf")
                if moments.forward is not None:
                    weight = moments.forward + moments.cross
                    term = e_t * (moments.forward * x_t - weight * x_s)
                    p_moment = _faded_p(p_moment, moments, s_step, t_step, t_sum, t_fade)
                    p_moment += _fold(tl.where(s_gone | t_gone, 0.0, term), ALIGNED)
                    p_lost = tl.maximum(
                        p_lost, _fold_max(tl.where(s_gone, t, -float("inf")), ALIGNED)
                    )
                if moments.reverse is not None:
                    q_moment = _faded_q(q_moment, s_step, t_step, s_sum, s_fade)
                    q_moment += _fold(tl.where(s_gone | t_gone, 0.0, e_s * (x_s - x_t)), ALIGNED)
                    q_lost = tl.maximum(
                        q_lost, _fold_max(tl.where(t_gone, s, -float("inf")), ALIGNED)
                    )
            if t_plain_unit is not None:
                plain_fade = tl.exp((t_before - t_origin) * t_plain_unit)
                e_plain = tl.exp((t - t_origin) * t_plain_unit)
                e_plain = tl.where(columns == t_column, 0.0, e_plain)
                t_plain_sum = plain_fade * t_plain_sum + _fold(e_plain, ALIGNED)
            t_sum = t_fade * t_sum + _fold(e_t, ALIGNED)
        s_sum = s_fade * s_sum + _fold(e_s, ALIGNED)

    t_of_s, s_of_t = s_top, s_top
    if teacher.unit is not None:
        t_of_s = _z_at(teacher, s_column, V)
        s_of_t = _z_at(student, t_column, V)
    sums = (s_sum, t_sum, plain_sum, p_moment, q_moment, entropy_moment, spread)
    if shard is not None:  # as all processes count
        s_column = tl.where(s_column < 0, -1, s_column + shard.first)
        t_column = tl.where(t_column < 0, -1, t_column + shard.first)
    tops = (s_column.to(tl.float32), t_of_s, t_column.to(tl.float32), s_of_t)
    return _total(s_top, t_top, sums, p_lost, q_lost, tops, t_plain_sum)


@triton.jit
def _that_has(values, here, column):
    """The value of the lane that has this column among those that may."""
    return tl.max(tl.where(here & (values[0] == column), values[1], -float("inf")), 0)


@triton.jit
def merge(parts, student, teacher, plain_unit, t_plain_unit, moments):
    """A row's partial statistics, one a lane, as one; a lane of no tiles has the maximum -inf, and fades.

    The row's maximum is one lane's, whose sums leave it out; all other lanes' maxima are among the others.
    """
    s_top = tl.max(parts.s_top, 0)
    t_top = tl.max(parts.t_top, 0)
    s_origin, s_step, s_fade = _rise(parts.s_top, s_top, student.unit)
    s_here = (parts.s_top == s_top) & (parts.s_column >= 0)
    s_column = tl.min(tl.where(s_here, parts.s_column, float("inf")), 0)
    s_more = tl.where((parts.s_column >= 0) & ~(s_here & (parts.s_column == s_column)), 1.0, 0.0)
    s_parts = parts.s_sum + s_more
    entropy_moment = _faded(parts.entropy_moment, -s_step, s_parts, s_fade)
    plain_sum, t_plain_sum = parts.plain_sum, parts.t_plain_sum
    p_moment, q_moment, t_sum = parts.p_moment, parts.q_moment, parts.t_sum
    tops = (s_column, s_top, s_column, s_top)
    if plain_unit is not None:
        plain_sum = (plain_sum + s_more) * tl.exp((parts.s_top - s_origin) * plain_unit)
    if teacher.unit is not None:
        t_origin, t_step, t_fade = _rise(parts.t_top, t_top, teacher.unit)
        t_here = (parts.t_top == t_top) & (parts.t_column >= 0)
        t_column = tl.min(tl.where(t_here, parts.t_column, float("inf")), 0)
        t_more = tl.where(
            (parts.t_column >= 0) & ~(t_here & (parts.t_column == t_column)), 1.0, 0.0
        )
        t_parts = t_sum + t_more
        t_of_s = _that_has((parts.s_column, parts.t_of_s), s_here, s_column)
        s_of_t = _that_has((parts.t_column, parts.s_of_t), t_here, t_column)
        tops = (s_column, t_of_s, t_column, s_of_t)
        if t_plain_unit is not None:
            t_plain_sum = (t_plain_sum + t_more) * tl.exp((parts.t_top - t_origin) * t_plain_unit)
        if moments.forward is not None or moments.reverse is not None:
            if moments.forward is not None:
                x = (parts.s_of_t - _origin(parts.s_top)) * student.unit
                x *= moments.forward + moments.cross
                p_moment -= tl.where((t_more == 0.0) | (x == -float("inf")), 0.0, x)
                p_moment = _faded_p(p_moment, moments, s_step, t_step, t_parts, t_fade)
            if moments.reverse is not None:
                x = (parts.t_of_s - _origin(parts.t_top)) * teacher.unit
                q_moment -= tl.where((s_more == 0.0) | (x == -float("inf")), 0.0, x)
                q_moment = _faded_q(q_moment, s_step, t_step, s_parts, s_fade)
        t_sum = t_fade * t_parts
    s_sum = s_fade * s_parts
    sums = (s_sum, t_sum, plain_sum, p_moment, q_moment, entropy_moment, parts.spread)
    return _total(s_top, t_top, sums, parts.p_lost, parts.q_lost, tops, t_plain_sum)


# Where the log-sum-exps of two rows are closer than this, s - t is the most exact way to log q - log p.
CLOSE = 8.0


@triton.jit
def _ratio(s_norm, t_norm, log_quotient, CLOSE: tl.constexpr = CLOSE):
    """How log p - log q is made."""
    scale = tl.div_rn(t_norm.unit, s_norm.unit)
    # (s_origin - t_origin) unit and the quotient's logarithm, as two floats.
    apart = (s_norm.origin - t_norm.origin) * s_norm.unit
    lost = tl.fma(s_norm.origin - t_norm.origin, s_norm.unit, -apart)
    high = apart + log_quotient
    part = high - apart
    low = (apart - (high - part)) + (log_quotient - part) + lost
    close = (scale == 1.0) & (tl.abs(high) < CLOSE)
    # Of the origins' difference, what rounding takes away is as small as they are close.
    return Ratio(
        tl.where(close, 0.0, s_norm.origin),
        tl.where(close, 0.0, t_norm.origin),
        scale,
        s_norm.unit,
        tl.where(close, low, 0.0),
        tl.where(close, high, log_quotient),
    )


@triton.jit
def log_ratio_of(s, t, ratio):
    """log p - log q."""
    gap = (t - ratio.t_origin) * ratio.scale - (s - ratio.s_origin)
    # The product meets high unrounded: where p is close to q, the two cancel.
    return tl.fma(gap, ratio.unit, ratio.high) + ratio.low


@triton.jit
def _log_sum(top, rest):
    """The logarithm of 1 + rest; of a row that is -inf throughout that of 0, and of one with +inf not a number."""
    value = tl.where(top < float("inf"), log1p(rest), float("nan"))
    # A label that is compared apart from such a row still has a probability, which is 1. A NaN among the others stays.
    return tl.where(top == -float("inf"), rest - float("inf"), value)


@triton.jit
def conclude(row, student, teacher, plain_unit, t_plain_unit, moments):
    """The statistics of a row from the sums over all of it."""
    s_norm = Normalizer(_origin(row.s_top), student.unit, _log_sum(row.s_top, row.s_sum))
    t_norm, plain, t_plain, phi, g = s_norm, s_norm, s_norm, 0.0, 0.0
    ratio = Ratio(0.0, 0.0, 1.0, student.unit, 0.0, 0.0)
    of_s, of_t, log_quotient = 0.0, 0.0, 0.0
    t_sum, t_column, t_of_s, s_of_t = row.s_sum, row.s_column, row.s_top, row.s_top
    if plain_unit is not None:
        plain = Normalizer(_origin(row.s_top), plain_unit, _log_sum(row.s_top, row.plain_sum))
    if teacher.unit is not None:
        t_sum, t_column, t_of_s, s_of_t = row.t_sum, row.t_column, row.t_of_s, row.s_of_t
        t_norm = Normalizer(_origin(row.t_top), teacher.unit, _log_sum(row.t_top, t_sum))
        t_plain = t_norm
        if t_plain_unit is not None:
            t_plain_log_sum = _log_sum(row.t_top, row.t_plain_sum)
            t_plain = Normalizer(_origin(row.t_top), t_plain_unit, t_plain_log_sum)
        log_quotient = _log_quotient(row.s_sum, t_sum)
        ratio = _ratio(s_norm, t_norm, log_quotient)
        if moments.forward is not None or moments.reverse is not None:
            phi, g, of_s, of_t = _closed_form(
                moments,
                row.p_moment,
                row.q_moment,
                Top(row.s_column, row.s_sum, 0.0, 0.0, 0.0),
                Top(t_column, t_sum, 0.0, 0.0, 0.0),
                (s_of_t - s_norm.origin) * student.unit,
                (t_of_s - t_norm.origin) * teacher.unit,
                log_quotient,
                tl.exp(log_probability(row.p_lost, t_norm)),
                tl.exp(log_probability(row.q_lost, s_norm)),
            )
            known = s_norm.log_sum + t_norm.log_sum
            phi = tl.where(known - known == 0.0, phi, float("nan"))
    entropy = s_norm.log_sum - tl.div_rn(row.entropy_moment, 1.0 + row.s_sum)
    entropy = tl.where(s_norm.log_sum > -float("inf"), entropy, float("nan"))
    s_at = Top(row.s_column, row.s_sum, row.s_top, t_of_s, of_s)
    t_at = Top(t_column, t_sum, row.t_top, s_of_t, of_t)
    return Statistics(
        s_norm, t_norm, plain, t_plain, entropy, row.spread, s_at, t_at, ratio, log_quotient, phi, g
    )


@triton.jit
def sweep_sums(
    student,
    teacher,
    s_norm,
    t_norm,
    s_at,
    t_at,
    ratio,
    apart,
    V,
    first_column,
    split,
    parameters,
    DIVERGENCE: tl.constexpr,
    FORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """(sum phi, sum g) of a divergence without a closed form, but for the two tops."""
    lanes = tl.arange(0, BLOCK_V)
    phi_sum = _fold(tl.zeros([BLOCK_V], tl.float32), ALIGNED)
    g_sum = phi_sum
    s_column = s_at.column.to(tl.int32) - first_column
    t_column = t_at.column.to(tl.int32) - first_column
    first, last = _tiles(V, split, BLOCK_V)
    for tile in range(first, last):
        columns = tile * BLOCK_V + lanes
        s, _ = read(student, columns, V)
        t, _ = read(teacher, columns, V)
        s = _others(s, columns, apart)
        t = _others(t, columns, apart)
        log_q = log_probability(s, s_norm)
        log_p = log_probability(t, t_norm)
        log_ratio = log_ratio_of(s, t, ratio)
        phi, g, _ = evaluate(DIVERGENCE, parameters, log_p, log_q, log_ratio, 0.0, FORM)
        if FORM % 2 == 1:
            left_out = (columns == s_column) | (columns == t_column)
            phi = tl.where(left_out, 0.0, phi)
            g = tl.where(left_out, 0.0, g)
        phi_sum += _fold(phi, ALIGNED)
        g_sum += _fold(g, ALIGNED)
    return tl.sum(phi_sum, 0), tl.sum(g_sum, 0)


@triton.jit
def add_tops(
    phi,
    g,
    s_norm,
    t_norm,
    s_at,
    t_at,
    log_quotient,
    degree,
    parameters,
    DIVERGENCE: tl.constexpr,
    FORM: tl.constexpr,
):
    """(sum phi, sum g, the student's gradient at its top, the teacher's at its own) from the sums of all others."""
    lanes = tl.arange(0, 2)
    of_s = lanes == 0
    s = tl.where(of_s, s_at.z, t_at.other_z)
    t = tl.where(of_s, s_at.other_z, t_at.z)
    x_s = (s - s_norm.origin) * s_norm.unit
    x_t = (t - t_norm.origin) * t_norm.unit
    log_ratio = (x_t - x_s) + log_quotient
    log_q = x_s - s_norm.log_sum
    log_p = x_t - t_norm.log_sum
    phis, gs, hs = evaluate(DIVERGENCE, parameters, log_p, log_q, log_ratio, degree, FORM)
    g_s = tl.sum(tl.where(of_s, gs, 0.0), 0)
    h_s = tl.sum(tl.where(of_s, hs, 0.0), 0)
    g_t = tl.sum(tl.where(of_s, 0.0, gs), 0)
    h_t = tl.sum(tl.where(of_s, 0.0, hs), 0)
    phi_s = tl.sum(tl.where(of_s, phis, 0.0), 0)
    phi_t = tl.sum(tl.where(of_s, 0.0, phis), 0)
    two = s_at.column != t_at.column
    g_others = tl.where(two, g + g_t, g)
    h = degree * phi - g
    h_others = tl.where(two, h + h_s, h)
    student = tl.div_rn(g_s * s_at.rest - g_others, 1.0 + s_at.rest)
    teacher = tl.div_rn(h_t * t_at.rest - h_others, 1.0 + t_at.rest)
    phi += phi_s
    return tl.where(two, phi + phi_t, phi), g_others + g_s, student, teacher


@triton.jit
def with_more(at, more):
    """A top where the sum that its side's derivatives have over the other columns is larger by that."""
    gradient = at.gradient - tl.div_rn(more, 1.0 + at.rest)
    return Top(at.column, at.rest, at.z, at.other_z, gradient)


@triton.jit
def where_finite(at, phi):
    """A top, which is none in a row whose divergence is infinite: the limit of its gradient is the kernel's to find."""
    known = (phi - phi == 0.0) & (at.gradient - at.gradient == 0.0)
    return Top(tl.where(known, at.column, -1.0), at.rest, at.z, at.other_z, at.gradient)


@triton.jit
def _project(derivative, log_x, total, FORM: tl.constexpr):
    """From a derivative by log-probabilities to one by tempered logits: g_v - q_v sum_u g_u."""
    if FORM % 2 == 1:
        derivative -= tl.exp(log_x) * total
    return derivative


@triton.jit
def _store(pointer, columns, value, width):
    tl.store(pointer + columns, value.to(pointer.dtype.element_ty), mask=columns < width)


@triton.jit
def sweep_gradients(
    student,
    teacher,
    s_norm,
    t_norm,
    plain,
    s_at,
    t_at,
    ratio,
    first_column,
    sums,
    of_apart,
    factors,
    degree,
    apart,
    label,
    smoothing,
    vocabulary,
    V,
    width,
    split,
    parameters,
    DIVERGENCE: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the gradients, in reverse order: what the sweep before read last is what the caches still hold.

    Where a column is apart, its share of sums is of_apart; it is the label's.
    """
    lanes = tl.arange(0, BLOCK_V)
    s_column = s_at.column.to(tl.int32) - first_column
    t_column = t_at.column.to(tl.int32) - first_column
    first, last = _tiles(width, split, BLOCK_V)
    for back in range(first, last):
        columns = (first + last - 1 - back) * BLOCK_V + lanes
        s, s_slope = read(student, columns, V)
        gradient = tl.zeros([BLOCK_V], tl.float32)
        if factors.distillation is not None:
            t, t_slope = read(teacher, columns, V)
            s_other = _others(s, columns, apart)
            t_other = _others(t, columns, apart)
            log_q = log_probability(s_other, s_norm)
            log_p = log_probability(t_other, t_norm)
            log_ratio = log_ratio_of(s_other, t_other, ratio)
            _, g, h = evaluate(DIVERGENCE, parameters, log_p, log_q, log_ratio, degree, FORM)
            gradient = _project(g, log_q, sums.g, FORM)
            if FORM % 2 == 1:
                gradient = tl.where(columns == s_column, s_at.gradient, gradient)
            if apart is not None:
                gradient = tl.where(columns == apart, of_apart.g, gradient)
            gradient *= factors.distillation
            if teacher.model.width is not None:
                h = _project(h, log_p, sums.h, FORM)
                if FORM % 2 == 1:
                    h = tl.where(columns == t_column, t_at.gradient, h)
                if apart is not None:
                    h = tl.where(columns == apart, of_apart.h, h)
                h = tl.where(columns < V, h * t_slope * factors.teacher, 0.0)
                _store(teacher.gradient, columns, h, teacher.model.width)
        if student.model.width is not None:
            if factors.cross_entropy is not None:
                target = tl.where(columns == label, 1.0, 0.0)
                if smoothing is not None:
                    target = (1.0 - smoothing) * target + smoothing / vocabulary
                q_plain = tl.exp(log_probability(s, plain))
                gradient += (q_plain - target) * factors.cross_entropy
            gradient = tl.where(columns < V, gradient * s_slope, 0.0)
            _store(student.gradient, columns, gradient, student.model.width)


@triton.jit
def sweep_zeros(pointer, width, split, BLOCK_V: tl.constexpr):
    """The gradient of a row that is dropped."""
    lanes = tl.arange(0, BLOCK_V)
    first, last = _tiles(width, split, BLOCK_V)
    for tile in range(first, last):
        _store(pointer, tile * BLOCK_V + lanes, tl.zeros([BLOCK_V], tl.float32), width)
