"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """RMS norm (Zhang and Sennrich 2019, eq. 4): ``x / sqrt(mean(x^2) + eps) * scale``.

    x: [..., D]. The mean is taken in float32 and the result has x's dtype, as Llama does it.
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse).astype(x.dtype) * scale_D.astype(x.dtype)


def rms_norm_delta(x: jax.Array, delta_D: jax.Array, eps: float) -> jax.Array:
    """RMS norm times ``1 + delta`` (Gemma), multiplied in float32 before it is rounded.

    x: [..., D]; the result has x's dtype. A checkpoint stores delta, and 1 + delta would round it.
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * (1.0 + delta_D.astype(jnp.float32))).astype(x.dtype)


def layer_norm(
    x: jax.Array, eps: float, scale_D: jax.Array | None = None, bias_D: jax.Array | None = None
) -> jax.Array:
    """Layer norm (Ba et al. 2016, eq. 4): ``(x - mean) / sqrt(var + eps) * scale + bias``.

    x: [..., D]. Computed in float32, rounded once to x's dtype. Without scale and bias: neither.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + eps)
    if scale_D is not None:
        y = y * scale_D.astype(jnp.float32)
    if bias_D is not None:
        y = y + bias_D.astype(jnp.float32)
    return y.astype(x.dtype)
