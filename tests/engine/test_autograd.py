"""Autograd features with a loss: upstream gradients, retained graphs, checkpoints, hooks, and modes that must raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.accuracy import ULP, bars, check, labels_for, logits, upstream_for
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import kd_loss

# float16 computes its gradient in the backward, the other dtypes in the forward.
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def _pair(
    dtype: torch.dtype = torch.float32, *lead: int, columns: int = 19
) -> tuple[Tensor, Tensor]:
    lead = lead or (4,)
    return logits(*lead, columns, seed=1, dtype=dtype).requires_grad_(), logits(
        *lead, columns, seed=2, dtype=dtype
    )


def _gradient(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    leaf = student.detach().clone().requires_grad_()
    return torch.autograd.grad(kd_loss(leaf, teacher, **options), leaf)[0]


# The upstream gradient


@dtypes
def test_a_different_upstream_gradient_for_every_row(any_backend: str, dtype: torch.dtype) -> None:
    student, teacher = _pair(dtype, 2, 3)
    for number, upstream in enumerate(
        (
            torch.tensor([[0.0, 1.0, -2.0], [0.5, 4.0, 0.0]]),
            torch.tensor([[2.0, 0.5, -4.0]]).expand(2, 3),
            torch.tensor([[1.0, -2.0], [0.5, 0.25], [4.0, 8.0]]).t(),
            torch.tensor([[1.0, 9.0, -2.0, 9.0, 2.0, 9.0], [4.0, 9.0, 0.0, 9.0, 8.0, 9.0]])[:, ::2],
            torch.tensor(-2.0).expand(2, 3),
        )
    ):
        options = {"weight": upstream_for(2, 3).sign() * 0.5} if number % 2 else {}
        check(any_backend, student.detach(), teacher, upstream=upstream, **options)


@dtypes
def test_the_loss_squared(any_backend: str, dtype: torch.dtype) -> None:
    """The upstream factor, 2 loss, is known only after the forward."""
    for reduction in ("sum", "mean"):
        student, teacher = _pair(dtype)
        loss = kd_loss(student, teacher, reduction=reduction, backend=any_backend)
        loss.square().backward()
        upstream = 2 * loss.detach()
        arguments: dict[str, Any] = {"reduction": reduction, "upstream": upstream}
        allowed = bars(student.detach(), teacher, **arguments)
        error = (student.grad.double() - allowed.exact.student_gradient).abs()
        # A bfloat16 gradient is rounded in the forward, and again by the factor.
        rounded_before = allowed.exact.student_gradient.abs() * torch.finfo(dtype).eps / 2
        assert (
            error <= allowed.student_gradient + rounded_before * (dtype == torch.bfloat16)
        ).all()


@dtypes
def test_the_loss_used_twice(any_backend: str, dtype: torch.dtype) -> None:
    student, teacher = _pair(dtype)
    loss = kd_loss(student, teacher, reduction="none", backend=any_backend)
    (
        2.0 * loss.sum() + 0.5 * loss[1] + (loss * torch.tensor([0.0, 0.0, 4.0, -2.0])).sum()
    ).backward()
    upstream = torch.tensor([2.0, 2.5, 6.0, 0.0])
    again = torch.autograd.grad(
        kd_loss(student, teacher, reduction="none", backend=any_backend), student, upstream
    )
    assert torch.equal(student.grad, again[0])


@dtypes
def test_an_upstream_gradient_of_zero(any_backend: str, dtype: torch.dtype) -> None:
    student, teacher = _pair(dtype)
    (kd_loss(student, teacher, backend=any_backend) * 0.0).backward()
    assert student.grad is not None and not student.grad.any()


def test_float16_gradient_of_a_scaled_loss_does_not_underflow(backend: str) -> None:
    """1 / (N V) underflows in float16: rounding before the scaler's factor is applied would leave zeros."""
    student = logits(32, 4000, seed=3, spread=0.5, dtype=torch.float16).requires_grad_()
    teacher = logits(32, 4000, seed=4, spread=0.5, dtype=torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for items in (
        2**17,
        torch.tensor(2.0**17),
    ):  # the number of rows of a batch over many devices and steps
        student.grad = None
        scaler.scale(kd_loss(student, teacher, num_items=items, backend=backend)).backward()
        arguments = {"reduction": "mean", "num_items": items, "upstream": torch.tensor(2.0**20)}
        allowed = bars(student.detach(), teacher, **arguments)
        error = (student.grad.double() - allowed.exact.student_gradient).abs()
        assert (error <= allowed.student_gradient).all()
        assert student.grad.count_nonzero() > 0.99 * student.numel()
        unscaled = (allowed.exact.student_gradient / 2**20).half()
        assert unscaled.count_nonzero() == 0


# Teacher gradients and which gradients are computed


# How a dtype is stored does not depend on the divergence, so two are enough: with a closed form and without.
@pytest.mark.parametrize(
    ("divergence", "dtype"),
    [(name, torch.float32) for name in fastkd.DIVERGENCES]
    + [(name, dtype) for name in ("mixture", "jsd") for dtype in FLOATS[1:]],
    ids=str,
)
def test_each_side_that_requires_grad_gets_a_gradient(
    any_backend: str, dtype: torch.dtype, divergence: str
) -> None:
    both = None
    for sides in ((True, True), (True, False), (False, True), (False, False)):
        student, teacher = _pair(dtype)
        student, teacher = (
            student.detach().requires_grad_(sides[0]),
            teacher.requires_grad_(sides[1]),
        )
        loss = kd_loss(
            student, teacher, divergence=divergence, temperature=2.0, backend=any_backend
        )
        assert loss.requires_grad == any(sides)
        if any(sides):
            loss.backward()
        both = both or (loss.detach(), student.grad, teacher.grad)
        torch.testing.assert_close(loss.detach(), both[0], rtol=4 * ULP, atol=0)
        for side, leaf in enumerate((student, teacher)):
            assert (leaf.grad is not None) == sides[side]
            if leaf.grad is not None:  # so that rounding does not differ by chance
                torch.testing.assert_close(
                    leaf.grad, both[1 + side], rtol=torch.finfo(dtype).eps, atol=1e-6
                )


def test_the_same_tensor_on_both_sides(any_backend: str) -> None:
    student = logits(4, 19, seed=5).requires_grad_()
    kd_loss(student, student * 2.0, backend=any_backend).backward()
    twins = [student.detach().clone().requires_grad_() for _ in range(2)]
    kd_loss(twins[0], twins[1] * 2.0, backend=any_backend).backward()
    torch.testing.assert_close(student.grad, twins[0].grad + twins[1].grad, rtol=0, atol=ULP)
    kd_loss(student, student, backend=any_backend).backward()


@dtypes
def test_no_gradient_is_computed_without_need(any_backend: str, dtype: torch.dtype) -> None:
    student, teacher = _pair(dtype)
    expected = kd_loss(student, teacher, backend=any_backend).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for inplace in (False, True):
                before = student.clone()
                loss = kd_loss(student.clone(), teacher, inplace=inplace, backend=any_backend)
                assert not loss.requires_grad and torch.equal(loss, expected)
                kept = student.detach().clone()
                kd_loss(kept, teacher, inplace=inplace, backend=any_backend)
                assert torch.equal(kept, before)  # there is no gradient to write into it


def test_an_inference_tensor_as_teacher(any_backend: str) -> None:
    student, teacher = _pair()
    with torch.inference_mode():
        computed = teacher * 1.0
    for dtype in FLOATS:
        leaf = student.detach().to(dtype).requires_grad_()
        kd_loss(leaf, computed, backend=any_backend).backward()
        assert torch.equal(leaf.grad, _gradient(leaf, teacher, backend=any_backend))


# The graph


@dtypes
def test_retain_graph(any_backend: str, dtype: torch.dtype) -> None:
    """A saved gradient is not scaled twice."""
    student, teacher = _pair(dtype)
    loss = kd_loss(student, teacher, reduction="none", backend=any_backend)
    upstreams = [
        torch.tensor([1.0, 2.0, -4.0, 0.5]),
        torch.tensor([8.0, 0.0, 1.0, 1.0]),
        torch.ones(4),
    ]
    gradients = [
        torch.autograd.grad(loss, student, upstream, retain_graph=call < 2)[0]
        for call, upstream in enumerate(upstreams)
    ]
    for gradient, upstream in zip(gradients, upstreams, strict=True):
        fresh = kd_loss(student, teacher, reduction="none", backend=any_backend)
        assert torch.equal(gradient, torch.autograd.grad(fresh, student, upstream)[0])
    assert len({gradient.data_ptr() for gradient in gradients}) == 3


@dtypes
def test_a_second_backward_without_the_graph_raises(any_backend: str, dtype: torch.dtype) -> None:
    student, teacher = _pair(dtype)
    loss = kd_loss(student, teacher, backend=any_backend)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@dtypes
def test_gradients_accumulate(any_backend: str, dtype: torch.dtype) -> None:
    student, teacher = _pair(dtype)
    kd_loss(student, teacher, backend=any_backend).backward()
    once = student.grad.clone()
    kd_loss(student, teacher, backend=any_backend).backward()
    assert torch.equal(student.grad, 2 * once)


def test_gradients_of_two_calls_share_no_memory(backend: str) -> None:
    # 4 MB, a size from which the allocator reuses memory for outputs.
    student, teacher = logits(4, 262144, seed=6), logits(4, 262144, seed=7)
    first = _gradient(student, teacher, backend=backend)
    kept = first.clone()
    second = _gradient(teacher, student, backend=backend)
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, kept)
    view = first[:, 5:9]
    del first, second
    _gradient(teacher, student, backend=backend)
    assert torch.equal(view, kept[:, 5:9])


