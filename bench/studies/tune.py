"""Finds the fastest tiles of the Triton kernel that do not spill registers, and writes them to kernels/tuning.py.

    python bench/studies/tune.py                     on a GPU: times the candidates, and writes this GPU's entries
    python bench/studies/tune.py --compile sm_90     anywhere: compiles for that architecture, and writes nothing

A tile serves every divergence of its kind, so a candidate that spills for one of KINDS is out. Gradients go to a tensor
of their own, because a run in place would change the input of the next.
"""

from __future__ import annotations

import itertools
import re
from functools import partial
from statistics import median

import study
import torch
from cases import random_logits
from measure import Contender, interleave
from study import ROOT, emit, progress
from support.triton_aot import Caught, Resources, catch, resources
from tables import Table

import fastkd
from fastkd.call.contract import Options, Rows, Want
from fastkd.kernels import launch as kernels
from fastkd.kernels import tuning

# A program of 32 warps has a multiprocessor to itself: half as many row pairs are in flight, so L2 keeps more of them.
# 16384 columns are no candidate: with 32 warps they spill 72 to 192 bytes on sm_90, for all of KINDS.
CANDIDATES = ((2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32))
# By whether there is a closed form. The first divergence is timed; the second needs the most registers.
KINDS = {True: ("forward_kl", "reverse_kl"), False: ("jsd", "alpha_beta")}
DTYPES = (torch.bfloat16, torch.float32)
WIDTHS = tuple(2**power for power in range(12, 19))
BYTES = 1 << 30  # of the student's logits, and of the teacher's

Key = tuple[str, int, bool, int]
Tile = tuple[int, int]
Kept = dict[tuple[torch.dtype, bool], list[Tile]]


def loss(student: torch.Tensor, teacher: torch.Tensor, divergence: str) -> None:
    """Hinton's loss: labels, a temperature, the student's gradient."""
    labels = torch.zeros(student.shape[0], dtype=torch.int64, device=student.device)
    options = Options(fastkd.DIVERGENCES[divergence](), 0.5, 2.0, 2.0, vocab_size=student.shape[-1])
    kernels.kd_rows(student, teacher, Rows(labels), options, Want(True))


def compiled(candidate: Tile, divergence: str, dtype: torch.dtype, target: str) -> Resources:
    """The registers and memory that the kernel needs with that tile."""
    kernels.tile = lambda *row: candidate
    catch(kernels.kd_kernel, "row")
    try:
        loss(*(torch.empty(2, WIDTHS[-1], dtype=dtype) for _ in range(2)), divergence)
    except Caught as launch:
        return resources(*launch.args, target)
    finally:
        del kernels.kd_kernel.run
    raise AssertionError("nothing was launched")


def keeps_to_registers(target: str) -> tuple[Table, Kept]:
    """(a table of what each candidate needs, the candidates that do not spill)."""
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


def fastest(architecture: str, kept: Kept, rounds: int) -> tuple[Table, dict[Key, Tile]]:
    """(a table of milliseconds, the entries of this GPU). The rule's own tile is a candidate too."""
    table = Table(
        "Milliseconds; * is the fastest",
        ("divergence", "logits", "V", "rule", *(f"{block}/{warps}" for block, warps in CANDIDATES)),
    )
    rule, entries = kernels.tile, {}
    kernels.plan = lambda *call: None  # one program per row, which is what these tiles are for
    for (dtype, closed_form), candidates in kept.items():
        for width in WIDTHS:
            divergence = KINDS[closed_form][0]
            progress(divergence, str(dtype), str(width))
            rows = BYTES // (width * dtype.itemsize)
            student, teacher = random_logits(rows, width, dtype=dtype, device="cuda")
            run = partial(loss, student, teacher, divergence)

            def with_tile(chosen: Tile, run: partial[None] = run) -> None:
                kernels.tile = lambda *row: chosen
                run()

            tiles = {"rule": rule(width, dtype.itemsize)}
            tiles |= {f"{block}/{warps}": (block, warps) for block, warps in candidates}
            runs = {name: Contender(partial(with_tile, each)) for name, each in tiles.items()}
            seconds = interleave(runs, rounds, "cuda")
            times = {name: median(values) for name, values in seconds.items()}
            best = min(times, key=times.__getitem__)
            entries[architecture, dtype.itemsize, closed_form, width] = tiles[best]
            cells = [
                f"{1e3 * times[name]:.3g}{'*' * (name == best)}" if name in times else "spills"
                for name in table.columns[3:]
            ]
            table.rows.append((divergence, str(dtype).removeprefix("torch."), f"{width:,}", *cells))
            del student, teacher
    return table, entries


def write(architecture: str, entries: dict[Key, Tile]) -> None:
    """Replace this architecture's entries in kernels/tuning.py."""
    path = ROOT / "kernels" / "tuning.py"
    before, declaration, _ = path.read_text().partition("TILES: ")
    rule = "\nArchitectures without an entry use the rule in `launch.tile`.\n"
    before = re.sub(r"\nNo entry has been timed yet.*\n", rule, before)
    others = {key: tile for key, tile in tuning.TILES.items() if key[0] != architecture}
    lines = [f"    {key}: {tile},\n" for key, tile in sorted((others | entries).items())]
    text = "dict[tuple[str, int, bool, int], tuple[int, int]] = {\n" + "".join(lines) + "}\n"
    path.write_text(before + declaration + text.replace("'", '"'))


def main() -> None:
    """The command line."""
    parser = study.command_line(__doc__, rounds=15)
    parser.add_argument("--compile", metavar="ARCHITECTURE", help="sm_80, sm_90, gfx942, ...")
    arguments = study.parsed(parser)
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
        times, entries = fastest(architecture, kept, arguments.rounds)
        tables.append(times)
        write(architecture, entries)
    emit(arguments, tables)


if __name__ == "__main__":
    main()
