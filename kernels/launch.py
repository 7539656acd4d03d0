"""The launchers of the row kernel: what Python prepares for it.

:func:`kd_rows` computes a loss in one call. The shard steps (:func:`shard_statistics`, :func:`shard_sums`,
:func:`shard_results`) compute it if several processes share the vocabulary. Both prepare a :class:`Launch`: views that
address the rows in place (:func:`lay_out`), the number of programs per row (``split.plan``), and the tile
(:func:`tile`).

``launcher.py`` launches. A call that repeats an earlier one needs no preparation: its launches are repeated.

Logits with any leading strides are addressed in place; a last stride other than 1 is copied.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends import native
from fastkd.call.contract import Options, Result, Rows, ShardCall, Statistics, Want
from fastkd.core.tensors import address, readable, unit_stride
from fastkd.divergences import Divergence

from . import launcher, measures
from .kernel import Inputs, Objective, Outputs, Side, View, kd_kernel, scale_kernel
from .skeleton import bind, form_of
from .split import FIELDS, LABEL_TERM_FIELDS, LANES, SUMS, Device, Plan, device_of, plan, shard_plan
from .sweeps import NOT_SPLIT, Moments, Split, VocabShard
from .tuning import TILES

# (largest number of bytes of a row, num_warps). Besides its columns a row takes some 1900 instructions of each warp, so
# shorter rows have fewer warps. Three programs of 8 warps fit on a multiprocessor with REGISTERS.
WARPS = ((16 << 10, 2), (64 << 10, 4), (1 << 62, 8))

# Limits of registers per thread: the usual one, and that for kernels that need many, because they are crowded (`tile`),
# or the divergence has a label term or no closed form. With up to 80 registers, three programs of 8 warps fit on a
# multiprocessor, with up to 128 two. Without a limit, ptxas may choose a number just above.
REGISTERS = (80, 128)


def _power_of_2(number: int) -> int:
    """Return the next power of 2; triton.next_power_of_2 takes ten times as long, because kernels may call it too."""
    return 1 << (number - 1).bit_length()


def tile(
    width: int,
    itemsize: int,
    crowded: bool = False,
    aligned: bool = True,
    architecture: str = "",
    closed_form: bool = True,
) -> tuple[int, int]:
    """Return (BLOCK_V, num_warps) for rows of this width: a timed tile of the architecture, else the rule's.

    Eight elements per thread are one load of 16 bytes in low precision. Sixteen would spill on some target of
    tests/backends/triton/test_triton_aot.py. So would eight if the kernel needs many registers (`crowded`), or if rows
    are not aligned, because each element then has a load of its own.
    """
    if aligned and not crowded:
        timed = TILES.get((architecture, itemsize, closed_form, _power_of_2(width)))
        if timed is not None:
            return timed
    warps = next(warps for row_bytes, warps in WARPS if width * itemsize <= row_bytes)
    columns_per_warp = 32 * (4 if crowded or not aligned else 8)
    block = min(warps * columns_per_warp, max(_power_of_2(width), 128))
    return block, max(block // columns_per_warp, 1)


# Rows of at most this many columns are one tile (narrow.py).
NARROW = 4096
# Columns of such a row that a thread has: usually, and if the kernel needs many registers.
NARROW_COLUMNS = (32, 16)
# Their limits of registers per thread, as REGISTERS: with up to 168, a multiprocessor holds twelve warps.
NARROW_REGISTERS = (168, 168)
# With measures, ptxas would park twice as much in local memory at that limit.
NARROW_REGISTERS_WITH_MEASURES = (255, 255)


def narrow_tile(width: int, crowded: bool) -> tuple[int, int]:
    """Return (BLOCK_V, num_warps) for rows that are one tile."""
    block = max(_power_of_2(width), 128)
    return block, max(block // (NARROW_COLUMNS[crowded] * WARP), 1)


# Threads of a warp; a wavefront of AMD's CDNA has 64.
WARP = 64 if torch.version.hip else 32


def threads_of(block: int, warps: int, aligned: bool, itemsize: int) -> tuple[int, int]:
    """Return (ADJACENT, THREADS): how the columns of a tile are divided among threads (``sweeps.fold``).

    itemsize: of the narrowest tensor, whose 16 bytes hold the most columns.
    """
    threads = min(warps * WARP, block)
    return min(16 // itemsize, block // threads) if aligned else 1, threads


def register_limit(many: bool, limits: tuple[int, int] = REGISTERS) -> dict[str, int]:
    """Return the launch option that sets the limit of registers. many: the kernel needs many."""
    return {} if torch.version.hip else {"maxnreg": limits[many]}


class Layout(NamedTuple):
    """How row numbers become addresses: row = (i0 * sizes[0] + i1) * sizes[1] + i2."""

    sizes: tuple[int, int]
    views: tuple[View, ...]


def lay_out(*tensors: Tensor) -> Layout:
    """Address the rows of tensors [..., columns] in place, in as few dimensions as possible; leading shapes are equal.

    Adjacent dimensions merge if every tensor steps through both with one stride. The shifted view logits[:, :-1] keeps
    two dimensions, a contiguous tensor one.
    """
    count = math.prod(tensors[0].shape[:-1])
    if count > 1 and all(
        tensor.is_contiguous() for tensor in tensors
    ):  # the loop's result, without the loop
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
        return Layout((1, count), tuple(View(t, (0, 0, 0), _row_offsets(t)) for t in tensors))
    padding = 3 - len(sizes)
    sizes = [1] * padding + sizes
    strides = [(0,) * len(tensors)] * padding + strides
    by_tensor = zip(*strides, strict=True)
    return Layout(
        (sizes[1], sizes[2]),
        tuple(View(t, s, None) for t, s in zip(tensors, by_tensor, strict=True)),
    )


def _row_offsets(tensor: Tensor) -> Tensor:
    """Return the offset of each row of a tensor [..., columns], for layouts that three strides cannot express."""
    offsets = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        offsets = offsets.unsqueeze(-1) + stride * torch.arange(size, device=tensor.device)
    return offsets.flatten()


def rows_on_16_bytes(columns: int, *views: View | None) -> bool:
    """Return whether every row of every tensor, and its vocabulary, starts and ends at a multiple of 16 bytes."""
    for view in views:
        if view is not None:
            itemsize, width = view.pointer.element_size(), view.pointer.shape[-1]
            offsets = [size * itemsize for size in (columns, width, *view.strides)]
            if view.offsets is not None or any(
                number % 16 for number in (address(view.pointer), *offsets)
            ):
                return False
    return True


def rows_start_alike(*views: View | None) -> bool:
    """Return whether the logits and gradients of each row start equally far past a multiple of 16 bytes."""
    given = [view for view in views if view is not None]
    if any(view.offsets is not None for view in given):
        return False
    sizes = [view.pointer.element_size() for view in given]
    starts = [
        (address(view.pointer) % 16, *(stride * size % 16 for stride in view.strides))
        for view, size in zip(given, sizes, strict=True)
    ]
    return len(set(sizes)) == len(set(starts)) == 1


def is_aligned(columns: int, *views: View | None) -> bool:
    """Return whether Triton can see that every row starts at a multiple of 16 bytes and ends at one."""
    numbers = [columns]
    for view in views:
        if view is not None:
            numbers += [address(view.pointer), *view.strides, 0 if view.offsets is None else 1]
    return all(number % 16 == 0 for number in numbers)


_HERE = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which this device is current, because Triton launches on the current device."""
    if device.type == "cpu":
        return _HERE
    devices = getattr(torch, device.type)
    return _HERE if devices.current_device() == device.index else devices.device(device)


