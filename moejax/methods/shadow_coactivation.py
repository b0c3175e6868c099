"""An order of neurons in which those that matter to the same texts lie side by side."""

from __future__ import annotations

import numpy as np


def coactivation_order(scores_NF: np.ndarray, block: int) -> np.ndarray:
    """int32 [F]: neurons so that those of a block rise and fall together over texts.

    Importances are made shares of their text and square roots taken, so that a few large ones do
    not decide alone. Then, as in a k-d tree: sort by the projection on the first principal
    direction of these rows, not centred (so that the mean importance is the first thing that
    separates), cut in two at a multiple of the block, and go on in both parts.

    scores_NF: >= 0, of N texts; block divides F. The order of neurons within a block and of blocks
    changes no mask.
    """
    share_NF = np.abs(scores_NF) / np.maximum(np.abs(scores_NF).sum(1, keepdims=True), 1e-30)
    rows_FN = np.sqrt(share_NF.T).astype(np.float32)
    return np.concatenate(_halves(rows_FN, np.arange(len(rows_FN)), block)).astype(np.int32)


def _halves(rows_FN: np.ndarray, members: np.ndarray, block: int) -> list[np.ndarray]:
    if len(members) <= block:
        return [members]
    mine = rows_FN[members]
    if len(members) < len(rows_FN):  # the mean direction has been cut along already
        mine = mine - mine.mean(0)
    ordered = members[np.argsort(-(mine @ _direction(mine)), kind="stable")]
    cut = (len(members) // block + 1) // 2 * block
    return [*_halves(rows_FN, ordered[:cut], block), *_halves(rows_FN, ordered[cut:], block)]


def _direction(rows_MN: np.ndarray, rounds: int = 20) -> np.ndarray:
    """The first right singular vector, by power iteration from the largest row."""
    vector = rows_MN[np.argmax((rows_MN**2).sum(1))] + 1e-9
    for _ in range(rounds):
        vector = rows_MN.T @ (rows_MN @ vector)
        vector /= max(float(np.linalg.norm(vector)), 1e-30)
    return vector


def explained(scores_NF: np.ndarray, order_F: np.ndarray, block: int) -> float:
    """How much of the variance over texts of neurons' shares survives summing over blocks.

    Var of block sums over block * sum of the neurons' variances: 1 if a block's neurons move as
    one, 1 / block if they are independent.
    """
    share_NF = scores_NF / np.maximum(scores_NF.sum(1, keepdims=True), 1e-30)
    sums_NU = share_NF[:, order_F].reshape(len(share_NF), -1, block).sum(-1)
    return float(sums_NU.var(0).sum() / max(block * share_NF.var(0).sum(), 1e-300))
