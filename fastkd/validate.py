"""Validation: every argument of a loss is checked here, once for all of them, and named in the error.

:func:`prepare` turns the options of a call into what backends take: Options, Rows and the number of counted rows.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from fastkd.divergences import Divergence, resolve
from fastkd.rows import Options, Rows, counted_rows
from fastkd.scalars import as_float, plain
from fastkd.teachers import Ensemble, LinearTeacher, Teacher, TopK, check_linear
from fastkd.tensors import check_readable, check_strided

REDUCTIONS = ("none", "sum", "mean", "batchmean")
# Numbers beyond these lose their meaning in float32, once they are multiplied or inverted.
SMALLEST, LARGEST = 1e-30, 1e30
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LossOptions(TypedDict, total=False):
    """The keyword options that every loss has, but return_parts, which decides the type that comes back."""

    divergence: str | Divergence
    temperature: float | Tensor
    teacher_temperature: float | Tensor | None
    alpha: float
    scale_by_temperature: bool
    label_smoothing: float
    ignore_index: int
    mask: Tensor | None
    weight: Tensor | None
    reduction: str
    num_items: int | float | Tensor | None
    logit_scale: float
    softcap: float | None
    teacher_logit_scale: float
    teacher_softcap: float | None
    backend: str


class Prepared(NamedTuple):
    """A validated call."""

    options: Options
    rows: Rows
    counted: int | Tensor  # the number of rows that count
    backend: str
    summed: bool  # whether the loss is one number


def prepare(
    lead: torch.Size,
    device: torch.device,
    row_dtype: torch.dtype,
    vocabulary: int | None,
    labels: Tensor | None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    alpha: float = 1.0,
    scale_by_temperature: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    backend: str = "auto",
) -> Prepared:
    """What kd_loss documents of its options, for rows of the leading shape on the device.

    vocabulary None: other processes have columns too, and :func:`check_values` is called once they are known.
    """
    scale_by_temperature = plain(scale_by_temperature)
    divergence = resolve(divergence)
    alpha = check_number("alpha", alpha, 0.0, 1.0)
    label_smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0, open_right=True)
    check_choice("reduction", reduction, REDUCTIONS)
    if num_items is not None and reduction not in ("mean", "batchmean"):
        raise ValueError(
            f"num_items is the denominator of 'mean' and 'batchmean'; reduction is {reduction!r}"
        )
    if labels is None and alpha < 1.0:
        raise ValueError(
            f"labels are needed for the cross-entropy term where alpha < 1; alpha is {alpha}"
        )
    if divergence.target is not None:
        _check_apart(divergence, labels, vocabulary)
    ignore_index = check_int("ignore_index", ignore_index)
    check_flags(scale_by_temperature=scale_by_temperature)
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {type(backend).__name__}")
    if label_smoothing and labels is None:
        raise ValueError("label_smoothing needs labels; labels is None")
    if teacher_temperature is None:
        teacher_temperature = temperature
    t_value, t_rows = _temperature("temperature", temperature, lead, device)
    tt_value, tt_rows = _temperature("teacher_temperature", teacher_temperature, lead, device)
    if labels is not None:
        check_rows("labels", labels, lead, device, (torch.int64,))
        labels = labels.contiguous()
    if mask is not None:
        check_rows("mask", mask, lead, device, (torch.bool,))
    if weight is not None:
        check_rows("weight", weight, lead, device, LOGIT_DTYPES)
    counted, row_weight = _weights(labels, ignore_index, mask, weight, row_dtype)
    count = math.prod(lead) if counted is None else counted.sum()
    items = _denominator(reduction, num_items, count, lead, device, row_dtype)
    if torch.compiler.is_compiling() and not isinstance(items, Tensor):
        # the number of rows is no constant
        items = torch.full((), items, dtype=row_dtype, device=device)
    scale = items.reciprocal() if isinstance(items, Tensor) else 1.0 / items
    options = Options(
        divergence,
        alpha,
        t_value,
        tt_value,
        scale_by_temperature,
        label_smoothing,
        ignore_index,
        _nonzero("logit_scale", logit_scale),
        _softcap("softcap", softcap),
        _nonzero("teacher_logit_scale", teacher_logit_scale),
        _softcap("teacher_softcap", teacher_softcap),
        vocabulary or 0,
        1.0 if isinstance(scale, Tensor) else scale,
    )
    rows = Rows(labels, row_weight, t_rows, tt_rows, scale if isinstance(scale, Tensor) else None)
    if vocabulary is not None:
        check_values(rows, options)
    return Prepared(options, rows, count, backend, reduction != "none")


def _check_apart(divergence: Divergence, labels: Tensor | None, vocabulary: int | None) -> None:
    """What a divergence needs that compares the label's token apart from the others."""
    if labels is None:
        raise ValueError(
            f"labels are needed by the divergence {divergence.name!r}, which compares the label's token apart from "
            "the others; labels is None"
        )
    if vocabulary == 1:
        raise ValueError(
            f"the divergence {divergence.name!r} compares the tokens beside the label; the vocabulary has 1 column"
        )


