"""Options that change from step to step in a compiled function: eager values from at most two graphs.

torch.compile treats a number as a constant until it changes, and then as a symbol. An op must not receive that symbol
directly, because torch's graph caches would reuse the graph of another value. Inductor's caches are on in these tests,
and warm in a second process. The other compiler here, aot_eager, has no cache and counts graphs quickly.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.accuracy import labels_for, logits
from support.options import TRIED
from support.paths import ROOT
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import fastkd
from fastkd import features, kd_loss, online, relations, response
from fastkd.call.options import TABLE

ROWS, COLUMNS = 5, 13

Loss = Callable[..., Tensor]


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def _user_divergence(p: Any, q: Any, log_p: Any, log_q: Any, factor: float, other: float) -> Any:
    return factor * other * p * (log_p - log_q), -factor * other * p


OF_OPTIONS = {name: tried.schedule for name, tried in TRIED.items() if tried.schedule}
# The changing options, as functions of the progress in [0, 1].
SCHEDULES: dict[str, Callable[[float], dict[str, Any]]] = {
    **OF_OPTIONS,
    "integer temperature": lambda x: {"temperature": 1 + round(19 * x)},
    "num_items": lambda x: {"num_items": 1 + round(19 * x)},
    "num_items, a float": lambda x: {"num_items": 0.5 + 7.0 * x},
    "num_items, a tensor": lambda x: {"num_items": torch.tensor(1 + round(19 * x))},
    "jsd": lambda x: {"divergence": fastkd.jsd(x)},
    "skew_forward_kl": lambda x: {"divergence": fastkd.skew_forward_kl(0.9 * x)},
    "skew_reverse_kl": lambda x: {"divergence": fastkd.skew_reverse_kl(0.9 * x)},
    "mixture": lambda x: {"divergence": fastkd.mixture(1.0 - x, x)},
    "alpha_beta": lambda x: {"divergence": fastkd.alpha_beta(x, 1.0 - x)},
    "smooth_l1": lambda x: {"divergence": fastkd.smooth_l1(0.5 + x)},
    "dkd": lambda x: {"divergence": fastkd.dkd(1.0 + x, 8.0 - x)},
    "nkd": lambda x: {"divergence": fastkd.nkd(1.5 - x), "temperature": 1.0 + x},
    "of the user": lambda x: {
        "divergence": fastkd.Divergence("mine", _user_divergence, (1.0 + x, 2.0 + x), 1.0),
        "backend": "reference",
    },
}
WITH_LABELS = (*(row.name for row in TABLE if row.needs_labels), "dkd", "nkd", "all together")


def _all_together(x: float) -> dict[str, Any]:
    together: dict[str, Any] = {}
    for name in (*OF_OPTIONS, "num_items, a float", "jsd"):
        together |= SCHEDULES[name](x)
    return together | {"temperature": 3.0 - x, "alpha": 1.0 - x}


SCHEDULES["all together"] = _all_together


def _outcome(loss: Loss, *tensors: Tensor, **options: Any) -> list[Tensor]:
    """Loss and gradient of the first tensor."""
    leaf = tensors[0].clone().requires_grad_()
    value = loss(leaf, *tensors[1:], **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaf)]


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (logits(ROWS, COLUMNS, seed=seed) for seed in (1, 2))
    return student, teacher, labels_for(ROWS, vocabulary=COLUMNS, seed=3, ignored=0.2)


def _assert_agree(found: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def _follow(
    loss: Loss,
    compiled: Loss,
    schedule: Callable[[float], dict[str, Any]],
    steps: int,
    *labels: Tensor,
) -> None:
    student, teacher, _ = _batch()
    seen = []
    for step in range(steps):
        options = schedule(step / (steps - 1))  # the values include both ends
        wanted = _outcome(loss, student, teacher, *labels, **options)
        _assert_agree(_outcome(compiled, student, teacher, *labels, **options), wanted)
        seen.append(wanted[1])
    assert not torch.equal(seen[0], seen[-1])  # otherwise the schedule would test nothing


# One schedule of each kind in every run: all numbers of a call take one code path, and all divergences another.
USUAL = ("all together", "alpha", "integer temperature", "num_items", "jsd", "nkd", "of the user")


@pytest.mark.parametrize(
    "name",
    [
        *USUAL,
        *(pytest.param(name, marks=pytest.mark.heavy) for name in SCHEDULES if name not in USUAL),
    ],
)
def test_a_schedule_is_two_graphs(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kd_loss, fullgraph=True, backend=counter)
    labels = _batch()[2:] if name in WITH_LABELS else ()
    _follow(kd_loss, compiled, SCHEDULES[name], 5, *labels)
    assert counter.frame_count <= 2


def test_a_schedule_with_dynamic_true() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kd_loss, fullgraph=True, dynamic=True, backend=counter)
    _follow(kd_loss, compiled, _all_together, 4, *_batch()[2:])
    assert counter.frame_count <= 2


def test_with_dynamic_false_every_value_is_a_constant() -> None:
    """With dynamic=False every value compiles its own graph, and the values are right."""
    compiled = torch.compile(kd_loss, fullgraph=True, dynamic=False, backend="aot_eager")
    _follow(kd_loss, compiled, SCHEDULES["temperature"], 3)


def _annealed(student: Tensor, teacher: Tensor, *labels: Tensor, **options: Any) -> Tensor:
    """A loss whose temperature is computed in the graph and also multiplies tensors."""
    temperature = 1 + options.pop("temperature", 0.0)
    loss = kd_loss(student, teacher, *labels, temperature=temperature, **options)
    return loss * temperature * temperature


def _under_inductor(names: Sequence[str], steps: int) -> None:
    for name in names:
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(_annealed, fullgraph=True)
        labels = _batch()[2:] if name in WITH_LABELS else ()
        _follow(_annealed, compiled, SCHEDULES[name], steps, *labels)
        assert counters["stats"]["unique_graphs"] <= 2, name


def test_inductor_with_cold_and_warm_caches() -> None:
    # Without SIMD code, which is irrelevant here: with an empty cache g++ would first try each instruction set. Nor are
    # headers compiled beforehand, which takes longer than the few kernels that would include them.
    settings = {"cpp.simdlen": 1, "cpp_cache_precompile_headers": False}
    with fresh_cache(), torch._inductor.config.patch(settings):
        _under_inductor(["all together"], 4)
        assert not counters["aot_autograd"]["autograd_cache_hit"]
        _under_inductor(["all together"], 4)
        assert counters["aot_autograd"]["autograd_cache_hit"]


@pytest.mark.heavy
def test_twenty_values_in_two_processes_with_one_cache(tmp_path: Path) -> None:
    script = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}; import test_schedules as t; "
    script += "t._under_inductor(t.SCHEDULES, 20)"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for _ in ("cold", "warm"):
        subprocess.run([sys.executable, "-c", script], check=True, env=environment)


# ---- where a number comes from


def test_numbers_stored_in_a_module() -> None:
    """Numbers that are attributes of a loss, including integers, and numbers inside its options."""
    module = fastkd.KDLoss(temperature=4, alpha=1.0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    student, teacher, labels = _batch()
    for temperature, alpha in ((4, 1.0), (3, 0.75), (2, 0.5), (1.5, 0.25)):
        module.temperature = temperature
        module.options["alpha"] = alpha
        wanted = kd_loss(student, teacher, labels, temperature=temperature, alpha=alpha)
        torch.testing.assert_close(compiled(student, teacher, labels), wanted)
    assert counter.frame_count <= 2


def test_numbers_of_a_closure_and_of_a_teacher() -> None:
    """A closure's temperature, an ensemble's weights and a member's, from hidden states; float16 is deferred."""
    temperature, weights = 1.0, [0.5, 0.5]
    hidden, weight = logits(ROWS, 8, seed=4).half(), logits(COLUMNS, 8, seed=5).half()
    members = [logits(ROWS, COLUMNS, seed=seed) for seed in (6, 7)]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        teacher = fastkd.Ensemble(members, weights)
        return fastkd.fused_linear_kd_loss(
            hidden, weight, teacher, temperature=temperature, reduction="none", chunk_size=2
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step in range(4):
        temperature, weights = 1.0 + step, [0.5 + 0.1 * step, 0.5 - 0.1 * step]
        actual, wanted = (
            _outcome(run, hidden, weight.requires_grad_()) for run in (compiled, loss)
        )
        torch.testing.assert_close(actual, wanted, rtol=2e-3, atol=1e-6)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_numbers_of_a_sparse_teacher(tail: str) -> None:
    student, dense, _ = _batch()

    def loss(
        student: Tensor, ids: Tensor, logprobs: Tensor, mass: Tensor, temperature: float
    ) -> Tensor:
        teacher = fastkd.TopK(ids, logprobs, tail, mass, temperature)
        return kd_loss(student, teacher, temperature=temperature)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for temperature in (3.0, 2.0, 1.5, 1.0):
        at = fastkd.TopK.from_logits(dense, 4, temperature=temperature)
        inputs = (student, at.ids, at.logprobs, at.tail_logprob, temperature)
        _assert_agree(_outcome(compiled, *inputs), _outcome(loss, *inputs))
    assert counter.frame_count <= 2


def test_a_temperature_of_one_element() -> None:
    """A one-element temperature for all rows, eager and compiled in one graph, and for a single row."""
    student, teacher, _ = _batch()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kd_loss, fullgraph=True, backend=counter)
    for value in (3.0, 1.5, 1.0):
        wanted = _outcome(kd_loss, student, teacher, temperature=value)
        for run in (kd_loss, compiled):
            _assert_agree(_outcome(run, student, teacher, temperature=torch.tensor(value)), wanted)
        _assert_agree(_outcome(kd_loss, student[0], teacher[0], temperature=torch.tensor(value)),
               _outcome(kd_loss, student[0], teacher[0], temperature=value))  # fmt: skip
    assert counter.frame_count == 1


