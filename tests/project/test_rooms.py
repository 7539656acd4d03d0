"""Imports between the packages ("rooms") of fastkd: only downwards and without circles. Imports inside functions
count."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from support.paths import ROOT

# From top to bottom. Rooms on the same line may import each other, but not in a circle.
ORDER = (
    ("__main__",),
    ("compat", "tools"),
    ("fastkd",),  # the package itself, whose __init__ lists the public names
    (
        *("distiller", "online", "response", "features", "relations", "sequences"),
        *("calibration", "sampled"),
    ),
    ("functional", "modules"),
    ("engine",),
    ("parallel",),
    ("backends", "kernels"),
    ("call",),
    ("teachers", "divergences"),
    ("core", "_C", "_cuda"),
)
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}


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


IMPORTS = {module: set(_imported_by(module)) for module in MODULES}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_every_room_is_listed() -> None:
    assert {_room(module) for module in MODULES} == set(FLOOR)


def test_imports_go_downwards() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if FLOOR[_room(module)] > FLOOR[_room(other)]
    ]
    assert not wrong


def test_imports_have_no_circles() -> None:
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, others in IMPORTS.items():
        rooms[_room(module)] |= {_room(other) for other in others} - {_room(module)}
    for graph in (rooms, IMPORTS):
        TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
