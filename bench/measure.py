"""How every benchmark measures: timing in turns, peak memory, a process per case, floors, and the machine.

A study measures a case in a process of its own with `in_a_process(function, case)`, which runs this file.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import json
import os
import platform
import random
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd import _C
from fastkd.engine.matmul import add_weight_gradient, as_operand, hidden_gradient, make_logits

WARM_UPS = 2
HEAD_START = 2_000_000  # cycles of a GPU, about a millisecond
CLEAR_PEAK = "5"  # proc(5), clear_refs
MIB = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LOAD_AT_START = os.getloadavg()[0]


def nothing() -> None:
    """No clean-up."""


class Contender(NamedTuple):
    """A call to time, and the clean-up after it, which is not timed."""

    run: Callable[[], object]
    clean_up: Callable[[], None] = nothing


def wait_for(device: str) -> None:
    """Wait until a GPU has finished its queue. A CPU has none."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """The duration of one call. On a GPU, of its work on the device alone, without the host's time for the launches."""
    if device != "cpu":
        return _seconds_on_device(run)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_on_device(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)  # meanwhile the host queues all launches of the call
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def seconds_in_a_row(run: Callable[[], object], calls: int = 20) -> float:
    """The time of one of many calls on a GPU that do not wait for each other: that of the host or of the device."""
    for _ in range(WARM_UPS):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def interleave(
    contenders: dict[str, Contender], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every call, by contender and round. Each round runs all contenders in a new random order."""
    for run, clean_up in contenders.values():
        for _ in range(WARM_UPS):
            run()
            clean_up()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            run, clean_up = contenders[name]
            seconds[name].append(seconds_of(run, device))
            clean_up()
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> float:
    """How many times as long `name` takes as `to`: the median of the ratios within rounds."""
    return median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, with three digits."""
    value = median(seconds) * 1e3
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def in_a_process(
    function: Callable[[Any], Any], case: Any, threads: int | None = None, **environment: str
) -> Any:
    """The result of function(case), computed by a new process. Case and result travel as JSON.

    Raises subprocess.CalledProcessError where the process fails; its error is then on standard error.
    """
    what = [inspect.getfile(function), function.__name__, json.dumps([case, threads])]
    done = subprocess.run(
        [sys.executable, __file__, *what],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


def resident(field: str) -> int:
    """Resident bytes of this process: VmRSS is the current value, VmHWM the highest since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def give_back_memory() -> None:
    """Return the free memory of Python, fastkd and the C library to the system."""
    gc.collect()
    _C.release_idle_outputs()
    ctypes.CDLL(None).malloc_trim(0)


def map_above(size: int) -> None:
    """Make the C library return freed blocks above `size` bytes to the system at once.

    With 32 MiB it behaves as glibc does by default after a block of that size has been freed. glibc then also keeps
    twice as much free memory at the end of its heap.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, size)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * size)


def peak_extra(run: Callable[[], object], device: str = "cpu") -> int:
    """Peak memory of a call in bytes, beyond the memory in use before it.

    On a CPU this is the highest resident memory of the process (VmHWM, reset through /proc/self/clear_refs), which
    includes every allocation of every library. Free memory goes back to the system first, because reusing it would not
    show. On a GPU it is torch's own count.
    """
    if device == "cpu":
        give_back_memory()
        map_above(1 * MIB)  # a freed tensor then leaves resident memory at once
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
        try:
            run()
        finally:
            map_above(32 * MIB)
        return resident("VmHWM") - before
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def addition(a: Tensor, b: Tensor) -> Callable[[], object]:
    """`torch.add` into a third tensor that exists already. It moves three times a's bytes."""
    # As integers: adding them costs nothing in any dtype, and there are no denormal numbers.
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    a, b = (x.detach().contiguous().view(integers[x.element_size()]) for x in (a, b))
    c = torch.empty_like(a).zero_()
    return lambda: torch.add(a, b, out=c)


def four_products(
    student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor
) -> Callable[[], None]:
    """The matrix products of a loss from hidden states, without the loss, in the chunks of fastkd's plan."""
    student, weight, teacher, teacher_weight = (
        tensor.detach() for tensor in (student, weight, teacher, teacher_weight)
    )
    rows, width = student.shape
    device = student.device
    plan = fastkd.memory_plan(rows, weight.shape[0], width, dtype=student.dtype, device=device.type)
    size = -(-rows // plan.chunks)
    logits = [torch.ones(size, weight.shape[0], device=device) for _ in range(2)]
    hidden_total = torch.ones_like(student)
    weight_total = torch.ones(weight.shape, device=device)

    def run() -> None:
        for start in range(0, rows, size):
            part = slice(start, min(start + size, rows))
            s, t = (buffer[: part.stop - start] for buffer in logits)
            make_logits(student[part], weight, None, s)
            make_logits(teacher[part], teacher_weight, None, t)
            gradient = as_operand(s, student[part], weight, t)
            hidden_gradient(gradient, weight, hidden_total[part])
            add_weight_gradient(gradient, student[part], weight_total, start == 0)

    return run


def machine() -> dict[str, str]:
    """Everything besides the code that decides a figure."""
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    gpu = {}
    if torch.cuda.is_available():
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        gpu = {
            "GPU": f"{torch.cuda.get_device_name()}, compute capability {capability}",
            "CUDA of torch": str(torch.version.cuda),
        }
    return gpu | {
        "CPU": _cpu_model(),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "caches": _caches(),
        "threads": str(torch.get_num_threads()),
        "load average at the start": f"{LOAD_AT_START:.1f}",
        "torch": f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
        "fastkd": f"{fastkd.__version__} ({_C.instruction_set()})",
        "Python": platform.python_version(),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "not set"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "transparent huge pages": huge_pages.read_text().strip() if huge_pages.exists() else "none",
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _caches() -> str:
    caches = []
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (
            (cache / name).read_text().strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction":
            caches.append(f"L{level} {size}")
    return ", ".join(caches) or "unknown"


if __name__ == "__main__":
    path, name, argument = sys.argv[1:]
    sys.path.insert(0, str(Path(path).parent))
    case, threads = json.loads(argument)
    if threads:
        torch.set_num_threads(threads)
    print(json.dumps(runpy.run_path(path)[name](case)))
