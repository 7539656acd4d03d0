"""The output of nvcc for csrc/cuda and every target: nothing spilled, as many threads as plan.h assumes, a small
file."""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from support import sass

from fastkd.backends import registry
from fastkd.divergences import DEFINITIONS, LISTED_TOKENS_ONLY

_spec = importlib.util.find_spec("fastkd._cuda")
if _spec is None or _spec.origin is None:
    reason = registry._built().get("cuda_obstacle", {}).get("reason", "it is not installed")
    pytest.skip(f"fastkd._cuda is not built: {reason}", allow_module_level=True)
BUILT = Path(_spec.origin)

REGISTERS = 65_536  # of a multiprocessor
THREADS = 512  # of a block that has it to itself, or of two


# Bytes that ptxas may park in local memory for a thread. On sm_90, no column is swept with a number from there, except
# in the kernels below. On sm_100 and sm_120, up to seven loads come to eight columns.
SPILLED = 64
SWEPT_WITH_SPILLS = ("alpha_beta", "skew_forward_kl", "mixture")


def _targets() -> list[str]:
    """What the extension was compiled for: all of setup.py's ARCHITECTURES, or those of FASTKD_CUDA_ARCH."""
    from fastkd import _cuda

    return [f"sm_{number}" for number in _cuda.architectures()]


def _usage() -> dict[tuple[str, str], dict[str, int]]:
    """Registers and bytes of stack, local and shared memory by (target, kernel)."""
    from triton import knobs  # triton's wheel includes NVIDIA's tool

    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(BUILT)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results: dict[tuple[str, str], dict[str, int]] = {}
    target = kernel = ""
    for line in text.splitlines():
        if arch := re.search(r"arch = (sm_\w+)", line):
            target = arch[1]
        elif name := re.search(r"Function (\w+):", line):
            kernel = name[1]
        elif "REG:" in line:
            numbers = re.findall(r"(\w+):(\d+)", line)
            results[target, kernel] = {key: int(value) for key, value in numbers}
    return results


def test_every_kernel_exists_and_stays_in_registers() -> None:
    usage = _usage()
    for target in _targets():
        kernels = {name: used for (arch, name), used in usage.items() if arch == target}
        rows = {name: used for name, used in kernels.items() if "kd_kernel" in name}
        dense = [function for function in DEFINITIONS if function not in LISTED_TOKENS_ONLY]
        assert (
            len(rows) == len(dense) + 2
        )  # and those of sparse teachers and of a shard's statistics
        assert sum("Sparse" in kernel for kernel in rows) == 1
        assert sum("DenseShard" in kernel for kernel in rows) == 1
        for function in dense:
            name = function.__name__.lstrip("_")
            assert sum(f"{len(name)}{name}E" in kernel for kernel in rows) == 1, name
        for name, used in kernels.items():
            assert used["LOCAL"] == 0 and used["STACK"] <= SPILLED, name
            if (
                used["STACK"]
                and target == "sm_90"
                and not any(kind in name for kind in SWEPT_WITH_SPILLS)
            ):
                _check_columns_stay_in_registers(target, name)
        for name, used in rows.items():
            assert used["REG"] * THREADS <= REGISTERS, name
            assert used["SHARED"] <= 1 << 10, name  # the rest matches plan.h


