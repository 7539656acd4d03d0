"""The loss of draft models for speculative decoding: divergences, acceptance and weighted sums of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from fastkd.backends import registry
from fastkd.call.checks import (
    LossCall,
    check_choice,
    check_flags,
    check_head,
    check_rows,
    check_teacher,
    checking,
    is_dtensor,
    prepare,
)
from fastkd.call.contract import Options, Rows, Want, factor_of, row_dtype, total_of
from fastkd.call.draft import LOSSES, Result, Terms
from fastkd.call.rows import Chunks, RowIndices, put, rows_at, take
from fastkd.core.pieces import PIECE_TEMPORARIES
from fastkd.core.scalars import LARGEST, check_number
from fastkd.engine import linear
from fastkd.engine.chunks import Student, StudentChunks
from fastkd.engine.gradients import Differentiable, Loss
from fastkd.engine.graphs import Arguments, as_one_op
from fastkd.engine.matmul import make_logits
from fastkd.engine.plan import REFERENCE_TEMPORARIES, Shape, checked_sizes, plan, wide
from fastkd.functional import not_compiled_over_processes
from fastkd.response.chunks import (
    TEMPORARIES,
    blank,
    chunk_rows,
    kernels_of,
    prepared,
)
from fastkd.response.draft_chunks import ALIGNMENT, Shard, compute_chunk
from fastkd.teachers import LinearTeacher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack

# How many [C, V] tensors a chunk holds at once, unless the backend has a kernel for all terms.
DRAFT_TEMPORARIES = 10


class DraftParts(NamedTuple):
    """Detached terms of each row's loss; 0 in dropped rows."""

    # [...]: sum_v min(p_v, q_v), the probability that the target accepts a token sampled from the draft model.
    acceptance: Tensor
    # [...] each: the terms by name, without their weights.
    terms: dict[str, Tensor]
    # The number of counted rows, 0-dim.
    counted: Tensor


class DraftOptions(TypedDict, total=False):
    """The keyword options of draft_loss, except return_parts, which decides the type of the result."""

    draft_to_target: Tensor | None
    eta: float
    positions: Tensor | None
    position_decay: float
    mask: Tensor | None
    weight: Tensor | None
    reduction: str
    num_items: int | float | Tensor | None
    memory_budget: int | None
    process_group: ProcessGroup | DeviceMesh | None
    backend: str


class LinearDraftOptions(DraftOptions, total=False):
    """The keyword options of fused_linear_draft_loss, except return_parts."""

    student_bias: Tensor | None
    chunk_size: int | None


def _names(losses: str | Mapping[str, float]) -> dict[str, Any]:
    """The weight of each loss by name, in the order of LOSSES; the weights are not checked."""
    if isinstance(losses, str):
        losses = {losses: 1.0}
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must be a name or a dict of weights, got {type(losses).__name__}")
    if not losses:
        raise ValueError("losses must have at least one name, got an empty dict")
    for name in losses:
        check_choice("losses", name, LOSSES)
    return {name: losses[name] for name in LOSSES if name in losses}


