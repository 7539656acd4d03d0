"""The row kernel: one kernel for every divergence.

Read it from the end: `kd_kernel` is the entry point. `_compute_row` computes a counted row in four steps: it opens the
row, and then calls `_statistics`, `_value` and `write_gradients`. The sweeps over the row are in ``sweeps.py``, the
gradients in ``gradient.py``, the partial results of several programs in ``split.py``, the label term in
``label_term.py``, and the divergence's own functions in ``skeleton.py``. ``launch.py`` prepares the arguments.

A row is read twice if the divergence has a closed form (statistics, gradient), and otherwise three times (statistics,
sums, gradient). With one program per row, one launch does all of it (STAGE "row"). With several programs per row, or
several processes, each sweep is a launch of its own (STAGE "statistics", "sums", "gradient"). It stores partial
results, and the next launch loads them.

A field that is None removes its code at compile time, so no flags accompany the values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .gradient import (
    Factors,
    OpenRow,
    squared_temperature,
    sweep_measures,
    sweep_zeros,
    write_gradients,
)
from .label_term import binary, entropy_of_all, label_probability, normalizer_of_all, weighted
from .measures import tile_measures
from .narrow import Terms, Tile, evaluate_row, load_tile, tile_statistics
from .split import (
    load_centered_sum,
    load_partials,
    load_s_label,
    load_sums,
    load_t_label,
    store_partial_center,
    store_partial_label_term,
    store_partial_statistics,
    store_partial_sums,
)
from .sweeps import (
    Columns,
    Label,
    Moments,
    Row,
    Spec,
    Sums,
    Value,
    add_argmaxes,
    conclude,
    count_columns,
    log_probability,
    merge_partials,
    no_statistics,
    read,
    sweep_statistics,
    sweep_sums,
    where_finite,
    with_more,
    with_sums,
    without_softmax,
)


class View(NamedTuple):
    """A tensor [n0, n1, n2, columns] with a last stride of 1."""

    pointer: Any
    strides: Any  # of n0, n1, n2
    offsets: Any  # int64 [rows], for layouts that three strides cannot express; else None


class Side(NamedTuple):
    """The student's or the teacher's logits, and how they are tempered; every field is None if they are not read."""

    logits: Any  # View
    gradient: Any  # View, or None
    width: Any  # columns of the gradient, or None
    logit_scale: Any
    unit_t1: Any  # |logit_scale|, or 1 with a softcap: logits at temperature 1 are unit_t1 * z
    sign: Any  # -1 for a negative logit_scale without a softcap, else None
    softcap: Any  # or None
    softcap_gain: Any  # logit_scale / softcap, or None
    temperature: Any  # None for 1
    row_temperatures: Any  # float32 [rows], or None


class Inputs(NamedTuple):
    """Arguments per row; None if absent."""

    labels: Any  # [rows]
    weight: Any  # float32 [rows]
    scale: Any  # a number for all rows, in device memory


class Outputs(NamedTuple):
    """The kernel's outputs per row, float32 [rows] each; all but the loss may be None."""

    loss: Any
    distillation: Any
    cross_entropy: Any
    entropy: Any
    measures: Any  # [rows, len(DENSE_MEASURES)]


class Objective(NamedTuple):
    """The loss of a row: weight * (alpha T^2 D + ce_weight CE); its gradients are also multiplied by scale."""

    alpha: Any  # None for 0
    ce_weight: Any  # Options.cross_entropy_weight; None without cross-entropy
    smoothing: Any  # None for 0
    scale: Any
    degree: Any  # fastkd.divergences.Divergence.degree
    ignore_index: Any
    # Weights of the label term, one for each form of fastkd.divergences.Target; None if the divergence lacks that form.
    binary_weight: Any
    label_weight: Any


# A divisor of the addresses of all rows of a launch with aligned rows.
ROW_BYTES = tl.constexpr(16)


