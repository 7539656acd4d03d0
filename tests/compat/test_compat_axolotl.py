"""fastkd.compat.axolotl against the original file."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
import torch
from support.originals import stand_ins
from torch import Tensor

from fastkd.compat import axolotl

B, S, V, H, K = 2, 11, 47, 12, 5
KD = "axolotl.integrations.kd"


@pytest.fixture(scope="module")
def original() -> Any:
    with stand_ins("axolotl", "axolotl.integrations", KD, f"{KD}.kernels"):
        return importlib.import_module(f"{KD}.kernels.liger").LigerFusedLinearKLTopKLogprobLoss


def problem(normalized: bool = True, bias: bool = False) -> dict[str, Any]:
    """The arguments of the losses. Prompts have no teacher and no label, the last position has a teacher only."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, S, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    teacher = (3 * torch.randn(B, S, V, generator=generator)).log_softmax(-1)
    logprobs, ids = teacher.topk(K)
    if normalized:
        logprobs = logprobs.log_softmax(-1)
    mask = torch.ones(B, S, K, dtype=torch.int)
    labels = torch.randint(V, (B, S), generator=generator)
    labels[0, :4] = labels[1, :2] = -100
    mask[0, :3] = mask[1, :1] = 0
    mask[1, 5] = 0  # a position with a label, about which the teacher says nothing
    logprobs, ids = logprobs.masked_fill(mask == 0, -1e9), ids.masked_fill(mask == 0, 0)
    return {
        "lm_head_weight": weight.requires_grad_(),
        "student_hidden_states": hidden.requires_grad_(),
        "target_token_ids": ids,
        "target_logprobs": logprobs,
        "target_mask": mask,
        "true_labels": labels,
        "student_bias": torch.randn(V, generator=generator).requires_grad_() if bias else None,
    }


def gradients(loss: Tensor, given: dict[str, Any]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves(given)))


def leaves(given: dict[str, Any]) -> list[Tensor]:
    return [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]


def agree(ours: Tensor, theirs: Tensor, given: dict[str, Any]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for found, expected in zip(gradients(ours, given), gradients(theirs, given), strict=True):
        assert expected.any()
        size = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.4, 0.7)])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_at_temperature_1(
    original: Any, beta: float, weights: tuple[float, float], normalized: bool, bias: bool
) -> None:
    given = problem(normalized, bias)
    options = {"beta": beta, "normalize_topk": normalized, "chunk_size": 7}
    theirs = original(*weights, compiled=False, **options)(**given)
    ours = axolotl.LigerFusedLinearKLTopKLogprobLoss(*weights, **options)(**given)
    agree(ours, theirs, given)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("temperature", [2.0, 0.7])
def test_at_other_temperatures(original: Any, beta: float, temperature: float) -> None:
    """Axolotl's gradient of the divergence has no T^2, although its value has it."""
    given = problem()
    for weights in ((0.0, 0.3), (0.4, 0.3)):
        theirs = original(*weights, temperature, beta, compiled=False)(**given)
        ours = axolotl.LigerFusedLinearKLTopKLogprobLoss(*weights, temperature, beta)(**given)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        smaller = axolotl.LigerFusedLinearKLTopKLogprobLoss(
            weights[0], weights[1] / temperature**2, temperature, beta
        )(**given)
        for found, expected in zip(
            gradients(smaller, given), gradients(theirs, given), strict=True
        ):
            size = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * size)