@overload
def draft_loss(
    student_logits: Tensor,
    teacher: Tensor,
    losses: str | Mapping[str, float] = "forward_kl",
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[DraftOptions],
) -> Tensor: ...
@overload
def draft_loss(
    student_logits: Tensor,
    teacher: Tensor,
    losses: str | Mapping[str, float] = "forward_kl",
    *,
    return_parts: Literal[True],
    **options: Unpack[DraftOptions],
) -> tuple[Tensor, DraftParts]: ...
@overload
def draft_loss(
    student_logits: Tensor,
    teacher: Tensor,
    losses: str | Mapping[str, float] = "forward_kl",
    *,
    return_parts: bool,
    **options: Unpack[DraftOptions],
) -> Tensor | tuple[Tensor, DraftParts]: ...
@not_compiled_over_processes
def draft_loss(
    student_logits: Tensor,
    teacher: Tensor,
    losses: str | Mapping[str, float] = "forward_kl",
    *,
    draft_to_target: Tensor | None = None,
    eta: float = 3.0,
    positions: Tensor | None = None,
    position_decay: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    memory_budget: int | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DraftParts]:
    r"""Loss of a draft model (q) for speculative decoding against its target model (p): a weighted sum of terms.

    The probability that the target accepts a token sampled from the draft model is a = sum_v min(p_v, q_v) =
    1 - TV(p, q) (Leviathan, Kalman and Matias 2023). The terms are

        "forward_kl"     KL(p || q)
        "reverse_kl"     KL(q || p)
        "jsd"            the Jensen-Shannon divergence, beta = 1/2
        "cross_entropy"  -log q(argmax p)
        "tvd"            1 - a
        "nla"            -log max(a, 1e-5), the negative log of the acceptance
        "lk_hybrid"      l KL(p || q) + (1 - l) (1 - a),  l = exp(-eta sg(a))      (LK losses, Samarin et al. 2026)

    sg stops the gradient. The gradient of "nla" is that of "tvd" divided by a, so it is not small when few tokens are
    accepted, unlike that of "tvd".

    A draft vocabulary may be a subset of the target's. p is then renormalized over the subset in the first four terms
    and in the KL of "lk_hybrid". The acceptance a uses p as it is, because the target verifies tokens with all of p:
    the mass of p outside the subset is never accepted. (speculators cuts and renormalizes the target's logits for all
    terms; to get its values, pass ``teacher[..., draft_to_target]`` and no draft_to_target.)

    Args:
        student_logits: [..., D], the draft model's logits, one column per draft token.
        teacher: [..., V], the target model's logits. They get no gradient.
        losses: the name of a term, or a dict from names to weights that are not negative, such as
            {"cross_entropy": 0.1, "tvd": 0.9}. A term of weight 0 is only measured, for return_parts.
        draft_to_target: [D] int64, the target's token for each draft token, all distinct. (EAGLE-3 checkpoints store
            offsets: pass ``torch.arange(D) + d2t``.) None: both models have the same vocabulary.
        eta: the rate in the weight l of "lk_hybrid", not negative.
        positions: [...] int64, the position of each row in the draft; for position_decay.
        position_decay: g in (0, 1]: the loss of a row is multiplied by g^position.
        mask: [...] bool; a row where it is False is dropped.
        weight: [...] float, multiplies the loss of a row.
        reduction: as in :func:`fastkd.kd_loss`. "mean" divides by the number of counted rows, not by
            the sum of their weights.
        num_items: as in :func:`fastkd.kd_loss`.
        memory_budget: as in :func:`fastkd.response.adaptive_kl_loss`.
        process_group: the torch.distributed group, or one-dimensional mesh, whose processes share both vocabularies.
            student_logits are then [..., D_r] and teacher [..., V_r], this process's columns; shards are in rank order
            and may be uneven. draft_to_target is [D_r], the target's token for each of this process's draft tokens;
            it must be one of this process's columns of teacher. All other arguments are equal on every process. Each
            process gets the same loss and the gradient of its own columns.
        return_parts: return (loss, :class:`DraftParts`).
        backend: as in :func:`fastkd.kd_loss`.

    Returns:
        The loss: 0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits). If draft_to_target has
        repeated or invalid tokens, the loss is NaN, because raising would require waiting for the device; with
        FASTKD_CHECK=1 it raises.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the requested backend cannot serve this call.

    Memory: the gradient, and one chunk; on the cpu backend, the gradient and one row per thread; with Triton, only the
    gradient.
    """
    weights = _names(losses)
    return _draft_loss(
        student_logits, teacher, draft_to_target, names=" ".join(weights), **weights, eta=eta,
        positions=positions, position_decay=position_decay, mask=mask, weight=weight,
        reduction=reduction, num_items=num_items, memory_budget=memory_budget,
        process_group=process_group, return_parts=return_parts, backend=backend,
    )  # fmt: skip


def _returned(arguments: Arguments) -> list[tuple[Sequence[int], torch.dtype]]:
    """The shapes and dtypes of the tensors that :func:`_as_list` returns, for a compiled graph."""
    student, teacher = arguments["student_logits"], arguments["teacher"]
    lead, dtype = student.shape[:-1], row_dtype(student.dtype, teacher.dtype)
    per_row = arguments.get("reduction", "mean") == "none"
    loss: tuple[Sequence[int], torch.dtype] = (lead if per_row else (), dtype)
    if not arguments["return_parts"]:
        return [loss]
    return [loss, *[(lead, dtype)] * (1 + len(arguments["names"].split())), ((), torch.int64)]


