"""Ensembles with TopKs among their teachers, against loops over rows and tokens in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import spread_routed
from support.accuracy import labels_for, logits
from support.processes import Processes
from torch import Tensor

import fastkd
from fastkd import Ensemble, LinearTeacher, TopK, fused_linear_kd_loss, kd_loss
from fastkd.engine import ensembles

INF, NAN = math.inf, math.nan
# 6 rows in two dimensions; 29 columns are an odd number for every vector width.
LEAD, V, H = (2, 3), 29, 8
WEIGHTS = (0.5, 0.3, 0.2)
# The mean and the policy of the TopKs, in the combinations that have a value.
KINDS = [
    ("arithmetic", "bucket"),
    ("arithmetic", "renormalize_teacher"),
    ("geometric", "renormalize"),
]
kinds = pytest.mark.parametrize(("mean", "tail"), KINDS)


def close(value: Tensor, exact: Tensor, tolerance: float = 2e-6) -> None:
    """Equal to exact up to this share of its largest value; NaN equals NaN."""
    scale = float(exact.detach().nan_to_num().abs().max()) if exact.numel() else 1.0
    torch.testing.assert_close(
        value.detach().double(), exact.detach().double(), rtol=0, atol=tolerance * max(scale, 1e-3), equal_nan=True
    )  # fmt: skip


def full(seed: int, *lead: int, spread: float = 2.0) -> Tensor:
    """A teacher's logits of the whole vocabulary. Teachers agree on the likely tokens, so that their lists overlap."""
    shape = lead or LEAD
    return logits(*shape, V, seed=1000, spread=spread) + logits(
        *shape, V, seed=seed, spread=0.5 * spread
    )


# ---- the formulas: a distribution as a dict of tokens and "tail"


def listed(member: TopK, row: int, temperature: float) -> dict[Any, float]:
    """The p of a TopK's row at this temperature, by token; with "bucket", also of its tail."""
    ids, lp = member.ids.flatten(0, -2)[row].tolist(), member.logprobs.double().flatten(0, -2)[row]
    weights = {
        v: float((z * member.temperature / temperature).exp())
        for v, z in zip(ids, lp, strict=True)
        if v >= 0
    }
    if member.tail != "bucket":
        total = sum(weights.values())
        return {v: p / total for v, p in weights.items()}
    if member.tail_logprob is None:
        return weights | {"tail": 1.0 - sum(weights.values())}
    return weights | {"tail": float(member.tail_logprob.double().flatten()[row].exp())}


def in_full(z: Tensor, row: int, temperature: float) -> dict[Any, float]:
    """The p of every token."""
    p = (z.double().flatten(0, -2)[row] / temperature).softmax(-1)
    return dict(enumerate(p.tolist())) | {"tail": 0.0}


def mean_of(each: list[dict[Any, float]], mean: str, tail: str) -> dict[Any, float]:
    """The weighted mean over the tokens that the policy keeps."""
    tokens = [{v for v in p if v != "tail"} for p in each]
    if tail == "renormalize_teacher":
        union = set().union(*tokens)
        return {
            v: sum(w * p.get(v, 0.0) for w, p in zip(WEIGHTS, each, strict=False)) for v in union
        }
    shared = set.intersection(*tokens)
    if mean == "geometric":
        powers = {
            v: math.prod(p[v] ** w for w, p in zip(WEIGHTS, each, strict=False)) for v in shared
        }
        total = sum(powers.values())
        return {v: x / total for v, x in powers.items()}
    found = {v: sum(w * p[v] for w, p in zip(WEIGHTS, each, strict=False)) for v in shared}
    rest = 0.0
    for w, p in zip(WEIGHTS, each, strict=False):
        rest += w * sum(x for v, x in p.items() if v not in shared)
    return found | {"tail": rest}


