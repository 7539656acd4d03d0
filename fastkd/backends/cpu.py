"""The cpu backend: it allocates outputs and passes addresses to the native kernels (csrc/)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastkd import _C
from fastkd.backends import native
from fastkd.backends.logprobs import Tempering
from fastkd.call import draft, mutual
from fastkd.call.contract import Options, Result, Rows, ShardCall, Statistics, Want
from fastkd.call.measures import measure_count
from fastkd.core.tensors import address, readable, unit_stride

# kd_rows also takes sparse teachers, and computes the measures of both forms of teacher.
SPARSE = True
MEASURES = ("dense", "sparse")
# Bytes from which page faults matter: csrc/memory.h.
_LARGE = 4 << 20


@functools.lru_cache(maxsize=1024)
def _template(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A tensor of this shape with the memory of one element, on the CPU; None if its contiguous copy would be large."""
    if math.prod(shape) * dtype.itemsize >= _LARGE:
        return None
    return torch.empty((), dtype=dtype, device="cpu").expand(
        shape
    )  # whatever the default device is


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Allocate an uninitialized contiguous tensor; a large one is in memory that calls reuse.

    torch.empty takes twice as long as torch.empty_like of a template.
    """
    template = _template(tuple(shape), dtype)
    if template is None:
        return from_dlpack(_C.new_output(list(shape), native.DTYPES[dtype]))
    return torch.empty_like(template, memory_format=torch.contiguous_format)


def kd_rows(student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want) -> Result:
    """Compute the loss of each row and its gradients; :class:`fastkd.call.contract.Result` has shapes and meaning."""
    result = native.outputs(
        student, teacher, want, empty, measures=measure_count(options.tail), per_row=empty
    )
    student, teacher, rows = native.readable_inputs(student, teacher, rows)
    _C.kd_rows(
        *native.arguments(student, teacher, rows, options, result),
        address(result.measures),
        torch.get_num_threads(),
    )
    return result


def scale_rows_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply each row of gradient [..., V] by upstream, a scalar or [...]. A factor of 1 costs no pass."""
    if upstream.dim() == 0 and upstream.item() == 1.0:
        return  # the usual factor; its value is at hand, as it is not on a GPU
    factor = readable(upstream.to(torch.float32)).contiguous()
    _C.scale_rows(
        list(gradient.shape[:-1]),
        native.logits(gradient),
        address(factor),
        1 if factor.dim() else 0,
        torch.get_num_threads(),
    )


def split_halves(matrix: Tensor) -> None:
    """Replace each row of a contiguous float32 matrix by the halves of :func:`fastkd.engine.bf16.split`."""
    _C.split_halves(address(matrix), *matrix.shape, torch.get_num_threads())


