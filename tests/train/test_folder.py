"""A run's folder: one process at a time in it, and one folder for all processes."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moejax.core.errors import InputError
from moejax.io import lock, processes
from moejax.io.lock import locked
from moejax.train.folder import alone_in, check_shared
from tests.train import test_loop

HOLDER = """
import runpy, sys, time
with runpy.run_path(sys.argv[1])["locked"](sys.argv[2]) as holder:
    print(repr(holder), flush=True)
    time.sleep(600)
"""


def test_a_second_start_is_told_who_is_there_and_comes_in_once_that_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(lock.__file__), str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "''\n"
        said = f"{tmp_path} is in use by process {first.pid} on .*: wait until that has ended"
        with pytest.raises(InputError, match=said), alone_in(tmp_path):
            pass
    finally:
        first.kill()
        first.wait()
    with alone_in(tmp_path), locked(tmp_path) as holder:
        assert f"process {os.getpid()} on " in holder


def test_only_the_first_process_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with locked(tmp_path / "a"), alone_in(tmp_path / "a"):
        pass


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def refused(file, how):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refused)
    with alone_in(tmp_path), alone_in(tmp_path):
        pass


def test_a_second_start_while_the_first_is_at_it_changes_nothing(tmp_path):
    test_loop.run(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    part = tmp_path / "ckpt" / ".part"
    part.mkdir()
    with locked(tmp_path), pytest.raises(InputError, match="is in use by process .*: wait until"):
        test_loop.run(tmp_path, dataclasses.replace(test_loop.CONFIG, log_every=5))
    assert part.is_dir() and files == {path: path.read_bytes() for path in files}


def as_process(monkeypatch, index: int, other: str = "") -> None:
    """Makes this process one of two; the nonce of process 0 is "ab" and its problem `other`."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(processes, "all_bytes", lambda data: [b"ab", data])
    said = (lambda text: ["", text]) if index else (lambda text: [text, other])
    monkeypatch.setattr(processes, "texts", said)


def test_a_process_that_sees_another_folder_says_so_and_the_first_names_it(tmp_path, monkeypatch):
    as_process(monkeypatch, 1)
    Path(tmp_path / ".seen_by_all.ab").touch()
    check_shared(tmp_path, wait_s=0)
    (tmp_path / ".seen_by_all.ab").unlink()
    with pytest.raises(InputError, match=f"does not see what process 0 wrote into {tmp_path}"):
        check_shared(tmp_path, wait_s=0.2)
    as_process(monkeypatch, 0, "host does not see")
    with pytest.raises(InputError, match="process 1: host does not see"):
        check_shared(tmp_path / "new")
    as_process(monkeypatch, 0)
    check_shared(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
