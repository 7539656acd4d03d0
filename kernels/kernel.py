"""The triton backend: one program a row or several, one kernel for every divergence.

Read top to bottom: what the kernel is given, the kernel, and the launchers that :mod:`fastkd.engine.autograd` calls.
The sweeps over a row are in ``sweeps.py``, rows with several programs in ``split.py``, what a divergence may do in
``skeleton.py``, one that compares the label's token apart from the others in ``apart.py``.

A row is read twice where the divergence has a closed form (statistics, gradient) and three times where not, the last
time backwards. Where a row has one program, that is one launch (STAGE "row"); where it has several, a launch a sweep
(STAGE "statistics", "sums", "gradient"), each of which takes up what the one before has left. So it is where processes
share the vocabulary: between two launches they exchange that.

Logits of any leading strides are addressed in place; a last stride other than 1 is copied.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.backends import native
from fastkd.call.contract import Options, Result, Rows, ShardCall, Statistics, Want
from fastkd.core.tensors import address, readable, unit_stride
from fastkd.divergences import Divergence

from .label_term import binary, entropy_of_all, normalizer_of_all, share, weighed
from .skeleton import bind, form_of
from .split import (
    APART_FIELDS,
    FIELDS,
    LANES,
    Plan,
    device_of,
    leave_apart,
    leave_pivot,
    leave_statistics,
    leave_sums,
    left_label,
    left_spread,
    left_statistics,
    left_sums,
    left_t_label,
    plan,
    shard_plan,
)
from .sweeps import (
    Moments,
    Normalizer,
    Ratio,
    Row,
    Shard,
    Split,
    Sums,
    Top,
    add_tops,
    columns_of,
    conclude,
    log_probability,
    merge,
    read,
    sweep_gradients,
    sweep_statistics,
    sweep_sums,
    sweep_zeros,
    where_finite,
    with_more,
)
from .tuning import TILES

# What a field's None switches off is compiled out: the callers below pass no flags beside the values.


class View(NamedTuple):
    """A tensor [n0, n1, n2, columns] with a last stride of 1."""

    pointer: Any
    strides: Any  # of n0, n1, n2
    offsets: Any  # int64, one a row, where three strides do not reach every row; else None


class Model(NamedTuple):
    """The student's or the teacher's logits, and how they become tempered ones; all None where they are not read."""

    logits: Any  # View
    gradient: Any  # View, or None
    width: Any  # columns of the gradient
    scale: Any  # logit_scale
    unit: Any  # |logit_scale|; 1 under a softcap
    sign: Any  # -1 for a negative logit_scale without a softcap, else None
    softcap: Any  # or None
    gain: Any  # logit_scale / softcap
    temperature: Any  # None for 1
    temperatures: Any  # float32, one a row, or None


class Inputs(NamedTuple):
    """One value a row each, or None."""

    labels: Any
    weight: Any
    scale: Any  # a single number for all rows


class Outputs(NamedTuple):
    """One float32 a row each; the parts may be None."""

    loss: Any
    distillation: Any
    cross_entropy: Any
    entropy: Any


class Objective(NamedTuple):
    """row loss = alpha T^2 D + rest CE, times scale."""

    alpha: Any  # None for 0
    rest: Any  # 1 - alpha; None without cross-entropy
    smoothing: Any  # None for 0
    scale: Any
    degree: Any
    ignore_index: Any
    binary: Any  # fastkd.divergences.Target.weight, of that form; else None
    label: Any  # likewise


class Factors(NamedTuple):
    """What multiplies each term of a row's gradients; None where the term is not part of them."""

    distillation: Any
    cross_entropy: Any
    teacher: Any


