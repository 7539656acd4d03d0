"""fused_linear_logprobs and student_topk against formulas in float64, written out here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import FLOOR, ULP
from support.paths import DATA
from torch import Tensor

import fastkd
from fastkd import fused_linear_logprobs, student_topk
from fastkd.backends import logprobs as in_torch
from fastkd.backends import registry
from fastkd.engine import logprobs as engine

NAMES = ("target", "entropy", "gathered", "topk_logprobs")
# How the logits become tempered logits.
TEMPERINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.3, "logit_scale": 1.7},
    "capped": {"softcap": 2.0, "logit_scale": 0.5, "temperature": 0.8},
    "negative": {"logit_scale": -0.6},
}
temperings = pytest.mark.parametrize("tempering", TEMPERINGS.values(), ids=TEMPERINGS)


@pytest.fixture(params=["cpu", "portable", *INTERPRETED])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each implementation of the rows; checks afterwards that no other one ran."""
    name, ran = request.param, set()
    if name == "cpu" and registry.available_backends()["cpu"] is not None:
        pytest.skip("the native extension is not built")
    monkeypatch.setenv("FASTKD_BACKEND", "auto" if name == "cpu" else name)
    if name == "triton":
        request.getfixturevalue("small_tiles")
    for other in {"cpu", "portable", name}:
        if other == "cpu" and registry.available_backends()["cpu"] is not None:
            continue
        module = registry.load(other)

        def recording(
            *arguments: Any, other: str = other, real: Any = module.logprob_statistics
        ) -> Any:
            ran.add(other)
            return real(*arguments)

        monkeypatch.setattr(module, "logprob_statistics", recording)
    yield name
    assert ran <= {name}, ran


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter, with tiles of 32 columns, so that short rows have several; two warps in compiled PTX."""
    from support.triton_interpreter import PTX, corrected

    from fastkd.kernels import logprobs

    small = (32, 1) if PTX is None else (64, 2)
    monkeypatch.setattr(logprobs, "tile", lambda width, *row: small if width < 200 else (1024, 4))
    with corrected():
        yield


class Problem(NamedTuple):
    """The tensors of a call."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    ids: Tensor

    def leaves(self) -> Problem:
        """The same with new leaves that require grad."""
        trained = (x.detach().clone().requires_grad_() for x in self[:3])
        return Problem(*trained, *self[3:])

    def exact(self) -> Problem:
        """The same in float64."""
        trained = (x.detach().double().requires_grad_() for x in self[:3])
        return Problem(*trained, *self[3:])


def problem(
    *lead: int, columns: int = 61, width: int = 7, k: int = 4, seed: int = 0,
    dtype: torch.dtype = torch.float32, spread: float = 1.0,
) -> Problem:  # fmt: skip
    """Random tensors. The last id of each row is padding, and the first one is the target in every other row."""
    generator = torch.Generator().manual_seed(seed)
    hidden = spread * torch.randn(*lead, width, generator=generator)
    weight = torch.randn(columns, width, generator=generator)
    bias = torch.randn(columns, generator=generator)
    targets = torch.randint(columns, lead, generator=generator)
    ids = torch.rand(*lead, columns, generator=generator).argsort(-1)[..., :k]
    shares = (torch.arange(targets.numel()).view(lead) % 2 == 0).unsqueeze(-1)
    ids = torch.where(ids == targets.unsqueeze(-1), -1, ids)
    ids[..., :1] = torch.where(shares, targets.unsqueeze(-1), ids[..., :1])
    ids[..., -1] = -1
    return Problem(hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets, ids)


def tempered(logits: Tensor, options: dict[str, Any]) -> Tensor:
    z = logits * options.get("logit_scale", 1.0)
    cap = options.get("softcap")
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    temperature = options.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z.dtype).unsqueeze(-1)
    return z / temperature


def of_logits(z: Tensor, targets: Tensor, ids: Tensor, k: int) -> fastkd.LogProbs:
    """The outputs in the dtype of the tempered logits, by log_softmax and gather."""
    log_q = z.log_softmax(-1)
    q = log_q.exp()
    entropy = -torch.where(q > 0, q * log_q, 0.0).sum(-1)
    gathered = log_q.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)
    order = z.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    target = log_q.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return fastkd.LogProbs(target, entropy, gathered, order, log_q.gather(-1, order))


def expected(tensors: Problem, k: int = 0, **options: Any) -> fastkd.LogProbs:
    logits = tensors.hidden @ tensors.weight.T + tensors.bias
    return of_logits(tempered(logits, options), tensors.targets, tensors.ids, k)


def actual(tensors: Problem, k: int = 0, **options: Any) -> fastkd.LogProbs:
    return fused_linear_logprobs(
        tensors.hidden, tensors.weight, tensors.targets, ids=tensors.ids, bias=tensors.bias, topk=k,
        **options,
    )  # fmt: skip


