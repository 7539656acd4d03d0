"""The two main losses: kd_loss on logits, fused_linear_kd_loss on hidden states and an lm_head.

Both validate their arguments (fastkd.call.checks). Dense logits then go to fastkd.engine.autograd. Logits that have to
be computed first, from hidden states or from several teachers, go to fastkd.engine.linear, a chunk of rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

from fastkd.call import memo
from fastkd.call.checks import (
    LossCall,
    check_flags,
    check_head,
    check_logits,
    check_parts,
    check_teacher,
    check_vocabulary,
    is_dtensor,
    prepare,
    teacher_widths,
    with_names,
    with_rows,
    with_tail,
    with_topk,
)
from fastkd.call.contract import Want, kept_rows, row_dtype
from fastkd.call.measures import MEASURES
from fastkd.call.options import LossOptions, as_tensor
from fastkd.core.tensors import share_storage, writable
from fastkd.divergences import Divergence, has_teacher_derivative
from fastkd.engine import autograd, ensembles, linear
from fastkd.engine.chunks import Student
from fastkd.engine.gradients import Differentiable, Loss
from fastkd.engine.plan import wide
from fastkd.teachers import Ensemble, Teacher, TopK, flatten

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack


Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def not_compiled_over_processes(
    function: Callable[Parameters, Returned],
) -> Callable[Parameters, Returned]:
    """Decorator that runs a call outside compiled graphs if several processes take part, because they communicate.

    A call with an Ensemble that has a TopK is not compiled either, because it depends on the values of options.
    """

    @functools.wraps(function)
    def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Returned:
        if torch.compiler.is_compiling() and (
            options.get("process_group") is not None
            or any(map(is_dtensor, (*arguments, *options.values())))
            or any(isinstance(x, Ensemble) and x.is_sparse for x in (*arguments, *options.values()))
        ):
            return torch.compiler.disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return call


class Parts(NamedTuple):
    """The detached terms of each row's loss, computed in the same pass as the loss. Dropped rows contain 0.

    loss of a row = weight (alpha * distillation + (1 - alpha) * cross_entropy)

    A row with an invalid label has NaN in all terms, if the loss reads labels: alpha < 1, or a divergence with a label
    term.
    """

    distillation: Tensor  # [...], multiplied by T^2 if scale_by_temperature
    cross_entropy: Tensor  # [...], 0 if alpha is 1 or there are no labels
    student_entropy: Tensor  # [...], entropy of softmax(student / temperature) in nats
    counted: Tensor  # 0-dim, the number of counted rows


class MeasuredParts(NamedTuple):
    """The fields of :class:`Parts`, and the measures that return_parts names; those that it does not name are None.

    Measures are detached values per row, [...], in the dtype of the loss, with 0 in dropped rows and NaN in rows whose
    loss is NaN. They compare the distributions p = softmax(teacher / teacher_temperature) and
    q = softmax(student / temperature), whatever the divergence and alpha are, and are never multiplied by T^2. 0 log 0
    is 0. A KL divergence is infinite if its second distribution gives no probability to a token to which the first
    gives some.

    With a :class:`fastkd.TopK`, p and q are the distributions over the K listed tokens and the tail, all other tokens
    taken together, and the tail counts like one more token. tail="renormalize" has no tail: both are normalized over
    the K tokens. With "renormalize_teacher" the tail has p = 0, with "truncate" p = 1 - sum p_k. A row that lists no
    token has measures of 0.
    """

    distillation: Tensor  # the first four: as in Parts
    cross_entropy: Tensor
    student_entropy: Tensor
    counted: Tensor
    teacher_entropy: Tensor | None = None  # -sum p log p, in nats
    forward_kl: Tensor | None = None  # KL(p || q) = sum p (log p - log q)
    reverse_kl: Tensor | None = None  # KL(q || p) = sum q (log q - log p)
    # sum min(p, q) = 1 - total variation: how often speculative decoding accepts a token that the student drafts
    # (Leviathan, Kalman and Matias 2023)
    acceptance: Tensor | None = None
    # 1 if both distributions have their maximum at the same token, else 0. Of equal maxima, the first counts, as in
    # torch.argmax.
    agreement: Tensor | None = None
    student_mass: Tensor | None = None  # the sum of q over the listed tokens
    teacher_mass: Tensor | None = None  # the sum of p over the listed tokens
    # How many of a row's K listed tokens are among the student's K most probable tokens, in the whole vocabulary. It
    # takes a torch.topk of the student's logits, a pass of its own; the other measures do not.
    overlap: Tensor | None = None


class DenseOptions(LossOptions, total=False):
    """The keyword options of kd_loss."""

    vocab_size: int | None
    process_group: ProcessGroup | DeviceMesh | None
    inplace: bool


class LinearOptions(LossOptions, total=False):
    """The keyword options of fused_linear_kd_loss."""

    student_bias: Tensor | None
    chunk_size: int | None
    memory_budget: int | None
    logits_dtype: torch.dtype | None
    vocab_size: int | None
    process_group: ProcessGroup | DeviceMesh | None
    sequence_dim: int | None


@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[DenseOptions],
) -> Tensor: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    return_parts: Literal[True],
    **options: Unpack[DenseOptions],
) -> tuple[Tensor, Parts]: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    return_parts: Collection[str],
    **options: Unpack[DenseOptions],
) -> tuple[Tensor, MeasuredParts]: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    return_parts: bool | Collection[str],
    **options: Unpack[DenseOptions],
) -> Tensor | tuple[Tensor, Parts] | tuple[Tensor, MeasuredParts]: ...
@not_compiled_over_processes
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    alpha: float = 1.0,
    scale_by_temperature: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    inplace: bool = False,
    return_parts: bool | Collection[str] = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Parts] | tuple[Tensor, MeasuredParts]:
    r"""Distillation loss of student logits against a teacher.

    The forward pass also computes the gradient, except for float16 logits, whose gradient is computed in the backward
    pass. No tensor of probabilities is allocated.

    The loss of a row (a position), with D the divergence and T the temperature, is

        alpha T^2 D(softmax(t / T), softmax(s / T)) + (1 - alpha) CE(softmax(s), label)

    (Hinton, Vinyals and Dean 2015). The cross-entropy CE is at temperature 1.

    Args:
        student_logits: [..., V], float32, bfloat16 or float16; float64 is computed in plain PyTorch. Any strides are
            allowed; the logits are copied only if the stride of the last dimension is not 1.
        teacher: dense teacher logits with the same leading shape, in any of those dtypes; they receive a gradient if
            they require one. Alternatively a :class:`fastkd.TopK`, :class:`fastkd.LinearTeacher` or
            :class:`fastkd.Ensemble` with the same leading shape, or a :class:`fastkd.RoutedTeacher`. The logits of the
            last three are computed a chunk of rows at a time; :func:`fastkd.memory_plan` returns the chunk size.
        labels: [...] int64, the targets of the cross-entropy. Required if alpha < 1, if label_smoothing is not 0, and
            for a divergence that treats the label separately (dkd, nkd). A row whose label is ignore_index is dropped,
            whatever alpha is.
        divergence: a name from ``fastkd.DIVERGENCES`` or a divergence such as ``fastkd.jsd(0.3)``.
        temperature: T > 0, a number or a float tensor [...] with one value per row.
        teacher_temperature: the teacher's temperature, a number or a tensor as above; None: the same as the student's.
            The factor T^2 always uses the student's.
        alpha: weight of the distillation term, in [0, 1].
        scale_by_temperature: multiply value and gradient of the distillation term by T^2.
        label_smoothing: smoothing of the cross-entropy, in [0, 1), as in torch.nn.functional.cross_entropy.
        ignore_index: the label that drops a row.
        mask: [...] bool; rows where it is False are dropped. Dropped rows may contain NaN.
        weight: [...] float, multiplies the loss of each row; it does not change the number of counted rows.
        reduction: "none" ([...], 0 in dropped rows), "sum", "mean" (sum / number of counted rows), "batchmean"
            (sum / student_logits.shape[0], as in torch.nn.functional.kl_div).
        num_items: replaces the denominator of "mean" and "batchmean": a positive number or a 0-dim tensor, for
            example the number of counted rows of the whole batch under gradient accumulation.
        logit_scale: factor of the student's logits, applied before softcap.
        softcap: c > 0; the student's scaled logits become c tanh(logits / c).
        teacher_logit_scale: logit_scale of the teacher.
        teacher_softcap: softcap of the teacher.
        vocab_size: number of leading columns that count, for models that pad their vocabulary; later columns have
            probability 0 and gradient 0 on both sides. Required if the widths of student and teacher differ. With
            process_group it is the size of the whole vocabulary.
        process_group: the torch.distributed group, or one-dimensional mesh, whose processes share the vocabulary.
            student_logits are then [..., V_r], this process's shard; shards are in rank order and may be uneven. The
            teacher has the same columns, or all of them; all other arguments are equal on every process. Each process
            gets the same loss and the gradient of its own columns. Not needed for DTensors sharded along the
            vocabulary. docs/parallel.md lists what is exchanged and how to combine this with FSDP, DDP and pipelines.
        inplace: let the gradient overwrite student_logits, which saves one [..., V] tensor. The version counter of
            student_logits is incremented, so autograd raises if another operation still needs them. Under
            torch.compile this breaks the graph, or raises with fullgraph=True.
        return_parts: return (loss, :class:`Parts`). A collection of names, such as ("teacher_entropy", "acceptance"),
            returns (loss, :class:`MeasuredParts`), which also has the measures of these names. They cost time and
            memory only if they are asked for.
        backend: "auto", or one of ``fastkd.available_backends()``.

    Returns:
        The loss: 0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits). If no row is
        counted, the loss is 0 and still part of the autograd graph. An invalid label, or a non-positive element of a
        temperature tensor, makes its row NaN, because raising an error would require waiting for the device; with
        FASTKD_CHECK=1 the call waits and raises.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the requested backend cannot serve this call.
        fastkd.parallel.CollectiveError: another process has stopped, or did not make this call in time.
        RuntimeError: another process of the group has raised.
    """
    wants_parts, names = check_parts(return_parts)
    key = None
    if inplace is not True:  # which is checked each time, because it depends on strides and storage
        key = memo.key_of(
            (student_logits, teacher, labels, mask, weight),
            (
                divergence, temperature, teacher_temperature, alpha, scale_by_temperature,
                label_smoothing, ignore_index, reduction, num_items, logit_scale, softcap,
                teacher_logit_scale, teacher_softcap, vocab_size, process_group, inplace,
                wants_parts, names and " ".join(names), backend,
            ),
        )  # fmt: skip
    checked = memo.recall(key)
    if checked is not None:
        call, want, kernels = checked
        if not (labels is None and mask is None and weight is None):
            call = with_rows(
                call, student_logits.shape[:-1], student_logits.device,
                _row_dtype(student_logits, teacher), labels, mask, weight, reduction, num_items,
            )  # fmt: skip
    else:
        # Imported here to keep `import fastkd` fast.
        from fastkd.parallel import layout, share

        group = layout.group_of(process_group, student_logits, teacher)
        check_flags(inplace=inplace)
        with share.agreed_by(group) as agreement:
            has_all_columns = layout.is_whole(student_logits, group)
            student_logits = layout.local("student_logits", student_logits, -1, group)
            student_logits = check_logits("student_logits", student_logits, group is not None)
            lead, device = student_logits.shape[:-1], student_logits.device
            teacher = layout.local_teacher(teacher, group)
            teacher = check_teacher(
                teacher, "student_logits", lead, device, group is not None, differentiable=True
            )
            widths = {"student_logits": student_logits.shape[-1], **teacher_widths(teacher)}
            teacher = linear.autocast_teacher(teacher)
            call, teacher = _prepared(
                lead, device, _row_dtype(student_logits, teacher),
                check_vocabulary(vocab_size, widths) if group is None else None,
                layout.local("labels", labels, None, group), teacher,
                divergence=divergence,
                temperature=layout.local("temperature", temperature, None, group),
                teacher_temperature=layout.local(
                    "teacher_temperature", teacher_temperature, None, group
                ),
                alpha=alpha, scale_by_temperature=scale_by_temperature,
                label_smoothing=label_smoothing, ignore_index=ignore_index,
                mask=layout.local("mask", mask, None, group),
                weight=layout.local("weight", weight, None, group),
                reduction=reduction, num_items=num_items,
                logit_scale=logit_scale, softcap=softcap,
                teacher_logit_scale=teacher_logit_scale, teacher_softcap=teacher_softcap,
                backend=backend,
            )  # fmt: skip
            want = _want(student_logits, teacher, call.options.divergence, wants_parts, inplace)
            want = with_names(want, names, teacher, group is not None)
            if want.inplace:
                _check_inplace(student_logits, flatten(teacher)[0], want, has_all_columns)
            if isinstance(teacher, TopK):
                call = with_topk(call, teacher)
        if agreement is not None:
            student_logits, teacher, call = share.share_logits(
                agreement, student_logits, has_all_columns, teacher, call, want, vocab_size, widths
            )
        if isinstance(teacher, TopK):
            call, teacher = with_tail(call, teacher, _row_dtype(student_logits, teacher), want)
    if not isinstance(teacher, Tensor):
        results = linear.kd_chunks(Student(student_logits), teacher, call, want)
    elif checked is None and (key is None or call.numbers is not None):
        # torch.compile may trace what this call does, even if it does not trace this function.
        results = autograd.kd_rows(student_logits, teacher, call, want)
    else:
        if checked is None:
            kernels = autograd.kernels_of(student_logits, teacher, call, want)
            memo.remember(key, call, want, kernels)
        loss = Loss(kernels.kd_rows, call.options, want, call.summed, kernels.scale_rows_)
        results = Differentiable.apply(loss, call.rows, 2, student_logits, teacher)
    if not wants_parts:
        assert results[0] is not None
        return results[0]
    return _with_parts(results, call, names, student_logits.device)


@overload
def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...
@overload
def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    return_parts: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, Parts]: ...
@overload
def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    return_parts: Collection[str],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, MeasuredParts]: ...
@overload
def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    return_parts: bool | Collection[str],
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, Parts] | tuple[Tensor, MeasuredParts]: ...
@not_compiled_over_processes
def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    vocab_size: int | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    sequence_dim: int | None = None,
    return_parts: bool | Collection[str] = False,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, Parts] | tuple[Tensor, MeasuredParts]:
    r"""kd_loss of the logits student_hidden @ student_weight.T + student_bias, without ever holding all of them.

    Dropped rows are removed first. The other rows are processed in chunks. Each chunk computes the logits of student
    and teacher, overwrites the student's logits with their gradient, and computes the gradients of hidden states and
    weight from it. The gradient of the weight is summed in float32. A chunk costs four matrix products with a
    :class:`fastkd.LinearTeacher`: two for the logits and two for the gradients. It costs one fewer if student_weight is
    frozen, and one fewer with dense logits or a :class:`fastkd.TopK`. Nothing is computed twice, with one exception:
    with reduction="none" and a student_weight or student_bias that requires grad, the backward pass recomputes the
    logits, because the gradients of weight and bias sum over rows that each have their own upstream gradient.

    Args:
        student_hidden: [..., H], float32, bfloat16 or float16; float64 is computed in plain PyTorch. Any strides are
            allowed.
        student_weight: [V, H], the lm_head, with the dtype and device of student_hidden; under autocast both are cast
            to the autocast dtype. A DTensor sharded by FSDP is gathered once per call, and its gradient is averaged
            over the processes.
        teacher: a :class:`fastkd.LinearTeacher` (of any width), dense logits [..., V], a :class:`fastkd.TopK`, a
            :class:`fastkd.Ensemble` or a :class:`fastkd.RoutedTeacher`. It receives no gradient; a teacher that
            requires grad raises.
        labels: as in :func:`fastkd.kd_loss`, like every option that is not listed here.
        student_bias: [V], or None.
        chunk_size: rows per chunk; takes precedence over memory_budget. None: as many as memory_budget allows.
        memory_budget: bytes that the call may hold beyond its inputs and gradients; None: 384 MiB on a CPU, 2112
            MiB elsewhere. :func:`fastkd.memory_plan` itemizes them. A budget too small for one row raises.
        logits_dtype: dtype of the student's logits, and of a LinearTeacher's if its hidden states have the student's
            dtype. If None, logits are float32 even for lower-precision operands, because rounding them to bfloat16
            changes the gradient by several percent. With the operands' dtype, the call is faster and the logits take
            half the memory.
        vocab_size: as in kd_loss; rows of a weight beyond it are padding, and their logits are not computed.
        process_group: as in kd_loss; student_weight is then [V_r, H], this process's part of a column-parallel
            lm_head. The gradient of student_hidden is summed over the processes.
        sequence_dim: for sequence-parallel hidden states, the dimension of student_hidden along which the processes
            of process_group hold equal parts of the rows. The parts are gathered and their gradient is scattered.
            Labels and other per-row arguments cover all rows, not only this process's. A teacher's hidden states
            cover all rows too, unless they have the shape of the student's part.

    Returns:
        The loss and, with return_parts, its :class:`Parts` or :class:`MeasuredParts`, as kd_loss returns them: float32
        (float64 for float64).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the requested backend cannot serve this call.
        fastkd.parallel.CollectiveError: another process has stopped, or did not make this call in time.
        RuntimeError: another process of the group has raised.
    """
    from fastkd.parallel import layout, share

    group = layout.group_of_head(process_group, student_hidden, student_weight)
    wants_parts, names = check_parts(return_parts)
    # The shapes of a DTensor are the same on every process, so its collectives can run before the validation.
    hidden_argument = student_hidden
    student_hidden = layout.local_hidden("student_hidden", student_hidden, group)
    student_weight = layout.local_weight("student_weight", student_weight, group)
    student_bias = layout.local_weight("student_bias", student_bias, group)
    teacher = layout.local_teacher(teacher, group)
    with share.agreed_by(group) as agreement:
        sequence = layout.sequence_of(hidden_argument, group, sequence_dim)
        local_hidden, local_teacher = student_hidden, teacher
        if sequence is not None:
            student_hidden = sequence.stand_in(local_hidden)
            teacher = sequence.with_hidden(teacher, sequence.stand_in)
        check_head(student_hidden, student_weight, student_bias)
        lead, device = student_hidden.shape[:-1], student_hidden.device
        teacher = check_teacher(teacher, "student_hidden", lead, device, group is not None)
        if isinstance(teacher, Tensor) and teacher.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "teacher requires grad, and fused_linear_kd_loss has no gradient for it; detach it"
            )
        widths = {"student_weight": student_weight.shape[0], **teacher_widths(teacher)}
        vocabulary = check_vocabulary(vocab_size, widths) if group is None else None
        unknown = options.keys() - LossOptions.__annotations__.keys()
        if unknown:
            raise TypeError(f"fused_linear_kd_loss has no option {', '.join(sorted(unknown))}")
        teacher = linear.autocast_teacher(teacher)
        hidden, head, bias = linear.autocast(student_hidden, student_weight, student_bias)
        assert hidden is not None
        _check_logits_dtype(logits_dtype, hidden.dtype)
        per_row: dict[str, Any] = {
            name: layout.local(name, options[name], None, group)
            for name in ("temperature", "teacher_temperature", "mask", "weight")
            if name in options
        }
        labels = layout.local("labels", labels, None, group)
        call, teacher = _prepared(
            lead,
            device,
            _row_dtype(hidden, teacher),
            vocabulary,
            labels,
            teacher,
            **{**options, **per_row},
        )
        trained = [x is not None and x.requires_grad for x in (hidden, head, bias)]
        grad_enabled = torch.is_grad_enabled()
        want = Want(grad_enabled and any(trained), False, wants_parts)
        want = with_names(want, names, teacher, group is not None)
        if isinstance(teacher, TopK):
            call = with_topk(call, teacher)
    if agreement is not None:
        call, width = share.share(
            agreement, call, want, lead, (hidden, head, bias), teacher, vocab_size, widths,
            chunk_size=chunk_size, memory_budget=memory_budget, logits_dtype=logits_dtype,
            trained=trained, sequence_dim=sequence_dim,
        )  # fmt: skip
        if sequence is not None:
            (hidden,) = linear.autocast(sequence.gathered(local_hidden))
            teacher = linear.autocast_teacher(
                sequence.with_hidden(local_teacher, sequence.gathered)
            )
        else:
            hidden = layout.summed_gradient(hidden, hidden_argument, group)
        assert call.options.shard is not None
        teacher = layout.cut_teacher(teacher, call.options.shard, call.options.vocab_size, width)
    assert hidden is not None
    if isinstance(teacher, TopK):
        call, teacher = with_tail(call, teacher, _row_dtype(hidden, teacher), want)
    student = Student(hidden, head, bias)
    results = linear.kd_chunks(
        student, teacher, call, want, logits_dtype, chunk_size, memory_budget
    )
    if not wants_parts:
        assert results[0] is not None
        return results[0]
    return _with_parts(results, call, names, device)


def _prepared(
    lead: torch.Size,
    device: torch.device,
    row_dtype: torch.dtype,
    vocabulary: int | None,
    labels: Tensor | None,
    teacher: Teacher,
    **options: Any,
) -> tuple[LossCall, Teacher]:
    """(the call that fastkd.call.checks.prepare returns, the teacher): an Ensemble with a TopK becomes one TopK."""
    if not (isinstance(teacher, Ensemble) and teacher.is_sparse):
        return prepare(lead, device, row_dtype, vocabulary, labels, teacher, **options), teacher
    call = prepare(lead, device, row_dtype, vocabulary, labels, None, tail=teacher.tail, **options)
    combined = ensembles.combined(teacher, call, lead, vocabulary)
    options |= {"teacher_logit_scale": 1.0, "teacher_softcap": None}
    if teacher.mean == "arithmetic":
        options["teacher_temperature"] = 1.0
    return prepare(lead, device, row_dtype, vocabulary, labels, combined, **options), combined


def _check_logits_dtype(logits_dtype: object, operand_dtype: torch.dtype) -> None:
    if logits_dtype is None:
        return
    if not (isinstance(logits_dtype, torch.dtype) and logits_dtype.is_floating_point):
        raise TypeError(f"logits_dtype must be a floating-point torch.dtype, got {logits_dtype!r}")
    if logits_dtype not in (wide(operand_dtype), operand_dtype):
        raise ValueError(
            f"logits_dtype must be {wide(operand_dtype)} or the dtype of student_hidden, {operand_dtype}; "
            f"got {logits_dtype}"
        )


def _row_dtype(student: Tensor, teacher: Teacher) -> torch.dtype:
    return row_dtype(student.dtype, *(tensor.dtype for tensor in flatten(teacher)[0]))


def _want(
    student: Tensor, teacher: Teacher, divergence: Divergence, return_parts: bool, inplace: bool
) -> Want:
    """The outputs that kd_loss needs. float16 gradients are deferred."""
    grad_enabled = torch.is_grad_enabled()
    of_student = grad_enabled and student.requires_grad
    of_teacher = grad_enabled and isinstance(teacher, Tensor) and teacher.requires_grad
    if of_teacher and not has_teacher_derivative(divergence):
        raise ValueError(
            f"teacher requires grad, and the divergence {divergence.name!r} has no degree of homogeneity, which the "
            "teacher's gradient needs; set Divergence(degree=...) or detach the teacher"
        )
    deferred = (of_student and student.dtype == torch.float16) or (
        of_teacher and isinstance(teacher, Tensor) and teacher.dtype == torch.float16
    )
    return Want(of_student, of_teacher, return_parts, inplace, deferred)


def _with_parts(
    results: tuple[Tensor | None, ...],
    call: LossCall,
    names: Sequence[str] | None,
    device: torch.device,
) -> tuple[Tensor, Parts] | tuple[Tensor, MeasuredParts]:
    """What a call with return_parts returns, given the loss and the parts of a Result."""
    loss, distillation, cross_entropy, entropy, measures = results
    assert loss is not None
    assert distillation is not None and cross_entropy is not None and entropy is not None
    counted = call.counted
    if not isinstance(counted, Tensor):
        counted = torch.tensor(counted, device=device)
    invalid = _invalid_labels(call)
    if invalid is not None:  # backends differ in what they leave there
        distillation, cross_entropy, entropy = (
            term.masked_fill(invalid, torch.nan) for term in (distillation, cross_entropy, entropy)
        )
    parts = Parts(distillation, cross_entropy, entropy, counted)
    if names is None:
        return loss, parts
    named = {}
    if measures is not None:
        named = {name: measures[..., MEASURES.index(name)].contiguous() for name in names}
    return loss, MeasuredParts(*parts, **named)


def _invalid_labels(call: LossCall) -> Tensor | None:
    """Whether the label of a row is invalid, [...]; None if no label is read."""
    options, rows = call.options, call.rows
    labels = rows.labels
    # In a graph the options hold a stand-in for alpha, below 1, so reads_labels is True.
    if labels is None or not options.reads_labels:
        return None
    invalid = (labels < 0) | (labels >= options.vocabulary)
    kept = kept_rows(rows, options.ignore_index)
    if kept is not None:
        invalid = invalid & kept
    if call.numbers is not None and options.divergence.target is None:
        invalid = invalid & (as_tensor(call.numbers.scalars["alpha"]) < 1.0)
    return invalid


def _check_inplace(
    student: Tensor, teachers: Sequence[Tensor], want: Want, has_all_columns: bool
) -> None:
    if has_all_columns:
        raise ValueError(
            "inplace=True needs student_logits that hold this process's columns only, got a DTensor with all columns; "
            "shard it along the vocabulary, or pass inplace=False"
        )
    if torch.compiler.is_compiling():
        raise ValueError(
            "inplace=True is for eager mode, not for torch.compile(fullgraph=True); pass inplace=False there, because "
            "a compiled graph plans its own memory"
        )
    if want.student_gradient and student.is_leaf:
        raise ValueError("inplace=True would overwrite student_logits, a leaf that requires grad")
    if want.teacher_gradient:
        raise ValueError(
            "inplace=True overwrites student_logits, which the teacher's gradient needs; detach the teacher or pass "
            "inplace=False"
        )
    if not writable(student):
        raise ValueError(
            "inplace=True cannot write to student_logits that are a negated view, such as the imaginary part of a "
            "conjugated tensor; pass student_logits.resolve_neg()"
        )
    if student.stride(-1) != 1 and student.shape[-1] > 1:
        raise ValueError(
            f"inplace=True needs student_logits with a last stride of 1, got strides {student.stride()}"
        )
    if any(
        stride == 0 and size > 1
        for stride, size in zip(student.stride(), student.shape, strict=True)
    ):
        raise ValueError(
            f"inplace=True needs student_logits without expanded dimensions, got strides {student.stride()}; pass "
            "student_logits.contiguous()"
        )
    if any(share_storage(student, teacher) for teacher in teachers):
        raise ValueError(
            "inplace=True would overwrite the teacher: it shares its storage with student_logits"
        )
