"""What the sandbox's cases share: the mode they run in, and short ways to run a program."""

import os
import sys

from moejax.evals import sandbox, sandbox_linux
from moejax.evals.sandbox import Limits, Verdict

MODE = sys.argv[1] if sys.argv[1:] and sys.argv[1] in sandbox.MODES else "namespaces"
# Only root without Landlock is promised less.
FILES_HIDDEN = MODE != "restricted" or os.getuid() != 0 or sandbox_linux.landlock_version() >= 3


def run(program: str, **limits) -> Verdict:
    return sandbox.run_python(program, Limits(**limits), allow_code_execution=True, mode=MODE)


def call(program: str, calls, **limits) -> Verdict:
    return sandbox.call_function(
        program, "f", calls, Limits(**limits), allow_code_execution=True, mode=MODE
    )


def named(marker: str) -> list[int]:
    """The processes whose name is `marker`."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm") as file:
                if file.read().strip() == marker:
                    found.append(int(pid))
        except OSError:
            continue
    return found


RENAME = """
import ctypes
ctypes.CDLL(None).prctl(15, {marker!r}.encode(), 0, 0, 0)
"""
