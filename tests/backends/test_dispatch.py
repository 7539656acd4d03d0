"""Which backend serves a call, which message a fallback has, and what an import loads."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.accuracy import logits, ran_on
from torch import Tensor

import fastkd
from fastkd import BackendUnavailable, kd_loss
from fastkd.backends import registry
from fastkd.backends.registry import Obstacle, Request, choose
from fastkd.tools import doctor, info

ALL: Mapping[str, Obstacle | None] = dict.fromkeys(
    ("cpu", "triton", "cuda", "portable", "reference")
)
NO_COMPILER = Obstacle("no compiler", "Install one")
NO_TRITON = Obstacle("no triton", "pip install it")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def _theirs(p: Any, q: Any, log_p: Any, log_q: Any) -> tuple[Any, Any]:
    return p * (log_p - log_q), -p


THEIRS = fastkd.Divergence("theirs", _theirs)
KL = fastkd.forward_kl()


@pytest.fixture
def undecided() -> Iterator[None]:
    """Clear the caches of available backends, choices and log lines."""

    def forget() -> None:
        for cached in (registry.available_backends, registry._select, registry._log_once):
            cached.cache_clear()

    forget()
    yield
    forget()


# The table


@pytest.mark.parametrize(
    ("call", "available", "chosen", "why"),
    [
        (Request("cpu", F32, F32, KL), ALL, "cpu", None),
        (Request("cpu", BF16, F16, KL), ALL, "cpu", None),
        (Request("cuda", F32, F32, KL), ALL, "triton", None),
        (Request("xpu", BF16, F32, KL), ALL, "triton", None),
        # Triton compiles user-defined divergences; the extension has only those of the table.
        (Request("cuda", F32, F32, THEIRS), ALL, "triton", None),
        (
            Request("cpu", F32, F32, THEIRS),
            ALL,
            "portable",
            "cpu: divergence 'theirs' is not compiled",
        ),
        # The extension compiles the definition of tvd for probabilities alone, and that of squared_error for both.
        (
            Request("cpu", F32, F32, replace(fastkd.tvd(), normalized=False)),
            ALL,
            "portable",
            "cpu: divergence 'tvd' has normalized=False, for which its definition is not compiled",
        ),
        (Request("cuda", F32, F32, replace(fastkd.tvd(), normalized=False)), ALL, "triton", None),
        (Request("cpu", F32, F32, fastkd.squared_error()), ALL, "cpu", None),
        (
            Request("cpu", F32, F32, replace(fastkd.squared_error(), normalized=True)),
            ALL,
            "cpu",
            None,
        ),
        (
            Request("cpu", F64, F32, KL),
            ALL,
            "portable",
            "cpu: student_logits is torch.float64, and its kernels take",
        ),
        (
            Request("cpu", F32, F64, KL),
            ALL,
            "portable",
            "cpu: teacher is torch.float64, and its kernels take",
        ),
        (Request("cuda", F64, F64, KL), ALL, "portable", "triton: student_logits is torch.float64"),
        (
            Request("mps", F32, F32, KL),
            ALL,
            "portable",
            "triton: the logits are on 'mps'. Move them to a GPU",
        ),
        (
            Request("cpu", F32, F32, KL),
            ALL | {"cpu": NO_COMPILER},
            "portable",
            "cpu: no compiler. Install one",
        ),
        (
            Request("cuda", F32, F32, KL),
            ALL | {"triton": NO_TRITON},
            "portable",
            "triton: no triton. pip install it",
        ),
        # Obstacles on another device do not matter.
        (Request("cpu", F32, F32, KL), ALL | {"triton": NO_TRITON}, "cpu", None),
        (Request("cuda", F32, F32, KL), ALL | {"cpu": NO_COMPILER}, "triton", None),
    ],
)
def test_choose(
    call: Request, available: Mapping[str, Obstacle | None], chosen: str, why: str | None
) -> None:
    name, reason = choose(call, available)
    assert name == chosen
    assert reason == why or (reason is not None and why is not None and reason.startswith(why))


def test_every_divergence_of_the_table_is_compiled() -> None:
    made = [make() for make in fastkd.DIVERGENCES.values()]
    made += [
        fastkd.alpha_beta(*limit) for limit in ((1.0, 0.0), (0.0, 1.0), (0.5, -0.5), (0.0, 0.0))
    ]
    for divergence in made:
        assert choose(Request("cpu", F32, F32, divergence), ALL) == ("cpu", None), divergence.name


def test_available_backends() -> None:
    available = fastkd.available_backends()
    assert set(available) == set(ALL) and available["portable"] is available["reference"] is None
    assert all(why is None or (why.reason and why.remedy) for why in available.values())


# What a call does


@pytest.mark.usefixtures("undecided")
def test_auto_chooses_the_kernels(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extension is built, it runs; `backend` fails here where it is not."""
    ran = ran_on(monkeypatch, "portable", *({"cpu"} & {backend}))
    monkeypatch.setenv("FASTKD_STRICT", "0")
    if backend == "portable":
        monkeypatch.setattr(registry, "_cpu_obstacle", lambda: NO_COMPILER)
    student = logits(3, 9, seed=1).requires_grad_()
    kd_loss(student, logits(3, 9, seed=2)).backward()
    assert ran == [backend]


