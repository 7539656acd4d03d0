"""The CUDA kernels' own source on the host, held to the same bar as every backend.

tests/support/cuda_host.h plays a cluster's threads on a CPU, in an order drawn by lot; what they do, from the copies
they ask for to the exchanges between blocks, is the code that a GPU runs. `ranks` asks for more blocks a row than it
needs, so that short rows are spread over many. Two clusters share the rows of a call, so that each has several in a
row.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.accuracy import check, labels_for, logits
from support.cuda_emulation import Emulation
from support.options import BRIEF, TOGETHER, Sets, prepared
from test_measures import check_measures
from torch import Tensor

import fastkd
from fastkd.backends import native, registry
from fastkd.divergences import DEFINITIONS

INF = math.inf


# Tails: of a vector of 8, of a warp's 256 columns, of a block's slice; rows shorter than a cluster's blocks.
WIDTHS = (1, 2, 7, 8, 9, 31, 63, 257, 1000, 2051)
CLUSTERS = (1, 2, 4, 8, 16)


def test_the_compiled_table_equals_fastkds(host: ModuleType) -> None:
    assert host.divergences() == [function.__name__.lstrip("_") for function in DEFINITIONS]


@pytest.mark.parametrize("ranks", CLUSTERS)
@pytest.mark.parametrize("divergence", fastkd.DIVERGENCES)
def test_every_divergence_over_every_cluster(
    emulation: Emulation, divergence: str, ranks: int
) -> None:
    emulation.ranks = ranks
    for width in WIDTHS:
        # The same inputs for each cluster, whose expected results are then computed once.
        student, teacher = logits(3, width, seed=width), logits(3, width, seed=width + 1)
        labels = labels_for(3, vocabulary=width, seed=width)
        check(
            "cuda", student, teacher, labels, divergence=divergence, alpha=0.7, temperature=2.0,
            label_smoothing=0.1,
        )  # fmt: skip


def test_alpha_0_ignores_a_teacher_of_minus_infinity(emulation: Emulation) -> None:
    emulation.ranks = 2
    student, labels = logits(2, 40, seed=36).requires_grad_(), torch.tensor([0, 2])
    expected = torch.nn.functional.cross_entropy(student, labels)
    teacher = torch.full_like(student, -INF)
    loss = fastkd.kd_loss(student, teacher, labels, alpha=0.0, backend="cuda")
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x, student)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtypes", [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.bfloat16),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "squared_error"])
def test_every_dtype(
    emulation: Emulation, divergence: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    for width, emulation.ranks in ((40, 2), (333, 4), (2051, 1)):
        student = logits(4, width, seed=1, dtype=dtypes[0])
        teacher = logits(4, width, seed=2, dtype=dtypes[1])
        check("cuda", student, teacher, divergence=divergence, temperature=0.7)


REDUCTIONS: Sets = {
    "mean": {"reduction": "mean", "num_items": 3},
    "batchmean": {"reduction": "batchmean"},
}
OPTIONS = BRIEF | REDUCTIONS


# Each set with one divergence; the others only with the sets that pass every option.
@pytest.mark.only_where(lambda name, divergence: name in TOGETHER or divergence == "forward_kl")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mixture", "jsd", "tvd"])
def test_options(emulation: Emulation, divergence: str, name: str) -> None:
    emulation.ranks = 4
    student, teacher = logits(6, 309, seed=1), logits(6, 309, seed=2)
    labels, options = prepared(OPTIONS[name] | {"labels": True}, 6, columns=301, seed=3)
    generator = torch.Generator().manual_seed(4)
    rows = {
        "mask": torch.rand(6, generator=generator) < 0.8,
        "weight": torch.rand(6, generator=generator),
    }
    check(
        "cuda", student, teacher, labels, divergence=divergence, **{"alpha": 0.5} | options | rows
    )


@pytest.mark.parametrize("divergence", fastkd.DIVERGENCES)
def test_log_0(emulation: Emulation, divergence: str) -> None:
    """A -inf in both models or only the teacher, or an exponential of 0, repeats the row with the log-0 policy."""
    emulation.ranks = 2
    student, teacher = logits(4, 300, seed=1), logits(4, 300, seed=2)
    student[0, 7], teacher[0, 7] = -INF, -INF
    student[0, 8:200], teacher[0, 8:200] = -INF, -INF  # whole vectors, and a thread's first
    teacher[1, 100:140] = -INF
    student[2, 3], teacher[2, 3] = -400.0, -INF
    if divergence in (
        "reverse_kl",
        "mixture",
        "squared_error",
    ):  # infinite if only the teacher has -inf
        student[1], student[2] = teacher[1], teacher[2]
    check("cuda", student, teacher, divergence=divergence)


LOW: dict[str, tuple[slice, float, float, float]] = {
    "a vector of both": (slice(0, 8), -INF, -INF, 1.0),
    "many vectors of both": (slice(504, 1000), -INF, -INF, 1.0),
    "the teacher alone": (slice(504, 1000), -1e4, -INF, 1.0),
    "where an exponential is subnormal": (slice(504, 1000), -90.0, -INF, 1.0),
    "the least number there is": (slice(504, 1000), -3.4028e38, -3.4028e38, 0.5),
    "the same at the usual temperature": (slice(504, 1000), -3.4028e38, -3.4028e38, 1.0),
}


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("divergence", fastkd.DIVERGENCES)
def test_low_logits_in_whole_vectors(emulation: Emulation, divergence: str, low: str) -> None:
    """Rescaling erases such a thread's moments, so what the gradient needs is determined separately."""
    where, s_low, t_low, temperature = LOW[low]
    emulation.ranks = 2
    student, teacher = logits(2, 1000, seed=1), logits(2, 1000, seed=2)
    student[1, where], teacher[1, where] = s_low, t_low
    if fastkd.DIVERGENCES[divergence]().normalized:
        _as_the_reference(student, teacher, divergence, temperature=temperature)


