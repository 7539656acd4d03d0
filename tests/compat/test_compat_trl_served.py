"""The trainers of fastkd.compat.trl that compute their loss from hidden states: IW-OPD, and teachers behind a server.

TRL's own VLLMClient talks to a server on this machine that answers as vLLM does. Its teacher is a table of bigrams.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from support import served, tiny_models, zero3_stand_in
from test_compat_trl import PROMPTS, common, count_calls, models, trained
from torch import Tensor, nn
from trl.experimental.async_distillation import (
    AsyncDistillationConfig,
    AsyncDistillationTrainer,
)
from trl.experimental.gold import gold_trainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer
from trl.experimental.server_distillation import (
    ServerDistillationConfig,
    ServerDistillationTrainer,
)
from trl.generation import vllm_client

import fastkd
import fastkd.compat.trl as adapter

ANSWERS = ["god created the heaven", "was void", "form and earth", "void"]


class Teacher:
    """A server on this machine, with the parts of vLLM's protocol that TRL uses."""

    def __init__(self) -> None:
        self.bigrams = served.Bigram(61, seed=5)
        self.requests: list[dict[str, Any]] = []
        self.drop: int | None = None  # an own token that the server does not list

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/models":
            return {"data": [{"id": "teacher"}]}
        if path != "/v1/completions":
            return {}
        self.requests.append(body)
        assert (
            body["max_tokens"] == 1
        )  # the temperature does not reach the prompt's log-probabilities
        choices = []
        for ids in body["prompt"]:
            listed = served.vllm_json(self.bigrams.rows(ids), ids, body["prompt_logprobs"])
            if self.drop is not None:
                listed = [
                    one and {k: v for k, v in one.items() if k != str(self.drop)} for one in listed
                ]
            choices.append({"prompt_logprobs": listed})
        return {"choices": choices}


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Teacher]:
    serves = Teacher()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: dict[str, Any]) -> None:
            content = json.dumps(serves.reply(self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_: Any) -> None:
            """Write nothing."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    serves.url = f"http://127.0.0.1:{listener.server_address[1]}"  # type: ignore[attr-defined]
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    yield serves
    listener.shutdown()
    listener.server_close()
    thread.join()


def server_trainer(kind: type, path: Path, teacher: Any, model: Any = None, **options: Any) -> Any:
    own = {"max_completion_length": 6, "teacher_model_server_url": teacher.url}
    args = ServerDistillationConfig(**common(path) | own | options)
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer = kind(
        model=model or models()["model"], args=args, train_dataset=data, eval_dataset=data,
        processing_class=tiny_models.tokenizer(),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 2  # train() sets it
    return trainer


def iw_opd_trainer(kind: type, path: Path, chosen_models: Any = None, **options: Any) -> Any:
    """With the objective "jsd", half of the batches are off-policy; TRL allows that for no other."""
    chosen = chosen_models or models()
    tokenizer = tiny_models.tokenizer()
    if options.get("teacher_model_server_url"):
        options["use_teacher_server"] = True
        chosen["teacher_model"] = None
    else:
        tokenizer.save_pretrained(path / "teacher")
        chosen["teacher_model"].config._name_or_path = str(path / "teacher")
    off_policy = 0.5 if options.get("distillation_objective") == "jsd" else 0.0
    own = {"max_completion_length": 6, "max_length": 24, "lmbda": 1.0 - off_policy}
    args = IWOPDConfig(**common(path) | own | options)
    chats = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": a}]
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    data = Dataset.from_dict({"messages": chats})
    return kind(
        **chosen, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )


def assert_equal_training(
    build: Callable[[type], Any], stock_class: type, start: Tensor | None = None
) -> Any:
    """Assert that five steps have the same losses, lead to the same weights, and log the same; return fastkd's trainer.

    A trainer's constructor sets the seed, so a trainer is built after the one before it has been trained.

    Args:
        build: makes a trainer of a class.
        stock_class: TRL's.
        start: the student's weights before the training; None: those of models().
    """
    stock = build(stock_class)
    expected = trained(stock)
    actual = build(getattr(adapter, stock_class.__name__))
    assert isinstance(actual, stock_class)
    found = trained(actual)
    assert len(found[0]) == 5 and len(set(found[0])) == 5
    assert found[0] == pytest.approx(expected[0], rel=2e-5)
    assert (found[2] - expected[2]).abs().max() < 5e-6
    if start is None:
        start = torch.cat([p.detach().flatten() for p in models()["model"].parameters()])
    assert (found[2] - start).abs().max() > 1e-3
    ours, theirs = (
        [
            {key: value for key, value in entry.items() if key.startswith("iw_opd/")}
            for entry in trainer.state.log_history
        ]
        for trainer in (actual, stock)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    return actual


def whole_logits(model: nn.Module) -> list[int]:
    """Collects how many positions the lm_head projects, call by call."""
    positions: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: positions.append(output.shape[1]))
    return positions


SERVED = {
    "forward KL, tail": {"beta": 0.0, "loss_top_k": 4},
    "forward KL, no tail": {"beta": 0.0, "loss_top_k": 4, "loss_add_tail": False},
    "JSD": {"beta": 0.4, "loss_top_k": 1},
    "JSD, no tail": {"beta": 0.4, "loss_top_k": 1, "loss_add_tail": False},
    "reverse KL": {"beta": 1.0, "loss_top_k": 1},
}


@pytest.mark.parametrize("case", SERVED)
def test_server_distillation_trainer(
    case: str, tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch, "fused_linear_kd_loss")
    assert_equal_training(
        lambda kind: server_trainer(kind, tmp_path, teacher, **SERVED[case]),
        ServerDistillationTrainer,
    )
    assert len(calls) == 10
    assert {request["prompt_logprobs"] for request in teacher.requests} == {
        SERVED[case]["loss_top_k"]
    }


def one_batch() -> dict[str, Tensor]:
    """Two completions, the second of which is shorter, after prompts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    prompts, completions = (torch.randint(3, 61, (2, n), generator=generator) for n in (4, 5))
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
        "completion_ids": completions,
        "completion_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }


def test_the_temperature_of_a_server(tmp_path: Path, teacher: Teacher) -> None:
    """The teacher's log-probabilities are converted to the loss's temperature, which TRL does to the student's only."""
    options = {"beta": 0.0, "loss_top_k": 4, "loss_add_tail": False, "temperature": 1.7}
    batch, losses = one_batch(), {}
    for kind in (ServerDistillationTrainer, adapter.ServerDistillationTrainer):
        trainer = server_trainer(kind, tmp_path, teacher, **options)
        trainer.model.eval()
        losses[kind] = trainer.compute_loss(trainer.model, batch).item()
    assert {request["temperature"] for request in teacher.requests} == {1.7}

    def expected(teacher_temperature: float) -> float:
        student = models()["model"].double().eval()
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        z = student(input_ids=ids, attention_mask=mask).logits[:, 3:-1] / 1.7
        log_p, top = teacher.bigrams.table[ids[:, 3:-1]].double().topk(4)
        log_p = (log_p / teacher_temperature).log_softmax(-1)
        log_q = z.gather(-1, top).log_softmax(-1)
        rows = (log_p.exp() * (log_p - log_q)).sum(-1)
        return rows[batch["completion_mask"].bool()].mean().item()

    assert losses[adapter.ServerDistillationTrainer] == pytest.approx(expected(1.7), rel=1e-5)
    assert losses[ServerDistillationTrainer] == pytest.approx(expected(1.0), rel=1e-5)
    assert abs(expected(1.7) / expected(1.0) - 1) > 0.1


def test_temperatures_that_a_server_does_not_support(tmp_path: Path, teacher: Teacher) -> None:
    message = "temperature must be 1 with a teacher's server, got 0.9: .*Set loss_add_tail=False or temperature=1.0"
    with pytest.raises(ValueError, match=message):
        server_trainer(adapter.ServerDistillationTrainer, tmp_path, teacher, temperature=0.9)
    served_iw_opd = {"teacher_model_server_url": teacher.url, "temperature": 0.9}
    with pytest.raises(ValueError, match=message):
        iw_opd_trainer(
            adapter.IWOPDTrainer, tmp_path, distillation_objective="jsd", **served_iw_opd
        )
    with pytest.raises(ValueError, match="got 0.9: .*Set temperature=1.0, or use a local teacher"):
        iw_opd_trainer(adapter.IWOPDTrainer, tmp_path, loss_add_tail=False, **served_iw_opd)
    args = SimpleNamespace(teacher_temperature=2.0, add_tail_bucket=True)
    with pytest.raises(
        ValueError, match="teacher_temperature must be 1 .*add_tail_bucket=False or"
    ):
        adapter.AsyncDistillationTrainer("model", args)


def test_a_token_that_the_server_does_not_list(tmp_path: Path, teacher: Teacher) -> None:
    batch = one_batch()
    teacher.drop = int(batch["completion_ids"][0, 2])
    for beta in (0.5, 1.0):
        trainer = server_trainer(adapter.ServerDistillationTrainer, tmp_path, teacher, beta=beta)
        with pytest.raises(
            ValueError, match=r"must return .* at every token that counts; it did not at \d of 8"
        ):
            trainer.compute_loss(trainer.model, batch)
    # TRL fills up a position that lists fewer than K tokens with token 0, which is no token of the teacher's.
    teacher.drop = int(teacher.bigrams.table[batch["completion_ids"][0, 1]].argmax())
    losses = [
        server_trainer(kind, tmp_path, teacher, beta=0.0, loss_top_k=61).compute_loss(model, batch)
        for kind in (ServerDistillationTrainer, adapter.ServerDistillationTrainer)
        for model in [models()["model"]]
    ]
    torch.testing.assert_close(losses[1], losses[0])
    # In padding, nothing is missing.
    teacher.drop = int(batch["completion_ids"][1, 4])
    assert teacher.drop not in batch["completion_ids"][0]
    assert trainer.compute_loss(trainer.model, batch).isfinite()


def test_no_whole_logits(tmp_path: Path, teacher: Teacher) -> None:
    """The lm_head runs for one position of the first batch, which checks the scale of the logits, and for no other."""
    trainer = server_trainer(adapter.ServerDistillationTrainer, tmp_path, teacher)
    positions = whole_logits(trainer.model)
    for _ in range(3):
        trainer.compute_loss(trainer.model, one_batch()).backward()
    assert positions == [1, 1, 1]
    trainer = server_trainer(
        adapter.ServerDistillationTrainer,
        tmp_path,
        teacher,
        model=tiny_models.built("MixtralForCausalLM", output_router_logits=False),
    )
    trainer.model.config.logit_scale = 2.0
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match="the student are not those of its lm_head times 2.0 .*or use TRL's own",
        ):
            trainer.compute_loss(trainer.model, one_batch())
    with pytest.raises(ValueError, match="ServerDistillationTrainer ignores the router's"):
        server_trainer(
            adapter.ServerDistillationTrainer,
            tmp_path,
            teacher,
            model=tiny_models.built("MixtralForCausalLM"),
        )


