"""What every study shares: its command line, its contenders from the suite's table, and its output.

A study imports this module first. It puts bench/, with the suite's modules, and tests/, with `support`, on the path.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

BENCH = Path(__file__).resolve().parents[1]
ROOT = BENCH.parent
sys.path[1:1] = [str(BENCH), str(ROOT / "tests")]

from cases import DTYPES, TIMED, Problem  # noqa: E402 (bench/ is on the path from here on)
from measure import machine, milliseconds, ratio  # noqa: E402 (from bench/)
from peers import Call, Loss, Peer, obstacle, of_case  # noqa: E402 (from bench/)
from tables import Table, page, show  # noqa: E402 (from bench/)

Seconds = dict[str, list[float]]  # by contender and round


def shape_of(text: str) -> tuple[int, ...]:
    """Sizes from the command line, such as 512x32768."""
    return tuple(map(int, text.split("x")))


def command_line(
    description: str | None,
    *,
    rounds: int | None = None,
    dtypes: Sequence[str] = (),
    divergences: Sequence[str] = (),
    choices: Iterable[str] | None = None,
    shapes: Sequence[tuple[int, int]] = (),
) -> argparse.ArgumentParser:
    """A parser with the common options. An argument that is given adds its option, and is the option's default.

    choices: The allowed divergences, if there are more than the default ones.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if shapes:
        parser.add_argument("--shapes", nargs="+", type=shape_of, default=shapes, metavar="NxV")
    if dtypes:
        names = tuple(dict.fromkeys((*TIMED, *dtypes)))
        parser.add_argument("--dtypes", nargs="+", choices=names, default=list(dtypes))
    if divergences:
        names = tuple(choices or divergences)
        parser.add_argument("--divergences", nargs="+", choices=names, default=list(divergences))
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--threads", type=int, help="as torch.set_num_threads; default: torch's own"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments. Sets the number of threads."""
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def column(contender: str) -> str:
    """A contender's name in the tables of studies, where plain "fastkd" means its CPU backend."""
    return contender.replace(" (cpu)", "").replace(" (cpu, in place)", " in place")


def contenders(problem: Problem, names: Iterable[str]) -> dict[str, tuple[Peer, Call]]:
    """The contenders of peers.py that can run the case, by column. A name selects the first that begins with it."""
    case = problem.case
    peers = of_case(case.form, case.divergence, DTYPES[case.dtype], case.device)
    found = {}
    for name in names:
        for peer in [peer for peer in peers if peer.name.startswith(name)][:1]:
            why = obstacle(peer, case.device)
            try:
                if why is None:
                    found[column(name)] = peer, problem.make(peer)
            except ImportError as error:
                why = str(error)
            if why:
                progress(name, why)
    return found


def progress(*case: str) -> None:
    """Say on standard error what is being measured. The tables come at the end."""
    print(*case, sep=", ", file=sys.stderr, flush=True)


def cells(
    seconds: Seconds, columns: Sequence[str], to: str = "fastkd", digits: int = 1
) -> list[str]:
    """The time of each contender, with its ratio to that of `to`."""

    def cell(name: str) -> str:
        if name not in seconds:
            return "-"
        times = "" if name == to else f" ({ratio(seconds, name, to):.{digits}f}x)"
        return milliseconds(seconds[name]) + times

    return [cell(name) for name in columns]


def record(
    what: str, loss: Loss, shape: Sequence[int], dtype: str, seconds: Seconds
) -> list[dict[str, Any]]:
    """Measurements for --json."""
    case = {"what": what, "loss": loss.label, "shape": shape, "dtype": dtype}
    return [
        case
        | {
            "contender": name,
            "median_seconds": median(values),
            "least_seconds": min(values),
            "ratio_to_fastkd": ratio(seconds, name, "fastkd"),
        }
        for name, values in seconds.items()
    ]


def emit(
    arguments: argparse.Namespace,
    tables: Sequence[Table],
    measurements: Sequence[dict[str, Any]] = (),
    notes: Sequence[str] = (),
) -> None:
    """Print the tables, and write the files that the options name."""
    environment = machine()
    show(environment, tables, notes)
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        everything = {"machine": environment, "settings": settings, "measurements": measurements}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(page(environment, tables, "\n".join(f"- {n}" for n in notes)))
