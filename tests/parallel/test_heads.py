"""Losses from hidden states of models behind wrappers, compared with losses from logits on one process."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import spread_heads, zero3_stand_in
from support.processes import Processes
from support.spread_heads import Model
from torch import Tensor, nn

import fastkd
from fastkd.parallel import Head, head, redirect


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Two processes."""
    pool = Processes(2)
    yield pool
    pool.stop()


# Several processes


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def alone(request: Any, processes: Processes) -> tuple[bool, dict[str, Tensor]]:
    """(whether the lm_head is tied, the parameters after training by logits on one process)."""
    return request.param, processes.run(1, spread_heads.train, "alone", request.param)[0]


@pytest.mark.parametrize(
    ("how", "micro_batches"),
    [
        ("ddp", 1),
        ("ddp, unused", 2),
        ("fsdp", 1),
        ("fsdp", 2),
        ("fsdp, layers", 1),
        ("fsdp, head", 1),
        ("fsdp, head", 2),
        ("fsdp, reshards", 2),
    ],
)
def test_training_equals_that_of_one_process(
    processes: Processes, alone: tuple[bool, dict[str, Tensor]], how: str, micro_batches: int
) -> None:
    """The measured difference is 6e-6 of how far a parameter has moved. One process has micro-batches without a
    counted row."""
    tied, expected = alone
    if tied and how == "fsdp, head":
        return  # FSDP2 cuts the tie: test_models_that_the_loss_cannot_use
    start = dict(Model(1, tied=tied).named_parameters())
    for parameters in processes.run(2, spread_heads.train, how, tied, micro_batches):
        assert parameters.keys() == expected.keys() == start.keys()
        for name, value in parameters.items():
            moved = (expected[name] - start[name]).abs().max()
            assert moved > 0.01
            assert (value - expected[name]).abs().max() < 5e-5 * moved, name


@pytest.mark.parametrize("how", ["ddp", "fsdp, head", "fsdp, reshards"])
def test_a_distiller_trains_as_on_one_process(processes: Processes, how: str) -> None:
    train = spread_heads.train
    (expected,) = processes.run(1, train, "alone", False, 1, "even", 5)
    for parameters in processes.run(2, train, how, False, 2, "even", 5, "distiller"):
        for name, value in parameters.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp, head"])
def test_a_process_without_rows_takes_part(processes: Processes, how: str) -> None:
    """Its rows are all masked, or it has none. Without its gradients of 0 the other would wait for it."""
    for rows in ("masked", "none"):
        (expected,) = processes.run(1, spread_heads.train, "alone", False, 1, rows, 3)
        for parameters in processes.run(2, spread_heads.train, how, False, 1, rows, 3):
            for name, value in parameters.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_processes_with_different_batches_do_not_wait(processes: Processes) -> None:
    """One has packed examples, which are checked by a run, and the other has not."""
    assert processes.run(2, spread_heads.packed) == [[True, True]] * 2


@pytest.mark.parametrize(
    # A unit is gathered in forward, and again in backward if it was sharded after its forward, which a root is not.
    ("how", "forward", "backward"),
    [("fsdp", 1, 0), ("fsdp, layers", 2, 1), ("fsdp, head", 3, 2)],
)
def test_gathered_once(processes: Processes, how: str, forward: int, backward: int) -> None:
    assert processes.run(2, spread_heads.gathers, how) == [[forward, backward]] * 2


@pytest.mark.parametrize("how", ["fsdp", "fsdp, head", "fsdp, reshards"])
def test_mixed_precision(processes: Processes, how: str) -> None:
    for loss, expected, gradients in processes.run(2, spread_heads.mixed_precision, how):
        assert loss.dtype == torch.float32  # of bfloat16 hidden states
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
        assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in gradients.values())


def test_models_that_the_loss_cannot_use(processes: Processes) -> None:
    for cut, compiled in processes.run(2, spread_heads.messages):
        assert cut.startswith("ValueError: the configuration of the model ties the lm_head to the")
        assert "compiled as a whole and its parameters are sharded (FSDP2)" in compiled
    for how in ("fsdp", "fsdp, head"):
        for text in processes.run(2, spread_heads.not_redirected, how):
            assert text.startswith("FSDP2 has sharded the model, and the loss of its hidden states")


