"""Options that change from step to step in a compiled function: eager's values, from two graphs at most.

torch.compile takes a number for a constant until it changes, and then for a symbol, which an op may not be given as it
is: torch's graph caches would give a step the graph of another value. Inductor's caches are on in these tests, and in a
second process they are warm. The other compiler here, aot_eager, has no cache; it counts graphs in little time.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import labels_for, logits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import fastkd
from fastkd import kd_loss

ROWS, COLUMNS, STEPS = 5, 13, 20

Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _between(first: float, last: float, step: int, steps: int = STEPS) -> float:
    """Both ends are among the values."""
    return first + (last - first) * step / (steps - 1)


def _of_user(p: Any, q: Any, log_p: Any, log_q: Any, factor: float, other: float) -> Any:
    return factor * other * p * (log_p - log_q), -factor * other * p


# What changes, from the share of the way that is done, in [0, 1]. Labels are given where alpha or a divergence wants them.
SCHEDULES: dict[str, Callable[[float], dict[str, Any]]] = {
    "temperature": lambda x: {"temperature": 4.0 - 3.0 * x},
    "integer temperature": lambda x: {"temperature": 1 + round(19 * x)},
    "teacher_temperature": lambda x: {"temperature": 2.0, "teacher_temperature": 4.0 - 3.0 * x},
    "alpha": lambda x: {"alpha": 1.0 - x},
    "label_smoothing": lambda x: {"alpha": 0.5, "label_smoothing": 0.5 * x},
    "logit_scale": lambda x: {"logit_scale": 0.5 + x},
    "softcap": lambda x: {"softcap": 5.0 + 5.0 * x},
    "teacher_logit_scale": lambda x: {"teacher_logit_scale": 1.5 - x},
    "teacher_softcap": lambda x: {"teacher_softcap": 9.0 - 5.0 * x},
    "num_items": lambda x: {"num_items": 1 + round(19 * x)},
    "num_items, a float": lambda x: {"num_items": 0.5 + 7.0 * x},
    "num_items, a tensor": lambda x: {"num_items": torch.tensor(1 + round(19 * x))},
    "jsd": lambda x: {"divergence": fastkd.jsd(x)},
    "skew_forward_kl": lambda x: {"divergence": fastkd.skew_forward_kl(0.9 * x)},
    "skew_reverse_kl": lambda x: {"divergence": fastkd.skew_reverse_kl(0.9 * x)},
    "mixture": lambda x: {"divergence": fastkd.mixture(1.0 - x, x)},
    "alpha_beta": lambda x: {"divergence": fastkd.alpha_beta(x, 1.0 - x)},
    "smooth_l1": lambda x: {"divergence": fastkd.smooth_l1(0.5 + x)},
    "dkd": lambda x: {"divergence": fastkd.dkd(1.0 + x, 8.0 - x)},
    "nkd": lambda x: {"divergence": fastkd.nkd(1.5 - x), "temperature": 1.0 + x},
    "of the user": lambda x: {
        "divergence": fastkd.Divergence("mine", _of_user, (1.0 + x, 2.0 + x), 1.0),
        "backend": "reference",
    },
}
WITH_LABELS = ("alpha", "label_smoothing", "dkd", "nkd")


def _all_together(x: float) -> dict[str, Any]:
    together: dict[str, Any] = {}
    for name in ("temperature", "teacher_temperature", "alpha", "label_smoothing", "logit_scale", "softcap",
                 "teacher_logit_scale", "teacher_softcap", "num_items, a float", "jsd"):  # fmt: skip
        together |= SCHEDULES[name](x)
    return together | {"temperature": 3.0 - x, "alpha": 1.0 - x}


def _outcome(loss: Loss, *tensors: Tensor, **options: Any) -> list[Tensor]:
    """Value and gradient of the first tensor."""
    leaf = tensors[0].clone().requires_grad_()
    value = loss(leaf, *tensors[1:], **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaf)]


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (logits(ROWS, COLUMNS, seed=seed) for seed in (1, 2))
    return student, teacher, labels_for(ROWS, vocabulary=COLUMNS, seed=3, ignored=0.2)


def _agree(found: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def _follow(
    loss: Loss,
    compiled: Loss,
    schedule: Callable[[float], dict[str, Any]],
    steps: int,
    *labels: Tensor,
) -> None:
    student, teacher, _ = _batch()
    seen = []
    for step in range(steps):
        options = schedule(_between(0.0, 1.0, step, steps))
        wanted = _outcome(loss, student, teacher, *labels, **options)
        _agree(_outcome(compiled, student, teacher, *labels, **options), wanted)
        seen.append(wanted[1])
    assert not torch.equal(seen[0], seen[-1])  # or the schedule would say nothing


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_two_graphs(name: str, dynamic: bool | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kd_loss, fullgraph=True, dynamic=dynamic, backend=counter)
    labels = _batch()[2:] if name in WITH_LABELS else ()
    _follow(kd_loss, compiled, SCHEDULES[name], 7, *labels)
    assert counter.frame_count <= 2
