"""Kernels compiled ahead of time for GPUs that this machine does not have, and the resources that they need."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from support import sass


class LoopCounts(NamedTuple):
    """What a loop executes in an iteration, per thread (support/sass.py)."""

    path: int  # instructions of the shortest iteration
    all: int  # instructions of the whole loop
    barriers: int  # anywhere in the loop
    shuffles: int  # likewise
    loads: int  # from device memory, in the shortest iteration
    stores: int  # to device memory, likewise
    mufu: int  # exponentials, logarithms and reciprocals, likewise


class Resources(NamedTuple):
    """The resources per thread of a compiled kernel."""

    registers: int
    local_bytes: int  # of local memory
    local_in_loop: bool  # whether an ordinary iteration of a loop reads or writes it
    columns_per_thread: int = 0  # of a tile; 0 if the kernel has no tile
    warps: int = 0  # of a program
    instructions: int = 0  # of the whole kernel
    loops: tuple[LoopCounts, ...] = ()  # outermost, by address; none for HIP
    # Sums over lanes whose first addition is fused with a product: lanes then differ in the last bit. Not for HIP.
    fused_sums: int = 0

    def sweeps(self, with_sums: bool) -> list[LoopCounts]:
        """The sweeps of a kernel for whole rows: statistics, sums if there is no closed form, gradients.

        Between them lie loops that read only the lanes with the maxima, and one for rows with a log 0.
        """
        reading = [loop for loop in self.loops if loop.loads]
        return [reading[0], *reading[-2 if with_sums else -1 :]]

    @property
    def spills(self) -> bool:
        """Whether tiles are not kept in registers.

        ptxas parks a few numbers of a row in local memory before a loop and takes them back after it, or in a branch
        that few iterations take, where that lets one more block fit. A tile has eight entries a thread: spilled, it
        would be 32 bytes.
        """
        return self.local_in_loop or self.local_bytes >= 32


def restored(used: Any) -> Resources:
    """The Resources that JSON turned into lists."""
    *numbers, loops, fused_sums = used
    return Resources(*numbers, tuple(LoopCounts(*loop) for loop in loops), fused_sums)


class Caught(Exception):  # noqa: N818 (no error: it carries a launch out of the launcher)
    """Carries (kernel, arguments, options) of a launch."""


def catch(kernel: Any, stage: str | None = None) -> None:
    """Make a launch of a kernel, or of the given stage, raise Caught; other launches do nothing."""

    def run(*arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if stage in (None, arguments[-1]):
            raise Caught(kernel, arguments, options)

    kernel.run = run


def _compiled(
    kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], target: Any
) -> dict[str, Any]:
    """The code that Triton compiles for a launch, specialized for the target as on its machine."""
    import triton
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    if target.backend == "hip":
        options.pop("maxnreg", None)  # as the launcher does where torch is for HIP
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*arguments, debug=False, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__).asm


def local_in_loop(code: list[sass.Instruction]) -> bool:
    """Whether a loop accesses local memory on the shortest way through it."""
    return any(loop.executed("LDL", "STL") for loop in sass.loops(code))


def _loop_counts(code: list[sass.Instruction]) -> tuple[LoopCounts, ...]:
    return tuple(
        LoopCounts(
            loop.executed(),
            loop.present(),
            loop.present("BAR"),
            loop.present("SHFL"),
            loop.executed("LDG"),
            loop.executed("STG"),
            loop.executed("MUFU"),
        )
        for loop in sass.loops(code)
        if loop.depth == 0
    )


def fused_sums(ptx: str) -> int:
    """How many results of shuffles are added by a fused multiply-add."""
    shuffled = set(re.findall(r"shfl\.sync\.\S+\s+(%\w+)", ptx))
    added = re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", ptx)
    return sum(register in shuffled for register in added)


def _cuda_resources(code: dict[str, Any], columns_per_thread: int, warps: int) -> Resources:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert usage is not None
    registers, stack, local = map(int, usage.groups())
    (function,) = sass.functions(text)
    return Resources(
        registers,
        stack + local,
        local_in_loop(function.code),
        columns_per_thread,
        warps,
        len(function.code),
        _loop_counts(function.code),
        fused_sums(code["ptx"]),
    )


def _hip_resources(text: str) -> Resources:
    def field(name: str) -> int:
        actual = re.search(rf"\.{name}:\s+(\d+)", text)
        assert actual is not None, name
        return int(actual[1])

    # Scalar registers spill to lanes of vector registers, which vgpr_count has; no memory is touched.
    local = field("private_segment_fixed_size")
    return Resources(field("vgpr_count"), local, local > 0 or field("vgpr_spill_count") > 0)


def resources(
    kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], target: str
) -> Resources:
    """The resources that a launch needs on a target such as cuda:90 or hip:gfx942."""
    from triton.backends.compiler import GPUTarget

    vendor, _, architecture = target.partition(":")
    if vendor == "hip":
        actual = _compiled(kernel, arguments, options, GPUTarget("hip", architecture, 64))
        return _hip_resources(actual["amdgcn"])
    actual = _compiled(kernel, arguments, options, GPUTarget("cuda", int(architecture), 32))
    columns_per_thread, warps = 0, options.get("num_warps", 4)
    if "BLOCK_V" in kernel.arg_names:
        block = arguments[kernel.arg_names.index("BLOCK_V")]
        columns_per_thread = block // (32 * warps)
    return _cuda_resources(actual, columns_per_thread, warps)


def launch_nothing(keep: bool = True) -> list[tuple[Any, ...]]:
    """Let Triton do for CPU tensors all that it does on sm_90, but for the launch; each one's (grid, arguments).

    keep: whether they are kept. A measurement keeps none.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fastkd.backends import registry

    launched: list[tuple[Any, ...]] = []

    def launcher(source: Any, metadata: Any) -> Callable[..., None]:
        if not keep:
            return lambda *launch: None
        # Between the grid and the arguments: stream, function, metadata of two kinds, two hooks.
        return lambda *launch: launched.append((launch[:3], launch[9:]))

    utilities = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
        load_binary=lambda *binary: (1, 1, 0, 0, 1024),
        unload_module=lambda module: None,
    )
    driver.set_active(
        SimpleNamespace(
            utils=utilities,
            launcher_cls=launcher,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    registry.interpreting = lambda: True  # the CPU's tensors are let through
    return launched
