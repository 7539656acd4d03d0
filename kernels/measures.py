"""The measures of dense rows in Triton (fastkd/call/measures.py), from the statistics and the last sweep of the loss.

The columns of a narrow row are in registers (``tile_measures``). Any other row is read once more, by the sweep that
writes its gradients (``gradient.py``, ``sweep_measures``). If several programs share a row, each stores partial sums,
and ``merge_kernel`` adds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.call.measures import DENSE_MEASURES

from .skeleton import NEGLIGIBLE, exp
from .sweeps import (
    _read_tile,
    _sum_tile,
    evaluate_log_ratio,
    fold_min,
    log_probability,
    probability,
)

COUNT = tl.constexpr(len(DENSE_MEASURES))
# Partial results of a program: its part of four sums, and the first column in which each side has the row's maximum.
PARTIALS = 6


@triton.jit
def _terms(p, q, log_p, log_ratio, POLICY: tl.constexpr, NEGLIGIBLE: tl.constexpr = NEGLIGIBLE):
    """Return the terms of the teacher's entropy, of forward and reverse KL, and of the acceptance, for each column.

    POLICY: with the policy of fastkd/call/log_zero.py.
    """
    entropy = -p * log_p
    forward, reverse = p * log_ratio, -q * log_ratio
    if POLICY:
        entropy = tl.where(p == 0.0, 0.0, entropy)
        forward_is_0 = (p == 0.0) | ((log_ratio == float("inf")) & (p < NEGLIGIBLE))
        forward = tl.where(forward_is_0, 0.0, forward)
        reverse_is_0 = (q == 0.0) | ((log_ratio == -float("inf")) & (q < NEGLIGIBLE))
        reverse = tl.where(reverse_is_0, 0.0, reverse)
    return entropy, forward, reverse, tl.minimum(p, q)


@triton.jit
def _first_columns(z, norm, column, V):
    """Return each column that has the row's maximum, and V or more in place of the others."""
    return tl.where(z == norm.max, column, V)


@triton.jit
def measure_tile(start, lanes, row, SPECIAL: tl.constexpr, spec):
    """Return the sums of the measures' terms over each thread's columns of a tile, and the first columns of the maxima.

    In the compiled code, the measures and the gradients share loads and exponentials.
    """
    statistics, V = row.statistics, row.columns.V
    s, _ = _read_tile(row.student, start, lanes, V, not SPECIAL, spec.HEAD)
    t, _ = _read_tile(row.teacher, start, lanes, V, not SPECIAL, spec.HEAD)
    entropy, forward, reverse, acceptance = _terms(
        probability(t, statistics.t_norm),
        probability(s, statistics.s_norm),
        log_probability(t, statistics.t_norm),
        evaluate_log_ratio(s, t, statistics.log_ratio),
        SPECIAL,
    )
    column = start + lanes
    s_first = _first_columns(s, statistics.s_norm, column, V)
    t_first = _first_columns(t, statistics.t_norm, column, V)
    return (
        _sum_tile(entropy, spec),
        _sum_tile(forward, spec),
        _sum_tile(reverse, spec),
        _sum_tile(acceptance, spec),
        fold_min(s_first, spec.ADJACENT, spec.THREADS),
        fold_min(t_first, spec.ADJACENT, spec.THREADS),
    )


@triton.jit
def tile_measures(row, tile, statistics, out, columns, spec):
    """Store the measures of a row whose columns are in registers.

    The probabilities are not computed by `probability`. If they were, the compiler would compute their products only
    here and reuse them in the branches of `evaluate_row`. It could not fuse them with the additions there, and the
    gradients would differ in the last bits from those of a call without measures.
    """
    exists = tl.arange(0, spec.BLOCK_V) < columns.V
    log_p = log_probability(tile.t, statistics.t_norm)
    p = tl.where(exists, exp(log_p), 0.0)
    q = tl.where(exists, exp(log_probability(tile.s, statistics.s_norm)), 0.0)
    log_ratio = evaluate_log_ratio(tile.s, tile.t, statistics.log_ratio)
    entropy, forward, reverse, acceptance = _terms(p, q, log_p, log_ratio, True)
    store_measures(
        row,
        tl.sum(entropy, 0),
        tl.sum(forward, 0),
        tl.sum(reverse, 0),
        tl.sum(acceptance, 0),
        statistics.s_argmax.column.to(
            tl.int32
        ),  # in a row of one tile, the first column of the maximum
        statistics.t_argmax.column.to(tl.int32),
        statistics,
        out,
        columns.split,
    )


@triton.jit
def store_measures(
    row, entropy, forward, reverse, acceptance, s_first, t_first, statistics, out, split,
    PARTIALS: tl.constexpr = PARTIALS,
):  # fmt: skip
    """Store the measures of a row, or this program's part of them."""
    # A comparison may hide a NaN, and a side that is -inf throughout has no distribution.
    log_exp_sums = statistics.s_norm.log_exp_sum + statistics.t_norm.log_exp_sum
    acceptance = tl.where(tl.abs(log_exp_sums) < float("inf"), acceptance, float("nan"))
    if split.num_splits is not None:
        place = split.measures + row.to(tl.int64) * PARTIALS * split.num_splits + tl.program_id(1)
        tl.store(place, entropy)
        tl.store(place + split.num_splits, forward)
        tl.store(place + 2 * split.num_splits, reverse)
        tl.store(place + 3 * split.num_splits, acceptance)
        tl.store(place + 4 * split.num_splits, s_first.to(tl.float32))
        tl.store(place + 5 * split.num_splits, t_first.to(tl.float32))
    else:
        _store_row(row, entropy, forward, reverse, acceptance, s_first == t_first, out)


@triton.jit
def _store_row(row, entropy, forward, reverse, acceptance, agreement, out):
    place = out + row.to(tl.int64) * COUNT
    tl.store(place, entropy)
    tl.store(place + 1, forward)
    tl.store(place + 2, reverse)
    tl.store(place + 3, acceptance)
    tl.store(place + 4, agreement.to(tl.float32))


@triton.jit
def merge_kernel(partials, num_splits, out, PARTIALS: tl.constexpr, LANES: tl.constexpr):
    """Store the measures of one row, from the partial results of its programs; a dropped row gets arbitrary ones."""
    row = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    exists = lanes < num_splits
    place = partials + row.to(tl.int64) * PARTIALS * num_splits + lanes
    entropy = tl.sum(tl.load(place, mask=exists, other=0.0), 0)
    forward = tl.sum(tl.load(place + num_splits, mask=exists, other=0.0), 0)
    reverse = tl.sum(tl.load(place + 2 * num_splits, mask=exists, other=0.0), 0)
    acceptance = tl.sum(tl.load(place + 3 * num_splits, mask=exists, other=0.0), 0)
    s_first = tl.min(tl.load(place + 4 * num_splits, mask=exists, other=float("inf")), 0)
    t_first = tl.min(tl.load(place + 5 * num_splits, mask=exists, other=float("inf")), 0)
    _store_row(row, entropy, forward, reverse, acceptance, s_first == t_first, out)
