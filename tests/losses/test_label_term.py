"""DKD and NKD: the label's token is compared by itself, and the other tokens are renormalized without it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import ULP, assert_within, labels_for, logits, powers_for
from support.options import ALL, TOGETHER, dropped_by, for_kd_loss, prepared
from support.oracles import Settings, adjusted, cross_entropy, mixed
from support.shards import InShards
from torch import Tensor

import fastkd
from fastkd import kd_loss
from fastkd.backends import registry

INF = math.inf


def published_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    name: str,
    weights: tuple[float, ...],
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_by_temperature: bool = True,
) -> Tensor:
    """Loss per row by the formulas of Zhao et al. (2022) and Yang et al. (2023), T^2 included, in the logits' dtype."""
    if teacher_temperature is None:
        teacher_temperature = temperature
    t_student, t_teacher = (
        x.unsqueeze(-1) if isinstance(x, Tensor) else x for x in (temperature, teacher_temperature)
    )
    of_label = F.one_hot(labels, student.shape[-1]).bool()

    def label_and_others(z: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities of the label and of all other tokens together [..., 2], log-probabilities of the others
        renormalized)."""
        log = z.log_softmax(-1)
        others = z.masked_fill(of_label, -INF)
        both = [log[of_label].reshape(labels.shape), log.masked_fill(of_label, -INF).logsumexp(-1)]
        return torch.stack(both, -1), others.log_softmax(-1).masked_fill(of_label, -1.0)

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        p = log_p.exp()
        return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)

    (log_p2, log_p), (log_q2, log_q) = (
        label_and_others(teacher / t_teacher),
        label_and_others(student / t_student),
    )
    square = temperature**2 if scale_by_temperature else 1.0
    if name == "dkd":
        alpha, beta = weights
        gone = (log_p == -INF) & (log_q == -INF)
        others = kl(log_p.masked_fill(gone | of_label, -1e3), log_q.masked_fill(gone | of_label, 0))
        return square * (alpha * kl(log_p2, log_q2) + beta * others)
    (gamma,) = weights
    log_p1, log_q1 = (z.log_softmax(-1)[of_label].reshape(labels.shape) for z in (teacher, student))
    p, gone = log_p.exp().masked_fill(of_label, 0.0), log_p == -INF
    others = -(p * log_q.masked_fill(gone, 0.0)).sum(-1)
    return -log_p1.exp() * log_q1 + gamma * square * others


def divergence_of(name: str, weights: tuple[float, ...]) -> fastkd.Divergence:
    return {"dkd": fastkd.dkd, "nkd": fastkd.nkd}[name](*weights)


def expected(
    dtype: torch.dtype,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    name: str,
    weights: tuple[float, ...],
    upstream: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss of each row, gradients of student and teacher), composed of PyTorch operations in that dtype."""
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in (student, teacher)]
    o = Settings(**options)
    s, t = (leaf[..., : o.vocab_size] for leaf in leaves)
    s = adjusted(s, o.logit_scale, o.softcap)
    t = adjusted(t, o.teacher_logit_scale, o.teacher_softcap)
    read = labels != o.ignore_index
    y = labels.where(read, 0)
    distillation = published_loss(
        s, t, y, name, weights, o.temperature, o.teacher_temperature, o.scale_by_temperature
    )
    of_labels = cross_entropy(s.flatten(0, -2), y.flatten(), o.alpha, o.label_smoothing)
    loss = torch.where(read, mixed(distillation, of_labels.reshape(y.shape), o.alpha), 0.0)
    total = (loss * upstream.to(dtype)).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), *gradients


