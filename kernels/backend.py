"""The triton backend: the functions of its modules that fastkd/call/contract.py asks of a backend."""

from .launch import empty, kd_rows, scale_rows_, shard_results, shard_statistics, shard_sums
from .measures import measure_rows
from .mutual import mutual_rows
from .sparse import gather_events, spread_gradient

__all__ = [
    "empty", "gather_events", "kd_rows", "measure_rows", "mutual_rows", "scale_rows_", "shard_results",
    "shard_statistics", "shard_sums", "spread_gradient",
]  # fmt: skip
