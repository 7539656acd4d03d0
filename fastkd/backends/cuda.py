"""The cuda backend: one launch of the cluster kernel (csrc/cuda), on the tensors' device and its current stream.

A row of student and teacher logits stays in the shared memory of a cluster of thread blocks, so each logit is read
from device memory once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd import _cuda
from fastkd.backends import native
from fastkd.backends.registry import BackendUnavailable, dotted
from fastkd.call.contract import Options, Result, Rows, ShardCall, Statistics, Want
from fastkd.call.measures import DENSE_MEASURES
from fastkd.core.tensors import address, readable

# kd_rows also takes sparse teachers, and computes the measures of dense ones.
SPARSE = True
MEASURES = ("dense",)


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _stream(device: torch.device) -> tuple[int, int]:
    """Return (number of the device, address of its current stream)."""
    number = torch.cuda.current_device() if device.index is None else device.index
    return number, torch.cuda.current_stream(device).cuda_stream


def _check_capability(device: torch.device) -> None:
    """Raise unless the kernels run on the device."""
    capability, least = _capability(device), min(_cuda.architectures())
    if capability < least:
        raise BackendUnavailable(
            "cuda",
            f"{device} has compute capability {dotted(capability)}; the kernels need {dotted(least)} or newer",
            "Use backend='triton'",
        )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raise BackendUnavailable, with a remedy, if the device's chip cannot hold a row."""
    try:
        yield
    except _cuda.DoesNotFitError as error:
        raise BackendUnavailable(
            "cuda",
            f"a row does not stay on the device's chip: {error}",
            "Use backend='triton', as backend='auto' does, or share the vocabulary among processes",
        ) from None


def kd_rows(student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want) -> Result:
    """Compute the loss of each row and its gradients; :class:`fastkd.call.contract.Result` has shapes and meaning."""
    _check_capability(student.device)
    result = native.outputs(student, teacher, want, measures=len(DENSE_MEASURES))
    student, teacher, rows = native.readable_inputs(student, teacher, rows)
    arguments = native.arguments(student, teacher, rows, options, result)
    with _explained():
        _cuda.kd_rows(*arguments, address(result.measures), *_stream(student.device))
    return result


# The steps where several processes share the vocabulary: fastkd/call/contract.py says what passes between them,
# csrc/cuda/shard.h what each launch computes.


def _take_step(
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    result: Result,
    shard: tuple[int, ...],
) -> None:
    """Run the step that `shard` describes (fastkd.backends.native.shared)."""
    _check_capability(student.device)
    student, teacher, rows = native.readable_inputs(student, teacher, rows)
    arguments = native.arguments(student, teacher, rows, options, result, shard)
    with _explained():
        _cuda.kd_rows(*arguments, address(None), *_stream(student.device))


def _without_gradients(call: ShardCall) -> ShardCall:
    return call._replace(result=call.result._replace(student_gradient=None, teacher_gradient=None))


def shard_statistics(call: ShardCall) -> Statistics:
    """Compute the statistics of this process's columns in float64, and the tokens' logits; 0 in dropped rows."""
    return native.statistics_step(_take_step, _cuda.STATISTICS, _without_gradients(call))


def shard_sums(call: ShardCall) -> Tensor | None:
    """Compute the sums over this process's columns in float64; None if the statistics are enough."""
    return native.sums_step(_take_step, _cuda.SUMS, _without_gradients(call))


def shard_results(call: ShardCall) -> None:
    """Fill the result, given the statistics and the sums of all processes."""
    native.results_step(_take_step, call)


def scale_rows_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply each row of gradient [..., V] by upstream, a scalar or [...]. A factor of 1 costs no pass."""
    factor = readable(upstream.to(torch.float32)).contiguous()
    _cuda.scale_rows(
        list(gradient.shape[:-1]),
        native.logits(gradient),
        address(factor),
        1 if factor.dim() else 0,
        *_stream(gradient.device),
    )


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate uninitialized memory for the logits of a chunk."""
    return torch.empty(shape, dtype=dtype, device=device)
