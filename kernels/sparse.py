"""Sparse teachers in Triton: the two steps of :mod:`fastkd.backends.sparse` that need the student's whole row.

`gather_kernel` computes the events of a row, and `spread_kernel` its gradient from that of its events. A bitmap has one
bit per column that is set for the teacher's tokens, and sweeps skip these columns. To subtract the tokens from the sum
over all columns would lose the digits of a small tail.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.backends.native import readable_rows
from fastkd.backends.sparse import Events
from fastkd.call.contract import Options, Rows
from fastkd.core.tensors import unit_stride

from .gradient import sweep_zeros
from .kernel import Inputs, is_kept, open_side
from .launch import (
    is_aligned,
    lay_out,
    on_device,
    register_limit,
    student_side,
    threads_of,
    tile,
    vocab_shard,
)
from .launcher import launch
from .skeleton import LN2, LOWEST, exp_scaled, scaled
from .sweeps import (
    Row,
    finite_max,
    fold,
    fold_max,
    read,
    rescale_moment,
    rescale_sum,
    spread,
)

BLOCK_K = 256
BITS_PER_WORD = tl.constexpr(32)


class Tokens(NamedTuple):
    """The teacher's tokens."""

    ids: Any  # int64 [rows, K]; vocabulary indices, or -1
    K: Any
    bitmap: Any  # int32 [rows, words], one bit per column
    words: Any
    shard: Any  # sweeps.VocabShard, or None


class EventOutputs(NamedTuple):
    """The tensors of fastkd.backends.sparse.Events: float32 [rows], tokens [rows, K]; None if not wanted."""

    max: Any  # largest z of the tokens, before Side.unit_t1
    tail_max: Any  # largest z of the other columns
    tokens: Any
    tail: Any
    tail_log_sum: Any
    tail_entropy: Any
    log_sum: Any
    label: Any
    mean: Any


class EventGradients(NamedTuple):
    """What a row's gradient is computed from."""

    events: Any  # float32 [rows, K + 1]: the gradient of the events
    ce_scale: Any  # float32 [rows], factor of the cross-entropy's gradient; or None
    smoothing: Any  # or None


class TailSums(NamedTuple):
    """Sums over the columns that are not tokens, relative to their maximum; 0 if not asked for."""

    max: Any
    exp_sum: Any
    exp_sum_t1: Any
    entropy_moment: Any
    z_sum: Any  # of all columns, tokens included


@triton.jit
def _vocabulary(tokens, V):
    """Return the number of columns of all processes."""
    if tokens.shard is not None:
        V = tokens.shard.total
    return V


@triton.jit
def _label_column(inputs, tokens, row):
    """Return the label's column; it is outside [0, V) if another process has it, or if the label is not valid."""
    column = tl.load(inputs.labels + row)
    if tokens.shard is not None:
        column -= tokens.shard.first
    return column


@triton.jit
def _load_tokens(tokens, row, start, V, BLOCK_K: tl.constexpr):
    """Load a tile of ids; return (index in the row, whether the id is valid, whether its column is here, column)."""
    index = start + tl.arange(0, BLOCK_K)
    offset = row.to(tl.int64) * tokens.K + index
    ids = tl.load(tokens.ids + offset, mask=index < tokens.K, other=-1)
    valid = (ids >= -1) & (ids < _vocabulary(tokens, V))
    if tokens.shard is not None:
        ids -= tokens.shard.first
    here = (ids >= 0) & (ids < V)
    return index, valid, here, tl.where(here, ids, 0).to(tl.int32)


@triton.jit
def mark_kernel(tokens, valid_rows, V, BLOCK_K: tl.constexpr):
    """Set the bits of a row's tokens, and store whether all ids are valid and none occurs twice."""
    row = tl.program_id(0)
    wrong = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, tokens.K, BLOCK_K):
        _, valid, here, column = _load_tokens(tokens, row, start, V, BLOCK_K)
        bit = (tl.full([BLOCK_K], 1, tl.int32)) << (column % BITS_PER_WORD)
        word = tokens.bitmap + row.to(tl.int64) * tokens.words + column // BITS_PER_WORD
        before = tl.atomic_or(word, bit, mask=here)
        twice = here & ((before & bit) != 0)
        wrong = tl.where(twice | ~valid, 1, wrong)
    tl.store(valid_rows + row, tl.max(wrong, 0) == 0)