@dtypes
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(
    any_backend: str, use_reentrant: bool, dtype: torch.dtype
) -> None:
    hidden, head, teacher = (
        logits(4, 8, seed=8, dtype=dtype),
        logits(8, 19, seed=9, dtype=dtype),
        _pair(dtype)[1],
    )

    def step(hidden: Tensor, head: Tensor) -> Tensor:
        return kd_loss(hidden @ head, teacher, divergence="jsd", backend=any_backend)

    def inplace_step(hidden: Tensor, head: Tensor) -> Tensor:
        return kd_loss(hidden @ head, teacher, divergence="jsd", inplace=True, backend=any_backend)

    def gradients(run: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = (hidden.clone().requires_grad_(), head.clone().requires_grad_())
        (run(*leaves) * 2.0).backward()
        return tuple(leaf.grad for leaf in leaves)

    expected = gradients(step)
    for function in (step, inplace_step):
        got = gradients(lambda *x, f=function: checkpoint(f, *x, use_reentrant=use_reentrant))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@dtypes
def test_saved_tensor_hooks(any_backend: str, dtype: torch.dtype) -> None:
    student, teacher = _pair(dtype)
    expected = _gradient(student, teacher, backend=any_backend)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Any:
        packed.append(tensor)
        return (
            tensor.numpy(force=True).copy()
            if tensor.dtype != torch.bfloat16
            else tensor.float().numpy()
        )

    with torch.autograd.graph.saved_tensors_hooks(
        pack, lambda array: torch.from_numpy(array).to(dtype)
    ):
        loss = kd_loss(student, teacher, backend=any_backend)
    loss.backward()
    assert packed and torch.equal(student.grad, expected)
    student.grad = None
    with torch.autograd.graph.save_on_cpu():
        kd_loss(student, teacher, backend=any_backend).backward()
    assert torch.equal(student.grad, expected)


@dtypes
def test_hooks_on_the_logits(any_backend: str, dtype: torch.dtype) -> None:
    leaf, teacher = _pair(dtype)
    seen: list[Tensor] = []
    student = leaf * 1.0
    student.register_hook(lambda gradient: seen.append(gradient.clone()))
    student.retain_grad()
    kd_loss(student, teacher, backend=any_backend).backward()
    assert torch.equal(seen[0], student.grad) and torch.equal(leaf.grad, student.grad)


def test_parts_are_not_differentiable(any_backend: str) -> None:
    student, teacher = _pair()
    _, parts = kd_loss(student, teacher, return_parts=True, backend=any_backend)
    with pytest.raises(RuntimeError, match="does not require grad"):
        parts.distillation.sum().backward()


# In place


@dtypes
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "squared_error"])
def test_in_place_gives_the_same_gradient(
    backend: str, divergence: str, dtype: torch.dtype
) -> None:
    # 4101 columns: one block's gradient is written while other blocks are still unread.
    student, teacher = _pair(dtype, 2, 3, columns=4101)
    labels = labels_for(2, 3, vocabulary=4099, seed=10, ignored=0.3)
    options: dict[str, Any] = {
        "divergence": divergence,
        "alpha": 0.5,
        "vocab_size": 4099,
        "backend": backend,
    }
    expected = _gradient(student, teacher, labels=labels, **options)
    for reduction, upstream in (
        ("mean", None),
        ("mean", torch.tensor(4.0)),
        ("none", torch.ones(2, 3) / 8),
    ):
        leaf = student.detach().clone().requires_grad_()
        written = leaf * 1.0
        call = {"labels": labels, "reduction": reduction, **options}
        loss = kd_loss(written, teacher, inplace=True, **call)
        plain = student.detach().clone().requires_grad_()
        torch.autograd.backward(loss, upstream)
        torch.autograd.backward(kd_loss(plain, teacher, **call), upstream)
        assert torch.equal(leaf.grad, plain.grad)
        assert (
            reduction == "none" or upstream is not None or torch.equal(written.detach(), expected)
        )


