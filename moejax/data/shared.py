"""Training data that several processes read together: each tokenises a share, all know the sizes.

Every process takes a share of the source, tokenises it once and tells the others of each example
its place, its sizes and a hash. From these all of them plan the same rows (`moejax.data.packing`).
Later an example that another process has tokenised is read again from its place, when a row of this
process's part of a batch has it. So the global batches do not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moejax.core.errors import InputError
from moejax.data.examples import Example, Record, encode_record
from moejax.data.load import STDLIB, DataConfig, stdlib_corpus
from moejax.data.packing import Packed, PackedRows, Sizes, plan_rows, size_of
from moejax.data.rows import Listed, Rows, open_rows
from moejax.data.sources import is_heldout, record_from_row
from moejax.io import processes
from moejax.io.tokenizer import Tokenizer

# Of each example: where it stands, whether it is held out, its sizes, the hash of its text.
ENTRY = np.dtype(
    [("key", "<i8"), ("heldout", "<i8"), ("sizes", "<i8", (3,)), ("sha256", "u1", (32,))]
)


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """seq_len: tokens of a row. pad_id: of padding. on_long: see `moejax.data.packing`."""

    seq_len: int
    pad_id: int = 0
    on_long: str = "split"


class Examples:
    """The examples of a source by number, tokenised here at the start or when they are asked for.

    Args:
      rows: the source. encode: a record's tokens. side: what is held out. seq_len: of the rows.
    """

    def __init__(
        self,
        rows: Rows,
        encode: Callable[[Record], Example],
        side: Callable[[Record], bool],
        seq_len: int,
    ):
        self._rows, self._encode, self._side, self._seq_len = rows, encode, side, seq_len
        self._kept: dict[int, Example] = {}
        self.num_read = 0  # times that an example was read and tokenised here

    def share(self, index: int, count: int) -> np.ndarray:
        """The entries of this process's share, [n] of ENTRY; InputError for a broken row."""
        found = [self._entry(key, row) for key, row in self._rows.share(index, count)]
        return np.array(found, ENTRY)

    def join(self, shares: Sequence[np.ndarray]) -> None:
        """Takes the entries of all processes."""
        self.entries = np.concatenate(shares)

    def __getitem__(self, number: int) -> Example:
        entry = self.entries[number]
        key = int(entry["key"])
        if key not in self._kept:
            made = self._entry(key, self._rows.read(key))
            if bytes(made[3]) != entry["sha256"].tobytes():
                self._kept.pop(key)
                raise InputError(
                    f"{self._rows.where(key)}: not the row that was there when this run read the "
                    "data: bring the file back and start the same command again"
                )
        return self._kept[key]

    def name(self, number: int) -> str:
        return self._rows.name(int(self.entries["key"][number]))

    def _entry(self, key: int, row: Any) -> tuple:
        record, example = self._made(key, row)
        self.num_read += 1
        self._kept[key] = dataclasses.replace(example, messages=())
        content = json.dumps([dict(m) for m in record.messages], sort_keys=True)
        digest = hashlib.sha256(content.encode()).digest()
        return key, self._side(record), size_of(example, self._seq_len), tuple(digest)

    def _made(self, key: int, row: Any) -> tuple[Record, Example]:
        try:
            record = record_of(row, self._rows.name(key))
            return record, self._encode(record)
        except InputError:  # said again with the line's number, which takes a pass over the file
            record = record_of(row, self._rows.where(key))
            return record, self._encode(record)


def record_of(row: Any, name: str) -> Record:
    """A row as a conversation, if it is not one already."""
    return row if isinstance(row, Record) else record_from_row(row, name)


@dataclasses.dataclass(frozen=True)
class SharedData:
    """Packed rows; `heldout` (None where nothing is) is there whole on every process. summary:
    for the record. examples: what this process has read."""

    train: PackedRows
    heldout: Packed | None
    summary: dict[str, Any]
    examples: Examples


def load_shared(config: DataConfig, tokenizer: Tokenizer, rows: RowsConfig) -> SharedData:
    """The rows of a config's data, each process reading its share; called by all of them.

    The same config gives the same rows on any number of processes. InputError, on all of them, for
    bad data. A held-out conversation that is too long is truncated where others are split.
    """
    examples, problem, share = None, "", np.empty(0, ENTRY)
    fixed: dict[str, Any] | None = None
    try:
        examples, fixed = open_examples(config, tokenizer, rows.seq_len)
        share = examples.share(jax.process_index(), jax.process_count())
    except InputError as error:
        problem = str(error)
    processes.agree(problem)
    assert examples is not None
    gathered = processes.all_bytes(share.tobytes())
    examples.join([np.frombuffer(part, ENTRY) for part in gathered])
    return arrange(examples, config, rows, fixed)


def arrange(
    examples: Examples, config: DataConfig, rows: RowsConfig, fixed: dict[str, Any] | None = None
) -> SharedData:
    """Splits, orders and packs examples whose entries are there. fixed: the summary of a corpus
    that has its order already."""
    entries = examples.entries
    if not len(entries):
        raise InputError(f"{config.source} holds no rows; give a file with at least one example")
    order = np.arange(len(entries))
    if fixed is None:
        order = np.random.default_rng(config.seed).permutation(len(entries))
    held = entries["heldout"][order] > 0
    train, heldout = order[~held], order[held]
    summary = fixed or {
        "source": config.source,
        "rows_sha256": hashlib.sha256(entries["sha256"].tobytes()).hexdigest(),
        "train": len(train),
        "heldout": len(heldout),
    }
    if not len(train):
        raise InputError(
            f"{config.source}: nothing is left to train on with a held-out share of "
            f"{config.heldout_share}; give a smaller share or more data"
        )
    heldout = heldout[: config.num_heldout]
    judged = dataclasses.replace(
        rows, on_long="truncate" if rows.on_long == "split" else rows.on_long
    )
    return SharedData(
        _packed_rows(examples, train, rows),
        _packed_rows(examples, heldout, judged).packed() if len(heldout) else None,
        {**summary, "heldout_used": len(heldout)},
        examples,
    )


def _packed_rows(examples: Examples, numbers: np.ndarray, rows: RowsConfig) -> PackedRows:
    plan = plan_rows(Sizes(*examples.entries["sizes"][numbers].T), rows.seq_len, rows.on_long)
    return PackedRows(
        plan,
        lambda at: examples[int(numbers[at])],
        lambda at: examples.name(int(numbers[at])),
        rows.seq_len,
        rows.pad_id,
    )


def open_examples(
    config: DataConfig, tokenizer: Tokenizer, seq_len: int
) -> tuple[Examples, dict[str, Any] | None]:
    def encode(record: Record) -> Example:
        return encode_record(record, tokenizer)

    if config.source != STDLIB:
        found = open_rows(config.source, config.split, config.limit)
        return Examples(found, encode, lambda r: is_heldout(r, config.heldout_share), seq_len), None
    corpus = stdlib_corpus(config)
    records = [pair.record() for pair in [*corpus.train, *corpus.heldout]]
    held = {pair.id for pair in corpus.heldout}
    listed = Listed(records, [record.id for record in records])
    return Examples(listed, encode, lambda r: r.id in held, seq_len), corpus.summary()


def shares_of(examples: Callable[[], Examples], count: int) -> Iterator[Examples]:
    """What each of `count` processes would have, in one process: for tests and for measuring."""
    parts = [examples() for _ in range(count)]
    shares = [part.share(index, count) for index, part in enumerate(parts)]
    for part in parts:
        part.join(shares)
        yield part
