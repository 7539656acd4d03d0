"""fastkd.compat.modelopt against Model-Optimizer itself; over processes: tests/compat/test_compat_megatron.py."""

from __future__ import annotations

import inspect
import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.beside_peers import compare, error, float64, run
from test_docs import ROOT, blocks
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what else it could use
    import modelopt.torch.distill as mtd
    from modelopt.torch.distill.plugins import megatron as plugin

from support.paths import DATA

from fastkd.compat import modelopt as ours

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")


def logits(kind: str = "random") -> tuple[Tensor, Tensor]:
    """Random logits [3, 2, 37], where neither leading dimension is the number of rows, or real ones [4, 49152]."""
    if kind == "random":
        generator = torch.Generator().manual_seed(0)
        student, teacher = 3 * torch.randn(2, 3, 2, 37, generator=generator)
        return student, teacher
    with np.load(DATA / "smollm2.npz") as file:
        student, teacher = (torch.from_numpy(file[x])[:4].float() for x in ("student", "teacher"))
    return student, teacher


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, reverse: bool = False) -> Tensor:
    """KL per row [...], without T^2."""
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    if reverse:
        log_q, log_p = log_p, log_q
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reduced(per_row: Tensor, reduction: str, columns: int) -> Tensor:
    size = {"mean": per_row.numel() * columns, "batchmean": len(per_row), "sum": 1, "none": 1}
    return (per_row if reduction == "none" else per_row.sum()) / size[reduction]


@pytest.mark.parametrize("kind", ["random", "real"])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_logits_distillation_loss(reduction: str, kind: str) -> None:
    student, teacher = logits(kind)

    def formula(s: Tensor, t: Tensor) -> Tensor:
        return reduced(4.0 * kl(s, t, 2.0), reduction, s.shape[-1])

    exact = run(formula, float64(student), teacher.double())
    reference = run(mtd.LogitsDistillationLoss(2.0, reduction), [student], teacher)
    compare(run(ours.LogitsDistillationLoss(2.0, reduction), [student], teacher), reference, exact)


def test_default_divides_by_the_vocabulary() -> None:
    student, teacher = logits()
    loss = ours.LogitsDistillationLoss()(student, teacher)
    assert float(loss) == pytest.approx(float(kl(student, teacher).mean()) / 37, rel=1e-5)


def test_low_precision() -> None:
    """Model-Optimizer rounds log-probabilities to bfloat16, which shows for a student near its teacher."""
    torch.manual_seed(0)  # on other inputs, the error of the loss can be smaller by chance
    student = logits()[0].bfloat16()
    teacher = student + (0.05 * torch.randn(student.shape)).bfloat16()
    exact = run(lambda s, t: kl(s, t).sum(), float64(student), teacher.double())
    reference = run(mtd.LogitsDistillationLoss(reduction="sum"), [student], teacher)
    actual = run(ours.LogitsDistillationLoss(reduction="sum"), [student], teacher)
    assert error(reference.loss, exact.loss) > 0.02
    assert error(reference.gradients[0], exact.gradients[0]) > 0.02
    assert error(actual.loss, exact.loss) < 1e-4
    assert error(actual.gradients[0], exact.gradients[0]) < 2**-8


def test_the_teacher_is_a_constant() -> None:
    student, teacher = logits()
    teacher.requires_grad_()
    labels = torch.zeros(6, dtype=torch.int64)
    for loss in (
        ours.LogitsDistillationLoss()(student, teacher),
        ours.MFTLoss()(student, teacher, labels),
        ours.LogitsKLLoss(CONFIG)(student, teacher)[0],
        ours.TopKLogitsKLLoss(CONFIG, top_k=3)(student, teacher)[0],
    ):
        assert not loss.requires_grad


def test_impossible_tokens() -> None:
    student, teacher = logits()
    student[..., 5] = teacher[..., 5] = -math.inf
    assert mtd.LogitsDistillationLoss()(student, teacher).isnan()
    kept = torch.arange(37) != 5
    exact = kl(student[..., kept].double(), teacher[..., kept].double()).mean() / 37
    actual = run(ours.LogitsDistillationLoss(), [student], teacher)
    assert error(actual.loss, exact) < 1e-6
    assert actual.gradients[0].isfinite().all()


