"""The suite itself: which backends its fixtures hold."""

from __future__ import annotations

import importlib.util
import os

import conftest
import torch

import fastkd
from fastkd import info


def test_the_fixtures_hold_every_backend_that_can_serve_a_cpu_tensor() -> None:
    """A backend that `any_backend` leaves out would be tested by nothing that reads as if it tested all."""
    held = {"reference", *conftest.BACKENDS, *conftest.INTERPRETED}
    if os.environ.get("FASTKD_TEST_WITHOUT_NATIVE") == "1":
        held.add("cpu")  # left out on purpose
    served = {name for name in fastkd.available_backends() if info.obstacle(name, "cpu") is None}
    assert served == held
    # The same without asking fastkd, which might not see what is there.
    assert {"reference", "portable", "cpu"} <= held
    if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
        assert "triton" in held
