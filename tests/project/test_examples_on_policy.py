"""examples/on_policy.py and its stand-in for vLLM: a run with tiny models, and what must make it fail."""

from __future__ import annotations

import importlib
import json
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.paths import ROOT
from support.served import vllm_json
from torch import Tensor

from fastkd.serving import ServedTeacher, ServingError, from_vllm

SHORT = {"tiny_models": True, "steps": 3, "warm_up_steps": 2, "batch": 3, "completion_length": 12}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("on_policy")


@pytest.fixture
def setting(example: ModuleType) -> Any:
    return example.tiny(prompt_length=5, batch=4, seed=0)


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, in one line; the console wraps it."""
    return " ".join(capsys.readouterr().out.split())


def test_a_run(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(**SHORT, output=tmp_path)
    assert "PASSED: both students wrote the same tokens" in printed(capsys)
    assert (tmp_path / "on-policy.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "on-policy.json").read_text(encoding="utf-8"))
    for name in ("losses", "teacher_kl"):
        assert len(figures["local"][name]) == 3
        assert figures["local"][name] == pytest.approx(figures["served"][name], rel=1e-5)
    assert figures["served"]["held_out_kl"] < figures["before"]["held_out_kl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Rows that belong to the next position.
        (lambda rows: rows.roll(-1, 0), "the losses of step 1 are"),
        (lambda rows: rows - 1e-3, "the losses of step 1 are"),
    ],
)
def test_a_wrong_server_fails(
    change: Any,
    message: str,
    example: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = example.score_for_stand_in

    def wrong(teacher: Any, ids: list[int], k: int) -> Any:
        with monkeypatch.context() as patch:
            logprobs_of = example.logprobs_of
            patch.setattr(example, "logprobs_of", lambda *given: change(logprobs_of(*given)))
            return right(teacher, ids, k)

    monkeypatch.setattr(example, "score_for_stand_in", wrong)
    with pytest.raises(example.typer.Exit) as error:
        example.main(**SHORT, output=tmp_path)
    assert error.value.exit_code == 1
    assert "FAILED: " in (text := printed(capsys)) and message in text


def test_other_tokens_and_no_progress_fail(example: ModuleType, setting: Any) -> None:
    local, served = (
        example.Learner(setting.student, teacher.score, 1e-3, 0)
        for teacher in (example.LocalTeacher(setting.teacher, 5),) * 2
    )
    for learner in (local, served):
        learner.losses, learner.written = [1.0, 0.5], [torch.zeros(2, 3), torch.zeros(2, 3)]
    assert example.faults(local, served, before=2.0, after=[1.9, 1.9]) == []
    [message] = example.faults(local, served, before=2.0, after=[1.9, 2.1])
    assert message == "the KL on held-out prompts was 2.000 and is 1.900 and 2.100"
    served.losses = [1.0, float("nan")]
    [message] = example.faults(local, served, before=2.0, after=[1.9, 1.9])
    assert message.startswith("the losses of step 2 are 0.5 and nan")
    served.losses, served.written = local.losses, [torch.zeros(2, 3), torch.ones(2, 3)]
    [message] = example.faults(local, served, before=2.0, after=[1.9, 1.9])
    assert message == "from step 2 on, the students write different tokens"


def make_the_end_likely(student: Any) -> None:
    weight = student.get_input_embeddings().weight
    with torch.no_grad():
        weight[1] = weight[2:].mean(0)


def test_write(example: ModuleType, setting: Any) -> None:
    """The log-probabilities are the student's own, of every token, and a sequence stops after its end-of-text token."""
    student = setting.student
    make_the_end_likely(student)
    prompts = setting.prompts.batch(0)
    written = example.write(student, prompts, 40, seed=0)
    again = example.write(student, prompts, 40, seed=0)
    assert torch.equal(written.ids, again.ids)
    assert not torch.equal(written.ids, example.write(student, prompts, 40, seed=1).ids)
    assert torch.equal(written.ids[:, :5], prompts)
    ended, lowest_rank = 0, 0
    for ids, logprobs, sequence in zip(
        written.ids, written.logprobs, written.sequences(), strict=True
    ):
        new = sequence[5:].tolist()
        assert 1 not in new[:-1]
        ended += new[-1] == 1
        assert len(sequence) == len(ids) or new[-1] == 1
        log_q = example.logprobs_of(student, sequence)[4:]
        own = log_q.gather(-1, sequence[5:, None]).squeeze(-1)
        torch.testing.assert_close(logprobs[: len(new)], own, rtol=0, atol=1e-5)
        lowest_rank = max(lowest_rank, int((log_q >= own.unsqueeze(-1)).sum(-1).max()))
    assert ended >= 2
    assert lowest_rank > 50  # the tokens to which `generate` limits itself by default


def test_each_step_has_new_samples(example: ModuleType, setting: Any) -> None:
    learner = example.Learner(
        setting.student, example.LocalTeacher(setting.teacher, 5).score, 1e-9, 0
    )
    for _ in range(2):
        learner.step(setting.prompts.batch(0), 8)
    assert not torch.equal(*learner.written)


