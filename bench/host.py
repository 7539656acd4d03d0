"""What a call costs the host before the device has anything to do.

    python bench/host.py     without a GPU: Triton compiles for sm_90, and launches nothing

bench/gpu.py has the same calls on a GPU, beside eager PyTorch, and with the launch in them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import LOSSES, Rows, fastkd_loss
from report import Table, add_arguments, emit
from torch import Tensor

import fastkd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.triton_aot import Caught, catch, launch_nothing

SHAPES = ((8, 1_000), (64, 32_768))
CALLS = 100  # fewer than the launches that a device's queue takes before the host has to wait


def microseconds(run: Callable[[], object], rounds: int) -> float:
    """Of the host, for a call."""
    for _ in range(CALLS):
        run()
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        times.append((time.perf_counter() - start) / CALLS)
    return 1e6 * median(times)


def gradient(loss: Rows, student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(loss(student, teacher), student)


def host_time(
    losses: dict[str, Rows], device: str, rounds: int
) -> tuple[Table, list[dict[str, Any]]]:
    """Forward and gradient of Hinton's loss on tensors so small that the device waits for the host."""
    table = Table("Host time of forward and gradient: microseconds", ("rows x V", *losses))
    measurements = []
    for shape in SHAPES:
        student, teacher = (torch.randn(shape, device=device) for _ in range(2))
        student.requires_grad_()
        times = {
            name: microseconds(partial(gradient, loss, student, teacher), rounds)
            for name, loss in losses.items()
        }
        table.rows.append(("{} x {:,}".format(*shape), *(f"{t:.0f}" for t in times.values())))
        measurements += [
            {"host": shape, "contender": name, "microseconds": t} for name, t in times.items()
        ]
    return table, measurements


def steps(rounds: int) -> tuple[Table, list[dict[str, Any]]]:
    """What kd_rows takes of a call, and Triton of that; and of a launch whose kernel is at hand (kernels/launch.py)."""
    from fastkd.call.contract import Options, Want
    from fastkd.call.contract import Rows as RowValues
    from fastkd.kernels import launch as kernels

    options = Options(fastkd.forward_kl(), vocab_size=1_000)
    inputs = (torch.randn(8, 1_000), torch.randn(8, 1_000), RowValues(), options, Want(True))
    catch(kernels.kd_kernel)
    try:
        kernels.kd_rows(*inputs)
    except Caught as caught:
        kernel, given, launch = caught.args
    del kernels.kd_kernel.run
    grid = (8, 1, 1)
    compiled = kernel[grid](*given, **launch)
    runs = {
        "kd_rows": lambda: kernels.kd_rows(*inputs),
        "its launch": lambda: kernel[grid](*given, **launch),
        "another launch": lambda: compiled[grid](*given),
    }
    times = {name: microseconds(run, rounds) for name, run in runs.items()}
    table = Table("Of them, for 8 x 1,000: microseconds", [*times])
    table.rows.append([f"{t:.1f}" for t in times.values()])
    return table, [{"step": name, "microseconds": t} for name, t in times.items()]


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    add_arguments(parser)
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        parser.exit(1, "bench/gpu.py measures this on a GPU\n")
    launch_nothing()
    torch.set_num_threads(arguments.threads or 1)
    loss = fastkd_loss(LOSSES["forward_kl"], backend="triton")
    whole, parts = (
        host_time({"fastkd triton, without the launch": loss}, "cpu", arguments.rounds),
        steps(arguments.rounds),
    )
    emit(arguments, [whole[0], parts[0]], [*whole[1], *parts[1]])


if __name__ == "__main__":
    main()
