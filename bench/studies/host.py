"""The time that a call takes the host before the device has work.

    python bench/studies/host.py     without a GPU: Triton compiles for sm_90, and launches nothing

gpu.py has the same calls on a GPU, with the launch, beside eager PyTorch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import study
import torch
from peers import Call, fastkd_loss, published
from study import emit
from support.triton_aot import Caught, catch, launch_nothing
from tables import Table
from torch import Tensor

import fastkd

SHAPES = ((8, 1_000), (64, 32_768))
CALLS = 100  # fewer than a device's queue holds, so the host never waits


def microseconds(run: Callable[[], object], rounds: int) -> float:
    """The host's time for a call."""
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


def gradient(loss: Call, student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(loss(student, teacher), student)


def host_time(
    losses: dict[str, Call], device: str, rounds: int
) -> tuple[Table, list[dict[str, Any]]]:
    """Forward and gradient of Hinton's loss, on tensors so small that the device waits for the host."""
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
    """The times of kd_rows in a call, of its launch, and of a launch whose kernel is compiled (kernels/launch.py)."""
    from fastkd.call.contract import Options, Want
    from fastkd.call.contract import Rows as RowValues
    from fastkd.kernels import launch as kernels

    options = Options(fastkd.forward_kl(), vocab_size=1_000)
    inputs = (torch.randn(8, 1_000), torch.randn(8, 1_000), RowValues(), options, Want(True))
    catch(kernels.kd_kernel)
    try:
        kernels.kd_rows(*inputs)
    except Caught as caught:
        kernel, arguments, launch = caught.args
    del kernels.kd_kernel.run
    grid = (8, 1, 1)
    compiled = kernel[grid](*arguments, **launch)
    runs = {
        "kd_rows": lambda: kernels.kd_rows(*inputs),
        "its launch": lambda: kernel[grid](*arguments, **launch),
        "another launch": lambda: compiled[grid](*arguments),
    }
    times = {name: microseconds(run, rounds) for name, run in runs.items()}
    table = Table("Parts of a call of 8 x 1,000: microseconds", [*times])
    table.rows.append([f"{t:.1f}" for t in times.values()])
    return table, [{"step": name, "microseconds": t} for name, t in times.items()]


def main() -> None:
    """The command line."""
    parser = study.command_line(__doc__, rounds=21)
    parser.set_defaults(threads=1)
    arguments = study.parsed(parser)
    if torch.cuda.is_available():
        parser.exit(1, "bench/studies/gpu.py measures this on a GPU\n")
    launch_nothing()
    losses = {
        "fastkd triton, without the launch": fastkd_loss(published("forward_kl"), backend="triton")
    }
    whole, parts = host_time(losses, "cpu", arguments.rounds), steps(arguments.rounds)
    emit(arguments, [whole[0], parts[0]], [*whole[1], *parts[1]])


if __name__ == "__main__":
    main()
