"""fastkd.compat.liger against Liger itself: its Triton kernels in the interpreter, its chunked losses on the CPU."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import liger_kernel.ops.kl_div
import liger_kernel.ops.tvd
import numpy as np
import pytest
import torch
from liger_kernel import chunked_loss, ops
from liger_kernel import transformers as liger
from support.beside_peers import compare, error, float64, run
from support.paths import DATA
from support.processes import Processes
from torch import Tensor

from fastkd.compat import liger as ours

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs Liger in Triton's interpreter"),
]
IGNORED = -100


class _Scalar(float):
    """A kernel's scalar that can be cast, as the interpreter's cannot."""

    def to(self, dtype: object) -> _Scalar:
        return self


class _Castable:
    """A kernel whose floats are such scalars."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> Any:
            cast = [_Scalar(x) if type(x) is float else x for x in args]
            named = {k: _Scalar(x) if type(x) is float else x for k, x in kwargs.items()}
            return self.kernel[grid](*cast, **named)

        return launch


@pytest.fixture(autouse=True)
def castable(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (liger_kernel.ops.kl_div, "_kldiv_kernel_forward"),
        (liger_kernel.ops.tvd, "_tv_distance_kernel"),
    ):
        monkeypatch.setattr(module, name, _Castable(getattr(module, name)))


