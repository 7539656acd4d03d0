"""Adapters on every kind of model of transformers: meaning of labels, arguments of each model, terms that a model
adds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from torch import Tensor, nn
from torch.nn import functional as F

import fastkd
from fastkd.compat.transformers import compute_loss_func
from fastkd.distiller import models

pytest.importorskip("accelerate", reason="pip install 'transformers[torch]' brings accelerate")
transformers = pytest.importorskip("transformers", reason="pip install '.[peers]' brings it")
import datasets  # noqa: E402  (a peer, as the two above)

pytestmark = pytest.mark.filterwarnings("ignore")
LOSS = {"alpha": 0.7, "temperature": 2.0}
Batch = dict[str, Any]


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
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "seed": 5,
        }
        return transformers.TrainingArguments(**(inputs | options))

    return made


def kd_trainer(*args: Any, **kwargs: Any) -> Any:
    from fastkd.compat.transformers import KDTrainer

    return KDTrainer(*args, **({"loss_kwargs": LOSS} | kwargs))


def exact(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float = 0.7, t: float = 2.0
) -> Tensor:
    """alpha T^2 KL + (1 - alpha) CE in float64, averaged over the rows [rows, C] whose label is not -100."""
    rows = labels != -100
    s, p = student.double()[rows], teacher.double()[rows]
    log_q, log_p = (s / t).log_softmax(-1), (p / t).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean() * t * t
    hard = -s.log_softmax(-1).gather(-1, labels[rows].unsqueeze(-1)).mean()
    return alpha * kl + (1 - alpha) * hard


def texts(batch: int = 3, length: int = 6) -> Batch:
    """A batch of texts, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (batch, length), generator=generator)
    real = torch.arange(length) < length - torch.arange(batch).unsqueeze(1)
    return {"input_ids": ids.where(real, 0), "attention_mask": real.long()}


def token_labels(batch: int = 3) -> Batch:
    """A batch of texts whose labels are the tokens, except padding and the second token."""
    inputs = texts(batch)
    labels = inputs["input_ids"].where(inputs["attention_mask"] == 1, -100)
    labels[:, 1] = -100
    return inputs | {"labels": labels}


def class_labels(batch: int = 3) -> Batch:
    return texts(batch) | {"labels": torch.arange(batch) % 5}


def image_classes(batch: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, 8, 8, generator=generator)
    return {"pixel_values": pixels, "labels": torch.arange(batch) % 5}


def token_classes(batch: int = 3) -> Batch:
    inputs = token_labels(batch)
    return inputs | {
        "labels": inputs["labels"].where(inputs["labels"] == -100, inputs["labels"] % 5)
    }


# For each class: (its batch, whether labels are shifted, whether it has an lm_head, its configuration).
FAMILIES: dict[str, tuple[Callable[[int], Batch], bool, bool, dict[str, Any]]] = {
    "LlamaForCausalLM": (token_labels, True, True, {}),
    "GPT2LMHeadModel": (token_labels, True, True, {}),
    "BertLMHeadModel": (token_labels, True, True, {"is_decoder": True}),
    "BartForCausalLM": (token_labels, False, True, {}),  # its own loss does not shift, despite its name
    "BertForMaskedLM": (token_labels, False, True, {}),
    "BertForTokenClassification": (token_classes, False, False, {"num_labels": 5}),
    "BertForSequenceClassification": (class_labels, False, False, {"num_labels": 5}),
    "ViTForImageClassification": (image_classes, False, False, {"num_labels": 5}),
    "T5ForConditionalGeneration": (token_labels, False, True, {}),
    "BartForConditionalGeneration": (token_labels, False, True, {}),
}  # fmt: skip


def family(name: str) -> tuple[nn.Module, nn.Module]:
    """(student, teacher)"""
    config = FAMILIES[name][3]
    student, teacher = (tiny_models.built(name, seed=seed, **config) for seed in (1, 2))
    return student, teacher


def logits_by_hand(model: nn.Module, batch: Batch) -> Tensor:
    """Logits as the model's documentation computes them; an encoder-decoder makes its decoder's inputs from labels."""
    with torch.no_grad():
        return model.eval()(**batch).logits


def by_hand(name: str, student: nn.Module, teacher: nn.Module, batch: Batch) -> float:
    s, t = (logits_by_hand(model, batch) for model in (student, teacher))
    labels = batch["labels"]
    if FAMILIES[name][1]:
        s, t, labels = s[:, :-1], t[:, :-1], labels[:, 1:]
    return float(exact(s, t, labels))


