"""What is compared: each loss in plain PyTorch, as people write it, and in fastkd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd.divergences import derivatives

Rows = Callable[[Tensor, Tensor], Tensor]  # (student [..., V], teacher [..., V]) -> loss [...]


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    # log_target is the faster way to say it: a target of probabilities costs another logarithm.
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    from_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    from_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return 0.5 * (from_teacher + from_student).sum(-1)


def tvd(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)


class Loss(NamedTuple):
    """A loss that is measured. With T the temperature, it is T^2 times the formula of logits / T."""

    label: str
    divergence: fastkd.Divergence
    formula: Rows
    temperature: float = 1.0


# Hinton's loss at the temperature it is known for; the others as GKD, f-distill and MiniLLM have them.
LOSSES: dict[str, Loss] = {
    "forward_kl": Loss("Hinton (T = 2)", fastkd.forward_kl(), forward_kl, 2.0),
    "jsd": Loss("jsd(0.5)", fastkd.jsd(0.5), jsd),
    "tvd": Loss("tvd", fastkd.tvd(), tvd),
    "reverse_kl": Loss("reverse KL", fastkd.reverse_kl(), reverse_kl),
}


def from_definition(divergence: fastkd.Divergence) -> Loss:
    """A loss of fastkd's table that has no formula above: its definition, differentiated by autograd."""

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = student, teacher
        if divergence.normalized:
            log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
        phi, *_ = derivatives(divergence, log_p.exp(), log_q.exp(), log_p, log_q, log_p - log_q)
        return phi.sum(-1)

    return Loss(divergence.name, divergence, formula)


def eager_rows(loss: Loss, dtype: torch.dtype) -> Rows:
    """The loss of each row in plain PyTorch, computed in dtype."""

    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = student.to(dtype), teacher.to(dtype)
        if loss.temperature == 1:
            return loss.formula(student, teacher)
        t = loss.temperature
        return t * t * loss.formula(student / t, teacher / t)

    return rows


def fastkd_loss(loss: Loss, **options: Any) -> Rows:
    """The same loss of fastkd. The backend is named, "cpu" unless it is given, so that a missing one is an error."""
    options = {
        "divergence": loss.divergence,
        "temperature": loss.temperature,
        "backend": "cpu",
        **options,
    }

    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        value = fastkd.kd_loss(student, teacher, **options)
        assert isinstance(value, Tensor)
        return value

    return rows


def mean_of(rows: Rows) -> Rows:
    """The mean over rows, which is what is trained on."""

    def mean(student: Tensor, teacher: Tensor) -> Tensor:
        return rows(student, teacher).mean()

    return mean


IN_PLACE = "fastkd in place"
PORTABLE = "fastkd (portable)"
CONTENDERS = ("eager", "eager, no upcast", "torch.compile", "fastkd", PORTABLE, IN_PLACE)


def make(loss: Loss, dtype: torch.dtype) -> dict[str, Rows]:
    """The CONTENDERS for logits of that dtype; without an upcast to omit, `eager` is the only one of its kind."""
    upcast = mean_of(eager_rows(loss, torch.float32))
    # Fixed sizes, and a case starts afresh: the most favourable conditions there are.
    torch.compiler.reset()
    contenders = {
        "eager": upcast,
        "eager, no upcast": mean_of(eager_rows(loss, dtype)),
        "torch.compile": torch.compile(upcast, fullgraph=True, dynamic=False),
        "fastkd": fastkd_loss(loss),
        PORTABLE: fastkd_loss(loss, backend="portable"),
        IN_PLACE: fastkd_loss(loss, inplace=True),
    }
    if dtype == torch.float32:
        del contenders["eager, no upcast"]
    return contenders


class Produced(torch.autograd.Function):
    """logits, as though a model had made them from parameter."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(()), None


class Inputs:
    """Student and teacher logits, and one training step on them."""

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        self.student = student.requires_grad_()
        self.teacher = teacher
        self._parameter = torch.zeros((), requires_grad=True)
        self._original: Tensor | None = None

    def step(self, loss: Rows, *, produced: bool = False) -> None:
        """Forward and backward: to a leaf, or through logits that a model produced, which may be overwritten."""
        student = self.student
        if produced:
            student = Produced.apply(self._parameter, student.detach())
        loss(student, self.teacher).backward()

    def drop_gradients(self) -> None:
        """What an optimizer does after a step."""
        self.student.grad = self._parameter.grad = None

    def keep_original(self) -> None:
        """A copy of the student's logits for :meth:`restore`."""
        self._original = self.student.detach().clone()

    def restore(self) -> None:
        """The student's logits as they were."""
        assert self._original is not None
        self.student.detach().copy_(self._original)


def random_logits(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normal logits of student and teacher, of standard deviation 3."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator).mul_(3).to(dtype) for _ in range(2))
    return student, teacher


def shape_of(text: str) -> tuple[int, int]:
    """A command-line shape, such as 512x32768."""
    n, _, v = text.partition("x")
    return int(n), int(v)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = ((512, 32_768), (256, 131_072))
