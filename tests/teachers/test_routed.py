"""RoutedTeacher: the loss of a row is that of its own teacher, in float64 formulas and in the teacher's own call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import spread_routed
from support.accuracy import labels_for, logits, ran_on
from support.oracles import compose
from support.processes import Processes
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastkd
from fastkd import LinearTeacher, RoutedTeacher, TopK, fused_linear_kd_loss, kd_loss
from fastkd.engine import chunks as engine_chunks

INF, NAN = math.inf, math.nan
TAILS = ("bucket", "renormalize", "renormalize_teacher", "truncate")
# 4 sequences of 5 rows; 37 columns are an odd number for every vector width.
B, T, V, H = 4, 5, 37, 8
LEAD = (B, T)
Members = list[Any]


def index_of(form: str, members: int = 3) -> Tensor:
    """The number of each row's teacher: per row, per sequence, or one for all rows. Teacher 1 has the most rows."""
    generator = torch.Generator().manual_seed(5)
    if form == "row":
        return torch.randint(members, LEAD, generator=generator)
    return torch.tensor([1, 2, 1, 0]) if form == "sequence" else torch.tensor(1)


INDICES = ("row", "sequence", "all")


def per_row(index: Tensor, lead: tuple[int, ...] = LEAD) -> Tensor:
    return index.reshape(*index.shape, *[1] * (len(lead) - index.dim())).expand(lead)


def linear(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> LinearTeacher:
    """A teacher with a head of its own, of this width."""
    head = logits(V, width, seed=seed, spread=3 / width**0.5, dtype=dtype)
    return LinearTeacher(
        logits(rows, width, seed=seed + 1, spread=1.0, dtype=dtype),
        head,
        logits(V, seed=seed + 2, dtype=dtype),
    )


def mixed_members(sizes: list[int]) -> Members:
    """Teachers of all forms that have logits: two heads of different widths, and dense bfloat16 logits."""
    makers: list[Callable[[int], Any]] = [
        lambda n: linear(n, 6, seed=20),
        lambda n: logits(n, V, seed=30, dtype=torch.bfloat16),
        lambda n: linear(n, 11, seed=40, dtype=torch.bfloat16),
    ]
    return [makers[k % 3](n) for k, n in enumerate(sizes)]


def sizes_of(index: Tensor, members: int = 3, lead: tuple[int, ...] = LEAD) -> list[int]:
    return [int((per_row(index, lead) == k).sum()) for k in range(members)]


def dense_rows(member: Any) -> Tensor:
    """A teacher's rows as float64 logits, [n, V]."""
    if isinstance(member, Tensor):
        return member.double().reshape(-1, member.shape[-1])
    z = member.hidden.double() @ member.weight.double().T
    return z if member.bias is None else z + member.bias.double()


def in_one(members: Members, index: Tensor, lead: tuple[int, ...] = LEAD) -> Tensor:
    """The teacher's logits of every row, by a loop over the rows."""
    rows = [iter(dense_rows(member)) for member in members]
    picked = [next(rows[k]) for k in per_row(index, lead).flatten().tolist()]
    return torch.stack(picked).view(*lead, -1)


def gradient_of(loss: Tensor, *leaves: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, upstream))


def close(value: Tensor, exact: Tensor, tolerance: float = 2e-6) -> None:
    """Equal to exact up to this share of its largest value; NaN equals NaN."""
    scale = float(exact.detach().nan_to_num().abs().max()) if exact.numel() else 1.0
    torch.testing.assert_close(
        value.detach().double(), exact.detach().double(), rtol=0, atol=tolerance * max(scale, 1e-3), equal_nan=True
    )  # fmt: skip


OPTIONS: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"divergence": "reverse_kl", "temperature": 2.0, "teacher_temperature": 1.5},
    "jsd": {"divergence": "jsd", "alpha": 0.4, "label_smoothing": 0.1, "reduction": "sum"},
    "capped": {"teacher_softcap": 4.0, "teacher_logit_scale": 0.7, "reduction": "batchmean"},
    "logits": {"divergence": "squared_error", "num_items": 7.0},
}


def _few_in_triton(any_backend: str, form: str) -> bool:
    """Triton's interpreter needs a second per call, and only the order of rows depends on the form of the index."""
    return any_backend != "triton" or form == "row"


# ---- values and gradients


