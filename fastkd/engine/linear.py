"""Losses in chunks of rows: from hidden states and an lm_head, or against a teacher whose logits are computed.

:func:`kd_chunks` is what fastkd.functional calls. It plans the chunks, and runs fastkd/engine/chunks.py: in eager mode
under the rule of fastkd/engine/gradients.py, under torch.compile as the op kd_chunks_op. Two gradients are deferred to
the backward: of a loss per row whose weight requires grad (the weight's gradient is a sum over rows, each times its
upstream gradient), and of float16 logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends import registry
from fastkd.call.checks import LossCall, settled
from fastkd.call.contract import Options, Rows, Want, row_dtype
from fastkd.call.options import Numbers
from fastkd.divergences import Divergence
from fastkd.engine.backend import kernels_for
from fastkd.engine.chunks import Chunked, Student, chunks_of_rows, saved_dtype
from fastkd.engine.gradients import Differentiable, Loss
from fastkd.engine.ops import GraphOptions, by_name, filled, made, register_gradient
from fastkd.engine.plan import TOPK_BYTES, MemoryPlan, Shape, checked_sizes, plan, wide
from fastkd.teachers import Ensemble, LinearTeacher, Teacher, flatten, unflatten, weights_of


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as autocast casts the operands of a matrix product; float64 it leaves alone."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in tensors
    ]


def autocast_teacher(teacher: Teacher) -> Teacher:
    """Likewise: a backward may run where autocast is no longer on."""
    if isinstance(teacher, LinearTeacher):
        hidden, weight, bias = autocast(teacher.hidden, teacher.weight, teacher.bias)
        assert hidden is not None and weight is not None
        return LinearTeacher(hidden, weight, bias)
    if isinstance(teacher, Ensemble):
        members: list[Any] = [
            autocast_teacher(member) if isinstance(member, LinearTeacher) else member
            for member in teacher.teachers
        ]
        return Ensemble(members, teacher.weights, teacher.mean)
    return teacher


class ChunkedLoss(NamedTuple):
    """A loss in chunks, without the tensors that a graph saves for the backward."""

    wanted: tuple[bool, ...]  # the gradients of Student's fields
    backend: str
    teacher: str  # how its tensors go together (fastkd.teachers.flatten)
    weights: Sequence[float]  # of an ensemble
    chunk_size: int | None
    memory_budget: int | None
    logits_dtype: torch.dtype  # of the student

    def row_dtype(self, teacher: Sequence[Tensor]) -> torch.dtype:
        """The dtype of losses, and of a teacher's logits."""
        return row_dtype(self.logits_dtype, *(tensor.dtype for tensor in teacher))

    def chosen(self, student: Student, teacher: Sequence[Tensor], divergence: Divergence) -> str:
        """The backend that serves the loss."""
        device, dtype = student.hidden.device.type, self.row_dtype(teacher)
        return registry.select(self.backend, device, self.logits_dtype, dtype, divergence)

    def compute(
        self,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *rest: Any,
    ) -> Chunked:
        """Plan the chunks and loop over them. The rest: a teacher's tensors, rows, options, want."""
        *tensors, rows, options, want = rest
        student = Student(hidden, weight, bias)
        teacher = unflatten(tensors, self.teacher, self.weights)
        backend = self.chosen(student, tensors, options.divergence)
        return chunks_of_rows(
            student,
            teacher,
            rows,
            options,
            want,
            (False,) * 3 if want.deferred else self.wanted,
            kernels_for(backend, options),
            self._plan(student, teacher, rows, options, backend).chunk_size,
            self.logits_dtype,
            self.row_dtype(tensors),
        )

    def _plan(
        self,
        given: Student,
        teacher: Tensor | LinearTeacher | Ensemble,
        rows: Rows,
        options: Options,
        backend: str,
    ) -> MemoryPlan:
        student, weight, _ = given
        shard = options.shard
        # Chunks have collectives in them: all processes plan as the one with the most columns does.
        vocabulary = options.vocab_size if shard is None else shard.widest
        columns, row_bytes, hidden = 0, 0, 0
        if isinstance(teacher, Ensemble):
            linear = [member for member in teacher.teachers if isinstance(member, LinearTeacher)]
            columns = vocabulary * (2 if linear else 1)
            hidden = max((member.hidden.shape[-1] for member in linear), default=0)
        elif isinstance(teacher, LinearTeacher):
            columns, hidden = vocabulary, teacher.hidden.shape[-1]
        elif rows.ids is not None:
            row_bytes = TOPK_BYTES * rows.ids.shape[-1]
        else:
            row_bytes = vocabulary * teacher.dtype.itemsize
        if weight is None:  # rows that are packed are copied, and padding is put beside a gradient
            row_bytes += 2 * student.shape[-1] * student.dtype.itemsize
        shape = Shape(
            student.shape[:-1].numel(),
            vocabulary,
            student.dtype,
            self.logits_dtype,
            0 if weight is None else student.shape[-1],
            columns,
            row_bytes,
            hidden,
            sum(tensor.numel() * tensor.itemsize for tensor in flatten(teacher)[0]),
            self.wanted[1],
            student.device.type,
            backend,
        )
        return plan(shape, self.chunk_size, self.memory_budget)


# The custom op. The plan, and the number of rows that are packed, depend on sizes and values that a graph leaves open,
# so they are decided when the op runs.


