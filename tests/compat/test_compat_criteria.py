"""fastkd.compat.torchdistill against torchdistill, and fastkd.compat.mdistiller against its published functions."""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.beside_peers import compare, error, float64, run
from torch import Tensor

from fastkd.compat import mdistiller
from fastkd.compat import torchdistill as ours

# The warning of torchdistill's "mean".
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
PATHS = {
    "student_module_path": "fc",
    "student_module_io": "output",
    "teacher_module_path": "head",
    "teacher_module_io": "input",
}


def logits(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, *shape, generator=generator)
    return student, teacher


def io_dict(path: str, kind: str, value: Tensor) -> dict[str, dict[str, Tensor]]:
    return {path: {kind: value}}


def on_logits(loss: Any, teacher: Tensor, targets: Tensor | None) -> Any:
    """Call the loss as torchdistill's distillation box does."""
    return lambda s: loss(
        io_dict("fc", "output", s), io_dict("head", "input", teacher.to(s.dtype)), targets
    )


@pytest.fixture
def theirs() -> Any:
    from torchdistill.losses import mid_level

    return mid_level


# ---- torchdistill


KD_CASES = {
    "no alpha": {"beta": 0.5},  # beta and T^2 have no effect then
    "alpha 0": {"alpha": 0.0},
    "hinton": {"alpha": 0.3},
    "weights beyond 1": {"alpha": 0.5, "beta": 9.0},
    "mean": {"alpha": 0.3, "reduction": "mean"},
    "sum": {"alpha": 0.3, "reduction": "sum"},
    "of the cross-entropy": {"alpha": 0.3, "label_smoothing": 0.1, "ignore_index": 4},
}


@pytest.mark.parametrize("case", KD_CASES)
@pytest.mark.parametrize("name", ["KDLoss", "LogitStdKDLoss", "KDLoss of maps"])
def test_kd_loss(theirs: Any, name: str, case: str) -> None:
    name, maps = name.split()[0], "maps" in name
    shape = (5, 11, 2, 3) if maps else (5, 11)
    student, teacher = logits(*shape)
    targets = torch.full(student.argmax(1).shape, 3).bernoulli_(0.5).long() + 4
    options = {**PATHS, "temperature": 2.0, **KD_CASES[case]}
    replacement, original = (getattr(x, name)(**options) for x in (ours, theirs))
    for inputs in (targets, None):
        exact = run(on_logits(original, teacher, inputs), float64(student))
        actual = run(on_logits(replacement, teacher, inputs), [student])
        compare(actual, run(on_logits(original, teacher, inputs), [student]), exact)


@pytest.mark.parametrize(
    ("beta", "gamma", "tau"), [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0), (1.0, 0.0, 1.0)]
)
def test_dist_loss(theirs: Any, beta: float, gamma: float, tau: float) -> None:
    student, teacher = logits(7, 11)
    options = {**PATHS, "beta": beta, "gamma": gamma, "tau": tau}
    replacement, original = (x.DISTLoss(**options) for x in (ours, theirs))
    exact = run(on_logits(original, teacher, None), float64(student))
    compare(
        run(on_logits(replacement, teacher, None), [student]),
        run(on_logits(original, teacher, None), [student]),
        exact,
    )


def layer(path: str, weight: float) -> dict[str, Any]:
    end = {"path": path, "io": "output"}
    return {"student": end, "teacher": end, "weight": weight}


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_at_loss(theirs: Any, mode: str) -> None:
    pairs = {"one": layer("layer1", 1.0), "two": layer("layer2", 0.3)}
    del pairs["one"]["weight"]
    teachers = [torch.randn(4, 5, 6, 6), torch.randn(4, 7, 3, 3)]
    students = [torch.randn(4, 3, 6, 6), torch.randn(4, 2, 3, 3)]

    def call(loss: Any) -> Any:
        def called(*maps: Tensor) -> Tensor:
            sides = [
                {f"layer{i}": {"output": x.to(maps[0].dtype)} for i, x in enumerate(side, 1)}
                for side in (maps, teachers)
            ]
            return loss(*sides)

        return called

    replacement, original = (x.ATLoss(pairs, mode) for x in (ours, theirs))
    exact = run(call(original), float64(*students))
    compare(run(call(replacement), students), run(call(original), students), exact)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("dist_factor", "angle_factor"), [(1.0, 2.0), (1.0, 0.0), (0.0, 3.0)])
def test_rkd_loss(theirs: Any, dist_factor: float, angle_factor: float, reduction: str) -> None:
    student, teacher = torch.randn(6, 3, 2), torch.randn(6, 8)

    def call(loss: Any) -> Any:
        return lambda s: loss(
            io_dict("a", "output", s), io_dict("b", "output", teacher.to(s.dtype))
        )

    replacement, original = (
        x.RKDLoss("a", "b", dist_factor, angle_factor, reduction) for x in (ours, theirs)
    )
    exact = run(call(original), float64(student))
    compare(run(call(replacement), [student]), run(call(original), [student]), exact)


