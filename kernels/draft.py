"""The loss of a draft model in Triton: all terms, the acceptance and the gradient of their sum, in one launch.

fastkd/call/draft.py has the contract, and csrc/cpu/draft.cpp the formulas. One program computes a row, in three sweeps
over the draft tokens: the normalizers of both sides, the sums that the terms need, and the gradient. With
draft_to_target, it reads the target's logits through that map, and sweeps over all of the target's columns once for the
probability of the draft tokens.

Let q be the draft model's probabilities, p the target's among the draft tokens, and m the probability that the target
gives to all draft tokens together. The divergences are functions of p and q; the acceptance and the total variation
distance compare q with m p.

A term that is absent is None, which removes its code. `Spec` says what the sweeps have to compute.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.backends.native import readable_rows
from fastkd.call.contract import Options, Rows, Want
from fastkd.call.draft import LOSSES, LOWEST_ACCEPTANCE, Result, Terms
from fastkd.core.tensors import readable, unit_stride
from fastkd.divergences import forward_kl, jsd, reverse_kl, tvd

from .gradient import sweep_zeros
from .kernel import Inputs, View, is_kept, row_pointer
from .launch import is_aligned, lay_out, on_device, register_limit, tile
from .launcher import launch
from .normalizer import add_columns, merge_lanes, start_lanes
from .skeleton import bind, evaluate, expm1, form_of
from .sweeps import (
    LogRatio,
    Normalizer,
    _log_exp_sum_ratio,
    _log_ratio_constants,
    _normalizer,
    _place,
    evaluate_log_ratio,
    log_probability,
    probability,
)

DIVERGENCES = forward_kl(), reverse_kl(), jsd(0.5), tvd()
# If the exponentials of the other columns add up to less than this share of the largest one, its column has over 4/5 of
# the probability, and its gradient is minus the sum of the other gradients, because q - p would have lost its digits.
SURE = 0.25


class Weights(NamedTuple):
    """The weights of the terms; None for 0."""

    forward_kl: Any
    reverse_kl: Any
    jsd: Any
    cross_entropy: Any
    tvd: Any
    nla: Any
    lk_hybrid: Any


class Values(NamedTuple):
    """The outputs per row, float32 [rows] each; all but the loss may be None."""

    loss: Any
    acceptance: Any
    forward_kl: Any
    reverse_kl: Any
    jsd: Any
    cross_entropy: Any
    tvd: Any
    nla: Any
    lk_hybrid: Any


OUTPUTS = len(Values._fields)


class Spec(NamedTuple):
    """What the kernel is compiled for; every field is a constexpr."""

    FORWARD: Any  # the functions of the divergences, from skeleton.bind
    REVERSE: Any
    JSD: Any
    TVD: Any
    FORM: Any  # of all four, from skeleton.form_of
    WITH_KL: Any  # whether a sum of the KL or the reverse KL is needed
    WITH_JSD: Any
    WITH_ACCEPTANCE: Any
    WITH_LABEL: Any  # whether the column of the target's most probable draft token is needed
    BLOCK_V: Any


class Row(NamedTuple):
    """How the logits of a row are read."""

    student: Any  # address of column 0
    teacher: Any  # address of column 0
    ids: Any  # int32 [D], the target's column of each draft token; None: the same columns
    D: Any  # draft tokens


class Sides(NamedTuple):
    """The results of the first sweep over both sides."""

    s: Any  # Normalizer of the draft model
    t: Any  # Normalizer of the target among the draft tokens; it gives p = 0 if all of their logits are -inf
    s_rest: Any  # sum of exponentials without the one of the maximum
    s_argmax: Any  # the first column of the maximum
    t_argmax: Any
    log_ratio: Any  # LogRatio
    s_label: (
        Any  # the draft model's logit of the target's most probable draft token; 0 if not needed
    )
    empty: Any  # whether the target excludes all draft tokens
    careful: Any  # whether some logit is not finite, so that the policy for log 0 applies


class DraftSums(NamedTuple):
    """Sums over the draft tokens; 0 if not needed."""

    forward: Any
    reverse: Any
    jsd: Any
    jsd_g: Any
    acceptance: Any
    tvd: Any  # of |q - m p| / 2
    tvd_g: Any
    q: Any


class Slopes(NamedTuple):
    """Factors of the parts of the gradient, equal in all columns; 0 if a part is absent."""

    q: Any
    forward: Any
    reverse: Any
    jsd: Any
    tvd: Any
    label: Any


@triton.jit
def _read(row, start, lanes, s_past, t_past, WHOLE: tl.constexpr):
    """Return a tile of float32 logits of both sides; s_past and t_past past the end. WHOLE: no column is past it."""
    column = start + lanes
    place = column
    if WHOLE:
        s = tl.load(row.student + column).to(tl.float32)
        if row.ids is not None:
            place = tl.load(row.ids + column)
        t = tl.load(row.teacher + place).to(tl.float32)
    else:
        exists = column < row.D
        s = tl.load(row.student + column, mask=exists, other=0.0).to(tl.float32)
        if row.ids is not None:
            place = tl.load(row.ids + column, mask=exists, other=0)
        t = tl.load(row.teacher + place, mask=exists, other=0.0).to(tl.float32)
        s = tl.where(exists, s, s_past)
        t = tl.where(exists, t, t_past)
    return s, t


@triton.jit
def _first_column(lane_max, row_max, argmax):
    """Return the first column of a side's maximum; 0 if there is none."""
    column = tl.min(tl.where(lane_max == row_max, argmax, 2147483647), 0)
    return tl.where(column == 2147483647, 0, column)


