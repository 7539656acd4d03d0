"""Generated sequences: which tokens are prompt, completion and padding, and which branch a step takes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import fastkd
from fastkd import sequences
from fastkd.sequences import gkd_step, shift, teacher_targets

PAD, EOS, V = 0, 1, 29


def llama(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=2, attention_dropout=0.5,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(4.0)  # so that the model does not repeat one token for ever
    return model.train()


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return llama(1), llama(2)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    yield


PROMPTS = [[5, 6, 7], [8], [9, 0, 4, 3, 11]]  # including the padding token


def padded(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = (
        torch.full((len(rows), width), PAD),
        torch.zeros(len(rows), width, dtype=torch.int64),
    )
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return ids, mask


class ScriptedModel(nn.Module):
    """A model that completes every prompt with fixed tokens and records its arguments."""

    def __init__(self, completions: list[list[int]], eos: Any = EOS) -> None:
        super().__init__()
        self.completions = torch.tensor(completions)
        self.generation_config = SimpleNamespace(eos_token_id=eos)
        self.inner = nn.Dropout().eval()
        self.seen: dict[str, Any] = {}

    def generate(self, **arguments: Any) -> Any:
        self.seen = arguments | {"training": self.training, "grad": torch.is_grad_enabled()}
        several = len(self.completions) // len(arguments["input_ids"])
        ids = torch.cat([arguments["input_ids"].repeat_interleave(several, 0), self.completions], 1)
        return SimpleNamespace(sequences=ids) if arguments.get("return_dict_in_generate") else ids


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_labels_are_the_completion(left: bool, wrapped: bool) -> None:
    teacher = ScriptedModel([[4, EOS, PAD, PAD], [3, 3, 3, 3], [PAD, 5, 6, EOS]])
    actual = teacher_targets(
        teacher,
        *padded(PROMPTS, left),
        pad_token_id=PAD,
        num_beams=2,
        return_dict_in_generate=wrapped,
    )
    # The teacher continues prompts that are padded on the left.
    assert torch.equal(teacher.seen["input_ids"], padded(PROMPTS, True)[0])
    assert torch.equal(teacher.seen["attention_mask"], padded(PROMPTS, True)[1])
    assert teacher.seen["num_beams"] == 2 and teacher.seen["eos_token_id"] == [EOS]
    assert not teacher.seen["training"] and not teacher.seen["grad"]
    assert teacher.training and not teacher.inner.training
    answers = [[4, EOS], [3, 3, 3, 3], [PAD, 5, 6, EOS]]
    rows = [prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)]
    ids, mask = padded(rows, left=False)
    assert torch.equal(actual.input_ids, ids) and torch.equal(actual.attention_mask, mask)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        end = len(prompt) + len(answer)
        assert actual.labels[i].tolist() == [-100] * len(prompt) + answer + [-100] * (9 - end)


def test_completions_end_at_the_end_token() -> None:
    prompts = torch.tensor([[5, 6], [7, 8]])
    both = teacher_targets(
        ScriptedModel([[4, 3, 9], [9, 3, 4]]), prompts, pad_token_id=PAD, eos_token_id=[3, 9]
    )
    assert both.labels.tolist() == [[-100, -100, 4, 3], [-100, -100, 9, -100]]
    # Without an end-of-sequence token: everything that is not padding.
    free = teacher_targets(
        ScriptedModel([[4, PAD, PAD], [PAD, 3, 4]], eos=None), prompts, pad_token_id=PAD
    )
    assert free.labels.tolist() == [[-100, -100, 4, -100, -100], [-100, -100, PAD, 3, 4]]
    # The end token is also the padding: the first one belongs to the completion.
    same = teacher_targets(
        ScriptedModel([[4, PAD, PAD], [5, 3, 4]], eos=PAD), prompts, pad_token_id=PAD
    )
    assert same.labels.tolist() == [[-100, -100, 4, PAD, -100], [-100, -100, 5, 3, 4]]
    assert same.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    several = teacher_targets(
        ScriptedModel([[4], [5], [6], [9]]), prompts, pad_token_id=PAD, num_return_sequences=2
    )
    assert several.input_ids.tolist() == [[5, 6, 4], [5, 6, 5], [7, 8, 6], [7, 8, 9]]


def test_a_batch_equals_prompts_one_by_one(models: tuple[Any, Any]) -> None:
    _, teacher = models
    options: dict[str, Any] = {
        "pad_token_id": PAD,
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": 3,
    }
    together = teacher_targets(teacher, *padded(PROMPTS, left=False), **options)
    for i, prompt in enumerate(PROMPTS):
        alone = teacher_targets(teacher, torch.tensor([prompt]), **options)
        there = together.attention_mask[i] == 1
        assert torch.equal(together.input_ids[i][there], alone.input_ids[0])
        assert torch.equal(together.labels[i][there], alone.labels[0])
    assert teacher.training
    # The loss of the completions equals the model's own loss for these labels.
    teacher.eval()
    output = teacher(together.input_ids, together.attention_mask, labels=together.labels)
    logits, labels = shift(output.logits, together.labels)
    torch.testing.assert_close(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), output.loss)
    actual = fastkd.kd_loss(logits, logits.detach(), labels, alpha=0.0)
    torch.testing.assert_close(actual, output.loss)
    teacher.train()


def batch() -> dict[str, Tensor]:
    ids, mask = padded([[5, 6, 7, 8, EOS], [9, 4, 3], [11, 12, 13, 14]], left=False)
    labels = ids.masked_fill(mask == 0, -100)
    for row, prompt in enumerate((2, 1, 2)):
        labels[row, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_loss_on_the_dataset(models: tuple[Any, Any], beta: float) -> None:
    """The divergence of next-token distributions over completions, by a loop over positions."""
    student, teacher = models
    inputs = batch()
    student.eval()
    step = gkd_step(
        student, teacher, inputs, pad_token_id=PAD, on_policy_fraction=0.0, beta=beta, temperature=2.0,
        scale_by_temperature=False,
    )  # fmt: skip
    assert not step.on_policy and teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    s = student(inputs["input_ids"], inputs["attention_mask"]).logits
    with torch.no_grad():
        t = teacher.eval()(inputs["input_ids"], inputs["attention_mask"]).logits
    teacher.train()
    values = []
    for row, position in (inputs["labels"] != -100).nonzero().tolist():
        p, q = (z[row, position - 1].div(2.0).softmax(-1) for z in (t, s))
        m = beta * p + (1 - beta) * q
        kl = {0.0: (p, q), 1.0: (q, p)}.get(beta)
        if kl:
            values.append((kl[0] * (kl[0] / kl[1]).log()).sum())
        else:
            values.append(beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum())
    torch.testing.assert_close(step.loss, torch.stack(values).mean(), rtol=1e-4, atol=1e-6)
    actual = torch.autograd.grad(step.loss, list(student.parameters()))
    reference = torch.autograd.grad(torch.stack(values).mean(), list(student.parameters()))
    for a, b in zip(actual, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    student.train()


def test_on_policy(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = models
    written: list[sequences.Sequences] = []
    completed = sequences._generate
    monkeypatch.setattr(
        sequences, "_generate", lambda *a: written.append(completed(*a)) or written[-1]
    )
    options: dict[str, Any] = {
        "pad_token_id": PAD, "on_policy_fraction": 1.0, "generate": {"do_sample": True, "max_new_tokens": 5},
    }  # fmt: skip
    states, steps = [], []
    for _ in range(2):
        torch.manual_seed(len(states))
        state = torch.get_rng_state()
        student.eval()
        steps.append(
            gkd_step(
                student, teacher, batch(), generator=torch.Generator().manual_seed(3), **options
            )
        )
        states.append(torch.equal(state, torch.get_rng_state()))
    assert all(step.on_policy for step in steps) and all(states)
    assert torch.equal(steps[0].loss, steps[1].loss) and steps[0].loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(*written, strict=True))
    # The prompts are the tokens before the first label.
    for row, prompt in enumerate(([5, 6], [9], [11, 12])):
        assert written[0].input_ids[row, : len(prompt)].tolist() == prompt
        counted = (written[0].labels[row] != -100).nonzero().squeeze(1).tolist()
        assert counted == list(range(len(prompt), len(prompt) + len(counted))) and counted
    # The loss is computed on the generated tokens.
    inputs = dict(zip(written[0]._fields, written[0], strict=True))
    again = gkd_step(student, teacher, inputs, pad_token_id=PAD, on_policy_fraction=0.0)
    torch.testing.assert_close(again.loss, steps[0].loss)
    # Separate prompts, and a wrapped student.
    arguments = batch() | dict(
        zip(("prompts", "prompt_attention_mask"), padded([[3, 4], [6], [7, 9]], True), strict=True)
    )

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = student

        def forward(self, **arguments: Any) -> Any:
            return self.module(**arguments)

    student.train()
    assert gkd_step(Wrapped(), teacher, arguments, **options).on_policy
    assert written[-1].input_ids[:, 0].tolist() == [3, 6, 7]
    assert student.training and student.model.training


def test_processes_with_one_seed_take_the_same_branch(models: tuple[Any, Any]) -> None:
    """A share of on_policy_fraction of the steps is on-policy; processes with the same generator decide alike."""
    student, teacher = models
    answers = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(7)
        taken = []
        for _ in range(8):
            torch.rand(3)  # other random draws of a process do not matter
            step = gkd_step(
                student, teacher, batch(), pad_token_id=PAD, on_policy_fraction=0.5, generator=generator,
                generate={"max_new_tokens": 1, "do_sample": False},
            )  # fmt: skip
            taken.append(step.on_policy)
        answers.append(taken)
    assert answers[0] == answers[1] and 0 < sum(answers[0]) < 8


def test_no_label_and_unequal_vocabularies(models: tuple[Any, Any]) -> None:
    student, teacher = models
    arguments = batch()
    arguments["labels"] = torch.full_like(arguments["labels"], -100)
    step = gkd_step(student, teacher, arguments, pad_token_id=PAD, on_policy_fraction=0.0)
    step.loss.backward()
    assert step.loss == 0 and all((p.grad == 0).all() for p in student.parameters())
    student.zero_grad()

    def call(**inputs: Any) -> Any:
        return SimpleNamespace(logits=F.pad(teacher(**inputs).logits, (0, 3)))

    with pytest.raises(ValueError, match="teacher has 32 columns"):
        gkd_step(student, call, batch(), pad_token_id=PAD, on_policy_fraction=0.0)
    options = {"pad_token_id": PAD, "on_policy_fraction": 0.0, "vocab_size": V}
    assert gkd_step(student, call, batch(), **options).loss.isfinite()


def test_errors() -> None:
    ids, teacher = torch.tensor([[5, 6]]), ScriptedModel([[4]])
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"input_ids": ids[0]}, ValueError, r"input_ids must be \[prompts, tokens\], got shape \(2,\)"),
        ({"input_ids": ids.float()}, TypeError, "input_ids must be a tensor of ids, got a torch.float32 tensor"),
        ({"attention_mask": ids[:, :1]}, ValueError, "attention_mask must have the shape of input_ids"),
        ({"attention_mask": 1}, TypeError, "attention_mask must be a tensor, got int"),
        ({"pad_token_id": None}, TypeError, "pad_token_id must be an int, got NoneType"),
    ]  # fmt: skip
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            teacher_targets(teacher, **({"input_ids": ids, "pad_token_id": PAD} | arguments))
    teacher.config = SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(ValueError, match="the model must be a decoder"):
        teacher_targets(teacher, ids, pad_token_id=PAD)
    for options, message in (
        ({"on_policy_fraction": 1.5}, "on_policy_fraction must be in"),
        ({"beta": 2}, "beta must"),
    ):
        with pytest.raises(ValueError, match=message):
            gkd_step(teacher, teacher, batch(), pad_token_id=PAD, **options)


# ---- batches that a step cannot take


PROMPT_LESS = "must have at least one token each for the model to continue; row 1 has none"


def test_the_message_names_a_row_without_a_prompt(models: tuple[Any, Any]) -> None:
    student, teacher = models
    ids = torch.randint(2, V, (2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match=f"prompts {PROMPT_LESS}"):
        teacher_targets(teacher, ids, mask, pad_token_id=PAD)
    for batch, message in (
        ({"prompts": ids, "prompt_attention_mask": mask}, f"prompts {PROMPT_LESS}"),
        (
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": torch.where(mask == 1, torch.where(torch.arange(4) < 2, -100, ids), ids),
            },
            f"tokens before each row's first label, {PROMPT_LESS}",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            gkd_step(student, teacher, batch, pad_token_id=PAD, on_policy_fraction=1.0)


def test_a_batch_of_prompts_alone_needs_a_student_that_generates(models: tuple[Any, Any]) -> None:
    options = {"pad_token_id": PAD, "generate": {"max_new_tokens": 3}}
    prompts = {"prompts": torch.randint(2, V, (2, 4))}
    step = gkd_step(*models, prompts, on_policy_fraction=1.0, **options)
    assert step.on_policy and step.loss.isfinite()
    with pytest.raises(KeyError, match="on_policy_fraction < 1.*lacks .'input_ids'"):
        gkd_step(*models, prompts, on_policy_fraction=0.0, **options)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_ids": [[1, 2]]}, r"batch\['input_ids'\] must be a tensor of integers, got list"),
        ({"labels": torch.ones(2, 4)}, r"batch\['labels'\] must be a tensor of integers"),
        ({"labels": torch.ones(2, 3, dtype=torch.int64)}, r"batch\['labels'\] must have the shape"),
        ({"attention_mask": torch.ones(2, 3)}, r"batch\['attention_mask'\] must have the shape"),
        (
            dict.fromkeys(("input_ids", "attention_mask", "labels"), torch.ones(4).long()),
            r"batch\['input_ids'\] must be \[sequences, tokens\], got shape \(4,\)",
        ),
    ],
)
def test_a_batch_of_a_wrong_kind(
    models: tuple[Any, Any], changed: dict[str, Any], message: str, fraction: float
) -> None:
    ids = torch.randint(2, V, (2, 4))
    labels = torch.where(torch.arange(4) < 2, -100, ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with pytest.raises((TypeError, ValueError), match=message):
        gkd_step(*models, batch | changed, pad_token_id=PAD, on_policy_fraction=fraction)
