"""Divergences with a target on the CUDA kernels' own source, on the host: the label's column is out of every sum.

tests/backends/cuda/test_cuda_host.py says how it runs there. The bar is the reference in float64, which has tests of
its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.accuracy import labels_for, logits
from support.cuda_emulation import Emulation
from support.options import ALL, BRIEF, TOGETHER, Sets, dropped_by, for_kd_loss
from support.shards import InShards
from test_cuda_host import _placed
from torch import Tensor

import fastkd
from fastkd.backends import registry
from fastkd.divergences import Divergence, Target

INF = math.inf

_jsd = fastkd.jsd()
# Divergences of both forms; the last one needs a second sweep for its sums.
DIVERGENCES = {
    "dkd": fastkd.dkd(1.5, 8.0),
    "nkd": fastkd.nkd(1.5),
    "jsd": Divergence("jsd", _jsd.function, _jsd.params, _jsd.degree, target=Target("binary", 2.0)),
}
every = pytest.mark.parametrize("name", DIVERGENCES)

# The smallest width; a vector, a warp's 256 columns and a block's slice, each with one column less, exactly, and one
# more.
WIDTHS = (2, 7, 8, 9, 17, 255, 257, 2051)


def _outcome(
    backend: str, student: Tensor, teacher: Tensor, labels: Tensor, name: str, **options: Any
) -> list[Tensor]:
    """Loss, parts and gradients."""
    divergence = DIVERGENCES[name]
    leaves = [student.detach().requires_grad_()]
    leaves.append(teacher.detach().requires_grad_(divergence.degree is not None))
    loss, parts = fastkd.kd_loss(
        *leaves, labels, divergence=divergence, backend=backend, return_parts=True,
        **{"reduction": "none"} | options,
    )  # fmt: skip
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(loss.sum(), wanted)
    return [loss.detach(), *parts[:3], *gradients]


def _check(
    student: Tensor, teacher: Tensor, labels: Tensor, name: str, **options: Any
) -> list[Tensor]:
    """Assert that results are as exact as the float32 reference up to a few roundings, with the same infinities and
    NaN.

    Roundings are of a row's largest number, and of its divergence: what a teacher's gradient is a difference of.
    """
    actual = _outcome("cuda", student, teacher, labels, name, **options)
    plain, truth = (
        _outcome("reference", student.to(dtype), teacher.to(dtype), labels, name, **options)
        for dtype in (torch.float32, torch.float64)
    )
    divergence = truth[1].where(truth[1].isfinite(), 0.0).abs()
    for value, near, exact in zip(actual, plain, truth, strict=True):
        assert torch.equal(value.isnan(), exact.isnan())
        assert torch.equal(value[value.isinf()].double(), exact[value.isinf()])
        known = exact.isfinite()
        exact = exact.where(known, 0.0)
        roundings = 4e-6 * exact.abs() + (near.double() - exact).where(known, 0.0).abs()
        if value.dim() > labels.dim():
            roundings = roundings.amax(-1, keepdim=True) + 1e-6 * divergence.unsqueeze(-1)
        allowed = roundings.expand_as(exact) + 2e-7
        if value.dtype != torch.float32:
            information = torch.finfo(value.dtype)
            allowed = allowed + information.eps / 2 * exact.abs() + information.smallest_normal
        error = (value.double() - exact).where(known, 0.0).abs()
        assert bool((error <= allowed).all()), (
            f"{float((error / allowed).max())} of what is allowed"
        )
    return actual


def _everywhere(width: int) -> Tensor:
    """Labels first, last, at the ends of the first and the last vector, and in a ragged end."""
    seats = {0, 7, 8, width // 2, width // 8 * 8 - 1, width // 8 * 8, width - 1}
    return torch.tensor(sorted(seat for seat in seats if 0 <= seat < width))


@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every
def test_the_label_in_every_position(
    emulation: Emulation, name: str, dtype: torch.dtype, ranks: int
) -> None:
    emulation.ranks = ranks
    for width, temperature in zip(WIDTHS, (1.0, 4.0, 0.5) * 3, strict=False):
        labels = _everywhere(width)
        student, teacher = (logits(len(labels), width, seed=i, dtype=dtype) for i in (1, 2))
        _check(
            student, teacher, labels, name, temperature=temperature, alpha=0.6, label_smoothing=0.1
        )
        if ranks == 2:
            _check(student, teacher, labels, name, temperature=temperature)


ROWS: Sets = {
    "a temperature a row": {"temperature": torch.tensor([0.5, 1.0, 2.0, 4.0, 1.0, 7.0])},
    "labels alone": ALL["only hard labels"],
    "mean": {"reduction": "mean", "num_items": 3},
}
OPTIONS = BRIEF | ROWS


# All divergences have the first one's code around their two parts.
@pytest.mark.only_where(lambda option, name: name == "dkd" or option in {**TOGETHER, **ROWS})
@every
@pytest.mark.parametrize("option", OPTIONS)
def test_options(emulation: Emulation, option: str, name: str) -> None:
    """Rows that are ignored, masked and weighted among them; the teacher's gradient too."""
    emulation.ranks = 4
    student, teacher = logits(6, 309, seed=1), logits(6, 309, seed=2)
    labels = labels_for(6, vocabulary=301, seed=3)
    labels[1] = -100
    labels = dropped_by(OPTIONS[option], labels)
    rows = {"mask": torch.arange(6) != 3, "weight": torch.rand(6) + 0.1}
    options = for_kd_loss(OPTIONS[option], columns=301)
    _check(student, teacher, labels, name, **{"alpha": 0.5} | options | rows)


