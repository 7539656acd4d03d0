"""Sparse teachers in Triton: the two steps of :mod:`fastkd.backends.sparse` in which the whole row of the student
takes part.

Which columns are the teacher's tokens is a bit a column: with it a sweep leaves them out, where subtracting them from
the sum of all would lose the digits of a small tail.
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

from .kernel import (
    Inputs,
    _aligned,
    _layout,
    _model,
    _on,
    _open,
    register_limits,
    shard_of,
    tile,
)
from .sweeps import Row, _faded, _fold, _origin, read, sweep_zeros

BLOCK_K = 256
WORD = tl.constexpr(32)  # bits


class Tokens(NamedTuple):
    """The teacher's tokens."""

    ids: Any  # int64 [rows, K]
    K: Any
    bits: Any  # int32 [rows, words], one bit a column
    words: Any
    shard: Any  # sweeps.Shard, or None


class Gathered(NamedTuple):
    """fastkd.backends.sparse.Events, one float32 a row each but for tokens [rows, K]; what is None is not computed."""

    origin: Any  # of what `read` gives, before Model.unit
    tail_origin: Any  # likewise
    tokens: Any
    tail: Any
    tail_log_sum: Any
    tail_entropy: Any
    log_sum: Any
    label: Any
    mean: Any


class Spread(NamedTuple):
    """What a gradient of the row is made of."""

    events: Any  # float32 [rows, K + 1]: the gradient of the events
    scale: Any  # float32, one a row, of the cross-entropy; or None
    smoothing: Any  # or None


@triton.jit
def _vocabulary(tokens, V):
    """Columns, wherever they are."""
    if tokens.shard is not None:
        V = tokens.shard.total
    return V


@triton.jit
def _label(inputs, tokens, row):
    """The column of a label; none of those here where another process has it, or where it is not valid."""
    label = tl.load(inputs.labels + row)
    if tokens.shard is not None:
        label -= tokens.shard.first
    return label


@triton.jit
def _token_ids(tokens, row, start, V, BLOCK_K: tl.constexpr):
    """(place in the row, which of them name a token or none, which a column, that) of a tile of ids."""
    places = start + tl.arange(0, BLOCK_K)
    ids = tl.load(
        tokens.ids + row.to(tl.int64) * tokens.K + places, mask=places < tokens.K, other=-1
    )
    known = (ids >= -1) & (ids < _vocabulary(tokens, V))
    if tokens.shard is not None:
        ids -= tokens.shard.first
    seated = (ids >= 0) & (ids < V)
    return places, known, seated, tl.where(seated, ids, 0).to(tl.int32)


@triton.jit
def mark_kernel(tokens, valid, V, BLOCK_K: tl.constexpr):
    """Set the bits of a row's tokens; valid is whether all ids are -1 or columns, and none comes twice."""
    row = tl.program_id(0)
    wrong = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, tokens.K, BLOCK_K):
        _, known, seated, columns = _token_ids(tokens, row, start, V, BLOCK_K)
        bit = (tl.full([BLOCK_K], 1, tl.int32)) << (columns % WORD)
        word = tokens.bits + row.to(tl.int64) * tokens.words + columns // WORD
        before = tl.atomic_or(word, bit, mask=seated)
        twice = seated & ((before & bit) != 0)
        wrong = tl.where(twice | ~known, 1, wrong)
    tl.store(valid + row, tl.max(wrong, 0) == 0)


@triton.jit
def _among_tokens(tokens, row, columns, V):
    word = tl.load(
        tokens.bits + row.to(tl.int64) * tokens.words + columns // WORD, mask=columns < V, other=0
    )
    return ((word >> (columns % WORD)) & 1) != 0


@triton.jit
def _keeps(inputs, row, ignore_index):
    keep = row >= 0
    if inputs.labels is not None:
        keep = keep & (tl.load(inputs.labels + row) != ignore_index)
    if inputs.weight is not None:
        keep = keep & (tl.load(inputs.weight + row) != 0)
    return keep


