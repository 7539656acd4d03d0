"""fused_linear_logprobs against the chunked log-probabilities of TRL and of Liger, which run in PyTorch on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
    LigerFusedLinearScaledCrossEntropyFunction as LigerFunction,
)
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from fastkd import fused_linear_logprobs

ROWS, WIDTH, COLUMNS = 9, 16, 203


def problem(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden": made(ROWS, WIDTH),
        "weight": made(COLUMNS, WIDTH),
        "bias": made(COLUMNS),
        "targets": torch.randint(COLUMNS, (ROWS,), generator=generator),
        "upstream": torch.randn(2 + 3, ROWS, generator=generator),
    }


def leaves(given: dict[str, Tensor], *names: str) -> list[Tensor]:
    return [given[name].clone().requires_grad_() for name in names]


def assert_close(values: Any, rights: Any, dtype: torch.dtype) -> None:
    # TRL rounds bfloat16 logits before it takes their log-softmax; fastkd does not.
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for value, right in zip(values, rights, strict=True):
        gap = (value.double() - right.double()).norm() / right.double().norm()
        assert gap < tolerance, gap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("temperature", "scale", "softcap"), [(1.0, 1.0, None), (0.7, 1.5, None), (1.3, 0.5, 4.0)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_trl(
    dtype: torch.dtype, temperature: float, scale: float, softcap: float | None, biased: bool
) -> None:
    given = problem(dtype)
    names = ("hidden", "weight", "bias") if biased else ("hidden", "weight")
    theirs, ours = leaves(given, *names), leaves(given, *names)
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        *theirs, *(() if biased else (None,)), given["targets"], temperature, 64, softcap, scale,
        ("entropy",),
    )  # fmt: skip
    mine = fused_linear_logprobs(
        *ours[:2], given["targets"], bias=ours[2] if biased else None, temperature=temperature,
        logit_scale=scale, softcap=softcap, chunk_size=4,
    )  # fmt: skip
    assert_close((mine.target, mine.entropy), (logprobs, entropy), dtype)
    upstream = list(given["upstream"][:2])
    assert_close(
        torch.autograd.grad([mine.target, mine.entropy], ours, upstream),
        torch.autograd.grad([logprobs, entropy], theirs, upstream),
        dtype,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_liger(temperature: float) -> None:
    given = problem()
    targets = given["targets"].clone()
    targets[[2, 5]] = -100
    kept = targets != -100
    theirs, ours = leaves(given, "hidden", "weight"), leaves(given, "hidden", "weight")
    selected = torch.tensor([7, 0, 200])  # Liger gathers the same tokens in every row
    losses, entropy, chosen = LigerFunction.apply(
        *theirs, targets, temperature, -100, 1, True, selected
    )
    mine = fused_linear_logprobs(
        *ours, targets, ids=selected.expand(ROWS, -1), temperature=temperature, chunk_size=4
    )
    gathered = torch.where(kept.unsqueeze(-1), mine.gathered, 0.0)
    assert_close((-mine.target, mine.entropy, gathered), (losses, entropy, chosen), torch.float32)
    upstream = [given["upstream"][0], given["upstream"][1], given["upstream"][2:].T]
    kept_upstream = [torch.where(kept.view(-1, *(1,) * (x.dim() - 1)), x, 0.0) for x in upstream]
    assert_close(
        torch.autograd.grad([-mine.target, mine.entropy, mine.gathered], ours, kept_upstream),
        torch.autograd.grad([losses, entropy, chosen], theirs, kept_upstream),
        torch.float32,
    )
