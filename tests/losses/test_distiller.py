"""The Distiller: same results as a hand-written loop, and no traces left in its models."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import spread_heads
from support.distilling import Net, batch, gradients, in_parallel, pair, terms
from support.processes import Processes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd.distiller import Distiller, Term, find_logits, first_tensor
from fastkd.features import (
    FeatureLoss,
    HintLoss,
    Regressor,
    attention_transfer_loss,
    cosine_loss,
    hint_loss,
)

close = torch.testing.assert_close


def hooks(*models: nn.Module) -> int:
    return sum(len(module._forward_hooks) for model in models for module in model.modules())


def hand_written_loss(
    student: Net, teacher: Net, regressor: nn.Module, images: Tensor, labels: Tensor
) -> Tensor:
    def layers(net: Net) -> list[Tensor]:
        first = net.layer1(images)
        second = net.layer2(first)
        return [first, second, net.head(second.mean((2, 3)))]

    of_student = layers(student)
    with torch.no_grad():
        of_teacher = layers(teacher)
    kd = fastkd.kd_loss(of_student[2], of_teacher[2], labels, temperature=4.0, alpha=0.5)
    hint = hint_loss(regressor(of_student[0]), of_teacher[0])
    return kd + 0.1 * hint + 10.0 * attention_transfer_loss(of_student[:2], of_teacher[1::-1])


def step(distiller: Any, *inputs: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss, _ = distiller(*inputs, **options)
    loss.backward()
    return loss.detach(), gradients(distiller)


@pytest.fixture
def expected() -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the batch and its gradients, from the hand-written loop."""
    distiller = Distiller(*pair(), terms())
    loss = hand_written_loss(
        distiller.student, distiller.teacher, distiller.losses.hint.regressor, *batch()
    )
    loss.backward()
    return loss.detach(), gradients(distiller)


def test_a_hand_written_loop_gives_the_same_numbers(expected: Any) -> None:
    images, labels = batch()
    with Distiller(*pair(), terms()) as distiller:
        close(step(distiller, images, labels=labels), expected)
        distiller.zero_grad()
        loss, parts = distiller(images, labels=labels)
        assert list(parts) == ["kd", "hint", "attention", "loss"]
        close(parts["loss"], loss.detach())
        close(parts["kd"] + 0.1 * parts["hint"] + 10 * parts["attention"], loss.detach())
        assert all(part.dim() == 0 and not part.requires_grad for part in parts.values())
        assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


def test_gradients_accumulate(expected: Any) -> None:
    images, labels = batch()
    distiller = Distiller(*pair(), terms())
    for part in range(3):
        rows = slice(2 * part, 2 * part + 2)
        loss, _ = distiller(images[rows], labels=labels[rows])
        (loss / 3).backward()
    close(gradients(distiller), expected[1])


@pytest.mark.parametrize(
    "how",
    [
        "student",
        "distiller, without a break",
        *(
            pytest.param(how, marks=pytest.mark.heavy)
            for how in ("student in place", "teacher", "distiller")
        ),
    ],
)
def test_compiled(expected: Any, how: str) -> None:
    torch.compiler.reset()
    student, teacher = pair()
    models: list[Any] = [student, teacher]
    if how in ("student", "teacher"):
        index = ("student", "teacher").index(how)
        models[index] = torch.compile(models[index], backend="aot_eager")
    distiller: Any = Distiller(*models, terms())
    if how == "student in place":
        student.compile(backend="aot_eager")
    run = distiller
    if how.startswith("distiller"):
        run = torch.compile(distiller, backend="aot_eager", fullgraph="break" in how)
    images, labels = batch()
    loss, _ = run(images, labels=labels)
    loss.backward()
    close(loss.detach(), expected[0])
    results = {name.replace("_orig_mod.", ""): g for name, g in gradients(distiller).items()}
    close(results, expected[1])
    assert distiller._student_capture.captured == [None, None]


def test_a_model_that_was_compiled_and_run_before_is_refused() -> None:
    torch.compiler.reset()
    student, teacher = pair()
    student = torch.compile(student, backend="aot_eager")
    images, labels = batch()
    student(images)
    with pytest.raises(
        RuntimeError, match="'layer1' of the student was not captured.*compiled and ran"
    ):
        Distiller(student, teacher, terms())(images, labels=labels)


def test_autocast() -> None:
    images, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, parts = Distiller(*pair(), terms())(images, labels=labels)
    loss.backward()
    assert {part.dtype for part in parts.values()} == {torch.float32} == {loss.dtype}


