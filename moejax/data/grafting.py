"""Examples that two models read: the target's tokens, the source's, and who sees what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.core.errors import InputError
from moejax.data.alignment import align
from moejax.data.sources import record_from_row, rows
from moejax.io.tokenizer import Tokenizer

# The reference's plain chat form, which both tokenizers read as text.
USER, ASSISTANT = "User: ", "\n\nAssistant: "


@dataclasses.dataclass(frozen=True)
class Text:
    """prompt: read, not learned (may be empty).  answer: learned."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class GraftExample:
    """One text for both.

    Attributes:
      target_ids: int [T], the answer's end token last. counted: bool [T], what the loss counts.
      source_ids: int [S]. limits: int [T], how many of them each target token sees.
      num_bytes: of the answer, for bits per byte.
    """

    target_ids: list[int]
    counted: list[bool]
    source_ids: list[int]
    limits: list[int]
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Joined:
    """Two tokenizers and how their texts are aligned (`moejax.data.alignment`).

    prefix: the source reads the prompt alone. paper: every token sees all of the source.
    """

    target: Tokenizer
    source: Tokenizer
    how: str = "settled"
    prefix: bool = False
    paper: bool = False


def read_texts(source: str, limit: int | None = None) -> list[Text]:
    """Rows {"text"}, or conversations as `moejax.data.sources` reads them, in the plain chat form.

    Only the last answer of a conversation is learned. InputError names file and line of a row that
    is neither.
    """
    texts: list[Text] = []
    for where, row in rows(source):
        if limit is not None and len(texts) >= limit:
            break
        if isinstance(row, Mapping) and isinstance(row.get("text"), str):
            texts.append(Text("", row["text"]))
            continue
        *before, last = record_from_row(row, where).messages
        parts = [
            (USER if m["role"] == "user" else ASSISTANT if m["role"] == "assistant" else "")
            + m["content"]
            for m in before
        ]
        texts.append(Text("\n\n".join(parts) + ASSISTANT, last["content"]))
    if not texts:
        raise InputError(f"{source} holds no rows; give a file with at least one text")
    return texts


def make_example(text: Text, joined: Joined) -> GraftExample:
    """Tokens of both models and what is seen and counted."""
    prompt = len(text.prompt) if joined.prefix else None
    found = align(text.prompt + text.answer, joined.target, joined.source, joined.how, prompt)
    limits = [len(found.source_ids)] * len(found.limits) if joined.paper else found.limits
    start = len(text.prompt.encode())
    counted = [end > start for end in found.target_ends]
    ends = joined.target.eos_ids[:1]
    return GraftExample(
        [*found.target_ids, *ends],
        [*counted, *[True for _ in ends]],
        found.source_ids,
        [*limits, *[limits[-1] for _ in ends]],
        len(text.answer.encode()),
    )


def check_lengths(
    examples: Sequence[GraftExample], lengths: tuple[int, int], drop: bool
) -> list[GraftExample]:
    """Examples that fit in (target, source) tokens; the others dropped, or refused by name.

    Never cut: a text without its end teaches the model not to stop.
    """
    kept = [
        e for e in examples if len(e.target_ids) <= lengths[0] and len(e.source_ids) <= lengths[1]
    ]
    if len(kept) < len(examples) and not drop:
        sizes = [(len(e.target_ids), len(e.source_ids)) for e in examples]
        number, (t, s) = next(
            (i, n) for i, n in enumerate(sizes) if n[0] > lengths[0] or n[1] > lengths[1]
        )
        raise InputError(
            f"{len(examples) - len(kept)} of {len(examples)} texts are too long, as text {number} "
            f"with {t} target and {s} source tokens for {lengths[0]} and {lengths[1]}: raise "
            "data.target_len and data.source_len, or set data.drop_long"
        )
    if not kept:
        raise InputError(f"no text fits in {lengths[0]} target and {lengths[1]} source tokens")
    return kept


def batch_of(
    examples: Sequence[GraftExample], lengths: tuple[int, int], pad_ids: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Arrays [B, T] (and `source_tokens` [B, S]) for `moejax.train.loss` and a bridge."""
    num, (num_t, num_s) = len(examples), lengths
    batch: dict[str, np.ndarray] = {
        "tokens": np.full((num, num_t), pad_ids[0], np.int32),
        "segment_ids": np.zeros((num, num_t), np.int32),
        "positions": np.broadcast_to(np.arange(num_t, dtype=np.int32), (num, num_t)).copy(),
        "loss_mask": np.zeros((num, num_t), bool),
        "limits": np.zeros((num, num_t), np.int32),
        "source_tokens": np.full((num, num_s), pad_ids[1], np.int32),
    }
    for row, example in enumerate(examples):
        size = len(example.target_ids)
        batch["tokens"][row, :size] = example.target_ids
        batch["segment_ids"][row, :size] = 1
        batch["loss_mask"][row, :size] = example.counted
        batch["limits"][row, :size] = example.limits
        batch["source_tokens"][row, : len(example.source_ids)] = example.source_ids
    return batch


def stats(examples: Sequence[GraftExample]) -> dict[str, Any]:
    """Sizes, for the plan."""
    return {
        "examples": len(examples),
        "target_tokens": sum(len(e.target_ids) for e in examples),
        "source_tokens": sum(len(e.source_ids) for e in examples),
        "counted_tokens": sum(sum(e.counted) for e in examples),
    }
