"""The backends under test, and the settings of every test."""

from __future__ import annotations

import functools
import gc
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# OpenMP reads this when torch loads it. Its threads spin while they wait, and on a busy machine that makes every small
# parallel operation a hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# cuBLAS needs this setting for deterministic algorithms, which these tests switch on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from support.cuda_emulation import emulation, host  # noqa: F401 (fixtures)
from support.pairwise import pairwise

import fastkd
from fastkd.call import memo

# The architecture, such as sm_90, for which Triton's kernels are compiled to PTX. tests/support/ptx then runs that PTX
# in the interpreter's place; docs/ptx.md explains it.
PTX = os.environ.get("FASTKD_PTX")

# Triton reads this when it is imported, and `import fastkd` does not import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1" if PTX is None else "0")

# Without bytecode, each of a hundred processes that tests start would compile fastkd, and each run rewrite all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A developer's settings must not decide what is tested.
for _setting in ("FASTKD_BACKEND", "FASTKD_STRICT", "FASTKD_CHECK"):
    os.environ.pop(_setting, None)

# The backends that serve CPU tensors of any size; test_suite.py checks these lists against fastkd's own. The reference
# is tested through any_backend, and many other tests compare with it.
BACKENDS = ["portable"]
if os.environ.get("FASTKD_TEST_WITHOUT_NATIVE") != "1":
    BACKENDS.append("cpu")
# Triton's interpreter takes CPU tensors and needs about a second per call. With a GPU it is off, because
# test_triton.py, test_gpu.py and others then run the compiled kernels.
INTERPRETED = [] if torch.cuda.is_available() else ["triton"]
EVERY_BACKEND = ["reference", *BACKENDS, *INTERPRETED]


# What `make test-stacks` installs: a test marked `stacks` imports some of it.
STACKS = (
    *("trl", "liger_kernel", "torchtune", "modelopt", "megatron", "lightning", "torchdistill"),
    *("verl", "veomni", "nemo_automodel", "swift", "speculators", "specforge", "skyrl", "axolotl"),
    *("transformers", "accelerate", "datasets", "sklearn", "matplotlib", "typer", "rich", "pytest_benchmark"),
)  # fmt: skip
# Files in which every test needs those packages, so that even importing the file may fail without them. All files
# test_compat_* are such files, too.
FILES_OF_STACKS = (
    "test_sequences",
    "test_examples",
    "test_examples_distributed",
    "test_examples_on_policy",
    "test_bench_suite",
)


def _of_stacks(path: Path) -> bool:
    return path.stem.startswith("test_compat_") or path.stem in FILES_OF_STACKS


def _with_stacks(config: pytest.Config) -> bool:
    """Whether this run has the tests marked `stacks`: as -m says, or by default if the packages are installed."""
    if "stacks" in config.option.markexpr:
        return "not stacks" not in config.option.markexpr
    return not _missing()


@functools.cache
def _missing() -> list[str]:
    return [name for name in STACKS if importlib.util.find_spec(name) is None]


def pytest_configure(config: pytest.Config) -> None:
    # The garbage of torch.compile and of Triton's interpreter is mostly freed by reference counts. At Python's
    # thresholds, a tenth of the tests' time goes to collections that find little.
    gc.set_threshold(50_000, 20, 20)
    if _with_stacks(config) and _missing():
        raise pytest.UsageError(
            f"-m {config.option.markexpr!r} needs {', '.join(_missing())}: make test-stacks installs them"
        )

    if PTX is not None:
        from support.ptx.triton import install

        install(int(PTX.removeprefix("sm_")))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Report once that the tests of other stacks are left out; they are not listed as skipped."""
    lines = (
        []
        if PTX is None
        else [f"Triton's kernels: PTX for {PTX} in the machine of tests/support/ptx"]
    )
    if not _with_stacks(config):
        lines.append("tests of other stacks: left out (make test-stacks)")
    return lines


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore files of other stacks; pytest collects a file that is named on the command line all the same."""
    return True if _of_stacks(collection_path) and not _with_stacks(config) else None


