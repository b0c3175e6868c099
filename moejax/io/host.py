"""Host arrays that jax's CPU backend takes as they are, without the copy it makes of others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# XLA's CPU client aliases a numpy array that starts on a multiple of this many bytes; it never
# writes to one, not even when it is donated.
_ALIGNMENT = 64


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Like `numpy.empty`, aligned for jax."""
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def aligned(value: np.ndarray, dtype: Any = None) -> np.ndarray:
    """The array itself when it is contiguous, aligned and of that dtype, else such a copy."""
    dtype = value.dtype if dtype is None else np.dtype(dtype)
    if value.dtype == dtype and value.flags.c_contiguous and value.ctypes.data % _ALIGNMENT == 0:
        return value
    copy = empty(value.shape, dtype)
    with np.errstate(over="ignore"):  # the caller looks for values that did not fit
        copy[...] = value
    return copy
