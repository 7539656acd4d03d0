"""Packages, and the native extension `fastkd._C`, which ninja builds and whose absence is no error.

`fastkd._C` includes no torch header and links no libtorch: building it takes a C++17 compiler with OpenMP, pybind11
and ninja, and no torch. Where something is missing or the compiler fails, the install succeeds without the extension
and `fastkd/_build.json` keeps the reason, which fastkd shows when the cpu backend is asked for.

Environment:
    FASTKD_NATIVE  1: no extension is an error; 0: build none; unset: build it where possible.
    CXX            the compiler, with arguments if need be; else the first of c++, g++, clang++.
    CXXFLAGS, LDFLAGS  appended to the flags below.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

try:
    import fcntl
except ImportError:  # not a Unix; the extension is not built there either
    fcntl = None

ROOT = Path(__file__).resolve().parent

COMPILE = ["-O3", "-DNDEBUG", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
COMPILE += ["-fno-math-errno", "-fno-trapping-math"]
# The last is for g++, which sees an uninitialised variable in its own AVX-512 headers, and the one before for clang++,
# which does not know the last.
WARN = ["-Wall", "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
LINK = ["-shared", "-fopenmp"]

# csrc/*.cpp is compiled once, and KERNELS once for each of these; the extension picks one at run time.
KERNELS = "csrc/cpu/rows.cpp"
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
if sysconfig.get_platform().endswith("x86_64"):
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [*avx512, "-mfma", "-mf16c"]

SOURCES = [*sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")), KERNELS]


class UnavailableError(Exception):
    """Why there is no native extension, and what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}. {remedy}")
        self.reason, self.remedy = reason, remedy


