"""The environment variables that every call reads, so that a change takes effect at once."""

from __future__ import annotations

import functools
import os
from typing import Any

_encoded: Any = functools.cache(lambda *names: tuple(map(os.environ.encodekey, names)))


def variables(*names: str) -> tuple[str | None, ...]:
    """The values of environment variables; None for one that is not set.

    For a variable that is not set, os.environ.get takes ten times as long, because it raises and catches two errors. So
    this function first looks into the dictionary that os.environ keeps, whose keys are encoded. torch.compile cannot
    trace that.
    """
    values = getattr(os.environ, "_data", None)
    if values is not None and values.keys().isdisjoint(_encoded(*names)):
        return (None,) * len(names)
    return tuple(map(os.environ.get, names))
