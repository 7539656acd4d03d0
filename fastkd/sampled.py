"""Estimators of KL(q || p) from tokens sampled from the student q, as on-policy distillation uses them.

With log r = log p(x) - log q(x) of a sampled token x, after Schulman, "Approximating KL Divergence" (2020). The value
of each is what it says; its gradient is that of the value with the samples held fixed, which is not the gradient of the
divergence for all of them:

    k1  gradient -d log r = d log q(x): 0 in expectation; it wants the score function, -sg(log r) d log q(x)
    k2  gradient -log r d log q(x): in expectation the gradient of KL(q || p)
    k3  gradient (1 - r) d log q(x): in expectation the gradient of KL(p || q) where p is 0 nowhere that q is not

Sampled sequences are padded. Pass ``mask``: the product of an estimate with a mask is NaN where padding holds -inf, and
so is its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.call.checks import check_alike, check_mask
from fastkd.call.contract import widened
from fastkd.core.tensors import savable, savable_when_compiled


def k1(student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor | None = None) -> Tensor:
    """-log r: unbiased, of high variance, and negative for many a token.

    Args:
        student_logprobs: [...], log q of the sampled tokens.
        teacher_logprobs: [...], log p of the same tokens.
        mask: [...] bool; a token where it is False has value 0 and gradient 0, whatever its log-probabilities hold.

    Returns:
        [...], one estimate per token, in float32 (float64 for float64 log-probabilities).

    Raises:
        TypeError, ValueError: not two floating-point tensors of one shape and device, or not a mask of that shape.
    """
    return -_log_ratio(student_logprobs, teacher_logprobs, mask)


def k2(student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor | None = None) -> Tensor:
    """(log r)^2 / 2: biased, of low variance, never negative. Arguments and errors as :func:`k1` has them."""
    log_ratio = _log_ratio(student_logprobs, teacher_logprobs, mask)
    return 0.5 * log_ratio * log_ratio


def k3(student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor | None = None) -> Tensor:
    """(r - 1) - log r: unbiased, never negative. Arguments and errors as :func:`k1` has them.

    It is infinite where r overflows: a token that the student hardly ever samples.
    """
    log_ratio = _log_ratio(student_logprobs, teacher_logprobs, mask)
    return torch.expm1(log_ratio) - log_ratio


def _log_ratio(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Log r, which is 0 where the mask drops a token; so is every estimate there."""
    for argument, value in (("student_logprobs", student), ("teacher_logprobs", teacher)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{argument} must be floating point, got {value.dtype}")
    check_alike("teacher_logprobs", teacher, "student_logprobs", student)
    # In float32: the difference of two bfloat16 log-probabilities has no digits left.
    student, teacher = (widened(x) for x in savable_when_compiled(student, teacher))
    log_ratio = teacher - student
    if mask is None:
        return log_ratio
    check_mask(mask, "student_logprobs", student)
    (mask,) = savable(mask)
    # Here and not in the result: the gradient of an estimate that is infinite, times 0, would be NaN.
    return torch.where(mask, log_ratio, 0.0)