# ---- errors


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ({"temperature": 2.0}, {"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        ({"alpha": 1.0}, {"alpha": 0.5}, "labels are needed for the cross-entropy term where alpha < 1; alpha is 0.5"),
        ({"softcap": 2.0}, {"softcap": 0.0}, "softcap must be positive and finite"),
        ({"num_items": 3}, {"num_items": 0}, "num_items must be positive, got 0"),
        ({"divergence": 0.5}, {"divergence": 1.5}, "beta must be in \\[0, 1\\], got 1.5"),
    ],
    ids=["temperature", "labels", "softcap", "num_items", "divergence"],
)  # fmt: skip
def test_a_wrong_number_raises_the_same_error_as_in_eager_mode(
    good: dict[str, Any], bad: dict[str, Any], message: str
) -> None:
    """The same error is raised for a constant of the first graph and for a symbol."""
    student, teacher, _ = _batch()

    def loss(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        if "divergence" in options:
            options["divergence"] = fastkd.jsd(options["divergence"])
        return kd_loss(student, teacher, **options)

    # The validation is traced, so nothing depends on what comes after.
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=message):
        compiled(student, teacher, **bad)
    compiled(student, teacher, **good)
    with pytest.raises(ValueError, match=message):
        compiled(student, teacher, **bad)


