"""Host arrays that jax's CPU backend takes as they are, without the copy it makes of others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# XLA's CPU client aliases a numpy array that starts on a multiple of this many bytes; it never
# writes to one, not even when it is donated.
_ALIGNMENT = 64
# Rows that a transposing copy takes at a time: a line of a processor's cache on the other side.
_STRIPE = 16


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Like `numpy.empty`, aligned for jax."""
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def transposed(value: np.ndarray) -> np.ndarray:
    """A matrix's transpose as a row-major array of its own (any strides come in).

    Numpy copies column by column of one side; a few rows at a time stay in the cache on both.
    """
    source = value.view(f"u{value.itemsize}") if value.dtype.kind == "V" else value
    if not source.flags.c_contiguous:
        return np.ascontiguousarray(value.T)
    made = empty(value.shape[::-1], source.dtype)
    for first in range(0, len(source), _STRIPE):
        made[:, first : first + _STRIPE] = source[first : first + _STRIPE].T
    return made.view(value.dtype)


def row_major(value: np.ndarray) -> np.ndarray:
    """The array itself when it is contiguous, else such a copy."""
    turned = value.ndim == 2 and value.T.flags.c_contiguous and not value.flags.c_contiguous
    return transposed(value.T) if turned else np.ascontiguousarray(value)


def aligned(value: np.ndarray, dtype: Any = None) -> np.ndarray:
    """The array itself when it is contiguous, aligned and of that dtype, else such a copy."""
    dtype = value.dtype if dtype is None else np.dtype(dtype)
    if value.dtype == dtype and value.flags.c_contiguous and value.ctypes.data % _ALIGNMENT == 0:
        return value
    copy = empty(value.shape, dtype)
    with np.errstate(over="ignore"):  # the caller looks for values that did not fit
        copy[...] = value
    return copy
