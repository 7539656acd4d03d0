"""Adapters that compute the losses of other stacks with fastkd, under the same signatures and with the same results.

An adapter matches its stack's argument names and order, defaults, reductions and temperature factors. Quirks of a stack
are confined to its adapter; fastkd's own losses do not know them. Where an adapter deliberately differs, its docstring
and the stack's page in docs/stacks say so. Importing these modules does not import the stacks: a stack is imported only
when a class that subclasses one of its own is accessed.

    fastkd.compat.trl            TRL: GKDTrainer, DistillationTrainer and their losses
    fastkd.compat.transformers   the Hugging Face Trainer
    fastkd.compat.liger          Liger Kernel
    fastkd.compat.torchtune      torchtune
    fastkd.compat.modelopt       NVIDIA Model-Optimizer
    fastkd.compat.megatron       Megatron-LM and NeMo-RL
    fastkd.compat.lightning      Lightning
    fastkd.compat.mdistiller     mdistiller
    fastkd.compat.torchdistill   torchdistill
"""

import importlib
from types import ModuleType

_STACKS = (
    "liger",
    "lightning",
    "mdistiller",
    "megatron",
    "modelopt",
    "torchdistill",
    "torchtune",
    "transformers",
    "trl",
)


def __getattr__(name: str) -> ModuleType:
    if name in _STACKS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
