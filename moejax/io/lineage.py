"""What was done to what: `lineage.json`, the list of operations that made a model folder.

Each operation is ``{op, inputs: [{path, xxh3}], args, results, time, moejax}``.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.platform import versions
from moejax.io import atomic
from moejax.io.digests import hash_file

FILE = "lineage.json"
_FIELDS = {"op", "inputs", "args", "results", "time", "moejax"}

Lineage = tuple[dict[str, Any], ...]


def append(
    lineage: Iterable[dict[str, Any]],
    op: str,
    inputs: Iterable[Mapping[str, str]] = (),
    args: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
) -> Lineage:
    """Returns the lineage with one more operation; the given one is left as it is.

    Args:
      lineage: the operations before.
      op: its name ("import", "upcycle", "train", "merge", "export").
      inputs: what it read, each `{path, xxh3}` as `input_of` makes it.
      args: what it was asked, as JSON.
      results: what came of it, as JSON.
    """
    entry = {
        "op": op,
        "inputs": [dict(item) for item in inputs],
        "args": dict(args or {}),
        "results": dict(results or {}),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **versions("moejax"),
    }
    return (*lineage, entry)


def input_of(
    path: str | os.PathLike[str], hash_of: Callable[[Path], str] = hash_file
) -> dict[str, str]:
    """An entry for `inputs`: the path as given, and the hash of the weights there.

    A hub id has no hash of its own: the import that comes first in its lineage has it.
    """
    return {"path": str(path), "xxh3": hash_path(path, hash_of) if Path(path).exists() else ""}


def write(folder: str | os.PathLike[str], lineage: Iterable[dict[str, Any]]) -> None:
    """Writes `lineage.json` into a folder."""
    atomic.write_json(Path(folder) / FILE, list(lineage))


def read(folder: str | os.PathLike[str]) -> Lineage:
    """Reads a folder's `lineage.json`; empty when it has none."""
    path = Path(folder) / FILE
    if not path.exists():
        return ()
    entries = atomic.read_json(path)
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and entry.keys() >= _FIELDS for entry in entries
    ):
        raise InputError(f"{path} is not a list of operations with {', '.join(sorted(_FIELDS))}")
    return tuple(entries)


def hash_path(path: str | os.PathLike[str], hash_of: Callable[[Path], str] = hash_file) -> str:
    """XXH3 of a file, or of the weight files of a model folder (names and contents, sorted).

    hash_of: gives a file's hash, where it is known without reading the file.
    """
    path = Path(path)
    if path.is_file():
        return hash_of(path)
    total = xxhash.xxh3_128()
    stored = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))
    files = stored or sorted(file for file in (path / "params").rglob("*") if file.is_file())
    if not files:
        raise InputError(f"{path} has no weight files to hash")
    for file in files:
        total.update(f"{file.relative_to(path)}\0{hash_of(file)}\n".encode())
    return total.hexdigest()


def hash_params(params: tree.Tree) -> str:
    """SHA-256 of a tree: every path, dtype, shape and byte, in the order of the paths."""
    total = hashlib.sha256()
    for path, leaf in sorted(tree.flatten(params).items()):
        value = np.ascontiguousarray(leaf)
        total.update(f"{path}\0{value.dtype}{list(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(np.uint8).data)
    return total.hexdigest()
