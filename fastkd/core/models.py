"""The module inside what wraps it."""

from __future__ import annotations

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in what torch.compile and DistributedDataParallel make of it: its names are those that are known."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]  # a module
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model
