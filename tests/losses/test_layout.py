"""Strides, views, offsets and copies: results do not depend on where the logits lie in memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.accuracy import bars, check, labels_for, logits, upstream_for
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastkd import kd_loss

# Functions from contiguous logits [2, 5, 37] to the same numbers in another layout. 37 columns are not a multiple of a
# vector, so rows begin at every alignment.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "shifted as a language model shifts": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
    "rows of a wider tensor": lambda x: torch.cat([x, x], -1)[..., :37],
    "columns from the middle": lambda x: torch.cat([x[..., :3], x, x], -1)[..., 3:40],
    "off by one element": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(2, 5, 37),
    "every other row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "batch and sequence swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "vocabulary first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "vocabulary in the middle": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@layouts
def test_layouts(backend: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    student, teacher = logits(2, 5, 37, seed=1, dtype=dtype), logits(2, 5, 37, seed=2, dtype=dtype)
    labels = labels_for(2, 5, vocabulary=37, seed=3, ignored=0.2)
    for divergence in ("forward_kl", "jsd"):
        for s, t in (
            (layout(student), teacher),
            (student, layout(teacher)),
            (layout(student), layout(teacher)),
        ):
            assert torch.equal(s, student) and torch.equal(t, teacher)
            measured = check(backend, s, t, labels, divergence=divergence, alpha=0.5)
            assert measured.student_gradient.shape == student.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@layouts
def test_the_gradient_reaches_the_base_of_a_view(
    backend: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    student, teacher = logits(2, 5, 37, seed=4, dtype=dtype), logits(2, 5, 37, seed=5, dtype=dtype)
    leaf, by_layout = student.clone().requires_grad_(), student.clone().requires_grad_()
    kd_loss(leaf, teacher, backend=backend).backward()
    kd_loss(layout(by_layout), teacher, backend=backend).backward()
    # Rows with another alignment may be summed in another order.
    torch.testing.assert_close(by_layout.grad, leaf.grad)


def test_expanded_rows(backend: str) -> None:
    """A row stride of 0: one row of logits against many, and many against one."""
    one, many = logits(37, seed=6), logits(2, 5, 37, seed=7)
    for student, teacher in ((one.expand(2, 5, 37), many), (many, one.expand(2, 5, 37))):
        check(backend, student, teacher)
    leaf = one.clone().requires_grad_()
    kd_loss(leaf.expand(2, 5, 37), many, reduction="sum", backend=backend).backward()
    allowed = bars(one.expand(2, 5, 37), many, reduction="sum")
    error = leaf.grad.double() - allowed.exact.student_gradient.sum((0, 1))
    assert (error.abs() <= allowed.student_gradient.sum((0, 1))).all()


def test_expanded_columns(backend: str) -> None:
    """A column stride of 0: one logit for the whole vocabulary, which is a uniform distribution."""
    student, teacher = logits(5, 1, seed=8).expand(5, 37), logits(5, 37, seed=9)
    check(backend, student, teacher)
    check(backend, teacher, student)


def test_one_column_with_any_stride(backend: str) -> None:
    student = logits(5, 6, seed=10)[:, 2:3]
    check(backend, student, logits(5, 9, seed=11)[:, 8:])


def test_labels_mask_and_weight_with_any_stride(backend: str) -> None:
    student, teacher = logits(4, 3, 11, seed=12), logits(4, 3, 11, seed=13)
    labels = labels_for(3, 4, vocabulary=11, seed=14, ignored=0.2).t()
    mask = (torch.rand(3, 4, generator=torch.Generator().manual_seed(15)) < 0.8).t()
    weight = upstream_for(3, 8)[:, ::2].t()
    temperature = torch.tensor(2.0).expand(4, 3)
    check(
        backend,
        student,
        teacher,
        labels,
        mask=mask,
        weight=weight,
        temperature=temperature,
        alpha=0.5,
    )
    check(
        backend,
        student,
        teacher,
        labels[:, :1].expand(4, 3),
        weight=weight[:1].expand(4, 3),
        alpha=0.5,
    )


# Offsets of 64 bits

FAR_APART = """
    import mmap, sys, torch
    from fastkd import kd_loss

    rows, columns, stride = 4, 300, 2**30
    # Anonymous memory that is committed where it is touched: 12 GB of addresses, a few pages of memory.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)

    def near(dtype):
        return torch.empty(rows, columns, dtype=dtype)

    def far(dtype):
        size = ((rows - 1) * stride + columns) * dtype.itemsize
        storage = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).untyped_storage()
        return torch.empty(0, dtype=dtype).set_(storage, 0, (rows, columns), (stride, 1))

    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(rows, columns, generator=generator) for _ in range(2)]
    for dtype in (torch.float32, torch.bfloat16):
        for inplace in (False, True):
            print(dtype, "in place" if inplace else "", flush=True)
            results = []
            for make in (near, far):
                leaf = logits[0].to(dtype).requires_grad_()
                student, teacher = make(dtype).copy_(leaf), make(dtype).copy_(logits[1])
                loss = kd_loss(student, teacher, reduction="none", inplace=inplace, backend=sys.argv[1])
                assert torch.equal(student, leaf) != inplace
                gradient, = torch.autograd.grad(loss.sum(), leaf)
                results.append((loss.detach(), gradient))
            torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
