"""The clip of a token's contribution and the floor of log-probabilities, against formulas written here in float64.

The values and gradients of clips for dense teachers on every backend are in tests/losses/test_divergences.py, those for
TopK in tests/teachers/test_topk.py, and those of a shared vocabulary in tests/parallel/.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import logits
from torch import Tensor

import fastkd
from fastkd import TopK, fused_linear_kd_loss, kd_loss

MIN = -10.0  # the default of verl's log_prob_min_clamp


def verl(
    student: Tensor, teacher: TopK, floor: float | None = MIN, temperature: float = 1.0
) -> Tensor:
    """The loss of each row as verl 0.9.1 defines it: both sides floored, p the exponential of the floored log p."""
    listed = teacher.ids >= 0
    log_q = (student / temperature).log_softmax(-1).gather(-1, teacher.ids.clamp(min=0))
    log_p = teacher.logprobs.to(log_q.dtype)
    if floor is not None:
        log_p, log_q = log_p.clamp_min(floor), log_q.clamp_min(floor)
    return torch.where(listed, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def opsd(log_p: Tensor, log_q: Tensor, beta: float, clip: float) -> Tensor:
    """The loss of each row as OPSD defines it: F.kl_div's pointwise terms, clamped before the sum over tokens."""
    kl = functools.partial(torch.nn.functional.kl_div, reduction="none", log_target=True)
    if beta in (0.0, 1.0):
        terms = kl(log_p, log_q) if beta else kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        terms = beta * kl(log_m, log_p) + (1.0 - beta) * kl(log_m, log_q)
    return terms.clamp(max=clip).sum(-1)


def listed(
    rows: int,
    columns: int,
    k: int,
    seed: int,
    spread: float = 6.0,
    dtype: torch.dtype = torch.float32,
) -> TopK:
    """The top tokens of a peaked teacher, of which some are far below the floor and some are padding."""
    top = TopK.from_logits(logits(rows, columns, seed=seed, spread=spread, dtype=dtype), k)
    padding = torch.rand(rows, k, generator=torch.Generator().manual_seed(seed)) < 0.1
    padding[:, 0] = False
    return TopK(top.ids.masked_fill(padding, -1), top.logprobs, "truncate")


def gradient(loss: Tensor, *leaves: Tensor) -> Tensor:
    (found, *_) = torch.autograd.grad(loss, leaves)
    return found


def assert_same(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], student: Tensor
) -> None:
    """Both losses of each row agree, and so do their gradients, `theirs` in float64."""
    leaf, exact_leaf = (x.detach().requires_grad_() for x in (student, student.double()))
    loss, exact = ours(leaf), theirs(exact_leaf)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    found, wanted = gradient(loss.sum(), leaf), gradient(exact.sum(), exact_leaf)
    rough = student.dtype != torch.float32
    torch.testing.assert_close(
        found.double(), wanted, rtol=1e-2 if rough else 1e-4, atol=1e-3 if rough else 1e-6
    )


# The floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("floor", [-1.0, -5.0, -10.0, -1e3])
def test_the_floor_is_that_of_verl(any_backend: str, floor: float, dtype: torch.dtype) -> None:
    # 300 columns: more than one block of the C++ kernels; 70 tokens: more than one vector.
    student, teacher = logits(5, 300, seed=1, spread=5.0, dtype=dtype), listed(5, 300, 70, seed=2)
    below = teacher.logprobs < floor
    assert floor == -1e3 or (below.any() and not below.all())
    divergence = fastkd.forward_kl(floor=floor)

    def ours(s: Tensor) -> Tensor:
        return kd_loss(s, teacher, divergence=divergence, reduction="none", backend=any_backend)

    assert_same(ours, lambda s: verl(s, teacher, floor), student)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.integers(0, 1000), st.floats(-30.0, -1e-3), st.floats(0.25, 4.0), st.booleans()
)  # fmt: skip
def test_the_floor_of_random_rows(
    k: int, seed: int, floor: float, temperature: float, squared: bool
) -> None:
    student = logits(3, 40, seed=seed, spread=6.0)
    top = listed(3, 40, k, seed=seed + 1)
    teacher = TopK(top.ids, top.logprobs, "truncate", None, temperature)
    factor = temperature**2 if squared else 1.0
    for backend in ("auto", "reference"):
        assert_same(
            lambda s, backend=backend: kd_loss(
                s, teacher, divergence=fastkd.forward_kl(floor=floor), temperature=temperature,
                scale_by_temperature=squared, reduction="none", backend=backend,
            ),
            lambda s: factor * verl(s, teacher, floor, temperature),
            student,
        )  # fmt: skip


