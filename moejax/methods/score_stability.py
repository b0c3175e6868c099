"""How many tokens it takes until a task's experts no longer depend on which tokens were read.

ESFT, arXiv 2407.01906, appendix C: two samples that share no sequence are scored apart; how many of
the K highest experts of a layer they have in common says how far the ranking can be trusted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moejax.methods.expert_scores import Counted
from moejax.methods.expert_selection import select_by_count, select_by_threshold


@dataclasses.dataclass(frozen=True)
class Stability:
    """sizes: tokens of each of two samples. overlap: share of their K best experts in common, mean
    over layers and draws; low, high: the smallest and largest draw. chosen: intersection over
    union of what --threshold would select, where one was given. stable_at: the first size from
    which on `overlap` stays at or above `level`; None if it never does."""

    score: str
    level: float
    sizes: tuple[int, ...]
    overlap: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    chosen: tuple[float, ...]
    stable_at: int | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def stability(
    counted: Counted,
    score: str = "token",
    *,
    average: str = "pooled",
    threshold: float | None = None,
    level: float = 0.9,
    draws: int = 5,
    seed: int = 0,
) -> Stability:
    """Overlap of two disjoint random samples of n tokens each, n doubling up to half of all."""
    tokens = np.asarray(counted.sequences.tokens)
    half = int(tokens.sum()) // 2
    sizes = [int(n) for n in half / 2.0 ** np.arange(7, -1, -1) if n >= 1]
    rows = []
    for size in sizes:
        pairs = [_two_samples(tokens, size, np.random.default_rng([seed, d])) for d in range(draws)]
        found = [_compare(counted, pair, score, average, threshold) for pair in pairs]
        rows.append(np.array(found))
    overlap = [float(row[:, 0].mean()) for row in rows]
    return Stability(
        score,
        level,
        tuple(sizes),
        tuple(overlap),
        tuple(float(row[:, 0].min()) for row in rows),
        tuple(float(row[:, 0].max()) for row in rows),
        () if threshold is None else tuple(float(row[:, 1].mean()) for row in rows),
        _stable_at(sizes, overlap, level),
    )


def _two_samples(tokens: np.ndarray, size: int, draw: np.random.Generator):
    """Rows of two disjoint samples of whole sequences, each of about `size` tokens."""
    order = draw.permutation(len(tokens))
    ends = np.cumsum(tokens[order])
    first = max(1, int(np.searchsorted(ends, size, side="right")))
    second = max(first + 1, int(np.searchsorted(ends, 2 * size, side="right")))
    return order[:first], order[first:second]


def _compare(counted: Counted, pair, score: str, average: str, threshold) -> tuple[float, float]:
    """(share of the K best in common, intersection over union of the selected)."""
    if not all(len(rows) for rows in pair):
        return 0.0, 0.0
    both = [counted.subset(rows).scores(average) for rows in pair]
    best = [select_by_count(scores, score, counted.top_k).experts for scores in both]
    shared = [len(set(best[0][n]) & set(best[1][n])) / counted.top_k for n in counted.layers]
    if threshold is None:
        return float(np.mean(shared)), 0.0
    taken = [set(select_by_threshold(scores, score, threshold).pairs) for scores in both]
    return float(np.mean(shared)), len(taken[0] & taken[1]) / len(taken[0] | taken[1])


def _stable_at(sizes, overlap, level: float) -> int | None:
    found = None
    for size, value in zip(reversed(sizes), reversed(overlap), strict=True):
        if value < level:
            break
        found = size
    return found
