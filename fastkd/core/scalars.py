"""Numbers of other libraries as Python's own."""

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
