"""What the custom ops of the losses share: how they receive options, and how they are differentiated.

The schema of an op allows tensors, numbers, lists of either, and strings. An op therefore receives the options of a
call as the fields of :class:`GraphOptions`, which are its last arguments. fastkd/engine/graphs.py describes how it
receives numbers that may change from step to step. :func:`register_gradient` gives an op the gradient rule of
fastkd/engine/gradients.py, as far as a graph allows.
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
from fastkd.engine.gradients import of_kept_rows, with_upstream, without_measures
from fastkd.engine.graphs import described, from_description, pack, unpack


class GraphOptions(NamedTuple):
    """The options of a call as the last arguments of an op."""

    want: list[bool]  # the fields of Want
    vocab_size: int
    ignore_index: int  # also among the numbers; the backward pass needs it before they are unpacked
    tail: str
    divergence: str  # as fastkd.engine.graphs.described returns it
    # The fields of fastkd.engine.graphs.Packed, which hold the numbers of the call, the weights of an ensemble and the
    # parameters of the divergence.
    kinds: str
    constants: list[float]
    integers: list[int]
    symbols: list[Tensor]

    @classmethod
    def of(
        cls, options: Options, want: Want, numbers: Numbers, weights: Sequence[float] = ()
    ) -> GraphOptions:
        """The arguments for these options, for the numbers that stand-ins replace, and for an ensemble's weights."""
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
        """(the options, the weights of an ensemble with this many members), once the op runs and knows its numbers.

        Raises:
            ValueError, TypeError: a number is invalid.
        """
        values: list[Any] = unpack(self.kinds, self.constants, self.integers, self.symbols)
        numbers, weights = Numbers.from_flat(values[:COUNT]), values[COUNT:][:members]
        divergence = from_description(self.divergence, values[COUNT + members :])
        return settled(divergence, self.vocab_size, self.tail, numbers, rows), weights


def by_name(op: Any, arguments: Sequence[Any]) -> dict[str, Any]:
    """A dictionary of an op's arguments by name, in the order of its schema."""
    names = [argument.name for argument in op._opoverload._schema.arguments]
    return dict(zip(names, arguments, strict=True))


def made(like: Tensor, shape: Sequence[int], dtype: torch.dtype, wanted: bool = True) -> Tensor:
    """A fake output of an op, which is an empty tensor if it is not wanted."""
    return like.new_empty(shape, dtype=dtype) if wanted else like.new_empty(0)


def filled(outputs: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """The outputs of an op, with each None replaced by an empty tensor."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in outputs)


def detached(parts: Sequence[Tensor | None], want: Want) -> tuple[Tensor | None, ...]:
    """The parts among the outputs of an op, with None in place of the empty tensors."""
    *terms, measures = (None if part is None else part.detach() for part in parts)
    return (*(terms if want.parts else [None] * 3), measures if want.measures else None)


def register_gradient(
    op: Any,
    outputs: Sequence[str],
    gradients: Mapping[str, str],
    wanted: Callable[[Mapping[str, Any]], Sequence[bool]],
) -> None:
    """Register the gradient of an op whose arguments include the fields of Rows and of GraphOptions.

    Args:
        op: the op.
        outputs: the names of its outputs; the first two are "loss" [...] and "total", of which a caller uses one.
        gradients: for each differentiable argument, the name of the output that is its gradient of total.
        wanted: a function of the arguments by name that tells which of these gradients are wanted.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        arguments = by_name(op, inputs)
        results = dict(zip(outputs, output, strict=True))
        ctx.wanted = dict(zip(gradients, wanted(arguments), strict=True))
        ctx.deferred = Want(*arguments["want"]).deferred
        ctx.dtypes = {
            name: arguments[name].dtype for name in gradients if arguments[name] is not None
        }
        # torch takes any empty list for a list of tensors, and expects one gradient per tensor of a list.
        ctx.no_gradients = {
            name: [None] * len(value) if _is_tensors(value) else None
            for name, value in arguments.items()
        }
        if ctx.deferred:  # the backward pass calls the op again with the same inputs
            saved = {
                name: value if ctx.wanted.get(name) or name == "symbols" else _constant(value)
                for name, value in arguments.items()
                if isinstance(value, Tensor) or _is_tensors(value)
            }
        else:
            saved = {name: results[gradients[name]] for name, wants in ctx.wanted.items() if wants}
            saved |= {name: _constant(arguments[name]) for name in Rows._fields}
        flat: list[Tensor | None] = []
        ctx.saved = {}  # by name, the index in flat; for a list of tensors, the list of indices
        for name, value in saved.items():
            tensors = list(value) if isinstance(value, (list, tuple)) else [value]
            indices = list(range(len(flat), len(flat) + len(tensors)))
            ctx.saved[name] = indices if isinstance(value, (list, tuple)) else indices[0]
            flat += tensors
        ctx.save_for_backward(*flat)
        ctx.arguments = {
            name: None if name in ctx.saved else value for name, value in arguments.items()
        }
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *upstreams: Tensor | None) -> tuple[Any, ...]:
        loss_upstream, total_upstream = upstreams[:2]
        upstream = loss_upstream if total_upstream is None else total_upstream
        if upstream is None:
            return tuple(ctx.no_gradients.values())
        flat = ctx.saved_tensors
        saved: dict[str, Any] = {
            name: [flat[i] for i in index] if isinstance(index, list) else flat[index]
            for name, index in ctx.saved.items()
        }
        rows = Rows(**{name: saved.get(name) for name in Rows._fields})
        upstream = of_kept_rows(upstream, rows, ctx.arguments["ignore_index"])
        if ctx.deferred:
            want = list(without_measures(Want(*ctx.arguments["want"]))._replace(deferred=False))
            arguments = (
                ctx.arguments | saved | with_upstream(rows, upstream)._asdict() | {"want": want}
            )
            results = dict(zip(outputs, op(**arguments), strict=True))
            computed = {name: results[output] for name, output in gradients.items()}
        else:
            factor = upstream.unsqueeze(-1) if upstream.dim() else upstream
            computed = {name: saved[name] * factor for name, wants in ctx.wanted.items() if wants}
        result = ctx.no_gradients | {
            name: computed[name].to(ctx.dtypes[name]) for name, wants in ctx.wanted.items() if wants
        }
        return tuple(result.values())

    op.register_autograd(differentiate, setup_context=save)


def _is_tensors(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(x, Tensor) for x in value)


def _constant(value: Any) -> Any:
    """A copy of a constant for a graph to save, which cannot tell if the constant was made in inference mode."""
    if isinstance(value, (list, tuple)):
        return [copied(tensor) for tensor in value]
    return None if value is None else copied(value)
