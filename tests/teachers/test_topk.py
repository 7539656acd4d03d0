"""Sparse teachers: every tail policy against float64, and the promises to a caller.

The bar is that of tests/support/accuracy.py, with the plain float32 composition of tests/support/oracles.py
(compose_topk) beside it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.accuracy import (
    ULP,
    assert_within,
    check,
    gradient_bar,
    labels_for,
    logits,
    made,
    powers_for,
    ran_on,
    upstream_for,
    value_bar,
)
from support.options import ALL, BRIEF, TOGETHER, for_topk, prepared
from support.oracles import UNNORMALIZED, Outcome, Sparse, compose_topk
from support.triton_interpreter import corrected
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import KDLoss, TopK, kd_loss
from fastkd.backends import registry
from fastkd.call.tail import masses

INF, NAN = math.inf, math.nan
TAILS = ("bucket", "renormalize", "renormalize_teacher", "truncate")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
tails = pytest.mark.parametrize("tail", TAILS)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


@pytest.fixture(autouse=True, scope="module")
def corrected_interpreter() -> Iterator[None]:
    with corrected():
        yield


# The parameters of the one case of each test that Triton's interpreter runs. The hash of the test's name chooses the
# tail policy; test_triton runs them all.
IN_TRITON = {
    "dtype": torch.float32, "divergence": "forward_kl", "alpha": 0.5, "mass": 1e-9, "label": 21, "depth": 800.0,
    "level": -1e31,
}  # fmt: skip


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=pytest.mark.heavy)])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend for CPU tensors of any size, and the CUDA kernel's source emulated with a row over two blocks."""
    if request.param == "cuda":
        request.getfixturevalue("emulation").ranks = 2
    return str(request.param)


def _one_case_in_triton(everywhere: str, test: str, parameters: dict[str, Any]) -> bool:
    """Whether to run a case: Triton's interpreter needs a second per call, so it runs one case of each test."""
    chosen = {**IN_TRITON, "tail": TAILS[zlib.crc32(test.encode()) % 4]}
    return everywhere != "triton" or all(
        parameters.get(name, value) == value for name, value in chosen.items()
    )


pytestmark = pytest.mark.only_where.with_args(_one_case_in_triton)


@pytest.fixture(params=["reference", "cpu", "cuda", "triton"])
def everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend, Triton with tiles of 16 columns, for tests of a few small rows."""
    if request.param == "cuda":
        request.getfixturevalue("emulation").ranks = 4
    if request.param == "triton":
        kernels, sparse = _triton()
        for module in (kernels, sparse):
            monkeypatch.setattr(module, "tile", lambda *row: (16, 1))
        monkeypatch.setattr(sparse, "BLOCK_K", 4)  # so that the tokens need several tiles
    return str(request.param)


def _triton() -> tuple[ModuleType, ModuleType]:
    from fastkd.kernels import launch, sparse

    return launch, sparse


# The divergences, and those parameters whose formulas differ. 0 * infinity is what they disagree on.
DIVERGENCES: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in fastkd.DIVERGENCES if name not in UNNORMALIZED),
    ("mixture", {"forward": 0.7, "reverse": 0.0}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 1.0}),
    ("alpha_beta", {"alpha": 1.0, "beta": 0.0}),
    ("alpha_beta", {"alpha": 0.4, "beta": 0.0}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.4}),
    ("alpha_beta", {"alpha": 0.3, "beta": -0.3}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.0}),
    ("alpha_beta", {"alpha": 1.3, "beta": -0.2}),
    ("forward_kl", {"clip": 0.02}),
    ("jsd", {"beta": 0.5, "clip": 0.01}),
    ("jsd", {"beta": 1.0, "clip": 0.05}),
]


def _label(variant: object) -> str | None:
    if not isinstance(variant, tuple):
        return None
    name, parameters = variant
    return "-".join([name, *(f"{value:g}" for value in parameters.values())])


variants = pytest.mark.parametrize("variant", DIVERGENCES, ids=_label)
# Divergences that are finite where p = 0, including the tail's event.
ADDITIVE = [
    ("forward_kl", {}), ("soft_cross_entropy", {}), ("jsd", {}),
    ("jsd", {"beta": 0.1}), ("skew_forward_kl", {}), ("skew_reverse_kl", {}), ("tvd", {}), ("hellinger", {}),
]  # fmt: skip
# The names of all others: infinite where p = 0, or without a degree of 1.
INFINITE = {"reverse_kl", "mixture", "alpha_beta"}


def test_every_divergence_is_additive_or_infinite() -> None:
    names = {name for name, _ in ADDITIVE}
    assert names | INFINITE == {name for name, _ in DIVERGENCES} and not names & INFINITE


def defined(tail: str, variant: tuple[str, dict[str, float]]) -> bool:
    return tail != "renormalize_teacher" or variant in ADDITIVE


def _defined(tail: str, divergence: str) -> bool:
    return defined(tail, (divergence, {}))


# The other divergences are infinite at p = 0 and refused (test_what_kd_loss_refuses).
defined_variants = pytest.mark.only_where.with_args(defined)
defined_divergences = pytest.mark.only_where.with_args(_defined)


def sparse(
    *lead: int,
    vocabulary: int,
    k: int,
    seed: int,
    tail: str = "bucket",
    at: float = 1.0,
    padding: float = 0.2,
    tail_given: bool = True,
    dtype: torch.dtype = torch.float32,
    spread: float = 3.0,
) -> Sparse:
    """A TopK of likely and unlikely tokens in random order, from logits of that spread; some tokens are padding with
    NaN.

    The mass of the tail is that of all other tokens and of those that padding hides.
    """
    generator = torch.Generator().manual_seed(seed)
    dense = (logits(*lead, vocabulary, seed=seed, spread=spread).double() / at).log_softmax(-1)
    # Half of the tokens are the most likely ones.
    scores = torch.rand(dense.shape, generator=generator)
    scores.scatter_(-1, dense.topk((k + 1) // 2, -1).indices, 2.0)
    ids = scores.topk(k, -1).indices
    ids = ids.gather(-1, torch.rand(ids.shape, generator=generator).argsort(-1))
    hidden = torch.rand(ids.shape, generator=generator) < padding
    hidden[..., 0] = False
    ids = ids.masked_fill(hidden, -1)
    logprobs = dense.gather(-1, ids.clamp(min=0)).to(dtype).masked_fill(hidden, NAN)
    mass = None
    if tail_given:
        seen = torch.zeros(*lead, vocabulary + 1, dtype=torch.bool)
        seen.scatter_(-1, ids.where(ids >= 0, vocabulary), True)
        mass = dense.masked_fill(seen[..., :-1], -INF).logsumexp(-1).float()
        if dtype != torch.float32:  # what the rounded log-probabilities leave to the tail
            left = 1 - logprobs.double().masked_fill(hidden, -INF).exp().sum(-1)
            mass = left.clamp(min=0).log().float()
    return Sparse(ids, logprobs, tail, mass, at)


def with_given_tail(teacher: Sparse) -> TopK:
    return TopK(teacher.ids, teacher.logprobs, teacher.tail, teacher.tail_logprob, teacher.at)


class CheckedOutcome(NamedTuple):
    """A backend's results, and the exact results."""

    loss: Tensor
    gradient: Tensor
    parts: fastkd.Parts
    exact: Outcome


def check_topk(
    backend: str,
    student: Tensor,
    teacher: Sparse,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    parameters: dict[str, float] | None = None,
    upstream: Tensor | None = None,
    **options: Any,
) -> CheckedOutcome:
    """Run kd_loss, per row unless a reduction is given, and hold value, parts and gradient to the bar."""
    options.setdefault("reduction", "none")
    if upstream is None and options["reduction"] == "none":
        rounds = student.dtype == torch.bfloat16
        upstream = (powers_for if rounds else upstream_for)(*student.shape[:-1])
    leaf = student.detach().requires_grad_()
    view = leaf * 1 if options.get("inplace") else leaf
    loss, parts = kd_loss(
        view, with_given_tail(teacher), labels, divergence=made(divergence, parameters), backend=backend,
        return_parts=True, **options,
    )  # fmt: skip
    options.pop("inplace", None)
    call = {"divergence": divergence, "parameters": parameters, "upstream": upstream, **options}
    exact = compose_topk(student, teacher, labels, **call)
    plain = compose_topk(student, teacher, labels, dtype=torch.float32, terms=False, **call)
    assert loss.dtype == torch.float32
    assert_within(
        "loss", loss.detach(), exact.loss, value_bar(plain.loss, exact.loss, exact.loss_terms)
    )
    for part in ("distillation", "cross_entropy", "student_entropy"):
        bar = value_bar(getattr(plain, part), getattr(exact, part), getattr(exact, f"{part}_terms"))
        assert_within(part, getattr(parts, part), getattr(exact, part), bar)
    assert int(parts.counted) == exact.counted
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    assert gradient.dtype == student.dtype
    bar = gradient_bar(
        plain.student_gradient, exact.student_gradient, exact.student_terms, student.dtype
    )
    if backend in ("portable", "reference"):
        bar = 2 * bar  # as in tests/support/accuracy.py: plain float32 PyTorch in another order
    assert_within("gradient", gradient, exact.student_gradient, bar)
    return CheckedOutcome(loss.detach(), gradient, parts, exact)


