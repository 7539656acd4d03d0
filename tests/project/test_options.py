"""The table of options agrees with everything that states options by hand, and with the generated C++."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from typing import Any, get_type_hints

import pytest
import torch
from support.accuracy import logits
from support.options import TOGETHER, TRIED, Sets, for_topk, prepared
from support.paths import ROOT
from torch import Tensor

import fastkd
from fastkd.call.options import OPTION_NAMES, TABLE, LossOptions, Numbers, Options
from fastkd.divergences import DEFINITIONS
from fastkd.functional import DenseOptions, LinearOptions


def test_the_signature_of_kd_loss_has_the_table_and_its_defaults() -> None:
    parameters = inspect.signature(inspect.unwrap(fastkd.kd_loss)).parameters
    for option in TABLE:
        assert option.name in parameters, option.name
        assert parameters[option.name].default == option.default, option.name
        assert f"        {option.name}: " in (fastkd.kd_loss.__doc__ or ""), option.name


def test_typed_options_are_those_of_the_signature() -> None:
    parameters = inspect.signature(inspect.unwrap(fastkd.kd_loss)).parameters
    keywords = {name for name, value in parameters.items() if value.kind is value.KEYWORD_ONLY}
    assert set(DenseOptions.__annotations__) == keywords - {"return_parts"}
    assert set(OPTION_NAMES) <= set(LossOptions.__annotations__)
    fused = inspect.signature(inspect.unwrap(fastkd.fused_linear_kd_loss)).parameters
    own = {name for name, value in fused.items() if value.kind is value.KEYWORD_ONLY}
    assert set(LinearOptions.__annotations__) == (own - {"return_parts"}) | set(
        LossOptions.__annotations__
    )


def test_options_have_the_table_and_its_defaults() -> None:
    fields = Options._fields
    assert fields[1 : 1 + len(TABLE)] == OPTION_NAMES
    default = Options(fastkd.forward_kl())
    types = get_type_hints(Options)
    for option in TABLE:
        value = getattr(default, option.name)
        assert type(value) is types[option.name], option.name
        if option.name != "teacher_temperature":  # None: the student's
            assert value == option.check(option.name, option.default), option.name


def test_stand_ins_pass_the_checks() -> None:
    for option in TABLE:
        if option.stand_in is not None:
            option.check(option.name, option.stand_in)


# The tests that take their options from tests/support/options.py: between them, every backend with dense and sparse
# teachers, whole rows and shards, eager and compiled calls, and the errors.
USERS = {
    "losses/test_loss.py": ["test_every_option"],
    "losses/test_label_term.py": ["test_options", "test_shards"],
    "losses/test_contract.py": ["test_bad_inputs"],
    "teachers/test_topk.py": ["test_every_option", "test_every_option_together"],
    "parallel/test_shards.py": ["test_every_option"],
    "parallel/test_parallel.py": ["test_every_option"],
    "engine/test_linear.py": ["test_options"],
    "engine/test_compile.py": ["test_one_graph_and_no_recompilation_across_rows"],
    "engine/test_schedules.py": ["test_a_schedule_is_two_graphs"],
    "backends/cuda/test_cuda_host.py": ["test_options"],
    "backends/cuda/test_cuda_label_term.py": ["test_options"],
    "backends/cuda/test_cuda_shards.py": ["test_every_option"],
    "backends/triton/test_triton.py": ["test_options"],
    "backends/triton/test_triton_label_term.py": ["test_options"],
    "backends/triton/test_triton_shards.py": [
        "test_everything_at_once", "test_sparse_teachers_with_every_option",
    ],
}  # fmt: skip


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


@pytest.mark.parametrize("file", USERS)
def test_tests_of_options_use_the_one_table(file: str) -> None:
    """Each test refers to sets that have every option, itself or through what its file defines."""
    refers: dict[str, set[str]] = {}
    for node in ast.parse((ROOT / "tests" / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            refers.setdefault(node.name, set()).update(_names(node))
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in set().union(*map(_names, targets)):
                refers.setdefault(name, set()).update(_names(node))
    for test in USERS[file]:
        assert test in refers, test
        reached, fresh = set(), {test}
        while fresh:
            reached |= fresh
            fresh = set().union(*(refers.get(name, set()) for name in fresh)) - reached
        assert reached & {"ALL", "BRIEF", "TOGETHER", "TRIED"}, test


def test_the_tests_have_every_option() -> None:
    assert set(TRIED) == set(OPTION_NAMES)
    names = [name for tried in TRIED.values() for name in tried.sets]
    assert len(names) == len(set(names)), "two sets have one name"
    for row in TABLE:
        tried = TRIED[row.name]
        assert tried.sets and tried.invalid, row.name
        assert all(row.name in options for options in tried.sets.values()), row.name
        assert set(tried.together) != {row.default}, row.name
        assert (tried.schedule is None) == (row.stand_in is None), row.name
        if tried.schedule is not None:
            assert tried.schedule(0.0)[row.name] != tried.schedule(1.0)[row.name], row.name


def _loss(teacher: Any, options: dict[str, Any], labels: Tensor | None = None) -> Tensor:
    student = logits(12, 43, seed=1, dtype=torch.float64)
    return fastkd.kd_loss(
        student, teacher, labels, divergence="jsd", reduction="none", backend="reference", **options
    )


def _matters(name: str, teacher: Any, sets: Sets) -> bool:
    """Whether leaving the option out of a set changes the losses, for one of these sets."""
    for chosen in sets.values():
        labels, options = prepared(chosen, 12, columns=41, seed=3)
        without = {option: value for option, value in options.items() if option != name}
        if not torch.equal(*(_loss(teacher, call, labels) for call in (options, without))):
            return True
    return False


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_every_option_changes_the_results_of_its_sets(name: str) -> None:
    """A backend that ignores the option therefore fails the tests that use these sets."""
    dense = logits(12, 43, seed=2, dtype=torch.float64)
    sparse = fastkd.TopK.from_logits(dense[:, :41], 5, tail="renormalize")
    assert all(_matters(name, dense, {"": options}) for options in TRIED[name].sets.values())
    assert _matters(name, dense, TOGETHER)
    if TRIED[name].sparse:
        assert _matters(name, sparse, for_topk(TRIED[name].sets))
        assert _matters(name, sparse, for_topk(TOGETHER))
    else:
        with pytest.raises(ValueError, match=f"{name} .*TopK"):
            _loss(sparse, {name: TRIED[name].together[1]})


# Options without an effect if there are no labels, because they say which labels drop a row.
ABOUT_LABELS = {"ignore_index"}


@pytest.mark.parametrize("name", [name for name in OPTION_NAMES if name not in ABOUT_LABELS])
def test_no_option_is_ignored_without_labels(name: str) -> None:
    """An option that needs labels raises; the row of TABLE says so."""
    teacher = logits(12, 43, seed=2, dtype=torch.float64)
    (row,) = (row for row in TABLE if row.name == name)
    value = next(value for value in TRIED[name].together if value != row.default)
    others = {"temperature": 2.0, "teacher_temperature": 2.0}
    if row.needs_labels:
        with pytest.raises(ValueError, match="labels"):
            _loss(teacher, {name: value})
    else:
        assert not torch.equal(_loss(teacher, others), _loss(teacher, others | {name: value}))


def test_numbers_of_a_graph_come_back() -> None:
    numbers = Numbers.of(alpha=0.5, softcap=None, ignore_index=7, num_items=3, taken_at=2.0)
    assert numbers.scalars["teacher_temperature"] == numbers.scalars["temperature"]
    assert Numbers.from_flat(list(numbers.flat())) == numbers
    with pytest.raises(
        TypeError, match="an option must be one of alpha, temperature, .*; got 'alhpa'"
    ):
        Numbers.of(alhpa=0.5)


def test_the_generated_headers_are_current() -> None:
    check = [sys.executable, str(ROOT / "csrc" / "generate.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("extension", ["_C", "_cuda"])
def test_an_extension_of_another_table_is_an_obstacle(
    extension: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip(f"fastkd.{extension}", reason="the extension is not built")
    from fastkd.backends import registry

    monkeypatch.setattr(module, "OPTION_NAMES", "alpha temperature", raising=False)
    found = registry._native_obstacle(f"fastkd.{extension}", None, "")
    assert found is not None
    assert "another table of options" in found.reason


def test_a_factor_of_p_and_q_is_one_of_the_gradient() -> None:
    """Where the generated C++ says so, because the CUDA kernels then multiply p and q by the gradient's factor."""
    header = (ROOT / "csrc" / "generated" / "divergences.h").read_text()
    pattern = r"struct (\w+) \{.*?gradient_is_linear = (\w+);"
    linear = {name for name, answer in re.findall(pattern, header, re.DOTALL) if answer == "true"}
    assert {"forward_kl", "reverse_kl", "mixture", "jsd"} < linear
    log_p, log_q = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    for function in DEFINITIONS:
        if function.__name__.lstrip("_") not in linear:
            continue
        takes = list(inspect.signature(function).parameters)
        ratio = [log_p - log_q] if "log_ratio" in takes else []
        params = [0.3 + 0.1 * i for i in range(len(takes) - 4 - len(ratio))]
        for p, q in ((log_p.exp(), log_q.exp()), (log_q.exp(), log_p.exp())):
            once, scaled = (
                function(c * p, c * q, log_p, log_q, *ratio, *params)[1] for c in (1.0, -3.0)
            )
            torch.testing.assert_close(scaled, -3.0 * once)
