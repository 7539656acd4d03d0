"""fastkd.compat.nemo_automodel and fastkd.compat.swift against the original files."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import Processes
from torch import Tensor

from fastkd.compat import nemo_automodel, swift

B, S, V, K = 2, 7, 40, 5


@cache
def original(package: str, file: str) -> Any:
    """A file of a package, which imports nothing else of it; the whole package has many requirements."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations
    path = Path(next(iter(found.submodule_search_locations))) / file
    spec = importlib.util.spec_from_file_location(f"original_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def nemo() -> Any:
    return original("nemo_automodel", "components/loss/kd_loss.py")


def ms_swift() -> Any:
    return original("swift", "rlhf_trainers/gkd_loss.py")


def problem(dtype: torch.dtype = torch.float32, widths: tuple[int, int] = (V, V)) -> list[Tensor]:
    """(student logits, a leaf; teacher logits; labels)"""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        (3 * torch.randn(B, S, width, generator=generator)).to(dtype) for width in widths
    )
    labels = torch.randint(V, (B, S), generator=generator)
    labels[0, :3] = -100
    return [student.requires_grad_(), teacher, labels]


def agree(ours: Tensor, theirs: Tensor, leaf: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=1e-6)
    found, expected = (torch.autograd.grad(loss, leaf)[0].float() for loss in (ours, theirs))
    assert expected.any()
    torch.testing.assert_close(found, expected, rtol=100 * tolerance, atol=tolerance)


# ---- NeMo AutoModel


@pytest.mark.parametrize("num_batch_labels", [None, 31])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("dtype", "options"), [
    (torch.float32, {}), (torch.float32, {"chunk_size": 3}), (torch.bfloat16, {}),
])  # fmt: skip
def test_kd_loss(
    dtype: torch.dtype, options: Any, temperature: float, num_batch_labels: int | None
) -> None:
    student, teacher, labels = problem(dtype)
    theirs, ours = (
        module.KDLoss(temperature=temperature, **options)(
            student, teacher, labels, num_batch_labels=num_batch_labels
        )
        for module in (nemo(), nemo_automodel)
    )
    assert ours.dtype == torch.float32
    agree(ours, theirs, student, 1e-5 if dtype == torch.float32 else 1e-2)


def test_kd_loss_without_labels() -> None:
    student, teacher, labels = problem()
    with torch.no_grad():
        teacher[0, :3] = math.nan  # rows that do not count
    loss = nemo_automodel.KDLoss()(student, teacher, labels)
    assert loss.isfinite()
    loss = nemo_automodel.KDLoss(ignore_index=7)(student, student.detach() + 1, labels * 0 + 7)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0 and not gradient.any()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(2)
    yield pool
    pool.stop()


def sharded(group: Any, ours: bool, placed: bool) -> tuple[Tensor, Tensor]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    student, teacher, labels = problem()
    width = V // group.size()
    columns = slice(group.rank() * width, (group.rank() + 1) * width)
    leaf = student.detach()[..., columns].clone().requires_grad_()
    part, other = leaf, teacher[..., columns].contiguous()
    if placed:
        mesh = DeviceMesh.from_group(group, "cpu")
        part, other = (DTensor.from_local(x, mesh, [Shard(2)]) for x in (part, other))
    module = nemo_automodel if ours else nemo()
    # The original reshapes, which DTensors of this kind do not survive with three dimensions.
    if placed and not ours:
        part, other = (
            DTensor.from_local(x.to_local().flatten(0, 1), mesh, [Shard(1)]) for x in (part, other)
        )
    loss = module.KDLoss(temperature=2.0, tp_group=None if placed else group)(part, other, labels)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("placed", [False, True])
