"""What processes do in tests/parallel/test_shared_logprobs.py: log-probabilities whose vocabulary they share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from test_logprobs import (
    NAMES,
    TEMPERINGS,
    Problem,
    actual,
    assert_near,
    assert_outputs,
    expected,
    gradients,
    problem,
    weighted,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastkd import fused_linear_logprobs, student_topk
from support.spread import Columns, Part, _same_everywhere, columns_of


def _shared(made: Problem, shares: tuple[float, ...], group: Any, form: str) -> tuple[Problem, Any]:
    """(the problem with this process's part of the head, the process_group to pass)."""
    if form in ("plain", "sequence"):
        columns = columns_of(len(made.weight), shares, dist.get_rank(group))
        weight = Columns.apply(made.weight, columns, group, 0)
        if form == "sequence":
            made = made._replace(hidden=Part.apply(made.hidden, 0, group))
        return made._replace(weight=weight, bias=Columns.apply(made.bias, columns, group, 0)), group
    mesh = DeviceMesh.from_group(group, "cpu")
    hidden, weight, bias = (
        DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in made[:3]
    )
    at = [Shard(0)]
    if form == "dtensor, sequence":
        hidden = hidden.redistribute(placements=at)
    weight, bias = weight.redistribute(placements=at), bias.redistribute(placements=at)
    return Problem(hidden, weight, bias, *made[3:]), None


def values_and_gradients(
    group: Any, shares: tuple[float, ...], form: str, dtype: torch.dtype
) -> int:
    """Compare all outputs and gradients with float64 formulas, and the outputs' bits over processes."""
    checked = 0
    for tempering in TEMPERINGS.values():
        made = problem(4, 3, columns=62, dtype=dtype)
        targets = made.targets.clone()
        targets[1, 1] = -100
        made = made._replace(targets=targets)
        mine, exact = made.leaves(), made.exact()
        part, process_group = _shared(mine, shares, group, form)
        outputs = actual(
            part, 6, process_group=process_group, chunk_size=5,
            sequence_dim=0 if form == "sequence" else None, **tempering,
        )  # fmt: skip
        for value in outputs:
            _same_everywhere(value, group)
        kept = targets != -100
        reference = expected(exact, 6, **tempering)
        rows = [type(x)(*(y[kept] for y in x)) for x in (outputs, reference)]
        assert_outputs(*rows, dtype)
        ours = gradients(weighted(outputs, kept=kept), mine)
        exactly = gradients(weighted(reference, kept=kept), exact)
        assert_near(ours, exactly, dtype)
        checked += 1
    return checked


def padded(group: Any, shares: tuple[float, ...]) -> bool:
    """vocab_size counts the columns of all processes; more top tokens than a shard has columns; ties across shards."""
    made = problem(5, columns=40)
    # Multiples of 1/4, whose products are exact in any order, so that equal logits stay equal.
    hidden, weight, bias = ((4 * x).round() / 4 for x in made[:3])
    weight[::3], bias[::3] = weight[0], bias[0]  # equal logits on all processes
    weight[33:] = float("nan")
    made = Problem(hidden, weight, bias, made.targets % 33, made.ids)
    part, _ = _shared(made, shares, group, "plain")
    options: dict[str, Any] = {"vocab_size": 33, "topk": 30, "bias": part.bias}
    outputs = fused_linear_logprobs(
        part.hidden, part.weight, part.targets, process_group=group, **options
    )
    alone = fused_linear_logprobs(
        made.hidden, made.weight, made.targets, **options | {"bias": bias}
    )
    assert torch.equal(outputs.topk_ids, alone.topk_ids)
    torch.testing.assert_close(outputs[:2], alone[:2])
    top = student_topk(
        part.hidden, part.weight, k=30, bias=part.bias, vocab_size=33, process_group=group
    )
    assert torch.equal(top.ids, outputs.topk_ids)
    logits = (made.hidden @ made.weight.T + bias)[:, columns_of(40, shares, dist.get_rank(group))]
    of_logits = student_topk(logits, k=30, vocab_size=33, process_group=group)
    assert torch.equal(of_logits.ids, alone.topk_ids)
    return True


def far_apart(group: Any) -> bool:
    """The logits of one process are 2,000 above those of another, in either order."""
    for sign in (1.0, -1.0):
        made = problem(4, columns=30)
        bias = made.bias + sign * torch.linspace(-1000.0, 1000.0, 30).round()
        made = made._replace(bias=bias)
        mine, exact = made.leaves(), made.exact()
        part, _ = _shared(mine, (1.0,) * dist.get_world_size(group), group, "plain")
        outputs = actual(part, 3, process_group=group)
        reference = expected(exact, 3)
        for name in NAMES:
            torch.testing.assert_close(
                getattr(outputs, name).double(), getattr(reference, name), rtol=1e-6, atol=1e-4
            )
        (of_hidden,) = torch.autograd.grad(outputs.target.sum(), mine.hidden)
        (right,) = torch.autograd.grad(reference.target.sum(), exact.hidden)
        torch.testing.assert_close(of_hidden.double(), right, rtol=1e-4, atol=1e-4)
    return True


def messages(group: Any) -> list[str]:
    """The errors of calls that differ between processes, or that no process can serve."""
    rank = dist.get_rank(group)
    made = problem(3)
    part, _ = _shared(made, (1.0,) * dist.get_world_size(group), group, "plain")
    calls: list[dict[str, Any]] = [
        {"k": 2 + rank},
        {"temperature": 1.0 + rank},
        {"k": 62},
        {"mask": torch.ones(3 + rank, dtype=torch.bool)},
    ]
    found = []
    for options in calls:
        try:
            actual(part, **{"k": 1} | options, process_group=group)
            found.append("none")
        except (ValueError, RuntimeError) as error:
            found.append(str(error))
    return found


def sharded_by_fsdp(group: Any) -> bool:
    """A DTensor weight with plain hidden states, of which each process has its own: the gradient is averaged."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mesh = DeviceMesh.from_group(group, "cpu")
    everywhere = [
        problem(3, seed=9)._replace(hidden=problem(3, seed=k).hidden) for k in range(size)
    ]
    mine = everywhere[rank].leaves()
    weight, bias = (
        DTensor.from_local(x.detach(), mesh, [Replicate()], run_check=False)
        .redistribute(placements=[Shard(0)])
        .requires_grad_()
        for x in (mine.weight, mine.bias)
    )
    outputs = actual(Problem(mine.hidden, weight, bias, *mine[3:]), 2)
    weighted(outputs).backward()
    exact = [each.exact() for each in everywhere]
    exact = [each._replace(weight=exact[0].weight, bias=exact[0].bias) for each in exact]
    reference = [expected(each, 2) for each in exact]
    for name in NAMES:
        torch.testing.assert_close(
            getattr(outputs, name).double(), getattr(reference[rank], name), rtol=1e-5, atol=1e-5
        )
    loss = sum(weighted(each) for each in reference) / size
    rights = torch.autograd.grad(loss, [exact[0].weight, exact[0].bias])
    assert_near(tuple(x.grad.full_tensor() for x in (weight, bias)), rights, torch.float32)
    return True


def compiled(group: Any) -> str:
    """The error of a graph without breaks; with breaks, the call runs as in eager mode."""
    made = problem(3)
    part, _ = _shared(made, (1.0,) * dist.get_world_size(group), group, "plain")

    def loss_of(hidden: torch.Tensor) -> torch.Tensor:
        outputs = fused_linear_logprobs(
            hidden * 2, part.weight, part.targets, process_group=group, topk=2
        )
        return outputs.target * 3

    with_breaks, whole = (
        torch.compile(loss_of, backend="eager", fullgraph=fullgraph) for fullgraph in (False, True)
    )
    assert torch.equal(with_breaks(part.hidden), loss_of(part.hidden))
    torch._dynamo.reset()  # else it finds what it has compiled in parts
    try:
        whole(part.hidden)
    except torch._dynamo.exc.Unsupported as error:  # before any process calls another
        return str(error)
    return "nothing"
