"""From a validated call of each process to one call of all: what they agree on, and which columns each has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastkd.backends import registry
from fastkd.call.checks import LossCall, check_int, check_values, checking
from fastkd.call.contract import Rows, Shard, Want
from fastkd.divergences import function_name
from fastkd.parallel.agreement import Agreement, Said, digest_of
from fastkd.parallel.layout import cut, cut_teacher
from fastkd.teachers import Teacher, flatten, weights_of


def agreed_by(group: Any) -> contextlib.AbstractContextManager[Agreement | None]:
    """The context of a validation: of one process, or of a group that has to agree."""
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
    """(the call as one of this process's columns, the width of its shard), once all processes have made the same call.

    widths: of the student first, then of the teacher's parts; others: what else has to be the same.

    Raises:
        ValueError, RuntimeError: on every process, where any calls with other arguments, or raises.
    """
    group = agreement.group
    (_, width), *rest = widths.items()
    different = {other for _, other in rest} - {width}
    other = min(different, default=0) if len(different) < 2 else -1
    facts = _facts(call, want, lead, student, teacher) | others | {"vocab_size": vocab_size}
    said = agreement.reached([width, other], facts)
    shard, columns = _shard(said, vocab_size, group, next(iter(widths)))
    options = call.options._replace(vocab_size=columns, shard=shard)
    check_values(call.rows, options)
    return call._replace(options=options), width


_FACTOR = "the factor of the loss (of num_items or the number of rows)"


def _facts(
    call: LossCall,
    want: Want,
    lead: torch.Size,
    student: Iterable[Tensor | None],
    teacher: Teacher,
) -> dict[str, object]:
    """What has to be the same on every process, by the name that a user knows it by."""
    given = [tensor for tensor in student if tensor is not None]
    tensors, form = flatten(teacher)
    divergence = call.options.divergence
    facts: dict[str, object] = {
        "the shape of rows": tuple(lead),
        "the student": [(tensor.dtype, tensor.device.type) for tensor in given],
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
            given[0].device.type,
            given[0].dtype,
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
    for name in Rows._fields:
        value = getattr(call.rows, name)
        if value is not None:  # else a number of the same name is there already, or nothing is
            known = _FACTOR if name == "scale" else name
            facts[known] = digest_of(value) if checking() else f"a tensor {tuple(value.shape)}"
    return facts


def _shard(said: Said, vocab_size: int | None, group: Any, student: str) -> tuple[Shard, int]:
    """(the shard, how many of its columns count); what raises is the same on every process."""
    widths = [width for width, _ in said.numbers]
    total = sum(widths)
    vocabulary = total if vocab_size is None else check_int("vocab_size", vocab_size)
    if not 1 <= vocabulary <= total:
        raise ValueError(
            f"vocab_size must be in [1, {total}], the columns of all processes; got {vocabulary}"
        )
    for rank, (width, other) in enumerate(said.numbers):
        whole = other == total or (vocab_size is not None and other >= vocabulary)
        if other and not whole:
            found = "parts of several widths" if other < 0 else f"{other} columns"
            raise ValueError(
                f"on process {rank} the teacher has {found}, and {student} {width} of {total} on all processes: "
                "give it the same columns of a teacher, or all of them"
            )
    first = min(sum(widths[: said.rank]), vocabulary)
    columns = min(vocabulary - first, widths[said.rank])
    return Shard(first, vocabulary, max(widths), said.rank, group), columns


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
    """(student logits, teacher, call) of this process's columns; whole: every process has all of the student's."""
    if whole:  # then the shards are the teacher's
        widths = dict(sorted(widths.items(), key=lambda item: item[0] == "student_logits"))
    call, width = share(
        agreement, call, want, student.shape[:-1], [student], teacher, vocab_size, widths
    )
    shard, columns = call.options.shard, call.options.vocab_size
    assert shard is not None
    if student.shape[-1] != width:
        student = cut(student, shard, columns)
    return student, cut_teacher(teacher, shard, columns, width), call