def rows_of(
    student: Tensor, teacher: TopK, *arguments: Any, backend: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return (the loss of each row, its gradient)."""
    leaf = student.detach().requires_grad_()
    loss = kd_loss(leaf, teacher, *arguments, reduction="none", backend=backend, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


# Against the truth


# 43 columns: SIMD vectors of 4, 8 and 16 all leave a tail.
@defined_variants
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@variants
@tails
def test_every_divergence(
    backend: str, tail: str, variant: tuple[str, dict[str, float]], dtype: torch.dtype
) -> None:
    student = logits(3, 43, seed=1, dtype=dtype)
    labels = labels_for(3, vocabulary=43, seed=3)
    name, parameters = variant
    for temperature in (1.0, 3.0):
        teacher = sparse(3, vocabulary=43, k=9, seed=2, tail=tail, at=temperature)
        check_topk(
            backend, student, teacher, labels,
            divergence=name, parameters=parameters, temperature=temperature, alpha=0.6,
        )  # fmt: skip


# Two sweeps, three sweeps; the whole table on Triton takes too long in its interpreter.
@defined_divergences
@tails
@pytest.mark.parametrize(
    ("divergence", "dtype"),
    [("forward_kl", torch.float32), ("jsd", torch.bfloat16), ("reverse_kl", torch.float16)],
)
def test_triton(
    tail: str, divergence: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, sparse_kernels = _triton()
    for module in (kernels, sparse_kernels):
        monkeypatch.setattr(module, "tile", lambda *row: (16, 1))
    monkeypatch.setattr(sparse_kernels, "BLOCK_K", 4)
    teacher = sparse(3, vocabulary=37, k=6, seed=2, tail=tail, at=2.0)
    labels = torch.tensor([36, -100, 0])
    check_topk(
        "triton", logits(3, 37, seed=1, dtype=dtype), teacher, labels,
        divergence=divergence, temperature=2.0, alpha=0.6, label_smoothing=0.1,
    )  # fmt: skip


OPTIONS = for_topk(ALL) | {
    "mean": {"reduction": "mean", "labels": True},
    "sum": {"reduction": "sum", "temperature": 2.0},
    "num_items": {"reduction": "mean", "num_items": torch.tensor(7)},
}
OPTIONS |= {name: OPTIONS[name] | {"weight": True, "mask": True} for name in TOGETHER}


def _with_options(
    backend: str, options: dict[str, Any], dtype: torch.dtype, divergence: str, tail: str
) -> None:
    lead = (2, 3)
    labels, options = prepared(options, *lead, columns=41, seed=1)
    if options.get("weight"):
        options["weight"] = upstream_for(*lead, seed=8)
    if options.get("mask"):
        options["mask"] = torch.tensor([[True, False, True], [True, True, True]])
    at = options.get("teacher_temperature", options.get("temperature", 1.0))
    teacher = sparse(*lead, vocabulary=41, k=7, seed=3, tail=tail, at=at)
    check_topk(backend, logits(*lead, 43 if "vocab_size" in options else 41, seed=2, dtype=dtype),
               teacher, labels, divergence=divergence, **options)  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "divergence"),
    [(torch.float32, "jsd"), (torch.bfloat16, "forward_kl"), (torch.float16, "jsd")],
)
@pytest.mark.only_where(lambda name, dtype: dtype != torch.float16 or name in BRIEF)
@pytest.mark.parametrize("name", OPTIONS)
@tails
@pytest.mark.pairwise(each="everywhere")
def test_every_option(
    backend: str, tail: str, name: str, dtype: torch.dtype, divergence: str
) -> None:
    _with_options(backend, OPTIONS[name], dtype, divergence, tail)


# Each policy with one of the two sets. The parameter is not called tail, so Triton's interpreter runs all of them.
@pytest.mark.only_where(lambda everywhere: everywhere in ("cuda", "triton"))
@pytest.mark.parametrize(("policy", "name"), [*zip(TAILS, itertools.cycle(TOGETHER))])
def test_every_option_together(everywhere: str, policy: str, name: str) -> None:
    _with_options(everywhere, OPTIONS[name], torch.float32, "forward_kl", policy)


@tails
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_one_temperature_a_row(everywhere: str, tail: str, divergence: str) -> None:
    """The student's temperature under every policy, the teacher's under the policies that do not use the tail's
    mass."""
    student = logits(2, 3, 19, seed=10)
    temperature = torch.tensor([[0.5, 1.0, 2.0], [4.0, 0.3, 7.0]])
    labels = labels_for(2, 3, vocabulary=19, seed=12)
    teacher = sparse(2, 3, vocabulary=19, k=5, seed=11, tail=tail, at=2.0)
    call = {"divergence": divergence, "temperature": temperature, "alpha": 0.6}
    check_topk(everywhere, student, teacher, labels, **call, teacher_temperature=2.0)
    if tail.startswith("renormalize"):
        check_topk(everywhere, student, teacher, labels, **call)
        flipped = temperature.flip(1).bfloat16()
        check_topk(everywhere, student, teacher, labels, **call, teacher_temperature=flipped)


# One column; a few; two blocks of the cpu backend and a column; 32 blocks, whose exponentials are not kept. All tokens,
# one, some; with and without a separate temperature for the cross-entropy.
@tails
@pytest.mark.parametrize(
    ("columns", "k"),
    [(1, 1), (2, 1), (2, 2), (31, 1), (31, 30), (31, 31), (4097, 1), (4097, 700), (4097, 4097), (65537, 100)],
)  # fmt: skip
def test_widths(backend: str, tail: str, columns: int, k: int) -> None:
    student, labels = logits(2, columns, seed=4), labels_for(2, vocabulary=columns, seed=6)
    for divergence, temperature in (("forward_kl", 1.0), ("jsd", 2.0)):
        if columns == 65537 and (divergence == "jsd") != (tail in ("bucket", "truncate")):
            continue
        teacher = sparse(2, vocabulary=columns, k=k, seed=5, tail=tail, at=temperature)
        check_topk(
            backend, student, teacher, labels,
            divergence=divergence, temperature=temperature, alpha=0.5, label_smoothing=0.1,
        )  # fmt: skip


@pytest.mark.parametrize("tail", ["bucket", "truncate"])
@pytest.mark.parametrize("columns", [200_001, 400_001])
def test_exponentials_that_are_not_kept(tail: str, columns: int) -> None:
    """Rows longer than the cpu backend's scratch memory, with one and with two arrays of exponentials."""
    student = logits(1, columns, seed=4, dtype=torch.bfloat16)
    teacher = sparse(1, vocabulary=columns, k=50, seed=5, tail=tail, at=2.0)
    labels = torch.tensor([columns - 1])
    check_topk("cpu", student, teacher, labels, divergence="jsd", temperature=2.0, alpha=0.5)


@dtypes
@pytest.mark.parametrize("tail_given", [True, False])
@tails
@pytest.mark.pairwise(each="backend")
def test_types_of_the_teacher(
    backend: str, tail: str, tail_given: bool, dtype: torch.dtype
) -> None:
    """A flat teacher in each dtype, whose tail is larger than the rounding error of its tokens."""
    for student in FLOATS:
        teacher = sparse(
            4,
            vocabulary=300,
            k=20,
            seed=7,
            tail=tail,
            spread=1.0,
            tail_given=tail_given,
            dtype=dtype,
        )
        for divergence in ("forward_kl", "jsd"):
            check_topk(
                backend, logits(4, 300, seed=8, dtype=student), teacher, divergence=divergence
            )


@tails
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_types_of_the_tail(everywhere: str, tail: str, dtype: torch.dtype) -> None:
    """The rounded value of tail_logprob is the one that counts, in every dtype."""
    teacher = sparse(2, vocabulary=33, k=5, seed=9, tail=tail)
    assert teacher.tail_logprob is not None
    rounded = teacher._replace(tail_logprob=teacher.tail_logprob.to(dtype))
    check_topk(everywhere, logits(2, 33, seed=10), rounded)


@tails
def test_types_of_the_ids(everywhere: str, tail: str) -> None:
    student, teacher = logits(2, 33, seed=9), sparse(2, vocabulary=33, k=5, seed=10, tail=tail)
    check_topk(everywhere, student, teacher._replace(ids=teacher.ids.int()))
    wide = teacher._replace(
        ids=teacher.ids.repeat(1, 2)[:, ::2].contiguous().t().contiguous().t(),
        logprobs=teacher.logprobs.repeat(1, 2)[:, ::2].t().contiguous().t(),
    )  # of strides that are not those of rows, and with tokens of both halves
    assert not wide.ids.is_contiguous()
    twice = [len(set(row) - {-1}) < len([i for i in row if i >= 0]) for row in wide.ids.tolist()]
    assert not any(twice)
    check_topk(everywhere, student, wide._replace(tail_logprob=None))


@tails
def test_float64_runs_on_the_reference(tail: str) -> None:
    """float64 results match autograd through the oracle to float64's rounding."""
    student = logits(3, 31, seed=11).double()
    teacher = sparse(3, vocabulary=31, k=6, seed=12, tail=tail, at=2.0)
    labels = torch.tensor([5, 30, -100])
    exact = compose_topk(
        student, teacher, labels, divergence="jsd", temperature=2.0, alpha=0.5,
        label_smoothing=0.1, reduction="none",
    )  # fmt: skip
    for kind in (torch.float32, torch.float64):
        leaf = student.clone().requires_grad_()
        named = with_given_tail(teacher._replace(logprobs=teacher.logprobs.to(kind)))
        loss, parts = kd_loss(
            leaf, named, labels, divergence="jsd", temperature=2.0, alpha=0.5, label_smoothing=0.1,
            reduction="none", return_parts=True,
        )  # fmt: skip
        loss.sum().backward()
        torch.testing.assert_close(loss.detach(), exact.loss, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(leaf.grad, exact.student_gradient, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(
            parts.student_entropy, exact.student_entropy, rtol=1e-11, atol=1e-12
        )


@tails
@dtypes
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
@pytest.mark.pairwise(each="everywhere")
def test_strided_students(everywhere: str, tail: str, dtype: torch.dtype, inplace: bool) -> None:
    """A language model's shifted view, padded columns, and in-place gradients."""
    wide = logits(2, 4, 21, seed=13, dtype=dtype)
    teacher = sparse(2, 3, vocabulary=19, k=5, seed=14, tail=tail)
    labels = labels_for(2, 3, vocabulary=19, seed=15, ignored=0.3)
    call = {"alpha": 0.5, "vocab_size": 19, "label_smoothing": 0.1, "softcap": 9.0}
    expected = check_topk(everywhere, wide[:, :-1].contiguous(), teacher, labels, **call)
    leaf = wide.clone().requires_grad_()
    whole = leaf * 1
    loss = kd_loss(
        whole[:, :-1], with_given_tail(teacher), labels,
        reduction="none", inplace=inplace, backend=everywhere, **call,
    )  # fmt: skip
    version = whole._version
    assert torch.equal(loss.detach(), expected.loss)
    upstream = (powers_for if dtype == torch.bfloat16 else upstream_for)(2, 3)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    assert torch.equal(gradient[:, :-1], expected.gradient)
    assert not gradient[:, -1].any() and not gradient[..., 19:].any()
    bumped = (
        version if dtype != torch.float16 else whole._version
    )  # float16 computes it in the backward
    assert (bumped > 0) == inplace
    if everywhere != "triton":  # a last stride other than 1
        turned = wide[:, :-1].transpose(-1, -2).contiguous().transpose(-1, -2)
        check_topk(everywhere, turned, teacher, labels, **call)


# Instruction sets and threads

_C = pytest.importorskip("fastkd._C")


@dtypes
@tails
def test_instruction_sets(instructions: str, tail: str, dtype: torch.dtype) -> None:
    for columns, k in ((1, 1), (37, 5), (2049, 300)):
        student, labels = (
            logits(2, columns, seed=16, dtype=dtype),
            labels_for(2, vocabulary=columns, seed=18),
        )
        teacher = sparse(2, vocabulary=columns, k=k, seed=17, tail=tail, at=3.0)
        for divergence in ("forward_kl", "jsd"):
            options = {
                "divergence": divergence,
                "temperature": 3.0,
                "alpha": 0.6,
                "label_smoothing": 0.1,
            }
            check_topk("cpu", student, teacher, labels, **options)
            check_topk("cpu", student, teacher, labels, softcap=9.0, **options)


@tails
@pytest.mark.parametrize(("rows", "columns"), [(1, 9000), (7, 4097), (200, 100)])
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.usefixtures("threads")
def test_reruns_and_threads(tail: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Results are bitwise equal; a row's results also do not depend on the rows that its thread computed before."""
    student = logits(rows, columns, seed=19, dtype=dtype)
    teacher = sparse(rows, vocabulary=columns, k=40, seed=20, tail=tail, at=2.0)
    named, labels = (
        with_given_tail(teacher),
        labels_for(rows, vocabulary=columns, seed=21, ignored=0.2),
    )
    call: dict[str, Any] = {"temperature": 2.0, "alpha": 0.5, "backend": "cpu", "divergence": "jsd"}
    runs = []
    for count in (1, 2, 2, 1):
        torch.set_num_threads(count)
        leaf = student.clone().requires_grad_()
        loss, parts = kd_loss(leaf, named, labels, return_parts=True, **call)
        runs.append([loss.detach(), *parts, torch.autograd.grad(loss, leaf)[0]])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
    whole = rows_of(student, named, labels, **call)
    row = rows - 1
    alone = TopK(
        *(x[row:] for x in (named.ids, named.logprobs)), tail, named.tail_logprob[row:], 2.0
    )  # type: ignore[index]
    for actual, expected in zip(
        rows_of(student[row:], alone, labels[row:], **call), whole, strict=True
    ):
        assert torch.equal(actual[0], expected[row])


# k = V, and properties


@defined_variants
@pytest.mark.only_where(  # the other divergences use the same kernels with another formula
    lambda everywhere, variant: (
        everywhere != "triton" or variant in (("forward_kl", {}), ("reverse_kl", {}), ("jsd", {}))
    )
)
@variants
@tails
def test_all_tokens_are_the_dense_teacher(
    everywhere: str, tail: str, variant: tuple[str, dict[str, float]]
) -> None:
    """All tokens in any order give the dense teacher's results, whether the tail's mass is a rounding error or -inf."""
    name, parameters = variant
    student, teacher = logits(2, 23, seed=22), logits(2, 23, seed=23)
    labels, call = torch.tensor([3, 22]), {"temperature": 2.0, "alpha": 0.6}
    dense = check(
        everywhere, student, teacher, labels, divergence=name, parameters=parameters,
        teacher_gradient=False, upstream=torch.ones(2), **call,
    )  # fmt: skip
    scale = dense.student_gradient.abs().max()
    of_logits = TopK.from_logits(teacher, 23, tail=tail, temperature=2.0)
    assert (of_logits.tail_logprob == -INF).all()  # type: ignore[union-attr]
    for tail_logprob in (of_logits.tail_logprob, None, torch.full((2,), -16.0)):
        named = dataclasses.replace(of_logits, tail_logprob=tail_logprob)
        actual = rows_of(
            student, named, labels, divergence=made(name, parameters), backend=everywhere, **call
        )
        torch.testing.assert_close(actual[0], dense.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            actual[1], dense.student_gradient, rtol=1e-5, atol=1e-5 * float(scale)
        )


PROPERTIES = settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    phases=(Phase.generate, Phase.shrink),
)  # fmt: skip
PROPER = [
    "forward_kl",
    "reverse_kl",
    "mixture",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "hellinger",
]


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Draw (student logits, teacher logits, k) of a few rows, from nearly equal to far apart."""
    columns = draw(st.integers(1, 60))
    seed = draw(st.integers(0, 2**31))
    spreads = [draw(st.sampled_from([1e-3, 0.3, 3.0, 15.0])) for _ in range(2)]
    student = logits(2, columns, seed=seed, spread=spreads[0])
    teacher = logits(2, columns, seed=seed + 1, spread=spreads[1])
    if draw(st.booleans()):
        teacher = student + 1e-3 * teacher
    return student, teacher, draw(st.integers(1, columns))


@pytest.mark.parametrize("divergence", PROPER)
@settings(PROPERTIES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=_cases())
def test_the_bucket_is_between_0_and_the_dense_divergence(
    backend: str, divergence: str, case: tuple[Tensor, Tensor, int]
) -> None:
    """Merging events loses information: the data-processing inequality. Either fails by rounding at most."""
    student, teacher, k = case
    named = TopK.from_logits(teacher, k)
    loss, gradient = rows_of(student, named, divergence=divergence, backend=backend)
    dense = kd_loss(student, teacher, divergence=divergence, reduction="none", backend=backend)
    size = 1 + teacher.abs().max() + student.abs().max()
    assert (loss >= -2 * ULP * size).all()
    assert (loss <= dense * (1 + 8 * ULP) + 4 * ULP * size).all()
    # An entry is a difference of probabilities, each with its rounding.
    assert (gradient.double().sum(-1).abs() <= 8 * ULP * size).all()


@pytest.mark.only_where(
    lambda tail: tail != "renormalize_teacher"
)  # the other tokens have p = 0 and q > 0
@tails
@pytest.mark.parametrize("divergence", PROPER)
def test_the_students_own_logits(backend: str, tail: str, divergence: str) -> None:
    """The bucket and "renormalize" are 0 with a gradient of 0; the truncated sum is 0, and its gradient is not."""
    student = logits(4, 300, seed=24)
    for k in (1, 5, 299, 300):
        named = TopK.from_logits(student, k, tail=tail)
        loss, gradient = rows_of(student, named, divergence=divergence, backend=backend)
        assert (loss.abs() <= 8 * ULP).all()
        # |p - q| has a kink at 0, and the sign of the rounding is its gradient.
        if tail != "truncate" and divergence != "tvd":
            assert (gradient.abs() <= 8 * ULP).all()


@tails
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_common_shift(everywhere: str, tail: str, divergence: str) -> None:
    """Multiples of 1/64 can be shifted by 1e4 without rounding, and results are bitwise equal."""
    student = (logits(3, 37, seed=25) * 64).round() / 64
    named = with_given_tail(sparse(3, vocabulary=37, k=6, seed=26, tail=tail, at=2.0))
    labels = torch.tensor([1, 36, 5])
    call: dict[str, Any] = {
        "divergence": divergence,
        "alpha": 0.5,
        "temperature": 2.0,
        "backend": everywhere,
    }
    still = rows_of(student, named, labels, **call)
    for shift in (1e4, -1e4):
        for actual, expected in zip(
            rows_of(student + shift, named, labels, **call), still, strict=True
        ):
            assert torch.equal(actual, expected)


@tails
@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
def test_order_of_the_tokens(everywhere: str, tail: str, divergence: str) -> None:
    student = logits(2, 50, seed=27)
    teacher = sparse(2, vocabulary=50, k=12, seed=28, tail=tail)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(29))
    turned = teacher._replace(ids=teacher.ids[:, order], logprobs=teacher.logprobs[:, order])
    actual, expected = (
        rows_of(student, with_given_tail(x), divergence=divergence, backend=everywhere)
        for x in (turned, teacher)
    )
    torch.testing.assert_close(actual[0], expected[0], rtol=4 * ULP, atol=4 * ULP)
    torch.testing.assert_close(actual[1], expected[1], rtol=8 * ULP, atol=2 * ULP)


@defined_divergences
@tails
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha_beta"])
@pytest.mark.pairwise(each="everywhere")
def test_rows_of_the_gradient_sum_to_0(everywhere: str, tail: str, divergence: str) -> None:
    named = with_given_tail(sparse(4, vocabulary=90, k=12, seed=30, tail=tail))
    labels = torch.tensor([0, 89, 5, 6])
    for alpha in (1.0, 0.4):
        _, gradient = rows_of(
            logits(4, 90, seed=31),
            named,
            labels,
            alpha=alpha,
            divergence=divergence,
            backend=everywhere,
        )
        size = gradient.abs().sum(-1)
        bar = 8 * ULP * size.clamp(min=1.0)  # an entry is a difference of terms up to 1
        assert (gradient.double().sum(-1).abs() <= bar).all() and (size > 0).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mixture"])
def test_a_truncated_sum_may_be_negative(everywhere: str, divergence: str) -> None:
    """A student with more probability than the teacher makes the sum negative; other stacks clamp it and lose its
    gradient."""
    student = torch.tensor([[2.0, 0.0, 0.0, -1.0]])
    p, q = torch.tensor(0.1, dtype=torch.float64), student.double().softmax(-1)[0, 0]
    named = TopK(torch.tensor([[0]]), p.log().float().reshape(1, 1), "truncate")
    if divergence == "reverse_kl":  # and here a student with less probability
        student, q = -student, (-student).double().softmax(-1)[0, 0]
    forward, reverse = p * (p / q).log(), q * (q / p).log()
    value = {"forward_kl": forward, "reverse_kl": reverse, "mixture": (forward + reverse) / 2}[
        divergence
    ]
    loss, gradient = rows_of(student, named, divergence=divergence, backend=everywhere)
    torch.testing.assert_close(loss.double(), value.reshape(1), rtol=4 * ULP, atol=0)
    assert gradient.all()
    if divergence != "mixture":
        assert value < 0


# The tail


@pytest.mark.parametrize("mass", [1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "hellinger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.pairwise(each="everywhere")
def test_a_small_tail(everywhere: str, divergence: str, mass: float, dtype: torch.dtype) -> None:
    """Tails of about this mass keep their digits; 1 - sum, or the whole sum minus the tokens' sum, would have none.

    The tokens of teacher and student agree, so that the tail is all that the divergence consists of.
    """
    columns, k = 40, 8
    student = logits(2, columns, seed=32, spread=1.0).to(dtype).double()
    ids = torch.stack(
        [torch.randperm(columns, generator=torch.Generator().manual_seed(s))[:k] for s in (33, 34)]
    )
    member = torch.zeros(2, columns, dtype=torch.bool).scatter_(-1, ids, True)
    student = torch.where(member, student, student + math.log(mass)).to(dtype).double()
    log_q = student.log_softmax(-1)
    # The teacher's tail: three times the student's.
    tail = log_q.masked_fill(member, -INF).logsumexp(-1) + math.log(3.0)
    among = student.gather(-1, ids).log_softmax(-1)
    logprobs = (among + torch.log1p(-tail.exp()).unsqueeze(-1)).float()
    teacher = Sparse(ids, logprobs, "bucket", tail.float())
    leaf = student.to(dtype).requires_grad_()
    loss = kd_loss(
        leaf, with_given_tail(teacher), divergence=divergence, reduction="none", backend=everywhere
    )
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    exact = compose_topk(student, teacher, divergence=divergence, reduction="none").student_gradient
    others = exact.masked_fill(member, 0.0)
    error = (gradient.double() - exact).masked_fill(member, 0.0).abs()
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    assert (error <= (rounding + 32 * ULP) * others.abs()).all()
    # A closed form is a difference of moments: the value's error is relative to them.
    exact_loss = compose_topk(student, teacher, divergence=divergence, reduction="none").loss
    assert ((loss.double() - exact_loss).abs() <= 4 * ULP * (1 + exact_loss.abs())).all()


@defined_divergences
@tails
@pytest.mark.parametrize("depth", [20.0, 200.0, 800.0, 2000.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
@pytest.mark.pairwise(each="everywhere")
def test_a_tail_far_below_the_tokens(
    everywhere: str, tail: str, divergence: str, depth: float
) -> None:
    """The student's tail underflows, as with peaked logits at a low temperature, but its logarithm does not.

    800 is below the logarithm of the smallest float64. The teacher has not given up on the tail.
    """
    student = logits(2, 37, seed=35, spread=1.0)
    teacher = sparse(2, vocabulary=37, k=6, seed=36, tail=tail, padding=0.0, spread=1.0)
    student = (student - depth).scatter(-1, teacher.ids, student.gather(-1, teacher.ids))
    labels = teacher.ids[:, 0]
    check_topk(everywhere, student, teacher, labels, divergence=divergence, alpha=0.5)
    colder = {"temperature": 0.05, "teacher_temperature": 1.0}
    check_topk(
        everywhere, student / 20, teacher, labels, divergence=divergence, alpha=0.5, **colder
    )


@defined_divergences
@tails
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
@pytest.mark.parametrize("depth", [20.0, 200.0, 2000.0])
@pytest.mark.pairwise(each="everywhere")
def test_tokens_far_below_the_tail(
    everywhere: str, tail: str, divergence: str, depth: float
) -> None:
    """The student's probability of the teacher's tokens underflows."""
    student = logits(2, 37, seed=35, spread=1.0)
    teacher = sparse(2, vocabulary=37, k=6, seed=36, tail=tail, padding=0.0, spread=1.0)
    student.scatter_(-1, teacher.ids, student.gather(-1, teacher.ids) - depth)
    check_topk(
        everywhere, student, teacher, torch.tensor([36, 0]), divergence=divergence, alpha=0.5
    )


@tails
@pytest.mark.parametrize("temperature", [0.05, 1000.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "tvd"])
@pytest.mark.pairwise(each="everywhere")
def test_temperatures(everywhere: str, tail: str, divergence: str, temperature: float) -> None:
    student = logits(2, 37, seed=37)
    teacher = sparse(2, vocabulary=37, k=6, seed=38, tail=tail, at=temperature)
    check_topk(everywhere, student, teacher, divergence=divergence, temperature=temperature)


@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", "mixture", "jsd", "tvd", "hellinger"]
)
def test_a_truncated_sum_does_not_see_the_tail(everywhere: str, divergence: str) -> None:
    """The sum runs over the teacher's tokens and uses p unchanged, whatever tail_logprob is and whatever p sums to."""
    student = logits(2, 37, seed=39)
    teacher = sparse(2, vocabulary=37, k=6, seed=40, tail="truncate", padding=0.0)
    for mass in (None, torch.full((2,), -INF), torch.full((2,), -40.0), torch.zeros(2)):
        check_topk(everywhere, student, teacher._replace(tail_logprob=mass), divergence=divergence)
    # All mass on the tokens, up to rounding in either direction.
    whole = teacher._replace(logprobs=teacher.logprobs.log_softmax(-1))
    for nudge in (-1e-6, 0.0, 1e-6, 1e-3):
        nudged = whole._replace(logprobs=whole.logprobs + nudge, tail_logprob=None)
        check_topk(everywhere, student, nudged, divergence=divergence)


def test_the_mass_of_the_tail_by_default(everywhere: str) -> None:
    """The default mass is log(1 - sum p), where that exceeds rounding."""
    student = logits(2, 37, seed=41)
    teacher = sparse(2, vocabulary=37, k=6, seed=42, padding=0.3)
    check_topk(everywhere, student, teacher._replace(tail_logprob=None))
    named = dataclasses.replace(with_given_tail(teacher), tail_logprob=None)
    mass = (1 - named.logprobs.double().masked_fill(named.ids < 0, -INF).exp().sum(-1)).log()
    explicit = dataclasses.replace(named, tail_logprob=mass.float())
    for actual, expected in zip(
        rows_of(student, named, backend=everywhere),
        rows_of(student, explicit, backend=everywhere),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=4 * ULP, atol=ULP)


def _to_decimals(logprobs: Tensor) -> Tensor:
    return logprobs.mul(1e4).round().div(1e4).float()


def _half_a_unit(z: Tensor) -> Tensor:
    """The error by which a value may have been rounded to z in z's dtype; for 0, the logarithm of 1, float32's unit at
    1."""
    info = torch.finfo(z.dtype)
    of_1 = 2.0**-53 if z.dtype == torch.float64 else 2.0**-24
    return torch.where(z.abs() < info.tiny, of_1, z.double().abs() * (info.eps / 2)) + 2.0**-52


# How log-probabilities are rounded before they reach a loss, and the largest error.
ROUNDED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "float32": (Tensor.float, _half_a_unit),
    "bfloat16": (Tensor.bfloat16, _half_a_unit),
    "float16": (Tensor.half, _half_a_unit),
    "float64": (Tensor.double, _half_a_unit),
    "4 decimals": (_to_decimals, lambda z: torch.full_like(z, 5e-5)),
}


class Sure(NamedTuple):
    """Rows of teachers with a small tail, and the tails that their rounding allows."""

    student: Tensor
    exact: TopK  # float64
    rounded: TopK  # without tail_logprob
    least: Tensor  # the smallest tail mass that the rounded ones allow
    most: Tensor


def _sure(rounding: str, rows: int = 12, k: int = 6) -> Sure:
    """Teachers with tails of 1e-1 to 1e-12 whose tokens share the rest; in every other row one token is nearly
    certain."""
    generator = torch.Generator().manual_seed(91)
    shares = torch.randn(rows, k, generator=generator, dtype=torch.float64) * 2
    shares[::2, 0] += 14
    true = torch.logspace(-1, -12, rows, dtype=torch.float64)
    ids = torch.rand(rows, 40, generator=generator).topk(k, -1).indices
    logprobs = shares.log_softmax(-1) + torch.log1p(-true).unsqueeze(-1)
    exact = TopK(ids, logprobs, tail_logprob=true.log())
    to, by = ROUNDED[rounding]
    logprobs = to(exact.logprobs)
    widened = logprobs.double()
    rest, allowed = 1 - widened.exp().sum(-1), (widened.exp() * by(logprobs)).sum(-1) * 1.01
    rounded = TopK(exact.ids, logprobs)
    return Sure(
        logits(rows, 40, seed=92), exact, rounded, (rest - allowed).clamp(min=0), rest + allowed
    )


@pytest.mark.parametrize("rounding", ROUNDED)
def test_a_tail_that_rounding_hides(backend: str, rounding: str) -> None:
    """If 1 - sum p is only rounding error, each loss is finite, and no further from the truth than the rounding allows.

    The range that rounding allows is evaluated from one end to the other. At a mass of 0 some divergences are infinite
    there,
    and the loss is not.
    """
    sure = _sure(rounding)
    if rounding == "float64":
        backend = "reference"
    true = sure.exact.tail_logprob.exp()  # type: ignore[union-attr]
    assert ((sure.least <= true) & (true <= sure.most)).all()
    allowed = [torch.lerp(sure.least, sure.most, x) for x in (0.0, 1e-6, 1e-3, 0.1, 0.5, 1.0)]
    exactly = dataclasses.replace(sure.rounded, logprobs=sure.rounded.logprobs.double())
    for name, parameters in DIVERGENCES:
        divergence = made(name, parameters)

        def of(teacher: TopK, by: Any = divergence) -> tuple[Tensor, Tensor]:
            return rows_of(sure.student.double(), teacher, divergence=by, backend="reference")

        exact, exact_gradient = of(sure.exact)
        ends = [of(dataclasses.replace(exactly, tail_logprob=mass.log())) for mass in allowed]
        loss, gradient = rows_of(sure.student, sure.rounded, divergence=divergence, backend=backend)
        assert loss.isfinite().all() and gradient.isfinite().all(), name
        bound = torch.stack([(end - exact).abs() for end, _ in ends]).amax(0)
        assert ((loss - exact).abs() <= bound + 16 * ULP * (1 + exact.abs())).all(), name
        far = torch.stack([(end - exact_gradient).abs().amax(-1) for _, end in ends])
        bound = far.nan_to_num(INF).amax(0) + 16 * ULP * (1 + exact.abs())
        assert ((gradient - exact_gradient).abs().amax(-1) <= bound).all(), name


def test_every_backend_gets_the_same_mass(everywhere: str) -> None:
    sure = _sure("bfloat16", rows=4)
    _, mass = masses(sure.rounded.ids, sure.rounded.logprobs)
    with_mass = dataclasses.replace(sure.rounded, tail_logprob=mass.log().float())
    for divergence in ("reverse_kl", "jsd"):
        call: dict[str, Any] = {"divergence": divergence, "backend": everywhere}
        actual = rows_of(sure.student, sure.rounded, **call)
        expected = rows_of(sure.student, with_mass, **call)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("rounding", ROUNDED)
def test_the_mass_that_is_estimated(rounding: str) -> None:
    """The estimated mass is within what rounding allows, and equals 1 - sum p where the rounding error is smaller."""
    sure = _sure(rounding, rows=200)
    ids, logprobs = sure.rounded.ids, sure.rounded.logprobs
    total, mass = masses(ids, logprobs)
    rest = 1 - logprobs.double().exp().sum(-1)
    torch.testing.assert_close(total, 1 - rest, rtol=0, atol=1e-15)
    assert (mass > 0).all()
    # An excess of nearly the largest rounding error still gives an eighth of that error.
    most = torch.maximum(sure.most, (-rest / 8).clamp(min=0))
    assert ((sure.least <= mass * (1 + 1e-9)) & (mass <= most * (1 + 1e-9))).all()
    clear = sure.least > 0
    assert clear.any()
    torch.testing.assert_close(mass[clear], rest[clear], rtol=1e-12, atol=1e-16)
    # Padding is ignored, whatever it holds.
    padded = torch.cat([ids, torch.full_like(ids[:, :2], -1)], -1)
    filled = torch.cat(
        [logprobs, torch.tensor([NAN, 5.0], dtype=logprobs.dtype).expand(200, 2)], -1
    )
    torch.testing.assert_close(masses(padded, filled)[1], mass, rtol=1e-12, atol=1e-15)


def test_the_estimate_errs_little_where_rounding_hides_the_tail() -> None:
    """The estimate's mean error of log m is smaller than that of either end of the allowed range, for tails of every
    size below it."""
    generator = torch.Generator().manual_seed(5)
    shares = (torch.randn(4000, 6, generator=generator, dtype=torch.float64) * 2).softmax(-1)
    true = torch.rand(4000, generator=generator, dtype=torch.float64) * 4e-3
    logprobs = shares.log() + torch.log1p(-true).unsqueeze(-1)
    ids = torch.arange(6).expand(4000, 6)
    rounded = logprobs.to(torch.bfloat16)
    _, mass = masses(ids, rounded)
    allowed = (rounded.double().exp() * rounded.double().abs()).sum(-1) * 2.0**-9
    rest = 1 - rounded.double().exp().sum(-1)

    def error(estimate: Tensor) -> float:
        return float((estimate.log() - true.log()).abs().mean())

    for other in (rest.clamp(min=1e-30), torch.maximum(rest, allowed), rest + allowed):
        assert error(mass) < error(other)


# Rows whose rounded probabilities happen to sum to 1 or more.
WHOLE: dict[str, tuple[list[int], list[float]]] = {
    "one token, certain": ([3], [0.0]),
    "the same with a sign": ([3], [-0.0]),
    "others at -inf": ([3, 5, 6], [0.0, -INF, -INF]),
    "others with some": ([3, 5, 6], [0.0, -20.0, -30.0]),
    "above 0": ([3, -1], [1e-7, NAN]),
    "a sum above 1": ([3, 5, 6], [math.log(0.5), math.log(0.3), math.log(0.2003)]),
    "a sum far above 1": ([3, 5], [math.log(0.6), math.log(0.45)]),
    "a sum of 1": ([3, 5], [math.log(0.5), math.log(0.5)]),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("plain", ["reference", "portable"])
@pytest.mark.parametrize("tail", TAILS)
def test_float64_teachers_of_narrower_students(tail: str, plain: str, dtype: torch.dtype) -> None:
    """Log-probabilities from NumPy are float64; the loss is the same up to the teacher's rounding."""
    student, dense = logits(4, 9, seed=95, dtype=dtype), logits(4, 9, seed=96)
    narrow = TopK.from_logits(dense, 3, tail=tail)
    assert narrow.tail_logprob is not None
    mass = narrow.tail_logprob.double()
    wide = dataclasses.replace(narrow, logprobs=narrow.logprobs.double(), tail_logprob=mass)
    actual, wanted = (rows_of(student, teacher, backend=plain) for teacher in (wide, narrow))
    assert actual[0].dtype == torch.float64 and actual[1].dtype == dtype
    torch.testing.assert_close(actual[0].float(), wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual[1], wanted[1], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("case", WHOLE)
def test_no_tail_is_0_by_itself(backend: str, case: str, dtype: torch.dtype) -> None:
    """A tail is exactly 0 only if tail_logprob is -inf, or if the tokens are the whole vocabulary."""
    ids, logprobs = WHOLE[case]
    teacher = TopK(torch.tensor([ids]), torch.tensor([logprobs], dtype=dtype))
    backend = "reference" if dtype == torch.float64 else backend
    student = logits(1, 9, seed=93)
    # A token of p = 0 is like a dense teacher's logit of -inf.
    for name, parameters in ADDITIVE if -INF in logprobs else DIVERGENCES:
        call: dict[str, Any] = {"divergence": made(name, parameters), "backend": backend}
        loss, gradient = rows_of(student, teacher, **call)
        assert loss.isfinite().all() and gradient.isfinite().all(), name
    output = dataclasses.replace(teacher, tail_logprob=torch.tensor([-INF]))
    loss, _ = rows_of(student, output, divergence="reverse_kl", backend=backend)
    assert loss == INF
    every = TopK(torch.arange(2).unsqueeze(0), torch.tensor([[math.log(0.6), math.log(0.4)]]))
    loss, gradient = rows_of(student[:, :2], every, backend=backend)
    dense = rows_of(student[:, :2], TopK.from_logits(every.logprobs, 2), backend=backend)
    torch.testing.assert_close((loss, gradient), dense, rtol=4 * ULP, atol=ULP)


def test_float64_keeps_the_digits_of_the_tail() -> None:
    """A float64 tail is not rounded to float32, whether it is given or estimated."""
    sure = _sure("float64")
    student = sure.student.double()
    dense = {"divergence": "hellinger", "backend": "reference"}
    inputs = rows_of(student, sure.exact, **dense)
    estimated = rows_of(student, sure.rounded, **dense)
    clear = sure.exact.tail_logprob > math.log(1e-4)  # type: ignore[operator]
    exact = compose_topk(
        student, Sparse(sure.exact.ids, sure.exact.logprobs, "bucket", sure.exact.tail_logprob),
        divergence="hellinger", reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(inputs[0], exact.loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(estimated[0][clear], exact.loss[clear], rtol=1e-10, atol=0)


# Re-tempering


@pytest.mark.parametrize("tail", ["renormalize", "renormalize_teacher"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_log_probabilities_at_another_temperature(
    everywhere: str, tail: str, divergence: str
) -> None:
    """Log-probabilities taken at temperature 1 and used at 2 equal those taken at 2; per row too."""
    student, dense = logits(3, 37, seed=43), logits(3, 37, seed=44)
    call: dict[str, Any] = {"divergence": divergence, "backend": everywhere}
    for temperature in (2.0, torch.tensor([2.0, 2.0, 2.0])):
        expected = rows_of(
            student,
            TopK.from_logits(dense, 8, tail=tail, temperature=2.0),
            temperature=temperature,
            **call,
        )
        for at in (1.0, 0.5):
            named = TopK.from_logits(dense, 8, tail=tail, temperature=at)
            actual = rows_of(student, named, temperature=temperature, **call)
            torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-6)


# Rows that are dropped, and rows that are wrong


@tails
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.pairwise(each="everywhere")
def test_a_dropped_row_is_not_read(
    everywhere: str, tail: str, dtype: torch.dtype, alpha: float
) -> None:
    """NaN, wrong ids, label and temperature of a dropped row change no result, for each way to drop a row."""
    student = logits(5, 21, seed=45, dtype=dtype)
    teacher = sparse(5, vocabulary=21, k=5, seed=46, tail=tail)
    student[1:4] = NAN
    teacher.ids[1], teacher.ids[3] = 2, 21
    teacher.logprobs[1:4] = NAN
    teacher.tail_logprob[1:4] = NAN  # type: ignore[index]
    labels = torch.tensor([3, -100, 10**12, 3, 3])
    call: dict[str, Any] = {
        "mask": torch.tensor([True, True, False, True, True]),
        "weight": torch.tensor([2.0, 1.0, NAN, 0.0, -0.5]),
        "temperature": torch.tensor([1.0, NAN, -1.0, 0.0, 2.0]),
        "teacher_temperature": 1.0,
    }
    for divergence in ("forward_kl", "jsd"):
        actual = check_topk(
            everywhere,
            student,
            teacher,
            labels,
            alpha=alpha,
            divergence=divergence,
            label_smoothing=0.1,
            **call,
        )
        for rows in (actual.loss, actual.gradient, *actual.parts[:3]):
            assert not rows[1:4].any()
        assert actual.parts.counted == 3  # a weight of 0 is still a row
    check_topk(everywhere, student, teacher, labels, alpha=alpha, reduction="mean", **call)


@tails
@dtypes
def test_no_row_counts(everywhere: str, tail: str, dtype: torch.dtype) -> None:
    student = torch.full((3, 11), NAN, dtype=dtype, requires_grad=True)
    named = with_given_tail(sparse(3, vocabulary=11, k=3, seed=47, tail=tail))
    for call in (
        {"mask": torch.zeros(3, dtype=torch.bool)},
        {"labels": torch.full((3,), -100)},
        {"labels": torch.full((3,), -100), "alpha": 0.3},
        {"weight": torch.zeros(3)},
    ):
        for reduction in ("mean", "sum", "none"):
            loss, parts = kd_loss(
                student, named, reduction=reduction, return_parts=True, backend=everywhere, **call
            )
            assert loss.requires_grad and not loss.detach().any()
            assert not any(part.any() for part in parts[:3])
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert not gradient.any()


@tails
def test_no_rows(everywhere: str, tail: str) -> None:
    for lead in ((0,), (2, 0)):
        student = torch.empty(*lead, 11, requires_grad=True)
        named = TopK(torch.zeros(*lead, 3, dtype=torch.int64), torch.empty(*lead, 3), tail)
        for labels, alpha in ((None, 1.0), (torch.zeros(lead, dtype=torch.int64), 0.5)):
            loss, parts = kd_loss(
                student, named, labels, alpha=alpha, return_parts=True, backend=everywhere
            )
            assert loss == 0 and loss.requires_grad and parts.counted == 0
            (gradient,) = torch.autograd.grad(loss, student)
            assert gradient.shape == student.shape


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "twice": lambda ids: ids[1].__setitem__(4, int(ids[1, 0])),
    "too large": lambda ids: ids[1].__setitem__(2, 21),
    "far too large": lambda ids: ids[1].__setitem__(2, 2**33 + 1),
    "below -1": lambda ids: ids[1].__setitem__(2, -2),
    "all too large": lambda ids: ids[1].fill_(50),
}


@tails
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.pairwise(each="everywhere")
def test_wrong_ids_poison_their_row(
    everywhere: str, tail: str, wrong: Callable[[Tensor], Any], alpha: float
) -> None:
    """The row's value and whole gradient are NaN, no other row changes, and padding columns stay 0."""
    student, labels = logits(3, 24, seed=48), torch.tensor([1, 2, 20])
    teacher = sparse(3, vocabulary=21, k=5, seed=49, tail=tail, padding=0.0)
    call: dict[str, Any] = {"alpha": alpha, "vocab_size": 21, "backend": everywhere}
    loss, gradient = rows_of(student, with_given_tail(teacher), labels, **call)
    wrong(teacher.ids)
    actual, found_gradient = rows_of(student, with_given_tail(teacher), labels, **call)
    assert torch.equal(actual[::2], loss[::2]) and torch.equal(found_gradient[::2], gradient[::2])
    assert actual[1].isnan()
    assert found_gradient[1, :21].isnan().all()


@tails
@pytest.mark.parametrize("alpha", [0.5, 0.0])
@pytest.mark.parametrize("label", [-1, 21, 2**32 + 3])
def test_wrong_labels_poison_their_row(
    everywhere: str, tail: str, label: int, alpha: float
) -> None:
    student = logits(3, 21, seed=50)
    named = with_given_tail(sparse(3, vocabulary=21, k=5, seed=51, tail=tail))
    call: dict[str, Any] = {"alpha": alpha, "backend": everywhere}
    right = rows_of(student, named, torch.tensor([1, 2, 20]), **call)
    actual = rows_of(student, named, torch.tensor([1, label, 20]), **call)
    assert all(torch.equal(a[::2], b[::2]) for a, b in zip(actual, right, strict=True))
    assert actual[0][1].isnan() and actual[1][1].isnan().all()


@tails
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_wrong_temperatures_poison_their_row(
    everywhere: str, tail: str, temperature: float, alpha: float
) -> None:
    student, labels = logits(3, 21, seed=50), torch.tensor([1, 2, 20])
    named = with_given_tail(sparse(3, vocabulary=21, k=5, seed=51, tail=tail))
    call: dict[str, Any] = {"alpha": alpha, "teacher_temperature": 1.0, "backend": everywhere}
    actual = rows_of(
        student, named, labels, temperature=torch.tensor([1.0, temperature, 1.0]), **call
    )
    assert actual[0][1].isnan() and actual[1][1].isnan().all()
    assert actual[0][::2].isfinite().all() and actual[1][::2].isfinite().all()


def test_wrong_values_are_named_where_that_may_wait(
    everywhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTKD_CHECK", "1")
    student = logits(3, 21, seed=52)
    good = sparse(3, vocabulary=21, k=5, seed=53, padding=0.3)
    kd_loss(student, with_given_tail(good), backend=everywhere)
    good = sparse(3, vocabulary=21, k=5, seed=53, padding=0.0)
    for name, message in {
        "twice": "teacher.ids must be distinct within a row; row 1 repeats some",
        "too large": "teacher.ids must be in [0, 21), or -1 for padding; row 1 has others",
        "below -1": "teacher.ids must be in [0, 21), or -1 for padding; row 1 has others",
    }.items():
        ids = good.ids.clone()
        WRONG[name](ids)
        with pytest.raises(ValueError) as error:
            kd_loss(student, with_given_tail(good._replace(ids=ids)), backend=everywhere)
        assert str(error.value) == message
        # As with labels and temperatures, a dropped row may hold anything.
        mask, labels = torch.tensor([True, False, True]), torch.tensor([0, -100, 0])
        for dropped in ({"mask": mask}, {"labels": labels}):
            kd_loss(student, with_given_tail(good._replace(ids=ids)), backend=everywhere, **dropped)
    with pytest.raises(ValueError) as error:
        kd_loss(
            student, with_given_tail(good), torch.tensor([0, 21, 0]), alpha=0.5, backend=everywhere
        )
    assert str(error.value) == "labels must be in [0, 21) or ignore_index (-100); row 1 has 21"


LOGPROBS_SUM = (
    "must be natural logarithms of probabilities, with a sum of 1 at most; those of row 1 sum to {}. Take log_softmax "
    "over the whole vocabulary before the K tokens, or use tail='renormalize'"
)
WRONG_LOGPROBS: dict[str, tuple[tuple[str, ...], Callable[[Tensor], Any], str]] = {
    "NaN": (
        TAILS, lambda logprobs: logprobs[1].__setitem__(2, NAN),
        "must not be NaN or infinity where ids are not -1; row 1 has some",
    ),
    "infinity": (
        TAILS, lambda logprobs: logprobs[1].__setitem__(2, INF),
        "must not be NaN or infinity where ids are not -1; row 1 has some",
    ),
    "a sum of 1.5": (
        ("bucket", "truncate"), lambda logprobs: logprobs[1].fill_(math.log(0.3)),
        LOGPROBS_SUM.format("1.5"),
    ),
    "logits": (
        ("bucket", "truncate"), lambda logprobs: logprobs[1].fill_(9.0), LOGPROBS_SUM.format("4.052e+04"),
    ),
    "no probability": (
        ("renormalize", "renormalize_teacher"), lambda logprobs: logprobs[1].fill_(-INF),
        "not all be -inf in a row; those of row 1 are. Set its ids to -1 where there is no teacher",
    ),
}  # fmt: skip


@tails
@pytest.mark.parametrize("wrong", WRONG_LOGPROBS)
def test_wrong_log_probabilities_poison_their_row(
    backend: str, tail: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row's value and whole gradient are NaN, whatever alpha is; FASTKD_CHECK=1 raises, except for dropped rows."""
    policies, spoil, message = WRONG_LOGPROBS[wrong]
    student, labels = logits(3, 24, seed=48), torch.tensor([1, 2, 20])
    teacher = sparse(3, vocabulary=21, k=5, seed=49, tail=tail, padding=0.0, tail_given=False)
    call: dict[str, Any] = {"vocab_size": 21, "backend": backend}
    for alpha in (1.0, 0.5, 0.0):
        clean = rows_of(student, with_given_tail(teacher), labels, alpha=alpha, **call)
        spoilt = teacher._replace(logprobs=teacher.logprobs.clone())
        spoil(spoilt.logprobs)
        actual, gradient = rows_of(student, with_given_tail(spoilt), labels, alpha=alpha, **call)
        assert torch.equal(actual[::2], clean[0][::2]) and torch.equal(gradient[::2], clean[1][::2])
        if tail in policies:
            assert actual[1].isnan() and gradient[1, :21].isnan().all()
        else:
            assert actual[1].isfinite() and gradient[1].isfinite().all()
    monkeypatch.setenv("FASTKD_CHECK", "1")
    kd_loss(student, with_given_tail(spoilt), mask=torch.tensor([True, False, True]), **call)
    if tail in policies:
        with pytest.raises(ValueError) as error:
            kd_loss(student, with_given_tail(spoilt), **call)
        assert str(error.value).endswith(message)


def test_a_tail_beyond_the_probabilities_poisons_its_row(
    everywhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tail_logprob's mass is part of the sum, which must not exceed 1; a smaller sum is normalized."""
    student = logits(4, 21, seed=48)
    ids = torch.tensor([[0, 5], [1, 2], [7, 3], [4, -1]])
    named = TopK(
        ids, torch.full((4, 2), math.log(0.4)), tail_logprob=torch.tensor([-1.6, 0.0, NAN, -INF])
    )
    loss, gradient = rows_of(student, named, backend=everywhere)
    assert loss.isnan().tolist() == gradient.isnan().all(-1).tolist() == [False, True, True, False]
    monkeypatch.setenv("FASTKD_CHECK", "1")
    with pytest.raises(
        ValueError, match="teacher.tail_logprob must be natural .* row 1 sum to 1.8"
    ):
        kd_loss(student[:2], TopK(ids[:2], named.logprobs[:2], tail_logprob=named.tail_logprob[:2]))  # type: ignore[index]


@tails
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha_beta"])
def test_a_row_that_names_no_token(everywhere: str, tail: str, divergence: str) -> None:
    """Such a row has no distillation term at all; under "renormalize" without a cross-entropy it is dropped."""
    if not defined(tail, (divergence, {})):
        pytest.skip("refused")
    student, labels = logits(3, 21, seed=54), torch.tensor([1, 2, 3])
    teacher = sparse(3, vocabulary=21, k=3, seed=55, tail=tail)
    teacher.ids[1] = -1
    renormalizes = tail.startswith("renormalize")
    for mass in (teacher.tail_logprob, None):
        if mass is not None:
            mass[1] = NAN  # as of padding
        named = with_given_tail(teacher._replace(tail_logprob=mass))
        for alpha in (1.0, 0.4):
            leaf = student.clone().requires_grad_()
            call: dict[str, Any] = {"alpha": alpha, "divergence": divergence, "backend": everywhere}
            loss, parts = kd_loss(
                leaf, named, labels, reduction="none", return_parts=True, temperature=1.0, **call
            )
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            assert loss.isfinite().all() and gradient.isfinite().all()
            assert loss[0] != 0 and loss[2] != 0 and parts.distillation[1] == 0
            counted = 3 if alpha < 1 or not renormalizes else 2
            assert parts.counted == counted
            if alpha == 1:
                assert loss[1] == 0 and not gradient[1].any()
            else:
                z = student[1:2].double().requires_grad_()
                expected = (1 - alpha) * torch.nn.functional.cross_entropy(z, labels[1:2])
                assert abs(float(loss[1].detach()) - float(expected.detach())) <= 8 * ULP
                (exact,) = torch.autograd.grad(expected, z)
                torch.testing.assert_close(gradient[1].double(), exact[0], rtol=8 * ULP, atol=ULP)
            mean = kd_loss(student, named, labels, **call)
            torch.testing.assert_close(mean, loss.detach().sum() / counted, rtol=4 * ULP, atol=0)
            alone = TopK(named.ids[1:2], named.logprobs[1:2], tail)
            loss = kd_loss(leaf[1:2], alone, labels[1:2], **call)
            assert loss.requires_grad and (loss == 0) == (alpha == 1)


def of_every_kind(tail: str) -> tuple[Tensor, TopK]:
    """(student logits, a teacher with an estimated tail), with ordinary rows, rows without a token, nearly certain rows
    and invalid rows."""
    teacher = sparse(5, vocabulary=61, k=7, seed=55, tail=tail, tail_given=False, padding=0.0)
    teacher.ids[1] = -1
    teacher.logprobs[2] = teacher.logprobs[2].log_softmax(-1)
    teacher.logprobs[3, 4] = NAN
    return logits(5, 61, seed=54), with_given_tail(teacher)


def outcomes_of_every_kind(tail: str, backend: str) -> list[Tensor]:
    """Losses, gradients and parts of the rows of `of_every_kind`, with and without a cross-entropy."""
    student, teacher = of_every_kind(tail)
    results: list[Tensor] = []
    for alpha in (1.0, 0.5):
        leaf = student.clone().requires_grad_()
        loss, parts = kd_loss(
            leaf, teacher, torch.arange(5), alpha=alpha, divergence="jsd", reduction="none",
            return_parts=True, backend=backend,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert (
            loss.isnan().tolist()
            == gradient.isnan().all(-1).tolist()
            == [False] * 3 + [True, False]
        )
        assert (loss[1] == 0) == (alpha == 1) and parts.distillation[1] == 0
        results += [loss.detach(), gradient, *parts[:2]]
    return results


@tails
def test_rows_of_every_kind(everywhere: str, tail: str) -> None:
    """All backends give the same results."""
    actual, expected = (outcomes_of_every_kind(tail, b) for b in (everywhere, "reference"))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@tails
def test_a_row_that_names_no_token_in_chunks(backend: str, tail: str) -> None:
    """Chunks give the same result as kd_loss, also under a mask that drops another row."""
    hidden, head = logits(5, 6, seed=56), logits(21, 6, seed=57)
    teacher = sparse(5, vocabulary=21, k=3, seed=55, tail=tail)
    teacher.ids[1] = teacher.ids[4] = -1
    labels = torch.tensor([1, 2, 3, 4, 5])
    call: dict[str, Any] = {
        "mask": torch.tensor([True, True, False, True, True]), "return_parts": True, "backend": backend,
    }  # fmt: skip
    for alpha in (1.0, 0.4):
        leaf = hidden.clone().requires_grad_()
        loss, parts = fastkd.fused_linear_kd_loss(
            leaf, head, with_given_tail(teacher), labels, chunk_size=2, alpha=alpha, **call
        )
        z = hidden.clone().requires_grad_()
        expected, wanted = kd_loss(
            z @ head.T, with_given_tail(teacher), labels, alpha=alpha, **call
        )
        assert parts.counted == wanted.counted
        assert parts.counted == (2 if alpha == 1 and tail.startswith("renormalize") else 4)
        torch.testing.assert_close(loss, expected, rtol=16 * ULP, atol=ULP)
        torch.testing.assert_close(
            *(torch.autograd.grad(value, x)[0] for value, x in ((loss, leaf), (expected, z))),
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip


# Infinities


@tails
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.6])
def test_columns_at_minus_infinity(
    everywhere: str, tail: str, alpha: float, smoothing: float
) -> None:
    """Columns at -inf outside the teacher's tokens have no effect; neither do those of tokens with p = 0."""
    student = logits(3, 37, seed=56)
    teacher = sparse(3, vocabulary=37, k=6, seed=57, tail=tail, padding=0.0, tail_given=False)
    outside = torch.ones(3, 37, dtype=torch.bool).scatter_(-1, teacher.ids, False)
    student[0, outside[0].nonzero()[:5, 0]] = -INF
    student[1, outside[1].nonzero()[-20:, 0]] = -INF  # more than a tile of the kernels
    student[2, teacher.ids[2, 3]] = -INF
    teacher.logprobs[2, 3] = -INF
    labels = teacher.ids[:, 0].contiguous()
    for divergence in ("forward_kl", "jsd"):
        if not smoothing:
            check_topk(everywhere, student, teacher, labels, alpha=alpha, divergence=divergence)
            continue
        loss, gradient = rows_of(
            student, with_given_tail(teacher), labels, alpha=alpha, label_smoothing=smoothing,
            divergence=divergence, backend=everywhere,
        )  # fmt: skip
        assert ((loss == INF) if alpha < 1 else loss.isfinite()).all()  # as torch's cross_entropy
        assert gradient.isfinite().all()


def test_a_token_that_the_student_excludes(everywhere: str) -> None:
    """With p > 0 = q, forward KL is infinite with a finite gradient, and jsd is finite."""
    student = logits(1, 37, seed=58)
    teacher = sparse(1, vocabulary=37, k=6, seed=59, padding=0.0)
    student[0, teacher.ids[0, 2]] = -INF
    for tail in TAILS:
        named = with_given_tail(teacher._replace(tail=tail))
        loss, gradient = rows_of(student, named, backend=everywhere)
        assert (
            loss == INF and gradient.isfinite().all() and gradient[0, teacher.ids[0, 2]] == 0
        ) or (loss == INF and gradient.isfinite().all() and gradient[0, teacher.ids[0, 2]] < 0)
        loss, gradient = rows_of(student, named, divergence="jsd", backend=everywhere)
        assert loss.isfinite().all() and gradient.isfinite().all()


@tails
def test_a_student_of_tokens_alone(everywhere: str, tail: str) -> None:
    """With all other columns at -inf and p > 0 in the tail, "bucket" is infinite and the other policies are finite."""
    student = logits(2, 37, seed=60)
    teacher = sparse(2, vocabulary=37, k=6, seed=61, tail=tail, padding=0.0)
    student = torch.full_like(student, -INF).scatter(
        -1, teacher.ids, student.gather(-1, teacher.ids)
    )
    loss, gradient = rows_of(student, with_given_tail(teacher), backend=everywhere)
    jsd = rows_of(student, with_given_tail(teacher), divergence="jsd", backend=everywhere)
    assert jsd[0].isfinite().all() and jsd[1].isfinite().all() and gradient.isfinite().all()
    if tail == "bucket":
        assert (loss == INF).all()
        whole = teacher._replace(
            logprobs=teacher.logprobs.log_softmax(-1), tail_logprob=torch.full((2,), -INF)
        )
        check_topk(everywhere, student, whole, teacher.ids[:, 0], alpha=0.5)
    else:
        for divergence in ("forward_kl", "jsd"):
            check_topk(everywhere, student, teacher, divergence=divergence)


@defined_divergences
@tails
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
def test_a_teacher_without_a_tail(everywhere: str, tail: str, divergence: str) -> None:
    """With p = 0 < q in the tail, the bucket's reverse KL is infinite, the truncated sum is not."""
    student = logits(2, 37, seed=62)
    teacher = sparse(2, vocabulary=37, k=6, seed=63, tail=tail, padding=0.0)
    whole = teacher._replace(
        logprobs=teacher.logprobs.log_softmax(-1), tail_logprob=torch.full((2,), -INF)
    )
    if tail == "bucket" and divergence == "reverse_kl":
        loss, _ = rows_of(
            student, with_given_tail(whole), divergence=divergence, backend=everywhere
        )
        assert (loss == INF).all()
    else:
        check_topk(everywhere, student, whole, divergence=divergence)


@tails
@pytest.mark.parametrize("level", [-1e31, -3e38])
def test_rows_of_very_low_logits(everywhere: str, tail: str, level: float) -> None:
    """A common shift does not change a row's softmax; in float32 a very low row is uniform, or has few distinct
    values."""
    student = torch.full((2, 37), level)
    student[1, 5:] = -INF
    teacher = sparse(2, vocabulary=37, k=3, seed=64, tail=tail, padding=0.0)
    teacher.ids.copy_(torch.tensor([[0, 3, 1], [4, 0, 2]]))
    shifted = student - level
    for labels, alpha in ((None, 1.0), (torch.tensor([0, 2]), 0.5)):
        actual = rows_of(student, with_given_tail(teacher), labels, alpha=alpha, backend=everywhere)
        expected = rows_of(
            shifted, with_given_tail(teacher), labels, alpha=alpha, backend=everywhere
        )
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=4 * ULP, atol=ULP)


@tails
def test_nan_and_infinity_stay_in_their_row(everywhere: str, tail: str) -> None:
    student = logits(4, 37, seed=65)
    teacher = sparse(4, vocabulary=37, k=6, seed=66, tail=tail, padding=0.0)
    labels = torch.tensor([0, 1, 2, 3])
    clean = rows_of(student, with_given_tail(teacher), labels, alpha=0.5, backend=everywhere)
    student[0, int(teacher.ids[0, 2])] = NAN
    student[1, int(teacher.ids[1, 2])] = INF
    student[2, [c for c in range(37) if c not in teacher.ids[2].tolist()][-1]] = NAN
    actual = rows_of(student, with_given_tail(teacher), labels, alpha=0.5, backend=everywhere)
    assert actual[0][:3].isnan().all() and torch.equal(actual[0][3], clean[0][3])
    assert actual[1][:3].isnan().any(-1).all() and torch.equal(actual[1][3], clean[1][3])


# Parts


@tails
@dtypes
def test_the_loss_does_not_depend_on_who_asks_for_parts(
    everywhere: str, tail: str, dtype: torch.dtype
) -> None:
    student = logits(3, 37, seed=67, dtype=dtype)
    student[:, 5] += 40.0  # the largest logit may belong to none of the tokens
    named = with_given_tail(sparse(3, vocabulary=37, k=6, seed=68, tail=tail))
    for labels, alpha in ((None, 1.0), (torch.tensor([1, 2, -100]), 0.5)):
        plain = rows_of(student, named, labels, alpha=alpha, backend=everywhere)
        leaf = student.clone().requires_grad_()
        loss, parts = kd_loss(
            leaf,
            named,
            labels,
            alpha=alpha,
            reduction="none",
            return_parts=True,
            backend=everywhere,
        )
        assert not any(part.requires_grad for part in parts)
        assert torch.equal(loss.detach(), plain[0])
        assert torch.equal(torch.autograd.grad(loss.sum(), leaf)[0], plain[1])
        recombined = alpha * parts.distillation + (1 - alpha) * parts.cross_entropy
        torch.testing.assert_close(loss.detach(), recombined, rtol=8 * ULP, atol=0)


# Which backend runs


def test_the_backend_asked_for_runs(everywhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = with_given_tail(sparse(2, vocabulary=21, k=3, seed=69))
    ran = ran_on(monkeypatch, "reference", "cpu", "triton", "cuda")
    steps: list[str] = []
    whole = everywhere in ("cpu", "cuda")
    if not whole:
        module = registry.load(everywhere)
        for step in ("gather_events", "spread_gradient"):
            launch = getattr(module, step)
            monkeypatch.setattr(
                module, step, lambda *a, step=step, launch=launch: steps.append(step) or launch(*a)
            )
    rows_of(logits(2, 21, seed=70), named, backend=everywhere)
    # The reference's loss over the events calls its kd_rows again.
    assert set(ran) == {everywhere} and ran[0] == everywhere
    assert steps == ([] if whole else ["gather_events", "spread_gradient"])


def test_the_backend_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    named, student = with_given_tail(sparse(2, vocabulary=21, k=3, seed=69)), logits(2, 21, seed=70)
    ran = ran_on(monkeypatch, "portable", "cpu")
    kd_loss(student, named)
    assert ran == ["cpu"]
    ran.clear()
    kd_loss(student.double(), named)
    assert set(ran) == {"portable"}
    double = dataclasses.replace(named, logprobs=named.logprobs.double())
    with pytest.raises(fastkd.BackendUnavailable, match="float64"):
        kd_loss(student, double, backend="cpu")


@pytest.mark.parametrize("other", [40.0, 1e5, -INF])
def test_renormalize_does_not_see_the_others(everywhere: str, other: float) -> None:
    """Other logits have no effect however large they are: using their maximum as the origin would cost the tokens'
    digits."""
    student = torch.tensor([[0.1234567, 0.7654321, other], [0.7654321, other, 0.1234567]])
    named = TopK(
        torch.tensor([[0, 1], [2, 0]]), torch.tensor([[-1.0, -1.3], [-1.0, -1.3]]), "renormalize"
    )
    still = rows_of(student.masked_fill(student == other, 0.0), named, backend=everywhere)
    for return_parts in (False, True):
        leaf = student.clone().requires_grad_()
        result = kd_loss(
            leaf, named, reduction="none", return_parts=return_parts, backend=everywhere
        )
        loss = result[0] if return_parts else result
        torch.testing.assert_close(loss.detach(), still[0], rtol=8 * ULP, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(loss.sum(), leaf)[0], still[1], rtol=8 * ULP, atol=ULP
        )


def test_a_mixture_of_forward_kl_alone(everywhere: str) -> None:
    """The only mixture that "renormalize_teacher" allows, because its reverse half has weight 0."""
    student, teacher = (
        logits(2, 21, seed=79),
        sparse(2, vocabulary=21, k=4, seed=80, tail="renormalize_teacher"),
    )
    call = {"divergence": "forward_kl", "backend": everywhere}
    expected = rows_of(student, with_given_tail(teacher), **call)
    actual = rows_of(
        student, with_given_tail(teacher), **{**call, "divergence": fastkd.mixture(0.5, 0.0)}
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=8 * ULP, atol=ULP)


# Autograd


@tails
@dtypes
def test_upstream_gradients(everywhere: str, tail: str, dtype: torch.dtype) -> None:
    """Upstream gradients: non-uniform ones for reduction="none", one for a scalar, and those of a squared loss."""
    student, labels = logits(3, 21, seed=71, dtype=dtype), torch.tensor([3, -100, 20])
    teacher = sparse(3, vocabulary=21, k=5, seed=72, tail=tail)
    check_topk(
        everywhere, student, teacher, labels, alpha=0.5, upstream=torch.tensor([2.0, INF, -0.5])
    )
    check_topk(
        everywhere,
        student,
        teacher,
        labels,
        alpha=0.5,
        reduction="mean",
        upstream=torch.tensor(-2.0),
    )
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, with_given_tail(teacher), backend=everywhere)
    (squared,) = torch.autograd.grad(loss**2, leaf)
    leaf = student.clone().requires_grad_()
    once = kd_loss(leaf, with_given_tail(teacher), backend=everywhere)
    (plain,) = torch.autograd.grad(once, leaf)
    rounding = 2 * torch.finfo(dtype).eps
    expected = 2 * float(loss) * plain.float()
    torch.testing.assert_close(squared.float(), expected, rtol=rounding, atol=1e-6)


@tails
@dtypes
def test_the_graph(everywhere: str, tail: str, dtype: torch.dtype) -> None:
    student = logits(3, 21, seed=73, dtype=dtype).requires_grad_()
    named = with_given_tail(sparse(3, vocabulary=21, k=5, seed=74, tail=tail))
    kept = [x.clone() for x in (student.detach(), named.ids, named.logprobs)]
    loss = kd_loss(student, named, backend=everywhere)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (last,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, last)
    with pytest.raises(RuntimeError, match="backward through the graph a second time|freed"):
        torch.autograd.grad(loss, student)
    loss = kd_loss(student, named, backend=everywhere)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()
    expected = loss.detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            quiet = kd_loss(student, named, backend=everywhere)
            assert not quiet.requires_grad and torch.equal(quiet, expected)
            logprobs = named.logprobs.clone().requires_grad_()  # its gradient is not needed
            kd_loss(student, dataclasses.replace(named, logprobs=logprobs), backend=everywhere)
    recomputed = checkpoint(
        lambda x: kd_loss(x * 1, named, backend=everywhere), student, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(recomputed, student)[0], first)
    for before, after in zip(kept, (student.detach(), named.ids, named.logprobs), strict=True):
        assert torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("name", "tail", "dtype"),
    [("cpu", "bucket", torch.float32), ("cpu", "renormalize", torch.float16), ("reference", "truncate", torch.float32)],
)  # fmt: skip
@pytest.mark.parametrize("built", ["outside", "within"])
@pytest.mark.heavy_with(tail="renormalize", built="outside")
@pytest.mark.heavy_with(tail="bucket", built="within")
@pytest.mark.heavy_with(tail="truncate", built="within")
def test_compiled(built: str, name: str, tail: str, dtype: torch.dtype) -> None:
    """One graph, also for another number of rows; the teacher is built outside or inside the compiled function.

    One row names no token, and one is sure.
    """
    torch._dynamo.reset()
    call: dict[str, Any] = {
        "divergence": "jsd", "temperature": 2.0, "label_smoothing": 0.1, "backend": name,
        "alpha": 1.0 if tail == "renormalize" else 0.5,
    }  # fmt: skip

    def outside(student: Tensor, teacher: TopK, labels: Tensor) -> Tensor:
        return kd_loss(student, teacher, labels, **call)

    def within(student: Tensor, teacher: TopK, labels: Tensor) -> Tensor:
        own = TopK(teacher.ids, teacher.logprobs, tail, teacher.tail_logprob, 2.0)
        return kd_loss(student, own, labels, **call)

    # One of them takes the number of rows as a symbol from the start, the other after it has changed.
    function, dynamic = {"outside": (outside, None), "within": (within, True)}[built]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (4, 5, 6):
        student = logits(rows, 37, seed=rows, dtype=dtype)
        teacher = sparse(
            rows, vocabulary=37, k=6, seed=rows + 1, tail=tail, at=2.0, tail_given=False
        )
        teacher.ids[1] = -1
        teacher.logprobs[2] -= teacher.logprobs[2].nan_to_num(-INF).logsumexp(-1)
        named = with_given_tail(teacher)
        labels = labels_for(rows, vocabulary=37, seed=rows, ignored=0.2)
        results = []
        for run in (function, compiled):
            leaf = student.clone().requires_grad_()
            loss = run(leaf, named, labels)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(
            results[1], results[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-7
        )
    torch._dynamo.reset()


@tails
def test_the_module_takes_it(everywhere: str, tail: str) -> None:
    student, labels = logits(3, 21, seed=75), torch.tensor([1, 2, 3])
    named = with_given_tail(sparse(3, vocabulary=21, k=5, seed=76, tail=tail))
    module = KDLoss(alpha=0.5, backend=everywhere)
    assert torch.equal(
        module(student, named, labels),
        kd_loss(student, named, labels, alpha=0.5, backend=everywhere),
    )


@tails
def test_autocast(everywhere: str, tail: str) -> None:
    student = logits(3, 21, seed=75)
    named = with_given_tail(sparse(3, vocabulary=21, k=5, seed=76, tail=tail))
    expected = rows_of(student, named, backend=everywhere)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = rows_of(student, named, backend=everywhere)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# From logits


@dtypes
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_from_logits(dtype: torch.dtype, temperature: float) -> None:
    dense = logits(2, 3, 50, seed=77, dtype=dtype)
    dense[0, 0, 7:] = -INF
    named = TopK.from_logits(dense.requires_grad_(), 7, tail="truncate", temperature=temperature)
    assert (named.tail, named.temperature) == ("truncate", temperature)
    assert named.ids.dtype == torch.int64 and not named.logprobs.requires_grad
    exact = (dense.detach().double() / temperature).log_softmax(-1)
    assert torch.equal(named.ids.sort(-1).values, exact.topk(7).indices.sort(-1).values)
    torch.testing.assert_close(
        named.logprobs.double(), exact.gather(-1, named.ids), rtol=4 * ULP, atol=4 * ULP
    )
    rest = exact.scatter(-1, named.ids, -INF).logsumexp(-1)
    assert rest[0, 0] == -INF
    torch.testing.assert_close(named.tail_logprob.double(), rest, rtol=4 * ULP, atol=4 * ULP)  # type: ignore[union-attr]


def test_from_peaked_logits() -> None:
    """A tail of 1e-12 keeps its digits, which 1 - sum p would lose."""
    dense = torch.full((1, 50), -30.0)
    dense[0, :3] = torch.tensor([0.0, 1.0, 2.0])
    named = TopK.from_logits(dense, 3)
    exact = dense.double().log_softmax(-1)[0, 3:].logsumexp(-1)
    assert abs(float(named.tail_logprob) - float(exact)) <= 2 * ULP * abs(float(exact))  # type: ignore[arg-type]


# What raises

META = torch.device("meta")
IDS = torch.tensor([[0, 1], [2, -1], [3, 4]])
LOGPROBS = torch.tensor([[-1.0, -2.0], [-0.5, 0.0], [-3.0, -1.0]])

CONSTRUCTED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ids": [[0, 1]]}, TypeError, "ids must be a tensor, got list"),
    ({"ids": IDS.float()}, TypeError, "ids must be torch.int64 or torch.int32, got torch.float32"),
    ({"ids": IDS.bool()}, TypeError, "ids must be torch.int64 or torch.int32, got torch.bool"),
    ({"logprobs": None}, TypeError, "logprobs must be a tensor, got NoneType"),
    (
        {"logprobs": IDS},
        TypeError,
        "logprobs must be torch.float32 or torch.bfloat16 or torch.float16 or torch.float64, got torch.int64",
    ),
    (
        {"ids": torch.tensor(1), "logprobs": torch.tensor(-1.0)},
        ValueError,
        "ids must be [..., K] with K > 0, got shape ()",
    ),
    (
        {"ids": IDS[:, :0], "logprobs": LOGPROBS[:, :0]},
        ValueError,
        "ids must be [..., K] with K > 0, got shape (3, 0)",
    ),
    (
        {"logprobs": LOGPROBS[:, :1]},
        ValueError,
        "logprobs must have the shape of ids, (3, 2); got (3, 1)",
    ),
    (
        {"logprobs": LOGPROBS[:2]},
        ValueError,
        "logprobs must have the shape of ids, (3, 2); got (2, 2)",
    ),
    (
        {"logprobs": LOGPROBS.to(META)},
        ValueError,
        "logprobs must be on cpu, the device of ids; got meta",
    ),
    (
        {"tail": "zero"},
        ValueError,
        "tail must be one of bucket, renormalize, renormalize_teacher, truncate; got 'zero'",
    ),
    (
        {"tail": None},
        ValueError,
        "tail must be one of bucket, renormalize, renormalize_teacher, truncate; got None",
    ),
    (
        {"tail": ["bucket"]},
        ValueError,
        "tail must be one of bucket, renormalize, renormalize_teacher, truncate; got ['bucket']",
    ),
    ({"tail_logprob": -1.0}, TypeError, "tail_logprob must be a tensor, got float"),
    (
        {"tail_logprob": torch.zeros(3, dtype=torch.int64)},
        TypeError,
        "tail_logprob must be torch.float32 or torch.bfloat16 or torch.float16 or torch.float64, got torch.int64",
    ),
    (
        {"tail_logprob": torch.zeros(3, 1)},
        ValueError,
        "tail_logprob must have one value per row, shape (3,); got (3, 1)",
    ),
    (
        {"tail_logprob": torch.zeros(3, device=META)},
        ValueError,
        "tail_logprob must be on cpu, the device of ids; got meta",
    ),
    ({"temperature": torch.ones(())}, TypeError, "temperature must be a number, got Tensor"),
    ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be positive and finite, got -1"),
    ({"temperature": INF}, ValueError, "temperature must be positive and finite, got inf"),
    ({"temperature": NAN}, ValueError, "temperature must be positive and finite, got nan"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), CONSTRUCTED)
def test_what_the_constructor_refuses(
    changed: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as error:
        TopK(**{"ids": IDS, "logprobs": LOGPROBS, **changed})
    assert str(error.value) == message


FROM_LOGITS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": [1.0]}, TypeError, "logits must be a tensor, got list"),
    (
        {"logits": IDS},
        TypeError,
        "logits must be torch.float32 or torch.bfloat16 or torch.float16 or torch.float64, got torch.int64",
    ),
    ({"logits": torch.tensor(1.0)}, ValueError, "logits must be [..., V], got a scalar"),
    ({"k": 0}, ValueError, "k must be an int in [1, 2], got 0"),
    ({"k": 3}, ValueError, "k must be an int in [1, 2], got 3"),
    ({"k": 1.0}, ValueError, "k must be an int in [1, 2], got 1.0"),
    ({"k": True}, ValueError, "k must be an int in [1, 2], got True"),
    (
        {"tail": "ghost"},
        ValueError,
        "tail must be one of bucket, renormalize, renormalize_teacher, truncate; got 'ghost'",
    ),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
    ({"temperature": torch.ones(3, 1)}, TypeError, "temperature must be a number, got Tensor"),
    ({"temperature": torch.ones(4)}, TypeError, "temperature must be a number, got Tensor"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), FROM_LOGITS)
def test_what_from_logits_refuses(
    changed: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as error:
        TopK.from_logits(**{"logits": LOGPROBS, "k": 1, **changed})
    assert str(error.value) == message


def _teacher(**changed: Any) -> TopK:
    return TopK(**{"ids": IDS, "logprobs": LOGPROBS, **changed})


BUCKET_AT = (
    "needs the mass of the tail at the temperature of the loss. Take the "
    "log-probabilities at it (TopK.from_logits(..., temperature=)), pass teacher_temperature, or use "
    "tail='renormalize' or 'renormalize_teacher'"
)


def _no_sum(name: str) -> str:
    return (
        f"tail='renormalize_teacher' gives all other tokens probability 0, where the divergence "
        f"{name!r} is infinite or has no sum; use 'bucket', 'renormalize' or 'truncate'"
    )


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"teacher": _teacher(ids=IDS[:2], logprobs=LOGPROBS[:2])},
        ValueError,
        "teacher must have the leading shape of student_logits, (3,); got (2,)",
    ),
    (
        {"teacher": _teacher(ids=IDS[None], logprobs=LOGPROBS[None])},
        ValueError,
        "teacher must have the leading shape of student_logits, (3,); got (1, 3)",
    ),
    (
        {"teacher": _teacher(ids=IDS.to(META), logprobs=LOGPROBS.to(META))},
        ValueError,
        "teacher must be on cpu, where student_logits is; got meta",
    ),
    (
        {"teacher": _teacher(logprobs=LOGPROBS.clone().requires_grad_())},
        ValueError,
        "teacher.logprobs requires grad, and only a teacher of dense logits gets a gradient; detach it",
    ),
    (
        {"teacher": _teacher(tail_logprob=torch.zeros(3, requires_grad=True))},
        ValueError,
        "teacher.tail_logprob requires grad, and only a teacher of dense logits gets a gradient; detach it",
    ),
    (
        {"divergence": "squared_error"},
        ValueError,
        "the divergence 'squared_error' compares logits, and a TopK has log-probabilities",
    ),
    (
        {"teacher_logit_scale": 0.5},
        ValueError,
        "teacher_logit_scale and teacher_softcap are for logits, and a TopK has log-probabilities: "
        "apply them before taking log-probabilities",
    ),
    (
        {"teacher_softcap": 5.0},
        ValueError,
        "teacher_logit_scale and teacher_softcap are for logits, and a TopK has log-probabilities: "
        "apply them before taking log-probabilities",
    ),
    *(
        (
            {"teacher": _teacher(tail="renormalize_teacher"), "divergence": divergence},
            ValueError,
            _no_sum(name),
        )
        for divergence, name in (
            ("reverse_kl", "reverse_kl"),
            (fastkd.jsd(1.0), "reverse_kl"),
            ("mixture", "mixture"),
            (fastkd.skew_reverse_kl(0.0), "reverse_kl"),
            ("alpha_beta", "alpha_beta"),
            (fastkd.alpha_beta(0.0, 0.0), "alpha_beta_at_0"),
            (fastkd.alpha_beta(0.3, -0.3), "alpha_beta_at_sum_0"),
            (fastkd.alpha_beta(0.0, 1.0), "alpha_beta_at_alpha_0"),  # reverse KL
            (fastkd.alpha_beta(-0.5, 1.5), "alpha_beta"),  # of degree 1, and 1 / p^0.5
        )
    ),
    (
        {"temperature": 2.0},
        ValueError,
        f"teacher_temperature is 2.0, and teacher.logprobs were taken at 1.0: tail='bucket' {BUCKET_AT}",
    ),
    (
        {"teacher_temperature": 2.0, "teacher": _teacher(tail="truncate")},
        ValueError,
        f"teacher_temperature is 2.0, and teacher.logprobs were taken at 1.0: tail='truncate' {BUCKET_AT}",
    ),
    (
        {"teacher": _teacher(temperature=2)},
        ValueError,
        f"teacher_temperature is 1.0, and teacher.logprobs were taken at 2: tail='bucket' {BUCKET_AT}",
    ),
    (
        {"temperature": torch.ones(3)},
        ValueError,
        f"teacher_temperature is one a row, and teacher.logprobs were taken at 1.0: tail='bucket' {BUCKET_AT}",
    ),
    (
        {"vocab_size": 8},
        ValueError,
        "vocab_size must be in [1, 7], the narrowest of the widths; got 8",
    ),
    (
        {"teacher": (IDS, LOGPROBS)},
        TypeError,
        "teacher must be a tensor of logits, a fastkd.TopK, a fastkd.LinearTeacher, a fastkd.Ensemble or a "
        "fastkd.RoutedTeacher; got tuple",
    ),
]


@pytest.mark.parametrize(("changed", "kind", "message"), REFUSED)
def test_what_kd_loss_refuses(
    backend: str, changed: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as error:
        kd_loss(
            **{
                "student_logits": torch.ones(3, 7),
                "teacher": _teacher(),
                "backend": backend,
                **changed,
            }
        )
    assert str(error.value) == message


def test_one_event_alone_has_no_gradient(everywhere: str) -> None:
    """With V = 1 loss and gradient are 0 under every policy."""
    for tail in TAILS:
        named = TopK(torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), -0.0), tail)
        for divergence in ("forward_kl", "jsd"):
            loss, gradient = rows_of(
                logits(2, 1, seed=78), named, divergence=divergence, backend=everywhere
            )
            assert (loss.abs() <= ULP).all() and (gradient.abs() <= ULP).all()


# ---- tokens that the caller chooses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_from_logits_at_ids(dtype: torch.dtype, index: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = 4.0 * torch.randn(6, 40).to(dtype)
    ids = torch.rand(6, 40).argsort(-1)[:, :7].to(index)
    ids[0, 3:] = -1
    ids[1] = -1
    ids[2, 0], ids[2, 1:] = -1, torch.tensor([0, 5, 6, 7, 8, 9])  # token 0 beside padding
    ids[3, 0], ids[3, 1:] = -1, torch.tensor([1, 5, 6, 7, 8, 9])  # padding, and token 0 in the tail
    teacher = fastkd.TopK.from_logits(logits, ids=ids, tail="bucket", temperature=2.0)
    log_p = (logits.double() / 2.0).log_softmax(-1)
    assert teacher.ids is ids and teacher.temperature == 2.0 and teacher.tail_logprob is not None
    for row in range(6):
        taken = [int(token) for token in ids[row] if token >= 0]
        valid = ids[row] >= 0
        torch.testing.assert_close(
            teacher.logprobs[row][valid].double(), log_p[row, taken], rtol=2e-6, atol=2e-6
        )
        rest = [token for token in range(40) if token not in taken]
        torch.testing.assert_close(
            teacher.tail_logprob[row].double(), log_p[row, rest].logsumexp(0), rtol=2e-6, atol=2e-6
        )


def test_from_logits_at_all_ids_has_no_tail() -> None:
    logits = torch.randn(2, 5)
    teacher = fastkd.TopK.from_logits(logits, ids=torch.arange(5).expand(2, 5))
    assert teacher.tail_logprob is not None and (teacher.tail_logprob == -torch.inf).all()
    top = fastkd.TopK.from_logits(logits, 5)
    student = torch.randn(2, 5)
    torch.testing.assert_close(fastkd.kd_loss(student, teacher), fastkd.kd_loss(student, top))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"pass k or ids, to say which tokens to take; got neither"),
        ({"k": 2, "ids": torch.zeros(3, 2, dtype=torch.int64)}, r"got both"),
        ({"ids": torch.full((3, 2), 9)}, r"in \[0, 9\), the columns of logits, or -1 for padding; got 9 to 9"),
        ({"ids": torch.full((3, 2), -2)}, r"got -2 to -2"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, r"leading shape of logits, \(3,\); got shape \(2, 2\)"),
        ({"ids": torch.zeros(3, 0, dtype=torch.int64)}, r"K > 0"),
        ({"ids": torch.zeros(3, 2)}, r"ids must be torch\.int64 or torch\.int32"),
        ({"ids": torch.zeros(3, 2, dtype=torch.int64, device="meta")}, r"on cpu, where logits is; got meta"),
    ],
)  # fmt: skip
def test_from_logits_raises(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fastkd.TopK.from_logits(torch.randn(3, 9), **given)