def test_no_own_gradient_below_the_floor() -> None:
    """A token that the student has below the floor pulls neither itself nor, through the softmax, the others."""
    student = torch.tensor([[0.0, -20.0, -1.0, -2.0]], requires_grad=True)
    ids = torch.tensor([[0, 1]])
    teacher = TopK(ids, torch.tensor([[0.5, 0.5]]).log(), "truncate")
    loss = kd_loss(student, teacher, divergence=fastkd.forward_kl(floor=MIN))
    q = student.detach().softmax(-1)
    right = 0.5 * q - torch.tensor([[0.5, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(gradient(loss, student), right)
    log_q = student.detach().log_softmax(-1)
    torch.testing.assert_close(
        loss.detach(), 0.5 * (math.log(0.5) - log_q[0, 0]) + 0.5 * (math.log(0.5) - MIN)
    )


def test_the_masses_are_those_without_a_floor() -> None:
    student, teacher = logits(4, 30, seed=3), listed(4, 30, 9, seed=4)
    names = ("student_mass", "teacher_mass", "forward_kl", "teacher_entropy")
    _, floored = kd_loss(
        student, teacher, divergence=fastkd.forward_kl(floor=-2.0), return_parts=names
    )
    _, plain = kd_loss(student, teacher, return_parts=names)
    for name in names:
        assert torch.equal(getattr(floored, name), getattr(plain, name)), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_floor_does_not_hide_nan(any_backend: str, value: float) -> None:
    student, teacher = logits(3, 30, seed=5), listed(3, 30, 9, seed=6)
    student[1, 4] = value
    bad_teacher = TopK(
        teacher.ids, teacher.logprobs.index_fill(0, torch.tensor(2), math.nan), "truncate"
    )
    leaf = student.requires_grad_()
    loss = kd_loss(
        leaf,
        bad_teacher,
        divergence=fastkd.forward_kl(floor=MIN),
        reduction="none",
        backend=any_backend,
    )
    assert loss.isnan().tolist() == [False, True, True]
    assert gradient(loss.sum(), leaf).isnan().any(-1).tolist() == [False, True, True]


def test_log_0_has_the_value_of_the_floor(any_backend: str) -> None:
    """A student at -inf and a teacher at -inf are floored like any value below the floor."""
    student = torch.tensor([[0.0, -math.inf, 1.0, 2.0]])
    teacher = TopK(torch.tensor([[1, 2]]), torch.tensor([[math.log(0.7), -math.inf]]), "truncate")
    call = {"divergence": fastkd.forward_kl(floor=MIN), "reduction": "none", "backend": any_backend}
    assert_same(lambda s: kd_loss(s, teacher, **call), lambda s: verl(s, teacher), student)


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_the_floor_with_labels_masks_and_micro_batches(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = logits(6, 40, seed=7, spread=5.0).double(), listed(6, 40, 12, seed=8)
    hidden, head = student, torch.eye(40, dtype=torch.float64)
    labels = torch.randint(40, (6,), generator=generator)
    mask = torch.tensor([True, True, False, True, True, True])
    hidden = hidden.masked_fill(~mask.unsqueeze(-1), math.nan)
    weight = torch.rand(6, generator=generator, dtype=torch.float64)

    def loss(rows: slice, leaf: Tensor, **options: Any) -> Tensor:
        part = TopK(teacher.ids[rows], teacher.logprobs[rows], "truncate")
        options |= {"mask": mask[rows], "weight": weight[rows], "alpha": 0.7, "num_items": 5}
        divergence = fastkd.forward_kl(floor=-4.0)
        if kind == "logits":
            return kd_loss(leaf[rows], part, labels[rows], divergence=divergence, **options)
        return fused_linear_kd_loss(
            leaf[rows], head, part, labels[rows], divergence=divergence, chunk_size=2, **options
        )

    leaf = hidden.clone().requires_grad_()
    whole = loss(slice(6), leaf)
    right_leaf = student.clone().requires_grad_()
    cross_entropy = torch.nn.functional.cross_entropy(right_leaf, labels, reduction="none")
    each = 0.7 * verl(right_leaf, teacher, -4.0) + 0.3 * cross_entropy
    right = (each * weight)[mask].sum() / 5
    torch.testing.assert_close(whole, right)
    torch.testing.assert_close(gradient(whole, leaf), gradient(right, right_leaf))
    parts = loss(slice(0, 4), leaf) + loss(slice(4, 6), leaf)
    torch.testing.assert_close(gradient(parts, leaf), gradient(loss(slice(6), leaf), leaf))


def test_the_floor_under_autocast() -> None:
    hidden, head, teacher = logits(4, 8, seed=9), logits(40, 8, seed=10), listed(4, 40, 9, seed=11)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_linear_kd_loss(hidden, head, teacher, divergence=fastkd.forward_kl(floor=-4.0))
    rounded = hidden.bfloat16().double() @ head.bfloat16().double().T
    torch.testing.assert_close(
        loss.double(), verl(rounded, teacher, -4.0).mean(), rtol=1e-4, atol=1e-5
    )


def test_gradcheck_of_the_floor() -> None:
    teacher = listed(2, 7, 4, seed=12, spread=3.0, dtype=torch.float64)
    student = logits(2, 7, seed=13, dtype=torch.float64).requires_grad_()
    divergence = fastkd.forward_kl(floor=-3.0)
    assert torch.autograd.gradcheck(
        lambda s: kd_loss(s, teacher, divergence=divergence), (student,)
    )


DENSE = {
    "dense": logits(4, 30, seed=14),
    "linear": fastkd.LinearTeacher(logits(4, 3, seed=15), logits(30, 3, seed=16)),
    "ensemble": fastkd.Ensemble([logits(4, 30, seed=14)] * 2),
}


@pytest.mark.parametrize("form", [*DENSE, "bucket", "renormalize", "renormalize_teacher"])
def test_the_floor_is_for_a_truncated_sum(form: str) -> None:
    top = listed(4, 30, 5, seed=17)
    teacher: Any = DENSE[form] if form in DENSE else TopK(top.ids, top.logprobs, form)
    got = "a teacher that is not a TopK" if form in DENSE else f"tail='{form}'"
    message = rf"floor=-10 of forward_kl is for a TopK with tail='truncate'.*; got {got}\."
    student = logits(4, 30, seed=18)
    for compiled in (False, True):
        call: Any = torch.compile(kd_loss, backend="aot_eager") if compiled else kd_loss
        with pytest.raises(ValueError, match=message):
            call(student, teacher, divergence=fastkd.forward_kl(floor=MIN))
    with pytest.raises(ValueError, match=message):
        fused_linear_kd_loss(
            student, torch.eye(30), teacher, divergence=fastkd.forward_kl(floor=MIN)
        )


# The clip


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("form", ["dense", "renormalize", "truncate"])
def test_the_clip_is_that_of_opsd(any_backend: str, form: str, beta: float) -> None:
    student, t = logits(5, 300, seed=20, spread=4.0), logits(5, 300, seed=21, spread=4.0)
    top = TopK.from_logits(t, 40)
    clip = 0.002 if beta in (0.5, 0.9) else 0.01
    teacher: Any = t if form == "dense" else TopK(top.ids, top.logprobs, form)

    def theirs(s: Tensor) -> Tensor:
        log_p, log_q = t.double().log_softmax(-1), s.log_softmax(-1)
        if form != "dense":
            log_p, log_q = log_p.gather(-1, top.ids), log_q.gather(-1, top.ids)
        if form == "renormalize":
            log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
        assert (opsd(log_p, log_q, beta, math.inf) - opsd(log_p, log_q, beta, clip) > 1e-3).any()
        return opsd(log_p, log_q, beta, clip)

    assert_same(
        lambda s: kd_loss(
            s, teacher, divergence=fastkd.jsd(beta, clip), reduction="none", backend=any_backend
        ),
        theirs,
        student,
    )


def test_a_clipped_sum_may_be_negative() -> None:
    student, teacher = logits(4, 9, seed=22), logits(4, 9, seed=23)
    assert kd_loss(student, teacher, divergence=fastkd.forward_kl(clip=1e-6)) < 0


def test_a_clip_that_nothing_exceeds_changes_nothing() -> None:
    student, teacher = (logits(4, 50, seed=seed, dtype=torch.float64) for seed in (24, 25))
    for make in (fastkd.forward_kl, fastkd.reverse_kl, fastkd.mixture, fastkd.jsd):
        assert make(clip=math.inf) == make()
        leaves = [x.detach().requires_grad_() for x in (student, teacher)]
        clipped, plain = (kd_loss(*leaves, divergence=x) for x in (make(clip=1e6), make()))
        torch.testing.assert_close(clipped, plain)
        for pair in zip(
            torch.autograd.grad(clipped, leaves), torch.autograd.grad(plain, leaves), strict=True
        ):
            torch.testing.assert_close(*pair)


def test_an_infinite_contribution_is_clipped(any_backend: str) -> None:
    """Forward KL is infinite where q = 0 < p; with a clip, such a token contributes the clip and has no gradient."""
    student = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, -1.0]])
    loss = kd_loss(student, teacher, divergence=fastkd.forward_kl(clip=0.05), backend=any_backend)
    p, q = teacher.double().softmax(-1)[0], student.detach().double().softmax(-1)[0]
    others = [float(p[i] * (p[i].log() - q[i].log())) for i in (0, 2)]
    assert loss.item() == pytest.approx(0.05 + sum(min(x, 0.05) for x in others), rel=1e-5)
    g = torch.tensor(
        [-p[i] if i != 1 and x <= 0.05 else 0.0 for i, x in enumerate([others[0], 1, others[1]])]
    )
    right = (g - q * g.sum()).float()
    torch.testing.assert_close(gradient(loss, student)[0], right, rtol=1e-4, atol=1e-6)


def test_the_clip_comes_before_temperature_and_weight() -> None:
    student, teacher = logits(4, 9, seed=26), logits(4, 9, seed=27)
    weight = torch.tensor([0.5, 2.0, 1.0, 3.0])
    loss = kd_loss(
        student,
        teacher,
        divergence=fastkd.jsd(0.5, 0.01),
        temperature=2.0,
        weight=weight,
        reduction="none",
    )
    logs = ((x.double() / 2.0).log_softmax(-1) for x in (teacher, student))
    right = 4.0 * weight * opsd(*logs, 0.5, 0.01)
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=1e-7)


