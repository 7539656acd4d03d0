"""Losses and estimates from the log-probabilities of tokens that the student has sampled (on-policy distillation).

Every function takes one log-probability per token and model, [..., T]; no function takes logits. The student's, with a
gradient, come from :func:`fastkd.fused_linear_logprobs`, or from ``log_softmax(logits)`` at the sampled tokens.

:func:`on_policy_loss` is the loss to train with. :func:`policy_advantages` and :func:`importance_weights` compute two
of its arguments, advantages and weight. :func:`k1`, :func:`k2` and :func:`k3` estimate KL(q || p) token by token.

If the logits of both models are available, ``fastkd.kd_loss`` with reverse KL on the same positions has the same
expected gradient as the policy gradient and k2, without the noise of sampling.
"""

from fastkd.sampled.estimators import k1, k2, k3
from fastkd.sampled.policy import (
    PolicyParts,
    importance_weights,
    on_policy_loss,
    policy_advantages,
)

__all__ = [
    "PolicyParts",
    "importance_weights",
    "k1",
    "k2",
    "k3",
    "on_policy_loss",
    "policy_advantages",
]
