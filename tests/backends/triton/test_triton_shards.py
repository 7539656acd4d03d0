"""The Triton kernels' steps for processes that share the vocabulary, in Triton's interpreter, against the truth.

Tiles are 16 columns wide here, a row has two programs in each process, and the third of four processes has no column.
The interpreter takes a second or two a call: every run has what is chosen here, the heavy one the grids of test_shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.accuracy import check, logits
from support.options import TOGETHER, dropped_by, for_kd_loss, for_topk
from support.shards import InShards
from support.triton_interpreter import corrected, in_interpreter
from test_shards import (  # noqa: F401 (collected here too, with this module's fixture)
    test_every_divergence,
    test_every_option,
    test_log_0,
    test_offsets,
    test_topk,
)
from test_topk import TAILS, check_topk, sparse
from test_triton import DEVICE, TILE, kinds, pair, same
from torch import Tensor
from triton.runtime import interpreter

from fastkd.backends import reference, registry
from fastkd.call.contract import Options, Result, Rows, Shard, ShardCall, Want
from fastkd.divergences import resolve
from fastkd.kernels import launch as kernels
from fastkd.kernels import sparse as sparse_kernels
from fastkd.kernels import split

INF = math.inf
SHARES = (3.0, 1.0, 0.0, 2.0)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def corrected_interpreter() -> Iterator[None]:
    with corrected():
        yield


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernels, sparse_kernels):
        monkeypatch.setattr(module, "tile", lambda *row: (TILE, 1))
    monkeypatch.setattr(sparse_kernels, "BLOCK_K", 4)
    monkeypatch.setattr(kernels, "shard_plan", lambda rows, shard: split.Plan(2, rows))


@pytest.fixture
def in_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[InShards]:
    """The backend that backend="triton" selects in these tests."""
    load = registry.load
    shards = InShards(load("triton"), SHARES)
    monkeypatch.setattr(registry, "load", lambda name: shards if name == "triton" else load(name))
    yield shards
    assert shards.calls


@pytest.fixture(params=[pytest.param("triton", marks=pytest.mark.heavy)])
def sharded(in_shards: InShards, request: pytest.FixtureRequest) -> str:
    """For the tests of test_shards."""
    return str(request.param)


def launch(
    in_shards: InShards,
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    divergence: str = "mixture",
    want: Want = Want(True, True, True),  # noqa: B008 (a tuple)
    **options: Any,
) -> Result:
    options.setdefault("vocab_size", student.shape[-1])
    return in_shards.kd_rows(student, teacher, rows, Options(resolve(divergence), **options), want)


# 61 columns split into 30, 10, 0 and 21: two tiles for two programs, one tile, none, and two.


@kinds
def test_labels(in_shards: InShards, divergence: str) -> None:
    """The first column of a shard and the last one, and the last one of all."""
    labels = torch.tensor([30, 39, 60], device=DEVICE)
    check(
        "triton", *pair(3, 61), labels, divergence=divergence, alpha=0.5, temperature=2.0,
        label_smoothing=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("divergence", ["mixture", "jsd"])
def test_one_program_per_row_in_each_process(
    in_shards: InShards, monkeypatch: pytest.MonkeyPatch, divergence: str
) -> None:
    """Enough rows fill a device; the partial results of processes are then strided until they are copied."""
    monkeypatch.setattr(kernels, "shard_plan", split.shard_plan)
    assert split.shard_plan(3, Shard(0, 61, 30, 0, None)).num_splits == 1
    labels = torch.tensor([30, 39, 60], device=DEVICE)
    check("triton", *pair(3, 61), labels, divergence=divergence, alpha=0.5, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("divergence", "options"),
    [*zip(["mixture", "jsd"], TOGETHER.values(), strict=True)],
    ids=["mixture", "jsd"],
)
def test_everything_at_once(in_shards: InShards, divergence: str, options: dict[str, Any]) -> None:
    """Every option, a temperature per row, 41 counted columns of 43, and two dropped rows, in bfloat16."""
    labels = dropped_by(options, torch.tensor([5, -100, 40, 7], device=DEVICE))
    options = for_kd_loss(options, columns=41)
    options |= {"temperature": torch.tensor([0.7, 3.0, 1.0, 2.0])}
    weight = torch.tensor([0.5, 1.0, -1.5, 0.0], device=DEVICE)
    dtypes = torch.bfloat16, torch.float32
    check(
        "triton", *pair(4, 43, dtypes=dtypes), labels, divergence=divergence, weight=weight,
        **options,
    )  # fmt: skip


def test_a_negative_scale_and_hard_labels_alone(in_shards: InShards) -> None:
    labels = torch.tensor([60, 3], device=DEVICE)
    for options in ({"alpha": 0.0}, {"alpha": 0.5, "logit_scale": -0.5}):
        check("triton", *pair(2, 61), labels, label_smoothing=0.1, **options)


# Columns at -inf: the first shard; all but one column of the last shard; all but the second shard.
GONE = [[(0, 30)], [(41, 61)], [(0, 30), (40, 61)]]


@pytest.mark.parametrize("divergence", ["mixture", "jsd"])
@pytest.mark.parametrize("gone", GONE, ids=str)
def test_log_0_of_shards(in_shards: InShards, divergence: str, gone: list[tuple[int, int]]) -> None:
    """On both sides, on the student's, and on the teacher's."""
    student, teacher = pair(3, 61)
    for first, last in gone:
        student[:2, first:last] = -INF
        teacher[::2, first:last] = -INF
    rows, options = Rows(torch.tensor([35, 33, 32])), {"alpha": 0.5, "temperature": 2.0}
    actual = launch(in_shards, student, teacher, rows, divergence, **options)
    inputs = Options(resolve(divergence), vocab_size=61, **options)
    wanted = reference.kd_rows(student, teacher, rows, inputs, Want(True, True, True))
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("divergence", ["mixture", "jsd"])
def test_common_offset(in_shards: InShards, divergence: str) -> None:
    """Multiples of 1/64 move by 1e5 without rounding, though a sum of them does not; no result changes by a bit."""
    student, teacher = ((x * 64).round() / 64 for x in pair(2, 61))
    rows = Rows(torch.tensor([33, 60], device=DEVICE))
    options = {"alpha": 0.5, "label_smoothing": 0.1, "temperature": 0.7}
    still = launch(in_shards, student, teacher, rows, divergence, **options)
    same(launch(in_shards, student + 1e5, teacher - 1e5, rows, divergence, **options), still)


def test_invalid_values_poison_their_row(in_shards: InShards) -> None:
    student, teacher = pair(5, 61)
    labels = torch.tensor([5, -1, 61, 2**40, 60], device=DEVICE)
    actual = launch(in_shards, student, teacher, Rows(labels), alpha=0.5)
    for value in (actual.loss, actual.student_gradient, actual.teacher_gradient):
        assert value is not None
        assert value[1:4].isnan().all() and value[::4].isfinite().all()


@in_interpreter
@pytest.mark.parametrize("divergence", ["mixture", "jsd"])
def test_in_place_in_any_order(
    in_shards: InShards, monkeypatch: pytest.MonkeyPatch, divergence: str
) -> None:
    """Logits whose columns are apart, too."""
    student, teacher = pair(3, 61)
    rows = Rows(torch.tensor([0, 45, -100], device=DEVICE))
    options = {"alpha": 0.5, "label_smoothing": 0.1}
    wanted = launch(in_shards, student, teacher, rows, divergence, Want(True), **options)
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z: place(x, builder.grid_dim[1] - 1 - y, z)
    )
    for inputs in (student.clone(), student.repeat_interleave(2, -1)[..., ::2]):
        want = Want(True, inplace=True)
        same(launch(in_shards, inputs, teacher, rows, divergence, want, **options), wanted)
        assert wanted.student_gradient is not None
        assert torch.equal(inputs, wanted.student_gradient)


@pytest.mark.parametrize("lanes", [4, 8])
def test_shares_and_lanes(in_shards: InShards, monkeypatch: pytest.MonkeyPatch, lanes: int) -> None:
    """Eight shares: more than there are lanes by default, and as many."""
    monkeypatch.setattr(kernels, "LANES", lanes)
    labels = torch.tensor([60], device=DEVICE)
    check("triton", *pair(1, 61), labels, divergence="jsd", alpha=0.5, label_smoothing=0.1)


def test_tensors_that_processes_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics where anything is to be normalized, sums where there is no closed form, of a loss that has them."""
    student, teacher = pair(2, 7)
    labels = torch.tensor([1, 2], device=DEVICE)
    result = Result(torch.empty(2), torch.empty(()))
    cases: list[tuple[str, float, bool, bool]] = [
        ("reverse_kl", 1.0, True, False),
        ("mixture", 1.0, True, True),
        ("jsd", 0.5, True, True),
        ("jsd", 0.0, True, False),
        ("squared_error", 0.5, True, True),
        ("squared_error", 1.0, False, True),
    ]
    for divergence, alpha, statistics, sums in cases:
        options = Options(resolve(divergence), alpha, vocab_size=7, shard=Shard(7, 21, 7, 1, None))
        call = ShardCall(student, teacher, Rows(labels), options, result)
        actual = kernels.shard_statistics(call)
        assert actual.gathered.shape == (2, 2 * split.FIELDS * statistics)
        actual = actual._replace(gathered=torch.stack([actual.gathered] * 3))
        left = kernels.shard_sums(call._replace(statistics=actual))
        assert (left is not None) == sums
        assert left is None or left.shape == (2, 2 * split.SUMS)


