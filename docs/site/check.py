"""Checks the built site: python docs/site/check.py build/site

It reports links and anchors within the site that lead nowhere, and anything that is loaded from another site.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, what it loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None:
        """Called for every element."""
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") == "canonical":
            pass
        else:
            self.loaded += [
                given[name]
                for name in ("src", "href")
                if name in given and tag != "a"
            ]


def problems(site: Path) -> list[str]:
    """One line per problem."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site} has no page"]
    for path, page in pages.items():
        where = path.relative_to(site.resolve())
        for target in page.loaded + page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loaded and parts.scheme != "data":
                    found.append(f"{where} loads {target}")
                continue
            # 404.html is served for any address, so its links start at the root.
            root = site.resolve() if parts.path.startswith("/") else path.parent
            goal = (
                (root / unquote(parts.path).lstrip("/")).resolve()
                if parts.path
                else path
            )
            goal = goal / "index.html" if goal.is_dir() else goal
            if not goal.is_file():
                found.append(f"{where}: no file {target}")
            elif (
                parts.fragment
                and goal in pages
                and unquote(parts.fragment) not in pages[goal].anchors
            ):
                found.append(f"{where}: no anchor {target}")
    return found


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]))
    print("\n".join(lines) or "every link leads somewhere")
    sys.exit(1 if lines else 0)