def loss_of(
    p: dict[Any, float], z: Tensor, temperature: float, tail: str, divergence: str
) -> Tensor:
    """T^2 times the divergence of a student's row z [V] from p, over the events of the policy."""
    ids = [v for v in p if v != "tail"]
    q = (z / temperature).softmax(-1)
    p_events = torch.tensor([p[v] for v in ids], dtype=torch.float64)
    q_events = q[ids]
    if tail == "renormalize":
        q_events = q_events / q_events.sum()
    if tail == "bucket":
        others = torch.ones(V, dtype=torch.bool)
        others[ids] = False
        p_events = torch.cat([p_events, torch.tensor([p["tail"]], dtype=torch.float64)])
        q_events = torch.cat([q_events, q[others].sum()[None]])
    if divergence == "forward_kl":
        value = (p_events * (p_events.log() - q_events.log())).sum()
    elif divergence == "reverse_kl":
        value = (q_events * (q_events.log() - p_events.log())).sum()
    else:
        m = (p_events + q_events) / 2
        sides = [(x * (x.log() - m.log())).sum() for x in (p_events, q_events)]
        # "renormalize_teacher": all other tokens have p = 0, and each adds q log(q / (q / 2)) / 2.
        rest = (1 - q_events.sum()) * math.log(2) if tail == "renormalize_teacher" else 0.0
        value = (sides[0] + sides[1] + rest) / 2
    return temperature**2 * value


