"""Losses in chunks of rows: from hidden states and an lm_head, and against teachers that have to be made into logits.

Read top to bottom: what a chunk's student and teacher are, the loop over chunks (:func:`chunks_of_rows`), and its
differentiation, which follows fastkd/autograd.py: gradients in the forward, times the upstream gradient on the device.
Two cases are computed in the backward, with the upstream gradient inside: a loss per row whose weight requires grad
(the weight's gradient is a sum over rows), and float16 logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import autograd, backends
from fastkd.divergences import Divergence
from fastkd.plan import TOPK_BYTES, MemoryPlan, Shape, plan, wide
from fastkd.products import add_weight_gradient, as_operand, hidden_gradient, make_logits
from fastkd.rows import Options, Rows, Want, counted_rows
from fastkd.teachers import Ensemble, LinearTeacher, Teacher, TopK
from fastkd.validate import Prepared

# Elements of a part of a chunk in which several teachers are combined: on a CPU it stays in the cache.
COMBINED_CPU, COMBINED_DEVICE = 1 << 18, 1 << 24

At = slice | Tensor  # rows: a range, or their numbers


class Student(NamedTuple):
    """hidden [..., H], weight [V, H] and bias [V]; or logits [..., V] alone."""

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


class Planned(NamedTuple):
    """What is decided before the first chunk."""

    memory: MemoryPlan
    logits_dtype: torch.dtype  # of the student
    backend: str


class Gradients(NamedTuple):
    """Of the fields of Student; float32 for float16, which would underflow before a loss scaler multiplies it."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Chunked(NamedTuple):
    """fastkd.rows.Result of all chunks."""

    loss: Tensor
    total: Tensor
    distillation: Tensor | None
    cross_entropy: Tensor | None
    student_entropy: Tensor | None
    gradients: Gradients


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


def flatten(teacher: Teacher) -> tuple[list[Tensor], str]:
    """(its tensors, how to put them together again); :func:`unflatten` does."""
    if isinstance(teacher, Tensor):
        return [teacher], "dense"
    if isinstance(teacher, TopK):
        return [teacher.logprobs], "topk"  # the rest travels in Rows
    if isinstance(teacher, LinearTeacher):
        parts = [teacher.hidden, teacher.weight, teacher.bias]
        return [part for part in parts if part is not None], "linear"
    members = [flatten(member) for member in teacher.teachers]
    spec = [[kind, len(tensors)] for tensors, kind in members]
    return [tensor for tensors, _ in members for tensor in tensors], json.dumps(
        [teacher.mean, teacher.weights, spec]
    )


def unflatten(tensors: Sequence[Tensor], spec: str) -> Tensor | LinearTeacher | Ensemble:
    """The teacher; never a TopK, whose log-probabilities are dense to this module."""
    if spec == "dense":
        return tensors[0]
    if spec == "linear":
        return LinearTeacher(*tensors)
    mean, weights, members = json.loads(spec)
    teachers: list[Any] = []
    for kind, count in members:
        teachers.append(unflatten(tensors[:count], kind))
        tensors = tensors[count:]
    return Ensemble(teachers, weights, mean)


def _check_ensemble(teacher: Teacher, divergence: Divergence) -> None:
    """Raise where the combined target of an ensemble has no logits."""
    if isinstance(teacher, Ensemble) and teacher.mean == "arithmetic" and not divergence.normalized:
        raise ValueError(
            f"the divergence {divergence.name!r} is one of logits, and the arithmetic mean of an Ensemble is one of "
            "probabilities; use mean='geometric'"
        )


