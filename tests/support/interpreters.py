"""Python processes as tests start them, forked from one that has imported torch, which takes most of their time.

Each begins with the modules of `import torch` alone, and with the environment, folder and arguments of its own command.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_server: subprocess.Popen[str] | None = None


def _started() -> subprocess.Popen[str]:
    """The process from which others are forked; it ends when its input is closed, at the latest with this process."""
    global _server
    if _server is None or _server.poll() is not None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        _server = subprocess.Popen(
            [sys.executable, __file__], env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        atexit.register(_server.communicate)
    return _server


def python(
    *arguments: str,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 900,
) -> subprocess.CompletedProcess[str]:
    """What subprocess.run([sys.executable, *arguments], capture_output=True, text=True, ...) does.

    The arguments are `-c CODE`, `-m MODULE` or a file, and those of the script.
    """
    global _server
    server = _started()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/stdout", f"{folder}/stderr"]
        order = [arguments, str(cwd or Path.cwd()), dict(os.environ if env is None else env), files]
        server.stdin.write(json.dumps(order) + "\n")
        if not select.select([server.stdout], [], [], timeout)[0]:
            server.kill()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        code = int(server.stdout.readline())
        output, errors = (Path(file).read_text() for file in files)
    return subprocess.CompletedProcess([sys.executable, *arguments], code, output, errors)


def _serve() -> Any:
    """Fork a process for each order; return the order in that process."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def _become(arguments: list[str], cwd: str, environment: dict[str, str], files: list[str]) -> None:
    """Run the command in this process, as a new interpreter would."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    kind, *others = arguments
    file = kind not in ("-c", "-m")
    of_script = str(Path(kind).resolve().parent) if file else "" if kind == "-c" else cwd
    given = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [of_script, *given]  # in place of this file's folder
    sys.argv = arguments if file else [kind, *others[1:]]
    if kind == "-c":
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec"), main.__dict__)
    elif file:
        runpy.run_path(kind, run_name="__main__")
    else:
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    import torch  # noqa: F401

    _become(*_serve())