def rows(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(student, teacher, labels) of logits: small random ones, and real ones of a language model."""
    if name == "random":  # 37: not a power of two, so that a kernel's block is partly filled
        generator = torch.Generator().manual_seed(0)
        student, teacher = 3 * torch.randn(2, 6, 37, generator=generator)
    else:
        with np.load(DATA / "smollm2.npz") as file:
            student, teacher = (
                torch.from_numpy(file[x])[:4].float() for x in ("student", "teacher")
            )
    labels = teacher.argmax(-1)
    labels[2] = IGNORED
    return student, teacher, labels


both = pytest.mark.parametrize("name", ["random", "real"])


# ---- of log-probabilities and probabilities


def jsd(log_q: Tensor, log_p: Tensor, labels: Tensor | None, beta: float) -> Tensor:
    """The published formula for the given arguments."""
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        terms = p * (log_p - log_q)
    elif beta == 1:
        terms = q * (log_q - log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        terms = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
    per_row = terms.sum(-1)
    return per_row.mean() if labels is None else per_row[labels != IGNORED].mean()


@both
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd(name: str, beta: float) -> None:
    student, teacher, labels = rows(name)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    for inputs in (labels, None):
        exact = run(jsd, float64(log_q), log_p.double(), inputs, beta)
        reference = run(liger.LigerJSD(beta), [log_q], log_p, inputs)
        compare(run(ours.LigerJSD(beta), [log_q], log_p, inputs), reference, exact)


def test_gradient_by_log_probabilities_reaches_the_logits() -> None:
    """The gradient by log-probabilities, propagated by autograd to the logits, equals that of the fused loss."""
    import fastkd

    student, teacher, labels = rows("random")

    def composed(logits: Tensor) -> Tensor:
        return ours.LigerJSD(0.3)(logits.log_softmax(-1), teacher.log_softmax(-1), labels)

    def fused(logits: Tensor) -> Tensor:
        return fastkd.kd_loss(logits, teacher, labels, divergence=fastkd.jsd(0.3))

    def formula(logits: Tensor) -> Tensor:
        return jsd(logits.log_softmax(-1), teacher.double().log_softmax(-1), labels, 0.3)

    exact = run(formula, float64(student))
    compare(run(composed, [student]), run(fused, [student]), exact)
    # the gradient by the log-probabilities themselves differs: it has no softmax in it
    plain = run(ours.LigerJSD(0.3), [student.log_softmax(-1)], teacher.log_softmax(-1), labels)
    assert error(plain.gradients[0], exact.gradients[0]) > 0.1


def kl(log_q: Tensor, target: Tensor, log_target: bool, reduction: str, eps: float) -> Tensor:
    p, log_p = (target.exp(), target) if log_target else (target, target.clamp(min=eps).log())
    terms = p * (log_p - log_q)
    if reduction == "none":
        return terms
    size = {"sum": 1, "batchmean": len(target), "mean": target.numel()}[reduction]
    return terms.sum() / size


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div(log_target: bool, reduction: str) -> None:
    for name in ("random", "real") if reduction == "batchmean" else ("random",):
        student, teacher, _ = rows(name)
        log_q, target = student.log_softmax(-1), teacher.log_softmax(-1)
        if not log_target:
            target = target.exp()
        options = {"reduction": reduction, "log_target": log_target, "eps": 1e-3}
        exact = run(kl, float64(log_q), target.double(), log_target, reduction, 1e-3)
        reference = run(liger.LigerKLDIVLoss(**options), [log_q], target)
        compare(run(ours.LigerKLDIVLoss(**options), [log_q], target), reference, exact)
    assert ours.LigerKLDIVLoss().reduction == liger.LigerKLDIVLoss().reduction == "mean"


def tvd(p: Tensor, q: Tensor, labels: Tensor | None, reduction: str) -> Tensor:
    terms = 0.5 * (p - q).abs()
    kept = torch.ones(len(p), dtype=torch.bool) if labels is None else labels != IGNORED
    if reduction == "none":
        return terms * kept.unsqueeze(-1)
    size = {"sum": 1, "batchmean": kept.sum(), "mean": kept.sum() * p.shape[-1]}[reduction]
    return terms[kept].sum() / size


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
def test_tvd(reduction: str) -> None:
    for name in ("random", "real") if reduction == "batchmean" else ("random",):
        student, teacher, labels = rows(name)
        p, q = student.softmax(-1), teacher.softmax(-1)
        p[0] = q[0]  # the subgradient is 0
        for inputs in (labels, None):
            exact = run(tvd, float64(p), q.double(), inputs, reduction)
            reference = run(liger.LigerTVDLoss(reduction), [p], q, inputs)
            compare(run(ours.LigerTVDLoss(reduction), [p], q, inputs), reference, exact)


def ce_and_tvd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    cross_entropy = torch.nn.functional.cross_entropy(
        student, labels, reduction="none", ignore_index=IGNORED
    )
    distance = 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
    return torch.stack([cross_entropy, distance * (labels != IGNORED)])


def stacked(loss: Any) -> Any:
    """The loss with its two results as one, so that each gets an upstream gradient of its own."""
    return lambda *inputs: torch.stack(loss(*inputs))


@both
def test_ce_and_tvd(name: str) -> None:
    student, teacher, labels = rows(name)
    exact = run(ce_and_tvd, float64(student), teacher.double(), labels)
    reference = run(stacked(liger.LigerFusedCETVDLoss(IGNORED)), [student], teacher, labels)
    actual = run(stacked(ours.LigerFusedCETVDLoss(IGNORED)), [student], teacher, labels)
    compare(actual, reference, exact)
    assert not actual.loss[:, 2].any() and not actual.gradients[0][2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ce_and_tvd_one_at_a_time(dtype: torch.dtype) -> None:
    """A gradient of one term alone, in low precision; ignored rows may hold NaN in logits and upstream gradient."""
    student, teacher, labels = rows("random")
    student, teacher = student.to(dtype), teacher.to(dtype)
    dropped = labels == IGNORED
    for index in (0, 1):
        exact_leaf = student.double().requires_grad_()
        exact_value = ce_and_tvd(exact_leaf, teacher.double(), labels)[index]
        leaf = student.masked_fill(dropped[:, None], math.nan).requires_grad_()
        value = ours.LigerFusedCETVDLoss()(leaf, teacher, labels)[index]
        assert value.dtype == torch.float32
        upstream = torch.linspace(-2.0, 1.5, len(labels)).masked_fill(dropped, math.nan)
        (gradient,) = torch.autograd.grad(value, leaf, upstream)
        weights = upstream.masked_fill(dropped, 0.0).double()
        (exact,) = torch.autograd.grad(exact_value, exact_leaf, weights)
        assert gradient.dtype == dtype and not gradient[dropped].any()
        assert error(gradient, exact) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("label", [-1, 10**6])
def test_ce_of_an_invalid_label_is_nan(label: int) -> None:
    """Like its gradient, and like kd_loss. The distance does not depend on the label."""
    student, teacher, labels = rows("random")
    leaf = student.clone().requires_grad_()
    wrong = labels.clone()
    wrong[0] = label
    assert labels[0] != IGNORED
    cross_entropy, distance = ours.LigerFusedCETVDLoss()(leaf, teacher, wrong)
    right, same = ours.LigerFusedCETVDLoss()(leaf, teacher, labels)
    assert cross_entropy[0].isnan()
    assert torch.equal(cross_entropy[1:], right[1:])
    assert torch.equal(distance, same)
    (gradient,) = torch.autograd.grad(cross_entropy.sum(), leaf)
    assert gradient[0].isnan().all() and not gradient[1:].isnan().any()


def test_ce_and_tvd_is_a_loss_of_logits_and_holds_no_gradient() -> None:
    student, teacher, labels = rows("random")
    leaf = student.clone().requires_grad_()
    cross_entropy, distance = ours.LigerFusedCETVDLoss()(leaf, teacher, labels)
    loss = (0.3 * cross_entropy + 0.7 * distance).sum() / 5
    once = torch.autograd.grad(loss, leaf, retain_graph=True)
    twice = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(once[0], twice[0])
    import fastkd

    other = student.clone().requires_grad_()
    fused = fastkd.kd_loss(other, teacher, labels, divergence="tvd", alpha=0.7)
    torch.testing.assert_close(fused, loss)
    torch.testing.assert_close(torch.autograd.grad(fused, other), once)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()
    saved = cross_entropy.grad_fn.saved_tensors
    assert {x.data_ptr() for x in saved} <= {x.data_ptr() for x in (leaf, teacher, labels)}


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_in_triton(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The definitions compile in Triton, which GPUs use instead of the reference."""
    monkeypatch.setenv("FASTKD_BACKEND", "triton")
    student, teacher, labels = rows("random")
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    exact = run(jsd, float64(log_q), log_p.double(), labels, beta)
    actual = run(ours.LigerJSD(beta), [log_q], log_p, labels)
    compare(actual, actual, exact, same=16 * 1.2e-7)
    exact = run(tvd, float64(log_q.exp()), log_p.double().exp(), labels, "batchmean")
    actual = run(ours.LigerTVDLoss(), [log_q.exp()], log_p.exp(), labels)
    compare(actual, actual, exact, same=16 * 1.2e-7)


def test_columns_that_are_impossible_on_both_sides() -> None:
    """Liger gives NaN; the exact value ignores these columns."""
    student, teacher, labels = rows("random")
    student[:, 5] = teacher[:, 5] = -math.inf
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    kept = torch.arange(37) != 5
    exact = run(jsd, float64(log_q[:, kept]), log_p[:, kept].double(), labels, 0.3)
    reference = run(liger.LigerJSD(0.3), [log_q], log_p, labels)
    actual = run(ours.LigerJSD(0.3), [log_q], log_p, labels)
    assert reference.loss.isnan()
    assert error(actual.loss, exact.loss) < 1e-6
    assert error(actual.gradients[0][:, kept], exact.gradients[0]) < 1e-6
    assert actual.gradients[0][:, 5].eq(0).all()
    for reduction in ("none", "batchmean"):
        for inputs in (log_p, log_p.exp()):
            loss = ours.LigerKLDIVLoss(reduction=reduction, log_target=inputs is log_p)
            assert loss(log_q, inputs).isfinite().all()


@pytest.mark.parametrize(
    ("loss", "theirs"),
    [(ours.LigerJSD(0.3), liger.LigerJSD(0.3)), (ours.LigerTVDLoss(), liger.LigerTVDLoss())],
    ids=["jsd", "tvd"],
)
def test_a_batch_without_a_counted_row_has_loss_0(loss: Any, theirs: Any) -> None:
    student, teacher, labels = rows("random")
    inputs = [
        x.softmax(-1) if "tvd" in str(type(loss)).lower() else x.log_softmax(-1)
        for x in (student, teacher)
    ]
    actual = run(loss, inputs[:1], inputs[1], torch.full_like(labels, IGNORED))
    assert actual.loss == 0
    assert actual.gradients[0].eq(0).all()


# ---- from hidden states


class Models(dict[str, Tensor]):
    """Hidden states, heads and biases of a student and a wider teacher."""

    def __init__(self, dtype: torch.dtype = torch.float32, more: int = 0) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator)).to(dtype)

        super().__init__(
            hidden=normal(9, 16),
            head=normal(53, 16, scale=0.4),
            teacher_hidden=normal(9, 24),
            teacher_head=normal(53 + more, 24, scale=0.4),
            labels=torch.tensor([1, 2, IGNORED, 4, 5, 52, 0, IGNORED, 8]),
            bias=normal(53),
            teacher_bias=normal(53 + more),
        )

    def student(self, bias: bool = False) -> list[Tensor]:
        return [self["hidden"], self["head"], *([self["bias"]] if bias else [])]


