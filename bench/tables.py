"""Tables for a terminal and as Markdown, and a run of the suite as tables and plots.

python bench/tables.py build/bench/quick.json             # prints the tables; writes quick.md and quick-*.svg, .png
python bench/tables.py build/bench/quick.json --readme    # prints one short table as Markdown
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import milliseconds
from peers import loss_of
from rich.console import Console
from rich.table import Table as RichTable

WIDTH = 150  # of output that is not a terminal
Row = dict[str, Any]
CASE = ("form", "divergence", "rows", "vocabulary", "hidden", "dtype", "data", "device")
SIZES = {"V": "vocabulary", "N": "rows"}
COSTS = {"time": "seconds", "memory": "peak"}
# Okabe and Ito's palette, for colour-blind readers. A contender has the same colour in every plot.
COLOURS = {"fastkd": "#D55E00", "eager": "#0072B2", "torch.compile": "#009E73", "roof": "#000000"}
OTHER = "#767676"
# The keys of a run's file. The suite adds "untimed" and "not_compared" to those of pytest-benchmark.
KEYS = {"benchmarks", "commit_info", "datetime", "machine_info", "not_compared", "untimed"}


@dataclass
class Table:
    """Rows of text under a title that says what the numbers are."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def rich(self) -> RichTable:
        """The table for a terminal."""
        table = RichTable(title=self.title, title_justify="left", title_style="bold")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The table for a page."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        heading = [f"**{self.title}**", ""] if self.title else []
        return "\n".join([*heading, *("| " + " | ".join(line) + " |" for line in lines)])


def console_of() -> Console:
    """Standard output, with a width that fits the tables if it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def show(about: dict[str, str], tables: Sequence[Table], notes: Sequence[str] = ()) -> None:
    """Print the machine, the tables and the notes."""
    console = console_of()
    for key, value in about.items():
        console.print(f"{key}: {value}", highlight=False, markup=False)
    for table in tables:
        console.print()
        console.print(table.rich())
    for note in notes:
        console.print(note, highlight=False, markup=False)


def page(about: dict[str, str], tables: Sequence[Table], *rest: str) -> str:
    """The same as Markdown."""
    parts = ["\n".join(f"- {key}: {value}" for key, value in about.items())]
    parts += [*(table.markdown() for table in tables), *rest]
    return "\n\n".join(part for part in parts if part) + "\n"


class Run(NamedTuple):
    """A file of the suite: timed and untimed rows, and what it records about itself."""

    timed: list[Row]
    untimed: list[Row]
    about: dict[str, str]
    not_compared: dict[str, str]


def load(path: Path) -> Run:
    """Read a run. Raises ValueError if the file is not one."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not found.keys() >= KEYS:
        raise ValueError(
            f"{path} is not a run of the suite; `make bench-quick` or `make bench` writes one"
        )
    commit = found["commit_info"]
    about = {
        "commit": f"{commit.get('id')}{', with changes' if commit.get('dirty') else ''}",
        "date": found["datetime"],
        **found["machine_info"]["fastkd"],
        "versions": ", ".join(f"{k} {v}" for k, v in found["machine_info"]["versions"].items()),
    }
    timed = [benchmark["extra_info"] for benchmark in found["benchmarks"]]
    return Run(timed, found["untimed"], about, found["not_compared"])


def case_of(row: Row) -> tuple[Any, ...]:
    """What competing rows have in common."""
    return tuple(row[key] for key in CASE)


def title(row: Row) -> str:
    """The case of a row in words."""
    sizes = f"{row['rows']} x {row['vocabulary']:,}"
    if row["hidden"]:
        sizes += f", H = {row['hidden']}"
    form = "from hidden states" if row["form"] == "linear" else "on logits"
    return f"{loss_of(row['divergence']).label} {form}: {sizes}, {row['dtype']}, {row['data']}, {row['device']}"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f}" if size < 100 * 2**20 else f"{size / 2**20:,.0f}"


