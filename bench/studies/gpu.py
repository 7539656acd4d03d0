"""Losses on a GPU: time beside the bandwidth of a copy, a prediction and other packages; memory; the host's time.

    python bench/studies/gpu.py

- Times are those of the device alone (events behind a queue that is full), medians of rounds in which contenders take
  turns; "a call" is the time of one of many calls in a row, which the host may decide.
- The share of the copy rate is the bytes that a kernel moves over its time, divided by the rate of `out.copy_(x)` in
  the same run. Every sweep of the Triton kernel reads both logits; the CUDA kernel reads them once, into shared memory.
- A contender is verified against float64 on a few rows before it is timed. If it is wrong, its cell says so.
- Peaks are torch's own count, beyond the inputs.

Results go to bench/results/<device>/ as JSON and Markdown. `--sanitize` runs a small grid and measures nothing.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from itertools import chain
from statistics import median
from typing import Any

import model
import study
import torch
from cases import Case, Problem, random_logits
from host import host_time
from instructions import DTYPES
from measure import Contender, four_products, interleave, seconds_in_a_row
from peers import failure, published
from study import contenders, emit, progress
from tables import Table

import fastkd
from fastkd.backends import registry

WIDE = (4096, 128_256)
# (divergence, rows, V, logits) of the kernels: every kind and dtype, other vocabularies, narrow rows, few rows.
KERNELS = (
    *((name, *WIDE, dtype) for name in model.DIVERGENCES for dtype in ("bf16", "fp32")),
    ("forward_kl", *WIDE, "fp16"),
    *(
        (name, rows, vocabulary, "bf16")
        for rows, vocabulary in (
            (4096, 32_768), (4096, 50_257), (4096, 151_936), (2048, 262_144), (16_384, 8_192), (65_536, 1_000),
            (128, 1_000), (64, 128_256), (8, 128_256),
        )
        for name in ("forward_kl", "jsd")
    ),
)  # fmt: skip
# (divergence, V, logits) beside other packages, with WIDE's rows.
COMPETITION = (
    *((name, 128_256, dtype) for name in ("forward_kl", "jsd", "reverse_kl") for dtype in ("bfloat16", "float32")),
    *(("forward_kl", vocabulary, "bfloat16") for vocabulary in (32_768, 151_936, 262_144)),
)  # fmt: skip
GIB = 2**30
Measured = tuple[Table, list[dict[str, Any]]]


def own_backends() -> list[str]:
    """fastkd's backends that run on this device."""
    call = registry.Request("cuda", torch.float32, torch.float32, fastkd.forward_kl())
    available = registry.available_backends()
    return [name for name in ("cuda", "triton") if registry.obstacle(name, call, available) is None]


def seconds_alone(run: Any, rounds: int) -> float:
    """The median time of a call."""
    return median(interleave({"it": Contender(run)}, rounds, "cuda")["it"])


def copy_rate(rounds: int) -> float:
    """Bytes per second, read and written."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    out = torch.empty_like(source)
    return 2 * source.nbytes / seconds_alone(lambda: out.copy_(source), rounds)


def product_rate(rounds: int) -> float:
    """Floating-point operations per second of a large matrix product in bfloat16."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / seconds_alone(lambda: torch.mm(a, a), rounds)


def competition(
    problem: Problem, names: list[str], rounds: int, **floors: Contender
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, str]]:
    """(seconds, peak bytes, why it was left out), each by contender. The floors are timed in the same rounds."""
    case = problem.case
    small = case._replace(rows=64, vocabulary=5_000, hidden=min(case.hidden, 64))
    few = Problem(small, problem.loss)
    steps, peaks, why = dict(floors), {}, {}
    for name, (peer, call) in contenders(problem, names).items():
        try:
            wrong = few.verdict(peer, few.errors(peer, call))
        except (
            Exception
        ) as error:  # whatever a package raises on this machine becomes a cell of the table
            wrong = failure(error)
            few.clean_up()
        if wrong is not None:
            assert peer.package != "fastkd", f"{name}: {wrong}"
            why[name] = wrong
            continue
        try:
            peaks[name] = problem.peak(peer, call)
            steps[name] = problem.contender(peer, call)
        except torch.OutOfMemoryError:
            why[name] = "out of memory"
            problem.clean_up()
        torch.cuda.empty_cache()
    return interleave(steps, rounds, "cuda"), peaks, why


def reads_of(backend: str, divergence: str, vocabulary: int) -> int:
    """How often a backend's kernel reads a row."""
    return 1 if backend == "cuda" else model.reads_of(divergence, vocabulary)


