"""Products of vectors and a matrix in which, on a CPU, all leading dims are one dim of rows.

The gradient of the matrix is a sum over rows. Over several dims XLA for CPUs first makes a copy of
x or of dL/dy, transposed; over one it multiplies them where they lie. Elsewhere a layout serves as
well, and to give another shape may cost a copy.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moejax.core.platform import platform


def matmul(x: jax.Array, w: jax.Array, **settings: Any) -> jax.Array:
    """`jnp.matmul`: [..., D] times [D, F], or times as many matrices [..., D, F]."""
    if w.ndim == 2 and platform() == "cpu":
        return einsum("...d,df->...f", x, w, **settings)
    return jnp.matmul(x, w, **settings)


def einsum(form: str, x: jax.Array, w: jax.Array, **settings: Any) -> jax.Array:
    """`jnp.einsum` of x [..., D] and a matrix, form "...d,dhc->...hc" or the like."""
    if platform() != "cpu" or x.ndim < 3:
        return jnp.einsum(form, x, w, **settings)
    y = jnp.einsum(form, x.reshape(-1, x.shape[-1]), w, **settings)
    return y.reshape(*x.shape[:-1], *y.shape[1:])
