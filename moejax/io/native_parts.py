"""Our own folders read and written a part at a time, in terms of Hugging Face's tensors.

Leaves are stored in blocks of some megabytes of one layer (and expert), so that the rows of a
Hugging Face tensor, which are columns of ours, are read and written as whole blocks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import jax
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import host, stream
from moejax.io.loaded import Loaded, Progress
from moejax.io.orbax_parts import MAX_CHUNK_BYTES, Part, StoredLeaves, write_parts
from moejax.io.safetensors import Info, Range
from moejax.models.config import ModelConfig
from moejax.models.families import Weight, by_name

CHUNK_BYTES = 2 << 20


def abstract(loaded: Loaded, dtype: np.dtype | None) -> tree.Tree:
    """Shapes and dtypes of the leaves that `write` writes; None keeps each leaf's dtype."""
    return tree.map_with_path(
        lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), loaded.params
    )


def write(
    folder: str | os.PathLike[str], loaded: Loaded, params: tree.Tree, progress: Progress | None
) -> None:
    """Writes the tensors of a model that was left on disk; params: what `abstract` gave."""
    leaves = tree.flatten(params)
    table = by_name(loaded.config.family).name_table(loaded.config)
    chunks = {}
    for weight in table:
        rows, columns = _block(weight, leaves[weight.path].dtype)
        chunks[weight.path] = (*[1] * len(weight.index), *columns, *rows)
    write_parts(folder, leaves, chunks, _parts(loaded, table, leaves, progress))


def _block(weight: Weight, dtype: np.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The part of our shape that is cut (and how long a cut is), and the dims before it."""
    inputs, outputs = weight.shape[: weight.in_dims], weight.shape[weight.in_dims :]
    row_bytes = math.prod(inputs) * math.prod(outputs[1:]) * np.dtype(dtype).itemsize
    return (min(outputs[0], max(1, CHUNK_BYTES // row_bytes)), *outputs[1:]), inputs


def _hf_rows(weight: Weight) -> int:
    """How many rows of the Hugging Face tensor one step along our first cut dim is."""
    flat = weight.in_dims or len(weight.hf_shape) < len(weight.shape)
    return math.prod(weight.shape[weight.in_dims + 1 :]) if flat else 1


def _parts(loaded: Loaded, table: list[Weight], leaves, progress) -> Iterator[Part]:
    assert loaded.tensors is not None
    total, done = tree.num_bytes(leaves), 0
    for weight in table:
        dtype = leaves[weight.path].dtype
        (step, *rest), inputs = _block(weight, dtype)
        per, size = _hf_rows(weight), weight.shape[weight.in_dims]
        for first in range(0, size, step):
            last = min(first + step, size)
            value = loaded.tensors.read(weight.hf_name, (first * per, last * per))
            with np.errstate(over="ignore"):
                cast = value.astype(dtype, copy=False)
            stream.check_finite(value, cast, f"tensor {weight.hf_name}")
            ours = host.transposed(cast) if weight.in_dims else cast
            ours = ours.reshape(*inputs, last - first, *rest)
            start = (*weight.index, *[0] * len(inputs), first, *[0] * len(rest))
            yield Part(weight.path, start, ours[(None,) * len(weight.index)])
            done += ours.nbytes
            if progress is not None:
                progress(done, total)


class StoredTree:
    """The Hugging Face tensors of one of our folders (a `TensorSource`)."""

    def __init__(self, leaves: StoredLeaves, table: list[Weight]):
        self._leaves = leaves
        self._weights = {weight.hf_name: weight for weight in table}
        self.infos = {
            weight.hf_name: Info(weight.hf_shape, leaves.dtype(weight.path)) for weight in table
        }

    def read(self, name: str, rows: Range = None, columns: Range = None) -> np.ndarray:
        """Returns one tensor, or these rows and columns of it."""
        weight = self._weights[name]
        per = _hf_rows(weight)
        first, last = rows or (0, weight.hf_shape[0])
        low, high = first // per, -(-last // per)
        inputs = [slice(None)] * weight.in_dims
        value = self._leaves.read(weight.path, (*weight.index, *inputs, slice(low, high)))
        if weight.in_dims:
            value = value.reshape(weight.hf_shape[1], -1).T
        else:
            value = value.reshape(-1, *weight.hf_shape[1:])
        value = value[first - low * per : last - low * per]
        return value if columns is None else value[:, slice(*columns)]


def source(
    folder: str | os.PathLike[str], config: ModelConfig, params: tree.Tree
) -> StoredTree | None:
    """The tensors of a folder, to be read in parts.

    None where that cannot be: the model has no class in transformers, or the folder has blocks of
    whole arrays, as they were written before.
    """
    try:
        table = by_name(config.family).name_table(config)
    except InputError:
        return None
    leaves = StoredLeaves(folder, list(tree.flatten(params)))
    if leaves.largest_chunk > MAX_CHUNK_BYTES:
        return None
    return StoredTree(leaves, table)
