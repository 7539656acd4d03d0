"""Tests of the test suite: the backends of its fixtures, what it installs, and which cases it generates."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
import sys
from typing import Any, NamedTuple

import conftest
import pytest
import torch
from support.pairwise import pairwise
from support.paths import ROOT
from support.remembered import remembered
from torch import Tensor

import fastkd
from fastkd.tools import info


def test_the_fixtures_include_every_backend_that_serves_cpu_tensors() -> None:
    """If `any_backend` lacked a backend, tests that seem to cover all backends would miss it."""
    held = set(conftest.EVERY_BACKEND)
    if os.environ.get("FASTKD_TEST_WITHOUT_NATIVE") == "1":
        held.add("cpu")  # left out on purpose
    served = {name for name in fastkd.available_backends() if info.obstacle(name, "cpu") is None}
    assert served == held
    # The same without asking fastkd, which might miss a backend.
    assert {"reference", "portable", "cpu"} <= held
    if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
        assert "triton" in held


def _packages(extra: str, extras: dict[str, list[str]]) -> set[str]:
    """The packages that an extra of pyproject.toml installs, directly or through other extras."""
    results: set[str] = set()
    for requirement in extras[extra]:
        name, others = re.match(r"([\w-]+)(?:\[([\w,-]+)\])?", requirement).groups()  # type: ignore[union-attr]
        if name == "fastkd":
            results |= {
                package for other in others.split(",") for package in _packages(other, extras)
            }
        else:
            results.add(name)
    return results


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 reads no TOML")
@pytest.mark.skipif(
    not (ROOT / "Makefile").is_file(), reason="there is no checkout around these tests"
)
def test_make_test_installs_no_other_stack() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    makefile = (ROOT / "Makefile").read_text()
    (installed,) = re.findall(
        r"^\$\(VENV\)/\.dev:.*\n\t\$\(INSTALL\) -e '\.\[([\w,]+)\]'$", makefile, re.M
    )
    core = {package for extra in installed.split(",") for package in _packages(extra, extras)}
    assert "pytest" in core and "triton" in core
    assert not core & (_packages("peers", extras) | {"transformers", "accelerate", "matplotlib"})
    assert _packages("peers", extras) <= _packages("stacks", extras)


@pytest.mark.only_where(lambda one, two: one < two)
@pytest.mark.parametrize("one", [1, 2, 3])
@pytest.mark.parametrize("two", [1, 2, 3])
def test_only_where_drops_combinations(one: int, two: int) -> None:
    assert one < two


@pytest.mark.only_where(lambda absent: False)
@pytest.mark.parametrize("one", [1])
def test_only_where_ignores_marks_without_the_parameter(
    one: int, request: pytest.FixtureRequest
) -> None:
    cases = [item.name for item in request.session.items if "only_where_drops" in item.name]
    assert len(cases) in (0, 3)  # none if -k or a node id deselects them


class Doubled(NamedTuple):
    """A result in the form of the oracles' results."""

    value: Tensor
    number: float


def test_oracles_cache_results_by_the_contents_of_tensors() -> None:
    """Calls that differ in any argument are separate entries; a changed result is detected."""
    calls = []

    @remembered
    def doubled(x: Tensor, *, number: float = 1.0, other: Tensor | None = None) -> Doubled:
        calls.append(number)
        return Doubled(2 * x, number)

    x = torch.tensor([[1.0, math.nan], [-0.0, 3.0]])
    first = doubled(x)
    assert doubled(x.t().contiguous().t()) is first and doubled(x.clone()) is first
    assert len(calls) == 1
    different = [
        (x.t(), {}), (x.view(4), {}), (x.half(), {}), (x.abs(), {}), (torch._neg_view(x), {}), (x[:0], {}),
        (x, {"number": 2.0}), (x, {"number": 1}), (x, {"other": x}), (x, {"other": x.long()}),
    ]  # fmt: skip
    for inputs, options in different:
        assert doubled(inputs, **options) is doubled(inputs, **options)
        assert torch.equal(doubled(inputs, **options).value.nan_to_num(), (2 * inputs).nan_to_num())
    assert len(calls) == 1 + len(different)
    first.value.add_(1.0)
    with pytest.raises(AssertionError, match="was changed in place"):
        doubled(x)


@pytest.mark.parametrize("each", [None, "a"])
def test_a_selection_of_pairs_has_every_pair(each: str | None) -> None:
    """Every pair of values is selected, although some combinations do not exist and only a part is selected."""
    grid = [
        {"a": a, "b": b, "c": c, "d": d}
        for a, b, c, d in itertools.product(range(3), range(4), range(2), range(5))
        if (b, d) != (1, 2)
    ]

    def pairs(combinations: list[dict[str, int]]) -> set[Any]:
        return {
            (x.get(each or ""), first, x[first], second, x[second])
            for x in combinations
            for first, second in itertools.combinations("abcd", 2)
        }

    selected = [x for x, wanted in zip(grid, pairwise(grid, each), strict=True) if wanted]
    assert pairs(selected) == pairs(grid)
    assert len(selected) < 2 / 3 * len(grid)
    assert pairwise(grid, each) == pairwise(grid, each)
    assert pairwise([{"a": 1}, {"a": 2}, {}]) == [True] * 3