def _as_list(returned: Any) -> list[Tensor]:
    if isinstance(returned, Tensor):
        return [returned]
    loss, parts = returned
    return [loss, parts.acceptance, *parts.terms.values(), parts.counted]


def _from_list(tensors: list[Tensor], arguments: Arguments) -> Any:
    if not arguments["return_parts"]:
        return tensors[0]
    loss, acceptance, *terms, counted = tensors
    named = dict(zip(arguments["names"].split(), (x.detach() for x in terms), strict=True))
    return loss, DraftParts(acceptance.detach(), named, counted.detach())


@as_one_op(_returned, flatten=_as_list, unflatten=_from_list)
def _draft_loss(
    student_logits: Tensor,
    teacher: Tensor,
    draft_to_target: Tensor | None,
    *,
    names: str,
    eta: float,
    positions: Tensor | None,
    position_decay: float,
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    num_items: int | float | Tensor | None,
    memory_budget: int | None,
    process_group: ProcessGroup | DeviceMesh | None,
    return_parts: bool,
    backend: str,
    **weights: float,
) -> Tensor | tuple[Tensor, DraftParts]:
    """draft_loss with one argument per weight. names: those of the passed terms, separated by spaces."""
    from fastkd.parallel import layout, share

    group = layout.group_of(process_group)
    with share.agreed_by(group) as agreement:
        terms = _terms(names, weights, eta, return_parts)
        student, target, call = prepared(
            student_logits, teacher, None, None, unequal=True, shared=group is not None,
            mask=mask, weight=weight, reduction=reduction, num_items=num_items, backend=backend,
        )  # fmt: skip
        if target.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "teacher requires grad, and draft_loss has no gradient for it; detach it"
            )
        lead, width, device = student.shape[:-1], student.shape[-1], student.device
        _check_columns(draft_to_target, width, target.shape[-1], device)
        position_decay = _check_positions(positions, position_decay, lead, device)
        _, memory_budget = checked_sizes(None, memory_budget)
    wanted = torch.is_grad_enabled() and student.requires_grad
    dtype = row_dtype(student.dtype, target.dtype)
    shard = None
    if agreement is not None:
        shard = _shared(
            agreement, call, terms, positions, (width, target.shape[-1]), lead,
            dtypes=(student.dtype, target.dtype), memory_budget=memory_budget, wanted=wanted,
            position_decay=position_decay, columns=draft_to_target is not None,
        )  # fmt: skip
    call, terms = _with_columns(
        call,
        terms,
        draft_to_target,
        positions,
        position_decay,
        target.shape[-1],
        lead,
        dtype,
        shard,
    )
    kernels, extra = kernels_of(call, student, target)
    held, padded = _held(width, target.shape[-1], shard, extra)
    size = chunk_rows(memory_budget, padded, dtype, device, held - TEMPORARIES)

    def compute(
        student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want
    ) -> _Computed:
        if shard is None and hasattr(kernels, "draft_rows"):
            result = kernels.draft_rows(student, teacher, rows, options, terms, want)
            parts = (result.acceptance, *result.values.values()) if terms.measured else ()
            total = total_of(result.loss, rows, options)
            return _Computed(result.loss, total, (result.student_gradient, None), parts)
        lead = student.shape[:-1]
        outputs = _Outputs(terms, lead, dtype, student.device)
        gradient = blank(student, want.student_gradient)

        # A function, so that its local tensors are freed after each chunk.
        def run(indices: RowIndices) -> None:
            s, t = take(student, lead, indices), take(teacher, lead, indices)
            of_chunk = rows_at(rows, lead, indices)
            result = compute_chunk(kernels, terms, s, t, of_chunk, options, want, shard)
            outputs.put(indices, result)
            if gradient is not None and result.student_gradient is not None:
                put(gradient, lead, indices, result.student_gradient)

        for indices in Chunks.of(rows, lead, options.ignore_index, size):
            run(indices)
        return outputs.computed(rows, options, (gradient, None))

    want = Want(wanted, deferred=wanted and student.dtype == torch.float16)
    rule = Loss(compute, call.options, want, call.summed, kernels.scale_rows_)
    results = Differentiable.apply(rule, call.rows, 2, student, target)
    return _with_parts(results, call, terms, device)


