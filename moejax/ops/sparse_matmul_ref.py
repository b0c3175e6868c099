"""Products with chosen blocks by their definition: the blocks are gathered, then multiplied."""

import jax
import jax.numpy as jnp


def sparse_matmul_ref(x: jax.Array, w_MPD: jax.Array, chosen_K: jax.Array) -> jax.Array:
    """See `moejax.ops.sparse_matmul.sparse_matmul`; takes memory for a copy of the blocks."""
    form = "bd,kpd->bkp" if x.ndim == 2 else "bkp,kpd->bd"
    accum = jnp.promote_types(x.dtype, jnp.float32)
    out = jnp.einsum(form, x, w_MPD[chosen_K], preferred_element_type=accum)
    return out.astype(x.dtype)
