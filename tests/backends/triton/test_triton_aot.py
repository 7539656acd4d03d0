"""Every Triton kernel compiles ahead of time, for GPUs that are not here, and keeps its tiles in registers.

What is compiled is what the launchers launch: their calls are caught and specialized for the target as on its machine.
Triton's interpreter may be on in the tests, so this runs in a process of its own, which is this file as a script.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fastkd.kernels.launch import NARROW, REGISTERS
from fastkd.kernels.tuning import TILES
from support import sass
from support.interpreters import python
from support.paths import PACKAGE, ROOT
from support.triton_aot import Caught, Resources, catch, local_in_loop, resources, restored
from torch import Tensor

import fastkd
from fastkd import divergences
from fastkd.backends.logprobs import Tempering
from fastkd.backends.native import outputs
from fastkd.call.contract import Options, Rows, Shard, ShardCall, Want
from fastkd.call.draft import LOSSES, Terms

TARGETS = ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"]
LIMITS: dict[str, dict[str, float]] = {
    "alpha_beta at alpha 0": {"alpha": 0.0, "beta": 0.5},
    "alpha_beta at beta 0": {"alpha": 0.5, "beta": 0.0},
    "alpha_beta at sum 0": {"alpha": 0.5, "beta": -0.5},
    "alpha_beta at 0": {"alpha": 0.0, "beta": 0.0},
}
DIVERGENCES = [*fastkd.DIVERGENCES, *LIMITS]
MADE = divergences.TABLE | divergences.WITH_LABELS
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Rows of two, four and eight warps, each of which may start at a multiple of 16 bytes or not.
WIDTHS = {"narrow": 1000, "short": 8192, "short odd": 8191, "medium": 16384, "medium odd": 16383}
WIDTHS |= {"wide": 128256, "odd": 50257}
# Rows of one tile, for each tile size.
WIDTHS |= {f"one tile of {width}": width for width in (100, 112, 200, 256, 512, 1024)}
WIDTHS |= {f"timed {key[3]}": key[3] for key in TILES}


class Variant(NamedTuple):
    """One specialization of a kernel."""

    divergence: str  # or "scale" for the kernel that scales gradients
    kind: str
    student: str = "bf16"
    teacher: str = "bf16"
    width: str = "wide"
    stage: str = "row"  # or one of those of a row that several programs share
    sharded: bool = False  # whether processes share the vocabulary


def variants(grid: str) -> list[Variant]:
    """One of four lists, each with the kinds of kernel of the one before.

    "least": the kernels with a ceiling, and those that need the most registers; what every run compiles.
    "few": each divergence once, each tile of the rule once, and each stage and sparse kernel.
    "pairs": each divergence, and what else changes a kernel, in pairs: each width with each type and each kind, but not
    with every other choice beside it. "full": every combination.
    """
    return {"least": _least, "few": _few, "pairs": _pairs, "full": _full}[grid]()


def _least() -> list[Variant]:
    everything = Variant("jsd", "everything")
    return [
        *CEILINGS,
        everything,
        Variant("mixture", "everything", width="short"),
        Variant(next(iter(divergences.WITH_LABELS)), "everything", stage="statistics"),
        *shared_variants(["mixture"], ["wide"])[-1:],
        everything._replace(width="odd", stage="sums"),
        everything._replace(stage="gradient", sharded=True),
        Variant("gather", "everything", width="odd"),
        Variant("spread", "everything", "fp32", "fp32"),
        Variant("logprobs", "statistics", "fp32", "fp32"),
        Variant("logprobs", "gradient", "fp32", "fp32"),
    ]


def _few() -> list[Variant]:
    both = ["fp32", "bf16"]
    # A closed form, three sweeps, and no normalizer: bare, usual and with all that a row may have.
    results = [
        Variant("forward_kl", "hinton"),
        Variant("forward_kl", "distillation", "fp32", "fp32"),
        Variant("mixture", "everything", "fp32", "fp32"),
        Variant("jsd", "everything"),
        Variant("jsd", "value"),
        Variant("jsd", "cross-entropy"),
        Variant("squared_error", "everything"),
        Variant("forward_kl", "hinton", "bf16", "fp32"),
        Variant("jsd", "hinton", "fp16", "fp16"),
    ]
    results += [Variant("scale", "", dtype) for dtype in DTYPES]
    for width in ("narrow", "medium", "medium odd", "odd"):
        results.append(Variant("forward_kl", "hinton", "fp32", "fp32", width))
        results.append(Variant("mixture", "everything", "bf16", "bf16", width))
    for width in ("short", "short odd"):
        results.append(Variant("forward_kl", "hinton", width=width))
        results.append(Variant("mixture", "everything", width=width))
    # In place, because the logits are a shifted view, with which no gradient of its own starts alike.
    results.append(Variant("forward_kl", "inplace", width="odd"))
    # Each other divergence once, with another tile size, for rows of one tile.
    tiles = [
        Variant("jsd", kind, "fp32", "fp32", width)
        for width in WIDTHS if width.startswith("one tile") for kind in ("hinton", "everything")
    ]  # fmt: skip
    seen = {variant.divergence for variant in results}
    others = [divergence for divergence in DIVERGENCES if divergence not in seen]
    results += [
        tile._replace(divergence=divergence)
        for divergence, tile in zip(others, tiles, strict=False)
    ]
    results += tiles[len(others) :]
    results += [Variant(divergence, "hinton") for divergence in others[len(tiles) :]]
    results += _timed_variants(every_divergence=False)
    # Divergences with a separate label term; rows of several programs; sparse teachers; vocabulary shards.
    first, *more = divergences.WITH_LABELS
    results += [
        Variant(first, "everything", stage=stage) for stage in ("row", "statistics", "gradient")
    ]
    results += [Variant(divergence, "hinton", "fp32", "fp32") for divergence in more]
    results += shared_variants(["mixture"], ["wide"])
    results += [Variant("jsd", "everything", width="odd", stage="sums")]
    for kernel, (dtype, width) in itertools.product(
        ("gather", "spread"), zip(both, ("wide", "odd"), strict=True)
    ):
        results.append(Variant(kernel, "everything", dtype, dtype, width))
    results.append(Variant("mark", ""))
    results += [Variant("jsd", "measures", "fp32", "fp32"), Variant("forward_kl", "measured value")]
    results += [Variant("mixture", "measures", width="one tile of 1024")]
    results += [Variant("forward_kl", "measures", stage=stage) for stage in ("gradient", "merge")]
    everything = Variant("jsd", "everything", sharded=True)
    results += [everything._replace(stage=stage) for stage in ("statistics", "gradient")]
    return results + [everything._replace(divergence=kernel) for kernel in ("gather", "spread")]


def _timed_variants(every_divergence: bool) -> list[Variant]:
    """Timed tiles, whatever the target: what an architecture does not have is compiled with the rule's."""
    results = []
    for _, itemsize, closed_form, columns in TILES:
        dtype = "fp32" if itemsize == 4 else "bf16"
        names = [
            name
            for name, make in fastkd.DIVERGENCES.items()
            if (make().closed_form is not None) == closed_form
        ]
        for name in names if every_divergence else names[:1]:
            results.append(Variant(name, "hinton", dtype, dtype, f"timed {columns}"))
    return results


