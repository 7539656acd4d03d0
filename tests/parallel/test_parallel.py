"""Losses over processes of a group on this machine (gloo), held to the same bar as one process's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import spread, training
from support.accuracy import labels_for, logits
from support.options import ALL, prepared
from support.processes import Processes
from test_divergences import VARIANTS
from test_linear import problem
from test_topk import DIVERGENCES, TAILS, defined
from test_topk import sparse as sparse_teacher

from fastkd import TopK

EVEN = {2: (1.0, 1.0), 4: (1.0, 1.0, 1.0, 1.0)}
UNEVEN = {2: (1.0, 3.0), 4: (2.0, 0.0, 1.0, 1.5)}  # the second process has no column


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Four processes, of which a test uses two or four."""
    pool = Processes(4)
    yield pool
    pool.stop()


def _shares(size: int, cut: str) -> tuple[float, ...]:
    return (EVEN if cut == "even" else UNEVEN)[size]


sizes = pytest.mark.parametrize("size", [2, 4])
# Most runs have half of a test's cases in each of its settings.
halves = pytest.mark.parametrize(
    "half", [True, pytest.param(False, marks=pytest.mark.heavy)], ids=["half", "whole"]
)


def _cases(cases: list[dict[str, Any]], half: bool, *setting: bool) -> list[dict[str, Any]]:
    """All cases, or every other one. A setting that differs in one respect has the other half."""
    return cases[sum(setting) % 2 :: 2] if half else cases


@halves
@pytest.mark.parametrize(
    ("size", "cut", "dtype"),
    [
        (2, "even", torch.float32),
        (2, "uneven", torch.bfloat16),
        (4, "even", torch.float16),
        (4, "uneven", torch.float32),
    ],
)
def test_every_divergence(
    processes: Processes, backend: str, size: int, cut: str, dtype: torch.dtype, half: bool
) -> None:
    cases = []
    for number, (divergence, parameters) in enumerate(VARIANTS):
        cases.append(
            {
                "student": logits(3, 61, seed=number, dtype=dtype),
                "teacher": logits(3, 61, seed=100 + number, dtype=dtype),
                "labels": labels_for(3, vocabulary=61, seed=number, ignored=0.2),
                "divergence": divergence,
                "parameters": parameters,
                "temperature": 2.0,
                "alpha": 0.5,
                "label_smoothing": 0.1,
            }
        )
    cases = _cases(cases, half, size == 4, cut == "uneven", backend == "cpu")
    actual = processes.run(size, spread.dense, _shares(size, cut), "plain", backend, cases)
    assert sum(actual) == len(cases)


@halves
@pytest.mark.parametrize(("size", "cut"), [(2, "even"), (4, "uneven")])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "squared_error"])
def test_every_option(
    processes: Processes, backend: str, size: int, cut: str, divergence: str, half: bool
) -> None:
    cases = []
    for options in ALL.values():
        labels, options = prepared(options, 4, 3, columns=41, seed=1)
        case: dict[str, Any] = {
            "student": logits(4, 3, 43, seed=20),
            "teacher": logits(4, 3, 43, seed=21),
            "labels": labels,
            "divergence": divergence,
            **options,
        }
        cases.append(case)
    per_row = torch.tensor([[0.5, 1.0, 2.0]]).expand(4, 3)
    weight = torch.rand(4, 3, generator=torch.Generator().manual_seed(5)).round(decimals=1)
    rows = {"student": logits(4, 3, 43, seed=4), "teacher": logits(4, 3, 43, seed=5)}
    cases += [
        {**rows, "divergence": divergence, "temperature": per_row},
        {**rows, "divergence": divergence, "weight": weight, "mask": weight < 0.7},
        {**rows, "divergence": divergence, "reduction": "mean", "num_items": 7},
        {**rows, "divergence": divergence, "reduction": "batchmean"},
    ]
    cases = _cases(cases, half, size == 4, backend == "cpu")
    actual = processes.run(size, spread.dense, _shares(size, cut), "plain", backend, cases)
    assert sum(actual) == len(cases)