def _as_the_reference(student: Tensor, teacher: Tensor, divergence: Any, **options: Any) -> None:
    """Results have infinities and NaN where the reference has them, and are close to it elsewhere."""
    outcomes = []
    for backend, dtype in (("cuda", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (student, teacher)]
        loss = fastkd.kd_loss(
            *leaves, divergence=divergence, reduction="none", backend=backend, **options
        )
        outcomes.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    for actual, exact in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, exact.float(), equal_nan=True, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gap", [60.0, 97.0])
def test_an_exponential_that_overflows_is_infinite(emulation: Emulation, gap: float) -> None:
    student, teacher = logits(1, 50, seed=1), logits(1, 50, seed=2)
    student[0, 3] -= gap
    results = [
        fastkd.kd_loss(student, teacher, divergence=fastkd.alpha_beta(1.0, -1.0), backend=backend)
        for backend in ("cuda", "reference")
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=0.0)
    assert results[0].isinf() == (gap > 90)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "squared_error"])
def test_offsets_and_maxima_in_every_position(emulation: Emulation, divergence: str) -> None:
    """A maximum late in the row rescales the earlier sums of a thread, a warp or a block."""
    emulation.ranks = 4
    width = 1111
    peaks = torch.tensor([0, 7, 8, 300, 555, 1000, 1110])
    student, teacher = logits(7, width, seed=1), logits(7, width, seed=2)
    student[torch.arange(7), peaks] += 30.0
    teacher[torch.arange(7), peaks.flip(0)] += 20.0
    check("cuda", student, teacher, divergence=divergence, temperature=2.0)
    rising = torch.linspace(-60, 60, width).expand(7, width)
    check("cuda", student + rising, teacher - rising, divergence=divergence, temperature=8.0)
    if divergence != "squared_error":
        check("cuda", student + 1e4, teacher - 1e4, divergence=divergence, temperature=2.0)