def exact(given: dict[str, Any], hard: float, soft: float, t: float) -> Tensor:
    """The loss of beta = 0, renormalized, in float64, row by row."""
    total = torch.zeros((), dtype=torch.float64)
    logits = given["student_hidden_states"].double() @ given["lm_head_weight"].double().T
    for b in range(B):
        for s in range(S):
            listed = given["target_mask"][b, s].bool()
            if listed.any():
                log_p = given["target_logprobs"][b, s][listed].double().log_softmax(-1)
                log_q = (logits[b, s][given["target_token_ids"][b, s][listed]] / t).log_softmax(-1)
                total = total + soft * t**2 * (log_p.exp() * (log_p - log_q)).sum()
            if s + 1 < S and (label := int(given["true_labels"][b, s + 1])) != -100:
                total = total - hard * logits[b, s].log_softmax(-1)[label]
    return total


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.4, 0.7), (0.5, 0.0)])
@pytest.mark.parametrize("partly", [False, True])
def test_the_gradient_is_that_of_the_loss(weights: tuple[float, float], partly: bool) -> None:
    given = problem()
    if partly:  # fewer tokens than K: the student's probability of the placeholder does not count
        given["target_mask"][0, 5:, -2:] = 0
    ours = axolotl.LigerFusedLinearKLTopKLogprobLoss(*weights, 2.0, 0.0)(**given)
    agree(ours, exact(given, *weights, 2.0).float(), given)


def test_without_cross_entropy() -> None:
    given = problem()
    make = axolotl.LigerFusedLinearKLTopKLogprobLoss
    without = make(0.4, 0.7, compute_ce_loss=False)(**given)
    torch.testing.assert_close(without, make(0.0, 0.7)(**given))


def test_without_divergence_the_teacher_is_not_read() -> None:
    given = problem()
    loss = axolotl.LigerFusedLinearKLTopKLogprobLoss(0.5, 0.0)(**given)
    given["target_token_ids"] = given["target_token_ids"] * 0
    given["target_logprobs"] = given["target_logprobs"] * torch.nan
    again = axolotl.LigerFusedLinearKLTopKLogprobLoss(0.5, 0.0)(**given)
    assert torch.equal(again, loss)
    for found, expected in zip(gradients(again, given), gradients(loss, given), strict=True):
        assert torch.equal(found, expected)


def test_no_row_counts() -> None:
    given = problem()
    given["target_mask"] = given["target_mask"] * 0
    given["true_labels"] = given["true_labels"] * 0 - 100
    loss = axolotl.LigerFusedLinearKLTopKLogprobLoss()(**given)
    assert loss == 0 and not any(g.any() for g in gradients(loss, given))


def test_messages_of_axolotl() -> None:
    make = axolotl.LigerFusedLinearKLTopKLogprobLoss
    with pytest.raises(ValueError, match=r"weight_soft_loss must be in \[0, 1\]"):
        make(0.5, 1.5)
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"):
        make(beta=-0.1)
    given = problem()
    with pytest.raises(ValueError, match="lm_head_weight must be"):
        make()(**given | {"lm_head_weight": given["lm_head_weight"][:, 1:]})


def test_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """KDPlugin changes the trainer's loss; the trainer itself needs more packages than the tests install."""
    trainer = types.ModuleType(f"{KD}.trainer")
    trainer.LigerFusedLinearKLTopKLogprobLoss = object  # type: ignore[attr-defined]

    class KDPlugin:
        def get_trainer_cls(self, cfg: Any) -> Any:
            return "trainer" if cfg.kd_trainer else None

    package = types.ModuleType(KD)
    package.KDPlugin = KDPlugin  # type: ignore[attr-defined]
    for name, module in ((KD, package), (f"{KD}.trainer", trainer)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(vars(axolotl), "KDPlugin", raising=False)
    plugin = axolotl.KDPlugin()
    assert isinstance(plugin, KDPlugin)
    assert plugin.get_trainer_cls(types.SimpleNamespace(kd_trainer=False)) is None
    assert trainer.LigerFusedLinearKLTopKLogprobLoss is object
    assert plugin.get_trainer_cls(types.SimpleNamespace(kd_trainer=True)) == "trainer"
    ours = axolotl.LigerFusedLinearKLTopKLogprobLoss
    assert trainer.LigerFusedLinearKLTopKLogprobLoss is ours
    monkeypatch.delitem(vars(axolotl), "KDPlugin")
    with pytest.raises(AttributeError, match="has no attribute 'Plugin'"):
        axolotl.Plugin  # noqa: B018