def linear(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    hard: float = 0.5,
    soft: float = 0.5,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """The objective from logits computed in float64."""
    s = torch.nn.functional.linear(hidden, head, bias)
    t = torch.nn.functional.linear(
        teacher_hidden.double(),
        teacher_head[: len(head)].double(),
        None if teacher_bias is None else teacher_bias[: len(head)].double(),
    )
    logs = [(x / temperature).log_softmax(-1) for x in (s, t)]
    cross = torch.nn.functional.cross_entropy(s, labels, ignore_index=IGNORED)
    return hard * cross + soft * jsd(*logs, labels, beta)


CASES = {
    "defaults": {},
    "jsd alone": {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.3, "temperature": 2.0},
    "cross-entropy alone": {"weight_hard_loss": 0.7, "weight_soft_loss": 0.0},
    "weights beyond 1": {"weight_hard_loss": 0.4, "weight_soft_loss": 3.0, "beta": 0.0},
    "reverse, in chunks": {"beta": 1.0, "temperature": 0.7, "chunk_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_fused_linear_jsd_loss(case: str, bias: bool) -> None:
    models, options = Models(), CASES[case]
    names = ["teacher_hidden", "teacher_head", "labels"]

    def call(loss: Any) -> Any:
        def called(hidden: Tensor, head: Tensor, *student_bias: Tensor) -> Tensor:
            biases = (*student_bias, models["teacher_bias"]) if bias else ()
            return loss(hidden, head, *(models[name] for name in names), *biases)

        return called

    def exact(*args: Tensor) -> Tensor:
        translated = {
            {"weight_hard_loss": "hard", "weight_soft_loss": "soft"}.get(k, k): v
            for k, v in options.items()
            if k != "chunk_size"
        }
        return linear(*args, **translated)

    student = models.student(bias)
    truth = run(call(exact), float64(*student))
    reference = run(call(chunked_loss.LigerFusedLinearJSDLoss(compiled=False, **options)), student)
    compare(run(call(ours.LigerFusedLinearJSDLoss(**options)), student), reference, truth)


@pytest.mark.parametrize("case", CASES)
def test_soft_and_hard_loss(case: str) -> None:
    models = Models()
    inputs = [models[x] for x in ("hidden", "head", "teacher_hidden", "teacher_head", "labels")]
    options = {**CASES[case], "return_soft_hard_loss": True, "compiled": False}
    reference = chunked_loss.LigerFusedLinearJSDLoss(**options)(*inputs)
    actual = ours.LigerFusedLinearJSDLoss(**options)(*inputs)
    assert len(actual) == 3
    torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.0, 2.0), (1.0, 1.0)])
