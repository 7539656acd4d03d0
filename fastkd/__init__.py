"""fastkd: knowledge-distillation losses for large language models, without a tensor of probabilities in memory."""

import importlib
from typing import TYPE_CHECKING, Any

from fastkd.backends.registry import BackendUnavailable, available_backends
from fastkd.divergences import (
    TABLE as DIVERGENCES,
)
from fastkd.divergences import (
    ClosedForm,
    Divergence,
    alpha_beta,
    dkd,
    forward_kl,
    hellinger,
    jsd,
    mixture,
    nkd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    smooth_l1,
    soft_cross_entropy,
    squared_error,
    tvd,
)
from fastkd.engine.plan import MemoryPlan, memory_plan
from fastkd.functional import MeasuredParts, Parts, fused_linear_kd_loss, kd_loss
from fastkd.logprobs import LogProbs, StudentTopK, fused_linear_logprobs, student_topk
from fastkd.modules import FusedLinearKDLoss, KDLoss
from fastkd.teachers import Ensemble, LinearTeacher, RoutedTeacher, TopK, support_union

__version__ = "0.1.0"


# Modules that are imported at their first use, so that `import fastkd` stays fast.
_AT_FIRST_USE = (
    "calibration",
    "compat",
    "distiller",
    "features",
    "online",
    "parallel",
    "relations",
    "response",
    "sampled",
    "sequences",
    "serving",
)

if TYPE_CHECKING:
    from fastkd.distiller import Distiller, Term
else:  # a type checker that sees __getattr__ accepts every name

    def __getattr__(name: str) -> Any:
        """Import an optional module, or a name from one, when it is first accessed."""
        if name in _AT_FIRST_USE:
            return importlib.import_module(f"fastkd.{name}")
        if name in ("Distiller", "Term"):
            return getattr(importlib.import_module("fastkd.distiller"), name)
        raise AttributeError(f"module 'fastkd' has no attribute {name!r}")


__all__ = [
    "DIVERGENCES",
    "BackendUnavailable",
    "ClosedForm",
    "Distiller",
    "Divergence",
    "Ensemble",
    "FusedLinearKDLoss",
    "KDLoss",
    "LinearTeacher",
    "LogProbs",
    "MeasuredParts",
    "MemoryPlan",
    "Parts",
    "RoutedTeacher",
    "StudentTopK",
    "Term",
    "TopK",
    "alpha_beta",
    "available_backends",
    "dkd",
    "forward_kl",
    "fused_linear_kd_loss",
    "fused_linear_logprobs",
    "hellinger",
    "jsd",
    "kd_loss",
    "memory_plan",
    "mixture",
    "nkd",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "smooth_l1",
    "soft_cross_entropy",
    "squared_error",
    "student_topk",
    "support_union",
    "tvd",
]
