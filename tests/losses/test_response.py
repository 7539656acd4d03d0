"""Losses on the teacher's response, each against its published formula in float64, differentiated by autograd.

The bar: an error of at most twice that of plain float32 PyTorch in the same row, plus a few units in the last place of
the row's largest element. (Twice, because either order of the same operations may be the more exact one.)
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import ULP, assert_within, labels_for, logits, ran_on, upstream_for
from support.interpreters import python
from support.oracles import DIVERGENCES
from torch import Tensor

import fastkd
from fastkd import response
from fastkd.engine.plan import Budget
from fastkd.response import (
    adaptive_kl,
    adaptive_kl_loss,
    chunks,
    common_positions,
    dist_loss,
    policy_distillation_loss,
    standardized_kd_loss,
    uld_loss,
)

INF, NAN = math.inf, math.nan


# ---- the formulas: logits [N, V] to one value per row [N]


def head_of(p: Tensor, mass: float, crossing: str) -> Tensor:
    """Bool mask [N, V] of the head, by a full sort."""
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    held = ordered.cumsum(-1)
    before = held - ordered
    inside = before < mass if crossing == "head" else held <= mass
    inside[:, 0] = True
    return torch.zeros_like(inside).scatter(-1, order, inside)


def adaptive(
    s: Tensor, t: Tensor, temperature: Any = 1.0, mass: float = 0.5, crossing: str = "head"
) -> Tensor:
    log_q, log_p = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    with torch.no_grad():
        gap = (p - q).abs()
        head = head_of(p, mass, crossing)
        share = (gap * head).sum(-1) / gap.sum(-1)
        share = share.nan_to_num(0.5)
    square = (s.new_zeros(len(s), 1) + temperature).squeeze(-1) ** 2
    forward = DIVERGENCES["forward_kl"](log_p, log_q).sum(-1)
    backward = DIVERGENCES["reverse_kl"](log_p, log_q).sum(-1)
    return square * (share * forward + (1 - share) * backward)


def standardized(
    s: Tensor, t: Tensor, temperature: Any = 2.0, eps: float = 1e-7, divergence: str = "forward_kl"
) -> Tensor:
    def log_probs(z: Tensor) -> Tensor:
        z = (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + eps)
        return (z / temperature).log_softmax(-1)

    square = (s.new_zeros(len(s), 1) + temperature).squeeze(-1) ** 2
    return square * DIVERGENCES[divergence](log_probs(t), log_probs(s)).sum(-1)


def uld(s: Tensor, t: Tensor, temperature: Any = 1.0) -> Tensor:
    q, p = (
        z.div(temperature).softmax(-1).sort(dim=-1, descending=True, stable=True).values
        for z in (s, t)
    )
    width = max(q.shape[-1], p.shape[-1])
    return sum(
        (F.pad(q, (0, width - q.shape[-1])) - F.pad(p, (0, width - p.shape[-1]))).abs().unbind(-1)
    )


def pearson(x: Tensor, y: Tensor, eps: float) -> Tensor:
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1) + eps)


def dist(
    s: Tensor, t: Tensor, beta: float, gamma: float, temperature: float = 1.0, eps: float = 1e-8
) -> Tensor:
    q, p = (s / temperature).softmax(-1), (t / temperature).softmax(-1)
    between, within = 1 - pearson(q, p, eps).mean(), 1 - pearson(q.T, p.T, eps).mean()
    return temperature**2 * (beta * between + gamma * within)


ROWS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "adaptive": (adaptive_kl_loss, adaptive),
    "standardized": (standardized_kd_loss, standardized),
    "uld": (uld_loss, uld),
}
by_rows = pytest.mark.parametrize("name", ROWS)


def differentiated(
    loss: Callable[..., Tensor], *leaves: Tensor, upstream: Any = None
) -> list[Tensor]:
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def assert_within_bar(
    ours: list[Tensor], formula: Callable[..., Tensor], s: Tensor, t: Tensor, upstream: Any = None
) -> None:
    """Assert that value and gradients are within the bar; s and t have two dimensions."""
    widened = [
        None if upstream is None else upstream.to(x)
        for x in (torch.zeros(()).double(), torch.zeros(()))
    ]
    exact = differentiated(formula, s.double(), t.double(), upstream=widened[0])
    plain = differentiated(formula, s.float(), t.float(), upstream=widened[1])
    for computed, true, reference in zip(ours, exact, plain, strict=True):
        whole = true.dim() == 2
        size, error = true.abs(), (reference.double() - true).abs()
        if whole:
            size, error = size.amax(-1, keepdim=True), error.amax(-1, keepdim=True)
        allowed = 2 * error + 16 * ULP * size + 1e-9 + torch.zeros_like(true)
        if computed.dtype in (torch.bfloat16, torch.float16) and whole:
            information = torch.finfo(computed.dtype)
            allowed += (
                true.abs() * information.eps / 2 + information.smallest_normal * information.eps
            )
        assert_within("response", computed, true, allowed)


# ---- against the formulas


# One chunk and several; below and above a vector's width; low precision, which has many equal logits.
@by_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "temperature"), [((7, 33), 1.0), ((2, 4, 1024), 3.0), ((5, 517), 0.5)]
)
def test_rows(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], temperature: float, monkeypatch: Any
) -> None:
    budget = Budget(cpu=3 * 4 * shape[-1] * chunks.TEMPORARIES, other=1)
    monkeypatch.setattr(chunks, "RESPONSE_BUDGET", budget)
    loss, formula = ROWS[name]
    s, t = logits(*shape, seed=1, dtype=dtype), logits(*shape, seed=2, dtype=dtype)
    # Powers of 2, so that the upstream factor does not round.
    upstream = upstream_for(*shape[:-1]).sign() * 4.0
    before = s.clone(), t.clone()
    actual = differentiated(
        lambda s, t: loss(s, t, temperature=temperature, scale_by_temperature=True, reduction="none"),
        s, t, upstream=upstream,
    )  # fmt: skip
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    assert actual[0].shape == shape[:-1] and torch.equal(s, before[0]) and torch.equal(t, before[1])

    def of(s: Tensor, t: Tensor) -> Tensor:
        value = formula(s, t, temperature)
        return value * temperature**2 if name == "uld" else value

    flat = [actual[0].flatten(), *(x.flatten(0, -2) for x in actual[1:])]
    assert_within_bar(flat, of, s.flatten(0, -2), t.flatten(0, -2), upstream.flatten())


@by_rows
def test_gradcheck(name: str) -> None:
    loss, _ = ROWS[name]
    s, t = (logits(4, 6, seed=seed, dtype=torch.float64).requires_grad_() for seed in (3, 4))
    weight = torch.tensor([1.0, 0.5, 0.0, -2.0])
    # The weights of adaptive KL are constants, which finite differences ignore; test_adaptive_kl checks its gradient.
    if name != "adaptive":
        for reduction in ("none", "sum", "mean", "batchmean"):
            assert torch.autograd.gradcheck(
                lambda s, t, r=reduction: loss(s, t, weight=weight, temperature=1.5, reduction=r),
                (s, t),
            )
    assert torch.autograd.gradcheck(
        lambda s, t: dist_loss(s, t, temperature=1.5, gamma=0.7), (s, t)
    )


@by_rows
def test_options_of_rows(name: str) -> None:
    """mask, labels, weight, one temperature per row and num_items against the formula for the counted rows."""
    loss, formula = ROWS[name]
    shape = (3, 5, 40)
    s, t = (logits(*shape, seed=seed, dtype=torch.float64) for seed in (5, 6))
    labels = labels_for(3, 5, vocabulary=40, seed=7, ignored=0.3)
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(8)) < 0.7
    weight, temperature = (
        upstream_for(3, 5).double(),
        0.5 + upstream_for(3, 5, seed=3).abs().double(),
    )
    keep = (labels != -100) & mask
    s[~keep], t[~keep] = NAN, NAN  # a dropped row is not read
    options: dict[str, Any] = {
        "mask": mask, "weight": weight, "temperature": temperature, "scale_by_temperature": True,
    }  # fmt: skip

    def of(s: Tensor, t: Tensor) -> Tensor:
        at = temperature.float().double()[keep].unsqueeze(-1)  # temperatures are stored in float32
        value = formula(s[keep], t[keep], at) * (at.squeeze(-1) ** 2 if name == "uld" else 1.0)
        return (value * weight[keep]).sum() / 11

    actual = differentiated(lambda s, t: loss(s, t, labels, num_items=11, **options), s, t)
    exact = differentiated(of, s, t)
    for computed, true in zip(actual, exact, strict=True):
        torch.testing.assert_close(computed, true.nan_to_num(), rtol=1e-9, atol=1e-12)
    mean = loss(s, t, labels, **options)
    torch.testing.assert_close(mean * int(keep.sum()), actual[0] * 11)
    per_row = loss(s, t, labels, reduction="none", **options)
    assert (per_row[~keep] == 0).all() and (per_row[keep] != 0).all()
    torch.testing.assert_close(loss(s, t, labels, reduction="sum", **options), per_row.sum())


@by_rows
def test_vocab_size_and_strides(name: str) -> None:
    loss, _ = ROWS[name]
    s, t = logits(2, 6, 24, seed=1), logits(2, 6, 24, seed=2)
    narrow = {} if name == "uld" else {"vocab_size": 24}
    wide = [F.pad(x, (0, 5), value=7.0).transpose(0, 1)[1:] for x in (s, t)]
    expected = differentiated(loss, *(x.transpose(0, 1)[1:].contiguous() for x in (s, t)))
    if narrow:
        actual = differentiated(lambda s, t: loss(s, t, **narrow), *wide)
        assert all((g[..., 24:] == 0).all() for g in actual[1:])
        for computed, true in zip(actual, expected, strict=True):
            assert torch.equal(computed, true if true.dim() == 0 else F.pad(true, (0, 5)))
    strided = differentiated(loss, *(x.transpose(0, 1)[1:] for x in (s, t)))
    columns = differentiated(loss, *(x.mT.contiguous().mT.transpose(0, 1)[1:] for x in (s, t)))
    for a, b, c in zip(expected, strided, columns, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    one = s[:1, :1].expand(2, 3, 24)
    torch.testing.assert_close(loss(one, t[:, :3]), loss(one.contiguous(), t[:, :3]))


@pytest.mark.parametrize("loss", [*(pair[0] for pair in ROWS.values()), dist_loss])
def test_no_rows(loss: Callable[..., Tensor]) -> None:
    s = torch.randn(0, 5, requires_grad=True)
    value = loss(s, torch.randn(0, 5))
    value.backward()
    assert value == 0 and s.grad.shape == (0, 5)
    s = torch.randn(3, 5, requires_grad=True)
    value = loss(s, torch.full((3, 5), NAN), mask=torch.zeros(3, dtype=torch.bool))
    value.backward()
    assert value == 0 and (s.grad == 0).all()
    one = torch.randn(5, requires_grad=True)  # a single row
    loss(one, torch.randn(5)).backward()
    assert one.grad.isfinite().all()


@pytest.mark.parametrize("loss", [adaptive_kl_loss, standardized_kd_loss, uld_loss, dist_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autograd(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    s = logits(4, 6, seed=1, dtype=dtype).requires_grad_()
    t = logits(4, 6, seed=2)
    value = loss(s, t)
    (first,) = torch.autograd.grad(value, s, retain_graph=True)
    (again,) = torch.autograd.grad(2.0 * value, s, retain_graph=True)
    (created,) = torch.autograd.grad(value, s, create_graph=True)
    torch.testing.assert_close(2 * first, again)
    assert torch.equal(first, created)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        created.sum().backward()
    (squared,) = torch.autograd.grad(loss(s, t) ** 2, s)
    torch.testing.assert_close(squared, 2 * value.detach().to(dtype) * first, rtol=2e-3, atol=1e-6)
    with torch.no_grad():
        assert not loss(s, t).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(s, t).dtype == torch.float32
    if dtype == torch.float16:  # a gradient too small for float16 without a loss scaler
        scaled = torch.autograd.grad(loss(s, t) * 1e-7 * 2.0**24, s)[0]
        assert scaled.abs().max() > 0.1 * 1e-7 * 2**24 * first.abs().max()
    compiled = torch.compile(lambda s, t: loss(s, t) * 2, backend="eager")
    torch.testing.assert_close(compiled(s, t), 2 * value)


def test_upstream_gradients_of_dropped_rows_are_ignored() -> None:
    s, t = logits(3, 6, seed=1).requires_grad_(), logits(3, 6, seed=2)
    mask = torch.tensor([True, False, True])
    for loss, _ in ROWS.values():
        value = loss(s, t, mask=mask, reduction="none")
        (gradient,) = torch.autograd.grad(value, s, torch.tensor([1.0, NAN, INF]))
        assert (gradient[1] == 0).all() and gradient[0].isfinite().all()


@by_rows
def test_properties(name: str) -> None:
    """Losses are invariant to shifts and to permutations of the vocabulary and of the rows."""
    loss, _ = ROWS[name]
    s, t = (logits(6, 50, seed=seed, dtype=torch.float64) for seed in (1, 2))
    base = differentiated(lambda s, t: loss(s, t, reduction="none").sum(), s, t)
    shifted = differentiated(lambda s, t: loss(s + 1e4, t - 1e4), s, t)
    torch.testing.assert_close(shifted[0] * 6, base[0])
    order, rows = torch.randperm(50), torch.randperm(6)
    permuted = differentiated(
        lambda s, t: loss(s, t, reduction="sum"), s[rows][:, order], t[rows][:, order]
    )
    torch.testing.assert_close(permuted[0], base[0])
    for computed, true in zip(permuted[1:], base[1:], strict=True):
        torch.testing.assert_close(computed, true[rows][:, order])
        assert computed.sum(-1).abs().max() < 1e-12
    same = differentiated(lambda s: loss(s, s.detach(), reduction="sum"), s)
    assert same[0].abs() < 1e-12 and same[1].abs().max() < 1e-7


def test_memory_budget() -> None:
    s, t = torch.randn(2, 40), torch.randn(2, 40)
    for loss in (adaptive_kl_loss, standardized_kd_loss, uld_loss, dist_loss):
        a = loss(s, t, memory_budget=1 << 20)
        assert torch.equal(a, loss(s, t))
        least = 5120 if loss is dist_loss else 4480
        with pytest.raises(
            ValueError, match=f"memory_budget must be at least {least} bytes, which one row"
        ):
            loss(s, t, memory_budget=least - 1)
        with pytest.raises(TypeError, match="memory_budget must be an int or None, got float"):
            loss(s, t, memory_budget=1e6)


PEAK = """
import ctypes, json, sys
from pathlib import Path
import torch
from fastkd import _C, response

