"""Online losses (mutual learning, ensembles, mean teachers, born-again networks) against the papers' formulas in
float64.

The bar of mutual_loss is that of tests/support/accuracy.py: the error of plain float32 PyTorch (log_softmax, F.kl_div
per pair, F.cross_entropy), plus a unit in the last place of the terms that the result sums.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import (
    ULP,
    assert_within,
    gradient_bar,
    labels_for,
    logits,
    powers_for,
    upstream_for,
    value_bar,
)
from support.interpreters import python
from support.paths import ROOT
from support.remembered import remembered
from support.triton_interpreter import corrected
from torch import Tensor, nn

import fastkd
from fastkd import BackendUnavailable, kd_loss
from fastkd.online import (
    MeanTeacher,
    born_again,
    consistency_loss,
    ensemble_logits,
    ensemble_loss,
    generations_teacher,
    mutual_loss,
    ramp_up,
)

INF, NAN = math.inf, math.nan
PEERS = ("mean", "sum", "average")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
forms = pytest.mark.parametrize("peers", PEERS)

# NumPy warns about infinities and NaN with which Triton's interpreter computes.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def corrected_interpreter() -> Iterator[None]:
    with corrected():
        yield


@pytest.fixture(params=["reference", "cpu", "triton"])
def everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend, Triton with several tiles per row; for tests of a few small rows."""
    if request.param == "triton":
        monkeypatch.setattr("fastkd.kernels.mutual.ELEMENTS", 64)
    return str(request.param)


# ---- mutual learning: the oracle


class Exact(NamedTuple):
    """For every student: the loss, its gradient, and the effect on both of a unit of error in a log-probability."""

    losses: list[Tensor]
    gradients: list[Tensor]
    loss_terms: list[Tensor]
    gradient_terms: list[Tensor]