def test_no_rows(in_shards: InShards) -> None:
    actual = launch(in_shards, *pair(0, 61), Rows())
    assert actual.loss.shape == (0,)


def test_all_processes_have_the_same_plan() -> None:
    def programs(rows: int, total: int, widest: int) -> int:
        results = {
            split.shard_plan(rows, Shard(first, total, widest, 0, None)) for first in (0, 99)
        }
        assert len(results) == 1
        return results.pop().num_splits

    assert programs(4096, 128_256, 16_032) == 1, "rows that fill a device"
    assert programs(1, 1000, 500) == 1, "narrow rows"
    assert programs(0, 0, 0) == 1
    assert programs(1, 128_256, 64_128) == 32
    assert programs(1, 262_144, 32_768) == 8, "eight processes' shares of a row are 64"
    assert programs(1, 262_144, 2048) == 1


# Sparse teachers


@pytest.mark.parametrize("tail", TAILS)
def test_sparse_teachers(in_shards: InShards, tail: str) -> None:
    check_topk(
        "triton",
        logits(3, 61, seed=9),
        sparse(3, vocabulary=61, k=7, seed=10, tail=tail, at=2.0),
        torch.tensor([0, 33, 60]),
        divergence="jsd" if tail == "bucket" else "forward_kl",
        alpha=0.5,
        temperature=2.0,
        label_smoothing=0.1,
        logit_scale=-1.5,
    )


