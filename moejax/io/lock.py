"""One process at a time in a folder, by a lock that ends with the process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_FILE = "lock"


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Keeps others out of a folder until the block ends; yields who is there already, or "".

    The folder is made if missing. The lock is flock's, of FOLDER/lock: the kernel lets go of it
    when a process is killed. On a file system that knows none nobody is kept out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _FILE).open("a+", encoding="utf-8") as file:
        holder = _take(file)
        if not holder:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield holder


def _take(file) -> str:
    """Takes the lock; who has it if that is somebody else."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "another process"
    except OSError:  # a file system without locks
        pass
    return ""
