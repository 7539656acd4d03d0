"""The measures of dense rows in Triton (fastkd/call/measures.py), in a launch of their own.

One program computes the measures of a row. It reads both sides twice: for their normalizers, and for the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.backends.native import readable_rows
from fastkd.call.contract import Options, Rows
from fastkd.call.measures import DENSE_MEASURES
from fastkd.core.tensors import unit_stride

from .kernel import Inputs, is_kept, open_side
from .launch import (
    is_aligned,
    lay_out,
    on_device,
    register_limit,
    student_side,
    teacher_side,
    tile,
)
from .launcher import launch
from .skeleton import LOWEST, NEGLIGIBLE, exp_scaled
from .sweeps import Normalizer, Row, log_probability, read

COUNT = tl.constexpr(len(DENSE_MEASURES))


@triton.jit
def _normalizer(row, V, BLOCK_V: tl.constexpr, LOWEST: tl.constexpr = LOWEST):
    """Return (Normalizer of a side, the first column of its maximum). Each lane has its own maximum and sum."""
    lanes = tl.arange(0, BLOCK_V)
    lane_max = tl.full([BLOCK_V], LOWEST, tl.float32)
    exp_sum = tl.zeros([BLOCK_V], tl.float32)
    argmax = tl.zeros([BLOCK_V], tl.int32)
    for number in range(tl.cdiv(V, BLOCK_V)):
        column = number * BLOCK_V + lanes
        z, _ = read(row, column, V)
        old_max, lane_max = lane_max, tl.maximum(lane_max, z)
        argmax = tl.where(z > old_max, column, argmax)
        exp_sum *= exp_scaled(old_max - lane_max, row.unit)
        exp_sum += exp_scaled(z - lane_max, row.unit)
    row_max = tl.max(lane_max, 0)
    log_exp_sum = tl.log(tl.sum(exp_sum * exp_scaled(lane_max - row_max, row.unit), 0))
    first = tl.min(tl.where(lane_max == row_max, argmax, V), 0)
    return Normalizer(row_max, row.unit, log_exp_sum, 0.0), first


@triton.jit
def _measure_row(
    row, student, teacher, out, V, BLOCK_V: tl.constexpr, NEGLIGIBLE: tl.constexpr = NEGLIGIBLE
):
    """Store the measures of a kept row, with the policy of fastkd/call/log_zero.py."""
    s_norm, s_argmax = _normalizer(student, V, BLOCK_V)
    t_norm, t_argmax = _normalizer(teacher, V, BLOCK_V)
    lanes = tl.arange(0, BLOCK_V)
    zero = tl.zeros([BLOCK_V], tl.float32)
    entropy, forward, reverse, acceptance = zero, zero, zero, zero
    for number in range(tl.cdiv(V, BLOCK_V)):
        column = number * BLOCK_V + lanes
        s, _ = read(student, column, V)
        t, _ = read(teacher, column, V)
        log_q, log_p = log_probability(s, s_norm), log_probability(t, t_norm)
        q, p = tl.exp(log_q), tl.exp(log_p)
        forward_is_0 = (p == 0.0) | ((log_q == -float("inf")) & (p < NEGLIGIBLE))
        reverse_is_0 = (q == 0.0) | ((log_p == -float("inf")) & (q < NEGLIGIBLE))
        entropy += tl.where(p == 0.0, 0.0, -p * log_p)
        forward += tl.where(forward_is_0, 0.0, p * (log_p - log_q))
        reverse += tl.where(reverse_is_0, 0.0, q * (log_q - log_p))
        acceptance += tl.where(p < q, p, q)
    # p < q is False if p is NaN, so the acceptance would not show a NaN of the teacher. The teacher's entropy does.
    is_number = tl.sum(entropy, 0) == tl.sum(entropy, 0)
    place = out + row.to(tl.int64) * COUNT
    tl.store(place, tl.sum(entropy, 0))
    tl.store(place + 1, tl.sum(forward, 0))
    tl.store(place + 2, tl.sum(reverse, 0))
    tl.store(place + 3, tl.where(is_number, tl.sum(acceptance, 0), float("nan")))
    tl.store(place + 4, (s_argmax == t_argmax).to(tl.float32))


@triton.jit(do_not_specialize=["sizes"])
def measure_kernel(
    student_side, teacher_side, inputs, out, ignore_index, sizes, V,
    ALIGNED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store the measures of one row; a dropped row is not read."""
    row = tl.program_id(0)
    if is_kept(inputs, row, ignore_index):
        s_logits, s_gradient, s_unit, s_temperature = open_side(student_side, row, sizes, ALIGNED)
        t_logits, t_gradient, t_unit, t_temperature = open_side(teacher_side, row, sizes, ALIGNED)
        student = Row(s_logits, s_gradient, s_unit, None, s_temperature, student_side)
        teacher = Row(t_logits, t_gradient, t_unit, None, t_temperature, teacher_side)
        _measure_row(row, student, teacher, out, V, BLOCK_V)


def measure_rows(student: Tensor, teacher: Tensor, rows: Rows, options: Options) -> Tensor:
    """Compute the measures of dense rows, [..., len(DENSE_MEASURES)]; those of dropped rows are not written."""
    student, teacher, rows = unit_stride(student), unit_stride(teacher), readable_rows(rows)
    lead, columns = student.shape[:-1], options.vocab_size
    out = student.new_empty((*lead, len(DENSE_MEASURES)), dtype=torch.float32)
    if not lead.numel():
        return out
    sizes, (s_view, t_view) = lay_out(student, teacher)
    aligned = is_aligned(columns, s_view, t_view)
    # In the second sweep, each column of a tile has four accumulators, so tiles are small.
    block, warps = tile(columns, min(student.itemsize, teacher.itemsize), True, aligned)
    with on_device(student.device):
        arguments = (
            student_side(s_view, None, rows, options),
            teacher_side(t_view, None, rows, options),
            Inputs(rows.labels, rows.weight, None),
            out,
            options.ignore_index,
            sizes,
            columns,
            aligned,
            block,
        )
        launch(
            measure_kernel,
            (lead.numel(), 1, 1),
            arguments,
            num_warps=warps,
            enable_fp_fusion=True,
            **register_limit(True),
        )
    return out
