"""The machine a figure belongs to, and tables: for a terminal, as Markdown, as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

import fastkd
from fastkd import _C

WIDTH = 150  # where the output is not a terminal
LOAD_AT_START = os.getloadavg()[0]


@dataclass
class Table:
    """Rows of text under a title that says what the numbers are."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(title=self.title, title_justify="left", title_style="bold")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a page."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        heading = [f"**{self.title}**", ""] if self.title else []
        return "\n".join([*heading, *("| " + " | ".join(line) + " |" for line in lines)])


def machine() -> dict[str, str]:
    """What decides a figure besides the code."""
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    gpu = {}
    if torch.cuda.is_available():
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        gpu = {
            "GPU": f"{torch.cuda.get_device_name()}, compute capability {capability}",
            "CUDA of torch": str(torch.version.cuda),
        }
    return gpu | {
        "CPU": _cpu_model(),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "caches": _caches(),
        "threads": str(torch.get_num_threads()),
        "load average at the start": f"{LOAD_AT_START:.1f}",
        "torch": f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
        "fastkd": f"{fastkd.__version__} ({_C.instruction_set()})",
        "Python": platform.python_version(),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "not set"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "transparent huge pages": huge_pages.read_text().strip() if huge_pages.exists() else "none",
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _caches() -> str:
    found = []
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (
            (cache / name).read_text().strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found) or "unknown"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument(
        "--threads", type=int, help="as torch.set_num_threads; default: torch's own"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")


def progress(*case: str) -> None:
    """Say on standard error what is being measured: the tables come at the end."""
    print(*case, sep=", ", file=sys.stderr, flush=True)


def console_of() -> Console:
    """Standard output, wide enough where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def emit(
    arguments: argparse.Namespace,
    tables: Sequence[Table],
    measurements: Sequence[dict[str, Any]],
    notes: Sequence[str] = (),
) -> None:
    """Print the tables, and write what the options ask for."""
    environment = machine()
    console = console_of()
    for key, value in environment.items():
        console.print(f"{key}: {value}", highlight=False, markup=False)
    for table in tables:
        console.print()
        console.print(table.rich())
    for note in notes:
        console.print(note, highlight=False, markup=False)
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        everything = {"machine": environment, "settings": settings, "measurements": measurements}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")
    if arguments.markdown:
        lines = [f"- {key}: {value}" for key, value in environment.items()]
        parts = [
            "\n".join(lines),
            *(table.markdown() for table in tables),
            "\n".join(f"- {n}" for n in notes),
        ]
        arguments.markdown.write_text("\n\n".join(part for part in parts if part) + "\n")