@overload
def fused_linear_draft_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | LinearTeacher,
    losses: str | Mapping[str, float] = "forward_kl",
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[LinearDraftOptions],
) -> Tensor: ...
@overload
def fused_linear_draft_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | LinearTeacher,
    losses: str | Mapping[str, float] = "forward_kl",
    *,
    return_parts: Literal[True],
    **options: Unpack[LinearDraftOptions],
) -> tuple[Tensor, DraftParts]: ...
@overload
def fused_linear_draft_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | LinearTeacher,
    losses: str | Mapping[str, float] = "forward_kl",
    *,
    return_parts: bool,
    **options: Unpack[LinearDraftOptions],
) -> Tensor | tuple[Tensor, DraftParts]: ...
@not_compiled_over_processes
def fused_linear_draft_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Tensor | LinearTeacher,
    losses: str | Mapping[str, float] = "forward_kl",
    *,
    student_bias: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    eta: float = 3.0,
    positions: Tensor | None = None,
    position_decay: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DraftParts]:
    r"""draft_loss of the logits student_hidden @ student_weight.T + student_bias, without ever holding all of them.

    Dropped rows are removed first, and the other rows are processed in chunks. Each chunk computes the logits of both
    models, overwrites the draft model's logits with their gradient, and computes the gradients of hidden states, weight
    and bias from it. The gradient of the weight is summed in float32. A chunk costs four matrix products with a
    :class:`fastkd.LinearTeacher`, one fewer with dense logits, and one fewer if student_weight is frozen. With
    reduction="none" and a student_weight or student_bias that requires grad, the backward pass computes the logits
    again, as in :func:`fastkd.fused_linear_kd_loss`.

    Args:
        student_hidden: [..., H], float32, bfloat16 or float16; float64 is computed in plain PyTorch.
        student_weight: [D, H], the draft model's head, with the dtype and device of student_hidden; under autocast both
            are cast to the autocast dtype.
        teacher: the target model: logits [..., V], or a :class:`fastkd.LinearTeacher` of its hidden states and head.
            It gets no gradient.
        losses: as in :func:`draft_loss`, like every option that is not listed here.
        student_bias: [D], or None.
        chunk_size: rows per chunk; takes precedence over memory_budget. None: as many as memory_budget allows.
        memory_budget: bytes that the call may hold beyond its inputs and gradients; None: 384 MiB on a CPU, 2112 MiB
            elsewhere. :func:`fastkd.memory_plan` with a teacher_vocab_size itemizes them.
        process_group: as in draft_loss; student_weight is then [D_r, H] and the teacher's weight [V_r, H], this
            process's parts of column-parallel heads. The gradient of student_hidden is summed over the processes.

    Returns:
        The loss and, with return_parts, :class:`DraftParts`, as draft_loss returns them.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the requested backend cannot serve this call.
        fastkd.parallel.CollectiveError: another process has stopped, or did not make this call in time.
        RuntimeError: another process of the group has raised.
    """
    from fastkd.parallel import layout, share

    weights = _names(losses)
    group = layout.group_of(process_group)
    with share.agreed_by(group):
        for name, value in (("student_hidden", student_hidden), ("student_weight", student_weight)):
            if is_dtensor(value):
                raise TypeError(
                    f"{name} must be a plain tensor, got a DTensor; pass its local part"
                )
        check_head(student_hidden, student_weight, student_bias)
        lead, device = student_hidden.shape[:-1], student_hidden.device
        if not isinstance(teacher, (Tensor, LinearTeacher)):
            raise TypeError(
                f"teacher must be logits or a LinearTeacher, got {type(teacher).__name__}"
            )
        checked: Any = check_teacher(teacher, "student_hidden", lead, device, group is not None)
        if isinstance(checked, Tensor) and checked.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "teacher requires grad, and fused_linear_draft_loss has no gradient for it; detach it"
            )
        if isinstance(checked, LinearTeacher):
            target = linear.autocast(checked.hidden, checked.weight, checked.bias)
        else:
            target = [checked, None, None]
        hidden, head, bias = linear.autocast(student_hidden, student_weight, student_bias)
        assert hidden is not None and head is not None and target[0] is not None
    if group is not None:
        hidden = layout.summed_gradient(hidden, student_hidden, group)
    return _fused_linear_draft_loss(
        hidden, head, bias, target[0], target[1], target[2], draft_to_target,
        names=" ".join(weights), eta=eta, positions=positions, position_decay=position_decay,
        mask=mask, weight=weight, reduction=reduction, num_items=num_items, chunk_size=chunk_size,
        memory_budget=memory_budget, process_group=process_group, return_parts=return_parts,
        backend=backend, **weights,
    )  # fmt: skip