def check(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    name: str,
    weights: tuple[float, ...],
    **options: Any,
) -> None:
    """Assert that the error is at most that of plain float32 PyTorch, or a few units in the last place."""
    upstream = powers_for(*labels.shape)
    arguments = (student, teacher, labels, name, weights, upstream)
    exact, plain = (expected(dtype, *arguments, **options) for dtype in (torch.double, torch.float))
    of_teacher = name == "dkd"
    s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_(of_teacher)
    loss = kd_loss(
        s,
        t,
        labels,
        divergence=divergence_of(name, weights),
        reduction="none",
        backend=backend,
        **options,
    )
    wanted = (s, t) if of_teacher else (s,)
    actual = (
        loss.detach(),
        *torch.autograd.grad(loss, wanted, upstream.to(loss.dtype), retain_graph=True),
    )
    temperature = float(torch.as_tensor(options.get("temperature", 1.0)).max())
    depth = float(exact[0].abs().max()) / temperature**2 + 10.0
    size = temperature**2 * (1.0 + sum(weights)) * depth
    for index, (what, value) in enumerate(
        zip(("loss", "student", "teacher"), actual, strict=False)
    ):
        error = (plain[index].double() - exact[index]).abs().nan_to_num(0.0, 0.0, 0.0)
        floor = ULP * size / (temperature if index else 1.0)
        if index:
            error = error.amax(-1, keepdim=True)
        bar = error + floor + 0 * exact[index].nan_to_num(0.0, 0.0, 0.0)
        if value.dtype in (torch.bfloat16, torch.float16):  # one rounding of the exact gradient
            eps = torch.finfo(value.dtype)
            bar = bar + exact[index].abs() * eps.eps / 2 + eps.smallest_normal * eps.eps / 2
        assert_within(what, value, exact[index], bar)


KINDS = [("dkd", (1.0, 8.0)), ("dkd", (2.0, 0.0)), ("dkd", (0.0, 1.0)), ("nkd", (1.5,))]
kinds = pytest.mark.parametrize(("name", "weights"), KINDS, ids=str)
# The sets for the slower tests, with those of ALL that have a path of their own.
IN_SHARDS = TOGETHER | {
    name: ALL[name]
    for name in ("defaults", "low temperature", "hard labels", "hard labels, T", "only hard labels")
}


@pytest.mark.pairwise(each="backend")
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Two columns; fewer than a vector; one block of the CPU kernel less one column, exactly one, one more; several blocks.
@pytest.mark.parametrize("vocabulary", [2, 31, 2047, 2048, 2049, 5003])
def test_sizes(
    backend: str, name: str, weights: tuple[float, ...], dtype: torch.dtype, vocabulary: int
) -> None:
    student, teacher = (logits(6, vocabulary, seed=i, dtype=dtype) for i in (1, 2))
    labels = labels_for(6, vocabulary=vocabulary, seed=3)
    labels[:2] = torch.tensor([0, vocabulary - 1])
    for temperature in (1.0, 3.0):
        check(backend, student, teacher, labels, name, weights, temperature=temperature)
    check(
        backend, student, teacher, labels, name, weights,
        temperature=2.0, alpha=0.5, label_smoothing=0.1,
    )  # fmt: skip


@kinds
@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
def test_options(
    backend: str, name: str, weights: tuple[float, ...], options: dict[str, Any]
) -> None:
    student, teacher = logits(3, 4, 101, seed=4), logits(3, 4, 101, seed=5)
    labels, options = prepared(options | {"labels": True}, 3, 4, columns=97, seed=6)
    assert labels is not None
    check(backend, student, teacher, labels, name, weights, **options)


@kinds
def test_one_temperature_per_row(backend: str, name: str, weights: tuple[float, ...]) -> None:
    student, teacher, labels = logits(5, 40, seed=7), logits(5, 40, seed=8), torch.arange(5)
    temperature = torch.tensor([0.5, 1.0, 2.0, 4.0, 7.0])
    check(
        backend, student, teacher, labels, name, weights,
        temperature=temperature, teacher_temperature=temperature.flip(0), alpha=0.7,
    )  # fmt: skip


