"""On-policy distillation with a policy gradient: the advantages, the importance weights and the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from fastkd.call.checks import (
    REDUCTIONS,
    check_alike,
    check_choice,
    check_flags,
    check_mask,
    checking,
    denominator,
)
from fastkd.call.contract import row_dtype, widened
from fastkd.call.options import is_number
from fastkd.core.scalars import LARGEST, check_magnitude, check_number, plain
from fastkd.core.tensors import savable

if TYPE_CHECKING:
    from typing_extensions import Unpack

FORMS = ("policy_gradient", "k2", "k3", "abs")
SEQUENCE_MEAN = "sequence_mean"
# Differences of log-probabilities are limited to this size before they are exponentiated, as in verl and TRL, so that a
# ratio is at most 4.9e8. Beyond it the ratio is constant and has no gradient.
LOG_RATIO_LIMIT = 20.0
# A log-probability may exceed 0 by rounding.
ROUNDING = 0.01


class PolicyParts(NamedTuple):
    """Detached averages over the counted tokens of this call, 0-dim; 0 if no token is counted.

    Several micro-batches or processes average them with weights ``counted``.
    """

    # Mean of log old - log p, the unbiased estimate of KL(old || p); 0 without teacher_logprobs.
    teacher_kl: Tensor
    # Mean of log old - log q: how far the student has moved since it sampled (verl's ppo_kl).
    policy_kl: Tensor
    # Fraction of the tokens whose loss is the clipped term (verl's pg_clipfrac).
    clip_fraction: Tensor
    # Fraction of the tokens whose loss is the bound of dual_clip (verl's pg_clipfrac_lower).
    dual_clip_fraction: Tensor
    mean_advantage: Tensor
    mean_abs_advantage: Tensor
    # Mean of weight; 1 without it.
    mean_weight: Tensor
    # Fraction of the tokens whose weight is 0, for example because icepop rejects them.
    rejected_fraction: Tensor
    # The number of counted tokens.
    counted: Tensor


class PolicyOptions(TypedDict, total=False):
    """The keyword options of on_policy_loss, except return_parts, which decides the type of the result."""

    advantages: Tensor | None
    form: str
    coef: float
    clamp: float | None
    clip: float | tuple[float, float] | None
    dual_clip: float | None
    mask: Tensor | None
    weight: Tensor | None
    reduction: str
    num_items: int | float | Tensor | None


def policy_advantages(
    teacher_logprobs: Tensor,
    sampled_logprobs: Tensor,
    *,
    coef: float = 1.0,
    clamp: float | None = None,
    position_gamma: float = 0.0,
    discount: float = 0.0,
    advantages: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Advantages of sampled tokens, from the log-probabilities of the teacher and of the model that sampled them.

        A_t = coef (log p(x_t) - log old(x_t))

    With these advantages the policy gradient decreases KL(old || p) at every visited position. The result is a
    constant: no argument gets a gradient.

    An advantage must depend on the sampled token. A divergence of the two distributions at a position, such as a top-k
    KL, is the same for every token that might have been sampled there. As an advantage it has an expected gradient of
    0, because E[grad log q(x)] = 0. Train on such a divergence directly, with :func:`fastkd.kd_loss`.

    Args:
        teacher_logprobs: [..., T], log p of the sampled tokens.
        sampled_logprobs: [..., T], log-probabilities of the same tokens under the model that sampled them, or under the
            student before its first update on them. For several updates, the student's current log-probabilities give
            the exact gradient of KL(q || p), if :func:`on_policy_loss` gets the log-probabilities at the time of
            sampling as old_logprobs.
        coef: factor of the teacher's term, finite.
        clamp: c > 0; limits log p - log old to [-c, c] before all else. None: no limit; a token to which the teacher
            gives probability 0 then has an infinite advantage.
        position_gamma: gamma >= 0 of IW-OPD (2606.22600): the teacher's term of token t is multiplied by
            1 + gamma (1 - sum_(i < t) |A_i| / sum_i |A_i|), where A is without coef. The last dimension must hold the
            whole sequence.
        discount: d in [0, 1]: the teacher's term becomes the discounted sum over the rest of the sequence,
            sum_(k >= t) d^(k-t) A_k. 0: each token has its own term only.
        advantages: [..., T], advantages of a reward, which are added; None: none.
        mask: [..., T] bool; tokens where it is False get 0, whatever the inputs hold there. They count as steps for
            discount.

    Returns:
        [..., T], float32 (float64 if an input is float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
    """
    coef = _finite("coef", coef)
    clamp = _positive_or_none("clamp", clamp)
    position_gamma = _in_range("position_gamma", position_gamma, 0.0, LARGEST)
    discount = _in_range("discount", discount, 0.0, 1.0)
    teacher = _logprobs("teacher_logprobs", teacher_logprobs)
    sampled = _logprobs("sampled_logprobs", sampled_logprobs)
    check_alike("sampled_logprobs", sampled_logprobs, "teacher_logprobs", teacher_logprobs)
    _check_mask(mask, "teacher_logprobs", teacher_logprobs)
    extra = None if advantages is None else _floating("advantages", advantages)
    if extra is not None:
        check_alike("advantages", extra, "teacher_logprobs", teacher_logprobs)
    _check_sequences("position_gamma", position_gamma, teacher)
    _check_sequences("discount", discount, teacher)
    _check_values({"sampled_logprobs": sampled}, mask)
    _check_values({"teacher_logprobs": teacher}, mask, zero_allowed=clamp is not None)
    with torch.no_grad():
        result = _masked(teacher.detach() - sampled.detach(), mask)
        if clamp is not None:
            result = _limited(result, -clamp, clamp)
        if position_gamma:
            result = result * position_weights(result, position_gamma)
        result = coef * result
        if discount:
            result = _discounted(result, discount)
            result = _masked(result, mask)
        return result if extra is None else result + _masked(extra.detach(), mask)


