"""The CUDA kernels' PTX in the machine, held to the same bar as every backend; and faults planted into that PTX.

Every run has each divergence once, each cluster size, dtype and form of teacher. `make ptx` runs all tests of
tests/backends/cuda like this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from support.accuracy import check, labels_for, logits
from support.cuda_emulation import Emulation
from support.ptx import cuda, planted
from support.ptx.faults import Fault
from support.shards import InShards
from test_measures import check_measures
from test_topk import check_topk, sparse
from torch import Tensor

import fastkd
from fastkd.backends import registry

INF = math.inf
ARCHITECTURE = "sm_90"
heavy = pytest.mark.heavy


@pytest.fixture(scope="session")
def module() -> cuda.Module:
    return cuda.module(ARCHITECTURE)


@pytest.fixture
def launches(
    host: ModuleType, emulation: Emulation, module: cuda.Module
) -> Iterator[list[dict[str, Any]]]:
    """The launches of a test, all of which run in the machine."""
    record: list[dict[str, Any]] = []
    with cuda.in_machine(host, module, record):
        yield record
    assert record, "nothing ran in the machine"


# With 1000 columns, a block of a cluster of 4 has one warp, of 2 two warps, and a block alone has four.
CLUSTERS = (1, 2, 4, 8, 16)
IN_EVERY_RUN = ("forward_kl", "reverse_kl", "mixture", "jsd", "tvd", "alpha_beta")


@pytest.mark.parametrize(
    ("divergence", "ranks"),
    [
        pytest.param(
            name, CLUSTERS[number % len(CLUSTERS)], marks=() if name in IN_EVERY_RUN else heavy
        )
        for number, name in enumerate(fastkd.DIVERGENCES)
    ],
)
def test_every_divergence(
    emulation: Emulation, launches: list[dict[str, Any]], divergence: str, ranks: int
) -> None:
    """Three rows on two clusters: one takes a second row, whose logits arrive while the first row's gradient is written."""
    emulation.ranks = ranks
    student, teacher = logits(3, 1000, seed=1), logits(3, 1000, seed=2)
    labels = labels_for(3, vocabulary=1000, seed=3)
    options = {"alpha": 0.7, "temperature": 2.0, "label_smoothing": 0.1}
    check("cuda", student, teacher, labels, divergence=divergence, **options)
    of_rows = [
        launch for launch in launches if launch["kernel"] not in ("total_kernel", "scale_kernel")
    ]
    assert {launch["ranks"] for launch in of_rows} == {ranks}


