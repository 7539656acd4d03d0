"""Scalars that a user passes: the numbers of other libraries as Python's own, and the checks of numbers and flags."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

from torch import Tensor


def plain(value: Any) -> Any:
    """A scalar of another library, such as np.float32(2.0), as Python's int, float or bool; all else as it came.

    Every number that a user passes goes through here before its type is checked. Tensors are left alone: whether one
    of a single element is a number is for each argument to say.
    """
    if type(value) in (int, float, bool) or isinstance(value, Tensor):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    # NumPy registers its integers and floats with Python's numbers, but not its truth values.
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    return value


def as_float(value: float) -> float:
    """The number as a float; an int that is beyond the largest float is infinite."""
    if type(value) is int and abs(value) > sys.float_info.max:
        return math.inf if value > 0 else -math.inf
    return float(value)


# Numbers outside this range lose their meaning in float32 once they are multiplied or inverted.
SMALLEST, LARGEST = 1e-30, 1e30


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


def check_int(argument: str, value: object) -> int:
    """The value as an int; raise unless it is one, and no bool."""
    value = plain(value)
    if type(value) is not int:
        raise TypeError(f"{argument} must be an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{argument} must fit in 64 bits, got {value}")
    return value


def check_flag(argument: str, value: object) -> bool:
    """The value as a bool; raise unless it is True or False."""
    flag = plain(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{argument} must be True or False, got {type(value).__name__}")
    return flag


def check_magnitude(argument: str, value: float) -> float:
    """The value as a float; raise unless float32 can multiply by it and divide by it."""
    if not SMALLEST <= abs(value) <= LARGEST:
        raise ValueError(
            f"{argument} must be of a size between {SMALLEST:g} and {LARGEST:g}, got {value}"
        )
    return float(value)
