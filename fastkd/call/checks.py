"""Validation of arguments, shared by all losses. Every error names the argument that is invalid.

:func:`prepare` turns the options of a call into what a backend takes: Options and Rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.call.contract import Options, Rows, Want, kept_rows
from fastkd.call.log_zero import infinite_at_zero
from fastkd.call.measures import DENSE_MEASURES, MEASURES
from fastkd.call.options import (
    NEED_LABELS,
    TEMPERATURES,
    Numbers,
    as_tensor,
    checked,
    completed,
    with_stand_ins,
)
from fastkd.call.routed import (
    JoinedTopK,
    check_counts,
    check_shapes,
    check_total,
    count_rows,
    joined,
    numbers_of,
    reads_index,
)
from fastkd.call.tail import MOST, masses
from fastkd.core.scalars import (
    check_flag,
    check_magnitude,
    plain,
)
from fastkd.core.tensors import check_readable, check_strided, of_torch
from fastkd.divergences import Divergence, floor_of, resolve
from fastkd.teachers import (
    Ensemble,
    LinearTeacher,
    RoutedTeacher,
    Teacher,
    TopK,
    check_linear,
    rows_of,
)

REDUCTIONS = ("none", "sum", "mean", "batchmean")
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LossCall(NamedTuple):
    """A validated call of a loss."""

    options: Options
    rows: Rows
    counted: int | Tensor  # how many rows are counted
    backend: str
    summed: bool  # whether the loss is one number, not one per row
    # While a graph is compiled: the numbers for which the options hold stand-ins; settled() checks them when the graph
    # runs. Otherwise None.
    numbers: Numbers | None = None


def prepare(
    lead: torch.Size,
    device: torch.device,
    row_dtype: torch.dtype,
    vocabulary: int | None,
    labels: Tensor | None,
    teacher: Teacher | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    backend: str = "auto",
    tail: str = "",
    **scalars: Any,
) -> LossCall:
    """Check the options of a call, and return them with the tensors of its rows.

    Args:
        lead: the leading shape of the logits.
        device: the device of the logits.
        row_dtype: the dtype of the losses.
        vocabulary: the number of columns, without padding. None if other processes have columns too; the caller then
            calls :func:`check_values` once the number of all columns is known.
        labels: as in kd_loss.
        teacher: the teacher; rows are dropped if a TopK that renormalizes lists no token for them.
        divergence: as in kd_loss.
        mask: as in kd_loss.
        weight: as in kd_loss.
        reduction: as in kd_loss.
        num_items: as in kd_loss.
        backend: as in kd_loss.
        tail: the policy of a TopK that is not passed as the teacher; "" if there is none.
        **scalars: the options of fastkd.call.options.TABLE.

    Raises:
        ValueError, TypeError: as in kd_loss.
    """
    values, numbers = completed(scalars), None
    if torch.compiler.is_compiling():
        numbers, values, num_items = with_stand_ins(values, num_items, labels)
    if values["teacher_temperature"] is None:
        values["teacher_temperature"] = values["temperature"]
    per_row = {}
    for name in TEMPERATURES:
        if isinstance(values[name], Tensor):
            per_row[name] = _row_temperatures(name, values[name], lead, device)
            values[name] = 1.0
    options = Options(resolve(divergence), **checked(values), vocab_size=vocabulary or 0)
    _check_floor(options.divergence, teacher.tail if isinstance(teacher, TopK) else tail)
    check_choice("reduction", reduction, REDUCTIONS)
    if num_items is not None and reduction not in ("mean", "batchmean"):
        raise ValueError(
            f"num_items is the denominator of 'mean' and 'batchmean'; reduction is {reduction!r}"
        )
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {type(backend).__name__}")
    _check_needs_labels(options, labels, vocabulary)
    if labels is not None:
        check_rows("labels", labels, lead, device, (torch.int64,))
    if mask is not None:
        check_rows("mask", mask, lead, device, (torch.bool,))
    if weight is not None:
        check_rows("weight", weight, lead, device, LOGIT_DTYPES)
    if isinstance(teacher, TopK) and teacher.renormalizes:
        mask = _with_teacher(mask, teacher, None if labels is None else options.alpha, numbers)
    checked_call = LossCall(options, Rows(**per_row), 0, backend, reduction != "none", numbers)
    call = with_rows(
        checked_call, lead, device, row_dtype, labels, mask, weight, reduction, num_items
    )
    if vocabulary is not None and numbers is None:
        check_values(call.rows, call.options)
    return call


def with_rows(
    call: LossCall,
    lead: torch.Size,
    device: torch.device,
    row_dtype: torch.dtype,
    labels: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    num_items: int | float | Tensor | None,
) -> LossCall:
    """The call with these rows, which have been checked, and their number; arguments are those of :func:`prepare`."""
    options, numbers = call.options, call.numbers
    labels = None if labels is None else labels.contiguous()
    counted, row_weight = _weights(labels, options.ignore_index, mask, weight, row_dtype)
    count: int | Tensor = math.prod(lead) if counted is None else counted.sum()
    if isinstance(count, Tensor) and device.type == "cpu" and numbers is None:
        count = int(count)  # a CPU need not wait for it, and numbers cost less than tensors
    items = denominator(reduction, num_items, count, lead, device, row_dtype)
    if numbers is not None and num_items is None and not isinstance(items, Tensor):
        numbers = numbers._replace(num_items=items)
    rows = call.rows._replace(labels=labels, weight=row_weight)
    if isinstance(items, Tensor):
        rows = rows._replace(scale=items.reciprocal())
    else:
        options = options._replace(scale=1.0 / items)
    return LossCall(options, rows, count, call.backend, call.summed, numbers)


def _with_teacher(
    mask: Tensor | None, teacher: TopK, alpha: float | None, numbers: Numbers | None
) -> Tensor | None:
    """The mask without rows that have no teacher token and no cross-entropy; alpha is None if there are no labels."""
    has_loss = (teacher.ids != -1).any(-1)
    if alpha is not None and numbers is not None:  # the options hold a stand-in for alpha
        has_loss = has_loss | (as_tensor(numbers.scalars["alpha"]) < 1.0)
    elif alpha is not None and alpha < 1.0:
        return mask
    return has_loss if mask is None else mask & has_loss


def settled(
    divergence: Divergence, vocab_size: int, tail: str, numbers: Numbers, rows: Rows
) -> Options:
    """The options of a compiled call, once its numbers are known; checks numbers and rows as in eager mode."""
    labels = None if rows.labels is None else torch.zeros((), dtype=torch.int64)
    scalars: dict[str, Any] = numbers.scalars
    call = prepare(
        torch.Size(()), torch.device("cpu"), torch.float32, vocab_size, labels,
        divergence=divergence, num_items=numbers.num_items, tail=tail, **scalars,
    )  # fmt: skip
    options = call.options
    if tail:
        per_row = rows.teacher_temperature is not None
        options = at_temperature(options, tail, numbers.taken_at, per_row)
    check_values(rows, options)
    return options


def _check_floor(divergence: Divergence, tail: str) -> None:
    """Raise if the divergence has a floor and the teacher is not a TopK whose policy is "truncate"."""
    floor = floor_of(divergence)
    if floor is not None and tail != "truncate":
        got = f"tail={tail!r}" if tail else "a teacher that is not a TopK"
        raise ValueError(
            f"floor={floor:g} of forward_kl is for a TopK with tail='truncate', the sum over listed "
            f"tokens; got {got}. Probabilities that are raised to a floor do not sum to 1 over a vocabulary"
        )


def _check_needs_labels(options: Options, labels: Tensor | None, vocabulary: int | None) -> None:
    """Raise if an option needs labels and there are none."""
    if labels is None:
        for row in NEED_LABELS:
            value = getattr(options, row.name)
            if value != row.default:
                raise ValueError(row.needs_labels.format(value=value))
    if options.divergence.target is not None:
        _check_apart(options.divergence, labels, vocabulary)


def _check_apart(divergence: Divergence, labels: Tensor | None, vocabulary: int | None) -> None:
    """Raise if a divergence that treats the label's token separately lacks labels, or other tokens."""
    if labels is None:
        raise ValueError(
            f"labels are needed by the divergence {divergence.name!r}, which treats the label's token separately; "
            "labels is None"
        )
    if vocabulary == 1:
        raise ValueError(
            f"the divergence {divergence.name!r} compares the tokens other than the label; the vocabulary has 1 column"
        )


