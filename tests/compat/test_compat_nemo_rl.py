"""fastkd.compat.nemo_rl against NeMo-RL's formulas in float64. NeMo-RL is not on PyPI."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.processes import Processes
from torch import Tensor

from fastkd.compat import nemo_rl

B, S, V, K = 2, 9, 40, 5
KINDS = ("forward", "reverse", "mixed")
DATA = Path(__file__).parents[1] / "support" / "data"


def config(kl_type: str, zero_outside_topk: bool, weight: float = 0.3) -> Any:
    return SimpleNamespace(
        kl_type=kl_type, mixed_kl_weight=weight, zero_outside_topk=zero_outside_topk
    )


def problem(
    dtype: torch.dtype = torch.float32, real: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """(student logits, a leaf; the data of a batch)"""
    generator = torch.Generator().manual_seed(0)
    if real:  # of a language model
        with np.load(DATA / "smollm2.npz") as file:
            student, teacher = (
                torch.from_numpy(file[side])[:8].float().unflatten(0, (2, 4))
                for side in ("student", "teacher")
            )
    else:
        student, teacher = (3 * torch.randn(B, S, V, generator=generator) for _ in range(2))
    scores, ids = teacher.topk(K)
    length = student.shape[1]
    mask = torch.ones(B, length)
    mask[0, :2] = 0.0
    data = {
        "input_ids": ids[..., 0],
        "teacher_topk_logits": scores.to(dtype),
        "teacher_topk_indices": ids,
        "token_mask": mask,
        "sample_mask": torch.tensor([1.0, 0.5]),
    }
    return student.to(dtype).requires_grad_(), data


def exact(
    logits: Tensor, data: dict[str, Any], cfg: Any, valid: Tensor | None, masked: bool = True
) -> Tensor:
    """NeMo-RL's loss. Position i predicts token i + 1."""
    ids = data["teacher_topk_indices"][:, :-1]
    log_p = data["teacher_topk_logits"][:, :-1].double().log_softmax(-1)
    z = logits[:, :-1].double()
    whole = z.log_softmax(-1)
    log_q = whole.gather(-1, ids) if cfg.zero_outside_topk else z.gather(-1, ids).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    w = {"forward": 1.0, "reverse": 0.0, "mixed": cfg.mixed_kl_weight}[cfg.kl_type]
    loss = w * (p * (log_p - log_q)).sum(-1) + (1 - w) * (q * (log_q - log_p)).sum(-1)
    if cfg.zero_outside_topk:
        outside = torch.ones_like(whole).scatter(-1, ids, 0.0)
        loss = loss + (1 - w) * (outside * whole.exp() * (whole + 100.0)).sum(-1)
    if not masked:
        return loss.mean()
    mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
    return (loss * mask).sum() / (mask.sum() if valid is None else valid)


def agree(ours: Tensor, expected: Tensor, leaf: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=1e-6)
    found, wanted = (torch.autograd.grad(loss, leaf)[0].float() for loss in (ours, expected))
    assert wanted.any()
    size = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=10 * tolerance, atol=tolerance * size)


@pytest.mark.parametrize("kl_type", KINDS)
@pytest.mark.parametrize("zero_outside_topk", [False, True])
@pytest.mark.parametrize("valid", [None, torch.tensor(23.0)])
@pytest.mark.parametrize("real", [False, True])
def test_the_loss(kl_type: str, zero_outside_topk: bool, valid: Tensor | None, real: bool) -> None:
    logits, data = problem(real=real)
    cfg = config(kl_type, zero_outside_topk)
    loss, metrics = nemo_rl.DistillationLossFn(cfg)(logits, data, torch.tensor(2.0), valid)
    assert metrics == {"loss": loss.item(), "num_valid_samples": B} and loss.dtype == torch.float32
    agree(loss, exact(logits, data, cfg, valid), logits)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("zero_outside_topk", [False, True])
def test_weights_at_the_ends(weight: float, zero_outside_topk: bool) -> None:
    logits, data = problem()
    cfg = config("mixed", zero_outside_topk, weight)
    loss, _ = nemo_rl.DistillationLossFn(cfg)(logits, data, None, None)
    agree(loss, exact(logits, data, cfg, None), logits)


@pytest.mark.parametrize("kl_type", KINDS)
@pytest.mark.parametrize("zero_outside_topk", [False, True])
def test_bfloat16(kl_type: str, zero_outside_topk: bool) -> None:
    logits, data = problem(torch.bfloat16)
    cfg = config(kl_type, zero_outside_topk)
    loss, _ = nemo_rl.DistillationLossFn(cfg)(logits, data, None, None)
    expected = exact(logits, data, cfg, None)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6)
    found, wanted = (torch.autograd.grad(x, logits)[0].float() for x in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max()))


def test_without_masks_all_tokens_count() -> None:
    logits, data = problem()
    del data["token_mask"], data["sample_mask"]
    cfg = config("forward", False)
    loss, _ = nemo_rl.DistillationLossFn(cfg)(logits, data, None, None)
    agree(loss, exact(logits, data, cfg, None, masked=False), logits)


