"""What every benchmark shares: turns within a round, the peak of memory, and floors that no loss is in."""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd import _C
from fastkd.engine.matmul import add_weight_gradient, as_operand, hidden_gradient, make_logits

WARM_UPS = 2
CLEAR_PEAK = "5"  # proc(5), clear_refs
MIB = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Contender(NamedTuple):
    """A call that is timed, and what makes up for it afterwards, which is not."""

    run: Callable[[], object]
    clean_up: Callable[[], None]


def nothing() -> None:
    """No clean-up."""


def wait_for(device: str) -> None:
    """Until the device has done what it was given; a CPU has."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """Of one call."""
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def interleave(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, by contender and round."""
    for run, clean_up in contenders.values():
        for _ in range(WARM_UPS):
            run()
            clean_up()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            run, clean_up = contenders[name]
            seconds[name].append(seconds_of(run))
            clean_up()
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> float:
    """How many times as long name takes as `to`."""
    return median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, with three digits."""
    value = median(seconds) * 1e3
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def resident(field: str) -> int:
    """Bytes: VmRSS, resident now, or VmHWM, the most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def give_back_memory() -> None:
    """To the system: what Python, fastkd and the C library have free."""
    gc.collect()
    _C.release_idle_outputs()
    ctypes.CDLL(None).malloc_trim(0)


def map_above(size: int) -> None:
    """The C library asks the system for each block above that, and keeps freed ones below it for itself.

    32 MiB is what glibc arrives at by itself once a block as large has been freed, with twice that for the free memory
    it keeps at the end of its heap.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, size)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * size)


def peak_extra(run: Callable[[], object], device: str = "cpu") -> int:
    """Bytes at the peak of a call beyond what is held before it.

    On a CPU the highest resident memory of the process (VmHWM, set back through /proc/self/clear_refs), so that no
    allocation escapes, whoever makes it; free memory goes back to the system first, or it would be used again unseen.
    On a GPU torch's own count.
    """
    if device == "cpu":
        give_back_memory()
        map_above(1 * MIB)  # a freed tensor is then gone at once, and the peak is of what lives
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
    """`torch.add` to a third tensor that exists: three times a's bytes go by, with nothing to compute."""
    # As integers, so that adding costs nothing in any dtype and there are no denormal numbers.
    of_size = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    a, b = (x.detach().contiguous().view(of_size[x.element_size()]) for x in (a, b))
    c = torch.empty_like(a).zero_()
    return lambda: torch.add(a, b, out=c)


def four_products(
    student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor
) -> Callable[[], None]:
    """The matrix products of a loss from hidden states, alone and in the chunks of fastkd's plan."""
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
            gradient = as_operand(s, weight, t)
            hidden_gradient(gradient, weight, hidden_total[part])
            add_weight_gradient(gradient, student[part], weight_total, start == 0)

    return run