def expected(
    each: Callable[[int], list[dict[Any, float]]],
    student: Tensor,
    mean: str,
    tail: str,
    divergence: str,
    temperatures: list[float],
) -> tuple[Tensor, Tensor]:
    """(the loss per row [rows], the gradient of its sum by the student's logits [rows, V]), in float64."""
    leaf = student.double().flatten(0, -2).requires_grad_()
    rows = [
        loss_of(mean_of(each(row), mean, tail), leaf[row], temperatures[row], tail, divergence)
        for row in range(len(leaf))
    ]
    loss = torch.stack(rows)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def run(student: Tensor, teacher: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, reduction="none", **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    return loss.detach().flatten(), gradient.flatten(0, -2)


# ---- values and gradients


@pytest.mark.pairwise(each="any_backend")
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("others", ["dense", "linear", "none"])
@kinds
@pytest.mark.only_where(
    lambda tail, others, divergence: (
        tail != "renormalize_teacher" or (others == "none" and divergence != "reverse_kl")
    )
)
def test_the_mean_against_float64(
    any_backend: str, mean: str, tail: str, others: str, temperature: float, divergence: str
) -> None:
    """TopKs of 6 and 9 tokens, with a third teacher of either kind, whose logits are soft-capped."""
    first, second, third = (full(seed) for seed in (1, 2, 3))
    taken_at = temperature if tail == "bucket" else 1.0
    sparse = [
        TopK.from_logits(first, 6, tail=tail, temperature=taken_at),
        TopK.from_logits(second, 9, tail=tail, temperature=taken_at if tail == "bucket" else 0.5),
    ]
    options: dict[str, Any] = {
        "divergence": divergence,
        "temperature": temperature,
        "backend": any_backend,
    }
    capped = third
    if others == "none":
        members: list[Any] = [*sparse, TopK.from_logits(third, 4, tail=tail, temperature=taken_at)]
    else:
        options |= {"teacher_softcap": 5.0, "teacher_logit_scale": 0.8}
        head = torch.eye(V)
        members = [*sparse, third if others == "dense" else LinearTeacher(third, head)]
        capped = 5.0 * torch.tanh(third.double() * 0.8 / 5.0)
    student = logits(*LEAD, V, seed=9)

    def each(row: int) -> list[dict[Any, float]]:
        ps = [listed(m, row, temperature) for m in members if isinstance(m, TopK)]
        return ps if others == "none" else [*ps, in_full(capped, row, temperature)]

    loss, gradient = run(student, Ensemble(members, WEIGHTS, mean), **options)
    exact, exact_gradient = expected(each, student, mean, tail, divergence, [temperature] * 6)
    close(loss, exact, 5e-6)
    close(gradient, exact_gradient, 5e-6)


def test_a_bucket_is_the_dense_mean_over_a_coarser_partition() -> None:
    dense = [full(seed) for seed in (1, 2, 3)]
    sparse = [TopK.from_logits(dense[0], 6), TopK.from_logits(dense[1], 9), dense[2]]
    student = logits(*LEAD, V, seed=9)
    mixture = sum(w * z.double().softmax(-1) for w, z in zip(WEIGHTS, dense, strict=True)).log()  # type: ignore[union-attr]
    shared = [
        set(a.tolist()) & set(b.tolist())
        for a, b in zip(*(m.ids.flatten(0, 1) for m in sparse[:2]), strict=True)
    ]  # type: ignore[union-attr]
    assert all(1 < len(tokens) < 6 for tokens in shared)
    ids = torch.full((6, 6), -1)
    for row, tokens in enumerate(shared):
        ids[row, : len(tokens)] = torch.tensor(sorted(tokens))
    coarse = TopK.from_logits(mixture.float(), ids=ids.view(*LEAD, 6))
    for divergence in ("forward_kl", "reverse_kl", "tvd", "hellinger"):
        ours = run(student, Ensemble(sparse, WEIGHTS), divergence=divergence)
        theirs = run(student, coarse, divergence=divergence)
        close(ours[0], theirs[0], 1e-5)
        close(ours[1], theirs[1], 1e-5)
        whole = run(student, Ensemble(dense, WEIGHTS), divergence=divergence)
        assert (ours[0] < whole[0]).all()  # a coarser partition has a smaller divergence


@kinds
def test_every_token_listed_is_the_dense_ensemble(mean: str, tail: str) -> None:
    dense = [full(seed) for seed in (1, 2, 3)]
    student = logits(*LEAD, V, seed=9)
    sparse = [TopK.from_logits(z, V, tail=tail) for z in dense]
    ours = run(student, Ensemble(sparse, WEIGHTS, mean))
    theirs = run(student, Ensemble(dense, WEIGHTS, mean))
    close(ours[0], theirs[0], 1e-5)
    close(ours[1], theirs[1], 1e-5)


@kinds
def test_one_topk_is_itself(mean: str, tail: str) -> None:
    own = TopK.from_logits(full(1), 5, tail=tail)
    half = TopK(own.ids, own.logprobs.bfloat16(), tail)
    narrow = TopK(own.ids.int(), own.logprobs, tail)
    for teacher in (own, half, narrow):
        # A teacher of weight 0 is not read.
        other = teacher if tail == "renormalize_teacher" else torch.full((*LEAD, V), NAN)
        for ensemble in (Ensemble([teacher], None, mean), Ensemble([other, teacher], (0, 3), mean)):
            ours = run(logits(*LEAD, V, seed=9), ensemble)
            theirs = run(logits(*LEAD, V, seed=9), teacher)
            close(ours[0], theirs[0])
            close(ours[1], theirs[1])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS), st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6),
    st.integers(1, 3), st.booleans(),
)  # fmt: skip
def test_any_lists(
    kind: tuple[str, str], seed: int, rows: int, k1: int, k2: int, members: int, taken_apart: bool
) -> None:
    """Lists that overlap by chance, in any order, with padding anywhere; p of any sum below 1."""
    mean, tail = kind
    generator = torch.Generator().manual_seed(seed)

    def topk(k: int) -> TopK:
        ids = torch.rand(rows, V, generator=generator)[:, :9].argsort(-1)[:, :k] + 3
        ids[torch.rand(rows, k, generator=generator) < 0.2] = -1
        ids[:, 0] = 7
        ids[:, 1:][ids[:, 1:] == 7] = -1
        lp = torch.rand(rows, k, generator=generator).add(0.05).div(k + 1).log()
        tail_logprob = (
            (1 - lp.exp().masked_fill(ids < 0, 0.0).sum(-1)).log() if taken_apart else None
        )
        return TopK(ids, lp, tail, tail_logprob if tail == "bucket" else None)

    each = [topk(k) for k in (k1, k2, 4)[:members]]
    total = sum(WEIGHTS[:members])
    student = logits(rows, V, seed=seed)
    divergence = "jsd" if seed % 2 else "forward_kl"
    ours = run(student, Ensemble(each, WEIGHTS[:members], mean), divergence=divergence)

    def of_row(row: int) -> list[dict[Any, float]]:
        return [listed(member, row, 1.0) for member in each]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "WEIGHTS", tuple(w / total for w in WEIGHTS[:members]))
        exact = expected(of_row, student, mean, tail, divergence, [1.0] * rows)
    close(ours[0], exact[0], 2e-5)
    close(ours[1], exact[1], 2e-5)