def check_values(rows: Rows, options: Options) -> None:
    """Under FASTKD_CHECK=1, check the values of all rows but dropped ones; this waits for the device."""
    if not checking():
        return
    read = kept_rows(rows, options.ignore_index)
    if rows.ids is not None:
        check_ids(rows.ids, options.vocabulary, read)
    if read is None:
        candidates = (rows.labels, rows.temperature, rows.teacher_temperature)
        per_row = next((values for values in candidates if values is not None), None)
        if per_row is None:
            return
        read = torch.ones(per_row.shape, dtype=torch.bool, device=per_row.device)
    if rows.labels is not None and options.reads_labels:
        labels, vocabulary = rows.labels, options.vocabulary
        bad = ((labels < 0) | (labels >= vocabulary)) & read
        if bad.any():
            row = int(bad.flatten().nonzero()[0])
            raise ValueError(
                f"labels must be in [0, {vocabulary}) or ignore_index ({options.ignore_index}); "
                f"row {row} has {int(labels.flatten()[row])}"
            )
    for argument in ("temperature", "teacher_temperature"):
        values = getattr(rows, argument)
        if values is None:
            continue
        bad = ~(values > 0) & read
        if bad.any():
            row = int(bad.flatten().nonzero()[0])
            raise ValueError(
                f"{argument} must be positive; row {row} has {float(values.flatten()[row])}"
            )