@triton.jit
def _sweep_statistics(row, spec):
    """Return the Sides of a row."""
    lanes = tl.arange(0, spec.BLOCK_V)
    s_max, s_others = start_lanes(spec.BLOCK_V)
    t_max, t_others = start_lanes(spec.BLOCK_V)
    s_argmax = tl.full([spec.BLOCK_V], 2147483647, tl.int32)
    t_argmax = s_argmax
    finite = tl.zeros([spec.BLOCK_V], tl.float32)
    for number in range(tl.cdiv(row.D, spec.BLOCK_V)):
        start = number * spec.BLOCK_V
        column = start + lanes
        lowest = -float("inf")
        if start + spec.BLOCK_V <= row.D:
            s, t = _read(row, start, lanes, lowest, lowest, True)
            finite += (s + t) * 0.0  # NaN from the first infinity on
        else:
            s, t = _read(row, start, lanes, lowest, lowest, False)
            finite += tl.where(column < row.D, s + t, 0.0) * 0.0
        s_argmax = tl.where(s > s_max, column, s_argmax)
        s_max, s_others = add_columns(s_max, s_others, s, False)
        if spec.WITH_LABEL:
            t_argmax = tl.where(t > t_max, column, t_argmax)
        t_max, t_others = add_columns(t_max, t_others, t, False)
    s_top, s_rest, _ = merge_lanes(s_max, s_others)
    t_top, t_rest, _ = merge_lanes(t_max, t_others)
    one = tl.full([], 1.0, tl.float32)
    s_norm, t_norm = _normalizer(s_top, one, s_rest), _normalizer(t_top, one, t_rest)
    log_ratio = _log_ratio_constants(s_norm, t_norm, _log_exp_sum_ratio(s_rest, t_rest))
    # The origins are the maxima if a side gives most of its probability to one column, so that the log-ratio of a
    # column that has both maxima has no rounding error.
    sure = (s_rest < 1.0) | (t_rest < 1.0)
    log_ratio = LogRatio(
        tl.where(sure, s_norm.max, log_ratio.s_shift),
        tl.where(sure, t_norm.max, log_ratio.t_shift),
        log_ratio.scale,
        log_ratio.unit,
        tl.where(sure, 0.0, log_ratio.low),
        tl.where(sure, _log_exp_sum_ratio(s_rest, t_rest), log_ratio.high),
    )
    empty = t_top == -float("inf")
    label, s_label = _first_column(t_max, t_top, t_argmax), 0.0
    if spec.WITH_LABEL:
        s_label = tl.load(row.student + label).to(tl.float32)
        # Without the barrier, a thread could load the logit after another thread has overwritten it.
        tl.debug_barrier()
    sum_of_finite = tl.sum(finite, 0)
    return Sides(
        s_norm,
        Normalizer(
            t_norm.max,
            one,
            tl.where(empty, 0.0, t_norm.log_exp_sum),
            tl.where(empty, 0.0, t_norm.share),
        ),
        s_rest,
        _first_column(s_max, s_top, s_argmax),
        label,
        log_ratio,
        s_label,
        empty,
        sum_of_finite != sum_of_finite,
    )


