"""Predicts how long the Triton row kernel takes on a GPU, from what its compiled code executes and moves.

    python bench/studies/model.py                  # a table for A100, H100, H200, B200 and MI300X; no GPU is needed

The time of a kernel is that of its memory traffic or of its instructions, whichever is longer, plus a cost per row:

    time = max(bytes / memory rate, instructions / issue rate) + rows / programs at a time * cycles per row / clock

- bytes: every sweep reads both logits, and the last one writes the gradient. A narrow row is read once.
- instructions: each warp executes the instructions of the sweeps' loops, which are counted in the compiled code
  (instructions.py). The kernel of a narrow row has no loops: all its instructions count, and there is no cost per row.
- programs at a time: as many as fit on all multiprocessors, given the registers and warps of a program.

Three numbers were fitted to measurements on an H200 (bench/results/nvidia-h200/): the share of the copy rate that a
sweep reaches, the share of the issue slots that are used, and the cycles of a row. Clocks and bandwidths are the
vendors'. Every GPU is assumed to copy at the same share of its bandwidth as the H200 (COPY_SHARE). AMD's instructions
are not counted. gpu.py prints measured times beside predicted ones.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import instructions
import study
import torch
from fastkd.kernels.launch import NARROW
from study import emit
from support.triton_aot import Resources
from tables import Table

import fastkd

# Fitted on an H200.
SWEEP_SHARE = 0.92  # the share of the copy rate that a sweep reaches
ISSUE_SHARE = 0.62  # the share of the issue slots that are used
ROW_CYCLES = 12_000  # the cycles of a program outside its sweeps

SCHEDULERS = 4  # per multiprocessor; each issues one instruction of one warp per cycle
REGISTERS, WARPS = 65_536, 64  # per multiprocessor
COPY_SHARE = 0.89  # the share of the published bandwidth that a copy reaches on an H200


Kernel = tuple[str, int, int, str]  # divergence, rows, V, key of instructions.DTYPES


class Gpu(NamedTuple):
    """A device."""

    target: str
    multiprocessors: int
    gigahertz: float
    copy_rate: float  # bytes per second, read and written


GPUS = {
    "A100": Gpu("sm_80", 108, 1.41, COPY_SHARE * 2.04e12),
    "H100": Gpu("sm_90", 132, 1.98, COPY_SHARE * 3.35e12),
    "H200": Gpu("sm_90", 132, 1.98, COPY_SHARE * 4.8e12),
    "B200": Gpu("sm_100", 148, 1.97, COPY_SHARE * 8.0e12),
    "MI300X": Gpu("gfx942", 304, 2.1, COPY_SHARE * 5.3e12),
}


class Prediction(NamedTuple):
    """The parts of a kernel's predicted time, in seconds."""

    memory: float
    issue: float  # 0 for AMD, whose instructions are not counted
    rows: float

    @property
    def seconds(self) -> float:
        """The time of the kernel."""
        return max(self.memory, self.issue) + self.rows

    @property
    def bound(self) -> str:
        """What takes the most time."""
        names = {"memory": self.memory, "instructions": self.issue, "rows": self.rows}
        return max(names, key=names.__getitem__)


def this_gpu(copy_rate: float) -> Gpu:
    """The current device, with the copy rate that was measured on it."""
    properties = torch.cuda.get_device_properties()
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return Gpu(target, properties.multi_processor_count, properties.clock_rate / 1e6, copy_rate)


@functools.cache
def _compiled(case: instructions.Case) -> Resources:
    return instructions.compiled(case)


def sweeps_of(divergence: str) -> int:
    """How many sweeps the kernel makes over a row."""
    return 2 if fastkd.DIVERGENCES[divergence]().closed_form is not None else 3


def reads_of(divergence: str, vocabulary: int) -> int:
    """How often the kernel reads a logit; a narrow row stays in registers."""
    return 1 if vocabulary <= NARROW else sweeps_of(divergence)


def bytes_of(divergence: str, rows: int, vocabulary: int, itemsize: int) -> int:
    """The bytes that the kernel moves: both logits as often as they are read, and the gradient."""
    return (2 * reads_of(divergence, vocabulary) + 1) * rows * vocabulary * itemsize


def predict(gpu: Gpu, divergence: str, rows: int, vocabulary: int, dtype: str) -> Prediction:
    """The time of forward and gradient of a divergence without labels, with one program per row."""
    itemsize = instructions.DTYPES[dtype].itemsize
    memory = bytes_of(divergence, rows, vocabulary, itemsize) / (SWEEP_SHARE * gpu.copy_rate)
    cycle = 1e-9 / gpu.gigahertz
    if not gpu.target.startswith("sm_"):
        return Prediction(memory, 0, 0)
    case = instructions.Case(gpu.target, divergence, "distillation", dtype, vocabulary)
    need = _compiled(case)
    row_cycles = ROW_CYCLES
    if vocabulary <= NARROW:  # without loops, every instruction counts, also those of rare branches
        executed, row_cycles = need.warps * need.instructions, 0
    else:
        sweeps = need.sweeps(sweeps_of(divergence) == 3)
        a_column = sum(sweep.path for sweep in sweeps) / need.columns_per_thread
        executed = vocabulary / 32 * a_column
    slots = SCHEDULERS * gpu.multiprocessors * ISSUE_SHARE
    issue = rows * executed / slots * cycle
    registers = -(-need.registers // 8) * 8 * 32 * need.warps
    programs = min(REGISTERS // registers, WARPS // need.warps, 32) * gpu.multiprocessors
    return Prediction(memory, issue, rows / programs * row_cycles * cycle)


def _predicted(arguments: tuple[Gpu, Kernel]) -> Prediction:
    return predict(arguments[0], *arguments[1])


def predictions(gpu: Gpu, cases: Sequence[Kernel]) -> dict[Kernel, Prediction]:
    """The prediction of every case; several processes compile the kernels."""
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), get_context("spawn")) as pool:
        found = pool.map(_predicted, [(gpu, case) for case in cases])
        return dict(zip(cases, found, strict=True))


# The cases of the table.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
SIZES = ((4096, 128_256), (4096, 32_768))


def table_of(gpus: dict[str, Gpu]) -> Table:
    """Predicted milliseconds, and what bounds the kernel."""
    table = Table(
        "A model, not a measurement: forward and gradient in ms (M: bound by memory, I: by instructions, R: by rows)",
        ("divergence", "rows x V", "logits", *gpus),
    )
    cases = [
        (name, *size, dtype) for name in DIVERGENCES for size in SIZES for dtype in ("bf16", "fp32")
    ]
    by_gpu = [predictions(gpu, cases) for gpu in gpus.values()]
    for case in cases:
        divergence, rows, vocabulary, dtype = case
        cells = [
            f"{1e3 * found[case].seconds:.3g} {found[case].bound[0].upper()}" for found in by_gpu
        ]
        table.rows.append((divergence, f"{rows} x {vocabulary:,}", dtype, *cells))
    return table


def main() -> None:
    """The command line."""
    arguments = study.parsed(study.command_line(__doc__))
    emit(arguments, [table_of(GPUS)])


if __name__ == "__main__":
    main()