def test_fused_linear_jsd(beta: float, temperature: float, labelled: bool) -> None:
    models = Models()
    labels = models["labels"] if labelled else None
    teacher = (models["teacher_hidden"], models["teacher_head"])
    options = {"beta": beta, "temperature": temperature, "hard": 0.0, "soft": 1.0}

    def exact(*args: Any) -> Tensor:
        # without labels every row counts; label 0 then has a cross-entropy of weight 0
        inputs = torch.zeros(9, dtype=torch.int64) if args[-1] is None else args[-1]
        return linear(*args[:-1], inputs, **options)

    truth = run(exact, float64(*models.student()), *teacher, labels)
    reference = run(
        liger.LigerFusedLinearJSD(beta, IGNORED, temperature), models.student(), *teacher, labels
    )
    actual = run(
        ours.LigerFusedLinearJSD(beta, IGNORED, temperature), models.student(), *teacher, labels
    )
    compare(actual, reference, truth)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_fused_linear_kl_div(reduction: str) -> None:
    models = Models()
    target = (models["teacher_hidden"] @ models["teacher_head"].T).softmax(-1)
    labels, temperature = models["labels"], 2.0

    def exact(hidden: Tensor, head: Tensor) -> Tensor:
        kept = labels != IGNORED
        log_q = (hidden @ head.T / temperature).log_softmax(-1)[kept]
        return kl(log_q, target[kept].double(), False, reduction, 1e-10)

    truth = run(exact, float64(*models.student()))
    options = {"reduction": reduction, "temperature": temperature}
    reference = run(liger.LigerFusedLinearKLDivLoss(**options), models.student(), target, labels)
    actual = run(ours.LigerFusedLinearKLDivLoss(**options), models.student(), target, labels)
    compare(actual, reference, truth)