@triton.jit
def _log_mass(teacher, V, sides, spec):
    """Sweep all of the target's columns; return the logarithm of the draft tokens' probability, at most 0."""
    lanes = tl.arange(0, spec.BLOCK_V)
    lane_max, others = start_lanes(spec.BLOCK_V)
    for number in range(tl.cdiv(V, spec.BLOCK_V)):
        column = number * spec.BLOCK_V + lanes
        t = tl.load(teacher + column, mask=column < V, other=-float("inf")).to(tl.float32)
        lane_max, others = add_columns(lane_max, others, t, False)
    top, rest, _ = merge_lanes(lane_max, others)
    norm, t_norm = _normalizer(top, sides.t.unit, rest), sides.t
    log_mass = (t_norm.max - norm.max) + (t_norm.log_exp_sum - norm.log_exp_sum)
    log_mass = tl.where(log_mass > 0.0, 0.0, log_mass)
    return tl.where(sides.empty, -float("inf"), log_mass)


@triton.jit
def _probabilities(row, start, lanes, sides, WHOLE: tl.constexpr):
    """Return (q, p, log q, log p, log p - log q) of a tile; q and p are 0 past the end of the row."""
    s, t = _read(row, start, lanes, sides.s.max, sides.t.max, WHOLE)
    q, p = probability(s, sides.s), probability(t, sides.t)
    if not WHOLE:
        exists = start + lanes < row.D
        q = tl.where(exists, q, 0.0)
        p = tl.where(exists, p, 0.0)
    log_q, log_p = log_probability(s, sides.s), log_probability(t, sides.t)
    return q, p, log_q, log_p, evaluate_log_ratio(s, t, sides.log_ratio)


@triton.jit
def _add_tile(
    sums, row, start, lanes, sides, mass, log_mass, WHOLE: tl.constexpr,
    POLICY: tl.constexpr, spec,
):  # fmt: skip
    """Return the DraftSums plus the terms of a tile, as a tuple."""
    q, p, log_q, log_p, ratio = _probabilities(row, start, lanes, sides, WHOLE)
    forward, reverse, jsd, jsd_g = sums.forward, sums.reverse, sums.jsd, sums.jsd_g
    acceptance, tvd, tvd_g, q_sum = sums.acceptance, sums.tvd, sums.tvd_g, sums.q
    if spec.WITH_KL:
        phi, _, _ = evaluate(spec.FORWARD, (), p, q, log_p, log_q, ratio, 1.0, POLICY, spec.FORM)
        forward += phi
        phi, _, _ = evaluate(spec.REVERSE, (), p, q, log_p, log_q, ratio, 1.0, POLICY, spec.FORM)
        reverse += phi
    if spec.WITH_JSD:
        phi, g, _ = evaluate(spec.JSD, (), p, q, log_p, log_q, ratio, 1.0, POLICY, spec.FORM)
        jsd += phi
        jsd_g += g
    if spec.WITH_ACCEPTANCE:
        accepted = p * mass
        phi, g, _ = evaluate(
            spec.TVD, (), accepted, q, log_p, log_q, ratio + log_mass, 1.0, False, spec.FORM
        )
        acceptance += tl.where(accepted < q, accepted, q)
        tvd += phi
        tvd_g += g
        q_sum += q
    return forward, reverse, jsd, jsd_g, acceptance, tvd, tvd_g, q_sum