@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_labels_of_every_family(name: str, size: int, arguments: Callable[..., Any]) -> None:
    """A batch of three and a batch of one, from logits and from hidden states."""
    student, teacher = family(name)
    make, _, has_head, _ = FAMILIES[name]
    batch = make(size)
    expected = by_hand(name, student, teacher, batch)
    for fused in (False, True) if has_head else (False,):
        trainer = kd_trainer(student, arguments(), teacher_model=teacher, fused=fused)
        actual = trainer.compute_loss(student, dict(batch))
        assert float(actual) == pytest.approx(expected, rel=2e-6), f"fused={fused}"
        actual.backward()
        assert any(p.grad is not None and p.grad.any() for p in student.parameters())
        student.zero_grad()
        items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        counted = batch["labels"][:, 1:] if FAMILIES[name][1] else batch["labels"]
        assert int(items) == int((counted != -100).sum())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_the_trainer(name: str, arguments: Callable[..., Any]) -> None:
    """From a dataset to a logged loss, in KDTrainer and in the stock Trainer with compute_loss_func."""
    student, teacher = family(name)
    batch = FAMILIES[name][0](3)
    if (
        name == "BartForCausalLM"
    ):  # the Trainer assumes that the model shifts its labels, and counts accordingly
        batch["labels"][:, 0] = -100
    expected = by_hand(name, student, teacher, batch)
    if "T5" in name or name == "BartForConditionalGeneration":
        batch["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(
            labels=batch["labels"]
        )
    data = [{column: value[i] for column, value in batch.items()} for i in range(3)]
    args = arguments(per_device_train_batch_size=3)
    state = {key: value.clone() for key, value in student.state_dict().items()}
    func = compute_loss_func(student, teacher.eval(), **LOSS)
    stock = transformers.Trainer(student, args, train_dataset=data, compute_loss_func=func)
    results = []
    for build in (
        lambda: stock,
        lambda: kd_trainer(student, args, train_dataset=data, teacher_model=teacher),
    ):
        student.load_state_dict(state)
        trainer = build()
        trainer.train()
        results.append(trainer.state.log_history[0]["loss"])
    assert results[0] == pytest.approx(expected, rel=2e-6)
    assert results[1] == pytest.approx(expected, rel=2e-6)


def test_without_labels_the_last_position_predicts_nothing(arguments: Callable[..., Any]) -> None:
    """The same with an attention mask of ones as without a mask; all positions of an encoder count."""
    for name, positions in (("LlamaForCausalLM", slice(0, -1)), ("BertForMaskedLM", slice(None))):
        student, teacher = family(name)
        ids = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(4))
        s, t = (logits_by_hand(m, {"input_ids": ids})[:, positions] for m in (student, teacher))
        expected = float(exact(s, t, ids[:, positions], alpha=1.0))
        for fused in (False, True):
            trainer = kd_trainer(
                student,
                arguments(),
                teacher_model=teacher,
                loss_kwargs={"temperature": 2.0},
                fused=fused,
            )
            for inputs in (
                {"input_ids": ids},
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            ):
                assert float(trainer.compute_loss(student, inputs)) == pytest.approx(
                    expected, rel=2e-6
                )


def test_a_classifier_without_labels(arguments: Callable[..., Any]) -> None:
    """The attention mask does not mask rows, even if the batch is as long as its texts."""
    student, teacher = family("BertForSequenceClassification")
    batch = texts(6)
    trainer = kd_trainer(
        student, arguments(), teacher_model=teacher, loss_kwargs={"temperature": 2.0}
    )
    s, t = (logits_by_hand(m, batch) for m in (student, teacher))
    expected = exact(s, t, torch.zeros(6, dtype=torch.int64), alpha=1.0)
    assert float(trainer.compute_loss(student, batch)) == pytest.approx(float(expected), rel=2e-6)


# ---- what cannot be known, and what is not this loss


class Wrapper(nn.Module):
    """A model of which only the forward is known."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        return (self.model(input_ids, attention_mask).logits,)


def test_an_unknown_wrapper_needs_shift_labels(arguments: Callable[..., Any]) -> None:
    student, teacher = family("LlamaForCausalLM")
    batch = token_labels()
    expected = by_hand("LlamaForCausalLM", student, teacher, batch)
    wrapped = Wrapper(student)
    trainer = kd_trainer(wrapped, arguments(), teacher_model=teacher)
    with pytest.raises(ValueError, match="shift_labels must be given for this student"):
        trainer.compute_loss(wrapped, batch)
    trainer = kd_trainer(wrapped, arguments(), teacher_model=teacher, shift_labels=True)
    assert float(trainer.compute_loss(wrapped, batch)) == pytest.approx(expected, rel=2e-6)
    func = compute_loss_func(wrapped, teacher.eval(), **LOSS)
    features = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(ValueError, match="shift_labels must be given for this student"):
        func(wrapped(**features), batch["labels"])
    # Logits [B, C] have no sequence, so shift_labels is not needed.
    classifier, other = (Wrapper(m) for m in family("BertForSequenceClassification"))
    trainer = kd_trainer(classifier, arguments(), teacher_model=other)
    assert float(trainer.compute_loss(classifier, class_labels())) > 0
    with pytest.raises(ValueError, match="shift_labels=True moves labels along a sequence"):
        kd_trainer(classifier, arguments(), teacher_model=other, shift_labels=True).compute_loss(
            classifier, class_labels()
        )


@pytest.mark.parametrize("wrong", ["yes", 1, None])
def test_shift_labels_is_one_of_three(wrong: Any, arguments: Callable[..., Any]) -> None:
    student, teacher = family("LlamaForCausalLM")
    with pytest.raises(ValueError, match="shift_labels must be 'auto', True or False"):
        kd_trainer(student, arguments(), teacher_model=teacher, shift_labels=wrong)


def test_outputs_that_are_not_classes_are_refused(arguments: Callable[..., Any]) -> None:
    student, teacher = family("ViTForImageClassification")
    several = image_classes() | {"labels": torch.rand(3, 5)}
    with pytest.raises(ValueError, match=r"these are torch.float32 \(3, 5\).*multi-label head"):
        kd_trainer(student, arguments(), teacher_model=teacher).compute_loss(student, several)
    func = compute_loss_func(student, teacher.eval())
    with pytest.raises(ValueError, match="must be class indices"):
        func(student(several["pixel_values"]), several["labels"])
    for config, message in (
        ({"num_labels": 1}, "num_labels=1"),
        (
            {"num_labels": 5, "problem_type": "multi_label_classification"},
            "'multi_label_classification'",
        ),
        ({"num_labels": 5, "problem_type": "regression"}, "'regression'"),
    ):
        odd = tiny_models.built("ViTForImageClassification", **config)
        for pair in ((odd, teacher), (student, odd)):
            with pytest.raises(ValueError, match=message):
                kd_trainer(pair[0], arguments(), teacher_model=pair[1])


class Regressor(nn.Module):
    """A model whose own loss of integer labels is a squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(inputs)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.mse_loss(logits.mean(-1), labels.float()), "logits": logits}


def test_a_loss_other_than_cross_entropy_is_refused(arguments: Callable[..., Any]) -> None:
    student = Regressor()
    trainer = kd_trainer(student, arguments(), teacher_model=Regressor())
    with pytest.raises(ValueError, match="the student's own loss of them is mse_loss"):
        trainer.compute_loss(student, {"inputs": torch.randn(3, 4), "labels": torch.arange(3)})


def test_classes_in_another_order(arguments: Callable[..., Any]) -> None:
    """Two models of one task that number the classes differently are refused."""
    tables = [{0: "no", 1: "yes"}, {0: "yes", 1: "no"}]
    pair = [
        tiny_models.built("BertForSequenceClassification", id2label=table, label2id={n: i for i, n in table.items()})
        for table in tables
    ]  # fmt: skip
    with pytest.raises(ValueError, match="classes are no, yes and the teacher's yes, no"):
        kd_trainer(pair[0], arguments(), teacher_model=pair[1])


def test_labels_under_another_name(arguments: Callable[..., Any]) -> None:
    student, teacher = family("BertForSequenceClassification")
    trainer = kd_trainer(student, arguments(), teacher_model=teacher)
    with pytest.raises(ValueError, match="under the name 'labels', got label;"):
        trainer.compute_loss(student, texts() | {"label": torch.arange(3)})
    answers = tiny_models.built("BertForQuestionAnswering")
    trainer = kd_trainer(answers, arguments(), teacher_model=answers.bert)
    where = {
        "start_positions": torch.ones(3, dtype=torch.int64),
        "end_positions": torch.ones(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match="got end_positions, start_positions"):
        trainer.compute_loss(answers, texts() | where)


def test_outputs_without_logits(arguments: Callable[..., Any]) -> None:
    student, teacher = family("BertForMaskedLM")
    for pair, whose in (((student.bert, teacher), "student"), ((student, teacher.bert), "teacher")):
        trainer = kd_trainer(pair[0], arguments(), teacher_model=pair[1], shift_labels=False)
        with pytest.raises(
            TypeError,
            match=f"no logits in the outputs of the {whose}, which have last_hidden_state",
        ):
            trainer.compute_loss(pair[0], texts())


class Tuples(nn.Module):
    """A model that returns a tuple, which may begin with a loss."""

    def __init__(self, model: nn.Module, labelled: bool, number: bool = False) -> None:
        super().__init__()
        self.model, self.number = model, number
        if labelled:
            self.forward = self.with_labels  # type: ignore[method-assign]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        logits = self.model(input_ids, attention_mask).logits
        return (logits.mean(), logits) if self.number else (logits,)

    def with_labels(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        outputs = self.model(input_ids, attention_mask, labels=labels)
        return (outputs.logits,) if labels is None else (outputs.loss, outputs.logits)


def test_tuples(arguments: Callable[..., Any]) -> None:
    student, teacher = family("LlamaForCausalLM")
    expected = by_hand("LlamaForCausalLM", student, teacher, token_labels())
    for labelled in (True, False):
        model = Tuples(student, labelled)
        trainer = kd_trainer(
            model,
            arguments(),
            teacher_model=Tuples(teacher, False),
            shift_labels="auto" if labelled else True,
        )
        assert float(trainer.compute_loss(model, token_labels())) == pytest.approx(
            expected, rel=2e-6
        )
    model = Tuples(student, False, number=True)
    trainer = kd_trainer(model, arguments(), teacher_model=teacher, shift_labels=True)
    with pytest.raises(ValueError, match="returns a tuple that begins with a number"):
        trainer.compute_loss(model, token_labels())


# ---- columns


def test_columns_that_only_the_teacher_takes(arguments: Callable[..., Any]) -> None:
    """A BERT teacher distinguishes two sentences by token_type_ids, which DistilBERT does not take."""
    student = tiny_models.built("DistilBertForSequenceClassification", seed=1, num_labels=5)
    teacher = tiny_models.built("BertForSequenceClassification", seed=2, num_labels=5)
    batch = class_labels(4)
    kinds = (torch.arange(6) > 2).long().expand(4, 6) * batch["attention_mask"]
    with torch.no_grad():
        s = student.eval()(batch["input_ids"], batch["attention_mask"]).logits
        t = teacher.eval()(**batch, token_type_ids=kinds).logits
    expected = float(exact(s, t, batch["labels"]))
    columns = {name: value.tolist() for name, value in (batch | {"token_type_ids": kinds}).items()}
    data = datasets.Dataset.from_dict(columns | {"text": ["a"] * 4}).with_format("torch")
    seen: list[set[str]] = []
    student.register_forward_pre_hook(lambda m, a, k: seen.append(set(k)), with_kwargs=True)
    trainer = kd_trainer(
        student,
        arguments(per_device_train_batch_size=4),
        train_dataset=data,
        eval_dataset=data,
        teacher_model=teacher,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=2e-6)
    assert seen and not any("token_type_ids" in names for names in seen)
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(
        ValueError, match="token_type_ids are an input of the teacher but not of the student"
    ):
        compute_loss_func(student, teacher)


def test_columns_for_a_teacher_function(arguments: Callable[..., Any]) -> None:
    """A teacher function gets the columns of a cache; the student does not."""
    student, teacher = family("LlamaForCausalLM")
    batch = token_labels()
    top = (
        logits_by_hand(teacher, {n: batch[n] for n in ("input_ids", "attention_mask")})
        .log_softmax(-1)
        .topk(61)
    )
    columns = batch | {"teacher_ids": top.indices, "teacher_logprobs": top.values}
    data = datasets.Dataset.from_dict(
        {n: v.tolist() for n, v in columns.items()} | {"text": ["a"] * 3}
    )

    def from_columns(inputs: Batch) -> fastkd.TopK:
        return fastkd.TopK(inputs["teacher_ids"], inputs["teacher_logprobs"], tail="renormalize")

    trainer = kd_trainer(
        Wrapper(student), arguments(per_device_train_batch_size=3), train_dataset=data.with_format("torch"),
        teacher_model=from_columns, shift_labels=True,
    )  # fmt: skip
    trainer.train()
    expected = by_hand("LlamaForCausalLM", *family("LlamaForCausalLM"), batch)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


# ---- packed batches


def examples() -> list[dict[str, list[int]]]:
    return [{"input_ids": ids} for ids in ([5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16])]


def loss_of_separate_examples(student: nn.Module, teacher: nn.Module) -> float:
    """The loss of the examples, each computed alone."""
    sides = []
    for model in (student, teacher):
        rows = [
            logits_by_hand(model, {"input_ids": torch.tensor([e["input_ids"]])})[0, :-1]
            for e in examples()
        ]
        sides.append(torch.cat(rows))
    labels = torch.tensor([token for e in examples() for token in e["input_ids"][1:]])
    return float(exact(*sides, labels))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("how", ["dense", "fused", "function"])
def test_packed_examples_do_not_see_each_other(
    name: str, how: str, arguments: Callable[..., Any]
) -> None:
    """With DataCollatorWithFlattening the teacher gets the same boundaries as the student."""
    student, teacher = family(name)
    collator = transformers.DataCollatorWithFlattening()
    args = arguments(per_device_train_batch_size=3)
    inputs = {"train_dataset": examples(), "data_collator": collator}
    if how == "function":
        func = compute_loss_func(student, teacher.eval(), **LOSS)
        trainer = transformers.Trainer(student, args, compute_loss_func=func, **inputs)
    else:
        trainer = kd_trainer(student, args, teacher_model=teacher, fused=how == "fused", **inputs)
    expected = loss_of_separate_examples(student, teacher)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=2e-6)


def packed(**columns: Tensor) -> Batch:
    """The examples in one row, with a label for each token."""
    ids = torch.tensor([[token for e in examples() for token in e["input_ids"]]])
    return {"input_ids": ids, "labels": ids.clone()} | columns


POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])


def test_the_trainers_wrong_count_is_corrected() -> None:
    """compute_loss_func gets the Trainer's count, which includes labels that the loss does not use."""
    student, teacher = family("LlamaForCausalLM")
    func = compute_loss_func(student, teacher.eval(), **LOSS)
    batch = packed(position_ids=POSITIONS)
    outputs = student(input_ids=batch["input_ids"], position_ids=POSITIONS, use_cache=False)
    with pytest.raises(ValueError, match="counts 11 labels in a batch in which the loss has 9"):
        func(outputs, batch["labels"], num_items_in_batch=11)


def test_first_tokens_of_packed_examples_are_not_labels(arguments: Callable[..., Any]) -> None:
    """Even if the collator did not mask them, and also in the Trainer's count."""
    student, teacher = family("LlamaForCausalLM")
    expected = loss_of_separate_examples(student, teacher)
    index = torch.tensor([[0] * 4 + [1] * 3 + [2] * 5])
    lengths = torch.tensor([0, 4, 7, 12], dtype=torch.int32)
    for extra in ({}, {"seq_idx": index}, {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}):
        trainer = kd_trainer(student, arguments(), teacher_model=teacher)
        batch = packed(position_ids=POSITIONS, **extra)
        assert int(trainer._get_num_items_in_batch([batch], torch.device("cpu"))) == 9
        assert float(trainer.compute_loss(student, batch)) == pytest.approx(expected, rel=2e-6)
        del batch["labels"]
        trainer = kd_trainer(
            student, arguments(), teacher_model=teacher, loss_kwargs={"temperature": 2.0}
        )
        without = trainer.compute_loss(student, batch)
        rows = models.counted_without_labels(student, batch, torch.Size((1, 12)), True)
        assert rows.sum() == 9 and float(without) > 0


def test_a_model_that_reads_across_examples_is_refused(arguments: Callable[..., Any]) -> None:
    """With a mask of ones transformers ignores the boundaries; attention ignores seq_idx alone."""
    student, teacher = family("LlamaForCausalLM")
    ones = torch.ones(1, 12, dtype=torch.int64)
    for extra in (
        {"position_ids": POSITIONS, "attention_mask": ones},
        {"seq_idx": ones.cumsum(-1) // 5},
    ):
        trainer = kd_trainer(student, arguments(), teacher_model=teacher)
        with pytest.raises(
            ValueError, match="the student reads across the examples of a packed batch"
        ):
            trainer.compute_loss(student, packed(**extra))
    blind = Wrapper(teacher)
    trainer = kd_trainer(student, arguments(), teacher_model=blind)
    with pytest.raises(ValueError, match="teacher_model reads across the examples"):
        trainer.compute_loss(student, packed(position_ids=POSITIONS))


# ---- what a model adds to its loss


class Penalized(transformers.LlamaForCausalLM):
    """A subclass whose loss has an extra term, which only a call with labels returns."""

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        outputs = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            outputs.loss = outputs.loss + 0.01 * self.penalty()
        return outputs

    def penalty(self) -> Tensor:
        return self.lm_head.weight.square().mean()


class AlwaysPenalised(transformers.LlamaForCausalLM):
    """A subclass that also returns its extra term without labels."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        term = 0.01 * self.lm_head.weight.square().mean()
        outputs.loss = term if outputs.loss is None else outputs.loss + term
        return outputs


def of_llama(kind: type) -> nn.Module:
    model = tiny_models.built("LlamaForCausalLM", seed=1)
    model.__class__ = kind
    return model


OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Batch], Tensor]]] = {
    "a router's": (
        lambda: tiny_models.built("MixtralForCausalLM", seed=1, router_aux_loss_coef=0.05),
        lambda model, batch: 0.05 * model(batch["input_ids"], batch["attention_mask"]).aux_loss,
    ),
    "with labels": (
        lambda: of_llama(Penalized), lambda model, batch: 0.01 * model.lm_head.weight.square().mean(),
    ),
    "always": (
        lambda: of_llama(AlwaysPenalised), lambda model, batch: 0.01 * model.lm_head.weight.square().mean(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_extra_loss_terms_are_kept(name: str, fused: bool, arguments: Callable[..., Any]) -> None:
    """An added term keeps its coefficient, in value, gradient and log."""
    build, term = OWN[name]
    student, teacher = build(), family("LlamaForCausalLM")[1]
    batch = token_labels()
    trainer = kd_trainer(student, arguments(), teacher_model=teacher, fused=fused)
    actual = trainer.compute_loss(student, dict(batch))
    actual.backward()
    gradient = student.lm_head.weight.grad.clone()
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    student.zero_grad()
    s = student(**inputs).logits[:, :-1]
    own = term(student, batch)
    expected = exact(s, logits_by_hand(teacher, inputs)[:, :-1], batch["labels"][:, 1:]) + own
    assert float(own) > 1e-4
    assert float(actual) == pytest.approx(float(expected), rel=2e-6)
    expected.backward()
    torch.testing.assert_close(gradient, student.lm_head.weight.grad, rtol=1e-4, atol=1e-7)
    logs: dict[str, float] = {}
    trainer.log(logs)
    assert logs["own_loss"] == pytest.approx(float(own), rel=1e-5)
    assert 0.7 * logs["kd_loss"] + 0.3 * logs["ce_loss"] + logs["own_loss"] == pytest.approx(
        float(actual), rel=1e-5
    )
    dropped = kd_trainer(student, arguments(), teacher_model=teacher, fused=fused, own_loss="drop")
    value = dropped.compute_loss(student, dict(batch))
    assert float(value) == pytest.approx(float(expected - own), rel=2e-6)


def test_extra_loss_terms_are_averaged_over_a_step(arguments: Callable[..., Any]) -> None:
    """Four batches of one add the same mean over rows as one batch of four."""
    student, teacher = of_llama(Penalized), family("LlamaForCausalLM")[1]
    batch = token_labels(4)
    trainer = kd_trainer(student, arguments(), teacher_model=teacher)
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    whole = float(trainer.compute_loss(student, batch, num_items_in_batch=items))
    parts = [
        float(
            trainer.compute_loss(
                student, {n: v[i : i + 1] for n, v in batch.items()}, num_items_in_batch=items
            )
        )
        for i in range(4)
    ]
    assert sum(parts) == pytest.approx(whole, rel=1e-5)


def test_terms_that_a_function_cannot_keep(arguments: Callable[..., Any]) -> None:
    """The Trainer withholds labels from the student, so only terms that it returns without labels can be kept."""
    teacher, batch = family("LlamaForCausalLM")[1].eval(), token_labels()
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    mixture = OWN["a router's"][0]()
    func = compute_loss_func(mixture, teacher, **LOSS)
    outputs = mixture(**inputs)
    expected = exact(
        outputs.logits[:, :-1], logits_by_hand(teacher, inputs)[:, :-1], batch["labels"][:, 1:]
    )
    actual = func(outputs, batch["labels"])
    assert float(actual) == pytest.approx(float(expected + 0.05 * outputs.aux_loss), rel=2e-6)
    student = of_llama(Penalized)
    func = compute_loss_func(student, teacher, **LOSS)
    with pytest.raises(ValueError, match="adds a loss of its own .* own_loss='drop'"):
        func(student(**inputs), batch["labels"])
    func = compute_loss_func(of_llama(Penalized), teacher, own_loss="drop", **LOSS)


class CustomLoss(nn.Module):
    """A model that computes its loss without torch's cross-entropy, optionally with an extra term."""

    def __init__(self, extra: float) -> None:
        super().__init__()
        self.embedding, self.head, self.extra = nn.Embedding(61, 8), nn.Linear(8, 61), extra

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.embedding(input_ids))
        if labels is None:
            return {"logits": logits}
        picked = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].unsqueeze(-1))
        return {"loss": self.extra - picked.mean(), "logits": logits}