@pytest.mark.parametrize(("mean", "tail"), KINDS[1:])
def test_a_temperature_per_row(mean: str, tail: str) -> None:
    each = [
        TopK.from_logits(full(1), 6, tail=tail),
        TopK.from_logits(full(2), 9, tail=tail, temperature=2.0),
    ]
    temperature = torch.tensor([[1.0, 2.0, 0.5], [3.0, 1.5, 1.0]])
    student = logits(*LEAD, V, seed=9)

    def of_row(row: int) -> list[dict[Any, float]]:
        return [listed(member, row, float(temperature.flatten()[row])) for member in each]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "WEIGHTS", (0.25, 0.75))
        exact = expected(of_row, student, mean, tail, "forward_kl", temperature.flatten().tolist())
    ours = run(student, Ensemble(each, [1, 3], mean), temperature=temperature)
    close(ours[0], exact[0], 5e-6)
    close(ours[1], exact[1], 5e-6)
    bad = temperature.clone()
    bad[0, 1] = -1.0
    loss, _ = run(student, Ensemble(each, [1, 3], mean), teacher_temperature=bad)
    assert loss.isnan().tolist() == [False, True, False, False, False, False]


def test_the_teachers_temperature_is_not_the_students() -> None:
    each = [TopK.from_logits(full(1), 6, temperature=2.0), full(2)]
    student = logits(*LEAD, V, seed=9)
    ours = kd_loss(student, Ensemble(each), temperature=3.0, teacher_temperature=2.0)
    dense = Ensemble([TopK.from_logits(full(1) / 2, 6), full(2) / 2])
    close(ours, kd_loss(student, dense, temperature=3.0, teacher_temperature=1.0))


# ---- rows


@kinds
def test_rows_without_a_teacher_and_invalid_rows(mean: str, tail: str) -> None:
    def members() -> list[TopK]:
        return [TopK.from_logits(full(seed), 5, tail=tail) for seed in (1, 2)]

    student = logits(*LEAD, V, seed=9)
    clean, _ = run(student, Ensemble(members(), mean=mean))
    assert (clean > 0).all()
    cases: list[tuple[str, Any, bool]] = [
        ("ids", -1, False),  # the second teacher lists no token: no distillation
        ("ids", V, True),
        ("ids", -5, True),
        ("ids", 11, True),  # repeated
        ("logprobs", NAN, True),
        ("logprobs", INF, True),
        ("logprobs", 0.5, tail == "bucket"),
        ("logprobs", -INF, tail != "bucket"),
    ]
    for which in (0, 1):
        for field, value, is_nan in cases:
            both = members()
            getattr(both[which], field)[1, 2] = value
            loss, gradient = run(student, Ensemble(both, mean=mean))
            assert bool(loss[5].isnan()) == is_nan, (field, value)
            assert torch.equal(loss[:5], clean[:5])
            if field == "ids" and value == -1:
                assert loss[5] == 0 and not gradient[5].any()
            masked, _ = run(student, Ensemble(both, mean=mean), mask=torch.arange(6).view(LEAD) < 5)
            assert masked[5] == 0 and torch.equal(masked[:5], clean[:5])
    # One id beyond the vocabulary that no other teacher lists is not lost with its token.
    both = members()
    both[0].ids[0, 0, 4] = V
    assert run(student, Ensemble(both, mean=mean))[0].isnan().tolist() == [True] + [False] * 5


def test_a_row_is_invalid_if_it_is_invalid_alone() -> None:
    """Sums above 1.1, with and without a given tail; a row without a token may have any tail."""
    ids = torch.tensor([[0, 1], [2, 3]])
    student = logits(2, V, seed=9)
    nan_rows = 0
    for first, tail in (
        ((0.8, 0.35), None),
        ((0.8, 0.295), None),
        ((0.8, 0.2), 0.3),
        ((0.5, 0.2), 0.3),
    ):
        lp = torch.tensor([first, (0.4, 0.3)]).log()
        own = TopK(ids, lp, tail_logprob=None if tail is None else torch.tensor([tail, 0.3]).log())
        alone = run(student, own)[0]
        nan_rows += int(alone.isnan().sum())
        close(run(student, Ensemble([own]))[0], alone)
        beside = run(student, Ensemble([own, TopK.from_logits(full(1, 2), ids=ids)], [1, 1e-9]))[0]
        close(beside, alone)
    assert nan_rows == 2
    own = TopK(
        torch.tensor([[-1, -1], [2, 3]]),
        torch.full((2, 2), -1.0),
        tail_logprob=torch.tensor([NAN, -3.0]),
    )
    loss = run(student, Ensemble([own, full(1, 2)]))[0]
    assert loss[0] == 0 and loss[1] > 0


