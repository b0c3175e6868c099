"""States of a frozen model on disk: computed once, read in every epoch after.

DIR/states.json          what they are of: model, tokenizer, layers, texts (hashes), size, dtype
DIR/shard_00000.bin      states of consecutive examples, one below the other, [tokens, R]
DIR/shard_00000.json     how many tokens each of them has; written last, so a shard without it
                         is one that was never finished and is made again
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moejax.core.errors import InputError
from moejax.io import atomic

FILE = "states.json"
SHARD = 64
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# (numbers of the examples) -> states of each, [tokens, R].
Compute = Callable[[Sequence[int]], Sequence[np.ndarray]]


def texts_hash(ids: Sequence[Sequence[int]]) -> str:
    """A hash of what the source reads, token by token."""
    digest = hashlib.sha256()
    for row in ids:
        digest.update(np.asarray([len(row), *row], np.int64).tobytes())
    return digest.hexdigest()


def write_states(
    folder: str | os.PathLike[str],
    identity: Mapping[str, Any],
    num_tokens: Sequence[int],
    compute: Compute,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Computes the states of all examples that are not there yet.

    Args:
      folder: made if missing; InputError if it holds states of something else.
      identity: what the states are of; `size` (R) and `dtype` among it.
      num_tokens: of every example.
      compute: called with up to SHARD examples at a time.
      progress: called with (examples done, in all).
    """
    folder = Path(folder)
    if (folder / FILE).exists():
        check_identity(folder, identity)
    dtype = _dtype(identity)
    total = len(num_tokens)
    missing = [at for at in range(0, total, SHARD) if not _done(folder, at // SHARD)]
    todo = sum(sum(num_tokens[at : at + SHARD]) for at in missing)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.require_disk(folder, todo * identity["size"] * dtype.itemsize)
    atomic.write_json(folder / FILE, dict(identity))
    for at in range(0, total, SHARD):
        numbers = range(at, min(at + SHARD, total))
        if at in missing:
            rows = compute(numbers)
            lengths = [len(row) for row in rows]
            wanted = [num_tokens[n] for n in numbers]
            if lengths != wanted:
                raise ValueError(f"states of {lengths} tokens for texts of {wanted}")
            _write_shard(folder, at // SHARD, np.concatenate(rows).astype(dtype), lengths)
        progress(numbers[-1] + 1, total)


def check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """InputError that names what differs between wanted states and those in a folder."""
    found = atomic.read_json(folder / FILE)
    wanted = json.loads(json.dumps(dict(identity)))
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise InputError(
                f"{folder} holds states of another {key} ({found.get(key)!r} there, "
                f"{wanted.get(key)!r} here): compute them again in another folder"
            )


class States:
    """States in a folder, by number of the example.

    Errors: InputError for a folder without states, states of something else, a missing or
    truncated shard.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any], number: int):
        self._folder = Path(folder)
        if not (self._folder / FILE).is_file():
            raise InputError(f"{folder} holds no states: run the cache stage first")
        check_identity(self._folder, identity)
        self._size, self._dtype = identity["size"], _dtype(identity)
        lacking = [i for i in range(-(-number // SHARD)) if not _done(self._folder, i)]
        if lacking:
            raise InputError(
                f"{folder} lacks {len(lacking)} of {-(-number // SHARD)} parts: run the cache "
                "stage again, it goes on where it stopped"
            )

    def __getitem__(self, number: int) -> np.ndarray:
        """[tokens, R] of one example, read from disk."""
        shard, starts = self._shard(number // SHARD)
        at = number % SHARD
        return shard[starts[at] : starts[at + 1]]

    @functools.lru_cache(maxsize=256)  # noqa: B019  (one object a run, and memory maps are small)
    def _shard(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        path = _path(self._folder, index)
        lengths = atomic.read_json(path.with_suffix(".json"))["tokens"]
        wanted = sum(lengths) * self._size * self._dtype.itemsize
        if not path.is_file() or path.stat().st_size != wanted:
            found = path.stat().st_size if path.is_file() else 0
            raise InputError(f"{path} has {found} bytes and not {wanted}: remove it, cache again")
        if not wanted:
            return np.zeros((0, self._size), self._dtype), np.zeros(len(lengths) + 1, np.int64)
        shape = (sum(lengths), self._size)
        states = np.memmap(path, self._dtype, "r", shape=shape)
        return states, np.concatenate([[0], np.cumsum(lengths)])


def _write_shard(folder: Path, index: int, states: np.ndarray, lengths: list[int]) -> None:
    path = _path(folder, index)
    part = path.with_suffix(".part")
    with atomic.space_errors(path):
        with part.open("wb") as file:
            file.write(np.ascontiguousarray(states).tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        atomic.write_json(path.with_suffix(".json"), {"tokens": lengths})


def _path(folder: Path, index: int) -> Path:
    return folder / f"shard_{index:05d}.bin"


def _done(folder: Path, index: int) -> bool:
    return _path(folder, index).with_suffix(".json").exists()


def _dtype(identity: Mapping[str, Any]) -> np.dtype:
    if identity.get("dtype") not in _DTYPES:
        raise InputError(
            f"states of dtype {identity.get('dtype')!r} are unknown: use {', '.join(_DTYPES)}"
        )
    return np.dtype(_DTYPES[identity["dtype"]])
