"""python -m fastkd: info, doctor, check and cache.

    python -m fastkd info [--json]                     what is installed, and what runs here
    python -m fastkd doctor [--backend NAME] [--json]  are the numbers right on this machine
    python -m fastkd check MODULE:NAME                 is this divergence right
    python -m fastkd cache build|verify|info PATH      a teacher's outputs on disk

Exit codes: 0; 1 where something is wrong with the numbers or the cache; 2 where the command cannot be read; 141 where
the output is a pipe that was closed before its end. Needs torch only, and for `cache` the extra of that name or, to
build one, cache-build.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from fastkd.backends.registry import MODULES
from fastkd.tools import cache, check, doctor, info

CLOSED_PIPE = 141  # as a shell reports a process that SIGPIPE has ended


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastkd", description="Distillation losses: the installation."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    described = commands.add_parser("info", help="versions, backends, environment")
    examined = commands.add_parser(
        "doctor", help="every backend against float64; exit code 1 if one is wrong"
    )
    examined.add_argument(
        "--backend", choices=MODULES, help="only this one, which then has to run here"
    )
    for command in (described, examined):
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    checked = commands.add_parser(
        "check", help="a divergence of your own; exit code 1 if it is wrong"
    )
    checked.add_argument(
        "target",
        metavar="MODULE:NAME",
        help="an importable module, and in it a fastkd.Divergence or a function without arguments that makes one",
    )
    cache.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command == "check":
        try:
            divergence = check.find(chosen.target)
        except check.TargetError as error:
            parser.exit(2, f"{parser.prog} check: {error}\n")
        report = check.check(divergence)
        print("\n".join(report.lines))
        return 0 if report.ok else 1
    if chosen.command == "cache":
        return cache.run(chosen)
    if chosen.command == "info":
        found = info.collect()
        print(json.dumps(found, indent=2) if chosen.json else info.text(found))
        return 0
    diagnosis = doctor.examine(chosen.backend)
    print(
        json.dumps(diagnosis, indent=2, allow_nan=False) if chosen.json else doctor.text(diagnosis)
    )
    return 0 if diagnosis["ok"] else 1


def _until_the_pipe_closes() -> int:
    """Run the command of this process; quietly where its output is not read to the end, as in `| head -1`."""
    try:
        try:
            return main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more as it exits, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


if __name__ == "__main__":
    sys.exit(_until_the_pipe_closes())