@pytest.mark.parametrize("how", ["dies", "waits"])
def test_a_process_that_leaves_is_an_error(how: str) -> None:
    pool = Processes(2)  # unusable afterwards
    first, second = pool.outcomes(2, spread_heads.leave, how, 5.0)
    pool.stop()
    assert second == ((False, "died") if how == "dies" else (True, "waited"))
    assert first[0] and first[1].startswith("RuntimeError: "), first


# One process


def batch() -> tuple[Tensor, Tensor]:
    return spread_heads.batch_of(0)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the loss; those of the model are cleared."""
    model.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check(student: nn.Module, teacher: nn.Module, inner: nn.Module | None = None) -> None:
    """The loss from hidden states and its gradients equal those from logits."""
    inner = inner or student
    expected = spread_heads.of_logits(student, teacher, *batch())
    of_logits = gradients(expected, inner)
    actual = spread_heads.of_hidden_states(student, teacher, *batch())
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    of_hidden_states = gradients(actual, inner)
    assert of_hidden_states.keys() == of_logits.keys()
    for name, gradient in of_logits.items():
        assert gradient.any()
        torch.testing.assert_close(of_hidden_states[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_plain(tied: bool) -> None:
    """With a bias unless tied, a scale and a softcap. No trace is left on the model."""
    student = Model(1, tied=tied)
    check(student, Model(2, 40))
    assert type(student.lm_head) is nn.Linear and "forward" not in vars(student)
    assert student(batch()[0])["logits"].shape == (8, 6, 97)


def test_compiled() -> None:
    """A compiled model runs with and without its lm_head, in any order."""
    student, teacher = Model(1), Model(2, 40)
    expected = gradients(spread_heads.of_logits(student, teacher, *batch()), student)
    compiled = torch.compile(student, backend="eager")
    for _ in range(2):
        check(compiled, teacher, student)
    actual = spread_heads.of_hidden_states(compiled, teacher, *batch())
    for name, gradient in gradients(actual, student).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)
    student.compile(backend="eager")
    check(student, teacher)


def test_a_frozen_head() -> None:
    student = Model(1)
    student.lm_head.requires_grad_(False)
    check(student, Model(2, 40))


@pytest.mark.parametrize("tied", [False, True])
def test_zero3_by_its_stand_in(tied: bool) -> None:
    """tests/compat/test_compat_heads.py has the real one."""
    student, teacher = Model(1, tied=tied), Model(2, 40)
    expected = spread_heads.of_logits(student, teacher, *batch())
    of_logits = gradients(expected, student)
    teacher.requires_grad_(False)
    for model in (student, teacher):
        zero3_stand_in.partition(model.embedding, model.lm_head)
    for calls in (1, 2):
        loss = spread_heads.of_hidden_states(student, teacher, *batch())
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        loss.backward()
        parameter: Any
        for name, parameter in student.named_parameters():
            found = parameter.grad
            if not name.startswith("block"):
                assert parameter.numel() == 0 and found is None
                found = parameter.reduced
            torch.testing.assert_close(found, calls * of_logits[name], rtol=1e-4, atol=1e-7)
        weights: list[Any] = [student.lm_head.weight, teacher.lm_head.weight]
        # Forward and backward, a tied weight also for the embedding. The teacher once.
        assert [weight.gathered for weight in weights] == [(3 if tied else 2) * calls, calls]


def test_a_partition_that_nothing_gathers_raises() -> None:
    student = Model(1)
    zero3_stand_in.partition(student.lm_head, hooks=False)
    with pytest.raises(ValueError, match="lm_head of the model is partitioned by DeepSpeed ZeRO-3"):
        head(student).apply(lambda hidden, weight, bias: hidden.sum(), torch.randn(2, 24))


def test_hidden_states_and_weights() -> None:
    student = Model(1)
    of_student = head(student)
    assert isinstance(of_student, Head)
    assert (of_student.logit_scale, of_student.softcap) == (0.5, 3.0)
    with of_student.captured() as captured:
        outputs = student(batch()[0])
    assert outputs["logits"].shape == (8, 1, 97) and captured.hidden.shape == (8, 6, 24)
    assert captured.projected is not None
    torch.testing.assert_close(
        captured.projected, student.lm_head(captured.hidden[:, :1]), rtol=0, atol=0
    )
    with of_student.captured(project=False) as captured:
        outputs = student(batch()[0])
    assert not outputs["logits"].any() and outputs["logits"].shape == (8, 1, 97)
    assert captured.projected is None
    with of_student.gathered() as (weight, bias):
        assert not weight.requires_grad and torch.equal(weight, student.lm_head.weight)
        assert bias is not None and torch.equal(bias, student.lm_head.bias)


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        ({}, 1.0, None),
        ({"logit_scale": None}, 1.0, None),
        ({"logit_scale": 0.25, "final_logit_softcapping": 30.0}, 0.25, 30.0),
        ({"output_multiplier": 2}, 2.0, None),
        ({"lm_head_multiplier": 0.5}, 0.5, None),
        ({"logits_scaling": 4.0}, 0.25, None),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0, None),
        ({"logit_scale": "inv_sqrt_d_model"}, 1.0, None),  # MPT, which does not use it
    ],
)
def test_the_scale_of_a_configuration(
    config: dict[str, Any], scale: float, softcap: float | None
) -> None:
    student = Model(1)
    student.config = types.SimpleNamespace(**config)
    assert (head(student).logit_scale, head(student).softcap) == (scale, softcap)
    text = types.SimpleNamespace(**config)
    student.config = types.SimpleNamespace(get_text_config=lambda: text)
    assert (head(student).logit_scale, head(student).softcap) == (scale, softcap)


class FullyShardedDataParallel(nn.Module):
    """Named like FSDP1, which needs a GPU."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Twice(Model):
    def forward(self, input_ids: Tensor, position_ids: Any = None) -> dict[str, Tensor]:
        """Call the lm_head twice."""
        self.lm_head(self.embedding(input_ids))
        return super().forward(input_ids)


