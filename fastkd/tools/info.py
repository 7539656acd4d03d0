"""The command python -m fastkd info, which reports what is installed and which backends run here."""

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
from fastkd.compat import ADAPTERS

SWITCHES = {
    "FASTKD_BACKEND": "a backend that overrides the argument of every call",
    "FASTKD_STRICT": "1: falling back to the portable backend raises BackendUnavailable",
    "FASTKD_CHECK": "1: wait for the device, and raise for an invalid label or temperature",
    "TRITON_INTERPRET": "1, set before triton is imported: the triton backend runs on CPU tensors, slowly",
}

ROLES = {
    "portable": "plain PyTorch, the fallback of backend='auto'",
    "reference": "slow; the others are tested against it",
}


def devices() -> list[str]:
    """Return the device types that torch can use here and that a backend may serve."""
    types = ["cpu"]
    if torch.cuda.is_available():
        types.append("cuda")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        types.append("xpu")
    return types


def obstacle(
    backend: str, device: str, divergence: fastkd.Divergence | None = None
) -> registry.Obstacle | None:
    """Return why a backend cannot serve float32 logits on a device, or None if it can."""
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
    """Describe the native extension, with the record of its build from _build.json."""
    facts: dict[str, Any] = {
        "available": fastkd.available_backends()["cpu"] is None,
        "instruction_set": None,
        "instruction_sets": [],
        "build": None,
    }
    if facts["available"]:
        extension = importlib.import_module("fastkd._C")
        facts["instruction_set"] = extension.instruction_set()
        facts["instruction_sets"] = list(extension.instruction_sets())
    record = Path(__file__).parents[1] / "_build.json"
    if record.is_file():
        facts["build"] = json.loads(record.read_text())
    return facts


def _backend(name: str) -> dict[str, Any]:
    """Describe on which devices a backend runs, or if it runs on none the reason and a remedy."""
    obstacles = {device: obstacle(name, device) for device in devices()}
    served = [device for device, why in obstacles.items() if why is None]
    why = None if served else list(obstacles.values())[-1]  # on a machine with a GPU, why not there
    return {
        "installed": fastkd.available_backends()[name] is None,
        "devices": served,
        "reason": why.reason if why else None,
        "remedy": why.remedy if why else None,
    }


def _adapters() -> dict[str, dict[str, str | None]]:
    """Describe the adapters of fastkd.compat: the package of each stack, the tested version and the installed one."""
    return {
        name: {"package": each.package, "tested": each.tested, "installed": each.installed}
        for name, each in ADAPTERS.items()
    }


def _adapter_lines(adapters: dict[str, dict[str, str | None]]) -> list[str]:
    """List the stacks that are installed. A version other than the tested one may compute other losses."""
    installed = {name: each for name, each in adapters.items() if each["installed"]}
    lines = columns(
        (
            f"fastkd.compat.{name}",
            f"{each['package']} {each['installed']}",
            "tested with this version"
            if each["installed"] == each["tested"]
            else f"not tested with this version, but with {each['tested']}",
        )
        for name, each in installed.items()
    )
    absent = [
        str(each["package"])
        for each in adapters.values()
        if each["package"] and not each["installed"]
    ]
    return lines + ([f"  not installed: {', '.join(absent)}"] if absent else [])


def _serving() -> list[dict[str, Any]]:
    """Return which backend backend="auto" chooses for each kind of tensor, and why if it is not the preferred one."""
    override = os.environ.get("FASTKD_BACKEND")
    available = registry.available_backends()
    choices = []
    for device in devices():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            call = registry.Request(device, dtype, dtype, fastkd.forward_kl())
            chosen: str | None
            if override is not None and override in available:
                obstacle = registry.obstacle(override, call, available)
                chosen = override if obstacle is None else None
                why = f"FASTKD_BACKEND={override}"
                why += "" if obstacle is None else f", but {obstacle.reason}. {obstacle.remedy}"
            else:
                chosen, fallback = registry.choose(call, available)
                why = fallback or ""
            choices.append(
                {
                    "device": device,
                    "dtype": str(dtype).removeprefix("torch."),
                    "backend": chosen,
                    "why": why or None,
                }
            )
    return choices


def collect() -> dict[str, Any]:
    """Return the facts that `info` prints, ready for JSON."""
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
        "adapters": _adapters(),
        "environment": {
            name: {"value": os.environ.get(name), "meaning": meaning}
            for name, meaning in SWITCHES.items()
        },
    }


def columns(rows: Iterable[Sequence[str]], indent: str = "  ") -> list[str]:
    """Format rows as lines with aligned columns."""
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


def text(facts: dict[str, Any]) -> str:
    """Format the result of :func:`collect` for people."""
    versions, machine, native = facts["versions"], facts["machine"], facts["native"]
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
    for name, backend in facts["backends"].items():
        if backend["devices"]:
            role = f" ({ROLES[name]})" if name in ROLES else ""
            lines.append(f"  {name:<10} runs on {', '.join(backend['devices'])}{role}")
        else:
            state = "no device to run on" if backend["installed"] else "missing"
            lines += [
                f"  {name:<10} {state}: {backend['reason']}",
                f"  {'':<10} {backend['remedy']}",
            ]
    lines += ["", "backend='auto' chooses"]
    lines += columns(
        (
            f"{served['dtype']} on {served['device']}",
            served["backend"] or "none",
            served["why"] or "",
        )
        for served in facts["serves"]
    )
    lines += ["", "adapters of other stacks", *_adapter_lines(facts["adapters"])]
    lines += ["", "environment"]
    lines += columns(
        (name, switch["value"] or "unset", switch["meaning"])
        for name, switch in facts["environment"].items()
    )
    return "\n".join(lines)