class TinyModel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, width), nn.Linear(width, 37)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).tanh())


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_convert(reduction: str) -> None:
    """Two training steps of the converted model give the same curve with Model-Optimizer's criterion and with
    fastkd's."""
    curves = []
    for module in (mtd, ours):
        torch.manual_seed(0)
        student, teacher, data = TinyModel(8), TinyModel(16), torch.randn(5, 6)
        criterion = module.LogitsDistillationLoss(temperature=2.0, reduction=reduction)
        config = {"teacher_model": teacher, "criterion": criterion, "loss_balancer": None}
        model = mtd.convert(student, mode=[("kd_loss", config)])
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        curve = []
        for _ in range(3):
            model(data)
            loss = model.compute_kd_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss))
        curves.append(curve)
    reference, actual = curves
    assert reference[2] < reference[0]
    assert actual == pytest.approx(reference, rel=1e-5)


def test_the_page() -> None:
    """distil.py of docs/stacks/modelopt.md."""
    (block,) = [
        x for x in blocks(ROOT / "docs" / "stacks" / "modelopt.md") if x.title == "distil.py"
    ]
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block.body, "modelopt.md", "exec"), names)
    assert names["loss"].isfinite()


# ---- minifinetuning


def corrected(logits: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """The paper's target, p' = (1 - m) p + m onehot(y)."""
    p = logits.softmax(-1)
    rows = torch.arange(len(p))
    best, of_label = p.max(-1).values, p[rows, labels]
    below = (best - of_label + threshold) / (1 + best - of_label)
    above = ((of_label + threshold).clamp(max=1) - best) / (1 - best)
    m = torch.where(p.argmax(-1) != labels, below, above).unsqueeze(-1)
    target = (1 - m) * p
    target[rows, labels] += m.squeeze(-1)
    return target


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_mft_loss(reduction: str, threshold: float) -> None:
    student, teacher = logits()
    right = teacher.flatten(0, 1).argmax(-1)
    labels = torch.where(torch.arange(6) % 2 == 0, right, (right + 1) % 37)

    def formula(s: Tensor) -> Tensor:
        target = corrected(teacher.double().flatten(0, 1) / 2, labels, threshold)
        log_q = (s.flatten(0, 1) / 2).log_softmax(-1)
        return reduced(4 * (torch.xlogy(target, target) - target * log_q).sum(-1), reduction, 37)

    exact = run(formula, float64(student))
    reference = run(lambda s: mtd.MFTLoss(2.0, threshold, reduction)(s, teacher, labels), [student])
    actual = run(lambda s: ours.MFTLoss(2.0, threshold, reduction)(s, teacher, labels), [student])
    compare(actual, reference, exact)


def test_mft_of_a_nearly_certain_teacher() -> None:
    """In float32, 1 - p_y is only rounding error; a float64 target keeps it."""
    student, teacher = (x.flatten(0, 1) for x in logits())
    labels = teacher.argmax(-1)
    teacher = teacher + 30.0 * torch.nn.functional.one_hot(labels, 37)
    exact = torch.nn.functional.cross_entropy(student.double(), labels)
    assert error(ours.MFTLoss()(student, teacher, labels), exact) < 1e-6


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
def test_mft_where_the_other_tokens_underflow(threshold: float) -> None:
    """Teachers that are certain of the label, of another token, and of the only possible token."""
    student = logits()[0].flatten(0, 1)[:3].contiguous()
    teacher = torch.zeros(3, 37)
    teacher[0, 3] = teacher[1, 8] = 1e4
    teacher[2] = student[2] = -math.inf
    teacher[2, 3] = student[2, 3] = 2.5
    label = torch.nn.functional.one_hot(torch.full((3,), 3), 37)
    target = label.double()
    target[1, 3], target[1, 8] = (1 + threshold) / 2, (1 - threshold) / 2

    def formula(s: Tensor) -> Tensor:
        log_q = s.log_softmax(-1)
        return (torch.xlogy(target, target) - target * log_q.where(target > 0, 0.0)).sum()

    exact = run(formula, float64(student))
    loss = ours.MFTLoss(1.0, threshold, "sum")
    actual = run(lambda s: loss(s, teacher, label.argmax(-1)), [student])
    assert error(actual.loss, exact.loss) < 1e-6
    assert error(actual.gradients[0], exact.gradients[0]) < 1e-6


def test_mft_of_logits_far_from_0() -> None:
    """The label's new logit keeps its digits, however far from 0 the teacher's logits are."""
    student, teacher = (x.flatten(0, 1) for x in logits())
    labels = (teacher.argmax(-1) + 1) % 37
    teacher = (256.0 * teacher).round() / 256.0  # so that adding 8192 loses no bit
    exact = run(lambda s: ours.MFTLoss()(s, teacher, labels), [student])
    actual = run(lambda s: ours.MFTLoss()(s, teacher + 8192.0, labels), [student])
    assert error(actual.gradients[0], exact.gradients[0]) < 1e-6


@pytest.mark.parametrize("shape", [(0, 37), (2, 0, 37)])
def test_without_rows(shape: tuple[int, ...]) -> None:
    """Model-Optimizer gives NaN."""
    student = torch.zeros(shape, requires_grad=True)
    for loss in (
        ours.LogitsDistillationLoss()(student, student),
        ours.MFTLoss(reduction="mean")(student, student, torch.zeros(0, dtype=torch.int64)),
    ):
        assert loss == 0
        loss.backward()
    assert student.grad is not None


# ---- the losses of the Megatron plug-in, in one process


CONFIG = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 5, 37])
def test_megatron_losses(top_k: int | None, reverse: bool) -> None:
    student, teacher = logits()
    options: dict[str, Any] = {"temperature": 2.0, "reverse": reverse}
    name = "LogitsKLLoss"
    if top_k is not None:
        options["top_k"], name = top_k, "TopKLogitsKLLoss"

    def formula(s: Tensor) -> Tensor:
        t = teacher.double()
        if top_k is not None:
            t, ids = t.topk(top_k)
            s = s.gather(-1, ids)
        return kl(s, t, 2.0, reverse).T

    def call(module: Any) -> Any:
        loss = getattr(module, name)(CONFIG, **options)
        return lambda s: loss((s, None), (teacher, None))[0]  # as ColumnParallelLinear returns them

    exact = run(formula, float64(student))
    reference = run(call(plugin), [student])
    assert reference.loss.shape == (2, 3)
    compare(run(call(ours), [student]), reference, exact, floor=2e-6)
    flags = getattr(ours, name)(CONFIG, **options)(student, teacher)[1:]
    assert flags == (False, False)


