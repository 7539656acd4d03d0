"""The files of a release, their metadata and their bytes. make install-matrix installs them."""

from __future__ import annotations

import ast
import email
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

import fastkd

EPOCH = "1700000000"

if not (ROOT / ".ci" / "release").is_file():
    pytest.skip("there is no checkout around these tests", allow_module_level=True)
if "setuptools" not in {known.name for known in importlib.metadata.distributions()}:
    pytest.skip("setuptools is not installed here", allow_module_level=True)


def tracked() -> list[str]:
    """The tracked files of the checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def copy_checkout(destination: Path) -> Path:
    for name in tracked():
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, destination / name)  # with the current time
    return destination


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTKD_", "PYTHON"))}
    done = subprocess.run(
        command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(tree: Path, kind: str) -> Path:
    setup = [sys.executable, "setup.py", "-q", kind, "--dist-dir", tree / "dist"]
    run(setup, tree, FASTKD_NATIVE="0", SOURCE_DATE_EPOCH=EPOCH)
    (archive,) = (tree / "dist").glob("*.whl" if kind == "bdist_wheel" else "*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("release") / "tree")


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """A wheel without extensions, for any platform."""
    return build(tree, "bdist_wheel")


def members(wheel: Path, pattern: str) -> str:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if re.fullmatch(pattern, name))
    return archive.read(name).decode()


def test_without_extensions_a_wheel_is_for_any_platform(wheel: Path) -> None:
    assert wheel.name == f"fastkd-{fastkd.__version__}-py3-none-any.whl"
    described = email.message_from_string(members(wheel, r"[^/]*\.dist-info/WHEEL"))
    assert (described["Root-Is-Purelib"], described["Tag"]) == ("true", "py3-none-any")
    record = json.loads(members(wheel, r"fastkd/_build\.json"))
    assert record["native"] is record["cuda"] is False
    for obstacle in (record, record["cuda_obstacle"]):
        # Users who install this wheel from an index have set no variable.
        assert (
            "the wheel for any platform is" in obstacle["reason"] or "release" in obstacle["reason"]
        )
        assert "--no-binary fastkd fastkd" in obstacle["remedy"]


def test_a_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {name for name in tracked() if name.startswith("fastkd/")}
    kernels = {f"fastkd/{name}" for name in tracked() if name.startswith("kernels/")}
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == sources | kernels | {"fastkd/_build.json"}
    files = {name.partition("/")[2] for name in about}
    assert files >= {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}


def test_the_metadata_of_a_wheel(wheel: Path) -> None:
    metadata = email.message_from_string(members(wheel, r"[^/]*\.dist-info/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("fastkd", fastkd.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    needed = metadata.get_all("Requires-Dist")
    assert [name for name in needed if "extra ==" not in name] == ["torch>=2.6"]


def test_the_source_distribution_has_every_file_of_the_checkout(tree: Path) -> None:
    with tarfile.open(build(tree, "sdist")) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in names if ".egg-info/" in name}
    assert names - made == set(tracked()) - {".gitignore"}


def test_two_builds_of_a_wheel_are_identical(wheel: Path, tmp_path: Path) -> None:
    time.sleep(
        max(0.0, 2.1 - (time.time() - wheel.stat().st_mtime))
    )  # a zip stores times in steps of two seconds
    again = build(copy_checkout(tmp_path / "elsewhere"), "bdist_wheel")
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, again)}
    assert len(digests) == 1


def test_the_version_is_defined_in_one_place() -> None:
    written = re.compile(rf"(?<![\w.=]){re.escape(fastkd.__version__)}(?![\w.])")
    places = set()
    for name in tracked():
        with (ROOT / name).open(encoding="utf-8", errors="ignore") as file:
            if written.search(file.read()):
                places.add(name)
    assert places - {"CHANGELOG.md"} == {"fastkd/__init__.py"}
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] in (fastkd.__version__, "Unreleased")


def test_the_package_unpickles_nothing_and_runs_no_text() -> None:
    # SECURITY.md says so.
    for path in (ROOT / "fastkd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "torch.load"}, (path, called)
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                assert not {"pickle", "marshal", "shelve"} & set(modules), path


OFFLINE = """
import sys
def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise AssertionError(event)
    if event == "subprocess.Popen" or event == "os.system":
        raise AssertionError((event, arguments))
import torch
sys.addaudithook(refuse)
import fastkd
student = torch.randn(2, 10, requires_grad=True)
fastkd.kd_loss(student, torch.randn(2, 10)).backward()
"""


def test_neither_import_nor_a_loss_opens_a_socket_or_starts_a_program() -> None:
    run([sys.executable, "-c", OFFLINE], ROOT)


@pytest.mark.heavy
def test_two_releases_of_a_commit_are_identical(tmp_path: Path) -> None:
    python = ROOT / "build" / "release" / "bin" / "python"
    if not python.exists():
        pytest.skip("the tools of a release are not here: make dist")
    import torch

    sums = []
    for name, umask in (("one", 0o022), ("another, elsewhere", 0o077)):
        clone = tmp_path / name
        run(["git", "clone", "-q", ROOT, clone], tmp_path)
        old = os.umask(umask)
        try:
            command = [clone / ".ci" / "release", python, f"torch=={torch.__version__}"]
            run(command, clone, CXXFLAGS="-O0")
        finally:
            os.umask(old)
        sums.append((clone / "dist" / "SHA256SUMS").read_text())
    assert sums[0] == sums[1]
    kinds = {
        line.split(f"-{fastkd.__version__}")[1].rpartition("-")[2] for line in sums[0].splitlines()
    }
    assert {"any.whl", ".tar.gz", ".cdx.json"} < kinds
