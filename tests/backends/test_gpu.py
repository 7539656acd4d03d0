"""The kernels on a GPU, run by `make gpu`. Without a GPU the tests are skipped with that reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import assert_within, bars, check, labels_for, logits
from support.oracles import UNNORMALIZED
from torch import Tensor

import fastkd
import fastkd.response
from fastkd import kd_loss
from fastkd.backends import registry
from fastkd.backends.registry import Request
from fastkd.call.draft import LOSSES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
DEVICE = torch.device("cuda")


@pytest.fixture(params=["triton", "cuda"])
def on_gpu(request: pytest.FixtureRequest) -> str:
    """A backend of the device. One that does not support this device is skipped; a broken one fails."""
    name = request.param
    obstacle = registry.obstacle(
        name, Request("cuda", torch.float32, torch.float32, fastkd.forward_kl()), registry.available_backends()
    )  # fmt: skip
    if obstacle is not None:
        if "compute capability" not in obstacle.reason:
            pytest.fail(f"{name}: {obstacle.reason}. {obstacle.remedy}")
        pytest.skip(f"{name}: {obstacle.reason}")
    return name


def _pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    student, teacher = (logits(*shape, seed=side, dtype=dtype).to(DEVICE) for side in (1, 2))
    return student, teacher


def _gradient(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    loss = kd_loss(leaf, teacher, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


# Partial vectors, tiles and slices; real vocabularies, including an odd one (GPT-2's).
WIDTHS = (1, 31, 2051, 4097, 32_768, 50_257, 128_256, 151_936, 262_144)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_widths(on_gpu: str, divergence: str, dtype: torch.dtype, width: int) -> None:
    student, teacher = _pair(3, width, dtype=dtype)
    labels = labels_for(3, vocabulary=width, seed=3).to(DEVICE)
    check(on_gpu, student, teacher, labels, divergence=divergence, alpha=0.5, temperature=2.0)


@pytest.mark.parametrize("divergence", fastkd.DIVERGENCES)
def test_every_divergence(on_gpu: str, divergence: str) -> None:
    for width in (33, 5000):
        student, teacher = _pair(4, width)
        labels = labels_for(4, vocabulary=width, seed=3, ignored=0.3).to(DEVICE)
        check(
            on_gpu, student, teacher, labels, divergence=divergence, alpha=0.7, temperature=2.0,
            softcap=20.0, label_smoothing=0.1,
        )  # fmt: skip
    student[0, 10:300], teacher[0, 10:300] = -torch.inf, -torch.inf
    if divergence not in UNNORMALIZED:
        check(on_gpu, student, teacher, divergence=divergence)


def test_views_and_odd_addresses(on_gpu: str) -> None:
    student, teacher = _pair(3, 7, 1001)
    check(on_gpu, student[:, :-1], teacher[:, 1:])
    check(on_gpu, student[..., 1:], teacher[..., :-1], divergence="jsd")
    check(on_gpu, student.transpose(0, 1), teacher.transpose(0, 1), divergence="tvd")


def test_offsets_beyond_32_bits(on_gpu: str) -> None:
    """8,200 rows of 262,144 columns are more than 2^31 elements."""
    rows, width = 8200, 262_144
    student = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)
    teacher = torch.zeros_like(student)
    last = _pair(2, width, dtype=torch.bfloat16)
    student[-2:], teacher[-2:] = last
    loss, gradient = _gradient(student, teacher, reduction="none", backend=on_gpu)
    # Two rows alone may be spread over more programs, which sum in another order: the bar is that of float64.
    allowed = bars(
        *last, divergence="forward_kl", reduction="none", upstream=torch.ones(2, device=DEVICE)
    )
    assert_within("loss", loss[-2:], allowed.exact.loss, allowed.loss)
    exact = allowed.exact.student_gradient
    assert_within("gradient", gradient[-2:], exact, allowed.student_gradient)
    # Equal rows: at most the rounding error of a product that a fused multiply-add leaves.
    assert loss[:-2].abs().max() < 1e-9 and gradient[:-2].abs().max() < 1e-9


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_results_are_bitwise_repeatable(on_gpu: str, divergence: str) -> None:
    student, teacher = _pair(64, 50_257, dtype=torch.bfloat16)
    first = _gradient(student, teacher, divergence=divergence, backend=on_gpu)
    for _ in range(5):
        again = _gradient(student, teacher, divergence=divergence, backend=on_gpu)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nothing_synchronizes_with_the_device(on_gpu: str) -> None:
    leaf, teacher = _pair(8, 5000)
    labels = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    leaf.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")  # from here on, since a copy from the host synchronizes
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            leaf[0, 0].item()
        loss = kd_loss(leaf, teacher, labels, alpha=0.5, backend=on_gpu)
        (2 * loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_in_a_cuda_graph(on_gpu: str) -> None:
    student, teacher = _pair(16, 32_000)
    labels = labels_for(16, vocabulary=32_000, seed=3, ignored=0.3).to(DEVICE)
    leaf = student.clone().requires_grad_()

    def step() -> Tensor:
        leaf.grad = None
        loss = kd_loss(leaf, teacher, labels, alpha=0.5, backend=on_gpu)
        (3 * loss).backward()
        return loss.detach()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    gradient = leaf.grad
    fresh, _ = _pair(16, 32_000)
    leaf.data.copy_(fresh.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    replayed = captured.clone(), gradient.clone()
    assert torch.equal(step(), replayed[0]) and torch.equal(leaf.grad, replayed[1])


def test_the_current_stream(on_gpu: str) -> None:
    """On a busy stream, a launch on another stream would read the logits before they are written."""
    student, teacher = _pair(64, 50_000)
    expected = _gradient(student, teacher, backend=on_gpu)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        later = torch.full_like(student, torch.nan)
        torch.cuda._sleep(100_000_000)
        later.copy_(student)
        actual = _gradient(later, teacher, backend=on_gpu)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_device_that_is_not_the_current_one(on_gpu: str) -> None:
    student, teacher = _pair(4, 5000)
    expected = _gradient(student, teacher, backend=on_gpu)
    actual = _gradient(student.to("cuda:1"), teacher.to("cuda:1"), backend=on_gpu)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b.to(DEVICE)) for a, b in zip(expected, actual, strict=True))


def test_a_compiled_step_under_autocast(on_gpu: str) -> None:
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(64, 5000, device=DEVICE), torch.randn(32, 64, device=DEVICE)
    teacher = _pair(32, 5000)[1]

    def step(hidden: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return kd_loss(head(hidden), teacher, divergence="jsd", backend=on_gpu)

    outcomes = []
    for run in (step, torch.compile(step, fullgraph=True)):
        head.zero_grad()
        loss = run(hidden)
        assert loss.dtype == torch.float32
        loss.backward()
        outcomes.append((loss.detach(), head.weight.grad.clone()))
    torch.testing.assert_close(*outcomes, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_memory(on_gpu: str, inplace: bool) -> None:
    """A call allocates its gradient, if any, and a few numbers per row."""
    rows, width = 512, 32_768
    student, teacher = _pair(rows, width, dtype=torch.bfloat16)
    leaf = torch.zeros((), device=DEVICE, requires_grad=True)

    class Produced(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, parameter: Tensor, logits: Tensor) -> Tensor:
            return logits.clone()  # a view of an input may not be overwritten

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient.new_zeros(()), None

    for _ in range(2):  # the first call compiles
        made = Produced.apply(leaf, student)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kd_loss(made, teacher, inplace=inplace, backend=on_gpu).backward()
        extra = torch.cuda.max_memory_allocated() - before
    assert extra <= (0 if inplace else student.nbytes) + 64 * rows + (64 << 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_linear(on_gpu: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, width, inner = 300, 5000, 96
    hidden = torch.randn(rows, inner, dtype=dtype, device=DEVICE)
    weight = (torch.randn(width, inner, device=DEVICE) / 4).to(dtype)
    teacher = fastkd.LinearTeacher(hidden.flip(0), weight.flip(0))
    outcomes = []
    for kind, options in ((torch.float64, {}), (dtype, {"chunk_size": 128})):
        leaves = [x.to(kind).detach().requires_grad_() for x in (hidden, weight)]
        target = fastkd.LinearTeacher(teacher.hidden.to(kind), teacher.weight.to(kind))
        backend = "reference" if kind == torch.float64 else on_gpu
        loss = fastkd.fused_linear_kd_loss(*leaves, target, backend=backend, **options)
        outcomes.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    bar = 1e-5 if dtype == torch.float32 else 6e-3
    for exact, actual in zip(*outcomes, strict=True):
        assert float((actual.double() - exact).norm() / exact.norm()) < bar


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_teacher", "truncate"])
def test_sparse_teachers(on_gpu: str, tail: str) -> None:
    student, teacher = _pair(16, 5000)
    for k in (1, 64, 5000):
        sparse_teacher = fastkd.TopK.from_logits(teacher, k, tail=tail)
        actual = _gradient(student, sparse_teacher, backend=on_gpu)
        expected = _gradient(student.double(), sparse_teacher, backend="reference")
        for value, exact in zip(actual, expected, strict=True):
            torch.testing.assert_close(value.double(), exact.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("subset", [True, False])
def test_draft_losses(subset: bool, dtype: torch.dtype) -> None:
    """All terms in Triton's kernel, beside the reference in float64."""
    for width in (31, 2051, 50_257, 128_256):
        student, teacher = _pair(5, width, dtype=dtype)
        ids = None
        if subset:
            ids = torch.randperm(width, device=DEVICE)[: width // 2]
            student = student[:, : width // 2]
        losses = {name: 0.5 + k for k, name in enumerate(LOSSES)}
        options: dict[str, Any] = {"draft_to_target": ids, "reduction": "none"}
        results = []
        for s, t, backend in (
            (student, teacher, "triton"), (student.double(), teacher.double(), "reference"),
        ):  # fmt: skip
            leaf = s.detach().requires_grad_()
            loss = fastkd.response.draft_loss(leaf, t, losses, backend=backend, **options)
            results.append(
                (loss.detach().double(), torch.autograd.grad(loss.sum(), leaf)[0].double())
            )
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
        error = (results[0][1] - results[1][1]).norm(dim=-1)
        bar = (1e-5 + torch.finfo(dtype).eps) * results[1][1].norm(dim=-1)
        assert (error <= bar).all()


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "temperature": 0.7}], ids=str)
def test_log_probabilities(options: dict[str, Any]) -> None:
    """Triton's kernels, beside the same call in float64, which runs in PyTorch."""
    for width in (31, 2051, 50_257):
        hidden, weight = logits(6, 16, seed=1).to(DEVICE), logits(width, 16, seed=2).to(DEVICE)
        targets = labels_for(6, vocabulary=width, seed=3).to(DEVICE)
        assert registry.select_logprobs(hidden.device, torch.float32) == "triton"
        results = []
        for dtype in (torch.float32, torch.float64):
            leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
            outputs = fastkd.fused_linear_logprobs(*leaves, targets, topk=3, **options)
            loss = (outputs.target + outputs.entropy + outputs.topk_logprobs.sum(-1)).sum()
            gradients = torch.autograd.grad(loss, leaves)
            results.append([loss.detach(), outputs.target.detach(), *gradients])
        for value, exact in zip(*results, strict=True):
            assert (value - exact).norm() <= 1e-4 * exact.norm()