def _returned_by_fused(arguments: Arguments) -> list[tuple[Sequence[int], torch.dtype]]:
    """As :func:`_returned`, for fused_linear_draft_loss."""
    of_logits = {"student_logits": arguments["student_hidden"], "teacher": arguments["target"]}
    return _returned({**arguments, **of_logits})


def _head_per_row(arguments: Arguments) -> bool:
    """Whether the backward pass computes the gradient: upstream gradients weight the rows in a head's gradient."""
    trained = [arguments["student_weight"], arguments["student_bias"]]
    return arguments["reduction"] == "none" and any(
        x is not None and x.requires_grad for x in trained
    )


@as_one_op(_returned_by_fused, flatten=_as_list, unflatten=_from_list, deferred=_head_per_row)
def _fused_linear_draft_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    target: Tensor,
    target_weight: Tensor | None,
    target_bias: Tensor | None,
    draft_to_target: Tensor | None,
    *,
    names: str,
    eta: float,
    positions: Tensor | None,
    position_decay: float,
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    num_items: int | float | Tensor | None,
    chunk_size: int | None,
    memory_budget: int | None,
    process_group: ProcessGroup | DeviceMesh | None,
    return_parts: bool,
    backend: str,
    **weights: float,
) -> Tensor | tuple[Tensor, DraftParts]:
    """fused_linear_draft_loss of checked operands; target is hidden states if there is a target_weight, else logits."""
    from fastkd.parallel import layout, share

    group = layout.group_of(process_group)
    lead, device = student_hidden.shape[:-1], student_hidden.device
    width = student_weight.shape[0]
    target_width = target.shape[-1] if target_weight is None else target_weight.shape[0]
    dtype = row_dtype(student_hidden.dtype, target.dtype)
    with share.agreed_by(group) as agreement:
        terms = _terms(names, weights, eta, return_parts)
        call = prepare(
            lead, device, dtype, max(min(width, target_width), 1), None,
            mask=mask, weight=weight, reduction=reduction, num_items=num_items, backend=backend,
        )  # fmt: skip
        _check_columns(draft_to_target, width, target_width, device, rows=True)
        position_decay = _check_positions(positions, position_decay, lead, device)
        chunk_size, memory_budget = checked_sizes(chunk_size, memory_budget)
    trained = tuple(
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (student_hidden, student_weight, student_bias)
    )
    shard = None
    if agreement is not None:
        shard = _shared(
            agreement, call, terms, positions, (width, target_width), lead,
            dtypes=(student_hidden.dtype, target.dtype), memory_budget=memory_budget,
            chunk_size=chunk_size, wanted=trained, position_decay=position_decay,
            linear=target_weight is not None, columns=draft_to_target is not None,
        )  # fmt: skip
    call, terms = _with_columns(
        call, terms, draft_to_target, positions, position_decay, target_width, lead, dtype, shard
    )
    name = registry.select(call.backend, device.type, dtype, dtype, call.options.divergence)
    kernels = registry.load(name)
    student = Student(student_hidden, student_weight, student_bias)
    row_bytes = 0 if target_weight is not None else target_width * target.itemsize
    if shard is not None or not hasattr(kernels, "draft_rows"):
        extra = {"reference": REFERENCE_TEMPORARIES, "portable": PIECE_TEMPORARIES}.get(name, 0)
        held, padded = _held(width, target_width, shard, extra)
        row_bytes += held * padded * dtype.itemsize
    shape = _shape_of(student, target, target_weight, shard, row_bytes, trained[1])
    size = plan(shape, chunk_size, memory_budget).chunk_size
    chunked = _ChunkedDraft(terms, shard, kernels, size, trained, dtype)
    want = Want(any(trained), deferred=not call.summed and any(trained[1:]))
    rule = Loss(chunked.compute, call.options, want, call.summed, kernels.scale_rows_)
    inputs = (*student, target, target_weight, target_bias)
    return _with_parts(Differentiable.apply(rule, call.rows, 3, *inputs), call, terms, device)


