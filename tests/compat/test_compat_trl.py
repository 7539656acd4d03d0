"""fastkd.compat.trl against TRL itself: its losses, and its trainers on real models with random weights."""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from support import tiny_models, zero3_stand_in
from support.paths import DATA, ROOT
from torch import Tensor, nn
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.async_distillation import AsyncDistillationTrainer, async_distillation_trainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdft import loss_utils as self_distillation
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from trl.trainer import distillation_trainer

import fastkd
import fastkd.compat.trl as adapter
from fastkd.compat.trl import chunked_divergence_loss, generalized_jsd_loss

stock_jsd = GKDTrainer.generalized_jsd_loss
stock_chunked = distillation_trainer._chunked_divergence_loss
BETAS = [0.0, 0.2, 0.5, 1.0]
ULP = 2.0**-22  # rounding of the terms of a sum in float32


def real_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [2, 4, 49152] of SmolLM2 and a student on eight positions."""
    with np.load(DATA / "smollm2.npz") as file:
        return tuple(
            torch.from_numpy(file[side]).to(dtype).view(2, 4, -1) for side in ("student", "teacher")
        )


def random_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits [3, 5, 203] as the shifted view of a model's logits, so that rows are not adjacent in memory."""
    generator = torch.Generator().manual_seed(0)
    both = 4 * torch.randn(2, 3, 6, 203, generator=generator)
    both += 1e3 * torch.rand(2, 3, 6, 1, generator=generator)
    student, teacher = both.to(dtype)
    return student[:, :-1], teacher[:, :-1]


ROWS = {"real": real_rows, "random": random_rows}


def some_labels(student: Tensor) -> Tensor:
    labels = torch.zeros(student.shape[:-1], dtype=torch.int64)
    labels[0, 1], labels[-1, -2:] = -100, -100
    return labels


def with_gradients(
    loss: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    upstream: Tensor | float,
    **options: Any,
) -> tuple[Tensor, ...]:
    s, t = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    value = loss(s, t, **options)
    (value * upstream).sum().backward()
    return value.detach().double(), s.grad.double(), t.grad.double()


