"""fastkd: the loss that distils large language models, in one pass over the logits."""

from fastkd.backends import BackendUnavailable, available_backends
from fastkd.divergences import (
    TABLE as DIVERGENCES,
)
from fastkd.divergences import (
    ClosedForm,
    Divergence,
    alpha_beta,
    forward_kl,
    hellinger,
    jsd,
    mixture,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    squared_error,
    tvd,
)
from fastkd.functional import Parts, fused_linear_kd_loss, kd_loss
from fastkd.modules import FusedLinearKDLoss, KDLoss
from fastkd.plan import MemoryPlan, memory_plan
from fastkd.sampled import k1, k2, k3
from fastkd.teachers import Ensemble, LinearTeacher, TopK

__version__ = "0.1.0"

__all__ = [
    "DIVERGENCES",
    "BackendUnavailable",
    "ClosedForm",
    "Divergence",
    "Ensemble",
    "FusedLinearKDLoss",
    "KDLoss",
    "LinearTeacher",
    "MemoryPlan",
    "Parts",
    "TopK",
    "alpha_beta",
    "available_backends",
    "forward_kl",
    "fused_linear_kd_loss",
    "hellinger",
    "jsd",
    "k1",
    "k2",
    "k3",
    "kd_loss",
    "memory_plan",
    "mixture",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "squared_error",
    "tvd",
]