@pytest.mark.pairwise(each="any_backend")
@pytest.mark.only_where.with_args(_few_in_triton)
@pytest.mark.parametrize("form", INDICES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_against_float64(
    any_backend: str, form: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(form)
    members = mixed_members(sizes_of(index))
    student = logits(*LEAD, V, seed=1)
    labels = labels_for(*LEAD, vocabulary=V, seed=2, ignored=0.2)
    mask = torch.rand(LEAD, generator=torch.Generator().manual_seed(3)) > 0.3
    weight = torch.rand(LEAD, generator=torch.Generator().manual_seed(4)) + 0.5
    given = {"labels": labels, "mask": mask, "weight": weight} | options
    exact = compose(student, in_one(members, index), terms=False, **given)
    ran = ran_on(monkeypatch, any_backend)
    leaf = student.clone().requires_grad_()
    loss, parts = kd_loss(
        leaf, RoutedTeacher(members, index), return_parts=True, backend=any_backend, **given
    )
    assert set(ran) == {any_backend}
    close(loss, exact.loss)
    close(gradient_of(loss, leaf)[0].flatten(0, 1), exact.student_gradient.flatten(0, -2))
    close(parts.distillation.flatten(), exact.distillation.flatten())
    assert int(parts.counted) == exact.counted


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("form", INDICES)
def test_hidden_states_against_float64(backend: str, form: str, chunk_size: int | None) -> None:
    index = index_of(form)
    members = mixed_members(sizes_of(index))
    hidden, weight, bias = logits(*LEAD, H, seed=6), logits(V, H, seed=7), logits(V, seed=8)
    labels = labels_for(*LEAD, vocabulary=V, seed=2, ignored=0.3)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    loss = fused_linear_kd_loss(
        *leaves[:2], RoutedTeacher(members, index), labels, student_bias=leaves[2], alpha=0.6,
        divergence="reverse_kl", temperature=1.5, chunk_size=chunk_size, backend=backend,
    )  # fmt: skip
    z = hidden.double() @ weight.double().T + bias.double()
    exact = compose(
        z, in_one(members, index), labels, terms=False, alpha=0.6, divergence="reverse_kl", temperature=1.5
    )  # fmt: skip
    rows = exact.student_gradient.reshape(-1, V)
    close(loss, exact.loss)
    of_hidden, of_weight, of_bias = gradient_of(loss, *leaves)
    close(of_hidden.flatten(0, 1), rows @ weight.double(), 5e-6)
    close(of_weight, rows.T @ hidden.double().flatten(0, 1), 5e-6)
    close(of_bias, rows.sum(0), 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_low_precision_equals_each_teachers_own_call(
    backend: str, dtype: torch.dtype, reduction: str
) -> None:
    """Logits of teachers whose hidden states have logits_dtype stay in it, those of others are float32."""
    index = index_of("row")
    members: Members = [
        linear(sizes_of(index)[0], 6, seed=20, dtype=dtype),
        linear(sizes_of(index)[1], 9, seed=30),
        logits(sizes_of(index)[2], V, seed=40, dtype=torch.float16),
    ]
    hidden, weight = logits(*LEAD, H, seed=6, dtype=dtype), logits(V, H, seed=7, dtype=dtype)
    options: dict[str, Any] = {"logits_dtype": dtype, "backend": backend, "chunk_size": 4}

    def run(rows: Tensor, teacher: Any, factor: float) -> tuple[Tensor, Tensor, Tensor]:
        leaves = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = fused_linear_kd_loss(*leaves, teacher, reduction=reduction, **options)
        return loss.detach(), *gradient_of(factor * loss.sum(), *leaves)  # type: ignore[return-value]

    loss, of_hidden, of_weight = run(hidden, RoutedTeacher(members, index), 1.0)
    own_weights, total = torch.zeros(V, H), torch.zeros(())
    for k, member in enumerate(members):
        at = index == k
        share = float(at.sum()) / at.numel() if reduction == "mean" else 1.0
        own_loss, own_hidden, own_weight = run(hidden[at], member, share)
        total = total + share * own_loss.sum()
        own_weights += own_weight.float()
        if reduction == "none":
            torch.testing.assert_close(loss[at], own_loss, rtol=1e-5, atol=1e-6)
        close(of_hidden[at], own_hidden, 2 * torch.finfo(dtype).eps)
    close(loss.sum(), total, 1e-5)
    close(of_weight, own_weights, 4 * torch.finfo(dtype).eps)


def sparse_members(sizes: list[int], tail: str, how: str) -> list[TopK]:
    """TopKs of 3, 7 and 5 tokens that differ in how: dtypes, whether they have the mass of their tail, temperatures."""
    members = []
    for number, (rows, k) in enumerate(zip(sizes, (3, 7, 5), strict=True)):
        own = TopK.from_logits(logits(rows, V, seed=60 + number, spread=2.0), k, tail=tail)
        dtype = (torch.bfloat16, torch.float32, torch.float16)[number] if how == "dtypes" else None
        keeps = how not in ("dtypes", "tails") or number == 1
        members.append(
            TopK(
                own.ids.to(torch.int32 if number == 2 else torch.int64),
                own.logprobs.to(dtype),
                tail,
                own.tail_logprob if keeps else None,
                (1.0, 2.0, 0.5)[number] if how == "temperatures" else 1.0,
            )
        )
    return members


@pytest.mark.pairwise(each="any_backend")
@pytest.mark.only_where.with_args(_few_in_triton)
@pytest.mark.parametrize("form", INDICES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("how", ["alike", "dtypes", "tails", "temperatures"])
@pytest.mark.only_where(lambda tail, how: how != "temperatures" or tail.startswith("renormalize"))
@pytest.mark.only_where(lambda any_backend, how: any_backend != "triton" or how == "dtypes")
def test_topk_equals_each_teachers_own_call(
    any_backend: str, form: str, tail: str, how: str
) -> None:
    index = index_of(form)
    members = sparse_members(sizes_of(index), tail, how)
    if sizes_of(index)[1] > 2:
        members[1].ids[2] = -1  # a row without a teacher
    student, labels = logits(*LEAD, V, seed=1), labels_for(*LEAD, vocabulary=V, seed=2, ignored=0.2)
    names = ("teacher_entropy", "teacher_mass", "student_mass", "forward_kl")
    options: dict[str, Any] = {
        "alpha": 0.7, "divergence": "jsd", "reduction": "none", "return_parts": names, "backend": any_backend,
    }  # fmt: skip
    if how == "temperatures":
        options["teacher_temperature"] = 1.5
    leaf = student.clone().requires_grad_()
    loss, parts = kd_loss(leaf, RoutedTeacher(members, index), labels, **options)
    (gradient,) = gradient_of(loss, leaf, upstream=torch.ones(LEAD))
    for k, member in enumerate(members):
        at = per_row(index) == k
        own = student[at].clone().requires_grad_()
        own_loss, own_parts = kd_loss(own, member, labels[at], **options)
        close(loss[at], own_loss)
        close(gradient[at], gradient_of(own_loss, own, upstream=torch.ones(int(at.sum())))[0])
        for name in names:
            close(getattr(parts, name)[at], getattr(own_parts, name))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 12),
    st.integers(1, 5),
    st.integers(0, 10_000),
    st.sampled_from(["topk", "dense"]),
)
def test_any_division_of_rows(rows: int, members: int, seed: int, form: str) -> None:
    """Teachers with no row, one teacher for all rows, and no rows at all."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(
        int(torch.randint(1, members + 1, (), generator=generator)), (rows,), generator=generator
    )
    each = [logits(int((index == k).sum()), 9, seed=seed + k) for k in range(members)]
    whole = torch.zeros(rows, 9)
    for k, own in enumerate(each):
        whole[index == k] = own
    student = logits(rows, 9, seed=seed + 77).requires_grad_()
    teachers: Members = each if form == "dense" else [TopK.from_logits(own, 4) for own in each]
    expected: Any = whole if form == "dense" else TopK.from_logits(whole, 4)
    ours = kd_loss(student, RoutedTeacher(teachers, index), divergence="jsd", reduction="sum")
    theirs = kd_loss(student, expected, divergence="jsd", reduction="sum")
    close(ours, theirs)
    close(gradient_of(ours, student)[0], gradient_of(theirs, student)[0])


@pytest.mark.parametrize("form", ["dense", "linear"])
def test_one_teacher_in_float64(form: str) -> None:
    """Each teacher's rows are computed as in its own call; the loss is float64, as that of the float64 teacher."""
    index = index_of("row")
    sizes, double = sizes_of(index), torch.float64
    members: Members = [logits(sizes[0], V, seed=1), linear(sizes[1], 5, seed=2)]
    last = (
        logits(sizes[2], V, seed=3, dtype=double)
        if form == "dense"
        else linear(sizes[2], 4, 3, double)
    )
    members.append(last)
    student = logits(*LEAD, V, seed=1).requires_grad_()
    for reduction in ("none", "mean"):
        loss, parts = kd_loss(
            student,
            RoutedTeacher(members, index),
            reduction=reduction,
            return_parts=("acceptance",),
        )
        exact = compose(student.detach(), in_one(members, index), terms=False, reduction=reduction)
        assert loss.dtype == parts.acceptance.dtype == double  # type: ignore[union-attr]
        close(loss.flatten(), exact.loss.flatten())
    close(gradient_of(loss, student)[0].flatten(0, 1), exact.student_gradient.reshape(-1, V))


def test_a_bucket_against_its_formula() -> None:
    """K + 1 events per row in float64, from the rows of teachers with 2 and 5 tokens."""
    index = torch.tensor([1, 0, 1, 1, 0])
    full = logits(5, V, seed=3, dtype=torch.float64)
    own = [TopK.from_logits(full[index == k], (2, 5)[k]) for k in range(2)]
    student = logits(5, V, seed=4, dtype=torch.float64).requires_grad_()
    loss = kd_loss(student, RoutedTeacher(own, index), divergence="reverse_kl", reduction="sum")
    expected = torch.zeros((), dtype=torch.float64)
    for r in range(5):
        p, q = full[r].softmax(-1), student[r].softmax(-1)
        ids = p.topk((2, 5)[int(index[r])]).indices
        p_events = torch.cat([p[ids], 1 - p[ids].sum()[None]])
        q_events = torch.cat([q[ids], 1 - q[ids].sum()[None]])
        expected = expected + (q_events * (q_events / p_events).log()).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(loss, student), gradient_of(expected, student))


@pytest.mark.parametrize("divergence", ["dkd", "nkd"])
def test_divergences_that_treat_the_label_separately(any_backend: str, divergence: str) -> None:
    index = index_of("row")
    members = mixed_members(sizes_of(index))
    student, labels = logits(*LEAD, V, seed=1), labels_for(*LEAD, vocabulary=V, seed=2, ignored=0.2)
    options: dict[str, Any] = {
        "divergence": divergence,
        "reduction": "none",
        "backend": any_backend,
    }
    leaf, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = kd_loss(leaf, RoutedTeacher(members, index), labels, **options)
    whole = kd_loss(other, in_one(members, index).float(), labels, **options)
    close(loss, whole, 1e-5)
    ones = torch.ones(LEAD)
    close(
        gradient_of(loss, leaf, upstream=ones)[0], gradient_of(whole, other, upstream=ones)[0], 1e-5
    )


def test_rows_that_keep_their_last_dimensions() -> None:
    index = index_of("sequence")
    flat = [logits(n, V, seed=k) for k, n in enumerate(sizes_of(index))]
    shaped = [rows.view(-1, T, V) for rows in flat]
    student = logits(*LEAD, V, seed=9)
    loss = kd_loss(student, RoutedTeacher(flat, index))
    assert torch.equal(loss, kd_loss(student, RoutedTeacher(shaped, index)))
    # Transposed, strided and negated rows have the same values.
    odd = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in shaped]
    odd[1] = torch.stack([shaped[1], shaped[1]], -1)[..., 0]
    odd[2] = torch.complex(torch.zeros_like(shaped[2]), -shaped[2]).conj().imag
    assert odd[2].is_neg() and not odd[1].is_contiguous()
    assert torch.equal(loss, kd_loss(student, RoutedTeacher(odd, index)))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str
)
def test_every_integer_dtype_of_the_index(dtype: torch.dtype) -> None:
    index = index_of("row").to(dtype)
    members = sparse_members(sizes_of(index), "bucket", "alike")
    student = logits(*LEAD, V, seed=9)
    assert torch.equal(
        kd_loss(student, RoutedTeacher(members, index)),
        kd_loss(student, RoutedTeacher(members, index.to(torch.int64))),
    )