def _plan(
    given: Student,
    teacher: Teacher,
    call: Prepared,
    want: Want,
    logits_dtype: torch.dtype | None,
    chunk_size: int | None,
    memory_budget: int | None,
) -> Planned:
    """The plan of a call."""
    student, weight, _ = given
    vocabulary, device = call.options.vocab_size, student.device.type
    if logits_dtype not in (None, wide(student.dtype), student.dtype):
        raise ValueError(
            f"logits_dtype must be {wide(student.dtype)} or the dtype of student_hidden, {student.dtype}; "
            f"got {logits_dtype}"
        )
    logits = student.dtype if weight is None else logits_dtype or wide(student.dtype)
    columns, row_bytes, hidden = 0, 0, 0
    tensors, _ = flatten(teacher)
    if isinstance(teacher, Ensemble):
        linear = [member for member in teacher.teachers if isinstance(member, LinearTeacher)]
        columns = vocabulary * (2 if linear else 1)
        hidden = max((member.hidden.shape[-1] for member in linear), default=0)
    elif isinstance(teacher, LinearTeacher):
        columns, hidden = vocabulary, teacher.hidden.shape[-1]
    elif call.rows.ids is not None:
        row_bytes = TOPK_BYTES * call.rows.ids.shape[-1]
    else:
        row_bytes = vocabulary * tensors[0].dtype.itemsize
    if weight is None:  # rows that are packed are copied, and padding is put beside a gradient
        row_bytes += 2 * student.shape[-1] * student.dtype.itemsize
    exact = any(tensor.dtype == torch.float64 for tensor in tensors)
    teacher_dtype = torch.float64 if exact else torch.float32
    chosen = backends.select(call.backend, device, logits, teacher_dtype, call.options.divergence)
    shape = Shape(
        student.shape[:-1].numel(),
        vocabulary,
        student.dtype,
        logits,
        0 if weight is None else student.shape[-1],
        columns,
        row_bytes,
        hidden,
        sum(tensor.numel() * tensor.itemsize for tensor in tensors),
        want.student_gradient and weight is not None and weight.requires_grad,
        device,
        chosen == "reference",
    )
    return Planned(plan(shape, chunk_size, memory_budget), logits, chosen)


# ---- rows of a tensor [..., columns], by number


def _flat(tensor: Tensor, lead: torch.Size) -> Tensor | None:
    """The tensor as [rows, ...], where that needs no copy."""
    try:
        return tensor.view(lead.numel(), *tensor.shape[len(lead) :])
    except RuntimeError:
        return None


