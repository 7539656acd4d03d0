"""The benchmark suite: wrong contenders are detected and not timed, figures are right, and a regression fails."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import ROOT
from torch import Tensor

BENCH = ROOT / "bench"
sys.path += [
    str(BENCH),
    str(BENCH / "studies"),
]  # appended after tests/, which has modules of the same names

import cases  # noqa: E402 (from bench/)
import compare  # noqa: E402 (from bench/)
import measure  # noqa: E402 (from bench/)
import peers  # noqa: E402 (from bench/)
import study  # noqa: E402 (from bench/studies/)
import tables  # noqa: E402 (from bench/)
import verify  # noqa: E402 (from bench/)

TINY = {"rows": 6, "vocabulary": 1_037}  # an unaligned row; hidden states are 16 wide
COMPILING = ("torch.compile", "Liger chunked JSD")
SLOW = (*COMPILING, "Model-Optimizer")  # these take seconds each to compile or to import

# Correct contenders, and one for each way in which published losses are wrong.
PLANTED = """
import cases
import peers
from peers import Peer, eager_rows, mean_of

def planted(factor):
    def make(loss, dtype):
        right = mean_of(eager_rows(loss, dtype))
        return lambda student, teacher: factor * right(student, teacher)
    return make

def detached(loss, dtype):  # the right value, and another gradient
    right = mean_of(eager_rows(loss, dtype))
    return lambda s, t: right(s.detach(), t) + 0 * s.sum() + (s - s.detach()).sum() / s.numel()

def raises(loss, dtype):
    raise RuntimeError("no kernel image")

cases.QUICK[:] = [cases.Case("logits", "forward_kl", 64, 8_192)]
peers.PEERS[:] = [p for p in peers.PEERS if p.name in ("fastkd (cpu)", "eager", "Liger KLDiv")] + [
    Peer("wrong sign", "logits", planted(-1)),
    Peer("mean over V", "logits", planted(1 / 8192)),
    Peer("one percent off", "logits", planted(1.01)),
    Peer("wrong gradient", "logits", detached),
    Peer("raises", "logits", raises),
    Peer("fastkd (planted)", "logits", planted(-1), package="fastkd"),
]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of the suite on one small case that includes wrong contenders: its file, and its process."""
    folder = tmp_path_factory.mktemp("bench")
    # Another test covers the interpreter's part of a run.
    (folder / "planted.py").write_text(
        PLANTED + "import verify\nverify.in_the_interpreter = lambda forms: {}\n"
    )
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--quick", "--threads", "1"]
    command += ["-p", "planted", "-p", "no:cacheprovider", "--device", "cpu"]
    path = os.pathsep.join([str(folder), str(BENCH), str(ROOT), os.environ.get("PYTHONPATH", "")])
    # With these variables of pytest-xdist set, pytest-benchmark measures nothing.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, f"--benchmark-json={folder / 'run.json'}"],
        cwd=ROOT,
        env={**alone, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (folder / "run.json").exists(), done.stdout + done.stderr
    return folder / "run.json", done


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a run's file with changed content."""
    actual = json.loads(path.read_text())
    change(actual)
    copy = path.with_name("changed.json")
    copy.write_text(json.dumps(actual))
    return copy


def test_a_wrong_contender_gets_a_marked_row_without_a_time(run: Any) -> None:
    path, done = run
    actual = tables.load(path)
    assert {row["contender"] for row in actual.timed} == {"fastkd (cpu)", "eager"}
    why = {row["contender"]: row["why"] for row in actual.untimed}
    assert why.pop("Liger KLDiv") == "needs a GPU"
    assert why.pop("raises") == "fails: RuntimeError: no kernel image"
    assert why.pop("wrong gradient").startswith("wrong: gradient is")
    for name in ("wrong sign", "mean over V", "one percent off", "fastkd (planted)"):
        assert why.pop(name).startswith("wrong: loss is"), name
    assert not why
    # For a peer a wrong loss is a result; fastkd's must be right.
    assert done.returncode == 1 and "1 failed, 2 passed, 6 skipped" in done.stdout


