"""What the custom ops of the losses share: their options in a graph, and their gradient.

A schema of an op holds tensors, numbers, lists of them, and strings, so a call's options travel as
:class:`GraphOptions`, whose fields are the last arguments of an op. fastkd/engine/graphs.py says how numbers
travel that may change from step to step. :func:`register_gradient` gives an op the rule of
fastkd/engine/gradients.py, as far as a graph allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.call.checks import settled
from fastkd.call.contract import Options, Rows, Want
from fastkd.call.options import COUNT, Numbers
from fastkd.core.tensors import copied
from fastkd.engine.gradients import of_counted_rows, with_upstream
from fastkd.engine.graphs import described, from_description, pack, unpack


class GraphOptions(NamedTuple):
    """The options of a call as the last arguments of an op."""

    want: list[bool]  # the fields of Want
    vocab_size: int
    ignore_index: int  # also among the numbers; the backward needs it by itself
    tail: str
    divergence: str  # fastkd.engine.graphs.described
    # fastkd.engine.graphs.Packed: the numbers of the call, the weights of an ensemble, the divergence's parameters.
    kinds: str
    constants: list[float]
    integers: list[int]
    symbols: list[Tensor]

    @classmethod
    def of(
        cls, options: Options, want: Want, numbers: Numbers, weights: Sequence[float] = ()
    ) -> GraphOptions:
        """The arguments for these options, the numbers that they wait for, and the weights of an ensemble."""
        divergence, parameters = described(options.divergence)
        packed = pack((*numbers.flat(), *weights, *parameters))
        return cls(
            list(want),
            options.vocab_size,
            options.ignore_index,
            options.tail,
            divergence,
            packed.kinds,
            packed.constants,
            packed.integers,
            packed.symbols,
        )

    def settled(self, rows: Rows, members: int = 0) -> tuple[Options, list[float]]:
        """(the options, the weights of an ensemble with so many members), when the op runs and its numbers are known.

        Raises:
            ValueError, TypeError: a number is wrong.
        """
        values: list[Any] = unpack(self.kinds, self.constants, self.integers, self.symbols)
        numbers, weights = Numbers.from_flat(values[:COUNT]), values[COUNT:][:members]
        divergence = from_description(self.divergence, values[COUNT + members :])
        return settled(divergence, self.vocab_size, self.tail, numbers, rows), weights


def by_name(op: Any, arguments: Sequence[Any]) -> dict[str, Any]:
    """The arguments of an op by name, in order."""
    names = [argument.name for argument in op._opoverload._schema.arguments]
    return dict(zip(names, arguments, strict=True))


def made(like: Tensor, shape: Sequence[int], dtype: torch.dtype, wanted: bool = True) -> Tensor:
    """A fake output of an op; what is not wanted is an empty tensor."""
    return like.new_empty(shape, dtype=dtype) if wanted else like.new_empty(0)


def filled(outputs: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """The outputs of an op, with an empty tensor in place of None."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in outputs)


def register_gradient(
    op: Any,
    outputs: Sequence[str],
    gradients: Mapping[str, str],
    wanted: Callable[[Mapping[str, Any]], Sequence[bool]],
) -> None:
    """Register the gradient of an op whose arguments include the fields of Rows and of GraphOptions.

    Args:
        op: the op.
        outputs: the names of its outputs; the first two are "loss" [...] and "total". A caller uses one of them.
        gradients: the output that is the gradient of total, by the argument that it belongs to.
        wanted: from the arguments by name, which of these gradients are wanted.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        given = by_name(op, inputs)
        results = dict(zip(outputs, output, strict=True))
        ctx.wanted = dict(zip(gradients, wanted(given), strict=True))
        ctx.deferred = Want(*given["want"]).deferred
        ctx.dtypes = {name: given[name].dtype for name in gradients if given[name] is not None}
        # torch takes an empty list, of whatever, for one of tensors, and a list of tensors for as many gradients.
        ctx.no_gradients = {
            name: [None] * len(value) if _is_tensors(value) else None
            for name, value in given.items()
        }
        if ctx.deferred:  # the second call reads what this one reads
            saved = {
                name: value if ctx.wanted.get(name) or name == "symbols" else _constant(value)
                for name, value in given.items()
                if isinstance(value, Tensor) or _is_tensors(value)
            }
        else:
            saved = {name: results[gradients[name]] for name, wants in ctx.wanted.items() if wants}
            saved |= {name: _constant(given[name]) for name in Rows._fields}
        flat: list[Tensor | None] = []
        ctx.saved = {}  # the place in flat, by name; of a list, the places
        for name, value in saved.items():
            members = list(value) if isinstance(value, (list, tuple)) else [value]
            places = list(range(len(flat), len(flat) + len(members)))
            ctx.saved[name] = places if isinstance(value, (list, tuple)) else places[0]
            flat += members
        ctx.save_for_backward(*flat)
        ctx.given = {name: None if name in ctx.saved else value for name, value in given.items()}
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *by_output: Tensor | None) -> tuple[Any, ...]:
        loss, total = by_output[:2]
        upstream = loss if total is None else total
        if upstream is None:
            return tuple(ctx.no_gradients.values())
        flat = ctx.saved_tensors
        saved: dict[str, Any] = {
            name: [flat[i] for i in place] if isinstance(place, list) else flat[place]
            for name, place in ctx.saved.items()
        }
        rows = Rows(**{name: saved.get(name) for name in Rows._fields})
        upstream = of_counted_rows(upstream, rows, ctx.given["ignore_index"])
        if ctx.deferred:
            want = list(Want(*ctx.given["want"])._replace(deferred=False))
            again = ctx.given | saved | with_upstream(rows, upstream)._asdict() | {"want": want}
            results = dict(zip(outputs, op(**again), strict=True))
            found = {name: results[output] for name, output in gradients.items()}
        else:
            factor = upstream.unsqueeze(-1) if upstream.dim() else upstream
            found = {name: saved[name] * factor for name, wants in ctx.wanted.items() if wants}
        result = ctx.no_gradients | {
            name: found[name].to(ctx.dtypes[name]) for name, wants in ctx.wanted.items() if wants
        }
        return tuple(result.values())

    op.register_autograd(differentiate, setup_context=save)


def _is_tensors(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(x, Tensor) for x in value)


def _constant(value: Any) -> Any:
    """A constant as a graph saves it: a graph is not told which were made in inference mode, so each is copied."""
    if isinstance(value, (list, tuple)):
        return [copied(tensor) for tensor in value]
    return None if value is None else copied(value)
