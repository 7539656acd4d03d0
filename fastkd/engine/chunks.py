"""The loop over chunks of rows: logits of both sides made, the kernel run in place, gradients carried back.

Read top to bottom: what a chunk's student and teacher are, and the loop (:func:`chunks_of_rows`).
fastkd/engine/linear.py plans and differentiates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.call.contract import Options, Rows, Shard, Want, factor_of, total_of
from fastkd.call.rows import At, Chunks, put, rows_at, take
from fastkd.core.tensors import readable
from fastkd.engine.matmul import add_weight_gradient, as_operand, hidden_gradient, make_logits
from fastkd.teachers import Ensemble, LinearTeacher

# Elements of a part of a chunk in which several teachers are combined: on a CPU it stays in the cache.
COMBINED_CPU, COMBINED_DEVICE = 1 << 18, 1 << 24


class Student(NamedTuple):
    """hidden [..., H], weight [V, H] and bias [V]; or logits [..., V] alone."""

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


class Gradients(NamedTuple):
    """Of the fields of Student, in :func:`saved_dtype`."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def saved_dtype(tensor: Tensor, dense: bool) -> torch.dtype:
    """Of the gradient of a field of Student until the backward multiplies it by what comes from upstream.

    float32 for a product's in float16, which would underflow before a loss scaler multiplies it; of dense logits in
    float16 there is none yet, as they defer theirs.
    """
    return torch.float32 if tensor.dtype == torch.float16 and not dense else tensor.dtype