# Both


@pytest.mark.heavy_with(option="clip", fused=True)
@pytest.mark.heavy_with(option="floor", fused=False)
@pytest.mark.parametrize("option", ["clip", "floor"])
@pytest.mark.parametrize("fused", [False, True])
def test_values_change_without_a_recompile(option: str, fused: bool) -> None:
    student, teacher = logits(4, 30, seed=28), listed(4, 30, 9, seed=29)
    head = torch.eye(30)

    def step(student: Tensor, value: float) -> Tensor:
        divergence = fastkd.jsd(0.5, value) if option == "clip" else fastkd.forward_kl(floor=value)
        if fused:
            return fused_linear_kd_loss(student, head, teacher, divergence=divergence)
        return kd_loss(student, teacher, divergence=divergence)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    values = [0.001, 0.004, 0.02, math.inf] if option == "clip" else [-1.0, -2.0, -3.0, -math.inf]
    for value in values:
        leaf = student.detach().requires_grad_()
        loss, right = compiled(leaf, value), step(leaf, value)
        torch.testing.assert_close(loss, right)
        torch.testing.assert_close(gradient(loss, leaf), gradient(right, leaf))
    assert counter.frame_count <= 2
    bad = -1.0 if option == "clip" else 1.0
    with pytest.raises(ValueError, match=f"{option} must be"):
        compiled(student, bad)


