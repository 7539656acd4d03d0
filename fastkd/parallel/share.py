"""Turns the validated call of each process into one call of all: their agreement, and the columns of each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastkd.backends import registry
from fastkd.call.checks import LossCall, check_values, checking
from fastkd.call.contract import Shard, Want
from fastkd.core.scalars import check_int
from fastkd.divergences import function_name
from fastkd.parallel.agreement import Agreed, Agreement, digest_of
from fastkd.parallel.layout import cut, cut_teacher
from fastkd.teachers import RoutedTeacher, Teacher, flatten, weights_of


def agreed_by(group: Any) -> contextlib.AbstractContextManager[Agreement | None]:
    """The context for the validation of a call, by one process or by a group that has to agree."""
    return contextlib.nullcontext() if group is None else Agreement(group)


def share(
    agreement: Agreement,
    call: LossCall,
    want: Want,
    lead: torch.Size,
    student: Iterable[Tensor | None],
    teacher: Teacher,
    vocab_size: int | None,
    widths: dict[str, int],
    **others: object,
) -> tuple[LossCall, int]:
    """Return (the call restricted to this process's columns, the width of its shard), once all processes agree.

    widths has the student first, then the tensors of the teacher; others are further facts that have to agree.

    Raises:
        ValueError, RuntimeError: a process has other arguments, or raises; then every process raises.
    """
    group = agreement.group
    (_, width), *teacher_widths = widths.items()
    different = {other for _, other in teacher_widths} - {width}
    other = min(different, default=0) if len(different) < 2 else -1
    facts = _facts(call, want, lead, student, teacher) | others | {"vocab_size": vocab_size}
    agreed = agreement.reached([width, other], facts)
    shard, columns = _shard(agreed, vocab_size, group, next(iter(widths)))
    options = call.options._replace(vocab_size=columns, shard=shard)
    check_values(call.rows, options)
    return call._replace(options=options), width


def share_columns(
    agreement: Agreement,
    argument: str,
    width: int,
    vocab_size: int | None,
    facts: dict[str, object],
) -> tuple[Shard, int]:
    """Return (this process's shard of a vocabulary, how many of its columns count), once all processes agree.

    argument: the name of the tensor that has `width` columns on this process; facts: what else has to agree.

    Raises:
        ValueError, RuntimeError: a process has other arguments, or raises; then every process raises.
    """
    agreed = agreement.reached([width, 0], facts | {"vocab_size": vocab_size})
    return _shard(agreed, vocab_size, agreement.group, argument)


def facts_of_rows(per_row: dict[str, Tensor | None]) -> dict[str, object]:
    """What has to agree of tensors with values per row: their shapes, and under FASTKD_CHECK=1 all values."""
    return {
        name: digest_of(value) if checking() else f"a tensor {tuple(value.shape)}"
        for name, value in per_row.items()
        if value is not None
    }


_FACTOR = "the factor of the loss (from num_items or the number of rows)"


def _facts(
    call: LossCall,
    want: Want,
    lead: torch.Size,
    student: Iterable[Tensor | None],
    teacher: Teacher,
) -> dict[str, object]:
    """What has to agree between processes, by the names that users know."""
    tensors_of_student = [tensor for tensor in student if tensor is not None]
    tensors, form = flatten(teacher)
    divergence = call.options.divergence
    facts: dict[str, object] = {
        "the shape of rows": tuple(lead),
        "the student": [(tensor.dtype, tensor.device.type) for tensor in tensors_of_student],
        "teacher": (
            form,
            weights_of(teacher),
            [(tensor.dtype, tensor.shape[:-1]) for tensor in tensors if tensor.dim() > 2],
        ),
        "teacher's dtypes": [tensor.dtype for tensor in tensors],
        "divergence": (
            divergence.name,
            function_name(divergence.function),
            divergence.params,
            divergence.target,
        ),
        "the backend": registry.select(
            call.backend,
            tensors_of_student[0].device.type,
            tensors_of_student[0].dtype,
            tensors[0].dtype,
            divergence,
        ),
        "what requires grad": tuple(want),
        "whether the loss is one number": call.summed,
    }
    facts |= {
        name: value
        for name, value in call.options._asdict().items()
        if name not in ("divergence", "scale", "vocab_size", "shard")
    }
    facts[_FACTOR] = call.options.scale
    # A tensor per row replaces the number of the same name.
    per_row = {
        _FACTOR if name == "scale" else name: value for name, value in call.rows._asdict().items()
    }
    if isinstance(teacher, RoutedTeacher):
        facts["how many rows each teacher has"] = teacher.sizes()
        per_row["teacher.index"] = teacher.index
    return facts | facts_of_rows(per_row)


def _shard(agreed: Agreed, vocab_size: int | None, group: Any, student: str) -> tuple[Shard, int]:
    """Return (the shard, how many of its columns count); every process raises the same error."""
    widths = [width for width, _ in agreed.numbers]
    total = sum(widths)
    vocabulary = total if vocab_size is None else check_int("vocab_size", vocab_size)
    if not 1 <= vocabulary <= total:
        raise ValueError(
            f"vocab_size must be in [1, {total}], the columns of all processes; got {vocabulary}"
        )
    for rank, (width, other) in enumerate(agreed.numbers):
        whole = other == total or (vocab_size is not None and other >= vocabulary)
        if other and not whole:
            has = "tensors of several widths" if other < 0 else f"{other} columns"
            raise ValueError(
                f"on process {rank} the teacher has {has}, and {student} has {width} of the {total} columns of all "
                "processes: pass the same columns of the teacher, or all of them"
            )
    first = min(sum(widths[: agreed.rank]), vocabulary)
    columns = min(vocabulary - first, widths[agreed.rank])
    return Shard(first, vocabulary, max(widths), agreed.rank, group), columns


def share_logits(
    agreement: Agreement,
    student: Tensor,
    whole: bool,
    teacher: Teacher,
    call: LossCall,
    want: Want,
    vocab_size: int | None,
    widths: dict[str, int],
) -> tuple[Tensor, Any, LossCall]:
    """Return (student logits, teacher, call), restricted to this process's columns.

    whole: every process has all columns of the student.
    """
    if whole:  # the teacher then defines the shards
        widths = dict(sorted(widths.items(), key=lambda item: item[0] == "student_logits"))
    call, width = share(
        agreement, call, want, student.shape[:-1], [student], teacher, vocab_size, widths
    )
    shard, columns = call.options.shard, call.options.vocab_size
    assert shard is not None
    if student.shape[-1] != width:
        student = cut(student, shard, columns)
    return student, cut_teacher(teacher, shard, columns, width), call