def test_kd_loss_of_parts_of_the_vocabulary(processes: Processes, placed: bool) -> None:
    theirs = processes.run(2, sharded, False, placed)
    for found, expected in zip(processes.run(2, sharded, True, placed), theirs, strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert a.any()


# ---- ms-swift


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("widths", [(V, V), (V, V - 6), (V - 6, V)])
def test_dense_gkd_loss(beta: float, temperature: float, widths: tuple[int, int]) -> None:
    student, teacher, labels = problem(widths=widths)
    output = ms_swift().TeacherOutput(full_logits=teacher, labels=labels)
    theirs, their_count = ms_swift().gkd_loss(student, output, labels, beta, temperature)
    ours, count = swift.gkd_loss(student, output, labels, beta, temperature)
    assert count == their_count == (labels != -100).sum()
    agree(ours, theirs, student)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_top_k_gkd_loss(beta: float, temperature: float) -> None:
    student, teacher, labels = problem()
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    logprobs[1, 2] = -math.inf  # a row that the teacher knows nothing about
    output = ms_swift().TeacherOutput(topk_logprobs=logprobs, topk_indices=ids, labels=labels)
    theirs, their_count = ms_swift().gkd_loss(student, output, labels, beta, temperature)
    ours, count = swift.gkd_loss(student, output, labels, beta, temperature)
    assert count == their_count == (labels != -100).sum() - 1
    agree(ours, theirs, student)


def test_logits_as_log_probabilities() -> None:
    """ms-swift's own conversion of dense logits leaves them unnormalized."""
    student, teacher, labels = problem()
    output = ms_swift().TeacherOutput(full_logits=teacher, labels=labels).to_topk(K)
    theirs, _ = ms_swift().gkd_loss(student, output, labels, 0.5, 1.0)
    ours, _ = swift.gkd_loss(student, output, labels, 0.5, 1.0)
    agree(ours, theirs, student)


def test_missing_tokens_are_padding() -> None:
    """The student's probability of the placeholder does not count, as it does in ms-swift."""
    student, teacher, labels = problem()
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    fewer = ms_swift().TeacherOutput(
        topk_logprobs=logprobs[..., :-1], topk_indices=ids[..., :-1], labels=labels
    )
    logprobs[..., -1], ids[..., -1] = -math.inf, 0
    output = ms_swift().TeacherOutput(topk_logprobs=logprobs, topk_indices=ids, labels=labels)
    ours, _ = swift.gkd_loss(student, output, labels, 0.0, 1.0)
    expected, _ = ms_swift().gkd_loss(student, fewer, labels, 0.0, 1.0)
    agree(ours, expected, student)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_teacher_with_another_prompt(sparse: bool) -> None:
    """The teacher's rows are elsewhere, and as many."""
    student, teacher, labels = problem()
    moved = torch.full((B, S + 2), -100)
    moved[0, 5:], moved[1, :S] = labels[0, 3:], labels[1]
    wide = torch.full((B, S + 2, V), math.nan)
    wide[0, 5:], wide[1, :S] = teacher[0, 3:], teacher[1]
    if sparse:
        logprobs, ids = wide.nan_to_num(0).log_softmax(-1).topk(K)
        output = ms_swift().TeacherOutput(topk_logprobs=logprobs, topk_indices=ids, labels=moved)
    else:
        output = ms_swift().TeacherOutput(full_logits=wide, labels=moved)
    theirs, their_count = ms_swift().gkd_loss(student, output, labels, 0.5, 1.0)
    ours, count = swift.gkd_loss(student, output, labels, 0.5, 1.0)
    assert count == their_count
    agree(ours, theirs, student)
    output.labels[0, -1] = -100
    with pytest.raises(ValueError, match=r"as many rows other than -100 as labels, 11; got 10"):
        swift.gkd_loss(student, output, labels, 0.5, 1.0)


def test_messages_of_gkd_loss() -> None:
    student, _, labels = problem()
    with pytest.raises(
        ValueError, match="must have full_logits, or topk_logprobs and topk_indices; got neither"
    ):
        swift.gkd_loss(student, ms_swift().TeacherOutput(labels=labels), labels, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"kl_div_fn must be None; pass process_group="):
        swift.gkd_loss(student, None, labels, 0.5, 1.0, kl_div_fn=ms_swift().default_kl_div)


def test_no_row_counts() -> None:
    student, teacher, labels = problem()
    output = ms_swift().TeacherOutput(full_logits=teacher, labels=labels * 0 - 100)
    loss, count = swift.gkd_loss(student, output, labels * 0 - 100, 0.5, 1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0 and count == 0 and not gradient.any()