def _full() -> list[Variant]:
    both = ["fp32", "bf16"]
    kinds, widths = ["distillation", "hinton", "everything"], [*WIDTHS]
    return (
        [
            Variant(divergence, kind, dtype, dtype, width)
            for divergence, kind, dtype, width in itertools.product(
                DIVERGENCES, kinds, both, widths
            )
        ]
        + apart_variants(widths)
        + shared_variants(list(fastkd.DIVERGENCES), widths)
        + topk_variants(widths)
        + [
            variant._replace(sharded=True)
            for variant in shared_variants(["mixture", "jsd"], ["wide", "odd"])
            + topk_variants(["wide", "odd"])
        ]
    )


def _pairs() -> list[Variant]:
    both = ["fp32", "bf16"]
    results = [Variant(divergence, "hinton") for divergence in DIVERGENCES]
    for divergence in ("forward_kl", "jsd", "squared_error"):
        results.append(Variant(divergence, "distillation", "fp32", "fp32"))
    # Three sweeps, and no normalizer.
    for divergence, dtype in itertools.product(("mixture", "jsd", "squared_error"), both):
        results.append(Variant(divergence, "everything", dtype, dtype))
    for width in ("narrow", "medium", "odd"):
        results.append(Variant("forward_kl", "hinton", *both[:1] * 2, width))
        results.append(Variant("jsd", "everything", *both[1:] * 2, width))
    results += [
        Variant("forward_kl", "value"),
        Variant("jsd", "value"),
        Variant("jsd", "cross-entropy"),
    ]
    results += [
        Variant("forward_kl", "hinton", "bf16", "fp32"),
        Variant("jsd", "hinton", "fp16", "fp16"),
    ]
    results += [
        Variant(divergence, kind, width=width)
        for divergence in ("forward_kl", "jsd", "soft_cross_entropy")
        for kind in ("measures", "measured value", "measured everything")
        for width in ("one tile of 1024", "wide", "odd")
    ]  # fmt: skip
    results += [
        Variant("logprobs", kind, "fp32", "fp32", width)
        for kind in ("statistics", "gradient", "tempered statistics", "tempered gradient")
        for width in ("wide", "odd")
    ]  # fmt: skip
    results += [DRAFT, Variant("draft", "everything", "fp32", "fp32")]
    results += [Variant("draft", kind, width="odd") for kind in ("four terms", "subset")]
    results += [Variant("draft", "subset", "fp16", "bf16")]
    results += [Variant("scale", "", dtype) for dtype in DTYPES]
    for width, kind in itertools.product(WIDTHS, ("hinton", "everything")):
        if width.startswith("one tile"):
            results.append(Variant("jsd", kind, "fp32", "fp32", width))
    results += _timed_variants(every_divergence=True)
    results += apart_variants(["wide"])
    results += shared_variants(["mixture"], ["wide"]) + shared_variants(["jsd"], ["odd"])
    mark, *others = topk_variants(
        ["wide", "odd"]
    )  # of which float32 is wide here, and bfloat16 odd
    results += [mark, *others[::4], *others[3::4]]
    everything = Variant("jsd", "everything", sharded=True)
    results += [everything._replace(stage=stage) for stage in ("statistics", "gradient")]
    return results + [everything._replace(divergence=kernel) for kernel in ("gather", "spread")]