def test_a_row_has_time_memory_bandwidth_and_error(run: Any) -> None:
    path, _ = run
    by_name = {row["contender"]: row for row in tables.load(path).timed}
    tensor = 64 * 8_192 * 4
    for row in by_name.values():
        assert row["moved"] == 3 * tensor and row["gradients"] == tensor
        assert row["seconds"] > 0 and row["bandwidth"] > 0
        assert row["share"] == pytest.approx(row["moved"] / row["seconds"] / row["bandwidth"])
        lower, middle, upper = row["times_floor"]
        assert 0 < lower <= middle <= upper
        assert all(0 <= e <= b for e, b in zip(row["errors"], row["bound"], strict=True))
    # The gradient alone for fastkd; eager PyTorch also has temporaries.
    assert by_name["fastkd (cpu)"]["peak"] == pytest.approx(tensor, rel=0.3)
    assert by_name["eager"]["peak"] > 3 * tensor
    assert all(
        row["times_fastkd"] > 0 for row in by_name.values()
    )  # no test checks which one is faster


def test_a_run_records_machine_versions_and_commit(run: Any) -> None:
    path, _ = run
    about = tables.load(path).about
    assert {"commit", "date", "CPU", "cores", "threads", "load average at the start"} <= set(about)
    assert about["threads"] == "1"
    assert f"torch {torch.__version__}" in about["versions"] and "liger-kernel" in about["versions"]


def of_peers() -> list[Any]:
    rows = []
    for peer in peers.PEERS:
        for divergence in peer.divergences or ("forward_kl", "hellinger"):
            marks = [pytest.mark.heavy] if peer.name in SLOW else []
            rows.append(pytest.param(peer, divergence, id=f"{peer.name}-{divergence}", marks=marks))
    return rows


@pytest.mark.parametrize(("peer", "divergence"), of_peers())
def test_every_peer_is_right_or_says_why_it_cannot_run(peer: peers.Peer, divergence: str) -> None:
    if (why := peers.obstacle(peer, "cpu")) is not None:
        assert why in ("needs a GPU", "not installed") or "TRITON" in why or "logits are on" in why
        return
    linear = peer.form == "linear"
    # In low precision peers differ: TRL's losses on logits stay in bfloat16.
    for dtype in ("float32", "bfloat16"):
        case = cases.Case(peer.form, divergence, **TINY, dtype=dtype, hidden=16 * linear)
        problem = cases.Problem(case)
        try:
            call = problem.make(peer)
        except ImportError as error:
            pytest.skip(str(error))
        assert problem.verdict(peer, problem.errors(peer, call)) is None
        if peer.name in COMPILING:
            break


@pytest.mark.heavy
def test_triton_kernels_are_verified_in_the_interpreter() -> None:
    forms = [f"logits:{d}" for d in ("forward_kl", "jsd", "tvd")] + ["linear:jsd"]
    verdicts = verify.in_the_interpreter(forms)
    assert {key.split(":")[2] for key in verdicts} >= {"fastkd (triton)"}
    for name, actual in verdicts.items():
        assert actual["why"] is None, (name, actual)
        assert max(actual["errors"]) < 1e-5


@pytest.mark.parametrize("form", ["logits", "linear"])
def test_the_exact_result_matches_the_formula(form: str) -> None:
    case = cases.Case(form, "jsd", 70, 301, hidden=16 * (form == "linear"))  # a block of 64, and 6
    problem = cases.Problem(case)
    leaves = [x.detach().double().requires_grad_() for x in problem.tensors.leaves]
    others = [x.double() for x in problem.tensors.others]
    s, t = leaves[0], others[0]
    if form == "linear":
        s, t = s @ leaves[1].T, t @ others[1].T
    p, q = t.softmax(-1), s.softmax(-1)
    m = (p + q) / 2
    loss = ((p * (p / m).log() + q * (q / m).log()) / 2).sum(-1).mean()
    loss.backward()
    exact, bound = problem.truth()
    assert float(exact.rows.mean()) == pytest.approx(loss.item(), rel=1e-12)
    assert cases.gap([x.grad for x in leaves], exact.gradients) < 1e-12
    assert max(bound) < 1e-4  # float32's bar: an error of 1 % is far outside


def test_a_nan_is_wrong() -> None:
    problem = cases.Problem(cases.Case("logits", "jsd", 4, 65))
    eager = next(peer for peer in peers.PEERS if peer.name == "eager")
    assert problem.verdict(eager, cases.Errors(math.nan, 0.0))
    assert problem.verdict(eager, cases.Errors(0.0, math.nan))
    assert problem.verdict(eager, cases.Errors(0.0, 0.0)) is None


