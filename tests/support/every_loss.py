"""Every loss of the package with all tensors that it takes, so that a test can change one argument at a time.

A :class:`Case` has named tensors and a call that computes the loss. Tests replace one tensor after the other, by a
view that torch marks as negated or by an inference tensor, and compare the results with those before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from fastkd import LinearTeacher, TopK, features, online, relations, response

ROWS, V, H = (2, 3), 11, 5
Tensors = dict[str, Tensor]


class Case(NamedTuple):
    """A loss and its arguments."""

    tensors: Callable[[torch.dtype], Tensors]
    # Called with (tensors, **backend).
    loss: Callable[..., Tensor]
    trained: tuple[str, ...] = ("student",)
    # Whether the loss takes a backend.
    with_backend: bool = True


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _logits(dtype: torch.dtype) -> Tensors:
    generator = _generator()
    student, teacher = (torch.randn(*ROWS, V, generator=generator).to(dtype) for _ in range(2))
    return {"student": student, "teacher": teacher}


def _of_rows(dtype: torch.dtype) -> Tensors:
    """The tensors with one value per row."""
    generator = _generator()
    labels = torch.randint(V, ROWS, generator=generator)
    labels[0, 0] = -100
    mask = torch.ones(ROWS, dtype=torch.bool)
    mask[1, 1] = False
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    row = {
        name: (0.5 + torch.rand(ROWS, generator=generator)).to(wide)
        for name in ("weight", "temperature", "teacher_temperature")
    }
    return {"labels": labels, "mask": mask, **row}


def _dense(dtype: torch.dtype) -> Tensors:
    return _logits(dtype) | _of_rows(dtype)


def _dense_with_items(dtype: torch.dtype) -> Tensors:
    return _dense(dtype) | {"num_items": torch.tensor(3.0)}


def _topk(dtype: torch.dtype) -> Tensors:
    inputs = _dense(dtype)
    teacher = TopK.from_logits(inputs.pop("teacher"), 3)
    assert teacher.tail_logprob is not None
    del inputs["teacher_temperature"]
    del inputs["temperature"]
    return inputs | {
        "ids": teacher.ids,
        "logprobs": teacher.logprobs,
        "tail_logprob": teacher.tail_logprob,
    }


def _linear(dtype: torch.dtype) -> Tensors:
    generator = _generator()

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return _of_rows(dtype) | {
        "student": made(*ROWS, H),
        "student_weight": made(V, H),
        "student_bias": made(V),
        "teacher_hidden": made(*ROWS, 4),
        "teacher_weight": made(V, 4),
        "teacher_bias": made(V),
    }


def _options(given: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    all_names = ("mask", "weight", "temperature", "teacher_temperature", "num_items", *names)
    return {name: given[name] for name in all_names if name in given}


def _kd(
    divergence: str = "forward_kl", reduction: str = "none", **options: Any
) -> Callable[..., Tensor]:
    def loss(given: Tensors, **backend: str) -> Tensor:
        return fastkd.kd_loss(
            given["student"], given["teacher"], given["labels"], alpha=0.4, divergence=divergence,
            reduction=reduction, **_options(given), **options, **backend,
        )  # fmt: skip

    return loss


def _kd_topk(given: Tensors, **backend: str) -> Tensor:
    teacher = TopK(given["ids"], given["logprobs"], "bucket", given["tail_logprob"])
    return fastkd.kd_loss(
        given["student"], teacher, given["labels"], alpha=0.4, reduction="none",
        **_options(given), **backend,
    )  # fmt: skip


def _ensemble(given: Tensors, **backend: str) -> Tensor:
    linear = LinearTeacher(given["teacher_hidden"], given["teacher_weight"], given["teacher_bias"])
    teacher = fastkd.Ensemble([given["teacher"], linear], mean="arithmetic")
    return fastkd.kd_loss(
        given["student"], teacher, given["labels"], alpha=0.4, reduction="none",
        **_options(given), **backend,
    )  # fmt: skip


def _sparse_ensemble_tensors(dtype: torch.dtype) -> Tensors:
    return _topk(dtype) | {"teacher": _logits(dtype)["teacher"]}


def _sparse_ensemble(given: Tensors, **backend: str) -> Tensor:
    sparse = TopK(given["ids"], given["logprobs"], "bucket", given["tail_logprob"])
    return fastkd.kd_loss(
        given["student"], fastkd.Ensemble([given["teacher"], sparse]), given["labels"], alpha=0.4, reduction="none",
        **_options(given), **backend,
    )  # fmt: skip


# Rows 1, 2, 4 have the second teacher.
INDEX = torch.tensor([[0, 1, 1], [0, 1, 0]])


def _routed_tensors(dtype: torch.dtype) -> Tensors:
    inputs = _ensemble_tensors(dtype) | {"index": INDEX.clone()}
    inputs["teacher"] = inputs["teacher"][INDEX == 0]
    inputs["teacher_hidden"] = inputs["teacher_hidden"][INDEX == 1]
    return inputs


def _routed_topk_tensors(dtype: torch.dtype) -> Tensors:
    inputs = _topk(dtype) | {"index": INDEX.clone()}
    for name in ("ids", "logprobs", "tail_logprob"):
        inputs[f"other_{name}"] = inputs[name][INDEX == 1]
        inputs[name] = inputs[name][INDEX == 0]
    return inputs


def _routed(given: Tensors, **backend: str) -> Tensor:
    if "ids" in given:
        teachers: list[Any] = [
            TopK(given[f"{which}ids"], given[f"{which}logprobs"], "bucket", given[f"{which}tail_logprob"])
            for which in ("", "other_")
        ]  # fmt: skip
    else:
        linear = LinearTeacher(
            given["teacher_hidden"], given["teacher_weight"], given["teacher_bias"]
        )
        teachers = [given["teacher"], linear]
    teacher = fastkd.RoutedTeacher(teachers, given["index"])
    return fastkd.kd_loss(
        given["student"], teacher, given["labels"], alpha=0.4, reduction="none",
        **_options(given), **backend,
    )  # fmt: skip


def _ensemble_tensors(dtype: torch.dtype) -> Tensors:
    inputs = _linear(dtype) | _logits(dtype)
    return {name: inputs[name] for name in inputs if name not in ("student_weight", "student_bias")}


def _fused(reduction: str) -> Callable[..., Tensor]:
    def loss(given: Tensors, **backend: str) -> Tensor:
        teacher = LinearTeacher(
            given["teacher_hidden"], given["teacher_weight"], given["teacher_bias"]
        )
        return fastkd.fused_linear_kd_loss(
            given["student"], given["student_weight"], teacher, given["labels"],
            student_bias=given["student_bias"], alpha=0.4, reduction=reduction, chunk_size=2,
            **_options(given), **backend,
        )  # fmt: skip

    return loss


def _head(dtype: torch.dtype) -> Tensors:
    """A student's head and what fused_linear_logprobs takes per row."""
    inputs = _linear(dtype)
    ids = torch.rand(*ROWS, V, generator=_generator()).argsort(-1)[..., :3]
    return {
        "hidden": inputs["student"],
        "lm_head": inputs["student_weight"],
        "bias": inputs["student_bias"],
        "targets": inputs["labels"],
        "ids": ids,
        "mask": inputs["mask"],
        "temperature": inputs["temperature"],
    }