def test_a_string_raises_the_same_error_as_in_eager_mode() -> None:
    compiled = torch.compile(kd_loss, backend="aot_eager")
    with pytest.raises(TypeError, match="temperature must be a number or a tensor, got str"):
        compiled(*_batch()[:2], temperature="2")


# ---- what docs/guide.md says of each loss

STUDENT, TEACHER, LABELS = _batch()
MAPS = torch.randn(2, ROWS, 4, 3, 3, generator=torch.Generator().manual_seed(0))
LOSS, FUSED = fastkd.KDLoss(temperature=2.0), fastkd.FusedLinearKDLoss()
HINT = features.HintLoss(torch.nn.Identity())
FEATURES = features.FeatureLoss([(0, 0)], COLUMNS, COLUMNS)
# For each loss a call with numbers that change, if it has any.
EVERY: dict[str, Callable[[Tensor, float], Tensor]] = {
    "kd_loss": lambda s, x: kd_loss(s, TEACHER, temperature=x),
    "KDLoss": lambda s, x: LOSS(s, TEACHER, num_items=x),
    "fused_linear_kd_loss": lambda s, x: fastkd.fused_linear_kd_loss(s, TEACHER, s.detach() @ TEACHER.T, temperature=x),
    "FusedLinearKDLoss": lambda s, x: FUSED(s, TEACHER, s.detach() @ TEACHER.T, num_items=x),
    "adaptive_kl_loss": lambda s, x: response.adaptive_kl_loss(s, TEACHER, head_mass=x / 5, temperature=x),
    "dist_loss": lambda s, x: response.dist_loss(s, TEACHER, beta=x, gamma=2.0, temperature=x),
    "standardized_kd_loss": lambda s, x: response.standardized_kd_loss(
        s, TEACHER, LABELS, alpha=x / 4, divergence=fastkd.jsd(x / 4)
    ),
    "uld_loss": lambda s, x: response.uld_loss(s, TEACHER, temperature=x, num_items=x),
    "policy_distillation_loss": lambda s, x: response.policy_distillation_loss(s, TEACHER, temperature=x),
    "mutual_loss": lambda s, x: sum(online.mutual_loss([s, 2 * s], LABELS, temperature=x, peer_weight=x)),
    "ensemble_loss": lambda s, x: online.ensemble_loss([s, 2 * s], LABELS, temperature=x, ensemble_weight=x),
    "consistency_loss": lambda s, x: online.consistency_loss(s, TEACHER, num_items=x),
    "rkd_distance_loss": lambda s, x: relations.rkd_distance_loss(s, TEACHER, delta=x),
    "rkd_angle_loss": lambda s, x: relations.rkd_angle_loss(s, TEACHER, delta=x / 4),
    "rkd_loss": lambda s, x: relations.rkd_loss(s, TEACHER, distance=x, angle=2 * x),
    "similarity_loss": lambda s, x: x * relations.similarity_loss(s, TEACHER),
    "gram_loss": lambda s, x: x * relations.gram_loss(s, TEACHER),
    "hint_loss": lambda s, x: x * features.hint_loss(s, TEACHER),
    "attention_transfer_loss": lambda s, x: x * features.attention_transfer_loss(s[:, :4, None, None] * MAPS[0], MAPS[1]),  # noqa: E501
    "cosine_loss": lambda s, x: x * features.cosine_loss(s, TEACHER),
    "HintLoss": lambda s, x: x * HINT(s, TEACHER),
    "FeatureLoss": lambda s, x: x * FEATURES([s.unsqueeze(0)], [TEACHER.unsqueeze(0)]),
    "k1": lambda s, x: x * fastkd.sampled.k1(s, TEACHER).mean(),
    "k2": lambda s, x: x * fastkd.sampled.k2(s, TEACHER).mean(),
    "k3": lambda s, x: x * fastkd.sampled.k3(s, TEACHER).mean(),
    "on_policy_loss": lambda s, x: fastkd.sampled.on_policy_loss(
        s, TEACHER, 0.9 * s.detach(), coef=x, clip=x / 10, dual_clip=1.0 + x, clamp=x, num_items=x
    ),
    "draft_loss": lambda s, x: response.draft_loss(
        s, TEACHER, {"lk_hybrid": x, "cross_entropy": 0.5}, eta=x, num_items=x
    ),
    "fused_linear_draft_loss": lambda s, x: response.fused_linear_draft_loss(
        s, torch.eye(s.shape[-1]), TEACHER, {"lk_hybrid": x, "cross_entropy": 0.5}, eta=x, num_items=x
    ),
    "fused_linear_logprobs": lambda s, x: sum(
        value.sum() for value in fastkd.fused_linear_logprobs(s, TEACHER, topk=2, temperature=x, softcap=2 * x)[1::3]
    ),
    "student_topk": lambda s, x: s.sum() * fastkd.student_topk(s, TEACHER, k=2, temperature=x).logprobs.sum(),
    "inplace=True": lambda s, x: kd_loss(s * 1.0, TEACHER, temperature=x, inplace=True),
}  # fmt: skip


