"""Several examples in one row: first fit, with segment ids that keep them apart.

What is longer than a row is, by `on_long`:
  split     cut into pieces, each a segment of its own. A piece begins with the last token of that
            before it, without loss, so that every token that has a loss keeps it. Positions begin
            at 0 in each: rotary embeddings see differences alone, and learned tables have an end.
  truncate  cut on the right and counted.    drop  left out and counted.    error  refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moejax.core.errors import InputError
from moejax.data.examples import Example

ON_LONG = ("split", "truncate", "drop", "error")
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class PackStats:
    """What packing did.

    num_tokens in num_rows rows, of which num_repeated stand at the head of a later piece of the
    num_split examples that were cut in pieces. num_truncated examples lost their right end
    (num_tokens_cut tokens); num_dropped are gone entirely, having no answer token within the row.
    """

    num_examples: int
    num_rows: int
    num_tokens: int
    num_answer_tokens: int
    num_truncated: int
    num_tokens_cut: int
    num_dropped: int
    padding_share: float
    num_split: int = 0
    num_repeated: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """Of each of n examples: tokens, answer tokens (but a first one, which nothing predicts), and
    those of them within the row's length. int64 [n] each."""

    tokens: np.ndarray
    answers: np.ndarray
    answers_fit: np.ndarray


def size_of(example: Example, seq_len: int) -> tuple[int, int, int]:
    """One example's entries of `Sizes`."""
    counted = example.loss_mask[1:]
    return len(example.ids), int(counted.sum()), int(counted[: seq_len - 1].sum())


@dataclass(frozen=True)
class Plan:
    """Which tokens stand in which row: pieces int64 [P, 4] of (row, example, first, end), by row
    and in each from left to right. Made of sizes alone, so before there are any tokens."""

    pieces: np.ndarray
    stats: PackStats

    @property
    def sha256(self) -> str:
        """What identifies these rows."""
        return hashlib.sha256(np.ascontiguousarray(self.pieces).tobytes()).hexdigest()


def plan_rows(sizes: Sizes, seq_len: int, on_long: str = "split", what: str = "") -> Plan:
    """Puts each example, or each of its pieces, into the first row with room for it, in order.

    InputError where nothing is left, or something is too long with on_long="error".
    """
    if seq_len < 2:
        raise InputError(f"sequence length {seq_len} is too short; give at least 2")
    if on_long not in ON_LONG:
        raise InputError(f"on_long {on_long!r} is unknown: use {', '.join(ON_LONG)}")
    long = sizes.tokens > seq_len
    if on_long == "error" and long.any():
        raise InputError(
            f"{long.sum()} of {len(long)} examples are longer than {seq_len} tokens, the longest "
            f"{sizes.tokens.max()}: give longer sequences, or on_long split, truncate or drop"
        )
    usable = (sizes.answers_fit if on_long == "truncate" else sizes.answers) > 0
    usable &= ~long | (on_long != "drop")
    if not usable.any():
        raise InputError(
            f"none of the {len(long)} examples{what} has an answer within {seq_len} tokens; "
            "give longer sequences or shorter prompts"
        )
    pieces = [
        (example, first, end)
        for example in np.flatnonzero(usable).tolist()
        for first, end in _pieces(int(sizes.tokens[example]), seq_len, on_long)
    ]
    rows = _first_fit([end - first for _, first, end in pieces], seq_len)
    placed = np.column_stack([rows, np.array(pieces, np.int64)])
    placed = placed[np.argsort(rows, kind="stable")]
    return Plan(placed, _stats(sizes, usable, placed, seq_len, on_long))


def _pieces(length: int, seq_len: int, on_long: str) -> list[tuple[int, int]]:
    """(first, end) of an example's pieces; each but the first repeats one token."""
    if length <= seq_len or on_long == "truncate":
        return [(0, min(length, seq_len))]
    starts = range(0, length - 1, seq_len - 1)
    return [(first, min(first + seq_len, length)) for first in starts]


def _first_fit(lengths: Sequence[int], seq_len: int) -> np.ndarray:
    """The row of each length: the first with room. A tree of the most room below each node finds
    it in log(rows) steps."""
    width = 1 << max(1, len(lengths) - 1).bit_length()
    room = [seq_len] * (2 * width)  # node n has children 2n and 2n + 1; rows are the leaves
    found = np.empty(len(lengths), np.int64)
    for index, length in enumerate(lengths):
        node = 1
        while node < width:
            node *= 2
            node += room[node] < length
        found[index] = node - width
        room[node] -= length
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    return found


