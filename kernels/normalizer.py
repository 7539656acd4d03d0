"""The normalizer of a row in one sweep, with one exponential per column.

Each lane is one column of every tile. It has a running maximum, and the sum of the other exponentials relative to it:
the column of the maximum would contribute exactly 1, and is left out. So a sum of 1e-9 beside the maximum keeps its
digits, and a rising maximum needs no exponential of its own: the one that rescales the sum is also what the former
maximum contributes to it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .skeleton import LOWEST, exp2_of_scaled, scaled


@triton.jit
def exponential(x, EXACT: tl.constexpr = True):
    """Return e to the power x. EXACT: with a correction of what rounding x log2(e) loses."""
    return exp2_of_scaled(scaled(x, 1.0), x, 1.0, EXACT)


@triton.jit
def start_lanes(BLOCK_V: tl.constexpr, LOWEST: tl.constexpr = LOWEST):
    """Return (maximum, sum of the other exponentials) of lanes without a column."""
    # A finite start, so that no difference is infinite minus infinite.
    return tl.full([BLOCK_V], LOWEST, tl.float32), tl.zeros([BLOCK_V], tl.float32)


@triton.jit
def add_columns(lane_max, others, z, EXACT: tl.constexpr):
    """Return (maximum, sum of the other exponentials) with these columns."""
    e = exponential(-tl.abs(z - lane_max), EXACT)
    others = tl.where(z > lane_max, e, 1.0) * others + e
    return tl.maximum(lane_max, z), others


@triton.jit
def add_centered_columns(lane_max, others, centered, z, LEAST_GAP: tl.constexpr):
    """Return what `add_columns` returns, and the sum of e (z - maximum). Gaps count as LEAST_GAP at least."""
    gap = -tl.abs(z - lane_max)
    e = exponential(gap)
    gap = tl.maximum(gap, LEAST_GAP)
    rises = z > lane_max
    factor = tl.where(rises, e, 1.0)
    centered = factor * (centered + tl.where(rises, gap, 0.0) * others) + e * gap
    return tl.maximum(lane_max, z), factor * others + e, centered


@triton.jit
def merge_lanes(lane_max, others, LOWEST: tl.constexpr = LOWEST):
    """Return (maximum of a row, sum of the other exponentials, what each lane adds to the sum for its own maximum).

    The maximum is -inf if every z is -inf. The sum is NaN if a z is +inf.
    """
    row_max = tl.max(lane_max, 0)
    lanes = tl.arange(0, lane_max.shape[0])
    first = tl.min(tl.where(lane_max == row_max, lanes, lane_max.shape[0]), 0)
    # In a lane whose maximum is still LOWEST, the sum leaves out no column: a z of -inf has added 0, one of LOWEST 1.
    own = tl.where((lane_max > LOWEST) & (lanes != first), 1.0, 0.0)
    factor = exponential(lane_max - row_max)
    # Not fused with the first addition of tl.sum, which would give lanes different sums (sweeps.rescale_sum).
    total = tl.sum(tl.where(factor == 1.0, others + own, factor * (others + own)), 0)
    raised = row_max > LOWEST
    rest = tl.where(raised | (total == 0.0), total, total - 1.0)
    rest = tl.where(row_max == float("inf"), float("nan"), rest)
    return tl.where(raised | (total != 0.0), row_max, -float("inf")), rest, own


@triton.jit
def merge_centered(
    lane_max, others, own, centered, row_max, LEAST_GAP: tl.constexpr, LOWEST: tl.constexpr = LOWEST
):
    """Return the sum of e (z - maximum) of a row, from what `merge_lanes` took and returned."""
    gap = tl.where(lane_max > LOWEST, tl.maximum(lane_max - row_max, LEAST_GAP), 0.0)
    factor = exponential(gap)
    moved = centered + gap * (others + own)
    return tl.sum(tl.where(factor == 1.0, moved, factor * moved), 0)
