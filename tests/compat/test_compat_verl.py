"""fastkd.compat.verl and fastkd.compat.veomni against verl's losses and engine, and VeOmni's kernel."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import math
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import verl.trainer.distillation.losses as verl_losses
import verl.utils.tensordict_utils as tu
from support.processes import Processes
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
from verl.workers.config import DistillationConfig, DistillationLossConfig
from verl.workers.utils.padding import no_padding_2_padding

import fastkd
from fastkd.compat import veomni
from fastkd.compat import verl as adapter

K, V = 6, 40
PROMPTS, RESPONSES = (3, 1, 4), (4, 6, 1)
LENGTHS = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
ROWS = sum(LENGTHS)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    adapter.register()


class Batch(NamedTuple):
    """What verl's engine and loss read."""

    logits: Tensor  # [1, nnz, V], a leaf
    data: TensorDict


def nested(values: Tensor, lengths: Any = LENGTHS) -> Tensor:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(
        values, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
    )


def counted_rows() -> Tensor:
    """The rows of logits that predict tokens of the responses."""
    counted = torch.zeros(ROWS, dtype=torch.bool)
    end = 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        end += prompt + response
        counted[end - response - 1 : end - 1] = True
    return counted


def batch(seed: int = 0, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> Batch:
    """A micro-batch; the student's logits of the teacher's tokens are shifted."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(ROWS, V, generator=generator)
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    logits = teacher + torch.randn(ROWS, V, generator=generator)
    logits = logits.scatter_add(-1, ids, torch.full(ids.shape, shift)).to(dtype)
    # As verl leaves them: the last row of each sequence has no teacher.
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    logprobs[ends], ids[ends] = 0.0, 0
    tokens = torch.randint(V, (ROWS,), generator=generator)
    parts = [
        sequence.split([p, r])
        for sequence, p, r in zip(tokens.split(LENGTHS), PROMPTS, RESPONSES, strict=True)
    ]
    data = TensorDict(
        {
            "input_ids": nested(tokens),
            "teacher_logprobs": nested(logprobs),
            "teacher_ids": nested(ids.int()),
            "prompts": nested(torch.cat([prompt for prompt, _ in parts]), PROMPTS),
            "responses": nested(torch.cat([response for _, response in parts]), RESPONSES),
            "response_mask": nested(torch.ones(sum(RESPONSES), dtype=torch.int64), RESPONSES),
        },
        batch_size=len(LENGTHS),
    )
    for name, value in {
        "dp_size": 1, "batch_num_tokens": sum(RESPONSES), "global_batch_size": len(LENGTHS),
        "distillation_use_topk": True,
    }.items():  # fmt: skip
        tu.assign_non_tensor_data(data, name, value)
    return Batch(logits.unsqueeze(0).requires_grad_(), data)


class Actor(SimpleNamespace):
    """What the losses read of verl's ActorConfig."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def configs(mode: str, strategy: str = "fsdp", **settings: Any) -> tuple[Any, DistillationConfig]:
    actor = Actor(
        strategy=strategy, loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None,
        policy_loss={"loss_mode": "vanilla"}, clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=3.0,
        use_kl_loss=False, entropy_coeff=0,
    )  # fmt: skip
    given = {
        "topk": K, "use_policy_gradient": False, "use_task_rewards": False, "log_prob_min_clamp": None,
        "loss_max_clamp": None, **settings,
    }  # fmt: skip
    loss = DistillationLossConfig(loss_mode=mode, **given)
    return actor, DistillationConfig(enabled=False, distillation_loss=loss)


def run(
    mode: str, given: Batch, **settings: Any
) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """Both phases: (the outputs of the first, the loss, the metrics)."""
    actor, config = configs(mode, **settings)
    outputs = verl_losses.distillation_ppo_loss(
        actor, config, data=given.data, student_logits=given.logits
    )
    model_output = {name: nested(value.squeeze(0)) for name, value in outputs.items()}
    model_output["log_probs"] = nested(given.logits[0].log_softmax(-1)[:, 0])
    loss, metrics = verl_losses.distillation_ppo_loss(actor, config, model_output, given.data)
    return outputs, loss, metrics


def plain(value: Any) -> float:
    value = getattr(value, "values", value)
    if callable(value):
        value = value()
    value = value[0] if isinstance(value, list) else value
    return float(value)


# ---- beside verl's own mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clamp", [None, -2.5])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_truncated_forward_kl_is_verls(
    dtype: torch.dtype, clamp: float | None, chunked: bool
) -> None:
    outcomes = []
    for mode in ("forward_kl_topk", "fastkd_forward_kl_truncate"):
        given = batch(dtype=dtype, shift=-2.0)
        outputs, loss, metrics = run(
            mode, given, log_prob_min_clamp=clamp, use_chunked_topk=chunked
        )
        (gradient,) = torch.autograd.grad(loss, given.logits)
        outcomes.append((outputs, loss, metrics, gradient))
    (theirs, their_loss, their_metrics, their_gradient), (ours, loss, metrics, gradient) = outcomes
    counted = counted_rows()
    # verl sets negative losses to 0; here none is negative, so that the modes agree.
    assert (theirs["distillation_losses"][0, counted] > 0).all()
    # verl rounds log q to bfloat16.
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 5e-3}
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        found, expected = ours[name][0, counted].float(), theirs[name][0, counted].float()
        torch.testing.assert_close(found, expected, **tolerance)
        assert not ours[name][0, ~counted].any()
    torch.testing.assert_close(loss.float(), their_loss.float(), **tolerance)
    assert (
        gradient.dtype == dtype and gradient[0, counted].any() and not gradient[0, ~counted].any()
    )
    torch.testing.assert_close(gradient, their_gradient, **tolerance)
    assert metrics.keys() == their_metrics.keys()
    for name in metrics:
        assert plain(metrics[name]) == pytest.approx(
            plain(their_metrics[name]), rel=3e-2, abs=5e-3
        ), name


