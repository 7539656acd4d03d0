"""The loop over chunks of rows: compute both models' logits, run the kernel in place, collect the gradients.

The file has two parts: the classes that handle the student and the teacher of a chunk, and the loop
(:func:`chunks_of_rows`). fastkd/engine/linear.py plans the chunks and differentiates the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.call.contract import Options, Rows, Shard, Want, factor_of, total_of
from fastkd.call.measures import measure_count
from fastkd.call.routed import rows_by_teacher
from fastkd.call.rows import Chunks, RowIndices, put, rows_at, take
from fastkd.core.tensors import readable
from fastkd.engine.matmul import add_weight_gradient, as_operand, hidden_gradient, make_logits
from fastkd.teachers import Ensemble, LinearTeacher, RoutedTeacher, rows_of

# How many logits of an ensemble's chunk are combined at a time; on a CPU, few enough for the cache.
COMBINED_CPU, COMBINED_DEVICE = 1 << 18, 1 << 24


class Student(NamedTuple):
    """Hidden states [..., H], weight [V, H] and bias [V]; or logits [..., V] as hidden, without weight and bias."""

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


class Gradients(NamedTuple):
    """The gradients of the fields of Student. Sums over chunks may be wider; the result is in :func:`saved_dtype`."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def saved_dtype(tensor: Tensor, dense: bool) -> torch.dtype:
    """The dtype in which the gradient of a field of Student is saved until the backward pass scales it.

    Float16 gradients from matrix products are saved in float32, because they would underflow before loss scaling. The
    gradients of dense float16 logits are not saved at all, but deferred to the backward pass.
    """
    return torch.float32 if tensor.dtype == torch.float16 and not dense else tensor.dtype


class Chunked(NamedTuple):
    """The result of all chunks: like fastkd.call.contract.Result, but with the gradients of Student, in saved_dtype."""

    loss: Tensor
    total: Tensor
    distillation: Tensor | None
    cross_entropy: Tensor | None
    student_entropy: Tensor | None
    hidden_gradient: Tensor | None
    weight_gradient: Tensor | None
    bias_gradient: Tensor | None
    measures: Tensor | None

    @property
    def gradients(self) -> tuple[Tensor | None, ...]:
        """The gradients of total with respect to the fields of Student."""
        return self.hidden_gradient, self.weight_gradient, self.bias_gradient

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """The parts of fastkd.call.contract.Result."""
        return self.distillation, self.cross_entropy, self.student_entropy, self.measures


# ---- the student and the teacher of a chunk


