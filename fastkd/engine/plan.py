"""How many rows a chunk has, and what a call of a chunked loss holds at its peak."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastkd.backends.pieces import piece_bytes
from fastkd.call.contract import row_dtype
from fastkd.core.scalars import plain
from fastkd.engine.matmul import slab_rows


class Budget(NamedTuple):
    """Bytes of the chunks of a call that passes no memory_budget."""

    cpu: int
    other: int  # on any other device

    def of(self, device: str) -> int:
        """The bytes on a type of device."""
        return self.cpu if device == "cpu" else self.other


# Beside the accumulator of the weight's gradient. A chunk reads and writes all of that, 8 V H bytes: for a head of
# 128,256 x 4,096 this takes 1.4 ms on an H100, and the products of a chunk of 2,048 rows 11 ms. That many rows fit.
LINEAR_BUDGET = Budget(384 << 20, 2112 << 20)
# Without matrix products a chunk only has to be large enough for the device, and on a CPU small enough for the cache.
RESPONSE_BUDGET = Budget(32 << 20, 1 << 30)
# Threads' scratch memory, the packing of matrix products, tensors of one value a row.
WORKSPACE = 16 << 20
# [C, V] tensors that the reference holds at once, beside the logits.
REFERENCE_TEMPORARIES = 14
# A token of a sparse teacher in a chunk: its id, and float32 logits, log-probabilities and gradients of both sides.
TOPK_BYTES = 32
LOW_PRECISION = (torch.bfloat16, torch.float16)


class MemoryPlan(NamedTuple):
    """What a chunked call holds, in bytes."""

    chunk_size: int  # rows
    chunks: int
    logits: int  # of a chunk: the student's, in which the gradient is computed in place, and the teacher's
    accumulator: (
        int  # the float32 sum of the weight's gradient, where the weight is of lower precision
    )
    workspace: int
    peak: int  # the sum of logits, accumulator and workspace: all that is held beyond inputs and gradients
    student: int  # the student's hidden states and head
    teacher: int  # the teacher in its form, as the caller holds it
    gradients: int  # of hidden states and weight
    dense: (
        int  # what float32 logits of both and the student's gradient would take in place of `peak`
    )


class Shape(NamedTuple):
    """What decides the memory of a call; widths in columns, dtypes of the operands."""

    rows: int
    vocabulary: int
    dtype: torch.dtype  # of the student's hidden states, or of its logits
    logits_dtype: torch.dtype  # of a chunk
    hidden: int = 0  # 0: the student is dense logits
    teacher_columns: int = 0  # of float32 or logits_dtype that a chunk of the teacher takes
    teacher_row_bytes: int = 0  # whatever else a row of the teacher takes in a chunk
    teacher_hidden: int = 0
    teacher_bytes: int = 0
    weight_gradient: bool = True
    device: str = "cpu"
    backend: str = ""  # "reference" and "portable" hold more than the kernels do


def checked_sizes(
    chunk_size: int | None, memory_budget: int | None
) -> tuple[int | None, int | None]:
    """Both as Python's numbers; raise unless each is a positive int or None."""
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
    """The plan of a call; the arguments are those of fused_linear_kd_loss, which a call names in errors."""
    chunk_size, memory_budget = checked_sizes(chunk_size, memory_budget)
    low = shape.dtype in LOW_PRECISION
    converts = low and shape.logits_dtype != shape.dtype
    a_row = shape.vocabulary * shape.logits_dtype.itemsize
    a_row += shape.teacher_columns * max(shape.logits_dtype.itemsize, 4)
    logits = a_row
    a_row += shape.teacher_row_bytes
    converted = 8 * (
        converts and shape.device == "cpu"
    )  # hidden states and their gradient in float32
    a_row += (shape.hidden + shape.teacher_hidden) * (shape.dtype.itemsize + converted)
    if shape.backend == "reference":
        a_row += REFERENCE_TEMPORARIES * shape.vocabulary * 4
    if converts and shape.device != "cpu" and not shape.teacher_columns:
        a_row += shape.vocabulary * shape.dtype.itemsize  # the gradient in the weight's precision
    accumulator = 0
    if shape.hidden and shape.weight_gradient and low:
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
        # The accumulator is there whatever the chunks are: a default leaves the same room beside it.
        budget = memory_budget or LINEAR_BUDGET.of(shape.device) + accumulator
        chunk_size = (budget - fixed) // a_row
        if chunk_size < 1:
            raise ValueError(
                f"memory_budget must be at least {fixed + a_row} bytes, which one row takes; got {budget}"
            )
        chunk_size = -(
            -rows // -(-rows // chunk_size)
        )  # chunks of one size, in place of a last one that is small
    chunk_size = min(chunk_size, rows)
    hidden = shape.rows * shape.hidden * shape.dtype.itemsize
    head = shape.vocabulary * shape.hidden * shape.dtype.itemsize
    return MemoryPlan(
        chunk_size,
        chunks=-(-rows // chunk_size),
        logits=chunk_size * logits,
        accumulator=accumulator,
        workspace=workspace + chunk_size * (a_row - logits),
        peak=fixed + chunk_size * a_row,
        student=hidden + head,
        teacher=shape.teacher_bytes,
        gradients=hidden + head * shape.weight_gradient,
        dense=3 * 4 * shape.rows * shape.vocabulary,
    )


def check_size(argument: str, value: object) -> int:
    """The value as an int; raise unless it is a positive one that a tensor can have for a size."""
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
    k: int = 64,
    dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    weight_gradient: bool = True,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    device: str | torch.device = "cpu",
) -> MemoryPlan:
    """What :func:`fastkd.fused_linear_kd_loss` will hold, before there is a tensor.

    Args:
        rows: positions, all of them counted.
        vocab_size: V.
        hidden_size: the student's width.
        teacher: its form: "dense", "linear", "topk", "ensemble" (of linear teachers).
        teacher_hidden_size: the teacher's width, of each where there are several (two are assumed); None: as the
            student's.
        k: tokens of a "topk" teacher.
        dtype: of hidden states, heads and dense teacher logits.
        logits_dtype: as in the loss.
        weight_gradient: whether the student's head is trained.
        chunk_size: as in the loss.
        memory_budget: as in the loss.
        device: "cpu", "cuda", ...

    Raises:
        ValueError, TypeError: as the loss raises for chunk_size and memory_budget; an unknown form of teacher.
    """
    width = hidden_size if teacher_hidden_size is None else teacher_hidden_size
    rows = check_size("rows", rows)
    vocab_size = check_size("vocab_size", vocab_size)
    hidden_size = check_size("hidden_size", hidden_size)
    k = check_size("k", k)
    width = check_size("teacher_hidden_size", width)
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
    linear = (rows + vocab_size) * width * dtype.itemsize
    # columns of logits a chunk, other bytes a row of a chunk, width of the hidden states, bytes the caller holds
    forms = {
        "dense": (0, vocab_size * dtype.itemsize, 0, rows * vocab_size * dtype.itemsize),
        "linear": (vocab_size, 0, width, linear),
        "topk": (0, TOPK_BYTES * k, 0, rows * k * 12),
        "ensemble": (2 * vocab_size, 0, width, 2 * linear),
    }
    if teacher not in forms:
        raise ValueError(f"teacher must be one of {', '.join(forms)}; got {teacher!r}")
    columns, row_bytes, teacher_hidden, held = forms[teacher]
    shape = Shape(
        rows,
        vocab_size,
        dtype,
        logits_dtype or wide(dtype),
        hidden_size,
        columns,
        row_bytes,
        teacher_hidden,
        held,
        weight_gradient,
        device_type,
    )
    return plan(shape, chunk_size, memory_budget)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What logits are computed in by default, from operands of that dtype."""
    return row_dtype(dtype)
