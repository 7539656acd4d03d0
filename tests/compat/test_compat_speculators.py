"""fastkd.compat.speculators against speculators' own losses."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd.compat import speculators

NAMES = {
    "kl_div": "kl_div_loss", "rkl": "reverse_kl_div_loss", "jsd": "js_div_loss", "ce": "ce_loss", "tv": "tv_loss",
    "nla": "neg_log_acceptance_loss", "lk_hybrid": "lk_hybrid_loss",
}  # fmt: skip
T, D = 12, 41


@pytest.fixture(scope="module")
def utils() -> Iterator[Any]:
    """speculators.losses.utils; the whole package imports a server's client, so its parents are stand-ins."""
    found = importlib.util.find_spec("speculators")
    assert found is not None and found.submodule_search_locations
    root = Path(next(iter(found.submodule_search_locations)))
    with pytest.MonkeyPatch.context() as patch:
        for parent, place in (("speculators", root), ("speculators.losses", root / "losses")):
            package: Any = types.ModuleType(parent)
            package.__path__ = [str(place)]
            patch.setitem(sys.modules, parent, package)
        sys.modules["speculators.losses"].eager = importlib.import_module(
            "speculators.losses.eager"
        )  # type: ignore[attr-defined]
        module = importlib.import_module("speculators.losses.utils")
        speculators.register()
        yield module
        for loaded in [name for name in sys.modules if name.startswith("speculators.")]:
            patch.delitem(sys.modules, loaded)


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, targets = ((2 * torch.randn(1, T, D, generator=generator)).to(dtype) for _ in range(2))
    return logits.requires_grad_(), targets


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_loss(utils: Any, name: str, dtype: torch.dtype) -> None:
    logits, targets = problem(dtype)
    upstream = torch.linspace(-1, 2, T).unsqueeze(0)
    outcomes = []
    for implementation in ("eager", "fused"):
        ((function, weight),) = utils.resolve_loss_config(name, implementation).values()
        loss = function(logits, targets)
        assert weight == 1.0 and loss.shape == (1, T)
        outcomes.append(
            (loss.float(), torch.autograd.grad(loss, logits, upstream.to(loss.dtype))[0].float())
        )
    assert function is getattr(speculators, NAMES[name]) is getattr(utils, NAMES[name])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(*outcomes, rtol=tolerance, atol=tolerance / 10)
    assert outcomes[0][1].any()


@pytest.mark.parametrize("decay", ["none", "dflash", "dpace"])
def test_a_compound_loss(utils: Any, decay: str) -> None:
    logits, targets = problem()
    mask = torch.arange(T).unsqueeze(0) % 5 != 0
    positions = torch.arange(T).unsqueeze(0) % 4
    decay_function = {
        "none": None,
        "dflash": functools.partial(utils.dflash_loss_decay, gamma=4.0),
        "dpace": functools.partial(
            utils.dpace_loss_decay, loss_mask=mask, block_size=4, dpace_alpha=0.5
        ),
    }[decay]
    outcomes = []
    for implementation in ("eager", "fused"):
        config = utils.resolve_loss_config('{"ce": 0.1, "tv": 0.9}', implementation)
        loss, terms = utils.compound_loss(logits, targets, mask, positions, config, decay_function)
        outcomes.append([loss, *terms.values(), torch.autograd.grad(loss, logits)[0]])
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-6)


def test_eta() -> None:
    logits, targets = problem()
    assert not torch.equal(
        speculators.lk_hybrid_loss(logits, targets, eta=1.0),
        speculators.lk_hybrid_loss(logits, targets),
    )
    torch.testing.assert_close(
        speculators.lk_hybrid_loss(logits, targets, eta=0.0),
        speculators.kl_div_loss(logits, targets),
    )