def test_a_list_of_every_token_leaves_no_tail() -> None:
    """Log-probabilities cannot tell a mass of 0 from rounding; a list of all tokens does."""
    z = full(1)
    whole = z.log_softmax(-1)
    ids = torch.arange(V).expand(*LEAD, V).contiguous()
    exact = run(logits(*LEAD, V, seed=9), Ensemble([z, z]), divergence="reverse_kl")
    ours = run(logits(*LEAD, V, seed=9), Ensemble([TopK(ids, whole), z]), divergence="reverse_kl")
    close(ours[0], exact[0], 1e-5)
    close(ours[1], exact[1], 1e-5)
    # Beside a list of few tokens with a tail of 1e-16, an estimate from the sum of all would be the larger part.
    sharp = torch.full((*LEAD, V), -40.0).index_fill(-1, torch.tensor([2, 5]), 0.0) + z / 10
    few = TopK.from_logits(sharp, 2)
    assert few.tail_logprob is not None and few.tail_logprob.max() < -30
    mixed = Ensemble([TopK(ids, sharp.log_softmax(-1)), few])
    ours = run(logits(*LEAD, V, seed=9), mixed, divergence="reverse_kl")
    alone = run(logits(*LEAD, V, seed=9), few, divergence="reverse_kl")
    close(ours[0], alone[0], 1e-5)


def test_lists_without_a_common_token() -> None:
    """Under "bucket" the tail is the only event, which every student fits; renormalized rows are dropped."""
    first = TopK(torch.tensor([[0, 1]] * 2), torch.full((2, 2), -1.5))
    second = TopK(torch.tensor([[2, 3], [1, 2]]), torch.full((2, 2), -1.5))
    student, labels = logits(2, V, seed=9), torch.tensor([3, 4])
    loss, gradient = run(student, Ensemble([first, second]), labels=labels)
    assert loss[0] == 0 and not gradient[0].any() and loss[1] > 0
    mixed = [TopK(t.ids, t.logprobs, "renormalize") for t in (first, second)]
    teacher = Ensemble(mixed, mean="geometric")
    _, parts = kd_loss(student, teacher, return_parts=True)
    assert int(parts.counted) == 1
    _, parts = kd_loss(student, teacher, labels, alpha=0.5, return_parts=True)
    assert int(parts.counted) == 2


def test_dropped_rows_are_not_read() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    hidden = full(3)
    members: list[Any] = [
        TopK.from_logits(full(1), 5),
        full(2),
        LinearTeacher(hidden, torch.eye(V)),
    ]
    student = logits(*LEAD, V, seed=9)
    clean = run(student, Ensemble(members), mask=mask)
    for values in (members[0].logprobs, members[1], hidden):
        values[~mask] = NAN
    members[0].ids[~mask] = 99
    dirty = run(student, Ensemble(members), mask=mask)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert not dirty[0].isnan().any()


def test_dense_teachers_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([[True, False, True], [True, True, True]])
    members = [TopK.from_logits(full(1), 5), LinearTeacher(full(2), torch.eye(V)), full(3)]
    student = logits(*LEAD, V, seed=9)
    whole = run(student, Ensemble(members), mask=mask)
    monkeypatch.setattr(
        ensembles, "RESPONSE_BUDGET", ensembles.RESPONSE_BUDGET._replace(cpu=2 * 4 * V * 4)
    )
    counts: list[int] = []
    real = ensembles._logits

    def counting(*arguments: Any) -> Tensor:
        z = real(*arguments)
        counts.append(len(z))
        return z

    monkeypatch.setattr(ensembles, "_logits", counting)
    chunked = run(student, Ensemble(members), mask=mask)
    assert counts == [2, 2, 1] * 2
    close(chunked[0], whole[0], 1e-6)


def test_sums_of_rounded_probabilities() -> None:
    """The mass of a tail is estimated for each teacher in its own dtype, as for one TopK."""
    sharp = full(1, spread=9.0)
    own = TopK.from_logits(sharp, 5)
    rounded = TopK(own.ids, own.logprobs.bfloat16())
    student = logits(*LEAD, V, seed=9)
    mixed = run(student, Ensemble([rounded, own], [1, 1e-6]), divergence="reverse_kl")
    alone = run(student, rounded, divergence="reverse_kl")
    close(mixed[0], alone[0], 1e-4)


# ---- the other loss, modules, graphs, processes