def test_in_place_writes_into_the_logits(any_backend: str) -> None:
    leaf, teacher = _pair()
    student = leaf * 1.0
    address, version = student.data_ptr(), student._version
    loss = kd_loss(student, teacher, inplace=True, backend=any_backend)
    assert student._version > version
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.data_ptr() == address
    assert torch.equal(gradient, _gradient(leaf, teacher, backend=any_backend))


@dtypes
def test_in_place_makes_a_later_use_of_the_logits_raise(
    any_backend: str, dtype: torch.dtype
) -> None:
    leaf, teacher = _pair(dtype)
    student = leaf.exp()  # saves its result for its own backward
    loss = kd_loss(student, teacher, inplace=True, backend=any_backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@dtypes
def test_in_place_through_the_shifted_view(backend: str, dtype: torch.dtype) -> None:
    student, teacher = _pair(dtype, 2, 4)
    gradients = []
    for inplace in (False, True):
        leaf = student.detach().clone().requires_grad_()
        kd_loss((leaf * 1.0)[:, :-1], teacher[:, :-1], inplace=inplace, backend=backend).backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1]) and not gradients[0][:, -1].any()


@dtypes
def test_in_place_and_retain_graph(any_backend: str, dtype: torch.dtype) -> None:
    leaf, teacher = _pair(dtype)
    student = leaf * 1.0
    loss = kd_loss(student, teacher, inplace=True, reduction="sum", backend=any_backend)
    expected = _gradient(leaf, teacher, reduction="sum", backend=any_backend)
    for factor, retain in ((2.0, True), (1.0, True), (4.0, False)):
        (gradient,) = torch.autograd.grad(loss, leaf, torch.tensor(factor), retain_graph=retain)
        assert torch.equal(gradient, factor * expected)