def test_a_negative_loss_and_its_gradient_stay() -> None:
    """verl's own function sets both to 0."""
    given = batch()
    # The student has the teacher's tokens in the teacher's proportions, but with all of the mass.
    ids, logprobs = given.data["teacher_ids"].values(), given.data["teacher_logprobs"].values()
    with torch.no_grad():
        given.logits[0] = -30.0
        given.logits[0].scatter_(1, ids.long(), logprobs)
    outputs, loss, _ = run("fastkd_forward_kl_truncate", given)
    counted = counted_rows()
    assert (outputs["distillation_losses"][0, counted] < 0).all() and loss < 0
    assert torch.autograd.grad(loss, given.logits)[0][0, counted].any()
    _, stock, _ = run("forward_kl_topk", given)
    assert stock == 0


def test_policy_gradient_and_task_rewards() -> None:
    for settings in (
        {"use_policy_gradient": True},
        {"use_task_rewards": False, "loss_max_clamp": 0.5},
    ):
        losses = []
        for mode in ("forward_kl_topk", "fastkd_forward_kl_truncate"):
            given = batch(1, shift=-2.0)
            sampled = nested(given.logits[0].log_softmax(-1)[:, 0].detach())
            given.data["old_log_probs"] = no_padding_2_padding(sampled, given.data) + 0.01
            given.data["advantages"] = torch.ones(len(RESPONSES), max(RESPONSES))
            actor, config = configs(mode, **settings)
            config.distillation_loss.global_batch_info.clear()
            outputs = verl_losses.distillation_ppo_loss(
                actor, config, data=given.data, student_logits=given.logits
            )
            model_output = {name: nested(value.squeeze(0)) for name, value in outputs.items()}
            model_output["log_probs"] = nested(given.logits[0].log_softmax(-1)[:, 0])
            loss, _ = verl_losses.distillation_ppo_loss(actor, config, model_output, given.data)
            losses.append((loss, *torch.autograd.grad(loss, given.logits)))
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        assert losses[0][1].any()


