"""Losses of a RoutedTeacher by processes that share the vocabulary, for tests/teachers/test_routed.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastkd
from fastkd import LinearTeacher, RoutedTeacher, TopK

WIDTHS = (15, 22)


def _columns(group: Any) -> slice:
    rank = dist.get_rank(group)
    return slice(sum(WIDTHS[:rank]), sum(WIDTHS[: rank + 1]))


def _part(member: Any, columns: slice) -> Any:
    if isinstance(member, TopK):
        return member
    if isinstance(member, LinearTeacher):
        bias = None if member.bias is None else member.bias[columns]
        return LinearTeacher(member.hidden, member.weight[columns], bias)
    return member[:, columns]


def _run(
    form: str,
    student: Tensor,
    head: Tensor,
    hidden: Tensor,
    members: list[Any],
    index: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(the loss, the gradient of student or head, the gradient of the first teacher)."""
    teacher_leaf = torch.zeros(0)
    if form.endswith("trained"):
        members = [member.clone().requires_grad_() for member in members]
        teacher_leaf = members[1]
    leaf = (head if form == "hidden states" else student).clone().requires_grad_()
    teacher = RoutedTeacher(members, index)
    if form == "hidden states":
        loss = fastkd.fused_linear_kd_loss(hidden, leaf, teacher, chunk_size=3, **options)
    else:
        loss = fastkd.kd_loss(leaf, teacher, **options)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert leaf.grad is not None
    teacher_gradient = teacher_leaf.grad if teacher_leaf.grad is not None else teacher_leaf
    return loss.detach(), leaf.grad, teacher_gradient.detach()


def on_one(
    form: str, student: Tensor, head: Tensor, hidden: Tensor, members: list[Any], index: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:  # fmt: skip
    """The results of one process."""
    return _run(form, student, head, hidden, members, index, mask=mask)


def losses(
    group: Any, form: str, student: Tensor, head: Tensor, hidden: Tensor, members: list[Any], index: Tensor,
    mask: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same from this process's columns, with the gradients of all columns."""
    columns = _columns(group)
    parts = members if form.startswith("whole") else [_part(member, columns) for member in members]
    loss, gradient, teacher_gradient = _run(
        form, student[..., columns], head[columns], hidden, parts, index, mask=mask, process_group=group
    )  # fmt: skip
    axis = 0 if form == "hidden states" else -1

    def whole(part: Tensor, axis: int) -> Tensor:
        parts: list[Any] = [None] * 2
        dist.all_gather_object(parts, part, group=group)
        return torch.cat(parts, axis)

    if form == "trained":
        teacher_gradient = whole(teacher_gradient, -1)
    return loss, whole(gradient, axis), teacher_gradient


def other_index(group: Any, student: Tensor, members: list[Any], index: Tensor) -> None:
    """Pass teachers with other numbers of rows on the second process; both raise."""
    columns = _columns(group)
    rank = dist.get_rank(group)
    index = index.flatten() if rank == 0 else torch.zeros(index.numel(), dtype=torch.int64)
    sizes = [int((index == k).sum()) for k in range(3)]
    teachers = [torch.zeros(n, WIDTHS[rank]) for n in sizes]
    fastkd.kd_loss(
        student.flatten(0, 1)[:, columns], RoutedTeacher(teachers, index), process_group=group
    )


def of_teacher(group: Any, student: Tensor, teacher: Any) -> Tensor:
    """The loss of a teacher that every process has as a whole."""
    loss = fastkd.kd_loss(
        student[..., _columns(group)], teacher, reduction="none", process_group=group
    )
    assert isinstance(loss, Tensor)
    return loss