def _table() -> dict[str, str]:
    page = (ROOT / "docs" / "guide.md").read_text()
    section = page.split("## Under torch.compile")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {name.strip(" `"): output.strip() for names, output in rows for name in names.split(",")}


def test_the_table_lists_every_loss() -> None:
    public = {"k1", "k2", "k3", "on_policy_loss"}
    for module in (fastkd, response, online, relations, features):
        public |= {
            name for name in dir(module)
            if name.lower().replace("_", "").endswith("loss") and not name.startswith("_")
        }  # fmt: skip
    table = _table()
    assert public <= table.keys()
    assert table.keys() - EVERY.keys() == {
        "process_group"
    }  # tests/parallel/test_parallel.py tests that row


def _without_aot_of_torch(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Compiler for graphs whose operators may all be torch's: AOT autograd would test only torch there."""
    modules = (module for module in graph.modules() if isinstance(module, torch.fx.GraphModule))
    own = any("fastkd" in str(node.target) for module in modules for node in module.graph.nodes)
    return lookup_backend("aot_eager" if own else "eager")(graph, inputs)


@pytest.mark.parametrize("name", EVERY)
def test_the_table_matches_the_graphs(name: str) -> None:
    """Each loss compiles to as many graphs as the table says, with right values and gradients while its numbers
    change."""
    loss = EVERY[name]
    whole = _table()[name] == "one graph"
    counted: list[None] = []

    def counter(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        counted.append(None)
        return _without_aot_of_torch(graph, inputs)

    compiled = torch.compile(loss, fullgraph=whole, backend=counter)
    for x in (3.0, 2.0, 1.5):
        actual, wanted = (_outcome(run, STUDENT, x) for run in (compiled, loss))
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
    if whole:
        assert 1 <= len(counted) <= 2
        return
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="inplace=True is for eager mode"):
        _outcome(torch.compile(loss, fullgraph=True, backend="aot_eager"), STUDENT, 3.0)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": np.float32(2.0), "num_items": np.int64(3)},
        {"chunk_size": np.int32(2)},
        pytest.param(  # breaks the graph at several places, of which each costs half a second
            {"temperature": np.float32(2.0), "num_items": np.int64(3), "chunk_size": np.int32(2)},
            marks=pytest.mark.heavy,
        ),
        pytest.param(
            {"chunk_size": np.int32(2), "memory_budget": np.int64(2**30)}, marks=pytest.mark.heavy
        ),
        pytest.param({"temperature": np.float32(2.0)}, marks=pytest.mark.heavy),
        pytest.param({"alpha": np.float64(0.5)}, marks=pytest.mark.heavy),
        pytest.param({"num_items": np.int64(3)}, marks=pytest.mark.heavy),
    ],
    ids=str,
)
def test_numpy_numbers_in_chunks(options: dict[str, Any]) -> None:
    """A NumPy number breaks the graph only inside the validation."""
    student, teacher = logits(ROWS, 4, seed=1), logits(ROWS, COLUMNS, seed=2)
    head, labels = logits(COLUMNS, 4, seed=3), labels_for(ROWS, vocabulary=COLUMNS, seed=4)

    def loss(hidden: Tensor) -> Tensor:
        return fastkd.fused_linear_kd_loss(hidden, head, teacher, labels, **options)

    results = [
        torch.autograd.grad(call(hidden), hidden)[0]
        for call in (loss, torch.compile(loss, backend=_without_aot_of_torch))
        for hidden in [student.clone().requires_grad_()]
    ]
    torch.testing.assert_close(results[1], results[0])