@triton.jit
def _sweep_sums(row, sides, mass, log_mass, POLICY: tl.constexpr, spec):
    """Return the DraftSums of a row as a tuple, from the last tile to the first."""
    lanes = tl.arange(0, spec.BLOCK_V)
    zero = tl.zeros([spec.BLOCK_V], tl.float32)
    forward, reverse, jsd, jsd_g, acceptance, tvd, tvd_g, q = (
        zero, zero, zero, zero, zero, zero, zero, zero,
    )  # fmt: skip
    tiles = tl.cdiv(row.D, spec.BLOCK_V)
    for number in range(tiles):
        start = (tiles - 1 - number) * spec.BLOCK_V
        sums = DraftSums(forward, reverse, jsd, jsd_g, acceptance, tvd, tvd_g, q)
        if start + spec.BLOCK_V <= row.D:
            forward, reverse, jsd, jsd_g, acceptance, tvd, tvd_g, q = _add_tile(
                sums, row, start, lanes, sides, mass, log_mass, True, POLICY, spec
            )
        else:
            forward, reverse, jsd, jsd_g, acceptance, tvd, tvd_g, q = _add_tile(
                sums, row, start, lanes, sides, mass, log_mass, False, POLICY, spec
            )
    return (
        tl.sum(forward, 0), tl.sum(reverse, 0), tl.sum(jsd, 0), tl.sum(jsd_g, 0),
        tl.sum(acceptance, 0), tl.sum(tvd, 0), tl.sum(tvd_g, 0), tl.sum(q, 0),
    )  # fmt: skip


@triton.jit
def _undefined(sides):
    """Return NaN if all logits of a side are -inf, so that no q or no renormalized p exists; else 0."""
    no_q = sides.s.log_exp_sum == -float("inf")
    return tl.where(sides.empty | no_q, float("nan"), 0.0)


@triton.jit
def _put(loss, pointer, weight, row, value):
    """Store the value of a term if it is wanted; return the loss with the term."""
    if pointer is not None:
        tl.store(pointer + row, value)
    if weight is not None:
        loss += weight * value
    return loss


@triton.jit
def _store_values(
    row_number, row, sides, sums, log_mass, weight, weights, values, eta, spec,
    LOWEST_ACCEPTANCE: tl.constexpr = LOWEST_ACCEPTANCE,
):  # fmt: skip
    """Store the values of a row; return (the acceptance, the weight of the KL in "lk_hybrid")."""
    undefined = _undefined(sides)
    loss = 0.0
    forward, distance, acceptance, share = sums.forward + undefined, 0.0, 0.0, 0.0
    loss = _put(loss, values.forward_kl, weights.forward_kl, row_number, forward)
    reverse = sums.reverse + undefined
    loss = _put(loss, values.reverse_kl, weights.reverse_kl, row_number, reverse)
    loss = _put(loss, values.jsd, weights.jsd, row_number, sums.jsd + undefined)
    if spec.WITH_LABEL:
        value = sides.s.log_exp_sum + (sides.s.max - sides.s_label)
        t_log_exp_sum = sides.t.log_exp_sum
        value = tl.where(t_log_exp_sum == t_log_exp_sum, value, float("nan"))
        loss = _put(loss, values.cross_entropy, weights.cross_entropy, row_number, value)
    if spec.WITH_ACCEPTANCE:
        # Comparisons may have lost a NaN among the logits.
        number = sides.s.log_exp_sum + sides.t.log_exp_sum + log_mass
        poison = tl.where(number == number, 0.0, float("nan"))
        acceptance = sums.acceptance + poison
        # The target's other tokens, which have a probability of 1 - m under p and of 0 under q, add (1 - m) / 2.
        distance = sums.tvd - 0.5 * expm1(log_mass) + poison
        loss = _put(loss, values.tvd, weights.tvd, row_number, distance)
        clamped = tl.where(acceptance < LOWEST_ACCEPTANCE, LOWEST_ACCEPTANCE, acceptance)
        loss = _put(loss, values.nla, weights.nla, row_number, -tl.log(clamped))
        share = tl.exp(-eta * acceptance)
        hybrid = share * forward + (1.0 - share) * distance
        loss = _put(loss, values.lk_hybrid, weights.lk_hybrid, row_number, hybrid)
        if values.acceptance is not None:
            tl.store(values.acceptance + row_number, acceptance)
    tl.store(values.loss + row_number, weight * loss)
    return acceptance, share


