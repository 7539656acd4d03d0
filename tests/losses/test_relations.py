"""Losses on relations, each against the published formula in dense float64, differentiated by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import BackendUnavailable
from fastkd.backends import angles as in_tiles
from fastkd.backends import registry
from fastkd.backends.angles import angles
from fastkd.relations import (
    gram_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    rkd_loss,
    similarity_loss,
)

Loss = Callable[..., Tensor]
ULP = torch.finfo(torch.float32).eps
# No sample, no pair, no triple, one triple; less than a block of the kernel, exactly one, one and a point, three
# blocks.
SIZES = (0, 1, 2, 3, 31, 64, 65, 130)


def embeddings(
    samples: int, width: int, seed: int, dtype: torch.dtype = torch.float64, spread: float = 1.0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(samples, width, generator=generator, dtype=torch.float64)).to(
        dtype
    )


def pair(samples: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, Tensor]:
    """A student and a teacher of different widths, not too far from each other."""
    student = embeddings(samples, 7, seed=samples, dtype=dtype, **options)
    mixed = student.double() @ embeddings(7, 11, seed=1) / 3 + embeddings(samples, 11, seed=2) / 2
    return student, mixed.to(dtype)


def assert_near(value: Tensor, exact: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(
        value, exact, rtol=rtol, atol=rtol * float(exact.abs().amax()) + 1e-13
    )


# The published formulas. unit(0) = 0, and the distance of equal points has no gradient.


def unit(x: Tensor) -> Tensor:
    square = x.square().sum(-1, keepdim=True)
    return x * torch.where(square > 0, torch.where(square > 0, square, 1.0).rsqrt(), 0.0)


def differences(x: Tensor) -> Tensor:
    """[j, i]: x_i - x_j"""
    x = x.flatten(1)
    return x[None] - x[:, None]


def cosines(x: Tensor) -> Tensor:
    """[j, i, k]"""
    e = unit(differences(x))
    return e @ e.transpose(1, 2)


def norms(x: Tensor) -> Tensor:
    square = differences(x).square().sum(-1)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def in_mean_units(d: Tensor, of: Tensor) -> Tensor:
    """d divided by the mean of `of`; 0 if that mean is 0."""
    return d / of.mean() if (of > 0).any() else d


def huber(x: Tensor, delta: float) -> Tensor:
    return torch.where(x.abs() <= delta, x * x / 2, delta * (x.abs() - delta / 2))


def angles_of_distinct(student: Tensor, teacher: Tensor, delta: float = 1.0) -> Tensor:
    n = len(student)
    index = torch.arange(n)
    j, i, k = index[:, None, None], index[None, :, None], index[None, None, :]
    distinct = (i != j) & (k != j) & (i != k)
    loss = huber(cosines(student) - cosines(teacher), delta)[distinct]
    return loss.sum() / max(n * (n - 1) * (n - 2), 1)


def angles_of_all(student: Tensor, teacher: Tensor, delta: float = 1.0) -> Tensor:
    """Angle loss as the authors' code has it: the mean over every element."""
    loss = F.huber_loss(cosines(student), cosines(teacher), delta=delta, reduction="sum")
    return loss / max(len(student) ** 3, 1)


def distances_of_distinct(student: Tensor, teacher: Tensor, delta: float = 1.0) -> Tensor:
    n = len(student)
    apart = ~torch.eye(n, dtype=torch.bool)
    d, target = (in_mean_units(norms(x), norms(x)[apart]) for x in (student, teacher))
    return huber(d - target, delta).sum() / max(n * (n - 1), 1)


def distances_of_all(student: Tensor, teacher: Tensor, delta: float = 1.0) -> Tensor:
    """Distance loss as the authors' code has it: every element, with mu over the distances above 0."""
    d, target = (in_mean_units(d, d[d > 0]) for d in (norms(student), norms(teacher)))
    return huber(d - target, delta).sum() / max(len(student) ** 2, 1)


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    g = [F.normalize(x.flatten(1) @ x.flatten(1).t(), dim=1) for x in (student, teacher)]
    return (g[1] - g[0]).square().sum() / max(len(student) ** 2, 1)


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = student.flatten(1), teacher.flatten(1)
    return torch.einsum("id,kd->ik", t, t).sub(torch.einsum("id,kd->ik", s, s)).norm().square()


