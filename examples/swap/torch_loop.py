"""A plain PyTorch loop that distils a causal language model, with a loss written by hand and with fastkd's.

    python examples/swap/torch_loop.py          # SmolLM2-135M teaches six of its layers: a minute on two cores
    python examples/swap/torch_loop.py --tiny   # random models, in seconds

The swap, in `loss_of_step`:

    -    log_q = F.log_softmax(student_logits.float() / T, dim=-1)
    -    log_p = F.log_softmax(teacher_logits.float() / T, dim=-1)
    -    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    -    counted = labels != -100
    -    distillation = T**2 * kl[counted].mean()
    -    cross_entropy = F.cross_entropy(student_logits.flatten(0, 1), labels.flatten())
    -    return ALPHA * distillation + (1 - ALPHA) * cross_entropy
    +    return fastkd.kd_loss(student_logits, teacher_logits, labels, temperature=T, alpha=ALPHA)

Both train the same student on the same batches; the run fails where the curves differ by more than rounding does.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from side_by_side import ASSETS, Batch, Setting, compare, setting
from torch import Tensor

import fastkd

T, ALPHA = 2.0, 0.7

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_hand(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """The loss as one writes it: logits [B, S, V], labels [B, S], -100 where a position does not count."""
    log_q = F.log_softmax(student_logits.float() / T, dim=-1)
    log_p = F.log_softmax(teacher_logits.float() / T, dim=-1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    counted = labels != -100
    distillation = T**2 * kl[counted].mean()
    cross_entropy = F.cross_entropy(student_logits.flatten(0, 1), labels.flatten())
    return ALPHA * distillation + (1 - ALPHA) * cross_entropy


def with_fastkd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """The same number."""
    return fastkd.kd_loss(student_logits, teacher_logits, labels, temperature=T, alpha=ALPHA)


def train(given: Setting, batches: list[Batch], loss_of_step: Loss) -> list[float]:
    """A fresh student on all batches; the losses of its steps."""
    student = given.new_student()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4)
    losses = []
    for batch in batches:
        with torch.no_grad():
            teacher_logits = given.teacher(batch["input_ids"], use_cache=False).logits
        student_logits = student(batch["input_ids"], use_cache=False).logits
        loss = loss_of_step(student_logits, teacher_logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(
    tiny: Annotated[bool, typer.Option(help="Two tiny models, and nothing to install.")] = False,
    steps: Annotated[int, typer.Option(min=1)] = 6,
    assets: Annotated[Path, typer.Option(help="Where SmolLM2 lies.")] = ASSETS,
) -> None:
    """Train with the loss by hand and with fastkd's, and compare."""
    given = setting(tiny, assets)
    batches = given.batches(steps)
    compare(
        "PyTorch",
        lambda: partial(train, given, batches, by_hand),
        lambda: partial(train, given, batches, with_fastkd),
        tiny,
    )


if __name__ == "__main__":
    typer.run(main)
