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

from .skeleton import NEGLIGIBLE, evaluate, squash


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
    """The sums of the first sweep over some tiles of a row, relative to the maxima of those; 0 where not asked for."""

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
    t_plain_sum: Any  # last, for few ask for it (split.py)


class Statistics(NamedTuple):
    """What the first sweep knows of a row; 0 where it was not asked for."""

    student: Any  # Normalizer
    teacher: Any  # Normalizer
    plain: Any  # Normalizer of the student at temperature 1
    t_plain: Any  # likewise of the teacher
    entropy: Any  # of the student, tempered
    spread: Any  # sum of z - pivot
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
def _closed_form(
    moments,
    p_moment,
    q_moment,
    s_sum,
    t_sum,
    p_lost,
    q_lost,
    NEGLIGIBLE: tl.constexpr = NEGLIGIBLE,
):
    """(sum phi, sum g) from the moments and the sums of exponentials.

    The two log-normalisers are subtracted as the log of a quotient, which is exactly 0 where p = q.
    """
    log_quotient = tl.log(tl.div_rn(s_sum, t_sum))
    phi = 0.0
    g = 0.0
    if moments.forward is not None:
        phi += tl.div_rn(p_moment, t_sum) + moments.forward * log_quotient
        phi += moments.cross * tl.log(s_sum) + tl.where(p_lost >= NEGLIGIBLE, float("inf"), 0.0)
        g -= moments.forward + moments.cross
    if moments.reverse is not None:
        reverse = tl.div_rn(q_moment, s_sum) - log_quotient
        reverse += tl.where(q_lost >= NEGLIGIBLE, float("inf"), 0.0)
        phi += moments.reverse * reverse
        g += moments.reverse * (reverse + 1.0)
    return phi, g


@triton.jit
def _total(s_top, t_top, sums, p_lost, q_lost, t_plain_sum):
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
        tl.sum(t_plain_sum, 0),
    )


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
        x_s = (s - s_origin) * student.unit
        e_s = tl.exp(x_s)
        if ENTROPY:
            term = tl.where(x_s == -float("inf"), 0.0, e_s * x_s)
            entropy_moment = _faded(entropy_moment, -s_step, s_sum, s_fade) + _fold(term, ALIGNED)
        if plain_unit is not None:
            plain_fade = tl.exp((s_before - s_origin) * plain_unit)
            plain_sum = plain_fade * plain_sum + _fold(tl.exp((s - s_origin) * plain_unit), ALIGNED)
        if pivot is not None:
            spread += _fold(tl.where(columns < V, z - pivot, 0.0), ALIGNED)
        if teacher.unit is not None:
            t, _ = read(teacher, columns, V)
            t = _others(t, columns, apart)
            t_before = t_top
            t_top = tl.maximum(t_top, tl.max(t, 0))
            t_origin, t_step, t_fade = _rise(t_before, t_top, teacher.unit)
            x_t = (t - t_origin) * teacher.unit
            e_t = tl.exp(x_t)
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
                t_plain_sum = plain_fade * t_plain_sum + _fold(e_plain, ALIGNED)
            t_sum = t_fade * t_sum + _fold(e_t, ALIGNED)
        s_sum = s_fade * s_sum + _fold(e_s, ALIGNED)

    sums = (s_sum, t_sum, plain_sum, p_moment, q_moment, entropy_moment, spread)
    return _total(s_top, t_top, sums, p_lost, q_lost, t_plain_sum)


@triton.jit
def merge(parts, student, teacher, plain_unit, t_plain_unit, moments):
    """A row's partial statistics, one a lane, as one; a lane of no tiles has the maximum -inf, and fades."""
    s_top = tl.max(parts.s_top, 0)
    t_top = tl.max(parts.t_top, 0)
    s_origin, s_step, s_fade = _rise(parts.s_top, s_top, student.unit)
    entropy_moment = _faded(parts.entropy_moment, -s_step, parts.s_sum, s_fade)
    t_sum, plain_sum, t_plain_sum = parts.t_sum, parts.plain_sum, parts.t_plain_sum
    p_moment, q_moment = parts.p_moment, parts.q_moment
    if plain_unit is not None:
        plain_sum *= tl.exp((parts.s_top - s_origin) * plain_unit)
    if teacher.unit is not None:
        t_origin, t_step, t_fade = _rise(parts.t_top, t_top, teacher.unit)
        if t_plain_unit is not None:
            t_plain_sum *= tl.exp((parts.t_top - t_origin) * t_plain_unit)
        if moments.forward is not None or moments.reverse is not None:
            if moments.forward is not None:
                p_moment = _faded_p(p_moment, moments, s_step, t_step, t_sum, t_fade)
            if moments.reverse is not None:
                q_moment = _faded_q(q_moment, s_step, t_step, parts.s_sum, s_fade)
        t_sum *= t_fade
    s_sum = s_fade * parts.s_sum
    sums = (s_sum, t_sum, plain_sum, p_moment, q_moment, entropy_moment, parts.spread)
    return _total(s_top, t_top, sums, parts.p_lost, parts.q_lost, t_plain_sum)


