"""Every contender on every case: verified, then timed, with its memory, bandwidth and error.

    python -m pytest bench --quick --benchmark-json=build/bench/quick.json
    python bench/tables.py build/bench/quick.json

A contender is compared with float64 on the tensors it is then timed on. If it is wrong or cannot run here, its row says
so and has no time. Triton kernels that need a GPU are verified in Triton's interpreter.

Before every timed step, fastkd's own step and the floors run on the same tensors; pytest-benchmark does not time these.
Ratios are taken within such a round, because other work of the machine slows all of a round alike. Their median is
reported.
"""

from __future__ import annotations

import functools
import gc
from statistics import median, quantiles
from typing import Any

import pytest
from cases import DTYPES, FULL, QUICK, Case, Problem, on, origin
from conftest import UNTIMED
from measure import seconds_of
from peers import Peer, anchor, failure, obstacle, of_case
from pytest_benchmark.fixture import BenchmarkFixture
from verify import Verdicts, in_the_interpreter

SECONDS = {True: 0.5, False: 4.0}  # for all rounds of a row, in a quick run and in a full one
ROUNDS = (3, 200)
FEW = ("eager", "torch.compile")


def contenders(case: Case) -> list[Peer]:
    everyone = of_case(case.form, case.divergence, DTYPES[case.dtype], case.device)
    if not case.few:
        return everyone
    return [peer for peer in everyone if peer.name in FEW or peer == anchor(case.form, case.device)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    listed = QUICK if options.quick else FULL
    rows = [
        pytest.param(case, peer, id=f"{case}-{peer.name}")
        for device in options.device
        for case in on(device, listed)
        for peer in contenders(case)
    ]
    metafunc.parametrize(("case", "peer"), rows)


@functools.lru_cache(maxsize=1)  # rows come case by case, so the tensors of one case are enough
def problem_of(case: Case) -> Problem:
    gc.freeze()  # searching the loaded packages for garbage takes half a second for each peak
    return Problem(case)


@functools.cache
def interpreted(quick: bool) -> Verdicts:
    """The verdicts for the whole run, from one process."""
    return in_the_interpreter(
        f"{case.form}:{case.divergence}" for case in (QUICK if quick else FULL)
    )


def describe(case: Case, peer: Peer) -> dict[str, Any]:
    """The case and the contender of a row."""
    return {**case._asdict(), "data": origin(case), "contender": peer.name, "note": peer.note}


def leave_out(row: dict[str, Any], why: str, errors: Any = None) -> None:
    """Record a row without a time. The run fails if fastkd is wrong; a wrong peer is a result."""
    UNTIMED.append(row | {"why": why, "errors": errors})
    if row["contender"].startswith("fastkd") and why.startswith(("wrong", "fails")):
        pytest.fail(why)
    pytest.skip(why)


def in_rounds(
    benchmark: BenchmarkFixture, problem: Problem, peer: Peer, call: Any, seconds: float
) -> dict[str, list[float]]:
    """Seconds of the contender, fastkd and the floors in every round."""
    case = problem.case
    ours = anchor(case.form, case.device)
    our_call = call if peer == ours else problem.make(ours)
    floors = problem.floors()
    beside: dict[str, list[float]] = {name: [] for name in ("fastkd", *floors)}

    def before() -> None:
        problem.clean_up(peer.in_place)
        beside["fastkd"].append(problem.seconds(ours, our_call))
        for name, floor in floors.items():
            beside[name].append(seconds_of(floor, case.device))

    once = seconds_of(before) + problem.seconds(peer, call)
    rounds = min(max(ROUNDS[0], int(seconds / once)), ROUNDS[1])
    benchmark.pedantic(
        lambda: (problem.step(call, peer.in_place), problem.wait()),
        setup=before,
        rounds=rounds,
        warmup_rounds=1,
    )
    problem.clean_up(peer.in_place)
    times = list(benchmark.stats.stats.data)
    return {"contender": times, **{name: each[-rounds:] for name, each in beside.items()}}


def quartiles(above: list[float], below: list[float]) -> list[float]:
    """The quartiles of the ratios within rounds."""
    return quantiles([a / b for a, b in zip(above, below, strict=True)], n=4, method="inclusive")


def test_row(
    request: pytest.FixtureRequest, benchmark: BenchmarkFixture, case: Case, peer: Peer
) -> None:
    quick = request.config.option.quick
    benchmark.group = str(case)
    row = describe(case, peer)
    if (why := obstacle(peer, case.device)) is not None:
        verdict = {}
        if peer.triton and why == "needs a GPU":
            verdict = interpreted(quick).get(f"{case.form}:{case.divergence}:{peer.name}", {})
        leave_out(row, verdict.get("why") or why, verdict.get("errors"))

    problem = problem_of(case)
    try:
        call = problem.make(peer)
        errors = problem.errors(peer, call)
    except Exception as error:  # whatever a package raises here becomes a cell of the table
        if peer.package == "fastkd":
            raise
        problem.clean_up()
        return leave_out(row, failure(error))
    if (why := problem.verdict(peer, errors)) is not None:
        leave_out(row, why, list(errors))

    peak = problem.peak(peer, call)
    seconds = in_rounds(benchmark, problem, peer, call, SECONDS[quick])
    floor = "products" if case.form == "linear" else "memory"
    bandwidth = 3 * problem.tensors.leaves[-1].nbytes / median(seconds["memory"])
    time = median(seconds["contender"])
    benchmark.extra_info.update(
        row,
        seconds=time,
        times_fastkd=quartiles(seconds["contender"], seconds["fastkd"])[1],
        floor=floor,
        times_floor=quartiles(seconds["contender"], seconds[floor]),
        peak=peak,
        gradients=problem.written(),
        moved=problem.moved(),
        bandwidth=bandwidth,
        share=problem.moved() / time / bandwidth,
        errors=list(errors),
        bound=list(problem.truth(peer.instead).bound),
    )
