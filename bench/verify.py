"""Verifies the Triton kernels that need a GPU against float64 in Triton's interpreter, on small tensors.

    TRITON_INTERPRET=1 python bench/verify.py logits:jsd linear:forward_kl

Prints {"FORM:DIVERGENCE:NAME": {"errors": [loss, gradient], "why": null or what is wrong}} as JSON. The suite runs it
in a process of its own, because Triton reads the variable when it is imported.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable
from typing import Any

import torch
from cases import Case, Problem
from measure import in_a_process
from peers import failure, installed, of_case

SIZES = {"rows": 5, "vocabulary": 301}  # not a power of two, so kernels must mask
HIDDEN = 16

Verdicts = dict[str, dict[str, Any]]


def verify_all(forms: Iterable[str]) -> Verdicts:
    """The verdicts on all Triton kernels that have such a FORM:DIVERGENCE."""
    make_floats_tensors()
    verdicts: Verdicts = {}
    for which in forms:
        form, _, divergence = which.partition(":")
        case = Case(form, divergence, **SIZES, hidden=HIDDEN if form == "linear" else 0)
        problem = Problem(case)
        for peer in of_case(form, divergence, torch.float32, "cpu"):
            if not peer.triton or (peer.package != "fastkd" and installed(peer.package) is None):
                continue
            try:
                errors = problem.errors(peer, problem.make(peer))
            except Exception as error:  # whatever a package raises becomes a cell of the table
                found = {"errors": None, "why": failure(error)}
            else:
                found = {"errors": list(errors), "why": problem.verdict(peer, errors)}
            verdicts[f"{which}:{peer.name}"] = found
    return verdicts


def in_the_interpreter(forms: Iterable[str]) -> Verdicts:
    """The verdicts, from a process in which Triton interprets."""
    verdicts: Verdicts = in_a_process(verify_all, sorted(set(forms)), TRITON_INTERPRET="1")
    return verdicts


def make_floats_tensors() -> None:
    """Make float arguments of kernels float32, as compiled kernels do; the interpreter keeps Python floats."""
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
    print(json.dumps(verify_all(sys.argv[1:])))