@triton.jit
def _slopes(
    sides, sums, acceptance, share, weights, scale, spec,
    LOWEST_ACCEPTANCE: tl.constexpr = LOWEST_ACCEPTANCE,
):  # fmt: skip
    """Return the Slopes of a row. Each divergence has the gradient g - q (sum of g); see csrc/cpu/draft.cpp."""
    undefined = _undefined(sides)
    of_q, forward, reverse, jsd, tvd, label = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if weights.forward_kl is not None:
        forward += weights.forward_kl + undefined
    if weights.lk_hybrid is not None:
        forward += weights.lk_hybrid * share + undefined
        tvd += weights.lk_hybrid * (1.0 - share)
    of_q += forward
    if weights.reverse_kl is not None:
        reverse = weights.reverse_kl + undefined
        of_q -= reverse * sums.reverse
    if weights.jsd is not None:
        jsd = weights.jsd + undefined
        of_q -= jsd * sums.jsd_g
    if weights.cross_entropy is not None:
        label = weights.cross_entropy
        of_q += label
    if weights.tvd is not None:
        tvd += weights.tvd
    if weights.nla is not None:
        # A NaN acceptance makes the gradient NaN.
        too_low = acceptance < LOWEST_ACCEPTANCE
        tvd += tl.where(too_low, 0.0, weights.nla / acceptance)
    if spec.WITH_ACCEPTANCE:
        # The sum of q is 1 but for rounding. The quotient makes the gradient 0 if q > m p in all columns.
        of_q -= tvd * (sums.tvd_g / sums.q)
    return Slopes(
        scale * of_q, scale * forward, scale * reverse, scale * jsd, scale * tvd, scale * label
    )


@triton.jit
def _write_tile(
    row, gradient, start, lanes, sides, slopes, weights, sure, mass, log_mass,
    WHOLE: tl.constexpr, POLICY: tl.constexpr, spec,
):  # fmt: skip
    """Write the gradient of a tile, except in the column `sure`; return what was written.

    WHOLE: the tile contains neither the end of the row nor the label nor `sure`.
    """
    q, p, log_q, log_p, ratio = _probabilities(row, start, lanes, sides, WHOLE)
    value = q * slopes.q
    if weights.forward_kl is not None or weights.lk_hybrid is not None:
        value -= p * slopes.forward
    if weights.reverse_kl is not None:
        phi, _, _ = evaluate(spec.REVERSE, (), p, q, log_p, log_q, ratio, 1.0, POLICY, spec.FORM)
        value += phi * slopes.reverse
    if weights.jsd is not None:
        _, g, _ = evaluate(spec.JSD, (), p, q, log_p, log_q, ratio, 1.0, POLICY, spec.FORM)
        value += g * slopes.jsd
    if weights.tvd is not None or (weights.nla is not None or weights.lk_hybrid is not None):
        _, g, _ = evaluate(
            spec.TVD, (), p * mass, q, log_p, log_q, ratio + log_mass, 1.0, False, spec.FORM
        )
        value += g * slopes.tvd
    column = start + lanes
    if WHOLE:
        tl.store(gradient + column, value.to(gradient.dtype.element_ty))
    else:
        if weights.cross_entropy is not None:
            value -= tl.where(column == sides.t_argmax, slopes.label, 0.0)
        written = (column < row.D) & (column != sure)
        value = tl.where(written, value, 0.0)
        tl.store(gradient + column, value.to(gradient.dtype.element_ty), mask=written)
    return value


