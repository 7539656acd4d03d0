"""The command line, python -m fastkd: info, doctor, check and cache.

    python -m fastkd info [--json]                     report versions, backends and the environment
    python -m fastkd doctor [--backend NAME] [--json]  compare every backend with float64 on this machine
    python -m fastkd check MODULE:NAME                 verify a divergence of your own
    python -m fastkd cache build|verify|info PATH      store a teacher's outputs on disk, or examine them

Exit codes: 0 for success; 1 if a result or a cache is wrong; 2 for invalid arguments; 141 if the output is a pipe that
was closed early. All commands need torch only, except that `cache` needs the extra `cache`, and `cache build` the extra
`cache-build`, or `serving` with --server.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from fastkd.backends.registry import MODULES
from fastkd.tools import cache, check, doctor, info

CLOSED_PIPE = 141  # the exit code that shells report for a process ended by SIGPIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastkd", description="Examine this installation of fastkd."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser("info", help="report versions, backends and the environment")
    doctor_parser = commands.add_parser(
        "doctor", help="compare every backend with float64; exit code 1 if one is wrong"
    )
    doctor_parser.add_argument(
        "--backend", choices=MODULES, help="check only this backend; an error if it cannot run here"
    )
    for command in (info_parser, doctor_parser):
        command.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    check_parser = commands.add_parser(
        "check", help="verify a divergence of your own; exit code 1 if it is wrong"
    )
    check_parser.add_argument(
        "target",
        metavar="MODULE:NAME",
        help="an importable module and the name in it of a fastkd.Divergence, or of a function that returns one and "
        "takes no arguments",
    )
    cache.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command given by arguments (default: sys.argv) and return its exit code."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.command == "check":
        try:
            divergence = check.find(parsed.target)
        except check.TargetError as error:
            parser.exit(2, f"{parser.prog} check: {error}\n")
        report = check.check(divergence)
        print("\n".join(report.lines))
        return 0 if report.ok else 1
    if parsed.command == "cache":
        return cache.run(parsed)
    if parsed.command == "info":
        facts = info.collect()
        print(json.dumps(facts, indent=2) if parsed.json else info.text(facts))
        return 0
    diagnosis = doctor.examine(parsed.backend)
    print(
        json.dumps(diagnosis, indent=2, allow_nan=False) if parsed.json else doctor.text(diagnosis)
    )
    return 0 if diagnosis["ok"] else 1


def _main_with_closed_pipe() -> int:
    """Run main(), and return CLOSED_PIPE without a traceback if the reader of stdout stops early, as `head -1` does."""
    try:
        try:
            return main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout again at exit. Redirecting it avoids a second BrokenPipeError.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


if __name__ == "__main__":
    sys.exit(_main_with_closed_pipe())
