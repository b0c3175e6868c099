"""Ids to text while they arrive, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

# What a decoder writes for bytes that are not, or not yet, a whole character.
_UNFINISHED = "\ufffd"

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """The text of ids that arrive in pieces: whole characters only, and nothing from a stop on.

    A character, or what may be the beginning of a stop string, waits until it is complete or the
    ids end. The pieces joined are `decode` of all ids, cut where a stop string begins.

    Attributes:
      stopped: whether a stop string was found.
      num_ids: how many ids were taken; with a stop, up to the one that completed it.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._shown = ""
        self.stopped = False

    @property
    def num_ids(self) -> int:
        return len(self._ids)

    def push(self, ids: Sequence[int], last: bool = False) -> str:
        """The text that these ids add; `last`: no more will come. Nothing after a stop."""
        if self.stopped:
            return ""
        before = len(self._ids)
        self._ids += ids
        text = self._decode(self._ids)
        found = self._find(text)
        if found is not None:
            self.stopped = True
            whole = range(before + 1, len(self._ids))
            ends = (k for k in whole if self._find(self._decode(self._ids[:k])) is not None)
            self._ids = self._ids[: next(ends, len(self._ids))]
            text, last = text[:found], True
        if not last:
            text = text.rstrip(_UNFINISHED)
            text = text[: len(text) - self._held(text)]
            if not text.startswith(self._shown):  # a decoder that changed its mind: wait
                return ""
        new = text[len(self._shown) :]
        self._shown += new
        return new

    def _find(self, text: str) -> int | None:
        """Where the first stop string begins."""
        places = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        return min(places, default=None)

    def _held(self, text: str) -> int:
        """Characters at the end that may become a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        ends = (n for n in sizes if any(stop.startswith(text[-n:]) for stop in self._stop))
        return next(ends, 0)


def add_text(
    stream: TextStream | None, ids: list[int], finish: str | None
) -> tuple[str, list[int], str | None]:
    """(new text, the ids that count, how the row ended) of ids just drawn, stop strings looked for.

    finish: how it ended so far, None if it goes on. Without a stream there is no text.
    """
    if stream is None:
        return "", ids, finish
    before = stream.num_ids
    text = stream.push(ids, last=finish is not None)
    if stream.stopped:
        finish, ids = "stop", ids[: stream.num_ids - before]
    return text, ids, finish


def stream_text(decode: Decode, chunks: Iterable[Sequence[int]]) -> Iterator[str]:
    """Yields the text of ids chunk by chunk, whole characters only (`TextStream`)."""
    stream = TextStream(decode)
    for chunk in chunks:
        if piece := stream.push(chunk):
            yield piece
    if rest := stream.push([], last=True):
        yield rest