def _shape_of(
    student: Student,
    target: Tensor,
    target_weight: Tensor | None,
    shard: Shard | None,
    row_bytes: int,
    weight_gradient: bool,
) -> Shape:
    """What the memory plan needs to know about a call. row_bytes: the bytes per row besides its logits."""
    hidden, head, _ = student
    assert head is not None
    target_width = 0 if target_weight is None else target_weight.shape[0]
    width, widest_target = head.shape[0], target_width
    if (
        shard is not None
    ):  # every process plans for the widest part, so that all have the same chunks
        width, widest_target = shard.widest, shard.widest_target
    return Shape(
        hidden.shape[:-1].numel(),
        width,
        hidden.dtype,
        wide(hidden.dtype),
        hidden.shape[-1],
        widest_target if target_weight is not None else 0,
        row_bytes,
        target.shape[-1] if target_weight is not None else 0,
        weight_gradient=weight_gradient,
        device=hidden.device.type,
    )


class _ChunkedDraft(NamedTuple):
    """What fused_linear_draft_loss needs besides the tensors that a graph saves for the backward pass."""

    terms: Terms
    shard: Shard | None
    kernels: Any  # the module of the backend
    chunk_size: int
    wanted: tuple[bool, ...]  # for each field of Student, whether its gradient is wanted
    dtype: torch.dtype  # of the losses and of the target's logits

    def compute(self, hidden: Tensor, head: Tensor, bias: Tensor | None, *others: Any) -> _Computed:
        """Loop over the chunks. others: the target and its head, weight and bias, then rows, options and want."""
        target, target_weight, target_bias, call_rows, call_options, want = others
        rows, options = call_rows, call_options
        lead, width, device = hidden.shape[:-1], head.shape[0], hidden.device
        # As in fastkd.engine.chunks: scaled float16 gradients would underflow as operands.
        defers_scale = hidden.dtype == torch.float16
        if defers_scale:
            options, rows = options._replace(scale=1.0), rows._replace(scale=None)
        chunks = Chunks.of(rows, lead, options.ignore_index, self.chunk_size, even=True)
        wanted = (False,) * 3 if want.deferred else self.wanted
        student = StudentChunks(
            Student(hidden, head, bias), lead, width, wanted, False, chunks.count <= chunks.size
        )
        outputs = _Outputs(self.terms, lead, self.dtype, device)
        want = want._replace(student_gradient=any(wanted), inplace=True)
        buffers = [self.kernels.empty((chunks.size, width), wide(hidden.dtype), device)]
        if target_weight is not None:
            target_width = target_weight.shape[0]
            buffers.append(self.kernels.empty((chunks.size, target_width), self.dtype, device))

        def run(indices: RowIndices) -> None:
            count = indices.stop - indices.start if isinstance(indices, slice) else indices.numel()
            logits = student.logits(indices, buffers[0][:count])
            target_logits = take(target, lead, indices)
            if target_weight is not None:
                target_logits = make_logits(
                    target_logits, target_weight, target_bias, buffers[1][:count]
                )
            of_chunk = rows_at(rows, lead, indices)
            result = compute_chunk(
                self.kernels, self.terms, logits, target_logits, of_chunk, options, want, self.shard
            )
            outputs.put(indices, result)
            if result.student_gradient is not None:
                # The target's logits are no longer needed, so their buffer is scratch memory if it is wide enough.
                scratch = buffers[1] if len(buffers) > 1 and width <= target_width else None
                student.add(indices, result.student_gradient, scratch)

        for indices in chunks:
            run(indices)
        buffers.clear()  # frees them before finished() converts the gradients
        gradients = student.finished(chunks.indices)
        if defers_scale:
            factor = factor_of(call_rows, call_options)
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor)
        return outputs.computed(call_rows, call_options, gradients)


