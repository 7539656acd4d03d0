"""RKD's angle loss and its gradient beside the published dense form: time, memory and error.

    python bench/studies/relations.py

The dense form is that of the paper's code: all differences [N, N, D], normalised, multiplied to cosines [N, N, N],
smooth L1. Each case is a process of its own, which takes a step to warm up, then times some, and asks Linux for the
highest resident memory of those (as memory.py does). Errors are against the same form in float64, a block of
apexes at a time. The dense form is left out where it needs more memory than is free, and so are float64 and fastkd in
plain PyTorch where they take more than minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import study  # noqa: F401 (bench/ is importable from here on)
import torch
import torch.nn.functional as F
from measure import peak_extra, seconds_of
from report import Table, add_arguments, emit, progress
from torch import Tensor

from fastkd.relations import rkd_angle_loss

SHAPES = ((512, 512), (1024, 512), (4096, 512))
MARGIN = 1.15  # of free memory over what a case is expected to take
STEPS = 1 << 40  # N^3 D beyond which float64 takes more than minutes


def cosines(x: Tensor) -> Tensor:
    """[N, N, N]: the cosine of the angle at j between i and k is [j, i, k]."""
    differences = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
    return torch.bmm(differences, differences.transpose(1, 2))


def dense(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        target = cosines(teacher).view(-1)
    return F.smooth_l1_loss(cosines(student).view(-1), target)


def of_kernel(student: Tensor, teacher: Tensor) -> Tensor:
    return rkd_angle_loss(student, teacher, mean="all", backend="cpu")


def of_torch(student: Tensor, teacher: Tensor) -> Tensor:
    return rkd_angle_loss(student, teacher, mean="all", backend="reference")


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dense": dense,
    "fastkd, reference": of_torch,
    "fastkd": of_kernel,
}


def inputs(samples: int, width: int) -> tuple[Tensor, Tensor]:
    """A student and a teacher that it is on its way to."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(samples, width, generator=generator)
    return teacher + 0.5 * torch.randn(samples, width, generator=generator), teacher


def exact(student: Tensor, teacher: Tensor, block: int = 8) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of the dense form in float64, some apexes at a time."""
    student, teacher = student.double().requires_grad_(), teacher.double()
    total = torch.zeros((), dtype=torch.float64)
    for apexes in torch.arange(len(student)).split(block):
        found = []
        for x in (student, teacher):
            e = F.normalize(x.unsqueeze(0) - x[apexes].unsqueeze(1), dim=2)
            found.append(torch.bmm(e, e.transpose(1, 2)))
        loss = F.smooth_l1_loss(*found, reduction="sum") / len(student) ** 3
        loss.backward()
        total += loss.detach()
    assert student.grad is not None
    return total, student.grad


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """In the process of a case: peak in bytes and seconds a step; the results go to a file."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # if anyone has to go, this process
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    loss = CONTENDERS[case["contender"]]
    student, teacher = inputs(*case["shape"])
    student.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = loss(student, teacher)
        return value.detach(), torch.autograd.grad(value, student)[0]

    torch.save(step(), case["results"])
    seconds: list[float] = []
    peak = peak_extra(lambda: seconds.extend(seconds_of(step) for _ in range(case["rounds"])))
    return {"peak": peak, "seconds": median(seconds)}


def in_a_process(case: dict[str, Any]) -> dict[str, Any]:
    """What :func:`measure` gives for a case."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def too_large(samples: int, width: int) -> str | None:
    """Why the dense form is left out."""
    # Both models' cosines and the gradient of one; differences, plain and normalised.
    needed = 4 * (3 * samples**3 + 2 * samples**2 * width) * MARGIN
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    if needed <= available:
        return None
    return (
        f"dense at N = {samples} takes {needed / 2**30:.0f} GiB, {available / 2**30:.0f} are free"
    )


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", nargs="+", type=int, help="of the sizes, these")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--no-errors", action="store_true", help="no form in float64, which is slow"
    )
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case)))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    table = Table(
        "RKD's angles, float32, forward and gradient; ratios are dense / contender",
        ["contender", "N x D", "seconds", "ratio", "peak MiB", "ratio", "error: loss", "gradient"],
    )
    measurements: list[dict[str, Any]] = []
    notes = ["Memory is the peak beyond the inputs; errors are relative to float64, in the 2-norm."]
    shapes = [shape for shape in SHAPES if not arguments.samples or shape[0] in arguments.samples]
    for shape in shapes:
        truth = None
        feasible = shape[0] ** 3 * shape[1] <= STEPS
        if feasible and not arguments.no_errors:
            progress("float64", str(shape))
            truth = exact(*inputs(*shape))
        against: dict[str, Any] | None = None
        for contender in arguments.contenders:
            progress(contender, str(shape))
            if contender == "fastkd, reference" and not feasible:
                continue
            if contender == "dense" and (why := too_large(*shape)):
                notes.append(f"{why}.")
                continue
            with tempfile.TemporaryDirectory() as folder:
                results = Path(folder) / "results.pt"
                case = {
                    "contender": contender,
                    "shape": shape,
                    "rounds": arguments.rounds,
                    "threads": arguments.threads,
                    "results": str(results),
                }
                found = in_a_process(case)
                value, gradient = torch.load(results)
            if truth is not None:
                found |= {
                    "loss error": relative(value, truth[0]),
                    "gradient error": relative(gradient, truth[1]),
                }
            if contender == "dense":
                against = found
            measurements.append(case | found)
            table.rows.append(
                [
                    contender,
                    f"{shape[0]} x {shape[1]}",
                    f"{found['seconds']:.3f}",
                    f"{against['seconds'] / found['seconds']:.1f}" if against else "-",
                    f"{found['peak'] / 2**20:,.0f}",
                    f"{against['peak'] / max(found['peak'], 1):.0f}" if against else "-",
                    f"{found['loss error']:.1e}" if truth else "-",
                    f"{found['gradient error']:.1e}" if truth else "-",
                ]
            )
    emit(arguments, [table], measurements, notes)


if __name__ == "__main__":
    main()
