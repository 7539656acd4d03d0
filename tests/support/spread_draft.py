"""What processes do in tests/parallel/test_shared_draft.py: losses of draft models whose vocabularies they share."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from test_draft import _terms
from torch import Tensor

from fastkd import LinearTeacher
from fastkd.response import draft_loss, fused_linear_draft_loss
from fastkd.response.draft import LOSSES
from support.spread import Columns, _same_everywhere, columns_of

ROWS, H, D, V = (2, 5), 16, 37, 90
EVERY = {name: 0.5 + k for k, name in enumerate(LOSSES)}


def problem(seed: int, dtype: torch.dtype, spread: float = 0.5) -> dict[str, Tensor]:
    """Hidden states and heads of both models; the target's tokens of the draft tokens are in ascending order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*sizes, generator=generator)).to(dtype)

    return {
        "hidden": normal(*ROWS, H), "weight": normal(D, H, scale=spread), "bias": normal(D),
        "target": normal(*ROWS, H), "head": normal(V, H, scale=spread),
        "ids": torch.randperm(V, generator=generator)[:D].sort().values,
    }  # fmt: skip


def _parts(ids: Tensor, shares: tuple[float, ...], group: Any) -> tuple[slice, slice]:
    """This process's columns of the target, and its draft tokens, which are those whose tokens it has."""
    of_target = columns_of(V, shares, dist.get_rank(group))
    first, last = torch.searchsorted(ids, torch.tensor([of_target.start, of_target.stop])).tolist()
    return of_target, slice(first, last)


def _exactly(s: Tensor, t: Tensor, ids: Tensor | None, weights: dict[str, float]) -> Tensor:
    terms = _terms(s, t, ids)
    total = sum(weight * terms[name] for name, weight in weights.items() if weight)
    assert isinstance(total, Tensor)
    return total


def of_logits(
    group: Any, shares: tuple[float, ...], dtype: torch.dtype, subset: bool, losses: Any
) -> bool:
    """draft_loss of logits, against the formulas in float64 of one process."""
    made = problem(1, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    s = (made["hidden"].to(wide) @ made["weight"].to(wide).T).to(dtype).requires_grad_()
    t = (made["target"].to(wide) @ made["head"].to(wide).T).to(dtype)
    of_target, of_draft = _parts(made["ids"], shares, group)
    ids: Tensor | None = made["ids"]
    if not subset:
        t, ids, of_target = t[..., made["ids"]], None, of_draft
    mask = torch.arange(10).view(ROWS) % 4 != 1
    t[~mask] = math.nan
    exact = s.detach().double().requires_grad_()
    rows = _exactly(exact[mask], t[mask], ids, losses)
    loss, parts = draft_loss(
        Columns.apply(s, of_draft, group), t[..., of_target], losses, mask=mask, reduction="none",
        draft_to_target=None if ids is None else ids[of_draft], process_group=group,
        return_parts=True, memory_budget=60_000,
    )  # fmt: skip
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss[mask].double(), rows.detach(), rtol=tolerance, atol=tolerance)
    assert not loss[~mask].any() and parts.counted == mask.sum()
    terms = _terms(exact.detach(), t, ids)
    for name, value in (("acceptance", parts.acceptance), *parts.terms.items()):
        torch.testing.assert_close(
            value[mask].double(), terms[name][mask], rtol=tolerance, atol=tolerance
        )
    for value in (loss, parts.acceptance, *parts.terms.values()):
        _same_everywhere(value, group)
    # Every process uses the loss; each has the gradient of its columns.
    upstream = torch.linspace(0.5, 2.0, 10).view(ROWS)
    (found,) = torch.autograd.grad((loss * upstream).sum(), s)
    (right,) = torch.autograd.grad((rows * upstream[mask]).sum(), exact)
    rounding = 0.0 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    assert not found[~mask].any()
    assert (found.double() - right).norm() <= (tolerance + rounding) * right.norm()
    return True