# ---- IW-OPD


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.4, "iw_opd_gamma": 2.0, "iw_opd_epsilon": 30.0}]
)
def test_iw_opd_trainer(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch, "fused_linear_logprobs")
    trainer = assert_equal_training(
        lambda kind: iw_opd_trainer(kind, tmp_path, **options), IWOPDTrainer
    )
    assert len(calls) == 20  # student and teacher
    assert "iw_opd/mean_weight" in trainer.state.log_history[0]


JSD = {
    "whole rows": {"beta": 0.3, "loss_top_k": 0, "temperature": 1.4},
    "forward KL": {"beta": 0.0, "loss_top_k": 5, "temperature": 1.4},
    "forward KL, no tail": {"beta": 0.0, "loss_top_k": 5, "loss_add_tail": False},
    "reverse KL": {"beta": 1.0, "loss_top_k": 5, "temperature": 1.4},
    "union": {"beta": 0.6, "loss_top_k": 5},
    "union, no tail": {"beta": 0.6, "loss_top_k": 5, "loss_add_tail": False, "temperature": 1.4},
    "top 1, sampled": {"beta": 0.5, "loss_top_k": 1},
    "sampled": {"beta": 1.0, "loss_top_k": 1},
    "top 1, argmax": {"beta": 0.5, "loss_top_k": 1, "reverse_kl_top_1_mode": "argmax"},
}  # fmt: skip


