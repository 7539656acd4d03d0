"""A progress bar on stderr, or lines of text where rich is not installed."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(total: int, *, disable: bool = False) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of sequences finished so far."""
    if disable:
        yield lambda done: None
    elif importlib.util.find_spec("rich") is None:
        yield _lines(total)
    else:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("sequences", total=total)
            yield lambda done: progress.update(task, completed=done)


def _lines(total: int) -> Callable[[int], None]:
    """Return a function that writes a line at every tenth of the total."""
    written = -1

    def show(done: int) -> None:
        nonlocal written
        tenth = 10 * done // max(total, 1)
        if tenth > written:
            written = tenth
            print(f"{done} of {total} sequences", file=sys.stderr)

    return show