@torch.library.custom_op("fastkd::kd_chunks", mutates_args=())
def kd_chunks_op(
    student_hidden: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: list[Tensor],
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: Tensor | None,
    teacher_temperature: Tensor | None,
    scale: Tensor | None,
    ids: Tensor | None,
    tail_logprob: Tensor | None,
    backend: str,
    form: str,
    chunk_size: int | None,
    memory_budget: int | None,
    members: int,
    wanted: list[bool],
    logits_dtype: torch.dtype,
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
    """The fields of Chunked; what is not wanted is an empty tensor."""
    rows = Rows(labels, weight, temperature, teacher_temperature, scale, ids, tail_logprob)
    graph_options = GraphOptions(
        want, vocab_size, ignore_index, tail, divergence, kinds, constants, integers, symbols
    )
    options, weights = graph_options.settled(rows, members)
    loss = ChunkedLoss(
        tuple(wanted), backend, form, weights, chunk_size, memory_budget, logits_dtype
    )
    student = (student_hidden, student_weight, student_bias)
    result = loss.compute(*student, *teacher, rows, options, Want(*want))
    return filled(result, student_hidden)  # type: ignore[return-value]  # as many as Chunked has fields


@kd_chunks_op.register_fake
def _kd_chunks_fake(*arguments: Any) -> tuple[Tensor, ...]:
    given = by_name(kd_chunks_op, arguments)
    student = Student(given["student_hidden"], given["student_weight"], given["student_bias"])
    like, wants = student.hidden, Want(*given["want"])
    dtype = row_dtype(given["logits_dtype"], *(tensor.dtype for tensor in given["teacher"]))
    gradients = (
        made(like, tensor.shape, saved_dtype(tensor, student.weight is None))
        if wanted and tensor is not None and not wants.deferred
        else like.new_empty(0)
        for tensor, wanted in zip(student, given["wanted"], strict=True)
    )
    lead = like.shape[:-1]
    return (
        made(like, lead, dtype),
        made(like, (), dtype),
        *(made(like, lead, dtype, wants.parts) for _ in range(3)),
        *gradients,
    )


register_gradient(
    kd_chunks_op,
    Chunked._fields,
    {
        "student_hidden": "hidden_gradient",
        "student_weight": "weight_gradient",
        "student_bias": "bias_gradient",
    },
    lambda given: given["wanted"],
)


def kd_chunks(
    student: Student,
    teacher: Teacher,
    call: LossCall,
    want: Want,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor | None, ...]:
    """(loss, distillation, cross_entropy, student_entropy), differentiable; the loss is [...] or its 0-dim sum.

    The last three arguments are those of fused_linear_kd_loss.
    """
    options, rows, numbers = call.options, call.rows, call.numbers
    if (
        isinstance(teacher, Ensemble)
        and teacher.mean == "arithmetic"
        and not options.divergence.normalized
    ):
        raise ValueError(
            f"the divergence {options.divergence.name!r} compares logits, and the arithmetic mean of an Ensemble is "
            "a mean of probabilities; use mean='geometric'"
        )
    tensors, form = flatten(teacher)
    weights = weights_of(teacher)
    wanted = tuple(
        want.student_gradient and tensor is not None and tensor.requires_grad for tensor in student
    )
    dense_half = student.weight is None and student.hidden.dtype == torch.float16
    want = want._replace(
        deferred=any(wanted) and (dense_half or (not call.summed and any(wanted[1:])))
    )
    if logits_dtype is None:
        dtype = student.hidden.dtype
        logits_dtype = dtype if student.weight is None else wide(dtype)
    chunk_size, memory_budget = checked_sizes(chunk_size, memory_budget)
    compiling = torch.compiler.is_compiling()
    if compiling and numbers is not None and not want.inplace:
        graph_options = GraphOptions.of(options, want, numbers, weights)
        result = Chunked(
            *kd_chunks_op(
                *student, tensors, *rows, call.backend, form, chunk_size, memory_budget, len(weights),
                list(wanted), logits_dtype, *graph_options,
            )
        )  # fmt: skip
        loss = result.total if call.summed else result.loss
        return (loss, *(part.detach() if want.parts else None for part in result.parts))  # type: ignore[union-attr]
    chunked = ChunkedLoss(
        wanted, call.backend, form, weights, chunk_size, memory_budget, logits_dtype
    )
    arguments = (student, tensors, rows, options, chunked, want, call.summed)
    if numbers is None and not compiling:
        return _differentiable(*arguments)
    # As in fastkd.engine.autograd: the graph broke inside the validation.
    return torch.compiler.disable(_run_eagerly)(numbers, *arguments)


def _differentiable(
    student: Student,
    teacher: Sequence[Tensor],
    rows: Rows,
    options: Options,
    chunked: ChunkedLoss,
    want: Want,
    summed: bool,
) -> tuple[Tensor | None, ...]:
    kernels = registry.load(chunked.chosen(student, teacher, options.divergence))
    loss = Loss(chunked.compute, options, want, summed, kernels.scale_rows_)
    return Differentiable.apply(loss, rows, len(student), *student, *teacher)


def _run_eagerly(
    numbers: Numbers | None,
    student: Student,
    teacher: Sequence[Tensor],
    rows: Rows,
    options: Options,
    *others: Any,
) -> tuple[Tensor | None, ...]:
    if numbers is not None:
        options = settled(options.divergence, options.vocab_size, options.tail, numbers, rows)
    return _differentiable(student, teacher, rows, options, *others)
