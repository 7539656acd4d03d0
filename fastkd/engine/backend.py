"""The backend of a call as the rest of the engine uses it: for dense or sparse teachers, in one process or in several.

A backend itself knows neither: :func:`kernels_for` puts what is missing around it.
"""

from __future__ import annotations

from typing import Any

from fastkd.backends import registry
from fastkd.backends.sparse import SparseRows
from fastkd.call.contract import Options


def kernels_for(backend: str, options: Options) -> Any:
    """What computes the rows of a call with these options; as a backend's module is (fastkd/call/contract.py)."""
    kernels = for_teacher(registry.load(backend), options)
    if options.shard is None:
        return kernels
    from fastkd.parallel.shards import SharedRows

    return SharedRows(kernels, options.shard)


def for_teacher(kernels: Any, options: Options) -> Any:
    """The backend, or the same for a sparse teacher where its own kd_rows takes none."""
    takes_it = not options.tail or getattr(kernels, "SPARSE", False)
    return kernels if takes_it else SparseRows(kernels)