def test_the_teacher_is_unchanged() -> None:
    student, teacher = pair()
    teacher.layer1.eval()
    modes = [module.training for module in teacher.modules()]
    seen = []
    handle = teacher.layer2.register_forward_hook(lambda m, *_: seen.append(m.training))
    distiller = Distiller(student, teacher, terms())
    images, labels = batch()
    distiller.train()(images, labels=labels)
    assert seen == [False] and [module.training for module in teacher.modules()] == modes
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    handle.remove()
    teacher.forward = None  # raises
    with pytest.raises(TypeError):
        distiller(images, labels=labels)
    assert [module.training for module in teacher.modules()] == modes
    teacher.eval()
    distiller.train()
    assert student.training and not teacher.training
    distiller.to(torch.float64)
    assert {p.dtype for m in (student, teacher, distiller.losses) for p in m.parameters()} == {
        torch.float64
    }


def test_parameters_and_state(tmp_path: Any) -> None:
    import safetensors.torch as safetensors

    student, teacher = pair()
    losses = terms() | {
        "fixed": Term(FeatureLoss({"layer1": "layer1"}, 4, 6, projection="fixed", dim=1))
    }
    distiller = Distiller(student, teacher, losses)
    trained = {id(p) for p in distiller.parameters()}
    projections = {id(p) for p in distiller.projections()}
    assert len(projections) == 2
    assert trained == {id(p) for p in student.parameters()} | projections
    names = {
        "losses.hint.regressor.map.weight", "losses.hint.regressor.map.bias", "losses.fixed.projections.0.weight",
    }  # fmt: skip
    assert set(distiller.state_dict()) == names
    safetensors.save_file(distiller.state_dict(), tmp_path / "losses.safetensors")
    state = safetensors.load_file(tmp_path / "losses.safetensors")
    torch.manual_seed(5)
    other = Distiller(Net(4), teacher, {
        "hint": Term(HintLoss(Regressor(4, 6, "conv")), "layer1"),
        "fixed": Term(FeatureLoss({"layer1": "layer1"}, 4, 6, projection="fixed", dim=1)),
    })  # fmt: skip
    before = {name: value.clone() for name, value in other.student.state_dict().items()}
    parameters = list(other.student.parameters())
    for assign in (False, True):
        other.load_state_dict(state, strict=True, assign=assign)
        close(dict(other.state_dict()), state)
        close(dict(other.student.state_dict()), before)
        assert all(a is b for a, b in zip(parameters, other.student.parameters(), strict=True))
    nn.ModuleList([other]).load_state_dict({f"0.{name}": value for name, value in state.items()})
    with pytest.raises(RuntimeError, match="Missing.*hint.regressor.map.bias"):
        other.load_state_dict({name: state[name] for name in state if "bias" not in name})
    with pytest.raises(RuntimeError, match="Unexpected.*student.head.weight"):
        other.load_state_dict(state | {"student.head.weight": before["head.weight"]})


def test_hooks_and_captured_outputs_are_released() -> None:
    student, teacher = pair()
    images, labels = batch()
    with Distiller(student, teacher, terms()) as distiller:
        assert hooks(student) == 2 and hooks(teacher) == 2
        held = []
        handle = student.layer1.register_forward_hook(
            lambda m, i, out: held.append(weakref.ref(out))
        )
        loss, _ = distiller(images, labels=labels)
        del loss
        gc.collect()
        assert held[0]() is None
        handle.remove()
        student(images)
        assert distiller._student_capture.captured == [None, None]
    assert hooks(student, teacher) == 0
    with pytest.raises(RuntimeError, match="closed"):
        distiller(images, labels=labels)
    distiller = Distiller(student, teacher, terms())
    del distiller
    gc.collect()
    assert hooks(student, teacher) == 0


class OddLayers(Net):
    """A model that uses its layers in ways that a hook must notice."""

    def __init__(self, way: str) -> None:
        super().__init__(4)
        self.way = way
        self.activation = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        def both(images: Tensor) -> Tensor:
            return self.layer2(self.layer1(images))

        if self.way in ("reentrant", "checkpointed"):
            images = images.requires_grad_()
            return self.head(
                checkpoint(both, images, use_reentrant=self.way == "reentrant").mean((2, 3))
            )
        if self.way == "skipped":
            return self.head(self.layer1(images).mean((2, 3)))
        if self.way == "twice":
            return self.head(self.layer2(self.layer2(self.layer1(images))).mean((2, 3)))
        if self.way == "in place":
            return self.head(self.activation(self.layer2(self.layer1(images))).mean((2, 3)))
        return super().forward(images)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("skipped", "layer 'layer2' of the student was not captured: either it did not run"),
        ("twice", "'layer2' of the student ran 2 times"),
        ("in place", "'layer2' of the student was changed in place"),
        ("reentrant", "ran without gradients.*use_reentrant=False"),
    ],
)
def test_layers_that_cannot_be_captured_raise(way: str, message: str) -> None:
    distiller = Distiller(
        OddLayers(way), pair()[1], {"at": Term(attention_transfer_loss, "layer2")}
    )
    with pytest.raises(RuntimeError, match=message):
        distiller(batch()[0])
    assert distiller._student_capture.captured == [None]