def checking() -> bool:
    """Whether values that only the device knows are checked (FASTKD_CHECK=1)."""
    return os.environ.get("FASTKD_CHECK") == "1"


def is_dtensor(value: object) -> bool:
    """Whether the value is a DTensor; does not import the module that defines DTensor."""
    module = of_torch("distributed", "tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_flags(**flags: bool) -> None:
    """Raise unless each flag is True or False."""
    for argument, flag in flags.items():
        check_flag(argument, flag)


def check_parts(return_parts: object) -> tuple[bool, tuple[str, ...] | None]:
    """(whether a call returns parts, the names of the measures among them; None if return_parts is a bool).

    Raises:
        TypeError, ValueError: return_parts is neither a bool nor a collection of names.
    """
    if return_parts is False:
        return False, None
    flag = plain(return_parts)
    if isinstance(flag, bool):
        return flag, None
    if isinstance(flag, (str, Tensor)) or not isinstance(flag, Collection):
        raise TypeError(
            "return_parts must be True, False, or a collection of names such as ('acceptance',); got "
            f"{flag!r}"
        )
    for name in flag:
        if not isinstance(name, str) or name not in MEASURES:
            raise ValueError(f"return_parts may name {', '.join(MEASURES)}; got {name!r}")
    return True, tuple(flag)


def with_names(want: Want, names: Sequence[str] | None, teacher: Teacher, shared: bool) -> Want:
    """The outputs, with the measures that the names ask for.

    Raises:
        ValueError: the call has no such measure.
    """
    if not names:
        return want
    if not isinstance(teacher, TopK):
        for name in names:
            if name not in DENSE_MEASURES:
                raise ValueError(
                    f"return_parts: {name!r} is about the tokens that a TopK lists, and the teacher is not a TopK. "
                    f"Without one, return_parts may name {', '.join(DENSE_MEASURES)}"
                )
    if shared and "overlap" in names:
        raise ValueError(
            "return_parts: 'overlap' is not computed if several processes share the vocabulary, because no process has "
            "the student's most probable tokens; leave it out"
        )
    return want._replace(measures=True, overlap="overlap" in names)


def _received(value: object) -> str:
    """The value as an error describes it."""
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)


def check_logits(argument: str, logits: object, shard: bool = False) -> Tensor:
    """Raise unless logits is a dense tensor [..., V] of a supported dtype; a shard may have no column."""
    checked = check_columns(argument, logits, shard)
    check_readable(argument, checked)
    return checked


