"""Install the files in dist/ in fresh environments in which something is missing (make install-matrix).

Environments are made from build/wheelhouse alone. One environment with torch is created, and every case gets a copy of
it made of hard links, which takes a second. A case passes if the loss equals that of F.kl_div in float64, the backend
is the expected one, the reason is reported if it is a fallback, and torch's files are unchanged.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = "http://127.0.0.1:9"  # a proxy address at which nothing listens
TOOLS = ("env", "sh")  # the tools on a PATH without compilers

PROBE = """
import json, logging, torch
logging.basicConfig(level=logging.WARNING, filename="log")
import torch.nn.functional as F, fastkd, fastkd.tools.info
torch.set_num_threads(1)
torch.manual_seed(0)
student, teacher = torch.randn(4, 1000, requires_grad=True), torch.randn(4, 1000)
loss = fastkd.kd_loss(student, teacher, temperature=2.0)
loss.backward()
exact, upstream = student.detach().double().requires_grad_(), teacher.double()
log_q, log_p = (exact / 2).log_softmax(-1), (upstream / 2).log_softmax(-1)
wanted = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
wanted.backward()
print(json.dumps({
    "loss_error": abs(loss.item() / wanted.item() - 1),
    "gradient_error": ((student.grad - exact.grad).abs().max() / exact.grad.abs().max()).item(),
    "file": fastkd.__file__,
    "logged": open("log").read(),
    **fastkd.tools.info.collect(),
}))
"""

COMPILED = """
import torch, fastkd
step = torch.compile(lambda s, t: fastkd.kd_loss(s, t, temperature=2.0) * 3, fullgraph=True)
student, teacher = torch.randn(4, 100, requires_grad=True), torch.randn(4, 100)
torch.testing.assert_close(step(student, teacher), fastkd.kd_loss(student, teacher, temperature=2.0) * 3)
step(student, teacher).backward()
assert student.grad is not None
"""


class CaseError(Exception):
    """A case failed; the message says why."""


def check(truth: bool, what: object) -> None:
    if not truth:
        raise CaseError(str(what))


class Files(NamedTuple):
    """The files of a release, and the wheels that they depend on."""

    sdist: Path
    linux: Path
    pure: Path
    wheelhouse: Path


class Environment(NamedTuple):
    """A virtual environment and the environment variables of its programs."""

    folder: Path
    variables: dict[str, str]
    prefix: tuple[str, ...] = ()  # a command that runs a command

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def having(self, *prefix: str, **variables: str) -> Environment:
        return self._replace(variables=self.variables | variables, prefix=prefix or self.prefix)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.prefix, str(self.python), *map(str, arguments)],
            env=self.variables,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str | Path) -> str:
        return finish(self.start(*arguments))

    def install(self, *what: str | Path) -> None:
        self.run("-m", "pip", "install", "-q", *what)

    def probe(self) -> dict[str, Any]:
        (self.folder / "log").unlink(missing_ok=True)
        facts = json.loads(self.run("-c", PROBE).splitlines()[-1])
        check(str(self.folder) in facts["file"], facts["file"])
        check(max(facts["loss_error"], facts["gradient_error"]) < 1e-5, "loss or gradient is wrong")
        return facts

    def packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def files(self) -> dict[str, int]:
        """Return the modification times of all installed files, except for __pycache__."""
        names = (path for path in self.packages().rglob("*") if "__pycache__" not in path.parts)
        return {str(path): path.stat().st_mtime_ns for path in names if path.is_file()}


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=1200)
    check(process.returncode == 0, f"{process.args}: {output}{errors}"[-2000:])
    return output


def expect_cpu(facts: dict[str, Any]) -> str:
    check("cpu" in facts["backends"]["cpu"]["devices"], facts["backends"]["cpu"])
    check("falls back" not in facts["logged"], facts["logged"])
    return f"cpu, {facts['native']['instruction_set']}"


def expect_reference(facts: dict[str, Any], reason: str) -> str:
    """Check that the fallback ran, with the reason in the log and in the output of `info`."""
    why = facts["backends"]["cpu"]["reason"] or ""
    check(reason in why and why in facts["logged"], (reason, why, facts["logged"]))
    check("reference" in facts["logged"], facts["logged"])
    return f"reference: {why}"


# ---- cases: each is called with a fresh environment that has torch, and returns which backend ran

CASES: dict[str, Callable[[Environment, Files], str]] = {}


def case(title: str) -> Callable[[Callable[[Environment, Files], str]], None]:
    def keep(function: Callable[[Environment, Files], str]) -> None:
        CASES[title] = function

    return keep


@case("wheel, no compiler, no Triton")
def _(env: Environment, files: Files) -> str:
    env = env.having(PATH=without_compilers(env))
    env.install(files.linux)
    facts = env.probe()
    check("triton is not installed" in facts["backends"]["triton"]["reason"], facts["backends"])
    env.run("-m", "fastkd", "doctor")
    return expect_cpu(facts)


@case("sdist, no compiler")
def _(env: Environment, files: Files) -> str:
    env = env.having(PATH=without_compilers(env))
    env.install(files.sdist)
    return expect_reference(env.probe(), "no C++ compiler")


@case("sdist, compiled")
def _(env: Environment, files: Files) -> str:
    env.having(CXXFLAGS="-O0").install(files.sdist)  # -O0 compiles faster, and speed is not tested
    return expect_cpu(env.probe())


@case("wheel for any platform")
def _(env: Environment, files: Files) -> str:
    env.install(files.pure)
    return expect_reference(env.probe(), "the wheel for any platform")


@case("wheel for any platform, Triton")
def _(env: Environment, files: Files) -> str:
    env.install(
        f"fastkd[triton] @ {files.pure.as_uri()}", "numpy"
    )  # the latter for the interpreter
    facts = env.having(TRITON_INTERPRET="1", FASTKD_BACKEND="triton").probe()
    check(facts["backends"]["triton"]["devices"] == ["cpu"], facts["backends"]["triton"])
    return f"triton {facts['versions']['triton']}, in its interpreter"


@case("by name: pip chooses")
def _(env: Environment, files: Files) -> str:
    env.install("--find-links", files.pure.parent, "fastkd")
    ours = expect_cpu(env.probe())
    for platform in ("macosx_14_0_arm64", "win_amd64", "musllinux_1_2_x86_64"):
        flags = (
            "--no-deps",
            "--only-binary=:all:",
            "--platform",
            platform,
            "-d",
            env.folder / platform,
        )
        env.run("-m", "pip", "download", "-q", *flags, "--find-links", files.pure.parent, "fastkd")
        chosen = [path.name for path in (env.folder / platform).iterdir()]
        check(chosen == [files.pure.name], (platform, chosen))
    return f"{ours}; elsewhere the wheel for any platform"


@case("no network, torch and all")
def _(env: Environment, files: Files) -> str:
    env.run("-m", "pip", "uninstall", "-q", "-y", "torch")
    env.having(http_proxy=NOWHERE, https_proxy=NOWHERE).install(
        "--find-links", files.pure.parent, "fastkd"
    )
    return expect_cpu(env.having(http_proxy=NOWHERE, https_proxy=NOWHERE).probe())


@case("a home that cannot be written")
def _(env: Environment, files: Files) -> str:
    home = env.folder / "home"
    home.mkdir()
    home.chmod(0o500)
    # Permission bits do not apply to root unless it drops the capability to override them.
    bound = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", "--")
    env = env.having(*(bound if os.geteuid() == 0 else ()), HOME=str(home))
    refused = "import os, sys; sys.exit(os.access(os.environ['HOME'], os.W_OK))"
    env.run("-c", refused)
    env.install("--no-cache-dir", files.linux)
    ran = expect_cpu(env.probe())
    env.run("-c", COMPILED)
    check(not list(home.iterdir()), "something was written")
    return f"{ran}, and torch.compile"


@case("two installs at once")
def _(env: Environment, files: Files) -> str:
    other = env._replace(folder=copy(env.folder, env.folder.with_name("second")))
    command = ("-m", "pip", "install", "-q")
    both = [each.having(FASTKD_NATIVE="0").start(*command, files.sdist) for each in (env, other)]
    for process in both:
        finish(process)
    for each in (env, other):
        expect_reference(each.probe(), "FASTKD_NATIVE=0")
    shutil.rmtree(other.folder)
    return "reference, as asked for, in both"


@case("a path with spaces, in Japanese")
def _(env: Environment, files: Files) -> str:
    moved = env._replace(folder=copy(env.folder, env.folder.with_name("蒸留 of knowledge")))
    (wheel,) = (shutil.copy2(files.linux, moved.folder),)
    moved.install(wheel)
    ran = expect_cpu(moved.probe())
    shutil.rmtree(moved.folder)
    return ran


@case("uninstalled")
def _(env: Environment, files: Files) -> str:
    before = env.files()
    env.install(files.linux)
    env.probe()
    env.run("-m", "pip", "uninstall", "-q", "-y", "fastkd")
    check(env.files() == before, sorted(env.files().keys() - before.keys()))
    left = list(env.packages().glob("fastkd*"))
    check(not left, left)
    return "nothing is left"


@case("no libgomp of the system")
def _(env: Environment, files: Files) -> str:
    env.install(files.linux)
    hidden = hide_libgomp(env.folder)
    if hidden is None:
        return "not run: it takes root, and a system with libgomp"
    facts = env.having("unshare", "--mount", "sh", "-c", f'{hidden}; exec "$0" "$@"').probe()
    if list(env.packages().glob("torch/lib/libgomp.so.1")):
        return f"{expect_cpu(facts)}, with torch's libgomp"
    return expect_reference(facts, "libgomp.so.1")  # under another name it serves torch alone


def hide_libgomp(folder: Path) -> str | None:
    """Return a command that hides the system's libgomp behind an empty file in one mount namespace, or None."""
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
    places = [line.split(" => ")[1] for line in listed.splitlines() if "libgomp.so.1" in line]
    empty = folder / "empty"
    empty.touch()
    command = " && ".join(f"mount --bind '{empty}' '{Path(place).resolve()}'" for place in places)
    tried = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True)
    return command if places and tried.returncode == 0 else None