def weighted(
    outputs: fastkd.LogProbs, names: tuple[str, ...] = NAMES, kept: Tensor | None = None
) -> Tensor:
    """The sum of these outputs with factors of both signs, without the infinities of padding."""
    total: Any = 0.0
    for number, name in enumerate(names):
        value = getattr(outputs, name)
        if value is None:
            continue
        factors = (torch.arange(value.numel()) * (number + 3) % 7 - 2.5).view(value.shape) / 3
        if kept is not None:
            factors = factors * kept.view(*kept.shape, *(1,) * (value.dim() - kept.dim()))
        total = total + (torch.where(value > -math.inf, value, 0.0) * factors.to(value.dtype)).sum()
    return total


def gradients(loss: Tensor, tensors: Problem) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors[:3], retain_graph=True)


TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def assert_near(values: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Relative by norm; low precision rounds the gradients at the end, and the logits are in float32."""
    for value, reference in zip(values, exact, strict=True):
        gap = (value.double() - reference).norm() / reference.norm().clamp(min=1e-30)
        assert gap < TOLERANCE[dtype], gap


def assert_outputs(
    outputs: fastkd.LogProbs, exact: fastkd.LogProbs, dtype: torch.dtype = torch.float32
) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    for name in NAMES:
        value, reference = getattr(outputs, name), getattr(exact, name)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(
            value.double(), reference.detach().double(), rtol=tolerance, atol=tolerance, msg=name
        )
    assert torch.equal(outputs.topk_ids, exact.topk_ids)


@temperings
@pytest.mark.heavy_with(
    kernels="triton", dtype=torch.bfloat16
)  # the kernels' logits are in float32
@pytest.mark.heavy_with(kernels="triton", dtype=torch.float16)
@pytest.mark.only_where(lambda kernels, dtype: kernels == "portable" or dtype != torch.float64)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_and_gradients(kernels: str, tempering: dict[str, Any], dtype: torch.dtype) -> None:
    # 4 columns, fewer than a vector; 64 and 61 around whole vectors, or around two tiles of Triton; 2,053 past a block
    # of the kernel in C++.
    for columns in (4, 61, 64, 130) if kernels == "triton" else (4, 61, 64, 2053):
        made = problem(3, 5, columns=columns, dtype=dtype, k=3)
        mine, exact = made.leaves(), made.exact()
        outputs, reference = (
            actual(mine, 3, chunk_size=4, **tempering),
            expected(exact, 3, **tempering),
        )
        assert_outputs(outputs, reference, dtype)
        assert_near(
            gradients(weighted(outputs), mine), gradients(weighted(reference), exact), dtype
        )


@pytest.mark.parametrize("names", [*((name,) for name in NAMES), ("target", "entropy"), NAMES[:3]])
def test_each_output_alone(kernels: str, names: tuple[str, ...]) -> None:
    made = problem(9)
    mine, exact = made.leaves(), made.exact()
    outputs = fused_linear_logprobs(
        mine.hidden, mine.weight, mine.targets if "target" in names else None, bias=mine.bias,
        ids=mine.ids if "gathered" in names else None, entropy="entropy" in names,
        topk=5 if "topk_logprobs" in names else 0,
    )  # fmt: skip
    for name in NAMES:
        assert (getattr(outputs, name) is not None) == (name in names)
    reference = expected(exact, 5)
    assert_near(
        gradients(weighted(outputs, names), mine),
        gradients(weighted(reference, names), exact),
        torch.float32,
    )
    # Also if all outputs are computed and the loss depends on these alone.
    everything = actual(mine, 5)
    assert_near(
        gradients(weighted(everything, names), mine),
        gradients(weighted(reference, names), exact),
        torch.float32,
    )


@temperings
def test_gradcheck(tempering: dict[str, Any]) -> None:
    made = problem(2, 3, columns=11, width=3, dtype=torch.float64).leaves()
    targets = made.targets.clone()
    targets[0, 1] = -100

    def outputs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        results = fused_linear_logprobs(
            hidden, weight, targets, ids=made.ids, bias=bias, topk=2, chunk_size=2, **tempering
        )
        return tuple(getattr(results, name).nan_to_num(neginf=0.0) for name in NAMES)

    assert torch.autograd.gradcheck(outputs, made[:3])


def test_a_temperature_per_row(kernels: str) -> None:
    made = problem(4, 3)
    mine, exact = made.leaves(), made.exact()
    temperature = torch.linspace(0.4, 2.0, 12).view(4, 3)
    for cap in (None, 3.0):
        outputs = actual(mine, 2, temperature=temperature, softcap=cap, chunk_size=5)
        reference = expected(exact, 2, temperature=temperature, softcap=cap)
        assert_outputs(outputs, reference)
        assert_near(
            gradients(weighted(outputs), mine), gradients(weighted(reference), exact), torch.float32
        )
    by_number, by_tensor = (
        actual(made, temperature=0.7),
        actual(made, temperature=torch.tensor(0.7)),
    )
    torch.testing.assert_close(by_number.target, by_tensor.target)
    temperature[1, 1] = -1.0
    outputs = actual(made, 2, temperature=temperature)
    invalid = outputs.target.isnan()
    assert invalid[1, 1] and invalid.sum() == 1
    assert outputs.entropy[1, 1].isnan() and outputs.topk_logprobs[1, 1].isnan().all()


@pytest.mark.parametrize("count", [1, 3])
def test_every_instruction_set(
    instructions: str, threads: None, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.delenv("FASTKD_BACKEND", raising=False)
    torch.set_num_threads(count)
    for columns in (5, 64, 2053):
        made = problem(7, columns=columns)
        mine, exact = made.leaves(), made.exact()
        options = {"softcap": 3.0, "temperature": torch.linspace(0.5, 2.0, 7)}
        outputs, reference = actual(mine, 2, **options), expected(exact, 2, **options)
        assert_outputs(outputs, reference)
        assert_near(
            gradients(weighted(outputs), mine), gradients(weighted(reference), exact), torch.float32
        )


def peaked(rows: int, columns: int) -> Tensor:
    """Logits whose largest leads by 5 to 40, so that its probability is 1 - 1e-2 to 1 - 1e-17."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, columns, generator=generator)
    top = torch.randint(columns, (rows, 1), generator=generator)
    return logits.scatter(1, top, torch.linspace(8.0, 45.0, rows).unsqueeze(1))


def real() -> Tensor:
    with np.load(DATA / "smollm2.npz") as file:
        return torch.from_numpy(file["student"]).float()


def flat(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))


