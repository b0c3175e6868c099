"""Several examples in one row: first fit, with segment ids that keep them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moejax.core.errors import InputError
from moejax.data.examples import Example


@dataclass(frozen=True)
class PackStats:
    """What packing did.

    num_truncated examples lost their right end (num_tokens_cut tokens); num_dropped had no answer
    token left within the row and are gone entirely.
    """

    num_examples: int
    num_rows: int
    num_tokens: int
    num_answer_tokens: int
    num_truncated: int
    num_tokens_cut: int
    num_dropped: int
    padding_share: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Packed:
    """Rows of `seq_len` tokens, all [num_rows, T].

    tokens int32 (pad id in pads); segment_ids int32 (1, 2, .. along a row, 0 in pads); positions
    int32 (from 0 in each segment, 0 in pads); loss_mask float32 (1 where predicting that token
    counts: never the first of a segment). `ids[row][segment - 1]` names an example.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    ids: tuple[tuple[str, ...], ...]
    stats: PackStats

    def batch(self) -> dict[str, np.ndarray]:
        """All rows as one batch."""
        names = ("tokens", "segment_ids", "positions", "loss_mask")
        return {name: getattr(self, name) for name in names}


def pack(examples: Sequence[Example], seq_len: int, pad_id: int = 0) -> Packed:
    """Put each example into the first row that has room for it, in order.

    Examples longer than `seq_len` are truncated on the right and counted; those whose answer is
    cut entirely are dropped and counted; no other token is lost. InputError where nothing is left.
    """
    if seq_len < 2:
        raise InputError(f"sequence length {seq_len} is too short; give at least 2")
    usable = [e for e in examples if _answer_mask(e, seq_len).any()]
    if not usable:
        raise InputError(
            f"none of the {len(examples)} examples has an answer within {seq_len} tokens; "
            "give longer sequences or shorter prompts"
        )
    rows = _first_fit([min(len(e.ids), seq_len) for e in usable], seq_len)
    shape = (len(rows), seq_len)
    tokens = np.full(shape, pad_id, dtype=np.int32)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, np.float32)
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, start=1):
            example = usable[index]
            length = min(len(example.ids), seq_len)
            span = slice(start, start + length)
            tokens[row, span] = example.ids[:length]
            segment_ids[row, span] = segment
            positions[row, span] = np.arange(length)
            loss_mask[row, span] = _answer_mask(example, seq_len)
            start += length
    names = tuple(tuple(usable[i].id for i in members) for members in rows)
    stats = _stats(examples, usable, segment_ids, loss_mask)
    return Packed(tokens, segment_ids, positions, loss_mask, names, stats)


def _answer_mask(example: Example, seq_len: int) -> np.ndarray:
    """What the loss counts of the first `seq_len` tokens; nothing predicts the very first."""
    mask = example.loss_mask[:seq_len].copy()
    mask[:1] = False
    return mask


def _first_fit(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Indices per row. A full row is closed, so that the search stays short."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (row, room), rows ascending
    for index, length in enumerate(lengths):
        for slot, (row, room) in enumerate(open_rows):
            if length <= room:
                rows[row].append(index)
                open_rows[slot] = (row, room - length)
                if room == length:
                    del open_rows[slot]
                break
        else:
            rows.append([index])
            if length < seq_len:
                open_rows.append((len(rows) - 1, seq_len - length))
    return rows


def _stats(
    examples: Sequence[Example],
    usable: Sequence[Example],
    segment_ids: np.ndarray,
    loss_mask: np.ndarray,
) -> PackStats:
    cut = [max(0, len(e.ids) - segment_ids.shape[1]) for e in usable]
    num_tokens = int((segment_ids > 0).sum())
    return PackStats(
        num_examples=len(usable),
        num_rows=len(segment_ids),
        num_tokens=num_tokens,
        num_answer_tokens=int(loss_mask.sum()),
        num_truncated=sum(c > 0 for c in cut),
        num_tokens_cut=sum(cut),
        num_dropped=len(examples) - len(usable),
        padding_share=1 - num_tokens / segment_ids.size,
    )