@pytest.mark.parametrize("rows", [0, 3])
def test_in_place_where_no_row_counts(any_backend: str, rows: int) -> None:
    leaf = logits(rows, 19, seed=11).requires_grad_()
    mask = torch.zeros(rows, dtype=torch.bool)
    loss = kd_loss(
        leaf * 1.0, logits(rows, 19, seed=12), mask=mask, inplace=True, backend=any_backend
    )
    loss.backward()
    assert loss == 0 and leaf.grad is not None and not leaf.grad.any()


def test_in_place_refuses_calls_that_it_would_break(any_backend: str) -> None:
    leaf, teacher = _pair()
    student = leaf * 1.0
    for arguments, message in (
        ((leaf, teacher), "inplace=True would overwrite student_logits, a leaf that requires grad"),
        (
            (student, teacher.clone().requires_grad_()),
            "inplace=True overwrites student_logits, which the teacher's gradient needs; detach the teacher or "
            "pass inplace=False",
        ),
        (
            (student.t().contiguous().t(), teacher),
            "inplace=True needs student_logits with a last stride of 1, got strides (1, 4)",
        ),
        (
            (student[:1].expand(4, 19), teacher),
            "inplace=True needs student_logits without expanded dimensions, got strides (0, 1); pass "
            "student_logits.contiguous()",
        ),
        (
            (student, student.detach()),
            "inplace=True would overwrite the teacher: it shares its storage with student_logits",
        ),
        (
            (student[:2], student[2:].detach()),
            "inplace=True would overwrite the teacher: it shares its storage with student_logits",
        ),
    ):
        before = student.detach().clone()
        with pytest.raises(ValueError) as error:
            kd_loss(*arguments, inplace=True, backend=any_backend)
        assert str(error.value) == message
        assert torch.equal(student.detach(), before)


