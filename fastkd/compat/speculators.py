"""speculators: the losses of draft models for speculative decoding.

    import fastkd.compat.speculators

    fastkd.compat.speculators.register()  # its fused losses are fastkd's from now on

speculators' own fused losses need Triton; these run on every device. docs/stacks/speculators.md lists what differs.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from fastkd.response import draft_loss


def kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """``speculators.losses.kl_div_loss``: KL(p || q) of each position.

    Args:
        logits: [1, T, D], the draft model's; q is their softmax.
        targets: [1, T, D], the target model's logits of the draft vocabulary; p is their softmax.

    Returns:
        [1, T], float32.

    Raises:
        TypeError, ValueError: the arguments have different shapes, or are not floating point.
    """
    return draft_loss(logits, targets, "forward_kl", reduction="none")


def reverse_kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """``speculators.losses.reverse_kl_div_loss``: KL(q || p) of each position; otherwise as :func:`kl_div_loss`."""
    return draft_loss(logits, targets, "reverse_kl", reduction="none")


def js_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """``speculators.losses.js_div_loss``: the Jensen-Shannon divergence; otherwise as :func:`kl_div_loss`."""
    return draft_loss(logits, targets, "jsd", reduction="none")


def ce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """``speculators.losses.ce_loss``: -log q(argmax p) of each position; otherwise as :func:`kl_div_loss`."""
    return draft_loss(logits, targets, "cross_entropy", reduction="none")


def tv_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """``speculators.losses.tv_loss``: 1 - sum min(p, q) of each position; otherwise as :func:`kl_div_loss`."""
    return draft_loss(logits, targets, "tvd", reduction="none")


def neg_log_acceptance_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """``speculators.losses.neg_log_acceptance_loss``: -log max(sum min(p, q), 1e-5); else as :func:`kl_div_loss`."""
    return draft_loss(logits, targets, "nla", reduction="none")


def lk_hybrid_loss(logits: Tensor, targets: Tensor, eta: float = 3.0) -> Tensor:
    """``speculators.losses.lk_hybrid_loss``: l KL(p || q) + (1 - l) TV(p, q), l = exp(-eta sg(sum min(p, q))).

    sg stops the gradient.

    Args:
        logits: as in :func:`kl_div_loss`.
        targets: as in :func:`kl_div_loss`.
        eta: not negative.
    """
    return draft_loss(logits, targets, "lk_hybrid", eta=eta, reduction="none")


def register() -> None:
    """Make speculators use these functions for its loss implementation "fused", under the same names.

    Call it in every process, before a model resolves its loss.

    Raises:
        ImportError: speculators is not installed.
    """
    utils: Any = importlib.import_module("speculators.losses.utils")
    for name, function in {
        "kl_div": kl_div_loss,
        "rkl": reverse_kl_div_loss,
        "jsd": js_div_loss,
        "ce": ce_loss,
        "tv": tv_loss,
        "nla": neg_log_acceptance_loss,
        "lk_hybrid": lk_hybrid_loss,
    }.items():
        setattr(utils, function.__name__, function)
        utils._LOSS_FN_MAPS["fused"][name] = function