@kinds
def test_hidden_states(mean: str, tail: str) -> None:
    members: list[Any] = [TopK.from_logits(full(seed), 5, tail=tail) for seed in (1, 2)]
    if tail != "renormalize_teacher":
        members.append(LinearTeacher(full(3), torch.eye(V)))
    teacher = Ensemble(members, mean=mean)
    hidden, head = logits(*LEAD, H, seed=4).requires_grad_(), logits(V, H, seed=5).requires_grad_()
    labels = labels_for(*LEAD, vocabulary=V, seed=2, ignored=0.3)
    names = ("teacher_entropy", "teacher_mass")
    options: dict[str, Any] = {"alpha": 0.6, "return_parts": names}
    loss, parts = fused_linear_kd_loss(hidden, head, teacher, labels, chunk_size=2, **options)
    whole, expected_parts = kd_loss(hidden @ head.T, teacher, labels, **options)
    close(loss, whole)
    for name in names:
        close(getattr(parts, name), getattr(expected_parts, name))
    ours, theirs = (torch.autograd.grad(value, (hidden, head)) for value in (loss, whole))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-5)
    modules = fastkd.KDLoss(alpha=0.6), fastkd.FusedLinearKDLoss(alpha=0.6)
    close(modules[0](hidden @ head.T, teacher, labels), whole)
    close(modules[1](hidden, head, teacher, labels), whole)


@pytest.mark.usefixtures("fresh_compiler")
def test_it_breaks_a_graph() -> None:
    # A number of a compiled call is a stand-in until the graph runs, and the mean depends on the temperature.
    teacher = Ensemble([TopK.from_logits(full(1), 5, temperature=2.0), full(2)])

    def step(student: Tensor) -> Any:
        return kd_loss(student * 2.0, teacher, temperature=2.0)

    student = logits(*LEAD, V, seed=9)
    assert torch.equal(torch.compile(step, backend="aot_eager")(student), step(student))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="torch.compiler.disable"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(student)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(2)
    yield pool
    pool.stop()


@kinds
def test_a_shared_vocabulary(processes: Processes, mean: str, tail: str) -> None:
    """Two processes with 15 and 22 of 37 columns compute what one process computes; invalid ids make their row NaN."""
    wide = [torch.cat([full(seed), full(seed + 10)[..., :8]], -1) for seed in (1, 2)]
    members = [TopK.from_logits(z, 5, tail=tail) for z in wide]
    members[1].ids[1, 1, 0] = 37
    teacher = Ensemble(members, [1, 3], mean)
    student = logits(*LEAD, 37, seed=9)
    exact = kd_loss(student, teacher, reduction="none")
    assert exact.isnan().flatten().tolist() == [False] * 4 + [True, False]
    for loss in processes.run(2, spread_routed.of_teacher, student, teacher):
        close(loss, exact)
    failures = processes.outcomes(
        2, spread_routed.of_teacher, student, Ensemble([TopK.from_logits(wide[0], 5), wide[1]])
    )
    assert all(
        not good and "needs the whole vocabulary of each dense teacher" in text
        for good, text in failures
    )


# ---- errors


def sparse(tail: str = "bucket", **fields: Any) -> TopK:
    return TopK(torch.tensor([[0, 1]]), torch.full((1, 2), -1.0), tail, **fields)


DENSE = torch.zeros(1, V)
CONSTRUCTOR: list[tuple[Callable[[], Any], str]] = [
    (lambda: Ensemble([DENSE, None]), r"teachers\[1\] must be dense logits, a LinearTeacher or a TopK, got NoneType"),
    (lambda: Ensemble([fastkd.RoutedTeacher([DENSE], torch.tensor(0))]), r"teachers\[0\] must be .*got RoutedTeacher"),
    (lambda: Ensemble([DENSE, sparse(), sparse("truncate")]),
     r"teachers\[2\].tail must be that of teachers\[1\], 'bucket'; got 'truncate'"),
    (lambda: Ensemble([sparse("truncate")]), "cannot combine TopKs with tail='truncate': under this policy a "
     "teacher says nothing about tokens that it does not list, so their mean is unknown if the lists differ. Pass "
     "tail='bucket' or tail='renormalize_teacher'"),
    (lambda: Ensemble([sparse("renormalize")]), "mean='arithmetic' cannot combine .*='renormalize': the mean of "
     "probabilities needs .* only their ratios are known. Pass tail='bucket', .* or mean='geometric'"),
    (lambda: Ensemble([sparse("bucket")], mean="geometric"), "mean='geometric' cannot combine .*='bucket': the "
     "geometric mean of the unlisted tokens cannot be known from their mass. Pass mean='arithmetic', or"),
    (lambda: Ensemble([sparse("truncate")], mean="geometric"), "mean='geometric' cannot combine .*='truncate'"),
    (lambda: Ensemble([sparse("renormalize_teacher")], mean="geometric"), "the geometric mean is 0 for each token that "
     "one teacher does not list. Pass mean='arithmetic', or tail='renormalize' for the tokens that all list"),
    (lambda: Ensemble([sparse("renormalize_teacher"), DENSE]), "cannot combine TopKs with tail='renormalize_teacher' "
     "and dense teachers, because a dense teacher gives every token a probability. Pass tail='bucket', or "
     "TopK.from_logits"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), CONSTRUCTOR)