def angles(
    student: Tensor, teacher: Tensor, delta: float, derivatives: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the same as :func:`fastkd.backends.angles.angles`."""
    student, teacher = (readable(points).contiguous() for points in (student, teacher))
    assert student.dtype == teacher.dtype == torch.float64
    loss = torch.zeros((), dtype=torch.float64)
    half_derivative = torch.zeros_like(student) if derivatives else None
    _C.angles(
        len(student),
        address(student),
        address(teacher),
        delta,
        address(loss),
        address(half_derivative),
        torch.get_num_threads(),
    )
    return loss, half_derivative


def mutual_rows(
    logits: Sequence[Tensor],
    rows: Rows,
    options: mutual.Options,
    wanted: Sequence[bool],
    parts: bool,
) -> mutual.Result:
    """Compute the losses of each row's students and their gradients; :mod:`fastkd.call.mutual` has the contract."""
    rows = native.readable_rows(rows)
    logits = [unit_stride(student) for student in logits]
    result = mutual.outputs(logits, wanted, parts, empty)
    _C.mutual_rows(
        list(logits[0].shape[:-1]),
        [native.logits(student) for student in logits],
        [native.logits(gradient) for gradient in result.gradients],
        (
            options.temperature,
            options.peer_weight,
            options.scale,
            options.scale_by_temperature,
            mutual.PEERS.index(options.peers),
            address(rows.labels),
            options.ignore_index,
            address(rows.weight),
            address(rows.scale),
            address(result.loss),
            address(result.total),
            address(result.divergence),
            address(result.cross_entropy),
        ),
        torch.get_num_threads(),
    )
    return result


def draft_rows(
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    terms: draft.Terms,
    want: Want,
) -> draft.Result:
    """Compute all terms of each row, and the gradient of their sum; :mod:`fastkd.call.draft` has the contract."""
    rows = native.readable_rows(rows)
    lead = student.shape[:-1]
    source, teacher = unit_stride(student), unit_stride(teacher)
    gradient = None
    if want.student_gradient:
        gradient = source if want.inplace else empty(student.shape, dtype=student.dtype)
    columns = None if terms.columns is None else readable(terms.columns).contiguous()
    loss = torch.empty(lead, device="cpu")
    acceptance = torch.empty_like(loss) if terms.measured else None
    values = {name: torch.empty_like(loss) for name in terms.weights if terms.measured}
    _C.draft_rows(
        list(lead),
        native.logits(source),
        native.logits(teacher),
        native.logits(gradient),
        address(columns),
        (
            [terms.weight(name) for name in draft.LOSSES],
            terms.eta,
            options.scale,
            address(rows.weight),
            address(rows.scale),
            address(loss),
            address(acceptance),
            [address(values.get(name)) for name in draft.LOSSES],
        ),
        torch.get_num_threads(),
    )
    if want.inplace and gradient is not None:
        gradient = student if source is student else student.copy_(source)
    return draft.Result(loss, gradient, acceptance, values)


# The steps where several processes share the vocabulary: Shard in csrc/call.h.


def _take_step(
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    result: Result,
    shard: tuple[int, ...],
) -> None:
    """Run the step that `shard` describes (fastkd.backends.native.shared)."""
    student, teacher, rows = native.readable_inputs(student, teacher, rows)
    _C.kd_rows(
        *native.arguments(student, teacher, rows, options, result, shard),
        address(result.measures),
        torch.get_num_threads(),
    )


def shard_statistics(call: ShardCall) -> Statistics:
    """Compute the statistics of this process's columns, in float64.

    They are 15 numbers per row, 17 if the label has a separate term; for a sparse teacher, 8 numbers and the logits of
    its tokens.
    """
    has_label_term = call.options.divergence.target is not None
    dense = _C.APART_STATISTICS if has_label_term else _C.STATISTICS
    fields = dense if call.rows.ids is None else _C.TAIL_STATISTICS
    return native.statistics_step(_take_step, fields, call)


def shard_sums(call: ShardCall) -> Tensor | None:
    """Compute the sums over this process's columns, given the statistics of all: 4 numbers per row in float64."""
    return native.sums_step(_take_step, _C.SUMS, call)


def shard_results(call: ShardCall) -> None:
    """Fill the result, given the statistics and the sums of all processes."""
    native.results_step(_take_step, call)


def logprob_statistics(logits: Tensor, tempering: Tempering, centered: bool) -> Tensor:
    """Compute the same as :func:`fastkd.backends.logprobs.logprob_statistics`."""
    statistics = torch.empty(logits.shape[0], 3, dtype=torch.float64)
    _logprob_rows(logits, tempering, centered, statistics, None, None)
    return statistics


def logprob_gradients(
    logits: Tensor, tempering: Tempering, maxima: Tensor, coefficients: Tensor
) -> None:
    """Compute the same as :func:`fastkd.backends.logprobs.logprob_gradients`."""
    _logprob_rows(logits, tempering, False, None, maxima, coefficients)


def _logprob_rows(
    logits: Tensor,
    tempering: Tempering,
    centered: bool,
    statistics: Tensor | None,
    maxima: Tensor | None,
    coefficients: Tensor | None,
) -> None:
    assert logits.dtype == torch.float32 and (logits.shape[1] < 2 or logits.stride(1) == 1)
    scale, softcap, temperature, temperatures = tempering
    rows = (
        None if tensor is None else readable(tensor).contiguous()
        for tensor in (temperatures, maxima, coefficients)
    )
    temperatures, maxima, coefficients = rows
    _C.logprob_rows(
        *logits.shape,
        logits.stride(0),
        address(logits),
        (scale, softcap, temperature, address(temperatures), centered),
        address(statistics),
        address(maxima),
        address(coefficients),
        torch.get_num_threads(),
    )