def _of_head(given: Tensors) -> Tensor:
    """All outputs of fused_linear_logprobs, side by side."""
    outputs = fastkd.fused_linear_logprobs(
        given["hidden"], given["lm_head"], given["targets"], ids=given["ids"],
        bias=given["bias"], temperature=given["temperature"], mask=given["mask"], topk=2,
        chunk_size=2,
    )  # fmt: skip
    assert outputs.target is not None and outputs.entropy is not None
    assert outputs.gathered is not None and outputs.topk_logprobs is not None
    per_row = torch.stack([outputs.target, outputs.entropy], -1)
    per_token = torch.cat([outputs.gathered, outputs.topk_logprobs], -1)
    return torch.cat([per_row, torch.where(per_token > -torch.inf, per_token, 0.0)], -1)


def _mutual(reduction: str) -> Callable[..., Tensor]:
    def loss(given: Tensors, **backend: str) -> Tensor:
        losses = online.mutual_loss(
            [given["student"], given["teacher"]], given["labels"], mask=given["mask"],
            weight=given["weight"], temperature=2.0, reduction=reduction, **backend,
        )  # fmt: skip
        return losses[0]

    return loss


def _response(
    function: Callable[..., Tensor], *without: str, **fixed: Any
) -> Callable[..., Tensor]:
    def loss(given: Tensors, **backend: str) -> Tensor:
        options = {name: x for name, x in _options(given).items() if name not in without}
        return function(
            given["student"], given["teacher"], given["labels"], **options, **fixed, **backend
        )

    return loss


def _online_ensemble(given: Tensors, **backend: str) -> Tensor:
    return online.ensemble_loss(
        [given["student"], given["teacher"]], given["labels"], given["gate"], reduction="none",
        mask=given["mask"], weight=given["weight"], **backend,
    )  # fmt: skip