def assert_no_further_off(
    student: Tensor, teacher: Tensor, upstream: Tensor | float = 1.7, **options: Any
) -> None:
    """Assert that value and gradients are as near to float64 as TRL's, or within an ulp of their terms."""
    exact = with_gradients(stock_jsd, student.double(), teacher.double(), upstream, **options)
    stock = with_gradients(stock_jsd, student, teacher, upstream, **options)
    actual = with_gradients(generalized_jsd_loss, student, teacher, upstream, **options)
    assert actual[0].shape == stock[0].shape
    assert (
        (actual[0] - exact[0]).abs() <= (stock[0] - exact[0]).abs() + ULP * exact[0].abs().max()
    ).all()
    for a, b, c in zip(actual[1:], stock[1:], exact[1:], strict=True):
        bar = (b - c).abs().max() + 4 * ULP * c.abs().max()
        if student.dtype != torch.float32:  # one rounding
            bar = bar + c.abs() * torch.finfo(student.dtype).eps + 1e-7
        assert ((a - c).abs() <= bar).all()
    assert exact[1].abs().max() > 1e-6


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("beta", BETAS)
def test_betas_and_temperatures(rows: str, beta: float) -> None:
    student, teacher = ROWS[rows](torch.float32)
    labels = some_labels(student)
    assert_no_further_off(student, teacher, labels=labels, beta=beta)
    assert_no_further_off(
        student, teacher, labels=labels, beta=beta, temperature=2.5, num_items_in_batch=11
    )


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("with_labels", [True, False])
def test_reductions(reduction: str, with_labels: bool) -> None:
    student, teacher = random_rows(torch.float32)
    labels = some_labels(student) if with_labels else None
    options = {"labels": labels, "reduction": reduction, "beta": 0.3, "temperature": 0.7}
    upstream: Any = 1.7
    if reduction == "none":
        shape = (12, 203) if with_labels else student.shape
        upstream = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    assert_no_further_off(student, teacher, upstream, **options)
    for count in (7, torch.tensor(7), torch.tensor(7.0)):  # replaces every reduction's denominator
        assert_no_further_off(student, teacher, num_items_in_batch=count, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_low_precision(beta: float, dtype: torch.dtype) -> None:
    """TRL computes in the dtype of the logits, with errors of its size."""
    student, teacher = (x - x.amax(-1, keepdim=True) for x in random_rows(dtype))
    assert_no_further_off(student, teacher, labels=some_labels(student), beta=beta)
    assert generalized_jsd_loss(student, teacher).dtype == torch.float32


def test_a_batch_without_a_counted_row_has_loss_0() -> None:
    """Without a counted row the loss is 0, where TRL's mean is NaN."""
    student, teacher = random_rows(torch.float32)
    labels = torch.full(student.shape[:-1], -100)
    for reduction in ("batchmean", "sum", "mean"):
        s = student.detach().requires_grad_()
        loss = generalized_jsd_loss(s, teacher, labels, reduction=reduction)
        loss.backward()
        assert loss.item() == 0.0 and not s.grad.any()
    assert generalized_jsd_loss(student, teacher, labels, reduction="none").shape == (0, 203)
    assert stock_jsd(student, teacher, labels, reduction="mean").isnan()


def test_a_token_that_both_models_exclude() -> None:
    """A token at -inf in both models has no effect, where TRL gives NaN."""
    student, teacher = random_rows(torch.float32)
    student, teacher = student.clone(), teacher.clone()
    student[..., 7], teacher[..., 7] = -torch.inf, -torch.inf
    keep = torch.arange(203) != 7
    for reduction in ("batchmean", "none"):
        s = student.clone().requires_grad_()
        actual = generalized_jsd_loss(s, teacher, reduction=reduction)
        expected = stock_jsd(student[..., keep], teacher[..., keep], reduction=reduction)
        torch.testing.assert_close(actual.sum(), expected.sum(), rtol=1e-5, atol=0)
        actual.sum().backward()
        assert s.grad.isfinite().all()
    assert stock_jsd(student, teacher).isnan()


def test_errors_of_the_loss() -> None:
    student, teacher = random_rows(torch.float32)
    with pytest.raises(ValueError, match="reduction must be one of .*; got 'nonne'"):
        generalized_jsd_loss(student, teacher, reduction="nonne")
    for reduction in ("batchmean", "none"):
        with pytest.raises(ValueError, match="beta must be in"):
            generalized_jsd_loss(student, teacher, beta=1.5, reduction=reduction)
        with pytest.raises(ValueError, match="teacher"):
            generalized_jsd_loss(student, teacher[..., :-1], reduction=reduction)


def test_signatures() -> None:
    for actual, reference in (
        (generalized_jsd_loss, stock_jsd),
        (chunked_divergence_loss, stock_chunked),
    ):
        expected = {n: p.default for n, p in inspect.signature(reference).parameters.items()}
        assert {n: p.default for n, p in inspect.signature(actual).parameters.items()} == expected


# ---- the chunked loss


def two_heads(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Hidden states and heads of widths 24 and 40, over 301 tokens."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "student_hidden_states": draw(3, 5, 24),
        "teacher_hidden_states": draw(3, 5, 40),
        "student_lm_head_weight": draw(301, 24) / 2,
        "teacher_lm_head_weight": draw(301, 40) / 2,
        "completion_mask": (torch.arange(15).view(3, 5) % 4 != 1).long(),
        "student_lm_head_bias": draw(301),
        "teacher_lm_head_bias": draw(301),
    }


TRAINED = ("student_hidden_states", "student_lm_head_weight", "student_lm_head_bias")


def run_chunked(loss: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """(loss, entropy sum, count, gradients...), with an upstream gradient that is not 1."""
    leaves = {n: arguments[n].detach().requires_grad_() for n in TRAINED if n in arguments}
    value, entropy, count = loss(**(arguments | leaves))
    gradients = torch.autograd.grad(1.7 * value, list(leaves.values()))
    assert not entropy.requires_grad and not count.requires_grad
    return value.detach(), entropy, count, *gradients


def logits_of(side: str, arguments: dict[str, Any]) -> Tensor:
    """The logits of the "student" or the "teacher", scaled and capped."""
    z = arguments[f"{side}_hidden_states"] @ arguments[f"{side}_lm_head_weight"].T
    z = (z + arguments.get(f"{side}_lm_head_bias", 0.0)) * arguments.get(f"{side}_logit_scale", 1.0)
    cap = arguments.get(f"{side}_final_logit_softcapping")
    return z if cap is None else cap * torch.tanh(z / cap)


def loss_by_definition(**arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, entropy sum, count) from whole logits."""
    s, t = logits_of("student", arguments), logits_of("teacher", arguments)
    rows = arguments["completion_mask"] != 0
    labels = torch.where(rows, 0, -100)
    temperature, count = arguments.get("temperature", 1.0), arguments.get("num_items_in_batch")
    value = stock_jsd(s, t, labels, arguments["beta"], temperature, num_items_in_batch=count)
    entropy = torch.special.entr(torch.softmax(s[rows].detach() / temperature, -1)).sum()
    return value, entropy, rows.sum()


CAPS = {
    "student_logit_scale": 0.5,
    "teacher_logit_scale": 2.0,
    "student_final_logit_softcapping": 3.0,
    "teacher_final_logit_softcapping": 7.0,
    "temperature": 1.5,
}


def assert_chunked(arguments: dict[str, Any]) -> None:
    """Assert that the chunked loss is as near to float64 as TRL's."""
    doubles = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in arguments.items()
    }
    exact = run_chunked(loss_by_definition, doubles)
    stock, actual = (run_chunked(f, arguments) for f in (stock_chunked, chunked_divergence_loss))
    for i, (a, b, c) in enumerate(zip(actual, stock, exact, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        bar = 2 * (b - c).abs().max() + (1e-12 if i == 2 else 2**-20 * c.abs().max())
        if a.dtype == torch.bfloat16:
            bar = bar + 2**-8 * c.abs()
        assert ((a - c).abs() <= bar).all(), i
    assert int(actual[2]) == int(exact[2])


@pytest.mark.parametrize("beta", BETAS)
def test_chunked_betas(beta: float) -> None:
    heads = two_heads()
    assert_chunked(heads | {"beta": beta})
    assert_chunked(heads | CAPS | {"beta": beta, "num_items_in_batch": torch.tensor(40.0)})


def test_chunked_without_biases() -> None:
    heads = {name: value for name, value in two_heads().items() if not name.endswith("bias")}
    assert_chunked(heads | {"beta": 0.5, "num_items_in_batch": 40})


def test_chunked_in_bfloat16() -> None:
    assert_chunked(two_heads(torch.bfloat16) | {"beta": 0.5})


def test_chunked_of_an_empty_completion() -> None:
    heads = two_heads()
    heads["completion_mask"].zero_()
    value, entropy, count, *gradients = run_chunked(chunked_divergence_loss, heads | {"beta": 0.5})
    assert (value.item(), entropy.item(), count.item()) == (0.0, 0.0, 0)
    assert not any(gradient.any() for gradient in gradients)


def test_chunked_casts_a_master_copy() -> None:
    """As in FSDP2's mixed precision: bfloat16 hidden states and a float32 head, whose gradient is float32."""
    heads = two_heads() | {"beta": 0.5}
    low = {n: v.bfloat16() if "hidden" in n else v for n, v in heads.items() if n != "beta"}
    actual = run_chunked(chunked_divergence_loss, low | {"beta": 0.5})
    expected = run_chunked(stock_chunked, low | {"beta": 0.5})
    assert actual[4].dtype == torch.float32
    torch.testing.assert_close(actual[:3], expected[:3], rtol=2e-2, atol=0)
    torch.testing.assert_close(actual[4], expected[4], rtol=5e-2, atol=1e-3)


def test_chunked_accepts_a_sharded_head(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    heads = two_heads() | {"beta": 0.5}
    expected = run_chunked(chunked_divergence_loss, heads)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        spread = {
            n: distribute_tensor(v, mesh, [Shard(0)]) if "lm_head" in n else v
            for n, v in heads.items()
        }
        actual = run_chunked(chunked_divergence_loss, spread)
        assert torch.equal(actual[4].full_tensor(), expected[4])
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(actual[:4], expected[:4], strict=True))


def gradient_of_a_spread_head(group: Any) -> tuple[Tensor, Tensor]:
    """The loss of a head over two processes, each with its own sequence, and the mean of the losses of each alone."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh.from_group(group, "cpu")
    rank = dist.get_rank(group)
    inputs = {
        name: value if "lm_head" in name else value[rank : rank + 1]
        for name, value in two_heads().items()
    } | {"beta": 0.5}
    mean = run_chunked(chunked_divergence_loss, inputs)[4]
    dist.all_reduce(mean, group=group)
    spread = {
        name: distribute_tensor(value, mesh, [Shard(0)]) if "lm_head" in name else value
        for name, value in inputs.items()
    }
    return run_chunked(chunked_divergence_loss, spread)[4].full_tensor(), mean / 2


@pytest.mark.heavy
def test_chunked_averages_over_processes() -> None:
    """The head's gradient is averaged over processes, as FSDP2 does for other parameters."""
    from support.processes import Processes

    pool = Processes(2)
    try:
        for actual, expected in pool.run(2, gradient_of_a_spread_head):
            assert torch.equal(actual, expected) and expected.abs().max() > 1e-3
    finally:
        pool.stop()


def test_a_zero3_partitioned_head_raises() -> None:
    heads = two_heads()
    heads["teacher_lm_head_weight"].ds_id = 1
    heads["teacher_lm_head_weight"].ds_shape = torch.Size([40, 8])
    with pytest.raises(ValueError, match="teacher_lm_head_weight is partitioned by DeepSpeed"):
        chunked_divergence_loss(**heads, beta=0.5)


# ---- self-distillation


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("tail", [None, False, True])
def test_self_distillation_losses(alpha: float, tail: bool | None) -> None:
    """Value and gradient of every row; tail None: the loss of whole rows."""
    torch.manual_seed(0)
    logits = 2.0 * torch.randn(3, 5, 71)
    teacher_logits = logits + torch.randn(3, 5, 71)
    upstream = torch.randn(3, 5)

    def result(functions: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        student = logits.to(dtype).requires_grad_()
        teacher = teacher_logits.to(dtype).requires_grad_()
        if tail is None:
            loss = functions.compute_full_logit_self_distillation_loss(
                student, teacher.detach(), distillation_alpha=alpha
            )
        else:
            loss = functions.compute_topk_self_distillation_loss(
                student, teacher.detach() if functions is not adapter else teacher, distillation_topk=9,
                distillation_alpha=alpha, distillation_add_tail=tail,
            )  # fmt: skip
        loss.backward(upstream.to(dtype))
        assert student.grad is not None and teacher.grad is None
        return loss.detach().double(), student.grad.double()

    exact = result(self_distillation, torch.float64)
    for actual, expected in zip(result(adapter), exact, strict=True):
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() < 2e-6 * expected.abs().max()


def test_self_distillation_where_the_tail_is_tiny() -> None:
    """TRL keeps the tail at 1e-7 or more, without a gradient below; fastkd has its mass and gradient exactly."""
    student = torch.tensor([[30.0, 1.0, 0.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[28.0, 3.0, 0.0, -1.0]])
    loss = adapter.compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=2, distillation_alpha=1.0, distillation_add_tail=True
    )
    q, p = student.detach().double().softmax(-1)[0], teacher.double().softmax(-1)[0]
    events = [torch.cat([x[:2], x[2:].sum(0, keepdim=True)]) for x in (q, p)]
    assert loss.item() == pytest.approx(
        (events[0] * (events[0] / events[1]).log()).sum().item(), rel=1e-5
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient[0, 2:] != 0).all()


# ---- a served teacher


def served(beta: float, **options: Any) -> dict[str, Any]:
    """Arguments of _chunked_jsd_loss: 11 rows of 5 tokens, some of which are padding."""
    torch.manual_seed(0)
    teacher_logits, hidden, weight = (
        torch.randn(11, 50), torch.randn(11, 8), 0.7 * torch.randn(50, 8)
    )  # fmt: skip
    ids = torch.rand(11, 50).argsort(-1)[:, :5]
    valid = torch.rand(11, 5) < 0.8
    valid[:, 0] = True
    return {
        "hidden_valid": hidden.requires_grad_(),
        "lm_head_weight": weight.requires_grad_(),
        "lm_head_bias": torch.randn(50).requires_grad_(),
        "logit_scale": 0.9,
        "final_logit_softcapping": 20.0,
        "target_ids": ids.where(valid, ids[:, :1]),  # padding repeats a token that counts
        "teacher_target_logps": (teacher_logits.double() / 1.3)
        .log_softmax(-1)
        .gather(-1, ids)
        .float(),
        "valid_candidate_mask": valid,
        "beta": beta,
        "temperature": 1.3,
        "add_tail_bucket": True,
        "teacher_id_idx": torch.randint(2, (11,)),
        "num_teachers": 3,
        "chunk_size": 4,
    } | options


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"teacher_id_idx": None, "lm_head_bias": None, "final_logit_softcapping": None}]
)
def test_chunked_jsd_loss(beta: float, tail: bool, options: dict[str, Any]) -> None:
    """Every output, and the gradients, against TRL's own function, which computes in float32 whatever the dtype is."""

    def result(function: Callable[..., Any]) -> list[Tensor]:
        given = served(beta, add_tail_bucket=tail, **options)
        outputs = function(**given)
        outputs[0].backward()
        assert not any(output.requires_grad for output in outputs[1:])
        parameters = ("hidden_valid", "lm_head_weight", "lm_head_bias")
        gradients = [given[name].grad for name in parameters if given[name] is not None]
        return [x.detach().double() for x in (*outputs, *gradients)]

    stock = result(async_distillation_trainer._chunked_jsd_loss)
    actual = result(adapter.chunked_jsd_loss)
    for ours, theirs in zip(actual, stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    if options:
        assert not actual[4].any()
    else:
        assert actual[4].view(3, 3)[:, 0].tolist() == [
            *served(beta)["teacher_id_idx"].bincount(minlength=3)
        ]


def test_chunked_jsd_loss_of_a_partitioned_head() -> None:
    given = served(0.0)
    given["lm_head_weight"].ds_id = 1
    given["lm_head_weight"].ds_shape = torch.Size([40, 8])
    with pytest.raises(ValueError, match="lm_head_weight is partitioned by DeepSpeed"):
        adapter.chunked_jsd_loss(**given)


def test_async_distillation_trainer() -> None:
    """One loss of the real trainer's method, without the servers that its constructor wants."""
    from types import SimpleNamespace

    student = tiny_models.llama(seed=1)
    ids = torch.randint(3, 61, (1, 12))
    top = torch.randn(1, 12, 61).log_softmax(-1).topk(4, -1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones(1, 12, dtype=torch.int64),
        "completion_mask": torch.tensor([[0] * 4 + [1] * 8]),
        "position_ids": torch.arange(12)[None],
        "teacher_topk_ids": top.indices,
        "teacher_topk_logprobs": top.values,
        "global_n_tokens": torch.tensor([8]),
        "global_n_forward_tokens": torch.tensor([12]),
        "mean_seq_len": torch.tensor([12.0]),
    }
    results = []
    for kind in (AsyncDistillationTrainer, adapter.AsyncDistillationTrainer):
        trainer = kind.__new__(kind)
        trainer.args = SimpleNamespace(beta=0.0, teacher_temperature=1.0, add_tail_bucket=True)
        trainer.current_gradient_accumulation_steps = 1
        trainer.accelerator = Accelerator(cpu=True)
        trainer.model = student
        trainer._teacher_ids = ["one"]
        for name in (
            "forward_tokens",
            "trained_tokens",
            "seq_len_weighted",
            "samples",
            "forward_s",
        ):
            setattr(trainer, f"_step_{name}", 0.0)
        trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        loss = trainer._compute_loss(student, inputs)
        student.zero_grad()
        loss.backward()
        metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
        assert set(metrics) == {"jsd", "entropy", "teacher_entropy"}
        metrics["loss"] = loss.item()
        results.append((metrics, student.get_input_embeddings().weight.grad.clone()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-6)


# ---- trainers

PROMPTS = ["in the beginning", "and the earth", "god created", "the heaven and the earth was"]


def common(path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(path),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "max_steps": 5,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "seed": 3,
    }


def models() -> dict[str, nn.Module]:
    return {
        "model": tiny_models.llama(seed=1),
        "teacher_model": tiny_models.llama(width=24, seed=2),
    }


def gkd(trainer: type, path: Path, chosen_models: Any = None, **options: Any) -> Any:
    """A GKD trainer with half of the batches on-policy."""
    chats = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": a}]
        for p, a in zip(
            PROMPTS, ["god created the heaven", "was void", "form and earth", "void"], strict=True
        )
    ]
    args = GKDConfig(
        **common(path) | {"max_length": 24, "max_new_tokens": 6, "beta": 0.3} | options
    )
    data = Dataset.from_dict({"messages": chats})
    return trainer(
        **(chosen_models or models()), args=args, train_dataset=data, eval_dataset=data,
        processing_class=tiny_models.tokenizer(),
    )  # fmt: skip


def on_policy(trainer: type, path: Path, chosen_models: Any = None, **options: Any) -> Any:
    own = {"max_completion_length": 6, "beta": 0.3, "temperature": 1.3}
    args = DistillationConfig(**common(path) | own | options)
    data = Dataset.from_dict({"prompt": PROMPTS})
    return trainer(
        **(chosen_models or models()), args=args, train_dataset=data, eval_dataset=data,
        processing_class=tiny_models.tokenizer(),
    )  # fmt: skip


def sdft(trainer: type, path: Path, **options: Any) -> Any:
    """A student that answers, and the same model as the teacher, with an answer in its prompt."""
    own = {"max_completion_length": 6, "num_generations": 2, "teacher_model_kind": "live"}
    args = SDFTConfig(**common(path) | own | options)
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    contexts = ["god created the heaven", "was void", "form and earth", "void"]
    data = Dataset.from_dict({"prompt": prompts, "privileged_context": contexts})
    return trainer(
        model=models()["model"], args=args, train_dataset=data, processing_class=tiny_models.tokenizer()
    )  # fmt: skip


def sdpo(trainer: type, path: Path, **options: Any) -> Any:
    """A student whose rewarded answers become part of the teacher's prompt."""
    own = {"max_completion_length": 6, "num_generations": 2, "teacher_model_kind": "live"}
    args = SDPOConfig(**common(path) | own | options)
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in PROMPTS]})

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(index % 2) for index in range(len(completions))]

    return trainer(
        model=models()["model"], reward_funcs=reward, args=args, train_dataset=data,
        processing_class=tiny_models.tokenizer(),
    )  # fmt: skip


