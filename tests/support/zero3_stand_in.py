"""A stand-in for DeepSpeed ZeRO-3 in one process, with the states of its parameters and the hooks of its modules.

tests/compat/test_compat_heads.py runs the real one if it is installed. Here a parameter is empty except while a module
that owns it runs, forward or backward, and its gradient is taken away as soon as it has been accumulated, as by the
hook that reduces it. A gradient that arrives while the parameter is empty raises.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class ZeroParamStatus(enum.Enum):
    """The states of a parameter."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2


class _BeforeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: nn.Module, output: Tensor) -> Tensor:
        """Return the output."""
        ctx.module = module
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gather the module's parameters."""
        for parameter in ctx.module.parameters(recurse=False):
            _gather(parameter)
        return None, gradients[0]


def _gather(parameter: Any) -> None:
    if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE:
        parameter.data = parameter.ds_tensor.view(parameter.ds_shape).clone()
        parameter.ds_status = ZeroParamStatus.AVAILABLE
        parameter.gathered += 1


def _partition(parameter: Any) -> None:
    parameter.data = torch.empty(0)
    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def _reduce(parameter: Any) -> None:
    assert parameter.ds_status is ZeroParamStatus.AVAILABLE, "a gradient for an empty parameter"
    assert parameter.grad.shape == parameter.ds_shape
    parameter.reduced = parameter.reduced + parameter.grad
    parameter.grad = None
    _partition(parameter)


def partition(*modules: nn.Module, hooks: bool = True) -> None:
    """Partition the parameters of some modules. hooks: as by deepspeed.initialize; without, as by zero.Init.

    torch's attention cannot be among them: it reads the weight of a submodule without calling it, for which DeepSpeed
    has code of its own.
    """
    parameter: Any
    for number, parameter in enumerate(nn.ModuleList(modules).parameters()):
        parameter.ds_id, parameter.ds_shape, parameter.gathered = number, parameter.shape, 0
        parameter.ds_tensor = parameter.detach().clone().flatten()
        parameter.reduced = torch.zeros(parameter.shape)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_reduce)
            parameter.keeps_node = parameter.expand_as(parameter)  # its node has the whole shape
        _partition(parameter)
    for module in modules if hooks else ():
        module.register_forward_pre_hook(_before)
        module.register_forward_hook(_after)


def _before(module: nn.Module, inputs: Any) -> None:
    for parameter in module.parameters(recurse=False):
        _gather(parameter)


def _after(module: nn.Module, inputs: Any, output: Any) -> Any:
    for parameter in module.parameters(recurse=False):
        _partition(parameter)

    def attached(value: Any) -> Any:
        trains = isinstance(value, Tensor) and value.requires_grad
        return _BeforeBackward.apply(module, value) if trains else value

    return tree_map(attached, output)
