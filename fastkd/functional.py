"""The losses: kd_loss on logits, fused_linear_kd_loss on hidden states and an lm_head.

Both validate (fastkd.call.checks), and hand over to fastkd.engine.autograd, or to fastkd.engine.linear where logits
are made from hidden states or from several teachers, a chunk of rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

from fastkd.call.checks import (
    LossOptions,
    Prepared,
    check_flags,
    check_logits,
    check_student_head,
    check_teacher,
    check_vocabulary,
    is_dtensor,
    prepare,
    teacher_widths,
    with_tail,
    with_topk,
)
from fastkd.call.contract import Want, row_dtype
from fastkd.core.tensors import share_storage, writable
from fastkd.divergences import Divergence
from fastkd.engine import autograd, linear
from fastkd.engine.chunks import Student
from fastkd.engine.plan import wide
from fastkd.teachers import Teacher, TopK, flatten

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack


Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def _not_compiled_over_processes(
    function: Callable[Parameters, Returned],
) -> Callable[Parameters, Returned]:
    """A loss that breaks a compiled graph where it is over processes: they talk between its steps."""

    @functools.wraps(function)
    def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Returned:
        if torch.compiler.is_compiling() and (
            options.get("process_group") is not None
            or any(map(is_dtensor, (*arguments, *options.values())))
        ):
            return torch.compiler.disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return call


class Parts(NamedTuple):
    """Detached by-products of a loss, all from the same sweep. Rows that are dropped hold 0.

    loss of a row = weight (alpha * distillation + (1 - alpha) * cross_entropy)
    """

    distillation: Tensor  # [...], with T^2 where scale_by_temperature
    cross_entropy: Tensor  # [...], 0 where alpha is 1 or there are no labels
    student_entropy: Tensor  # [...], in nats, of softmax(student / temperature)
    counted: Tensor  # 0-dim, the number of counted rows


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
    return_parts: bool,
    **options: Unpack[DenseOptions],
) -> Tensor | tuple[Tensor, Parts]: ...
@_not_compiled_over_processes
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
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Parts]:
    r"""Distillation loss of student logits against a teacher, with its gradient, in one pass over the logits.

    The loss of a row (a position) is, with D the divergence and T the temperature,

        alpha T^2 D(softmax(t / T), softmax(s / T)) + (1 - alpha) CE(softmax(s), label)

    (Hinton, Vinyals and Dean 2015; cross-entropy at temperature 1). No probability tensor is ever held.

    Args:
        student_logits: [..., V], float32, bfloat16, float16 (float64 in plain PyTorch). Any strides; the last
            dimension is copied only where its stride is not 1.
        teacher: dense teacher logits of the same leading shape, of any of those dtypes; if they require grad they
            get their gradient. Or a :class:`fastkd.TopK`, a :class:`fastkd.LinearTeacher` or a
            :class:`fastkd.Ensemble`, whose rows have that leading shape; the last two are turned into logits a
            chunk of rows at a time (:func:`fastkd.memory_plan` says how many).
        labels: [...] int64. Targets of the cross-entropy where alpha < 1. A row whose label is ignore_index is
            dropped, whatever alpha is.
        divergence: a name of ``fastkd.DIVERGENCES`` or a divergence such as ``fastkd.jsd(0.3)``.
        temperature: T > 0, or a float tensor [...] with one per row.
        teacher_temperature: the teacher's own temperature, likewise; None: as the student's. T^2 is always the
            student's.
        alpha: weight of the distillation term, in [0, 1]. Below 1 labels are needed.
        scale_by_temperature: multiply value and gradient of the distillation term by T^2.
        label_smoothing: in [0, 1), of the cross-entropy, as torch.nn.functional.cross_entropy has it.
        ignore_index: the label that drops a row.
        mask: [...] bool; a row where it is False is dropped. A dropped row is not read.
        weight: [...] float, multiplies the loss of a row; it does not change how many rows are counted.
        reduction: "none" ([...], 0 in dropped rows), "sum", "mean" (sum / number of counted rows), "batchmean"
            (sum / student_logits.shape[0], as torch.nn.functional.kl_div has it).
        num_items: replaces the denominator of "mean" and "batchmean": a positive number or a 0-dim tensor, such
            as the number of counted rows of the whole batch under gradient accumulation.
        logit_scale: multiplies the student's logits first.
        softcap: c > 0; the student's scaled logits become c tanh(logits / c).
        teacher_logit_scale: as logit_scale, for the teacher.
        teacher_softcap: as softcap, for the teacher.
        vocab_size: the columns that count, where a model pads its vocabulary; later columns have probability 0
            and gradient 0 on both sides. Needed where the widths differ. Of all processes, where they share it.
        process_group: the torch.distributed processes that share the vocabulary (or their mesh of one dimension):
            student_logits are then [..., V_r], the columns of this process in the order of ranks, shards even or
            not; a teacher has the same columns, or all of them, and everything else is the same on every process.
            Each gets the same loss and the gradient of its own columns. DTensors sharded along the vocabulary say
            it themselves. docs/parallel.md says what is exchanged, and how to use it with FSDP, DDP and pipelines.
        inplace: let the gradient overwrite student_logits, which saves one [..., V] tensor. Their version is
            bumped, so that autograd raises where something else still needs them. A compiled graph plans its
            own memory: there it breaks the graph, or raises under fullgraph=True.
        return_parts: return (loss, :class:`Parts`).
        backend: "auto", or one of ``fastkd.available_backends()``.

    Returns:
        The loss: 0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits). With no counted row
        it is 0 and part of the graph. An invalid label, and a temperature of a tensor that is not positive, make
        their row NaN, because naming them would wait for the device; FASTKD_CHECK=1 waits, and raises.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the backend asked for cannot serve this call.
        fastkd.parallel.CollectiveError: another process has stopped, or has not made this call in time.
        RuntimeError: another process that shares the vocabulary has raised.
    """
    from fastkd.parallel import (  # at its first use: an import of fastkd has to be quick
        layout,
        share,
    )

    group = layout.group_of(process_group, student_logits, teacher)
    check_flags(inplace=inplace, return_parts=return_parts)
    with share.agreed_by(group) as agreement:
        whole = layout.is_whole(student_logits, group)
        student_logits = layout.local("student_logits", student_logits, -1, group)
        student_logits = check_logits("student_logits", student_logits, group is not None)
        lead, device = student_logits.shape[:-1], student_logits.device
        teacher = layout.local_teacher(teacher, group)
        teacher = check_teacher(teacher, "student_logits", lead, device, group is not None)
        widths = {"student_logits": student_logits.shape[-1], **teacher_widths(teacher)}
        teacher = linear.autocast_teacher(teacher)
        call = prepare(
            lead,
            device,
            _row_dtype(student_logits, teacher),
            check_vocabulary(vocab_size, widths) if group is None else None,
            layout.local("labels", labels, None, group),
            teacher,
            divergence=divergence,
            temperature=layout.local("temperature", temperature, None, group),
            teacher_temperature=layout.local(
                "teacher_temperature", teacher_temperature, None, group
            ),
            alpha=alpha,
            scale_by_temperature=scale_by_temperature,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            mask=layout.local("mask", mask, None, group),
            weight=layout.local("weight", weight, None, group),
            reduction=reduction,
            num_items=num_items,
            logit_scale=logit_scale,
            softcap=softcap,
            teacher_logit_scale=teacher_logit_scale,
            teacher_softcap=teacher_softcap,
            backend=backend,
        )
        grad_enabled = torch.is_grad_enabled()
        want = Want(
            grad_enabled and student_logits.requires_grad,
            grad_enabled and isinstance(teacher, Tensor) and teacher.requires_grad,
            return_parts,
            inplace,
        )
        if want.teacher_gradient and call.options.divergence.degree is None:
            raise ValueError(
                f"teacher requires grad, and the divergence {call.options.divergence.name!r} does not say its degree "
                "of homogeneity, from which the teacher's gradient follows; set Divergence(degree=...) or detach the "
                "teacher"
            )
        if want.inplace:
            _check_inplace(student_logits, flatten(teacher)[0], want, whole)
        if isinstance(teacher, TopK):
            call = with_topk(call, teacher)
    if agreement is not None:
        student_logits, teacher, call = share.share_logits(
            agreement, student_logits, whole, teacher, call, want, vocab_size, widths
        )
    if isinstance(teacher, TopK):
        call, teacher = with_tail(call, teacher, _row_dtype(student_logits, teacher))
    if isinstance(teacher, Tensor):
        results = autograd.kd_rows(
            student_logits, teacher, call.rows, call.options, want, call.backend, call.summed,
            call.numbers,
        )  # fmt: skip
    else:
        results = linear.kd_chunks(Student(student_logits), teacher, call, want)
    return _returned(results, call, return_parts, device)


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
    return_parts: bool,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, Parts]: ...
@_not_compiled_over_processes
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
    return_parts: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, Parts]:
    r"""kd_loss of the logits student_hidden @ student_weight.T + student_bias, which are never held as a whole.

    Rows that do not count are packed away; the others go through in chunks: logits of student and teacher, the
    gradient in the student's place, and from it those of hidden states and weight, which is summed in float32. Four
    matrix products a chunk (two where the weight is frozen), and nothing is computed twice. The one exception is
    reduction="none" with a weight that requires grad: the gradient of the weight needs the upstream gradient of each
    row inside the sum, so the backward makes the logits again.

    Args:
        student_hidden: [..., H], float32, bfloat16, float16 (float64 in plain PyTorch). Any strides.
        student_weight: [V, H], the lm_head, of the same dtype and device; under autocast both are cast to its dtype.
            A DTensor that FSDP has spread is gathered once a call, and its gradient is averaged over the processes.
        teacher: a :class:`fastkd.LinearTeacher` (of any width), dense logits [..., V], a :class:`fastkd.TopK` or a
            :class:`fastkd.Ensemble`. A constant: one that requires grad raises.
        labels: as in :func:`fastkd.kd_loss`, and so are all options that are not listed here.
        student_bias: [V], or None.
        chunk_size: rows a chunk, whatever memory_budget is. None: as many as memory_budget allows.
        memory_budget: bytes that the call may hold beyond its inputs and gradients; None: 384 MiB on a CPU, 2 GiB
            elsewhere. :func:`fastkd.memory_plan` says what is in them. A budget too small for one row raises.
        logits_dtype: of the student's logits, and of a teacher's whose operands have it. None computes them in float32
            from operands of lower precision (rounding them to bfloat16 costs 4 to 23 % of the gradient). The operands'
            own dtype trades that for speed and half the memory.
        vocab_size: as in kd_loss; rows of a weight beyond it are padding, and not computed.
        process_group: as in kd_loss: student_weight is then [V_r, H], the part of a column-parallel lm_head that this
            process has. The gradient of student_hidden is summed over the processes.
        sequence_dim: where hidden states are sequence-parallel, the dimension of student_hidden along which every
            process of process_group has an equal part of the rows; they are gathered, and their gradient is
            scattered. Labels and what else has one value a row are of all rows. So are a teacher's hidden states,
            unless they have the shape of the student's part.

    Returns:
        What kd_loss returns: a loss in float32 (float64 for float64), and with return_parts its parts.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the backend asked for cannot serve this call.
    """
    from fastkd.parallel import layout, share

    group = layout.group_of_head(process_group, student_hidden, student_weight)
    check_flags(return_parts=return_parts)
    # Collectives of DTensors, whose shapes are the same on every process, come before the validation.
    given, student_hidden = (
        student_hidden,
        layout.local_hidden("student_hidden", student_hidden, group),
    )
    student_weight = layout.local_weight("student_weight", student_weight, group)
    student_bias = layout.local_weight("student_bias", student_bias, group)
    teacher = layout.local_teacher(teacher, group)
    with share.agreed_by(group) as agreement:
        sequence = layout.sequence_of(given, group, sequence_dim)
        parts, teacher_parts = student_hidden, teacher
        if sequence is not None:
            student_hidden = sequence.stand_in(parts)
            teacher = sequence.of_teacher(teacher, sequence.stand_in)
        check_student_head(student_hidden, student_weight, student_bias)
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
        if logits_dtype is not None and not (
            isinstance(logits_dtype, torch.dtype) and logits_dtype.is_floating_point
        ):
            raise TypeError(
                f"logits_dtype must be a floating-point torch.dtype, got {logits_dtype!r}"
            )
        teacher = linear.autocast_teacher(teacher)
        hidden, head, bias = linear.autocast(student_hidden, student_weight, student_bias)
        assert hidden is not None
        if logits_dtype not in (None, wide(hidden.dtype), hidden.dtype):
            raise ValueError(
                f"logits_dtype must be {wide(hidden.dtype)} or the dtype of student_hidden, {hidden.dtype}; "
                f"got {logits_dtype}"
            )
        of_rows: dict[str, Any] = {
            name: layout.local(name, options[name], None, group)
            for name in ("temperature", "teacher_temperature", "mask", "weight")
            if name in options
        }
        labels = layout.local("labels", labels, None, group)
        call = prepare(
            lead,
            device,
            _row_dtype(hidden, teacher),
            vocabulary,
            labels,
            teacher,
            **{**options, **of_rows},
        )
        trained = [x is not None and x.requires_grad for x in (hidden, head, bias)]
        grad_enabled = torch.is_grad_enabled()
        want = Want(
            grad_enabled and any(trained),
            False,
            return_parts,
        )
        if isinstance(teacher, TopK):
            call = with_topk(call, teacher)
    if agreement is not None:
        call, width = share.share(
            agreement, call, want, lead, (hidden, head, bias), teacher, vocab_size, widths,
            chunk_size=chunk_size, memory_budget=memory_budget, logits_dtype=logits_dtype,
            trained=trained, sequence_dim=sequence_dim,
        )  # fmt: skip
        if sequence is not None:
            (hidden,) = linear.autocast(sequence.gathered(parts))
            teacher = linear.autocast_teacher(sequence.of_teacher(teacher_parts, sequence.gathered))
        else:
            hidden = layout.summed_gradient(hidden, given, group)
        assert call.options.shard is not None
        teacher = layout.cut_teacher(teacher, call.options.shard, call.options.vocab_size, width)
    assert hidden is not None
    if isinstance(teacher, TopK):
        call, teacher = with_tail(call, teacher, _row_dtype(hidden, teacher))
    student = Student(hidden, head, bias)
    results = linear.kd_chunks(
        student, teacher, call, want, logits_dtype, chunk_size, memory_budget
    )
    return _returned(results, call, return_parts, device)


def _row_dtype(student: Tensor, teacher: Teacher) -> torch.dtype:
    return row_dtype(student.dtype, *(tensor.dtype for tensor in flatten(teacher)[0]))


def _returned(
    results: tuple[Tensor | None, ...], call: Prepared, return_parts: bool, device: torch.device
) -> Tensor | tuple[Tensor, Parts]:
    loss, distillation, cross_entropy, entropy = results
    assert loss is not None
    if not return_parts:
        return loss
    assert distillation is not None and cross_entropy is not None and entropy is not None
    counted = call.counted
    if not isinstance(counted, Tensor):
        counted = torch.tensor(counted, device=device)
    return loss, Parts(distillation, cross_entropy, entropy, counted)


def _check_inplace(student: Tensor, teachers: Sequence[Tensor], want: Want, whole: bool) -> None:
    if whole:
        raise ValueError(
            "inplace=True needs student_logits whose columns are those of this process"
        )
    if torch.compiler.is_compiling():
        raise ValueError("inplace=True is for eager mode; a compiled graph plans its own memory")
    if want.student_gradient and student.is_leaf:
        raise ValueError("inplace=True would overwrite student_logits, a leaf that requires grad")
    if want.teacher_gradient:
        raise ValueError(
            "inplace=True overwrites student_logits, and the teacher's gradient needs them; detach one"
        )
    if not writable(student):
        raise ValueError(
            "inplace=True would write through student_logits that torch marks as negated, as the imaginary part of a "
            "conjugated tensor is; pass student_logits.resolve_neg()"
        )
    if student.stride(-1) != 1 and student.shape[-1] > 1:
        raise ValueError(
            f"inplace=True needs student_logits with a last stride of 1, got strides {student.stride()}"
        )
    if any(
        stride == 0 and size > 1
        for stride, size in zip(student.stride(), student.shape, strict=True)
    ):
        raise ValueError("inplace=True would write expanded student_logits more than once")
    if any(share_storage(student, teacher) for teacher in teachers):
        raise ValueError(
            "inplace=True would overwrite the teacher: it shares its storage with student_logits"
        )
