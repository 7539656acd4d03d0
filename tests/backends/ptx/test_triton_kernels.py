"""A part of the Triton kernels' tests on their PTX, in every run; and faults planted into that PTX.

Triton decides when it is imported whether it interprets kernels, so this runs in processes of their own. `make ptx` runs
all tests of Triton's kernels for three architectures.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton, which makes the PTX, is not installed",
)


def _python(*arguments: str, architecture: str, settings: str = "") -> str:
    """The output of a process in which Triton's kernels run in the machine; it must succeed."""
    environment = os.environ | {
        "FASTKD_PTX": architecture, "FASTKD_PTX_SETTINGS": settings, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(["tests", str(ROOT)]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


# Closed form and three sweeps, in float32 and bfloat16, in tiles of one warp; rows that programs share; a dropped row.
# The tiles that are shipped are left out to save time.
SELECTED = (
    "(test_divergences and (forward_kl or jsd) and alone and not skew)"
    " or test_results_do_not_depend_on_the_groups or (test_a_dropped_row_is_not_read and jsd)"
    " or (test_measures and gradients and alone)"
)
# Log-probabilities and draft losses, of which `make ptx` runs all tests.
OF_LOSSES = "triton and (test_a_temperature_per_row or test_a_target_that_excludes)"


@pytest.mark.parametrize(
    ("files", "selected"),
    [
        (["tests/backends/triton/test_triton.py"], SELECTED),
        (["tests/losses/test_logprobs.py", "tests/losses/test_draft.py"], OF_LOSSES),
    ],
    ids=["row kernel", "other losses"],
)
def test_selected_tests_pass_on_ptx(files: list[str], selected: str) -> None:
    output = _python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", selected, architecture="sm_90",
        settings="random",
    )  # fmt: skip
    assert "passed" in output and "failed" not in output


@pytest.mark.heavy
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_every_barrier_is_needed(architecture: str) -> None:
    """support.ptx.triton_faults removes one after the other."""
    output = _python("-m", "support.ptx.triton_faults", architecture=architecture)
    print(output)
    assert "not seen" not in output and output.count("-> ") >= 10
