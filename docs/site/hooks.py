"""Hooks of the documentation site (mkdocs.yml).

- Pages link to files of the checkout, such as ``../README.md`` or ``../examples/distributed.py``, as they must in the
  checkout. The site has these files as pages too: Markdown at its own path, any other file as text under source/.
- ``<!-- on the site: FILE.md#section -->`` is replaced by that section, and
  ``<!-- on the site: img/bench/*.svg -->`` by these plots, so that each stands in one place.
- Formulas are typeset (formulas.py), and drawings become part of the page.
"""

from __future__ import annotations

import html as markup
import itertools
import posixpath
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import formulas  # noqa: E402 - mkdocs loads a hook by its path, without its folder

INDENTED = re.compile(
    r'<div class="language-text highlight"><pre><span></span><code>(.*?)</code></pre></div>',
    re.S,
)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"(^```.*?^```$)", re.S | re.M)
SECTION = re.compile(r"^<!-- on the site: (\S+)#(\S+) -->$", re.M)
PLOTS = re.compile(r"^<!-- on the site: (\S+)/\*\.svg -->$", re.M)
TITLE = re.compile(r"^(```\w+ title=)([^\s\"]+)$", re.M)
DRAWING = re.compile(r'<img alt="([^"]*)" src="[./]*(img/[\w-]+\.svg)"\s*/?>')
TABLE = re.compile(r"<table>.*?</table>", re.S)
LANGUAGES = {
    ".py": "python",
    ".sh": "bash",
    ".h": "cpp",
    ".cpp": "cpp",
    ".cu": "cpp",
    ".toml": "toml",
}


def _of_checkout(uri: str) -> str:
    """The path in the checkout of a page on the site."""
    if (ROOT / "docs" / uri).is_file():
        return f"docs/{uri}"
    return uri.replace("overview.md", "README.md")


def _of_site(path: str) -> str:
    """The page on the site for a file of the checkout."""
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    if not path.endswith(".md"):
        return f"source/{path}.md"
    return path.replace(
        "README.md", "overview.md"
    )  # README.md would become the index of its folder


def _links(markdown: str) -> list[str]:
    """Targets of links to files, as written on the page."""
    found = (
        match[2]
        for part in FENCE.split(markdown)[::2]
        for match in LINK.finditer(part)
    )
    return [target for target in found if not re.match(r"[a-z]+:|#", target)]


