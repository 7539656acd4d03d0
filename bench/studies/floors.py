"""How far the CPU kernels are from the exponentials and logarithms that a loss needs.

    python bench/studies/floors.py                          # after `make build`; needs valgrind, and g++ or $CXX
    python bench/studies/floors.py --no-count               # only times
    python bench/studies/floors.py --divergences tvd jsd --dtypes float32

The floor of a divergence is a loop that, for each column, loads both logits, computes the functions of FUNCTIONS and
stores one value. It takes them from csrc/cpu/vec.h, so they are as exact as the kernel's. It has neither a maximum nor
sums, and does not keep the exponentials between two sweeps, so no kernel reaches it: the ratio says how much of the
kernel is not exponentials and logarithms.

- Instructions per 8 columns, one AVX2 vector: callgrind counts them in the loss and the student's gradient of some rows
  of 49,152 columns. Valgrind does not know AVX-512.
- Times with the best instruction set, one thread, in turns; only the time of the processor counts. The ratio is the
  median over the rounds.

"of two exponentials" divides by the floor of forward KL instead. bench/studies/loss.py has a third, larger floor: the
forward pass of forward KL.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import study
from study import ROOT, emit, progress
from tables import Table

import fastkd
from fastkd import _C

# Exponentials, logarithms and divisions per column. All need the two exponentials of the softmax functions; the ratio
# log p - log q is a difference of logits.
FUNCTIONS = {
    "forward_kl": (2, 0, 0),
    "reverse_kl": (2, 0, 0),
    "mixture": (2, 0, 0),
    "jsd": (3, 1, 0),  # the logarithm of 1 + c (exp(-|log p - log q|) - 1)
    "skew_forward_kl": (3, 1, 1),  # as for jsd, and p q / m
    "skew_reverse_kl": (3, 1, 1),
    "tvd": (2, 0, 0),
    "alpha_beta": (5, 0, 0),  # a power of the larger probability, and two of the ratio
}
COLUMNS = 49_152  # as in floors.cpp
STREAM_BYTES = 4 << 20  # a gradient of this size is written past the cache
FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512", "-mfma", "-mf16c",
    ],
}  # fmt: skip


def compiled(folder: Path, instructions: str) -> Path:
    """Compile floors.cpp and link it with the object file of the kernels."""
    objects = sorted(ROOT.glob(f"build/native-*/rows_{instructions}.o"), key=os.path.getmtime)
    if not objects:
        sys.exit(f"build/native-*/rows_{instructions}.o does not exist: run `make build` first")
    flags = list(FLAGS[instructions])
    if instructions == "avx512" and "avx512_bf16" in Path("/proc/cpuinfo").read_text():
        flags.append("-mavx512bf16")  # which the kernels choose at run time
    program = folder / instructions
    subprocess.run(
        [
            *shlex.split(os.environ.get("CXX", "g++")), "-O3", "-DNDEBUG", "-std=c++17", "-fopenmp",
            "-fno-math-errno", "-fno-trapping-math", "-w", f"-I{ROOT / 'csrc'}",
            f"-DFASTKD_ISA={instructions}", *flags,
            str(Path(__file__).with_suffix(".cpp")), str(objects[-1]), "-o", str(program),
        ],
        check=True,
    )  # fmt: skip
    return program


def case(name: str, dtype: str) -> list[str]:
    """The words of CASE in floors.cpp."""
    divergence = fastkd.DIVERGENCES[name]()
    form = divergence.closed_form or fastkd.divergences.ClosedForm()
    numbers = [
        *FUNCTIONS[name], int(divergence.closed_form is not None),
        form.forward, form.reverse, form.cross, *divergence.params,
    ]  # fmt: skip
    return [dtype, divergence.function.__name__.lstrip("_"), *map(str, numbers)]


def instructions_of(program: Path, what: str, words: list[str]) -> float:
    """Instructions per 8 columns; what is "kernel" or "floor"."""
    itemsize = 4 if words[0] == "float32" else 2
    rows = STREAM_BYTES // (COLUMNS * itemsize) + 1 if what == "kernel" else 2
    function = "fastkd::avx2::kd_rows(fastkd::Call const&)" if what == "kernel" else "*run_floor*"
    done = subprocess.run(
        [
            "valgrind", "--tool=callgrind", "--collect-atstart=no", f"--toggle-collect={function}",
            "--callgrind-out-file=/dev/null", str(program), what, str(rows), *words,
        ],
        check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = re.search(r"Collected : (\d+)", done.stderr)
    if not found or found[1] == "0":
        raise RuntimeError(f"callgrind counted nothing in {function}: {done.stderr}")
    return int(found[1]) / (rows * COLUMNS) * 8


def seconds_of(program: Path, rounds: int, words: list[str]) -> list[tuple[float, float]]:
    """The seconds of the kernel and of the floor, by round."""
    done = subprocess.run(
        [str(program), "time", str(rounds), *words], check=True, capture_output=True, text=True
    )
    return [
        (float(kernel), float(floor)) for kernel, floor in map(str.split, done.stdout.splitlines())
    ]


def main() -> None:
    """The command line."""
    parser = study.command_line(
        __doc__, rounds=300, dtypes=("float32", "bfloat16"), divergences=[*FUNCTIONS]
    )
    parser.add_argument("--no-count", action="store_true", help="measure times only")
    arguments = study.parsed(parser)
    best = _C.instruction_sets()[0]
    if best not in FLAGS:
        sys.exit(f"needs a processor with AVX2 or AVX-512; the best of this one is {best}")
    if not arguments.no_count and shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed: install it, or give --no-count")
    table = Table(
        f"Instructions per 8 columns (AVX2), and time ({best}), as multiples of the floor",
        ["divergence", "logits", "exp, log, div", "kernel", "floor", "kernel / floor",
         "of two exponentials", "time / floor"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        programs = {name: compiled(Path(folder), name) for name in {"avx2", best}}
        for dtype in arguments.dtypes:
            counted = programs["avx2"]
            two = 0.0
            if not arguments.no_count:
                two = instructions_of(counted, "floor", case("forward_kl", dtype))
            for name in arguments.divergences:
                progress(name, dtype)
                words = case(name, dtype)
                counts = ["-"] * 4
                if not arguments.no_count:
                    kernel, floor = (
                        instructions_of(counted, what, words) for what in ("kernel", "floor")
                    )
                    counts = [
                        f"{kernel:.0f}", f"{floor:.0f}", f"{kernel / floor:.2f}x", f"{kernel / two:.2f}x",
                    ]  # fmt: skip
                times = seconds_of(programs[best], arguments.rounds, words)
                share = median(kernel / floor for kernel, floor in times)
                functions = " ".join(map(str, FUNCTIONS[name]))
                table.rows.append([name, dtype, functions, *counts, f"{share:.2f}x"])
    emit(arguments, [table])


if __name__ == "__main__":
    main()
