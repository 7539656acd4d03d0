"""What kd_loss promises at the edges: messages for bad inputs, empty batches, and bad values on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.accuracy import logits
from support.options import TRIED
from torch import Tensor

import fastkd
from fastkd import kd_loss

NAMES = ", ".join([*fastkd.DIVERGENCES, "dkd", "nkd"])
META = torch.device("meta")


def _labels(*values: int) -> Tensor:
    return torch.tensor(values)


# For each case: what differs from a valid call of 3 rows by 7 columns, the expected error, and its whole message.
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    # The logits
    ({"student_logits": [[1.0]]}, TypeError, "student_logits must be a tensor of logits, got list"),
    ({"teacher": None}, TypeError,
     "teacher must be a tensor of logits, a fastkd.TopK, a fastkd.LinearTeacher, a fastkd.Ensemble or a "
     "fastkd.RoutedTeacher; got NoneType"),
    (
        {"student_logits": torch.ones(3, 7, dtype=torch.int64)},
        TypeError,
        "student_logits must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    (
        {"teacher": torch.ones(3, 7, dtype=torch.complex64)},
        TypeError,
        "teacher must be float32, bfloat16, float16 or float64, got torch.complex64",
    ),
    (
        {"student_logits": torch.tensor(1.0)},
        ValueError,
        "student_logits must have a vocabulary dimension, got shape ()",
    ),
    (
        {"teacher": torch.ones(2, 7)},
        ValueError,
        "teacher must have the leading shape of student_logits, (3,); got (2,)",
    ),
    (
        {"teacher": torch.ones(1, 3, 7)},
        ValueError,
        "teacher must have the leading shape of student_logits, (3,); got (1, 3)",
    ),
    (
        {"teacher": torch.ones(3, 7, device=META)},
        ValueError,
        "teacher must be on cpu, where student_logits is; got meta",
    ),
    # The vocabulary
    (
        {"teacher": torch.ones(3, 9)},
        ValueError,
        "student_logits has 7 columns, teacher has 9 columns; if the models have one tokenizer and the extra columns "
        "are padding, pass vocab_size (at most 7), the number of real tokens",
    ),
    ({"vocab_size": 8}, ValueError, "vocab_size must be in [1, 7], the narrowest of the widths; got 8"),
    ({"vocab_size": 0}, ValueError, "vocab_size must be in [1, 7], the narrowest of the widths; got 0"),
    (
        {"teacher": torch.ones(3, 5), "vocab_size": 6},
        ValueError,
        "vocab_size must be in [1, 5], the narrowest of the widths; got 6",
    ),
    ({"vocab_size": 7.0}, TypeError, "vocab_size must be an int, got float"),
    (
        {"student_logits": torch.ones(3, 0), "teacher": torch.ones(3, 0)},
        ValueError,
        "student_logits must have a vocabulary dimension, got shape (3, 0)",
    ),
    # The divergence
    ({"divergence": "kl"}, ValueError, f"divergence must be one of {NAMES}; got 'kl'"),
    ({"divergence": fastkd.jsd}, TypeError, "divergence must be a name or a fastkd.Divergence, got function"),
    # Temperatures
    ({"inplace": 1}, TypeError, "inplace must be True or False, got int"),
    (
        {"num_items": torch.tensor(True)},
        TypeError,
        "num_items must be a real number, got torch.bool",
    ),
    (
        {"student_logits": torch.ones(3, 7).to_sparse()},
        TypeError,
        "student_logits must be dense, got a tensor of layout torch.sparse_coo",
    ),
    (
        {"temperature": torch.ones(2)},
        ValueError,
        "temperature must have one value a row, shape (3,); got (2,)",
    ),
    (
        {"teacher_temperature": torch.ones(3, 1)},
        ValueError,
        "teacher_temperature must have one value a row, shape (3,); got (3, 1)",
    ),
    (
        {"temperature": torch.ones(3, dtype=torch.int64)},
        TypeError,
        "temperature must be torch.float32 or torch.bfloat16 or torch.float16 or torch.float64, got torch.int64",
    ),
    (
        {"temperature": torch.ones(3, requires_grad=True)},
        ValueError,
        "temperature requires grad, and kd_loss has no gradient for it; detach it",
    ),
    (
        {"temperature": torch.ones(3, device=META)},
        ValueError,
        "temperature must be on cpu, where the student is; got meta",
    ),
    # Labels
    ({"labels": _labels(1, 2)}, ValueError, "labels must have one value a row, shape (3,); got (2,)"),
    ({"labels": _labels(1, 2, 3).int()}, TypeError, "labels must be torch.int64, got torch.int32"),
    ({"labels": torch.ones(3)}, TypeError, "labels must be torch.int64, got torch.float32"),
    ({"labels": [1, 2, 3]}, TypeError, "labels must be a tensor, got list"),
    (
        {"labels": torch.ones(3, dtype=torch.int64, device=META)},
        ValueError,
        "labels must be on cpu, where the student is; got meta",
    ),
    # Rows
    ({"mask": torch.ones(3)}, TypeError, "mask must be torch.bool, got torch.float32"),
    ({"mask": torch.ones(3, 7, dtype=torch.bool)}, ValueError,
     "mask must have one value a row, shape (3,); got (3, 7)"),
    ({"mask": [True, False, True]}, TypeError, "mask must be a tensor, got list"),
    (
        {"weight": torch.ones(3, dtype=torch.int64)},
        TypeError,
        "weight must be torch.float32 or torch.bfloat16 or torch.float16 or torch.float64, got torch.int64",
    ),
    ({"weight": 0.5}, TypeError, "weight must be a tensor, got float"),
    (
        {"weight": torch.ones(3, requires_grad=True)},
        ValueError,
        "weight requires grad, and kd_loss has no gradient for it; detach it",
    ),
    ({"weight": torch.ones(4)}, ValueError, "weight must have one value a row, shape (3,); got (4,)"),
    # The reduction
    ({"reduction": "avg"}, ValueError, "reduction must be one of none, sum, mean, batchmean; got 'avg'"),
    ({"reduction": None}, ValueError, "reduction must be one of none, sum, mean, batchmean; got None"),
    (
        {"reduction": "sum", "num_items": 4},
        ValueError,
        "num_items is the denominator of 'mean' and 'batchmean'; reduction is 'sum'",
    ),
    ({"num_items": 0}, ValueError, "num_items must be positive, got 0"),
    ({"num_items": -3}, ValueError, "num_items must be positive, got -3"),
    ({"num_items": math.nan}, ValueError, "num_items must be positive, got nan"),
    ({"num_items": "4"}, TypeError, "num_items must be a number or a tensor, got str"),
    (
        {"num_items": torch.ones(2)},
        ValueError,
        "num_items must be a number or a tensor of one element, got (2,) torch.float32",
    ),
    (
        {"num_items": torch.tensor(4.0, requires_grad=True)},
        ValueError,
        "num_items requires grad, and kd_loss has no gradient for it; detach it",
    ),
    (
        {"num_items": torch.tensor(4.0, device=META)},
        ValueError,
        "num_items must be on cpu or the CPU, got meta",
    ),
    (
        {"student_logits": torch.ones(7), "teacher": torch.ones(7), "reduction": "batchmean"},
        ValueError,
        "reduction='batchmean' divides by the first dimension; the student has one row only",
    ),
    # The scalar options
    *(({name: value}, kind, message) for name, tried in TRIED.items() for value, kind, message in tried.invalid),
]  # fmt: skip


def _case(bad: tuple[dict[str, Any], type[Exception], str]) -> str:
    return "; ".join(
        f"{name}={tuple(value.shape)} {value.dtype}"
        if isinstance(value, Tensor)
        else f"{name}={getattr(value, '__name__', repr(value))}"  # a function's repr would contain its address
        for name, value in bad[0].items()
    )


@pytest.mark.parametrize("bad", BAD, ids=_case)
def test_bad_inputs(any_backend: str, bad: tuple[dict[str, Any], type[Exception], str]) -> None:
    difference, kind, message = bad
    call: dict[str, Any] = {
        "student_logits": logits(3, 7, seed=1),
        "teacher": logits(3, 7, seed=2),
    } | difference
    with pytest.raises(kind) as error:
        kd_loss(**call, backend=any_backend)
    assert str(error.value) == message
    assert type(error.value) is kind


def test_options_are_keyword_only(any_backend: str) -> None:
    student, teacher = logits(3, 7, seed=1), logits(3, 7, seed=2)
    with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments but 4"):
        kd_loss(student, teacher, None, 2.0, backend=any_backend)  # type: ignore[misc]


# Values that only the device knows


@pytest.mark.parametrize("label", [-1, 7, 8, -(2**40), 2**40])
def test_a_label_out_of_range_makes_its_row_nan(any_backend: str, label: int) -> None:
    """The label is not used as an index, and no other row changes; columns of padding are out of range too."""
    student = logits(3, 9, seed=3).requires_grad_()
    labels = torch.tensor([2, label, 6])
    call: dict[str, Any] = {
        "alpha": 0.5,
        "vocab_size": 7,
        "reduction": "none",
        "backend": any_backend,
    }
    loss = kd_loss(student, logits(3, 9, seed=4), labels, **call)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient[1, :7].isnan().all() and gradient[::2].isfinite().all()
    good = kd_loss(student[::2], logits(3, 9, seed=4)[::2], labels[::2], **call)
    assert torch.equal(loss[::2], good)
    # Where the label is not a target, it only decides whether the row is dropped.
    assert kd_loss(
        student, logits(3, 9, seed=4), labels, vocab_size=7, backend=any_backend
    ).isfinite()


@pytest.mark.parametrize("form", ["dense", *fastkd.teachers.TAILS])
def test_an_invalid_label_makes_every_part_nan(any_backend: str, form: str) -> None:
    _check_invalid_labels(kd_loss, any_backend, form)


@pytest.mark.parametrize("form", ["dense", "bucket"])
def test_an_invalid_label_in_a_graph_makes_every_part_nan(form: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    _check_invalid_labels(compiled, "auto", form)


def _check_invalid_labels(call: Any, backend: str, form: str) -> None:
    student, teacher = logits(4, 9, seed=5), logits(4, 9, seed=6)
    labels = torch.tensor([2, 11, -100, -3])
    given = teacher if form == "dense" else fastkd.TopK.from_logits(teacher, 4, tail=form)
    options: dict[str, Any] = {"return_parts": True, "reduction": "none", "backend": backend}
    for alpha in (0.5, 0.0):
        loss, parts = call(student, given, labels, alpha=alpha, **options)
        for value in (loss, *parts[:3]):
            assert value.isnan().tolist() == [False, True, False, True]
            assert value[2] == 0
    # Where the label is not a target, the parts are those of any other label.
    _, parts = call(student, given, labels, alpha=1.0, **options)
    _, valid = call(
        student, given, labels.clamp(max=8).where(labels != -3, 0), alpha=1.0, **options
    )
    for value, right in zip(parts, valid, strict=True):
        assert torch.equal(value, right)


@pytest.mark.parametrize("which", ["temperature", "teacher_temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_makes_its_row_nan(
    any_backend: str, which: str, value: float
) -> None:
    student, teacher = logits(3, 7, seed=5).requires_grad_(), logits(3, 7, seed=6)
    call: dict[str, Any] = {
        which: torch.tensor([2.0, value, 1.0]),
        "reduction": "none",
        "backend": any_backend,
    }
    loss = kd_loss(student, teacher, **call)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all() and gradient[::2].isfinite().all()


CHECKED: list[tuple[dict[str, Any], str]] = [
    (
        {"labels": _labels(1, 7, -3), "alpha": 0.5},
        "labels must be in [0, 7) or ignore_index (-100); row 1 has 7",
    ),
    (
        {"labels": _labels(-100, 0, -3), "alpha": 0.5},
        "labels must be in [0, 7) or ignore_index (-100); row 2 has -3",
    ),
    (
        {"labels": _labels(5, 0, 4), "alpha": 0.5, "vocab_size": 5},
        "labels must be in [0, 5) or ignore_index (-100); row 0 has 5",
    ),
    ({"temperature": torch.tensor([1.0, 2.0, 0.0])}, "temperature must be positive; row 2 has 0.0"),
    (
        {"teacher_temperature": torch.tensor([1.0, -2.0, 0.0])},
        "teacher_temperature must be positive; row 1 has -2.0",
    ),
    (
        {"temperature": torch.tensor([math.nan, 1.0, 1.0])},
        "temperature must be positive; row 0 has nan",
    ),
]


@pytest.mark.parametrize(("difference", "message"), CHECKED)
def test_fastkd_check_names_the_value(
    any_backend: str, difference: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = logits(3, 7, seed=7), logits(3, 7, seed=8)
    assert kd_loss(student, teacher, **difference, backend=any_backend).isnan()
    monkeypatch.setenv("FASTKD_CHECK", "1")
    with pytest.raises(ValueError) as error:
        kd_loss(student, teacher, **difference, backend=any_backend)
    assert str(error.value) == message


def test_fastkd_check_ignores_dropped_rows(
    any_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTKD_CHECK", "1")
    student, teacher = logits(3, 7, seed=9), logits(3, 7, seed=10)
    kd_loss(student, teacher, _labels(1, -100, 6), alpha=0.5, backend=any_backend)
    kd_loss(student, teacher, _labels(1, 99, 6), backend=any_backend)  # no target
    mask = torch.tensor([True, False, True])
    kd_loss(student, teacher, _labels(1, 99, 6), mask=mask, alpha=0.5, backend=any_backend)
    kd_loss(
        student, teacher, temperature=torch.tensor([1.0, -1.0, 1.0]), mask=mask, backend=any_backend
    )


# No row that counts


def _batches_without_counted_rows() -> dict[str, Callable[[], dict[str, Any]]]:
    def rows(n: int, **options: Any) -> dict[str, Any]:
        return {
            "student_logits": logits(n, 7, seed=11),
            "teacher": logits(n, 7, seed=12),
            **options,
        }

    ignored = torch.full((3,), -100)
    return {
        "no rows": lambda: rows(0),
        "no rows, with everything": lambda: rows(
            0, labels=ignored[:0], mask=torch.ones(0, dtype=torch.bool), weight=torch.ones(0),
            temperature=torch.ones(0), alpha=0.5,
        ),
        "no rows of a batch": lambda: {
            "student_logits": torch.ones(2, 0, 7), "teacher": torch.ones(2, 0, 7),
        },
        "ignored": lambda: rows(3, labels=ignored),
        "ignored, hard labels": lambda: rows(3, labels=ignored, alpha=0.25, label_smoothing=0.1),
        "masked": lambda: rows(3, mask=torch.zeros(3, dtype=torch.bool)),
        "ignored or masked": lambda: rows(
            3, labels=_labels(-100, 2, -100), mask=torch.tensor([True, False, True]), alpha=0.5,
        ),
        "weight 0": lambda: rows(3, weight=torch.zeros(3)),
        "NaN": lambda: {
            "student_logits": torch.full((3, 7), torch.nan), "teacher": torch.full((3, 7), torch.nan),
            "labels": ignored,
        },
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", _batches_without_counted_rows().values(), ids=_batches_without_counted_rows()
)
def test_a_batch_without_a_counted_row_has_loss_0(
    any_backend: str, case: Callable[[], dict[str, Any]], dtype: torch.dtype
) -> None:
    """The loss is 0 and differentiable, with a gradient of zeros: a detached 0 would hang data parallelism, and 0 / 0
    would poison the weights."""
    for divergence in ("forward_kl", "jsd"):
        for options in (
            {"reduction": "mean"},
            {"reduction": "sum"},
            {"reduction": "batchmean"},
            {"reduction": "none"},
            {"num_items": 5},
            {"num_items": torch.tensor(5)},
        ):
            call = case()
            student = call.pop("student_logits").to(dtype).requires_grad_()
            teacher = call.pop("teacher").to(dtype).requires_grad_()
            loss, parts = kd_loss(
                student,
                teacher,
                divergence=divergence,
                return_parts=True,
                backend=any_backend,
                **call,
                **options,
            )
            assert loss.shape == (student.shape[:-1] if options.get("reduction") == "none" else ())
            assert loss.dtype == torch.float32 and loss.requires_grad
            assert not loss.any(), options
            assert parts.counted == (3 if "weight" in call and len(student) else 0)
            loss.sum().backward()
            for leaf in (student, teacher):
                assert (
                    leaf.grad is not None and leaf.grad.shape == leaf.shape and not leaf.grad.any()
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("items", [0, 0.0])
def test_num_items_of_0_gives_loss_0(any_backend: str, items: float, dtype: torch.dtype) -> None:
    """With num_items = 0 on the device, as a trainer counts it, the loss is 0 and not 0 / 0."""
    student = logits(3, 7, seed=15, dtype=dtype).requires_grad_()
    loss = kd_loss(
        student,
        logits(3, 7, seed=16),
        torch.full((3,), -100),
        num_items=torch.tensor(items),
        backend=any_backend,
    )
    loss.backward()
    assert loss == 0 and student.grad is not None and not student.grad.any()


def test_one_counted_row_among_many(any_backend: str) -> None:
    student, teacher = logits(5, 7, seed=13), logits(5, 7, seed=14)
    mask = torch.tensor([False, False, False, True, False])
    alone = kd_loss(student[3:4], teacher[3:4], backend=any_backend)
    assert torch.equal(kd_loss(student, teacher, mask=mask, backend=any_backend), alone)
