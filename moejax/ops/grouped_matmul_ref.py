"""Grouped matmul by its definition: every row times every matrix, then the right one kept."""

import jax
import jax.numpy as jnp


def grouped_matmul_ref(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, groups: jax.Array | None = None
) -> jax.Array:
    """out[r] = sum_e [row r lies in group e] lhs[r] @ rhs[e]; E times the work, no tricks."""
    if groups is not None:
        rhs = jnp.where(groups[:, None, None], rhs, jax.lax.stop_gradient(rhs))
    ends_E = jnp.cumsum(group_sizes)
    rows_R1 = jnp.arange(lhs.shape[0])[:, None]
    inside_RE = (rows_R1 >= ends_E - group_sizes) & (rows_R1 < ends_E)
    accum = jnp.promote_types(lhs.dtype, jnp.float32)
    all_REN = jnp.einsum("rk,ekn->ren", lhs, rhs, preferred_element_type=accum)
    return jnp.where(inside_RE[:, :, None], all_REN, 0).sum(axis=1).astype(lhs.dtype)
