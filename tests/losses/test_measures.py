"""The measures that return_parts names, against their formulas in float64, for every backend."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.accuracy import labels_for, logits
from support.cuda_emulation import Emulation
from support.shards import InShards
from torch import Tensor

import fastkd
from fastkd import (
    Ensemble,
    FusedLinearKDLoss,
    KDLoss,
    LinearTeacher,
    MeasuredParts,
    Parts,
    TopK,
    fused_linear_kd_loss,
    kd_loss,
)
from fastkd.backends import registry

DENSE = ("teacher_entropy", "forward_kl", "reverse_kl", "acceptance", "agreement")
ALL = (*DENSE, "student_mass", "teacher_mass", "overlap")
TAILS = ("bucket", "renormalize", "renormalize_teacher", "truncate")
# What plain float32 loses: a probability's logarithm z - log sum exp has an error of some 1e-7 times the largest of the
# three, 30 here, and every measure is at most a mean of such logarithms.
NEAR = 4e-6


@pytest.fixture(params=["reference", "portable", "cpu", "triton", "cuda"])
def every_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend on CPU tensors: Triton's interpreter, and the emulation of the cuda backend."""
    name: str = request.param
    if name == "cuda":
        request.getfixturevalue("emulation")
        yield name
        return
    if name == "triton":
        if torch.cuda.is_available():
            pytest.skip(
                "the interpreter is off on a machine with a GPU; test_gpu.py runs the compiled kernel"
            )
        from support.triton_interpreter import corrected

        with corrected():
            yield name
        return
    assert fastkd.available_backends()[name] is None
    yield name


