"""Every divergence of the table, timed by pytest-benchmark, to see whether a change made one slower.

    python -m pytest bench --benchmark-only --benchmark-save=before
    python -m pytest bench --benchmark-only --benchmark-compare --benchmark-compare-fail=min:10%

The least time is compared, which other work on the machine disturbs least. Sizes are small, so that
the whole table takes a minute or two: bench/loss.py has the sizes of real models and the contenders.
pytest collects tests/ by itself, and this only where it is named.
"""

from __future__ import annotations

import pytest
import torch
from contenders import DTYPES, Inputs, fastkd_loss, from_definition, random_logits
from pytest_benchmark.fixture import BenchmarkFixture

import fastkd

# 8 x 1,000: what a call costs whatever its size. 32 x 32,000: the kernels; the last block of a row is not full.
SHAPES = {"call": (8, 1_000), "kernel": (32, 32_000)}
LIMITS = {"min_rounds": 20, "max_time": 0.25, "warmup": True}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return SHAPES[request.param]


@pytest.fixture(params=DTYPES)
def inputs(request: pytest.FixtureRequest, shape: tuple[int, int]) -> Inputs:
    return Inputs(*random_logits(*shape, dtype=DTYPES[request.param]))


@pytest.mark.parametrize("name", fastkd.DIVERGENCES)
@pytest.mark.benchmark(group="forward and gradient", **LIMITS)
def test_step(benchmark: BenchmarkFixture, inputs: Inputs, name: str) -> None:
    loss = fastkd_loss(from_definition(fastkd.DIVERGENCES[name]()))

    def step() -> None:
        inputs.drop_gradients()
        inputs.step(loss)

    benchmark(step)
    assert inputs.student.grad is not None
    assert inputs.student.grad.isfinite().all()


@pytest.mark.parametrize("name", fastkd.DIVERGENCES)
@pytest.mark.benchmark(group="forward alone", **LIMITS)
def test_forward(benchmark: BenchmarkFixture, inputs: Inputs, name: str) -> None:
    loss = fastkd_loss(from_definition(fastkd.DIVERGENCES[name]()))
    student = inputs.student.detach()
    value = benchmark(lambda: loss(student, inputs.teacher))
    assert torch.isfinite(value)
