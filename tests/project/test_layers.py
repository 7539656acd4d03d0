"""Imports between the packages and top-level modules of fastkd (here: packages) go from upper layers to lower ones,
without cycles. Imports inside functions count."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from support.paths import ROOT

# From top to bottom. Packages of the same layer may import each other, but not in a cycle.
ORDER = (
    ("__main__",),
    ("compat", "tools"),
    ("fastkd",),  # the package itself, whose __init__ lists the public names
    (
        *("distiller", "online", "response", "features", "relations", "sequences"),
        *("calibration", "logprobs", "sampled", "serving"),
    ),
    ("functional", "modules"),
    ("engine",),
    ("parallel",),
    ("backends", "kernels"),
    ("call",),
    ("teachers", "divergences"),
    ("core", "_C", "_cuda"),
)
LAYER = {package: layer for layer, packages in enumerate(ORDER) for package in packages}


def _modules() -> dict[str, Path]:
    """The file of every module by name; a compiled module has a stub."""
    modules = {}
    for folder, package in ((ROOT / "fastkd", "fastkd"), (ROOT / "kernels", "fastkd.kernels")):
        for path in [*folder.rglob("*.py"), *folder.rglob("*.pyi")]:
            parts = path.relative_to(folder).with_suffix("").parts
            modules[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return modules


MODULES = _modules()


def _imported_by(module: str) -> Iterator[str]:
    """The modules of fastkd that a module imports; for a name of a package, the package."""
    path = MODULES[module]
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (above, node.module)))
            inner = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else source for name in inner]
        yield from (name for name in names if name in MODULES and name != module)


@functools.cache
def _imports() -> dict[str, set[str]]:
    return {module: set(_imported_by(module)) for module in MODULES}


def _package(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_every_package_is_listed() -> None:
    assert {_package(module) for module in MODULES} == set(LAYER)


def test_imports_go_downwards() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in _imports().items()
        for other in others
        if LAYER[_package(module)] > LAYER[_package(other)]
    ]
    assert not wrong


def test_imports_have_no_cycles() -> None:
    packages: dict[str, set[str]] = defaultdict(set)
    for module, others in _imports().items():
        packages[_package(module)] |= {_package(other) for other in others} - {_package(module)}
    for graph in (packages, _imports()):
        TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle
