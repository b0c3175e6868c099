"""Launchers run as a user runs them: in a process of their own, from the root of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
Done = subprocess.CompletedProcess[str]


def run(module: str, *flags: str, timeout_s: int = 900) -> Done:
    """Runs `python -m launch.MODULE FLAGS` on the CPU, without a compile cache of the user's."""
    return subprocess.run(
        [sys.executable, "-m", f"launch.{module}", "--compile_cache=", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
