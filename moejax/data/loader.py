"""Batches as a function of the step and of where the stream began: random access, no replay."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from moejax.core.errors import InputError
from moejax.data.packing import Batch, Packed, PackedRows


class TrainBatches:
    """``batches(step)`` is a batch; ``batches.rows(step, first, last)`` some of its rows alone.

    So each of several processes reads its own rows of the one global batch. Where the rows of step
    0 begin in the endless stream of epochs is what `state` says and `resume` takes.
    """

    def __init__(self, rows: PackedRows | _Rows, batch_size: int, seed: int, shuffle: bool):
        dataset = grain.MapDataset.source(rows).seed(seed)
        if shuffle:
            dataset = dataset.shuffle()
        self._rows, self.batch_size = dataset.repeat(None), batch_size
        self._first = 0
        self._num_rows = len(rows)
        self._identity = {
            "seed": seed,
            "shuffle": shuffle,
            "num_rows": len(rows),
            "rows_sha256": rows.sha256,
        }

    def __call__(self, step: int) -> Batch:
        """All rows of a step's batch."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, first: int, last: int) -> Batch:
        """Rows first .. last - 1 of a step's batch."""
        if step < 0:
            raise InputError(f"step {step} is negative; steps count from 0")
        start = self._first + step * self.batch_size
        found = [self._rows[start + row] for row in range(first, last)]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}

    def state(self, step: int) -> dict[str, Any]:
        """Where the stream stands before a step, as JSON for its checkpoint."""
        next_row = self._first + step * self.batch_size
        epoch, row = divmod(next_row, self._num_rows)
        return self._identity | {"next_row": next_row, "epoch": epoch, "row_of_epoch": row}

    def resume(self, step: int, state: Mapping[str, Any]) -> None:
        """Goes on before `step` where a checkpoint's `state` stopped: no row is drawn again.

        InputError where the stream is another: then the rest would not be what was left.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise InputError(
                    f"the checkpoint of step {step} stopped in other data: its {name} is "
                    f"{state.get(name)} and not {value}. Bring back the data, tokenizer and "
                    "version it was trained with, or start anew in another folder"
                )
        self._first = int(state["next_row"]) - step * self.batch_size


class _Rows:
    """Random access to the rows of packed data."""

    def __init__(self, packed: Packed):
        self._batch = packed.batch()
        ends = np.diff(packed.segment_ids, axis=1, append=0) != 0
        self.sha256 = hashlib.sha256(np.argwhere(ends).tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._batch["tokens"])

    def __getitem__(self, index: int) -> Batch:
        return {name: array[index] for name, array in self._batch.items()}


def batches(
    packed: Packed | PackedRows, batch_size: int, seed: int = 0, shuffle: bool = True
) -> TrainBatches:
    """`step -> batch` for training: every epoch another order, without end.

    Batches run over the borders of epochs, so all have `batch_size` rows and no row is left out.
    Each epoch's order depends on (seed, epoch) alone. InputError for more rows than there are.
    """
    rows = packed if isinstance(packed, PackedRows) else _Rows(packed)
    if not 0 < batch_size <= len(rows):
        raise InputError(
            f"batch size {batch_size}, but the data packs into {len(rows)} rows; give a batch "
            f"size from 1 to {len(rows)}"
        )
    return TrainBatches(rows, batch_size, seed, shuffle)


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