def _placed(
    width: int, rows: int, offset: int, stride: int, dtype: torch.dtype, seed: int
) -> Tensor:
    """Rows at the given offset from a multiple of 16 bytes, with the given stride."""
    memory = torch.full((rows * stride + offset + 64,), 7.0, dtype=dtype)
    at = -memory.data_ptr() // dtype.itemsize % (16 // dtype.itemsize)
    view = memory.as_strided((rows, width), (stride, 1), at + offset)
    return view.copy_(logits(rows, width, seed=seed, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("offset", "stride"), [(0, 320), (0, 301), (1, 320), (3, 333), (0, 312)])
def test_rows_at_any_address(
    emulation: Emulation, dtype: torch.dtype, offset: int, stride: int
) -> None:
    emulation.ranks = 2
    student = _placed(301, 5, offset, stride, dtype, seed=1)
    teacher = _placed(301, 5, 0, 304, dtype, seed=2)
    check("cuda", student, teacher, divergence="jsd")
    check("cuda", teacher, student, divergence="forward_kl")


def test_views(emulation: Emulation) -> None:
    """Shifted, transposed and expanded rows and several leading dimensions; nothing outside of them is written."""
    emulation.ranks = 2
    whole, teacher = logits(3, 5, 77, seed=1), logits(3, 5, 77, seed=2)
    check("cuda", whole[:, :-1], teacher[:, 1:])
    check("cuda", whole.transpose(0, 1), teacher.transpose(0, 1), divergence="jsd")
    check("cuda", whole[:, :1].expand(3, 5, 77), teacher, teacher_gradient=False)
    check("cuda", whole[..., ::2], teacher[..., ::2])
    small = logits(2, 2, 2, 2, 2, 2, 2, 2, 9, seed=3)
    check("cuda", small.transpose(0, 3).transpose(1, 6), small.flip(0))


@pytest.mark.parametrize("offset", [0, 1])
def test_in_place(emulation: Emulation, offset: int) -> None:
    emulation.ranks = 4
    student = _placed(301, 4, offset, 320, torch.float32, seed=1)
    teacher = logits(4, 301, seed=2)
    labels = labels_for(4, vocabulary=301, seed=1, ignored=0.5)
    outcomes = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        inputs = torch.empty_strided(student.shape, (320, 1)).copy_(leaf)
        loss = fastkd.kd_loss(inputs, teacher, labels, alpha=0.5, inplace=inplace, backend="cuda")
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_a_dropped_row_is_not_read(emulation: Emulation) -> None:
    student, teacher = logits(3, 50, seed=1), logits(3, 50, seed=2)
    student[1], teacher[1] = math.nan, math.nan
    labels = torch.tensor([1, -100, 2])
    leaf = student.requires_grad_()
    loss = fastkd.kd_loss(leaf, teacher, labels, alpha=0.5, backend="cuda")
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite() and gradient.isfinite().all() and not gradient[1].any()


def test_invalid_values_poison_their_row(emulation: Emulation) -> None:
    """A label outside the vocabulary and a temperature that is not positive make only their row NaN."""
    student, teacher = logits(3, 50, seed=1), logits(3, 50, seed=2)
    labels = torch.tensor([1, 50, 2])
    temperature = torch.tensor([1.0, 1.0, 0.0])
    loss = fastkd.kd_loss(
        student,
        teacher,
        labels,
        alpha=0.5,
        temperature=temperature,
        reduction="none",
        backend="cuda",
    )
    assert loss.isnan().tolist() == [False, True, True]


def test_no_rows(emulation: Emulation) -> None:
    student = torch.empty(0, 50, requires_grad=True)
    loss = fastkd.kd_loss(student, torch.empty(0, 50), backend="cuda")
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 50)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_device_memory_moves_three_tensors(
    emulation: Emulation, student: torch.dtype, teacher: torch.dtype, divergence: str, offset: int
) -> None:
    """Each logit is read once and each gradient written once, whatever the divergence and the cluster."""
    rows, width = 4, 333
    s = _placed(width, rows, offset, 344, student, seed=1)
    t = _placed(width, rows, 0, 344, teacher, seed=2)
    labels = torch.tensor([1, 2, -100, 3])
    both = width * (s.itemsize + t.itemsize)
    for emulation.ranks in (1, 4):
        emulation.traffic()
        leaf = s.detach().requires_grad_(student != torch.float16)
        fastkd.kd_loss(leaf, t, labels, divergence=divergence, backend="cuda")
        read, written = emulation.traffic()
        assert read == 3 * both  # the dropped row is not read
        names = ("acceptance", "agreement")  # a call with measures reads nothing more
        fastkd.kd_loss(leaf, t, labels, divergence=divergence, backend="cuda", return_parts=names)
        assert emulation.traffic() == [read, written]
        assert written == (rows * width * s.itemsize if leaf.requires_grad else 0)
        fastkd.kd_loss(leaf, t, labels, divergence=divergence, alpha=0.5, backend="cuda")
        # The label's logit is also read by every block.
        assert emulation.traffic()[0] == 3 * (both + emulation.ranks * s.itemsize)


