"""Launches of Triton kernels without Triton's search for the compiled kernel.

Triton specializes a kernel for its arguments, so every launch first describes all of them and looks the description
up. With the nested tuples of these kernels, that takes the host longer than the rest of the launch
(bench/studies/host.py). There are two shortcuts:

- :func:`launch` remembers compiled kernels by a shorter key, which it builds from the :func:`traits` of the arguments.
- :func:`replay` repeats the launches that :func:`record` remembered for an equal call, with the addresses of the new
  tensors. Two calls are equal if they differ only in the addresses of their tensors, and these are aligned alike. The
  caller then need not prepare the arguments.

Both leave the launch to Triton if :func:`state` returns None, for example because a profiler has set hooks. Both
remember only kernels for NVIDIA GPUs, because Triton's other backends specialize on more. AMD's, for example,
specializes on the size of a tensor's memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastkd.core.tensors import address

# The largest number of remembered kernels, and of remembered calls. At this number, all are forgotten, so that calls
# with ever new shapes take little memory.
LIMIT = 1024

Grid = tuple[int, int, int]

# Whether this version of Triton has the setting fpsan_homomorphic_casts; older ones do not.
_FPSAN = hasattr(knobs.compilation, "fpsan_homomorphic_casts")


_kernels: dict[Hashable, CompiledKernel] = {}
_replays: dict[Hashable, Replay] = {}
# The kernels whose ids are part of keys. They are kept alive, so that no other object can get the same id.
_held: dict[int, Any] = {}
_lock = threading.Lock()


def _is_set(hook: Any) -> bool:
    """Return whether a hook is set: to a function, or to a chain of at least one function."""
    return hook is not None and bool(getattr(hook, "calls", True))


def state(kernel: Any) -> Hashable:
    """Return what decides, besides the arguments, which compiled kernel is launched.

    The result is None if only Triton may launch the kernel: in the interpreter, on AMD GPUs, if a hook is set, and if
    somebody has replaced the kernel's run.
    """
    if type(kernel) is not JITFunction or torch.version.hip:
        return None
    runtime = knobs.runtime
    if (
        "run" in vars(kernel)
        or JITFunction.run.__module__ != JITFunction.__module__
        or kernel.pre_run_hooks
        or runtime.add_stages_inspection_hook is not None
        or _is_set(runtime.launch_enter_hook)
        or _is_set(runtime.launch_exit_hook)
    ):
        return None
    compilation = knobs.compilation
    return (
        id(kernel),
        driver.active.get_current_device(),
        kernel.debug,
        runtime.debug,
        compilation.instrumentation_mode,
        compilation.fpsan_homomorphic_casts if _FPSAN else None,
    )


def traits(value: Any) -> Hashable:
    """Return the properties of an argument that a kernel may be compiled for; equal traits share a compiled kernel.

    They include everything that Triton specializes on for NVIDIA GPUs: a tensor's dtype and alignment; whether an
    integer is 1 or divisible by 16, and which of int32, int64 and uint64 it needs; the type of a float or None; and the
    value of anything else. A tuple has the traits of its parts.
    """
    kind = type(value)
    if kind is int:
        divisible = 1 if value == 1 else 0 if value % 16 == 0 else 2
        if -0x80000000 <= value <= 0x7FFFFFFF:
            return divisible
        return divisible, value < 1 << 63
    if isinstance(value, Tensor):
        return value.dtype, address(value) % 16 == 0
    if isinstance(value, tuple):
        # Most parts are numbers or None. Recursive calls for them would take longer than everything else here.
        parts: list[Hashable] = [kind]
        for part in value:
            of_part = type(part)
            if of_part is float or part is None:
                parts.append(of_part)
            elif of_part is int and -0x80000000 <= part <= 0x7FFFFFFF:
                parts.append(1 if part == 1 else 0 if part % 16 == 0 else 2)
            else:
                parts.append(traits(part))
        return tuple(parts)
    return kind if value is None or kind is float else (kind, value)


def _key_of(
    kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Hashable, ...] | None:
    """Return the key of a compiled kernel; None if only Triton may launch it."""
    shared = state(kernel)
    if shared is None:
        return None
    constants = set(kernel.constexprs)
    parts = [
        (type(value), value) if number in constants else traits(value)
        for number, value in enumerate(arguments)
    ]
    return shared, *parts, *options.items()


def _remember(known: dict[Hashable, Any], key: Hashable, value: Any) -> None:
    with _lock:
        if len(known) >= LIMIT:
            known.clear()
        known[key] = value


def _current_stream() -> int:
    active = driver.active
    return active.get_current_stream(active.get_current_device())


def _start(compiled: CompiledKernel, grid: Grid, stream: int, arguments: tuple[Any, ...]) -> None:
    """Launch a compiled kernel, without hooks."""
    function, metadata = compiled.function, compiled.packed_metadata
    compiled.run(*grid, stream, function, metadata, None, None, None, *arguments)


class Launched(NamedTuple):
    """A launch: what a Replay needs to repeat it."""

    compiled: CompiledKernel | None  # None if only Triton may launch the kernel
    grid: Grid
    arguments: tuple[Any, ...]


def launch(kernel: Any, grid: Grid, arguments: tuple[Any, ...], **options: Any) -> Launched:
    """Launch a kernel on the current device and stream; tensors must come from fastkd.core.tensors.readable."""
    key = _key_of(kernel, arguments, options)
    if key is None:
        kernel[grid](*arguments, **options)
        return Launched(None, grid, arguments)
    compiled = _kernels.get(key)
    if compiled is not None:
        _start(compiled, grid, _current_stream(), arguments)
        return Launched(compiled, grid, arguments)
    compiled = kernel[grid](*arguments, **options)
    if not isinstance(compiled, CompiledKernel) or compiled.metadata.target.backend != "cuda":
        return Launched(None, grid, arguments)
    _held[id(kernel)] = kernel
    _remember(_kernels, key, compiled)
    return Launched(compiled, grid, arguments)


class Replay(NamedTuple):
    """The launches of a call, which an equal call can repeat."""

    # Each launch: the compiled kernel, the grid, and a function that returns the arguments. It takes the addresses of
    # the call's tensors, followed by those of its scratch memory.
    steps: list[tuple[CompiledKernel, Grid, Callable[[Sequence[int]], tuple[Any, ...]]]]
    scratch: list[tuple[torch.Size, torch.dtype, Hashable]]  # shape, dtype and traits

    def run(self, addresses: list[int], device: torch.device) -> bool:
        """Launch the kernels on the current device and stream.

        Return False, without a launch, if new scratch memory has other traits than the recorded one.
        """
        scratch = []
        for size, dtype, expected in self.scratch:
            tensor = torch.empty(size, dtype=dtype, device=device)
            if traits(tensor) != expected:
                return False
            addresses.append(address(tensor))
            scratch.append(tensor)  # keeps its memory until all kernels are launched
        stream = _current_stream()
        for compiled, grid, fill in self.steps:
            _start(compiled, grid, stream, fill(addresses))
        return True


def replay(kernel: Any, facts: Hashable, tensors: Sequence[Tensor]) -> tuple[Hashable, bool]:
    """Repeat the launches of an equal call, if one is remembered.

    Args:
        kernel: the kernel that the call launches.
        facts: everything that the launches depend on besides the tensors, such as which optional tensors are given.
        tensors: all tensors that the kernel reads or writes, except scratch memory. They come from
            fastkd.core.tensors.readable.

    Returns:
        (key, whether the launches were repeated). The key is for :func:`record`; None if only Triton may launch the
        kernel.
    """
    shared = state(kernel)
    if shared is None:
        return None, False
    addresses, parts = [], [shared, facts]
    for tensor in tensors:
        where = address(tensor)
        addresses.append(where)
        # The exact remainder: the choice of the kernel depends on whether the rows of all tensors begin equally far
        # past a multiple of 16 bytes.
        parts.append((tensor.shape, tensor.stride(), tensor.dtype, where % 16))
    key = tuple(parts)
    known = _replays.get(key)
    return key, known is not None and known.run(addresses, tensors[0].device)


def record(
    key: Hashable,
    launches: Sequence[Launched],
    tensors: Sequence[Tensor],
    scratch: Sequence[Tensor] = (),
) -> None:
    """Remember the launches of a call for :func:`replay`, if an equal call can repeat them.

    Args:
        key: what :func:`replay` returned for this call.
        launches: the launches, in order.
        tensors: as for :func:`replay`.
        scratch: tensors that the call allocated itself and needs only until its kernels have run.
    """
    if key is None or any(launched.compiled is None for launched in launches):
        return
    slots = {id(tensor): slot for slot, tensor in enumerate((*tensors, *scratch))}
    # If a tensor occurs twice, an equal call may have two different tensors in these places. An argument does not show
    # which of the two it is.
    if len(slots) < len(tensors) + len(scratch):
        return
    used = {id(leaf) for launched in launches for leaf in _tensors(launched.arguments)}
    if not used <= slots.keys():  # another tensor, such as that of launch._row_offsets
        return
    steps = [
        (launched.compiled, launched.grid, _filler(launched.arguments, slots))
        for launched in launches
    ]
    kept = [(tensor.shape, tensor.dtype, traits(tensor)) for tensor in scratch]
    _remember(_replays, key, Replay(steps, kept))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _filler(
    arguments: tuple[Any, ...], slots: dict[int, int]
) -> Callable[[Sequence[int]], tuple[Any, ...]]:
    """Return a function that fills addresses into the arguments, one in the place of each tensor.

    The function is compiled from an expression, because that is faster than a walk through the nested tuples.
    """
    constants: list[Any] = []

    def expression(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"addresses[{slots[id(value)]}]"
        if isinstance(value, tuple) and any(True for _ in _tensors(value)):
            return f"({''.join(expression(part) + ', ' for part in value)})"
        constants.append(value)
        return f"constants[{len(constants) - 1}]"

    source = f"lambda addresses, constants=constants: {expression(arguments)}"
    return eval(source, {"constants": constants})


def forget() -> None:
    """Forget all kernels and calls, as before the first launch."""
    with _lock:
        _kernels.clear()
        _replays.clear()
