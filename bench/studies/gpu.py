"""Losses on a GPU: time, share of the bandwidth that a copy reaches, memory; from hidden states; and the host's time.

    python bench/studies/gpu.py

- The floor of a loss with its gradient is 3 b: both logits read and one gradient written. `of copy` is that many bytes
  over the time, over what `out.copy_(x)` moves in the same run. A loss that needs fewer bytes does not exist.
- A contender is compared with float64 on a few rows before it is timed, and left out, by name, where it is wrong.
- Contenders take turns within a round, as in bench/studies/loss.py; a time is a median.
- Peaks are torch's own count, beyond the inputs.

Results go to bench/results/<device>/ as JSON and Markdown. `--sanitize` runs a small grid and measures nothing.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

import linear
import study
import torch
from contenders import LOSSES, Loss, Rows, eager_rows, fastkd_loss, mean_of
from host import host_time
from measure import Contender, four_products, interleave, nothing, peak_extra
from peers import fastkd_linear, liger_chunked, trl_chunked
from report import Table, add_arguments, emit, progress
from torch import Tensor

import fastkd
from fastkd.backends import registry

ROWS = 4096
VOCABULARIES = (32_768, 128_256, 151_936, 262_144)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DIVERGENCES = ("forward_kl", "jsd", "reverse_kl")
WRONG = 0.05  # relative error of the gradient from which a contender is wrong and not just rounded


def own_backends() -> list[str]:
    """fastkd's that run on this device."""
    call = registry.Call("cuda", torch.float32, torch.float32, fastkd.forward_kl())
    available = registry.available_backends()
    return [name for name in ("cuda", "triton") if registry.obstacle(name, call, available) is None]


def liger(name: str, loss: Loss) -> Rows | None:
    """Liger's loss of that name on logits; None where it has none."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss

    t = loss.temperature
    if name == "forward_kl":
        divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    elif name in ("jsd", "reverse_kl"):
        divergence = LigerJSD(beta={"jsd": 0.5, "reverse_kl": 1.0}[name])
    else:
        return None

    def mean(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = ((x.float() / t).log_softmax(-1) for x in (student, teacher))
        return t * t * divergence(log_q, log_p)

    return mean


def dense_contenders(name: str) -> dict[str, Rows]:
    """Everything that can be compared on logits."""
    torch.compiler.reset()
    loss = LOSSES[name]
    eager = mean_of(eager_rows(loss, torch.float32))
    found = {f"fastkd {backend}": fastkd_loss(loss, backend=backend) for backend in own_backends()}
    found |= {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    try:
        theirs = liger(name, loss)
    except ImportError:
        progress("liger_kernel is not installed")
    else:
        if theirs is not None:
            found["Liger"] = theirs
    return found


def logits(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normal, of standard deviation 3; the student requires grad."""
    torch.manual_seed(0)
    student, teacher = (
        torch.randn(rows, vocabulary, device="cuda", dtype=dtype).mul_(3) for _ in range(2)
    )
    return student.requires_grad_(), teacher


def step(loss: Rows, student: Tensor, teacher: Tensor) -> None:
    """Forward and backward."""
    student.grad = None
    loss(student, teacher).backward()


def wrong(name: str, loss: Rows, dtype: torch.dtype) -> str | None:
    """What is wrong with a contender, on a few rows against float64."""
    student, teacher = logits(64, 5_000, dtype)
    try:
        step(loss, student, teacher)
    except (
        Exception
    ) as error:  # whatever another package raises on this machine is a cell of the table
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:60]}"
    exact = student.detach().double().requires_grad_()
    step(mean_of(eager_rows(LOSSES[name], torch.float64)), exact, teacher.double())
    assert student.grad is not None and exact.grad is not None
    error = float((student.grad.double() - exact.grad).norm() / exact.grad.norm())
    return None if error < WRONG else f"gradient {error:.2g} from float64"