def test_checkpointing_changes_nothing() -> None:
    results = []
    for way in ("plainly", "checkpointed"):
        torch.manual_seed(3)
        student = OddLayers(way)
        distiller = Distiller(student, pair()[1], terms())
        images, labels = batch()
        results.append(step(distiller, images, labels=labels))
        assert distiller._student_capture.captured == [None, None]
    close(results[0], results[1])


def test_weights_may_depend_on_the_step() -> None:
    images, _ = batch()
    calls = []

    def counting_loss(student: Tensor, teacher: Tensor) -> Tensor:
        calls.append(student.shape)
        return (student.mean() - teacher.mean()) ** 2

    losses = {
        "hint": Term(counting_loss, "layer1", weight=lambda step: 1.0 if step < 2 else 0.0),
        "kd": Term(fastkd.KDLoss(), weight=lambda step: 0.25 * step),
    }
    distiller = Distiller(*pair(), losses)
    assert list(distiller(images, step=0)[1]) == ["hint", "loss"]
    loss, parts = distiller(images, step=1)
    close(loss.detach(), parts["hint"] + 0.25 * parts["kd"])
    assert list(distiller(images, step=2)[1]) == ["kd", "loss"] and len(calls) == 2
    with pytest.raises(ValueError, match="step must be given, because the weight of term 'hint'"):
        distiller(images)
    nothing = Distiller(*pair(), {"kd": Term(fastkd.KDLoss(), weight=0.0)})
    with pytest.raises(ValueError, match="terms must have one with a weight other than 0"):
        nothing(images)


def test_teacher_outputs_can_be_passed_in() -> None:
    student, teacher = pair()
    images, _ = batch()
    losses = {"kd": Term(fastkd.KDLoss()), "at": Term(attention_transfer_loss, "layer1")}
    loss, parts = Distiller(student, teacher, losses)(images)
    alone = Distiller(student, None, losses)
    with torch.no_grad():
        output, layer = teacher(images), teacher.layer1(images)
    close(alone(images, teacher_output=output, teacher_layers={"layer1": layer}), (loss, parts))
    sparse = fastkd.TopK.from_logits(output, 7)
    close(alone(images, teacher_output=sparse, teacher_layers={"layer1": layer})[0], loss)
    with pytest.raises(ValueError, match=r"teacher_layers\['layer1'\] must be given"):
        alone(images, teacher_output=output)
    with pytest.raises(ValueError, match="teacher_output must be given"):
        alone(images, teacher_layers={"layer1": layer})
    teacher.forward = None  # the teacher is not run
    close(Distiller(student, teacher, {"kd": losses["kd"]})(
        images, teacher_output=output)[1]["kd"], parts["kd"])  # fmt: skip


@pytest.fixture(scope="module")
def llamas() -> tuple[Any, Any]:
    import transformers

    def build_llama(width: int, layers: int) -> Any:
        torch.manual_seed(width)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=31, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        ))  # fmt: skip

    return build_llama(8, 2), build_llama(12, 3)


