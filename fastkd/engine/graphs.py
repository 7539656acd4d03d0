"""What travels into a compiled graph beside tensors: the numbers of a call, which may change from step to step.

torch.compile takes a Python float for a constant until it changes, and then for a symbol. A symbol cannot be an
argument of a custom op: it would be replaced by the value of the moment, and torch's graph caches, which do not see
that, would give the next step the graph of another value. So a number that is a symbol goes into the op as a tensor of
one element, an input of the graph like any other, and is read when the op runs; a constant stays one. Nothing here asks
a symbol for its value, nor compares it: what is checked of a number is checked when the op runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastkd.call.options import Number, as_tensor
from fastkd.core.tensors import copied
from fastkd.divergences import ClosedForm, Divergence, Target, function_name, function_named, made

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


class Packed(NamedTuple):
    """Numbers as arguments of an op."""

    # One letter per number, which says where the number is: "n", "t" and "f" are None, True and False themselves; the
    # other letters name one of the lists.
    kinds: str
    constants: list[float]  # "c"
    integers: list[int]  # "i": constants, or symbols, for which the schema of an op has a type
    symbols: list[
        Tensor
    ]  # "s": tensors of one element on the CPU, so that reading them waits for no device


_LITERALS = {"n": None, "t": True, "f": False}


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
        elif isinstance(number, bool):
            kinds += "t" if number else "f"
        elif isinstance(number, int):
            kinds += "i"
            integers.append(number)
        elif _is_constant(number):
            kinds += "c"
            constants.append(number)
        else:
            kinds += "s"
            symbols.append(as_tensor(number))
    return Packed(kinds, constants, integers, symbols)


def unpack(
    kinds: str, constants: Sequence[float], integers: Sequence[int], symbols: Sequence[Tensor]
) -> list[Number]:
    """What pack was given."""
    sources: dict[str, Iterator[Any]] = {
        "c": iter(constants),
        "i": iter(integers),
        "s": iter(symbols),
    }
    numbers = [_LITERALS[kind] if kind in _LITERALS else next(sources[kind]) for kind in kinds]
    return [number.item() if isinstance(number, Tensor) else number for number in numbers]


def described(divergence: Divergence) -> tuple[str, Sequence[Number]]:
    """(who makes it, from which numbers): a divergence in a graph, which has strings and numbers."""
    if divergence.made_by is not None:
        name, arguments = divergence.made_by
        return f"|||{name}", arguments
    form, target = divergence.closed_form, divergence.target
    moments = (None,) * 3 if form is None else (form.forward, form.reverse, form.cross)
    share = None if target is None else target.weight
    function, apart = function_name(divergence.function), "" if target is None else target.form
    numbers = (divergence.degree, *moments, share, *divergence.params)
    return f"{function}|{apart}|{int(divergence.normalized)}|{divergence.name}", numbers


def from_description(description: str, numbers: Sequence[Any]) -> Divergence:
    """The divergence that described() was given, once its numbers are known."""
    function, form, normalized, name = description.split("|", 3)
    if not function:
        return made(name, numbers)
    degree, *moments, share = numbers[:5]
    return Divergence(
        name,
        function_named(function),
        tuple(numbers[5:]),
        degree=degree,
        closed_form=None if moments[0] is None else ClosedForm(*moments),
        normalized=normalized == "1",
        target=Target(form, share) if form else None,
    )


# ---- losses that run as in eager mode, inside an op of a graph

# The arguments of a call by name, and (shape, dtype) of each tensor that it returns, from those.
Arguments = Mapping[str, Any]
Outputs = Callable[[Arguments], list[tuple[Sequence[int], torch.dtype]]]


Flat = Callable[[Any], list[Tensor]]
Back = Callable[[list[Tensor], Arguments], Any]


class _Loss(NamedTuple):
    function: Callable[..., Any]
    outputs: Outputs
    apart: bool
    flat: Callable[[Any], list[Tensor]]  # what the function returns, as a list


_losses: dict[str, _Loss] = {}


_BETWEEN = "\x1f"


class _Encoded(NamedTuple):
    """The arguments of a call as those of an op."""

    tensors: list[Tensor]
    words: str  # kinds of numbers, then each argument's name, its kind and what more that says, joined by _BETWEEN
    constants: list[float]
    integers: list[int]
    symbols: list[Tensor]


def _encoded(given: Arguments) -> _Encoded:
    tensors: list[Tensor] = []
    words: list[str] = []
    numbers: list[Number] = []
    for name, value in given.items():
        words.append(name)
        if isinstance(value, Tensor):
            words.append("tensor")
            tensors.append(value)
        elif isinstance(value, bool):
            words.append("true" if value else "false")
        elif value is None or isinstance(value, (int, float)):
            words.append("number")
            numbers.append(value)
        elif isinstance(value, str):
            words.extend(("word", value))
        elif isinstance(value, Divergence):
            made_from, parameters = described(value)
            words.extend(("divergence", made_from, str(len(parameters))))
            numbers.extend(parameters)
        elif isinstance(value, (list, tuple)) and all(isinstance(x, Tensor) for x in value):
            words.extend(("tensors", str(len(value))))
            tensors.extend(value)
        else:
            raise TypeError(f"{name} must not be a {type(value).__name__} in a compiled function")
    packed = pack(numbers)
    return _Encoded(tensors, _BETWEEN.join([packed.kinds, *words]), *packed[1:])


def _decoded(
    tensors: Sequence[Any],
    words: str,
    integers: Sequence[int],
    numbers: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """The arguments by name. While a graph is made its integers alone are known: None is in the place of the others."""
    kinds, *said = words.split(_BETWEEN)
    if numbers is None:
        whole = iter(integers)
        numbers = [next(whole) if kind == "i" else None for kind in kinds]
        described_as: Callable[..., Any] = _unknown
    else:
        described_as = from_description
    given: dict[str, Any] = {}
    rest, left, of_call = iter(said), iter(tensors), iter(numbers)
    for name in rest:
        kind = next(rest)
        if kind == "tensor":
            given[name] = next(left)
        elif kind == "tensors":
            given[name] = [next(left) for _ in range(int(next(rest)))]
        elif kind == "number":
            given[name] = next(of_call)
        elif kind == "word":
            given[name] = next(rest)
        elif kind == "divergence":
            made_from, count = next(rest), int(next(rest))
            given[name] = described_as(made_from, [next(of_call) for _ in range(count)])
        else:
            given[name] = kind == "true"
    return given


def _unknown(*_: object) -> None:
    """A divergence whose numbers are not known."""


@torch.library.custom_op("fastkd::loss", mutates_args=())
def loss_op(
    tensors: list[Tensor],
    loss: str,
    wanted: list[bool],
    deferred: bool,
    upstream: list[Tensor],
    words: str,
    constants: list[float],
    integers: list[int],
    symbols: list[Tensor],
) -> list[Tensor]:
    """The tensors that a loss returns and, unless they are deferred, the gradients of the sum of each; or, with
    upstream gradients, these gradients alone, which is the second call of those that are deferred. What is not wanted
    is an empty tensor.
    """  # fmt: skip
    given = [
        tensor.detach().requires_grad_(wants) for tensor, wants in zip(tensors, wanted, strict=True)
    ]
    numbers = unpack(words.split(_BETWEEN, 1)[0], constants, integers, symbols)
    function, _, _, flat = _losses[loss]
    later = deferred and not upstream
    with torch.set_grad_enabled(any(wanted) and not later):
        outputs = flat(function(**_decoded(given, words, integers, numbers)))
    results = [] if upstream else [output.detach() for output in outputs]
    if later:
        return results
    leaves = [tensor for tensor in given if tensor.requires_grad]
    roots = [index for index, output in enumerate(outputs) if output.requires_grad]
    found: Iterator[Tensor] = iter(())
    if roots:
        factors = [upstream[i] if upstream else torch.ones_like(outputs[i]) for i in roots]
        found = iter(torch.autograd.grad([outputs[i] for i in roots], leaves, factors))
    none = tensors[0].new_empty
    return [*results, *(next(found) if wants else none(0) for wants in wanted)]


@loss_op.register_fake
def _loss_fake(tensors, loss, wanted, deferred, upstream, words, constants, integers, symbols):  # type: ignore[no-untyped-def]
    first = tensors[0]
    results = []
    if not upstream:
        shapes = _losses[loss].outputs(_decoded(tensors, words, integers))
        results = [first.new_empty(shape, dtype=dtype) for shape, dtype in shapes]
        if deferred:
            return results
    for tensor, wants in zip(tensors, wanted, strict=True):
        results.append(tensor.new_empty(tensor.shape) if wants else first.new_empty(0))
    return results


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, loss, wanted, deferred, _, words, constants, integers, symbols = inputs
    given = _decoded(range(len(tensors)), words, integers)
    ctx.dropping = [given.get(name) for name in ("labels", "mask", "weight")]
    # What the backward reads. A graph is not told which constants were made in inference mode, so each is copied.
    read = (
        range(len(tensors)) if deferred else {index for index in ctx.dropping if index is not None}
    )
    ctx.read = tuple(read)
    kept = [tensors[i] if wanted[i] else copied(tensors[i]) for i in ctx.read]
    ctx.ignore_index = given.get("ignore_index", -100)
    ctx.call = (loss, wanted, deferred, words, constants, integers)
    ctx.outputs = len(output) if deferred else len(output) - len(tensors)
    ctx.symbols = len(symbols)
    ctx.save_for_backward(*kept, *symbols, *(() if deferred else output[ctx.outputs :]))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, given: Sequence[Tensor | None]) -> tuple[Any, ...]:
    loss, wanted, deferred, words, constants, integers = ctx.call
    saved, count = list(ctx.saved_tensors), len(wanted)
    kept, symbols = saved[: len(ctx.read)], saved[len(ctx.read) :][: ctx.symbols]
    by_index = dict(zip(ctx.read, kept, strict=True))
    # Of the results those that can be differentiated come first: one for all tensors, or one for each of the first.
    upstream = [x for x in given[: ctx.outputs] if x is not None]
    rest: tuple[Any, ...] = (
        None,
        None,
        None,
        [],
        None,
        None if constants else [],
        None if integers else [],
        [None] * ctx.symbols,
    )
    if not upstream:
        return ([None] * count, *rest)
    of_each = [
        None if x is None else _of_counted_rows(x, ctx, by_index) for x in given[: ctx.outputs]
    ]
    if deferred:
        alike = next(x for x in of_each if x is not None)
        factors = [torch.zeros_like(alike) if x is None else x for x in of_each]
        found = loss_op(kept, loss, wanted, True, factors, words, constants, integers, symbols)
        gradients = [x if wants else None for x, wants in zip(found, wanted, strict=True)]
        return (gradients, *rest)
    gradients = []
    for index, (gradient, wants) in enumerate(zip(saved[-count:], wanted, strict=True)):
        factor = of_each[index] if wants and _losses[loss].apart else of_each[0]
        if not wants or factor is None:
            gradients.append(None)
            continue
        factor = factor.reshape(*factor.shape, *(1,) * (gradient.dim() - factor.dim()))
        gradients.append((gradient * factor).to(gradient.dtype))
    return (gradients, *rest)


def _of_counted_rows(upstream: Tensor, ctx: Any, tensors: Mapping[int, Tensor]) -> Tensor:
    """An upstream gradient with 0 for the rows that are dropped, where it may be infinite or NaN."""
    labels, mask, weight = (None if place is None else tensors[place] for place in ctx.dropping)
    if upstream.dim() == 0:
        return upstream
    if labels is not None:
        upstream = torch.where(labels == ctx.ignore_index, 0.0, upstream)
    if mask is not None:
        upstream = torch.where(mask, upstream, 0.0)
    return upstream if weight is None else torch.where(weight == 0, 0.0, upstream)


loss_op.register_autograd(_backward, setup_context=_setup_context)


def as_one_op(
    outputs: Outputs, *, apart: bool = False, flat: Flat | None = None, back: Back | None = None
) -> Callable[[Callable[Parameters, Returned]], Callable[Parameters, Returned]]:
    """A decorator: the loss is one op of a compiled graph, in which it runs as in eager mode, with its gradient.

    outputs says what it returns, from its arguments by name. It differentiates with an autograd Function whose inputs
    are its arguments themselves: below an op nothing else of autograd works. apart: it returns a loss for each of its
    first tensors, which depends on no other. flat and back make a list of what it returns, and that of the list.
    """

    def decorate(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
        name, parameters = function.__name__, tuple(inspect.signature(function).parameters)
        _losses[name] = _Loss(function, outputs, apart, flat or (lambda returned: [returned]))

        @functools.wraps(function)
        def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Returned:
            if not torch.compiler.is_compiling() or len(arguments) > len(parameters):
                return function(*arguments, **options)
            given = dict(zip(parameters, arguments)) | options  # noqa: B905 - defaults follow
            encoded = _encoded(given)
            enabled = torch.is_grad_enabled()
            wanted = [enabled and tensor.requires_grad for tensor in encoded.tensors]
            deferred = False
            for tensor, wants in zip(encoded.tensors, wanted, strict=True):
                deferred = deferred or (wants and tensor.dtype == torch.float16)
            found = loss_op(encoded.tensors, name, wanted, deferred, [], *encoded[1:])
            kept = found if deferred else found[: len(found) - len(wanted)]
            return kept[0] if back is None else back(kept, given)

        return call

    return decorate