class Chunked(NamedTuple):
    """The result of all chunks: fastkd.call.contract.Result, with the gradients of Student's fields in saved_dtype."""

    loss: Tensor
    total: Tensor
    distillation: Tensor | None
    cross_entropy: Tensor | None
    student_entropy: Tensor | None
    hidden_gradient: Tensor | None
    weight_gradient: Tensor | None
    bias_gradient: Tensor | None

    @property
    def gradients(self) -> tuple[Tensor | None, ...]:
        """The gradients of total by Student's fields."""
        return self.hidden_gradient, self.weight_gradient, self.bias_gradient

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """The terms of the loss that fastkd.functional.Parts has."""
        return self.distillation, self.cross_entropy, self.student_entropy


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
            return buffer.copy_(readable(rows[:, : self.vocabulary]))
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
        """All gradients, in the dtype they are saved in; counted: the numbers of the processed rows, None if all."""
        hidden, weight, bias = self.gradients
        # In place, dropped rows still hold logits.
        if hidden is self.student.hidden and counted is not None:
            dropped = torch.ones(self.lead.numel(), dtype=torch.bool, device=counted.device)
            hidden[dropped.index_fill(0, counted, False).view(self.lead)] = 0.0
        tensors = self.student

        def close(gradient: Tensor | None, tensor: Tensor | None) -> Tensor | None:
            if gradient is None or tensor is None:
                return None
            return gradient.to(saved_dtype(tensor, tensors.weight is None))

        return Gradients(
            close(hidden, tensors.hidden), close(weight, tensors.weight), close(bias, tensors.bias)
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
    shard: Shard | None,
) -> None:
    """One more teacher of an ensemble in the combined tempered logits [C, V], a few rows at a time."""
    elements = COMBINED_CPU if total.device.type == "cpu" else COMBINED_DEVICE
    count, columns = total.shape
    step = max(elements // max(columns, 1), 1)
    parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def tempered(part: slice) -> Tensor:
        return temper(logits[part, :columns].to(total.dtype), part)

    log_sums = None
    if shard is not None and mean == "arithmetic":
        from fastkd.parallel.shards import log_sum_exp

        log_sums = log_sum_exp(torch.cat([_log_sum_exp(tempered(part)) for part in parts]), shard)
    for part in parts:
        z = tempered(part)
        if mean == "geometric":
            total[part].add_(z, alpha=weight)
        else:
            log_sum = _log_sum_exp(z) if log_sums is None else log_sums[part]
            torch.logaddexp(total[part], z + (math.log(weight) - log_sum), out=total[part])


def _log_sum_exp(z: Tensor) -> Tensor:
    """[..., 1]; -inf where there is no column."""
    return z.logsumexp(-1, keepdim=True) if z.shape[-1] else z.sum(-1, keepdim=True).log()


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
            _add_member(total, logits, weight, teacher.mean, temper, options.shard)
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
    row_dtype: torch.dtype,
) -> Chunked:
    """Losses and gradients of all rows.

    Args:
        student: hidden states and head, or logits.
        teacher: whose logits are computed, or taken, for each chunk.
        rows: of all rows.
        options: of the call.
        want: the outputs that are wanted; its gradients are ignored.
        wanted: the gradients that are wanted, of Student's fields.
        kernels: the backend.
        chunk_size: rows of a chunk, at most.
        logits_dtype: dtype of the student's logits.
        row_dtype: dtype of losses, and of a teacher's logits unless its operands have logits_dtype.
    """
    lead, device = student.hidden.shape[:-1], student.hidden.device
    vocabulary = options.vocab_size
    # The number of counted rows has to be known, which waits for the device. While a CUDA graph records, nothing may
    # wait; dropped rows then stay, and the kernel skips them.
    recording = student.hidden.is_cuda and torch.cuda.is_current_stream_capturing()
    chunks = Chunks.of(rows, lead, options.ignore_index, chunk_size, even=True, drops=not recording)
    student_chunks = _StudentChunks(student, lead, vocabulary, wanted, want.inplace)
    teacher_chunks = _TeacherChunks(teacher, lead, options)
    original, options = options, teacher_chunks.kernel_options()
    want = want._replace(student_gradient=any(wanted), inplace=True, deferred=False)
    # Products in float16 would lose gradients below 6e-8, so the scale multiplies the float32 sums.
    scaled_later = student.weight is not None and student.hidden.dtype == torch.float16
    unscaled = rows
    if scaled_later:
        options, rows = options._replace(scale=1.0), rows._replace(scale=None)
    per_row = [
        torch.zeros(lead, dtype=row_dtype, device=device) for _ in range(4 if want.parts else 1)
    ]
    buffers = [kernels.empty((chunks.size, vocabulary), logits_dtype, device)]
    same_dtype = isinstance(teacher, LinearTeacher) and teacher.hidden.dtype == logits_dtype
    t_dtype = logits_dtype if same_dtype and student.weight is not None else row_dtype
    for _ in range(teacher_chunks.buffers()):
        buffers.append(kernels.empty((chunks.size, vocabulary), t_dtype, device))

    def run(at: At) -> None:
        chunk = rows_at(rows, lead, at)
        count = at.stop - at.start if isinstance(at, slice) else at.numel()
        student_buffer, *teacher_buffers = (buffer[:count] for buffer in buffers)
        s = student_chunks.logits(at, student_buffer)
        t, chunk = teacher_chunks.logits(at, chunk, teacher_buffers)
        result = kernels.kd_rows(s, t, chunk, options, want)
        for whole, part in zip(per_row, (result.loss, *result.parts), strict=False):
            put(whole, lead, at, part)
        if result.student_gradient is not None:
            scratch = buffers[1] if len(buffers) > 1 else None
            student_chunks.add(at, result.student_gradient, scratch)

    for at in chunks:
        run(at)
    buffers.clear()  # before gradients in their own precision are allocated
    loss, *parts = per_row
    gradients = student_chunks.finished(chunks.numbers)
    if scaled_later:
        factor = factor_of(unscaled, original)
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(factor)
    distillation, cross_entropy, entropy = parts or (None, None, None)
    total = total_of(loss, unscaled, original)
    return Chunked(loss, total, distillation, cross_entropy, entropy, *gradients)