def test_a_loss_without_torchs_cross_entropy(arguments: Callable[..., Any]) -> None:
    """The loss's value shows how labels are aligned; a term that it cannot show must be declared."""
    ids = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(1))
    student, teacher = CustomLoss(0.0), CustomLoss(0.0)
    batch = {"input_ids": ids, "labels": ids}
    trainer = kd_trainer(student, arguments(), teacher_model=teacher)
    s, t = (m(ids)["logits"].detach()[:, :-1] for m in (student, teacher))
    expected = float(exact(s, t, ids[:, 1:]))
    assert float(trainer.compute_loss(student, batch)) == pytest.approx(expected, rel=2e-6)
    student.extra = 0.3
    trainer = kd_trainer(student, arguments(), teacher_model=teacher)
    with pytest.raises(
        ValueError, match="own_loss='drop' to leave that out, and pass shift_labels"
    ):
        trainer.compute_loss(student, batch)
    trainer = kd_trainer(
        student, arguments(), teacher_model=teacher, own_loss="drop", shift_labels=True
    )
    assert float(trainer.compute_loss(student, batch)) == pytest.approx(expected, rel=2e-6)


def test_inspecting_a_model_has_no_side_effects(arguments: Callable[..., Any]) -> None:
    """Random numbers, buffers, gradients and modes are the same as without the first inspection of the model."""
    student = tiny_models.built("LlamaForCausalLM", seed=1, attention_dropout=0.5)
    student.register_buffer("count", torch.zeros(()))
    student.register_forward_hook(lambda m, *_: m.count.add_(1) and None)
    teacher = family("LlamaForCausalLM")[1]
    trainer = kd_trainer(student.train(), arguments(), teacher_model=teacher)
    torch.manual_seed(3)
    first = trainer.compute_loss(student, token_labels())
    assert student.count == 1 and student.training
    torch.manual_seed(3)
    assert torch.equal(trainer.compute_loss(student, token_labels()), first)
    assert all(p.grad is None for p in student.parameters())


# ---- conditions


def test_both_models_run_without_a_kv_cache(arguments: Callable[..., Any]) -> None:
    student, teacher = family("LlamaForCausalLM")
    seen: list[Any] = []
    for model in (student, teacher):
        model.register_forward_pre_hook(
            lambda m, a, k: seen.append(k.get("use_cache")), with_kwargs=True
        )
    kd_trainer(student, arguments(use_cache=True), teacher_model=teacher).compute_loss(
        student, token_labels()
    )
    assert len(seen) >= 2 and set(seen) == {False}


def test_mixed_precision_applies_to_the_teacher(arguments: Callable[..., Any]) -> None:
    """Autocast applies to the function's teacher, too, which accelerate has not prepared."""
    from accelerate.state import AcceleratorState

    student, teacher = family("LlamaForCausalLM")
    dtypes: list[torch.dtype] = []
    teacher.lm_head.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    func = compute_loss_func(student, teacher.eval(), **LOSS)
    data = [{n: v[i] for n, v in token_labels().items()} for i in range(3)]
    try:
        args = arguments(bf16=True, per_device_train_batch_size=3)
        transformers.Trainer(student, args, train_dataset=data, compute_loss_func=func).train()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert dtypes and set(dtypes) == {torch.bfloat16}


# ---- encoder-decoders


def test_decoder_inputs_come_from_the_batch_or_the_model(arguments: Callable[..., Any]) -> None:
    """decoder_input_ids of a batch are used; the function cannot make them, and its message says who can."""
    student, teacher = family("T5ForConditionalGeneration")
    batch = token_labels()
    inputs = batch | {"decoder_input_ids": torch.full_like(batch["labels"], 7)}
    trainer = kd_trainer(student, arguments(), teacher_model=teacher)
    s, t = (logits_by_hand(m, inputs) for m in (student, teacher))
    expected = float(exact(s, t, batch["labels"]))
    assert float(trainer.compute_loss(student, inputs)) == pytest.approx(expected, rel=2e-6)
    compute_loss_func(student, teacher.eval(), **LOSS)
    with pytest.raises(ValueError, match="DataCollatorForSeq2Seq"):
        student(input_ids=batch["input_ids"])


