"""The Triton kernels that need a GPU, held to float64 in Triton's interpreter, at a size that it can do.

    TRITON_INTERPRET=1 python bench/verify.py logits:jsd linear:forward_kl

Prints {"FORM:DIVERGENCE:NAME": {"errors": [loss, gradient], "why": null or what is wrong}} as JSON. The suite runs it
as a process of its own, since Triton reads the variable when it is imported.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import torch
from cases import Case, Problem
from peers import installed, of_case

SIZES = {"rows": 5, "vocabulary": 301}  # not a power of two, so that kernels mask
HIDDEN = 16

Verdicts = dict[str, dict[str, Any]]


def verify_all(forms: Iterable[str]) -> Verdicts:
    """Of every Triton kernel that has such a FORM:DIVERGENCE."""
    verdicts: Verdicts = {}
    for which in forms:
        form, _, divergence = which.partition(":")
        case = Case(form, divergence, **SIZES, hidden=HIDDEN if form == "linear" else 0)
        problem = Problem(case)
        for peer in of_case(form, divergence, torch.float32, "cpu"):
            if not peer.triton or (peer.package != "fastkd" and installed(peer.package) is None):
                continue
            try:
                errors = problem.errors(peer, peer.make(divergence, torch.float32))
            except Exception as error:  # whatever a package raises is a cell of the table
                found = {"errors": None, "why": failure(error)}
            else:
                found = {"errors": list(errors), "why": problem.verdict(peer, errors)}
            verdicts[f"{which}:{peer.name}"] = found
    return verdicts


def failure(error: Exception) -> str:
    """An exception in a line."""
    return f"fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"


def in_the_interpreter(forms: Iterable[str]) -> Verdicts:
    """What this script says, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *sorted(set(forms))],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    verdicts = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(verdicts, dict)
    return verdicts


def make_floats_tensors() -> None:
    """A float argument of a kernel is a float32 scalar once compiled; the interpreter would leave it Python's."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    @functools.wraps(convert)
    def converting(argument: Any) -> Any:
        if isinstance(argument, float):
            scalar = np.array([argument], dtype=np.float32)
            return tl.tensor(interpreter.TensorHandle(scalar, tl.float32), tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = converting


if __name__ == "__main__":
    make_floats_tensors()
    print(json.dumps(verify_all(sys.argv[1:])))
