"""Options of the suite, and what a run records about itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import machine
from peers import NOT_COMPARED, PEERS, installed

import fastkd

UNTIMED: list[dict[str, Any]] = []  # rows of contenders that cannot run here or are wrong


def pytest_addoption(parser: pytest.Parser) -> None:
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.addoption("--quick", action="store_true", help="run the short list of cases")
    parser.addoption(
        "--device", nargs="+", default=here, help=f"the devices to run on; default: {here}"
    )
    parser.addoption("--threads", type=int, help="as torch.set_num_threads; default: torch's own")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    versions = {peer.package: installed(peer.package) or "not installed" for peer in PEERS}
    versions["fastkd"] = fastkd.__version__  # of the running code, which may be a checkout
    machine_info["fastkd"] = machine()
    machine_info["versions"] = versions | {"triton": installed("triton") or "not installed"}


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    output_json["untimed"] = UNTIMED
    output_json["not_compared"] = NOT_COMPARED
