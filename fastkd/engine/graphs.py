"""Passes a call's numbers, which may change from step to step, into compiled graphs, and runs a whole loss as one op.

torch.compile treats a Python float as a constant until it changes, and then as a symbol. A float symbol cannot be an
argument of a custom op: torch would replace it by its current value without telling its graph caches, which would then
reuse the graph for other values. A symbol is therefore passed as a tensor of one element, an ordinary input of the
graph that is read when the op runs; a constant stays a constant. Code that runs during compilation never reads or
compares the value of a symbol, so numbers are checked when the op runs.
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
    """Numbers in the form in which an op takes them."""

    # One letter per number: "n", "t" and "f" stand for None, True and False; any other letter names the list that the
    # number is in.
    kinds: str
    # "c": floats that are constants of the graph.
    constants: list[float]
    # "i": ints; an op accepts both constant and symbolic ints.
    integers: list[int]
    # "s": symbols, as tensors of one element on the CPU, so that reading one does not wait for a device.
    symbols: list[Tensor]


_LITERALS = {"n": None, "t": True, "f": False}


def _is_constant(value: float) -> bool:
    """Whether a float is a constant, not a symbol of the graph that is being compiled."""
    try:  # imported here because it loads torch's compiler, which an eager call does not need
        from torch.fx.experimental.symbolic_shapes import has_static_value
    except ImportError:
        return False
    return has_static_value(value)


def pack(numbers: Sequence[Number]) -> Packed:
    """The numbers in the form in which an op takes them; :func:`unpack` is the inverse."""
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
    """The numbers from which :func:`pack` made these arguments."""
    sources: dict[str, Iterator[Any]] = {
        "c": iter(constants),
        "i": iter(integers),
        "s": iter(symbols),
    }
    numbers = [_LITERALS[kind] if kind in _LITERALS else next(sources[kind]) for kind in kinds]
    return [number.item() if isinstance(number, Tensor) else number for number in numbers]


def described(divergence: Divergence) -> tuple[str, Sequence[Number]]:
    """Return (a string, numbers) that describe a divergence to an op; :func:`from_description` is the inverse."""
    if divergence.made_by is not None:
        name, arguments = divergence.made_by
        return f"|||{name}", arguments
    form, target = divergence.closed_form, divergence.target
    moments = (None,) * 3 if form is None else (form.forward, form.reverse, form.cross)
    target_weight = None if target is None else target.weight
    function, target_form = (
        function_name(divergence.function),
        "" if target is None else target.form,
    )
    numbers = (divergence.degree, *moments, target_weight, *divergence.params)
    return f"{function}|{target_form}|{int(divergence.normalized)}|{divergence.name}", numbers


def from_description(description: str, numbers: Sequence[Any]) -> Divergence:
    """Rebuild a divergence from what :func:`described` returned; the numbers must be known."""
    function, target_form, normalized, name = description.split("|", 3)
    if not function:
        return made(name, numbers)
    degree, *moments, target_weight = numbers[:5]
    return Divergence(
        name,
        function_named(function),
        tuple(numbers[5:]),
        degree=degree,
        closed_form=None if moments[0] is None else ClosedForm(*moments),
        normalized=normalized == "1",
        target=Target(target_form, target_weight) if target_form else None,
    )


# ---- losses that run eagerly inside one op of a compiled graph

# The arguments of a call by name.
Arguments = Mapping[str, Any]
# Maps the arguments to the (shape, dtype) of each tensor that the loss returns.
Outputs = Callable[[Arguments], list[tuple[Sequence[int], torch.dtype]]]
# Flatten converts the return value of a loss into a list of tensors; Unflatten converts the list back.
Flatten = Callable[[Any], list[Tensor]]
Unflatten = Callable[[list[Tensor], Arguments], Any]


class _Loss(NamedTuple):
    """A loss that runs as one op: its function, and the arguments of :func:`as_one_op` that the op needs."""

    function: Callable[..., Any]
    outputs: Outputs
    one_loss_per_tensor: bool
    flatten: Flatten


_losses: dict[str, _Loss] = {}

# Separates the words of _Encoded; no name or option contains this character.
_SEPARATOR = "\x1f"


class _Encoded(NamedTuple):
    """The arguments of a call in the form in which loss_op takes them."""

    tensors: list[Tensor]
    # Packed.kinds, then the name, the kind and any details of each argument, all joined by _SEPARATOR.
    words: str
    constants: list[float]
    integers: list[int]
    symbols: list[Tensor]


def _encoded(arguments: Arguments) -> _Encoded:
    tensors: list[Tensor] = []
    words: list[str] = []
    numbers: list[Number] = []
    for name, value in arguments.items():
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
            description, parameters = described(value)
            words.extend(("divergence", description, str(len(parameters))))
            numbers.extend(parameters)
        elif isinstance(value, (list, tuple)) and all(isinstance(x, Tensor) for x in value):
            words.extend(("tensors", str(len(value))))
            tensors.extend(value)
        else:
            raise TypeError(f"{name} must not be a {type(value).__name__} in a compiled function")
    packed = pack(numbers)
    return _Encoded(tensors, _SEPARATOR.join([packed.kinds, *words]), *packed[1:])


def _decoded(
    tensors: Sequence[Any],
    words: str,
    integers: Sequence[int],
    numbers: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """The arguments by name. While a graph is compiled, only integers are known; every other number is then None."""
    kinds, *argument_words = words.split(_SEPARATOR)
    if numbers is None:
        next_integer = iter(integers)
        numbers = [next(next_integer) if kind == "i" else None for kind in kinds]
        divergence_from: Callable[..., Any] = _unknown
    else:
        divergence_from = from_description
    arguments: dict[str, Any] = {}
    next_word, next_tensor, next_number = iter(argument_words), iter(tensors), iter(numbers)
    for name in next_word:
        kind = next(next_word)
        if kind == "tensor":
            arguments[name] = next(next_tensor)
        elif kind == "tensors":
            arguments[name] = [next(next_tensor) for _ in range(int(next(next_word)))]
        elif kind == "number":
            arguments[name] = next(next_number)
        elif kind == "word":
            arguments[name] = next(next_word)
        elif kind == "divergence":
            description, count = next(next_word), int(next(next_word))
            parameters = [next(next_number) for _ in range(count)]
            arguments[name] = divergence_from(description, parameters)
        else:
            arguments[name] = kind == "true"
    return arguments


def _unknown(*_: object) -> None:
    """None, in place of a divergence whose numbers are not known yet."""


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
    """The tensors that a loss returns and, unless deferred, the gradient of their sum with respect to each input.

    The backward pass of a deferred loss calls the op again with the upstream gradients; the op then returns only the
    gradients of the inputs. A gradient that is not wanted is an empty tensor.
    """
    inputs = [
        tensor.detach().requires_grad_(wants) for tensor, wants in zip(tensors, wanted, strict=True)
    ]
    numbers = unpack(words.split(_SEPARATOR, 1)[0], constants, integers, symbols)
    function, _, _, flatten = _losses[loss]
    gradients_later = deferred and not upstream
    with torch.set_grad_enabled(any(wanted) and not gradients_later):
        outputs = flatten(function(**_decoded(inputs, words, integers, numbers)))
    results = [] if upstream else [output.detach() for output in outputs]
    if gradients_later:
        return results
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    roots = [index for index, output in enumerate(outputs) if output.requires_grad]
    gradients: Iterator[Tensor] = iter(())
    if roots:
        factors = [upstream[i] if upstream else torch.ones_like(outputs[i]) for i in roots]
        gradients = iter(torch.autograd.grad([outputs[i] for i in roots], leaves, factors))
    new_empty = tensors[0].new_empty
    return [*results, *(next(gradients) if wants else new_empty(0) for wants in wanted)]


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
    # The arguments, each tensor replaced by its index.
    arguments = _decoded(range(len(tensors)), words, integers)
    ctx.dropping_indices = [arguments.get(name) for name in ("labels", "mask", "weight")]
    # The tensors that the backward pass reads. Tensors without a gradient are copied first, because autograd cannot
    # save one that was created in inference mode, and a compiled graph cannot tell which ones were.
    saved_indices = (
        range(len(tensors))
        if deferred
        else {index for index in ctx.dropping_indices if index is not None}
    )
    ctx.saved_indices = tuple(saved_indices)
    read_tensors = [tensors[i] if wanted[i] else copied(tensors[i]) for i in ctx.saved_indices]
    ctx.ignore_index = arguments.get("ignore_index", -100)
    ctx.call = (loss, wanted, deferred, words, constants, integers)
    ctx.num_outputs = len(output) if deferred else len(output) - len(tensors)
    ctx.num_symbols = len(symbols)
    ctx.save_for_backward(*read_tensors, *symbols, *(() if deferred else output[ctx.num_outputs :]))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, result_gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    loss, wanted, deferred, words, constants, integers = ctx.call
    saved, count = list(ctx.saved_tensors), len(wanted)
    read_tensors, symbols = (
        saved[: len(ctx.saved_indices)],
        saved[len(ctx.saved_indices) :][: ctx.num_symbols],
    )
    by_index = dict(zip(ctx.saved_indices, read_tensors, strict=True))
    # The outputs of the loss come first. With one_loss_per_tensor, output i is differentiable with respect to tensor i
    # alone; otherwise only the first output is differentiable. The gradients that follow the outputs are not.
    output_gradients = result_gradients[: ctx.num_outputs]
    other_gradients: tuple[Any, ...] = (
        None,
        None,
        None,
        [],
        None,
        None if constants else [],
        None if integers else [],
        [None] * ctx.num_symbols,
    )
    if all(upstream is None for upstream in output_gradients):
        return ([None] * count, *other_gradients)
    upstreams = [
        None if upstream is None else _zeroed_in_dropped_rows(upstream, ctx, by_index)
        for upstream in output_gradients
    ]
    if deferred:
        some_upstream = next(x for x in upstreams if x is not None)
        factors = [torch.zeros_like(some_upstream) if x is None else x for x in upstreams]
        computed = loss_op(
            read_tensors, loss, wanted, True, factors, words, constants, integers, symbols
        )
        gradients = [x if wants else None for x, wants in zip(computed, wanted, strict=True)]
        return (gradients, *other_gradients)
    gradients = []
    for index, (gradient, wants) in enumerate(zip(saved[-count:], wanted, strict=True)):
        factor = upstreams[index] if wants and _losses[loss].one_loss_per_tensor else upstreams[0]
        if not wants or factor is None:
            gradients.append(None)
            continue
        factor = factor.reshape(*factor.shape, *(1,) * (gradient.dim() - factor.dim()))
        gradients.append((gradient * factor).to(gradient.dtype))
    return (gradients, *other_gradients)


def _zeroed_in_dropped_rows(upstream: Tensor, ctx: Any, tensors: Mapping[int, Tensor]) -> Tensor:
    """The upstream gradient, set to 0 in dropped rows, where it may be infinite or NaN."""
    labels, mask, weight = (
        None if index is None else tensors[index] for index in ctx.dropping_indices
    )
    if upstream.dim() == 0:
        return upstream
    if labels is not None:
        upstream = torch.where(labels == ctx.ignore_index, 0.0, upstream)
    if mask is not None:
        upstream = torch.where(mask, upstream, 0.0)
    return upstream if weight is None else torch.where(weight == 0, 0.0, upstream)


loss_op.register_autograd(_backward, setup_context=_setup_context)


def as_one_op(
    outputs: Outputs,
    *,
    one_loss_per_tensor: bool = False,
    flatten: Flatten | None = None,
    unflatten: Unflatten | None = None,
    deferred: Callable[[Arguments], bool] | None = None,
) -> Callable[[Callable[Parameters, Returned]], Callable[Parameters, Returned]]:
    """A decorator that makes a loss and its gradient one op of a compiled graph; the loss runs eagerly inside the op.

    The loss must compute its gradient in an autograd Function whose inputs are the arguments themselves, because no
    other part of autograd works inside an op.

    Args:
        outputs: a function that takes the arguments by name, as one mapping, and returns the shape and dtype of each
            tensor that the loss returns.
        one_loss_per_tensor: whether the function returns a separate loss for each of its leading tensors; loss i is
            then differentiable with respect to tensor i alone.
        flatten: converts the return value of the loss into a list of tensors. None: the loss returns one tensor.
        unflatten: the inverse of flatten, which also receives the arguments. None: the loss returns one tensor.
        deferred: a function that takes the arguments by name, as one mapping, and returns whether the gradient must be
            computed in the backward pass, with the upstream gradient inside. That of float16 tensors always is.
    """

    def decorate(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
        name, parameters = function.__name__, tuple(inspect.signature(function).parameters)
        _losses[name] = _Loss(
            function, outputs, one_loss_per_tensor, flatten or (lambda returned: [returned])
        )

        @functools.wraps(function)
        def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Returned:
            if not torch.compiler.is_compiling() or len(arguments) > len(parameters):
                return function(*arguments, **options)
            by_name = dict(zip(parameters, arguments)) | options  # noqa: B905 - the other parameters have defaults
            encoded = _encoded(by_name)
            enabled = torch.is_grad_enabled()
            wanted = [enabled and tensor.requires_grad for tensor in encoded.tensors]
            waits = enabled and deferred is not None and deferred(by_name)
            for tensor, wants in zip(encoded.tensors, wanted, strict=True):
                waits = waits or (wants and tensor.dtype == torch.float16)
            results = loss_op(encoded.tensors, name, wanted, waits, [], *encoded[1:])
            losses = results if waits else results[: len(results) - len(wanted)]
            return losses[0] if unflatten is None else unflatten(losses, by_name)

        return call

    return decorate
