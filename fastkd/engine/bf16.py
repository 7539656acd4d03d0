"""Matrix products of bfloat16 operands with a float32 result, on CPUs with AMX.

torch multiplies bfloat16 matrices on a CPU only into a bfloat16 result, which rounds the logits. AMX accumulates in
float32, and MKL's gemm_bf16bf16f32 returns that sum; a torch that is linked with MKL exports the function. The function
depends on no global setting. torch.backends.mkldnn.matmul.fp32_precision would give the same result, but while it is
set, float32 products of other threads would be rounded too.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.backends.registry import available_backends, function
from fastkd.core.tensors import address

# cblas.h
_ROW_MAJOR, _AS_IS, _TRANSPOSED = 101, 111, 112
_INT_MAX = 2**31 - 1
# Elements that split() converts at once without the extension, so that temporary tensors stay in cache.
_PIECE = 1 << 17


class Halves(NamedTuple):
    """A float32 matrix as the sum of two bfloat16 matrices, which together keep 16 of the 24 bits."""

    high: Tensor
    low: Tensor


@functools.cache
def _gemm() -> Callable[..., None] | None:
    """MKL's function, or None if this torch or this CPU does not have it."""
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if has_amx is None or not has_amx():
        return None
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function: Any = ctypes.CDLL(str(library)).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    size, number, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    operand = [pointer, size]
    function.argtypes = [*[size] * 6, number, *operand, *operand, number, *operand]
    function.restype = None
    return function


@functools.cache
def _native_split() -> Callable[[Tensor], None] | None:
    """The cpu backend's function, or None if the extension is missing."""
    if available_backends()["cpu"] is not None:
        return None
    split: Callable[[Tensor], None] = function("cpu", "split_halves")
    return split


def available() -> bool:
    """Whether this process can compute such products."""
    return _gemm() is not None


def _rows_in_memory(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether MKL can read or write the matrix: the elements of each row are adjacent, and no two rows overlap."""
    rows, columns = matrix.shape
    return (
        type(matrix) in (Tensor, torch.nn.Parameter)
        and matrix.device.type == "cpu"
        and matrix.dtype == dtype
        and matrix.stride(1) == 1
        and 0 < rows <= _INT_MAX
        and 0 < columns <= matrix.stride(0) <= _INT_MAX
        and not matrix.is_neg()
        and not matrix._is_zerotensor()
    )


def multiplies(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether :func:`multiply` accepts these matrices, transposed or not."""
    return (
        available()
        and _rows_in_memory(a, torch.bfloat16)
        and _rows_in_memory(b, torch.bfloat16)
        and _rows_in_memory(out, torch.float32)
    )


def multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    add: bool = False,
) -> None:
    """Write a @ b to out, or add it to out; each operand is transposed first if asked for."""
    gemm = _gemm()
    assert gemm is not None and multiplies(a, b, out)
    (rows, columns), inner = out.shape, a.shape[0 if transpose_a else 1]
    gemm(
        _ROW_MAJOR, _TRANSPOSED if transpose_a else _AS_IS, _TRANSPOSED if transpose_b else _AS_IS,
        rows, columns, inner, 1.0, address(a), a.stride(0), address(b), b.stride(0), float(add),
        address(out), out.stride(0),
    )  # fmt: skip


def split(matrix: Tensor) -> Halves:
    """The halves of a contiguous float32 matrix, which take over its memory: the matrix loses its values."""
    rows, columns = matrix.shape
    both = matrix.view(torch.bfloat16)
    high, low = both[:, :columns], both[:, columns:]
    native = _native_split()
    if native is not None:
        native(matrix)
        return Halves(high, low)
    step = max(_PIECE // columns, 1)
    for start in range(0, rows, step):
        piece = slice(start, min(start + step, rows))
        values = matrix[piece]
        rounded = values.to(torch.bfloat16)
        # An infinite value is infinite in `high`; the difference would be NaN.
        rest = (values - rounded).nan_to_num_(0.0, 0.0, 0.0)
        high[piece], low[piece] = rounded, rest
    return Halves(high, low)