def make_side(
    logits: View,
    gradient: View | None,
    scale: float,
    softcap: float,
    temperature: float,
    row_temperatures: Tensor | None,
) -> Side:
    """Return one side of the loss."""
    return Side(
        logits=logits,
        gradient=gradient,
        width=None if gradient is None else gradient.pointer.shape[-1],
        logit_scale=scale,
        unit_t1=1.0 if softcap else abs(scale),
        sign=None if softcap or scale > 0 else -1.0,
        softcap=softcap or None,
        softcap_gain=scale / softcap if softcap else None,
        temperature=None if temperature == 1.0 else temperature,
        row_temperatures=row_temperatures,
    )


def student_side(logits: View, gradient: View | None, rows: Rows, options: Options) -> Side:
    """Return the student's side."""
    scale, softcap, temperature = options.logit_scale, options.softcap, options.temperature
    return make_side(logits, gradient, scale, softcap, temperature, rows.temperature)


def teacher_side(logits: View | None, gradient: View | None, rows: Rows, options: Options) -> Side:
    """Return the teacher's side; every field is None if its logits are not read."""
    if logits is None:
        return Side(*[None] * len(Side._fields))
    return make_side(
        logits,
        gradient,
        options.teacher_logit_scale,
        options.teacher_softcap,
        options.teacher_temperature,
        rows.teacher_temperature,
    )