def test_register(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchdistill.losses import registry

    monkeypatch.setattr(registry, "MIDDLE_LEVEL_LOSS_DICT", dict(registry.MIDDLE_LEVEL_LOSS_DICT))
    options = {**PATHS, "temperature": 2.0, "alpha": 0.5}

    def made(key: str) -> object:
        return type(registry.get_mid_level_loss({"key": key, "kwargs": options}))

    ours.register()
    assert made("fastkd.KDLoss") is ours.KDLoss
    assert made("KDLoss") is theirs.KDLoss
    ours.register(prefix="")
    assert made("KDLoss") is ours.KDLoss


def test_register_without_torchdistill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdistill.losses.registry", None)
    with pytest.raises(ImportError, match="pip install torchdistill"):
        ours.register()


def test_alpha_is_optional(theirs: Any) -> None:
    with pytest.raises(TypeError):
        theirs.KDLoss(**PATHS, temperature=2.0)
    student, teacher = logits(5, 11)
    loss = on_logits(ours.KDLoss(**PATHS, temperature=2.0), teacher, student.argmax(-1))(student)
    log_q, p = (student / 2).log_softmax(-1), (teacher / 2).softmax(-1)
    torch.testing.assert_close(loss, F.kl_div(log_q, p, reduction="batchmean"))


def test_errors() -> None:
    options = {**PATHS, "temperature": 2.0}
    with pytest.raises(ValueError, match="reduction must be one of batchmean, mean, sum"):
        ours.KDLoss(**options, reduction="none")
    with pytest.raises(ValueError, match="reduction must be one of mean, sum"):
        ours.RKDLoss("a", "b", 1.0, 1.0, "none")
    with pytest.raises(ValueError, match="mode must be one of code, paper"):
        ours.ATLoss({}, "both")
    student, teacher = logits(5, 11, 2)
    for loss in (ours.LogitStdKDLoss(**options), ours.DISTLoss(**PATHS)):
        with pytest.raises(ValueError, match=r"must be \[N, C\].*got 3 dimensions"):
            on_logits(loss, teacher, None)(student)


@pytest.mark.parametrize("loss", ours.LOSSES, ids=lambda loss: loss.__name__)
def test_signatures(theirs: Any, loss: Any) -> None:
    for method in ("__init__", "forward"):
        actual, expected = (
            [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()]
            for f in (getattr(loss, method), getattr(getattr(theirs, loss.__name__), method))
        )
        assert actual == expected


# ---- mdistiller: the formulas of its files, written again


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))


def kd(student: Tensor, teacher: Tensor, temperature: float, stand: bool) -> Tensor:
    if stand:
        student, teacher = standardized(student), standardized(teacher)
    log_q, p = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    return temperature**2 * F.kl_div(log_q, p, reduction="none").sum(1).mean()


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    stand: bool,
) -> Tensor:
    if stand:
        student, teacher = standardized(student), standardized(teacher)
    label = F.one_hot(target, student.shape[1]).bool()

    def binary(x: Tensor) -> Tensor:
        p = (x / temperature).softmax(1)
        return torch.stack([(p * label).sum(1), (p * ~label).sum(1)], 1)

    tckd = F.kl_div(binary(student).log(), binary(teacher), reduction="sum")
    masked = [x / temperature - 1000.0 * label for x in (student, teacher)]
    nckd = F.kl_div(masked[0].log_softmax(1), masked[1].softmax(1), reduction="sum")
    return (alpha * tckd + beta * nckd) * temperature**2 / len(target)


@pytest.mark.parametrize("stand", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mdistiller(temperature: float, stand: bool) -> None:
    student, teacher = logits(6, 23)
    target = teacher.argmax(1)
    target[::2] = 5
    for replacement, formula, options in (
        (mdistiller.kd_loss, kd, (temperature, stand)),
        (mdistiller.dkd_loss, dkd, (target, 1.0, 8.0, temperature, stand)),
    ):
        exact = run(formula, float64(student), teacher.double(), *options)
        plain = run(formula, [student], teacher, *options)
        compare(run(replacement, [student], teacher, *options), plain, exact)


def test_dkd_of_a_nearly_certain_student() -> None:
    student, teacher = logits(6, 23)
    target = student.argmax(1)
    student = student + 200.0 * F.one_hot(target, 23)
    exact = run(dkd, float64(student), teacher.double(), target, 1.0, 8.0, 1.0, False)
    plain = run(dkd, [student], teacher, target, 1.0, 8.0, 1.0, False)
    actual = run(mdistiller.dkd_loss, [student], teacher, target, 1.0, 8.0, 1.0)
    assert not math.isfinite(plain.loss) or plain.gradients[0].isnan().any()
    assert error(actual.loss, exact.loss) < 1e-6
    assert error(actual.gradients[0], exact.gradients[0]) < 1e-5
