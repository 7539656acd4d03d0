"""Differentiation of the row losses: an autograd Function for eager mode, custom ops for torch.compile and export.

The forward computes the gradient in the same launch, while the row is warm, and saves it; the backward hands it on,
times the upstream gradient, which is folded in on the device and never read by the host. Two cases differ:

- float16 logits: the gradient is computed in the backward with the upstream factor inside. A gradient of the order
  1 / (N V) is below the smallest float16, and a loss scaler's factor comes too late for a value already rounded.
- retain_graph: the saved gradient stays, and the backward returns a scaled copy. Without it the saved tensor is
  scaled in place and given away, which costs no memory and, where the factor is 1, no pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends import registry
from fastkd.call.checks import Numbers, settled
from fastkd.call.contract import Options, Result, Rows, Want, row_dtype
from fastkd.core.tensors import copied, savable
from fastkd.engine.backend import kernels_for
from fastkd.engine.graphs import described, from_description, pack, unpack


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
        chosen = registry.select(
            backend, student.device.type, student.dtype, teacher.dtype, options.divergence
        )
        kernels = kernels_for(chosen, options)
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


# The custom op. A schema holds tensors, numbers and strings only, so Options and Want travel as flat lists, the numbers
# of the call and of its divergence as fastkd/engine/graphs.py says, and a divergence as the name of what makes it.
_SETTINGS = ("scale_by_temperature", "ignore_index", "vocab_size")


class Schema(NamedTuple):
    """A call's options, as the last arguments of an op."""

    names: str
    constants: list[float]
    integers: list[int]  # those among the numbers, then settings, then Want
    symbols: list[Tensor]


def as_schema(
    options: Options, want: Want, numbers: Numbers, weights: Sequence[float] = ()
) -> Schema:
    """The options, the numbers that they wait for, and the weights of an ensemble, as an op's arguments."""
    made_from, parameters = described(options.divergence)
    packed = pack((*numbers, *weights, *parameters))
    settings = [int(getattr(options, name)) for name in _SETTINGS]
    return Schema(
        f"{options.tail}|{packed.kinds}|{made_from}",
        packed.constants,
        [*packed.integers, *settings, *(int(flag) for flag in want)],
        packed.symbols,
    )


def from_schema(schema: Schema, rows: Rows, weights: int = 0) -> tuple[Options, Want, list[float]]:
    """What as_schema was given, once the numbers are known; weights: how many. Raises where a number is wrong."""
    tail, kinds, made_from = schema.names.split("|", 2)
    unpacked: list[Any] = unpack(kinds, schema.constants, schema.integers, schema.symbols)
    count = len(Numbers._fields)
    numbers, of_teacher = Numbers(*unpacked[:count]), unpacked[count : count + weights]
    divergence = from_description(made_from, unpacked[count + weights :])
    want = wanted_of(schema.integers)
    values = schema.integers[-len(want) - len(_SETTINGS) : -len(want)]
    settings: dict[str, Any] = dict(zip(_SETTINGS, values, strict=True))
    settings["scale_by_temperature"] = bool(settings["scale_by_temperature"])
    return settled(Options(divergence, **settings, tail=tail), numbers, rows), want, of_teacher


def wanted_of(integers: list[int]) -> Want:
    """What a call wants, which is all that a fake needs of its options."""
    return Want(*map(bool, integers[-len(Want._fields) :]))


def gradients_of_schema(constants: list[float], symbols: int) -> tuple[list[None] | None, ...]:
    """What a backward returns for a Schema: torch takes every empty list for one of tensors."""
    return None, None if constants else [], None, [None] * symbols


