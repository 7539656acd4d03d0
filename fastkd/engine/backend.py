"""The backend of a call, ready for sparse teachers, for measures, and for a vocabulary that several processes share.

A backend by itself may support none of these; :func:`kernels_for` wraps it in what it lacks.
"""

from __future__ import annotations

from typing import Any

from fastkd.backends import registry
from fastkd.backends.measures import (
    DenseMeasures,
    MeasuredRows,
    SimplerLoss,
    SparseMeasures,
    WithMeasures,
    sweeps_have_measures,
)
from fastkd.backends.sparse import SparseRows
from fastkd.call.contract import Options, Want


def kernels_for(backend: str, options: Options, want: Want) -> Any:
    """The object that computes the rows of a call; it has the functions of a backend (fastkd/call/contract.py)."""
    kernels = for_teacher(registry.load(backend), options)
    if want.measures:
        kernels = with_measures(kernels, options)
    if options.shard is not None:
        from fastkd.parallel.shards import SharedRows

        kernels = SharedRows(kernels, options.shard)
    return MeasuredRows(kernels) if want.measures else kernels


def for_teacher(kernels: Any, options: Options) -> Any:
    """The backend, wrapped in SparseRows if the teacher is sparse and the backend's own kd_rows supports none."""
    supported = not options.tail or getattr(kernels, "SPARSE", False)
    return kernels if supported else SparseRows(kernels)


def with_measures(kernels: Any, options: Options) -> Any:
    """The backend of this teacher, wrapped in WithMeasures if its kd_rows does not compute the measures."""
    own = getattr(kernels, "MEASURES", ())
    if isinstance(kernels, SparseRows) or (options.tail and "sparse" in own):
        return kernels
    if options.tail:
        return WithMeasures(kernels, SparseMeasures())
    if "dense" not in own or options.shard is not None:
        return WithMeasures(kernels, DenseMeasures())
    if sweeps_have_measures(options):
        return kernels
    return WithMeasures(kernels, SimplerLoss(kernels))