def check_values(rows: Rows, options: Options) -> None:
    """The checks that wait for the device, under FASTKD_CHECK=1; rows that are dropped may hold anything."""
    if not checking():
        return
    read = counted_rows(rows, options.ignore_index)
    if rows.ids is not None:
        _check_ids(rows.ids, options.vocabulary, read)
    given = (rows.labels, rows.temperature, rows.teacher_temperature)
    if read is None:
        lead = next((value.shape for value in given if value is not None), None)
        if lead is None:
            return
        device = next(value.device for value in given if value is not None)
        read = torch.ones(lead, dtype=torch.bool, device=device)
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
    """Whether values are checked that only the device knows."""
    return os.environ.get("FASTKD_CHECK") == "1"


def is_dtensor(value: object) -> bool:
    """Without importing what defines them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_flags(**flags: bool) -> None:
    """Raise unless each is True or False."""
    for argument, flag in flags.items():
        if not isinstance(plain(flag), bool):
            raise TypeError(f"{argument} must be True or False, got {type(flag).__name__}")


def _received(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)


def check_logits(argument: str, logits: object, shard: bool = False) -> Tensor:
    """Raise unless it is a dense tensor [..., V] of a dtype that losses take; a shard may have no column."""
    checked = check_columns(argument, logits, shard)
    check_readable(argument, checked)
    return checked


def check_columns(argument: str, logits: object, shard: bool = False) -> Tensor:
    """Like :func:`check_logits`, where other checks come before that of what the memory holds."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{argument} must be a tensor of logits, got {type(logits).__name__}")
    check_dense(argument, logits)
    if logits.dim() == 0 or (logits.shape[-1] == 0 and not shard):
        raise ValueError(
            f"{argument} must have a vocabulary dimension, got shape {tuple(logits.shape)}"
        )
    return logits


def check_student_head(hidden: object, weight: object, bias: object) -> None:
    """Raise unless student_hidden [..., H], student_weight [V, H] and student_bias [V] go together."""
    for argument, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if argument == "bias" and value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"student_{argument} must be a tensor, got {type(value).__name__}")
        check_dense(f"student_{argument}", value)
        check_readable(f"student_{argument}", value)
    check_linear("student_", hidden, weight, bias)  # type: ignore[arg-type]  # checked above


def check_dense(argument: str, value: Tensor) -> None:
    """Raise unless it is dense and of a dtype that losses take."""
    if value.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{argument} must be float32, bfloat16, float16 or float64, got {value.dtype}"
        )
    check_strided(argument, value)


def check_teacher(
    teacher: object, student: str, lead: torch.Size, device: torch.device, shard: bool = False
) -> Teacher:
    """Raise unless it is a teacher for rows of that leading shape; student names the argument that has it."""
    if not isinstance(teacher, (Tensor, TopK, LinearTeacher, Ensemble)):
        raise TypeError(
            "teacher must be a tensor of logits, a fastkd.TopK, a fastkd.LinearTeacher or a fastkd.Ensemble; "
            f"got {type(teacher).__name__}"
        )
    if isinstance(teacher, Tensor):
        check_columns("teacher", teacher, shard)
    constants: list[tuple[str, Tensor | None]] = []
    leading: list[tuple[str, Tensor]] = []  # what has the rows

    def visit(name: str, part: Tensor | TopK | LinearTeacher) -> None:
        if isinstance(part, Tensor):
            check_columns(name, part, shard)
            leading.append((name, part))
        elif isinstance(part, TopK):
            leading.append((name, part.ids))
            constants.append((f"{name}.ids", part.ids))
            constants.append((f"{name}.logprobs", part.logprobs))
            constants.append((f"{name}.tail_logprob", part.tail_logprob))
        else:
            leading.append((name, part.hidden))
            for field in ("hidden", "weight", "bias"):
                constants.append((f"{name}.{field}", getattr(part, field)))

    if isinstance(teacher, Ensemble):
        for index, member in enumerate(teacher.teachers):
            name = f"teacher.teachers[{index}]"
            visit(name, member)
            if isinstance(member, Tensor):
                constants.append((name, member))
    else:
        visit("teacher", teacher)
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
    return teacher