@triton.jit
def conclude(row, student, teacher, plain_unit, t_plain_unit, moments):
    """The statistics of a row from the sums over all of it."""
    s_norm = Normalizer(_origin(row.s_top), student.unit, tl.log(row.s_sum))
    t_norm, plain, t_plain, phi, g = s_norm, s_norm, s_norm, 0.0, 0.0
    if plain_unit is not None:
        plain = Normalizer(_origin(row.s_top), plain_unit, tl.log(row.plain_sum))
    if teacher.unit is not None:
        t_norm = Normalizer(_origin(row.t_top), teacher.unit, tl.log(row.t_sum))
        t_plain = t_norm
        if t_plain_unit is not None:
            t_plain = Normalizer(_origin(row.t_top), t_plain_unit, tl.log(row.t_plain_sum))
        if moments.forward is not None or moments.reverse is not None:
            phi, g = _closed_form(
                moments,
                row.p_moment,
                row.q_moment,
                row.s_sum,
                row.t_sum,
                tl.exp(log_probability(row.p_lost, t_norm)),
                tl.exp(log_probability(row.q_lost, s_norm)),
            )
    entropy = s_norm.log_sum - tl.div_rn(row.entropy_moment, row.s_sum)
    return Statistics(s_norm, t_norm, plain, t_plain, entropy, row.spread, phi, g)


@triton.jit
def sweep_sums(
    student,
    teacher,
    s_norm,
    t_norm,
    apart,
    V,
    split,
    parameters,
    DIVERGENCE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """(sum phi, sum g) of a divergence without a closed form."""
    lanes = tl.arange(0, BLOCK_V)
    phi_sum = _fold(tl.zeros([BLOCK_V], tl.float32), ALIGNED)
    g_sum = phi_sum
    first, last = _tiles(V, split, BLOCK_V)
    for tile in range(first, last):
        columns = tile * BLOCK_V + lanes
        s, _ = read(student, columns, V)
        t, _ = read(teacher, columns, V)
        log_q = log_probability(_others(s, columns, apart), s_norm)
        log_p = log_probability(_others(t, columns, apart), t_norm)
        phi, g = evaluate(DIVERGENCE, parameters, log_p, log_q, NORMALIZED)
        phi_sum += _fold(phi, ALIGNED)
        g_sum += _fold(g, ALIGNED)
    return tl.sum(phi_sum, 0), tl.sum(g_sum, 0)


@triton.jit
def _project(derivative, log_x, total, NORMALIZED: tl.constexpr):
    """From a derivative by log-probabilities to one by tempered logits: g_v - q_v sum_u g_u."""
    if NORMALIZED:
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
    NORMALIZED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the gradients, in reverse order: what the sweep before read last is what the caches still hold.

    Where a column is apart, its share of sums is of_apart; it is the label's.
    """
    lanes = tl.arange(0, BLOCK_V)
    first, last = _tiles(width, split, BLOCK_V)
    for back in range(first, last):
        columns = (first + last - 1 - back) * BLOCK_V + lanes
        s, s_slope = read(student, columns, V)
        gradient = tl.zeros([BLOCK_V], tl.float32)
        if factors.distillation is not None:
            t, t_slope = read(teacher, columns, V)
            log_q = log_probability(_others(s, columns, apart), s_norm)
            log_p = log_probability(_others(t, columns, apart), t_norm)
            phi, g = evaluate(DIVERGENCE, parameters, log_p, log_q, NORMALIZED)
            gradient = _project(g, log_q, sums.g, NORMALIZED)
            if apart is not None:
                gradient = tl.where(columns == apart, of_apart.g, gradient)
            gradient *= factors.distillation
            if teacher.model.width is not None:
                h = _project(degree * phi - g, log_p, sums.h, NORMALIZED)
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
