"""Losses on the teacher's response that are no sum over the vocabulary of one function of p and q.

Rows that do not count are packed away, the others go through in chunks, and the gradient of a chunk is computed with
it in the forward: beside the gradient, a call holds what one chunk takes (memory_budget). Packing waits for the
device, so none of these can be recorded in a CUDA graph. In a compiled graph each is one op, which runs as it is here.
"""

from fastkd.response.adaptive_kl import adaptive_kl_loss
from fastkd.response.dist import dist_loss
from fastkd.response.policy import policy_distillation_loss
from fastkd.response.standardized import standardized_kd_loss
from fastkd.response.uld import common_positions, uld_loss

__all__ = [
    "adaptive_kl_loss",
    "common_positions",
    "dist_loss",
    "policy_distillation_loss",
    "standardized_kd_loss",
    "uld_loss",
]
