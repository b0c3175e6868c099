"""Batches as a pure function of the step: random access, so a run resumes from its step alone."""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np

from moejax.core.errors import InputError
from moejax.data.packing import Packed

Batch = dict[str, np.ndarray]


class TrainBatches:
    """``batches(step)`` is a batch; ``batches.rows(step, first, last)`` some of its rows alone.

    So each of several processes reads its own rows of the one global batch.
    """

    def __init__(self, rows: grain.MapDataset, batch_size: int):
        self._rows, self._batch_size = rows, batch_size

    def __call__(self, step: int) -> Batch:
        """All rows of a step's batch."""
        return self.rows(step, 0, self._batch_size)

    def rows(self, step: int, first: int, last: int) -> Batch:
        """Rows first .. last - 1 of a step's batch."""
        if step < 0:
            raise InputError(f"step {step} is negative; steps count from 0")
        start = step * self._batch_size
        found = [self._rows[start + row] for row in range(first, last)]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}


class _Rows:
    """Random access to the rows of packed data."""

    def __init__(self, packed: Packed):
        self._batch = packed.batch()

    def __len__(self) -> int:
        return len(self._batch["tokens"])

    def __getitem__(self, index: int) -> Batch:
        return {name: array[index] for name, array in self._batch.items()}


def batches(packed: Packed, batch_size: int, seed: int = 0, shuffle: bool = True) -> TrainBatches:
    """`step -> batch` for training: every epoch another order, without end.

    Batches run over the borders of epochs, so all have `batch_size` rows and no row is left out.
    Each epoch's order depends on (seed, epoch) alone. InputError for more rows than there are.
    """
    rows = _Rows(packed)
    if not 0 < batch_size <= len(rows):
        raise InputError(
            f"batch size {batch_size}, but the data packs into {len(rows)} rows; give a batch "
            f"size from 1 to {len(rows)}"
        )
    dataset = grain.MapDataset.source(rows).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    return TrainBatches(dataset.repeat(None), batch_size)


def fixed_batches(packed: Packed, batch_size: int) -> Iterator[Batch]:
    """All rows once in their order, for evaluation; the last batch is filled with empty rows.

    An empty row is all padding (segment 0, mask 0), so it counts in no sum.
    """
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} is below 1")
    whole = packed.batch()
    for start in range(0, len(whole["tokens"]), batch_size):
        part = {name: array[start : start + batch_size] for name, array in whole.items()}
        missing = batch_size - len(part["tokens"])
        yield {n: np.pad(a, ((0, missing), (0, 0))) for n, a in part.items()} if missing else part