@sizes
@pytest.mark.parametrize(
    "form", ["whole teacher", "dtensor", "dtensor, whole teacher", "dtensor, whole student"]
)
def test_forms(processes: Processes, backend: str, size: int, form: str) -> None:
    cases = [
        {
            "student": logits(2, 3, 61, seed=6),
            "teacher": logits(2, 3, 61, seed=7),
            "divergence": divergence,
            "temperature": 2.0,
            "teacher_gradient": form != "whole teacher",
        }
        for divergence in ("forward_kl", "jsd")
    ]
    cut = "even" if form.startswith("dtensor") else "uneven"
    actual = processes.run(size, spread.dense, _shares(size, cut), form, backend, cases)
    assert sum(actual) == len(cases)


@halves
@pytest.mark.parametrize(("size", "cut"), [(2, "uneven"), (4, "even")])
@pytest.mark.parametrize("tail", TAILS)
def test_topk(
    processes: Processes, backend: str, size: int, cut: str, tail: str, half: bool
) -> None:
    cases = []
    for variant in DIVERGENCES:
        if defined(tail, variant):
            divergence, parameters = variant
            cases.append(
                {
                    "student": logits(3, 61, seed=8),
                    "teacher": sparse_teacher(3, vocabulary=61, k=7, seed=9, tail=tail, at=2.0),
                    "labels": labels_for(3, vocabulary=61, seed=10),
                    "divergence": divergence,
                    "parameters": parameters,
                    "temperature": 2.0,
                    "alpha": 0.5,
                    "label_smoothing": 0.1,
                }
            )
    cases = _cases(cases, half, size == 4, backend == "cpu")
    # K = V: only all processes together can tell that there is no other token.
    every = sparse_teacher(3, vocabulary=61, k=61, seed=9, tail=tail, padding=0.0, tail_given=False)
    cases.append({"student": logits(3, 61, seed=8), "teacher": every})
    if not tail.startswith("renormalize"):  # the oracle's softmax of nothing is NaN
        none = sparse_teacher(3, vocabulary=61, k=7, seed=9, tail=tail, tail_given=False)
        none.ids[1] = -1
        cases.append({"student": logits(3, 61, seed=8), "teacher": none})
    actual = processes.run(size, spread.sparse, _shares(size, cut), "plain", backend, cases)
    assert sum(actual) == len(cases)


@halves
@pytest.mark.parametrize(
    ("size", "form"),
    [
        (2, "plain"),
        (4, "plain"),
        (2, "whole teacher"),
        (2, "dtensor"),
        (2, "dtensor, sequence"),
        (2, "sequence"),
        (4, "sequence"),
    ],
)
def test_linear(processes: Processes, backend: str, size: int, form: str, half: bool) -> None:
    labels = labels_for(12, vocabulary=130, seed=3, ignored=0.3)
    cases: list[dict[str, Any]] = [
        {"given": problem(teacher, 12, rows=130, teacher_rows=130, bias=bias), **options}
        for teacher, bias, options in (
            ("linear", False, {}),
            ("linear with bias", True, {"labels": labels, "alpha": 0.5, "divergence": "jsd"}),
            ("dense", False, {"temperature": 2.0, "chunk_size": 5}),
            ("arithmetic", True, {"divergence": "tvd", "chunk_size": 5}),
            ("geometric", False, {"labels": labels, "alpha": 0.5, "label_smoothing": 0.2}),
            ("linear", False, {"reduction": "none", "upstream": torch.linspace(-1, 1, 12)}),
            ("linear", False, {"mask": torch.arange(12) % 3 > 0, "num_items": 5}),
            ("linear", True, {"mask": torch.zeros(12, dtype=torch.bool)}),
        )
    ]
    low = problem("linear", 12, rows=130, teacher_rows=130, dtype=torch.bfloat16)
    # Every process rounds its part of the hidden states' gradient, and the sum is rounded again.
    cases.append({"given": low, "rounding": 2**-7})
    cases = _cases(cases, half, size == 4, backend == "cpu")
    plain = form in ("plain", "whole teacher")
    processes.run(
        size, spread.linear, _shares(size, "uneven" if plain else "even"), form, backend, cases
    )


