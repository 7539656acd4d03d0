"""The portable backend: pieces of rows, definitions without fresh memory, and what it asks a device for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accuracy import labels_for, logits
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastkd
from fastkd import divergences, kd_loss
from fastkd.backends import portable
from fastkd.call.contract import Options, Rows, Want
from fastkd.core import pieces
from fastkd.divergences import DEFINITIONS

NAN, INF = torch.nan, torch.inf
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "labels": {"alpha": 0.4, "labels": True, "label_smoothing": 0.1, "temperature": 2.0},
    "mask and weight": {"mask": True, "weight": True, "divergence": "jsd"},
    "temperatures": {"temperature": True, "teacher_temperature": 0.7, "divergence": "hellinger"},
    "softcap": {"softcap": 9.0, "teacher_logit_scale": -0.5, "vocab_size": 90, "divergence": "tvd"},
    "label apart": {"divergence": "dkd", "labels": True},
    "label at temperature 1": {"divergence": "nkd", "labels": True, "alpha": 0.7, "temperature": 3.0},
    "logits": {"divergence": "smooth_l1", "labels": True, "alpha": 0.5},
    "sparse": {"topk": True, "labels": True, "alpha": 0.4, "softcap": 9.0},
}  # fmt: skip


def _results(call: dict[str, Any], backend: str = "portable", **changes: Any) -> list[Tensor]:
    """Loss per row, parts and gradients of a call on 7 rows of 99 columns, one of them with -inf on one side."""
    arguments = call | changes
    dtype = arguments.pop("dtype", torch.float32)
    student, teacher = (logits(7, 99, seed=seed).to(dtype).requires_grad_() for seed in (1, 2))
    if arguments.pop("infinite", False):
        student.data[3, 5] = -INF
        teacher.data[3, 5:8] = -INF
    generator = torch.Generator().manual_seed(3)
    for name in ("weight", "temperature"):
        if arguments.get(name) is True:
            arguments[name] = torch.rand(7, generator=generator) + 0.5
    if arguments.pop("labels", False):
        arguments["labels"] = labels_for(7, vocabulary=90, seed=4, ignored=0.4)
    if "mask" in arguments:
        arguments["mask"] = torch.tensor([True, False, True, True, False, False, True])
    target: Any = teacher
    if arguments.pop("topk", False):
        target = fastkd.TopK.from_logits(teacher.detach(), 5)
    elif fastkd.divergences.resolve(arguments.get("divergence", "forward_kl")).degree is None:
        target = teacher.detach()
    loss, parts = kd_loss(
        student, target, backend=backend, reduction="none", return_parts=True, **arguments
    )
    leaves = [student, *([teacher] if target is teacher else [])]
    upstream = torch.linspace(-1.0, 2.0, 7, dtype=loss.dtype)
    return [loss.detach(), *parts[:3], *torch.autograd.grad(loss, leaves, upstream)]


def _assert_close(found: list[Tensor], wanted: list[Tensor], close: float) -> None:
    for value, right in zip(found, wanted, strict=True):
        scale = right.abs().nan_to_num(0.0, 0.0).max().clamp(min=1e-3).item()
        torch.testing.assert_close(value, right, rtol=close, atol=close * scale, equal_nan=True)


@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_pieces_of_any_size(name: str, infinite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results equal the float64 oracle's to the last digits, however the rows are divided into pieces."""
    call = CALLS[name] | {
        "dtype": torch.float64,
        "infinite": infinite and "topk" not in CALLS[name],
    }
    wanted = _results(call, "reference")
    for rows in (1, 3, 7, 100):
        monkeypatch.setattr(pieces, "PIECE_CPU", rows * 99 * 8 // torch.get_num_threads() + 8)
        _assert_close(_results(call), wanted, 1e-12)


@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_other_devices_are_not_synchronized(
    name: str, infinite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of other devices, run on the CPU, reads no number of a tensor and gives the same results."""
    call = CALLS[name] | {"infinite": infinite and "topk" not in CALLS[name]}
    wanted = _results(call)
    monkeypatch.setattr(portable, "_synchronizes", lambda device: True)
    with monkeypatch.context() as patched:
        for asking in ("item", "__bool__", "nonzero"):

            def forbidden(*_: Any, asking: str = asking) -> Any:
                raise AssertionError(f"{asking} waits for the device")

            patched.setattr(Tensor, asking, forbidden)
        actual = _results(call)
    _assert_close(actual, wanted, 2e-5)


def _made(function: Any) -> fastkd.Divergence:
    named = [make() for make in fastkd.DIVERGENCES.values()]
    named += [fastkd.alpha_beta(*pair) for pair in ((-0.5, 0.7), (0.4, 0), (0, 0.4), (0.3, -0.3))]
    named += [fastkd.jsd(0.1), fastkd.skew_forward_kl(0.6)]
    named += [fastkd.mixture(clip=0.01), fastkd.jsd(clip=0.01), fastkd.forward_kl(floor=-5.0)]
    return next(divergence for divergence in named if divergence.function is function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", DEFINITIONS, ids=lambda function: function.__name__)
def test_definitions_in_buffers(function: Any, dtype: torch.dtype) -> None:
    """A definition gives the same results in the buffers of a piece as when it is called directly."""
    divergence = _made(function)
    log_p, log_q = (logits(4, 50, seed=seed).to(dtype).log_softmax(-1) for seed in (5, 6))
    log_p[:, :9] = log_q[:, :9]  # values at the limits of the conditions
    ratio = log_p - log_q
    params = divergence.params
    if function is divergences._skew_forward_kl:
        params = fastkd.skew_forward_kl(0.6).params
    entry = divergences.arguments_of(function, log_p.exp(), log_q.exp(), log_p, log_q, ratio)
    wanted = [term.to(dtype) for term in function(*entry, *params)]
    before = [tensor.clone() for tensor in entry[:2]]
    scratch = portable._Scratch(4, 50, dtype, ratio.device)
    actual = portable._applied(fastkd.Divergence(divergence.name, function, params), entry, scratch)
    close = 64 * torch.finfo(dtype).eps
    for term, right in zip(actual, wanted, strict=True):
        torch.testing.assert_close(term, right, rtol=close, atol=close)
    # The probabilities are unchanged, and the results share no memory.
    assert all(torch.equal(*pair) for pair in zip(entry[:2], before, strict=True))
    inputs = {tensor.data_ptr() for tensor in entry[:2]}
    assert len(inputs | {term.data_ptr() for term in actual}) == len(inputs) + len(actual)


@pytest.mark.parametrize("columns", [1, 511, 512 * 4, 512 * 4 + 1, 512 * 5 + 37])
def test_largest_column(columns: int) -> None:
    z = logits(6, columns, seed=7)
    z[1, -1], z[2, 0] = 99.0, 99.0
    z[3], z[4] = -INF, NAN
    z[5, columns // 2] = NAN
    top, seat = portable._largest(z)
    torch.testing.assert_close(top, z.amax(-1, keepdim=True), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(z.gather(-1, seat), top, rtol=0, atol=0, equal_nan=True)


def _theirs(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy; g is an argument, and phi of another dtype."""
    return (-p * log_q).double(), p


def test_a_definition_that_returns_its_arguments() -> None:
    minus = fastkd.Divergence("theirs", _theirs)
    student, teacher = logits(5, 40, seed=8), logits(5, 40, seed=9)
    results = []
    for backend in ("portable", "reference"):
        leaf = student.clone().requires_grad_()
        loss = kd_loss(leaf * 1.0, teacher, divergence=minus, backend=backend)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
    _assert_close(*results, 1e-6)


class _Live(TorchDispatchMode):
    """The peak of the bytes of tensors that were made inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        self.held = {key: pair for key, pair in self.held.items() if not pair[0].expired()}
        inputs = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                storage = tensor.untyped_storage()
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return made


@pytest.mark.parametrize("name", [*fastkd.DIVERGENCES, "everything"])
def test_memory_of_a_piece(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In addition to the gradients, a call holds at most what the plan says: a few rows."""
    student, teacher, labels = logits(96, 500, seed=1), logits(96, 500, seed=2), torch.arange(96)
    monkeypatch.setattr(pieces, "PIECE_CPU", 4 * 500 * 4 // torch.get_num_threads() + 4)
    options = Options(fastkd.divergences.resolve("forward_kl"), vocab_size=500)
    want = Want(student_gradient=True)
    if name == "everything":
        options = options._replace(
            divergence=fastkd.dkd(),
            alpha=0.5,
            label_smoothing=0.1,
            softcap=9.0,
            teacher_softcap=9.0,
        )
        want = Want(True, True, True)
    else:
        options = options._replace(divergence=fastkd.DIVERGENCES[name]())
    rows = Rows(labels=labels)
    with _Live() as live:
        portable.kd_rows(student, teacher, rows, options, want)
    gradients = (1 + want.teacher_gradient) * student.nbytes
    assert gradients <= live.peak
    small = 96 * 500 * 4 // 8  # per-row numbers
    bound = pieces.piece_bytes(500, torch.float32, "cpu")
    assert live.peak - gradients <= bound + small, (
        (live.peak - gradients) / bound * pieces.PIECE_TEMPORARIES
    )
    assert bound < student.nbytes


@pytest.mark.parametrize("divergence", [*fastkd.DIVERGENCES])
def test_a_row_does_not_depend_on_its_neighbours(divergence: str) -> None:
    """One piece has ordinary rows and rows with NaN, with -inf, and with logits far from the other model's."""
    made = fastkd.DIVERGENCES[divergence]()
    student, teacher = logits(6, 99, seed=10), logits(6, 99, seed=11)
    student[1] += 40.0
    student[2, 7:9] = teacher[2, 8:10] = -INF
    student[4, 3] = NAN
    teacher[5, 3] = INF

    def results(rows: slice) -> list[Tensor]:
        s = student[rows].clone().requires_grad_()
        t = teacher[rows].clone().requires_grad_(made.degree is not None)
        labels = {} if made.target is None else {"labels": torch.arange(6)[rows]}
        loss = kd_loss(s, t, divergence=made, reduction="none", backend="portable", **labels)
        leaves = [s, t] if t.requires_grad else [s]
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    together = results(slice(None))
    for number in range(6):
        alone = results(slice(number, number + 1))
        for value, right in zip(together, alone, strict=True):
            torch.testing.assert_close(value[number], right[0], rtol=0, atol=0, equal_nan=True)
