"""Packages, and the native extensions, which ninja builds and whose absence is no error.

`fastkd._C` has the kernels for CPUs, `fastkd._cuda` those for GPUs. They include no torch header and link no libtorch:
building them takes a C++17 compiler with OpenMP, pybind11 and ninja, and for the second nvcc; no torch. Where something
is missing or a compiler fails, the install succeeds without the extension and `fastkd/_build.json` keeps the reason,
which fastkd shows when its backend is asked for.

Environment:
    FASTKD_NATIVE  1: no fastkd._C is an error; 0: build no extension, which makes a wheel for any platform;
                   unset: build it where possible.
    FASTKD_CUDA    likewise for fastkd._cuda; unset: build it where nvcc is.
    NVCC           nvcc, with arguments if need be; else the one on PATH, in $CUDA_HOME or in /usr/local/cuda.
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
from collections.abc import Sequence
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
KERNELS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
if sysconfig.get_platform().endswith("x86_64"):
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [*avx512, "-mfma", "-mf16c"]

# The GPUs with thread-block clusters that csrc/cuda has machine code for.
ARCHITECTURES = (90, 100)
NVCC = ["-O3", "-std=c++17", "--threads", "0"]
NVCC += [f"-gencode=arch=compute_{sm}a,code=sm_{sm}a" for sm in ARCHITECTURES]
NVCC += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_SOURCES = ["csrc/cuda/kernel.cu", "csrc/cuda/module.cpp"]

SOURCES = [*sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")), *KERNELS]


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


def find_nvcc() -> list[str]:
    """The command of CUDA's compiler."""
    if os.environ.get("NVCC"):
        return shlex.split(os.environ["NVCC"])
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    for place in ("nvcc", *(f"{home}/bin/nvcc" for home in homes if home)):
        if shutil.which(place):
            return [place]
    raise UnavailableError(
        "nvcc was not found when fastkd was installed (PATH, $NVCC, $CUDA_HOME, /usr/local/cuda)",
        "Install CUDA 12.8 or newer, and reinstall fastkd; backend='triton' needs none of it",
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


def ninja_text(
    compiler: list[str], nvcc: list[str] | None, include: list[Path], outputs: dict[str, str]
) -> str:
    """The build.ninja of the extensions; ninja runs beside it, so that objects land there."""

    def path(value: Path) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def edge(name: str, rule: str, source: str, flags: Sequence[str] = ()) -> str:
        return f"build {name}.o: {rule} {path(ROOT / source)}\n  flags = {command([*flags])}"

    headers = [f"-I{directory}" for directory in (ROOT / "csrc", *include)]
    cxxflags = shlex.split(os.environ.get("CXXFLAGS", ""))
    ldflags = shlex.split(os.environ.get("LDFLAGS", ""))
    units = {
        f"{Path(source).stem}_{name}": edge(
            f"{Path(source).stem}_{name}", "compile", source, [f"-DFASTKD_ISA={name}", *flags]
        )
        for source in KERNELS
        for name, flags in INSTRUCTION_SETS.items()
    }
    units |= {
        Path(source).stem: edge(Path(source).stem, "compile", source)
        for source in SOURCES
        if source not in KERNELS
    }
    lines = [
        "rule compile",
        f"  command = {command(compiler + COMPILE + WARN + headers)} $flags {command(cxxflags)} "
        "-MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $out",
        "rule link",
        f"  command = {command(compiler)} $in -o $out {command(LINK + cxxflags + ldflags)}",
        "  description = link $out",
        *units.values(),
        f"build {outputs['_C']}: link {' '.join(f'{name}.o' for name in units)}",
        f"default {outputs['_C']}",
    ]
    if nvcc is not None:
        host = ["-ccbin", compiler[0]] if len(compiler) == 1 else []
        lines += [
            "rule nvcc",
            f"  command = {command(nvcc + host + NVCC + headers)} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $out",
            "rule nvlink",  # finds CUDA's own libraries, of which the runtime is linked statically
            f"  command = {command(nvcc + host)} -shared -cudart static $in -o $out",
            "  description = link $out",
            edge("cuda_kernel", "nvcc", CUDA_SOURCES[0]),
            edge("cuda_module", "compile", CUDA_SOURCES[1]),
            f"build {outputs['_cuda']}: nvlink cuda_kernel.o cuda_module.o",
        ]
    return "\n".join(lines) + "\n"


def wish(variable: str) -> str:
    """What the environment says of an extension: "", "0" or "1"."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise CompileError(f"{variable} must be 0, 1 or unset; got {value!r}")
    return value


class BuildNative(build_ext):
    """Build the extensions with ninja, and write `_build.json` beside the place where they belong."""

    def run(self) -> None:
        """Build, or record why not; where the environment asks for an extension, the latter is an error."""
        native, cuda = wish("FASTKD_NATIVE"), wish("FASTKD_CUDA")
        targets = {name: Path(self.get_ext_fullpath(f"fastkd.{name}")) for name in ("_C", "_cuda")}
        record_at = targets["_C"].with_name("_build.json")
        record_at.parent.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"native": False, "cuda": False}
        try:
            if native == "0":
                raise UnavailableError(
                    "fastkd was built with FASTKD_NATIVE=0, as the wheel for any platform is",
                    "On Linux with a C++17 compiler: pip install --force-reinstall --no-deps --no-binary fastkd fastkd",
                )
            record |= self.build_cpu(targets)
        except UnavailableError as failure:
            self.without(targets["_C"], failure, "FASTKD_NATIVE")
            record |= {"reason": failure.reason, "remedy": failure.remedy}
        try:
            if "0" in (native, cuda):
                raise UnavailableError(
                    f"fastkd was built with FASTKD_{'CUDA' if cuda == '0' else 'NATIVE'}=0, as wheels of a release are",
                    "Where CUDA 12.8 or newer is: FASTKD_CUDA=1 pip install --force-reinstall --no-deps --no-binary "
                    "fastkd fastkd; backend='triton' needs none of it",
                )
            record |= self.build_cuda(targets)
        except UnavailableError as failure:
            self.without(targets["_cuda"], failure, "FASTKD_CUDA")
            record["cuda_obstacle"] = {"reason": failure.reason, "remedy": failure.remedy}
        write_atomically(record_at, json.dumps(record, indent=2) + "\n")

    def without(self, target: Path, failure: UnavailableError, variable: str) -> None:
        """Go on without an extension that nobody insists on."""
        if os.environ.get(variable) == "1":
            raise CompileError(f"{variable}=1, and {failure}") from None
        target.unlink(missing_ok=True)  # one of an earlier build would not match these sources
        if variable == "FASTKD_NATIVE" and not os.environ.get(variable):
            self.warn(f"fastkd is installed without its native extension: {failure}")

    def build_cpu(self, targets: dict[str, Path]) -> dict[str, Any]:
        """fastkd._C."""
        compiler = self.ninja(targets, "_C", nvcc=None)
        return {
            "native": True,
            "compiler": version_line(compiler),
            "flags": COMPILE + shlex.split(os.environ.get("CXXFLAGS", "")),
            "instruction_sets": INSTRUCTION_SETS,
        }

    def build_cuda(self, targets: dict[str, Path]) -> dict[str, Any]:
        """fastkd._cuda."""
        nvcc = find_nvcc()
        self.ninja(targets, "_cuda", nvcc)
        return {"cuda": True, "nvcc": shlex.join(nvcc), "cuda_flags": NVCC}

    def ninja(self, targets: dict[str, Path], name: str, nvcc: list[str] | None) -> list[str]:
        """Build one in ninja's own directory, which later builds reuse, and put it in its place; the C++ compiler."""
        if not sys.platform.startswith("linux"):
            raise UnavailableError(
                f"the native extensions are built on Linux, and this is {sys.platform}",
                "The other backends work here",
            )
        compiler, ninja, include = find_compiler(), find_ninja(), find_headers()
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        directory = ROOT / "build" / f"native-{tag}"
        directory.mkdir(parents=True, exist_ok=True)
        outputs = {key: target.name for key, target in targets.items()}
        write_atomically(directory / "build.ninja", ninja_text(compiler, nvcc, include, outputs))
        if subprocess.run([*ninja, "-C", str(directory), outputs[name]]).returncode:
            variable = "FASTKD_NATIVE" if name == "_C" else "FASTKD_CUDA"
            raise UnavailableError(
                f"the extension fastkd.{name} did not compile with {version_line(nvcc or compiler)}",
                f"Reinstall fastkd with `{variable}=1 pip install -v` to see the compiler's output",
            )
        # Replaced and not overwritten: a process that has the old one mapped keeps it.
        target = targets[name]
        fresh = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copy2(directory / target.name, fresh)
        fresh.replace(target)
        return compiler

    def get_outputs(self) -> list[str]:
        """The files that this command has written, which may be without the extensions."""
        targets = [Path(self.get_ext_fullpath(f"fastkd.{name}")) for name in ("_C", "_cuda")]
        files = [*targets, targets[0].with_name("_build.json")]
        return [str(file) for file in files if file.is_file()]


class BuildPython(build_py):
    """Copy the Python files into an empty directory, or a wheel would still hold those of an earlier build."""

    def run(self) -> None:
        """Empty the package in build_lib, copy, and see that the record is written."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fastkd", ignore_errors=True)
        super().run()
        if not self.distribution.has_ext_modules():  # setuptools then leaves build_ext out
            self.get_finalized_command("build_ext").inplace = self.editable_mode
            self.run_command("build_ext")


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
    # Without them a wheel is for any platform.
    ext_modules=[]
    if os.environ.get("FASTKD_NATIVE") == "0"
    else [
        Extension("fastkd._C", sources=SOURCES),
        Extension("fastkd._cuda", sources=CUDA_SOURCES),
    ],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