# ---- masks, gradients of teachers, memory


@pytest.mark.parametrize("form", ["dense", "linear", "topk"])
def test_dropped_rows_are_not_read(backend: str, form: str) -> None:
    """They may hold NaN on both sides, and they are part of each teacher's rows."""
    index = index_of("row")
    mask = torch.rand(LEAD, generator=torch.Generator().manual_seed(3)) > 0.4
    student = logits(*LEAD, V, seed=1)
    sizes = sizes_of(index)
    if form == "topk":
        members: Members = sparse_members(sizes, "bucket", "tails")
    else:
        members = [
            linear(n, 6, seed=20 + k) if form == "linear" else logits(n, V, seed=k)
            for k, n in enumerate(sizes)
        ]
    clean = student.clone().requires_grad_()
    expected = kd_loss(clean, RoutedTeacher(members, index), mask=mask, backend=backend)
    for k, member in enumerate(members):
        dropped = ~mask[index == k]
        assert dropped.any() and not dropped.all()
        values = (
            member.logprobs if form == "topk" else member.hidden if form == "linear" else member
        )
        values[dropped] = NAN
    dirty = student.clone()
    dirty[~mask] = NAN
    dirty.requires_grad_()
    loss = kd_loss(dirty, RoutedTeacher(members, index), mask=mask, backend=backend)
    assert torch.equal(loss, expected) and not loss.isnan()
    (gradient,) = gradient_of(loss, dirty)
    assert torch.equal(gradient, gradient_of(expected, clean)[0])
    assert not gradient[~mask].any()