def shared_variants(divergences: Sequence[str], widths: Sequence[str]) -> list[Variant]:
    """The stages of rows that several programs share: bare in float32, and with all that a row may have."""
    results = []
    for divergence, width in itertools.product(divergences, widths):
        stages = ["statistics", "gradient"]
        if fastkd.DIVERGENCES[divergence]().closed_form is None:
            stages[1:1] = ["sums"]
        for stage in stages:
            results.append(Variant(divergence, "distillation", "fp32", "fp32", width, stage))
            results.append(Variant(divergence, "everything", "bf16", "bf16", width, stage))
    return results


def apart_variants(widths: Sequence[str]) -> list[Variant]:
    """Divergences that compare the label's token apart from the others: rows of one program, and of several."""
    results = []
    for divergence, width in itertools.product(divergences.WITH_LABELS, widths):
        results.append(Variant(divergence, "hinton", "fp32", "fp32", width))
        results.append(Variant(divergence, "everything", width=width))
        for stage in ("statistics", "gradient"):
            results.append(Variant(divergence, "everything", width=width, stage=stage))
    return results


def topk_variants(widths: Sequence[str]) -> list[Variant]:
    """The kernels of a sparse teacher: bare, and with all that a row may have."""
    results = [Variant("mark", "")]
    for kernel, kind in itertools.product(("gather", "spread"), ("distillation", "everything")):
        for dtype, width in itertools.product(("fp32", "bf16"), widths):
            results.append(Variant(kernel, kind, dtype, dtype, width))
    return results