def timed(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds, by contender and round."""

    def whole(run: Callable[[], None]) -> Callable[[], None]:
        def waited() -> None:
            run()
            torch.cuda.synchronize()

        return waited

    return interleave({name: Contender(whole(run), nothing) for name, run in runs.items()}, rounds)


def copy_rate(rounds: int) -> float:
    """Bytes a second, read and written."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    out = torch.empty_like(source)
    seconds = timed({"copy": lambda: out.copy_(source)}, rounds)["copy"]
    return 2 * source.nbytes / median(seconds)


def product_rate(rounds: int) -> float:
    """Floating-point operations a second of a large matrix product in bfloat16."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = timed({"product": lambda: torch.mm(a, a)}, rounds)["product"]
    return 2 * 8192**3 / median(seconds)


def dense(arguments: argparse.Namespace, bandwidth: float) -> tuple[Table, list[dict[str, Any]]]:
    """Forward and gradient on logits."""
    table = Table(
        f"Forward and gradient, {ROWS} rows: ms (share of the copy bandwidth at 3 b), peak GiB beyond the logits",
        ("loss", "V", "logits", *arguments.contenders),
    )
    measurements = []
    for name in DIVERGENCES:
        losses = dense_contenders(name)
        for dtype_name, dtype in DTYPES.items():
            verdicts = {key: wrong(name, loss, dtype) for key, loss in losses.items()}
            failed = [f"{key}: {why}" for key, why in verdicts.items() if why and "fastkd" in key]
            assert not failed, failed
            for vocabulary in arguments.vocabularies:
                progress(name, dtype_name, str(vocabulary))
                student, teacher = logits(ROWS, vocabulary, dtype)
                runs, peaks, notes = {}, {}, {}
                for key, loss in losses.items():
                    if verdicts[key]:
                        notes[key] = verdicts[key]
                        continue
                    run = partial(step, loss, student, teacher)
                    try:
                        run()
                        peaks[key] = peak_extra(run, "cuda")
                        runs[key] = run
                    except torch.OutOfMemoryError:
                        notes[key] = "out of memory"
                    student.grad = None
                    torch.cuda.empty_cache()
                seconds = timed(runs, arguments.rounds)
                moved = 3 * ROWS * vocabulary * dtype.itemsize
                cells = []
                for key in arguments.contenders:
                    if key not in seconds:
                        cells.append(notes.get(key, "-"))
                        continue
                    time = median(seconds[key])
                    share = moved / time / bandwidth
                    cells.append(f"{1e3 * time:.3g} ({share:.2f}), {peaks[key] / 2**30:.2f}")
                    measurements.append(
                        {"loss": name, "V": vocabulary, "dtype": dtype_name, "contender": key,
                         "seconds": seconds[key], "share": share, "peak": peaks[key]}
                    )  # fmt: skip
                table.rows.append((LOSSES[name].label, f"{vocabulary:,}", dtype_name, *cells))
                del student, teacher
                torch.cuda.empty_cache()
    return table, measurements


def from_hidden_states(arguments: argparse.Namespace) -> tuple[Table, list[dict[str, Any]]]:
    """Fused linear beside its matrix products."""
    rows, hidden, vocabulary = arguments.linear
    table = Table(
        f"From hidden states, {rows} rows, H = {hidden:,}, V = {vocabulary:,}, bfloat16: ms (times the four products), "
        "peak GiB beyond inputs and gradients",
        ("loss", "four products", *(name := [f"fastkd {b}" for b in own_backends()]), "TRL", "Liger"),
    )  # fmt: skip
    columns, measurements = [*name, "TRL", "Liger"], []
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    states = [normal(rows, hidden) for _ in range(2)]
    heads = [normal(vocabulary, hidden).mul_(3 / hidden**0.5) for _ in range(2)]
    inputs = linear.Inputs(
        states[0].requires_grad_(), heads[0].requires_grad_(), states[1], heads[1]
    )
    gradients = states[0].nbytes + heads[0].nbytes
    for divergence in ("forward_kl", "jsd"):
        progress("fused linear", divergence)
        losses = {
            f"fastkd {backend}": fastkd_linear(LOSSES[divergence].divergence, backend=backend)
            for backend in own_backends()
        }
        for key, make in (("TRL", trl_chunked), ("Liger", liger_chunked)):
            try:
                losses[key] = make(divergence)
            except ImportError:
                progress(f"{key} is not installed")
        runs: dict[str, Callable[[], None]] = {"four products": four_products(*inputs)}
        peaks, cells = {}, []
        for key, loss in losses.items():
            run = partial(linear.step, loss, inputs)
            try:
                run()
                inputs.student.grad = inputs.weight.grad = None
                peaks[key] = peak_extra(run, "cuda") - gradients
                runs[key] = run
            except torch.OutOfMemoryError:
                progress(f"{key} is out of memory")
            inputs.student.grad = inputs.weight.grad = None
            torch.cuda.empty_cache()
        seconds = timed(runs, arguments.rounds)
        products = median(seconds["four products"])
        for key in columns:
            if key not in seconds:
                cells.append("-")
                continue
            time = median(seconds[key])
            cells.append(f"{1e3 * time:.4g} ({time / products:.2f}x), {peaks[key] / 2**30:.2f}")
            measurements.append(
                {"loss": divergence, "linear": arguments.linear, "contender": key,
                 "seconds": seconds[key], "products": seconds["four products"], "peak": peaks[key]}
            )  # fmt: skip
        table.rows.append((LOSSES[divergence].label, f"{1e3 * products:.4g}", *cells))
    return table, measurements


def sanitize() -> None:
    """A small grid of every path, for compute-sanitizer, which is slow."""
    for backend in own_backends():
        for dtype in (torch.float32, torch.bfloat16):
            for width in (9, 1001, 20_000):
                student, teacher = logits(3, width, dtype)
                labels = torch.tensor([1, -100, 2], device="cuda")
                # Triton compiles each anew, and writes the same kernel around all of them.
                few = ("forward_kl", "jsd") if backend == "triton" else fastkd.DIVERGENCES
                for make in map(fastkd.DIVERGENCES.__getitem__, few):
                    leaf = teacher.detach().requires_grad_()
                    loss = fastkd.kd_loss(
                        student, leaf, labels, divergence=make(), alpha=0.5, temperature=2.0,
                        label_smoothing=0.1, softcap=9.0, backend=backend,
                    )  # fmt: skip
                    loss.backward()
        # More rows than there are clusters at a time: each has several, one after the other.
        student, teacher = logits(300, 20_000, torch.bfloat16)
        for target in (teacher, fastkd.TopK.from_logits(teacher, 9)):
            fastkd.kd_loss(student, target, backend=backend).backward()
    torch.cuda.synchronize()


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabularies", nargs="+", type=int, default=VOCABULARIES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--linear", nargs=3, type=int, default=(8192, 4096, 128_256), metavar=("N", "H", "V")
    )
    parser.add_argument(
        "--sanitize", action="store_true", help="run a small grid, and measure nothing"
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "torch finds no GPU here\n")
    if arguments.sanitize:
        return sanitize()
    arguments.contenders = [
        *(f"fastkd {backend}" for backend in own_backends()), "eager", "torch.compile", "Liger",
    ]  # fmt: skip
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
    loss = LOSSES["forward_kl"]
    calls = {"eager": mean_of(eager_rows(loss, torch.float32))}
    calls |= {f"fastkd {backend}": fastkd_loss(loss, backend=backend) for backend in own_backends()}
    found = [
        dense(arguments, bandwidth),
        from_hidden_states(arguments),
        host_time(calls, "cuda", arguments.rounds),
    ]
    tables, measurements = zip(*found, strict=True)
    emit(arguments, tables, list(chain.from_iterable(measurements)), notes)


if __name__ == "__main__":
    main()