@triton.jit
def _sweep_gradient(
    row, gradient, sides, slopes, weights, mass, log_mass, POLICY: tl.constexpr, spec,
    SURE: tl.constexpr = SURE,
):  # fmt: skip
    """Write the gradient of a row."""
    lanes = tl.arange(0, spec.BLOCK_V)
    sure = tl.where(sides.s_rest < SURE, sides.s_argmax, -1)
    others = tl.zeros([spec.BLOCK_V], tl.float32)
    for number in range(tl.cdiv(row.D, spec.BLOCK_V)):
        start = number * spec.BLOCK_V
        special = tl.minimum(_place(sure, start), _place(sides.t_argmax, start))
        if (start + spec.BLOCK_V <= row.D) & (special >= spec.BLOCK_V):
            others += _write_tile(
                row, gradient, start, lanes, sides, slopes, weights, sure, mass, log_mass, True, POLICY, spec,
            )  # fmt: skip
        else:
            others += _write_tile(
                row, gradient, start, lanes, sides, slopes, weights, sure, mass, log_mass, False, POLICY, spec,
            )  # fmt: skip
    of_sure = -tl.sum(others, 0)
    if sure >= 0:
        tl.store(gradient + sure, of_sure.to(gradient.dtype.element_ty))


@triton.jit
def _compute_row(
    number, row, gradient, inputs, weights, values, eta, scale, V, spec,
):  # fmt: skip
    """Compute the loss, the terms and the gradient of a kept row."""
    weight = 1.0
    if inputs.weight is not None:
        weight = tl.load(inputs.weight + number)
    if inputs.scale is not None:
        scale *= tl.load(inputs.scale)
    sides = _sweep_statistics(row, spec)
    log_mass = tl.where(sides.empty, -float("inf"), 0.0)
    if V is not None:
        log_mass = _log_mass(row.teacher, V, sides, spec)
    mass = tl.exp(log_mass)
    WITH_LOGS: tl.constexpr = spec.WITH_KL or spec.WITH_JSD
    forward, reverse, jsd, jsd_g, acceptance, tvd, tvd_g, q = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0
    if WITH_LOGS:
        if sides.careful:
            forward, reverse, jsd, jsd_g, acceptance, tvd, tvd_g, q = _sweep_sums(
                row, sides, mass, log_mass, True, spec
            )
        else:
            forward, reverse, jsd, jsd_g, acceptance, tvd, tvd_g, q = _sweep_sums(
                row, sides, mass, log_mass, False, spec
            )
    elif spec.WITH_ACCEPTANCE:
        forward, reverse, jsd, jsd_g, acceptance, tvd, tvd_g, q = _sweep_sums(
            row, sides, mass, log_mass, False, spec
        )
    sums = DraftSums(forward, reverse, jsd, jsd_g, acceptance, tvd, tvd_g, q)
    acceptance, share = _store_values(
        number, row, sides, sums, log_mass, weight, weights, values, eta, spec
    )
    if gradient is not None:
        slopes = _slopes(sides, sums, acceptance, share, weights, weight * scale, spec)
        if WITH_LOGS:
            if sides.careful:
                _sweep_gradient(
                    row, gradient, sides, slopes, weights, mass, log_mass, True,
                    spec,
                )  # fmt: skip
            else:
                _sweep_gradient(
                    row, gradient, sides, slopes, weights, mass, log_mass, False,
                    spec,
                )  # fmt: skip
        else:
            _sweep_gradient(row, gradient, sides, slopes, weights, mass, log_mass, False, spec)


@triton.jit
def _drop_row(number, gradient, values, D, BLOCK_V: tl.constexpr, OUTPUTS: tl.constexpr = OUTPUTS):
    """Store zeros for a dropped row, which is not read."""
    for field in tl.static_range(OUTPUTS):
        if values[field] is not None:
            tl.store(values[field] + number, 0.0)
    if gradient is not None:
        sweep_zeros(gradient, D, None, BLOCK_V)


