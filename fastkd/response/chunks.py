"""What the losses of fastkd.response share: argument checks, the loop over chunks of rows, and its differentiation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends import reference, registry
from fastkd.call.checks import (
    LossCall,
    check_logits,
    check_teacher,
    check_vocabulary,
    is_dtensor,
    prepare,
)
from fastkd.call.contract import Options, Result, Rows, Want, row_dtype, total_of
from fastkd.call.rows import Chunks, RowIndices, put, rows_at, take
from fastkd.core.pieces import PIECE_TEMPORARIES
from fastkd.core.scalars import LARGEST, check_number
from fastkd.engine.gradients import Differentiable, Loss
from fastkd.engine.graphs import Arguments
from fastkd.engine.plan import REFERENCE_TEMPORARIES, RESPONSE_BUDGET, checked_sizes

# A chunk holds at most this many [C, V] tensors at once, in the dtype of losses; tests/losses/test_response.py measures
# it.
TEMPORARIES = 28


class Outcome(NamedTuple):
    """The results of a chunk of rows. The gradients are those of scale * loss, where the loss includes the weight."""

    loss: Tensor
    student_gradient: Tensor | None = None
    teacher_gradient: Tensor | None = None


# Whether the gradients are wanted: of the student, of the teacher.
Wanted = tuple[bool, bool]
# Functions that compute a loss for whole tensors [..., V], and for a chunk [C, V].
Compute = Callable[[Tensor, Tensor, Rows, Options, Want], Result]
ComputeChunk = Callable[[Tensor, Tensor, Rows, Options, Wanted], Outcome]


def differentiable(student: Tensor, teacher: Tensor, call: LossCall, compute: Compute) -> Tensor:
    """The differentiable loss of a validated call, given a function that computes the loss and its gradients."""
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
    shared: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, LossCall]:
    """Check the arguments that these losses share.

    unequal: the widths may differ without a vocab_size. shared: several processes share the vocabulary, so that this
    one may have no columns.
    """
    for name, value in (("student_logits", student), ("teacher", teacher)):
        if is_dtensor(value):
            raise TypeError(
                f"{name} must be a plain tensor with its whole vocabulary, got a DTensor"
            )
    student = check_logits("student_logits", student, shared)
    teacher = check_logits("teacher", teacher, shared)
    lead, device = student.shape[:-1], student.device
    check_teacher(teacher, "student_logits", lead, device, shared)
    widths = {"student_logits": student.shape[-1], "teacher": teacher.shape[-1]}
    vocabulary = max(*widths.values(), 1) if unequal else check_vocabulary(vocab_size, widths)
    dtype = row_dtype(student.dtype, teacher.dtype)
    return student, teacher, prepare(lead, device, dtype, vocabulary, labels, **options)


def chunk_rows(
    memory_budget: int | None, width: int, dtype: torch.dtype, device: torch.device, extra: int = 0
) -> int:
    """The number of rows of this width per chunk. extra: how many tensors a chunk holds besides TEMPORARIES."""
    _, memory_budget = checked_sizes(None, memory_budget)
    row_bytes = width * (TEMPORARIES + extra) * dtype.itemsize
    if memory_budget is None:
        return max(RESPONSE_BUDGET.of(device.type) // row_bytes, 1)
    if memory_budget < row_bytes:
        raise ValueError(
            f"memory_budget must be at least {row_bytes} bytes, which one row takes; got {memory_budget}"
        )
    return memory_budget // row_bytes


def by_rows(size: int, of_chunk: ComputeChunk, columns: tuple[int, int]) -> Compute:
    """Make a function for whole tensors from one for a chunk. columns: the columns to read of student and teacher."""

    def compute(
        student: Tensor, teacher: Tensor, rows: Rows, options: Options, want: Want
    ) -> Result:
        lead, wanted = student.shape[:-1], (want.student_gradient, want.teacher_gradient)
        logits = [student[..., : columns[0]], teacher[..., : columns[1]]]
        loss = torch.zeros(
            lead, dtype=row_dtype(student.dtype, teacher.dtype), device=student.device
        )
        gradients = [blank(x, wants) for x, wants in zip((student, teacher), wanted, strict=True)]

        # A function, so that its local tensors are freed after each chunk.
        def run(indices: RowIndices) -> None:
            s, t = (take(x, lead, indices) for x in logits)
            outcome = of_chunk(s, t, rows_at(rows, lead, indices), options, wanted)
            put(loss, lead, indices, outcome.loss)
            for gradient, of_rows, width in zip(gradients, outcome[1:], columns, strict=True):
                if gradient is not None and of_rows is not None:
                    put(gradient[..., :width], lead, indices, of_rows.to(gradient.dtype))

        for indices in Chunks.of(rows, lead, options.ignore_index, size):
            run(indices)
        return Result(loss, total_of(loss, rows, options), *gradients)

    return compute


def blank(logits: Tensor, wanted: bool) -> Tensor | None:
    """Contiguous zeros for a gradient, which stay where rows are dropped and in padding; None if it is not wanted."""
    return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device) if wanted else None


def factors_of(
    rows: Rows, options: Options, dtype: torch.dtype
) -> tuple[Tensor | float, Tensor | float]:
    """(the factor weight T^2 of each row's loss, the factor weight T^2 scale of its gradient), [C, 1] or numbers."""
    weight: Tensor | float = 1.0 if rows.weight is None else rows.weight.to(dtype).unsqueeze(-1)
    for temperatures in (rows.temperature, rows.teacher_temperature):
        if temperatures is not None:  # an invalid temperature makes its row NaN
            weight = weight * torch.where(temperatures > 0, 1.0, torch.nan).unsqueeze(-1).to(dtype)
    if options.scale_by_temperature:
        temperature = as_column(options.temperature, rows.temperature)
        weight = weight * temperature * temperature
    scale = options.scale if rows.scale is None else options.scale * rows.scale.to(dtype)
    return weight, weight * scale


def as_column(value: float, rows: Tensor | None) -> float | Tensor:
    """The values of the rows as [C, 1], or the one value if all rows share it."""
    return value if rows is None else rows.unsqueeze(-1)


def row_sum(values: Tensor) -> Tensor:
    """The sum of each row, [C, 1], in float64, which is accurate for rows of 100,000 columns."""
    return values.sum(-1, keepdim=True, dtype=torch.float64)


def softmax_of(logits: Tensor, temperature: float | Tensor, dtype: torch.dtype) -> Tensor:
    """The softmax of logits [C, V]; on a CPU, torch's own has errors of 1e-5 for rows of 50,000 columns."""
    p = logits.to(dtype) - logits.amax(-1, keepdim=True).to(dtype)
    p = p.div_(temperature).exp_()
    return p.div_(row_sum(p).to(dtype))


def to_logits(
    derivative: Tensor, probabilities: Tensor, temperature: float | Tensor, factor: Tensor | float
) -> Tensor:
    """Convert a derivative g with respect to probabilities p to one with respect to the logits, times factor.

    The result, factor p (g - sum p g) / T, overwrites derivative. A constant in g does not matter: the g of the most
    probable token is subtracted first, so that digits remain where p is near 1 and both terms are nearly equal.
    """
    derivative.sub_(derivative.gather(-1, probabilities.argmax(-1, keepdim=True)))
    derivative.mul_(probabilities)
    mean = row_sum(derivative).to(derivative.dtype)
    return derivative.addcmul_(probabilities, mean, value=-1.0).mul_(factor / temperature)


def returned(arguments: Arguments) -> list[tuple[Sequence[int], torch.dtype]]:
    """The shape and dtype of a loss, given its arguments by name; for a compiled graph."""
    student, teacher = arguments["student_logits"], arguments["teacher"]
    per_row = arguments.get("reduction", "mean") == "none"
    return [(student.shape[:-1] if per_row else (), row_dtype(student.dtype, teacher.dtype))]


def kernels_of(call: LossCall, student: Tensor, teacher: Tensor) -> tuple[Any, int]:
    """(the backend for chunks of :func:`both_widened` logits, how many [C, V] temporaries it holds)."""
    dtype = row_dtype(student.dtype, teacher.dtype)
    chosen = registry.select(
        call.backend, student.device.type, dtype, dtype, call.options.divergence
    )
    extra = {"reference": REFERENCE_TEMPORARIES, "portable": PIECE_TEMPORARIES}
    return registry.load(chosen), extra.get(chosen, 0)


def both_widened(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits in the dtype of losses, so that several gradients can be added before their sum is rounded."""
    dtype = row_dtype(student.dtype, teacher.dtype)
    return student.to(dtype), teacher.to(dtype)


def positive(argument: str, value: float) -> float:
    """The value as a float; raise unless it is a positive number."""
    value = check_number(argument, value, 0.0, LARGEST)
    if value == 0.0:
        raise ValueError(f"{argument} must be positive, got {value}")
    return value
