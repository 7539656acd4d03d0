"""Products of bfloat16 matrices on a CPU: against float64, and the conditions under which they are used."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd import fused_linear_kd_loss, fused_linear_logprobs
from fastkd.engine import bf16, matmul
from fastkd.teachers import TopK

needs_amx = pytest.mark.skipif(not bf16.available(), reason="needs AMX, and a torch with MKL")
# One row, one column, one tile of AMX (16 x 32), one more, and more than a slab of matmul.py would take at once.
SIZES = [(1, 1, 1), (1, 33, 5), (16, 16, 32), (17, 33, 31), (5, 2500, 64)]


def _matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * rows + columns)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def _off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@needs_amx
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_products(
    size: tuple[int, int, int], transpose_a: bool, transpose_b: bool, add: bool
) -> None:
    rows, columns, inner = size
    a = _matrix(*((inner, rows) if transpose_a else (rows, inner)), seed=1)
    b = _matrix(*((columns, inner) if transpose_b else (inner, columns)), seed=2)
    # Matrices in wider memory, as the halves of a gradient and the columns of a padded head are.
    a, b = (torch.cat([x, x], 1)[:, : x.shape[1]] for x in (a, b))
    memory = torch.full((rows, columns + 3), math.nan)
    out = memory[:, :columns]
    before = out.copy_(_matrix(rows, columns, torch.float32)).double() if add else 0.0
    assert bf16.multiplies(a, b, out)
    bf16.multiply(a, b, out, transpose_a=transpose_a, transpose_b=transpose_b, add=add)
    left, right = (a.T if transpose_a else a).double(), (b.T if transpose_b else b).double()
    assert _off(out, left @ right + before) < 1e-6
    assert memory[:, columns:].isnan().all()


@needs_amx
def test_what_is_not_multiplied() -> None:
    a, b, out = _matrix(4, 8), _matrix(8, 6), torch.empty(4, 6)
    assert bf16.multiplies(a, b, out)
    for bad in (
        a.float(),
        a.half(),
        a.T,
        a[:, ::2],
        a[:0],
        a[:, :0],
        a[:1].expand(4, 8),
        a.to("meta"),
    ):
        assert not bf16.multiplies(bad, b, out), bad
        assert not bf16.multiplies(b, bad, out), bad
    assert not bf16.multiplies(a, b, out.double())
    assert not bf16.multiplies(a, b, out.T)


@needs_amx
@pytest.mark.parametrize("size", [(1, 1), (3, 17), (200, 1500)])
def test_halves(size: tuple[int, int]) -> None:
    matrix = _matrix(*size, torch.float32)
    matrix = matrix * 10.0 ** torch.linspace(-20, 20, size[0])[:, None]
    exact = matrix.double()
    high, low = bf16.split(matrix)
    assert torch.equal(high, exact.float().bfloat16())
    assert ((high.double() + low.double() - exact).abs() <= 2.0**-17 * exact.abs()).all()


@needs_amx
def test_halves_of_values_that_are_not_finite() -> None:
    values = torch.tensor([[math.inf, -math.inf, math.nan, 1.0]])
    high, low = bf16.split(values.clone())
    torch.testing.assert_close(high.float(), values, equal_nan=True)
    assert torch.equal(low, torch.zeros_like(low))


def _results(case: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows, vocabulary = len(hidden), len(weight)
    ids = torch.rand(rows, vocabulary, generator=generator).topk(5).indices
    if case == "logprobs":
        outputs = fused_linear_logprobs(hidden, weight, ids[:, 0], bias=bias, chunk_size=9)
        assert outputs.target is not None and outputs.entropy is not None
        upstream = torch.randn(2, rows, generator=generator)
        loss = (outputs.target * upstream[0] + outputs.entropy * upstream[1]).sum()
    else:
        log_p = torch.randn(rows, 5, generator=generator).log_softmax(-1) - 0.1
        loss = fused_linear_kd_loss(
            hidden, weight, TopK(ids, log_p, tail="truncate"), divergence="forward_kl",
            student_bias=bias, chunk_size=9,
        )  # fmt: skip
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@needs_amx
@pytest.mark.parametrize("case", ["logprobs", "kd"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trains_the_head", [False, True])
def test_results_are_as_exact_as_those_of_converted_operands(
    case: str, with_bias: bool, trains_the_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    multiply = bf16.multiply

    def counted(*arguments: Any, **options: Any) -> None:
        calls.append(options)
        multiply(*arguments, **options)

    def results(dtype: torch.dtype) -> list[Tensor]:
        hidden, weight, bias = (
            x.to(dtype) for x in (_matrix(31, 40), _matrix(301, 40), _matrix(1, 301)[0])
        )
        hidden.requires_grad_()
        weight.requires_grad_(trains_the_head)
        calls.clear()
        return _results(case, hidden, weight, bias.requires_grad_() if with_bias else None)

    monkeypatch.setattr(bf16, "multiply", counted)
    found = results(torch.bfloat16)
    # 4 chunks; the logits, in both passes of the log-probabilities; two halves for each gradient
    assert len(calls) == 4 * ((2 if case == "logprobs" else 1) + 2 + 2 * trains_the_head)
    exact = results(torch.float64)
    assert not calls
    monkeypatch.setattr(bf16, "_gemm", lambda: None)
    converted = results(torch.bfloat16)
    assert not calls
    for ours, theirs, right in zip(found, converted, exact, strict=True):
        assert _off(ours, right) <= 1.02 * _off(theirs, right) + 1e-6


@needs_amx
def test_threads_do_not_disturb_each_other() -> None:
    hidden, weight = _matrix(64, 96), _matrix(2000, 96)
    wide = _matrix(300, 300, torch.float32)
    expected, expected_wide = hidden.double() @ weight.double().T, wide @ wide
    failures: list[str] = []

    def products() -> None:
        out = torch.empty(64, 2000)
        for _ in range(30):
            matmul.make_logits(hidden, weight, None, out)
            if _off(out, expected) > 1e-6:
                failures.append("bfloat16")

    def other_products() -> None:
        for _ in range(60):
            if not torch.equal(wide @ wide, expected_wide):
                failures.append("float32")

    threads = [threading.Thread(target=run) for run in (products, products, other_products)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_without_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "_gemm", lambda: None)
    assert not bf16.available()
    hidden, weight, out = _matrix(4, 8), _matrix(6, 8), torch.empty(4, 6)
    assert not bf16.multiplies(hidden, weight.T, out)
    matmul.make_logits(hidden, weight, None, out)
    assert _off(out, hidden.double() @ weight.double().T) < 1e-6


@pytest.mark.parametrize("with_amx", [pytest.param(True, marks=needs_amx), False])
@pytest.mark.parametrize("case", ["logprobs", "kd"])
def test_the_gradient_of_the_head_in_one_chunk(
    with_amx: bool, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is rounded a slab at a time, instead of being added up in float32."""
    if not with_amx:
        monkeypatch.setattr(bf16, "_gemm", lambda: None)
    monkeypatch.setattr(matmul, "slab_rows", lambda width: 100)  # the last of the slabs has one row
    totals: list[torch.dtype] = []
    add = matmul.add_weight_gradient

    def noted(gradient: Any, hidden: Tensor, total: Tensor, first: bool) -> None:
        totals.append(total.dtype)
        add(gradient, hidden, total, first)

    monkeypatch.setattr("fastkd.engine.chunks.add_weight_gradient", noted)

    def results(rows: int, dtype: torch.dtype) -> list[Tensor]:
        totals.clear()
        pair = _matrix(rows, 40).to(dtype), _matrix(301, 40).to(dtype)
        return _results(case, pair[0].requires_grad_(), pair[1].requires_grad_(), None)

    (*_, found), dtypes = results(9, torch.bfloat16), list(totals)
    assert dtypes == [torch.bfloat16]
    (*_, exact) = results(9, torch.float64)
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()
    results(10, torch.bfloat16)
    assert totals == [torch.float32] * 2