# ---- where Liger is wrong


def test_low_precision() -> None:
    """Logits and log-probabilities rounded to bfloat16 cost Liger's JSD two digits, and its sign."""
    models = Models(torch.bfloat16)
    for name in ("hidden", "head"):  # a student near its teacher, as after some training
        models["teacher_" + name] = models[name] + 0.01 * torch.randn_like(models[name])
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}
    inputs = [models[x] for x in ("teacher_hidden", "teacher_head", "labels")]
    truth = run(lambda *x: linear(*x, hard=0.0, soft=1.0), float64(*models.student()), *inputs)
    reference = run(
        chunked_loss.LigerFusedLinearJSDLoss(compiled=False, **options), models.student(), *inputs
    )
    actual = run(ours.LigerFusedLinearJSDLoss(**options), models.student(), *inputs)
    assert error(reference.loss, truth.loss) > 0.1
    assert error(actual.loss, truth.loss) < 1e-4
    for value, original, exact in zip(
        actual.gradients, reference.gradients, truth.gradients, strict=True
    ):
        assert error(original, exact) > 0.05
        assert (
            error(value, exact) < 0.01
        )  # one rounding of the gradient to bfloat16, and of its operands


def test_low_precision_log_probabilities() -> None:
    """Liger rounds the loss to their dtype."""
    student, teacher, labels = rows("random")
    log_q, log_p = (x.log_softmax(-1).bfloat16() for x in (student, teacher))
    truth = run(jsd, float64(log_q), log_p.double(), labels, 0.3)
    reference = run(liger.LigerJSD(0.3), [log_q], log_p, labels)
    actual = run(ours.LigerJSD(0.3), [log_q], log_p, labels)
    assert reference.loss.dtype == actual.gradients[0].dtype == torch.bfloat16
    assert error(reference.loss, truth.loss) > 1e-4 > 1e-6 > error(actual.loss, truth.loss)
    assert error(actual.gradients[0], truth.gradients[0]) < 2**-8


def test_the_teacher_is_a_constant() -> None:
    """The teacher gets no gradient even if its head requires grad, as in Liger."""
    models = Models()
    for name in ("teacher_hidden", "teacher_head"):
        models[name].requires_grad_()
    inputs = [models[x] for x in ("teacher_hidden", "teacher_head", "labels")]
    for loss in (ours.LigerFusedLinearJSDLoss(), ours.LigerFusedLinearJSD()):
        run(loss, models.student(), *inputs)[0]
        assert models["teacher_head"].grad is None
    student, teacher, _ = (
        x.double().softmax(-1) if x.is_floating_point() else x for x in rows("random")
    )
    for loss in (
        ours.LigerTVDLoss(),
        ours.LigerTVDLoss("none"),
        ours.LigerKLDIVLoss(),
        ours.LigerJSD(),
    ):
        value = loss(student, teacher.requires_grad_())
        assert not value.requires_grad


def test_padding_columns_of_the_teacher() -> None:
    """Liger pads the student with logits of 0, which take probability."""
    models = Models(more=11)
    models["hidden"] = models["hidden"] - 3.0  # so that most logits are below 0
    inputs = [models[x] for x in ("teacher_hidden", "teacher_head", "labels")]
    truth = run(linear, float64(*models.student()), *inputs)
    reference = run(chunked_loss.LigerFusedLinearJSDLoss(compiled=False), models.student(), *inputs)
    actual = run(ours.LigerFusedLinearJSDLoss(), models.student(), *inputs)
    assert error(reference.loss, truth.loss) > 1e-3
    compare(actual, actual, truth, same=1e-5)


def test_second_backward() -> None:
    """A second backward is right, although Liger's Triton losses scale the saved gradient in place."""
    models = Models()
    hidden = models["hidden"].clone().requires_grad_()
    inputs = [models[x] for x in ("head", "teacher_hidden", "teacher_head", "labels")]
    for loss, same in ((liger.LigerFusedLinearJSD(), False), (ours.LigerFusedLinearJSD(), True)):
        doubled = 2.0 * loss(hidden, *inputs)
        first, second = (
            torch.autograd.grad(doubled, hidden, retain_graph=True)[0].clone() for _ in range(2)
        )
        assert torch.equal(first, second) is same


# ---- the surface


