"""python -m fastkd info: what is installed, and what of it runs here."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastkd
from fastkd.backends import registry

SWITCHES = {
    "FASTKD_BACKEND": "a backend that replaces the one each call asks for",
    "FASTKD_STRICT": "1: falling back to the portable backend raises BackendUnavailable",
    "FASTKD_CHECK": "1: wait for the device, and raise on an invalid label or temperature",
    "TRITON_INTERPRET": "1, before triton is imported: the triton backend runs on CPU tensors, slowly",
}

ROLES = {
    "portable": "plain PyTorch: what backend='auto' falls back to",
    "reference": "the oracle that the others are held to: right, and slow",
}


def devices() -> list[str]:
    """The types of device that torch can use here and a backend may serve."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found.append("xpu")
    return found


def obstacle(
    backend: str, device: str, divergence: fastkd.Divergence | None = None
) -> registry.Obstacle | None:
    """Why a backend cannot serve float32 logits on a device; None where it can."""
    if divergence is None:
        divergence = fastkd.forward_kl()
    call = registry.Request(device, torch.float32, torch.float32, divergence)
    return registry.obstacle(backend, call, registry.available_backends())


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    for package in registry.TRITON_PACKAGES:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "installed, version unknown"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _native() -> dict[str, Any]:
    """The native extension, and the record that its build left beside it."""
    found: dict[str, Any] = {
        "available": fastkd.available_backends()["cpu"] is None,
        "instruction_set": None,
        "instruction_sets": [],
        "build": None,
    }
    if found["available"]:
        extension = importlib.import_module("fastkd._C")
        found["instruction_set"] = extension.instruction_set()
        found["instruction_sets"] = list(extension.instruction_sets())
    record = Path(__file__).parents[1] / "_build.json"
    if record.is_file():
        found["build"] = json.loads(record.read_text())
    return found


def _backend(name: str) -> dict[str, Any]:
    """Where a backend runs; with a reason and a remedy where that is nowhere."""
    obstacles = {device: obstacle(name, device) for device in devices()}
    served = [device for device, why in obstacles.items() if why is None]
    why = None if served else next(iter(obstacles.values()))
    return {
        "installed": fastkd.available_backends()[name] is None,
        "devices": served,
        "reason": why.reason if why else None,
        "remedy": why.remedy if why else None,
    }


def _serving() -> list[dict[str, Any]]:
    """Which backend a call with backend="auto" gets for each kind of tensor, and why it is not the preferred one."""
    override = os.environ.get("FASTKD_BACKEND")
    available = registry.available_backends()
    found = []
    for device in devices():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            call = registry.Request(device, dtype, dtype, fastkd.forward_kl())
            chosen: str | None
            if override is not None and override in available:
                obstacle = registry.obstacle(override, call, available)
                chosen = override if obstacle is None else None
                why = f"FASTKD_BACKEND={override}"
                why += "" if obstacle is None else f", and {obstacle.reason}. {obstacle.remedy}"
            else:
                chosen, fallback = registry.choose(call, available)
                why = fallback or ""
            found.append(
                {
                    "device": device,
                    "dtype": str(dtype).removeprefix("torch."),
                    "backend": chosen,
                    "why": why or None,
                }
            )
    return found


def collect() -> dict[str, Any]:
    """Everything that `info` shows, ready for JSON."""
    return {
        "versions": {
            "fastkd": fastkd.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _triton_version(),
        },
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "devices": devices(),
            "gpus": [
                torch.cuda.get_device_name(index)
                for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
            ],
        },
        "native": _native(),
        "backends": {name: _backend(name) for name in fastkd.available_backends()},
        "serves": _serving(),
        "environment": {
            name: {"value": os.environ.get(name), "meaning": meaning}
            for name, meaning in SWITCHES.items()
        },
    }


def columns(rows: Iterable[Sequence[str]], indent: str = "  ") -> list[str]:
    """Rows as lines of aligned columns, for text and not for programs."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [(indent + "  ".join(map(str.ljust, row, widths))).rstrip() for row in table]


def _build_lines(build: dict[str, Any] | None) -> list[tuple[str, str]]:
    if build is None:
        return [("built", "no record")]
    if not build.get("native"):
        reason, remedy = build.get("reason", "unknown reason"), build.get("remedy", "")
        return [("not built", f"{reason}. {remedy}")]
    lines = [("compiler", str(build.get("compiler"))), ("flags", " ".join(build.get("flags", [])))]
    sets = build.get("instruction_sets", {})
    return [*lines, *((f"flags, {name}", " ".join(sets[name])) for name in sets if sets[name])]


def text(found: dict[str, Any]) -> str:
    """What :func:`collect` found, for people."""
    versions, machine, native = found["versions"], found["machine"], found["native"]
    lines = columns(
        [
            *((name, version or "not installed") for name, version in versions.items()),
            ("platform", machine["platform"]),
            ("processor", machine["processor"]),
            ("threads", str(machine["threads"])),
            ("devices", ", ".join(machine["devices"] + machine["gpus"])),
        ],
        indent="",
    )
    sets = [
        f"{name} (in use)" if name == native["instruction_set"] else name
        for name in native["instruction_sets"]
    ]
    lines += ["", "native extension"]
    lines += columns(
        [("instruction sets", ", ".join(sets) or "none"), *_build_lines(native["build"])]
    )
    lines += ["", "backends"]
    for name, backend in found["backends"].items():
        if backend["devices"]:
            role = f" ({ROLES[name]})" if name in ROLES else ""
            lines.append(f"  {name:<10} runs on {', '.join(backend['devices'])}{role}")
        else:
            state = "nothing to run on" if backend["installed"] else "missing"
            lines += [
                f"  {name:<10} {state}: {backend['reason']}",
                f"  {'':<10} {backend['remedy']}",
            ]
    lines += ["", "which one serves"]
    lines += columns(
        (
            f"{served['dtype']} on {served['device']}",
            served["backend"] or "none",
            served["why"] or "",
        )
        for served in found["serves"]
    )
    lines += ["", "environment"]
    lines += columns(
        (name, switch["value"] or "unset", switch["meaning"])
        for name, switch in found["environment"].items()
    )
    return "\n".join(lines)