@pytest.mark.parametrize("zero_outside_topk", [False, True])
def test_rows_that_do_not_count(zero_outside_topk: bool) -> None:
    """The last position and the prompt may hold anything, and logits may have padding after the teacher's rows."""
    logits, data = problem()
    cfg = config("mixed", zero_outside_topk)
    loss, _ = nemo_rl.DistillationLossFn(cfg)(logits, data, None, None)
    garbage = logits.detach().clone()
    garbage[:, -1] = garbage[0, 0] = torch.nan
    garbage = torch.cat([garbage, torch.full((B, 3, V), torch.nan)], 1).requires_grad_()
    data["teacher_topk_logits"][:, -1] = torch.nan
    found, _ = nemo_rl.DistillationLossFn(cfg)(garbage, data, None, None)
    assert torch.equal(found, loss)
    assert torch.autograd.grad(found, garbage)[0].isfinite().all()


EVERY = [(kl_type, zero) for kl_type in KINDS for zero in (False, True)]


def sharded(group: Any, how: str) -> list[tuple[Tensor, Tensor]]:
    """(loss, gradient of this process's columns) of every kind."""
    logits, data = problem()
    width = -(-V // group.size())
    leaf = logits.detach().split(width, -1)[group.rank()].clone().requires_grad_()
    part: Any = leaf
    if how == "DTensor":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        part = DTensor.from_local(leaf, DeviceMesh.from_group(group, "cpu"), [Shard(2)])
    else:
        sys.modules["megatron.core.parallel_state"] = megatron(group)
    results = []
    for kind in EVERY:
        loss, _ = nemo_rl.DistillationLossFn(config(*kind))(part, data, None, None)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    sys.modules.pop("megatron.core.parallel_state", None)
    return results


def megatron(group: Any, context: int = 1, initialized: bool = True) -> ModuleType:
    """A stand-in for the state that Megatron's worker has."""
    state: Any = ModuleType("megatron.core.parallel_state")
    state.model_parallel_is_initialized = lambda: initialized
    state.get_context_parallel_world_size = lambda: context
    state.get_tensor_model_parallel_world_size = lambda: 1 if group is None else group.size()
    state.get_tensor_model_parallel_group = lambda: group
    return state


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(2)
    yield pool
    pool.stop()


@pytest.mark.parametrize("how", ["DTensor", "Megatron"])
def test_parts_of_the_vocabulary(processes: Processes, how: str) -> None:
    logits, data = problem()
    results = processes.run(2, sharded, how)
    for index, kind in enumerate(EVERY):
        expected = exact(logits, data, config(*kind), None)
        (gradient,) = torch.autograd.grad(expected, logits)
        size = float(gradient.abs().max())
        for of_process, columns in zip(results, gradient.split(V // 2, -1), strict=True):
            loss, part = of_process[index]
            torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(part, columns, rtol=2e-5, atol=1e-6 * size)


def test_megatron_alone_and_with_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, data = problem()
    loss_function = nemo_rl.DistillationLossFn(config("forward", False))
    expected, _ = loss_function(logits, data, None, None)
    for state in (megatron(None), megatron(None, 2, initialized=False)):
        monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
        assert torch.equal(loss_function(logits, data, None, None)[0], expected)
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", megatron(None, 2))
    with pytest.raises(ValueError, match="logits must hold whole sequences; context parallelism"):
        loss_function(logits, data, None, None)


def test_what_nemo_rl_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo-RL passes logits to a loss whose input_type is LOGIT."""
    interfaces: Any = ModuleType("nemo_rl.algorithms.loss.interfaces")
    interfaces.LossType = SimpleNamespace(TOKEN_LEVEL="token level")
    interfaces.LossInputType = SimpleNamespace(LOGIT="logit")
    for name in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interfaces.__name__, interfaces)
    loss_function = nemo_rl.DistillationLossFn(config("mixed", True))
    assert (loss_function.loss_type, loss_function.input_type) == ("token level", "logit")
    assert loss_function.kl_type == "mixed" and loss_function.zero_outside_topk
    assert loss_function.mixed_kl_weight == 0.3


def test_messages_of_nemo_rl() -> None:
    with pytest.raises(ValueError, match="kl_type must be one of forward, reverse, mixed"):
        nemo_rl.DistillationLossFn(config("jsd", False))
    with pytest.raises(ValueError, match=r"mixed_kl_weight must be in \[0, 1\]"):
        nemo_rl.DistillationLossFn(config("mixed", False, 1.5))
    logits, data = problem()
    for name in ("teacher_topk_logits", "teacher_topk_indices"):
        data[name] = data[name][..., :0]
    with pytest.raises(ValueError, match="topk must be positive"):
        nemo_rl.DistillationLossFn(config("forward", False))(logits, data, None, None)
