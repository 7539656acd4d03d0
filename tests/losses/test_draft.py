"""draft_loss against the published formulas in float64: every term, weighted sums, draft vocabularies, masks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from conftest import INTERPRETED, PTX, _instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastkd
from fastkd.backends import registry
from fastkd.call.contract import Options, Rows, Want
from fastkd.call.draft import Terms
from fastkd.response import draft_loss
from fastkd.response.draft import LOSSES

# Two leading dimensions. 37 draft tokens of 90: an odd width, of which a block of a kernel is partly filled.
ROWS, D, V = (2, 5), 37, 90


def _terms(
    student: Tensor, teacher: Tensor, ids: Tensor | None, eta: float = 3.0
) -> dict[str, Tensor]:
    """The published formulas, and the acceptance, of each row in float64."""
    student, teacher = student.double(), teacher.double()
    cut = teacher if ids is None else teacher[..., ids]
    full = teacher.softmax(-1) if ids is None else teacher.softmax(-1)[..., ids]
    logq, logp = student.log_softmax(-1), cut.log_softmax(-1)
    q, p = logq.exp(), logp.exp()
    accepted = torch.minimum(q, full).sum(-1)
    share = (-eta * accepted).exp().detach()
    forward = (p * (logp - logq)).sum(-1)
    logm = torch.logaddexp(logq, logp) - math.log(2.0)
    return {
        "forward_kl": forward,
        "reverse_kl": (q * (logq - logp)).sum(-1),
        "jsd": 0.5 * ((p * (logp - logm)).sum(-1) + (q * (logq - logm)).sum(-1)),
        "cross_entropy": -logq.gather(-1, cut.argmax(-1, keepdim=True)).squeeze(-1),
        "tvd": 1.0 - accepted,
        "nla": -accepted.clamp_min(1e-5).log(),
        "lk_hybrid": share * forward + (1.0 - share) * (1.0 - accepted),
        "acceptance": accepted,
    }


def _logits(
    seed: int, spread: float = 2.0, dtype: torch.dtype = torch.float32, subset: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    width = V if subset else D
    student = spread * torch.randn(*ROWS, D, generator=generator)
    teacher = spread * torch.randn(*ROWS, width, generator=generator)
    ids = torch.randperm(V, generator=generator)[:D] if subset else None
    return student.to(dtype), teacher.to(dtype), ids


def _wanted(
    student: Tensor, teacher: Tensor, ids: Tensor | None, losses: dict[str, float], **options: Any
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the terms of each row, [...], and the gradient of its sum."""
    leaf = student.double().requires_grad_()
    terms = _terms(leaf, teacher, ids, **options)
    rows = sum(weight * terms[name] for name, weight in losses.items() if weight)
    assert isinstance(rows, Tensor)
    (gradient,) = torch.autograd.grad(rows.sum(), leaf)
    return rows.detach(), gradient


def _found(student: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = draft_loss(leaf, *arguments, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def _close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    exact = 1e-9 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=exact, atol=exact)
    rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 0.0
    assert found[1].dtype == dtype
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=exact + rounding, atol=exact)


SUMS: list[dict[str, float]] = [
    *({name: 0.7} for name in LOSSES),
    {"cross_entropy": 0.1, "tvd": 0.9},
    {"forward_kl": 0.3, "cross_entropy": 0.6},
    {"forward_kl": 0.4, "lk_hybrid": 1.5, "cross_entropy": 0.2},
    {"nla": 0.5, "tvd": 0.25, "lk_hybrid": 2.0, "jsd": 1.0},
    dict.fromkeys(LOSSES, 1.25),
]