@pytest.mark.stacks
def test_language_models(llamas: Any) -> None:
    student, teacher = llamas
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(31, (2, 6), generator=generator)
    attended = torch.ones(2, 6, dtype=torch.int64)
    attended[1, 4:] = 0
    labels = tokens.roll(-1, 1).masked_fill(attended == 0, -100)
    mask = attended.bool()
    by_name = FeatureLoss({"model.layers.0": "model.layers.1", "model.norm": "model.norm"}, 8, 12)
    by_index = FeatureLoss({1: 2, 2: 3}, 8, 12)
    by_index.load_state_dict(by_name.state_dict())
    distiller = Distiller(student, teacher, {
        "kd": Term(fastkd.KDLoss(temperature=2.0, alpha=0.5)),
        "by_name": Term(by_name),
        "by_index": Term(by_index, "", select=lambda output: output.hidden_states),
    })  # fmt: skip
    inputs = {"input_ids": tokens, "attention_mask": attended, "output_hidden_states": True}
    _, actual = step(distiller, labels=labels, mask=mask, **inputs)
    _, parts = distiller(labels=labels, mask=mask, **inputs)
    distiller.zero_grad()
    student_output = student(**inputs)
    with torch.no_grad():
        teacher_output = teacher.eval()(**inputs)
    kd = fastkd.kd_loss(
        student_output.logits, teacher_output.logits, labels, temperature=2.0, alpha=0.5, mask=mask
    )
    hidden = 0.0
    for l_s, l_t, projection in zip((1, 2), (2, 3), by_index.projections, strict=True):
        gap = projection(student_output.hidden_states[l_s]) - teacher_output.hidden_states[l_t]
        hidden = hidden + gap[mask].square().mean()
    close(parts["kd"], kd.detach())
    close(parts["by_name"], hidden.detach())
    close(parts["by_index"], hidden.detach())
    (kd + 2 * hidden).backward()
    wanted = gradients(distiller)
    for name, gradient in wanted.items():
        if not name.startswith("losses"):
            close(actual[name], gradient)
    student.gradient_checkpointing_enable()
    distiller.zero_grad()
    close(step(distiller, labels=labels, mask=mask, **(inputs | {"use_cache": False}))[1], actual)
    student.gradient_checkpointing_disable()
    distiller.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(2)
    yield pool
    pool.stop()


@pytest.mark.parametrize("stage", [False, True])
def test_data_parallel(processes: Processes, expected: Any, stage: bool) -> None:
    actual = processes.run(2, in_parallel, stage)
    wanted = expected[1]
    if stage:
        losses = terms()
        del losses["kd"]
        wanted = step(Distiller(*pair(), losses), batch()[0])[1]
    for process in actual:
        assert process["names"] == [
            f"module.losses.hint.regressor.map.{n}" for n in ("weight", "bias")
        ]
        close({name: process["gradients"][name] for name in wanted}, wanted)


def test_contents_of_outputs() -> None:
    tensor, other = torch.zeros(1), torch.ones(1)
    for output in (tensor, (None, tensor, other), [tensor], {"a": 1, "b": tensor}):
        assert first_tensor(output) is tensor
    for output in (tensor, (tensor, other), {"hidden": other, "logits": tensor}):
        assert find_logits(output) is tensor
    for select in (first_tensor, find_logits):
        for output in (None, (), {"a": 1}, 3):
            with pytest.raises(TypeError, match="pass "):
                select(output)


