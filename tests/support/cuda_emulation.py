"""fastkd.backends.cuda on a machine without a GPU: the kernels' source with tests/support/cuda_host.h as device."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import fastkd
from fastkd.backends import registry
from fastkd.call import memo
from support.paths import ROOT

PTX = os.environ.get("FASTKD_PTX")
HARNESS = ROOT / "tests" / "support" / "cuda_host.cpp"
# A fiber's stack is not the one that _FORTIFY_SOURCE expects of longjmp.
FLAGS = (
    "-std=c++17 -O1 -fPIC -Wall -Wno-unknown-pragmas -fvisibility=hidden -U_FORTIFY_SOURCE"
    " -DFASTKD_MODULE=_cuda_host"
)


MODULE = "module.o"  # of csrc/cuda/module.cpp: half the time of a build, and the same whatever the kernels are
# Headers that module.cpp does not include.
OF_KERNELS = (
    "slice",
    "vectors",
    "state",
    "open",
    "columns",
    "statistics",
    "finish",
    "sums",
    "gradient",
    "measures",
)
OF_KERNELS = (*OF_KERNELS, "row", "block", "kinds", "cluster", "shard", "topk", "common/row_math")


def compile_host(
    directory: Path,
    edit: tuple[str, Callable[[str], str]] | None = None,
    module: Path | None = None,
) -> Path:
    """Build the emulation as an extension module; with edit, change a header first, and build only five divergences.

    module is the object file of module.cpp from an earlier build; None: it is compiled too, in parallel.
    """
    csrc = ROOT / "csrc"
    if edit is not None:
        assert edit[0].removesuffix(".h") in OF_KERNELS
        source = csrc / (edit[0] if "/" in edit[0] else f"cuda/{edit[0]}")
        changed = edit[1](source.read_text())
        assert changed != source.read_text()
        csrc = directory / "csrc"
        for header in (
            *(ROOT / "csrc" / "cuda").glob("*.[hc]*"),
            *(ROOT / "csrc").glob("*.h"),
            *(ROOT / "csrc" / "common").glob("*.h"),
            *(ROOT / "csrc" / "generated").glob("*.h"),
        ):
            copy = csrc / header.relative_to(ROOT / "csrc")
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = changed if header == source else header.read_text()
            copy.write_text(
                re.sub(r"(#define FASTKD_DIVERGENCES\(X\)(?: X\(\w+\)){6}).*", r"\1", text)
            )
    import pybind11

    includes = [csrc, sysconfig.get_path("include"), pybind11.get_include()]
    objects = {HARNESS: directory / "harness.o"}
    if module is None:
        module = objects[csrc / "cuda" / "module.cpp"] = directory / MODULE
    # A changed header is for one test, which takes less time than optimizing.
    flags = FLAGS if edit is None else FLAGS.replace("-O1", "-O0")
    compiler = ["g++", *shlex.split(flags), *(f"-I{path}" for path in includes)]
    running = [
        subprocess.Popen(
            [*compiler, "-c", str(source), "-o", str(made)], stderr=subprocess.PIPE, text=True
        )
        for source, made in objects.items()
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[:4000]
    target = directory / f"_cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = ["g++", "-shared", str(objects[HARNESS]), str(module), "-o", str(target)]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return target


def load_host(path: Path) -> ModuleType:
    # A name of its own: pybind11 gives a name that it has seen the module that it made then.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._cuda_host", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def host_module() -> ModuleType:
    """The emulation, compiled once for this state of the sources, even if several processes share the tests."""
    files = [
        *sorted((ROOT / "csrc" / "cuda").iterdir()),
        *sorted((ROOT / "csrc").glob("*.h")),
        *sorted((ROOT / "csrc" / "common").glob("*.h")),
        *sorted((ROOT / "csrc" / "generated").glob("*.h")),
        HARNESS,
        HARNESS.with_suffix(".h"),
    ]
    text = b"".join(file.read_bytes() for file in files) + f"{FLAGS} {sys.version}".encode()
    directory = ROOT / "build" / "cuda_host" / hashlib.sha256(text).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = list(directory.glob("_cuda_host*.so"))
        if not results:
            with tempfile.TemporaryDirectory(dir=directory) as unfinished:
                made = compile_host(Path(unfinished))
                (made.parent / MODULE).rename(directory / MODULE)
                results = [made.rename(directory / made.name)]
    return load_host(results[0])


@pytest.fixture(scope="session")
def host() -> ModuleType:
    """The emulation."""
    return host_module()


class Emulation:
    """The cuda backend on CPU tensors."""

    # Blocks per row, if plan() would take fewer.
    ranks = 1

    def __init__(self, module: ModuleType) -> None:
        self._library = ctypes.CDLL(str(module.__file__))
        self._folder = Path(str(module.__file__)).parent

    def device(self, most_ranks: int = 16, shared_kb: int = 227) -> None:
        """From now on, the device runs no larger clusters, and its blocks have so much shared memory."""
        self._library.fastkd_device(most_ranks, ctypes.c_int64(shared_kb << 10))

    def traffic(self) -> list[int]:
        """Bytes of device memory read and written since the last call."""
        if PTX is not None:
            pytest.skip("the emulation counts traffic; the machine that runs PTX does not")
        seen = (ctypes.c_int64 * 2)()
        self._library.fastkd_traffic(seen)
        return list(seen)

    def with_fault(self, fault: tuple[str, str, str], directory: Path) -> ModuleType:
        """Build the emulation with a changed header: (header, old text, new text)."""
        if PTX is not None:
            pytest.skip("this fault is planted into the emulation, and not into PTX")
        header, old, new = fault
        edit = (header, lambda text: text.replace(old, new))
        return load_host(compile_host(directory, edit, self._folder / MODULE))


def install(host: ModuleType, patch: pytest.MonkeyPatch) -> Emulation:
    """Put the emulation in place of the device's kernels, and have every backend chosen that is asked for by name."""
    actual = Emulation(host)
    patch.setitem(sys.modules, "fastkd._cuda", host)
    patch.setattr(fastkd, "_cuda", host, raising=False)
    registry.load.cache_clear()
    cuda = registry.load("cuda")
    patch.setattr(cuda, "_cuda", host)
    patch.setattr(cuda, "_capability", lambda device: 0)
    patch.setattr(cuda, "_stream", lambda device: (actual.ranks, 0))
    patch.setattr(registry, "_select", lambda backend, *others: (backend, None))
    memo.forget()
    return actual


@pytest.fixture
def emulation(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    """fastkd.backends.cuda with the emulation in place of the device's kernels, and chosen where it is asked for by
    name. With $FASTKD_PTX, nvcc's PTX for that architecture runs in place of the emulation."""
    actual = install(host, monkeypatch)
    if PTX is None:
        yield actual
    else:
        from support.ptx.cuda import in_machine, module

        with in_machine(host, module(PTX)):
            yield actual
    actual.device()
    registry.load.cache_clear()
