"""Softmax attention with grouped keys and values."""

import jax
import jax.numpy as jnp


def attention(
    q_BTHC: jax.Array, k_BGSC: jax.Array, v_BGSC: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) with grouped keys and values.

    Args:
      q_BTHC: queries; H is a multiple of G and head h reads group h // (H / G).
      k_BGSC, v_BGSC: keys and values, heads first: the order in which they are multiplied, so
        that a cache kept in it is read without a copy.
      mask_BTS: bool, True where a query may look. A row that may look nowhere gives a mean of
        the values, never NaN: such rows are padding and nothing reads them.

    Returns:
      [B, T, H, C] in q's dtype; scores and softmax are float32.
    """
    num_batch, num_queries, num_heads, head_size = q_BTHC.shape
    num_groups = k_BGSC.shape[1]
    q = q_BTHC.reshape(num_batch, num_queries, num_groups, num_heads // num_groups, head_size)
    q_BGTJC = jnp.transpose(q, (0, 2, 1, 3, 4))  # J: the heads that share one group
    scores = jnp.einsum("bgtjc,bgsc->bgtjs", q_BGTJC, k_BGSC, preferred_element_type=jnp.float32)
    scores = scores * (head_size**-0.5)
    scores = jnp.where(mask_BTS[:, None, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BGSC.dtype)
    out_BGTJC = jnp.einsum("bgtjs,bgsc->bgtjc", weights, v_BGSC)
    return jnp.transpose(out_BGTJC, (0, 2, 1, 3, 4)).reshape(q_BTHC.shape)