ANGLES = {"distinct": angles_of_distinct, "all": angles_of_all}
DISTANCES = {"distinct": distances_of_distinct, "all": distances_of_all}
MEANS = pytest.mark.parametrize("mean", ["distinct", "all"])
EVERY: dict[str, tuple[Loss, Loss]] = {
    "distance": (rkd_distance_loss, distances_of_distinct),
    "distance, all": (partial(rkd_distance_loss, mean="all"), distances_of_all),
    "angle": (rkd_angle_loss, angles_of_distinct),
    "angle, all": (partial(rkd_angle_loss, mean="all"), angles_of_all),
    "angle, in PyTorch": (partial(rkd_angle_loss, backend="reference"), angles_of_distinct),
    "both": (rkd_loss, lambda s, t: distances_of_distinct(s, t) + 2 * angles_of_distinct(s, t)),
    "similarity": (similarity_loss, similarity),
    "gram": (gram_loss, gram),
}
every = pytest.mark.parametrize("name", EVERY)
RKD = [name for name in EVERY if name not in ("similarity", "gram")]


def results(loss: Loss, student: Tensor, teacher: Tensor, **options: Any) -> list[Tensor]:
    """Return the loss and both gradients."""
    s, t = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    value = loss(s, t, **options)
    return [value.detach(), *torch.autograd.grad(value, (s, t))]


def check(loss: Loss, oracle: Loss, student: Tensor, teacher: Tensor, **options: Any) -> None:
    inputs = options.pop("loss_options", {})
    for value, exact in zip(
        results(loss, student, teacher, **options, **inputs),
        results(oracle, student, teacher, **options),
        strict=True,
    ):
        if exact.numel():
            assert_near(value, exact)
        assert value.shape == exact.shape and value.dtype == exact.dtype


# The formulas.


@pytest.mark.parametrize("delta", [1.0, 0.3])
@MEANS
@pytest.mark.parametrize("samples", SIZES)
def test_angles(backend: str, samples: int, mean: str, delta: float) -> None:
    inputs = {"mean": mean, "backend": backend}
    check(rkd_angle_loss, ANGLES[mean], *pair(samples), delta=delta, loss_options=inputs)


@pytest.mark.parametrize("delta", [1.0, 0.3])
@MEANS
@pytest.mark.parametrize("samples", SIZES)
def test_distances(samples: int, mean: str, delta: float) -> None:
    check(
        rkd_distance_loss, DISTANCES[mean], *pair(samples), delta=delta, loss_options={"mean": mean}
    )


def test_the_authors_smooth_l1_is_huber_of_delta_1() -> None:
    student, teacher = pair(20, spread=3.0)
    s, t = cosines(student).flatten(), cosines(teacher).flatten()
    assert_near(rkd_angle_loss(student, teacher, mean="all"), F.smooth_l1_loss(s, t))
    s, t = norms(student), norms(teacher)
    exact = F.smooth_l1_loss(s / s[s > 0].mean(), t / t[t > 0].mean())
    assert_near(rkd_distance_loss(student, teacher, mean="all"), exact)


@pytest.mark.parametrize("weights", [(1.0, 2.0), (25.0, 50.0), (0.0, 1.0), (3.0, 0.0), (0.0, 0.0)])
@MEANS
def test_both_terms(mean: str, weights: tuple[float, float]) -> None:
    distance, angle = weights

    def oracle(student: Tensor, teacher: Tensor) -> Tensor:
        return distance * DISTANCES[mean](student, teacher) + angle * ANGLES[mean](student, teacher)

    inputs = {"mean": mean, "distance": distance, "angle": angle}
    check(rkd_loss, oracle, *pair(33), loss_options=inputs)


def test_the_default_weights_are_the_authors() -> None:
    student, teacher = pair(12)
    exact = rkd_distance_loss(student, teacher) + 2 * rkd_angle_loss(student, teacher)
    assert_near(rkd_loss(student, teacher), exact)


@pytest.mark.parametrize("samples", [0, 1, 2, 33])
def test_similarity(samples: int) -> None:
    check(similarity_loss, similarity, *pair(samples))


@pytest.mark.parametrize("samples", [0, 1, 2, 33])
def test_gram_over_samples(samples: int) -> None:
    student, teacher = pair(samples)
    check(gram_loss, gram, student, teacher)
    exact = gram(student / math.sqrt(7), teacher / math.sqrt(11)) / max(samples**2, 1)
    assert_near(gram_loss(student, teacher, normalize="width", reduction="mean"), exact)


