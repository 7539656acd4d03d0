"""What a small call costs: beside eager PyTorch on a CPU, and the host's part of a call on a GPU.

    python bench/studies/host.py           both, without a GPU: Triton compiles for sm_90, and launches nothing
    python bench/studies/host.py --cpu     the CPU's part only

Times are those of the thread, so that waiting for other processes does not count, and contenders take turns in short
rounds. gpu.py has the same calls on a GPU, with the launch, beside eager PyTorch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import study
import torch
import torch.nn.functional as F
from peers import LOSSES, Call, at_temperature, fastkd_loss, published
from study import emit
from support.triton_aot import Caught, catch, launch_nothing
from tables import Table
from torch import Tensor

import fastkd

SHAPES = ((8, 1_000), (64, 32_768))
SMALL = ((8, 1_000), (128, 1_000), (64, 10_000))  # image batches, as on a CPU
# Without a GPU, shapes with one program per row, and with programs that share rows; (the kernels that a call launches).
LAUNCHED = {(8, 1_000): 2, (64, 32_768): 3}
CALLS = 100  # fewer than a device's queue holds, so the host never waits


def microseconds(run: Callable[[], object], rounds: int) -> float:
    """The host's time for a call."""
    for _ in range(CALLS):
        run()
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.thread_time()
        for _ in range(CALLS):
            run()
        times.append((time.thread_time() - start) / CALLS)
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


# The three ways to launch (kernels/launcher.py).
PATHS = ("repeated launches", "known kernels", "Triton's search")


def by(path: str, run: Callable[[], object]) -> Callable[[], object]:
    """A call in which launches take this path."""
    from fastkd.kernels import launcher

    replaced = {
        "known kernels": ("replay", lambda *call: (None, False)),
        "Triton's search": ("state", lambda kernel: None),
    }.get(path)

    def call() -> object:
        if replaced is None:
            return run()
        name, function = replaced
        kept = getattr(launcher, name)
        setattr(launcher, name, function)
        try:
            return run()
        finally:
            setattr(launcher, name, kept)

    return call


def paths(rounds: int) -> tuple[Table, list[dict[str, Any]]]:
    """Forward and gradient of Hinton's loss by each path, without launches, and what of it is torch's own."""
    table = Table(
        "Forward and gradient through backend 'triton', without the launches: least microseconds",
        ("rows x V", "kernels", *PATHS, "a Function that computes nothing"),
    )
    measurements = []
    loss = fastkd_loss(published("forward_kl"), backend="triton")
    for shape, kernels in LAUNCHED.items():
        student, teacher = torch.randn(shape).requires_grad_(), torch.randn(shape)
        gradient_of, one = torch.randn(shape), torch.ones(())
        runs = {path: by(path, partial(gradient, loss, student, teacher)) for path in PATHS}
        runs["a Function that computes nothing"] = lambda s=student, g=gradient_of, o=one: (
            torch.autograd.grad(_Nothing.apply(s, g, o), s)
        )
        times = {name: min(values) for name, values in in_turns(runs, rounds, 50).items()}
        row = ("{} x {:,}".format(*shape), str(kernels), *(f"{t:.0f}" for t in times.values()))
        table.rows.append(row)
        measurements += [
            {"host": shape, "path": name, "microseconds": t} for name, t in times.items()
        ]
    return table, measurements


