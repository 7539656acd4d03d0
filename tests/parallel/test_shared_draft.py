"""Losses of draft models over processes that share both vocabularies: equal to one process's, value and gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import spread_draft
from support.processes import Processes


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Four processes, of which a test uses two or four."""
    pool = Processes(4)
    yield pool
    pool.stop()


@pytest.mark.parametrize(
    ("shares", "dtype", "subset", "losses"),
    [
        ((1.0, 1.0), torch.float32, True, spread_draft.EVERY),
        ((1.0, 3.0), torch.bfloat16, True, {"cross_entropy": 0.1, "tvd": 0.9}),
        ((1.0, 1.0), torch.float64, False, spread_draft.EVERY),
        ((2.0, 0.0, 1.0, 1.5), torch.float32, True, {"forward_kl": 1.0, "jsd": 0.0, "nla": 0.0}),
        ((1.0, 2.0), torch.float16, True, {"lk_hybrid": 1.0, "nla": 0.5}),
        ((2.0, 1.0), torch.float32, False, {"reverse_kl": 1.0}),
    ],
)
def test_values_and_gradients_of_logits(
    processes: Processes,
    shares: tuple[float, ...],
    dtype: torch.dtype,
    subset: bool,
    losses: dict[str, Any],
) -> None:
    size = len(shares)
    assert all(processes.run(size, spread_draft.of_logits, shares, dtype, subset, losses))


@pytest.mark.parametrize(
    ("shares", "dtype", "reduction", "linear"),
    [
        ((1.0, 1.0), torch.float32, "mean", True),
        ((1.0, 3.0), torch.bfloat16, "none", True),
        ((2.0, 0.0, 1.0, 1.5), torch.float64, "none", True),
        ((1.0, 2.0), torch.float32, "sum", False),
        ((1.0, 1.0), torch.float16, "mean", False),
    ],
)
def test_values_and_gradients_of_heads(
    processes: Processes,
    shares: tuple[float, ...],
    dtype: torch.dtype,
    reduction: str,
    linear: bool,
) -> None:
    size = len(shares)
    assert all(processes.run(size, spread_draft.of_heads, shares, dtype, reduction, linear))


def test_excluded_tokens(processes: Processes) -> None:
    assert all(processes.run(2, spread_draft.excluded))


def test_messages(processes: Processes) -> None:
    for found in processes.run(2, spread_draft.messages):
        eta, losses, mask, shape, reduction, outside = found
        assert "eta is 1.0 on process 0, 2.0 on process 1" in eta
        assert "losses is {'tvd': 1.0} on process 0, {'tvd': 2.0} on process 1" in losses
        assert "mask must have one value a row" in mask
        assert "draft_to_target must be [" in shape
        assert "whether the loss is one number" in reduction
        assert outside == "nan"