def test_gram_over_channels() -> None:
    student, teacher = embeddings(3, 5 * 8, 1).view(3, 5, 2, 4), embeddings(3, 5 * 6, 2)
    teacher = teacher.view(3, 5, 3, 2)
    check(
        gram_loss,
        lambda s, t: sum(gram(a, b) for a, b in zip(s, t, strict=True)),
        student,
        teacher,
        loss_options={"over": "channels"},
    )
    exact = sum(gram(a / 8**0.5, b / 6**0.5) for a, b in zip(student, teacher, strict=True))
    options = {"over": "channels", "normalize": "width"}
    assert_near(gram_loss(student, teacher, **options), exact)
    assert_near(gram_loss(student, teacher, reduction="mean", **options), exact / (3 * 5 * 5))


def test_a_sample_of_zeros_has_no_similarity() -> None:
    student, teacher = pair(9)
    student[4] = 0
    s = student.requires_grad_()
    loss = similarity_loss(s, teacher)
    (gradient,) = torch.autograd.grad(loss, s)
    assert_near(loss.detach(), similarity(student.detach(), teacher))
    # The zero sample's row has no gradient; the other rows have gradients of the expected size.
    assert gradient.isfinite().all() and gradient.abs().max() < 1


@every
def test_gradcheck(name: str) -> None:
    loss, _ = EVERY[name]
    student, teacher = pair(6)
    arguments = (student.requires_grad_(), teacher.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: 1.7 * loss(s, t) ** 2, arguments)


# Numerics.


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.only_where(
    lambda name, offset: not offset or name in RKD
)  # an inner product changes with an offset
@every
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_is_at_least_as_exact_as_plain_pytorch(name: str, offset: float) -> None:
    loss, oracle = EVERY[name]
    student, teacher = (x + offset for x in pair(48, torch.float32))
    exact = results(oracle, student.double(), teacher.double())
    plain = results(oracle, student, teacher)
    for value, near, truth in zip(results(loss, student, teacher), plain, exact, strict=True):
        assert value.dtype == torch.float32
        assert error(value, truth) <= error(near, truth) + ULP
        if name in RKD:
            assert error(value, truth) <= ULP


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_within_one_rounding(name: str, dtype: torch.dtype) -> None:
    loss, oracle = EVERY[name]
    student, teacher = pair(48, dtype)
    scale = 2.0**12  # a loss scaler's factor, applied before the gradient is rounded
    s, t = student.requires_grad_(), teacher.requires_grad_()
    value = loss(s, t)
    assert value.dtype == torch.float32
    scale = scale / 2**16 if name == "gram" else scale
    gradients = torch.autograd.grad(value * scale, (s, t))
    exact = results(oracle, student.double(), teacher.double())
    torch.testing.assert_close(value.detach().double(), exact[0], rtol=2e-6, atol=0)
    for gradient, truth in zip(gradients, exact[1:], strict=True):
        assert gradient.dtype == dtype
        truth = truth * scale
        information = torch.finfo(dtype)
        bar = truth.abs() * information.eps / 2 * (1 + 1e-3) + truth.abs().max() * 2e-6
        assert ((gradient.double() - truth).abs() <= bar + information.tiny * information.eps).all()


# Points of a cluster are this far apart, and clusters 1: the float32 inputs themselves have 8 digits.
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("name", RKD)
def test_points_that_nearly_coincide(name: str, distance: float) -> None:
    loss, oracle = EVERY[name]
    student, teacher = pair(24, torch.float32)
    for x in (student, teacher):
        centres = x[:3].clone()
        for cluster, centre in enumerate(centres):
            x[5 * cluster : 5 * cluster + 5] = centre + distance * x[5 * cluster : 5 * cluster + 5]
    exact = results(oracle, student.double(), teacher.double())
    plain = results(oracle, student, teacher)
    for value, near, truth in zip(results(loss, student, teacher), plain, exact, strict=True):
        assert error(value, truth) <= max(error(near, truth), ULP)
        assert error(value, truth) < 1e-7 * max(1.0, 1e-4 / distance)


