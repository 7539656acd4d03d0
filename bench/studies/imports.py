"""The time of `import fastkd` in a process that has torch already: the median of several processes, in milliseconds.

    python bench/studies/imports.py

tests/backends/test_dispatch.py asserts what is loaded. How long that takes depends on the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
# Without freeze, most of the time would be the garbage collector's, on torch's objects.
CODE = """
import gc, time, torch
gc.freeze()
start = time.perf_counter()
import fastkd
print(1e3 * (time.perf_counter() - start))
"""


def milliseconds() -> float:
    """The time of one import, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return float(done.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11, help="the number of processes")
    times = sorted(milliseconds() for _ in range(parser.parse_args().rounds))
    print(f"import fastkd: {median(times):.0f} ms ({times[0]:.0f} to {times[-1]:.0f})")
