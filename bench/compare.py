"""Whether fastkd became slower, larger or less exact between two runs of the suite.

    python bench/compare.py BEFORE.json AFTER.json --fail 10

Times are compared as multiples of the floor in the same rounds, so a machine that was slower that day is not a
regression. A time fails if its median grew by more than the limit and the middle halves of its rounds do not overlap.
If they overlap, the row is named as within the scatter and does not fail. Memory and errors hardly scatter: they fail
beyond the limit plus an allowance for pages and for the last digits of float32. A row of fastkd that was timed before
and is not timed now fails too.

Exit code: 0 if nothing is worse, 1 if a row is, 2 if the runs cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from tables import Row, Run, Table, case_of, console_of, load, title

# What two runs must share for their floors to be comparable.
SAME_MACHINE = ("CPU", "cores", "threads", "GPU", "THP_MEM_ALLOC_ENABLE")
PAGES = 4 * 2**20  # bytes by which peaks of resident memory may differ
DIGITS = 1e-6  # a relative error below this is the last digits of float32


class Change(NamedTuple):
    """A figure of a row that grew, and whether the growth fails or is within the scatter."""

    row: str
    what: str
    before: float
    after: float
    fails: bool


def different_machines(before: Run, after: Run) -> list[str]:
    """The settings that differ between the runs, one per line."""
    pairs = ((key, before.about.get(key), after.about.get(key)) for key in SAME_MACHINE)
    return [f"{key}: {old} before, {new} after" for key, old, new in pairs if old != new]


def changes_of(name: str, old: Row, new: Row, limit: float) -> list[Change]:
    """Everything in a row that grew by more than the limit, a fraction."""
    found = []
    (_, middle, upper), (lower, now, _) = old["times_floor"], new["times_floor"]
    if now > (1 + limit) * middle:
        found.append(Change(name, "times the floor", middle, now, lower > upper))
    if new["peak"] > (1 + limit) * old["peak"] + PAGES:
        found.append(Change(name, "peak, MiB", old["peak"] / 2**20, new["peak"] / 2**20, True))
    for what, error, now_error in zip(
        ("loss", "gradient"), old["errors"], new["errors"], strict=True
    ):
        if not now_error <= (1 + limit) * error + DIGITS:  # NaN too
            found.append(Change(name, f"error of the {what}", error, now_error, True))
    return found


def ours(run: Run) -> list[Row]:
    """The timed rows of fastkd. Changes of other packages are no regressions."""
    return [row for row in run.timed if row["contender"].startswith("fastkd")]


def compare(before: Run, after: Run, limit: float) -> list[Change]:
    """The changes in fastkd's rows."""
    now = {(*case_of(row), row["contender"]): row for row in after.timed}
    changes = []
    for old in ours(before):
        name = f"{old['contender']}: {title(old)}"
        new = now.get((*case_of(old), old["contender"]))
        if new is None:
            changes.append(Change(name, "timed", 1, 0, True))
        else:
            changes += changes_of(name, old, new, limit)
    return changes


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--fail", type=float, default=10, metavar="PERCENT", help="more than this is a regression"
    )
    parser.add_argument(
        "--anyway", action="store_true", help="compare runs of different machines too"
    )
    arguments = parser.parse_args()
    try:
        before, after = load(arguments.before), load(arguments.after)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if not ours(before):
        print(f"{arguments.before} has no timed row of fastkd", file=sys.stderr)
        return 2
    if (differences := different_machines(before, after)) and not arguments.anyway:
        print("The runs are of different machines or settings:", *differences, sep="\n  ", file=sys.stderr)  # fmt: skip
        print("--anyway compares them all the same.", file=sys.stderr)
        return 2
    changes = compare(before, after, arguments.fail / 100)
    table = Table("What grew", ("row", "", "before", "after", "verdict"))
    for change in changes:
        verdict = "worse" if change.fails else "within the scatter"
        table.rows.append(
            [change.row, change.what, f"{change.before:.3g}", f"{change.after:.3g}", verdict]
        )
    if changes:
        console_of().print(table.rich())
    worse = sum(change.fails for change in changes)
    print(f"{worse} regressions in {len(ours(before))} rows of fastkd")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
