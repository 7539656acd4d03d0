"""Sparse teachers: the log-probabilities of K tokens per row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.core.pieces import piece_rows
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


def _check_index(ids: Tensor, logits: Tensor) -> None:
    """Check ids [..., K] against logits [..., V]."""
    check_tensor("ids", ids, (torch.int64, torch.int32))
    lead, width = tuple(logits.shape[:-1]), logits.shape[-1]
    if ids.dim() == 0 or tuple(ids.shape[:-1]) != lead or not ids.shape[-1]:
        raise ValueError(
            f"ids must be [..., K] with K > 0 and the leading shape of logits, {lead}; got shape {tuple(ids.shape)}"
        )
    if ids.device != logits.device:
        raise ValueError(f"ids must be on {logits.device}, where logits is; got {ids.device}")
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < width:
        raise ValueError(
            f"ids must be in [0, {width}), the columns of logits, or -1 for padding; "
            f"got {int(ids.min())} to {int(ids.max())}"
        )


def taken(tempered: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities of tokens, log of the mass of all others), given tempered logits [..., V] and ids [..., K].

    The ids are columns or -1, which is padding with a log-probability of -inf.
    """
    index, padding = ids.clamp(min=0).to(torch.int64), ids < 0
    tokens = tempered.gather(-1, index).masked_fill(padding, -math.inf)
    # +inf leaves the column as it is: padding must not remove token 0.
    removed = torch.where(padding, math.inf, -math.inf).to(tempered.dtype)
    others = tempered.scatter_reduce(-1, index, removed, "amin")
    # The tail is summed directly: if the tokens hold nearly all mass, 1 - sum p would be only rounding.
    tail_log_sum = others.logsumexp(-1)
    log_sum = torch.logaddexp(tokens.logsumexp(-1), tail_log_sum)
    return tokens - log_sum.unsqueeze(-1), tail_log_sum - log_sum