def _launch(variant: Variant, target: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(kernel, arguments, options) of the launch that serves a variant."""
    from fastkd.kernels import draft, logprobs, measures, split
    from fastkd.kernels import launch as kernels
    from fastkd.kernels import sparse as sparse_kernels

    own = {
        "mark": sparse_kernels.mark_kernel,
        "gather": sparse_kernels.gather_kernel,
        "spread": sparse_kernels.spread_kernel,
    }
    for kernel in (
        kernels.scale_kernel, measures.merge_kernel, draft.draft_kernel,
        logprobs.logprob_statistics_kernel, logprobs.logprob_gradient_kernel, *own.values(),
    ):  # fmt: skip
        catch(kernel)
    catch(kernels.kd_kernel, variant.stage)
    architecture = target.partition(":")[2]
    device = split.Device(architecture if "gfx" in target else f"sm_{architecture}", 1, 1, True)
    kernels.device_of = lambda device_of_tensors: device
    kernels.WARP = 64 if "gfx" in target else 32
    # With four programs the widest rows have the rule's widest tiles; with more programs, narrower ones.
    shared = None if variant.stage == "row" else split.Plan(4, 2)
    kernels.plan = kernels.shard_plan = lambda *call: shared
    width = WIDTHS[variant.width]
    # Shifted as a language model shifts its logits: two strides.
    student, teacher = (
        torch.empty(2, 3, width, dtype=DTYPES[dtype])[:, :-1]
        for dtype in (variant.student, variant.teacher)
    )
    labels, numbers = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)
    shard = Shard(width, 4 * width, width, 1, None) if variant.sharded else None
    try:
        if variant.divergence == "scale":
            kernels.scale_rows_(student, numbers)
        if variant.divergence == "draft":
            _launch_draft(draft, variant.kind, student, teacher, numbers)
        if variant.divergence == "logprobs":
            _launch_logprobs(logprobs, variant.kind, width)
        if variant.divergence in own:
            _launch_topk(sparse_kernels, own, variant, student, labels, numbers, shard)
        parameters = LIMITS.get(variant.divergence, {})
        divergence = MADE[variant.divergence.split()[0]](**parameters)
        rows, options, want = {
            "distillation": (Rows(), Options(divergence), Want(True)),
            "hinton": (Rows(labels), Options(divergence, 0.5, 2.0, 2.0), Want(True)),
            "inplace": (
                Rows(labels),
                Options(divergence, 0.5, 2.0, 2.0),
                Want(True, inplace=True),
            ),
            "measures": (Rows(labels), Options(divergence, 0.5, 2.0, 2.0), Want(True)),
            "value": (Rows(labels), Options(divergence, 0.5, 2.0, 2.0), Want()),
            "cross-entropy": (Rows(labels), Options(divergence, 0.0), Want(True)),
            "everything": (
                Rows(labels, numbers, numbers, numbers, torch.ones(())),
                Options(divergence, 0.5, label_smoothing=0.1, softcap=30.0, teacher_softcap=30.0),
                Want(True, True, True),
            ),
        }[variant.kind.removeprefix("measured ")]
        if variant.kind.startswith("measure"):
            want = want._replace(parts=True, measures=True)
        options = options._replace(vocab_size=width, shard=shard)
        if shard is None:
            kernels.kd_rows(student, teacher, rows, options, want)
        else:
            _launch_shard(kernels, student, teacher, rows, options, outputs(student, teacher, want))
    except Caught as caught:
        return caught.args
    raise AssertionError("nothing was launched")


def _launch_draft(draft: Any, kind: str, student: Tensor, teacher: Tensor, numbers: Tensor) -> None:
    """Launch the kernel of a draft model's loss: four terms, or all of them, or all with half of the tokens."""
    weights = dict.fromkeys(LOSSES, 1.0)
    columns = None
    if kind == "four terms":
        weights = {name: weights[name] for name in ("forward_kl", "jsd", "cross_entropy", "tvd")}
    if kind == "subset":
        columns = torch.arange(0, student.shape[-1] - 1, 2)
        student = student[..., : len(columns)]
    terms = Terms(weights, 3.0, columns, measured=kind != "four terms")
    options = Options(fastkd.forward_kl(), vocab_size=student.shape[-1])
    rows = Rows(weight=numbers, scale=torch.ones(()))
    draft.draft_rows(student, teacher, rows, options, terms, Want(True))


def _launch_logprobs(logprobs: Any, kind: str, width: int) -> None:
    """Launch a kernel of log-probabilities."""
    logits, statistics = torch.empty(2, width), torch.empty(2, 3, dtype=torch.float64)
    tempering = Tempering()
    if "tempered" in kind:
        tempering = Tempering(0.5, 30.0, temperatures=torch.ones(2))
    if "statistics" in kind:
        logprobs.logprob_statistics(logits, tempering, True)
    else:
        logprobs.logprob_gradients(logits, tempering, statistics[:, 0], statistics[:, 1:])


def _launch_shard(kernels: Any, *given: Any) -> None:
    """The steps of one of four processes."""
    call = ShardCall(*given)
    actual = kernels.shard_statistics(call)
    call = call._replace(statistics=actual._replace(gathered=torch.stack([actual.gathered] * 4)))
    sums = kernels.shard_sums(call)
    kernels.shard_results(call._replace(sums=None if sums is None else torch.stack([sums] * 4)))


def _launch_topk(
    sparse_kernels: Any,
    own: dict[str, Any],
    variant: Variant,
    student: Tensor,
    labels: Tensor,
    numbers: Tensor,
    shard: Shard | None,
) -> None:
    """Launch one of the kernels of a sparse teacher, past those that come before it."""

    def skip(*arguments: Any, **options: Any) -> None:
        return None

    for kernel in list(own.values())[: list(own).index(variant.divergence)]:
        kernel.run = skip
    width = student.shape[-1]
    ids = torch.zeros(2, 2, 64, dtype=torch.int64)
    everything = variant.kind == "everything"
    # fastkd.backends.sparse gives every row a weight
    rows = Rows(labels, numbers, numbers, ids=ids) if everything else Rows(weight=numbers, ids=ids)
    options = Options(fastkd.forward_kl(), vocab_size=width, tail="bucket", shard=shard)
    if everything:
        options = options._replace(alpha=0.5, label_smoothing=0.1, softcap=30.0)
    events = sparse_kernels.gather_events(student, rows, options, everything)
    scale = numbers if everything else None
    sparse_kernels.spread_gradient(
        student,
        events,
        torch.ones(2, 2, 65),
        scale,
        rows,
        options,
        torch.empty(2, 2, width, dtype=student.dtype),
    )


def _measure(task: tuple[Variant, str]) -> Resources:
    torch.set_num_threads(1)
    variant, target = task
    return resources(*_launch(variant, target), target)


def _run(target: str, grid: str, cache: Path, **settings: str) -> dict[Variant, Resources]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(sys.path),
    } | settings
    command = [sys.executable, __file__, target, grid]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = map(json.loads, done.stdout.splitlines())
    return {Variant(*variant): restored(used) for variant, used in lines}


