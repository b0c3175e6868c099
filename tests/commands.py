"""Launchers run as a user runs them: in a process of their own, from the root of the checkout."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Done = subprocess.CompletedProcess[str]


def run(module: str, *flags: str, timeout_s: int = 900) -> Done:
    """Runs `python -m launch.MODULE FLAGS` on the CPU, without a compile cache of the user's.

    The process is forked from one that has imported jax (`tests.forking`), unless the environment
    says something to jax or Python that this one has not read.
    """
    command, env = [f"launch.{module}", "--compile_cache=", *flags], dict(os.environ)
    env["JAX_PLATFORMS"] = "cpu"
    if _read_at_import(env) != _STARTED:
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        asked: dict[str, Any] = {"cwd": str(ROOT), "env": env, "out": str(out), "err": str(err)}
        forking = _forking()
        assert forking.stdin is not None
        asked |= {"module": command[0], "flags": command[1:]}
        forking.stdin.write(json.dumps(asked).encode() + b"\n")
        pid = _answer(forking)["pid"]
        assert forking.stdout is not None
        if not select.select([forking.stdout], [], [], timeout_s)[0]:
            os.killpg(pid, signal.SIGKILL)
            _answer(forking)
            raise subprocess.TimeoutExpired(command, timeout_s, out.read_text(), err.read_text())
        return Done(command, _answer(forking)["code"], out.read_text(), err.read_text())


def _read_at_import(env: dict[str, str]) -> dict[str, str]:
    return {n: value for n, value in env.items() if n.startswith(("JAX_", "PYTHON", "HF_"))}


_STARTED = _read_at_import(os.environ | {"JAX_PLATFORMS": "cpu"})


@functools.cache
def _forking() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forking"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,  # a line is read as it comes, and nothing beyond it
    )
    atexit.register(process.kill)
    _answer(process)  # all is imported
    return process


def _answer(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "tests.forking has ended: run `python -m tests.forking` to see why"
    return json.loads(line)
