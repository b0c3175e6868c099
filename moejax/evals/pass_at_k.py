"""Pass@k: the chance that at least one of k samples passes, from n samples of which c passed."""

import numpy as np
from numpy.typing import ArrayLike


def estimate(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> np.ndarray:
    """Returns the unbiased estimate of Pass@k per task.

        1 - C(n - c, k) / C(n, k) = 1 - prod_{j = n-c+1 .. n} (1 - k / j)

    (Chen et al. 2021, equation 1); the product has no large binomials, and is 0 where n - c < k.

    Args:
      num_samples: n, an integer or an array of them, one per task.
      num_correct: c, broadcast against `num_samples`.
      k: how many samples one may submit.

    Returns:
      float64, of the broadcast shape; its mean over tasks is the data set's Pass@k.

    Raises:
      ValueError: k < 1, k > n, or c outside [0, n].
    """
    n, c = np.broadcast_arrays(_integers(num_samples, "num_samples"), _integers(num_correct, "c"))
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    if n.size and k > n.min():
        raise ValueError(f"k is {k} but a task has {n.min()} samples: draw more or lower k")
    if n.size and ((c < 0) | (c > n)).any():
        raise ValueError("num_correct must lie between 0 and num_samples")
    return np.array(
        [_one(int(ni), int(ci), k) for ni, ci in zip(n.flat, c.flat, strict=True)]
    ).reshape(n.shape)


def _one(n: int, c: int, k: int) -> float:
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def _integers(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    return array
