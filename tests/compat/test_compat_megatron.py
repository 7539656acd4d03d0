"""fastkd.compat.megatron against the formula, and compat.modelopt's losses for Megatron over two processes.

No release of megatron-core has topk_kl_div; Megatron-LM's training code does.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.beside_peers import error
from support.processes import Processes
from torch import Tensor

from fastkd.compat import megatron, modelopt

COLUMNS = 40  # of the vocabulary; each of two processes has twenty


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(2)
    yield pool
    pool.stop()


def problem(peaked: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher logits [s, b, V], and the teacher's top five tokens, one of them padding."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, 3, 2, COLUMNS, generator=generator)
    logprobs, ids = teacher.log_softmax(-1).topk(5)
    logprobs[0, 1, 4], ids[0, 1, 4] = megatron.SENTINEL, 39
    if peaked:
        student = student.scatter_add(
            -1, ids[..., :1], torch.full_like(ids[..., :1], 25.0, dtype=torch.float32)
        )
    return student, teacher, logprobs, ids


def formula(student: Tensor, logprobs: Tensor, ids: Tensor, ghost: bool) -> Tensor:
    """sum p_k (log p_k - log q_k) [b, s], optionally with the rest as one more token."""
    kept = logprobs != megatron.SENTINEL
    log_q = student.log_softmax(-1)
    p = logprobs.exp() * kept
    terms = p * (logprobs - log_q.gather(-1, ids))
    loss = terms.sum(-1)
    if ghost:
        rest = torch.ones_like(student).scatter(-1, ids.where(kept, ids[..., :1]), 0.0)
        log_rest = (log_q + rest.log()).logsumexp(-1)
        p_rest = 1 - p.sum(-1)
        loss = loss + p_rest * (p_rest.log() - log_rest)
    return loss.T


def exact(ghost: bool, peaked: bool = False) -> tuple[Tensor, Tensor]:
    student, _, logprobs, ids = problem(peaked)
    student = student.double().requires_grad_()
    loss = formula(student, logprobs.double(), ids, ghost)
    (gradient,) = torch.autograd.grad(loss, student, upstream())
    return loss.detach(), gradient


def upstream() -> Tensor:
    return torch.linspace(-2, 1, 6, dtype=torch.float64).view(2, 3)


def part_of(group: Any, *tensors: Tensor) -> tuple[list[Tensor], int, int]:
    """This process's columns of each tensor."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    width = COLUMNS // size
    return [x[..., rank * width : (rank + 1) * width] for x in tensors], size, rank


def cached(group: Any, ghost: bool, peaked: bool = False) -> tuple[Tensor, Tensor]:
    student, _, logprobs, ids = problem(peaked)
    (own_columns,), size, rank = part_of(group, student)
    own_columns = own_columns.clone().requires_grad_()
    before = own_columns.detach().clone()
    loss = megatron.topk_kl_div(own_columns, logprobs, ids, size, rank, group, ghost)
    (gradient,) = torch.autograd.grad(loss, own_columns, upstream().float())
    assert torch.equal(before, own_columns)  # Megatron's function subtracts the maximum in place
    return loss.detach(), gradient


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("ghost", [False, True])
def test_cached_top_k(processes: Processes, ghost: bool, peaked: bool) -> None:
    loss, gradient = exact(ghost, peaked)
    for actual in ([cached(None, ghost, peaked)], processes.run(2, cached, ghost, peaked)):
        losses, gradients = zip(*actual, strict=True)
        # Megatron sums the loss over processes.
        assert error(torch.stack(losses).sum(0), loss) < 1e-6
        assert error(torch.cat(gradients, -1), gradient) < 1e-6