@triton.jit
def row_pointer(view, row, sizes, ALIGNED: tl.constexpr = True):
    """Return the address of column 0 of a row. ALIGNED: ROW_BYTES promises that it is a multiple of that."""
    if view.offsets is not None:
        offset = tl.load(view.offsets + row)
    else:
        outer = row // sizes[1]
        # Converted to int64 before a stride multiplies them: 8192 rows of 262144 columns are 2^31 elements.
        i0 = (outer // sizes[0]).to(tl.int64)
        i1 = (outer % sizes[0]).to(tl.int64)
        i2 = (row % sizes[1]).to(tl.int64)
        offset = i0 * view.strides[0] + i1 * view.strides[1] + i2 * view.strides[2]
    pointer = view.pointer + offset
    if not ALIGNED:
        # All tensors of a kernel share a layout. One aligned tensor would make Triton give each thread adjacent columns
        # in all of them.
        pointer = tl.multiple_of(pointer, 1)
    if ALIGNED == ROW_BYTES:
        # Triton sees for itself only that a number of columns is a multiple of 16, which 16 bytes do not need.
        pointer = tl.multiple_of(pointer, ROW_BYTES)
    return pointer


@triton.jit
def open_side(side, row, sizes, ALIGNED: tl.constexpr = True):
    """Return (address of the logits, address of the gradient, unit, temperature) of one side's row."""
    temperature = 1.0
    if side.row_temperatures is not None:
        temperature = tl.load(side.row_temperatures + row)
    elif side.temperature is not None:
        temperature = side.temperature
    logits = row_pointer(side.logits, row, sizes, ALIGNED)
    gradient = logits
    if side.width is not None:
        gradient = row_pointer(side.gradient, row, sizes, ALIGNED)
    # Rounded to nearest, because an error of the unit is an error of the temperature.
    unit = tl.div_rn(side.unit_t1, temperature)
    return logits, gradient, unit, temperature


@triton.jit
def is_kept(inputs, row, ignore_index):
    """Return whether a row is kept, that is, excluded neither by its label nor by a weight of 0."""
    kept = row >= 0
    if inputs.labels is not None:
        kept = kept & (tl.load(inputs.labels + row) != ignore_index)
    if inputs.weight is not None:
        kept = kept & (tl.load(inputs.weight + row) != 0)
    return kept


@triton.jit
def _head(pointer):
    """Return how many columns column 0 of a row lies past a multiple of 16 bytes."""
    bytes_past = (pointer.to(tl.int64) % ROW_BYTES).to(tl.int32)
    return bytes_past // (pointer.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def _label_z(row, column, columns):
    """Return z in the label's column; -inf if another process has the column."""
    if columns.shard is None:
        z, _ = read(row, column, columns.V)
    else:
        here = (column >= 0) & (column < columns.V)
        z, _ = read(row, tl.where(here, column, 0), columns.V)
        z = tl.where(here, z, -float("inf"))
    return z


@triton.jit
def _open_label(row, column, student, teacher, WITH_TEACHER: tl.constexpr, columns, spec):
    """Return the Label of a row: read its logits, or load them if the gradient may have overwritten them."""
    t = 0.0
    if spec.STAGE == "row" or spec.STAGE == "statistics":
        s = _label_z(student, column, columns)
        if WITH_TEACHER:
            t = _label_z(teacher, column, columns)
    else:
        s = load_s_label(columns.split, row, spec.LANES)
        if WITH_TEACHER:
            t = load_t_label(columns.split, row, spec.LANES)
    return Label(column, s, t)


@triton.jit
def _center(student, label, columns, spec):
    """Return the number that is subtracted from every z before z is summed: the label's z, or 0 if it is -inf."""
    center = label.s
    if columns.shard is not None and spec.STAGE == "statistics":
        # The label's column may be in another process. Any finite logit of this process's columns serves.
        z, _ = read(student, tl.arange(0, spec.BLOCK_V), columns.V)
        center = tl.max(z, 0)
    return tl.where(center == -float("inf"), 0.0, center)


@triton.jit
def _poison(weight, statistics, label, excluded):
    """Return the weight; NaN if the row's logits contain NaN or +inf, which a comparison in a definition may hide."""
    log_exp_sums = statistics.s_norm.log_exp_sum + statistics.t_norm.log_exp_sum
    weight = tl.where(log_exp_sums == log_exp_sums, weight, float("nan"))
    if excluded is not None:  # the label's logits are in neither sum
        infinite = (label.s == float("inf")) | (label.t == float("inf"))
        weight = tl.where(infinite, float("nan"), weight)
    return weight


@triton.jit
def _statistics(
    row,
    tile,
    student,
    teacher,
    label,
    excluded,
    center,
    moments,
    columns,
    ENTROPY: tl.constexpr,
    spec,
):
    """Return the Statistics of a row, from the first sweep or from the partial results that it stored.

    In the stage "statistics", this program's partial result is stored, and the returned Statistics are not used.
    """
    if spec.ONE_TILE:
        total = tile_statistics(
            tile, student, teacher, excluded, center, moments, columns, ENTROPY, spec
        )
    elif spec.STAGE == "row" or spec.STAGE == "statistics":
        total = sweep_statistics(
            student, teacher, excluded, center, moments, columns, ENTROPY, spec
        )
    else:
        partials = load_partials(columns.split, row, spec.LANES)
        total = merge_partials(partials, student, teacher, moments)
    if spec.STAGE == "statistics":
        store_partial_statistics(columns.split, row, total, label.s)
        if excluded is not None:
            store_partial_label_term(columns.split, row, total, label.t)
        if columns.shard is not None and center is not None:
            num_columns = count_columns(columns.V, columns.split, spec.BLOCK_V)
            store_partial_center(columns.split, row, center, num_columns)
    return conclude(total, student, teacher, moments)


@triton.jit
def _sums(
    row, student, teacher, statistics, sums, label, excluded, degree, parameters, columns, spec
):
    """Return Statistics with the sums of phi, g and h of a divergence without a closed form.

    In the stage "sums", they are this program's partial sums, without the argmaxes.
    """
    s_gradient, t_gradient = statistics.s_argmax.gradient, statistics.t_argmax.gradient
    if spec.ONE_TILE:
        phi, g, h = sums.phi, sums.g, sums.h
    elif spec.STAGE == "gradient":
        phi, g, h = load_sums(columns.split, row, spec.LANES)
    else:
        phi, g, h = sweep_sums(
            student, teacher, statistics, label.column, excluded, degree, parameters, columns, spec
        )
    if spec.FORM % 2 == 1 and spec.STAGE != "sums":
        phi, g, h, s_gradient, t_gradient = add_argmaxes(
            phi, g, h, statistics, degree, parameters, spec
        )
    return with_sums(statistics, phi, g, h, s_gradient, t_gradient)


@triton.jit
def _cross_entropy(label, center, norm, centered_sum, smoothing, vocabulary):
    """Return the cross-entropy with the label, smoothed if smoothing is not None."""
    value = -log_probability(label.s, norm)
    if smoothing is not None:
        mean = norm.unit * centered_sum / vocabulary + log_probability(center, norm)
        value = (1.0 - smoothing) * value - smoothing * mean
    return value


@triton.jit
def _value(
    row,
    student,
    teacher,
    statistics,
    label,
    excluded,
    center,
    weight,
    outputs,
    objective,
    columns,
    spec,
):
    """Store the loss of a row and its parts; return the Value that the gradient needs."""
    phi, g, h, entropy = statistics.phi, statistics.g, statistics.h, statistics.entropy
    s_norm_t1 = statistics.s_norm_t1
    s_argmax, t_argmax = statistics.s_argmax, statistics.t_argmax
    label_sums, label_weight = Sums(0.0, 0.0, 0.0), 0.0
    if excluded is not None:
        b = log_probability(label.s, statistics.s_norm)
        entropy = entropy_of_all(b, entropy)
        s_norm_t1 = normalizer_of_all(label.s, s_norm_t1)
        if teacher.unit is not None:
            if objective.label_weight is not None:
                p_label = label_probability(label.t, statistics.t_norm_t1)
                label_weight = objective.label_weight * p_label
            else:
                a = log_probability(label.t, statistics.t_norm)
                label_sums = binary(objective.binary_weight, a, b)
                phi += label_sums.phi
                g += label_sums.g
                s_argmax = with_more(s_argmax, label_sums.g)
                t_argmax = with_more(t_argmax, label_sums.h)
        h += label_sums.h
    loss, distillation, cross_entropy = 0.0, 0.0, 0.0
    if teacher.unit is not None:
        distillation = squared_temperature(student, spec) * phi
        if objective.label_weight is not None:
            distillation += weighted(label_weight, -log_probability(label.s, s_norm_t1))
        if objective.alpha is not None:
            loss = objective.alpha * distillation
    if objective.ce_weight is not None:
        centered_sum = statistics.centered_sum
        if columns.shard is not None and center is not None:
            center = s_norm_t1.max
            centered_sum = load_centered_sum(columns.split, row, center, spec.LANES)
        cross_entropy = _cross_entropy(
            label, center, s_norm_t1, centered_sum, objective.smoothing, columns.vocabulary
        )
        loss += objective.ce_weight * cross_entropy
    _store_row(outputs, row, columns.split, weight * loss, distillation, cross_entropy, entropy)
    s_argmax, t_argmax = where_finite(s_argmax, phi), where_finite(t_argmax, phi)
    return Value(Sums(phi, g, h), label_sums, label_weight, s_norm_t1, s_argmax, t_argmax)


@triton.jit
def _open_row(side, row, sizes, weight, spec):
    """Return (address of the logits, address of the gradient, unit, temperature, weight) of one side's row.

    The weight becomes NaN if the temperature is not positive. The result is no Row, because Triton 3.5 cannot return a
    tuple that contains None.
    """
    logits, gradient, unit, temperature = open_side(
        side, row, sizes, 0 if spec.HEAD or spec.ADJACENT == 1 else ROW_BYTES
    )
    if side.row_temperatures is not None:
        weight = tl.where(temperature > 0, weight, float("nan"))
    return logits, gradient, unit, temperature, weight


@triton.jit
def _compute_row(
    row,
    student_side,
    teacher_side,
    inputs,
    outputs,
    objective,
    moments,
    parameters,
    sizes,
    columns,
    spec,
):
    """Compute the loss, its parts and the gradients of a counted row, or one stage of that."""
    NORMALIZED: tl.constexpr = spec.FORM % 2 == 1
    ENTROPY: tl.constexpr = outputs.entropy is not None
    LABEL_T1: tl.constexpr = objective.label_weight is not None  # a label term at temperature 1
    LABEL_TERM: tl.constexpr = LABEL_T1 or objective.binary_weight is not None
    CROSS_ENTROPY: tl.constexpr = objective.ce_weight is not None
    weight = 1.0
    if inputs.weight is not None:
        weight = tl.load(inputs.weight + row)

    logits, gradient, unit, temperature, weight = _open_row(student_side, row, sizes, weight, spec)
    unit_t1 = None
    if CROSS_ENTROPY or LABEL_T1:  # noqa: SIM102
        if student_side.temperature is not None or student_side.row_temperatures is not None:
            unit_t1 = student_side.unit_t1
    student = Row(logits, gradient, unit, unit_t1, temperature, student_side)
    teacher = Row(None, None, None, None, None, None)
    softmax_teacher, softmax_moments = teacher, Moments(None, None, None)
    if teacher_side.logit_scale is not None:
        logits, gradient, unit, temperature, weight = _open_row(
            teacher_side, row, sizes, weight, spec
        )
        unit_t1 = None
        if LABEL_T1:  # noqa: SIM102
            if teacher_side.temperature is not None or teacher_side.row_temperatures is not None:
                unit_t1 = teacher_side.unit_t1
        teacher = Row(logits, gradient, unit, unit_t1, temperature, teacher_side)
        if NORMALIZED:
            softmax_teacher, softmax_moments = teacher, moments

    if spec.HEAD:
        head = _head(student.logits)
        columns = Columns(
            columns.V, columns.width, columns.first, columns.vocabulary, columns.shard,
            columns.split, head,
        )  # fmt: skip
    tile, terms = Tile(0.0, 0.0, 0.0, 0.0), Terms(0.0, 0.0, 0.0, 0.0)
    if spec.ONE_TILE:
        tile = load_tile(student, teacher, columns, spec)

    label, center, excluded = Label(-1, 0.0, 0.0), None, None
    if CROSS_ENTROPY or LABEL_TERM:
        column = tl.load(inputs.labels + row)
        valid = (column >= 0) & (column < columns.vocabulary)
        weight = tl.where(valid, weight, float("nan"))
        column = tl.where(valid, column, 0).to(tl.int32) - columns.first
        WITH_TEACHER: tl.constexpr = LABEL_TERM and teacher_side.logit_scale is not None
        label = _open_label(row, column, student, teacher, WITH_TEACHER, columns, spec)
        if objective.smoothing is not None:
            center = _center(student, label, columns, spec)
        if LABEL_TERM:
            excluded = label.column

    statistics = no_statistics(student.unit)
    if NORMALIZED or CROSS_ENTROPY or ENTROPY:
        statistics = _statistics(
            row, tile, student, softmax_teacher, label, excluded, center, softmax_moments, columns,
            ENTROPY, spec,
        )  # fmt: skip
    if not NORMALIZED:
        statistics = without_softmax(statistics, student.unit, teacher.unit)
    if teacher.unit is not None and spec.STAGE != "statistics":
        P_MOMENT: tl.constexpr = moments.forward is not None or moments.cross is not None
        sums = Sums(0.0, 0.0, 0.0)
        if spec.ONE_TILE:
            if outputs.measures is not None:  # before the terms of the divergence take registers
                tile_measures(row, tile, statistics, outputs.measures, columns, spec)
            terms, sums = evaluate_row(
                tile, student, teacher, statistics, excluded, objective.degree, parameters, columns,
                spec,
            )  # fmt: skip
        if not (P_MOMENT or moments.reverse is not None):
            statistics = _sums(
                row, student, teacher, statistics, sums, label, excluded, objective.degree,
                parameters, columns, spec,
            )  # fmt: skip

    if spec.STAGE == "sums":
        store_partial_sums(columns.split, row, statistics.phi, statistics.g, statistics.h)
    elif spec.STAGE != "statistics":
        if NORMALIZED:  # noqa: SIM102
            if objective.alpha is not None:
                weight = _poison(weight, statistics, label, excluded)
        value = _value(
            row, student, teacher, statistics, label, excluded, center, weight, outputs, objective,
            columns, spec,
        )  # fmt: skip
        opened = OpenRow(
            student, teacher, tile, terms, statistics, value, label, excluded, weight, columns
        )
        if columns.width is not None:
            write_gradients(row, opened, inputs, objective, outputs.measures, parameters, spec)
        elif not spec.ONE_TILE:  # noqa: SIM102
            if outputs.measures is not None:
                sweep_measures(
                    row, opened, Factors(None, None, None, None), outputs.measures, objective.degree,
                    parameters, spec,
                )  # fmt: skip


@triton.jit
def _store_row(outputs, row, split, loss, distillation, cross_entropy, entropy):
    """Store a row's loss and parts; if several programs share the row, the first one does."""
    is_first = None
    if split.num_splits is not None:
        is_first = tl.program_id(1) == 0
    tl.store(outputs.loss + row, loss, mask=is_first)
    if outputs.distillation is not None:
        tl.store(outputs.distillation + row, distillation, mask=is_first)
        tl.store(outputs.cross_entropy + row, cross_entropy, mask=is_first)
        tl.store(outputs.entropy + row, entropy, mask=is_first)


@triton.jit
def _drop_row(
    row,
    student_side,
    teacher_side,
    outputs,
    sizes,
    columns,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Store zeros for a dropped row, which is not read."""
    _store_row(outputs, row, columns.split, 0.0, 0.0, 0.0, 0.0)
    if student_side.width is not None:
        gradient = row_pointer(student_side.gradient, row, sizes, ALIGNED)
        sweep_zeros(gradient, student_side.width, columns.split.num_splits, BLOCK_V)
    if teacher_side.width is not None:
        gradient = row_pointer(teacher_side.gradient, row, sizes, ALIGNED)
        sweep_zeros(gradient, teacher_side.width, columns.split.num_splits, BLOCK_V)


@triton.jit(do_not_specialize=["sizes", "shard", "split"])
def kd_kernel(
    student_side,
    teacher_side,
    inputs,
    outputs,
    objective,
    moments,
    parameters,
    sizes,
    V,
    width,
    shard,
    split,
    DIVERGENCE: tl.constexpr,
    FORM: tl.constexpr,
    SQUARED: tl.constexpr,
    ADJACENT: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ONE_TILE: tl.constexpr,
    HEAD: tl.constexpr,
    LANES: tl.constexpr,
    STAGE: tl.constexpr,
):
    """Compute one row, or one program's part of it; :class:`fastkd.call.contract.Result` lists what is written."""
    row = tl.program_id(0)
    if split.num_splits is not None:
        row += split.first_row
    if ADJACENT > 1 and ONE_TILE:
        # They are multiples of ADJACENT already. Triton learns it here.
        V = V // ADJACENT * ADJACENT
        if width is not None:
            width = width // ADJACENT * ADJACENT
    first, vocabulary = 0, V
    if shard is not None:
        first, vocabulary = shard.first, shard.total
    columns = Columns(V, width, first, vocabulary, shard, split, 0)
    if is_kept(inputs, row, objective.ignore_index):
        _compute_row(
            row,
            student_side,
            teacher_side,
            inputs,
            outputs,
            objective,
            moments,
            parameters,
            sizes,
            columns,
            # Not a variable: an assignment would turn its constexprs into tensors.
            Spec(
                DIVERGENCE, FORM, SQUARED, ADJACENT, THREADS, BLOCK_V, ONE_TILE, HEAD, LANES, STAGE
            ),
        )
    elif STAGE == "row" or STAGE == "gradient":
        _drop_row(
            row, student_side, teacher_side, outputs, sizes, columns,
            0 if HEAD or ADJACENT == 1 else ROW_BYTES, BLOCK_V,
        )  # fmt: skip


@triton.jit(do_not_specialize=["sizes"])
def scale_kernel(gradient, width, upstream, upstream_stride, sizes, BLOCK_V: tl.constexpr):
    """Multiply a row of a gradient in place; a factor of 1 costs one load."""
    row = tl.program_id(0)
    factor = tl.load(upstream + row * upstream_stride).to(tl.float32)
    if factor != 1.0:
        pointer = row_pointer(gradient, row, sizes)
        lanes = tl.arange(0, BLOCK_V)
        for tile in range(tl.cdiv(width, BLOCK_V)):
            column = tile * BLOCK_V + lanes
            value = tl.load(pointer + column, mask=column < width).to(tl.float32)
            scaled = (factor * value).to(pointer.dtype.element_ty)
            tl.store(pointer + column, scaled, mask=column < width)
