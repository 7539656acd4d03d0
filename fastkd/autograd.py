"""Differentiation of the row losses: an autograd Function for eager mode, custom ops for torch.compile and export.

The forward computes the gradient in the same launch, while the row is warm, and saves it; the backward hands it on,
times the upstream gradient, which is folded in on the device and never read by the host. Two cases differ:

- float16 logits: the gradient is computed in the backward with the upstream factor inside. A gradient of the order
  1 / (N V) is below the smallest float16, and a loss scaler's factor comes too late for a value already rounded.
- retain_graph: the saved gradient stays, and the backward returns a scaled copy. Without it the saved tensor is
  scaled in place and given away, which costs no memory and, where the factor is 1, no pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastkd import backends
from fastkd.divergences import ClosedForm, Divergence, Target, function_name, function_named
from fastkd.rows import Options, Result, Rows, Want, row_dtype
from fastkd.tensors import copied, savable

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def graph_is_kept() -> bool:
    """Whether the running backward was asked to retain its graph; True where torch cannot tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _defers(student: Tensor, teacher: Tensor, want: Want) -> bool:
    return (want.student_gradient and student.dtype == torch.float16) or (
        want.teacher_gradient and teacher.dtype == torch.float16
    )


def _without_deferred(want: Want) -> Want:
    """What the forward call computes: no gradients where they are deferred."""
    return (
        want._replace(student_gradient=False, teacher_gradient=False, inplace=False)
        if want.deferred
        else want
    )


def of_counted_rows(upstream: Tensor, rows: Rows, ignore_index: int) -> Tensor:
    """An upstream gradient [...] with 0 for the rows that are dropped, where it may be infinite or NaN."""
    if rows.weight is not None and rows.weight.dim() == upstream.dim():
        upstream = torch.where(rows.weight == 0, 0.0, upstream)
    if rows.labels is not None and rows.labels.dim() == upstream.dim():
        upstream = torch.where(rows.labels == ignore_index, 0.0, upstream)
    return upstream


def rows_to_keep(rows: Rows, want: Want, loss: Tensor, summed: bool) -> Rows:
    """What the backward needs of the rows, as saved tensors: torch raises where one has changed meanwhile."""
    return rows if want.deferred or not summed or loss.dim() == 0 else Rows()


def with_upstream(rows: Rows, upstream: Tensor) -> Rows:
    """The rows with an upstream gradient, a scalar or one a row, folded into what multiplies the gradient."""
    if upstream.dim() == 0:
        scale = upstream if rows.scale is None else upstream * rows.scale
        return rows._replace(scale=scale)
    weight = upstream if rows.weight is None else upstream * rows.weight
    return rows._replace(weight=weight.contiguous())