@pytest.mark.parametrize(
    ("dtype", "ranks"),
    [(torch.bfloat16, 1), (torch.bfloat16, 4), (torch.float16, 2), (torch.float32, 2)],
    ids=str,
)
@pytest.mark.parametrize("divergence", ["forward_kl", "soft_cross_entropy", "jsd"])
def test_measures(emulation: Emulation, divergence: str, dtype: torch.dtype, ranks: int) -> None:
    """They are right in whole vectors, and leave the loss and the gradients as they are."""
    check_measures(emulation, divergence, dtype, ranks)


# How a row is spread


@pytest.mark.parametrize(("width", "dtype", "ranks"), [
    (1, torch.float32, 1), (1000, torch.float32, 1), (32_768, torch.bfloat16, 2), (32_768, torch.float32, 4),
    (128_256, torch.bfloat16, 8), (128_256, torch.float32, 8), (151_936, torch.bfloat16, 8),
    (262_144, torch.bfloat16, 8), (262_144, torch.float32, 16),
])  # fmt: skip
def test_rows_stay_on_chip(host: ModuleType, width: int, dtype: torch.dtype, ranks: int) -> None:
    number = native.DTYPES[dtype]
    blocks, threads, columns = host.plan(width, number, number, sparse=False)
    assert blocks == ranks and threads % 32 == 0 and threads <= 512
    assert blocks * columns >= width and columns % 8 == 0
    assert 2 * columns * dtype.itemsize <= (106 if threads <= 256 else 220) * 1024
    fewer, *_ = host.plan(width, number, number, sparse=True)
    assert fewer <= blocks


def test_few_rows_are_spread_over_more_blocks(host: ModuleType) -> None:
    """A few rows use up to one block per multiprocessor, each with a vector for every thread; many rows use fewer."""

    def blocks(rows: int, width: int) -> int:
        ranks, _, columns = host.plan(width, 1, 1, sparse=False, rows=rows, multiprocessors=132)
        assert ranks * columns >= width and columns % 8 == 0
        return ranks

    assert [blocks(rows, 32_768) for rows in (1, 16, 33, 67, 4096)] == [8, 8, 4, 2, 2]
    assert [blocks(1, width) for width in (1000, 4096, 16_384, 128_256)] == [1, 2, 8, 8]


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_sparse_teacher_moves_two_tensors(emulation: Emulation, tail: str) -> None:
    """The student is read once and its gradient is written once, plus what each token needs."""
    student, teacher = logits(5, 2000, seed=1), logits(5, 2000, seed=2)
    named = fastkd.TopK.from_logits(teacher, 8, tail=tail)
    for emulation.ranks in (1, 4):
        emulation.traffic()
        fastkd.kd_loss(student.requires_grad_(), named, divergence="jsd", backend="cuda")
        read, written = emulation.traffic()
        assert written == student.nbytes
        assert student.nbytes < read < student.nbytes + 5 * 8 * 30


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "tvd"])
def test_a_row_of_padding_alone(emulation: Emulation, divergence: str) -> None:
    """With no tokens to renormalize over, only the cross-entropy is left; the other row has a divergence."""
    emulation.ranks = 2
    ids = torch.tensor([[-1, -1], [3, 40]])
    named = fastkd.TopK(ids, torch.full((2, 2), -1.0), tail="renormalize")
    student = logits(2, 50, seed=1)
    for alpha in (1.0, 0.5):
        losses = [
            fastkd.kd_loss(
                student, named, torch.tensor([1, 2]), divergence=divergence, alpha=alpha,
                reduction="none", backend=backend,
            )
            for backend in ("cuda", "reference")
        ]  # fmt: skip
        torch.testing.assert_close(*losses)
        assert losses[0][1] > 0 and (losses[0][0] > 0) == (alpha < 1)


