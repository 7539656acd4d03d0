"""The matrix products of a fused linear loss, summed in float32 (float64 for float64) whatever the operands are.

Where torch multiplies operands of lower precision into a wider result only by converting them, the weight is converted
a slab of rows at a time: a whole copy of an lm_head would be as large as the logits that a chunk avoids.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

SLAB_BYTES = 16 << 20  # of a converted part of the weight


def slab_rows(width: int) -> int:
    """Rows of a weight [V, width] that are converted at a time; at least 256, for the sake of the product."""
    return max(SLAB_BYTES // (4 * width), 256)


def _slabs(weight: Tensor) -> Iterator[slice]:
    step = slab_rows(weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def _widens(operand: Tensor) -> bool:
    """Whether torch multiplies operands like this into float32 by itself."""
    low = operand.dtype in (torch.bfloat16, torch.float16)
    return low and operand.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")


@functools.cache
def _accumulates(device: torch.device) -> bool:
    """Whether torch adds such a product to a float32 tensor by itself; the first release with `out_dtype` refuses."""
    operand = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, operand, operand, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True


def make_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Out [C, V] = hidden [C, H] @ weight [V, H].T + bias [V]."""
    if out.dtype == hidden.dtype == weight.dtype:
        if bias is None:
            return torch.mm(hidden, weight.T, out=out)
        return torch.addmm(bias, hidden, weight.T, out=out)
    if _widens(hidden) and out.dtype == torch.float32:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for slab in _slabs(weight):
            torch.mm(wide, weight[slab].to(out.dtype).T, out=out[:, slab])
    return out if bias is None else out.add_(bias)


def hidden_gradient(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """Out [C, H] = gradient [C, V] @ weight [V, H]."""
    if gradient.dtype == weight.dtype == out.dtype:
        torch.mm(gradient, weight, out=out)
    elif gradient.dtype == weight.dtype and _widens(weight):
        torch.mm(gradient, weight, out_dtype=out.dtype, out=out)
    else:
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for slab in _slabs(weight):
            total.addmm_(gradient[:, slab].to(total.dtype), weight[slab].to(total.dtype))
        out.copy_(total)


def add_weight_gradient(gradient: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
    """Total [V, H] += gradient [C, V].T @ hidden [C, H]; total = for the first chunk."""
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
    wide = hidden.to(total.dtype)
    for slab in _slabs(total):
        total[slab].addmm_(gradient[:, slab].T.to(total.dtype), wide, beta=beta)


def as_operand(gradient: Tensor, weight: Tensor, scratch: Tensor | None) -> Tensor:
    """A gradient [C, V] in the weight's precision, where torch multiplies in that; in scratch if there is some."""
    if gradient.dtype == weight.dtype or not _widens(weight):
        return gradient
    if scratch is None:
        return gradient.to(weight.dtype)
    room = scratch.flatten().view(weight.dtype)[: gradient.numel()].view(gradient.shape)
    return room.copy_(gradient)