# The slowest files, slowest first. Started last, one of them would keep one process busy after the others are done.
LONG = (
    "test_triton_kernels",
    "test_topk",
    "test_triton",
    "test_schedules",
    "test_linear",
    "test_parallel",
    "test_cli",
    "test_cuda_kernels",
    "test_numerics",
    "test_compile",
    "test_sure_rows",
    "test_triton_aot",
    "test_cache",
    "test_measures",
    "test_serving_client",
    "test_online",
    "test_divergences",
    "test_tensors",
    "test_install",
    "test_routed",
    "test_triton_shards",
    "test_logprobs",
    "test_cuda_host",
    "test_heads",
    "test_contract",
    "test_autograd",
    "test_triton_launcher",
    "test_arguments",
    "test_distiller",
    "test_relations",
    "test_shared_draft",
    "test_examples",
)


def _exists(item: pytest.Item) -> bool:
    """Whether the item's `only_where` marks accept its parameters.

    A mark's function receives the parameters that it names, the test's name as `test`, and a dict of all parameters as
    `parameters`. A mark is ignored if the test lacks a parameter that it names, so that a file's mark can name a
    fixture that only some of its tests use.
    """
    for mark in item.iter_markers("only_where"):
        (wanted,) = mark.args
        parameters = {"test": item.originalname, **item.callspec.params}  # type: ignore[attr-defined]
        parameters["parameters"] = parameters
        names = _parameters(wanted)
        if parameters.keys() >= set(names) and not wanted(
            **{name: parameters[name] for name in names}
        ):
            return False
    return True


@functools.cache
def _parameters(function: Callable[..., bool]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _mark_all_but_pairs(items: list[pytest.Item]) -> None:
    """Mark as heavy what the `pairwise` marks leave out of the grids of their tests."""
    grids: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("pairwise") and not item.get_closest_marker("heavy"):
            grids.setdefault(item.nodeid.split("[")[0], []).append(item)
    for grid in grids.values():
        mark = grid[0].get_closest_marker("pairwise")
        assert mark is not None
        # By their repr, because not all values are hashable.
        combinations = [
            {name: repr(value) for name, value in item.callspec.params.items()}  # type: ignore[attr-defined]
            for item in grid
        ]
        for item, selected in zip(grid, pairwise(combinations, **mark.kwargs), strict=True):
            if not selected:
                item.add_marker(pytest.mark.heavy)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the long files first, drop the items that `only_where` rejects, apply `pairwise` and `heavy_with` marks."""
    items[:] = [item for item in items if not hasattr(item, "callspec") or _exists(item)]
    if not _with_stacks(config):
        items[:] = [item for item in items if item.get_closest_marker("stacks") is None]
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if _of_stacks(item.path):
            item.add_marker("stacks")
        for mark in item.iter_markers("heavy_with"):
            parameters = item.callspec.params  # type: ignore[attr-defined]
            if all(parameters[name] == value for name, value in mark.kwargs.items()):
                item.add_marker(pytest.mark.heavy)
    _mark_all_but_pairs(items)


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage while there is hardly any: thousands of tests are made, and all are kept."""
    gc.disable()
    yield
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Exempt the collected tests, of which none is garbage before the end, from garbage collection.

    Going through them takes a third of a second, and torch.compiler.reset collects garbage.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def _present(name: str) -> str:
    """The backend's name; fails the test if the backend cannot run, so that a broken build is never green."""
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


@pytest.fixture(scope="session", params=EVERY_BACKEND)
def any_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that serves CPU tensors, including Triton's interpreter; for tests of a few small rows."""
    name = _present(request.param)
    if name not in INTERPRETED:
        yield name
        return
    # Imported here because it imports triton, which most runs of a single file do not need.
    from support.triton_interpreter import corrected

    with corrected():
        yield name


@pytest.fixture(scope="module")
def corrected_interpreter() -> Iterator[None]:
    """Triton's interpreter, corrected: without the corrections it takes several times as long."""
    pytest.importorskip("triton")
    # Imported here for the same reason as in any_backend.
    from support.triton_interpreter import corrected

    with corrected():
        yield


def _instruction_sets() -> list[str]:
    """Instruction sets of the native extension; empty if it is missing, and their tests are then skipped."""
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


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Clear what torch.compile has cached, before and after the test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def no_remembered_calls() -> Iterator[None]:
    """Start and end each test without remembered calls, because a remembered call is not given another backend."""
    memo.forget()
    yield
    memo.forget()


@pytest.fixture(scope="session", autouse=True)
def unmeasured_guards() -> Iterator[None]:
    """Keep torch.compile from measuring its guards' latency for its log, which takes 30 ms per graph."""
    from torch._dynamo import guards

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(guards, "profile_guard_manager"):
            patch.setattr(guards, "profile_guard_manager", lambda *call: 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill torch.empty with NaN (integers with their maximum), so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