def test_the_advantage_of_the_overlap_is_clamped_as_the_loss_is() -> None:
    given = batch(2)
    actor, config = configs("fastkd_forward_kl_truncate", log_prob_min_clamp=-1.5)
    ours = verl_losses.compute_topk_loss(actor, config, given.data, given.logits, "thd")
    theirs = compute_forward_kl_topk(
        given.logits,
        given.data["teacher_logprobs"],
        given.data["teacher_ids"].long(),
        config,
        "thd",
    )
    counted = counted_rows()
    for name in ("overlap_count", "overlap_token_advantage", "student_mass", "teacher_mass"):
        torch.testing.assert_close(ours[name][0, counted], theirs[name][0, counted])
    assert ours["overlap_count"][0, counted].unique().numel() > 1


# ---- each mode against its formula


def exact_losses(
    divergence: str, tail: str, logits: Tensor, logprobs: Tensor, ids: Tensor
) -> Tensor:
    """The losses [nnz] in float64."""
    log_p = logprobs.double()
    all_q = logits.double().log_softmax(-1)
    log_q = all_q.gather(-1, ids)
    if tail == "renormalize":
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    if tail == "bucket":
        others = all_q.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        rest = (-log_p.exp().sum(-1, keepdim=True)).log1p()
        log_p, log_q = torch.cat([log_p, rest], -1), torch.cat([log_q, others], -1)
    if divergence == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if divergence == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2