def test_errors() -> None:
    student, teacher = logits()
    with pytest.raises(
        ValueError, match=r"top_k must be in \[1, 37\], the vocabulary size; got 38"
    ):
        ours.TopKLogitsKLLoss(CONFIG, top_k=38)(student, teacher)
    with pytest.raises(ValueError, match="reduction must be one of mean, batchmean, sum, none"):
        ours.LogitsDistillationLoss(reduction="max")
    with pytest.raises(ValueError, match="reduction must be one of batchmean, mean, sum"):
        ours.MFTLoss(reduction="none")
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1.5"):
        ours.MFTLoss(threshold=1.5)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (mtd, "LogitsDistillationLoss"),
        (mtd, "MFTLoss"),
        (plugin, "LogitsKLLoss"),
        (plugin, "TopKLogitsKLLoss"),
    ],
)
def test_signatures(module: Any, name: str) -> None:
    replacement, reference = getattr(ours, name), getattr(module, name)
    assert issubclass(
        replacement, torch.nn.modules.loss._Loss
    )  # which mtd.convert requires of a criterion
    for method in ("__init__", "forward"):
        actual, expected = (
            [(p.name, p.default) for p in inspect.signature(getattr(x, method)).parameters.values()]
            for x in (replacement, reference)
        )
        assert actual == expected
