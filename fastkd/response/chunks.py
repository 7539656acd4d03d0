"""What the losses of the response share: their arguments, the loop over chunks of rows, and its differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends import reference, registry
from fastkd.backends.pieces import PIECE_TEMPORARIES
from fastkd.call.checks import (
    LARGEST,
    LossCall,
    check_logits,
    check_number,
    check_teacher,
    check_vocabulary,
    is_dtensor,
    prepare,
)
from fastkd.call.contract import Options, Result, Rows, Want, row_dtype, total_of
from fastkd.call.rows import At, Chunks, put, rows_at, take
from fastkd.engine.gradients import Differentiable, Loss
from fastkd.engine.graphs import Arguments
from fastkd.engine.plan import REFERENCE_TEMPORARIES, RESPONSE_BUDGET, checked_sizes

# [C, V] tensors of the dtype of losses that a chunk holds at once, at most; tests/losses/test_response.py measures it.
TEMPORARIES = 28


class Outcome(NamedTuple):
    """What a chunk of rows returns; the gradients are those of the loss times weight and scale."""

    loss: Tensor
    student_gradient: Tensor | None = None
    teacher_gradient: Tensor | None = None


Wanted = tuple[bool, bool]  # gradients: of the student, of the teacher
# From (student, teacher, rows, options, what is wanted): the result of whole tensors, and of a chunk [C, V].
Compute = Callable[[Tensor, Tensor, Rows, Options, Want], Result]
ComputeChunk = Callable[[Tensor, Tensor, Rows, Options, Wanted], Outcome]


def differentiable(student: Tensor, teacher: Tensor, call: LossCall, compute: Compute) -> Tensor:
    """The loss of a validated call, from a function that computes it with its gradients."""
    both = (student, teacher)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in both]
    half = [wants and x.dtype == torch.float16 for x, wants in zip(both, wanted, strict=True)]
    want = Want(wanted[0], wanted[1], deferred=any(half))

    loss = Loss(compute, call.options, want, call.summed, reference.scale_rows_)
    return Differentiable.apply(loss, call.rows, 2, student, teacher)[0]


def prepared(
    student: object,
    teacher: object,
    labels: Tensor | None,
    vocab_size: int | None,
    unequal: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, LossCall]:
    """The arguments that these losses share, checked. unequal: widths may differ, and vocab_size is not asked for."""
    for name, value in (("student_logits", student), ("teacher", teacher)):
        if is_dtensor(value):
            raise TypeError(
                f"{name} must be a plain tensor with its whole vocabulary, got a DTensor"
            )
    student = check_logits("student_logits", student)
    teacher = check_logits("teacher", teacher)
    lead, device = student.shape[:-1], student.device
    check_teacher(teacher, "student_logits", lead, device)
    widths = {"student_logits": student.shape[-1], "teacher": teacher.shape[-1]}
    vocabulary = min(widths.values()) if unequal else check_vocabulary(vocab_size, widths)
    dtype = row_dtype(student.dtype, teacher.dtype)
    return student, teacher, prepare(lead, device, dtype, vocabulary, labels, **options)


def chunk_rows(
    memory_budget: int | None, width: int, dtype: torch.dtype, device: torch.device, extra: int = 0
) -> int:
    """The number of rows of that width per chunk; extra: other temporaries, of float32."""
    _, memory_budget = checked_sizes(None, memory_budget)
    a_row = width * (TEMPORARIES + extra) * dtype.itemsize
    if memory_budget is None:
        return max(RESPONSE_BUDGET.of(device.type) // a_row, 1)
    if memory_budget < a_row:
        raise ValueError(
            f"memory_budget must be at least {a_row} bytes, which one row takes; got {memory_budget}"
        )
    return memory_budget // a_row


def by_rows(size: int, of_chunk: ComputeChunk, columns: tuple[int, int]) -> Compute:
    """The function for whole tensors from the one for a chunk; columns: how many count, of student and teacher."""

    def compute(
        student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want
    ) -> Result:
        lead, wanted = student.shape[:-1], (want.student_gradient, want.teacher_gradient)
        logits = [student[..., : columns[0]], teacher[..., : columns[1]]]
        loss = torch.zeros(
            lead, dtype=row_dtype(student.dtype, teacher.dtype), device=student.device
        )
        gradients = [blank(x, wants) for x, wants in zip((student, teacher), wanted, strict=True)]

        def run(at: At) -> None:  # a function, so that nothing of a chunk outlives it
            s, t = (take(x, lead, at) for x in logits)
            outcome = of_chunk(s, t, rows_at(rows, lead, at), options, wanted)
            put(loss, lead, at, outcome.loss)
            for whole, part, width in zip(gradients, outcome[1:], columns, strict=True):
                if whole is not None and part is not None:
                    put(whole[..., :width], lead, at, part.to(whole.dtype))

        for at in Chunks.of(rows, lead, options.ignore_index, size):
            run(at)
        return Result(loss, total_of(loss, rows, options), *gradients)

    return compute


def blank(logits: Tensor, wanted: bool) -> Tensor | None:
    """Contiguous zeros for a gradient: what is not written belongs to rows that are dropped, or to padding."""
    return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device) if wanted else None


def factors_of(
    rows: Rows, options: Options, dtype: torch.dtype
) -> tuple[Tensor | float, Tensor | float]:
    """(what multiplies the loss of a row, what multiplies its gradient), [C, 1] or numbers: weight, T^2, scale."""
    weight: Tensor | float = 1.0 if rows.weight is None else rows.weight.to(dtype).unsqueeze(-1)
    for tempering in (rows.temperature, rows.teacher_temperature):
        if tempering is not None:  # an invalid one poisons its row
            weight = weight * torch.where(tempering > 0, 1.0, torch.nan).unsqueeze(-1).to(dtype)
    if options.scale_by_temperature:
        temperature = as_column(options.temperature, rows.temperature)
        weight = weight * temperature * temperature
    scale = options.scale if rows.scale is None else options.scale * rows.scale.to(dtype)
    return weight, weight * scale


def as_column(value: float, rows: Tensor | None) -> float | Tensor:
    """The temperatures of rows [C, 1], or the one of all."""
    return value if rows is None else rows.unsqueeze(-1)


def row_sum(values: Tensor) -> Tensor:
    """[C, 1] in float64, in which rows of 100,000 columns lose no digit."""
    return values.sum(-1, keepdim=True, dtype=torch.float64)


def softmax_of(logits: Tensor, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
    """[C, V]; torch's is off by 1e-5 on a CPU, in rows of 50,000 columns."""
    p = logits.to(dtype) - logits.amax(-1, keepdim=True).to(dtype)
    p = p.div_(temperature).exp_()
    return p.div_(row_sum(p).to(dtype))


