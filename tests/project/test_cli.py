"""python -m fastkd: info, doctor and check, as a user runs them; and the page about new divergences."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interpreters import python
from support.paths import PACKAGE, ROOT

import fastkd
from fastkd.__main__ import main
from fastkd.backends import registry
from fastkd.call.contract import Result
from fastkd.teachers.cache import CacheWriter
from fastkd.tools import doctor, info
from fastkd.tools.check import check

PAGE = ROOT / "docs" / "adding-a-divergence.md"


def run(
    *arguments: str, cwd: Path = ROOT, code: int = 0, forked: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter, by default one that need not import torch, and assert its exit code."""
    results = {k: v for k, v in os.environ.items() if not k.startswith("FASTKD_")}
    del results[
        "TRITON_INTERPRET"
    ]  # Triton's kernels have their own tests and would take most of the time here
    path = os.pathsep.join([str(PACKAGE), results.get("PYTHONPATH", "")])
    settings: dict[str, Any] = {
        "cwd": cwd,
        "env": {**results, "PYTHONPATH": path, **environment},
        "timeout": 1500,
    }
    if forked:
        done = python(*arguments, **settings)
    else:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, **settings)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return run("-m", "fastkd", *arguments, **options)


def test_info_as_json() -> None:
    actual = json.loads(command("info", "--json", forked=False, FASTKD_STRICT="1").stdout)
    assert list(actual) == [
        "versions",
        "machine",
        "native",
        "backends",
        "serves",
        "adapters",
        "environment",
    ]
    assert actual["versions"]["fastkd"] == fastkd.__version__
    assert set(actual["backends"]) == set(fastkd.available_backends())
    assert actual["backends"]["reference"]["devices"] == info.devices()
    for backend in actual["backends"].values():
        assert backend["devices"] or (backend["reason"] and backend["remedy"])
    assert actual["environment"]["FASTKD_STRICT"]["value"] == "1"
    assert actual["environment"]["FASTKD_BACKEND"]["value"] is None


PIPED = ("info", "info --json", "--help", "cache info {cache}", "cache info --json {cache}")
# Each command as `python -m fastkd` runs it, in a forked process that need not import torch again.
EACH_PIPED = """
import json, os, runpy, sys
import fastkd.__main__, fastkd.tools.cache, fastkd.tools.info
codes = []
for arguments in json.loads(sys.argv[2]):
    child = os.fork()
    if not child:
        sys.argv = ["fastkd", *arguments]
        del sys.modules["fastkd.__main__"]
        runpy.run_module("fastkd", run_name="__main__", alter_sys=True)
        os._exit(99)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
with open(sys.argv[1], "w") as file:
    json.dump(codes, file)
"""


def test_a_pipe_that_is_closed_ends_a_command_quietly(tmp_path: Path) -> None:
    """A closed pipe as in `python -m fastkd info --json | head -1`; here nothing at all is read."""
    cache = tmp_path / "cache"
    with CacheWriter(cache, kind="dense", vocab_size=2) as writer:
        writer.append(torch.tensor([0]), logits=torch.zeros(1, 2))
    commands = [arguments.format(cache=cache).split() for arguments in PIPED]
    codes = tmp_path / "codes"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", EACH_PIPED, str(codes), json.dumps(commands)],
        cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    # argparse ignores that nobody reads its help.
    wanted = {arguments: 0 if arguments == "--help" else 141 for arguments in PIPED}
    assert dict(zip(PIPED, json.loads(codes.read_text()), strict=True)) == wanted


def test_info_as_text() -> None:
    output = command("info", FASTKD_BACKEND="reference").stdout
    for what in (fastkd.__version__, *fastkd.available_backends(), *info.SWITCHES):
        assert what in output
    assert re.search(r"FASTKD_BACKEND +reference ", output)


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (None, "no record"),
        ({"native": False, "reason": "no C++ compiler", "remedy": "Install one"}, "no C++ compiler. Install one"),
        ({"native": True, "compiler": "g++ 12", "flags": ["-O3"], "instruction_sets": {"avx2": ["-mavx2"]}}, "-mavx2"),
    ],
)  # fmt: skip
def test_info_says_how_the_extension_was_built(build: dict[str, Any] | None, line: str) -> None:
    actual = info.collect()
    actual["native"]["build"] = build
    assert line in info.text(actual)


def test_info_without_triton_and_without_the_extension() -> None:
    absent = "import sys; sys.modules.update({'triton': None, 'fastkd._C': None})"
    absent += "; import importlib.util as u; find = u.find_spec"
    absent += "; u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)"
    output = run(
        "-c", f"{absent}\nfrom fastkd.__main__ import main\nsys.exit(main(['info']))"
    ).stdout
    assert re.search(r"triton +not installed", output)
    assert "the native extension is missing" in output


