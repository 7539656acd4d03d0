"""The label term: what the label's column contributes if a divergence treats the label separately.

The formulas are those of :mod:`fastkd.backends.reference`. With y the label, a is log(p_y / (1 - p_y)) of the teacher
and b that of the student, at the temperature of the other columns. Each is the label's log_probability under a
normalizer that excludes the label.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .skeleton import NEGLIGIBLE, logaddexp
from .sweeps import Normalizer, Sums, log_probability


@triton.jit
def _sigmoid(x):
    """Return (sigmoid(x), sigmoid(-x)), both without cancellation."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x > 0, large, small), tl.where(x > 0, small, large)


@triton.jit
def _softplus(x):
    return logaddexp(x, 0.0)


@triton.jit
def weighted(probability, value, NEGLIGIBLE: tl.constexpr = NEGLIGIBLE):
    """Return probability * value; 0 if the probability is 0, even if the value is infinite."""
    return tl.where(probability < NEGLIGIBLE, 0.0, probability * value)


@triton.jit
def label_probability(z, others):
    """Return the label's probability; `others` is the normalizer of the other columns."""
    probability, _ = _sigmoid(log_probability(z, others))
    return probability


@triton.jit
def binary(weight, a, b):
    """Return weight times KL((p_y, 1 - p_y) || (q_y, 1 - q_y)), and its derivatives with respect to b and a."""
    p, p_others = _sigmoid(a)
    q, q_others = _sigmoid(b)
    phi = weighted(p, _softplus(-b) - _softplus(-a))
    phi += weighted(p_others, _softplus(b) - _softplus(a))
    # The difference of the two smaller probabilities, because those near 1 have lost their digits.
    g = tl.where(b > 0, p_others - q_others, q - p)
    return Sums(weighted(weight, phi), weight * g, weighted(weight, weighted(p * p_others, a - b)))


@triton.jit
def entropy_of_all(b, entropy):
    """Return the entropy of all columns from that of the columns other than the label's."""
    q, q_others = _sigmoid(b)
    return weighted(q, _softplus(-b)) + weighted(q_others, _softplus(b)) + q_others * entropy


@triton.jit
def normalizer_of_all(z, others):
    """Return the normalizer of all columns; its max is the label's z if that outweighs all other columns together."""
    gap = log_probability(z, others)
    log_exp_sum = tl.where(gap > 0, _softplus(-gap), others.log_exp_sum + _softplus(gap))
    return Normalizer(
        tl.where(gap > 0, z, others.max), others.unit, log_exp_sum, tl.exp(-log_exp_sum)
    )