# ---- shapes


class SoftPrompt(nn.Module):
    """A model with two learned positions before the tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.prompt = model, nn.Parameter(torch.randn(2, 16))

    def forward(self, input_ids: Tensor) -> Any:
        embedded = self.model.get_input_embeddings()(input_ids)
        prompt = self.prompt.expand(len(input_ids), -1, -1)
        return self.model(inputs_embeds=torch.cat([prompt, embedded], 1))


def test_more_positions_than_labels(arguments: Callable[..., Any]) -> None:
    student, teacher = family("LlamaForCausalLM")
    prompted = SoftPrompt(student)
    ids = texts()["input_ids"]
    trainer = kd_trainer(prompted, arguments(), teacher_model=teacher, shift_labels=True)
    with pytest.raises(
        ValueError,
        match=r"labels are \(3, 6\) and .* rows \(3, 8\); 2 positions, such as those of a soft",
    ):
        trainer.compute_loss(prompted, {"input_ids": ids, "labels": ids})


def test_vocabularies_of_two_widths(arguments: Callable[..., Any]) -> None:
    """The message names an existing argument, and following its advice helps."""
    student = tiny_models.built("LlamaForCausalLM", seed=1)
    teacher = tiny_models.built("LlamaForCausalLM", seed=2, vocab_size=64)
    batch = token_labels()
    for fused in (False, True):
        trainer = kd_trainer(student, arguments(), teacher_model=teacher, fused=fused)
        with pytest.raises(
            ValueError,
            match=r"61 columns and the teacher's 64; .*loss_kwargs=\{'vocab_size': \.\.\.\}",
        ):
            trainer.compute_loss(student, batch)
        options = LOSS | {"vocab_size": 61}
        trainer = kd_trainer(
            student, arguments(), teacher_model=teacher, fused=fused, loss_kwargs=options
        )
        assert float(trainer.compute_loss(student, batch)) > 0
    func = compute_loss_func(student, teacher.eval())
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="pass vocab_size=... to compute_loss_func"):
        func(student(**inputs), batch["labels"])


class AdaptedHead(nn.Linear):
    """A head like LoRA's: named like a linear layer, but with more than a weight."""


AdaptedHead.__qualname__ = AdaptedHead.__name__ = "Linear"


def test_heads_that_cannot_be_fused(arguments: Callable[..., Any]) -> None:
    student, teacher = family("LlamaForCausalLM")
    student.lm_head.__class__ = AdaptedHead
    trainer = kd_trainer(student, arguments(), teacher_model=teacher, fused=True)
    with pytest.raises(ValueError, match="got a test_compat_families.Linear, .*merge_and_unload"):
        trainer.compute_loss(student, token_labels())
    pair = family("BertForSequenceClassification")
    trainer = kd_trainer(pair[0], arguments(), teacher_model=pair[1], fused=True)
    with pytest.raises(
        ValueError, match="of BertForSequenceClassification returns none; leave fused out"
    ):
        trainer.compute_loss(pair[0], class_labels())


# ---- Lightning and the Distiller


def lightning_module(student: nn.Module, teacher: nn.Module, **options: Any) -> Any:
    pytest.importorskip("lightning", reason="pip install 'fastkd[peers]' brings Lightning")
    from fastkd.compat.lightning import DistillationModule

    inputs = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)} | options
    return DistillationModule(student, teacher, fastkd.KDLoss(**LOSS), **inputs)


