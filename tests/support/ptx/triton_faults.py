"""Removes each barrier of the Triton kernels' PTX in turn, and prints what shows it.

A process of its own, for $FASTKD_PTX; tests/backends/ptx/test_triton_kernels.py runs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.kernels import launch as kernels
from fastkd.kernels import sparse as sparse_kernels
from fastkd.kernels import split
from support.ptx import planted, triton
from support.ptx.faults import Fault
from support.ptx.program import Program


def _outcome(*arguments: Any, **options: Any) -> list[Tensor]:
    student, *others = arguments
    leaf = student.clone().requires_grad_()
    loss = fastkd.kd_loss(leaf, *others, backend="triton", reduction="sum", **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


def _logits(width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(2, width, generator=generator) for _ in range(2)]


def _dense(divergence: str) -> Callable[[], list[Tensor]]:
    labels = torch.tensor([1, 100])
    return lambda: _outcome(*_logits(301), labels, divergence=divergence, alpha=0.5)


def _sparse() -> list[Tensor]:
    student, teacher = _logits(301)
    return _outcome(student, fastkd.TopK.from_logits(teacher, 9), divergence="jsd")


# Tiles of 128 columns for four warps: rows have two whole tiles and a part of a third.
TILE = 128, 4
CALLS: dict[str, tuple[split.Plan | None, Callable[[], list[Tensor]]]] = {
    "forward_kl": (None, _dense("forward_kl")),
    "jsd": (None, _dense("jsd")),
    "shared rows": (split.Plan(2, 2), _dense("jsd")),
    "sparse teacher": (None, _sparse),
}


def _is_needless(program: Program, site: int) -> bool:
    """Whether a barrier lies between a load and a store of shared memory, in code without branches.

    In Triton's reductions, warps there overwrite words that they alone have read. Which words depends on the threads'
    numbers only. So if the machine sees no race in one run without the barrier, there is none in any run.
    """

    def first(places: range) -> str:
        touched = (program.instructions[k] for k in places)
        names = (
            f"{x.name} {x.has('shared')}" for x in touched if x.name in ("ld", "st", "bra", "bar")
        )
        return next(names, "")

    before, after = range(site - 1, -1, -1), range(site + 1, len(program.instructions))
    return first(before) == "ld True" and first(after) == "st True"


def _seen(call: Callable[[], list[Tensor]], expected: list[Tensor]) -> str:
    try:
        actual = call()
    except Fault as fault:
        return str(fault).splitlines()[0]
    if all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)):
        return "not seen"
    return "other numbers"


def main() -> None:
    launcher = triton.install(int(os.environ["FASTKD_PTX"].removeprefix("sm_")))
    kernels.NARROW = 0  # these rows would otherwise be one tile of one warp, without barriers
    for module in (kernels, sparse_kernels):
        module.tile = lambda *row: TILE
    for name, (plan, call) in CALLS.items():
        kernels.plan = lambda *row, plan=plan: plan
        launcher.kernels.clear()
        expected = call()
        for kernel in list(launcher.kernels.values()):
            program, reached = kernel.program, kernel.reached()
            for site in [place for place in planted.sites(program) if place in reached]:
                text = program.instructions[site].text
                with planted.without(kernel, site):
                    seen = _seen(call, expected)
                if seen == "not seen" and _is_needless(program, site):
                    seen = "needless: warps overwrite what they alone have read"
                print(f"{name}, {program.entry.name} {site} {text} -> {seen}", flush=True)


if __name__ == "__main__":
    main()