COLUMNS = (
    "", "ms", "times fastkd's", "times the floor", "peak MiB", "GB/s", "of bandwidth", "error: loss", "gradient",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """The cells of one contender. Without a time, the reason is in its place."""
    errors = [f"{error:.1e}" for error in row["errors"]] if row.get("errors") else ["-", "-"]
    if "seconds" not in row:
        return [row["contender"], row["why"], *["-"] * 5, *errors]
    return [
        row["contender"],
        milliseconds([row["seconds"]]),
        f"{row['times_fastkd']:.2f}x",
        f"{row['times_floor'][1]:.2f}x",
        mebibytes(row["peak"]),
        f"{row['moved'] / row['seconds'] / 1e9:.2f}",
        f"{row['share']:.0%}",
        *errors,
    ]


def by_case(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[case_of(row)].append(row)
    return groups


def contests(run: Run) -> list[list[Row]]:
    """The rows of each case with all contenders: the fastest first, those without a time last."""
    untimed = by_case(row for row in run.untimed if not row["few"])
    timed = by_case(row for row in run.timed if not row["few"])
    return [
        sorted(timed.get(case, []), key=lambda row: row["seconds"]) + untimed.get(case, [])
        for case in timed | untimed
    ]


def contest_tables(run: Run) -> list[Table]:
    """A table for each such case."""
    return [Table(title(rows[0]), COLUMNS, [cells(row) for row in rows]) for rows in contests(run)]


def few_table(run: Run) -> list[Table]:
    """The cases with fastkd, eager and torch.compile only."""
    groups = by_case(row for row in (*run.timed, *run.untimed) if row["few"])
    rows = [[title(row), *cells(row)] for group in groups.values() for row in group]
    return [Table("Other sizes and divergences", ("case", *COLUMNS), rows)] if rows else []


class Series(NamedTuple):
    """A cost of one contender at sizes that differ in N or in V."""

    contender: str
    about: str
    against: str
    cost: str
    sizes: list[int]
    costs: list[float]


class Fit(NamedTuple):
    """The fit cost = c size^slope; off is the largest relative distance of a point from it."""

    slope: float
    off: float


def series_of(rows: Iterable[Row]) -> list[Series]:
    """Every series of at least three sizes."""
    found: dict[tuple[Any, ...], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        for against, key in SIZES.items():
            fixed = tuple((k, row[k]) for k in (*CASE, "contender") if k != key)
            found[(against, *fixed)][row[key]] = row
    series = []
    for (against, *_), at in found.items():
        if len(at) < 3:
            continue
        first = next(iter(at.values()))
        held = f"N = {first['rows']}" if against == "V" else f"V = {first['vocabulary']:,}"
        about = (
            f"{first['divergence']}, {first['form']}, {held}, {first['dtype']}, {first['device']}"
        )
        sizes = sorted(at)
        series += [
            Series(first["contender"], about, against, cost, sizes, [at[n][key] for n in sizes])
            for cost, key in COSTS.items()
        ]
    return series


def fit(sizes: list[int], costs: list[float]) -> Fit | None:
    """Fit logarithms by least squares. None if a cost is 0, as the memory of a loss in place is."""
    if min(costs) <= 0:
        return None
    x, y = np.log(sizes), np.log(costs)
    slope, constant = np.polyfit(x, y, 1)
    return Fit(float(slope), float(np.expm1(np.abs(y - slope * x - constant).max())))


def growth_table(run: Run) -> list[Table]:
    """The slopes of all series. A cost in proportion to the size has slope 1."""
    rows = []
    for one in sorted(series_of(run.timed), key=lambda s: (s.about, s.against, s.cost)):
        found = fit(one.sizes, one.costs)
        slope = [f"{found.slope:.2f}", f"{found.off:.0%}"] if found else ["-", "-"]
        span = f"{one.sizes[0]:,} to {one.sizes[-1]:,}"
        rows.append([one.about, f"{one.cost} against {one.against}", span, one.contender, *slope])
    columns = ("case", "cost", "sizes", "", "slope", "largest deviation")
    name = "Growth: cost = c size^slope, fitted to logarithms"
    return [Table(name, columns, rows)] if rows else []


def note_table(run: Run) -> list[Table]:
    """What each package's convention adds or omits."""
    notes = {row["contender"]: row["note"] for row in (*run.timed, *run.untimed) if row["note"]}
    rows = [[name, note] for name, note in (notes | run.not_compared).items()]
    return [Table("Contenders: what they compute, and who is not compared", ("", "note"), rows)]


def readme_table(run: Run) -> Table:
    """The first case of each form and divergence, for a page with room for one table."""
    columns = ("", "ms", "times fastkd's", "peak MiB", "of bandwidth", "gradient error")
    table = Table("", columns)
    seen: set[tuple[str, str]] = set()
    for rows in contests(run):
        which = rows[0]["form"], rows[0]["divergence"]
        if which in seen:
            continue
        seen.add(which)
        table.rows.append([f"*{title(rows[0])}*", *[""] * 5])
        for row in rows:
            name, ms, times, _, peak, _, share, _, error = cells(row)
            table.rows.append([name, ms, times, peak, share, error])
    return table


def colour(contender: str) -> str:
    return COLOURS.get(contender.partition(" (")[0], OTHER)


def short(contender: str) -> str:
    """The name in a plot: plain "fastkd" for the backend that all are compared with."""
    return {"fastkd (cpu)": "fastkd", "fastkd (triton)": "fastkd"}.get(contender, contender)


def plots(run: Run, stem: Path) -> list[Path]:
    """Write the plots beside the run, as SVG and PNG. Those with too few rows are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
    )
    written = []

    def axes(name: str, x: str, y: str) -> Any:
        _, ax = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
        ax.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
        ax.set_title(name, loc="left", fontsize=10)
        return ax

    def save(ax: Any, name: str) -> None:
        for suffix in ("svg", "png"):
            path = stem.with_name(f"{stem.name}-{name}.{suffix}")
            ax.figure.savefig(path, dpi=150)
            written.append(path)
        pyplot.close(ax.figure)

    lines: dict[tuple[str, str, str], list[Series]] = defaultdict(list)
    for one in series_of(run.timed):
        lines[one.about, one.cost, one.against].append(one)
    for number, ((about, cost, against), drawn) in enumerate(lines.items()):
        unit, scale = ("ms", 1e3) if cost == "time" else ("MiB", 2**-20)
        ax = axes(f"{cost.capitalize()} against {against}\n{about}", against, unit)
        ends = []
        for one in drawn:
            shade = colour(one.contender)
            ax.plot(one.sizes, [scale * y for y in one.costs], marker="o", color=shade)
            found = fit(one.sizes, one.costs)
            label = short(one.contender) + (f", slope {found.slope:.2f}" if found else "")
            ends.append((one.sizes[-1], scale * one.costs[-1], label, shade))
        _label(ax, ends)
        ax.set_xticks(drawn[0].sizes, [f"{size:,}" for size in drawn[0].sizes])
        ax.minorticks_off()
        ax.margins(x=0.03)
        save(ax, f"{cost}-{against}-{about.split(',')[0]}-{number}")

    _roofline(run, axes, save)
    _errors(run, axes, save)
    return written


def _label(ax: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Write names at the ends (x, y) of curves, above each other where the ends meet."""
    lowest = -float("inf")
    for x, y, name, shade in sorted(ends, key=lambda end: end[1]):
        _, height = ax.transData.transform((x, y)) * 72 / ax.figure.dpi  # in points
        offset = max(0.0, lowest + 15 - height)
        lowest = height + offset
        ax.annotate(name, (x, y), (6, offset), textcoords="offset points", va="center", color=shade)


def _roofline(run: Run, axes: Any, save: Any) -> None:
    """Plot bytes per second against bytes, under the rate of an addition in the same rounds."""
    for device in sorted({row["device"] for row in run.timed}):
        rows = [
            row for row in run.timed if row["few"]
            and (row["form"], row["divergence"], row["device"]) == ("logits", "forward_kl", device)
        ]  # fmt: skip
        counts = Counter(row["rows"] for row in rows).most_common(1)  # the series against V
        rows = [row for row in rows if row["rows"] == counts[0][0]]
        named = ["fastkd (cpu)", "fastkd (triton)", "eager", "torch.compile"]
        rows = sorted((r for r in rows if r["contender"] in named), key=lambda row: row["moved"])
        if not rows:
            continue
        ax = axes(
            f"Forward KL: the rate at which its bytes move\nN = {rows[0]['rows']}, {device}",
            "MB that the loss must move",
            "GB/s",
        )
        roof: dict[int, list[float]] = defaultdict(list)
        for row in rows:
            roof[row["moved"]].append(row["bandwidth"])
        curves = {"measured bandwidth": [(x, float(np.median(y))) for x, y in roof.items()]}
        for name in named:
            points = [
                (r["moved"], r["moved"] / r["seconds"]) for r in rows if r["contender"] == name
            ]
            curves |= {short(name): points} if points else {}
        ends = []
        for name, points in curves.items():
            x, y = ([v / 10**p for v in side] for side, p in zip(zip(*points), (6, 9)))  # noqa: B905
            shade = COLOURS.get(name, COLOURS["roof"])
            ax.plot(x, y, marker="o", color=shade, linestyle="-" if name in COLOURS else "--")
            ends.append((x[-1], y[-1], name, shade))
        _label(ax, ends)
        save(ax, f"bandwidth-{device}")


def _errors(run: Run, axes: Any, save: Any) -> None:
    """Plot error against time for the first case of each form."""
    forms: set[tuple[str, str]] = set()
    for rows in by_case(row for row in run.timed if not row["few"]).values():
        which = (rows[0]["form"], rows[0]["device"])
        if which in forms:
            continue
        forms.add(which)
        ax = axes(
            f"Error against speed: left is faster, down is closer to float64\n{title(rows[0])}",
            "time, times fastkd's",
            "gradient's relative error",
        )
        rows = sorted(rows, key=lambda row: row["times_fastkd"])
        # Many errors are the same to the digit, so names beside the points would overlap.
        for number, row in enumerate(rows, 1):
            point, shade = (row["times_fastkd"], row["errors"][1]), colour(row["contender"])
            ax.plot(*point, "o", color=shade)
            above = 5 if number % 2 else -13
            ax.annotate(str(number), point, (-3, above), textcoords="offset points", color=shade)
            place = {"xy": (1.03, 1 - 0.07 * (number - 1)), "xycoords": "axes fraction"}
            ax.annotate(
                f"{number}  {short(row['contender'])}", **place, va="top", fontsize=9, color=shade
            )
        ax.margins(0.15)
        save(ax, f"errors-{'-'.join(which)}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the file that the suite's --benchmark-json wrote")
    parser.add_argument(
        "--readme", action="store_true", help="print one short table and nothing else"
    )
    arguments = parser.parse_args()
    run = load(arguments.run)
    if arguments.readme:
        print(readme_table(run).markdown())
        return
    tables = [*contest_tables(run), *few_table(run), *growth_table(run), *note_table(run)]
    written = arguments.run.with_suffix(".md")
    drawn = [path for path in plots(run, written.with_suffix("")) if path.suffix == ".svg"]
    pictures = (f"![{path.stem}]({path.name})" for path in drawn)
    written.write_text(page(run.about, tables, *pictures))
    show(run.about, tables, [f"{written}, with {len(drawn)} plots beside it"])


if __name__ == "__main__":
    main()
