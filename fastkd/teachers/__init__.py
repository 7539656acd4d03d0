"""Teachers that a loss accepts instead of dense logits.

All of them are constants: the loss has no gradient for them, and raises if one of their tensors requires grad. The
exception is a RoutedTeacher of dense logits.
docs/teachers.md says when to use which; :func:`fastkd.memory_plan` says what each costs.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastkd.teachers.ensemble import MEANS, Ensemble
from fastkd.teachers.forms import Teacher, flatten, unflatten, weights_of
from fastkd.teachers.linear import LinearTeacher, check_linear
from fastkd.teachers.routed import RoutedTeacher, rows_of
from fastkd.teachers.topk import TAILS, TopK, support_union, taken

__all__ = [
    "MEANS",
    "TAILS",
    "Ensemble",
    "LinearTeacher",
    "RoutedTeacher",
    "Teacher",
    "TopK",
    "check_linear",
    "flatten",
    "rows_of",
    "support_union",
    "taken",
    "unflatten",
    "weights_of",
]


def __getattr__(name: str) -> Any:
    """Import the teacher cache at its first use, so that `import fastkd` does not load it."""
    if name == "cache":
        return importlib.import_module("fastkd.teachers.cache")
    raise AttributeError(f"module 'fastkd.teachers' has no attribute {name!r}")
