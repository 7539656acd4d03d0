"""A pytest plugin that runs a stack's own tests on fastkd's adapter.

    PYTHONPATH=tests python -m pytest -p support.standing_in --stack liger PATH/TO/test_jsd.py

It replaces every name in the stack's row of ``fastkd.compat.ADAPTERS``, wherever the stack's loaded modules have it.
With ``--bare``, the packages' own __init__ files do not run; this is for stacks whose requirements are not installed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import typing
from typing import Any

import pytest

import fastkd.compat
from support.originals import stand_ins

# The modules that import a stack's losses by name, and are to be loaded before the names are replaced.
USERS = {
    "liger": ("liger_kernel.transformers", "liger_kernel.chunked_loss", "liger_kernel.ops"),
    "torchtune": ("torchtune.modules.loss",),
}
# What the files of the stack import and the tests do without.
REQUIRED: dict[str, dict[str, dict[str, Any]]] = {
    "skyrl": {"jaxtyping": dict.fromkeys(("Float", "Integer"), typing.Annotated)},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stack", required=True, choices=list(fastkd.compat.ADAPTERS))
    parser.addoption("--bare", action="append", default=[], help="a package without its __init__")
    parser.addoption("--original", action="store_true", help="replace nothing, to compare")


def home(path: str) -> tuple[Any, str]:
    """(what holds the last name of a dotted path, this name)."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            value: Any = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:-1]:
                value = getattr(value, part)
            return value, parts[-1]
    raise ModuleNotFoundError(path)


def pytest_configure(config: pytest.Config) -> None:
    stack = config.getoption("--stack")
    row = fastkd.compat.ADAPTERS[stack]
    if bare := config.getoption("--bare"):
        # Not left: the stand-ins last as long as pytest.
        config._stand_ins = stand_ins(*bare, **REQUIRED.get(stack, {}))  # type: ignore[attr-defined]
        config._stand_ins.__enter__()  # type: ignore[attr-defined]
    for name in USERS.get(stack, ()):
        importlib.import_module(name)
    if config.getoption("--original"):
        return
    adapter = getattr(fastkd.compat, stack)
    replaced = []
    for name, path in row.replaces.items():
        # A bare package lacks what its __init__ defines.
        with contextlib.suppress(AttributeError, ModuleNotFoundError):
            replaced.append((*home(path), getattr(adapter, name)))
    top = next(iter(row.replaces.values())).split(".")[0]
    config._places = 0  # type: ignore[attr-defined]
    for holder, name, ours in replaced:
        original = getattr(holder, name, None)
        if original is None:
            continue
        setattr(holder, name, staticmethod(ours) if isinstance(holder, type) else ours)
        users = [
            module
            for path, module in list(sys.modules.items())
            if path.split(".")[0] == top and vars(module).get(name) is original
        ]
        for module in users:
            setattr(module, name, ours)
        config._places += 1 + len(users)  # type: ignore[attr-defined]
    if hasattr(adapter, "register") and not bare:
        adapter.register()
    if not config._places:  # type: ignore[attr-defined]
        raise pytest.UsageError(f"nothing of {stack} was found to replace")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    stack, places = config.getoption("--stack"), getattr(config, "_places", 0)
    terminalreporter.write_line(f"{places} places had the losses of fastkd.compat.{stack}")