def steps(rounds: int) -> tuple[Table, list[dict[str, Any]]]:
    """The times of kd_rows in a call, of its launch, and of a launch whose kernel is known (kernels/launcher.py)."""
    from fastkd.call.contract import Options, Want
    from fastkd.call.contract import Rows as RowValues
    from fastkd.kernels import launch as kernels
    from fastkd.kernels import launcher

    options = Options(fastkd.forward_kl(), vocab_size=1_000)
    student, teacher, one = torch.randn(8, 1_000), torch.randn(8, 1_000), torch.ones(())
    inputs = (student, teacher, RowValues(), options, Want(True))
    catch(kernels.kd_kernel)
    try:
        kernels.kd_rows(*inputs)
    except Caught as caught:
        kernel, arguments, launch = caught.args
    del kernels.kd_kernel.run
    grid = (8, 1, 1)
    compiled = kernel[grid](*arguments, **launch)
    runs: dict[str, Callable[[], object]] = {
        f"kd_rows, {path}": by(path, lambda: kernels.kd_rows(*inputs)) for path in PATHS
    } | {
        f"scale_rows_, {path}": by(path, lambda: kernels.scale_rows_(student, one))
        for path in PATHS
    }
    runs |= {
        "a launch by Triton": lambda: kernel[grid](*arguments, **launch),
        "a launch of a known kernel": lambda: launcher.launch(kernel, grid, arguments, **launch),
        "a launch of a compiled kernel": lambda: compiled[grid](*arguments),
        "allocation of the outputs": lambda: (
            student.new_empty(student.shape),
            torch.empty((8,), dtype=torch.float32, device=student.device),
        ),
        "sum of the losses": lambda: one.sum(),
    }
    times = {name: min(values) for name, values in in_turns(runs, rounds, 50).items()}
    table = Table("Parts of a call of 8 x 1,000", ("part", "least microseconds"))
    table.rows += [(name, f"{t:.1f}") for name, t in times.items()]
    return table, [{"step": name, "microseconds": t} for name, t in times.items()]


# Small calls on a CPU, beside eager PyTorch.


def small_losses(labels: Tensor | None) -> dict[str, Call]:
    """Hinton's loss at temperature 2, with the cross-entropy in equal parts if there are labels."""
    distillation = at_temperature(LOSSES["forward_kl"].formula, 2.0)

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        loss = distillation(student, teacher).mean()
        return loss if labels is None else 0.5 * loss + 0.5 * F.cross_entropy(student, labels)

    def of_backend(backend: str) -> Call:
        alpha = 1.0 if labels is None else 0.5
        return lambda student, teacher: fastkd.kd_loss(
            student, teacher, labels, temperature=2.0, alpha=alpha, backend=backend
        )

    return {"eager": eager, "cpu": of_backend("cpu"), "portable": of_backend("portable")}