DTYPES = [
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16),
]  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_every_dtype(
    emulation: Emulation,
    launches: list[dict[str, Any]],
    divergence: str,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    """Rows at any address: 1001 columns of two bytes begin at every alignment in turn."""
    emulation.ranks = 2
    student, teacher = (logits(3, 1001, seed=k, dtype=dtype) for k, dtype in enumerate(dtypes))
    check("cuda", student, teacher, divergence=divergence, temperature=0.7)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_log_0(emulation: Emulation, launches: list[dict[str, Any]], divergence: str) -> None:
    """Rows that are computed again with the policy for log 0."""
    emulation.ranks = 2
    student, teacher = logits(3, 700, seed=1), logits(3, 700, seed=2)
    student[0, 8:200], teacher[0, 8:200] = -INF, -INF
    teacher[2, 100:140] = -INF
    check("cuda", student, teacher, divergence=divergence)


@pytest.mark.parametrize(
    ("divergence", "dtype", "ranks"),
    [
        ("forward_kl", torch.bfloat16, 2),
        pytest.param("soft_cross_entropy", torch.float32, 1, marks=heavy),
    ],
    ids=str,
)
def test_measures(
    emulation: Emulation,
    launches: list[dict[str, Any]],
    divergence: str,
    dtype: torch.dtype,
    ranks: int,
) -> None:
    check_measures(emulation, divergence, dtype, ranks)
    of_rows = [
        launch for launch in launches if launch["kernel"] not in ("total_kernel", "scale_kernel")
    ]
    assert [launch["kernel"] for launch in of_rows] == 2 * [divergence]


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_sparse_teachers(emulation: Emulation, launches: list[dict[str, Any]], tail: str) -> None:
    emulation.ranks = 2
    labels = labels_for(3, vocabulary=1000, seed=3)
    teacher = sparse(3, vocabulary=1000, k=40, seed=2, tail=tail)
    check_topk("cuda", logits(3, 1000, seed=1), teacher, labels, divergence="jsd", alpha=0.5)
    assert "Sparse" in {launch["kernel"] for launch in launches}


@pytest.fixture
def shards(emulation: Emulation, launches: list[dict[str, Any]]) -> Iterator[None]:
    """The cuda backend with the vocabulary in three unequal shards and an empty one."""
    kernels = InShards(registry.load("cuda"), (3.0, 1.0, 0.0, 2.0))
    load = registry.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", lambda name: kernels if name == "cuda" else load(name))
        yield
    assert kernels.calls


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_vocabulary_in_shards(
    emulation: Emulation, shards: None, launches: list[dict[str, Any]], divergence: str
) -> None:
    emulation.ranks = 2
    labels = labels_for(3, vocabulary=1200, seed=3)
    check(
        "cuda",
        logits(3, 1200, seed=1),
        logits(3, 1200, seed=2),
        labels,
        divergence=divergence,
        alpha=0.5,
    )
    assert "DenseShard" in {launch["kernel"] for launch in launches}


def test_fused_linear_loss(emulation: Emulation, launches: list[dict[str, Any]]) -> None:
    """Chunks of logits, in place; upstream factors are multiplied by scale_kernel."""
    emulation.ranks = 2
    generator = torch.Generator().manual_seed(1)
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(shape, generator=generator) for shape in ((3, 8), (700, 8), (3, 8), (700, 8))
    )
    results = []
    for backend in ("cuda", "reference"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        teacher = fastkd.LinearTeacher(teacher_hidden, teacher_weight)
        loss = fastkd.fused_linear_kd_loss(*leaves, teacher, chunk_size=2, backend=backend)
        results.append([loss.detach(), *torch.autograd.grad(3 * loss, leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_factors_per_row(emulation: Emulation, launches: list[dict[str, Any]]) -> None:
    student, teacher = logits(3, 300, seed=1), logits(3, 300, seed=2)
    upstream, results = torch.tensor([1.0, -2.5, 0.0]), []
    for backend in ("cuda", "reference"):
        leaf = student.clone().requires_grad_()
        loss = fastkd.kd_loss(leaf, teacher, reduction="none", backend=backend)
        results.append(torch.autograd.grad(loss, leaf, upstream)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert "scale_kernel" in {launch["kernel"] for launch in launches}


# Planted faults


def _outcome(student: Tensor, teacher: Any, **options: Any) -> list[Tensor]:
    leaves = [student.clone().requires_grad_()]
    if isinstance(teacher, Tensor):
        leaves.append(teacher.clone().requires_grad_())
        teacher = leaves[1]
    loss = fastkd.kd_loss(leaves[0], teacher, reduction="sum", backend="cuda", **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _dense(
    divergence: str, dtype: torch.dtype, width: int, ranks: int
) -> Callable[[Emulation], list[Tensor]]:
    def run(emulation: Emulation) -> list[Tensor]:
        emulation.ranks = ranks
        student, teacher = (logits(4, width, seed=seed, dtype=dtype) for seed in (1, 2))
        student[0, 3], teacher[0, 3:9] = -INF, -INF
        labels = torch.tensor([1, 5, -100, 7])
        return _outcome(student, teacher, labels=labels, divergence=divergence, alpha=0.5)

    return run


def _sparse(emulation: Emulation) -> list[Tensor]:
    emulation.ranks = 2
    return _outcome(
        logits(4, 1000, seed=1),
        fastkd.TopK.from_logits(logits(4, 1000, seed=2), 40),
        divergence="jsd",
    )


def _in_shards(divergence: str) -> Callable[[Emulation], list[Tensor]]:
    def run(emulation: Emulation) -> list[Tensor]:
        emulation.ranks = 2
        kernels, load = InShards(registry.load("cuda"), (3.0, 1.0)), registry.load
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "load", lambda name: kernels if name == "cuda" else load(name))
            return _outcome(logits(4, 1400, seed=1), logits(4, 1400, seed=2), divergence=divergence)

    return run


# Of each kernel, calls that take its paths: aligned bfloat16 and rows at any address, blocks of two warps and of eight,
# whole rows and shards, rows that are computed twice.
CALLS: dict[str, list[Callable[[Emulation], list[Tensor]]]] = {
    "forward_kl": [
        _dense("forward_kl", torch.bfloat16, 1000, 2),
        _dense("forward_kl", torch.float32, 1001, 2),
        _dense("forward_kl", torch.bfloat16, 3001, 1),
        _in_shards("forward_kl"),
    ],
    "jsd": [
        _dense("jsd", torch.bfloat16, 1000, 2),
        _dense("jsd", torch.float32, 1001, 2),
        _dense("jsd", torch.bfloat16, 3001, 1),
        _in_shards("jsd"),
    ],
    "Sparse": [_sparse],
    "DenseShard": [_in_shards("forward_kl")],
    "total_kernel": [_dense("forward_kl", torch.float32, 200, 1)],
}


def _sound(
    module: cuda.Module, emulation: Emulation, host: ModuleType, calls: list[Any]
) -> list[list[Tensor]]:
    with cuda.in_machine(host, module):
        return [call(emulation) for call in calls]


def _is_seen(
    broken: cuda.Module,
    emulation: Emulation,
    host: ModuleType,
    calls: list[Any],
    sound: list[list[Tensor]],
) -> str | None:
    """What shows a planted fault: the machine's message, or other numbers; None if nothing does."""
    for call, expected in zip(calls, sound, strict=True):
        try:
            with cuda.in_machine(host, broken):
                actual = call(emulation)
        except (RuntimeError, Fault) as seen:
            return str(seen).splitlines()[0]
        if not all(
            torch.equal(a.nan_to_num(7), b.nan_to_num(7))
            for a, b in zip(actual, expected, strict=True)
        ):
            return "other numbers"
    return None


@pytest.mark.parametrize(
    "fault",
    [
        x if x == "no fence between threads and bulk copies" else pytest.param(x, marks=heavy)
        for x in planted.EVERYWHERE
    ],
)
def test_a_planted_fault_is_seen(
    fault: str, host: ModuleType, emulation: Emulation, module: cuda.Module
) -> None:
    text = planted.EVERYWHERE[fault](module.text)
    assert text != module.text
    calls = CALLS["forward_kl"][:2]
    sound = _sound(module, emulation, host, calls)
    seen = _is_seen(cuda.Module(text), emulation, host, calls, sound)
    print(fault, "->", seen)
    assert seen is not None


# Instructions of a kernel that can go one at a time, at most. Barriers: of the two around the choice of the policy for
# log 0, either alone keeps the flags' readers and writer apart. Waits: those of later sweeps over a row find a phase
# complete for which the first sweep has waited. Fences: one thread initializes four mbarriers and fences each, so the
# last fence covers all of them, and rows of one stage copy nothing for the last mbarrier.
NEEDLESS = {"bar": 2, "mbarrier": 4, "fence": 4}


@heavy
@pytest.mark.parametrize("name", CALLS)
def test_every_barrier_is_needed(
    name: str, host: ModuleType, emulation: Emulation, module: cuda.Module
) -> None:
    """Without any single barrier, fence, wait or arrival, the machine stops or numbers change."""
    calls = CALLS[name]
    sound = _sound(module, emulation, host, calls)
    reached = module.kernel(name).reached()
    unseen = []
    for place in planted.sites(module.kernel(name).program):
        text = module.kernel(name).program.instructions[place].text
        if place not in reached:
            seen: str | None = "(not reached)"
        else:
            with planted.without(module.kernel(name), place):
                seen = _is_seen(module, emulation, host, calls, sound)
        print(f"{name} {place} {text} -> {seen}", flush=True)
        if seen is None:
            unseen.append(module.kernel(name).program.instructions[place].name)
    assert all(unseen.count(opcode) <= NEEDLESS.get(opcode, 0) for opcode in unseen)