def _with_gate(dtype: torch.dtype) -> Tensors:
    inputs = _dense(dtype)
    del inputs["temperature"], inputs["teacher_temperature"]
    return inputs | {"gate": torch.tensor([0.3, 0.7])}


def _consistency(form: str) -> Callable[..., Tensor]:
    def loss(given: Tensors, **backend: str) -> Tensor:
        return online.consistency_loss(
            given["student"], given["teacher"], form, mask=given["mask"], weight=given["weight"],
            reduction="none", **backend,
        )  # fmt: skip

    return loss


def _features(dtype: torch.dtype) -> Tensors:
    return _logits(dtype) | {"mask": _of_rows(dtype)["mask"]}


def _without_mask(dtype: torch.dtype) -> Tensors:
    return _logits(dtype)


def _layers(given: Tensors) -> Tensor:
    loss = features.FeatureLoss({0: 0}, projection=torch.eye(V), normalize="l2")
    return loss([given["student"]], [given["teacher"]], mask=given["mask"])


def _logprobs(dtype: torch.dtype) -> Tensors:
    inputs = {name: x[..., 0] for name, x in _logits(dtype).items()}
    return inputs | {"mask": _of_rows(dtype)["mask"]}


def _sampled(estimator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(given: Tensors) -> Tensor:
        return estimator(given["student"], given["teacher"], given["mask"])

    return loss


def _policy(form: str) -> Callable[..., Tensor]:
    def loss(given: Tensors) -> Tensor:
        options = {name: given[name] for name in ("old_logprobs", "advantages") if name in given}
        if options:
            options["clip"] = 0.2  # type: ignore[assignment]
        return fastkd.sampled.on_policy_loss(
            given["student"], given["teacher"], form=form, mask=given["mask"],
            weight=given["weight"], reduction="none", **options,
        )  # fmt: skip

    return loss


def _weighted_logprobs(dtype: torch.dtype) -> Tensors:
    return _logprobs(dtype) | {"weight": _of_rows(dtype)["weight"]}


def _policy_logprobs(dtype: torch.dtype) -> Tensors:
    inputs = _dense(dtype)
    old = inputs["student"][..., 1] / 8 + inputs["student"][..., 0]
    return _weighted_logprobs(dtype) | {
        "old_logprobs": old,
        "advantages": inputs["teacher"][..., 1].clone(),
    }


def _draft_tensors(dtype: torch.dtype) -> Tensors:
    inputs = _dense(dtype)
    ids = torch.randperm(V, generator=_generator())[:7]
    return {
        "student": inputs["student"][..., :7],
        **{name: inputs[name] for name in ("teacher", "mask", "weight")},
        "draft_to_target": ids,
        "positions": torch.arange(3).expand(ROWS).clone(),
    }


def _draft(losses: Any) -> Callable[..., Tensor]:
    def loss(given: Tensors, **backend: str) -> Tensor:
        return response.draft_loss(
            given["student"], given["teacher"], losses, mask=given["mask"], weight=given["weight"],
            draft_to_target=given["draft_to_target"], positions=given["positions"],
            position_decay=0.9, reduction="none", **backend,
        )  # fmt: skip

    return loss


def _draft_head_tensors(dtype: torch.dtype) -> Tensors:
    inputs = _linear(dtype)
    names = ("student", "student_weight", "student_bias", "teacher_hidden", "teacher_weight")
    return {
        **{name: inputs[name] for name in (*names, "teacher_bias", "mask", "weight")},
        "student_weight": inputs["student_weight"][:7],
        "student_bias": inputs["student_bias"][:7],
        "draft_to_target": torch.randperm(V, generator=_generator())[:7],
        "positions": torch.arange(3).expand(ROWS).clone(),
    }


def _draft_of_heads(reduction: str) -> Callable[..., Tensor]:
    def loss(given: Tensors, **backend: str) -> Tensor:
        teacher = LinearTeacher(
            given["teacher_hidden"], given["teacher_weight"], given["teacher_bias"]
        )
        return response.fused_linear_draft_loss(
            given["student"], given["student_weight"], teacher, {"tvd": 0.9, "lk_hybrid": 0.5},
            student_bias=given["student_bias"], mask=given["mask"], weight=given["weight"],
            draft_to_target=given["draft_to_target"], positions=given["positions"],
            position_decay=0.9, chunk_size=2, reduction=reduction, **backend,
        )  # fmt: skip

    return loss


HEAD = ("student", "student_weight", "student_bias")
PAIR = ("student", "teacher")

LOSSES: dict[str, Case] = {
    "kd_loss": Case(_dense, _kd()),
    "kd_loss, summed": Case(_dense_with_items, _kd(reduction="mean")),
    "kd_loss, both trained": Case(_dense, _kd(), PAIR),
    "kd_loss, no closed form": Case(_dense, _kd("jsd"), PAIR),
    "kd_loss, by the label": Case(_dense, _kd("dkd")),
    "kd_loss, TopK": Case(_topk, _kd_topk),
    "kd_loss, Ensemble": Case(_ensemble_tensors, _ensemble),
    "kd_loss, Ensemble with TopK": Case(_sparse_ensemble_tensors, _sparse_ensemble),
    "kd_loss, RoutedTeacher": Case(_routed_tensors, _routed),
    "kd_loss, RoutedTeacher of TopKs": Case(_routed_topk_tensors, _routed),
    "fused_linear_kd_loss": Case(_linear, _fused("none"), HEAD),
    "fused_linear_kd_loss, summed": Case(_linear, _fused("mean"), HEAD),
    "fused_linear_kd_loss, frozen head": Case(_linear, _fused("none")),
    "fused_linear_logprobs": Case(_head, _of_head, ("hidden", "lm_head", "bias"), with_backend=False),
    "mutual_loss": Case(_with_gate, _mutual("none")),
    "mutual_loss, summed": Case(_with_gate, _mutual("mean")),
    "adaptive_kl_loss": Case(_dense, _response(response.adaptive_kl_loss, reduction="none"), PAIR),
    "standardized_kd_loss": Case(
        _dense, _response(response.standardized_kd_loss, reduction="none", alpha=0.4), PAIR
    ),
    "dist_loss": Case(
        _dense, _response(response.dist_loss, "weight", "temperature", "teacher_temperature"),
        with_backend=False,
    ),
    "uld_loss": Case(_dense, _response(response.uld_loss, reduction="none"), with_backend=False),
    **{
        f"policy_distillation_loss, {form}": Case(
            _dense,
            _response(
                response.policy_distillation_loss, "teacher_temperature", reduction="none", form=form
            ),
        )
        for form in ("nll", "mse", "kl")
    },
    "ensemble_loss": Case(_with_gate, _online_ensemble, (*PAIR, "gate")),
    "ensemble_loss, fixed gate": Case(_with_gate, _online_ensemble),
    "consistency_loss, mse": Case(_with_gate, _consistency("mse")),
    "consistency_loss, kl": Case(_with_gate, _consistency("kl")),
    "hint_loss": Case(
        _features, lambda x: features.hint_loss(x["student"], x["teacher"], mask=x["mask"]),
        with_backend=False,
    ),
    "cosine_loss": Case(
        _features, lambda x: features.cosine_loss(x["student"], x["teacher"], mask=x["mask"]),
        PAIR, with_backend=False,
    ),
    "attention_transfer_loss": Case(
        _without_mask, lambda x: features.attention_transfer_loss(x["student"], x["teacher"]),
        with_backend=False,
    ),
    "FeatureLoss": Case(_features, _layers, with_backend=False),
    "HintLoss": Case(
        _features,
        lambda x: features.HintLoss(torch.nn.Identity())(x["student"], x["teacher"], mask=x["mask"]),
        with_backend=False,
    ),
    "rkd_loss": Case(
        _without_mask,
        lambda x, **backend: relations.rkd_loss(x["student"], x["teacher"], **backend), PAIR,
    ),
    "similarity_loss": Case(
        _without_mask, lambda x: relations.similarity_loss(x["student"], x["teacher"]),
        with_backend=False,
    ),
    "gram_loss": Case(
        _without_mask, lambda x: relations.gram_loss(x["student"], x["teacher"], over="channels"),
        with_backend=False,
    ),
    **{
        name: Case(_logprobs, _sampled(getattr(fastkd.sampled, name)), with_backend=False)
        for name in ("k1", "k2", "k3")
    },
    "on_policy_loss": Case(_policy_logprobs, _policy("policy_gradient"), with_backend=False),
    **{
        f"on_policy_loss, {form}": Case(_weighted_logprobs, _policy(form), with_backend=False)
        for form in ("k2", "k3", "abs")
    },
    "draft_loss": Case(_draft_tensors, _draft({"tvd": 0.9, "cross_entropy": 0.1})),
    "draft_loss, of the acceptance": Case(_draft_tensors, _draft({"nla": 0.9, "lk_hybrid": 0.1})),
    "fused_linear_draft_loss": Case(_draft_head_tensors, _draft_of_heads("none"), HEAD),
    "fused_linear_draft_loss, summed": Case(_draft_head_tensors, _draft_of_heads("mean"), HEAD),
}  # fmt: skip


def leaf(tensor: Tensor) -> Tensor:
    """A copy of the tensor that requires grad."""
    return tensor.clone().requires_grad_()
