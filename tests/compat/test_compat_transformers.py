"""fastkd.compat.transformers in the real Trainer, on real models with random weights."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import tiny_models
from support.paths import ROOT
from torch import Tensor, nn
from torch.nn import functional as F

import fastkd
from fastkd.compat.transformers import DistillationMixin, compute_loss_func

Batch = dict[str, Tensor]


@pytest.fixture
def student() -> nn.Module:
    return tiny_models.llama(seed=1)


@pytest.fixture
def teacher() -> nn.Module:
    """A wider model with dropout, which eval mode turns off."""
    return tiny_models.llama(width=24, seed=2, attention_dropout=0.5).train()


def sentences(count: int = 8, length: int = 7, labelled: bool = True) -> list[Batch]:
    """Sentences padded on the right to one length; one of them has no counted label."""
    generator = torch.Generator().manual_seed(3)
    results = []
    for i in range(count):
        ids = torch.randint(3, 61, (length,), generator=generator)
        real = torch.arange(length) < length - i % 4
        example = {"input_ids": ids.where(real, 0), "attention_mask": real.long()}
        if labelled:
            prompt = torch.arange(length) < i % 3
            example["labels"] = ids.where(real & ~prompt & torch.tensor(i != 5), -100)
        results.append(example)
    return results


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Any]:
    def made(**options: Any) -> Any:
        inputs = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "remove_unused_columns": False,
            "num_train_epochs": 1,
            "seed": 5,
        }
        return transformers.TrainingArguments(**(inputs | options))

    return made


def plain_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    num_items: int | Tensor,
    alpha: float = 0.7,
    temperature: float = 2.0,
    smoothing: float = 0.0,
) -> Tensor:
    """Forward KL with T^2, and cross-entropy, in plain PyTorch."""
    rows = labels[:, 1:] != -100
    s, t = student_logits[:, :-1][rows], teacher_logits[:, :-1][rows]
    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (s, t))
    kd = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2
    targets = labels[:, 1:][rows]
    ce = F.cross_entropy(s, targets, reduction="sum", label_smoothing=smoothing)
    return (alpha * kd + (1 - alpha) * ce) / num_items


LOSS = {"alpha": 0.7, "temperature": 2.0}


class PlainTrainer(transformers.Trainer):
    """The Trainer subclass that a user writes by hand."""

    def __init__(self, *args: Any, teacher_model: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher_model = teacher_model.eval()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        features = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**features)
        with torch.no_grad():
            teacher = self.teacher_model(**features)
        loss = plain_loss(outputs.logits, teacher.logits, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def kd_trainer(*args: Any, **kwargs: Any) -> Any:
    from fastkd.compat.transformers import KDTrainer

    return KDTrainer(*args, **({"loss_kwargs": LOSS} | kwargs))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("fused", [False, True])
def test_losses_equal_a_hand_written_trainer(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any], fused: bool
) -> None:
    """Losses and weights after steps with accumulation; measured differences are 1e-7 and 1.2e-7."""
    args = arguments(gradient_accumulation_steps=2, num_train_epochs=2, learning_rate=0.1)
    runs = []
    for build, options in ((PlainTrainer, {}), (kd_trainer, {"fused": fused})):
        model = copy.deepcopy(student)
        trainer = build(
            model, args, train_dataset=sentences(), teacher_model=copy.deepcopy(teacher), **options
        )
        trainer.train()
        runs.append((losses(trainer), weights(model)))
    (stock, stock_weights), (actual, our_weights) = runs
    assert len(actual) == 4 and stock[0] - stock[-1] > 0.05
    assert actual == pytest.approx(stock, rel=2e-6)
    assert (our_weights - stock_weights).abs().max() < 1e-6
    assert (our_weights - weights(student)).abs().max() > 1e-2


def gradient_of(trainer: Any, batches: list[Batch]) -> Tensor:
    """The gradient that one optimizer step on the batches would see."""
    model = trainer.model
    trainer.current_gradient_accumulation_steps = len(batches)
    num_items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    for batch in batches:
        trainer.training_step(model, dict(batch), num_items)
    actual = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return actual


def batches_of(examples: list[Batch], size: int) -> list[Batch]:
    return [
        {name: torch.stack([e[name] for e in examples[i : i + size]]) for name in examples[0]}
        for i in range(0, len(examples), size)
    ]


class WithoutLossArguments(nn.Module):
    """A model whose forward takes no **kwargs, for which the Trainer would not count labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        return (self.model(input_ids, attention_mask).logits,)


