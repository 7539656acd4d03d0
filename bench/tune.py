"""Tiles of the Triton kernel: which candidates keep to registers, and which is the fastest; writes kernels/tuning.py.

    python bench/tune.py                     on a GPU: times what does not spill, and writes this GPU's entries
    python bench/tune.py --compile sm_90     anywhere: compiles for that architecture, and writes nothing

A candidate is a tile for every divergence of its kind, so one that spills for any of KINDS is out. Gradients go to a
tensor of their own: in place, a second run would have another input.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path
from statistics import median

import torch
from gpu import logits, timed
from report import Table, add_arguments, emit, progress

import fastkd
from fastkd.call.contract import Options, Rows, Want
from fastkd.kernels import launch as kernels
from fastkd.kernels import tuning

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support.triton_aot import Caught, Resources, catch, resources  # noqa: E402 (beside the tests)

# One of 32 warps has its multiprocessor to itself: half the row pairs in flight, of which L2 keeps more. 16384 columns
# spill 72 to 192 bytes with 32 warps, on sm_90 in every one of KINDS.
CANDIDATES = ((2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32))
# By whether there is a closed form; the first is timed, the other has the most to keep.
KINDS = {True: ("forward_kl", "mixture"), False: ("jsd", "alpha_beta")}
DTYPES = (torch.bfloat16, torch.float32)
WIDTHS = tuple(2**power for power in range(12, 19))
BYTES = 1 << 30  # of one side

Key = tuple[str, int, bool, int]


def loss(student: torch.Tensor, teacher: torch.Tensor, divergence: str) -> None:
    """One call as Hinton's: labels, a temperature, the student's gradient."""
    labels = torch.zeros(student.shape[0], dtype=torch.int64, device=student.device)
    options = Options(fastkd.DIVERGENCES[divergence](), 0.5, 2.0, 2.0, vocab_size=student.shape[-1])
    kernels.kd_rows(student, teacher, Rows(labels), options, Want(True))


def compiled(
    candidate: tuple[int, int], divergence: str, dtype: torch.dtype, target: str
) -> Resources:
    """What the kernel needs with that tile."""
    kernels.tile = lambda *row: candidate
    catch(kernels.kd_kernel, "row")
    try:
        loss(*(torch.empty(2, WIDTHS[-1], dtype=dtype) for _ in range(2)), divergence)
    except Caught as launch:
        return resources(*launch.args, target)
    finally:
        del kernels.kd_kernel.run
    raise AssertionError("nothing was launched")


def keeps_to_registers(
    target: str,
) -> tuple[Table, dict[tuple[torch.dtype, bool], list[tuple[int, int]]]]:
    """(what each candidate needs, those that do not spill)."""
    table = Table(
        f"Registers a thread on {target} (bytes of local memory where there are any)",
        ("divergence", "logits", *(f"{block}/{warps}" for block, warps in CANDIDATES)),
    )
    kept = {}
    for dtype, (closed_form, divergences) in itertools.product(DTYPES, KINDS.items()):
        fit = set(CANDIDATES)
        for divergence in divergences:
            progress(target, divergence, str(dtype))
            cells = []
            for candidate in CANDIDATES:
                need = compiled(candidate, divergence, dtype, target)
                cells.append(str(need.registers))
                if need.local_bytes:
                    cells[-1] += f" ({need.local_bytes})"
                if need.spills:
                    fit.discard(candidate)
            table.rows.append((divergence, str(dtype).removeprefix("torch."), *cells))
        kept[dtype, closed_form] = [candidate for candidate in CANDIDATES if candidate in fit]
    return table, kept


def fastest(
    architecture: str,
    kept: dict[tuple[torch.dtype, bool], list[tuple[int, int]]],
    rounds: int,
) -> tuple[Table, dict[Key, tuple[int, int]]]:
    """(milliseconds, the entries of this GPU). The rule's own tile is a candidate too."""
    table = Table(
        "Milliseconds; * is the fastest",
        ("divergence", "logits", "V", "rule", *(f"{block}/{warps}" for block, warps in CANDIDATES)),
    )
    rule, found = kernels.tile, {}
    kernels.plan = lambda *call: None  # rows of one program are what is tuned
    for (dtype, closed_form), candidates in kept.items():
        for width in WIDTHS:
            divergence = KINDS[closed_form][0]
            progress(divergence, str(dtype), str(width))
            student, teacher = logits(BYTES // (width * dtype.itemsize), width, dtype)
            run = partial(loss, student.detach(), teacher, divergence)

            def with_tile(chosen: tuple[int, int], run: partial[None] = run) -> None:
                kernels.tile = lambda *row: chosen
                run()

            tiles = {"rule": rule(width, dtype.itemsize)}
            tiles |= {f"{block}/{warps}": (block, warps) for block, warps in candidates}
            seconds = timed(
                {name: partial(with_tile, chosen) for name, chosen in tiles.items()}, rounds
            )
            times = {name: median(values) for name, values in seconds.items()}
            best = min(times, key=times.__getitem__)
            found[architecture, dtype.itemsize, closed_form, width] = tiles[best]
            cells = [
                f"{1e3 * times[name]:.3g}{'*' * (name == best)}" if name in times else "spills"
                for name in table.columns[3:]
            ]
            table.rows.append((divergence, str(dtype).removeprefix("torch."), f"{width:,}", *cells))
            del student, teacher
    return table, found


def write(architecture: str, found: dict[Key, tuple[int, int]]) -> None:
    """Put this architecture's entries in the place of those it has."""
    path = ROOT / "kernels" / "tuning.py"
    before, declaration, _ = path.read_text().partition("TILES: ")
    before = before.replace("\nNo entry has been timed yet, so every tile comes from the rule in `launch.tile`.\n",
                            "\nA tile without an entry comes from the rule in `launch.tile`.\n")  # fmt: skip
    entries = {key: value for key, value in tuning.TILES.items() if key[0] != architecture} | found
    lines = [f"    {key}: {value},\n" for key, value in sorted(entries.items())]
    text = "dict[tuple[str, int, bool, int], tuple[int, int]] = {\n" + "".join(lines) + "}\n"
    path.write_text(before + declaration + text.replace("'", '"'))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", metavar="ARCHITECTURE", help="sm_80, sm_90, gfx942, ...")
    parser.add_argument("--rounds", type=int, default=15)
    add_arguments(parser)
    arguments = parser.parse_args()
    device = kernels.device_of(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    architecture = arguments.compile or (device.architecture if device else None)
    if architecture is None:
        parser.exit(1, "torch finds no GPU here; --compile ARCHITECTURE needs none\n")
    number = architecture.removeprefix("sm_")
    table, kept = keeps_to_registers(
        f"cuda:{number}" if number.isdigit() else f"hip:{architecture}"
    )
    tables = [table]
    if not arguments.compile:
        times, found = fastest(architecture, kept, arguments.rounds)
        tables.append(times)
        write(architecture, found)
    emit(arguments, tables, [])


if __name__ == "__main__":
    main()