@dataclass(frozen=True, eq=False)
class TopK:
    """A sparse teacher: the log-probabilities of K tokens per row, and a policy for the mass of all other tokens.

    With p the teacher's probabilities of the K tokens, q the student's, and D = sum phi(p, q):

    - "bucket": one more event stands for all other tokens, with p = 1 - sum p_k and q = 1 - sum q_k. This is a
      divergence over a coarser partition: it is never negative, at most the dense divergence, and 0 if the student
      equals the dense teacher.
    - "renormalize": both softmaxes are taken over the K tokens alone; other tokens have gradient 0. logprobs may be
      logarithms of any weights.
    - "renormalize_teacher": p is divided by its sum and is 0 elsewhere; q is over the whole vocabulary. logprobs may be
      logarithms of any weights. The divergence must have degree 1 and be finite at p = 0: forward KL, cross-entropy,
      jsd, tvd, skewed KLs, Hellinger.
    - "truncate": the raw sum over the K tokens; q is over the whole vocabulary. It can be negative, so it is not a
      divergence. Several training stacks compute it.

    With K = V, every policy equals the dense teacher but for rounding.

    **Temperature.** Log-probabilities are valid at the temperature they were taken at. At another temperature,
    p^(T_then / T_now) is right up to its normalizer. The renormalizing policies do not need the normalizer, so they are
    exact at any teacher temperature. "bucket" and "truncate" need the mass of the tail, which K tokens do not
    determine: with them, a loss at another teacher temperature raises, and you must take the log-probabilities at that
    temperature.

    **The mass of the tail** is 1 - sum p if tail_logprob is None. It is as exact as the logprobs: with u half the
    epsilon of their dtype, d = 1 - sum p has the error s = u sqrt(sum (p log p)^2), and the mass is

        d where d >= s,    else max(d + s, -d / 4) / 2

    so rounding never makes it 0, which could make a loss infinite. To pass a mass of 0, use tail_logprob = -inf. Where
    d < s, log m may have a large error, and reverse KL has q_tail times that error. Pass tail_logprob, or logprobs in
    float32, if the tail matters.

    **Rows.** A row whose ids are all -1 has no distillation term, but its cross-entropy counts. Under a renormalizing
    policy the row is dropped, as by a mask, if it has no cross-entropy either (no labels, or alpha = 1). A counted row
    is NaN if its logprobs contain NaN, if its probabilities sum to more than 1.1 ("bucket", tail included, and
    "truncate"), or if a renormalizing policy finds only -inf. FASTKD_CHECK=1 raises instead and names the row.

    Args:
        ids: [..., K] int64 or int32, token ids, distinct within a row; -1 is padding and is skipped.
        logprobs: [..., K] floating point, natural logarithms. Padding may hold any value.
        tail: one of the policies above.
        tail_logprob: [...], the logarithm of the mass of all other tokens, for "bucket"; None: derived as above.
        temperature: the temperature at which the log-probabilities were taken.

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
                f"logprobs must be on {self.ids.device}, the device of ids; got {self.logprobs.device}"
            )
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}; got {self.tail!r}")
        if self.tail_logprob is not None:
            check_tensor("tail_logprob", self.tail_logprob, FLOATS)
            if self.tail_logprob.shape != self.ids.shape[:-1]:
                raise ValueError(
                    f"tail_logprob must have one value per row, shape {tuple(self.ids.shape[:-1])}; "
                    f"got {tuple(self.tail_logprob.shape)}"
                )
            if self.tail_logprob.device != self.ids.device:
                raise ValueError(
                    f"tail_logprob must be on {self.ids.device}, the device of ids; got {self.tail_logprob.device}"
                )
        object.__setattr__(self, "temperature", _checked_temperature(self.temperature))

    @property
    def renormalizes(self) -> bool:
        """Whether each row's p is divided by its sum, so that logprobs may be logarithms of any weights."""
        return self.tail in ("renormalize", "renormalize_teacher")

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        k: int | None = None,
        *,
        ids: Tensor | None = None,
        tail: str = "bucket",
        temperature: float = 1.0,
    ) -> TopK:
        """Take tokens of dense logits [..., V], with the exact mass of all others.

        Args:
            logits: [..., V], the teacher's.
            k: take the k most probable tokens.
            ids: [..., K] int64 or int32: take these tokens instead, for example those of :func:`fastkd.student_topk`.
                -1 is padding.
            tail: as in the class.
            temperature: the logits are divided by it.

        Raises:
            TypeError, ValueError: logits are not a floating-point tensor [..., V]; k is not in [1, V]; ids has another
                dtype, device or leading shape, or an id outside the vocabulary; or not exactly one of k and ids is
                given.
        """
        check_tensor("logits", logits, FLOATS)
        if logits.dim() == 0:
            raise ValueError("logits must be [..., V], got a scalar")
        width = logits.shape[-1]
        if (k is None) == (ids is None):
            given = "neither" if k is None else "both"
            raise ValueError(f"pass k or ids, to say which tokens to take; got {given}")
        temperature = _checked_temperature(temperature)
        if ids is None:
            k = plain(k)
            if type(k) is not int or not 1 <= k <= width:
                raise ValueError(f"k must be an int in [1, {width}], got {k!r}")
            count_taken = k
        else:
            _check_index(ids, logits)
            count_taken = ids.shape[-1]
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        lead = logits.shape[:-1]
        count = lead.numel()
        rows = logits.detach().reshape(count, width)
        index = None if ids is None else ids.reshape(count, count_taken)
        # A few rows at a time, because several tensors as wide as the logits exist at once. A compiler would unroll the
        # loop, so a graph has a single piece.
        step = piece_rows(width, exact, logits.device.type)
        if torch.compiler.is_compiling():
            step = max(count, 1)
        results = []
        for start in range(0, max(count, 1), step):
            piece = slice(start, start + step)
            tempered = rows[piece].to(exact) / temperature
            of_piece = tempered.topk(count_taken).indices if index is None else index[piece]
            results.append((of_piece, *taken(tempered, of_piece)))
        taken_ids, logprobs, tail_logprob = map(torch.cat, zip(*results, strict=True))
        shape = (*lead, count_taken)
        return cls(
            taken_ids.view(shape) if ids is None else ids,
            logprobs.view(shape),
            tail,
            tail_logprob.view(lead),
            temperature,
        )

    @classmethod
    def sampled(
        cls,
        ids: Tensor,
        weights: Tensor | None = None,
        *,
        tail: str = "renormalize_teacher",
        temperature: float = 1.0,
    ) -> TopK:
        """The teacher that N sampled tokens per row estimate: p of a token is its share of the row's samples.

        For tokens drawn from the teacher, this p is unbiased, and so is the gradient of forward KL, whereas the
        largest K tokens are biased towards the head of the distribution (Anshumann et al., "Sparse Logit Sampling",
        arXiv:2503.16870). If the tokens were drawn from another distribution r, such as the teacher at a higher
        temperature, pass the weights p / r: the estimate is then the share of weight, and consistent.

        Args:
            ids: [..., N] int64 or int32, drawn with repetition; -1 is padding, for rows with fewer samples.
            weights: [..., N] floating point and not negative, the weight of each sample; None: all count alike.
            tail: one of the policies of the class. The samples have the whole mass, so nothing is left to the tail.
            temperature: the teacher's temperature that p stands for.

        Returns:
            A TopK with K = N. A token that was drawn several times is listed once; the other places are padding.

        Raises:
            TypeError, ValueError: a wrong type, dtype, shape or value; the message names the argument.
        """
        check_tensor("ids", ids, (torch.int64, torch.int32))
        if ids.dim() == 0 or ids.shape[-1] == 0:
            raise ValueError(f"ids must be [..., N] with N > 0, got shape {tuple(ids.shape)}")
        exact = torch.float64
        if weights is None:
            weights = torch.ones(ids.shape, dtype=torch.float32, device=ids.device)
        check_tensor("weights", weights, FLOATS)
        if weights.shape != ids.shape or weights.device != ids.device:
            raise ValueError(
                f"weights must have the shape and the device of ids, {tuple(ids.shape)} on {ids.device}; "
                f"got {tuple(weights.shape)} on {weights.device}"
            )
        ids, order = ids.to(torch.int64).sort(-1)
        weight = weights.detach().gather(-1, order).to(exact).masked_fill(ids < 0, 0.0)
        differs = ids[..., 1:] != ids[..., :-1]
        edge = torch.ones_like(ids[..., :1], dtype=torch.bool)
        is_first, is_last = torch.cat([edge, differs], -1), torch.cat([differs, edge], -1)
        # The total of a run of equal ids, as a difference of cumulative sums, has the same bits on every run.
        position = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
        first = torch.where(is_first, position, 0).cummax(-1).values
        through = weight.cumsum(-1)
        total = through - (through - weight).gather(-1, first)
        listed = is_last & (ids >= 0)
        logprobs = (total / through[..., -1:]).log().masked_fill(~listed, -math.inf)
        dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
        # Invalid ids below -1 stay, so that a loss reports them.
        ids = ids.masked_fill(~listed & (ids >= -1), -1)
        return cls(ids, logprobs.to(dtype), tail, None, temperature)

    @classmethod
    def union(cls, first: TopK, second: TopK) -> TopK:
        """Both lists of one teacher's tokens as one: [..., K1 + K2], in which a token of both is listed once.

        Both must hold log-probabilities of the same teacher at the same temperature, with the same policy for the tail.
        Under "bucket" the mass of the new tail is derived from the log-probabilities (see above).

        Raises:
            TypeError, ValueError: the two do not fit together; the message names the field.
        """
        for name, value in (("first", first), ("second", second)):
            if not isinstance(value, TopK):
                raise TypeError(f"{name} must be a TopK, got {type(value).__name__}")
        for field in ("tail", "temperature"):
            mine, other = getattr(first, field), getattr(second, field)
            if mine != other:
                raise ValueError(
                    f"second.{field} must equal that of first, {mine!r}; got {other!r}"
                )
        ids = support_union(first.ids, second.ids)
        logprobs = torch.cat([first.logprobs, second.logprobs], -1)
        return cls(ids, logprobs, first.tail, None, first.temperature)