# Modes that must raise instead of giving silently wrong results


@dtypes
def test_double_backward_raises(any_backend: str, dtype: torch.dtype) -> None:
    student, teacher = _pair(dtype)
    loss = kd_loss(student, teacher, reduction="none", backend=any_backend)
    for upstream in (torch.ones(4), torch.ones(4, requires_grad=True)):
        (gradient,) = torch.autograd.grad(loss, student, upstream, create_graph=True)
        penalty = gradient.square().sum()
        # If autograd took the gradient for a constant, this would run without the penalty.
        with pytest.raises(RuntimeError, match="twice"):
            (loss.sum() + penalty).backward(retain_graph=True)
    # Without strict, torch treats an output that it cannot trace to the input as a constant.
    with pytest.raises(RuntimeError, match="independent"):
        torch.autograd.functional.hessian(
            lambda x: kd_loss(x, teacher, backend=any_backend), student.detach(), strict=True
        )


@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode_raises(any_backend: str, requires_grad: bool) -> None:
    student, teacher = _pair()
    with forward_ad.dual_level():
        for side in range(2):
            pair = [student.detach().requires_grad_(requires_grad), teacher.clone()]
            pair[side] = forward_ad.make_dual(pair[side], torch.ones_like(teacher))
            with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
                kd_loss(*pair, backend=any_backend)


def test_functional_transforms_raise(any_backend: str) -> None:
    student, teacher = _pair()

    def loss(student: Tensor) -> Tensor:
        return kd_loss(student, teacher, backend=any_backend)

    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(student, teacher, backend=any_backend)

    with pytest.raises(RuntimeError):
        torch.func.grad(loss)(student.detach())
    with pytest.raises(RuntimeError):
        torch.func.jvp(loss, (student.detach(),), (torch.ones_like(teacher),))
    with pytest.raises(RuntimeError):
        torch.func.vmap(rows)(student.detach(), teacher)
    with pytest.raises(RuntimeError):
        torch.func.jacrev(loss)(student.detach())