@pytest.mark.usefixtures("undecided")
def test_a_fallback_is_logged_once_with_its_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_cpu_obstacle", lambda: NO_COMPILER)
    with caplog.at_level(logging.WARNING, logger="fastkd"):
        for rows in (1, 2, 3):
            kd_loss(logits(rows, 9, seed=3), logits(rows, 9, seed=4))
        kd_loss(logits(3, 9, seed=3), logits(3, 9, seed=4), divergence="jsd")
        kd_loss(logits(3, 9, seed=3).bfloat16(), logits(3, 9, seed=4))
    assert [record.getMessage() for record in caplog.records] == [
        "fastkd falls back to the portable backend (cpu: no compiler. Install one)"
    ]


@pytest.mark.usefixtures("undecided")
def test_each_reason_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_cpu_obstacle", lambda: None)
    student, teacher = logits(3, 9, seed=5), logits(3, 9, seed=6)
    with caplog.at_level(logging.WARNING, logger="fastkd"):
        kd_loss(student.double(), teacher)
        kd_loss(student, teacher.double())
        kd_loss(student, teacher, divergence=THEIRS)
        kd_loss(student, teacher, divergence=THEIRS, temperature=2.0)
    reasons = [record.getMessage() for record in caplog.records]
    assert len(reasons) == 3
    assert (
        "student_logits is torch.float64" in reasons[0] and "teacher is torch.float64" in reasons[1]
    )
    assert "divergence 'theirs' is not compiled into the extension" in reasons[2]


@pytest.mark.usefixtures("undecided")
def test_strict_makes_a_fallback_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_cpu_obstacle", lambda: NO_COMPILER)
    monkeypatch.setenv("FASTKD_STRICT", "1")
    student, teacher = logits(3, 9, seed=7), logits(3, 9, seed=8)
    with pytest.raises(BackendUnavailable) as error:
        kd_loss(student, teacher)
    assert "FASTKD_STRICT=1 forbids the fallback to portable" in str(error.value)
    assert "no compiler. Install one" in str(error.value)
    kd_loss(student, teacher, backend="reference")  # requested, so it is not a fallback
    monkeypatch.setenv("FASTKD_STRICT", "0")
    kd_loss(student, teacher)


