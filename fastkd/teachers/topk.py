"""Sparse teachers: the log-probabilities of K tokens a row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.core.scalars import as_float, plain
from fastkd.teachers.tensors import FLOATS, check_tensor

TAILS = ("bucket", "renormalize", "renormalize_teacher", "truncate")


def _checked_temperature(value: float) -> float:
    value = plain(value)
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"temperature must be a number, got {type(value).__name__}")
    if not 0 < as_float(value) < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {value}")
    return value


@dataclass(frozen=True, eq=False)
class TopK:
    """A sparse teacher: the log-probabilities of K tokens a row, and a policy for the mass of the others.

    With p the teacher's probabilities of the K tokens, q the student's, and D = sum phi(p, q):

    - "bucket": one more event stands for all other tokens, with p = 1 - sum p_k and q = 1 - sum q_k. A divergence
      of a coarser partition: never negative, at most the dense one, and 0 for the dense teacher's own student.
    - "renormalize": both softmaxes are taken over the K tokens alone; other tokens have gradient 0. logprobs may then
      be any logarithms of weights, as they may for the next.
    - "renormalize_teacher": p is divided by its sum and is 0 elsewhere; q is over the whole vocabulary. For a
      divergence of degree 1 that is finite at p = 0: forward KL, cross-entropy, jsd, tvd, skewed KLs, Hellinger.
    - "truncate": the raw sum over the K tokens, q over the whole vocabulary. It can be negative, and is not a
      divergence; it is what several training stacks compute.

    K = V equals the dense teacher under every policy but for rounding.

    **Temperature.** log-probabilities belong to the temperature they were taken at. At another one, p^(T_then / T_now)
    is right up to its normaliser, which the renormalising policies do not need: for them any teacher temperature is
    exact. The bucket and the truncated sum need the mass of the tail, which K tokens do not tell: there a loss at
    another teacher temperature raises, and the log-probabilities have to be taken at that temperature.

    **The mass of the tail** is 1 - sum p where tail_logprob is None, and that is known no better than the logprobs are.
    With u half the epsilon of their dtype, d = 1 - sum p is known to s = u sqrt(sum (p log p)^2), and the mass is

        d where d >= s,    else max(d + s, -d / 4) / 2

    so that it is never 0 by rounding, and no loss is infinite for that. A mass of 0 is what tail_logprob = -inf says.
    Where d < s the error of log m may be large, and reverse KL has q_tail times that error. Pass tail_logprob (or
    logprobs in float32) where the tail matters.

    **Rows.** A row whose ids are all -1 has no distillation term, and its cross-entropy counts. Under a renormalising
    policy it is dropped, as by a mask, where it has no cross-entropy either (no labels, or alpha = 1). A counted row
    with NaN among its logprobs, with probabilities whose sum is above 1.1 ("bucket", with that of the tail, and
    "truncate") or with nothing but -inf to be divided by its sum is NaN; FASTKD_CHECK=1 raises, and names it.

    Args:
        ids: [..., K] int64 or int32, token ids, distinct within a row; -1 is padding and is skipped.
        logprobs: [..., K] floating point, natural logarithms. Padding may hold anything.
        tail: one of the policies above.
        tail_logprob: [...], the logarithm of the mass of all other tokens, for "bucket"; None: as said above.
        temperature: the temperature the log-probabilities were taken at.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or value; the message names the argument.
    """

    ids: Tensor
    logprobs: Tensor
    tail: str = "bucket"
    tail_logprob: Tensor | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_tensor("ids", self.ids, (torch.int64, torch.int32))
        check_tensor("logprobs", self.logprobs, FLOATS)
        if self.ids.dim() == 0 or self.ids.shape[-1] == 0:
            raise ValueError(f"ids must be [..., K] with K > 0, got shape {tuple(self.ids.shape)}")
        if self.ids.shape != self.logprobs.shape:
            raise ValueError(
                f"logprobs must have the shape of ids, {tuple(self.ids.shape)}; got {tuple(self.logprobs.shape)}"
            )
        if self.ids.device != self.logprobs.device:
            raise ValueError(
                f"logprobs must be on {self.ids.device}, where ids are; got {self.logprobs.device}"
            )
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}; got {self.tail!r}")
        if self.tail_logprob is not None:
            check_tensor("tail_logprob", self.tail_logprob, FLOATS)
            if self.tail_logprob.shape != self.ids.shape[:-1]:
                raise ValueError(
                    f"tail_logprob must have one value a row, shape {tuple(self.ids.shape[:-1])}; "
                    f"got {tuple(self.tail_logprob.shape)}"
                )
            if self.tail_logprob.device != self.ids.device:
                raise ValueError(
                    f"tail_logprob must be on {self.ids.device}, where ids are; got {self.tail_logprob.device}"
                )
        object.__setattr__(self, "temperature", _checked_temperature(self.temperature))

    @property
    def renormalizes(self) -> bool:
        """Whether a row's p are divided by their sum, so that they need not be probabilities."""
        return self.tail in ("renormalize", "renormalize_teacher")

    @classmethod
    def from_logits(
        cls, logits: Tensor, k: int, *, tail: str = "bucket", temperature: float = 1.0
    ) -> TopK:
        """The k most probable tokens of dense logits [..., V], with the exact mass of the tail.

        Raises:
            TypeError, ValueError: logits are no floating-point tensor [..., V], or k is not in [1, V].
        """
        check_tensor("logits", logits, FLOATS)
        if logits.dim() == 0:
            raise ValueError("logits must be [..., V], got a scalar")
        k = plain(k)
        if type(k) is not int or not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"k must be an int in [1, {logits.shape[-1]}], got {k!r}")
        temperature = _checked_temperature(temperature)
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        tempered = logits.detach().to(exact) / temperature
        top, ids = tempered.topk(k, dim=-1)
        # The tail by itself, as 1 - sum p would be rounding alone where the k tokens hold nearly all.
        rest = tempered.scatter(-1, ids, -math.inf).logsumexp(-1)
        normalizer = torch.logaddexp(top.logsumexp(-1), rest)
        return cls(ids, top - normalizer.unsqueeze(-1), tail, rest - normalizer, temperature)
