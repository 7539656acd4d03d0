"""The CUDA kernels in the machine: the PTX that nvcc makes of csrc/cuda, launched by the extension's own host code.

tests/support/cuda_host.cpp hands over each launch. $FASTKD_PTX makes tests/support/cuda_emulation.py call `in_machine`.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastkd.backends import native, registry
from support.paths import ROOT
from support.ptx.launch import Kernel
from support.ptx.program import Program

FLAGS = ("-O3", "-std=c++17")  # of setup.py, as far as they concern code of a device
ERROR_BYTES = 4096


def _sources() -> list[Path]:
    csrc = ROOT / "csrc"
    headers = [sorted((csrc / folder).glob("*.h")) for folder in ("", "common", "generated")]
    return [*sorted((csrc / "cuda").iterdir()), *(path for paths in headers for path in paths)]


def _target(path: Path) -> str:
    """The architecture of a file of PTX, such as sm_90."""
    with path.open() as file:
        (target,) = re.findall(r"^\.target (\w+)", file.read(2000), flags=re.M)
    return target


def _from_the_build(architecture: str) -> Path | None:
    """The PTX that `make build` has left, if it is that of the present sources."""
    folder = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    # nvcc names the file kernel.ptx if it compiles for one architecture, and files of other builds may lie beside it.
    found = [path for path in folder.glob("kernel*.ptx") if _target(path) == architecture]
    if not found:
        return None
    ninja = [sys.executable, "-m", "ninja", "-C", str(folder), "-n", "cuda_kernel.o"]
    state = subprocess.run(ninja, capture_output=True, text=True).stdout
    newest = max(found, key=lambda path: path.stat().st_mtime)
    return newest if "no work to do" in state else None


def _compiled(architecture: str) -> Path:
    """The PTX of a compilation of its own, once for this state of the sources."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("nvcc, which makes PTX of csrc/cuda, is not installed")
    command = [nvcc, *FLAGS, f"-arch={architecture}", "-ptx", f"-I{ROOT / 'csrc'}"]
    text = b"".join(path.read_bytes() for path in _sources()) + " ".join(command).encode()
    folder = ROOT / "build" / "ptx"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{hashlib.sha256(text).hexdigest()[:16]}.ptx"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = target.with_suffix(".part")
            source = ROOT / "csrc" / "cuda" / "kernel.cu"
            done = subprocess.run(
                [*command, str(source), "-o", str(unfinished)], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[:4000]
            unfinished.rename(target)
    return target


def entry_of(text: str, kernel: str) -> str:
    """The mangled name of a kernel: of a divergence, Sparse, DenseShard, total_kernel or scale_kernel."""
    entries = re.findall(r"\.entry (\w+)\(", text)
    tag = f"{len(kernel)}{kernel}"
    dense = kernel not in ("Sparse", "DenseShard", "total_kernel", "scale_kernel")
    (entry,) = [
        entry
        for entry in entries
        if tag in entry and ("DenseI" in entry) == dense and (not dense or f"{tag}E" in entry)
    ]
    return entry


class Module:
    """The kernels of a module, by the names that entry_of takes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.kernels: dict[str, Kernel] = {}

    def program(self, name: str) -> Program:
        return Program(self.text, entry_of(self.text, name))

    def kernel(self, name: str) -> Kernel:
        if name not in self.kernels:
            self.kernels[name] = Kernel(self.program(name))
        return self.kernels[name]


@functools.cache
def module(architecture: str) -> Module:
    """The PTX of csrc/cuda/kernel.cu for an architecture such as sm_90."""
    return Module((_from_the_build(architecture) or _compiled(architecture)).read_text())


class _Launch(ctypes.Structure):
    """Struct Launch of tests/support/cuda_host.cpp."""

    _fields_ = [
        ("kernel", ctypes.c_char_p), ("call", ctypes.c_void_p), ("call_bytes", ctypes.c_int64),
        ("factors", ctypes.c_int64), ("stride", ctypes.c_int64), ("tiles", ctypes.c_int64),
        ("blocks", ctypes.c_int64), ("ranks", ctypes.c_int64), ("threads", ctypes.c_int64),
        ("shared_bytes", ctypes.c_int64),
    ]  # fmt: skip


_Callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(_Launch), ctypes.c_void_p)


class _Memory:
    """The tensors whose addresses a call passes to the extension: what its kernels may access."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.tensors: list[tuple[int, int]] = []
        address = native.address

        def noted(tensor: torch.Tensor | None) -> int:
            if tensor is not None:
                storage = tensor.untyped_storage()
                self.tensors.append((storage.data_ptr(), storage.nbytes()))
            return address(tensor)

        patch.setattr(native, "address", noted)
        patch.setattr(registry.load("cuda"), "address", noted)

    def only_for(self, function: Any) -> Any:
        """The function, after which the tensors are forgotten."""

        def call(*arguments: Any) -> None:
            try:
                function(*arguments)
            finally:
                self.tensors.clear()

        return call


@contextmanager
def in_machine(
    host: ModuleType, module: Module, record: list[dict[str, Any]] | None = None
) -> Iterator[None]:
    """Within, the machine runs the launches of the emulated extension from PTX; record lists their layouts."""

    def run(launch: Any, error: int) -> bool:
        launch = launch.contents
        try:
            parameters = [ctypes.string_at(launch.call, launch.call_bytes)]
            name = launch.kernel.decode()
            if name == "scale_kernel":
                numbers = launch.factors, launch.stride, launch.tiles
                parameters += [number.to_bytes(8, "little") for number in numbers]
            layout = {"ranks": launch.ranks, "dynamic": launch.shared_bytes}
            if record is not None:
                record.append({"kernel": name, "threads": launch.threads, **layout})
            module.kernel(name).launch(
                (launch.blocks, 1, 1), launch.threads, parameters, memory.tensors, **layout
            )
        except BaseException as problem:
            message = f"{type(problem).__name__}: {problem}".encode()[: ERROR_BYTES - 1]
            ctypes.memmove(error, message, len(message))
            return False
        return True

    library = ctypes.CDLL(str(host.__file__))
    callback = _Callback(run)
    cuda = registry.load("cuda")
    with pytest.MonkeyPatch.context() as patch:
        memory = _Memory(patch)
        parts = {name: memory.only_for(getattr(host, name)) for name in ("kd_rows", "scale_rows")}
        patch.setattr(cuda, "_cuda", SimpleNamespace(**{**vars(host), **parts}))
        library.fastkd_launch_with(callback)
        try:
            yield
        finally:
            library.fastkd_launch_with(None)
