"""Which tokens of a source text a target token may see, so that later bytes change nothing.

A target token sees source tokens that end at or before its own last byte. That alone is not causal:
a tokenizer may cut earlier text otherwise once more text follows. So the source's text is cut where
no later byte can move the cut, and each piece is tokenised on its own:

  settled  before a space that follows no white space; a piece counts once that space has been seen.
           Pieces are words with what sticks to them, which most tokenizers keep apart anyway.
  cut      at the ends of the target's own tokens: no delay, but pieces may be parts of words.
  same     one tokenizer for both: token t sees source tokens up to t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moejax.core.errors import InputError
from moejax.io.tokenizer import Tokenizer

ALIGNMENTS = ("settled", "cut", "same")


@dataclasses.dataclass(frozen=True)
class Aligned:
    """One text for both models.

    Attributes:
      target_ids, source_ids: tokens.
      limits: per target token, how many source tokens it sees (the source's BOS always counts).
      target_ends: per target token, the bytes of text that are complete after it.
    """

    target_ids: list[int]
    source_ids: list[int]
    limits: list[int]
    target_ends: list[int]


def align(
    text: str, target: Tokenizer, source: Tokenizer, how: str = "settled", prompt: int | None = None
) -> Aligned:
    """Tokens of both and what each target token sees.

    prompt: number of leading characters that the source reads alone (prefix mode); None: all of
    the text. InputError for an unknown alignment, an empty text, or "same" with two vocabularies.
    A tokenizer that puts a space before every text (Llama 2) puts one before every piece.
    """
    if how not in ALIGNMENTS:
        raise InputError(f"alignment {how!r} is unknown: use {', '.join(ALIGNMENTS)}")
    if not text:
        raise InputError("an empty text cannot be aligned: leave it out")
    read = text if prompt is None else text[:prompt]
    encoding = target.backend.encode(text, add_special_tokens=True)
    ids, ends = list(encoding.ids), byte_ends(text, encoding.offsets)
    if how == "same":
        return _same(ids, ends, target, source, len(read.encode()))
    bos = [] if source.bos_id is None or not source.add_bos else [source.bos_id]
    pieces = settled_pieces(read) if how == "settled" else _cut_pieces(read, ends)
    source_ids, closed = list(bos), []  # closed: (bytes that must be seen, tokens visible then)
    at = 0
    for number, piece in enumerate(pieces):
        source_ids += source.encode(piece)
        at += len(piece.encode())
        # A word is settled by the byte after it; the end of a text read alone settles it too.
        last = number == len(pieces) - 1
        delay = int(how == "settled" and not (last and prompt is not None))
        closed.append((at + delay, len(source_ids)))
    limits, seen, index = [], len(bos), 0
    for end in ends:
        while index < len(closed) and closed[index][0] <= end:
            seen, index = closed[index][1], index + 1
        limits.append(seen)
    return Aligned(ids, source_ids, limits, ends)


def _same(ids, ends, target: Tokenizer, source: Tokenizer, read_bytes: int) -> Aligned:
    if target.backend.get_vocab() != source.backend.get_vocab():
        raise InputError(
            f"alignment 'same' needs one tokenizer, and these have {target.vocab_size} and "
            f"{source.vocab_size} ids: use 'settled' or 'cut'"
        )
    read = sum(end <= read_bytes for end in ends)
    return Aligned(ids, ids[:read], [min(t + 1, read) for t in range(len(ids))], ends)


def byte_ends(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Per token, how many bytes of the text are complete after it.

    offsets: in characters, as tokenizers give them. Of tokens that share a character only the last
    completes it. Tokens that stand for no text complete nothing.
    """
    starts = [0]
    for character in text:
        starts.append(starts[-1] + len(character.encode()))
    ends: list[int] = []
    done = 0
    for number, (start, end) in enumerate(offsets):
        following = [a for a, b in offsets[number + 1 :][:1] if b > a]
        shared = end > start and following and following[0] < end
        if end > start:
            done = max(done, starts[following[0]] if shared else starts[end])
        ends.append(done)
    return ends


def settled_pieces(text: str) -> list[str]:
    """The text cut before each space that follows something else than white space."""
    pieces, last = [], 0
    for at in range(1, len(text)):
        if text[at] == " " and not text[at - 1].isspace():
            pieces.append(text[last:at])
            last = at
    return [*pieces, text[last:]] if text else []


def _cut_pieces(text: str, ends: Sequence[int]) -> list[str]:
    """The text cut at byte positions (of whole characters)."""
    raw, pieces, last = text.encode(), [], 0
    for end in sorted(set(ends)):
        if last < end <= len(raw):
            pieces.append(raw[last:end].decode())
            last = end
    return [*pieces, raw[last:].decode()] if last < len(raw) else pieces