def _check(target: str, grid: str, cache: Path) -> dict[Variant, Resources]:
    actual = _run(target, grid, cache)
    assert list(actual) == variants(grid)
    spilled = [f"{variant}: {used}" for variant, used in actual.items() if _spills(variant, used)]
    assert not spilled, "\n".join(spilled)
    fused = [f"{variant}: {used.fused_sums}" for variant, used in actual.items() if used.fused_sums]
    assert not fused, "sums over lanes begin with a fused multiply-add:\n" + "\n".join(fused)
    return actual


# A thread keeps 16 or 32 columns of a narrow row from its one read to the gradient. ptxas parks some of them beside the
# branches that few rows take; without a limit of registers it parks none, but then fewer rows are in flight.
NARROW_LOCAL_BYTES = 1024


def _spills(variant: Variant, used: Resources) -> bool:
    if variant.stage == "row" and variant.kind and WIDTHS[variant.width] <= NARROW:
        return used.local_bytes > NARROW_LOCAL_BYTES
    return used.spills


# Instructions a column, all sweeps together, that sm_90 may execute at most: those of Triton 3.9 and a twentieth more.
# An H200 can issue about 77 while its memory moves the 10 bytes of a column of bfloat16 in two sweeps.
CEILINGS = {
    Variant("forward_kl", "hinton"): 47.5,
    Variant("forward_kl", "distillation", "fp32", "fp32"): 36.5,
    Variant("forward_kl", "hinton", "bf16", "fp32"): 47.5,
    Variant("forward_kl", "hinton", "fp32", "fp32", "odd"): 58.0,
    Variant("forward_kl", "inplace", width="odd"): 48.0,
    Variant("jsd", "hinton", "fp16", "fp16"): 112.0,
}


