"""fastkd.compat.trl's GOLDTrainer and its divergence against TRL's, with one tokenizer and with two."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support import tiny_models
from test_compat_trl import PROMPTS, common, count_calls
from test_compat_trl_served import ANSWERS, assert_equal_training
from torch import Tensor
from trl.experimental.gold import GOLDConfig, GOLDTrainer, gold_trainer

import fastkd.compat.trl as adapter

stock_jsd = GOLDTrainer.generalized_jsd_loss
BETAS = [0.0, 0.3, 0.5, 1.0]


# ---- the divergence


def masses(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Probabilities [2, 6, 25] of common tokens; merged groups make their sums small, and some are below 1e-8."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2, 2, 6, 40, generator=generator, dtype=torch.float64)
    logits[:, 1, 2:, 7] -= 60
    student, teacher = logits.softmax(-1)[..., :25] * torch.logspace(-4, 0, 6).unsqueeze(-1)
    return student.to(dtype), teacher.to(dtype)


def with_gradients(loss: Any, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    student, teacher = (x.requires_grad_() for x in masses(dtype))
    value = loss(student, teacher, logits_are_probs=True, **options)
    value.sum().mul(1.7).backward()
    return [x.detach().double() for x in (value, student.grad, teacher.grad)]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("counted", [True, False])
def test_probabilities(beta: float, reduction: str, counted: bool) -> None:
    labels = torch.zeros(2, 6, dtype=torch.int64)
    labels[0, 1] = labels[1, :2] = -100
    options = {"beta": beta, "reduction": reduction, "labels": labels if counted else None}
    for items in (None, 7, torch.tensor(7)):
        given = options | {"num_items_in_batch": items}
        exact = with_gradients(stock_jsd, torch.float64, **given)
        stock = with_gradients(stock_jsd, torch.float32, **given)
        actual = with_gradients(adapter.gold_jsd_loss, torch.float32, **given)
        for a, b, c in zip(actual, stock, exact, strict=True):
            assert a.shape == c.shape
            # Relative to each element: a gradient with respect to a probability is as large as its logarithm, or more.
            error, bar = (a - c).abs(), 2 * (b - c).abs().max() + 2e-6 * c.abs().clamp(min=1e-3)
            assert (error <= bar).all()
    assert with_gradients(adapter.gold_jsd_loss, torch.bfloat16, **options)[0].isfinite().all()
    assert (
        adapter.gold_jsd_loss(*masses(torch.bfloat16), logits_are_probs=True).dtype == torch.float32
    )


def test_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 4 * torch.randn(2, 2, 6, 40, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[1, -100, 3, 4, 5, 6], [-100] * 6])
    for options in (
        {},
        {"labels": labels, "num_items_in_batch": 9, "temperature": 0.9, "beta": 0.2},
    ):
        torch.testing.assert_close(
            adapter.gold_jsd_loss(student, teacher, **options),
            stock_jsd(student, teacher, **options),
        )


def test_rows_of_no_token_that_counts() -> None:
    labels = torch.full((2, 6), -100)
    for reduction in ("batchmean", "sum", "mean"):
        student, teacher = (x.requires_grad_() for x in masses(torch.float32))
        loss = adapter.gold_jsd_loss(
            student, teacher, labels, reduction=reduction, logits_are_probs=True
        )
        loss.backward()
        assert loss.item() == 0.0 and not student.grad.any()


def test_signature_and_errors() -> None:
    expected = {n: p.default for n, p in inspect.signature(stock_jsd).parameters.items()}
    actual = {n: p.default for n, p in inspect.signature(adapter.gold_jsd_loss).parameters.items()}
    assert actual == expected
    student, teacher = masses(torch.float32)
    for probabilities in (True, False):
        with pytest.raises(ValueError, match="reduction must be one of .*; got 'nonne'"):
            adapter.gold_jsd_loss(
                student, teacher, reduction="nonne", logits_are_probs=probabilities
            )
        with pytest.raises(ValueError, match="teacher_logits must have"):
            adapter.gold_jsd_loss(student, teacher[..., 1:], logits_are_probs=probabilities)
        with pytest.raises(ValueError, match="beta must be in"):
            adapter.gold_jsd_loss(student, teacher, beta=2.0, logits_are_probs=probabilities)


# ---- the trainer


def byte_tokenizer(size: int, text: str = tiny_models.TEXT) -> Any:
    """A byte-level BPE tokenizer, which GOLD's alignment needs, with size - 259 merges learned from a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([text], trainer)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **names)
    tokenizer.chat_template = tiny_models.CHAT
    return tokenizer


