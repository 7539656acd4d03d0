"""fastkd.compat.skyrl and fastkd.compat.specforge against the originals."""

from __future__ import annotations

import importlib
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.originals import stand_ins
from support.processes import Processes
from torch import Tensor

from fastkd.compat import skyrl, specforge

B, S, V, K = 2, 9, 48, 5
DATA = Path(__file__).parents[1] / "support" / "data"

MTP = "skyrl.backends.skyrl_train.mtp"


def their_skyrl() -> Any:
    with stand_ins(
        "skyrl", "skyrl.backends", "skyrl.backends.skyrl_train", MTP, "skyrl.backends.skyrl_train.utils",
        jaxtyping=dict.fromkeys(("Float", "Integer"), typing.Annotated),
    ):  # fmt: skip
        return importlib.import_module(f"{MTP}.soft_ce")


@pytest.fixture(scope="module", name="theirs")
def _theirs() -> Any:
    return their_skyrl()


def problem(dtype: torch.dtype = torch.float32, real: bool = False) -> tuple[Tensor, ...]:
    """(student logits, a leaf; teacher logits; mask)"""
    generator = torch.Generator().manual_seed(0)
    if real:  # of a language model
        with np.load(DATA / "smollm2.npz") as file:
            student, teacher = (
                torch.from_numpy(file[side]).float().unflatten(0, (B, 4))
                for side in ("student", "teacher")
            )
    else:
        student, teacher = (3 * torch.randn(B, S, V, generator=generator) for _ in range(2))
    student, teacher = student.to(dtype), teacher.to(dtype)
    mask = torch.ones(student.shape[:-1])
    mask[0, 3] = mask[1, 2:4] = 0.0
    return student.requires_grad_(), teacher, mask


def agree(ours: Tensor, theirs: Tensor, leaf: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=1e-6)
    found, expected = (torch.autograd.grad(loss, leaf)[0].float() for loss in (ours, theirs))
    assert expected.any()
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * size)


# ---- SkyRL