def support_union(first: Tensor, second: Tensor) -> Tensor:
    """The tokens of two supports, [..., K1] and [..., K2]: ids [..., K1 + K2], distinct within a row.

    The tokens of `first` keep their places, and those of `second` follow. Repeated tokens become padding, -1.
    So a student's top tokens and a teacher's become the ids to score with both models
    (:func:`fastkd.fused_linear_logprobs`).

    Args:
        first: [..., K1] int64 or int32; -1 is padding.
        second: [..., K2] int64 or int32, with the same leading shape and device.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; the message names the argument.
    """
    for name, value in (("first", first), ("second", second)):
        check_tensor(name, value, (torch.int64, torch.int32))
        if value.dim() == 0:
            raise ValueError(f"{name} must be [..., K], got a scalar")
    if second.shape[:-1] != first.shape[:-1] or second.device != first.device:
        raise ValueError(
            "second must have the leading shape and the device of first, "
            f"{tuple(first.shape[:-1])} on {first.device}; got {tuple(second.shape[:-1])} on {second.device}"
        )
    ids = torch.cat([first.to(torch.int64), second.to(torch.int64)], -1)
    ordered, order = ids.sort(
        dim=-1, stable=True
    )  # stable: the first of equal ids is the one to keep
    repeats = torch.zeros_like(ids, dtype=torch.bool)
    repeats[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return ids.masked_fill(torch.empty_like(repeats).scatter_(-1, order, repeats), -1)
