"""Supports: TopK.sampled, TopK.union and support_union, against loops over rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastkd import TopK, kd_loss, support_union


def draws(rows: int, count: int, columns: int, seed: int) -> Tensor:
    """Sampled tokens, some of them padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(columns, (rows, count), generator=generator)
    return torch.where(torch.rand(rows, count, generator=generator) < 0.2, -1, ids)


def shares(ids: list[int], weights: list[float]) -> dict[int, float]:
    total = sum(weight for token, weight in zip(ids, weights, strict=True) if token >= 0)
    found: dict[int, float] = {}
    for token, weight in zip(ids, weights, strict=True):
        if token >= 0:
            found[token] = found.get(token, 0.0) + weight / total
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 1000), st.booleans())
def test_sampled_counts_every_token_once(count: int, columns: int, seed: int, weigh: bool) -> None:
    ids = draws(4, count, columns, seed)
    weights = torch.rand(4, count, generator=torch.Generator().manual_seed(seed)) + 0.1
    teacher = TopK.sampled(ids, weights if weigh else None)
    assert teacher.ids.shape == teacher.logprobs.shape == ids.shape
    each = (weights if weigh else torch.ones_like(weights)).tolist()
    for row in range(4):
        listed = [
            (token, math.exp(logprob))
            for token, logprob in zip(teacher.ids[row].tolist(), teacher.logprobs[row].tolist(), strict=True)
            if token >= 0
        ]  # fmt: skip
        assert len(dict(listed)) == len(listed)  # distinct
        assert dict(listed) == pytest.approx(shares(ids[row].tolist(), each[row]), rel=1e-5)


def test_the_gradient_of_sampled_tokens_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    p = torch.randn(6, generator=generator, dtype=torch.float64).softmax(-1)
    dense = torch.autograd.grad(kd_loss(student, p.log()[None]), student)[0]
    many = 4000
    ids = torch.multinomial(p.expand(many, -1), 5, replacement=True, generator=generator)
    rows = student.detach().expand(many, -1).clone().requires_grad_()
    (each,) = torch.autograd.grad(kd_loss(rows, TopK.sampled(ids)), rows)
    assert (each.sum(0) - dense[0]).abs().max() < 4 * 0.5 / math.sqrt(5 * many)
    # Samples of another distribution r, with the weights p / r.
    r = (p.log() / 2).softmax(-1)
    ids = torch.multinomial(r.expand(200, -1), 4000, replacement=True, generator=generator)
    teacher = TopK.sampled(ids, (p / r)[ids])
    rows = student.detach().expand(200, -1).clone().requires_grad_()
    (each,) = torch.autograd.grad(kd_loss(rows, teacher), rows)
    assert (each.sum(0) - dense[0]).abs().max() < 5e-3


def test_rows_without_samples_are_dropped() -> None:
    ids = torch.tensor([[3, 3, 1], [-1, -1, -1]])
    student = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    losses = kd_loss(student, TopK.sampled(ids), reduction="none")
    assert losses[1] == 0 and torch.isfinite(losses).all()
    log_q = student.double().log_softmax(-1)[0]
    exact = sum(p * (math.log(p) - log_q[token]) for token, p in ((3, 2 / 3), (1, 1 / 3)))
    torch.testing.assert_close(losses[0].double(), exact, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 12), st.integers(0, 1000))
def test_support_union(first_k: int, second_k: int, columns: int, seed: int) -> None:
    first, second = draws(3, first_k, columns, seed), draws(3, second_k, columns, seed + 1)
    ids = support_union(first, second.to(torch.int32))
    assert ids.dtype == torch.int64
    for row in range(3):
        both, seen, right = [*first[row].tolist(), *second[row].tolist()], set(), []
        for token in both:
            right.append(-1 if token in seen else token)
            seen.add(token)
        assert ids[row].tolist() == right


def test_union_of_two_lists_of_one_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(4, 20, generator=generator).log_softmax(-1)
    student = torch.randn(4, 20, generator=generator)
    orders = [torch.rand(4, 20, generator=generator).argsort(-1)[:, :k] for k in (3, 5)]
    first, second = (TopK(ids, log_p.gather(-1, ids)) for ids in orders)
    both = TopK.union(first, second)
    assert both.ids.shape == (4, 8)
    alone = support_union(*orders)
    exact = TopK(alone, log_p.gather(-1, alone.clamp(min=0)))
    for divergence in ("forward_kl", "jsd"):
        loss, right = (kd_loss(student, x, divergence=divergence) for x in (both, exact))
        torch.testing.assert_close(loss, right)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TopK.sampled(torch.zeros(2, 3)), "ids must be torch.int64 or torch.int32"),
        (lambda: TopK.sampled(torch.zeros(2, 0, dtype=torch.int64)), r"ids must be \[..., N\] with N > 0"),
        (lambda: TopK.sampled(torch.zeros((), dtype=torch.int64)), r"ids must be \[..., N\] with N > 0"),
        (lambda: TopK.sampled(*_ids(2, 3), torch.ones(2)), "weights must have the shape"),
        (lambda: TopK.sampled(*_ids(2, 3), torch.ones(2, 3, dtype=torch.int64)), "weights must be torch.float32"),
        (lambda: TopK.sampled(*_ids(2, 3), tail="mean"), "tail must be one of"),
        (lambda: support_union(*_ids(2, 3), *_ids(3, 3)), "second must have the leading shape"),
        (lambda: support_union(torch.zeros(2, 3), *_ids(2, 3)), "first must be torch.int64"),
        (lambda: support_union(torch.zeros((), dtype=torch.int64), *_ids(2)), r"first must be \[..., K\]"),
        (lambda: TopK.union(_teacher(), None), "second must be a TopK, got NoneType"),
        (lambda: TopK.union(_teacher(), _teacher(tail="truncate")), "second.tail must equal that of first, 'bucket'"),
        (lambda: TopK.union(_teacher(), _teacher(temperature=2.0)), "second.temperature must equal"),
    ],
)  # fmt: skip
def test_messages(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def _ids(*shape: int) -> tuple[Tensor]:
    return (torch.zeros(shape, dtype=torch.int64),)


def _teacher(**options: Any) -> TopK:
    return TopK(*_ids(2, 1), torch.full((2, 1), -1.0), **options)
