"""The command that starts the sandbox's child inside bubblewrap, where that is installed.

bubblewrap (`bwrap`) makes the namespaces and the root; the child, as PID 1 in there, still sets its
limits, gives up its user and rights, and installs its own seccomp filter.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

from moejax.evals import sandbox_linux as linux

_HERE = os.path.dirname(os.path.abspath(__file__))
_FILES = ("sandbox_child", "sandbox_exam", "sandbox_linux", "sandbox_seccomp", "plain")
FOLDER = "/moejax"  # where the child's own files lie inside


def command(read_only: Sequence[str], disk_bytes: int) -> list[str]:
    """bubblewrap and its arguments, up to the program that is to be started.

    Args:
      read_only: paths that may be read, besides the system's and Python's.
      disk_bytes: size of the /tmp inside.

    Raises:
      OSError: it is not installed.
    """
    path = shutil.which("bwrap")
    if path is None:
        raise OSError("bubblewrap (bwrap) is not installed")
    arguments = [path, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    arguments += ["--die-with-parent", "--as-pid-1", "--clearenv"]
    if os.geteuid() == 0:  # what it takes to become nobody; the candidate keeps none of it
        for right in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            arguments += ["--cap-add", right]
    # First: Python itself, and packages, may lie in it.
    arguments += ["--perms", "1777", "--size", str(disk_bytes), "--tmpfs", "/tmp"]
    python = [sys.base_prefix, sys.base_exec_prefix]
    arguments += _folders([*python, *read_only, f"{FOLDER}/x"])
    for place in linux.outermost([*linux.SYSTEM_FOLDERS, *python, *read_only]):
        if os.path.islink(place):
            arguments += ["--symlink", os.readlink(place), place]
        else:
            arguments += ["--ro-bind", place, place]
    for device in linux.DEVICES:
        arguments += ["--dev-bind", device, device]
    for name in _FILES:
        arguments += ["--ro-bind", f"{_HERE}/{name}.py", f"{FOLDER}/{name}.py"]
    return [*arguments, "--remount-ro", "/", "--chdir", "/tmp", "--"]


def _folders(places: Sequence[str]) -> list[str]:
    """Makes the folders above `places`: those that bubblewrap makes by itself are root's alone."""
    above: dict[str, None] = {}
    for place in places:
        parts = os.path.normpath(place).strip("/").split("/")[:-1]
        above.update({"/" + "/".join(parts[: i + 1]): None for i in range(len(parts))})
    wanted = [path for path in above if path != "/tmp" and not f"{path}/".startswith("/usr/")]
    return [part for path in wanted for part in ("--perms", "0755", "--dir", path)]