@pytest.mark.parametrize("mode", sorted(adapter.LOSSES))
def test_each_mode(mode: str) -> None:
    given = batch(3)
    outputs, loss, _ = run(mode, given)
    assert isinstance(loss, Tensor)
    counted = counted_rows()
    divergence, tail = mode.removeprefix("fastkd_").rsplit("_", 1)
    logits = given.logits.detach().double().requires_grad_()
    exact = exact_losses(
        divergence, tail, logits[0, counted],
        given.data["teacher_logprobs"].values()[counted], given.data["teacher_ids"].values()[counted].long(),
    )  # fmt: skip
    torch.testing.assert_close(
        outputs["distillation_losses"][0, counted].double(), exact, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(loss.double(), exact.mean(), rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(loss, given.logits)[0].double()
    expected = torch.autograd.grad(exact.mean(), logits)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_mode_of_ones_own() -> None:
    adapter.register_loss("mine_jsd", fastkd.jsd(0.1), "bucket")
    adapter.register_loss("mine_jsd", fastkd.jsd(0.1), "bucket")  # the same again
    given = batch(4)
    outputs, *_ = run("mine_jsd", given)
    counted = counted_rows()
    teacher = fastkd.TopK(
        given.data["teacher_ids"].values(), given.data["teacher_logprobs"].values(), tail="bucket"
    )
    expected = fastkd.kd_loss(
        given.logits[0], teacher, divergence=fastkd.jsd(0.1), mask=counted, reduction="none"
    )
    torch.testing.assert_close(outputs["distillation_losses"][0], expected)
    with pytest.raises(
        ValueError, match="'mine_jsd' already exists with another divergence or tail"
    ):
        adapter.register_loss("mine_jsd", fastkd.jsd(0.2), "bucket")
    with pytest.raises(ValueError, match="tail must be one of bucket, .*; got 'rest'"):
        adapter.register_loss("another", fastkd.jsd(0.2), "rest")
    with pytest.raises(
        TypeError, match=r"divergence must be a fastkd.Divergence, such as .*; got str"
    ):
        adapter.register_loss("another", "jsd")  # type: ignore[arg-type]
    assert "another" not in adapter.LOSSES


def test_rows_that_predict_no_response_are_not_read() -> None:
    given = batch(5)
    _, expected, _ = run("fastkd_jsd_bucket", given)
    outside = ~counted_rows()
    given.data["teacher_logprobs"].values()[outside] = math.nan
    given.data["teacher_ids"].values()[outside] = 2**30
    with torch.no_grad():
        given.logits[0, outside] = math.nan
    outputs, loss, metrics = run("fastkd_jsd_bucket", given)
    torch.testing.assert_close(loss, expected)
    assert all(value.isfinite().all() for value in outputs.values())
    assert all(math.isfinite(plain(value)) for value in metrics.values())
    (gradient,) = torch.autograd.grad(loss, given.logits)
    assert not gradient[0, outside].any() and gradient.isfinite().all()


def test_padded_prompts_and_responses() -> None:
    """Older data: prompts padded on the left, responses on the right, with an attention mask."""
    given = batch(6)
    _, expected, _ = run("fastkd_reverse_kl_bucket", given)
    prompts, responses = max(PROMPTS), max(RESPONSES)
    data = given.data.clone()
    mask = torch.zeros(len(LENGTHS), prompts + responses, dtype=torch.int64)
    for row, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        mask[row, prompts - p : prompts + r] = 1
    data["prompts"] = torch.zeros(len(LENGTHS), prompts, dtype=torch.int64)
    data["responses"] = torch.zeros(len(LENGTHS), responses, dtype=torch.int64)
    data["attention_mask"], data["response_mask"] = mask, mask[:, prompts:]
    _, loss, _ = run("fastkd_reverse_kl_bucket", Batch(given.logits, data))
    torch.testing.assert_close(loss, expected)


def test_a_vocabulary_smaller_than_k() -> None:
    logits = torch.randn(1, 2, 4, requires_grad=True)
    logprobs, ids = torch.randn(1, 2, 4).log_softmax(-1).topk(4)
    outputs = adapter.topk_losses(logits, logprobs, ids, fastkd.reverse_kl(), "bucket")
    assert (outputs["overlap_count"] == 4).all()
    torch.testing.assert_close(outputs["student_mass"], torch.ones(1, 2))


# ---- messages


def test_messages() -> None:
    given = batch()
    with pytest.raises(
        ValueError, match="log_prob_min_clamp must be null for jsd with the tail 'bucket', got -10"
    ):
        run("fastkd_jsd_bucket", given, log_prob_min_clamp=-10.0)
    with pytest.raises(
        NotImplementedError, match="must be fsdp, fsdp2, veomni or megatron, got 'torchtitan'"
    ):
        actor, config = configs("fastkd_jsd_bucket", strategy="torchtitan")
        verl_losses.compute_topk_loss(actor, config, given.data, given.logits, "thd")
    for mode, message in (
        ("fastkd_jsd_bucket", "VeOmni's compute only forward KL with the tail 'truncate'"),
        ("fastkd_forward_kl_truncate", "kernels compute no distillation losses"),
    ):
        actor, config = configs(mode)
        with pytest.raises(
            ValueError, match=f"use_fused_kernels must be False with loss_mode '{mode}'.*{message}"
        ):
            verl_losses.distillation_ppo_loss(actor, config, {}, given.data)


def test_the_losses_of_veomnis_fused_head_are_accepted() -> None:
    given = batch()
    outputs, expected, _ = run("fastkd_forward_kl_truncate", given)
    actor, config = configs("fastkd_forward_kl_truncate")
    model_output = {
        name: nested(outputs[name].squeeze(0))
        for name in ("distillation_losses", "student_mass", "teacher_mass")
    }
    loss, metrics = verl_losses.distillation_ppo_loss(actor, config, model_output, given.data)
    torch.testing.assert_close(loss, expected)
    assert "distillation/overlap_ratio" not in metrics


# ---- how verl finds the modes


def test_verls_loader_registers_the_modes() -> None:
    loaded = EntryPoint("fastkd", "fastkd.compat.verl:plugin", "verl.plugins").load()
    assert loaded is adapter.register
    assert set(adapter.LOSSES) <= set(verl_losses.DISTILLATION_LOSS_REGISTRY)
    with pytest.raises(AttributeError, match="has no attribute 'plugins'"):
        adapter.plugins  # noqa: B018


def test_importing_verl_is_enough() -> None:
    program = (
        "import sys\n"
        "from verl.workers.config import DistillationLossConfig\n"
        "print(DistillationLossConfig(loss_mode='fastkd_jsd_bucket').loss_settings.use_topk)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    assert done.stdout.split()[-1:] == ["True"], done.stderr[-2000:]


# ---- verl's engine


def engine_outputs(
    mode: str, given: Batch, temperature: float
) -> tuple[Any, Any, dict[str, Tensor]]:
    """What FSDPEngineWithLMHead makes of a model's logits."""
    module = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    actor, config = configs(mode)
    engine: Any = SimpleNamespace(
        use_ulysses_sp=False,
        engine_config=SimpleNamespace(
            entropy_checkpointing=False, entropy_from_logits_with_chunking=False
        ),
        compute_entropy_from_logits=lambda logits: torch.distributions.Categorical(
            logits=logits
        ).entropy(),
    )
    engine._gather_and_unpad_packed = types.MethodType(
        module.FSDPEngine._gather_and_unpad_packed, engine
    )
    ids = given.data["input_ids"].values()
    arguments = {
        "input_ids_rmpad_rolled": ids.roll(-1), "temperature_rmpad": torch.full((ROWS,), temperature),
        "temperature_is_one": temperature == 1.0, "pad_size": 0,
    }  # fmt: skip
    processor = functools.partial(
        verl_losses.distillation_ppo_loss,
        config=actor,
        distillation_config=config,
        data_format="thd",
    )

    def process(student_logits: Tensor, data: Any) -> Any:
        return processor(student_logits=student_logits, data=data)

    outputs = module.FSDPEngineWithLMHead.prepare_model_outputs(
        engine, SimpleNamespace(logits=given.logits), arguments, given.data, process
    )
    return actor, config, outputs


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_through_verls_engine(temperature: float) -> None:
    """verl divides the student's logits by the rollout's temperature; the logits also give its log-probabilities."""
    outcomes = []
    for mode in ("forward_kl_topk", "fastkd_forward_kl_truncate"):
        given = batch(7, shift=-2.0)
        actor, config, outputs = engine_outputs(mode, given, temperature)
        loss, _ = verl_losses.distillation_ppo_loss(actor, config, outputs, given.data)
        total = loss + 0.3 * outputs["log_probs"].values().sum()
        outcomes.append((loss, *torch.autograd.grad(total, given.logits)))
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-6)


def test_a_few_steps_of_training() -> None:
    curves = []
    for mode in ("forward_kl_topk", "fastkd_forward_kl_truncate"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(V, 16), torch.nn.Linear(16, V))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
        losses = []
        for _ in range(5):
            given = batch(8)
            logits = model(given.data["input_ids"].values()).unsqueeze(0)
            actor, config, outputs = engine_outputs(mode, Batch(logits, given.data), 1.0)
            loss, _ = verl_losses.distillation_ppo_loss(actor, config, outputs, given.data)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


# ---- Megatron: logits of parts of the vocabulary


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(2)
    yield pool
    pool.stop()


def of_megatron(group: Any, mode: str, clamp: float | None) -> tuple[dict[str, Tensor], Tensor]:
    """A process's losses and the gradient of its part of the logits."""
    from megatron.core import parallel_state

    adapter.register()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=group.size())
    given = batch(9)
    width = V // group.size()
    part = given.logits.detach()[..., group.rank() * width : (group.rank() + 1) * width].clone()
    # Sequences are padded to a multiple of the number of processes.
    padded = [length + length % 2 for length in LENGTHS]
    rows = torch.cat([torch.arange(padded[i]) + sum(padded[:i]) for i in range(len(padded))])[
        : sum(padded)
    ]
    kept = torch.cat([torch.arange(n) + sum(padded[:i]) for i, n in enumerate(LENGTHS)])
    student = torch.zeros(1, len(rows), width)
    student[0, kept] = part[0]
    student.requires_grad_()
    actor, config = configs(mode, strategy="megatron", log_prob_min_clamp=clamp)
    outputs = verl_losses.compute_topk_loss(actor, config, given.data, student, "thd")
    counted = counted_rows()
    losses = outputs["distillation_losses"][0, kept]
    (gradient,) = torch.autograd.grad(losses[counted].mean(), student)
    return (
        {name: value.detach()[0, kept][counted] for name, value in outputs.items()},
        gradient[0, kept],
    )


@pytest.mark.parametrize("clamp", [None, -2.5])
def test_logits_of_parts_of_the_vocabulary(processes: Processes, clamp: float | None) -> None:
    theirs = processes.run(2, of_megatron, "forward_kl_topk", clamp)
    ours = processes.run(2, of_megatron, "fastkd_forward_kl_truncate", clamp)
    for (their_outputs, their_gradient), (outputs, gradient) in zip(theirs, ours, strict=True):
        for name in outputs:
            if name.endswith("mass") and clamp is not None:
                continue  # for Megatron, verl takes the masses after the clamp
            torch.testing.assert_close(outputs[name], their_outputs[name], rtol=1e-5, atol=1e-6)
        counted = counted_rows()
        torch.testing.assert_close(gradient[counted], their_gradient[counted], rtol=1e-5, atol=1e-6)
        assert gradient[counted].any() and not gradient[~counted].any()


# ---- VeOmni's fused head


@pytest.fixture(scope="module")
def kernel() -> Any:
    """VeOmni's function, from its own file; importing the whole package needs other releases of transformers."""
    found = importlib.util.find_spec("veomni")
    assert found is not None and found.submodule_search_locations
    root = Path(next(iter(found.submodule_search_locations)))
    state: Any = types.ModuleType("veomni.distributed.parallel_state")
    state.get_parallel_state = lambda: SimpleNamespace(sp_enabled=False)
    name = "veomni.ops.kernels.cross_entropy"
    with pytest.MonkeyPatch.context() as patch:
        for parent in ("veomni", "veomni.ops", "veomni.ops.kernels", name, "veomni.distributed"):
            package = types.ModuleType(parent)
            package.__path__ = [str(root.joinpath(*parent.split(".")[1:]))]
            patch.setitem(sys.modules, parent, package)
        patch.setitem(sys.modules, state.__name__, state)
        module = importlib.import_module(f"{name}.chunk_topk_distill")
        yield module
        for loaded in [m for m in sys.modules if m.startswith("veomni")]:
            patch.delitem(sys.modules, loaded)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("clamp", [None, -2.5])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_the_fused_head_is_veomnis(
    kernel: Any, shifted: bool, clamp: float | None, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 8, generator=generator, requires_grad=True)
    weight = torch.randn(V, 8, generator=generator, requires_grad=True)
    labels = torch.randint(V, (2, 9), generator=generator)
    labels[0, 3:5] = -100
    logprobs, ids = (3 * torch.randn(2, 9, V, generator=generator)).log_softmax(-1).topk(K)
    upstream = torch.randn(3, 2, 9, generator=generator)
    outcomes = []
    for function in (kernel.chunk_topk_distill_function, veomni.chunk_topk_distill_function):
        outputs = function(
            hidden, weight, labels, ids, logprobs, 4, shift_labels=labels if shifted else None,
            temperature=temperature, log_prob_min_clamp=clamp,
        )  # fmt: skip
        total = sum((a * b).sum() for a, b in zip(outputs, upstream, strict=False))
        outcomes.append([*outputs, *torch.autograd.grad(total, (hidden, weight))])
    assert [output.requires_grad for output in outputs] == [True] * 3 + [False] * 2
    for theirs, ours in zip(*outcomes, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_fused_head_reads_no_ignored_row(kernel: Any) -> None:
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(V, 8, requires_grad=True)
    labels = torch.tensor([1, 2, -100, 4, -100])
    logprobs, ids = torch.randn(5, V).log_softmax(-1).topk(K)
    clean = veomni.chunk_topk_distill_function(
        hidden, weight, labels, ids, logprobs, shift_labels=labels
    )
    spoiled = copy.deepcopy(logprobs)
    spoiled[labels < 0] = math.nan
    outputs = veomni.chunk_topk_distill_function(
        hidden, weight, labels, ids, spoiled, shift_labels=labels
    )
    for found, expected in zip(outputs, clean, strict=True):
        torch.testing.assert_close(found, expected)
        assert not found[labels < 0].any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(outputs[2].sum(), (hidden, weight)))