class StudentChunks:
    """Computes the student's logits of each chunk, and collects the gradients of the student's fields."""

    def __init__(
        self,
        student: Student,
        lead: torch.Size,
        vocabulary: int,
        wanted_gradients: Sequence[bool],
        inplace: bool,
        single_chunk: bool = False,
    ) -> None:
        self.student, self.lead, self.vocabulary = student, lead, vocabulary
        self.is_first_chunk = True
        hidden, weight, bias = student
        if weight is None:
            gradient = None
            if wanted_gradients[0]:
                gradient = (
                    hidden
                    if inplace
                    else torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
                )
            self.gradients = Gradients(gradient, None, None)
            return

        def zeros(tensor: Tensor | None, wants: bool, accumulates: bool) -> Tensor | None:
            if tensor is None or not wants:
                return None
            widens = tensor.dtype == torch.float16 or (
                accumulates and tensor.dtype == torch.bfloat16
            )
            return tensor.new_zeros(tensor.shape, dtype=torch.float32 if widens else None)

        self.gradients = Gradients(
            zeros(hidden, wanted_gradients[0], False),
            # Nothing is added up if there is one chunk, whose product is then rounded a slab at a time.
            zeros(
                weight,
                wanted_gradients[1],
                not (single_chunk and hidden.device.type == "cpu"),
            ),
            zeros(bias, wanted_gradients[2], True),
        )

    def logits(self, indices: RowIndices, buffer: Tensor) -> Tensor:
        """The logits [C, V] of these rows, in the buffer, where the kernel overwrites them with their gradient."""
        hidden, weight, bias = self.student
        rows = take(hidden, self.lead, indices)
        if weight is None:
            return buffer.copy_(readable(rows[:, : self.vocabulary]))
        bias = None if bias is None else bias[: self.vocabulary]
        return make_logits(rows, weight[: self.vocabulary], bias, buffer)

    def add(self, indices: RowIndices, gradient: Tensor, scratch: Tensor | None) -> None:
        """Add these rows' share of the gradients of the student's fields, given the gradient [C, V] of their logits.

        The gradient's memory may be overwritten.
        """
        hidden, weight, _ = self.student
        columns = slice(self.vocabulary)
        if weight is None:
            assert self.gradients.hidden is not None
            if self.vocabulary < hidden.shape[-1]:
                padding = (0, hidden.shape[-1] - self.vocabulary)
                gradient = torch.nn.functional.pad(gradient, padding)
            put(self.gradients.hidden, self.lead, indices, gradient)
            return
        if self.gradients.bias is not None:
            self.gradients.bias[columns] += gradient.sum(0, dtype=self.gradients.bias.dtype)
        rows = take(hidden, self.lead, indices)
        operand = as_operand(gradient, rows, weight[columns], scratch)
        if self.gradients.weight is not None:
            add_weight_gradient(operand, rows, self.gradients.weight[columns], self.is_first_chunk)
        if self.gradients.hidden is not None:
            out = torch.empty(
                gradient.shape[0],
                hidden.shape[-1],
                dtype=self.gradients.hidden.dtype,
                device=hidden.device,
            )
            hidden_gradient(operand, weight[columns], out)
            put(self.gradients.hidden, self.lead, indices, out)
        self.is_first_chunk = False

    def finished(self, processed: Tensor | None) -> Gradients:
        """All gradients, in saved_dtype. processed: the indices of the processed rows, or None for all rows."""
        hidden, weight, bias = self.gradients
        student = self.student
        # If the gradient overwrites the logits, dropped rows still hold logits.
        if hidden is student.hidden and processed is not None:
            dropped = torch.ones(self.lead.numel(), dtype=torch.bool, device=processed.device)
            hidden[dropped.index_fill(0, processed, False).view(self.lead)] = 0.0

        def converted(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
            if gradient is None or tensor is None:
                return None
            return gradient.to(saved_dtype(tensor, student.weight is None))

        return Gradients(
            converted(hidden, student.hidden),
            converted(weight, student.weight),
            converted(bias, student.bias),
        )


def _linear_logits(
    teacher: LinearTeacher, lead: torch.Size, indices: RowIndices, out: Tensor
) -> Tensor:
    hidden, weight, bias = teacher.hidden, teacher.weight, teacher.bias
    bias = None if bias is None else bias[: out.shape[1]]
    return make_logits(take(hidden, lead, indices), weight[: out.shape[1]], bias, out)


def _add_member(
    combined: Tensor,
    logits: Tensor,
    weight: float,
    mean: str,
    temper: Callable[[Tensor, slice], Tensor],
    shard: Shard | None,
) -> None:
    """Add one member of an ensemble to the combined tempered logits [C, V], a few rows at a time."""
    elements = COMBINED_CPU if combined.device.type == "cpu" else COMBINED_DEVICE
    count, columns = combined.shape
    step = max(elements // max(columns, 1), 1)
    row_slices = [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def tempered(row_slice: slice) -> Tensor:
        return temper(logits[row_slice, :columns].to(combined.dtype), row_slice)

    log_sums = None
    if shard is not None and mean == "arithmetic":
        from fastkd.parallel.shards import log_sum_exp

        local_log_sums = torch.cat([_log_sum_exp(tempered(row_slice)) for row_slice in row_slices])
        log_sums = log_sum_exp(local_log_sums, shard)
    for row_slice in row_slices:
        z, combined_rows = tempered(row_slice), combined[row_slice]
        if mean == "geometric":
            combined_rows.add_(z, alpha=weight)
        else:
            log_sum = _log_sum_exp(z) if log_sums is None else log_sums[row_slice]
            torch.logaddexp(combined_rows, z + (math.log(weight) - log_sum), out=combined_rows)


def _log_sum_exp(z: Tensor) -> Tensor:
    """The log-sum-exp [..., 1] over the columns; -inf if there are none."""
    return z.logsumexp(-1, keepdim=True) if z.shape[-1] else z.sum(-1, keepdim=True).log()


class _TeacherChunks:
    """Provides the teacher's logits of each chunk, and the options with which the kernel reads them."""

    def __init__(
        self, teacher: Tensor | LinearTeacher | Ensemble, lead: torch.Size, options: Options
    ) -> None:
        self.teacher, self.lead, self.options = teacher, lead, options

    def buffers(self) -> int:
        """The number of [C, V] buffers that :meth:`logits` needs."""
        if isinstance(self.teacher, Tensor):
            return 0
        if isinstance(self.teacher, LinearTeacher):
            return 1
        linear = any(isinstance(member, LinearTeacher) for member in self.teacher.teachers)
        return 2 if linear else 1

    def buffer_dtype(
        self, student: Student, logits_dtype: torch.dtype, row_dtype: torch.dtype
    ) -> torch.dtype:
        """The dtype of those buffers; the arguments are those of :func:`chunks_of_rows`."""
        same_dtype = (
            isinstance(self.teacher, LinearTeacher) and self.teacher.hidden.dtype == logits_dtype
        )
        return logits_dtype if same_dtype and student.weight is not None else row_dtype

    def kernel_options(self) -> Options:
        """The options for the kernel; it does not temper an ensemble, whose members have been tempered already."""
        if not isinstance(self.teacher, Ensemble):
            return self.options
        return self.options._replace(
            teacher_temperature=1.0, teacher_logit_scale=1.0, teacher_softcap=0.0
        )

    def logits(self, indices: RowIndices, rows: Rows, buffers: list[Tensor]) -> tuple[Tensor, Rows]:
        """Return (logits [C, V], or a sparse teacher's log-probabilities [C, K]; the Rows to pass to the kernel)."""
        if isinstance(self.teacher, Tensor):
            return take(self.teacher, self.lead, indices), rows
        if isinstance(self.teacher, LinearTeacher):
            return _linear_logits(self.teacher, self.lead, indices, buffers[0]), rows
        return self._combined(self.teacher, indices, rows, buffers)

    def _combined(
        self, teacher: Ensemble, indices: RowIndices, rows: Rows, buffers: list[Tensor]
    ) -> tuple[Tensor, Rows]:
        options, temperatures = self.options, rows.teacher_temperature

        def temper(z: Tensor, row_slice: slice) -> Tensor:
            if options.teacher_softcap:
                gain = options.teacher_logit_scale / options.teacher_softcap
                z = options.teacher_softcap * torch.tanh(z * gain)
            elif options.teacher_logit_scale != 1:
                z = z * options.teacher_logit_scale
            if temperatures is not None:
                return z / temperatures[row_slice].unsqueeze(-1)
            return z / options.teacher_temperature

        combined = buffers[0].fill_(0.0 if teacher.mean == "geometric" else -math.inf)
        assert teacher.weights is not None  # the constructor fills them in
        for member, weight in zip(teacher.teachers, teacher.weights, strict=True):
            if weight == 0:
                continue
            if isinstance(member, LinearTeacher):
                logits = _linear_logits(member, self.lead, indices, buffers[1])
            else:
                assert isinstance(member, Tensor)  # fastkd.engine.ensembles replaces a TopK
                logits = take(member, self.lead, indices)
            _add_member(combined, logits, weight, teacher.mean, temper, options.shard)
        if temperatures is not None:  # an invalid temperature makes its row NaN
            weights = torch.ones_like(temperatures) if rows.weight is None else rows.weight
            weights = torch.where((temperatures > 0) | (weights == 0), weights, torch.nan)
            rows = rows._replace(weight=weights, teacher_temperature=None)
        return combined, rows


# ---- the loop


class _Routes(NamedTuple):
    """The chunks of a call."""

    # For each teacher, its chunks: the indices of their rows among the student's rows and among the teacher's.
    chunks: list[tuple[_TeacherChunks, list[tuple[RowIndices, RowIndices]]]]
    size: int  # the rows of the largest chunk
    indices: Tensor | None  # the indices of all rows in chunks; None: of all rows of the student

    @classmethod
    def of(
        cls,
        teacher: Tensor | LinearTeacher | Ensemble | RoutedTeacher,
        rows: Rows,
        lead: torch.Size,
        options: Options,
        size: int,
        drops: bool,
    ) -> _Routes:
        """The chunks of at most `size` rows. drops: remove dropped rows; a RoutedTeacher always does."""
        if not isinstance(teacher, RoutedTeacher):
            chunks = Chunks.of(rows, lead, options.ignore_index, size, even=True, drops=drops)
            pairs: list[tuple[RowIndices, RowIndices]] = [(indices, indices) for indices in chunks]
            return cls(
                [(_TeacherChunks(teacher, lead, options), pairs)], chunks.size, chunks.indices
            )
        parts, largest, kept = rows_by_teacher(teacher, rows, lead, options.ignore_index, size)
        routes = []
        for part in parts:
            member: Any = teacher.teachers[part.number]  # no TopK: fastkd.call.routed joins them
            routes.append(
                (_TeacherChunks(member, rows_of(member).shape[:-1], options), part.chunks)
            )
        return cls(routes, largest, kept)


def chunks_of_rows(
    student: Student,
    teacher: Tensor | LinearTeacher | Ensemble | RoutedTeacher,
    rows: Rows,
    options: Options,
    want: Want,
    wanted_gradients: Sequence[bool],
    kernels: ModuleType,
    chunk_size: int,
    logits_dtype: torch.dtype,
    row_dtype: torch.dtype,
) -> Chunked:
    """Losses and gradients of all rows.

    Args:
        student: hidden states and head, or logits.
        teacher: the teacher, whose logits are computed or sliced for each chunk.
        rows: the labels, weights and other values of all rows.
        options: the options of the call.
        want: which outputs are wanted; the fields that ask for gradients are ignored.
        wanted_gradients: for each field of Student, whether its gradient is wanted.
        kernels: the backend.
        chunk_size: the largest number of rows in a chunk.
        logits_dtype: the dtype of the student's logits.
        row_dtype: the dtype of losses, and of teacher logits that are computed or combined here; but a LinearTeacher
            whose hidden states have logits_dtype computes its logits in that dtype if the student has a head.
    """
    lead, device = student.hidden.shape[:-1], student.hidden.device
    vocabulary = options.vocab_size
    # To remove dropped rows, the host must wait for the device to count the others, which CUDA graph capture forbids.
    # While a graph is captured, dropped rows therefore stay in the chunks, and the kernel skips them.
    capturing = student.hidden.is_cuda and torch.cuda.is_current_stream_capturing()
    routes = _Routes.of(teacher, rows, lead, options, chunk_size, drops=not capturing)
    single_chunk = sum(len(chunks) for _, chunks in routes.chunks) <= 1
    student_chunks = StudentChunks(
        student, lead, vocabulary, wanted_gradients, want.inplace, single_chunk
    )
    call_options, options = options, routes.chunks[0][0].kernel_options()
    want = want._replace(student_gradient=any(wanted_gradients), inplace=True, deferred=False)
    # As float16 operands of a matrix product, scaled gradients below 3e-8 would round to 0. The scale is therefore
    # applied afterwards, to the float32 gradients of the student's fields.
    defers_scale = student.weight is not None and student.hidden.dtype == torch.float16
    call_rows = rows
    if defers_scale:
        options, rows = options._replace(scale=1.0), rows._replace(scale=None)

    def zeros(wanted: bool, *shape: int) -> Tensor | None:
        return torch.zeros((*lead, *shape), dtype=row_dtype, device=device) if wanted else None

    loss = torch.zeros(lead, dtype=row_dtype, device=device)
    parts = [zeros(want.parts) for _ in range(3)]
    parts.append(zeros(want.measures, measure_count(options.tail)))
    buffers = [kernels.empty((routes.size, vocabulary), logits_dtype, device)]

    def make_buffers(teacher_chunks: _TeacherChunks) -> None:
        """Make the buffers that this teacher needs; those of the teacher before may serve."""
        count = teacher_chunks.buffers()
        dtype = teacher_chunks.buffer_dtype(student, logits_dtype, row_dtype)
        if count and any(buffer.dtype != dtype for buffer in buffers[1:]):
            del buffers[1:]
        while len(buffers) < 1 + count:
            buffers.append(kernels.empty((routes.size, vocabulary), dtype, device))

    def process_chunk(
        teacher_chunks: _TeacherChunks, indices: RowIndices, of_teacher: RowIndices
    ) -> None:
        chunk_rows = rows_at(rows, lead, indices)
        count = indices.stop - indices.start if isinstance(indices, slice) else indices.numel()
        student_buffer, *teacher_buffers = (buffer[:count] for buffer in buffers)
        student_logits = student_chunks.logits(indices, student_buffer)
        teacher_logits, chunk_rows = teacher_chunks.logits(of_teacher, chunk_rows, teacher_buffers)
        result = kernels.kd_rows(student_logits, teacher_logits, chunk_rows, options, want)
        for all_rows, values in zip((loss, *parts), (result.loss, *result.parts), strict=True):
            if all_rows is not None:
                # A chunk is float32 if only another teacher of a RoutedTeacher is float64.
                put(all_rows, lead, indices, values.to(all_rows.dtype))
        if result.student_gradient is not None:
            scratch = buffers[1] if len(buffers) > 1 else None
            student_chunks.add(indices, result.student_gradient, scratch)

    for teacher_chunks, chunks in routes.chunks:
        make_buffers(teacher_chunks)
        for indices, of_teacher in chunks:
            process_chunk(teacher_chunks, indices, of_teacher)
    buffers.clear()  # frees them before finished() allocates the gradients in saved_dtype
    gradients = student_chunks.finished(routes.indices)
    if defers_scale:
        factor = factor_of(call_rows, call_options)
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(factor)
    distillation, cross_entropy, entropy, measures = parts
    total = total_of(loss, call_rows, call_options)
    return Chunked(loss, total, distillation, cross_entropy, entropy, *gradients, measures)