def scaled(
    kernels: ModuleType, gradients: Sequence[Tensor | None], upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """Saved gradients times upstream: in place, or copies where the graph is kept."""
    if graph_is_kept():
        gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
    for gradient in gradients:
        if gradient is not None:
            kernels.scale_rows_(gradient, upstream)
    return tuple(gradients)


def outside_of_graphs(
    function: Callable[Parameters, Returned],
) -> Callable[Parameters, Returned]:
    """A function that breaks a compiled graph and runs as it is."""

    @functools.wraps(function)
    def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Returned:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return call


class _Once(torch.autograd.Function):
    """A gradient that raises where it is differentiated; a constant would be wrong without a word."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        """The gradient itself."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Tensor:
        """Raise."""
        raise RuntimeError("the loss has first derivatives only, and is being differentiated twice")


def differentiable_once(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients that a backward returns; under create_graph=True those that raise where they are differentiated."""
    if not torch.is_grad_enabled():
        return gradients
    return tuple(
        None if gradient is None else _Once.apply(gradient.requires_grad_())
        for gradient in gradients
    )


class KDRows(torch.autograd.Function):
    """Eager mode. Returns (loss, distillation, cross_entropy, student_entropy); loss is [...] or its 0-dim sum."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        rows: Rows,
        options: Options,
        want: Want,
        backend: str,
        summed: bool,
    ) -> tuple[Tensor | None, ...]:
        """The loss and, unless it is deferred, its gradient."""
        chosen = backends.select(
            backend, student.device.type, student.dtype, teacher.dtype, options.divergence
        )
        kernels = backends.kernels_for(chosen, options.shard)
        result: Result = kernels.kd_rows(student, teacher, rows, options, _without_deferred(want))
        kept = rows_to_keep(rows, want, result.loss, summed)
        if want.deferred:
            ctx.save_for_backward(*savable(student, teacher, *kept))
        else:
            ctx.save_for_backward(result.student_gradient, result.teacher_gradient, *savable(*kept))
        if want.inplace and not want.deferred:
            torch.autograd.graph.increment_version(student)
        ctx.call = (kernels, options, want)
        ctx.set_materialize_grads(False)
        parts = result[4:]
        ctx.mark_non_differentiable(*(part for part in parts if part is not None))
        return (result.total if summed else result.loss, *parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """The saved gradient times upstream, or the deferred one with upstream inside."""
        if upstream is None:
            return (None,) * 7
        with torch.no_grad():
            gradients = KDRows._gradients(ctx, upstream)
        return (*differentiable_once(gradients), *(None,) * 5)

    @staticmethod
    def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        kernels, options, want = ctx.call
        first, second, *others = ctx.saved_tensors
        rows = Rows(*others)
        upstream = of_counted_rows(upstream, rows, options.ignore_index)
        if want.deferred:
            student, teacher = first, second
            if want.inplace and graph_is_kept():
                want = want._replace(inplace=False)  # the logits are needed again
            rows = with_upstream(rows, upstream)
            result = kernels.kd_rows(student, teacher, rows, options, want)
            if want.inplace:
                torch.autograd.graph.increment_version(student)
            return result.student_gradient, result.teacher_gradient
        return scaled(kernels, (first, second), upstream)


# The custom op. A schema holds tensors, numbers and strings only, so Options and Want travel as flat lists, and a
# divergence as the name of its function with the numbers beside it.
_NUMBERS = ("alpha", "temperature", "teacher_temperature", "label_smoothing", "logit_scale", "softcap",
            "teacher_logit_scale", "teacher_softcap", "scale")  # fmt: skip
_INTEGERS = ("scale_by_temperature", "ignore_index", "vocab_size")
_NONE = float("nan")


def as_schema(options: Options, want: Want) -> tuple[str, list[float], list[int]]:
    """(names, numbers, integers): the two as an op's arguments."""
    divergence = options.divergence
    closed_form = divergence.closed_form
    moments = (
        (_NONE,) * 3
        if closed_form is None
        else (closed_form.forward, closed_form.reverse, closed_form.cross)
    )
    degree = _NONE if divergence.degree is None else divergence.degree
    target = divergence.target
    numbers = [getattr(options, name) for name in _NUMBERS]
    integers = [int(getattr(options, name)) for name in _INTEGERS]
    return (
        f"{options.tail}|{divergence.name}|{function_name(divergence.function)}|{target.form if target else ''}",
        [*numbers, degree, *moments, target.weight if target else 0.0, *divergence.params],
        [*integers, int(divergence.normalized), *(int(flag) for flag in want)],
    )


def from_schema(names: str, numbers: list[float], integers: list[int]) -> tuple[Options, Want]:
    """What as_schema was given."""
    tail, name, function, target = names.split("|")
    own, (degree, *rest) = numbers[: len(_NUMBERS)], numbers[len(_NUMBERS) :]
    moments, weight, params = rest[:3], rest[3], rest[4:]
    settings = integers[: len(_INTEGERS)]
    normalized, *want = integers[len(_INTEGERS) :]
    divergence = Divergence(
        name,
        function_named(function),
        tuple(params),
        degree=None if degree != degree else degree,
        closed_form=None if moments[0] != moments[0] else ClosedForm(*moments),
        normalized=bool(normalized),
        target=Target(target, weight) if target else None,
    )
    values: dict[str, Any] = dict(zip(_NUMBERS, own, strict=True)) | dict(
        zip(_INTEGERS, settings, strict=True)
    )
    values["scale_by_temperature"] = bool(values["scale_by_temperature"])
    return Options(divergence, **values, tail=tail), Want(*map(bool, want))


def wanted_of(integers: list[int]) -> Want:
    """The second of them, which is all that a fake needs."""
    return Want(*map(bool, integers[-len(Want._fields) :]))


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
    divergence: str,
    numbers: list[float],
    integers: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Result as a tuple; what is not wanted is an empty tensor. The backend is chosen when it runs."""
    options, want = from_schema(divergence, numbers, integers)
    rows = Rows(labels, weight, temperature, teacher_temperature, scale, ids, tail_logprob)
    kernels = backends.load(
        backends.select(
            backend, student.device.type, student.dtype, teacher.dtype, options.divergence
        )
    )
    result = kernels.kd_rows(student, teacher, rows, options, _without_deferred(want))
    return tuple(student.new_empty(0) if tensor is None else tensor for tensor in result)  # type: ignore[return-value]


@kd_rows_op.register_fake
def _kd_rows_fake(student, teacher, *others):  # type: ignore[no-untyped-def]
    want = _without_deferred(wanted_of(others[-1]))
    dtype = row_dtype(student.dtype, teacher.dtype)
    lead = student.shape[:-1]

    def row(wanted: bool) -> Tensor:
        return student.new_empty(lead, dtype=dtype) if wanted else student.new_empty(0)

    return (
        row(True),
        student.new_empty((), dtype=dtype),
        student.new_empty(student.shape) if want.student_gradient else student.new_empty(0),
        teacher.new_empty(teacher.shape) if want.teacher_gradient else student.new_empty(0),
        *(row(want.parts) for _ in range(3)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, *rows, backend, divergence, numbers, integers = inputs
    ctx.want = wanted_of(integers)
    kept = list(output[2:4])
    if ctx.want.deferred:
        wanted = (ctx.want.student_gradient, ctx.want.teacher_gradient)
        pairs = zip((student, teacher), wanted, strict=True)
        kept = [logits if trained else copied(logits) for logits, trained in pairs]
    ctx.save_for_backward(*kept, *(row if row is None else copied(row) for row in rows))
    ctx.ignore_index = integers[_INTEGERS.index("ignore_index")]
    ctx.call = (
        backend,
        divergence,
        numbers,
        [*integers[:-1], 0],
    )  # the second call is not deferred
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, loss: Tensor | None, total: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    # The loss is used per row or summed, never both (see kd_rows); either way it multiplies the gradient.
    upstream = loss if total is None else total
    if upstream is None:
        return (None,) * 13
    first, second, *others = ctx.saved_tensors
    rows = Rows(*others)
    upstream = of_counted_rows(upstream, rows, ctx.ignore_index)
    if ctx.want.deferred:
        result = kd_rows_op(first, second, *with_upstream(rows, upstream), *ctx.call)
        gradients = result[2:4]
    else:
        factor = upstream.unsqueeze(-1) if upstream.dim() else upstream
        gradients = tuple((gradient * factor).to(gradient.dtype) for gradient in (first, second))
    return (
        gradients[0] if ctx.want.student_gradient else None,
        gradients[1] if ctx.want.teacher_gradient else None,
        *(None,) * 11,
    )


kd_rows_op.register_autograd(_backward, setup_context=_setup_context)


def kd_rows(
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    want: Want,
    backend: str,
    summed: bool,
) -> tuple[Tensor | None, ...]:
    """(loss, distillation, cross_entropy, student_entropy), differentiable; the loss is [...] or its 0-dim sum."""
    want = want._replace(deferred=_defers(student, teacher, want))
    if not torch.compiler.is_compiling():
        return KDRows.apply(student, teacher, rows, options, want, backend, summed)
    if want.inplace:  # kd_loss broke the graph, and the compiler tries again from here
        return torch.compiler.disable(KDRows.apply)(
            student, teacher, rows, options, want, backend, summed
        )
    results = kd_rows_op(student, teacher, *rows, backend, *as_schema(options, want))
    loss = results[1] if summed else results[0]
    return (loss, *(part.detach() if want.parts else None for part in results[4:]))