def test_megatrons_ghost_token_of_a_nearly_certain_student() -> None:
    """Megatron computes 1 - sum q_k in float32, at least 1e-8, which loses a probability of 1e-10 and its gradient."""
    student, _, logprobs, ids = problem(peaked=True)
    kept = (logprobs != megatron.SENTINEL).float()
    inputs = student.clone().requires_grad_()
    log_q = inputs.log_softmax(-1).gather(-1, ids)
    p = logprobs.exp()
    rest = (1 - (log_q.exp() * kept).sum(-1)).clamp(min=1e-8).log()
    p_rest = (1 - p.sum(-1)).clamp(min=1e-8)
    reference = ((p * (logprobs - log_q) * kept).sum(-1) + p_rest * (p_rest.log() - rest)).T
    (gradient,) = torch.autograd.grad(reference, inputs, upstream().float())
    loss, truth = exact(True, peaked=True)
    actual, gradient_found = cached(None, True, peaked=True)
    assert error(reference.detach(), loss) > 0.01 > 1e-6 > error(actual, loss)
    assert error(gradient, truth) > 0.01 > 1e-6 > error(gradient_found, truth)


def test_without_a_group() -> None:
    student, _, logprobs, ids = problem()
    with pytest.raises(
        ValueError, match="tp_group must be the process group of the tp_size=2 processes, got None"
    ):
        megatron.topk_kl_div(student, logprobs, ids, 2, 0, None)


# ---- the losses of Model-Optimizer's plug-in over two processes


def kl(student: Tensor, teacher: Tensor, top_k: int | None, reverse: bool) -> Tensor:
    if top_k is not None:
        teacher, ids = teacher.topk(top_k)
        student = student.gather(-1, ids)
    log_q, log_p = ((x / 2).log_softmax(-1) for x in (student, teacher))
    if reverse:
        log_q, log_p = log_p, log_q
    return (log_p.exp() * (log_p - log_q)).sum(-1).T


def plug_in_loss(group: Any, top_k: int | None, reverse: bool, theirs: bool = False) -> Any:
    """(loss, gradient of this process's columns) of the plug-in's loss, or of fastkd's."""
    student, teacher, *_ = problem()
    (own_columns, teacher_columns), size, _ = part_of(group, student, teacher)
    config = SimpleNamespace(tensor_model_parallel_size=size, sequence_parallel=False)
    module: Any = modelopt
    if theirs:
        from megatron.core import parallel_state
        from modelopt.torch.distill.plugins import megatron as module

        parallel_state._TENSOR_MODEL_PARALLEL_GROUP = group
    if top_k is None:
        loss = module.LogitsKLLoss(config, 2.0, reverse)
    else:
        loss = module.TopKLogitsKLLoss(config, 2.0, reverse, top_k)
    if not theirs:
        loss._group = lambda: group  # what megatron.core knows of a training run
    own_columns = own_columns.clone().requires_grad_()
    value, *flags = loss(own_columns, teacher_columns)
    (gradient,) = torch.autograd.grad(value, own_columns, upstream().float())
    return value.detach(), gradient, flags


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("top_k", [None, 5, 30])  # 30: more than a process has columns
def test_plug_in(processes: Processes, top_k: int | None, reverse: bool) -> None:
    student, teacher, *_ = problem()
    inputs = student.double().requires_grad_()
    loss = kl(inputs, teacher.double(), top_k, reverse)
    (truth,) = torch.autograd.grad(loss, inputs, upstream())
    actual = processes.run(2, plug_in_loss, top_k, reverse)
    for value, _, flags in actual:  # each process has the whole loss, so no reduction is needed
        assert error(value, loss.detach()) < 1e-6
        assert flags == [False, False]
    assert torch.equal(actual[0][0], actual[1][0])
    assert error(torch.cat([gradient for _, gradient, _ in actual], -1), truth) < 1e-6


@pytest.mark.heavy  # each process imports Model-Optimizer
def test_plug_in_against_model_optimizer(processes: Processes) -> None:
    for top_k in (None, 5):
        actual, reference = (processes.run(2, plug_in_loss, top_k, False, x) for x in (False, True))
        whole = sum(x[0] for x in reference) if top_k is None else reference[0][0]
        assert error(whole, actual[0][0].double()) < 1e-5
        times = 1 if top_k is None else 2  # every process differentiates the whole loss
        for (_, gradient, _), (_, original_gradient, _) in zip(actual, reference, strict=True):
            assert error(original_gradient, times * gradient.double()) < 1e-5
