"""Installing fastkd where something is missing: it works, or the message names what is missing.

Each test builds in a copy of the checkout, offline, with this interpreter's packages. Sources are compiled with -O0,
because these tests check the build and not its result. Tests are marked heavy if they compile everything twice, or if
`make install-matrix` checks the same with a release.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

import fastkd

BUILD_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
BUILD_FOLDERS = ("csrc", "fastkd", "kernels")

# Checked by their metadata: looking for pip's module makes setuptools stop patching distutils for the rest of the
# process, and torch.compile, which imports setuptools later, then fails.
_installed = {distribution.name for distribution in importlib.metadata.distributions()}
_absent = {"pip", "setuptools", "wheel", "pybind11", "ninja"} - _installed
if _absent:
    pytest.skip(
        f"to build offline, {sorted(_absent)} must be installed here", allow_module_level=True
    )
if not (ROOT / "setup.py").is_file():
    pytest.skip("there is no checkout around these tests", allow_module_level=True)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine"
)

# Prints as JSON what an installed fastkd does on a machine without a GPU. argv: the folder that it is installed in, and
# the modules to hide. The finder of an editable install is removed, because it would supply what the folder lacks.
PROBE = """
import json, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
sys.path.insert(0, sys.argv[1])
sys.modules.update(dict.fromkeys(sys.argv[2:]))
import torch
torch.set_num_threads(1)
import fastkd, fastkd.kernels
student = torch.linspace(-1, 1, 130).reshape(2, 65)
teacher = student.flip(-1) ** 2
said = {}
for backend in ("auto", "reference", "portable", "cpu", "triton"):
    try:
        said[backend] = fastkd.kd_loss(student, teacher, backend=backend).item()
    except fastkd.BackendUnavailable as error:
        said[backend] = str(error)
