"""Log-probabilities in Triton: the statistics of rows of logits, and their gradient in place.

fastkd/backends/logprobs.py computes the same in PyTorch, and the top tokens. One program processes a row in one sweep.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.backends import logprobs as in_torch
from fastkd.core.tensors import readable

from .kernel import View, row_pointer
from .launch import is_aligned, on_device, register_limit, tile
from .launcher import launch
from .normalizer import (
    add_centered_columns,
    add_columns,
    exponential,
    merge_centered,
    merge_lanes,
    start_lanes,
)
from .skeleton import squash
from .sweeps import finite_max

LEAST_GAP = tl.constexpr(in_torch.LEAST_GAP)


class Tempering(NamedTuple):
    """How logits become tempered logits: fastkd.backends.logprobs.Tempering. A field that changes nothing is None."""

    logit_scale: Any
    softcap: Any
    softcap_gain: Any  # logit_scale / softcap
    temperature: Any
    temperatures: Any  # float32 [rows]


@triton.jit
def _temperature_of(tempering, row):
    """Return (the temperature of a row, its reciprocal)."""
    temperature = 1.0
    if tempering.temperatures is not None:
        temperature = tl.load(tempering.temperatures + row)
    elif tempering.temperature is not None:
        temperature = tempering.temperature
    return temperature, tl.div_rn(1.0, temperature)


@triton.jit
def _temper(x, tempering, temperature, reciprocal):
    """Return (tempered logits, their derivative with respect to the logits x, times the temperature)."""
    z, slope = x, 1.0
    if tempering.softcap is not None:
        squashed, slope = squash(tempering.softcap_gain * x)
        z = tempering.softcap * squashed
    elif tempering.logit_scale is not None:
        z = tempering.logit_scale * x
    if tempering.logit_scale is not None:
        slope *= tempering.logit_scale
    TEMPERED: tl.constexpr = tempering.temperature is not None or tempering.temperatures is not None
    if TEMPERED:
        # Round the quotient correctly. An infinite quotient stays, because the correction would make it NaN.
        quotient = z * reciprocal
        corrected = tl.fma(tl.fma(-quotient, temperature, z), reciprocal, quotient)
        z = tl.where(tl.abs(quotient) < float("inf"), corrected, quotient)
    return z, slope


@triton.jit
def logprob_statistics_kernel(
    logits, sizes, tempering, statistics, V,
    IDENTITY: tl.constexpr, CENTERED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
    LEAST_GAP: tl.constexpr = LEAST_GAP,
):  # fmt: skip
    """Temper the logits of a row in place; store max, exp_sum and the sum of e (z - max), or 0 if not CENTERED."""
    row = tl.program_id(0)
    pointer = row_pointer(logits, row, sizes, ALIGNED)
    temperature, reciprocal = _temperature_of(tempering, row)
    lanes = tl.arange(0, BLOCK_V)
    lane_max, others = start_lanes(BLOCK_V)
    centered = tl.zeros([BLOCK_V], tl.float32)
    for number in range(tl.cdiv(V, BLOCK_V)):
        column = number * BLOCK_V + lanes
        x = tl.load(pointer + column, mask=column < V, other=0.0)
        z, _ = _temper(x, tempering, temperature, reciprocal)
        if not IDENTITY:
            tl.store(pointer + column, z, mask=column < V)
        z = tl.where(column < V, z, -float("inf"))
        if CENTERED:
            lane_max, others, centered = add_centered_columns(
                lane_max, others, centered, z, LEAST_GAP
            )
        else:
            lane_max, others = add_columns(lane_max, others, z, True)
    row_max, rest, own = merge_lanes(lane_max, others)
    row_centered = 0.0
    if CENTERED:
        row_centered = merge_centered(lane_max, others, own, centered, row_max, LEAST_GAP)
    of_max = tl.where(row_max == -float("inf"), 0.0, 1.0)
    place = statistics + row.to(tl.int64) * 3
    tl.store(place, row_max.to(tl.float64))
    tl.store(place + 1, rest.to(tl.float64) + of_max.to(tl.float64))
    tl.store(place + 2, row_centered)


@triton.jit
def logprob_gradient_kernel(
    logits, sizes, tempering, maxima, maxima_stride, coefficients, V,
    ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr, LEAST_GAP: tl.constexpr = LEAST_GAP,
):  # fmt: skip
    """Overwrite the logits of a row with e (a + b (z - max)) dz/dlogit T, where a and b are its coefficients."""
    row = tl.program_id(0)
    pointer = row_pointer(logits, row, sizes, ALIGNED)
    temperature, reciprocal = _temperature_of(tempering, row)
    center = finite_max(tl.load(maxima + row.to(tl.int64) * maxima_stride).to(tl.float32))
    a = tl.load(coefficients + 2 * row).to(tl.float32)
    b = tl.load(coefficients + 2 * row + 1).to(tl.float32)
    lanes = tl.arange(0, BLOCK_V)
    for number in range(tl.cdiv(V, BLOCK_V)):
        column = number * BLOCK_V + lanes
        x = tl.load(pointer + column, mask=column < V, other=0.0)
        z, slope = _temper(x, tempering, temperature, reciprocal)
        gap = tl.maximum(z - center, LEAST_GAP)
        gradient = exponential(gap) * (a + b * gap) * slope
        tl.store(pointer + column, gradient, mask=column < V)


def _launch(
    kernel: Any,
    logits: Tensor,
    tempering: in_torch.Tempering,
    outputs: tuple[Any, ...],
    flags: tuple[bool, ...],
) -> None:
    """Launch a kernel with one program per row of the logits."""
    count, columns = logits.shape
    if not count:
        return
    scale, cap = tempering.logit_scale, tempering.softcap
    of_kernel = Tempering(
        None if scale == 1.0 else scale,
        cap or None,
        scale / cap if cap else None,
        None if tempering.temperature == 1.0 else tempering.temperature,
        tempering.temperatures
        if tempering.temperatures is None
        else readable(tempering.temperatures).contiguous(),
    )
    view = View(logits, (0, 0, logits.stride(0)), None)
    aligned = is_aligned(columns, view)
    crowded = cap > 0.0
    block, warps = tile(columns, logits.itemsize, crowded, aligned)
    constants = (*flags, aligned, block)
    with on_device(logits.device):
        launch(
            kernel,
            (count, 1, 1),
            (view, (1, count), of_kernel, *outputs, columns, *constants),
            num_warps=warps,
            enable_fp_fusion=True,
            **register_limit(crowded),
        )


def logprob_statistics(logits: Tensor, tempering: in_torch.Tempering, centered: bool) -> Tensor:
    """Compute the same as :func:`fastkd.backends.logprobs.logprob_statistics`."""
    if not logits.shape[1]:
        return in_torch.logprob_statistics(logits, tempering, centered)
    statistics = torch.empty(logits.shape[0], 3, dtype=torch.float64, device=logits.device)
    identity = tempering.temperatures is None and tempering[:3] == in_torch.Tempering()[:3]
    _launch(logprob_statistics_kernel, logits, tempering, (statistics,), (identity, centered))
    return statistics


def logprob_gradients(
    logits: Tensor, tempering: in_torch.Tempering, maxima: Tensor, coefficients: Tensor
) -> None:
    """Compute the same as :func:`fastkd.backends.logprobs.logprob_gradients`."""
    if logits.shape[1]:
        outputs = (maxima, maxima.stride(0), coefficients.contiguous())
        _launch(logprob_gradient_kernel, logits, tempering, outputs, ())
