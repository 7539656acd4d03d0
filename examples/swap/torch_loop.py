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

Both train the same student on the same batches; the run fails where a step's losses differ by more than the tolerance.
"""

import time
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from side_by_side import Problem, Run, compare, problem
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


def train(given: Problem, loss_of_step: Loss) -> Run:
    """A fresh student on all batches."""
    student = given.new_student()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4)
    run = Run([], [])
    for batch in given.batches:
        start = time.perf_counter()
        with torch.no_grad():
            teacher_logits = given.teacher(batch["input_ids"], use_cache=False).logits
        student_logits = student(batch["input_ids"], use_cache=False).logits
        loss = loss_of_step(student_logits, teacher_logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
        run.seconds.append(time.perf_counter() - start)
    return run


def main(
    steps: Annotated[int, typer.Option(min=1)] = 6,
    tiny: Annotated[bool, typer.Option(help="Random models of two layers.")] = False,
    tolerance: Annotated[float, typer.Option(help="Of a step's loss, relative.")] = 1e-3,
) -> None:
    """Train twice, and compare."""
    given = problem(steps, tiny)
    raise typer.Exit(compare(train(given, by_hand), train(given, with_fastkd), tolerance))


if __name__ == "__main__":
    typer.run(main)
