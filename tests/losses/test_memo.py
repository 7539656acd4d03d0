"""Calls that repeat an earlier one: they are not checked again, and nothing that a check would find is missed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from support.accuracy import ran_on
from support.options import TRIED, Sets, prepared
from torch import Tensor, nn

import fastkd
from fastkd import functional, kd_loss
from fastkd.call import memo
from fastkd.call.options import OPTION_NAMES

ROWS, COLUMNS = 6, 11
S, T = torch.randn(2, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, -100, 0, 10, 5, -100])
MASK = torch.tensor([True, True, False, True, True, True])
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0, 1.0])


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that grows by one element for each call that is checked."""
    checked: list[None] = []
    prepare = functional.prepare

    def counting(*arguments: Any, **options: Any) -> Any:
        checked.append(None)
        return prepare(*arguments, **options)

    monkeypatch.setattr(functional, "prepare", counting)
    return checked


def results(*arguments: Any, **options: Any) -> list[Tensor]:
    """The loss, its parts, and the gradient of the student."""
    student = S.clone().requires_grad_()
    loss, parts = kd_loss(student, *arguments, return_parts=True, **options)
    return [loss.detach(), *parts, torch.autograd.grad(loss.sum(), student)[0]]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize(
    "rows",
    [
        {},
        {"labels": LABELS, "alpha": 0.5},
        {"mask": MASK},
        {"weight": WEIGHT},
        {"labels": LABELS, "mask": MASK, "weight": WEIGHT, "alpha": 0.5, "label_smoothing": 0.1},
    ],
    ids=lambda rows: "+".join(rows) or "logits",
)
def test_a_repeated_call_is_not_checked_and_gives_the_same_bits(
    rows: dict[str, Any], reduction: str, any_backend: str, checks: list[None]
) -> None:
    def call() -> list[Tensor]:
        return results(T, reduction=reduction, temperature=2.0, backend=any_backend, **rows)

    first, second = call(), call()
    assert len(checks) == 1
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_new_values_of_rows_are_read() -> None:
    """The number of counted rows, and the rows that are dropped, are those of the call."""
    for labels in (LABELS, torch.full_like(LABELS, 2), torch.full_like(LABELS, -100), LABELS):
        remembered = results(T, labels, alpha=0.5)
        memo.forget()
        for a, b in zip(remembered, results(T, labels, alpha=0.5), strict=True):
            assert torch.equal(a, b)
    for mask in (MASK, ~MASK):
        remembered = results(T, mask=mask)
        memo.forget()
        for a, b in zip(remembered, results(T, mask=mask), strict=True):
            assert torch.equal(a, b)


OTHER_OPTIONS: dict[str, Sets] = {
    "divergence": {"jsd": {"divergence": "jsd"}},
    "reduction": {"sum": {"reduction": "sum"}},
    "num_items": {"num_items": {"num_items": 3}},
    "vocab_size": {"vocab_size": {"vocab_size": COLUMNS - 2}},
    "inplace": {"in place": {"inplace": True}},
}


@pytest.mark.parametrize("name", [*OPTION_NAMES, *OTHER_OPTIONS])
def test_every_option_is_in_the_key(name: str) -> None:
    """A call that differs from a remembered one in this option alone has the results of a first call."""
    sets = OTHER_OPTIONS[name] if name in OTHER_OPTIONS else TRIED[name].sets
    for chosen in sets.values():
        labels, options = prepared(chosen, ROWS, columns=COLUMNS, seed=3)
        kd_loss(S, T, labels, **{other: options[other] for other in options if other != name})
        after_another = kd_loss(S.clone(), T, labels, **options)
        memo.forget()
        assert torch.equal(after_another, kd_loss(S.clone(), T, labels, **options))


class Subclass(Tensor):
    """A tensor of another type."""


VALID: dict[str, Any] = {
    "teacher": T, "labels": LABELS, "mask": MASK, "weight": WEIGHT, "temperature": 1.0, "alpha": 1.0,
    "scale_by_temperature": True, "label_smoothing": 0.0, "ignore_index": 1, "num_items": 1,
    "logit_scale": 1.0, "return_parts": True, "vocab_size": 1,
}  # fmt: skip
# The value of an option that equals the valid one, or a tensor that differs from it, and the error of a full check.
INVALID = [
    ("teacher", T[:, :0], ValueError),
    ("teacher", T[:-1], ValueError),
    ("teacher", T.to(torch.int32), TypeError),
    ("teacher", T.to_sparse(), TypeError),
    ("teacher", T.to("meta"), (TypeError, ValueError)),
    ("labels", LABELS.to(torch.int32), TypeError),
    ("labels", LABELS[:-1], ValueError),
    ("mask", MASK.to(torch.uint8), TypeError),
    ("mask", MASK[None], ValueError),
    ("weight", WEIGHT.clone().requires_grad_(), ValueError),
    ("weight", WEIGHT.to(torch.int64), TypeError),
    ("temperature", True, TypeError),
    ("alpha", True, TypeError),
    ("scale_by_temperature", 1, TypeError),
    ("label_smoothing", False, TypeError),
    ("ignore_index", True, TypeError),
    ("ignore_index", 1.0, TypeError),
    ("num_items", True, TypeError),
    ("logit_scale", True, TypeError),
    ("return_parts", 1, TypeError),
    ("vocab_size", True, TypeError),
    ("temperature", [1.0], TypeError),
    ("inplace", 1, TypeError),
    ("divergence", ["forward_kl"], TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), INVALID)
