"""Results are bitwise equal on every run and for any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import labels_for, logits, upstream_for
from torch import Tensor

from fastkd import kd_loss


def _all_results(
    backend: str, student: Tensor, teacher: Tensor, labels: Tensor, **options: Any
) -> list[Tensor]:
    """Every result of a call: loss, parts and both gradients."""
    s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss, parts = kd_loss(s, t, labels, return_parts=True, backend=backend, **options)
    upstream = torch.tensor(1.7) if loss.dim() == 0 else upstream_for(*loss.shape)
    return [loss.detach(), *parts, *torch.autograd.grad(loss, (s, t), upstream)]


# PyTorch splits a sum among threads, and the reference uses PyTorch's sums, so its results repeat only for one number
# of threads. The kernels' results do not depend on the number.
def _thread_counts(backend: str) -> list[list[int]]:
    return [[1, 1], [2, 2]] if backend in ("portable", "reference") else [[1, 2, 2, 3, 1]]


# Divergences: two sweeps, three sweeps, no normalizer. Rows: fewer than threads, so that threads share a row; one per
# thread; more than threads and not a multiple of them. Widths: within one block of 2048 columns; several blocks with a
# tail.
@pytest.mark.pairwise(each="backend")
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "squared_error"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [100, 50_001])
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.usefixtures("threads")
def test_reruns_and_threads(
    backend: str, rows: int, columns: int, dtype: torch.dtype, divergence: str
) -> None:
    student, teacher = (
        logits(rows, columns, seed=1, dtype=dtype),
        logits(rows, columns, seed=2, dtype=dtype),
    )
    labels = labels_for(rows, vocabulary=columns, seed=3)
    for reduction in ("none", "mean"):
        options = {
            "divergence": divergence,
            "reduction": reduction,
            "alpha": 0.5,
            "temperature": 2.0,
        }
        for counts in _thread_counts(backend):
            runs = []
            for count in counts:
                torch.set_num_threads(count)
                runs.append(_all_results(backend, student, teacher, labels, **options))
            for again in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.usefixtures("threads")
def test_sum_of_many_rows(backend: str) -> None:
    """The sum over more rows than PyTorch sums with one thread is bitwise repeatable."""
    student, teacher = logits(100_000, 3, seed=4), logits(100_000, 3, seed=5)
    for counts in _thread_counts(backend):
        results = set()
        for count in counts:
            torch.set_num_threads(count)
            results.add(kd_loss(student, teacher, backend=backend).item())
        assert len(results) == 1


@pytest.mark.usefixtures("threads")
def test_in_place(backend: str) -> None:
    student, teacher = logits(3, 5000, seed=6), logits(3, 5000, seed=7)
    for counts in _thread_counts(backend):
        gradients = []
        for count in counts:
            torch.set_num_threads(count)
            leaf = student.clone().requires_grad_()
            kd_loss(leaf * 1.0, teacher, inplace=True, backend=backend).backward()
            gradients.append(leaf.grad)
        assert all(torch.equal(gradients[0], again) for again in gradients[1:])