@pytest.mark.pairwise(each="backend")
@pytest.mark.parametrize("shares", [(1.0,), (1.0, 1.0), (3.0, 1.0, 0.0, 2.0)], ids=str)
@kinds
@pytest.mark.parametrize("options", IN_SHARDS.values(), ids=IN_SHARDS)
def test_shards(
    backend: str,
    name: str,
    weights: tuple[float, ...],
    shares: tuple[float, ...],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels, load = InShards(registry.load(backend), shares), registry.load
    monkeypatch.setattr(registry, "load", lambda name: kernels if name == backend else load(name))
    student, teacher = logits(9, 101, seed=9), logits(9, 101, seed=10)
    labels = dropped_by(options, torch.tensor([0, 96, 50, 49, 33, 34, 66, 67, -100]))
    options = for_kd_loss(options, columns=97)
    check(backend, student, teacher, labels, name, weights, **options)
    # Forbidden columns take another code path for the moments.
    student[:, 20:30], teacher[:, 20:30] = -INF, -INF
    check(backend, student, teacher, labels, name, weights, **options)
    assert kernels.calls


@kinds
def test_instruction_sets(instructions: str, name: str, weights: tuple[float, ...]) -> None:
    student, teacher = logits(4, 2100, seed=11), logits(4, 2100, seed=12)
    labels = torch.tensor([0, 15, 2048, 2099])
    check("cpu", student, teacher, labels, name, weights, temperature=2.0, alpha=0.5)


@pytest.mark.parametrize("gap", [0.0, 5.0, 12.0, 17.0, 25.0, 40.0, 80.0])
@pytest.mark.parametrize("behind", [0.0, 1.0, 8.0])
def test_a_confident_teacher(backend: str, gap: float, behind: float) -> None:
    """Nothing cancels as the teacher's probability of the label tends to 1: both parts keep their digits."""
    student, teacher = logits(4, 60, seed=13), logits(4, 60, seed=14)
    labels = torch.arange(4)
    for side, height in ((teacher, gap), (student, gap - behind)):
        side.scatter_add_(-1, labels.unsqueeze(-1), torch.full((4, 1), height))
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        s = student.clone().requires_grad_()
        loss = kd_loss(
            s, teacher, labels, divergence=fastkd.dkd(*weights), reduction="none", backend=backend
        )
        loss.sum().backward()
        exact_loss, exact = _dkd_from_log_odds(student.double(), teacher.double(), labels, weights)
        # Relative errors, however small the values are; the rounding of a logit alone causes this much.
        slack = 64 * ULP * (1 + gap)
        if exact_loss.min() > 1e-30:
            torch.testing.assert_close(loss.double(), exact_loss, rtol=slack, atol=0.0)
            assert s.grad is not None
            error = (s.grad.double() - exact).abs().amax(-1)
            assert (error <= slack * exact.abs().amax(-1)).all()


def _dkd_from_log_odds(
    student: Tensor, teacher: Tensor, labels: Tensor, weights: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """DKD from log-odds, without computing 1 - p."""
    student = student.clone().requires_grad_()
    of_label = F.one_hot(labels, student.shape[-1]).bool()
    odds, others = [], []
    for z in (teacher, student):
        rest = z.masked_fill(of_label, -INF)
        odds.append(z[of_label] - rest.logsumexp(-1))
        others.append(rest.log_softmax(-1).masked_fill(of_label, -1e3))
    a, b = odds
    log = F.logsigmoid
    target = log(a).exp() * (log(a) - log(b)) + log(-a).exp() * (log(-a) - log(-b))
    log_p, log_q = others
    loss = weights[0] * target + weights[1] * (log_p.exp() * (log_p - log_q)).sum(-1)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


def test_kl_is_tckd_plus_weighted_nckd(backend: str) -> None:
    """KL = TCKD + (1 - p_y) NCKD."""
    student, teacher = logits(5, 200, seed=15), logits(5, 200, seed=16)
    labels = labels_for(5, vocabulary=200, seed=17)

    def loss(divergence: Any) -> Tensor:
        return kd_loss(
            student, teacher, labels, divergence=divergence, reduction="none", backend=backend
        )

    p = teacher.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    parts = loss(fastkd.dkd(1.0, 0.0)) + (1 - p) * loss(fastkd.dkd(0.0, 1.0))
    torch.testing.assert_close(loss("forward_kl"), parts, rtol=1e-5, atol=1e-6)
    assert torch.equal(loss("dkd"), loss(fastkd.dkd(1.0, 8.0)))
    assert torch.equal(loss("nkd"), loss(fastkd.nkd(1.5)))


@kinds
def test_equal_models(backend: str, name: str, weights: tuple[float, ...]) -> None:
    teacher, labels = logits(4, 300, seed=18), labels_for(4, vocabulary=300, seed=19)
    student = teacher.clone().requires_grad_()
    loss = kd_loss(
        student, teacher, labels, divergence=divergence_of(name, weights), backend=backend
    )
    (gradient,) = torch.autograd.grad(loss, student)
    if name == "dkd":
        assert abs(float(loss)) < 1e-5
        assert float(gradient.abs().max()) < 1e-6
    assert float(gradient.sum(-1).abs().max()) < 1e-6


@kinds
def test_forbidden_columns(backend: str, name: str, weights: tuple[float, ...]) -> None:
    student, teacher = logits(4, 90, seed=20), logits(4, 90, seed=21)
    labels = torch.tensor([3, 50, 89, 0])
    student[:, 10:40] = teacher[:, 10:40] = -INF
    teacher[:, 60] = -INF
    check(backend, student, teacher, labels, name, weights, temperature=2.0)
    # The label's own column, on both sides and on the student's alone.
    for sides in ((student, teacher), (student,)):
        s, t = student.clone(), teacher.clone()
        for side in sides:
            (s if side is student else t)[0, 3] = -INF
        s.requires_grad_()
        loss = kd_loss(
            s, t, labels, divergence=divergence_of(name, weights), reduction="none", backend=backend
        )
        (gradient,) = torch.autograd.grad(loss.sum(), s)
        infinite = len(sides) == 1 and (name == "nkd" or weights[0] > 0)
        assert loss.isposinf().tolist() == [infinite, False, False, False]
        assert gradient.isfinite().all()
        assert loss[1:].isfinite().all() and not loss.isnan().any()


@kinds
def test_dropped_rows(backend: str, name: str, weights: tuple[float, ...]) -> None:
    student, teacher = logits(4, 50, seed=22), logits(4, 50, seed=23)
    labels = torch.tensor([1, -100, 50, 2])
    student[3] = torch.nan
    mask = torch.tensor([True, True, True, False])
    s = student.clone().requires_grad_()
    loss = kd_loss(
        s, teacher, labels,
        divergence=divergence_of(name, weights), mask=mask, reduction="none", backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    assert loss.isnan().tolist() == [False, False, True, False]  # column 50 is padding
    assert loss[0] > 0 and loss[1] == loss[3] == 0
    assert not gradient[[1, 3]].any() and gradient[2].isnan().all()


def test_parts_include_all_tokens(backend: str) -> None:
    student, teacher = logits(4, 70, seed=24), logits(4, 70, seed=25)
    labels = labels_for(4, vocabulary=70, seed=26)
    options: dict[str, Any] = {"temperature": 2.0, "alpha": 0.5, "label_smoothing": 0.1}
    parts = [
        kd_loss(
            student, teacher, labels,
            divergence=divergence, return_parts=True, reduction="none", backend=backend, **options,
        )[1]
        for divergence in ("dkd", "nkd", "forward_kl")
    ]  # fmt: skip
    for name in ("cross_entropy", "student_entropy"):
        values = [getattr(part, name) for part in parts]
        for value in values[:2]:
            torch.testing.assert_close(value, values[2], rtol=2e-6, atol=1e-6)


@kinds
def test_fused_linear_and_compiled_losses(name: str, weights: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(27)
    hidden = torch.randn(10, 8, generator=generator, requires_grad=True)
    weight = torch.randn(60, 8, generator=generator, requires_grad=True)
    teacher = fastkd.LinearTeacher(
        torch.randn(10, 4, generator=generator), torch.randn(60, 4, generator=generator)
    )
    labels = labels_for(10, vocabulary=60, seed=28, ignored=0.2)
    divergence = divergence_of(name, weights)

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        return fastkd.fused_linear_kd_loss(
            hidden, weight, teacher, labels, divergence=divergence, temperature=2.0, alpha=0.5, chunk_size=3
        )  # fmt: skip

    def dense(hidden: Tensor, weight: Tensor) -> Tensor:
        logits_of_teacher = teacher.hidden @ teacher.weight.T
        return kd_loss(
            hidden @ weight.T, logits_of_teacher, labels,
            divergence=divergence, temperature=2.0, alpha=0.5,
        )  # fmt: skip

    truth = dense(hidden, weight)
    gradients = torch.autograd.grad(truth, (hidden, weight))
    for loss in (fused, torch.compile(dense, fullgraph=True, backend="aot_eager")):
        value = loss(hidden, weight)
        torch.testing.assert_close(value, truth)
        actual = torch.autograd.grad(value, (hidden, weight))
        torch.testing.assert_close(actual, gradients, rtol=1e-4, atol=1e-5)


def test_in_place_and_threads(backend: str) -> None:
    student, teacher = logits(3, 9000, seed=29), logits(3, 9000, seed=30)
    labels = torch.tensor([0, 8999, 4096])
    results = []
    threads = torch.get_num_threads()
    try:
        for count, inplace in ((1, False), (2, False), (1, True)):
            torch.set_num_threads(count)
            s = student.clone().requires_grad_()
            copy = s * 1.0
            loss = kd_loss(
                copy, teacher, labels, divergence="dkd", inplace=inplace, backend=backend
            )
            results.append((loss.detach(), *torch.autograd.grad(loss, s)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
               ) or backend == "portable"  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastkd.dkd(alpha=-1.0), ValueError, "alpha must not be negative, got -1.0"),
        (lambda: fastkd.dkd(beta=math.nan), ValueError, "beta must be finite, got nan"),
        (lambda: fastkd.nkd(gamma=-2.0), ValueError, "gamma must not be negative, got -2.0"),
        (lambda: fastkd.smooth_l1(beta=0.0), ValueError, "beta must be positive, got 0.0"),
        (lambda: kd_loss(torch.ones(2, 5), torch.ones(2, 5), divergence="dkd"), ValueError,
         "labels are needed by the divergence 'dkd', which treats the label's token separately"),
        (lambda: kd_loss(torch.ones(2, 1), torch.ones(2, 1), torch.zeros(2, dtype=torch.int64), divergence="nkd"),
         ValueError, "the divergence 'nkd' compares the tokens other than the label; the vocabulary has 1 column"),
        (lambda: kd_loss(torch.ones(1, 5), fastkd.TopK.from_logits(torch.ones(1, 5), 2),
                         torch.zeros(1, dtype=torch.int64), divergence="dkd"),
         ValueError, "and a TopK may not list it; use a dense teacher"),
        (lambda: kd_loss(torch.ones(1, 5), torch.ones(1, 5, requires_grad=True),
                         torch.zeros(1, dtype=torch.int64), divergence="nkd"),
         ValueError, "teacher requires grad, and the divergence 'nkd' has no degree"),
    ],
)  # fmt: skip
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_message_names_an_invalid_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKD_CHECK", "1")
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\) .* row 1 has 7"):
        kd_loss(torch.ones(2, 5), torch.ones(2, 5), torch.tensor([0, 7]), divergence="dkd")
