"""What the GPU kernels of a compiled program are, from the PTX that XLA dumps beside it.

XLA hands kernels to ptxas and keeps no word of what came out; ptxas run again says it.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from moejax.core.errors import InputError


class Kernel(NamedTuple):
    """Matrix instructions of tensor cores (wgmma) in its text; bytes of registers spilled."""

    wgmma: int
    spilled: int


def dump_flags(folder: Path) -> str:
    """For XLA_FLAGS, before jax is imported: every kernel's PTX goes to this folder."""
    return f"--xla_dump_to={folder} --xla_dump_hlo_as_text=false"


def kernels(folder: Path, pattern: str, arch: str = "sm_90a") -> dict[str, Kernel]:
    """The dumped kernels whose name begins with a regular expression, assembled for `arch`.

    Errors: InputError where ptxas (package nvidia-cuda-nvcc) is not installed.
    """
    spec = importlib.util.find_spec("nvidia.cuda_nvcc")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("ptxas is not installed: pip install -e .[aot]")
    ptxas = Path(spec.submodule_search_locations[0]) / "bin" / "ptxas"
    found = {}
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        name = re.search(rf"entry ({pattern}\w*)", text)
        if name:
            command = [str(ptxas), "-v", f"-arch={arch}", str(path), "-o", str(folder / "cubin")]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            spilled = sum(int(b) for b in re.findall(r"(\d+) bytes spill", said))
            found[name[1]] = Kernel(text.count("wgmma.mma_async"), spilled)
    return found
