"""Tensors that are mixtures of those of several models, made while they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moejax.core.errors import InputError
from moejax.io.safetensors import Info, Range, TensorSource


class LinearSource:
    """The sum over models of weight times tensor; holds a part of each model at a time.

    Args:
      sources: one per model, with the same tensors.
      weights_of: name of a tensor -> one weight per model. A model of weight 0 is not read there;
        where one has weight 1 and all others 0 its bytes are handed on.

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
        used = [(s, w) for s, w in zip(self._sources, self._weights_of(name), strict=True) if w]
        if len(used) == 1 and used[0][1] == 1:
            return used[0][0].read(name, rows, columns)
        if not used:
            used = [(self._sources[-1], 0.0)]
        reads = [self._pool.submit(source.read, name, rows, columns) for source, _ in used]
        wide = np.promote_types(self.infos[name].dtype, np.float32)
        total: np.ndarray | None = None
        for read, (_, weight) in zip(reads, used, strict=True):
            part = read.result()
            value = part.astype(wide)
            value *= wide.type(weight)
            total = value if total is None else np.add(total, value, out=total)
        assert total is not None
        return total.astype(self.infos[name].dtype, copy=False)


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