def lock_tree() -> None:
    """Let one process at a time build in this tree: setuptools and ninja write to fixed places under build/.

    The lock lasts as long as the process: a frontend starts one for each build command. It is the process's own, so a
    second setup() in it goes through.
    """
    if fcntl is None:
        return
    try:
        (ROOT / "build").mkdir(exist_ok=True)
        handle = os.open(ROOT / "build" / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # a read-only tree: two builds cannot meet in it
        return
    fcntl.lockf(handle, fcntl.LOCK_EX)


def find_compiler() -> list[str]:
    """The command of the C++ compiler."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise UnavailableError(
                f"CXX={os.environ['CXX']}: there is no such command", "Correct or unset CXX"
            )
        return command
    names = ("c++", "g++", "clang++")
    for name in names:
        if shutil.which(name):
            return [name]
    raise UnavailableError(
        f"no C++ compiler was found when fastkd was installed ({', '.join(names)}, $CXX)",
        "Install one with OpenMP, such as g++, and reinstall fastkd",
    )


def find_ninja() -> list[str]:
    """The command of ninja: the Python package's, else one on PATH."""
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    for name in ("ninja", "ninja-build"):
        if shutil.which(name):
            return [name]
    raise UnavailableError("ninja is not installed", "pip install ninja, and reinstall fastkd")


def find_headers() -> list[Path]:
    """The include directories of Python and pybind11."""
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise UnavailableError(
            f"Python.h, the header of Python {sysconfig.get_python_version()}, is not installed",
            "Install it (python3-dev on Debian, python3-devel on Fedora), and reinstall fastkd",
        )
    try:
        import pybind11
    except ImportError:
        raise UnavailableError(
            "pybind11 is not installed", "pip install pybind11, and reinstall fastkd"
        ) from None
    return [python, Path(pybind11.get_include())]


def version_line(compiler: list[str]) -> str:
    """The first line of `compiler --version`; the command itself where it says nothing."""
    try:
        said = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    return said.partition("\n")[0].strip() or shlex.join(compiler)


def ninja_text(compiler: list[str], include: list[Path], output: str) -> str:
    """The build.ninja of the extension; ninja runs beside it, so that objects land there."""

    def path(value: Path) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    common = COMPILE + WARN + [f"-I{directory}" for directory in (ROOT / "csrc", *include)]
    units = [(Path(source).stem, source, []) for source in SOURCES if source != KERNELS]
    units += [
        (f"{Path(KERNELS).stem}_{name}", KERNELS, [f"-DFASTKD_ISA={name}", *flags])
        for name, flags in INSTRUCTION_SETS.items()
    ]
    objects = " ".join(f"{name}.o" for name, _, _ in units)
    cxxflags = shlex.split(os.environ.get("CXXFLAGS", ""))
    ldflags = shlex.split(os.environ.get("LDFLAGS", ""))
    lines = [
        "rule compile",
        f"  command = {command(compiler + common)} $flags {command(cxxflags)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $out",
        "rule link",
        f"  command = {command(compiler)} $in -o $out {command(LINK + cxxflags + ldflags)}",
        "  description = link $out",
        *(
            f"build {name}.o: compile {path(ROOT / source)}\n  flags = {command(flags)}"
            for name, source, flags in units
        ),
        f"build {output}: link {objects}",
        f"default {output}",
    ]
    return "\n".join(lines) + "\n"


class BuildNative(build_ext):
    """Build `fastkd._C` with ninja, and write `_build.json` beside the place where it belongs."""

    def run(self) -> None:
        """Build, or record why not; under FASTKD_NATIVE=1 the latter is an error."""
        wish = os.environ.get("FASTKD_NATIVE", "")
        if wish not in ("", "0", "1"):
            raise CompileError(f"FASTKD_NATIVE must be 0, 1 or unset; got {wish!r}")
        target = Path(self.get_ext_fullpath("fastkd._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if wish == "0":
                raise UnavailableError(
                    "fastkd was installed with FASTKD_NATIVE=0", "Unset it, and reinstall fastkd"
                )
            record = self.build(target)
        except UnavailableError as failure:
            if wish == "1":
                raise CompileError(f"FASTKD_NATIVE=1, and {failure}") from None
            target.unlink(missing_ok=True)  # one of an earlier build would not match these sources
            record = {"native": False, "reason": failure.reason, "remedy": failure.remedy}
            if wish == "":
                self.warn(f"fastkd is installed without its native extension: {failure}")
        write_atomically(target.with_name("_build.json"), json.dumps(record, indent=2) + "\n")

    def build(self, target: Path) -> dict[str, Any]:
        """Run ninja in its own directory, which later builds reuse, and put the result in its place."""
        if not sys.platform.startswith("linux"):
            raise UnavailableError(
                f"the native extension is built on Linux, and this is {sys.platform}",
                "The other backends work here",
            )
        compiler, ninja, include = find_compiler(), find_ninja(), find_headers()
        directory = (
            ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        )
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "build.ninja", ninja_text(compiler, include, target.name))
        failed = subprocess.run([*ninja, "-C", str(directory)]).returncode
        if failed:
            raise UnavailableError(
                f"the native extension did not compile with {version_line(compiler)}",
                "Reinstall fastkd with `FASTKD_NATIVE=1 pip install -v` to see the compiler's output",
            )
        # Replaced and not overwritten: a process that has the old one mapped keeps it.
        fresh = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copy2(directory / target.name, fresh)
        fresh.replace(target)
        return {
            "native": True,
            "compiler": version_line(compiler),
            "flags": COMPILE + shlex.split(os.environ.get("CXXFLAGS", "")),
            "instruction_sets": INSTRUCTION_SETS,
        }

    def get_outputs(self) -> list[str]:
        """The files that this command has written, which may be without the extension."""
        target = Path(self.get_ext_fullpath("fastkd._C"))
        return [str(file) for file in (target, target.with_name("_build.json")) if file.is_file()]


class BuildPython(build_py):
    """Copy the Python files into an empty directory, or a wheel would still hold those of an earlier build."""

    def run(self) -> None:
        """Empty the package in build_lib, then copy."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fastkd", ignore_errors=True)
        super().run()


def write_atomically(path: Path, text: str) -> None:
    """Write a file that another process may be reading."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(path)


lock_tree()
setup(
    packages=find_packages(include=["fastkd", "fastkd.*"]),
    # The Triton sources sit at the top level, without an __init__.py, and are installed beside the shim that stands
    # in fastkd/kernels/. As setuptools looks for that package's files in kernels/ only, the shim goes as data.
    package_dir={"fastkd.kernels": "kernels"},
    package_data={"fastkd": ["py.typed", "*.pyi", "kernels/__init__.py"]},
    ext_modules=[Extension("fastkd._C", sources=SOURCES)],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
