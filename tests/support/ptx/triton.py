"""Triton's kernels in the machine: compiled for a GPU of any architecture, and run on tensors of the CPU.

`install` replaces what launches a kernel. $FASTKD_PTX=sm_90 makes tests/conftest.py call it.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastkd.backends import registry
from support.ptx.launch import Kernel
from support.ptx.program import Program

_FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u32": "I", "u64": "Q", "fp32": "f",
            "fp64": "d"}  # fmt: skip
SCRATCH = (
    2  # parameters that Triton appends, pointers to scratch memory that these kernels do not use
)


def _flattened(kinds: Any, values: Any) -> list[tuple[str, Any]]:
    """(type, value) of the arguments that a kernel takes at run time; tuples are flattened."""
    if isinstance(kinds, (tuple, list)):
        return [pair for each in zip(kinds, values, strict=True) for pair in _flattened(*each)]
    return [] if kinds == "constexpr" else [(kinds, values)]


def _packed(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return struct.pack("<Q", value.data_ptr())
    return struct.pack("<" + _FORMATS[kind], value)


def _memory_of(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


class Launcher:
    """Compiles kernels for one architecture, and launches them in the machine."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)
        self._backend = make_backend(self._target)
        self._binders: dict[JITFunction[Any], Any] = {}
        self._compiled: dict[tuple[int, str, str], tuple[Any, Any]] = {}
        self.kernels: dict[str, Kernel] = {}

    def run(
        self, function: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **options: Any
    ) -> None:
        """What JITFunction.run does on a GPU."""
        if function not in self._binders:
            self._binders[function] = create_function_from_signature(
                function.signature, function.params, self._backend
            )
        bound, specialization, options = self._binders[function](*arguments, debug=False, **options)
        compiled, signature = self._compile(function, bound, specialization, options)
        values = [
            pair for name, kinds in signature.items() for pair in _flattened(kinds, bound[name])
        ]
        tensors = [_memory_of(value) for kind, value in values if kind.startswith("*")]
        size = grid(bound) if callable(grid) else grid
        self._kernel(compiled).launch(
            (*size, *(1,) * (3 - len(size))),
            32 * compiled.metadata.num_warps,
            [_packed(*pair) for pair in values] + [bytes(8)] * SCRATCH,
            tensors,
            dynamic=compiled.metadata.shared,
        )

    def _compile(
        self, function: JITFunction[Any], bound: Any, specialization: Any, options: Any
    ) -> tuple[Any, Any]:
        key = id(function), str(specialization), str(options)
        if key not in self._compiled:
            parsed, signature, constants, attributes = function._pack_args(
                self._backend, options, bound, specialization, options
            )
            source = ASTSource(function, signature, constants, attributes)
            compiled = triton.compile(source, target=self._target, options=parsed.__dict__)
            self._compiled[key] = compiled, signature
        return self._compiled[key]

    def _kernel(self, compiled: Any) -> Kernel:
        if compiled.hash not in self.kernels:
            self.kernels[compiled.hash] = Kernel(
                Program(compiled.asm["ptx"], compiled.metadata.name)
            )
        return self.kernels[compiled.hash]


def install(architecture: int) -> Launcher:
    """Let every launch of a Triton kernel in this process run in the machine, and let CPU tensors reach the kernels."""
    launcher = Launcher(architecture)

    def run(
        self: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **options: Any
    ) -> None:
        launcher.run(self, *arguments, grid=grid, warmup=warmup, **options)

    JITFunction.run = run  # type: ignore[method-assign]
    registry.interpreting = lambda: True
    return launcher