ROWS: dict[str, Callable[[], Tensor]] = {
    "real": real,
    "peaked": lambda: peaked(12, 4099),
    "far from 0": lambda: peaked(12, 519) - 300.0,
    "flat": lambda: flat(6, 30_001),
}


def head_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden, weight) whose product has exactly these logits; the gradient of weight is that of the logits."""
    return torch.eye(len(logits)), logits.T.contiguous()


@pytest.mark.heavy_with(kernels="triton", rows="real")
@pytest.mark.heavy_with(kernels="triton", rows="flat")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("of", ["argmax", "others"])
def test_errors_are_at_most_those_of_log_softmax(kernels: str, rows: str, of: str) -> None:
    logits = ROWS[rows]()
    count, columns = logits.shape
    generator = torch.Generator().manual_seed(5)
    best = logits.argmax(-1)
    targets = best if of == "argmax" else torch.randint(columns, (count,), generator=generator)
    ids = torch.stack([best, (best + 7) % columns], -1)
    upstream = {name: torch.randn(count, generator=generator) for name in NAMES[:2]}
    names = ("target", "entropy")

    def losses(outputs: fastkd.LogProbs) -> dict[str, Tensor]:
        each = {name: (getattr(outputs, name) * upstream[name]).sum() for name in names}
        return each | {"gathered": outputs.gathered.sum(), "all": sum(each.values())}

    hidden, weight = head_of(logits)
    weight.requires_grad_()
    mine = fused_linear_logprobs(hidden, weight, targets, ids=ids)
    plain_logits, exact_logits = logits.clone().requires_grad_(), logits.double().requires_grad_()
    plain = of_logits(plain_logits, targets, ids, 0)
    exact = of_logits(exact_logits, targets, ids, 0)
    for name in (*names, "gathered"):
        value, by_torch, reference = (
            getattr(x, name).detach().double() for x in (mine, plain, exact)
        )
        error, bar = (value - reference).abs(), (by_torch - reference).abs()
        # The sum of a row of torch, too, may be right by luck: one unit in the last place of the value.
        assert (error <= bar.max() + ULP * reference.abs()).all(), (name, error, bar)
    for name in losses(mine):
        (of_weight,) = torch.autograd.grad(losses(mine)[name], weight, retain_graph=True)
        (by_torch,) = torch.autograd.grad(losses(plain)[name], plain_logits, retain_graph=True)
        (reference,) = torch.autograd.grad(losses(exact)[name], exact_logits, retain_graph=True)
        error = (of_weight.T.double() - reference).abs().amax(-1)
        bar = (by_torch.double() - reference).abs().amax(-1)
        # The exponentials, their factor and the product are each rounded once.
        scale = 2 * ULP * reference.abs().amax(-1) + FLOOR
        assert (error <= bar + scale).all(), (name, error, bar, scale)


def test_a_row_of_the_lowest_number_is_uniform(kernels: str) -> None:
    logits = torch.full((2, 70), torch.finfo(torch.float32).min)
    logits[1, 66:] = 3.0
    outputs = fused_linear_logprobs(*head_of(logits), torch.tensor([5, 67]))
    sizes = torch.tensor([70.0, 4.0])
    torch.testing.assert_close(outputs.target, -sizes.log())
    torch.testing.assert_close(outputs.entropy, sizes.log())


def test_a_certain_target_keeps_its_digits(kernels: str) -> None:
    # Plain float32 returns 0 for log q = log(1 - 8e-9), and a gradient of 0.
    logits = torch.zeros(1, 5)
    logits[0, 2] = 20.0
    hidden, weight = head_of(logits)
    weight.requires_grad_()
    target = fused_linear_logprobs(hidden, weight, torch.tensor([2])).target
    exact = -math.log1p(4 * math.exp(-20.0))
    assert abs(float(target.detach()) / exact - 1) < 1e-6
    (gradient,) = torch.autograd.grad(target, weight)
    assert abs(float(gradient[2]) / -exact - 1) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": torch.tensor([0.7])},
        {"temperature": 0.7, "softcap": 150.0, "logit_scale": 1.3},
    ],
    ids=["number", "tensor", "softcap"],
)
def test_a_certain_target_far_from_0_keeps_its_digits(
    kernels: str, options: dict[str, Any]
) -> None:
    """z of the target is rounded by 1e-5, as the maximum is; only their difference, 0, decides the gradient."""
    logits = torch.full((1, 5), 101.3)
    logits[0, 2] += 14.0
    hidden, weight = head_of(logits)
    weight.requires_grad_()
    target = fused_linear_logprobs(hidden, weight, torch.tensor([2]), **options).target
    (gradient,) = torch.autograd.grad(target, weight)
    exact_logits = logits.double().requires_grad_()
    exact = tempered(exact_logits, options).log_softmax(-1)[0, 2]
    (reference,) = torch.autograd.grad(exact, exact_logits)
    assert 0 < reference[0, 2] < 1e-4
    torch.testing.assert_close(gradient.T.double(), reference, rtol=1e-3, atol=0.0)


@pytest.mark.heavy_with(kernels="triton", rows=7)
@pytest.mark.heavy_with(kernels="triton", rows=13)
@pytest.mark.parametrize("rows", [1, 7, 13])
def test_every_chunk_size_gives_the_same(kernels: str, rows: int) -> None:
    made = problem(rows, columns=130)
    targets = made.targets.clone()
    targets[rows // 2] = -100
    made = made._replace(targets=targets)
    mine = made.leaves()
    whole = actual(mine, 4, chunk_size=rows)
    of_whole = gradients(weighted(whole), mine)
    for size in range(1, rows + 1):
        outputs = actual(mine, 4, chunk_size=size)
        for value, reference in zip(outputs, whole, strict=True):
            torch.testing.assert_close(value, reference, rtol=2e-6, atol=2e-6)
        for value, reference in zip(gradients(weighted(outputs), mine), of_whole, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


def test_dropped_rows(kernels: str) -> None:
    made = problem(4, 5)
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    targets = made.targets.masked_fill(
        torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.3, -100
    )
    kept = mask & (targets != -100)
    hidden = torch.where(kept.unsqueeze(-1), made.hidden, math.nan)
    mine = made._replace(hidden=hidden, targets=targets).leaves()
    outputs = actual(mine, 3, mask=mask, chunk_size=4)
    assert (outputs.target[~kept] == 0).all() and (outputs.entropy[~kept] == 0).all()
    assert (outputs.gathered[~kept] == -math.inf).all()
    assert (outputs.topk_ids[~kept] == -1).all() and (
        outputs.topk_logprobs[~kept] == -math.inf
    ).all()
    exact = made._replace(hidden=torch.where(kept.unsqueeze(-1), made.hidden, 0.0)).exact()
    reference = expected(exact, 3)
    for name in NAMES:
        value, right = getattr(outputs, name)[kept], getattr(reference, name)[kept]
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-5)
    # The factors of dropped rows are infinite: nothing of them may reach a gradient.
    upstream = torch.where(kept, 1.0, math.inf)
    (of_hidden, of_weight) = torch.autograd.grad(
        [outputs.target, outputs.entropy], mine[:2], [upstream, upstream]
    )
    (exact_hidden, exact_weight) = torch.autograd.grad(
        [reference.target, reference.entropy], exact[:2], [kept.double()] * 2
    )
    assert_near((of_hidden, of_weight), (exact_hidden, exact_weight), torch.float32)
    assert (of_hidden[~kept] == 0).all()


def test_upstream_gradients_of_padding_are_not_read(kernels: str) -> None:
    made = problem(5)
    mine, exact = made.leaves(), made.exact()
    padding = made.ids < 0
    of_gathered = (torch.arange(20.0).view(5, 4) % 3 - 1).masked_fill(padding, math.nan)
    (of_hidden,) = torch.autograd.grad(actual(mine).gathered, mine.hidden, of_gathered)
    right = (expected(exact).gathered * of_gathered.double())[~padding].sum()
    assert_near((of_hidden,), torch.autograd.grad(right, exact.hidden), torch.float32)


def test_half_precision_scales_by_the_largest_upstream_gradient_of_a_kept_row() -> None:
    kept = torch.tensor([True, False, True])
    of_target = torch.tensor([1e-9, math.nan, -4e-9])
    of_gathered = torch.tensor([[0.0], [math.inf], [2e-9]])
    upstream, factor = engine._normalized(engine.Upstream(of_target, None, of_gathered, None), kept)
    assert float(factor) == pytest.approx(4e-9)
    torch.testing.assert_close(upstream.target[kept], torch.tensor([0.25, -1.0]))
    torch.testing.assert_close(upstream.gathered[kept], torch.tensor([[0.0], [0.5]]))
    for value in (0.0, math.inf):  # nothing to scale, or nothing to save
        _, factor = engine._normalized(
            engine.Upstream(torch.tensor([value]), None, None, None), None
        )
        assert factor == 1


@pytest.mark.parametrize("lead", [(0,), (2, 0), ()])
def test_few_rows(kernels: str, lead: tuple[int, ...]) -> None:
    made = problem(*lead) if lead else problem(1)
    if not lead:
        made = Problem(made.hidden[0], *made[1:3], made.targets[0], made.ids[0])
    mine = made.leaves()
    outputs = actual(mine, 2)
    for value, shape in zip(outputs, (lead, lead, (*lead, 4), (*lead, 2), (*lead, 2)), strict=True):
        assert value.shape == shape
    of_student = gradients(weighted(outputs), mine)
    exact = made.exact()
    reference = gradients(weighted(expected(exact, 2)), exact)
    for value, right in zip(of_student, reference, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-6)


def test_all_rows_dropped(kernels: str) -> None:
    mine = problem(3).leaves()
    outputs = actual(mine, 2, mask=torch.zeros(3, dtype=torch.bool))
    assert not any(gradient.any() for gradient in gradients(outputs.target.sum(), mine))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight and bias", "all"])
def test_frozen(kernels: str, frozen: str) -> None:
    made = problem(5)
    exact = made.exact()
    reference = dict(
        zip(Problem._fields, gradients(weighted(expected(exact, 2)), exact), strict=False)
    )
    mine = made.leaves()
    for name in reference:
        if name in frozen or frozen == "all":
            getattr(mine, name).requires_grad_(False)
    loss = weighted(actual(mine, 2))
    assert loss.requires_grad == (frozen != "all")
    if loss.requires_grad:
        loss.backward()
    for name, right in reference.items():
        gradient = getattr(mine, name).grad
        if name in frozen or frozen == "all":
            assert gradient is None
        else:
            assert_near((gradient,), (right,), torch.float32)
    with torch.no_grad():
        assert not actual(made.leaves(), 2).target.requires_grad


def test_a_tied_embedding_sums_both_gradients(kernels: str) -> None:
    made = problem(6, columns=31)
    tokens = torch.arange(6)

    def loss_of(weight: Tensor, of: Callable[..., Any]) -> Tensor:
        hidden = torch.nn.functional.embedding(tokens, weight)
        return weighted(of(Problem(hidden, weight, made.bias.to(weight.dtype), *made[3:]), 2))

    mine, exact = made.leaves().weight, made.exact().weight
    (value,) = torch.autograd.grad(loss_of(mine, actual), mine)
    (right,) = torch.autograd.grad(loss_of(exact, expected), exact)
    assert_near((value,), (right,), torch.float32)


def test_micro_batches_add_up(kernels: str) -> None:
    made = problem(8)
    whole, parts = made.leaves(), made.leaves()
    actual(whole).target.sum().backward()
    for rows in (slice(3), slice(3, 8)):
        part = Problem(parts.hidden[rows], *parts[1:3], parts.targets[rows], parts.ids[rows])
        actual(part).target.sum().backward()
    for one, other in zip(whole[:3], parts[:3], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_padding_of_the_vocabulary(kernels: str) -> None:
    made = problem(5, columns=40)
    targets, ids = made.targets % 33, torch.where(made.ids < 0, -1, made.ids % 33)
    ids[:, 1:3] = -1  # the remainder may repeat an id
    made = made._replace(targets=targets, ids=ids)
    weight = made.weight.clone()
    weight[33:] = math.nan
    mine = made._replace(weight=weight).leaves()
    exact = Problem(made.hidden, made.weight[:33], made.bias[:33], targets, ids).exact()
    outputs, reference = actual(mine, 6, vocab_size=33), expected(exact, 6)
    assert_outputs(outputs, reference)
    values = gradients(weighted(outputs), mine)
    rights = gradients(weighted(reference), exact)
    assert_near((values[0], values[1][:33], values[2][:33]), rights, torch.float32)
    assert not values[1][33:].any() and not values[2][33:].any()


def test_impossible_tokens(kernels: str) -> None:
    made = problem(4, columns=21)
    bias = made.bias.clone()
    bias[[0, 5, 20]] = -math.inf
    targets = torch.tensor([5, 0, 3, 20])
    made = made._replace(bias=bias, targets=targets)
    mine, exact = made.leaves(), made.exact()
    outputs, reference = actual(mine, 21), expected(exact, 21)
    assert torch.equal(outputs.target == -math.inf, torch.tensor([True, True, False, True]))
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(outputs.entropy.double(), reference.entropy, **close)
    torch.testing.assert_close(outputs.topk_logprobs.double(), reference.topk_logprobs, **close)
    assert torch.equal(outputs.topk_ids, reference.topk_ids)
    (of_hidden,) = torch.autograd.grad(outputs.entropy.sum(), mine.hidden)
    assert torch.isfinite(of_hidden).all()
    # A row without a possible token, or with a NaN, is NaN and leaves the others alone.
    for value in (-math.inf, math.nan):
        hidden, weight = torch.tensor([[1.0], [value]]), torch.tensor([[1.0], [2.0], [3.0]])
        outputs = fused_linear_logprobs(hidden, weight, torch.tensor([0, 0]))
        assert torch.isfinite(outputs.target[0]) and outputs.target[1].isnan()
        assert outputs.entropy[1].isnan() or value == -math.inf


def test_invalid_tokens_make_their_values_nan(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = problem(3, columns=20)
    targets, ids = made.targets.clone(), made.ids.clone()
    targets[1], ids[2, 1] = 20, 20
    mine = made._replace(targets=targets, ids=ids).leaves()
    outputs = actual(mine)
    assert outputs.target.isnan().tolist() == [False, True, False]
    assert outputs.gathered.isnan().sum() == 1 and outputs.gathered[2, 1].isnan()
    (of_hidden,) = torch.autograd.grad(outputs.target.sum(), mine.hidden)
    assert of_hidden.isnan().any(-1).tolist() == [False, True, False]
    monkeypatch.setenv("FASTKD_CHECK", "1")
    with pytest.raises(
        ValueError, match=r"targets must be in \[0, 20\) or ignore_index \(-100\); row 1 has 20"
    ):
        actual(mine)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 20\), or -1 for padding; row 2"):
        actual(made._replace(ids=ids))
    repeated = made.ids.clone()
    repeated[0, :2] = 7
    with pytest.raises(ValueError, match="ids must be distinct within a row; row 0"):
        actual(made._replace(ids=repeated))
    with pytest.raises(ValueError, match="temperature must be positive; row 2 has 0.0"):
        actual(made, temperature=torch.tensor([1.0, 1.0, 0.0]))
    actual(made, temperature=torch.tensor([1.0, 1.0, 0.0]), mask=torch.tensor([True, True, False]))


def test_the_second_derivative_raises() -> None:
    mine = problem(2).leaves()
    (gradient,) = torch.autograd.grad(actual(mine).target.sum(), mine.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


def test_a_retained_graph_gives_the_same_gradient_again(kernels: str) -> None:
    mine = problem(3).leaves()
    loss = weighted(actual(mine, 2))
    first = torch.autograd.grad(loss, mine[:3], retain_graph=True)
    second = torch.autograd.grad(loss, mine[:3])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast(kernels: str) -> None:
    made = problem(4)
    rounded = Problem(*(x.bfloat16().float() for x in made[:3]), *made[3:])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = actual(made, 3)
    for value, right in zip(outputs, actual(rounded, 3), strict=True):
        torch.testing.assert_close(value, right)


def test_views_and_integers(kernels: str) -> None:
    made = problem(3, 4)
    views = Problem(
        made.hidden.transpose(0, 1).contiguous().transpose(0, 1), made.weight.T.contiguous().T,
        torch.stack([made.bias] * 2, -1)[:, 0], made.targets.T.contiguous().T, made.ids.to(torch.int32),
    )  # fmt: skip
    for value, right in zip(
        actual(views, 3, chunk_size=5), actual(made, 3, chunk_size=5), strict=True
    ):
        torch.testing.assert_close(value, right)


def test_no_logits_of_all_rows_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    made = problem(40, columns=1000, width=8).leaves()
    sizes: list[int] = []
    real = engine.StudentChunks.logits

    def recording(self: Any, indices: Any, buffer: Tensor) -> Tensor:
        sizes.append(buffer.shape[0])
        return real(self, indices, buffer)

    monkeypatch.setattr(engine.StudentChunks, "logits", recording)
    actual(made, chunk_size=7).target.sum().backward()
    assert max(sizes) <= 7 and sum(sizes) == 80  # each row once in each pass
    with pytest.raises(ValueError, match="memory_budget must be at least"):
        actual(made, memory_budget=1000)


def test_the_memory_plan_is_that_of_the_call() -> None:
    made = problem(300, columns=500, width=16, dtype=torch.bfloat16)
    budget = 20 << 20
    for frozen in (False, True):
        planned = fastkd.memory_plan(
            300, 500, 16, teacher="none", dtype=torch.bfloat16, weight_gradient=not frozen,
            memory_budget=budget,
        )  # fmt: skip
        student = engine.Student(made.hidden, made.weight)
        request = engine.Request(500, 1.0, 1.0, None, -100, True, 0, None, budget)
        assert engine._chunk_size(student, request, not frozen, "cpu") == planned.chunk_size
    assert planned.teacher == 0 and planned.logits == planned.chunk_size * 500 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets must be torch.int64"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, "targets must have one value a row"),
        ({"ids": torch.zeros(3, 2)}, "ids must be torch.int64 or torch.int32"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, r"ids must be \[..., K\] with K > 0"),
        ({"ids": torch.zeros(3, 0, dtype=torch.int64)}, r"ids must be \[..., K\] with K > 0"),
        ({"mask": torch.zeros(3)}, "mask must be torch.bool"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": torch.ones(3, requires_grad=True)}, "temperature requires grad"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"logit_scale": 0.0}, "logit_scale must be finite and not 0"),
        ({"topk": -1}, "topk must be at least 0, got -1"),
        ({"topk": 62}, "topk must be at most 61, the size of the vocabulary; got 62"),
        ({"topk": 34, "vocab_size": 33}, "topk must be at most 33"),
        ({"topk": 2.0}, "topk must be an int"),
        ({"topk": True}, "topk must be an int"),
        ({"entropy": 1}, "entropy must be True or False"),
        ({"vocab_size": 62}, r"vocab_size must be in \[1, 61\]"),
        ({"chunk_size": 0}, "chunk_size must be positive"),
        ({"ignore_index": 0.5}, "ignore_index must be an int"),
        ({"hidden": torch.zeros(3, 6)}, r"weight must be \[V, 6\]"),
        ({"weight": torch.zeros(61, 7, dtype=torch.float64)}, "weight must be torch.float32"),
        ({"bias": torch.zeros(60)}, r"bias must be \[61\]"),
        ({"hidden": torch.zeros(3, 7, device="meta")}, "hidden must have values"),
        ({"sequence_dim": 0}, "sequence_dim is for processes that share the vocabulary"),
        ({"targets": None, "entropy": False}, "nothing is requested"),
    ],
)  # fmt: skip
def test_messages(change: dict[str, Any], message: str) -> None:
    made = problem(3)
    arguments: dict[str, Any] = made._asdict() | {"ids": None} | change
    hidden, weight = arguments.pop("hidden"), arguments.pop("weight")
    with pytest.raises((ValueError, TypeError), match=message):
        fused_linear_logprobs(hidden, weight, **arguments)


# ---- under torch.compile


def _of_call(tensors: Problem, temperature: Any, cap: float | None, mask: Tensor | None) -> Tensor:
    outputs = actual(tensors, 2, temperature=temperature, softcap=cap, mask=mask)
    return weighted(outputs)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.heavy_with(kernels="triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_graph(kernels: str, dtype: torch.dtype) -> None:
    torch._dynamo.utils.counters.clear()  # earlier tests have left theirs
    compiled = torch.compile(_of_call, fullgraph=True, backend="aot_eager")
    made = problem(4, 3, dtype=dtype)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 1] = False
    # The second value makes the temperature an input of the graph, which then serves all later ones.
    for temperature, cap in itertools.product((1.0, 0.7, 2.0), (3.0,)):
        mine, eager = made.leaves(), made.leaves()
        loss, right = (
            f(x, temperature, cap, mask) for f, x in ((compiled, mine), (_of_call, eager))
        )
        torch.testing.assert_close(loss, right)
        for value, reference in zip(gradients(loss, mine), gradients(right, eager), strict=True):
            assert torch.equal(value, reference)
    assert len(torch._dynamo.utils.counters["graph_break"]) == 0
    with pytest.raises(ValueError, match="temperature must be positive"):
        compiled(made.leaves(), -1.0, 3.0, mask)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.heavy_with(kernels="triton")
def test_one_graph_with_some_outputs(kernels: str) -> None:
    made = problem(3)
    frozen = made._replace(weight=made.weight.requires_grad_(False))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(hidden: Tensor) -> tuple[Tensor, Tensor]:
        entropy = fused_linear_logprobs(hidden, frozen.weight).entropy
        return entropy, student_topk(hidden, frozen.weight, k=3).ids

    hidden = made.hidden.clone().requires_grad_()
    entropy, ids = compiled(hidden)
    right = fused_linear_logprobs(hidden, frozen.weight, topk=3)
    assert torch.equal(entropy, right.entropy) and torch.equal(ids, right.topk_ids)
    (value,), (reference,) = (
        torch.autograd.grad(x.sum(), hidden) for x in (entropy, right.entropy)
    )
    assert torch.equal(value, reference)


@pytest.mark.usefixtures("fresh_compiler")
def test_numbers_of_numpy_and_dynamic_rows() -> None:
    made = problem(4)

    def of_hidden(hidden: Tensor, targets: Tensor, temperature: Any, k: Any, size: Any) -> Tensor:
        outputs = fused_linear_logprobs(
            hidden, made.weight, targets, temperature=temperature, topk=k, chunk_size=size
        )
        return outputs.target.sum() + outputs.topk_logprobs.sum()

    numbers = (np.float32(0.5), np.int64(3), np.int32(2))
    in_parts = torch.compile(of_hidden, backend="aot_eager")
    whole = torch.compile(of_hidden, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 4, 9):
        hidden = problem(rows).hidden.requires_grad_()
        targets = problem(rows).targets
        for of_value, arguments in ((in_parts, numbers), (whole, (0.5, 3, 2))):
            value = of_value(hidden, targets, *arguments)
            right = of_hidden(hidden, targets, 0.5, 3, 2)
            torch.testing.assert_close(value, right)
            torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (value, right)))
    with pytest.raises(ValueError, match="temperature must be positive"):
        in_parts(made.hidden, made.targets, np.float32(-1.0), *numbers[1:])


# ---- student_topk


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_top_tokens_are_those_of_a_stable_sort(data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 700))
    k = data.draw(st.integers(1, min(columns, 90)))
    levels = data.draw(st.integers(1, 40))  # few levels make many ties
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    z = torch.randint(-levels, levels + 1, (4, columns), generator=generator) / 8
    z = torch.where(torch.rand(4, columns, generator=generator) < 0.1, -math.inf, z)
    negative = torch.rand(4, columns, generator=generator) < 0.5
    z = torch.where((z == 0) & negative, -0.0, z)  # equal to 0.0
    for dtype in (torch.float32, torch.float64):
        order = z.to(dtype).sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(in_torch.top_tokens(z.to(dtype), k), order)


def test_top_tokens_of_many_columns() -> None:
    # 20,020 columns are 625 blocks and a remainder of 20; blocks are used for k up to 312.
    z = torch.randn(3, 20_020, generator=torch.Generator().manual_seed(0))
    z[1] = z[1].round(decimals=1)
    z[2, -1], z[2, 0] = 50.0, 50.0
    order = z.sort(dim=-1, descending=True, stable=True).indices
    for k in (1, 64, 312, 313):
        assert torch.equal(in_torch.top_tokens(z, k), order[:, :k])
    z[0, 777] = math.nan
    assert in_torch.top_tokens(z, 2)[0, 0] == 777


@temperings
@pytest.mark.only_where(lambda kernels, dtype: kernels == "portable" or dtype != torch.float64)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_student_topk(kernels: str, tempering: dict[str, Any], dtype: torch.dtype) -> None:
    made = problem(3, 2, dtype=dtype)
    logits = made.hidden.double() @ made.weight.double().T + made.bias.double()
    exact = of_logits(tempered(logits, tempering), made.targets, made.ids, 5)
    fused = student_topk(made.hidden, made.weight, k=5, bias=made.bias, chunk_size=2, **tempering)
    assert torch.equal(fused.ids, exact.topk_ids)
    torch.testing.assert_close(fused.logprobs.double(), exact.topk_logprobs, rtol=1e-5, atol=1e-5)
    rows = logits.to(dtype)
    exact = of_logits(tempered(rows.double(), tempering), made.targets, made.ids, 5)
    dense = student_topk(rows.requires_grad_(), k=5, **tempering)
    assert torch.equal(dense.ids, exact.topk_ids) and not dense.logprobs.requires_grad
    torch.testing.assert_close(dense.logprobs.double(), exact.topk_logprobs, rtol=1e-5, atol=1e-5)


@temperings
def test_student_topk_of_masked_logits(kernels: str, tempering: dict[str, Any]) -> None:
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(7))
    masked = math.inf if tempering.get("logit_scale", 1.0) < 0 else -math.inf
    logits[:, ::3] = masked
    exact = tempered(logits.double(), tempering).log_softmax(-1)
    top = student_topk(logits, k=60, **tempering)
    torch.testing.assert_close(
        top.logprobs.double(), exact.gather(-1, top.ids), rtol=1e-5, atol=1e-5
    )
    if "softcap" not in tempering:
        assert (top.logprobs[:, 46:] == -math.inf).all() and (top.ids[:, 46:] % 3 == 0).all()


def test_student_topk_leaves_the_logits_and_padding_alone(kernels: str) -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    logits[:, 7:] = 99.0
    before = logits.clone()
    mask = torch.tensor([True, False, True, True])
    top = student_topk(logits, k=3, vocab_size=7, mask=mask, temperature=2.0, softcap=5.0)
    assert torch.equal(logits, before) and (top.ids < 7).all()
    assert (top.ids[1] == -1).all() and (top.logprobs[1] == -math.inf).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 10}, "k must be at most 9, the size of the vocabulary; got 10"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 2, "bias": torch.zeros(9)}, "bias belongs to weight, and weight is None"),
        (
            {"k": 2, "weight": torch.zeros(9, 4)},
            r"weight must be \[V, 9\], the width of student; got",
        ),
        (
            {"k": 2, "weight": torch.zeros(9, 9).double()},
            "weight must be torch.float32, the dtype of student; got",
        ),
        (
            {"k": 2, "student": None, "weight": torch.zeros(9, 4)},
            "student must be a tensor, got NoneType",
        ),
        (
            {"k": 2, "student": torch.zeros(()), "weight": torch.zeros(9, 4)},
            r"student must be \[..., H\]",
        ),
        (
            {"k": 2, "student": torch.zeros(3, 9).int(), "weight": torch.zeros(9, 9)},
            "student must be float32",
        ),
        ({"k": 2, "mask": torch.ones(3)}, "mask must be torch.bool"),
    ],
)
def test_messages_of_student_topk(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        student_topk(**{"student": torch.zeros(3, 9)} | arguments)


def test_a_support_of_both_models(kernels: str) -> None:
    """The ids of both, scored by both: a TopK of them has the divergence on the union, with a bucket for the rest."""
    made = problem(5, columns=30)
    teacher = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    of_teacher = fastkd.TopK.from_logits(teacher, 3)
    own = student_topk(made.hidden, made.weight, k=3, bias=made.bias)
    ids = fastkd.support_union(of_teacher.ids, own.ids)
    scores = teacher.log_softmax(-1).gather(-1, ids.clamp(min=0))
    both = fastkd.TopK(ids, scores)
    loss = fastkd.fused_linear_kd_loss(
        made.hidden,
        made.weight,
        both,
        student_bias=made.bias,
        divergence="reverse_kl",
        reduction="none",
    )
    gathered = fused_linear_logprobs(made.hidden, made.weight, ids=ids, bias=made.bias).gathered
    log_q, log_p = gathered.double(), scores.double().masked_fill(ids < 0, -math.inf)
    tails = [torch.log1p(-x.exp().sum(-1)) for x in (log_q, log_p)]
    terms = torch.where(ids < 0, 0.0, log_q.exp() * (log_q - log_p))
    right = terms.sum(-1) + tails[0].exp() * (tails[0] - tails[1])
    torch.testing.assert_close(loss.double(), right, rtol=1e-4, atol=1e-5)