def without_compilers(env: Environment) -> str:
    """Return a PATH with this environment's programs but without compilers."""
    tools = env.folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name) or name)
    return f"{env.folder / 'bin'}:{tools}"


# ---- environments


def copy(source: Path, destination: Path) -> Path:
    """Copy a folder with hard links, which is safe because pip replaces files rather than writing into them."""
    shutil.copytree(source, destination, symlinks=True, copy_function=link)
    return destination


def link(source: str, destination: str) -> None:
    # Copy symbolic links as links, and copy programs in bin/, which contain the path of their environment.
    if os.path.islink(source) or "/bin/" in source:
        shutil.copy2(source, destination, follow_symlinks=False)
    else:
        os.link(source, destination)


def environments(files: Files, python: str, scratch: Path) -> Iterator[Environment]:
    """Create an environment with torch, then yield fresh copies of it."""
    variables = {
        k: v for k, v in os.environ.items() if not k.startswith(("FASTKD_", "PIP_", "PYTHON"))
    }
    variables |= {
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": str(files.wheelhouse),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_WAIT_POLICY": "passive",
        "HOME": str(scratch / "home"),
    }
    base = Environment(scratch / "base", variables | {"FASTKD_CUDA": "0"})
    subprocess.run([python, "-m", "venv", base.folder], check=True)
    torch = next(files.wheelhouse.glob("torch-*.whl"))
    base.install(torch)
    base.run("-c", "import torch")
    while True:
        folder = copy(base.folder, scratch / "environment")
        yield base._replace(folder=folder)
        shutil.rmtree(folder)


