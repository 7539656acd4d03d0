"""The CUDA kernels' own source with the vocabulary in shards, on the host: three launches a shard.

tests/parallel/test_shards.py has what every backend is held to; here is a selection of it, and what only these kernels
have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_shards
import torch
from support.accuracy import check, labels_for, logits
from support.cuda_emulation import Emulation
from support.options import ALL
from support.shards import InShards
from test_divergences import variants
from test_topk import DIVERGENCES, TAILS, check_topk, defined, outcomes_of_every_kind, sparse
from torch import Tensor

import fastkd
from fastkd.backends import registry
from fastkd.backends.registry import BackendUnavailable

INF = math.inf
heavy = pytest.mark.heavy
# The last split is uneven, and one of its shards has no column.
SHARES = [*(pytest.param(x, marks=heavy) for x in test_shards.SHARES[:-1]), test_shards.SHARES[-1]]

# Shares of 3, 1, 0 and 2 give 2560, 853, 0 and 1707 columns: blocks of 256 threads and of 128.
WIDE = 5120


class Sharded:
    """The emulation in shards, and the patches that a test may undo."""

    def __init__(self, emulation: Emulation, patch: pytest.MonkeyPatch) -> None:
        self.emulation, self.patch = emulation, patch


@pytest.fixture(params=SHARES, ids=str)
def sharded(emulation: Emulation, request: pytest.FixtureRequest) -> Iterator[Sharded]:
    """The cuda backend in shards, each over two blocks, until patch.undo()."""
    emulation.ranks = 2
    kernels = InShards(registry.load("cuda"), request.param)
    load = registry.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", lambda name: kernels if name == "cuda" else load(name))
        yield Sharded(emulation, patch)
    assert kernels.calls


@variants
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=heavy)], ids=str
)
def test_every_divergence(
    sharded: Sharded, variant: tuple[str, dict[str, float]], dtype: torch.dtype
) -> None:
    test_shards.test_every_divergence("cuda", variant, dtype)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "squared_error"])
@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
def test_every_option(sharded: Sharded, options: dict[str, Any], divergence: str) -> None:
    test_shards.test_every_option("cuda", options, divergence)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mixture", "jsd"])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("columns", [slice(0, 20), slice(20, 47), slice(5, 60)], ids=str)
@pytest.mark.parametrize(
    ("masked", "temperature"), [(-torch.inf, 1.0), (torch.finfo(torch.float32).min, 0.5)], ids=str
)
def test_log_0(
    sharded: Sharded, divergence: str, side: str, columns: slice, masked: float, temperature: float
) -> None:
    test_shards.test_log_0("cuda", divergence, side, columns, masked, temperature, sharded.patch)


@pytest.mark.parametrize("offset", [1e4, -1e4, -1e33])
def test_offsets(sharded: Sharded, offset: float) -> None:
    test_shards.test_offsets("cuda", offset)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_smoothing_in_shards_without_the_label(sharded: Sharded, offset: float) -> None:
    """The sum of z runs over all shards; far from 0 it must be relative to an origin."""
    student, labels = logits(3, WIDE, seed=1) + offset, torch.tensor([0, WIDE // 2, WIDE - 1])
    options = {"alpha": 0.5, "label_smoothing": 0.3}
    check("cuda", student, logits(3, WIDE, seed=2), labels, **options)
    check_topk("cuda", student, sparse(3, vocabulary=WIDE, k=7, seed=3), labels, **options)


@pytest.mark.parametrize(
    ("tail", "divergence", "parameters"),
    [
        pytest.param(tail, *variant, marks=() if variant[0] in ("forward_kl", "jsd") else heavy)
        for tail in TAILS
        for variant in DIVERGENCES
        if defined(tail, variant)
    ],
)
def test_topk(sharded: Sharded, tail: str, divergence: str, parameters: dict[str, float]) -> None:
    test_shards.test_topk("cuda", tail, divergence, parameters)


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=heavy)])
@pytest.mark.parametrize("divergence", ["forward_kl", "mixture", "jsd"])
def test_wide_rows(sharded: Sharded, divergence: str, ranks: int) -> None:
    """Several rows per cluster, with their own temperatures, some dropped; every process computes the same loss."""
    sharded.emulation.ranks = ranks
    student, teacher = logits(6, WIDE, seed=1), logits(6, WIDE, seed=2)
    labels = labels_for(6, vocabulary=WIDE - 9, seed=4, ignored=0.3)
    labels[1] = -100
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0])
    options: dict[str, Any] = {
        "temperature": torch.tensor([0.5, 1.0, 2.0, 4.0, 0.3, 7.0]), "vocab_size": WIDE - 9,
        "alpha": 0.6, "label_smoothing": 0.1, "softcap": 20.0, "weight": weight,
    }  # fmt: skip
    check("cuda", student, teacher, labels, divergence=divergence, **options)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_more_tokens_than_a_warp_has_lanes(sharded: Sharded, tail: str) -> None:
    student = logits(3, WIDE, seed=1)
    teacher = sparse(3, vocabulary=WIDE, k=77, seed=2, tail=tail)
    labels = labels_for(3, vocabulary=WIDE, seed=3)
    check_topk("cuda", student, teacher, labels, divergence="jsd", alpha=0.5)


@pytest.mark.parametrize("tail", TAILS)
def test_sparse_rows_of_every_kind(sharded: Sharded, tail: str) -> None:
    """Rows without a token, without tail_logprob, and with NaN have the results of whole rows."""
    actual = outcomes_of_every_kind(tail, "cuda")
    sharded.patch.undo()
    whole = outcomes_of_every_kind(tail, "cuda")
    torch.testing.assert_close(actual, whole, rtol=1e-5, atol=1e-6, equal_nan=True)


def _outcome(student: Tensor, teacher: Any, labels: Tensor | None, **options: Any) -> list[Tensor]:
    leaf = student.clone().requires_grad_()
    inputs = leaf * 1 if options.get("inplace") else leaf
    loss, parts = fastkd.kd_loss(
        inputs, teacher, labels, backend="cuda", reduction="none", return_parts=True, **options
    )
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return [loss.detach(), gradient, *parts]


def _as_whole_rows(sharded: Sharded, *arguments: Any, **options: Any) -> list[Tensor]:
    """Check that results in shards and of whole rows agree; return those in shards."""
    actual = _outcome(*arguments, **options)
    sharded.patch.undo()
    whole = _outcome(*arguments, **options)
    torch.testing.assert_close(actual, whole, rtol=1e-5, atol=1e-6, equal_nan=True)
    return actual


@pytest.mark.parametrize("sparsely", [False, True])
def test_invalid_values_poison_their_row(sharded: Sharded, sparsely: bool) -> None:
    """Invalid rows: a label or token outside the vocabulary, a token twice, a bad temperature, -inf in every shard."""
    student, labels = logits(7, 61, seed=1), labels_for(7, vocabulary=61, seed=2)
    teacher: Any = logits(7, 61, seed=3)
    student[5] = -INF
    labels[0], labels[1] = 61, -1
    if sparsely:
        teacher = fastkd.TopK.from_logits(teacher, 5)
        teacher.ids[2, 0], teacher.ids[3, 0] = 61, teacher.ids[3, 1]
    temperature = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    loss, gradient, *_ = _as_whole_rows(
        sharded,
        student,
        teacher,
        labels,
        alpha=0.5,
        temperature=temperature,
        teacher_temperature=1.0,
    )
    bad = [True, True, sparsely, sparsely, True, True, False]
    assert loss.isnan().tolist() == gradient.isnan().all(-1).tolist() == bad


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mixture", "jsd"])
def test_a_shard_at_minus_infinity_where_the_other_side_is_negligible(
    sharded: Sharded, divergence: str
) -> None:
    """The shard's moments would be infinite, so it has none."""
    student, teacher = logits(4, 61, seed=1), logits(4, 61, seed=2)
    student[0, :35], teacher[0, :35] = -INF, teacher[0, :35] - 90
    teacher[1, :35], student[1, :35] = -INF, student[1, :35] - 90
    student[2, :35], teacher[2, :35] = -INF, teacher[2, :35] - 60
    student[3] -= 1e33
    student[3, :35], teacher[3, :35] = -INF, teacher[3, :35] - 75
    loss, *_ = _as_whole_rows(sharded, student, teacher, None, divergence=divergence)
    infinite = divergence in ("forward_kl", "mixture")
    assert loss.isinf().tolist()[:3] == [False, False, infinite]


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_in_place(sharded: Sharded, divergence: str) -> None:
    student, teacher = logits(4, 301, seed=1), logits(4, 301, seed=2)
    labels = labels_for(4, vocabulary=290, seed=3, ignored=0.3)
    options = {"divergence": divergence, "alpha": 0.5, "vocab_size": 290}
    apart = _outcome(student, teacher, labels, **options)
    inside = _outcome(student, teacher, labels, inplace=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(apart, inside, strict=True))