"""


def test_rows_2_to_the_30_elements_apart(backend: str) -> None:
    """A 32-bit offset, in elements or in bytes, would read wrong memory; the test runs in its own process, which may
    crash."""
    script = [sys.executable, "-c", textwrap.dedent(FAR_APART), backend]
    done = subprocess.run(script, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 4


# Inputs and copies


@layouts
def test_inputs_are_unchanged(any_backend: str, layout: Callable[[Tensor], Tensor]) -> None:
    for dtype in (torch.float32, torch.float16):
        inputs: dict[str, Any] = {
            "student_logits": layout(logits(2, 5, 37, seed=16, dtype=dtype)),
            "teacher": layout(logits(2, 5, 37, seed=17, dtype=dtype)),
            "labels": labels_for(2, 5, vocabulary=37, seed=18, ignored=0.3),
            "mask": torch.ones(2, 5, dtype=torch.bool),
            "weight": torch.rand(2, 5),
            "temperature": torch.rand(2, 5) + 0.5,
            "num_items": torch.tensor(7),
        }
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        inputs["student_logits"].requires_grad_()
        inputs["teacher"].requires_grad_()
        versions = {name: tensor._version for name, tensor in inputs.items()}
        kd_loss(**inputs, alpha=0.5, backend=any_backend).backward()
        for name, tensor in inputs.items():
            assert torch.equal(tensor, before[name]) and tensor._version == versions[name], name


def _allocated(run: Callable[[], Any]) -> int:
    """Bytes that PyTorch allocates while `run` runs, whether or not they are freed again."""
    run()  # what the first call builds is not counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return sum(
        event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0
    )


def test_allocations_are_counted() -> None:
    assert _allocated(lambda: torch.zeros(1000)) == 4000


@pytest.mark.parametrize(
    "layout", ["shifted as a language model shifts", "rows of a wider tensor", "off by one element"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_view_is_not_copied(dtype: torch.dtype, layout: str) -> None:
    """Only the gradient is an allocation of the size of the logits."""
    student = LAYOUTS[layout](logits(2, 5, 37, seed=19, dtype=dtype))
    teacher = LAYOUTS[layout](logits(2, 5, 37, seed=20, dtype=dtype))
    assert not student.is_contiguous() or student.storage_offset() % 4
    one_tensor, one_row_value = student.numel() * student.element_size(), 2 * 5 * 4
    labels = labels_for(2, 5, vocabulary=37, seed=21, ignored=0.3)

    def forward() -> None:
        with torch.no_grad():
            kd_loss(student, teacher, labels, alpha=0.5, backend="cpu")

    def forward_and_backward() -> None:
        view = student.detach().requires_grad_()
        torch.autograd.grad(kd_loss(view, teacher, labels, alpha=0.5, backend="cpu"), view)

    in_place_of = student.detach().requires_grad_() * 1.0

    def in_place() -> None:
        loss = kd_loss(in_place_of, teacher, labels, alpha=0.5, inplace=True, backend="cpu")
        torch.autograd.grad(loss, in_place_of)

    # Per-row values: the loss, which labels count, the weights, and the temporaries of the reduction.
    assert _allocated(forward) <= 8 * one_row_value
    assert _allocated(forward_and_backward) <= one_tensor + 8 * one_row_value
    assert _allocated(in_place) <= 8 * one_row_value


def test_only_strided_columns_are_copied() -> None:
    student = LAYOUTS["every other column"](logits(64, 500, seed=22))
    contiguous = logits(64, 500, seed=23)
    size = contiguous.numel() * 4
    with torch.no_grad():
        assert _allocated(lambda: kd_loss(contiguous, contiguous, backend="cpu")) < size / 10
        assert size <= _allocated(lambda: kd_loss(student, contiguous, backend="cpu")) < 1.1 * size
