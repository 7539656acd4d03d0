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

Both train the same student on the same batches; the run fails if the curves differ by more than rounding errors.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from side_by_side import ASSETS, Batch, Note, Setting, compare, setting
from torch import Tensor

import fastkd

T, ALPHA = 2.0, 0.7

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_hand(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss of logits [B, S, V] in PyTorch; labels [B, S] are -100 at positions that are dropped."""
    log_q = F.log_softmax(student_logits.float() / T, dim=-1)
    log_p = F.log_softmax(teacher_logits.float() / T, dim=-1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    counted = labels != -100
    distillation = T**2 * kl[counted].mean()
    cross_entropy = F.cross_entropy(student_logits.flatten(0, 1), labels.flatten())
    return ALPHA * distillation + (1 - ALPHA) * cross_entropy


def with_fastkd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the same loss with fastkd."""
    return fastkd.kd_loss(student_logits, teacher_logits, labels, temperature=T, alpha=ALPHA)


def train(models: Setting, batches: list[Batch], loss_of_step: Loss, note: Note) -> None:
    """Train a new student on all batches."""
    student = models.new_student()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4)
    for batch in batches:
        with torch.no_grad():
            teacher_logits = models.teacher(batch["input_ids"], use_cache=False).logits
        student_logits = student(batch["input_ids"], use_cache=False).logits
        loss = loss_of_step(student_logits, teacher_logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        note(loss.item())


def main(
    tiny: Annotated[bool, typer.Option(help="Use two tiny models; needs no download.")] = False,
    steps: Annotated[int, typer.Option(min=1)] = 6,
    assets: Annotated[Path, typer.Option(help="Folder with SmolLM2.")] = ASSETS,
) -> None:
    """Train with the loss in PyTorch and with fastkd's, and compare."""
    models = setting(tiny, assets)
    batches = models.batches(steps)
    compare(
        "PyTorch",
        lambda: partial(train, models, batches, by_hand),
        lambda: partial(train, models, batches, with_fastkd),
        tiny,
    )


if __name__ == "__main__":
    typer.run(main)
