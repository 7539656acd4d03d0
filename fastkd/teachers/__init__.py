"""Teachers that are not dense logits: what a loss accepts in their place.

All of them are constants: a loss has no gradient for them, and one whose tensors require grad raises.
docs/teachers.md says which form to use when; :func:`fastkd.memory_plan` says what each costs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.core.scalars import as_float, plain
from fastkd.core.tensors import check_strided

TAILS = ("bucket", "renormalize", "renormalize_teacher", "truncate")
MEANS = ("arithmetic", "geometric")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def __getattr__(name: str) -> Any:
    """The package of the teacher cache at its first use, so that `import fastkd` does not load it."""
    if name == "cache":
        return importlib.import_module("fastkd.teachers.cache")
    raise AttributeError(f"module 'fastkd.teachers' has no attribute {name!r}")


def _check_tensor(argument: str, value: object, dtypes: Sequence[torch.dtype]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{argument} must be {allowed}, got {value.dtype}")
    check_strided(argument, value)
    return value


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
        _check_tensor("ids", self.ids, (torch.int64, torch.int32))
        _check_tensor("logprobs", self.logprobs, FLOATS)
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
            _check_tensor("tail_logprob", self.tail_logprob, FLOATS)
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
        _check_tensor("logits", logits, FLOATS)
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


@dataclass(frozen=True, eq=False)
class LinearTeacher:
    """A teacher as hidden states and an lm_head: logits = hidden @ weight.T + bias, a chunk of rows at a time.

    Args:
        hidden: [..., H], of any width; it need not be the student's.
        weight: [V, H].
        bias: [V], or None.

    All of one dtype (under autocast of any), and on one device. logit_scale and softcap of a model's head are the
    loss's teacher_logit_scale and teacher_softcap.

    Raises:
        TypeError, ValueError: a wrong type, dtype or shape; the message names the argument.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "weight", "bias"):
            value = getattr(self, name)
            if value is not None or name != "bias":
                _check_tensor(f"the teacher's {name}", value, FLOATS)
        check_linear("the teacher's ", self.hidden, self.weight, self.bias)


def check_linear(whose: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless hidden [..., H], weight [V, H] and bias [V] go together. whose: "the teacher's ", "student_"."""
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{whose}hidden must be [..., H], got shape {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{whose}weight must be [V, {hidden.shape[-1]}], as hidden has that width; got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{whose}bias must be [{weight.shape[0]}], one a row of weight; got {tuple(bias.shape)}"
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.device != hidden.device:
            raise ValueError(
                f"{whose}{name} must be on {hidden.device}, where {whose}hidden is; got {value.device}"
            )
        if value.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(
                f"{whose}{name} must be {hidden.dtype}, as {whose}hidden is; got {value.dtype}"
            )


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Several teachers as one target.

    - "arithmetic": p = sum_k w_k p_k. The weighted mean of the forward KLs to the teachers differs from the forward
      KL to p by a constant, so it has the same gradient.
    - "geometric": p proportional to prod_k p_k^(w_k), the softmax of the weighted mean of the logits; likewise for
      the mean of the reverse KLs.

    Each teacher is tempered by itself, then they are combined, a chunk of rows at a time.

    Args:
        teachers: dense logits [..., V] and :class:`LinearTeacher`, at least one.
        weights: one a teacher, not negative, of a positive sum; they are divided by it. None: equal.
        mean: "arithmetic" or "geometric".

    Raises:
        TypeError, ValueError: a wrong type, shape or value; the message names the argument.
    """

    teachers: Sequence[Tensor | LinearTeacher]
    weights: Sequence[float] | None = None
    mean: str = "arithmetic"

    def __post_init__(self) -> None:
        if isinstance(self.teachers, Tensor) or not isinstance(self.teachers, Sequence):
            raise TypeError(
                f"teachers must be a list of teachers, got {type(self.teachers).__name__}"
            )
        object.__setattr__(self, "teachers", tuple(self.teachers))
        if not self.teachers:
            raise ValueError("teachers must hold at least one teacher, got none")
        for index, teacher in enumerate(self.teachers):
            if isinstance(teacher, Tensor):
                _check_tensor(f"teachers[{index}]", teacher, FLOATS)
            elif not isinstance(teacher, LinearTeacher):
                raise TypeError(
                    f"teachers[{index}] must be dense logits or a LinearTeacher, got {type(teacher).__name__}"
                )
        if self.mean not in MEANS:
            raise ValueError(f"mean must be one of {', '.join(MEANS)}; got {self.mean!r}")
        if self.weights is not None and (
            isinstance(self.weights, (str, Tensor)) or not isinstance(self.weights, Iterable)
        ):
            raise TypeError(
                f"weights must be a list of numbers or None, got {type(self.weights).__name__}"
            )
        weights = (
            [1.0] * len(self.teachers) if self.weights is None else list(map(plain, self.weights))
        )
        if len(weights) != len(self.teachers):
            raise ValueError(
                f"weights must be one a teacher, {len(self.teachers)}; got {len(weights)}"
            )
        for index, weight in enumerate(weights):
            if isinstance(weight, (bool, Tensor)) or not isinstance(weight, (int, float)):
                raise TypeError(f"weights[{index}] must be a number, got {type(weight).__name__}")
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights[{index}] must be finite and not negative, got {weight}")
        if not 0 < sum(weights) < math.inf:
            raise ValueError(f"weights must have a positive, finite sum, got {weights}")
        object.__setattr__(self, "weights", tuple(weight / sum(weights) for weight in weights))


Teacher = Tensor | TopK | LinearTeacher | Ensemble


def weights_of(teacher: Teacher) -> tuple[float, ...]:
    """The weights of an ensemble's members; none where it is no ensemble."""
    if not isinstance(teacher, Ensemble):
        return ()
    assert teacher.weights is not None  # its constructor makes them
    return tuple(teacher.weights)


def flatten(teacher: Teacher) -> tuple[list[Tensor], str]:
    """(its tensors, how to put them together again); :func:`unflatten` does, given :func:`weights_of` it.

    Of a TopK its log-probabilities alone.
    """
    if isinstance(teacher, Tensor):
        return [teacher], "dense"
    if isinstance(teacher, TopK):
        return [teacher.logprobs], "dense"
    if isinstance(teacher, LinearTeacher):
        tensors = [teacher.hidden, teacher.weight]
        if teacher.bias is not None:
            tensors.append(teacher.bias)
        return tensors, f"linear{len(tensors)}"
    tensors, form = [], teacher.mean
    for member in teacher.teachers:
        parts, kind = flatten(member)
        tensors, form = tensors + parts, f"{form};{kind}"
    return tensors, form


def unflatten(
    tensors: Sequence[Tensor], form: str, weights: Sequence[float] = ()
) -> Tensor | LinearTeacher | Ensemble:
    """The teacher; a TopK's log-probabilities come back dense."""
    if form == "dense":
        return tensors[0]
    if form.startswith("linear"):
        return LinearTeacher(*tensors)
    mean, *members = form.split(";")
    teachers: list[Tensor | LinearTeacher] = []
    for kind in members:
        count = 1 if kind == "dense" else int(kind.removeprefix("linear"))
        teachers.append(unflatten(tensors[:count], kind))  # type: ignore[arg-type]  # a member is no Ensemble
        tensors = tensors[count:]
    return Ensemble(teachers, weights, mean)