def trained(trainer: Any) -> tuple[list[float], list[float], Tensor]:
    """Losses of the steps, entropies if logged, and weights after training."""
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return (
        [entry["loss"] for entry in entries],
        [entry["entropy"] for entry in entries if "entropy" in entry],
        weights,
    )


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    calls: list[None] = []
    real = getattr(fastkd, name)
    monkeypatch.setattr(fastkd, name, lambda *a, **k: (calls.append(None), real(*a, **k))[1])
    return calls


TRAINERS = {
    "GKDTrainer": (gkd, GKDTrainer, "kd_loss"),
    "DistillationTrainer": (on_policy, DistillationTrainer, "fused_linear_kd_loss"),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps of two batches; measured relative differences of losses and weights are at most 2e-7."""
    build, stock_class, loss = TRAINERS[name]
    calls = count_calls(monkeypatch, loss)
    stock = trained(build(stock_class, tmp_path))
    assert not calls
    trainer = build(getattr(adapter, name), tmp_path)
    assert isinstance(trainer, stock_class)
    actual = trained(trainer)
    assert len(calls) == 10
    assert len(actual[0]) == 5 and len(set(actual[0])) == 5
    assert actual[0] == pytest.approx(stock[0], rel=2e-6)
    assert actual[1] == pytest.approx(stock[1], rel=2e-6)
    assert len(actual[1]) == (5 if name == "DistillationTrainer" else 0)
    assert (actual[2] - stock[2]).abs().max() < 2e-6
    start = torch.cat([p.detach().flatten() for p in models()["model"].parameters()])
    assert (actual[2] - start).abs().max() > 1e-2


SELF_DISTILLATION = {
    "full logits": {"distillation_mode": "full_logits", "distillation_alpha": 0.5},
    "tail": {
        "distillation_mode": "topk_logits", "distillation_topk": 5, "distillation_alpha": 0.3,
        "distillation_add_tail": True,
    },
    "no tail": {"distillation_mode": "topk_logits", "distillation_topk": 5, "distillation_alpha": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("mode", SELF_DISTILLATION)
@pytest.mark.parametrize(("build", "stock_class"), [(sdft, SDFTTrainer), (sdpo, SDPOTrainer)])
def test_self_distillation_trainers(
    build: Callable[..., Any],
    stock_class: type,
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = count_calls(monkeypatch, "kd_loss")
    stock = trained(build(stock_class, tmp_path, **SELF_DISTILLATION[mode]))
    assert not calls
    trainer = build(getattr(adapter, stock_class.__name__), tmp_path, **SELF_DISTILLATION[mode])
    assert isinstance(trainer, stock_class)
    actual = trained(trainer)
    assert len(calls) == 10
    assert len(actual[0]) == 5 and len(set(actual[0])) == 5
    assert actual[0] == pytest.approx(stock[0], rel=2e-6)
    assert (actual[2] - stock[2]).abs().max() < 2e-6
    start = torch.cat([p.detach().flatten() for p in models()["model"].parameters()])
    assert (actual[2] - start).abs().max() > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_partitioned_heads(tied: bool, tmp_path: Path) -> None:
    """DistillationTrainer with the stand-in for DeepSpeed ZeRO-3."""
    chosen = models() | {"model": tiny_models.llama(seed=1, tie_word_embeddings=tied)}
    for model in chosen.values():
        model.lm_head.bias = nn.Parameter(torch.randn(61))
    trainer = on_policy(adapter.DistillationTrainer, tmp_path, chosen)
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"prompt_ids": ids[:, :4], "completion_ids": ids[:, 4:]}
    inputs |= {name.replace("ids", "mask"): torch.ones_like(x) for name, x in inputs.items()}
    student, teacher = chosen["model"], trainer.teacher_model.requires_grad_(False)
    results = []
    for partitioned in (False, True):
        if partitioned:
            for model in (student, teacher):
                zero3_stand_in.partition(model.model.embed_tokens, model.lm_head)
        trainer.model.zero_grad()
        loss, entropy, rows = trainer._compute_loss(student, inputs, torch.tensor(7.0))
        loss.backward()
        taken = (getattr(p, "reduced", p.grad) for p in student.parameters())
        results.append([loss.detach(), entropy, rows, *(g.clone() for g in taken)])
    assert student.lm_head.weight.numel() == 0 and results[1][3].any()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", TRAINERS)
def test_evaluation(name: str, tmp_path: Path) -> None:
    build, stock_class, _ = TRAINERS[name]
    results = []
    for trainer_class in (stock_class, getattr(adapter, name)):
        trainer = build(trainer_class, tmp_path)
        torch.manual_seed(0)
        results.append(trainer.evaluate()["eval_loss"])
    assert results[1] == pytest.approx(results[0], rel=1e-6)


def test_gkd_at_temperature_one(tmp_path: Path) -> None:
    """args.temperature is for sampling only, as in TRL; a subclass changes the loss's temperature."""
    import functools

    class WarmGKDTrainer(adapter.GKDTrainer):
        generalized_jsd_loss = staticmethod(
            functools.partial(generalized_jsd_loss, temperature=3.0)
        )

    results = [
        gkd(trainer, tmp_path, temperature=temperature).evaluate()["eval_loss"]
        for trainer, temperature in (
            (adapter.GKDTrainer, 0.9),
            (adapter.GKDTrainer, 3.0),
            (WarmGKDTrainer, 0.9),
        )
    ]
    assert results[0] == results[1] > 2 * results[2]


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """GKDTrainer keeps the router's auxiliary loss, which TRL's omits; DistillationTrainer raises."""
    config = {"router_aux_loss_coef": 0.5, "num_local_experts": 4, "num_experts_per_tok": 2}

    def mixtures() -> dict[str, nn.Module]:
        built = tiny_models.built("MixtralForCausalLM", **config)
        return {"model": built, "teacher_model": tiny_models.llama(seed=2)}

    losses = []
    for trainer_class, options in (
        (GKDTrainer, {}), (adapter.GKDTrainer, {}), (adapter.GKDTrainer, {"router_aux_loss_coef": 0.0}),
    ):  # fmt: skip
        trainer = gkd(
            trainer_class, tmp_path, lmbda=0.0, max_steps=1, chosen_models=mixtures(), **options
        )
        trainer.train()
        losses.append(trainer.state.log_history[0])
    assert (
        losses[1]["aux_loss"] > 0.5
    )  # the auxiliary loss is at least 1, its value if all 4 experts are used equally
    aux = 0.5 * losses[1]["aux_loss"]
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"] + aux, rel=1e-5)
    assert losses[2]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="DistillationTrainer ignores the router's auxiliary loss"):
        on_policy(adapter.DistillationTrainer, tmp_path, chosen_models=mixtures())


