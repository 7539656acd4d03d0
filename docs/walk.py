"""Fills in what docs/kernels.md takes from the source, line numbers and quoted functions: python docs/walk.py

A table of the walk has the columns `file:line`, function, and what the function does. Each function must mention the
next one by name, or a word that its row puts in parentheses: (through `kernels_`). A last row "the line" quotes the
code that computes the gradient. tests/project/test_docs.py checks all of this, and that the numbers are current.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
HOP = re.compile(
    r"^\| `([\w/.]+):(\d+)` \| (?:`([\w.]+)`|the line) \| (.*) \|$", re.M
)


class Hop(NamedTuple):
    """A row of the walk."""

    path: str
    line: int  # as the page has it
    function: str  # "" for the line of the gradient
    remark: str


def walks(page: str) -> dict[str, list[Hop]]:
    """The tables under "From kd_loss to the gradient", by the heading or bold name before each."""
    section = page.partition("\n## From kd_loss to the gradient")[2].partition(
        "\n## "
    )[0]
    parts = re.split(r"^\*\*(\w+)\.\*\*", section, flags=re.M)
    tables = zip(("eager mode", *parts[1::2]), parts[::2], strict=True)
    return {
        name: [
            Hop(path, int(line), function, remark)
            for path, line, function, remark in rows
        ]
        for name, text in tables
        if (rows := HOP.findall(text))
    }


def span(path: str, function: str) -> tuple[int, str]:
    """(line, source) of a function or a class; in Python also Class.method. Raises LookupError where there is none."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = (
        _in_python(text, function)
        if path.endswith(".py")
        else _in_cpp(text, function)
    )
    if found is None:
        raise LookupError(f"{path} has no {function}")
    return found


def _in_python(text: str, function: str) -> tuple[int, str] | None:
    nodes: list[ast.AST] = [ast.parse(text)]
    for name in function.split("."):
        inside = (child for node in nodes for child in ast.walk(node))
        nodes = [
            n
            for n in inside
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name
        ]
    if not nodes:
        return None
    last = nodes[-1]  # after the overloads
    assert isinstance(last, (ast.FunctionDef, ast.ClassDef))
    return last.lineno, ast.get_source_segment(text, last) or ""


def _in_cpp(text: str, function: str) -> tuple[int, str] | None:
    for match in re.finditer(
        rf"^[^\n/#;=?]*\b{function}\([^;{{]*?\)[^;{{]*\{{", text, re.M
    ):
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        start = text.index(f"{function}(", match.start())
        return text.count("\n", 0, start) + 1, text[match.end() : end]
    return None


def current_line(hops: list[Hop], number: int) -> int:
    """Where hop `number` is now."""
    hop = hops[number]
    if hop.function:
        return span(hop.path, hop.function)[0]
    code = re.findall(r"`([^`]+)`", hop.remark)[0]
    start, body = span(hop.path, hops[number - 1].function)
    text = (ROOT / hop.path).read_text(encoding="utf-8").splitlines()
    for line in range(start, start + body.count("\n") + 3):
        if code in text[line - 1]:
            return line
    raise LookupError(
        f"{hops[number - 1].function} in {hop.path} has no line {code!r}"
    )


def numbered(page: str) -> str:
    """The page with current line numbers."""
    numbers = iter(
        current_line(hops, number)
        for hops in walks(page).values()
        for number in range(len(hops))
    )
    return HOP.sub(
        lambda match: match[0].replace(f":{match[2]}`", f":{next(numbers)}`", 1),
        page,
    )


def quoted(page: str) -> str:
    """The page with the current text of the functions that it quotes."""

    def current(match: re.Match[str]) -> str:
        return f"{match[1]}{span(match[2], match[3])[1]}\n```\n"

    return re.sub(
        r"^(```python title=(\S+)\n)def (\w+)\(.*?^```\n",
        current,
        page,
        flags=re.S | re.M,
    )


if __name__ == "__main__":
    PAGE.write_text(
        quoted(numbered(PAGE.read_text(encoding="utf-8"))), encoding="utf-8"
    )
