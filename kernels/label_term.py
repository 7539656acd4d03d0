"""What the label's token adds to the sums over the others, where a divergence compares it apart from them.

As in :mod:`fastkd.backends.reference`: with y the label, a is log(p_y / (1 - p_y)) of the teacher and b that of the
student, at the temperature of the rest; each is the label's log_softmax with a normaliser of the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .skeleton import NEGLIGIBLE, logaddexp
from .sweeps import Normalizer, Sums, log_probability


@triton.jit
def _sigmoid(x):
    """(sigmoid(x), sigmoid(-x)), each with all its digits."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x > 0, large, small), tl.where(x > 0, small, large)


@triton.jit
def _softplus(x):
    return logaddexp(x, 0.0)


@triton.jit
def weighed(probability, value, NEGLIGIBLE: tl.constexpr = NEGLIGIBLE):
    """Their product; a probability of 0 makes it 0, whatever the value."""
    return tl.where(probability < NEGLIGIBLE, 0.0, probability * value)


@triton.jit
def share(z, normalizer):
    """The probability of the label's token, given a normaliser of the others."""
    probability, _ = _sigmoid(log_probability(z, normalizer))
    return probability


@triton.jit
def binary(weight, a, b):
    """KL((p_y, 1 - p_y) || (q_y, 1 - q_y)), and its derivatives by b and by a."""
    p, p_rest = _sigmoid(a)
    q, q_rest = _sigmoid(b)
    phi = weighed(p, _softplus(-b) - _softplus(-a)) + weighed(p_rest, _softplus(b) - _softplus(a))
    # The smaller side's difference, as near 1 both have lost their digits.
    g = tl.where(b > 0, p_rest - q_rest, q - p)
    return Sums(weighed(weight, phi), weight * g, weighed(weight, weighed(p * p_rest, a - b)))


@triton.jit
def entropy_of_all(b, entropy):
    """From the entropy of the others by themselves to that of all tokens."""
    q, q_rest = _sigmoid(b)
    return weighed(q, _softplus(-b)) + weighed(q_rest, _softplus(b)) + q_rest * entropy


@triton.jit
def normalizer_of_all(z, others):
    """From a normaliser of the others to one of all tokens; its origin is the label's z where that outweighs them."""
    gap = log_probability(z, others)
    return Normalizer(
        tl.where(gap > 0, z, others.origin),
        others.unit,
        tl.where(gap > 0, _softplus(-gap), others.log_sum + _softplus(gap)),
    )