def test_no_teacher_computes_logits_of_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each LinearTeacher multiplies its kept rows once, in chunks of at most chunk_size rows."""
    index, mask = (
        index_of("row"),
        torch.rand(LEAD, generator=torch.Generator().manual_seed(3)) > 0.4,
    )
    members = [
        linear(n, width, seed=width) for n, width in zip(sizes_of(index), (3, 4, 5), strict=True)
    ]
    computed: dict[int, list[int]] = {width: [] for width in (3, 4, 5, H)}
    real = engine_chunks.make_logits

    def counting(hidden: Tensor, *others: Any) -> Tensor:
        computed[hidden.shape[1]].append(hidden.shape[0])
        return real(hidden, *others)

    monkeypatch.setattr(engine_chunks, "make_logits", counting)
    sorts = []
    real_sort = torch.Tensor.argsort
    monkeypatch.setattr(Tensor, "argsort", lambda *a, **o: sorts.append(1) or real_sort(*a, **o))
    fused_linear_kd_loss(
        logits(*LEAD, H, seed=6).requires_grad_(), logits(V, H, seed=7), RoutedTeacher(members, index), mask=mask,
        chunk_size=3,
    )  # fmt: skip
    for k, width in enumerate((3, 4, 5)):
        assert sum(computed[width]) == int((mask & (index == k)).sum())
        assert max(computed[width]) <= 3
    assert sum(computed[H]) == int(mask.sum())
    assert len(sorts) == 1


@pytest.mark.only_where.with_args(_few_in_triton)
@pytest.mark.parametrize("form", INDICES)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_dense_teachers_get_their_gradient(any_backend: str, form: str, divergence: str) -> None:
    index = index_of(form)
    dtypes = (
        torch.float32,
        torch.float64 if any_backend == "portable" else torch.float32,
        torch.float32,
    )
    members = [
        logits(n, V, seed=k).to(dtype).requires_grad_()
        for k, (n, dtype) in enumerate(zip(sizes_of(index), dtypes, strict=True))
    ]
    student = logits(*LEAD, V, seed=9).requires_grad_()
    mask = torch.rand(LEAD, generator=torch.Generator().manual_seed(3)) > 0.3
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "mask": mask}
    loss = kd_loss(student, RoutedTeacher(members, index), backend=any_backend, **options)
    ours = gradient_of(loss, student, *members)
    exact = compose(student.detach(), in_one(members, index), terms=False, **options)
    close(loss, exact.loss)
    close(ours[0].flatten(0, 1), exact.student_gradient.reshape(-1, V))
    for k, member in enumerate(members):
        assert ours[1 + k].dtype == member.dtype
        close(ours[1 + k], exact.teacher_gradient.reshape(*LEAD, V)[per_row(index) == k])


def test_gradcheck() -> None:
    index = torch.tensor([1, 0, 1])
    student = logits(3, 5, seed=1, spread=1.0, dtype=torch.float64).requires_grad_()
    dense = [
        logits(n, 5, seed=k, spread=1.0, dtype=torch.float64).requires_grad_()
        for k, n in ((0, 1), (1, 2))
    ]

    def loss(s: Tensor, a: Tensor, b: Tensor) -> Any:
        return kd_loss(s, RoutedTeacher([a, b], index), divergence="jsd", reduction="none")

    assert torch.autograd.gradcheck(loss, (student, *dense))
    constants = [x.detach() for x in dense]
    assert torch.autograd.gradcheck(lambda s: loss(s, *constants), (student,))


def test_inplace() -> None:
    index, mask = (
        index_of("row"),
        torch.rand(LEAD, generator=torch.Generator().manual_seed(3)) > 0.3,
    )
    teacher = RoutedTeacher(mixed_members(sizes_of(index)), index)
    leaf = logits(*LEAD, V, seed=1).requires_grad_()
    expected = gradient_of(kd_loss(leaf, teacher, mask=mask), leaf)
    student = leaf * 1.0
    loss = kd_loss(student, teacher, mask=mask, inplace=True)
    memory = student.detach().clone()
    assert torch.equal(memory, expected[0])
    assert torch.equal(gradient_of(loss, leaf)[0], expected[0])


def test_micro_batches_and_modules() -> None:
    """num_items divides parts of a batch like the whole batch, and the modules pass the teacher on."""
    index = index_of("row")
    members = mixed_members(sizes_of(index))
    hidden, weight = logits(*LEAD, H, seed=6), logits(V, H, seed=7)
    labels = labels_for(*LEAD, vocabulary=V, seed=2, ignored=0.3)
    student = hidden @ weight.T
    whole = kd_loss(student, RoutedTeacher(members, index), labels)
    items = int((labels != -100).sum())
    used = [0, 0, 0]
    total = torch.zeros(())
    for rows in range(B):
        own = []
        for k, member in enumerate(members):
            span = slice(used[k], used[k] + int((index[rows] == k).sum()))
            used[k] = span.stop
            own.append(
                member[span]
                if isinstance(member, Tensor)
                else LinearTeacher(member.hidden[span], member.weight, member.bias)
            )
        teacher = RoutedTeacher(own, index[rows])
        total = total + kd_loss(student[rows], teacher, labels[rows], num_items=items)
    close(total, whole)
    teacher = RoutedTeacher(members, index)
    close(fastkd.KDLoss(temperature=1.0)(student, teacher, labels), whole)
    close(fastkd.FusedLinearKDLoss(chunk_size=3)(hidden, weight, teacher, labels), whole, 1e-5)


def test_autocast_casts_the_operands_of_each_teacher() -> None:
    index = index_of("row")
    members: Members = [linear(n, 6, seed=20 + k) for k, n in enumerate(sizes_of(index))]
    hidden, weight = logits(*LEAD, H, seed=6), logits(V, H, seed=7)
    half = [
        LinearTeacher(m.hidden.bfloat16(), m.weight.bfloat16(), m.bias.bfloat16()) for m in members
    ]
    with torch.autocast("cpu", torch.bfloat16):
        ours = fused_linear_kd_loss(hidden, weight, RoutedTeacher(members, index))
    theirs = fused_linear_kd_loss(hidden.bfloat16(), weight.bfloat16(), RoutedTeacher(half, index))
    assert torch.equal(ours, theirs)


def test_measures_of_dense_teachers() -> None:
    index = index_of("row")
    members = mixed_members(sizes_of(index))
    student = logits(*LEAD, V, seed=1)
    _, parts = kd_loss(
        student, RoutedTeacher(members, index), return_parts=("teacher_entropy", "acceptance")
    )
    p, q = in_one(members, index).softmax(-1), student.double().softmax(-1)
    close(parts.teacher_entropy, -(p * p.log()).sum(-1))  # type: ignore[arg-type]
    close(parts.acceptance, torch.minimum(p, q).sum(-1))  # type: ignore[arg-type]


def test_widths_and_vocab_size() -> None:
    index = index_of("row")
    sizes = sizes_of(index)
    members = [logits(n, V + k, seed=k) for k, n in enumerate(sizes)]
    student = logits(*LEAD, V + 4, seed=1).requires_grad_()
    with pytest.raises(ValueError, match=r"teacher.teachers\[1\] has 38 columns"):
        kd_loss(student, RoutedTeacher(members, index))
    loss = kd_loss(student, RoutedTeacher(members, index), vocab_size=V - 1)
    trimmed = [member[:, : V - 1].requires_grad_() for member in members]
    expected = kd_loss(student[..., : V - 1], RoutedTeacher(trimmed, index))
    close(loss, expected)
    close(gradient_of(loss, student)[0], gradient_of(expected, student)[0])
    leaves = [member.clone().requires_grad_() for member in members]
    loss = kd_loss(student, RoutedTeacher(leaves, index), vocab_size=V - 1)
    for own, leaf in zip(gradient_of(loss, *leaves), leaves, strict=True):
        assert own.shape == leaf.shape and own[:, : V - 1].any() and not own[:, V - 1 :].any()


# ---- graphs and processes


@pytest.mark.parametrize("form", ["mixed", "topk", "trained"])
@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph(form: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    index = index_of("row")
    sizes = sizes_of(index)
    student = logits(*LEAD, V, seed=1).requires_grad_()
    members: Members = {
        "mixed": lambda: mixed_members(sizes),
        "topk": lambda: sparse_members(sizes, "bucket", "tails"),
        "trained": lambda: [logits(n, V, seed=k).requires_grad_() for k, n in enumerate(sizes)],
    }[form]()
    leaves = [student, *(members if form == "trained" else [])]

    def step(s: Tensor, numbers: Tensor, temperature: float) -> Any:
        return kd_loss(
            s * 1.0, RoutedTeacher(members, numbers), divergence="jsd", temperature=temperature
        )

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    # The second index has as many rows of each teacher, elsewhere.
    for numbers in (index, index.flip(0), index.T.reshape(LEAD)):
        ours, theirs = compiled(student, numbers, 1.0), step(student, numbers, 1.0)
        close(ours, theirs)
        for a, b in zip(gradient_of(ours, *leaves), gradient_of(theirs, *leaves), strict=True):
            close(a, b)
    assert counter.frame_count == 1
    wrong = index.clone()
    wrong[index == 1] = 2
    if form == "mixed":
        with pytest.raises(
            ValueError, match=r"rows of teacher.teachers\[1\] must be ., one for each"
        ):
            compiled(student, wrong, 1.0)
    if form in ("topk", "trained"):
        assert compiled(student, wrong, 1.0).isnan()
        assert compiled(student, torch.full_like(index, 3), 1.0).isnan()
        assert compiled(student, torch.full_like(index, -1), 1.0).isnan()
        assert not compiled(student, index, 1.0).isnan()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(2)
    yield pool
    pool.stop()


@pytest.mark.parametrize(
    "form", ["logits", "trained", "topk", "hidden states", "whole logits", "whole trained"]
)
def test_a_shared_vocabulary(processes: Processes, form: str) -> None:
    """Two processes with 15 and 22 of 37 columns compute what one process computes; teachers may be whole on both."""
    index = index_of("row")
    sizes = sizes_of(index)
    teachers: Members = (
        sparse_members(sizes, "bucket", "tails") if form == "topk"
        else [logits(n, V, seed=k) for k, n in enumerate(sizes)] if form.endswith("trained")
        else mixed_members(sizes)
    )  # fmt: skip
    mask = torch.rand(LEAD, generator=torch.Generator().manual_seed(3)) > 0.3
    student, head = logits(*LEAD, V, seed=1), logits(V, H, seed=2)
    results = processes.run(
        2,
        spread_routed.losses,
        form,
        student,
        head,
        logits(*LEAD, H, seed=3),
        teachers,
        index,
        mask,
    )
    for loss, gradient, teacher_gradient in results:
        expected = spread_routed.on_one(
            form, student, head, logits(*LEAD, H, seed=3), teachers, index, mask
        )
        close(loss, expected[0])
        close(gradient, expected[1])
        close(teacher_gradient, expected[2])
    failures = processes.outcomes(2, spread_routed.other_index, student, teachers, index)
    assert all(not good for good, _ in failures)


# ---- errors


def routed(*members: Any, index: Any = None) -> Any:
    return RoutedTeacher(members, index_of("row", 2) if index is None else index)


ROW = torch.zeros(1, V)
SPARSE = TopK.from_logits(ROW, 2)
CONSTRUCTOR: list[tuple[Callable[[], Any], type, str]] = [
    (lambda: RoutedTeacher([], torch.tensor(0)), ValueError, "teachers must contain at least one teacher, got none"),
    (lambda: RoutedTeacher(ROW, torch.tensor(0)), TypeError, "teachers must be a list of teachers, got Tensor"),
    (lambda: routed(ROW, None), TypeError,
     r"teachers\[1\] must be dense logits, a TopK or a LinearTeacher, got NoneType"),
    (lambda: routed(fastkd.Ensemble([ROW])), TypeError,
     r"teachers\[0\] must be dense logits, a TopK or a LinearTeacher, got Ensemble"),
    (lambda: routed(ROW, routed(ROW)), TypeError, r"got RoutedTeacher"),
    (lambda: routed(ROW.long()), TypeError, r"teachers\[0\] must be torch.float32 or .*, got torch.int64"),
    (lambda: routed(torch.tensor(1.0)), ValueError, r"teachers\[0\] must be dense logits \[n, V\], got a scalar"),
    (lambda: routed(ROW, SPARSE), TypeError,
     r"teachers\[1\] is a TopK and teachers\[0\] is not: pass a TopK for all \(TopK.from_logits makes one"),
    (lambda: routed(SPARSE, linear(1, 2, seed=0)), TypeError, r"teachers\[0\] is a TopK and teachers\[1\] is not"),
    (lambda: routed(ROW, index=[0]), TypeError, "index must be a tensor, got list"),
    (lambda: routed(ROW, index=torch.tensor([True])), TypeError, "index must be torch.int64 or .*, got torch.bool"),
    (lambda: routed(ROW, index=torch.tensor([0.0])), TypeError, "index must be torch.int64 or .*, got torch.float32"),
    (lambda: routed(SPARSE, TopK(SPARSE.ids, SPARSE.logprobs, "truncate")), ValueError,
     r"teachers\[1\].tail must be that of teachers\[0\], 'bucket'; got 'truncate'"),
    (lambda: routed(SPARSE, TopK(SPARSE.ids, SPARSE.logprobs, temperature=2.0)), ValueError,
     r"teachers\[1\].temperature must be that of teachers\[0\], 1.0, because tail='bucket' needs .*; got 2.0"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), CONSTRUCTOR)
def test_errors_of_the_constructor(make: Callable[[], Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def _members(form: str, *sizes: int) -> Members:
    if form == "topk":
        return [TopK.from_logits(logits(n, V, seed=n), 2) for n in sizes]
    return [logits(n, V, seed=n) if form == "dense" else linear(n, 3, seed=n) for n in sizes]


COUNTS: list[tuple[list[int], list[int], str]] = [
    ([0, 1, 1, 1], [2, 2], r"the number of rows of teacher.teachers\[0\] must be 1, one for each row of the student "
     r"whose index is 0; got 2. Masked rows count too"),
    ([0, 1, 1, 1], [1, 2], r"teacher.teachers\[1\] must be 3, .* whose index is 1; got 2"),
    ([0, 0, 0, 0], [4, 1], r"teacher.teachers\[1\] must be 0, .* whose index is 1; got 1"),
    ([0, 1, 2, 1], [1, 3], r"teacher.index must be in \[0, 2\), the number of a teacher; got 0 to 2"),
    ([0, 1, -1, 1], [1, 3], r"teacher.index must be in \[0, 2\), the number of a teacher; got -1 to 1"),
]  # fmt: skip


@pytest.mark.parametrize("form", ["dense", "linear", "topk"])
@pytest.mark.parametrize(("index", "sizes", "message"), COUNTS)
def test_errors_of_the_counts(form: str, index: list[int], sizes: list[int], message: str) -> None:
    teacher = RoutedTeacher(_members(form, *sizes), torch.tensor(index))
    with pytest.raises(ValueError, match=message):
        kd_loss(logits(4, V, seed=1), teacher)
    with pytest.raises(ValueError, match=message):
        fused_linear_kd_loss(logits(4, H, seed=1), logits(V, H, seed=2), teacher)


def test_errors_of_shapes() -> None:
    student = logits(*LEAD, V, seed=1)
    index = index_of("sequence")
    sizes = sizes_of(index)
    good = [logits(n, V, seed=1) for n in sizes]
    for wrong in (torch.zeros(T, dtype=torch.int64), torch.zeros(B, T, 1, dtype=torch.int64)):
        with pytest.raises(
            ValueError,
            match=r"teacher.index must have the leading shape of student_logits, \(4, 5\)",
        ):
            kd_loss(student, RoutedTeacher(good, wrong))
    # As many rows, in another order: time first.
    swapped = [rows.view(-1, T, V).transpose(0, 1) for rows in good]
    with pytest.raises(
        ValueError,
        match=r"teachers\[1\] must have rows of shape \(n,\) or \(n, \*rest\), where rest stands for the last .*5, 2",
    ):
        kd_loss(student, RoutedTeacher([good[0], swapped[1], good[2]], index))
    with pytest.raises(ValueError, match=r"teacher.teachers\[2\].* got rows in \(\)"):
        kd_loss(student, RoutedTeacher([good[0], good[1], good[2][0]], index))
    meta = RoutedTeacher(good, index.to("meta"))
    with pytest.raises(
        ValueError, match="teacher.index must be on cpu, where student_logits is; got meta"
    ):
        kd_loss(student, meta)
    with pytest.raises(ValueError, match=r"teacher.teachers\[0\] must be on cpu.*got meta"):
        kd_loss(student, RoutedTeacher([good[0].to("meta"), *good[1:]], index))


def test_errors_of_gradients() -> None:
    index = index_of("row", 2)
    sizes = sizes_of(index, 2)
    dense = [logits(n, V, seed=n).requires_grad_() for n in sizes]
    head = linear(sizes[1], 3, seed=1)
    message = "requires grad, and only a teacher of dense logits gets a gradient; detach it"
    student = logits(*LEAD, V, seed=1)
    with pytest.raises(ValueError, match=rf"teacher.teachers\[0\] {message}"):
        kd_loss(student, RoutedTeacher([dense[0], head], index))
    head.weight.requires_grad_()
    with pytest.raises(ValueError, match=rf"teacher.teachers\[1\].weight {message}"):
        kd_loss(student, RoutedTeacher([dense[0].detach(), head], index))
    with pytest.raises(ValueError, match=rf"teacher.teachers\[0\] {message}"):
        fused_linear_kd_loss(
            logits(*LEAD, H, seed=1), logits(V, H, seed=2), RoutedTeacher(dense, index)
        )
    sparse = [TopK.from_logits(x, 2) for x in dense]
    sparse[1].logprobs.requires_grad_()
    with pytest.raises(ValueError, match=rf"teacher.teachers\[1\].logprobs {message}"):
        kd_loss(student, RoutedTeacher(sparse, index))


def test_temperatures_of_topks_are_checked() -> None:
    index = index_of("row")
    members = sparse_members(sizes_of(index), "bucket", "alike")
    with pytest.raises(
        ValueError, match="teacher_temperature is 2.0, and teacher.logprobs were taken at 1.0"
    ):
        kd_loss(logits(*LEAD, V, seed=1), RoutedTeacher(members, index), temperature=2.0)


def test_sums_near_the_limit_are_judged_by_each_teachers_own_rule() -> None:
    """Probabilities that sum to 1.095 are valid without a tail_logprob, and the estimated tail does not count."""
    ids = torch.tensor([[0, 1]])
    high = TopK(ids, torch.tensor([[0.8, 0.295]]).log())
    low = TopK(ids, torch.tensor([[0.5, 0.2]]).log(), tail_logprob=torch.tensor([0.3]).log())
    student = logits(2, V, seed=1)
    loss = kd_loss(student, RoutedTeacher([high, low], torch.tensor([0, 1])), reduction="none")
    for row, own in enumerate((high, low)):
        torch.testing.assert_close(loss[row], kd_loss(student[row : row + 1], own))
    above = TopK(ids, torch.tensor([[0.8, 0.32]]).log())
    loss = kd_loss(student, RoutedTeacher([above, low], torch.tensor([0, 1])), reduction="none")
    assert loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize("tail", ["bucket", "truncate"])
def test_a_tail_below_rounding_is_estimated_in_each_teachers_dtype(tail: str) -> None:
    """The mass of a bfloat16 teacher's tail, far below its rounding, is not that of float32 log-probabilities."""
    sharp = logits(4, V, seed=5, spread=9.0)
    own = TopK.from_logits(sharp, 4, tail=tail)
    index = torch.tensor([0, 1, 0, 1])
    members = [
        TopK(own.ids[::2], own.logprobs[::2].bfloat16(), tail),
        TopK(own.ids[1::2], own.logprobs[1::2], tail),
    ]
    student = logits(4, V, seed=1)
    options: dict[str, Any] = {"reduction": "none", "return_parts": ("reverse_kl",)}
    loss, parts = kd_loss(student, RoutedTeacher(members, index), **options)
    for k, member in enumerate(members):
        own_loss, own_parts = kd_loss(student[index == k], member, **options)
        close(loss[index == k], own_loss)
        close(parts.reverse_kl[index == k], own_parts.reverse_kl)


