"""The backend of a call, ready for sparse teachers and for a vocabulary that several processes share.

A backend by itself may support neither; :func:`kernels_for` wraps it in what it lacks.
"""

from __future__ import annotations

from typing import Any

from fastkd.backends import registry
from fastkd.backends.sparse import SparseRows
from fastkd.call.contract import Options


def kernels_for(backend: str, options: Options) -> Any:
    """The object that computes the rows of a call; it has the functions of a backend (fastkd/call/contract.py)."""
    kernels = for_teacher(registry.load(backend), options)
    if options.shard is None:
        return kernels
    from fastkd.parallel.shards import SharedRows

    return SharedRows(kernels, options.shard)


def for_teacher(kernels: Any, options: Options) -> Any:
    """The backend, wrapped in SparseRows if the teacher is sparse and the backend's own kd_rows supports none."""
    supported = not options.tail or getattr(kernels, "SPARSE", False)
    return kernels if supported else SparseRows(kernels)
