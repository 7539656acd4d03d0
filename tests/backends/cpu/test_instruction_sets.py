"""Every set of instructions that this processor runs the native kernels in, and the paths that large calls take."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.accuracy import check, labels_for, logits
from torch import Tensor

import fastkd
from fastkd import kd_loss
from fastkd.backends import cpu

_C = pytest.importorskip("fastkd._C")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# A gradient of 4 MiB or more is written past the cache, together with the next row's statistics.
ROWS, COLUMNS = 9, 122_880  # 60 blocks of 2048 columns


@DTYPES
@pytest.mark.parametrize("name", fastkd.DIVERGENCES)
def test_divergences(instructions: str, name: str, dtype: torch.dtype) -> None:
    for columns in (1, 37, 2049):
        student, teacher = (logits(3, columns, seed=side, dtype=dtype) for side in (1, 2))
        labels = labels_for(3, vocabulary=columns, seed=3)
        options: dict[str, Any] = {"divergence": name, "temperature": 3.0, "alpha": 0.6}
        check("cpu", student, teacher, labels, **options)
        check("cpu", student, teacher, labels, softcap=9.0, teacher_softcap=20.0, **options)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "alpha_beta"])
def test_infinities(instructions: str, name: str) -> None:
    student, teacher = logits(4, 2100, seed=1), logits(4, 2100, seed=2)
    student[0, 5:9] = teacher[0, 5:9] = -torch.inf  # on both sides
    teacher[1, :2060] = -torch.inf
    student[2, 2090:] = -torch.inf
    check("cpu", student, teacher, divergence=name, teacher_gradient=name != "forward_kl")


@DTYPES
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_large_calls_equal_single_rows(instructions: str, name: str, dtype: torch.dtype) -> None:
    """Dropped rows, rows repeated for their -inf, and rows at any offset in a cache line have the same bits."""
    wide = logits(ROWS, COLUMNS + 3, seed=1, dtype=dtype)
    teacher = logits(ROWS, COLUMNS, seed=2, dtype=dtype)
    mask = torch.tensor([False, True, True, False, False, True, True, True, False])
    wide[5, 7:20] = -torch.inf
    teacher[6, 100:] = -torch.inf
    for student in (wide[:, 3:], wide[:, 3:].contiguous()):
        assert student.numel() * student.element_size() // ROWS * ROWS >= cpu._LARGE / 2
        whole = student.detach().requires_grad_()
        losses = kd_loss(
            whole, teacher, divergence=name, mask=mask, reduction="none", backend="cpu"
        )
        (gradient,) = torch.autograd.grad(losses.sum(), whole)
        for row in range(ROWS):
            alone = student[row : row + 1].detach().requires_grad_()
            loss = kd_loss(
                alone,
                teacher[row : row + 1],
                divergence=name,
                mask=mask[row : row + 1],
                reduction="none",
                backend="cpu",
            )
            (expected,) = torch.autograd.grad(loss.sum(), alone)
            torch.testing.assert_close(losses[row], loss[0], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(gradient[row], expected[0], rtol=0, atol=0, equal_nan=True)


@functools.cache
def _large(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher in bfloat16; the loss at temperature 2 and its gradient in float64."""
    student, teacher = (logits(rows, columns, seed=seed).bfloat16() for seed in (4, 5))
    p, q = ((x.double() / 2).softmax(-1) for x in (teacher, student))
    gradient = (q - p) * 2 / rows  # T^2 / T / N
    return student, teacher, (p * (p / q).log()).sum(-1).mean() * 4, gradient


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 32_768), (33, 65_541), (11, 200_000)])
def test_large_calls_against_float64(
    instructions: str, rows: int, columns: int, inplace: bool
) -> None:
    """Rows whose exponentials are kept, kept at odd offsets, and recomputed."""
    student, teacher, value, exact = _large(rows, columns)
    assert student.nbytes >= cpu._LARGE
    leaf = student.detach().requires_grad_()
    loss = kd_loss(leaf * 1, teacher, temperature=2.0, inplace=inplace, backend="cpu")
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert (
        (gradient.double() - exact).abs() <= exact.abs() * 2**-8 + exact.abs().max() * 1e-6
    ).all()
    torch.testing.assert_close(loss.double(), value, rtol=3e-7, atol=0)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="instruction set must be one of .*baseline.*; got sse9"):
        _C.use_instruction_set("sse9")
