"""Setup script: declares the packages and builds the optional native extensions with ninja.

`fastkd._C` contains the kernels for CPUs, `fastkd._cuda` those for GPUs. They include no torch header and do not link
libtorch, so torch is not needed to build them. `fastkd._C` needs a C++17 compiler with OpenMP, pybind11 and ninja;
`fastkd._cuda` also needs nvcc. If something is missing or does not compile, the install succeeds without the extension.
The reason is stored in `fastkd/_build.json`, and fastkd reports it when the backend is requested.

Environment:
    FASTKD_NATIVE  1: fail if fastkd._C cannot be built; 0: build no extension, for a platform-independent wheel;
                   unset: build it if possible.
    FASTKD_CUDA    1: fail if fastkd._cuda cannot be built; 0: do not build it; unset: build it if nvcc is found.
    FASTKD_CUDA_ARCH  compute capabilities to compile for, such as "90" or "90 100", to save minutes; unset: 90 100 120.
    NVCC           command of nvcc, with optional arguments; default: from PATH, $CUDA_HOME or /usr/local/cuda.
    CXX            command of the C++ compiler, with optional arguments; default: the first of c++, g++, clang++.
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
except ImportError:  # not on Unix, where the extension is not built either
    fcntl = None

ROOT = Path(__file__).resolve().parent

COMPILE = ["-O3", "-DNDEBUG", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
COMPILE += ["-fno-math-errno", "-fno-trapping-math"]
# -Wno-maybe-uninitialized silences a false warning of g++ in its own AVX-512 headers. clang++ does not know that
# option; -Wno-unknown-warning-option silences its warning about it.
WARN = ["-Wall", "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
LINK = ["-shared", "-fopenmp"]

# csrc/*.cpp is compiled once. KERNELS are compiled once per instruction set; the extension picks one at run time.
KERNELS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
if sysconfig.get_platform().endswith("x86_64"):
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [*avx512, "-mfma", "-mf16c"]

# The compute capabilities for which csrc/cuda is compiled. The code for 10.0 also runs on 10.3, and so on. The PTX of
# the first one is for every other device with thread-block clusters: the driver compiles it at the first use.
ARCHITECTURES = (90, 100, 120)
NVCC = ["-O3", "-std=c++17", "--threads", "0", "--split-compile", "0", "-Xfatbin=-compress-all"]
NVCC += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_SOURCES = ["csrc/cuda/kernel.cu", "csrc/cuda/module.cpp"]

SOURCES = [*sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")), *KERNELS]


class UnavailableError(Exception):
    """A native extension cannot be built; holds the reason and a remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}. {remedy}")
        self.reason, self.remedy = reason, remedy