@pytest.mark.parametrize(
    "theirs",
    [
        chunked_loss.LigerFusedLinearJSDLoss,
        liger.LigerFusedLinearJSD,
        liger.LigerJSD,
        liger.LigerKLDIVLoss,
        liger.LigerTVDLoss,
        liger.LigerFusedCETVDLoss,
        liger.LigerFusedLinearKLDivLoss,
    ],
    ids=lambda loss: loss.__name__,
)
def test_signatures(theirs: Any) -> None:
    replacement = getattr(ours, theirs.__name__)
    for method in ("__init__", "forward"):
        expected, actual = (inspect.signature(getattr(x, method)) for x in (theirs, replacement))
        assert [(p.name, p.default, p.kind) for p in actual.parameters.values()] == [
            (p.name, p.default, p.kind) for p in expected.parameters.values()
        ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ours.LigerJSD(1.5), r"beta must be in \[0, 1\], got 1.5"),
        (lambda: ours.LigerTVDLoss("none?"), "reduction must be one of none, sum"),
        (lambda: ours.LigerKLDIVLoss(reduction="max"), "reduction must be one of none, sum"),
        (lambda: ours.LigerFusedLinearKLDivLoss("none"), "reduction must be one of batchmean"),
        (lambda: ours.LigerFusedLinearJSDLoss(0.0, 0.0), "must not both be 0"),
        (lambda: ours.LigerFusedLinearJSDLoss(-1.0), r"weight_hard_loss must be in \[0, inf\)"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- log-probabilities from hidden states


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("selected", [None, (3, 17, 3, 0)])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_scaled_cross_entropy(
    entropy: bool, selected: tuple[int, ...] | None, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 8, generator=generator, requires_grad=True)
    weight = torch.randn(29, 8, generator=generator, requires_grad=True)
    target = torch.randint(29, (11,), generator=generator)
    target[2:5] = -100
    ids = None if selected is None else torch.tensor(selected)
    outcomes = []
    for module in (ops, ours):
        function = module.LigerFusedLinearScaledCrossEntropyFunction
        outputs = function.apply(hidden, weight, target, temperature, -100, 1, entropy, ids)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        draws = torch.Generator().manual_seed(1)
        total = sum((x * torch.randn(x.shape, generator=draws)).sum() for x in outputs)
        outcomes.append([*outputs, *torch.autograd.grad(total, (hidden, weight))])
    assert len(outcomes[0]) == 3 + entropy + (ids is not None)
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)
    assert all(not x[2:5].any() for x in outcomes[1][:-1])


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(2)
    yield pool
    pool.stop()


def scaled_in_parts(group: Any) -> list[Tensor]:
    """Loss, entropy and gradients of a process; without a group, Liger's for the whole vocabulary."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 8, generator=generator, requires_grad=True)
    weight = torch.randn(32, 8, generator=generator).tensor_split(size)[rank]
    weight = weight.clone().requires_grad_()
    target = torch.randint(32, (11,), generator=generator)
    target[2:5] = -100
    if group is None:
        function = ops.LigerFusedLinearScaledCrossEntropyFunction
        loss, entropy = function.apply(hidden, weight, target, 1.7, -100, 1, True)
    else:
        in_parts = ours.LigerFusedLinearScaledCrossEntropyTPFunction
        loss, entropy = in_parts.apply(hidden, weight, target, group, 1.7, -100, 1, True)  # type: ignore[misc]
    total = loss.sum() - 0.3 * entropy.sum()
    return [loss.detach(), entropy.detach(), *torch.autograd.grad(total, (hidden, weight))]


def test_scaled_cross_entropy_of_parts_of_the_vocabulary(processes: Processes) -> None:
    """Liger's own function for parts of a vocabulary runs on GPUs only."""
    *expected, of_weight = scaled_in_parts(None)
    for found, part in zip(
        processes.run(2, scaled_in_parts), of_weight.tensor_split(2), strict=True
    ):
        torch.testing.assert_close(found, [*expected, part], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Function", "TPFunction"])
def test_signatures_of_scaled_cross_entropies(name: str) -> None:
    expected, actual = (
        inspect.signature(getattr(module, f"LigerFusedLinearScaledCrossEntropy{name}").apply)
        for module in (ops, ours)
    )
    assert [(p.name, p.default) for p in actual.parameters.values()] == [
        (p.name, p.default) for p in expected.parameters.values()
    ]
