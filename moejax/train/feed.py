"""Batches on their way to the devices: made ahead by a thread, each process its own rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.core.errors import InputError
from moejax.train.placement import global_batch

# step (0-based) -> arrays with equal leading dims. On policy it is given (step, parameters). One
# with rows(step, first, last) and batch_size makes a part of a batch without the rest; one with
# state(step) and resume(step, state) keeps in the checkpoints where it stands.
Batches = Callable[..., Mapping[str, np.ndarray]]


class Feed:
    """`get(step)` gives a batch, on the mesh if there is one; up to `ahead` further ones are made.

    Use as a context manager. Errors of making a batch are raised by its `get`.
    """

    def __init__(self, batches: Batches, steps: int, mesh: Mesh | None, ahead: int):
        self._batches, self._steps, self._mesh, self._ahead = batches, steps, mesh, ahead
        self._pool = ThreadPoolExecutor(1, "batches") if ahead else None
        self._made: dict[int, Future[Any]] = {}
        self._num_rows = 0

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exc) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def check(self, step: int, accumulation: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a step's whole batch; InputError unless its rows can be cut so."""
        rows = getattr(self._batches, "rows", None)
        first = dict(self._batches(step) if rows is None else rows(step, 0, 1))
        whole = getattr(self._batches, "batch_size", 0)
        for name, value in first.items():
            num = len(value) if rows is None else whole
            if num % accumulation:
                raise InputError(
                    f"a batch of {num} rows ({name}) cannot be cut into accumulation="
                    f"{accumulation} equal parts: choose a divisor"
                )
            self._num_rows = num
        shape = (self._num_rows,)
        return {
            name: jax.ShapeDtypeStruct(shape + value.shape[1:], value.dtype)
            for name, value in first.items()
        }

    def state(self, step: int) -> Mapping[str, Any]:
        """Where the batches stand before a step, for its checkpoint."""
        state = getattr(self._batches, "state", None)
        return {} if state is None else state(step)

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        """Lets the batches go on where a checkpoint's `state` says; of an old one, by the step."""
        resume = getattr(self._batches, "resume", None)
        if resume is not None and state:
            resume(step, state)

    def get(self, step: int, *seen: Any) -> Mapping[str, Any]:
        """The batch of a step; seen: what else `batches` is given, on policy."""
        if self._pool is None:
            return self._make(step, *seen)
        for each in range(step, min(step + self._ahead + 1, self._steps)):
            if each not in self._made:
                self._made[each] = self._pool.submit(self._make, each)
        return self._made.pop(step).result()

    def _make(self, step: int, *seen: Any) -> Mapping[str, Any]:
        if self._mesh is None:
            return self._batches(step, *seen)
        assert not seen, "refused by fit"
        rows = getattr(self._batches, "rows", None)

        def part(first: int, last: int) -> Mapping[str, np.ndarray]:
            if rows is not None:
                return rows(step, first, last)
            return {name: array[first:last] for name, array in self._batches(step).items()}

        return global_batch(self._mesh, part, self._num_rows)