@MEANS
def test_points_that_coincide(backend: str, mean: str) -> None:
    """Coinciding points in both models, in the student, in the teacher; three at one place; every pair of i, j and
    k."""
    student, teacher = pair(70)
    for x in (student, teacher):
        x[3] = x[66]
    student[10] = student[11] = student[12]
    teacher[20] = teacher[69]
    inputs = {"mean": mean, "backend": backend}
    check(rkd_angle_loss, ANGLES[mean], student, teacher, delta=0.8, loss_options=inputs)
    check(rkd_distance_loss, DISTANCES[mean], student, teacher, loss_options={"mean": mean})


@pytest.mark.parametrize("name", RKD)
def test_a_collapsed_student(name: str) -> None:
    loss, _ = EVERY[name]
    _, teacher = pair(12)
    value, *gradients = results(loss, torch.ones(12, 4, dtype=torch.float64), teacher)
    assert value.isfinite() and value > 0
    assert (gradients[0] == 0).all() and gradients[1].isfinite().all()


@pytest.mark.parametrize("name", RKD)
def test_invariances(name: str) -> None:
    """The losses do not change with rotation, shift or scale of either model, or with the order of samples."""
    loss, _ = EVERY[name]
    student, teacher = pair(40)
    value = loss(student, teacher)
    rotation = torch.linalg.qr(embeddings(7, 7, seed=5)).Q
    order = torch.randperm(40, generator=torch.Generator().manual_seed(6))
    for s, t in (
        (student @ rotation, teacher),
        (student + 1e3, teacher - 40),
        (student * 1e-3, teacher * 1e4),
        (student[order], teacher[order]),
    ):
        assert_near(loss(s, t), value)
    assert loss(student, student @ rotation) < 1e-25
    assert abs(loss(student[order], teacher) / value - 1) > 1e-3


@pytest.mark.parametrize("name", RKD)
def test_gradients_have_no_translation_or_rotation(name: str) -> None:
    loss, _ = EVERY[name]
    student, teacher = pair(40)
    _, gradient, _ = results(loss, student, teacher)
    assert gradient.sum(0).abs().max() < 1e-14
    turn = gradient.t() @ student
    assert (turn - turn.t()).abs().max() < 1e-14
    assert (gradient * student).sum().abs() < 1e-14  # and scale nothing


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_reach_the_loss(name: str, bad: float) -> None:
    loss, _ = EVERY[name]
    for side in range(2):
        inputs = pair(70)
        inputs[side][68, 1] = bad
        assert not loss(*inputs).isfinite()


# The two implementations.


def matrices(samples: int) -> tuple[Tensor, Tensor]:
    student, teacher = pair(samples)
    if samples > 2:
        student[2] = student[0]
    return norms(student), norms(teacher)


@pytest.mark.parametrize("samples", [*SIZES, 64 * 4 + 5])
def test_kernel_and_tiles_agree(instructions: str, samples: int) -> None:
    from fastkd.backends import cpu

    inputs = matrices(samples)
    exact, derivative = angles(*inputs, 0.5, True)
    value, actual = cpu.angles(*inputs, 0.5, True)
    alone, nothing = cpu.angles(*inputs, 0.5, False)
    assert nothing is None and derivative is not None and actual is not None
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alone, exact, rtol=1e-12, atol=1e-12)
    # Only the sum of the matrix and its transpose is defined, and the diagonal is not used.
    off = ~torch.eye(samples, dtype=torch.bool)
    torch.testing.assert_close(
        (actual + actual.t())[off], (derivative + derivative.t())[off], rtol=1e-9, atol=1e-9
    )


def test_tiles_of_any_size() -> None:
    inputs = matrices(29)
    exact, derivative = angles(*inputs, 1.0, True)
    for block in (1, 4, 28, 29):
        budget = in_tiles._TENSORS_PER_TILE * 8 * 29 * block * block
        value, actual = angles(*inputs, 1.0, True, budget)
        assert_near(value, exact)
        assert_near(actual + actual.t(), derivative + derivative.t())
        assert_near(angles(*inputs, 1.0, False, budget)[0], exact)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# One block, two, an odd and an even number of blocks.
@pytest.mark.parametrize("samples", [40, 100, 300, 512])
@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_the_number_of_threads(instructions: str, samples: int) -> None:
    from fastkd.backends import cpu

    inputs = matrices(samples)
    runs = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        runs.append(cpu.angles(*inputs, 0.5, True))
    for again in runs[1:]:
        assert torch.equal(runs[0][0], again[0]) and torch.equal(runs[0][1], again[1])