def teacher_widths(teacher: Teacher) -> dict[str, int]:
    """The vocabulary of every dense part of a teacher; a TopK has none of its own."""
    if isinstance(teacher, Tensor):
        return {"teacher": teacher.shape[-1]}
    if isinstance(teacher, LinearTeacher):
        return {"teacher": teacher.weight.shape[0]}
    if isinstance(teacher, TopK):
        return {}
    return {
        f"teacher.teachers[{index}]": next(iter(teacher_widths(member).values()))
        for index, member in enumerate(teacher.teachers)
    }


def check_vocabulary(vocab_size: int | None, widths: dict[str, int]) -> int:
    """The number of columns that count, from the width of each argument."""
    vocab_size = plain(vocab_size)
    narrower = min(widths.values())
    for name, width in widths.items():
        if not width:
            raise ValueError(f"{name} must have a vocabulary, and has no column")
    if vocab_size is None:
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{name} has {width} columns" for name, width in widths.items())
            raise ValueError(
                f"{listed}; if the rest is padding of one tokenizer, pass vocab_size (at most {narrower}), "
                "the number of real tokens"
            )
        vocab_size = narrower
    elif type(vocab_size) is not int:
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= narrower:
        raise ValueError(
            f"vocab_size must be in [1, {narrower}], the narrowest of the widths; got {vocab_size}"
        )
    return vocab_size


def with_topk(prepared: Prepared, teacher: TopK) -> Prepared:
    """The call with a sparse teacher in it; its log-probabilities take the place of teacher logits."""
    options, rows = prepared.options, prepared.rows
    divergence = options.divergence
    if not divergence.normalized:
        raise ValueError(
            f"the divergence {divergence.name!r} is one of logits, and a TopK has log-probabilities"
        )
    if divergence.target is not None:
        raise ValueError(
            f"the divergence {divergence.name!r} compares the label's token apart from the others, and a TopK may not "
            "name it; use a dense teacher, a LinearTeacher or an Ensemble of them"
        )
    if options.teacher_logit_scale != 1 or options.teacher_softcap:
        raise ValueError(
            "teacher_logit_scale and teacher_softcap are for logits, and a TopK has log-probabilities: "
            "apply them before taking those"
        )
    if teacher.tail == "renormalize_teacher" and (
        divergence.degree != 1 or _infinite_at_zero(divergence)
    ):
        raise ValueError(
            f"tail='renormalize_teacher' leaves probability 0 to all other tokens, where the divergence "
            f"{divergence.name!r} is infinite or has no sum; use 'bucket', 'renormalize' or 'truncate'"
        )
    if teacher.tail in ("bucket", "truncate") and (
        rows.teacher_temperature is not None or options.teacher_temperature != teacher.temperature
    ):
        asked = "one a row" if rows.teacher_temperature is not None else options.teacher_temperature
        raise ValueError(
            f"teacher_temperature is {asked}, and teacher.logprobs were taken at {teacher.temperature}: "
            f"tail={teacher.tail!r} needs the mass of the tail at the temperature of the loss. Take the "
            "log-probabilities at it (TopK.from_logits(..., temperature=)), pass teacher_temperature, or use "
            "tail='renormalize' or 'renormalize_teacher'"
        )
    temperatures = rows.teacher_temperature
    options = options._replace(
        teacher_temperature=options.teacher_temperature / teacher.temperature, tail=teacher.tail
    )
    ids = teacher.ids.to(torch.int64).contiguous()
    if checking() and options.vocabulary:
        _check_ids(ids, options.vocabulary, counted_rows(rows, options.ignore_index))
    mass = teacher.tail_logprob
    rows = rows._replace(
        teacher_temperature=None if temperatures is None else temperatures / teacher.temperature,
        ids=ids,
        tail_logprob=None if mass is None else mass.detach().to(torch.float32).contiguous(),
    )
    return prepared._replace(options=options, rows=rows)


def _infinite_at_zero(divergence: Divergence) -> bool:
    """Whether a token that the teacher gives no probability costs infinitely much."""
    if (
        torch.compiler.is_compiling()
    ):  # a number cannot be asked for: the loss will be infinite, as it is
        return False
    from fastkd import reference  # loaded at its first use, as every backend is

    one = torch.zeros((), dtype=torch.float64)
    phi, _ = reference.evaluate(divergence, one - torch.inf, one)
    return not bool(phi.isfinite())


def _check_ids(ids: Tensor, vocabulary: int, counted: Tensor | None) -> None:
    if counted is not None:
        ids = ids.masked_fill(~counted.unsqueeze(-1), -1)  # rows that are dropped may hold anything
    bad = ((ids < -1) | (ids >= vocabulary)).any(-1)
    if bad.any():
        row = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"teacher.ids must be in [0, {vocabulary}), or -1 for padding; row {row} has others"
        )
    ordered = ids.sort(-1).values
    twice = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1)
    if twice.any():
        row = int(twice.flatten().nonzero()[0])
        raise ValueError(f"teacher.ids must be distinct within a row; row {row} repeats some")


