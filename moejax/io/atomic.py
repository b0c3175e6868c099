"""Writes that happen whole or not at all: the target is never left half made."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moejax.core.errors import InputError

_SYNCS_AT_ONCE = 8
_FULL = (errno.ENOSPC, errno.EDQUOT)
# A folder that holds one of these is a model of ours to replace; anything else is left alone.
_MODEL_MARKS = ("config.json", "moejax.json", "lineage.json")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file through a temporary one beside it, renamed when it is on the disk."""
    _write(path, lambda file: file.write(text.encode()))


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes arrays as one .npz file through a temporary file beside it."""
    _write(path, lambda file: np.savez(file, **arrays))


def _write(path: str | os.PathLike[str], fill: Callable[[Any], Any]) -> None:
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with space_errors(path), os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # mkstemp makes files that only their owner reads
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON, indented, through a temporary file beside it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads JSON; a missing or broken file is an InputError that names the place."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}; fetch the file again") from None


def read_npz(
    path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
    """The wanted arrays of an .npz file; InputError where it is missing or broken."""
    with _reading(path), np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if wanted(name)}


def read_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of an .npy file; InputError where it is missing or broken."""
    with _reading(path):
        return np.load(path, allow_pickle=False)


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{path} is broken ({error}): remove it and run what made it again"
        ) from None


@contextlib.contextmanager
def atomic_dir(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `target` when the block ends well, else vanishes.

    Args:
      target: the folder to make; its parents are made too. An empty folder may be there already.
      overwrite: replace a model folder that is there (a folder that is not a model is refused).

    Errors: InputError when the target is taken or the disk is full.
    """
    target = Path(target).absolute()
    check_target(target, overwrite)
    made = _make_parents(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    try:
        temporary.chmod(0o755)
        with space_errors(target):
            yield temporary
            sync_files(temporary)
        _replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def check_target(target: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raises InputError unless `target` is free, empty, or a model folder that may be replaced."""
    target = Path(target)
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise InputError(f"target {target} is a file: name a folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"target {target} exists: choose another or pass --overwrite")
    if not any((target / mark).exists() for mark in _MODEL_MARKS):
        raise InputError(f"target {target} is not a model folder: it will not be overwritten")


def require_disk(path: str | os.PathLike[str], num_bytes: int) -> None:
    """Raises InputError unless the file system of `path` has `num_bytes` free."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise InputError(
            f"{path} needs {num_bytes / 1e9:.2f} GB but {free / 1e9:.2f} GB are free: "
            "make room or choose another disk"
        )


@contextlib.contextmanager
def space_errors(target: str | os.PathLike[str]) -> Iterator[None]:
    """Turns "no space left" from any writer below into one InputError line."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise InputError(
            f"no space left while writing {target}: make room and run again"
        ) from error
    except ValueError as error:
        # tensorstore, below orbax, reports the same condition as text.
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise InputError(
            f"no space left while writing {target}: make room and run again"
        ) from error


def _make_parents(folder: Path) -> list[Path]:
    """Makes a folder and its parents; returns those it made, deepest first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: nothing can be written below it")
    for parent in reversed(missing):
        try:
            parent.mkdir(exist_ok=True)
        except PermissionError:
            raise InputError(f"no permission to make {parent}") from None
    return missing


def sync_files(folder: Path) -> None:
    """Flushes every file below to the disk, so that a rename never outlives its contents."""
    with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:  # each mostly waits for the disk
        for _ in pool.map(sync_path, list(folder.rglob("*"))):
            pass
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Flushes one file, or the names in a folder (not what is below), to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(temporary: Path, target: Path) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(temporary, target)
        return
    old = temporary.with_name(temporary.name + ".old")
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old)