def test_a_row_that_is_too_wide(emulation: Emulation, host: ModuleType) -> None:
    assert host.plan(500_000, 0, 0, sparse=False) is None
    student = torch.zeros(1, 500_000)
    with pytest.raises(fastkd.BackendUnavailable, match="500000 columns .* shared memory"):
        fastkd.kd_loss(student, student, backend="cuda")


def test_a_device_with_less_shared_memory(emulation: Emulation, host: ModuleType) -> None:
    """The blocks of compute capability 12.0 have 99 KB, and two of them 49 KB each."""
    for width, expected in ((10_000, (1, 256)), (21_000, (2, 256)), (190_000, (8, 512))):
        blocks, threads, columns = host.plan(width, 1, 1, sparse=False, shared=99 << 10)
        assert (blocks, threads) == expected
        assert 4 * columns <= (99 - 6 if threads == 512 else 49 - 6) << 10
    assert host.plan(400_000, 1, 1, sparse=False, shared=99 << 10) is None
    emulation.device(shared_kb=9)
    student, teacher = logits(2, 4000, seed=1), logits(2, 4000, seed=2)
    check("cuda", student, teacher)
    student = torch.zeros(1, 8000)
    with pytest.raises(
        fastkd.BackendUnavailable, match=r"8000 columns .* 16 blocks with 9 KB each"
    ):
        fastkd.kd_loss(student, student, backend="cuda")


def test_a_device_without_large_clusters(emulation: Emulation) -> None:
    """Fewer blocks hold the row if each has a multiprocessor to itself; otherwise the message gives the remedy."""
    emulation.device(most_ranks=2)
    student, teacher = logits(2, 30_000, seed=1), logits(2, 30_000, seed=2)
    check("cuda", student, teacher)
    student = torch.zeros(1, 262_144)
    with pytest.raises(fastkd.BackendUnavailable) as caught:
        fastkd.kd_loss(student, student, backend="cuda")
    assert "need a cluster of 16 blocks, and the device runs none" in caught.value.reason
    assert "Use backend='triton'" in caught.value.remedy


# Planted faults turn the checks above red


FAULTS = {
    "an off-by-one in the tail": ("columns.h", "k < vector.n ? k : 0", "k <= vector.n ? k : 0"),
    "columns of a slice": ("slice.h", "rest < call.slice ? rest :", "rest < call.slice ? rest - 1 :"),
    "the edge of a copy": ("slice.h", "if (at < bytes) copy_element", "if (at + element_size < bytes) copy_element"),
    "a swapped merge": ("statistics.h", "a.forward += b.forward;", "a.forward += b.reverse;"),
    "a merge that forgets to rescale": ("statistics.h", "  rescale(b, s_max, t_max, row);\n", "  b.s_max = s_max;\n"),
    "a maximum that does not rescale": ("statistics.h", "a.s_exp_sum *= s_factor;", ""),
    "a moment that does not move": ("statistics.h", "a.forward + (s_step - t_step) * a.t_exp_sum", "a.forward"),
    "a sign": ("gradient.h", "h - p * shared.sum_h", "h + p * shared.sum_h"),
    "the temperature of the gradient": ("gradient.h", "scales.distillation * row.student.unit", "scales.distillation"),
    "the policy for log 0": ("statistics.h", "LOG_0 ? (e > threshold ? e * x : 0) : e * x", "e * x"),
    "logits that are too low": ("finish.h", "return (row.flags & MINIMA)", "return false && (row.flags & MINIMA)"),
    "the label's column": ("gradient.h", "column == row.label", "column + 1 == row.label"),
    "a whole vector where there is a part": ("columns.h", "range.last - VECTOR + 1", "range.last"),
    "bulk copies are not waited for": ("block.h", "      await(stage);\n", ""),
    "a stage is fetched before all are done with it": (
        "cluster.h", "order_before_copies();\n      sync_block();", "order_before_copies();"),
    "one place for all exchanges": ("block.h", "shared_.rank_parts[next_exchange()]", "shared_.rank_parts[0]"),
    "no gap between stages": ("slice.h", "memory + number * gap", "memory"),
    "a cluster that does not wait": (
        "block.h", "        cluster_arrive(warp == 0);\n        cluster_wait();\n", ""),
    "a row that is forgotten": ("block.h", "next_kept(row + ", "next_kept(row + 2 * "),
    "a load of a neighbour's half word": ("vectors.h", "read<uint16_t>(from)", "read<uint32_t>(from - 2) >> 16"),
}  # fmt: skip