SIZES = (300, 280)  # of the student's tokenizer and of the teacher's


def gold(kind: type, path: Path, **options: Any) -> Any:
    """Half of the batches are on-policy. With use_uld_loss, the teacher has other merges than the student."""
    tokenizer = byte_tokenizer(SIZES[0])
    teacher_size = SIZES[0]
    if options.get("use_uld_loss"):
        teacher_size = SIZES[1]
        other = byte_tokenizer(
            SIZES[1], "void and form were the heaven; without earth, no beginning"
        )
        other.save_pretrained(path / "teacher")
        options.setdefault("teacher_tokenizer_name_or_path", str(path / "teacher"))
    own = {"max_length": 60, "max_completion_length": 8, "lmbda": 0.5, "learning_rate": 0.1}
    args = GOLDConfig(**common(path) | own | options)
    chats = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": a}]
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    data = Dataset.from_dict({"messages": chats})
    return kind(
        model=tiny_models.llama(SIZES[0], seed=1), teacher_model=tiny_models.llama(teacher_size, width=24, seed=2),
        args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
    )  # fmt: skip


HYBRID = {"use_uld_loss": True, "uld_use_hybrid_loss": True}
GOLD = {
    "one tokenizer": ({"beta": 0.3, "temperature": 1.4}, 10),
    "sorted": ({"use_uld_loss": True}, 0),
    "hybrid": (HYBRID | {"beta": 0.4}, 20),
    "hybrid, bayesian": (
        HYBRID | {
            "beta": 0.0, "uld_token_merge_strategy": "bayesian", "uld_hybrid_matched_weight": 0.7,
            "uld_hybrid_unmatched_weight": 0.4, "uld_crossentropy_weight": 0.2,
        }, 20,
    ),
    "hybrid, by position": (HYBRID | {"beta": 1.0, "use_extended_uld": False}, 20),
}  # fmt: skip


