"""RKD's angle loss and its gradient beside the published dense form: time, memory and error.

    python bench/studies/relations.py

The dense form follows the paper's code: all differences [N, N, D], normalized, multiplied into cosines [N, N, N], and a
smooth L1 loss. Each case is measured in a process of its own. It takes one step to warm up, times some steps, and reads
the highest resident memory of these from Linux, as in memory.py. Errors are against the dense form in float64, computed
for a few apexes at a time. The dense form is left out if it needs more memory than is free. float64 and fastkd in plain
PyTorch are left out if they would take more than minutes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import study
import torch
import torch.nn.functional as F
from measure import MIB, in_a_process, peak_extra, seconds_of
from study import emit, progress
from tables import Table
from torch import Tensor

from fastkd.relations import rkd_angle_loss

SHAPES = ((512, 512), (1024, 512), (4096, 512))
MARGIN = 1.15  # free memory that a case must find, as a multiple of what it should need
STEPS = 1 << 40  # for a larger N^3 D, float64 takes more than minutes


def cosines(x: Tensor, apexes: Tensor | None = None) -> Tensor:
    """[apexes, N, N]: entry [j, i, k] is the cosine of the angle at apex j between i and k. None: all are apexes."""
    origins = x if apexes is None else x[apexes]
    differences = F.normalize(x.unsqueeze(0) - origins.unsqueeze(1), dim=2)
    return torch.bmm(differences, differences.transpose(1, 2))


def dense(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        target = cosines(teacher).view(-1)
    return F.smooth_l1_loss(cosines(student).view(-1), target)


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dense": dense,
    "fastkd, reference": partial(rkd_angle_loss, mean="all", backend="reference"),
    "fastkd": partial(rkd_angle_loss, mean="all", backend="cpu"),
}


def inputs(samples: int, width: int) -> tuple[Tensor, Tensor]:
    """Features of a student that is approaching its teacher, and the teacher's."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(samples, width, generator=generator)
    return teacher + 0.5 * torch.randn(samples, width, generator=generator), teacher


def exact(student: Tensor, teacher: Tensor, block: int = 8) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of the dense form in float64, some apexes at a time."""
    student, teacher = student.double().requires_grad_(), teacher.double()
    total = torch.zeros((), dtype=torch.float64)
    for apexes in torch.arange(len(student)).split(block):
        angles = (cosines(x, apexes) for x in (student, teacher))
        loss = F.smooth_l1_loss(*angles, reduction="sum") / len(student) ** 3
        loss.backward()
        total += loss.detach()
    assert student.grad is not None
    return total, student.grad


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Peak in bytes and seconds per step. Loss and gradient go to the file that the case names."""
    Path("/proc/self/oom_score_adj").write_text(
        "1000"
    )  # out of memory, the system ends this process first
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


def too_large(samples: int, width: int) -> str | None:
    """Why the dense form is left out, or None."""
    # The cosines of both models and the gradient of one; differences, plain and normalized.
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
    parser = study.command_line(__doc__, rounds=3)
    parser.add_argument("--samples", nargs="+", type=int, help="measure only these sizes")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--no-errors", action="store_true", help="leave out the form in float64, which is slow"
    )
    arguments = study.parsed(parser)
    table = Table(
        "RKD's angles, float32, forward and gradient; ratios are dense / contender",
        ["contender", "N x D", "seconds", "ratio", "peak MiB", "ratio", "error: loss", "gradient"],
    )
    measurements: list[dict[str, Any]] = []
    notes = ["Memory is the peak beyond the inputs; errors are relative to float64, in the 2-norm."]
    for shape in SHAPES:
        if arguments.samples and shape[0] not in arguments.samples:
            continue
        truth = None
        feasible = shape[0] ** 3 * shape[1] <= STEPS
        if feasible and not arguments.no_errors:
            progress("float64", str(shape))
            truth = exact(*inputs(*shape))
        reference: dict[str, Any] | None = None
        for contender in arguments.contenders:
            progress(contender, str(shape))
            if contender == "fastkd, reference" and not feasible:
                continue
            if contender == "dense" and (why := too_large(*shape)):
                notes.append(f"{why}.")
                continue
            with tempfile.TemporaryDirectory() as folder:
                case = {"contender": contender, "shape": shape, "rounds": arguments.rounds}
                case["results"] = f"{folder}/results.pt"
                measured = in_a_process(measure, case, arguments.threads)
                results = torch.load(case["results"])
            errors = ["-", "-"]
            if truth is not None:
                off = [relative(value, true) for value, true in zip(results, truth, strict=True)]
                measured |= {"loss error": off[0], "gradient error": off[1]}
                errors = [f"{error:.1e}" for error in off]
            if contender == "dense":
                reference = measured
            measurements.append(case | measured)
            ratios = ["-", "-"]
            if reference:
                ratios = [f"{reference['seconds'] / measured['seconds']:.1f}"]
                ratios += [f"{reference['peak'] / max(measured['peak'], 1):.0f}"]
            time, peak = f"{measured['seconds']:.3f}", f"{measured['peak'] / MIB:,.0f}"
            size = f"{shape[0]} x {shape[1]}"
            table.rows.append([contender, size, time, ratios[0], peak, ratios[1], *errors])
    emit(arguments, [table], measurements, notes)


if __name__ == "__main__":
    main()
