"""Sums over the rows of each group: gradients of the matrices of a grouped matmul."""

import jax
import jax.numpy as jnp

from moejax.ops.group_sizes import GroupSizes, integers, plain
from moejax.ops.grouped_matmul import chosen, grouped_matmul


def grouped_outer(
    lhs: jax.Array,
    d_out: jax.Array,
    group_sizes: GroupSizes,
    before: jax.Array | None = None,
    begins: jax.Array | bool | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """before[e] + the sum over rows r of group e of lhs[r]^T d_out[r], in float32.

    It is what `grouped_matmul` gives as the gradient of rhs, for sums over several calls. lhs
    [R, K], d_out [R, N] of one dtype, group_sizes [E] -> [E, K, N]; before: [E, K, N] float32 or
    None. begins: a bool, true where `before` is what `room_for_sums` gave. implementation, and what
    is raised: as in `grouped_matmul`; `tpu` adds where `before` lies and rounds nothing, the others
    add their own gradient, which has the operands' dtype.
    """
    if chosen(implementation) == "tpu":
        from moejax.ops.grouped_matmul_tpu import grouped_outer_tpu  # Pallas is slow to import

        return grouped_outer_tpu(lhs, d_out, integers(group_sizes), before, begins)

    def product(rhs: jax.Array) -> jax.Array:
        return grouped_matmul(lhs, rhs, group_sizes, implementation=implementation)

    rhs = jnp.zeros((plain(group_sizes).size, lhs.shape[1], d_out.shape[1]), lhs.dtype)
    sums = jax.vjp(product, rhs)[1](d_out)[0].astype(jnp.float32)
    return sums if before is None or begins is True else before + sums


def room_for_sums(shape: tuple[int, ...], implementation: str | None = None) -> jax.Array:
    """A first `before` of `grouped_outer`, float32: zeros, or for `tpu` whatever lies there."""
    if chosen(implementation) == "tpu":
        return jax.lax.empty(shape, jnp.float32)
    return jnp.zeros(shape, jnp.float32)