def in_turns(
    runs: dict[str, Callable[[], object]], rounds: int, calls: int
) -> dict[str, list[float]]:
    """The microseconds of a call of each contender, in every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(calls):
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.thread_time()
            for _ in range(calls):
                run()
            times[name].append(1e6 * (time.thread_time() - start) / calls)
    return times


def small_calls(rounds: int) -> tuple[Table, list[dict[str, Any]]]:
    """Forward and gradient of small batches on a CPU, as a ratio to eager's time."""
    table = Table(
        "Forward and gradient of small batches on a CPU: microseconds, and the median ratio to eager",
        ("rows x V", "labels", "eager", "cpu", "portable"),
    )
    measurements = []
    for rows, columns in SMALL:
        student, teacher = torch.randn(rows, columns).requires_grad_(), torch.randn(rows, columns)
        for labels in (None, torch.randint(columns, (rows,))):
            runs = {
                name: partial(gradient, loss, student, teacher)
                for name, loss in small_losses(labels).items()
            }
            times = in_turns(runs, rounds, max(1, 80_000 // (rows * columns)))
            ratios = {
                name: median(a / b for a, b in zip(ours, times["eager"], strict=True))
                for name, ours in times.items()
            }
            cells = [f"{median(times[name]):.0f} ({ratios[name]:.2f}x)" for name in runs]
            has = "no" if labels is None else "yes"
            table.rows.append((f"{rows} x {columns:,}", has, *cells))
            measurements += [
                {"small": (rows, columns), "labels": has, "contender": name,
                 "microseconds": median(times[name]), "ratio": ratios[name]}
                for name in runs
            ]  # fmt: skip
    return table, measurements


class _Nothing(torch.autograd.Function):
    """A Function that computes nothing, whose cost is torch's own."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return ctx.saved_tensors[0], None, None


def small_steps(rounds: int) -> tuple[Table, list[dict[str, Any]]]:
    """Where the time of a call of 8 x 1,000 goes on the cpu backend."""
    from fastkd import _C
    from fastkd.backends import cpu, native, registry
    from fastkd.call import checks, memo
    from fastkd.call.contract import Rows, Want

    student, teacher = torch.randn(8, 1_000).requires_grad_(), torch.randn(8, 1_000)
    logits, nothing, one = student.detach(), torch.randn(0, 1_000), torch.ones(())
    f32, kl, want = torch.float32, fastkd.forward_kl(), Want(student_gradient=True)

    def loss() -> Tensor:
        return fastkd.kd_loss(student, teacher, temperature=2.0, backend="cpu")

    def prepared() -> Any:
        return checks.prepare(
            student.shape[:-1], student.device, f32, 1_000, None, teacher, temperature=2.0
        )

    def checked_again() -> Tensor:
        memo.forget()
        return loss()

    def key() -> Any:
        tensors = (student, teacher, None, None, None)
        return memo.recall(memo.key_of(tensors, ("forward_kl", 2.0, None, *(1.0,) * 16)))

    def packed(of: Tensor) -> tuple[Any, ...]:
        result = native.outputs(of, of, want, cpu.empty, per_row=cpu.empty)
        results.append(result)  # keeps its memory
        return native.arguments(of, of, Rows(), options, result)

    options, results = prepared().options, []
    result = native.outputs(logits, teacher, want, cpu.empty)
    full, empty = packed(logits), packed(nothing)
    runs: dict[str, Callable[[], object]] = {
        "forward and gradient": lambda: torch.autograd.grad(loss(), student),
        "forward": loss,
        "forward, checked again": checked_again,
        "key of the memo": key,
        "choice of the backend": lambda: registry.select("cpu", "cpu", f32, f32, kl),
        "Function that computes nothing, and its gradient": lambda: torch.autograd.grad(
            _Nothing.apply(student, logits, one), student
        ),
        "backend's kd_rows": lambda: cpu.kd_rows(logits, teacher, Rows(), options, want),
        "allocation": lambda: native.outputs(logits, teacher, want, cpu.empty, per_row=cpu.empty),
        "packing": lambda: native.arguments(logits, teacher, Rows(), options, result),
        "pybind11 call, of no rows": lambda: _C.kd_rows(*empty, 0, 1),
        "pybind11 call, of 8 rows": lambda: _C.kd_rows(*full, 0, 1),
        "scaling of the gradient": lambda: cpu.scale_rows_(logits, one),
    }
    times = {name: min(values) for name, values in in_turns(runs, rounds, 50).items()}
    table = Table("Parts of a call of 8 x 1,000 on the cpu backend", ("part", "least microseconds"))
    table.rows += [(name, f"{t:.1f}") for name, t in times.items()]
    return table, [{"part": name, "microseconds": t} for name, t in times.items()]


def main() -> None:
    """The command line."""
    parser = study.command_line(__doc__, rounds=21)
    parser.add_argument("--cpu", action="store_true", help="only small calls on the CPU")
    parser.set_defaults(threads=1)
    arguments = study.parsed(parser)
    if torch.cuda.is_available():
        parser.exit(1, "bench/studies/gpu.py measures this on a GPU\n")
    results = [small_calls(arguments.rounds), small_steps(arguments.rounds)]
    if not arguments.cpu:
        results += triton(arguments.rounds)
    tables, measurements = zip(*results, strict=True)
    emit(arguments, tables, [one for several in measurements for one in several])


def triton(rounds: int) -> list[tuple[Table, list[dict[str, Any]]]]:
    """The tables of the triton backend's host time, with the plan of an H100."""
    from fastkd.kernels.split import Device

    from fastkd.kernels import launch as kernels

    launch_nothing(keep=False)
    kernels.device_of = lambda device: Device("sm_90", 132, 50 << 20, True)
    return [paths(rounds), steps(rounds)]


if __name__ == "__main__":
    main()
