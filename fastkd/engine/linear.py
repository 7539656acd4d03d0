"""Losses in chunks of rows: for a student of hidden states and lm_head, or a teacher whose logits are computed.

fastkd.functional calls :func:`kd_chunks`, which plans the chunks and runs fastkd/engine/chunks.py: in eager mode under
the rule of fastkd/engine/gradients.py, under torch.compile as the op kd_chunks_op. Gradients are deferred to the
backward pass in two cases: for a loss per row if the head requires grad, since the head's gradient sums over rows that
each have their own upstream gradient; and for dense float16 logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends import registry
from fastkd.call.checks import LossCall, settled
from fastkd.call.contract import Options, Rows, Want, row_dtype
from fastkd.call.measures import measure_count
from fastkd.call.options import Numbers
from fastkd.divergences import Divergence
from fastkd.engine.backend import kernels_for
from fastkd.engine.chunks import Chunked, Student, chunks_of_rows, saved_dtype
from fastkd.engine.gradients import Differentiable, Loss
from fastkd.engine.ops import GraphOptions, by_name, detached, filled, made, register_gradient
from fastkd.engine.plan import TOPK_BYTES, MemoryPlan, Shape, checked_sizes, plan, wide
from fastkd.teachers import (
    Ensemble,
    LinearTeacher,
    RoutedTeacher,
    Teacher,
    flatten,
    unflatten,
    weights_of,
)


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, cast as autocast casts the operands of a matrix product; it does not cast float64."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in tensors
    ]


def autocast_teacher(teacher: Teacher) -> Teacher:
    """The teacher with its operands cast now, because a deferred backward pass may run after autocast has ended."""
    if isinstance(teacher, LinearTeacher):
        hidden, weight, bias = autocast(teacher.hidden, teacher.weight, teacher.bias)
        assert hidden is not None and weight is not None
        return LinearTeacher(hidden, weight, bias)
    if isinstance(teacher, (Ensemble, RoutedTeacher)):
        members: list[Any] = [
            autocast_teacher(member) if isinstance(member, LinearTeacher) else member
            for member in teacher.teachers
        ]
        if isinstance(teacher, RoutedTeacher):
            return RoutedTeacher(members, teacher.index)
        return Ensemble(members, teacher.weights, teacher.mean)
    return teacher


class ChunkedLoss(NamedTuple):
    """What a loss in chunks needs besides the tensors that a graph saves for the backward pass."""

    wanted: tuple[bool, ...]  # for each field of Student, whether its gradient is wanted
    backend: str
    teacher: str  # the form of the teacher, as fastkd.teachers.flatten returns it
    weights: Sequence[float]  # the weights of an ensemble
    chunk_size: int | None
    memory_budget: int | None
    logits_dtype: torch.dtype  # the dtype of the student's logits

    def row_dtype(self, teacher: Sequence[Tensor]) -> torch.dtype:
        """The dtype of losses and of the teacher's logits."""
        return row_dtype(self.logits_dtype, *(tensor.dtype for tensor in teacher))

    def chosen(self, student: Student, teacher: Sequence[Tensor], divergence: Divergence) -> str:
        """The name of the backend that computes the loss."""
        device, dtype = student.hidden.device.type, self.row_dtype(teacher)
        return registry.select(self.backend, device, self.logits_dtype, dtype, divergence)

    def compute(
        self,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *others: Any,
    ) -> Chunked:
        """Plan the chunks and loop over them. others: the tensors of the teacher, then rows, options and want."""
        *teacher_tensors, rows, options, want = others
        student = Student(hidden, weight, bias)
        teacher = unflatten(teacher_tensors, self.teacher, self.weights)
        backend = self.chosen(student, teacher_tensors, options.divergence)
        return chunks_of_rows(
            student,
            teacher,
            rows,
            options,
            want,
            (False,) * 3 if want.deferred else self.wanted,
            kernels_for(backend, options, want),
            self._plan(student, teacher, rows, options, backend).chunk_size,
            self.logits_dtype,
            self.row_dtype(teacher_tensors),
        )

    def _plan(
        self,
        student: Student,
        teacher: Tensor | LinearTeacher | Ensemble | RoutedTeacher,
        rows: Rows,
        options: Options,
        backend: str,
    ) -> MemoryPlan:
        hidden, weight, _ = student
        shard = options.shard
        # Processes that share the vocabulary communicate in each chunk, so all of them need the same chunks: each plans
        # for the widest shard.
        vocabulary = options.vocab_size if shard is None else shard.widest
        columns, row_bytes, teacher_hidden = 0, 0, 0
        if isinstance(teacher, Ensemble):
            linear = [member for member in teacher.teachers if isinstance(member, LinearTeacher)]
            columns = vocabulary * (2 if linear else 1)
            teacher_hidden = max((member.hidden.shape[-1] for member in linear), default=0)
        elif isinstance(teacher, RoutedTeacher):
            # A chunk has rows of one teacher. This is the memory for the largest row of any.
            linear = [member for member in teacher.teachers if isinstance(member, LinearTeacher)]
            columns = vocabulary if linear else 0
            teacher_hidden = max((member.hidden.shape[-1] for member in linear), default=0)
            dense = [member for member in teacher.teachers if isinstance(member, Tensor)]
            row_bytes = max((vocabulary * member.itemsize for member in dense), default=0)
        elif isinstance(teacher, LinearTeacher):
            columns, teacher_hidden = vocabulary, teacher.hidden.shape[-1]
        elif rows.ids is not None:
            row_bytes = TOPK_BYTES * rows.ids.shape[-1]
        else:
            row_bytes = vocabulary * teacher.dtype.itemsize
        if weight is None:  # a chunk copies the rows that it packs, and a gradient that it pads
            row_bytes += 2 * hidden.shape[-1] * hidden.dtype.itemsize
        shape = Shape(
            hidden.shape[:-1].numel(),
            vocabulary,
            hidden.dtype,
            self.logits_dtype,
            0 if weight is None else hidden.shape[-1],
            columns,
            row_bytes,
            teacher_hidden,
            sum(tensor.numel() * tensor.itemsize for tensor in flatten(teacher)[0]),
            self.wanted[1],
            hidden.device.type,
            backend,
        )
        return plan(shape, self.chunk_size, self.memory_budget)