@triton.jit
def _is_token(tokens, row, column, V):
    """Return whether these columns are tokens of the teacher."""
    offset = row.to(tl.int64) * tokens.words + column // BITS_PER_WORD
    word = tl.load(tokens.bitmap + offset, mask=column < V, other=0)
    return ((word >> (column % BITS_PER_WORD)) & 1) != 0


@triton.jit
def _sweep_tail(
    row,
    student,
    tokens,
    out,
    V,
    SWEEP: tl.constexpr,
    ADJACENT: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LOWEST: tl.constexpr = LOWEST,
    LN2: tl.constexpr = LN2,
):
    """Return the TailSums of a row: an online softmax of the columns that are not tokens. SWEEP False: no tail."""
    lanes = tl.arange(0, BLOCK_V)
    zero = fold(tl.zeros([BLOCK_V], tl.float32), ADJACENT, THREADS)
    tail_max = zero + LOWEST
    exp_sum, exp_sum_t1, entropy_moment, z_sum = zero, zero, zero, zero
    unit_t1 = student.side.unit_t1
    if SWEEP:
        for number in range(tl.cdiv(V, BLOCK_V)):
            column = number * BLOCK_V + lanes
            z, _ = read(student, column, V)
            if out.mean is not None:
                z_sum += fold(tl.where(column < V, z, 0.0), ADJACENT, THREADS)
            z = tl.where(_is_token(tokens, row, column, V), -float("inf"), z)
            old_max, tail_max = tail_max, tl.maximum(tail_max, fold_max(z, ADJACENT, THREADS))
            z = z - spread(tail_max, ADJACENT, BLOCK_V)
            x = scaled(z, student.unit)
            e = tl.exp2(x)
            step = scaled(tail_max - old_max, student.unit)
            factor = tl.exp2(-step)
            if out.tail_entropy is not None:
                entropy_moment = rescale_moment(entropy_moment, -step, exp_sum, factor)
                entropy_moment += fold(e * tl.maximum(x, LOWEST), ADJACENT, THREADS)
            if out.log_sum is not None:
                exp_sum_t1 *= exp_scaled(old_max - tail_max, unit_t1)
                exp_sum_t1 += fold(exp_scaled(z, unit_t1), ADJACENT, THREADS)
            exp_sum = factor * exp_sum + fold(e, ADJACENT, THREADS)
    row_max = tl.max(tail_max, 0)
    rise = row_max - tail_max
    step = scaled(rise, student.unit)
    factor = tl.exp2(-step)
    entropy_moment = rescale_moment(entropy_moment, -step, exp_sum, factor)
    row_exp_sum = tl.sum(rescale_sum(exp_sum, rise, factor), 0)
    # The lane of the maximum has a sum of at least 1, unless every column is a token or -inf.
    row_max = tl.where(row_exp_sum == 0.0, -float("inf"), row_max)
    return TailSums(
        row_max,
        row_exp_sum,
        tl.sum(rescale_sum(exp_sum_t1, rise, exp_scaled(-rise, unit_t1)), 0),
        LN2 * tl.sum(entropy_moment, 0),
        tl.sum(z_sum, 0),
    )


@triton.jit
def _max_of_tokens(row, student, tokens, V, BLOCK_K: tl.constexpr):
    """Return the largest z of a row's tokens; -inf if none is here."""
    token_max = tl.full([], -float("inf"), tl.float32)
    for start in range(0, tokens.K, BLOCK_K):
        _, _, here, column = _load_tokens(tokens, row, start, V, BLOCK_K)
        z, _ = read(student, column, V)
        token_max = tl.maximum(token_max, tl.max(tl.where(here, z, -float("inf")), 0))
    return token_max