def lock_tree() -> None:
    """Wait until no other process builds in this tree, because setuptools and ninja write to fixed paths under build/.

    The lock is released when the process ends; build frontends start one process per build command. A second setup() in
    the same process does not block.
    """
    if fcntl is None:
        return
    try:
        (ROOT / "build").mkdir(exist_ok=True)
        handle = os.open(ROOT / "build" / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # in a read-only tree no build can write, so none needs the lock
        return
    fcntl.lockf(handle, fcntl.LOCK_EX)


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler."""
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
    """Return the command of nvcc."""
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
    """Return the command of ninja: that of the Python package, else one on PATH."""
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    for name in ("ninja", "ninja-build"):
        if shutil.which(name):
            return [name]
    raise UnavailableError("ninja is not installed", "pip install ninja, and reinstall fastkd")


def find_headers() -> list[Path]:
    """Return the include directories of Python and pybind11."""
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


def targets_of_nvcc() -> list[str]:
    """Return the options of nvcc that name what to compile for."""
    wanted = os.environ.get("FASTKD_CUDA_ARCH") or " ".join(map(str, ARCHITECTURES))
    numbers = wanted.split()
    if not all(number.isdigit() and int(number) >= ARCHITECTURES[0] for number in numbers):
        raise CompileError(
            f"FASTKD_CUDA_ARCH must be compute capabilities from {ARCHITECTURES[0]} on, such as '90'; got {wanted!r}"
        )
    return [
        *(f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in numbers),
        f"-gencode=arch=compute_{numbers[0]},code=compute_{numbers[0]}",
    ]


def version_line(compiler: list[str]) -> str:
    """Return the first line of `compiler --version`, or the command itself if it prints nothing."""
    try:
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        version = ""
    return version.partition("\n")[0].strip() or shlex.join(compiler)


def ninja_text(
    compiler: list[str], nvcc: list[str] | None, include: list[Path], outputs: dict[str, str]
) -> str:
    """Return the text of build.ninja; ninja runs in its folder, so object files are written there."""

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
            # --keep leaves the PTX in the folder, where tests/support/ptx finds it.
            f"  command = {command(nvcc + host + NVCC + targets_of_nvcc() + headers)} $flags --keep --keep-dir . "
            "-MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $out",
            "rule nvlink",  # nvcc finds CUDA's libraries; the CUDA runtime is linked statically
            f"  command = {command(nvcc + host)} -shared -cudart static $in -o $out",
            "  description = link $out",
            edge("cuda_kernel", "nvcc", CUDA_SOURCES[0]),
            edge("cuda_module", "compile", CUDA_SOURCES[1]),
            f"build {outputs['_cuda']}: nvlink cuda_kernel.o cuda_module.o",
        ]
    return "\n".join(lines) + "\n"


def build_option(variable: str) -> str:
    """Return the value of an environment variable that must be unset, "0" or "1"; "" if unset."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise CompileError(f"{variable} must be 0, 1 or unset; got {value!r}")
    return value


class BuildNative(build_ext):
    """Build the extensions with ninja, and write `_build.json` next to them."""

    def run(self) -> None:
        """Build the extensions and record why one is missing; an error if the environment requires it."""
        native, cuda = build_option("FASTKD_NATIVE"), build_option("FASTKD_CUDA")
        targets = {name: Path(self.get_ext_fullpath(f"fastkd.{name}")) for name in ("_C", "_cuda")}
        record_at = targets["_C"].with_name("_build.json")
        record_at.parent.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"native": False, "cuda": False}
        if native != "0" and cuda != "0":
            self.build_together(targets)
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
        """Continue without an extension; CompileError if the environment variable requires it."""
        if os.environ.get(variable) == "1":
            raise CompileError(f"{variable}=1, but {failure}") from None
        target.unlink(
            missing_ok=True
        )  # the result of an earlier build would not match these sources
        if variable == "FASTKD_NATIVE" and not os.environ.get(variable):
            self.warn(f"fastkd is installed without its native extension: {failure}")

    def build_together(self, targets: dict[str, Path]) -> None:
        """Compile both extensions at the same time; nvcc alone leaves cores idle. Failures are for the builds below."""
        try:
            nvcc = find_nvcc()
            directory, ninja, _ = self.prepare(targets, nvcc)
        except UnavailableError:
            return
        names = [target.name for target in targets.values()]
        subprocess.run([*ninja, "-C", str(directory), "-k", "0", *names])

    def build_cpu(self, targets: dict[str, Path]) -> dict[str, Any]:
        """Build fastkd._C and return its record."""
        compiler = self.ninja(targets, "_C", nvcc=None)
        return {
            "native": True,
            "compiler": version_line(compiler),
            "flags": COMPILE + shlex.split(os.environ.get("CXXFLAGS", "")),
            "instruction_sets": INSTRUCTION_SETS,
        }

    def build_cuda(self, targets: dict[str, Path]) -> dict[str, Any]:
        """Build fastkd._cuda and return its record."""
        nvcc = find_nvcc()
        self.ninja(targets, "_cuda", nvcc)
        return {"cuda": True, "nvcc": shlex.join(nvcc), "cuda_flags": NVCC + targets_of_nvcc()}

    def prepare(
        self, targets: dict[str, Path], nvcc: list[str] | None
    ) -> tuple[Path, list[str], list[str]]:
        """Write build.ninja. Returns its directory, which later builds reuse, and the commands of ninja and C++."""
        if not sys.platform.startswith("linux"):
            raise UnavailableError(
                f"the native extensions are built on Linux only, and this is {sys.platform}",
                "The other backends work here",
            )
        compiler, ninja, include = find_compiler(), find_ninja(), find_headers()
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        directory = ROOT / "build" / f"native-{tag}"
        directory.mkdir(parents=True, exist_ok=True)
        outputs = {key: target.name for key, target in targets.items()}
        write_atomically(directory / "build.ninja", ninja_text(compiler, nvcc, include, outputs))
        return directory, ninja, compiler

    def ninja(self, targets: dict[str, Path], name: str, nvcc: list[str] | None) -> list[str]:
        """Build one extension, install it, and return the command of the C++ compiler."""
        directory, ninja, compiler = self.prepare(targets, nvcc)
        target = targets[name]
        if subprocess.run([*ninja, "-C", str(directory), target.name]).returncode:
            variable = "FASTKD_NATIVE" if name == "_C" else "FASTKD_CUDA"
            raise UnavailableError(
                f"the extension fastkd.{name} did not compile with {version_line(nvcc or compiler)}",
                f"Reinstall fastkd with `{variable}=1 pip install -v` to see the compiler's output",
            )
        # Replace the file rather than overwrite it, so that running processes keep the old file mapped.
        fresh = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copy2(directory / target.name, fresh)
        fresh.replace(target)
        return compiler

    def get_outputs(self) -> list[str]:
        """Return the files that this command has written; extensions that were not built are omitted."""
        targets = [Path(self.get_ext_fullpath(f"fastkd.{name}")) for name in ("_C", "_cuda")]
        files = [*targets, targets[0].with_name("_build.json")]
        return [str(file) for file in files if file.is_file()]


class BuildPython(build_py):
    """Copy the Python files into an empty directory, so that wheels contain no files of earlier builds."""

    def run(self) -> None:
        """Empty the package in build_lib, copy the files, and run build_ext even if there are no extensions."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fastkd", ignore_errors=True)
        super().run()
        if (
            not self.distribution.has_ext_modules()
        ):  # setuptools then skips build_ext, which writes _build.json
            self.get_finalized_command("build_ext").inplace = self.editable_mode
            self.run_command("build_ext")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that other processes see either the old or the new content."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(path)


lock_tree()
setup(
    packages=find_packages(include=["fastkd", "fastkd.*"]),
    # The Triton sources are in kernels/ at the top level, without an __init__.py; fastkd/kernels/ holds only an
    # __init__.py. setuptools looks for files of the package fastkd.kernels in kernels/ alone, so that __init__.py is
    # installed as data of the package fastkd.
    package_dir={"fastkd.kernels": "kernels"},
    package_data={"fastkd": ["py.typed", "*.pyi", "kernels/__init__.py"]},
    # A wheel without extension modules is platform-independent.
    ext_modules=[]
    if os.environ.get("FASTKD_NATIVE") == "0"
    else [
        Extension("fastkd._C", sources=SOURCES),
        Extension("fastkd._cuda", sources=CUDA_SOURCES),
    ],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
