"""KDTrainer and QADTrainer of fastkd.compat.modelopt against Model-Optimizer's, with fake-quantized students."""

from __future__ import annotations

import copy
import functools
import importlib
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny_models
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what else it could use
    import modelopt.torch.quantization as mtq

from transformers import TrainingArguments

from fastkd.compat import modelopt

pytestmark = pytest.mark.filterwarnings("ignore")  # of the stacks
V, B, S = 61, 2, 12


def their(name: str) -> Any:
    return getattr(importlib.import_module(modelopt._TRAINERS[name]), name)


@functools.cache
def students() -> dict[bool, Any]:
    """A student as it is (False), and one with fake-quantized weights and activations (True)."""
    student = tiny_models.llama(seed=0)
    quantized = copy.deepcopy(student)
    ids = batch()["input_ids"]
    mtq.quantize(quantized, mtq.INT8_DEFAULT_CFG, lambda model: model(ids))
    return {False: student, True: quantized}


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, V, (B, S), generator=generator)
    labels = ids.clone()
    labels[0, :4] = labels[1, :1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def trainer(kind: Any, folder: Path, temperature: float = 2.0, quantized: bool = False) -> Any:
    args = TrainingArguments(
        output_dir=str(folder), learning_rate=1e-2, max_steps=3, per_device_train_batch_size=1, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = batch()
    data = [{name: value[row % B] for name, value in rows.items()} for row in range(4)]
    return kind(
        model=copy.deepcopy(students()[quantized]),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        distill_args={
            "teacher_model": tiny_models.llama(seed=1, width=32),
            "temperature": temperature,
        },
    )


def pair(name: str, folder: Path, *args: Any) -> tuple[Any, Any]:
    """(fastkd's trainer, Model-Optimizer's)"""
    kinds = getattr(modelopt, name), their(name)
    assert issubclass(*kinds) and kinds[0].__name__ == name and kinds[0] is getattr(modelopt, name)
    return tuple(trainer(kind, folder / str(i), *args) for i, kind in enumerate(kinds))  # type: ignore[return-value]


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained))


def agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for found, expected in zip(ours, theirs, strict=True):
        assert expected.any()
        size = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("name", ["KDTrainer", "QADTrainer"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_step(name: str, temperature: float, labelled: bool, tmp_path: Path) -> None:
    outcomes = []
    for each in pair(name, tmp_path, temperature, name == "QADTrainer"):
        inputs = batch()
        if not labelled:
            del inputs["labels"]
        each.model.train()
        loss = each.compute_loss(each.model, inputs)
        outcomes.append([loss, *gradients(each.model, loss)])
        assert each._last_teacher_outputs is None
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-5, atol=0)
    agree(outcomes[0][1:], outcomes[1][1:])


def test_training_with_quantization(tmp_path: Path) -> None:
    curves, metrics, weights = [], [], []
    for each in pair("QADTrainer", tmp_path, 2.0, True):
        each.train()
        curves.append(
            torch.tensor([log["loss"] for log in each.state.log_history if "loss" in log])
        )
        found = each.evaluate()
        metrics.append(torch.tensor([found["eval_loss"], found["eval_ce_loss"]]))
        layer = each.model.model.layers[0].mlp.up_proj
        assert layer.weight_quantizer.is_enabled
        weights.append(layer.weight.detach())
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=0)  # logged with four digits
    torch.testing.assert_close(metrics[0], metrics[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
    assert not torch.equal(weights[0], students()[True].model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_from_hidden_states(beta: float, tmp_path: Path) -> None:
    """Model-Optimizer's own loss from hidden states is Liger's, which needs a GPU; its formula is in float64."""
    ours = trainer(modelopt.KDTrainer, tmp_path)
    ours.use_liger_kernel, ours._liger_temperature, ours._liger_jsd_beta = True, 2.0, beta
    ours.model.train()
    inputs = batch()
    loss = ours.compute_loss(ours.model, inputs)
    del inputs["labels"]
    q, p = (
        (model(**inputs).logits[:, :-1].double() / 2.0).log_softmax(-1)
        for model in (ours.model, ours._teacher_model)
    )
    m = q if beta == 0 else p if beta == 1 else torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))  # fmt: skip

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    rows = {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
    exact = rows[batch()["labels"][:, 1:] != -100].mean()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    agree(gradients(ours.model, loss), gradients(ours.model, exact))


@pytest.mark.parametrize("side", ["weight", "input"])
def test_a_quantized_head(side: str, tmp_path: Path) -> None:
    """The loss from hidden states reads the head's weight, not the quantized one."""
    ours = trainer(modelopt.QADTrainer, tmp_path, 1.0, True)
    ours.use_liger_kernel, ours._liger_temperature, ours._liger_jsd_beta = True, 1.0, 0.0
    getattr(ours.model.lm_head, f"{side}_quantizer").enable()
    ours.model.train()
    with pytest.raises(ValueError, match=f"use_liger_kernel must be False .* student .*{side}_q"):
        ours.compute_loss(ours.model, batch())


def test_other_vocabularies(tmp_path: Path) -> None:
    ours = trainer(modelopt.KDTrainer, tmp_path)
    ours._last_teacher_outputs = SimpleNamespace(logits=torch.zeros(B, S, V + 3))
    with pytest.raises(
        ValueError, match=r"teacher_outputs\.logits must have the shape .* tokenizer"
    ):
        ours._standard_kd_loss(SimpleNamespace(logits=torch.zeros(B, S, V)), None)


def test_no_such_trainer() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'QATTrainer'"):
        modelopt.QATTrainer  # noqa: B018