# Each planted fault is compiled, which takes ten seconds. These tests check the tests above, not the kernels, so one
# fault runs by default.
EVERY_TIME = ("a maximum that does not rescale", "a load of a neighbour's half word")


@pytest.mark.parametrize(
    "fault", [x if x in EVERY_TIME else pytest.param(x, marks=pytest.mark.heavy) for x in FAULTS]
)
def test_a_planted_fault_is_detected(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulation: Emulation
) -> None:
    broken = emulation.with_fault(FAULTS[fault], tmp_path)
    monkeypatch.setattr(registry.load("cuda"), "_cuda", broken)
    with pytest.raises((AssertionError, RuntimeError)):
        for divergence in ("forward_kl", "mixture", "jsd"):
            test_every_divergence_over_every_cluster(emulation, divergence, 4)
            test_log_0(emulation, divergence)
            test_low_logits_in_whole_vectors(emulation, divergence, "many vectors of both")
            test_offsets_and_maxima_in_every_position(emulation, divergence)
        test_rows_at_any_address(emulation, torch.bfloat16, 0, 320)
        test_rows_at_any_address(emulation, torch.bfloat16, 0, 301)


@pytest.mark.parametrize("form", ["dense", *fastkd.teachers.TAILS])
@pytest.mark.parametrize(
    "divergence",
    [
        fastkd.forward_kl(clip=0.01), fastkd.reverse_kl(clip=0.02), fastkd.mixture(0.7, 0.2, clip=0.01),
        fastkd.jsd(0.3, clip=0.005), fastkd.forward_kl(floor=-6.0),
    ],
    ids=lambda divergence: divergence.name,
)  # fmt: skip
def test_clips_and_the_floor(
    emulation: Emulation, divergence: fastkd.Divergence, form: str
) -> None:
    if form == "renormalize_teacher" or ("floor" in divergence.name and form != "truncate"):
        pytest.skip("refused")
    emulation.ranks = 2
    student, teacher = logits(4, 300, seed=1, spread=5.0), logits(4, 300, seed=2, spread=5.0)
    student[1, 7], teacher[1, 7] = (
        -INF,
        20.0,
    )  # the teacher is sure of a token that the student excludes
    ids = fastkd.TopK.from_logits(teacher, 40).ids
    ids[:, 3] = -1

    def results(backend: str, dtype: torch.dtype) -> list[Tensor]:
        s, t = student.to(dtype).requires_grad_(), teacher.to(dtype)
        listed = t.log_softmax(-1).gather(-1, ids.clamp(min=0))
        given = t if form == "dense" else fastkd.TopK(ids, listed, form)
        loss = fastkd.kd_loss(s, given, divergence=divergence, reduction="none", backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), s)]

    for value, right in zip(
        results("cuda", torch.float32), results("reference", torch.float64), strict=True
    ):
        assert right.isfinite().all()
        torch.testing.assert_close(value.double(), right, rtol=1e-4, atol=1e-5)
