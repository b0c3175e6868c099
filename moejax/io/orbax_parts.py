"""Orbax folders written and read a part at a time, through tensorstore, on which orbax stands.

Orbax itself writes arrays whole. Here it writes the folder of a tree of the same paths whose arrays
have one element each; then the arrays are replaced by those of the right shapes, and the shapes in
orbax's two JSON files. `moejax.io.orbax.load_tree` reads the outcome like any other folder.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import orbax

# What is on its way to the disk at any time, and what is kept of what was read.
_PENDING_BYTES = 32 << 20
_CACHE_BYTES = 64 << 20
# A folder of larger chunks is not read in parts.
MAX_CHUNK_BYTES = 32 << 20


class Part(NamedTuple):
    """A block of a leaf: its path, where it begins, what it holds (all dims of the leaf)."""

    path: str
    start: tuple[int, ...]
    value: np.ndarray


def write_parts(
    folder: str | os.PathLike[str],
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    chunks: Mapping[str, tuple[int, ...]],
    parts: Iterator[Part],
) -> None:
    """Writes a new folder for `moejax.io.orbax.load_tree`.

    leaves: by path. chunks: of each leaf, the block that is stored as one; parts must be whole
    chunks. parts: together every number of every leaf.
    """
    folder = Path(folder).absolute()
    ones = {name: np.zeros((1,) * len(leaf.shape), leaf.dtype) for name, leaf in leaves.items()}
    orbax.save_tree(folder, tree.unflatten(ones))
    inside = _inside(folder)
    stores = {
        name: tensorstore.open(
            _spec(inside, name)
            | {
                "metadata": {
                    "shape": list(leaf.shape),
                    "data_type": np.dtype(leaf.dtype).name,
                    "chunk_grid": {
                        "name": "regular",
                        "configuration": {"chunk_shape": list(chunks[name])},
                    },
                },
                "create": True,
                "delete_existing": True,
                "store_data_equal_to_fill_value": True,
            },
            # Whoever makes the folder flushes it as a whole.
            context=tensorstore.Context({"file_io_sync": False}),
        ).result()
        for name, leaf in leaves.items()
    }
    pending: deque[tuple[Any, int]] = deque()
    try:
        for part in parts:
            ends = zip(part.start, part.value.shape, strict=True)
            where = tuple(slice(first, first + size) for first, size in ends)
            pending.append((stores[part.path][where].write(part.value), part.value.nbytes))
            while sum(size for _, size in pending) > _PENDING_BYTES:
                pending.popleft()[0].result()
    finally:
        # Whatever ended it: nothing may be written on into a folder that is being removed.
        errors = [write.exception() for write, _ in pending]
    for error in errors:
        if error is not None:
            raise error
    _say_shapes(inside, leaves, chunks)


def _say_shapes(inside: Path, leaves, chunks) -> None:
    path = inside / "_METADATA"
    said = json.loads(path.read_text())
    for entry in said["tree_metadata"].values():
        name = "/".join(key["key"] for key in entry["key_metadata"])
        entry["value_metadata"]["write_shape"] = list(leaves[name].shape)
    path.write_text(json.dumps(said))
    for path in inside.glob("array_metadatas/*"):
        said = json.loads(path.read_text())
        for entry in said["array_metadatas"]:
            about = entry["array_metadata"]
            name = about["param_name"].replace(".", "/")
            about["write_shape"] = list(leaves[name].shape)
            about["chunk_shape"] = list(chunks[name])
        path.write_text(json.dumps(said))


class StoredLeaves:
    """The leaves of a folder, of which any block can be read."""

    def __init__(self, folder: str | os.PathLike[str], names: list[str]):
        self._folder = folder
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        try:
            inside = _inside(Path(folder).absolute())
            self._stores = {
                name: tensorstore.open(_spec(inside, name), context=context).result()
                for name in names
            }
        except (ValueError, OSError) as error:
            raise orbax.broken(folder, error) from error

    @property
    def largest_chunk(self) -> int:
        """Bytes of the largest block that is stored as one."""
        sizes = []
        for name, store in self._stores.items():
            shape: Any = store.chunk_layout.read_chunk.shape
            sizes.append(math.prod(shape) * self.dtype(name).itemsize)
        return max(sizes)

    def dtype(self, name: str) -> np.dtype:
        """As it is stored."""
        return np.dtype(self._stores[name].dtype.numpy_dtype)

    def read(self, name: str, where: tuple[int | slice, ...]) -> np.ndarray:
        """Returns this block; dims of an integer are dropped."""
        try:
            return self._stores[name][where].read().result()
        except (ValueError, OSError) as error:
            raise orbax.broken(self._folder, error) from error


def _inside(folder: Path) -> Path:
    """Where below its folder orbax keeps the arrays."""
    found = sorted(folder.glob("*/manifest.ocdbt"))
    if len(found) != 1:
        raise InputError(f"{folder} has {len(found)} sets of arrays, not one: it is incomplete")
    return found[0].parent


def _spec(inside: Path, name: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{inside}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}
    return {"driver": "zarr3", "kvstore": kvstore}
