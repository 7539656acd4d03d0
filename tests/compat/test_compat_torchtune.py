"""fastkd.compat.torchtune against torchtune itself."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from support.beside_peers import compare, error, float64, run
from support.paths import DATA
from torch import Tensor
from torchtune.modules.loss import kd_losses as torchtune

from fastkd.compat import torchtune as ours

IGNORED = -100
RATIOS = {"Forward": 1.0, "Reverse": 0.0, "Symmetric": 0.3}


def options(name: str) -> dict[str, float]:
    return {"sym_kd_ratio": RATIOS[name]} if name == "Symmetric" else {}


def batch(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [2, tokens, V] and labels [2, tokens], a third of them dropped."""
    if kind == "random":  # nine tokens, which do not divide evenly into eight chunks
        generator = torch.Generator().manual_seed(0)
        student, teacher = 3 * torch.randn(2, 2, 9, 37, generator=generator)
    else:
        with np.load(DATA / "smollm2.npz") as file:
            student, teacher = (
                torch.from_numpy(file[x])[:4].float().view(2, 2, -1) for x in ("student", "teacher")
            )
    labels = teacher.argmax(-1)
    labels.view(-1)[1::3] = IGNORED
    return student.to(dtype), teacher.to(dtype), labels


def formula(
    student: Tensor, teacher: Tensor, labels: Tensor, ratio: float, normalize: bool = True
) -> Tensor:
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = -(log_p.exp() * log_q).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    per_row = (ratio * forward + (1 - ratio) * reverse)[labels != IGNORED]
    return per_row.mean() if normalize else per_row.sum()


@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("name", RATIOS)
def test_losses(name: str, kind: str) -> None:
    student, teacher, labels = batch(kind)
    flat = [x.flatten(0, 1) for x in (student, teacher)]  # as torchtune's recipes pass them
    replacement, reference = (
        getattr(x, f"{name}KLLoss")(**options(name)) for x in (ours, torchtune)
    )
    for normalize in (True, False):
        exact = run(
            formula, float64(flat[0]), flat[1].double(), labels.flatten(), RATIOS[name], normalize
        )
        actual = run(replacement, flat[:1], flat[1], labels, normalize)
        compare(actual, run(reference, flat[:1], flat[1], labels, normalize), exact)


@pytest.mark.parametrize("chunks", [1, 3, 8])
@pytest.mark.parametrize("name", RATIOS)
def test_chunks(name: str, chunks: int) -> None:
    """Chunks with different numbers of rows give the mean over all rows, not the mean of the chunks' means."""
    student, teacher, labels = batch("random")
    labels[:, :3] = IGNORED

    def loss_and_gradients(loss: Any) -> Any:
        return lambda s: loss(s.chunk(chunks, 1), teacher.chunk(chunks, 1), labels)

    replacement, reference = (
        getattr(x, f"{name}KLWithChunkedOutputLoss")(chunks, **options(name))
        for x in (ours, torchtune)
    )
    exact = run(formula, float64(student), teacher.double(), labels, RATIOS[name])
    compare(
        run(loss_and_gradients(replacement), [student]),
        run(loss_and_gradients(reference), [student]),
        exact,
    )


@pytest.mark.parametrize("name", RATIOS)
def test_bfloat16(name: str) -> None:
    student, teacher, labels = batch("random", torch.bfloat16)
    exact = run(formula, float64(student), teacher.double(), labels, RATIOS[name])
    replacement, reference = (
        getattr(x, f"{name}KLLoss")(**options(name)) for x in (ours, torchtune)
    )
    actual = run(replacement, [student], teacher, labels)
    assert actual.loss.dtype == torch.float32
    assert actual.gradients[0].dtype == torch.bfloat16
    compare(actual, run(reference, [student], teacher, labels), exact, same=2**-7)


@pytest.mark.parametrize("name", RATIOS)
def test_a_batch_without_a_counted_row_has_loss_0(name: str) -> None:
    """torchtune gives NaN, or a constant without a graph, which would hang DDP."""
    student, teacher, labels = batch("random")
    labels = torch.full_like(labels, IGNORED)
    for replacement, reference, chunked in (
        (f"{name}KLLoss", f"{name}KLLoss", False),
        (f"{name}KLWithChunkedOutputLoss", f"{name}KLWithChunkedOutputLoss", True),
    ):
        inputs = [x.chunk(8, 1) if chunked else x for x in (student.requires_grad_(), teacher)]
        wrong = getattr(torchtune, reference)(**options(name))(*inputs, labels)
        assert wrong.isnan() or not wrong.requires_grad or name == "Symmetric"
        loss = getattr(ours, replacement)(**options(name))(*inputs, labels)
        assert loss == 0
        assert torch.autograd.grad(loss, student)[0].eq(0).all()


def test_impossible_tokens() -> None:
    """Columns at -inf on both sides have no effect; torchtune's reverse KL has NaN gradients."""
    student, teacher, labels = batch("random")
    student[..., 5] = teacher[..., 5] = -math.inf
    kept = torch.arange(37) != 5
    for name, ratio in RATIOS.items():
        exact = run(
            formula, float64(student[..., kept]), teacher[..., kept].double(), labels, ratio
        )
        replacement, reference = (
            getattr(x, f"{name}KLLoss")(**options(name)) for x in (ours, torchtune)
        )
        actual = run(replacement, [student], teacher, labels)
        assert error(actual.loss, exact.loss) < 1e-6
        assert error(actual.gradients[0][..., kept], exact.gradients[0]) < 1e-6
        assert actual.gradients[0][..., 5].eq(0).all()
        wrong = run(reference, [student], teacher, labels).gradients[0]
        assert wrong.isnan().any() == (name != "Forward")
    # With -inf on one side only the formula is infinite, and torchtune omits the column.
    teacher[..., 5] = 0.0
    assert ours.ForwardKLLoss()(student, teacher, labels) == math.inf
    assert torchtune.ForwardKLLoss()(student, teacher, labels).isfinite()


def test_chunks_that_do_not_match() -> None:
    student, teacher, labels = batch("random")
    loss = ours.ForwardKLWithChunkedOutputLoss(3)
    with pytest.raises(ValueError, match="got 3 and 9 chunks, 9 tokens of the student"):
        loss(student.chunk(3, 1), teacher.chunk(9, 1), labels)
    with pytest.raises(ValueError, match="labels must have one value a row"):
        ours.ForwardKLLoss()(student, teacher, labels[:, :-1])
    with pytest.raises(ValueError, match=r"sym_kd_ratio must be in \[0, 1\], got 2"):
        ours.SymmetricKLLoss(2)


@pytest.mark.parametrize("suffix", ["KLLoss", "KLWithChunkedOutputLoss"])
@pytest.mark.parametrize("name", RATIOS)
def test_signatures(name: str, suffix: str) -> None:
    replacement, reference = (getattr(x, name + suffix) for x in (ours, torchtune))
    for method in ("__init__", "forward"):
        actual, expected = (
            [(p.name, p.default) for p in inspect.signature(getattr(x, method)).parameters.values()]
            for x in (replacement, reference)
        )
        assert actual == expected
    kept = {"ignore_index", *options(name), *(["num_output_chunks"] if "Chunked" in suffix else [])}
    for attribute in kept:  # the recipes read them
        assert getattr(replacement(), attribute) == getattr(reference(), attribute)