@pytest.mark.parametrize("form", ["dense", "fused", "without loss arguments"])
def test_accumulated_batches_have_the_gradient_of_one(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any], form: str
) -> None:
    """8 x 1 (one without a counted row), 2 x 4 and 1 x 8 give gradients as near to float64 as PyTorch's."""
    examples = sentences()
    model = WithoutLossArguments(student) if form == "without loss arguments" else student
    shifts: Any = (
        True if form == "without loss arguments" else "auto"
    )  # a wrapper needs shift_labels
    trainer = kd_trainer(
        model, arguments(), teacher_model=teacher, fused=form == "fused", shift_labels=shifts
    )
    exact_student, exact_teacher = (copy.deepcopy(m).double().eval() for m in (student, teacher))
    references = []
    for s, t in ((exact_student, exact_teacher), (student, teacher)):
        (batch,) = batches_of(examples, 8)
        features = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels = batch["labels"]
        count = (labels[:, 1:] != -100).sum()
        plain_loss(s(**features).logits, t(**features).logits.detach(), labels, count).backward()
        references.append(torch.cat([p.grad.flatten() for p in s.parameters()]))
        s.zero_grad()
    exact, plain = references
    bar = (plain - exact).abs().max()
    for size in (1, 4, 8):
        actual = gradient_of(trainer, batches_of(examples, size))
        assert (actual - exact).abs().max() <= 2 * bar + 1e-7, size
    assert exact.abs().max() > 0.1


def test_without_labels(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any]
) -> None:
    """Rows that do not predict padding count; the Trainer divides by the number of batches."""
    examples = sentences(labelled=False)
    trainer = kd_trainer(student, arguments(), teacher_model=teacher, loss_kwargs={})
    actual = gradient_of(trainer, batches_of(examples, 4))
    total = torch.zeros(())
    for batch in batches_of(examples, 4):
        labels = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
        rows = (labels[:, 1:] != -100).sum()
        s, t = (m(**batch).logits for m in (student, teacher))
        total = total + plain_loss(s, t.detach(), labels, rows, alpha=1.0, temperature=1.0) / 2
    total.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    trainer = kd_trainer(
        student,
        arguments(label_names=[], per_device_eval_batch_size=8),
        teacher_model=teacher,
        loss_kwargs={},
        eval_dataset=examples,
    )
    (batch,) = batches_of(examples, 8)
    with torch.no_grad():
        loss = trainer.compute_loss(student, batch)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(loss), rel=1e-6)


def test_left_padding_is_not_counted(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any]
) -> None:
    ids = torch.tensor([[0, 0, 7, 8, 9]])
    mask = (ids != 0).long()
    trainer = kd_trainer(student, arguments(), teacher_model=teacher, loss_kwargs={})
    seen: list[Tensor] = []
    trainer._loss.forward = lambda *_, mask, **__: seen.append(mask) or (torch.zeros(()), None)
    trainer.compute_loss(student, {"input_ids": ids, "attention_mask": mask})
    assert seen[0].tolist() == [[False, False, True, True, False]]


@pytest.mark.parametrize("fused", [False, True])
def test_evaluation(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any], fused: bool
) -> None:
    """The loss of the batch, and predictions for every position if requested."""
    examples = sentences()
    (batch,) = batches_of(examples, 8)
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {}

    for compute_metrics in (None, metrics):
        trainer = kd_trainer(
            student,
            arguments(per_device_eval_batch_size=8),
            teacher_model=teacher,
            eval_dataset=examples,
            fused=fused,
            compute_metrics=compute_metrics,
        )
        with torch.no_grad():
            expected = plain_loss(
                student.eval()(batch["input_ids"], batch["attention_mask"]).logits,
                teacher.eval()(batch["input_ids"], batch["attention_mask"]).logits,
                batch["labels"],
                (batch["labels"][:, 1:] != -100).sum(),
            )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-6)
    assert shapes == [((8, 7, 61), (8, 7))]