@sizes
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_results_are_bitwise_repeatable(
    processes: Processes, backend: str, size: int, divergence: str
) -> None:
    assert all(processes.run(size, spread.repeated, divergence, backend))


# In the cpu backend a row sends 15 numbers for a dense teacher (reverse KL and similar), 4 more for sums, and 8 plus K
# logits for a sparse teacher; processes compare their calls with 8 numbers.
@pytest.mark.parametrize(
    ("divergence", "k", "numbers", "tokens"),
    [("forward_kl", 0, 15, 0), ("jsd", 0, 19, 0), ("forward_kl", 5, 8, 5)],
)
def test_bytes_do_not_depend_on_the_vocabulary(
    processes: Processes, divergence: str, k: int, numbers: int, tokens: int
) -> None:
    options = {"divergence": divergence, "backend": "cpu"}
    expected = 2 * 8 * 8 + 8 * (2 * 8 * numbers + 4 * tokens)
    for vocabulary in (64, 5000):
        actual = processes.run(2, spread.bytes_exchanged, vocabulary, options, k)
        assert actual == [expected] * 2


def test_compiled(processes: Processes) -> None:
    for difference, output in processes.run(2, spread.compiled):
        assert difference == 0.0
        assert output != "nothing"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="there are not four GPUs")
@pytest.mark.parametrize(("size", "cut"), [(2, "uneven"), (4, "even")])
@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_every_divergence_over_nccl(
    processes: Processes, kernels: str, size: int, cut: str
) -> None:
    cases = [
        {
            "student": logits(3, 61, seed=number),
            "teacher": logits(3, 61, seed=100 + number),
            "labels": labels_for(3, vocabulary=61, seed=number, ignored=0.2),
            "divergence": divergence,
            "parameters": parameters,
            "temperature": 2.0,
            "alpha": 0.5,
            "label_smoothing": 0.1,
        }
        for number, (divergence, parameters) in enumerate(VARIANTS)
    ]
    actual = processes.run(size, spread.dense, _shares(size, cut), "plain", kernels, cases)
    assert sum(actual) == len(cases)


def test_rows_and_columns_of_a_mesh(processes: Processes) -> None:
    assert all(processes.run(4, training.mesh_of_two))


# Training


@pytest.fixture(scope="module")
def parameters_of_one_process(processes: Processes) -> dict[str, torch.Tensor]:
    """Parameters after training in one process."""
    return processes.run(1, training.train, "alone", 1)[0]


@pytest.mark.parametrize(
    ("size", "how", "micro_batches"),
    [
        (2, "ddp", 1),
        (4, "ddp", 1),
        (2, "fsdp", 1),
        (4, "fsdp", 1),
        (2, "fsdp, head", 1),
        (2, "tp", 1),
        (4, "tp", 1),
        (1, "alone", 8),
        (2, "fsdp", 4),
        (2, "tp", 8),
        (2, "ddp", 4),
    ],
)
def test_training_equals_that_of_one_process(
    processes: Processes,
    parameters_of_one_process: dict[str, torch.Tensor],
    size: int,
    how: str,
    micro_batches: int,
) -> None:
    actual = processes.run(size, training.train, how, micro_batches)
    torch.manual_seed(0)
    start = dict(training.Model().named_parameters())
    for parameters in actual:
        assert parameters.keys() == parameters_of_one_process.keys()
        for name, value in parameters.items():
            moved = (parameters_of_one_process[name] - start[name]).abs().max()
            assert moved > 0.01
            assert (value - parameters_of_one_process[name]).abs().max() < 1e-4 * moved, name