def step_of(
    backend: str, divergence: str, student: torch.Tensor, teacher: torch.Tensor
) -> Callable[[], object]:
    """Forward and gradient."""
    chosen = fastkd.DIVERGENCES[divergence]()

    def step() -> object:
        loss = fastkd.kd_loss(student, teacher, divergence=chosen, backend=backend)
        return torch.autograd.grad(loss, student)

    return step


def own_kernels(rounds: int, bandwidth: float) -> tuple[Table, list[dict[str, Any]], str]:
    """The time of every backend's kernel, and whether backend="auto" should prefer cuda."""
    backends = own_backends()
    predicted = model.predictions(model.this_gpu(bandwidth), KERNELS)
    columns = [
        column for name in backends for column in (f"{name}: ms", "share of copy rate", "a call")
    ]
    table = Table(
        "Kernels, forward and gradient; the model predicts triton's",
        ("divergence", "rows x V", "logits", *columns, "model", "bound by"),
    )
    measurements = []
    ratios = []
    for case in KERNELS:
        divergence, rows, vocabulary, dtype = case
        progress(*map(str, case))
        student, teacher = random_logits(rows, vocabulary, dtype=DTYPES[dtype], device="cuda")
        student.requires_grad_()
        steps = {name: step_of(name, divergence, student, teacher) for name in backends}
        seconds = interleave({n: Contender(step) for n, step in steps.items()}, rounds, "cuda")
        cells, calls = [], {}
        for name in backends:
            time, calls[name] = median(seconds[name]), seconds_in_a_row(steps[name])
            moved = (2 * reads_of(name, divergence, vocabulary) + 1) * student.nbytes
            share = moved / time / bandwidth
            cells += [f"{1e3 * time:.3f}", f"{share:.2f}", f"{1e3 * calls[name]:.3f}"]
            measurements.append(
                {"kernel": case, "backend": name, "seconds": seconds[name], "share": share,
                 "call": calls[name], "predicted": predicted[case].seconds}
            )  # fmt: skip
        if len(calls) == 2:
            ratios.append(
                (calls["cuda"] / calls["triton"], f"{divergence} {rows} x {vocabulary:,} {dtype}")
            )
        prediction = predicted[case]
        table.rows.append(
            (divergence, f"{rows} x {vocabulary:,}", dtype, *cells, f"{1e3 * prediction.seconds:.3f}", prediction.bound)
        )  # fmt: skip
    return table, measurements, verdict(ratios)


def verdict(ratios: list[tuple[float, str]]) -> str:
    """Whether backend="auto" should prefer cuda to triton on this device."""
    if not ratios:
        return "auto: triton, because one of cuda and triton does not run on this device"
    mean = math.exp(sum(math.log(ratio) for ratio, _ in ratios) / len(ratios))
    (least, best), (most, worst) = min(ratios), max(ratios)
    chosen = "cuda" if mean < 1 and most <= 1.05 else "triton"
    faster = sum(ratio < 1 for ratio, _ in ratios)
    return (
        f"auto: {chosen}. A call of cuda takes {mean:.2f} of triton's time (geometric mean of {len(ratios)} cases; "
        f"{faster} are faster), {least:.2f} at best ({best}) and {most:.2f} at worst ({worst})"
    )


def dense(arguments: argparse.Namespace, bandwidth: float) -> Measured:
    """Forward and gradient on logits, beside other packages."""
    names = [
        *(f"fastkd ({backend})" for backend in own_backends()),
        "eager",
        "torch.compile",
        "Liger",
        "TRL",
    ]
    rows = WIDE[0]
    table = Table(
        f"Forward and gradient, {rows} rows: ms (share of the copy rate if every tensor moved once), peak GiB beyond "
        "the logits",
        ("loss", "V", "logits", *names),
    )
    measurements = []
    for name, vocabulary, dtype in COMPETITION:
        progress(name, dtype, str(vocabulary))
        problem = Problem(
            Case("logits", name, rows, vocabulary, dtype, device="cuda"), published(name)
        )
        seconds, peaks, why = competition(problem, names, arguments.rounds)
        cells = []
        for key in names:
            if key not in seconds:
                cells.append(why.get(key, "-"))
                continue
            time = median(seconds[key])
            share = problem.moved() / time / bandwidth
            cells.append(f"{1e3 * time:.3g} ({share:.2f}), {peaks[key] / GIB:.2f}")
            measurements.append(
                {"loss": name, "V": vocabulary, "dtype": dtype, "contender": key,
                 "seconds": seconds[key], "share": share, "peak": peaks[key]}
            )  # fmt: skip
        table.rows.append((problem.loss.label, f"{vocabulary:,}", dtype, *cells))
        del problem
        torch.cuda.empty_cache()
    return table, measurements


