"""Teachers that are not dense logits: what a loss accepts in their place.

All of them are constants: a loss has no gradient for them, and one whose tensors require grad raises.
docs/teachers.md says which form to use when; :func:`fastkd.memory_plan` says what each costs.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastkd.teachers.ensemble import MEANS, Ensemble
from fastkd.teachers.forms import Teacher, flatten, unflatten, weights_of
from fastkd.teachers.linear import LinearTeacher, check_linear
from fastkd.teachers.topk import TAILS, TopK

__all__ = [
    "MEANS",
    "TAILS",
    "Ensemble",
    "LinearTeacher",
    "Teacher",
    "TopK",
    "check_linear",
    "flatten",
    "unflatten",
    "weights_of",
]


def __getattr__(name: str) -> Any:
    """The package of the teacher cache at its first use, so that `import fastkd` does not load it."""
    if name == "cache":
        return importlib.import_module("fastkd.teachers.cache")
    raise AttributeError(f"module 'fastkd.teachers' has no attribute {name!r}")
