"""on_policy_loss and what it takes: exact expected gradients, the formulas of other stacks, masks, numbers and errors.

An expectation over sampled tokens is a sum over a small vocabulary, so it has no noise: the rows of log-probabilities
are those of all tokens, and the loss of each token is weighted by its probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import replicas
from support.processes import Processes
from torch import Tensor

from fastkd.parallel import num_items
from fastkd.sampled import importance_weights, on_policy_loss, policy_advantages

FORMS = ("policy_gradient", "k2", "k3", "abs")
V = 5


def _gradient(value: Tensor, of: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(value, of, retain_graph=True)
    return result


def _models(seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """(the student's logits, the teacher's log-probabilities, the sampler's log-probabilities), [3, V] float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher, old = (
        spread * torch.randn(3, V, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return student.requires_grad_(), teacher.log_softmax(-1), old.log_softmax(-1)


def _divergence(name: str, logq: Tensor, logp: Tensor) -> Tensor:
    q, p = logq.exp(), logp.exp()
    return {
        "KL(q || p)": (q * (logq - logp)).sum(),
        "KL(p || q)": (p * (logp - logq)).sum(),
        "sum |p - q|": (p - q).abs().sum(),
    }[name]


# What each form says of its expected gradient.
CLAIMS = {
    "policy_gradient": "KL(q || p)",
    "k2": "KL(q || p)",
    "k3": "KL(p || q)",
    "abs": "sum |p - q|",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_expected_gradient_on_policy(form: str, seed: int) -> None:
    logits, logp, _ = _models(seed)
    logq = logits.log_softmax(-1)
    losses = on_policy_loss(logq, logp, form=form, coef=0.7, reduction="none")
    found = _gradient((logq.detach().exp() * losses).sum(), logits)
    wanted = 0.7 * _gradient(_divergence(CLAIMS[form], logits.log_softmax(-1), logp), logits)
    torch.testing.assert_close(found, wanted)
    assert wanted.abs().max() > 0.05


@pytest.mark.parametrize("form", FORMS)
def test_expected_gradient_of_tokens_from_an_older_student(form: str) -> None:
    logits, logp, old = _models(2)
    logq = logits.log_softmax(-1)
    options: dict[str, Any] = {"form": form, "reduction": "none"}
    if form == "policy_gradient":
        advantages = policy_advantages(logp, logq)
        losses = on_policy_loss(logq, None, old, advantages=advantages, **options)
    else:
        losses = on_policy_loss(logq, logp, weight=importance_weights(logq, old), **options)
    found = _gradient((old.exp() * losses).sum(), logits)
    wanted = _gradient(_divergence(CLAIMS[form], logits.log_softmax(-1), logp), logits)
    torch.testing.assert_close(found, wanted)


def test_expected_gradient_with_fixed_advantages() -> None:
    """After an update the gradient is that of E_q[log old - log p], which is not that of KL(q || p)."""
    logits, logp, old = _models(3)
    losses = on_policy_loss(logits.log_softmax(-1), logp, old, reduction="none")
    found = _gradient((old.exp() * losses).sum(), logits)
    q = logits.softmax(-1)
    torch.testing.assert_close(found, _gradient((q * (old - logp)).sum(), logits))
    exact = _gradient(_divergence("KL(q || p)", logits.log_softmax(-1), logp), logits)
    assert (found - exact).abs().max() > 0.05


def test_expected_values() -> None:
    logits, logp, _ = _models(4)
    logq = logits.log_softmax(-1).detach()
    divergence = _divergence("KL(q || p)", logq, logp)
    for form in ("policy_gradient", "k3"):
        losses = on_policy_loss(logq, logp, form=form, reduction="none")
        torch.testing.assert_close((logq.exp() * losses).sum(), divergence)


def test_what_has_no_expected_gradient() -> None:
    """The gradient of s - t, and advantages that do not depend on the sampled token, such as a top-k KL."""
    logits, logp, _ = _models(5)
    logq = logits.log_softmax(-1)
    probabilities = logq.detach().exp()
    assert _gradient((probabilities * (logq - logp)).sum(), logits).abs().max() < 1e-12
    with pytest.raises(ValueError, match="form must not be 'k1': the gradient of s - t"):
        on_policy_loss(logq, logp, form="k1")
    top = logp.topk(2, dim=-1).indices
    truncated = (logp.exp() * (logp - logq)).gather(-1, top).sum(-1, keepdim=True).detach()
    losses = on_policy_loss(logq, advantages=-truncated.expand(3, V), reduction="none")
    assert _gradient((probabilities * losses).sum(), logits).abs().max() < 1e-12


def test_matches_kd_loss_in_expectation() -> None:
    """MiniLLM's single-step term is the exact expectation: kd_loss with reverse KL."""
    import fastkd

    logits, logp, _ = _models(6)
    logq = logits.log_softmax(-1)
    losses = on_policy_loss(logq, logp, reduction="none")
    sampled = _gradient((logq.detach().exp() * losses).sum() / 3, logits)
    exact = _gradient(fastkd.kd_loss(logits, logp, divergence="reverse_kl"), logits)
    torch.testing.assert_close(sampled, exact, rtol=1e-6, atol=1e-8)


# ---- formulas of other stacks, in float64

B, L = 4, 7


def _batch(seed: int, dtype: torch.dtype = torch.float64, apart: float = 0.4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(B, L, generator=generator, dtype=torch.float64)

    student = -noise().abs() - 0.1
    lengths = torch.tensor([L, 3, 5, 1])
    mask = torch.arange(L) < lengths[:, None]
    mask[0, 2] = False  # a hole, as in a turn of a tool
    batch = {
        "student": student,
        "old": (student + apart * noise()).clamp(max=0.0),
        "rollout": (student + apart * noise()).clamp(max=0.0),
        "teacher": (student + noise()).clamp(max=0.0),
        "rewards": noise(),
        "weight": noise().abs(),
    }
    return {name: x.to(dtype) for name, x in batch.items()} | {"mask": mask}


def _run(loss: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), _gradient(value, leaf)


def _agree(
    found: Callable[[Tensor], Tensor], wanted: Callable[[Tensor], Tensor], student: Tensor
) -> None:
    torch.testing.assert_close(_run(found, student), _run(wanted, student))


def _verl_aggregate(loss: Tensor, mask: Tensor, mode: str, sequences: int | None = None) -> Tensor:
    """verl's agg_loss for one process."""
    m = mask.double()
    if mode == "token-mean":
        return (loss * m).sum() / m.sum()
    if mode == "token-sum":
        return (loss * m).sum()
    of_sequences = (loss * m).sum(-1)
    if mode == "seq-mean-token-mean":
        of_sequences = of_sequences / (m.sum(-1) + 1e-300)
    if mode == "seq-mean-token-sum-norm":
        return of_sequences.sum() / mask.shape[-1]
    return of_sequences.sum() / (sequences or int(mask.any(-1).sum()))


# The options that give verl's loss_agg_mode.
AGGREGATION: dict[str, dict[str, Any]] = {
    "token-mean": {"reduction": "mean"},
    "token-sum": {"reduction": "sum"},
    "seq-mean-token-sum": {"reduction": "batchmean"},
    "seq-mean-token-sum-norm": {"reduction": "mean", "num_items": L},
    "seq-mean-token-mean": {"reduction": "sequence_mean"},
}


@pytest.mark.parametrize("mode", AGGREGATION)
@pytest.mark.parametrize("seed", range(3))
def test_verl_policy_gradient(mode: str, seed: int) -> None:
    """verl's k1 distillation loss as an advantage in its "vanilla" PPO loss, with dual clip and rollout weights."""
    x = _batch(seed, apart=0.9)
    low, high, c, clamp = 0.2, 0.28, 1.5, 2.0

    def verl(s: Tensor) -> Tensor:
        k1 = (s - x["teacher"]).clamp(-clamp, clamp)
        advantages = -k1.detach()
        ratio = (s - x["old"]).clamp(-20, 20).exp()
        first, second = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
        most = torch.maximum(first, second)
        lower = torch.minimum(-advantages * c, most)
        losses = torch.where(advantages < 0, lower, most) * x["weight"]
        return _verl_aggregate(losses, x["mask"], mode)

    def ours(s: Tensor) -> Tensor:
        advantages = policy_advantages(x["teacher"], s, clamp=clamp)
        return on_policy_loss(
            s, None, x["old"], advantages=advantages, clip=(low, high), dual_clip=c,
            mask=x["mask"], weight=x["weight"], **AGGREGATION[mode],
        )  # fmt: skip

    _agree(ours, verl, x["student"])


def test_verl_clip_fractions() -> None:
    x = _batch(7, apart=0.9)
    _, parts = on_policy_loss(
        x["student"], x["teacher"], x["old"], clip=0.2, dual_clip=1.5, mask=x["mask"],
        weight=x["weight"], return_parts=True,
    )  # fmt: skip
    m = x["mask"]
    advantages = x["teacher"] - x["old"]
    ratio = (x["student"] - x["old"]).exp()
    first, second = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    most = torch.maximum(first, second)
    wanted = {
        "teacher_kl": x["old"] - x["teacher"],
        "policy_kl": x["old"] - x["student"],
        "clip_fraction": (second > first).double(),
        "dual_clip_fraction": ((most > -advantages * 1.5) & (advantages < 0)).double(),
        "mean_advantage": advantages,
        "mean_abs_advantage": advantages.abs(),
        "mean_weight": x["weight"],
        "rejected_fraction": torch.zeros_like(advantages),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(parts, name), value[m].mean(), msg=name)
    assert parts.counted == m.sum()
    assert 0 < parts.clip_fraction < 1 and 0 < parts.dual_clip_fraction < 1
    assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("form", ["k2", "k3", "abs"])
@pytest.mark.parametrize("clamp", [None, 0.3])
def test_verl_estimators(form: str, clamp: float | None) -> None:
    """verl's kl_penalty as a loss, with its loss_max_clamp."""
    x = _batch(8)

    def verl(s: Tensor) -> Tensor:
        log_ratio = (x["teacher"] - s).clamp(-20, 20)
        value = {
            "k2": 0.5 * (s - x["teacher"]).square(),
            "k3": log_ratio.exp() - log_ratio - 1,
            "abs": (s - x["teacher"]).abs(),
        }[form]
        if clamp is not None:
            value = value.clamp(-clamp, clamp)
        return _verl_aggregate(0.5 * value, x["mask"], "token-mean")

    def ours(s: Tensor) -> Tensor:
        return on_policy_loss(s, x["teacher"], form=form, coef=0.5, clamp=clamp, mask=x["mask"])

    _agree(ours, verl, x["student"])


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_tinker_importance_sampling(discount: float) -> None:
    """Advantages of a reward minus the reverse KL of each token, importance sampling without clip, summed."""
    x = _batch(9)
    m = x["mask"].double()
    kl = -0.7 * m * (x["old"] - x["teacher"])
    later = kl.clone()
    if discount:
        for t in reversed(range(L - 1)):
            later[:, t] = kl[:, t] + discount * later[:, t + 1]
    advantages = x["rewards"] + later

    def tinker(s: Tensor) -> Tensor:
        return -((s - x["old"]).exp() * advantages * m).sum()

    def ours(s: Tensor) -> Tensor:
        found = policy_advantages(
            x["teacher"], x["old"], coef=0.7, discount=discount, advantages=x["rewards"], mask=x["mask"]
        )  # fmt: skip
        return on_policy_loss(s, None, x["old"], advantages=found, mask=x["mask"], reduction="sum")

    _agree(ours, tinker, x["student"])
    if not discount:  # the same in one call, as in slime and ms-swift
        options: dict[str, Any] = {"mask": x["mask"], "reduction": "sum"}
        _agree(
            lambda s: on_policy_loss(
                s, x["teacher"], x["old"], coef=0.7, advantages=x["rewards"], **options
            ),
            tinker,
            x["student"],
        )


@pytest.mark.parametrize("kind", ["tis", "icepop", "seq-mask-tis"])
def test_nemo_rl_truncation(kind: str) -> None:
    """MOPD's advantages, with the weights by which NeMo-RL corrects for the sampling engine."""
    x = _batch(10, apart=0.6)
    low, high, m = 0.7, 1.4, x["mask"].double()
    w = (x["old"] - x["rollout"]).exp()
    if kind == "tis":
        wanted = w.clamp(max=high)
        options: dict[str, Any] = {"truncate": high}
    elif kind == "icepop":
        wanted = torch.where((w >= low) & (w <= high), w, 0.0)
        options = {"icepop": (low, high)}
    else:
        mean = ((x["old"] - x["rollout"]) * m).sum(-1, keepdim=True) / m.sum(-1, keepdim=True)
        inside = (mean.exp() >= low) & (mean.exp() <= high)
        assert inside.any() and not inside.all()
        wanted = w * inside
        options = {"sequence_mask": (low, high)}
    advantages = x["teacher"] - x["old"]

    def nemo(s: Tensor) -> Tensor:
        return -(advantages * wanted * (s - x["old"]).exp() * m).sum() / m.sum()

    def ours(s: Tensor) -> Tensor:
        weight = importance_weights(x["old"], x["rollout"], mask=x["mask"], **options)
        assert not weight[~x["mask"]].any()
        return on_policy_loss(s, x["teacher"], x["old"], mask=x["mask"], weight=weight)

    _agree(ours, nemo, x["student"])


def test_truncation_from_below_and_rejected_tokens() -> None:
    x = _batch(11, apart=0.9)
    w = (x["student"] - x["rollout"]).exp()
    both = importance_weights(x["student"], x["rollout"], truncate=(0.5, 2.0))
    torch.testing.assert_close(both, w.clamp(0.5, 2.0))
    weight = importance_weights(x["student"], x["rollout"], icepop=(0.8, 1.25), mask=x["mask"])
    _, parts = on_policy_loss(
        x["student"], x["teacher"], mask=x["mask"], weight=weight, return_parts=True
    )
    outside = ((w < 0.8) | (w > 1.25))[x["mask"]].double().mean()
    torch.testing.assert_close(parts.rejected_fraction, outside)
    assert 0 < outside < 1


def test_a_nan_is_not_rejected_as_a_weight_outside() -> None:
    """Else a model that returns NaN would only shrink the loss."""
    current = torch.tensor([[-1.0, math.nan, -1.0]])
    sampled = torch.full((1, 3), -1.0)
    for options in (
        {"icepop": (0.5, 2.0)},
        {"truncate": 2.0},
        {"icepop": (0.5, 2.0), "sequence_mask": (0.5, 2.0)},
    ):
        assert importance_weights(current, sampled, **options)[0, 1].isnan()
        mask = torch.tensor([[True, False, True]])
        assert importance_weights(current, sampled, mask=mask, **options).tolist() == [[1, 0, 1]]


def test_position_weights_of_iw_opd() -> None:
    x = _batch(12)
    m = x["mask"]
    a = torch.where(m, x["teacher"] - x["old"], 0.0)
    size = a.abs()
    before = torch.stack([size[:, :t].sum(-1) for t in range(L)], -1)
    wanted = a * (1 + 0.5 * (1 - before / size.sum(-1, keepdim=True)))
    found = policy_advantages(x["teacher"], x["old"], position_gamma=0.5, coef=3.0, mask=m)
    torch.testing.assert_close(found, 3.0 * wanted)


# ---- masks, dtypes, layouts

HOLES = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean", "sequence_mean"])
@pytest.mark.parametrize("form", FORMS)
def test_masked_tokens_may_hold_anything(form: str, reduction: str) -> None:
    x = _batch(13)
    pg = form == "policy_gradient"
    for hole in HOLES:
        filled = {
            name: torch.where(x["mask"], value, hole) if value.is_floating_point() else value
            for name, value in x.items()
        }
        results = []
        for tensors in (x, filled):
            leaf = tensors["student"].clone().requires_grad_()
            options: dict[str, Any] = {"form": form, "reduction": reduction, "mask": x["mask"]}
            if pg:
                advantages = policy_advantages(
                    tensors["teacher"], tensors["old"], position_gamma=0.5, discount=0.5,
                    advantages=tensors["rewards"], mask=x["mask"],
                )  # fmt: skip
                assert not advantages[~x["mask"]].any()
                options |= {"old_logprobs": tensors["old"], "advantages": advantages, "clip": 0.2}
            weight = importance_weights(
                tensors["old"], tensors["rollout"], sequence_mask=(0.1, 9.0), mask=x["mask"]
            )
            loss, parts = on_policy_loss(
                leaf, tensors["teacher"], weight=weight, return_parts=True, **options
            )
            upstream = torch.ones_like(loss)
            if reduction == "none":
                upstream[~x["mask"]] = hole
                assert not loss[~x["mask"]].any()
            (gradient,) = torch.autograd.grad(loss, leaf, upstream)
            assert not gradient[~x["mask"]].any()
            results.append((loss.detach(), gradient, *parts))
        for found, wanted in zip(*results, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "sequence_mean"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_no_counted_token(form: str, reduction: str, shape: tuple[int, int]) -> None:
    student = torch.full(shape, math.nan).requires_grad_()
    mask = torch.zeros(shape, dtype=torch.bool)
    for given_mask in (mask, None) if 0 in shape else (mask,):
        loss, parts = on_policy_loss(
            student, student.detach(), form=form, reduction=reduction, mask=given_mask,
            return_parts=True,
        )  # fmt: skip
        assert loss == 0 and loss.requires_grad
        assert not _gradient(loss, student).any()
        assert all(part == 0 for part in parts)


def test_tokens_of_weight_0_are_not_read() -> None:
    student = torch.tensor([[-1.0, -math.inf, -2.0]]).requires_grad_()
    teacher = torch.tensor([[-1.5, math.nan, -0.5]])
    weight = torch.tensor([[1.0, 0.0, 2.0]])
    loss = on_policy_loss(student, teacher, weight=weight, form="k3")
    kept = on_policy_loss(
        student[:, ::2], teacher[:, ::2], weight=weight[:, ::2], form="k3", num_items=3
    )
    assert torch.equal(loss, kept)  # the token is counted
    gradient = _gradient(loss, student)
    assert gradient.isfinite().all() and gradient[0, 1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_inputs_are_widened(form: str, dtype: torch.dtype) -> None:
    x = _batch(14, dtype)
    options: dict[str, Any] = {"form": form, "mask": x["mask"]}
    if form == "policy_gradient":
        options |= {"old_logprobs": x["old"], "clip": 0.2}
    exact = options | ({"old_logprobs": x["old"].double()} if "old_logprobs" in options else {})
    found = _run(lambda s: on_policy_loss(s, x["teacher"], **options), x["student"])
    wanted = _run(
        lambda s: on_policy_loss(s, x["teacher"].double(), **exact), x["student"].double()
    )
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-6, atol=1e-7)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=rounding + 1e-6, atol=1e-7)


def test_helpers_subtract_in_float32() -> None:
    a, b = (
        torch.tensor([[-8.0625, -3.0]]).bfloat16(),
        torch.tensor([[-1.0078125, -3.015625]]).bfloat16(),
    )
    difference = b.float() - a.float()
    assert not torch.equal((b - a).float(), difference)
    assert torch.equal(policy_advantages(b, a), difference)
    assert torch.equal(importance_weights(b, a), difference.exp())
    for function in (policy_advantages, importance_weights):
        assert function(a.double(), b).dtype == torch.float64


@given(
    seed=st.integers(0, 10**6), shape=st.sampled_from([(5,), (2, 3), (2, 1, 4)]),
    form=st.sampled_from(FORMS), peaked=st.sampled_from([0.01, 1.0, 12.0]),
    transposed=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_gradients_are_the_derivatives_of_the_values(
    seed: int, shape: tuple[int, ...], form: str, peaked: float, transposed: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def made() -> Tensor:
        x = -peaked * torch.rand(*reversed(shape), generator=generator, dtype=torch.float64)
        return x.permute(*reversed(range(len(shape)))) if transposed else x.reshape(shape)

    student, teacher, old, extra = made(), made(), made(), made()
    mask = torch.rand(shape, generator=generator) < 0.7
    options: dict[str, Any] = {"form": form, "mask": mask, "weight": made().abs()}
    if form == "policy_gradient":
        options |= {"old_logprobs": old, "advantages": extra, "clip": (0.3, 0.4), "dual_clip": 4.0}

    def loss(s: Tensor) -> Tensor:
        return on_policy_loss(s, teacher, reduction="sum", **options)

    value, gradient = _run(loss, student)
    step = 1e-6
    for index in mask.nonzero().tolist():
        nudge = torch.zeros(shape, dtype=torch.float64)
        nudge[tuple(index)] = step
        slopes = [(loss(student + k * nudge) - value).item() / (k * step) for k in (1, -1)]
        if abs(slopes[0] - slopes[1]) > 1e-3 * (1 + abs(slopes[0])):
            continue  # a kink: |t - s| at 0, or the edge of a clip
        assert gradient[tuple(index)].item() == pytest.approx(sum(slopes) / 2, rel=1e-4, abs=1e-6)
    assert not gradient[~mask].any()


def test_far_log_probabilities_stay_finite() -> None:
    student = torch.tensor([[-200.0, -1.0, -300.0, -1e4]]).requires_grad_()
    old = torch.tensor([[-1.0, -200.0, -0.5, -1.0]])
    teacher = torch.tensor([[-2.0, -3.0, -400.0, -0.1]])
    for options in (
        {"old_logprobs": old},
        {"old_logprobs": old, "clip": 0.2},
        {"form": "k3"},
        {"weight": importance_weights(student, old)},
    ):
        loss = on_policy_loss(student, teacher, **options)  # type: ignore[arg-type]
        assert loss.isfinite()
        assert _gradient(loss, student).isfinite().all()
    assert importance_weights(student, old).max() == torch.tensor(20.0).exp()


def test_a_teacher_without_probability() -> None:
    """The loss is infinite, unless clamp limits the advantage."""
    student = torch.tensor([[-1.0, -2.0]]).requires_grad_()
    teacher = torch.tensor([[-1.5, -math.inf]])
    assert on_policy_loss(student, teacher) == math.inf
    loss = on_policy_loss(student, teacher, clamp=5.0)
    torch.testing.assert_close(loss, torch.tensor((0.5 + 5.0) / 2))
    torch.testing.assert_close(_gradient(loss, student), torch.tensor([[0.25, 2.5]]))


@pytest.mark.parametrize(
    ("form", "first"), [("k2", 0.125), ("k3", math.expm1(-0.5) + 0.5), ("abs", 0.5)]
)
def test_a_clamped_form_of_a_teacher_without_probability(form: str, first: float) -> None:
    """Beyond clamp, the value is constant, also where the estimate is infinite."""
    student = torch.tensor([[-1.0, -2.0]]).requires_grad_()
    teacher = torch.tensor([[-1.5, -math.inf]])
    loss = on_policy_loss(student, teacher, form=form, clamp=5.0)
    torch.testing.assert_close(loss, torch.tensor((first + 5.0) / 2))
    gradient = _gradient(loss, student)
    assert gradient[0, 0] > 0.0
    assert gradient[0, 1] == 0.0


# ---- denominators


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sequence_mean"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_sum_to_the_batch(reduction: str, as_tensor: bool) -> None:
    x = _batch(15)
    total = {"mean": int(x["mask"].sum()), "batchmean": B, "sequence_mean": B}[reduction]
    items: Any = torch.tensor(total) if as_tensor else total

    def parts(s: Tensor) -> Tensor:
        losses = [
            on_policy_loss(
                s[rows], x["teacher"][rows], mask=x["mask"][rows], reduction=reduction, num_items=items
            )
            for rows in (slice(0, 1), slice(1, B))
        ]  # fmt: skip
        return losses[0] + losses[1]

    def whole(s: Tensor) -> Tensor:
        return on_policy_loss(s, x["teacher"], mask=x["mask"], reduction=reduction)

    _agree(parts, whole, x["student"])


@pytest.fixture(scope="module")
def processes() -> Any:
    pool = Processes(2)
    yield pool
    pool.stop()


@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
def test_processes_one_of_which_has_no_token(processes: Processes, reduction: str) -> None:
    x = _batch(16)
    x["mask"][2:] = False
    whole = _run(
        lambda s: on_policy_loss(s, x["teacher"], mask=x["mask"], reduction=reduction), x["student"]
    )
    tensors = (x["student"], x["teacher"], x["mask"])
    outcomes = processes.run(2, replicas.policy, tensors, reduction)
    # DDP divides the sum of the gradients by the number of processes.
    torch.testing.assert_close(torch.cat([gradient for _, gradient in outcomes]) / 2, whole[1])
    torch.testing.assert_close(sum(loss for loss, _ in outcomes) / 2, whole[0])


def test_num_items_of_a_mask() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert num_items(mask=mask) == 2 and num_items(mask=mask.any(-1)) == 1
    with pytest.raises(ValueError, match="labels or mask must be given; both are None"):
        num_items()


# ---- compiled graphs


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", ["policy_gradient", "k3"])
def test_compiled(form: str) -> None:
    x = _batch(17, torch.float32)

    def call(s: Tensor, x: dict[str, Tensor], number: float) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"form": form, "coef": number, "clamp": 1.0 + number}
        if form == "policy_gradient":
            options |= {
                "old_logprobs": x["old"],
                "clip": (0.1, number / 4),
                "dual_clip": 1.0 + number,
            }
        weight = importance_weights(x["old"], x["rollout"], truncate=2.0, mask=x["mask"])
        loss, parts = on_policy_loss(
            s, x["teacher"], mask=x["mask"], weight=weight, reduction="sequence_mean",
            num_items=number, return_parts=True, **options,
        )  # fmt: skip
        return loss, *parts

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for number in (2.0, 1.5, 0.5):
        results = []
        for function in (compiled, call):
            leaf = x["student"].clone().requires_grad_()
            loss, *parts = function(leaf, x, number)
            results.append([loss.detach(), *parts, _gradient(loss, leaf)])
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_graph_does_not_ignore_coef_without_a_teacher() -> None:
    advantages = torch.ones(2, 3)
    compiled = torch.compile(
        lambda s, coef: on_policy_loss(s, advantages=advantages, coef=coef), backend="aot_eager"
    )
    compiled(S, 1.0)
    for coef in (0.5, 0.25):
        with pytest.raises(Exception, match="coef is for the teacher's term"):
            compiled(S, coef)


# ---- errors

S = torch.full((2, 3), -1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "teacher_logprobs or advantages must be given for form='policy_gradient'; both are None"),
        ({"form": "k2"}, "teacher_logprobs must be given for form='k2', got None"),
        ({"form": "reverse_kl"}, "form must be one of policy_gradient, k2, k3, abs; got 'reverse_kl'"),
        ({"form": "k3", "teacher_logprobs": S, "old_logprobs": S}, "old_logprobs is for form='policy_gradient'"),
        ({"form": "k3", "teacher_logprobs": S, "advantages": S}, "advantages is for form='policy_gradient'"),
        ({"form": "k3", "teacher_logprobs": S, "clip": 0.2}, "clip is for form='policy_gradient'"),
        ({"teacher_logprobs": S, "clip": 0.2}, "clip limits the ratio of student_logprobs to old_logprobs"),
        ({"teacher_logprobs": S, "dual_clip": 3.0}, "dual_clip limits the ratio"),
        ({"teacher_logprobs": S, "old_logprobs": S, "clip": (1.2, 0.2)}, "clip must have low <= 1"),
        ({"teacher_logprobs": S, "old_logprobs": S, "clip": -0.1}, r"clip must be in \[0, 1e\+30\], got -0.1"),
        ({"teacher_logprobs": S, "old_logprobs": S, "clip": "0.2"}, "clip must be a number, got str"),
        ({"teacher_logprobs": S, "old_logprobs": S, "dual_clip": 1.0}, "dual_clip must be greater than 1, got 1.0"),
        ({"advantages": S, "coef": 0.5}, "coef is for the teacher's term, and teacher_logprobs is None"),
        ({"advantages": S, "clamp": 0.5}, "clamp is for the teacher's term"),
        ({"teacher_logprobs": S, "clamp": 0.0}, "clamp must be of a size between"),
        ({"teacher_logprobs": S, "coef": math.inf}, "coef must be in"),
        ({"teacher_logprobs": S, "reduction": "token-mean"}, "reduction must be one of none, .*, sequence_mean; got"),
        ({"teacher_logprobs": S, "reduction": "sum", "num_items": 3}, "num_items is the denominator"),
        ({"teacher_logprobs": S, "num_items": 0}, "num_items must be positive, got 0"),
        ({"teacher_logprobs": S[0]}, r"teacher_logprobs must have the shape of student_logprobs, \(2, 3\); got \(3,\)"),
        ({"teacher_logprobs": S.long()}, "teacher_logprobs must be floating point, got torch.int64"),
        ({"teacher_logprobs": [1.0]}, "teacher_logprobs must be a tensor, got list"),
        ({"teacher_logprobs": S.clone().requires_grad_()}, "teacher_logprobs requires grad, and on_policy_loss has"),
        ({"teacher_logprobs": S, "weight": S.clone().requires_grad_()}, "weight requires grad"),
        ({"teacher_logprobs": S, "mask": S}, "mask must be torch.bool, got torch.float32"),
        ({"teacher_logprobs": S, "return_parts": 1}, "return_parts must be True or False"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        on_policy_loss(S.clone().requires_grad_(), **options)


def test_errors_of_the_helpers() -> None:
    for call, message in (
        (lambda: on_policy_loss(S[0], S[0], reduction="sequence_mean"), "reduction=sequence_mean needs"),
        (lambda: policy_advantages(S[0], S[0], position_gamma=0.5), "position_gamma=0.5 needs log-probabilities"),
        (lambda: policy_advantages(S[0], S[0], discount=0.5), "discount=0.5 needs log-probabilities"),
        (lambda: policy_advantages(S, S, discount=1.5), r"discount must be in \[0, 1\], got 1.5"),
        (lambda: policy_advantages(S, S[:1]), "sampled_logprobs must have the shape of teacher_logprobs"),
        (lambda: importance_weights(S[0], S[0], sequence_mask=(0.5, 2.0)), r"sequence_mask=\(0.5, 2.0\) needs"),
        (lambda: importance_weights(S, S, truncate=2.0, icepop=(0.5, 2.0)), "truncate and icepop must not both"),
        (lambda: importance_weights(S, S, icepop=(2.0, 0.5)), "icepop must have low < high"),
        (lambda: importance_weights(S, S, icepop=2.0), r"icepop must be two numbers \(low, high\), got 2.0"),
        (lambda: importance_weights(torch.tensor(-1.0), S), r"current_logprobs must be \[..., T\], got a scalar"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            call()  # type: ignore[no-untyped-call]


def test_values_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = S.clone()
    bad[1, 2] = 0.5  # a probability, or a logit
    on_policy_loss(bad, S)
    monkeypatch.setenv("FASTKD_CHECK", "1")
    mask = torch.ones(2, 3, dtype=torch.bool)
    for value in (0.5, math.nan, math.inf, -math.inf):
        bad[1, 2] = value
        for call in (
            lambda: on_policy_loss(bad, S, mask=mask),
            lambda: on_policy_loss(S, bad),
            lambda: policy_advantages(S, bad),
            lambda: importance_weights(S, bad),
        ):
            with pytest.raises(ValueError, match=r"at most 0, where mask is True; token \(1, 2\)"):
                call()
    on_policy_loss(S, bad, clamp=5.0)  # -inf
    mask[1, 2] = False
    on_policy_loss(bad, S, mask=mask)