def check_columns(argument: str, logits: object, shard: bool = False) -> Tensor:
    """Like :func:`check_logits`, but without the check of the memory, which the caller makes after other checks."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{argument} must be a tensor of logits, got {type(logits).__name__}")
    check_dense(argument, logits)
    if logits.dim() == 0 or (logits.shape[-1] == 0 and not shard):
        raise ValueError(
            f"{argument} must have a vocabulary dimension, got shape {tuple(logits.shape)}"
        )
    return logits


def check_head(
    hidden: object, weight: object, bias: object, whose: str = "student_", rows: str = ""
) -> None:
    """Raise unless hidden [..., H], weight [V, H] and bias [V] are tensors that match.

    whose is the prefix of the names in messages: "student_" or "". rows: the name of the argument that hidden is, if it
    is not that prefix and "hidden".
    """
    rows = rows or f"{whose}hidden"
    for argument, value in ((rows, hidden), (f"{whose}weight", weight), (f"{whose}bias", bias)):
        if value is None and argument == f"{whose}bias":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
        check_dense(argument, value)
        # The others are checked below, after check_linear compares their device with that of hidden.
        if value is hidden:
            check_readable(rows, value)
    check_linear(whose, hidden, weight, bias, rows)  # type: ignore[arg-type]  # checked above
    for argument, value in (("weight", weight), ("bias", bias)):
        if isinstance(value, Tensor):
            check_readable(f"{whose}{argument}", value)


def check_dense(argument: str, value: Tensor) -> None:
    """Raise unless the tensor is dense and of a supported dtype."""
    if value.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{argument} must be float32, bfloat16, float16 or float64, got {value.dtype}"
        )
    check_strided(argument, value)


def check_teacher(
    teacher: object,
    student: str,
    lead: torch.Size,
    device: torch.device,
    shard: bool = False,
    differentiable: bool = False,
) -> Teacher:
    """Raise unless teacher fits rows of leading shape lead; returns the teacher as the loss takes it.

    student: the name of the argument with that shape. differentiable: whether dense teachers of a RoutedTeacher may
    require grad.
    """
    if not isinstance(teacher, (Tensor, TopK, LinearTeacher, Ensemble, RoutedTeacher)):
        raise TypeError(
            "teacher must be a tensor of logits, a fastkd.TopK, a fastkd.LinearTeacher, a fastkd.Ensemble or a "
            f"fastkd.RoutedTeacher; got {type(teacher).__name__}"
        )
    if isinstance(teacher, Tensor):
        check_columns("teacher", teacher, shard)
    constants: list[tuple[str, Tensor | None]] = []
    leading: list[tuple[str, Tensor]] = []  # the tensors whose leading shape must be lead

    def visit(name: str, part: Tensor | TopK | LinearTeacher) -> None:
        leading.append((name, rows_of(part)))
        if isinstance(part, Tensor):
            check_columns(name, part, shard)
        elif isinstance(part, TopK):
            for field in ("ids", "logprobs", "tail_logprob"):
                constants.append((f"{name}.{field}", getattr(part, field)))
        else:
            for field in ("hidden", "weight", "bias"):
                constants.append((f"{name}.{field}", getattr(part, field)))

    if isinstance(teacher, (Ensemble, RoutedTeacher)):
        gets_gradient = differentiable and _may_join(teacher, shard)
        for index, member in enumerate(teacher.teachers):
            name = f"teacher.teachers[{index}]"
            visit(name, member)
            if isinstance(member, Tensor) and not gets_gradient:
                constants.append((name, member))
    else:
        visit("teacher", teacher)
    if isinstance(teacher, RoutedTeacher):
        check_shapes(teacher, student, lead)
        leading.append(("teacher.index", teacher.index))
    else:
        for name, part in leading:
            if part.shape[:-1] != lead:
                raise ValueError(
                    f"{name} must have the leading shape of {student}, {tuple(lead)}; got {tuple(part.shape[:-1])}"
                )
    for name, part in leading:
        if part.device != device:
            raise ValueError(f"{name} must be on {device}, where {student} is; got {part.device}")
    for name, value in constants:
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, and only a teacher of dense logits gets a gradient; detach it"
            )
    for name, value in constants + leading:
        if value is not None:
            check_readable(name, value)
    return _joined(teacher, student, lead)


def _may_join(teacher: Ensemble | RoutedTeacher, shard: bool) -> bool:
    """Whether all teachers are dense logits that can be copied into one tensor."""
    if not isinstance(teacher, RoutedTeacher):
        return False
    widths = [member.shape[-1] for member in teacher.teachers if isinstance(member, Tensor)]
    # In a shard, one width may be that of this process's columns and another that of all columns.
    return len(widths) == len(teacher.teachers) and (not shard or len(set(widths)) == 1)


def _joined(teacher: Teacher, student: str, lead: torch.Size) -> Teacher:
    """The teacher as the loss takes it; raises if the index of a RoutedTeacher does not fit."""
    if not isinstance(teacher, RoutedTeacher):
        return teacher
    was_read = reads_index(teacher, checking())
    if was_read:
        numbers = numbers_of(teacher, lead)
        check_counts(teacher, numbers, count_rows(teacher, numbers).tolist())
    check_total(teacher, student, lead)
    return joined(teacher, lead, was_read)


def teacher_widths(teacher: Teacher) -> dict[str, int]:
    """The number of columns of each dense part of a teacher, by argument name; a TopK has none."""
    if isinstance(teacher, Tensor):
        return {"teacher": teacher.shape[-1]}
    if isinstance(teacher, LinearTeacher):
        return {"teacher": teacher.weight.shape[0]}
    if isinstance(teacher, TopK):
        return {}
    return {
        f"teacher.teachers[{index}]": next(iter(teacher_widths(member).values()))
        for index, member in enumerate(teacher.teachers)
        if not isinstance(member, TopK)
    }


def check_vocabulary(vocab_size: int | None, widths: dict[str, int]) -> int:
    """The number of columns without padding, given the width of each argument."""
    vocab_size = plain(vocab_size)
    narrowest = min(widths.values())
    for name, width in widths.items():
        if not width:
            raise ValueError(f"{name} must have a vocabulary, and has no column")
    if vocab_size is None:
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{name} has {width} columns" for name, width in widths.items())
            raise ValueError(
                f"{listed}; if the models have one tokenizer and the extra columns are padding, pass vocab_size (at "
                f"most {narrowest}), the number of real tokens"
            )
        vocab_size = narrowest
    elif type(vocab_size) is not int:
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= narrowest:
        raise ValueError(
            f"vocab_size must be in [1, {narrowest}], the narrowest of the widths; got {vocab_size}"
        )
    return vocab_size


def with_topk(call: LossCall, teacher: TopK) -> LossCall:
    """The call with a sparse teacher, whose tokens are Rows.ids and whose log-probabilities replace teacher logits."""
    options, rows = call.options, call.rows
    divergence = options.divergence
    if not divergence.normalized:
        raise ValueError(
            f"the divergence {divergence.name!r} compares logits, and a TopK has log-probabilities"
        )
    if divergence.target is not None:
        raise ValueError(
            f"the divergence {divergence.name!r} treats the label's token separately, and a TopK may not list it; "
            "use a dense teacher, a LinearTeacher or an Ensemble of them"
        )
    temperatures = rows.teacher_temperature
    numbers = call.numbers
    if numbers is None:
        per_row = temperatures is not None
        options = at_temperature(options, teacher.tail, teacher.temperature, per_row)
    else:
        options = options._replace(tail=teacher.tail)
        numbers = numbers._replace(taken_at=teacher.temperature)
    ids = teacher.ids.to(torch.int64).contiguous()
    if checking() and options.vocabulary and numbers is None:
        check_ids(ids, options.vocabulary, kept_rows(rows, options.ignore_index))
    tail_logprob = teacher.tail_logprob
    rows = rows._replace(
        teacher_temperature=None if temperatures is None else temperatures / teacher.temperature,
        ids=ids,
        tail_logprob=None
        if tail_logprob is None or teacher.tail != "bucket"
        else tail_logprob.detach().contiguous(),
    )
    return call._replace(options=options, rows=rows, numbers=numbers)


def at_temperature(
    options: Options, tail: str, taken_at: float, per_row: bool, name: str = "teacher"
) -> Options:
    """The options for log-probabilities taken at temperature taken_at. per_row: each row has its own temperature.

    name: the name of the TopK in messages.
    """
    divergence = options.divergence
    if options.teacher_logit_scale != 1 or options.teacher_softcap:
        raise ValueError(
            "teacher_logit_scale and teacher_softcap are for logits, and a TopK has log-probabilities: "
            "apply them before taking log-probabilities"
        )
    if tail == "renormalize_teacher" and (divergence.degree != 1 or infinite_at_zero(divergence)):
        raise ValueError(
            f"tail='renormalize_teacher' gives all other tokens probability 0, where the divergence "
            f"{divergence.name!r} is infinite or has no sum; use 'bucket', 'renormalize' or 'truncate'"
        )
    if tail in ("bucket", "truncate") and (per_row or options.teacher_temperature != taken_at):
        requested = "one a row" if per_row else options.teacher_temperature
        raise ValueError(
            f"teacher_temperature is {requested}, and {name}.logprobs were taken at {taken_at}: "
            f"tail={tail!r} needs the mass of the tail at the temperature of the loss. Take the "
            "log-probabilities at it (TopK.from_logits(..., temperature=)), pass teacher_temperature, or use "
            "tail='renormalize' or 'renormalize_teacher'"
        )
    return options._replace(teacher_temperature=options.teacher_temperature / taken_at, tail=tail)


def with_tail(
    call: LossCall, teacher: TopK, dtype: torch.dtype, want: Want
) -> tuple[LossCall, Tensor]:
    """(the call with the mass of the other tokens in Rows.tail_logprob, the log-probabilities).

    The size of the whole vocabulary must be known. In some rows the log-probabilities define no distribution: they
    contain NaN, their probabilities sum to more than MOST, or all of them are -inf and have to be renormalized. Such
    rows get invalid ids, which make their loss NaN. dtype is the dtype of losses. With "truncate", only measures need
    the mass.
    """
    options, rows = call.options, call.rows
    ids, logprobs, tail_logprob = rows.ids, teacher.logprobs.detach(), rows.tail_logprob
    assert ids is not None
    has_tail = teacher.has_tail if isinstance(teacher, JoinedTopK) else None
    if checking():
        check_logprobs(logprobs, rows, options, has_tail)
    if teacher.renormalizes:
        highest = logprobs.masked_fill(ids < 0, -math.inf).amax(-1)
        valid = (highest.abs() < math.inf) | (ids == -1).all(-1)
    else:
        own_masses = teacher.own_masses if isinstance(teacher, JoinedTopK) else None
        total, tail_mass = masses(ids, logprobs) if own_masses is None else own_masses
        if teacher.tail == "truncate" and want.measures:
            tail_logprob = tail_mass.log().to(dtype).contiguous()
        if teacher.tail == "bucket":
            if tail_logprob is None:
                tail_logprob = tail_mass.log()
            else:
                tail_logprob = tail_logprob.to(torch.float64)
                tail_logprob = tail_logprob.masked_fill((ids == -1).all(-1), 0.0)
                total = total + tail_logprob.exp()
                if has_tail is not None:
                    tail_logprob = torch.where(has_tail, tail_logprob, tail_mass.log())
            if ids.shape[-1] >= options.vocabulary:  # a row may list every token
                lists_all = (ids >= 0).sum(-1) == options.vocabulary
                tail_logprob = tail_logprob.masked_fill(lists_all, -math.inf)
            tail_logprob = tail_logprob.to(dtype).contiguous()
        valid = total <= MOST
    if isinstance(teacher, JoinedTopK) and teacher.highest is not None:
        valid = valid & (teacher.highest < options.vocabulary)
    ids = ids.masked_fill(~valid.unsqueeze(-1), -2)
    return call._replace(rows=rows._replace(ids=ids, tail_logprob=tail_logprob)), logprobs


def check_logprobs(
    logprobs: Tensor,
    rows: Rows,
    options: Options,
    has_tail: Tensor | None = None,
    teacher: str = "teacher",
) -> None:
    """Raise unless kept rows have log-probabilities or, if they are renormalized, logarithms of finite weights.

    has_tail: the rows that have a tail_logprob; None: all, if the rows have one at all. teacher: the name of the TopK.
    """
    assert rows.ids is not None
    is_token, names = rows.ids != -1, f"{teacher}.logprobs"
    logprobs = logprobs.to(torch.float64).masked_fill(~is_token, -math.inf)
    if rows.tail_logprob is not None:
        names = f"{teacher}.logprobs and {teacher}.tail_logprob"
        logprobs = torch.cat([logprobs, rows.tail_logprob.to(logprobs.dtype).unsqueeze(-1)], -1)
    read, kept = is_token.any(-1), kept_rows(rows, options.ignore_index)
    if kept is not None:
        read = read & kept
    highest, total = logprobs.amax(-1), logprobs.exp().sum(-1)

    def first_row(bad: Tensor) -> int | None:
        bad = (bad & read).flatten()
        return int(bad.nonzero()[0]) if bad.any() else None

    row = first_row(~(highest < math.inf))
    if row is not None:
        raise ValueError(
            f"{names} must not be NaN or infinity where ids are not -1; row {row} has some"
        )
    absolute = options.tail in ("bucket", "truncate")
    row = first_row(total > MOST) if absolute else None
    if row is not None:
        raise ValueError(
            f"{names} must be natural logarithms of probabilities, with a sum of 1 at most; those of row {row} sum to "
            f"{float(total.flatten()[row]):.4g}. Take log_softmax over the whole vocabulary before the K tokens, "
            "or use tail='renormalize'"
        )
    empty = highest == -math.inf
    empty = empty if has_tail is None else empty & has_tail
    row = first_row(empty) if rows.tail_logprob is not None or not absolute else None
    if row is not None:
        raise ValueError(
            f"{names} must not all be -inf in a row; those of row {row} are. "
            "Set its ids to -1 where there is no teacher"
        )


def check_ids(
    ids: Tensor, vocabulary: int, kept: Tensor | None, argument: str = "teacher.ids"
) -> None:
    """Raise unless the ids of each kept row are distinct tokens, or -1."""
    if kept is not None:
        ids = ids.masked_fill(~kept.unsqueeze(-1), -1)  # dropped rows may hold any ids
    bad = ((ids < -1) | (ids >= vocabulary)).any(-1)
    if bad.any():
        row = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"{argument} must be in [0, {vocabulary}), or -1 for padding; row {row} has others"
        )
    sorted_ids = ids.sort(-1).values
    repeats = ((sorted_ids[..., 1:] == sorted_ids[..., :-1]) & (sorted_ids[..., 1:] >= 0)).any(-1)
    if repeats.any():
        row = int(repeats.flatten().nonzero()[0])
        raise ValueError(f"{argument} must be distinct within a row; row {row} repeats some")


def check_alike(argument: str, value: Tensor, other: str, like: Tensor, remedy: str = "") -> None:
    """Raise unless value has the shape and the device of the tensor `like`, whose argument name is `other`."""
    if value.shape != like.shape:
        raise ValueError(
            f"{argument} must have the shape of {other}, {tuple(like.shape)}; got {tuple(value.shape)}{remedy}"
        )
    if value.device != like.device:
        raise ValueError(
            f"{argument} must be on {like.device}, where {other} is; got {value.device}"
        )


def check_mask(mask: object, other: str, like: Tensor) -> None:
    """Raise unless mask is a bool tensor with the shape and the device of `like`, whose argument name is `other`."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be {torch.bool}, got {mask.dtype}")
    check_alike("mask", mask, other, like)


