"""What travels into a compiled graph beside tensors: the numbers of a call, which may change from step to step.

torch.compile takes a Python float for a constant until it changes, and then for a symbol. A symbol cannot be an argument
of a custom op: it would be replaced by the value of the moment, and torch's graph caches, which do not see that, would
give the next step the graph of another value. So a number that is a symbol goes into the op as a tensor of one element,
an input of the graph like any other, and is read when the op runs; a constant stays one. Nothing here asks a symbol for
its value, nor compares it: what is checked of a number is checked when the op runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

Number = int | float | None


class Packed(NamedTuple):
    """Numbers as arguments of an op."""

    kinds: str  # a letter a number, which says where it is: "n" for None, or one of the three lists
    constants: list[float]  # "c"
    integers: list[int]  # "i", constants or symbols, which the schema of an op has a type for
    symbols: list[Tensor]  # "s", of one element on the CPU, so that nobody waits for a device


def _is_constant(value: float) -> bool:
    """Whether a float is no symbol of the graph that is being made."""
    try:  # here, as this loads what only a compiler needs
        from torch.fx.experimental.symbolic_shapes import has_static_value
    except ImportError:
        return False
    return has_static_value(value)


def pack(numbers: Sequence[Number]) -> Packed:
    """The numbers as arguments of an op; :func:`unpack` gives them back."""
    kinds, constants, integers, symbols = "", [], [], []
    for number in numbers:
        if number is None:
            kinds += "n"
        elif isinstance(number, int):
            kinds += "i"
            integers.append(number)
        elif _is_constant(number):
            kinds += "c"
            constants.append(number)
        else:
            kinds += "s"
            # A product with a tensor is what torch's compiler makes an input of; other ways of making a tensor of a
            # number (torch.tensor, torch.full) would make a constant of it.
            one = torch.ones((), dtype=torch.float64, device="cpu")
            symbols.append(one * number)
    return Packed(kinds, constants, integers, symbols)


def unpack(
    kinds: str, constants: Sequence[float], integers: Sequence[int], symbols: Sequence[Tensor]
) -> list[Number]:
    """What pack was given."""
    sources = {"c": iter(constants), "i": iter(integers), "s": iter(symbols)}
    numbers = [None if kind == "n" else next(sources[kind]) for kind in kinds]
    return [number.item() if isinstance(number, Tensor) else number for number in numbers]
