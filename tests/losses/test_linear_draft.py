"""fused_linear_draft_loss against draft_loss of logits in float64, which test_draft.py compares with formulas."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import LinearTeacher
from fastkd.backends import registry
from fastkd.engine import plan
from fastkd.response import draft_loss, fused_linear_draft_loss
from fastkd.response.draft import LOSSES

# 37 draft tokens of 90, an odd width; 10 rows make chunks of 3, 3, 3 and 1 at most.
ROWS, H, D, V, WIDTH = (2, 5), 16, 37, 90, 24
EVERY = {name: 0.5 + k for k, name in enumerate(LOSSES)}


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: LinearTeacher
    ids: Tensor | None

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in self[:3]]

    def target_logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        hidden, weight, bias = self.target.hidden, self.target.weight, self.target.bias
        assert bias is not None
        return hidden.to(dtype) @ weight.to(dtype).T + bias.to(dtype)


def problem(seed: int, dtype: torch.dtype = torch.float32, subset: bool = True) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*sizes, generator=generator)).to(dtype)

    width = V if subset else D
    teacher = LinearTeacher(normal(*ROWS, WIDTH), normal(width, WIDTH, scale=0.4), normal(width))
    ids = torch.randperm(V, generator=generator)[:D] if subset else None
    return Problem(normal(*ROWS, H), normal(D, H, scale=0.5), normal(D), teacher, ids)


def exactly(
    made: Problem, losses: Any, upstream: Tensor, **options: Any
) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
    """The loss, the parts and the gradients of draft_loss in float64."""
    hidden, weight, bias = leaves = made.leaves(torch.float64)
    loss, parts = draft_loss(
        hidden @ weight.T + bias, made.target_logits(), losses, draft_to_target=made.ids,
        return_parts=True, backend="reference", **options,
    )  # fmt: skip
    return loss.detach(), parts, torch.autograd.grad((loss * upstream).sum(), leaves)


def close(found: Any, wanted: Any, dtype: torch.dtype) -> None:
    """Compare (loss, parts, gradients); a gradient has one rounding to its dtype, and one after the upstream."""
    exact = {torch.float64: 1e-10}.get(dtype, 2e-5)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=exact, atol=exact)
    assert found[1].counted == wanted[1].counted
    for name in ("acceptance", *wanted[1].terms):
        mine, right = (
            parts.acceptance if name == "acceptance" else parts.terms[name]
            for parts in (found[1], wanted[1])
        )
        torch.testing.assert_close(mine.double(), right, rtol=exact, atol=exact)
    rounding = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps
    for gradient, right in zip(found[2], wanted[2], strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - right).norm() <= (exact + rounding) * right.norm()


@pytest.mark.pairwise(each="backend")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("subset", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_values_parts_and_gradients(
    backend: str, dtype: torch.dtype, subset: bool, linear: bool, reduction: str
) -> None:
    _check_values(backend, dtype, subset, linear, reduction)


@pytest.mark.only_where(lambda any_backend: any_backend == "triton")
@pytest.mark.parametrize(
    ("dtype", "subset", "linear", "reduction"),
    [
        (torch.bfloat16, True, False, "none"),
        (torch.float16, False, True, "mean"),
        (torch.float32, True, True, "sum"),
    ],
)
def test_values_in_triton(
    any_backend: str, dtype: torch.dtype, subset: bool, linear: bool, reduction: str
) -> None:
    _check_values(any_backend, dtype, subset, linear, reduction)


def _check_values(
    backend: str, dtype: torch.dtype, subset: bool, linear: bool, reduction: str
) -> None:
    if dtype == torch.float64:
        backend = "auto"  # the cpu backend has no float64
    made = problem(1, dtype, subset)
    if not linear:  # logits that are exact in the dtype
        logits = made.target_logits(torch.float32).to(dtype)
        made = made._replace(
            target=LinearTeacher(
                logits,
                torch.eye(logits.shape[-1]).to(dtype),
                torch.zeros(logits.shape[-1], dtype=dtype),
            )
        )
    generator = torch.Generator().manual_seed(2)
    options: dict[str, Any] = {
        "mask": torch.rand(ROWS, generator=generator) < 0.7,
        "weight": 0.5 + torch.rand(ROWS, generator=generator),
        "positions": torch.arange(5).expand(ROWS),
        "position_decay": 0.8, "eta": 2.0, "reduction": reduction,
    }  # fmt: skip
    upstream = torch.randn(ROWS, generator=generator) if reduction == "none" else torch.tensor(3.0)
    wanted = exactly(made, EVERY, upstream, **options)
    hidden, weight, bias = leaves = made.leaves()
    teacher: Any = made.target if linear else made.target.hidden
    for chunk_size in (3, None):
        loss, parts = fused_linear_draft_loss(
            hidden, weight, teacher, EVERY, student_bias=bias, draft_to_target=made.ids,
            chunk_size=chunk_size, return_parts=True, backend=backend, **options,
        )  # fmt: skip
        gradients = torch.autograd.grad((loss * upstream).sum(), leaves)
        close((loss.detach(), parts, gradients), wanted, dtype)


def test_the_backend_that_runs(monkeypatch: pytest.MonkeyPatch, any_backend: str) -> None:
    """The cpu backend and Triton compute all terms in one call per chunk; the other backends, each divergence."""
    kernels = registry.load(any_backend)
    name = "draft_rows" if any_backend in ("cpu", "triton") else "kd_rows"
    ran, real = [], getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *given: ran.append(given[0].shape[0]) or real(*given))
    made = problem(3)
    fused_linear_draft_loss(
        made.hidden, made.weight, made.target, draft_to_target=made.ids, chunk_size=4,
        backend=any_backend,
    )  # fmt: skip
    assert ran == [4, 4, 2]


@pytest.mark.heavy_with(any_backend="triton", hole=math.inf)
@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_dropped_rows_are_not_read(any_backend: str, hole: float) -> None:
    made = problem(4)
    mask = torch.rand(ROWS, generator=torch.Generator().manual_seed(5)) < 0.6
    made.hidden[~mask], made.target.hidden[~mask] = hole, hole
    hidden, weight, bias = leaves = made.leaves()
    loss = fused_linear_draft_loss(
        hidden, weight, made.target, EVERY, student_bias=bias, draft_to_target=made.ids, mask=mask,
        chunk_size=2, backend=any_backend,
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, leaves)
    assert loss.isfinite() and all(x.isfinite().all() for x in gradients)
    assert not gradients[0][~mask].any() and gradients[0][mask].any()


def test_frozen_parts_and_no_row() -> None:
    made = problem(6)
    options: dict[str, Any] = {"draft_to_target": made.ids, "chunk_size": 4}
    full = made.leaves()
    loss = fused_linear_draft_loss(full[0], full[1], made.target, EVERY, **options)
    wanted = torch.autograd.grad(loss, full[:2])
    for trained in (0, 1):
        leaves = [x.detach().requires_grad_(k == trained) for k, x in enumerate(full[:2])]
        alone = fused_linear_draft_loss(*leaves, made.target, EVERY, **options)
        torch.testing.assert_close(torch.autograd.grad(alone, leaves[trained])[0], wanted[trained])
    with torch.no_grad():
        assert not fused_linear_draft_loss(*full[:2], made.target, EVERY, **options).requires_grad
    nothing = torch.zeros(ROWS, dtype=torch.bool)
    loss = fused_linear_draft_loss(*full[:2], made.target, EVERY, mask=nothing, **options)
    assert loss == 0
    assert not any(x.any() for x in torch.autograd.grad(loss, full[:2]))


def test_gradcheck() -> None:
    made = problem(7, torch.float64)
    losses = {"forward_kl": 0.5, "reverse_kl": 0.3, "jsd": 0.4, "cross_entropy": 0.2}

    def loss_of(*leaves: Tensor) -> Tensor:
        return fused_linear_draft_loss(
            leaves[0], leaves[1], made.target, losses, student_bias=leaves[2],
            draft_to_target=made.ids, chunk_size=4,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss_of, tuple(made.leaves()), fast_mode=True)


def test_under_autocast() -> None:
    made = problem(8)
    teacher = made.target
    leaves = made.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_linear_draft_loss(
            leaves[0], leaves[1], teacher, "tvd", student_bias=leaves[2], draft_to_target=made.ids
        )
    gradients = torch.autograd.grad(loss, leaves)
    low = [x.detach().bfloat16().requires_grad_() for x in leaves]
    assert teacher.bias is not None
    cast = LinearTeacher(
        teacher.hidden.bfloat16(), teacher.weight.bfloat16(), teacher.bias.bfloat16()
    )
    wanted = fused_linear_draft_loss(
        low[0], low[1], cast, "tvd", student_bias=low[2], draft_to_target=made.ids
    )
    assert torch.equal(loss, wanted)
    for mine, right in zip(gradients, torch.autograd.grad(wanted, low), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, right.float())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled(dtype: torch.dtype, reduction: str) -> None:
    made = problem(9, dtype)
    upstream = torch.randn(ROWS) if reduction == "none" else torch.tensor(1.0)

    def call(number: float, *leaves: Tensor) -> tuple[Tensor, ...]:
        loss, parts = fused_linear_draft_loss(
            leaves[0], leaves[1], made.target, {"tvd": number, "forward_kl": 2.0}, student_bias=leaves[2],
            draft_to_target=made.ids, eta=number, reduction=reduction, chunk_size=3, return_parts=True,
        )  # fmt: skip
        return loss, parts.acceptance, *parts.terms.values(), parts.counted

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for number in (2.0, 0.5):
        results = []
        for function in (compiled, call):
            leaves = made.leaves()
            loss, *parts = function(number, *leaves)
            gradients = torch.autograd.grad((loss * upstream).sum(), leaves)
            results.append([loss.detach(), *parts, *gradients])
        torch.testing.assert_close(results[0], results[1])


def test_micro_batches_add_up() -> None:
    made = problem(10)
    mask = torch.rand(ROWS, generator=torch.Generator().manual_seed(11)) < 0.7
    options: dict[str, Any] = {"draft_to_target": made.ids, "num_items": mask.sum()}
    leaves = made.leaves()
    whole = fused_linear_draft_loss(*leaves[:2], made.target, EVERY, mask=mask, **options)
    wanted = torch.autograd.grad(whole, leaves[:2])
    total, sums = torch.zeros(()), [torch.zeros_like(x) for x in leaves[:2]]
    for row in range(ROWS[0]):
        part = LinearTeacher(made.target.hidden[row], made.target.weight, made.target.bias)
        loss = fused_linear_draft_loss(
            leaves[0][row], leaves[1], part, EVERY, mask=mask[row], **options
        )
        total += loss.detach()
        for added, gradient in zip(sums, torch.autograd.grad(loss, leaves[:2]), strict=True):
            added += gradient
    torch.testing.assert_close([total, *sums], [whole.detach(), *wanted], rtol=1e-5, atol=1e-6)


def test_strides_and_negated_views() -> None:
    made = problem(12)
    options: dict[str, Any] = {"draft_to_target": made.ids, "reduction": "none"}
    wanted = fused_linear_draft_loss(made.hidden, made.weight, made.target, EVERY, **options)
    wide = torch.randn(*ROWS, 2 * H)
    wide[..., ::2] = made.hidden
    negated = torch.complex(torch.zeros(D, H), -made.weight).conj().imag
    assert negated.is_neg()
    with torch.inference_mode():
        hidden = made.hidden.clone()
    for given in ((wide[..., ::2], made.weight), (made.hidden, negated), (hidden, made.weight)):
        found = fused_linear_draft_loss(*given, made.target, EVERY, **options)
        torch.testing.assert_close(found, wanted)


def test_the_plan_counts_both_vocabularies() -> None:
    shape: dict[str, Any] = {
        "teacher": "linear",
        "teacher_vocab_size": 128_256,
        "teacher_hidden_size": 4096,
    }
    found = fastkd.memory_plan(4096, 32_000, 1024, dtype=torch.bfloat16, **shape)
    row = 4 * (32_000 + 128_256)
    assert found.logits == found.chunk_size * row and found.chunks > 1
    assert found.peak <= plan.LINEAR_BUDGET.cpu + found.accumulator
    with pytest.raises(ValueError, match="teacher_vocab_size must be positive, got 0"):
        fastkd.memory_plan(8, 8, 8, teacher_vocab_size=0)
    made = problem(13)
    with pytest.raises(
        ValueError, match="memory_budget must be at least .* bytes, which one row takes"
    ):
        fused_linear_draft_loss(
            made.hidden, made.weight, made.target, draft_to_target=made.ids, memory_budget=10
        )


def test_errors_name_the_argument() -> None:
    made = problem(14)
    assert made.ids is not None
    subset = {"draft_to_target": made.ids}
    heads: list[tuple[dict[str, Any], str]] = [
        ({}, "student_weight has 37 rows, and teacher has 90 columns; pass draft_to_target"),
        ({"draft_to_target": made.ids[1:]}, r"draft_to_target must be \[37\], .* for each row of student_weight"),
        (subset | {"student_bias": torch.zeros(3)}, r"student_bias must be \[37\]"),
        (subset | {"chunk_size": 0}, "chunk_size must be positive, got 0"),
        (subset | {"positions": torch.ones(5)}, "positions must be torch.int64"),
        (subset | {"backend": "none"}, "backend must be"),
        (subset | {"losses": {"tvd": 0.0}}, "losses must have a weight that is not 0"),
        (subset | {"losses": "kl"}, "losses must be one of"),
        (subset | {"process_group": 1}, "process_group must be a torch.distributed.ProcessGroup"),
    ]  # fmt: skip
    for options, message in heads:
        with pytest.raises((TypeError, ValueError, fastkd.BackendUnavailable), match=message):
            fused_linear_draft_loss(made.hidden, made.weight, made.target, **options)
    with pytest.raises(ValueError, match=r"student_weight must be \[V, 16\]"):
        fused_linear_draft_loss(made.hidden, made.weight[:, 1:], made.target, **subset)
    with pytest.raises(TypeError, match="teacher must be logits or a LinearTeacher, got TopK"):
        topk = fastkd.TopK(torch.zeros(*ROWS, 1, dtype=torch.int64), torch.zeros(*ROWS, 1))
        fused_linear_draft_loss(made.hidden, made.weight, topk)  # type: ignore[call-overload]
    logits = made.target_logits(torch.float32).requires_grad_()
    with pytest.raises(
        ValueError, match="teacher requires grad, and fused_linear_draft_loss has no"
    ):
        fused_linear_draft_loss(made.hidden, made.weight, logits, **subset)
    wrong = fused_linear_draft_loss(
        made.hidden, made.weight, made.target, draft_to_target=made.ids - 1000
    )
    assert wrong.isnan()
