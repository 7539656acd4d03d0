"""The matrix products of a fused linear loss, accumulated in float32, or in float64 for float64 operands.

On a CPU with AMX, bfloat16 operands are multiplied by fastkd/engine/bf16.py. Where operands of lower precision can be
multiplied into a wider result only after converting them, the weight is converted a slab of rows at a time: a converted
copy of a whole lm_head would be as large as the logits that chunks avoid.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd.engine import bf16

# The size of a converted slab of a weight.
SLAB_BYTES = 16 << 20
# The size of an operand or a product of AMX that is processed at a time. It stays in cache: on a Xeon with AMX, the
# logits of a head of 49,152 x 576 then take 0.75 of the time, and the rounded gradient of the head 0.6.
AMX_SLAB_BYTES = 4 << 20


def slab_rows(width: int) -> int:
    """The number of rows of a weight [V, width] in a slab: at least 256, so that the products stay efficient."""
    return max(SLAB_BYTES // (4 * width), 256)


def _slabs(weight: Tensor, step: int | None = None) -> Iterator[slice]:
    step = slab_rows(weight.shape[1]) if step is None else step
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def _widens(operand: Tensor) -> bool:
    """Whether torch can multiply such operands into a float32 result without converting them."""
    low_precision = operand.dtype in (torch.bfloat16, torch.float16)
    return (
        low_precision and operand.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")
    )


@functools.cache
def _accumulates(device: torch.device) -> bool:
    """Whether torch can add such a product to a float32 tensor; the first release with `out_dtype` raises."""
    operand = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, operand, operand, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True


def make_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write hidden [C, H] @ weight [V, H].T + bias [V] to out [C, V], and return it."""
    if out.dtype == hidden.dtype == weight.dtype:
        if bias is None:
            return torch.mm(hidden, weight.T, out=out)
        return torch.addmm(bias, hidden, weight.T, out=out)
    if _widens(hidden) and out.dtype == torch.float32:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    elif bf16.multiplies(hidden, weight, out):
        # MKL packs the hidden states again for each slab, so slabs are much longer than the hidden states.
        step = max(AMX_SLAB_BYTES // (2 * weight.shape[1]), 8 * hidden.shape[0])
        for slab in _slabs(weight, step):
            bf16.multiply(hidden, weight[slab], out[:, slab], transpose_b=True)
    else:
        wide_hidden = hidden.to(out.dtype)
        for slab in _slabs(weight):
            torch.mm(wide_hidden, weight[slab].to(out.dtype).T, out=out[:, slab])
    return out if bias is None else out.add_(bias)


def hidden_gradient(gradient: Tensor | bf16.Halves, weight: Tensor, out: Tensor) -> None:
    """Write gradient [C, V] @ weight [V, H] to out [C, H]."""
    if isinstance(gradient, bf16.Halves):
        total = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        bf16.multiply(gradient.high, weight, total)
        bf16.multiply(gradient.low, weight, total, add=True)
        out.copy_(total)
    elif gradient.dtype == weight.dtype == out.dtype:
        torch.mm(gradient, weight, out=out)
    elif gradient.dtype == weight.dtype and _widens(weight):
        torch.mm(gradient, weight, out_dtype=out.dtype, out=out)
    else:
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for slab in _slabs(weight):
            total.addmm_(gradient[:, slab].to(total.dtype), weight[slab].to(total.dtype))
        out.copy_(total)


def add_weight_gradient(
    gradient: Tensor | bf16.Halves, hidden: Tensor, total: Tensor, first: bool
) -> None:
    """Add gradient [C, V].T @ hidden [C, H] to total [V, H]; the first chunk overwrites total.

    On a CPU, total may be bfloat16 if there is no other chunk; the float32 product is then rounded to it.
    """
    if total.dtype == torch.bfloat16 and total.device.type == "cpu":
        _round_weight_gradient(gradient, hidden, total)
        return
    if isinstance(gradient, bf16.Halves):
        bf16.multiply(gradient.high, hidden, total, transpose_a=True, add=not first)
        bf16.multiply(gradient.low, hidden, total, transpose_a=True, add=True)
        return
    if bf16.multiplies(gradient, hidden, total):
        bf16.multiply(gradient, hidden, total, transpose_a=True, add=not first)
        return
    beta = 0 if first else 1
    if gradient.dtype == hidden.dtype == total.dtype:
        total.addmm_(gradient.T, hidden, beta=beta)
        return
    if gradient.dtype == hidden.dtype and _widens(hidden):
        if first:
            torch.mm(gradient.T, hidden, out_dtype=total.dtype, out=total)
            return
        if _accumulates(hidden.device):
            torch.addmm(total, gradient.T, hidden, out_dtype=total.dtype, out=total)
            return
        for slab in _slabs(total):
            total[slab] += torch.mm(gradient[:, slab].T, hidden, out_dtype=total.dtype)
        return
    wide_hidden = hidden.to(total.dtype)
    for slab in _slabs(total):
        total[slab].addmm_(gradient[:, slab].T.to(total.dtype), wide_hidden, beta=beta)


def _round_weight_gradient(gradient: Tensor | bf16.Halves, hidden: Tensor, total: Tensor) -> None:
    """Write gradient.T @ hidden to total, computed in float32 a slab at a time."""
    width = total.shape[1]
    step = min(max(AMX_SLAB_BYTES // (4 * width), 1024), slab_rows(width))
    buffer = torch.empty(min(step, len(total)), width, dtype=torch.float32)
    for slab in _slabs(total, step):
        product = buffer[: slab.stop - slab.start]
        if isinstance(gradient, bf16.Halves):
            part: Tensor | bf16.Halves = bf16.Halves(gradient.high[:, slab], gradient.low[:, slab])
        else:
            part = gradient[:, slab]
        add_weight_gradient(part, hidden, product, True)
        total[slab] = product


def as_operand(
    gradient: Tensor, hidden: Tensor, weight: Tensor, scratch: Tensor | None
) -> Tensor | bf16.Halves:
    """The gradient [C, V] in the form in which it is multiplied with hidden states and weight.

    On a GPU it is converted to the weight's dtype, into scratch if given. On a CPU with AMX its halves take over its
    memory, so the caller must not read it afterwards. Elsewhere it is returned as it is.
    """
    if gradient.dtype == weight.dtype:
        return gradient
    if _widens(weight):
        if scratch is None:
            return gradient.to(weight.dtype)
        converted = scratch.flatten().view(weight.dtype)[: gradient.numel()].view(gradient.shape)
        return converted.copy_(gradient)
    if (
        gradient.is_contiguous()
        and bf16.multiplies(hidden, weight, gradient)
        and 2 * gradient.shape[1] < 2**31  # the distance of two rows of a half
    ):
        return bf16.split(gradient)
    return gradient