def run(title: str, env: Environment, files: Files) -> tuple[str, str]:
    """Run a case and return (verdict, which backend ran or what went wrong)."""
    torches = {name: time for name, time in env.files().items() if "/torch" in name}
    try:
        outcome = CASES[title](env, files)
        now = env.files()
        if "torch and all" not in title:
            check(torches == {n: now.get(n) for n in torches}, "files of torch have changed")
    except (CaseError, OSError, subprocess.SubprocessError) as failure:
        return "FAIL", str(failure)
    return "ok", outcome


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--wheelhouse", type=Path, default=ROOT / "build" / "wheelhouse")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of environments")
    parser.add_argument("-k", default="", help="run only the cases whose names contain this")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    dist = chosen.dist.resolve()
    files = Files(
        next(dist.glob("*.tar.gz")),
        next(dist.glob("*linux*.whl")),
        next(dist.glob("*-none-any.whl")),
        chosen.wheelhouse.resolve(),
    )
    table = Table("case", "", "what runs", "seconds", title=files.linux.name)
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fastkd-") as scratch:
        fresh = environments(files, chosen.python, Path(scratch))
        for title in CASES:
            if chosen.k not in title:
                continue
            environment = next(fresh)
            start = time.monotonic()
            verdict, outcome = run(title, environment, files)
            print(f"{verdict}: {title}", flush=True)
            seconds = f"{time.monotonic() - start:.0f}"
            if verdict != "ok":
                failures.append(f"{title}: {outcome}")
                outcome = outcome.rstrip().rpartition("\n")[2]
            table.add_row(title, verdict, outcome, seconds)
        fresh.close()
    print(*failures, sep="\n")
    Console().print(table)
    return 1 if failures or not table.rows else 0


if __name__ == "__main__":
    sys.exit(main())
