"""The triton backend: the functions of its modules that fastkd/call/contract.py asks of a backend."""

from .draft import draft_rows
from .launch import empty, kd_rows, scale_rows_, shard_results, shard_statistics, shard_sums
from .logprobs import logprob_gradients, logprob_statistics
from .mutual import mutual_rows
from .sparse import gather_events, spread_gradient

# kd_rows computes the measures of dense rows.
MEASURES = ("dense",)

__all__ = [
    "MEASURES", "draft_rows", "empty", "gather_events", "kd_rows", "logprob_gradients", "logprob_statistics",
    "mutual_rows", "scale_rows_", "shard_results", "shard_statistics", "shard_sums", "spread_gradient",
]  # fmt: skip