@pytest.mark.parametrize("options", for_topk(TOGETHER).values(), ids=TOGETHER)
def test_sparse_teachers_with_every_option(in_shards: InShards, options: dict[str, Any]) -> None:
    """41 counted columns of 43, offsets, a dropped row, and a weight and a temperature per row."""
    labels = dropped_by(options, torch.tensor([0, 33, 40, -100]))
    check_topk(
        "triton",
        logits(4, 43, seed=9) + torch.tensor([0.0, 100.0, -1e4, 0.0]).unsqueeze(-1),
        sparse(4, vocabulary=41, k=7, seed=10),
        labels,
        **for_kd_loss(options, columns=41)
        | {
            "weight": torch.tensor([1.0, 2.0, -0.5, 1.0]),
            "temperature": torch.tensor([0.7, 3.0, 1.0, 2.0]),
            "teacher_temperature": 1.0,
        },
    )


def test_invalid_sparse_rows(in_shards: InShards) -> None:
    """A token twice in one shard, and one of no shard; tokens of two shards are no twins for being first in each."""
    ids = torch.tensor([[31, 31], [0, 61], [0, 30]], device=DEVICE)
    logprobs = torch.full((3, 2), math.log(0.4), device=DEVICE)
    rows = Rows(ids=ids, tail_logprob=torch.full((3,), math.log(0.2), device=DEVICE))
    student = logits(3, 61, seed=1).to(DEVICE)
    actual = launch(in_shards, student, logprobs, rows, want=Want(True), tail="bucket")
    assert actual.student_gradient is not None
    for value in (actual.loss, actual.student_gradient):
        assert value[:2].isnan().all() and value[2].isfinite().all()
    inputs = student.repeat_interleave(2, -1)[..., ::2]
    want = Want(True, inplace=True)
    same(launch(in_shards, inputs, logprobs, rows, want=want, tail="bucket"), actual)
    assert torch.equal(inputs.nan_to_num(7e7), actual.student_gradient.nan_to_num(7e7))
