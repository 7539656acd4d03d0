"""Access to the module inside a wrapper."""

from __future__ import annotations

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without torch.compile and DistributedDataParallel, which change the names of its layers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]  # a module
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model
