"""How much of a benchmark stands in training data: shared n-grams of words.

A problem's overlap is the share of its n-grams (lower-cased words, punctuation dropped) that some
training text has too; n = 13 is GPT-3's choice (arXiv 2005.14165, appendix C). A problem of fewer
than n words counts as one n-gram of its own length, unless it has fewer than `least` words, which
too many innocent texts share: its overlap is 0.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moejax.core.errors import InputError

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words that n-grams are made of."""
    return _WORD.findall(text.lower())


def ngrams(text: str, n: int, least: int) -> set[tuple[str, ...]]:
    """A problem's n-grams; of a shorter text the whole of it."""
    found = words(text)
    if len(found) < n:
        return {tuple(found)} if len(found) >= least else set()
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def overlaps(
    benchmarks: Mapping[str, Mapping[str, str]],
    texts: Iterable[str],
    n: int = 13,
    least: int = 6,
) -> dict[str, dict[str, float]]:
    """Per benchmark and problem, the share of its n-grams that the training texts hold.

    Args:
      benchmarks: per name, problems' texts by id.
      texts: of the training data, read once.
      n: words per n-gram.
      least: fewest words of a shorter problem that is looked for.

    Raises:
      InputError: n or least below 1.
    """
    if n < 1 or least < 1:
        raise InputError(f"n-grams of {n} and at least {least} words: both must be 1 or more")
    grams = {
        name: {key: ngrams(text, n, least) for key, text in problems.items()}
        for name, problems in benchmarks.items()
    }
    wanted = {gram for problems in grams.values() for found in problems.values() for gram in found}
    # By length and first word, so that most places of a text cost one look.
    by_start: dict[str, set[int]] = defaultdict(set)
    for gram in wanted:
        by_start[gram[0]].add(len(gram))
    seen: set[tuple[str, ...]] = set()
    for text in texts:
        found = words(text)
        for i, word in enumerate(found):
            for size in by_start.get(word, ()):
                gram = tuple(found[i : i + size])
                if gram in wanted:
                    seen.add(gram)
    return {
        name: {
            key: round(len(found & seen) / len(found), 6) if found else 0.0
            for key, found in problems.items()
        }
        for name, problems in grams.items()
    }


def summary(shares: Mapping[str, float]) -> dict[str, Any]:
    """How many problems share anything, and half or more, with the training data."""
    values = list(shares.values())
    return {
        "num_problems": len(values),
        "num_overlapping": sum(value > 0 for value in values),
        "num_half_or_more": sum(value >= 0.5 for value in values),
        "mean_share": sum(values) / len(values) if values else 0.0,
    }


def texts_of(row: Any) -> list[str]:
    """Every text in a row of training data, however deep."""
    if isinstance(row, str):
        return [row]
    if isinstance(row, Mapping):
        return [text for value in row.values() for text in texts_of(value)]
    if isinstance(row, Sequence) and not isinstance(row, bytes):
        return [text for value in row for text in texts_of(value)]
    return []