def _target(path: str, link: str) -> tuple[str, str]:
    """(path in the checkout, anchor) of a link on the page at `path`."""
    name, _, anchor = link.partition("#")
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), name)), anchor


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside docs/ that the navigation names or a page links to."""
    known = {file.src_uri for file in files}
    pages = [
        _of_checkout(uri)
        for uri in (*known, *_leaves(config.nav))
        if uri.endswith(".md")
    ]
    while pages:
        path = pages.pop()
        uri = _of_site(path)
        if not (ROOT / path).is_file():
            continue  # mkdocs reports it
        text = (ROOT / path).read_text(encoding="utf-8")
        if uri not in known:
            known.add(uri)
            files.append(
                File.generated(
                    config,
                    uri,
                    content=text if path.endswith(".md") else _shown(path, text),
                )
            )
        if path.endswith(".md"):
            targets = [_target(path, link)[0] for link in _links(text)]
            pages += [target for target in targets if _of_site(target) not in known]
    return files


def _leaves(nav: Any) -> list[str]:
    """The files in a navigation."""
    if isinstance(nav, str):
        return [nav]
    children = nav.values() if isinstance(nav, dict) else nav or []
    return [leaf for child in children for leaf in _leaves(child)]


def _shown(path: str, text: str) -> str:
    """A page that shows the text of a file."""
    return f"# {path}\n\n``````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n``````\n"


def _outside_of_code(markdown: str, change: Callable[[str], str]) -> str:
    """Markdown with a change applied to everything except blocks of code."""
    parts = FENCE.split(markdown)
    return "".join(part if n % 2 else change(part) for n, part in enumerate(parts))


def _relinked(markdown: str, path: str, rename: Callable[[str], str]) -> str:
    """Markdown of the file at `path` in the checkout; `rename` maps the path of a linked file to the new link."""

    def relink(match: re.Match[str]) -> str:
        if re.match(r"[a-z]+:|#", match[2]):
            return match[0]
        target, anchor = _target(path, match[2])
        return f"{match[1]}{rename(target)}{'#' * bool(anchor)}{anchor}{match[3]}"

    return _outside_of_code(markdown, lambda text: LINK.sub(relink, text))


def _without_folders(markdown: str, path: str) -> str:
    """Markdown without links to folders of the checkout, which are no pages of the site: their text stays."""

    def text_of(match: re.Match[str]) -> str:
        target, _ = _target(path, match[2])
        return match[1] if (ROOT / target).is_dir() else match[0]

    return _outside_of_code(
        markdown, lambda text: re.sub(r"\[([^\]]*)\]\(([\w./-]+)\)", text_of, text)
    )


def _section(path: str, anchor: str) -> str:
    """The body of a section of a Markdown file of the checkout, with links relative to docs/."""
    text = _relinked(
        (ROOT / path).read_text(encoding="utf-8"),
        path,
        lambda to: posixpath.relpath(to, "docs"),
    )
    parts = re.split(r"^##+ +(.+)$", text, flags=re.M)
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        if slugify(case="lower")(title, "-") == anchor:
            return body
    raise PluginError(f"{path} has no section #{anchor}")


def _plots(folder: str) -> str:
    """All plots of a folder of docs/."""
    names = sorted(path.stem for path in (ROOT / "docs" / folder).glob("*.svg"))
    if not names:
        raise PluginError(
            f"docs/{folder} has no plots: make bench-quick, and copy build/bench/quick-*.svg there"
        )
    return "\n\n".join(
        f"![{name.replace('-', ' ')}]({folder}/{name}.svg)" for name in names
    )


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Includes sections and plots, and points links to pages of the site."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    markdown = TITLE.sub(
        r'\1"\2"', markdown
    )  # pages have no quotes there, which tests rely on
    markdown = SECTION.sub(lambda match: _section(match[1], match[2]), markdown)
    markdown = PLOTS.sub(lambda match: _plots(match[1]), markdown)
    folder = posixpath.dirname(uri) or "."
    markdown = _without_folders(markdown, _of_checkout(uri))
    return _relinked(
        markdown,
        _of_checkout(uri),
        lambda to: posixpath.relpath(_of_site(to), folder),
    )


def on_page_content(
    html: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Typesets formulas, inlines drawings so that they take the page's colours, and labels the cells of tables."""

    def inline(match: re.Match[str]) -> str:
        svg = (ROOT / "docs" / match[2]).read_text(encoding="utf-8")
        if 'class="drawing"' not in svg:
            return match[0]
        return re.sub(r"<style>.*?</style>", "", svg, flags=re.S).replace(
            "<svg", f'<svg aria-label="{match[1]}"', 1
        )

    if page.file.src_uri.startswith("source/"):
        return html
    html = INDENTED.sub(_typeset, html)
    return TABLE.sub(
        lambda match: _labelled(_with_formulas(match[0])), DRAWING.sub(inline, html)
    )


def _typeset(match: re.Match[str]) -> str:
    """An indented block: as mathematics where it is a formula, and else as it was."""
    text = markup.unescape(re.sub(r"</?(span|a)\b[^>]*>", "", match[1]))
    return formulas.block(text) if formulas.is_formula(text) else match[0]


def _with_formulas(table: str) -> str:
    """A table whose column headed "formula" is typeset."""
    headings = re.findall(r"<th[^>]*>(.*?)</th>", table, re.S)
    if "formula" not in headings:
        return table
    number = itertools.count()

    def cell(match: re.Match[str]) -> str:
        if (
            next(number) % len(headings) != headings.index("formula")
            or "<" in match[2]
        ):
            return match[0]
        return f"{match[1]}{formulas.inline(markup.unescape(match[2]))}</td>"

    return re.sub(r"(<td[^>]*>)(.*?)</td>", cell, table, flags=re.S)


def _labelled(table: str) -> str:
    """A table whose cells carry their column's heading, which a telephone shows beside each (stylesheets/site.css)."""
    headings = [
        re.sub(r"<[^>]*>", "", text)
        for text in re.findall(r"<th[^>]*>(.*?)</th>", table, re.S)
    ]
    number = itertools.count()

    def label(_: re.Match[str]) -> str:
        return f'<td data-label="{headings[next(number) % len(headings)]}"'

    return re.sub(r"<td(?=[ >])", label, table) if any(headings) else table
