"""The triton backend: the functions of its modules that fastkd/call/contract.py asks of a backend."""

from .draft import draft_rows
from .launch import empty, kd_rows, scale_rows_, shard_results, shard_statistics, shard_sums
from .logprobs import logprob_gradients, logprob_statistics
from .measures import measure_rows
from .mutual import mutual_rows
from .sparse import gather_events, spread_gradient

__all__ = [
    "draft_rows", "empty", "gather_events", "kd_rows", "logprob_gradients", "logprob_statistics", "measure_rows",
    "mutual_rows", "scale_rows_", "shard_results", "shard_statistics", "shard_sums", "spread_gradient",
]  # fmt: skip
