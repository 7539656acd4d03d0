"""Counts what the loops of the GPU kernels execute for each column; no GPU is needed.

    python bench/studies/instructions.py                                  # the Triton kernel, compiled for sm_90
    python bench/studies/instructions.py --targets sm_80 sm_100 --divergences jsd
    python bench/studies/instructions.py --binary fastkd/_cuda*.so        # kernels that are compiled already
    cuobjdump -sass kernel.cubin | python bench/studies/instructions.py --sass -

By a model of an H200 (132 multiprocessors, four instructions for 32 threads in each cycle of 1.97 GHz, 4.3 TB/s), it
issues about 46 instructions while its memory moves the 6 bytes of a column (two logits and a gradient in bfloat16), and
77 for the 10 bytes of two sweeps. A kernel with fewer instructions a column is bound by memory.

"path" is the number of instructions of a loop's shortest iteration, and "all" also counts the branches beside it
(tests/support/sass.py). BAR and SHFL are counted in the whole loop, and LDG, STG and MUFU on the path; with --binary or
--sass, all of them in the whole loop.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import study
import torch
from study import emit
from support import sass
from support.triton_aot import Caught, Resources, catch, resources
from tables import Table

import fastkd
from fastkd.call.contract import Options, Rows, Want
from fastkd.kernels import launch as kernels
from fastkd.kernels import split

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Rows of 128,256 columns start at multiples of 16 bytes; rows of 50,257 columns do not.
WIDTHS = (128_256, 50_257)
# The keyword arguments of Options, whether there are labels, and what is computed.
KINDS = {
    "distillation": ({}, False, Want(True)),
    "with labels": ({"alpha": 0.5}, True, Want(True)),
    "with labels, T = 2": (
        {"alpha": 0.5, "temperature": 2.0, "teacher_temperature": 2.0},
        True,
        Want(True),
    ),
    "with parts": ({"alpha": 0.5}, True, Want(True, parts=True)),
    "with measures": ({"alpha": 0.5}, True, Want(True, parts=True, measures=True)),
}


class Case(NamedTuple):
    """One specialization of the row kernel."""

    target: str  # "sm_90"
    divergence: str
    kind: str
    dtype: str
    width: int


def compiled(case: Case) -> Resources:
    """What the row kernel of a case needs, with one program per row and the student's gradient."""
    torch.set_num_threads(1)
    options, with_labels, want = KINDS[case.kind]
    student, teacher = (torch.empty(2, case.width, dtype=DTYPES[case.dtype]) for _ in range(2))
    rows = Rows(torch.zeros(2, dtype=torch.int64)) if with_labels else Rows()
    kernels.device_of = lambda device: split.Device(case.target, 1, 1, True)
    kernels.plan = lambda *call: None
    catch(kernels.kd_kernel, "row")
    try:
        divergence = fastkd.DIVERGENCES[case.divergence]()
        kernels.kd_rows(
            student,
            teacher,
            rows,
            Options(divergence, vocab_size=case.width, **options),
            want,
        )
    except Caught as launch:
        return resources(*launch.args, f"cuda:{case.target.removeprefix('sm_')}")
    raise AssertionError("nothing was launched")


def of_triton(cases: list[Case]) -> Table:
    """A row for each case, with the instructions a column of each of its sweeps."""
    table = Table(
        "Instructions a column of the Triton kernel, by sweep (statistics, sums, gradient)",
        ("divergence", "loss", "logits", "V", "target", "sum", "path", "all", "BAR", "SHFL",
         "LDG", "STG", "MUFU", "registers", "local bytes"),
    )  # fmt: skip
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for case, used in zip(cases, pool.map(compiled, cases), strict=True):
            with_sums = fastkd.DIVERGENCES[case.divergence]().closed_form is None
            sweeps = used.sweeps(with_sums)
            columns = used.columns_per_thread
            cells = [" ".join(f"{sweep.path / columns:.1f}" for sweep in sweeps)]
            cells.append(" ".join(f"{sweep.all / columns:.1f}" for sweep in sweeps))
            for name in ("barriers", "shuffles", "loads", "stores", "mufu"):
                cells.append(" ".join(str(getattr(sweep, name)) for sweep in sweeps))
            total = sum(sweep.path for sweep in sweeps) / columns
            table.rows.append(
                (
                    case.divergence, case.kind, case.dtype, f"{case.width:,}", case.target,
                    f"{total:.1f}", *cells, str(used.registers), str(used.local_bytes),
                )
            )  # fmt: skip
    return table


def of_sass(text: str, kernel: str, columns: int) -> Table:
    """A row for each loop of the kernels whose name matches; a thread processes `columns` per iteration."""
    opcodes = ("BAR", "SHFL", "LDG", "STG", "LDS", "STS", "LDL", "STL", "MUFU")
    table = Table(
        f"Loops; a column is 1/{columns} of an iteration",
        ("kernel", "target", "address", "depth", "path", "all", "path/column", *opcodes),
    )
    for function in sass.functions(text):
        if not re.search(kernel, function.name):
            continue
        for loop in sass.loops(function.code):
            path, counts = loop.executed(), [str(loop.present(opcode)) for opcode in opcodes]
            table.rows.append(
                (
                    function.name, function.target, f"{loop.body[0].address:#x}", str(loop.depth),
                    str(path), str(loop.present()), f"{path / columns:.1f}", *counts,
                )
            )  # fmt: skip
    return table


def main() -> None:
    """The command line."""
    parser = study.command_line(
        __doc__,
        dtypes=tuple(DTYPES),
        divergences=("forward_kl", "reverse_kl", "mixture", "jsd"),
        choices=fastkd.DIVERGENCES,
    )
    parser.add_argument("--targets", nargs="+", default=["sm_90"], metavar="sm_NN")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, metavar="V")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS)[1:2])
    parser.add_argument("--binary", type=Path, help="a cubin, or a library that contains some")
    parser.add_argument(
        "--sass", type=argparse.FileType(), help="the output of cuobjdump -sass; - is stdin"
    )
    parser.add_argument("--kernel", default="", metavar="REGEX", help="of the names in it")
    parser.add_argument(
        "--columns", type=int, default=8, help="columns of an iteration per thread, with --binary"
    )
    arguments = study.parsed(parser)
    if arguments.binary or arguments.sass:
        text = sass.disassemble(arguments.binary) if arguments.binary else arguments.sass.read()
        table = of_sass(text, arguments.kernel, arguments.columns)
    else:
        names = arguments.divergences, arguments.kinds, arguments.dtypes, arguments.widths
        grid = itertools.product(arguments.targets, *names)
        table = of_triton([Case(*case) for case in grid])
    emit(arguments, [table])


if __name__ == "__main__":
    sys.exit(main())