def test_errors_of_the_constructor(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


CALLS: list[tuple[Any, dict[str, Any], str]] = [
    (Ensemble([sparse(), sparse(temperature=2.0)]), {},
     r"teacher_temperature is 1.0, and teacher.teachers\[1\].logprobs were taken at 2.0: tail='bucket' needs"),
    (Ensemble([DENSE, sparse()]), {"temperature": 2.0},
     r"teacher_temperature is 2.0, and teacher.teachers\[1\].logprobs were taken at 1.0"),
    (Ensemble([DENSE, sparse()]), {"teacher_temperature": torch.ones(1)},
     r"teacher_temperature is one a row, and teacher.teachers\[1\].logprobs were taken at 1.0"),
    (Ensemble([sparse()]), {"teacher_softcap": 3.0}, "teacher_logit_scale and teacher_softcap are for logits"),
    (Ensemble([sparse("renormalize_teacher")]), {"divergence": "reverse_kl"}, "tail='renormalize_teacher' gives all"),
    (Ensemble([sparse()]), {"divergence": "squared_error"}, "compares logits, and a TopK has log-probabilities"),
    (Ensemble([sparse()]), {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
    (Ensemble([sparse()]), {"teacher_temperature": "1"}, "teacher_temperature must be a number or a tensor, got str"),
    (Ensemble([sparse(), TopK(torch.tensor([0]), torch.tensor([-1.0]))]), {},
     r"teacher.teachers\[1\] must have the leading shape of student_logits, \(1,\); got \(\)"),
    (Ensemble([sparse(), DENSE[:, 1:]]), {}, r"teacher.teachers\[1\] has 28 columns"),
    (Ensemble([sparse(), DENSE.clone().requires_grad_()]), {}, r"teacher.teachers\[1\] requires grad"),
]  # fmt: skip


@pytest.mark.parametrize(("teacher", "options", "message"), CALLS)
def test_errors_of_a_call(teacher: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kd_loss(torch.zeros(1, V, requires_grad=True), teacher, labels=torch.tensor([0]), **options)


def test_checked_values_name_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKD_CHECK", "1")
    good, bad = TopK.from_logits(full(1), 3), TopK.from_logits(full(2), 3)
    kd_loss(logits(*LEAD, V, seed=9), Ensemble([good, bad]))
    bad.ids[1, 0, 2] = V
    with pytest.raises(
        ValueError, match=rf"teacher.teachers\[1\].ids must be in \[0, {V}\), .*; row 3 has others"
    ):
        kd_loss(logits(*LEAD, V, seed=9), Ensemble([good, bad]))
    summed = TopK(good.ids, torch.full((*LEAD, 3), -0.1))
    with pytest.raises(
        ValueError, match=r"teacher.teachers\[1\].logprobs must be .* those of row 0 sum to 2.715"
    ):
        kd_loss(logits(*LEAD, V, seed=9), Ensemble([good, summed]))
    kd_loss(
        logits(*LEAD, V, seed=9), Ensemble([good, summed]), mask=torch.zeros(LEAD, dtype=torch.bool)
    )
    bad.ids[1, 0, 2] = bad.ids[1, 0, 1]
    with pytest.raises(
        ValueError, match=r"teacher.teachers\[1\].ids must be distinct within a row; row 3 repeats"
    ):
        kd_loss(logits(*LEAD, V, seed=9), Ensemble([good, bad]))