@triton.jit
def _row_pointer(view, row, sizes, ALIGNED: tl.constexpr = True):
    if view.offsets is not None:
        offset = tl.load(view.offsets + row)
    else:
        rest = row // sizes[1]
        # 64-bit before they meet a stride: 8192 rows of 262144 columns are 2^31 elements.
        i0 = (rest // sizes[0]).to(tl.int64)
        i1 = (rest % sizes[0]).to(tl.int64)
        i2 = (row % sizes[1]).to(tl.int64)
        offset = i0 * view.strides[0] + i1 * view.strides[1] + i2 * view.strides[2]
    pointer = view.pointer + offset
    if not ALIGNED:
        # All the tensors of a kernel share a layout. One that is aligned would give a thread neighbours.
        pointer = tl.multiple_of(pointer, 1)
    return pointer


@triton.jit
def _open(model, row, sizes, ALIGNED: tl.constexpr = True):
    """(the logits' address, the gradient's, unit, temperature) of a row."""
    temperature = 1.0
    if model.temperatures is not None:
        temperature = tl.load(model.temperatures + row)
    elif model.temperature is not None:
        temperature = model.temperature
    logits = _row_pointer(model.logits, row, sizes, ALIGNED)
    gradient = logits
    if model.width is not None:
        gradient = _row_pointer(model.gradient, row, sizes, ALIGNED)
    unit = tl.div_rn(model.unit, temperature)  # its error would be one of the temperature
    return logits, gradient, unit, temperature


@triton.jit
def _cross_entropy(z_label, pivot, plain, spread, smoothing, vocabulary):
    value = -log_probability(z_label, plain)
    if smoothing is not None:
        mean = plain.unit * spread / vocabulary + log_probability(pivot, plain)
        value = (1.0 - smoothing) * value - smoothing * mean
    return value


@triton.jit
def _label_of(student, label, V, shard):
    """The label's logit; -inf where another process has it."""
    if shard is None:
        z, _ = read(student, label, V)
    else:
        here = (label >= 0) & (label < V)
        z, _ = read(student, tl.where(here, label, 0), V)
        z = tl.where(here, z, -float("inf"))
    return z


@triton.jit
def _statistics(
    row,
    student,
    teacher,
    plain_unit,
    t_plain_unit,
    z_label,
    t_label,
    apart,
    pivot,
    moments,
    V,
    shard,
    split,
    ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    STAGE: tl.constexpr,
):
    """The first sweep's Statistics of the row; in its own stage, what this program leaves of them."""
    if STAGE == "row" or STAGE == "statistics":
        part = sweep_statistics(
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
            ENTROPY,
            ALIGNED,
            BLOCK_V,
        )
    else:
        parts = left_statistics(split, row, LANES)
        part = merge(parts, student, teacher, plain_unit, t_plain_unit, moments)
    if STAGE == "statistics":
        leave_statistics(split, row, part, z_label)
        if apart is not None:
            leave_apart(split, row, part, t_label)
        if shard is not None and pivot is not None:
            leave_pivot(split, row, pivot, columns_of(V, split, BLOCK_V))
    return conclude(part, student, teacher, plain_unit, t_plain_unit, moments)


@triton.jit
def _keep_row(
    row,
    student_model,
    teacher_model,
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
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    STAGE: tl.constexpr,
):
    """Loss, parts and gradients of a row that counts; or a stage of it."""
    NORMALIZED: tl.constexpr = FORM % 2 == 1
    ENTROPY: tl.constexpr = outputs.entropy is not None
    WITH_LABEL: tl.constexpr = objective.rest is not None
    OF_LABEL: tl.constexpr = objective.label is not None
    APART: tl.constexpr = OF_LABEL or objective.binary is not None
    S_TEMPERED: tl.constexpr = (
        student_model.temperature is not None or student_model.temperatures is not None
    )
    T_TEMPERED: tl.constexpr = (
        teacher_model.temperature is not None or teacher_model.temperatures is not None
    )
    weight = 1.0
    if inputs.weight is not None:
        weight = tl.load(inputs.weight + row)
    logits, gradient, unit, s_temperature = _open(student_model, row, sizes, ALIGNED)
    student = Row(logits, gradient, unit, student_model)
    if student_model.temperatures is not None:
        weight = tl.where(s_temperature > 0, weight, float("nan"))
    teacher, t_temperature = Row(None, None, None, None), s_temperature
    if teacher_model.scale is not None:
        logits, gradient, unit, t_temperature = _open(teacher_model, row, sizes, ALIGNED)
        teacher = Row(logits, gradient, unit, teacher_model)
        if teacher_model.temperatures is not None:
            weight = tl.where(t_temperature > 0, weight, float("nan"))
    label, z_label, pivot, plain_unit, vocabulary = 0, 0.0, None, None, V
    apart, t_label, t_plain_unit = None, 0.0, None
    if shard is not None:
        vocabulary = shard.total
    if WITH_LABEL or APART:
        label = tl.load(inputs.labels + row)
        valid = (label >= 0) & (label < vocabulary)
        weight = tl.where(valid, weight, float("nan"))
        label = tl.where(valid, label, 0).to(tl.int32)
        if shard is not None:
            label -= shard.first
        if STAGE == "row" or STAGE == "statistics":
            z_label = _label_of(student, label, V, shard)
        else:
            z_label = left_label(split, row, LANES)
        if objective.smoothing is not None:
            pivot = z_label
            if shard is not None and STAGE == "statistics":
                # Any finite logit of this process's columns, which need not have the label.
                z, _ = read(student, tl.arange(0, BLOCK_V), V)
                pivot = tl.max(z, 0)
            pivot = tl.where(pivot == -float("inf"), 0.0, pivot)
    if (WITH_LABEL or OF_LABEL) and S_TEMPERED:
        plain_unit = student_model.unit
    if APART:
        apart = label
        if teacher.unit is not None:
            if STAGE == "row" or STAGE == "statistics":
                t_label = _label_of(teacher, label, V, shard)
            else:
                t_label = left_t_label(split, row, LANES)
    if OF_LABEL and T_TEMPERED:
        t_plain_unit = teacher_model.unit

    # Without a normaliser, log p and log q are the tempered logits themselves.
    s_norm = Normalizer(0.0, student.unit, 0.0)
    t_norm, plain, phi, g, spread, entropy = s_norm, s_norm, 0.0, 0.0, 0.0, 0.0
    t_plain = s_norm
    s_at = Top(tl.full([], -1.0, tl.float32), 0.0, 0.0, 0.0, 0.0)
    t_at = s_at
    ratio = Ratio(0.0, 0.0, 1.0, student.unit, 0.0, 0.0)
    first_column = 0
    if shard is not None:
        first_column = shard.first
    if NORMALIZED or WITH_LABEL or ENTROPY:
        softmax_teacher = teacher
        if not NORMALIZED:
            softmax_teacher = Row(None, None, None, None)
        found = _statistics(
            row,
            student,
            softmax_teacher,
            plain_unit,
            t_plain_unit,
            z_label,
            t_label,
            apart,
            pivot,
            moments,
            V,
            shard,
            split,
            ENTROPY,
            ALIGNED,
            BLOCK_V,
            LANES,
            STAGE,
        )
        plain, phi, g, spread, entropy = (
            found.plain,
            found.phi,
            found.g,
            found.spread,
            found.entropy,
        )
        t_plain = found.t_plain
        if NORMALIZED:
            s_norm, t_norm = found.student, found.teacher
            s_at, t_at, ratio = found.s_at, found.t_at, found.ratio

    if teacher.unit is not None and STAGE != "statistics":
        if not NORMALIZED:
            t_norm = Normalizer(0.0, teacher.unit, 0.0)
            ratio = Ratio(0.0, 0.0, tl.div_rn(teacher.unit, student.unit), student.unit, 0.0, 0.0)
        if moments.forward is None and moments.reverse is None:
            if STAGE == "gradient":
                phi, g = left_sums(split, row, LANES)
            else:
                phi, g = sweep_sums(
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
                    DIVERGENCE,
                    FORM,
                    ALIGNED,
                    BLOCK_V,
                )
            if NORMALIZED and STAGE != "sums":
                phi, g, of_s, of_t = add_tops(
                    phi,
                    g,
                    s_norm,
                    t_norm,
                    s_at,
                    t_at,
                    found.log_quotient,
                    objective.degree,
                    parameters,
                    DIVERGENCE,
                    FORM,
                )
                s_at = Top(s_at.column, s_at.rest, s_at.z, s_at.other_z, of_s)
                t_at = Top(t_at.column, t_at.rest, t_at.z, t_at.other_z, of_t)
    if STAGE == "sums":
        leave_sums(split, row, phi, g)
    elif STAGE != "statistics":
        loss, distillation, cross_entropy = 0.0, 0.0, 0.0
        squared = s_temperature * s_temperature if SQUARED else 1.0
        others_phi, others_g = phi, g
        of_label, of_apart = 0.0, Sums(0.0, 0.0, 0.0)
        if APART:
            b = log_probability(z_label, s_norm)
            entropy = entropy_of_all(b, entropy)
            plain = normalizer_of_all(z_label, plain)
            if teacher.unit is not None:
                if OF_LABEL:
                    of_label = objective.label * share(t_label, t_plain)
                else:
                    of_apart = binary(objective.binary, log_probability(t_label, t_norm), b)
                    phi += of_apart.phi
                    g += of_apart.g
                    s_at = with_more(s_at, of_apart.g)
                    t_at = with_more(t_at, of_apart.h)
        if teacher.unit is not None:
            distillation = squared * phi
            if OF_LABEL:
                distillation += weighed(of_label, -log_probability(z_label, plain))
            if objective.alpha is not None:
                loss = objective.alpha * distillation
        if WITH_LABEL:
            if shard is not None and pivot is not None:
                pivot = plain.origin
                spread = left_spread(split, row, pivot, LANES)
            cross_entropy = _cross_entropy(
                z_label, pivot, plain, spread, objective.smoothing, vocabulary
            )
            loss += objective.rest * cross_entropy
        _store_row(outputs, row, split, weight * loss, distillation, cross_entropy, entropy)
        if width is not None:
            scale = objective.scale
            if inputs.scale is not None:
                scale *= tl.load(inputs.scale)
            s_scale = weight * scale * student_model.scale
            s_factor, t_factor, label_factor, smoothing = None, None, None, objective.smoothing
            if objective.alpha is not None:
                s_factor = objective.alpha * squared / s_temperature * s_scale
                t_factor = (
                    objective.alpha * squared / t_temperature * weight * scale * teacher_model.scale
                )
            if WITH_LABEL:
                label_factor = objective.rest * s_scale
            if OF_LABEL and objective.alpha is not None:
                # A cross-entropy without smoothing rides with the other.
                weight_of_label = objective.alpha * of_label
                if WITH_LABEL:
                    weight_of_label += objective.rest
                    if smoothing is not None:
                        smoothing *= objective.rest / weight_of_label
                label_factor = weight_of_label * s_scale
            h = objective.degree * others_phi - others_g
            if APART:
                h += of_apart.h
            s_at = where_finite(s_at, phi)
            t_at = where_finite(t_at, phi)
            sweep_gradients(
                student,
                teacher,
                s_norm,
                t_norm,
                plain,
                s_at,
                t_at,
                ratio,
                first_column,
                Sums(phi, g, h),
                of_apart,
                Factors(s_factor, label_factor, t_factor),
                objective.degree,
                apart,
                label,
                smoothing,
                vocabulary,
                V,
                width,
                split,
                parameters,
                DIVERGENCE,
                FORM,
                BLOCK_V,
            )


@triton.jit
def _store_row(outputs, row, split, loss, distillation, cross_entropy, entropy):
    """The row's numbers; of several programs, the first writes them."""
    first = None
    if split is not None:
        first = tl.program_id(1) == 0
    tl.store(outputs.loss + row, loss, mask=first)
    if outputs.distillation is not None:
        tl.store(outputs.distillation + row, distillation, mask=first)
        tl.store(outputs.cross_entropy + row, cross_entropy, mask=first)
        tl.store(outputs.entropy + row, entropy, mask=first)


@triton.jit
def _drop_row(
    row,
    student_model,
    teacher_model,
    outputs,
    sizes,
    split,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Zeros: nothing of the row is read."""
    _store_row(outputs, row, split, 0.0, 0.0, 0.0, 0.0)
    if student_model.width is not None:
        gradient = _row_pointer(student_model.gradient, row, sizes, ALIGNED)
        sweep_zeros(gradient, student_model.width, split, BLOCK_V)
    if teacher_model.width is not None:
        gradient = _row_pointer(teacher_model.gradient, row, sizes, ALIGNED)
        sweep_zeros(gradient, teacher_model.width, split, BLOCK_V)


@triton.jit(do_not_specialize=["sizes", "shard", "split"])
def kd_kernel(
    student_model,
    teacher_model,
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
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    STAGE: tl.constexpr,
):
    """One row, or a share of one: :class:`fastkd.call.contract.Result` says what of it is written."""
    row = tl.program_id(0)
    if split is not None:
        row += split.first
    keep = row >= 0
    if inputs.labels is not None:
        keep = keep & (tl.load(inputs.labels + row) != objective.ignore_index)
    if inputs.weight is not None:
        keep = keep & (tl.load(inputs.weight + row) != 0)
    if keep:
        _keep_row(
            row,
            student_model,
            teacher_model,
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
            DIVERGENCE,
            FORM,
            SQUARED,
            ALIGNED,
            BLOCK_V,
            LANES,
            STAGE,
        )
    elif STAGE == "row" or STAGE == "gradient":
        _drop_row(row, student_model, teacher_model, outputs, sizes, split, ALIGNED, BLOCK_V)


@triton.jit(do_not_specialize=["sizes"])
def scale_kernel(gradient, width, upstream, upstream_stride, sizes, BLOCK_V: tl.constexpr):
    """Multiply a row of a gradient in place; a factor of 1 costs one load."""
    row = tl.program_id(0)
    factor = tl.load(upstream + row * upstream_stride).to(tl.float32)
    if factor != 1.0:
        pointer = _row_pointer(gradient, row, sizes)
        lanes = tl.arange(0, BLOCK_V)
        for tile in range(tl.cdiv(width, BLOCK_V)):
            columns = tile * BLOCK_V + lanes
            value = tl.load(pointer + columns, mask=columns < width).to(tl.float32)
            scaled = (factor * value).to(pointer.dtype.element_ty)
            tl.store(pointer + columns, scaled, mask=columns < width)


# (bytes of a row, num_warps), up to that size. The wider a row, the fewer programs at a time, and the more of what a
# sweep has read is in L2 for the next one.
WARPS = ((4 << 10, 4), (128 << 10, 8), (1 << 62, 16))

# A thread's limit where rows are not aligned, and that where registers are crowded too. Told none, ptxas picks a number
# that lets one more block fit, and spills in a loop for it. Three blocks of 8 warps fit with 80, two with up to 128.
REGISTERS = (80, 112)


def _power_of_2(number: int) -> int:
    """The next one; triton.next_power_of_2 takes ten times as long, for it may be called in a kernel too."""
    return 1 << (number - 1).bit_length()


def tile(
    width: int,
    itemsize: int,
    crowded: bool = False,
    aligned: bool = True,
    architecture: str = "",
    closed_form: bool = True,
) -> tuple[int, int]:
    """(BLOCK_V, num_warps) for rows of that many columns: as timed on the architecture, else by this rule.

    Eight entries a thread are one load of 16 bytes of a low-precision row. With sixteen, tiles would not stay in
    registers on every target of tests/backends/triton/test_triton_aot.py, nor with eight where registers are crowded,
    or rows not aligned: there an entry is a load with an address and a mask of its own. 16 warps of those would leave
    ptxas only the choice of 64 registers and 128.
    """
    if aligned and not crowded:
        timed = TILES.get((architecture, itemsize, closed_form, _power_of_2(width)))
        if timed is not None:
            return timed
    warps = next(entry[1] for entry in WARPS if width * itemsize <= entry[0])
    if not aligned:
        warps = min(warps, 8)
    lanes = 32 * (4 if crowded or not aligned else 8)  # of a warp
    block = min(warps * lanes, max(_power_of_2(width), 128))
    return block, max(block // lanes, 1)


def register_limits(aligned: bool, crowded: bool) -> dict[str, int]:
    """The launch options that REGISTERS stands for."""
    return {} if aligned or torch.version.hip else {"maxnreg": REGISTERS[crowded]}


class Layout(NamedTuple):
    """How row numbers become addresses: row = (i0 * sizes[0] + i1) * sizes[1] + i2."""

    sizes: tuple[int, int]
    views: tuple[View, ...]


def _layout(*tensors: Tensor) -> Layout:
    """Address the rows of tensors [..., columns] of one leading shape, in place and in as few dimensions as they have.

    Adjacent dimensions merge where every tensor steps through both with one stride: the shifted view logits[:, :-1]
    keeps two, a contiguous tensor one.
    """
    count = math.prod(tensors[0].shape[:-1])
    if count > 1 and all(tensor.is_contiguous() for tensor in tensors):  # what the loop would find
        return Layout((1, count), tuple(View(t, (0, 0, t.shape[-1]), None) for t in tensors))
    sizes: list[int] = []
    strides: list[tuple[int, ...]] = []
    for axis, size in enumerate(tensors[0].shape[:-1]):
        steps = tuple(tensor.stride(axis) for tensor in tensors)
        if size == 1:
            continue
        if strides and all(
            outer == step * size for outer, step in zip(strides[-1], steps, strict=True)
        ):
            sizes[-1] *= size
            strides[-1] = steps
        else:
            sizes.append(size)
            strides.append(steps)
    if len(sizes) > 3:
        return Layout((1, count), tuple(View(t, (0, 0, 0), _offsets(t)) for t in tensors))
    padding = 3 - len(sizes)
    sizes = [1] * padding + sizes
    strides = [(0,) * len(tensors)] * padding + strides
    by_tensor = zip(*strides, strict=True)
    return Layout(
        (sizes[1], sizes[2]),
        tuple(View(t, s, None) for t, s in zip(tensors, by_tensor, strict=True)),
    )


def _offsets(tensor: Tensor) -> Tensor:
    """Where each row of a tensor [..., columns] starts, int64: for what three strides cannot say."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        total = total.unsqueeze(-1) + stride * torch.arange(size, device=tensor.device)
    return total.flatten()


def _aligned(columns: int, *views: View | None) -> bool:
    """Whether Triton knows these rows to be whole pieces of 16 bytes."""
    numbers = [columns]
    for view in views:
        if view is not None:
            numbers += [address(view.pointer), *view.strides, 0 if view.offsets is None else 1]
    return all(number % 16 == 0 for number in numbers)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return (
        contextlib.nullcontext()
        if device.type == "cpu"
        else getattr(torch, device.type).device(device)
    )


def _model(
    logits: View,
    gradient: View | None,
    scale: float,
    softcap: float,
    temperature: float,
    temperatures: Tensor | None,
) -> Model:
    return Model(
        logits,
        gradient,
        None if gradient is None else gradient.pointer.shape[-1],
        scale,
        1.0 if softcap else abs(scale),
        None if softcap or scale > 0 else -1.0,
        softcap or None,
        scale / softcap if softcap else None,
        None if temperature == 1.0 else temperature,
        temperatures,
    )


def _moments(divergence: Divergence) -> Moments:
    form = divergence.closed_form
    if form is None:
        return Moments(None, None, None)
    on_teacher = form.forward != 0 or form.cross != 0
    return Moments(
        form.forward if on_teacher else None,
        form.cross if on_teacher else None,
        form.reverse if form.reverse != 0 else None,
    )


def shard_of(options: Options) -> Shard | None:
    """What kernels are to know of it."""
    whole = options.shard
    return None if whole is None else Shard(whole.first, whole.total)


class Call(NamedTuple):
    """What kd_kernel is given for a loss, whatever the stage."""

    count: int  # rows
    stages: list[str]
    shared: Plan | None
    apart: bool  # whether the label's token is compared apart from the others
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]
    options: dict[str, Any]

    def left(self, fields: int, device: torch.device) -> Tensor:
        """Memory for what programs leave."""
        assert self.shared is not None
        shape = (self.count, fields, self.shared.programs)
        return torch.empty(shape, dtype=torch.float32, device=device)

    def grid(self, stage: str, rows: int) -> tuple[int, int, int]:
        """Programs over that many rows."""
        assert self.shared is not None
        # Without a gradient, the last stage has but the row's numbers to write.
        alone = stage == "gradient" and self.arguments[-2] is None
        return rows, 1 if alone else self.shared.programs, 1


def _call(
    student: Tensor,
    teacher: Tensor,
    student_gradient: Tensor | None,
    teacher_gradient: Tensor | None,
    outputs: Outputs,
    rows: Rows,
    options: Options,
) -> Call:
    """The tensors of unit stride but for the teacher; where alpha is 0 its gradient is not computed."""
    rows = native.readable_rows(rows)
    divergence, alpha, lead = options.divergence, options.alpha, student.shape[:-1]
    with_label = rows.labels is not None and alpha < 1.0
    target = divergence.target
    weights = {} if target is None else {target.form: float(target.weight)}
    parts = outputs.distillation is not None
    tensors = {
        "student": student,
        "teacher": unit_stride(teacher) if alpha or parts else None,
        "student_gradient": student_gradient,
        "teacher_gradient": teacher_gradient if alpha else None,
    }
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    sizes, views = _layout(*given.values())
    view = dict.fromkeys(tensors) | dict(zip(given, views, strict=True))
    student_model = _model(
        view["student"],
        view["student_gradient"],
        options.logit_scale,
        options.softcap,
        options.temperature,
        rows.temperature,
    )
    teacher_model = Model(*[None] * len(Model._fields))
    with_teacher = view["teacher"] is not None
    if view["teacher"] is not None:
        teacher_model = _model(
            view["teacher"],
            view["teacher_gradient"],
            options.teacher_logit_scale,
            options.teacher_softcap,
            options.teacher_temperature,
            rows.teacher_temperature,
        )
    widths = [g.shape[-1] for g in (student_gradient, tensors["teacher_gradient"]) if g is not None]
    crowded = teacher_gradient is not None or options.softcap > 0 or options.teacher_softcap > 0
    moments, width = _moments(divergence), max(widths, default=None)
    stages = []
    if with_label or parts or (divergence.normalized and with_teacher):
        stages.append("statistics")
    if moments.forward is None and moments.reverse is None and with_teacher:
        stages.append("sums")
    stages.append("gradient")
    reads = [student.itemsize, *([teacher.itemsize] if with_teacher else [])]
    count, device = lead.numel(), device_of(student.device)
    aligned = _aligned(options.vocab_size, view["student"], view["teacher"])
    shard, whole = shard_of(options), options.shard
    if whole is not None:
        shared = shard_plan(count, whole)
        # As many warps in every process, so that all merge what was left in one order, whatever is aligned where.
        block, warps = tile(whole.widest // shared.programs, max(reads), crowded, False)
        block *= 2 if aligned and not crowded else 1
    else:
        sweeps = len(stages) - (width is None)
        shared = plan(count, options.vocab_size * sum(reads), sweeps, device)
        if shared is None:
            architecture = device.architecture if device else ""
            block, warps = tile(
                options.vocab_size,
                max(reads),
                crowded,
                aligned,
                architecture,
                divergence.closed_form is not None,
            )
        else:
            block, warps = tile(options.vocab_size // shared.programs, max(reads), crowded, aligned)
    arguments = (
        student_model,
        teacher_model,
        Inputs(rows.labels, rows.weight, rows.scale),
        outputs,
        Objective(
            alpha or None,
            1.0 - alpha if with_label else None,
            (options.label_smoothing or None) if with_label else None,
            options.scale,
            divergence.degree or 0.0,
            options.ignore_index,
            weights.get("binary"),
            weights.get("label"),
        ),
        moments,
        divergence.params,
        sizes,
        options.vocab_size,
        width,
        shard,
    )
    constants = (
        bind(divergence.function),
        form_of(divergence),
        options.scale_by_temperature,
        aligned,
        block,
    )
    launch = {
        "num_warps": warps,
        "enable_fp_fusion": True,
        **register_limits(aligned, crowded),
    }
    return Call(count, stages, shared, target is not None, arguments, constants, launch)


def _launch_shares(call: Call, device: torch.device) -> None:
    """A kernel a stage over each group of rows."""
    programs, group = call.shared
    statistics = sums = call.left(FIELDS, device)
    if "sums" in call.stages:
        sums = call.left(2, device)
    apart = call.left(APART_FIELDS, device) if call.apart else None
    kernels: dict[str, Any] = {}
    for first in range(0, call.count, group):
        split = Split(statistics, sums, apart, first, programs, programs)
        for stage in call.stages:
            grid = call.grid(stage, min(group, call.count - first))
            given = (*call.arguments, split, *call.constants, LANES, stage)
            # What the first group's launch has compiled serves the others, for `split` is not specialised: what Triton
            # spends on finding it is ten times what it spends on a launch (bench/studies/host.py). The interpreter
            # gives None.
            if kernels.get(stage) is None:
                kernels[stage] = kd_kernel[grid](*given, **call.options)
            else:
                kernels[stage][grid](*given)


def kd_rows(student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want) -> Result:
    """The loss of each row and its gradients; shapes and meaning as :class:`fastkd.call.contract.Result` has them."""
    lead = student.shape[:-1]
    student_gradient = teacher_gradient = None
    source = unit_stride(student)
    if want.student_gradient:
        student_gradient = source if want.inplace else student.new_empty(student.shape)
    if want.teacher_gradient:  # where alpha is 0 the loss does not depend on the teacher
        make = teacher.new_empty if options.alpha else teacher.new_zeros
        teacher_gradient = make(teacher.shape)

    def per_row(wanted: bool = True) -> Tensor | None:
        return student.new_empty(lead, dtype=torch.float32) if wanted else None

    outputs = Outputs(per_row(), *(per_row(want.parts) for _ in range(3)))
    call = _call(source, teacher, student_gradient, teacher_gradient, outputs, rows, options)
    if call.count:
        with _on(student.device):
            if call.shared is None:
                given = (*call.arguments, None, *call.constants, LANES, "row")
                kd_kernel[(call.count,)](*given, **call.options)
            else:
                _launch_shares(call, student.device)
    if want.inplace and student_gradient is not None:
        student_gradient = student if source is student else student.copy_(source)
    total = outputs.loss.sum()
    if options.scale != 1.0:  # it is 1 where the device knows another
        total = total * options.scale
    if rows.scale is not None:
        total = total * rows.scale
    return Result(outputs.loss, total, student_gradient, teacher_gradient, *outputs[1:])


# The same where several processes share the vocabulary: fastkd/call/contract.py says what passes between the steps.


def _launch_stage(
    call: Call, stage: str, statistics: Tensor, apart: Tensor | None, sums: Tensor, shares: int
) -> None:
    assert call.shared is not None
    if call.count:
        split = Split(statistics, sums, apart, 0, call.shared.programs, shares)
        given = (*call.arguments, split, *call.constants, max(LANES, _power_of_2(shares)), stage)
        with _on(statistics.device):
            kd_kernel[call.grid(stage, call.count)](*given, **call.options)


def _shares(gathered: Tensor, programs: int) -> Tensor:
    """What programs have left, [processes, rows, fields * programs], with all of a row's side by side."""
    processes, rows, numbers = gathered.shape
    fields = numbers // programs
    each = gathered.reshape(processes, rows, fields, programs).permute(1, 2, 0, 3)
    # Kernels address it as dense, and of one program a process reshape makes a view.
    return each.reshape(rows, fields, processes * programs).contiguous()


def _found(call: Call, gathered: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """(statistics, what is left besides where a token is apart, shares of a row), from what shard_statistics gives."""
    assert call.shared is not None
    found = _shares(gathered, call.shared.programs)
    if not call.apart:
        return found, None, found.shape[-1]
    apart = found[:, -APART_FIELDS:].contiguous()
    return found[:, :-APART_FIELDS].contiguous(), apart, found.shape[-1]


def shard_statistics(call: ShardCall) -> Statistics:
    """Of this process's columns: FIELDS numbers a row and program; none where nothing is to be known of all of them.

    APART_FIELDS more where the label's token is compared apart from the others.
    """
    student, teacher, rows, options, result, *_ = call
    gradients = [None if x is None else unit_stride(x) for x in result[2:4]]
    outputs = Outputs(result.loss, *result[4:])
    launch = _call(unit_stride(student), teacher, *gradients, outputs, rows, options)
    wanted = "statistics" in launch.stages
    found = launch.left(FIELDS if wanted else 0, student.device)
    apart = launch.left(APART_FIELDS, student.device) if launch.apart else None
    if wanted:
        _launch_stage(launch, "statistics", found, apart, found, launch.shared.programs)
    left = found if apart is None else torch.cat([found, apart], 1)
    return Statistics(left.flatten(1), kept=launch)


def shard_sums(call: ShardCall) -> Tensor | None:
    """Of this process's columns, given the statistics of all: 2 numbers a row and program."""
    launch = call.known().kept
    if "sums" not in launch.stages:
        return None
    found, apart, shares = _found(launch, call.known().gathered)
    sums = launch.left(2, call.student.device)
    _launch_stage(launch, "sums", found, apart, sums, shares)
    return sums.flatten(1)


def shard_results(call: ShardCall) -> None:
    """Fill the result, given the statistics and the sums of all processes."""
    launch = call.known().kept
    found, apart, shares = _found(launch, call.known().gathered)
    total = found if call.sums is None else _shares(call.sums, launch.shared.programs)
    _launch_stage(launch, "gradient", found, apart, total, shares)
    for model, gradient in zip(launch.arguments[:2], call.result[2:4], strict=True):
        if gradient is None:
            continue
        if model.gradient is None:  # where alpha is 0 the loss does not depend on the teacher
            gradient.zero_()
        elif model.gradient.pointer is not gradient:
            gradient.copy_(model.gradient.pointer)


def scale_rows_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply each row of gradient [..., V] by upstream, a scalar or [...]; by 1 costs no pass over it."""
    if not gradient.numel():
        return
    sizes, (view,) = _layout(gradient)
    width = gradient.shape[-1]
    block, warps = tile(width, gradient.itemsize)
    with _on(gradient.device):
        scale_kernel[(gradient.numel() // width,)](
            view,
            width,
            readable(upstream).contiguous(),
            1 if upstream.dim() else 0,
            sizes,
            block,
            num_warps=warps,
            enable_fp_fusion=True,
        )


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for logits of a chunk."""
    return torch.empty(shape, dtype=dtype, device=device)