@pytest.mark.parametrize("case", GOLD)
def test_gold_trainer(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps of two batches of two answers, each of which has a divergence of its own with two tokenizers."""
    options, expected_calls = GOLD[case]
    calls = count_calls(monkeypatch, "kd_loss")
    start = torch.cat(
        [p.detach().flatten() for p in tiny_models.llama(SIZES[0], seed=1).parameters()]
    )
    trainer = assert_equal_training(
        lambda kind: gold(kind, tmp_path, **options), GOLDTrainer, start=start
    )
    assert len(calls) == expected_calls
    if expected_calls == 20:
        assert {"matched_loss", "unmatched_loss"} <= trainer.state.log_history[0].keys()


def test_tokens_are_merged_into_common_spans(tmp_path: Path) -> None:
    """The two tokenizers split the answers differently, so the tests above merge tokens."""
    student, teacher = (
        byte_tokenizer(SIZES[0]),
        byte_tokenizer(SIZES[1], "void and form were the heaven"),
    )
    lengths = [[len(t(answer)["input_ids"]) for answer in ANSWERS] for t in (student, teacher)]
    assert lengths[0] != lengths[1]
    common_tokens = student.get_vocab().keys() & teacher.get_vocab().keys()
    assert 259 < len(common_tokens) < SIZES[1]


def test_the_rows_that_trl_merges(tmp_path: Path) -> None:
    """ "observed" compares the distributions after the first token of a span, and "bayesian" those that predict it."""
    trainer = gold(adapter.GOLDTrainer, tmp_path, **HYBRID)
    logits = torch.zeros(1, 5, SIZES[0])
    teacher_logits = torch.zeros(1, 5, SIZES[1])
    logits[0, 2, 40] = 9.0  # the row of the answer's only token, which predicts what follows it
    labels, ids = torch.tensor([[-100, -100, 5, 1, -100]]), torch.tensor([[7, 6, 5, 1, 0]])
    offsets = torch.tensor([[[0, 0], [0, 0], [0, 3], [3, 3], [3, 3]]])
    losses = {}
    for strategy in ("observed", "bayesian"):
        trainer.uld_loss_fn.token_merge_strategy = strategy
        for row in (1, 2):
            moved = logits.roll(row - 2, 1)
            losses[strategy, row] = trainer.uld_loss_fn(
                moved, teacher_logits, labels, labels, ids, ids, offsets, offsets
            ).item()
    assert losses["observed", 2] > 10 * losses["observed", 1]
    assert losses["bayesian", 1] > 10 * losses["bayesian", 2]


@pytest.mark.parametrize(("options", "expected"), [({}, 0.25), (HYBRID, 4.0)])
def test_gradient_accumulation(options: dict[str, Any], expected: float, tmp_path: Path) -> None:
    """TRL's divisors depend on how a step is split, which docs/stacks/trl.md says. The same four answers are
    in one batch or in four."""
    moved = []
    for steps in (1, 4):
        trainer = gold(
            adapter.GOLDTrainer, tmp_path, **options, lmbda=0.0, max_steps=1, learning_rate=1.0, max_grad_norm=0.0,
            gradient_accumulation_steps=steps, per_device_train_batch_size=4 // steps,
        )  # fmt: skip
        start = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        parameters = trainer.model.parameters()
        moved.append(
            torch.cat([(p.detach() - x).flatten() for p, x in zip(parameters, start, strict=True)])
        )
    torch.testing.assert_close(moved[1], expected * moved[0], rtol=1e-3, atol=1e-5)
    assert moved[0].abs().max() > 1e-3


def test_evaluation(tmp_path: Path) -> None:
    losses = [
        gold(kind, tmp_path, **HYBRID).evaluate()["eval_loss"]
        for kind in (GOLDTrainer, adapter.GOLDTrainer)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_no_common_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error says what to do; TRL's max() of an empty list fails."""
    vocabulary = byte_tokenizer(SIZES[0]).get_vocab
    for kind, message in (
        (GOLDTrainer, "max"),
        (adapter.GOLDTrainer, "these two have none in common; set uld_use_hybrid_loss=False"),
    ):
        monkeypatch.setattr(
            "transformers.PreTrainedTokenizerFast.get_vocab",
            lambda self: {f"{len(self)} {word}": i for word, i in vocabulary().items()},
        )
        with pytest.raises(ValueError, match=message):
            gold(kind, tmp_path, **HYBRID)


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """GOLDTrainer keeps the router's auxiliary loss, which TRL's omits."""
    losses = []
    for kind in (GOLDTrainer, adapter.GOLDTrainer):
        trainer = gold(kind, tmp_path, lmbda=0.0, max_steps=1)
        torch.manual_seed(0)
        student = tiny_models.built(
            "MixtralForCausalLM",
            vocab_size=SIZES[0],
            max_position_embeddings=64,
            router_aux_loss_coef=0.5,
        )
        args = trainer.args
        again = kind(
            model=student, teacher_model=tiny_models.llama(SIZES[0], seed=2), args=args,
            train_dataset=Dataset.from_dict({"messages": trainer.train_dataset["messages"]}),
            processing_class=byte_tokenizer(SIZES[0]),
        )  # fmt: skip
        again.train()
        losses.append(again.state.log_history[0])
    aux = 0.5 * losses[1]["aux_loss"]
    assert aux > 0.25
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"] + aux, rel=1e-5)


def test_trl_is_not_patched() -> None:
    actual = adapter.GOLDTrainer
    assert gold_trainer.ULDLoss.__module__ == gold_trainer.__name__
    assert GOLDTrainer.__init__.__globals__["ULDLoss"] is gold_trainer.ULDLoss
    assert issubclass(actual.__init__.__globals__["ULDLoss"], gold_trainer.ULDLoss)
    assert GOLDTrainer.generalized_jsd_loss is stock_jsd