class _Computed(NamedTuple):
    """What :class:`Differentiable` needs of a computation."""

    loss: Tensor
    total: Tensor
    gradients: tuple[Tensor | None, ...]
    parts: tuple[Tensor, ...]


class _Outputs:
    """The results of all rows, which chunks fill; 0 in dropped rows."""

    def __init__(
        self, terms: Terms, lead: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.lead, self.names = lead, tuple(terms.weights) if terms.measured else ()
        # The loss, the acceptance, the terms.
        count = 2 + len(self.names) if terms.measured else 1
        self.loss, *self.parts = (
            torch.zeros(lead, dtype=dtype, device=device) for _ in range(count)
        )

    def put(self, indices: RowIndices, result: Result) -> None:
        """Write the results of these rows."""
        put(self.loss, self.lead, indices, result.loss)
        if self.parts:
            of_rows = (result.acceptance, *(result.values[name] for name in self.names))
            for everywhere, values in zip(self.parts, of_rows, strict=True):
                assert values is not None
                put(everywhere, self.lead, indices, values)

    def computed(
        self, rows: Rows, options: Options, gradients: tuple[Tensor | None, ...]
    ) -> _Computed:
        """The results, once all chunks have been processed."""
        total = total_of(self.loss, rows, options)
        return _Computed(self.loss, total, gradients, tuple(self.parts))


def _with_parts(
    results: tuple[Tensor, ...], call: LossCall, terms: Terms, device: torch.device
) -> Tensor | tuple[Tensor, DraftParts]:
    """What the losses return, given the results of Differentiable."""
    loss, *parts = results
    if not terms.measured:
        return loss
    counted = call.counted
    if not isinstance(counted, Tensor):
        counted = torch.tensor(counted, device=device)
    acceptance, *values = parts
    return loss, DraftParts(acceptance, dict(zip(terms.weights, values, strict=True)), counted)


def _terms(names: str, weights: Mapping[str, Any], eta: float, return_parts: bool) -> Terms:
    """The checked terms; their columns are still None. names: those that were passed, separated by spaces."""
    checked = {
        name: check_number(f"losses[{name!r}]", weights[name], 0.0, LARGEST)
        for name in names.split()
    }
    if not any(checked.values()):
        raise ValueError("losses must have a weight that is not 0; all weights are 0")
    check_flags(return_parts=return_parts)
    return Terms(checked, check_number("eta", eta, 0.0, LARGEST), None, return_parts)


def _held(width: int, target_width: int, shard: Shard | None, extra: int) -> tuple[int, int]:
    """(how many [C, width] tensors a chunk holds, their width with padding). extra: how many the backend adds."""
    if shard is not None:
        width, target_width = shard.widest, shard.widest_target
    padded = width + ALIGNMENT
    # The target's rows are copied if some are dropped.
    return DRAFT_TEMPORARIES + -(-target_width // padded) + extra, padded


def _shared(
    agreement: Any,
    call: LossCall,
    terms: Terms,
    positions: Tensor | None,
    widths: tuple[int, int],
    lead: torch.Size,
    **facts: object,
) -> Shard:
    """Check that all processes make the same call; return this one's Shard. widths: of draft model and target."""
    from fastkd.parallel.share import facts_of_rows

    names = {
        "columns": "whether draft_to_target is given",
        "dtypes": "the dtypes of student and teacher",
        "linear": "whether teacher is a LinearTeacher",
        "wanted": "what requires grad",
    }
    agreed = agreement.reached(
        list(widths),
        {names.get(name, name): value for name, value in facts.items()}
        | {
            "the shape of rows": tuple(lead),
            "losses": terms.weights,
            "eta": terms.eta,
            "return_parts": terms.measured,
            "the factor of the loss (from num_items or the number of rows)": call.options.scale,
            "whether the loss is one number": call.summed,
        }
        | facts_of_rows(
            {
                "num_items": call.rows.scale,
                "mask and weight": call.rows.weight,
                "positions": positions,
            }
        ),
    )
    of_draft, of_target = zip(*agreed.numbers, strict=True)
    first = sum(of_target[: agreed.rank])
    return Shard(agreement.group, agreed.rank, first, max(of_draft), max(of_target))


def _check_columns(
    draft_to_target: Tensor | None,
    width: int,
    target_width: int,
    device: torch.device,
    rows: bool = False,
) -> None:
    """Raise unless draft_to_target fits both vocabularies. rows: the draft tokens are rows of student_weight."""
    if draft_to_target is None and width != target_width:
        if rows:
            raise ValueError(
                f"student_weight has {width} rows, and teacher has {target_width} columns; pass draft_to_target, the "
                "target's token for each draft token"
            )
        raise ValueError(
            f"student_logits has {width} columns, and teacher has {target_width}; pass draft_to_target, the target's "
            "token for each draft token"
        )
    if draft_to_target is None:
        return
    if isinstance(draft_to_target, Tensor) and draft_to_target.shape != (width,):
        raise ValueError(
            f"draft_to_target must be [{width}], the target's token for each "
            f"{'row of student_weight' if rows else 'column of student_logits'}; got shape "
            f"{tuple(draft_to_target.shape)}"
        )
    check_rows("draft_to_target", draft_to_target, torch.Size((width,)), device, (torch.int64,))


def _with_columns(
    call: LossCall,
    terms: Terms,
    draft_to_target: Tensor | None,
    positions: Tensor | None,
    position_decay: float,
    target_width: int,
    lead: torch.Size,
    dtype: torch.dtype,
    shard: Shard | None,
) -> tuple[LossCall, Terms]:
    """The call with position_decay^positions in the weights of rows, and the terms with the target's columns.

    If a token is repeated or is no column of the target, the loss is NaN on every process.
    """
    factor = None
    if draft_to_target is not None:
        first = 0 if shard is None else shard.first
        columns = draft_to_target - first
        valid = _are_distinct(columns, target_width)
        if shard is not None:
            from fastkd.parallel.collectives import all_gather

            valid = all_gather(valid.to(torch.int64), shard.group, "draft_to_target").wait().all()
        if checking() and not valid:
            if shard is not None:
                raise ValueError(
                    f"draft_to_target must be distinct tokens in [{first}, {first + target_width}), the target's "
                    "tokens that this process has; on some process, some are repeated or outside"
                )
            raise ValueError(
                f"draft_to_target must be distinct tokens in [0, {target_width}); some are repeated or outside. If it "
                "holds offsets, pass torch.arange(len(draft_to_target)) + draft_to_target"
            )
        terms = terms._replace(columns=columns.clamp(0, max(target_width - 1, 0)))
        factor = torch.where(valid, 1.0, math.nan)
    if positions is not None:
        decay = torch.as_tensor(position_decay, dtype=torch.float64, device=positions.device)
        decay = decay**positions
        factor = decay if factor is None else decay * factor
    if factor is None:
        return call, terms
    rows = call.rows
    whole = factor.to(dtype).expand(lead)
    if rows.weight is not None:  # a dropped row has weight 0 there, whatever its position is
        whole = torch.where(rows.weight == 0, 0.0, rows.weight * whole)
    return call._replace(rows=rows._replace(weight=whole.contiguous())), terms


def _are_distinct(columns: Tensor, width: int) -> Tensor:
    """Whether all columns are distinct and in [0, width), 0-dim."""
    if not columns.numel():
        return torch.ones((), dtype=torch.bool, device=columns.device)
    ordered = columns.sort().values
    return (ordered[1:] != ordered[:-1]).all() & (ordered[0] >= 0) & (ordered[-1] < width)


def _check_positions(
    positions: Tensor | None, position_decay: float, lead: torch.Size, device: torch.device
) -> float:
    """The decay as a float; raise unless it and the positions are valid."""
    position_decay = check_number("position_decay", position_decay, 0.0, 1.0)
    if position_decay == 0.0:
        raise ValueError("position_decay must be in (0, 1], got 0.0")
    if positions is not None:
        check_rows("positions", positions, lead, device, (torch.int64,))
    elif position_decay != 1.0:
        raise ValueError(
            f"positions must be given for position_decay; position_decay is {position_decay}"
        )
    return position_decay