# A draft model's loss of four terms. Three launches, one per divergence, took 255, besides converting both sides to
# float32 and adding the gradients.
DRAFT, DRAFT_CEILING = Variant("draft", "four terms"), 204.0
# Log-probabilities: statistics with the entropy, and the gradient.
LOGPROBS_CEILINGS = {"statistics": 23.0, "gradient": 16.0}

# Triton's cache, which is kept between runs: its key has the source of a kernel and of all that it calls, the types and
# constants of the launch, the options, and Triton's own files.
CACHE = ROOT / "build" / "triton_aot"


# One target in every run. The others differ in registers per thread and in the chosen instructions, but not in the
# Triton code of the kernels.
def test_kernels_compile_and_keep_their_tiles_in_registers() -> None:
    actual = _check("cuda:90", "least", CACHE)
    for variant, ceiling in CEILINGS.items():
        used, with_sums = actual[variant], MADE[variant.divergence]().closed_form is None
        sweeps = used.sweeps(with_sums)
        assert sum(sweep.path for sweep in sweeps) <= ceiling * used.columns_per_thread, variant
        assert not any(sweep.barriers + sweep.shuffles for sweep in sweeps), variant
        assert used.registers <= REGISTERS[with_sums], variant
    for kind, ceiling in LOGPROBS_CEILINGS.items():
        used = actual[Variant("logprobs", kind, "fp32", "fp32")]
        (sweep,) = [loop for loop in used.loops if loop.loads]
        assert sweep.path <= ceiling * used.columns_per_thread, kind
        assert not sweep.barriers + sweep.shuffles, kind


@pytest.mark.heavy
@pytest.mark.parametrize("target", TARGETS)
def test_pairs_of_choices(target: str, tmp_path: Path) -> None:
    actual = _check(target, "pairs", tmp_path)
    if target != "cuda:90":
        return
    used = actual[DRAFT]
    statistics, *others = [loop for loop in used.loops if loop.loads]
    # The sums and the gradient each have a second loop, for rows with a log 0, which executes more.
    sweeps = [statistics, *(min(others[i : i + 2]) for i in (0, 2))]
    assert sum(sweep.path for sweep in sweeps) <= DRAFT_CEILING * used.columns_per_thread
    assert not any(sweep.barriers + sweep.shuffles for sweep in sweeps)


