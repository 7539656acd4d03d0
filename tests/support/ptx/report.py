"""Runs the project's tests of GPU kernels on the kernels' PTX, and prints a table of what passed.

`make ptx` calls it. Each line of the table is a run of pytest; as many run at once as there are processors. Arguments
select lines: `make ptx ARGS="triton sm_90"` runs those whose name or target has all these words.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "ptx"
TRITON, CUDA = "tests/backends/triton", "tests/backends/cuda"


class Run(NamedTuple):
    """A run of pytest: what it tests, the architecture of the PTX, and pytest's arguments."""

    kernels: str
    target: str
    tests: list[str]
    settings: str = ""


RUNS = [
    Run("the machine itself", "", ["tests/backends/ptx/test_instructions.py", "tests/backends/ptx/test_machine.py"]),
    Run("CUDA, planted faults", "sm_90", ["tests/backends/ptx/test_cuda_kernels.py"]),
    Run("Triton, planted faults", "sm_90", ["tests/backends/ptx/test_triton_kernels.py"]),
    Run("CUDA, dense and in place", "sm_90", [f"{CUDA}/test_cuda_host.py"]),
    Run("CUDA, label terms", "sm_90", [f"{CUDA}/test_cuda_label_term.py"]),
    Run("CUDA, vocabulary in shards", "sm_90", [f"{CUDA}/test_cuda_shards.py"]),
    Run("CUDA, sparse teachers", "sm_90", ["tests/teachers/test_topk.py", "-k", "cuda"]),
    Run("CUDA, random order and noise", "sm_90", [f"{CUDA}/test_cuda_host.py", "-k", "log_0"], "random noise"),
]  # fmt: skip
for target in ("sm_80", "sm_90", "sm_100"):
    RUNS += [
        Run("Triton, dense, alone and split", target, [f"{TRITON}/test_triton.py"]),
        Run("Triton, label terms", target, [f"{TRITON}/test_triton_label_term.py"]),
        Run("Triton, vocabulary in shards", target, [f"{TRITON}/test_triton_shards.py"]),
        Run("Triton, sparse teachers", target, ["tests/teachers/test_topk.py", "-k", "triton"]),
        Run(
            "Triton, chunks of a fused loss",
            target,
            ["tests/engine/test_linear.py", "-k", "triton"],
        ),
        Run("Triton, mutual learning", target, ["tests/losses/test_online.py", "-k", "triton"]),
        Run(
            "Triton, log-probabilities",
            target,
            ["tests/losses/test_logprobs.py", "-k", "triton and not real and not flat"],
        ),
        Run(
            "Triton, draft losses",
            target,
            ["tests/losses/test_draft.py", "tests/losses/test_linear_draft.py", "-k", "triton"],
        ),
    ]
RUNS.append(
    Run(
        "Triton, random order and noise", "sm_90",
        [f"{TRITON}/test_triton.py", "-k", "test_divergences or test_shipped"], "random noise",
    )
)  # fmt: skip


def outcome(run: Run) -> tuple[str, bool]:
    """Run pytest; return the line of the table, and whether every test passed."""
    name = f"{run.kernels}-{run.target}".replace(" ", "_").replace(",", "")
    results, log = FOLDER / f"{name}.xml", FOLDER / f"{name}.log"
    environment = {name: value for name, value in os.environ.items() if name != "FASTKD_PTX"}
    environment["OMP_NUM_THREADS"] = "1"
    # The planted faults choose their architecture themselves.
    if run.target and "planted" not in run.kernels:
        environment |= {"FASTKD_PTX": run.target, "FASTKD_PTX_SETTINGS": run.settings}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not stacks",
        f"--junitxml={results}",
    ]
    began = time.perf_counter()
    with log.open("w") as file:
        status = subprocess.run(
            [*command, *run.tests], cwd=ROOT, env=environment, stdout=file, stderr=file
        ).returncode
    seconds = time.perf_counter() - began
    suite = ElementTree.parse(results).getroot().find("testsuite")
    assert suite is not None
    cases, failed, errors, skipped = (
        int(suite.attrib[k]) for k in ("tests", "failures", "errors", "skipped")
    )
    passed = cases - failed - errors - skipped
    return (
        f"| {run.kernels} | {run.target or '-'} | {cases} | {passed} | {skipped} | {failed + errors} | {seconds:.0f} |",
        status == 0,
    )


def main(words: list[str]) -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    runs = [
        run
        for run in RUNS
        if all(word.lower() in f"{run.kernels} {run.target}".lower() for word in words)
    ]
    lines = [
        "| kernels | target | cases | passed | skipped | failed | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    fine = True
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for line, passed in pool.map(outcome, runs):
            print(line, flush=True)
            lines.append(line)
            fine = fine and passed
    (FOLDER / "report.md").write_text("\n".join(lines) + "\n")
    print(f"logs and this table: {FOLDER}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