def check_pair(
    argument: str, value: Tensor, other: str, like: Tensor, remedy: str, *, lowest: int = 1
) -> None:
    """Raise unless both tensors are floating-point, of one shape, on one device, with at least `lowest` dimensions.

    Adapters use this function, because the libraries that they adapt have no vocab_size option. remedy tells the
    caller what to do if the two vocabularies differ in width.
    """
    for name, tensor in ((other, like), (argument, value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.dim() < lowest:
            raise ValueError(
                f"{name} must have at least {lowest} dimension{'s' if lowest > 1 else ''}, the last of them the "
                f"vocabulary; got {tuple(tensor.shape)}"
            )
    only_width_differs = value.shape[-1:] != like.shape[-1:] and value.shape[:-1] == like.shape[:-1]
    check_alike(argument, value, other, like, f". {remedy}" if only_width_differs else "")


def check_per_row(
    argument: str, value: Tensor | None, rows: torch.Size, dtype: torch.dtype | None = torch.int64
) -> None:
    """Raise unless value is None, or has one element per row and this dtype (None: any). For labels in adapters."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{argument} must be {dtype}, got {value.dtype}")
    if value.shape != rows:
        raise ValueError(
            f"{argument} must have one value a row, shape {tuple(rows)}; got {tuple(value.shape)}"
        )


def check_side(hidden_name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> None:
    """Raise unless hidden states [..., H] and a head [V, H] match. Adapters pass the names of their own arguments."""
    for name, tensor in ((hidden_name, hidden), (weight_name, weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if hidden.dim() < 1:
        raise ValueError(f"{hidden_name} must be [..., H], got {tuple(hidden.shape)}")
    if weight.dim() != 2 or not len(weight) or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} must be [V, {hidden.shape[-1]}], as {hidden_name} has that width; got {tuple(weight.shape)}"
        )


def check_choice(argument: str, value: object, allowed: Sequence[object]) -> None:
    """Raise unless the value is one of the allowed ones."""
    if isinstance(value, (Tensor, bool)) or value not in allowed:
        listed = ", ".join(map(str, allowed))
        raise ValueError(f"{argument} must be one of {listed}; got {value!r}")


def _row_temperatures(
    argument: str, value: Tensor, lead: torch.Size, device: torch.device
) -> Tensor:
    """One temperature per row, [...], in float32; a 0-dim tensor applies to all rows."""
    if value.dim() == 0 and value.device.type == "cpu":
        value = value.to(device, non_blocking=True)
    value = value.expand(lead) if value.dim() == 0 else value
    check_rows(argument, value, lead, device, LOGIT_DTYPES)
    return value.to(torch.float32).contiguous()


def check_rows(
    argument: str,
    value: Tensor,
    lead: torch.Size,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raise unless value has one element per row, one of these dtypes and this device, and requires no gradient."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{argument} must be {allowed}, got {value.dtype}")
    check_strided(argument, value)
    if value.shape != lead:
        raise ValueError(
            f"{argument} must have one value a row, shape {tuple(lead)}; got {tuple(value.shape)}"
        )
    if value.device != device:
        raise ValueError(
            f"{argument} must be on {device}, where the student is; got {value.device}"
        )
    check_readable(argument, value)
    if value.requires_grad:
        raise ValueError(f"{argument} requires grad, and kd_loss has no gradient for it; detach it")


def _weights(
    labels: Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """(which rows are counted, their weights, with 0 where mask drops a row); None: all rows, and weight 1."""
    counted = None if labels is None else labels != ignore_index
    if mask is not None:
        counted = mask if counted is None else counted & mask
        # torch.where, not a product: the weight of a dropped row may be NaN or infinite.
        weight = torch.where(mask, 1.0 if weight is None else weight, 0.0)
    return counted, None if weight is None else weight.to(dtype).contiguous()


def denominator(
    reduction: str,
    num_items: int | float | Tensor | None,
    count: int | Tensor,
    lead: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
) -> int | float | Tensor:
    """The denominator of the summed loss: a number, or a 0-dim tensor if only the device knows it.

    count is how many rows are counted, for "mean".
    """
    if num_items is not None:
        items = plain(num_items)
        if isinstance(items, Tensor):
            if items.numel() != 1:
                raise ValueError(
                    f"num_items must be a number or a tensor of one element, got {_received(items)}"
                )
            if items.device != device and items.device.type != "cpu":
                raise ValueError(f"num_items must be on {device} or the CPU, got {items.device}")
            if items.dtype == torch.bool or items.is_complex():
                raise TypeError(f"num_items must be a real number, got {items.dtype}")
            check_readable("num_items", items)
            if items.requires_grad:
                raise ValueError(
                    "num_items requires grad, and kd_loss has no gradient for it; detach it"
                )
            items = items.reshape(()).to(device, dtype, non_blocking=True)
            # If there are 0 items, no row is counted, and the loss is 0 / 1.
            return torch.where(items == 0, 1.0, items)
        if isinstance(items, bool) or not isinstance(items, (int, float)):
            raise TypeError(f"num_items must be a number or a tensor, got {type(items).__name__}")
        if not 0 < items < math.inf:
            raise ValueError(f"num_items must be positive, got {items}")
        return check_magnitude("num_items", items)
    if reduction == "batchmean":
        if not lead:
            raise ValueError(
                "reduction='batchmean' divides by the first dimension; the student has one row only"
            )
        return max(lead[0], 1)
    if reduction == "mean":
        return count.clamp(min=1).to(dtype) if isinstance(count, Tensor) else max(count, 1)
    return 1
