"""The arguments of a native kernel: addresses, shapes and numbers in place of tensors.

fastkd.backends.cpu and fastkd.backends.cuda use it.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fastkd.call.contract import Options, Result, Rows, ShardCall, Statistics, Want
from fastkd.call.options import OPTION_NAMES
from fastkd.core.tensors import address, readable, unit_stride
from fastkd.divergences import DEFINITIONS, Divergence, Target
from fastkd.teachers import TAILS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NUMBER = {function: number for number, function in enumerate(DEFINITIONS)}
_scalars = attrgetter(*OPTION_NAMES)  # the tuple that csrc/generated/options.h unpacks
_NOWHERE: tuple[int, int, int, tuple[int, ...]] = (0, 0, 0, ())


def logits(tensor: Tensor | None) -> tuple[int, int, int, tuple[int, ...]]:
    """Return (address, dtype, width, leading strides) of a tensor [..., V] whose last stride is 1."""
    if tensor is None:
        return _NOWHERE
    return address(tensor), DTYPES[tensor.dtype], tensor.shape[-1], tensor.stride()[:-1]


def readable_rows(rows: Rows) -> Rows:
    """The rows with each tensor passed through :func:`fastkd.core.tensors.readable`."""
    if all(value is None for value in rows):
        return rows
    for name, value in zip(rows._fields, rows, strict=True):
        if value is not None:  # an address has no dtype
            kind = torch.int64 if name in ("labels", "ids") else torch.float32
            assert value.dtype == kind, (name, value.dtype)
    return Rows(*[None if value is None else readable(value) for value in rows])


def readable_inputs(student: Tensor, teacher: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Rows]:
    """The inputs of a call as a kernel reads them, which are copies where memory holds them otherwise."""
    return unit_stride(student), unit_stride(teacher), readable_rows(rows)


def outputs(
    student: Tensor,
    teacher: Tensor,
    want: Want,
    empty: Callable[..., Tensor] = torch.empty,
    row_dtype: torch.dtype = torch.float32,
    measures: int = 0,
    per_row: Callable[..., Tensor] = torch.empty,
) -> Result:
    """Allocate the wanted outputs; an in-place gradient uses the memory of the student's logits.

    Args:
        student: the student's logits.
        teacher: the teacher's logits.
        want: the wanted outputs.
        empty: allocates a gradient, given shape, dtype and device.
        row_dtype: the dtype of the values per row.
        measures: how many measures a row has, if they are wanted.
        per_row: allocates values per row and the total, like `empty`.
    """
    lead, device = student.shape[:-1], student.device
    student_gradient = teacher_gradient = None
    if want.student_gradient:
        student_gradient = student
        if not want.inplace:
            student_gradient = empty(student.shape, dtype=student.dtype, device=device)
    if want.teacher_gradient:
        teacher_gradient = empty(teacher.shape, dtype=teacher.dtype, device=device)
    loss = per_row(lead, dtype=row_dtype, device=device)
    total = per_row((), dtype=row_dtype, device=device)
    result = Result(loss, total, student_gradient, teacher_gradient)
    if want.measures:
        shape = (*lead, measures)
        result = result._replace(measures=torch.empty(shape, dtype=row_dtype, device=device))
    if not want.parts:
        return result
    distillation, cross_entropy, entropy = (torch.empty_like(loss) for _ in range(3))
    return result._replace(
        distillation=distillation, cross_entropy=cross_entropy, student_entropy=entropy
    )


def shared(
    options: Options,
    step: int = 0,
    processes: int = 1,
    statistics: Tensor | None = None,
    all_statistics: Tensor | None = None,
    tokens: Tensor | None = None,
    sums: Tensor | None = None,
    all_sums: Tensor | None = None,
) -> tuple[int, ...]:
    """The fields of Shard in csrc/call.h. Step 0: this process has the whole vocabulary."""
    if step == 0 and options.shard is None:
        return (step, 0, options.vocab_size, processes, 0, 0, 0, 0, 0, 0)
    return (
        step,
        options.first_column,
        options.vocabulary,
        processes,
        0 if options.shard is None else options.shard.rank,
        *map(address, (statistics, all_statistics, tokens, sums, all_sums)),
    )


def arguments(
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    result: Result,
    shard: tuple[int, ...] | None = None,
) -> tuple[Any, ...]:
    """The leading arguments of every C++ kd_rows. The tensors must outlive the call."""
    description = (
        _scalars(options),
        options.vocab_size,
        options.scale,
        address(rows.temperature),
        address(rows.teacher_temperature),
        _DENSE if rows.ids is None else _sparse(rows, options),
        address(rows.labels),
        address(rows.weight),
        address(rows.scale),
        address(result.loss),
        address(result.total),
        address(result.distillation),
        address(result.cross_entropy),
        address(result.student_entropy),
        _definition(options.divergence),
        shard or shared(options),
    )
    return (
        student.shape[:-1],
        logits(student),
        logits(teacher),
        logits(result.student_gradient),
        logits(result.teacher_gradient),
        description,
    )


# The description of a dense teacher: no ids, no tokens, no tail.
_DENSE = (0, 0, 0, 0)


def _sparse(rows: Rows, options: Options) -> tuple[int, int, int, int]:
    assert rows.ids is not None
    tail = TAILS.index(options.tail)
    return address(rows.ids), rows.ids.shape[-1], address(rows.tail_logprob), tail


def _definition(divergence: Divergence) -> tuple[Any, ...]:
    form, target = divergence.closed_form, divergence.target
    return (
        _NUMBER[divergence.function],
        divergence.params,
        divergence.normalized,
        () if form is None else (form.forward, form.reverse, form.cross),
        divergence.degree or 0.0,
        0 if target is None else 1 + Target.FORMS.index(target.form),
        0.0 if target is None else target.weight,
    )


# The steps where several processes share the vocabulary (fastkd/call/contract.py); `launch` takes the arguments of
# arguments().

Launch = Callable[[Tensor, Tensor, Rows, Options, Result, tuple[int, ...]], None]


def statistics_step(launch: Launch, fields: int, call: ShardCall) -> Statistics:
    """Compute `fields` numbers per row in float64, and a sparse teacher's token logits; 0 in dropped rows."""
    count, device, ids = call.result.loss.numel(), call.student.device, call.rows.ids
    statistics = torch.zeros(count, fields, dtype=torch.float64, device=device)
    tokens = None
    if ids is not None:
        tokens = torch.zeros(count, ids.shape[-1], dtype=torch.float32, device=device)
    shard = shared(call.options, 1, statistics=statistics, tokens=tokens)
    launch(*call[:5], shard)
    return Statistics(statistics, tokens)


def sums_step(launch: Launch, fields: int, call: ShardCall) -> Tensor | None:
    """Compute `fields` numbers per row in float64; None if the statistics are enough."""
    if call.rows.ids is not None or call.options.divergence.closed_form is not None:
        return None
    gathered = call.known().gathered
    device = call.student.device
    sums = torch.zeros(gathered.shape[1], fields, dtype=torch.float64, device=device)
    shard = shared(call.options, 2, len(gathered), all_statistics=gathered, sums=sums)
    launch(*call[:5], shard)
    return sums


def results_step(launch: Launch, call: ShardCall) -> None:
    """Fill the result, given the statistics and the sums of all processes."""
    gathered, tokens, _ = call.known()
    shard = shared(
        call.options, 3, len(gathered), all_statistics=gathered, tokens=tokens, all_sums=call.sums
    )
    launch(*call[:5], shard)
