"""Real logits: positions of a text under a real language model, peaked and with a real tail (tests/support/data)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import BACKENDS
from support.accuracy import check
from support.paths import DATA
from torch import Tensor

import fastkd

SMOLLM2 = DATA / "smollm2.npz"


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, Tensor, Tensor]:
    """(student, teacher, labels): [8, 49152] in float32, and [8]."""
    with np.load(SMOLLM2) as file:
        student, teacher = (torch.from_numpy(file[side]).float() for side in ("student", "teacher"))
    # The teacher's most likely token, a token that it considers unlikely, and two ignored rows.
    labels = teacher.argmax(-1)
    labels[1], labels[2:4] = 11, -100
    return student, teacher, labels


def test_the_data_matches_its_description(real: tuple[Tensor, Tensor, Tensor]) -> None:
    p = real[1].double().softmax(-1)
    entropy = torch.special.entr(p).sum(-1).mean()
    assert p.shape == (8, 49_152) and 1 < entropy < 4 and p.topk(64).values.sum(-1).mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", fastkd.DIVERGENCES)
def test_divergences(real: tuple[Tensor, Tensor, Tensor], name: str, dtype: torch.dtype) -> None:
    """Each backend in turn, so that the oracle computes the expected values once. Four rows, two of them ignored."""
    student, teacher, labels = (x[1:5] for x in real)
    student, teacher = student.to(dtype), teacher.to(dtype)
    options = {"divergence": name, "temperature": 2.0, "alpha": 0.5}
    for backend in BACKENDS:
        if dtype != torch.float16:
            check(backend, student, teacher, divergence=name)
        if dtype != torch.bfloat16:
            check(backend, student, teacher, labels, **options)


@pytest.mark.parametrize("temperature", [0.5, 4.0, 20.0])
def test_hinton_at_other_temperatures(
    backend: str, real: tuple[Tensor, Tensor, Tensor], temperature: float
) -> None:
    student, teacher, labels = real
    options = {"alpha": 0.9, "temperature": temperature, "label_smoothing": 0.1}
    check(backend, student, teacher, labels, **options)
