"""Comparison of an adapter with the loss that it replaces: both against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ULP = torch.finfo(torch.float32).eps


class Outcome(NamedTuple):
    """A loss, and its gradients under an upstream gradient that is not 1."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


def run(loss: Callable[..., Tensor], inputs: Sequence[Tensor], *others: object) -> Outcome:
    """Compute loss(*inputs, *others) and its gradients by the inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*inputs, *others)
    # -2 for a loss of one element: a power of 2, which does not round a bfloat16 gradient once more.
    upstream = torch.linspace(-2.0, 1.5, max(value.numel(), 2))[: value.numel()].view(value.shape)
    gradients = torch.autograd.grad(value, inputs, upstream.to(value.dtype))
    return Outcome(value.detach(), gradients)


def error(found: Tensor, exact: Tensor) -> float:
    """The largest absolute difference, relative to the largest exact element."""
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def compare(
    ours: Outcome, theirs: Outcome, exact: Outcome, *, same: float = 1e-4, floor: float = 16 * ULP
) -> None:
    """Check that the peer's result is exact up to `same`, and ours has at most its error or `floor`."""
    names = ["loss", *(f"gradient {index}" for index in range(len(exact.gradients)))]
    for name, value, peer_value, truth in zip(
        names,
        (ours.loss, *ours.gradients),
        (theirs.loss, *theirs.gradients),
        (exact.loss, *exact.gradients),
        strict=True,
    ):
        assert value.shape == peer_value.shape, f"{name}: {value.shape}, theirs {peer_value.shape}"
        assert error(peer_value, truth) <= same, (
            f"{name}: theirs is {error(peer_value, truth):.1e} off"
        )
        allowed = max(error(peer_value, truth), floor)
        assert error(value, truth) <= allowed, (
            f"{name}: ours is {error(value, truth):.1e} off, theirs {error(peer_value, truth):.1e}"
        )


def float64(*tensors: Tensor) -> list[Tensor]:
    return [x.double() for x in tensors]
