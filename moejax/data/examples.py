"""A conversation, and the same as token ids with a loss mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from moejax.core.errors import InputError
from moejax.io.tokenizer import Tokenizer


@dataclass(frozen=True)
class Record:
    """A conversation as text: messages are `{"role": .., "content": ..}`; `id` names its origin."""

    id: str
    messages: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Example:
    """A tokenised conversation.

    ids: int32 [T]; loss_mask: bool [T], True where predicting that token counts (the answers and
    their end-of-turn tokens).
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    ids: np.ndarray
    loss_mask: np.ndarray


def pair(id: str, prompt: str, answer: str) -> Record:
    """A record of one question and one answer."""
    return Record(
        id, ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    )


def encode_record(record: Record, tokenizer: Tokenizer) -> Example:
    """Ids and mask of one record by the tokenizer's chat template; InputError names the record."""
    try:
        ids, mask = tokenizer.encode_chat(record.messages)
    except InputError as error:
        raise InputError(f"{record.id}: {error}") from error
    if not any(mask):
        raise InputError(f"{record.id}: no assistant message, so nothing to learn; add an answer")
    return Example(
        record.id, record.messages, np.array(ids, dtype=np.int32), np.array(mask, dtype=bool)
    )


def encode_records(records: Iterable[Record], tokenizer: Tokenizer) -> list[Example]:
    """`encode_record` of each, in order."""
    return [encode_record(record, tokenizer) for record in records]
