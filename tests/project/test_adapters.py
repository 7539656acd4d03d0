"""fastkd.compat.ADAPTERS and what repeats it: pyproject.toml, the Makefile, the pages and `python -m fastkd info`."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest
import tomllib
from support.paths import ROOT

from fastkd.compat import ADAPTERS
from fastkd.tools import info

COMPAT = ROOT / "fastkd" / "compat"


def test_every_module_has_a_row() -> None:
    modules = {path.stem for path in COMPAT.glob("*.py")} - {"__init__"}
    assert modules == set(ADAPTERS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_row_lists_every_public_name_of_its_module(name: str) -> None:
    tree = ast.parse((COMPAT / f"{name}.py").read_text())
    public = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    public -= {"register"}  # torchdistill's registry is told the names; it replaces nothing itself
    # A class that subclasses one of the stack's is made at its first access, by name.
    if any(getattr(node, "name", "") == "__getattr__" for node in tree.body):
        texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        public |= {text for text in texts if text in ADAPTERS[name].replaces}
    assert set(ADAPTERS[name].replaces) == public


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_row_names_files_that_exist(name: str) -> None:
    row = ADAPTERS[name]
    assert (ROOT / "docs" / "stacks" / f"{row.page}.md").is_file()
    assert name in (ROOT / "docs" / "stacks" / f"{row.page}.md").read_text()
    text = (ROOT / "tests" / "compat" / f"{row.tests}.py").read_text()
    assert re.search(rf"from fastkd\.compat import .*\b{name}\b|fastkd\.compat\.{name}\b", text)


def test_tested_versions_are_those_that_are_installed_for_the_tests() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    pins = [*extras["peers"], *re.findall(r"[a-z-]+==[\d.]+", (ROOT / "Makefile").read_text())]
    for name, row in ADAPTERS.items():
        assert (row.package is None) == (row.tested is None), name
        if row.package is not None:
            assert f"{row.package}=={row.tested}" in pins


def test_the_page_has_the_same_rows() -> None:
    lines = (ROOT / "docs" / "stacks" / "index.md").read_text().splitlines()
    for name, row in ADAPTERS.items():
        cells = next(line for line in lines if f"`fastkd.compat.{name}`" in line)
        assert f"({row.page}.md)" in cells
        assert row.stack.removesuffix(" Kernel") in cells
        assert row.tested is None or row.tested in cells.rsplit("|", 2)[1]


@pytest.mark.parametrize(
    ("version", "line"),
    [
        ("1.16.0", r"fastkd\.compat\.trl +trl 1\.16\.0 +tested with this version"),
        (
            "1.17.0",
            r"fastkd\.compat\.trl +trl 1\.17\.0 +not tested with this version, but with 1\.16\.0",
        ),
        (None, r"not installed: trl, "),
    ],
)
def test_info_compares_the_installed_version(
    version: str | None, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version is not None:
        record = tmp_path / f"trl-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {version}\n")
    found = importlib.metadata.Distribution.from_name

    def from_name(name: str) -> importlib.metadata.Distribution:
        if name != "trl":
            return found(name)
        for distribution in importlib.metadata.distributions(name=name, path=[str(tmp_path)]):
            return distribution
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", from_name)
    facts = info.collect()
    assert facts["adapters"]["trl"]["installed"] == version
    assert re.search(line, info.text(facts))