class Never(Model):
    def forward(self, input_ids: Tensor, position_ids: Any = None) -> dict[str, Tensor]:
        """Use the weight of the lm_head, and not the module."""
        weight = self.lm_head.weight
        return {"logits": self.block(self.embedding(input_ids)) @ weight.mT}


def test_messages() -> None:
    with pytest.raises(TypeError, match="the model must be an nn.Module, got int"):
        head(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="module must be an nn.Module, got str"):
        head(Model(1), module="lm_head")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of Linear returns none; pass it as module, or compute"):
        head(nn.Linear(2, 3))
    linear = nn.Sequential(nn.Linear(2, 3))
    assert head(linear, module=linear[0]).module is linear[0]
    with pytest.raises(ValueError, match="exactly an nn.Linear, got a torch.nn.modules.sparse.Emb"):
        head(Model(1), module=Model(1).embedding)
    with pytest.raises(ValueError, match="is on the meta device: it is offloaded"):
        head(Model(1).to("meta"))
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel \(FSDP1\).*fsdp_version=2"):
        head(FullyShardedDataParallel(Model(1)))
    parallel = nn.DataParallel(Model(1))
    with pytest.raises(ValueError, match="wrapped by DataParallel, which copies the lm_head"):
        head(parallel)
    with pytest.raises(ValueError, match="DataParallel copies the model in every forward"):
        redirect(parallel, lambda forward: forward)
    teacher = Model(2, 40)
    with pytest.raises(RuntimeError, match="called its lm_head twice in one forward"):
        spread_heads.of_hidden_states(Twice(1), teacher, *batch())
    with pytest.raises(RuntimeError, match="did not call its lm_head, so there are no hidden"):
        spread_heads.of_hidden_states(Never(1), teacher, *batch())


class DeepSpeedEngine(nn.Module):
    """A wrapper, named like DeepSpeed's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        """Call the module."""
        return self.module(*inputs)


def test_a_forward_of_the_instance_is_kept() -> None:
    """accelerate sets one, for its mixed precision."""
    student, calls = Model(1), []
    original = student.forward
    student.forward = lambda tokens: calls.append(1) or original(tokens)
    own = student.forward
    check(DeepSpeedEngine(student), Model(2, 40), student)
    assert student.forward is own and vars(student)["forward"] is own
    assert len(calls) == 2


def test_a_wrapper_that_does_not_call_the_model_raises() -> None:
    wrapper = DeepSpeedEngine(Model(1))
    wrapper.forward = lambda *inputs: None
    with pytest.raises(RuntimeError, match="the forward of Model did not run when DeepSpeedEngine"):
        redirect(wrapper, lambda forward: None)


def test_an_exception_leaves_the_model_as_it_was() -> None:
    student = Model(1)

    def fail(forward: Any) -> None:
        with head(student).captured():
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        redirect(student, fail)
    assert type(student.lm_head) is nn.Linear
    assert fastkd.parallel.heads._REDIRECTED == []
    assert student(batch()[0])["logits"].shape == (8, 6, 97)