@pytest.mark.heavy
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant(target: str, tmp_path: Path) -> None:
    _check(target, "full", tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("release", ["3.5.1", "3.6.0"])
def test_older_tritons_compile_the_kernels(release: str, tmp_path: Path) -> None:
    """The oldest that backends.OLDEST_TRITON allows, and that of torch 2.11. What they spill is not judged."""
    folder = tmp_path / "triton"
    requirement = ["--no-deps", "--target", str(folder), f"triton=={release}"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *requirement], check=True)
    path = os.pathsep.join([str(folder), str(PACKAGE)])
    actual = _run("cuda:90", "pairs", tmp_path / "cache", PYTHONPATH=path)
    assert list(actual) == variants("pairs")


def test_every_tile_of_the_rule_is_compiled() -> None:
    from fastkd.kernels.launch import tile

    def chosen(width: int, itemsize: int, crowded: bool) -> tuple[Any, ...]:
        aligned = width % 16 == 0
        return (*tile(width, itemsize, crowded, aligned), aligned, crowded)

    rule = {
        chosen(2**power + odd, itemsize, crowded)
        for power in range(12, 20)
        for odd in (-1, 0, 1)
        for itemsize in (2, 4)
        for crowded in (False, True)
        if 2**power + odd > NARROW
    }
    compiled = {
        chosen(WIDTHS[v.width], DTYPES[v.student].itemsize, v.kind == "everything")
        for v in variants("few")
        if v.stage == "row" and v.kind
    }
    assert not rule - compiled


GROUPS = """
    import torch
    from support.triton_aot import launch_nothing
    from fastkd.divergences import jsd
    from fastkd.kernels import launch as kernels
    from fastkd.kernels import split
    from fastkd.call.contract import Options, Rows, Want

    launched = launch_nothing()
    kernels.plan = lambda *call: split.Plan(3, 16)
    arguments = Rows(), Options(jsd(), vocab_size=1024), Want(True)
    kernels.kd_rows(torch.empty(33, 1024), torch.empty(33, 1024), *arguments)
    stages = [given[-1] for _, given in launched]
    assert stages == 3 * ["statistics", "sums", "gradient"], stages
    for number, (grid, given) in enumerate(launched):
        assert grid == (16 if number < 6 else 1, 3, 1), grid
        shares = [value for value in given if isinstance(value, kernels.Split)]
        assert [s.first_row for s in shares] == [number // 3 * 16], shares
        first = launched[number % 3][1]
        assert len(given) == len(first)
        assert all(a is b or a == b for a, b in zip(given, first) if not isinstance(a, kernels.Split))
    print(len(kernels.kd_kernel.device_caches[0][0]), "kernels")
"""


def test_later_groups_are_launched_like_the_first() -> None:
    """Past Triton's own launcher, which looks up the kernel by its arguments: they are the same but for the rows."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(CACHE), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = python("-c", textwrap.dedent(GROUPS), env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "3 kernels\n"


def test_a_spill_in_a_loop_is_detected() -> None:
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R8 ;
        /*0020*/              @!P1 BRA 0x60 ;
        /*0030*/                   {inside} R4, [R2] ;
        /*0040*/               @P0 BRA.U 0x30 ;
        /*0050*/                   LDL R8, [R1] ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
    """
    for instruction, expected in (("LDG.E", False), ("LDL.LU", True)):
        (function,) = sass.functions(text.replace("{inside}", instruction))
        assert local_in_loop(function.code) == expected


if __name__ == "__main__":
    wanted = variants(sys.argv[2])
    workers = min(os.cpu_count() or 1, 8)
    # Forked, because this process has computed nothing and so has no threads, and new ones would import torch.
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        tasks = [(variant, sys.argv[1]) for variant in wanted]
        for variant, used in zip(wanted, pool.map(_measure, tasks, chunksize=2), strict=True):
            print(json.dumps([variant, used]), flush=True)
