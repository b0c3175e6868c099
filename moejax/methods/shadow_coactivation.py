"""An order of neurons in which those that matter to the same texts lie side by side."""

from __future__ import annotations

import numpy as np


def coactivation_order(scores_NF: np.ndarray, block: int) -> np.ndarray:
    """int32 [F]: neurons so that those of a block rise and fall together over texts.

    Importances are made shares of their text, and square roots taken so that a few large ones do
    not decide alone; a neuron is then a point in N dims, in which both its level and its ups and
    downs are told apart. Greedily, from the most important neuron left: the `block` points nearest
    to it, and then those nearest to their mean.

    scores_NF: >= 0, of N texts; block divides F. The order of neurons within a block and of blocks
    changes no mask.
    """
    share_NF = np.abs(scores_NF) / np.maximum(np.abs(scores_NF).sum(1, keepdims=True), 1e-30)
    rows_FN = np.sqrt(share_NF.T).astype(np.float32)
    size_F = (rows_FN**2).sum(1)
    left = np.argsort(-size_F, kind="stable")
    found = []
    while len(left) > block:
        centre = rows_FN[left[0]]
        for _ in range(3):
            distance = size_F[left] - 2 * rows_FN[left] @ centre
            near = np.argpartition(distance, block)[:block]
            centre = rows_FN[left[near]].mean(0)
        found.append(np.sort(left[near]))
        left = np.delete(left, near)
    return np.concatenate([*found, np.sort(left)]).astype(np.int32)


def explained(scores_NF: np.ndarray, order_F: np.ndarray, block: int) -> float:
    """How much of the variance over texts of neurons' shares survives summing over blocks.

    Var of block sums over block * sum of the neurons' variances: 1 if a block's neurons move as
    one, 1 / block if they are independent.
    """
    share_NF = scores_NF / np.maximum(scores_NF.sum(1, keepdims=True), 1e-30)
    sums_NU = share_NF[:, order_F].reshape(len(share_NF), -1, block).sum(-1)
    return float(sums_NU.var(0).sum() / max(block * share_NF.var(0).sum(), 1e-300))