def test_trl_is_not_patched() -> None:
    actual = adapter.DistillationTrainer
    name = "_chunked_divergence_loss"
    assert getattr(distillation_trainer, name) is stock_chunked
    assert DistillationTrainer._compute_loss.__globals__[name] is stock_chunked
    method = inspect.getclosurevars(actual._compute_loss).nonlocals["method"]
    assert method.__globals__[name] is chunked_divergence_loss
    assert adapter.DistillationTrainer is actual
    assert actual.__module__ == "fastkd.compat.trl" and "fastkd" in actual.__doc__


def test_an_unsupported_version_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error names the change if TRL differs from the supported version."""
    for name in TRAINERS:
        monkeypatch.delitem(vars(adapter), name, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(
            DistillationTrainer, "_compute_loss", lambda self, *_: None
        )  # calls something else
        with pytest.raises(ImportError, match=r"supports TRL 1.16; TRL \d.* does not call"):
            adapter.DistillationTrainer  # noqa: B018
    with monkeypatch.context() as patch:
        patch.setattr(
            GKDTrainer, "generalized_jsd_loss", staticmethod(lambda student, teacher: None)
        )
        with pytest.raises(ImportError, match="has generalized_jsd_loss\\('student', 'teacher'\\)"):
            adapter.GKDTrainer  # noqa: B018
    with monkeypatch.context() as patch:
        patch.delattr(distillation_trainer, "_chunked_divergence_loss")
        with pytest.raises(ImportError, match="has no _chunked_divergence_loss"):
            adapter.DistillationTrainer  # noqa: B018
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trl.experimental.gkd", None)
        with pytest.raises(ImportError, match="has no importable trl.experimental.gkd.GKDTrainer"):
            adapter.GKDTrainer  # noqa: B018
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trl", None)
        with pytest.raises(ImportError, match="pip install trl"):
            adapter.GKDTrainer  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'SFTTrainer'"):
        adapter.SFTTrainer  # noqa: B018


# ---- the example


@pytest.fixture
def swap(monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = ROOT / "examples" / "swap"
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_example(swap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import trl_gkd

    trl_gkd.main(tiny=True, steps=2, assets=swap)
    table = capsys.readouterr().out
    assert "TRL" in table and len(re.findall(r"^│ +\d │ ", table, re.M)) == 2


def test_example_fails_where_curves_differ(swap: Path) -> None:
    import typer
    from side_by_side import Run, report

    report("TRL", Run([1.0, 0.5], 1.0, None), Run([1.00001, 0.501], 1.0, 7), tiny=False)
    for losses in ([1.001, 0.5], [1.0, 0.51], [1.0, float("nan")]):
        with pytest.raises(typer.Exit):
            report("TRL", Run([1.0, 0.5], 1.0, None), Run(losses, 1.0, None), tiny=True)


@pytest.mark.heavy
def test_example_on_smollm2(swap: Path) -> None:
    import trl_gkd

    assets = swap.parents[1] / "build" / "demo"
    if not assets.is_dir():
        pytest.skip("examples/demo-requirements.txt is not in build/demo")
    trl_gkd.main(tiny=False, steps=2, assets=assets)