@triton.jit
def _gather_row(
    row,
    student,
    temperature,
    tokens,
    inputs,
    out,
    V,
    SWEEP: tl.constexpr,
    ADJACENT: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store the events of a counted row."""
    tail = _sweep_tail(row, student, tokens, out, V, SWEEP, ADJACENT, THREADS, BLOCK_V)
    no_tail = tail.max == -float("inf")
    token_max = _max_of_tokens(row, student, tokens, V, BLOCK_K)
    origin = finite_max(token_max)
    unit = student.side.unit_t1
    row_max = finite_max(tl.maximum(token_max, tail.max))
    exp_sum_t1 = tail.exp_sum_t1 * tl.exp((finite_max(tail.max) - row_max) * unit)
    exp_sum_t1 = tl.where(no_tail, 0.0, exp_sum_t1)
    for start in range(0, tokens.K, BLOCK_K):
        index, _, here, column = _load_tokens(tokens, row, start, V, BLOCK_K)
        z, _ = read(student, column, V)
        z = tl.where(here, z, -float("inf"))
        pointer = out.tokens + row.to(tl.int64) * tokens.K + index
        tl.store(pointer, (z - origin) * unit, mask=index < tokens.K)
        if out.log_sum is not None:
            exp_sum_t1 += tl.sum(tl.exp((z - row_max) * unit), 0)

    tl.store(out.max + row, token_max)
    tl.store(out.tail_max + row, tail.max)
    log_tail, tail_log_sum = -float("inf"), 0.0
    if SWEEP:
        tail_log_sum = tl.log(tail.exp_sum)
        log_tail = (tail.max - origin) * unit + tail_log_sum * temperature
        if out.tail_entropy is not None:
            entropy = tail_log_sum - tl.div_rn(tail.entropy_moment, tail.exp_sum)
            tl.store(out.tail_entropy + row, tl.where(no_tail, 0.0, entropy))
    tl.store(out.tail + row, tl.where(no_tail, -float("inf"), log_tail))
    tl.store(out.tail_log_sum + row, tail_log_sum)
    if out.log_sum is not None:
        tl.store(out.log_sum + row, tl.log(exp_sum_t1))
        label = _label_column(inputs, tokens, row)
        here = (label >= 0) & (label < V)
        z, _ = read(student, tl.where(here, label, 0).to(tl.int32), V)
        if tokens.shard is not None:
            z = tl.where(here, z, -float("inf"))
        tl.store(out.label + row, (z - row_max) * unit)
    if out.mean is not None:
        mean = (tail.z_sum / V - row_max) * unit
        if tokens.shard is not None:
            mean *= V / tokens.shard.total
        tl.store(out.mean + row, mean)


@triton.jit(do_not_specialize=["sizes"])
def gather_kernel(
    side,
    tokens,
    inputs,
    out,
    ignore_index,
    sizes,
    V,
    SWEEP: tl.constexpr,
    ADJACENT: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store the events of one row; a dropped row is not read."""
    row = tl.program_id(0)
    if is_kept(inputs, row, ignore_index):
        logits, gradient, unit, temperature = open_side(side, row, sizes, ADJACENT > 1)
        student = Row(logits, gradient, unit, None, temperature, side)
        _gather_row(
            row, student, temperature, tokens, inputs, out, V, SWEEP, ADJACENT, THREADS, BLOCK_V,
            BLOCK_K,
        )  # fmt: skip


class CrossEntropy(NamedTuple):
    """What the gradient of a row's cross-entropy is computed from."""

    row_max: Any  # z
    share: Any  # the probability of a column whose z is row_max, at temperature 1
    scale: Any
    label: Any
    smoothing: Any  # or None
    vocabulary: Any


@triton.jit
def _cross_entropy_gradient(z, column, cross_entropy, unit):
    """Return the cross-entropy's gradient in these columns."""
    target = tl.where(column == cross_entropy.label, 1.0, 0.0)
    if cross_entropy.smoothing is not None:
        target = (1.0 - cross_entropy.smoothing) * target
        target += cross_entropy.smoothing / cross_entropy.vocabulary
    q = exp_scaled(z - cross_entropy.row_max, unit) * cross_entropy.share
    return cross_entropy.scale * (q - target)


@triton.jit
def _spread_row(
    row,
    student,
    tokens,
    inputs,
    events,
    gradients,
    V,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the gradient of a counted row."""
    side = student.side
    unit = side.unit_t1
    tail_max = tl.load(events.tail_max + row)
    row_max = finite_max(tl.maximum(tail_max, tl.load(events.max + row)))
    first_event = row.to(tl.int64) * (tokens.K + 1)
    tail_gradient = tl.load(gradients.events + first_event + tokens.K)
    tail_gradient = tl.where(tail_max == -float("inf"), 0.0, tail_gradient)
    tail_max = finite_max(tail_max)
    tail_share = tl.exp(-tl.load(events.tail_log_sum + row))
    # The weight of an invalid row is NaN, and its gradient is NaN in every column.
    weight = tl.load(inputs.weight + row)
    poison = tl.where(weight == weight, 0.0, float("nan"))
    cross_entropy = CrossEntropy(row_max, None, None, None, None, None)
    if gradients.ce_scale is not None:
        cross_entropy = CrossEntropy(
            row_max,
            tl.exp(-tl.load(events.log_sum + row)),
            tl.load(gradients.ce_scale + row),
            _label_column(inputs, tokens, row).to(tl.int32),
            gradients.smoothing,
            _vocabulary(tokens, V),
        )
    element = student.gradient.dtype.element_ty
    # Tokens first: the gradient may overwrite their logits.
    for start in range(0, tokens.K, BLOCK_K):
        index, _, here, column = _load_tokens(tokens, row, start, V, BLOCK_K)
        z, slope = read(student, column, V)
        value = tl.load(gradients.events + first_event + index, mask=here, other=0.0)
        if gradients.ce_scale is not None:
            value += _cross_entropy_gradient(z, column, cross_entropy, unit)
        value = value * slope * side.logit_scale + poison
        tl.store(student.gradient + column, value.to(element), mask=here)
    lanes = tl.arange(0, BLOCK_V)
    num_tiles = tl.cdiv(side.width, BLOCK_V)
    for reverse in range(num_tiles):
        column = (num_tiles - 1 - reverse) * BLOCK_V + lanes
        z, slope = read(student, column, V)
        q_in_tail = exp_scaled(z - tail_max, student.unit) * tail_share
        value = tl.where(tail_gradient == 0.0, 0.0, tail_gradient * q_in_tail)
        if gradients.ce_scale is not None:
            value += _cross_entropy_gradient(z, column, cross_entropy, unit)
        value = value * slope * side.logit_scale + poison
        value = tl.where(column < V, value, 0.0)
        mask = (column < side.width) & ~_is_token(tokens, row, column, V)
        tl.store(student.gradient + column, value.to(element), mask=mask)


@triton.jit(do_not_specialize=["sizes"])
def spread_kernel(
    side,
    tokens,
    inputs,
    events,
    gradients,
    ignore_index,
    sizes,
    V,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the gradient of one row from that of its events; zeros for a dropped row."""
    row = tl.program_id(0)
    if is_kept(inputs, row, ignore_index):
        logits, gradient, unit, temperature = open_side(side, row, sizes, ALIGNED)
        student = Row(logits, gradient, unit, None, temperature, side)
        _spread_row(row, student, tokens, inputs, events, gradients, V, BLOCK_V, BLOCK_K)
    else:
        _, gradient, _, _ = open_side(side, row, sizes, ALIGNED)
        sweep_zeros(gradient, side.width, None, BLOCK_V)


def _mark_tokens(student: Tensor, rows: Rows, options: Options) -> tuple[Tokens, Tensor]:
    """Return (the teacher's tokens with their bitmap, which rows have valid ids)."""
    ids = rows.ids
    assert ids is not None
    lead = student.shape[:-1]
    words = -(-options.vocab_size // 32)
    bitmap = torch.zeros((*lead, words), dtype=torch.int32, device=student.device)
    valid_rows = torch.ones(lead, dtype=torch.bool, device=student.device)
    tokens = Tokens(ids, ids.shape[-1], bitmap, words, vocab_shard(options))
    if lead.numel():
        with on_device(student.device):
            arguments = (tokens, valid_rows, options.vocab_size, BLOCK_K)
            launch(mark_kernel, (lead.numel(), 1, 1), arguments)
    return tokens, valid_rows


def gather_events(student: Tensor, rows: Rows, options: Options, parts: bool) -> Events:
    """Compute the student's events: the teacher's tokens and the tail, as in :mod:`fastkd.backends.sparse`."""
    lead, rows = student.shape[:-1], readable_rows(rows)
    tokens, valid_rows = _mark_tokens(student, rows, options)
    with_label = rows.labels is not None and options.alpha < 1.0

    def per_row(wanted: bool = True) -> Tensor | None:
        return student.new_empty(lead, dtype=torch.float32) if wanted else None

    out = EventOutputs(
        max=per_row(),
        tail_max=per_row(),
        tokens=student.new_empty((*lead, tokens.K), dtype=torch.float32),
        tail=per_row(),
        tail_log_sum=per_row(),
        tail_entropy=per_row(parts),
        log_sum=per_row(with_label),
        label=per_row(with_label),
        mean=per_row(with_label and options.label_smoothing > 0),
    )
    sizes, (view,) = lay_out(unit_stride(student))
    side = student_side(view, None, rows, options)
    aligned = is_aligned(options.vocab_size, view)
    crowded = options.softcap > 0
    block, warps = tile(options.vocab_size, student.itemsize, crowded, aligned)
    if lead.numel():
        with on_device(student.device):
            arguments = (
                side,
                tokens,
                Inputs(rows.labels, rows.weight, None),
                out,
                options.ignore_index,
                sizes,
                options.vocab_size,
                options.tail != "renormalize" or with_label or parts,
                *threads_of(block, warps, aligned, student.itemsize),
                block,
                BLOCK_K,
            )
            launch(
                gather_kernel,
                (lead.numel(), 1, 1),
                arguments,
                num_warps=warps,
                enable_fp_fusion=True,
                **register_limit(crowded),
            )
    return Events(*out, valid_rows, tokens.bitmap, side.unit_t1)


def spread_gradient(
    student: Tensor,
    events: Events,
    gradient: Tensor,
    cross_entropy_scale: Tensor | None,
    rows: Rows,
    options: Options,
    out: Tensor,
) -> Tensor:
    """Compute the gradient of the student's logits from that of the events [..., K + 1] and the cross-entropy."""
    rows = readable_rows(rows)
    ids, lead = rows.ids, student.shape[:-1]
    assert ids is not None
    source = unit_stride(student)
    target = source if out is student else unit_stride(out)
    tokens = Tokens(ids, ids.shape[-1], events.bits, events.bits.shape[-1], vocab_shard(options))
    sizes, (view, gradient_view) = lay_out(source, target)
    aligned = is_aligned(options.vocab_size, view, gradient_view)
    crowded = options.softcap > 0
    block, warps = tile(options.vocab_size, student.itemsize, crowded, aligned)
    if lead.numel():
        with on_device(student.device):
            arguments = (
                student_side(view, gradient_view, rows, options),
                tokens,
                Inputs(rows.labels, rows.weight, None),
                EventOutputs(
                    max=events.origin,
                    tail_max=events.tail_origin,
                    tokens=None,
                    tail=None,
                    tail_log_sum=events.tail_log_sum,
                    tail_entropy=None,
                    log_sum=events.log_sum,
                    label=None,
                    mean=None,
                ),
                EventGradients(
                    gradient.contiguous(),
                    None if cross_entropy_scale is None else cross_entropy_scale.contiguous(),
                    options.label_smoothing or None,
                ),
                options.ignore_index,
                sizes,
                options.vocab_size,
                aligned,
                block,
                BLOCK_K,
            )
            launch(
                spread_kernel,
                (lead.numel(), 1, 1),
                arguments,
                num_warps=warps,
                enable_fp_fusion=True,
                **register_limit(crowded),
            )
    return out if target is out else out.copy_(target)