def _distiller(**terms: Any) -> Any:
    return lambda: Distiller(*pair(), terms)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "student": (lambda: Distiller(len, None, terms()), TypeError, "student must be an nn.Module"),
    "teacher": (lambda: Distiller(Net(2), len, terms()), TypeError, "teacher must be an nn.Module or None"),
    "no terms": (lambda: Distiller(*pair(), {}), TypeError, "terms must be a dict"),
    "no term": (_distiller(a=cosine_loss), TypeError, r"terms\['a'\] must be a fastkd.distiller.Term, got function"),
    "a name taken": (_distiller(loss=Term(cosine_loss)), ValueError, "other than 'loss'"),
    "no such layer": (
        _distiller(a=Term(cosine_loss, "layer3")), ValueError, "student has no layer 'layer3'; similar names.*'layer1'",
    ),
    "last name": (_distiller(a=Term(cosine_loss, "", "net.head")), ValueError, "teacher has no layer.*'head'"),
    "weight": (lambda: Term(cosine_loss, weight="1"), TypeError, "weight must be a number, got str"),
    "infinite weight": (lambda: Term(cosine_loss, weight=float("inf")), ValueError, "weight must be finite"),
    "layers are indices": (lambda: Term(FeatureLoss({0: 0}, 1, 1)), ValueError, "student_layer must be given"),
    "teacher's layer alone": (lambda: Term(cosine_loss, None, "a"), ValueError, "student_layer must be given"),
    "layer's type": (lambda: Term(cosine_loss, 3), TypeError, "student_layer must be a name"),
    "takes": (lambda: Term(cosine_loss, takes="mask"), ValueError, "takes must be some of labels, mask"),
    "loss": (lambda: Term(3), TypeError, "loss must be callable, got 3"),
    "not one number": (
        lambda: Distiller(*pair(), {"a": Term(lambda s, t: s - t)})(batch()[0]), ValueError, "'a' must return a 0-dim",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Losses of hidden states


def fused_and_dense(**options: Any) -> tuple[Term, Term]:
    options = {"alpha": 0.5, "temperature": 2.0, "divergence": "jsd"} | options
    return Term(fastkd.FusedLinearKDLoss(**options)), Term(fastkd.KDLoss(**options))


@pytest.mark.parametrize("how", ["plain", "tied", "compiled", "precomputed", "topk"])
def test_a_loss_of_hidden_states_equals_that_of_logits(how: str) -> None:
    """Beside a loss of layers; the student scales and caps its logits, the teacher too."""
    student, teacher = spread_heads.Model(1, tied=how == "tied"), spread_heads.Model(2)
    tokens, labels = spread_heads.batch_of(0)
    keywords: dict[str, Any] = {"labels": labels, "mask": labels % 3 != 0}
    if how in ("precomputed", "topk"):
        logits = teacher(tokens)["logits"].detach()
        output = (
            fastkd.TopK.from_logits(logits, 5, temperature=2.0)
            if how == "topk"
            else {"logits": logits}
        )
        keywords["teacher_output"] = output
    else:
        output = {"logits": teacher(tokens)["logits"].detach()}
    target = output if how == "topk" else output["logits"]
    options = {name: keywords[name] for name in ("labels", "mask")}
    dense = fused_and_dense()[1].loss
    expected_kd = dense(student(tokens)["logits"], target, **options).detach()
    results = []
    for kd in fused_and_dense():
        terms = {"kd": kd, "block": Term(attention_like, "block", weight=0.1)}
        model = torch.compile(student, backend="eager") if how == "compiled" else student
        with Distiller(model, teacher, terms) as distiller:
            if (
                how == "precomputed"
            ):  # the teacher's scale is for its lm_head, and not for logits that are passed
                distiller(tokens, labels=labels)
            for _ in range(2):  # the first call checks the logits
                student.zero_grad()
                loss, parts = distiller(tokens, **keywords)
                loss.backward()
        torch.testing.assert_close(parts["kd"], expected_kd, rtol=1e-6, atol=0)
        results.append((loss, parts, gradients(student)))
        assert type(student.lm_head) is nn.Linear and type(teacher.lm_head) is nn.Linear
    (loss, parts, found), (expected_loss, expected_parts, expected) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(parts, expected_parts, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


def attention_like(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean()


def test_lm_heads_are_named() -> None:
    student, teacher = pair()
    images, labels = batch()
    fused, dense = fused_and_dense()
    expected, _ = Distiller(student, teacher, {"kd": dense})(images, labels=labels)
    for layers in (("head",), ("head", "head")):
        term = Term(fused.loss, *layers)
        loss, _ = Distiller(student, teacher, {"kd": term})(images, labels=labels)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    with pytest.raises(
        ValueError, match="of Net returns none; name it in the term's teacher_layer, or"
    ):
        Distiller(student, teacher, {"kd": fused})(images, labels=labels)


def test_a_wrong_scale_of_hidden_states_raises() -> None:
    tokens, labels = spread_heads.batch_of(0)
    for options, message in (
        ({"softcap": None}, "of the student are not .* Pass logit_scale and softcap to Fused"),
        ({"teacher_logit_scale": 1.0}, "of the teacher are not .* Pass teacher_logit_scale and"),
    ):
        fused, _ = fused_and_dense(**options)
        distiller = Distiller(spread_heads.Model(1), spread_heads.Model(2), {"kd": fused})
        with pytest.raises(ValueError, match=message):
            distiller(tokens, labels=labels)


def test_terms_that_do_not_go_with_hidden_states() -> None:
    student, teacher = spread_heads.Model(1), spread_heads.Model(2)
    fused, dense = fused_and_dense()
    with pytest.raises(ValueError, match="must not have losses on logits beside a FusedLinearKD"):
        Distiller(student, teacher, {"kd": fused, "ce": dense})
    with pytest.raises(ValueError, match="must name the same lm_heads"):
        Distiller(student, teacher, {"kd": fused, "other": Term(fused.loss, "lm_head")})
    with pytest.raises(TypeError, match="must be the name of the lm_head or None"):
        Term(fused.loss, ["lm_head"])
    whole = Term(attention_like, "", select=lambda output: output["logits"])
    wrapped = Distiller(DeepSpeedEngine(student), teacher, {"kd": fused, "whole": whole})
    tokens, labels = spread_heads.batch_of(0)
    with pytest.raises(ValueError, match="student_layer '' is the output of the whole student"):
        wrapped(tokens, labels=labels)


class DeepSpeedEngine(nn.Module):
    """A wrapper, named like DeepSpeed's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        """Call the module."""
        return self.module(*inputs)