def _moments(divergence: Divergence) -> Moments:
    """Return the weights of the moments that the divergence's closed form needs; logits without a softmax have none."""
    form = divergence.closed_form
    if form is None or not divergence.normalized:
        return Moments(None, None, None)
    if form.forward and form.cross:  # one moment would have to serve both
        return Moments(None, None, None)
    return Moments(form.forward or None, form.cross or None, form.reverse or None)


def _objective(options: Options, with_label: bool) -> Objective:
    """Return the weights of the loss's terms."""
    divergence, alpha = options.divergence, options.alpha
    target = divergence.target
    label_weights = {} if target is None else {target.form: float(target.weight)}
    return Objective(
        alpha=alpha or None,
        ce_weight=options.cross_entropy_weight if with_label else None,
        smoothing=(options.label_smoothing or None) if with_label else None,
        scale=options.scale,
        degree=divergence.degree or 0.0,
        ignore_index=options.ignore_index,
        binary_weight=label_weights.get("binary"),
        label_weight=label_weights.get("label"),
    )


def vocab_shard(options: Options) -> VocabShard | None:
    """Return the vocabulary columns of this process, or None if it has all of them."""
    shard = options.shard
    return None if shard is None else VocabShard(shard.first, shard.total)


class Launch(NamedTuple):
    """A prepared launch of kd_kernel: its arguments, without the split and the stage."""

    num_rows: int
    stages: list[str]
    plan: Plan | None
    label_term: bool  # whether the divergence treats the label separately
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def outputs(self) -> Outputs:
        """The outputs among the arguments."""
        outputs: Outputs = self.arguments[3]
        return outputs

    def empty_partials(self, fields: int, device: torch.device) -> Tensor:
        """Return memory for the partial results of all programs."""
        assert self.plan is not None
        shape = (self.num_rows, fields, self.plan.num_splits)
        return torch.empty(shape, dtype=torch.float32, device=device)

    def grid(self, stage: str, rows: int) -> tuple[int, int, int]:
        """Return the grid of a stage over this many rows."""
        assert self.plan is not None
        # Without a gradient or measures, the last stage only stores a row's loss and parts: one program does.
        unread = self.arguments[-2] is None and self.outputs.measures is None
        single = stage == "gradient" and unread
        return rows, 1 if single else self.plan.num_splits, 1


class _Tensors(NamedTuple):
    """The tensors of a call; None if not read or not wanted. All but the teacher have unit stride already."""

    student: Tensor
    teacher: Tensor | None
    student_gradient: Tensor | None
    teacher_gradient: Tensor | None


def _stages(divergence: Divergence, with_label: bool, parts: bool, with_teacher: bool) -> list[str]:
    """Return the sweeps that a loss needs."""
    stages = []
    if with_label or parts or (divergence.normalized and with_teacher):
        stages.append("statistics")
    if with_teacher and not any(_moments(divergence)):
        stages.append("sums")
    return [*stages, "gradient"]


