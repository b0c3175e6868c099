"""Programs of tests that need several CPU devices, which a process has to ask for as it starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import jax

from moejax.core.mesh import AXES

ROOT = Path(__file__).resolve().parents[1]
# A test's programs run once, so that compiling them is what takes time: LLVM's optimiser would
# double it, and XLA's newer emitters of fusions double it again. jaxlib 0.12 has no others.
QUICK = "--xla_backend_optimization_level=0"
# With jaxlib 0.10 programs of several CPU devices that are read from the cache end in deadlock, as
# each device waits in another exchange; compiled anew they do not, nor with jaxlib 0.12.
CACHED = not version("jaxlib").startswith("0.10.")
if not CACHED:
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def absent(*sizes: int) -> jax.sharding.AbstractMesh:
    """A mesh of devices that need not be there, to see what would be computed on them."""
    automatic = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.AbstractMesh(sizes, AXES, axis_types=automatic)


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many CPU devices, compiled for as this one's."""
    flags = f"{os.environ.get('XLA_FLAGS', QUICK)} --xla_force_host_platform_device_count={devices}"
    cache = {} if CACHED else {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | cache


def start(program: str, devices: int, *arguments: str) -> subprocess.Popen[str]:
    """Starts tests/PROGRAM with so many CPU devices; it prints a JSON object per line."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / program), *arguments],
        env=environment(devices) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(process: subprocess.Popen[str], timeout_s: int = 600) -> list[dict]:
    """The objects that the program printed, once it has ended well."""
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, err[-3000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def on_two_processes(program: str, *arguments: str, timeout_s: int = 600) -> Iterable[list[dict]]:
    """What two processes of four devices each print; they get their number and a port besides."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = [start(program, 4, *arguments, str(index), port) for index in range(2)]
    try:
        yield from [results(process, timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
