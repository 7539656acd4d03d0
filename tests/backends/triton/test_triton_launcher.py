"""Launches without Triton's search for the compiled kernel: kernels/launcher.py."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import sys
import textwrap
from typing import Any

import pytest
import torch
from support.interpreters import python

pytest.importorskip("triton")

from fastkd.kernels.kernel import Inputs, Moments
from fastkd.kernels.launcher import traits
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from fastkd.core.tensors import address

CHECKS = (
    "calls_in_any_order",
    "replays",
    "measures_take_no_launch",
    "rows_that_start_alike",
    "other_kernels",
    "settings",
    "devices",
    "amd",
)


@pytest.mark.parametrize("check", CHECKS)
def test_launches_are_those_of_triton(check: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    code = f"from support.triton_launches import CHECKS; CHECKS[{check!r}]()"
    done = python("-c", code, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def values() -> list[Any]:
    memory = torch.ones(64)
    numbers = [0, 1, 2, 15, 16, 48, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63 - 1, 2**63]
    tensors = [
        memory.view(dtype)[at : at + 4]
        for dtype in (torch.float32, torch.bfloat16, torch.int64)
        for at in (0, 1, 8)
    ]
    plain = [None, True, False, 0.0, 1.0, 2.5, float("inf"), *numbers, *tensors]
    pairs = [(a, b) for a in (None, 1, 5, memory) for b in (None, 16, 2.0)]
    return [
        *plain,
        *pairs,
        Inputs(None, None, None),
        Moments(None, None, None),
        (None, None, None),
        ((1, 5), None),
    ]


def test_traits_tell_apart_what_triton_specialises_on() -> None:
    def specialized(value: Any) -> Any:
        return str(native_specialize_impl(CUDABackend, value, False, True, True)), type(
            value
        ) if isinstance(value, tuple) else None

    for first, second in itertools.combinations(values(), 2):
        if specialized(first) != specialized(second):
            assert traits(first) != traits(second), (first, second)


def test_calls_share_a_kernel_where_triton_shares_it() -> None:
    memory = torch.ones(64)
    assert traits(3.0) == traits(4.0) and traits(5) == traits(7) and traits(32) == traits(48)
    assert traits(memory[4:]) == traits(memory[8:]) and address(memory) != address(memory[4:])


def test_the_key_has_every_setting_that_triton_launches_by() -> None:
    """A version of Triton with a new setting turns this red: kernels/launcher.py `state` has to consider it."""
    known = {
        "runtime.debug",
        "runtime.launch_enter_hook",
        "runtime.launch_exit_hook",
        "runtime.add_stages_inspection_hook",
        "compilation.instrumentation_mode",
        "compilation.fpsan_homomorphic_casts",
    }
    tree = ast.parse(textwrap.dedent(inspect.getsource(JITFunction.run)))
    read = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    settings = {
        name.removeprefix("knobs.")
        for name in read
        if name.startswith("knobs.") and name.count(".") == 2
    }
    assert settings and settings <= known
    keywords = {
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and ast.unparse(node.value) == "kwargs"
    }
    assert keywords <= {"debug", "instrumentation_mode", "fpsan_homomorphic_casts"}