@triton.jit
def _gather_row(
    row,
    student_model,
    tokens,
    inputs,
    out,
    sizes,
    V,
    SWEEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    logits, gradient, row_unit, temperature = _open(student_model, row, sizes, ALIGNED)
    student = Row(logits, gradient, row_unit, student_model)
    lanes = tl.arange(0, BLOCK_V)
    top = tl.full([], -float("inf"), tl.float32)  # of the tail
    zero = _fold(tl.zeros([BLOCK_V], tl.float32), ALIGNED)
    tail_sum, plain_sum, moment, spread = zero, zero, zero, zero
    if SWEEP:
        for number in range(tl.cdiv(V, BLOCK_V)):
            columns = number * BLOCK_V + lanes
            z, _ = read(student, columns, V)
            if out.mean is not None:
                spread += _fold(tl.where(columns < V, z, 0.0), ALIGNED)
            z = tl.where(_among_tokens(tokens, row, columns, V), -float("inf"), z)
            before = top
            top = tl.maximum(top, tl.max(z, 0))
            origin = _origin(top)
            fade = tl.exp((before - origin) * student.unit)
            step = (origin - _origin(before)) * student.unit
            x = (z - origin) * student.unit
            e = tl.exp(x)
            if out.tail_entropy is not None:
                moment = _faded(moment, -step, tail_sum, fade)
                moment += _fold(tl.where(x == -float("inf"), 0.0, e * x), ALIGNED)
            if out.log_sum is not None:
                plain_unit = student_model.unit
                plain_sum = tl.exp((before - origin) * plain_unit) * plain_sum
                plain_sum += _fold(tl.exp((z - origin) * plain_unit), ALIGNED)
            tail_sum = fade * tail_sum + _fold(e, ALIGNED)

    highest = tl.full([], -float("inf"), tl.float32)  # of the tokens
    for start in range(0, tokens.K, BLOCK_K):
        _, _, seated, columns = _token_ids(tokens, row, start, V, BLOCK_K)
        z, _ = read(student, columns, V)
        highest = tl.maximum(highest, tl.max(tl.where(seated, z, -float("inf")), 0))
    origin = _origin(highest)
    unit = student_model.unit
    row_origin = _origin(tl.maximum(highest, top))
    plain_total = tl.sum(plain_sum, 0) * tl.exp((_origin(top) - row_origin) * unit)
    plain_total = tl.where(top == -float("inf"), 0.0, plain_total)
    for start in range(0, tokens.K, BLOCK_K):
        places, _, seated, columns = _token_ids(tokens, row, start, V, BLOCK_K)
        z, _ = read(student, columns, V)
        z = tl.where(seated, z, -float("inf"))
        place = out.tokens + row.to(tl.int64) * tokens.K + places
        tl.store(place, (z - origin) * unit, mask=places < tokens.K)
        if out.log_sum is not None:
            plain_total += tl.sum(tl.exp((z - row_origin) * unit), 0)

    tl.store(out.origin + row, highest)
    tl.store(out.tail_origin + row, top)
    tail, log_sum = -float("inf"), 0.0
    if SWEEP:
        total = tl.sum(tail_sum, 0)
        log_sum = tl.log(total)
        tail = (top - origin) * unit + log_sum * temperature
        if out.tail_entropy is not None:
            entropy = log_sum - tl.div_rn(tl.sum(moment, 0), total)
            tl.store(out.tail_entropy + row, tl.where(top == -float("inf"), 0.0, entropy))
    tl.store(out.tail + row, tl.where(top == -float("inf"), -float("inf"), tail))
    tl.store(out.tail_log_sum + row, log_sum)
    if out.log_sum is not None:
        tl.store(out.log_sum + row, tl.log(plain_total))
        label = _label(inputs, tokens, row)
        here = (label >= 0) & (label < V)
        z, _ = read(student, tl.where(here, label, 0).to(tl.int32), V)
        if tokens.shard is not None:
            z = tl.where(here, z, -float("inf"))
        tl.store(out.label + row, (z - row_origin) * unit)
    if out.mean is not None:
        mean = (tl.sum(spread, 0) / V - row_origin) * unit
        if tokens.shard is not None:
            mean *= V / tokens.shard.total
        tl.store(out.mean + row, mean)


@triton.jit(do_not_specialize=["sizes"])
def gather_kernel(
    student_model,
    tokens,
    inputs,
    out,
    ignore_index,
    sizes,
    V,
    SWEEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The events of one row; a row that is dropped is not read."""
    row = tl.program_id(0)
    if _keeps(inputs, row, ignore_index):
        _gather_row(
            row, student_model, tokens, inputs, out, sizes, V, SWEEP, ALIGNED, BLOCK_V, BLOCK_K
        )


@triton.jit
def _cross_entropy_gradient(z, columns, label, gathered, spread, row, vocabulary):
    """Of these columns, z relative to the row's origin."""
    target = tl.where(columns == label, 1.0, 0.0)
    if spread.smoothing is not None:
        target = (1.0 - spread.smoothing) * target + spread.smoothing / vocabulary
    return tl.load(spread.scale + row) * (tl.exp(z - tl.load(gathered.log_sum + row)) - target)


@triton.jit
def _spread_row(
    row,
    student_model,
    tokens,
    inputs,
    gathered,
    spread,
    sizes,
    V,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    logits, gradient, row_unit, temperature = _open(student_model, row, sizes, ALIGNED)
    student = Row(logits, gradient, row_unit, student_model)
    unit = student_model.unit
    tail_origin = tl.load(gathered.tail_origin + row)
    row_origin = _origin(tl.maximum(tail_origin, tl.load(gathered.origin + row)))
    seats = row.to(tl.int64) * (tokens.K + 1)
    tail_gradient = tl.load(spread.events + seats + tokens.K)
    tail_gradient = tl.where(tail_origin == -float("inf"), 0.0, tail_gradient)
    tail_origin = _origin(tail_origin)
    tail_log_sum = tl.load(gathered.tail_log_sum + row)
    # A row that is not valid is NaN in every column.
    poison = tl.where(
        tl.load(inputs.weight + row) == tl.load(inputs.weight + row), 0.0, float("nan")
    )
    label, vocabulary = 0, _vocabulary(tokens, V)
    if spread.scale is not None:
        label = _label(inputs, tokens, row).to(tl.int32)
    element = student.gradient.dtype.element_ty
    # The tokens first: their logits may be where the gradient goes.
    for start in range(0, tokens.K, BLOCK_K):
        places, _, seated, columns = _token_ids(tokens, row, start, V, BLOCK_K)
        z, slope = read(student, columns, V)
        value = tl.load(spread.events + seats + places, mask=seated, other=0.0)
        if spread.scale is not None:
            value += _cross_entropy_gradient(
                (z - row_origin) * unit, columns, label, gathered, spread, row, vocabulary
            )
        value = value * slope * student_model.scale + poison
        tl.store(student.gradient + columns, value.to(element), mask=seated)
    lanes = tl.arange(0, BLOCK_V)
    tiles = tl.cdiv(student_model.width, BLOCK_V)
    for back in range(tiles):
        columns = (tiles - 1 - back) * BLOCK_V + lanes
        z, slope = read(student, columns, V)
        share = tl.exp(tl.div_rn((z - tail_origin) * unit, temperature) - tail_log_sum)
        value = tl.where(tail_gradient == 0.0, 0.0, tail_gradient * share)
        if spread.scale is not None:
            plain = (z - row_origin) * unit
            value += _cross_entropy_gradient(
                plain, columns, label, gathered, spread, row, vocabulary
            )
        value = value * slope * student_model.scale + poison
        value = tl.where(columns < V, value, 0.0)
        others = (columns < student_model.width) & ~_among_tokens(tokens, row, columns, V)
        tl.store(student.gradient + columns, value.to(element), mask=others)


@triton.jit(do_not_specialize=["sizes"])
def spread_kernel(
    student_model,
    tokens,
    inputs,
    gathered,
    spread,
    ignore_index,
    sizes,
    V,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of one row from that of its events."""
    row = tl.program_id(0)
    if _keeps(inputs, row, ignore_index):
        _spread_row(
            row,
            student_model,
            tokens,
            inputs,
            gathered,
            spread,
            sizes,
            V,
            ALIGNED,
            BLOCK_V,
            BLOCK_K,
        )
    else:
        _, gradient, _, _ = _open(student_model, row, sizes, ALIGNED)
        sweep_zeros(gradient, student_model.width, None, BLOCK_V)


def _tokens(student: Tensor, rows: Rows, options: Options) -> tuple[Tokens, Tensor]:
    """(the teacher's tokens with their bits set, which rows are valid)."""
    ids = rows.ids
    assert ids is not None
    lead = student.shape[:-1]
    words = -(-options.vocab_size // 32)
    bits = torch.zeros((*lead, words), dtype=torch.int32, device=student.device)
    valid = torch.ones(lead, dtype=torch.bool, device=student.device)
    tokens = Tokens(ids, ids.shape[-1], bits, words, shard_of(options))
    if lead.numel():
        with _on(student.device):
            mark_kernel[(lead.numel(),)](tokens, valid, options.vocab_size, BLOCK_K)
    return tokens, valid


def gather_events(student: Tensor, rows: Rows, options: Options, parts: bool) -> Events:
    """The student's rows as a sparse teacher sees them: fastkd/backends/sparse.py."""
    lead, rows = student.shape[:-1], readable_rows(rows)
    tokens, valid = _tokens(student, rows, options)
    with_labels = rows.labels is not None and options.alpha < 1.0

    def per_row(wanted: bool = True) -> Tensor | None:
        return student.new_empty(lead, dtype=torch.float32) if wanted else None

    out = Gathered(
        per_row(),
        per_row(),
        student.new_empty((*lead, tokens.K), dtype=torch.float32),
        per_row(),
        per_row(),
        per_row(parts),
        per_row(with_labels),
        per_row(with_labels),
        per_row(with_labels and options.label_smoothing > 0),
    )
    sizes, (view,) = _layout(unit_stride(student))
    model = _student(view, None, rows, options)
    aligned = _aligned(options.vocab_size, view)
    crowded = options.softcap > 0
    block, warps = tile(options.vocab_size, student.itemsize, crowded, aligned)
    if lead.numel():
        with _on(student.device):
            gather_kernel[(lead.numel(),)](
                model,
                tokens,
                Inputs(rows.labels, rows.weight, None),
                out,
                options.ignore_index,
                sizes,
                options.vocab_size,
                options.tail != "renormalize" or with_labels or parts,
                aligned,
                block,
                BLOCK_K,
                num_warps=warps,
                enable_fp_fusion=True,
                **register_limits(aligned, crowded),
            )
    return Events(*out, valid, tokens.bits, model.unit)


def _student(view: Any, gradient: Any, rows: Rows, options: Options) -> Any:
    return _model(
        view,
        gradient,
        options.logit_scale,
        options.softcap,
        options.temperature,
        rows.temperature,
    )


def spread_gradient(
    student: Tensor,
    events: Events,
    gradient: Tensor,
    cross_entropy_scale: Tensor | None,
    rows: Rows,
    options: Options,
    out: Tensor,
) -> Tensor:
    """The gradient of the events [..., K + 1], and the cross-entropy's, as that of the student's logits."""
    rows = readable_rows(rows)
    ids, lead = rows.ids, student.shape[:-1]
    assert ids is not None
    source = unit_stride(student)
    target = source if out is student else unit_stride(out)
    tokens = Tokens(ids, ids.shape[-1], events.bits, events.bits.shape[-1], shard_of(options))
    sizes, (view, gradient_view) = _layout(source, target)
    aligned = _aligned(options.vocab_size, view, gradient_view)
    crowded = options.softcap > 0
    block, warps = tile(options.vocab_size, student.itemsize, crowded, aligned)
    if lead.numel():
        with _on(student.device):
            spread_kernel[(lead.numel(),)](
                _student(view, gradient_view, rows, options),
                tokens,
                Inputs(rows.labels, rows.weight, None),
                Gathered(
                    events.origin,
                    events.tail_origin,
                    None,
                    None,
                    events.tail_log_sum,
                    None,
                    events.log_sum,
                    None,
                    None,
                ),
                Spread(
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
                num_warps=warps,
                enable_fp_fusion=True,
                **register_limits(aligned, crowded),
            )
    return out if target is out else out.copy_(target)
