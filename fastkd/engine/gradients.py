"""The rule by which every loss saves, defers and scales its gradient in eager mode.

The forward pass computes the gradient in the same launch as the loss, while the row is in cache, and saves it. The
backward pass multiplies it by the upstream gradient on the device, so the host never waits. There are two variants:

- Deferred: the forward pass saves its inputs, and the backward pass computes the gradient with the upstream factor
  inside. Loss scaling needs this for float16: a gradient of the order 1 / (N V) is smaller than any float16, so it
  would be rounded to 0 before the factor could enlarge it.
- retain_graph: the backward pass returns a scaled copy, so that the saved gradient stays as it is. Otherwise it scales
  the saved tensor in place and returns it, which takes no memory and, if the factor is 1, no pass over the tensor.

fastkd/engine/ops.py implements the same rule for custom ops. It is separate because an op may not return one of its
inputs, so it cannot overwrite the logits, and because torch does not tell a compiled backward pass whether the graph is
retained, so an op cannot scale a saved gradient in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from fastkd.call.contract import Rows, Want
from fastkd.core.tensors import savable


class Computed(Protocol):
    """What a computation returns: a Result of fastkd.call.contract, or a tuple with the same fields."""

    @property
    def loss(self) -> Tensor:
        """The loss [...] of each row."""

    @property
    def total(self) -> Tensor:
        """The sum of the loss, times scale."""

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """Detached tensors that are returned with the loss."""

    @property
    def gradients(self) -> tuple[Tensor | None, ...]:
        """The gradients of total with respect to the first inputs."""


class Loss(NamedTuple):
    """What :class:`Differentiable` needs to know of a loss."""

    # (*inputs, rows, options, want) -> Computed, such as a backend's kd_rows; no gradients if want.deferred.
    compute: Callable[..., Computed]
    options: Any  # the options of the call, which have an ignore_index
    want: Want
    summed: bool  # whether the loss is total
    # The function of the backend that scales a gradient in place.
    scale_rows_: Callable[[Tensor, Tensor], None]


# Whether the running backward pass was asked to retain its graph. A torch that cannot tell counts as asked.
graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


def without_deferred(want: Want) -> Want:
    """The outputs that the forward pass computes, which include no gradients if they are deferred."""
    if not want.deferred:
        return want
    return want._replace(student_gradient=False, teacher_gradient=False, inplace=False)


def without_measures(want: Want) -> Want:
    """The outputs that a backward pass computes; the forward pass has returned the measures."""
    return want._replace(measures=False, overlap=False)


def _per_value(tensor: Tensor | None, value: Tensor) -> TypeGuard[Tensor]:
    """Whether the tensor has an element for each element of the loss."""
    return tensor is not None and tensor.dim() == value.dim()


def of_kept_rows(upstream: Tensor, rows: Rows, ignore_index: int) -> Tensor:
    """The upstream gradient [...], set to 0 in dropped rows, where it may be infinite or NaN."""
    if _per_value(rows.weight, upstream):
        upstream = torch.where(rows.weight == 0, 0.0, upstream)
    if _per_value(rows.labels, upstream):
        upstream = torch.where(rows.labels == ignore_index, 0.0, upstream)
    return upstream


def with_upstream(rows: Rows, upstream: Tensor) -> Rows:
    """The rows, with the upstream gradient (0-dim, or one value per row) multiplied into their scale or weight."""
    if upstream.dim() == 0:
        scale = upstream if rows.scale is None else upstream * rows.scale
        return rows._replace(scale=scale)
    weight = upstream if rows.weight is None else upstream * rows.weight
    return rows._replace(weight=weight.contiguous())


class _Once(torch.autograd.Function):
    """The identity, whose derivative raises: to treat a gradient as a constant would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Tensor:
        """Raise."""
        raise RuntimeError(
            "the loss supports first derivatives only, but is being differentiated twice"
        )


