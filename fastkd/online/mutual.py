"""Deep mutual learning: several students of one batch teach each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    TypedDict,
    overload,
)

import torch
from torch import Tensor

from fastkd.backends import registry
from fastkd.call.checks import check_alike, check_choice, check_columns, check_flags, prepare
from fastkd.call.contract import Want, row_dtype
from fastkd.call.mutual import PEERS, Options, Result
from fastkd.core.scalars import check_number
from fastkd.core.tensors import check_readable
from fastkd.divergences import forward_kl
from fastkd.engine.gradients import Differentiable, Loss
from fastkd.engine.graphs import Arguments, as_one_op

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MutualParts(NamedTuple):
    """Detached terms of the losses, from the same sweep; 0 in dropped rows.

    loss of a row and student = weight (peers + cross_entropy)
    """

    # [M, ...], with the factors T^2 and peer_weight.
    peers: Tensor
    # [M, ...], 0 without labels.
    cross_entropy: Tensor
    # The number of counted rows, 0-dim.
    counted: Tensor


class MutualOptions(TypedDict, total=False):
    """The keyword options of mutual_loss, except return_parts, which decides the type of the result."""

    temperature: float
    peers: str
    peer_weight: float
    scale_by_temperature: bool
    ignore_index: int
    mask: Tensor | None
    weight: Tensor | None
    reduction: str
    num_items: int | float | Tensor | None
    backend: str


# The loss


class _Known(NamedTuple):
    """One student's loss, which the sweep over all students has computed with its gradient."""

    loss: Tensor
    total: Tensor
    gradients: tuple[Tensor]
    parts: tuple[()] = ()


def check_students(logits: object) -> list[Tensor]:
    """Raise unless logits are two or more tensors that fit together; the message has the index."""
    if isinstance(logits, Tensor) or not isinstance(logits, Sequence):
        raise TypeError(
            f"logits must be a list of tensors, one per student; got {type(logits).__name__}"
        )
    if len(logits) < 2:
        raise ValueError(f"logits must be of two or more students, got {len(logits)}")
    students = [check_columns(f"logits[{k}]", student) for k, student in enumerate(logits)]
    first = students[0]
    for k, student in enumerate(students):
        check_alike(f"logits[{k}]", student, "logits[0]", first)
        if student.dtype != first.dtype:
            raise TypeError(
                f"logits[{k}] must be {first.dtype}, the dtype of logits[0]; got {student.dtype}"
            )
        check_readable(f"logits[{k}]", student)
    return students


def _check_options(temperature: object, peers: object, peer_weight: float) -> float:
    """Check the options of the peers' term; return peer_weight as a float."""
    if isinstance(temperature, Tensor):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    check_choice("peers", peers, PEERS)
    return check_number("peer_weight", peer_weight, 0.0, math.inf, open_right=True)


def _returned(arguments: Arguments) -> list[tuple[Sequence[int], torch.dtype]]:
    """The shapes and dtypes of :func:`_as_list`, for a compiled graph."""
    students = arguments["logits"]
    lead, dtype = students[0].shape[:-1], row_dtype(students[0].dtype)
    losses = [(lead if arguments.get("reduction", "mean") == "none" else (), dtype)] * len(students)
    if not arguments.get("return_parts", False):
        return losses
    return [*losses, *[((len(students), *lead), dtype)] * 2, ((), torch.int64)]


def _as_list(returned: Any) -> list[Tensor]:
    """The result of mutual_loss, with or without parts, as one list."""
    if isinstance(returned[-1], MutualParts):
        losses, parts = returned
        return [*losses, *parts]
    return list(returned)


def _from_list(tensors: list[Tensor], arguments: Arguments) -> Any:
    count = len(arguments["logits"])
    losses = tuple(tensors[:count])
    if not arguments.get("return_parts", False):
        return losses
    return losses, MutualParts(*(part.detach() for part in tensors[count:]))


