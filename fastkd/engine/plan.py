"""The memory plan of a chunked loss: how many rows a chunk has, and how many bytes a call holds at its peak."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastkd.call.contract import row_dtype
from fastkd.core.pieces import piece_bytes
from fastkd.core.scalars import plain
from fastkd.engine.matmul import slab_rows


class Budget(NamedTuple):
    """The bytes that chunks may take in a call without memory_budget."""

    cpu: int
    other: int  # on any other device

    def of(self, device: str) -> int:
        """The bytes for this type of device."""
        return self.cpu if device == "cpu" else self.other


# The accumulator of the weight's gradient comes on top. Each chunk reads and writes the whole accumulator, 8 V H bytes:
# for a head of 128,256 x 4,096 this takes 1.4 ms on an H100, against 11 ms for the products of a chunk of 2,048 rows,
# for which this budget has room.
LINEAR_BUDGET = Budget(384 << 20, 2112 << 20)
# Without matrix products, a chunk only has to be large enough to occupy the device, and on a CPU small enough to stay
# in cache.
RESPONSE_BUDGET = Budget(32 << 20, 1 << 30)
# Threads' scratch memory, packed operands of matrix products, and tensors with one value per row.
WORKSPACE = 16 << 20
# How many [C, V] tensors the reference backend holds at once besides the logits.
REFERENCE_TEMPORARIES = 14
# The bytes of one token of a sparse teacher in a chunk: its id, and the float32 logits, log-probabilities and gradients
# of both sides.
TOPK_BYTES = 32
LOW_PRECISION = (torch.bfloat16, torch.float16)


class MemoryPlan(NamedTuple):
    """The memory that a chunked call holds, in bytes."""

    chunk_size: int  # rows
    chunks: int
    # The logits of a chunk: the student's, which the gradient overwrites, and the teacher's.
    logits: int
    # The float32 sum of the weight's gradient, if the weight has lower precision.
    accumulator: int
    workspace: int
    # The sum of logits, accumulator and workspace: everything held besides inputs and gradients.
    peak: int
    student: int  # the student's hidden states and head
    teacher: int  # the teacher as the caller holds it
    gradients: int  # the gradients of hidden states and weight
    # What replaces `peak` without chunks: the float32 logits of both sides (without a teacher: the logits and their
    # log-softmax), and the student's gradient.
    dense: int


class Shape(NamedTuple):
    """The sizes and dtypes that determine the memory of a call."""

    rows: int
    vocabulary: int
    dtype: torch.dtype  # of the student's hidden states, or of its dense logits
    logits_dtype: torch.dtype  # of the logits in a chunk
    hidden: int = 0  # the width of the student's hidden states; 0 if the student is dense logits
    teacher_columns: int = 0  # how many columns of logits a row of the teacher takes in a chunk
    teacher_row_bytes: int = 0  # what a row of the teacher takes in a chunk besides those columns
    teacher_hidden: int = 0  # the width of the teacher's hidden states
    teacher_bytes: int = 0  # the teacher as the caller holds it
    weight_gradient: bool = True
    device: str = "cpu"
    backend: str = ""  # "reference" and "portable" hold more than the kernels do


def checked_sizes(
    chunk_size: int | None, memory_budget: int | None
) -> tuple[int | None, int | None]:
    """Both arguments as Python numbers; raise unless each is a positive int or None."""
    sizes = {"chunk_size": plain(chunk_size), "memory_budget": plain(memory_budget)}
    for name, value in sizes.items():
        if value is None:
            continue
        if type(value) is not int:
            raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    return sizes["chunk_size"], sizes["memory_budget"]


def plan(
    shape: Shape, chunk_size: int | None = None, memory_budget: int | None = None
) -> MemoryPlan:
    """The plan of a call. Errors name the last two arguments, which are those of fused_linear_kd_loss."""
    chunk_size, memory_budget = checked_sizes(chunk_size, memory_budget)
    low_precision = shape.dtype in LOW_PRECISION
    converts = low_precision and shape.logits_dtype != shape.dtype
    row_bytes = shape.vocabulary * shape.logits_dtype.itemsize
    row_bytes += shape.teacher_columns * max(shape.logits_dtype.itemsize, 4)
    logits_row = row_bytes
    row_bytes += shape.teacher_row_bytes
    # On a CPU, hidden states and their gradient are converted to float32.
    converted = 8 * (converts and shape.device == "cpu")
    row_bytes += (shape.hidden + shape.teacher_hidden) * (shape.dtype.itemsize + converted)
    if shape.backend == "reference":
        row_bytes += REFERENCE_TEMPORARIES * shape.vocabulary * 4
    if converts and shape.device != "cpu" and not shape.teacher_columns:
        # The gradient, converted to the weight's dtype.
        row_bytes += shape.vocabulary * shape.dtype.itemsize
    accumulator = 0
    if shape.hidden and shape.weight_gradient and low_precision:
        accumulator = 4 * shape.vocabulary * shape.hidden
    workspace = WORKSPACE
    if converts and shape.device == "cpu" and shape.hidden:
        width = max(shape.hidden, shape.teacher_hidden)
        workspace += 4 * width * min(slab_rows(width), shape.vocabulary)
    rows = max(shape.rows, 1)
    if shape.backend == "portable":
        workspace += piece_bytes(shape.vocabulary, wide(shape.logits_dtype), shape.device)
    fixed = accumulator + workspace
    if chunk_size is None:
        # The accumulator has the same size for every chunk size, so the default budget does not count it.
        budget = memory_budget or LINEAR_BUDGET.of(shape.device) + accumulator
        chunk_size = (budget - fixed) // row_bytes
        if chunk_size < 1:
            raise ValueError(
                f"memory_budget must be at least {fixed + row_bytes} bytes, which one row takes; got {budget}"
            )
        # Chunks of equal size, so that the last one is not a small remainder.
        chunk_size = -(-rows // -(-rows // chunk_size))
    chunk_size = min(chunk_size, rows)
    hidden = shape.rows * shape.hidden * shape.dtype.itemsize
    head = shape.vocabulary * shape.hidden * shape.dtype.itemsize
    return MemoryPlan(
        chunk_size,
        chunks=-(-rows // chunk_size),
        logits=chunk_size * logits_row,
        accumulator=accumulator,
        workspace=workspace + chunk_size * (row_bytes - logits_row),
        peak=fixed + chunk_size * row_bytes,
        student=hidden + head,
        teacher=shape.teacher_bytes,
        gradients=hidden + head * shape.weight_gradient,
        dense=3 * 4 * shape.rows * shape.vocabulary,
    )


def check_size(argument: str, value: object) -> int:
    """The value as an int; raise unless it is positive and small enough to be the size of a tensor."""
    size = plain(value)
    if type(size) is not int:
        raise TypeError(f"{argument} must be an int, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{argument} must be positive, got {size}")
    if size >= 2**63:
        raise ValueError(f"{argument} must fit in 64 bits, got {size}")
    return size


def memory_plan(
    rows: int,
    vocab_size: int,
    hidden_size: int,
    *,
    teacher: str = "linear",
    teacher_hidden_size: int | None = None,
    teacher_vocab_size: int | None = None,
    k: int = 64,
    dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    weight_gradient: bool = True,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    device: str | torch.device = "cpu",
) -> MemoryPlan:
    """The memory that :func:`fastkd.fused_linear_kd_loss` will hold, without making a tensor.

    With teacher="none" it is the memory that :func:`fastkd.fused_linear_logprobs` will hold in each pass.

    Args:
        rows: the number of positions; none is dropped.
        vocab_size: the number of columns, V.
        hidden_size: the width of the student's hidden states.
        teacher: the form of the teacher: "dense", "linear", "topk" or "ensemble" (of two linear teachers); or "none".
        teacher_hidden_size: the width of the hidden states of each teacher. None: hidden_size.
        teacher_vocab_size: the number of columns of the target model, for
            :func:`fastkd.response.fused_linear_draft_loss`. None: vocab_size.
        k: the number of tokens per row of a "topk" teacher.
        dtype: the dtype of hidden states, heads and dense teacher logits.
        logits_dtype: as in the loss.
        weight_gradient: whether the student's head is trained.
        chunk_size: as in the loss.
        memory_budget: as in the loss.
        device: "cpu", "cuda", ...

    Raises:
        ValueError, TypeError: an argument is invalid, or memory_budget is too small for one row.
    """
    width = hidden_size if teacher_hidden_size is None else teacher_hidden_size
    rows = check_size("rows", rows)
    vocab_size = check_size("vocab_size", vocab_size)
    hidden_size = check_size("hidden_size", hidden_size)
    k = check_size("k", k)
    width = check_size("teacher_hidden_size", width)
    columns_of_teacher = vocab_size
    if teacher_vocab_size is not None:
        columns_of_teacher = check_size("teacher_vocab_size", teacher_vocab_size)
    weight_gradient = plain(weight_gradient)
    if not isinstance(weight_gradient, bool):
        raise TypeError(
            f"weight_gradient must be True or False, got {type(weight_gradient).__name__}"
        )
    try:
        device_type = torch.device(device).type
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device must name a device, got {device!r}: {error}") from None
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    if logits_dtype not in (None, wide(dtype), dtype):
        raise ValueError(f"logits_dtype must be {wide(dtype)} or {dtype}; got {logits_dtype}")
    if not isinstance(teacher, str):
        raise TypeError(f"teacher must be the name of a form, got {type(teacher).__name__}")
    linear = (rows + columns_of_teacher) * width * dtype.itemsize
    dense = columns_of_teacher * dtype.itemsize
    # For each form: teacher_columns, teacher_row_bytes, teacher_hidden and teacher_bytes of Shape.
    forms = {
        "dense": (0, dense, 0, rows * dense),
        "linear": (columns_of_teacher, 0, width, linear),
        "topk": (0, TOPK_BYTES * k, 0, rows * k * 12),
        "ensemble": (2 * columns_of_teacher, 0, width, 2 * linear),
        "none": (0, 0, 0, 0),
    }
    if teacher not in forms:
        raise ValueError(f"teacher must be one of {', '.join(forms)}; got {teacher!r}")
    columns, row_bytes, teacher_hidden, teacher_bytes = forms[teacher]
    shape = Shape(
        rows,
        vocab_size,
        dtype,
        logits_dtype or wide(dtype),
        hidden_size,
        columns,
        row_bytes,
        teacher_hidden,
        teacher_bytes,
        weight_gradient,
        device_type,
    )
    return plan(shape, chunk_size, memory_budget)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits are computed by default from operands of this dtype."""
    return row_dtype(dtype)
