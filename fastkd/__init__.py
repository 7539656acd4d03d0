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
from fastkd.functional import Parts, kd_loss
from fastkd.modules import KDLoss

__version__ = "0.1.0"

__all__ = [
    "DIVERGENCES",
    "BackendUnavailable",
    "ClosedForm",
    "Divergence",
    "KDLoss",
    "Parts",
    "alpha_beta",
    "available_backends",
    "forward_kl",
    "hellinger",
    "jsd",
    "kd_loss",
    "mixture",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "squared_error",
    "tvd",
]