def to_logits(
    derivative: Tensor, probabilities: Tensor, temperature: float | Tensor, factor: Tensor | float
) -> Tensor:
    """From a derivative by probabilities to one by logits, p (g - sum p g) / T, times factor; overwrites the first."""
    derivative.mul_(probabilities)
    total = row_sum(derivative).to(derivative.dtype)
    return derivative.addcmul_(probabilities, total, value=-1.0).mul_(factor / temperature)


def returned(given: Arguments) -> list[tuple[Sequence[int], torch.dtype]]:
    """The shape and dtype of a loss, for a compiled graph."""
    student, teacher = given["student_logits"], given["teacher"]
    per_row = given.get("reduction", "mean") == "none"
    return [(student.shape[:-1] if per_row else (), row_dtype(student.dtype, teacher.dtype))]


def kernels_of(call: LossCall, student: Tensor, teacher: Tensor) -> tuple[Any, int]:
    """(the backend for chunks of :func:`both_widened` logits, the temporaries that it takes)."""
    dtype = row_dtype(student.dtype, teacher.dtype)
    chosen = registry.select(
        call.backend, student.device.type, dtype, dtype, call.options.divergence
    )
    extra = {"reference": REFERENCE_TEMPORARIES, "portable": PIECE_TEMPORARIES}
    return registry.load(chosen), extra.get(chosen, 0)


def both_widened(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """In the dtype of losses, so that several gradients are added before one is rounded."""
    dtype = row_dtype(student.dtype, teacher.dtype)
    return student.to(dtype), teacher.to(dtype)


def positive(argument: str, value: float) -> float:
    """The value as a float; raise unless it is a positive number."""
    value = check_number(argument, value, 0.0, LARGEST)
    if value == 0.0:
        raise ValueError(f"{argument} must be positive, got {value}")
    return value