# The custom op. It plans and packs the chunks when it runs, because they depend on sizes and values that are not
# known while the graph is compiled.


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of Chunked; an output that is not wanted is an empty tensor."""
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
    inputs = by_name(kd_chunks_op, arguments)
    student = Student(inputs["student_hidden"], inputs["student_weight"], inputs["student_bias"])
    like, wants = student.hidden, Want(*inputs["want"])
    dtype = row_dtype(inputs["logits_dtype"], *(tensor.dtype for tensor in inputs["teacher"]))
    gradients = (
        made(like, tensor.shape, saved_dtype(tensor, student.weight is None))
        if wanted and tensor is not None and not wants.deferred
        else like.new_empty(0)
        for tensor, wanted in zip(student, inputs["wanted"], strict=True)
    )
    lead = like.shape[:-1]
    return (
        made(like, lead, dtype),
        made(like, (), dtype),
        *(made(like, lead, dtype, wants.parts) for _ in range(3)),
        *gradients,
        made(like, (*lead, measure_count(inputs["tail"])), dtype, wants.measures),
    )


register_gradient(
    kd_chunks_op,
    Chunked._fields,
    {
        "student_hidden": "hidden_gradient",
        "student_weight": "weight_gradient",
        "student_bias": "bias_gradient",
    },
    lambda inputs: inputs["wanted"],
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
    """(loss, *Result.parts); the loss, [...] or its 0-dim sum, is differentiable.

    logits_dtype, chunk_size and memory_budget are those of fused_linear_kd_loss.
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
        return (loss, *detached(result.parts, want))
    chunked = ChunkedLoss(
        wanted, call.backend, form, weights, chunk_size, memory_budget, logits_dtype
    )
    # The graph broke inside the validation or after it; see fastkd.engine.autograd.kd_rows.
    broken = compiling or numbers is not None
    run = torch.compiler.disable(_differentiable) if broken else _differentiable
    return run(student, tensors, rows, options, chunked, want, call.summed, numbers)


def _differentiable(
    student: Student,
    teacher: Sequence[Tensor],
    rows: Rows,
    options: Options,
    chunked: ChunkedLoss,
    want: Want,
    summed: bool,
    numbers: Numbers | None,
) -> tuple[Tensor | None, ...]:
    if numbers is not None:
        options = settled(options.divergence, options.vocab_size, options.tail, numbers, rows)
    kernels = registry.load(chunked.chosen(student, teacher, options.divergence))
    loss = Loss(chunked.compute, options, want, summed, kernels.scale_rows_)
    return Differentiable.apply(loss, rows, len(student), *student, *teacher)
