"""fastkd.compat.ADAPTERS against the stacks that are installed."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

import fastkd.compat
from fastkd.compat import ADAPTERS


@pytest.mark.parametrize("name", [name for name, row in ADAPTERS.items() if row.package])
def test_the_tested_version_is_installed(name: str) -> None:
    assert ADAPTERS[name].installed == ADAPTERS[name].tested


def _resolved(path: str) -> object:
    """Import the longest prefix of a dotted path that is a module, and follow the rest as attributes."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(path)


# Megatron's training loop, mdistiller and NeMo-RL are repositories that pip does not install. The others import
# packages that the tests do without; their tests load single files.
NOT_IMPORTED = (
    "megatron",
    "mdistiller",
    "nemo_rl",
    "veomni",
    "speculators",
    "specforge",
    "skyrl",
    "axolotl",
)


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        (name, ours, theirs)
        for name, row in ADAPTERS.items()
        for ours, theirs in row.replaces.items()
        if name not in NOT_IMPORTED
    ],
)
def test_both_names_exist(name: str, ours: str, theirs: str) -> None:
    assert callable(getattr(getattr(fastkd.compat, name), ours))
    assert callable(_resolved(theirs))
