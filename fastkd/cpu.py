"""The cpu backend: allocates outputs and hands addresses to the native kernels (csrc/)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastkd import _C
from fastkd.divergences import DEFINITIONS
from fastkd.rows import Options, Result, Rows, Want
from fastkd.teachers import TAILS

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NUMBER = {function: number for number, function in enumerate(DEFINITIONS)}
_NOWHERE: tuple[int, int, int, list[int]] = (0, 0, 0, [])
_LARGE = 4 << 20  # bytes from which page faults matter: csrc/memory.h


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _resolved(rows: Rows) -> Rows:
    """Without the bit by which torch marks a view as negated, which an address does not carry."""
    return Rows(*(None if value is None else value.resolve_neg() for value in rows))


def _logits(tensor: Tensor | None) -> tuple[int, int, int, list[int]]:
    if tensor is None:
        return _NOWHERE
    *strides, _ = tensor.stride()
    return tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.shape[-1], strides


def _unit_stride(logits: Tensor) -> Tensor:
    logits = logits.resolve_neg()
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """An uninitialised contiguous tensor, where it is large in memory that is reused from call to call."""
    if math.prod(shape) * dtype.itemsize < _LARGE:
        return torch.empty(shape, dtype=dtype)
    return from_dlpack(_C.new_output(list(shape), _DTYPES[dtype]))


def kd_rows(student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want) -> Result:
    """The loss of each row and its gradients; shapes and meaning as :class:`fastkd.rows.Result` has them."""
    divergence, rows = options.divergence, _resolved(rows)
    for name, value in rows._asdict().items():
        kinds = (torch.int64,) if name in ("labels", "ids") else (torch.float32,)
        assert value is None or value.dtype in kinds, (name, value.dtype)  # an address has no dtype
    lead = student.shape[:-1]
    student_gradient = teacher_gradient = None
    if want.student_gradient:
        student_gradient = student if want.inplace else empty(student.shape, student.dtype)
    if want.teacher_gradient:
        teacher_gradient = empty(teacher.shape, teacher.dtype)
    student, teacher = _unit_stride(student), _unit_stride(teacher)

    def per_row() -> Tensor:
        return torch.empty(lead, dtype=torch.float32)

    loss, total = per_row(), torch.empty((), dtype=torch.float32)
    parts = (per_row(), per_row(), per_row()) if want.parts else (None, None, None)
    closed_form = divergence.closed_form
    _C.kd_rows(
        list(lead),
        options.vocab_size,
        _logits(student),
        _logits(teacher),
        _logits(student_gradient),
        _logits(teacher_gradient),
        (options.temperature, _address(rows.temperature), options.logit_scale, options.softcap),
        (
            options.teacher_temperature,
            _address(rows.teacher_temperature),
            options.teacher_logit_scale,
            options.teacher_softcap,
        ),
        (
            _address(rows.ids),
            0 if rows.ids is None else rows.ids.shape[-1],
            _address(rows.tail_logprob),
            TAILS.index(options.tail) if options.tail else 0,
        ),
        _address(rows.labels),
        _address(rows.weight),
        _address(rows.scale),
        loss.data_ptr(),
        total.data_ptr(),
        *map(_address, parts),
        _NUMBER[divergence.function],
        divergence.params,
        divergence.normalized,
        []
        if closed_form is None
        else [closed_form.forward, closed_form.reverse, closed_form.cross],
        divergence.degree or 0.0,
        options.alpha,
        options.label_smoothing,
        options.scale,
        options.scale_by_temperature,
        options.ignore_index,
        torch.get_num_threads(),
    )
    return Result(loss, total, student_gradient, teacher_gradient, *parts)


def scale_rows_(gradient: Tensor, upstream: Tensor) -> None:
    """Multiply each row of gradient [..., V] by upstream, a scalar or [...]; by 1 costs nothing."""
    upstream = upstream.to(torch.float32).contiguous()
    stride = 1 if upstream.dim() else 0
    _C.scale_rows(
        list(gradient.shape[:-1]),
        _logits(gradient),
        upstream.data_ptr(),
        stride,
        torch.get_num_threads(),
    )