def test_numbers_of_any_kind() -> None:
    for kind in (float, np.float32, torch.tensor):
        assert fastkd.jsd(0.5, clip=kind(0.25)) == fastkd.jsd(0.5, 0.25)
        assert fastkd.forward_kl(floor=kind(-8.0)) == fastkd.forward_kl(floor=-8.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastkd.jsd(clip=0.0), "clip must be positive and at most 1e\\+06, or infinity for none; got 0.0"),
        (lambda: fastkd.forward_kl(clip=-0.1), "clip must be positive"),
        (lambda: fastkd.reverse_kl(clip=2e6), "clip must be positive and at most"),
        (lambda: fastkd.mixture(clip=math.nan), "clip must be positive"),
        (lambda: fastkd.jsd(clip="0.1"), "clip must be a number, got str"),
        (lambda: fastkd.jsd(clip=torch.ones(2)), "clip must be a number, got Tensor"),
        (lambda: fastkd.forward_kl(floor=0.0), "floor must be negative, or -infinity for none; got 0.0"),
        (lambda: fastkd.forward_kl(floor=math.nan), "floor must be negative"),
        (lambda: fastkd.forward_kl(floor=None), "floor must be a number, got NoneType"),
        (lambda: fastkd.forward_kl(0.1, -10.0), "floor cannot be combined with a clip; got floor=-10.0, clip=0.1"),
    ],
)  # fmt: skip
def test_messages(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("name", ["jsd", "forward_kl"])
def test_a_clip_needs_a_plain_sum_of_the_others(name: str) -> None:
    top = listed(4, 30, 5, seed=30)
    teacher = TopK(top.ids, top.logprobs, "renormalize_teacher")
    divergence = getattr(fastkd, name)(clip=0.1)
    with pytest.raises(
        ValueError, match=f"the divergence '{name} with a clip' is infinite or has no sum"
    ):
        kd_loss(logits(4, 30, seed=31), teacher, divergence=divergence)


# The clamp of a row's loss, which is a line of PyTorch (docs/losses.md)


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_a_clamped_row_loss_is_that_of_verl(kind: str) -> None:
    student, teacher = logits(2, 5, 40, seed=32, spread=4.0), listed(10, 40, 6, seed=33)
    teacher = TopK(teacher.ids.view(2, 5, 6), teacher.logprobs.view(2, 5, 6), "truncate")
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(34)) < 0.8
    items = 13

    def loss(leaf: Tensor) -> Tensor:
        if kind == "logits":
            return kd_loss(leaf, teacher, mask=mask, reduction="none")
        head = torch.eye(40).requires_grad_()
        return fused_linear_kd_loss(leaf, head, teacher, mask=mask, reduction="none", chunk_size=3)

    for low, high in ((0.0, 2.0), (-0.5, 0.5)):
        leaf, exact_leaf = student.clone().requires_grad_(), student.double().requires_grad_()
        ours = loss(leaf).clamp(low, high).sum() / items
        each = verl(exact_leaf, teacher, None)
        assert (each > high).any() and (low > -0.6 or (each < low).any())
        exact = (each.clamp(low, high) * mask).sum() / items
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            gradient(ours, leaf).double(), gradient(exact, exact_leaf), rtol=1e-4, atol=1e-7
        )
