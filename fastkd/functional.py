"""kd_loss: validate, and work out the weight of each row and the denominator; fastkd.autograd does the rest."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from fastkd import autograd
from fastkd.divergences import Divergence, resolve
from fastkd.rows import Options, Rows, Want

if TYPE_CHECKING:
    from typing_extensions import Unpack

REDUCTIONS = ("none", "sum", "mean", "batchmean")
# Numbers beyond these lose their meaning in float32, once they are multiplied or inverted.
SMALLEST, LARGEST = 1e-30, 1e30
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Parts(NamedTuple):
    """Detached by-products of a loss, all from the same sweep. Rows that are dropped hold 0.

    loss of a row = weight (alpha * distillation + (1 - alpha) * cross_entropy)
    """

    distillation: Tensor  # [...], with T^2 where scale_by_temperature
    cross_entropy: Tensor  # [...], 0 where alpha is 1 or there are no labels
    student_entropy: Tensor  # [...], in nats, of softmax(student / temperature)
    counted: Tensor  # 0-dim, the number of counted rows


class _Options(TypedDict, total=False):
    """The keyword options of kd_loss but return_parts, which decides the type that comes back."""

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
    vocab_size: int | None
    inplace: bool
    backend: str


@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    return_parts: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Parts]: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    return_parts: bool,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Parts]: ...
def kd_loss(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
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
    vocab_size: int | None = None,
    inplace: bool = False,
    return_parts: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Parts]:
    r"""Distillation loss of student logits against a teacher, with its gradient, in one pass over the logits.

    The loss of a row (a position) is, with D the divergence and T the temperature,

        alpha T^2 D(softmax(t / T), softmax(s / T)) + (1 - alpha) CE(softmax(s), label)

    (Hinton, Vinyals and Dean 2015; cross-entropy at temperature 1). No probability tensor is ever held.

    Args:
        student_logits: [..., V], float32, bfloat16, float16 (float64 on the reference). Any strides; the last
            dimension is copied only where its stride is not 1.
        teacher: dense teacher logits of the same leading shape, of any of those dtypes. If it requires grad it
            gets its gradient.
        labels: [...] int64. Targets of the cross-entropy where alpha < 1. A row whose label is ignore_index is
            dropped, whatever alpha is.
        divergence: a name of ``fastkd.DIVERGENCES`` or a divergence such as ``fastkd.jsd(0.3)``.
        temperature: T > 0, or a float tensor [...] with one per row.
        teacher_temperature: the teacher's own temperature, likewise; None: as the student's. T^2 is always the
            student's.
        alpha: weight of the distillation term, in [0, 1]. Below 1 labels are needed.
        scale_by_temperature: multiply value and gradient of the distillation term by T^2.
        label_smoothing: in [0, 1), of the cross-entropy, as torch.nn.functional.cross_entropy has it.
        ignore_index: the label that drops a row.
        mask: [...] bool; a row where it is False is dropped. A dropped row is not read.
        weight: [...] float, multiplies the loss of a row; it does not change how many rows are counted.
        reduction: "none" ([...], 0 in dropped rows), "sum", "mean" (sum / number of counted rows), "batchmean"
            (sum / student_logits.shape[0], as torch.nn.functional.kl_div has it).
        num_items: replaces the denominator of "mean" and "batchmean": a positive number or a 0-dim tensor, such
            as the number of counted rows of the whole batch under gradient accumulation.
        logit_scale: multiplies the student's logits first.
        softcap: c > 0; the student's scaled logits become c tanh(logits / c).
        teacher_logit_scale: as logit_scale, for the teacher.
        teacher_softcap: as softcap, for the teacher.
        vocab_size: the columns that count, where a model pads its vocabulary; later columns have probability 0
            and gradient 0 on both sides. Needed where the widths differ.
        inplace: let the gradient overwrite student_logits, which saves one [..., V] tensor. Their version is
            bumped, so that autograd raises where something else still needs them. A compiled graph plans its
            own memory: there it breaks the graph, or raises under fullgraph=True.
        return_parts: return (loss, :class:`Parts`).
        backend: "auto", or one of ``fastkd.available_backends()``.

    Returns:
        The loss: 0-dim, or [...] for reduction="none"; float32 (float64 for float64 logits). With no counted row
        it is 0 and part of the graph. An invalid label, and a temperature of a tensor that is not positive, make
        their row NaN, because naming them would wait for the device; FASTKD_CHECK=1 waits, and raises.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        fastkd.BackendUnavailable: the backend asked for cannot serve this call.
    """
    divergence = resolve(divergence)
    _check_logits(student_logits, teacher)
    lead, device = student_logits.shape[:-1], student_logits.device
    vocabulary = _vocabulary(vocab_size, student_logits.shape[-1], teacher.shape[-1])
    alpha = _number("alpha", alpha, 0.0, 1.0)
    label_smoothing = _number("label_smoothing", label_smoothing, 0.0, 1.0, open_right=True)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if num_items is not None and reduction not in ("mean", "batchmean"):
        raise ValueError(
            f"num_items is the denominator of 'mean' and 'batchmean'; reduction is {reduction!r}"
        )
    if labels is None and alpha < 1.0:
        raise ValueError(
            f"labels are needed for the cross-entropy term where alpha < 1; alpha is {alpha}"
        )
    if type(ignore_index) is not int:
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, got {ignore_index}")
    for argument, flag in (
        ("scale_by_temperature", scale_by_temperature),
        ("inplace", inplace),
        ("return_parts", return_parts),
    ):
        if not isinstance(flag, bool):
            raise TypeError(f"{argument} must be True or False, got {type(flag).__name__}")
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {type(backend).__name__}")
    if label_smoothing and labels is None:
        raise ValueError("label_smoothing needs labels; labels is None")
    if teacher_temperature is None:
        teacher_temperature = temperature
    t_value, t_rows = _temperature("temperature", temperature, lead, device)
    tt_value, tt_rows = _temperature("teacher_temperature", teacher_temperature, lead, device)
    if labels is not None:
        _check_rows("labels", labels, lead, device, (torch.int64,))
        labels = labels.contiguous()
    if mask is not None:
        _check_rows("mask", mask, lead, device, (torch.bool,))
    if weight is not None:
        _check_rows("weight", weight, lead, device, LOGIT_DTYPES)
    if os.environ.get("FASTKD_CHECK") == "1":
        _check_values(
            labels if alpha < 1.0 else None, ignore_index, vocabulary, mask, t_rows, tt_rows
        )

    grad_enabled = torch.is_grad_enabled()
    want = Want(
        grad_enabled and student_logits.requires_grad,
        grad_enabled and teacher.requires_grad,
        return_parts,
        inplace,
    )
    if want.teacher_gradient and divergence.degree is None:
        raise ValueError(
            f"teacher requires grad, and the divergence {divergence.name!r} does not say its degree of homogeneity, "
            "from which the teacher's gradient follows; set Divergence(degree=...) or detach the teacher"
        )
    if want.inplace:
        _check_inplace(student_logits, teacher, want)

    float64 = torch.float64 in (student_logits.dtype, teacher.dtype)
    row_dtype = torch.float64 if float64 else torch.float32
    counted, row_weight = _weights(labels, ignore_index, mask, weight, row_dtype)
    count = (
        student_logits.numel() // max(student_logits.shape[-1], 1)
        if counted is None
        else counted.sum()
    )
    items = _denominator(reduction, num_items, count, student_logits, row_dtype)
    if torch.compiler.is_compiling() and not isinstance(items, Tensor):
        items = student_logits.new_full(
            (), items, dtype=row_dtype
        )  # the number of rows is no constant
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
        vocabulary,
        1.0 if isinstance(scale, Tensor) else scale,
    )
    rows = Rows(labels, row_weight, t_rows, tt_rows, scale if isinstance(scale, Tensor) else None)
    summed = reduction != "none"
    loss, distillation, cross_entropy, entropy = autograd.kd_rows(
        student_logits, teacher, rows, options, want, backend, summed
    )
    assert loss is not None
    if not return_parts:
        return loss
    assert distillation is not None and cross_entropy is not None and entropy is not None
    counted_rows = count if isinstance(count, Tensor) else torch.tensor(count, device=device)
    return loss, Parts(distillation, cross_entropy, entropy, counted_rows)


def _received(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    for argument, logits in (("student_logits", student), ("teacher", teacher)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{argument} must be a tensor of logits, got {type(logits).__name__}")
        if logits.dtype not in LOGIT_DTYPES:
            raise TypeError(
                f"{argument} must be float32, bfloat16, float16 or float64, got {logits.dtype}"
            )
        if logits.layout != torch.strided:
            raise TypeError(f"{argument} must be dense, got a tensor of layout {logits.layout}")
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(
                f"{argument} must have a vocabulary dimension, got shape {tuple(logits.shape)}"
            )
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher must have the leading shape of student_logits, {tuple(student.shape[:-1])}; "
            f"got {tuple(teacher.shape[:-1])}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher must be on {student.device}, where student_logits are; got {teacher.device}"
        )


def _vocabulary(vocab_size: int | None, student: int, teacher: int) -> int:
    narrower = min(student, teacher)
    if vocab_size is None:
        if student != teacher:
            raise ValueError(
                f"student_logits have {student} columns and teacher {teacher}; if the rest is padding of one "
                f"tokenizer, pass vocab_size (at most {narrower}), the number of real tokens"
            )
        vocab_size = student
    elif type(vocab_size) is not int:
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= narrower:
        raise ValueError(
            f"vocab_size must be in [1, {narrower}], the narrower of the two widths; got {vocab_size}"
        )
    return vocab_size


def _number(
    argument: str, value: float, low: float, high: float, *, open_right: bool = False
) -> float:
    if isinstance(value, Tensor) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__}")
    if not (low <= value < high or (value == high and not open_right)):
        raise ValueError(
            f"{argument} must be in [{low:g}, {high:g}{')' if open_right else ']'}, got {value}"
        )
    return float(value)


def _in_range(argument: str, value: float) -> float:
    if not SMALLEST <= abs(value) <= LARGEST:
        raise ValueError(
            f"{argument} must be of a size between {SMALLEST:g} and {LARGEST:g}, got {value}"
        )
    return float(value)


def _nonzero(argument: str, value: float) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__}")
    if value == 0 or not -math.inf < value < math.inf:
        raise ValueError(f"{argument} must be finite and not 0, got {value}")
    return _in_range(argument, value)


def _softcap(argument: str, value: float | None) -> float:
    if value is None:
        return 0.0
    if not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number or None, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{argument} must be positive and finite, or None for none; got {value}")
    return _in_range(argument, value)


def _temperature(
    argument: str, value: float | Tensor, lead: torch.Size, device: torch.device
) -> tuple[float, Tensor | None]:
    """(the number, None) or (1, the tensor [...])."""
    if isinstance(value, Tensor):
        _check_rows(argument, value, lead, device, LOGIT_DTYPES)
        return 1.0, value.to(torch.float32).contiguous()
    if not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number or a tensor, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{argument} must be positive and finite, got {value}")
    return _in_range(argument, value), None


def _check_rows(
    argument: str,
    value: Tensor,
    lead: torch.Size,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{argument} must be {allowed}, got {value.dtype}")
    if value.shape != lead:
        raise ValueError(
            f"{argument} must have one value a row, shape {tuple(lead)}; got {tuple(value.shape)}"
        )
    if value.device != device:
        raise ValueError(
            f"{argument} must be on {device}, where student_logits are; got {value.device}"
        )
    if value.requires_grad:
        raise ValueError(f"{argument} requires grad, and kd_loss has no gradient for it; detach it")


def _check_values(
    labels: Tensor | None,
    ignore_index: int,
    vocabulary: int,
    mask: Tensor | None,
    *temperatures: Tensor | None,
) -> None:
    """The checks that wait for the device, under FASTKD_CHECK=1; rows that mask drops may hold anything."""
    if labels is not None:
        bad = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
        bad = bad if mask is None else bad & mask
        if bad.any():
            row = int(bad.flatten().nonzero()[0])
            raise ValueError(
                f"labels must be in [0, {vocabulary}) or ignore_index ({ignore_index}); "
                f"row {row} has {int(labels.flatten()[row])}"
            )
    for argument, values in zip(("temperature", "teacher_temperature"), temperatures, strict=True):
        if values is None:
            continue
        bad = ~(values > 0) if mask is None else ~(values > 0) & mask
        if bad.any():
            row = int(bad.flatten().nonzero()[0])
            raise ValueError(
                f"{argument} must be positive; row {row} has {float(values.flatten()[row])}"
            )


def _check_inplace(student: Tensor, teacher: Tensor, want: Want) -> None:
    if torch.compiler.is_compiling():
        raise ValueError("inplace=True is for eager mode; a compiled graph plans its own memory")
    if want.student_gradient and student.is_leaf:
        raise ValueError("inplace=True would overwrite student_logits, a leaf that requires grad")
    if want.teacher_gradient:
        raise ValueError(
            "inplace=True overwrites student_logits, and the teacher's gradient needs them; detach one"
        )
    if student.stride(-1) != 1 and student.shape[-1] > 1:
        raise ValueError(
            f"inplace=True needs student_logits with a last stride of 1, got strides {student.stride()}"
        )
    if any(
        stride == 0 and size > 1
        for stride, size in zip(student.stride(), student.shape, strict=True)
    ):
        raise ValueError("inplace=True would write expanded student_logits more than once")
    storages = student.untyped_storage().data_ptr(), teacher.untyped_storage().data_ptr()
    if student.numel() and storages[0] == storages[1]:
        raise ValueError(
            "inplace=True would overwrite the teacher: it shares its storage with student_logits"
        )


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
    student: Tensor,
    dtype: torch.dtype,
) -> int | float | Tensor:
    """What the summed loss is divided by: a number, or a 0-dim tensor where only the device knows it."""
    if num_items is not None:
        items = num_items
        if isinstance(items, Tensor):
            if items.numel() != 1:
                raise ValueError(
                    f"num_items must be a number or a tensor of one element, got {_received(items)}"
                )
            if items.device != student.device and items.device.type != "cpu":
                raise ValueError(
                    f"num_items must be on {student.device} or the CPU, got {items.device}"
                )
            if items.dtype == torch.bool or items.is_complex():
                raise TypeError(f"num_items must be a real number, got {items.dtype}")
            if items.requires_grad:
                raise ValueError(
                    "num_items requires grad, and kd_loss has no gradient for it; detach it"
                )
            items = items.reshape(()).to(student.device, dtype, non_blocking=True)
            return torch.where(items == 0, 1.0, items)  # 0: no row counts anywhere, so 0 / 1
        if not isinstance(items, (int, float)):
            raise TypeError(f"num_items must be a number or a tensor, got {type(items).__name__}")
        if not 0 < items < math.inf:
            raise ValueError(f"num_items must be positive, got {items}")
        return _in_range("num_items", items)
    if reduction == "batchmean":
        if student.dim() == 1:
            raise ValueError(
                "reduction='batchmean' divides by the first dimension; student_logits have one row only"
            )
        return max(student.shape[0], 1)
    if reduction == "mean":
        return count.clamp(min=1).to(dtype) if isinstance(count, Tensor) else max(count, 1)
    return 1
