"""Parameters from disk straight onto a mesh: each process reads only the slices it holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.mesh import check_axes
from moejax.core.sharding import param_spec
from moejax.io import native, native_parts, stream
from moejax.io.loaded import Loaded
from moejax.io.safetensors import Range, TensorSource
from moejax.models.families import Weight, by_name

# Path and abstract value of a leaf -> how it lies on the devices.
Place = Callable[[str, jax.ShapeDtypeStruct], Sharding]


def on_mesh(mesh: Mesh) -> Place:
    """Every leaf by the rules of `moejax.core.sharding`; InputError where one cannot be split."""
    check_axes(mesh)
    return lambda path, leaf: NamedSharding(mesh, param_spec(path, leaf.shape, mesh))


def load_sharded(loaded: Loaded, place: Place) -> Loaded:
    """Reads a model that was left on disk (`load_any(..., abstract=True)`) into sharded arrays.

    The abstract parameters say the dtypes. Of a Hugging Face folder or a GGUF file a slice that
    several devices of this process hold is read once; our own folders orbax reads, by its chunks.

    Errors: InputError, before anything is read, where a leaf does not divide as `place` wants.
    """
    leaves = tree.flatten(loaded.params)
    shardings = {path: _fitting(path, leaf, place(path, leaf)) for path, leaf in leaves.items()}
    if loaded.tensors is None or isinstance(loaded.tensors, native_parts.StoredTree):
        params = native.read_sharded(loaded.source, loaded.params, tree.unflatten(shardings))
        return dataclasses.replace(loaded, params=params, tensors=None)
    source = loaded.tensors
    weights: dict[str, dict[tuple[int, ...], Weight]] = {}
    for weight in by_name(loaded.config.family).name_table(loaded.config):
        weights.setdefault(weight.path, {})[weight.index] = weight

    def leaf(path: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        read: dict[Any, np.ndarray] = {}

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            key = tuple(s.indices(n)[:2] for s, n in zip(index, abstract.shape, strict=True))
            if key not in read:
                read[key] = _read_part(source, weights[path], key, abstract.dtype)
            return read[key]

        return jax.make_array_from_callback(abstract.shape, shardings[path], part)

    params = tree.map_with_path(leaf, loaded.params)
    return dataclasses.replace(loaded, params=params, tensors=None)


def spread(params: tree.Tree, place: Place) -> tree.Tree:
    """Whole arrays of this host as sharded ones; of several processes each has all of them.

    Errors: InputError where a leaf does not divide as `place` wants.
    """

    def leaf(path: str, whole: Any) -> jax.Array:
        host = np.asarray(whole)
        abstract = jax.ShapeDtypeStruct(host.shape, host.dtype)
        sharding = _fitting(path, abstract, place(path, abstract))
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return tree.map_with_path(leaf, params)


def _fitting(path: str, leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> Sharding:
    try:
        sharding.shard_shape(leaf.shape)
    except ValueError as error:
        raise InputError(f"{path} {list(leaf.shape)} cannot lie as {sharding}: {error}") from error
    return sharding


def _read_part(
    source: TensorSource, weights: dict[tuple[int, ...], Weight], key: tuple, dtype: Any
) -> np.ndarray:
    """One slice of a leaf, put together of slices of its tensors."""
    stacked = len(next(iter(weights)))
    value = np.empty([last - first for first, last in key], dtype)
    for place in np.ndindex(value.shape[:stacked]):
        weight = weights[tuple(i + key[n][0] for n, i in enumerate(place))]
        value[place] = _read_tensor(source, weight, key[stacked:], dtype)
    return value


def _read_tensor(source: TensorSource, weight: Weight, key: tuple, dtype: Any) -> np.ndarray:
    in_dims, shape = weight.in_dims, weight.shape
    if not in_dims and len(weight.hf_shape) < len(shape):  # a bias of heads, small
        whole = weight.from_hf(source.read(weight.hf_name))
        value = whole[tuple(slice(*r) for r in key)]
    elif not in_dims:
        columns = key[1] if len(key) > 1 and key[1] != (0, shape[1]) else None
        value = source.read(weight.hf_name, key[0], columns)
    else:
        rows, row_shape, row_cut = _flat(key[in_dims:], shape[in_dims:])
        columns, column_shape, column_cut = _flat(key[:in_dims], shape[:in_dims])
        value = source.read(weight.hf_name, rows, columns).T.reshape(*column_shape, *row_shape)
        value = value[(*column_cut, *row_cut)]
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    stream.check_finite(value, cast, f"tensor {weight.hf_name}")
    return cast


def _flat(key: tuple, shape: tuple[int, ...]) -> tuple[Range, tuple[int, ...], tuple[slice, ...]]:
    """The range of flattened dims that holds a slice, its shape, and the cut that is left."""
    (first, last), inner = key[0], math.prod(shape[1:])
    cut = (slice(None), *(slice(*r) for r in key[1:]))
    return (first * inner, last * inner), (last - first, *shape[1:]), cut