@pytest.mark.parametrize("divisor", [None, torch.tensor(31.0), torch.tensor(0.0)])
@pytest.mark.parametrize(("dtype", "real"), [
    (torch.float32, False), (torch.float32, True), (torch.bfloat16, False),
])  # fmt: skip
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_draft_soft_ce(
    theirs: Any, dtype: torch.dtype, real: bool, divisor: Tensor | None, chunk_size: int | None
) -> None:
    student, teacher, mask = problem(dtype, real)
    outcomes = (
        module.draft_soft_ce(student, teacher, mask, divisor, chunk_size=chunk_size)
        for module in (skyrl, theirs)
    )
    agree(*outcomes, student, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("k", [1, K, V + 9])
@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize(("divisor", "real"), [(None, True), (torch.tensor(31.0), False)])
def test_draft_soft_ce_topk(
    theirs: Any, k: int, shift: int, divisor: Tensor | None, real: bool
) -> None:
    student, teacher, mask = problem(real=real)
    mask = theirs.shift_mask_for_mtp(mask, max(shift - 1, 0))
    ours, expected = (
        module.draft_soft_ce_topk(student, teacher, mask, k, divisor, roll_shift=shift)
        for module in (skyrl, theirs)
    )
    if k == 1:  # one token has all the mass: no loss and no gradient
        assert ours == expected == 0.0
        assert not torch.autograd.grad(ours, student)[0].any()
    else:
        agree(ours, expected, student)


@pytest.mark.parametrize("function", ["draft_soft_ce", "draft_soft_ce_topk"])
def test_a_mask_of_weights_and_an_empty_one(theirs: Any, function: str) -> None:
    student, teacher, mask = problem()
    options = {"k": K} if function == "draft_soft_ce_topk" else {}
    weights = mask * torch.linspace(0.25, 2.0, S)
    agree(
        *(getattr(module, function)(student, teacher, weights, **options) for module in (skyrl, theirs)),
        student,
    )  # fmt: skip
    loss = getattr(skyrl, function)(student, teacher * torch.nan, mask * 0, **options)
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()


def sharded(group: Any, ours: bool, k: int | None) -> tuple[Tensor, Tensor]:
    student, teacher, mask = problem()
    width = V // group.size()
    columns = slice(group.rank() * width, (group.rank() + 1) * width)
    leaf = student.detach()[..., columns].clone().requires_grad_()
    module = skyrl if ours else their_skyrl()
    options = {"vocab_parallel_group": group}
    if k is None:
        loss = module.draft_soft_ce(leaf, teacher[..., columns], mask, **options)
    else:
        loss = module.draft_soft_ce_topk(
            leaf, teacher[..., columns], mask, k, roll_shift=1, **options
        )
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(2)
    yield pool
    pool.stop()


@pytest.mark.parametrize("k", [None, K])
def test_over_processes(processes: Processes, k: int | None) -> None:
    theirs = processes.run(2, sharded, False, k)
    for found, expected in zip(processes.run(2, sharded, True, k), theirs, strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert a.any()


@pytest.mark.parametrize("function", ["draft_soft_ce", "draft_soft_ce_topk"])
def test_a_teacher_that_requires_grad(function: str) -> None:
    student, teacher, mask = problem()
    options = {"k": K} if function == "draft_soft_ce_topk" else {}
    with pytest.raises(ValueError, match="teacher_logits must be detached: .* requires grad"):
        getattr(skyrl, function)(student, teacher.requires_grad_(), mask, **options)


def test_register_in_skyrl(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_ins(
        "skyrl", "skyrl.backends", "skyrl.backends.skyrl_train", MTP, "skyrl.backends.skyrl_train.utils",
        jaxtyping=dict.fromkeys(("Float", "Integer"), typing.Annotated),
    ):  # fmt: skip
        original = importlib.import_module(f"{MTP}.soft_ce")
        worker: Any = type(sys)("skyrl.worker")
        worker.draft_soft_ce = original.draft_soft_ce
        sys.modules["skyrl.worker"] = worker
        skyrl.register()
        assert worker.draft_soft_ce is original.draft_soft_ce is skyrl.draft_soft_ce
        assert original.draft_soft_ce_topk is skyrl.draft_soft_ce_topk


# ---- SpecForge


@pytest.fixture(scope="module")
def lk_loss() -> Any:
    with stand_ins("specforge", "specforge.core"):
        return importlib.import_module("specforge.core.lk_loss")


def draft_problem(
    dtype: torch.dtype = torch.float32, real: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(draft logits, a leaf; p of the draft vocabulary, renormalized; p as it is; position mask)"""
    logits, target, mask = problem(dtype, real)
    other = torch.randn(*mask.shape, 9, generator=torch.Generator().manual_seed(1))
    whole = torch.cat([target.float(), other + (10 if real else 0)], -1).softmax(-1)
    listed = whole[..., : target.shape[-1]]
    return logits, listed / listed.sum(-1, keepdim=True), listed, mask.unsqueeze(-1)


@pytest.mark.parametrize(("dtype", "real", "scale"), [
    (torch.float32, False, 1), (torch.float32, True, 1), (torch.bfloat16, False, 1), (torch.float32, False, 0.3),
])  # fmt: skip
def test_log_softmax_loss(dtype: torch.dtype, real: bool, scale: float) -> None:
    """SpecForge's class runs on GPUs only; its file also has the formula, which is compiled."""
    with stand_ins("specforge", "specforge.core"), torch.compiler.set_stance("force_eager"):
        formula = importlib.import_module("specforge.core.loss")._compute_loss
        logits, target, _, mask = draft_problem(dtype, real)
        target = scale * target
        target[1, 1] = 0.0
        expected = formula(logits, target, mask)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    before = logits.detach().clone()
    ours = specforge.LogSoftmaxLoss.apply(logits, target, mask)
    agree(ours, expected, logits, tolerance)
    assert torch.equal(logits.detach(), before)
    assert torch.equal(ours, specforge.LogSoftmaxLoss.apply(logits, target, mask.bool()))


def test_log_softmax_loss_of_probabilities_that_are_0() -> None:
    logits, target, _, mask = draft_problem()
    target = torch.where(target < target.amax(-1, keepdim=True), 0.0, 1.0)
    loss = specforge.LogSoftmaxLoss.apply(logits, target, mask)
    rows = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), target.argmax(-1).flatten(), reduction="none"
    )
    agree(loss, (rows * mask.flatten()).mean(), logits)


def doubled(*, local_correct: Tensor, local_denom: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * local_correct, 3 * local_denom


@pytest.mark.parametrize("reduce_fn", [None, doubled])
@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("renormalized", "real"), [(False, False), (True, False), (False, True)])
def test_acceptance(
    lk_loss: Any, reduce_fn: Any, boolean: bool, which: int, renormalized: bool, real: bool
) -> None:
    logits, target, target_on_draft, mask = draft_problem(real=real)
    given = {
        "logits": logits,
        "target_probs": target if renormalized else target_on_draft,
        "position_mask": mask.bool() if boolean else mask,
        "reduce_fn": reduce_fn,
    }
    ours, theirs = (
        module.compute_acceptance_rate(**given)[which] for module in (specforge, lk_loss)
    )
    agree(ours, theirs, logits)


@pytest.mark.parametrize("kind", ["alpha", "lambda"])
def test_lk_loss(lk_loss: Any, kind: str) -> None:
    """The loss of EAGLE-3 in SpecForge."""
    logits, target, target_on_draft, mask = draft_problem()
    losses = []
    for module in (specforge, lk_loss):
        acceptance, log_acceptance = module.compute_acceptance_rate(
            logits=logits, target_probs=target_on_draft, position_mask=mask
        )
        ours = module is specforge
        kl = (
            specforge.LogSoftmaxLoss.apply(logits, target, mask)
            if ours
            else -(mask * target * logits.log_softmax(-1)).sum(-1).mean()
        )
        losses.append(
            lk_loss.compute_lk_loss(
                kl_loss=kl,
                acceptance_rate=acceptance,
                log_acceptance_rate=log_acceptance,
                lk_loss_type=kind,
                kl_scale=1.0,
                kl_decay=3.0,
            )
        )
    agree(*losses, logits)


def test_acceptance_of_positions_that_do_not_count() -> None:
    logits, _, target, mask = draft_problem()
    garbage = torch.where(mask == 0, torch.nan, logits.detach()).requires_grad_()
    padded = torch.where(mask == 0, 0.0, target)
    expected = specforge.compute_acceptance_rate(
        logits=logits, target_probs=target, position_mask=mask
    )
    found = specforge.compute_acceptance_rate(
        logits=garbage, target_probs=padded, position_mask=mask
    )
    torch.testing.assert_close(found, expected)
    nothing = specforge.compute_acceptance_rate(
        logits=logits, target_probs=target, position_mask=mask * 0
    )
    assert nothing == (0.0, 0.0)


def test_messages_of_specforge() -> None:
    logits, target, _, mask = draft_problem()
    with pytest.raises(
        ValueError, match=r"target_probs must have the shape of logits, .* 48\); got"
    ):
        specforge.compute_acceptance_rate(
            logits=logits, target_probs=target[..., 1:], position_mask=mask
        )
    with pytest.raises(ValueError, match="position_mask must have one value a row"):
        specforge.LogSoftmaxLoss.apply(logits, target, mask[:1])


def test_register_in_specforge() -> None:
    with stand_ins("specforge", "specforge.core"):
        loss = importlib.import_module("specforge.core.loss")
        lk = importlib.import_module("specforge.core.lk_loss")
        model: Any = type(sys)("specforge.model")
        model.LogSoftmaxLoss, model.compute_acceptance_rate = (
            loss.LogSoftmaxLoss,
            lk.compute_acceptance_rate,
        )
        sys.modules["specforge.model"] = model
        specforge.register()
        assert model.LogSoftmaxLoss is loss.LogSoftmaxLoss is specforge.LogSoftmaxLoss
        assert model.compute_acceptance_rate is specforge.compute_acceptance_rate