def test_the_extension_is_small_and_self_contained() -> None:
    # Sixteen definitions are a kernel each on three architectures, of 70 KB compressed, and once more as PTX.
    assert BUILT.stat().st_size < 8 << 20
    needed = subprocess.run(["ldd", str(BUILT)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libtorch|libc10|libcudart|libcuda\b", needed)


def test_its_table_and_its_targets() -> None:
    from fastkd import _cuda

    assert _cuda.divergences() == [function.__name__.lstrip("_") for function in DEFINITIONS]
    assert set(_targets()) <= {"sm_90", "sm_100", "sm_120"}
    assert {target for target, _ in _usage()} == set(_targets())


def test_newer_devices_find_ptx() -> None:
    """The driver compiles it for a major compute capability that the extension has no code for."""
    first = _targets()[0]
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "--list-ptx", str(BUILT)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f".{first}.ptx" in text


def test_versions() -> None:
    from fastkd import _cuda

    runtime, driver = _cuda.versions()
    assert runtime >= 12080 and driver >= 0


def test_a_launch_without_a_device_raises_cudas_message() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    from fastkd import _cuda

    with pytest.raises(RuntimeError, match=r"cudaGetDevice: .*(driver|device)"):
        _cuda.scale_rows([1], (64, 0, 8, [8]), 64, 0, 0, 0)


def _cheapest(
    code: list[sass.Instruction],
    following: list[list[int]],
    loop: sass.Loop,
    wanted: dict[str, int],
) -> int | None:
    """Instructions of the shortest iteration that executes so many of each opcode; None if no iteration does."""
    at = {instruction.address: i for i, instruction in enumerate(code)}
    inside, first = {at[instruction.address] for instruction in loop.body}, at[loop.path[0].address]

    def counted(have: tuple[int, ...], i: int) -> tuple[int, ...]:
        return tuple(
            min(most, count + code[i].opcode.startswith(opcode))
            for count, (opcode, most) in zip(have, wanted.items(), strict=True)
        )

    start = first, counted((0,) * len(wanted), first)
    queue, seen = collections.deque([(1, start)]), {start}
    while queue:
        length, (i, have) = queue.popleft()
        for follower in following[i]:
            if follower == first and have == tuple(wanted.values()):
                return length
            state = follower, counted(have, follower)
            if follower in inside and follower != first and state not in seen:
                seen.add(state)
                queue.append((length + 1, state))
    return None


# What the loops of forward KL execute for the eight columns of a vector: sixteen exponentials; 16 multiply-adds for
# their arguments and 7 for the moment; the loads of both sides, the conversions of fp16, the store.
LOOPS = {
    "bf16": (
        {"VHMNMX": 4},
        {"LDS.128": 2, "MUFU.EX2": 16, "FFMA": 23},
        {"LDS.128": 2, "MUFU.EX2": 16, "ST.E.128": 1},
    ),
    "fp16": (
        {"HADD2.F32": 16, "FMNMX": 16},
        {"HADD2.F32": 16, "MUFU.EX2": 16, "FFMA": 23},
        {"HADD2.F32": 16, "MUFU.EX2": 16, "ST.E.128": 1},
    ),
    "fp32": (
        {"LDS.128": 4, "FMNMX": 16},
        {"LDS.128": 4, "MUFU.EX2": 16, "FFMA": 23},
        {"LDS.128": 4, "MUFU.EX2": 16, "ST.E.128": 2},
    ),
}


def _code(target: str, name: str) -> sass.Function:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "-arch", target, "-sass", "-fun", name, str(BUILT)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (kernel,) = sass.functions(text)
    return kernel


def _check_columns_stay_in_registers(target: str, name: str) -> None:
    """No ordinary iteration of an innermost loop with exponentials or logarithms (over columns) uses local memory."""
    loops = sass.loops(_code(target, name).code)
    bodies = [{instruction.address for instruction in loop.body} for loop in loops]
    innermost = [
        loop
        for loop, body in zip(loops, bodies, strict=True)
        if not any(other < body for other in bodies)
    ]
    columns = [loop for loop in innermost if loop.present("MUFU")]
    assert columns and not any(loop.executed("LDL", "STL") for loop in columns), name


@functools.cache
def _forward_kl() -> sass.Function:
    """The kernel of forward KL for sm_90."""
    (name,) = (
        name
        for target, name in _usage()
        if target == "sm_90" and "kd_kernel" in name and "10forward_klE" in name
    )
    return _code("sm_90", name)


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 28), ("fp16", 37), ("fp32", 35)])
def test_instructions_a_column(dtype: str, most: int, tmp_path: Path) -> None:
    """Maxima, sums and gradient of forward KL on sm_90. Memory takes as long as 28 to 41 of them (H200)."""
    if "sm_90" not in _targets():
        pytest.skip("the extension has no code for sm_90")
    kernel = _forward_kl()
    loops = [loop for loop in sass.loops(kernel.code) if len(loop.body) < 700]
    total = 0
    following = sass._successors(kernel.code)
    for wanted in LOOPS[dtype]:
        lengths = [_cheapest(kernel.code, following, loop, wanted) for loop in loops]
        total += min(length for length in lengths if length is not None)
    assert total / 8 <= most
