"""Products with chosen blocks by a C++ kernel that XLA calls: float32 on CPUs.

The source beside this file is compiled on first use by the machine's own `c++` against the headers
that come with jaxlib, and kept in ~/.cache/moejax/native under a name that holds what it was made
from. Nothing else of moejax needs a compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib

from moejax.core.errors import InputError

SOURCE = Path(__file__).with_suffix(".cc")
CACHE = Path("~/.cache/moejax/native")
_TARGETS = {2: "MoejaxSparseInto", 3: "MoejaxSparseOutOf"}  # by the dims of x
# Sums may be split over a vector's lanes; what -ffast-math does to the rest of the process may not.
_FLAGS: tuple[str, ...] = (
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-march=native",
    "-fassociative-math",
)
_FLAGS += ("-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")


def sparse_matmul_native(x: jax.Array, w_MPD: jax.Array, chosen_K: jax.Array) -> jax.Array:
    """See `moejax.ops.sparse_matmul.sparse_matmul`.

    Raises InputError where the kernel cannot be compiled, NotImplementedError for other types than
    float32.
    """
    if not x.dtype == w_MPD.dtype == "float32":
        raise NotImplementedError(
            f"sparse_matmul 'native' takes float32, not {x.dtype} and {w_MPD.dtype}: use 'cpu'"
        )
    lacking = missing()
    if lacking:
        raise InputError(f"sparse_matmul 'native': {lacking}; use implementation='cpu'")
    num_batch = x.shape[0]
    shape: tuple[int, ...] = (num_batch, w_MPD.shape[2])
    if x.ndim == 2:
        shape = (num_batch, chosen_K.shape[0], w_MPD.shape[1])
    out = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.ffi.ffi_call(_TARGETS[x.ndim], out)(x, w_MPD, chosen_K)


@functools.lru_cache
def missing() -> str | None:
    """Why there is no kernel on this machine; None when there is one, ready to be called."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler is installed"
    try:
        library = ctypes.cdll.LoadLibrary(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{compiler} could not build it: {str(error).partition(chr(10))[0]}"
    for name in _TARGETS.values():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def _compiled(compiler: str) -> Path:
    """The library, compiled now unless one of the same source, jaxlib and processor is kept."""
    made_of = (SOURCE.read_text(), jaxlib.__version__, *_FLAGS, compiler, _processor())
    name = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    kept = CACHE.expanduser() / f"sparse_matmul-{name}.so"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        target = Path(folder) / kept.name
        command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason"]
            raise subprocess.SubprocessError(said[0])
        os.replace(target, kept)  # another process may do the same at the same time
    return kept


def _processor() -> str:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
