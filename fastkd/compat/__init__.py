"""Adapters: the losses of other stacks, with their signatures and their numbers, computed by fastkd.

An adapter matches a stack: the names and the order of its arguments, its defaults, its reductions and its factors of
temperature. Quirks of a stack live in its adapter and never in the losses that it calls; where an adapter does differ,
its docstring and the stack's page in docs/stacks say so. A stack is imported where one of its classes is asked for,
and by no import of a module here; its functions need none.

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
