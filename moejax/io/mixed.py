"""Tensors that are mixtures of those of several models, made while they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np

from moejax.core.errors import InputError
from moejax.io import host
from moejax.io.safetensors import Info, Range, SafetensorsFolder, TensorSource

# Elements that are mixed at a time: twice in float32 a megabyte, which stays in a core's cache.
_BLOCK = 1 << 17


class LinearSource:
    """The sum over models of weight times tensor; holds a part of each model at a time.

    Args:
      sources: one per model, with the same tensors.
      weights_of: name of a tensor -> one weight per model. Where one has weight 1 and all others 0
        its bytes are handed on; where one has weight 0 it is read only if what is read is hashed.

    Arithmetic is float32, or float64 for float64 tensors.
    """

    def __init__(
        self, sources: Sequence[TensorSource], weights_of: Callable[[str], Sequence[float]]
    ):
        self.infos: Mapping[str, Info] = sources[-1].infos
        self._sources = sources
        self._weights_of = weights_of
        self._pool = ThreadPoolExecutor(len(sources))

    def read(self, name: str, rows: Range = None, columns: Range = None) -> np.ndarray:
        """Returns one mixed tensor, or these rows and columns of it."""
        weights = self._weights_of(name)
        used = [i for i, weight in enumerate(weights) if weight] or [len(weights) - 1]
        first, *others = [
            i
            for i, source in enumerate(self._sources)
            if i in used or isinstance(source, SafetensorsFolder) and source.digests is not None
        ]
        reads = [self._pool.submit(self._sources[i].read, name, rows, columns) for i in others]
        parts = {first: self._sources[first].read(name, rows, columns)}
        parts |= {i: read.result() for i, read in zip(others, reads, strict=True)}
        if len(used) == 1 and weights[used[0]] == 1:
            return parts[used[0]]
        return linear([parts[i] for i in used], [weights[i] for i in used], self._pool)


def linear(
    arrays: Sequence[np.ndarray], weights: Sequence[float], pool: Executor | None = None
) -> np.ndarray:
    """The sum of weight times array, in float32 (float64 for float64), as one of their dtype.

    pool: takes half of the work.
    """
    dtype = arrays[0].dtype
    turned = all(a.ndim == 2 and a.flags.f_contiguous for a in arrays)
    rows = [(a.T if turned else np.ascontiguousarray(a)).reshape(-1) for a in arrays]
    mixed = host.empty(arrays[0].shape[::-1] if turned else arrays[0].shape, dtype)
    flat = mixed.reshape(-1)
    half = -(-flat.size // 2 // _BLOCK) * _BLOCK if pool is not None else flat.size
    if pool is not None and half < flat.size:
        other = pool.submit(_mix, rows, weights, flat, slice(half, flat.size))
        _mix(rows, weights, flat, slice(0, half))
        other.result()
    else:
        _mix(rows, weights, flat, slice(0, flat.size))
    return mixed.T if turned else mixed


def _mix(
    rows: Sequence[np.ndarray], weights: Sequence[float], mixed: np.ndarray, where: slice
) -> None:
    """Puts the sum of weight times row into a part of `mixed`, all of them vectors."""
    wide = np.promote_types(mixed.dtype, np.float32)
    total, term = np.empty((2, min(_BLOCK, where.stop - where.start)), wide)
    for start in range(where.start, where.stop, _BLOCK):
        here = slice(start, min(start + _BLOCK, where.stop))
        size = here.stop - start
        for number, (row, weight) in enumerate(zip(rows, weights, strict=True)):
            scaled = (term if number else total)[:size]
            np.copyto(scaled, row[here])
            np.multiply(scaled, wide.type(weight), out=scaled)
            if number:
                np.add(total[:size], scaled, out=total[:size])
        with np.errstate(over="ignore"):  # who writes it looks for values that did not fit
            mixed[here] = total[:size]


class WholeSource:
    """Tensors combined whole, for means that need norms or ranks: one of each model in memory."""

    def __init__(
        self,
        sources: Sequence[TensorSource],
        combine: Callable[[str, list[np.ndarray]], np.ndarray],
    ):
        self.infos: Mapping[str, Info] = sources[-1].infos
        self._sources = sources
        self._combine = combine
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, name: str, rows: Range = None, columns: Range = None) -> np.ndarray:
        """Returns one combined tensor, or these rows and columns of it."""
        if self._last is None or self._last[0] != name:
            self._last = None
            arrays = [s.read(name).astype(np.float32, copy=False) for s in self._sources]
            mixed = self._combine(name, arrays).astype(self.infos[name].dtype)
            self._last = (name, mixed)
        value = self._last[1]
        value = value if rows is None or not value.shape else value[slice(*rows)]
        return value if columns is None else value[:, slice(*columns)]


def check_same_tensors(sources: Sequence[TensorSource], names: Sequence[str]) -> None:
    """Raises InputError, with both facts, for the first tensor that differs in shape or dtype."""
    first, *rest = sources
    for number, other in enumerate(rest, start=1):
        for name, info in first.infos.items():
            if name not in other.infos:
                raise InputError(f"{names[number]} lacks tensor {name}, which {names[0]} has")
            if other.infos[name] != info:
                ours, theirs = (f"{i.dtype}{list(i.shape)}" for i in (info, other.infos[name]))
                raise InputError(
                    f"tensor {name} is {ours} in {names[0]} and {theirs} in {names[number]}: "
                    "bring them to one type with python -m launch.convert --dtype=..."
                )
        extra = sorted(other.infos.keys() - first.infos.keys())
        if extra:
            raise InputError(f"{names[0]} lacks tensor {extra[0]}, which {names[number]} has")
