"""Losses on the teacher's response that are not one function of p and q, summed over the vocabulary.

Counted rows are computed in chunks, and the gradient of a chunk is computed with it in the forward. So a call holds
the gradient and the temporaries of one chunk (memory_budget). Selecting the counted rows synchronizes with the device,
so these losses cannot be captured in a CUDA graph. In a compiled graph each is one op, which runs as in eager mode.
"""

from fastkd.response.adaptive_kl import adaptive_kl_loss
from fastkd.response.dist import dist_loss
from fastkd.response.draft import DraftParts, draft_loss, fused_linear_draft_loss
from fastkd.response.policy import policy_distillation_loss
from fastkd.response.standardized import standardized_kd_loss
from fastkd.response.uld import common_positions, uld_loss

__all__ = [
    "DraftParts",
    "adaptive_kl_loss",
    "common_positions",
    "dist_loss",
    "draft_loss",
    "fused_linear_draft_loss",
    "policy_distillation_loss",
    "standardized_kd_loss",
    "uld_loss",
]