def check_alike(argument: str, value: Tensor, other: str, like: Tensor, remedy: str = "") -> None:
    """Raise unless the value has the shape, and is on the device, of the tensor that `other` names."""
    if value.shape != like.shape:
        raise ValueError(
            f"{argument} must have the shape of {other}, {tuple(like.shape)}; got {tuple(value.shape)}{remedy}"
        )
    if value.device != like.device:
        raise ValueError(
            f"{argument} must be on {like.device}, where {other} is; got {value.device}"
        )


def check_mask(mask: object, other: str, like: Tensor) -> None:
    """Raise unless it is a bool tensor with the shape, and on the device, of the tensor that `other` names."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be {torch.bool}, got {mask.dtype}")
    check_alike("mask", mask, other, like)


def check_choice(argument: str, value: object, allowed: Sequence[object]) -> None:
    """Raise unless the value is one of those allowed."""
    if isinstance(value, (Tensor, bool)) or value not in allowed:
        listed = ", ".join(map(str, allowed))
        raise ValueError(f"{argument} must be one of {listed}; got {value!r}")


def check_int(argument: str, value: object) -> int:
    """The value as Python's int; raise unless it is one, and no bool."""
    value = plain(value)
    if type(value) is not int:
        raise TypeError(f"{argument} must be an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{argument} must fit in 64 bits, got {value}")
    return value


def check_number(
    argument: str, value: float, low: float, high: float, *, open_right: bool = False
) -> float:
    """The value as a float; raise unless it is a number in [low, high], or in [low, high) with open_right."""
    value = plain(value)
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__}")
    value = as_float(value)
    if not (low <= value < high or (value == high and not open_right)):
        raise ValueError(
            f"{argument} must be in [{low:g}, {high:g}{')' if open_right else ']'}, got {value}"
        )
    return value


def _in_range(argument: str, value: float) -> float:
    if not SMALLEST <= abs(value) <= LARGEST:
        raise ValueError(
            f"{argument} must be of a size between {SMALLEST:g} and {LARGEST:g}, got {value}"
        )
    return float(value)


def _nonzero(argument: str, value: float) -> float:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__}")
    if value == 0 or not -math.inf < value < math.inf:
        raise ValueError(f"{argument} must be finite and not 0, got {value}")
    return _in_range(argument, value)


def _softcap(argument: str, value: float | None) -> float:
    if value is None:
        return 0.0
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number or None, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{argument} must be positive and finite, or None for none; got {value}")
    return _in_range(argument, value)


def _temperature(
    argument: str, value: float | Tensor, lead: torch.Size, device: torch.device
) -> tuple[float, Tensor | None]:
    """(the number, None) or (1, the tensor [...])."""
    if isinstance(value, Tensor):
        check_rows(argument, value, lead, device, LOGIT_DTYPES)
        return 1.0, value.to(torch.float32).contiguous()
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number or a tensor, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{argument} must be positive and finite, got {value}")
    return _in_range(argument, value), None


def check_rows(
    argument: str,
    value: Tensor,
    lead: torch.Size,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raise unless it is a tensor of one of these dtypes with one value a row, on the device, without a gradient."""
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
    """(which rows are counted, weight of each row with 0 where mask drops it); None: all rows, weight 1."""
    counted = None if labels is None else labels != ignore_index
    if mask is not None:
        counted = mask if counted is None else counted & mask
        # where and not a product: the weight of a dropped row may be anything.
        weight = torch.where(mask, 1.0 if weight is None else weight, 0.0)
    return counted, None if weight is None else weight.to(dtype).contiguous()


def _denominator(
    reduction: str,
    num_items: int | float | Tensor | None,
    count: int | Tensor,
    lead: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
) -> int | float | Tensor:
    """What the summed loss is divided by: a number, or a 0-dim tensor where only the device knows it."""
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
            return torch.where(items == 0, 1.0, items)  # 0: no row counts anywhere, so 0 / 1
        if isinstance(items, bool) or not isinstance(items, (int, float)):
            raise TypeError(f"num_items must be a number or a tensor, got {type(items).__name__}")
        if not 0 < items < math.inf:
            raise ValueError(f"num_items must be positive, got {items}")
        return _in_range("num_items", items)
    if reduction == "batchmean":
        if not lead:
            raise ValueError(
                "reduction='batchmean' divides by the first dimension; the student has one row only"
            )
        return max(lead[0], 1)
    if reduction == "mean":
        return count.clamp(min=1).to(dtype) if isinstance(count, Tensor) else max(count, 1)
    return 1
