"""Policy distillation of a teacher's Q-values or logits, by one call of kd_loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.call.checks import check_choice, check_logits, check_rows
from fastkd.core.scalars import check_int
from fastkd.divergences import squared_error
from fastkd.functional import kd_loss


def policy_distillation_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    form: str = "kl",
    temperature: float | Tensor = 0.01,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Policy distillation (Rusu et al. 2016) of a teacher's Q-values or logits t, in three forms.

        "nll"   -log softmax(s)[argmax t]
        "mse"   ||s - t||^2
        "kl"    KL(softmax(t / tau) || softmax(s))

    The temperature tau sharpens only the teacher, and there is no factor tau^2. Each form is one call of
    :func:`fastkd.kd_loss`.

    Args:
        student_logits: [..., V], one column per action.
        teacher: dense logits [..., V]; if they require grad, they get a gradient ("nll" has none and raises).
        labels: [...] int64; a row whose label is ignore_index is dropped.
        form: one of the above.
        temperature: tau > 0 of "kl", a number or a float tensor [...]; the other forms ignore it.
        ignore_index: as in :func:`fastkd.kd_loss`, like all options that follow.

    Returns:
        The loss: 0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the requested backend cannot serve this call.

    Memory: the gradient.
    """
    check_choice("form", form, ("nll", "mse", "kl"))
    teacher = check_logits("teacher", teacher)
    shared: dict[str, Any] = {
        "ignore_index": ignore_index, "mask": mask, "weight": weight, "reduction": reduction,
        "num_items": num_items, "vocab_size": vocab_size, "backend": backend,
    }  # fmt: skip
    if form == "kl":
        return kd_loss(
            student_logits,
            teacher,
            labels,
            teacher_temperature=temperature,
            scale_by_temperature=False,
            **shared,
        )
    if form == "mse":
        return 2.0 * kd_loss(student_logits, teacher, labels, divergence=squared_error(), **shared)
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher requires grad, and its argmax has no gradient; detach it")
    vocab_size = None if vocab_size is None else check_int("vocab_size", vocab_size)
    ignore_index = check_int("ignore_index", ignore_index)
    actions = teacher[..., :vocab_size].argmax(-1)
    if mask is not None:
        check_rows("mask", mask, actions.shape, actions.device, (torch.bool,))
    if labels is not None:
        check_rows("labels", labels, actions.shape, actions.device, (torch.int64,))
        counted = labels != ignore_index
        shared["mask"] = counted if mask is None else counted & mask
    shared["ignore_index"] = -100  # an argmax is never negative
    return kd_loss(student_logits, teacher, actions, alpha=0.0, **shared)