print(json.dumps({
    "file": fastkd.__file__,
    "version": fastkd.__version__,
    "torch": torch.__version__,
    "kernels": list(fastkd.kernels.__path__),
    "losses": said,
}))
"""


def python(
    *arguments: str | Path, cwd: Path, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a clean environment; a variable of value None is unset."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=clean_environment(environment),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=3000,
    )


def clean_environment(changes: dict[str, str | None]) -> dict[str, str]:
    actual = ("CXX", "CXXFLAGS", "LDFLAGS", "PYTHONPATH", "TRITON_INTERPRET")
    kept = {k: v for k, v in os.environ.items() if k not in actual and not k.startswith("FASTKD_")}
    # nvcc takes minutes; tests/backends/cuda/test_cuda_build.py checks its output.
    defaults = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "FASTKD_CUDA": "0"}
    wanted = {**defaults, **changes}
    return {k: v for k, v in {**kept, **wanted}.items() if v is not None}


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip_install(tree: Path, site: Path, **environment: str | None) -> None:
    flags = ("--no-deps", "--no-build-isolation", "--target", site)
    succeed(python("-m", "pip", "install", *flags, tree, cwd=site.parent, **environment))


def probe(site: Path, *absent: str, **environment: str | None) -> dict:
    done = python("-c", PROBE, site, *absent, cwd=site, CUDA_VISIBLE_DEVICES="", **environment)
    return json.loads(succeed(done).splitlines()[-1])


def build_record(package: Path) -> dict:
    return json.loads((package / "_build.json").read_text())


def extensions(package: Path) -> list[Path]:
    return list(package.glob("_C*"))


def copy_checkout(destination: Path) -> Path:
    built = shutil.ignore_patterns("_C*", "*.so", "_build.json", "__pycache__")
    destination.mkdir()
    for name in BUILD_FILES:
        shutil.copy2(ROOT / name, destination)
    for name in BUILD_FOLDERS:
        shutil.copytree(ROOT / name, destination / name, ignore=built)
    return destination


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout without built files."""
    return copy_checkout(tmp_path / "tree with a space")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A checkout, and the two wheels that two processes built in it at the same time."""
    folder = tmp_path_factory.mktemp("built")
    tree = copy_checkout(folder / "tree")
    flags = ("--no-deps", "--no-build-isolation", "--wheel-dir")
    builds = [
        subprocess.Popen(
            [sys.executable, "-m", "pip", "wheel", *flags, str(folder / name), str(tree)],
            env=clean_environment({"FASTKD_NATIVE": "1", "CXXFLAGS": "-O0"}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        for name in ("first", "second")
    ]
    for build in builds:
        output, _ = build.communicate(timeout=3000)
        assert build.returncode == 0, output
    return tree, [next((folder / name).glob("*.whl")) for name in ("first", "second")]


@pytest.fixture
def installed(built: tuple[Path, list[Path]], tmp_path: Path) -> Path:
    """A folder with the unpacked wheel, which is all that an installation does."""
    site = tmp_path / "site"
    zipfile.ZipFile(built[1][0]).extractall(site)
    return site


@pytest.mark.heavy
@needs_compiler
def test_two_processes_can_build_wheels_at_the_same_time(built: tuple[Path, list[Path]]) -> None:
    modules = {path.name for path in (ROOT / "kernels").glob("*.py")}
    for wheel in built[1]:
        archive = zipfile.ZipFile(wheel)
        assert archive.testzip() is None
        names = set(archive.namelist())
        assert {"fastkd/py.typed", "fastkd/kernels/__init__.py"} <= names
        assert {f"fastkd/kernels/{name}" for name in modules} <= names
        assert any(name.startswith("fastkd/_C.") for name in names)
        assert {name.split("/")[0].split("-")[0] for name in names} == {"fastkd"}
        assert "baseline" in json.loads(archive.read("fastkd/_build.json"))["instruction_sets"]


@pytest.mark.heavy
@needs_compiler
def test_objects_follow_the_headers_that_they_include(built: tuple[Path, list[Path]]) -> None:
    tree = built[0]
    (directory,) = (tree / "build").glob("native-*")
    plan = ("-m", "ninja", "-C", directory, "-n", "-v")
    assert "no work to do" in succeed(python(*plan, cwd=tree))
    (tree / "csrc" / "generated" / "divergences.h").touch()
    assert "-DFASTKD_ISA=baseline" in succeed(python(*plan, cwd=tree))


@pytest.mark.heavy
@needs_compiler
def test_no_gpu_and_a_home_that_cannot_be_written(installed: Path) -> None:
    # No process, not even root's, can write below a file; permission bits would not stop root.
    output = probe(installed, HOME="/dev/null/home", XDG_CACHE_HOME="/dev/null/cache")
    assert Path(output["file"]).parent == installed / "fastkd"
    assert output["kernels"] == [str(installed / "fastkd" / "kernels")]
    assert output["version"] == fastkd.__version__
    losses = output["losses"]
    assert losses["auto"] == losses["cpu"] == pytest.approx(losses["reference"], rel=1e-5)


@pytest.mark.heavy
@needs_compiler
def test_no_triton(installed: Path) -> None:
    losses = probe(installed, "triton")["losses"]
    assert isinstance(losses["auto"], float)
    assert "triton is not installed" in losses["triton"]
    assert "pip install" in losses["triton"]


def test_no_compiler(tree: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip_install(tree, site, PATH=str(empty), HOME="/dev/null/home")
    assert extensions(site / "fastkd") == []
    why = build_record(site / "fastkd")
    assert why["native"] is False
    assert "no C++ compiler" in why["reason"]
    losses = probe(site)["losses"]
    assert losses["auto"] == losses["portable"]
    assert why["reason"] in losses["cpu"]
    assert why["remedy"] in losses["cpu"]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "false"}, "did not compile"),
        ({"CXX": "a-compiler-that-is-not-there -O3"}, "there is no such command"),
        ({"FASTKD_NATIVE": "0"}, "FASTKD_NATIVE=0"),
    ],
    ids=["failing", "misnamed", "unwanted"],
)
def test_a_missing_extension_is_recorded_and_an_earlier_one_removed(
    tree: Path, environment: dict[str, str], reason: str
) -> None:
    arguments = ("setup.py", "-q", "build_ext", "--inplace")
    succeed(python(*arguments, cwd=tree, FASTKD_NATIVE="0"))
    suffix = python(
        "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))", cwd=tree
    )
    (tree / "fastkd" / f"_C{suffix.stdout.strip()}").write_text("an earlier build")
    done = python(*arguments, cwd=tree, **environment)
    succeed(done)
    assert extensions(tree / "fastkd") == []
    assert reason in build_record(tree / "fastkd")["reason"]
    warnings = done.stderr.count("without its native extension")
    assert warnings == (0 if environment.get("FASTKD_NATIVE") == "0" else 1)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTKD_NATIVE": "1", "CXX": "false"}, "did not compile"),
        ({"FASTKD_NATIVE": "1", "PATH": "/dev/null"}, "no C++ compiler"),
        ({"FASTKD_NATIVE": "yes"}, "FASTKD_NATIVE must be 0, 1 or unset"),
        (
            {"CXX": "false", "FASTKD_CUDA": "1", "NVCC": "true", "FASTKD_CUDA_ARCH": "80"},
            "FASTKD_CUDA_ARCH must be compute capabilities from 90 on",
        ),
    ],
    ids=["failing", "missing", "misspelt", "too old a GPU"],
)
def test_a_missing_required_extension_is_an_error(
    tree: Path, environment: dict[str, str], message: str
) -> None:
    done = python("setup.py", "-q", "build_ext", "--inplace", cwd=tree, **environment)
    assert done.returncode != 0
    assert message in done.stderr


def test_installing_does_not_change_torch(tree: Path) -> None:
    flags = ("--quiet", "--dry-run", "--report", "-", "--no-build-isolation")
    done = python("-m", "pip", "install", *flags, ".", cwd=tree, FASTKD_NATIVE="0")
    plan = json.loads(succeed(done))
    assert [item["metadata"]["name"] for item in plan["install"]] == ["fastkd"]
    needed = plan["install"][0]["metadata"]["requires_dist"]
    assert [name for name in needed if "extra" not in name] == ["torch>=2.6"]


@pytest.mark.heavy
def test_source_distribution_builds_the_same_wheel(tree: Path, tmp_path: Path) -> None:
    succeed(python("setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=tree))
    (archive,) = tmp_path.glob("fastkd-*.tar.gz")
    with tarfile.open(archive) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    for folder in BUILD_FOLDERS:
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        wanted = {str(path.relative_to(ROOT)) for path in files}
        left_out = ("__pycache__", "fastkd/_C", ".so", "fastkd/_build.json")
        assert {name for name in wanted if not any(part in name for part in left_out)} <= names
    assert "fastkd/_build.json" not in names

    wheels = []
    for origin in (archive, tree):
        flags = ("--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / origin.name[:6])
        succeed(python("-m", "pip", "wheel", *flags, origin, cwd=tmp_path, FASTKD_NATIVE="0"))
        (wheel,) = (tmp_path / origin.name[:6]).glob("*.whl")
        wheels.append(set(zipfile.ZipFile(wheel).namelist()))
    assert wheels[0] == wheels[1]


def test_a_removed_module_is_not_in_the_next_wheel(tree: Path, tmp_path: Path) -> None:
    short_lived = tree / "fastkd" / "short_lived.py"
    arguments = ("setup.py", "-q", "bdist_wheel", "--dist-dir", tmp_path)
    for present in (True, False):
        short_lived.touch() if present else short_lived.unlink()
        succeed(python(*arguments, cwd=tree, FASTKD_NATIVE="0"))
        (wheel,) = tmp_path.glob("*.whl")
        assert ("fastkd/short_lived.py" in zipfile.ZipFile(wheel).namelist()) is present


def test_install_in_place_finds_the_kernels_of_the_checkout(tree: Path, tmp_path: Path) -> None:
    # A virtual environment that sees this one's packages, so that this one stays unchanged.
    environment = tmp_path / "environment"
    succeed(python("-m", "venv", "--without-pip", environment, cwd=tmp_path))
    (packages,) = environment.glob("lib/python*/site-packages")
    shared = {str(Path(module.__file__).parents[1]) for module in (pytest, sys.modules["torch"])}
    (packages / "shared.pth").write_text("\n".join(sorted(shared)))
    interpreter = environment / "bin" / "python"

    flags = ("--no-deps", "--no-build-isolation", "--ignore-installed", "--editable")
    pip = ("-m", "pip", "--python", interpreter, "install", *flags, tree)
    succeed(python(*pip, cwd=tmp_path, FASTKD_NATIVE="0"))
    assert "FASTKD_NATIVE=0" in build_record(tree / "fastkd")["reason"]

    (tree / "kernels" / "made_later.py").write_text("HERE = True")
    show = "import fastkd.kernels.made_later as m; print(m.HERE, m.__file__)"
    output = subprocess.run(
        [interpreter, "-c", show],
        cwd=tmp_path,
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert succeed(output).split(maxsplit=1) == ["True", f"{tree / 'kernels' / 'made_later.py'}\n"]
