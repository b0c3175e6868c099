"""Tensors on their way from one file to another, a few megabytes at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io.safetensors import Entry, Info, Range, TensorSource, dtype_named
from moejax.models.families import Weight

# Small enough for a processor's cache, large enough that a call costs nothing.
PART_BYTES = 2 << 20
# A float is NaN or infinite where all bits of its exponent are set.
_EXPONENTS: dict[str, np.unsignedinteger] = {
    "float64": np.uint64(0x7FF << 52),
    "float32": np.uint32(0xFF << 23),
    "float16": np.uint16(0x1F << 10),
    "bfloat16": np.uint16(0xFF << 7),
}


class TreeSource:
    """The tensors of a tree in memory, by Hugging Face's names and in its layout."""

    def __init__(self, params: tree.Tree, table: list[Weight]):
        self._leaves = tree.flatten(params)
        self._weights = {weight.hf_name: weight for weight in table}
        self.infos = {
            name: Info(weight.hf_shape, np.dtype(self._leaves[weight.path].dtype))
            for name, weight in self._weights.items()
        }
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, name: str, rows: Range = None, columns: Range = None) -> np.ndarray:
        """Returns a view of one tensor, or of these rows and columns."""
        if self._last is None or self._last[0] != name:
            weight = self._weights[name]
            leaf = self._leaves[weight.path]
            # Of a jax array only this part comes to the host.
            value = np.asarray(leaf[weight.index] if weight.index else leaf)
            self._last = (name, weight.to_hf(value))
        value = self._last[1]
        value = value if rows is None else value[slice(*rows)]
        return value if columns is None else value[:, slice(*columns)]


def entries(source: TensorSource, table: list[Weight], dtype: str) -> Iterator[Entry]:
    """Every tensor of a table, to be read, checked, cast and written part by part.

    They come as they lie in the source, which so is read from end to end.
    dtype: of the written tensors; "keep" leaves each as it is.
    """
    wanted = None if dtype == "keep" else dtype_named(dtype)
    asked = {weight.hf_name for weight in table}
    assert asked <= source.infos.keys(), asked - source.infos.keys()
    for name, info in source.infos.items():
        if name in asked:
            yield _entry(source, name, Info(info.shape, wanted or info.dtype))


def _entry(source: TensorSource, name: str, info: Info) -> Entry:
    return Entry(name, info, lambda: cast_parts(source, name, info.dtype))


def cast_parts(
    source: TensorSource, name: str, dtype: np.dtype, rows_at_once: int = 1
) -> Iterator[np.ndarray]:
    """A tensor's rows in order, of another dtype; parts hold a multiple of `rows_at_once` rows.

    Errors: InputError for values that are NaN, infinite, or too large for the dtype.
    """
    for rows in row_ranges(source.infos[name], rows_at_once):
        value = source.read(name, rows)
        with np.errstate(over="ignore"):
            cast = value.astype(dtype, copy=False)
        check_finite(value, cast, f"tensor {name}")
        yield cast


def check_all(
    source: TensorSource,
    table: list[Weight],
    dtype: str = "keep",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Reads every tensor of a table for the errors of `cast_parts`, before anything is written.

    The pass costs the reading; what is read next mostly comes out of the system's cache.
    """
    found = list(entries(source, table, dtype))
    total, done = sum(entry.num_bytes for entry in found), 0
    for entry in found:
        for part in entry.parts():
            done += part.nbytes
            if progress is not None:
                progress(done, total)


def row_ranges(info: Info, rows_at_once: int = 1) -> Iterator[Range]:
    """Ranges of rows that cover a tensor, each of about PART_BYTES."""
    if not info.shape:
        yield None
        return
    row_bytes = max(1, math.prod(info.shape[1:]) * info.dtype.itemsize)
    step = max(1, PART_BYTES // row_bytes // rows_at_once) * rows_at_once
    for start in range(0, info.shape[0], step):
        yield start, min(start + step, info.shape[0])


def check_finite(stored: np.ndarray, ours: np.ndarray, what: str) -> None:
    """Raises InputError when values are NaN or infinite, or became so by a cast."""
    if is_finite(ours):
        return
    bad = int(stored.size - np.isfinite(stored).sum())
    if bad:
        raise InputError(f"{what} has {bad} values that are NaN or infinite")
    raise InputError(f"{what} does not fit {ours.dtype}: use --dtype=bfloat16 or float32")


def is_finite(value: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; on the bits, since ml_dtypes' isfinite is slow.

    Read as integers, what is not finite is the largest there is: with a sign among unsigned ones,
    without among signed ones.
    """
    mask = _EXPONENTS[value.dtype.name]
    if value.T.flags.c_contiguous:
        value = value.T
    bits = np.ascontiguousarray(value).reshape(-1).view(mask.dtype)
    if not bits.size:
        return True
    sign = ~(~mask.dtype.type(0) >> 1)
    return bool(bits.max() < (sign | mask) and bits.view(f"i{mask.itemsize}").max() < mask)