def test_which_backend_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def recording(name: str, function: Any) -> Any:
        def angles(*arguments: Any) -> Any:
            ran.append(name)
            return function(*arguments)

        return angles

    cpu = registry.load("cpu")
    monkeypatch.setattr(cpu, "angles", recording("cpu", cpu.angles))
    reference = registry.load("reference")
    monkeypatch.setattr(reference, "angles", recording("reference", reference.angles))
    student, teacher = pair(5)
    for backend in ("auto", "cpu", "reference"):
        rkd_angle_loss(student, teacher, backend=backend)
        rkd_loss(student, teacher, backend=backend)
    assert ran == ["cpu"] * 4 + ["reference"] * 2
    ran.clear()
    for setting in ("reference", "triton"):  # a backend without a kernel for this loss
        monkeypatch.setenv("FASTKD_BACKEND", setting)
        rkd_angle_loss(student, teacher)
    assert ran == ["reference", "cpu"]


def test_without_the_extension(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    why = registry.Obstacle("it is missing", "Build it")
    monkeypatch.setattr(registry, "available_backends", lambda: {"cpu": why, "reference": None})
    registry._log_once.cache_clear()
    student, teacher = pair(5)
    assert_near(rkd_angle_loss(student, teacher), angles_of_distinct(student, teacher))
    assert "falls back to the portable backend (cpu: it is missing. Build it)" in caplog.text
    with pytest.raises(BackendUnavailable, match="it is missing"):
        rkd_angle_loss(student, teacher, backend="cpu")
    monkeypatch.setenv("FASTKD_STRICT", "1")
    with pytest.raises(BackendUnavailable, match="forbids the fallback"):
        rkd_angle_loss(student, teacher)
    rkd_angle_loss(student, teacher, backend="reference")
    registry._log_once.cache_clear()


def test_a_device_without_a_kernel() -> None:
    # The public functions refuse meta tensors, which hold no numbers, before they choose a backend.
    with pytest.raises(BackendUnavailable, match="the points are on meta"):
        registry.select_angles("cpu", torch.device("meta"))


# Promises to the caller.


@every
def test_layouts_and_inputs_unchanged(name: str) -> None:
    loss, oracle = EVERY[name]
    wide = embeddings(9, 24, seed=1)
    layouts = [
        (wide.t()[:9], wide[:, ::2]),
        (wide.view(9, 2, 3, 4), wide.view(9, 4, 6).transpose(1, 2)[:, 1:]),
        (wide[:1].expand(9, 24), wide[:, 3]),
    ]
    for student, teacher in layouts:
        before = student.clone(), teacher.clone()
        flat = student.reshape(9, -1), teacher.reshape(9, -1)
        for value, exact in zip(
            results(loss, student, teacher), results(oracle, *flat), strict=True
        ):
            assert_near(value.flatten(), exact.flatten())
        assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@every
def test_which_inputs_get_a_gradient(name: str) -> None:
    loss, _ = EVERY[name]
    student, teacher = pair(9)
    both = results(loss, student, teacher)
    assert not loss(student, teacher).requires_grad
    alone = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(alone, teacher), alone)
    assert_near(gradient, both[1])
    alone = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, alone), alone)
    assert_near(gradient, both[2])


@every
def test_mixed_dtypes(name: str) -> None:
    loss, _ = EVERY[name]
    student, teacher = pair(9, torch.float32)
    for other in (torch.bfloat16, torch.float64):
        value, *gradients = results(loss, student, teacher.to(other))
        assert value.dtype == (torch.float64 if other == torch.float64 else torch.float32)
        assert [g.dtype for g in gradients] == [torch.float32, other]


@every
def test_backward_twice(name: str) -> None:
    loss, _ = EVERY[name]
    student, teacher = pair(9)
    s = student.requires_grad_()
    value = loss(s, teacher)
    (first,) = torch.autograd.grad(value, s, retain_graph=True)
    (again,) = torch.autograd.grad(value, s, torch.tensor(-3.0).double(), retain_graph=True)
    assert_near(again, -3 * first)
    if name in RKD:
        (once,) = torch.autograd.grad(value, s, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            once.sum().backward()


@pytest.mark.parametrize("name", ["similarity", "gram"])
def test_second_derivatives(name: str) -> None:
    loss, _ = EVERY[name]
    student, teacher = pair(5)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, teacher), student.requires_grad_())


