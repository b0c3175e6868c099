"""Normalisation."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """RMS norm (Zhang and Sennrich 2019, eq. 4): ``x / sqrt(mean(x^2) + eps) * scale``.

    x: [..., D]. The mean is taken in float32 and the result has x's dtype, as Llama does it.
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse).astype(x.dtype) * scale_D.astype(x.dtype)
