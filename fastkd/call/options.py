"""The table of the scalar options of kd_loss, and the types that hold options: LossOptions, Options and Numbers.

A row of TABLE states everything that other code needs to know of an option. Four things are derived from the table: the
checks of :func:`fastkd.call.checks.prepare`, the numbers that enter a compiled graph, the arguments of the native
kernels (:mod:`fastkd.backends.native`), and the C++ struct that receives those arguments, which csrc/generate.py writes
to csrc/generated/options.h. LossOptions, Options and the signature of kd_loss are written by hand, because people and
type checkers read them; tests/project/test_options.py compares them with the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from fastkd.core.scalars import check_flag, check_int, check_magnitude, check_number, plain
from fastkd.divergences import Divergence

# ---- checks: (argument, value) -> the value that Options holds


def _number_like(argument: str, value: Any, allowed: str) -> Any:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be {allowed}, got {type(value).__name__}")
    return value


def _fraction(argument: str, value: Any) -> float:
    return check_number(argument, value, 0.0, 1.0)


def _fraction_below_1(argument: str, value: Any) -> float:
    return check_number(argument, value, 0.0, 1.0, open_right=True)


def _temperature(argument: str, value: Any) -> float:
    value = _number_like(argument, value, "a number or a tensor")
    if not 0 < value < math.inf:
        raise ValueError(f"{argument} must be positive and finite, got {value}")
    return check_magnitude(argument, value)


def _nonzero(argument: str, value: Any) -> float:
    value = _number_like(argument, value, "a number")
    if value == 0 or not -math.inf < value < math.inf:
        raise ValueError(f"{argument} must be finite and not 0, got {value}")
    return check_magnitude(argument, value)


def _softcap(argument: str, value: Any) -> float:
    if value is None:
        return 0.0
    value = _number_like(argument, value, "a number or None")
    if not 0 < value < math.inf:
        raise ValueError(f"{argument} must be positive and finite, or None for none; got {value}")
    return check_magnitude(argument, value)


# ---- the table


class Scalar(NamedTuple):
    """One scalar option of kd_loss."""

    name: str
    default: Any
    # (argument, value) -> the value that Options holds; raises an error that names the argument.
    check: Callable[[str, Any], Any]
    # Type and field of the C++ struct, such as "double alpha"; "student.softcap" belongs to the struct of one side.
    cpp: str
    # The value that is checked in place of the number while a graph is compiled, because the graph also runs with other
    # numbers. None: the option is a constant of the graph.
    stand_in: float | None = None
    # The message of the error if labels are None and the value, {value}, is not the default. "": needs no labels.
    needs_labels: str = ""


TABLE = (
    # The stand-in 0.5 requires labels; without labels, with_stand_ins uses the default.
    Scalar(
        "alpha", 1.0, _fraction, "double alpha", stand_in=0.5,
        needs_labels="labels are needed for the cross-entropy term where alpha < 1; alpha is {value}",
    ),
    # Either temperature may also be a tensor with one value per row; Options then holds 1.
    Scalar("temperature", 1.0, _temperature, "double student.temperature", stand_in=1.0),
    # None: the temperature of the student.
    Scalar("teacher_temperature", None, _temperature, "double teacher.temperature", stand_in=1.0),
    Scalar("scale_by_temperature", True, check_flag, "bool scale_by_temperature"),
    Scalar(
        "label_smoothing", 0.0, _fraction_below_1, "double label_smoothing", stand_in=0.0,
        needs_labels="label_smoothing needs labels; labels is None",
    ),
    Scalar("ignore_index", -100, check_int, "int64_t ignore_index"),
    Scalar("logit_scale", 1.0, _nonzero, "double student.logit_scale", stand_in=1.0),
    Scalar("softcap", None, _softcap, "double student.softcap", stand_in=1.0),
    Scalar("teacher_logit_scale", 1.0, _nonzero, "double teacher.logit_scale", stand_in=1.0),
    Scalar("teacher_softcap", None, _softcap, "double teacher.softcap", stand_in=1.0),
)  # fmt: skip
OPTION_NAMES = tuple(row.name for row in TABLE)
NEED_LABELS = tuple(row for row in TABLE if row.needs_labels)
TEMPERATURES = ("temperature", "teacher_temperature")


class LossOptions(TypedDict, total=False):
    """The keyword options of every loss, except return_parts, which decides the type of the result."""

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


class Shard(NamedTuple):
    """The columns of this process, where several processes share the vocabulary."""

    # The first column of this process. Options.vocab_size says how many columns the process has, without padding.
    first: int
    total: int  # the number of columns of all processes together, without padding
    widest: int  # the number of columns of the widest shard, with padding
    rank: int  # the rank of this process in the group
    group: Any  # torch.distributed.ProcessGroup


class Options(NamedTuple):
    """The options of a call that are the same for all rows: validated, hashable, without tensors."""

    divergence: Divergence
    # The options of TABLE.
    alpha: float = 1.0
    temperature: float = 1.0  # where Rows.temperature is None
    teacher_temperature: float = 1.0  # where Rows.teacher_temperature is None
    scale_by_temperature: bool = True
    label_smoothing: float = 0.0
    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0: none
    teacher_logit_scale: float = 1.0
    teacher_softcap: float = 0.0
    # The number of columns of this process, without padding; 0 until it is known.
    vocab_size: int = 0
    scale: float = 1.0  # multiplies the total and every gradient
    # TopK.tail, or "" for a dense teacher. The tensor of a TopK holds log-probabilities, and Rows.ids their tokens.
    tail: str = ""
    # None: this process has all columns. With a shard, labels and Rows.ids still count tokens of the whole vocabulary.
    shard: Shard | None = None

    @property
    def vocabulary(self) -> int:
        """The number of columns of all processes together, without padding."""
        return self.vocab_size if self.shard is None else self.shard.total

    @property
    def cross_entropy_weight(self) -> float:
        """The factor of the cross-entropy in the loss; csrc/common/row_math.h has the same function."""
        return 1.0 - self.alpha

    @property
    def reads_labels(self) -> bool:
        """Whether the loss reads the labels, other than to drop rows."""
        return self.alpha < 1.0 or self.divergence.target is not None

    @property
    def first_column(self) -> int:
        """The token that column 0 of this process stands for."""
        return 0 if self.shard is None else self.shard.first


def completed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every option, in the order of the table: the value passed, or the default.

    Raises:
        TypeError: an option is not in the table.
    """
    for name in options:
        if name not in OPTION_NAMES:
            raise TypeError(f"an option must be one of {', '.join(OPTION_NAMES)}; got {name!r}")
    return {row.name: options.get(row.name, row.default) for row in TABLE}


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as Options holds them; if one is invalid, raises an error that names its option."""
    return {row.name: row.check(row.name, values[row.name]) for row in TABLE}


def check_options(**values: Any) -> dict[str, Any]:
    """These options of the table as Options holds them; if one is invalid, raises an error that names it."""
    return {row.name: row.check(row.name, values[row.name]) for row in TABLE if row.name in values}


# ---- numbers in a compiled graph

Number = int | float | None


class Numbers(NamedTuple):
    """The numbers of a call as passed. A compiled graph takes them as inputs, and checks them when it runs."""

    scalars: dict[str, Any]  # by the name of the option, its Number; 1 if the option is a tensor
    num_items: int | float = 1.0  # the denominator of the loss; 1 if only the device knows it
    taken_at: float = 1.0  # TopK.temperature

    @classmethod
    def of(cls, num_items: int | float = 1.0, taken_at: float = 1.0, **scalars: Number) -> Numbers:
        """The numbers of a call that passes these options, with defaults for all others."""
        values = completed(scalars)
        if values["teacher_temperature"] is None:
            values["teacher_temperature"] = values["temperature"]
        return cls(values, num_items, taken_at)

    def flat(self) -> tuple[Number, ...]:
        """All numbers, in a fixed order; :meth:`from_flat` is the inverse."""
        return (*self.scalars.values(), self.num_items, self.taken_at)

    @classmethod
    def from_flat(cls, numbers: list[Any]) -> Numbers:
        """The Numbers for which :meth:`flat` returned these values."""
        return cls(dict(zip(OPTION_NAMES, numbers, strict=False)), *numbers[len(OPTION_NAMES) :])


# How many numbers Numbers.flat returns.
COUNT = len(OPTION_NAMES) + len(Numbers._fields) - 1


def is_number(value: object) -> bool:
    """Whether the value is a Python number other than a bool, or a symbol for one in a graph."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def with_stand_ins(
    values: dict[str, Any], num_items: Any, labels: Tensor | None
) -> tuple[Numbers, dict[str, Any], Any]:
    """(the numbers of a call that is being compiled, the options with stand-ins, num_items or its stand-in).

    The graph may run again with other numbers, so this function never reads the value of a number.
    """
    numbers = Numbers(
        {
            name: _as_input(
                values["temperature"] if name == TEMPERATURES[1] and value is None else value
            )
            if name in TEMPERATURES
            else value
            for name, value in values.items()
        },
        _as_input(num_items),
    )
    replaced = {
        row.name: values[row.name]
        if row.stand_in is None or not is_number(values[row.name])
        else row.default
        if row.needs_labels and labels is None
        else row.stand_in
        for row in TABLE
    }
    return numbers, replaced, 1.0 if is_number(num_items) else num_items


def _as_input(value: Any) -> Any:
    """The value if it is a number, else 1."""
    return value if is_number(value) else 1.0


def as_tensor(number: float) -> Tensor:
    """The number as a 0-dim float64 tensor on the CPU, which a graph can compare.

    If a number is multiplied by a tensor, torch's compiler makes the number an input of the graph. torch.tensor and
    torch.full would make it a constant.
    """
    return torch.ones((), dtype=torch.float64, device="cpu") * number