def test_label_smoothing(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any]
) -> None:
    (batch,) = batches_of(sentences(), 8)
    args = arguments(label_smoothing_factor=0.2)
    trainer = kd_trainer(student, args, teacher_model=teacher)
    loss, outputs = trainer.compute_loss(student, batch, return_outputs=True, num_items_in_batch=9)
    with torch.no_grad():
        t = teacher(batch["input_ids"], batch["attention_mask"]).logits
    expected = plain_loss(outputs.logits, t, batch["labels"], 9, smoothing=0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert "labels" in batch
    for options, message in (
        ({"alpha": 1.0}, "alpha=1 omits"),
        ({"alpha": 0.5, "label_smoothing": 0.1}, "is 0.1 in loss_kwargs, but .* is 0.2"),
    ):
        with pytest.raises(ValueError, match=message):
            kd_trainer(student, args, teacher_model=teacher, loss_kwargs=options)


def test_both_parts_are_logged(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any]
) -> None:
    args = arguments(gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = kd_trainer(
        student, args, train_dataset=sentences(), eval_dataset=sentences(2), teacher_model=teacher
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        both = 0.7 * entry["kd_loss"] + 0.3 * entry["ce_loss"]
        assert entry["loss"] == pytest.approx(both, rel=1e-5)
        assert entry["kd_loss"] != pytest.approx(entry["ce_loss"], rel=0.1)
    assert not any("kd_loss" in e for e in trainer.state.log_history if "eval_loss" in e)


def test_tokens_averaged_over_processes(
    student: nn.Module,
    teacher: nn.Module,
    arguments: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Like Trainer.compute_loss, the loss is scaled because the count covers all processes and DDP averages."""
    (batch,) = batches_of(sentences(), 8)
    trainer = kd_trainer(student, arguments(), teacher_model=teacher)
    alone = [trainer.compute_loss(student, batch, num_items_in_batch=n).item() for n in (9, None)]
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda _: 3))
    among = [trainer.compute_loss(student, batch, num_items_in_batch=n).item() for n in (9, None)]
    assert among == pytest.approx([3 * alone[0], alone[1]], rel=1e-6)
    trainer.args.average_tokens_across_devices = False
    assert trainer.compute_loss(student, batch, num_items_in_batch=9).item() == alone[0]


def test_labels_that_are_already_shifted(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any]
) -> None:
    (batch,) = batches_of(sentences(), 8)
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    trainer = kd_trainer(student, arguments(), teacher_model=teacher)
    expected = trainer.compute_loss(student, batch)
    for inputs in ({"labels": batch["labels"], "shift_labels": shifted}, {"shift_labels": shifted}):
        features = {name: batch[name] for name in ("input_ids", "attention_mask")}
        assert torch.equal(trainer.compute_loss(student, features | inputs), expected)
    aligned = kd_trainer(student, arguments(), teacher_model=teacher, shift_labels=False)
    assert torch.equal(aligned.compute_loss(student, batch | {"labels": shifted}), expected)
    assert aligned._get_num_items_in_batch([batch], "cpu") == (batch["labels"] != -100).sum()


@pytest.mark.parametrize("fused", [False, True])
def test_a_teacher_that_is_a_function(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any], fused: bool
) -> None:
    """Top-k columns of a dataset do not reach the student."""
    (batch,) = batches_of(sentences(), 8)
    with torch.no_grad():
        log_p = teacher.eval()(batch["input_ids"], batch["attention_mask"]).logits.log_softmax(-1)
    top = log_p.topk(5)

    def from_columns(inputs: dict[str, Any]) -> fastkd.TopK:
        assert not torch.is_grad_enabled()
        return fastkd.TopK(inputs.pop("teacher_ids"), inputs.pop("teacher_logprobs"))

    trainer = kd_trainer(
        WithoutLossArguments(student) if not fused else student,
        arguments(),
        teacher_model=from_columns,
        loss_kwargs={},
        shift_labels="auto" if fused else True,
        fused=fused,
    )
    columns = {"teacher_ids": top.indices, "teacher_logprobs": top.values}
    actual = trainer.compute_loss(trainer.model, batch | columns)
    logits = student(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    expected = fastkd.kd_loss(
        logits,
        fastkd.TopK(*(c[:, :-1] for c in columns.values())),
        batch["labels"][:, 1:].contiguous(),
    )
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_a_batch_without_a_counted_label(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any]
) -> None:
    (batch,) = batches_of(sentences(2), 2)
    batch["labels"].fill_(-100)
    trainer = kd_trainer(student, arguments(), teacher_model=teacher)
    loss = trainer.compute_loss(student, batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(not parameter.grad.any() for parameter in student.parameters())


# ---- fused


def granite(**config: Any) -> nn.Module:
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 61}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**sizes, **heads, pad_token_id=0, logits_scaling=4.0, **config)
    )


@pytest.mark.parametrize("side", ["", "teacher_"])
def test_fused_reads_how_logits_are_scaled(
    student: nn.Module, arguments: Callable[..., Any], side: str
) -> None:
    """Granite divides its logits; another scale would train another model."""
    (batch,) = batches_of(sentences(), 8)
    scaled = granite()
    model, teacher = (student, scaled) if side else (scaled, student)

    def loss(**options: Any) -> Tensor:
        trainer = kd_trainer(model, arguments(), teacher_model=teacher, **options)
        return trainer.compute_loss(model, batch)

    with pytest.raises(ValueError, match=f"Set {side}logit_scale .* in loss_kwargs"):
        loss(fused=True, loss_kwargs=LOSS | {f"{side}logit_scale": 1.0})
    options = LOSS | {f"{side}logit_scale": 0.25}
    for given in (options, LOSS):
        torch.testing.assert_close(loss(fused=True, loss_kwargs=given), loss(), rtol=1e-6, atol=0)
    trainer = kd_trainer(model, arguments(), teacher_model=teacher, fused=True, loss_kwargs=options)
    evaluated, logits, _ = trainer.prediction_step(model, dict(batch), prediction_loss_only=False)
    assert logits.shape == (8, 7, 61)
    expected = kd_trainer(model.eval(), arguments(), teacher_model=teacher).prediction_step(
        model, dict(batch), prediction_loss_only=True
    )
    torch.testing.assert_close(evaluated, expected[0], rtol=1e-6, atol=0)


def test_fused_applies_softcaps(teacher: nn.Module, arguments: Callable[..., Any]) -> None:
    torch.manual_seed(4)
    student = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, vocab_size=61, head_dim=8,
            num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, pad_token_id=0,
            final_logit_softcapping=2.0,
        )
    )  # fmt: skip
    (batch,) = batches_of(sentences(), 8)
    for softcap in (None, 2.5):
        options = LOSS | {"softcap": softcap}
        trainer = kd_trainer(
            student, arguments(), teacher_model=teacher, fused=True, loss_kwargs=options
        )
        with pytest.raises(ValueError, match=f"of model are not .* the softcap {softcap}"):
            trainer.compute_loss(student, batch)
    fused = kd_trainer(student, arguments(), teacher_model=teacher, fused=True)
    dense = kd_trainer(student, arguments(), teacher_model=teacher)
    expected = dense.compute_loss(student, batch)
    torch.testing.assert_close(fused.compute_loss(student, batch), expected, rtol=1e-6, atol=0)


def test_fused_computes_no_logits(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any]
) -> None:
    (batch,) = batches_of(sentences(), 8)
    trainer = kd_trainer(
        student,
        arguments(),
        teacher_model=teacher,
        fused=True,
        loss_kwargs=LOSS | {"chunk_size": 2},
    )
    _, outputs = trainer.compute_loss(student, batch, return_outputs=True)
    assert outputs.logits.shape == (8, 1, 61)
    assert student(batch["input_ids"]).logits.shape == (8, 7, 61)  # no hook remains


@pytest.mark.heavy
def test_fused_with_compiled_models(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any]
) -> None:
    """Evaluation with predictions runs the same compiled model with its own lm_head."""
    (batch,) = batches_of(sentences(), 8)
    dense = kd_trainer(copy.deepcopy(student), arguments(), teacher_model=copy.deepcopy(teacher))
    dense.model.train()
    args = arguments(torch_compile=True, torch_compile_backend="eager")
    trainer = kd_trainer(student, args, teacher_model=teacher, fused=True)
    compiled = trainer.accelerator.prepare_model(student)
    assert all("_orig_mod" in model._modules for model in (compiled, trainer.teacher_model))
    for step in range(2):
        compiled.train()
        actual = trainer.compute_loss(compiled, batch)
        expected = dense.compute_loss(dense.model, batch)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
        actual.backward()
        expected.backward()
        for one, other in zip(student.parameters(), dense.model.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
        if step == 0:
            inputs = dict(batch)
            _, logits, _ = trainer.prediction_step(compiled, inputs, prediction_loss_only=False)
            inputs.pop("labels")
            torch.testing.assert_close(logits, dense.model.eval()(**inputs).logits)
            dense.model.train()


def test_fused_in_mixed_precision(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any], monkeypatch: Any
) -> None:
    """With bf16 autocast on float32 weights, the loss's products have the dtype of the models' products."""
    (batch,) = batches_of(sentences(), 8)
    seen = []
    stock = fastkd.engine.linear.kd_chunks

    def spy(student: Any, *rest: Any) -> Any:
        if isinstance(rest[0], fastkd.LinearTeacher):
            seen.append({student.hidden.dtype, student.weight.dtype, rest[0].hidden.dtype})
        return stock(student, *rest)

    monkeypatch.setattr(fastkd.engine.linear, "kd_chunks", spy)
    trainer = kd_trainer(student, arguments(bf16=True), teacher_model=teacher, fused=True)
    trainer.model = trainer.accelerator.prepare_model(student)
    actual = trainer.compute_loss(trainer.model, batch)
    dense = kd_trainer(student, arguments(bf16=True), teacher_model=teacher)
    torch.testing.assert_close(actual, dense.compute_loss(trainer.model, batch), rtol=2e-2, atol=0)
    actual.backward()
    assert seen == [{torch.bfloat16}]
    assert student.lm_head.weight.grad.dtype == torch.float32


@pytest.mark.heavy
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Under DDP and FSDP2, compared with the loss of logits on one process."""
    from support import trainer_of_processes

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, trainer_of_processes.__file__, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=1500,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = torch.load(tmp_path / "two")
    for case, (found_losses, found_weights) in zip(
        trainer_of_processes.CASES, results, strict=True
    ):
        expected_losses, expected_weights = trainer_of_processes.run(False, "ddp", case[-1])
        assert len(found_losses) == 2 and found_losses == pytest.approx(expected_losses, rel=2e-6)
        assert (found_weights - expected_weights).abs().max() < 1e-6


# ---- compute_loss_func


def test_compute_loss_func(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any]
) -> None:
    """The stock Trainer with the function gives bitwise the results of KDTrainer."""
    args = arguments(gradient_accumulation_steps=2, learning_rate=0.1)
    runs = []
    for by_function in (True, False):
        model = copy.deepcopy(student)
        if by_function:
            func = compute_loss_func(model, teacher.eval(), **LOSS)
            trainer = transformers.Trainer(
                model, args, train_dataset=sentences(), compute_loss_func=func
            )
        else:
            trainer = kd_trainer(model, args, train_dataset=sentences(), teacher_model=teacher)
        trainer.train()
        runs.append((losses(trainer), weights(model)))
    assert len(runs[0][0]) == 2 and runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_compute_loss_func_needs_a_batch_with_labels(
    student: nn.Module, teacher: nn.Module
) -> None:
    func = compute_loss_func(student, teacher.eval())
    ids = torch.tensor([[3, 4, 5]])
    outputs = student(input_ids=ids)
    with pytest.raises(ValueError, match="labels are needed"):
        func(outputs, None)
    assert func(outputs, ids).isfinite()
    with pytest.raises(RuntimeError, match="has not been called"):
        func(outputs, ids)


# ---- errors


@pytest.mark.parametrize(
    "option", [{"reduction": "sum"}, {"ignore_index": 0}, {"return_parts": True}]
)
def test_options_of_the_trainer_are_refused(student: nn.Module, option: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="the Trainer decides it"):
        compute_loss_func(student, student, **option)
    with pytest.raises(TypeError, match="the Trainer decides it"):
        kd_trainer(student, teacher_model=student, loss_kwargs=option)


def test_bad_trainer_arguments(
    student: nn.Module, teacher: nn.Module, arguments: Callable[..., Any]
) -> None:
    def build(**options: Any) -> Any:
        inputs = {"args": arguments(), "teacher_model": teacher} | options
        return kd_trainer(student, **inputs)

    with pytest.raises(ValueError, match="teacher_model must not be the student"):
        build(teacher_model=student)
    with pytest.raises(ValueError, match="compute_loss_func would not be called"):
        build(compute_loss_func=print)
    with pytest.raises(ValueError, match="temperature must be"):
        build(loss_kwargs={"temperature": 0.0})
    with pytest.raises(TypeError, match="chunk_size"):  # an option of the fused loss only
        build(loss_kwargs={"chunk_size": 4})
    several = arguments()
    assert several.n_gpu < 2  # the check runs once
    several._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs \\(DataParallel\\)"):
        build(args=several)
    student.lm_head = nn.Sequential(student.lm_head)
    trainer = build(fused=True)
    with pytest.raises(
        ValueError, match="the lm_head of model must be exactly an nn.Linear, got a torch"
    ):
        trainer.compute_loss(student, batches_of(sentences(2), 2)[0])


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastkd.compat.transformers as adapter

    monkeypatch.delitem(vars(adapter), "KDTrainer", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install 'transformers"):
        adapter.KDTrainer  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        adapter.nothing  # noqa: B018
    assert fastkd.compat.transformers is adapter
    assert DistillationMixin.__doc__


@pytest.mark.parametrize("fused", [False, True])
def test_example(
    fused: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ROOT / "examples" / "swap"
    monkeypatch.syspath_prepend(str(folder))
    import hf_trainer

    hf_trainer.main(tiny=True, fused=fused, steps=2, assets=folder)
    table = capsys.readouterr().out
    assert "PyTorch" in table and len(re.findall(r"^│ +\d │ ", table, re.M)) == 2