def formulas(log_p: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """The dense measures, written out. A term with the factor 0 is 0."""
    p, q = log_p.exp(), log_q.exp()

    def mean(weights: Tensor, values: Tensor) -> Tensor:
        return torch.where(weights == 0, 0.0, weights * values).sum(-1)

    return {
        "teacher_entropy": mean(p, -log_p),
        "forward_kl": mean(p, log_p - log_q),
        "reverse_kl": mean(q, log_q - log_p),
        "acceptance": 1.0 - 0.5 * (p - q).abs().sum(-1),
        "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
    }


def column(value: float | Tensor) -> float | Tensor:
    return value.double().unsqueeze(-1) if isinstance(value, Tensor) else value


def expected(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
) -> dict[str, Tensor]:
    """The dense measures of logits, in float64."""
    if teacher_temperature is None:
        teacher_temperature = temperature
    log_q = (student.detach().double() / column(temperature)).log_softmax(-1)
    log_p = (teacher.detach().double() / column(teacher_temperature)).log_softmax(-1)
    return formulas(log_p, log_q)


def expected_of_events(
    student: Tensor, teacher: TopK, temperature: float = 1.0
) -> dict[str, Tensor]:
    """The measures of a sparse teacher in float64. Each row is computed by itself."""
    rows: dict[str, list[Tensor]] = {name: [] for name in ALL}
    width = student.shape[-1]
    lead = student.shape[:-1]
    flat = (
        student.detach().double().reshape(-1, width),
        teacher.ids.reshape(-1, teacher.ids.shape[-1]),
        teacher.logprobs.double().reshape(-1, teacher.ids.shape[-1]),
    )
    for z, ids, logprobs in zip(*flat, strict=True):
        listed = ids >= 0
        if not listed.any():
            for values in rows.values():
                values.append(torch.zeros((), dtype=torch.float64))
            continue
        tokens, log_p = ids[listed], logprobs[listed]
        log_q = (z / temperature).log_softmax(-1)
        others = torch.ones(width, dtype=torch.bool).index_fill(0, tokens, False)
        tail_q = log_q[others].logsumexp(-1) if others.any() else torch.tensor(-math.inf).double()
        log_q = torch.cat([log_q[tokens], tail_q.view(1)])
        nothing = torch.tensor([-math.inf], dtype=torch.float64)
        if teacher.tail == "renormalize":
            log_q = torch.cat([log_q[:-1].log_softmax(-1), nothing])
        if teacher.renormalizes:
            log_p = torch.cat(
                [(log_p * (teacher.temperature / temperature)).log_softmax(-1), nothing]
            )
        else:
            rest = (1.0 - log_p.exp().sum(-1, keepdim=True)).clamp(min=0.0)
            log_p = torch.cat([log_p, rest.log()])
        here = formulas(log_p, log_q)
        here["student_mass"], here["teacher_mass"] = log_q[:-1].exp().sum(), log_p[:-1].exp().sum()
        top = z.topk(len(tokens)).indices
        here["overlap"] = torch.isin(tokens, top).sum().double()
        for name, value in here.items():
            rows[name].append(value)
    return {name: torch.stack(values).view(lead) for name, values in rows.items()}


def assert_measures(
    parts: MeasuredParts, wanted: dict[str, Tensor], kept: Tensor | None = None, near: float = NEAR
) -> None:
    """Compare every measure; rows that are not kept have 0."""
    for name, value in wanted.items():
        actual: Tensor = getattr(parts, name)
        assert not actual.requires_grad and actual.is_contiguous()
        exact = value if kept is None else torch.where(kept, value, 0.0)
        torch.testing.assert_close(
            actual.double(),
            exact,
            rtol=near,
            atol=near,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check_measures(emulation: Emulation, divergence: str, dtype: torch.dtype, ranks: int) -> None:
    """Compare rows with and without measures: equal maxima, -inf, maxima in the same place of two blocks, and NaN.

    Rows of 1003 columns have whole vectors, and at their ends columns that are none.
    """
    emulation.ranks = ranks
    student, teacher = pair("far", 4, 1003, dtype=dtype)
    student[0, 30::64] = teacher[0, 30] = teacher[0, 610] = 40.0
    student[1, 7] = teacher[1, 8] = -math.inf  # both divergences are infinite
    student[1, 100:], teacher[1, 100:] = -math.inf, -math.inf
    student[2, 600] = teacher[2, 600 % (-(-1003 // (8 * ranks)) * 8)] = 40.0
    wanted = expected(student, teacher, 0.5, 2.0)
    student[3, 9] = math.nan
    results = []
    for names in (DENSE, True):
        leaves = [x.clone().requires_grad_() for x in (student, teacher)]
        loss, parts = kd_loss(
            *leaves, divergence=divergence, temperature=0.5, teacher_temperature=2.0, reduction="none",
            return_parts=names, backend="cuda",
        )  # fmt: skip
        loss.sum().backward()
        results.append((loss, *(leaf.grad for leaf in leaves), parts))
    for with_measures, plain in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(with_measures, plain, rtol=0, atol=0, equal_nan=True)
    kept = torch.tensor([True, True, True, False])
    measures = MeasuredParts(*(x if x is None else torch.where(kept, x, 0) for x in results[0][3]))
    assert wanted["agreement"][0] == 1.0 and wanted["forward_kl"][1] == math.inf
    assert_measures(measures, wanted, kept)
    assert results[0][3].acceptance[3].isnan()


def pair(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    student, teacher = logits(*shape, seed=1, dtype=dtype), logits(*shape, seed=2, dtype=dtype)
    if kind == "near":
        teacher = (student + 0.1 * teacher).to(dtype)
    elif kind == "peaked":
        student[..., 3] += 30
        teacher[..., 5] += 25
        teacher[0, ..., 3] += 60
    elif kind == "offset":
        student, teacher = student + 1e4, teacher - 1e4
    elif kind == "-inf":
        student[..., ::3] = -math.inf
        teacher[..., ::3] = -math.inf
        student[-1, ..., 1] = -math.inf  # forward KL is infinite here
        teacher[0, ..., 4] = -math.inf  # and reverse KL here
    return student, teacher


# Sizes: less than a vector, a vector and a rest, several tiles of every backend and a rest.
@pytest.mark.parametrize("columns", [7, 130, 4099])
@pytest.mark.parametrize("kind", ["far", "near", "peaked", "offset", "-inf"])
def test_dense(every_backend: str, kind: str, columns: int) -> None:
    if every_backend in ("triton", "cuda") and columns == 4099 and kind != "far":
        columns = 67
    student, teacher = pair(kind, 3, columns)
    loss, parts = kd_loss(
        student,
        teacher,
        return_parts=DENSE,
        temperature=2.0,
        teacher_temperature=1.5,
        backend=every_backend,
    )
    assert isinstance(parts, MeasuredParts) and parts.overlap is None and parts.student_mass is None
    assert_measures(parts, expected(student, teacher, 2.0, 1.5))
    plain, terms = kd_loss(
        student,
        teacher,
        return_parts=True,
        temperature=2.0,
        teacher_temperature=1.5,
        backend=every_backend,
    )
    assert isinstance(terms, Parts) and torch.equal(plain, loss)
    for name in Parts._fields:
        assert torch.equal(getattr(terms, name), getattr(parts, name))


@pytest.mark.parametrize(
    "divergence", ["jsd", "tvd", "reverse_kl", "dkd", "nkd", "squared_error", "alpha_beta"]
)
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_every_divergence_and_alpha(every_backend: str, divergence: str, alpha: float) -> None:
    if every_backend in ("triton", "cuda") and alpha == 1.0:
        alpha = 0.5
    student, teacher = pair("far", 2, 3, 50)
    labels = labels_for(2, 3, vocabulary=50, seed=3)
    labels[0, 1] = -100
    student.requires_grad_()
    results = [
        kd_loss(
            student, teacher, labels, divergence=divergence, alpha=alpha, temperature=2.0,
            return_parts=names, backend=every_backend, reduction="none",
        )
        for names in (DENSE, True)
    ]  # fmt: skip
    assert_measures(results[0][1], expected(student, teacher, 2.0), labels != -100)
    # The loss and its gradient do not depend on the measures.
    (gradient,) = torch.autograd.grad(results[0][0].sum(), student)
    (wanted,) = torch.autograd.grad(results[1][0].sum(), student)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(gradient, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(every_backend: str, dtype: torch.dtype) -> None:
    student, teacher = pair("far", 3, 70, dtype=dtype)
    student.requires_grad_()
    loss, parts = kd_loss(student, teacher, return_parts=DENSE, backend=every_backend)
    assert parts.forward_kl is not None and parts.forward_kl.dtype == torch.float32
    assert_measures(parts, expected(student, teacher))
    loss.backward()  # of float16 logits, the backward pass computes the gradient, and no measures


def test_float64() -> None:
    student, teacher = pair("far", 3, 70, dtype=torch.float64)
    for backend in ("reference", "portable"):
        _, parts = kd_loss(student, teacher, return_parts=DENSE, backend=backend)
        assert parts.forward_kl is not None and parts.forward_kl.dtype == torch.float64
        assert_measures(parts, expected(student, teacher), near=1e-13)


def test_options_of_the_logits(every_backend: str) -> None:
    student, teacher = pair("far", 2, 4, 45)
    temperature = torch.tensor([[0.5, 1.0, 2.0, 4.0]]).expand(2, 4)
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    wanted = expected(
        20 * torch.tanh(-1.5 * student[..., :40] / 20), 0.5 * teacher[..., :40], temperature, 2.0
    )
    student[~mask], teacher[~mask] = math.nan, math.nan
    _, parts = kd_loss(
        student, teacher, mask=mask, temperature=temperature, teacher_temperature=2.0, logit_scale=-1.5,
        softcap=20.0, teacher_logit_scale=0.5, vocab_size=40, return_parts=DENSE, backend=every_backend,
    )  # fmt: skip
    assert_measures(parts, wanted, mask)


def test_ties_and_strides(every_backend: str) -> None:
    """Of equal maxima, the first counts; logits may have any strides."""
    student = torch.zeros(1100, 5).T
    teacher = torch.zeros(2, 5, 1100)[1]
    student[0, 7] = student[0, 30] = teacher[0, 7] = 5.0  # the same first maximum
    student[1, 30] = teacher[1, 7] = teacher[1, 30] = 5.0  # another one
    student[2, 1099] = teacher[2, 1099] = 5.0
    student[3, 5::64] = teacher[3, 5] = 5.0  # several of them in the same lane of each backend
    student[4, 5::64] = teacher[4, 5 + 1024] = 5.0
    _, parts = kd_loss(student, teacher, return_parts=("agreement",), backend=every_backend)
    assert parts.agreement is not None and parts.agreement.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert parts.forward_kl is None and parts.acceptance is None


def test_invalid_rows_are_nan(every_backend: str) -> None:
    student, teacher = pair("far", 5, 20)
    student[0, 3], teacher[1, 4] = math.nan, math.nan
    student[2] = -math.inf
    temperature = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0])
    loss, parts = kd_loss(
        student,
        teacher,
        temperature=temperature,
        reduction="none",
        return_parts=DENSE,
        backend=every_backend,
    )
    invalid = torch.tensor([True, True, True, True, False])
    assert torch.equal(loss.isnan(), invalid)
    for name in DENSE:
        assert torch.equal(getattr(parts, name).isnan(), invalid), name


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sparse(every_backend: str, tail: str, temperature: float) -> None:
    student, dense = pair("near", 2, 4, 60)
    top = TopK.from_logits(
        dense, 6, tail=tail, temperature=1.0 if tail.startswith("renorm") else temperature
    )
    ids = top.ids.clone()
    ids[0, 1, 2] = -1
    if tail != "renormalize_teacher":  # there a row without tokens has no distribution
        ids[1, 3] = -1
    teacher = TopK(ids, top.logprobs, tail, temperature=top.temperature)
    labels = labels_for(2, 4, vocabulary=60, seed=5)
    labels[0, 0] = -100
    student.requires_grad_()
    loss, parts = kd_loss(
        student,
        teacher,
        labels,
        alpha=0.7,
        temperature=temperature,
        return_parts=ALL,
        backend=every_backend,
    )
    wanted = expected_of_events(student, teacher, temperature)
    assert_measures(parts, wanted, labels != -100, near=2e-5)
    plain = kd_loss(
        student, teacher, labels, alpha=0.7, temperature=temperature, backend=every_backend
    )
    assert torch.equal(loss, plain)
    assert torch.equal(
        torch.autograd.grad(loss, student)[0], torch.autograd.grad(plain, student)[0]
    )


def test_overlap_of_a_negative_scale_and_of_padding() -> None:
    """The student's most probable tokens have the lowest logits; columns past vocab_size do not count."""
    student = torch.arange(12.0).expand(2, 12).contiguous()
    student[:, 10:] = -9.0
    ids = torch.tensor([[0, 1, 9], [2, 8, -1]])
    teacher = TopK(ids, torch.full((2, 3), -2.0))
    _, parts = kd_loss(student, teacher, logit_scale=-1.0, vocab_size=10, return_parts=("overlap",))
    assert parts.overlap is not None and parts.overlap.tolist() == [2.0, 0.0]


def test_instruction_sets(instructions: str) -> None:
    student, teacher = pair("far", 3, 2300)
    _, parts = kd_loss(student, teacher, return_parts=DENSE, backend="cpu")
    assert_measures(parts, expected(student, teacher))


def test_threads_share_a_row(threads: None) -> None:
    """Fewer rows than threads, and a row that does not keep its exponentials: the same bits."""
    student, teacher = pair("far", 2, 400_000)
    results = []
    for count in (1, 4):
        torch.set_num_threads(count)
        results.append(kd_loss(student, teacher, return_parts=DENSE, backend="cpu")[1])
    for name in DENSE:
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name
    assert_measures(results[0], expected(student, teacher))


SHARES = ((1.0, 1.0), (3.0, 1.0, 0.0, 2.0))


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("tail", ["", *TAILS])
def test_shards(
    every_backend: str, tail: str, shares: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = registry.load
    kernels = InShards(load(every_backend), shares)
    student, teacher = (x + shift for x, shift in zip(pair("far", 3, 61), (1e4, -1e4), strict=True))
    # Equal maxima, each in the first column of a shard; the teacher's is in the second shard.
    if not tail:
        student[2, 0] = student[2, 30] = 1e4 + 30
        teacher[2, 30] = -1e4 + 30
    labels = labels_for(3, vocabulary=61, seed=3)
    labels[1] = -100
    student.requires_grad_()
    options: dict[str, Any] = {"alpha": 0.5, "backend": every_backend}
    top = TopK.from_logits(teacher, 4, tail=tail or "bucket")
    sparse = TopK(top.ids, top.logprobs, top.tail)
    with monkeypatch.context() as patch:
        patch.setattr(
            registry, "load", lambda name: kernels if name == every_backend else load(name)
        )
        if tail:
            names = tuple(name for name in ALL if name != "overlap")
            loss, parts = kd_loss(student, sparse, labels, return_parts=names, **options)
            wanted = expected_of_events(student, sparse)
            del wanted["overlap"]
            # Tokens are exchanged in float32, which has three decimals at 1e4.
            assert_measures(parts, wanted, labels != -100, near=1e-3)
            loss.backward()
        for divergence in () if tail else ("forward_kl", "jsd"):
            loss, parts = kd_loss(
                student, teacher, labels, divergence=divergence, return_parts=DENSE, **options
            )
            assert_measures(parts, expected(student, teacher), labels != -100, near=2e-5)
            assert parts.agreement is not None and parts.agreement[2] == 0
            loss.backward()
    assert kernels.calls


def test_chunks(backend: str) -> None:
    """Hidden states, in chunks of rows from which dropped rows are removed."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 7, 16), (90, 16)))
    teacher = LinearTeacher(
        *(torch.randn(*shape, generator=generator) for shape in ((2, 7, 8), (90, 8)))
    )
    mask = torch.rand(2, 7, generator=generator) < 0.7
    for tensor in (hidden, weight):
        tensor.requires_grad_()
    for divergence in ("forward_kl", "jsd"):
        for reduction in ("mean", "none"):
            loss, parts = fused_linear_kd_loss(
                hidden, weight, teacher, mask=mask, divergence=divergence, temperature=2.0, reduction=reduction,
                chunk_size=3, return_parts=DENSE, backend=backend,
            )  # fmt: skip
            loss.sum().backward()
            wanted = expected(hidden @ weight.T, teacher.hidden @ teacher.weight.T, 2.0)
            assert_measures(parts, wanted, mask, near=2e-5)
    top = TopK.from_logits(teacher.hidden @ teacher.weight.T, 5)
    _, parts = fused_linear_kd_loss(
        hidden,
        weight,
        TopK(top.ids, top.logprobs),
        mask=mask,
        chunk_size=3,
        return_parts=ALL,
        backend=backend,
    )
    wanted = expected_of_events(hidden @ weight.T, TopK(top.ids, top.logprobs))
    assert_measures(parts, wanted, mask, near=2e-5)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_ensemble(backend: str, mean: str) -> None:
    student, first = pair("far", 3, 40)
    second = logits(3, 40, seed=9)
    _, parts = kd_loss(
        student,
        Ensemble([first, second], mean=mean),
        temperature=2.0,
        return_parts=DENSE,
        backend=backend,
    )
    log = torch.stack([x.double().div(2).log_softmax(-1) for x in (first, second)])
    log_p = log.mean(0).log_softmax(-1) if mean == "geometric" else log.logsumexp(0) - math.log(2)
    assert_measures(parts, formulas(log_p, student.double().div(2).log_softmax(-1)))


@pytest.mark.heavy_with(backend="portable")  # the graph is the same
# Without SIMD code, which is irrelevant here and slow to compile. Without caches, because a cached graph keeps what an
# operator's rules were when it was made.
@torch._inductor.config.patch({"cpp.simdlen": 1, "force_disable_caches": True})
# Inductor compiles one graph, in C++; the second graph, in which the temperature is a symbol, is traced without it.
@pytest.mark.parametrize(
    ("compiler", "temperatures"), [("inductor", (2.0,)), ("aot_eager", (2.0, 3.0))], ids=str
)
def test_compiled(
    backend: str, compiler: str, temperatures: tuple[float, ...], fresh_compiler: None
) -> None:
    student, teacher = pair("far", 4, 50)
    student.requires_grad_()
    head = logits(50, 50, seed=7).mul(0.1).requires_grad_()
    top = TopK.from_logits(teacher, 5)

    def call(
        student: Tensor, teacher: Tensor, temperature: float
    ) -> tuple[tuple[Tensor, MeasuredParts], ...]:
        options: dict[str, Any] = {"temperature": temperature, "backend": backend}
        sparse = TopK(top.ids, top.logprobs)
        return (
            kd_loss(student, teacher, return_parts=DENSE, **options),
            fused_linear_kd_loss(
                student, head, teacher, return_parts=DENSE, reduction="none", **options
            ),
            kd_loss(student, sparse, return_parts=ALL, backend=backend),
        )

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    for temperature in temperatures:
        results = compiled(student, teacher, temperature)
        for (loss, parts), (eager, eager_parts) in zip(
            results, call(student, teacher, temperature), strict=True
        ):
            assert torch.equal(loss, eager) and isinstance(parts, MeasuredParts)
            gradients = [
                torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (loss, eager)
            ]
            torch.testing.assert_close(*gradients)
            for value, wanted in zip(parts, eager_parts, strict=True):
                assert (value is None) == (wanted is None)
                assert value is None or torch.equal(value, wanted)


def test_autocast(backend: str) -> None:
    student, teacher = pair("far", 3, 40)
    head = logits(40, 40, seed=7).mul(0.1)
    with torch.autocast("cpu", torch.bfloat16):
        _, parts = kd_loss(student, teacher, return_parts=DENSE, backend=backend)
        _, fused = fused_linear_kd_loss(student, head, teacher, return_parts=DENSE, backend=backend)
    assert_measures(parts, expected(student, teacher))
    low = student.bfloat16().double() @ head.bfloat16().double().T
    assert_measures(fused, expected(low, teacher), near=2e-5)


def test_a_gate_on_the_entropy(backend: str) -> None:
    """The rows of an entropy-gated loss (EOPD): the loss of a row is linear in its weight."""
    student, teacher = pair("far", 6, 40)
    teacher[::2] *= 4
    threshold = 1.5
    student.requires_grad_()
    rows, parts = kd_loss(
        student, teacher, reduction="none", return_parts=("teacher_entropy",), backend=backend
    )
    assert parts.teacher_entropy is not None
    gate = parts.teacher_entropy > threshold
    assert gate.any() and not gate.all()
    (gradient,) = torch.autograd.grad((rows * gate).sum() / 6, student)
    exact = student.detach().double().requires_grad_()
    log_p = teacher.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    kl = (log_p.exp() * (log_p - exact.log_softmax(-1))).sum(-1)
    (wanted,) = torch.autograd.grad((kl * (entropy > threshold)).sum() / 6, exact)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-7)


def test_inplace(backend: str) -> None:
    """The gradient overwrites the logits after the measures are computed."""
    student, teacher = pair("far", 3, 40)
    leaf = student.clone().requires_grad_()
    _, parts = kd_loss(leaf * 1, teacher, divergence="dkd", labels=torch.zeros(3, dtype=torch.int64),
                       inplace=True, return_parts=DENSE, backend=backend)  # fmt: skip
    assert_measures(parts, expected(student, teacher))


def test_no_rows(backend: str) -> None:
    empty = torch.zeros(0, 5, requires_grad=True)
    _, parts = kd_loss(empty, empty.detach(), return_parts=DENSE, backend=backend)
    assert parts.acceptance is not None and parts.acceptance.shape == (0,)
    ids = torch.zeros(0, 2, dtype=torch.int64)
    _, parts = kd_loss(empty, TopK(ids, torch.zeros(0, 2)), return_parts=ALL, backend=backend)
    assert parts.overlap is not None and parts.overlap.shape == (0,)


def test_modules() -> None:
    student, teacher = pair("far", 3, 40)
    top = TopK.from_logits(teacher, 4)
    _, parts = KDLoss(return_parts=["acceptance", "overlap"])(student, top)
    assert parts.acceptance is not None and parts.overlap is not None and parts.forward_kl is None
    _, parts = FusedLinearKDLoss(return_parts={"agreement"})(student, torch.eye(40), teacher)
    assert parts.agreement is not None
    loss, parts = kd_loss(student, teacher, return_parts=())
    assert isinstance(parts, MeasuredParts) and parts[4:] == (None,) * 8
    assert torch.equal(loss, kd_loss(student, teacher))
    with pytest.raises(ValueError, match="return_parts may name"):
        KDLoss(return_parts=("entropy",))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("acceptance", TypeError, "return_parts must be True, False, or a collection of names such as"),
        (1, TypeError, "return_parts must be True, False, or a collection of names such as"),
        (None, TypeError, "return_parts must be True, False, or a collection of names such as"),
        (torch.ones(2), TypeError, "return_parts must be True, False, or a collection of names such as"),
        (("acceptance", "entropy"), ValueError, "return_parts may name teacher_entropy, .*; got 'entropy'"),
        ((1,), ValueError, "return_parts may name teacher_entropy, .*; got 1"),
        (("overlap",), ValueError, "return_parts: 'overlap' is about the tokens that a TopK lists"),
        (("student_mass",), ValueError, "return_parts: 'student_mass' is about the tokens that a TopK lists"),
    ],
    ids=str,
)  # fmt: skip
def test_messages(value: Any, error: type[Exception], message: str) -> None:
    student, teacher = pair("far", 3, 40)
    for _ in range(2):  # also when the call is remembered
        with pytest.raises(error, match=message):
            kd_loss(student, teacher, return_parts=value)
    with pytest.raises(error, match=message):
        fused_linear_kd_loss(student, torch.eye(40), teacher, return_parts=value)


def test_measures_cost_nothing_if_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, emulation: Emulation
) -> None:
    """No backend is wrapped, and none allocates measures, unless a name is given."""
    from fastkd.backends import measures

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("measures were computed")

    for name in ("MeasuredRows", "WithMeasures"):
        monkeypatch.setattr(f"fastkd.engine.backend.{name}", forbidden)
    monkeypatch.setattr(measures, "measure_rows", forbidden)
    student, teacher = pair("far", 3, 40)
    for backend in ("reference", "portable", "cpu", "cuda"):
        kd_loss(student, teacher, return_parts=True, backend=backend)
        kd_loss(student, TopK.from_logits(teacher, 3), return_parts=True, backend=backend)