def of_heads(
    group: Any, shares: tuple[float, ...], dtype: torch.dtype, reduction: str, linear: bool
) -> bool:
    """fused_linear_draft_loss, against draft_loss of whole logits in float64."""
    made = problem(2, dtype)
    of_target, of_draft = _parts(made["ids"], shares, group)
    leaves = [made[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    target_logits = made["target"].double() @ made["head"].double().T
    teacher: Any = LinearTeacher(made["target"], made["head"][of_target])
    if not linear:
        target_logits = target_logits.to(dtype).double()
        teacher = target_logits.to(dtype)[..., of_target]
    options: dict[str, Any] = {
        "mask": torch.arange(10).view(ROWS) % 3 != 1, "positions": torch.arange(5).expand(ROWS),
        "position_decay": 0.7, "reduction": reduction,
    }  # fmt: skip
    loss = fused_linear_draft_loss(
        hidden, Columns.apply(weight, of_draft, group, 0), teacher, EVERY, chunk_size=3,
        student_bias=Columns.apply(bias, of_draft, group, 0), process_group=group,
        draft_to_target=made["ids"][of_draft], **options,
    )  # fmt: skip
    _same_everywhere(loss, group)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    alone = draft_loss(
        exact[0] @ exact[1].T + exact[2], target_logits, EVERY, draft_to_target=made["ids"],
        backend="reference", **options,
    )  # fmt: skip
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(loss.double(), alone, rtol=tolerance, atol=tolerance)
    upstream = torch.linspace(0.5, 2.0, 10).view(ROWS) if reduction == "none" else torch.ones(())
    found = torch.autograd.grad((loss * upstream).sum(), leaves)
    rounding = 0.0 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    rights = torch.autograd.grad((alone * upstream).sum(), exact)
    for mine, right in zip(found, rights, strict=True):
        assert (mine.double() - right).norm() <= (tolerance + rounding) * right.norm()
    return True


def excluded(group: Any) -> bool:
    """Logits of -inf: on all of one process's columns, and on all draft tokens of a row."""
    made = problem(3, torch.float64, 2.0)
    s, t = made["hidden"] @ made["weight"].T, made["target"] @ made["head"].T
    of_target, of_draft = _parts(made["ids"], (1.0, 2.0), group)
    first = _parts_of_first(made["ids"])
    t[0, 0, : first[0]] = -math.inf
    t[0, 1][made["ids"]] = -math.inf
    losses = {"tvd": 1.0, "nla": 0.5}
    leaf = s.clone().requires_grad_()
    loss = draft_loss(
        Columns.apply(leaf, of_draft, group), t[..., of_target], losses, reduction="none",
        draft_to_target=made["ids"][of_draft], process_group=group,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss[0, 1].item() == 1.0 - 0.5 * math.log(1e-5) and not gradient[0, 1].any()
    other = s.clone().requires_grad_()
    alone = draft_loss(other, t, losses, draft_to_target=made["ids"], reduction="none")
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(gradient, torch.autograd.grad(alone.sum(), other)[0])
    # A KL to a row that gives no draft token any probability is undefined.
    undefined = draft_loss(
        s[..., of_draft], t[..., of_target], draft_to_target=made["ids"][of_draft],
        reduction="none", process_group=group,
    )  # fmt: skip
    assert undefined[0, 1].isnan() and undefined[1].isfinite().all()
    return True


def _parts_of_first(ids: Tensor) -> tuple[int, int]:
    """How many columns and draft tokens the first of two processes with shares 1 and 2 has."""
    columns = columns_of(V, (1.0, 2.0), 0).stop
    return columns, int((ids < columns).sum())


def messages(group: Any) -> list[str]:
    """The results of calls that differ between processes, or that no process can serve."""
    rank = dist.get_rank(group)
    made = problem(4, torch.float32)
    of_target, of_draft = _parts(made["ids"], (1.0, 1.0), group)
    s = (made["hidden"] @ made["weight"].T)[..., of_draft]
    t = (made["target"] @ made["head"].T)[..., of_target]
    ids = made["ids"][of_draft]
    calls: list[dict[str, Any]] = [
        {"eta": 1.0 + rank},
        {"losses": {"tvd": 1.0 + rank}},
        {"mask": torch.ones(3 + rank, dtype=torch.bool)},
        {"draft_to_target": ids[1:] if rank else ids},
        {"reduction": ("none", "sum")[rank]},
        {"draft_to_target": ids + (V if rank else 0)},  # not a column of this process
    ]
    found = []
    for options in calls:
        try:
            loss = draft_loss(s, t, **{"draft_to_target": ids} | options, process_group=group)
            found.append(str(float(loss)))
        except (ValueError, RuntimeError) as error:
            found.append(str(error))
    return found