# What goes wrong


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ({"temperature": 3.0}, "temperature is 1.0 on process 0, 3.0 on process 1"),
        ({"divergence": "jsd"}, "divergence is ('forward_kl'"),
        ({"alpha": 0.25}, "alpha is 0.5 on process 0, 0.25 on process 1"),
        (
            {"labels": None, "alpha": 1.0},
            "labels is 'a tensor (6,)' on process 0, not there on process 1",
        ),
        ({"num_items": 3}, "the factor of the loss"),
        ({"reduction": "sum"}, "the factor of the loss"),
        ({"backend": "reference"}, "the backend is 'cpu' on process 0, 'reference' on process 1"),
        ({"student_logits": torch.zeros(6, 8).bfloat16()}, "the student is [(torch.float32"),
        ({"student_logits": torch.zeros(6, 8, requires_grad=True)}, "what requires grad is"),
        (
            {
                "student_logits": torch.zeros(5, 8),
                "teacher": torch.zeros(5, 8),
                "labels": torch.zeros(5, dtype=torch.int64),
            },
            "the shape of rows is (6,) on process 0, (5,) on process 1",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_processes_with_different_calls_raise(
    processes: Processes, difference: dict[str, Any], message: str
) -> None:
    for text in processes.run(2, training.call, difference):
        assert text.startswith("ValueError: the processes that share the vocabulary"), text
        assert message in text


def test_a_teacher_with_another_split_raises(processes: Processes) -> None:
    for text in processes.run(2, training.call, {"teacher": torch.zeros(6, 7)}):
        assert (
            "on process 1 the teacher has 7 columns, and student_logits has 8 of the 16 columns"
            in text
        )


def test_an_error_in_one_process_raises_in_all(processes: Processes) -> None:
    first, second = processes.run(2, training.call, {"alpha": 2.0})
    assert second.startswith("ValueError: alpha must be in [0, 1]")
    assert "process 1 raised ValueError: alpha must be in [0, 1]" in first


def test_different_labels_raise(processes: Processes) -> None:
    differing = {"labels": torch.ones(6, dtype=torch.int64)}
    for text in processes.run(2, training.call, differing, {"FASTKD_CHECK": "1"}):
        assert "labels is" in text


@pytest.mark.parametrize("where", ["before", "between its steps"])
def test_a_process_that_dies_raises_in_the_others(where: str) -> None:
    pool = Processes(2)  # unusable afterwards
    *others, last = pool.outcomes(2, training.die, where)
    pool.stop()
    assert last == (False, "died")
    for good, text in others:
        assert good and text.startswith("CollectiveError: the all-gather of ")
        assert "did not finish on process 0 of 2" in text


def test_a_late_process_raises_in_the_others(processes: Processes) -> None:
    first, second = processes.run(2, training.late, 6.0)
    assert second == "late"
    assert first.startswith("CollectiveError: the all-gather of the arguments of each process")


def test_unsupported_placements_raise(processes: Processes) -> None:
    for (text,) in processes.run(2, training.placements):
        assert "teacher has placements (Shard(dim=1),)" in text


def test_an_unsharded_head_raises(processes: Processes) -> None:
    for text in processes.run(2, training.whole_head):
        assert "student_weight has placements (Replicate(),)" in text


@pytest.mark.parametrize(("size", "cut"), [(2, "uneven"), (4, "even")])
def test_measures(processes: Processes, backend: str, size: int, cut: str) -> None:
    student, teacher = logits(5, 61, seed=1), logits(5, 61, seed=2)
    names = ["teacher_entropy", "forward_kl", "reverse_kl", "acceptance", "agreement"]
    case = {"student": student, "teacher": teacher, "weight": torch.eye(61), "names": names}
    processes.run(size, spread.measures, _shares(size, cut), backend, case)
    case |= {
        "teacher": TopK.from_logits(teacher, 6),
        "names": [*names, "student_mass", "teacher_mass"],
    }
    processes.run(size, spread.measures, _shares(size, cut), backend, case)