def status(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field + ":"))

name, dtype, budget = json.loads(sys.argv[1])
s, t = (torch.randn(256, 32_768).to(getattr(torch, dtype)) for _ in range(2))
def step(n):
    a, b = s[:n].clone().requires_grad_(), t[:n].clone().requires_grad_()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    getattr(response, name)(a, b, memory_budget=budget).backward()
    return status("VmHWM") - before - a.grad.nbytes - b.grad.nbytes
step(4)
_C.release_idle_outputs()
ctypes.CDLL(None).malloc_trim(0)
print(step(256))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["adaptive_kl_loss", "standardized_kd_loss", "uld_loss", "dist_loss"]
)
def test_peak_memory_is_the_budget(name: str, dtype: str) -> None:
    budget = 64 << 20
    command = [sys.executable, "-c", PEAK, json.dumps([name, dtype, budget])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[-1])
    assert peak <= 1.1 * budget, f"{peak / 2**20:.0f} MiB"


@pytest.mark.parametrize("loss", [adaptive_kl_loss, standardized_kd_loss])
def test_which_backend_runs(loss: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = ran_on(monkeypatch, "reference", "cpu")
    s, t = torch.randn(3, 8), torch.randn(3, 8)
    results = [loss(s, t), loss(s, t, backend="reference")]
    assert set(ran[: len(ran) // 2]) == {"cpu"} and set(ran[len(ran) // 2 :]) == {"reference"}
    torch.testing.assert_close(*results)


# ---- adaptive KL


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), width=st.integers(1, 700), spread=st.sampled_from([0.0, 0.3, 2.0, 8.0]),
    levels=st.sampled_from([0, 2, 8]), mass=st.sampled_from([0.05, 0.31, 0.5, 0.9, 0.999]),
    crossing=st.sampled_from(["head", "tail"]),
)  # fmt: skip
def test_the_threshold_search_finds_the_head_of_a_sort(
    seed: int, width: int, spread: float, levels: int, mass: float, crossing: str
) -> None:
    """Both searches agree for ties, for flat rows whose head is all tokens, and for rows of one token."""
    t = logits(3, width, seed=seed, spread=spread, dtype=torch.float64)
    if levels:
        t = (t * levels / 4).round()
    p = t.softmax(-1)
    held = p.sort(-1, descending=True).values.cumsum(-1)
    clear = (held - mass).abs().amin(-1) > 1e-9  # where rounding does not decide
    lowest, tied = adaptive_kl._head(t, p, mass, crossing)
    inside = t > lowest.unsqueeze(-1)
    equal = t == lowest.unsqueeze(-1)
    inside |= equal & (equal.cumsum(-1) <= tied.unsqueeze(-1))
    assert torch.equal(inside[clear], head_of(p, mass, crossing)[clear])


@pytest.mark.parametrize("crossing", ["head", "tail"])
def test_no_token_crosses_a_mass_that_is_reached_exactly(crossing: str) -> None:
    t = torch.zeros(1, 4, dtype=torch.float64)
    lowest, tied = adaptive_kl._head(t, t.softmax(-1), 0.5, crossing)
    assert lowest.tolist() == [0.0] and tied.tolist() == [2]


@pytest.mark.parametrize("mass", [0.2, 0.5, 0.97])
@pytest.mark.parametrize("crossing", ["head", "tail"])
@pytest.mark.parametrize("width", [3, 64, 65, 600])
def test_adaptive_kl(mass: float, crossing: str, width: int) -> None:
    s, t = (logits(9, width, seed=seed, spread=1.0, dtype=torch.float64) for seed in (1, 2))
    actual = differentiated(
        lambda s, t: adaptive_kl_loss(
            s, t, head_mass=mass, crossing=crossing, reduction="none"
        ).sum(),
        s,
        t,
    )
    exact = differentiated(lambda s, t: adaptive(s, t, 1.0, mass, crossing).sum(), s, t)
    for computed, true in zip(actual, exact, strict=True):
        torch.testing.assert_close(computed, true, rtol=1e-10, atol=1e-13)


def test_adaptive_kl_of_the_published_code() -> None:
    """The authors' code puts the crossing token into the tail unless it is the first, and sums both KLs."""
    s, t = logits(40, 30, seed=1, dtype=torch.float64), logits(40, 30, seed=2, dtype=torch.float64)
    p, q = t.softmax(-1), s.softmax(-1)
    expected = []
    for row_p, row_q in zip(p, q, strict=True):
        held, gaps = 0.0, [0.0, 0.0]
        for rank, token in enumerate(row_p.argsort(descending=True).tolist()):
            held += float(row_p[token])
            gaps[int(held > 0.5 and rank > 0)] += float((row_p[token] - row_q[token]).abs())
        ratio = [gap / sum(gaps) for gap in gaps]
        kl = (row_p * (row_p / row_q).log()).sum(), (row_q * (row_q / row_p).log()).sum()
        expected.append(ratio[0] * kl[0] + ratio[1] * kl[1])
    actual = adaptive_kl_loss(s, t, crossing="tail", reduction="none")
    torch.testing.assert_close(actual, torch.stack(expected))
    assert not torch.allclose(actual, adaptive_kl_loss(s, t, crossing="head", reduction="none"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_adaptive_kl_at_the_edges(backend: str) -> None:
    s = logits(2, 70, seed=1).requires_grad_()
    value = adaptive_kl_loss(s, s.detach(), backend=backend)
    value.backward()
    assert value.abs() < 1e-6 and s.grad.abs().max() < 1e-6
    # Columns that both sides exclude have no effect.
    t, gone = logits(2, 70, seed=2), torch.tensor([INF] * 5)
    t = torch.cat([t, -gone.expand(2, 5)], -1)
    wide = torch.cat([s.detach(), -gone.expand(2, 5)], -1).requires_grad_()
    a = adaptive_kl_loss(wide, t, backend=backend)
    a.backward()
    b = adaptive_kl_loss(s, t[:, :70], backend=backend)
    torch.testing.assert_close(a, b)
    assert (wide.grad[:, 70:] == 0).all() and wide.grad.isfinite().all()
    # One token has all the mass; a NaN affects only its row.
    t = torch.zeros(2, 70).index_fill_(1, torch.tensor([3]), 500.0)
    t[1, 4] = NAN
    loss = adaptive_kl_loss(s, t, reduction="none", backend=backend)
    assert loss[1].isnan() and not loss[0].isnan()


# ---- DIST


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (2.0, 0.0), (0.0, 0.5)])
def test_dist(beta: float, gamma: float, dtype: torch.dtype, monkeypatch: Any) -> None:
    s, t = (logits(11, 37, seed=seed, dtype=dtype) for seed in (1, 2))
    exact = differentiated(
        lambda s, t: dist(s, t, beta, gamma, 2.0),
        s.double(),
        t.double(),
        upstream=torch.tensor(4.0).double(),
    )
    temporaries = chunks.TEMPORARIES + response.dist.DIST_TEMPORARIES
    a_row = 37 * temporaries * max(dtype.itemsize, 4)
    for rows in (1, 4, 100):  # of a chunk
        actual = differentiated(
            lambda s, t, rows=rows: dist_loss(
                s, t, beta=beta, gamma=gamma, temperature=2.0,
                memory_budget=rows * a_row,
            ),
            s, t, upstream=torch.tensor(4.0),
        )  # fmt: skip
        if dtype == torch.float64:
            for computed, true in zip(actual, exact, strict=True):
                torch.testing.assert_close(computed, true, rtol=1e-9, atol=1e-13)
        else:
            assert_within_bar(
                actual, lambda s, t: dist(s, t, beta, gamma, 2.0), s, t, torch.tensor(4.0)
            )


def test_dist_of_nearly_constant_classes() -> None:
    """Columns near 1e-4 with a relative spread of 1e-3 need centred moments, which are merged over the chunks of a
    batch."""
    s = logits(300, 10, seed=1, spread=1e-3) + 10 * torch.arange(10.0) / 10
    t = logits(300, 10, seed=2, spread=1e-3) + 10 * torch.arange(10.0) / 10
    small = 7 * 10 * chunks.TEMPORARIES * 4

    def formula(s: Tensor, t: Tensor) -> Tensor:
        return dist(s, t, 1.0, 1.0, eps=1e-12)

    actual = differentiated(lambda s, t: dist_loss(s, t, eps=1e-12, memory_budget=small), s, t)
    exact, plain = differentiated(formula, s.double(), t.double()), differentiated(formula, s, t)
    for computed, true, reference in zip(actual, exact, plain, strict=True):
        assert (computed - true).abs().max() <= 1.5 * (reference - true).abs().max() + 1e-9


def test_dist_drops_rows_and_is_finite_where_nothing_varies() -> None:
    s, t = (logits(3, 4, 9, seed=seed, dtype=torch.float64) for seed in (1, 2))
    labels = labels_for(3, 4, vocabulary=9, seed=3, ignored=0.4)
    keep = labels != -100
    s[~keep] = NAN
    actual = differentiated(lambda s, t: dist_loss(s, t, labels), s, t)
    exact = differentiated(lambda s, t: dist(s[keep], t[keep], 1.0, 1.0), s, t)
    for computed, true in zip(actual, exact, strict=True):
        torch.testing.assert_close(computed, true.nan_to_num())
    constant = torch.zeros(4, 9, requires_grad=True)
    value = dist_loss(constant, t[0].float())
    value.backward()
    assert value == 2 and constant.grad.isfinite().all()
    one = logits(1, 9, seed=4).requires_grad_()
    value = dist_loss(one, logits(1, 9, seed=5), beta=0.0)
    value.backward()
    assert value == 1 and (one.grad == 0).all()
    same = dist_loss(t[1], t[1], eps=1e-30)
    assert same.abs() < 1e-12


def test_dist_is_invariant_to_affine_maps_of_probabilities() -> None:
    """Moving the teacher's probabilities halfway to uniform does not change DIST, as Pearson's correlation is
    invariant."""
    p = logits(6, 5, seed=1, dtype=torch.float64).softmax(-1)
    flatter = (0.5 * p + 0.1).log()
    assert dist_loss(p.log(), flatter, eps=1e-30).abs() < 1e-12


# ---- logit standardization


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
def test_standardized_with_labels(divergence: str, alpha: float) -> None:
    s, t = (logits(6, 21, seed=seed, dtype=torch.float64) for seed in (1, 2))
    labels = labels_for(6, vocabulary=21, seed=3)

    def formula(s: Tensor, t: Tensor) -> Tensor:
        hard = F.cross_entropy(
            s, labels, label_smoothing=0.1
        )  # the cross-entropy of the unchanged logits
        return alpha * standardized(s, t, 3.0, 1e-2, divergence).mean() + (1 - alpha) * hard

    actual = differentiated(
        lambda s, t: standardized_kd_loss(
            s, t, labels, divergence=divergence, temperature=3.0, eps=1e-2, alpha=alpha, label_smoothing=0.1
        ),
        s, t,
    )  # fmt: skip
    exact = differentiated(
        lambda s, t: formula(s, t) + 0 * t.sum(), s, t
    )  # with alpha = 0 the teacher's gradient is 0
    for computed, true in zip(actual, exact, strict=True):
        torch.testing.assert_close(computed, true, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("divergence", ["forward_kl", "dkd"])
def test_standardized_is_kd_loss_of_standardized_logits(divergence: str) -> None:
    s, t = logits(5, 100, seed=1), logits(5, 100, seed=2)
    options = {"divergence": divergence, "labels": t.argmax(-1), "temperature": 4.0}

    def standardized(z: Tensor) -> Tensor:
        return (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-7)

    actual = differentiated(lambda s: standardized_kd_loss(s, t, **options), s)
    reference = differentiated(
        lambda s: fastkd.kd_loss(standardized(s), standardized(t), **options), s
    )
    for computed, true in zip(actual, reference, strict=True):
        torch.testing.assert_close(computed, true, rtol=1e-5, atol=1e-7)
    # The scale of either side does not matter.
    torch.testing.assert_close(standardized_kd_loss(3 * s, 0.1 * t, **options), actual[0])


def test_standardized_at_the_edges() -> None:
    constant = torch.ones(2, 6, requires_grad=True)
    value = standardized_kd_loss(constant, logits(2, 6, seed=1))
    value.backward()
    assert value.isfinite() and constant.grad.isfinite().all()
    s = logits(2, 4000, seed=1) + 1e4  # a common shift that float32 represents
    t = logits(2, 4000, seed=2)
    exact = standardized(s.double(), t.double()).mean()
    torch.testing.assert_close(standardized_kd_loss(s, t).double(), exact, rtol=2e-6, atol=0)
    gone = logits(2, 6, seed=1)
    gone[0, 0] = -INF
    loss = standardized_kd_loss(gone, logits(2, 6, seed=2), reduction="none")
    assert loss[0].isnan() and loss[1].isfinite()


# ---- unequal vocabularies


@pytest.mark.parametrize("widths", [(30, 50), (50, 30), (1, 7), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_uld_of_unequal_vocabularies(widths: tuple[int, int], dtype: torch.dtype) -> None:
    s, t = logits(6, widths[0], seed=1, dtype=dtype), logits(6, widths[1], seed=2, dtype=dtype)
    temperatures = {"temperature": 2.0, "teacher_temperature": 0.5}
    actual = differentiated(lambda s, t: uld_loss(s, t, **temperatures), s, t)
    assert_within_bar(actual, lambda s, t: uld(s / 2, t * 2).mean(), s, t)
    if dtype == torch.float64:
        exact = differentiated(lambda s, t: uld(s / 2, t * 2).mean(), s, t)
        for computed, true in zip(actual, exact, strict=True):
            torch.testing.assert_close(computed, true, rtol=1e-10, atol=1e-14)


def test_uld_is_the_same_for_any_order_of_each_vocabulary() -> None:
    s, t = logits(4, 20, seed=1), logits(4, 33, seed=2)
    expected = uld_loss(s, t)
    torch.testing.assert_close(
        uld_loss(s[:, torch.randperm(20)], t[:, torch.randperm(33)]), expected
    )
    assert uld_loss(s, s[:, torch.randperm(20)]).abs() < 1e-6
    far = torch.cat([s, torch.full((4, 3), -INF)], -1).requires_grad_()
    value = uld_loss(far, t)
    value.backward()
    torch.testing.assert_close(value, expected)
    assert (far.grad[:, 20:] == 0).all() and far.grad.isfinite().all()


def test_common_positions_match_the_published_code() -> None:
    """Answers of different lengths in different tokens: the mean over answers of the mean over each answer's common
    part."""
    s, t = logits(3, 9, 12, seed=1), logits(3, 7, 15, seed=2)
    spans = [((2, 8), (1, 5)), ((1, 3), (3, 7)), ((4, 9), (2, 7))]
    labels = [torch.full((3, 9), -100), torch.full((3, 7), -100)]
    expected = []
    for row, ((a, b), (c, d)) in enumerate(spans):
        labels[0][row, a:b], labels[1][row, c:d] = 1, 1
        size = min(b - a, d - c)
        expected.append(uld(s[row, a : a + size], t[row, c : c + size]).mean())
    masks = common_positions(*labels)
    assert masks[0].sum(-1).tolist() == masks[1].sum(-1).tolist() == [4, 2, 5]
    weight = (1.0 / masks[0].sum(-1, keepdim=True)).expand(3, 9)[masks[0]]
    actual = uld_loss(s[masks[0]], t[masks[1]], weight=weight, num_items=3)
    torch.testing.assert_close(actual, torch.stack(expected).mean())
    with pytest.raises(ValueError, match="teacher_labels must have 3 rows on cpu"):
        common_positions(labels[0], labels[1][:2])
    with pytest.raises(TypeError, match="student_labels must be an int64 tensor"):
        common_positions(labels[0].float(), labels[1])
    with pytest.raises(ValueError, match=r"teacher_labels must be \[answers, positions\]"):
        common_positions(labels[0], labels[1][0])


# ---- policies


def test_policy_distillation() -> None:
    s, t = (logits(5, 8, seed=seed, dtype=torch.float64) for seed in (1, 2))
    labels = torch.tensor([0, -100, 3, 1, -100])
    keep = labels != -100
    formulas: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "nll": lambda s, t: F.cross_entropy(s, t.argmax(-1), reduction="none"),
        "mse": lambda s, t: (s - t).square().sum(-1),
        "kl": lambda s, t: F.kl_div(
            s.log_softmax(-1), (t / 0.3).log_softmax(-1), reduction="none", log_target=True
        ).sum(-1),
    }
    for form, formula in formulas.items():
        actual = differentiated(
            lambda s, f=form: policy_distillation_loss(s, t, labels, form=f, temperature=0.3), s
        )
        exact = differentiated(lambda s, f=formula: f(s, t)[keep].mean(), s)
        for computed, true in zip(actual, exact, strict=True):
            torch.testing.assert_close(computed, true)
        per_row = policy_distillation_loss(s, t, form=form, temperature=0.3, reduction="none")
        torch.testing.assert_close(per_row, formula(s, t))
    with pytest.raises(ValueError, match="teacher requires grad, and its argmax has no gradient"):
        policy_distillation_loss(s, t.requires_grad_(), form="nll")
    with pytest.raises(ValueError, match="form must be one of nll, mse, kl; got 'q'"):
        policy_distillation_loss(s, t, form="q")


# ---- what the existing losses already are


def test_high_temperature_is_logit_matching() -> None:
    """T^2 KL tends to 1/(2V) ||(s - mean s) - (t - mean t)||^2 in value and gradient, with an error that falls like 1 /
    T."""
    s, t = (logits(4, 30, seed=seed, dtype=torch.float64) for seed in (1, 2))
    gap = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    value, gradient = gap.square().sum(-1).mean() / 60, gap / 30 / 4
    errors = []
    for temperature in (10.0, 100.0, 1000.0):
        actual = differentiated(lambda s, T=temperature: fastkd.kd_loss(s, t, temperature=T), s)
        errors.append(
            (
                (actual[0] - value).abs() / value,
                (actual[1] - gradient).abs().max() / gradient.abs().max(),
            )
        )
    assert max(errors[-1]) < 0.01
    for before, after in itertools.pairwise(errors):
        for a, b in zip(before, after, strict=True):
            assert 7 < a / b < 14
    matched = fastkd.kd_loss(s, t, divergence="squared_error")
    torch.testing.assert_close(matched, 0.5 * (s - t).square().sum(-1).mean())


def test_soft_cross_entropy_is_kl_plus_the_teachers_entropy() -> None:
    s, t = (logits(4, 30, seed=seed, dtype=torch.float64) for seed in (1, 2))
    kl = differentiated(lambda s: fastkd.kd_loss(s, t), s)
    soft = differentiated(lambda s: fastkd.kd_loss(s, t, divergence="soft_cross_entropy"), s)
    entropy = torch.distributions.Categorical(logits=t).entropy().mean()
    torch.testing.assert_close(soft[0], kl[0] + entropy)
    torch.testing.assert_close(soft[1], kl[1])


# ---- errors


X = torch.zeros(2, 4)
BAD: list[tuple[Callable[..., Tensor], dict[str, Any], type[Exception], str]] = [
    (adaptive_kl_loss, {"head_mass": 0.0}, ValueError, r"head_mass must be in \(0, 1\), got 0.0"),
    (adaptive_kl_loss, {"head_mass": 1.0}, ValueError, r"head_mass must be in \[0, 1\), got 1.0"),
    (adaptive_kl_loss, {"crossing": "both"}, ValueError, "crossing must be one of head, tail; got 'both'"),
    (adaptive_kl_loss, {"teacher": torch.zeros(2, 5)}, ValueError, "student_logits has 4 columns, teacher has 5"),
    (adaptive_kl_loss, {"teacher": None}, TypeError, "teacher must be a tensor of logits, got NoneType"),
    (adaptive_kl_loss, {"backend": "none"}, ValueError, "backend must be 'auto' or one of"),
    (uld_loss, {"teacher": torch.zeros(3, 5)}, ValueError, "teacher must have the leading shape of student_logits"),
    (uld_loss, {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    (uld_loss, {"mask": torch.ones(2)}, TypeError, "mask must be torch.bool, got torch.float32"),
    (uld_loss, {"reduction": "all"}, ValueError, "reduction must be one of"),
    (dist_loss, {"beta": -1.0}, ValueError, "beta must be in"),
    (dist_loss, {"gamma": "1"}, TypeError, "gamma must be a number, got str"),
    (dist_loss, {"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
    (dist_loss, {"temperature": torch.ones(2)}, TypeError, "temperature must be a number, because a class is"),
    (standardized_kd_loss, {"divergence": "squared_error"}, ValueError, "'squared_error', which compares logits"),
    (standardized_kd_loss, {"divergence": "nkd", "labels": torch.zeros(2).long()}, ValueError, "at temperature 1"),
    (standardized_kd_loss, {"vocab_size": 1}, ValueError, "at least 2 columns for a standard deviation, got 1"),
    (standardized_kd_loss, {"alpha": 0.5}, ValueError, "labels are needed"),
    (standardized_kd_loss, {"eps": -1}, ValueError, "eps must be in"),
    (policy_distillation_loss, {"labels": torch.zeros(3).long(), "form": "nll"}, ValueError, "labels must have one"),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "arguments", "error", "message"), BAD)
def test_errors(loss: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss(**({"student_logits": X, "teacher": X} | arguments))


def test_invalid_temperatures_poison_their_row() -> None:
    temperature = torch.tensor([1.0, -1.0, 0.0])
    s, t = logits(3, 5, seed=1), logits(3, 5, seed=2)
    for loss, _ in ROWS.values():
        value = loss(s, t, temperature=temperature, reduction="none")
        assert value.isnan().tolist() == [False, True, True]


def test_importing_fastkd_does_not_import_response_losses() -> None:
    names = "('response', 'sequences', 'calibration')"
    code = f"import sys, fastkd; sys.exit(any('fastkd.' + name in sys.modules for name in {names}))"
    assert python("-c", code).returncode == 0


def test_an_argmax_equal_to_ignore_index_is_not_dropped() -> None:
    """ignore_index refers to labels only; a row is not dropped because the teacher's best token has that number."""
    student, teacher = torch.randn(2, 5), 3.0 * torch.eye(5)[:2]
    actual = policy_distillation_loss(
        student, teacher, form="nll", ignore_index=0, reduction="none"
    )
    exact = torch.nn.functional.cross_entropy(student, teacher.argmax(-1), reduction="none")
    torch.testing.assert_close(actual, exact)
    labels = torch.tensor([3, 0])
    dropped = policy_distillation_loss(
        student, teacher, labels, form="nll", ignore_index=0, reduction="none"
    )
    torch.testing.assert_close(dropped, exact * torch.tensor([1.0, 0.0]))
