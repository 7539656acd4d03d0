"""Compiles the kernel of deep mutual learning for GPUs that this machine does not have. It is a separate process,
because the tests may run Triton's interpreter. Prints what each variant needs:
`python tests/support/mutual_aot.py cuda:90 1`.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch

from fastkd.call.contract import Rows
from fastkd.call.mutual import PEERS, Options
from support.triton_aot import Caught, catch, resources

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def variants(full: bool) -> list[tuple[int, str, str, str]]:
    """(students, dtype, peers, kind): the numbers of students that pad a tile otherwise, and what changes a kernel."""
    results = [(4, "bf16", "mean", "bare"), (3, "fp16", "sum", "everything")]
    results.append((8, "fp32", "average", "everything"))
    if not full:
        return results
    results += [
        (students, dtype, peers, kind)
        for students, dtype, peers, kind in itertools.product(
            (2, 3, 4, 5, 8, 16), DTYPES, PEERS, ("bare", "everything")
        )
    ]
    return results


def launch(students: int, dtype: str, peers: str, kind: str) -> tuple[Any, ...]:
    """(kernel, arguments, options) of the launch for a case, with logits shifted as in language models."""
    from fastkd.kernels import mutual

    catch(mutual.mutual_kernel)
    logits = [torch.empty(2, 3, 50257, dtype=DTYPES[dtype])[:, :-1] for _ in range(students)]
    rows, options, wanted = Rows(), Options(peers=peers), [True] * students
    if kind == "everything":
        rows = Rows(torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2), scale=torch.ones(()))
        options, wanted[0] = options._replace(temperature=2.0), False
    try:
        mutual.mutual_rows(logits, rows, options, wanted, kind == "everything")
    except Caught as caught:
        return caught.args
    raise AssertionError("nothing was launched")


if __name__ == "__main__":
    for variant in variants(full=sys.argv[2] == "1"):
        print(json.dumps([variant, resources(*launch(*variant), sys.argv[1])]), flush=True)