def test_the_peak_includes_freed_allocations() -> None:
    # Below the 32 MiB from which the C library always maps new memory: freed memory stays resident, and must not hide
    # later allocations.
    size = 24 * 2**20  # bytes
    for _ in range(3):
        torch.ones(size // 4)
    kept: list[Tensor] = []

    def run() -> None:
        kept.append(torch.ones(size // 4))
        torch.ones(size // 4)  # freed at once, but part of the peak

    peak = measure.peak_extra(run)
    assert peak == pytest.approx(2 * size, rel=0.03)
    assert measure.peak_extra(lambda: None) < 2**20


@pytest.fixture
def unpoisoned_memory() -> Iterator[None]:
    """Turn off poisoning, which would make untouched buffers resident."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.usefixtures("unpoisoned_memory")
def test_the_peak_equals_that_of_a_separate_process() -> None:
    import memory

    case = {"divergence": "forward_kl", "layout": "contiguous", "shape": (64, 32_768)}
    case |= {"dtype": "float32", "contender": "fastkd (cpu)"}
    alone = measure.in_a_process(memory.measure, case, threads=1)["peak"]
    problem = cases.Problem(cases.Case("logits", "forward_kl", 64, 32_768))
    actual = peers.anchor("logits", "cpu")
    call = problem.make(actual)
    problem.errors(
        actual, call
    )  # the float64 copies are freed, and must neither count nor hide anything
    peak = problem.peak(actual, call)
    assert peak / (64 * 32_768 * 4) == pytest.approx(alone, rel=0.05)


def test_fits_recover_a_slope() -> None:
    sizes = [2**i for i in range(10, 16)]
    for slope in (0.0, 0.5, 1.0, 2.0):
        actual = tables.fit(sizes, [3e-5 * n**slope for n in sizes])
        assert actual is not None
        assert actual.slope == pytest.approx(slope, abs=1e-9) and actual.off < 1e-9
    bent = tables.fit(
        sizes, [1e-3 + 1e-6 * n for n in sizes]
    )  # a constant at first, then proportional
    assert bent is not None and 0.3 < bent.slope < 1 and bent.off > 0.1
    assert tables.fit(sizes, [0.0, *sizes[1:]]) is None


def add_sizes(found: dict[str, Any]) -> None:
    """Add rows at other sizes to a run, with time proportional to V and memory to its square root."""
    for row in list(found["benchmarks"]):
        for times in (2, 4, 8):
            info = {**row["extra_info"], "few": True}
            info["vocabulary"] *= times
            info["moved"] *= times
            info["seconds"] *= times
            info["peak"] *= times**0.5
            found["benchmarks"].append({**row, "extra_info": info})


def test_tables_and_plots_of_a_run(
    run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed(run[0], add_sizes)
    monkeypatch.setattr(sys, "argv", ["tables.py", str(path)])
    tables.main()
    page = path.with_suffix(".md").read_text()
    lines = page.splitlines()
    header = "**forward KL on logits: 64 x 8,192, float32, random, cpu**"
    table = lines[lines.index(header) + 2 :]
    names = [line.split(" | ")[0].removeprefix("| ") for line in table[:11]]
    assert names[2:4] == ["fastkd (cpu)", "eager"]  # the fastest contender comes first
    assert "| wrong sign | wrong: loss is" in page and "| Liger KLDiv | needs a GPU |" in page
    growth = {line.split(" | ")[3]: line for line in lines if "time against V" in line}
    assert growth["eager"].split(" | ")[4] == "1.00"
    memory = {line.split(" | ")[3]: line for line in lines if "memory against V" in line}
    assert memory["eager"].split(" | ")[4] == "0.50"
    assert all(line.count(" | ") == 8 for line in table[:3])
    drawn = [name for name in lines if name.startswith("![")]
    assert len(drawn) == 4  # time and memory against V, bandwidth, errors
    for line in drawn:
        picture = path.with_name(line.partition("(")[2].rstrip(")"))
        assert picture.stat().st_size > 5_000 and picture.with_suffix(".png").exists()
        assert "fastkd" in picture.read_text()
    assert "needs a GPU" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["tables.py", str(path), "--readme"])
    tables.main()
    short = capsys.readouterr().out
    assert short.startswith("|  | ms |") and "| eager |" in short
    assert "wrong sign | wrong: loss is" in short and "| Liger KLDiv | needs a GPU |" in short


def test_a_file_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"other.json is not a run of the suite"):
        tables.load(path)


def test_studies_use_the_suites_contenders() -> None:
    problem = cases.Problem(
        cases.Case("logits", "forward_kl", 4, 65), peers.published("forward_kl")
    )
    names = ("eager", "fastkd (cpu)", "fastkd (cpu, in place)", "Liger", "nobody")
    actual = study.contenders(problem, names)
    assert list(actual) == ["eager", "fastkd", "fastkd in place"]  # Liger's needs a GPU
    for peer, call in actual.values():
        assert problem.verdict(peer, problem.errors(peer, call)) is None  # at temperature 2


def test_another_packages_loss_takes_a_temperature() -> None:
    case = cases.Case("logits", "forward_kl", *TINY.values())
    problem = cases.Problem(case, peers.published("forward_kl"))
    trl = next(peer for peer in peers.PEERS if peer.name == "TRL generalized_jsd_loss")
    assert problem.verdict(trl, problem.errors(trl, problem.make(trl))) is None
    at_1 = trl.make(peers.loss_of("forward_kl"), torch.float32)
    assert problem.verdict(trl, problem.errors(trl, at_1))


def row_of_fastkd(found: dict[str, Any]) -> dict[str, Any]:
    return next(
        row["extra_info"]
        for row in found["benchmarks"]
        if row["extra_info"]["contender"] == "fastkd (cpu)"
    )


def compared(monkeypatch: pytest.MonkeyPatch, before: Path, after: Path, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compare.py", str(before), str(after), *options])
    return compare.main()


def slow_down(found: dict[str, Any], times: float = 1.3) -> None:
    row = row_of_fastkd(found)
    row["times_floor"] = [times * row["times_floor"][2] + x for x in (0.0, 0.1, 0.2)]


def use_more_memory(found: dict[str, Any]) -> None:
    row_of_fastkd(found)["peak"] += 5 * 2**20


def raise_errors(found: dict[str, Any]) -> None:
    row_of_fastkd(found)["errors"][1] += 1e-5


def remove_rows(found: dict[str, Any]) -> None:
    found["benchmarks"] = [
        row for row in found["benchmarks"] if row["extra_info"]["contender"] != "fastkd (cpu)"
    ]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (slow_down, "times the floor"),
        (use_more_memory, "peak"),
        (raise_errors, "gradient"),
        (remove_rows, "timed"),
    ],
)
def test_a_regression_fails_and_the_message_names_it(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], None], word: str,
) -> None:  # fmt: skip
    before = run[0]
    assert compared(monkeypatch, before, changed(before, change), "--fail", "10") == 1
    output = capsys.readouterr().out
    assert word in output and "1 regressions in 1 rows of fastkd" in output


def test_equal_runs_and_improvements_pass(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run[0]
    assert compared(monkeypatch, before, before) == 0
    # A limit above the change, and the opposite change.
    after = changed(before, slow_down)
    assert compared(monkeypatch, before, after, "--fail", "1000") == 0
    assert compared(monkeypatch, after, before) == 0

    def scatter_times(found: dict[str, Any]) -> None:
        row = row_of_fastkd(found)
        row["times_floor"][1] *= 1.3
        row["times_floor"][2] *= 2

    capsys.readouterr()
    assert compared(monkeypatch, before, changed(before, scatter_times)) == 0
    assert "within the scatter" in capsys.readouterr().out


def set_error_to_nan(found: dict[str, Any]) -> None:
    row_of_fastkd(found)["errors"][0] = math.nan


def test_an_error_that_is_nan_fails(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(monkeypatch, run[0], changed(run[0], set_error_to_nan)) == 1


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"untimed": []}'])
def test_unreadable_runs_are_refused(
    text: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The exit code differs from 1, a regression's."""
    path = tmp_path / "before.json"
    if text is not None:
        path.write_text(text)
    assert compared(monkeypatch, path, path) == 2
    assert str(path) in capsys.readouterr().err


def test_runs_without_fastkd_are_refused(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = changed(run[0], remove_rows)
    assert compared(monkeypatch, before, run[0]) == 2
    assert "no timed row of fastkd" in capsys.readouterr().err


def test_runs_of_different_machines_are_refused(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def move_machine(found: dict[str, Any]) -> None:
        found["machine_info"]["fastkd"]["CPU"] = "another"

    after = changed(run[0], move_machine)
    assert compared(monkeypatch, run[0], after) == 2
    output = capsys.readouterr().err
    assert "CPU" in output and "another after" in output and "--anyway" in output
    assert compared(monkeypatch, run[0], after, "--anyway") == 0