def test_a_step_has_the_gradient_of_the_formula(example: ModuleType, setting: Any) -> None:
    """The loss and its first gradient, against reverse KL over K tokens and the rest, written out in float64."""
    student, prompts = setting.student, setting.prompts.batch(0)
    make_the_end_likely(student)
    learner = example.Learner(student, example.LocalTeacher(setting.teacher, 7).score, 1e-3, seed=0)
    written = example.write(student, prompts, 40, seed=0)
    assert len(set(written.lengths)) > 1  # some rows are masked
    total, estimates = torch.zeros((), dtype=torch.float64), []
    for sequence in written.sequences():
        log_p = example.logprobs_of(setting.teacher, sequence)[4:].double()
        log_q = student(sequence[None, :-1]).logits[0, 4:].double().log_softmax(-1)
        total = total + reverse_kl(log_q, log_p, log_p.topk(7).indices)
        estimates.append((log_q - log_p).detach().gather(-1, sequence[5:, None]).flatten())
    estimates = torch.cat(estimates)
    wanted = torch.autograd.grad(total / len(estimates), learner.trained)
    seen: list[Tensor] = []

    def clip(weights: list[Tensor], _: float) -> None:
        seen.extend(weight.grad.clone() for weight in weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.nn.utils, "clip_grad_norm_", clip)
        loss = learner.step(prompts, 40)
    assert loss == pytest.approx(float(total.detach()) / len(estimates), rel=1e-5)
    for actual, expected in zip(seen, wanted, strict=True):
        difference = torch.linalg.vector_norm(actual - expected)
        assert difference <= 1e-4 * torch.linalg.vector_norm(expected)
    assert learner.teacher_kl == pytest.approx([float(estimates.mean())], rel=1e-4)


def reverse_kl(log_q: Tensor, log_p: Tensor, ids: Tensor) -> Tensor:
    """The sum over rows [n, V] of KL(q || p) over the tokens `ids` [n, K] and one event for all others."""
    q, p = (x.gather(-1, ids).exp() for x in (log_q, log_p))
    q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (q, p))
    return (q * (q.log() - p.log())).sum()


def test_own_text_kl(example: ModuleType, setting: Any) -> None:
    actual = example.own_text_kl(setting.student, setting, 6, seed=2)
    written = example.write(setting.student, setting.prompts.held_out, 6, seed=2)
    terms = []
    for sequence in written.sequences():
        log_q, log_p = (
            example.logprobs_of(model, sequence)[4:].double()
            for model in (setting.student, setting.teacher)
        )
        terms.append((log_q.exp() * (log_q - log_p)).sum(-1))
    assert actual == pytest.approx(float(torch.cat(terms).mean()), rel=1e-5)


# ---- the stand-in


def test_the_stand_in_lists_what_vllm_lists(example: ModuleType, setting: Any) -> None:
    ids = setting.text.batch(0)[0, :30].tolist()
    rows = example.logprobs_of(setting.teacher, torch.tensor(ids))
    positions = example.score_for_stand_in(setting.teacher, ids, 4)
    actual = importlib.import_module("vllm_stand_in").prompt_logprobs(ids, positions)
    for got, wanted in zip(actual, vllm_json(rows, ids, 4), strict=True):
        if wanted is None:
            assert got is None
            continue
        assert list(got) == list(wanted)  # the order too
        for token in wanted:
            assert got[token]["logprob"] == wanted[token]["logprob"]
            assert got[token]["rank"] == wanted[token]["rank"]


def test_json_keeps_the_numbers(example: ModuleType, setting: Any) -> None:
    """The served scores equal the local ones bit for bit; -inf comes as -9999 and back."""
    stand_in = importlib.import_module("vllm_stand_in")
    ids = setting.text.batch(0)[0, :20]
    [local] = example.LocalTeacher(setting.teacher, 6).score([ids], 8)

    def score(ids: list[int], k: int) -> Any:
        return example.score_for_stand_in(setting.teacher, ids, k)

    with stand_in.StandIn(score) as url:
        [served] = ServedTeacher(url, k=6).score([ids], 8)
    assert torch.equal(served.teacher.ids, local.teacher.ids)
    assert torch.equal(served.teacher.logprobs, local.teacher.logprobs)
    assert torch.equal(served.sampled_logprobs, local.sampled_logprobs)
    assert served.teacher.tail_logprob is None and local.teacher.tail_logprob is None
    impossible = [stand_in.Position(float("-inf"), 9, [(3, 0.0)])]
    listed = json.loads(json.dumps(stand_in.prompt_logprobs([5, 7], impossible)))
    assert listed[1]["7"]["logprob"] == -9999.0
    assert from_vllm(listed, [5, 7], k=1).sampled_logprobs.tolist() == [float("-inf")]


def test_the_stand_in_refuses(example: ModuleType) -> None:
    stand_in = importlib.import_module("vllm_stand_in")
    with stand_in.StandIn(lambda ids, k: [], max_logprobs=4) as url:
        with pytest.raises(
            ServingError, match=r"status 400, prompt_logprobs must be in \[0, 4\], got 5"
        ):
            ServedTeacher(url, k=5).score([[1, 2]])
        with pytest.raises(ServingError, match="status 404"):
            ServedTeacher(url, k=2, api="sglang").score([[1, 2]])
        body = json.dumps({"prompt": "text", "prompt_logprobs": 1}).encode()
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body))
        assert error.value.code == 400
        error.value.close()