def differentiable_once(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients as a backward pass returns them; under create_graph=True, differentiating them raises."""
    if not torch.is_grad_enabled():
        return tuple(gradients)
    return tuple(
        None if gradient is None else _Once.apply(gradient.requires_grad_())
        for gradient in gradients
    )


class Differentiable(torch.autograd.Function):
    """apply(loss, rows, trained, *inputs) returns (loss, *parts); the first `trained` inputs receive gradients.

    It returns (loss,) if no part is computed.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Loss, rows: Rows, trained: int, *inputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Compute the loss and, unless it is deferred, its gradient."""
        want = loss.want
        computed = loss.compute(*inputs, rows, loss.options, without_deferred(want))
        value = computed.total if loss.summed else computed.loss
        # torch raises if a saved tensor changes before the backward pass, so only what that pass reads is saved.
        if want.deferred:
            ctx.save_for_backward(*savable(*inputs, *rows))
        elif _per_value(rows.labels, value) or _per_value(rows.weight, value):
            ctx.save_for_backward(*computed.gradients, *savable(*rows))
        else:
            ctx.save_for_backward(*computed.gradients)
        if want.inplace and not want.deferred:
            assert inputs[0] is not None
            torch.autograd.graph.increment_version(inputs[0])
        # The computation may hold tensors, so only a deferred loss keeps it.
        ctx.compute = loss.compute if want.deferred else None
        ctx.options, ctx.want, ctx.scale_rows_ = loss.options, want, loss.scale_rows_
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:trained]]
        ctx.constants = (None,) * (len(inputs) - trained)
        ctx.set_materialize_grads(False)
        parts = computed.parts
        detached = [part for part in parts if part is not None]
        if not detached:  # torch takes time for each output, even for None
            return (value,)
        ctx.mark_non_differentiable(*detached)
        return (value, *parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the saved gradients times upstream, or compute the deferred gradients with upstream inside."""
        if upstream is None:
            return (None, None, None, *(None for _ in ctx.dtypes), *ctx.constants)
        run = Differentiable._scaled if ctx.compute is None else Differentiable._deferred
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                gradients = run(ctx, upstream)
            gradients = differentiable_once(gradients)
        else:
            gradients = run(ctx, upstream)
        return (None, None, None, *gradients, *ctx.constants)

    # ctx.saved_tensors is read only once, because a second read raises under activation checkpointing.

    @staticmethod
    def _scaled(ctx: Any, upstream: Tensor) -> Sequence[Tensor | None]:
        """The saved gradients times upstream: scaled in place, or as copies if the graph is retained."""
        saved, dtypes = ctx.saved_tensors, ctx.dtypes
        if len(saved) > len(dtypes):
            rows = Rows(*saved[len(dtypes) :])
            upstream = of_kept_rows(upstream, rows, ctx.options.ignore_index)
        copies = graph_is_kept()
        gradients: list[Tensor | None] = []
        for gradient, dtype in zip(saved, dtypes, strict=False):
            if gradient is not None:
                gradient = gradient.clone() if copies else gradient
                ctx.scale_rows_(gradient, upstream)
                gradient = gradient if gradient.dtype == dtype else gradient.to(dtype)
            gradients.append(gradient)
        return gradients

    @staticmethod
    def _deferred(ctx: Any, upstream: Tensor) -> Sequence[Tensor | None]:
        """The gradients, computed from the saved inputs."""
        count = len(ctx.dtypes) + len(ctx.constants)
        tensors = ctx.saved_tensors
        inputs, rows = tensors[:count], Rows(*tensors[count:])
        # A retained graph needs the logits again, so nothing may overwrite them.
        want = without_measures(ctx.want)
        want = want._replace(deferred=False, inplace=want.inplace and not graph_is_kept())
        rows = with_upstream(rows, of_kept_rows(upstream, rows, ctx.options.ignore_index))
        gradients = ctx.compute(*inputs, rows, ctx.options, want).gradients
        if want.inplace:
            torch.autograd.graph.increment_version(inputs[0])
        return [
            gradient if gradient is None or gradient.dtype == dtype else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