def position_weights(advantages: Tensor, gamma: float, least: float = 1e-8) -> Tensor:
    """The weights of IW-OPD, [..., T]: 1 + gamma (1 - sum_(i < t) |A_i| / sum_i |A_i|), the last sum at least `least`.

    The advantages are 0 at tokens that do not count.
    """
    size = advantages.abs()
    before = size.cumsum(-1) - size
    return 1.0 + gamma * (1.0 - before / size.sum(-1, keepdim=True).clamp(min=least))


def importance_weights(
    current_logprobs: Tensor,
    sampled_logprobs: Tensor,
    *,
    truncate: float | tuple[float, float] | None = None,
    icepop: tuple[float, float] | None = None,
    sequence_mask: tuple[float, float] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Importance weights w = exp(log current - log sampled) of sampled tokens, for ``weight`` of on_policy_loss.

    They correct for the difference between the model that is trained and the one that has sampled, such as an
    inference engine with other numerics. The result is a constant: no argument gets a gradient.

    Args:
        current_logprobs: [..., T], log-probabilities under the model that is trained: the student's current ones, or
            those that the trainer has computed before its first update.
        sampled_logprobs: [..., T], log-probabilities of the same tokens as the sampling engine returned them.
        truncate: c or (low, high): limits w to at most c, or to [low, high] (truncated importance sampling, TIS).
        icepop: (low, high): w outside becomes 0, which rejects the token (IcePop).
        sequence_mask: (low, high): all weights of a sequence become 0 if the geometric mean of its w, before truncate
            or icepop, is outside (seq-mask-tis). A sequence is the last dimension.
        mask: [..., T] bool; tokens where it is False get weight 0, whatever the inputs hold there.

    Returns:
        [..., T], float32 (float64 if an input is float64). The difference of the log-probabilities is limited to
        [-20, 20].

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
    """
    current = _logprobs("current_logprobs", current_logprobs)
    sampled = _logprobs("sampled_logprobs", sampled_logprobs)
    check_alike("sampled_logprobs", sampled_logprobs, "current_logprobs", current_logprobs)
    _check_mask(mask, "current_logprobs", current_logprobs)
    if truncate is not None and icepop is not None:
        raise ValueError(
            "truncate and icepop must not both be given: one limits a weight, the other makes it 0"
        )
    limits = truncate if truncate is None or isinstance(truncate, tuple) else (0.0, truncate)
    if limits is not None:
        limits = _bounds("truncate", limits)
    if icepop is not None:
        icepop = _bounds("icepop", icepop)
    if sequence_mask is not None:
        sequence_mask = _bounds("sequence_mask", sequence_mask)
        _check_sequences("sequence_mask", sequence_mask, current)
    _check_values({"current_logprobs": current, "sampled_logprobs": sampled}, mask)
    with torch.no_grad():
        log_ratio = _masked(current.detach() - sampled.detach(), mask)
        log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        weights = log_ratio.exp()
        if limits is not None:
            weights = _limited(weights, *limits)
        if icepop is not None:
            outside = (weights < icepop[0]) | (weights > icepop[1])  # False for NaN, which stays
            weights = torch.where(outside, 0.0, weights)
        if sequence_mask is not None:
            tokens = log_ratio.shape[-1] if mask is None else mask.sum(-1, keepdim=True)
            count = torch.as_tensor(tokens, device=log_ratio.device).clamp(min=1)
            mean = (log_ratio.sum(-1, keepdim=True) / count).exp()
            inside = (mean >= sequence_mask[0]) & (mean <= sequence_mask[1])
            weights = torch.where(inside | mean.isnan(), weights, 0.0)
        return _masked(weights, mask)


@overload
def on_policy_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[PolicyOptions],
) -> Tensor: ...
@overload
def on_policy_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    *,
    return_parts: Literal[True],
    **options: Unpack[PolicyOptions],
) -> tuple[Tensor, PolicyParts]: ...
@overload
def on_policy_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    *,
    return_parts: bool,
    **options: Unpack[PolicyOptions],
) -> Tensor | tuple[Tensor, PolicyParts]: ...
def on_policy_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    *,
    advantages: Tensor | None = None,
    form: str = "policy_gradient",
    coef: float = 1.0,
    clamp: float | None = None,
    clip: float | tuple[float, float] | None = None,
    dual_clip: float | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, PolicyParts]:
    r"""On-policy distillation loss of tokens that the student has sampled, from their log-probabilities.

    With s = log q and t = log p of a sampled token, r = exp(s - old), and sg stopping the gradient, the loss of a token
    is weight times

        "policy_gradient"  max(-A r, -A clip(r)),   A = coef sg(t - old) + advantages
        "k2"               coef (t - s)^2 / 2
        "k3"               coef (exp(t - s) - (t - s) - 1)
        "abs"              coef |t - s|

    Their expected gradients over tokens from q, given the tokens before:

        "policy_gradient"  that of KL(q || p), at the first update on the samples (old = q) and without advantages
        "k2"               that of KL(q || p)
        "k3"               that of KL(p || q), if p is 0 only where q is 0
        "abs"              that of sum |p - q|, twice the total variation distance

    "k1", s - t, is not a form: its gradient is 0 in expectation. "policy_gradient" is its score-function form. Without
    clip, its value is the k1 estimate as long as r = 1.

    After an update, old differs from q. "policy_gradient" then has the gradient of E_q[log old - log p], like most
    stacks, because A stays fixed. For the gradient of KL(q || p) itself, pass
    ``advantages=policy_advantages(teacher_logprobs, student_logprobs)`` instead of teacher_logprobs, as verl does. The
    other forms need ``weight=importance_weights(student_logprobs, old_logprobs)`` then.

    Args:
        student_logprobs: [..., T], s: the student's current log-probabilities of the sampled tokens. Only they get a
            gradient.
        teacher_logprobs: [..., T], t: the teacher's. None: the loss consists of advantages alone.
        old_logprobs: [..., T], log-probabilities under the model that sampled, or as the trainer computed them before
            the first update; only for "policy_gradient". None: the student's current ones, so r = 1.
        advantages: [..., T], advantages of a reward or from :func:`policy_advantages`; only for "policy_gradient".
        form: one of the above.
        coef: factor of the teacher's term, finite. With teacher_logprobs only, like clamp. coef, clamp, clip and
            dual_clip are Python numbers; a tensor raises. Other values cost a compiled graph at most one recompile.
        clamp: c > 0; limits t - old to [-c, c]. In the other forms, it limits the value before the factor coef; the
            gradient beyond the limit is 0 (verl's loss_max_clamp). None: no limit.
        clip: PPO's epsilon, or (low, high): clip(r) limits r to [1 - low, 1 + high]. None: no clipping.
        dual_clip: c > 1; the loss of a token with A < 0 is at most -c A (dual-clip PPO, 1912.09729). None: no bound.
        mask: [..., T] bool; tokens where it is False get loss 0 and gradient 0, whatever the inputs hold there.
        weight: [..., T] float, multiplies the loss of each token, for example :func:`importance_weights`; it does not
            change the number of counted tokens. Tokens of weight 0 are not read.
        reduction: "none" ([..., T]), "sum", "mean" (sum / number of counted tokens), "batchmean" (sum /
            student_logprobs.shape[0]), or "sequence_mean": the mean over the counted tokens of each sequence, then over
            the sequences with a counted token. A sequence is the last dimension.
        num_items: replaces the denominator of "mean" and "batchmean", and the number of sequences of "sequence_mean":
            a positive number or a 0-dim tensor. For processes with different tokens, pass
            ``fastkd.parallel.num_items(mask=mask)``; with "sequence_mean",
            ``fastkd.parallel.num_items(mask=mask.any(-1))``.
        return_parts: return (loss, :class:`PolicyParts`).

    Returns:
        The loss: 0-dim, or [..., T] for "none"; float32 (float64 if an input is float64). If no token is counted, the
        loss is 0 and part of the graph. Differences of log-probabilities that are exponentiated are limited to
        [-20, 20]; beyond it they have no gradient. With FASTKD_CHECK=1, log-probabilities that are positive, NaN or
        infinite raise; if clamp is given, the teacher's may be -inf.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.
    """
    _check_form(form, teacher_logprobs, old_logprobs, advantages, clip, dual_clip)
    coef, clamp = _finite("coef", coef), _positive_or_none("clamp", clamp)
    if teacher_logprobs is None:
        for name, changed in (("coef", coef != 1.0), ("clamp", clamp is not None)):
            if changed:
                raise ValueError(
                    f"{name} is for the teacher's term, and teacher_logprobs is None; pass {name} to policy_advantages"
                )
    clip_range = _clip_range(clip)
    if dual_clip is not None:
        dual_clip = _above_one("dual_clip", dual_clip)
    check_choice("reduction", reduction, (*REDUCTIONS, SEQUENCE_MEAN))
    if num_items is not None and reduction in ("none", "sum"):
        raise ValueError(
            "num_items is the denominator of 'mean', 'batchmean' and 'sequence_mean'; "
            f"reduction is {reduction!r}"
        )
    check_flags(return_parts=return_parts)
    student = _logprobs("student_logprobs", student_logprobs)
    teacher = _constant("teacher_logprobs", teacher_logprobs, student_logprobs)
    old = _constant("old_logprobs", old_logprobs, student_logprobs)
    extra = _constant("advantages", advantages, student_logprobs)
    factor = _constant("weight", weight, student_logprobs)
    _check_mask(mask, "student_logprobs", student_logprobs)
    if reduction == SEQUENCE_MEAN:
        _check_sequences("reduction", SEQUENCE_MEAN, student)
    _check_values({"student_logprobs": student, "old_logprobs": old}, mask)
    _check_values({"teacher_logprobs": teacher}, mask, zero_allowed=clamp is not None)

    inputs = savable(student, teacher, old, extra, factor)
    (mask,) = savable(mask)
    kept = mask
    if factor is not None:
        kept = factor != 0 if mask is None else mask & (factor != 0)
    # Masking inputs rather than the loss: where an input is infinite, a masked loss would have the gradient inf * 0.
    # With these inputs the loss of a dropped token is 0, in every form.
    student, teacher, old, extra, factor = (_masked(x, kept) for x in inputs)
    before = student.detach() if old is None else old
    if form == "policy_gradient":
        advantage = _advantage(teacher, before, extra, coef, clamp)
        loss, clipped, bounded = _surrogate(student, before, advantage, clip_range, dual_clip)
    else:
        assert teacher is not None  # _check_form
        loss = coef * _estimate(form, student, teacher, clamp)
        advantage, clipped, bounded = None, None, None
    if factor is not None:
        loss = loss * factor
    value = _reduced(loss, mask, reduction, num_items)
    if not return_parts:
        return value
    with torch.no_grad():
        counted = _count(student, mask)

        def mean(values: Tensor | None, otherwise: float = 0.0) -> Tensor:
            if values is None:
                return (counted > 0).to(loss.dtype) * otherwise
            total = values.sum(dtype=torch.float64)  # 0 where tokens are masked
            return (total / counted.clamp(min=1)).to(loss.dtype)

        return value, PolicyParts(
            teacher_kl=mean(None if teacher is None else before - teacher),
            policy_kl=mean(before - student.detach()),
            clip_fraction=mean(clipped),
            dual_clip_fraction=mean(bounded),
            mean_advantage=mean(advantage),
            mean_abs_advantage=mean(None if advantage is None else advantage.abs()),
            mean_weight=mean(factor, 1.0),
            rejected_fraction=mean(None if factor is None else _masked(factor == 0, mask)),
            counted=counted,
        )


# ---- the terms


def _advantage(
    teacher: Tensor | None, before: Tensor, extra: Tensor | None, coef: float, clamp: float | None
) -> Tensor:
    """A = coef sg(t - old) + advantages; at least one of teacher and extra is given."""
    if teacher is None:
        assert extra is not None  # _check_form
        return extra
    gap = teacher - before
    if clamp is not None:
        gap = _limited(gap, -clamp, clamp)
    return coef * gap if extra is None else coef * gap + extra


def _surrogate(
    student: Tensor,
    before: Tensor,
    advantage: Tensor,
    clip_range: tuple[float, float] | None,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(the loss of each token, whether the clipped term is the loss, whether the bound of dual_clip is)."""
    ratio = (student - before).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    loss = -advantage * ratio
    clipped = bounded = None
    if clip_range is not None:
        pessimistic = -advantage * _limited(ratio, *clip_range)
        clipped = pessimistic > loss
        loss = torch.where(clipped, pessimistic, loss)
    if dual_clip is not None:
        bound = -advantage * dual_clip
        bounded = (advantage < 0) & (loss > bound)
        loss = torch.where(bounded, bound, loss)
    return loss, clipped, bounded


def _estimate(form: str, student: Tensor, teacher: Tensor, clamp: float | None) -> Tensor:
    """The value of form "k2", "k3" or "abs" for each token."""
    log_ratio = teacher - student
    if form == "k2":
        if clamp is not None:
            # The gradient of an infinite log_ratio would be 0 * inf, which is NaN.
            log_ratio = log_ratio.clamp(-LARGEST, LARGEST)
        value = 0.5 * log_ratio * log_ratio
    elif form == "abs":
        value = log_ratio.abs()
    else:
        log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        value = torch.expm1(log_ratio) - log_ratio
    return value if clamp is None else _limited(value, -clamp, clamp)


def _limited(values: Tensor, low: float, high: float) -> Tensor:
    """The values, limited to [low, high]."""
    if torch.compiler.is_compiling():  # as numbers, the limits would become constants of the graph
        return values.clamp(values.new_ones(()) * low, values.new_ones(()) * high)
    return values.clamp(low, high)


def _discounted(rewards: Tensor, discount: float) -> Tensor:
    """sum_(k >= t) discount^(k-t) rewards_k along the last dimension; each step doubles the tokens that are summed."""
    length, reach = rewards.shape[-1], 1
    while reach < length:
        later = discount**reach * rewards[..., reach:]
        rewards = rewards + torch.nn.functional.pad(later, (0, reach))
        reach *= 2
    return rewards


# ---- reductions


def _count(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full((), values.numel(), dtype=torch.int64, device=values.device)
    return mask.sum()


def _reduced(
    loss: Tensor, mask: Tensor | None, reduction: str, num_items: int | float | Tensor | None
) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == SEQUENCE_MEAN:
        every = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask
        tokens = every.sum(-1)
        sums = loss.sum(-1, dtype=torch.float64) / tokens.clamp(min=1)
        items = (tokens > 0).sum()
    else:
        sums, items = loss, _count(loss, mask)
    total = sums.sum(dtype=torch.float64)
    if torch.compiler.is_compiling() and is_number(num_items):
        divisor: Any = num_items  # its value may be unknown until the graph runs
    else:
        name = "mean" if reduction == SEQUENCE_MEAN else reduction
        divisor = denominator(name, num_items, items, loss.shape, loss.device, torch.float64)
    return (total / divisor).to(loss.dtype)


# ---- checks


def _check_form(
    form: str,
    teacher: Tensor | None,
    old: Tensor | None,
    advantages: Tensor | None,
    clip: object,
    dual_clip: object,
) -> None:
    """Raise unless the form exists and has what it needs, and nothing that it ignores."""
    if form in ("k1", "kl"):
        raise ValueError(
            f"form must not be {form!r}: the gradient of s - t is that of log q, which is 0 in expectation. Use "
            "'policy_gradient', its score-function form, which has the gradient of KL(q || p)"
        )
    check_choice("form", form, FORMS)
    if form == "policy_gradient":
        if teacher is None and advantages is None:
            raise ValueError(
                "teacher_logprobs or advantages must be given for form='policy_gradient'; both are None"
            )
        for name, value in (("clip", clip), ("dual_clip", dual_clip)):
            if value is not None and old is None:
                raise ValueError(
                    f"{name} limits the ratio of student_logprobs to old_logprobs, and old_logprobs is None"
                )
        return
    if teacher is None:
        raise ValueError(f"teacher_logprobs must be given for form={form!r}, got None")
    ignored = {
        "old_logprobs": old, "advantages": advantages, "clip": clip, "dual_clip": dual_clip
    }  # fmt: skip
    for name, value in ignored.items():
        if value is not None:
            remedy = {
                "old_logprobs": "; pass weight=importance_weights(student_logprobs, old_logprobs)",
                "advantages": "; add a second loss with form='policy_gradient'",
            }.get(name, "")
            raise ValueError(
                f"{name} is for form='policy_gradient'; form={form!r} has no ratio{remedy}"
            )


def _check_sequences(option: str, value: object, tokens: Tensor) -> None:
    """Raise if an option that looks along sequences is used on tokens without a dimension of sequences."""
    if value and tokens.dim() < 2:
        raise ValueError(
            f"{option}={value} needs log-probabilities [..., T] with one sequence in the last dimension; got shape "
            f"{tuple(tokens.shape)}. Tokens of several sequences in one row would count as one sequence"
        )


def _floating(argument: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{argument} must be floating point, got {value.dtype}")
    # In float32: the difference of two close log-probabilities in bfloat16 would lose all its digits.
    return widened(value)


def _logprobs(argument: str, value: object) -> Tensor:
    value = _floating(argument, value)
    if value.dim() == 0:
        raise ValueError(f"{argument} must be [..., T], got a scalar")
    return value


def _constant(argument: str, value: Tensor | None, student: Tensor) -> Tensor | None:
    """The value in float32 or float64; raise unless it fits the student's log-probabilities and needs no gradient."""
    if value is None:
        return None
    result = _floating(argument, value)
    check_alike(argument, value, "student_logprobs", student)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{argument} requires grad, and on_policy_loss has a gradient for student_logprobs only; detach it"
        )
    return result.to(row_dtype(value.dtype, student.dtype))


def _check_mask(mask: Tensor | None, other: str, like: Tensor) -> None:
    if mask is not None:
        check_mask(mask, other, like)


def _check_values(
    named: dict[str, Tensor | None], mask: Tensor | None, zero_allowed: bool = False
) -> None:
    """Under FASTKD_CHECK=1, raise if the value of a counted token is no log-probability.

    zero_allowed: whether -inf is one.
    """
    if torch.compiler.is_compiling() or not checking():
        return
    for argument, value in named.items():
        if value is None:
            continue
        valid = value.detach() <= ROUNDING
        if not zero_allowed:
            valid &= value.detach() != -torch.inf
        bad = ~valid if mask is None else mask & ~valid
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"{argument} must be finite logarithms of probabilities, at most 0, where mask is True; token "
                f"{index} has {float(value.detach()[index])}"
            )


def _masked(values: Any, mask: Tensor | None) -> Any:
    """The values, and 0 where mask is False, with gradient 0."""
    return values if mask is None or values is None else torch.where(mask, values, 0)


# While a graph is compiled, a number may be a symbol, whose value is not known; only its kind is checked then.


def _finite(argument: str, value: float) -> float:
    if torch.compiler.is_compiling() and is_number(value):
        return value
    return check_number(argument, value, -LARGEST, LARGEST)


def _in_range(argument: str, value: float, low: float, high: float) -> float:
    if torch.compiler.is_compiling() and is_number(value):
        return value
    return check_number(argument, value, low, high)


def _positive_or_none(argument: str, value: float | None) -> float | None:
    if value is None or (torch.compiler.is_compiling() and is_number(value)):
        return value
    return check_magnitude(argument, check_number(argument, value, 0.0, LARGEST))


def _above_one(argument: str, value: float) -> float:
    value = _in_range(argument, value, 0.0, LARGEST)
    if not torch.compiler.is_compiling() and value <= 1.0:
        raise ValueError(f"{argument} must be greater than 1, got {value}")
    return value


def _pair(argument: str, value: object) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{argument} must be two numbers (low, high), got {value!r}")
    low, high = value
    return _in_range(argument, low, 0.0, LARGEST), _in_range(argument, high, 0.0, LARGEST)


def _bounds(argument: str, value: object) -> tuple[float, float]:
    low, high = _pair(argument, value)
    if not torch.compiler.is_compiling() and not low < high:
        raise ValueError(f"{argument} must have low < high, got ({low}, {high})")
    return low, high


def _clip_range(clip: float | tuple[float, float] | None) -> tuple[float, float] | None:
    """The range of the clipped ratio."""
    if clip is None:
        return None
    clip = plain(clip)
    low, high = (
        _pair("clip", clip) if isinstance(clip, (tuple, list)) else _pair("clip", (clip, clip))
    )
    if not torch.compiler.is_compiling() and low > 1.0:
        raise ValueError(f"clip must have low <= 1, because a ratio is positive; got {low}")
    return 1.0 - low, 1.0 + high