def from_hidden_states(arguments: argparse.Namespace) -> Measured:
    """Losses from hidden states beside their matrix products."""
    rows, hidden, vocabulary = arguments.linear
    names = [*(f"fastkd ({backend})" for backend in own_backends()), "TRL", "Liger"]
    table = Table(
        f"From hidden states, {rows} rows, H = {hidden:,}, V = {vocabulary:,}, bfloat16: ms (times the four products), "
        "peak GiB beyond inputs and gradients",
        ("loss", "four products", *names),
    )
    measurements = []
    for divergence in ("forward_kl", "jsd"):
        progress("fused linear", divergence)
        case = Case(
            "linear", divergence, rows, vocabulary, "bfloat16", hidden=hidden, device="cuda"
        )
        problem = Problem(case)
        floor = Contender(four_products(*problem.tensors.leaves, *problem.tensors.others))
        seconds, peaks, why = competition(problem, names, arguments.rounds, products=floor)
        products = median(seconds["products"])
        cells = []
        for key in names:
            if key not in seconds:
                cells.append(why.get(key, "-"))
                continue
            time, peak = median(seconds[key]), peaks[key] - problem.written()
            cells.append(f"{1e3 * time:.4g} ({time / products:.2f}x), {peak / GIB:.2f}")
            measurements.append(
                {"loss": divergence, "linear": arguments.linear, "contender": key,
                 "seconds": seconds[key], "products": seconds["products"], "peak": peak}
            )  # fmt: skip
        table.rows.append((problem.loss.label, f"{1e3 * products:.4g}", *cells))
    return table, measurements


def sanitize() -> None:
    """A small grid of every path, for compute-sanitizer, which is slow."""
    for backend in own_backends():
        for dtype in (torch.float32, torch.bfloat16):
            for width in (9, 1001, 20_000):
                student, teacher = random_logits(3, width, dtype=dtype, device="cuda")
                student.requires_grad_()
                labels = torch.tensor([1, -100, 2], device="cuda")
                # Triton compiles each divergence anew, with the same kernel around all of them.
                few = ("forward_kl", "jsd") if backend == "triton" else fastkd.DIVERGENCES
                for make in map(fastkd.DIVERGENCES.__getitem__, few):
                    leaf = teacher.detach().requires_grad_()
                    loss = fastkd.kd_loss(
                        student, leaf, labels, divergence=make(), alpha=0.5, temperature=2.0,
                        label_smoothing=0.1, softcap=9.0, backend=backend,
                    )  # fmt: skip
                    loss.backward()
        # More rows than clusters that run at a time, so each cluster has several.
        student, teacher = random_logits(300, 20_000, dtype=torch.bfloat16, device="cuda")
        student.requires_grad_()
        # torch's own top-k on a GPU reads memory that it has not initialized, which initcheck would report.
        few = fastkd.TopK.from_logits(teacher.cpu(), 9)
        sparse_teacher = fastkd.TopK(few.ids.cuda(), few.logprobs.cuda())
        for target in (teacher, sparse_teacher):
            fastkd.kd_loss(student, target, backend=backend).backward()
    torch.cuda.synchronize()


def main() -> None:
    """The command line."""
    parser = study.command_line(__doc__, rounds=9)
    parser.add_argument(
        "--linear", nargs=3, type=int, default=(8192, 4096, 128_256), metavar=("N", "H", "V")
    )
    parser.add_argument(
        "--sanitize", action="store_true", help="run a small grid, and measure nothing"
    )
    arguments = study.parsed(parser)
    if not torch.cuda.is_available():
        parser.exit(1, "torch finds no GPU here\n")
    if arguments.sanitize:
        return sanitize()
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    folder = study.BENCH / "results" / device
    folder.mkdir(parents=True, exist_ok=True)
    arguments.json = arguments.json or folder / "gpu.json"
    arguments.markdown = arguments.markdown or folder / "README.md"
    bandwidth, products = copy_rate(arguments.rounds), product_rate(arguments.rounds)
    notes = [
        f"a copy moves {bandwidth / 1e12:.2f} TB/s, read and written",
        f"a matrix product of 8192 in bfloat16 runs at {products / 1e12:.0f} TFLOP/s",
    ]
    small = Problem(Case("logits", "forward_kl", 8, 1_000, device="cuda"), published("forward_kl"))
    names = ["eager", *(f"fastkd ({backend})" for backend in own_backends())]
    calls = {name: call for name, (_, call) in contenders(small, names).items()}
    *kernels, which = own_kernels(arguments.rounds, bandwidth)
    results = [
        kernels,
        dense(arguments, bandwidth),
        from_hidden_states(arguments),
        host_time(calls, "cuda", arguments.rounds),
    ]
    tables, measurements = zip(*results, strict=True)
    emit(arguments, tables, list(chain.from_iterable(measurements)), [*notes, which])
    print(which)


if __name__ == "__main__":
    main()