# ids is not specialized, so Triton does not know its alignment, and each thread loads ids one by one. It loads the
# logits in their places one by one in any case, and all tensors of a sweep share a layout.
@triton.jit(do_not_specialize=["ids"])
def draft_kernel(
    student, teacher, gradient, ids, inputs, weights, values, eta, scale, sizes, D,
    V,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    JSD: tl.constexpr,
    TVD: tl.constexpr,
    FORM: tl.constexpr,
    WITH_KL: tl.constexpr,
    WITH_JSD: tl.constexpr,
    WITH_ACCEPTANCE: tl.constexpr,
    WITH_LABEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute one row. V: the number of the target's columns, or None if their normalizer is not needed."""
    number = tl.program_id(0)
    of_gradient = None
    if gradient.pointer is not None:
        of_gradient = row_pointer(gradient, number, sizes, ALIGNED)
    if is_kept(inputs, number, 0):
        row = Row(
            row_pointer(student, number, sizes, ALIGNED),
            row_pointer(teacher, number, sizes, ALIGNED),
            ids,
            D,
        )
        _compute_row(
            number, row, of_gradient, inputs, weights, values, eta, scale, V,
            # Not a variable: an assignment would turn its constexprs into tensors.
            Spec(
                FORWARD, REVERSE, JSD, TVD, FORM, WITH_KL, WITH_JSD, WITH_ACCEPTANCE, WITH_LABEL,
                BLOCK_V,
            ),
        )  # fmt: skip
    else:
        _drop_row(number, of_gradient, values, D, BLOCK_V)


def _needs(terms: Terms) -> tuple[bool, bool, bool, bool]:
    """WITH_KL, WITH_JSD, WITH_ACCEPTANCE and WITH_LABEL."""
    logs = any(terms.needed(name) for name in ("forward_kl", "reverse_kl", "lk_hybrid"))
    needs = (terms.needed("jsd"), terms.of_acceptance, terms.needed("cross_entropy"))
    return (logs, *needs)


def draft_rows(
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    terms: Terms,
    want: Want,
) -> Result:
    """Compute all terms of each row, and the gradient of their sum; :mod:`fastkd.call.draft` has the contract."""
    rows = readable_rows(rows)
    lead, size, width = student.shape[:-1], student.shape[-1], teacher.shape[-1]
    source, teacher = unit_stride(student), unit_stride(teacher)
    gradient = None
    if want.student_gradient:
        gradient = (
            source
            if want.inplace
            else torch.empty_like(source, memory_format=torch.contiguous_format)
        )
    loss = torch.empty(lead, dtype=torch.float32, device=student.device)
    acceptance = torch.empty_like(loss) if terms.measured else None
    values = {name: torch.empty_like(loss) for name in terms.weights if terms.measured}
    if loss.numel():
        given = [source, teacher] if gradient is None else [source, teacher, gradient]
        sizes, (s_view, t_view, *of_gradient) = lay_out(*given)
        ids = None
        if terms.columns is not None:
            ids = readable(terms.columns).to(torch.int32).contiguous()
        itemsize = min(source.itemsize, teacher.itemsize)
        # Gathered columns are loaded one by one, and all tensors of a sweep share a layout.
        aligned = ids is None and is_aligned(size, s_view, t_view, *of_gradient)
        # Each column of a tile has eight accumulators, so tiles are small.
        block, warps = tile(size, itemsize, True, aligned)
        arguments = (
            s_view,
            t_view,
            of_gradient[0] if of_gradient else View(None, None, None),
            ids,
            Inputs(None, rows.weight, rows.scale),
            Weights(*(terms.weight(name) or None for name in LOSSES)),
            Values(loss, acceptance, *(values.get(name) for name in LOSSES)),
            terms.eta,
            options.scale,
            sizes,
            size,
            width if ids is not None and terms.of_acceptance else None,
            *(bind(divergence.function) for divergence in DIVERGENCES),
            *{form_of(divergence) for divergence in DIVERGENCES},
            *_needs(terms),
            aligned,
            block,
        )
        with on_device(student.device):
            launch(
                draft_kernel,
                (loss.numel(), 1, 1),
                arguments,
                num_warps=warps,
                enable_fp_fusion=True,
                **register_limit(True),
            )
    if want.inplace and gradient is not None:
        gradient = student if source is student else student.copy_(source)
    return Result(loss, gradient, acceptance, values)
