"""Differentiation of dense rows: in eager mode, and as a custom op for torch.compile and export.

fastkd.functional calls :func:`kernels_of` in eager mode, and :func:`kd_rows` if torch.compile may trace the call. All
losses share one rule for saving, deferring and scaling gradients: fastkd/engine/gradients.py implements it for eager
mode, fastkd/engine/ops.py for a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.backends import registry
from fastkd.call.checks import LossCall, settled
from fastkd.call.contract import Options, Result, Rows, Want, row_dtype
from fastkd.call.measures import measure_count
from fastkd.engine.backend import kernels_for
from fastkd.engine.gradients import Differentiable, Loss, without_deferred
from fastkd.engine.ops import GraphOptions, by_name, detached, filled, made, register_gradient


def _kernels(student: Tensor, teacher: Tensor, options: Options, backend: str, want: Want) -> Any:
    chosen = registry.select(
        backend, student.device.type, student.dtype, teacher.dtype, options.divergence
    )
    return kernels_for(chosen, options, want)


@torch.library.custom_op("fastkd::kd_rows", mutates_args=())
def kd_rows_op(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: Tensor | None,
    teacher_temperature: Tensor | None,
    scale: Tensor | None,
    ids: Tensor | None,
    tail_logprob: Tensor | None,
    backend: str,
    want: list[bool],
    vocab_size: int,
    ignore_index: int,
    tail: str,
    divergence: str,
    kinds: str,
    constants: list[float],
    integers: list[int],
    symbols: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of Result; an output that is not wanted is an empty tensor. The backend is chosen when the op runs."""
    rows = Rows(labels, weight, temperature, teacher_temperature, scale, ids, tail_logprob)
    graph_options = GraphOptions(
        want, vocab_size, ignore_index, tail, divergence, kinds, constants, integers, symbols
    )
    options, _ = graph_options.settled(rows)
    wants = without_deferred(Want(*want))
    kernels = _kernels(student, teacher, options, backend, wants)
    result = kernels.kd_rows(student, teacher, rows, options, wants)
    return filled(result, student)  # type: ignore[return-value]  # as many as Result has fields


@kd_rows_op.register_fake
def _kd_rows_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = by_name(kd_rows_op, arguments)
    student, teacher = inputs["student"], inputs["teacher"]
    wants = without_deferred(Want(*inputs["want"]))
    dtype, lead = row_dtype(student.dtype, teacher.dtype), student.shape[:-1]
    return (
        made(student, lead, dtype),
        made(student, (), dtype),
        made(student, student.shape, student.dtype, wants.student_gradient),
        made(teacher, teacher.shape, teacher.dtype, wants.teacher_gradient),
        *(made(student, lead, dtype, wants.parts) for _ in range(3)),
        made(student, (*lead, measure_count(inputs["tail"])), dtype, wants.measures),
    )


register_gradient(
    kd_rows_op,
    Result._fields,
    {"student": "student_gradient", "teacher": "teacher_gradient"},
    lambda inputs: Want(*inputs["want"])[:2],
)


def kernels_of(student: Tensor, teacher: Tensor, call: LossCall, want: Want) -> Any:
    """The backend of a call in eager mode."""
    return _kernels(student, teacher, call.options, call.backend, want)


def kd_rows(
    student: Tensor, teacher: Tensor, call: LossCall, want: Want
) -> tuple[Tensor | None, ...]:
    """(loss, *Result.parts); the loss, [...] or its 0-dim sum, is differentiable. torch.compile may trace it."""
    if not torch.compiler.is_compiling():
        return _eager(student, teacher, call, want)
    if call.numbers is None or want.inplace:  # the graph broke inside kd_loss, after the validation
        return torch.compiler.disable(_eager)(student, teacher, call, want)
    graph_options = GraphOptions.of(call.options, want, call.numbers)
    result = Result(*kd_rows_op(student, teacher, *call.rows, call.backend, *graph_options))
    loss = result.total if call.summed else result.loss
    return (loss, *detached(result.parts, want))


def _eager(
    student: Tensor, teacher: Tensor, call: LossCall, want: Want
) -> tuple[Tensor | None, ...]:
    if call.numbers is not None:  # only the validation was compiled
        options = call.options
        options = settled(
            options.divergence, options.vocab_size, options.tail, call.numbers, call.rows
        )
        call = call._replace(options=options)
    kernels = kernels_of(student, teacher, call, want)
    loss = Loss(kernels.kd_rows, call.options, want, call.summed, kernels.scale_rows_)
    return Differentiable.apply(loss, call.rows, 2, student, teacher)
