"""Estimators of KL(q || p) from tokens sampled from the student q, for on-policy distillation.

For a sampled token x, log r = log p(x) - log q(x) (Schulman, "Approximating KL Divergence", 2020). The gradient of each
estimator treats the samples as fixed, so only k2 has the gradient of KL(q || p) in expectation:

    k1  gradient -d log r = d log q(x), which is 0 in expectation. To train on k1 use the score function,
        -sg(log r) d log q(x), where sg stops the gradient.
    k2  gradient -log r d log q(x), in expectation the gradient of KL(q || p)
    k3  gradient (1 - r) d log q(x), in expectation the gradient of KL(p || q), if p is 0 only where q is 0

Sampled sequences are padded. Pass ``mask``; do not multiply the estimates by a mask: where padding holds -inf, the
product and its gradient are NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.call.checks import check_alike, check_mask
from fastkd.call.contract import widened
from fastkd.core.tensors import savable, savable_when_compiled


def k1(student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor | None = None) -> Tensor:
    """-log r: an unbiased estimator with high variance, negative for many tokens.

    Args:
        student_logprobs: [...], log q of the sampled tokens.
        teacher_logprobs: [...], log p of the same tokens.
        mask: [...] bool; tokens where it is False get value 0 and gradient 0, even if their log-probabilities are not
            finite.

    Returns:
        [...], one estimate per token, in float32 (float64 for float64 log-probabilities).

    Raises:
        TypeError, ValueError: the log-probabilities are not floating-point tensors of the same shape and device, or
            mask is not bool of that shape.
    """
    return -_log_ratio(student_logprobs, teacher_logprobs, mask)


def k2(student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor | None = None) -> Tensor:
    """(log r)^2 / 2: a biased estimator with low variance, never negative. Arguments and errors: see :func:`k1`."""
    log_ratio = _log_ratio(student_logprobs, teacher_logprobs, mask)
    return 0.5 * log_ratio * log_ratio


def k3(student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor | None = None) -> Tensor:
    """(r - 1) - log r: an unbiased estimator, never negative. Arguments and errors: see :func:`k1`.

    It is infinite if r overflows, which happens for tokens that the student hardly ever samples.
    """
    log_ratio = _log_ratio(student_logprobs, teacher_logprobs, mask)
    return torch.expm1(log_ratio) - log_ratio


def _log_ratio(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return log r, and 0 for masked tokens, which makes every estimate 0 there."""
    for argument, value in (("student_logprobs", student), ("teacher_logprobs", teacher)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{argument} must be floating point, got {value.dtype}")
    check_alike("teacher_logprobs", teacher, "student_logprobs", student)
    # Subtract in float32: a bfloat16 difference of two close log-probabilities would lose all its digits.
    student, teacher = (widened(x) for x in savable_when_compiled(student, teacher))
    log_ratio = teacher - student
    if mask is None:
        return log_ratio
    check_mask(mask, "student_logprobs", student)
    (mask,) = savable(mask)
    # Mask log r rather than the estimate: masking an infinite estimate gives the gradient inf * 0 = NaN.
    return torch.where(mask, log_ratio, 0.0)