@pytest.mark.parametrize("subset", [True, False])
@pytest.mark.parametrize("losses", SUMS, ids=lambda losses: "+".join(losses))
def test_every_sum(backend: str, losses: dict[str, float], subset: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if dtype == torch.float64 and backend == "cpu":
            continue
        student, teacher, ids = _logits(1, dtype=dtype, subset=subset)
        options = {"draft_to_target": ids, "reduction": "none", "backend": backend}
        found = _found(student, teacher, losses, **options)
        _close(found, _wanted(student, teacher, ids, losses), dtype)


@pytest.mark.parametrize("subset", [True, False])
def test_every_term_on_every_backend(any_backend: str, subset: bool) -> None:
    student, teacher, ids = _logits(2, subset=subset)
    losses = {name: 0.5 + k for k, name in enumerate(LOSSES)}
    options = {"draft_to_target": ids, "reduction": "none", "backend": any_backend}
    found = _found(student, teacher, losses, **options)
    _close(found, _wanted(student, teacher, ids, losses), torch.float32)


@given(
    seed=st.integers(0, 10**6), spread=st.sampled_from([0.0, 0.01, 1.0, 8.0, 40.0]),
    name=st.sampled_from(LOSSES), other=st.sampled_from(LOSSES), subset=st.booleans(),
    shift=st.sampled_from([0.0, 1000.0]), eta=st.sampled_from([0.0, 1.0, 5.0]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_random_rows(
    seed: int, spread: float, name: str, other: str, subset: bool, shift: float, eta: float
) -> None:
    student, teacher, ids = _logits(seed, spread, torch.float64, subset)
    student, teacher = student.float().double() + shift, teacher.float().double() - shift
    losses = {name: 1.5, other: 0.5}
    options = {"draft_to_target": ids, "reduction": "none", "eta": eta}
    found = _found(student, teacher, losses, **options)
    wanted = _wanted(student, teacher, ids, losses, eta=eta)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-8, atol=1e-9)
    if spread:  # where p = q, the subgradient of |p - q| is 0 here and is split in the formula
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("subset", [True, False])
def test_low_acceptance_keeps_its_digits(any_backend: str, subset: bool) -> None:
    """1 - TV in float32 would have no digits of an acceptance of 1e-7, and few of one of 1e-4."""
    student, teacher, ids = _logits(3, 0.5, subset=subset)
    first = 0 if ids is None else int(ids[0])
    # The student puts its mass on token 0, where the teacher has little, and vice versa.
    for row, size in enumerate((4.0, 8.0, 10.0, 12.0, 20.0)):
        student[:, row, 0] += size
        teacher[:, row, first] -= size
    options: dict[str, Any] = {"draft_to_target": ids, "reduction": "none", "backend": any_backend}
    loss, parts = draft_loss(student, teacher, "nla", return_parts=True, **options)
    wanted = _terms(student, teacher, ids)
    assert wanted["acceptance"].min() < 1e-6 and wanted["acceptance"].max() > 0.03
    torch.testing.assert_close(parts.acceptance.double(), wanted["acceptance"], rtol=2e-6, atol=0.0)
    torch.testing.assert_close(loss.double(), wanted["nla"], rtol=2e-6, atol=0.0)
    found, exact = (
        _found(student, teacher, "nla", **options)[1],
        _wanted(student, teacher, ids, {"nla": 1.0})[1],
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)
    assert not found[wanted["acceptance"] < 1e-5].any()


def test_acceptance_is_that_of_the_whole_vocabulary() -> None:
    student, teacher, ids = _logits(4)
    assert ids is not None
    _, parts = draft_loss(student, teacher, "tvd", draft_to_target=ids, return_parts=True)
    q = torch.zeros(*ROWS, V, dtype=torch.float64)
    q[..., ids] = student.double().softmax(-1)
    p = teacher.double().softmax(-1)
    torch.testing.assert_close(parts.acceptance.double(), torch.minimum(p, q).sum(-1))
    distance = fastkd.kd_loss(q.log(), teacher.double(), divergence="tvd", reduction="none")
    torch.testing.assert_close(parts.terms["tvd"].double(), distance)
    # The other terms, and speculators' own tvd, are those of the target's logits at these tokens.
    same = draft_loss(student, teacher[..., ids], "forward_kl")
    torch.testing.assert_close(draft_loss(student, teacher, draft_to_target=ids), same)
    assert draft_loss(student, teacher[..., ids], "tvd") < 0.9 * parts.terms["tvd"].mean()


def test_a_target_certain_of_a_token_outside_the_draft_vocabulary() -> None:
    student, teacher, ids = _logits(5)
    assert ids is not None
    outside = next(v for v in range(V) if v not in ids.tolist())
    teacher[..., outside] = 200.0
    losses = {"tvd": 1.0, "forward_kl": 1.0}
    options = {"draft_to_target": ids, "reduction": "none"}
    _close(
        _found(student, teacher, losses, **options),
        _wanted(student, teacher, ids, losses),
        torch.float32,
    )


def test_a_target_that_excludes_the_draft_vocabulary(any_backend: str) -> None:
    """No token is accepted, in rows where a grammar (say) gives the target's other tokens all probability."""
    student, teacher, ids = _logits(5)
    assert ids is not None
    teacher[0, 1, ids] = -math.inf
    options = {"draft_to_target": ids, "reduction": "none", "backend": any_backend}
    loss, gradient = _found(student, teacher, {"tvd": 1.0, "nla": 1.0}, **options)
    assert loss[0, 1].item() == pytest.approx(1.0 - math.log(1e-5))
    assert gradient[0, 1].abs().max() < 1e-7 < gradient[0, 0].abs().max()
    kept = torch.ones(ROWS, dtype=torch.bool)
    kept[0, 1] = False
    wanted = _wanted(student, teacher, ids, {"tvd": 1.0, "nla": 1.0})
    _close((loss[kept], gradient[kept]), (wanted[0][kept], wanted[1][kept]), torch.float32)


def test_a_draft_vocabulary_masked_with_the_lowest_number(any_backend: str) -> None:
    """p is uniform over the draft tokens, which have the lowest finite logit; that is far from -inf."""
    student, teacher, ids = _logits(15)
    assert ids is not None
    lowest = torch.finfo(torch.float32).min
    teacher[0, 1, ids] = lowest
    student[1, 2] = lowest
    losses = {"forward_kl": 1.0, "jsd": 0.5, "cross_entropy": 0.5}
    for columns, target in ((ids, teacher), (None, teacher[..., ids])):
        options = {"draft_to_target": columns, "reduction": "none", "backend": any_backend}
        found = _found(student, target, losses, **options)
        _close(found, _wanted(student, target, columns, losses), torch.float32)


@pytest.mark.heavy_with(any_backend="triton", hole=math.inf)
@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_rows_weights_and_positions(any_backend: str, hole: float) -> None:
    student, teacher, ids = _logits(6)
    mask = torch.rand(ROWS, generator=torch.Generator().manual_seed(0)) < 0.6
    weight = 0.5 + torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(5).expand(ROWS)
    student[~mask], teacher[~mask], weight[~mask] = hole, hole, hole
    losses = {"tvd": 0.9, "cross_entropy": 0.1, "lk_hybrid": 0.5}
    leaf = student.clone().double().requires_grad_()
    terms = _terms(leaf[mask], teacher[mask], ids)
    factor = (weight * 0.8**positions)[mask].double()
    rows = factor * sum(w * terms[name] for name, w in losses.items())
    for reduction, divisor in {
        "sum": 1, "mean": int(mask.sum()), "batchmean": ROWS[0]
    }.items():  # fmt: skip
        (gradient,) = torch.autograd.grad(rows.sum() / divisor, leaf, retain_graph=True)
        options: dict[str, Any] = {
            "draft_to_target": ids, "mask": mask, "weight": weight, "positions": positions,
            "position_decay": 0.8, "backend": any_backend,
        }  # fmt: skip
        found = _found(student, teacher, losses, reduction=reduction, **options)
        _close(found, ((rows.sum() / divisor).detach(), gradient), torch.float32)
        assert not found[1][~mask].any()
    items = _found(student, teacher, losses, num_items=torch.tensor(3.0), **options)
    torch.testing.assert_close(items[0].double(), rows.sum().detach() / 3, rtol=1e-5, atol=1e-6)
    loss, parts = draft_loss(
        student, teacher, losses, reduction="none", return_parts=True, **options
    )
    assert parts.counted == mask.sum() and not loss[~mask].any()
    for name, value in (("acceptance", parts.acceptance), *parts.terms.items()):
        assert not value[~mask].any() and not value.requires_grad
        torch.testing.assert_close(value[mask].double(), terms[name].detach(), rtol=1e-5, atol=1e-6)


def test_speculators_compound_loss() -> None:
    """Its documented sum of terms with DFlash's decay; its divisor is the number of rows plus 1e-5."""
    student, teacher, _ = _logits(7, subset=False)
    student, teacher = student.reshape(1, -1, D), teacher.reshape(1, -1, D)
    position = torch.arange(10).remainder(5).unsqueeze(0)
    mask = torch.arange(10).unsqueeze(0) < 9
    losses, gamma = {"cross_entropy": 0.1, "tvd": 0.9}, 4.0
    decay = torch.exp(-(position - 1).clamp(min=0) / gamma) * (position != 0)

    def theirs(s: Tensor) -> Tensor:
        terms = _terms(s, teacher, None)
        rows = sum(weight * terms[name] for name, weight in losses.items()) * mask * decay
        return rows.sum() / (mask.sum() + 1e-5)

    def ours(s: Tensor) -> Tensor:
        return draft_loss(
            s, teacher, losses, mask=mask & (position != 0), positions=position - 1,
            position_decay=math.exp(-1.0 / gamma), num_items=mask.sum() + 1e-5,
        )  # fmt: skip

    results = []
    for function in (theirs, ours):
        leaf = student.double().requires_grad_()
        loss = function(leaf)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
    torch.testing.assert_close(results[1], results[0])


def test_spec_forge_lk_loss() -> None:
    """Its "alpha" form is the negative log of the acceptance; p of the acceptance is not renormalized."""
    student, teacher, ids = _logits(8)
    assert ids is not None
    acceptance = torch.minimum(student.softmax(-1), teacher.softmax(-1)[..., ids]).sum(-1)
    loss = draft_loss(student, teacher, "nla", draft_to_target=ids)
    torch.testing.assert_close(loss, -acceptance.log().mean())


def test_a_term_of_weight_0_is_measured() -> None:
    student, teacher, ids = _logits(9)
    losses = {"forward_kl": 1.0, **{name: 0.0 for name in LOSSES if name != "forward_kl"}}
    options: dict[str, Any] = {"draft_to_target": ids}
    leaf = student.clone().requires_grad_()
    loss, parts = draft_loss(leaf, teacher, losses, return_parts=True, **options)
    plain = _found(student, teacher, "forward_kl", **options)
    assert torch.equal(loss.detach(), plain[0])
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], plain[1])
    wanted = _terms(student, teacher, ids)
    for name in LOSSES:
        torch.testing.assert_close(parts.terms[name].double(), wanted[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match="losses must have a weight that is not 0; all weights are 0"
    ):
        draft_loss(student, teacher, {"tvd": 0.0}, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_chunks_change_nothing(dtype: torch.dtype) -> None:
    student, teacher, ids = _logits(10, dtype=dtype)
    losses = {"jsd": 0.5, "lk_hybrid": 0.5}
    whole = _found(student, teacher, losses, draft_to_target=ids)
    one_by_one = _found(student, teacher, losses, draft_to_target=ids, memory_budget=3000)
    for found, wanted in zip(one_by_one, whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    with pytest.raises(
        ValueError, match="memory_budget must be at least .* bytes, which one row takes"
    ):
        draft_loss(student, teacher, losses, draft_to_target=ids, memory_budget=2500)


PEAK = """
import ctypes, json, sys
from pathlib import Path
import torch
from fastkd import _C
from fastkd.response import draft_loss
from fastkd.response.draft import LOSSES

def status(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field + ":"))

dtype, subset, budget = json.loads(sys.argv[1])
s, t = (torch.randn(256, n).to(getattr(torch, dtype)) for n in (16_384, 32_768 if subset else 16_384))
ids = torch.randperm(32_768)[:16_384] if subset else None
def step(n):
    leaf, mask = s[:n].clone().requires_grad_(), torch.arange(n) != 1
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    draft_loss(
        leaf, t[:n], dict.fromkeys(LOSSES, 1.0), draft_to_target=ids, mask=mask, memory_budget=budget
    ).backward()
    return status("VmHWM") - before - leaf.grad.nbytes
step(4)
_C.release_idle_outputs()
ctypes.CDLL(None).malloc_trim(0)
print(step(256))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("subset", [True, False])
def test_peak_memory_is_the_budget(dtype: str, subset: bool) -> None:
    budget = 64 << 20
    command = [sys.executable, "-c", PEAK, json.dumps([dtype, subset, budget])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[-1])
    assert peak <= 1.1 * budget, f"{peak / 2**20:.0f} MiB"


def test_no_row() -> None:
    student, teacher, ids = _logits(11)
    mask = torch.zeros(ROWS, dtype=torch.bool)
    for rows in (slice(0, 0), slice(None)):
        leaf = student[rows].clone().requires_grad_()
        loss, parts = draft_loss(
            leaf, teacher[rows], dict.fromkeys(LOSSES, 1.0), draft_to_target=ids, mask=mask[rows],
            return_parts=True,
        )  # fmt: skip
        assert loss == 0 and parts.counted == 0
        assert not torch.autograd.grad(loss, leaf)[0].any()


def test_a_retained_graph_and_no_second_derivative() -> None:
    student, teacher, ids = _logits(12)
    leaf = student.clone().requires_grad_()
    loss = draft_loss(leaf, teacher, "lk_hybrid", draft_to_target=ids)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled(dtype: torch.dtype) -> None:
    student, teacher, ids = _logits(13, dtype=dtype)
    mask = torch.rand(ROWS) < 0.7

    def call(s: Tensor, number: float) -> tuple[Tensor, ...]:
        loss, parts = draft_loss(
            s, teacher, {"tvd": number, "forward_kl": 2.0}, draft_to_target=ids, eta=number,
            mask=mask, positions=torch.arange(5).expand(ROWS), position_decay=number / 4,
            return_parts=True,
        )  # fmt: skip
        return loss, parts.acceptance, *parts.terms.values(), parts.counted

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for number in (2.0, 1.5, 0.5):
        results = []
        for function in (compiled, call):
            leaf = student.clone().requires_grad_()
            loss, *parts = function(leaf, number)
            results.append([loss.detach(), *parts, *torch.autograd.grad(loss, leaf)])
        torch.testing.assert_close(results[0], results[1])


def test_errors_name_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, ids = _logits(14)
    assert ids is not None
    subset = {"draft_to_target": ids}
    calls: list[tuple[Any, dict[str, Any], str]] = [
        ("kl", subset, "losses must be one of forward_kl, .*, nla, lk_hybrid; got 'kl'"),
        ({"tvd": -1.0}, subset, r"losses\['tvd'\] must be in \[0, 1e\+30\], got -1.0"),
        ({}, subset, "losses must have at least one name, got an empty dict"),
        (["tvd"], subset, "losses must be a name or a dict of weights, got list"),
        ("tvd", {}, "student_logits has 37 columns, and teacher has 90; pass draft_to_target"),
        ("tvd", {"draft_to_target": ids[1:]}, r"draft_to_target must be \[37\]"),
        ("tvd", {"draft_to_target": ids.int()}, "draft_to_target must be torch.int64, got torch.int32"),
        ("tvd", subset | {"position_decay": 0.5}, "positions must be given for position_decay; position_decay is 0.5"),
        ("tvd", subset | {"position_decay": 0.0}, r"position_decay must be in \(0, 1\], got 0.0"),
        ("tvd", subset | {"positions": torch.ones(5)}, "positions must be torch.int64"),
        ("tvd", subset | {"eta": -1.0}, "eta must be in"),
        ("tvd", subset | {"mask": torch.ones(ROWS)}, "mask must be torch.bool"),
        ("tvd", subset | {"reduction": "sum", "num_items": 2}, "num_items is the denominator"),
        ("tvd", subset | {"return_parts": None}, "return_parts must be True or False"),
    ]  # fmt: skip
    for losses, options, message in calls:
        with pytest.raises((TypeError, ValueError), match=message):
            draft_loss(student, teacher, losses, **options)
    with pytest.raises(
        ValueError, match="teacher requires grad, and draft_loss has no gradient for it"
    ):
        draft_loss(student, teacher.clone().requires_grad_(), **subset)
    # Repeated or invalid tokens, such as the offsets of a checkpoint.
    for wrong in (ids.clone().index_fill_(0, torch.tensor(1), int(ids[0])), ids - 1000, ids + 1000):
        assert draft_loss(student, teacher, draft_to_target=wrong).isnan()
    monkeypatch.setenv("FASTKD_CHECK", "1")
    with pytest.raises(ValueError, match=r"draft_to_target must be distinct tokens in \[0, 90\)"):
        draft_loss(student, teacher, draft_to_target=ids - 1000)


# ---- the kernels that compute all terms in one visit to a row


class Kernel(NamedTuple):
    """A kernel under test."""

    backend: str
    block: int  # columns that it processes together

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """Draft tokens and target columns: one column; a part of a block; a block and one more column; several."""
        part = max(self.block // 100, 5)
        several = 2 * self.block + part
        return (1, 1), (part, 2 * part), (self.block + 1, self.block + part), (several, 2 * several)


# Blocks of 2048 columns in C++; tiles of 16 in Triton, because its interpreter is slow, and of two warps in its PTX.
KERNELS = {name: Kernel("cpu", 2048) for name in _instruction_sets()}
KERNELS |= {name: Kernel(name, 64 if PTX else 16) for name in INTERPRETED}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """The kernel of the cpu backend with each instruction set, and Triton's."""
    tested = KERNELS[request.param]
    if tested.backend == "cpu":
        request.getfixturevalue("instructions_of")(request.param)
        yield tested
        return
    from support.triton_interpreter import corrected

    from fastkd.kernels import draft

    monkeypatch.setattr(draft, "tile", lambda *row: (tested.block, 2 if PTX else 1))
    with corrected():
        yield tested


@pytest.fixture
def instructions_of() -> Iterator[Any]:
    """A function that chooses an instruction set until the end of the test."""
    from fastkd import _C

    before = _C.instruction_set()
    yield _C.use_instruction_set
    _C.use_instruction_set(before)


def _wide_rows(
    seed: int, widths: tuple[int, int], spread: float, near: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of these widths. near: the distance of the draft model from its target; None: they are independent."""
    generator = torch.Generator().manual_seed(seed)
    size, vocabulary = widths
    teacher = spread * torch.randn(4, vocabulary, generator=generator)
    ids = torch.randperm(vocabulary, generator=generator)[:size]
    student = spread * torch.randn(4, size, generator=generator)
    if near is not None:
        student = teacher[:, ids] + near * student / spread
    return student, teacher, ids


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("cut", [True, False])
def test_errors_are_those_of_float32(kernel: Kernel, number: int, cut: bool) -> None:
    """Of each term, the acceptance and the gradient, beside the error of the formulas in float32."""
    # The interpreter is slow: one distribution per width.
    distributions = ((2.0, None), (2.0, 0.05), (12.0, None), (30.0, 0.1))
    if kernel.backend == "triton":
        distributions = distributions[number : number + 1]
    for spread, near in distributions:
        student, teacher, ids = _wide_rows(1, kernel.widths[number], spread, near)
        columns: Tensor | None = ids
        if cut:
            teacher, columns = teacher[:, ids], None
        exact = _terms(student, teacher, columns)
        options: dict[str, Any] = {
            "draft_to_target": columns, "reduction": "none", "backend": kernel.backend
        }  # fmt: skip
        for name in LOSSES:
            if name == "nla":  # of which low acceptances are tested above
                continue
            leaf = student.clone().requires_grad_()
            loss, parts = draft_loss(leaf, teacher, name, return_parts=True, **options)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            loss = loss.detach()
            wanted = _wanted(student, teacher, columns, {name: 1.0})
            size = wanted[0].abs().amax()
            assert (loss - wanted[0]).abs().amax() <= 5e-7 + 2e-6 * size, (spread, near, name)
            # A difference of probabilities near 1 has an error of one rounding.
            scale = wanted[1].norm(dim=-1) + 1e-2
            assert ((gradient - wanted[1]).norm(dim=-1) <= 3e-5 * scale).all(), (spread, near, name)
        right = exact["acceptance"]
        # Triton rounds the exponents of base 2: by 1e-6 where a probability is 1e-8.
        bar = 2e-6 if kernel.backend == "triton" else 1e-6
        assert ((parts.acceptance - right).abs() <= bar * right + 1e-30).all()


@pytest.mark.heavy_with(kernel="triton", dtype=torch.float32)
@pytest.mark.heavy_with(kernel="triton", dtype=torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sure_draft_model_keeps_the_digits_of_its_gradient(
    kernel: Kernel, dtype: torch.dtype
) -> None:
    """A column with almost all of q: q - p there is a difference of 1e-6, of which a difference of floats has none."""
    student, teacher, ids = _wide_rows(2, kernel.widths[2], 0.5, None)
    size = 24.0 if kernel.backend == "cpu" else 20.0  # with fewer other columns
    student[:, 7], teacher[:, ids[7]] = size, size + 1.0
    student, teacher = student.to(dtype), teacher.to(dtype)
    for name in ("forward_kl", "cross_entropy", "jsd", "reverse_kl"):
        for columns, target in ((ids, teacher), (None, teacher[:, ids])):
            options = {"draft_to_target": columns, "reduction": "none", "backend": kernel.backend}
            found = _found(student, target, name, **options)[1]
            wanted = _wanted(student, target, columns, {name: 1.0})[1]
            assert 0 < wanted[:, 7].abs().max() < 1e-4
            rtol = 1e-4 + torch.finfo(dtype).eps
            # The smallest numbers of float16 are 6e-8 apart.
            atol = 6e-8 if dtype == torch.float16 else 1e-12
            torch.testing.assert_close(found[:, 7].double(), wanted[:, 7], rtol=rtol, atol=atol)


def test_log_0(kernel: Kernel) -> None:
    """Logits of -inf on either side and on both, in blocks of their own and beside others."""
    width = kernel.widths[3][0]
    student, teacher, _ = _wide_rows(3, (width, width), 2.0, None)
    options: dict[str, Any] = {"backend": kernel.backend}
    student[0, : 2 * width // 3] = -math.inf  # the KL is infinite
    teacher[1, : 2 * width // 3] = -math.inf  # the reverse KL is infinite
    student[2, 9 : width - 4] = teacher[2, 9 : width - 4] = -math.inf
    student[3, 5], teacher[3, 5] = -math.inf, -200.0  # p is negligible there
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    middle = 0.5 * (p + q)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        terms = torch.where((a == 0) | ((b == 0) & (a < 1e-30)), 0.0, a * (a / b).log())
        return terms.sum(-1)

    exact = {
        "forward_kl": kl(p, q), "reverse_kl": kl(q, p),
        "jsd": 0.5 * (kl(p, middle) + kl(q, middle)), "tvd": 0.5 * (p - q).abs().sum(-1),
    }  # fmt: skip
    assert exact["forward_kl"][0] == exact["reverse_kl"][1] == math.inf
    assert exact["forward_kl"][3].isfinite()
    for name, value in exact.items():
        loss, gradient = _found(student, teacher, name, reduction="none", **options)
        torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=1e-6)
        assert gradient[value.isfinite()].isfinite().all()
        assert not gradient[2, 9 : width - 4].any() and not gradient[3, 5]
    _, parts = draft_loss(
        student, teacher, {"tvd": 1.0, "forward_kl": 0.0, "reverse_kl": 0.0}, return_parts=True,
        **options,
    )  # fmt: skip
    for name, value in parts.terms.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-6, atol=1e-6)
    _, gradient = _found(
        student, teacher, {"tvd": 1.0, "reverse_kl": 0.0}, reduction="sum", **options
    )
    assert gradient.isfinite().all()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_and_rows_without_probability(kernel: Kernel, side: str) -> None:
    student, teacher, ids = _wide_rows(4, kernel.widths[2], 1.0, None)
    changed = student if side == "student" else teacher
    options: dict[str, Any] = {
        "draft_to_target": ids, "reduction": "none", "backend": kernel.backend
    }  # fmt: skip
    clean = draft_loss(student, teacher, "tvd", **options)
    changed[1, int(ids[3]) if side == "teacher" else 3] = math.nan
    changed[2] = -math.inf
    for name in LOSSES:
        loss = draft_loss(student, teacher, name, **options)
        assert loss[[1, 2]].isnan().all() or (
            name in ("tvd", "nla", "cross_entropy") and loss[1].isnan()
        ), name
        assert loss[[0, 3]].isfinite().all()
        if name == "tvd":
            assert torch.equal(loss[[0, 3]], clean[[0, 3]])


def test_layouts_of_logits(kernel: Kernel) -> None:
    """Transposed, shifted, expanded and negated logits, and one-byte-aligned rows."""
    size, width = 2 * kernel.widths[1][0], 3 * kernel.widths[1][1]
    student, teacher, ids = _wide_rows(5, (size, width), 1.0, None)
    options: dict[str, Any] = {
        "draft_to_target": ids, "reduction": "none", "backend": kernel.backend
    }  # fmt: skip
    losses = dict.fromkeys(LOSSES, 1.0)
    wanted = _found(student, teacher, losses, **options)
    sequence = torch.randn(1, 5, size + 1)
    sequence[0, :-1, :-1] = student
    negated = torch.complex(torch.zeros_like(teacher), -teacher).conj().imag
    assert negated.is_neg()
    for s, t in (
        (sequence[0, :-1, :-1], teacher),
        (student.T.contiguous().T, teacher.T.contiguous().T),
        (student, negated),
    ):
        torch.testing.assert_close(_found(s, t, losses, **options), wanted, rtol=1e-6, atol=1e-7)
    one = _found(student[:1].expand(3, -1), teacher[:1].expand(3, -1), losses, **options)
    torch.testing.assert_close(one[0], wanted[0][:1].expand(3))


def test_of_equal_target_logits_the_first_is_the_label(kernel: Kernel) -> None:
    width = kernel.widths[3][0]
    student, teacher, _ = _wide_rows(7, (width, width), 1.0, None)
    for row, columns in enumerate(((3, 4), (3, 3 + kernel.block), (0, width - 1))):
        teacher[row, list(columns)] = 9.0
    found = draft_loss(student, teacher, "cross_entropy", reduction="none", backend=kernel.backend)
    wanted = -student.double().log_softmax(-1)
    for row, label in enumerate((3, 3, 0)):
        assert found[row].item() == pytest.approx(wanted[row, label].item(), rel=1e-6)


def test_the_gradient_in_place_of_logits_in_another_order(kernel: Kernel) -> None:
    student, teacher, ids = _wide_rows(9, kernel.widths[1], 1.0, None)
    wanted = _wanted(student, teacher, ids, {"forward_kl": 1.0})[1]
    columns_first = student.T.contiguous().T
    options = Options(fastkd.forward_kl(), vocab_size=student.shape[-1])
    terms = Terms({"forward_kl": 1.0}, 3.0, ids, measured=False)
    result = registry.load(kernel.backend).draft_rows(
        columns_first, teacher, Rows(), options, terms, Want(True, inplace=True)
    )
    assert result.student_gradient is columns_first
    torch.testing.assert_close(columns_first.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.heavy
@pytest.mark.only_where(lambda any_backend: any_backend in ("cpu", "triton"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(32_000, 128_256), (50_257, 50_257)])
def test_real_vocabularies(any_backend: str, widths: tuple[int, int], dtype: torch.dtype) -> None:
    """With the tiles that are shipped, aligned and not; the second row is sure of a column."""
    generator = torch.Generator().manual_seed(10)
    size, width = widths
    teacher = 3.0 * torch.randn(2, width, generator=generator)
    ids = None
    if size < width:
        ids = torch.randperm(width, generator=generator)[:size].sort().values
    student = teacher if ids is None else teacher[:, ids]
    student = student + torch.randn(2, size, generator=generator)
    student[1, 7] += 30.0
    student, teacher = student.to(dtype), teacher.to(dtype)
    losses = {name: 0.5 + k for k, name in enumerate(LOSSES)}
    wanted = _wanted(student, teacher, ids, losses)
    options: dict[str, Any] = {"draft_to_target": ids, "reduction": "none", "backend": any_backend}
    leaf = student.clone().requires_grad_()
    loss, parts = draft_loss(leaf, teacher, losses, return_parts=True, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    exact = _terms(student, teacher, ids)
    torch.testing.assert_close(loss.detach().double(), wanted[0], rtol=1e-6, atol=1e-6)
    for name, value in (("acceptance", parts.acceptance), *parts.terms.items()):
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-6, atol=1e-6)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    error = (gradient - wanted[1]).norm(dim=-1)
    assert (error <= (2e-7 + rounding) * wanted[1].norm(dim=-1)).all()


def test_threads_and_parts_change_no_bit(threads: None, instructions: str) -> None:
    student, teacher, ids = _wide_rows(6, (4500, 9000), 2.0, None)
    losses = dict.fromkeys(LOSSES, 1.0)
    options: dict[str, Any] = {"draft_to_target": ids, "reduction": "none"}
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(_found(student, teacher, losses, **options))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    measured = draft_loss(student, teacher, losses, return_parts=True, **options)[0]
    assert torch.equal(measured, results[0][0])
