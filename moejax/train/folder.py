"""A folder is the place of one run: what it is stands in config.json and is compared."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from moejax.io import processes
from moejax.io.atomic import read_json, write_json
from moejax.io.lock import locked


def claim_folder(
    folder: str | os.PathLike[str],
    identity: Mapping[str, Any],
    name: str = "config.json",
    free: Collection[str] = (),
    before: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Makes a folder the place of one run: writes `identity` there, or compares it with what is.

    Keys in `free` ("train.log_every") may differ. `before`: what was meant where a folder lacks a
    key ("config.data.on_long"), as one made by an earlier version does; None for a key that one of
    the two may lack. InputError names keys that differ and both values; nothing is touched then.
    """
    folder, problem = Path(folder), ""
    if processes.is_first():
        wanted = json.loads(json.dumps(identity))
        if (folder / name).exists():
            there = read_json(folder / name)
            problem = _difference(folder, wanted, there, free, before)
        if not problem:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / name, wanted)
    processes.agree(problem)


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps a second start of a run out of its folder until the block ends.

    Process 0 does it for all. InputError, on every process, where one is there already.
    """
    with contextlib.ExitStack() as stack:
        holder = stack.enter_context(locked(folder)) if processes.is_first() else ""
        processes.agree(
            f"{folder} is in use by {holder}: wait until that has ended, or stop it"
            if holder
            else ""
        )
        yield


def check_shared(folder: str | os.PathLike[str], wait_s: float = 30.0) -> None:
    """InputError unless all processes see the same folder, which is made if missing.

    Process 0 leaves a file there for a moment and the others look for it, up to `wait_s` seconds:
    a network's file system may remember for a while what was not there.
    """
    if jax.process_count() == 1:
        return
    folder, problem = Path(folder), ""
    nonce = processes.all_bytes(secrets.token_hex(8).encode())[0].decode()
    mark = folder / f".seen_by_all.{nonce}"
    if processes.is_first():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            problem = f"{folder}: {error.strerror}"
    try:
        processes.agree(problem)
        deadline = time.monotonic() + wait_s
        while not mark.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        if not mark.exists():
            problem = (
                f"{socket.gethostname()} does not see what process 0 wrote into {folder}: name a "
                "folder on storage that all hosts share, as NFS"
            )
        processes.agree(problem)
    finally:
        if processes.is_first():
            mark.unlink(missing_ok=True)


def _difference(folder: Path, wanted: Any, there: Any, free: Collection[str], before) -> str:
    ours, theirs, missing = _leaves(wanted), _leaves(there), object()
    theirs = {k: value for k, value in before.items() if k in ours and value is not None} | theirs
    either = [key for key, value in before.items() if value is None]
    free = {*free, *(key for key in either if not (key in ours and key in theirs))}
    names = [
        key
        for key in sorted(ours.keys() | theirs.keys())
        if key not in free and ours.get(key, missing) != theirs.get(key, missing)
    ]
    if not names:
        return ""
    differing = [
        f"{key} ({theirs.get(key, 'unset')!r} there, {ours.get(key, 'unset')!r} here)"
        for key in names
    ]
    what = f"{folder} holds a run of another config: {', '.join(differing)}"
    if any(key.startswith("data.") for key in names if key in ours):
        what += ". The data is not what the run began with: bring that file back"
        return what + ", or start anew in another folder"
    return what + "; give that config, or another folder"


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": leaf} of nested JSON objects."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        path: leaf
        for key, item in value.items()
        for path, leaf in _leaves(item, f"{prefix}.{key}" if prefix else key).items()
    }