def mean_of(module: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """(the mean loss of one batch, its logged values)"""
    from fastkd.compat.lightning import UNIT

    logged: dict[str, Any] = {}
    module.log_dict = lambda values, **_: logged.update(values)
    loss = module.training_step(dict(batch), 0)
    rows, module._rows = module._rows, None
    return loss * UNIT / rows, {name.removeprefix("train_"): float(v) for name, v in logged.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_in_lightning(name: str) -> None:
    student, teacher = family(name)
    batch = FAMILIES[name][0](3)
    expected = by_hand(name, student, teacher, batch)
    module = lightning_module(student, teacher)
    actual, logged = mean_of(module, batch)
    assert float(actual) == pytest.approx(expected, rel=2e-6)
    assert logged["loss"] == pytest.approx(expected, rel=2e-6)
    assert "own_loss" not in logged


def test_packed_examples_in_lightning() -> None:
    student, teacher = family("LlamaForCausalLM")
    expected = loss_of_separate_examples(student, teacher)
    actual, _ = mean_of(lightning_module(student, teacher), packed(position_ids=POSITIONS))
    assert float(actual) == pytest.approx(expected, rel=2e-6)
    ones = torch.ones(1, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match="the student reads across the examples"):
        mean_of(
            lightning_module(student, teacher), packed(position_ids=POSITIONS, attention_mask=ones)
        )


@pytest.mark.parametrize("name", OWN)
def test_extra_loss_terms_in_lightning(name: str) -> None:
    build, term = OWN[name]
    student, teacher, batch = build(), family("LlamaForCausalLM")[1], token_labels()
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    s, t = student(**inputs).logits[:, :-1], logits_by_hand(teacher, inputs)[:, :-1]
    own = float(term(student, batch))
    expected = float(exact(s, t, batch["labels"][:, 1:]))
    actual, logged = mean_of(lightning_module(student, teacher), batch)
    assert float(actual) == pytest.approx(expected + own, rel=2e-6)
    assert logged["own_loss"] == pytest.approx(own, rel=1e-5)
    actual, logged = mean_of(lightning_module(student, teacher, own_loss="drop"), batch)
    assert float(actual) == pytest.approx(expected, rel=2e-6) and "own_loss" not in logged


def test_unknown_modules_in_lightning() -> None:
    """Labels belong to the rows; labels equal to the inputs cannot, so shift_labels is required."""
    student, teacher = (Wrapper(m) for m in family("LlamaForCausalLM"))
    batch = token_labels()
    batch["labels"] = models.targets(batch["labels"], True)
    s, t = (m(batch["input_ids"], batch["attention_mask"])[0] for m in (student, teacher))
    expected = float(exact(s, t, batch["labels"]))
    assert float(mean_of(lightning_module(student, teacher), batch)[0]) == pytest.approx(
        expected, rel=2e-6
    )
    with pytest.raises(
        ValueError,
        match="shift_labels must be True or False for this student, got .auto.: the labels equal",
    ):
        mean_of(lightning_module(student, teacher), token_labels())
    actual, _ = mean_of(lightning_module(student, teacher, shift_labels=True), token_labels())
    assert float(actual) == pytest.approx(expected, rel=2e-6)
    with pytest.raises(
        ValueError, match="must have labels under the name .labels., got input_ids, attention_mask"
    ):
        mean_of(lightning_module(student, teacher), texts())


def test_the_distiller_runs_both_models_alike() -> None:
    """Columns that only one model takes, a KV cache that neither keeps, and a term that a student adds."""
    student = tiny_models.built("DistilBertForSequenceClassification", seed=1, num_labels=5)
    teacher = tiny_models.built("BertForSequenceClassification", seed=2, num_labels=5)
    batch = class_labels(4)
    labels = batch.pop("labels")
    kinds = (torch.arange(6) > 2).long().expand(4, 6) * batch["attention_mask"]
    terms = {"kd": fastkd.distiller.Term(fastkd.KDLoss(**LOSS))}
    s, t = (
        logits_by_hand(student, batch),
        logits_by_hand(teacher, batch | {"token_type_ids": kinds}),
    )
    loss, _ = fastkd.distiller.Distiller(student, teacher, terms)(
        **batch, token_type_ids=kinds, labels=labels
    )
    assert float(loss) == pytest.approx(float(exact(s, t, labels)), rel=2e-6)
    student, teacher = family("LlamaForCausalLM")
    rows = {"position_ids": POSITIONS, "input_ids": packed()["input_ids"]}
    targets = models.targets(rows["input_ids"], True, models.starts(rows, POSITIONS.shape))
    loss, parts = fastkd.distiller.Distiller(student, teacher, terms)(**rows, labels=targets)
    assert (
        float(loss) == pytest.approx(loss_of_separate_examples(student, teacher), rel=2e-6)
        and "own_loss" not in parts
    )
    distiller = fastkd.distiller.Distiller(student, teacher, terms)
    ones = torch.ones(1, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match="the student reads across the examples"):
        distiller(**rows, attention_mask=ones, labels=targets)
    with pytest.raises(TypeError, match="imput_ids is an input of neither model"):
        fastkd.distiller.Distiller(Wrapper(student), Wrapper(teacher), terms)(imput_ids=ones)


@pytest.mark.parametrize("name", ["a router's", "always"])
def test_extra_loss_terms_in_the_distiller(name: str) -> None:
    build, term = OWN[name]
    student, teacher, batch = build(), family("LlamaForCausalLM")[1], token_labels()
    terms = {"kd": fastkd.distiller.Term(fastkd.KDLoss(**LOSS), weight=0.5)}
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    own = float(term(student, batch))
    with fastkd.distiller.Distiller(student, teacher, terms) as distiller:
        loss, parts = distiller(**inputs, labels=models.targets(batch["labels"], True))
    assert float(parts["own_loss"]) == pytest.approx(own, rel=1e-5)
    assert float(loss) == pytest.approx(0.5 * float(parts["kd"]) + own, rel=1e-6)
    with fastkd.distiller.Distiller(student, teacher, terms, own_loss="drop") as distiller:
        loss, parts = distiller(**inputs, labels=models.targets(batch["labels"], True))
    assert (
        float(loss) == pytest.approx(0.5 * float(parts["kd"]), rel=1e-6) and "own_loss" not in parts
    )


def test_an_encoder_decoder_in_the_distiller() -> None:
    student, teacher = family("T5ForConditionalGeneration")
    batch = token_labels()
    expected = by_hand("T5ForConditionalGeneration", student, teacher, batch)
    terms = {"kd": fastkd.distiller.Term(fastkd.KDLoss(**LOSS))}
    loss, _ = fastkd.distiller.Distiller(student, teacher, terms)(**batch)
    assert float(loss) == pytest.approx(expected, rel=2e-6)