@pytest.mark.parametrize("version", ["3.4.0", "3.5.0", "3.10.1+git", "4.0.0"])
def test_an_old_triton_is_an_obstacle(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(registry.importlib.metadata, "version", lambda name: version)
    obstacle = registry._triton_obstacle()
    if version != "3.4.0":
        assert obstacle is None
    else:
        assert (
            obstacle is not None and "triton 3.4.0" in obstacle.reason and "3.5" in obstacle.reason
        )


@pytest.mark.usefixtures("undecided")
def test_a_backend_requested_by_name_runs_or_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = logits(3, 9, seed=9), logits(3, 9, seed=10)
    monkeypatch.setattr(registry, "_cpu_obstacle", lambda: NO_COMPILER)
    monkeypatch.setattr(registry, "_triton_obstacle", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable) as error:
        kd_loss(student, teacher, backend="cpu")
    assert str(error.value) == "backend 'cpu' is unavailable: no compiler. Install one"
    assert (error.value.backend, error.value.reason, error.value.remedy) == (
        "cpu",
        "no compiler",
        "Install one",
    )
    with pytest.raises(
        BackendUnavailable, match="backend 'triton' is unavailable: the logits are on 'cpu'"
    ):
        kd_loss(student, teacher, backend="triton")
    with pytest.raises(BackendUnavailable, match="student_logits is torch.float64"):
        kd_loss(student.double(), teacher, backend="triton")
    with pytest.raises(ValueError) as wrong:
        kd_loss(student, teacher, backend="gpu")
    assert (
        str(wrong.value)
        == "backend must be 'auto' or one of cpu, triton, cuda, portable, reference; got 'gpu'"
    )


@pytest.mark.parametrize(
    ("call", "capabilities", "reason"),
    [
        (Request("cuda", F32, BF16, KL), {90}, None),
        (Request("cuda", F32, BF16, KL), {90, 100}, None),
        (Request("cuda", F32, BF16, KL), {103}, None),  # runs the code for 10.0
        (Request("cuda", F32, BF16, KL), {110}, None),  # compiles the PTX
        (
            Request("cuda", F32, BF16, KL),
            {80, 90},
            None,
        ),  # fastkd.backends.cuda checks the tensors' own device
        (
            Request("cuda", F32, BF16, KL),
            {75, 80},
            r"compute capability 7\.5, 8\.0; the kernels need 9\.0 or newer",
        ),
        (Request("cuda", F32, BF16, KL), set(), "no NVIDIA device"),
        (Request("cpu", F32, F32, KL), set(), "the logits are on 'cpu'"),
        (Request("cuda", F64, F32, KL), {90}, "student_logits is torch.float64"),
        (Request("cuda", F32, F32, THEIRS), {90}, "'theirs' is not compiled"),
    ],
)
def test_where_the_cuda_kernels_run(
    call: Request, capabilities: set[int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_capabilities", lambda: capabilities)
    monkeypatch.setattr(registry, "least_capability", lambda: 90)
    monkeypatch.setattr(registry, "_cuda_versions", lambda: (13000, 13000))
    why = registry.obstacle("cuda", call, ALL)
    assert (why is None) == (reason is None)
    assert why is None or (re.search(reason, why.reason) and why.remedy)


def test_amd_devices_have_no_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm's torch says (9, 4) of an MI300."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert registry._capabilities() == set()
    monkeypatch.setattr(torch.version, "hip", None)
    assert registry._capabilities() == {94}


@pytest.mark.parametrize(
    ("runtime", "driver", "reason"),
    [
        (13000, 13000, None),
        (13010, 13000, None),  # a driver runs every runtime of its major version
        (12080, 13000, None),
        (13000, 0, None),  # no driver
        (13000, 12080, r"runs up to CUDA 12\.8, .* with CUDA 13\.0, which needs driver 580"),
        (12090, 11080, r"runs up to CUDA 11\.8, .* with CUDA 12\.9, which needs driver 525"),
        (14000, 13020, r"runs up to CUDA 13\.2, .* with CUDA 14\.0, which needs a newer driver"),
    ],
)
def test_an_old_driver_is_an_obstacle(
    runtime: int, driver: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call and the doctor both report it, before the kernel fails to launch."""
    monkeypatch.setattr(registry, "_cuda_versions", lambda: (runtime, driver))
    monkeypatch.setattr(registry, "_capabilities", lambda: {90})
    monkeypatch.setattr(registry, "least_capability", lambda: 90)
    monkeypatch.setattr(registry, "available_backends", lambda: ALL)
    why = registry.obstacle("cuda", Request("cuda", F32, F32, KL), ALL)
    assert (why is None) == (reason is None)
    if reason is None:
        return
    registry._select.cache_clear()
    with pytest.raises(fastkd.BackendUnavailable, match=reason):
        fastkd.kd_loss(torch.zeros(1, 3), torch.zeros(1, 3), backend="cuda")
    registry._select.cache_clear()
    monkeypatch.setattr(doctor, "devices", lambda: ["cpu", "cuda"])
    (skipped,) = doctor.examine("cuda")["not_run"]
    assert re.search(reason, skipped["reason"]) and "Update the driver" in skipped["remedy"]


def test_doctor_and_info_give_the_reason_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that the kernels do not take CPU tensors."""
    monkeypatch.setattr(registry, "_cuda_versions", lambda: (13000, 13000))
    monkeypatch.setattr(registry, "_capabilities", lambda: {80})
    monkeypatch.setattr(registry, "least_capability", lambda: 90)
    monkeypatch.setattr(registry, "available_backends", lambda: ALL)
    monkeypatch.setattr(fastkd, "available_backends", lambda: ALL)
    monkeypatch.setattr(doctor, "devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(info, "devices", lambda: ["cpu", "cuda"])
    assert "8.0" in doctor.examine("cuda")["not_run"][0]["reason"]
    assert "8.0" in info._backend("cuda")["reason"]


@pytest.mark.usefixtures("undecided")
def test_missing_cuda_kernels_are_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastkd._cuda", None)
    built = {"cuda_obstacle": {"reason": "nvcc was not found", "remedy": "Install CUDA"}}
    for record, reason in ((built, "nvcc was not found"), ({}, "the native extension is missing")):
        monkeypatch.setattr(registry, "_built", lambda record=record: record)
        registry.available_backends.cache_clear()
        why = fastkd.available_backends()["cuda"]
        assert why is not None and why.reason.startswith(reason) and why.remedy


@pytest.mark.usefixtures("undecided")
def test_a_missing_extension_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastkd._C", None)
    monkeypatch.setattr(registry, "_built", dict)
    registry.available_backends.cache_clear()
    why = fastkd.available_backends()["cpu"]
    assert (
        why is not None
        and why.reason == "this is a source checkout, and its extension has not been built"
    )
    assert "make build" in why.remedy


@pytest.mark.usefixtures("undecided")
def test_the_backend_of_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    triton: list[Obstacle | None] = [None]
    monkeypatch.setattr(registry, "_cpu_obstacle", lambda: None)
    monkeypatch.setattr(registry, "_triton_obstacle", lambda: triton[0])
    monkeypatch.setattr(registry, "interpreting", lambda: False)

    def chosen(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        return registry.select_logprobs(device, dtype)

    assert chosen(cpu) == "cpu" and chosen(cuda) == "triton"
    for device in (cpu, cuda):
        assert chosen(device, torch.float64) == "portable"
    for name in ("portable", "reference"):
        monkeypatch.setenv("FASTKD_BACKEND", name)
        for device in (cpu, cuda):
            assert chosen(device) == chosen(device, torch.float64) == name
    monkeypatch.setenv("FASTKD_BACKEND", "triton")
    assert chosen(cpu) == "cpu" and chosen(cuda) == "triton"
    monkeypatch.setattr(registry, "interpreting", lambda: True)
    assert chosen(cpu) == "triton" and chosen(cpu, torch.float64) == "portable"
    monkeypatch.delenv("FASTKD_BACKEND")
    assert chosen(cpu) == "cpu"
    triton[0] = NO_TRITON
    registry.available_backends.cache_clear()
    assert chosen(cuda) == "portable"
    monkeypatch.setenv("FASTKD_STRICT", "1")
    assert chosen(cuda, torch.float64) == "portable"
    with pytest.raises(BackendUnavailable, match="forbids the fallback to portable.*no triton"):
        chosen(cuda)


@pytest.mark.usefixtures("undecided")
def test_fastkd_backend_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_cpu_obstacle", lambda: NO_COMPILER)
    ran = ran_on(monkeypatch, "reference", "portable")
    student, teacher = logits(3, 9, seed=11), logits(3, 9, seed=12)
    monkeypatch.setenv("FASTKD_BACKEND", "reference")
    kd_loss(student, teacher, backend="cpu")
    kd_loss(student, teacher)
    assert ran == ["reference"] * 2
    monkeypatch.setenv("FASTKD_BACKEND", "cpu")
    with pytest.raises(BackendUnavailable, match="backend 'cpu' is unavailable: no compiler"):
        kd_loss(student, teacher, backend="reference")
    monkeypatch.setenv("FASTKD_BACKEND", "gpu")
    with pytest.raises(ValueError) as error:
        kd_loss(student, teacher)
    assert (
        str(error.value)
        == "FASTKD_BACKEND must be 'auto' or one of cpu, triton, cuda, portable, reference; got 'gpu'"
    )
    monkeypatch.setenv("FASTKD_BACKEND", "")
    kd_loss(student, teacher)
    assert ran == ["reference"] * 2 + ["portable"]


@pytest.mark.parametrize(
    "error", [RuntimeError("launch failed"), MemoryError(), FloatingPointError("NaN")]
)
def test_an_error_does_not_cause_a_fallback(
    backend: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(registry.load(backend), "kd_rows", fails)
    monkeypatch.setattr(registry, "choose", lambda *_: (backend, None))
    registry._select.cache_clear()
    with pytest.raises(type(error)) as raised:
        kd_loss(logits(3, 9, seed=13), logits(3, 9, seed=14))
    assert raised.value is error
    registry._select.cache_clear()


def test_a_broken_backend_does_not_cause_a_fallback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backend's module exists, but raises when it is imported."""

    def broken(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(registry, "load", broken)
    with pytest.raises(ImportError, match="no reference"):
        kd_loss(logits(3, 9, seed=13), logits(3, 9, seed=14), backend="reference")


def test_nan_in_the_result_does_not_cause_a_fallback(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = ran_on(monkeypatch, *{"reference", backend})
    student: Tensor = torch.full((2, 5), torch.nan)
    assert kd_loss(student, student.clone(), backend=backend).isnan()
    assert ran == [backend]


# Importing


def _python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    return done.stdout.strip()


def test_importing_fastkd_loads_only_torch() -> None:
    """bench/studies/imports.py measures how long an import takes; what it may load is the same on any machine."""
    say = "print(*__import__('sys').modules)"
    before, after = _python(f"import torch; {say}; import fastkd; {say}").splitlines()
    with_torch = set(before.split())
    added = set(after.split()) - with_torch
    packages = {module.partition(".")[0] for module in added}
    assert packages - sys.stdlib_module_names == {"fastkd"}
    at_first_use = {
        *registry.MODULES.values(),
        "fastkd._C",
        "fastkd._cuda",
        "fastkd.backends.native",
    }
    at_first_use |= {f"fastkd.{name}" for name in ("kernels", "compat", "cache", "parallel")}
    assert not added & at_first_use
    assert not with_torch & {"triton", "transformers"}, (
        "torch itself loads what this is to rule out"
    )


def test_submodules_are_imported_on_first_use() -> None:
    code = "import fastkd; print(fastkd.parallel.num_items.__name__, fastkd.teachers.cache.TeacherCache.__name__)"
    assert _python(code).split() == ["num_items", "TeacherCache"]
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = fastkd.nothing