@pytest.mark.parametrize("case", JSD)
def test_divergences_of_iw_opd_trainer(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch, "fused_linear_kd_loss")
    options = {"distillation_objective": "jsd", **JSD[case]}
    assert_equal_training(lambda kind: iw_opd_trainer(kind, tmp_path, **options), IWOPDTrainer)
    assert len(calls) == 10


@pytest.mark.parametrize("objective", ["iw_opd", "jsd"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_iw_opd_trainer_with_a_server(
    objective: str, beta: float, tmp_path: Path, teacher: Teacher
) -> None:
    options = {
        "distillation_objective": objective,
        "teacher_model_server_url": teacher.url,
        "beta": beta,
    }
    assert_equal_training(lambda kind: iw_opd_trainer(kind, tmp_path, **options), IWOPDTrainer)


def iw_opd_batch() -> dict[str, Tensor]:
    batch = one_batch()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    counted = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(counted == 0, -100),
        "prompts": batch["prompt_ids"],
        "prompt_attention_mask": batch["prompt_mask"],
    }


def test_the_log_probabilities_of_a_rollout(tmp_path: Path) -> None:
    """Advantages use what the engine returned; padding may hold NaN. The head has a bias, and the teacher is wider."""
    batch = iw_opd_batch()
    rollout = -5 * torch.rand(2, 9, generator=torch.Generator().manual_seed(1))
    rollout[1, -1] = torch.nan
    results = []
    for kind in (IWOPDTrainer, adapter.IWOPDTrainer):
        chosen = models()
        chosen["model"].lm_head.bias = nn.Parameter(torch.linspace(-1.0, 1.0, 61))
        trainer = iw_opd_trainer(kind, tmp_path, chosen)
        found = []
        for items in (None, 7, torch.tensor(7)):
            loss = trainer.compute_loss(
                trainer.model, batch | {"rollout_logprobs": rollout}, num_items_in_batch=items
            )
            trainer.model.zero_grad()
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for p in trainer.model.parameters())]
        results.append(found)
    assert results[0][0].isfinite()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_predictions_and_errors_of_iw_opd(tmp_path: Path, teacher: Teacher) -> None:
    results = []
    for kind in (IWOPDTrainer, adapter.IWOPDTrainer):
        trainer = iw_opd_trainer(kind, tmp_path)
        loss = trainer.evaluate()["eval_loss"]
        predictions = trainer.predict(trainer.eval_dataset).predictions
        results.append((loss, torch.as_tensor(predictions)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert results[1][1].shape[-1] == 61
    assert torch.equal(results[1][1], results[0][1])
    trainer.teacher_model = None
    with pytest.raises(ValueError, match="teacher_model must be given, or use_teacher_server=True"):
        trainer.compute_loss(trainer.model, iw_opd_batch())
    served_trainer = iw_opd_trainer(
        adapter.IWOPDTrainer, tmp_path, teacher_model_server_url=teacher.url
    )
    fetch = served_trainer._get_teacher_token_logprobs_from_server
    served_trainer._get_teacher_token_logprobs_from_server = lambda *arguments: {
        name: value[:, :-1] for name, value in fetch(*arguments).items()
    }
    with pytest.raises(ValueError, match="returned fewer log-probabilities than the completions"):
        served_trainer.compute_loss(served_trainer.model, iw_opd_batch())


@pytest.mark.parametrize("objective", ["iw_opd", "jsd"])
def test_partitioned_heads(objective: str, tmp_path: Path) -> None:
    """With the stand-in for DeepSpeed ZeRO-3."""
    chosen = models()
    trainer = iw_opd_trainer(
        adapter.IWOPDTrainer, tmp_path, chosen, distillation_objective=objective, loss_top_k=3
    )
    student, teacher = chosen["model"], trainer.teacher_model.requires_grad_(False)
    results = []
    for partitioned in (False, True):
        if partitioned:
            for model in (student, teacher):
                zero3_stand_in.partition(model.model.embed_tokens, model.lm_head)
        student.zero_grad()
        loss = trainer.compute_loss(student, iw_opd_batch())
        loss.backward()
        taken = (getattr(p, "reduced", p.grad) for p in student.parameters())
        results.append([loss.detach(), *(g.clone() for g in taken)])
    assert student.lm_head.weight.numel() == 0 and results[1][1].any()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objective", ["iw_opd", "jsd"])
@pytest.mark.parametrize("target", [["q_proj"], ["q_proj", "lm_head"]])
def test_adapted_students(objective: str, target: list[str], tmp_path: Path) -> None:
    """LoRA, also of the lm_head. The adapters do not start as 0."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    results = []
    for kind in (IWOPDTrainer, adapter.IWOPDTrainer):
        config = peft.LoraConfig(r=3, target_modules=target, init_lora_weights=False)
        torch.manual_seed(7)
        chosen = models()
        chosen["model"] = peft.get_peft_model(chosen["model"], config)
        trainer = iw_opd_trainer(kind, tmp_path, chosen, distillation_objective=objective)
        loss = trainer.compute_loss(trainer.model, iw_opd_batch())
        loss.backward()
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        assert len(gradients) == (4 if len(target) == 1 else 6)
        results.append([loss.detach(), *gradients])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_mixed_precision(tmp_path: Path) -> None:
    """Under bfloat16's autocast, the losses differ by its rounding: TRL rounds the logits, and fastkd the operands."""
    losses = []
    for kind in (IWOPDTrainer, adapter.IWOPDTrainer):
        trainer = iw_opd_trainer(kind, tmp_path, bf16=True)
        model = trainer.accelerator.prepare_model(trainer.model)
        loss = trainer.compute_loss(model, iw_opd_batch())
        loss.backward()
        losses.append(loss.item())
        assert loss.dtype == torch.float32
        assert model.lm_head.weight.grad.isfinite().all()
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0]


# ---- AsyncDistillationTrainer


def test_async_distillation_under_zero3(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL would send empty parameters to the server of the rollouts, so the adapter raises."""
    kind = adapter.AsyncDistillationTrainer
    message = "AsyncDistillationTrainer does not support DeepSpeed ZeRO-3: .*use FSDP2 or ZeRO-2"
    args = SimpleNamespace(
        teacher_temperature=1.0,
        add_tail_bucket=True,
        deepspeed_plugin=SimpleNamespace(zero_stage=3),
    )
    with pytest.raises(ValueError, match=message):
        kind("model", args)
    built: list[Any] = []
    monkeypatch.setattr(
        AsyncDistillationTrainer, "__init__", lambda self, model, args=None: built.append(args)
    )
    args.deepspeed_plugin.zero_stage = 2
    for accepted in (args, None):
        kind("model", args=accepted)
    assert built == [args, None]
    student = tiny_models.llama()
    zero3_stand_in.partition(student.lm_head)
    with pytest.raises(ValueError, match=message):
        kind("model")._compute_loss(student, {})


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
def test_async_distillation_with_the_arguments_of_deepspeed(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
    args = AsyncDistillationConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], deepspeed=config,
        teacher_server_urls={"one": "http://none"},
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not support DeepSpeed ZeRO-3"):
        adapter.AsyncDistillationTrainer("model", args)


def test_the_temperature_of_async_distillation() -> None:
    """The loss that the trainer's method calls takes the teacher's log-probabilities to be at temperature 1."""
    method = inspect.getclosurevars(adapter.AsyncDistillationTrainer._compute_loss).nonlocals[
        "method"
    ]
    loss = method.__globals__["_chunked_jsd_loss"]
    torch.manual_seed(0)
    hidden, weight, listed = (
        torch.randn(3, 8),
        torch.randn(20, 8),
        torch.randn(3, 20).log_softmax(-1).topk(4),
    )
    every = torch.ones(3, 4, dtype=torch.bool)
    arguments = (
        hidden, weight, None, 1.0, None, listed.indices, listed.values, every, 0.0, 2.0, False, None, 0, 4
    )  # fmt: skip
    log_p = (listed.values / 2).log_softmax(-1)
    log_q = (hidden @ weight.T / 2).gather(-1, listed.indices).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(loss(*arguments)[0], expected)
    as_given = adapter.chunked_jsd_loss(*arguments)[0]
    assert abs(as_given - expected) > 0.01
    assert fastkd.TopK(listed.indices, listed.values).temperature == 1.0


def test_an_unsupported_version_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error names the change if TRL differs from the supported version."""
    for name in ("GOLDTrainer", "IWOPDTrainer", "ServerDistillationTrainer"):
        monkeypatch.delitem(vars(adapter), name, raising=False)
    with monkeypatch.context() as patch:
        patch.delattr(IWOPDTrainer, "_compute_prompt_length")
        with pytest.raises(ImportError, match="TRL 1.16.0 has no _compute_prompt_length in IWOPD"):
            adapter.IWOPDTrainer  # noqa: B018
    with monkeypatch.context() as patch:
        patch.setattr(ServerDistillationTrainer, "compute_loss", lambda self, model: None)
        with pytest.raises(ImportError, match=r"has compute_loss\('self', 'model'\), and not"):
            adapter.ServerDistillationTrainer  # noqa: B018
    with monkeypatch.context() as patch:
        patch.delattr(gold_trainer, "ULDLoss")
        with pytest.raises(ImportError, match="has no ULDLoss in trl.experimental.gold"):
            adapter.GOLDTrainer  # noqa: B018
