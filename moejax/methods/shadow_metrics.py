"""How well predicted scores rank a layer's units, and what of it a static mean already does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last dim, from 0; equal values share their mean rank."""
    values = np.asarray(values)
    order = np.argsort(values, axis=-1, kind="stable")
    rank = np.empty(values.shape, np.float64)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(values.shape[-1]), values.shape), -1)
    tied = np.diff(np.take_along_axis(values, order, -1), axis=-1) == 0
    for row in np.argwhere(tied.any(-1)):
        at = tuple(row)
        _, inverse, counts = np.unique(values[at], return_inverse=True, return_counts=True)
        rank[at] = (np.bincount(inverse, rank[at]) / counts)[inverse]
    return rank


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last dim; 0 where one side is constant."""
    x, y = (r - r.mean(-1, keepdims=True) for r in (ranks(a), ranks(b)))
    size = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.where(size > 0, (x * y).sum(-1) / np.where(size > 0, size, 1), 0.0)


def overlap(scores: np.ndarray, truth: np.ndarray, keep: int) -> np.ndarray:
    """Share of the truth's best `keep` units that are among the scores' best, per row."""
    best = [ranks(-np.asarray(values)) < keep for values in (scores, truth)]
    return (best[0] & best[1]).sum(-1) / keep


def held_out(
    predicted_NLU: np.ndarray, truth_NLU: np.ndarray, static_LU: np.ndarray, keep: int
) -> dict[str, np.ndarray]:
    """Per text and layer [N, L]: how a prediction ranks units, and how the static mean does.

    "spearman" and "overlap" of the prediction, "static_spearman" and "static_overlap" of the mean
    over training texts, and "gain": Spearman's correlation, over a layer's units, of how this
    text's prediction differs from its mean over texts with how the truth does, both as shares of
    their layer. Scale between layers and between texts cannot raise any of them, and whatever does
    not depend on the text has gain 0.
    """
    static = np.broadcast_to(static_LU, truth_NLU.shape)
    return {
        "spearman": spearman(predicted_NLU, truth_NLU),
        "overlap": overlap(predicted_NLU, truth_NLU, keep),
        "static_spearman": spearman(static, truth_NLU),
        "static_overlap": overlap(static, truth_NLU, keep),
        "gain": spearman(_own(predicted_NLU), _own(truth_NLU)),
    }


def gain_within(
    predicted_NLU: np.ndarray, truth_NLU: np.ndarray, source_N: Sequence[str]
) -> np.ndarray:
    """The gain of `held_out` [N, L] against the mean of texts of the same source.

    What is left once a predictor has told prose from code.
    """
    names, found = np.asarray(source_N), np.zeros(truth_NLU.shape[:2])
    for name in np.unique(names):
        mine = names == name
        found[mine] = spearman(_own(predicted_NLU[mine]), _own(truth_NLU[mine]))
    return found


def _own(scores_NLU: np.ndarray) -> np.ndarray:
    """What of a text's shares of a layer is its own: their differences to the mean over texts."""
    shares = scores_NLU / np.maximum(np.abs(scores_NLU).sum(-1, keepdims=True), 1e-30)
    shares = np.asarray(shares, np.float64)
    own = shares - shares.mean(0)
    return np.where(np.abs(own) > 1e-6 * np.abs(shares).max(-1, keepdims=True), own, 0.0)
