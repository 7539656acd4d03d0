"""Helpers for tensors: which ones a kernel can read, their addresses, and which ones a graph can save.

Only :func:`address` asks a tensor for the address of its memory. An address does not carry the bits by which torch
marks a view as negated or conjugated, and a tensor may have no memory at all. So every tensor goes through
:func:`readable` before this package, or Triton's launcher, passes its address to a kernel.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def check_strided(argument: str, value: Tensor) -> None:
    """Raise unless the tensor has strides: sparse, nested and oneDNN tensors do not."""
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}"
        raise TypeError(f"{argument} must be dense, got {kind}")


def check_readable(argument: str, value: Tensor) -> None:
    """Raise unless a kernel can read the tensor: it has strides and values, and no transform traces it."""
    check_strided(argument, value)
    if torch.compiler.is_compiling():
        return  # the compiler traces with tensors that have no values, and does not read them
    if torch._C._functorch.is_functorch_wrapped_tensor(value) or _is_dual(value):
        # torch also raises RuntimeError for what its transforms do not support.
        raise RuntimeError(
            f"{argument} is being transformed by torch.func (vmap, grad, jvp, ...) or by forward-mode differentiation, "
            "which the loss does not support; call it outside of the transform, and differentiate with backward() or "
            "torch.autograd.grad"
        )
    if _has_no_values(value):
        raise TypeError(
            f"{argument} must have values, got a {type(value).__name__} on {value.device} without memory (from the "
            "meta device or FakeTensorMode); pass a tensor with values"
        )


def of_torch(*names: str) -> Any:
    """The module of torch with this path if something has imported it, else None; imports nothing.

    It is looked up by attributes rather than in sys.modules, all of which torch.compile would trace and guard.
    """
    module: Any = torch
    for name in names:
        module = getattr(module, name, None)
    return module


def _is_dual(value: Tensor) -> bool:
    """Whether the tensor carries a tangent of forward-mode differentiation."""
    forward = torch.autograd.forward_ad
    return forward._current_level >= 0 and forward.unpack_dual(value).tangent is not None


def _has_no_values(value: Tensor) -> bool:
    """Whether the tensor is a meta or fake tensor."""
    if value.is_meta or type(value) is Tensor:
        return value.is_meta
    module = of_torch("_subclasses", "fake_tensor")
    return module is not None and isinstance(value, module.FakeTensor)


def readable(tensor: MaybeTensor) -> MaybeTensor:
    """The tensor, or a copy if its memory holds other numbers than the tensor has, as in a negated view.

    Raises:
        TypeError: the tensor has elements but no memory.
    """
    if tensor is None:
        return tensor
    if type(tensor) is not Tensor:
        functional = of_torch("distributed", "_functional_collectives")
        if functional is not None and isinstance(tensor, functional.AsyncCollectiveTensor):
            tensor = tensor.wait()  # the result of a collective that has not finished
    if tensor._is_zerotensor():  # stands for zeros that are not in memory
        return tensor.clone()
    if tensor.is_neg() or tensor.is_conj():
        return tensor.resolve_conj().resolve_neg()
    return tensor


def address(tensor: Tensor | None) -> int:
    """Data pointer of a :func:`readable` tensor, or 0 for None.

    Raises:
        TypeError: the tensor has elements but no memory, or its memory holds other numbers than the tensor.
    """
    if tensor is None:
        return 0
    if tensor.is_neg() or tensor.is_conj():
        raise TypeError("a negated or conjugated view must be resolved before its address is taken")
    pointer = tensor.data_ptr()
    if pointer == 0 and tensor.numel():
        raise TypeError(f"a {type(tensor).__name__} on {tensor.device} has no memory to read")
    return pointer


def unit_stride(tensor: Tensor) -> Tensor:
    """The :func:`readable` tensor with a last stride of 1; a copy if it has another."""
    tensor = readable(tensor)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def writable(tensor: Tensor) -> bool:
    """Whether numbers written to the tensor's memory become its values."""
    return not (tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor())


def share_storage(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors with memory are views of one storage."""
    a, b = (tensor.untyped_storage().data_ptr() for tensor in (first, second))
    return a == b != 0


def savable(*tensors: MaybeTensor) -> tuple[MaybeTensor, ...]:
    """The tensors in a form that a graph can save: tensors that were made in inference mode are copied.

    An inference tensor has no version counter, so autograd would not notice a change before the backward; the copy
    cannot change. A compiled graph does not know how its inputs were made, so it copies every constant.
    """
    compiling = torch.compiler.is_compiling()
    return tuple([_savable(tensor, compiling) for tensor in tensors])


def savable_when_compiled(*tensors: MaybeTensor) -> tuple[MaybeTensor, ...]:
    """The :func:`savable` tensors in a compiled graph, whose compiler chooses what to save; else no change."""
    return savable(*tensors) if torch.compiler.is_compiling() else tensors


def _savable(tensor: MaybeTensor, compiling: bool) -> MaybeTensor:
    if not isinstance(tensor, Tensor) or tensor.requires_grad:
        return tensor  # an inference tensor cannot require grad
    if compiling:
        return copied(tensor)
    return tensor.clone() if tensor.is_inference() else tensor


@torch.library.custom_op("fastkd::copied", mutates_args=())
def copied(tensor: Tensor) -> Tensor:
    """A copy that is opaque to a compiler, which would otherwise save the tensor itself and copy it in the backward."""
    return tensor.clone()


@copied.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


def precision(device: torch.device) -> torch.dtype:
    """The dtype in which the reference computes: float64 if the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def finite_max(maximum: Tensor) -> Tensor:
    """The maximum with 0 for -inf, so that a row or shard without a finite logit can be centred without NaN."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return x.reciprocal().masked_fill_(x == 0, 0.0)