def test_an_invalid_argument_raises_after_a_valid_call(name: str, value: Any, error: Any) -> None:
    for _ in range(2):
        kd_loss(S, **VALID)
    with pytest.raises(error, match=name):
        kd_loss(S, **VALID | {name: value})


def test_values_are_checked_under_fastkd_check(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = LABELS.clone()
    bad[0] = COLUMNS
    for _ in range(2):
        kd_loss(S, T, bad, alpha=0.5)
    monkeypatch.setenv("FASTKD_CHECK", "1")
    for _ in range(2):
        with pytest.raises(ValueError, match="labels must be in"):
            kd_loss(S, T, bad, alpha=0.5)


def test_the_environment_is_read_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        kd_loss(S, T)
    monkeypatch.setenv("FASTKD_BACKEND", "gpu")
    with pytest.raises(ValueError, match="FASTKD_BACKEND"):
        kd_loss(S, T)


def test_another_backend_runs_once_the_call_or_the_environment_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = ran_on(monkeypatch, "portable", "reference")
    for name in ("reference", "portable"):
        kd_loss(S, T, backend=name)
    for name in ("reference", "portable"):
        monkeypatch.setenv("FASTKD_BACKEND", name)
        for _ in range(2):
            kd_loss(S, T, backend="portable")
    assert ran == ["reference", "portable", "reference", "reference", "portable", "portable"]


def test_a_fallback_raises_as_soon_as_the_environment_forbids_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for _ in range(2):
        kd_loss(S.double(), T.double())
    monkeypatch.setenv("FASTKD_STRICT", "1")
    for _ in range(2):
        with pytest.raises(fastkd.BackendUnavailable, match="FASTKD_STRICT"):
            kd_loss(S.double(), T.double())


def test_equal_options_of_other_types_are_checked_in_turn(checks: list[None]) -> None:
    """True == 1 == 1.0, so the three have one entry."""
    for _ in range(2):
        kd_loss(S, T, temperature=1)
        kd_loss(S, T, temperature=1.0)
        with pytest.raises(TypeError, match="temperature"):
            kd_loss(S, T, temperature=True)
    kd_loss(S, T, temperature=1.0)
    assert len(checks) == 6  # the last call repeats the one that succeeded before it


def test_a_gradient_for_the_teacher_is_checked_by_itself() -> None:
    """The mode of gradients, and whether a tensor requires one, are parts of the key."""
    divergence = fastkd.Divergence("without degree", lambda p, q, log_p, log_q: (p - q, -q))
    options: dict[str, Any] = {"divergence": divergence, "backend": "portable"}
    teacher = T.clone().requires_grad_()
    for _ in range(2):
        kd_loss(S, T, **options)
        with torch.no_grad():
            assert not kd_loss(S, teacher, **options).requires_grad
    with pytest.raises(ValueError, match="degree"):
        kd_loss(S, teacher, **options)
    student = S.clone().requires_grad_()
    with torch.no_grad():
        assert not kd_loss(student, T).requires_grad
    assert kd_loss(student, T).requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"student_logits": S.as_subclass(Subclass)},  # type: ignore[no-untyped-call]
        lambda: {"student_logits": nn.Parameter(S)},
        lambda: {"teacher": T.as_subclass(Subclass)},  # type: ignore[no-untyped-call]
        lambda: {"teacher": fastkd.TopK.from_logits(T, 3)},
        lambda: {"temperature": torch.tensor(2.0)},
        lambda: {"num_items": torch.tensor(2.0)},
        lambda: {"temperature": np.float64(2.0)},
        lambda: {"student_logits": S.clone(), "inplace": True},
    ],
    ids=[
        "subclass",
        "parameter",
        "teacher",
        "topk",
        "temperature",
        "num_items",
        "numpy",
        "inplace",
    ],
)
def test_other_calls_are_checked_each_time(
    make: Callable[[], dict[str, Any]], checks: list[None]
) -> None:
    for _ in range(3):
        kd_loss(**{"student_logits": S, "teacher": T} | make())
    assert len(checks) == 3


def test_a_transformed_tensor_raises_after_a_valid_call() -> None:
    for _ in range(2):
        kd_loss(S, T)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(kd_loss)(S.expand(2, -1, -1), T.expand(2, -1, -1))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(S, torch.ones_like(S))
        with pytest.raises(RuntimeError, match="student_logits"):
            kd_loss(dual, T)


def test_the_memo_holds_no_tensor_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "LIMIT", 5)
    labels, mask, weight = LABELS.clone(), MASK.clone(), WEIGHT.clone()
    gone = [weakref.ref(tensor) for tensor in (labels, mask, weight)]
    for number in range(12):
        kd_loss(S, T, labels, mask=mask, weight=weight, temperature=1.0 + number)
        assert 1 <= len(memo._checked) <= 5
    del labels, mask, weight
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_threads_share_the_memo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "LIMIT", 3)
    temperatures = [1.0 + number for number in range(6)]
    expected = [kd_loss(S, T, temperature=temperature) for temperature in temperatures]
    start = threading.Barrier(4)

    def work(first: int) -> None:
        start.wait()
        for number in range(first, first + 120):
            k = number % len(temperatures)
            assert torch.equal(kd_loss(S, T, temperature=temperatures[k]), expected[k])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