def _plan_and_tile(
    tensors: _Tensors, options: Options, sweeps: int, crowded: bool, aligned: bool
) -> tuple[Plan | None, int, int]:
    """Return (plan, BLOCK_V, num_warps)."""
    student, teacher = tensors[:2]
    itemsizes = [student.itemsize] if teacher is None else [student.itemsize, teacher.itemsize]
    num_rows, shard = student.shape[:-1].numel(), options.shard
    if shard is not None:
        splits = shard_plan(num_rows, shard)
        # Every process must have the same number of warps, so that all merge partial results in one order. Alignment
        # may differ among them, so the warps are those of unaligned rows.
        block, warps = tile(shard.widest // splits.num_splits, max(itemsizes), crowded, False)
        return splits, block * 2 if aligned and not crowded else block, warps
    device: Device | None = device_of(student.device)
    row_splits = plan(num_rows, options.vocab_size * sum(itemsizes), sweeps, device)
    if row_splits is None:
        architecture = device.architecture if device else ""
        closed_form = options.divergence.closed_form is not None
        return None, *tile(
            options.vocab_size, max(itemsizes), crowded, aligned, architecture, closed_form
        )
    width = options.vocab_size // row_splits.num_splits
    return row_splits, *tile(width, max(itemsizes), crowded, aligned)


def _prepare(
    student: Tensor,
    teacher: Tensor,
    student_gradient: Tensor | None,
    teacher_gradient: Tensor | None,
    outputs: Outputs,
    rows: Rows,
    options: Options,
) -> Launch:
    """Prepare a launch. With alpha 0 the teacher's gradient is not computed."""
    rows = native.readable_rows(rows)
    divergence, alpha = options.divergence, options.alpha
    with_label = rows.labels is not None and alpha < 1.0
    parts, measured = outputs.distillation is not None, outputs.measures is not None
    crowded = teacher_gradient is not None or options.softcap > 0 or options.teacher_softcap > 0
    tensors = _Tensors(
        student,
        unit_stride(teacher) if alpha or parts or measured else None,
        student_gradient,
        teacher_gradient if alpha else None,
    )
    sizes, views = lay_out(*(tensor for tensor in tensors if tensor is not None))
    remaining = iter(views)
    student_view, teacher_view, student_gradient_view, teacher_gradient_view = (
        None if tensor is None else next(remaining) for tensor in tensors
    )
    assert student_view is not None
    gradients = [gradient for gradient in tensors[2:] if gradient is not None]
    width = max((gradient.shape[-1] for gradient in gradients), default=None)
    given = student_view, teacher_view, student_gradient_view, teacher_gradient_view
    aligned = rows_on_16_bytes(options.vocab_size, *given)
    stages = _stages(divergence, with_label, parts, teacher_view is not None)
    sweeps = len(stages) - (width is None)  # with measures too, so that the loss has the same bits
    splits, block, warps = _plan_and_tile(tensors, options, sweeps, crowded, aligned)
    widest = max(options.vocab_size, width or 0)
    one_tile = splits is None and widest <= NARROW
    head = False
    if one_tile:
        block, warps = narrow_tile(widest, crowded)
    elif splits is None and not aligned and rows_start_alike(*given):
        head = aligned = True
        splits, block, warps = _plan_and_tile(tensors, options, sweeps, crowded, aligned)
    arguments = (
        student_side(student_view, student_gradient_view, rows, options),
        teacher_side(teacher_view, teacher_gradient_view, rows, options),
        Inputs(rows.labels, rows.weight, rows.scale),
        outputs,
        _objective(options, with_label),
        _moments(divergence),
        divergence.params,
        sizes,
        options.vocab_size,
        width,
        vocab_shard(options),
    )
    function, form = bind(divergence.function), form_of(divergence)
    itemsize = min(tensor.itemsize for tensor in tensors if tensor is not None)
    layout = threads_of(block, warps, aligned, itemsize)
    constants = (function, form, options.scale_by_temperature, *layout, block, one_tile, head)
    many = crowded or measured or divergence.target is not None or not any(_moments(divergence))
    limits = REGISTERS
    if one_tile:
        limits = NARROW_REGISTERS_WITH_MEASURES if measured else NARROW_REGISTERS
    launch_options = {
        "num_warps": warps,
        "enable_fp_fusion": True,
        **register_limit(many, limits),
    }
    return Launch(
        student.shape[:-1].numel(),
        stages,
        splits,
        divergence.target is not None,
        arguments,
        constants,
        launch_options,
    )


def _launch_splits(
    launch: Launch, device: torch.device
) -> tuple[list[launcher.Launched], list[Tensor]]:
    """Launch one kernel per stage over each group of rows; return (the launches, the memory of partial results)."""
    assert launch.plan is not None
    num_splits, group = launch.plan
    statistics = sums = launch.empty_partials(FIELDS, device)
    scratch = [statistics]
    if "sums" in launch.stages:
        sums = launch.empty_partials(SUMS, device)
        scratch.append(sums)
    label_term = None
    if launch.label_term:
        label_term = launch.empty_partials(LABEL_TERM_FIELDS, device)
        scratch.append(label_term)
    partials = None
    if launch.outputs.measures is not None:
        partials = launch.empty_partials(measures.PARTIALS, device)
        scratch.append(partials)
    launches = []
    for first_row in range(0, launch.num_rows, group):
        split = Split(statistics, sums, label_term, first_row, num_splits, num_splits, partials)
        for stage in launch.stages:
            grid = launch.grid(stage, min(group, launch.num_rows - first_row))
            arguments = (*launch.arguments, split, *launch.constants, LANES, stage)
            launches.append(launcher.launch(kd_kernel, grid, arguments, **launch.options))
    if partials is not None:
        grid = (launch.num_rows, 1, 1)
        out = launch.outputs.measures
        arguments = (partials, num_splits, out, measures.PARTIALS, LANES)
        launches.append(launcher.launch(measures.merge_kernel, grid, arguments, num_warps=1))
    return launches, scratch


def _launch_rows(
    launch: Launch, device: torch.device
) -> tuple[list[launcher.Launched], list[Tensor]]:
    """Compute all rows; return (the launches, the memory of partial results)."""
    if launch.plan is not None:
        return _launch_splits(launch, device)
    arguments = (*launch.arguments, NOT_SPLIT, *launch.constants, LANES, "row")
    grid = (launch.num_rows, 1, 1)
    return [launcher.launch(kd_kernel, grid, arguments, **launch.options)], []


def kd_rows(student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want) -> Result:
    """Compute the loss of each row and its gradients, as :class:`fastkd.call.contract.Result` specifies."""
    device, shape = student.device, student.shape
    lead = shape[:-1]
    student_gradient = teacher_gradient = read_teacher = None
    source, rows = unit_stride(student), native.readable_rows(rows)
    if options.alpha or want.parts or want.measures:
        read_teacher = unit_stride(teacher)
    if want.student_gradient:
        student_gradient = source
        if not want.inplace:  # torch.empty and new_empty take twice as long
            student_gradient = torch.empty_like(source, memory_format=torch.contiguous_format)
    if want.teacher_gradient:  # with alpha 0 the loss does not depend on the teacher
        make = teacher.new_empty if options.alpha else teacher.new_zeros
        teacher_gradient = make(teacher.shape)
    loss = torch.empty(lead, dtype=torch.float32, device=device)
    parts: tuple[Tensor | None, ...] = (None, None, None)
    if want.parts:
        parts = tuple(torch.empty(lead, dtype=torch.float32, device=device) for _ in range(3))
    measured = None
    if want.measures:
        measured = torch.empty((*lead, measures.COUNT.value), dtype=torch.float32, device=device)
    count = loss.numel()
    if count:
        made = (None if want.inplace else student_gradient, teacher_gradient, *parts, measured)
        optional = (read_teacher, *made, *rows)
        tensors = [source, loss, *[tensor for tensor in optional if tensor is not None]]
        present = tuple([tensor is not None for tensor in optional])
        with on_device(device):
            key, done = launcher.replay(kd_kernel, (options, want, present), tensors)
            if not done:
                outputs = Outputs(loss, *parts, measured)
                launch = _prepare(
                    source, teacher, student_gradient, teacher_gradient, outputs, rows, options
                )
                launches, scratch = _launch_rows(launch, device)
                launcher.record(key, launches, tensors, scratch)
    if want.inplace and student_gradient is not None:
        student_gradient = student if source is student else student.copy_(source)
    if options.scale * count == 1.0:  # launches one kernel instead of two
        total = loss.mean()
    else:
        total = loss.sum()
        if options.scale != 1.0:  # it is 1 if rows.scale is given
            total.mul_(options.scale)
    if rows.scale is not None:
        total = total * rows.scale
    return Result(loss, total, student_gradient, teacher_gradient, *parts, measured)


# The shard steps. fastkd/call/contract.py specifies what passes between them.


def _launch_stage(
    launch: Launch,
    stage: str,
    statistics: Tensor,
    label_term: Tensor | None,
    sums: Tensor,
    num_partials: int,
) -> None:
    """Launch one stage over all rows."""
    assert launch.plan is not None
    if launch.num_rows:
        split = Split(statistics, sums, label_term, 0, launch.plan.num_splits, num_partials, None)
        lanes = max(LANES, _power_of_2(num_partials))
        arguments = (*launch.arguments, split, *launch.constants, lanes, stage)
        with on_device(statistics.device):
            launcher.launch(
                kd_kernel, launch.grid(stage, launch.num_rows), arguments, **launch.options
            )


def _by_row(gathered: Tensor, num_splits: int) -> Tensor:
    """Turn partial results [processes, rows, fields * num_splits] into [rows, fields, processes * num_splits]."""
    processes, rows, numbers = gathered.shape
    fields = numbers // num_splits
    by_row = gathered.reshape(processes, rows, fields, num_splits).permute(1, 2, 0, 3)
    # Kernels need dense memory, and with one split per process reshape returns a view.
    return by_row.reshape(rows, fields, processes * num_splits).contiguous()


def _gathered_statistics(launch: Launch, gathered: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Return (partial statistics, partial label terms or None, partial results per row) of all processes."""
    assert launch.plan is not None
    partials = _by_row(gathered, launch.plan.num_splits)
    if not launch.label_term:
        return partials, None, partials.shape[-1]
    label_term = partials[:, -LABEL_TERM_FIELDS:].contiguous()
    return partials[:, :-LABEL_TERM_FIELDS].contiguous(), label_term, partials.shape[-1]


def shard_statistics(call: ShardCall) -> Statistics:
    """Return the partial statistics of this process's columns.

    They are FIELDS numbers per row and program, or none if the loss needs no statistics. A divergence with a label term
    adds LABEL_TERM_FIELDS numbers.
    """
    student, teacher, rows, options, result, *_ = call
    gradients = [None if x is None else unit_stride(x) for x in result[2:4]]
    outputs = Outputs(result.loss, *result.parts[:3], None)
    launch = _prepare(unit_stride(student), teacher, *gradients, outputs, rows, options)
    assert launch.plan is not None
    needed = "statistics" in launch.stages
    partials = launch.empty_partials(FIELDS if needed else 0, student.device)
    label_term = None
    if launch.label_term:
        label_term = launch.empty_partials(LABEL_TERM_FIELDS, student.device)
    if needed:
        num_splits = launch.plan.num_splits
        _launch_stage(launch, "statistics", partials, label_term, partials, num_splits)
    if label_term is not None:
        partials = torch.cat([partials, label_term], 1)
    return Statistics(partials.flatten(1), kept=launch)


def shard_sums(call: ShardCall) -> Tensor | None:
    """Return the partial sums of this process's columns, SUMS numbers per row and program, from all statistics."""
    launch = call.known().kept
    if "sums" not in launch.stages:
        return None
    statistics, label_term, num_partials = _gathered_statistics(launch, call.known().gathered)
    sums = launch.empty_partials(SUMS, call.student.device)
    _launch_stage(launch, "sums", statistics, label_term, sums, num_partials)
    return sums.flatten(1)


def shard_results(call: ShardCall) -> None:
    """Fill in the result, from the statistics and sums of all processes."""
    launch = call.known().kept
    statistics, label_term, num_partials = _gathered_statistics(launch, call.known().gathered)
    sums = statistics if call.sums is None else _by_row(call.sums, launch.plan.num_splits)
    _launch_stage(launch, "gradient", statistics, label_term, sums, num_partials)
    for side, gradient in zip(launch.arguments[:2], call.result[2:4], strict=True):
        if gradient is None:
            continue
        if side.gradient is None:  # with alpha 0 the loss does not depend on the teacher
            gradient.zero_()
        elif side.gradient.pointer is not gradient:
            gradient.copy_(side.gradient.pointer)


def scale_rows_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply each row of gradient [..., V] by upstream, a scalar or [...]; a row whose factor is 1 is not read."""
    if not gradient.numel():
        return
    upstream = readable(upstream).contiguous()
    tensors = (gradient, upstream)
    with on_device(gradient.device):
        key, done = launcher.replay(scale_kernel, None, tensors)
        if not done:
            sizes, (view,) = lay_out(gradient)
            width = gradient.shape[-1]
            block, warps = tile(width, gradient.itemsize)
            launched = launcher.launch(
                scale_kernel,
                (gradient.numel() // width, 1, 1),
                (view, width, upstream, 1 if upstream.dim() else 0, sizes, block),
                num_warps=warps,
                enable_fp_fusion=True,
            )
            launcher.record(key, [launched], tensors)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialized memory for a chunk's logits."""
    return torch.empty(shape, dtype=dtype, device=device)
