"""Log-probabilities over processes that share the vocabulary, held to the same float64 formulas as one process's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import spread_logprobs
from support.processes import Processes


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Four processes, of which a test uses two or four."""
    pool = Processes(4)
    yield pool
    pool.stop()


@pytest.mark.parametrize(
    ("size", "shares", "form", "dtype"),
    [
        (2, (1.0, 1.0), "plain", torch.float32),
        (2, (1.0, 3.0), "plain", torch.bfloat16),
        (4, (2.0, 0.0, 1.0, 1.5), "plain", torch.float32),  # the second process has no column
        (4, (1.0, 1.0, 1.0, 1.0), "plain", torch.float64),
        (2, (2.0, 1.0), "sequence", torch.bfloat16),
        (2, (1.0, 1.0), "dtensor", torch.float32),
        (2, (1.0, 1.0), "dtensor, sequence", torch.float16),
    ],
)
def test_values_and_gradients(
    processes: Processes, size: int, shares: tuple[float, ...], form: str, dtype: torch.dtype
) -> None:
    assert (
        processes.run(size, spread_logprobs.values_and_gradients, shares, form, dtype) == [5] * size
    )


@pytest.mark.parametrize("shares", [(1.0, 1.0), (1.0, 4.0), (2.0, 0.0, 1.0, 1.5)])
def test_padding_ties_and_large_k(processes: Processes, shares: tuple[float, ...]) -> None:
    assert all(processes.run(len(shares), spread_logprobs.padded, shares))


def test_logits_far_apart(processes: Processes) -> None:
    assert all(processes.run(4, spread_logprobs.far_apart))


def test_messages(processes: Processes) -> None:
    for found in processes.run(2, spread_logprobs.messages):
        k, temperature, large, mask = found
        assert "topk is 2 on process 0, 3 on process 1" in k
        assert "temperature is 1.0 on process 0, 2.0 on process 1" in temperature
        assert "topk must be at most 61, the size of the vocabulary; got 62" in large
        assert "mask must have one value a row" in mask


def test_a_head_sharded_by_fsdp(processes: Processes) -> None:
    assert all(processes.run(2, spread_logprobs.sharded_by_fsdp))


def test_under_a_compiler(processes: Processes) -> None:
    for error in processes.run(2, spread_logprobs.compiled):
        assert "torch.compiler.disable" in error or "disable" in error