@pytest.mark.parametrize("name", RKD)
def test_forward_mode_and_vmap_raise(name: str) -> None:
    loss, _ = EVERY[name]
    student, teacher = pair(5)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda s: loss(s, teacher), (student,), (student,))
    with pytest.raises(RuntimeError):
        torch.func.vmap(loss)(student.expand(2, 5, 7), teacher.expand(2, 5, 11))


@pytest.mark.parametrize("name", RKD)
def test_the_graph_saves_a_gradient_and_no_matrix(name: str) -> None:
    loss, _ = EVERY[name]
    student, teacher = pair(50)
    held: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        held.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss(student.requires_grad_(), teacher)
    assert held == [50 * 7]


@every
def test_autocast(name: str) -> None:
    loss, _ = EVERY[name]
    student, teacher = pair(20, torch.float32)
    exact = results(loss, student, teacher)

    def autocast_loss(s: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(s, t)

    actual = results(autocast_loss, student, teacher)
    assert all(torch.equal(a, b) for a, b in zip(actual, exact, strict=True))


@every
def test_compile(name: str) -> None:
    """One graph, of plain PyTorch operations or of a custom op."""
    loss, _ = EVERY[name]
    compiled = torch.compile(lambda s, t: 2 * loss(s, t), backend="aot_eager", fullgraph=True)
    student, teacher = pair(9)
    for value, exact in zip(
        results(compiled, student, teacher), results(loss, student, teacher), strict=True
    ):
        assert_near(value, 2 * exact)


x = torch.zeros(4, 3)
BAD: list[tuple[Loss, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    *(
        row
        for loss, _ in EVERY.values()
        for row in [
            (loss, ([1.0], x), {}, TypeError, "student must be a tensor, got list"),
            (loss, (x, None), {}, TypeError, "teacher must be a tensor, got NoneType"),
            (loss, (x.long(), x), {}, TypeError, "student must be float32, .*got torch.int64"),
            (loss, (x, x.to_sparse()), {}, TypeError, "teacher must be dense"),
            (loss, (x.sum(), x), {}, ValueError, r"student must be \[N, ...\], got shape \(\)"),
            (loss, (x, x[1:]), {}, ValueError, r"as many samples as student, \(4,\); got \(3,\)"),
            (loss, (x, x.to("meta")), {}, ValueError, "teacher must be on cpu.*got meta"),
        ]
    ),
    *(
        row
        for loss in (rkd_distance_loss, rkd_angle_loss, rkd_loss)
        for row in [
            (loss, (x, x), {"delta": 0}, ValueError, "delta must be in .*got 0"),
            (loss, (x, x), {"delta": math.nan}, ValueError, "delta must be in .*got nan"),
            (loss, (x, x), {"delta": "1"}, TypeError, "delta must be a number, got str"),
            (loss, (x, x), {"mean": "pairs"}, ValueError, "mean must be one of distinct, all; got"),
        ]
    ),
    (rkd_angle_loss, (x, x), {"backend": "gpu"}, ValueError, "backend must be one of .*'gpu'"),
    (rkd_angle_loss, (x, x), {"backend": None}, TypeError, "backend must be a string"),
    (rkd_loss, (x, x), {"distance": -1.0}, ValueError, "distance must be in .*got -1.0"),
    (rkd_loss, (x, x), {"angle": math.inf}, ValueError, "angle must be in .*got inf"),
    (gram_loss, (x, x), {"over": "pixels"}, ValueError, "over must be one of samples, channels"),
    (gram_loss, (x, x), {"normalize": "size"}, ValueError, "normalize must be one of none, width"),
    (gram_loss, (x, x), {"reduction": "none"}, ValueError, "reduction must be one of sum, mean"),
    (gram_loss, (x, x[:, 1:]), {"over": "channels"}, ValueError, r"channels as student, \(4, 3\)"),
    (gram_loss, (x[0], x[0]), {"over": "channels"}, ValueError, r"student must be \[B, C, ...\]"),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "given", "options", "kind", "message"), BAD)
def test_bad_inputs(
    loss: Loss, given: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        loss(*given, **options)


@pytest.mark.parametrize("scale", [1e-30, 1e-11, 1e9, 1e30])
def test_similarity_does_not_depend_on_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(5)
    points, teacher = (torch.randn(8, n, generator=generator) for n in (512, 64))
    results = []
    for factor in (1.0, scale):
        student = (points * factor).requires_grad_()
        loss = similarity_loss(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
        results.append((loss.detach(), gradient * factor))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-8)
