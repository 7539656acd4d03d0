"""Arguments of every public function: numbers from other libraries are accepted, and errors name a wrong argument."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastkd
from fastkd import (
    calibration,
    divergences,
    features,
    functional,
    kd_loss,
    online,
    parallel,
    relations,
    response,
    sequences,
)
from fastkd.call import checks
from fastkd.core.scalars import as_float, plain
from fastkd.teachers import cache

S, T = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
LABELS, MASK = torch.randint(7, (2, 3)), torch.ones(2, 3, dtype=torch.bool)
HIDDEN, HEAD = torch.randn(2, 3, 4), torch.randn(7, 4)
IDS = torch.randint(1, 7, (2, 4))
BATCH = {
    "input_ids": IDS,
    "attention_mask": torch.ones_like(IDS),
    "labels": torch.where(torch.arange(4) < 2, -100, IDS),
}


class Decoder(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return type("Output", (), {"logits": torch.randn(*input_ids.shape, 7)})()

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        return torch.cat([input_ids, input_ids], -1)


# Every public function and constructor, with valid arguments.
PAIR: dict[str, Any] = {"student": S, "teacher": T}
LOGITS: dict[str, Any] = {"student_logits": S, "teacher": T, "labels": LABELS}
FUSED: dict[str, Any] = {
    "student_hidden": HIDDEN,
    "student_weight": HEAD,
    "teacher": T,
    "labels": LABELS,
}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "kd_loss": (kd_loss, LOGITS | {"alpha": 0.5}),
    "fused_linear_kd_loss": (fastkd.fused_linear_kd_loss, FUSED | {"alpha": 0.5}),
    "KDLoss": (fastkd.KDLoss, {}),
    "FusedLinearKDLoss": (fastkd.FusedLinearKDLoss, {}),
    "TopK": (
        fastkd.TopK,
        {"ids": torch.tensor([[0, 1]]), "logprobs": torch.full((1, 2), -1.0)},
    ),
    "TopK.from_logits": (fastkd.TopK.from_logits, {"logits": S, "k": 2}),
    "LinearTeacher": (fastkd.LinearTeacher, {"hidden": HIDDEN, "weight": HEAD}),
    "Ensemble": (fastkd.Ensemble, {"teachers": [T, T], "weights": [1.0, 2.0]}),
    "RoutedTeacher": (fastkd.RoutedTeacher, {"teachers": [T], "index": torch.tensor(0)}),
    "memory_plan": (fastkd.memory_plan, {"rows": 3, "vocab_size": 7, "hidden_size": 4}),
    "k1": (
        fastkd.sampled.k1,
        {"student_logprobs": S[..., 0], "teacher_logprobs": T[..., 0], "mask": MASK},
    ),
    "on_policy_loss": (
        fastkd.sampled.on_policy_loss,
        {
            "student_logprobs": S[..., 0],
            "teacher_logprobs": T[..., 0],
            "old_logprobs": S[..., 1],
            "advantages": S[..., 2],
            "clamp": 2.0,
            "clip": 0.2,
            "dual_clip": 3.0,
            "mask": MASK,
            "weight": T[..., 1],
        },
    ),
    "policy_advantages": (
        fastkd.sampled.policy_advantages,
        {
            "teacher_logprobs": S[..., 0],
            "sampled_logprobs": T[..., 0],
            "clamp": 2.0,
            "advantages": S[..., 2],
            "mask": MASK,
        },
    ),
    "importance_weights": (
        fastkd.sampled.importance_weights,
        {
            "current_logprobs": S[..., 0],
            "sampled_logprobs": T[..., 0],
            "truncate": 2.0,
            "sequence_mask": (0.5, 2.0),
            "mask": MASK,
        },
    ),
    **{
        make.__name__: (make, {})
        for make in (divergences.TABLE | divergences.WITH_LABELS).values()
        if inspect.signature(make).parameters
    },
    "Divergence": (fastkd.Divergence, {"name": "x", "function": divergences._tvd}),
    "ClosedForm": (fastkd.ClosedForm, {}),
    "mutual_loss": (online.mutual_loss, {"logits": [S, T], "labels": LABELS}),
    "ensemble_logits": (online.ensemble_logits, {"logits": [S, T], "gate": torch.ones(2)}),
    "ensemble_loss": (online.ensemble_loss, {"logits": [S, T], "labels": LABELS}),
    "consistency_loss": (online.consistency_loss, {"student_logits": S, "teacher_logits": T}),
    "MeanTeacher": (online.MeanTeacher, {"student": nn.Linear(2, 2)}),
    "MeanTeacher.update": (
        online.MeanTeacher(nn.Linear(2, 2)).update,
        {"student": nn.Linear(2, 2)},
    ),
    "ramp_up": (online.ramp_up, {"step": 1, "length": 2}),
    "born_again": (
        online.born_again,
        {"make_student": nn.Identity, "train": print, "generations": 1},
    ),
    "generations_teacher": (online.generations_teacher, {"models": [lambda: S, lambda: T]}),
    "adaptive_kl_loss": (response.adaptive_kl_loss, LOGITS),
    "dist_loss": (response.dist_loss, LOGITS),
    "standardized_kd_loss": (response.standardized_kd_loss, LOGITS),
    "uld_loss": (response.uld_loss, LOGITS),
    "policy_distillation_loss": (response.policy_distillation_loss, LOGITS),
    "policy_distillation_loss, nll": (
        response.policy_distillation_loss,
        LOGITS | {"form": "nll"},
    ),
    "draft_loss": (
        response.draft_loss,
        {
            "student_logits": S[..., :4],
            "teacher": T,
            "losses": "lk_hybrid",
            "draft_to_target": torch.tensor([6, 0, 3, 2]),
            "positions": LABELS,
            "position_decay": 0.5,
            "mask": MASK,
        },
    ),
    "fused_linear_draft_loss": (
        response.fused_linear_draft_loss,
        {
            "student_hidden": HIDDEN,
            "student_weight": HEAD,
            "teacher": T,
            "losses": "lk_hybrid",
            "student_bias": torch.zeros(len(HEAD)),
            "positions": LABELS,
            "position_decay": 0.5,
            "mask": MASK,
        },
    ),
    "common_positions": (
        response.common_positions,
        {"student_labels": LABELS, "teacher_labels": LABELS},
    ),
    "expected_calibration_error": (
        calibration.expected_calibration_error,
        {"logits": S, "labels": LABELS},
    ),
    "fit_temperature": (calibration.fit_temperature, {"logits": S, "labels": LABELS}),
    "hint_loss": (features.hint_loss, PAIR | {"mask": MASK}),
    "cosine_loss": (features.cosine_loss, PAIR | {"mask": MASK}),
    "attention_transfer_loss": (
        features.attention_transfer_loss,
        {"student_maps": S, "teacher_maps": T},
    ),
    "Regressor": (features.Regressor, {"student_width": 3, "teacher_width": 4}),
    "Regressor.forward": (
        features.Regressor(7, 7, "conv").forward,
        {"features": torch.randn(1, 7, 2, 2), "size": (2, 2)},
    ),
    "HintLoss": (features.HintLoss, {"regressor": nn.Identity()}),
    "HintLoss.forward": (features.HintLoss(nn.Identity()).forward, PAIR | {"mask": MASK}),
    "FeatureLoss": (
        features.FeatureLoss,
        {"layers": {0: 0}, "student_width": 7, "teacher_width": 7},
    ),
    "FeatureLoss.forward": (
        features.FeatureLoss({0: 0}, 7, 7).forward,
        {"student_states": [S], "teacher_states": [T], "mask": MASK},
    ),
    "rkd_distance_loss": (relations.rkd_distance_loss, PAIR),
    "rkd_angle_loss": (relations.rkd_angle_loss, PAIR),
    "rkd_loss": (relations.rkd_loss, PAIR),
    "similarity_loss": (relations.similarity_loss, PAIR),
    "gram_loss": (relations.gram_loss, PAIR),
    "shift": (sequences.shift, {"logits": S, "labels": LABELS}),
    "teacher_targets": (
        sequences.teacher_targets,
        {"teacher": Decoder(), "input_ids": IDS, "pad_token_id": 0},
    ),
    "gkd_step": (
        sequences.gkd_step,
        {"student": Decoder(), "teacher": Decoder(), "batch": BATCH, "pad_token_id": 0},
    ),
    "num_items": (parallel.num_items, {"labels": LABELS, "mask": MASK}),
    "TeacherCache": (cache.TeacherCache, {"path": "/nowhere"}),
    "read_manifest": (cache.read_manifest, {"folder": "/nowhere"}),
}
# Arguments that are passed on unchecked, or that name a file that does not exist.
PASSED_ON = {"process_group", "group", "path", "folder", "world_size", "rank", "allow_incomplete"}


class Odd:
    pass


WRONG: dict[str, Any] = {
    "None": None, "str": "x", "int": 3, "list": [1], "dict": {"a": 1}, "bool": True, "object": Odd(),
    "nan": math.nan, "a huge int": 10**400, "0-dim": torch.tensor(1.0),
    "int32": torch.ones(2, 3, dtype=torch.int32), "complex": torch.ones(2, 3, 7, dtype=torch.complex64),
    "meta": torch.ones(2, 3, 7, device="meta"), "meta, one a row": torch.ones(2, 3, device="meta"),
}  # fmt: skip


def arguments_of(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if function in (fastkd.fused_linear_kd_loss, fastkd.KDLoss, fastkd.FusedLinearKDLoss):
        others = inspect.signature(kd_loss).parameters
        tensors = ("student_logits", "teacher", "labels", "inplace")
        names += [name for name in others if name not in (*names, *tensors)]
    return names


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_argument_is_named(call: str) -> None:
    """Any value is either accepted or refused by an error of fastkd that names the argument."""
    function, inputs = CALLS[call]
    for argument in arguments_of(function):
        if argument in PASSED_ON:
            continue
        for kind, value in WRONG.items():
            try:
                function(**inputs | {argument: value})
            except (TypeError, ValueError, KeyError, fastkd.BackendUnavailable) as error:
                assert argument in str(error), (argument, kind, str(error))
            except Exception as error:  # pytest.fail reports which argument it was
                pytest.fail(f"{argument}, {kind}: {error!r}")


@pytest.mark.parametrize("call", ["TeacherCache", "read_manifest"])
def test_a_path_of_a_wrong_type_is_named(call: str) -> None:
    function, inputs = CALLS[call]
    (argument,) = inputs
    for kind, value in WRONG.items():
        if kind != "str":
            with pytest.raises(TypeError, match=f"{argument} must be a str or an os.PathLike"):
                function(**{argument: value})


# ---- numbers of other libraries

NUMBERS: dict[str, dict[str, Any]] = {
    "kd_loss": {
        "temperature": 2, "teacher_temperature": 3, "alpha": 0.5, "label_smoothing": 0.25, "ignore_index": 2,
        "num_items": 5, "logit_scale": -2, "softcap": 4, "teacher_logit_scale": 0.5, "teacher_softcap": 8,
        "vocab_size": 5, "scale_by_temperature": False, "inplace": False, "return_parts": False,
    },
    "fused_linear_kd_loss": {
        "temperature": 2, "chunk_size": 2, "memory_budget": 1 << 26, "vocab_size": 7, "ignore_index": -1,
    },
    "KDLoss": {"temperature": 2, "vocab_size": 5, "scale_by_temperature": False},
    "TopK": {"temperature": 2},
    "TopK.from_logits": {"k": 3, "temperature": 2},
    "memory_plan": {
        "rows": 4, "vocab_size": 8, "hidden_size": 2, "k": 3, "chunk_size": 2, "memory_budget": 1 << 26,
        "teacher_hidden_size": 4, "weight_gradient": False,
    },
    "forward_kl": {"clip": 0.25, "floor": -8}, "reverse_kl": {"clip": 0.25},
    "mixture": {"forward": 0.25, "reverse": 0.75, "clip": 2}, "jsd": {"beta": 0.25, "clip": 0.5},
    "skew_forward_kl": {"alpha": 0.25},
    "skew_reverse_kl": {"alpha": 0.25}, "alpha_beta": {"alpha": 2, "beta": 0.5}, "smooth_l1": {"beta": 2},
    "dkd": {"alpha": 2, "beta": 4}, "nkd": {"gamma": 2}, "ClosedForm": {"forward": 2, "reverse": 0.5, "cross": 1},
    "mutual_loss": {
        "temperature": 2, "peer_weight": 0.5, "ignore_index": 2, "num_items": 5, "scale_by_temperature": False,
    },
    "ensemble_loss": {"temperature": 2, "ensemble_weight": 0.5, "ignore_index": 2},
    "ramp_up": {"step": 1, "length": 4},
    "adaptive_kl_loss": {"head_mass": 0.25, "temperature": 2, "memory_budget": 1 << 26, "vocab_size": 5},
    "dist_loss": {"beta": 2, "gamma": 0.5, "temperature": 2, "eps": 0.25},
    "standardized_kd_loss": {"eps": 0.25, "temperature": 2},
    "policy_distillation_loss": {"temperature": 2, "ignore_index": 2, "vocab_size": 5},
    "policy_distillation_loss, nll": {"ignore_index": 2, "vocab_size": 5},
    "common_positions": {"ignore_index": 2},
    "expected_calibration_error": {"bins": 4, "temperature": 2, "ignore_index": 2},
    "fit_temperature": {"bounds": (0.5, 2), "tolerance": 0.25, "ignore_index": 2},
    "attention_transfer_loss": {"power": 2, "beta": 4},
    "rkd_distance_loss": {"delta": 0.5}, "rkd_loss": {"distance": 2, "angle": 0.5, "delta": 0.5},
    "num_items": {"ignore_index": 2, "averaged": False},
}  # fmt: skip


def numpy_scalars(value: Any) -> list[Any]:
    """The number as each kind of NumPy scalar that holds it exactly."""
    if isinstance(value, tuple):
        return [tuple(map(np.float32, value))]
    if isinstance(value, bool):
        return [np.bool_(value)]
    kinds = [np.float32, np.float64, np.float16, Fraction]
    return [kind(value) for kind in ([np.int64, np.int32] if isinstance(value, int) else kinds)]


@pytest.mark.filterwarnings("ignore:the likelihood has its maximum")
@pytest.mark.parametrize("call", NUMBERS)
def test_numpy_scalars_are_accepted_as_numbers(call: str) -> None:
    function, inputs = CALLS[call]
    options = {"return_parts": True} if call == "mutual_loss" else {}
    for argument, value in NUMBERS[call].items():
        wanted = function(**inputs | options | {argument: value})
        for scalar in numpy_scalars(value):
            actual = function(**inputs | options | {argument: scalar})
            assert exact_repr(actual) == exact_repr(wanted), (argument, scalar)
            refused = np.bool_(True) if not isinstance(value, bool) else np.float32(1.0)
            with pytest.raises((TypeError, ValueError), match=argument):
                function(**inputs | options | {argument: refused})


def exact_repr(value: Any) -> str:
    """The value with all its digits and the types of its numbers: "np.float32(2.0)" differs from 2.0."""
    torch.set_printoptions(precision=9)
    text = repr(value)
    torch.set_printoptions(profile="default")
    return text


def test_ensemble_weights_may_be_an_array() -> None:
    teacher, same = (
        fastkd.Ensemble([T, S + 1], weights) for weights in (np.array([0.25, 0.75]), [0.25, 0.75])
    )
    assert teacher.weights == same.weights and all(type(w) is float for w in teacher.weights)
    assert torch.equal(kd_loss(S, teacher), kd_loss(S, same))


def test_terms_layers_and_schedules_accept_numpy_numbers() -> None:
    term = fastkd.Term(features.hint_loss, "a", weight=np.float32(0.5))
    assert type(term.weight) is float
    loss = features.FeatureLoss({np.int64(0): np.int32(0)}, np.int64(7), np.int64(7))
    assert loss.layers == [(0, 0)] and torch.is_tensor(loss([S], [T]))
    options = {"pad_token_id": np.int64(0), "eos_token_id": np.int64(1)}
    step = sequences.gkd_step(
        Decoder(), Decoder(), BATCH, on_policy_fraction=np.float32(1), **options
    )
    assert step.on_policy


def test_a_cache_accepts_numpy_numbers(tmp_path: Any) -> None:
    with cache.CacheWriter(
        tmp_path, kind="topk", vocab_size=np.int64(7), k=np.int32(2), temperature=np.float32(2),
        shard_examples=np.int64(1), rank=np.int64(0), world_size=np.int64(1),
    ) as writer:  # fmt: skip
        writer.append(IDS[0], topk=fastkd.TopK.from_logits(torch.randn(4, 7), 2, temperature=2.0))
    read = cache.TeacherCache(tmp_path, rank=np.int64(0), world_size=np.int64(1))
    assert read.manifest.k == 2 and len(read) == 1


def test_numbers_are_accepted() -> None:
    for value, wanted in (
        (np.float32(0.5), 0.5), (np.int64(3), 3), (np.bool_(True), True), (Fraction(1, 2), 0.5), (2, 2), (0.5, 0.5),
    ):  # fmt: skip
        assert type(plain(value)) is type(wanted) and plain(value) == wanted
    for other in ("2", None, [2], torch.tensor(2.0), np.array(2.0), 1j):
        assert plain(other) is other
    assert as_float(10**400) == math.inf and as_float(-(10**400)) == -math.inf and as_float(2) == 2


def test_values_that_are_not_numbers_are_refused() -> None:
    for value in (True, "2", None, [2.0], 1j, np.array([1.0, 2.0])):
        message = f"must be a number.*got {re.escape(type(value).__name__)}"
        for option in ("temperature", "logit_scale"):
            with pytest.raises(TypeError, match=f"{option} {message}"):
                kd_loss(S, T, **{option: value})
        with pytest.raises(TypeError, match=f"beta {message}"):
            fastkd.jsd(value)
    with pytest.raises(TypeError, match="num_items must be a number or a tensor, got bool"):
        kd_loss(S, T, num_items=True)
    assert fastkd.jsd(torch.tensor(0.25)) == fastkd.jsd(0.25)


@pytest.mark.parametrize("value", [2.0, np.float32(2.0)])
def test_a_compiled_graph_accepts_numbers(value: Any) -> None:
    compiled = torch.compile(lambda s: kd_loss(s, T, temperature=value), backend="aot_eager")
    torch.testing.assert_close(compiled(S), kd_loss(S, T, temperature=2.0))


@pytest.mark.parametrize("broken", ["around prepare", "in prepare"])
@pytest.mark.parametrize("loss", ["kd_loss", "fused_linear_kd_loss"])
def test_a_graph_break_in_the_validation_changes_nothing(
    loss: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph break leaves either the validation or the rest uncompiled; the results stay the same."""
    student, heads = (S, ()) if loss == "kd_loss" else (HIDDEN, (HEAD,))

    def call(student: Tensor) -> Tensor:
        return getattr(fastkd, loss)(student, *heads, T, temperature=2.0)

    leaf = student.clone().requires_grad_()
    expected = call(leaf)
    gradient = torch.autograd.grad(expected, leaf)[0]
    if broken == "around prepare":
        monkeypatch.setattr(functional, "prepare", torch.compiler.disable(checks.prepare))
    else:
        choose = checks.check_choice

        def breaking(*arguments: Any) -> None:
            torch._dynamo.graph_break()
            choose(*arguments)

        monkeypatch.setattr(checks, "check_choice", breaking)
    torch._dynamo.reset()
    actual = torch.compile(call, backend="aot_eager")(leaf)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaf)[0], gradient)