def test_doctor_finds_every_backend_right() -> None:
    # FASTKD_BACKEND would make every backend the reference.
    diagnosis = json.loads(command("doctor", "--json", FASTKD_BACKEND="reference").stdout)
    assert diagnosis["ok"]
    judged = {verdict["backend"] for verdict in diagnosis["verdicts"]}
    skipped = {entry["backend"] for entry in diagnosis["not_run"]}
    assert judged | skipped == set(fastkd.available_backends())
    assert {verdict["divergence"] for verdict in diagnosis["verdicts"]} >= set(fastkd.DIVERGENCES)
    for verdict in diagnosis["verdicts"]:
        assert set(verdict["error_over_bar"]) == {"float32", "bfloat16", "float16"}
        assert max(verdict["error_over_bar"].values()) <= 1.0
    assert "cpu" in diagnosis["auto"]


@pytest.mark.heavy
def test_doctor_as_text() -> None:
    output = command("doctor", "--backend", "reference").stdout
    assert re.search(r"forward_kl +ok +0\.\d\d", output)
    assert output.endswith("all backends passed\n")


PLANT = """
import sys
from fastkd.backends import registry
from fastkd.__main__ import main
module = registry.load("cpu")
healthy = module.kd_rows
def kd_rows(student, teacher, rows, options, want):
    result = healthy(student, teacher, rows, options, want)
    if options.divergence.name == "jsd":
        result.loss.mul_(1 + 1e-4)
    return result
module.kd_rows = kd_rows
sys.exit(main(["doctor", "--backend", "cpu"]))
"""


def test_doctor_exits_with_1_on_a_planted_fault() -> None:
    if fastkd.available_backends()["cpu"] is not None:
        pytest.skip("the bar is the error of the reference itself, and no other backend runs here")
    output = run("-c", PLANT, code=1).stdout
    assert re.search(r"jsd +FAIL ", output) and re.search(r"forward_kl +ok ", output)
    (line,) = [line for line in output.splitlines() if line.startswith("FAIL")]
    assert re.match(r"FAIL cpu \(cpu\), jsd: float\S+, .*: error of the loss \S+, bar \d", line)
    assert "all backends passed" not in output


def _scaled_value(result: Result) -> None:
    result.loss.mul_(1 + 1e-4)  # too small for a user to notice, but far above the bar


def _scaled_gradient(result: Result) -> None:
    if result.student_gradient is not None:
        result.student_gradient[..., -1].mul_(
            1 + 1e-2
        )  # one column, by more than bfloat16's rounding


def _poisoned(result: Result) -> None:
    result.loss[-1] = torch.nan


def _raised(result: Result) -> None:
    raise RuntimeError("launch failed")


