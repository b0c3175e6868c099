"""Attention over the states of another text, of which each query sees a prefix."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.ops.wide_product import wide_product

# Distances up to this are told apart one by one, larger ones by their logarithm.
EXACT_DISTANCES = 8
NUM_BUCKETS = 24
_FARTHEST = 4096
STEEPEST, FLATTEST = 4.0, 1 / 32  # slopes of `recency`
# Float32 scores of so many bytes exist at a time; queries are cut so that they do.
MAX_SCORE_BYTES = 64 << 20


def cross_attention(
    q_BTHC: jax.Array,
    k_BHSC: jax.Array,
    v_BHSC: jax.Array,
    limit_BT: jax.Array,
    bias_HN: jax.Array | None = None,
    max_score_bytes: int = MAX_SCORE_BYTES,
) -> jax.Array:
    """softmax(q k / sqrt(C) + bias) v over the first limit[b, t] keys; 0 where there are none.

    Args:
      q_BTHC, k_BHSC, v_BHSC: float; heads first in keys and values, as in a cache.
      limit_BT: int32, how many keys query t sees.
      bias_HN: per head and `bucket` of the distance to the newest key in sight; None: none.
      max_score_bytes: of float32 scores kept at a time, forward and backward.

    Returns:
      [B, T, H, C] in q's dtype; scores and softmax are float32.
    """
    num_batch, num_queries, num_heads, _ = q_BTHC.shape
    num_keys = k_BHSC.shape[2]
    chunk = max(1, max_score_bytes // max(1, 4 * num_batch * num_heads * num_keys))
    if chunk >= num_queries:
        return _attend(q_BTHC, k_BHSC, v_BHSC, limit_BT, bias_HN)
    num_chunks = -(-num_queries // chunk)
    chunk = -(-num_queries // num_chunks)
    pad = num_chunks * chunk - num_queries

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(num_batch, num_chunks, chunk, *x.shape[2:]), 1, 0)

    attend = jax.checkpoint(_attend, prevent_cse=False)
    pieces = jax.lax.map(
        lambda xs: attend(xs[0], k_BHSC, v_BHSC, xs[1], bias_HN), (cut(q_BTHC), cut(limit_BT))
    )
    whole = jnp.moveaxis(pieces, 0, 1).reshape(num_batch, -1, *q_BTHC.shape[2:])
    return whole[:, :num_queries]


def attention_weights(
    q_BTHC: jax.Array, k_BHSC: jax.Array, limit_BT: jax.Array, bias_HN: jax.Array | None = None
) -> jax.Array:
    """The softmax of `cross_attention`, float32 [B, H, T, S]; 0 for a query that sees nothing."""
    scores = wide_product(functools.partial(jnp.einsum, "bthc,bhsc->bhts"), q_BTHC, k_BHSC)
    scores = scores * q_BTHC.shape[-1] ** -0.5
    keys_S = jnp.arange(k_BHSC.shape[2])
    distance_BTS = limit_BT[:, :, None] - 1 - keys_S
    if bias_HN is not None:
        scores = scores + jnp.moveaxis(bias_HN.astype(jnp.float32).T[bucket(distance_BTS)], 3, 1)
    seen = (distance_BTS >= 0)[:, None]
    scores = jnp.where(seen, scores, -1e30)
    return jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0.0)


def _attend(q_BTHC, k_BHSC, v_BHSC, limit_BT, bias_HN) -> jax.Array:
    weights = attention_weights(q_BTHC, k_BHSC, limit_BT, bias_HN).astype(v_BHSC.dtype)
    return jnp.einsum("bhts,bhsc->bthc", weights, v_BHSC).astype(q_BTHC.dtype)


def bucket(distance: jax.Array) -> jax.Array:
    """Distances 0, 1, ... as numbers below NUM_BUCKETS: exact up to 7, then logarithmic to 4096."""
    distance = jnp.maximum(distance, 0)
    above = jnp.maximum(distance, EXACT_DISTANCES).astype(jnp.float32) / EXACT_DISTANCES
    rest = NUM_BUCKETS - EXACT_DISTANCES
    step = jnp.log(above) / jnp.log(_FARTHEST / EXACT_DISTANCES) * rest
    far = jnp.minimum(EXACT_DISTANCES + step.astype(jnp.int32), NUM_BUCKETS - 1)
    return jnp.where(distance < EXACT_DISTANCES, distance, far)


def first_distances() -> np.ndarray:
    """The smallest distance that falls into each bucket, float64 [NUM_BUCKETS]."""
    numbers = np.arange(NUM_BUCKETS)
    share = np.maximum(numbers - EXACT_DISTANCES, 0) / (NUM_BUCKETS - EXACT_DISTANCES)
    far = EXACT_DISTANCES * (_FARTHEST / EXACT_DISTANCES) ** share
    return np.where(numbers < EXACT_DISTANCES, numbers, far)


def recency(num_heads: int) -> np.ndarray:
    """A bias [num_heads, NUM_BUCKETS] by which the first heads look at the newest keys, float32.

    -slope * distance as in ALiBi (arXiv 2108.12409), slopes in equal ratios from 4 (the newest key
    has 98% of the weight of equal scores) to 1/32 (the newest 32 have 63%).
    """
    share = np.arange(num_heads) / max(num_heads - 1, 1)
    slopes = STEEPEST * (FLATTEST / STEEPEST) ** share
    return (-slopes[:, None] * first_distances()).astype(np.float32)
