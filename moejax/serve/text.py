"""Ids to text while they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

# What a decoder writes for bytes that are not, or not yet, a whole character.
_UNFINISHED = "\ufffd"


def stream_text(
    decode: Callable[[Sequence[int]], str], chunks: Iterable[Sequence[int]]
) -> Iterator[str]:
    """Yields the text of ids chunk by chunk, whole characters only.

    The pieces joined are `decode` of all ids: a character whose bytes are spread over several
    tokens waits until it is complete, or until the ids end.
    """
    ids: list[int] = []
    shown = ""
    for chunk in chunks:
        ids += chunk
        text = decode(ids).rstrip(_UNFINISHED)
        if len(text) > len(shown) and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    rest = decode(ids)[len(shown) :]
    if rest:
        yield rest
