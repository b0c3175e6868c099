"""Other means of checkpoints, one tensor at a time: the baselines of WiSE-FT.

Each takes the tensor of every model as a list of float32 arrays of one shape, oldest first (for
task vectors: the base first), and returns one of that shape.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from moejax.core.errors import InputError

Arrays = Sequence[np.ndarray]


def slerp(ends: Arrays, delta: float) -> np.ndarray:
    """From `ends[1]` (delta 0) to `ends[0]` (delta 1) along the arc between their directions.

    sin(delta phi)/sin(phi) early + sin((1 - delta) phi)/sin(phi) late, phi the angle between the
    tensors as vectors (Shoemake 1985). Nearly parallel or opposite ones, and zeros, are mixed
    linearly: their arc is a line or not defined.
    """
    early, late = ends
    if delta in (0, 1):
        return early if delta else late
    norms = float(np.linalg.norm(early)) * float(np.linalg.norm(late))
    cosine = float(np.vdot(early, late)) / norms if norms else 1.0
    if abs(cosine) > 1 - 1e-6:
        return delta * early + (1 - delta) * late
    phi = np.arccos(cosine)
    first, second = np.sin(delta * phi) / np.sin(phi), np.sin((1 - delta) * phi) / np.sin(phi)
    return np.float32(first) * early + np.float32(second) * late


def ties(models: Arrays, scale: float, density: float) -> np.ndarray:
    """base + scale * (mean, where signs agree, of trimmed task vectors): TIES (arXiv 2306.01708).

    Trim: of each task vector (model - base) the share `density` of largest magnitude stays. Elect:
    the sign of their sum. Merge: the mean of those entries that have the elected sign.
    """
    base, *rest = models
    kept = np.stack([_trimmed(model - base, density) for model in rest])
    sign = np.sign(kept.sum(axis=0))
    agree = (np.sign(kept) == sign) & (kept != 0)
    mean = np.where(agree, kept, 0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    return base + np.float32(scale) * mean.astype(base.dtype)


def dare(models: Arrays, scale: float, density: float, seed: int, name: str) -> np.ndarray:
    """base + scale * sum of thinned task vectors: DARE (arXiv 2311.03099).

    Each entry of a task vector stays with probability `density` and is divided by it. Draws depend
    on the seed, the tensor's name and the model's number alone, not on the order of tensors.
    """
    base, *rest = models
    total = np.zeros_like(base)
    for number, model in enumerate(rest):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
        stays = rng.random(base.shape, np.float32) < density
        total += np.where(stays, model - base, 0) / np.float32(density)
    return base + np.float32(scale) * total


def check_density(density: float) -> None:
    """Raises InputError unless a share lies in (0, 1]."""
    if not 0 < density <= 1:
        raise InputError(f"density must lie in (0, 1], got {density}: it is the share that stays")


def _trimmed(vector: np.ndarray, density: float) -> np.ndarray:
    num_kept = max(1, round(density * vector.size))
    if num_kept >= vector.size:
        return vector
    sizes = np.abs(vector).reshape(-1)
    limit = np.partition(sizes, sizes.size - num_kept)[sizes.size - num_kept]
    return np.where(np.abs(vector) >= limit, vector, 0)