@overload
def mutual_loss(
    logits: Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[MutualOptions],
) -> tuple[Tensor, ...]: ...
@overload
def mutual_loss(
    logits: Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    return_parts: Literal[True],
    **options: Unpack[MutualOptions],
) -> tuple[tuple[Tensor, ...], MutualParts]: ...
@as_one_op(_returned, one_loss_per_tensor=True, flatten=_as_list, unflatten=_from_list)
def mutual_loss(
    logits: Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    peers: str = "mean",
    peer_weight: float = 1.0,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    return_parts: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], MutualParts]:
    r"""Deep mutual learning of M students (Zhang, Xiang, Hospedales and Lu 2018), one loss each.

    With p_k = softmax(s_k / T), the loss of student k in a row is

        CE(softmax(s_k), label)  +  peer_weight T^2 D_k

        peers="mean"      D_k = 1/(M - 1) sum_(l != k) KL(p_l || p_k)      the paper, at T = 1
        peers="sum"       D_k = sum_(l != k) KL(p_l || p_k)                the other published form
        peers="average"   D_k = KL(1/(M - 1) sum_(l != k) p_l || p_k)      co-distillation (Anil et al. 2018)

    "mean" and "average" differ in value and have the same gradient. Peers are constants, as in the papers: the gradient
    by s_k is that of loss k alone, p_k - label + peer_weight T (p_k - mean of the others).

    One sweep covers all students of a row, so time is proportional to M, not to the M (M - 1) pairs.

    Args:
        logits: the logits [..., V] of two or more students, of one shape, dtype (float32, bfloat16, float16; float64 in
            plain PyTorch) and device. Any strides; a tensor is copied only if its last stride is not 1.
        labels: [...] int64, for the cross-entropy; None: the loss is the peers' term alone. A row whose label is
            ignore_index is dropped.
        temperature: T > 0 of the peers' term; the cross-entropy is at temperature 1.
        peers: one of the forms above.
        peer_weight: multiplies the peers' term; 1 in the papers. The cross-entropy always has weight 1, unlike with
            alpha in :func:`fastkd.kd_loss`.
        scale_by_temperature: multiply value and gradient of the peers' term by T^2.
        ignore_index: the label that drops a row.
        mask: [...] bool; a row where it is False is dropped. A dropped row is not read.
        weight: [...] float, multiplies the losses of a row.
        reduction: "none" ([...] per student, 0 in dropped rows), "sum", "mean" (sum / number of counted rows),
            "batchmean" (sum / logits[0].shape[0]).
        num_items: replaces the denominator of "mean" and "batchmean", as in kd_loss.
        return_parts: return (losses, :class:`MutualParts`).
        backend: "auto", "cpu", "triton", "portable" or "reference".

    Returns:
        A tuple of M losses, each in the graph of its own student only: call `losses[k].backward()` with one optimizer
        per student, or `sum(losses).backward()` with one for all. float32 (float64 for float64 logits); 0-dim, or [...]
        for reduction="none". With no counted row they are 0 with a graph. An invalid label makes its row NaN;
        FASTKD_CHECK=1 raises instead.

    Memory: the gradient of each student, in the dtype of its logits (float32 for float16, so that a loss scaler's
    factor comes before rounding); no probabilities.

    torch.compile: one op of the graph. All results of a compiled function share one backward, so add the losses up
    before backward. float16 gradients are computed in the backward.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the requested backend cannot serve this call.
        RuntimeError: a second derivative is requested.
    """
    students = check_students(logits)
    peer_weight = _check_options(temperature, peers, peer_weight)
    check_flags(return_parts=return_parts)
    first = students[0]
    call = prepare(
        first.shape[:-1],
        first.device,
        row_dtype(first.dtype),
        first.shape[-1],
        labels,
        temperature=temperature,
        alpha=1.0 if labels is None else 0.5,  # below 1, prepare() checks labels as targets
        scale_by_temperature=scale_by_temperature,
        ignore_index=ignore_index,
        mask=mask,
        weight=weight,
        reduction=reduction,
        num_items=num_items,
        backend=backend,
    )
    options = Options(
        call.options.temperature,
        peers,
        peer_weight,
        call.options.scale_by_temperature,
        call.options.ignore_index,
        call.options.scale,
    )
    wanted = [torch.is_grad_enabled() and student.requires_grad for student in students]
    dtype = first.dtype
    chosen = registry.select(backend, first.device.type, dtype, dtype, forward_kl())
    mutual_rows = registry.function(chosen, "mutual_rows")
    with torch.no_grad():
        result: Result = mutual_rows(
            [student.detach() for student in students], call.rows, options, wanted, return_parts
        )
    kernels = registry.load(chosen)
    want = Want(student_gradient=True)

    def differentiable(number: int) -> Tensor:
        """The loss of a student, with a node of its own in the graph, so that each can go backward by itself."""
        loss, total = result.loss[number].clone(), result.total[number].clone()
        gradient = result.gradients[number]
        if gradient is None:
            return total if call.summed else loss
        known = _Known(loss, total, (gradient,))
        rule = Loss(lambda *_: known, options, want, call.summed, kernels.scale_rows_)
        (returned,) = Differentiable.apply(rule, call.rows, 1, students[number])
        return returned

    losses = tuple(map(differentiable, range(len(students))))
    if not return_parts:
        return losses
    counted = call.counted
    if not isinstance(counted, Tensor):
        counted = torch.tensor(counted, device=first.device)
    assert result.divergence is not None and result.cross_entropy is not None
    return losses, MutualParts(result.divergence, result.cross_entropy, counted)