@pytest.mark.parametrize("dtypes", [
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("offset", [0, 3])
@every
def test_rows_at_any_address(
    emulation: Emulation, name: str, offset: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Rows of whole 16-byte pieces, and rows whose ends go through shared memory."""
    emulation.ranks = 2
    labels = torch.tensor([0, 150, 151, 299, 300])
    student = _placed(301, 5, offset, 320 + offset, dtypes[0], seed=1)
    teacher = _placed(301, 5, 0, 304, dtypes[1], seed=2)
    _check(student, teacher, labels, name, temperature=2.0, alpha=0.7)


@every
def test_many_vectors_per_thread(emulation: Emulation, name: str) -> None:
    """Stages that take the block's threads more than one round, in aligned bf16."""
    student, teacher = (logits(3, 10_000, seed=i, dtype=torch.bfloat16) for i in (1, 2))
    _check(student, teacher, torch.tensor([4095, 5000, 9999]), name, alpha=0.7, temperature=4.0)


LOW: dict[str, tuple[list[int], list[int]]] = {
    "the label, of the student": ([9], []),
    "the label, of the teacher": ([], [9]),
    "the label, of both": ([9], [9]),
    "another, of the student": ([4], []),
    "another, of the teacher": ([], [4]),
    "another, of both": ([4], [4]),
    "a vector and the label, of both": (list(range(16)), list(range(16))),
    "all but the label's vector, of both": (list(range(16, 300)), list(range(16, 300))),
}


@every
@pytest.mark.parametrize("low", LOW)
def test_log_0(emulation: Emulation, low: str, name: str) -> None:
    emulation.ranks = 2
    student, teacher, labels = logits(2, 300, seed=1), logits(2, 300, seed=2), torch.tensor([9, 20])
    student[0, LOW[low][0]], teacher[0, LOW[low][1]] = -INF, -INF
    if name == "nkd" and student[0, 9] == teacher[0, 9] == -INF:
        student[0, 9], teacher[0, 9] = -3.0, -2.0  # another test covers 0 log 0
    for options in ({"temperature": 2.0}, {"alpha": 0.6, "label_smoothing": 0.1}):
        _check(student, teacher, labels, name, **options)


def test_nkd_of_a_label_at_minus_infinity_on_both_sides(emulation: Emulation) -> None:
    """0 log 0 is 0, so only the part of the other tokens is left."""
    student, teacher, labels = logits(1, 50, seed=1), logits(1, 50, seed=2), torch.tensor([9])
    others = torch.arange(50) != 9
    expected = -1.5 * (teacher[:, others].softmax(-1) * student[:, others].log_softmax(-1)).sum(-1)
    student[0, 9], teacher[0, 9] = -INF, -INF
    loss, *_ = _outcome("cuda", student, teacher, labels, "nkd")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("gap", [60.0, -60.0, 1e4, -1e4])
@every
def test_models_certain_of_the_label(emulation: Emulation, name: str, gap: float) -> None:
    """Nothing cancels if the label has all of the probability, or none."""
    emulation.ranks = 2
    labels = torch.tensor([0, 150, 296, 299])  # 296 is the start of a vector of 4
    at_labels = torch.nn.functional.one_hot(labels, 300)
    for of_student, of_teacher in ((gap, 0.0), (0.0, gap), (gap, gap)):
        student = logits(4, 300, seed=1) + of_student * at_labels
        teacher = logits(4, 300, seed=2) + of_teacher * at_labels
        _check(student, teacher, labels, name, temperature=0.5)


def test_the_other_tokens_do_not_depend_on_the_label(emulation: Emulation) -> None:
    """The results have the same bits, whatever the label's logit is."""
    emulation.ranks = 2
    labels = torch.tensor([0, 8, 256, 300])
    student, teacher = logits(4, 301, seed=1), logits(4, 301, seed=2)
    outcomes = []
    for offset in (0.0, 40.0, -1e30):
        leaf = student.scatter_add(1, labels[:, None], torch.full((4, 1), offset)).requires_grad_()
        loss = fastkd.kd_loss(
            leaf, teacher, labels, divergence=fastkd.dkd(0.0), reduction="none", backend="cuda"
        )
        outcomes.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
        assert not outcomes[-1][1].gather(1, labels[:, None]).any()
    assert all(
        torch.equal(a, b) for actual in outcomes for a, b in zip(actual, outcomes[0], strict=True)
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_the_sum_of_the_parts_of_dkd(emulation: Emulation, temperature: float) -> None:
    """KL = TCKD + (1 - p_y) NCKD."""
    student, teacher, labels = logits(5, 301, seed=1), logits(5, 301, seed=2), torch.arange(5) * 75

    def loss(divergence: Divergence) -> Tensor:
        return fastkd.kd_loss(
            student, teacher, labels, divergence=divergence, temperature=temperature,
            reduction="none", backend="cuda",
        )  # fmt: skip

    p = (teacher / temperature).softmax(-1).gather(1, labels[:, None]).squeeze(1)
    parts = loss(fastkd.dkd(1.0, 0.0)) + (1 - p) * loss(fastkd.dkd(0.0, 1.0))
    torch.testing.assert_close(parts, loss(fastkd.forward_kl()), rtol=1e-5, atol=1e-5)


@every
def test_invalid_values_poison_their_row(emulation: Emulation, name: str) -> None:
    """A label outside the vocabulary makes only its row NaN, also if the label's term has weight 0."""
    student, teacher = logits(4, 50, seed=1), logits(4, 50, seed=2)
    loss, *_, gradient = _outcome("cuda", student, teacher, torch.tensor([1, 50, -1, 2]), name)
    bad = [False, True, True, False]
    assert loss.isnan().tolist() == gradient.isnan().all(-1).tolist() == bad
    assert gradient.isnan().any(-1).tolist() == bad


@every
def test_a_dropped_row_is_not_read(emulation: Emulation, name: str) -> None:
    """Each logit is read once, except the label's two logits, which every block reads."""
    student, teacher = logits(3, 344, seed=1), logits(3, 344, seed=2)
    student[1], teacher[1] = math.nan, math.nan
    labels = torch.tensor([1, -100, 2])
    for emulation.ranks in (1, 4):
        emulation.traffic()
        leaf = student.clone().requires_grad_()
        loss = fastkd.kd_loss(leaf, teacher, labels, divergence=DIVERGENCES[name], backend="cuda")
        assert emulation.traffic() == [2 * 4 * 2 * (344 + emulation.ranks), student.nbytes]
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite() and gradient.isfinite().all() and not gradient[1].any()


@every
def test_in_place(emulation: Emulation, name: str) -> None:
    emulation.ranks = 2
    student, teacher = _placed(301, 4, 1, 320, torch.float32, seed=1), logits(4, 301, seed=2)
    options = {"divergence": DIVERGENCES[name], "alpha": 0.5, "backend": "cuda"}
    outcomes = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        inputs = torch.empty_strided(student.shape, (320, 1)).copy_(leaf)
        loss = fastkd.kd_loss(
            inputs, teacher, torch.tensor([0, 7, 150, 300]), inplace=inplace, **options
        )
        outcomes.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


# Vocabulary shards


@pytest.fixture
def sharded(emulation: Emulation) -> Iterator[Emulation]:
    """The cuda backend in uneven shards, one of which has no column, each over two blocks."""
    emulation.ranks = 2
    kernels, load = InShards(registry.load("cuda"), (3.0, 1.0, 0.0, 2.0)), registry.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", lambda name: kernels if name == "cuda" else load(name))
        yield emulation
    assert kernels.calls


@pytest.mark.parametrize("offset", [0.0, 1e4])
@every
def test_shards(sharded: Emulation, name: str, offset: float) -> None:
    """The label in each shard, and first and last of them; a shard of the label alone."""
    options = {"temperature": 2.0, "alpha": 0.6, "label_smoothing": 0.1}
    for width in (61, 4, 2):
        labels = torch.tensor([seat for seat in (0, 1, 3, 29, 30, 39, 40, 60) if seat < width])
        student, teacher = (logits(len(labels), width, seed=seed) for seed in (1, 2))
        _check(student + offset, teacher - offset, labels, name, **options)
        if offset:
            continue
        softcaps = {"softcap": 9.0, "teacher_softcap": 5.0, "teacher_logit_scale": -0.5}
        _check(student, teacher, labels, name, temperature=0.5, **softcaps)


@every
def test_log_0_in_shards(sharded: Emulation, name: str) -> None:
    """Numbers of columns: of a shard, of the label's shard, of a shard with only the label."""
    student, teacher = logits(4, 61, seed=1), logits(4, 61, seed=2)
    student[0, :30], teacher[0, :30] = -INF, -INF
    teacher[1, 45:] = -INF
    student[2, 45] = -INF
    teacher[3, 45] = -INF
    _check(student, teacher, torch.tensor([45] * 4), name, temperature=2.0)


@every
def test_invalid_values_poison_their_row_in_shards(sharded: Emulation, name: str) -> None:
    test_invalid_values_poison_their_row(sharded, name)


# Planted faults turn the checks above red

FAULTS = {
    "the label among the student's others": ("columns.h", "    exclude_label(vector, s);\n", ""),
    "padding that is the label": ("columns.h", "k < vector.n - 1 ? z[k] : z[0]", "k < vector.n ? z[k] : z[0]"),
    "nobody closes ranks": ("columns.h", "k < vector.lane ? z[k] : z[k + 1]", "z[k]"),
    "the label in a plain vector": ("columns.h", "has_label ? label_vector : last", "last"),
    "a vector of the label alone": ("columns.h", "    if (vector.rest().n == 0) return;\n", ""),
    "another block's column": ("open.h", "row.label - first_column(call, rank);", "row.label;"),
    "a gradient among others": ("gradient.h", "set_label_gradient(vector, out, shared.label_gradient);", ""),
    "a teacher's gradient among others": (
        "gradient.h", "set_label_gradient(vector, teacher_out, shared.teacher_label_gradient);", ""),
    "the label's slope": ("gradient.h", "float(s) * row.student.slope(row.z_label)", "float(s)"),
    "the teacher's slope": ("gradient.h", "float(t) * row.teacher.slope(row.t_label)", "float(t)"),
    "the others' share of g": ("gradient.h", "  row.g += label_term.g;\n", ""),
    "the others' share of h": ("gradient.h", "- row.g + label_term.h;", "- row.g;"),
    "T squared of both parts": (
        "gradient.h", "label_term.nll_weight * label_term.nll;",
        "label_term.nll_weight * label_term.nll * temperature_factor(call, row.student.temperature);"
    ),
    "smoothing of both parts": ("gradient.h", "uniform * cross_entropy_share : uniform", "uniform : uniform"),
    "the teacher at its temperature": ("open.h", "row.flags |= TEACHER_EXP_SUM_T1;", ";"),
    "the others' softmax": ("finish.h", "row.label_term.rest_t1 / sum", "1 / sum"),
    "the others' cross-entropy": ("finish.h", "  row.cross_entropy += softplus(q_log_odds_t1);", ""),
    "the others' entropy": ("common/row_math.h", "+ q_rest * rest_entropy;", "+ rest_entropy;"),
    "labels that are not checked": ("open.h", "row.with_labels || has_label_term(call)) {", "row.with_labels) {"),
    "a sum of z without the label": ("shard.h", "double(row.z_label) - double(row.center)", "0"),
    "the label of the last shard": (
        "shard.h", "fmaxf(row.t_label, float(from[SWEPT_FIELDS + 1]))", "float(from[SWEPT_FIELDS + 1])"),
}  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_detected(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulation: Emulation
) -> None:
    broken = emulation.with_fault(FAULTS[fault], tmp_path)
    monkeypatch.setattr(registry.load("cuda"), "_cuda", broken)
    with pytest.raises((AssertionError, RuntimeError)):
        for name in DIVERGENCES:
            for option in OPTIONS:
                test_options(emulation, option, name)
            for dtype in (torch.float32, torch.bfloat16):
                test_the_label_in_every_position(emulation, name, dtype, 2)
            test_models_certain_of_the_label(emulation, name, 1e4)
            test_invalid_values_poison_their_row(emulation, name)
        kernels, load = InShards(registry.load("cuda"), (3.0, 1.0, 0.0, 2.0)), registry.load
        monkeypatch.setattr(
            registry, "load", lambda name: kernels if name == "cuda" else load(name)
        )
        for name in DIVERGENCES:
            test_shards(emulation, name, 1e4)