@remembered
def compose(
    students: list[Tensor],
    labels: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    temperature: float = 1.0,
    peers: str = "mean",
    peer_weight: float = 1.0,
    scale_by_temperature: bool = True,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "none",
    num_items: float | None = None,
    upstream: Tensor | None = None,
) -> Exact:
    """L_k = CE_k + peer_weight T^2 D_k as Zhang et al. (2018) and Anil et al. (2018) have D_k, peers detached."""
    lead = students[0].shape[:-1]
    counted = torch.ones(lead, dtype=torch.bool)
    if labels is not None:
        counted &= labels != ignore_index
    if mask is not None:
        counted &= mask
    leaves = [student.detach().to(dtype).requires_grad_() for student in students]
    # Dropped rows must not be read.
    z = [torch.where(counted.unsqueeze(-1), leaf, 0.0) for leaf in leaves]
    log_p = [(student / temperature).log_softmax(-1) for student in z]
    factor = peer_weight * (temperature**2 if scale_by_temperature else 1.0)
    target = torch.zeros(lead, dtype=torch.int64) if labels is None else labels
    target = target.masked_fill(~counted, 0)
    multiplier = torch.ones(lead, dtype=dtype) if weight is None else weight.to(dtype)
    multiplier = multiplier.masked_fill(~counted, 0.0)
    denominator = 1.0
    if reduction in ("mean", "batchmean"):
        denominator = max(int(counted.sum()), 1) if reduction == "mean" else max(lead[0], 1)
        denominator = num_items or denominator

    def kl(log_x: Tensor, log_q: Tensor) -> Tensor:
        gone = log_x == -INF  # 0 log 0 = 0, whatever the student says
        return log_x.exp() * (log_x.masked_fill(gone, 0.0) - log_q.masked_fill(gone, 0.0))

    def size(log_x: Tensor) -> Tensor:
        return log_x.detach().abs().clamp(1.0, 1e30)

    losses, gradients, loss_terms, gradient_terms = [], [], [], []
    for k, own in enumerate(log_p):
        others = [value.detach() for index, value in enumerate(log_p) if index != k]
        if peers == "average":
            targets, share = [torch.stack(others).logsumexp(0) - math.log(len(others))], 1.0
        else:
            targets, share = others, 1.0 if peers == "sum" else 1.0 / len(others)
        divergence, terms, own_terms = (
            torch.zeros(shape, dtype=dtype) for shape in (lead, lead, own.shape)
        )
        q = own.detach().exp()
        for log_x in targets:
            phi, p = kl(log_x, own), log_x.exp()
            divergence = divergence + share * phi.sum(-1)
            # The effect of both log-probabilities' errors, plus the rounding of the result; as in
            # tests/support/oracles.py.
            off = phi.abs() + p + (phi + p).abs() * size(log_x) + p * size(own)
            terms = terms + factor * share * off.detach().nan_to_num(0.0, 0.0, 0.0).sum(-1)
            total = 1 + (p * size(log_x)).sum(-1, keepdim=True) + size(own)
            own_terms = own_terms + factor * share / temperature * (
                p * (1 + size(log_x)) + q * total
            )
        loss = factor * divergence if factor else 0.0 * own.sum(-1)
        if labels is not None:
            plain = z[k].log_softmax(-1)
            entropy = -plain.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            loss, terms = loss + entropy, terms + 2 * size(entropy)
            own_terms = own_terms + plain.detach().exp() * size(plain)
            own_terms = own_terms + F.one_hot(target, own.shape[-1])
        loss = torch.where(counted, loss, 0.0) * multiplier
        terms = torch.where(counted, terms, 0.0) * multiplier.abs()
        if reduction != "none":
            loss, terms = loss.sum() / denominator, terms.sum() / denominator
        inputs = torch.ones_like(loss) if upstream is None else upstream.to(dtype)
        (gradient,) = torch.autograd.grad(
            loss, leaves[k], inputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        reach = (inputs.expand(lead) * multiplier).abs().unsqueeze(-1) / denominator
        losses.append(loss.detach())
        gradients.append(gradient)
        loss_terms.append(terms.detach())
        gradient_terms.append((own_terms * reach).detach())
    return Exact(losses, gradients, loss_terms, gradient_terms)


def check(
    backend: str, students: list[Tensor], labels: Tensor | None = None, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Check values and gradients of mutual_loss against the bar, per row unless a reduction is given."""
    options.setdefault("reduction", "none")
    upstream = options.pop("upstream", None)
    if upstream is None and options["reduction"] == "none":
        rounds = students[0].dtype == torch.bfloat16
        upstream = (powers_for if rounds else upstream_for)(*students[0].shape[:-1])
    leaves = [student.detach().requires_grad_() for student in students]
    before = [student.clone() for student in students]
    losses = mutual_loss(leaves, labels, backend=backend, **options)
    gradients = [
        torch.autograd.grad(loss, leaf, upstream)[0]
        for loss, leaf in zip(losses, leaves, strict=True)
    ]
    exact = compose(students, labels, upstream=upstream, **options)
    plain = compose(students, labels, upstream=upstream, dtype=torch.float32, **options)
    for k in range(len(students)):
        assert losses[k].dtype == torch.float32 and gradients[k].dtype == students[k].dtype
        bar = value_bar(plain.losses[k], exact.losses[k], exact.loss_terms[k])
        assert_within(f"loss {k}", losses[k].detach(), exact.losses[k], bar)
        bar = gradient_bar(
            plain.gradients[k], exact.gradients[k], exact.gradient_terms[k], students[k].dtype
        )
        # The gradient of a nearly certain column is minus the sum of the others, which rounds once more.
        bar = bar + ULP * exact.gradients[k].abs()
        assert_within(
            f"gradient {k}",
            gradients[k],
            exact.gradients[k],
            2 * bar if backend in ("portable", "reference") else bar,
        )
        torch.testing.assert_close(leaves[k].detach(), before[k], rtol=0, atol=0, equal_nan=True)
    return [loss.detach() for loss in losses], gradients


def group(
    count: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 3.0
) -> list[Tensor]:
    return [logits(*shape, seed=10 * seed + k, dtype=dtype, spread=spread) for k in range(count)]


# ---- mutual learning: values and gradients


# Widths: the label alone, less than a vector, an unaligned width, one block of the CPU kernel, one column more, two
# blocks and a column. Numbers of students: those with their own CPU kernel, and the first number without one.
@pytest.mark.only_where(
    lambda backend, columns: backend == "cpu" or columns != 2048
)  # the CPU kernel works in blocks
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@forms
@pytest.mark.parametrize("columns", [1, 2, 31, 2048, 2049, 4097])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
@pytest.mark.pairwise(each="backend")
def test_values_and_gradients(
    backend: str, count: int, columns: int, peers: str, temperature: float
) -> None:
    students, labels = group(count, 2, columns), labels_for(2, vocabulary=columns, seed=1)
    check(backend, students, labels, peers=peers, temperature=temperature)


@forms
@dtypes
def test_instruction_sets(instructions: str, dtype: torch.dtype, peers: str) -> None:
    for count, columns, temperature in (
        (2, 37, 1.0),
        (3, 2049, 0.5),
        (4, 4097, 4.0),
        (5, 100, 1.0),
    ):
        labels = labels_for(3, vocabulary=columns, seed=1)
        students = group(count, 3, columns, dtype=dtype)
        check("cpu", students, labels, peers=peers, temperature=temperature)
        check("cpu", students, peers=peers, temperature=temperature)


@pytest.mark.parametrize(
    ("count", "columns", "peers", "temperature", "dtype"),
    [
        (2, 31, "mean", 1.0, torch.float32),
        (3, 33, "sum", 4.0, torch.float16),
        (4, 16, "mean", 0.5, torch.bfloat16),
        (5, 17, "average", 1.0, torch.float32),
        (8, 1, "mean", 4.0, torch.float32),
    ],
)
def test_triton(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    columns: int,
    peers: str,
    temperature: float,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr("fastkd.kernels.mutual.ELEMENTS", 64)
    labels = labels_for(3, vocabulary=columns, seed=1)
    check(
        "triton",
        group(count, 3, columns, dtype=dtype),
        labels,
        peers=peers,
        temperature=temperature,
    )


@forms
@dtypes
def test_options(everywhere: str, dtype: torch.dtype, peers: str) -> None:
    students = group(3, 2, 3, 20, dtype=dtype)
    labels = torch.tensor([[3, -100, 19], [0, 7, -100]])
    options: dict[str, Any] = {
        "peers": peers,
        "temperature": 2.0,
        "peer_weight": 0.5,
        "mask": torch.tensor([[True, True, True], [False, True, True]]),
        "weight": torch.tensor([[0.5, 1.0, -2.0], [4.0, 0.0, 1.0]]),
    }
    check(everywhere, students, labels, **options)
    for reduction in ("sum", "mean", "batchmean"):
        check(
            everywhere,
            students,
            labels,
            reduction=reduction,
            upstream=torch.tensor(-0.5),
            **options,
        )
    if everywhere != "triton":
        check(everywhere, students, labels, scale_by_temperature=False, **options)
        check(everywhere, students, labels, reduction="mean", num_items=7, **options)
        check(everywhere, students, peers=peers, temperature=2.0)


def test_the_published_sum_over_pairs(everywhere: str) -> None:
    """The other published form, a sum over pairs, term by term."""
    students = group(3, 2, 9)
    losses = mutual_loss(students, peers="sum", reduction="sum", backend=everywhere)
    log_p = [student.double().log_softmax(-1) for student in students]
    for k, loss in enumerate(losses):
        exact = sum(
            float((log_p[other].exp() * (log_p[other] - log_p[k])).sum())
            for other in range(3)
            if other != k
        )
        assert loss.item() == pytest.approx(exact, rel=1e-6)


def test_the_average_has_the_gradient_of_the_mean(backend: str) -> None:
    gradients = []
    values = []
    for peers in ("mean", "average"):
        leaves = [student.requires_grad_() for student in group(4, 3, 50)]
        losses = mutual_loss(leaves, peers=peers, backend=backend)
        sum(losses).backward()
        gradients.append(torch.stack([leaf.grad for leaf in leaves]))
        values.append(sum(losses).item())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-7)
    assert values[0] > values[1] * 1.1  # Jensen's inequality


def test_co_distillation_is_an_ensemble_of_the_others() -> None:
    """fastkd.Ensemble of the other students gives the same loss for each student."""
    students = group(3, 4, 40)
    losses = mutual_loss(students, peers="average", temperature=2.0, reduction="none")
    for k, loss in enumerate(losses):
        others = fastkd.Ensemble([student for index, student in enumerate(students) if index != k])
        torch.testing.assert_close(
            loss,
            kd_loss(students[k], others, temperature=2.0, reduction="none"),
            rtol=1e-5,
            atol=1e-6,
        )


# ---- mutual learning: numerics


@pytest.mark.only_where(lambda everywhere, count: everywhere != "triton" or count == 3)
@forms
@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_equal_students_have_loss_0(everywhere: str, count: int, peers: str) -> None:
    """The loss is not computed as a difference of large sums, so at most the rounding error of a product is left.

    A GPU leaves it if it fuses the product with the following subtraction.
    """
    one = logits(2, 40, seed=1) if everywhere == "triton" else logits(2, 5000, seed=1, spread=6.0)
    leaves = [one.clone().requires_grad_() for _ in range(count)]
    losses = mutual_loss(leaves, peers=peers, temperature=0.7, reduction="sum", backend=everywhere)
    gradients = torch.autograd.grad(sum(losses), leaves)
    by_sums = everywhere in ("portable", "reference") and peers == "average"
    for loss, gradient in zip(losses, gradients, strict=True):
        assert abs(loss.item()) <= (1e-6 if by_sums else 1e-11)
        assert gradient.abs().max() <= (1e-8 if by_sums else 1e-14)


# Students that differ by this distance: KL is about its square.
@pytest.mark.parametrize("distance", [1e-2, 1e-3])
@forms
def test_close_students(backend: str, peers: str, distance: float) -> None:
    first = logits(4, 3000, seed=1)
    students = [first + distance * logits(4, 3000, seed=k, spread=1.0) for k in range(3)]
    exact, plain = (compose(students, peers=peers, dtype=d) for d in (torch.float64, torch.float32))
    losses = mutual_loss(students, peers=peers, reduction="none", backend=backend)
    if backend == "portable":
        check(backend, students, peers=peers)
        return
    error, of_plain = (
        max(float((a - b).abs().max()) for a, b in zip(actual, exact.losses, strict=True))
        for actual in (losses, plain.losses)
    )
    assert error <= of_plain


@forms
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_common_shifts(everywhere: str, peers: str, shift: float) -> None:
    students = [student.round() for student in group(3, 2, 33)]  # which the shift does not round
    moved = [students[0] + shift, students[1], students[2] - 3 * shift]
    labels = labels_for(2, vocabulary=33, seed=1)
    for temperature in (1.0, 0.5):
        options: dict[str, Any] = {
            "peers": peers,
            "temperature": temperature,
            "backend": everywhere,
        }
        here, there = (mutual_loss(inputs, labels, **options) for inputs in (students, moved))
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 1000.0])
def test_students_far_apart(backend: str, temperature: float) -> None:
    """Students that are certain of different tokens, and one with uniform probabilities."""
    students = group(3, 3, 100)
    students[0][:, 7] += 90.0
    students[1][:, 60] += 400.0
    students[2].zero_()
    for peers in PEERS:
        check(
            backend,
            students,
            labels_for(3, vocabulary=100, seed=1),
            peers=peers,
            temperature=temperature,
        )


@forms
def test_tokens_that_every_student_excludes(everywhere: str, peers: str) -> None:
    students = group(3, 2, 40)
    for student in students:
        student[:, 5:9] = -INF
    _, gradients = check(everywhere, students, torch.tensor([0, 39]), peers=peers)
    assert all((gradient[:, 5:9] == 0).all() for gradient in gradients)


@forms
def test_tokens_that_one_student_excludes(everywhere: str, peers: str) -> None:
    """The student without the token has an infinite loss, the others do not; its gradient is the limit's."""
    count = 4 if everywhere == "triton" else 5
    students = group(count, 3, 40)
    students[0][1, 5] = students[2][2, 30] = -INF
    losses, gradients = check(everywhere, students, torch.tensor([0, 39, 7]), peers=peers)
    infinite = torch.stack([loss == INF for loss in losses])
    assert infinite.nonzero().tolist() == [[0, 1], [2, 2]]
    assert all(gradient.isfinite().all() for gradient in gradients)


@forms
def test_an_excluded_token_that_is_negligible_elsewhere(everywhere: str, peers: str) -> None:
    students = group(2, 1, 20)
    students[0][0, 5], students[1][0, 5] = -INF, -200.0
    actual = mutual_loss(students, peers=peers, backend=everywhere)
    students[1][0, 5] = -INF
    torch.testing.assert_close(actual, mutual_loss(students, peers=peers, backend=everywhere))
    assert actual[0].isfinite()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_logit_reaches_the_loss(everywhere: str, bad: float) -> None:
    students = group(3, 2, 20)
    students[1][0, 3] = bad
    for loss in mutual_loss(students, reduction="none", backend=everywhere):
        assert loss[0].isnan() and loss[1].isfinite()


def test_low_rows(backend: str) -> None:
    """Logits below the value that pads a block."""
    students = [student.double().mul(1e28).sub(3e30).float() for student in group(3, 2, 20)]
    losses = mutual_loss(
        students, temperature=1e28, reduction="none", scale_by_temperature=False, backend=backend
    )
    exact = compose(students, temperature=1e28, scale_by_temperature=False)
    for loss, truth in zip(losses, exact.losses, strict=True):
        torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-5)


# Rows larger than a thread's scratch memory, and larger than the cache.
@pytest.mark.parametrize(("count", "columns"), [(3, 131_100), (5, 70_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_rows(instructions: str, count: int, columns: int, dtype: torch.dtype) -> None:
    students, labels = (
        group(count, 4, columns, dtype=dtype),
        labels_for(4, vocabulary=columns, seed=1),
    )
    students[0][2, 60_000] = -INF
    leaves = [student.requires_grad_() for student in students]
    losses = mutual_loss(leaves, labels, temperature=2.0, reduction="none", backend="cpu")
    gradients = torch.autograd.grad(sum(losses).sum(), leaves)
    p = [(student.detach().double() / 2).softmax(-1) for student in students]
    for k, gradient in enumerate(gradients):
        others = sum(p[other] for other in range(count) if other != k) / (count - 1)
        exact = (
            2 * (p[k] - others)
            + students[k].detach().double().softmax(-1)
            - F.one_hot(labels, columns)
        )
        bound = exact.abs() * (2**-8 if dtype == torch.bfloat16 else 0) + 1e-7
        assert ((gradient.double() - exact).abs() <= bound).all()
        assert losses[k].isfinite().tolist() == [True, True, k != 0, True]


# ---- mutual learning: rows, layouts, threads


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
def test_dropped_rows_are_not_read(everywhere: str, reduction: str) -> None:
    students = group(3, 4, 20)
    labels = torch.tensor([3, -100, 5, 7])
    mask = torch.tensor([True, True, False, True])
    for student in students:
        student[1:3] = NAN
    _, gradients = check(everywhere, students, labels, mask=mask, reduction=reduction)
    assert all((gradient[1:3] == 0).all() for gradient in gradients)


def test_an_infinite_upstream_gradient_of_dropped_rows(backend: str) -> None:
    leaves = [student.requires_grad_() for student in group(2, 4, 9)]
    mask, labels = torch.tensor([True, False, True, True]), torch.tensor([1, 2, -100, 3])
    loss = mutual_loss(leaves, labels, mask=mask, reduction="none", backend=backend)[0]
    (gradient,) = torch.autograd.grad(loss, leaves[0], torch.tensor([1.0, INF, NAN, 1.0]))
    assert (gradient[1:3] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("rows", [0, 3])
def test_a_batch_without_a_counted_row_has_loss_0(everywhere: str, rows: int) -> None:
    leaves = [student.requires_grad_() for student in group(2, rows, 9)]
    labels = torch.full((rows,), -100)
    losses = mutual_loss(leaves, labels, backend=everywhere)
    gradients = torch.autograd.grad(sum(losses), leaves)
    assert [loss.item() for loss in losses] == [0.0, 0.0]
    assert all(gradient.shape == (rows, 9) and (gradient == 0).all() for gradient in gradients)


def test_one_row_without_a_leading_shape(everywhere: str) -> None:
    students = [student[0] for student in group(3, 1, 20)]
    check(everywhere, students, torch.tensor(4), upstream=torch.tensor(2.0))


def test_layouts(everywhere: str) -> None:
    """Shifted, sliced, transposed, expanded and offset views give bitwise the results of contiguous copies."""
    labels = labels_for(3, 4, vocabulary=19, seed=1)
    inputs = [
        logits(3, 5, 19, seed=1)[:, :-1],
        logits(3, 4, 23, seed=2)[..., 3:22],
        logits(4, 3, 19, seed=3).transpose(0, 1),
        logits(3, 19, 4, seed=4).transpose(1, 2),
        logits(4, 19, seed=5).expand(3, 4, 19),
    ]
    results = []
    for students in (inputs, [student.contiguous() for student in inputs]):
        leaves = [student.detach().requires_grad_() for student in students]
        losses = mutual_loss(leaves, labels, reduction="none", temperature=2.0, backend=everywhere)
        results.append([*losses, *torch.autograd.grad(sum(losses).sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_students_that_require_grad_get_a_gradient(everywhere: str) -> None:
    students = group(3, 2, 20)
    leaves = [student.clone() for student in students]
    leaves[1].requires_grad_()
    losses = mutual_loss(leaves, backend=everywhere)
    assert [loss.requires_grad for loss in losses] == [False, True, False]
    (actual,) = torch.autograd.grad(losses[1], leaves[1])
    everyone = [student.requires_grad_() for student in students]
    (expected,) = torch.autograd.grad(mutual_loss(everyone, backend=everywhere)[1], everyone[1])
    assert torch.equal(actual, expected)
    with torch.no_grad():
        assert not any(loss.requires_grad for loss in mutual_loss(everyone, backend=everywhere))


@forms
@dtypes
def test_threads(dtype: torch.dtype, peers: str) -> None:
    """Results are bitwise equal for any number of threads."""
    students, labels = group(3, 7, 5001, dtype=dtype), labels_for(7, vocabulary=5001, seed=1)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            leaves = [student.clone().requires_grad_() for student in students]
            losses = mutual_loss(leaves, labels, peers=peers, temperature=2.0, backend="cpu")
            runs.append([*losses, *torch.autograd.grad(sum(losses), leaves)])
    finally:
        torch.set_num_threads(before)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_parts(everywhere: str) -> None:
    students = group(3, 4, 20)
    labels, weight = torch.tensor([3, -100, 5, 7]), torch.tensor([1.0, 1.0, 2.0, 0.5])
    losses, parts = mutual_loss(
        students,
        labels,
        weight=weight,
        temperature=2.0,
        reduction="none",
        return_parts=True,
        backend=everywhere,
    )
    torch.testing.assert_close(torch.stack(losses), weight * (parts.peers + parts.cross_entropy))
    entropy = [F.cross_entropy(student, labels, reduction="none") for student in students]
    torch.testing.assert_close(parts.cross_entropy, torch.stack(entropy))
    assert int(parts.counted) == 3 and (parts.peers[:, 1] == 0).all()


# ---- mutual learning: autograd


def test_each_student_has_its_own_backward(everywhere: str) -> None:
    """Each student has its own optimizer: no graph is shared, and the other students get no gradient."""
    leaves = [student.requires_grad_() for student in group(3, 2, 20)]
    losses = mutual_loss(leaves, backend=everywhere)
    for k, loss in enumerate(losses):
        loss.backward()
        assert [leaf.grad is not None for leaf in leaves] == [index <= k for index in range(3)]
    together = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    sum(mutual_loss(together, backend=everywhere)).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, together, strict=True))


@forms
def test_gradcheck(peers: str) -> None:
    """gradcheck of each student alone, as its peers are constants; float64, on the reference."""
    students = [student.double() for student in group(3, 2, 5)]
    labels = torch.tensor([1, 4])
    for k in range(3):

        def loss_of_student(leaf: Tensor, k: int = k) -> Tensor:
            inputs = [leaf if index == k else student for index, student in enumerate(students)]
            return mutual_loss(inputs, labels, temperature=1.7, peers=peers, reduction="none")[k]

        leaf = students[k].clone().requires_grad_()
        assert loss_of_student(leaf).dtype == torch.float64
        assert torch.autograd.gradcheck(loss_of_student, (leaf,))


@dtypes
def test_the_loss_squared_and_a_retained_graph(backend: str, dtype: torch.dtype) -> None:
    leaves = [student.requires_grad_() for student in group(2, 3, 50, dtype=dtype)]
    loss = mutual_loss(leaves, reduction="sum", backend=backend)[0]
    (once,) = torch.autograd.grad(loss, leaves[0], retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaves[0], retain_graph=True)
    (squared,) = torch.autograd.grad(loss**2, leaves[0])
    assert torch.equal(once, again)
    expected = (2 * loss.detach() * once).float()
    torch.testing.assert_close(
        squared.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves[0])


def test_small_float16_gradients_reach_a_loss_scaler(everywhere: str) -> None:
    students = [student / 8 for student in group(3, 2, 20, dtype=torch.float16)]
    scale = 2.0**-30
    leaves = [student.requires_grad_() for student in students]
    losses = mutual_loss(
        leaves, weight=torch.full((2,), scale), reduction="sum", backend=everywhere
    )
    gradients = torch.autograd.grad(sum(losses) / scale, leaves)
    expected = compose(students, reduction="sum").gradients
    for gradient, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-3, atol=1e-6)


def test_second_derivatives_raise(backend: str) -> None:
    leaves = [student.requires_grad_() for student in group(2, 2, 9)]
    loss = mutual_loss(leaves, backend=backend)[0]
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), leaves[0])


def test_autocast_gives_float32(backend: str) -> None:
    students = group(2, 3, 30, dtype=torch.bfloat16)
    plain = mutual_loss(students, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mutual_loss(students, backend=backend)
    assert all(
        a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(inside, plain, strict=True)
    )


def test_compiled_functions_give_the_same_numbers(backend: str) -> None:
    leaves = [student.requires_grad_() for student in group(2, 3, 30)]
    labels = torch.tensor([1, -100, 5])

    def step(a: Tensor, b: Tensor) -> Tensor:
        return sum(mutual_loss([a * 2, b + 1], labels, backend=backend))

    expected = torch.autograd.grad(step(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(step, backend="eager")(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_memory_is_released() -> None:
    leaves = [student.requires_grad_() for student in group(2, 3, 30)]
    losses = mutual_loss(leaves, backend="cpu")
    node = weakref.ref(losses[0].grad_fn)
    sum(losses).backward()
    del losses
    assert node() is None


# ---- mutual learning: arguments


def _bad(**changes: Any) -> dict[str, Any]:
    return {"logits": group(3, 2, 7), "labels": torch.tensor([1, 2]), **changes}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        _bad(logits=torch.ones(3, 2, 7)),
        TypeError,
        "logits must be a list of tensors, one per student; got Tensor",
    ),
    (
        _bad(logits=group(1, 2, 7)),
        ValueError,
        "logits must be of two or more students, got 1",
    ),
    (
        _bad(logits=[torch.ones(2, 7), None]),
        TypeError,
        "logits[1] must be a tensor of logits, got NoneType",
    ),
    (
        _bad(logits=[*group(2, 2, 7), torch.ones(2, 8)]),
        ValueError,
        "logits[2] must have the shape of logits[0], (2, 7); got (2, 8)",
    ),
    (
        _bad(logits=[*group(2, 2, 7), torch.ones(2, 7).half()]),
        TypeError,
        "logits[2] must be torch.float32, the dtype of logits[0]; got torch.float16",
    ),
    (
        _bad(logits=[torch.ones(2, 7), torch.ones(2, 7, device="meta")]),
        ValueError,
        "logits[1] must be on cpu, where logits[0] is; got meta",
    ),
    (
        _bad(logits=[torch.ones(2, 7, dtype=torch.int32)] * 2),
        TypeError,
        "logits[0] must be float32, bfloat16, float16 or float64, got torch.int32",
    ),
    (
        _bad(labels=torch.tensor([1])),
        ValueError,
        "labels must have one value a row, shape (2,); got (1,)",
    ),
    (_bad(temperature=0.0), ValueError, "temperature must be positive and finite, got 0.0"),
    (_bad(temperature=torch.ones(2)), TypeError, "temperature must be a number, got Tensor"),
    (_bad(peers="median"), ValueError, "peers must be one of mean, sum, average; got 'median'"),
    (_bad(peer_weight=-1.0), ValueError, "peer_weight must be in [0, inf), got -1.0"),
    (_bad(peer_weight=NAN), ValueError, "peer_weight must be in [0, inf), got nan"),
    (_bad(peer_weight="1"), TypeError, "peer_weight must be a number, got str"),
    (_bad(return_parts=1), TypeError, "return_parts must be True or False, got int"),
    (
        _bad(reduction="median"),
        ValueError,
        "reduction must be one of none, sum, mean, batchmean; got 'median'",
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments(backend: str, case: int) -> None:
    arguments, error, message = BAD[case]
    inputs, labels = (copy.copy(arguments[name]) for name in ("logits", "labels"))
    options = {name: value for name, value in arguments.items() if name not in ("logits", "labels")}
    with pytest.raises(error) as caught:
        mutual_loss(inputs, labels, backend=backend, **options)
    assert str(caught.value) == message


def test_backends_that_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    students = group(2, 2, 7)
    with pytest.raises(BackendUnavailable):
        mutual_loss(students, backend="cuda")
    monkeypatch.setattr("fastkd.backends.registry.select", lambda *call: "cuda")
    monkeypatch.setattr("fastkd.backends.registry.load", lambda backend: object())
    with pytest.raises(BackendUnavailable, match="no kernel for mutual learning"):
        mutual_loss(students)
    monkeypatch.undo()
    with pytest.raises(BackendUnavailable, match="float64"):
        mutual_loss([student.double() for student in students], backend="cpu")


def test_invalid_labels(everywhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    students, labels = group(2, 3, 7), torch.tensor([1, 7, -1])
    for loss in mutual_loss(students, labels, reduction="none", backend=everywhere):
        assert loss.isnan().tolist() == [False, True, True]
    monkeypatch.setenv("FASTKD_CHECK", "1")
    with pytest.raises(ValueError, match=r"labels must be in \[0, 7\)"):
        mutual_loss(students, labels, backend=everywhere)


def test_the_requested_kernel_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.backends import cpu, reference

    ran = []
    for name, module in (("cpu", cpu), ("reference", reference)):
        launch = module.mutual_rows
        monkeypatch.setattr(
            module, "mutual_rows", lambda *given, n=name, f=launch: ran.append(n) or f(*given)
        )
    for backend in ("auto", "cpu", "reference"):
        mutual_loss(group(2, 2, 7), backend=backend)
    assert ran == ["cpu", "cpu", "reference"]


# The other targets and variants differ in the chosen instructions and in the tile size. Triton's cache is kept between
# runs, as in tests/backends/triton/test_triton_aot.py.
@pytest.mark.parametrize(
    ("target", "full"),
    [
        ("cuda:90", "0"),
        pytest.param("cuda:90", "1", marks=pytest.mark.heavy),
        pytest.param("hip:gfx942", "1", marks=pytest.mark.heavy),
    ],
)
def test_the_triton_kernel_compiles_and_keeps_its_tiles_in_registers(
    target: str, full: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(ROOT / "build" / "triton_aot"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    script = str(ROOT / "tests" / "support" / "mutual_aot.py")
    done = python(script, target, full, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert results
    assert not [line for line in results if line[1][1] >= 32 or line[1][2]]


# ---- on-the-fly ensembles


def _one(
    students: list[Tensor], labels: Tensor, gate: Tensor, temperature: float, weight: float
) -> Tensor:
    """The loss by equations 5 to 8 of Lan, Zhu and Gong (2018), per row."""
    mixed = sum(gate[..., i, None] * student for i, student in enumerate(students))
    target = (mixed.detach() / temperature).log_softmax(-1)
    loss = F.cross_entropy(mixed, labels, reduction="none")
    for student in students:
        kl = F.kl_div(
            (student / temperature).log_softmax(-1), target, reduction="none", log_target=True
        )
        loss = loss + F.cross_entropy(student, labels, reduction="none")
        loss = loss + weight * temperature**2 * kl.sum(-1)
    return loss


@pytest.mark.parametrize("per_row", [False, True])
def test_ensemble_loss(backend: str, per_row: bool) -> None:
    students, labels = group(3, 4, 30), labels_for(4, vocabulary=30, seed=1)
    learned = logits(*((4, 3) if per_row else (3,)), seed=5, spread=1.0)
    results = []
    for dtype, made in (
        (
            torch.float32,
            lambda s, g: ensemble_loss(
                s, labels, g, ensemble_weight=0.7, reduction="none", backend=backend
            ),
        ),
        (torch.float64, lambda s, g: _one(s, labels, g, 3.0, 0.7)),
    ):
        leaves = [student.to(dtype).requires_grad_() for student in students]
        gate = learned.to(dtype).requires_grad_()
        loss = made(leaves, gate.softmax(-1))
        results.append(
            [loss, *torch.autograd.grad(loss, (*leaves, gate), upstream_for(4).to(dtype))]
        )
    for actual, exact in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=2e-6)


def test_ensemble_logits() -> None:
    students = group(3, 4, 9, dtype=torch.bfloat16)
    mean = ensemble_logits(students)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, torch.stack(students).float().mean(0))
    gate = torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close(
        ensemble_logits(students, gate),
        sum(g * s.float() for g, s in zip(gate, students, strict=True)),
    )
    leaves = [student.double().requires_grad_() for student in students]
    assert torch.autograd.gradcheck(
        lambda g, *branches: ensemble_logits(branches, g), (gate.double().requires_grad_(), *leaves)
    )


def test_ensemble_loss_drops_rows_and_reduces() -> None:
    students, labels = group(2, 4, 9), torch.tensor([1, -100, 3, 4])
    rows = ensemble_loss(students, labels, reduction="none")
    assert rows[1] == 0
    torch.testing.assert_close(ensemble_loss(students, labels), rows.sum() / 3)
    exact = _one(
        [s.double() for s in students], labels.clamp(min=0), torch.full((2,), 0.5), 3.0, 1.0
    )
    torch.testing.assert_close(rows[[0, 2, 3]].double(), exact[[0, 2, 3]], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"gate": torch.ones(4)},
            ValueError,
            r"gate must have one weight per branch, shape \(3,\) or \(2, 3\); got \(4,\)",
        ),
        ({"gate": [1.0]}, TypeError, "gate must be a tensor or None, got list"),
        (
            {"gate": torch.ones(3, dtype=torch.int64)},
            TypeError,
            "gate must be floating point, got torch.int64",
        ),
        (
            {"gate": torch.ones(3, device="meta")},
            ValueError,
            "gate must be on cpu, the device of the logits; got meta",
        ),
        (
            {"ensemble_weight": -1.0},
            ValueError,
            r"ensemble_weight must be in \[0, inf\), got -1.0",
        ),
        ({"alpha": 0.5}, TypeError, "ensemble_loss has no option alpha"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
    ],
)
def test_bad_ensembles(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ensemble_loss(group(3, 2, 7), torch.tensor([1, 2]), **changes)


# ---- mean teachers


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.last = nn.Linear(6, 6, bias=False)
        self.last.weight = nn.Parameter(self.last.weight)
        self.register_buffer("table", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x))))


def _stepped(student: nn.Module, seed: int) -> None:
    """Change the student as a step of an optimizer and a batch would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in itertools.chain(student.parameters(), student.buffers()):
            if value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=generator))
            else:
                value.add_(1)


@pytest.mark.parametrize("buffers", ["copy", "average", "own"])
def test_mean_teacher_is_the_moving_average(buffers: str) -> None:
    student = Network()
    teacher = MeanTeacher(student, 0.75, buffers=buffers)
    expected = {name: value.double() for name, value in student.state_dict().items()}
    parameters = {name for name, _ in student.named_parameters()}
    for step in range(1, 7):
        _stepped(student, step)
        teacher.update(student)
        a = min(1 - 1 / (step + 1), 0.75)  # 1/2, 2/3, 3/4, 3/4, ...
        for name, value in student.state_dict().items():
            averaged = name in parameters or (buffers == "average" and value.is_floating_point())
            if averaged:
                expected[name] = a * expected[name] + (1 - a) * value.double()
            elif buffers != "own":
                expected[name] = value.double()
    assert teacher.steps == 6
    for name, value in teacher.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_mean_teacher_starts_as_the_mean_of_all_students() -> None:
    student = nn.Linear(2, 2)
    teacher, seen = MeanTeacher(student, 1.0), [student.weight.detach().clone()]
    for step in range(5):
        _stepped(student, step)
        seen.append(student.weight.detach().clone())
        teacher.update(student)
    torch.testing.assert_close(teacher.model.weight, torch.stack(seen).mean(0))


@pytest.mark.parametrize("training", [False, True])
def test_mean_teacher_keeps_its_mode_and_returns_constants(training: bool) -> None:
    student = Network()
    teacher = MeanTeacher(student, training=training)
    assert student.training
    outer = nn.ModuleList([teacher])
    for mode in (True, False):
        outer.train(mode)
        assert teacher.training is mode
        assert all(module.training is training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(torch.randn(5, 4, requires_grad=True)).requires_grad
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_mean_teacher_resumes_from_its_state() -> None:
    student = Network()
    first = MeanTeacher(student, 0.9)
    for step in range(3):
        _stepped(student, step)
        first.update(student)
    again = MeanTeacher(Network(), 0.9)
    again.load_state_dict(first.state_dict())
    assert again.steps == 3
    _stepped(student, 9)
    for teacher in (first, again):
        teacher.update(student)
    states = first.state_dict(), again.state_dict()
    for name, value in states[0].items():
        assert (
            (value == states[1][name])
            if name == "_extra_state"
            else torch.equal(value, states[1][name])
        )


def test_mean_teacher_of_a_bfloat16_student_may_keep_float32() -> None:
    student = nn.Linear(3, 3).bfloat16()
    teachers = [MeanTeacher(student, 0.999, dtype=dtype) for dtype in (torch.float32, None)]
    with torch.no_grad():
        student.weight.mul_(1.25)
    before = teachers[0].model.weight.clone()
    for teacher in teachers:
        teacher.steps = 10_000
        teacher.update(student)
    assert teachers[0].model.weight.dtype == torch.float32
    torch.testing.assert_close(
        teachers[0].model.weight, 0.999 * before + 0.001 * student.weight.float()
    )
    assert torch.equal(
        teachers[1].model.weight, before.bfloat16()
    )  # the update is lost in bfloat16's rounding


def test_bad_mean_teachers() -> None:
    student = nn.Linear(2, 2)
    for arguments, error, message in (
        ({"student": 3}, TypeError, "student must be a torch.nn.Module, got int"),
        ({"decay": 1.5}, ValueError, r"decay must be in \[0, 1\], got 1.5"),
        ({"decay": True}, TypeError, "decay must be a number, got bool"),
        ({"buffers": "swap"}, ValueError, "buffers must be one of copy, average, own; got 'swap'"),
        ({"training": 1}, TypeError, "training must be True or False, got int"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a floating-point torch.dtype or None"),
    ):
        with pytest.raises(error, match=message):
            MeanTeacher(**{"student": student, **arguments})
    teacher = MeanTeacher(student)
    with pytest.raises(
        ValueError, match=r"bias has shape \(2,\) in the teacher and \(3,\) in the student"
    ):
        teacher.update(nn.Linear(2, 3))
    with pytest.raises(
        ValueError,
        match=r"the buffers .*; num_batches_tracked has shape None in the teacher and \(\) in the student",
    ):
        MeanTeacher(nn.BatchNorm1d(2, track_running_stats=False)).update(nn.BatchNorm1d(2))
    assert teacher.steps == 0


@dtypes
def test_consistency(dtype: torch.dtype) -> None:
    student, teacher = group(2, 3, 20, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (student, teacher)]
    exact = [x.detach().double().requires_grad_() for x in (student, teacher)]
    p, q = (x.softmax(-1) for x in exact)
    # The authors' code: the sum of squares over all elements, divided by the number of classes and by the batch size.
    truth = F.mse_loss(p, q, reduction="sum") / 20 / 3
    loss = consistency_loss(*leaves)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    tolerance = 4 * torch.finfo(dtype).eps
    for actual, expected in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=1e-7)
    torch.testing.assert_close(
        consistency_loss(student, teacher, "kl"), kd_loss(student, teacher), rtol=0, atol=0
    )


@pytest.mark.parametrize("form", ["mse", "kl"])
def test_consistency_of_rows(form: str) -> None:
    student, teacher = group(2, 4, 20)
    weight, mask = torch.tensor([1.0, 2.0, 3.0, 0.5]), torch.tensor([True, False, True, True])
    rows = consistency_loss(student, teacher, form, reduction="none")
    student[1] = NAN
    leaf = student.requires_grad_()
    options: dict[str, Any] = {"mask": mask, "weight": weight}
    kept = consistency_loss(leaf, teacher, form, reduction="none", **options)
    torch.testing.assert_close(kept, torch.where(mask, rows * weight, 0.0))
    loss = consistency_loss(leaf, teacher, form, **options)
    torch.testing.assert_close(loss, kept.sum() / 3)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert (gradient[1] == 0).all() and gradient.isfinite().all()
    assert consistency_loss(leaf, teacher, form, num_items=6, **options).item() == pytest.approx(
        loss.item() / 2
    )
    nothing = consistency_loss(leaf, teacher, form, mask=torch.zeros(4, dtype=torch.bool))
    assert nothing == 0 and (torch.autograd.grad(nothing, leaf)[0] == 0).all()


def test_gradcheck_of_consistency() -> None:
    leaves = [x.double().requires_grad_() for x in group(2, 2, 5)]
    for reduction in ("none", "mean"):
        assert torch.autograd.gradcheck(
            lambda *x, r=reduction: consistency_loss(*x, reduction=r), leaves
        )
    assert torch.autograd.gradgradcheck(consistency_loss, leaves)


def test_consistency_compiles_without_graph_breaks() -> None:
    leaf, teacher = group(2, 3, 9)
    leaf.requires_grad_()
    compiled = torch.compile(consistency_loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(leaf, teacher), consistency_loss(leaf, teacher))


def test_bad_consistency() -> None:
    good = torch.ones(2, 3)
    for arguments, error, message in (
        ((good, good, "l1"), ValueError, "form must be one of mse, kl; got 'l1'"),
        (
            (good, torch.ones(3, 3)),
            ValueError,
            r"teacher_logits must have the shape of student_logits, \(2, 3\)",
        ),
        ((good, None), TypeError, "teacher_logits must be a tensor of logits"),
        ((good, torch.ones(2, 3, device="meta")), ValueError, "teacher_logits must be on cpu"),
    ):
        with pytest.raises(error, match=message):
            consistency_loss(*arguments)


def test_ramp_up() -> None:
    assert ramp_up(0, 10) == math.exp(-5)
    assert ramp_up(5, 10) == pytest.approx(math.exp(-5 * 0.25))
    assert ramp_up(-3, 10) == ramp_up(0, 10)
    assert ramp_up(10, 10) == ramp_up(11, 10) == ramp_up(0, 0) == 1.0
    with pytest.raises(ValueError, match=r"length must be in \[0, inf\), got -1"):
        ramp_up(1, -1)
    with pytest.raises(ValueError, match="step must be a number, got nan"):
        ramp_up(NAN, 1)
    with pytest.raises(TypeError, match="step must be a number, got Tensor"):
        ramp_up(torch.ones(()), 1)


@pytest.mark.parametrize("number", [int, float])
def test_ramp_up_in_a_compiled_function(number: Callable[[int], float]) -> None:
    """The step is an input of the graph: the second graph serves every later step."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    weighted = torch.compile(lambda x, step: x * ramp_up(step, 10), backend=count, fullgraph=True)
    for step in (0, 1, 5, 7, 10, 12, -3):
        actual = float(weighted(torch.ones((), dtype=torch.float64), number(step)))
        assert actual == pytest.approx(ramp_up(step, 10), rel=1e-14)
    assert len(graphs) <= 2


# ---- born-again networks


def test_born_again() -> None:
    made: list[nn.Module] = []
    trained: list[tuple[nn.Module, nn.Module | None]] = []

    def make_student() -> nn.Module:
        made.append(nn.Linear(3, 5))
        return made[-1]

    def train(student: nn.Module, teacher: nn.Module | None) -> None:
        assert student.training and all(p.requires_grad for p in student.parameters())
        trained.append((student, teacher))
        optimizer, x, y = (
            torch.optim.SGD(student.parameters(), 0.1),
            torch.randn(8, 3),
            torch.randint(5, (8,)),
        )
        with torch.no_grad():
            target = student(x) if teacher is None else teacher(x)
        kd_loss(student(x), target, y, alpha=0.5).backward()
        optimizer.step()

    generations = list(born_again(make_student, train, 3))
    assert generations == made
    assert [teacher for _, teacher in trained] == [None, *made[:2]]
    for model in generations:
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    x = torch.randn(4, 3)
    teacher = generations_teacher(generations, x, weights=[1.0, 1.0, 2.0])
    p = sum(
        w * model(x).softmax(-1) for w, model in zip((0.25, 0.25, 0.5), generations, strict=True)
    )
    student = torch.randn(4, 5)
    torch.testing.assert_close(
        kd_loss(student, teacher), F.kl_div(student.log_softmax(-1), p, reduction="batchmean")
    )
    first_student = nn.Linear(3, 5)
    list(born_again(make_student, train, 1, teacher=first_student))
    assert trained[-1][1] is first_student


def test_generations_are_made_one_at_a_time() -> None:
    made: list[nn.Module] = []

    def make_student() -> nn.Module:
        made.append(nn.Linear(1, 1))
        return made[-1]

    run = born_again(make_student, lambda student, teacher: None, 5)
    assert not made
    next(run)
    assert len(made) == 1


def test_a_model_that_returns_more_than_logits() -> None:
    class Output(NamedTuple):
        logits: Tensor

    class Model(nn.Module):
        def forward(self, x: Tensor, *, scale: float) -> Output:
            return Output(x * scale)

    x = torch.randn(2, 5)
    teacher = generations_teacher([Model(), Model()], x, mean="geometric", scale=2.0)
    assert teacher.mean == "geometric" and torch.equal(teacher.teachers[0], 2 * x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, print, 1), TypeError, "make_student must be callable, got int"),
        ((print, None, 1), TypeError, "train must be callable, got NoneType"),
        ((print, print, 0), ValueError, "generations must be at least 1, got 0"),
        ((print, print, 1.0), TypeError, "generations must be an int, got float"),
    ],
)
def test_bad_generations(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        born_again(*arguments)


def test_a_student_that_is_its_own_teacher() -> None:
    only = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="make_student must return a fresh module"):
        list(born_again(lambda: only, lambda student, teacher: None, 2))


def test_functions_are_imported_on_first_use() -> None:
    code = (
        "import sys, fastkd; assert 'fastkd.online' not in sys.modules; fastkd.online.mutual_loss"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert python("-c", code, env=environment).returncode == 0


def test_dropped_rows_do_not_affect_the_gate() -> None:
    logits = [torch.randn(2, 3) for _ in range(2)]
    logits[0][1] = NAN
    gate = torch.zeros(2, requires_grad=True)
    loss = ensemble_loss(logits, torch.tensor([0, -100]), gate.softmax(-1))
    (gradient,) = torch.autograd.grad(loss, gate)
    assert loss.isfinite() and gradient.isfinite().all() and gradient.any()


def test_a_mean_teacher_of_a_compiled_student() -> None:
    student = nn.Linear(3, 2)
    student.register_parameter("count", nn.Parameter(torch.tensor(3), requires_grad=False))
    teacher = MeanTeacher(student, decay=0.0)
    student.count += 1
    teacher.update(torch.compile(student))
    assert int(teacher.model.count) == 4