def ignored_by(integers: list[int]) -> int:
    """The label that drops a row."""
    return integers[_SETTINGS.index("ignore_index") - len(_SETTINGS) - len(Want._fields)]


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
    names: str,
    constants: list[float],
    integers: list[int],
    symbols: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Result as a tuple; what is not wanted is an empty tensor. The backend is chosen when it runs."""
    rows = Rows(labels, weight, temperature, teacher_temperature, scale, ids, tail_logprob)
    options, want, _ = from_schema(Schema(names, constants, integers, symbols), rows)
    chosen = registry.select(
        backend, student.device.type, student.dtype, teacher.dtype, options.divergence
    )
    kernels = kernels_for(chosen, options)
    result = kernels.kd_rows(student, teacher, rows, options, _without_deferred(want))
    return tuple(student.new_empty(0) if tensor is None else tensor for tensor in result)  # type: ignore[return-value]


@kd_rows_op.register_fake
def _kd_rows_fake(student, teacher, *others):  # type: ignore[no-untyped-def]
    want = _without_deferred(wanted_of(others[-2]))
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
    student, teacher, *rows, backend, names, constants, integers, symbols = inputs
    ctx.want, ctx.symbols = wanted_of(integers), len(symbols)
    kept = list(output[2:4])
    if ctx.want.deferred:
        wanted = (ctx.want.student_gradient, ctx.want.teacher_gradient)
        pairs = zip((student, teacher), wanted, strict=True)
        kept = [logits if trained else copied(logits) for logits, trained in pairs]
    rows = [row if row is None else copied(row) for row in rows]
    ctx.save_for_backward(*kept, *rows, *(symbols if ctx.want.deferred else ()))
    ctx.ignore_index = ignored_by(integers)
    ctx.call = (backend, names, constants, [*integers[:-1], 0])  # the second call is not deferred
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, loss: Tensor | None, total: Tensor | None, *_: Any
) -> tuple[Tensor | list[None] | None, ...]:
    # The loss is used per row or summed, never both (see kd_rows); either way it multiplies the gradient.
    upstream = loss if total is None else total
    if upstream is None:
        return (*(None,) * 10, *gradients_of_schema(ctx.call[2], ctx.symbols))
    first, second, *others = ctx.saved_tensors
    rows, symbols = Rows(*others[: len(Rows._fields)]), others[len(Rows._fields) :]
    upstream = of_counted_rows(upstream, rows, ctx.ignore_index)
    if ctx.want.deferred:
        result = kd_rows_op(first, second, *with_upstream(rows, upstream), *ctx.call, symbols)
        gradients = result[2:4]
    else:
        factor = upstream.unsqueeze(-1) if upstream.dim() else upstream
        gradients = tuple((gradient * factor).to(gradient.dtype) for gradient in (first, second))
    return (
        gradients[0] if ctx.want.student_gradient else None,
        gradients[1] if ctx.want.teacher_gradient else None,
        *(None,) * 8,
        *gradients_of_schema(ctx.call[2], ctx.symbols),
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
    numbers: Numbers | None = None,
) -> tuple[Tensor | None, ...]:
    """(loss, distillation, cross_entropy, student_entropy), differentiable; the loss is [...] or its 0-dim sum.

    numbers: those of a graph that is being compiled (fastkd.call.checks.Prepared).
    """
    want = want._replace(deferred=_defers(student, teacher, want))
    compiling = torch.compiler.is_compiling()
    if compiling and numbers is not None and not want.inplace:
        results = kd_rows_op(student, teacher, *rows, backend, *as_schema(options, want, numbers))
        loss = results[1] if summed else results[0]
        return (loss, *(part.detach() if want.parts else None for part in results[4:]))
    arguments = (student, teacher, rows, options, want, backend, summed)
    if numbers is None and not compiling:
        return KDRows.apply(*arguments)
    # The graph was broken inside kd_loss, so that its validation was compiled and this is not, or the other way round.
    return torch.compiler.disable(_run_eagerly)(numbers, *arguments)


def _run_eagerly(
    numbers: Numbers | None,
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    options: Options,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    if numbers is not None:
        options = settled(options, numbers, rows)
    return KDRows.apply(student, teacher, rows, options, *rest)