def test_checked_values_name_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTKD_CHECK", "1")
    index = torch.tensor([1, 0, 1])
    student = logits(3, V, seed=1)
    ids = torch.tensor([[0, 1], [2, 3]])
    first = TopK(ids[:1], torch.full((1, 2), -1.0), tail_logprob=torch.tensor([-2.0]))
    # Without a tail_logprob, logarithms of -inf leave all mass to the tail.
    second = TopK(ids, torch.tensor([[-INF, -INF], [-1.0, -2.0]]))
    loss = kd_loss(student, RoutedTeacher([first, second], index), reduction="none")
    assert not loss.isnan().any()
    bad = TopK(ids, torch.tensor([[-1.0, -2.0], [0.5, 0.5]]))
    with pytest.raises(ValueError, match="with a sum of 1 at most; those of row 2 sum to"):
        kd_loss(student, RoutedTeacher([first, bad], index))


def test_a_device_compares_the_counts_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for a device, a wrong index makes all rows NaN; rows that are dropped stay 0."""
    monkeypatch.setattr("fastkd.call.checks.reads_index", lambda *_: False)
    index = torch.tensor([0, 1, 1, 1])
    student = logits(4, V, seed=1)
    mask = torch.tensor([True, True, True, False])
    good = RoutedTeacher(_members("topk", 1, 3), index)
    assert not kd_loss(student, good).isnan()
    for tail in TAILS:
        members = [TopK.from_logits(logits(2, V, seed=k), 2, tail=tail) for k in range(2)]
        loss = kd_loss(student, RoutedTeacher(members, index), mask=mask, reduction="none")
        assert loss.isnan().tolist() == [True, True, True, False]
    with pytest.raises(
        ValueError, match=r"must add up to 4, the number of rows of student_logits; got 1 \+ 2 = 3"
    ):
        kd_loss(student, RoutedTeacher(_members("topk", 1, 2), index))
    trained = [x.requires_grad_() for x in _members("dense", 2, 2)]
    loss = kd_loss(student, RoutedTeacher(trained, index), mask=mask, reduction="none")
    assert loss.isnan().tolist() == [True, True, True, False]
    # Teachers with logits count on the host before they compute.
    with pytest.raises(ValueError, match=r"teachers\[0\] must be 1, .* is 0; got 2"):
        kd_loss(student, RoutedTeacher(_members("dense", 2, 2), index))


def test_a_cuda_graph_cannot_capture_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.call import routed as module

    class OnDevice(Tensor):
        is_cuda = True

    real = module.numbers_of
    monkeypatch.setattr(module, "numbers_of", lambda *a: real(*a).as_subclass(OnDevice))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph.*or pass TopKs"):
        kd_loss(logits(1, V, seed=1), RoutedTeacher([ROW], torch.tensor(0)))
