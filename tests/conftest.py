"""The backends under test, and the conditions every test runs in."""

from __future__ import annotations

import os
from collections.abc import Iterator

# OpenMP reads this when torch loads it. Its threads spin while they wait, and on a busy machine that makes every small
# parallel operation a hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# cuBLAS asks for it where algorithms have to be deterministic, as they have in these tests.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from cuda_emulation import emulation, host  # noqa: F401 (fixtures)

import fastkd

# Triton reads this when it is imported, and `import fastkd` does not import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A developer's settings must not decide what is tested.
for _setting in ("FASTKD_BACKEND", "FASTKD_STRICT", "FASTKD_CHECK"):
    os.environ.pop(_setting, None)

# The backends that serve CPU tensors of any size; test_suite.py holds both lists to what fastkd has.
BACKENDS = ["reference"]
if os.environ.get("FASTKD_TEST_WITHOUT_NATIVE") != "1":
    BACKENDS.append("cpu")
# Triton's interpreter takes CPU tensors, and about a second for a call. With a GPU it is off: there test_triton.py,
# test_gpu.py and others run the compiled kernels.
INTERPRETED = [] if torch.cuda.is_available() else ["triton"]


# Files of few tests that take long. Last, one of them would keep one process busy when the others are done.
LONG = (
    "test_triton_aot",
    "test_install",
    "test_compile",
    "test_parallel",
    "test_triton_shards",
    "test_cli",
    "test_examples",
    "test_triton",
    "test_linear",
    "test_dispatch",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first; and marks as heavy what is so with some parameters only."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        for mark in item.iter_markers("heavy_with"):
            given = item.callspec.params  # type: ignore[attr-defined]
            if all(given[name] == value for name, value in mark.kwargs.items()):
                item.add_marker(pytest.mark.heavy)


def _present(name: str) -> str:
    """A backend that cannot run here fails its tests: a broken build is never green."""
    obstacle = fastkd.available_backends()[name]
    if obstacle is not None:
        pytest.fail(
            f"backend {name!r}: {obstacle.reason}. {obstacle.remedy}. FASTKD_TEST_WITHOUT_NATIVE=1 omits it"
        )
    return name


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend for CPU tensors of any size."""
    return _present(request.param)


@pytest.fixture(scope="session", params=[*BACKENDS, *INTERPRETED])
def any_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that serves CPU tensors, Triton's interpreter too: for tests of a few small rows."""
    name = _present(request.param)
    if name not in INTERPRETED:
        yield name
        return
    from triton_interpreter import (
        corrected,
    )  # imports triton, which most runs of a single file have no use for

    with corrected():
        yield name


def _instruction_sets() -> list[str]:
    """Of the native extension; none, and tests that want them are skipped, where it is missing."""
    try:
        from fastkd import _C
    except ImportError:
        return []
    return _C.instruction_sets()


@pytest.fixture(params=_instruction_sets())
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native extension with this instruction set in use."""
    from fastkd import _C

    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty is full of NaN (of the largest integer), so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
