"""The three steps of a loss over vocabulary shards, run for all shards in this process.

tests/parallel/test_parallel.py uses real processes; here every backend's arithmetic must meet the bar of a whole row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.accuracy import check, labels_for, logits
from support.options import ALL, prepared
from support.shards import InShards
from test_divergences import variants
from test_topk import (
    DIVERGENCES,
    TAILS,
    check_topk,
    defined,
    outcomes_of_every_kind,
    sparse,
)

from fastkd import kd_loss
from fastkd.backends import registry

# Relative sizes of the shards: one, two equal ones, and four unequal ones, of which the third has no column.
SHARES = ((1.0,), (1.0, 1.0), (3.0, 1.0, 0.0, 2.0))


@pytest.fixture(params=SHARES, ids=str)
def sharded(
    backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A backend that runs in shards; tests/backends/triton/test_triton_shards.py tests Triton's."""
    kernels = InShards(registry.load(backend), request.param)
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda name: kernels if name == backend else load(name))
    yield backend
    assert kernels.calls


@pytest.mark.pairwise(each="backend")
@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_divergence(
    sharded: str, variant: tuple[str, dict[str, float]], dtype: torch.dtype
) -> None:
    divergence, parameters = variant
    student, teacher = logits(3, 61, seed=1, dtype=dtype), logits(3, 61, seed=2, dtype=dtype)
    labels = labels_for(3, vocabulary=61, seed=3)
    options = {"temperature": 2.0, "alpha": 0.5, "label_smoothing": 0.1}
    check(
        sharded, student, teacher, labels, divergence=divergence, parameters=parameters, **options
    )


@pytest.mark.pairwise(each="backend")
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "squared_error"])
@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
def test_every_option(sharded: str, options: dict[str, Any], divergence: str) -> None:
    labels, options = prepared(options, 4, 3, columns=41, seed=1)
    check(
        sharded,
        logits(4, 3, 43, seed=2),
        logits(4, 3, 43, seed=3),
        labels,
        divergence=divergence,
        **options,
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mixture", "jsd"])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("columns", [slice(0, 20), slice(20, 47), slice(5, 60)], ids=str)
@pytest.mark.parametrize(
    ("masked", "temperature"), [(-torch.inf, 1.0), (torch.finfo(torch.float32).min, 0.5)], ids=str
)
def test_log_0(
    sharded: str,
    divergence: str,
    side: str,
    columns: slice,
    masked: float,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Including whole shards at -inf.
    student, teacher = logits(3, 61, seed=4), logits(3, 61, seed=5)
    if side != "teacher":
        student[:, columns] = masked
    if side != "student":
        teacher[:, columns] = masked

    def run() -> tuple[torch.Tensor, ...]:
        leaf = student.clone().requires_grad_()
        loss = kd_loss(
            leaf, teacher, divergence=divergence, temperature=temperature, backend=sharded,
            reduction="none",
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), gradient

    actual = run()
    monkeypatch.undo()
    expected = run()
    if (
        masked != -torch.inf
    ):  # whether a value is 1e38 or infinite depends on the order of roundings
        large = expected[0].abs() > 1e30
        assert bool((actual[0].abs()[large] > 1e30).all())
        actual, expected = (tuple(x[~large] for x in pair) for pair in (actual, expected))
    torch.testing.assert_close(
        actual, expected, rtol=1e-5, atol=4e-6, equal_nan=True
    )  # entries of 10


@pytest.mark.parametrize("offset", [1e4, -1e4, -1e33])
def test_offsets(sharded: str, offset: float) -> None:
    student, teacher = logits(3, 61, seed=6) + 1e4, logits(3, 61, seed=7) + offset
    check(sharded, student, teacher, labels_for(3, vocabulary=61, seed=8), alpha=0.5)


@pytest.mark.pairwise(each="backend")
@pytest.mark.parametrize(
    ("tail", "divergence", "parameters"),
    [(tail, *variant) for tail in TAILS for variant in DIVERGENCES if defined(tail, variant)],
)
def test_topk(sharded: str, tail: str, divergence: str, parameters: dict[str, float]) -> None:
    check_topk(
        sharded,
        logits(3, 61, seed=9),
        sparse(3, vocabulary=61, k=7, seed=10, tail=tail, at=2.0),
        labels_for(3, vocabulary=61, seed=11),
        divergence=divergence,
        parameters=parameters,
        alpha=0.5,
        temperature=2.0,
        label_smoothing=0.1,
    )


@pytest.mark.parametrize("tail", TAILS)
def test_sparse_rows_of_every_kind(
    sharded: str, tail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without a token, without a given tail, and with NaN give the results of a whole row."""
    actual = outcomes_of_every_kind(tail, sharded)
    monkeypatch.undo()
    whole = outcomes_of_every_kind(tail, sharded)
    torch.testing.assert_close(actual, whole, rtol=1e-5, atol=1e-6, equal_nan=True)