def _stats(
    sizes: Sizes, usable: np.ndarray, placed: np.ndarray, seq_len: int, on_long: str
) -> PackStats:
    cut = np.where(usable & (on_long == "truncate"), sizes.tokens - seq_len, 0).clip(0)
    answers = sizes.answers_fit if on_long == "truncate" else sizes.answers
    num_rows = int(placed[:, 0].max()) + 1
    num_tokens = int((placed[:, 3] - placed[:, 2]).sum())
    return PackStats(
        num_examples=int(usable.sum()),
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_answer_tokens=int(answers[usable].sum()),
        num_truncated=int((cut > 0).sum()),
        num_tokens_cut=int(cut.sum()),
        num_dropped=int((~usable).sum()),
        padding_share=1 - num_tokens / (num_rows * seq_len),
        num_split=int((usable & (sizes.tokens > seq_len)).sum()) if on_long == "split" else 0,
        num_repeated=int((placed[:, 2] > 0).sum()),
    )


class PackedRows:
    """The rows of a plan, each put together when it is asked for: ``rows[3]`` is a dict of [T].

    Args:
      plan: where everything stands. examples: number -> example, called for those of a row.
      names: number -> an example's name, without making it.
    """

    def __init__(
        self,
        plan: Plan,
        examples: Callable[[int], Example],
        names: Callable[[int], str],
        seq_len: int,
        pad_id: int,
    ):
        self.stats, self.sha256, self.seq_len = plan.stats, plan.sha256, seq_len
        self._plan = plan
        self._examples, self._names, self._pad_id = examples, names, pad_id
        count = np.bincount(plan.pieces[:, 0], minlength=plan.stats.num_rows)
        self._ends = np.cumsum(count)

    def __len__(self) -> int:
        return self.stats.num_rows

    def __getitem__(self, row: int) -> Batch:
        tokens = np.full(self.seq_len, self._pad_id, dtype=np.int32)
        segment_ids, positions = np.zeros(self.seq_len, np.int32), np.zeros(self.seq_len, np.int32)
        loss_mask, start = np.zeros(self.seq_len, np.float32), 0
        for segment, (number, first, end) in enumerate(self._members(row), start=1):
            example = self._examples(number)
            span = slice(start, start + end - first)
            tokens[span], segment_ids[span] = example.ids[first:end], segment
            positions[span] = np.arange(end - first)
            loss_mask[span] = example.loss_mask[first:end]
            loss_mask[start] = 0  # nothing predicts the first of a segment
            start += end - first
        values = (tokens, segment_ids, positions, loss_mask)
        names = ("tokens", "segment_ids", "positions", "loss_mask")
        return dict(zip(names, values, strict=True))

    def names(self, row: int) -> tuple[str, ...]:
        """The examples of a row; a later piece has the number of its first token behind it."""
        found = ((self._names(number), first) for number, first, _ in self._members(row))
        return tuple(f"{name}+{first}" if first else name for name, first in found)

    def packed(self) -> Packed:
        """All rows at once."""
        rows = [self[row] for row in range(len(self))]
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        names = tuple(self.names(row) for row in range(len(self)))
        return Packed(**arrays, ids=names, stats=self.stats)

    def _members(self, row: int) -> list[list[int]]:
        first = self._ends[row - 1] if row else 0
        return self._plan.pieces[first : self._ends[row], 1:].tolist()


@dataclass(frozen=True)
class Packed:
    """Rows of `seq_len` tokens, all [num_rows, T].

    tokens int32 (pad id in pads); segment_ids int32 (1, 2, .. along a row, 0 in pads); positions
    int32 (from 0 in each segment, 0 in pads); loss_mask float32 (1 where predicting that token
    counts: never the first of a segment). `ids[row][segment - 1]` names an example, with "+N" of
    a piece that begins at its token N.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    ids: tuple[tuple[str, ...], ...]
    stats: PackStats

    def batch(self) -> Batch:
        """All rows as one batch."""
        names = ("tokens", "segment_ids", "positions", "loss_mask")
        return {name: getattr(self, name) for name in names}


def pack(
    examples: Sequence[Example], seq_len: int, pad_id: int = 0, on_long: str = "split"
) -> Packed:
    """Examples that are there in rows of `seq_len` tokens. InputError as `plan_rows`."""
    sizes = np.array([size_of(e, seq_len) for e in examples], np.int64).reshape(-1, 3)
    plan = plan_rows(Sizes(*sizes.T), seq_len, on_long)
    names = lambda number: examples[number].id  # noqa: E731
    return PackedRows(plan, examples.__getitem__, names, seq_len, pad_id).packed()
