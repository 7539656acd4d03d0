"""Tensors as the losses meet them: what a kernel can read, where that lies in memory, and what a graph can save.

:func:`address` is the one place of the package that asks a tensor where its memory is. An address says nothing of the
bits by which torch marks a view as negated or conjugated, nor whether there is memory at all, so every tensor goes
through :func:`readable` before a kernel is given its address, by this package or by Triton's launcher.
"""

from __future__ import annotations

import sys
from typing import TypeVar

import torch
from torch import Tensor

Given = TypeVar("Given", Tensor, Tensor | None)


def check_strided(argument: str, value: Tensor) -> None:
    """Raise unless it is laid out by strides: neither sparse, nor nested, nor of a layout of oneDNN."""
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}"
        raise TypeError(f"{argument} must be dense, got {kind}")


def check_readable(argument: str, value: Tensor) -> None:
    """Raise unless a kernel can read it: it is laid out by strides, holds numbers, and no transform traces it."""
    check_strided(argument, value)
    if torch.compiler.is_compiling():
        return  # the compiler's stand-ins hold no numbers, and are not read
    if torch._C._functorch.is_functorch_wrapped_tensor(value) or _is_dual(value):
        raise RuntimeError(  # as torch raises for what its transforms do not support
            f"{argument} is being transformed by torch.func (vmap, grad, jvp, ...) or by forward-mode differentiation, "
            "which the loss does not support; call it outside of the transform, and differentiate with backward() or "
            "torch.autograd.grad"
        )
    if _has_no_numbers(value):
        raise TypeError(
            f"{argument} holds no numbers, got a {type(value).__name__} on {value.device} without memory (the meta "
            "device and FakeTensorMode make such); pass a tensor with values"
        )


def _is_dual(value: Tensor) -> bool:
    """Whether it carries a tangent of forward-mode differentiation."""
    forward = torch.autograd.forward_ad
    return forward._current_level >= 0 and forward.unpack_dual(value).tangent is not None


def _has_no_numbers(value: Tensor) -> bool:
    """Whether its class or device stands for a tensor that is not there."""
    if value.is_meta or type(value) is Tensor:
        return value.is_meta
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(value, module.FakeTensor)


def readable(tensor: Given) -> Given:
    """The tensor with the numbers that its memory holds: a copy where they are others, as in a negated view.

    Raises:
        TypeError: it has elements and no memory.
    """
    if tensor is None:
        return tensor
    if type(tensor) is not Tensor:
        functional = sys.modules.get("torch.distributed._functional_collectives")
        if functional is not None and isinstance(tensor, functional.AsyncCollectiveTensor):
            tensor = tensor.wait()  # the result of a collective that is still under way
    if tensor._is_zerotensor():  # stands for zeros that are not in memory
        return tensor.clone()
    return tensor.resolve_conj().resolve_neg()


def address(tensor: Tensor | None) -> int:
    """Where the memory of a :func:`readable` tensor begins; 0 for None.

    Raises:
        TypeError: the tensor has elements and no memory, or its memory holds other numbers than the tensor.
    """
    if tensor is None:
        return 0
    if tensor.is_neg() or tensor.is_conj():
        raise TypeError("an address does not carry the bit by which torch marks a negated view")
    found = tensor.data_ptr()
    if found == 0 and tensor.numel():
        raise TypeError(f"a {type(tensor).__name__} on {tensor.device} has no memory to read")
    return found


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor :func:`readable` with a last stride of 1; a copy where it is not."""
    tensor = readable(tensor)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def writable(tensor: Tensor) -> bool:
    """Whether what is written at its address is what the tensor then holds."""
    return not (tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor())


def share_storage(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors with memory are views of one storage."""
    a, b = (tensor.untyped_storage().data_ptr() for tensor in (first, second))
    return a == b != 0


def savable(*tensors: Given) -> tuple[Given, ...]:
    """The tensors as a graph can save them: one that was made in inference mode as a copy.

    Such a tensor has no version by which autograd would notice that it has changed before the backward; a copy cannot
    change. A compiled graph is not told how its inputs were made, so there every constant is copied.
    """
    compiling = torch.compiler.is_compiling()
    return tuple(_savable(tensor, compiling) for tensor in tensors)


def savable_when_compiled(*tensors: Given) -> tuple[Given, ...]:
    """:func:`savable` tensors in a compiled graph, where the compiler chooses what it saves; else as they are."""
    return savable(*tensors) if torch.compiler.is_compiling() else tensors


def _savable(tensor: Given, compiling: bool) -> Given:
    if not isinstance(tensor, Tensor) or tensor.requires_grad:
        return tensor  # what is trained was not made in inference mode
    if compiling:
        return copied(tensor)
    return tensor.clone() if tensor.is_inference() else tensor


@torch.library.custom_op("fastkd::copied", mutates_args=())
def copied(tensor: Tensor) -> Tensor:
    """A copy that a compiler does not see through: it would save the tensor itself, and copy that in the backward."""
    return tensor.clone()


@copied.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


def precision(device: torch.device) -> torch.dtype:
    """The dtype in which the reference computes: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def finite_max(maximum: Tensor) -> Tensor:
    """The maximum with 0 for -inf, so that a row or shard without a finite logit can be centred without NaN."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return x.reciprocal().masked_fill_(x == 0, 0.0)
