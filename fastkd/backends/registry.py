"""The choice of a backend: one pure function of a call and of the backends that this machine has."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fastkd.call.options import OPTION_NAMES
from fastkd.core.environment import variables
from fastkd.divergences import DEFINITIONS, OF_LOGITS, Divergence, forward_kl

logger = logging.getLogger("fastkd")

MODULES = {
    "reference": "fastkd.backends.reference",
    "portable": "fastkd.backends.portable",
    "cpu": "fastkd.backends.cpu",
    "triton": "fastkd.kernels.backend",
    "cuda": "fastkd.backends.cuda",
}
# Builds for other GPUs are packages with other names and the same module.
TRITON_PACKAGES = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu")
# The oldest version that compiles fastkd.kernels; a heavy test of tests/backends/triton/test_triton_aot.py checks it.
OLDEST_TRITON = (3, 5)
# Serves every call. So does the reference, but it may be slow, because it is the oracle.
FALLBACK = "portable"
# Functions that only some backends have: (the name and the remedy in error messages).
OPTIONAL = {
    "mutual_rows": ("mutual learning", "Use backend='auto' or 'triton'"),
    "angles": ("angles", "Use backend='auto'"),
}
# The backends that have `angles`.
ANGLES = ("cpu", "portable", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendUnavailable(RuntimeError):  # noqa: N818 (a public name, read as the sentence it starts)
    """A backend that was requested by name cannot serve this call.

    Attributes:
        backend: the requested backend.
        reason: why it cannot serve the call.
        remedy: what to do about it.
    """

    def __init__(self, backend: str, reason: str, remedy: str) -> None:
        super().__init__(f"backend {backend!r} is unavailable: {reason}. {remedy}")
        self.backend, self.reason, self.remedy = backend, reason, remedy


class Obstacle(NamedTuple):
    """Why a backend cannot serve a call, and the remedy."""

    reason: str
    remedy: str


class Request(NamedTuple):
    """The properties of a call that the choice of a backend may depend on."""

    device: str
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    divergence: Divergence


@functools.cache
def available_backends() -> Mapping[str, Obstacle | None]:
    """Every backend of this installation: None if it can run, else the obstacle.

    This is determined once per process. A compiler or driver that is installed later takes effect in a new process.
    """
    return {
        "cpu": _cpu_obstacle(),
        "triton": _triton_obstacle(),
        "cuda": _cuda_obstacle(),
        "portable": None,
        "reference": None,
    }


def _built() -> dict[str, Any]:
    """What setup.py recorded about the build."""
    record = Path(__file__).parents[1] / "_build.json"
    return json.loads(record.read_text()) if record.is_file() else {}


def _cpu_obstacle() -> Obstacle | None:
    built = _built()
    known = None if built.get("native", True) else Obstacle(built["reason"], built["remedy"])
    if not built and (Path(__file__).parents[2] / "csrc" / "module.cpp").is_file():
        known = Obstacle(
            "this is a source checkout, and its extension has not been built",
            "Run `make build` in it, or start Python in another directory to use the installed fastkd",
        )
    return _native_obstacle(
        "fastkd._C",
        known,
        "Install a C++17 compiler with OpenMP and reinstall fastkd with FASTKD_NATIVE=1 to see its output",
    )


def _cuda_obstacle() -> Obstacle | None:
    # This does not initialize CUDA, because a process that only computes on the CPU may fork later.
    return _native_obstacle(
        "fastkd._cuda",
        Obstacle(**built) if (built := _built().get("cuda_obstacle")) else None,
        "Reinstall fastkd on a machine with nvcc, with FASTKD_CUDA=1 to see its output",
    )


def _native_obstacle(module: str, known: Obstacle | None, remedy: str) -> Obstacle | None:
    try:
        extension = importlib.import_module(module)
    except ImportError as error:
        if "libgomp" in str(error):
            remedy = "Install the system's OpenMP runtime: libgomp1 on Debian and Ubuntu, libgomp on Fedora"
        return known or Obstacle(f"the native extension is missing ({error})", remedy)
    rebuild = "Run `make divergences`, or reinstall fastkd"
    if module == "fastkd._cuda":
        rebuild += ". This rebuilds the extension with nvcc, and removes it if there is no nvcc or FASTKD_CUDA=0"
    if extension.divergences() != [function.__name__.lstrip("_") for function in DEFINITIONS]:
        return Obstacle(
            "the native extension was built from another table of divergences",
            rebuild,
        )
    if getattr(extension, "OPTION_NAMES", "").split() != list(OPTION_NAMES):
        return Obstacle(
            "the native extension was built from another table of options",
            rebuild,
        )
    return None


def _triton_obstacle() -> Obstacle | None:
    if importlib.util.find_spec("triton") is None:
        return Obstacle("triton is not installed", "pip install 'fastkd[triton]'")
    for name in TRITON_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            installed = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
            if installed < OLDEST_TRITON:
                oldest = ".".join(map(str, OLDEST_TRITON))
                return Obstacle(
                    f"triton {version} does not compile its kernels, which need {oldest}",
                    f"Install torch 2.9 or newer, which comes with triton {oldest} or newer",
                )
    return None


def _capabilities() -> set[int]:
    """Compute capabilities of the NVIDIA devices that torch sees, such as 90 for an H100."""
    if torch.version.hip:  # AMD's devices have numbers of their own
        return set()
    capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return {10 * major + minor for major, minor in capabilities}


def least_capability() -> int:
    """The lowest compute capability that fastkd._cuda has code for. It has PTX for all later ones."""
    return min(importlib.import_module("fastkd._cuda").architectures())


def dotted(capability: int) -> str:
    """A compute capability as NVIDIA writes it: "9.0" for 90."""
    return f"{capability // 10}.{capability % 10}"


def _cuda_versions() -> tuple[int, int]:
    return importlib.import_module("fastkd._cuda").versions()


# The oldest drivers that run a major version of CUDA. Within a major version, any driver runs any runtime.
DRIVERS = {12: 525, 13: 580}


def _driver_obstacle() -> Obstacle | None:
    """Whether the NVIDIA driver is too old for the CUDA runtime in fastkd._cuda. No driver is no obstacle here."""
    runtime, driver = _cuda_versions()
    if not driver or driver // 1000 >= runtime // 1000:
        return None
    runs, wants = (
        f"CUDA {version // 1000}.{version % 1000 // 10}" for version in (driver, runtime)
    )
    oldest = DRIVERS.get(runtime // 1000)
    needs = f"driver {oldest} or newer" if oldest else "a newer driver"
    return Obstacle(
        f"the NVIDIA driver runs up to {runs}, and fastkd._cuda was built with {wants}, which needs {needs}",
        "Update the driver, rebuild fastkd._cuda with NVCC=<nvcc of an older CUDA, from 12.8 on>, or use "
        "backend='triton'",
    )


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(
    backend: str, call: Request, available: Mapping[str, Obstacle | None]
) -> Obstacle | None:
    """Why this backend cannot serve this call; None if it can."""
    if available[backend] is not None or backend in (FALLBACK, "reference"):
        return available[backend]
    for argument, dtype in (
        ("student_logits", call.student_dtype),
        ("teacher", call.teacher_dtype),
    ):
        if dtype not in KERNEL_DTYPES:
            return Obstacle(
                f"{argument} is {dtype}, and its kernels take float32, bfloat16 and float16",
                "Convert the logits, or use backend='portable'",
            )
    if backend == "cuda" and (too_old := _driver_obstacle()) is not None:
        return too_old
    if backend in ("cpu", "cuda"):
        if call.device != backend:
            return Obstacle(
                f"the logits are on {call.device!r}",
                f"Use backend='auto' for tensors on {call.device!r}",
            )
        other = "portable" if backend == "cpu" else "triton"
        if call.divergence.function not in DEFINITIONS:
            return Obstacle(
                f"divergence {call.divergence.name!r} is not compiled into the extension",
                f"Add it to fastkd/divergences.py and run `make divergences`, or use backend={other!r}",
            )
        if not call.divergence.normalized and call.divergence.function not in OF_LOGITS:
            return Obstacle(
                f"divergence {call.divergence.name!r} has normalized=False, for which its definition is not compiled "
                "into the extension",
                f"Use backend={other!r}, or add the definition to OF_LOGITS in fastkd/divergences.py and run "
                "`make divergences`",
            )
    if backend == "cuda":
        capabilities, least = _capabilities(), least_capability()
        if not any(capability >= least for capability in capabilities):
            found = ", ".join(map(dotted, sorted(capabilities))) or "none (no NVIDIA device)"
            return Obstacle(
                f"the devices have compute capability {found}; the kernels need {dotted(least)} or newer",
                "Use backend='triton'",
            )
    if (
        backend == "triton"
        and call.device not in ("cuda", "xpu")
        and not (call.device == "cpu" and interpreting())
    ):
        return Obstacle(
            f"the logits are on {call.device!r}",
            "Move them to a GPU, or set TRITON_INTERPRET=1 before importing triton to run its interpreter",
        )
    return None


def choose(call: Request, available: Mapping[str, Obstacle | None]) -> tuple[str, str | None]:
    """Return (backend, why it is a fallback or None) for backend="auto". A pure function of its arguments.

    CPU tensors prefer cpu, all others triton. If the preferred backend cannot serve the call, it falls back to
    portable. cuda is only chosen by name, because it is slower than triton for many rows (bench/results/).
    """
    preferred = "cpu" if call.device == "cpu" else "triton"
    why = obstacle(preferred, call, available)
    return (
        (preferred, None) if why is None else (FALLBACK, f"{preferred}: {why.reason}. {why.remedy}")
    )


@functools.cache
def _log_once(line: str) -> None:
    logger.warning(line)


def fall_back(chosen: str, why: str, strict: bool) -> None:
    """Log a fallback, once for each reason; raise if FASTKD_STRICT=1 forbids it."""
    if strict:
        raise BackendUnavailable("auto", f"FASTKD_STRICT=1 forbids the fallback to {chosen}", why)
    _log_once(f"fastkd falls back to the {chosen} backend ({why})")


def select(
    backend: str,
    device: str,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    divergence: Divergence,
) -> str:
    """The backend that serves a call with this `backend`, after FASTKD_BACKEND and FASTKD_STRICT are applied.

    A fallback is logged once for each reason; under FASTKD_STRICT=1 it raises BackendUnavailable.
    """
    (override,) = variables("FASTKD_BACKEND")
    chosen, fallback = _select(backend, device, student_dtype, teacher_dtype, divergence, override)
    if fallback is not None:
        fall_back(chosen, fallback, os.environ.get("FASTKD_STRICT") == "1")
    return chosen


@functools.lru_cache(maxsize=1024)
def _select(
    backend: str,
    device: str,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    divergence: Divergence,
    override: str | None,
) -> tuple[str, str | None]:
    """Return (backend, why it is a fallback or None)."""
    call = Request(device, student_dtype, teacher_dtype, divergence)
    available = available_backends()
    wanted = override or backend
    if wanted not in (*available, "auto"):
        source = "FASTKD_BACKEND" if override else "backend"
        raise ValueError(
            f"{source} must be 'auto' or one of {', '.join(available)}; got {wanted!r}"
        )
    if wanted == "auto":
        return choose(call, available)
    why = obstacle(wanted, call, available)
    if why is not None:
        raise BackendUnavailable(wanted, *why)
    return wanted, None


@functools.cache
def load(backend: str) -> ModuleType:
    """Import the module of a backend at its first use, so that `import fastkd` loads no kernels."""
    return importlib.import_module(MODULES[backend])


def function(backend: str, name: str) -> Callable[..., Any]:
    """A function that only some backends have (OPTIONAL).

    Raises:
        BackendUnavailable: this backend does not have it.
    """
    implementation: Callable[..., Any] | None = getattr(load(backend), name, None)
    if implementation is None:
        what, remedy = OPTIONAL[name]
        raise BackendUnavailable(backend, f"it has no kernel for {what}", remedy)
    return implementation


def select_angles(backend: str, device: torch.device) -> str:
    """The backend that computes angles on this device. FASTKD_BACKEND applies if it names one that can."""
    override = os.environ.get("FASTKD_BACKEND")
    wanted = override if override in ("auto", *ANGLES) else backend
    if device.type != "cpu":
        if wanted == "cpu":
            raise BackendUnavailable("cpu", f"the points are on {device}", "Use backend='auto'")
        return FALLBACK if wanted == "auto" else wanted
    if wanted in ("portable", "reference"):
        return wanted
    why = available_backends()["cpu"]
    if why is None:
        return "cpu"
    if wanted == "cpu":
        raise BackendUnavailable("cpu", *why)
    strict = os.environ.get("FASTKD_STRICT") == "1"
    fall_back(FALLBACK, f"cpu: {why.reason}. {why.remedy}", strict)
    return FALLBACK


def select_logprobs(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that computes log-probabilities of logits with this dtype on this device.

    FASTKD_BACKEND applies if it names one that can: "portable", "reference", or "triton" for tensors that its kernels
    take.
    """
    override = os.environ.get("FASTKD_BACKEND")
    in_torch = override if override in ("portable", "reference") else None
    if dtype == torch.float64:
        return in_torch or FALLBACK
    on_cpu = device.type == "cpu"
    if on_cpu and override != "triton":
        return select_angles("auto", device)
    if in_torch is not None:
        return in_torch
    call = Request(device.type, dtype, dtype, forward_kl())
    why = obstacle("triton", call, available_backends())
    if why is None:
        return "triton"
    if on_cpu:
        return select_angles("auto", device)
    strict = os.environ.get("FASTKD_STRICT") == "1"
    fall_back(FALLBACK, f"triton: {why.reason}. {why.remedy}", strict)
    return FALLBACK