@pytest.mark.parametrize(("divergence", "reads"), [("forward_kl", 1), ("jsd", 2)])
def test_device_memory_traffic(sharded: Sharded, divergence: str, reads: int) -> None:
    """Each launch reads a row once; the last one reads nothing if no gradient is wanted."""
    student, teacher = logits(3, WIDE, seed=1), logits(3, WIDE, seed=2)
    both = student.nbytes + teacher.nbytes
    sharded.emulation.traffic()
    fastkd.kd_loss(student, teacher, divergence=divergence, backend="cuda")
    assert sharded.emulation.traffic() == [reads * both, 0]
    fastkd.kd_loss(student.requires_grad_(), teacher, divergence=divergence, backend="cuda")
    assert sharded.emulation.traffic() == [(reads + 1) * both, student.nbytes]


def test_a_dropped_row_is_not_read(sharded: Sharded) -> None:
    student, teacher = logits(3, 61, seed=1), logits(3, 61, seed=2)
    student[1], teacher[1] = math.nan, math.nan
    loss, gradient, *_ = _outcome(student, teacher, torch.tensor([1, -100, 2]), alpha=0.5)
    assert loss.isfinite().all() and loss[1] == 0
    assert gradient.isfinite().all() and not gradient[1].any()


def test_a_shard_that_is_too_wide(emulation: Emulation) -> None:
    kernels = InShards(registry.load("cuda"), (1.0, 3.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", lambda name: kernels)
        student = torch.zeros(1, 800_000)
        with pytest.raises(BackendUnavailable, match=r"600000 columns .* shared memory"):
            fastkd.kd_loss(student, student, backend="cuda")


FAULTS = {
    "a maximum that has faded": ("shard.h", "all = merge(all, other, row);", "all = other;"),
    "another's sum of z": ("shard.h", "centered_sum += from[CENTERED_SUM_AT];", "spread = from[CENTERED_SUM_AT];"),
    "a center of nothing": ("shard.h", "row.center = finite_max(z_at(", "row.center = 0 * finite_max(z_at("),
    "the label of the last process": (
        "shard.h", "fmaxf(row.z_label, float(from[SWEPT_FIELDS]))", "float(from[SWEPT_FIELDS])"),
    "sums of one process": ("shard.h", "    phi += from[0];", "    phi = from[0];"),
    "what is gone is nothing": ("shard.h", "> NEGLIGIBLE * sum", "> 2 * sum"),
    "what is gone is always something": ("shard.h", "> NEGLIGIBLE * sum", ">= 0 * sum"),
    "a moment of what is gone": ("statistics.h", "if (SHARD) return", "if (false) return"),
    "policy of one process": ("shard.h", "row.log_0_policy |= from[2] != 0;", ""),
    "another process's rows": ("shard.h", "(process * call.rows + row.row) * STATISTICS", "row.row * STATISTICS"),
    "the first column's token": ("open.h", "row.label -= call.shard.first;", ""),
    "tokens of the whole vocabulary": ("topk.h", "ids[j] - call.shard.first - start", "ids[j] - start"),
    "smoothing over a shard": (
        "gradient.h", "call.label_smoothing / double(call.shard.total)", "call.label_smoothing / 7"),
    "a shift of nothing": (
        "statistics.h", "a.s_max == -INF ? 0 : finite_max", "a.s_max == -INF ? finite_max(s_max) : finite_max"
    ),
    "events in the order of a process": ("topk.h", "constexpr int LANES = 32;", "const int LANES = call.threads;"),
    "copies that are not waited for": ("kinds.h", "Step::results) block.each_stage", "Step::all) block.each_stage"),
}  # fmt: skip


@heavy
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_detected(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulation: Emulation
) -> None:
    broken = emulation.with_fault(FAULTS[fault], tmp_path)
    monkeypatch.setattr(registry.load("cuda"), "_cuda", broken)
    emulation.ranks = 2
    kernels, load = InShards(registry.load("cuda"), test_shards.SHARES[-1]), registry.load

    def run(test: Any, *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "load", lambda name: kernels if name == "cuda" else load(name))
            test(Sharded(emulation, patch), *arguments)

    with pytest.raises((AssertionError, RuntimeError)):
        run(test_offsets, 1e4)
        run(test_smoothing_in_shards_without_the_label, 1e4)
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            run(test_every_divergence, (divergence, {}), torch.float32)
            for side in ("student", "teacher", "both"):
                run(test_log_0, divergence, side, slice(5, 60), -torch.inf, 1.0)
        run(test_a_shard_at_minus_infinity_where_the_other_side_is_negligible, "forward_kl")
        run(test_wide_rows, "forward_kl", 1)
        for tail in TAILS[:2]:
            run(test_topk, tail, "forward_kl", {})
            run(test_more_tokens_than_a_warp_has_lanes, tail)
        run(test_invalid_values_poison_their_row, False)
