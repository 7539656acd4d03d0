"""Import single files of a stack's package without what the package itself requires."""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def stand_ins(*packages: str, **modules: dict[str, Any]) -> Iterator[None]:
    """Let submodules of these packages be imported, while the packages' own __init__ files do not run.

    modules are stand-ins with the given attributes, for requirements that are not installed. All that was imported
    meanwhile is forgotten at the end.
    """
    top = packages[0].split(".")[0]
    before = dict(sys.modules)
    found = importlib.util.find_spec(top)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {top!r}", name=top)
    root = Path(next(iter(found.submodule_search_locations)))
    for name in packages:
        package: Any = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in (top, *modules)]:
            sys.modules.pop(name)
            if name in before:
                sys.modules[name] = before[name]


def module_of(name: str, **modules: dict[str, Any]) -> Any:
    """A module, imported with stand-ins for all its parent packages."""
    parts = name.split(".")
    parents = [".".join(parts[:end]) for end in range(1, len(parts))]
    with stand_ins(*parents, **modules):
        return importlib.import_module(name)