@pytest.mark.parametrize(
    ("backend", "fault", "said"),
    [
        ("cpu", _scaled_value, r"float.*: error of the loss \S+, bar \d"),
        ("cpu", _scaled_gradient, r"float.*: error of the student's gradient \S+, bar \d"),
        ("cpu", _poisoned, r"float32.*: error of the loss nan, bar \d"),
        ("reference", _raised, r"float32.*: RuntimeError: launch failed"),
    ],
)
def test_doctor_describes_a_planted_fault(
    backend: str, fault: Callable[[Result], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fastkd.available_backends()[backend] is not None:
        pytest.skip(f"backend {backend!r} does not run here")
    truth = doctor.Truth()
    # This also computes the exact results before the reference is made faulty.
    assert doctor.judge(fastkd.jsd(), backend, truth=truth).failure is None
    module = registry.load(backend)
    healthy = module.kd_rows

    def kd_rows(*arguments: Any) -> Result:
        result = healthy(*arguments)
        fault(result)
        return result

    monkeypatch.setattr(module, "kd_rows", kd_rows)
    verdict = doctor.judge(fastkd.jsd(), backend, truth=truth)
    assert re.match(said, str(verdict.failure)), verdict.failure


def test_doctor_of_a_backend_that_cannot_run() -> None:
    absent = "import sys; sys.modules['fastkd._C'] = None\nfrom fastkd.__main__ import main\n"
    output = run("-c", absent + "sys.exit(main(['doctor', '--backend', 'cpu']))", code=1).stdout
    assert "cpu was not run: the native extension is missing" in output
    assert "all backends passed" not in output


HEADER = "import fastkd\nfrom torch import exp, log1p, where\n\n"
RIGHT = "def f(p, q, log_p, log_q):\n    return q * (log_q - log_p), q * (log_q - log_p) + q\n\n"


@pytest.mark.parametrize(
    ("definition", "arguments", "said"),
    [
        (RIGHT, "degree=1.0", "all checks passed"),
        (RIGHT, "degree=1.0, closed_form=fastkd.ClosedForm(reverse=1.0)", "closed form: gives the sums"),
        (RIGHT, "", "Set degree=1, which fits"),
        (RIGHT, "degree=2.0", "FAIL  degree: .* degree=1 fits"),
        (RIGHT, "degree=1.0, closed_form=fastkd.ClosedForm(forward=1.0)", "FAIL  closed form: its sum of phi"),
        # the derivative lacks q
        (RIGHT.replace(" + q", ""), "degree=1.0", "FAIL  g: is not d phi / d log q at .* it is .* the derivative is"),
        # minimal where the student is as far from the teacher as possible
        ("def f(p, q, log_p, log_q):\n    return -p * (log_p - log_q), p\n\n", "degree=1.0", "FAIL  minimum"),
        # 0 / 0 where both underflow
        (
            "def f(p, q, log_p, log_q):\n    t = (p - q) / (p + q)\n    return (p - q) * t, -q * t * (2.0 + t)\n\n",
            "degree=1.0",
            "FAIL  p and q underflow: the loss is NaN in float32",
        ),
        ("def f(p, q, log_p, log_q):\n    return p\n\n", "", "FAIL  definition: .* does not return"),
        ("def f(p, q):\n    return p, q\n\n", "", "FAIL  definition: .* TypeError"),
    ],
)  # fmt: skip
def test_check(
    tmp_path: Path,
    definition: str,
    arguments: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = HEADER + definition + f"mine = fastkd.Divergence('mine', f, {arguments})\n"
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.delenv(
        "TRITON_INTERPRET", raising=False
    )  # tests/backends/triton/test_triton.py runs it
    assert main(["check", "mine:mine"]) == (1 if said.startswith("FAIL") else 0)
    printed = capsys.readouterr().out
    assert re.search(said, printed), printed


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("mine", "is not MODULE:NAME"),
        ("mine.py:f", "is not MODULE:NAME"),
        ("nowhere:f", "there is no module 'nowhere'"),
        ("broken:f", "importing 'broken' failed: .*absent"),
        ("mine:divergense", "has no 'divergense'; did you mean 'divergence'"),
        ("mine:f", "needs arguments"),
        ("mine:number", "is a int, not a"),
        ("mine:wrong", r"wrong\(\) is a int"),
        ("mine:failing", r"failing\(\) failed: ValueError: no \(line 7 of mine.py\)"),
    ],
)
def test_check_of_a_bad_target(
    tmp_path: Path, target: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    (tmp_path / "broken.py").write_text("import absent\n")
    (tmp_path / "mine.py").write_text(
        "import fastkd\nnumber = 3\ndivergence = fastkd.jsd()\ndef f(p, q, log_p, log_q): return p, q\n"
        "def wrong(): return 3\ndef failing():\n    raise ValueError('no')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(["check", target])
    assert stopped.value.code == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("name", fastkd.DIVERGENCES)
def test_check_of_the_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(
        "TRITON_INTERPRET", raising=False
    )  # tests/backends/triton/test_triton.py runs it
    report = check(fastkd.DIVERGENCES[name]())
    assert report.ok, "\n".join(report.lines)


def blocks() -> dict[str, str]:
    """The page's Python blocks by file name; "" is the script."""
    assert PAGE.is_file()
    results: dict[str, str] = {}
    for title, body in re.findall(r"```python(?: title=(\S+))?\n(.*?)```", PAGE.read_text(), re.S):
        results[title] = results.get(title, "") + body + "\n\n"
    return results


def test_the_page_on_a_user_defined_divergence(tmp_path: Path) -> None:
    (tmp_path / "my_losses.py").write_text(blocks()["my_losses.py"])
    (tmp_path / "use.py").write_text(blocks()[""])
    output = command("check", "my_losses:triangular", cwd=tmp_path).stdout
    shown = re.findall(r"^  ok    .*$", PAGE.read_text(), re.M)
    assert len(shown) > 2
    for line in shown:  # the page shows the real output
        assert line in output
    command("check", "my_losses:tsallis", cwd=tmp_path)
    assert re.search(r"\d\.\d{3} \(4, 7, 1000\)", run("use.py", cwd=tmp_path).stdout)


def test_the_page_on_a_new_divergence_of_the_table(tmp_path: Path) -> None:
    """csrc/generate.py accepts the page's function, and the published formula agrees with it."""
    if not (ROOT / "csrc" / "generate.py").is_file():
        pytest.skip("there is no checkout around these tests")
    text = blocks()
    source = (ROOT / "fastkd" / "divergences.py").read_text() + text["fastkd/divergences.py"]
    source, rows = re.subn(
        r"(DEFINITIONS: .*?)\n\)", r"\1\n    _triangular,\n)", source, count=1, flags=re.S
    )
    assert rows == 1
    (tmp_path / "probe.py").write_text(
        "import sys, torch, fastkd\n"
        "from torch import Tensor, abs, exp, where\n"
        "from fastkd import Divergence\n"
        + text["fastkd/divergences.py"]
        + "mine = triangular()\n"
        + text["tests/support/oracles.py"]
        + f"sys.path.insert(0, {str(ROOT / 'csrc')!r})\n"
        "import generate\n"
        "assert 'X(triangular)' in generate.header(open('divergences.txt').read())\n"
        "s, t = torch.randn(2, 3, 50, dtype=torch.float64)\n"
        "formula = triangular(t.log_softmax(-1), s.log_softmax(-1)).sum(-1)\n"
        "found = fastkd.kd_loss(s, t, divergence=mine, reduction='none')\n"
        "assert torch.allclose(found, formula, rtol=1e-12), (found, formula)\n"
    )  # fmt: skip
    (tmp_path / "divergences.txt").write_text(source)
    run("probe.py", cwd=tmp_path)