def _numbers(at: At, lead: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    if isinstance(at, slice):
        at = torch.arange(at.start, at.stop, device=device)
    return torch.unravel_index(at, lead)


def take(tensor: Tensor, lead: torch.Size, at: At) -> Tensor:
    """[C, ...]: these rows of a tensor [*lead, ...]; a view where that is possible."""
    flat = _flat(tensor, lead)
    return tensor[_numbers(at, lead, tensor.device)] if flat is None else flat[at]


def put(tensor: Tensor, lead: torch.Size, at: At, values: Tensor) -> None:
    """Write these rows."""
    flat = _flat(tensor, lead)
    if flat is None:
        tensor[_numbers(at, lead, tensor.device)] = values
    else:
        flat[at] = values


def _rows_at(rows: Rows, lead: torch.Size, at: At) -> Rows:
    def pick(value: Tensor | None) -> Tensor | None:
        return None if value is None else take(value, lead, at)

    return Rows(*map(pick, rows._replace(scale=None)))._replace(scale=rows.scale)


def _counted(rows: Rows, ignore_index: int) -> Tensor | None:
    """The numbers of the rows that count; None where all may.

    Their number has to be known before there are matrices, which waits for the device: not while a CUDA graph records.
    There, dropped rows stay, and the kernel skips them.
    """
    keep = counted_rows(rows, ignore_index)
    if keep is None or (keep.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    numbers = keep.flatten().nonzero().squeeze(1)
    return None if numbers.numel() == keep.numel() else numbers


# ---- the two sides of a chunk


class _StudentChunks:
    """Logits of a chunk, in one buffer for all of them; and what becomes of their gradient."""

    def __init__(
        self,
        student: Student,
        lead: torch.Size,
        vocabulary: int,
        wanted: Sequence[bool],
        inplace: bool,
    ) -> None:
        self.student, self.lead, self.vocabulary = student, lead, vocabulary
        self.first = True
        hidden, weight, bias = student
        if weight is None:
            gradient = None
            if wanted[0]:
                gradient = (
                    hidden
                    if inplace
                    else torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
                )
            self.gradients = Gradients(gradient, None, None)
            return

        def like(tensor: Tensor | None, wanted: bool, accumulates: bool) -> Tensor | None:
            if tensor is None or not wanted:
                return None
            low = tensor.dtype == torch.float16 or (accumulates and tensor.dtype == torch.bfloat16)
            return tensor.new_zeros(tensor.shape, dtype=torch.float32 if low else None)

        self.gradients = Gradients(
            like(hidden, wanted[0], False),
            like(weight, wanted[1], True),
            like(bias, wanted[2], True),
        )

    def logits(self, at: At, buffer: Tensor) -> Tensor:
        """[C, V], in the buffer: the kernel overwrites it with the gradient."""
        hidden, weight, bias = self.student
        rows = take(hidden, self.lead, at)
        if weight is None:
            return buffer.copy_(rows[:, : self.vocabulary])
        bias = None if bias is None else bias[: self.vocabulary]
        return make_logits(rows, weight[: self.vocabulary], bias, buffer)

    def add(self, at: At, gradient: Tensor, scratch: Tensor | None) -> None:
        """Add the gradient [C, V] of a chunk's logits."""
        hidden, weight, _ = self.student
        columns = slice(self.vocabulary)
        if weight is None:
            assert self.gradients.hidden is not None
            if self.vocabulary < hidden.shape[-1]:
                padding = (0, hidden.shape[-1] - self.vocabulary)
                gradient = torch.nn.functional.pad(gradient, padding)
            put(self.gradients.hidden, self.lead, at, gradient)
            return
        if self.gradients.bias is not None:
            self.gradients.bias[columns] += gradient.sum(0, dtype=self.gradients.bias.dtype)
        gradient = as_operand(gradient, weight, scratch)
        if self.gradients.weight is not None:
            rows = take(hidden, self.lead, at)
            add_weight_gradient(gradient, rows, self.gradients.weight[columns], self.first)
        if self.gradients.hidden is not None:
            out = torch.empty(
                gradient.shape[0],
                hidden.shape[-1],
                dtype=self.gradients.hidden.dtype,
                device=hidden.device,
            )
            hidden_gradient(gradient, weight[columns], out)
            put(self.gradients.hidden, self.lead, at, out)
        self.first = False

    def finished(self, counted: Tensor | None) -> Gradients:
        """All gradients, in the dtype they are saved in; counted as :func:`_counted` has it."""
        hidden, weight, bias = self.gradients
        # In place, dropped rows still hold logits.
        if hidden is self.student.hidden and counted is not None:
            dropped = torch.ones(self.lead.numel(), dtype=torch.bool, device=counted.device)
            hidden[dropped.index_fill(0, counted, False).view(self.lead)] = 0.0
        tensors = self.student

        def close(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
            if gradient is None or tensor is None or tensor.dtype == torch.float16:
                return gradient
            return gradient.to(tensor.dtype)

        return self.gradients._replace(
            weight=close(weight, tensors.weight), bias=close(bias, tensors.bias)
        )


def _linear_logits(teacher: LinearTeacher, lead: torch.Size, at: At, out: Tensor) -> Tensor:
    hidden, weight, bias = teacher.hidden, teacher.weight, teacher.bias
    bias = None if bias is None else bias[: out.shape[1]]
    return make_logits(take(hidden, lead, at), weight[: out.shape[1]], bias, out)


def _add_member(
    total: Tensor,
    logits: Tensor,
    weight: float,
    mean: str,
    temper: Callable[[Tensor, slice], Tensor],
) -> None:
    """One more teacher of an ensemble in the combined tempered logits [C, V], a few rows at a time."""
    elements = COMBINED_CPU if total.device.type == "cpu" else COMBINED_DEVICE
    step = max(elements // total.shape[1], 1)
    for start in range(0, total.shape[0], step):
        part = slice(start, min(start + step, total.shape[0]))
        z = temper(logits[part, : total.shape[1]].to(total.dtype), part)
        if mean == "geometric":
            total[part].add_(z, alpha=weight)
        else:
            offset = math.log(weight) - z.logsumexp(-1, keepdim=True)
            torch.logaddexp(total[part], z + offset, out=total[part])


class _TeacherChunks:
    """Logits of a chunk for the kernel, and the options that belong to them."""

    def __init__(
        self, teacher: Tensor | LinearTeacher | Ensemble, lead: torch.Size, options: Options
    ) -> None:
        self.teacher, self.lead, self.options = teacher, lead, options

    def buffers(self) -> int:
        """How many [C, V] tensors it makes."""
        if isinstance(self.teacher, Tensor):
            return 0
        if isinstance(self.teacher, LinearTeacher):
            return 1
        linear = any(isinstance(member, LinearTeacher) for member in self.teacher.teachers)
        return 2 if linear else 1

    def kernel_options(self) -> Options:
        """An ensemble is tempered before it is combined."""
        if not isinstance(self.teacher, Ensemble):
            return self.options
        return self.options._replace(
            teacher_temperature=1.0, teacher_logit_scale=1.0, teacher_softcap=0.0
        )

    def logits(self, at: At, rows: Rows, buffers: list[Tensor]) -> tuple[Tensor, Rows]:
        """(logits [C, V] or log-probabilities [C, K], the rows as the kernel takes them)."""
        if isinstance(self.teacher, Tensor):
            return take(self.teacher, self.lead, at), rows
        if isinstance(self.teacher, LinearTeacher):
            return _linear_logits(self.teacher, self.lead, at, buffers[0]), rows
        return self._combined(self.teacher, at, rows, buffers)

    def _combined(
        self, teacher: Ensemble, at: At, rows: Rows, buffers: list[Tensor]
    ) -> tuple[Tensor, Rows]:
        options, temperatures = self.options, rows.teacher_temperature

        def temper(z: Tensor, part: slice) -> Tensor:
            if options.teacher_softcap:
                gain = options.teacher_logit_scale / options.teacher_softcap
                z = options.teacher_softcap * torch.tanh(z * gain)
            elif options.teacher_logit_scale != 1:
                z = z * options.teacher_logit_scale
            if temperatures is not None:
                return z / temperatures[part].unsqueeze(-1)
            return z / options.teacher_temperature

        total = buffers[0].fill_(0.0 if teacher.mean == "geometric" else -math.inf)
        assert teacher.weights is not None  # its constructor makes them
        for member, weight in zip(teacher.teachers, teacher.weights, strict=True):
            if weight == 0:
                continue
            if isinstance(member, LinearTeacher):
                logits = _linear_logits(member, self.lead, at, buffers[1])
            else:
                logits = take(member, self.lead, at)
            _add_member(total, logits, weight, teacher.mean, temper)
        if temperatures is not None:  # an invalid one poisons its row
            weights = torch.ones_like(temperatures) if rows.weight is None else rows.weight
            weights = torch.where((temperatures > 0) | (weights == 0), weights, torch.nan)
            rows = rows._replace(weight=weights, teacher_temperature=None)
        return total, rows


# ---- the loop


def chunks_of_rows(
    student: Student,
    teacher: Tensor | LinearTeacher | Ensemble,
    rows: Rows,
    options: Options,
    want: Want,
    wanted: Sequence[bool],
    kernels: ModuleType,
    chunk_size: int,
    logits_dtype: torch.dtype,
) -> Chunked:
    """Losses and gradients of all rows; wanted says of which fields of the student."""
    lead, device = student.hidden.shape[:-1], student.hidden.device
    vocabulary = options.vocab_size
    numbers = _counted(rows, options.ignore_index)
    count = lead.numel() if numbers is None else numbers.numel()
    chunks = -(-count // chunk_size)
    step = -(-count // max(chunks, 1))  # the last chunk is as large as the others
    learner = _StudentChunks(student, lead, vocabulary, wanted, want.inplace)
    target = _TeacherChunks(teacher, lead, options)
    options = target.kernel_options()
    want = want._replace(student_gradient=any(wanted), inplace=True, deferred=False)
    factor = options.scale if rows.scale is None else options.scale * rows.scale
    # The products of float16 would lose what is below 6e-8.
    scaled_later = student.weight is not None and student.hidden.dtype == torch.float16
    if scaled_later:
        options, rows = options._replace(scale=1.0), rows._replace(scale=None)
    exact = torch.float64 in (logits_dtype, *(tensor.dtype for tensor in flatten(teacher)[0]))
    row_dtype = torch.float64 if exact else torch.float32
    per_row = [
        torch.zeros(lead, dtype=row_dtype, device=device) for _ in range(4 if want.parts else 1)
    ]
    s_buffer = kernels.empty((step, vocabulary), logits_dtype, device)
    rounds = student.weight is not None and isinstance(teacher, LinearTeacher)
    rounds = rounds and teacher.hidden.dtype == logits_dtype  # type: ignore[union-attr]  # a LinearTeacher
    t_dtype = logits_dtype if rounds else row_dtype
    t_buffers = [
        kernels.empty((step, vocabulary), t_dtype, device) for _ in range(target.buffers())
    ]
    for start in range(0, count, max(step, 1)):
        stop = min(start + step, count)
        size = stop - start
        at: At = slice(start, stop) if numbers is None else numbers[start:stop]
        chunk = _rows_at(rows, lead, at)
        s = learner.logits(at, s_buffer[:size])
        t, chunk = target.logits(at, chunk, [buffer[:size] for buffer in t_buffers])
        result = kernels.kd_rows(s, t, chunk, options, want)
        for mine, its in zip(per_row, (result.loss, *result[4:]), strict=False):
            put(mine, lead, at, its)
        if result.student_gradient is not None:
            learner.add(at, result.student_gradient, t_buffers[0] if t_buffers else None)
    loss, *parts = per_row
    total = (loss.sum(dtype=torch.float64) * factor).to(loss.dtype)
    gradients = learner.finished(numbers)
    if scaled_later:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(factor)
    distillation, cross_entropy, entropy = parts or (None, None, None)
    return Chunked(loss, total, distillation, cross_entropy, entropy, gradients)


# ---- differentiation


class _Call(NamedTuple):
    """What a forward leaves to its backward, beside tensors."""

    options: Options
    want: Want
    wanted: tuple[bool, ...]  # of Student's fields
    backend: str  # the one chosen
    teacher: str  # unflatten's
    chunk_size: int
    logits_dtype: torch.dtype

    def in_forward(self) -> _Call:
        """Without the gradients that the backward computes."""
        if not self.want.deferred:
            return self
        return self._replace(wanted=(False,) * 3)

    def run(self, student: Student, teacher: Sequence[Tensor], rows: Rows) -> Chunked:
        """The loop over chunks."""
        return chunks_of_rows(
            student,
            unflatten(teacher, self.teacher),
            rows,
            self.options,
            self.want,
            self.wanted,
            backends.load(self.backend),
            self.chunk_size,
            self.logits_dtype,
        )


class KDChunks(torch.autograd.Function):
    """Eager mode. Returns (loss, distillation, cross_entropy, student_entropy); loss is [...] or its 0-dim sum."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        teacher: list[Tensor],
        rows: Rows,
        call: _Call,
        summed: bool,
    ) -> tuple[Tensor | None, ...]:
        """The loss and, unless they are deferred, its gradients."""
        student = Student(hidden, weight, bias)
        result = call.in_forward().run(student, teacher, rows)
        kept = autograd.rows_to_keep(rows, call.want, result.loss, summed)
        if call.want.deferred:
            ctx.save_for_backward(*kept, *student, *teacher)
        else:
            ctx.save_for_backward(*kept, *result.gradients)
            if call.want.inplace:
                torch.autograd.graph.increment_version(hidden)
        ctx.call = call
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in student]
        ctx.set_materialize_grads(False)
        parts = result[2:5]
        ctx.mark_non_differentiable(*(part for part in parts if part is not None))
        return (result.total if summed else result.loss, *parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """The saved gradients times upstream, or the deferred ones with upstream inside."""
        if upstream is None:
            return (None,) * 7
        with torch.no_grad():
            gradients = KDChunks._gradients(ctx, upstream)
        return (*autograd.differentiable_once(gradients), *(None,) * 4)

    @staticmethod
    def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved_tensors
        rows, saved = Rows(*saved[: len(Rows._fields)]), saved[len(Rows._fields) :]
        upstream = autograd.of_counted_rows(upstream, rows, call.options.ignore_index)
        if call.want.deferred:
            hidden, weight, bias, *teacher = saved
            if autograd.graph_is_kept():
                call = call._replace(
                    want=call.want._replace(inplace=False)
                )  # logits are needed again
            rows = autograd.with_upstream(rows, upstream)
            gradients = call.run(Student(hidden, weight, bias), teacher, rows).gradients
            if call.want.inplace:
                torch.autograd.graph.increment_version(hidden)
        else:
            gradients = autograd.scaled(backends.load(call.backend), saved, upstream)
        return tuple(
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )


def kd_chunks(
    student: Student,
    teacher: Teacher,
    prepared: Prepared,
    want: Want,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor | None, ...]:
    """(loss, distillation, cross_entropy, student_entropy), differentiable; the loss is [...] or its 0-dim sum.

    The last three arguments are those of fused_linear_kd_loss.
    """
    run = _kd_chunks
    if (
        torch.compiler.is_compiling()
    ):  # the number of chunks depends on the rows, and of those on which count
        run = torch.compiler.disable(run)
    return run(student, teacher, prepared, want, logits_dtype, chunk_size, memory_budget)


def _kd_chunks(
    student: Student,
    teacher: Teacher,
    prepared: Prepared,
    want: Want,
    logits_dtype: torch.dtype | None,
    chunk_size: int | None,
    memory_budget: int | None,
) -> tuple[Tensor | None, ...]:
    _check_ensemble(teacher, prepared.options.divergence)
    planned = _plan(student, teacher, prepared, want, logits_dtype, chunk_size, memory_budget)
    tensors, spec = flatten(teacher)
    wanted = tuple(
        want.student_gradient and tensor is not None and tensor.requires_grad for tensor in student
    )
    summed = prepared.summed
    dense_half = student.weight is None and student.hidden.dtype == torch.float16
    deferred = any(wanted) and (dense_half or (not summed and any(wanted[1:])))
    call = _Call(
        prepared.options,
        want._replace(deferred=deferred),
        wanted,
        planned.backend,
        spec,
        planned.memory.chunk_size,
        planned.logits_dtype,
    )
    return KDChunks.apply(*student, tensors, prepared.rows, call, summed)
